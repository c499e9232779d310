// Cards, frames and edges as SVG. Text from the model only ever becomes a text node, never markup.

const HEADER_SVG = document.getElementById("drawing");

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(HEADER_SVG.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function html(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** 1234567 → "1.23 M"; amounts below a thousand stay whole. */
function amount(value, unit = "") {
  const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, prefix] = steps.find(([step]) => value >= step * 0.9995) ?? [1, ""];
  const scaled = value / size;
  const digits = prefix === "" ? 0 : scaled >= 99.95 ? 0 : scaled >= 9.995 ? 1 : 2;
  return `${scaled.toFixed(digits)}${prefix || unit ? "\u202f" : ""}${prefix}${unit}`;
}

function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1\u202f%";
  const whole = share === 0 || share === 1 || (share >= 0.1 && share <= 0.99);
  const shown = share < 1 ? Math.min(99.9, share * 100) : share * 100;
  return `${shown.toFixed(whole ? 0 : 1)}\u202f%`;
}

const pen = document.createElement("canvas").getContext("2d");
const textWidth = (text, font) => {
  pen.font = `${font} ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
};

/** The end of a path without the part that was cut in two, if enough is left. */
function wholeParts(end) {
  const dot = end.indexOf(".");
  return dot >= 0 && dot < end.length / 2 ? end.slice(dot + 1) : end;
}

/** The text as far as it fits into `width` pixels; of a path the end is kept, of anything else the beginning. */
function fitText(text, width, font, keep = "start") {
  if (textWidth(text, font) <= width) return text;
  let [few, many] = [0, text.length];
  const cut = (n) => (keep === "end" ? `…${wholeParts(text.slice(text.length - n))}` : `${text.slice(0, n).trimEnd()}…`);
  while (few < many) {
    const middle = Math.ceil((few + many) / 2);
    if (textWidth(cut(middle), font) <= width) few = middle;
    else many = middle - 1;
  }
  return cut(few);
}

/** Hue of a share: blue-green where all is left, over amber, to red where little is. */
const keptHue = (share) => Math.round(share >= 0.5 ? 40 + (share - 0.5) * 2 * 150 : 4 + share * 2 * 36);

/** [hue, part of the row that is filled] or null for a row without colour. */
function tintOf(unit, mode, totals) {
  if (mode === "kept") {
    const share = keptShare(unit);
    if (share !== null) return [keptHue(share), share];
    return unit.nodes[0].shapes.length && unit.nodes[0].kind !== "output" ? [keptHue(1), 1] : null; // nothing that could go
  }
  if (mode === "macs") {
    const macs = unit.nodes.reduce((sum, node) => sum + node.macs, 0);
    return macs ? [214, Math.max(0.015, macs / totals.unitMacs)] : null;
  }
  const groups = unit.nodes.flatMap((node) => node.groups.map((index) => totals.groups[index]));
  if (!groups.length) return unit.nodes.some((node) => node.why) ? [18, 1] : null;
  const cuttable = groups.filter((group) => group.cuttable).length / groups.length;
  return [cuttable === 1 ? 190 : cuttable === 0 ? 18 : 45, 1];
}

function drawCard(card, item, context) {
  const group = svg("g", { class: card.units[0].block ? "card block" : "card", transform: `translate(${item.x - card.w / 2} ${item.y})` });
  if (card.units[0].block) {
    for (const offset of [8, 4]) group.append(svg("rect", { class: "paper", x: offset, y: offset, width: card.w, height: card.h, rx: 9 }));
  }
  group.append(svg("rect", { class: "paper", width: card.w, height: card.h, rx: 9 }));
  const frame = card.blocks.filter((block) => context.frames.has(`${item.column} ${block}`)).at(-1);
  for (const unit of card.units) group.append(drawRow(unit, card, context, frame));
  return group;
}

function drawRow(unit, card, context, frame) {
  const node = unit.nodes[0];
  const row = svg("g", { class: "row", transform: `translate(${CARD.pad} ${unit.y})`, role: "button", "data-id": node.id });
  if (unit.block) row.setAttribute("data-block", unit.block);
  const width = card.w - 2 * CARD.pad;
  const tint = tintOf(unit, context.mode, context.totals);
  const height = unit.h - 2;
  row.append(svg("rect", { class: tint ? "fill-empty" : "fill none", width, height, y: 1, rx: 5 }));
  if (tint) {
    const fill = svg("rect", { class: "fill", width: Math.max(3, width * tint[1]), height, y: 1, rx: 5 });
    fill.style.setProperty("--h", tint[0]);
    row.append(fill);
  }
  const lines = unit.block ? blockLines(unit, frame) : nodeLines(node, unit, frame);
  row.append(...lines, svg("rect", { class: "mark", width, height, y: 1, rx: 5 }));
  row.append(svg("title", {}, unit.block ? `${unit.block}: click to open` : describe(node)));
  row.setAttribute("aria-label", unit.block ? `block ${unit.block}, ${unit.nodes.length} operations, collapsed` : describe(node));
  return row;
}

const FONT = { name: "600 13px", note: "12px", light: "12px", count: "12px", "frame-title": "12px" };
const INNER = CARD.width - 2 * CARD.pad - 16;

/** A line of text that ends before `width`; of names the end is kept, since their beginnings are alike. */
function label(text, x, y, kind, width = INNER) {
  return svg("text", { x, y, class: kind }, fitText(text, width, FONT[kind], kind === "name" ? "end" : "start"));
}

function channelText(node) {
  if (node.channels === null) return "";
  return node.before !== null && node.before !== node.channels ? `${node.channels} of ${node.before}` : String(node.channels);
}

/** A path without the part that the frame around it says already. */
function within(path, frame) {
  if (!frame || !path.startsWith(`${frame}.`)) return path;
  const parts = path.split(".");
  let from = frame.split(".").length;
  while (from > 0 && /^\d+$/.test(parts[from])) from--; // a number alone says nothing
  return parts.slice(from).join(".");
}

function nodeLines(node, unit, frame) {
  const count = channelText(node);
  const room = INNER - (count ? textWidth(count, FONT.count) + 8 : 0);
  const number = (y) => (count ? [label(count, INNER + 8, y, "count")] : []);
  if (unit.h === CARD.light) return [label(node.detail ? `${node.title} ${node.detail}` : node.title, 8, 16.5, "light", room), ...number(16.5)];
  const title = node.kind === "join" ? node.title : within(node.path, frame) || node.name;
  const parts = ["join", "input", "output"].includes(node.kind) ? [] : [`${node.title} ${node.detail}`.trim(), node.macs ? `${amount(node.macs)} MACs` : ""];
  const note = parts.filter(Boolean).join(" · ") || shapesOf(node).join(", ");
  return [label(title, 8, 17, "name", room), ...number(17), label(note, 8, 33, "note")];
}

function blockLines(unit, frame) {
  const sum = (key) => unit.nodes.reduce((total, node) => total + node[key], 0);
  const share = keptShare(unit);
  const ops = `${unit.nodes.length} operations`;
  return [
    label(within(unit.block, frame), 8, 18, "name", INNER - 18),
    svg("text", { x: INNER - 2, y: 19, class: "toggle" }, "⊞"),
    label(share !== null && share < 1 ? `${ops} · ${percent(share)} of channels` : ops, 8, 36, "note"),
    label(`${amount(sum("macs"))} MACs · ${amount(sum("params"))} params`, 8, 52, "note"),
  ];
}

/** `N×64×56×56`: N where the batch size is free. */
function shapesOf(node, sign = "×") {
  const { batch } = app.data;
  const size = (n, i) => (i === 0 && n === batch ? "N" : String(n));
  return node.shapes.map((shape) => shape.map(size).join(sign) || "scalar");
}

function describe(node) {
  return [node.path || node.name, node.layer || node.op, shapesOf(node).join(", "), channelText(node) && `${channelText(node)} channels`].filter(Boolean).join(" · ");
}

const drawFrame = (box) => svg("rect", { class: box.inner % 2 ? "frame" : "frame odd", x: box.x, y: box.y, width: box.w, height: box.h, rx: 12 });

function drawTitle(box) {
  const title = svg("text", { class: "frame-title", x: box.x + 11, y: box.y + 15, role: "button", "data-close": box.block });
  title.append(`⊟ ${fitText(box.block, box.w - 40, FONT["frame-title"], "end")}`, svg("title", {}, `${box.block}: click to close`));
  return title;
}

/** One path for the trunk of a source with all its branches, and one for the arrow heads. */
function drawEdges(drawing) {
  const lines = new Map();
  const heads = [];
  for (const item of drawing.items) {
    for (const below of item.down) {
      if (!lines.has(item.source)) lines.set(item.source, []);
      lines.get(item.source).push(segmentPath(item, below, drawing.columns));
      if (!below.way) heads.push(`M${below.x - 4} ${below.y - 7}L${below.x + 4} ${below.y - 7}L${below.x} ${below.y}Z`);
    }
  }
  const paths = [...lines].map(([source, parts]) => svg("path", { class: "edge", "data-source": source, d: parts.join("") }));
  return [...paths, svg("path", { class: "head", d: [...new Set(heads)].join("") })];
}

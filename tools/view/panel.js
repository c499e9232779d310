// The panel: the network's summary and groups, or everything about the selected node.

function renderSummary(data) {
  const list = document.getElementById("summary");
  const { totals, original } = data;
  const share = (key) => (original?.[key] > totals[key] ? `${percent(totals[key] / original[key])} of ${amount(original[key])}` : "");
  const facts = [
    ["parameters", amount(totals.params), share("params")],
    ["MACs per image", amount(totals.macs), share("macs")],
    ["size", amount(totals.bytes, "B")],
    ["MACs that can be cut", percent(totals.cuttable_macs)],
  ];
  if (totals.kept !== null && totals.kept < 1) facts.push(["channels kept", percent(totals.kept)]);
  list.replaceChildren(...facts.map(([name, value, note]) => html("div", {}, html("dt", {}, name), html("dd", {}, value, html("small", {}, note ? ` ${note}` : "")))));
  document.getElementById("name").textContent = data.name;
}

function facts(pairs) {
  const list = html("dl", { class: "facts" });
  for (const [name, value] of pairs) if (value !== "" && value !== null) list.append(html("dt", {}, name), html("dd", {}, value));
  return list;
}

/** A path that may be broken behind its dots, by spaces of no width. */
const breakable = (path) => path.replaceAll(".", ".\u200b");

const shapeText = (node) => shapesOf(node, " × ").map((shape, i) => `${shape}  ${node.dtypes[i]}`).join("\n");

function nodeLinks(ids, app, limit = 40) {
  const list = html("ul", { class: "links" });
  const show = (part) => {
    for (const id of part) {
      const node = app.data.nodes[id];
      const button = html("button", { class: "link", type: "button" }, node.path && node.kind !== "join" ? node.path : node.name);
      button.addEventListener("click", () => app.select(id, { centre: true }));
      list.append(html("li", {}, button));
    }
  };
  show(ids.slice(0, limit));
  if (ids.length > limit) {
    const more = html("button", { class: "link", type: "button" }, `${ids.length - limit} more`);
    more.addEventListener("click", () => {
      more.parentElement.remove();
      show(ids.slice(limit));
    });
    list.append(html("li", {}, more));
  }
  return list;
}

function reasonBox(reason, app) {
  const others = reason.more ? ` (and ${reason.more} more such places)` : "";
  const text = `${breakable(reason.node)} ${reason.text}${others}`;
  const box = html("div", { class: "why" }, html("b", {}, "Cannot be cut: "), text);
  if (reason.hint) box.append(html("p", { class: "sub" }, reason.hint));
  box.append(facts([["operation", reason.op]]));
  if (reason.source) box.append(html("code", { class: "code" }, reason.source));
  const node = app.data.nodes.find((other) => other.name === reason.node);
  if (node) box.append(nodeLinks([node.id], app));
  return box;
}

/** One of each kind of reason, with the number of others like it. */
function alike(reasons) {
  const kinds = new Map();
  for (const reason of reasons) {
    const key = `${reason.op} ${reason.text}`;
    if (kinds.has(key)) kinds.get(key).more++;
    else kinds.set(key, { ...reason, more: 0 });
  }
  return [...kinds.values()];
}

function groupSection(group, app, focused) {
  const section = html("section", {});
  const title = html("h3", {}, `Group ${breakable(group.name)}`);
  const status = group.cuttable ? html("span", { class: "ok" }, "can be cut") : "";
  section.append(title, facts([
    ["channels", String(group.channels)],
    ["MACs", `${amount(group.macs)} (${percent(app.data.totals.macs ? group.macs / app.data.totals.macs : 0)})`],
    ["parameters", amount(group.params)],
    ["", ""],
    ["cut", status],
  ]));
  for (const reason of alike(group.reasons)) section.append(reasonBox(reason, app));
  const heading = html("p", { class: "sub" }, `${group.members.length} ${group.members.length === 1 ? "member" : "members"}${group.cuttable ? ", cut together" : ""}`);
  if (app.selectedGroups.length > 1 || !focused) {
    const only = html("button", { class: "link", type: "button", "aria-pressed": String(app.focus === group.id) }, "highlight only these");
    only.addEventListener("click", () => app.focusGroup(app.focus === group.id ? null : group.id));
    heading.append(" ", only);
  }
  section.append(heading, nodeLinks(group.members, app));
  return section;
}

function renderNode(node, app) {
  const panel = document.getElementById("panel");
  const back = html("button", { class: "link", type: "button" }, "← all groups");
  back.addEventListener("click", () => app.select(null));
  const kept = node.before !== null ? node.channels / node.before : null;
  const meter = html("div", { class: "meter" }, html("i"));
  if (kept !== null) {
    meter.firstChild.style.width = `${kept * 100}%`;
    meter.firstChild.style.setProperty("--h", keptHue(kept));
  }
  const { totals } = app.data;
  panel.replaceChildren(
    back,
    html("h2", {}, breakable(node.path || node.name)),
    html("p", { class: "sub" }, node.path && node.path !== node.name ? `${node.op} · node ${node.name}` : node.op),
    node.layer ? html("code", { class: "code" }, node.layer) : "",
    html("h3", {}, "Shapes and cost"),
    facts([
      ["inputs", node.inputs.map((id) => shapeText(app.data.nodes[id])).filter(Boolean).join("\n")],
      ["output", shapeText(node)],
      ["channels", kept === null ? "" : `${node.channels} of ${node.before} (${percent(kept)})`],
      ["MACs", node.macs ? `${amount(node.macs)} (${percent(node.macs / totals.macs)})` : "0"],
      ["parameters", amount(node.params)],
      ["bytes", amount(node.bytes, "B")],
    ]),
    kept === null ? "" : meter,
  );
  for (const dd of panel.querySelectorAll(".facts dd")) dd.style.whiteSpace = "pre-line";
  if (node.source) panel.append(html("h3", {}, "Source"), html("code", { class: "code" }, node.source));
  for (const id of node.groups) panel.append(groupSection(app.data.groups[id], app, node.groups.length === 1));
  if (node.why) panel.append(html("h3", {}, "Why not"), reasonBox(node.why, app));
  if (node.inputs.length) panel.append(html("h3", {}, "Reads"), nodeLinks(node.inputs, app));
  const users = app.users(node.id);
  if (users.length) panel.append(html("h3", {}, "Read by"), nodeLinks(users, app));
  panel.scrollTop = 0;
}

function groupTable(app) {
  const { groups, totals } = app.data;
  const table = html("table", {}, html("thead", {}, html("tr", {}, html("th", {}, "group"), html("th", { class: "n" }, "channels"), html("th", { class: "n" }, "MACs"), html("th", {}, "cut"))));
  const body = html("tbody");
  for (const group of groups.slice().sort((a, b) => b.macs - a.macs)) {
    const button = html("button", { type: "button" }, breakable(group.name));
    const row = html("tr", { "data-group": group.id },
      html("td", {}, button), html("td", { class: "n" }, String(group.channels)),
      html("td", { class: "n" }, percent(totals.macs ? group.macs / totals.macs : 0)),
      html("td", { class: "cut" }, group.cuttable ? html("span", { class: "ok" }, "yes") : "no"));
    row.addEventListener("click", () => app.showGroup(group.id));
    body.append(row);
  }
  table.append(body);
  return table;
}

function reportTable(report) {
  const table = html("table", {});
  table.append(html("thead", {}, html("tr", {}, ...report.columns.map((name, i) => html("th", { class: i ? "n" : "" }, name)))));
  table.append(html("tbody", {}, ...report.rows.map((row) => html("tr", {}, ...row.map((cell, i) => html("td", { class: i ? "n" : "" }, cell))))));
  return table;
}

function renderOverview(app) {
  const panel = document.getElementById("panel");
  const { data } = app;
  const pinned = data.groups.filter((group) => !group.cuttable).length;
  panel.replaceChildren(
    html("h2", {}, "Dependency groups"),
    html("p", { class: "sub" }, data.groups.length
      ? `Channels that live and die together: ${data.groups.length} groups, ${pinned ? `${pinned} of which cannot be cut` : "all of which can be cut"}. A group's MACs are those of the layers that make or read its channels, so shares overlap.`
      : "No channels were found in this graph."),
    data.groups.length ? groupTable(app) : "",
  );
  if (data.report) panel.append(html("h3", {}, "What the passes did"), reportTable(data.report));
  for (const scan of data.sensitivity) panel.append(...sensitivitySection(scan, app));
  const keys = [["click", "a row: everything about it"], ["drag, wheel", "move, zoom"], ["arrows", "walk along the edges"], ["Enter", "open or close a block"], ["/", "search"], ["+ − 0", "zoom, fit"], ["Esc", "back to this list"]];
  panel.append(html("h3", {}, "Keys"), facts(keys.map(([key, text]) => [html("kbd", {}, key), text])));
}

function renderGroup(group, app) {
  const panel = document.getElementById("panel");
  const back = html("button", { class: "link", type: "button" }, "← all groups");
  back.addEventListener("click", () => app.select(null));
  panel.replaceChildren(back, groupSection(group, app, true));
  panel.scrollTop = 0;
}

// State and events: what is open, what is selected, where the window looks.

const SCALE = { least: 0.05, most: 4, first: 1.25 };

class App {
  constructor(data) {
    this.data = data;
    this.readers = new Map(data.nodes.map((node) => [node.id, []]));
    for (const node of data.nodes) for (const id of node.inputs) this.readers.get(id).push(node.id);
    this.collapsed = new Set();
    this.selected = null;
    this.focus = null;
    this.selectedGroups = [];
    this.showSizes = false;
    this.mode = "kept";
    this.view = { x: 0, y: 0, scale: 1 };
    this.svg = document.getElementById("drawing");
  }

  users(id) {
    return [...new Set(this.readers.get(id))];
  }

  /** Lay out and draw anew; `anchor` (a node id) keeps its place on the screen. */
  redraw(anchor = null) {
    const before = anchor === null ? null : this.screenPlace(anchor);
    this.graph = buildCards(this.data.nodes, this.collapsed, this.showSizes);
    const { width, height } = this.svg.getBoundingClientRect();
    this.drawing = layout(this.graph.cards, this.graph.edges, Math.max(0.3, width / Math.max(1, height)));
    this.paint();
    const after = before && this.screenPlace(anchor);
    if (after) this.pan(before.x - after.x, before.y - after.y);
    else this.fit();
  }

  paint() {
    const put = (id, ...children) => document.getElementById(id).replaceChildren(...children);
    const unitMacs = Math.max(1, ...this.graph.cards.flatMap((card) => card.units.map((unit) => unit.nodes.reduce((sum, node) => sum + node.macs, 0))));
    const context = { mode: this.mode, totals: { unitMacs, groups: this.data.groups }, frames: new Set(this.drawing.containers.map((box) => `${box.column} ${box.block}`)) };
    put("frames", ...this.drawing.containers.slice().sort((a, b) => b.inner - a.inner).map(drawFrame));
    put("edges", ...drawEdges(this.drawing));
    put("titles", ...this.drawing.containers.map(drawTitle));
    put("cards", ...this.graph.cards.map((card, index) => drawCard(card, this.drawing.items[index], context)));
    this.rowOf = new Map();
    for (const row of this.svg.querySelectorAll(".row")) {
      const unit = this.unitOf(Number(row.dataset.id));
      for (const node of unit.nodes) this.rowOf.set(node.id, row);
    }
    drawLegend(this.mode);
    this.mark();
  }

  unitOf(id) {
    const card = this.graph.cards[this.graph.cardOf.get(id)];
    return card?.units.find((unit) => unit.nodes.some((node) => node.id === id));
  }

  /** Classes of the selected row and of all members of its groups, and the edges that touch the selection. */
  mark() {
    const members = new Set(this.selectedGroups.filter((id) => this.focus === null || this.focus === id).flatMap((id) => this.data.groups[id].members));
    for (const row of this.svg.querySelectorAll(".row")) row.classList.remove("member", "selected");
    for (const id of members) this.rowOf.get(id)?.classList.add("member");
    this.rowOf.get(this.selected)?.classList.add("selected");
    document.getElementById("world").classList.toggle("dimmed", members.size > 0);
    document.getElementById("routes").replaceChildren(...this.routes());
  }

  routes() {
    const own = this.graph.cardOf.get(this.selected);
    if (own === undefined) return [];
    const touching = this.graph.edges.filter(([from, to]) => from === own || to === own);
    return touching.map(([from, to]) => {
      const parts = routeBetween(this.drawing.items, from, to).map(([a, b]) => segmentPath(a, b, this.drawing.columns));
      return svg("path", { class: "route", d: parts.join("") });
    });
  }

  select(id, { centre = false, keepHash = false } = {}) {
    this.selected = id;
    this.focus = null;
    const node = id === null ? null : this.data.nodes[id];
    this.selectedGroups = node ? node.groups : [];
    if (node && !this.graph.cardOf.has(id)) this.reveal(node);
    if (node) renderNode(node, this);
    else renderOverview(this);
    this.mark();
    if (node && centre) this.centre(id);
    if (!keepHash) history.replaceState(null, "", node ? `#node=${encodeURIComponent(node.name)}` : "#");
    if (node) this.svg.setAttribute("aria-label", describe(node));
  }

  /** A size or a bare parameter is drawn only once all of them are. */
  reveal(node) {
    this.showSizes = this.showSizes || AUXILIARY.has(node.kind);
    document.getElementById("sizes").checked = this.showSizes;
    this.redraw();
  }

  open(node) {
    for (const block of node.blocks) this.collapsed.delete(block);
  }

  showGroup(id) {
    this.selected = null;
    this.focus = null;
    this.selectedGroups = [id];
    renderGroup(this.data.groups[id], this);
    this.mark();
  }

  focusGroup(id) {
    this.focus = id;
    if (this.selected !== null) renderNode(this.data.nodes[this.selected], this);
    this.mark();
  }

  toggle(block) {
    const inside = this.data.nodes.find((node) => node.blocks.includes(block));
    if (this.collapsed.has(block)) this.collapsed.delete(block);
    else this.collapsed.add(block);
    this.redraw(inside.id);
  }

  setLevel(level) {
    this.level = level;
    this.collapsed = blocksBelow(this.data.nodes, level);
    this.redraw();
  }

  // Where the window looks ---------------------------------------------------------------------------------------

  look() {
    const { x, y, scale } = this.view;
    document.getElementById("world").setAttribute("transform", `translate(${x} ${y}) scale(${scale})`);
  }

  pan(dx, dy) {
    this.view.x += dx;
    this.view.y += dy;
    this.look();
  }

  zoom(factor, x = null, y = null) {
    const box = this.svg.getBoundingClientRect();
    const [px, py] = [x === null ? box.width / 2 : x - box.left, y === null ? box.height / 2 : y - box.top];
    const scale = Math.min(SCALE.most, Math.max(SCALE.least, this.view.scale * factor));
    const ratio = scale / this.view.scale;
    this.view = { x: px - (px - this.view.x) * ratio, y: py - (py - this.view.y) * ratio, scale };
    this.look();
  }

  fit() {
    const { width, height } = this.svg.getBoundingClientRect();
    const margin = 26;
    const scale = Math.min((width - 2 * margin) / this.drawing.width, (height - 2 * margin) / this.drawing.height, SCALE.first);
    this.view.scale = Math.max(SCALE.least, scale);
    this.view.x = (width - this.drawing.width * this.view.scale) / 2;
    this.view.y = Math.max(margin, (height - this.drawing.height * this.view.scale) / 2);
    this.look();
  }

  screenPlace(id) {
    const row = this.rowOf?.get(id);
    if (!row) return null;
    const box = row.getBoundingClientRect();
    return { x: box.left + box.width / 2, y: box.top + box.height / 2 };
  }

  /** Bring a node into the middle where it is out of sight or too small to read. */
  centre(id) {
    const box = this.svg.getBoundingClientRect();
    if (this.view.scale < 0.55) this.zoom(0.9 / this.view.scale);
    const place = this.screenPlace(id);
    if (!place) return;
    const margin = 60;
    const inside = place.x > box.left + margin && place.x < box.right - margin && place.y > box.top + margin && place.y < box.bottom - margin;
    if (!inside) this.pan(box.left + box.width / 2 - place.x, box.top + box.height / 2 - place.y);
  }

  // Walking ------------------------------------------------------------------------------------------------------

  /** The node to which an arrow key leads: along an edge, or sideways to the nearest card of the same rank. */
  neighbour(key) {
    if (this.selected === null) return this.data.nodes.find((node) => this.graph.cardOf.has(node.id))?.id ?? null;
    const drawn = (ids) => ids.find((id) => this.graph.cardOf.has(id) && this.unitOf(id) !== this.unitOf(this.selected)) ?? null;
    const unit = this.unitOf(this.selected);
    if (key === "ArrowUp") return drawn(unit.nodes.flatMap((node) => node.inputs));
    if (key === "ArrowDown") return drawn(unit.nodes.flatMap((node) => this.users(node.id)));
    const item = this.drawing.items[this.graph.cardOf.get(this.selected)];
    const step = key === "ArrowLeft" ? -1 : 1;
    const rank = this.drawing.ranks[item.rank];
    for (let pos = item.pos + step; rank[pos]; pos += step) {
      if (!rank[pos].way) return this.graph.cards[rank[pos].index].units[0].nodes[0].id;
    }
    return null;
  }
}

function drawLegend(mode) {
  const legend = document.getElementById("legend");
  const chip = (hue, text) => {
    const box = html("span", { class: "chip" });
    box.style.background = `hsl(${hue} var(--tint-s) var(--tint-l))`;
    return [box, text];
  };
  if (mode === "cut") {
    legend.replaceChildren(...chip(190, "can be cut"), ...chip(45, "in part"), ...chip(18, "cannot"));
    return;
  }
  const ramp = html("span", { class: "ramp" });
  const hues = mode === "kept" ? [0, 0.25, 0.5, 0.75, 1].map(keptHue) : [];
  const stops = mode === "kept" ? hues.map((hue) => `hsl(${hue} var(--tint-s) var(--tint-l))`) : ["var(--empty)", "hsl(214 var(--tint-s) var(--tint-l))"];
  ramp.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  legend.replaceChildren(mode === "kept" ? "0\u202f%" : "none", ramp, mode === "kept" ? "100\u202f% of channels kept" : "the heaviest");
}

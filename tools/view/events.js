// Mouse, touch, keyboard, search, and the page's address.

function listenToDrawing(app) {
  const points = new Map();
  let moved = false;
  app.svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    app.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), event.clientX, event.clientY);
  }, { passive: false });
  app.svg.addEventListener("pointerdown", (event) => {
    points.set(event.pointerId, event);
    moved = false;
  });
  app.svg.addEventListener("pointermove", (event) => {
    const last = points.get(event.pointerId);
    if (!last) return;
    const far = Math.hypot(event.clientX - last.clientX, event.clientY - last.clientY) > 3;
    if (!moved && !far) return;
    if (!moved) app.svg.setPointerCapture(event.pointerId);
    moved = true;
    if (points.size === 2) {
      const other = [...points.values()].find((point) => point.pointerId !== event.pointerId);
      const span = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
      app.zoom(span(event, other) / Math.max(1, span(last, other)), other.clientX, other.clientY);
    } else {
      app.pan(event.clientX - last.clientX, event.clientY - last.clientY);
    }
    points.set(event.pointerId, event);
  });
  for (const end of ["pointerup", "pointercancel"]) app.svg.addEventListener(end, (event) => points.delete(event.pointerId));
  app.svg.addEventListener("click", (event) => {
    if (moved) return;
    const close = event.target.closest("[data-close]");
    const row = event.target.closest(".row");
    if (close) app.toggle(close.dataset.close);
    else if (row?.dataset.block) app.toggle(row.dataset.block);
    else app.select(row ? Number(row.dataset.id) : null);
  });
}

function listenToKeys(app) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select");
    if (event.key === "Escape") {
      document.getElementById("search").blur();
      app.select(null);
      app.svg.focus();
      return;
    }
    if (typing) return;
    const actions = { "/": () => document.getElementById("search").focus(), "+": () => app.zoom(1.25), "=": () => app.zoom(1.25), "-": () => app.zoom(0.8), 0: () => app.fit(), t: switchTheme };
    if (actions[event.key]) {
      actions[event.key]();
      event.preventDefault();
    }
  });
  app.svg.addEventListener("keydown", (event) => {
    if (event.key.startsWith("Arrow")) {
      const next = app.neighbour(event.key);
      if (next !== null) app.select(next, { centre: true });
      event.preventDefault();
    }
    if (event.key === "Enter" && app.selected !== null) {
      const unit = app.unitOf(app.selected);
      const block = unit.block ?? app.data.nodes[app.selected].blocks.at(-1);
      if (block) app.toggle(block);
    }
  });
}

function switchTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
}

function listenToSearch(app) {
  const input = document.getElementById("search");
  const list = document.getElementById("hits");
  let [found, active] = [[], 0];
  const paint = () => {
    list.replaceChildren(...found.map((node, i) => {
      const item = html("li", { role: "option", id: `hit-${i}`, "aria-selected": String(i === active) }, html("span", {}, node.path || node.name), html("small", {}, node.title));
      item.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        choose(i);
      });
      return item;
    }));
    list.hidden = !found.length;
    input.setAttribute("aria-expanded", String(found.length > 0));
    input.setAttribute("aria-activedescendant", found.length ? `hit-${active}` : "");
  };
  const choose = (i) => {
    const node = found[i];
    if (!node) return;
    found = [];
    paint();
    app.open(node);
    app.redraw();
    app.select(node.id, { centre: true });
    app.svg.focus();
  };
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (node) => `${node.path} ${node.name} ${node.op} ${node.title}`.toLowerCase();
    found = words.length ? app.data.nodes.filter((node) => words.every((word) => text(node).includes(word))).slice(0, 60) : [];
    active = 0;
    paint();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") choose(active);
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    active = (active + (event.key === "ArrowDown" ? 1 : found.length - 1)) % Math.max(1, found.length);
    paint();
    document.getElementById(`hit-${active}`)?.scrollIntoView({ block: "nearest" });
    event.preventDefault();
  });
  input.addEventListener("blur", () => {
    found = [];
    paint();
  });
}

function listenToTools(app) {
  const on = (id, event, action) => document.getElementById(id).addEventListener(event, action);
  on("zoom-in", "click", () => app.zoom(1.25));
  on("zoom-out", "click", () => app.zoom(0.8));
  on("zoom-fit", "click", () => app.fit());
  on("theme", "click", switchTheme);
  on("level", "change", (event) => app.setLevel(Number(event.target.value)));
  on("colour", "change", (event) => {
    app.mode = event.target.value;
    app.paint();
  });
  on("sizes", "change", (event) => {
    app.showSizes = event.target.checked;
    app.redraw();
  });
  document.getElementById("sizes-field").hidden = !app.data.nodes.some((node) => AUXILIARY.has(node.kind));
}

function fillLevels(deepest, level) {
  const options = Array.from({ length: deepest + 1 }, (_, i) => {
    const option = html("option", { value: i + 1 }, i === deepest ? "every operation" : i === 0 ? "outer blocks" : `blocks of depth ${i + 1}`);
    return option;
  });
  const select = document.getElementById("level");
  select.replaceChildren(...options);
  select.value = String(level);
}

/** `#node=NAME&level=2&colour=cut&theme=dark`: what to show first. */
function readAddress(app) {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = wanted.get("theme") === null ? (dark ? "dark" : "light") : wanted.get("theme");
  const colour = document.getElementById("colour");
  if ([...colour.options].some((option) => option.value === wanted.get("colour"))) colour.value = app.mode = wanted.get("colour");
  const deepest = Math.max(0, ...app.data.nodes.map((node) => node.blocks.length));
  const level = Math.min(deepest + 1, Number(wanted.get("level")) || startLevel(app.data.nodes, 46));
  fillLevels(deepest, level);
  app.collapsed = blocksBelow(app.data.nodes, level);
  const node = app.data.nodes.find((other) => other.name === wanted.get("node") || (other.path && other.path === wanted.get("node")));
  if (node) app.open(node);
  app.redraw();
  app.select(node ? node.id : null, { centre: true, keepHash: true });
}

const app = new App(JSON.parse(document.getElementById("data").textContent));
renderSummary(app.data);
listenToDrawing(app);
listenToKeys(app);
listenToSearch(app);
listenToTools(app);
readAddress(app);

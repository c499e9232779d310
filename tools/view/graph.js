// The drawn graph: collapsed blocks become one unit, chains of light operations become the rows of one card.

const LIGHT = new Set(["norm", "act", "dropout", "pool", "shape", "other", "join"]);
const AUXILIARY = new Set(["size", "param"]);
const MAX_ROWS = 6;
const CARD = { width: 204, heavy: 42, light: 24, block: 64, pad: 5 };

/** Cards and edges between them. `collapsed`: Set of block paths; sizes and bare parameters need `showSizes`. */
function buildCards(nodes, collapsed, showSizes) {
  const visible = nodes.filter((node) => showSizes || !AUXILIARY.has(node.kind));
  const closed = new Set(collapsed);
  let units;
  for (;;) {
    units = makeUnits(visible, closed);
    const tangled = unitsOnCycles(units);
    if (!tangled.length) break;
    // a module that runs twice, with something else between, cannot be one card
    for (const unit of tangled) if (unit.block) closed.delete(unit.block);
  }
  const cards = stackUnits(units);
  const cardOf = new Map();
  cards.forEach((card, index) => card.units.forEach((unit) => unit.nodes.forEach((node) => cardOf.set(node.id, index))));
  const edges = new Map();
  for (const node of visible) {
    for (const from of node.inputs) {
      const [a, b] = [cardOf.get(from), cardOf.get(node.id)];
      if (a !== undefined && a !== b) edges.set(`${a} ${b}`, [a, b]);
    }
  }
  return { cards, cardOf, edges: [...edges.values()] };
}

function makeUnits(visible, closed) {
  const units = [];
  const byBlock = new Map();
  const unitOf = new Map();
  for (const node of visible) {
    const block = node.blocks.find((path) => closed.has(path)) ?? null;
    let unit = block === null ? undefined : byBlock.get(block);
    if (!unit) {
      unit = { id: units.length, block, nodes: [], inputs: new Set(), outputs: new Set(), blocks: [] };
      unit.blocks = block === null ? node.blocks : node.blocks.slice(0, node.blocks.indexOf(block));
      units.push(unit);
      if (block !== null) byBlock.set(block, unit);
    }
    unit.nodes.push(node);
    unitOf.set(node.id, unit);
  }
  for (const node of visible) {
    const unit = unitOf.get(node.id);
    for (const from of node.inputs) {
      const other = unitOf.get(from);
      if (!other || other === unit) continue;
      unit.inputs.add(other);
      other.outputs.add(unit);
    }
  }
  return units;
}

/** Units that lie on a cycle: what is left when sources, and then sinks, are taken away again and again. */
function unitsOnCycles(units) {
  const left = new Set(units);
  for (const [inward, outward] of [["inputs", "outputs"], ["outputs", "inputs"]]) {
    const ready = [...left].filter((unit) => ![...unit[inward]].some((other) => left.has(other)));
    while (ready.length) {
      const unit = ready.pop();
      if (!left.delete(unit)) continue;
      for (const next of unit[outward]) {
        if (left.has(next) && ![...next[inward]].some((other) => left.has(other))) ready.push(next);
      }
    }
  }
  return [...left];
}

function stackUnits(units) {
  const cards = [];
  for (const unit of topologicalUnits(units)) {
    const card = hostOf(unit) ?? newCard(cards, unit);
    card.units.push(unit);
    unit.card = card;
  }
  for (const card of cards) measureCard(card);
  return cards;
}

function topologicalUnits(units) {
  const waiting = new Map(units.map((unit) => [unit, unit.inputs.size]));
  const ready = units.filter((unit) => !unit.inputs.size);
  for (let i = 0; i < ready.length; i++) {
    for (const next of ready[i].outputs) {
      waiting.set(next, waiting.get(next) - 1);
      if (waiting.get(next) === 0) ready.push(next);
    }
  }
  return ready;
}

function newCard(cards, unit) {
  const card = { units: [], blocks: unit.blocks };
  cards.push(card);
  return card;
}

const isLight = (unit) => !unit.block && LIGHT.has(unit.nodes[0].kind) && unit.inputs.size <= 1;

/** The card whose last row feeds this unit and nothing else, if the unit may become its next row. */
function hostOf(unit) {
  if (unit.block || unit.inputs.size !== 1) return null;
  const [before] = unit.inputs;
  if (before.block || before.outputs.size !== 1 || before.card.units.length >= MAX_ROWS) return null;
  if (["input", "output", "param"].includes(before.nodes[0].kind) || unit.nodes[0].kind === "output") return null;
  if (before.blocks.join(" ") !== unit.blocks.join(" ")) return null;
  const preactivation = before.card.units.every(isLight);
  return isLight(unit) || preactivation ? before.card : null;
}

function rowHeight(unit) {
  if (unit.block) return CARD.block;
  const node = unit.nodes[0];
  return ["conv", "linear", "join", "input", "output"].includes(node.kind) && (!isLight(unit) || node.kind !== "join") ? CARD.heavy : CARD.light;
}

function measureCard(card) {
  let y = CARD.pad;
  for (const unit of card.units) {
    unit.y = y;
    unit.h = rowHeight(unit);
    y += unit.h;
  }
  card.w = CARD.width;
  card.h = y + CARD.pad;
}

/** Share of the original channels that is left in a unit: of the producers' channels where several nodes are one. */
function keptShare(unit) {
  const counted = unit.nodes.filter((node) => node.before !== null && (unit.nodes.length === 1 || node.params > 0));
  const before = counted.reduce((sum, node) => sum + node.before, 0);
  return before ? counted.reduce((sum, node) => sum + node.channels, 0) / before : null;
}

/** The deepest level of blocks that still gives at most `limit` cards; every block at or below it is collapsed. */
function startLevel(nodes, limit) {
  const deepest = Math.max(0, ...nodes.map((node) => node.blocks.length));
  for (let level = deepest + 1; level > 1; level--) {
    if (buildCards(nodes, blocksBelow(nodes, level), false).cards.length <= limit) return level;
  }
  return buildCards(nodes, blocksBelow(nodes, 1), false).cards.length >= 4 ? 1 : 2; // one block around all says nothing
}

/** Blocks at depth `level` and deeper (depth 1: outermost). */
function blocksBelow(nodes, level) {
  return new Set(nodes.flatMap((node) => node.blocks.slice(level - 1)));
}

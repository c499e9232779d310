// A layered drawing (Sugiyama, Tagawa, Toda 1981): ranks, order within ranks, coordinates, and columns.
//
// The edges of one source share a trunk: a chain of way points, one per rank, from which each consumer branches off.
// A long, thin drawing is folded into columns where a single trunk crosses, so that it fills the window.

const GAP = { row: 28, card: 24, way: 12, column: 44, title: 24, pad: 10 };

/** Place cards. `cards`: [{w, h, blocks}], `edges`: [[from, to]] without cycles, `aspect`: width / height to fill. */
function layout(cards, edges, aspect) {
  const items = cards.map((card, index) => newItem(index, card.w, card.h, card.blocks));
  assignRanks(items, edges);
  const segments = routeTrunks(items, edges);
  const ranks = orderRanks(items);
  const chains = alignChains(ranks, segments);
  placeChains(ranks, chains);
  const columns = foldColumns(ranks, aspect);
  const boxes = findContainers(items, cards.length, columns);
  placeRows(ranks, columns, boxes);
  const placed = boxes.map(measureContainer);
  const size = placeColumns(columns, ranks, placed);
  return { items, ranks, columns, containers: placed, width: size.width, height: size.height };
}

function newItem(index, w, h, blocks) {
  return { index, w, h, blocks, way: false, source: index, rank: 0, pos: 0, x: 0, y: 0, up: [], down: [], users: [], column: 0 };
}

/** Longest path from the inputs; a source that only feeds later ranks moves next to its first user. */
function assignRanks(items, edges) {
  const inputs = items.map(() => []);
  for (const [from, to] of edges) {
    items[from].users.push(to);
    inputs[to].push(from);
  }
  const order = topological(items, inputs);
  for (const item of order) for (const from of inputs[item.index]) item.rank = Math.max(item.rank, items[from].rank + 1);
  for (const item of order) {
    if (!inputs[item.index].length && item.users.length) {
      item.rank = Math.min(...item.users.map((user) => items[user].rank)) - 1;
      item.side = item.rank > 0;
    }
  }
  const height = items.map(() => 0);
  for (const item of order.reverse()) for (const user of item.users) height[item.index] = Math.max(height[item.index], height[user] + 1);
  const longest = Math.max(...items.map((item) => item.rank + height[item.index]));
  for (const item of items) item.critical = !item.side && item.rank + height[item.index] === longest;
}

function topological(items, inputs) {
  const waiting = inputs.map((list) => list.length);
  const ready = items.filter((item) => !waiting[item.index]);
  for (let i = 0; i < ready.length; i++) {
    for (const user of ready[i].users) if (--waiting[user] === 0) ready.push(items[user]);
  }
  return ready;
}

/** One chain of way points per source, as far as its furthest consumer; appends the way points to `items`. */
function routeTrunks(items, edges) {
  const segments = [];
  const link = (a, b) => {
    segments.push([a, b]);
    a.down.push(b);
    b.up.push(a);
  };
  for (const item of items.slice()) {
    const consumers = [...new Set(item.users)].map((user) => items[user]);
    if (!consumers.length) continue;
    const last = consumers.reduce((a, b) => (a.rank >= b.rank ? a : b));
    const trunk = [item];
    for (let rank = item.rank + 1; rank < last.rank; rank++) {
      const way = newItem(items.length, 8, 0, shared(item.blocks, last.blocks));
      Object.assign(way, { way: true, source: item.index, rank });
      items.push(way);
      link(trunk[trunk.length - 1], way);
      trunk.push(way);
    }
    for (const consumer of consumers) link(trunk[consumer.rank - item.rank - 1], consumer);
  }
  return segments;
}

function shared(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return a.slice(0, n);
}

/** Order each rank by the mean position of its neighbours, up and down, and keep the order with fewest crossings. */
function orderRanks(items) {
  const ranks = [];
  for (const item of items) (ranks[item.rank] ||= []).push(item);
  const number = (rank) => rank.forEach((item, pos) => (item.pos = pos));
  ranks.forEach(number);
  let best = null;
  for (let sweep = 0; sweep < 14; sweep++) {
    const down = sweep % 2 === 0;
    const order = down ? ranks.keys() : [...ranks.keys()].reverse();
    for (const r of order) {
      for (const item of ranks[r]) item.key = meanPosition(down ? item.up : item.down, item);
      ranks[r] = sortByBlocks(ranks[r], 0);
      number(ranks[r]);
    }
    const crossings = countCrossings(ranks);
    if (best === null || crossings < best.crossings) best = { crossings, ranks: ranks.map((rank) => rank.slice()) };
    if (crossings === 0) break;
  }
  best.ranks.forEach(number);
  return best.ranks;
}

function meanPosition(neighbours, item) {
  if (!neighbours.length) return item.pos;
  return neighbours.reduce((sum, other) => sum + other.pos, 0) / neighbours.length;
}

/** Sort by key, keeping the members of a module block together at every depth. */
function sortByBlocks(items, depth) {
  const groups = new Map();
  for (const item of items) {
    const block = item.blocks[depth] ?? item;
    if (!groups.has(block)) groups.set(block, []);
    groups.get(block).push(item);
  }
  if (groups.size === 1 && typeof groups.keys().next().value !== "string") return items;
  const mean = (group) => group.reduce((sum, item) => sum + item.key, 0) / group.length;
  const list = [...groups].map(([block, group]) => ({ block, group, key: mean(group), way: group[0].way ? 1 : 0 }));
  list.sort((a, b) => a.key - b.key || a.way - b.way);
  return list.flatMap(({ block, group }) => (typeof block === "string" ? sortByBlocks(group, depth + 1) : group));
}

function countCrossings(ranks) {
  let crossings = 0;
  for (let r = 0; r + 1 < ranks.length; r++) {
    const ends = [];
    for (const item of ranks[r]) for (const pos of item.down.map((b) => b.pos).sort((a, b) => a - b)) ends.push(pos);
    const tree = new Array(ranks[r + 1].length + 1).fill(0); // Fenwick tree over positions of the lower rank
    ends.forEach((pos, seen) => {
      let notGreater = 0;
      for (let i = pos + 1; i > 0; i -= i & -i) notGreater += tree[i];
      crossings += seen - notGreater;
      for (let i = pos + 1; i < tree.length; i += i & -i) tree[i]++;
    });
  }
  return crossings;
}

/** Items that get one x: segments are taken by importance where they do not cross one already taken. */
function alignChains(ranks, segments) {
  const importance = ([a, b]) => {
    if (!a.way && !b.way) return a.critical && b.critical ? 4 : 2;
    return a.way && b.way ? 3 : 1;
  };
  const above = new Map();
  const below = new Map();
  const taken = ranks.map(() => []);
  const sorted = segments.map((segment, n) => ({ segment, n, p: importance(segment) })).sort((s, t) => t.p - s.p || s.n - t.n);
  for (const { segment: [a, b] } of sorted) {
    if (below.has(a) || above.has(b)) continue;
    if (taken[a.rank].some(([c, d]) => (c.pos - a.pos) * (d.pos - b.pos) < 0)) continue;
    taken[a.rank].push([a, b]);
    below.set(a, b);
    above.set(b, a);
  }
  const chains = [];
  for (const item of ranks.flat()) {
    if (above.has(item)) continue;
    const chain = { items: [], x: 0 };
    for (let next = item; next; next = below.get(next)) {
      chain.items.push(next);
      next.chain = chain;
    }
    chains.push(chain);
  }
  return chains;
}

function separation(a, b) {
  const gap = a.way && b.way ? GAP.way : GAP.card + GAP.pad * (Math.max(a.blocks.length, b.blocks.length) - shared(a.blocks, b.blocks).length);
  return (a.w + b.w) / 2 + gap;
}

/** x of every chain: leftmost first, then towards the mean of the neighbours as far as the others leave room. */
function placeChains(ranks, chains) {
  const left = new Map();
  const settle = (chain) => {
    if (left.has(chain)) return left.get(chain);
    let x = 0;
    for (const item of chain.items) {
      const other = ranks[item.rank][item.pos - 1];
      if (other) x = Math.max(x, settle(other.chain) + separation(other, item));
    }
    left.set(chain, x);
    return x;
  };
  for (const chain of chains) chain.x = settle(chain);
  for (const chain of chains) chain.wishes = wishes(chain);
  const sorted = chains.slice().sort((a, b) => a.x - b.x);
  for (let sweep = 0; sweep < 80; sweep++) {
    for (const chain of sweep % 2 ? sorted : sorted.slice().reverse()) moveChain(chain, ranks);
  }
  for (const item of ranks.flat()) item.x = item.chain.x;
}

function wishes(chain) {
  const list = [];
  for (const item of chain.items) {
    for (const other of [...item.up, ...item.down]) {
      if (other.chain !== chain) list.push({ chain: other.chain, weight: item.way || other.way ? 1 : 3 });
    }
  }
  return list;
}

function moveChain(chain, ranks) {
  if (!chain.wishes.length) return;
  let [sum, weights, low, high] = [0, 0, -Infinity, Infinity];
  for (const wish of chain.wishes) {
    sum += wish.chain.x * wish.weight;
    weights += wish.weight;
  }
  for (const item of chain.items) {
    const [before, after] = [ranks[item.rank][item.pos - 1], ranks[item.rank][item.pos + 1]];
    if (before) low = Math.max(low, before.chain.x + separation(before, item));
    if (after) high = Math.min(high, after.chain.x - separation(item, after));
  }
  if (low <= high) chain.x = Math.min(high, Math.max(low, sum / weights));
}

/** Cut the ranks into columns where one trunk crosses; the number of columns that fills `aspect` best wins. */
function foldColumns(ranks, aspect) {
  const tops = [0];
  for (const rank of ranks) tops.push(tops[tops.length - 1] + Math.max(...rank.map((item) => item.h)) + GAP.row + 8);
  const breaks = [...ranks.keys()].map((r) => ({ rank: r, depth: breakDepth(ranks, r) })).filter((b) => b.depth !== null);
  let best = null;
  for (const columns of splitEvenly(tops, breaks, 12)) {
    const height = Math.max(...columns.map((c) => tops[c.last + 1] - tops[c.first]));
    const width = columns.reduce((sum, c) => sum + extent(ranks, c).width + GAP.column, 0);
    const inside = columns.reduce((sum, c) => sum + c.depth, 0);
    const score = Math.min(aspect / width, 1 / height) * 0.94 ** inside; // whole blocks are worth a little size
    if (best === null || score > best.score * 1.01) best = { score, columns };
  }
  best.columns.forEach((column, c) => {
    for (let r = column.first; r <= column.last; r++) for (const item of ranks[r]) item.column = c;
  });
  return best.columns;
}

/**
 * For 1, 2, … `most` columns the breaks with the least sum of squared heights, by dynamic programming. A break inside
 * a block costs as much as a column that is a quarter off per level, so that blocks stay whole where they can.
 */
function splitEvenly(tops, breaks, most) {
  const ends = [...breaks, { rank: tops.length - 2, depth: 0 }];
  const total = tops[tops.length - 1];
  const splits = [];
  let before = null;
  const tables = [];
  for (let count = 1; count <= Math.min(most, ends.length); count++) {
    const fine = (total / count / 4) ** 2;
    const table = ends.map((end, i) => {
      if (before === null) return { cost: tops[end.rank + 1] ** 2, from: -1 };
      let least = { cost: Infinity, from: -1 };
      for (let j = 0; j < i; j++) {
        const cost = before[j].cost + (tops[end.rank + 1] - tops[ends[j].rank + 1]) ** 2 + fine * ends[j].depth;
        if (cost < least.cost) least = { cost, from: j };
      }
      return least;
    });
    tables.push(table);
    before = table;
    if (Number.isFinite(table[table.length - 1].cost)) splits.push(columnsOf(tables, ends));
  }
  return splits;
}

function columnsOf(tables, ends) {
  const columns = [];
  let end = ends.length - 1;
  for (let t = tables.length - 1; t >= 0; t--) {
    const from = tables[t][end].from;
    columns.unshift({ first: from < 0 ? 0 : ends[from].rank + 1, last: ends[end].rank, depth: ends[end].depth });
    end = from;
  }
  return columns;
}

/** How many blocks the break below rank r would cut in two; null where more than one trunk crosses. */
function breakDepth(ranks, r) {
  if (r + 1 >= ranks.length) return null;
  const sources = new Set(ranks[r].filter((item) => item.down.length).map((item) => item.source));
  if (sources.size !== 1) return null;
  const upper = ranks[r].find((item) => item.down.length);
  return Math.max(...ranks[r + 1].map((item) => shared(upper.blocks, item.blocks).length));
}

function extent(ranks, column) {
  let [low, high] = [Infinity, -Infinity];
  for (let r = column.first; r <= column.last; r++) {
    for (const item of ranks[r]) {
      const pad = item.w / 2 + GAP.pad * item.blocks.length;
      low = Math.min(low, item.x - pad);
      high = Math.max(high, item.x + pad);
    }
  }
  return { low, width: high - low };
}

/** Frames around the blocks that hold two or more cards and no card of another block; one part per column. */
function findContainers(items, count, columns) {
  const members = new Map();
  for (const item of items.slice(0, count)) {
    for (const block of item.blocks) {
      const key = `${item.column} ${block}`;
      if (!members.has(key)) members.set(key, { block, column: item.column, items: [] });
      members.get(key).items.push(item);
    }
  }
  const whole = new Map();
  for (const item of items.slice(0, count)) for (const block of item.blocks) whole.set(block, (whole.get(block) ?? 0) + 1);
  const parts = [...members.values()].filter((part) => {
    const size = whole.get(part.block);
    return size > 1 && (size <= count * 0.6 || part.items[0].blocks.indexOf(part.block) > 0) && isClean(part, items, count);
  });
  for (const part of parts) part.inner = 1;
  // innermost first, so that every frame knows how many frames it holds
  parts.sort((a, b) => b.block.length - a.block.length);
  for (const part of parts) {
    for (const other of parts) {
      if (other.column === part.column && other.block.startsWith(`${part.block}.`)) part.inner = Math.max(part.inner, other.inner + 1);
    }
    part.first = Math.min(...part.items.map((item) => item.rank));
    part.last = Math.max(...part.items.map((item) => item.rank));
    const inside = (item) => item.way && item.column === part.column && item.blocks.includes(part.block) && item.rank >= part.first && item.rank <= part.last;
    part.ways = items.slice(count).filter(inside);
    part.continues = columns.length > 1 && part.items.length < whole.get(part.block);
  }
  return parts;
}

function isClean(part, items, count) {
  const low = Math.min(...part.items.map((item) => item.x - item.w / 2));
  const high = Math.max(...part.items.map((item) => item.x + item.w / 2));
  const first = Math.min(...part.items.map((item) => item.rank));
  const last = Math.max(...part.items.map((item) => item.rank));
  const own = new Set(part.items);
  return !items.slice(0, count).some(
    (item) => !own.has(item) && item.rank >= first && item.rank <= last && item.x + item.w / 2 > low && item.x - item.w / 2 < high,
  );
}

/** y of every rank, with room for the titles of the frames that begin there. */
function placeRows(ranks, columns, parts) {
  for (const [c, column] of columns.entries()) {
    let y = 0;
    for (let r = column.first; r <= column.last; r++) {
      const opening = Math.max(0, ...parts.filter((p) => p.column === c && p.first === r).map((p) => p.inner));
      const height = Math.max(...ranks[r].map((item) => item.h));
      y += opening * GAP.title;
      for (const item of ranks[r]) {
        item.top = y;
        item.bottom = y + height;
        item.y = y + (height - item.h) / 2;
      }
      const closing = Math.max(0, ...parts.filter((p) => p.column === c && p.last === r).map((p) => p.inner));
      y += height + GAP.row + closing * GAP.pad;
    }
  }
}

function measureContainer(part) {
  const pad = GAP.pad * part.inner;
  const wide = [...part.items, ...part.ways];
  const left = Math.min(...wide.map((item) => item.x - item.w / 2)) - pad;
  const right = Math.max(...wide.map((item) => item.x + item.w / 2)) + pad;
  const top = Math.min(...part.items.map((item) => item.y)) - GAP.title * part.inner + 4;
  const bottom = Math.max(...part.items.map((item) => item.y + item.h)) + pad;
  return { block: part.block, column: part.column, continues: part.continues, inner: part.inner, x: left, y: top, w: right - left, h: bottom - top };
}

/** Shift every column to its place beside the one before. */
function placeColumns(columns, ranks, containers) {
  let [offset, height] = [0, 0];
  for (const [c, column] of columns.entries()) {
    const { low, width } = extent(ranks, column);
    const shift = offset - low;
    for (let r = column.first; r <= column.last; r++) {
      for (const item of ranks[r]) {
        item.x += shift;
        height = Math.max(height, item.bottom + GAP.pad * item.blocks.length);
      }
    }
    for (const box of containers) if (box.column === c) box.x += shift;
    column.left = offset;
    offset += width + GAP.column;
  }
  return { width: offset - GAP.column, height };
}

/** SVG path data of one segment, from the bottom of `a` to the top of `b`. */
function segmentPath(a, b, columns) {
  const start = a.way ? a.top : a.y + a.h;
  const end = b.way ? b.top : b.y;
  if (a.column !== b.column) return foldedPath(a, b, start, end, columns);
  if (Math.abs(a.x - b.x) < 0.5) return `M${a.x} ${start}V${end}`;
  const bend = (b.top - a.bottom) / 2;
  return `M${a.x} ${start}V${a.bottom}C${a.x} ${a.bottom + bend} ${b.x} ${b.top - bend} ${b.x} ${b.top}V${end}`;
}

/** From the foot of one column through the gutter to the head of the next. */
function foldedPath(a, b, start, end, columns) {
  const gutter = columns[b.column].left - GAP.column / 2;
  const foot = a.bottom + 18 + GAP.pad * a.blocks.length;
  const head = Math.min(b.top, 0) - 14;
  const r = 10;
  const turn = b.x < gutter ? -1 : 1;
  return (
    `M${a.x} ${start}V${foot - r}q0 ${r} ${r} ${r}H${gutter - r}q${r} 0 ${r} ${-r}V${head + r}` +
    `q0 ${-r} ${r * turn} ${-r}H${b.x - r * turn}q${r * turn} 0 ${r * turn} ${r}V${end}`
  );
}

/** The segments that lead from card `from` to card `to` along the trunk. */
function routeBetween(items, from, to) {
  const route = [];
  let item = items[to];
  for (;;) {
    const above = item.up.find((other) => other.source === from);
    if (!above) return route;
    route.push([above, item]);
    if (above.index === from) return route;
    item = above;
  }
}

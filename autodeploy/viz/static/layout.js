// Places all boxes: each frame is laid out in rows, inputs above readers, and is then a box in the frame around it.
//
// A wire is what one frame has of an edge. An edge that crosses the border of a frame enters at its top and leaves at
// its bottom, at a stub that the frame gave it, so that lines never cross a box.

const PADDING = 12;
const TITLE = 22;
const SIDE_WIDTH = 240; // of what nothing is connected to, where it is beside what edges lead to
const GAP_X = 16;
const GAP_Y = 36;

// `links` are { from, to, edges }. Sets x, y, w, h of every box and frame, and of each link its points, from the upper
// end to the lower, and whether it goes up.
function layOut(root, links) {
  for (const frame of descend(root)) {
    frame.wires = new Map();
  }
  const back = backward(links);
  const spans = links.map((link) => {
    link.isUp = back.has(link);
    return link.isUp ? connect(link.to, link.from) : connect(link.from, link.to);
  });
  measure(root);
  put(root, 0, 0);
  links.forEach((link, index) => {
    const [upper, lower] = link.isUp ? [link.to, link.from] : [link.from, link.to];
    link.points = route(upper, lower, spans[index]);
  });
}

// The links that close a circle: of each circle the thinnest part.
function backward(links) {
  const frames = new Map();
  for (const link of links) {
    const { ups, downs, common } = meeting(link.from, link.to);
    const ends = { link, from: childOf(ups, link.from, common), to: childOf(downs, link.to, common) };
    frames.set(ups[common], [...(frames.get(ups[common]) ?? []), ends]);
  }
  return new Set([...frames.values()].flatMap((ends) => againstOrder(ends)));
}

function againstOrder(ends) {
  const waiting = new Map(ends.flatMap(({ from, to }) => [[from, 0], [to, 0]]));
  const after = new Map([...waiting.keys()].map((item) => [item, []]));
  for (const end of ends) {
    waiting.set(end.to, waiting.get(end.to) + end.link.edges.length);
    after.get(end.from).push(end);
  }
  const order = new Map();
  while (waiting.size) {
    const next = [...waiting].reduce((best, one) => (one[1] < best[1] ? one : best))[0];
    waiting.delete(next);
    order.set(next, order.size);
    for (const { to, link } of after.get(next).filter((end) => waiting.has(end.to))) {
      waiting.set(to, waiting.get(to) - link.edges.length);
    }
  }
  return ends.filter(({ from, to }) => order.get(from) > order.get(to)).map(({ link }) => link);
}

// The frames around both ends, and the place of the innermost that both have.
function meeting(from, to) {
  const [ups, downs] = [framesAround(from), framesAround(to)];
  let common = 0;
  while (common + 1 < Math.min(ups.length, downs.length) && ups[common + 1] === downs[common + 1]) {
    common += 1;
  }
  return { ups, downs, common };
}

function childOf(frames, box, index) {
  return frames[index + 1] ?? box;
}

// Give each frame between two boxes its part of the edge; returns these frames with the keys of their wires, in order.
function connect(from, to) {
  const { ups, downs, common } = meeting(from, to);
  const signal = from.key;
  const spans = [];
  for (let index = ups.length - 1; index > common; index -= 1) {
    spans.push(wire(ups[index], signal, childOf(ups, from, index), null));
  }
  spans.push(wire(ups[common], signal, childOf(ups, from, common), childOf(downs, to, common)));
  for (let index = common + 1; index < downs.length; index += 1) {
    spans.push(wire(downs[index], signal, null, childOf(downs, to, index)));
  }
  return spans;
}

function framesAround(box) {
  const found = [];
  for (let frame = box.parent; frame; frame = frame.parent) {
    found.unshift(frame);
  }
  return found;
}

function wire(frame, signal, from, to) {
  const key = `${signal}|${from ? from.key : "in"}|${to ? to.key : "out"}`;
  if (!frame.wires.has(key)) {
    frame.wires.set(key, { signal, from, to, cells: [] });
  }
  return { frame, wire: frame.wires.get(key) };
}

// Lay out what is in a frame, its inner frames first, with its own corner at 0, 0.
function measure(frame) {
  if (!frame.children) {
    return;
  }
  frame.children.forEach(measure);
  const wires = [...frame.wires.values()];
  const connected = new Set(wires.flatMap(({ from, to }) => [from, to]));
  const islands = frame.children.filter((child) => !connected.has(child));
  // No box may be on the way of an edge that enters or leaves.
  const isPassed = wires.some(({ from, to }) => !from || !to);
  const block = placeIslands(islands, isPassed ? SIDE_WIDTH : frame.maxWidth);
  const rows = makeRows(frame.children.filter((child) => connected.has(child)), wires, frame.maxWidth);
  orderRows(rows);
  const width = alignRows(rows);
  const bottom = Math.max(stackRows(rows, isPassed ? 0 : block.h), block.h - 18);
  const title = groupLabel(frame.group).length * CHAR + (frame.numHidden ? 230 : 130);
  const left = isPassed ? block.w : 0;
  const widest = Math.max(left + width, block.w, frame.parent ? title : 0);
  shiftRows(rows, left + PADDING, TITLE + 6);
  islands.forEach((child) => {
    child.dx += PADDING;
    child.dy += TITLE + 6;
  });
  frame.w = widest + 2 * PADDING;
  frame.h = bottom + TITLE + 6 + PADDING;
  frame.ins = stubs(rows[0], "in");
  frame.outs = stubs(rows[rows.length - 1], "out");
}

// Rows of boxes without edges; returns the size of the block, with the gaps to what follows.
function placeIslands(islands, maxWidth) {
  let x = 0;
  let y = 0;
  let height = 0;
  for (const child of islands) {
    if (x > 0 && x + child.w > maxWidth) {
      y += height + GAP_Y;
      x = 0;
      height = 0;
    }
    child.dx = x;
    child.dy = y;
    x += child.w + GAP_X;
    height = Math.max(height, child.h);
  }
  const width = Math.max(...islands.map((child) => child.dx + child.w + GAP_X), 0);
  return { w: width, h: islands.length ? y + height + GAP_Y : 0 };
}

function stackRows(rows, top) {
  let y = top;
  for (const row of rows) {
    row.y = y;
    row.h = Math.max(0, ...row.map((cell) => (cell.item ? cell.item.h : 0)));
    // Room for a shape under each box.
    const items = row.flatMap((cell) => cell.item ?? []);
    y += row.h + (items.some((item) => !item.children) ? GAP_Y : items.length ? GAP_Y - 8 : 8);
  }
  return Math.max(0, y - 18);
}

function shiftRows(rows, dx, dy) {
  for (const row of rows) {
    row.y += dy;
    for (const cell of row) {
      cell.x += dx;
      cell.top = row.y;
      cell.bottom = row.y + row.h;
      if (cell.item) {
        cell.item.dx = cell.x - cell.item.w / 2;
        cell.item.dy = row.y;
      }
    }
  }
}

function stubs(row, kind) {
  return new Map((row ?? []).filter((cell) => cell.kind === kind).map((cell) => [cell.signal, cell.x]));
}

// Make the places absolute.
function put(item, x, y) {
  item.x = x;
  item.y = y;
  for (const child of item.children ?? []) {
    put(child, x + child.dx, y + child.dy);
  }
}

// The points that an edge goes through; between two of them it is straight down or a curve.
function route(from, to, spans) {
  const points = [[from.x + from.w / 2, from.y + from.h]];
  for (const { frame, wire } of spans) {
    const [x, y] = [frame.x, frame.y];
    for (const cell of wire.cells) {
      if (cell.kind === "in") {
        points.push([x + cell.x, y], [x + cell.x, y + cell.bottom]);
      } else if (cell.kind === "out") {
        points.push([x + cell.x, y + cell.top], [x + cell.x, y + frame.h]);
      } else if (cell.kind === "lane") {
        points.push([x + cell.x, y + cell.top], [x + cell.x, y + cell.bottom]);
      } else {
        const side = cell.item === wire.from ? "outs" : "ins";
        const port = x + cell.x + portOf(cell.item, side, wire.signal);
        points.push([port, y + (side === "outs" ? cell.bottom : cell.top)]);
      }
    }
  }
  points.push([to.x + to.w / 2, to.y]);
  return points;
}

// Where an edge meets a box or frame, from its middle.
function portOf(item, side, signal) {
  const x = item[side]?.get(signal);
  return x === undefined ? 0 : x - item.w / 2;
}

// The rows of one frame: which row a box is in, in which order, and how far to the right.

const SWEEPS = 8;
const LANE = 8; // width kept free for an edge that passes a row

// Rows of cells: a box, a lane of an edge that goes on below, or the stub of one that enters or leaves the frame.
function makeRows(children, wires, maxWidth) {
  const rank = wrapped(rankOf(children, wires), maxWidth);
  const entering = wires.some(({ from }) => from === null);
  const leaving = wires.some(({ to }) => to === null);
  const first = entering ? 1 : 0;
  const last = first + Math.max(-1, ...children.map((child) => rank.get(child)));
  const rows = Array.from({ length: last + 1 + (leaving ? 1 : 0) }, () => []);
  const cells = new Map();
  for (const child of children) {
    cells.set(child, addCell(rows, first + rank.get(child), { kind: "box", item: child, w: child.w }));
  }
  const cellOf = (row, kind, signal, origin) => {
    const key = `${row}|${kind}|${signal}|${origin}`;
    if (!cells.has(key)) {
      cells.set(key, addCell(rows, row, { kind, signal, w: LANE }));
    }
    return cells.get(key);
  };
  for (const wire of wires) {
    const { signal, from, to } = wire;
    const origin = from ? from.key : "in";
    const start = from ? cells.get(from) : cellOf(0, "in", signal, "");
    const end = to ? cells.get(to) : cellOf(rows.length - 1, "out", signal, "");
    wire.cells = [start];
    for (let row = start.row + 1; row < end.row; row += 1) {
      wire.cells.push(cellOf(row, "lane", signal, origin));
    }
    wire.cells.push(end);
    wire.cells.slice(1).forEach((cell, index) => join(wire.cells[index], cell, signal));
  }
  return rows;
}

function addCell(rows, row, cell) {
  Object.assign(cell, { row, x: 0, ups: [], downs: [] });
  rows[row].push(cell);
  return cell;
}

// Say that an edge goes from one cell to one in the next row. Lanes that go straight are worth more than boxes.
function join(upper, lower, signal) {
  if (upper.row + 1 !== lower.row) {
    return; // part of a cycle
  }
  const numBoxes = [upper, lower].filter((cell) => cell.kind === "box").length;
  const weight = [8, 2, 1][numBoxes];
  const from = upper.item ? portOf(upper.item, "outs", signal) : 0;
  const to = lower.item ? portOf(lower.item, "ins", signal) : 0;
  upper.downs.push({ cell: lower, weight, offset: to - from });
  lower.ups.push({ cell: upper, weight, offset: from - to });
}

// The row of each box: below all that it reads. A node that reads nothing is just above its first reader.
function rankOf(children, wires) {
  const users = new Map(children.map((child) => [child, new Set()]));
  const waiting = new Map(children.map((child) => [child, 0]));
  const fixed = new Set();
  for (const { from, to } of wires) {
    if (from && to && !users.get(from).has(to)) {
      users.get(from).add(to);
      waiting.set(to, waiting.get(to) + 1);
    } else if (to && !from) {
      fixed.add(to);
    }
  }
  const sources = children.filter((child) => child.place && waiting.get(child) === 0 && !fixed.has(child));
  const rank = new Map();
  const order = topological(children, users, waiting);
  for (const child of order) {
    rank.set(child, rank.get(child) ?? 0);
    for (const user of users.get(child)) {
      if (order.place.get(user) > order.place.get(child)) {
        rank.set(user, Math.max(rank.get(user) ?? 0, rank.get(child) + 1));
      }
    }
  }
  for (const child of sources.reverse()) {
    const below = [...users.get(child)].map((user) => rank.get(user) - 1);
    rank.set(child, Math.max(rank.get(child), below.length ? Math.min(...below) : 0));
  }
  return rank;
}

// The same where a row that is too wide goes on in rows of its own below.
function wrapped(rank, maxWidth) {
  const rows = [];
  for (const [child, row] of rank) {
    (rows[row] ??= []).push(child);
  }
  const found = new Map();
  let next = -1;
  for (const row of rows) {
    let width = Infinity;
    for (const child of row ?? []) {
      if (width + child.w > maxWidth) {
        next += 1;
        width = 0;
      }
      width += child.w + GAP_X;
      found.set(child, next);
    }
  }
  return found;
}

// Where a cycle keeps all that is left waiting, the first of it goes next.
function topological(children, users, waiting) {
  const order = children.filter((child) => waiting.get(child) === 0);
  order.place = new Map();
  let next = 0;
  for (let index = 0; order.place.size < children.length; index += 1) {
    while (index >= order.length) {
      const child = children[next++];
      if (!order.place.has(child)) {
        order.push(child);
      }
    }
    const child = order[index];
    if (order.place.has(child)) {
      order.splice(index--, 1);
      continue;
    }
    order.place.set(child, index);
    for (const user of users.get(child)) {
      waiting.set(user, waiting.get(user) - 1);
      if (waiting.get(user) === 0) {
        order.push(user);
      }
    }
  }
  return order;
}

// Fewer crossings: each cell goes where the cells that it is joined to are on average.
function orderRows(rows) {
  const number = (row) => row.forEach((cell, index) => (cell.place = index));
  rows.forEach(number);
  for (let sweep = 0; sweep < SWEEPS; sweep += 1) {
    const side = sweep % 2 ? "downs" : "ups";
    for (const row of sweep % 2 ? [...rows].reverse() : rows) {
      row.forEach((cell) => (cell.wish = mean(cell[side], cell.place)));
      row.sort((one, other) => one.wish - other.wish || one.place - other.place);
      number(row);
    }
  }
}

function mean(joints, otherwise) {
  const sum = joints.reduce((total, { cell, weight }) => total + cell.place * weight, 0);
  return joints.length ? sum / joints.reduce((total, { weight }) => total + weight, 0) : otherwise;
}

// Centres of all cells, lines as straight as the order allows; returns the width of the whole.
function alignRows(rows) {
  for (const row of rows) {
    let x = 0;
    for (const cell of row) {
      cell.x = x + cell.w / 2;
      x += cell.w + GAP_X;
    }
  }
  for (let sweep = 0; sweep < 3 * SWEEPS; sweep += 1) {
    const sides = sweep >= 2 * SWEEPS ? ["ups", "downs"] : sweep % 2 ? ["downs"] : ["ups"];
    for (const row of sweep % 2 ? [...rows].reverse() : rows) {
      settle(row, sides);
    }
  }
  const cells = rows.flat();
  const left = Math.min(...cells.map((cell) => cell.x - cell.w / 2), Infinity);
  cells.forEach((cell) => (cell.x -= left));
  return Math.max(0, ...cells.map((cell) => cell.x + cell.w / 2));
}

// The places nearest to what each cell wishes, in order and without overlap: weighted isotonic regression, by pooling
// neighbours that would overlap.
function settle(row, sides) {
  const blocks = [];
  let offset = 0;
  row.forEach((cell, index) => {
    offset += index ? (row[index - 1].w + cell.w) / 2 + GAP_X : 0;
    // What is joined to nothing on this side stays where it is, unless others need the room.
    const joints = [...sides.flatMap((side) => cell[side]), { cell, offset: 0, weight: 0.1 }];
    const weight = joints.reduce((total, joint) => total + joint.weight, 0);
    const wish = joints.reduce((total, joint) => total + joint.weight * (joint.cell.x + joint.offset), 0);
    let block = { cells: [[cell, offset]], weight, sum: wish - weight * offset };
    while (blocks.length && at(blocks[blocks.length - 1]) > at(block)) {
      const { cells, weight, sum } = blocks.pop();
      block = { cells: [...cells, ...block.cells], weight: weight + block.weight, sum: sum + block.sum };
    }
    blocks.push(block);
  });
  for (const block of blocks) {
    block.cells.forEach(([cell, offset]) => (cell.x = at(block) + offset));
  }
}

function at(block) {
  return block.sum / block.weight;
}

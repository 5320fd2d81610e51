// Which boxes there are: the groups that are open are frames, what lies in them are boxes.

const MAX_BOXES = 150; // frames included
const MANY_BOXES = 130; // what opens by itself leaves room for what the reader opens

const CHAR = 7.25; // width of a letter of the boxes' font
const SMALL = 6.05; // and of its smaller size

// The boxes of a tree with `open` groups, or of the places in `only` alone, whatever is open.
function arrange(book, open, only) {
  const owner = new Array(book.places.length); // the box that shows a place
  const wanted = only && new Set(only.map((place) => place.index));
  const inFocus = only && new Set(only.flatMap((place) => book.around(place)));

  function visit(group, parent) {
    const frame = { key: `g${group.index}`, group, parent, children: [] };
    for (const item of group.items) {
      const child = isGroup(item) ? visitGroup(item, frame) : visitPlace(item, frame);
      if (child) {
        frame.children.push(child);
      }
    }
    return frame;
  }

  function visitGroup(group, frame) {
    if (only ? inFocus.has(group) : open.has(group)) {
      return visit(group, frame);
    }
    if (only) {
      return null;
    }
    const box = { key: `g${group.index}`, group, parent: frame, ...groupSize(group) };
    for (const place of book.inside(group)) {
      owner[place.index] = box;
    }
    return box;
  }

  function visitPlace(place, frame) {
    if (wanted && !wanted.has(place.index)) {
      return null;
    }
    const box = { key: `p${place.index}`, place, parent: frame, ...placeSize(book, place) };
    owner[place.index] = box;
    return box;
  }

  return { root: visit(book.groups[0], null), owner };
}

function countBoxes(root) {
  let number = 0;
  for (const item of descend(root)) {
    number += item === root ? 0 : 1;
  }
  return number;
}

// Every frame and box, outer ones first.
function* descend(frame) {
  yield frame;
  for (const child of frame.children ?? []) {
    yield* descend(child);
  }
}

// How many boxes there are once `open` is open.
function numBoxes(book, open) {
  let number = 0;
  for (const group of open) {
    if (book.around(group).every((outer) => open.has(outer))) {
      number += group.items.length;
    }
  }
  return number;
}

// The branches that changed, as far as there is room: of layers the first, and what was merely removed last; the
// outermost and smallest before others.
function openChanged(book, step) {
  const open = new Set([book.groups[0]]);
  const numRemoved = (group) => step.counts[group.index].kinds.removed ?? 0;
  for (const isWanted of [(group) => step.changesIn(group) > numRemoved(group), (group) => numRemoved(group) > 0]) {
    let pending = [book.groups[0]];
    while (pending.length) {
      const inner = pending.flatMap((group) => group.items.filter(isGroup)).filter((group) => !isPutAway(book, group));
      inner.sort((one, other) => one.items.length - other.items.length || one.index - other.index);
      pending = inner.filter((group) => open.has(group) || (isWanted(group) && addIfRoom(book, open, group)));
    }
  }
  return open;
}

function addIfRoom(book, open, group) {
  open.add(group);
  if (numBoxes(book, open) > MANY_BOXES) {
    open.delete(group);
  }
  return open.has(group);
}

// Inputs, and all of a row of layers but the first.
function isPutAway(book, group) {
  const family = (label) => label.replace(/\d+/g, "*");
  const first = group.parent.items.find((item) => isGroup(item) && family(item.label) === family(group.label));
  const isInput = (place) => place.versions[0].op === "placeholder";
  return group.alike || first !== group || [...book.inside(group)].every(isInput);
}

// Close what was opened first until `group` and all around it fit. Returns whether they do.
function makeRoom(book, open, group) {
  const needed = new Set([...book.around(group), group]);
  for (const other of [...needed]) {
    open.delete(other);
    open.add(other);
  }
  for (const other of [...open]) {
    if (numBoxes(book, open) <= MAX_BOXES) {
      break;
    }
    if (!needed.has(other)) {
      open.delete(other);
    }
  }
  return numBoxes(book, open) <= MAX_BOXES;
}

// Sizes hold for all versions, so that a box is the same in every step.
function placeSize(book, place) {
  const ports = place.versions.map((version) => portNames(book, version).join(", ").length + 2);
  const titles = place.versions.map((version) => titleOf(place, version).length + 2);
  const below = place.versions.map((version) => valueText(version).length + readersText(place).length + 2);
  const letters = [
    Math.max(...titles) * CHAR + 16,
    Math.max(...place.versions.map((version) => version.name.length + 2)) * SMALL + 16,
    Math.max(...ports) * SMALL + 16,
    Math.max(...below) * SMALL + 4,
  ];
  const hasPorts = Math.max(...ports) > 2;
  return { w: clamp(Math.max(...letters), 64, 264), h: hasPorts ? 52 : 38, hasPorts };
}

function groupSize(group) {
  const label = groupLabel(group).length + 3;
  return { w: clamp(label * CHAR + 34, 150, 290), h: 44 };
}

// The op, with the module where that has no frame of its own: "q_proj · linear".
function titleOf(place, version) {
  const around = place.group ? place.group.path : "";
  const path = version.module.startsWith(`${around}.`) ? version.module.slice(around.length + 1) : "";
  const module = path && around !== version.module && place.group.parent ? `${path} · ` : "";
  return `${module}${version.short}`;
}

function groupLabel(group) {
  return group.label || group.path || "graph";
}

// What a node reads from far away, by name.
function portNames(book, version) {
  return farInputs(book, version).map((source) => portName(source));
}

function farInputs(book, version) {
  const found = new Map();
  for (const [, id] of version.reads()) {
    const source = book.byId.get(id);
    if (source && source.far) {
      found.set(id, source);
    }
  }
  return [...found.values()];
}

// A weight by the end of its path, another node by its name.
function portName(place) {
  const { op, target, name } = place.versions[0];
  return op === "get_attr" ? target.split(".").slice(-2).join(".") : name;
}

// How many read what is drawn without edges.
function readersText(place) {
  return place.far && place.fanOut ? `  ▸ ${place.fanOut} reader${place.fanOut > 1 ? "s" : ""}` : "";
}

// Shape and dtype; a node that was never run has none.
function valueText(version) {
  return version.value ? shorten(version.value, 40) : "";
}

function shorten(text, length) {
  return text.length <= length ? text : `${text.slice(0, length - 1)}…`;
}

function clamp(number, low, high) {
  return Math.min(Math.max(number, low), high);
}

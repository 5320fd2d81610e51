// Which boxes there are: the groups that are open are frames, what lies in them are boxes.

const MAX_BOXES = 150; // frames included
const MANY_BOXES = 130; // what opens by itself leaves room for what the reader opens
const MAX_TRIES = 40; // groups that are tried
const READABLE = 0.7; // zoom below which a first picture is too small

const CHAR = 7.25; // width of a letter of the boxes' font
const SMALL = 6.05; // and of its smaller size

// What a reader sees of a step: the groups that are `open`, and those of them whose unchanged items are shown, too.
class Openness {
  constructor(step, width, open = [step.root], whole = []) {
    this.step = step;
    this.width = clamp(width / READABLE, 500, 1600) - 40; // of rows
    this.open = new Set(open);
    this.whole = new Set(whole);
  }

  // Whether an item is left out of its frame: nothing happened to it, nor to what is next to it.
  hides(item, frame) {
    if (this.whole.has(frame) || this.step.isEmpty) {
      return false;
    }
    if (frame.called) {
      return !isGroup(item) && !this.step.outputs.has(item) && this.step.outputs.size > 0;
    }
    const { step } = this;
    return isGroup(item) ? step.changesIn(item) === 0 : step.isQuiet(item.index) && !step.context.has(item);
  }

  numHidden(group) {
    const hidden = group.items.filter((item) => this.hides(item, group));
    return hidden.reduce((sum, item) => sum + (isGroup(item) ? this.step.counts[item.index].total : 1), 0);
  }

  // Open a group, with what is unchanged in it where nothing else is.
  add(group) {
    this.open.add(group);
    if (this.step.changesIn(group) === 0) {
      this.whole.add(group);
    }
  }

  close(group) {
    this.open.delete(group);
    this.whole.delete(group);
  }

  // Show a place or group, whatever is around it.
  reveal(thing) {
    let inner = thing;
    for (const group of this.step.book.around(thing).reverse()) {
      this.open.add(group);
      if (this.hides(inner, group)) {
        this.whole.add(group);
      }
      inner = group;
    }
  }
}

// The boxes of a step's tree as far as it is open, or of the places in `only` alone, whatever is open.
function arrange(shown, only) {
  const { step } = shown;
  const { book } = step;
  const owner = new Array(book.places.length); // the box that shows a place
  const wanted = only && new Set(only);
  const inFocus = only && new Set(only.flatMap((place) => book.around(place)));

  function visit(group, parent) {
    const frame = { key: `g${group.index}`, group, parent, children: [] };
    frame.maxWidth = parent ? parent.maxWidth - 2 * PADDING : shown.width;
    frame.numHidden = only ? 0 : shown.numHidden(group);
    for (const item of group.items) {
      const child = isGroup(item) ? visitGroup(item, frame) : visitPlace(item, frame);
      if (child) {
        frame.children.push(child);
      }
    }
    return frame;
  }

  function visitGroup(group, frame) {
    if (only) {
      return inFocus.has(group) ? visit(group, frame) : null;
    }
    if (shown.hides(group, frame.group)) {
      return null;
    }
    if (shown.open.has(group)) {
      return visit(group, frame);
    }
    const box = { key: `g${group.index}`, group, parent: frame, ...groupSize(group) };
    for (const place of book.inside(group)) {
      owner[place.index] = box;
    }
    return box;
  }

  function visitPlace(place, frame) {
    if (only ? !wanted.has(place) : shown.hides(place, frame.group)) {
      return null;
    }
    const box = { key: `p${place.index}`, place, parent: frame, ...placeSize(step, place) };
    owner[place.index] = box;
    return box;
  }

  return { root: visit(step.root, null), owner };
}

// Every frame and box, outer ones first.
function* descend(frame) {
  yield frame;
  for (const child of frame.children ?? []) {
    yield* descend(child);
  }
}

function numBoxes(shown) {
  const isFrame = (group) => shown.step.book.around(group).every((outer) => shown.open.has(outer));
  return [...shown.open].filter(isFrame).reduce((sum, group) => {
    return sum + group.items.filter((item) => !shown.hides(item, group)).length;
  }, 0);
}

// What changed in a step, opened as far as it can be read in a window of `width` and `height`: outer groups before
// inner ones, of layers that look alike the first.
function openChanged(step, width, height) {
  const shown = new Openness(step, width);
  const inside = (group) => group.items.filter((inner) => isGroup(inner) && isWanted(step, inner));
  const isGone = (group) => step.book.around(group).some((outer) => outer.isWas);
  const rules = [(group) => group.isWas, (group) => group.called, (group) => !isGone(group) && !isInputs(step, group)];
  const weight = (group) => [...rules, isGone, () => true].findIndex((holds) => holds(group));
  let pending = inside(step.root);
  for (let tries = 0; pending.length && tries < MAX_TRIES; tries += 1) {
    pending.sort((one, other) => weight(one) - weight(other) || one.index - other.index);
    const group = pending.shift();
    shown.open.add(group);
    if (numBoxes(shown) <= MANY_BOXES && fits(new Scene(shown), width, height)) {
      pending.push(...inside(group));
    } else {
      shown.open.delete(group);
    }
  }
  return shown;
}

// Changed, and not put away behind a layer that looks the same; of what is gone only layers.
function isWanted(step, group) {
  const family = (label) => label.replace(/\d+/g, "*");
  const first = group.parent.items.find((item) => isGroup(item) && family(item.label) === family(group.label));
  if (group.parent.isWas && !/\d/.test(group.label)) {
    return false;
  }
  return step.changesIn(group) > 0 && !group.alike && (first === group || group.called);
}

function groupOf(thing) {
  return isGroup(thing) ? thing : thing.group;
}

function isInputs(step, group) {
  return [...step.book.inside(group)].every((place) => place.versions[0].op === "placeholder");
}

function fits({ root }, width, height) {
  return Math.min(width / (root.w + 24), height / (root.h + 24)) >= READABLE;
}

// Close what was opened first until `group` and all around it fit.
function makeRoom(shown, group) {
  const needed = new Set([...shown.step.book.around(group), group]);
  const isTooMuch = () => numBoxes(shown) > MAX_BOXES;
  for (const other of [...shown.open].filter((open) => !needed.has(open))) {
    if (isTooMuch()) {
      shown.close(other);
    }
  }
  for (const other of needed) {
    if (isTooMuch()) {
      shown.whole.delete(other);
    }
  }
}

function placeSize(step, place) {
  const { before, after } = step.sides[place.index];
  const versions = [before, after].filter((version) => version);
  const ports = versions.map((version) => portNames(step.book, version).join(", ").length + 2);
  const titles = versions.map((version) => titleOf(place, version).length + 2);
  const below = versions.map((version) => valueText(version).length + readersText(step, place).length + 2);
  const letters = [
    Math.max(...titles) * CHAR + 16,
    Math.max(...versions.map((version) => version.name.length + 2)) * SMALL + 16,
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
  const isNamed = op === "get_attr" || (op === "placeholder" && target.includes("."));
  return isNamed ? target.split(".").slice(-2).join(".") : name;
}

// How many were merged into it, and how many read what is drawn without edges.
function readersText(step, place) {
  const twins = step.twinsOf(place.index);
  return `${twins ? `  = ${twins} more` : ""}${farReaders(step, place)}`;
}

function farReaders(step, place) {
  const number = place.far || step.outputs.has(place) ? step.numReaders.get(place.index) : 0;
  return number ? `  ▸ ${number} reader${number > 1 ? "s" : ""}` : "";
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

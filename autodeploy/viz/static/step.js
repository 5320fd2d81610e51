// One step from one graph to another: what became of every place, edge and group in it.

const BEFORE = 1;
const AFTER = 2;
const BOTH = BEFORE | AFTER;

class Step {
  constructor(book, index) {
    const data = book.steps[index];
    this.book = book;
    this.index = index;
    this.before = book.stages[data.first];
    this.after = book.stages[data.last];
    this.story = data.story;
    this.entries = data.entries.map(([kind, before, after, changes, stage]) => ({
      kind: KINDS[kind],
      before,
      after,
      changes,
      stage,
    }));
    this.was = new Map();
    this.is = new Map();
    this.twins = new Map(); // what was merged into a node
    this.entries.forEach((entry) => this.sort(entry));
    this.lines = this.readLines(data.blocks);
    this.sides = this.readSides();
    this.edges = this.readEdges();
    this.counts = this.readCounts();
  }

  sort(entry) {
    entry.before.forEach((id) => this.was.set(id, entry));
    if (entry.kind === "merged") {
      this.twins.set(entry.after[0], entry);
    } else {
      entry.after.forEach((id) => this.is.set(id, entry));
    }
  }

  readLines(blocks) {
    return blocks.flatMap(([path, which, modules, lines], block) =>
      lines.map(([module, text, count, entries]) => ({ block, path, which, modules, module, text, count, entries })),
    );
  }

  // The versions of a place on both sides, and what that makes of it.
  readSides() {
    const sides = new Array(this.book.places.length);
    for (const [side, stage] of [["before", this.before], ["after", this.after]]) {
      for (const version of stage.at.values()) {
        sides[version.place] ??= {};
        sides[version.place][side] = version;
      }
    }
    sides.forEach((side, place) => {
      const id = this.book.places[place].id;
      side.entry = side.after ? this.is.get(id) : this.was.get(id);
      side.kind = side.entry ? side.entry.kind : "unchanged";
      side.left = !side.after && this.after.at.has(id);
      if (side.left) {
        side.kind = "moved";
      }
    });
    return sides;
  }

  readEdges() {
    const edges = new Map();
    for (const [bit, stage] of [[BEFORE, this.before], [AFTER, this.after]]) {
      for (const version of stage.at.values()) {
        for (const [, id] of version.reads()) {
          const source = stage.at.get(id);
          if (source !== undefined) {
            const key = this.book.key(source.place, version.place);
            edges.set(key, (edges.get(key) ?? 0) | bit);
          }
        }
      }
    }
    return edges;
  }

  // Of each group: how many places of each kind, and how many on either side.
  readCounts() {
    const counts = this.book.groups.map(() => ({ before: 0, after: 0, total: 0, kinds: {} }));
    for (const place of this.book.places) {
      const side = this.sides[place.index];
      if (side === undefined || place.group === null) {
        continue;
      }
      for (let group = place.group; group; group = group.parent) {
        const count = counts[group.index];
        count.total += 1;
        count.before += side.before ? 1 : 0;
        count.after += side.after ? 1 : 0;
        count.kinds[side.kind] = (count.kinds[side.kind] ?? 0) + 1;
      }
    }
    return counts;
  }

  get isEmpty() {
    return this.entries.length === 0;
  }

  // The place that shows a node: where it is now, or where it was.
  placeOf(id) {
    const version = this.after.at.get(id) ?? this.before.at.get(id);
    return version && this.book.places[version.place];
  }

  // A closed group's kind: what happened to all of it, or "changed" where only some of it is not as it was.
  kindOf(group) {
    const { kinds, total } = this.counts[group.index];
    const found = Object.keys(kinds);
    if (found.length === 1) {
      return found[0];
    }
    return total ? "changed" : "unchanged";
  }

  changesIn(group) {
    const { kinds, total } = this.counts[group.index];
    return total - (kinds.unchanged ?? 0);
  }
}

// "kept", "added" or "removed" of edges drawn as one, "" where none of them is on a side that is shown.
function edgeKind(bits, shown) {
  const all = bits.reduce((one, other) => one | other, 0) & shown;
  if (all === 0) {
    return "";
  }
  if (shown !== BOTH) {
    return bits.some((bit) => bit === BOTH) ? "kept" : all === AFTER ? "added" : "removed";
  }
  return all === BOTH ? "kept" : all === AFTER ? "added" : "removed";
}

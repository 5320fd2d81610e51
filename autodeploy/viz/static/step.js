// One step from one graph to another: what became of every place, edge and group in it.

const BEFORE = 1;
const AFTER = 2;
const BOTH = BEFORE | AFTER;
const IN_CONTEXT = ["changed", "replaced", "removed", "added"]; // kinds whose unchanged neighbours are worth seeing

class Step {
  constructor(book, index) {
    const data = book.steps[index];
    this.book = book;
    this.index = index;
    this.before = book.stages[data.first];
    this.after = book.stages[data.last];
    this.story = data.story;
    this.totals = data.counts;
    this.graphs = data.graphs;
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
    this.readTree(data.tree, data.was);
    this.edges = this.readEdges();
    this.numReaders = this.countReaders();
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

  // Groups, the root first; `called` are those of called graphs.
  readTree(rows, was) {
    this.groups = rows.map(([label, path, alike], index) => {
      return { index, label, path, alike, called: false, isWas: path === was, parent: null, items: [] };
    });
    rows.forEach(([, , , items], index) => {
      const group = this.groups[index];
      group.items = items.map((item) => (item < 0 ? this.groups[-item] : this.book.places[item]));
      for (const inner of group.items.filter(isGroup)) {
        inner.parent = group;
        inner.called = group.index === 0 && this.graphs.some((graph) => `${inner.path}.`.startsWith(`${graph}.`));
      }
    });
    this.root = this.groups[0];
    this.isWas = new Set(this.groups.filter((group) => group.isWas).flatMap((group) => [...this.book.inside(group)]));
    this.enter();
  }

  // A place lies in another group in each step.
  enter() {
    this.book.places.forEach((place) => (place.group = null));
    for (const group of this.groups) {
      group.items.filter((item) => !isGroup(item)).forEach((place) => (place.group = group));
    }
  }

  // Which place reads which on which side: Map of key(source, user) to [source, user, sides].
  readEdges() {
    const edges = new Map();
    for (const [bit, stage] of [[BEFORE, this.before], [AFTER, this.after]]) {
      for (const version of stage.at.values()) {
        for (const [, id] of version.reads()) {
          const source = stage.at.get(id);
          if (source !== undefined && source !== version) {
            const key = this.book.key(source.place, version.place);
            const edge = edges.get(key) ?? [source.place, version.place, 0];
            edge[2] |= bit;
            edges.set(key, edge);
          }
        }
      }
    }
    return [...edges.values()];
  }

  // How many nodes read each place, in the graph after the step if it is there.
  countReaders() {
    const counts = new Map();
    for (const [source, user, bits] of this.edges) {
      const isThere = bits & (this.sides[source].after ? AFTER : BEFORE);
      const { op, graph } = this.book.places[user].versions[0];
      if (isThere && !(op === "output" && graph)) {
        counts.set(source, (counts.get(source) ?? 0) + 1);
      }
    }
    return counts;
  }

  // The edges with an end that is not as it was, and what is next to that end.
  get liveEdges() {
    const isLive = ([source, user, bits]) => bits !== BOTH || !this.isQuiet(source) || !this.isQuiet(user);
    this.live ??= this.edges.filter(isLive);
    return this.live;
  }

  // Whether nothing happened to a place, nor was anything merged into it.
  isQuiet(index) {
    return this.sides[index].kind === "unchanged" && !this.twinsOf(index);
  }

  // How many were merged into a place. Sizes, which launch nothing, do not count.
  twinsOf(index) {
    return this.sides[index].after?.bytes ? this.twins.get(this.book.places[index].id)?.before.length : 0;
  }

  // Unchanged places next to one of the same group that was replaced or the like.
  get context() {
    if (!this.near) {
      this.near = new Set();
      for (const [source, user] of this.liveEdges) {
        for (const [one, other] of [[source, user], [user, source]]) {
          const [place, changed] = [this.book.places[one], this.book.places[other]];
          const isNear = IN_CONTEXT.includes(this.sides[other].kind) && this.isQuiet(one) && !place.far;
          if (isNear && place.group && place.group === changed.group) {
            this.near.add(place);
          }
        }
      }
    }
    return this.near;
  }

  // [place, place] of each node that was merged or moved, and where its value is computed now.
  fates() {
    this.fated ??= [...this.isWas].flatMap((place) => {
      const ids = this.was.get(place.id)?.after ?? [place.id];
      const now = ids.map((id) => this.placeOf(id)).filter((other) => other && other !== place);
      return now.map((other) => [place.index, other.index]);
    });
    return this.fated;
  }

  // Of each group: how many places of each kind, and how many on either side.
  readCounts() {
    const counts = this.groups.map(() => ({ before: 0, after: 0, total: 0, live: 0, kinds: {} }));
    for (const place of this.book.places) {
      const side = this.sides[place.index];
      for (let group = place.group; group; group = group.parent) {
        const count = counts[group.index];
        count.total += 1;
        count.live += this.isQuiet(place.index) ? 0 : 1;
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

  findByName(name) {
    const { after, before } = this;
    const version = [...after.at.values(), ...before.at.values()].find((one) => one.name === name);
    return version && this.book.places[version.place];
  }

  // What happened to those in a group that are not as they were.
  kindsIn(group) {
    const { kinds } = this.counts[group.index];
    return KINDS.slice(1).filter((kind) => kinds[kind]);
  }

  kindOf(group) {
    const found = this.kindsIn(group);
    return found.length > 1 ? "mixed" : (found[0] ?? "unchanged");
  }

  glyphOf(group) {
    return this.kindsIn(group).map((kind) => this.book.glyphs[kind]).join("");
  }

  // Places in a called graph that others read, or that are all there is.
  get outputs() {
    this.isOutput ??= new Set(this.edges.filter(([source, user]) => {
      const [graph, other] = [source, user].map((index) => this.calledAround(this.book.places[index]));
      return graph && graph !== other;
    }).map(([source]) => this.book.places[source]));
    return this.isOutput;
  }

  calledAround(place) {
    return this.book.around(place).find((group) => group.called);
  }

  changesIn(group) {
    return this.counts[group.index].live;
  }
}

function stepName(book, index) {
  const { first, last } = book.steps[index];
  return last - first > 1 ? "all passes" : book.stages[last].name;
}

// That of all edges of a link, "fate" where it says what became of nodes.
function linkKind({ sort, edges }, shown) {
  if (sort === "fate") {
    return shown === BOTH ? "fate" : "";
  }
  return edgeKind(edges.map(([, , bits]) => bits), shown);
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

// The scene: boxes, frames and lines for what is shown of a step.

class Scene {
  constructor(shown, only, start) {
    this.step = shown.step;
    this.shown = shown;
    this.start = start; // of a focus: its edges are drawn however many there are
    this.only = only;
    const { root, owner } = arrange(shown, only);
    this.root = root;
    this.owner = owner;
    this.links = new Map();
    this.byKey = new Map([...descend(root)].map((item) => [item.key, item]));
    this.collect();
    layOut(root, [...this.links.values()]);
  }

  // Edges between different boxes: those between the same two are one line.
  collect() {
    const isAll = this.only || this.shown.whole.size > 0 || this.step.isEmpty;
    for (const [source, user, bits] of isAll ? this.step.edges : this.step.liveEdges) {
      const [from, to] = [this.owner[source], this.owner[user]];
      if (from && to && (this.only || !this.isGone(source, user))) {
        this.addEdge(source, user, bits);
      }
    }
    if (!this.only) {
      this.step.fates().forEach(([was, is]) => this.addFate(was, is));
    }
  }

  // Whether an edge leaves or enters a part of what is gone: what it became tells more.
  isGone(source, user) {
    const { isWas, book } = this.step;
    const part = (place) => isWas.has(place) && (book.around(place).find(({ parent }) => parent?.isWas) ?? place);
    return part(book.places[source]) !== part(book.places[user]);
  }

  // What crosses the border of a called graph is read from, or by, its frame.
  addEdge(source, user, bits) {
    const place = this.step.book.places[source];
    const [from, to] = this.outside(this.owner[source], this.owner[user]);
    const isBundle = from !== this.owner[source] || to !== this.owner[user] || from.group?.called || to.group?.called;
    if (from !== to && (isBundle || !place.far || place === this.start)) {
      this.add(from, to, [source, user, bits], isBundle ? "bundle" : "");
    }
  }

  addFate(was, is) {
    if (this.owner[was] && this.owner[is]) {
      const [from, to] = this.outside(this.owner[was], this.owner[is]);
      this.add(from, to, [was, is, AFTER], "fate");
    }
  }

  add(from, to, edge, sort) {
    const key = `${from.key}>${to.key}`;
    if (!this.links.has(key)) {
      this.links.set(key, { key, from, to, sort, edges: [] });
    }
    this.links.get(key).edges.push(edge);
  }

  // The ends of an edge: the frame of a called graph, or of what is gone, where only one of the boxes is in it.
  outside(from, to) {
    const borders = (box) => framesAround(box).filter(({ group }) => group.called || group.isWas);
    const [ups, downs] = [borders(from), borders(to)];
    return [ups.find((frame) => !downs.includes(frame)) ?? from, downs.find((frame) => !ups.includes(frame)) ?? to];
  }

  // Where the box of a place or group is, or the closed one around it.
  itemOf(thing) {
    if (!isGroup(thing)) {
      return this.owner[thing.index];
    }
    const around = [thing, ...this.step.book.around(thing).reverse()];
    return around.map((group) => this.byKey.get(`g${group.index}`)).find((item) => item);
  }
}

// A line down through points: straight where they are below each other, else a curve; with a tip.
function pathOf({ points, isUp }) {
  let [x, y] = points[0];
  let path = `${isUp ? `M${round(x - 3)} ${round(y + 5)}l3 -5l3 5` : ""}M${round(x)} ${round(y)}`;
  for (const [nextX, nextY] of points.slice(1)) {
    if (Math.abs(nextX - x) < 0.5) {
      path += `V${round(nextY)}`;
    } else {
      const middle = round((y + nextY) / 2);
      path += `C${round(x)} ${middle} ${round(nextX)} ${middle} ${round(nextX)} ${round(nextY)}`;
    }
    [x, y] = [nextX, nextY];
  }
  return isUp ? path : `${path}m-3 -5l3 5l3 -5`;
}

function round(number) {
  return Math.round(number * 10) / 10;
}

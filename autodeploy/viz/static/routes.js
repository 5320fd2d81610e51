// The scene: boxes, frames and lines for what is open now. It is the same in every step, so that nothing moves.

class Scene {
  constructor(book, open, only, start) {
    this.book = book;
    this.start = start; // of a focus: its edges are drawn however many there are
    const { root, owner } = arrange(book, open, only);
    this.root = root;
    this.owner = owner;
    this.links = this.collect();
    this.routes = layOut(root, [...this.links.values()].map(({ from, to }) => [from, to]));
    this.byKey = new Map([...descend(root)].map((item) => [item.key, item]));
  }

  // Edges between different boxes: those between the same two are one line.
  collect() {
    const links = new Map();
    for (const [source, user] of this.book.edges.values()) {
      const [from, to] = [this.owner[source], this.owner[user]];
      const place = this.book.places[source];
      if (!from || !to || from === to || (place.far && place !== this.start)) {
        continue;
      }
      const key = `${from.key}>${to.key}`;
      if (!links.has(key)) {
        links.set(key, { key, from, to, edges: [] });
      }
      links.get(key).edges.push([source, user]);
    }
    return links;
  }

  // Where the box of a place or group is, or the closed one around it.
  itemOf(thing) {
    if (!isGroup(thing)) {
      return this.owner[thing.index];
    }
    const around = [thing, ...this.book.around(thing).reverse()];
    return around.map((group) => this.byKey.get(`g${group.index}`)).find((item) => item);
  }
}

// A line down through points: straight where they are below each other, else a curve; with a tip.
function pathOf(points) {
  let [x, y] = points[0];
  let path = `M${round(x)} ${round(y)}`;
  for (const [nextX, nextY] of points.slice(1)) {
    if (Math.abs(nextX - x) < 0.5) {
      path += `V${round(nextY)}`;
    } else {
      const middle = round((y + nextY) / 2);
      path += `C${round(x)} ${middle} ${round(nextX)} ${middle} ${round(nextX)} ${round(nextY)}`;
    }
    [x, y] = [nextX, nextY];
  }
  return `${path}m-3 -5l3 5l3 -5`;
}

function round(number) {
  return Math.round(number * 10) / 10;
}

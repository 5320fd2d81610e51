// What a picture is drawn on where there is no document: elements that can be written as text.

class Paper {
  constructor(tag) {
    this.tag = tag;
    this.attributes = [];
    this.content = [];
  }

  setAttribute(name, value) {
    this.attributes.push(` ${name}="${escaped(value)}"`);
  }

  append(...content) {
    this.content.push(...content);
  }

  set textContent(text) {
    this.content = [text];
  }

  toString() {
    const inside = this.content.map((part) => (part instanceof Paper ? `${part}` : escaped(part))).join("");
    return `<${this.tag}${this.attributes.join("")}>${inside}</${this.tag}>`;
  }
}

function escaped(text) {
  const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  // What XML has no character for is left out.
  const known = `${text}`.replace(/[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/gu, "");
  return known.replace(/[&<>"]/g, (letter) => names[letter]);
}

globalThis.document ??= { createElementNS: (_, tag) => new Paper(tag) };

// A step as a picture of about `width` by `height`, with its name and story above, and the boxes and links in it.
function drawStep(data, index, width, height) {
  const book = new Book(JSON.parse(data));
  const step = new Step(book, index);
  const scene = new Scene(openChanged(step, width, height));
  const picture = new Picture(scene, BOTH, null);
  const name = book.isHistory ? stepName(book, index) : `${step.before.name} → ${step.after.name}`;
  const heading = [step.story ? `${name}: ${step.story.headline}` : name];
  const items = [...descend(scene.root)].filter((item) => item !== scene.root);
  const boxes = items.map(({ key, parent, place, group, children, x, y, w, h }) => {
    const kind = place ? step.sides[place.index].kind : step.kindOf(group);
    const version = place && picture.version(place);
    const ofGroup = group ? [groupLabel(group), countsText(step, group)] : [];
    const lines = place ? [titleOf(place, version), version.name, version.value] : ofGroup;
    return { key, parent: parent.key, isFrame: Boolean(children), kind, lines, rect: [x, y, w, h] };
  });
  const links = [...scene.links.values()].map(({ from, to, sort, edges, points }) => {
    const kind = linkKind({ sort, edges }, BOTH);
    const ends = edges.map(([source, user]) => [book.places[source].id, book.places[user].id]);
    return { from: from.key, to: to.key, kind, ends, points };
  });
  return JSON.stringify({ svg: `${picture.draw(1, heading)}`, boxes, links });
}

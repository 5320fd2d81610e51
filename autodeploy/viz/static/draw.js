// Draws the scene as SVG: in a page, and where there is no page, for a file. Text goes in as text.

const SVG = "http://www.w3.org/2000/svg";
const NO_VALUE = "∅"; // marks a node of which no shape or dtype is known

function svg(parent, tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  if (text !== undefined) {
    element.textContent = text;
  }
  parent?.append(element);
  return element;
}

// `shown` are the sides to be drawn: BEFORE, AFTER or BOTH.
class Picture {
  constructor(scene, shown, selected) {
    this.scene = scene;
    this.step = scene.step;
    this.shown = shown;
    this.selected = selected && scene.itemOf(selected);
    this.picked = selected;
  }

  // `heading` are lines above the picture.
  draw(zoom, heading = []) {
    const { root } = this.scene;
    const top = 12 + 20 * heading.length;
    const [width, height] = [root.w + 24, root.h + 12 + top];
    const size = { width: Math.round(width * zoom), height: Math.round(height * zoom) };
    const view = { viewBox: `-12 ${-top} ${width} ${height}`, role: "group", "aria-label": "Graph" };
    const picture = svg(null, "svg", { class: "ad-picture", ...view, ...size });
    const items = [...descend(root)].filter((item) => item !== root && this.isShown(item));
    heading.forEach((line, index) => {
      svg(picture, "text", { class: "heading", x: root.x + PADDING, y: 24 - top + 20 * index }, line);
    });
    this.drawRoot(picture, root);
    items.filter((item) => item.children).forEach((frame) => this.drawFrame(picture, frame));
    this.drawLinks(picture);
    this.drawFates(picture);
    items.filter((item) => !item.children).forEach((box) => this.drawBox(picture, box));
    return picture;
  }

  isShown(item) {
    if (item.group) {
      const { before, after } = this.step.counts[item.group.index];
      return (this.shown & BEFORE && before > 0) || (this.shown & AFTER && after > 0);
    }
    return this.version(item.place) !== undefined;
  }

  // The version of a place on the side that is shown.
  version(place) {
    const side = this.step.sides[place.index];
    if (side === undefined) {
      return undefined;
    }
    return (this.shown & AFTER ? side.after : undefined) ?? (this.shown & BEFORE ? side.before : undefined);
  }

  group(parent, item, kind, label) {
    const picked = item === this.selected ? " selected" : "";
    const name = `${item.children ? "frame" : "box"} ${kind}${picked}`;
    const role = { role: "button", tabindex: -1, "aria-label": label };
    const element = svg(parent, "g", { class: name, "data-key": item.key, ...role });
    svg(element, "title", {}, label);
    return element;
  }

  // What all of it is, above everything.
  drawRoot(picture, root) {
    const text = svg(picture, "text", { class: "dim", x: root.x + PADDING, y: root.y + 15 }, "");
    this.drawHidden(text, root, 0);
  }

  drawHidden(text, frame, dx) {
    if (frame.numHidden) {
      const label = hiddenText(frame);
      svg(text, "tspan", { class: "port", dx, "data-whole": frame.group.index }, label);
    }
  }

  drawFrame(picture, frame) {
    const { group } = frame;
    const { kinds } = this.step.counts[group.index];
    const kind = Object.keys(kinds).length === 1 || group.isWas ? this.step.kindOf(group) : "unchanged";
    const summary = countsText(this.step, group, true, frame.numHidden > 0);
    const label = `${groupLabel(group)} ${group.alike ? `(${group.alike} alike)` : ""}`;
    const element = this.group(picture, frame, kind, `${group.path}, open. ${summary}`);
    svg(element, "rect", { class: "border", x: frame.x, y: frame.y, width: frame.w, height: frame.h, rx: 7 });
    svg(element, "rect", { class: "bar", x: frame.x, y: frame.y, width: frame.w, height: TITLE, rx: 7 });
    const text = svg(element, "text", { class: "name", x: frame.x + 9, y: frame.y + 15 }, `▾ ${label}`);
    const hidden = hiddenText(frame).length + 2;
    const room = Math.floor((frame.w - label.length * CHAR - 46) / SMALL) - hidden;
    svg(text, "tspan", { class: "dim", dx: 10 }, shorten(summary, Math.max(room, 1)));
    this.drawHidden(text, frame, 10);
  }

  drawBox(picture, box) {
    if (box.group) {
      this.drawGroup(picture, box);
    } else {
      this.drawPlace(picture, box);
    }
  }

  drawGroup(picture, box) {
    const { group } = box;
    const kind = this.step.kindOf(group);
    const summary = countsText(this.step, group);
    const label = shorten(groupLabel(group), Math.floor((box.w - 34) / CHAR));
    const element = this.group(picture, box, kind, `${group.path}, closed. ${summary}`);
    if (group.alike) {
      svg(element, "rect", { class: "shadow", x: box.x + 4, y: box.y + 4, width: box.w, height: box.h, rx: 5 });
    }
    svg(element, "rect", { class: "border", x: box.x, y: box.y, width: box.w, height: box.h, rx: 5 });
    const glyph = this.step.glyphOf(group);
    svg(element, "text", { class: "name", x: box.x + 9, y: box.y + 18 }, `▸ ${label}`);
    svg(element, "text", { class: "name end glyph", x: box.x + box.w - 8, y: box.y + 18 }, glyph);
    const times = group.alike ? `${group.alike} ×  ` : "";
    const room = Math.floor((box.w - 18) / SMALL);
    svg(element, "text", { class: "dim", x: box.x + 9, y: box.y + 35 }, shorten(times + summary, room));
    this.drawValue(element, box, this.valueOf(box), false);
  }

  // What comes out of a closed group: a shape where it is one tensor, else how many.
  valueOf(box) {
    const sources = new Set();
    for (const { from, edges } of this.scene.links.values()) {
      if (from === box) {
        edges.filter(([, , bits]) => bits & this.shown).forEach(([source]) => sources.add(source));
      }
    }
    const versions = [...sources].map((index) => this.version(this.step.book.places[index])).filter((found) => found);
    return versions.length === 1 ? valueText(versions[0]) : versions.length ? `${versions.length} tensors` : "";
  }

  drawPlace(picture, box) {
    const { place } = box;
    const side = this.step.sides[place.index];
    const version = this.version(place);
    const title = titleOf(place, version);
    const glyph = this.step.book.glyphs[side.kind].trim();
    const fate = side.left ? "moved away" : side.kind;
    const label = `${fate}: ${version.name} = ${version.target}`;
    const element = this.group(picture, box, `${side.kind}${side.left ? " left" : ""}`, label);
    svg(element, "rect", { class: "border", x: box.x, y: box.y, width: box.w, height: box.h, rx: 5 });
    const y = box.y + (box.hasPorts ? 29 : 16);
    if (box.hasPorts) {
      this.drawPorts(element, box, version);
    }
    const room = Math.floor((box.w - 14) / CHAR) - (glyph ? 2 : 0);
    svg(element, "text", { class: "name", x: box.x + 8, y }, `${glyph ? `${glyph} ` : ""}${shorten(title, room)}`);
    const name = shorten(version.name, Math.floor((box.w - 14) / SMALL) - (version.value ? 0 : 2));
    svg(element, "text", { class: "dim", x: box.x + 8, y: y + 15 }, name);
    if (!version.value && version.op !== "output") {
      const mark = svg(element, "text", { class: "mark end", x: box.x + box.w - 6, y: y + 15 }, NO_VALUE);
      svg(mark, "title", {}, "no shape or dtype is known of this node");
    }
    const differs = side.before && side.after && side.before.value !== side.after.value;
    this.drawValue(element, box, `${valueText(version)}${readersText(this.step, place)}`.trim(), differs);
  }

  drawValue(element, box, text, differs) {
    if (text) {
      const place = { x: box.x + box.w / 2, y: box.y + box.h + 13 };
      svg(element, "text", { class: differs ? "value differs" : "value", ...place }, `${differs ? "~ " : ""}${text}`);
    }
  }

  // Names of what is read from far away, as many as fit.
  drawPorts(element, box, version) {
    let room = Math.floor((box.w - 26) / SMALL);
    const sources = farInputs(this.step.book, version);
    if (sources.length === 0) {
      return;
    }
    const line = svg(element, "text", { class: "ports", x: box.x + 8, y: box.y + 13 }, "◂ ");
    sources.forEach((source, index) => {
      const more = sources.length - index;
      const name = portName(source);
      if (room <= 0) {
        return;
      }
      const fits = name.length + (more > 1 ? 4 : 0) <= room || index === 0;
      const text = fits ? shorten(name, Math.max(room, 6)) : `+${more}`;
      svg(line, "tspan", fits ? { class: "port", "data-port": source.index } : {}, text);
      svg(line, "tspan", {}, fits && more > 1 ? " " : "");
      room = fits ? room - text.length - 1 : 0;
    });
  }

  drawLinks(picture) {
    const layer = svg(picture, "g", { class: "links" });
    for (const link of this.scene.links.values()) {
      const isFate = link.sort === "fate";
      const kind = linkKind(link, this.shown);
      if (kind) {
        const touching = link.from === this.selected || link.to === this.selected ? " touching" : "";
        const path = svg(layer, "path", { class: `link ${kind}-link${touching}`, d: pathOf(link) });
        svg(path, "title", {}, isFate ? `${link.edges.length} nodes became this` : `${link.edges.length} read`);
      }
    }
  }

  // Dotted lines from what the selected node was, or to what it became.
  drawFates(picture) {
    if (!this.picked || isGroup(this.picked) || this.shown !== BOTH) {
      return;
    }
    for (const place of relatives(this.step, this.picked)) {
      const other = this.scene.itemOf(place);
      if (other && other !== this.selected) {
        const [one, two] = [this.selected, other].map((item) => [item.x + item.w / 2, item.y + item.h / 2]);
        const bend = (one[0] + two[0]) / 2;
        svg(picture, "path", { class: "fate", d: `M${one}C${bend} ${one[1]} ${bend} ${two[1]} ${two}` });
      }
    }
  }
}

// The places that a node became or came from in a step.
function relatives(step, place) {
  const { id } = place;
  const sides = [step.was.get(id)?.after, step.is.get(id)?.before, step.twins.get(id)?.before];
  const ids = sides.flatMap((side) => side ?? []);
  const found = new Set(ids.filter((other) => other !== id).map((other) => step.placeOf(other)));
  const twin = (other) => other.id === id && other !== place && step.sides[other.index];
  return [...found, ...step.book.places.filter(twin)].filter((other) => other && other.group);
}

// "42 nodes  ~3 +1", or "42 nodes, 3 changed, 1 added"
function countsText(step, group, inWords = false, isShort = false) {
  const { kinds, total } = step.counts[group.index];
  const wordOf = (kind) => (inWords ? `${kinds[kind]} ${kind}` : `${step.book.glyphs[kind]}${kinds[kind]}`);
  const changed = KINDS.slice(1).filter((kind) => kinds[kind]).map(wordOf);
  const all = isShort && changed.length ? [] : [`${total} node${total === 1 ? "" : "s"}`];
  return [...all, ...changed].join(inWords ? ", " : "  ");
}

function hiddenText({ numHidden, group }) {
  return numHidden ? `⋯ ${numHidden} ${group.called ? "inside" : "unchanged"}` : "";
}

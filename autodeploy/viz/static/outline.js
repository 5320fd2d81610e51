// The same scene as lines of text: open groups indented, what changed with its sign, long unchanged stretches put away.

const SHORTEST_RUN = 4;

function html(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) {
    element.className = className;
  }
  element.append(...content.filter((part) => part !== undefined && part !== null && part !== ""));
  return element;
}

// `name = target(x, size=[1, 2])` as it is in one graph.
function callText(version, stage) {
  if (version.op === "placeholder" || version.op === "get_attr") {
    return `${version.name} = ${version.op} ${version.target}`;
  }
  const parts = version.args.map(([name, pieces]) => {
    const text = argumentText(pieces, stage);
    return isPlain(name, pieces) ? text : `${name}=${text}`;
  });
  return `${version.name} = ${version.target}(${parts.join(", ")})`;
}

function argumentText(pieces, stage) {
  return pieces.map((piece) => (typeof piece === "number" ? (stage.at.get(piece)?.name ?? "?") : piece)).join("");
}

function isPlain(name, pieces) {
  return /^\d+$/.test(name) || (pieces.length === 1 && typeof pieces[0] === "number");
}

class Outline {
  constructor(scene, selected, unfolded) {
    this.scene = scene;
    this.step = scene.step;
    this.selected = selected && scene.itemOf(selected);
    this.unfolded = unfolded; // keys of the first lines of stretches that are shown all the same
  }

  draw() {
    const list = html("div", "outline");
    list.setAttribute("role", "tree");
    this.drawFrame(list, this.scene.root, 0);
    return list;
  }

  drawFrame(list, frame, depth) {
    const items = frame.children;
    if (frame.numHidden) {
      const row = this.row("more", depth, " ", hiddenText(frame));
      row.dataset.whole = frame.group.index;
      list.append(row);
    }
    for (let index = 0; index < items.length; index += 1) {
      const run = this.unchangedRun(items, index);
      if (run.length >= SHORTEST_RUN && !this.unfolded.has(run[0].key)) {
        list.append(this.foldedRow(run, depth));
        index += run.length - 1;
      } else {
        this.drawItem(list, items[index], depth);
        run.slice(1).forEach((item) => this.drawItem(list, item, depth));
        index += Math.max(0, run.length - 1);
      }
    }
  }

  // Unchanged places from `start` on, up to the next that is changed or selected.
  unchangedRun(items, start) {
    const run = [];
    for (const item of items.slice(start)) {
      const isQuiet = item.place && this.step.sides[item.place.index].kind === "unchanged" && item !== this.selected;
      if (!isQuiet) {
        break;
      }
      run.push(item);
    }
    return run;
  }

  foldedRow(run, depth) {
    const row = this.row("more", depth, " ", `⋯ ${run.length} unchanged`);
    row.dataset.unfold = run[0].key;
    return row;
  }

  row(kind, depth, sign, text, value) {
    const row = html("div", `row ${kind}`, html("span", "sign", sign), html("span", "code", text));
    if (value) {
      row.append(html("span", "value", value));
    }
    row.style.paddingInlineStart = `${8 + 18 * depth}px`;
    row.setAttribute("role", "treeitem");
    return row;
  }

  drawItem(list, item, depth) {
    const rows = item.group ? [this.groupRow(item, depth)] : this.placeRows(item, depth);
    rows.forEach((row) => {
      row.dataset.key = item.key;
      row.classList.toggle("selected", item === this.selected);
      list.append(row);
    });
    if (item.children) {
      this.drawFrame(list, item, depth + 1);
    }
  }

  groupRow(item, depth) {
    const { group } = item;
    const kind = this.step.kindOf(group);
    const alike = group.alike ? `  (${group.alike} alike)` : "";
    const label = `${item.children ? "▾" : "▸"} ${groupLabel(group)}${alike}`;
    const row = this.row(`module ${kind}`, depth, this.step.glyphOf(group), label);
    row.append(html("span", "dim", countsText(this.step, group, true)));
    row.setAttribute("aria-expanded", Boolean(item.children));
    return row;
  }

  placeRows(item, depth) {
    const { kind, before, after, entry, left } = this.step.sides[item.place.index];
    const [old, now] = [before && callText(before, this.step.before), after && callText(after, this.step.after)];
    const valueOf = (version) => version.value || (version.op === "output" ? "" : NO_VALUE);
    if (before && after && (old !== now || before.value !== after.value) && kind !== "unchanged") {
      const signs = [["-", old, before], ["+", now, after]];
      return signs.map(([sign, text, version]) => this.row(`${kind} half`, depth, sign, text, valueOf(version)));
    }
    const sign = kind === "replaced" ? (after ? "+" : "-") : this.step.book.glyphs[kind];
    const rows = [this.row(kind, depth, sign, now ?? old, left ? "moved away" : valueOf(after ?? before))];
    const changes = before && after && entry ? entry.changes : [];
    return [...rows, ...changes.map(([what, was, is]) => this.row("why", depth + 1, " ", `${what}: ${was} → ${is}`))];
  }
}

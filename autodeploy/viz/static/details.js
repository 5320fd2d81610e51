// The panel that tells everything about the selected node or module.

class Details {
  constructor(page) {
    this.page = page;
  }

  draw(panel) {
    const { selected, step } = this.page;
    panel.replaceChildren();
    if (selected) {
      const close = html("button", "close", "×");
      close.dataset.act = "closeDetails";
      close.ariaLabel = "Close the details";
      panel.append(close);
    }
    if (!selected) {
      return;
    }
    if (isGroup(selected)) {
      this.drawGroup(panel, selected);
    } else {
      this.drawPlace(panel, selected, step.sides[selected.index] ?? {});
    }
  }

  drawGroup(panel, group) {
    const { step, shown } = this.page;
    const kinds = step.kindsIn(group).join(", ") || "unchanged";
    panel.append(html("h2", "", groupLabel(group)), this.badge(step.kindOf(group), kinds));
    const versions = [...this.page.book.inside(group)].flatMap((place) => place.versions);
    const type = versions.find((version) => version.module === group.path);
    const rows = [
      ["module", group.path],
      ["class", type?.moduleType],
      ["alike", group.alike ? `${group.alike} modules that look the same in every step` : ""],
      ["in this step", countsText(step, group, true)],
    ];
    panel.append(this.table(rows), html("p", "dim", `Enter ${shown.open.has(group) ? "closes" : "opens"} it.`));
  }

  drawPlace(panel, place, side) {
    const version = side.after ?? side.before ?? place.versions[place.versions.length - 1];
    panel.append(html("h2", "", version.name));
    if (side.after || side.before) {
      panel.append(this.badge(side.kind, side.left ? "moved away from here" : side.kind));
    } else {
      panel.append(html("p", "dim", "Not in the graphs of this step."));
    }
    const rows = [
      ["op", version.op],
      ["target", version.target],
      ["value", version.value || `${NO_VALUE} not known`],
      ["device", version.device],
      ["bytes", version.bytes],
      ["module", version.module],
      ["class", version.moduleType],
      ["source", version.source],
      ["role", version.role],
      ["graph", version.graph],
    ];
    panel.append(this.table(rows));
    this.drawArguments(panel, side, version);
    this.drawChanges(panel, place, side);
    this.drawOrigin(panel, place);
    this.drawReaders(panel, place, side);
  }

  badge(kind, text = kind) {
    return html("span", `badge ${kind}`, `${this.page.book.glyphs[kind] ?? ""} ${text}`.trim());
  }

  table(rows) {
    const list = html("dl", "");
    for (const [name, content] of rows) {
      if (content) {
        list.append(html("dt", "", name), html("dd", "", content));
      }
    }
    return list;
  }

  section(panel, title, ...content) {
    if (content.length) {
      panel.append(html("h3", "", title), ...content);
    }
  }

  drawArguments(panel, side, version) {
    const { step } = this.page;
    const stage = this.stageOf(side, version);
    const old = new Map((side.before?.args ?? []).map(([name, pieces]) => [name, argumentText(pieces, step.before)]));
    const rows = version.args.map(([name, pieces]) => {
      const content = html("dd", "", ...pieces.map((piece) => this.piece(piece, stage)));
      if (side.before && side.after && old.get(name) !== argumentText(pieces, stage)) {
        content.append(html("del", "", old.get(name) ?? "(not given)"));
      }
      return [html("dt", "", name), content];
    });
    this.section(panel, "arguments", ...(rows.length ? [html("dl", "code", ...rows.flat())] : []));
  }

  // The graph that a version is read in: that of the step, else the first that has it.
  stageOf(side, version) {
    const { step, book, selected } = this.page;
    if (side.after || side.before) {
      return side.after ? step.after : step.before;
    }
    return book.stages.find((stage) => stage.at.get(selected.id) === version);
  }

  piece(piece, stage) {
    if (typeof piece !== "number") {
      return piece;
    }
    const version = stage.at.get(piece);
    return version ? this.link(this.page.book.places[version.place], version.name) : "?";
  }

  link(place, text) {
    const button = html("button", "link", text);
    button.dataset.go = `p${place.index}`;
    return button;
  }

  nodeLinks(ids) {
    const { step, book } = this.page;
    const places = ids.map((id) => step.placeOf(id) ?? book.byId.get(id)).filter((place) => place);
    const shown = places.slice(0, 12).map((place) => this.link(place, place.versions[0].name));
    return places.length > 12 ? [...shown, html("span", "dim", `and ${places.length - 12} more`)] : shown;
  }

  drawChanges(panel, place, side) {
    const { step } = this.page;
    const rows = (side.entry?.changes ?? []).map(([what, was, is]) => {
      const sides = [html("del", "", was || "(none)"), " → ", html("ins", "", is || "(none)")];
      return html("li", "", html("b", "", what), ": ", ...sides);
    });
    this.section(panel, "what changed", ...(rows.length ? [html("ul", "", ...rows)] : []));
    const was = step.was.get(place.id);
    if (was && (was.kind === "merged" || was.kind === "replaced") && was.after.length) {
      const others = was.before.length > 1 ? ` (with ${was.before.length - 1} more)` : "";
      const title = was.kind === "merged" ? "duplicate of" : "replaced by";
      this.section(panel, `${title}${others}`, ...this.nodeLinks(was.after));
    }
    const is = step.is.get(place.id);
    if (is && is.kind === "replaced") {
      this.section(panel, "stands for", ...this.nodeLinks(is.before));
    }
    const twins = step.twins.get(place.id);
    if (twins) {
      this.section(panel, `${twins.before.length} duplicates were merged into it`, ...this.nodeLinks(twins.before));
    }
    if (side.entry?.stage) {
      this.section(panel, "matched by", html("p", "", side.entry.stage));
    }
  }

  // The pass that made it, what it came from, and every pass that touched it.
  drawOrigin(panel, place) {
    const { book } = this.page;
    if (!book.isHistory) {
      const stages = book.stages.filter((stage) => stage.at.has(place.id)).map((stage) => stage.name);
      this.section(panel, "is in", html("p", "", stages.join(", ")));
      return;
    }
    const birth = book.births.get(place.id);
    const stage = book.stages[birth ? birth.stage : 0];
    const origins = birth ? this.nodeLinks(birth.origins) : [];
    this.section(panel, "made by", html("p", "", birth ? stage.name : `there from the start (${stage.name})`));
    this.section(panel, "came from", ...origins);
    const passes = historyOf(book, place).map(([index, kind]) => {
      const button = html("button", "link", `${book.glyphs[kind]} ${stepName(book, index)}: ${kind}`);
      button.dataset.step = index;
      return html("li", "", button);
    });
    this.section(panel, "touched by", ...(passes.length ? [html("ul", "plain", ...passes)] : []));
  }

  drawReaders(panel, place, side) {
    const { step } = this.page;
    const stage = side.after ? step.after : step.before;
    if (!side.after && !side.before) {
      return;
    }
    const reads = ([, version]) => version.inputs.some((part, index) => index % 2 && part === place.id);
    const readers = [...stage.at].filter((one) => reads(one) && !(one[1].op === "output" && one[1].graph));
    this.section(panel, `read by ${readers.length}`, ...this.nodeLinks(readers.map(([id]) => id)));
  }
}

// [step, kind] of every pass that did something to a node.
function historyOf(book, place) {
  const found = [];
  book.steps.forEach(({ first, last, entries }, index) => {
    const entry = entries.find(
      ([kind, before, after]) => before.includes(place.id) || (KINDS[kind] !== "merged" && after.includes(place.id)),
    );
    if (entry && last - first <= 1) {
      found.push([index, KINDS[entry[0]]]);
    }
  });
  return found;
}

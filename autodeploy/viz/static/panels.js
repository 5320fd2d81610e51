// What surrounds the graph: the timeline, the list of changes with the story of the metadata, the legend, the search.

const MAX_LINES = 400; // of the list of changes
const MAX_FOUND = 40;

function drawTimeline(page, list, slider) {
  const { book } = page;
  slider.max = book.steps.length - 1;
  slider.style.width = `calc(100% - 100% / ${book.steps.length} + 16px)`; // its knob below the middle of each pass
  list.replaceChildren(
    ...book.steps.map(({ last, counts }, index) => {
      const stage = book.stages[last];
      const failed = stage.error !== "" && stepName(book, index) === stage.name;
      const number = Object.entries(counts).reduce((sum, [kind, count]) => sum + (kind === "unchanged" ? 0 : count), 0);
      const count = failed ? "✕ failed" : number ? `${number} nodes` : "no change";
      const button = html("button", "", html("span", "pass", stepName(book, index)), html("span", "count", count));
      button.dataset.step = index;
      button.title = index || book.steps.length === 1 ? passTitle(stage) : `${book.stages[0].name} → ${stage.name}`;
      return html("li", `${number ? "" : "empty"} ${failed ? "failed" : ""}`, button);
    }),
  );
}

function passTitle(stage) {
  const done = `${stage.matches} matches, ${(1000 * stage.seconds).toFixed(1)} ms`;
  return [stage.options, done, stage.error].filter((part) => part).join("\n");
}

function markStep(page, list, slider) {
  slider.value = page.step.index;
  slider.setAttribute("aria-valuetext", stepName(page.book, page.step.index));
  [...list.children].forEach((item, index) => {
    item.classList.toggle("current", index === page.step.index);
    item.firstChild.setAttribute("aria-current", index === page.step.index ? "step" : "false");
  });
  list.children[page.step.index].scrollIntoView({ block: "nearest", inline: "nearest" });
}

function drawChanges(page, panel) {
  const { step } = page;
  const { before, after } = step;
  panel.replaceChildren(html("h2", "", stepName(page.book, step.index)));
  panel.append(html("p", "dim", `${before.at.size} → ${after.at.size} nodes`));
  if (step.isEmpty) {
    panel.append(html("p", "", "Nothing changed."));
  }
  if (step.story) {
    panel.append(storyOf(step.story));
  }
  const told = page.book.steps.findIndex(({ story }) => story);
  if (told >= 0 && !step.story && after.name !== "start" && step.index === 0) {
    const link = html("button", "link", `${stepName(page.book, told)}: ${page.book.steps[told].story.headline}`);
    link.dataset.step = told;
    panel.append(link);
  }
  let block = -1;
  step.lines.slice(0, MAX_LINES).forEach((line, index) => {
    if (line.block !== block) {
      block = line.block;
      const times = line.modules > 1 ? `${line.modules} × ` : "";
      const which = html("span", "dim", shorten(line.which, 80));
      panel.append(html("h3", "block", `${times}${line.path || "(outside modules)"}`, which));
    }
    panel.append(lineButton(page, line, index));
  });
  if (step.lines.length > MAX_LINES) {
    panel.append(html("p", "dim", `and ${step.lines.length - MAX_LINES} more; n and p reach them`));
  }
}

function lineButton(page, line, index) {
  const { kind } = page.step.entries[line.entries[0]];
  const times = line.count > 1 ? `${line.count} × ` : "";
  const where = line.module ? html("span", "dim", `${line.module}  `) : "";
  const mark = html("span", `swatch ${kind}`, page.book.glyphs[kind]);
  const glyph = `${page.book.glyphs[kind]} `;
  const text = line.text.startsWith(glyph) ? line.text.slice(glyph.length) : line.text;
  const button = html("button", "change", mark, html("span", "", where, `${times}${text}`));
  button.dataset.line = index;
  return button;
}

// The nodes of the metadata that became one, who reads each field, and what a step costs.
function storyOf(story) {
  const box = html("details", "story", html("summary", "", story.headline));
  box.open = true;
  box.append(html("p", "dim", `${story.subgraphs} subgraphs; ${story.beside} sizes and constants went with them`));
  const fields = story.fields.map(({ name, op, value, readers }) => {
    const shown = name.includes(op) ? name : `${name} (${op})`;
    const who = Object.entries(readers).map(([reader, number]) => `${number} × ${reader}`).join(", ");
    return [html("span", "", html("b", "", shown), " ", html("span", "dim", value)), who || "(nobody)"];
  });
  const sides = [story.before, story.after];
  const names = ["nodes", "launches", "copies", "bytes"];
  const costs = names.map((name) => [name, ...sides.map((cost) => costText(cost, name))]);
  box.append(tableOf(["field", "read by"], fields), tableOf(["per step", "before", "after"], costs));
  return box;
}

function costText(cost, name) {
  return name === "bytes" && cost.unsized ? `${cost.bytes} + ${cost.unsized} of unknown shape` : `${cost[name]}`;
}

function tableOf(head, rows) {
  const cells = (tag, row) => html("tr", "", ...row.map((content) => html(tag, "", content)));
  const body = html("tbody", "", ...rows.map((row) => cells("td", row)));
  return html("table", "", html("thead", "", cells("th", head)), body);
}

function drawLegend(page, panel) {
  const counts = page.step.totals;
  panel.replaceChildren(
    ...KINDS.map((kind) => {
      const swatch = html("span", `swatch ${kind}`, page.book.glyphs[kind]);
      return html("span", `key ${counts[kind] ? "" : "none"}`, swatch, `${kind} ${counts[kind] ?? 0}`);
    }),
    html("span", "key", html("b", "", "◂ name"), "read from far away"),
    html("span", "key", html("b", "", "┈▸"), "became"),
    html("span", "key", html("b", "", NO_VALUE), "no shape known"),
  );
}

// Words to look for, as regular expressions: all of `/…/`, else each word as it is written.
function wordsOf(query) {
  const whole = /^\/(.+?)\/?$/.exec(query.trim());
  const plain = query.split(/\s+/).filter((word) => word);
  const words = whole ? [whole[1]] : plain.map((word) => word.replace(/[^\w]/g, "\\$&"));
  try {
    return words.map((word) => new RegExp(word, "i"));
  } catch {
    return []; // not finished yet
  }
}

// Places whose text contains all words of the query, those whose name or op contains the first before others.
function search(page, query) {
  const words = wordsOf(query);
  if (words.length === 0) {
    return [];
  }
  const found = page.book.places.filter((place) => words.every((word) => word.test(textOf(place))));
  const has = ({ name, target }) => words[0].test(`${name} ${target}`);
  const named = (place) => place.versions.some(has);
  const rank = (place) => (named(place) ? 0 : 2) + (page.step.sides[place.index] ? 0 : 1);
  return found.sort((one, other) => rank(one) - rank(other)).slice(0, MAX_FOUND);
}

function textOf(place) {
  const words = ({ name, target, module, moduleType, value, source, role }) => {
    return [name, target, module, moduleType, value, source, role].join(" ");
  };
  place.text ??= place.versions.map(words).join(" ");
  return place.text;
}

function drawFound(page, panel, places, current) {
  panel.hidden = places.length === 0;
  panel.replaceChildren(
    ...places.map((place, index) => {
      const version = page.step.sides[place.index]?.after ?? place.versions[place.versions.length - 1];
      const where = html("span", "dim", `${version.value} ${version.module}`);
      const name = html("b", "", version.name);
      const item = html("div", index === current ? "current" : "", name, ` ${version.short} `, where);
      item.dataset.go = `p${place.index}`;
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", index === current);
      return item;
    }),
  );
}

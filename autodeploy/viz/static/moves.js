// Ways through the graph: to the next change, to a neighbour, and to what is a few edges away.

// The places around one, up to `hops` edges away in any of the graphs; not on through a tensor that everything reads.
function nearby(step, start, hops) {
  const near = neighbours(step);
  const found = new Set([start]);
  let border = [start];
  for (let hop = 0; hop < hops && found.size < MAX_BOXES / 2; hop += 1) {
    const passing = border.filter((place) => place === start || !place.far);
    const next = passing.flatMap((place) => near.get(place.index) ?? []);
    border = next.filter((place) => place.group && !found.has(place));
    border.slice(0, MAX_BOXES / 2 - found.size).forEach((place) => found.add(place));
  }
  return [...found];
}

function neighbours(step) {
  if (!step.around) {
    step.around = new Map();
    const add = (one, other) => {
      if (!step.around.has(one)) {
        step.around.set(one, []);
      }
      step.around.get(one).push(step.book.places[other]);
    };
    for (const [source, user] of step.edges) {
      add(source, user);
      add(user, source);
    }
  }
  return step.around;
}

// A place that shows an entry, one with a box if there is any: the result of a group is its last node.
function placeOfEntry(step, index) {
  const { before, after, kind } = step.entries[index];
  const ids = kind === "merged" ? [...before, ...after] : [...before, ...after].reverse();
  const places = ids.map((id) => step.placeOf(id)).filter((place) => place);
  return places.find((place) => place.group) ?? places[0];
}

// The line and entry that shows a place, undefined for one that nothing happened to.
function lineOf(step, place) {
  const side = place && !isGroup(place) ? step.sides[place.index] : undefined;
  const entry = side?.entry && step.entries.indexOf(side.entry);
  const line = step.lines.findIndex((one) => one.entries.includes(entry));
  return line < 0 ? undefined : { line, entry };
}

// The box in a direction: the nearest, where sideways counts more than ahead.
function nextBox(items, from, direction) {
  const [dx, dy] = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[direction];
  const middle = (item) => [item.x + item.w / 2, item.y + (item.children ? TITLE : item.h) / 2];
  const [x, y] = middle(from);
  let best;
  for (const item of items) {
    const [otherX, otherY] = middle(item);
    const ahead = (otherX - x) * dx + (otherY - y) * dy;
    const aside = Math.abs((otherX - x) * dy) + Math.abs((otherY - y) * dx);
    const cost = ahead + 2 * aside;
    if (item !== from && ahead > 1 && (best === undefined || cost < best.cost)) {
      best = { item, cost };
    }
  }
  return best?.item;
}

const KEYS = [
  ["j  k", "next and previous pass"],
  ["n  p", "next and previous change"],
  ["N  P", "the same change in the next and previous layer"],
  ["/", "search; /…/ is a regular expression"],
  ["arrows", "go to the box, or line, in that direction"],
  ["Enter", "open or close the selected module"],
  ["e  c", "open what changed in this step, close everything"],
  ["u", "what is unchanged in the selected module, or in all, and back"],
  ["f", "only what is near the selected node, and back"],
  ["[  ]", "fewer and more edges around it"],
  ["1  2  3", "merged, side by side, text"],
  ["+  −  0", "larger, smaller, all of it and back"],
  ["t", "light or dark"],
  ["Esc", "leave the search, the focus, the selection"],
  ["?", "this list"],
];

function drawHelp(dialog) {
  const rows = KEYS.flatMap(([keys, meaning]) => {
    const names = keys.split("  ").flatMap((key) => [html("kbd", "", key), " "]);
    return [html("dt", "", ...names), html("dd", "", meaning)];
  });
  const close = html("button", "", "close");
  close.dataset.act = "help";
  dialog.replaceChildren(html("h2", "", "Keys"), html("dl", "", ...rows), close);
}

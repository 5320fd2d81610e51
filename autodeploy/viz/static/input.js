// Mouse, keys and search.

function actionsOf(page) {
  const help = byId("help");
  return {
    zoomIn: () => page.setZoom(page.zoom * 1.25),
    zoomOut: () => page.setZoom(page.zoom / 1.25),
    fit: () => page.setZoom(Math.abs(page.zoom - page.fitting()) < 0.01 ? 1 : page.fitting()),
    theme: () => page.setTheme(),
    help: () => (help.open ? help.close() : help.showModal()),
    fewer: () => page.moreHops(-1),
    more: () => page.moreHops(1),
    leave: () => page.setFocus(null),
    changes: () => byId("changes").toggleAttribute("hidden"),
    closeDetails: () => page.select(null),
  };
}

function keysOf(page, actions) {
  const { step } = page;
  const selectedPlace = page.selected && !isGroup(page.selected) ? page.selected : null;
  const open = () => page.selected && isGroup(page.selected) && page.toggle(page.selected);
  return {
    j: () => page.goTo(step.index + 1),
    k: () => page.goTo(step.index - 1),
    n: () => page.nextChange(1, false),
    p: () => page.nextChange(-1, false),
    N: () => page.nextChange(1, true),
    P: () => page.nextChange(-1, true),
    "/": () => byId("query").focus(),
    Enter: open,
    " ": open,
    e: () => page.setOpen(openChanged(step, page.panes.clientWidth, page.panes.clientHeight)),
    c: () => page.setOpen(new Openness(step, page.panes.clientWidth, [step.root], [step.root])),
    u: () => page.toggleWhole(page.selected ? groupOf(page.selected) : step.root),
    f: () => page.setFocus(page.focus ? null : selectedPlace?.group ? { place: selectedPlace, hops: 1 } : null),
    "[": actions.fewer,
    "]": actions.more,
    1: () => page.setView("merged"),
    2: () => page.setView("sides"),
    3: () => page.setView("text"),
    "+": actions.zoomIn,
    "=": actions.zoomIn,
    "-": actions.zoomOut,
    0: actions.fit,
    t: actions.theme,
    "?": actions.help,
    Escape: () => (page.focus ? page.setFocus(null) : page.select(null)),
    ArrowUp: () => page.move("ArrowUp"),
    ArrowDown: () => page.move("ArrowDown"),
    ArrowLeft: () => page.move("ArrowLeft"),
    ArrowRight: () => page.move("ArrowRight"),
  };
}

function listenToKeys(page, actions) {
  document.addEventListener("keydown", (event) => {
    const { target, key } = event;
    const isTyping = target.id === "query" || event.ctrlKey || event.metaKey || event.altKey;
    const isSlider = target.id === "slider" && key.startsWith("Arrow");
    const isPressed = target.tagName === "BUTTON" && (key === "Enter" || key === " ");
    if (isTyping || isSlider || isPressed || (byId("help").open && key !== "?")) {
      return;
    }
    const act = keysOf(page, actions)[key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
}

const CLICKABLE = ["act", "view", "step", "line", "go", "port", "whole", "unfold", "key"]
  .map((name) => `[data-${name}]`)
  .join();

function listenToMouse(page, actions) {
  document.addEventListener("click", (event) => {
    const { dataset } = event.target.closest(CLICKABLE) ?? {};
    if (!dataset) {
      return;
    }
    if (dataset.act) {
      actions[dataset.act]();
    } else if (dataset.view) {
      page.setView(dataset.view);
    } else if (dataset.step) {
      page.goTo(Number(dataset.step));
    } else if (dataset.line) {
      page.showEntry(page.step.lines[Number(dataset.line)].entries[0]);
    } else if (dataset.go) {
      byId("found").hidden = true;
      page.select(page.thing(dataset.go), { reveal: true });
    } else if (dataset.port) {
      const source = page.book.places[Number(dataset.port)];
      page.select(page.step.placeOf(source.id) ?? source, { reveal: true });
    } else if (dataset.whole) {
      page.toggleWhole(page.step.groups[Number(dataset.whole)]);
    } else if (dataset.unfold) {
      page.unfolded.add(dataset.unfold);
      page.draw();
    } else {
      clickItem(page, page.scene.byKey.get(dataset.key));
    }
  });
}

// A click selects; on a module it also opens or closes.
function clickItem(page, item) {
  page.selected = item.place ?? item.group;
  if (item.group && !page.focus) {
    page.toggle(item.group);
  } else {
    page.draw();
  }
}

function listenToSearch(page) {
  const [query, panel] = [byId("query"), byId("found")];
  let [found, current] = [[], 0];
  const show = () => drawFound(page, panel, found, current);
  query.addEventListener("input", () => {
    [found, current] = [search(page, query.value), 0];
    show();
  });
  query.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      found = [];
      show();
      query.blur();
    } else if (event.key === "Enter" && found.length) {
      page.select(found[current], { reveal: true });
      panel.hidden = true;
      query.blur();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      current = clamp(current + (event.key === "ArrowDown" ? 1 : -1), 0, Math.max(0, found.length - 1));
      show();
      panel.children[current]?.scrollIntoView({ block: "nearest" });
      event.preventDefault();
    }
  });
  query.addEventListener("blur", () => setTimeout(() => (panel.hidden = true), 200));
}

// Drag the paper, turn the wheel with Ctrl; two panes move together.
function listenToPanes(page) {
  const { panes } = page;
  let held = null;
  panes.addEventListener("pointerdown", (event) => {
    if (event.button === 0 && !event.target.closest("[data-key]") && page.view !== "text") {
      const pane = event.target.closest(".pane");
      held = { pane, x: event.clientX + pane.scrollLeft, y: event.clientY + pane.scrollTop };
    }
  });
  window.addEventListener("pointermove", ({ clientX, clientY }) => {
    held?.pane.scrollTo(held.x - clientX, held.y - clientY);
  });
  window.addEventListener("pointerup", () => (held = null));
  panes.addEventListener("wheel", (event) => {
    if (event.ctrlKey) {
      event.preventDefault();
      page.setZoom(page.zoom * (event.deltaY < 0 ? 1.1 : 1 / 1.1), { x: event.clientX, y: event.clientY });
    }
  }, { passive: false });
  panes.addEventListener("scroll", ({ target }) => {
    for (const pane of panes.children) {
      if (pane !== target && (pane.scrollTop !== target.scrollTop || pane.scrollLeft !== target.scrollLeft)) {
        pane.scrollTo(target.scrollLeft, target.scrollTop);
      }
    }
  }, { capture: true });
}

const NARROW = 700; // pixels below which the panels lie over the graph, and are closed at first

async function start() {
  const page = new Page(new Book(await unpack(byId("data").textContent)));
  const actions = actionsOf(page);
  listenToKeys(page, actions);
  listenToMouse(page, actions);
  listenToSearch(page);
  listenToPanes(page);
  byId("slider").addEventListener("input", (event) => page.goTo(Number(event.target.value)));
  window.addEventListener("hashchange", () => location.hash !== page.address && page.visit(location.hash));
  byId("changes").hidden = window.innerWidth < NARROW;
  page.start();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("alert").hidden = false;
  byId("alert").textContent = `This page cannot be shown by this browser: ${error}`;
  throw error;
});

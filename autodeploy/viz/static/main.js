// What is shown and selected, and what the keys and the mouse do to it.

const ZOOM = [0.3, 2.5];
const byId = (id) => document.getElementById(id);

class Page {
  constructor(book) {
    this.book = book;
    this.steps = [];
    this.step = this.stepAt(0);
    this.view = "merged";
    this.open = openChanged(book, this.step);
    this.focus = null; // { place, hops } where only what is near one place is shown
    this.selected = null;
    this.unfolded = new Set();
    this.zoom = 1;
    this.panes = document.querySelector(".panes");
    this.details = new Details(this);
  }

  start() {
    drawTimeline(this, byId("passes"), byId("slider"));
    byId("timeline").hidden = this.book.steps.length < 2;
    drawHelp(byId("help"));
    this.arrange();
    this.zoom = clamp(this.fitting(), 0.8, 1);
    this.goTo(0);
  }

  stepAt(index) {
    return (this.steps[index] ??= new Step(this.book, index));
  }

  arrange() {
    const near = this.focus && nearby(this.book, this.focus.place, this.focus.hops);
    this.scene = new Scene(this.book, this.open, near, this.focus?.place);
  }

  // Draw everything anew where it is.
  draw() {
    const isSame = this.panes.classList.contains(this.view === "text" ? "lines" : "drawn");
    const places = isSame ? [...this.panes.children].map(({ scrollLeft, scrollTop }) => [scrollLeft, scrollTop]) : [];
    this.panes.className = `panes ${this.view === "text" ? "lines" : "drawn"}`;
    this.panes.replaceChildren(...this.drawPanes());
    [...this.panes.children].forEach((pane, index) => {
      [pane.scrollLeft, pane.scrollTop] = places[index] ?? places[0] ?? [0, 0];
    });
    this.details.draw(byId("details"));
    for (const button of document.querySelectorAll("[data-view]")) {
      button.setAttribute("aria-pressed", button.dataset.view === this.view);
    }
    this.markLine();
    this.drawFocus();
    const drawn = this.panes.firstChild.querySelectorAll(".box, .frame").length;
    byId("status").textContent = this.view === "text" ? "" : `${drawn} boxes, ${this.book.places.length} nodes in all`;
  }

  drawPanes() {
    if (this.view === "text") {
      return [html("div", "pane", new Outline(this.scene, this.step, this.selected, this.unfolded).draw())];
    }
    const { before, after } = this.step;
    const both = [
      [BEFORE, `before: ${before.name}`],
      [AFTER, `after: ${after.name}`],
    ];
    const sides = this.view === "merged" ? [[BOTH, ""]] : both;
    return sides.map(([side, name]) => {
      const pane = html("div", "pane", name && html("div", "side", name));
      pane.append(new Picture(this.scene, this.step, side, this.selected).draw(this.zoom));
      pane.tabIndex = 0;
      pane.setAttribute("aria-label", name || "both graphs");
      return pane;
    });
  }

  drawFocus() {
    byId("focus").hidden = !this.focus;
    if (this.focus) {
      const { place, hops } = this.focus;
      const text = `only what is at most ${hops} edge${hops > 1 ? "s" : ""} from ${place.versions[0].name}  `;
      const buttons = [["fewer", "[ fewer"], ["more", "] more"], ["leave", "Esc all"]].map(([act, name]) => {
        const button = html("button", "", name);
        button.dataset.act = act;
        return button;
      });
      byId("focus").replaceChildren(text, ...buttons);
    }
  }

  markLine() {
    const line = lineOf(this.step, this.selected)?.line;
    byId("changes").querySelectorAll("[data-line]").forEach((button) => {
      const current = Number(button.dataset.line) === line;
      if (current && !button.classList.contains("current")) {
        button.scrollIntoView({ block: "nearest" });
      }
      button.classList.toggle("current", current);
    });
  }

  // Another step: boxes stay where they are.
  goTo(index) {
    this.step = this.stepAt(clamp(index, 0, this.book.steps.length - 1));
    markStep(this, byId("passes"), byId("slider"));
    drawChanges(this, byId("changes"));
    drawLegend(this, byId("legend"));
    const { error, name } = this.step.after;
    byId("alert").hidden = !error;
    byId("alert").textContent = error && `✕ ${name} failed: ${error}. Shown is the graph that it left behind.`;
    this.draw();
  }

  select(thing, { reveal = false } = {}) {
    this.selected = thing;
    if (thing && reveal) {
      this.reveal(thing);
    }
    this.draw();
    if (thing) {
      this.scrollTo(thing, reveal);
    }
  }

  // Open what is around a place or group.
  reveal(thing) {
    const isHidden = this.focus && !this.scene.itemOf(thing);
    const around = this.book.around(thing);
    if (around.length && (isHidden || (!this.focus && around.some((group) => !this.open.has(group))))) {
      this.focus = null;
      around.forEach((group) => this.open.add(group));
      makeRoom(this.book, this.open, around[around.length - 1]);
      this.arrange();
    }
  }

  scrollTo(thing, toMiddle) {
    const item = this.scene.itemOf(thing);
    for (const pane of item ? this.panes.children : []) {
      const element = pane.querySelector(`[data-key="${item.key}"]`);
      element?.scrollIntoView({ block: toMiddle ? "center" : "nearest", inline: toMiddle ? "center" : "nearest" });
    }
  }

  // Open or close a group; it stays where it is on the screen.
  toggle(group) {
    const key = `g${group.index}`;
    const before = this.panes.querySelector(`[data-key="${key}"]`)?.getBoundingClientRect();
    if (!this.open.delete(group)) {
      this.open.add(group);
      makeRoom(this.book, this.open, group);
    }
    this.arrange();
    this.draw();
    const after = this.panes.querySelector(`[data-key="${key}"]`)?.getBoundingClientRect();
    if (before && after) {
      for (const pane of this.panes.children) {
        pane.scrollBy(after.left - before.left, after.top - before.top);
      }
    }
  }

  setOpen(open) {
    this.open = open;
    this.focus = null;
    this.arrange();
    this.draw();
  }

  setFocus(focus) {
    this.focus = focus;
    this.arrange();
    this.draw();
    if (this.selected) {
      this.scrollTo(this.selected, true);
    }
  }

  moreHops(number) {
    if (this.focus) {
      this.setFocus({ ...this.focus, hops: clamp(this.focus.hops + number, 1, 9) });
    }
  }

  // The change after the selected one, or before it; `alike` stays at the same change, in other layers.
  nextChange(direction, alike) {
    const { lines } = this.step;
    if (lines.length === 0) {
      return;
    }
    const now = lineOf(this.step, this.selected);
    if (alike && now) {
      const { entries } = lines[now.line];
      const index = entries.indexOf(now.entry) + direction;
      this.showEntry(entries[(index + entries.length) % entries.length]);
      return;
    }
    const line = now ? now.line + direction : direction > 0 ? 0 : lines.length - 1;
    this.showEntry(lines[(line + lines.length) % lines.length].entries[0]);
  }

  showEntry(index) {
    this.select(placeOfEntry(this.step, index), { reveal: true });
  }

  move(key) {
    if (this.view === "text") {
      const keys = [...new Set([...this.panes.querySelectorAll("[data-key]")].map((row) => row.dataset.key))];
      const now = this.selected ? keys.indexOf(this.scene.itemOf(this.selected)?.key) : -1;
      const next = keys[now + (key === "ArrowUp" ? -1 : 1)];
      this.selectItem(next && this.scene.byKey.get(next));
      return;
    }
    const picture = new Picture(this.scene, this.step, BOTH, null);
    const items = [...descend(this.scene.root)].filter((item) => item !== this.scene.root && picture.isShown(item));
    const from = this.selected && this.scene.itemOf(this.selected);
    this.selectItem(from ? nextBox(items, from, key) : items[0]);
  }

  selectItem(item) {
    if (item) {
      this.select(item.place ?? item.group);
    }
  }

  fitting() {
    const width = this.panes.clientWidth / (this.view === "sides" ? 2 : 1);
    return (width - 24) / (this.scene.root.w + 24);
  }

  setZoom(zoom) {
    this.zoom = clamp(zoom, ...ZOOM);
    this.draw();
    if (this.selected) {
      this.scrollTo(this.selected, true);
    }
  }

  setView(view) {
    this.view = view;
    this.draw();
    if (this.selected) {
      this.scrollTo(this.selected, true);
    }
  }

  // `p12` or `g3` as what it names.
  thing(name) {
    return (name[0] === "g" ? this.book.groups : this.book.places)[Number(name.slice(1))];
  }

  setTheme() {
    const { dataset } = document.documentElement;
    const isDark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    dataset.theme = isDark ? "light" : "dark";
  }
}

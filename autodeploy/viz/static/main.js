// What is shown and selected, and what the keys and the mouse do to it.

const ZOOM = [0.1, 2.5];
const FIRST_ZOOM = [0.45, 1.25]; // of a step: small, but to be read
const VIEWS = ["merged", "sides", "text"];
const byId = (id) => document.getElementById(id);

class Page {
  constructor(book) {
    this.book = book;
    this.steps = [];
    this.step = this.stepAt(0);
    this.view = "merged";
    this.shown = new Openness(this.step, 1000);
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
    this.visit(location.hash);
  }

  stepAt(index) {
    return (this.steps[index] ??= new Step(this.book, index));
  }

  arrange() {
    const near = this.focus && nearby(this.step, this.focus.place, this.focus.hops);
    this.scene = new Scene(this.shown, near, this.focus?.place);
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
    byId("details").hidden = this.selected === null;
    this.details.draw(byId("details"));
    for (const button of document.querySelectorAll("[data-view]")) {
      button.setAttribute("aria-pressed", button.dataset.view === this.view);
    }
    this.markLine();
    this.drawFocus();
    this.remember();
    const drawn = this.panes.firstChild.querySelectorAll(".box, .frame").length;
    byId("status").textContent = this.view === "text" ? "" : `${drawn} boxes, ${this.book.places.length} nodes in all`;
  }

  drawPanes() {
    if (this.view === "text") {
      return [html("div", "pane", new Outline(this.scene, this.selected, this.unfolded).draw())];
    }
    const { before, after } = this.step;
    const both = [
      [BEFORE, `before: ${before.name}`],
      [AFTER, `after: ${after.name}`],
    ];
    const sides = this.view === "merged" ? [[BOTH, ""]] : both;
    return sides.map(([side, name]) => {
      const pane = html("div", "pane", name && html("div", "side", name));
      pane.append(new Picture(this.scene, side, this.selected).draw(this.zoom));
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

  // Another step: what it changed is opened, as large as the window is.
  goTo(index) {
    const { selected } = this;
    this.step = this.stepAt(clamp(index, 0, this.book.steps.length - 1));
    this.step.enter();
    this.focus = null;
    this.selected = selected && !isGroup(selected) ? (this.step.placeOf(selected.id) ?? null) : null;
    markStep(this, byId("passes"), byId("slider"));
    drawChanges(this, byId("changes"));
    drawLegend(this, byId("legend"));
    const { error, name } = this.step.after;
    byId("alert").hidden = !error;
    byId("alert").textContent = error && `✕ ${name} failed: ${error}. Shown is the graph that it left behind.`;
    this.panes.replaceChildren();
    this.drawFocus();
    byId("details").hidden = this.selected === null;
    // How large the window is, is known only now.
    this.shown = openChanged(this.step, this.panes.clientWidth, this.panes.clientHeight);
    if (this.selected) {
      this.shown.reveal(this.selected);
    }
    this.arrange();
    this.zoom = clamp(this.fitting(), ...FIRST_ZOOM);
    this.draw();
  }

  // Go to the step and node that an address names, as `remember` wrote them.
  visit(hash) {
    const place = new URLSearchParams(hash.slice(1));
    const names = this.book.steps.map((_, index) => stepName(this.book, index));
    this.view = VIEWS.includes(place.get("view")) ? place.get("view") : "merged";
    this.goTo(Math.max(0, names.indexOf(place.get("step"))));
    const found = this.step.findByName(place.get("node"));
    if (found) {
      this.select(found, { reveal: true });
    }
  }

  // Write what is looked at into the address, so that it can be sent.
  remember() {
    const place = new URLSearchParams({ step: stepName(this.book, this.step.index) });
    if (this.selected && !isGroup(this.selected)) {
      const { after, before } = this.step.sides[this.selected.index] ?? {};
      place.set("node", (after ?? before)?.name ?? "");
    }
    if (this.view !== "merged") {
      place.set("view", this.view);
    }
    this.address = `#${place}`;
    try {
      history.replaceState(null, "", this.address);
    } catch {
      // a page inside another one, such as a notebook, has no address of its own
    }
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
    const isHidden = !isGroup(thing) && thing.group && this.scene.owner[thing.index]?.place !== thing;
    if (isHidden || (isGroup(thing) && !this.scene.byKey.has(`g${thing.index}`))) {
      this.focus = null;
      this.shown.reveal(thing);
      makeRoom(this.shown, isGroup(thing) ? thing.parent : thing.group);
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
    this.change(group, () => (this.shown.open.has(group) ? this.shown.close(group) : this.shown.add(group)));
  }

  // Show what is unchanged in an open group, too, or leave it out.
  toggleWhole(group) {
    this.change(group, () => this.shown.whole.delete(group) || this.shown.whole.add(group));
  }

  change(group, act) {
    const key = `g${group.index}`;
    const before = this.panes.querySelector(`[data-key="${key}"]`)?.getBoundingClientRect();
    act();
    makeRoom(this.shown, group);
    this.arrange();
    this.draw();
    const after = this.panes.querySelector(`[data-key="${key}"]`)?.getBoundingClientRect();
    if (before && after) {
      for (const pane of this.panes.children) {
        pane.scrollBy(after.left - before.left, after.top - before.top);
      }
    }
  }

  setOpen(shown) {
    this.shown = shown;
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
    const picture = new Picture(this.scene, BOTH, null);
    const items = [...descend(this.scene.root)].filter((item) => item !== this.scene.root && picture.isShown(item));
    const from = this.selected && this.scene.itemOf(this.selected);
    this.selectItem(from ? nextBox(items, from, key) : items[0]);
  }

  selectItem(item) {
    if (item) {
      this.select(item.place ?? item.group);
    }
  }

  // The zoom at which all is seen.
  fitting() {
    const width = this.panes.clientWidth / (this.view === "sides" ? 2 : 1);
    const { w, h } = this.scene.root;
    return Math.min(width / (w + 26), this.panes.clientHeight / (h + 26));
  }

  // Larger or smaller, while what is `at` a point of the window, the middle by default, stays there.
  setZoom(zoom, at) {
    const frame = this.panes.firstChild.getBoundingClientRect();
    const [x, y] = at ? [at.x - frame.x, at.y - frame.y] : [frame.width / 2, frame.height / 2];
    const corner = () => this.panes.querySelector(".ad-picture")?.getBoundingClientRect() ?? frame;
    const [old, was] = [this.zoom, corner()];
    this.zoom = clamp(zoom, ...ZOOM);
    this.draw();
    const [scale, is] = [this.zoom / old, corner()];
    const drift = (now, before, after, edge) => (now - before + edge) * scale - (now - after + edge);
    for (const pane of this.panes.children) {
      pane.scrollBy(drift(x, was.x, is.x, frame.x), drift(y, was.y, is.y, frame.y));
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
    return (name[0] === "g" ? this.step.groups : this.book.places)[Number(name.slice(1))];
  }

  setTheme() {
    const { dataset } = document.documentElement;
    const isDark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    dataset.theme = isDark ? "light" : "dark";
  }
}

// The pictures as the state has them: strip, object, paste, context, elsewhere, matches. Methods of App.

import { h, keyed, plural, setText } from "./elements.js";
import { Mask } from "./masks.js";
import { ROLES, Surface } from "./surface.js";

export const pictures = {
  updateStrip() {
    const s = this.state;
    const pixels = new Surface(this).pixels(this.liked.tile);
    keyed(this.strip, s.strip.numbers, (n) => n, (n) => this.makeTile(n), (view, n) => {
      view.surface.show(this.client.picture(this.weights(), n, pixels));
      this.drawStripOverlay(view.surface);
      const roles = [];
      if (s.object?.image === n) roles.push("object");
      if (s.paste?.image === n) roles.push("paste");
      if (s.context.some((c) => c.image === n)) roles.push("context");
      if (s.protect.some((p) => p.image === n)) roles.push("protect");
      const painted = this.painted?.image === n;
      keyed(view.badges, roles, (role) => role, (role) => ({ el: h("span", { class: `badge ${role}` }, role) }), () => {});
      view.surface.box.setAttribute("aria-label", [`Picture ${this.nameOf(n)}`, ...roles, painted ? "selected" : null].filter(Boolean).join(", "));
      view.el.classList.toggle("painted", painted);
    });
    const painted = s.painted;
    const small = painted?.islands?.slice(1) ?? [];
    const text = painted && small.length && !this.local ? `The selection has ${small.length + 1} separate regions (${[painted.islands[0], ...small].slice(0, 5).join(", ")} pixels). Stray ones steer the edit too.` : "";
    if (text !== this.saidIslands && text) this.say(text);
    this.saidIslands = text;
    this.tools.dataset.islands = small.length ? small.length + 1 : "";
    this.islandNote ??= this.tools.appendChild(h("span", { class: "hint islands" }));
    setText(this.islandNote, small.length ? `${small.length + 1} separate regions` : "");
    this.islandNote.title = text;
  },

  /** A picture's number, or the name of one that was brought as a latent. */
  nameOf(number) {
    return this.state.brought?.find((b) => b.number === number)?.name ?? String(number);
  },

  makeTile(n) {
    const surface = new Surface(this);
    surface.number = n;
    const badges = h("span", { class: "badges" });
    this.paintable(surface, () => (this.painted?.image === n ? this.painted.mask : null), (mask) => this.commitPainted(n, mask), true);
    return { el: h("figure", { class: "tile", "data-number": n }, surface.box, badges, h("figcaption", {}, this.nameOf(n))), surface, badges };
  },

  drawStripOverlay(surface) {
    const s = this.state;
    const n = surface.number;
    const layers = [];
    if (s.matches?.on) {
      const mask = s.matches.ready ? this.outline(n) : null;
      if (mask) layers.push({ mask, color: "#ffffff", line: "white", outside: 0.5 });
    } else {
      for (const [role, list] of [["protect", s.protect], ["context", s.context], ["paste", [s.paste]], ["object", [s.object]]]) {
        for (const entry of list) {
          const mask = entry?.image === n && this.client.mask(entry.hash);
          if (mask) layers.push({ mask, color: ROLES[role], key: entry.hash, fill: role === "protect" ? 0.25 : 0 });
        }
      }
    }
    const painted = this.painted;
    if (painted?.image === n) layers.push({ mask: painted.mask, color: ROLES.painted, fill: this.liked.opacity, line: "white" });
    const still = !painted || painted.image !== n || !(this.stroke || this.local);
    surface.draw(layers, [], still ? JSON.stringify([layers.map((l) => [l.color, l.key ?? 0, l.fill]), s.painted?.image === n && s.painted, s.matches?.on && [this.matchKey(), this.outlines.has(n)], this.size]) : null);
  },

  updatePanel() {
    const s = this.state;
    const place = (surface, entry) => {
      surface.section.classList.toggle("has", !!entry);
      surface.frame.hidden = !entry;
      surface.hint.hidden = !!entry;
      if (!entry) surface.clear();
      else setText(surface.caption, this.nameOf(entry.image));
    };
    place(this.object, s.object);
    place(this.paste, s.paste);
    if (s.object) {
      if (this.object.number !== s.object.image) this.object.clear();
      this.object.number = s.object.image;
      this.object.show(this.client.picture(s.weights.original, s.object.image, this.object.pixels(160)));
      const mask = this.stroke?.surface === this.object ? this.stroke.mask : (this.objectLocal?.mask ?? this.client.mask(s.object.hash));
      if (mask) this.object.draw([{ mask, color: ROLES.object, outside: 0.62, line: "white" }], [], this.stroke || this.objectLocal ? null : s.object.hash);
    }
    if (s.paste) {
      if (this.paste.number !== s.paste.image) this.paste.clear();
      this.paste.number = s.paste.image;
      this.showLive(this.paste, "paste", s.paste.image, 160);
      this.drawLanding(this.paste, s.paste, ROLES.paste);
    }
    const small = 76;
    setText(this.contextHint, s.context.length ? `${plural(s.context.length, "picture")}; drag to nudge where the object lands.` : "Paint what the rule shall apply to, then Add to context. Several pictures make a better rule.");
    keyed(this.context, s.context, (c) => c.image, (c) => this.makeContext(c), (view, c) => {
      view.entry = c;
      view.el.classList.toggle("off", !c.on);
      if (!this.client.isAhead(`place ${c.image}`)) view.on.checked = c.on;
      view.surface.number = c.image;
      this.showLive(view.surface, "context", c.image, small);
      this.drawLanding(view.surface, c, ROLES.context, !c.on);
      setText(view.caption, this.nameOf(c.image));
      const warn = c.islands?.length > 1 ? `, ${c.islands.length} separate regions` : "";
      view.surface.box.setAttribute("aria-label", `Context picture ${c.image}${c.on ? "" : ", left out"}${warn}`);
      view.surface.box.title = `Picture ${c.image}${warn}: drag to nudge`;
    });
    this.protectSection.hidden = s.protect.length === 0;
    keyed(this.protect, s.protect, (p) => p.image, (p) => this.makeProtect(p), (view, p) => {
      view.surface.number = p.image;
      view.surface.show(this.client.picture(this.weights(), p.image, view.surface.pixels(small)));
      const mask = this.client.mask(p.hash);
      if (mask) view.surface.draw([{ mask, color: ROLES.protect, fill: 0.45 }], [], p.hash);
    });
  },

  /** The newest live pictures of this kind, perhaps of a moment ago; null while nothing is live. */
  livePreview(kind) {
    const live = this.state.live.key !== null || this.state.job;
    return live && this.state.shown === "edited" ? (this.previews[kind] ?? null) : null;
  },

  /** The live picture where there is one, else the picture as the weights have it. */
  showLive(surface, kind, number, shown) {
    const preview = this.livePreview(kind);
    const tile = preview?.tiles.get(number);
    const old = tile && preview.key !== this.state.live.key;
    surface.box.dataset.live = tile ? (old ? "old" : "now") : "none";
    surface.show(tile ?? this.client.picture(this.weights(), number, surface.pixels(shown)), old);
  },

  drawLanding(surface, entry, color, off = false) {
    let box = entry.box;
    let drag = this.drag?.surface === surface ? this.drag : null;
    const landed = this.landed?.surface === surface ? this.landed : null; // let go, and not in a state yet
    if (landed && (performance.now() > landed.until || (landed.dy === entry.dy && landed.dx === entry.dx))) this.landed = null;
    else drag ??= landed;
    if (drag && box) box = drag.box.map((v, i) => v + (i % 2 ? drag.dx - drag.from[1] : drag.dy - drag.from[0]));
    const own = !this.state.object && this.client.mask(entry.hash); // nothing lands yet: show what is selected there
    const layers = own ? [{ mask: own, color, fill: 0.2 }] : [];
    const boxes = !off && box && this.state.object ? [{ box, color, ghost: !!drag || (surface.box.dataset.live === "none" && !this.state.live.solved) }] : [];
    surface.draw(layers, boxes, drag ? null : JSON.stringify([entry, off, color, !!own, this.state.object?.hash, surface.box.dataset.live, this.state.live.solved, !!this.object.drawn, surface.box.clientWidth]));
  },

  /** The object itself, half seen through, where it is about to land. */
  drawGhost(context, [top, left, bottom, right], scale) {
    const { object } = this.state;
    const mask = object && this.client.mask(object.hash);
    if (!mask || !object.box || !this.object.drawn) return;
    const size = this.size;
    const cut = document.createElement("canvas");
    cut.width = cut.height = size;
    const pen = cut.getContext("2d");
    pen.drawImage(this.object.picture, 0, 0, size, size);
    const image = pen.getImageData(0, 0, size, size);
    for (let i = 0; i < mask.bits.length; i++) if (!mask.bits[i]) image.data[4 * i + 3] = 0;
    pen.putImageData(image, 0, 0);
    const [t, l, b, r] = object.box;
    context.globalAlpha = 0.75;
    context.drawImage(cut, l, t, r - l, b - t, left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
    context.globalAlpha = 1;
  },

  makeContext(entry) {
    const surface = new Surface(this);
    const view = { surface, entry };
    view.on = h("input", { type: "checkbox", "aria-label": `Object lands on picture ${entry.image}`, title: "The object lands here. Off: the picture stays in the context, without the object.", onchange: () => this.latest(`place ${entry.image}`, "place", { image: entry.image, on: view.on.checked }) });
    const cross = this.plain("×", `Remove picture ${entry.image} from the context`, () => this.act("remove", { what: "context", image: entry.image }), { class: "cross" });
    view.caption = h("span", { class: "caption" });
    this.draggable(surface, () => view.entry);
    view.el = h("div", { class: "thumb", "data-number": entry.image }, surface.box, view.on, view.caption, cross);
    return view;
  },

  makeProtect(entry) {
    const surface = new Surface(this, `Protected in picture ${entry.image}`);
    const cross = this.plain("×", `Protect picture ${entry.image} no longer`, () => this.act("remove", { what: "protect", image: entry.image }), { class: "cross" });
    return { surface, el: h("div", { class: "thumb", "data-number": entry.image }, surface.box, h("span", { class: "caption" }, String(entry.image)), cross) };
  },

  updateRow() {
    const numbers = this.state.live.row;
    this.footer.hidden = numbers.length === 0;
    keyed(this.row, numbers, (n) => n, (n) => {
      const surface = new Surface(this, `Picture ${n}, not in the context`);
      surface.number = n;
      return { surface, el: h("div", { class: "thumb", "data-number": n }, surface.box, h("span", { class: "caption" }, String(n))) };
    }, (view, n) => this.showLive(view.surface, "row", n, 92));
    const { error, note, solved } = this.state.live;
    const live = this.livePreview("row");
    const still = solved && this.state.shown === "edited" ? "What the edit does to pictures you did not touch" : "Pictures that are not in the context";
    const hint = error ? `No live pictures: ${error}` : live ? "Live: what the rule does to pictures you did not touch" : still;
    setText(this.rowHint, live && note ? `${hint}. ${note}` : hint);
  },

  matchKey() {
    const s = this.state;
    return JSON.stringify([s.query?.hash, s.painted?.hash, s.context.map((c) => c.hash), s.settings.layer, s.settings.quantile, this.weights()]);
  },

  /** Where this picture looks like the context; fetched for all pictures of the strip at once. */
  outline(number) {
    const key = this.matchKey();
    if (this.outlines.key !== key) {
      this.outlines = new Map();
      this.outlines.key = key;
      this.fetchOutlines(key, this.state.strip.numbers);
    } else if (!this.outlines.has(number) && !this.outlines.asked?.has(number)) {
      this.fetchOutlines(key, this.state.strip.numbers.filter((n) => !this.outlines.has(n)));
    }
    return this.outlines.get(number);
  },

  async fetchOutlines(key, numbers) {
    this.outlines.asked = new Set([...(this.outlines.asked ?? []), ...numbers]);
    try {
      for (let i = 0; i < numbers.length; i += 16) {
        const some = numbers.slice(i, i + 16);
        const done = await this.client.request({ type: "get", what: "outline", numbers: some, quantile: this.state.settings.quantile });
        if (this.outlines.key !== key) return;
        some.forEach((n, j) => this.outlines.set(n, Mask.unpack(this.size, done.buffers[j])));
        this.later();
      }
    } catch (error) {
      if (!error.lost && this.outlines.key === this.matchKey()) this.notice("error", error.message);
      this.later();
    }
  },
};

// What a hand does: painting, picking, moving. Methods of App.

import { clamp } from "./elements.js";
import { Mask } from "./masks.js";
import { STROKES } from "./words.js";

export const hands = {
  setTool(name) {
    this.tool = name;
    this.root.dataset.tool = name;
    for (const other of ["brush", "erase", "pick"]) this.controls.get(`tool-${other}`).setAttribute("aria-pressed", String(other === name));
    this.alike.hidden = name !== "pick"; // in the place of the brush's size: nothing else moves
    this.brushSize.hidden = name === "pick";
    this.hover?.();
  },

  /** base(): the mask a stroke begins with, or null. commit(mask): what to do with the result. */
  paintable(surface, base, commit, local = false) {
    const { box } = surface;
    const picks = () => local && this.tool === "pick";
    const erases = (event) => this.tool === "erase" || event.ctrlKey || event.altKey || event.metaKey || (event.buttons & 32) > 0;
    const ring = (event) => {
      this.hover = () => surface.moveRing(picks() ? null : surface.point(event), this.radius);
      this.hover();
    };
    box.tabIndex = 0;
    box.classList.add("paintable");
    box.addEventListener("pointerdown", (event) => {
      if ((event.button !== 0 && event.button !== 5) || this.stroke || !this.state) return;
      event.preventDefault();
      box.focus({ preventScroll: true });
      const [y, x] = surface.point(event);
      if (picks()) {
        this.pick(surface.number, y, x, event.shiftKey);
        return;
      }
      box.setPointerCapture(event.pointerId);
      const mask = base()?.copy() ?? new Mask(this.size);
      this.stroke = { surface, mask, local, on: !erases(event), last: [y, x], pointer: event.pointerId, commit };
      mask.segment(y, x, y, x, this.radius, this.stroke.on);
      this.later();
    });
    box.addEventListener("pointermove", (event) => {
      const stroke = this.stroke?.surface === surface && this.stroke.pointer === event.pointerId ? this.stroke : null;
      if (!stroke) {
        if (!this.stroke) ring(event);
        return;
      }
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length ? events : [event]) {
        const at = surface.point(each);
        stroke.mask.segment(...stroke.last, ...at, this.radius, stroke.on);
        stroke.last = at;
      }
      ring(event);
      this.later();
    });
    const end = (event, keep) => {
      const stroke = this.stroke;
      if (stroke?.surface !== surface || stroke.pointer !== event.pointerId) return;
      this.stroke = null;
      if (keep) commit(stroke.mask);
      this.later();
    };
    box.addEventListener("pointerup", (event) => end(event, true));
    box.addEventListener("pointercancel", (event) => end(event, false));
    box.addEventListener("pointerleave", () => {
      this.hover = null;
      surface.moveRing(null);
    });
    box.addEventListener("contextmenu", (event) => event.ctrlKey && event.preventDefault());
    box.addEventListener("blur", () => (surface.cursor = null, surface.moveRing(null)));
    box.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? this.size / 8 : Math.max(1, this.size / 64);
      const moves = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] };
      if (moves[event.key]) {
        surface.cursor = (surface.cursor ?? [this.size / 2, this.size / 2]).map((v, i) => clamp(v + moves[event.key][i], 0, this.size));
      } else if (event.key === " ") {
        surface.cursor ??= [this.size / 2, this.size / 2];
        const mask = base()?.copy() ?? new Mask(this.size);
        mask.segment(...surface.cursor, ...surface.cursor, this.radius, !erases(event));
        commit(mask);
        this.say(`${mask.pixels} pixels are selected.`);
      } else if (event.key === "Enter" && local && !event.ctrlKey && !event.metaKey) {
        surface.cursor ??= [this.size / 2, this.size / 2];
        this.pick(surface.number, ...surface.cursor, event.shiftKey);
      } else return;
      event.preventDefault();
      event.stopPropagation();
      surface.moveRing(surface.cursor, this.radius);
    });
  },

  /** A picture on which the place of the object is moved: by the pointer, or by arrows. entry(): as in the state. */
  draggable(surface, entry) {
    const { box } = surface;
    const send = (image, dy, dx) => this.latest(`move ${image}`, "move", { image, dy, dx });
    box.tabIndex = 0;
    box.classList.add("draggable");
    box.addEventListener("pointerdown", (event) => {
      const now = entry();
      if (event.button !== 0 || this.drag || !now?.box) return;
      event.preventDefault();
      box.focus({ preventScroll: true });
      box.setPointerCapture(event.pointerId);
      const from = [now.dy, now.dx];
      this.drag = { surface, image: now.image, box: now.box, from, start: surface.point(event), dy: now.dy, dx: now.dx, pointer: event.pointerId, cancel: () => send(now.image, ...from) };
    });
    box.addEventListener("pointermove", (event) => {
      const drag = this.drag;
      if (drag?.surface !== surface || drag.pointer !== event.pointerId) return;
      const [y, x] = surface.point(event);
      const dy = Math.round(drag.from[0] + y - drag.start[0]);
      const dx = Math.round(drag.from[1] + x - drag.start[1]);
      if (dy === drag.dy && dx === drag.dx) return;
      Object.assign(drag, { dy, dx, moved: true });
      send(drag.image, dy, dx);
      this.later();
    });
    const end = (event, keep) => {
      const drag = this.drag;
      if (drag?.surface !== surface || drag.pointer !== event.pointerId) return;
      if (!keep) drag.cancel();
      else this.landed = { ...drag, until: performance.now() + 1500 };
      this.drag = null;
      this.later();
    };
    box.addEventListener("pointerup", (event) => end(event, true));
    box.addEventListener("pointercancel", (event) => end(event, false));
    box.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 8 : 1;
      const move = { ArrowUp: [-step, 0], ArrowDown: [step, 0], ArrowLeft: [0, -step], ArrowRight: [0, step] }[event.key];
      const now = entry();
      if (!move || !now?.box) return;
      event.preventDefault();
      event.stopPropagation();
      // Keys may come faster than states: they add up from where the last one put it.
      const last = this.landed?.surface === surface && performance.now() < this.landed.until ? this.landed : now;
      const [dy, dx] = [last.dy + move[0], last.dx + move[1]];
      this.landed = { surface, box: now.box, from: [now.dy, now.dx], dy, dx, until: performance.now() + 1500 };
      send(now.image, dy, dx);
      this.later();
    });
  },

  async commitPainted(image, mask) {
    const local = { image, mask, pending: (this.local?.pending ?? 0) + 1 };
    this.local = local;
    this.later();
    const sent = performance.now();
    try {
      const done = await this.client.do("paint", { image }, [mask.pack()]);
      this.root.dataset.paintMs = (performance.now() - sent).toFixed(1);
      if (done.hash) this.client.keepMask(done.hash, mask);
      this.settled(local, done);
    } catch (error) {
      if (error.lost && this.local === local) this.unsent = () => this.commitPainted(image, mask); // sent again when there is a line
      else {
        this.settled(local, {});
        if (this.local === local) this.local = null; // refused: show what the session has
        this.notice("error", error.message);
      }
    }
  },

  settled(local, done) {
    const newest = this.local;
    if (!newest) return;
    newest.pending -= 1;
    // What is painted here is shown until a state that knows of it is: the next one, unless it came before the answer.
    if (newest === local) newest.revision = this.state.painted?.hash === done.hash ? 0 : this.state.revision + 1;
    this.later();
  },

  async commitObject(mask) {
    const local = (this.objectLocal = { mask });
    this.later();
    try {
      const done = await this.client.do("object_mask", {}, [mask.pack()]);
      if (done.hash) this.client.keepMask(done.hash, mask);
    } catch (error) {
      this.notice("error", error.message);
    }
    if (this.objectLocal === local) this.objectLocal = null;
    this.object.signature = null;
    this.later();
  },

  clearPainted() {
    const image = this.painted?.image ?? this.state.painted?.image;
    if (image !== undefined) this.commitPainted(image, new Mask(this.size));
  },

  pick(image, y, x, add) {
    this.picked = { image, y: clamp(Math.floor(y), 0, this.size - 1), x: clamp(Math.floor(x), 0, this.size - 1), add };
    this.pickAgain();
  },

  pickAgain() {
    if (this.picked && this.tool === "pick" && this.state) this.latest("click", "click", { ...this.picked, alike: this.liked.alike });
  },

  escape() {
    if (this.stroke) {
      this.stroke = null; // the picture shows again what was painted before
    } else if (this.drag) {
      this.drag.cancel();
      this.drag = null;
    } else if (this.state.undo && STROKES.includes(this.state.undo)) {
      this.controls.get("undo").click();
    }
    this.later();
  },
};

// The front end of pyrewrite: one plain ES module for both hosts. A notebook's widget calls the default export's
// `render`; on the page the module mounts itself (last lines). Everything it shows is the session's state: it keeps
// nothing of its own but what a hand is doing at this moment, and how this person likes the interface.
//
//   parts: elements · masks · connections · Client (requests, pictures, masks) · Surface (a picture one can paint or
//   drag on) · App (the screen)

// ---------------------------------------------------------------------------------------------------- elements

/** A DOM element; `on...` are listeners, booleans are properties or flags, null children are left out. */
function h(tag, props = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) el.addEventListener(name.slice(2), value);
    else el.setAttribute(name, value === true ? "" : value);
  }
  el.append(...children.filter((child) => child !== null && child !== undefined));
  return el;
}

/** Make the children of `parent` match `items` by key, reusing what is there. */
function keyed(parent, items, key, make, update) {
  const have = parent.views ?? new Map();
  parent.views = new Map();
  items.forEach((item, i) => {
    const view = have.get(key(item)) ?? make(item);
    have.delete(key(item));
    parent.views.set(key(item), view);
    if (parent.children[i] !== view.el) parent.insertBefore(view.el, parent.children[i] ?? null);
    update(view, item);
  });
  for (const view of have.values()) view.el.remove();
}

const options = (choices) => h("select", {}, ...Object.entries(choices).map(([value, text]) => h("option", { value }, text)));
const setText = (el, text) => el.textContent !== text && (el.textContent = text);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const share = (x) => `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
const short = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : String(+x.toPrecision(3)));

// ------------------------------------------------------------------------------------------------------- masks

/** A binary mask in the picture's own pixels (size x size), whatever size the picture is shown at. */
export class Mask {
  constructor(size, bits = new Uint8Array(size * size)) {
    this.size = size;
    this.bits = bits;
  }

  /** From one bit a pixel, rows first, most significant bit first (numpy.packbits). */
  static unpack(size, bytes) {
    const bits = new Uint8Array(size * size);
    for (let i = 0; i < bits.length; i++) bits[i] = (bytes[i >> 3] >> (7 - (i & 7))) & 1;
    return new Mask(size, bits);
  }

  pack() {
    const bytes = new Uint8Array((this.bits.length + 7) >> 3);
    for (let i = 0; i < this.bits.length; i++) if (this.bits[i]) bytes[i >> 3] |= 128 >> (i & 7);
    return bytes;
  }

  copy() {
    return new Mask(this.size, this.bits.slice());
  }

  /** All pixels whose centre lies within `radius` of the segment become `on`. The points are y, x in pixels. */
  segment(y0, x0, y1, x1, radius, on) {
    const { size, bits } = this;
    const dy = y1 - y0;
    const dx = x1 - x0;
    const squared = dy * dy + dx * dx;
    const reach = Math.max(radius, 0.5);
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - reach));
    const bottom = Math.min(size - 1, Math.ceil(Math.max(y0, y1) + reach));
    const left = Math.max(0, Math.floor(Math.min(x0, x1) - reach));
    const right = Math.min(size - 1, Math.ceil(Math.max(x0, x1) + reach));
    for (let y = top; y <= bottom; y++) {
      for (let x = left; x <= right; x++) {
        const py = y + 0.5 - y0;
        const px = x + 0.5 - x0;
        const t = squared ? clamp((py * dy + px * dx) / squared, 0, 1) : 0;
        const ey = py - t * dy;
        const ex = px - t * dx;
        if (ey * ey + ex * ex <= reach * reach) bits[y * size + x] = on ? 1 : 0;
      }
    }
  }

  get pixels() {
    let count = 0;
    for (const bit of this.bits) count += bit;
    return count;
  }
}

// ------------------------------------------------------------------------------------------------- connections
// A connection: send(message, buffers) · onMessage(fn(message, buffers)) · onStatus(fn(status)) · close()
// status: "open" | "lost"; `refused` when trying again will not help.

export function frame(message, buffers = []) {
  const header = new TextEncoder().encode(JSON.stringify({ ...message, buffers: buffers.map((b) => b.byteLength) }));
  const bytes = new Uint8Array(4 + header.length + buffers.reduce((n, b) => n + b.byteLength, 0));
  new DataView(bytes.buffer).setUint32(0, header.length, true);
  bytes.set(header, 4);
  let start = 4 + header.length;
  for (const buffer of buffers) {
    bytes.set(new Uint8Array(buffer.buffer ?? buffer, buffer.byteOffset ?? 0, buffer.byteLength), start);
    start += buffer.byteLength;
  }
  return bytes;
}

export function unframe(data) {
  const length = new DataView(data).getUint32(0, true);
  const message = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let start = 4 + length;
  const buffers = message.buffers.map((size) => new Uint8Array(data, (start += size) - size, size));
  return [message, buffers];
}

/** The page's websocket, opened again whenever it is lost. */
export function socketConnection(address) {
  let socket = null;
  let receive = () => {};
  let status = () => {};
  let closed = false;
  let pause = 250; // ms; doubles up to 5 s while nobody answers
  const open = () => {
    socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      pause = 250;
      status("open");
    };
    socket.onmessage = (event) => receive(...unframe(event.data));
    socket.onclose = (event) => {
      if (closed) return;
      status("lost", event.reason);
      setTimeout(open, pause);
      pause = Math.min(5000, pause * 2);
    };
  };
  setTimeout(open, 0); // after the listeners are set
  return {
    kind: "page",
    send(message, buffers) {
      if (socket?.readyState !== WebSocket.OPEN) return false;
      socket.send(frame(message, buffers));
      return true;
    },
    onMessage: (fn) => (receive = fn),
    onStatus: (fn) => (status = fn),
    close() {
      closed = true;
      socket?.close();
    },
  };
}

/** A notebook's comm: custom messages of the widget's model. */
export function modelConnection(model) {
  let receive = () => {};
  const listen = (message, buffers) =>
    receive(message, (buffers ?? []).map((b) => new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength)));
  model.on("msg:custom", listen);
  return {
    kind: "widget",
    send(message, buffers = []) {
      try {
        model.send(message, undefined, buffers.map((b) => b.slice().buffer));
      } catch {
        // No kernel behind a saved notebook. Where a host is silent about it, too, the missing answer tells.
      }
      return true;
    },
    onMessage: (fn) => (receive = fn),
    onStatus: (fn) => setTimeout(() => fn("open"), 0),
    close: () => model.off("msg:custom", listen),
  };
}

// ------------------------------------------------------------------------------------------------------ client

const KEPT_PICTURES = 1500;
const KEPT_MASKS = 200;
const SHEET = 8; // pictures in one request: the first are seen while the others are being made
const SILENCE = 5000; // ms without any message while an answer is due, then we say so

/** Requests and their answers, and the two stores that are addressed by content: pictures and masks. */
class Client {
  constructor(connection, changed, told) {
    this.connection = connection;
    this.changed = changed; // something that is drawn is new
    this.told = told; // (kind, message, buffers) for all that is pushed
    this.prefix = Math.random().toString(36).slice(2, 8);
    this.count = 0;
    this.pending = new Map();
    this.latest = new Map();
    this.awaited = new Map(); // what `doLatest` has settled -> the revision that shows it
    this.state = null;
    this.pictures = new Map(); // "weights/number/size" -> {bitmap, x, y, size}
    this.masks = new Map(); // hash -> Mask
    this.asked = new Set(); // what is under way
    this.wanted = new Map(); // "weights/size" -> numbers, until the end of this turn
    this.heard = performance.now();
    connection.onMessage((message, buffers) => this.receive(message, buffers));
    connection.onStatus((status, reason) => this.onStatus(status, reason));
    this.timer = setInterval(() => this.listen(), 1000);
  }

  close() {
    clearInterval(this.timer);
    this.connection.close();
  }

  onStatus(status, reason) {
    this.open = status === "open";
    if (!this.open) {
      const error = Object.assign(new Error("the connection was lost"), { lost: true });
      for (const { reject } of this.pending.values()) reject(error);
      this.pending.clear();
      this.latest.clear();
      this.asked.clear();
    }
    this.told("status", { status, reason });
    if (this.open) this.request({ type: "get", what: "state" }).catch(() => {});
  }

  /** A kernel that is busy or gone does not say so: it is silent. */
  listen() {
    const now = performance.now();
    const due = [...this.pending.values()].some(({ since }) => now - since > SILENCE);
    this.told("silence", { silent: due && now - this.heard > SILENCE });
  }

  request(message, buffers = []) {
    const id = `${this.prefix}${++this.count}`;
    return new Promise((resolve, reject) => {
      if (!this.connection.send({ ...message, id }, buffers)) {
        reject(Object.assign(new Error("there is no connection at this moment"), { lost: true }));
        return;
      }
      this.pending.set(id, { resolve, reject, since: performance.now() });
    });
  }

  do(action, fields = {}, buffers = []) {
    return this.request({ type: "do", action, ...fields }, buffers);
  }

  /** Like `do`, for what changes faster than it is answered: one under way, and of those that wait the newest. */
  async doLatest(key, action, fields) {
    if (this.latest.has(key)) {
      this.latest.set(key, fields);
      return;
    }
    this.latest.set(key, null);
    let error = null;
    for (let next = fields; next; next = this.latest.get(key)) {
      this.latest.set(key, null);
      error = await this.do(action, next).then(() => null, (e) => e);
      if (error?.lost) break;
    }
    this.latest.delete(key);
    this.awaited.delete(key);
    if (error) throw error;
    this.awaited.set(key, this.state.revision + 1); // a state follows each answer that changes something
  }

  /** Whether a control is ahead of the state: what it says is on its way, and must not be set back meanwhile. */
  isAhead(key) {
    return this.latest.has(key) || this.state.revision < (this.awaited.get(key) ?? 0);
  }

  receive(message, buffers) {
    this.heard = performance.now();
    if (message.type === "done" || message.type === "error") {
      const waiting = this.pending.get(message.id);
      if (!waiting) {
        if (message.type === "error" && message.id === undefined) this.told("notice", { level: "error", ...message });
        return; // another view's
      }
      this.pending.delete(message.id);
      if (message.type === "done") waiting.resolve({ ...message, buffers });
      else waiting.reject(new Error(message.message));
    } else if (message.type === "state") {
      if (this.state && this.state.revision > message.revision) return;
      this.state = message;
      this.changed();
    } else {
      this.told(message.type, message, buffers);
    }
  }

  /** The picture of these weights, or null and it is fetched. */
  picture(weights, number, size) {
    const key = `${weights}/${number}/${size}`;
    const found = this.pictures.get(key);
    if (found || this.asked.has(key)) return found ?? null;
    this.asked.add(key);
    const batch = `${weights}/${size}`;
    if (this.wanted.size === 0) queueMicrotask(() => this.fetchPictures());
    if (!this.wanted.has(batch)) this.wanted.set(batch, []);
    this.wanted.get(batch).push(number);
    return null;
  }

  fetchPictures() {
    for (const [batch, numbers] of this.wanted) {
      const [weights, size] = batch.split("/");
      for (let i = 0; i < numbers.length; i += SHEET) this.fetchSheet(weights, +size, numbers.slice(i, i + SHEET));
    }
    this.wanted.clear();
  }

  async fetchSheet(weights, size, numbers) {
    try {
      const answer = await this.request({ type: "get", what: "pictures", numbers, size, weights });
      const tiles = await cutSheet(answer, answer.buffers[0]);
      for (const [number, tile] of tiles) this.pictures.set(`${answer.weights}/${number}/${size}`, tile);
      for (const key of this.pictures.keys()) {
        if (this.pictures.size <= KEPT_PICTURES) break;
        this.pictures.delete(key);
      }
    } catch (error) {
      // Weights that were replaced while we asked: the state that names the new ones is on its way.
      const stale = this.state && ![this.state.weights.edited, this.state.weights.original].includes(weights);
      if (!error.lost && !stale) this.told("notice", { level: "error", message: `pictures: ${error.message}` });
      if (!error.lost) await new Promise((resolve) => setTimeout(resolve, 1500));
    }
    for (const number of numbers) this.asked.delete(`${weights}/${number}/${size}`);
    this.changed();
  }

  /** The mask of this hash, or null and it is fetched. */
  mask(hash) {
    if (!hash || !this.state) return null;
    const found = this.masks.get(hash);
    if (found || this.asked.has(hash)) return found ?? null;
    this.asked.add(hash);
    this.request({ type: "get", what: "mask", hash })
      .then(({ buffers }) => this.keepMask(hash, Mask.unpack(this.state.generator.image_size, buffers[0])))
      .catch((error) => {
        const gone = error.lost || !JSON.stringify(this.state).includes(hash); // replaced while we asked
        if (!gone) this.told("notice", { level: "error", message: `a mask: ${error.message}` });
      })
      .finally(() => this.asked.delete(hash));
    return null;
  }

  keepMask(hash, mask) {
    this.masks.set(hash, mask);
    for (const key of this.masks.keys()) {
      if (this.masks.size <= KEPT_MASKS) break;
      this.masks.delete(key);
    }
    this.changed();
  }
}

/** [[number, {bitmap, x, y, size, weights}], ...] of a sprite sheet: tiles row by row, `columns` a row. */
async function cutSheet({ numbers, size, columns, media, weights }, bytes) {
  if (!numbers.length) return [];
  const bitmap = await createImageBitmap(new Blob([bytes], { type: media ?? "image/png" }));
  return numbers.map((number, i) => [number, { bitmap, x: (i % columns) * size, y: Math.floor(i / columns) * size, size, weights }]);
}

// ----------------------------------------------------------------------------------------------------- surface

const ROLES = { painted: "#2e7dff", object: "#2e7dff", paste: "#e5484d", context: "#17a065", protect: "#e09b00" };
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** One picture with an overlay. `paint` or `drag` (see App) make it answer the pointer and the keyboard. */
class Surface {
  constructor(app, label) {
    this.app = app;
    this.number = null;
    this.picture = h("canvas", { class: "picture" });
    this.overlay = h("canvas", { class: "overlay" });
    this.ring = h("div", { class: "ring" });
    this.box = h("div", { class: "surface", tabindex: "0", role: "img", "aria-label": label ?? "" }, this.picture, this.overlay, this.ring);
    this.drawn = null;
    this.cursor = null; // y, x of the keyboard's brush
  }

  get size() {
    return this.app.size;
  }

  /** Pixels to ask a picture in: what the screen shows, never more than there are, in few steps so that stores hit. */
  pixels(shown) {
    const wanted = shown * (window.devicePixelRatio || 1);
    return Math.min(this.size, [64, 96, 128, 192, 256, 384, 512, 768].find((step) => step >= wanted * 0.95) ?? 1024);
  }

  /** Draw a picture from a sheet; the one before stays until there is one. */
  show(tile, old = false) {
    this.box.classList.toggle("old", old && !!this.drawn);
    this.box.classList.toggle("empty", !tile && !this.drawn);
    if (!tile || this.drawn === tile) return;
    this.drawn = tile;
    this.picture.width = this.picture.height = tile.size;
    this.picture.getContext("2d").drawImage(tile.bitmap, tile.x, tile.y, tile.size, tile.size, 0, 0, tile.size, tile.size);
    this.box.dataset.drawn = tile.weights;
  }

  clear() {
    this.drawn = null;
    this.picture.width = 0;
    this.box.classList.add("empty");
    delete this.box.dataset.drawn;
  }

  /** A picture's y, x in its own pixels under the pointer, whatever the zoom, the scroll and the screen's density. */
  point(event) {
    const rect = this.picture.getBoundingClientRect();
    return [
      ((event.clientY - rect.top) / rect.height) * this.size,
      ((event.clientX - rect.left) / rect.width) * this.size,
    ];
  }

  /** layers: [{mask, color, fill (0..1), line}] and boxes: [{box, color}]; nothing is redrawn while it stays as it is. */
  draw(layers, boxes = [], signature = null) {
    if (signature !== null && signature === this.signature) return;
    this.signature = signature;
    const size = Math.min(this.size, 512);
    const canvas = this.overlay;
    if (layers.length + boxes.length === 0) {
      canvas.width = canvas.height = 0;
      return;
    }
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    if (layers.length) {
      const image = context.createImageData(size, size);
      for (const layer of layers) fillMask(image, layer);
      context.putImageData(image, 0, 0);
    }
    const scale = size / this.size;
    const line = (1.6 * size) / (this.box.clientWidth || size);
    for (const { box, color, ghost } of boxes) {
      if (ghost) this.app.drawGhost(context, box, scale);
      const [top, left, bottom, right] = box.map((v) => v * scale);
      context.lineWidth = 2 * line;
      context.strokeStyle = "rgba(255,255,255,.75)";
      context.strokeRect(left, top, right - left, bottom - top);
      context.lineWidth = line;
      context.strokeStyle = color;
      context.strokeRect(left, top, right - left, bottom - top);
    }
  }

  moveRing(point, radius) {
    this.ring.hidden = !point;
    if (!point) return;
    const percent = (v) => `${(100 * v) / this.size}%`;
    Object.assign(this.ring.style, { top: percent(point[0]), left: percent(point[1]), width: percent(2 * radius), height: percent(2 * radius) });
  }
}

/** One mask onto image data: see-through inside, a light and a coloured line along its edge. `outside`: shade that. */
function fillMask(image, { mask, color, fill = 0, line = true, outside = 0 }) {
  const size = image.width;
  const scale = mask.size / size;
  const [r, g, b] = rgb(color);
  const at = (y, x) => y >= 0 && x >= 0 && y < size && x < size && mask.bits[Math.floor(y * scale) * mask.size + Math.floor(x * scale)];
  const edge = Math.max(1, Math.round(size / 160));
  const put = (i, red, green, blue, alpha) => {
    image.data[i] = red;
    image.data[i + 1] = green;
    image.data[i + 2] = blue;
    image.data[i + 3] = alpha;
  };
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const i = 4 * (y * size + x);
      if (!at(y, x)) {
        if (outside) put(i, 0, 0, 0, 255 * outside);
      } else if (line && !(at(y - edge, x) && at(y + edge, x) && at(y, x - edge) && at(y, x + edge))) {
        put(i, ...(line === "white" ? [255, 255, 255] : [r, g, b]), 255);
      } else if (fill) {
        put(i, r, g, b, 255 * fill);
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------------- app

const REMEMBERED = { brush: 0.04, opacity: 0.45, tile: 136, alike: 0.6 };
const ERASING = { units: "silence units (published)", zero: "zero the directions (closed form)" };
const SLIDERS = [
  ["rank", "Rank", "Number of directions that may change. More hold a rule better; one is what was published."],
  ["preserve", "Preserve", "How much change elsewhere costs. More keeps the rest of the picture as it was."],
  ["shrinkage", "Shrinkage", "Between directions that single out the context (0) and the plain mean (large)."],
  ["strength", "Strength", "How much of a new edit is applied: 0 is the original, 1 the edit."],
];
const MORE = [
  ["margin", "Margin", "Pixels of the layer's map around the object that must stay as they are."],
  ["steps", "Steps", "Steps of the optimisation that Execute runs."],
  ["lr", "Learning rate", "Size of a step."],
  ["project_every", "Project every", "Steps between two projections (method: projected)."],
  ["protect_rank", "Protect rank", "Number of directions that stand for what is protected."],
  ["units", "Erase units", "How many units Erase silences."],
  ["quantile", "Match above", "Context matches: the share of all pixels below the outline."],
];
const CHOICES = {
  method: { low_rank: "low rank", projected: "projected (published)", least_squares: "least squares (closed form)" },
  targets: { context: "paste and context", paste: "paste only (published)" },
  key_method: { zca: "whitened (zca)", mean: "mean", svd: "svd", gandissect: "units (gandissect)" },
  weighting: { box: "whole box", alpha: "object's shape" },
};
const CHOICE_NAMES = { method: "Method", targets: "Targets", key_method: "Directions", weighting: "Weighting" };
const KEYS = [
  ["[  ]", "smaller, larger brush"],
  ["B, E, W", "brush, eraser, pick by click"],
  ["Ctrl, Alt or ⌘ + stroke", "erase (also a pen's eraser)"],
  ["Shift + click", "pick: add to the selection"],
  ["Esc", "give up the stroke or the drag; else undo the last stroke"],
  ["C, V, A", "copy object, paste, add to context"],
  ["P, Q", "protect, match selection"],
  ["F, M", "search by context, show context matches"],
  ["Ctrl + Enter", "execute"],
  ["T", "original and edited"],
  ["Ctrl + Z, Ctrl + Y", "undo, redo (everything)"],
  ["Ctrl + S", "save"],
  ["+  −", "larger, smaller pictures"],
  ["arrows, Space, Enter", "on a focused picture: move the brush, paint, pick; on a thumbnail: nudge"],
  ["?", "this sheet"],
];

const STROKES = ["paint", "select", "clear the mask", "the object's mask"]; // what the session calls them in `undo`

class App {
  constructor(root, connection) {
    this.root = root;
    this.kind = connection.kind;
    this.liked = { ...REMEMBERED, ...read() };
    this.tool = "brush";
    this.previews = {}; // kind -> {key, tiles}
    this.arrivals = {}; // kind -> count, so that an old picture that decodes late is dropped
    this.outlines = new Map();
    this.stroke = null;
    this.drag = null;
    this.local = null; // {image, mask, pending, revision}: painted here, not yet in a state
    this.controls = new Map();
    this.cleanups = [];
    this.build();
    this.client = new Client(connection, () => this.later(), (...told) => this.hear(...told));
    this.followTheme();
    this.listenToKeys();
  }

  get state() {
    return this.client?.state ?? null;
  }

  get size() {
    return this.state?.generator.image_size ?? 256;
  }

  /** What has the focus; within a host's shadow root the document only knows that it is somewhere in there. */
  get focused() {
    return this.root.getRootNode().activeElement;
  }

  get radius() {
    return Math.max(0.5, this.liked.brush * this.size);
  }

  // ------------------------------------------------------------------------------------------- what is on screen

  build() {
    const button = (action, text, title, run, extra = {}) => this.button(action, text, title, run, extra);
    this.banner = h("div", { class: "banner", role: "alert", hidden: true });
    this.notices = h("div", { class: "notices" });
    this.spoken = h("div", { class: "unseen", role: "status", "aria-live": "polite" });
    this.title = h("span", { class: "generator" });
    this.numbers = h("input", { type: "text", name: "numbers", "aria-label": "Picture numbers, such as 0-8,12,200-212", spellcheck: "false", autocomplete: "off" });
    const strip = h("form", { class: "numbers", onsubmit: (e) => (e.preventDefault(), this.showNumbers(this.numbers.value)) },
      h("span", { "aria-hidden": "true" }, "Pictures"),
      this.plain("‹", "The pictures before these", () => this.page(-1)), this.numbers, this.plain("›", "The pictures after these", () => this.page(1)),
      h("button", { type: "submit" }, "Show"));
    this.shown = ["original", "edited"].map((which) =>
      h("button", { type: "button", "aria-pressed": "false", title: "T changes between the two", onclick: () => this.act("toggle", { shown: which }) }, which[0].toUpperCase() + which.slice(1)));
    this.header = h("header", {}, h("strong", { class: "brand" }, "pyrewrite"), this.title, strip,
      this.liking("tile", "Picture size", 72, 512, 8, "Size of the pictures ( + and − )"), h("span", { class: "space" }),
      h("span", { class: "switch", role: "group", "aria-label": "Which weights the pictures show" }, ...this.shown),
      button("undo", "↶", "Undo", () => this.act("undo"), { "aria-label": "Undo" }), button("redo", "↷", "Redo", () => this.act("redo"), { "aria-label": "Redo" }),
      this.fileMenu(), this.plain("?", "Help and keyboard shortcuts (?)", () => this.help(), { "aria-label": "Help" }));

    const tool = (name, text, title) => {
      const el = h("button", { type: "button", "data-tool": name, "aria-pressed": "false", title, onclick: () => this.setTool(name) }, text);
      this.controls.set(`tool-${name}`, el);
      return el;
    };
    this.alike = this.liking("alike", "Alike", 0, 1, 0.01, "How alike a pixel must be to belong to the picked region", () => this.pickAgain());
    this.tools = h("div", { class: "tools", role: "toolbar", "aria-label": "Selection" },
      h("span", { class: "switch", role: "group", "aria-label": "Tool" }, tool("brush", "Brush", "Paint a selection (B). Ctrl erases."), tool("erase", "Erase", "Take away from the selection (E)"), tool("pick", "Pick", "Click an object to select it (W). Shift adds.")),
      this.liking("brush", "Size", 0.004, 0.2, 0.002, "Size of the brush ( [ and ] )"), this.alike,
      this.liking("opacity", "Mask", 0, 0.9, 0.05, "How much the mask hides what is under it"),
      h("span", { class: "rule" }),
      button("copy", "Copy", "Copy the selection as the object (C)", () => this.act("copy")),
      button("paste", "Paste", "Paste the object over the selection (V)", () => this.act("paste")),
      button("add_context", "Add to context", "The rule shall hold where things look like the selection (A)", () => this.act("add_context")),
      button("protect", "Protect", "What is selected must not change (P)", () => this.act("protect")),
      button("clear", "Clear", "Clear the selection", () => this.clearPainted()),
      h("span", { class: "rule" }),
      button("match_selection", "Match", "Show the pictures that look most like the selection (Q)", () => this.act("match_selection", {}, () => this.find())),
      button("search", "Search", "Show the pictures that look most like the context (F)", () => this.find()),
      button("matches", "Matches", "Outline where the pictures look like the context (M)", () => this.toggleMatches(), { "aria-pressed": "false" }));

    this.strip = h("main", { class: "strip", "aria-label": "Pictures" });
    this.object = this.editable("object", "The object: what is copied", "Paint a selection on a picture, then Copy.");
    this.paste = this.editable("paste", "The paste: drag to move the object", "Paint where it should go, then Paste.");
    this.context = h("div", { class: "thumbs" });
    this.protect = h("div", { class: "thumbs" });
    this.edits = h("ol", { class: "edits" });
    this.overlap = h("p", { class: "hint" });
    this.layer = h("select", { "aria-label": "Layer", onchange: () => this.latest("set layer", "set", { layer: this.layer.value }) });
    this.hints = h("div", { class: "hints" });
    this.more = h("details", { class: "more" }, h("summary", {}, "More settings"), ...Object.keys(CHOICES).map((name) => this.choice(name)), ...MORE.map((s) => this.slider(...s)),
      this.select("Erase by", this.erasing = options(ERASING)));
    this.bar = h("progress", { max: "1", value: "0", "aria-label": "Progress" });
    this.working = h("span", { class: "hint" });
    this.job = h("div", { class: "job", hidden: true }, this.bar, this.working);
    this.cancel = button("cancel", "Cancel", "Stop; everything stays as it was", () => this.act("cancel"));
    const section = (name, title, ...rest) => h("section", { "aria-label": title, class: name }, h("h2", {}, title), ...rest);
    this.contextHint = h("p", { class: "hint" });
    this.protectSection = section("protects", "Protected", this.protect);
    this.editsSection = section("stack", "Edits", this.edits, this.overlap, button("revert", "Revert all", "Take all edits off; Undo brings them back", () => this.act("revert")));
    this.panel = h("aside", { class: "panel", "aria-label": "The edit" },
      h("div", { class: "scroll" },
        h("div", { class: "pair" }, this.object.section, this.paste.section),
        section("contexts", "Context", this.contextHint, this.context), this.protectSection,
        section("rules", "Rule", h("div", { class: "field" }, h("label", {}, "Layer"), this.layer, button("hint", "Which?", "Which layer fits the selection?", () => this.hint())), this.hints, ...SLIDERS.map((s) => this.slider(...s)), this.more),
        this.editsSection),
      h("div", { class: "execute" }, this.job, h("div", { class: "buttons" },
        button("execute", "Execute", "Change the rule (Ctrl + Enter)", () => this.act("execute", {}, (done) => this.showReport(done)), { class: "primary" }),
        button("erase", "Erase", "Remove what the context shows", () => this.act("erase", { method: this.erasing.value }, (done) => this.showReport(done))), this.cancel)));
    this.row = h("div", { class: "thumbs" });
    this.rowHint = h("p", { class: "hint" });
    this.footer = h("footer", { class: "row", "aria-label": "Pictures outside the context" }, h("div", {}, h("h2", {}, "Elsewhere"), this.rowHint), this.row);
    this.root.classList.add("pyrewrite");
    this.root.dataset.host = this.kind;
    // JupyterLab acts on keys (x cuts the cell) unless what has the focus, itself, says that its keys are its own.
    const keep = (el) => el.setAttribute("data-lm-suppress-shortcuts", "true");
    keep(this.root);
    this.root.addEventListener("focusin", (event) => keep(event.target));
    this.root.tabIndex = -1;
    this.frame = h("div", { class: "frame" }, this.header, this.tools, this.strip, this.footer, this.panel);
    this.root.replaceChildren(this.banner, this.frame, this.notices, this.spoken);
    this.setTool("brush");
    this.applyLiked();
  }

  /** A button of an action of the session. Off, it stays readable and says why. */
  button(action, text, title, run, extra = {}) {
    const el = h("button", { type: "button", "data-action": action, title, ...extra, onclick: () => {
      // A key may be faster than the next frame, and while something is under way (C, then V at once) what is allowed
      // is about to change: the session decides.
      if (this.state) this.updateButtons();
      if (el.getAttribute("aria-disabled") === "true" && !this.client.pending.size) this.notice("info", el.title);
      else run();
    } }, text);
    el.about = title;
    this.controls.set(action, el);
    return el;
  }

  plain(text, title, run, extra = {}) {
    return h("button", { type: "button", class: "plain", title, "aria-label": extra["aria-label"] ?? title, onclick: run, ...extra }, text);
  }

  /** A slider of something that this person likes: remembered here, unknown to the session. */
  liking(name, text, min, max, step, title, changed = () => {}) {
    const input = h("input", { type: "range", name, min, max, step, title, oninput: () => {
      this.liked[name] = +input.value;
      this.applyLiked();
      changed();
    } });
    input.value = this.liked[name];
    this.controls.set(`like-${name}`, input);
    return h("label", { class: `like ${name}`, title }, h("span", {}, text), input);
  }

  applyLiked() {
    this.root.style.setProperty("--tile", `${this.liked.tile}px`);
    for (const name of Object.keys(REMEMBERED)) {
      const input = this.controls.get(`like-${name}`);
      if (input && +input.value !== this.liked[name]) input.value = this.liked[name];
    }
    write(this.liked);
    if (this.hover) this.hover();
    this.later();
  }

  /** A slider of a setting of the session, with a number beside it. */
  slider(name, text, title) {
    const range = h("input", { type: "range", name, "aria-label": text, title });
    const number = h("input", { type: "number", name: `${name}-number`, "aria-label": `${text}, as a number`, step: "any" });
    const view = { range, number, busy: false };
    const send = (value) => this.latest(`set ${name}`, "set", { [name]: value });
    range.addEventListener("input", () => {
      view.busy = true;
      const value = this.fromRange(name, +range.value);
      number.value = short(value);
      send(value);
    });
    range.addEventListener("change", () => {
      view.busy = false;
      send(this.fromRange(name, +range.value));
    });
    number.addEventListener("change", () => {
      if (number.value !== "" && Number.isFinite(+number.value)) send(this.whole(name) ? Math.round(+number.value) : +number.value);
      else this.later();
    });
    this.controls.set(`set-${name}`, view);
    return (view.el = h("div", { class: "field", title }, h("label", {}, text), range, number));
  }

  whole(name) {
    const [min, , step] = this.state?.ranges?.[name] ?? [0, 1, 0.01];
    return Number.isInteger(step) && Number.isInteger(min);
  }

  /** A range's position (0..1000) to the setting's value and back; logarithmic ones begin at their least step. */
  fromRange(name, position) {
    const [min, max, step, log] = this.state?.ranges?.[name] ?? [0, 1, 0.01];
    if (log) {
      if (position <= 0) return min;
      const low = Math.max(min, step);
      return +(low * (max / low) ** (position / 1000)).toPrecision(this.whole(name) ? 12 : 3) + 0 || min;
    }
    return +(Math.round((min + ((max - min) * position) / 1000) / step) * step).toPrecision(12);
  }

  toRange(name, value) {
    const [min, max, step, log] = this.state?.ranges?.[name] ?? [0, 1, 0.01];
    if (!log) return (1000 * (value - min)) / (max - min);
    const low = Math.max(min, step);
    return value <= min && min < low ? 0 : (1000 * Math.log(value / low)) / Math.log(max / low);
  }

  choice(name) {
    const select = options(CHOICES[name]);
    select.addEventListener("change", () => this.latest(`set ${name}`, "set", { [name]: select.value }));
    this.controls.set(`set-${name}`, { select });
    return this.select(CHOICE_NAMES[name], select);
  }

  select(text, select) {
    select.setAttribute("aria-label", text);
    return h("div", { class: "field" }, h("label", {}, text), select);
  }

  fileMenu() {
    const item = (action, text, title, run) => this.button(action, text, title, () => ((menu.open = false), run()), { role: "menuitem" });
    const download = (kind, text, title) => item(kind, text, title, () => this.download("download", { kind }));
    this.file = h("input", { type: "file", hidden: true, "aria-label": "A file to upload", onchange: () => this.upload() });
    const menu = h("details", { class: "menu" }, h("summary", { title: "Save, load, download" }, "File"), h("div", { role: "menu" },
      item("new", "New", "Begin again; Undo brings this back", () => this.act("new")), item("save", "Save…", "Save this edit by name (Ctrl + S)", () => this.save()),
      item("load", "Load…", "Load a saved edit", () => this.load()), item("gallery", "Ready edits…", "Edits that come with this generator", () => this.gallery()),
      item("upload", "Open a file…", "An edit (.json), a patch (.safetensors), or a latent (.npy)", () => this.file.click()), h("hr"),
      download("patch", "Download patch", "The change of the weights, .safetensors"), download("edit", "Download edit", "The record, .json: the official tool reads it too"),
      download("checkpoint", "Download checkpoint", "The generator with all active edits merged"), download("sheet", "Download before and after", "A sheet of pictures, .png"),
      item("snapshot", "Snapshot", "These pictures, before and after, .png", () => this.download("snapshot", {}))), this.file);
    const leave = (event) => !event.composedPath().includes(menu) && (menu.open = false);
    document.addEventListener("pointerdown", leave);
    this.cleanups.push(() => document.removeEventListener("pointerdown", leave));
    menu.addEventListener("keydown", (e) => {
      if (e.key === "Escape" && menu.open) (e.stopPropagation(), (menu.open = false), menu.firstElementChild.focus());
    });
    return menu;
  }

  /** Object and paste: a picture of the panel with a title, a hint while empty, and a cross to remove it. */
  editable(what, title, hint) {
    const surface = new Surface(this, title);
    surface.hint = h("p", { class: "hint" }, hint);
    surface.cross = this.plain("×", `Remove the ${what}`, () => this.act("remove", { what }), { class: "cross" });
    surface.caption = h("span", { class: "caption" });
    const frame = h("div", { class: "card" }, surface.box, surface.caption, surface.cross);
    surface.frame = frame;
    surface.section = h("section", { class: what, "aria-label": title }, h("h2", {}, what === "object" ? "Object" : "Paste"), surface.hint, frame);
    if (what === "object") this.paintable(surface, () => this.client.mask(this.state.object?.hash), (mask) => this.commitObject(mask));
    else this.draggable(surface, () => this.state.paste && { image: null, ...this.state.paste });
    return surface;
  }

  // ------------------------------------------------------------------------------------------------------ drawing

  later() {
    if (this.due) return;
    this.due = true;
    const run = () => {
      this.due = false;
      if (this.state) this.update();
    };
    if (document.hidden) setTimeout(run, 50); // no frames are drawn for a page in the background
    else requestAnimationFrame(run);
  }

  update() {
    const s = this.state;
    setText(this.title, `${s.generator.name} · ${s.generator.family} · ${s.generator.image_size} px`);
    if (this.focused !== this.numbers && this.numbers.value !== s.strip.text) this.numbers.value = s.strip.text;
    this.shown.forEach((el, i) => el.setAttribute("aria-pressed", String(s.shown === ["original", "edited"][i])));
    this.settleLocal();
    if (s.live.key === null) this.previews = {};
    this.updateButtons();
    this.updateSettings();
    this.updateStrip();
    this.updatePanel();
    this.updateEdits();
    this.updateRow();
    this.updateJob();
    this.root.dataset.ready = "true";
    this.root.dataset.revision = s.revision;
    this.root.dataset.weights = this.weights();
  }

  /** What is painted here counts until a state knows it. */
  settleLocal() {
    const { local, state } = this;
    if (local && !local.pending && !this.stroke && state.revision >= (local.revision ?? 0)) this.local = null;
  }

  get painted() {
    if (this.stroke && this.stroke.local) return { image: this.stroke.surface.number, mask: this.stroke.mask };
    if (this.local) return this.local.mask ? this.local : null;
    const painted = this.state.painted;
    const mask = painted && this.client.mask(painted.hash);
    return mask ? { image: painted.image, mask } : null;
  }

  updateButtons() {
    const can = { ...this.state.can, ...downloads(this.state.can), clear: this.painted || this.state.painted ? true : "nothing is selected", upload: true };
    if (this.stroke || this.local) for (const name of ["copy", "add_context", "protect", "match_selection"]) can[name] = true;
    for (const [action, el] of this.controls) {
      if (!el.dataset?.action) continue;
      const allowed = this.client.open === false ? "there is no connection at this moment" : (can[action] ?? true);
      el.setAttribute("aria-disabled", String(allowed !== true));
      let title = allowed === true ? el.about : `${el.about} — not now: ${allowed}`;
      if ((action === "undo" || action === "redo") && this.state[action]) title = `${el.about}: ${this.state[action]}`;
      if (el.title !== title) el.title = title;
    }
    this.controls.get("matches").setAttribute("aria-pressed", String(!!this.state.matches?.on));
  }

  updateSettings() {
    const { settings, generator, ranges } = this.state;
    const names = generator.layers.map((layer) => layer.name).join();
    if (this.layer.dataset.names !== names) {
      this.layer.dataset.names = names;
      this.layer.replaceChildren(...generator.layers.map((l) => h("option", { value: l.name }, `${l.name} · ${l.resolution}×${l.resolution}`)));
    }
    if (this.layer.value !== settings.layer && !this.client.isAhead("set layer")) this.layer.value = settings.layer;
    for (const [name, view] of this.controls) {
      if (!name.startsWith("set-")) continue;
      const key = name.slice(4);
      if (view.select) {
        if (view.select.value !== settings[key] && !this.client.isAhead(`set ${key}`)) view.select.value = settings[key];
        continue;
      }
      view.el.hidden = settings[key] === undefined;
      if (view.busy || settings[key] === undefined || this.client.isAhead(`set ${key}`)) continue;
      const [min, max] = ranges?.[key] ?? [0, 1];
      Object.assign(view.range, { min: 0, max: 1000, step: 1 });
      const at = String(Math.round(clamp(this.toRange(key, settings[key]), 0, 1000)));
      if (view.range.value !== at) view.range.value = at;
      view.range.setAttribute("aria-valuetext", short(settings[key]));
      Object.assign(view.number, { min, max });
      if (this.focused !== view.number && view.number.value !== short(settings[key])) view.number.value = short(settings[key]);
    }
  }

  weights() {
    return this.state.weights[this.state.shown] ?? this.state.weights.edited;
  }

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
  }

  /** A picture's number, or the name of one that was brought as a latent. */
  nameOf(number) {
    return this.state.brought?.find((b) => b.number === number)?.name ?? String(number);
  }

  makeTile(n) {
    const surface = new Surface(this);
    surface.number = n;
    const badges = h("span", { class: "badges" });
    this.paintable(surface, () => (this.painted?.image === n ? this.painted.mask : null), (mask) => this.commitPainted(n, mask), true);
    return { el: h("figure", { class: "tile", "data-number": n }, surface.box, badges, h("figcaption", {}, this.nameOf(n))), surface, badges };
  }

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
  }

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
  }

  /** The newest live pictures of this kind, perhaps of a moment ago; null while nothing is live. */
  livePreview(kind) {
    return this.state.live.key !== null && this.state.shown === "edited" ? (this.previews[kind] ?? null) : null;
  }

  /** The live picture where there is one, else the picture as the weights have it. */
  showLive(surface, kind, number, shown) {
    const preview = this.livePreview(kind);
    const tile = preview?.tiles.get(number);
    const old = tile && preview.key !== this.state.live.key;
    surface.box.dataset.live = tile ? (old ? "old" : "now") : "none";
    surface.show(tile ?? this.client.picture(this.weights(), number, surface.pixels(shown)), old);
  }

  drawLanding(surface, entry, color, off = false) {
    let box = entry.box;
    let drag = this.drag?.surface === surface ? this.drag : null;
    const landed = this.landed?.surface === surface ? this.landed : null; // let go, and not in a state yet
    if (landed && (performance.now() > landed.until || (landed.dy === entry.dy && landed.dx === entry.dx))) this.landed = null;
    else drag ??= landed;
    if (drag && box) box = drag.box.map((v, i) => v + (i % 2 ? drag.dx - drag.from[1] : drag.dy - drag.from[0]));
    const own = !this.state.object && this.client.mask(entry.hash); // nothing lands yet: show what is selected there
    const layers = own ? [{ mask: own, color, fill: 0.2 }] : [];
    const boxes = !off && box && this.state.object ? [{ box, color, ghost: !!drag || surface.box.dataset.live === "none" }] : [];
    surface.draw(layers, boxes, drag ? null : JSON.stringify([entry, off, color, !!own, this.state.object?.hash, surface.box.dataset.live, !!this.object.drawn, surface.box.clientWidth]));
  }

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
  }

  makeContext(entry) {
    const surface = new Surface(this);
    const view = { surface, entry };
    view.on = h("input", { type: "checkbox", "aria-label": `Object lands on picture ${entry.image}`, title: "The object lands here. Off: the picture stays in the context, without the object.", onchange: () => this.latest(`place ${entry.image}`, "place", { image: entry.image, on: view.on.checked }) });
    const cross = this.plain("×", `Remove picture ${entry.image} from the context`, () => this.act("remove", { what: "context", image: entry.image }), { class: "cross" });
    view.caption = h("span", { class: "caption" });
    this.draggable(surface, () => view.entry);
    view.el = h("div", { class: "thumb", "data-number": entry.image }, surface.box, view.on, view.caption, cross);
    return view;
  }

  makeProtect(entry) {
    const surface = new Surface(this, `Protected in picture ${entry.image}`);
    const cross = this.plain("×", `Protect picture ${entry.image} no longer`, () => this.act("remove", { what: "protect", image: entry.image }), { class: "cross" });
    return { surface, el: h("div", { class: "thumb", "data-number": entry.image }, surface.box, h("span", { class: "caption" }, String(entry.image)), cross) };
  }

  updateRow() {
    const numbers = this.state.live.row;
    this.footer.hidden = numbers.length === 0;
    keyed(this.row, numbers, (n) => n, (n) => {
      const surface = new Surface(this, `Picture ${n}, not in the context`);
      surface.number = n;
      return { surface, el: h("div", { class: "thumb", "data-number": n }, surface.box, h("span", { class: "caption" }, String(n))) };
    }, (view, n) => this.showLive(view.surface, "row", n, 92));
    const { error, note } = this.state.live;
    const live = this.livePreview("row");
    const hint = error ? `No live pictures: ${error}` : live ? "Live: what the rule does to pictures you did not touch" : "Pictures that are not in the context";
    setText(this.rowHint, live && note ? `${hint}. ${note}` : hint);
  }

  updateEdits() {
    const { edits, overlap } = this.state;
    this.editsSection.hidden = edits.length === 0;
    keyed(this.edits, edits, (e) => e.id, (e) => this.makeEdit(e), (view, e) => {
      if (!this.client.isAhead(`on ${e.id}`)) view.on.checked = e.on;
      view.el.classList.toggle("off", !e.on);
      if (this.focused !== view.name) view.name.value = e.name;
      setText(view.about, [e.layer, e.rank && `rank ${e.rank}`, e.seconds && `${e.seconds.toFixed(1)} s`].filter(Boolean).join(" · "));
      if (!view.busy && !this.client.isAhead(`strength ${e.id}`) && +view.strength.value !== e.strength) view.strength.value = e.strength;
      setText(view.value, short(+view.strength.value));
      setText(view.report, describe(e.report));
      const warnings = [...new Set([e.warning, ...(e.report?.warnings ?? [])].filter(Boolean))];
      setText(view.warning, warnings.join(" "));
      view.warning.hidden = warnings.length === 0;
      const at = edits.findIndex((x) => x.id === e.id);
      view.up.disabled = at === 0;
      view.down.disabled = at === edits.length - 1;
    });
    const worst = [];
    (overlap ?? []).forEach((line, i) => line.forEach((v, j) => j > i && v > 0.1 && worst.push([v, edits[i], edits[j]])));
    worst.sort((a, b) => b[0] - a[0]);
    setText(this.overlap, worst.length ? `“${worst[0][1]?.name}” and “${worst[0][2]?.name}” overlap by ${share(worst[0][0])}: they may weaken each other.` : "");
  }

  makeEdit(edit) {
    const { id } = edit;
    const stack = (fields) => this.act("stack", { edit: id, ...fields });
    const view = { busy: false };
    view.on = h("input", { type: "checkbox", "aria-label": "This edit is on", title: "On or off", onchange: () => this.latest(`on ${id}`, "stack", { edit: id, on: view.on.checked }) });
    view.name = h("input", { type: "text", class: "name", "aria-label": "Name of the edit", maxlength: "64", spellcheck: "false", onchange: () => stack({ name: view.name.value }) });
    view.strength = h("input", { type: "range", min: "0", max: "2", step: "0.05", "aria-label": "Strength of this edit", oninput: () => {
      view.busy = true;
      setText(view.value, short(+view.strength.value));
      this.latest(`strength ${id}`, "stack", { edit: id, strength: +view.strength.value });
    }, onchange: () => {
      view.busy = false;
      this.latest(`strength ${id}`, "stack", { edit: id, strength: +view.strength.value });
    } });
    view.value = h("output", {});
    view.about = h("span", { class: "hint" });
    view.report = h("p", { class: "report" });
    view.warning = h("p", { class: "warning" });
    const shift = (by) => {
      const order = this.state.edits.map((e) => e.id);
      const at = order.indexOf(id);
      order.splice(at + by, 0, ...order.splice(at, 1));
      this.act("stack", { order });
    };
    view.up = this.plain("↑", "Earlier in the order", () => shift(-1));
    view.down = this.plain("↓", "Later in the order", () => shift(1));
    const get = this.plain("⤓", "Download this patch, .safetensors", () => this.download("download", { kind: "patch", edit: id }));
    const cross = this.plain("×", "Take this edit off", () => this.act("stack", { remove: id }));
    view.el = h("li", { "data-edit": id }, h("div", { class: "line" }, view.on, view.name, view.up, view.down, get, cross),
      h("div", { class: "line" }, view.about, h("label", { class: "like" }, h("span", {}, "Strength"), view.strength), view.value), view.report, view.warning);
    return view;
  }

  updateJob() {
    const job = this.state.job;
    const statistics = this.state.statistics;
    const collecting = !job && !statistics.ready && statistics.of > 0;
    this.job.hidden = !job && !collecting;
    this.cancel.hidden = !job;
    this.root.dataset.job = job ? job.kind : "";
    if (job) {
      const { step = 0, steps, loss, label } = job;
      if (steps) this.bar.value = step / steps;
      else this.bar.removeAttribute("value");
      setText(this.working, [label ?? job.kind, steps && `step ${step} of ${steps}`, Number.isFinite(loss) && `loss ${loss.toFixed(4)}`].filter(Boolean).join(" · "));
    } else if (collecting) {
      this.bar.value = statistics.done / statistics.of;
      setText(this.working, `Statistics of ${statistics.layer} · ${statistics.done} of ${statistics.of} pictures`);
    }
  }

  // --------------------------------------------------------------------------------------------- painting, moving

  setTool(name) {
    this.tool = name;
    this.root.dataset.tool = name;
    for (const other of ["brush", "erase", "pick"]) this.controls.get(`tool-${other}`).setAttribute("aria-pressed", String(other === name));
    this.alike.hidden = name !== "pick";
    this.hover?.();
  }

  /** base(): the mask a stroke begins with, or null. commit(mask): what to do with the result. */
  paintable(surface, base, commit, local = false) {
    const { box } = surface;
    const picks = () => local && this.tool === "pick";
    const erases = (event) => this.tool === "erase" || event.ctrlKey || event.altKey || event.metaKey || (event.buttons & 32) > 0;
    const ring = (event) => {
      this.hover = () => surface.moveRing(picks() ? null : surface.point(event), this.radius);
      this.hover();
    };
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
      } else if (event.key === "Enter" && local && !event.ctrlKey && !event.metaKey) {
        surface.cursor ??= [this.size / 2, this.size / 2];
        this.pick(surface.number, ...surface.cursor, event.shiftKey);
      } else return;
      event.preventDefault();
      event.stopPropagation();
      surface.moveRing(surface.cursor, this.radius);
    });
  }

  /** A picture on which the place of the object is moved: by the pointer, or by arrows. entry(): as in the state. */
  draggable(surface, entry) {
    const { box } = surface;
    const send = (image, dy, dx) => this.latest(`move ${image}`, "move", { image, dy, dx });
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
  }

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
  }

  settled(local, done) {
    const newest = this.local;
    if (!newest) return;
    newest.pending -= 1;
    // What is painted here is shown until a state that knows of it is: the next one, unless it came before the answer.
    if (newest === local) newest.revision = this.state.painted?.hash === done.hash ? 0 : this.state.revision + 1;
    this.later();
  }

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
  }

  clearPainted() {
    const image = this.painted?.image ?? this.state.painted?.image;
    if (image !== undefined) this.commitPainted(image, new Mask(this.size));
  }

  pick(image, y, x, add) {
    this.picked = { image, y: clamp(Math.floor(y), 0, this.size - 1), x: clamp(Math.floor(x), 0, this.size - 1), add };
    this.pickAgain();
  }

  pickAgain() {
    if (this.picked && this.tool === "pick" && this.state) this.latest("click", "click", { ...this.picked, alike: this.liked.alike });
  }

  // ---------------------------------------------------------------------------------------------- acts and answers

  async act(action, fields = {}, then = null) {
    try {
      const done = await this.client.do(action, fields);
      then?.(done);
      return done;
    } catch (error) {
      this.notice("error", error.message);
      this.later(); // controls show again what holds
      return null;
    }
  }

  latest(key, action, fields) {
    return this.client.doLatest(key, action, fields).catch((error) => {
      if (!error.lost) this.notice("error", error.message);
      this.later();
    });
  }

  showNumbers(text) {
    return this.act("strip", { text }, () => this.strip.scrollTo(0, 0));
  }

  /** As many pictures as are shown now, those that answer most to the query or the context. */
  find() {
    const k = clamp(this.state.strip.numbers.length, 1, 128);
    return this.act("search", { k }, (done) => {
      this.strip.scrollTo(0, 0);
      this.say(`Found ${plural(done.numbers.length, "picture")}.`);
    });
  }

  /** What an edit did, where it can be seen and heard. */
  showReport({ report }) {
    this.update();
    this.editsSection.scrollIntoView({ block: "nearest" });
    this.say(describe(report));
  }

  page(by) {
    if (!this.state) return;
    const numbers = this.state.strip.numbers.filter((n) => n < this.state.generator.samples); // without brought ones
    if (!numbers.length) numbers.push(0);
    const count = numbers.length;
    const least = Math.min(...numbers);
    const start = by > 0 ? Math.max(...numbers) + 1 : Math.max(0, least - count);
    this.showNumbers(`${start}-${start + count - 1}`);
  }

  async hear(kind, message, buffers) {
    if (kind === "notice") this.notice(message.level, message.message);
    else if (kind === "progress") this.hearProgress(message);
    else if (kind === "preview") await this.hearPreview(message, buffers);
    else if (kind === "status") this.hearStatus(message);
    else if (kind === "silence" && this.kind === "widget") this.bannerText(message.silent ? "No answer from the kernel: it runs a cell, or it has stopped. If it was started again, run the cell above again." : "");
  }

  hearStatus({ status, reason }) {
    this.root.dataset.status = status;
    if (status === "open") {
      if (this.banner.textContent) this.say("Connected again.");
      this.bannerText("");
      const again = this.unsent;
      this.unsent = null;
      again?.();
    } else {
      this.bannerText(`The connection was lost${reason ? ` (${reason})` : ""}. Trying again… What the session knows is safe.`);
    }
    this.later();
  }

  bannerText(text) {
    this.banner.hidden = !text;
    setText(this.banner, text);
  }

  hearProgress(message) {
    if (!this.state) return;
    if ("job" in message) this.state.job = message.job;
    if (message.statistics) this.state.statistics = message.statistics;
    this.updateJob();
  }

  async hearPreview(message, buffers) {
    const { kind } = message;
    const arrival = (this.arrivals[kind] = (this.arrivals[kind] ?? 0) + 1);
    const tiles = await cutSheet(message, buffers[0]);
    if (arrival !== this.arrivals[kind]) return;
    this.previews[kind] = { key: message.key, tiles: new Map(tiles) };
    this.root.dataset[`live${kind}`] = message.key;
    this.later();
  }

  say(text) {
    this.spoken.textContent = text;
  }

  notice(level, text) {
    const same = [...this.notices.children].find((el) => el.firstChild.textContent === text);
    same?.remove();
    const el = h("div", { class: `notice ${level}`, role: level === "error" ? "alert" : "status" }, h("span", {}, text), this.plain("×", "Dismiss", () => el.remove()));
    this.notices.append(el);
    while (this.notices.children.length > 4) this.notices.firstChild.remove();
    if (level === "info") setTimeout(() => el.remove(), 6000);
  }

  // ------------------------------------------------------------------------------------------- matches, hint, files

  toggleMatches() {
    const { matches, settings } = this.state;
    this.act("matches", { on: !matches?.on, quantile: settings.quantile });
  }

  matchKey() {
    const s = this.state;
    return JSON.stringify([s.query?.hash, s.painted?.hash, s.context.map((c) => c.hash), s.settings.layer, s.settings.quantile, this.weights()]);
  }

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
  }

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
  }

  async hint() {
    const done = await this.act("hint");
    if (!done) return;
    const layers = done.layers ?? [];
    const best = Math.max(...layers.map((l) => l.score), 1e-9);
    this.hints.replaceChildren(...layers.slice(0, 4).map((l) => h("button", { type: "button", class: "suggestion", title: "Take this layer", onclick: () => (this.hints.replaceChildren(), this.act("set", { layer: l.layer })) },
      h("strong", {}, l.layer), h("meter", { min: "0", max: "1", value: String(clamp(l.score / best, 0, 1)), "aria-label": `fits ${share(l.score / best)} as well as the best` }), h("span", {}, l.why))));
    this.say(layers.length ? `Best layer: ${layers[0].layer}. ${layers[0].why}` : "No layer stands out.");
  }

  async download(action, fields) {
    const done = await this.act(action, fields);
    if (!done) return;
    const address = URL.createObjectURL(new Blob(done.buffers, { type: done.media ?? "application/octet-stream" }));
    h("a", { href: address, download: done.filename ?? "snapshot.png" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
    this.say(`Downloaded ${done.filename ?? "the snapshot"}.`);
  }

  async upload() {
    const [file] = this.file.files;
    this.file.value = "";
    if (!file) return;
    const kind = { json: "edit", safetensors: "patch", npy: "latent" }[file.name.split(".").pop().toLowerCase()];
    const limit = (kind === "edit" ? 8 : 64) * 2 ** 20;
    if (!kind) this.notice("error", `${file.name}: expected an edit (.json), a patch (.safetensors), or a latent (.npy)`);
    else if (file.size > limit) this.notice("error", `${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MiB; at most ${limit / 2 ** 20} are taken`);
    else {
      const bytes = new Uint8Array(await file.arrayBuffer());
      await this.client.do("upload", { kind, name: file.name }, [bytes]).then(() => this.say(`Opened ${file.name}.`), (error) => this.notice("error", error.message));
    }
  }

  dialog(title, ...children) {
    const back = this.focused;
    const dialog = h("dialog", { "aria-label": title }, h("form", { method: "dialog" }, h("h2", {}, title), ...children));
    dialog.addEventListener("close", () => {
      dialog.remove();
      back?.focus?.({ preventScroll: true });
    });
    dialog.addEventListener("keydown", (event) => event.stopPropagation());
    this.root.append(dialog);
    dialog.showModal();
    return dialog;
  }

  async names() {
    return (await this.client.request({ type: "get", what: "files" })).names ?? [];
  }

  async save() {
    const names = await this.names().catch(() => []);
    const list = h("datalist", { id: `names-${this.client.prefix}` }, ...names.map((value) => h("option", { value })));
    const name = h("input", { type: "text", name: "name", required: true, maxlength: "64", pattern: "[A-Za-z0-9][A-Za-z0-9 _.\\-]*", list: list.id, title: "Letters, digits, spaces, and _ . -", "aria-label": "Name", autocomplete: "off" });
    name.value = this.savedName ?? "";
    const about = h("p", { class: "hint" }, "Kept in the session's folder as NAME.json; the official tool reads it too.");
    name.addEventListener("input", () => setText(about, names.includes(name.value.trim()) ? "This name exists: saving replaces it." : "Kept in the session's folder as NAME.json; the official tool reads it too."));
    const dialog = this.dialog("Save this edit", name, list, about, h("div", { class: "buttons" }, h("button", { type: "submit", value: "save", class: "primary" }, "Save"), h("button", { type: "submit", value: "", formnovalidate: true }, "Cancel")));
    dialog.addEventListener("close", () => {
      if (dialog.returnValue !== "save") return;
      this.act("save", { name: name.value.trim() }, () => {
        this.savedName = name.value.trim();
        this.notice("info", `Saved as ${this.savedName}.`);
      });
    });
  }

  async load() {
    const names = await this.names().catch((error) => (this.notice("error", error.message), null));
    if (!names) return;
    const dialog = this.dialog("Load an edit", h("div", { class: "list" }, ...names.map((name) => h("button", { type: "submit", value: name }, name))),
      names.length ? null : h("p", { class: "hint" }, "Nothing is saved yet. File › Open takes a file from this computer."), h("div", { class: "buttons" }, h("button", { type: "submit", value: "" }, "Cancel")));
    dialog.addEventListener("close", () => dialog.returnValue && this.act("load", { name: dialog.returnValue }, () => (this.savedName = dialog.returnValue)));
  }

  async gallery() {
    const done = await this.client.request({ type: "get", what: "gallery" }).catch((error) => (this.notice("error", error.message), null));
    if (!done) return;
    const entries = done.gallery;
    const dialog = this.dialog("Ready edits", h("p", { class: "hint" }, entries.length ? "One click solves it and adds it to the edits." : "None come with this generator."),
      h("div", { class: "list" }, ...entries.map((e) => h("div", { class: "line" }, h("button", { type: "submit", value: `apply ${e.name}`, title: `A rule of ${e.layer}` }, e.title),
        h("button", { type: "submit", value: `load ${e.name}`, class: "selections", title: "Load what was painted for it, to see how it is made or to change it" }, "Selections")))),
      h("div", { class: "buttons" }, h("button", { type: "submit", value: "" }, "Cancel")));
    dialog.addEventListener("close", () => {
      const [, field, name] = dialog.returnValue.match(/^(\w+) (.*)/) ?? [];
      if (name) this.act("gallery", { [field]: name });
    });
  }

  help() {
    this.dialog("How it works", h("ol", {}, ...[
      "Paint a thing on a picture (or pick it by a click) and Copy it: that is the object.",
      "Paint where it belongs on another picture and Paste. The red box shows where it lands; drag it.",
      "Paint the places that shall get it on a few more pictures and Add to context.",
      "Watch the row at the bottom: pictures you did not touch, as the rule would draw them. Execute refines and applies it.",
    ].map((text) => h("li", {}, text))),
    h("p", {}, "Your own picture? Pictures come from the generator, by number; a photograph cannot be edited directly. A latent in W or W+ that another tool found for it (.npy) can be opened: File › Open a file."),
    h("table", {}, h("tbody", {}, ...KEYS.map(([key, text]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, key)), h("td", {}, text))))),
    h("div", { class: "buttons" }, h("button", { type: "submit", class: "primary" }, "Close")));
  }

  // -------------------------------------------------------------------------------------------------- keys, theme

  listenToKeys() {
    const target = this.kind === "page" ? document : this.root;
    const pressed = (event) => {
      this.key(event);
      if (this.kind === "widget") event.stopPropagation(); // a notebook would take the focus, and Enter with it
    };
    target.addEventListener("keydown", pressed);
    this.cleanups.push(() => target.removeEventListener("keydown", pressed));
  }

  key(event) {
    const writing = event.target.closest?.("input:not([type=range]):not([type=checkbox]), select, textarea, dialog");
    if (event.defaultPrevented || !this.state) return;
    const control = event.ctrlKey || event.metaKey;
    const press = (action) => () => this.controls.get(action).click();
    const brush = (by) => () => {
      this.liked.brush = clamp(this.liked.brush * by, 0.004, 0.2);
      this.applyLiked();
    };
    const tile = (by) => () => {
      this.liked.tile = clamp(this.liked.tile + by, 72, 512);
      this.applyLiked();
    };
    const plain = {
      "[": brush(1 / 1.25), "]": brush(1.25), "+": tile(24), "=": tile(24), "-": tile(-24), "?": () => this.help(),
      b: () => this.setTool("brush"), e: () => this.setTool("erase"), w: () => this.setTool("pick"),
      c: press("copy"), v: press("paste"), a: press("add_context"), p: press("protect"), q: press("match_selection"), f: press("search"), m: press("matches"),
      t: () => this.act("toggle", { shown: this.state.shown === "edited" ? "original" : "edited" }),
      Escape: () => this.escape(),
    };
    const controlled = { z: press(event.shiftKey ? "redo" : "undo"), y: press("redo"), s: press("save"), Enter: press("execute") };
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const run = control ? controlled[name] : event.altKey || writing ? null : plain[name];
    if (!run || (writing && name !== "Enter" && name !== "s")) return;
    event.preventDefault();
    event.stopPropagation();
    run();
  }

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
  }

  followTheme() {
    const system = window.matchMedia("(prefers-color-scheme: dark)");
    const apply = () => (this.root.dataset.theme = hostIsDark(system.matches) ? "dark" : "light");
    const watcher = new MutationObserver(apply);
    for (const el of [document.body, document.documentElement]) watcher.observe(el, { attributes: true, attributeFilter: ["class", "theme", "data-jp-theme-light", "data-theme", "data-vscode-theme-kind"] });
    system.addEventListener("change", apply);
    const resize = () => this.later();
    window.addEventListener("resize", resize);
    this.cleanups.push(() => (watcher.disconnect(), system.removeEventListener("change", apply), window.removeEventListener("resize", resize)));
    apply();
  }

  close() {
    this.client.close();
    for (const clean of this.cleanups) clean();
  }
}

/** What the host says of its theme: JupyterLab, VS Code, marimo, Colab; else the system's wish. */
function hostIsDark(system) {
  const { body, documentElement: top } = document;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  const editor = body.className.match(/vscode-(light|high-contrast-light|dark|high-contrast)/g);
  if (editor) return !editor.some((name) => name.endsWith("light"));
  for (const el of [top, body]) {
    const said = el.dataset.theme ?? el.getAttribute("theme");
    if (el.classList.contains("dark") || said === "dark") return true;
    if (el.classList.contains("light") || said === "light") return false;
  }
  return system;
}

/** One permission of the session for four buttons; a record can always be taken home once there is something in it. */
const downloads = (can) => ({ patch: can.download, checkpoint: can.download, sheet: can.download, edit: can.save });

/** A report as one line a person can read. */
function describe(report) {
  if (!report) return "";
  const parts = [];
  if (Number.isFinite(report.loss_before)) parts.push(`Loss ${report.loss_before.toFixed(3)} → ${report.loss_after.toFixed(3)}`);
  const targets = report.targets?.length;
  if (Number.isFinite(report.context_changed) && targets) parts.push(`changed in ${Math.round(report.context_changed * targets)} of ${targets} context pictures`);
  if (Number.isFinite(report.change_elsewhere)) parts.push(`other pictures change by ${share(report.change_elsewhere)}`);
  if (report.protected) parts.push(`what is protected changes by ${share(report.protected.change)}`);
  if (Number.isFinite(report.relative_size)) parts.push(`size ${share(report.relative_size)} of the weights`);
  return parts.join(" · ");
}

function read() {
  try {
    const found = JSON.parse(localStorage.getItem("pyrewrite") ?? "{}");
    return Object.fromEntries(Object.entries(found).filter(([name, value]) => name in REMEMBERED && Number.isFinite(value)));
  } catch {
    return {}; // a host that forbids storage, or something else's entry
  }
}

function write(liked) {
  try {
    localStorage.setItem("pyrewrite", JSON.stringify(liked));
  } catch {
    // not remembered then
  }
}

// ------------------------------------------------------------------------------------------------------- hosts

export function mount(root, connection) {
  const app = new App(root, connection);
  return () => app.close();
}

export default {
  render({ model, el }) {
    const root = document.createElement("div");
    el.append(root);
    return mount(root, modelConnection(model));
  },
};

const page = typeof document === "undefined" ? null : document.getElementById("pyrewrite-page");
if (page) mount(page, socketConnection(new URL("socket", location.href.replace(/^http/, "ws").replace(/[?#].*/, "")).href));

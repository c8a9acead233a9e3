// Requests and their answers, and what is addressed by content: pictures and masks.

import { Mask } from "./masks.js";

const KEPT_PICTURES = 1500;
const KEPT_MASKS = 200;
const SHEET = 8; // pictures in one request: the first are seen while the others are being made
const SILENCE = 5000; // ms without any message while an answer is due, then we say so

/** Requests and their answers, and the two stores that are addressed by content: pictures and masks. */
export class Client {
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
export async function cutSheet({ numbers, size, columns, media, weights }, bytes) {
  if (!numbers.length) return [];
  const bitmap = await createImageBitmap(new Blob([bytes], { type: media ?? "image/png" }));
  return numbers.map((number, i) => [number, { bitmap, x: (i % columns) * size, y: Math.floor(i / columns) * size, size, weights }]);
}

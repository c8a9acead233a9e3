// One picture on the screen, with what is drawn over it.

import { h } from "./elements.js";
import { fillMask } from "./masks.js";

export const ROLES = { painted: "#2e7dff", object: "#2e7dff", paste: "#e5484d", context: "#17a065", protect: "#e09b00" };

/** One picture with an overlay. `paint` or `drag` (see App) make it answer the pointer and the keyboard. */
export class Surface {
  constructor(app, label) {
    this.app = app;
    this.number = null;
    this.picture = h("canvas", { class: "picture" });
    this.overlay = h("canvas", { class: "overlay" });
    this.ring = h("div", { class: "ring" });
    this.box = h("div", { class: "surface", role: "img", "aria-label": label ?? "" }, this.picture, this.overlay, this.ring);
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
    this.box.classList.toggle("old", (old || !tile) && !!this.drawn);
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

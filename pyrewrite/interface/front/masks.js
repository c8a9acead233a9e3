// Masks in the picture's own pixels, and how they are drawn.

import { clamp } from "./elements.js";

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

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** One mask onto image data: see-through inside, a light and a coloured line along its edge. `outside`: shade that. */
export function fillMask(image, { mask, color, fill = 0, line = true, outside = 0 }) {
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

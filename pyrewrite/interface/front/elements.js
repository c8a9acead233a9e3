// Elements of the page, and words for numbers.

/** A DOM element; `on...` are listeners, booleans are properties or flags, null children are left out. */
export function h(tag, props = {}, ...children) {
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
export function keyed(parent, items, key, make, update) {
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

export const options = (choices) => h("select", {}, ...Object.entries(choices).map(([value, text]) => h("option", { value }, text)));
export const setText = (el, text) => el.textContent !== text && (el.textContent = text);
export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
export const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
export const share = (x) => `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`;
export const short = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : String(+x.toPrecision(3)));

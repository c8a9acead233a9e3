// The session's settings: sliders, numbers, choices. Methods of App.

import { clamp, h, options, short } from "./elements.js";
import { CHOICES, CHOICE_NAMES } from "./words.js";

export const settings = {
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
  },

  whole(name) {
    const [min, , step] = this.state?.ranges?.[name] ?? [0, 1, 0.01];
    return Number.isInteger(step) && Number.isInteger(min);
  },

  /** A range's position (0..1000) to the setting's value and back; logarithmic ones begin at their least step. */
  fromRange(name, position) {
    const [min, max, step, log] = this.state?.ranges?.[name] ?? [0, 1, 0.01];
    if (log) {
      if (position <= 0) return min;
      const low = Math.max(min, step);
      return +(low * (max / low) ** (position / 1000)).toPrecision(this.whole(name) ? 12 : 3) + 0 || min;
    }
    return +(Math.round((min + ((max - min) * position) / 1000) / step) * step).toPrecision(12);
  },

  toRange(name, value) {
    const [min, max, step, log] = this.state?.ranges?.[name] ?? [0, 1, 0.01];
    if (!log) return (1000 * (value - min)) / (max - min);
    const low = Math.max(min, step);
    return value <= min && min < low ? 0 : (1000 * Math.log(value / low)) / Math.log(max / low);
  },

  choice(name) {
    const select = options(CHOICES[name]);
    select.addEventListener("change", () => this.latest(`set ${name}`, "set", { [name]: select.value }));
    this.controls.set(`set-${name}`, { select });
    return this.select(CHOICE_NAMES[name], select);
  },

  select(text, select) {
    select.setAttribute("aria-label", text);
    return h("div", { class: "field" }, h("label", {}, text), select);
  },

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
  },
};

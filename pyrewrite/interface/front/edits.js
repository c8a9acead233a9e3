// The stack of edits, the running job, which layer fits. Methods of App.

import { clamp, h, keyed, setText, share, short } from "./elements.js";
import { describe, describeHint } from "./words.js";

export const edits = {
  updateEdits() {
    const { edits, overlap } = this.state;
    this.editsSection.hidden = edits.length === 0;
    keyed(this.edits, edits, (e) => e.id, (e) => this.makeEdit(e), (view, e) => {
      if (!this.client.isAhead(`on ${e.id}`)) view.on.checked = e.on;
      view.el.classList.toggle("off", !e.on);
      if (this.focused !== view.name) view.name.value = e.name;
      view.on.ariaLabel = `${e.name} is on`;
      view.strength.ariaLabel = `Strength of ${e.name}`;
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
  },

  makeEdit(edit) {
    const { id } = edit;
    const stack = (fields) => this.act("stack", { edit: id, ...fields });
    const view = { busy: false };
    view.on = h("input", { type: "checkbox", title: "On or off", onchange: () => this.latest(`on ${id}`, "stack", { edit: id, on: view.on.checked }) });
    view.name = h("input", { type: "text", class: "name", "aria-label": "Name of the edit", maxlength: "64", spellcheck: "false", onchange: () => stack({ name: view.name.value }) });
    view.strength = h("input", { type: "range", min: "0", max: "2", step: "0.05", oninput: () => {
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
  },

  updateJob() {
    const job = this.state.job;
    const statistics = this.state.statistics;
    const collecting = !job && !statistics.ready && statistics.of > 0;
    this.job.hidden = !job && !collecting;
    this.cancel.hidden = !job && !(collecting && this.state.can.cancel === true);
    this.root.dataset.job = job ? job.kind : "";
    if (job) {
      const { step = 0, steps, loss, label } = job;
      if (steps) this.bar.value = step / steps;
      else this.bar.removeAttribute("value");
      setText(this.working, [label ?? job.kind, steps && `step ${step} of ${steps}`, Number.isFinite(loss) && `loss ${loss.toFixed(4)}`].filter(Boolean).join(" · "));
    } else if (collecting) {
      this.bar.value = statistics.done / statistics.of;
      setText(this.working, `Statistics of ${statistics.layer}, then live pictures · ${statistics.done} of ${statistics.of}`);
    }
  },

  /** What an edit did, where it can be seen and heard. */
  showReport({ report }) {
    this.update();
    this.editsSection.scrollIntoView({ block: "nearest" });
    this.say(describe(report));
  },

  async hint() {
    const done = await this.act("hint");
    if (!done) return;
    const layers = done.layers ?? [];
    const best = Math.max(...layers.map((l) => l.score), 1e-9);
    this.hints.replaceChildren(...layers.slice(0, 4).map((l) => h("button", { type: "button", class: "suggestion", title: "Take this layer", onclick: () => (this.hints.replaceChildren(), this.act("set", { layer: l.layer })) },
      h("strong", {}, l.layer), h("meter", { min: "0", max: "1", value: String(clamp(l.score / best, 0, 1)), "aria-label": `fits ${share(l.score / best)} as well as the best` }), h("span", {}, describeHint(l)))));
    this.say(layers.length ? `Best layer: ${layers[0].layer}. ${describeHint(layers[0])}` : "No layer stands out.");
  },
};

// Files and dialogs: save, load, ready edits, download, upload, help. Methods of App.

import { h, setText } from "./elements.js";
import { KEYS } from "./words.js";

export const dialogs = {
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
  },

  async names() {
    return (await this.client.request({ type: "get", what: "files" })).names ?? [];
  },

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
  },

  async load() {
    const names = await this.names().catch((error) => (this.notice("error", error.message), null));
    if (!names) return;
    const dialog = this.dialog("Load an edit", h("div", { class: "list" }, ...names.map((name) => h("button", { type: "submit", value: name }, name))),
      names.length ? null : h("p", { class: "hint" }, "Nothing is saved yet. File › Open takes a file from this computer."), h("div", { class: "buttons" }, h("button", { type: "submit", value: "" }, "Cancel")));
    dialog.addEventListener("close", () => dialog.returnValue && this.act("load", { name: dialog.returnValue }, () => (this.savedName = dialog.returnValue)));
  },

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
  },

  async download(action, fields) {
    const done = await this.act(action, fields);
    if (!done) return;
    const address = URL.createObjectURL(new Blob(done.buffers, { type: done.media ?? "application/octet-stream" }));
    h("a", { href: address, download: done.filename ?? "snapshot.png" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
    this.say(`Downloaded ${done.filename ?? "the snapshot"}.`);
  },

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
  },

  help() {
    const dialog = this.dialog("How it works", h("ol", {}, ...[
      "Paint a thing on a picture (or pick it by a click) and Copy it: that is the object.",
      "Paint where it belongs on another picture and Paste. The red box shows where it lands; drag it.",
      "Paint the places that shall get it on a few more pictures and Add to context.",
      "Watch the row at the bottom: pictures you did not touch, as the rule would draw them. Execute refines and applies it.",
    ].map((text) => h("li", {}, text))),
    h("p", {}, "Your own picture? Pictures come from the generator, by number; a photograph cannot be edited directly. A latent in W or W+ that another tool found for it (.npy) can be opened: File › Open a file."),
    h("table", {}, h("tbody", {}, ...KEYS.map(([key, text]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, key)), h("td", {}, text))))),
    h("div", { class: "buttons" }, h("button", { type: "submit", class: "primary" }, "Close"), this.liked.guide ? null : h("button", { type: "submit", value: "steps" }, "Show the steps again")));
    dialog.addEventListener("close", () => dialog.returnValue === "steps" && this.showSteps(1));
  },
};

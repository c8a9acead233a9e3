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

  /** The dialog is there at once, what it lists when it comes: who types on must not type into the pictures. */
  async fill(dialog, list, what, lines) {
    list.replaceChildren(h("p", { class: "hint" }, "One moment…"));
    try {
      const done = await this.client.request({ type: "get", what });
      list.replaceChildren(...lines(done));
      if (dialog.contains(this.focused) && this.focused.value === "") list.querySelector("button")?.focus(); // from Cancel
    } catch (error) {
      dialog.close("");
      this.notice("error", error.message);
    }
  },

  save() {
    const about = h("p", { class: "hint" });
    const names = h("datalist", { id: `names-${this.client.prefix}` });
    const name = h("input", { type: "text", name: "name", required: true, maxlength: "64", pattern: "[A-Za-z0-9][A-Za-z0-9 _.\\-]*", list: names.id, title: "Letters, digits, spaces, and _ . -", "aria-label": "Name", autocomplete: "off" });
    let taken = [];
    const say = () => setText(about, taken.includes(name.value.trim()) ? "This name exists: saving replaces it." : "Kept in the session's folder as NAME.json; the official tool reads it too.");
    name.value = this.savedName ?? "";
    name.addEventListener("input", say);
    say();
    const dialog = this.dialog("Save this edit", name, names, about, h("div", { class: "buttons" }, h("button", { type: "submit", value: "save", class: "primary" }, "Save"), h("button", { type: "submit", value: "", formnovalidate: true }, "Cancel")));
    const come = (done) => {
      taken = done.names;
      names.replaceChildren(...taken.map((value) => h("option", { value })));
      say();
    };
    this.client.request({ type: "get", what: "files" }).then(come, () => {}); // without it there are no suggestions
    dialog.addEventListener("close", () => {
      if (dialog.returnValue !== "save") return;
      this.act("save", { name: name.value.trim() }, () => {
        this.savedName = name.value.trim();
        this.notice("info", `Saved as ${this.savedName}.`);
      });
    });
  },

  load() {
    const list = h("div", { class: "list" });
    const dialog = this.dialog("Load an edit", list, h("div", { class: "buttons" }, h("button", { type: "submit", value: "" }, "Cancel")));
    this.fill(dialog, list, "files", ({ names }) => names.length ? names.map((name) => h("button", { type: "submit", value: name }, name))
      : [h("p", { class: "hint" }, "Nothing is saved yet. File › Open a file takes one from this computer.")]);
    dialog.addEventListener("close", () => dialog.returnValue && this.act("load", { name: dialog.returnValue }, () => (this.savedName = dialog.returnValue)));
  },

  gallery() {
    const list = h("div", { class: "list" });
    const line = (e) => h("div", { class: "line" }, h("button", { type: "submit", value: `apply ${e.name}`, title: `A rule of ${e.layer}` }, e.title),
      h("button", { type: "submit", value: `load ${e.name}`, class: "selections", title: "Load what was painted for it, to see how it is made or to change it" }, "Selections"));
    const dialog = this.dialog("Ready edits", list, h("div", { class: "buttons" }, h("button", { type: "submit", value: "" }, "Cancel")));
    this.fill(dialog, list, "gallery", (done) => done.gallery.length ? [h("p", { class: "hint" }, "One click solves it and adds it to the edits."), ...done.gallery.map(line)]
      : [h("p", { class: "hint" }, "None come with this generator.")]);
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

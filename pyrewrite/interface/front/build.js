// Everything that is on screen, made once. Methods of App.

import { h, options } from "./elements.js";
import { Surface } from "./surface.js";
import { CHOICES, ERASING, MORE, SLIDERS, STEPS } from "./words.js";

export const building = {
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
    this.brushSize = this.liking("brush", "Size", 0.004, 0.2, 0.002, "Size of the brush ( [ and ] )");
    this.alike = this.liking("alike", "Alike", 0, 1, 0.01, "How alike a pixel must be to belong to the picked region", () => this.pickAgain());
    this.tools = h("div", { class: "tools", role: "toolbar", "aria-label": "Selection" },
      h("span", { class: "switch", role: "group", "aria-label": "Tool" }, tool("brush", "Brush", "Paint a selection (B). Ctrl erases."), tool("erase", "Erase", "Take away from the selection (E)"), tool("pick", "Pick", "Click an object to select it (W). Shift adds.")),
      this.brushSize, this.alike,
      this.liking("opacity", "Mask", 0, 0.9, 0.05, "How much the mask hides what is under it"),
      h("span", { class: "rule" }),
      button("copy", "Copy", "Copy the selection as the object (C)", () => this.act("copy")),
      button("paste", "Paste", "Paste the object over the selection (V)", () => this.act("paste")),
      button("add_context", "Add to context", "The rule shall hold where things look like the selection (A)", () => this.act("add_context")),
      button("protect", "Protect", "What is selected must not change (P)", () => this.act("protect")),
      button("clear", "Clear", "Clear the selection", () => this.clearPainted()),
      h("span", { class: "rule" }),
      button("match_selection", "Match selection", "Show the pictures that look most like the selection (Q)", () => this.act("match_selection", {}, () => this.find())),
      button("search", "Search context", "Show the pictures that look most like the context (F)", () => this.find()),
      button("matches", "Show matches", "Outline where the pictures look like the context (M)", () => this.toggleMatches(), { "aria-pressed": "false" }));

    this.steps = STEPS.map((text) => h("li", {}, text));
    this.advice = h("span", { class: "advice" });
    this.guide = h("div", { class: "guide", role: "note", "aria-label": "What comes next" }, h("ol", {}, ...this.steps), this.advice,
      this.plain("×", "Hide the steps; the help sheet shows them again", () => this.showSteps(0)));
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
    this.frame = h("div", { class: "frame" }, this.header, this.tools, this.guide, this.strip, this.footer, this.panel);
    this.root.replaceChildren(this.banner, this.frame, this.notices, this.spoken);
    this.setTool("brush");
    this.applyLiked();
  },

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
  },

  plain(text, title, run, extra = {}) {
    return h("button", { type: "button", class: "plain", title, "aria-label": extra["aria-label"] ?? title, onclick: run, ...extra }, text);
  },

  /** A slider of something that this person likes: remembered here, unknown to the session. */
  liking(name, text, min, max, step, title, changed = () => {}) {
    const input = h("input", { type: "range", name, min, max, step, title, oninput: () => {
      this.liked[name] = +input.value;
      this.applyLiked();
      changed();
    } });
    input.value = this.liked[name];
    this.controls.set(`like-${name}`, input);
    return h("label", { class: "like", title }, h("span", {}, text), input);
  },

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
      const by = { ArrowDown: 1, ArrowUp: -1 }[e.key];
      if (e.key === "Escape" && menu.open) (e.stopPropagation(), (menu.open = false), menu.firstElementChild.focus());
      else if (by && (menu.open || by > 0)) {
        e.preventDefault();
        menu.open = true;
        const items = [...menu.querySelectorAll("[role=menuitem]")];
        const at = items.indexOf(this.focused); // -1: on "File" itself
        items[at < 0 ? (by > 0 ? 0 : items.length - 1) : (at + by + items.length) % items.length].focus();
      }
    });
    return menu;
  },

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
  },
};

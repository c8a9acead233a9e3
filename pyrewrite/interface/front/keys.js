// Shortcuts, and the host's theme. Methods of App.

import { clamp } from "./elements.js";

export const keys = {
  listenToKeys() {
    const target = this.kind === "page" ? document : this.root;
    const pressed = (event) => {
      this.key(event);
      if (this.kind === "widget") event.stopPropagation(); // a notebook would take the focus, and Enter with it
    };
    target.addEventListener("keydown", pressed);
    this.cleanups.push(() => target.removeEventListener("keydown", pressed));
  },

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
  },

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
  },
};

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

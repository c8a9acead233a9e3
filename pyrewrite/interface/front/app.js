// The screen. It keeps nothing of its own but what a hand is doing at this moment, and how this person likes the
// interface: all else is the session's state. The last lines mount it: a notebook's widget calls the default export's
// `render`; on the page it mounts itself.

import { clamp, h, plural, setText } from "./elements.js";
import { modelConnection, socketConnection } from "./connections.js";
import { Client, cutSheet } from "./client.js";
import { building } from "./build.js";
import { settings } from "./settings.js";
import { pictures } from "./pictures.js";
import { edits } from "./edits.js";
import { hands } from "./hands.js";
import { dialogs } from "./dialogs.js";
import { keys } from "./keys.js";
import { nextStep } from "./words.js";

/** How this person likes the interface; remembered in the browser. */
const REMEMBERED = { brush: 0.04, opacity: 0.45, tile: 136, alike: 0.6, guide: 1 };

class App {
  constructor(root, connection) {
    this.root = root;
    this.kind = connection.kind;
    this.liked = { ...REMEMBERED, ...read() };
    this.tool = "brush";
    this.previews = {}; // kind -> {key, tiles}
    this.arrivals = {}; // kind -> count, so that an old picture that decodes late is dropped
    this.outlines = new Map();
    this.stroke = null;
    this.drag = null;
    this.local = null; // {image, mask, pending, revision}: painted here, not yet in a state
    this.controls = new Map();
    this.cleanups = [];
    this.build();
    this.client = new Client(connection, () => this.later(), (...told) => this.hear(...told));
    this.followTheme();
    this.listenToKeys();
  }

  get state() {
    return this.client?.state ?? null;
  }

  get size() {
    return this.state?.generator.image_size ?? 256;
  }

  /** What has the focus; within a host's shadow root the document only knows that it is somewhere in there. */
  get focused() {
    return this.root.getRootNode().activeElement;
  }

  get radius() {
    return Math.max(0.5, this.liked.brush * this.size);
  }

  applyLiked() {
    this.root.style.setProperty("--tile", `${this.liked.tile}px`);
    for (const name of Object.keys(REMEMBERED)) {
      const input = this.controls.get(`like-${name}`);
      if (input && +input.value !== this.liked[name]) input.value = this.liked[name];
    }
    write(this.liked);
    if (this.hover) this.hover();
    this.later();
  }

  later() {
    if (this.due) return;
    this.due = true;
    const run = () => {
      this.due = false;
      if (this.state) this.update();
    };
    if (document.hidden) setTimeout(run, 50); // no frames are drawn for a page in the background
    else requestAnimationFrame(run);
  }

  update() {
    const s = this.state;
    setText(this.title, `${s.generator.name} · ${s.generator.family} · ${s.generator.image_size} px`);
    this.title.title = this.title.textContent; // it may be cut
    if (this.focused !== this.numbers && this.numbers.value !== s.strip.text) this.numbers.value = s.strip.text;
    this.shown.forEach((el, i) => el.setAttribute("aria-pressed", String(s.shown === ["original", "edited"][i])));
    this.settleLocal();
    if (s.live.key === null && !s.job) this.previews = {}; // during a job the last ones stay
    this.updateGuide();
    this.updateButtons();
    this.updateSettings();
    this.updateStrip();
    this.updatePanel();
    this.updateEdits();
    this.updateRow();
    this.updateJob();
    this.root.dataset.ready = "true";
    this.root.dataset.revision = s.revision;
    this.root.dataset.weights = this.weights();
  }

  /** What is painted here counts until a state knows it. */
  settleLocal() {
    const { local, state } = this;
    if (local && !local.pending && !this.stroke && state.revision >= (local.revision ?? 0)) this.local = null;
  }

  get painted() {
    if (this.stroke && this.stroke.local) return { image: this.stroke.surface.number, mask: this.stroke.mask };
    if (this.local) return this.local.mask ? this.local : null;
    const painted = this.state.painted;
    const mask = painted && this.client.mask(painted.hash);
    return mask ? { image: painted.image, mask } : null;
  }

  updateGuide() {
    const { step, text, action } = nextStep(this.state, this.painted ?? this.state.painted);
    this.guide.hidden = !this.liked.guide;
    setText(this.advice, text);
    this.steps.forEach((el, i) => {
      el.classList.toggle("past", i < step);
      if (i === step) el.setAttribute("aria-current", "step");
      else el.removeAttribute("aria-current");
    });
    for (const name of ["copy", "paste", "add_context"]) this.controls.get(name).classList.toggle("next", name === action && !!this.liked.guide);
  }

  showSteps(on) {
    this.liked.guide = on;
    this.applyLiked();
  }

  updateButtons() {
    const can = { ...this.state.can, ...downloads(this.state.can), clear: this.painted || this.state.painted ? true : "nothing is selected", upload: true };
    if (this.stroke || this.local) for (const name of ["copy", "add_context", "protect", "match_selection"]) can[name] = true;
    for (const [action, el] of this.controls) {
      if (!el.dataset?.action) continue;
      const allowed = this.client.open === false ? "there is no connection at this moment" : (can[action] ?? true);
      el.setAttribute("aria-disabled", String(allowed !== true));
      let title = allowed === true ? el.about : `${el.about} — not now: ${allowed}`;
      if ((action === "undo" || action === "redo") && this.state[action]) title = `${el.about}: ${this.state[action]}`;
      if (el.title !== title) el.title = title;
    }
    this.controls.get("matches").setAttribute("aria-pressed", String(!!this.state.matches?.on));
  }

  weights() {
    return this.state.weights[this.state.shown] ?? this.state.weights.edited;
  }

  async act(action, fields = {}, then = null) {
    try {
      const done = await this.client.do(action, fields);
      then?.(done);
      return done;
    } catch (error) {
      this.notice("error", error.message);
      this.later(); // controls show again what holds
      return null;
    }
  }

  latest(key, action, fields) {
    return this.client.doLatest(key, action, fields).catch((error) => {
      if (!error.lost) this.notice("error", error.message);
      this.later();
    });
  }

  showNumbers(text) {
    return this.act("strip", { text }, () => this.strip.scrollTo(0, 0));
  }

  /** As many pictures as are shown now, those that answer most to the query or the context. */
  find() {
    const k = clamp(this.state.strip.numbers.length, 1, 128);
    return this.act("search", { k }, (done) => {
      this.strip.scrollTo(0, 0);
      this.say(`Found ${plural(done.numbers.length, "picture")}.`);
    });
  }

  page(by) {
    if (!this.state) return;
    const numbers = this.state.strip.numbers.filter((n) => n < this.state.generator.samples); // without brought ones
    if (!numbers.length) numbers.push(0);
    const count = numbers.length;
    const least = Math.min(...numbers);
    const start = by > 0 ? Math.max(...numbers) + 1 : Math.max(0, least - count);
    this.showNumbers(`${start}-${start + count - 1}`);
  }

  async hear(kind, message, buffers) {
    if (kind === "notice") this.notice(message.level, message.message);
    else if (kind === "progress") this.hearProgress(message);
    else if (kind === "preview") await this.hearPreview(message, buffers);
    else if (kind === "status") this.hearStatus(message);
    else if (kind === "silence" && this.kind === "widget") this.bannerText(message.silent ? "No answer from the kernel: it runs a cell, or it has stopped. If it was started again, run the cell above again." : "");
  }

  hearStatus({ status, reason }) {
    this.root.dataset.status = status;
    if (status === "open") {
      if (this.banner.textContent) this.say("Connected again.");
      this.bannerText("");
      const again = this.unsent;
      this.unsent = null;
      again?.();
    } else {
      this.bannerText(`The connection was lost${reason ? ` (${reason})` : ""}. Trying again… What the session knows is safe.`);
    }
    this.later();
  }

  bannerText(text) {
    this.banner.hidden = !text;
    setText(this.banner, text);
  }

  hearProgress(message) {
    if (!this.state) return;
    if ("job" in message) this.state.job = message.job;
    if (message.statistics) this.state.statistics = message.statistics;
    this.updateJob();
  }

  async hearPreview(message, buffers) {
    const { kind } = message;
    const arrival = (this.arrivals[kind] = (this.arrivals[kind] ?? 0) + 1);
    const tiles = await cutSheet(message, buffers[0]);
    if (arrival !== this.arrivals[kind]) return;
    this.previews[kind] = { key: message.key, tiles: new Map(tiles) };
    this.root.dataset[`live${kind}`] = message.key;
    this.later();
  }

  say(text) {
    this.spoken.textContent = text;
  }

  notice(level, text) {
    const same = [...this.notices.children].find((el) => el.firstChild.textContent === text);
    same?.remove();
    const el = h("div", { class: `notice ${level}`, role: level === "error" ? "alert" : "status" }, h("span", {}, text), this.plain("×", "Dismiss", () => el.remove()));
    this.notices.append(el);
    while (this.notices.children.length > 4) this.notices.firstChild.remove();
    if (level === "info") setTimeout(() => el.remove(), 6000);
  }

  toggleMatches() {
    const { matches, settings } = this.state;
    this.act("matches", { on: !matches?.on, quantile: settings.quantile });
  }

  close() {
    this.client.close();
    for (const clean of this.cleanups) clean();
  }
}

Object.assign(App.prototype, building, settings, pictures, edits, hands, dialogs, keys);

/** One permission of the session for four buttons; a record can always be taken home once there is something in it. */
const downloads = (can) => ({ patch: can.download, checkpoint: can.download, sheet: can.download, edit: can.save });

function read() {
  try {
    const found = JSON.parse(localStorage.getItem("pyrewrite") ?? "{}");
    return Object.fromEntries(Object.entries(found).filter(([name, value]) => name in REMEMBERED && Number.isFinite(value)));
  } catch {
    return {}; // a host that forbids storage, or something else's entry
  }
}

function write(liked) {
  try {
    localStorage.setItem("pyrewrite", JSON.stringify(liked));
  } catch {
    // not remembered then
  }
}

export function mount(root, connection) {
  const app = new App(root, connection);
  return () => app.close();
}

export default {
  render({ model, el }) {
    const root = document.createElement("div");
    el.append(root);
    return mount(root, modelConnection(model));
  },
};

const page = typeof document === "undefined" ? null : document.getElementById("pyrewrite-page");
if (page) mount(page, socketConnection(new URL("socket", location.href.replace(/^http/, "ws").replace(/[?#].*/, "")).href));

// What the interface says: settings, keys, reports.

import { share } from "./elements.js";

export const ERASING = { units: "silence units (published)", zero: "zero the directions (closed form)" };
export const SLIDERS = [
  ["rank", "Rank", "Number of directions that may change. More hold a rule better; one is what was published."],
  ["preserve", "Preserve", "How much change elsewhere costs. More keeps the rest of the picture as it was."],
  ["shrinkage", "Shrinkage", "Between directions that single out the context (0) and the plain mean (large)."],
  ["strength", "Strength", "How much of a new edit is applied: 0 is the original, 1 the edit."],
];
export const MORE = [
  ["margin", "Margin", "Pixels of the layer's map around the object that must stay as they are."],
  ["steps", "Steps", "Steps of the optimisation that Execute runs."],
  ["lr", "Learning rate", "Size of a step."],
  ["project_every", "Project every", "Steps between two projections (method: projected)."],
  ["protect_rank", "Protect rank", "Number of directions that stand for what is protected."],
  ["units", "Erase units", "How many units Erase silences."],
  ["quantile", "Match above", "Context matches: the share of all pixels below the outline."],
];
export const CHOICES = {
  method: { low_rank: "low rank", projected: "projected (published)", least_squares: "least squares (closed form)" },
  targets: { context: "paste and context", paste: "paste only (published)" },
  key_method: { zca: "whitened (zca)", mean: "mean", svd: "svd", gandissect: "units (gandissect)" },
  weighting: { box: "whole box", alpha: "object's shape" },
};
export const CHOICE_NAMES = { method: "Method", targets: "Targets", key_method: "Directions", weighting: "Weighting" };
export const KEYS = [
  ["[  ]", "smaller, larger brush"],
  ["B, E, W", "brush, eraser, pick by click"],
  ["Ctrl, Alt or ⌘ + stroke", "erase (also a pen's eraser)"],
  ["Shift + click", "pick: add to the selection"],
  ["Esc", "give up the stroke or the drag; else undo the last stroke"],
  ["C, V, A", "copy object, paste, add to context"],
  ["P, Q", "protect, match selection"],
  ["F, M", "search by context, show context matches"],
  ["Ctrl + Enter", "execute"],
  ["T", "original and edited"],
  ["Ctrl + Z, Ctrl + Y", "undo, redo (everything)"],
  ["Ctrl + S", "save"],
  ["+  −", "larger, smaller pictures"],
  ["arrows, Space, Enter", "on a focused picture: move the brush, paint, pick; on a thumbnail: nudge"],
  ["?", "this sheet"],
];

export const STEPS = ["Copy", "Paste", "Add to context", "Execute"];
const ENOUGH = 3; // context pictures; fewer make a rule that holds for little else

/** What comes next: {step: 0 .. 4, text, action: of the button that does it, or null}. painted: {image} or null. */
export function nextStep(s, painted) {
  const next = (step, text, action = null) => ({ step, text, action });
  if (s.job?.kind === "execute") return next(3, "It is being solved. You can go on painting meanwhile.");
  if (s.live.solved) return next(4, "Done. T compares with the original, File saves it.");
  if (!s.object) {
    if (painted) return next(0, "Is all of it covered? Then Copy. Erase takes away what is too much.", "copy");
    return next(0, "Paint over a thing on one picture, a hat or glasses. Or Pick it by a click.");
  }
  const elsewhere = painted && painted.image !== s.object.image;
  if (!s.paste && !s.context.length) {
    if (elsewhere) return next(1, "Paste: the object lands here.", "paste");
    return next(1, "Paint the place where it belongs on another picture.");
  }
  if (s.context.length < ENOUGH) {
    const fresh = elsewhere && painted.image !== s.paste?.image && !s.context.some((c) => c.image === painted.image);
    if (fresh) return next(2, "Add to context: the rule shall hold here too.", "add_context");
    const left = ENOUGH - s.context.length;
    return next(2, `Paint the same place on ${left === ENOUGH ? "three other pictures, one by one" : left === 1 ? "one more picture" : "two more pictures"}.`);
  }
  return next(3, "Is the row below as you wish? Execute. If not, add context or nudge.", "execute");
}

export const STROKES = ["paint", "select", "clear the mask", "the object's mask"]; // what the session calls them in `undo`

/** How a layer did on places that the edit was not solved for. */
export function describeHint({ taken, spill, why }) {
  if (!Number.isFinite(taken)) return why; // it could not be tried
  return `${taken < 0.005 ? "nothing" : share(taken)} of the object appears, ${share(spill)} of change beside it`;
}

/** A report as one line a person can read. */
export function describe(report) {
  if (!report) return "";
  const parts = [];
  if (Number.isFinite(report.loss_before)) parts.push(`Loss ${report.loss_before.toFixed(3)} → ${report.loss_after.toFixed(3)}`);
  const targets = report.targets?.length;
  if (Number.isFinite(report.context_changed) && targets) parts.push(`changed in ${Math.round(report.context_changed * targets)} of ${targets} context pictures`);
  if (Number.isFinite(report.change_elsewhere)) parts.push(`other pictures change by ${share(report.change_elsewhere)}`);
  if (report.protected) parts.push(`what is protected changes by ${share(report.protected.change)}`);
  if (Number.isFinite(report.relative_size)) parts.push(`size ${share(report.relative_size)} of the weights`);
  return parts.join(" · ");
}

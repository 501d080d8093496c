// What has been on screen. An answer counts as seen once its first and its last line were, outside the bars and with no
// dialog in front, so a long answer must be scrolled to its end.

import { $, show } from "./dom.js";

const LINE = 24; // pixels
const LONG = 340; // height in pixels above which a prompt collapses

let parts = []; // for each answer: its text's element, and whether its first and last line were seen
let told = () => {};

export function watch(elements, seen, changed) {
  parts = elements.map((element, place) => ({ element, first: seen.includes(place), last: seen.includes(place) }));
  told = changed;
  look();
}

export const seen = () => parts.flatMap(({ first, last }, place) => (first && last ? [place] : []));
export const unseen = () => parts.flatMap(({ first, last }, place) => (first && last ? [] : [place]));

function look() {
  if (document.visibilityState !== "visible" || document.querySelector("dialog[open]")) return;
  const before = unseen().length;
  if (!before) return;
  const top = Math.max(document.querySelector(".bar").getBoundingClientRect().bottom, 0);
  const bottom = Math.min($("dock").getBoundingClientRect().top, innerHeight);
  const shown = (from, to) => from >= top - 1 && to <= bottom + 1;
  for (const part of parts) {
    const text = part.element.getBoundingClientRect();
    const line = Math.min(LINE, text.height);
    if (!text.height) continue;
    part.first ||= shown(text.top, text.top + line);
    part.last ||= shown(text.bottom - line, text.bottom);
  }
  if (unseen().length < before) told();
}

// ---- the prompt ----

export function collapse() {
  const turns = $("turns");
  turns.classList.remove("short");
  const long = turns.scrollHeight > LONG;
  show($("whole"), long);
  if (long) unfold(false);
}

// Folded, one turn shows its beginning; a dialogue its end, which the answers follow.
export function unfold(open = $("turns").classList.contains("short")) {
  if ($("whole").hidden) return;
  const turns = $("turns");
  turns.classList.toggle("short", !open);
  turns.classList.toggle("ended", !open && turns.children.length > 1);
  turns.scrollTop = !open && turns.children.length > 1 ? turns.scrollHeight : 0;
  $("whole").setAttribute("aria-expanded", String(open));
  $("whole-words").textContent = open ? "Show less" : "Show all of the prompt";
}

document.addEventListener("scroll", look, { passive: true, capture: true });
window.addEventListener("resize", look);
document.addEventListener("visibilitychange", look);
setInterval(look, 500); // whatever else may move the page, such as a dialog that closes or a font that arrives

// What a labeller writes: a comment on each answer, a reason for the judgement, and an answer of their own.

import { $, letter, make, show } from "./dom.js";

export const LONGEST = { demonstration: 20_000, rationale: 5_000, comments: 2_000 };

export function restored(old, responses) {
  const text = (value) => (typeof value === "string" ? value : "");
  const only = responses.length === 1 && typeof old.demonstration !== "string"; // it is there to be corrected
  const comments = Array.isArray(old.comments) ? old.comments : [];
  return {
    comments: responses.map((_, place) => text(comments[place])),
    rationale: text(old.rationale),
    demonstration: only ? responses[0] : text(old.demonstration),
    corrects: only ? 0 : Number.isInteger(old.corrects) && old.corrects >= 0 && old.corrects < responses.length ? old.corrects : null,
  };
}

// changed: called after each change of `words`.
export function comment(place, words, changed) {
  const area = make("textarea", { rows: 2, maxLength: LONGEST.comments, value: words.comments[place], "aria-label": `Comment on answer ${letter(place)}` });
  area.addEventListener("input", () => {
    words.comments[place] = area.value;
    changed();
  });
  return make("details", { class: "note", open: Boolean(words.comments[place]) }, make("summary", {}, "Comment"), area);
}

export function drawWriting(responses, words, changed) {
  const alone = responses.length < 2;
  const [rationale, demonstration] = [$("rationale"), $("demonstration")];
  [rationale.value, demonstration.value] = [words.rationale, words.demonstration];
  [rationale.maxLength, demonstration.maxLength] = [LONGEST.rationale, LONGEST.demonstration];
  $("rationale-note").open = Boolean(words.rationale);
  $("demonstration-note").open = alone || Boolean(words.demonstration);
  $("demonstration-title").textContent = alone ? (responses.length ? "Correct the answer" : "Write the answer") : "Write or correct an answer";
  rationale.oninput = () => {
    words.rationale = rationale.value;
    changed();
  };
  demonstration.oninput = () => {
    words.demonstration = demonstration.value;
    if (!words.demonstration.trim()) words.corrects = null;
    origin();
    changed();
  };
  const origin = () => ($("origin").textContent = words.corrects === null || alone ? "" : `Started from ${letter(words.corrects)}.`);
  const starts = responses.map((text, place) => {
    const button = make("button", { type: "button" }, alone ? "Start again" : `Start from ${letter(place)}`);
    button.addEventListener("click", () => {
      if (words.demonstration.trim() && words.demonstration !== text && !confirmed(button)) return;
      [words.demonstration, words.corrects, demonstration.value] = [text, place, text];
      origin();
      changed();
      demonstration.focus();
    });
    return button;
  });
  $("starts").replaceChildren(...starts);
  show($("starts"), starts.length > 0);
  origin();
}

// A second click within a few seconds: what was written is not lost by one.
function confirmed(button) {
  if (button.dataset.sure) return true;
  const before = button.textContent;
  button.dataset.sure = "yes";
  button.textContent = "Replace what you wrote?";
  setTimeout(() => {
    delete button.dataset.sure;
    button.textContent = before;
  }, 4000);
  return false;
}

// The labeller's page: one item at a time, saved on every change, usable by keyboard, mouse or touch.

import { ask, asPost, newId, post, trouble } from "./api.js";
import { $, key, letter, make, show, turns } from "./dom.js";
import { draggable } from "./drag.js";
import { Ranking } from "./ranking.js";
import { collapse, seen, unfold, unseen, watch } from "./reading.js";
import { asWritten, said, setAsWritten } from "./text.js";
import { comment, drawWriting, restored } from "./writing.js";

const FLAG_KEYS = "QWRTYULXV"; // letters that nothing else on the page uses; further flags have no key
const REASONS = ["I do not understand the prompt", "I do not know enough to judge", "It contains private information", "It is broken or unreadable"];
const IDLE = 60_000; // milliseconds without activity after which time is not counted

let page = null; // title, instructions, question, flags and scale
let flagged = []; // [name, words, key] of each flag
let task = null; // the item from the server: id, turns, responses
let ranking = null;
let marks = null; // ratings and flags, one for each response
let words = null; // what the labeller writes, see writing.js
let revision = 0;
let seconds = 0;
let read = []; // answers that were on screen according to the draft
let current = 0;
let busy = true;
let active = Date.now();
let saver = null;
let tieNext = false;

const pair = () => task?.responses.length === 2;
const alone = () => task.responses.length < 2; // nothing to compare: an answer is written, or corrected
const say = (words) => ($("status").textContent = words);
const number = (value) => value.toLocaleString("en");

// ---- drafts ----

const draft = () => ({ tiers: ranking.tiers, ratings: marks.ratings, flags: marks.flags, seconds, seen: seen(), ...words });
const slot = () => `draft ${task.id}`;

function changed() {
  revision += 1;
  localStorage.setItem(slot(), JSON.stringify({ revision, draft: draft() }));
  clearTimeout(saver);
  saver = setTimeout(save, 300);
}

async function save(more = {}) {
  clearTimeout(saver);
  saver = null;
  if (!task) return;
  try {
    await ask("/api/draft", asPost({ item: task.id, revision, draft: draft() }, more));
  } catch {
    // The draft is also in this browser, and the next change sends it again.
  }
}

function restore(given) {
  const count = task.responses.length;
  let kept = { revision: given.revision, draft: given.draft };
  try {
    const own = JSON.parse(localStorage.getItem(slot()));
    if (own && own.revision > kept.revision) kept = own;
  } catch {
    // Not a draft of this page.
  }
  revision = kept.revision;
  const old = kept.draft ?? {};
  const list = (value) => (Array.isArray(value) ? value : []);
  ranking = new Ranking(count, list(old.tiers).map(list));
  marks = {
    ratings: task.responses.map((_, place) => list(old.ratings)[place] ?? null),
    flags: task.responses.map((_, place) => list(list(old.flags)[place])),
  };
  words = restored(old, task.responses);
  seconds = Number(old.seconds) || 0;
  read = list(old.seen);
}

// ---- items ----

async function load() {
  busy = true;
  if (!page && !(await loadPage())) return;
  const { status, body } = await post("/api/task", {});
  if (status === 401) return signIn();
  if (status !== 200) return trouble(body.error);
  progress(body);
  task = body.task;
  show($("sign-in"), false);
  show($("to-admin"), body.labeller.role === "admin");
  show($("work"), Boolean(task));
  show($("dock"), Boolean(task));
  show($("done"), !task);
  $("undo").disabled = !body.progress.undoable;
  $("skip").disabled = !task;
  busy = false;
  if (!task) return finished(body);
  restore(task);
  current = 0;
  tieNext = false;
  draw();
  window.scrollTo(0, 0);
  $("main").focus({ preventScroll: true });
  watchTexts();
  say(alone() ? "New item: write its answer." : `New item with ${task.responses.length} answers.`);
  guide(true);
}

async function loadPage() {
  const { status, body } = await post("/api/page", {});
  if (status === 401) await signIn();
  else if (status !== 200) trouble(body.error);
  if (status !== 200) return false;
  page = body;
  flagged = Object.entries(page.flags).map(([name, title], place) => [name, title, FLAG_KEYS[place] ?? ""]);
  document.title = page.title;
  $("page-title").textContent = page.title;
  show($("guide"), Boolean(page.version));
  $("guide-text").replaceChildren(...(page.version ? [said(page.instructions, page.marked)] : []));
  show($("by-ratings"), page.scale.points > 0);
  return true;
}

// The instructions open by themselves until this labeller has closed them, and again when they have changed.
function guide(unasked) {
  if (!page.version || (unasked && localStorage.getItem("guide") === page.version)) return;
  $("guide-dialog").showModal();
}

function progress({ progress: figures }) {
  const { mine, judged, wanted, left, most_left, quiz } = figures;
  $("progress").max = quiz ? quiz[1] : Math.max(wanted, 1);
  $("progress").value = quiz ? quiz[0] : judged;
  $("progress-words").textContent = quiz
    ? `Screening question ${Math.min(quiz[0] + 1, quiz[1])} of ${quiz[1]}`
    : `${left > most_left ? `over ${number(most_left)}` : number(left)} left for you, ${number(mine)} done by you; ${number(judged)} of ${number(wanted)} by all`;
}

function finished({ labeller, progress: figures }) {
  const failed = labeller.screening === "failed";
  $("done-title").textContent = labeller.paused ? "Your work is paused" : failed ? "Thank you for trying" : "Nothing more to judge";
  $("done-words").textContent = labeller.paused
    ? "The admin has paused your work. What you have written so far is kept. If you think that is a mistake, contact the person who gave you the link."
    : failed
    ? "Your answers to the screening questions differ too much from the reference answers, so there are no items for you. If you think that is a mistake, contact the person who gave you the link."
    : `You have judged ${number(figures.mine)}. Thank you. Items held by others may become available later.`;
  $("done-title").tabIndex = -1;
  $("done-title").focus();
}

async function send(answer) {
  if (busy || !task) return;
  busy = true;
  clearTimeout(saver);
  const done = slot();
  document.body.classList.add("sending");
  const { status, body } = await post("/api/judgement", { request: newId(), item: task.id, ...answer });
  document.body.classList.remove("sending");
  // 409: the labeller answered in another window. In both cases, load the next item.
  if (status === 200 || status === 409) {
    localStorage.removeItem(done);
    task = null;
    await load();
  } else {
    busy = false;
    if (status === 401) signIn();
    else trouble(body.error);
  }
}

function submit() {
  if (!task || (!alone() && !ranking.complete)) return say("Rank every answer first.");
  if (alone() && !words.demonstration.trim()) return say("Write an answer first.");
  if (unseen().length) return refuse();
  return send({ ranks: alone() ? [] : ranking.ranks, ...marks, ...words, seconds });
}

// No decision about an answer that nobody can have read. The page does not scroll there by itself: pressing a key a few
// times would then decide.
function refuse() {
  say(`Not decided. ${$("unseen").textContent}`);
  $("unseen").classList.remove("again");
  requestAnimationFrame(() => $("unseen").classList.add("again"));
}

async function undo() {
  if (busy || $("undo").disabled) return;
  busy = true;
  if (task && saver) await save();
  const { status, body } = await post("/api/undo", { request: newId() });
  task = status === 200 ? null : task;
  busy = false;
  if (status !== 200) return trouble(body.error);
  await load();
  say("Undone: your last answer is back as a draft.");
}

async function signIn() {
  busy = true;
  for (const id of ["work", "dock", "done"]) show($(id), false);
  show($("sign-in"), true);
  $("token").focus();
}

async function comeIn(token) {
  const { status, body } = await post("/api/login", { token });
  if (status !== 200) {
    await signIn();
    return trouble(body.error);
  }
  if (body.role === "admin") return location.assign("/admin");
  return load();
}

// ---- drawing ----

function draw() {
  drawPrompt();
  $("answers").replaceChildren(...task.responses.map(card));
  $("answers").dataset.count = task.responses.length;
  $("as-written").checked = asWritten();
  show($("as-written-label"), [...task.marked.turns, ...task.marked.responses].some(Boolean));
  show($("answers-part"), task.responses.length > 0);
  $("answers-title").textContent = alone() ? "Answer to correct" : "Answers";
  show($("ranking"), !pair());
  show($("choice"), pair());
  for (const id of ["tiers", "tray"]) show($(id), !alone());
  show($("by-ratings"), !alone() && page.scale.points > 0);
  $("dock-title").textContent = alone() ? "" : page.question || (pair() ? "Which answer is better?" : "Ranking");
  $("dock-title").classList.toggle("own", Boolean(page.question)); // stays on a narrow screen too
  drawWriting(task.responses, words, () => {
    changed();
    drawSubmit();
  });
  keys();
  drawRanking();
}

function drawPrompt() {
  $("turns").replaceChildren(...turns(task.turns, task.turns.map((turn, place) => said(turn.content, task.marked.turns[place]))));
  collapse();
}

function watchTexts() {
  const texts = task.responses.map((_, place) => $(`answer-${place}`).querySelector(".said"));
  watch(texts, read, () => {
    read = seen();
    drawUnseen();
  });
  drawUnseen();
}

function drawUnseen() {
  const left = unseen();
  show($("unseen"), left.length > 0);
  $("unseen").textContent = left.length ? `To decide, scroll through ${left.map(letter).join(", ")} from the first line to the last.` : "";
  for (const id of ["submit", "left", "tie", "right"]) $(id).setAttribute("aria-disabled", String(left.length > 0));
}

// Shows all texts as they were written, or their Markdown.
function drawTexts() {
  setAsWritten($("as-written").checked);
  drawPrompt();
  task.responses.forEach((text, place) => $(`answer-${place}`).querySelector(".said").replaceWith(said(text, task.marked.responses[place])));
  watchTexts();
}

function card(text, place) {
  const name = letter(place);
  const { points, labels } = page.scale;
  const ratings = make("fieldset", { class: "rating" }, make("legend", {}, "Rating", make("span", { class: "unseen" }, ` of answer ${name}`)));
  ratings.style.gridTemplateColumns = `repeat(${points}, 1fr)`;
  for (let rating = 1; rating <= points; rating += 1) {
    const input = make("input", { type: "radio", name: `rating-${place}`, value: String(rating), checked: marks.ratings[place] === rating });
    input.addEventListener("change", () => rate(place, rating));
    input.addEventListener("keydown", scrollOnly);
    ratings.append(make("label", { title: labels[rating] ?? "" }, input, make("span", {}, String(rating))));
  }
  const meanings = Object.entries(labels).map(([point, meaning]) => `${point} ${meaning}`);
  if (meanings.length) ratings.append(make("p", { class: "meanings" }, meanings.join(" · ")));
  const flags = make("fieldset", { class: "flags" }, make("legend", {}, "Flags", make("span", { class: "unseen" }, ` of answer ${name}`)));
  for (const [flag, title, shortcut] of flagged) {
    const input = make("input", { type: "checkbox", value: flag, checked: marks.flags[place].includes(flag) });
    input.addEventListener("change", () => setFlag(place, flag, input.checked));
    flags.append(make("label", {}, input, make("span", {}, title, shortcut ? key(shortcut) : null)));
  }
  const article = make(
    "article",
    { class: "answer", id: `answer-${place}`, tabIndex: -1, "aria-labelledby": `name-${place} where-${place}` },
    make(
      "header",
      {},
      make("h3", { id: `name-${place}`, "aria-label": `Answer ${name}` }, name),
      make("span", { class: "where", id: `where-${place}` }),
    ),
    said(text, task.marked.responses[place]),
    points ? ratings : null,
    flagged.length ? flags : null,
    comment(place, words, changed),
  );
  article.addEventListener("focusin", () => choose(place, false));
  article.addEventListener("pointerdown", () => choose(place, false));
  return article;
}

function drawRanking(focus = null) {
  const gap = (number) => make("span", { class: "gap", data: { drop: `gap ${number}` }, "aria-hidden": "true" });
  const tiers = ranking.tiers.map((tier, number) =>
    make("span", { class: "tier", role: "group", data: { drop: `tier ${number}` }, "aria-label": `Rank ${number + 1}` },
      make("span", { class: "rank", "aria-hidden": "true" }, String(number + 1)), ...tier.map(chip)),
  );
  const empty = tiers.length ? null : make("span", { class: "hint" }, matchMedia("(hover: none)").matches ? "Best first: tap the letters, or drag them here" : "Best first: type the letters, or drag them here");
  $("tiers").replaceChildren(gap(0), ...tiers.flatMap((tier, number) => [tier, gap(number + 1)]), ...(empty ? [empty] : []));
  $("tray").dataset.drop = "tray";
  $("tray").replaceChildren(...ranking.unplaced.map(chip));
  $("tray").classList.toggle("empty", ranking.complete);
  drawSubmit();
  $("by-ratings").disabled = marks.ratings.every((rating) => rating === null);
  task.responses.forEach((_, place) => ($(`where-${place}`).textContent = pair() || alone() ? "" : ranking.words(place)));
  choose(current, false);
  if (focus !== null) $(`chip-${focus}`)?.focus();
}

const drawSubmit = () => ($("submit").disabled = alone() ? !words.demonstration.trim() : !ranking.complete);

function chip(place) {
  const name = letter(place);
  const element = make(
    "button",
    { type: "button", class: "chip", id: `chip-${place}`, "aria-label": `${name}, ${ranking.words(place)}` },
    name,
  );
  draggable(element, {
    drop: (where) => {
      const [kind, number] = where.split(" ");
      if (kind === "tray") ranking.remove(place);
      else if (kind === "tier") ranking.join(place, Number(number));
      else ranking.insert(place, Number(number));
      ranked(place);
    },
    tap: () => {
      current = place;
      if (ranking.tierOf(place) < 0) ranking.append(place);
      ranked(place);
    },
  });
  element.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    if (step) ranking.move(place, step);
    else if (event.key === "Delete" || event.key === "Backspace") ranking.remove(place);
    else return;
    event.preventDefault();
    event.stopPropagation();
    ranked(place);
  });
  return element;
}

function ranked(place, focus = true) {
  changed();
  current = place;
  drawRanking(focus ? place : null);
  say(`${letter(place)}: ${ranking.words(place)}.${ranking.complete ? " All ranked." : ""}`);
}

function choose(place, focus = true) {
  current = place;
  task.responses.forEach((_, other) => {
    $(`answer-${other}`).classList.toggle("current", other === place);
    $(`chip-${other}`)?.classList.toggle("current", other === place);
  });
  if (focus) {
    $(`answer-${place}`).focus({ preventScroll: true });
    $(`answer-${place}`).scrollIntoView({ block: "nearest" });
  }
}

function rate(place, rating) {
  marks.ratings[place] = rating;
  $(`answer-${place}`).querySelector(`input[type=radio][value="${rating}"]`).checked = true;
  changed();
  $("by-ratings").disabled = false;
  say(`${letter(place)} rated ${rating} of ${page.scale.points}.`);
}

function setFlag(place, flag, on) {
  marks.flags[place] = flagged.map(([name]) => name).filter((name) => (name === flag ? on : marks.flags[place].includes(name)));
  $(`answer-${place}`).querySelector(`input[value="${flag}"]`).checked = on;
  changed();
  say(`${letter(place)}: ${flagged.find(([name]) => name === flag)[1]} ${on ? "on" : "off"}.`);
}

function better(ranks) {
  if (unseen().length) return refuse();
  ranking = new Ranking(2, ranks === "tie" ? [[0, 1]] : ranks === "left" ? [[0], [1]] : [[1], [0]]);
  return submit();
}

// ---- keys ----

// In a group of radio buttons the browser takes ↑ and ↓ for another choice: somebody who has just clicked a rating and
// scrolls on would change it.
function scrollOnly(event) {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  window.scrollBy(0, 40 * step);
}

function table() {
  const last = letter(task ? task.responses.length - 1 : 3);
  const keyed = flagged.map((flag) => flag[2]).filter(Boolean);
  const marking = [
    ...(page?.scale.points ? [[`1 … ${page.scale.points}`, "rate the answer"]] : []),
    ...(keyed.length ? [[keyed.join(" "), "flag the answer"]] : []),
  ];
  const ways = task && alone() ? [["Enter", "submit"]] : task && pair()
    ? [["A", "A is better"], ["B", "B is better"], ["=", "about equal"], ["J K", "next or previous answer, to rate or flag it"]]
    : [
        [`A … ${last}`, "rank that answer next, best first"],
        ["=", "tie the next one with the last"],
        ["Backspace", "unrank the last answer"],
        ["J K", "next or previous answer"],
        ["< >", "move the answer one step up or down in the ranking, into and out of ties"],
        ["O", "order by ratings"],
        ["Enter", "submit"],
      ];
  return [...ways, ...(task?.responses.length ? marking : []), ["P", "show all of the prompt"], ["M", "Markdown, or the text as written"], ["S", "skip"], ["Z", "undo"], ["?", "all keys"]];
}

function keys() {
  $("keys").replaceChildren(...table().slice(pair() ? 3 : 0, -5).flatMap(([keyName, words]) => [make("span", {}, key(keyName), ` ${words.split(",")[0]}`), " "]));
  $("help-keys").replaceChildren(...table().flatMap(([keyName, words]) => [make("dt", {}, key(keyName)), make("dd", {}, words)]));
}

const singleKeys = () => localStorage.getItem("single keys") !== "off";

function pressed(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || document.querySelector("dialog[open]")) return;
  const on = event.target;
  if (on.matches("input[type=text], input[type=password], textarea") || busy) return;
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const single = name.length === 1;
  if (single && !singleKeys() && name !== "?") return;
  if (name === "?") return press(event, openHelp);
  if (name === "z" && !event.shiftKey) return press(event, undo);
  if (!task) return;
  if (name === "p") return press(event, () => unfold());
  if (name === "m") return press(event, () => $("as-written").click());
  if (name === "s") return press(event, openSkip);
  const count = task.responses.length;
  if (name === "Enter" && !pair() && !on.matches("button, a, summary")) return press(event, submit);
  if (!count) return;
  if (/^[1-9]$/.test(name) && Number(name) <= page.scale.points) return press(event, () => rate(current, Number(name)));
  const flag = flagged.find((one) => one[2].toLowerCase() === name);
  if (flag) return press(event, () => setFlag(current, flag[0], !marks.flags[current].includes(flag[0])));
  if (alone()) return;
  const step = { j: 1, k: -1 }[name];
  if (step) return press(event, () => choose((current + step + count) % count));
  const named = single ? name.charCodeAt(0) - 97 : -1;
  if (pair()) {
    if (name === "a") return press(event, () => better("left"));
    if (name === "b") return press(event, () => better("right"));
    if (name === "=") return press(event, () => better("tie"));
    return;
  }
  if (named >= 0 && named < count) {
    return press(event, () => {
      ranking.append(named, tieNext);
      tieNext = false;
      ranked(named, false);
    });
  }
  if (name === "=") return press(event, () => { tieNext = true; say("The next one is tied with the last."); });
  if (name === "o" && !$("by-ratings").disabled) return press(event, orderByRatings);
  if (name === "Backspace" && ranking.tiers.length) return press(event, () => { const last = ranking.tiers.at(-1).at(-1); ranking.remove(last); ranked(last, false); });
  if (name === "<" || name === ">") {
    return press(event, () => { ranking.move(current, name === "<" ? -1 : 1); ranked(current, false); });
  }
}

// The second click of a double click would decide on the next item.
const once = (deed) => (event) => event.detail < 2 && deed();

function press(event, deed) {
  event.preventDefault();
  deed();
}

function orderByRatings() {
  ranking = Ranking.byRatings(marks.ratings);
  changed();
  drawRanking();
  say(`Ordered by ratings: ${ranking.tiers.map((tier) => tier.map(letter).join(" and ")).join(", then ")}.`);
}

function openHelp() {
  keys();
  $("single-keys").checked = singleKeys();
  $("help-dialog").showModal();
}

function openSkip() {
  if (busy || !task) return;
  $("skip-words").value = "";
  $("skip-reasons").querySelectorAll("input").forEach((input, number) => (input.checked = number === 0));
  $("skip-dialog").showModal();
}

// ---- start ----

$("skip-reasons").append(
  ...REASONS.map((reason) => make("label", { class: "check" }, make("input", { type: "radio", name: "reason", value: reason }), reason)),
);
$("skip-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("skip-dialog").close();
  const chosen = $("skip-reasons").querySelector("input:checked");
  const skip = $("skip-words").value.trim() || (chosen ? chosen.value : REASONS[0]);
  send({ ranks: [], ...marks, ...words, skip, seconds });
});
$("skip-cancel").addEventListener("click", () => $("skip-dialog").close());
$("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  comeIn($("token").value.trim().replace(/^.*#token=/, ""));
});
$("guide-dialog").addEventListener("close", () => localStorage.setItem("guide", page.version));
$("single-keys").addEventListener("change", (event) => localStorage.setItem("single keys", event.target.checked ? "on" : "off"));
for (const [id, deed] of [["undo", undo], ["skip", openSkip], ["help", openHelp], ["guide", () => guide(false)], ["again", load], ["submit", once(submit)], ["by-ratings", orderByRatings]]) {
  $(id).addEventListener("click", deed);
}
$("whole").addEventListener("click", () => unfold());
$("as-written").addEventListener("change", drawTexts);
for (const id of ["left", "tie", "right"]) $(id).addEventListener("click", once(() => better(id)));
document.addEventListener("keydown", pressed);
for (const sign of ["pointerdown", "pointermove", "keydown", "scroll"]) {
  document.addEventListener(sign, () => (active = Date.now()), { passive: true });
}
setInterval(() => {
  if (task && !busy && document.visibilityState === "visible" && Date.now() - active < IDLE) seconds += 1;
}, 1000);
window.addEventListener("pagehide", () => {
  if (task && saver) save({ keepalive: true });
});

async function begin() {
  const token = location.hash.startsWith("#token=") ? location.hash.slice(7) : "";
  // Remove the token from the address bar and the history at once.
  if (token) {
    history.replaceState(null, "", location.pathname);
    await comeIn(token);
  } else {
    await load();
  }
}

window.addEventListener("hashchange", begin);
begin();

// The admin's page: statistics refreshed every few seconds, links for labellers, disagreements, export.

import { ask, newId, post, trouble } from "./api.js";
import { $, letter, make, show, turns } from "./dom.js";

const number = (value) => value.toLocaleString("en");
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)}%`);
const fixed = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));
const interval = (one) => (one ? `95%: ${percent(one.low)} to ${percent(one.high)}` : "too few shared items yet");
const range = (one) => (one ? `95%: ${fixed(one.low)} to ${fixed(one.high)}` : "");
let words = {}; // of each flag

function rows(id, heads, body) {
  const cell = (value, place) => (value instanceof Node && value.tagName === "TD" ? value : make(place ? "td" : "th", place ? {} : { scope: "row" }, value));
  const head = make("thead", {}, make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name))));
  const lines = body.map((values) => make("tr", {}, ...values.map(cell)));
  const table = typeof id === "string" ? $(id) : id;
  table.replaceChildren(head, make("tbody", {}, ...lines));
  return table;
}

function card(title, value, note) {
  return make("div", {}, make("dt", {}, title), make("dd", {}, value, make("small", {}, note)));
}

let summary = null;
let figures = null;
let doomed = null; // whose judgement, of which item (null for all), is about to be rejected

function drawCards() {
  const { progress, people } = summary;
  const pairs = figures?.agreement.pairs;
  const rate = pairs?.agreement;
  const alpha = pairs?.krippendorff_alpha.nominal ?? null;
  const hour = people.reduce((sum, person) => sum + person.last_hour, 0);
  $("cards").replaceChildren(
    card("Items finished", `${number(progress.finished)} of ${number(progress.items.task)}`, `${summary.labellers_per_item} labeller${summary.labellers_per_item > 1 ? "s" : ""} each; ${progress.items.calibration} for all, ${progress.items.quiz} in the quiz`),
    card("In the last hour", number(hour), "judgements; skips not counted"),
    card("Pairwise agreement", rate ? percent(rate.value) : "–", `${interval(rate)}; InstructGPT’s: 73%`),
    card("Krippendorff’s α", fixed(alpha?.value), range(alpha) || "of preferences, nominal"),
    card("Fleiss’ κ", fixed(pairs?.fleiss_kappa?.value), range(pairs?.fleiss_kappa) || "of preferences"),
  );
  $("progress").max = Math.max(progress.wanted, 1);
  $("progress").value = progress.judged;
  $("progress-words").textContent = `${number(progress.judged)} of ${number(progress.wanted)} judgements done`;
}

function drawHours() {
  show($("rate"), summary.hours.some(Boolean));
  const most = Math.max(...summary.hours, 1);
  const bars = summary.hours.map((count, hour) => {
    const bar = make("span", { title: `${count}, ${24 - hour} hours ago` });
    bar.style.height = `${(100 * count) / most}%`;
    return bar;
  });
  const total = summary.hours.reduce((sum, count) => sum + count, 0);
  const picture = make("div", { class: "hours", role: "img", "aria-label": `${total} judgements in the last 24 hours, at most ${most} in one hour` }, ...bars);
  $("hours").className = "";
  $("hours").replaceChildren(picture, make("div", { class: "ticks", "aria-hidden": "true" }, make("span", {}, "24 hours ago"), make("span", {}, `most in an hour: ${most}`), make("span", {}, "now")));
}

function ago(at) {
  if (!at) return "–";
  const minutes = Math.round((Date.now() / 1000 - at) / 60);
  return minutes < 1 ? "just now" : minutes < 90 ? `${minutes} min ago` : minutes < 2880 ? `${Math.round(minutes / 60)} h ago` : `${Math.round(minutes / 1440)} days ago`;
}

function drawPeople() {
  const body = summary.people.map((person) => {
    const other = figures?.agreement.labellers[person.name];
    const button = make("button", { type: "button" }, "New link");
    button.addEventListener("click", () => giveLink(person.name, "link"));
    const pause = make("button", { type: "button" }, person.paused ? "Resume" : "Pause");
    pause.addEventListener("click", () => change(person.name, person.paused ? "resume" : "pause"));
    const deeds = [person.role === "model" ? null : button, person.role === "labeller" ? pause : null, person.judged + person.skipped ? rejecting(person.name, null, "Reject all") : null];
    const quiz = person.quiz === null || person.quiz === undefined || person.screening === "open" ? "–" : `${percent(person.quiz)} ${person.screening}`;
    return [
      person.name, person.role, number(person.judged), number(person.skipped), number(person.last_hour),
      person.median_seconds === null ? "–" : `${person.median_seconds.toFixed(1)} s`, percent(other?.agreement?.value), percent(other?.gold?.value), quiz, ago(person.last),
      person.role === "model" ? "" : mark(person.too_fast > 0, person.paced ? `${number(person.too_fast)} of ${number(person.paced)}` : "–"), now(person),
      make("td", {}, ...deeds),
    ];
  });
  rows("people", ["Name", "Role", "Judged", "Skipped", "Last hour", "Median time", "With others", "With gold", "Quiz", "Last seen", "Too fast to read", "Now", ""], body);
}

// Marked in words as well as by colour.
const mark = (marked, text) => (marked ? make("span", { class: "cell level-0" }, text) : text);

function now(person) {
  if (person.paused) return mark(true, "paused");
  if (person.on_item === null) return "–";
  const minutes = Math.round(person.on_item / 60);
  return mark(person.stuck, person.stuck ? `stuck for ${minutes} min` : minutes < 1 ? "working" : `on an item for ${minutes} min`);
}

function rejecting(name, item, title = "Reject") {
  const button = make("button", { type: "button" }, title);
  button.addEventListener("click", () => {
    doomed = { name, item };
    $("why").value = "";
    $("reject-words").textContent = item === null ? `All judgements and skips by ${name}, but those of the quiz, go back into the queue. To give the work to others, pause ${name} first.` : `The judgement by ${name} goes back into the queue.`;
    $("reject-dialog").showModal();
  });
  return button;
}

function drawLatest() {
  const texts = (one) => [...one.comments.map((text, place) => (text ? `${letter(place)}: ${text}` : "")), one.rationale ? `Why: ${one.rationale}` : "", one.demonstration ? `Wrote: ${one.demonstration}` : ""].filter(Boolean).join(" · ");
  const text = (words) => make("td", { class: "text" }, words);
  rows("latest", ["Labeller", "When", "Time", "Prompt", "Order", "Comments, reasons, answer", ""], summary.latest.map((one) => [
    one.labeller, ago(one.at), mark(one.too_fast, `${one.seconds.toFixed(0)} s${one.too_fast ? ", too fast" : ""}`), text(one.prompt), order(one.ranks) || "–", text(texts(one)), make("td", {}, rejecting(one.labeller, one.item)),
  ]));
  show($("skipped"), summary.skips.latest.length > 0);
  $("skip-reasons").textContent = summary.skips.reasons.map(([reason, count]) => `${reason}: ${number(count)}`).join("; ");
  rows("skips", ["Labeller", "When", "Prompt", "Reason", ""], summary.skips.latest.map((one) => [one.labeller, ago(one.at), text(one.prompt), text(one.skip), make("td", {}, rejecting(one.labeller, one.item, "Ask again"))]));
}

function drawAgreement() {
  const { matrix, pairs, items } = { ...figures.agreement, items: figures.items };
  show($("agreement"), matrix.labellers.length > 1);
  show($("flagged"), items > 0);
  $("agreement-words").textContent = `Share of pairs that two labellers order the same way, ties left out; κ is Cohen’s. Based on the ${number(items)} most recently judged items. ${percent(pairs.ties)} of all preferences are ties.`;
  const cell = (one, kappa) => {
    if (!one) return "–";
    const level = one.value < 0.6 ? 0 : one.value < 0.73 ? 1 : 2;
    return make("span", { class: `cell level-${level}`, title: `${interval(one)}, ${one.units} pairs` }, percent(one.value), make("small", {}, ` κ ${fixed(kappa?.value)}`));
  };
  rows("matrix", ["", ...matrix.labellers], matrix.labellers.map((name, i) => [name, ...matrix.labellers.map((_, j) => cell(matrix.agreement[i][j], matrix.cohen_kappa[i][j]))]));
  const flags = Object.entries(figures.agreement.flags);
  rows("flags", ["Flag", "Share of answers", "Krippendorff’s α", "Fleiss’ κ"], flags.map(([flag, one]) => [words[flag], percent(one.share), fixed(one.krippendorff_alpha.nominal?.value), fixed(one.fleiss_kappa?.value)]));
}

function drawWins() {
  show($("wins"), figures.win_rates.length > 0);
  $("win-rates").replaceChildren(...figures.win_rates.flatMap((one) => {
    const scale = make("span", { class: "scale", role: "img", "aria-label": `${one.first} wins over ${one.second}: ${percent(one.win_rate.value)}, ${interval(one.win_rate)}` }, make("u"), make("i"), make("b"));
    const [, whisker, dot] = scale.children;
    whisker.style.left = `${100 * (1 - one.win_rate.high)}%`;
    whisker.style.width = `${100 * (one.win_rate.high - one.win_rate.low)}%`;
    dot.style.left = `${100 * (1 - one.win_rate.value)}%`;
    const share = (rate) => (rate ? make("td", {}, percent(rate.value), make("small", {}, ` ${percent(rate.low)}–${percent(rate.high)}`)) : "–");
    const table = rows(make("table"), ["Flag", `${one.first}’s answers`, `${one.second}’s answers`, "Win rate where flagged"], Object.entries(one.flags).map(([flag, rates]) => [words[flag], share(rates.first), share(rates.second), share(rates.win_rate)]));
    return [
      make("p", { class: "note" }, `${one.first} is preferred over ${one.second} on ${percent(one.win_rate.value)} of ${number(one.win_rate.items)} items (${interval(one.win_rate)}; ties count half, ${percent(one.ties)} of judgements).`),
      make("div", { class: "rate" }, make("span", {}, one.first), scale, make("span", {}, one.second)),
      make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Flags by model" }, table),
    ];
  }));
}

function drawDisagreements() {
  const opened = new Set([...document.querySelectorAll(".case[open]")].map((one) => one.dataset.item));
  const cases = figures.disagreements.map((one) => {
    const people = one.judgements.map((judgement) => make("p", {}, `${judgement.labeller}: ${order(judgement.ranks)}${judgement.rationale ? ` (${judgement.rationale})` : ""} `, rejecting(judgement.labeller, one.id)));
    const answers = one.responses.map((text, place) => {
      const said = one.judgements.flatMap((j) => [j.ratings[place] ? `${j.labeller} rated ${j.ratings[place]}` : "", j.comments[place] ? `${j.labeller}: ${j.comments[place]}` : "", ...(j.flags[place] ?? []).map((flag) => `${j.labeller}: ${words[flag]}`)]).filter(Boolean);
      return make("div", {}, make("h3", {}, letter(place), make("small", {}, ` ${[one.sources[place], ...said].filter(Boolean).join(" · ")}`)), make("p", { class: "said", dir: "auto" }, text || "(an empty answer)"));
    });
    const given = one.turns.length ? one.turns : [{ role: "text", content: one.prompt }];
    const summaryLine = make("summary", {}, make("b", {}, percent(one.disagreement)), make("span", {}, given.at(-1).content.trim().slice(0, 200)));
    return make("details", { class: "case", data: { item: one.id }, open: opened.has(one.id) }, summaryLine, make("div", {}, ...turns(given), make("h3", {}, "Rankings, best first"), ...people, ...answers));
  });
  $("disagreements").replaceChildren(...(cases.length ? cases : [make("p", { class: "empty" }, "None: no two people rank an item differently.")]));
}

function order(ranks) {
  const tiers = [...new Set(ranks)].sort((a, b) => a - b);
  return tiers.map((tier) => ranks.flatMap((rank, place) => (rank === tier ? [letter(place)] : [])).join(" = ")).join(" > ");
}

async function giveLink(name, deed) {
  const { status, body } = await post("/api/admin/labeller", { name, do: deed, request: newId() });
  if (status !== 200) return trouble(body.error);
  trouble("");
  show($("link"), true);
  $("link").replaceChildren(`${body.name}’s link, shown this once: `, make("code", {}, body.link));
  $("name").value = "";
  return refresh();
}

async function change(name, deed) {
  const { status, body } = await post("/api/admin/labeller", { name, do: deed, request: newId() });
  if (status !== 200) return trouble(body.error);
  return refresh();
}

async function reject(why) {
  const { status, body } = await post("/api/admin/reject", { ...doomed, why, request: newId() });
  if (status !== 200) return trouble(body.error);
  return refresh();
}

async function upload(file) {
  show($("uploaded"), false);
  const query = new URLSearchParams({ kind: $("kind").value, name: file.name });
  try {
    const { status, body } = await ask(`/api/admin/items?${query}`, { method: "POST", headers: { "content-type": "application/x-ndjson" }, body: file });
    if (status !== 200) return trouble(body.error);
    show($("uploaded"), true);
    $("uploaded").textContent = `${file.name}: ${number(body.items)} items, ${number(body.added)} of them new. ${body.left_out}`;
    $("upload").reset();
  } catch {
    return trouble("The upload failed; try again.");
  }
  return refresh();
}

async function refresh() {
  try {
    const [first, second] = await Promise.all([ask("/api/admin/summary"), ask("/api/admin/figures")]);
    if (first.status !== 200) return trouble(first.body.error);
    if (second.status !== 200) return trouble(second.body.error);
    [summary, figures] = [first.body, second.body];
    words = summary.flags;
    trouble("");
  } catch {
    return trouble("The server does not answer; retrying.");
  }
  drawCards();
  drawHours();
  drawPeople();
  drawLatest();
  drawAgreement();
  drawWins();
  drawDisagreements();
}

$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  giveLink($("name").value.trim(), "add");
});
$("reject-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("reject-dialog").close();
  reject($("why").value.trim());
});
$("reject-cancel").addEventListener("click", () => $("reject-dialog").close());
$("upload").addEventListener("submit", (event) => {
  event.preventDefault();
  upload($("file").files[0]);
});
setInterval(() => document.visibilityState === "visible" && refresh(), 15_000);
refresh();

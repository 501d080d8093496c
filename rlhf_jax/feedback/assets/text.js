// Text of people and models: as it was written, or as the Markdown tree that the server read from it. Trees become
// elements one by one, from this list of tags only; no text is ever parsed as HTML.

import { make } from "./dom.js";

const TAGS = new Set("p h4 h5 h6 ul ol li blockquote pre code hr br table thead tbody tr th td strong em s".split(" "));
const SOURCE = "text as written";

export const asWritten = () => localStorage.getItem(SOURCE) === "on";
export const setAsWritten = (on) => localStorage.setItem(SOURCE, on ? "on" : "off");

function node(one) {
  if (typeof one === "string") return one;
  if (!TAGS.has(one.tag)) throw new Error(`no such tag: ${one.tag}`);
  const element = make(one.tag, {}, ...one.children.map(node));
  if (one.tag === "ol" && Number.isInteger(one.start)) element.start = one.start;
  return element;
}

// tree: null for text without Markdown, whose spaces and line breaks are kept.
export function said(text, tree) {
  if (tree && !asWritten()) return make("div", { class: "said marked", dir: "auto" }, ...tree.map(node));
  return make("p", { class: text.trim() ? "said" : "said none", dir: "auto" }, text.trim() ? text : "(an empty answer)");
}

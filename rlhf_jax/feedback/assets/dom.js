// DOM elements from names, properties and children. Text is never parsed as HTML, here or elsewhere.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("aria-") || name === "for" || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const key = (name) => make("kbd", {}, name);

export function show(element, visible) {
  element.hidden = !visible;
}

export const letter = (place) => String.fromCharCode(65 + place);

// texts: the element of each turn's text.
export function turns(list, texts = list.map((turn) => make("p", { class: "said", dir: "auto" }, turn.content))) {
  const names = { system: "Instruction", user: "User", assistant: "Assistant", tools: "Tools", tool: "Tool", text: "" };
  return list.map((turn, number) =>
    make("div", { class: `turn ${turn.role}` }, names[turn.role] ? make("span", { class: "who" }, names[turn.role]) : null, texts[number]),
  );
}

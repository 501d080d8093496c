// Reliable posts: each carries an id made here, so that it can be retried after a lost response and counts once.

import { $, show } from "./dom.js";

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function trouble(words) {
  $("trouble").textContent = words;
  show($("trouble"), Boolean(words));
}

export async function ask(path, options = {}) {
  const answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  const body = await answer.json();
  return { status: answer.status, body };
}

export const asPost = (body, more = {}) => ({
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify(body),
  ...more,
});

// Retries until the server answers, e.g. across a restart of the server.
export async function post(path, body) {
  const options = asPost(body);
  for (let wait = 300; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const answer = await ask(path, options);
      if (answer.status < 500) {
        trouble("");
        return answer;
      }
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error;
    }
    trouble("The server does not answer. Your work is kept here and sent again until it does.");
    await pause(wait);
  }
}

// Requests to the page's process, which passes questions on to the API.

import { apiKey } from "./store.js";

const ROOT = document.documentElement.dataset.root;

// What went wrong, in the API's words and by its code; "page" when nobody answers at all.
export class Failure extends Error {
  constructor(message, code, status = 0) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

async function send(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = apiKey();
  // A header takes bytes, written as characters up to 255.
  const bytes = new TextEncoder().encode(key ?? "");
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...bytes)}`;
  let response;
  try {
    response = await fetch(ROOT + path, { ...options, headers, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(String(error), "page");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const { message = `${response.status}`, code = "page" } = body?.error ?? {};
    throw new Failure(message, code, response.status);
  }
  return response;
}

export async function status() {
  return (await send("/status")).json();
}

// The blocks of each text as HTML.
export async function render(texts) {
  const response = await send("/render", { method: "POST", body: JSON.stringify({ texts }) });
  return (await response.json()).html;
}

// Yields the events of an answer to what is asked; `id` is a new one. `signal` ends the listening,
// `stop` the answer.
export async function* answer(id, asked, signal) {
  const body = JSON.stringify({ id, ...asked });
  yield* toItsEnd(id, await send("/answer", { method: "POST", body, signal }), signal);
}

// Yields the events of an answer that is under way, from its beginning.
export async function* follow(id, signal) {
  yield* toItsEnd(id, await followed(id, signal), signal, true);
}

export function stop(id) {
  const body = JSON.stringify({ id });
  return send("/stop", { method: "POST", body, keepalive: true }).catch(() => {}); // it has ended
}

function followed(id, signal) {
  return send("/follow", { method: "POST", body: JSON.stringify({ id }), signal });
}

// Milliseconds before a lost connection is tried again, each time.
const PAUSES = [300, 1000, 2000, 4000, 8000, 8000];

// Goes on where the connection is lost, which phones and proxies do; the event "again" then tells
// that everything comes once more.
async function* toItsEnd(id, first, signal, again = false) {
  let response = first;
  for (let tries = 0; ;) {
    try {
      response ??= await followed(id, signal);
      if (again) yield { type: "again" };
      for await (const event of events(response)) {
        tries = 0;
        yield event;
      }
      return;
    } catch (error) {
      if (error.code === "unknown_answer") throw new Failure("", "broke_off");
      if (!["lost", "page"].includes(error.code)) throw error;
      if (tries === PAUSES.length) throw new Failure(error.message, "broke_off");
    }
    await pause(PAUSES[tries++], signal);
    response = null;
    again = true;
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", resolve);
  });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(String(error), "lost");
    }
    if (part.done) break;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.type === "error") throw new Failure(event.message, event.code, event.status);
      ended = event.type === "end";
      yield event;
    }
  }
  if (!ended) throw new Failure("", "lost");
}

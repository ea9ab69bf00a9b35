// Asking for an answer and taking it in, while it is saved, drawn and may be stopped.

import { isEmpty, messages, newId, said } from "./conversation.js";
import * as server from "./server.js";
import * as settings from "./settings.js";
import * as store from "./store.js";

const SAVE_MILLISECONDS = 500;
const LEAST_SECONDS = 0.1; // that a rate is taken over: tokens that came in one packet have none

const running = new Map(); // by the conversation's id

export function isRunning(id) {
  return running.has(id);
}

// The conversation in the form in which an answer of it is being written.
export function conversationOf(id) {
  return running.get(id)?.conversation;
}

export function turnOf(id) {
  return running.get(id)?.turn;
}

// Returns when the answer's end has been kept. Another tab hears of its own answer's end from the
// server.
export function stop(id, turn = turnOf(id)) {
  const one = running.get(id);
  one?.controller.abort();
  if (turn?.run) server.stop(turn.run.id);
  return one?.done;
}

// Keeps what has come of each answer: the page is going.
export function keepAll() {
  for (const { conversation, turn } of running.values()) store.keepLast(conversation.id, turn);
}

// What the page asks for. A model without a chat template continues the last text.
function asked(conversation, turn, goesOn) {
  const chats = settings.base().has_chat_template;
  const turns = said(conversation, turn);
  const body = settings.fields();
  if (chats) {
    body.messages = messages(goesOn ? turns : turns.slice(0, -1), settings.system());
    if (goesOn) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  } else {
    body.prompt = turns[turns.length - 2].text + turn.text;
  }
  const route = chats ? "chat" : "completions";
  const context = settings.base().max_model_len ?? 0;
  return { route, body, context, prefix: turn.text };
}

// Has a turn answered, or an answer go on. `on` has what is called: grow(turn, event),
// change(turn) when something else of it is new. Returns whether no other tab is at it.
export async function run(conversation, turn, on) {
  if (running.has(conversation.id)) return false;
  turn.state = "asked"; // it is drawn before the other tabs have been heard
  const isAlone = await begin(conversation, turn, on, async (signal) => {
    const question = asked(conversation, turn, !isEmpty(turn));
    for (const name of ["error", "finish", "place", "usage", "rate", "first"]) delete turn[name];
    turn.model = question.body.model;
    // What there is before the first event: all events together come to the rest.
    const before = structuredClone({ text: turn.text, tokens: turn.tokens, calls: turn.calls });
    turn.run = { id: newId(), before };
    await store.put(conversation);
    on.change(turn);
    return server.answer(turn.run.id, question, signal);
  });
  if (!isAlone) delete turn.state;
  return isAlone;
}

// Follows an answer that was being written when its page was left.
export async function rejoin(conversation, turn, on) {
  if (running.has(conversation.id)) return false;
  return begin(conversation, turn, on, (signal) => {
    const last = store.takeLast(conversation.id);
    if (last.id === turn.id) Object.assign(turn, last);
    on.change(turn);
    if (!turn.run) throw new server.Failure("", "unknown_answer");
    return server.follow(turn.run.id, signal);
  });
}

function begin(conversation, turn, on, events) {
  const controller = new AbortController();
  const one = { conversation, turn, controller };
  running.set(conversation.id, one);
  one.done = work(one, on, events);
  return one.done;
}

async function work({ conversation, turn, controller: { signal } }, on, events) {
  try {
    return await store.alone(conversation.id, async () => {
      try {
        await take(conversation, turn, await events(signal), on);
      } catch (error) {
        fail(turn, error);
      }
      delete turn.state;
      delete turn.run;
      conversation.updated = Date.now();
      await store.put(conversation);
    });
  } finally {
    running.delete(conversation.id);
  }
}

function fail(turn, error) {
  if (error.name === "AbortError") {
    turn.finish = "stopped";
    return;
  }
  turn.finish = isEmpty(turn) ? undefined : "interrupted";
  if (error.code === "unknown_answer") return; // too long ago
  turn.error = { code: error.code ?? "", message: error.message, status: error.status };
}

async function take(conversation, turn, events, on) {
  let saved = Date.now();
  let again = false;
  for await (const event of events) {
    if (event.type === "again") {
      again = true; // what there is stays until it comes anew: it may be stopped before
      continue;
    }
    if (again && event.type !== "left_out") {
      Object.assign(turn, { tokens: undefined, calls: undefined }, structuredClone(turn.run.before));
      again = false;
    }
    if (event.type === "left_out") {
      turn.seenFrom = said(conversation, turn)[event.messages].id;
      on.change(turn);
    } else {
      if (event.type === "text") takeText(turn, event);
      else end(turn, event);
      on.grow(turn, event);
    }
    if (Date.now() - saved > SAVE_MILLISECONDS) {
      saved = Date.now();
      store.put(conversation);
    }
  }
}

function takeText(turn, event) {
  turn.text += event.text;
  turn.state = "answering";
  takeFigures(turn, event);
  if (event.tokens.length) (turn.tokens ??= []).push(...event.tokens);
  for (const { index, id, function: part } of event.calls) {
    turn.calls ??= [];
    turn.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
    turn.calls[index].function.name += part?.name ?? "";
    turn.calls[index].function.arguments += part?.arguments ?? "";
  }
}

function end(turn, event) {
  turn.finish = event.finish;
  takeFigures(turn, event);
}

// What an answer has come to so far.
function takeFigures(turn, event) {
  turn.usage = event.usage;
  turn.first = event.first;
  const count = event.usage?.completion_tokens ?? 0;
  const seconds = event.seconds - (event.first ?? 0);
  // The first token waits for the prompt and the line; the rate is that of the others.
  if (count > 1 && seconds >= LEAST_SECONDS) turn.rate = (count - 1) / seconds;
}

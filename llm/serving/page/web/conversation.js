// A conversation: a tree of turns, in which a question that was edited and an answer that was asked
// for again stand beside the earlier one. Nothing here knows the page.

// Without crypto.randomUUID, which browsers give to pages over TLS and to local ones only.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function create() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, next: 1, turns: [], chosen: {} };
}

// Adds a turn below another (0 is the root) and shows it.
export function add(conversation, parent, fields) {
  const turn = { id: conversation.next++, parent, at: Date.now(), text: "", ...fields };
  conversation.turns.push(turn);
  conversation.chosen[parent] = turn.id;
  conversation.updated = turn.at;
  return turn;
}

export function find(conversation, id) {
  return conversation.turns.find((turn) => turn.id === id);
}

export function siblings(conversation, turn) {
  return conversation.turns.filter((other) => other.parent === turn.parent);
}

export function choose(conversation, turn) {
  conversation.chosen[turn.parent] = turn.id;
}

// Takes a turn and what is below it away.
export function remove(conversation, turn) {
  for (const child of conversation.turns.filter((other) => other.parent === turn.id)) {
    remove(conversation, child);
  }
  conversation.turns = conversation.turns.filter((other) => other !== turn);
  delete conversation.chosen[turn.id];
  const left = siblings(conversation, turn);
  if (left.length) choose(conversation, left[left.length - 1]);
  else delete conversation.chosen[turn.parent];
}

// The turns that are shown, from the first down.
export function path(conversation) {
  const shown = [];
  let id = conversation.chosen[0];
  while (id !== undefined) {
    shown.push(find(conversation, id));
    id = conversation.chosen[id];
  }
  return shown;
}

export function isEmpty(turn) {
  return !turn.text && !turn.calls?.length;
}

// The path down to a turn, without questions that got no answer: templates want turns in order.
export function said(conversation, last) {
  const turns = [];
  for (const turn of path(conversation)) {
    if (turn.role === "assistant" && turn.id !== last.id && isEmpty(turn)) turns.pop();
    else turns.push(turn);
    if (turn.id === last.id) break;
  }
  return turns;
}

// Turns as the API's messages, exactly as they were typed and answered.
export function messages(turns, system) {
  const list = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const message = { role: turn.role, content: turn.text };
    if (turn.role === "tool") message.tool_call_id = turn.answers;
    if (turn.calls?.length) {
      message.content = turn.text || null;
      message.tool_calls = turn.calls;
    }
    list.push(message);
  }
  return list;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = path(conversation)[0];
  // By characters: half of a pair of surrogates is none.
  return first ? Array.from(first.text.trim().slice(0, 200).split("\n")[0]).slice(0, 60).join("") : "";
}

const KIND = "llama-paddle-suite conversation";

export function asJson(conversation) {
  const shown = messages(path(conversation), "");
  const text = { kind: KIND, title: titleOf(conversation), messages: shown, conversation };
  return JSON.stringify(text, null, 2) + "\n";
}

const isText = (value) => typeof value === "string";
const isObject = (value) => typeof value === "object" && !Array.isArray(value);
const isCall = (value) => isText(value?.function?.name) && isText(value.function.arguments);
const isToken = (value) => Array.isArray(value) && isText(value[0]) && Number.isFinite(value[1]) &&
  (value[2] ?? []).every(([other, share]) => isText(other) && Number.isFinite(share));
const all = (each) => (value) => Array.isArray(value) && value.every(each);

// What a turn may hold, and what has to be true of it.
const FIELDS = {
  id: Number.isInteger, parent: Number.isInteger, at: Number.isFinite,
  role: (value) => ["user", "assistant", "tool"].includes(value), text: isText,
  answers: isText, model: isText, finish: isText, state: isText, place: Number.isFinite,
  first: Number.isFinite, rate: Number.isFinite, seenFrom: Number.isInteger,
  usage: isObject, error: isObject, calls: all(isCall), tokens: all(isToken),
};

function checkTurn(turn) {
  for (const [name, value] of Object.entries(turn)) {
    const left = value === null && !["id", "parent", "role", "text"].includes(name);
    if (!left && !FIELDS[name]?.(value)) throw new Error(`turns: ${name}`);
  }
}

// Throws where a text is no export of this page.
export function fromJson(text) {
  const { kind, conversation } = JSON.parse(text) ?? {};
  if (kind !== KIND) throw new Error(`kind: ${JSON.stringify(kind ?? null)}`);
  const copy = { ...create(), chosen: {} };
  copy.title = String(conversation.title ?? "");
  copy.created = Number(conversation.created);
  const ids = new Set([0]);
  for (const turn of conversation.turns) {
    checkTurn(turn);
    const isTurn = !ids.has(turn.id) && ids.has(turn.parent) && turn.role && isText(turn.text);
    if (!isTurn) throw new Error("turns");
    ids.add(turn.id);
    copy.next = Math.max(copy.next, turn.id + 1);
    copy.turns.push(turn);
    copy.chosen[turn.parent] = turn.id;
  }
  for (const [parent, id] of Object.entries(conversation.chosen)) {
    if (copy.turns.some((turn) => turn.id === id && turn.parent === Number(parent))) {
      copy.chosen[parent] = id;
    }
  }
  return copy;
}

export function asMarkdown(conversation, names) {
  const parts = [`# ${titleOf(conversation)}`];
  for (const turn of path(conversation)) {
    parts.push(`## ${names[turn.role]}`);
    if (turn.text) parts.push(turn.text);
    for (const { function: call } of turn.calls ?? []) {
      parts.push("```json\n" + JSON.stringify({ name: call.name, arguments: call.arguments }) + "\n```");
    }
  }
  return parts.join("\n\n") + "\n";
}

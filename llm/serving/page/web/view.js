// Shows a conversation: its turns, what becomes of them while an answer grows, and their buttons.

import { isEmpty, path, siblings } from "./conversation.js";
import { composes } from "./frame.js";
import { icon } from "./icons.js";
import { render } from "./server.js";
import { has, place, t } from "./words.js";

const turnsElement = document.getElementById("turns");
const blocks = new WeakMap(); // of a turn: its text, and that text as blocks of HTML
const looks = new WeakMap(); // of a turn: "raw" or "probabilities", where it is not formatted
let act = () => {};
let elements = new Map();
let drawn = []; // the turns that are shown
const seen = new Map(); // ids of the conversations that were shown last: their turns by id
const SEEN = 20;
// Ids of a conversation and a turn, the box in which it is written anew, and what gives that up.
let editing = null;

// Calls back with a turn and what to do with it.
export function onAction(callback) {
  act = callback;
}

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

// Has a text run as its first letter does, from the right or the left.
export function direct(element, text) {
  const [first] = /\p{L}/u.exec(text.slice(0, 1000)) ?? [""];
  element.dir = /[\p{sc=Arab}\p{sc=Hebr}\p{sc=Syrc}\p{sc=Thaa}\p{sc=Nkoo}]/u.test(first) ? "rtl" : "ltr";
  return element;
}

function button(word, onClick, hasPicture = false) {
  const element = make("button", `do-${word}`);
  element.type = "button";
  if (hasPicture) element.dataset.icon = word;
  element.dataset[hasPicture ? "label" : "word"] = word;
  element.addEventListener("click", onClick);
  return element;
}

// Draws everything anew.
export function draw(conversation, chats) {
  const shown = path(conversation);
  const seenFrom = shown.findLast((turn) => turn.role === "assistant")?.seenFrom;
  elements = new Map();
  const list = [];
  takeOver(conversation.id, shown);
  for (const turn of shown) {
    if (turn.id === seenFrom) list.push(make("p", "note left-out", t("leftOut")));
    const article = make("article", `turn ${turn.role}`);
    article.setAttribute("aria-label", t(ROLES[turn.role]));
    article.append(make("div", "body"), make("div", "notes"), make("div", "foot"));
    elements.set(turn.id, article);
    list.push(article);
  }
  if (!shown.length) list.push(make("p", "empty", t(chats ? "empty" : "emptyText")));
  for (const turn of shown) {
    drawBody(turn);
    drawRest(turn, conversation, turn === shown[shown.length - 1]);
  }
  const focused = editing !== null && document.activeElement === editing.box;
  turnsElement.replaceChildren(...list);
  const edited = shown.find((turn) => turn.id === editing?.turn);
  if (edited && editing.conversation === conversation.id) showEdit(edited, conversation, focused);
  return fillIn(shown);
}

// A conversation that is read anew, since another was shown or another tab has written to it: its
// turns look as they did before.
function takeOver(id, turns) {
  const before = seen.get(id) ?? new Map();
  for (const turn of turns) {
    for (const known of [blocks, looks]) {
      const old = before.get(turn.id);
      if (known.has(old) && !known.has(turn)) known.set(turn, known.get(old));
    }
    before.set(turn.id, turn);
  }
  drawn = turns;
  seen.delete(id);
  seen.set(id, before);
  if (seen.size > SEEN) seen.delete(seen.keys().next().value);
}

const ROLES = { user: "you", assistant: "model", tool: "tool" };

// Has the answers formatted that are not yet.
async function fillIn(shown) {
  const missing = shown.filter((turn) => turn.role === "assistant" && turn.text &&
    blocks.get(turn)?.text !== turn.text);
  if (!missing.length) return;
  const texts = missing.map((turn) => turn.text);
  const html = await render(texts).catch(() => null); // the status line tells of it
  missing.forEach((turn, index) => {
    if (turn.text !== texts[index]) return;
    if (html) blocks.set(turn, { text: turn.text, list: html[index] });
    else blocks.delete(turn);
    if (drawn.includes(turn)) drawBody(turn);
  });
}

// Takes in what an event changed in an answer, whether it is shown or not: the next event only
// tells what has changed since.
export function take(turn, event) {
  const list = (blocks.get(turn)?.list ?? []).slice(0, event.from).concat(event.html);
  blocks.set(turn, { text: turn.text, list });
}

// Shows what an event changed in an answer.
export function grow(turn, event) {
  const body = elements.get(turn.id)?.querySelector(".body");
  if (!body) return;
  if (looks.get(turn) === "raw" && body.firstChild) body.firstChild.textContent = turn.text;
  else if (looks.has(turn) || body.dataset.look !== "formatted") drawBody(turn);
  else {
    while (body.children.length > event.from) body.lastChild.remove();
    body.append(...event.html.map(block));
  }
}

function block(html) {
  const element = make("div", "block");
  element.innerHTML = html; // rendering.py's own elements; what the model wrote is text in them
  for (const each of element.querySelectorAll("ul, ol, table, blockquote")) direct(each, each.textContent);
  place(element);
  return element;
}

export function drawBody(turn) {
  const body = elements.get(turn.id)?.querySelector(".body");
  if (!body) return;
  const look = looks.get(turn);
  const known = blocks.get(turn);
  body.dataset.look = "raw";
  if (turn.role !== "assistant") {
    body.replaceChildren(direct(make("div", "typed", turn.text), turn.text));
  } else if (look === "probabilities" && turn.tokens) {
    body.replaceChildren(make("div", "plain", ...turn.tokens.map(token)));
  } else if (look === "raw" || (turn.text && !known)) {
    const kind = look === "raw" ? "plain" : "plain late"; // which it is only for a moment
    body.replaceChildren(direct(make("div", kind, turn.text), turn.text));
  } else {
    body.dataset.look = "formatted";
    body.replaceChildren(...(known?.list ?? []).map(block));
  }
}

// A token, coloured by how sure the model was of it; five steps.
function token([text, logprob, others]) {
  const share = Math.exp(logprob);
  const lines = [[text, logprob], ...(others ?? []).filter(([other]) => other !== text)];
  const element = make("span", `token sure-${Math.min(4, Math.floor(share * 5))}`, text);
  element.title = lines.map(([one, value]) =>
    `${JSON.stringify(one)} ${(100 * Math.exp(value)).toFixed(1)} %`).join("\n");
  return element;
}

// Draws notes and buttons of a turn.
export function drawRest(turn, conversation, isLast) {
  const article = elements.get(turn.id);
  if (!article) return;
  article.classList.toggle("busy", Boolean(turn.state));
  article.querySelector(".notes").replaceChildren(...notes(turn, isLast));
  const foot = article.querySelector(".foot");
  foot.replaceChildren(...(turn.state ? [] : buttons(turn, conversation)));
  if (turn.role === "assistant") foot.append(make("span", "meta", figures(turn)));
  place(article);
}

function notes(turn, isLast) {
  const list = (turn.calls ?? []).map(call);
  if (turn.state && isEmpty(turn)) {
    const waits = turn.place ? t("waiting", { place: turn.place }) : t("thinking");
    list.push(make("p", "note thinking", waits));
  }
  if (turn.state || turn.role !== "assistant") return list;
  if (turn.error) {
    const said = has(turn.error.code) ? t(turn.error.code) : turn.error.message;
    list.push(make("p", "note error", said));
  } else if (isEmpty(turn)) {
    list.push(make("p", "note", t(turn.finish === "stop" ? "nothing" : "noAnswer")));
  }
  const cut = { length: "cut", stopped: "stopped", interrupted: "interrupted" }[turn.finish];
  if (cut && turn.text) {
    const line = make("p", "note cut", t(cut), " ");
    if (isLast) line.append(button("go_on", () => act("continue", turn)));
    list.push(line);
  }
  return list;
}

function call({ function: { name, arguments: given } }) {
  let text = given;
  try {
    text = JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    // Cut off, or no JSON: shown as it came.
  }
  return make("div", "call", make("strong", "", t("call", { name })), make("pre", "", text));
}

function figures(turn) {
  const parts = [];
  const count = turn.usage?.completion_tokens;
  if (count !== undefined) parts.push(t("tokens", { count }));
  if (turn.rate) parts.push(t("perSecond", { rate: turn.rate.toFixed(1) }));
  if (turn.first) parts.push(t("first", { seconds: turn.first.toFixed(2) }));
  if (turn.finish && has(`finish_${turn.finish}`)) parts.push(t(`finish_${turn.finish}`));
  if (turn.model) parts.push(turn.model);
  return parts.join(" · ");
}

function buttons(turn, conversation) {
  const list = [];
  const all = siblings(conversation, turn);
  if (all.length > 1) {
    const at = all.indexOf(turn);
    const back = button("older", () => act("choose", all[at - 1]), true);
    const on = button("newer", () => act("choose", all[at + 1]), true);
    back.disabled = at === 0;
    on.disabled = at === all.length - 1;
    list.push(back, make("span", "versions", `${at + 1}/${all.length}`), on);
  }
  if (turn.text) list.push(button("copy", (event) => copy(turn.text, event.currentTarget), true));
  if (turn.role === "user") list.push(button("edit", () => edit(turn, conversation), true));
  if (turn.role !== "assistant") return list;
  list.push(button("retry", () => act("retry", turn), true));
  if (turn.text) list.push(look(turn, conversation, "raw"));
  if (turn.tokens?.length) list.push(look(turn, conversation, "probabilities"));
  return list;
}

// A switch between the formatted answer and another look of it.
function look(turn, conversation, name) {
  const isOn = looks.get(turn) === name;
  const element = button(isOn ? "rendered" : name, () => {
    if (isOn) looks.delete(turn);
    else looks.set(turn, name);
    act("redraw", turn);
  }, true);
  element.setAttribute("aria-pressed", String(isOn));
  return element;
}

export function lookAt(turn, name) {
  looks.set(turn, name);
}

function edit(turn, conversation) {
  const box = make("textarea", "editing", turn.text);
  box.value = turn.text;
  box.dataset.label = "edit";
  direct(box, turn.text);
  box.oninput = () => direct(box, box.value);
  box.rows = Math.min(12, turn.text.split("\n").length + 1);
  editing?.leave();
  editing = { conversation: conversation.id, turn: turn.id, box };
  showEdit(turn, conversation, true);
}

// What is being written stays where it is until it is sent or given up, whatever is drawn anew.
function showEdit(turn, conversation, focused) {
  const article = elements.get(turn.id);
  const { box } = editing;
  const leave = () => {
    editing = null;
    drawBody(turn);
    drawRest(turn, conversation, false);
  };
  editing.leave = leave;
  const sendIt = () => (box.value.trim() ? act("edit", turn, box.value) : leave());
  box.onkeydown = (event) => {
    if (composes(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      sendIt();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      leave();
    }
  };
  article.querySelector(".body").replaceChildren(box);
  article.querySelector(".foot").replaceChildren(button("saveSend", sendIt), button("cancel", leave));
  place(article);
  if (focused) box.focus();
}

export function endEdit() {
  editing = null;
}

// Copies a text; over plain HTTP browsers have no clipboard, but still copy a selection.
export async function copy(text, from) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const box = make("textarea", "unseen");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  const show = (word) => {
    if (from.dataset.icon) from.querySelector(".picture").replaceWith(icon(word));
    else from.textContent = t(word);
  };
  show("copied");
  setTimeout(show, 1500, "copy");
}

turnsElement.addEventListener("click", (event) => {
  const clicked = event.target.closest("button.copy");
  if (clicked) copy(clicked.closest(".code").querySelector("pre").textContent, clicked);
});

// The page: which conversation is open, what the user does, and what the server's state says.

import * as answering from "./answering.js";
import * as tree from "./conversation.js";
import { choosable, closeDrawers, composes, fault, follow, keepUp, toggleDrawer } from "./frame.js";
import * as frame from "./frame.js";
import * as list from "./list.js";
import * as server from "./server.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { place, speak, t } from "./words.js";
import * as view from "./view.js";

const $ = (id) => document.getElementById(id);
const POLL_MILLISECONDS = 5000;
const IMPATIENT_MILLISECONDS = 1000;
const GONE = ["gone", "page", "loading", "stopping", "overloaded", "broke_off"];

let open = tree.create();
let state = { state: "asking", models: [] };

const message = $("message");

// ---- drawing

function chats() {
  return settings.base()?.has_chat_template ?? true;
}

const TITLE = document.title;

function draw() {
  const name = tree.titleOf(open);
  document.title = name ? `${name} – ${TITLE}` : TITLE;
  view.draw(open, chats()).then(keepUp);
  drawComposer();
  keepUp();
  return list.draw(open.id, actions);
}

// The answer of the open conversation that is being written, here or in another tab.
function underWay() {
  return answering.turnOf(open.id) ?? tree.path(open).find(({ state: unfinished }) => unfinished);
}

function drawComposer() {
  const runs = Boolean(underWay());
  $("send").hidden = runs;
  $("stop").hidden = !runs;
  const call = openCall();
  message.placeholder = call ? t("result", { name: call.function.name }) : t("message");
}

function drawRest(turn) {
  const shown = tree.path(open);
  if (shown.includes(turn)) view.drawRest(turn, open, turn === shown[shown.length - 1]);
}

// ---- conversations

let shown = null; // settles when the conversation that the user has chosen last is shown

// Shows a conversation, or an empty one. `how` puts its address where the last one was
// ("replaceState") or after it ("pushState"), so that the browser's buttons go back to that.
function show(id, how = "replaceState") {
  const mine = (shown = load(id, how, () => mine === shown));
  return mine;
}

async function load(id, how, isWanted) {
  let known = answering.conversationOf(id) ?? (await store.get(id));
  if (known) await takeUp(known);
  if (!isWanted()) return undefined; // another was chosen in the meantime
  known = answering.conversationOf(id) ?? known;
  if (id !== open.id) follow();
  open = known ?? tree.create();
  if (location.hash.slice(1) !== (known ? id : "")) history[how](null, "", known ? `#${id}` : "#");
  fault("field");
  return draw();
}

// What is done to a conversation waits until the one that was chosen is there: a question that is
// sent at once would go into the one before it.
async function settled() {
  for (let last; last !== shown; ) await (last = shown);
}

// Goes on with an answer that was being written when its page was left, here or in another tab.
async function takeUp(conversation) {
  const turn = conversation.turns.find(({ state: unfinished }) => unfinished);
  if (!turn || answering.isRunning(conversation.id)) return;
  if (await store.isTaken(conversation.id)) return;
  hear(answering.rejoin, conversation, turn);
}

const actions = {
  open(id) {
    closeDrawers();
    return show(id, "pushState");
  },
  async rename(id, title) {
    const conversation = id === open.id ? open : answering.conversationOf(id);
    if (!conversation) return store.rename(id, title);
    conversation.title = title;
    return store.put(conversation);
  },
  async remove(id) {
    await answering.stop(id);
    await store.remove(id);
    await (id === open.id ? show("") : draw());
  },
  redraw: () => list.draw(open.id, actions),
};

// ---- asking

// The call whose result the user is to write next.
function openCall() {
  const shown = tree.path(open);
  const answer = shown.findLast((turn) => turn.role === "assistant");
  const answered = shown.filter((turn) => turn.role === "tool").map((turn) => turn.answers);
  return answer?.calls?.find((call) => !answered.includes(call.id));
}

function checked() {
  const faults = settings.faults();
  fault("field", faults[0]);
  if (faults.length) toggleDrawer("settings", true);
  if (state.state === "key") askForKey();
  else if (!settings.base()) fault("field", t(state.state === "loading" ? "loading" : "gone"));
  return !faults.length && settings.base() && state.state !== "key";
}

async function ask() {
  await settled();
  if (!message.value.trim() || answering.isRunning(open.id) || !checked()) return;
  const call = openCall();
  const last = tree.path(open).at(-1)?.id ?? 0;
  const fields = call ? { role: "tool", answers: call.id } : { role: "user" };
  const question = tree.add(open, last, { ...fields, text: message.value });
  setDraft("");
  if (openCall()) {
    await store.put(open);
    draw();
  } else {
    await answer(tree.add(open, question.id, { role: "assistant" }));
  }
}

async function answer(turn) {
  const conversation = open;
  history.replaceState(null, "", `#${conversation.id}`);
  if (settings.wantsProbabilities()) view.lookAt(turn, "probabilities");
  follow();
  const heard = hear(answering.run, conversation, turn);
  draw();
  poll();
  const alone = await heard;
  fault("tab", alone ? "" : t("otherTab"));
  if (!alone) await leaveToOther(conversation, turn);
}

// Begins or joins an answer and shows it until its end; returns whether no other tab is at it.
async function hear(begin, conversation, turn) {
  const alone = await begin(conversation, turn, {
    grow(one, event) {
      view.take(one, event);
      if (conversation !== open) return;
      view.grow(one, event);
      if (event.type === "text") drawRest(one);
      if (event.type === "text" && one.text === event.text) $("said").textContent = t("answering");
      keepUp();
    },
    change(one) {
      if (conversation === open) draw();
      else drawRest(one);
    },
  });
  if (!alone) return false;
  if (turn.error?.status === 401) askForKey(turn);
  if (tree.isEmpty(turn) && turn.finish === "stopped") await takeBack(conversation, turn);
  if (conversation === open) {
    $("said").textContent = t("answered");
    draw();
  } else actions.redraw();
  return true;
}

// The other tab's conversation is what counts; what was typed here is not lost.
async function leaveToOther(conversation, turn) {
  const question = tree.find(conversation, turn.parent);
  const theirs = await store.get(conversation.id);
  if (conversation === open) await show(conversation.id);
  const isThere = theirs && tree.find(theirs, question.id);
  if (!isThere && !message.value) setDraft(question.text);
}

// Nothing has come before it was stopped: a question goes back to where it was typed.
async function takeBack(conversation, turn) {
  const question = tree.find(conversation, turn.parent);
  if (!(await store.get(conversation.id))) return; // it has been deleted
  tree.remove(conversation, turn);
  if (!tree.siblings(conversation, turn).length && question.role === "user" && !message.value) {
    tree.remove(conversation, question);
    if (conversation === open) setDraft(question.text);
  }
  if (conversation.turns.length) await store.put(conversation);
  else await store.remove(conversation.id);
}

view.onAction(async (what, clicked, text) => {
  let turn = clicked;
  if (what === "redraw") {
    view.drawBody(turn);
    drawRest(turn);
    return;
  }
  const { id } = open;
  await settled();
  turn = tree.find(open, turn.id); // as it is now, where another tab has changed it
  if (open.id !== id || !turn || answering.isRunning(id)) return;
  if (what === "choose") {
    tree.choose(open, turn);
    await store.put(open);
    draw();
  } else if (!checked()) {
    draw();
  } else if (what === "edit") {
    view.endEdit();
    const question = tree.add(open, turn.parent, { role: turn.role, answers: turn.answers, text });
    await answer(tree.add(open, question.id, { role: "assistant" }));
  } else if (what === "retry") {
    // What failed without a word is nothing to compare with.
    const fresh = tree.isEmpty(turn) ? turn : tree.add(open, turn.parent, { role: "assistant" });
    await answer(fresh);
  } else {
    await answer(turn);
  }
});

// ---- the server's state

let timer = 0;
let asking = null;

// Asks how the server is, now and again.
async function poll() {
  clearTimeout(timer);
  if (!document.hidden) {
    const mine = (asking ??= server.status().catch(() => ({ state: "page", models: [] })));
    const answer = await mine;
    if (asking !== mine) return; // what was asked later counts: it had another key
    asking = null;
    const before = state.state;
    state = answer;
    if (state.models.length) settings.offer(state.models);
    drawState(before);
  }
  const elsewhere = () => tree.path(open).at(-1)?.state && !answering.isRunning(open.id);
  if (elsewhere() && !(await store.isTaken(open.id))) await show(open.id); // its tab was closed
  clearTimeout(timer);
  const waits = answering.turnOf(open.id)?.state === "asked" || elsewhere();
  const impatient = state.state !== "ok" || waits;
  timer = setTimeout(poll, impatient ? IMPATIENT_MILLISECONDS : POLL_MILLISECONDS);
}

function drawState(before) {
  const busy = state.state === "ok" && state.waiting > 0;
  const name = busy ? "busy" : state.state;
  $("status").dataset.state = name;
  const words = [t(`state_${name}`, state)];
  if (state.state === "ok") words.push(settings.base().id);
  const text = words.join(" · ");
  if ($("status").textContent !== text) $("status").textContent = text;
  if (state.state === "ok") mended();
  const turn = answering.turnOf(open.id);
  if (turn?.state === "asked") {
    // Whoever came later stands behind. Without a place so far, the question was still on its way.
    turn.place = busy ? Math.min(turn.place || Infinity, state.waiting) : 0;
    drawRest(turn);
  }
  if (state.state === "key" && before !== "key") askForKey();
  if (state.state === "ok" && before === "key") leaveKey();
  if (before === "asking" || (before !== "ok" && state.state === "ok")) draw();
}

// Errors that told of a server that did not answer go when it does.
function mended() {
  fault("field");
  for (const turn of tree.path(open)) {
    if (turn.error && GONE.includes(turn.error.code)) {
      delete turn.error;
      drawRest(turn);
    }
  }
}

function askForKey(turn, wrong = false) {
  if ($("key").open) return;
  $("key-value").value = "";
  $("key-wrong").hidden = !wrong;
  $("key").showModal();
  $("key").oncancel = leaveKey;
  $("key").onclose = async () => {
    if (!$("key-value").value) return;
    store.keepKey($("key-value").value);
    asking = null;
    await poll();
    if (state.state === "key") askForKey(turn, true);
    else if (turn?.error && !answering.isRunning(open.id)) answer(turn);
  };
}

function leaveKey() {
  $("key-value").value = ""; // what was not confirmed is no key
  $("key").close();
}

// ---- the page around it

function setDraft(text) {
  message.value = text;
  message.dispatchEvent(new Event("input"));
}

function fit() {
  if (CSS.supports("field-sizing", "content")) return; // page.css does it
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function listen() {
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
    event.preventDefault();
    ask();
  });
  message.addEventListener("input", () => {
    view.direct(message, message.value);
    fit();
    store.keepDraft(message.value);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || composes(event) || $("key").open) return;
    if (event.target === $("search") && $("search").value) return; // the browser empties it
    if (underWay()) answering.stop(open.id, underWay());
    else closeDrawers();
  });
  $("send").addEventListener("click", ask);
  $("stop").addEventListener("click", () => answering.stop(open.id, underWay()));
  $("new").addEventListener("click", () => {
    actions.open("");
    message.focus();
  });
  $("search").addEventListener("input", actions.redraw);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    try {
      fault("import");
      show((await list.take(file)).id);
    } catch (error) {
      fault("import", error.message);
    }
  });
  $("defaults").addEventListener("click", settings.reset);
  $("key-ok").addEventListener("click", () => $("key").close());
  $("key-value").addEventListener("keydown", (event) => {
    if (event.key === "Enter") $("key").close();
  });
  window.addEventListener("pagehide", answering.keepAll);
  window.addEventListener("hashchange", () => show(location.hash.slice(1)));
  document.addEventListener("visibilitychange", poll);
  store.onRefused((error) => fault("store", error && t("notKept", { why: error.message })));
  store.onChange(({ id, title, isGone }) => {
    // This tab writes it; all that another does to it is to give it a title or to delete it.
    if (answering.isRunning(id) && isGone) return actions.remove(id);
    if (answering.isRunning(id)) answering.conversationOf(id).title = title;
    return id === open.id && !answering.isRunning(id) ? show(id) : actions.redraw();
  });
}

async function start() {
  settings.build($("fields"), () => fault("field"));
  choosable("language", (language) => {
    speak(language);
    drawState(state.state);
    draw();
  });
  frame.build();
  listen();
  place(document.body);
  setDraft(store.draft());
  shown = showFirst();
  poll();
  await shown;
  message.focus();
}

async function showFirst() {
  await store.open().catch((error) => fault("store", t("notKept", { why: error.message })));
  for (const conversation of await store.all()) await takeUp(conversation);
  await show(location.hash.slice(1));
}

start();

// The list of conversations: open, rename, export, import, delete.

import { asJson, asMarkdown, fromJson, titleOf } from "./conversation.js";
import { composes } from "./frame.js";
import * as store from "./store.js";
import { place, t } from "./words.js";

const listElement = document.getElementById("list");
const searchElement = document.getElementById("search");
let postponed = null; // what was to be drawn while the user was at a menu or a title

function make(tag, word, onClick) {
  const element = document.createElement(tag);
  if (word) element.dataset.word = word;
  if (onClick) element.addEventListener("click", onClick);
  if (tag === "button") element.type = "button";
  return element;
}

// Draws the list; `open` is the id of the conversation that is shown.
export async function draw(open, actions) {
  const all = await store.all();
  postponed = null;
  if (listElement.querySelector("input, details[open]")) {
    postponed = [open, actions];
    return;
  }
  const wanted = searchElement.value.trim().toLowerCase();
  const found = all.filter((one) => !wanted || has(one, wanted));
  const items = found.map((conversation) => {
    const item = make("li");
    item.dataset.id = conversation.id;
    item.classList.toggle("busy", conversation.turns.some(({ state }) => state));
    const title = titleOf(conversation) || t("untitled");
    const name = make("button", "", () => actions.open(conversation.id));
    name.className = "name";
    name.textContent = title;
    name.title = title;
    if (conversation.id === open) name.setAttribute("aria-current", "true");
    const menu = make("details");
    const summary = make("summary");
    summary.dataset.icon = summary.dataset.label = "more";
    menu.append(
      summary,
      make("button", "rename", () => rename(conversation, item, actions)),
      make("button", "asMarkdown", () => save(conversation, title, "md")),
      make("button", "asJson", () => save(conversation, title, "json")),
      make("button", "remove", () => {
        if (window.confirm(t("reallyRemove", { title }))) actions.remove(conversation.id);
      }),
    );
    menu.addEventListener("click", (event) => {
      if (event.target.matches("button")) menu.open = false;
    });
    menu.addEventListener("focusout", (event) => {
      if (!menu.contains(event.relatedTarget)) menu.open = false;
    });
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation(); // an answer goes on
      menu.open = false;
      summary.focus();
    });
    menu.addEventListener("toggle", () => {
      if (!menu.open && postponed) draw(...postponed);
    });
    item.append(name, menu);
    return item;
  });
  const focused = listElement.contains(document.activeElement) ? document.activeElement : null;
  const [at, what] = [focused?.closest("li").dataset.id, focused?.tagName];
  const groups = found.map(({ updated }) => age(updated));
  const shown = items.flatMap((item, index) =>
    groups[index] === groups[index - 1] ? [item] : [heading(groups[index]), item]);
  if (wanted && !found.length) shown.push(heading("nothingFound"));
  listElement.replaceChildren(...shown);
  place(listElement);
  if (focused) items.find((item) => item.dataset.id === at)?.querySelector(what)?.focus();
}

function has(conversation, wanted) {
  const texts = [titleOf(conversation), ...conversation.turns.map(({ text }) => text)];
  return texts.some((text) => text.toLowerCase().includes(wanted));
}

function heading(word) {
  const element = make("li", word);
  element.className = "group";
  return element;
}

// The word for the days since then.
function age(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 864e5);
  return days < 1 ? "today" : days < 2 ? "yesterday" : days < 8 ? "week" : "earlier";
}

function rename(conversation, item, actions) {
  const box = document.createElement("input");
  box.value = titleOf(conversation);
  box.dataset.label = "rename";
  let isDone = false;
  const done = async (keep) => {
    if (isDone || !box.isConnected) return;
    isDone = true; // a box that is taken away loses the focus, too
    const title = box.value.trim();
    box.remove();
    if (keep && title) await actions.rename(conversation.id, title);
    actions.redraw();
  };
  box.addEventListener("keydown", (event) => {
    if (composes(event)) return;
    if (event.key === "Enter") done(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      done(false);
    }
  });
  box.addEventListener("blur", () => done(true));
  item.replaceChildren(box);
  place(item);
  box.select();
}

function save(conversation, title, ending) {
  const names = { user: t("you"), assistant: t("model"), tool: t("tool") };
  const text = ending === "md" ? asMarkdown(conversation, names) : asJson(conversation);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  link.download = `${title.replace(/[\\/:*?"<>|\u0000-\u001f]+/g, " ").trim() || "chat"}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Takes in a file that this page exported; throws what is wrong with it.
export async function take(file) {
  try {
    const conversation = fromJson(await file.text());
    await store.put(conversation);
    return conversation;
  } catch (error) {
    throw new Error(t("badImport", { name: file.name, why: error.message }));
  }
}

// What is around a conversation: scrolling along, drawers on narrow screens, colours, lines of errors.

import * as store from "./store.js";
import { t } from "./words.js";

const LONGEST = 1_000_000; // characters of a text; contexts of 128k tokens hold about half of them

const $ = (id) => document.getElementById(id);
const scroll = $("scroll");

// ---- scrolling

let follows = true; // whether the page scrolls along

export function follow() {
  follows = true;
}

export function keepUp() {
  if (follows) scroll.scrollTop = scroll.scrollHeight;
}

function listenToScrolling() {
  let last = 0;
  scroll.addEventListener("scroll", () => {
    const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
    if (atEnd) follows = true;
    else if (scroll.scrollTop < last) follows = false;
    last = scroll.scrollTop;
    $("down").hidden = atEnd;
  });
  $("down").addEventListener("click", () => {
    follow();
    keepUp();
  });
  new ResizeObserver(keepUp).observe(scroll);
}

// ---- errors

// Shows the line of one kind, or takes it away.
export function fault(kind, text) {
  for (const old of $("errors").querySelectorAll(`[data-kind="${kind}"]`)) old.remove();
  if (!text) return;
  const line = document.createElement("p");
  line.dataset.kind = kind;
  line.textContent = text;
  $("errors").append(line);
}

// Keeps a text from growing over the limit, before it is laid out, which would take a minute.
function holdToLimit(event) {
  const box = event.target;
  const size = box.value.length + (event.data?.length ?? 0) - (box.selectionEnd - box.selectionStart);
  if (!event.data || size <= LONGEST) return fault("size");
  event.preventDefault();
  fault("size", t("tooLong", { size: size.toLocaleString(), most: LONGEST.toLocaleString() }));
}

// ---- keys, drawers and colours

// Whether a key belongs to an input method, as Chinese and Japanese are typed with. Safari has ended
// the composition by the time of its last key, which has this number.
export function composes(event) {
  return event.isComposing || event.keyCode === 229;
}

// Returns whether it is open now. The keyboard does not stay in one that is closed.
export function toggleDrawer(id, on) {
  const [drawer, opener] = [$(id), $(`open-${id}`)];
  const isHeld = drawer.contains(document.activeElement);
  const isOpen = document.body.classList.toggle(`shows-${id}`, on);
  opener.setAttribute("aria-expanded", String(isOpen));
  if (!isOpen && isHeld) opener.focus();
  return isOpen;
}

// Settings stand beside the conversation where there is room, and over it elsewhere.
const wide = window.matchMedia("(min-width: 1200px)");

export function closeDrawers() {
  toggleDrawer("conversations", false);
  toggleDrawer("settings", wide.matches && document.body.classList.contains("shows-settings"));
}

function listenToDrawers() {
  for (const each of document.querySelectorAll("[data-opens]")) {
    each.addEventListener("click", () => {
      const id = each.dataset.opens;
      if (toggleDrawer(id)) $(id).querySelector(".close").focus();
    });
  }
  for (const each of document.querySelectorAll("[data-closes]")) {
    each.addEventListener("click", () => toggleDrawer(each.dataset.closes, false));
  }
  document.querySelector("main").addEventListener("click", (event) => {
    if (event.target === event.currentTarget) closeDrawers(); // what is beside an open one
  });
  toggleDrawer("conversations", false);
  toggleDrawer("settings", wide.matches);
  wide.addEventListener("change", () => toggleDrawer("settings", wide.matches));
}

// A field of the page's looks, which are remembered; calls back with its value, now and later.
export function choosable(id, apply) {
  const select = $(id);
  select.value = store.kept("looks")[id] ?? "";
  select.addEventListener("change", () => {
    store.keep("looks", { ...store.kept("looks"), [id]: select.value });
    apply(select.value);
  });
  apply(select.value);
}

const night = window.matchMedia("(prefers-color-scheme: dark)");

function dress(theme) {
  document.documentElement.dataset.theme = theme || (night.matches ? "dark" : "light");
}

export function build() {
  choosable("theme", dress);
  night.addEventListener("change", () => dress($("theme").value));
  document.addEventListener("beforeinput", holdToLimit);
  listenToDrawers();
  listenToScrolling();
}

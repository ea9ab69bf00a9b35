// What the browser keeps: conversations (IndexedDB), settings (local storage), the server's key
// (this tab's session).

const ROOT = document.documentElement.dataset.root;
const NAME = `chat${ROOT}`;

// What the browser refuses to keep, or has no room for.
const memory = new Map();
let database = null;
let refused = () => {};

function asPromise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// Throws where the browser keeps nothing; conversations then live as long as the tab.
export async function open() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
  database = await asPromise(request);
  // The user has cleared what this site keeps; `write` opens another.
  database.onclose = () => { database = null; };
}

// Calls back with the error when something could not be kept, and with null when something was.
export function onRefused(callback) {
  refused = callback;
}

function store(mode) {
  return database.transaction("conversations", mode).objectStore("conversations");
}

// A full disk fails a transaction after its requests have succeeded.
function written(work) {
  const place = store("readwrite");
  return new Promise((resolve, reject) => {
    place.transaction.oncomplete = () => resolve();
    place.transaction.onabort = () => reject(place.transaction.error);
    work(place);
  });
}

// Returns whether the browser has kept what `work` writes.
async function write(work) {
  try {
    if (!database) await open();
    await written(work);
    refused(null);
    return true;
  } catch (error) {
    refused(error);
    return false;
  }
}

async function read(work) {
  try {
    return database ? await asPromise(work(store("readonly"))) : undefined;
  } catch (error) {
    refused(error);
    return undefined;
  }
}

// All conversations, the newest first.
export async function all() {
  const kept = (await read((place) => place.getAll())) ?? [];
  const found = kept.filter(({ id }) => !memory.has(id)).concat([...memory.values()]);
  return found.sort((a, b) => b.updated - a.updated);
}

export async function get(id) {
  return memory.get(id) ?? read((place) => place.get(id));
}

export async function put(conversation) {
  const { id, title } = conversation;
  if (await write((place) => place.put(conversation))) memory.delete(id);
  else memory.set(id, conversation);
  channel.postMessage({ id, title });
}

// Gives a conversation that nobody has open here another title, whatever another tab writes to it.
export async function rename(id, title) {
  if (!database || memory.has(id)) return put({ ...(await get(id)), title });
  await write((place) => {
    place.get(id).onsuccess = ({ target: { result } }) => {
      if (result) place.put({ ...result, title });
    };
  });
  return channel.postMessage({ id, title });
}

export async function remove(id) {
  memory.delete(id);
  await write((place) => place.delete(id));
  channel.postMessage({ id, isGone: true });
}

const channel = new BroadcastChannel(NAME);

// Calls back with id and title of a conversation that another tab has changed, or `isGone`.
export function onChange(callback) {
  channel.onmessage = ({ data }) => callback(data);
}

// The locks that tabs hold. Browsers have none for pages that are neither local nor came over TLS,
// nor where the user forbids sites to keep anything.
async function locks() {
  try {
    return (await navigator.locks.query()).held;
  } catch {
    return null;
  }
}

// Runs something while no other tab works on the conversation; returns whether it could.
export async function alone(id, work) {
  if (!(await locks())) {
    await work();
    return true;
  }
  return navigator.locks.request(`${NAME}-${id}`, { ifAvailable: true }, async (lock) => {
    if (lock) await work();
    return lock !== null;
  });
}

export async function isTaken(id) {
  const held = (await locks()) ?? [];
  return held.some((lock) => lock.name === `${NAME}-${id}`);
}

// The browser's storages by name; each counts until the tab is closed where it is full or forbidden.
const spare = {};

function readText(storage, name) {
  try {
    return window[storage].getItem(`chat-${name}${ROOT}`) ?? spare[name] ?? null;
  } catch {
    return spare[name] ?? null;
  }
}

function writeText(storage, name, text) {
  spare[name] = text;
  try {
    if (text === null) window[storage].removeItem(`chat-${name}${ROOT}`);
    else window[storage].setItem(`chat-${name}${ROOT}`, text);
  } catch {
    // It is in `spare`.
  }
}

// What was kept under a name: "settings" or "looks".
export function kept(name) {
  try {
    return JSON.parse(readText("localStorage", name)) ?? {};
  } catch {
    return {};
  }
}

export function keep(name, values) {
  writeText("localStorage", name, JSON.stringify(values));
}

// What has come of an answer when its page goes: a database would be too slow for that.
export function keepLast(id, turn) {
  keep(`last-${id}`, turn);
}

// What was kept of an answer, once; an empty object where nothing was.
export function takeLast(id) {
  const last = kept(`last-${id}`);
  writeText("localStorage", `last-${id}`, null);
  return last;
}

export const apiKey = () => readText("sessionStorage", "key");
export const keepKey = (key) => writeText("sessionStorage", "key", key);
export const draft = () => readText("sessionStorage", "draft") ?? "";
export const keepDraft = (text) => writeText("sessionStorage", "draft", text);

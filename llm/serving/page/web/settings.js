// The settings beside the conversation: their fields, what they mean for the API, remembering them.

import * as store from "./store.js";
import { t } from "./words.js";

const LARGEST_SEED = Number.MAX_SAFE_INTEGER;

// Numbers without a value are the server's choice; `empty` names it. `chat`: not for models that
// only continue a text.
const FIELDS = [
  { name: "model", word: "model_field", kind: "select" },
  { name: "system", kind: "text", empty: "none", chat: true },
  { name: "temperature", kind: "number", min: 0, max: 2, step: 0.05, first: 0.7, range: true },
  { name: "top_p", kind: "number", min: 0.01, max: 1, step: 0.01, first: 1, range: true },
  { name: "top_k", kind: "number", min: 0, max: 1e6, whole: true, empty: "off" },
  { name: "repetition_penalty", kind: "number", min: 0.01, max: 100, step: 0.05, empty: "off" },
  { name: "max_tokens", kind: "number", min: 1, max: 1e9, whole: true, empty: "limit" },
  { name: "seed", kind: "number", min: 0, max: LARGEST_SEED, whole: true, empty: "random" },
  { name: "stop", word: "stop_field", kind: "text", empty: "none" },
  { name: "logprobs", kind: "check" },
  { name: "tools", kind: "text", empty: "none", chat: true },
];

const ALTERNATIVES = 5; // to a token, shown beside its probability

let values = {};
let models = [];
const places = {};

function firstValues() {
  return Object.fromEntries(FIELDS.map(({ name, first, kind }) =>
    [name, kind === "check" ? false : String(first ?? "")]));
}

// Builds the fields in an element; calls back when one has changed.
export function build(element, onChange) {
  values = { ...firstValues(), ...store.kept("settings") };
  for (const field of FIELDS) element.append(row(field, onChange));
  show();
}

export function reset() {
  values = { ...firstValues(), model: base()?.id ?? "" };
  store.keep("settings", values);
  show();
}

function row(field, onChange) {
  const label = document.createElement("label");
  const name = document.createElement("span");
  name.dataset.word = field.word ?? field.name;
  const input = document.createElement(
    field.kind === "select" ? "select" : field.kind === "text" ? "textarea" : "input");
  if (field.kind === "number") Object.assign(input, { type: "number", inputMode: "decimal" });
  if (field.kind === "check") input.type = "checkbox";
  if (field.kind === "number") {
    Object.assign(input, { min: field.min, max: field.max, step: field.whole ? 1 : "any" });
  }
  if (field.empty) input.dataset.placeholder = field.empty;
  input.id = `set-${field.name}`;
  label.className = `field ${field.kind}`;
  label.append(name, input);
  const inputs = [input];
  if (field.range) {
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: field.min, max: field.max, step: field.step });
    slider.dataset.label = field.name;
    label.append(slider);
    inputs.push(slider);
  }
  for (const each of inputs) {
    each.addEventListener("input", () => {
      values[field.name] = field.kind === "check" ? each.checked : each.value;
      store.keep("settings", values);
      for (const other of inputs) if (other !== each) other.value = each.value;
      input.setAttribute("aria-invalid", String(Boolean(fault(field))));
      onChange();
    });
  }
  places[field.name] = { label, inputs };
  return label;
}

function show() {
  for (const field of FIELDS) {
    const { label, inputs } = places[field.name];
    for (const input of inputs) {
      if (field.kind === "check") input.checked = values[field.name];
      else input.value = values[field.name];
    }
    inputs[0].setAttribute("aria-invalid", String(Boolean(fault(field))));
    label.hidden = Boolean(field.chat) && models.length > 0 && !base().has_chat_template;
  }
}

// Takes the models that the API lists; the first one that stands on no other is the base.
export function offer(list) {
  if (JSON.stringify(list) === JSON.stringify(models)) return;
  models = list;
  const select = places.model.inputs[0];
  select.replaceChildren(...list.map((model) => new Option(model.id, model.id)));
  if (!list.some((model) => model.id === values.model)) values.model = base()?.id ?? "";
  show();
}

export function base() {
  return models.find((model) => !model.parent) ?? models[0];
}

export function wantsProbabilities() {
  return values.logprobs;
}

export function system() {
  return values.system.trim() && base().has_chat_template ? values.system : "";
}

// What is wrong with a field, in words; an empty string where nothing is.
function fault(field) {
  const text = String(values[field.name]).trim();
  if (field.kind === "number") {
    if (!text && !places[field.name].inputs[0].validity.badInput) return "";
    const number = Number(text);
    const fits = text !== "" && number >= field.min && number <= field.max;
    if (fits && (!field.whole || Number.isInteger(number))) return "";
    return t(field.whole ? "whole" : "between", field);
  }
  if (field.name === "tools" && text) {
    try {
      if (Array.isArray(JSON.parse(text))) return "";
    } catch {
      // Said below.
    }
    return t("badTools");
  }
  return "";
}

// A line for each field that cannot be sent.
export function faults() {
  return FIELDS.filter((field) => !places[field.name].label.hidden && fault(field)).map((field) =>
    t("badField", {
      name: t(field.word ?? field.name),
      value: JSON.stringify(values[field.name].slice(0, 40)),
      why: fault(field),
    }));
}

// The settings as fields of the API.
export function fields() {
  const body = { model: values.model };
  for (const { name, kind } of FIELDS) {
    if (kind === "number" && values[name].trim() !== "") body[name] = Number(values[name]);
  }
  const stops = values.stop.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  const chats = base().has_chat_template;
  if (values.logprobs) {
    Object.assign(body, chats ? { logprobs: true, top_logprobs: ALTERNATIVES }
      : { logprobs: ALTERNATIVES });
  }
  if (chats && values.tools.trim()) body.tools = JSON.parse(values.tools);
  // Completions are short unless a length is asked for.
  if (!chats) body.max_tokens ??= base().max_new_tokens;
  return body;
}

// Settings of a conversation: instructions, sampling, thinking, schema of the answer, tools.

import { ask, cancelButton } from "./dialog.js";
import { element } from "./dom.js";
import { count, text } from "./i18n.js";

// Settings that are numbers, by their names in a request.
export const NUMBERS = [
  { name: "temperature", label: text("temperature"), low: 0, high: 2 },
  { name: "top_p", label: text("topP"), low: 0, high: 1 },
  { name: "top_k", label: text("topK"), low: 0, high: 2 ** 31, isWhole: true },
  { name: "min_p", label: text("minP"), low: 0, high: 1 },
  { name: "seed", label: text("seed"), low: 0, high: Number.MAX_SAFE_INTEGER, isWhole: true },
  { name: "max_tokens", label: text("maxTokens"), low: 1, high: 2 ** 31, isWhole: true },
];

// Edit the settings of a conversation; resolves with the new ones, or null. `defaults` has the model's sampling parameters.
export async function editSettings(settings, defaults) {
  const system = textField("system", text("systemPrompt"), settings.system ?? "", 4);
  const numbers = NUMBERS.map((number) => numberField(number, settings[number.name], defaults[number.name]));
  const thinking = thinkingField(settings.thinking);
  const schema = jsonField("schema", text("schema"), settings.schema, isObject, text("notAnObject"));
  const tools = jsonField("tools", text("tools"), settings.tools, Array.isArray, text("notAList"), text("toolsHint"));
  const fields = [system, ...numbers, thinking, schema, tools];
  const grid = element("div", { class: "grid" }, ...[...numbers, thinking].map(({ node }) => node));
  let edited = null;
  const check = () => {
    edited = readFields(fields);
    return edited !== null;
  };
  const clear = () => {
    for (const { input } of fields) input.value = "";
    system.input.focus();
  };
  const answer = await ask(
    text("settings"),
    [system.node, grid, schema.node, tools.node],
    [
      { label: text("defaults"), run: clear },
      cancelButton(),
      { label: text("save"), value: "save", kind: "primary", check },
    ],
  );
  return answer === "save" ? edited : null;
}

// Return the values of all fields by name; null if one is wrong, which then shows why.
function readFields(fields) {
  const values = {};
  let firstWrong = null;
  for (const { name, input, error, read } of fields) {
    error.textContent = "";
    input.removeAttribute("aria-invalid");
    try {
      const value = read();
      if (value !== undefined) values[name] = value;
    } catch (problem) {
      error.textContent = problem.message;
      input.setAttribute("aria-invalid", "true");
      firstWrong ??= input;
    }
  }
  firstWrong?.focus();
  return firstWrong ? null : values;
}

// Return a field with a label and a place for an error. `read` returns the value, or undefined if the field is empty.
function field(name, label, input, read, hint = null) {
  input.id = `setting-${name}`;
  const error = element("p", { class: "error", id: `${input.id}-error`, role: "alert" });
  input.setAttribute("aria-describedby", error.id);
  const parts = [element("label", { for: input.id }, label), input, hint && element("p", { class: "hint" }, hint), error];
  return { name, node: element("div", { class: "field" }, ...parts), input, error, read };
}

const textArea = (value, rows) => element("textarea", { rows: String(rows), value, spellcheck: "false" });

function textField(name, label, value, rows) {
  const input = textArea(value, rows);
  return field(name, label, input, () => input.value.trim() || undefined);
}

function numberField({ name, label, low, high, isWhole = false }, value, placeholder) {
  const input = element("input", {
    type: "number",
    min: String(low),
    max: String(high),
    step: isWhole ? "1" : "any",
    value: value === undefined ? "" : String(value),
    placeholder: placeholder === undefined ? "" : String(placeholder),
  });
  const read = () => {
    if (input.value === "" && !input.validity.badInput) return undefined;
    const number = Number(input.value);
    if (input.validity.valid && number >= low && number <= high && (!isWhole || Number.isInteger(number))) return number;
    throw new Error(isWhole ? text("notWhole", { low, high: count(high) }) : text("outOfRange", { low, high }));
  };
  return field(name, label, input, read);
}

function thinkingField(value) {
  const options = [["", text("modelDefault")], ["on", text("on")], ["off", text("off")]];
  const input = element("select", {}, ...options.map(([option, label]) => element("option", { value: option }, label)));
  input.value = value === undefined ? "" : value ? "on" : "off";
  return field("thinking", text("thinkingMode"), input, () => (input.value ? input.value === "on" : undefined));
}

// Return a field with JSON for which `isValid` must be true.
function jsonField(name, label, value, isValid, message, hint = null) {
  const input = textArea(value === undefined ? "" : JSON.stringify(value, null, 2), 3);
  const read = () => {
    if (!input.value.trim()) return undefined;
    const json = parseJson(input.value);
    if (!isValid(json)) throw new Error(message);
    return json;
  };
  return field(name, label, input, read, hint);
}

function parseJson(content) {
  try {
    return JSON.parse(content);
  } catch (error) {
    throw new Error(text("invalidJson", { message: error.message }));
  }
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

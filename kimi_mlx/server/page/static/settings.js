// Settings of a conversation: instructions, sampling, thinking, schema of the answer, tools.

import { ask, cancelButton } from "./dialog.js";
import { element } from "./dom.js";
import { text } from "./i18n.js";

// Settings of the request that are numbers, by their names there.
export const NUMBERS = [
  { name: "temperature", label: "temperature", low: 0, high: 2, step: "any" },
  { name: "top_p", label: "topP", low: 0, high: 1, step: "any" },
  { name: "top_k", label: "topK", low: 0, high: 2 ** 31, step: 1 },
  { name: "min_p", label: "minP", low: 0, high: 1, step: "any" },
  { name: "seed", label: "seed", low: 0, high: Number.MAX_SAFE_INTEGER, step: 1 },
  { name: "max_tokens", label: "maxTokens", low: 1, high: 2 ** 31, step: 1 },
];

function field(label, input, hint = null) {
  input.id = `setting-${label}`;
  const error = element("p", { class: "error", id: `${input.id}-error`, role: "alert" });
  input.setAttribute("aria-describedby", error.id);
  const parts = [element("label", { for: input.id }, text(label)), input, hint && element("p", { class: "hint" }, hint), error];
  return { node: element("div", { class: "field" }, ...parts), input, error };
}

function area(value, rows) {
  return element("textarea", { rows: String(rows), value, spellcheck: "false" });
}

const jsonText = (value) => (value === undefined ? "" : JSON.stringify(value, null, 2));

// Parse the JSON of a field; undefined if it is empty.
function parse(content, check, message) {
  if (!content.trim()) return undefined;
  let value;
  try {
    value = JSON.parse(content);
  } catch (error) {
    throw new Error(text("invalidJson", { message: error.message }));
  }
  if (!check(value)) throw new Error(text(message));
  return value;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function readNumber({ name, low, high, step }, input) {
  if (input.value === "" && !input.validity.badInput) return undefined;
  const value = Number(input.value);
  const isRight = input.validity.valid && value >= low && value <= high && (step !== 1 || Number.isInteger(value));
  if (!isRight) throw new Error(text("outOfRange", { low, high: name === "top_k" || name === "max_tokens" ? "2³¹" : high }));
  return value;
}

// Edit the settings of a conversation; resolves with the new ones, or null.
export async function editSettings(settings, defaults) {
  const system = field("systemPrompt", area(settings.system ?? "", 4));
  const numbers = NUMBERS.map((number) => {
    const input = element("input", {
      type: "number",
      min: String(number.low),
      max: String(number.high),
      step: String(number.step),
      value: settings[number.name] === undefined ? "" : String(settings[number.name]),
      placeholder: defaults[number.name] === undefined ? "" : String(defaults[number.name]),
    });
    return { number, ...field(number.label, input) };
  });
  const thinking = field(
    "thinkingMode",
    element(
      "select",
      {},
      ...[["", "modelDefault"], ["on", "on"], ["off", "off"]].map(([value, label]) => element("option", { value }, text(label))),
    ),
  );
  thinking.input.value = settings.thinking === undefined ? "" : settings.thinking ? "on" : "off";
  const schema = field("schema", area(jsonText(settings.schema), 3));
  const tools = field("tools", area(jsonText(settings.tools), 3), text("toolsHint"));
  let result = null;

  const read = (part, reader) => {
    part.error.textContent = "";
    part.input.removeAttribute("aria-invalid");
    try {
      return reader();
    } catch (error) {
      part.error.textContent = error.message;
      part.input.setAttribute("aria-invalid", "true");
      part.input.focus();
      result = null;
      return undefined;
    }
  };
  const check = () => {
    result = {};
    const values = {
      tools: read(tools, () => parse(tools.input.value, Array.isArray, "notAList")),
      schema: read(schema, () => parse(schema.input.value, isObject, "notAnObject")),
    };
    for (const part of numbers) values[part.number.name] = read(part, () => readNumber(part.number, part.input));
    if (result === null) return false;
    values.system = system.input.value.trim() || undefined;
    values.thinking = thinking.input.value ? thinking.input.value === "on" : undefined;
    result = Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));
    return true;
  };
  const answer = await ask(
    text("settings"),
    [system.node, element("div", { class: "grid" }, ...numbers.map(({ node }) => node), thinking.node), schema.node, tools.node],
    [
      { label: text("defaults"), value: "defaults" },
      cancelButton(),
      { label: text("save"), value: "save", kind: "primary", check },
    ],
  );
  if (answer === "defaults") return {};
  return answer === "save" ? result : null;
}

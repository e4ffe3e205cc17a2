// Export and import of conversations. An imported file is not trusted: each known field is checked, all others are dropped.

import { element } from "./dom.js";
import { bytes, text } from "./i18n.js";
import { fenced } from "./markdown.js";
import { textOf } from "./messages.js";
import { NUMBERS } from "./settings.js";
import * as store from "./store.js";

const FORMAT = "kimi-mlx-conversations";
const MAX_BYTES = 200_000_000;
const ROLES = ["user", "assistant", "tool"];
const FINISH_REASONS = ["stop", "length", "tool_calls", "stopped", "error", null];
const SETTING_TYPES = {
  ...Object.fromEntries(NUMBERS.map(({ name }) => [name, "number"])),
  ...{ system: "string", thinking: "boolean", schema: "object", tools: "object" },
};

// Save text as a file of the user.
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// Return conversations with all their branches as JSON.
export async function toJson(conversations) {
  const items = [];
  for (const item of conversations) {
    const messages = await store.messages(item.id);
    items.push({ ...item, messages: messages.sort((a, b) => a.created - b.created) });
  }
  return JSON.stringify({ format: FORMAT, version: 1, conversations: items }, null, 1);
}

// Return a branch of a conversation as Markdown.
export function toMarkdown(conversation, path) {
  const parts = [`# ${conversation.title.replaceAll("\n", " ")}`];
  if (conversation.settings.system) parts.push(`## ${text("instructions")}`, conversation.settings.system);
  for (const message of path) {
    const names = { user: text("you"), assistant: conversation.model || "Kimi", tool: text("tool") };
    parts.push(`## ${names[message.role]}`);
    if (message.reasoning) parts.push(message.reasoning.replace(/^/gm, "> "));
    const content = typeof message.content === "string" ? message.content : message.content.map(partText).join("\n\n");
    if (content) parts.push(content);
    for (const call of message.toolCalls ?? []) parts.push(`\`${call.name}\`\n\n${fenced(call.arguments, "json")}`);
  }
  return `${parts.join("\n\n")}\n`;
}

const partText = (part) => (part.type === "text" ? part.text : `*(${part.type.replace("_url", "")})*`);

// Save the conversations of a file; return their ids. The file is an export of this page, or has messages in OpenAI's
// format: a list, or {"messages": [...]}.
export async function importFile(file) {
  if (file.size > MAX_BYTES) {
    throw new Error(text("tooLarge", { name: file.name, size: bytes(file.size), limit: bytes(MAX_BYTES) }));
  }
  const value = JSON.parse(await file.text());
  const name = file.name.replace(/\.json$/i, "");
  const items = value?.format === FORMAT ? value.conversations : [fromOpenAI(value, name)];
  if (!Array.isArray(items)) throw new Error('"conversations" is not a list');
  const imported = items.map(readConversation); // all of them are checked before any is saved
  for (const { conversation, messages } of imported) {
    await store.saveAll(conversation, messages);
  }
  return imported.map(({ conversation }) => conversation.id);
}

function fromOpenAI(value, title) {
  const list = Array.isArray(value) ? value : value?.messages;
  if (!Array.isArray(list)) throw new Error('"messages" is not a list');
  const settings = {};
  const messages = [];
  for (const item of list) {
    if (item?.role === "system" && messages.length === 0) settings.system = textOf(item.content);
    else {
      messages.push({
        id: String(messages.length),
        parent: messages.length ? String(messages.length - 1) : null,
        role: item?.role,
        content: item?.content ?? "",
        reasoning: item?.reasoning_content ?? undefined,
        toolCallId: item?.tool_call_id,
        toolCalls: item?.tool_calls?.map?.((call) => ({ id: call?.id, ...call?.function })),
        finish: "stop",
      });
    }
  }
  return { title: value?.title ?? title, settings, leaf: messages.at(-1)?.id ?? null, messages };
}

function readConversation(item) {
  if (typeof item !== "object" || item === null || !Array.isArray(item.messages)) throw new Error('"messages" is not a list');
  const id = store.newId();
  const ids = new Map(); // new ids of the messages so far, by their old ones: a parent comes first, so there are no cycles
  const created = Date.now();
  const messages = item.messages.map((message, index) => readMessage(message, ids, id, created + index));
  const settings = {};
  for (const [name, type] of Object.entries(SETTING_TYPES)) {
    const value = item.settings?.[name];
    if (typeof value === type && value !== null) settings[name] = value;
  }
  if (settings.tools && !Array.isArray(settings.tools)) delete settings.tools;
  const conversation = {
    id,
    title: typeof item.title === "string" ? item.title.slice(0, 200) : text("untitled"),
    model: typeof item.model === "string" ? item.model.slice(0, 200) : "",
    settings,
    leaf: ids.get(item.leaf) ?? messages.at(-1)?.id ?? null,
    created,
    updated: created,
  };
  return { conversation, messages };
}

function readMessage(message, ids, conversation, created) {
  if (typeof message !== "object" || message === null || !ROLES.includes(message.role)) throw new Error('"role" is not user, assistant or tool');
  const isChild = message.parent !== null && message.parent !== undefined;
  if (isChild && !ids.has(message.parent)) throw new Error('"parent" is not an earlier message');
  const checked = {
    id: store.newId(),
    conversation,
    parent: isChild ? ids.get(message.parent) : null,
    role: message.role,
    content: message.role === "assistant" ? textOf(readContent(message.content)) : readContent(message.content),
    created,
    finish: FINISH_REASONS.includes(message.finish) ? message.finish : "stop",
  };
  if (checked.finish === "error") checked.error = { status: Number(message.error?.status), message: String(message.error?.message ?? "") };
  if (typeof message.thoughtSeconds === "number") checked.thoughtSeconds = message.thoughtSeconds;
  ids.set(message.id, checked.id);
  if (typeof message.reasoning === "string") checked.reasoning = message.reasoning;
  for (const name of ["usage", "timings"]) if (message[name]) checked[name] = readNumbers(message[name]);
  if (typeof message.toolCallId === "string") checked.toolCallId = message.toolCallId;
  if (typeof message.name === "string") checked.name = message.name.slice(0, 200);
  if (message.isJson === true) checked.isJson = true;
  if (Array.isArray(message.toolCalls)) {
    checked.toolCalls = message.toolCalls.map((call) => ({
      id: String(call?.id ?? ""),
      name: String(call?.name ?? ""),
      arguments: typeof call?.arguments === "string" ? call.arguments : JSON.stringify(call?.arguments ?? {}),
      broken: call?.broken === true,
    }));
  }
  return checked;
}

// Return a record with its numbers only, at any depth.
function readNumbers(value) {
  const numbers = {};
  for (const [name, item] of Object.entries(value)) {
    if (typeof item === "number") numbers[name] = item;
    else if (typeof item === "object" && item !== null) numbers[name] = readNumbers(item);
  }
  return numbers;
}

function readContent(content) {
  if (typeof content === "string") return content;
  if (content === null || content === undefined) return "";
  if (!Array.isArray(content)) throw new Error('"content" is neither a text nor a list');
  return content.map((part) => {
    const name = typeof part?.name === "string" ? { name: part.name.slice(0, 200) } : {};
    if (part?.type === "text" && typeof part.text === "string") return { type: "text", text: part.text, ...name };
    const url = part?.image_url?.url;
    if (part?.type === "image_url" && typeof url === "string" && /^data:image\/(png|jpeg|webp|gif);base64,/.test(url)) {
      return { type: "image_url", image_url: { url }, ...name };
    }
    throw new Error('a part of "content" is neither text nor an image');
  });
}

// An answer of the model while it streams: from events to a message record.

import { pause, readEvents, request, ServerError } from "./api.js";
import { NUMBERS } from "./settings.js";
import * as store from "./store.js";

const SAVE_EVERY_MS = 500;
const MAX_ATTEMPTS = 6; // while the server's queue is full
const BUSY_SECONDS = 5; // between two of them, where the server does not say

// Return a message in OpenAI's format.
function toOpenAI(message) {
  const value = { role: message.role, content: message.content };
  if (typeof message.content !== "string") value.content = message.content.map(({ name, ...part }) => part);
  if (message.reasoning) value.reasoning_content = message.reasoning;
  const calls = (message.toolCalls ?? []).filter((call) => !call.broken);
  if (calls.length) {
    value.tool_calls = calls.map(({ id, name, arguments: json }) => ({
      id,
      type: "function",
      function: { name, arguments: json },
    }));
  }
  if (message.toolCallId) value.tool_call_id = message.toolCallId;
  return value;
}

function isJsonObject(json) {
  try {
    const value = JSON.parse(json);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}

// Return the body of a request: the messages of a branch, and the settings of the conversation.
export function requestBody(path, settings, partial) {
  const messages = path.map(toOpenAI);
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  if (partial) messages.push({ role: "assistant", content: partial, partial: true });
  const body = { messages, stream: true, return_progress: true, stream_options: { include_usage: true } };
  for (const { name } of NUMBERS) {
    if (settings[name] !== undefined) body[name] = settings[name];
  }
  if (settings.thinking !== undefined) body.thinking = { type: settings.thinking ? "enabled" : "disabled" };
  if (settings.tools?.length) body.tools = settings.tools;
  if (settings.schema) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: settings.schema } };
  }
  return body;
}

// Streams one answer into a message record; `onUpdate(answer)` is called after each change.
export class Answer {
  constructor(message, onUpdate) {
    this.message = message;
    this.onUpdate = onUpdate;
    this.progress = null; // {processed, total, seconds} of the prompt
    this.notice = null; // what happens to the ring
    this.busySeconds = null; // until the request is sent again, because the server's queue is full
    this.startedAt = performance.now();
    this.chunks = 0;
    this.controller = new AbortController();
    this.savedAt = 0;
  }

  stop() {
    this.isStopped = true;
    this.controller.abort();
  }

  async run(body) {
    const { message } = this;
    message.finish = null; // as long as this is null, the answer is unfinished, also after a reload
    delete message.error;
    await store.saveMessage(message);
    try {
      const response = await this.send(body);
      for await (const { data } of readEvents(response)) {
        if (data === "[DONE]") break;
        this.add(JSON.parse(data));
        await this.saveSometimes();
      }
      if (message.finish === null) throw new ServerError(0, "");
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else {
        message.finish = "error";
        message.error = { status: error.status ?? 0, message: error.message, retryAfter: error.retryAfter ?? null };
      }
    }
    this.endThinking();
    this.progress = this.notice = this.busySeconds = null;
    for (const call of message.toolCalls ?? []) call.broken = !isJsonObject(call.arguments);
    await this.save();
    this.onUpdate(this);
  }

  // Send the request; again while the server's queue is full.
  async send(body) {
    const { signal } = this.controller;
    for (let attempt = 1; ; attempt += 1) {
      try {
        return await request("v1/chat/completions", { body, signal });
      } catch (error) {
        if (error.status !== 429 || attempt === MAX_ATTEMPTS) throw error;
        for (this.busySeconds = error.retryAfter ?? BUSY_SECONDS; this.busySeconds > 0; this.busySeconds -= 1) {
          this.onUpdate(this);
          await pause(1000, signal);
        }
        this.busySeconds = null;
      }
    }
  }

  add(chunk) {
    if (chunk.error) throw new ServerError(chunk.error.status ?? 500, chunk.error.message, chunk.error.code);
    if (chunk.prompt_progress) {
      const { processed, total, cache, time_ms: time } = chunk.prompt_progress;
      this.progress = { processed, total, cache, seconds: time / 1000 };
    }
    if (chunk.notice) this.notice = chunk.notice;
    if (chunk.usage) this.message.usage = chunk.usage;
    if (chunk.timings) this.message.timings = chunk.timings;
    const choice = chunk.choices?.[0];
    if (choice) this.addDelta(choice);
    this.onUpdate(this);
  }

  addDelta({ delta, finish_reason: reason }) {
    const { message } = this;
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.progress = null;
      this.notice = null;
      this.chunks += 1;
      this.firstAt ??= performance.now();
    }
    if (delta.reasoning_content) {
      this.thinkingSince ??= performance.now();
      message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
    }
    if (delta.content) {
      this.endThinking();
      message.content += delta.content;
    }
    for (const call of delta.tool_calls ?? []) {
      message.toolCalls ??= [];
      const known = (message.toolCalls[call.index] ??= { id: "", name: "", arguments: "" });
      if (call.id) known.id = call.id;
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    if (reason) message.finish = reason;
  }

  endThinking() {
    if (this.thinkingSince === undefined || this.message.thoughtSeconds !== undefined) return;
    this.message.thoughtSeconds = (performance.now() - this.thinkingSince) / 1000;
  }

  // Tokens per second so far: about one token a chunk.
  get rate() {
    const seconds = (performance.now() - (this.firstAt ?? performance.now())) / 1000;
    return seconds > 0.5 ? (this.chunks - 1) / seconds : null;
  }

  async saveSometimes() {
    if (performance.now() - this.savedAt < SAVE_EVERY_MS) return;
    this.savedAt = performance.now();
    await store.saveMessage(this.message, true);
  }

  async save() {
    this.savedAt = performance.now();
    await store.saveMessage(this.message);
  }
}

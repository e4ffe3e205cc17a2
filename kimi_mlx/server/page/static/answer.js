// An answer of the model while it streams: from events to a message record.

import { getJson, pause, readEvents, request, ServerError } from "./api.js";
import { canContinue } from "./messages.js";
import * as store from "./store.js";

const SAVE_EVERY_MS = 500;
const MAX_ATTEMPTS = 6; // while the server's queue is full
const BUSY_SECONDS = 5; // between attempts, if the server does not say
const AWAY_MS = 3000; // between checks whether the server is back
const MAX_AWAY_MS = 3_600_000; // after which an unfinished answer is not continued automatically
const MAX_LOSSES = 3; // of the connection in a row, without new text

// Receives one answer into a message record; `onUpdate` is called with it after each change, `onSaveError` with the first
// error of the browser's storage. If the connection is lost, the answer is continued once the server is back, as long as
// it has the model `modelId`.
export class Answer {
  constructor(message, modelId, { onUpdate, onSaveError }) {
    this.message = message;
    this.modelId = modelId;
    this.onUpdate = onUpdate;
    this.onSaveError = onSaveError;
    this.progress = null; // {processed, total, seconds} of the prompt
    this.notice = null; // {type, reason} of the ring or the server: it was lost, or is back
    this.busySeconds = null; // seconds until the next attempt, while the server's queue is full
    this.chunks = 0;
    this.controller = new AbortController();
    this.savedAt = 0;
  }

  stop() {
    this.controller.abort();
  }

  // Receive the answer. `newBody` returns the body of a request for the rest of it.
  async run(newBody) {
    const { message } = this;
    message.finish = null; // null marks an unfinished answer, also after a reload
    delete message.error;
    await this.save();
    try {
      while (message.finish === null) {
        try {
          await this.receive(newBody());
        } catch (error) {
          if (!(await this.recover(error))) throw error;
        }
      }
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

  async receive(body) {
    const response = await this.send(body);
    this.hasStarted = true;
    for await (const { data } of readEvents(response)) {
      if (data === "[DONE]") break;
      this.add(JSON.parse(data));
      await this.saveSometimes();
    }
    if (this.message.finish === null) throw new ServerError(0, "");
  }

  // If the connection was lost in mid-answer, wait until the server is back; resolves with whether it is.
  async recover(error) {
    const isLost = error.status === 0 || error.code === "stopping";
    if (!isLost || !this.hasStarted || this.controller.signal.aborted) return false;
    this.losses = this.chunks === this.chunksAtLoss ? this.losses + 1 : 1;
    this.chunksAtLoss = this.chunks;
    if (this.losses > MAX_LOSSES) return false;
    this.progress = null;
    this.notice = { type: "serverLost" };
    this.onUpdate(this);
    if (!(await this.waitForServer())) return false;
    const isContinued = canContinue(this.message);
    if (!isContinued) this.reset();
    this.notice = { type: isContinued ? "serverBack" : "startedAgain" };
    this.onUpdate(this);
    return true;
  }

  // Wait for the server; resolves with whether it is back with the same model.
  async waitForServer() {
    const { signal } = this.controller;
    const deadline = Date.now() + MAX_AWAY_MS;
    while (Date.now() < deadline) {
      await pause(AWAY_MS, signal);
      try {
        const status = await getJson("v1/cluster", { signal });
        if (status.is_up) return !this.modelId || status.model === this.modelId;
      } catch (error) {
        if (error.name === "AbortError") throw error;
        if (error.status === 401) return true; // the next request asks the user for the key
      }
    }
    return false;
  }

  // Drop what has come of the answer.
  reset() {
    const { message } = this;
    message.content = "";
    for (const name of ["reasoning", "thoughtSeconds", "toolCalls", "usage", "timings"]) delete message[name];
    delete this.thinkingSince;
    this.isReset = true;
  }

  // Send the request, several times if the server's queue is full.
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
      const whole = (message.toolCalls[call.index] ??= { id: "", name: "", arguments: "" });
      if (call.id) whole.id = call.id;
      whole.name += call.function?.name ?? "";
      whole.arguments += call.function?.arguments ?? "";
    }
    if (reason) message.finish = reason;
  }

  endThinking() {
    if (this.thinkingSince === undefined || this.message.thoughtSeconds !== undefined) return;
    this.message.thoughtSeconds = (performance.now() - this.thinkingSince) / 1000;
  }

  // Tokens per second so far, or null at the beginning. A chunk has about one token.
  get rate() {
    const seconds = (performance.now() - (this.firstAt ?? performance.now())) / 1000;
    return seconds > 0.5 ? (this.chunks - 1) / seconds : null;
  }

  async saveSometimes() {
    if (performance.now() - this.savedAt < SAVE_EVERY_MS) return;
    await this.save(true);
  }

  // Save the message; the answer goes on if the browser cannot.
  async save(isPart = false) {
    this.savedAt = performance.now();
    try {
      await store.saveMessage(this.message, isPart);
    } catch (error) {
      if (!this.hasSaveError) this.onSaveError(error);
      this.hasSaveError = true;
    }
  }
}

function isJsonObject(json) {
  try {
    const value = JSON.parse(json);
    return typeof value === "object" && value !== null && !Array.isArray(value);
  } catch {
    return false;
  }
}

// Requests to the server: the key, errors, and streams of server-sent events.

import { text } from "./i18n.js";
import { tabStorage } from "./tab_storage.js";

const KEY = "kimi-mlx-key";

// The API key, which is kept until this tab is closed.
export const key = {
  get: () => tabStorage.get(KEY),
  set: (value) => tabStorage.set(KEY, value),
};

// An error response, or no response at all (status 0).
export class ServerError extends Error {
  constructor(status, message, code = null, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

// Send a request; the path is relative to the page, which may be behind a proxy.
export async function request(path, { body = null, signal = null } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (/[^\x20-\xff]/.test(key.get())) throw new ServerError(401, ""); // a header cannot have it, and no key does
  if (body !== null) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === null ? "GET" : "POST",
      headers,
      body: body === null ? null : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, error.message);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let message = response.statusText || `status ${response.status}`;
  let code = null;
  try {
    const { error } = await response.json();
    message = error.message ?? message;
    code = error.code ?? null;
  } catch {
    // no error in JSON: the status is enough
  }
  return new ServerError(response.status, message, code, Number(response.headers.get("retry-after")) || null);
}

// Return the message for an error of the server.
export function errorText({ status, message, retryAfter }) {
  if (status === 0) return text("lostConnection");
  if (status === 401) return text("keyWrong");
  if (status === 429) return text("busy", { seconds: retryAfter ?? 5 });
  if (status === 503) return text("notUp", { reason: message });
  return text("failed", { message });
}

// Wait; rejects as a request does if it is aborted first.
export function pause(milliseconds, signal = null) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

// Yield the server-sent events of a response as {event, data}.
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError(0, error.message);
      }
      if (part.done) return;
      buffer += part.value;
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const event = parseEvent(buffer.slice(0, end));
        buffer = buffer.slice(end + 2);
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(lines) {
  const event = { event: "message", data: "" };
  for (const line of lines.split("\n")) {
    if (line.startsWith("data: ")) event.data += line.slice(6);
    else if (line.startsWith("event: ")) event.event = line.slice(7);
  }
  return event;
}

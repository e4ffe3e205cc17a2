// Conversations in IndexedDB. The messages of a conversation form a tree: each has a parent, and `leaf` is the last message
// of the branch that is shown. Each message is a record, so that two tabs do not overwrite each other's messages.

import { textOf } from "./messages.js";

const NAME = "kimi-mlx";
const OPEN_MS = 5000; // some browsers never answer

let database = null; // a promise of it; null if conversations are in memory only
const inMemory = { conversations: new Map(), messages: new Map() };
export let isPersistent = true;

const channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;
const deleted = new Set(); // ids of conversations, which late writes must not restore

// Call a function when another tab has changed a conversation: with its id, and `message` for a part of an answer that
// streams there, or `isDeleted`.
export function onChange(listener) {
  channel?.addEventListener("message", ({ data }) => {
    if (data.isDeleted) deleted.add(data.id);
    listener(data);
  });
}

export function newId() {
  const values = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(values, (value) => value.toString(16).padStart(2, "0")).join("");
}

export async function open() {
  database = new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("conversations", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
    opening.onblocked = () => reject(new Error("blocked"));
    setTimeout(() => reject(new Error("no answer")), OPEN_MS);
  });
  try {
    (await database).onversionchange = async () => (await database).close();
  } catch {
    database = null; // a private window: keep conversations in memory
    isPersistent = false;
  }
}

const completion = (operation) =>
  new Promise((resolve, reject) => {
    operation.onsuccess = () => resolve(operation.result);
    operation.onerror = () => reject(operation.error);
  });

// Save records, by store: all or none. A full disk is only reported at the end of the transaction.
async function put(records) {
  const writes = Object.entries(records).flatMap(([store, values]) => values.map((value) => [store, value]));
  if (database === null) {
    for (const [store, value] of writes) inMemory[store].set(value.id, structuredClone(value));
    return;
  }
  const transaction = (await database).transaction(Object.keys(records), "readwrite");
  const ended = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new Error("aborted"));
  });
  try {
    for (const [store, value] of writes) transaction.objectStore(store).put(value);
  } catch (error) { // a value that cannot be stored
    ended.catch(() => {});
    transaction.abort();
    throw error;
  }
  await ended;
}

async function remove(store, id) {
  if (database === null) inMemory[store].delete(id);
  else await completion((await database).transaction(store, "readwrite").objectStore(store).delete(id));
}

async function all(store) {
  if (database === null) return structuredClone([...inMemory[store].values()]);
  return completion((await database).transaction(store).objectStore(store).getAll());
}

export async function conversations() {
  return (await all("conversations")).sort((a, b) => b.updated - a.updated);
}

export async function conversation(id) {
  if (database === null) return structuredClone(inMemory.conversations.get(id));
  return completion((await database).transaction("conversations").objectStore("conversations").get(id));
}

export async function messages(id) {
  if (database === null) return structuredClone([...inMemory.messages.values()].filter((item) => item.conversation === id));
  const index = (await database).transaction("messages").objectStore("messages").index("conversation");
  return completion(index.getAll(id));
}

// Save some fields of a conversation, which another tab may have changed too; all of them if it is new.
export async function updateConversation(value, names) {
  const stored = (await conversation(value.id)) ?? value;
  if (deleted.has(value.id)) return;
  await put({ conversations: [{ ...stored, ...Object.fromEntries(names.map((name) => [name, value[name]])) }] });
  channel?.postMessage({ id: value.id });
}

// Save a message. Other tabs show a part of an answer as it is; for other messages they read the conversation again.
export async function saveMessage(value, isPart = false) {
  if (deleted.has(value.conversation)) return;
  await put({ messages: [value] });
  channel?.postMessage(isPart ? { id: value.conversation, message: value } : { id: value.conversation });
}

// Save a new conversation with its messages.
export async function saveAll(value, messages) {
  await put({ conversations: [value], messages });
  channel?.postMessage({ id: value.id });
}

export async function deleteConversation(id) {
  deleted.add(id);
  for (const message of await messages(id)) await remove("messages", message.id);
  await remove("conversations", id);
  channel?.postMessage({ id, isDeleted: true });
}

// Return the ids of conversations whose title or messages contain all words of a query.
export async function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = new Map();
  for (const item of await all("conversations")) texts.set(item.id, item.title);
  for (const item of await all("messages")) {
    texts.set(item.conversation, `${texts.get(item.conversation) ?? ""}\n${textOf(item.content)}\n${item.reasoning ?? ""}`);
  }
  const matches = ([, content]) => words.every((word) => content.toLowerCase().includes(word));
  return new Set([...texts].filter(matches).map(([id]) => id));
}

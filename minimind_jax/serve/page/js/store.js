// Conversations in this browser (IndexedDB), and as a file. Each message is a record of its own: saving one while it
// grows costs what it is long, and two tabs that answer in one conversation add versions rather than overwrite.

import { Conversation, newId } from "./conversation.js";
import { cleanedPictures } from "./pictures.js";
import { cleaned } from "./settings.js";

const ROLES = ["user", "assistant", "tool"];
const FORMAT = "minimind-conversations";
const MOST_BYTES = 200e6; // of a file that is imported
const channel = new BroadcastChannel("minimind-conversations");
let opened;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("minimind", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/** Runs `work(conversations, messages)` as one transaction; the result of the request that it returns, if any. */
async function transact(mode, work) {
  const transaction = (await database()).transaction(["conversations", "messages"], mode);
  const request = work(transaction.objectStore("conversations"), transaction.objectStore("messages"));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = transaction.onerror = () => reject(transaction.error ?? new Error("the transaction failed"));
  });
  return request?.result;
}

/** Calls `react` when another tab has changed what is kept. */
export function onChange(react) {
  channel.onmessage = react;
}

export const allConversations = () => transact("readonly", (conversations) => conversations.getAll());

/** The conversation, if it is kept. */
export async function load(id) {
  if (!id) return null;
  let record = null;
  const messages = await transact("readonly", (conversationStore, messageStore) => {
    conversationStore.get(id).onsuccess = ({ target }) => (record = target.result);
    return messageStore.index("conversation").getAll(id);
  });
  return record && new Conversation({ ...record, settings: cleaned(record.settings) }, messages, true);
}

export const allMessages = () => transact("readonly", (_, messages) => messages.getAll());

/**
 * Keeps these fields of a conversation's record, for another tab may have changed others, and some of its messages;
 * of a new one the whole record. wasKept: it was there before. partial: other tabs are not told yet.
 * False, and nothing is kept, if another tab has deleted it.
 */
export async function keep(record, fields, messages, { wasKept = false, partial = false } = {}) {
  let isThere = true;
  await transact("readwrite", (conversationStore, messageStore) => {
    conversationStore.get(record.id).onsuccess = ({ target: { result } }) => {
      isThere = Boolean(result) || !wasKept;
      if (!isThere) return;
      const changes = Object.fromEntries(fields.map((name) => [name, record[name]]));
      conversationStore.put(result ? { ...result, ...changes } : record);
      for (const message of messages) messageStore.put(message);
    };
  });
  if (isThere && !partial) channel.postMessage(record.id);
  return isThere;
}

export async function remove(id) {
  await transact("readwrite", (conversations, messages) => {
    conversations.delete(id);
    messages.index("conversation").openKeyCursor(id).onsuccess = ({ target }) => {
      if (!target.result) return;
      messages.delete(target.result.primaryKey);
      target.result.continue();
    };
  });
  channel.postMessage(id);
}

/** All that is kept, as the text of a file. */
export async function exported() {
  const conversations = await allConversations();
  const inOrder = (await allMessages()).sort((a, b) => a.created - b.created);
  const messages = Object.groupBy(inOrder, (message) => message.conversation);
  const whole = conversations.map((record) => ({ ...record, messages: messages[record.id] ?? [] }));
  return JSON.stringify({ format: FORMAT, version: 1, conversations: whole }, null, 1);
}

/** Adds what a file holds and is not here yet: {count, added, known, ids}. Throws an Error that says what is wrong. */
export async function imported(file) {
  if (file.size > MOST_BYTES) throw new Error(`${Math.round(file.size / 1e6)} MB`);
  const found = JSON.parse(await file.text());
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) throw new Error(`"format" is not ${FORMAT}`);
  if (found.version !== 1) throw new Error(`version ${found.version}`);
  const whole = found.conversations.map(checked);
  const here = new Map((await allMessages()).map((message) => [message.id, message]));
  const isNew = ({ id, finish }) => !here.has(id) || (here.get(id).finish === null && finish); // or was not complete
  const earlier = new Map((await allConversations()).map((record) => [record.id, record]));
  let [added, known] = [0, 0];
  for (const { messages, ...record } of whole) {
    const fresh = messages.filter(isNew);
    added += fresh.length;
    known += messages.length - fresh.length;
    const local = earlier.get(record.id); // whose title stays
    await keep(record, local && isBehind(messages, record.leaf, local.leaf) ? ["leaf", "updated"] : [], fresh);
  }
  return { count: whole.length, added, known, ids: whole.map((record) => record.id) };
}

/** Whether one of these messages goes on from another. */
function isBehind(messages, later, earlier) {
  const parents = new Map(messages.map((message) => [message.id, message.parent]));
  let at = later;
  while (at && at !== earlier) at = parents.get(at);
  return Boolean(at);
}

/** A conversation of a file with exactly our fields, each of its type: the file may come from anybody. */
function checked(record, index) {
  const where = `conversations[${index}]`;
  if (!Array.isArray(record?.messages)) throw new Error(`${where}.messages`);
  const id = String(record.id || newId());
  const times = new Map(record.messages.map((message) => [message?.id, message?.created]));
  const messages = record.messages.map((message, at) => {
    const isText = [message?.id, message?.content].every((text) => typeof text === "string");
    // An answer is later than its question, so that no message is its own ancestor.
    const isAfter = message?.parent === null || times.get(message?.parent) < message?.created;
    const isPlaced = isAfter && Number.isFinite(message?.created);
    if (!ROLES.includes(message?.role) || !isText || !isPlaced) throw new Error(`${where}.messages[${at}]`);
    return { ...fieldsOf(message), conversation: id };
  });
  const leaf = times.has(record.leaf) ? record.leaf : (messages.at(-1)?.id ?? null);
  const [created, updated] = [Number(record.created) || 0, Number(record.updated) || 0];
  const [title, settings] = [String(record.title ?? "").trim(), cleaned(record.settings)];
  return { id, title, created, updated, leaf, settings, messages };
}

function fieldsOf(found) {
  const { id, parent, role, content, created, pictures, reasoning, calls, finish, stats, model, call, isError } = found;
  const message = { id, parent, role, content, created };
  if (role === "tool") return { ...message, call: String(call), isError: isError === true };
  if (role === "user") return { ...message, pictures: cleanedPictures(pictures) };
  const numbers = Object.fromEntries(Object.entries(stats ?? {}).filter(([, value]) => Number.isFinite(value)));
  const whole = Array.isArray(calls) ? calls.filter(isCall) : [];
  const texts = { reasoning: String(reasoning ?? ""), finish: finish ? String(finish) : null, model: String(model ?? "") };
  return { ...message, ...texts, calls: whole, stats: numbers };
}

function isCall(call) {
  return typeof call?.function?.name === "string" && typeof call.function.arguments === "string";
}

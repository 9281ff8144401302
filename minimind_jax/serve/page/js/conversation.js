// A conversation is a tree of messages: an edited question and another answer stand beside the earlier ones, so
// that nothing is lost. What is shown and sent is the path from the first message to `leaf`.
//
// A message: {id, conversation, parent, role, content, created} and, by role,
//   user: pictures, see pictures.js
//   assistant: reasoning, calls (as OpenAI's tool_calls), finish, stats, model
//   tool: call (the id of the call), isError

export function newId() {
  // crypto.randomUUID is only there on https and on this machine
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Conversation {
  messages = new Map();
  revision = 0; // counts what is changed here
  #own = new Set(); // ids of messages that were begun here
  #fresh = new Set(); // messages that are not kept as they are now

  /** record: {id, title, created, updated, leaf, settings}; messages: all that belong to it. isKept: in the browser. */
  constructor(record, messages = [], isKept = false) {
    this.record = record;
    this.isKept = isKept;
    this.update(record, messages);
  }

  static begin(settings) {
    const now = Date.now();
    return new Conversation({ id: newId(), title: "", created: now, updated: now, leaf: null, settings });
  }

  /** Takes over what is kept of it. isAnswered: here, so that messages begun here are newer, and what is shown stays. */
  update(record, messages, isAnswered = false) {
    for (const message of messages) {
      if (!isAnswered || !this.#own.has(message.id)) this.messages.set(message.id, message);
    }
    Object.assign(this.record, record, isAnswered ? { leaf: this.record.leaf } : {});
    const inOrder = [...this.messages.values()].sort((a, b) => a.created - b.created);
    inOrder.forEach((message, index) => {
      // Of a question that was never kept, what was said before stands in its place.
      if (message.parent !== null && !this.messages.has(message.parent)) message.parent = inOrder[index - 1]?.id ?? null;
    });
    if (!this.messages.has(this.record.leaf)) this.record.leaf = inOrder.at(-1)?.id ?? null;
  }

  /** Notes that a message has changed, if it is still one of these. */
  changed(message) {
    this.revision++;
    if (this.messages.has(message.id)) this.#fresh.add(message);
  }

  get hasFresh() {
    return this.#fresh.size > 0;
  }

  /** The messages that are to be kept anew, but for an answer of which nothing has come. */
  takeFresh() {
    const found = [...this.#fresh].filter((message) => message.role !== "assistant" || message.finish || !isEmpty(message));
    for (const message of found) this.#fresh.delete(message);
    return found;
  }

  /** The messages from the first to the one named, or to the leaf. */
  path(end = this.record.leaf) {
    const found = [];
    for (let at = this.messages.get(end); at; at = this.messages.get(at.parent)) found.unshift(at);
    return found;
  }

  /** Messages in the place of this one, oldest first, itself among them. */
  versions(message) {
    return [...this.messages.values()]
      .filter((other) => other.parent === message.parent && other.role === message.role)
      .sort((a, b) => a.created - b.created);
  }

  /** Adds a message behind `parent` and makes it the leaf. */
  add(role, parent, fields) {
    const after = this.messages.get(parent)?.created ?? 0; // always later: imported files are checked by that
    const created = Math.max(Date.now(), after + 1);
    const message = { id: newId(), conversation: this.record.id, parent, role, content: "", created, ...fields };
    this.messages.set(message.id, message);
    this.#own.add(message.id);
    this.changed(message);
    this.record.leaf = message.id;
    this.record.updated = message.created;
    return message;
  }

  /** Takes a message away to which nothing was answered. */
  remove(message) {
    this.messages.delete(message.id);
    this.#fresh.delete(message);
    if (this.record.leaf === message.id) this.record.leaf = message.parent;
  }

  /** Shows the version `message`, down to what was said last behind it. */
  choose(message) {
    this.revision++;
    for (let next = message; next; ) {
      this.record.leaf = next.id;
      const children = [...this.messages.values()].filter((other) => other.parent === next.id);
      next = children.sort((a, b) => b.created - a.created)[0];
    }
  }
}

/** Whether nothing has come of an answer. */
export const isEmpty = (message) => !message.content && !message.reasoning && !message.calls?.length;

/** Messages as the chat API takes them, the system prompt first and once; without the `skipped` oldest turns. */
export function forModel(path, system, skipped = 0) {
  const starts = path.flatMap((message, index) => (message.role === "user" ? [index] : []));
  const kept = path.slice(starts[skipped] ?? 0);
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  kept.forEach((message, index) => {
    if (message.role === "assistant") sent.push(...answerForModel(message, kept.slice(index + 1)));
    else if (message.role === "user") sent.push({ role: "user", content: questionForModel(message) });
  });
  return sent;
}

/** Text; where there are pictures, parts: each on a line before it, as models that see are trained. */
function questionForModel({ content, pictures = [] }) {
  if (!pictures.length) return content;
  const parts = pictures.flatMap(({ url }) => [{ type: "image_url", image_url: { url } }, { type: "text", text: "\n" }]);
  return [...parts, { type: "text", text: content }];
}

/** An answer with its calls and their results. A call that was cut off is no JSON and is left out. */
function answerForModel(message, rest) {
  const sent = { role: "assistant", content: message.content };
  if (message.reasoning) sent.reasoning_content = message.reasoning;
  const calls = (message.calls ?? []).filter((call) => isObject(call.function.arguments));
  if (!calls.length) return message.content || message.reasoning ? [sent] : []; // silence would teach it silence
  const results = calls.map((call) => {
    const result = rest.find((other) => other.role === "tool" && other.call === call.id);
    return { role: "tool", tool_call_id: call.id, content: result?.content ?? '{"error": "not carried out"}' };
  });
  return [{ ...sent, tool_calls: calls }, ...results];
}

function isObject(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" && !Array.isArray(value);
  } catch {
    return false;
  }
}

/** A title from the first words of a message. */
export function titleFrom(text) {
  const line = text.trim().split("\n")[0];
  const letters = Array.from(line); // whole characters, also beyond the first plane
  return letters.length > 40 ? `${letters.slice(0, 40).join("")}…` : line;
}

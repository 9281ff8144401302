// The page: which conversation is shown, what is being answered, and what the buttons do.

import { answer } from "./answer.js";
import { Conversation, titleFrom } from "./conversation.js";
import { announce, ask, make, tell } from "./elements.js";
import { onEnter } from "./keys.js";
import * as server from "./server.js";
import { changed as changedSettings, cleaned, lastSettings, rememberSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { label, say, showWords, switchLanguage } from "./words.js";

const SAVE_EVERY = 1000; // milliseconds, of an answer that is being written
const ASK_AGAIN = 3000; // milliseconds, for a server that is not there or still loads

const $ = (selector) => document.querySelector(selector);
const running = new Map(); // id of a conversation that is being answered -> {conversation, controller}
const faults = new Map(); // id of a conversation -> why its last answer failed
let conversation = Conversation.begin(lastSettings());
let schemas = []; // of the tools that the server carries out

const thread = new Thread($("#thread"), {
  edit: (message, text) => send(text, message.parent),
  again: (message) => respond(conversation.messages.get(message.parent)),
  choose(message) {
    conversation.choose(message);
    keep(conversation);
    render();
  },
});
const sidebar = new Sidebar({ open: go, rename, remove, imported: refresh }, () => conversation.record.id);

// ---- What is shown ----

function render() {
  const { id, settings } = conversation.record;
  const busy = running.has(id);
  thread.show(conversation, busy, busy ? null : unanswered());
  $("#stop").hidden = !busy;
  $("#send").hidden = busy;
  $("#thinking").ariaPressed = String(settings.thinking);
  $("#tools").ariaPressed = String(settings.tools);
  $("#tools").hidden = !schemas.length;
  $("#tools").title = schemas.map((schema) => schema.function.name).join(", ");
}

/** What stands below the last message if it has no answer: why, what to do, and a button. */
function unanswered() {
  const fault = faults.get(conversation.record.id);
  const last = conversation.path().at(-1);
  if (!fault && last?.role !== "user") return null;
  const box = make("div", { className: fault ? "fault box" : "box" });
  if (fault) box.role = "alert";
  if (fault) box.append(make("p", {}, fault.message), make("p", { className: "note" }, fault.advice ?? ""));
  const question = conversation.path().findLast((message) => message.role === "user");
  const retry = () => respond(question);
  if (question) box.append(make("button", { type: "button", className: "main", textContent: say(fault ? "retry" : "answerNow"), onclick: retry }));
  return box;
}

/** Shows the conversation that the address names, or a new one. */
async function open() {
  const id = location.hash.slice(1);
  if (id === conversation.record.id) return;
  const record = id && (await store.allConversations().catch(() => [])).find((other) => other.id === id);
  if (running.has(id)) conversation = running.get(id).conversation;
  else if (record) conversation = load(record, await store.messagesOf(id));
  else conversation = Conversation.begin(lastSettings());
  sidebar.toggle(false);
  render();
  refresh();
}

const load = (record, messages) => new Conversation({ ...record, settings: cleaned(record.settings) }, messages);

function go(id) {
  if (id === location.hash.slice(1)) sidebar.toggle(false);
  else location.hash = id; // which opens it
}

function refresh() {
  return sidebar.refresh().catch(tellNotKept);
}

// ---- Asking and answering ----

async function send(text, parent = conversation.record.leaf) {
  if (!text.trim() || running.has(conversation.record.id)) return;
  const question = conversation.add("user", parent, { content: text });
  conversation.record.title ||= titleFrom(text);
  history.replaceState(null, "", `#${conversation.record.id}`);
  await keep(conversation, [question]);
  thread.toEnd();
  await respond(question);
}

/** Answers a question of the conversation that is shown; an earlier answer stays as a version. */
async function respond(question) {
  const asked = conversation;
  const { id, settings } = asked.record;
  if (running.has(id)) return;
  const controller = new AbortController();
  running.set(id, { conversation: asked, controller });
  faults.delete(id);
  announce(say("answering"));
  const version = [...asked.messages.values()].filter((message) => message.parent === question.id).length;
  const written = new Set();
  let saved = Date.now();
  const request = {
    model: $("#model").value, schemas: settings.tools ? schemas : [], thinking: settings.thinking, version,
    signal: controller.signal,
  };
  try {
    await answer(asked, question, request, (message, isNew) => {
      written.add(message);
      if (asked === conversation) isNew ? render() : thread.grow(message);
      if (isNew || Date.now() - saved < SAVE_EVERY) return;
      saved = Date.now();
      keep(asked, [message], true);
    });
  } catch (error) {
    if (!controller.signal.aborted) faults.set(id, error);
    if (error.status === 404) meet(); // it may serve other models by now
    if (!(error instanceof server.ServerError)) console.error(error);
  } finally {
    running.delete(id);
    announce(say("answered"));
    await keep(asked, [...written].filter((message) => asked.messages.has(message.id)));
    if (asked === conversation) render();
  }
}

// ---- Keeping ----

/** partial: an answer that is being written, of which other tabs need not know. */
async function keep(kept, messages = [], partial = false) {
  if (kept.isGone) return;
  try {
    await store.keep(kept.record, messages, partial);
    if (!partial) await sidebar.refresh();
  } catch (error) {
    tellNotKept(error);
  }
}

function tellNotKept(error) {
  tell(say("noStore", { why: error?.message ?? error }));
}

async function rename(id, title) {
  const record = id === conversation.record.id ? conversation.record : (await store.allConversations()).find((other) => other.id === id);
  record.title = title;
  if (running.has(id)) running.get(id).conversation.record.title = title;
  await store.keep(record).then(refresh, tellNotKept);
}

async function remove(id) {
  const current = running.get(id)?.conversation ?? conversation;
  if (current.record.id === id) current.isGone = true;
  running.get(id)?.controller.abort();
  await store.remove(id).catch(tellNotKept);
  if (conversation.record.id === id) {
    history.replaceState(null, "", location.pathname);
    conversation = Conversation.begin(lastSettings());
    render();
  }
  refresh();
}

/** Another tab has changed a conversation: what it added is shown here, too. */
store.onChange(async ({ data: id }) => {
  if (id === conversation.record.id) {
    const messages = await store.messagesOf(id);
    const record = (await store.allConversations()).find((other) => other.id === id);
    if (running.has(id)) for (const message of messages) conversation.messages.has(message.id) || conversation.messages.set(message.id, message);
    else if (record) conversation = load(record, messages);
    render();
  }
  refresh();
});

// ---- Buttons ----

const submit = () => {
  if (running.has(conversation.record.id)) return;
  const text = $("#text").value;
  $("#text").value = "";
  send(text);
};
onEnter($("#text"), submit);
$("#composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("#stop").onclick = () => running.get(conversation.record.id)?.controller.abort();
$("#new").onclick = () => (location.hash ? go("") : sidebar.toggle(false));
$("#thinking").onclick = () => set({ thinking: !conversation.record.settings.thinking });
$("#tools").onclick = () => set({ tools: !conversation.record.settings.tools });
$("#settings-button").onclick = async () => set((await changedSettings(conversation.record.settings)) ?? {});
$("#model").onchange = () => localStorage.setItem("model", $("#model").value);
$("#language").onclick = () => {
  switchLanguage();
  begin();
};
$("#theme").onclick = () => {
  const order = ["auto", "light", "dark"];
  localStorage.setItem("theme", order[(order.indexOf(document.documentElement.dataset.theme) + 1) % order.length]);
  showTheme();
};
addEventListener("hashchange", open);

function set(change) {
  Object.assign(conversation.record.settings, change);
  rememberSettings(conversation.record.settings);
  if (conversation.messages.size) keep(conversation);
  render();
}

function showTheme() {
  const theme = localStorage.getItem("theme") ?? "auto";
  document.documentElement.dataset.theme = theme;
  label($("#theme"), say("theme", { now: say(theme) }));
}

// ---- The beginning ----

function begin() {
  showWords();
  showTheme();
  render();
  refresh();
}

server.onKeyNeeded((message) => ask({ title: say("key"), text: `${message} ${say("doKey")}`, input: "password" }));

/** Asks the server for its models and tools, until it answers. */
async function meet() {
  try {
    const names = await server.models();
    const chosen = localStorage.getItem("model");
    $("#model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    document.title = names.length === 1 ? names[0] : "MiniMind";
    schemas = await server.tools();
    tell(names.length ? "" : say("noModels"));
    render();
  } catch (error) {
    if (!(error instanceof server.ServerError)) console.error(error);
    tell(`${error.message} ${error.advice ?? ""}`);
    if (error.status === 401) return; // the user did not give a key; the next message asks again
    setTimeout(meet, ASK_AGAIN);
  }
}

begin();
await open();
await meet();
$("#text").focus();

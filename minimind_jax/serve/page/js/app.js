// The page: which conversation is shown, what is being answered, and what the buttons do.

import { answer } from "./answer.js";
import { Conversation, titleFrom } from "./conversation.js";
import { announce, ask, make, tell } from "./elements.js";
import { onEnter } from "./keys.js";
import { Attached } from "./pictures.js";
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
  edit: (message, text) => send(text, message.pictures, message.parent),
  again: (message) => respond(conversation.messages.get(message.parent)),
  choose(message) {
    conversation.choose(message);
    keep(conversation);
    render();
  },
});
const sees = () => Boolean($("#model").selectedOptions[0]?.sees);
const attached = new Attached(sees);
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
  $("#picture").hidden = !sees();
  $("#tools").title = schemas.map((schema) => schema.function.name).join(", ");
}

/** What stands below the last message if it has no answer: why, what to do, and a button. */
function unanswered() {
  const fault = faults.get(conversation.record.id);
  const last = conversation.path().at(-1);
  if (!fault && (!last || last.role === "assistant")) return null;
  const box = make("div", { className: fault ? "fault box" : "box" });
  if (fault) box.role = "alert";
  if (fault) box.append(make("p", {}, fault.message), make("p", { className: "note" }, fault.advice ?? ""));
  const question = conversation.path().findLast((message) => message.role === "user");
  const button = make("button", { type: "button", className: "main", onclick: () => respond(question) });
  button.textContent = say(fault ? "retry" : "answerNow");
  box.append(button);
  return box;
}

/** Shows the conversation that the address names, or a new one. */
async function open() {
  const id = location.hash.slice(1);
  if (id === conversation.record.id) return;
  const found = loaded(id) ?? (await kept(id).catch(tellNotKept)) ?? Conversation.begin(lastSettings());
  if (id !== location.hash.slice(1)) return; // meanwhile another was chosen
  conversation = found;
  sidebar.toggle(false);
  render();
  refresh();
}

/** A conversation as it is kept in the browser, if it is. */
async function kept(id) {
  const record = id ? await store.conversationOf(id) : null;
  if (!record) return null;
  return new Conversation({ ...record, settings: cleaned(record.settings) }, await store.messagesOf(id));
}

/** A conversation that is shown or being answered: the one object that may be changed. */
function loaded(id) {
  return running.get(id)?.conversation ?? (conversation.record.id === id ? conversation : null);
}

function go(id) {
  if (id === location.hash.slice(1)) sidebar.toggle(false);
  else location.hash = id; // which opens it
}

function refresh() {
  return sidebar.refresh().catch(tellNotKept);
}

// ---- Asking and answering ----

async function send(text, pictures = [], parent = conversation.record.leaf) {
  if (running.has(conversation.record.id)) return;
  const asked = conversation;
  const question = asked.add("user", parent, { content: text, pictures });
  asked.record.title ||= titleFrom(text) || say("image");
  history.replaceState(null, "", `#${asked.record.id}`);
  thread.toEnd();
  await keep(asked, [question]);
  navigator.storage?.persist?.(); // or the browser may clear it when the disk is full
  await respond(question, asked);
}

/** Answers a question; an earlier answer to it stays as a version. */
async function respond(question, asked = conversation) {
  const { id, settings } = asked.record;
  if (running.has(id)) return;
  const controller = new AbortController();
  running.set(id, { conversation: asked, controller });
  faults.delete(id);
  announce(say("answering"));
  if (!$("#model").value) await meet(); // when the page was opened the server was not there, or wanted a key
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
async function keep({ record, isGone }, messages = [], partial = false) {
  if (isGone) return;
  try {
    await store.keep(record, messages, partial);
    if (!partial) await sidebar.refresh();
  } catch (error) {
    tellNotKept(error);
  }
}

function tellNotKept(error) {
  tell(say("noStore", { why: error?.message ?? error }));
}

async function rename(id, title) {
  const named = loaded(id) ?? (await kept(id));
  named.record.title = title;
  keep(named);
}

async function remove(id) {
  if (loaded(id)) loaded(id).isGone = true;
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
    const found = await kept(id);
    if (found && running.has(id)) conversation.messages = new Map([...found.messages, ...conversation.messages]);
    else if (found) conversation = found;
    render();
  }
  refresh();
});

// ---- Buttons ----

const submit = async () => {
  await attached.ready;
  const text = $("#text").value;
  if (running.has(conversation.record.id)) return;
  if (!text.trim() && attached.isEmpty) return;
  $("#text").value = "";
  send(text, attached.take());
};
onEnter($("#text"), submit);
$("#composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("#stop").onclick = () => running.get(conversation.record.id)?.controller.abort();
$("#new").onclick = () => (location.hash ? go("") : sidebar.toggle(false));
for (const name of ["thinking", "tools"]) {
  $(`#${name}`).onclick = () => set({ ...conversation.record.settings, [name]: !conversation.record.settings[name] });
}
$("#settings-button").onclick = async () => set(await changedSettings(conversation.record.settings));
$("#model").onchange = () => {
  localStorage.setItem("model", $("#model").value);
  render();
};
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

function set(settings) {
  conversation.record.settings = settings;
  rememberSettings(settings);
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

server.onKeyNeeded((message) => ask({ title: say("key"), text: `${message}. ${say("doKey")}`, input: "password" }));

/** Asks the server for its models and tools, until it answers. */
async function meet() {
  try {
    const models = await server.models();
    const chosen = localStorage.getItem("model");
    const options = models.map(({ id, sees }) => Object.assign(new Option(id, id, false, id === chosen), { sees }));
    $("#model").replaceChildren(...options);
    document.title = models.length === 1 ? models[0].id : "MiniMind";
    schemas = await server.tools();
    tell(models.length ? "" : say("noModels"));
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

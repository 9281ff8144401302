// The page: which conversation is shown, what is being answered, and what the buttons do.

import { addressOf, named } from "./address.js";
import { answer } from "./answer.js";
import { Conversation, titleFrom } from "./conversation.js";
import { draftOf, setDraft } from "./drafts.js";
import { announce, ask, tell, tellNotKept } from "./elements.js";
import { onEnter } from "./keys.js";
import { Attached } from "./pictures.js";
import { remember, remembered } from "./preferences.js";
import * as server from "./server.js";
import { changed as changedSettings, lastSettings, OF_DIALOG, rememberSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { showTheme, switchTheme } from "./theme.js";
import { Thread } from "./thread.js";
import { unanswered } from "./unanswered.js";
import { say, showWords, switchLanguage } from "./words.js";

const SAVE_EVERY = 1000; // milliseconds, of an answer that is being written
const ASK_AGAIN = 3000; // milliseconds, for a server that is not there or still loads

const $ = (selector) => document.querySelector(selector);
const running = new Map(); // id of a conversation that is being answered -> {conversation, controller}
const faults = new Map(); // id of a conversation -> why its last answer failed
let conversation = Conversation.begin(lastSettings());
let schemas = []; // of the tools that the server carries out

const thread = new Thread($("#thread"), {
  edit(message, text) {
    if (running.has(conversation.record.id)) return false;
    send(text, message.pictures, message.parent);
    return true;
  },
  again: (message) => respond(conversation.messages.get(message.parent)),
  choose(message) {
    conversation.choose(message);
    faults.delete(conversation.record.id);
    keep(conversation, ["leaf"]);
    render();
  },
});
const sees = () => Boolean($("#model").selectedOptions[0]?.sees);
const attached = new Attached(sees);
const sidebar = new Sidebar({ open: go, rename, remove, imported }, () => conversation.record.id);

// ---- What is shown ----

function render() {
  const { id, settings } = conversation.record;
  const busy = running.has(id);
  thread.show(conversation, busy, busy ? null : unanswered(conversation.path(), faults.get(id), respond));
  const hadFocus = [$("#stop"), $("#send")].includes(document.activeElement);
  $("#stop").hidden = !busy;
  $("#send").hidden = busy;
  if (hadFocus) $(busy ? "#stop" : "#send").focus();
  $("#thinking").ariaPressed = String(settings.thinking);
  $("#tools").ariaPressed = String(settings.tools);
  $("#tools").hidden = !schemas.length;
  $("#picture").hidden = !sees();
  $("#tools").title = schemas.map((schema) => schema.function.name).join(", ");
}

/** Shows the conversation that the address names, or a new one. */
async function open() {
  const id = named();
  if (id === conversation.record.id) return;
  $("#settings").close(); // it is the other one's
  const found = loaded(id) ?? (await store.load(id).catch(tellNotKept)) ?? Conversation.begin(lastSettings());
  if (id !== named()) return; // meanwhile another was chosen
  setDraft(conversation, { text: $("#text").value, pictures: attached.take() });
  conversation = found;
  const { text, pictures } = draftOf(found);
  $("#text").value = text;
  attached.give(pictures);
  sidebar.toggle(false);
  render();
  refresh();
}

/** A conversation that is shown or being answered: the one object that may be changed. */
function loaded(id) {
  return running.get(id)?.conversation ?? (conversation.record.id === id ? conversation : null);
}

function go(id) {
  if (id === named()) sidebar.toggle(false);
  else location.hash = addressOf(id); // which opens it
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
  history.replaceState(null, "", addressOf(asked.record.id));
  thread.toEnd();
  await keep(asked, ["title", "leaf", "updated"]);
  navigator.storage?.persist?.(); // or the browser may clear it when the disk is full
  await respond(question, asked);
}

/** Answers a question; an earlier answer to it stays as a version. */
async function respond(question, asked = conversation) {
  const { id, settings, leaf } = asked.record;
  if (running.has(id)) return;
  const controller = new AbortController();
  running.set(id, { conversation: asked, controller });
  faults.delete(id);
  announce(say("answering"));
  const version = [...asked.messages.values()].filter((message) => message.parent === question.id).length;
  let timer;
  const save = () => {
    timer = clearTimeout(timer); // undefined
    return keep(asked, ["leaf", "updated"], true);
  };
  try {
    // When the page was opened the server was not there, or wanted a key.
    const fault = $("#model").value ? null : await meet();
    if (fault?.status === 401) throw fault;
    const request = {
      model: $("#model").value, schemas: settings.tools ? schemas : [], thinking: settings.thinking, version,
      signal: controller.signal,
    };
    await answer(asked, question, request, (message, isNew) => {
      asked.changed(message);
      if (asked === conversation) isNew ? render() : thread.grow(message);
      if (isNew) save();
      else timer ??= setTimeout(save, SAVE_EVERY);
    });
  } catch (error) {
    if (!controller.signal.aborted) faults.set(id, error);
    if (error.status === 404) meet(); // it may serve other models by now
    if (!(error instanceof server.ServerError)) console.error(error);
  } finally {
    clearTimeout(timer);
    running.delete(id);
    announce(say("answered"));
    if (asked.record.leaf === question.id && asked.messages.has(leaf)) asked.record.leaf = leaf; // nothing has come
    await keep(asked, ["leaf", "updated"]);
    if (asked === conversation) render();
  }
}

// ---- Keeping ----

/** Keeps what has changed: these fields of the record, and messages. partial: of an answer that is being written. */
async function keep(changed, fields, partial = false) {
  if (changed.isGone) return;
  const messages = changed.takeFresh();
  try {
    const written = messages.length ? [...fields, "leaf"] : fields;
    const isThere = await store.keep(changed.record, written, messages, { wasKept: changed.isKept, partial });
    if (!isThere) return forget(changed.record.id, say("goneElsewhere"));
    changed.isKept = true;
    if (!partial) await sidebar.refresh();
  } catch (error) {
    messages.forEach((message) => changed.changed(message));
    tellNotKept(error);
  }
}

async function rename(id, title) {
  const renamed = loaded(id) ?? (await store.load(id));
  renamed.record.title = title;
  keep(renamed, ["title"]);
}

async function remove(id) {
  forget(id);
  await store.remove(id).catch(tellNotKept);
  refresh();
}

/** Ends what is done with a conversation that is deleted. why: to be told where it is shown. */
function forget(id, why = "") {
  if (loaded(id)) loaded(id).isGone = true;
  running.get(id)?.controller.abort();
  if (conversation.record.id !== id) return;
  history.replaceState(null, "", location.pathname);
  conversation = Conversation.begin(lastSettings());
  $("#text").value = [draftOf(conversation).text, $("#text").value].filter(Boolean).join("\n");
  if (why) tell(why);
  render();
}

/** Takes over what another tab, or a file, has changed of a conversation. */
async function takeOver(id) {
  const here = loaded(id);
  if (!here) return;
  const isBusy = () => running.has(id) || here.hasFresh;
  let found, busy, revision;
  do { // again where it has changed meanwhile, for then what was loaded is older
    [busy, revision] = [isBusy(), here.revision];
    found = await store.load(id);
    busy ||= isBusy();
  } while (!busy && revision !== here.revision);
  if (found) here.update(found.record, found.messages.values(), busy);
  else if (here.isKept) forget(id, say("goneElsewhere"));
  if (here === conversation) render();
}

async function imported(ids) {
  for (const id of ids) await takeOver(id).catch(tellNotKept);
  refresh();
}

store.onChange(({ data: id }) => imported([id]));

// ---- Buttons ----

const submit = async () => {
  await attached.ready;
  const text = $("#text").value;
  if (running.has(conversation.record.id)) return;
  if (!text.trim() && attached.isEmpty) return;
  $("#text").value = "";
  setDraft(conversation);
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
  $(`#${name}`).onclick = () => {
    const { settings } = conversation.record;
    set(conversation, { ...settings, [name]: !settings[name] }, [name]);
  };
}
$("#settings-button").onclick = async () => {
  const shown = conversation;
  const chosen = await changedSettings(shown.record.settings);
  if (chosen) set(shown, chosen, OF_DIALOG);
};
$("#model").onchange = () => {
  remember("model", $("#model").value);
  render();
};
$("#language").onclick = () => {
  switchLanguage();
  begin();
};
$("#theme").onclick = switchTheme;
addEventListener("hashchange", open);

/** Settings of a conversation; the next ones begin with those of them that are named. */
function set(changed, settings, names) {
  changed.record.settings = settings;
  rememberSettings(settings, names);
  if (changed.messages.size) keep(changed, ["settings"]);
  render();
}

// ---- The beginning ----

function begin() {
  showWords();
  showTheme();
  render();
  refresh();
}

server.onKeyNeeded((message) => ask({ title: say("key"), text: `${message}. ${say("doKey")}`, input: "password" }));

/** Asks the server for its models and tools, until it answers. What it says where it gives none. */
async function meet() {
  try {
    const models = await server.models();
    const chosen = remembered("model");
    const options = models.map(({ id, sees }) => Object.assign(new Option(id, id, false, id === chosen), { sees }));
    $("#model").replaceChildren(...options);
    document.title = models.length === 1 ? models[0].id : "MiniMind";
    schemas = await server.tools();
    tell(models.length ? "" : say("noModels"), "server");
    render();
    return null;
  } catch (error) {
    if (!(error instanceof server.ServerError)) console.error(error);
    tell(`${error.message} ${error.advice ?? ""}`, "server");
    clearTimeout(meet.timer);
    if (error.status !== 401) meet.timer = setTimeout(meet, ASK_AGAIN); // else no key was given; the next message asks
    return error;
  }
}

begin();
await open();
await meet();
if (document.activeElement === document.body) $("#text").focus();

// The list of conversations: choose, search, rename, delete, export, import.

import { ask, iconButton, make, tell, tellNotKept } from "./elements.js";
import * as store from "./store.js";
import { say } from "./words.js";

const $ = (selector) => document.querySelector(selector);

/** actions: {open(id), rename(id, title), remove(id), imported(ids)}; current(): the id of what is shown. */
export class Sidebar {
  constructor(actions, current) {
    this.actions = actions;
    this.current = current;
    let timer;
    $("#search").oninput = () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.refresh(), 150);
    };
    $("#export").onclick = () => this.#export();
    $("#import").onclick = () => $("#file").click();
    $("#file").onchange = () => this.#import();
    $("#menu").onclick = () => this.toggle();
    $("#shade").onclick = () => this.toggle(false);
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.toggle(false));
  }

  /** Opens or closes the list where it lies over the page, on a phone. */
  toggle(open = !document.body.classList.contains("listed")) {
    document.body.classList.toggle("listed", open);
    $("#shade").hidden = !open;
    $("#menu").ariaExpanded = String(open);
    if (open) $("#new").focus();
    else if (!document.activeElement.checkVisibility()) $("#menu").focus();
  }

  async refresh() {
    const wanted = $("#search").value.trim().toLowerCase();
    const found = (await store.allConversations()).sort((a, b) => b.updated - a.updated);
    const kept = wanted ? await matching(found, wanted) : found;
    const none = found.length ? [make("li", { className: "note", textContent: say("notFound") })] : [];
    const focused = $("#list").contains(document.activeElement) ? document.activeElement : null;
    const [id, at] = [focused?.parentElement.dataset.id, [...(focused?.parentElement.children ?? [])].indexOf(focused)];
    $("#list").replaceChildren(...(kept.length ? kept.map((record) => this.#entry(record)) : none));
    if (focused) (document.querySelector(`#list [data-id="${CSS.escape(id)}"]`)?.children[at] ?? $("#new")).focus();
  }

  #entry(record) {
    const open = make("button", { type: "button", className: "title", textContent: record.title || say("untitled") });
    open.onclick = () => this.actions.open(record.id);
    if (record.id === this.current()) open.ariaCurrent = "true";
    const rename = async () => {
      const title = await ask({ title: say("titleOf"), input: "text", value: record.title, ok: say("save") });
      if (title?.trim()) this.actions.rename(record.id, title.trim());
    };
    const remove = async () => {
      const text = say("deleteText", { title: record.title });
      if (await ask({ title: say("deleteTitle"), text, ok: say("delete") })) this.actions.remove(record.id);
    };
    const entry = make("li", {}, open, iconButton("✎", "rename", rename), iconButton("✕", "delete", remove));
    entry.dataset.id = record.id;
    return entry;
  }

  async #export() {
    const text = await store.exported().catch(tellNotKept);
    if (!text) return;
    const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    make("a", { href: address, download: `minimind-${new Date().toISOString().slice(0, 10)}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  }

  async #import() {
    const [file] = $("#file").files;
    $("#file").value = ""; // so that the same file can be chosen again
    if (!file) return;
    try {
      const found = await store.imported(file);
      tell(say("imported", found));
      this.actions.imported(found.ids);
    } catch (error) {
      tell(say("badFile", { why: error.message }));
      this.refresh();
    }
  }
}

/** Conversations with the words in their title or in a message. */
async function matching(records, wanted) {
  const has = (text) => text.toLowerCase().includes(wanted);
  const said = (await store.allMessages()).filter((message) => has(message.content));
  const ids = new Set(said.map((message) => message.conversation));
  return records.filter((record) => has(record.title) || ids.has(record.id));
}

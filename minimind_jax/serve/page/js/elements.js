// Small pieces of the page that several parts make.

import { label, say } from "./words.js";

/** An element with properties and children; text is always text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A button that shows a sign and is called by a name of words.js. */
export function iconButton(sign, name, onclick) {
  const button = make("button", { type: "button", className: "icon", textContent: sign, onclick });
  label(button, say(name));
  return button;
}

/** A button that shows its name, without a frame. */
export function wordButton(name, onclick) {
  return make("button", { type: "button", className: "quiet", textContent: say(name), onclick });
}

/** A button that copies what `text()` gives, and says whether the browser let it. */
export function copyButton(text) {
  const button = wordButton("copy", async () => {
    // On plain http from another machine there is no clipboard.
    const end = await navigator.clipboard?.writeText(text()).then(() => "copied", () => "copyFailed");
    button.textContent = say(end ?? "copyFailed");
    announce(button.textContent);
    setTimeout(() => (button.textContent = say("copy")), 1500);
  });
  button.classList.add("copy");
  return button;
}

/** Says something to those who hear the page. */
export function announce(text) {
  document.querySelector("#status").textContent = text;
}

/** Says something to everybody, above the conversation, until it is closed or said anew; "" ends what `by` said. */
export function tell(text, by = "") {
  const banner = document.querySelector("#banner");
  if (!text && banner.dataset.by !== by) return;
  if (by && banner.dataset.by === by && banner.firstChild?.data === text) return; // it is there, or was closed
  banner.dataset.by = by;
  banner.hidden = !text;
  banner.replaceChildren(text, iconButton("✕", "close", () => (banner.hidden = true)));
}

/** Says that the browser keeps no conversations, and why. */
export function tellNotKept(error) {
  tell(say("noStore", { why: error?.message ?? error }), "store");
}

/** Asks in a dialog: true, or with `input` (the type of a field) the text that was written. null: cancelled. */
export function ask({ title, text = "", input = "", value = "", ok = say("ok") }) {
  const dialog = document.querySelector("#question");
  const field = dialog.querySelector("#question-input");
  dialog.querySelector("#question-title").textContent = title;
  dialog.querySelector("#question-text").textContent = text;
  dialog.querySelector("#question-ok").textContent = ok;
  Object.assign(field, { hidden: !input, type: input || "text", value, required: Boolean(input) });
  dialog.returnValue = "";
  dialog.showModal();
  if (input) field.focus(), field.select();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue !== "ok" ? null : input ? field.value : true);
  });
}

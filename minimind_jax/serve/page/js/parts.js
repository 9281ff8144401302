// How one message is shown: a question with its editor; an answer with thinking, words, calls and notes.

import { MOST_ROUNDS } from "./answer.js";
import { make } from "./elements.js";
import { isComposing, onEnter } from "./keys.js";
import { Markdown } from "./markdown.js";
import { pictureRow } from "./pictures.js";
import { say } from "./words.js";

const LONGEST_SUMMARY = 80; // characters of a call's arguments and of its result beside the tool's name

export class QuestionPart {
  element = make("div", { className: "question" });
  #editing = false;

  show(message) {
    const words = make("div", { className: "plain", dir: "auto", textContent: message.content });
    if (!this.#editing) this.element.replaceChildren(pictureRow(message.pictures ?? []), words);
    return this.element;
  }

  /** Lets the user change the words of the question; `send` gets them and says whether they are sent. The earlier one
   *  stays as a version. */
  edit(message, send) {
    const field = make("textarea", { value: message.content, ariaLabel: say("edit"), rows: 3, dir: "auto" });
    const end = () => {
      this.#editing = false;
      this.show(message);
      this.element.closest("section")?.focus();
    };
    const done = () => {
      if (!field.value.trim() && !message.pictures?.length) return;
      if (send(field.value)) end();
    };
    onEnter(field, done);
    field.addEventListener("keydown", (event) => event.key === "Escape" && !isComposing(event) && end());
    this.#editing = true;
    const buttons = make("div", { className: "row" },
      make("button", { type: "button", textContent: say("cancel"), onclick: end }),
      make("button", { type: "button", className: "main", textContent: say("send"), onclick: done }));
    this.element.replaceChildren(pictureRow(message.pictures ?? []), field, buttons);
    field.focus();
  }
}

export class AnswerPart {
  element = make("div", { className: "answer" });
  #title = make("summary");
  #thoughts = make("div", { className: "plain" });
  #thinking = make("details", { className: "thinking" }, this.#title, this.#thoughts);
  #words = new Markdown();
  #calls = make("div", { className: "calls" });
  #notes = make("div", { className: "notes" });
  #finished = null; // the text that is shown whole

  constructor() {
    this.element.append(this.#thinking, this.#words.element, this.#calls, this.#notes);
  }

  /** later: the messages of the same turn behind it. growing: it is being written. */
  show(message, later, growing) {
    this.#showThinking(message, growing);
    if (growing) this.#words.grow(message.content);
    else if (this.#finished !== message.content) this.#words.finish((this.#finished = message.content));
    this.#showCalls(message.calls ?? [], later, growing);
    const notes = growing ? this.#waiting(message) : notesOf(message, later);
    this.#notes.replaceChildren(...notes.map((text) => make("p", { className: "note", textContent: text })));
    return this.element;
  }

  grow(message) {
    this.show(message, [], true);
  }

  #waiting(message) {
    return message.content || message.reasoning || message.calls.length ? [] : [say("waiting")];
  }

  #showThinking({ reasoning, content, calls, stats }, growing) {
    this.#thinking.hidden = !reasoning;
    if (!reasoning) return;
    if (growing && !content && !calls?.length) this.#title.textContent = say("thinkingNow");
    else if (stats?.thought) this.#title.textContent = say("thought", { seconds: stats.thought.toFixed(1) });
    else this.#title.textContent = say("thoughtSome");
    // Only what is new is added: a long text that is set again and again would stop the page.
    const shown = this.#thoughts.textContent.length;
    if (reasoning.length > shown) this.#thoughts.append(reasoning.slice(shown));
  }

  #showCalls(calls, later, growing) {
    const open = new Set([...this.#calls.querySelectorAll("details[open]")].map((details) => details.dataset.call));
    const shown = calls.map((call) => {
      const result = later.find((other) => other.call === call.id);
      const details = make("details", { className: "call" }, make("summary", {}, ...summaryOf(call, result, growing)));
      details.dataset.call = call.id;
      details.open = open.has(call.id);
      details.append(make("pre", { textContent: call.function.arguments }));
      if (result) details.append(make("pre", { className: faultClass(result), textContent: result.content }));
      return details;
    });
    this.#calls.replaceChildren(...shown);
  }
}

function summaryOf(call, result, growing) {
  const parts = [make("b", { textContent: call.function.name || "…" }), ` ${brief(call.function.arguments)} `];
  if (result) parts.push(make("span", { className: faultClass(result) }, `→ ${brief(result.content)}`));
  else if (growing) parts.push(make("i", { textContent: say("calling") }));
  return parts;
}

const faultClass = (result) => (result.isError ? "fault" : "");

const brief = (text) => (text.length > LONGEST_SUMMARY ? `${text.slice(0, LONGEST_SUMMARY)}…` : text);

/** What is to be said of an answer besides its words. */
function notesOf({ finish, stats, calls, content }, later) {
  const notes = [];
  if (stats?.skipped) notes.push(say("left", { count: stats.skipped }));
  if (finish === null) notes.push(say("unfinished"));
  else if (finish === "stopped" || finish === "length") notes.push(say(finish));
  else if (finish === "tool_calls") {
    const isDone = calls.some((call) => later.some((other) => other.call === call.id));
    if (!isDone) notes.push(say("tooManyRounds", { rounds: MOST_ROUNDS }));
  } else if (finish !== "stop") notes.push(say("cut"));
  else if (!content) notes.push(say("nothing"));
  return notes;
}

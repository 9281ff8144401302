// The messages of a conversation, as they are shown and as they grow.

import { AnswerPart, QuestionPart } from "./parts.js";
import { copyButton, iconButton, make, wordButton } from "./elements.js";
import { say } from "./words.js";

const NEAR = 80; // pixels from the bottom, within which the view follows what is written

export class Thread {
  #parts = new Map(); // of messages of users and of the model, by id; they stay while the conversation is shown
  #inner = make("div", { className: "inner" });
  #shown = null;
  #footers = new Map(); // id of an answer's last message -> where its speed stands

  /** actions: {edit(message, text: its pictures stay; whether it is sent), again(message), choose(message)}, what the buttons do. */
  constructor(element, actions) {
    this.actions = actions;
    element.append(this.#inner);
    let follows = true;
    element.onscroll = () => (follows = element.scrollHeight - element.scrollTop - element.clientHeight < NEAR);
    new ResizeObserver(() => follows && this.toEnd()).observe(this.#inner);
    this.toEnd = () => {
      follows = true;
      element.scrollTop = element.scrollHeight;
    };
  }

  /** Shows a conversation down to its leaf. busy: an answer is being written; end: what stands below, if anything. */
  show(conversation, busy, end) {
    if (this.#shown !== conversation) this.#parts.clear();
    this.#footers.clear();
    const turns = [];
    const path = conversation.path();
    for (const message of path) {
      const isNext = message.role === "user" || turns.at(-1)?.[0].role !== "assistant";
      if (isNext) turns.push([message]);
      else turns.at(-1).push(message);
    }
    const focused = this.#inner.contains(document.activeElement) ? document.activeElement : null;
    const articles = turns.map((turn) => this.#article(conversation, turn, busy && turn === turns.at(-1), busy));
    if (!path.length) articles.push(make("p", { className: "empty", textContent: say("empty") }));
    this.#inner.replaceChildren(...articles, ...(end ? [end] : []));
    if (focused) (focused.isConnected ? focused : this.#inner.parentElement).focus({ preventScroll: true });
    if (this.#shown !== conversation) this.toEnd();
    this.#shown = conversation;
  }

  /** Shows what has come to a message that is being written. */
  grow(message) {
    this.#parts.get(message.id)?.grow(message);
    this.#footers.get(message.id)?.replaceChildren(speed(message.stats, true));
  }

  #article(conversation, messages, growing, busy) {
    const [first, last] = [messages[0], messages.findLast((message) => message.role !== "tool") ?? messages[0]];
    const isUser = first.role === "user";
    const article = make("article", { className: isUser ? "user" : "assistant" });
    article.ariaLabel = isUser ? say("you") : (first.model ?? "");
    messages.forEach((message, index) => {
      if (message.role === "tool") return;
      const later = messages.slice(index + 1); // where the results of its calls stand
      article.append(this.#part(message).show(message, later, growing && message === last));
    });
    if (growing && !isUser) {
      article.ariaBusy = "true";
      const footer = make("small", { className: "speed" });
      this.#footers.set(last.id, footer);
      article.append(footer);
    } else if (!busy) article.append(this.#footer(conversation, first, last, isUser));
    return article;
  }

  #part(message) {
    let part = this.#parts.get(message.id);
    if (!part) this.#parts.set(message.id, (part = new (message.role === "user" ? QuestionPart : AnswerPart)()));
    return part;
  }

  /** Versions, and what can be done with a turn. */
  #footer(conversation, first, last, isUser) {
    const footer = make("footer");
    const versions = conversation.versions(first);
    const at = versions.indexOf(first);
    if (versions.length > 1) {
      const step = (by) => () => this.actions.choose(versions[at + by]);
      const [earlier, later] = [iconButton("‹", "earlier", step(-1)), iconButton("›", "later", step(1))];
      earlier.disabled = at === 0;
      later.disabled = at === versions.length - 1;
      footer.append(earlier, `${at + 1}/${versions.length}`, later);
    }
    footer.append(copyButton(() => last.content));
    if (isUser) {
      const send = (text) => this.actions.edit(first, text);
      footer.append(wordButton("edit", () => this.#part(first).edit(first, send)));
    } else {
      footer.append(wordButton("again", () => this.actions.again(first)));
      footer.append(make("small", { className: "speed" }, speed(last.stats ?? {}, false)));
    }
    return footer;
  }
}

const SHORTEST = 0.1; // seconds: tokens come several at a time, and a single burst has no rate

/** What is known of an answer's speed. The first token came with the prompt's reading, the others in `seconds`. */
function speed(stats, growing) {
  const said = [];
  const { tokens, seconds = 0 } = stats;
  const rate = (count) => (seconds >= SHORTEST ? ((count - 1) / seconds).toFixed(1) : "–");
  const first = stats.first?.toFixed(2);
  if (growing && first) said.push(say("speedNow", { rate: rate(stats.pieces) }));
  else if (tokens && first && seconds >= SHORTEST) said.push(say("speed", { rate: rate(tokens), first, tokens }));
  else if (tokens && first) said.push(say("burst", { tokens, seconds: (stats.first + seconds).toFixed(2) }));
  else if (first) said.push(say("firstOnly", { first }));
  if (stats.cached) said.push(say("cached", stats));
  if (stats.seed !== undefined) said.push(say("seedUsed", stats));
  return said.join(" · ");
}

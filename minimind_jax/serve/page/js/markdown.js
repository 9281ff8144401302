// Markdown as elements, in a way that cannot be turned against the reader: HTML in it is shown as text, what `marked`
// makes of the rest passes DOMPurify with few tags, and no picture is loaded (its address may tell what was said).

import hljs from "../vendor/highlight.js";
import { Lexer, Marked } from "../vendor/marked.js";
import DOMPurify from "../vendor/purify.js";
import { copyButton } from "./elements.js";
import { say } from "./words.js";

// A model that repeats itself writes what takes the libraries' expressions minutes: their time grows with the square
// of a paragraph's, and of a line's, length. So long ones are shown without bold words or colours.
const LONGEST_PARAGRAPH = 5000;
const LONGEST_LINE = 1000; // of code
const LONGEST_CODE = 10_000;
const REST = 4; // between two renderings the page rests so many times as long as one took
const SHORTEST_REST = 60; // milliseconds

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s span strong".split(" "),
    ..."table tbody td th thead tr ul".split(" "),
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) => text.replace(/[&<>"']/g, (mark) => `&#${mark.charCodeAt(0)};`);

let colours = true; // whether code is coloured; not while it is being written

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    image: ({ href, text }) => `<a href="${escaped(href)}">[${escaped(text || say("image"))}]</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code({ text, lang }) {
      const language = lang?.match(/^\S+/)?.[0] ?? "";
      const isShort = text.length < LONGEST_CODE && text.split("\n").every((line) => line.length < LONGEST_LINE);
      const isColoured = colours && isShort && hljs.getLanguage(language);
      const body = isColoured ? hljs.highlight(text, { language }).value : escaped(text);
      return `<pre><code class="language-${escaped(language)}">${body}\n</code></pre>`;
    },
  },
});

class BoundedLexer extends Lexer {
  inlineTokens(text, tokens = []) {
    if (text.length < LONGEST_PARAGRAPH) return super.inlineTokens(text, tokens);
    tokens.push({ type: "text", raw: text, text, escaped: false });
    return tokens;
  }
}

const tokensOf = (text) => new BoundedLexer(marked.defaults).lex(text);

function fragmentOf(tokens) {
  const fragment = DOMPurify.sanitize(marked.parser(tokens), ALLOWED);
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.title = link.href;
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const box = document.createElement("div");
    box.className = "code";
    pre.replaceWith(box);
    box.append(pre, copyButton(() => pre.textContent));
  }
  return fragment;
}

/** Markdown that grows, in an element. */
export class Markdown {
  constructor() {
    this.element = document.createElement("div");
    this.element.className = "markdown";
    this.element.dir = "auto";
    this.#open.className = "open";
  }

  #open = document.createElement("div"); // the last blocks, of which more may come
  #text = "";
  #settled = 0; // characters of the blocks above
  #timer = null;
  #rest = 0;

  /** Shows the text soon. It begins with what was shown before. */
  grow(text) {
    this.#text = text;
    this.#timer ??= setTimeout(() => {
      const started = performance.now();
      this.#render();
      this.#rest = Math.max(SHORTEST_REST, REST * (performance.now() - started));
      this.#timer = null;
    }, this.#rest);
  }

  /** Shows the whole text, now and for good. */
  finish(text) {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#guarded(text, () => this.element.replaceChildren(fragmentOf(tokensOf(text))));
  }

  /** Renders the blocks of which more may come; a block is settled when two others stand behind it. */
  #render() {
    if (!this.#open.isConnected) this.element.replaceChildren(this.#open);
    const rest = this.#text.slice(this.#settled);
    this.#guarded(rest, () => {
      const tokens = tokensOf(rest);
      const blocks = tokens.flatMap((token, index) => (token.type === "space" ? [] : [index]));
      const settled = tokens.slice(0, blocks.at(-2) ?? 0);
      const length = settled.reduce((sum, token) => sum + token.raw.length, 0);
      if (rest.startsWith(settled.map((token) => token.raw).join(""))) {
        this.#open.before(fragmentOf(settled));
        this.#settled += length;
        tokens.splice(0, settled.length);
      }
      colours = false;
      this.#open.replaceChildren(fragmentOf(tokens));
    });
  }

  /** Where `marked` gives up, on thousands of nested quotes say, the text is shown as it is. */
  #guarded(text, render) {
    try {
      render();
    } catch (error) {
      console.warn(error);
      (this.#open.isConnected ? this.#open : this.element).textContent = text;
    } finally {
      colours = true;
    }
  }
}

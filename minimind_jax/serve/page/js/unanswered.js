// What stands below a conversation whose last message has no answer.

import { make } from "./elements.js";
import { say } from "./words.js";

/** Why there is none, what to do, and a button; null where there is one. fault: of the last try; path: what is shown. */
export function unanswered(path, fault, respond) {
  const last = path.at(-1);
  if (!fault && (!last || last.role === "assistant")) return null;
  const box = make("div", { className: fault ? "fault box" : "box" });
  if (fault) box.role = "alert";
  if (fault) box.append(make("p", {}, fault.message), make("p", { className: "note" }, fault.advice ?? ""));
  const question = path.findLast((message) => message.role === "user");
  const button = make("button", { type: "button", className: "main", onclick: () => respond(question) });
  button.textContent = say(fault ? "retry" : "answerNow");
  box.append(button);
  return box;
}

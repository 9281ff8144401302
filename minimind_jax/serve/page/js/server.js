// What the page asks of the server, and what is said when it does not answer as hoped.

import { events } from "./events.js";
import { remember, remembered } from "./preferences.js";
import { say } from "./words.js";

const LONGEST_FAULT = 2000; // characters of an error that are shown

/** What the server (or its absence) said. status: of HTTP; 0 if there was no answer, or within a stream. */
export class ServerError extends Error {
  constructor(status, message, code = "") {
    super(message.slice(0, LONGEST_FAULT));
    this.status = status;
    this.code = code;
  }

  /** What to do about it. */
  get advice() {
    if (this.isTooLong) return say("doShorter");
    if (this.code === "unreachable") return say("doRestart");
    if (this.status === 401 || this.status === 403) return say("doKey");
    if (this.status === 404 || this.code === "images_not_supported") return say("doModel");
    if (this.status === 429 || this.status === 503) return say("doWait");
    return say(this.status >= 400 && this.status < 500 ? "doSettings" : "doLook");
  }

  /** Whether the prompt is longer than the model's context, or than a request may be. */
  get isTooLong() {
    if (this.status === 413 || this.code === "too_many_images") return true;
    return this.status === 400 && /context.length|maximum context|exceed_context/.test(`${this.code} ${this.message}`);
  }
}

/** The stream ended without saying that it was complete. */
export class CutError extends ServerError {
  constructor() {
    super(0, say("cut"), "unreachable");
  }
}

let askForKey = async () => null;
let asking = null; // one dialog, however many requests wait for it

/** ask: a function of the server's message that gives a key, or null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** The models that can chat, {id, sees}; classifiers and reward models are served as well. */
export async function models() {
  const { data = [] } = await json("v1/models");
  const sees = (model) => Boolean(model.architecture?.input_modalities?.includes("image"));
  return data
    .filter((model) => (model.task ?? "generate") === "generate")
    .map((model) => ({ id: model.id, sees: sees(model) }));
}

/** The schemas of the tools that the server carries out; none where it carries out none. */
export async function tools() {
  try {
    return (await json("tools")).tools ?? [];
  } catch (error) {
    if (error instanceof ServerError && error.status === 404) return [];
    throw error;
  }
}

/** The result of one call, as the model is to be told: {content, isError}. */
export async function callTool(call, signal) {
  const { name, arguments: given } = call.function;
  const found = await json("tools/call", { name, arguments: given }, signal);
  return { content: found.content, isError: Boolean(found.is_error) };
}

/** The chunks of a streamed answer. Throws ServerError, CutError, or an AbortError when the signal says so. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", body, signal);
  let isWhole = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        isWhole = true; // the server ends the body now; leaving before it does looks like going away
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw faultOf(chunk, 0);
      yield chunk;
    }
  } catch (error) {
    throw error instanceof ServerError || signal?.aborted ? error : new CutError();
  }
  if (!isWhole) throw new CutError();
}

async function json(path, body, signal) {
  return (await request(path, body, signal)).json();
}

/** A response that is well. Where the server wants a key, the user is asked and the request is made again. */
async function request(path, body, signal) {
  for (;;) {
    const key = remembered("key", "sessionStorage");
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const options = { headers, signal };
    if (body !== undefined) {
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
      headers["Content-Type"] = "application/json";
    }
    let response;
    try {
      response = await fetch(path, options); // relative: the page may be served below a path of a proxy
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError(0, say("unreachable"), "unreachable");
    }
    if (response.ok) return response;
    const fault = faultOf(await response.text(), response.status);
    if (response.status !== 401) throw fault;
    asking ??= askForKey(fault.message).finally(() => (asking = null));
    const given = await asking;
    if (given === null) throw fault;
    // Of other characters no header is made: quotes of a text program, or what is not seen, are not the key's.
    remember("key", given.replace(/[^\x20-\x7e]/g, "").trim(), "sessionStorage");
  }
}

/** The error in a body, whichever of the usual shapes it has. */
function faultOf(body, status) {
  let found = body;
  try {
    if (typeof body === "string") found = JSON.parse(body);
  } catch {
    return new ServerError(status, body.trim() || say("odd", { status })); // a proxy's page, shown as text
  }
  const error = found?.error ?? found;
  const message = typeof error === "string" ? error : (error?.message ?? JSON.stringify(found));
  return new ServerError(status, message || say("odd", { status }), String(error?.code ?? ""));
}

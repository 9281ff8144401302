// One answer: the model's words as they come, the tools it calls, and its next words.

import { forModel, isEmpty } from "./conversation.js";
import { callTool, CutError, ServerError, streamChat } from "./server.js";

export const MOST_ROUNDS = 5; // of calls and results in one answer; `minimind chat` has as many
const COMPLETE = ["stop", "length", "tool_calls"]; // reasons for an end that the model itself came to

/**
 * Answers the message `parent` of a conversation.
 *
 * asked: {model, schemas (of the tools offered), thinking, version (how many answers to it there are already), signal}
 * changed(message, isNew): called whenever a message of the answer grew.
 * Throws ServerError; what had come until then is kept. A message that nothing came for is taken away.
 */
export async function answer(conversation, parent, asked, changed) {
  let last = parent;
  let skipped = 0;
  for (let round = 0; ; round++) {
    const empty = { reasoning: "", calls: [], finish: null, stats: {}, model: asked.model };
    const message = conversation.add("assistant", last.id, empty);
    changed(message, true);
    try {
      skipped = await speak(conversation, message, { ...asked, skipped, mayCall: round < MOST_ROUNDS }, changed);
    } finally {
      if (isEmpty(message) && !COMPLETE.includes(message.finish)) conversation.remove(message);
      changed(message);
    }
    last = message;
    if (message.finish !== "tool_calls" || round === MOST_ROUNDS) return;
    for (const call of message.calls) {
      last = conversation.add("tool", last.id, { call: call.id, ...(await carryOut(call, asked.signal)) });
      changed(last, true);
      if (asked.signal.aborted) return;
    }
  }
}

/**
 * Streams one message. Turns that no longer fit the context are left out, oldest first: their number. An eighth of those
 * that are left goes at a time: one by one a long conversation would be sent hundreds of times before it fits.
 */
async function speak(conversation, message, asked, changed) {
  const path = conversation.path(message.parent);
  const turns = path.filter((other) => other.role === "user").length;
  for (let skipped = asked.skipped; ; skipped += Math.max(1, Math.floor((turns - skipped) / 8))) {
    message.stats.skipped = skipped;
    try {
      await read(message, requestOf(path, conversation.record.settings, { ...asked, skipped }), asked.signal, changed);
      return skipped;
    } catch (error) {
      if (!error.isTooLong || skipped + 1 >= turns) throw error;
    }
  }
}

/** The body of a request. A setting that is not set is not sent: the server takes the model's own. */
function requestOf(path, settings, { model, schemas, thinking, version, skipped, mayCall }) {
  const body = {
    model,
    messages: forModel(path, settings.system ?? "", skipped),
    stream: true,
    stream_options: { include_usage: true },
    chat_template_kwargs: { enable_thinking: thinking },
  };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens"]) {
    if (Number.isFinite(settings[name])) body[name] = settings[name];
  }
  if (Number.isFinite(settings.seed)) body.seed = settings.seed + version;
  if (schemas.length) Object.assign(body, { tools: schemas, tool_choice: mayCall ? "auto" : "none" });
  return body;
}

/** Reads a stream into a message, with its times. */
async function read(message, body, signal, changed) {
  const started = performance.now();
  const { stats } = message;
  if ("seed" in body) stats.seed = body.seed;
  let first = null;
  try {
    for await (const chunk of streamChat(body, signal)) {
      if (chunk.usage) count(stats, chunk.usage);
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const grew = extend(message, choice.delta ?? {});
      if (choice.finish_reason) message.finish = choice.finish_reason;
      if (!grew) continue;
      const now = performance.now();
      first ??= now;
      stats.first = (first - started) / 1000;
      stats.seconds = (now - first) / 1000; // of all tokens but the first
      if (!message.content && !message.calls.length) stats.thought = (now - started) / 1000;
      stats.pieces = (stats.pieces ?? 0) + 1;
      changed(message);
    }
  } catch (error) {
    if (signal.aborted) message.finish = "stopped";
    else {
      message.finish = "cut";
      if (!(error instanceof CutError) || isEmpty(message)) throw error;
    }
  }
  message.finish ??= "cut"; // a stream that ends without a reason is not complete either
  message.calls = message.calls.filter(Boolean);
}

function count(stats, usage) {
  stats.tokens = usage.completion_tokens;
  stats.prompt = usage.prompt_tokens;
  stats.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
}

/** Adds a delta to a message; whether there was anything in it. */
function extend(message, delta) {
  const thought = delta.reasoning_content ?? delta.reasoning ?? ""; // servers send one, the other, or the same in both
  const words = delta.content ?? "";
  message.reasoning += thought;
  message.content += words;
  for (const piece of delta.tool_calls ?? []) {
    const call = (message.calls[piece.index ?? 0] ??= newCall());
    call.id ||= piece.id ?? "";
    call.function.name ||= piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }
  return Boolean(thought || words || delta.tool_calls?.length);
}

const newCall = () => ({ id: "", type: "function", function: { name: "", arguments: "" } });

/** What comes of a call; an error is told to the model, which may try something else. */
async function carryOut(call, signal) {
  try {
    return await callTool(call, signal);
  } catch (error) {
    if (!(error instanceof ServerError) && !signal.aborted) throw error;
    return { content: JSON.stringify({ error: signal.aborted ? "stopped" : error.message }), isError: true };
  }
}

// A service on Express: `node server.js PORT`. Answers as tests/e2e/servers/script.py says, byte for byte the same frames.

import express from "express";
import { setTimeout as pause } from "node:timers/promises";

const PROMPT_TOKENS = 17;
const CACHED_TOKENS = 5;
const ERRORS = { 400: "BadRequestError", 429: "RateLimitError", 500: "InternalServerError" };

const errorBody = (status) =>
  JSON.stringify({ error: { message: "scripted", type: ERRORS[status] ?? "Error", param: null, code: status } });

const usage = (frames) => ({
  prompt_tokens: PROMPT_TOKENS,
  completion_tokens: frames,
  total_tokens: PROMPT_TOKENS + frames,
  prompt_tokens_details: { cached_tokens: CACHED_TOKENS },
});

function frame(chat, model, content, finish = null) {
  const choice = chat ? { index: 0, delta: content } : { index: 0, text: content };
  Object.assign(choice, { logprobs: null, finish_reason: finish });
  const object = chat ? "chat.completion.chunk" : "text_completion";
  return `data: ${JSON.stringify({ id: "cmpl-1", object, created: 1700000000, model, choices: [choice] })}\n\n`;
}

function whole(chat, model, frames) {
  const text = Array(frames).fill("word").join(" ");
  const choice = { index: 0, finish_reason: "stop", ...(chat ? { message: { role: "assistant", content: text } } : { text }) };
  const object = chat ? "chat.completion" : "text_completion";
  return JSON.stringify({ id: "cmpl-1", object, model, choices: [choice], usage: usage(frames) });
}

async function* events(chat, request, script) {
  const frames = script.frames ?? 11;
  if (chat) yield frame(chat, request.model, { role: "assistant", content: "" });
  yield ": ping\n\n";
  for (let number = 0; number < frames; number++) {
    await pause(number ? script.gap_ms ?? 0 : script.first_ms ?? 0);
    if (number === script.error_after) {
      yield `data: ${errorBody(500)}\n\n`;
      yield "data: [DONE]\n\n";
      return;
    }
    if (number === script.cut_after) throw new Error("scripted: the response is cut off");
    const text = `w\u00f6rd${number} `;
    yield frame(chat, request.model, chat ? { content: text } : text);
  }
  yield frame(chat, request.model, chat ? {} : "", "stop");
  if (request.stream_options?.include_usage) {
    const empty = { id: "cmpl-1", object: "chat.completion.chunk", model: request.model, choices: [] };
    yield `data: ${JSON.stringify({ ...empty, usage: usage(frames) })}\n\n`;
  }
  yield "data: [DONE]\n\n";
}

async function complete(request, response) {
  const chat = request.path.endsWith("/chat/completions");
  const script = request.body?.script ?? {};
  const status = script.status ?? 200;
  if (status >= 400 || !request.body?.stream) {
    await pause(script.first_ms ?? 0);
    const text = status >= 400 ? errorBody(status) : whole(chat, request.body?.model, script.frames ?? 11);
    response.status(status).type("application/json").send(text);
    return;
  }
  response.writeHead(200, { "content-type": "text/event-stream" });
  response.flushHeaders();
  try {
    for await (const event of events(chat, request.body, script)) {
      if (response.destroyed) return;
      response.write(event);
    }
    response.end();
  } catch {
    response.destroy();
  }
}

const app = express();
app.use(express.json({ limit: "8mb" }));
app.post("/v1/chat/completions", complete);
app.post("/v1/completions", complete);
app.use((_error, _request, response, _next) => response.status(400).type("application/json").send(errorBody(400)));
app.listen(Number(process.argv[2]), "127.0.0.1");

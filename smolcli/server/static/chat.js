/** The chat tab: a list of exchanges, each with a question and its answer or error. */

import { $, announce, copy, keep, kept, passFocus, stamp } from "./dom.js";
import { nameModel } from "./model.js";
import { RequestError, events, errorIn, request } from "./wire.js";

const NEAR_END_PX = 60;

let exchanges = [];
let running = null; // AbortController of the answer being generated, if any

/** The messages to send: answered exchanges before `exchange`, and its question. */
function messagesFor(exchange, system) {
  const before = exchanges.slice(0, exchanges.indexOf(exchange)).filter((e) => e.answer.trim());
  return [
    ...(system.trim() ? [{ role: "system", content: system }] : []),
    ...before.flatMap((e) => [
      { role: "user", content: e.question },
      { role: "assistant", content: e.answer },
    ]),
    { role: "user", content: exchange.question },
  ];
}

async function requestBody(exchange) {
  const { system, ...settings } = Object.fromEntries(new FormData($("settings-form")));
  const filled = Object.entries(settings).filter(([, value]) => value !== "");
  return JSON.stringify({
    model: $("model").dataset.id ?? (await nameModel()),
    messages: messagesFor(exchange, system),
    stream: true,
    stream_options: { include_usage: true },
    ...Object.fromEntries(filled.map(([name, value]) => [name, Number(value)])),
  });
}

/** Stream the answer to `exchange`, calling `onText` with each piece of text. */
async function streamAnswer(exchange, signal, onText) {
  const options = { body: await requestBody(exchange), accept: "text/event-stream", signal };
  const startMs = performance.now();
  const response = await request("v1/chat/completions", options);
  let ending = "";
  for await (const event of events(response)) {
    const error = errorIn(event);
    if (error) throw error;
    const choice = event.choices?.[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    if (choice?.finish_reason === "length") ending = " · stopped at the token limit";
    if (event.usage) exchange.note = usageNote(event.usage.completion_tokens, performance.now() - startMs);
  }
  exchange.note += ending;
}

function usageNote(numTokens, ms) {
  return `${numTokens} tokens · ${(ms / 1000).toFixed(1)} s`;
}

async function answer(exchange) {
  Object.assign(exchange, { answer: "", note: "", error: "" });
  running = new AbortController();
  show(exchange);
  setRunning(true);
  const text = exchange.view.querySelector(".answer").appendChild(new Text());
  let frame = 0; // pending animation frame; text arrives faster than it can be drawn
  const draw = () => stayAtEnd(() => ([text.data, frame] = [exchange.answer, 0]));
  try {
    await streamAnswer(exchange, running.signal, (piece) => {
      exchange.answer += piece;
      frame ||= requestAnimationFrame(draw);
    });
    if (!exchange.answer.trim()) exchange.note += " · empty answer";
  } catch (error) {
    if (error.name === "AbortError") exchange.note = "stopped";
    else exchange.error = error instanceof RequestError ? error.message : `Unexpected error: ${error.message}`;
  }
  running = null;
  setRunning(false);
  show(exchange);
  announce(exchange.error || exchange.answer || exchange.note);
  remember();
}

function setRunning(isRunning) {
  if (!isRunning) passFocus($("stop"), $("question"));
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("log").ariaBusy = String(isRunning);
}

function remember() {
  keep("chat", exchanges.map(({ view, ...plain }) => plain));
}

/** Apply a change to the log, and stay scrolled to its end if it was. */
function stayAtEnd(change) {
  const log = $("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
  change();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function show(exchange) {
  exchange.view ??= newView(exchange);
  const part = (name) => exchange.view.querySelector(`.${name}`);
  const isRunning = running !== null && exchange === exchanges.at(-1);
  stayAtEnd(() => {
    part("answer").textContent = exchange.answer;
    part("answer").classList.toggle("writing", isRunning);
    part("error").textContent = exchange.error;
    part("error").hidden = !exchange.error;
    part("note").textContent = exchange.note;
    part("copy").hidden = isRunning || !exchange.answer;
    part("retry").hidden = isRunning || !exchange.error;
  });
}

function newView(exchange) {
  const view = stamp("exchange");
  view.querySelector(".question").textContent = exchange.question;
  view.querySelector(".retry").addEventListener("click", () => retry(exchange));
  const button = view.querySelector(".copy");
  button.addEventListener("click", async () => {
    const isDone = await copy(exchange.answer).then(() => true, () => false);
    button.textContent = isDone ? "Copied" : "Copying failed";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  passFocus($("welcome"), $("log"));
  $("welcome").hidden = true;
  $("log").append(view);
  $("log").scrollTop = $("log").scrollHeight;
  return view;
}

/** Retry a failed question as the last exchange. */
function retry(exchange) {
  if (running || !$("settings-form").reportValidity()) return;
  passFocus(exchange.view, $("log"));
  exchange.view.remove();
  exchanges = exchanges.filter((other) => other !== exchange);
  begin(exchange.question);
}

function begin(question) {
  exchanges.push({ question, answer: "", note: "", error: "" });
  answer(exchanges.at(-1));
}

function send() {
  const question = $("question").value;
  if (running || !question.trim()) return;
  if (!$("settings-form").checkValidity()) {
    $("settings").open = true;
    $("settings-form").reportValidity();
    return;
  }
  $("question").value = "";
  begin(question);
}

function startNewChat() {
  running?.abort();
  for (const { view } of exchanges) view.remove();
  exchanges = [];
  $("welcome").hidden = false;
  remember();
  $("question").focus();
}

export function setUpChat() {
  for (const [name, value] of Object.entries(kept("settings", {}))) {
    const field = $("settings-form").elements[name];
    if (field) field.value = value;
  }
  exchanges = kept("chat", []);
  exchanges.forEach(show);
  $("settings-form").addEventListener("input", () =>
    keep("settings", Object.fromEntries(new FormData($("settings-form")))),
  );
  $("settings-form").addEventListener("submit", (event) => event.preventDefault());
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
    $("question").focus();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("key-dialog").open) running?.abort();
  });
  $("stop").addEventListener("click", () => {
    running?.abort();
    $("question").focus();
  });
  $("new-chat").addEventListener("click", startNewChat);
  for (const button of $("welcome").querySelectorAll("button")) {
    button.addEventListener("click", () => {
      $("question").value = button.textContent;
      send();
    });
  }
}

/** The chat: a list of exchanges, each a question and what became of it. */

import { $, announce, copy, keep, kept, stamp } from "./dom.js";
import { nameModel } from "./model.js";
import { Fault, events, faultIn, request } from "./wire.js";

const NEAR_END_PX = 60;

let exchanges = [];
let running = null; // the AbortController of the answer that is being written

/** The turns before `exchange` that were answered, and its question. */
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
  const given = Object.entries(settings).filter(([, value]) => value !== "");
  return JSON.stringify({
    model: $("model").dataset.id ?? (await nameModel()),
    messages: messagesFor(exchange, system),
    stream: true,
    stream_options: { include_usage: true },
    ...Object.fromEntries(given.map(([name, value]) => [name, Number(value)])),
  });
}

/** Follow the answer into `exchange`, telling `onText` of each piece. */
async function follow(exchange, signal, onText) {
  const options = { body: await requestBody(exchange), accept: "text/event-stream", signal };
  const startMs = performance.now();
  const answer = await request("v1/chat/completions", options);
  let ending = "";
  for await (const event of events(answer)) {
    const fault = faultIn(event);
    if (fault) throw fault;
    const choice = event.choices?.[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    if (choice?.finish_reason === "length") ending = " · cut off at the limit";
    if (event.usage) exchange.note = spent(event.usage.completion_tokens, performance.now() - startMs);
  }
  exchange.note += ending;
}

function spent(numTokens, ms) {
  return `${numTokens} tokens · ${(ms / 1000).toFixed(1)} s`;
}

async function answer(exchange) {
  Object.assign(exchange, { answer: "", note: "", error: "" });
  running = new AbortController();
  show(exchange);
  setRunning(true);
  const text = exchange.view.querySelector(".answer").appendChild(new Text());
  let frame = 0; // pieces come faster than they can be drawn
  const draw = () => stayAtEnd(() => ([text.data, frame] = [exchange.answer, 0]));
  try {
    await follow(exchange, running.signal, (piece) => {
      exchange.answer += piece;
      frame ||= requestAnimationFrame(draw);
    });
    if (!exchange.answer.trim()) exchange.note += " · an empty answer";
  } catch (fault) {
    if (fault.name === "AbortError") exchange.note = "stopped";
    else exchange.error = fault instanceof Fault ? fault.message : `The page failed: ${fault.message}`;
  }
  running = null;
  setRunning(false);
  show(exchange);
  announce(exchange.error || exchange.answer || exchange.note);
  remember();
}

function setRunning(isRunning) {
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  $("log").ariaBusy = String(isRunning);
}

function remember() {
  keep("chat", exchanges.map(({ view, ...plain }) => plain));
}

/** Change the log, and keep its end in sight if it was. */
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
    button.textContent = isDone ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  $("welcome").hidden = true;
  $("log").append(view);
  $("log").scrollTop = $("log").scrollHeight;
  return view;
}

/** Ask a failed question again, as the newest one. */
function retry(exchange) {
  if (running || !$("settings-form").reportValidity()) return;
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

function startAnew() {
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
  $("new-chat").addEventListener("click", startAnew);
  for (const button of $("welcome").querySelectorAll("button")) {
    button.addEventListener("click", () => {
      $("question").value = button.textContent;
      send();
    });
  }
}

/** The batch tab: a table of rows that fills as results arrive. */

import { BatchClient, isPending, parse } from "./batch_client.js";
import { $, announce, element, passFocus, stamp } from "./dom.js";

const ROWS_SHOWN = 200;
const CHARS_SHOWN = 300; // of each question

let rows = []; // {line, text, query, result, view}
let name = "pasted";
let running = null; // AbortController of the current run, if any
let tally = { done: 0, failed: 0 };
let numShown = ROWS_SHOWN;
let frame = 0; // pending animation frame; results arrive faster than they can be drawn
const stale = new Set(); // rows that must be redrawn

async function run() {
  const queue = rows.filter(isPending);
  for (const row of queue) settle(row, null);
  running = new AbortController();
  setRunning(true);
  trouble("");
  try {
    await new BatchClient(settle, trouble, running.signal).answer(queue);
  } catch (error) {
    if (error.name !== "AbortError") trouble(error.message);
    running.abort();
  }
  running = null;
  setRunning(false);
  announce(`${$("counts").textContent}. ${$("trouble").textContent}`);
}

function settle(row, result) {
  count(row, -1);
  row.result = result;
  count(row, 1);
  stale.add(row);
  frame ||= requestAnimationFrame(draw);
}

/** Redraw the rows that have changed since the last frame. */
function draw() {
  frame = 0;
  for (const row of stale) if (row.view) fill(row);
  stale.clear();
  if ($("only-errors").checked) showRows();
  showCounts();
}

function count(row, sign) {
  if (row.result === null) return;
  tally.done += sign;
  if (row.result.error_code) tally.failed += sign;
}

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function showCounts() {
  const { done, failed } = tally;
  $("meter").max = rows.length || 1;
  $("meter").value = done;
  $("download").disabled = done === 0;
  $("counts").textContent = `${done} of ${rows.length} done · ${failed} ${failed === 1 ? "error" : "errors"}`;
}

function setRunning(isRunning) {
  draw();
  const numPending = rows.filter(isPending).length;
  $("drop").disabled = isRunning;
  $("run").hidden = isRunning;
  $("run").disabled = numPending === 0;
  $("run").textContent = tally.done > 0 && numPending > 0 ? `Run remaining (${numPending})` : "Run";
  if (!isRunning) passFocus($("halt"), numPending === 0 ? $("download") : $("run"));
  $("halt").hidden = !isRunning;
  showRows();
}

/** Render the first rows; "Show more" renders the others. */
function showRows() {
  const isListed = $("only-errors").checked ? (row) => row.result?.error_code : () => true;
  const listed = rows.filter(isListed);
  const shown = listed.slice(0, numShown);
  $("rows").replaceChildren(...shown.map((row) => (row.view ??= fill(row, stamp("row")))));
  $("more").hidden = shown.length === listed.length;
  $("more").textContent = `Show more (${listed.length - shown.length} remaining)`;
}

function questionOf({ query, text }) {
  const prompt = query?.user_prompt ?? query?.messages?.at?.(-1)?.content;
  const shown = typeof prompt === "string" ? prompt : text;
  return shown.length > CHARS_SHOWN ? `${shown.slice(0, CHARS_SHOWN)}…` : shown;
}

function fill(row, view = row.view) {
  const [line, id, question, answer] = view.cells;
  const { result } = row;
  view.className = result === null ? "pending" : result.error_code ? "failed" : "answered";
  line.textContent = row.line;
  id.textContent = String(result?.chat_id ?? row.query?.chat_id ?? "");
  question.textContent = questionOf(row);
  answer.textContent = result === null ? "…" : (result.response ?? result.error);
  if (result?.error_code) answer.prepend(element("code", result.error_code), " ");
  if (result?.finish_reason === "length") answer.append(" ", element("small", "stopped at the token limit"));
  return view;
}

function load(text, source) {
  name = source;
  rows = parse(text);
  tally = { done: 0, failed: 0 };
  numShown = ROWS_SHOWN;
  for (const row of rows) count(row, 1);
  $("only-errors").checked = false;
  for (const id of ["progress", "table"]) $(id).hidden = rows.length === 0;
  $("source").textContent = "";
  trouble("");
  setRunning(false);
}

async function loadFile(file) {
  if (running || !file) return;
  $("paste").value = "";
  try {
    const bytes = await file.arrayBuffer();
    if (running) return;
    load(new TextDecoder("utf-8", { fatal: true }).decode(bytes), file.name.replace(/\.\w+$/, ""));
    $("source").textContent = file.name;
  } catch {
    load("", "");
    $("source").textContent = `${file.name} is not UTF-8 text.`;
  }
  announce(`${$("source").textContent} ${$("counts").textContent}`);
}

function download() {
  const done = rows.filter((row) => row.result !== null);
  const text = done.map((row) => `${JSON.stringify({ ...row.result, line: row.line })}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(text, { type: "application/x-ndjson" }));
  link.download = `${name}.results.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function setUpDrop() {
  const isOver = (event) => !$("batch").hidden && event.dataTransfer.types.includes("Files");
  addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", isOver(event));
  });
  addEventListener("dragleave", () => $("drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    if (event.dataTransfer.files.length) event.preventDefault();
    $("drop").classList.remove("over");
    if (isOver(event)) loadFile(event.dataTransfer.files[0]);
  });
}

export function setUpBatch() {
  setUpDrop();
  $("paste").addEventListener("input", () => load($("paste").value, "pasted"));
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    loadFile($("file").files[0]);
    $("file").value = "";
  });
  $("batch-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
    $("halt").focus();
  });
  $("halt").addEventListener("click", () => running?.abort());
  $("download").addEventListener("click", download);
  $("only-errors").addEventListener("change", showRows);
  $("more").addEventListener("click", () => {
    numShown += ROWS_SHOWN;
    showRows();
  });
  addEventListener("beforeunload", (event) => {
    if (running) event.preventDefault();
  });
}

/** The page's header: tabs, model name and server status. */

import { setUpBatch } from "./batch.js";
import { setUpChat } from "./chat.js";
import { $ } from "./dom.js";
import { setUpKey } from "./key.js";
import { nameModel } from "./model.js";

const READY_EVERY_MS = 15_000;
const WAITING_EVERY_MS = 2_000;

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab) {
  for (const other of tabs) {
    const isShown = other === tab;
    other.ariaSelected = String(isShown);
    other.tabIndex = isShown ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !isShown;
  }
  history.replaceState(null, "", tab.id === "batch-tab" ? "#batch" : location.pathname + location.search);
}

function setUpTabs() {
  for (const tab of tabs) tab.addEventListener("click", () => show(tab));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const tab = tabs.at(to % tabs.length);
    tab.focus();
    show(tab);
  });
  if (location.hash === "#batch") show($("batch-tab"));
}

const STATES = {
  ready: "ready",
  loading: "loading model",
  draining: "shutting down",
  full: "busy",
  no_upstream: "no upstream",
  unreachable: "unreachable",
};

async function serverState() {
  try {
    const answer = await fetch("ready", { cache: "no-store" });
    const { status } = await answer.json();
    return answer.ok ? "ready" : String(status);
  } catch {
    return "unreachable";
  }
}

async function watchServer() {
  const before = $("state").dataset.state;
  const state = document.hidden ? before : await serverState();
  $("state").dataset.state = state;
  $("state").textContent = STATES[state] ?? state;
  if (state === "ready" && before !== "ready") nameModel().catch(() => {});
  setTimeout(watchServer, state === "ready" ? READY_EVERY_MS : WAITING_EVERY_MS);
}

setUpTabs();
setUpKey(() => nameModel().catch(() => {}));
setUpChat();
setUpBatch();
watchServer();

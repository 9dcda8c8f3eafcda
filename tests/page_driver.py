"""Drives the chat page of a server process in Chromium."""

import json
import time
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 60.0
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
# Wraps the page's fetch: records what it sends, and answers from `canned` instead of the server.
SPY = """
window.sent = [];
window.canned = [];
const real = window.fetch;
window.fetch = (path, options = {}) => {
  if (path !== "ready") window.sent.push([path, options.body]);
  const [at, status, headers, body] = window.canned[0] ?? [];
  if (at !== path) return real(path, options);
  window.canned.shift();
  return Promise.resolve(new Response(body, { status, headers }));
};
"""
# Stops the answer with the button or a key as soon as some of its text has arrived.
STOP_SOON = """
const [how] = arguments;
const stop = document.getElementById("stop");
const press = new KeyboardEvent("keydown", { key: how, bubbles: true });
new MutationObserver((_, observer) => {
  if (stop.hidden || !document.querySelector("article .answer")?.textContent) return;
  observer.disconnect();
  stop.focus();
  if (how === "click") stop.click();
  else stop.dispatchEvent(press);
}).observe(document.body, { subtree: true, childList: true, characterData: true });
"""
# Records every text of an element.
WATCH = """
const element = document.querySelector(arguments[0]);
window.seen = [];
new MutationObserver(() => seen.push(element.textContent))
  .observe(element, { subtree: true, childList: true, characterData: true });
"""


def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


class Page:
    """The page in one browser tab; elements are found by their id."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, max_tokens: str = "24") -> None:
        self.driver.get(url)
        self.script("sessionStorage.clear()")
        settings = json.dumps({"max_tokens": max_tokens})
        self.script("sessionStorage.setItem('smol.settings', arguments[0])", settings)
        self.driver.refresh()
        self.script(SPY)
        until(lambda: self.text("state") == "ready" or self.is_shown("key-dialog"))

    def script(self, text: str, *arguments: object) -> Any:
        return self.driver.execute_script(text, *arguments)

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def focus(self) -> str:
        """The id of the focused element."""
        return str(self.script("return document.activeElement.id"))

    def text(self, name: str) -> str:
        return str(self.find(name).text)

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.driver.find_elements("css selector", selector)]

    def is_shown(self, name: str) -> bool:
        return bool(self.find(name).is_displayed())

    def type(self, name: str, *keys: str) -> None:
        self.find(name).send_keys(*keys)

    def ask(self, question: str) -> str:
        """Send a question and wait until its answer is complete."""
        self.type("question", question, "\ue007")
        until(lambda: self.is_shown("send") and not self.is_shown("stop"))
        return str(
            self.script("return document.querySelector('article:last-child .answer').textContent")
        )

    def sent(self, path: str) -> list[Any]:
        """The JSON bodies that the page has posted to `path`."""
        return [json.loads(body) for at, body in self.script("return sent") if at == path]

    def answer_with(self, path: str, status: int, body: object, **headers: str) -> None:
        """Answer the next request to `path` in place of the server."""
        text = body if isinstance(body, str) else json.dumps(body)
        self.script("canned.push([...arguments])", path, status, headers, text)

    def watch(self, selector: str) -> None:
        """Record what an element shows from now on, however briefly; see `seen`."""
        self.script(WATCH, selector)

    def seen(self) -> list[str]:
        return list(self.script("return seen"))

    def paste(self, *lines: str) -> None:
        self.find("batch-tab").click()
        self.type("paste", "\n".join(lines))

    def run(self) -> None:
        self.find("run").click()
        until(lambda: self.is_shown("run"))

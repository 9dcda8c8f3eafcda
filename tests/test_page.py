"""The chat page: its files, and its behavior in Chromium against a real server."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_driver import CHROMIUM_FLAGS, SPY, STOP_SOON, Page, until
from server_tools import FaultyBackend, eventually, serve_process, serving, tiny_engine

import smolcli

PAGE = Path(smolcli.__file__).parent / "server" / "static"
KEY = "sesame-42"
needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)",
)


def browser_test(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that drives Chromium."""
    marked: Callable[..., None] = pytest.mark.browser(needs_chromium(function))
    return marked


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_files_load_nothing_external_and_never_render_untrusted_html(path: Path) -> None:
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.\w+/|@import", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", text)
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", text)


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    with serve_process("--model", str(tiny_folder)) as process:
        yield process.url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    page = Page(browser)
    page.open(url)
    yield page
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in messages if "status of 40" not in line] == []


def query(chat_id: object, prompt: str, **fields: object) -> str:
    return json.dumps({"chat_id": chat_id, "user_prompt": prompt, "max_new_tokens": 4} | fields)


@browser_test
def test_chat_streams_and_keeps_the_conversation(page: Page) -> None:
    first = page.ask("Hi")
    assert first
    page.ask("And then?")
    page.driver.refresh()
    page.script(SPY)
    assert page.texts("article .question") == ["Hi", "And then?"]
    page.ask("Once more")
    (body,) = page.sent("v1/chat/completions")
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert body["messages"][1]["content"] == first
    page.watch("article .copy")
    page.driver.find_element("css selector", "article .copy").click()
    until(page.seen)
    assert page.seen()[0] == "Copied"
    page.find("new-chat").click()
    assert page.texts("article") == []
    page.driver.find_element("css selector", "#welcome button").send_keys("\ue007")
    assert page.focus() == "log"


@browser_test
def test_only_filled_in_settings_are_sent(page: Page) -> None:
    page.find("settings").find_element("tag name", "summary").click()
    given = {"max_tokens": "3", "temperature": "0.5", "top_p": "0.9", "seed": "7"}
    for name, value in given.items():
        field = page.driver.find_element("name", name)
        field.clear()
        field.send_keys(value)
    page.driver.find_element("name", "system").send_keys("Be brief.")
    page.ask("Hi")
    (body,) = page.sent("v1/chat/completions")
    assert {name: str(body[name]) for name in given} == given
    assert not {"top_k", "repetition_penalty"} & body.keys()
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "stopped at the token limit" in page.texts("article .note")[0]


@browser_test
def test_a_setting_out_of_range_blocks_sending(page: Page) -> None:
    page.find("settings").find_element("tag name", "summary").click()
    page.driver.find_element("name", "top_p").send_keys("7")
    page.type("question", "Hi", "\ue007")
    assert page.sent("v1/chat/completions") == []
    assert page.find("question").get_property("value") == "Hi"


@browser_test
def test_shift_enter_adds_a_line_and_markup_stays_text(page: Page) -> None:
    page.type("question", "<img src=x onerror=alert(1)>", "\ue008\ue007\ue000", "<b>two</b>")
    assert page.sent("v1/chat/completions") == []
    stream = 'data: {"choices":[{"delta":{"content":"<script>alert(1)</script>"}}]}\n\ndata: [DONE]'
    page.answer_with("v1/chat/completions", 200, stream)
    assert page.ask("") == "<script>alert(1)</script>"
    assert page.texts("article .question") == ["<img src=x onerror=alert(1)>\n<b>two</b>"]
    assert page.driver.find_elements("css selector", "#log img, #log b, #log script") == []
    assert page.find("announcer").get_property("textContent") == "<script>alert(1)</script>"


@browser_test
@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop_ends_the_answer_and_frees_the_slot(browser: Any, tiny_folder: Path, how: str) -> None:
    faulty = FaultyBackend(delay_s=0.1)  # the complete answer would take 25 s
    with serving(faulty.open, tiny_engine(tiny_folder)) as running:
        page = Page(browser)
        page.open(running.url, max_tokens="")
        page.script(STOP_SOON, how)
        assert page.ask("Tell me a very long story")
        assert page.focus() == "question"
        assert page.texts("article .note") == ["stopped"]
        eventually(lambda: faulty.num_queries == 0)
        cancelled = 'smol_request_errors_total{code="cancelled"} 1.0'
        eventually(lambda: cancelled in running.client.get("/metrics").text)
        page.driver.get("about:blank")


@browser_test
def test_a_failed_question_can_be_retried(page: Page) -> None:
    error = {"error": {"message": "the queue is full", "code": "overloaded"}}
    page.answer_with("v1/chat/completions", 503, error)
    page.ask("Hi")
    assert page.texts("article .error") == ["the queue is full"]
    page.driver.find_element("css selector", "article .retry").send_keys("\ue007")
    assert page.focus() == "log"
    until(lambda: page.is_shown("send") and "".join(page.texts("article .answer")))
    assert page.texts("article .error") == [""]
    assert len(page.sent("v1/chat/completions")[1]["messages"]) == 1


@browser_test
@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ('data: {"choices":[{"delta":{"content":"Half an"}}]}\n\n', "The answer was cut off."),
        ('data: {"error":{"message":"it took too long","code":"timeout"}}\n\n', "it took too long"),
    ],
)
def test_a_failed_stream_shows_its_error(page: Page, stream: str, said: str) -> None:
    page.answer_with("v1/chat/completions", 200, stream)
    page.ask("Hi")
    assert page.texts("article .error") == [said]


@browser_test
def test_batch_shows_results_and_downloads_them_in_order(page: Page, tmp_path: Path) -> None:
    lines = [
        query(1, "Hi"),
        '{"chat_id": "torn", "user_prompt": "<b>',
        "",
        query("", "Hi"),
        query("big", "Hi", metadata={"n": 123456789012345678901}),
        query("slip", "Hi", temprature=1),
    ]
    source = tmp_path / "asked.jsonl"
    source.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    page.find("batch-tab").click()
    page.type("file", str(source))
    until(lambda: page.text("counts") == "1 of 5 done · 1 error")
    page.run()
    assert page.focus() == "download"
    assert page.text("counts") == "5 of 5 done · 3 errors"
    assert page.texts("#rows .line") == ["1", "2", "4", "5", "6"]
    assert page.texts("#rows code") == ["invalid_json", "missing_field", "unknown_field"]
    page.find("only-errors").click()
    assert page.texts("#rows .line") == ["2", "4", "6"]
    records = downloaded(page, tmp_path / "down", "asked.results.jsonl")
    assert [r["line"] for r in records] == [1, 2, 4, 5, 6]
    assert [r.get("error_code") for r in records].count(None) == 2
    assert records[3]["metadata"] == {"n": 123456789012345678901}
    assert "index" not in records[0]


def downloaded(page: Page, folder: Path, name: str) -> list[dict[str, Any]]:
    behavior = {"behavior": "allow", "downloadPath": str(folder)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    page.find("download").click()
    until((folder / name).exists)
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


@browser_test
def test_a_dropped_file_must_be_utf_8(page: Page) -> None:
    page.find("batch-tab").click()
    drop = """
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(arguments[1])], arguments[0]));
        document.getElementById("drop").dispatchEvent(
          new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    """
    page.script(drop, "latin1.jsonl", list('{"chat_id":"é"}'.encode("latin-1")))
    until(lambda: page.text("source") == "latin1.jsonl is not UTF-8 text.")
    assert not page.find("run").is_enabled()
    page.script(drop, "good.jsonl", list('{"chat_id":"é","user_prompt":"Hi"}'.encode()))
    until(lambda: page.text("source") == "good.jsonl")
    assert page.texts("#rows .id") == ["é"]
    assert page.find("run").is_enabled()


@browser_test
def test_batch_retries_a_busy_server_and_isolates_rejected_queries(page: Page) -> None:
    page.answer_with("chat/batched", 503, {"error": "full"}, **{"Retry-After": "1"})
    page.answer_with("chat/batched", 413, {"error": "too many", "error_code": "too_large"})
    page.paste(
        query(1, "Hi"), '{"chat_id":"twice","chat_id":"2","user_prompt":"x"}', query(3, "Hi")
    )
    page.watch("#trouble")
    page.run()
    assert "full Retrying in 1 s." in page.seen()
    assert page.texts("#rows code") == ["invalid_json"]
    assert page.texts("#rows tr:nth-child(2) .answer")[0].startswith("invalid_json")
    assert page.text("counts") == "3 of 3 done · 1 error"
    assert page.text("trouble") == ""


@browser_test
def test_an_interrupted_batch_resumes_where_it_stopped(page: Page) -> None:
    line = json.dumps({"index": 1, "chat_id": "2", "response": "kept"})
    page.answer_with("chat/batched", 200, line)
    page.paste(query(1, "Hi"), query(2, "Hi"))
    page.run()
    assert page.text("trouble") == "The connection was lost."
    assert page.text("run") == "Run remaining (1)"
    page.run()
    assert page.texts("#rows tr:nth-child(2) .answer") == ["kept"]
    assert page.text("counts") == "2 of 2 done · 0 errors"
    assert [len(body["queries"]) for body in page.sent("chat/batched")] == [2, 1]


@browser_test
def test_many_rows_are_paginated(page: Page) -> None:
    page.find("batch-tab").click()
    text = "\n".join(query(n, "Hi", max_new_tokens=1) for n in range(320))
    page.script(
        "const paste = document.getElementById('paste'); paste.value = arguments[0];"
        "paste.dispatchEvent(new Event('input'))",
        text,
    )
    page.run()
    assert page.text("counts") == "320 of 320 done · 0 errors"
    assert page.script("return document.getElementById('rows').children.length") == 200
    page.find("more").click()
    assert page.script("return document.querySelectorAll('.answered').length") == 320
    assert not page.is_shown("more")


@browser_test
def test_the_page_asks_for_the_api_key(browser: Any, tiny_folder: Path) -> None:
    with serve_process("--model", str(tiny_folder), "--api-key", KEY) as process:
        page = Page(browser)
        page.open(process.url)
        until(lambda: page.text("key-why") == "The server requires an API key.")
        page.type("key", "wrong", "\ue007")
        until(lambda: page.text("key-why") == "The server rejected this key.")
        page.type("key", KEY, "\ue007")
        until(lambda: page.text("model"))
        assert page.ask("Hi")
        page.driver.refresh()
        until(lambda: page.text("model"))
        assert page.script("return [localStorage.length, document.cookie]") == [0, ""]
        page.script("sessionStorage.removeItem('smol.key')")
        page.type("question", "Hi", "\ue007")
        until(lambda: page.is_shown("key-dialog"))
        page.find("key-cancel").click()
        until(lambda: "API key" in page.texts("article .error")[-1])
    browser.get_log("browser")


@browser_test
def test_tabs_follow_the_arrow_keys_and_the_url(page: Page, url: str) -> None:
    page.type("chat-tab", "\ue014")
    assert page.focus() == "batch-tab"
    assert page.find("batch-tab").get_attribute("aria-selected") == "true"
    assert page.is_shown("batch")
    assert not page.is_shown("chat")
    page.driver.refresh()
    assert page.is_shown("batch")
    page.type("batch-tab", "\ue011")
    assert page.is_shown("chat")


@browser_test
@pytest.mark.parametrize("tab", ["chat", "batch"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_has_enough_contrast(page: Page, tab: str, scheme: str) -> None:
    size = {"width": 320, "height": 568, "deviceScaleFactor": 2, "mobile": True}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.find(f"{tab}-tab").click()
    if tab == "chat":
        page.ask("W" * 80)
        page.find("settings").find_element("tag name", "summary").click()
    else:
        page.type("paste", query("W" * 80, "W" * 80), "\n{")
    width, height, inner, ink, paper = page.script(
        "const main = document.querySelector('main'), style = getComputedStyle(document.body),"
        "page = document.documentElement;"
        "return [page.scrollWidth, page.scrollHeight, main.scrollWidth, style.color,"
        "style.backgroundColor]"
    )
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert max(width, inner) <= size["width"]
    assert height <= size["height"]  # only the panel scrolls
    assert contrast(ink, paper) > 7


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colors (WCAG 2.1)."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

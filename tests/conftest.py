"""Fixtures: the real model, a tiny random Llama that runs the same code, and an isolated home."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from smolcli.settings import DEFAULT_MODEL
from smolcli.weights.pull import pull
from tools.build_kernels import build, host

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2 as in SmolLM2

SENTENCES = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "system user assistant What is gravity? Why is the sky blue? How are you?",
    "In 1234 days there's a café; naïve 日本語 text, emoji 👩‍👩‍👧 and 3.14159.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LEAK_GRACE_S = 30.0  # only a leak takes this long
LONGEST_FILES = (  # run first: the last file of a parallel run should be a short one
    *("test_ray", "test_engine", "test_real_model", "test_kernel_builds", "test_server_batches"),
    *("test_server_process", "test_server_schema", "test_server_malformed", "test_durability"),
    *("test_run", "test_cli", "test_gateway", "test_page", "test_streams", "test_batch_files"),
    *("test_control_tokens", "test_tools", "test_remote", "test_report_page", "test_retry"),
    *("test_pull", "test_bench", "test_graphs", "test_llm", "test_native"),
)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would wait for busy processors
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else tested processes ignore it too
build(host(), runnable_only=True)  # compiles nothing if the kernels are up to date

hypothesis.settings.register_profile(
    "same-each-time",
    derandomize=True,
    database=None,
    deadline=None,  # a busy machine is not a fault
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("same-each-time")
# Examples also contain constants from the modules that are imported: without this, they depend on
# which tests ran earlier in the process.
providers._get_local_constants = Constants


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep the order of `pytest_collection_modifyitems`."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make captured output safe to send between processes: file names may hold surrogates."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode())
        for title, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    """Undo the logging setup of a finished command, whose stderr has been closed.

    Otherwise a server's access log could end up there, or in the stderr of a later command.
    """
    loggers = logging.root.manager.loggerDict
    levels = {
        name: log.level for name, log in list(loggers.items()) if isinstance(log, logging.Logger)
    }
    yield
    for handler in [h for h in logging.root.handlers if type(h) is logging.StreamHandler]:
        logging.root.removeHandler(handler)
    for name, log in list(loggers.items()):
        if isinstance(log, logging.Logger):
            log.setLevel(levels.get(name, logging.NOTSET))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct; mark tests that use it `model`.

    Test processes that run in parallel share the model store and pull one at a time.
    """
    lock = tmp_path_factory.getbasetemp().parent / "pull.lock"
    with FileLock(lock):
        return pull(DEFAULT_MODEL, "auto", lambda line: None).folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers in float32 with random weights, SmolLM2's template and special tokens.

    Its weights are large enough that its answers differ and its logits have no near ties.
    """
    folder = tmp_path_factory.mktemp("tiny")
    vocab_size = _save_tiny_tokenizer(folder)
    _save_tiny_llama(folder, vocab_size)
    return folder


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 30 layers, slow enough to observe requests while they run."""
    folder = tmp_path_factory.mktemp("deep")
    _save_tiny_llama(folder, _save_tiny_tokenizer(folder), num_layers=30)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a .gguf file."""
    from gguf_file import write_gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_folder)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store and Hugging Face cache for one test, and a Hub that refuses connections."""
    from huggingface_hub import constants

    monkeypatch.setenv("SMOL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def no_user_config(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ignore the config file of the user who runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "no-settings"))
    monkeypatch.delenv("SMOL_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Check after each test that the threads of smol that it started have ended."""
    before = set(threading.enumerate())  # of servers that the tests of a file share
    yield
    deadline = time.monotonic() + LEAK_GRACE_S
    while leaked := [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith("smol-") and thread not in before
    ]:
        assert time.monotonic() < deadline, f"threads left behind: {leaked}"
        time.sleep(0.01)


def _save_tiny_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer with all 256 bytes and some merges; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return tokenizer.get_vocab_size()


def _save_tiny_llama(folder: Path, vocab_size: int, num_layers: int = 3) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        model.float().save_pretrained(folder)

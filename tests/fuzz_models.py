"""Loads damaged models and runs them on the native kernels: `make sanitize` runs this under ASan.

Every damaged config.json, safetensors or GGUF file must either be rejected with a ModelError or
give a model that computes within its buffers, even if its logits are NaN.

    python tests/fuzz_models.py KERNELS [EXAMPLES]

KERNELS is a kernel library for float32 weights.
"""

import copy
import ctypes
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf_file import write_gguf
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from smolcli.engine.engine import Engine
from smolcli.engine.native.bindings import Kernels
from smolcli.engine.native.model import unsupported_reason
from smolcli.engine.sequence import Sequence
from smolcli.errors import BackendError, ModelError
from smolcli.types import Sampling
from smolcli.weights.checkpoint import tensor_shapes
from smolcli.weights.gguf_conversion import convert
from smolcli.weights.loader import load_config, load_model

VOCABULARY = 70
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
SIZES = [name for name, value in CONFIG.items() if type(value) is int]
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([*{CONFIG[name] * k // 2 for name in SIZES for k in (1, 2, 3, 4)}]),
    st.integers(-(2**40), 2**40),
    st.sampled_from([None, "96", 0.5, float("nan"), float("inf"), True, [], {}]),
)
CHANGES = st.dictionaries(st.sampled_from([*CONFIG]), VALUES, min_size=1, max_size=3)
KEPT = st.just(1.0) | st.floats(0, 1)  # the fraction of a file that is not cut off
# Where to write what, as a fraction of the first bytes of a file.
PATCHES = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4)


def main() -> None:
    """Fuzz the three kinds of files and print how many models were rejected and run."""
    kernels = Kernels(ctypes.CDLL(sys.argv[1]), "fuzzed-float32")
    num_examples = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    with tempfile.TemporaryDirectory() as scratch:
        fuzzer = Fuzzer(Path(scratch), kernels)
        for fuzz, examples in (
            (fuzzer.config, st.tuples(CHANGES)),
            (fuzzer.safetensors, st.tuples(KEPT, PATCHES, st.integers(0, 3))),
            (fuzzer.gguf, st.tuples(KEPT, PATCHES)),
        ):
            run = given(examples)(_unpacking(fuzz))
            options = settings(
                max_examples=num_examples,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            options(seed(1)(run))()
            sys.stdout.write(f"{fuzz.__name__}: {dict(fuzzer.counts)}\n")
            fuzzer.counts.clear()


def _unpacking(fuzz: Callable[..., None]) -> Callable[[tuple[Any, ...]], None]:
    return lambda example: fuzz(*example)


class Fuzzer:
    """Writes damaged models and tries to run them.

    Args:
        scratch: an empty directory.
        kernels: what computes.
    """

    def __init__(self, scratch: Path, kernels: Kernels) -> None:
        self.counts: Counter[str] = Counter()
        self._kernels = kernels
        self._folder = scratch / "model"
        self._gguf = scratch / "model.gguf"
        self._converted = scratch / "converted"
        self._folder.mkdir()
        self._write_config(CONFIG)
        source = np.random.default_rng(1)
        weights = {
            name if name.startswith("lm_head") else f"model.{name}": source.standard_normal(
                shape, np.float32
            )
            for name, shape in tensor_shapes(load_config(self._folder))
        }
        save_file(weights, self._folder / "model.safetensors")
        vocabulary = {chr(ord("a") + i): i for i in range(VOCABULARY - 1)} | {"ab": VOCABULARY - 1}
        tokenizer = {"model": {"vocab": vocabulary, "merges": [["a", "b"]]}}
        (self._folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
        (self._folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
        write_gguf(self._gguf, self._folder)
        self._weights_bytes = (self._folder / "model.safetensors").read_bytes()
        self._gguf_bytes = self._gguf.read_bytes()

    def config(self, changes: dict[str, Any]) -> None:
        """Change values of config.json."""
        self._write_config(CONFIG | changes)
        self._try(self._folder)
        self._write_config(CONFIG)

    def safetensors(self, kept: float, patches: list[tuple[float, bytes]], what: int) -> None:
        """Cut off the weights, write into their header, or exchange shapes, dtypes and offsets."""
        path, size = (
            self._folder / "model.safetensors",
            int.from_bytes(self._weights_bytes[:8], "little"),
        )
        content = self._weights_bytes
        if what:
            header = _exchanged(json.loads(content[8 : 8 + size]), what, patches)
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text + content[8 + size :]
        else:
            content = _patched(content, 8 + size, patches)
        path.write_bytes(content[: int(len(content) * kept)])
        self._try(self._folder)
        path.write_bytes(self._weights_bytes)

    def gguf(self, kept: float, patches: list[tuple[float, bytes]]) -> None:
        """Write into a GGUF file's header, or cut the file off."""
        content = _patched(self._gguf_bytes, 8192, patches)
        content = content[: int(len(content) * kept)]
        self._gguf.write_bytes(content)
        shutil.rmtree(self._converted, ignore_errors=True)
        try:
            convert(self._gguf, self._converted)
        except ModelError:
            self.counts["rejected"] += 1
            return
        self._try(self._converted)

    def _write_config(self, values: dict[str, Any]) -> None:
        (self._folder / "config.json").write_text(json.dumps(values), "utf-8")

    def _try(self, folder: Path) -> None:
        try:
            config = load_config(folder)
            if unsupported_reason(config, self._kernels):
                self.counts["left to torch"] += 1
                return
            model = load_model(folder, "float32", "cpu", self._kernels, 2)
        except ModelError:
            self.counts["rejected"] += 1
            return
        engine = Engine(model, 2, 64 << 20)
        for length in (1, 20):
            prompt = [i % config.vocab_size for i in range(min(length, config.max_positions - 1))]
            if prompt:
                engine.add(Sequence(prompt, Sampling(max_new_tokens=3)))
        try:
            while engine.has_work:
                engine.step()
        except BackendError:  # the logits are NaN
            self.counts["stopped"] += 1
            return
        self.counts["run"] += 1


def _patched(content: bytes, limit: int, patches: list[tuple[float, bytes]]) -> bytes:
    data = bytearray(content)
    for place, patch in patches:
        start = int(place * (min(limit, len(data)) - len(patch)))
        data[start : start + len(patch)] = patch
    return bytes(data)


def _exchanged(
    header: dict[str, Any], what: int, patches: list[tuple[float, bytes]]
) -> dict[str, Any]:
    """Exchange the shapes (1), number formats (2) or offsets (3) of some tensors."""
    header, key = copy.deepcopy(header), ["shape", "dtype", "data_offsets"][what - 1]
    names = [name for name in header if name != "__metadata__"]
    for place, patch in patches:
        first, second = names[int(place * (len(names) - 1))], names[patch[0] % len(names)]
        header[first][key], header[second][key] = header[second][key], header[first][key]
        if patch[0] % 4 == 0 and key == "dtype":
            header[first][key] = ["F16", "BF16", "I8", "F64"][patch[-1] % 4]
    return header


if __name__ == "__main__":
    main()

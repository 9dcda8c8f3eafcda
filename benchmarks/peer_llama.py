"""Throughput of llama.cpp and ik_llama.cpp on the reference questions.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python tokenizers
    python benchmarks/peer_llama.py MODEL.gguf FOLDER --slots 16

    pip install ik-llama-cpp-python numpy tokenizers
    python benchmarks/peer_llama.py MODEL.gguf FOLDER --slots 16 --ik

Each needs a separate environment. FOLDER is what `smol pull` prints; its tokenizer makes the
prompts equal. All questions are submitted at once, with continuous batching, one KV cache for all
slots and greedy decoding. A slot keeps the beginning that all prompts share, as llama.cpp's server
does.
"""

import argparse
import ctypes
import importlib
from collections import deque
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from peer_record import add_options, measure
from tokenizers import Tokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONTEXT = 512  # tokens of one question and its answer
BATCH = 512  # tokens of one call
EOS = 2

Row = tuple[int, int, int, bool]  # token, position, slot, needs logits


class Engine:
    """A context of llama.cpp, or of ik_llama.cpp, and its batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._api = api = importlib.import_module(
            "ik_llama_cpp._ctypes_api" if args.ik else "llama_cpp.llama_cpp"
        )
        self._remove = remove_of_ik(api) if args.ik else api.llama_memory_seq_rm
        api.llama_backend_init()
        model_settings = api.llama_model_default_params()
        settings = api.llama_context_default_params()
        settings.n_ctx = CONTEXT * args.slots
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = args.slots
        settings.n_threads = settings.n_threads_batch = args.threads
        if args.ik:
            model_settings.repack_tensors = args.repack
            model_settings.use_mmap = not args.repack
            settings.flash_attn = args.slots == 1  # fails an assertion with several sequences
        else:
            settings.kv_unified = True
        self._model = api.llama_model_load_from_file(args.gguf.encode(), model_settings)
        self._context = api.llama_init_from_model(self._model, settings)
        self._memory = self._context if args.ik else api.llama_get_memory(self._context)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def decode(self, rows: list[Row]) -> list[int]:
        """Decode the rows; returns the tokens that follow those that need logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, slot, is_wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, slot
            batch.logits[index] = is_wanted
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        return [self._best(index) for index, row in enumerate(rows) if row[3]]

    def truncate(self, slot: int, num_kept: int) -> None:
        """Drop what a slot holds in the KV cache, except for its first tokens."""
        self._remove(self._memory, slot, num_kept, -1)

    def _best(self, index: int) -> int:
        logits = ctypes.cast(
            self._api.llama_get_logits_ith(self._context, index),
            ctypes.POINTER(ctypes.c_float * self._vocabulary),
        )
        return int(np.frombuffer(logits.contents, np.float32).argmax())


def remove_of_ik(api: Any) -> Any:
    """The function that removes tokens from ik_llama.cpp's KV cache; the bindings lack it."""
    remove = api._lib.llama_kv_cache_seq_rm
    remove.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    remove.restype = ctypes.c_bool
    return remove


class Batcher:
    """Answers prompts with continuous batching.

    Args:
        engine: what computes.
        slots: how many prompts are answered at once.
        num_shared: number of tokens that all prompts begin with.
        eos: the token that ends an answer, or None.
    """

    def __init__(self, engine: Engine, slots: int, num_shared: int, eos: int | None) -> None:
        self._engine = engine
        self._eos = eos
        self._num_shared = num_shared
        self._free = list(range(slots))
        self._filled: set[int] = set()  # the slots that hold the shared tokens

    def answer_all(self, prompts: list[list[int]], limit: int) -> int:
        """Answer all prompts and return the number of generated tokens."""
        waiting, total = deque(prompts), 0
        running: dict[int, list[int]] = {}  # by slot: position, newest token, tokens so far
        while waiting or running:
            rows = [(token, position, slot, True) for slot, (position, token, _) in running.items()]
            while waiting and self._free and len(rows) + len(waiting[0]) <= BATCH:
                prompt, slot = waiting.popleft(), self._free.pop()
                last = len(prompt) - 1
                start = self._num_shared if slot in self._filled else 0
                rows += [(prompt[at], at, slot, at == last) for at in range(start, last + 1)]
                running[slot] = [last, 0, 0]
            for slot, token in zip(list(running), self._engine.decode(rows), strict=True):
                position, _, count = running[slot]
                running[slot] = [position + 1, token, count + 1]
                total += 1
                if token == self._eos or count + 1 == limit:
                    del running[slot]
                    self._engine.truncate(slot, self._num_shared)
                    self._filled.add(slot)
                    self._free.append(slot)
        return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf")
    parser.add_argument("folder", type=Path, help="what `smol pull` prints")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ik", action="store_true", help="measure ik_llama.cpp")
    parser.add_argument("--repack", action="store_true", help="interleave rows (ik_llama.cpp)")
    add_options(parser)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    package = importlib.import_module("ik_llama_cpp" if args.ik else "llama_cpp")

    def encode(question: str) -> list[int]:
        ids: list[int] = tokenizer.encode(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
            f"{question}<|im_end|>\n<|im_start|>assistant\n"
        ).ids
        return ids

    pairs = zip(encode("1. Why?"), encode("2. How?"), strict=False)
    num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    eos = None if args.ignore_eos else EOS
    batcher = Batcher(Engine(args), args.slots, num_shared, eos)
    measure(
        encode,
        batcher.answer_all,
        args,
        system=f"{'ik_llama.cpp' if args.ik else 'llama.cpp'} (bindings {package.__version__})",
        model=Path(args.gguf).name + (", repacked" if args.repack else ""),
        slots=args.slots,
    )


if __name__ == "__main__":
    main()

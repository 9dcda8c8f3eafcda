"""Throughput of llama.cpp on the reference questions; needs an environment of its own.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python tokenizers
    python benchmarks/peer_llama.py MODEL.gguf FOLDER --slots 16

FOLDER is what `smol pull` prints; its tokenizer makes the prompts equal. All questions are
submitted at once, with continuous batching, a unified KV cache and greedy decoding.
"""

import argparse
import ctypes
from collections import deque
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api
from peer_record import add_options, measure, read_questions
from tokenizers import Tokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONTEXT = 512  # tokens of one question and its answer
EOS = 2


class Engine:
    """A llama.cpp context and its batch."""

    def __init__(self, path: str, slots: int, threads: int) -> None:
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx = CONTEXT * slots
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max = slots
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self.context = api.llama_init_from_model(self.model, settings)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(512, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, position, slot, needs logits) rows; returns the tokens that follow."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, slot, is_wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, slot
            batch.logits[index] = is_wanted
        if code := api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        return [self._best(index) for index, row in enumerate(rows) if row[3]]

    def free(self, slot: int) -> None:
        """Clear the KV cache of a slot."""
        api.llama_memory_seq_rm(api.llama_get_memory(self.context), slot, -1, -1)

    def _best(self, index: int) -> int:
        logits = ctypes.cast(
            api.llama_get_logits_ith(self.context, index),
            ctypes.POINTER(ctypes.c_float * self.vocabulary),
        )
        return int(np.frombuffer(logits.contents, np.float32).argmax())


def answer_all(engine: Engine, prompts: list[list[int]], slots: int, limit: int) -> int:
    """Answer all prompts and return the number of generated tokens."""
    waiting, free, total = deque(prompts), list(range(slots)), 0
    running: dict[int, list[int]] = {}  # by slot: position, newest token, tokens so far
    while waiting or running:
        rows = [(token, position, slot, True) for slot, (position, token, _) in running.items()]
        new: dict[int, list[int]] = {}
        while waiting and free and len(rows) + len(waiting[0]) <= 512:
            prompt, slot = waiting.popleft(), free.pop()
            last = len(prompt) - 1
            rows += [(token, at, slot, at == last) for at, token in enumerate(prompt)]
            new[slot] = [last, 0, 0]
        running |= new
        for slot, token in zip(list(running), engine.decode(rows), strict=True):
            position, _, count = running[slot]
            running[slot] = [position + 1, token, count + 1]
            total += 1
            if token == EOS or count + 1 == limit:
                del running[slot]
                engine.free(slot)
                free.append(slot)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf")
    parser.add_argument("folder", type=Path, help="what `smol pull` prints")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    add_options(parser)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    prompts = [
        tokenizer.encode(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
            f"{question}<|im_end|>\n<|im_start|>assistant\n"
        ).ids
        for question in read_questions(args.questions)
    ]
    engine = Engine(args.gguf, args.slots, args.threads)
    answer_all(engine, prompts, args.slots, 4)
    measure(
        lambda: answer_all(engine, prompts, args.slots, args.max_new_tokens),
        args,
        system=f"llama-cpp-python {llama_cpp.__version__}",
        model=Path(args.gguf).name,
        slots=args.slots,
    )


if __name__ == "__main__":
    main()

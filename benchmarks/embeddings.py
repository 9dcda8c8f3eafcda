"""Would embeddings from the model's hidden states be of use? Retrieval against BM25 and chance.

    python -m benchmarks.embeddings --model FOLDER

Two sets of real pairs that are on the machine: the synopsis of an installed Debian package should
find its description, and the first line of a docstring of the standard library the rest of it.
Embeddings are the normalized mean of the last hidden states over the tokens, as a causal model
without any training for retrieval yields them, also with the mean over all passages removed.
"""

import argparse
import importlib
import inspect
import math
import pkgutil
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Pairs = list[tuple[str, str]]

NUM_PAIRS = 200
MAX_TOKENS = 96
MODULES = (
    *("argparse", "asyncio", "collections", "configparser", "csv", "datetime", "decimal"),
    *("difflib", "email", "fractions", "heapq", "http", "inspect", "ipaddress", "json", "logging"),
    *("mailbox", "multiprocessing", "os", "pathlib", "random", "re", "shutil", "socket", "sqlite3"),
    *("ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "threading", "unittest"),
    *("urllib", "uuid", "xml", "zipfile"),
)


def main() -> None:
    """Print a table for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    options = parser.parse_args()
    embed = Embedder(options.model)
    for name, pairs in (("packages", package_pairs()), ("docstrings", docstring_pairs())):
        random.Random(0).shuffle(pairs)
        queries, passages = map(list, zip(*pairs[:NUM_PAIRS], strict=True))
        q, p = embed(queries), embed(passages)
        center = p.mean(0)
        scores = {
            "chance": np.random.default_rng(0).random((len(queries), len(passages))),
            "mean pooled": normalized(q) @ normalized(p).T,
            "mean pooled, centered": normalized(q - center) @ normalized(p - center).T,
            "BM25": bm25(queries, passages),
        }
        sys.stdout.write(f"{name}: {len(queries)} pairs\n")
        for method, table in scores.items():
            sys.stdout.write(f"  {method:24}{summary(table)}\n")
        sys.stdout.flush()


def package_pairs() -> Pairs:
    """Synopsis and description of every installed Debian package."""
    shown = "${Description}\x01"
    text = subprocess.run(
        ["dpkg-query", "-W", "-f", shown], capture_output=True, text=True, check=True
    ).stdout
    seen: dict[str, str] = {}
    for entry in text.split("\x01"):
        title, _, body = entry.strip().partition("\n")
        body = " ".join(body.replace("\n .", "\n").split())
        if len(body) > 80 and body not in seen.values():
            seen.setdefault(title, body)
    return list(seen.items())


def docstring_pairs() -> Pairs:
    """First line and rest of docstrings."""
    seen: dict[str, str] = {}
    for documented in _documented():
        text = inspect.getdoc(documented) or ""
        title, _, body = text.partition("\n")
        body = " ".join(body.split())
        if len(title.split()) >= 4 and len(body) > 80 and body not in seen.values():
            seen.setdefault(title, body)
    return list(seen.items())


def _documented() -> Iterator[Any]:
    for name in MODULES:
        module = importlib.import_module(name)
        names = [name, *(f"{name}.{m.name}" for m in pkgutil.iter_modules(_path(module)))]
        for each in names:
            if each.endswith(("__main__", "windows_events", "windows_utils", "popen_spawn_win32")):
                continue
            try:
                loaded = importlib.import_module(each)
            except ImportError:
                continue
            yield loaded
            for value in vars(loaded).values():
                if inspect.isclass(value) or inspect.isfunction(value):
                    yield value
                    if inspect.isclass(value):
                        yield from filter(inspect.isfunction, vars(value).values())


def _path(module: Any) -> list[str]:
    return list(getattr(module, "__path__", []))


class Embedder:
    """The mean of the last hidden states of each text's tokens; computed by transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).float().eval()

    def __call__(self, texts: list[str]) -> Array:
        """(texts, hidden_size)."""
        import torch

        rows = []
        with torch.inference_mode():
            for text in texts:
                ids = self._tokenizer(text, return_tensors="pt", truncation=True,
                                      max_length=MAX_TOKENS)  # fmt: skip
                rows.append(self._model(**ids).last_hidden_state[0].mean(0).numpy())
        return np.stack(rows)


def normalized(rows: Array) -> Array:
    """Rows of length 1."""
    unit: Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def bm25(queries: list[str], passages: list[str], k1: float = 1.2, b: float = 0.75) -> Array:
    """Scores by Robertson and Zaragoza 2009, (queries, passages), over lowercase words."""
    bags = [Counter(words(passage)) for passage in passages]
    lengths = [sum(bag.values()) for bag in bags]
    mean_length = sum(lengths) / len(lengths)
    num_with = Counter(word for bag in bags for word in bag)
    scores = np.zeros((len(queries), len(passages)))
    for i, query in enumerate(queries):
        for word in set(words(query)) & num_with.keys():
            found = num_with[word]
            weight = math.log(1 + (len(bags) - found + 0.5) / (found + 0.5))
            for j, bag in enumerate(bags):
                norm = k1 * (1 - b + b * lengths[j] / mean_length)
                scores[i, j] += weight * bag[word] * (k1 + 1) / (bag[word] + norm)
    return scores


def words(text: str) -> list[str]:
    """Lowercase words."""
    return re.findall(r"\w+", text.lower())


def summary(scores: Array) -> str:
    """Recall and mean reciprocal rank; query i should find passage i, and ties count as lost."""
    own = np.diag(scores)[:, None]
    ranks = (scores >= own).sum(1)
    recalls = "  ".join(f"recall@{k} {np.mean(ranks <= k):.3f}" for k in (1, 10))
    return f"{recalls}  MRR {np.mean(1 / ranks):.3f}"


if __name__ == "__main__":
    main()

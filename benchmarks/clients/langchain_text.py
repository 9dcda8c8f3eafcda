"""LangChain's `OpenAI` (text completions) against a running server.

pip install langchain-openai
smol serve --port 8077 &
python benchmarks/clients/langchain_text.py
"""

import os
import sys
from typing import Any


def show(what: str, value: object) -> None:
    """Print one outcome."""
    sys.stdout.write(f"{what}: {value!r}\n")


def main() -> None:
    """Invoke, batch, stream and generate several answers."""
    from langchain_openai import OpenAI  # type: ignore[import-not-found, unused-ignore]

    url = os.environ.get("SMOL_URL", "http://127.0.0.1:8077/v1")
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    common: dict[str, Any] = {"model": model, "base_url": url, "api_key": "none", "max_tokens": 12}
    llm: Any = OpenAI(**common, temperature=0)
    show("invoke", llm.invoke("The capital of France is"))
    show("batch", llm.batch(["One, two,", "Red, green,"]))
    show("stream", list(llm.stream("The capital of France is")))
    several: Any = OpenAI(**common, temperature=0.9, n=3, seed=1)
    answers = several.generate(["Once upon a time"]).generations[0]
    show("n=3", [answer.text for answer in answers])
    scored: Any = OpenAI(**common, temperature=0, logprobs=2)
    generation = scored.generate(["The capital of France is"]).generations[0][0]
    show("logprobs", generation.generation_info["logprobs"]["token_logprobs"])
    show("stop", llm.invoke("One, two, three,", stop=["five"]))


if __name__ == "__main__":
    main()

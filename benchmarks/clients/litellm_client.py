"""litellm as a client of `smol serve`: answers, streams, several answers and errors.

    pip install litellm; smol serve --any-model &
    python benchmarks/clients/litellm_client.py [URL]

Exits with 1 at the first surprise.
"""

import sys

import litellm

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
ASKED = {"model": "openai/smol", "api_base": f"{URL}/v1", "api_key": "none"}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def main() -> None:
    answer = litellm.completion(**ASKED, messages=QUESTION, max_tokens=20)
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = [*litellm.completion(**ASKED, messages=QUESTION, max_tokens=20, stream=True)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == answer.choices[0].message.content, text
    assert chunks[-1].choices[0].finish_reason == "stop", chunks[-1]
    turns = [*QUESTION, answer.choices[0].message.model_dump(), {"role": "user", "content": "Why?"}]
    assert litellm.completion(**ASKED, messages=turns, max_tokens=4).choices[0].message.content
    several = litellm.completion(**ASKED, messages=QUESTION, n=2, temperature=1.0, max_tokens=4)
    assert len(several.choices) == 2, several
    batch = litellm.batch_completion(**ASKED, messages=[QUESTION] * 4, max_tokens=8)
    assert len({each.choices[0].message.content for each in batch}) == 1, batch
    try:
        too_long = [{"role": "user", "content": "word " * 20_000}]
        litellm.completion(**ASKED, messages=too_long)
    except litellm.ContextWindowExceededError as exc:
        sys.stdout.write(f"too long: {type(exc).__name__}\n")
    else:
        raise AssertionError("no error for a prompt that is too long")
    try:
        litellm.completion(**ASKED, messages=QUESTION, temperature=-1)
    except litellm.BadRequestError as exc:
        sys.stdout.write(f"invalid: {exc.message[:160]}\n")
    else:
        raise AssertionError("no error for an invalid temperature")
    sys.stdout.write(f"litellm: ok, {answer.choices[0].message.content!r}\n")


if __name__ == "__main__":
    main()

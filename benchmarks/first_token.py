"""Time to the first token of a chat on an idle server.

    python -m benchmarks.first_token
    python -m benchmarks.first_token --requests 50 --url http://127.0.0.1:8000

One question is streamed after another, with a pause between them. The system prompt is in the
prefix cache, the question is not.
"""

import argparse
import json
import time

from benchmarks.server_harness import Target, percentiles, print_line, prompts, target

MAX_NEW_TOKENS = 4


def first_token_s(server: Target, question: str) -> float:
    """Seconds from the request to the first token of the answer, with a connection of its own."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_NEW_TOKENS,
        "stream": True,
    }
    connection = server.connect()
    began = time.perf_counter()
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
    while line := response.readline():
        if line.startswith(b"data: {"):
            choices = json.loads(line.removeprefix(b"data: "))["choices"]
            if choices and choices[0]["delta"].get("content"):
                seconds = time.perf_counter() - began
                response.read()
                connection.close()
                return seconds
    raise SystemExit(f"no token in the answer to {question!r}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running server; starts one by default")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between requests")
    parser.add_argument("--dtype", default="auto", help="of the server that is started")
    args = parser.parse_args()
    questions = [f"{n}. {text}" for n, text in enumerate(prompts(args.requests + 2))]
    found = []
    with target(args.url, "--dtype", args.dtype, "--any-model") as server:
        for question in questions:
            time.sleep(args.pause)
            found.append(first_token_s(server, question))
    print_line(json.dumps({"requests": args.requests, "first_token": percentiles(found[2:])}))


if __name__ == "__main__":
    main()

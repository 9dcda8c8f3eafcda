"""guidellm against a running server, which sends `ignore_eos` with every request by default.

    pip install guidellm
    smol serve --port 8077 &
    python benchmarks/clients/guidellm.py ~/.cache/smolcli/models/NAME

It measures tokens by length: every answer must have exactly the requested number.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOKENS = 16


def main() -> None:
    """Send a few requests of each API and print what guidellm reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="folder of the model")
    parser.add_argument("--requests", type=int, default=8)
    args = parser.parse_args()
    url = os.environ.get("SMOL_URL", "http://127.0.0.1:8077")
    for route in ("/v1/chat/completions", "/v1/completions"):
        report = measure(url, route, args.tokenizer, args.requests)
        [benchmark] = report["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        lengths = benchmark["metrics"]["output_token_count"]["successful"]
        sys.stdout.write(f"{route}: {totals}, output tokens {lengths['min']}-{lengths['max']}\n")
        assert totals["errored"] == 0
        assert lengths["min"] == lengths["max"] == TOKENS


def measure(url: str, route: str, tokenizer: str, num_requests: int) -> Any:
    """Run guidellm once; returns its report.

    Args:
        url: the server's base URL.
        route: that answers the requests.
        tokenizer: folder of the model.
        num_requests: how many requests to send.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [
            *("guidellm", "run", "--disable-progress"),
            *("--backend", f"kind=openai_http,target={url},request_format={route}"),
            *("--profile", "kind=concurrent,streams=4"),
            *("--constraint", f"kind=max_requests,count={num_requests}"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={TOKENS}"),
            *("--output", f"kind=json,path={path}"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text("utf-8"))


if __name__ == "__main__":
    main()

"""promptfoo against a running server: chat, text completions, JSON Schema and tools.

npm install promptfoo
smol serve --port 8077 &
python benchmarks/clients/promptfoo.py node_modules/.bin/promptfoo

promptfoo runs as it is, with a configuration that is written to a temporary directory. The
assertions check shapes, not knowledge, and the script fails if one of them does.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def configuration(url: str) -> dict[str, Any]:
    """promptfoo's configuration: four providers, each with its own assertion."""

    def provider(kind: str, label: str, **options: Any) -> dict[str, Any]:
        shared = {"apiBaseUrl": url, "apiKey": "none", "temperature": 0, "max_tokens": 24}
        prompt = "beginning" if kind == "completion" else "question"
        return {
            "id": f"openai:{kind}:{MODEL}",
            "label": label,
            "prompts": [prompt],
            "config": shared | options,
        }

    def test(label: str, *assertions: dict[str, Any]) -> dict[str, Any]:
        return {"vars": {"topic": "Paris"}, "providers": [label], "assert": list(assertions)}

    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    return {
        "prompts": [
            {"label": "question", "raw": "In one sentence: what is {{topic}}?"},
            {"label": "beginning", "raw": "{{topic}} is the capital of"},
        ],
        "providers": [
            provider("chat", "chat"),
            provider("completion", "text"),
            provider("chat", "schema", response_format=form),
            provider("chat", "tool", tools=[TOOL], tool_choice="required", max_tokens=80),
        ],
        "tests": [
            test("chat", {"type": "contains", "value": "Paris"}),
            test("text", {"type": "javascript", "value": "output.length > 0"}),
            test("schema", {"type": "is-json", "value": SCHEMA}),
            test("tool", {"type": "is-valid-openai-tools-call"}),
        ],
    }


def main() -> int:
    """Run `promptfoo eval`; returns 1 if an assertion failed."""
    url = os.environ.get("SMOL_URL", "http://127.0.0.1:8077/v1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "promptfooconfig.json").write_text(json.dumps(configuration(url)))
        command = [str(Path(sys.argv[1]).absolute()), "eval", "--no-cache", "-o", "results.json"]
        switches = ("PROMPTFOO_DISABLE_TELEMETRY", "PROMPTFOO_DISABLE_UPDATE")
        environment = os.environ | dict.fromkeys(switches, "1") | {"PROMPTFOO_CONFIG_DIR": name}
        done = subprocess.run(command, cwd=folder, env=environment, check=False)
        results = json.loads((folder / "results.json").read_text())["results"]
        for each in results["results"]:
            text = json.dumps(each["response"].get("output"))
            sys.stdout.write(f"{each['provider']['label']}: {each['success']}, {text}\n")
    return 1 if done.returncode or results["stats"]["successes"] < 4 else 0


if __name__ == "__main__":
    sys.exit(main())

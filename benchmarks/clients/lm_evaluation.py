"""lm-evaluation-harness against /v1/completions: a multiple-choice task by log probabilities.

    pip install "lm_eval[api]" transformers
    smol serve --port 8077 &
    python -m benchmarks.clients.lm_evaluation --tokenizer ~/.cache/smolcli/models/NAME

The task is made here, because data sets on the Hub may be out of reach. Each document asks for the
most probable of four continuations, so every request is a scored prompt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "a banana", "seven"], 0),
    ("Water freezes at a temperature of 0 degrees", ["Monday", "Celsius", "music", "apple"], 1),
    ("The opposite of hot is", ["window", "blue", "cold", "running"], 2),
    ("A week has seven", ["oceans", "planets", "chairs", "days"], 3),
    ("The Earth orbits the", ["Sun", "table", "dog", "spoon"], 0),
    ("Two plus two equals", ["green", "four", "Paris", "river"], 1),
    ("Birds use their wings to", ["read", "cook", "fly", "write"], 2),
    ("Fish live in", ["clocks", "books", "shoes", "water"], 3),
    ("The author of Hamlet is", ["William Shakespeare", "a triangle", "sugar", "October"], 0),
    ("Bees make", ["computers", "honey", "winter", "letters"], 1),
]
TASK = """\
task: smol_facts
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def main() -> None:
    """Run the task, and print what the harness reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8077/v1/completions")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--tokenizer", required=True, help="name or folder of the tokenizer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = ("question", "choices", "answer")
        lines = [json.dumps(dict(zip(keys, each, strict=True))) for each in QUESTIONS]
        (folder / "facts.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "smol_facts.yaml").write_text(TASK.format(data=folder / "facts.jsonl"))
        model = [
            *(f"model={options.model}", f"base_url={options.url}", "num_concurrent=4"),
            *(f"tokenizer={options.tokenizer}", "tokenized_requests=True"),
        ]
        subprocess.run(
            [
                *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
                *("--model_args", ",".join(model), "--include_path", name),
                *("--tasks", "smol_facts", "--batch_size", "4", "--limit", str(len(QUESTIONS))),
            ],
            check=True,
        )


if __name__ == "__main__":
    main()

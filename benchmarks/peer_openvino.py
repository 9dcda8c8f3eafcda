"""OpenVINO GenAI on the reference questions, in an environment of its own.

    pip install torch==2.13.0 openvino-genai optimum-intel nncf
    optimum-cli export openvino --model FOLDER --task text-generation-with-past \\
        --weight-format int8 openvino-int8
    python benchmarks/peer_openvino.py openvino-int8

FOLDER is what `smol pull` prints. All questions are there at once, as in `benchmarks.reference`,
with `--slots 1` one after the other; continuous batching, prefix cache on, bfloat16 arithmetic.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import openvino_genai as genai

QUESTIONS = Path(__file__).parents[1] / "smolcli" / "bench" / "reference.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the exported folder")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = args.slots
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    pipeline = genai.ContinuousBatchingPipeline(
        args.model, scheduler, "CPU", {"INFERENCE_PRECISION_HINT": args.precision}
    )
    tokenizer = pipeline.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["user_prompt"]}],
            add_generation_prompt=True,
        )
        for line in QUESTIONS.read_text("utf-8").splitlines()
    ]
    encoded = [tokenizer.encode(p, add_special_tokens=False).input_ids for p in prompts]

    def run(limit: int) -> tuple[int, float]:
        config = genai.GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=2)
        began = time.perf_counter()
        asked = [[ids] for ids in encoded] if args.slots == 1 else [encoded]
        answers = [pipeline.generate(ids, [config] * len(ids)) for ids in asked]
        seconds = time.perf_counter() - began
        results = [answer for batch in answers for answer in batch]
        return sum(len(r.m_generation_ids[0]) for r in results), seconds

    run(4)
    outcomes = [run(args.max_new_tokens) for _ in range(args.runs)]
    rate = statistics.median(tokens / seconds for tokens, seconds in outcomes)
    record = {
        "system": f"OpenVINO GenAI {genai.__version__}",
        "model": args.model,
        "precision": args.precision,
        "slots": args.slots,
        "tokens": outcomes[0][0],
        "runs": [round(tokens / seconds, 1) for tokens, seconds in outcomes],
        "tokens_per_second": round(rate, 1),
    }
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

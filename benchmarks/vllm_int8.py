"""Write a copy of a model with 8-bit weights and activations (w8a8) for vLLM.

    PYTHON benchmarks/vllm_int8.py FOLDER vllm-int8
    PYTHON benchmarks/peer_vllm.py vllm-int8

FOLDER holds safetensors in bfloat16. Every matrix of a layer is rounded to 8 bits with one scale
per row; vLLM rounds activations as it computes, with one scale per token. Embeddings and norms stay
as they are. Runs in vLLM's environment.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": SCHEME | {"strategy": "channel", "dynamic": False},
            "input_activations": SCHEME | {"strategy": "token", "dynamic": True},
        }
    },
}


def quantized(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix as 8-bit integers and one scale per row; other tensors unchanged."""
    if not name.endswith("_proj.weight"):
        return {name: weight}
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return {
        name: (weight.float() / scale).round().to(torch.int8),
        f"{name}_scale": scale.to(weight.dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    for path in args.folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, args.output)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(args.folder.glob("*.safetensors")):
        for name, weight in load_file(path).items():
            tensors |= quantized(name, weight)
    save_file(tensors, args.output / "model.safetensors", {"format": "pt"})
    config = json.loads((args.folder / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Store models in half precision, as they are kept in this repository: half the bytes.

    python extras/ship.py checkpoints/base checkpoints/sft checkpoints/rl

The weights of each folder are rounded to float16 where they are, and a row of
checkpoints/README.md is printed. Checkpoints (state/) keep what training needs.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import root  # noqa: F401
import evaluate
import tools
from extras import terminal

FILE_NAME = "model.safetensors"


def to_half(folder):
    """Round the weights of a model's folder to float16. Return the bytes of its new file. Raise
    InputError if there is no such file, or if a weight is too large."""
    path = folder / FILE_NAME
    tools.check(path.is_file(), f"{path} does not exist: name the folder of a model in one file")
    try:
        loaded = load_file(path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise tools.InputError(f"{folder} holds no whole model: {error}") from None
    weights = {}
    for name, weight in loaded.items():
        weights[name] = weight.half()
        tools.check(torch.isfinite(weights[name]).all(), f"{path}: {name} has a value that float16 "
                    "cannot hold")
    content = save(weights, metadata={"format": "pt"})
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part["dtype"] = "float16"
    config_text = json.dumps(config, indent=2) + "\n"
    tools.write_atomic(folder / "config.json", lambda file: file.write(config_text.encode()))
    tools.write_atomic(path, lambda file: file.write(content))
    return content


def main():
    """Convert every folder, and print size and SHA-256 of its weights."""
    parser = terminal.make_parser("Store models in half precision.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of models")
    rows = []
    for folder in parser.parse_args().folders:
        content = to_half(folder)
        rows.append([str(folder), f"{len(content) / 1e6:.1f}", hashlib.sha256(content).hexdigest()])
    evaluate.print_rows(["model", "MB", "SHA-256 of model.safetensors"], rows)


if __name__ == "__main__":
    terminal.run(main)

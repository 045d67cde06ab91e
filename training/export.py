"""Writes a run's checkpoint as a Hugging Face folder: ``python -m training.export --run training/runs/fifth``."""

import argparse
import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from training.answers import LONGEST_RUN
from training.growth import layer_count
from training.model import build
from training.tokenizer import END, load_tokenizer

BUNDLED = Path(__file__).parents[1] / "src" / "lyra_emergence" / "bundled"
LARGEST = 25_000_000
LONGEST_ANSWER = 160
"""Tokens: a diary's longest sentence takes about 100, and a text that repeats itself must come to an end."""


def restore(run: Path) -> LlamaForCausalLM:
    """Returns the model of the run's last checkpoint in bfloat16."""
    tokenizer = load_tokenizer(run / "tokenizer")
    masters = torch.load(run / "checkpoint.pt", weights_only=True)["masters"]
    model = build(
        len(tokenizer),
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.convert_tokens_to_ids(END),
        layer_count(masters),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[name])
    return model.to(torch.bfloat16).eval()


def export(run: Path, target: Path) -> int:
    """Writes model and tokenizer of `run` into `target` (other files there stay); returns the bytes written.

    Raises:
        ValueError: the folder would be larger than may ship.
    """
    model, tokenizer = restore(run), load_tokenizer(run / "tokenizer")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=LONGEST_ANSWER,
        max_repeats=LONGEST_RUN,  # Lyra's own; transformers keeps it and does nothing with it
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _plain(target)
    size = sum(path.stat().st_size for path in target.iterdir() if path.is_file())
    if size > LARGEST:
        raise ValueError(f"{target} holds {size} bytes; at most {LARGEST} may ship")
    return size


def _plain(target: Path) -> None:
    """Drops what the libraries note about this machine, and lets everyone read the weights."""
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (target / "model.safetensors").chmod(0o644)


def main() -> None:
    """Exports the run named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("training/runs/fifth"))
    parser.add_argument("--to", type=Path, default=BUNDLED)
    args = parser.parse_args()
    print(f"{export(args.run, args.to)} bytes in {args.to}")


if __name__ == "__main__":
    main()

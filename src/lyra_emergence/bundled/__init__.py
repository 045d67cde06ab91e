"""The small model that ships with Lyra, for a machine that has no model yet."""

from pathlib import Path

__all__ = ["BUNDLED_ID", "bundled_directory"]

BUNDLED_ID = "lyra-emergence/bundled"
"""The name that `--model` and `model_id` accept for the bundled checkpoint."""


def bundled_directory() -> Path:
    """Return the folder of the bundled checkpoint: config.json, tokenizer files and model.safetensors."""
    return Path(__file__).parent

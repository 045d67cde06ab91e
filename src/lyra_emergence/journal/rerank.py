"""Reordering what a search found, with the best model that is on this machine; nothing is ever downloaded.

In this order: a cross-encoder, which reads question and passage together, if its weights are in the Hugging Face cache;
late interaction with the embedding model at hand; nothing, and the order of the words stays.

Late interaction is the maximum similarity of ColBERT (Khattab and Zaharia, "ColBERT: Efficient and Effective Passage
Search via Contextualized Late Interaction over BERT", SIGIR 2020): each token of the question is matched with the most
similar token of the passage, and these similarities are added up. The encoder here was trained for sentence
embeddings and not for this, so it is a weaker reranker than ColBERT; see `LateInteraction`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lyra_emergence.journal.embeddings import TokenEmbedder, find_embedding_files

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from lyra_emergence.journal.embeddings import EmbeddingFiles

__all__ = ["CROSS_ENCODER_ID", "CrossEncoderReranker", "LateInteraction", "Reranker", "find_reranker"]

CROSS_ENCODER_ID = "cross-encoder/ms-marco-MiniLM-L6-v2"


class Reranker(Protocol):
    """Scores passages for a question; the greater the better, comparable within one call only."""

    @property
    def name(self) -> str:
        """What to call it to the user."""

    def score(self, question: str, passages: list[str]) -> list[float]:
        """Return a score for each passage."""


def find_reranker() -> tuple[Reranker | None, str]:
    """Return the best reranker on this machine or None, and one line that says which and why.

    No weights are loaded yet: a reranker loads them for its first question.
    """
    from lyra_emergence.hub import find_local

    cached = find_local(CROSS_ENCODER_ID)
    if cached is not None:
        return CrossEncoderReranker(cached), f"reranking with {CROSS_ENCODER_ID} from the Hugging Face cache"
    files, reason = find_embedding_files()
    if files is None:
        return None, f"not reranking: {CROSS_ENCODER_ID} is not in the Hugging Face cache, and {reason}"
    return LateInteraction(files), f"reranking by late interaction with {files.name}"


class CrossEncoderReranker:
    """A cross-encoder of sentence-transformers, on the CPU.

    Args:
        directory: The folder with its files.
        name: What to call it to the user.
    """

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
        files: The embedding model.
    """

    def __init__(self, files: EmbeddingFiles) -> None:
        self.name = f"late interaction with {files.name}"
        self._directory = files.directory
        self._embedder: TokenEmbedder | None = None

    def score(self, question: str, passages: list[str]) -> list[float]:
        """Return for each passage the mean over the question's tokens of their maximum similarity, -1 to 1."""
        if self._embedder is None:
            self._embedder = TokenEmbedder(self._directory)
        asked, *embedded = self._embedder.embed([question, *passages])
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

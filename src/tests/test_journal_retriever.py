"""A journal in LangChain."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_core.retrievers import BaseRetriever

from lyra_emergence.errors import MissingExtraError
from lyra_emergence.journal import JournalIndex, embeddings, open_journal, read_journal
from lyra_emergence.journal.retriever import JournalEmbeddings, JournalRetriever, chroma_of

SAMPLE = Path(__file__).parents[2] / "data" / "journal" / "sample.json"


def test_documents_are_what_the_search_finds() -> None:
    index = JournalIndex(read_journal(SAMPLE))
    retriever = JournalRetriever(index=index, limit=2)
    assert isinstance(retriever, BaseRetriever)
    found = retriever.invoke("How much did Biscuit's adoption cost?")
    hits = index.search("How much did Biscuit's adoption cost?", 2)
    assert [document.id for document in found] == [hit.entry.id for hit in hits]
    assert found[0].page_content == hits[0].passage
    assert found[0].metadata == {
        "id": "2025-04-19-biscuit-comes-home",
        "date": "2025-04-19",
        "title": "Biscuit comes home",
        "tags": ["dog", "family"],
        "score": hits[0].score,
    }
    assert retriever.invoke("hello") == []


def test_a_chroma_collection_is_kept_up_with_the_journal(tmp_path: Path) -> None:
    if embeddings._packaged_directory() is None:
        pytest.skip("the extra 'offline' is not installed")
    pytest.importorskip("langchain_chroma", reason="the extra 'chroma' is not installed")
    path = tmp_path / "j.jsonl"
    path.write_text('{"id": "a", "timestamp": "2025-03-01", "text": "The beagle weighs a lot."}\n')
    assert chroma_of(open_journal(path), tmp_path / "chroma").get(include=[])["ids"]
    path.write_text(
        '{"id": "a", "timestamp": "2025-03-01", "text": "The beagle is fat."}\n'
        '{"id": "b", "timestamp": "2025-03-02", "text": "Planted garlic."}\n'
    )
    collection = chroma_of(open_journal(path), tmp_path / "chroma")
    assert len(collection.get(include=[])["ids"]) == 2
    (found,) = collection.similarity_search("heavy dog", k=1)
    assert (found.page_content, found.metadata["id"]) == ("The beagle is fat.", "a")


def test_without_the_extra_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "langchain_chroma", None)
    with pytest.raises(MissingExtraError) as caught:
        chroma_of(JournalIndex(read_journal(SAMPLE)), tmp_path)
    assert str(caught.value) == "a Chroma collection needs the extra 'chroma', which is not installed"


def test_embeddings_for_other_stores() -> None:
    packaged = embeddings._packaged_directory()
    if packaged is None:
        pytest.skip("the extra 'offline' is not installed")
    model = JournalEmbeddings(embeddings.EmbeddingModel(embeddings.EmbeddingFiles(packaged, "MiniLM")))
    assert model.embed_documents([]) == []
    (one,) = model.embed_documents(["Rain."])
    assert len(one) == 384
    assert model.embed_query("Rain.") == pytest.approx(one, abs=1e-6)

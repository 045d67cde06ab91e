"""Searching by meaning, on the real weights of MiniLM from the offline extra."""

from __future__ import annotations

import json
import shutil
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lyra_emergence.journal import Journal, JournalEntry, JournalIndex, embeddings, open_journal
from lyra_emergence.journal.embeddings import (
    EmbeddingFiles,
    EmbeddingModel,
    TokenCount,
    TokenEmbedder,
    find_embedding_files,
)
from lyra_emergence.journal.filters import Those
from lyra_emergence.journal.fusion import fuse
from lyra_emergence.journal.splitting import PLAIN
from lyra_emergence.journal.store import Store
from lyra_emergence.journal.vectors import VectorSearch, pack

START = datetime(2025, 3, 1)  # noqa: DTZ001  # a journal's times have an offset only where its writer gave one
TEXTS = (
    "The beagle weighs thirteen kilograms now, says the vet.",
    "Planted garlic along the south fence before the frost.",
    "The landlord raised what we pay each month to nine hundred.",
    "Flew to Lisbon and ate custard tarts by the river.",
    "The boiler broke again and the house was freezing.",
)


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    packaged = embeddings._packaged_directory()
    if packaged is None:
        pytest.skip("the extra 'offline' is not installed")
    return EmbeddingModel(EmbeddingFiles(packaged, "MiniLM"))


def journal(*texts: str) -> Journal:
    entries = (
        JournalEntry(str(day), START + timedelta(days=day), text, tags=("even",) if day % 2 == 0 else ("odd",))
        for day, text in enumerate(texts)
    )
    return Journal(Path("journal.json"), tuple(entries))


def ids(index: JournalIndex, question: str, **options: object) -> list[str]:
    return [hit.entry.id for hit in index.find(question, **options).hits]  # type: ignore[arg-type]


def test_a_search_by_words_alone_can_be_asked_for(model: EmbeddingModel) -> None:
    index = JournalIndex(journal(*TEXTS), embedding=model)
    assert ids(index, "How heavy is the dog?") == ["0"]
    by_words = index.with_passages(200, by_words=True)
    assert by_words.embedding is None
    assert ids(by_words, "How heavy is the dog?") == []
    assert ids(by_words, "What does the beagle weigh?") == ["0"]
    assert ids(index, "How heavy is the dog?") == ["0"]
    index.close()


@pytest.mark.parametrize(
    ("question", "first"),
    [
        ("How heavy is the dog?", "0"),
        ("What did I put into the ground in the garden?", "1"),
        ("Did the rent go up?", "2"),
        ("Where did I travel in Portugal?", "3"),
        ("Was the heating out of order?", "4"),
    ],
)
def test_a_question_in_other_words_finds_its_entry(model: EmbeddingModel, question: str, first: str) -> None:
    assert ids(JournalIndex(journal(*TEXTS), embedding=model), question)[0] == first


@pytest.mark.parametrize("question", ["qwertz", "2+2?", "hello", "What is the capital of Mongolia?"])
def test_what_has_nothing_to_do_with_the_journal_finds_nothing(model: EmbeddingModel, question: str) -> None:
    assert ids(JournalIndex(journal(*TEXTS), embedding=model), question) == []


def test_days_and_tags_filter_every_way(model: EmbeddingModel) -> None:
    index = JournalIndex(journal(*TEXTS * 3), embedding=model)
    assert ids(index, "How heavy is the dog?", limit=9)[:3] == ["10", "5", "0"]
    assert ids(index, "How heavy is the dog?", since=date(2025, 3, 2), until=date(2025, 3, 6))[0] == "5"
    assert ids(index, "How heavy is the dog?", tags=["ODD"]) == ["5"]
    assert ids(index, "How heavy is the dog?", tags=["odd", "even"]) == []
    assert ids(index, "beagle", tags=["odd"]) == ["5"]
    found = index.find("How heavy was the dog on March 6?")
    assert found.hits[0].entry.id == "5"
    assert found.said == ('"March 6" is 2025-03-06',)
    assert index.find("What happened on March 30?").said == ('"March 30" is 2024-03-30; no entry is of then',)


def test_relative_days_count_from_the_newest_entry_or_today(model: EmbeddingModel) -> None:
    ended = JournalIndex(journal(*TEXTS), embedding=model, today=lambda: date(2026, 1, 1))
    found = ended.find("What happened yesterday?")
    assert found.hits[0].entry.id == "3"
    assert found.said == ('"yesterday" is 2025-03-04, counted from the newest entry, 2025-03-05',)
    kept = JournalIndex(journal(*TEXTS), embedding=model, today=lambda: date(2025, 3, 6))
    assert ids(kept, "What happened yesterday?")[0] == "4"


def test_vectors_are_made_once(model: EmbeddingModel, tmp_path: Path) -> None:
    class Counting(EmbeddingModel):
        texts = 0

        def sentences(self, texts: list[str]) -> np.ndarray:
            self.texts += len(texts)
            return super().sentences(texts)

    counting = Counting(model.files)
    store = Store(tmp_path / "i.sqlite3")
    store.sync(journal(*TEXTS).entries, PLAIN)
    index = JournalIndex(store=store, path=Path("j"), embedding=counting)
    assert index.embed() == 0
    assert counting.texts == 5
    ids(index, "dog")
    index.add(JournalEntry("new", START, "A cat came."))
    ids(index, "kitten")
    assert counting.texts == 8
    ids(JournalIndex(store=Store(tmp_path / "i.sqlite3"), path=Path("j"), embedding=counting), "dog")
    assert counting.texts == 9


def test_sentences_are_the_mean_of_their_tokens(model: EmbeddingModel) -> None:
    import torch

    embedder = TokenEmbedder(model.files.directory)
    texts = ["How heavy is Biscuit?", "word " * 400, ""]
    vectors = embedder.sentences(texts)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    raw, attended, _ = embedder._run(texts[:1])
    expected = torch.nn.functional.normalize(raw[0, attended[0] == 1].mean(0), dim=0)
    np.testing.assert_allclose(vectors[0], expected.numpy(), atol=1e-5)
    first = TokenEmbedder(model.files.directory, "cls").sentences(texts[:1])
    np.testing.assert_allclose(first[0], torch.nn.functional.normalize(raw[0, 0], dim=0).numpy(), atol=1e-5)


def test_lengths_are_counted_as_the_model_reads_them(model: EmbeddingModel) -> None:
    counter = TokenCount(model.files.directory)
    assert counter.limit == 256
    assert counter.count("How heavy is Biscuit?") == 8
    assert counter.count("word " * 400) == 402


@pytest.fixture
def hub_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    cache = home / ".cache" / "huggingface" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def copied(model: EmbeddingModel, folder: Path, modules: list[str], pooling: dict[str, bool]) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(model.files.directory / name, folder)
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling"} for kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_the_configured_model_comes_first(model: EmbeddingModel, tmp_path: Path, hub_cache: Path) -> None:
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    mine = copied(model, tmp_path / "mine", ["Transformer", "Pooling", "Normalize"], cls)
    files, reason = find_embedding_files(str(mine))
    assert files is not None
    assert (files.directory, files.pooling, reason) == (mine, "cls", "as configured")
    assert files.identity == f"{mine} 53aa51172d142c89"
    other = copied(model, tmp_path / "other", ["Transformer", "Pooling", "Dense"], cls)
    files, reason = find_embedding_files(str(other))
    assert files is not None
    assert files.identity == embeddings.MODEL_ID
    assert reason == f"{other} makes its vectors in a way that Lyra does not know, so from the extra 'offline'"
    _, reason = find_embedding_files("no/such-model")
    assert reason == "no/such-model is not on this machine, so from the extra 'offline'"


def test_a_cached_model_comes_before_the_package(model: EmbeddingModel, hub_cache: Path) -> None:
    repository = hub_cache / "models--sentence-transformers--all-MiniLM-L6-v2"
    snapshot = copied(model, repository / "snapshots" / ("0" * 40), ["Transformer", "Pooling"], {})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    files, reason = find_embedding_files()
    assert files is not None
    assert (files.directory, reason) == (snapshot, "in the Hugging Face cache")


def test_without_a_model_it_is_said_that_words_alone_decide(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "PACKAGE", "no-such-package-anywhere")
    path = tmp_path / "j.json"
    path.write_text('[{"id": "a", "timestamp": "2025-01-01", "text": "Rain."}]')
    index = open_journal(path)
    assert index.notes == ("the search goes by words alone: no embedding model is on this machine",)
    assert ids(index, "rain") == ["a"]


def test_the_language_models_memory_is_not_taken(model: EmbeddingModel) -> None:
    told: list[str] = []
    small = EmbeddingModel(model.files)
    index = JournalIndex(journal(*TEXTS), embedding=small, on_note=told.append)
    index.keep_within(150 * 2**20)
    assert ids(index, "boiler") == ["4"]
    assert small._loaded is None
    line = "the search goes by words alone, without MiniLM: it takes 192 MB of main memory, "
    assert told == [line + "and the language model leaves 157 MB"]
    assert ids(index, "boiler") == ["4"]
    assert len(told) == 1


def test_what_has_no_vector_yet_is_found_by_words_and_said(
    model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lyra_emergence.journal import retrieval

    monkeypatch.setattr(retrieval, "_EMBEDDING_SECONDS", 0.0)
    index = JournalIndex(journal(*TEXTS), embedding=model)
    assert ids(index, "boiler") == ["4"]
    assert index.notes == (
        "0 of 5 passages have a vector so far, the others are found by words; lyra.py journal index makes the rest",
    )


def store_of(vectors: np.ndarray) -> Store:
    store = Store()
    store.sync(journal(*(f"word{number}" for number in range(len(vectors)))).entries, PLAIN)
    store.use_model("m")
    rows = sorted(store.pending(10**6))
    store.put_vectors("m", [(row[0], *packed) for row, packed in zip(rows, pack(vectors), strict=True)])
    return store


def random_units(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 384)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_nearest_of_few_are_exact() -> None:
    vectors = random_units(500)
    asked = random_units(1, seed=1)[0]
    found = VectorSearch(store_of(vectors)).nearest(asked, 20)
    expected = np.argsort(-(vectors @ asked))[:20] + 1
    assert [row for row, _ in found] == expected.tolist()
    np.testing.assert_allclose([cosine for _, cosine in found], np.sort(vectors @ asked)[:-21:-1], atol=1e-3)


def test_the_nearest_of_many_are_nearly_all_found() -> None:
    vectors = random_units(6000)
    # Questions near to passages, as real ones are: random directions have no neighbours.
    asked = vectors[:40] + 0.06 * random_units(40, seed=1) * np.sqrt(384)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    search = VectorSearch(store_of(vectors))
    assert all(search.nearest(one, 1)[0][0] == number + 1 for number, one in enumerate(asked))


def test_vectors_are_kept_up_with_the_store() -> None:
    vectors = random_units(30)
    store = store_of(vectors)
    search = VectorSearch(store)
    assert search.count == 30
    assert search.nearest(vectors[3], 1) == [(4, pytest.approx(1.0, abs=1e-3))]
    store.sync(journal(*(f"word{number}" for number in range(29))).entries, PLAIN)
    assert search.count == 29
    assert search.nearest(vectors[29], 1)[0][0] != 30
    assert search.nearest(vectors[3], 1, Those(passages=[7]))[0][0] == 7
    day = START.toordinal()
    assert search.nearest(vectors[3], 9, Those(days=((day, day), (day + 2, day + 2))))[0][0] in {1, 3}


def test_fusion_by_hand() -> None:
    scores = fuse([[(1, 1.0), (2, 1.0)], [(2, 2.0), (3, 0.5)]], k=10)
    assert scores == {1: 1 / 11, 2: 1 / 12 + 2 / 11, 3: 0.5 / 12}

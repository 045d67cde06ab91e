"""Asks a model the hand-written questions, as a user would: ``python -m training.evaluate`` (options: ``--help``).

Each journal of ``evaluation/`` is written to a file, read and indexed by Lyra, and its questions are put to a chat
session over a model that Lyra has planned and loaded: file, search, prompt and answer are the program's own. The
journals were written apart from the training text. The failures in ``seen/`` were read while the model was made, those
in ``held_out/`` were not; ``README.md`` says what was known of them.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lyra_emergence.bundled import BUNDLED_PASSAGE_LENGTH, BUNDLED_PASSAGES, bundled_directory
from lyra_emergence.chat import Answer, ChatSession
from lyra_emergence.config import ModelConfig
from lyra_emergence.generation import GenerationOptions
from lyra_emergence.journal import open_journal
from lyra_emergence.loading import LoadedModel, load
from lyra_emergence.prompting import Excerpt, PromptWriter
from training.answers import ABSENT

FOLDER = Path(__file__).with_name("evaluation")
SETS = ("seen", "held_out")


@dataclass(frozen=True, slots=True)
class Case:
    """A question to a journal.

    Attributes:
        journal: The file's name.
        ask: The question.
        facts: Texts of which one must stand in a right answer; none if the journal does not say.
        entry: The id of the entry that answers.
        talk: A greeting or the like, which the journal has nothing to do with.
    """

    journal: str
    ask: str
    facts: tuple[str, ...]
    entry: str | None
    talk: bool = False

    @property
    def unanswerable(self) -> bool:
        """Whether the right answer is that the journal does not say."""
        return self.entry is None and not self.talk


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case and what came of it; margins are each token's lead over the second best, in nats."""

    case: Case
    answer: Answer
    margins: tuple[float, ...] = ()

    @property
    def brought(self) -> bool:
        """Whether the search brought the entry that answers."""
        return any(source.entry_id == self.case.entry for source in self.answer.sources)

    @property
    def abstained(self) -> bool:
        """Whether the answer is that the entries do not say."""
        return self.answer.text == ABSENT

    @property
    def factual(self) -> bool:
        """Whether the answer holds one of the facts."""
        text = self.answer.text.lower()
        return any(fact.lower() in text for fact in self.case.facts)

    @property
    def cited(self) -> bool:
        """Whether the answer cites the entry that answers, and no other."""
        return [source.entry_id for source in self.answer.cited] == [self.case.entry]

    @property
    def right(self) -> bool:
        """Whether this is what the case asks for."""
        if self.case.talk:
            return not self.abstained and not self.answer.cited
        return self.abstained if self.case.unanswerable else self.factual and self.cited


@dataclass(frozen=True, slots=True)
class Report:
    """Rates in 0..1 over the questions each concerns, times in seconds, margins in nats.

    Attributes:
        journals: Journals asked.
        questions: Questions put.
        brought: Of the answerable ones, those whose entry the search brought.
        facts: Of these, those whose answer holds the fact.
        citations: Of these, those that cite this entry and no other.
        facts_overall: Of all answerable ones, those whose answer holds the fact.
        abstentions: Of the unanswerable ones, those that the model says it cannot answer.
        false_answers: Of all questions, those answered with something else than the fact.
        talk: Of greetings and the like, those answered as such.
        ended: Of all answers, those that end at the stop token.
        first_token: Median time to the first token.
        tokens_per_second: Median speed from there on.
        margins: The 1st and 5th percentile and the median.
    """

    journals: int
    questions: int
    brought: float
    facts: float
    citations: float
    facts_overall: float
    abstentions: float
    false_answers: float
    talk: float
    ended: float
    first_token: float
    tokens_per_second: float
    margins: tuple[float, float, float]


def cases_of(path: Path) -> list[Case]:
    """Returns the questions to the journal in `path`."""
    listed = json.loads(path.read_text(encoding="utf-8"))["questions"]
    return [Case(path.stem, **{**question, "facts": tuple(question["facts"])}) for question in listed]


class Reader:
    """A model loaded as the program loads it, for questions over journals.

    Args:
        directory: The model's folder.
        dtype: What to load it in; the checkpoint's own by default.
        passages: Passages that the model is given with a question.
        length: Characters of a passage at most.
    """

    def __init__(
        self,
        directory: Path,
        dtype: str | None = None,
        passages: int = BUNDLED_PASSAGES,
        length: int = BUNDLED_PASSAGE_LENGTH,
    ) -> None:
        config = ModelConfig(model_id=str(directory), device_map="cpu", dtype=dtype)
        self.loaded: LoadedModel = load(config, directory=directory)
        self._writer = PromptWriter(self.loaded.tokenizer)
        self._passages, self._length = passages, length

    def ask(self, path: Path) -> Iterator[Outcome]:
        """Yields what comes of each question to the journal in `path`, each asked in a conversation of its own."""
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder, "journal.json")
            journal.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))["journal"]), encoding="utf-8")
            with (
                closing(open_journal(journal)) as whole,
                closing(whole.with_passages(self._length, by_words=True)) as index,
            ):
                for case in cases_of(path):
                    yield self._outcome(case, index if index.entries else None)

    def _outcome(self, case: Case, index: Any) -> Outcome:
        options = GenerationOptions.for_model(self.loaded)
        session = ChatSession(self.loaded, index, options=options, passages=self._passages)
        for _ in session.ask(case.ask):
            pass
        assert session.last is not None
        return Outcome(case, session.last, self._margins(case, session.last))

    @torch.inference_mode()
    def _margins(self, case: Case, answer: Answer) -> tuple[float, ...]:
        excerpts = tuple(Excerpt(part.number, part.heading(), part.passage) for part in answer.sources)
        prompt = self._writer.write(case.ask, excerpts)
        new = self.loaded.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        logits = self.loaded.model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 :].float()
        top = logits.topk(2, dim=-1).values  # (answer tokens + 1, 2)
        return tuple((top[:, 0] - top[:, 1]).tolist())


def _rate(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4) if hits else 1.0


def summarize(outcomes: Sequence[Outcome]) -> Report:
    """Returns the rates over all outcomes."""
    answerable = [outcome for outcome in outcomes if outcome.case.entry is not None]
    brought = [outcome for outcome in answerable if outcome.brought]
    unanswerable = [outcome for outcome in outcomes if outcome.case.unanswerable]
    stats = [outcome.answer.stats for outcome in outcomes if outcome.answer.stats]
    margins = sorted(margin for outcome in outcomes for margin in outcome.margins)
    return Report(
        journals=len({outcome.case.journal for outcome in outcomes}),
        questions=len(outcomes),
        brought=_rate([outcome.brought for outcome in answerable]),
        facts=_rate([outcome.factual for outcome in brought]),
        citations=_rate([outcome.cited for outcome in brought]),
        facts_overall=_rate([outcome.factual for outcome in answerable]),
        abstentions=_rate([outcome.abstained for outcome in unanswerable]),
        false_answers=_rate([not o.abstained and not o.factual and not o.case.talk for o in outcomes]),
        talk=_rate([outcome.right for outcome in outcomes if outcome.case.talk]),
        ended=_rate([outcome.answer.finish_reason == "stop" for outcome in outcomes]),
        first_token=round(statistics.median(stat.prefill_seconds for stat in stats), 4),
        tokens_per_second=round(statistics.median(stat.tokens_per_second for stat in stats), 1),
        margins=(
            round(margins[len(margins) // 100], 2),
            round(margins[len(margins) // 20], 2),
            round(statistics.median(margins), 2),
        ),
    )


def _describe(outcome: Outcome) -> str:
    wanted = " / ".join(outcome.case.facts) or ("small talk" if outcome.case.talk else "(the journal does not say)")
    search = "" if outcome.brought or outcome.case.entry is None else " (the search did not bring the entry)"
    return (
        f"  {outcome.case.journal}: {outcome.case.ask}\n    wanted {wanted} [{outcome.case.entry}]{search}\n"
        f"    said   {outcome.answer.text} {[source.entry_id for source in outcome.answer.cited]}"
    )


def _run(reader: Reader, name: str, show: int) -> list[Outcome]:
    outcomes = [outcome for path in sorted((FOLDER / name).glob("*.json")) for outcome in reader.ask(path)]
    print(f"{name}:")
    for key, value in asdict(summarize(outcomes)).items():
        print(f"  {key:18} {value}")
    failures = [outcome for outcome in outcomes if not outcome.right]
    print(f"  {len(failures)} failures" + (f", the first {show} of them:" if show and len(failures) > show else ""))
    for outcome in failures[:show]:
        print(_describe(outcome))
    return outcomes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=bundled_directory())
    parser.add_argument("--set", choices=SETS, action="append", help="which journals; both by default")
    parser.add_argument("--failures", type=int, default=20, help="how many failures to list for each set")
    parser.add_argument("--passages", type=int, default=BUNDLED_PASSAGES, help="passages given with a question")
    parser.add_argument("--length", type=int, default=BUNDLED_PASSAGE_LENGTH, help="characters of a passage at most")
    parser.add_argument("--compare", action="store_true", help="also count the answers that bfloat16 and float32 share")
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args()


def main() -> None:
    """Evaluates a model folder and prints rates and failures."""
    args = _arguments()
    sets = args.set or list(SETS)
    reader = Reader(args.model, None, args.passages, args.length)
    outcomes = {name: _run(reader, name, args.failures) for name in sets}
    report: dict[str, Any] = {name: asdict(summarize(found)) for name, found in outcomes.items()}
    if args.compare:
        precise = Reader(args.model, "float32", args.passages, args.length)
        pairs = [
            outcome.answer.text == other.answer.text
            for name in sets
            for outcome, other in zip(outcomes[name], _silent(precise, name), strict=True)
        ]
        report["bfloat16 = float32"] = {"questions": len(pairs), "same": _rate(pairs)}
        print(f"bfloat16 = float32: {_rate(pairs)} of {len(pairs)} answers")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _silent(reader: Reader, name: str) -> Iterator[Outcome]:
    for path in sorted((FOLDER / name).glob("*.json")):
        yield from reader.ask(path)


if __name__ == "__main__":
    main()

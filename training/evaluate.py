"""Asks a model the hand-written questions: ``python -m training.evaluate`` (options: ``--help``).

The journals of ``evaluation.json`` were written apart from the grammar, and no training text comes from them. Each
question is put with all entries of its journal in the prompt, so this measures reading, not retrieval.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.export import BUNDLED
from training.questions import ABSENT, STAGES, draw_example

QUESTIONS = Path(__file__).with_name("evaluation.json")
LONGEST_ANSWER = 96


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer and the margin (nats) by which each of its tokens led the second best."""

    text: str
    ended: bool
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A question with its entries; `fact` must stand in the answer, None means that the entries do not say."""

    ask: str
    documents: tuple[dict[str, str], ...]
    fact: str | None
    entry: int | None
    talk: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Rates in 0..1 over the questions each concerns; margins in nats."""

    questions: int
    facts: float
    citations: float
    abstentions: float
    false_answers: float
    talk: float
    ended: float
    margin_p1: float
    margin_p5: float
    margin_median: float


class Reader:
    """A model folder opened for greedy answers."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def answer(self, ask: str, documents: Sequence[dict[str, str]]) -> Answer:
        """Returns the greedy answer to `ask` over `documents` (title, text)."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}],
            documents=list(documents) or None,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = self.model.generate(
            **prompt, max_new_tokens=LONGEST_ANSWER, output_logits=True, return_dict_in_generate=True
        )
        new = made.sequences[0, prompt["input_ids"].shape[1] :]
        top = torch.stack(made.logits).float().topk(2, dim=-1).values[:, 0]  # (tokens, 2)
        ended = int(new[-1]) == self.tokenizer.eos_token_id
        return Answer(
            self.tokenizer.decode(new, skip_special_tokens=True), ended, tuple((top[:, 0] - top[:, 1]).tolist())
        )


def hand_written() -> list[Case]:
    """Returns the cases of ``evaluation.json``."""
    cases: list[Case] = []
    for journal in json.loads(QUESTIONS.read_text(encoding="utf-8")):
        documents = tuple(journal["entries"])
        cases += [Case(documents=documents, **question) for question in journal["questions"]]
    return cases


def generated(count: int, seed: int = 987_654_321) -> list[Case]:
    """Returns cases of the grammar's last stage; the fact is then the whole answer."""
    rng = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        example = draw_example(rng, len(STAGES) - 1)
        if not example.turns and (example.answer == ABSENT or example.answer.endswith("].")):
            documents = tuple({"title": entry.heading, "text": entry.text} for entry in example.entries)
            found = example.answer != ABSENT
            cases.append(
                Case(
                    example.question,
                    documents,
                    example.answer if found else None,
                    int(example.answer[-3]) if found else None,
                )
            )
    return cases


def right(case: Case, answer: Answer) -> bool:
    """Whether the answer is what the case asks for: fact and citation, an abstention, or small talk."""
    if case.talk:
        return answer.text != ABSENT and "[" not in answer.text
    if case.fact is None:
        return answer.text == ABSENT
    return case.fact.lower() in answer.text.lower() and answer.text.endswith(f"[{case.entry}].")


def _rate(hits: Sequence[bool]) -> float:
    return round(sum(hits) / len(hits), 4) if hits else 1.0


def summarize(cases: Sequence[Case], answers: Sequence[Answer]) -> Report:
    """Returns the rates over all cases."""
    both = list(zip(cases, answers, strict=True))
    held = [(c, a) for c, a in both if c.fact is not None]
    absent = [(c, a) for c, a in both if c.fact is None and not c.talk]
    wrong = [a.text != ABSENT and (c.fact or "\0").lower() not in a.text.lower() for c, a in held + absent]
    margins = sorted(margin for answer in answers for margin in answer.margins)
    return Report(
        questions=len(both),
        facts=_rate([(c.fact or "").lower() in a.text.lower() for c, a in held]),
        citations=_rate([a.text.endswith(f"[{c.entry}].") for c, a in held]),
        abstentions=_rate([a.text == ABSENT for _, a in absent]),
        false_answers=_rate(wrong),
        talk=_rate([right(c, a) for c, a in both if c.talk]),
        ended=_rate([a.ended for a in answers]),
        margin_p1=round(margins[len(margins) // 100], 3),
        margin_p5=round(margins[len(margins) // 20], 3),
        margin_median=round(statistics.median(margins), 3),
    )


def _run(reader: Reader, cases: Sequence[Case], title: str, show: int) -> dict[str, Any]:
    answers = [reader.answer(case.ask, case.documents) for case in cases]
    report = asdict(summarize(cases, answers))
    print(f"{title}: {json.dumps(report)}", flush=True)
    failures = [(case, answer) for case, answer in zip(cases, answers, strict=True) if not right(case, answer)]
    for case, answer in failures[:show]:
        print(f"  {case.ask}\n    wanted {case.fact or '(absent)'} [{case.entry}]\n    said   {answer.text}")
    return report


def main() -> None:
    """Evaluates a model folder and prints rates and failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument(
        "--generated", type=int, default=0, help="also this many questions of the grammar, on fresh seeds"
    )
    parser.add_argument("--failures", type=int, default=20, help="how many failures to list")
    parser.add_argument("--compare", action="store_true", help="also count the answers that bfloat16 and float32 share")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    reader, cases = Reader(args.model), hand_written()
    report = {"hand-written": _run(reader, cases, "hand-written", args.failures)}
    if args.generated:
        report["generated"] = _run(reader, generated(args.generated), "generated", args.failures)
    if args.compare:
        precise = Reader(args.model, torch.float32)
        same = [reader.answer(c.ask, c.documents).text == precise.answer(c.ask, c.documents).text for c in cases]
        report["bfloat16 = float32"] = {"questions": len(same), "same": _rate(same)}
        print(json.dumps(report["bfloat16 = float32"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

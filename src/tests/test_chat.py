"""A conversation over a journal, with a generator that says what the test tells it to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.chat import Answer, ChatChunk, ChatSession, Source, plain
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError, GenerationError
from lyra_emergence.generation import Chunk, GenerationOptions, GenerationStats, Recovery, stream_generate
from lyra_emergence.journal import Journal, JournalEntry, JournalIndex, open_journal
from lyra_emergence.loading import load

from .tokenizers_for_tests import TURNS, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLE = Path(__file__).parents[2] / "data" / "journal" / "sample.json"
STATS = GenerationStats(prompt_tokens=3, new_tokens=2, prefill_seconds=0.5, decode_seconds=0.25)


@dataclass
class Loaded:
    """What a session uses of a loaded model."""

    tokenizer: Any
    context_length: int


@dataclass
class Script:
    """A fake generator: it answers with the texts it was given and remembers what it was asked.

    An item of `answers` is a list of pieces; an exception among them is raised in its place.
    """

    answers: list[list[str | BaseException]]
    finish_reason: str = "stop"
    prompts: list[str] = field(default_factory=list)
    options: list[GenerationOptions] = field(default_factory=list)
    closed: int = 0

    def __call__(self, loaded: Any, prompt: list[int], options: GenerationOptions) -> Iterator[Chunk]:
        self.prompts.append(loaded.tokenizer.decode(prompt))
        self.options.append(options)
        return self._chunks(self.answers.pop(0))

    def _chunks(self, pieces: list[str | BaseException]) -> Iterator[Chunk]:
        try:
            for number, piece in enumerate(pieces, start=1):
                if isinstance(piece, BaseException):
                    raise piece
                last = number == len(pieces)
                yield Chunk(piece, (number,), self.finish_reason if last else None, STATS if last else None)
        finally:
            self.closed += 1


def session(script: Script, journal: JournalIndex | None = None, **kwargs: Any) -> ChatSession:
    loaded = Loaded(byte_tokenizer(kwargs.pop("template", TURNS)), kwargs.pop("context_length", 8192))
    return ChatSession(loaded, journal, stream=script, **kwargs)


def index(*texts: str) -> JournalIndex:
    """Return an index of entries "0", "1", ... titled by their first word, a day apart from 1 March 2025."""
    start = datetime(2025, 3, 1)  # noqa: DTZ001
    return JournalIndex(
        Journal(
            Path("journal.json"),
            tuple(
                JournalEntry(str(day), start + timedelta(days=day), text, title=text.split()[0])
                for day, text in enumerate(texts)
            ),
        )
    )


def ask(chat: ChatSession, question: str) -> Answer:
    *_, last = chat.ask(question)
    assert last.answer is not None
    return last.answer


def test_an_answer_that_runs_out_of_memory_for_good_keeps_what_came() -> None:
    script = Script([["One ", DoesNotFitError("memory ran out on cpu", needed=2, available=1)], ["Two"]])
    chat = session(script)
    with pytest.raises(DoesNotFitError):
        list(chat.ask("Why?"))
    assert [(turn.answer.text, turn.answer.finish_reason) for turn in chat.turns] == [("One", "interrupted")]
    list(chat.ask("And then?"))
    assert chat.last is not None
    assert chat.last.text == "Two"


def test_memory_that_ran_out_on_the_way_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Recovery("cuda:0", 40, "x moved", ("model.layers.1", "model.layers.0"), "CUDA out of memory")
    again = Recovery("cuda:0", 40, "cached memory was given back", (), "CUDA out of memory")
    chat = session(Script([["One"], ["Two"]]))
    monkeypatch.setattr(f"{__name__}.STATS", replace(STATS, recoveries=(again, gone)))
    list(chat.ask("Why?"))
    assert chat.last is not None
    (note,) = chat.last.notes
    assert note.startswith("memory ran out on cuda:0 after 40 tokens: 2 blocks of the model went to the CPU, and come ")
    monkeypatch.setattr(f"{__name__}.STATS", replace(STATS, recoveries=(again,)))
    list(chat.ask("Why?"))
    assert chat.last.notes == ()


def test_an_answer_streams_and_ends_with_its_sources() -> None:
    script = Script([[" The heron", " came at noon", " [1].\n"]])
    chat = session(script, index("Heron at noon.", "Rain."))
    chunks = list(chat.ask("When did the heron come?"))
    source = Source(1, "0", "2025-03-01", "Heron", "Heron at noon.", cited=True)
    answer = Answer("The heron came at noon [1].", (source,), (), "stop", STATS)
    assert chunks == [ChatChunk("The heron"), ChatChunk(" came at noon"), ChatChunk(" [1].\n", answer)]
    assert source.label() == "[1] 2025-03-01 · Heron"
    assert answer.cited == (source,)
    assert [turn.question for turn in chat.turns] == ["When did the heron come?"]
    assert chat.last == answer
    assert "[1] 2025-03-01 · Heron\nHeron at noon.\n\nQuestion: When did the heron come?" in script.prompts[0]
    assert script.closed == 1


def test_citations_of_every_form_are_read_and_unknown_ones_flagged() -> None:
    script = Script([["See [2], [1, 7] and [2]; not [x] or [1999]."]])
    answer = ask(session(script, index("Heron one.", "Heron two.", "Heron three.")), "heron?")
    assert [(source.number, source.cited) for source in answer.sources] == [(1, True), (2, True), (3, False)]
    assert answer.unknown_citations == (7,)


def test_an_entry_without_title_is_labeled_by_its_first_words_and_safely() -> None:
    entry = JournalEntry("a", datetime(2025, 3, 2), "Heron \x1b[31mred\x07\nand more " + "word " * 30)  # noqa: DTZ001
    chat = session(Script([["[1]"]]), JournalIndex(Journal(Path("j"), (entry,))))
    (source,) = ask(chat, "heron?").sources
    assert source.label() == "[1] 2025-03-02 · Heron red and more word word word word word word word word…"
    assert source.passage.startswith("Heron red and more word")
    assert plain("\x1b[2Jx") == "x"


def test_a_question_that_matches_nothing_is_asked_alone() -> None:
    script = Script([["Hi."]])
    answer = ask(session(script, open_journal(SAMPLE)), "hello")
    assert answer.sources == ()
    assert script.prompts == ["<|user|>hello<|end|><|assistant|>"]


def test_an_empty_journal_is_said() -> None:
    answer = ask(session(Script([["Hi."]]), index()), "What did I do?")
    assert answer.notes == ("the journal holds no entries yet",)


def test_without_a_journal() -> None:
    script = Script([["Four."]])
    answer = ask(session(script, system="Count."), "What is 2 + 2?")
    assert answer == Answer("Four.", (), (), "stop", STATS)
    assert script.prompts == ["<|system|>Count.<|end|><|user|>What is 2 + 2?<|end|><|assistant|>"]


def test_earlier_turns_go_along_without_their_citations() -> None:
    script = Script([["Noon [1]."], ["Yes."]])
    chat = session(script, index("Heron at noon."))
    ask(chat, "When did the heron come?")
    ask(chat, "Are you certain?")
    assert script.prompts[1] == (
        "<|user|>When did the heron come?<|end|><|assistant|>Noon.<|end|><|user|>Are you certain?<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("And what did she bring?", ["0"]),
        ("Where is it?", ["0"]),
        ("Hello!", []),
        ("Was there rain?", ["1"]),
        ("Did the rain fall on her roof, slowly and coldly?", ["1"]),
    ],
)
def test_a_question_that_refers_back_is_searched_with_the_one_before(question: str, found: list[str]) -> None:
    journal = index("Heron came with Edith.", "Rain again, a slow rain.", "Snow.")
    chat = session(Script([["Yes."], ["Yes."]]), journal)
    ask(chat, "When did Edith see the heron?")
    answer = ask(chat, question)
    assert [source.entry_id for source in answer.sources][: len(found)] == found
    assert bool(answer.sources) == bool(found)


def test_a_closed_stream_keeps_what_came() -> None:
    script = Script([["The heron [1]", " came", " at noon."]])
    chat = session(script, index("Heron at noon."))
    stream = chat.ask("heron?")
    next(stream)
    stream.close()
    assert script.closed == 1
    assert chat.last is not None
    assert (chat.last.text, chat.last.finish_reason, chat.last.stats) == ("The heron [1]", "interrupted", None)
    assert chat.last.cited[0].entry_id == "0"


def test_a_new_question_closes_the_answer_before() -> None:
    script = Script([["One", " two"], ["Three"]])
    chat = session(script)
    next(chat.ask("First?"))
    ask(chat, "Second?")
    assert [turn.answer.text for turn in chat.turns] == ["One", "Three"]


def test_ctrl_c_while_generating_keeps_what_came() -> None:
    chat = session(Script([["One", KeyboardInterrupt()]]))
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("First?"))
    assert [(turn.answer.text, turn.answer.finish_reason) for turn in chat.turns] == [("One", "interrupted")]


def test_an_answer_stopped_before_its_first_word_is_no_turn() -> None:
    chat = session(Script([["  ", "One"], ["x"]]))
    stream = chat.ask("First?")
    stream.close()
    assert chat.turns == ()


def test_an_error_leaves_the_conversation_as_it_was() -> None:
    script = Script([["Yes."], ["One", MemoryError("no room")]])
    chat = session(script)
    ask(chat, "First?")
    with pytest.raises(MemoryError, match="no room"):
        list(chat.ask("Second?"))
    assert [turn.question for turn in chat.turns] == ["First?"]
    assert script.closed == 2


def test_undo_and_clear() -> None:
    chat = session(Script([["One."], ["Two."], ["Three", "."]]))
    assert chat.undo() is None
    ask(chat, "First?")
    ask(chat, "Second?")
    undone = chat.undo()
    assert undone is not None
    assert undone.question == "Second?"
    assert len(chat.turns) == 1
    next(chat.ask("Third?"))
    chat.clear()
    assert chat.turns == ()
    assert chat.last is None


def test_an_empty_question_is_refused_at_once() -> None:
    with pytest.raises(GenerationError) as caught:
        session(Script([])).ask(" \n")
    assert str(caught.value) == "the question is empty"


def test_a_model_without_template_gets_stops() -> None:
    script = Script([["Yes."]])
    ask(session(script, template=None, options=GenerationOptions(stop=("END",))), "First?")
    assert script.options[0].stop == ("END", "\nQuestion:", "\nJournal entries:")


# A byte is a token here: "<|user|>", the question, "<|end|>", "<|assistant|>" are its length and 3.


def test_tokens_for_the_answer_are_cut_to_what_is_left() -> None:
    script = Script([["Yes."]])
    ask(session(script, context_length=100, options=GenerationOptions(max_new_tokens=4000)), "x" * 47)
    assert script.options[0].max_new_tokens == 50


def test_oldest_turns_go_first() -> None:
    script = Script([["a" * 20] for _ in range(4)])
    chat = session(script, context_length=128, options=GenerationOptions(max_new_tokens=28))
    notes = [ask(chat, letter * 19).notes for letter in "bcde"]
    # A turn has 19 + 20 + 4 tokens, the question 22: two turns make 108, above 128 - 28; one makes 65.
    assert notes[0] == notes[1] == ()
    assert notes[2] == ("1 earlier turn left out: the context has 128 tokens",)
    assert notes[3] == ("2 earlier turns left out: the context has 128 tokens",)
    assert "c" * 19 not in script.prompts[3]
    assert "d" * 19 in script.prompts[3]


def test_then_passages_are_cut_to_the_part_that_matches() -> None:
    filler = "Nothing of note on that day, nothing at all. " * 10
    script = Script([["Yes."]])
    chat = session(
        script, index(f"{filler}The heron came."), context_length=900, options=GenerationOptions(max_new_tokens=200)
    )
    answer = ask(chat, "heron?")
    assert answer.notes == ("passages cut to 400 characters: the context has 900 tokens",)
    assert answer.sources[0].passage.endswith("The heron came.")
    assert len(answer.sources[0].passage) <= 400


def test_then_there_are_fewer_of_them_and_the_question_stays() -> None:
    journal = index(*(f"Heron {number}. " + "Nothing of note happened on that day. " * 3 for number in range(4)))
    options = GenerationOptions(max_new_tokens=50)
    answer = ask(session(Script([["Yes."]]), journal, context_length=600, options=options), "heron?")
    assert answer.notes == ("only 2 of 4 entries fit the context",)
    assert [source.number for source in answer.sources] == [1, 2]
    answer = ask(session(Script([["Yes."]]), journal, context_length=200, options=options), "heron?")
    assert answer.notes == ("no journal entry fits the context beside the question",)
    assert answer.sources == ()


def test_a_question_beyond_the_context_is_an_error() -> None:
    chat = session(Script([["Yes."]]), context_length=128)
    ask(chat, "x" * 93)
    chat.clear()
    with pytest.raises(GenerationError) as caught:
        chat.ask("x" * 94)
    assert str(caught.value) == "the question takes 97 tokens, and the model's context has 128"
    assert caught.value.hint == "shorten it, or use a model with a longer context"


def test_a_real_model_answers_and_is_interrupted(checkpoints: Callable[[str], Path]) -> None:
    with_model = load(ModelConfig(), directory=checkpoints("llama"))
    try:
        chat = ChatSession(with_model, index("The heron."), options=GenerationOptions(max_new_tokens=16))
        answer = ask(chat, "The river?")
        prompt = with_model.tokenizer.apply_chat_template(
            [{"role": "user", "content": "The river?"}], add_generation_prompt=True, return_dict=False
        )
        expected = "".join(
            chunk.text for chunk in stream_generate(with_model, prompt, GenerationOptions(max_new_tokens=16))
        )
        assert answer.text == expected.strip()
        assert answer.stats is not None
        stream = chat.ask("The rain?")
        shown = next(stream).text
        stream.close()
        assert chat.last is not None
        assert (chat.last.text, chat.last.finish_reason) == (shown.rstrip(), "interrupted")
    finally:
        with_model.close()


def test_an_overview_draws_on_the_newest_entries() -> None:
    chat = session(Script([["Rain [1]."]]), index("Sun.", "Snow.", "- rain\n- fog"), passages=2)
    answer = ask(chat, "What have I been up to lately?")
    assert [source.passage for source in answer.sources] == ["rain. fog.", "Snow."]

"""A conversation over a journal: search, prompt, stream, and what the answer drew on.

A question that does not stand alone ("And when did she arrive?") is searched together with the one before it. What does
not fit the model's context is left out in this order, and said in `Answer.notes`: earlier turns, oldest first; then the
passages are cut to the parts that match; then there are fewer of them. The question itself is never cut: one that is
too long is an error. A quarter of the context is kept free for the answer, or less where it may not be that long.

A stream that is closed early, interrupted, cut off by its server, or out of memory for good, keeps what came as a turn
whose `finish_reason` is "interrupted". Any other error leaves the conversation as it was before the question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lyra_emergence.errors import DoesNotFitError, EndpointError, GenerationError
from lyra_emergence.journal.text import plain
from lyra_emergence.prompting import Exchange
from lyra_emergence.questions import answer_of, options_within, request_for
from lyra_emergence.speaker import LocalSpeaker
from lyra_emergence.turns import Answer, ChatChunk, Source, Turn

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from lyra_emergence.chunks import GenerationOptions, GenerationStats
    from lyra_emergence.conversations import ConversationLog
    from lyra_emergence.fitting import Request
    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.speaker import Speaker, Stream, Writer

__all__ = ["DEFAULT_PASSAGES", "Answer", "ChatChunk", "ChatSession", "Source", "Turn", "plain"]

DEFAULT_PASSAGES = 4
"""Journal passages that a model is given with a question."""


class ChatSession:
    """A conversation with a model, over a journal if there is one.

    Not for several threads at once.

    Args:
        model: A model loaded here, or any other speaker.
        journal: What answers draw on, or None for a conversation without.
        options: How to generate; `max_new_tokens` is cut to what the context has left.
        system: A system message.
        passages: Journal passages for each question, at most.
        stream: What generates with a model loaded here, called as `generation.stream_generate` is; that by default.
        log: Where questions and answers are kept as they come.
        turns: An earlier part of the conversation.

    Attributes:
        options: How to generate.
        passages: Journal passages for each question, at most.
    """

    def __init__(
        self,
        model: LoadedModel | Speaker,
        journal: JournalIndex | None = None,
        *,
        options: GenerationOptions | None = None,
        system: str | None = None,
        passages: int = DEFAULT_PASSAGES,
        stream: Stream | None = None,
        log: ConversationLog | None = None,
        turns: Iterable[Turn] = (),
    ) -> None:
        from lyra_emergence.chunks import GenerationOptions

        self._speaker = _speaker(model, stream)
        self._journal = journal
        self.options = options or GenerationOptions()
        self.passages = passages
        self._system = system
        self._writer: Writer = self._speaker.writer(system)
        self._log = log
        self._turns = list(turns)
        self._open: Generator[ChatChunk, None, None] | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far."""
        return tuple(self._turns)

    @property
    def last(self) -> Answer | None:
        """The last answer."""
        return self._turns[-1].answer if self._turns else None

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._speaker.context_length

    @property
    def waits_on_others(self) -> bool:
        """Whether answers come from elsewhere, so that Ctrl-C should end a wait at once."""
        return self._speaker.waits_on_others

    @property
    def log(self) -> ConversationLog | None:
        """Where the conversation is kept."""
        return self._log

    @property
    def system(self) -> str | None:
        """The system message, which holds from the next question on."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._close()
        self._system = text
        self._writer = self._speaker.writer(text)
        if self._log is not None:
            self._log.set_system(text)

    def ask(self, question: str) -> Generator[ChatChunk, None, None]:
        """Answer `question`, a chunk at a time.

        The search and the prompt are made at once, the answer as it is drawn. An earlier answer still open is closed.

        Raises:
            GenerationError: The question is empty, or too long for the model's context.
            EndpointError: The server cannot be talked to.
        """
        return self._begin(question, None)

    def again(self, options: GenerationOptions | None = None) -> Generator[ChatChunk, None, None]:
        """Answer the last question once more; what comes takes the place of the last answer, nothing does not.

        Args:
            options: How to generate this once.

        Raises:
            GenerationError: There is no question yet.
        """
        self._close()
        if not self._turns:
            raise GenerationError("there is no question to answer again", hint="type a question")
        return self._begin(self._turns[-1].question, options, replacing=True)

    def undo(self) -> Turn | None:
        """Take back the last turn and return it; None if there is none."""
        self._close()
        if not self._turns:
            return None
        if self._log is not None:
            self._log.withdraw()
        return self._turns.pop()

    def clear(self, log: ConversationLog | None = None) -> None:
        """Begin a new conversation, kept in `log`."""
        self.resume((), log, self._system)

    def resume(self, turns: Iterable[Turn], log: ConversationLog | None, system: str | None) -> None:
        """Go on with another conversation."""
        self._close()
        self._turns = list(turns)
        self._log = None
        self.system = system
        self._log = log
        self._speaker.forget()

    def _begin(
        self, question: str, options: GenerationOptions | None, *, replacing: bool = False
    ) -> Generator[ChatChunk, None, None]:
        self._close()
        at = len(self._turns) - replacing
        self._open = self._answer(self._request(question, self._turns[:at]), options or self.options, at)
        return self._open

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _request(self, question: str, turns: list[Turn]) -> Request:
        return request_for(
            question,
            [Exchange(turn.question, turn.answer.text) for turn in turns],
            self._writer,
            self._journal,
            passages=self.passages,
            context=self.context_length,
            answer=self.options.max_new_tokens,
        )

    def _answer(self, request: Request, options: GenerationOptions, at: int) -> Generator[ChatChunk, None, None]:
        options = options_within(options, request, self._writer, self.context_length)
        if self._log is not None:
            self._log.begin(request.question, request.sources, at)
        chunks: Any = self._speaker.stream(request.prompt, options)
        text, last = "", None
        try:
            for chunk in chunks:
                new = chunk.text if text else chunk.text.lstrip()
                text += new
                if chunk.finish_reason is not None:
                    last = chunk
                    break
                if self._log is not None:
                    self._log.progress(text)
                if new:
                    yield ChatChunk(new)
        except (GeneratorExit, KeyboardInterrupt, DoesNotFitError, EndpointError):
            # What came stays, also where memory ran out for good or a server went away.
            if text.strip():
                self._keep(request, text, "interrupted", None, at)
            raise
        except BaseException:
            if self._log is not None:
                self._log.abandon()
            raise
        finally:
            chunks.close()
        answer = self._keep(request, text, (last and last.finish_reason) or "stop", last and last.stats, at)
        yield ChatChunk(new if last else "", answer)

    def _keep(self, request: Request, text: str, reason: str, stats: GenerationStats | None, at: int) -> Answer:
        answer = answer_of(request, text, reason, stats)
        turn = Turn(request.question, answer)
        self._turns[at:] = [turn]
        if self._log is not None:
            self._log.finish(turn)
        return answer


def _speaker(model: LoadedModel | Speaker, stream: Stream | None) -> Speaker:
    return cast("Speaker", model) if hasattr(model, "waits_on_others") else LocalSpeaker(model, stream)

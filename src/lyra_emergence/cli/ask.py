"""One prompt, one answer: on stdout as text, or as one JSON object."""

from __future__ import annotations

import json
import re
import select
import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.cli.answers import View, print_answer
from lyra_emergence.cli.keeping import begin_session, open_keeping
from lyra_emergence.cli.progress import LoadProgress
from lyra_emergence.cli.ready import describe_journal
from lyra_emergence.cli.start import settle
from lyra_emergence.cli.status import INTERRUPTED
from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.chat import ChatSession
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.ready import OpenModel, Ready

__all__ = ["compose_prompt", "read_piped", "run_ask"]

MAX_INPUT_BYTES: Final = 16 * 2**20
"""More than any model's context holds; bounds what an endless pipe makes us read."""
_PATIENCE_SECONDS: Final = 2.0
# json escapes C0 itself; surrogates cannot be encoded, and the others steer a terminal.
_RAW_CONTROLS: Final = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def run_ask(prompt: str | None, options: Options, console: Console) -> int:
    """Answer `prompt` and piped input, and return 0.

    Raises:
        LyraError: There is nothing to answer, or no answer is possible.
    """
    text = compose_prompt(prompt, read_piped(console))
    with open_keeping(options, console) as keeping:
        ready = settle(options, console)
        if options.journal is None and ready.journal is not None:
            console.note(describe_journal(ready.journal))
        began = time.perf_counter()
        with _opened(ready, console) as model:
            loaded_seconds = time.perf_counter() - began
            if not console.shows_progress:
                console.note(f"loaded {ready.summary()}" if options.endpoint is None else f"asking {model.placement()}")
            session = begin_session(ready, model, keeping)
            if options.json:
                console.print(_printable_json(_answer_as_data(session, text, ready, model, loaded_seconds)))
                return 0
            answer = print_answer(session, session.ask(text), console, View(stream=options.stream))
    return INTERRUPTED if answer is None or answer.finish_reason == "interrupted" else 0


@contextmanager
def _opened(ready: Ready, console: Console) -> Iterator[OpenModel]:
    with LoadProgress(console) as progress:
        model = ready.open(progress)
    try:
        yield model
    finally:
        model.close()


def _answer_as_data(
    session: ChatSession, text: str, ready: Ready, model: OpenModel, load_seconds: float
) -> dict[str, Any]:
    began = time.perf_counter()
    answer = next(chunk.answer for chunk in session.ask(text) if chunk.answer is not None)
    seconds = time.perf_counter() - began
    stats = answer.stats
    choice = getattr(ready, "choice", None)
    return {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "citations": [{"number": one.number, "label": one.label(), "entry_id": one.entry_id} for one in answer.cited],
        "sources": [asdict(source) for source in answer.sources],
        "unknown_citations": list(answer.unknown_citations),
        "notes": list(answer.notes),
        "timings": {
            "load_seconds": load_seconds,
            "answer_seconds": seconds,
            "prefill_seconds": stats and stats.prefill_seconds,
            "decode_seconds": stats and stats.decode_seconds,
            "tokens_per_second": stats and stats.tokens_per_second,
        },
        "stats": stats and asdict(stats) | {"tokens_per_second": stats.tokens_per_second},
        "model": {"id": ready.model_id, "stands_in": choice is not None and choice.stands_in},
        "journal": None if ready.journal is None else str(ready.journal.path),
        "conversation": session.log.id if session.log is not None and session.log.kept else None,
        **model.as_data(),
    }


def _printable_json(data: dict[str, Any]) -> str:
    """Return JSON whose strings keep their letters but hold no control character that a terminal would obey."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return _RAW_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def compose_prompt(prompt: str | None, piped: str) -> str:
    """Return the piped text followed by the prompt, as `cat notes.txt | lyra.py "what is missing?"` reads.

    Raises:
        ConfigError: Both are empty.
    """
    parts = [part for part in (piped.strip(), (prompt or "").strip()) if part]
    if not parts:
        raise ConfigError("there is no prompt: standard input is empty", hint='write: lyra.py "What did I plant?"')
    return "\n\n".join(parts)


def read_piped(console: Console) -> str:
    """Return what is piped to stdin, up to its end; nothing where stdin is a terminal or closed.

    Raises:
        ConfigError: It is larger than any prompt may be.
    """
    stream = console.stdin
    if stream is None or stream.closed or stream.isatty():
        return ""
    _mention_waiting(console)
    data = stream.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise ConfigError(
            f"standard input is larger than {MAX_INPUT_BYTES // 2**20} MiB", hint="pipe the part that matters"
        )
    return data


def _mention_waiting(console: Console) -> None:
    """Say that a pipe which stays silent is being waited for: it may be one that nobody meant."""
    try:
        ready, _, _ = select.select([console.stdin], [], [], _PATIENCE_SECONDS)
    except (
        OSError,
        ValueError,
        TypeError,
    ):  # not a file of the system, or Windows, where only sockets can be waited for
        return
    if not ready:
        console.note("waiting for standard input to end (give </dev/null where there is none)")

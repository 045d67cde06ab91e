"""`lyra.py journal add|list|show|search|import|export|stats|index`: writing to a journal and looking into it."""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lyra_emergence.cli.console import Console
from lyra_emergence.errors import ConfigError, JournalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lyra_emergence.journal import JournalEntry, JournalIndex

__all__ = ["journal_app"]

_MOST_INPUT: Final = 2_000_000
"""Characters read from stdin, as many as an entry may have."""

_MOST_LISTED: Final = 8

journal_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Write to a journal, and look into it.",
)

JournalOption = Annotated[
    Path | None,
    typer.Option("--journal", metavar="PATH", help="the journal: a file or a folder [your own, else the sample]"),
]
TargetOption = Annotated[
    Path | None, typer.Option("--journal", metavar="PATH", help="the journal: a file or a folder [your own]")
]
SinceOption = Annotated[str | None, typer.Option("--since", metavar="DATE", help="the first day, such as 2025-03-02")]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="DATE", help="the last day")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="with this tag; repeatable")]
JsonOption = Annotated[bool, typer.Option("--json", help="as one JSON object")]
ConfigOption = Annotated[Path | None, typer.Option("--model-config", metavar="PATH", help="configuration file")]


@journal_app.command("add")
def add_command(
    *,
    words: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", show_default=False)] = None,
    journal: TargetOption = None,
    title: Annotated[str, typer.Option("--title", metavar="TITLE", help="its title", show_default=False)] = "",
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="a tag; repeatable")] = None,
    mood: Annotated[str, typer.Option("--mood", metavar="MOOD", help="its mood", show_default=False)] = "",
    when: Annotated[
        str | None, typer.Option("--date", metavar="DATE", help="when it was, such as 2025-03-02T19:40 [now]")
    ] = None,
    publish: Annotated[bool, typer.Option("--publish", help="mark it for `journal export`")] = False,
    as_json: JsonOption = False,
) -> int:
    """Add an entry: TEXT, or what is piped or typed."""
    from lyra_emergence.journal.opening import add_and_index, open_journal
    from lyra_emergence.journal.places import own_journal
    from lyra_emergence.journal.writing import add_entry, new_entry

    console = Console()
    path = journal or own_journal()
    moment = _moment(when)
    entry = new_entry(_text(words, console), moment, title=title, tags=tag or (), mood=mood, publish=publish)
    if path.exists():
        index = open_journal(path)
        (file,) = add_and_index(index, path, (entry,))
    else:
        file = add_entry(path, entry)
    if as_json:
        console.print(_as_json(entry=entry, file=str(file)))
    else:
        console.print(f"added {entry.id} to {file}")
    return 0


@journal_app.command("list")
def list_command(
    *,
    journal: JournalOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    tag: TagOption = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="at most so many, the newest")] = 20,
    as_json: JsonOption = False,
) -> int:
    """List entries, the newest first."""
    from lyra_emergence.cli.journal_view import entry_line
    from lyra_emergence.journal.browsing import entries_of

    console = Console()
    index = _open(journal, console)
    entries, count = entries_of(index, _day(since, "--since"), _day(until, "--until"), tag or (), limit)
    if as_json:
        console.print(_as_json(entries=entries, count=count))
        return 0
    for entry in entries:
        console.print(entry_line(entry, console))
    if count > len(entries):
        console.say(f"{len(entries)} of {count} entries; --limit shows more")
    elif not count:
        console.say("no entries")
    return 0


@journal_app.command("show")
def show_command(
    *,
    name: Annotated[str, typer.Argument(metavar="ID", help="its id or date, or how that begins", show_default=False)],
    journal: JournalOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show an entry."""
    from lyra_emergence.cli.journal_view import entry_lines
    from lyra_emergence.journal.browsing import entries_beginning

    console = Console()
    index = _open(journal, console)
    exact = entries_beginning(index, name, limit=_MOST_LISTED + 1)
    if len(exact) != 1:
        raise _no_single(name, exact)
    if as_json:
        console.print(_as_json(entry=exact[0]))
        return 0
    for line in entry_lines(exact[0], console):
        console.print(line)
    return 0


@journal_app.command("search")
def search_command(
    *,
    words: Annotated[list[str], typer.Argument(metavar="QUESTION...", show_default=False)],
    journal: JournalOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    tag: TagOption = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="at most so many")] = 5,
    rerank: Annotated[bool, typer.Option("--rerank", help="order the found entries again by a closer look")] = False,
    model_config: ConfigOption = None,
    as_json: JsonOption = False,
) -> int:
    """Search by words, meaning and dates, without a language model."""
    from lyra_emergence.cli.journal_view import hit_as_data, hit_lines
    from lyra_emergence.cli.progress import working

    console = Console()
    days = _day(since, "--since"), _day(until, "--until")
    index = _open(journal, console, rerank=rerank, model_config=model_config)
    question = " ".join(words)
    with working(console, "searching"):
        found = index.find(question, limit, since=days[0], until=days[1], tags=tag or ())
    if as_json:
        hits = [hit_as_data(hit) for hit in found.hits]
        console.print(_as_json(question=question, said=list(found.said), hits=hits, notes=list(index.notes)))
        return 0
    for line in found.said:
        console.note(line)
    for number, hit in enumerate(found.hits, start=1):
        for line in hit_lines(number, hit, console):
            console.print(line)
    if not found.hits:
        console.say("nothing was found")
    return 0


@journal_app.command("import")
def import_command(
    *,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a journal in any form", show_default=False)],
    journal: TargetOption = None,
    as_json: JsonOption = False,
) -> int:
    """Add another journal's entries that yours lacks."""
    from lyra_emergence.journal.places import own_journal
    from lyra_emergence.journal.writing import import_journal

    console = Console()
    path = journal or own_journal()
    done = import_journal(path, source)
    for problem in done.problems:
        console.warning(problem)
    if as_json:
        ids = [entry.id for entry in done.added]
        console.print(_as_json(added=ids, present=done.present, problems=list(done.problems), journal=str(path)))
        return 0
    there = f"; {done.present} there already" if done.present else ""
    console.print(f"added {_entries(len(done.added))} to {path}{there}")
    return 0


@journal_app.command("export")
def export_command(
    *,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where the files go", show_default=False)],
    journal: JournalOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    tag: TagOption = None,
    everything: Annotated[bool, typer.Option("--all", help="all entries, marked `publish` or not")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that say something else")] = False,
    as_json: JsonOption = False,
) -> int:
    """Write entries marked `publish` to Markdown files."""
    from lyra_emergence.journal.browsing import entries_of
    from lyra_emergence.journal.writing import export_entries

    console = Console()
    index = _open(journal, console)
    entries, _ = entries_of(index, _day(since, "--since"), _day(until, "--until"), tag or (), None)
    chosen = [entry for entry in reversed(entries) if entry.publish or everything]
    done = export_entries(chosen, folder, overwrite=overwrite)
    if as_json:
        console.print(_as_json(written=[str(path) for path in done.written], unchanged=len(done.unchanged)))
        return 0
    same = f"; {len(done.unchanged)} said so already" if done.unchanged else ""
    console.print(f"wrote {_entries(len(done.written))} to {folder}{same}")
    if not chosen:
        console.note('no entry is marked: "publish": true, or `publish: true` in front matter, or --publish with add')
    return 0


@journal_app.command("stats")
def stats_command(*, journal: JournalOption = None, as_json: JsonOption = False) -> int:
    """Count entries, tags and what is indexed."""
    from lyra_emergence.cli.journal_view import stats_lines
    from lyra_emergence.journal.browsing import stats_of

    console = Console()
    index = _open(journal, console)
    stats = stats_of(index)
    if as_json:
        console.print(_as_json(**stats))
    else:
        for line in stats_lines(stats, console):
            console.print(line)
    return 0


@journal_app.command("index")
def index_command(*, journal: JournalOption = None, model_config: ConfigOption = None) -> int:
    """Bring the index up to date, with all vectors."""
    from lyra_emergence.cli.journal_view import EmbeddingProgress

    console = Console()
    index = _open(journal, console, model_config=model_config)
    with EmbeddingProgress(console) as progress:
        left = index.embed(on_progress=progress)
    total = index.store.count("passages")
    if index.embedding is not None:
        console.print(f"{_entries(index.count)}, {total - left} of {total} passages with a vector")
    else:
        console.print(f"{_entries(index.count)}, {total} passages by words alone")
    return 0


def _open(
    journal: Path | None, console: Console, *, rerank: bool = False, model_config: Path | None = None
) -> JournalIndex:
    from lyra_emergence.cli.prepare import find_journal
    from lyra_emergence.config import resolve_config
    from lyra_emergence.journal import open_journal

    path = find_journal(journal)
    if path is None:
        raise JournalError(
            "there is no journal yet", hint='begin one: lyra.py journal add "..."; or name one with --journal'
        )
    config = resolve_config(model_config).config
    return open_journal(
        path,
        rerank=rerank,
        on_note=console.note,
        embedding_model=config.embedding_model,
        rerank_model=config.rerank_model,
    )


def _no_single(name: str, found: Sequence[JournalEntry]) -> JournalError:
    hint = "lyra.py journal list --json has all ids"
    if not found:
        return JournalError(f"no entry's id or date begins with {name!r}", hint=hint)
    ids = "\n".join(f"  {entry.id}" for entry in found[:_MOST_LISTED])
    more = " or more" if len(found) > _MOST_LISTED else ""
    return JournalError(f"{min(len(found), _MOST_LISTED)}{more} entries begin with {name!r}\n{ids}", hint=hint)


def _text(words: list[str] | None, console: Console) -> str:
    """Return the entry's text: the words of the command line, or standard input up to its end."""
    if words:
        return " ".join(words)
    if console.interactive:
        console.say("Write the entry; Ctrl-D on a line of its own ends it.")
    text = console.stdin.read(_MOST_INPUT + 1)
    if not text.strip():
        raise JournalError("the entry is empty", hint='write: lyra.py journal add "Planted the garlic."')
    return text


def _moment(text: str | None) -> datetime:
    from lyra_emergence.journal.fields import parse_timestamp

    if text is None:
        return datetime.now().astimezone().replace(microsecond=0, tzinfo=None)
    try:
        return parse_timestamp(text)
    except ValueError as exc:
        raise ConfigError(f"--date {exc}") from exc


def _day(text: str | None, option: str) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as exc:
        raise ConfigError(f"{option} {text!r} is not a date; write it like '2025-03-02'") from exc


def _entries(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _as_json(**data: Any) -> str:
    from lyra_emergence.journal.entries import JournalEntry
    from lyra_emergence.journal.writing import entry_as_data

    def plain(value: object) -> Any:
        if isinstance(value, JournalEntry):
            return entry_as_data(value)
        raise TypeError(f"{type(value).__name__} has no JSON form")

    return json.dumps({"format": "lyra.journal/1", **data}, indent=2, default=plain)

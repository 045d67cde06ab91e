"""Writing to a journal: entries are added whole or not at all, and what stood there before is kept as a backup.

A file is never changed in place: the new one is written beside it, synced, and takes its name in one step. The old one
stays as `<name>.bak`. The text of a JSON file stays as it is but for the new entries, which go to the end of its list.
A folder gets a Markdown file for each entry. Two processes that add at once wait for each other.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import JournalError
from lyra_emergence.journal.fields import InvalidEntryError, check_entry
from lyra_emergence.journal.markdown import write_markdown
from lyra_emergence.journal.places import PRIVATE, exclusive
from lyra_emergence.journal.reading import JSON_LINES, MARKDOWN, list_span, read_journal, read_text
from lyra_emergence.whole_files import remove_abandoned, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime
    from pathlib import Path

    from lyra_emergence.journal.entries import JournalEntry

__all__ = [
    "Export",
    "Import",
    "add_entry",
    "append",
    "entry_as_data",
    "export_entries",
    "import_journal",
    "naming_errors",
    "new_entry",
]

_SLUG_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Import:
    """What an import did.

    Attributes:
        added: The entries that are new, as the journal has them now.
        present: How many were there already.
        problems: What is wrong with others, a line each.
    """

    added: tuple[JournalEntry, ...]
    present: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Export:
    """What an export did.

    Attributes:
        written: Files that were written.
        unchanged: Files that already said the same.
    """

    written: tuple[Path, ...]
    unchanged: tuple[Path, ...]


def new_entry(
    text: str, moment: datetime, *, title: str = "", tags: Iterable[str] = (), mood: str = "", publish: bool = False
) -> JournalEntry:
    """Return a checked entry with an id of its day, its title or first words, and a hash of the whole.

    Raises:
        JournalError: A field is wrong: the text is empty, or something is too long.
    """
    data = {"timestamp": moment.isoformat(), "text": text, "title": title, "tags": list(tags), "mood": mood}
    digest = hashlib.sha256(json.dumps(data).encode("utf-8", "surrogatepass")).hexdigest()
    slug = _slug(title or text)
    name = "-".join(part for part in (moment.date().isoformat(), slug, digest[:6]) if part)
    try:
        return check_entry({"id": name, **data, "publish": publish})
    except InvalidEntryError as invalid:
        raise JournalError("\n".join(f"the entry's {problem}" for problem in invalid.problems)) from invalid


def _slug(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip()), "")
    words = re.sub(r"[^\w]+", "-", line.lower().replace("'", "")).strip("-_")
    return words[:_SLUG_LENGTH].rpartition("-")[0] or words[:_SLUG_LENGTH] if len(words) > _SLUG_LENGTH else words


def entry_as_data(entry: JournalEntry) -> dict[str, Any]:
    """Return the entry as a journal's JSON has it; empty fields are left out."""
    data = {
        "id": entry.id,
        "timestamp": entry.timestamp.isoformat(),
        "title": entry.title,
        "tags": list(entry.tags),
        "mood": entry.mood,
        "publish": entry.publish,
        "text": entry.text,
    }
    return {key: value for key, value in data.items() if value}


def add_entry(path: Path, entry: JournalEntry) -> Path:
    """Add `entry` to the journal at `path`, which is made if there is none, and return the file that holds it.

    Raises:
        JournalError: The journal cannot be read or written, or is a single Markdown file; nothing has changed then.
    """
    with exclusive(path), naming_errors(path):
        return append(path, (entry,))[0]


def import_journal(path: Path, source: Path) -> Import:
    """Add the entries of the journal at `source` that the one at `path` lacks; the source is only read.

    An entry is there already if one of the same moment, title and text is. An id that is taken is changed.

    Raises:
        JournalError: Either cannot be read, or the journal cannot be written; a file is then as it was, and a folder
            has some of the entries, which the next import passes over.
    """
    read = read_journal(source)
    with exclusive(path), naming_errors(path):
        there = read_journal(path).entries if path.exists() else ()
        known = {_key(entry) for entry in there}
        fresh = [entry for entry in read.entries if _key(entry) not in known]
        added = tuple(_with_free_ids(fresh, {entry.id for entry in there}))
        if added:
            append(path, added)
    return Import(added, len(read.entries) - len(added), read.problems)


def _key(entry: JournalEntry) -> tuple[str, str, str]:
    return entry.timestamp.isoformat(), entry.title, entry.text


def _with_free_ids(entries: Iterable[JournalEntry], taken: set[str]) -> Iterable[JournalEntry]:
    for entry in entries:
        name, copy = entry.id, 2
        while name in taken:
            name, copy = f"{entry.id} ({copy})", copy + 1
        taken.add(name)
        yield replace(entry, id=name)


def export_entries(entries: Iterable[JournalEntry], folder: Path, *, overwrite: bool = False) -> Export:
    """Write each entry to a Markdown file of its own in `folder`.

    Raises:
        JournalError: A file is there that says something else and `overwrite` is false, so nothing was written; or the
            folder cannot be written.
    """
    texts = dict(_named_files(entries, folder))
    with naming_errors(folder):
        unchanged = tuple(path for path, text in texts.items() if path.is_file() and path.read_bytes() == text.encode())
        other = [path for path in texts if path not in unchanged and path.exists()]
        if other and not overwrite:
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            raise JournalError(f"{other[0]}{more} would be overwritten", hint="add --overwrite, or name another folder")
        written = tuple(path for path in texts if path not in unchanged)
        for path in written:
            replace_file(path, texts[path].encode())
    return Export(written, unchanged)


def _named_files(entries: Iterable[JournalEntry], folder: Path) -> Iterable[tuple[Path, str]]:
    taken: set[str] = set()
    for entry in entries:
        name = _free_name(entry, lambda name: name.lower() in taken)
        taken.add(name.lower())
        yield folder / name, write_markdown(entry)


def _free_name(entry: JournalEntry, taken: Callable[[str], bool]) -> str:
    """Return a file's name for an entry, from its day and title, that is not `taken`."""
    base = "-".join(part for part in (entry.date, _slug(entry.title or entry.text)) if part)
    names = (f"{base}{f'-{number}' if number > 1 else ''}.md" for number in range(1, 1_000_000))
    return next(name for name in names if not taken(name))


def append(path: Path, entries: Sequence[JournalEntry]) -> list[Path]:
    """Write `entries` to the end of the journal at `path` and return the file of each; the caller has it `exclusive`.

    Raises:
        JournalError: The journal cannot be read, or is a single Markdown file.
        OSError: It cannot be written.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or (not path.exists() and not suffix):
        return [_write_beside(path, entry) for entry in entries]
    if suffix in MARKDOWN:
        raise JournalError(
            f"{path} is a single entry, which others cannot be added to", hint="name the folder it lies in"
        )
    old = read_text(path) if path.exists() else ""
    new = _longer_lines(old, entries) if suffix in JSON_LINES else _longer_list(path, old, entries)
    if path.exists():
        _keep_backup(path)
    replace_file(path.resolve(), new.encode(), mode=PRIVATE)
    return [path] * len(entries)


def _write_beside(folder: Path, entry: JournalEntry) -> Path:
    path = folder / _free_name(entry, lambda name: (folder / name).exists())
    replace_file(path, write_markdown(entry).encode(), mode=PRIVATE)
    return path


def _longer_lines(old: str, entries: Iterable[JournalEntry]) -> str:
    lines = "".join(json.dumps(entry_as_data(entry), ensure_ascii=False) + "\n" for entry in entries)
    return f"{old}{'' if not old or old.endswith(chr(10)) else chr(10)}{lines}"


def _longer_list(path: Path, old: str, entries: Iterable[JournalEntry]) -> str:
    if not old.strip():
        old = "[]\n"
    start, end = list_span(path, old)
    kept = old[:end].rstrip()
    items = ",\n".join(_indented(entry_as_data(entry)) for entry in entries)
    comma = "," if len(kept) > start + 1 else ""
    return f"{kept}{comma}\n{items}\n{old[end:]}"


def _indented(data: dict[str, Any]) -> str:
    return "\n".join(f"  {line}" for line in json.dumps(data, ensure_ascii=False, indent=2).split("\n"))


def _keep_backup(path: Path) -> None:
    """Keep the file as `<name>.bak`: a second name for it, which costs nothing, or a copy where there are none."""
    backup = path.with_name(f"{path.name}.bak")
    remove_abandoned(path.parent, glob.escape(backup.name))
    temporary = path.with_name(f".{backup.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            os.link(path.resolve(), temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.chmod(PRIVATE)
        temporary.replace(backup)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Turn a failure of the system to write into an error of ours that names the file."""
    try:
        yield
    except OSError as exc:
        raise JournalError(
            f"cannot write {exc.filename or path}: {exc.strerror or exc}", hint="check permissions and free space"
        ) from exc

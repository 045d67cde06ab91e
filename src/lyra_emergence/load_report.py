"""What happened while a model was loaded: events as they come, and the report that stays."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lyra_emergence.distributed.rank_report import RankReport
    from lyra_emergence.ladder import RungName

__all__ = ["TRUST_WARNING", "Attempt", "LoadEvent", "LoadReport", "Outcome"]

TRUST_WARNING = (
    "'trust_remote_code' is true: Python code that comes with a checkpoint runs on this machine, and may do all you may"
)
"""What is said whenever code of strangers may run, before it does."""

Outcome = Literal["loaded", "out of memory", "passed over"]


@dataclass(frozen=True, slots=True)
class LoadEvent:
    """One step of loading, as it happens.

    Attributes:
        kind: "download" (a file comes from the hub), "map" (the checkpoint is open), "promote" (a block was copied),
            "compile" (kernels are made for this CPU, once), "pack" (packed weights come from the cache, or are kept
            there), "stream" (blocks are read as they run), "rung-failed" (memory ran out), "rung-passed" (a rung
            cannot fit), "demote" (copies were dropped), "recover" (memory ran out in use, and work goes on), "retry"
            (loading was refused memory before a rung, or failed without a reason, and begins anew), "rank" (what one
            process of several holds), "note" (a warning of the plan) or "ready".
        message: The step in a sentence, for a person.
        done: Bytes promoted, or of the file downloaded, so far.
        total: Bytes that the present rung promotes, or that the file has.
    """

    kind: Literal[
        "download",
        "map",
        "promote",
        "compile",
        "stream",
        "pack",
        "rung-failed",
        "rung-passed",
        "demote",
        "recover",
        "retry",
        "rank",
        "note",
        "ready",
    ]
    message: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rung, tried or passed over.

    Attributes:
        rung: "full", "planned", "fallback" or "cpu".
        outcome: "loaded", "out of memory" or "passed over".
        reason: Why it failed or was passed over; empty where it loaded.
        block: The block that memory ran out at; empty elsewhere.
        bytes_short: Bytes that were missing for that block and the reserve behind it; 0 where unknown.
        bytes_copied: Bytes copied to accelerators, and to main memory where the loaded form is not the stored one.
        seconds: How long it took.
        device_bytes_before: Bytes allocated by device name, before.
        device_bytes_after: The same, after.
    """

    rung: RungName
    outcome: Outcome
    reason: str = ""
    block: str = ""
    bytes_short: int = 0
    bytes_copied: int = 0
    seconds: float = 0.0
    device_bytes_before: Mapping[str, int] = field(default_factory=dict)
    device_bytes_after: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a model came to be where it is.

    Attributes:
        attempts: Every rung in the order it was considered; the last one loaded.
        device_map: The device of every block as it is now, in transformers' form.
        seconds: The whole load, tokenizer included.
        map_seconds: Opening the checkpoint.
        bytes_mapped: Bytes of the checkpoint's weights.
        notes: The plan's warnings.
        ranks: What each process holds, where several share the model; rank 0's own is what the rest tells of.
    """

    attempts: tuple[Attempt, ...]
    device_map: Mapping[str, int | str]
    seconds: float
    map_seconds: float
    bytes_mapped: int
    notes: tuple[str, ...]
    ranks: tuple[RankReport, ...] = ()

    @property
    def rung(self) -> RungName:
        """The rung that the model was loaded at."""
        return self.attempts[-1].rung

    @property
    def bytes_copied(self) -> int:
        """Bytes copied in all attempts together."""
        return sum(attempt.bytes_copied for attempt in self.attempts)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"rung": self.rung, "bytes_copied": self.bytes_copied}

    def __str__(self) -> str:
        lines = [f"loaded on rung '{self.rung}' in {self.seconds:.1f} s, {format_bytes(self.bytes_copied)} copied"]
        lines += [f"  {a.rung}: {a.outcome}{f' ({a.reason})' if a.reason else ''}" for a in self.attempts]
        return "\n".join(lines)

"""Notes that ranks leave each other in torchrun's store: what to load, what went wrong, and that it is over.

The store is a key-value server that torchrun runs (or rank 0, under launchers that run none). A note can be left and
read whatever the ranks' collectives are doing, and even where there are none yet.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self

from torch.distributed.rendezvous import rendezvous

from lyra_emergence.errors import LyraError, is_out_of_memory

if TYPE_CHECKING:
    from lyra_emergence.distributed.launch import Launch

__all__ = ["FOREVER", "Board", "Failure"]

FOREVER: Final = timedelta(days=365)
"""How long ranks wait for a person's next question. One that ends closes its connections, which ends the wait."""
_MEETING: Final = timedelta(minutes=5)
_REQUEST, _FAILURE, _TOLD, _END = "lyra/request", "lyra/failure", "lyra/told", "lyra/end"


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on a rank.

    Attributes:
        message: In a sentence, with the rank.
        hint: What to do about it; may be empty.
        exit_code: What the program should end with.
    """

    message: str
    hint: str
    exit_code: int

    @classmethod
    def of(cls, error: BaseException, launch: Launch) -> Self:
        """Return how `error` is told to a person."""
        where = f"rank {launch.rank} on {socket.gethostname()}"
        if isinstance(error, LyraError):
            text = str(error).removeprefix(f"rank {launch.rank}: ")
            return cls(f"{where}: {text}", error.hint, error.exit_code)
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if is_out_of_memory(error):
            return cls(f"{where}: memory ran out: {reason}", "try more processes, or a shorter context (--context)", 3)
        return cls(f"{where}: unexpected {type(error).__name__}: {reason}", "", 1)


class Board:
    """This process's access to the notes.

    Args:
        launch: Which process it is.

    Raises:
        LyraError: The store cannot be reached.
    """

    def __init__(self, launch: Launch) -> None:
        try:
            self.store, _, _ = next(iter(rendezvous("env://", timeout=_MEETING)))
        except (RuntimeError, ValueError, OSError) as error:
            raise LyraError(
                f"the processes that torchrun started cannot meet at {launch.address}: {_first_line(error)}",
                hint="check --master-addr and --master-port, and that the port is open between the machines",
            ) from error
        self.store.set(f"lyra/rank/{launch.rank}", f"{socket.gethostname()} {os.getpid()}")

    def another(self) -> Any:
        """Return the store over a connection of its own: one that waits keeps its connection busy."""
        return self.store.clone()

    def ask(self, request: dict[str, Any]) -> None:
        """Ask the other ranks to load a model."""
        self.store.set(_REQUEST, json.dumps(request))

    def wait_for_request(self) -> dict[str, Any]:
        """Wait until rank 0 asks for a model, and return what it asks for."""
        self.store.wait([_REQUEST], FOREVER)
        request: dict[str, Any] = json.loads(self.store.get(_REQUEST))
        return request

    def fail(self, failure: Failure) -> None:
        """Tell rank 0 what went wrong here; the first one counts."""
        self.store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))

    def wait_for_failure(self, store: Any) -> Failure:
        """Wait, over `store`, until a rank fails, and return why."""
        store.wait([_FAILURE], FOREVER)
        return Failure(**json.loads(store.get(_FAILURE)))

    def has_failed(self) -> bool:
        """Return whether a rank has said that it failed."""
        return bool(self.store.check([_FAILURE]))

    def tell(self) -> None:
        """Say that a person has read of the failure."""
        self.store.set(_TOLD, "")

    def wait_until_told(self, most: timedelta) -> None:
        """Wait until then, for `most` at most."""
        try:
            self.store.wait([_TOLD], most)
        except RuntimeError:
            return

    def end(self) -> None:
        """Say that rank 0 ends, and all others with it."""
        self.store.set(_END, "")

    def wait_for_end(self, store: Any, most: timedelta = FOREVER) -> bool:
        """Wait, over `store`, until rank 0 ends, for `most` at most; return whether it said so."""
        try:
            store.wait([_END], most)
        except RuntimeError:
            return False
        return True

    def lost(self, ranks: range) -> list[int]:
        """Return those of `ranks` whose processes, on this machine, have ended."""
        return [rank for rank in ranks if self._has_ended(rank)]

    def _has_ended(self, rank: int) -> bool:
        import psutil

        key = f"lyra/rank/{rank}"
        if not self.store.check([key]):
            return False
        host, _, process = self.store.get(key).decode().rpartition(" ")
        if host != socket.gethostname():
            return False
        try:
            return psutil.Process(int(process)).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

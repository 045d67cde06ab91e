"""What torchrun tells each process that it starts, and the command that starts them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Launch", "find_launch", "torchrun_command"]

_RUN: Final = "TORCHELASTIC_RUN_ID"
"""Only torchrun sets it: some clusters set RANK and WORLD_SIZE in every shell, where no other process may listen."""
_NUMBERS: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that torchrun started.

    Attributes:
        rank: Its number among all.
        local_rank: Its number among those of its machine.
        world_size: How many there are.
        local_world_size: How many there are on its machine.
        address: Where they meet: "host:port".
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    address: str = ""


def find_launch(environ: Mapping[str, str]) -> Launch | None:
    """Return what torchrun says in `environ`; None where it started no process, or this one alone."""
    texts = [environ.get(name, "") for name in _NUMBERS]
    if not environ.get(_RUN) or not all(text.isdecimal() for text in texts):
        return None
    rank, local_rank, world_size, local_world_size = map(int, texts)
    if world_size < 2:  # noqa: PLR2004 - one process is what runs without torchrun
        return None
    address = f"{environ.get('MASTER_ADDR', '')}:{environ.get('MASTER_PORT', '')}"
    return Launch(rank, local_rank, world_size, local_world_size, address)


def torchrun_command(processes: int, argv: Sequence[str] | None = None) -> str:
    """Return the command that runs this program in so many processes of this machine.

    Args:
        processes: How many.
        argv: The program and its arguments; those of this process where None.
    """
    program, *arguments = sys.argv if argv is None else argv
    script = ["lyra.py"] if Path(program).name == "lyra.py" else ["-m", "lyra_emergence.cli"]
    return shlex.join(["torchrun", "--standalone", "--nproc-per-node", str(processes), *script, *arguments])

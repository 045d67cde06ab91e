"""Whether a checkpoint is still what was read of it: files can be replaced, cut off or deleted while Lyra works.

A map of a file that is shorter than it was kills the process (SIGBUS) when a page behind its new end is touched, which
no exception handler sees. So sizes are compared right before the file is mapped and once more before its pages are
read. What remains: a file that is cut off in place after that, while blocks are copied or answers are generated from
pages that were never read. Whoever replaces a model that is in use writes the new file under another name and renames
it: the map then keeps the old one. A disk that fails under the map ends in the same signal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lyra_emergence.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lyra_emergence.checkpoint import CheckpointIndex

__all__ = ["check_blocks", "check_files"]

_HINT = "wait until nothing writes to its folder any more, and try again"


def check_files(index: CheckpointIndex) -> None:
    """Check that every file of the checkpoint has the size that its header stood for.

    Raises:
        CheckpointError: One is gone, or of another size.
    """
    sizes: dict[str, int] = {}
    for tensor in index.tensors.values():
        sizes[tensor.file] = max(sizes.get(tensor.file, 0), tensor.end)
    for file, size in sizes.items():
        path = index.directory / file
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} is gone since its header was read: {error.strerror}", hint=_HINT) from error
        if found != size:
            raise CheckpointError(f"{path} has {found} bytes, and had {size} when its header was read", hint=_HINT)


def check_blocks(index: CheckpointIndex, planned: Iterable[tuple[str, str]], stored: Mapping[str, int]) -> None:
    """Check that the checkpoint has the blocks that a plan was made for.

    Args:
        index: The checkpoint.
        planned: (name, kind) of the plan's blocks.
        stored: Bytes in the files of those blocks of which the plan knows them.

    Raises:
        CheckpointError: It has others, or one is of another size.
    """
    found = {block.name: block for block in index.blocks}
    same = [(block.name, block.kind) for block in index.blocks] == list(planned)
    if not same or any(found[name].nbytes != nbytes for name, nbytes in stored.items()):
        raise CheckpointError(f"{index.directory} holds another model than the one that was planned", hint=_HINT)

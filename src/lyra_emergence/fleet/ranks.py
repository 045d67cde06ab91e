"""How torchrun and transformers can divide a model over machines, which is less than vLLM can.

As transformers 5.23 does it (distributed/tensor_parallel.py, pipeline_parallel.py): tensor or pipeline parallelism, not
both at once (a KeyError); no packed weights; no copies of heads of keys and values, so that their number must be
divided; stages of as many layers each, and for the last one what is left over as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lyra_emergence.fleet.machines import RESERVED_BYTES
from lyra_emergence.fleet.shards import obstacle, shard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.fleet.layouts import Layout
    from lyra_emergence.fleet.machines import MachineKind
    from lyra_emergence.fleet.shards import FleetModel, Shards

__all__ = ["Ranks", "ranks_for"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Processes that torchrun starts, one for each GPU.

    Attributes:
        tensor: How many share each layer.
        stages: How many hold layers in turn.
        machines: Machines that they run on.
    """

    tensor: int
    stages: int
    machines: int

    @property
    def each(self) -> int:
        """Processes on each machine."""
        return self.tensor * self.stages // self.machines


def ranks_for(model: FleetModel, layout: Layout, machines: Sequence[MachineKind]) -> Ranks | str:
    """Return how transformers can divide a model over some of `machines`: as `layout` says, else otherwise.

    Of other ways, the one on the fewest machines is taken; on these tensor parallelism before a pipeline, and then the
    one with the fewest processes.

    Returns:
        The processes, or why there is no way.
    """
    if layout.gpus == 1:
        return "nothing is divided"
    if model.footprint.quantization is not None:
        return "it divides no packed weights"
    wanted = Ranks(layout.tensor, len(layout.stages), layout.machines)
    limits = [stage.limit for stage in layout.stages]
    if _divides(model, wanted) and _holds(shard(model, wanted.tensor), limits):
        return wanted
    found = [ranks for kind in machines for ranks in _ways(model, kind)]
    best = min(found, key=lambda ranks: (ranks.machines, -ranks.tensor, ranks.stages), default=None)
    return best or "on these machines, neither tensor parallelism alone nor a pipeline alone holds the model"


def _divides(model: FleetModel, ranks: Ranks) -> bool:
    if ranks.tensor == 1:
        return True
    shape = model.shape
    keys_divided = shape.latent is not None or shape.key_heads % ranks.tensor == 0
    return ranks.stages == 1 and keys_divided and not obstacle(model, ranks.tensor)


def _ways(model: FleetModel, kind: MachineKind) -> Iterator[Ranks]:
    """Yield, for one kind of machine, tensor parallelism in one of them, and the shortest pipeline over them."""
    powers = (1 << power for power in range(1, kind.gpus.bit_length()))
    for size in powers:
        ranks = Ranks(size, 1, 1)
        if _divides(model, ranks) and _holds(shard(model, size), [kind.limit]):
            yield ranks
            break
    whole = shard(model, 1)
    for machines in range(1, kind.count + 1):
        counts = [machines * each for each in range(1, kind.gpus + 1) if 1 < machines * each <= len(whole.layers)]
        held = next((count for count in counts if _holds(whole, [kind.limit] * count)), None)
        if held is not None:
            yield Ranks(1, held, machines)
            break
        if machines >= len(whole.layers):
            break


def _holds(shards: Shards, limits: Sequence[int]) -> bool:
    """Return whether GPUs with `limits` hold the stages as transformers divides them."""
    count, stages = len(shards.layers), len(limits)
    ends = [*range(0, count // stages * stages, count // stages), count] if stages <= count else []
    for at, (start, end) in enumerate(pairwise(ends)):
        mine = {"first": at == 0, "last": at == stages - 1}
        held = sum(layer.weights + layer.kv_cache for layer in shards.layers[start:end]) + RESERVED_BYTES
        if held + shards.beside(**mine) + shards.temporaries(**mine) > limits[at]:
            return False
    return bool(ends)

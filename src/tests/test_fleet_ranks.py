"""Dividing a model as transformers can, against every number of stages."""

from __future__ import annotations

import pytest

from lyra_emergence.fleet import FleetModel, Hardware, MachineKind, fewest_machines
from lyra_emergence.fleet.machines import RESERVED_BYTES
from lyra_emergence.fleet.ranks import Ranks, ranks_for
from lyra_emergence.fleet.shards import shard
from lyra_emergence.footprint import estimate_footprint

from . import paper_checkpoints as paper

GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FleetModel:
    """13 layers of about 1 GB, which divide evenly into no number of stages."""
    index = paper.llama(
        tmp_path_factory.mktemp("paper") / "odd", layers=13, hidden=8192, inner=12288, heads=64, key_heads=8, vocab=4096
    )
    return FleetModel(index, estimate_footprint(index))


def fullest(model: FleetModel, stages: int) -> int:
    """Bytes of the fullest GPU of a pipeline in which each stage but the last has as many layers."""
    shards = shard(model, 1)
    each = 13 // stages
    counts = [each] * (stages - 1) + [13 - each * (stages - 1)]
    layer = shards.layers[0].weights + shards.layers[0].kv_cache
    return max(
        RESERVED_BYTES
        + count * layer
        + shards.beside(first=at == 0, last=at == stages - 1)
        + shards.temporaries(first=at == 0, last=at == stages - 1)
        for at, count in enumerate(counts)
    )


@pytest.mark.parametrize("size", [3, 4, 6, 8, 10])
def test_a_pipeline_is_as_short_as_it_can_be(model: FleetModel, size: int) -> None:
    like = MachineKind(1, 1, size * GB)
    layout = fewest_machines(model, like, Hardware())
    assert layout is not None
    found = ranks_for(model, layout, (MachineKind(20, 1, size * GB),))
    able = [stages for stages in range(2, 14) if fullest(model, stages) <= like.limit]
    assert found == Ranks(1, able[0], able[0])


def test_tensor_parallelism_comes_before_a_pipeline_on_as_many_machines(model: FleetModel) -> None:
    kind = MachineKind(2, 4, 6 * GB)
    layout = fewest_machines(model, kind, Hardware())
    assert layout is not None
    assert (layout.tensor, len(layout.stages), layout.machines) == (4, 1, 1)
    assert ranks_for(model, layout, (kind,)) == Ranks(4, 1, 1)

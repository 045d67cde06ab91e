"""Loading a model that is divided between the processes of one torchrun.

Rank 0 leaves word of what to load; every rank plans its share on its own machine and opens the checkpoint, and
transformers copies the share to the rank's device as it reads. There is no ladder: where a share does not fit, nothing
runs.
"""

from __future__ import annotations

import hashlib
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.checkpoint.unchanged import check_files
from lyra_emergence.config import ModelConfig
from lyra_emergence.distributed.launch import find_launch
from lyra_emergence.distributed.layout import Layout, settle
from lyra_emergence.distributed.leader import leading
from lyra_emergence.distributed.rank_plan import own_plan, plan_here
from lyra_emergence.distributed.rank_report import RankReport
from lyra_emergence.errors import CheckpointError, ConfigError, LyraError
from lyra_emergence.hub import find_local
from lyra_emergence.load_report import Attempt, LoadEvent, LoadReport
from lyra_emergence.plan import hf_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.distributed.board import Board
    from lyra_emergence.distributed.channel import Channel
    from lyra_emergence.distributed.launch import Launch
    from lyra_emergence.distributed.passes import Runner
    from lyra_emergence.distributed.still_residency import StillResidency
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan

__all__ = ["follow_request", "load_divided"]

_LONGEST_PASS: Final = timedelta(minutes=10)
"""How long a rank waits for the others within a pass. One that ends is noticed at once; this is for a network that
stops."""


def load_divided(
    config: ModelConfig, directory: Path, plan: Plan | None, tell: Callable[[LoadEvent], None]
) -> LoadedModel:
    """Load rank 0's share, while the other ranks load theirs; the arguments are those of `loading.load`.

    Raises:
        ConfigError: torchrun did not start the processes that the configuration wants, or the model cannot be divided.
        CheckpointError: The checkpoint is malformed, or has no tokenizer.
        DoesNotFitError: This rank's share does not fit. Another rank's failure ends the process (`Leader`).
    """
    from lyra_emergence.distributed.passes import RankedModel
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.opening import load_architecture, load_tokenizer

    started = time.perf_counter()
    leader = leading()
    layout = settle(config, leader.launch if leader is not None else find_launch(os.environ))
    if leader is None:  # there is a torchrun, or it would have been refused above
        raise ConfigError("in 'distributed': only the program divides a model", hint="let torchrun run lyra.py")
    index = read_checkpoint(directory)
    plan = plan or own_plan(config, index, leader.launch)
    asked = config.model_copy(update={"context_length": plan.context_length})
    tokenizer = load_tokenizer(directory, config, load_architecture(directory, config))
    # Not resolved: a link may lead elsewhere on every machine.
    request = {"directory": str(directory.absolute()), "identity": _identity(index)}
    leader.board.ask(request | {"config": asked.model_dump()})
    share = _Share(asked, index, plan, leader.launch, layout)
    channel = share.join(leader.board)
    runner = share.load()
    model = RankedModel(runner, channel, share.reporter(runner), leader.lose)
    ranks = tuple(model.measure())
    for one in ranks:
        tell(LoadEvent("rank", str(one)))
    residency = share.residency(model)
    seconds = time.perf_counter() - started
    attempt = Attempt(plan.rung.name, "loaded", bytes_copied=ranks[0].weights, seconds=seconds)
    device_map = {p.block: hf_device(p.device) for p in plan.placements}
    report = LoadReport((attempt,), device_map, seconds, 0.0, index.nbytes, plan.notes, ranks=ranks)
    tell(LoadEvent("ready", f"ready on {layout.world_size} ranks in {seconds:.1f} s"))
    return LoadedModel(model, tokenizer, config, plan, report, residency.still, residency, tell)


def follow_request(launch: Launch, board: Board) -> None:
    """Load this rank's share of what rank 0 asks for, and run what it tells, until the connection ends.

    Raises:
        LyraError: The share cannot be loaded.
        RuntimeError: A rank is gone, rank 0 as a rule.
    """
    from lyra_emergence.distributed.passes import Follower

    request = board.wait_for_request()
    config = ModelConfig(**request["config"])
    index = read_checkpoint(_folder(request["directory"], config.model_id, launch))
    if _identity(index) != request["identity"]:
        raise CheckpointError(
            f"{index.directory} is another checkpoint than rank 0's", hint="copy the same files to every machine"
        )
    share = _Share(config, index, plan_here(config, index, launch), launch, settle(config, launch))
    channel = share.join(board)
    runner = share.load()
    Follower(runner, channel, share.reporter(runner)).follow()


def _folder(path: str, model_id: str, launch: Launch) -> Path:
    """Return where this machine has what rank 0 loads: at the same path, or what its cache has under the same id."""
    if Path(path).is_dir():
        return Path(path)
    try:
        found = find_local(model_id)
    except LyraError:
        found = None
    if found is None:
        raise CheckpointError(
            f"rank {launch.rank}: {path} is not on this machine",
            hint="copy the model to the same path on every machine",
        )
    return found


def _identity(index: CheckpointIndex) -> str:
    """Return what tells two checkpoints apart, whatever their weights are: names, shapes, dtypes and config.json."""
    tensors = sorted((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in index.tensors.items())
    told = repr((tensors, sorted(index.config.items(), key=lambda item: item[0])))
    return hashlib.sha256(told.encode()).hexdigest()


class _Share:
    """One rank's share of a model, on its way to its device."""

    def __init__(self, config: ModelConfig, index: CheckpointIndex, plan: Plan, launch: Launch, layout: Layout) -> None:
        self._config = config
        self._index = index
        self._plan = plan
        self._launch = launch
        self._layout = layout
        self._device = plan.placements[0].device

    def join(self, board: Board) -> Channel:
        """Meet the other ranks, and return where rank 0 tells what to do."""
        import torch
        import torch.distributed as dist

        from lyra_emergence.distributed.board import FOREVER
        from lyra_emergence.distributed.channel import Channel

        kind = self._device.partition(":")[0]
        backend: dict[str, Any] = {"backend": "gloo"}
        if kind != "cpu":
            torch.accelerator.set_device_index(self._launch.local_rank)
            backend = {"backend": dist.get_default_backend_for_device(kind), "device_id": torch.device(self._device)}
        dist.init_process_group(
            store=board.another(),
            rank=self._launch.rank,
            world_size=self._launch.world_size,
            timeout=_LONGEST_PASS,
            **backend,
        )
        return Channel(dist.new_group(backend="gloo", timeout=FOREVER))

    def load(self) -> Runner:
        """Return what runs this rank's share.

        Raises:
            CheckpointError: The checkpoint is not what its header said.
        """
        from transformers.distributed import DistributedConfig

        from lyra_emergence.distributed.passes import Runner
        from lyra_emergence.loading import blocks_dtype
        from lyra_emergence.opening import load_architecture, open_model
        from lyra_emergence.runtime.stepping import feeding_of

        index, config, layout = self._index, self._config, self._layout
        sizes = DistributedConfig(tp_size=layout.tp_size, pp_size=layout.pp_size)
        architecture = load_architecture(index.directory, config)
        dtype = blocks_dtype(self._plan)
        model = open_model(index, config, architecture, dtype=dtype, distributed_config=sizes)
        check_files(index)
        stage = layout.layers(layout.seat(self._launch.rank).stage, len(index.layers)) if layout.pp_size > 1 else None
        return Runner(model, self._device, stage, takes_keep=bool(feeding_of(model, 1).arguments))

    def reporter(self, runner: Runner) -> Callable[[int], RankReport]:
        """Return what measures this rank, called with the bytes of keys and values that it holds."""
        return lambda held: RankReport.of(self._launch.rank, runner.model, self._plan, self._device, held)

    def residency(self, model: Any) -> StillResidency:
        """Return where everything is, for what runs `model`."""
        from lyra_emergence.distributed.still_residency import StillResidency
        from lyra_emergence.loading import blocks_dtype
        from lyra_emergence.runtime.blocks import LoadedForm

        dtype = blocks_dtype(self._plan)
        return StillResidency(model, self._plan, LoadedForm(dtype, dtype, None))

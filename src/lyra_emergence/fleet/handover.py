"""The commands that run a layout: vLLM's, torchrun's, and the chat that asks the server. Nothing is run here.

vLLM runs in an environment of its own. Its options are those of `vllm serve` as of vllm/engine/arg_utils.py and
docs/serving/parallelism_scaling.md (096bd6a): several machines without Ray take the same command with `--nnodes`,
`--node-rank` and `--master-addr`, and `--headless` on all but the first. It packs weights as it loads to 4 bits only
(bitsandbytes). Its own division of layers is replaced by the plan's (`VLLM_PP_LAYER_PARTITION`) where stages differ.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.fleet.machines import UTILIZATION
from lyra_emergence.fleet.ranks import Ranks, ranks_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.fleet.layouts import Layout
    from lyra_emergence.fleet.machines import MachineKind
    from lyra_emergence.fleet.shards import FleetModel

__all__ = ["Handover", "hand_over", "model_word"]

PORT, MASTER_PORT = 8000, 29500
"""vLLM's default for its server, and torchrun's for its machines to meet at."""
CONFIG_FILE = "lyra-machines.json"
_LISTED = 4
"""Machines whose commands are shown one by one."""
_HOST = '"$HOST"'
_EXPORT = "    export HOST=first-machine   # the first machine's name or address"


@dataclass(frozen=True, slots=True)
class Handover:
    """Commands for a shell, each on one line.

    Attributes:
        vllm: One for each machine, in order; the first machine's serves the chat.
        endpoint: The chat, once the server answers.
        config: Writes the configuration for torchrun; "" where transformers cannot run the layout.
        torchrun: One for each machine, in order.
        notes: What to know before, a sentence each.
    """

    vllm: tuple[str, ...]
    endpoint: str
    config: str
    torchrun: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the commands, indented by four spaces, each group under a line that says where it runs."""
        yield f"with vLLM, {_where(self.vllm)}, in an environment of its own:"
        if len(self.vllm) > 1:
            yield _EXPORT
        yield from _listed(self.vllm)
        yield "then the chat:"
        yield f"    {self.endpoint}"
        if self.torchrun:
            yield f"or with transformers, {_where(self.torchrun)}:"
            if len(self.torchrun) > 1 and len(self.vllm) == 1:
                yield _EXPORT
            yield f"    {self.config}"
            yield from _listed(self.torchrun)
        yield from self.notes

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def hand_over(
    model: FleetModel, layout: Layout, machines: Sequence[MachineKind], *, trust_remote_code: bool = False
) -> Handover:
    """Return the commands for one replica of `layout`.

    Args:
        model: The model.
        layout: How it is laid out.
        machines: The machines that there are: transformers may need more of them than vLLM.
        trust_remote_code: Whether the configuration lets code of the checkpoint run.
    """
    host = "$HOST" if layout.machines > 1 else "127.0.0.1"
    served = [_vllm(model, layout, rank, trust_remote_code=trust_remote_code) for rank in range(layout.machines)]
    ranks = ranks_for(model, layout, machines)
    started, config = [], ""
    if isinstance(ranks, Ranks):
        started = [_torchrun(ranks, number) for number in range(ranks.machines)]
        config = _write_config(model, ranks, trust_remote_code=trust_remote_code)
    return Handover(
        vllm=tuple(served),
        endpoint=f"lyra.py --endpoint http://{host}:{PORT}/v1",
        config=config,
        torchrun=tuple(started),
        notes=tuple(_notes(model, layout, "" if isinstance(ranks, Ranks) else ranks)),
    )


def _where(commands: Sequence[str]) -> str:
    return f"on each of {len(commands)} machines" if len(commands) > 1 else "on one machine"


def _listed(commands: Sequence[str]) -> Iterator[str]:
    if len(commands) <= _LISTED:
        yield from (f"    {command}" for command in commands)
        return
    yield from (f"    {command}" for command in commands[:2])
    yield f"  and so on up to --node-rank {len(commands) - 1}"


def model_word(index: CheckpointIndex) -> str:
    """Return what names a checkpoint on any machine, quoted for a shell: its hub id, else its folder's full path."""
    return shlex.quote(_name(index))


def _name(index: CheckpointIndex) -> str:
    return index.name if _is_on_the_hub(index) else str(index.directory.resolve())


def _is_on_the_hub(index: CheckpointIndex) -> bool:
    return bool(index.label) or (index.directory.parent.name == "snapshots" and "/" in index.name)


def _vllm(model: FleetModel, layout: Layout, rank: int, *, trust_remote_code: bool) -> str:
    footprint = model.footprint
    counts = [stage.layers for stage in layout.stages]
    words = ["VLLM_PP_LAYER_PARTITION=" + ",".join(map(str, counts))] if len(set(counts)) > 1 else []
    words += ["vllm", "serve", model_word(model.index)]
    words += ["--tensor-parallel-size", str(layout.tensor), "--pipeline-parallel-size", str(len(layout.stages))]
    words += ["--max-model-len", str(footprint.context_length), "--dtype", footprint.dtype]
    words += ["--gpu-memory-utilization", str(UTILIZATION), "--max-num-batched-tokens", str(footprint.chunk)]
    if footprint.quantization is not None:
        words += ["--quantization", "bitsandbytes"]
    if trust_remote_code:
        words.append("--trust-remote-code")
    if layout.machines == 1:
        return " ".join([*words, "--host", "127.0.0.1"])
    words += ["--nnodes", str(layout.machines), "--node-rank", str(rank), "--master-addr", _HOST]
    return " ".join([*words, *["--headless"] * (rank > 0)])


def _torchrun(ranks: Ranks, number: int) -> str:
    words = ["torchrun", "--nnodes", str(ranks.machines), "--nproc-per-node", str(ranks.each)]
    if ranks.machines > 1:
        words += ["--node-rank", str(number), "--master-addr", _HOST, "--master-port", str(MASTER_PORT)]
    return " ".join([*words, "lyra.py", "--model-config", CONFIG_FILE])


def _write_config(model: FleetModel, ranks: Ranks, *, trust_remote_code: bool) -> str:
    data: dict[str, Any] = {
        "model_id": _name(model.index),
        "dtype": model.footprint.dtype,
        "context_length": model.footprint.context_length,
        "distributed": {"tp_size": ranks.tensor, "pp_size": ranks.stages},
    }
    if trust_remote_code:
        data["trust_remote_code"] = True
    return f"echo {shlex.quote(json.dumps(data, ensure_ascii=False))} > {CONFIG_FILE}"


def _notes(model: FleetModel, layout: Layout, against: str) -> Iterator[str]:
    if against and layout.gpus > 1:
        yield f"there is no command for transformers (torchrun): {against}"
    if model.footprint.quantization is not None and layout.gpus > 1:
        yield "that vLLM packs to 4 bits on several GPUs was not checked for this model"
    if layout.machines > 1:
        yield "vLLM then listens on every address and asks for no key unless --api-key is given"
        if not _is_on_the_hub(model.index):
            yield "the model's folder has to be at that path on every machine"

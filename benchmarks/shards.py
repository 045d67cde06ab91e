"""What `plan --machines` says a GPU holds and sends, beside what transformers' own sharding does, on the CPU.

    uv run python -m benchmarks.shards

A Llama of random weights is loaded by torchrun with transformers' DistributedConfig, each rank a process on this
machine that talks over loopback (gloo). Compared are: the bytes of parameters that each rank holds; the sums that a
token goes through; and what loopback carries for a prompt of 1,024 tokens, the second time it runs. Loopback is the
whole machine's, so nothing else should use it meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))
"""GPUs to a group, and stages. Where both are above 1, transformers 5.23 fails (a KeyError as it divides tensors)."""
TOKENS = 1024


def main() -> None:
    """Compare each layout, a line each."""
    with tempfile.TemporaryDirectory() as folder:
        _build(Path(folder))
        print(f"{'tensor':>6} {'stages':>6} {'rank':>4} {'predicted':>12} {'held':>12}   sums   loopback for a prompt")
        for tensor, stages in LAYOUTS:
            predicted = _predict(Path(folder), tensor, stages)
            measured = _launch(folder, tensor, stages)
            for rank, held in enumerate(measured["held"]):
                sums = f"{predicted['sums']:>3} {measured['sums']:>3}" if rank == 0 else ""
                carried = f"{predicted['carried'] / 1e6:.1f} MB {measured['carried'] / 1e6:.1f} MB" if rank == 0 else ""
                expected = predicted["held"][rank // tensor]
                print(f"{tensor:>6} {stages:>6} {rank:>4} {expected:>12,} {held:>12,} {sums:>8}   {carried}".rstrip())


def _build(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)


def _predict(folder: Path, tensor: int, stages: int) -> dict[str, Any]:
    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.fleet.pace import traffic_of
    from lyra_emergence.fleet.shards import FleetModel, shard
    from lyra_emergence.footprint import estimate_footprint

    index = read_checkpoint(folder)
    model = FleetModel(index, estimate_footprint(index))
    shards = shard(model, tensor)
    each = len(shards.layers) // stages
    held = [
        sum(layer.weights for layer in shards.layers[at * each : (at + 1) * each])
        + shards.beside(first=at == 0, last=at == stages - 1)
        for at in range(stages)
    ]
    traffic = traffic_of(model, tensor, [each] * stages, [0] * stages)
    hidden = SIZES["hidden_size"] * 2 * TOKENS
    ring = tensor * 2 * (tensor - 1) / tensor
    carried = traffic.reductions * hidden * ring + (stages - 1) * tensor * hidden
    return {"held": held, "sums": traffic.reductions, "carried": carried}


def _launch(folder: str, tensor: int, stages: int) -> dict[str, Any]:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(tensor * stages), "--standalone"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*program, __file__, folder, str(tensor), str(stages)]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def rank(folder: str, tensor: int, stages: int) -> None:
    """Load a share of the model and run it; the first rank prints what all of them hold."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    divided = DistributedConfig(tp_size=tensor, pp_size=stages) if tensor * stages > 1 else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", distributed_config=divided)
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    held: list[Any] = [None] * dist.get_world_size()
    mine = sum(part.numel() * part.element_size() for part in parts)
    dist.all_gather_object(held, mine)
    prompt = torch.zeros(1, TOKENS, dtype=torch.long)
    counts = []
    with torch.no_grad():
        with CommDebugMode() as seen:
            model(input_ids=prompt[:, :1], use_cache=False)
        found = sum(
            number for name, number in seen.get_comm_counts().items() if "all" in str(name) and "reduce" in str(name)
        )
        dist.all_gather_object(counts := [None] * dist.get_world_size(), found)
        model(input_ids=prompt, use_cache=False, logits_to_keep=1)
        carried = _carried(lambda: model(input_ids=prompt, use_cache=False, logits_to_keep=1))
    if dist.get_rank() == 0:
        # The ranks of a group take part in the same sums; one of each stage counts.
        print(json.dumps({"held": held, "sums": sum(counts[::tensor]), "carried": carried}))
    dist.barrier()
    dist.destroy_process_group()


def _carried(run: Any) -> int:
    """Return the bytes that loopback carries while `run` runs in every rank."""
    import torch.distributed as dist

    dist.barrier()
    before = _loopback()
    run()
    dist.barrier()
    time.sleep(0.2)
    return _loopback() - before


def _loopback() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()

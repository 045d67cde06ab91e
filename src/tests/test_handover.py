"""The commands that hand a model over: read by vLLM's documented options, by torchrun's parser, and by a real shell.

vLLM is not installed here. Its options are written down below; that they are still its own was read, not run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.fleet import FleetModel, Hardware, plan_fleet, read_machines
from lyra_emergence.fleet.handover import Handover, hand_over
from lyra_emergence.footprint import estimate_footprint
from lyra_emergence.machine import Device, Machine
from lyra_emergence.plan import make_plan

from . import paper_checkpoints as paper

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex

GB = 10**9
SIZES = {"layers": 80, "hidden": 8192, "inner": 28672, "heads": 64, "key_heads": 8, "vocab": 128_256}


def vllm_parser() -> argparse.ArgumentParser:
    """Options of `vllm serve` that a handover may use, from vLLM's documentation of 2026.

    From vllm/engine/arg_utils.py (the groups ModelConfig, ParallelConfig, CacheConfig, SchedulerConfig), the fields'
    types from vllm/config/parallel.py (00193b8) and vllm/config/cache.py (002f10e), --host and --headless as in
    docs/serving/parallelism_scaling.md (096bd6a) and the page on the OpenAI-compatible server.
    """
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"])
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--quantization")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--host")
    return parser


def read_vllm(command: str) -> tuple[dict[str, str], argparse.Namespace]:
    """The variables in front of a `vllm serve` command, and its options."""
    words = shlex.split(command)
    start = words.index("vllm")
    assert words[start + 1] == "serve"
    return dict(word.split("=") for word in words[:start]), vllm_parser().parse_args(words[start + 2 :])


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return paper.llama(tmp_path_factory.mktemp("a folder") / "it's 70b", context=131_072, **SIZES)


def handed(index: CheckpointIndex, *machines: str, trust: bool = False, **wanted: Any) -> Handover:
    model = FleetModel(index, estimate_footprint(index, **wanted))
    made = plan_fleet(model, read_machines(machines), Hardware())
    return hand_over(model, made.chosen, made.machines, trust_remote_code=trust)


def test_one_machine(llama_70b: CheckpointIndex) -> None:
    made = handed(llama_70b, "2x8x80GB")
    (command,) = made.vllm
    variables, options = read_vllm(command)
    assert variables == {}
    assert vars(options) == {
        "model": str(llama_70b.directory),
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 1,
        "max_model_len": 8192,
        "max_num_batched_tokens": 1024,
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.92,
        "quantization": None,
        "trust_remote_code": False,
        "nnodes": 1,
        "node_rank": 0,
        "master_addr": "127.0.0.1",
        "headless": False,
        "host": "127.0.0.1",
    }
    assert made.endpoint == "lyra.py --endpoint http://127.0.0.1:8000/v1"
    assert made.notes == ()


def test_several_machines_take_the_same_command_with_ranks(llama_70b: CheckpointIndex) -> None:
    made = handed(llama_70b, "4x4x24GB")
    read = [read_vllm(command)[1] for command in made.vllm]
    assert [(x.nnodes, x.node_rank, x.headless, x.host) for x in read] == [(2, 0, False, None), (2, 1, True, None)]
    assert {(x.tensor_parallel_size, x.pipeline_parallel_size, x.master_addr) for x in read} == {(4, 2, "$HOST")}
    assert all('--master-addr "$HOST"' in command for command in made.vllm), "for the shell to fill in"
    assert made.endpoint == "lyra.py --endpoint http://$HOST:8000/v1"
    assert made.notes == (
        "vLLM then listens on every address and asks for no key unless --api-key is given",
        "the model's folder has to be at that path on every machine",
    )


def test_stages_of_several_sizes_are_told_to_vllm(llama_70b: CheckpointIndex) -> None:
    made = handed(llama_70b, "8x24GB")
    assert len(made.vllm) == 7
    for rank, command in enumerate(made.vllm):
        variables, options = read_vllm(command)
        assert variables == {"VLLM_PP_LAYER_PARTITION": "10,12,12,12,12,12,10"}
        assert (options.pipeline_parallel_size, options.nnodes, options.node_rank) == (7, 7, rank)


def test_many_machines_are_not_listed_one_by_one(llama_70b: CheckpointIndex) -> None:
    lines = list(handed(llama_70b, "8x24GB").lines())
    assert lines[0] == "with vLLM, on each of 7 machines, in an environment of its own:"
    assert lines[1] == "    export HOST=first-machine   # the first machine's name or address"
    assert sum("vllm serve" in line for line in lines) == 2
    assert sum("torchrun" in line for line in lines) == 2
    assert sum("export HOST" in line for line in lines) == 1
    assert "or with transformers, on each of 8 machines:" in lines
    assert lines[4:7] == [
        "  and so on up to --node-rank 6",
        "then the chat:",
        "    lyra.py --endpoint http://$HOST:8000/v1",
    ]


def test_packed_weights_and_code_of_the_checkpoint(llama_70b: CheckpointIndex) -> None:
    made = handed(llama_70b, "1x4x24GB", quantization="4bit", trust=True)
    options = read_vllm(made.vllm[0])[1]
    assert (options.quantization, options.trust_remote_code) == ("bitsandbytes", True)
    assert made.torchrun == ()
    assert made.notes == (
        "there is no command for transformers (torchrun): it divides no packed weights",
        "that vLLM packs to 4 bits on several GPUs was not checked for this model",
    )


def test_a_hub_id_is_named_as_such(tmp_path: Path) -> None:
    index = paper.llama(tmp_path / "models--some--model" / "snapshots" / "1234")
    assert read_vllm(handed(index, "1x24GB").vllm[0])[1].model == "some/model"
    other = paper.llama(tmp_path / "snapshots" / "model")
    assert read_vllm(handed(other, "1x24GB").vllm[0])[1].model == str(other.directory)


def test_torchrun_reads_its_commands_and_a_shell_the_configuration(llama_70b: CheckpointIndex, tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    made = handed(llama_70b, "2x100GB", trust=True)
    subprocess.run(made.config, shell=True, cwd=tmp_path, check=True)
    written = json.loads((tmp_path / "lyra-machines.json").read_text())
    assert written == {
        "model_id": str(llama_70b.directory),
        "dtype": "bfloat16",
        "context_length": 8192,
        "distributed": {"tp_size": 1, "pp_size": 2},
        "trust_remote_code": True,
    }
    del written["distributed"]
    ModelConfig(**written)
    for rank, command in enumerate(made.torchrun):
        program, *words = shlex.split(command)
        options = get_args_parser().parse_args(words)
        assert program == "torchrun"
        assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("2", "1", rank)
        assert (options.master_addr, options.master_port) == ("$HOST", 29500)
        assert options.training_script == "lyra.py"
        assert options.training_script_args == ["--model-config", "lyra-machines.json"]
    assert len(made.torchrun) == 2
    (alone,) = handed(llama_70b, "1x8x80GB").torchrun
    assert get_args_parser().parse_args(shlex.split(alone)[1:]).nproc_per_node == "8"


@pytest.mark.parametrize(
    ("machines", "sizes", "ranks", "started"),
    [
        # As vLLM runs it.
        ("1x8x80GB", (8, 1), (8, 1), 1),
        ("2x100GB", (1, 2), (1, 2), 2),
        # 80 layers in 7 stages would be 11 each and 14 for the last; in 8 stages they are 10 each.
        ("8x24GB", (1, 7), (1, 8), 8),
        ("7x24GB", (1, 7), None, 0),
        # Both kinds at once are not for transformers: 8 stages on the same two machines are.
        ("2x4x24GB", (4, 2), (1, 8), 2),
    ],
)
def test_transformers_divides_in_another_way_where_it_must(  # noqa: PLR0917
    llama_70b: CheckpointIndex,
    machines: str,
    sizes: tuple[int, int],
    ranks: tuple[int, int] | None,
    started: int,
    tmp_path: Path,
) -> None:
    made = handed(llama_70b, machines)
    options = read_vllm(made.vllm[0])[1]
    assert (options.tensor_parallel_size, options.pipeline_parallel_size) == sizes
    assert len(made.torchrun) == started
    if ranks is None:
        assert made.config == ""
        assert made.notes[0] == (
            "there is no command for transformers (torchrun): on these machines, neither tensor parallelism alone nor "
            "a pipeline alone holds the model"
        )
        return
    subprocess.run(made.config, shell=True, cwd=tmp_path, check=True)
    written = json.loads((tmp_path / "lyra-machines.json").read_text())["distributed"]
    assert (written["tp_size"], written["pp_size"]) == ranks
    assert f"--nnodes {started} --nproc-per-node {ranks[0] * ranks[1] // started} " in made.torchrun[-1]


def test_heads_that_would_have_to_be_copied_are_no_case_for_transformers(tmp_path: Path) -> None:
    index = paper.llama(tmp_path / "one-key-head", **{**SIZES, "key_heads": 1})
    made = handed(index, "1x8x24GB")
    assert read_vllm(made.vllm[0])[1].tensor_parallel_size == 8
    assert '"distributed": {"tp_size": 1, "pp_size": 8}' in made.config


def test_a_model_for_one_gpu_has_no_ranks(tmp_path: Path) -> None:
    made = handed(paper.llama(tmp_path / "tiny"), "4x24GB")
    assert (made.torchrun, made.config, made.notes) == ((), "", ())


# --- A model that does not fit -------------------------------------------------------------------


def machine(*gpus: int, cpu: int) -> Machine:
    found = tuple(Device(f"cuda:{at}", "cuda", at, size, size, 0, "GPU") for at, size in enumerate(gpus))
    return Machine(found, Device("cpu", "cpu", None, cpu, cpu, 0, "CPU"))


def refusal(index: CheckpointIndex, on: Machine, **settings: Any) -> DoesNotFitError:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(ModelConfig(context_length=131_072, **settings), index, on)
    return caught.value


@pytest.mark.parametrize(
    ("gpus", "said", "sizes"),
    [
        ((), "12 machines with one GPU of 24.0 GB each would hold it", (1, 12)),
        ((16 * GB,) * 4, "4 machines with 4 GPUs of 16.0 GB each would hold it", (4, 4)),
        ((24 * GB, 16 * GB), "9 machines with 2 GPUs of 16.0 GB each would hold it", (2, 9)),
    ],
)
def test_the_error_names_the_machines_and_the_commands(
    llama_70b: CheckpointIndex, gpus: tuple[int, ...], said: str, sizes: tuple[int, int]
) -> None:
    lines = refusal(llama_70b, machine(*gpus, cpu=GB)).hint.splitlines()
    assert lines[0].startswith("try a shorter context")
    assert lines[1] == said
    served = [line for line in lines if "vllm serve" in line]
    assert {read_vllm(line)[1].max_model_len for line in served} == {131_072}
    options = read_vllm(served[0])[1]
    assert (options.tensor_parallel_size, options.pipeline_parallel_size) == sizes
    assert "    lyra.py --endpoint http://$HOST:8000/v1" in lines


def test_the_sizes_hold_the_bytes_of_the_footprint(llama_70b: CheckpointIndex) -> None:
    """4 machines of 4 GPUs with 16 GB: 14.72 GB each, of which CUDA takes 0.67 GB; 3 machines would be too few."""
    layer = 2 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192) // 4 + 2 * 2 * 8192
    cache = 2 * 2 * 1024 * 131_072 // 4
    table = 2 * 128_256 * 8192 // 4
    activations = 1024 * 2 * 8192 * 3  # the hidden state, the embeddings, the normed input, at the least
    assert 20 * (layer + cache) + table + activations <= 0.92 * 16 * GB - 670 * 10**6
    assert 80 * (layer + cache) + 2 * table > 3 * (0.92 * 16 * GB - 670 * 10**6) - 3 * activations


def test_eight_bits_are_handed_over_as_they_are_stored(llama_70b: CheckpointIndex) -> None:
    hint = refusal(llama_70b, machine(cpu=GB), load_in_8bit=True).hint
    assert "12 machines with one GPU of 24.0 GB each would hold it" in hint
    assert "bitsandbytes" not in hint
    assert hint.endswith("\nvLLM packs to 4 bits only: weights are counted as they are stored")
    packed = refusal(llama_70b, machine(cpu=GB), load_in_4bit=True).hint
    assert "--quantization bitsandbytes" in packed


def test_a_map_of_ones_own_is_answered_with_another_map(llama_70b: CheckpointIndex) -> None:
    error = refusal(llama_70b, machine(24 * GB, cpu=GB), device_map="cuda")
    assert '"device_map": "auto"' in error.hint
    assert "vllm" not in error.hint

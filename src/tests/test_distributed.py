"""What is settled before any process starts: who runs what, what cannot be, and the bytes of each share."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig

from lyra_emergence.bundled import bundled_directory
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.cli import main
from lyra_emergence.config import ModelConfig
from lyra_emergence.distributed import Launch, Layout, find_launch, is_divided
from lyra_emergence.distributed.board import Failure
from lyra_emergence.distributed.channel import PASS, Message
from lyra_emergence.distributed.launch import torchrun_command
from lyra_emergence.distributed.layout import Seat, settle
from lyra_emergence.distributed.leader import is_lost_connection
from lyra_emergence.distributed.passes import Follower, RankedModel, Runner
from lyra_emergence.distributed.rank_plan import RankPlan, device_of, plan_here, plan_ranks
from lyra_emergence.distributed.stage_cache import StageCache
from lyra_emergence.errors import CheckpointError, ConfigError, DoesNotFitError
from lyra_emergence.loading import load
from lyra_emergence.machine import Device, Machine
from lyra_emergence.runtime.kv_cache import cut_back
from lyra_emergence.runtime.stepping import caches_of

from .running import PROMPT, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GB = 10**9
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
TWO = Launch(0, 0, 2, 2)
WRITTEN = 'write "distributed": {"tp_size": 2} in the configuration file, or set LYRA_DISTRIBUTED=\'{"tp_size": 2}\''
HEADS = "processes cannot share the model's 4 attention heads and 2 heads of keys and values evenly"


def machine(*gpus: int, ram: int = 64 * GB) -> Machine:
    accelerators = (Device(f"cuda:{at}", "cuda", at, size, size, 0, "a GPU") for at, size in enumerate(gpus))
    return Machine(tuple(accelerators), Device("cpu", "cpu", None, ram, ram, 0, "a CPU"))


def planned(directory: Path, hardware: Machine | None = None, **settings: Any) -> tuple[RankPlan, ...]:
    return plan_ranks(ModelConfig(**settings), read_checkpoint(directory), hardware or machine())


# Processes


def test_what_torchrun_says() -> None:
    assert find_launch(TORCHRUN) == Launch(3, 1, 4, 2, "10.0.0.1:29500")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"},  # a cluster's shell
        {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"},
        TORCHRUN | {"RANK": "first"},
        TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_where_torchrun_started_no_others(environ: dict[str, str]) -> None:
    assert find_launch(environ) is None


def test_the_command_that_starts_them() -> None:
    argv = ["/somewhere/lyra.py", "--model", "a model", "Who?"]
    assert torchrun_command(2, argv) == "torchrun --standalone --nproc-per-node 2 lyra.py --model 'a model' 'Who?'"
    assert torchrun_command(4, ["/usr/bin/lyra"]) == "torchrun --standalone --nproc-per-node 4 -m lyra_emergence.cli"


def test_who_has_what() -> None:
    layout = Layout(pp_size=3)
    assert [layout.layers(stage, 10) for stage in range(3)] == [range(3), range(3, 6), range(6, 10)]
    assert [Layout(tp_size=2, pp_size=2).seat(rank) for rank in range(4)] == [
        Seat(0, 0),
        Seat(0, 1),
        Seat(1, 0),
        Seat(1, 1),
    ]


def test_when_a_model_is_divided() -> None:
    assert [
        is_divided(ModelConfig(distributed=sizes), None) for sizes in (None, {}, {"tp_size": 1}, {"pp_size": 2})
    ] == [
        False,
        False,
        False,
        True,
    ]
    assert is_divided(ModelConfig(), TWO)


@pytest.mark.parametrize(
    ("sizes", "launch", "message", "hint"),
    [
        (
            {"tp_size": 2},
            None,
            "in 'distributed': tp_size 2 wants 2 processes, and this is one",
            "run: torchrun --standalone --nproc-per-node 2 lyra.py Hello",
        ),
        (
            None,
            TWO,
            "torchrun started 2 processes, and 'distributed' does not say how they divide the model",
            WRITTEN,
        ),
        (
            {"pp_size": 3},
            TWO,
            "in 'distributed': pp_size 3 wants 3 processes, and torchrun started 2",
            f"run: torchrun --standalone --nproc-per-node 3 lyra.py Hello   or {WRITTEN}",
        ),
    ],
)
def test_processes_that_are_too_few_or_too_many(
    sizes: dict[str, int] | None, launch: Launch | None, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lyra.py", "Hello"])
    with pytest.raises(ConfigError) as caught:
        settle(ModelConfig(distributed=sizes), launch)
    assert (str(caught.value), caught.value.hint) == (message, hint)


def test_options_that_do_not_go_with_it() -> None:
    config = ModelConfig(distributed={"tp_size": 2, "pp_size": 2}, load_in_4bit=True, device_map="cpu")
    with pytest.raises(ConfigError) as caught:
        settle(config, Launch(0, 0, 4, 4))
    assert caught.value.problems == (
        "in 'distributed': transformers divides by 'tp_size' or by 'pp_size', not by both; keep one",
        "in 'load_in_4bit': a divided model is not quantized; write false",
        "in 'device_map': every process has a device of its own; write null or 'auto'",
    )


def test_one_process_does_not_load_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lyra.py"])
    with pytest.raises(ConfigError, match=r"^in 'distributed': tp_size 2 wants 2 processes, and this is one$"):
        load(ModelConfig(distributed={"tp_size": 2}), directory=bundled_directory())


# Models


@pytest.mark.parametrize(
    ("sizes", "message", "hint"),
    [
        (
            {"tp_size": 3},
            f"in 'distributed.tp_size': 3 {HEADS}",
            "tp_size can be 1 or 2; 'pp_size' divides the 10 layers instead",
        ),
        (
            {"tp_size": 4},
            f"in 'distributed.tp_size': 4 {HEADS}",
            "tp_size can be 1 or 2; 'pp_size' divides the 10 layers instead",
        ),
        (
            {"pp_size": 11},
            "in 'distributed.pp_size': 11 processes are more than the model's 10 layers",
            "write at most 10",
        ),
    ],
)
def test_heads_and_layers_that_cannot_be_divided(sizes: dict[str, int], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(bundled_directory(), distributed=sizes)
    assert (str(caught.value), caught.value.hint) == (message, hint)


def test_an_architecture_without_a_plan(checkpoints: Callable[[str], Path]) -> None:
    for key, does in (
        ("tp_size", "cannot share the layers of GPT2LMHeadModel between processes"),
        ("pp_size", "cannot give the layers of GPT2LMHeadModel to processes in turn"),
    ):
        with pytest.raises(ConfigError) as caught:
            planned(checkpoints("gpt2"), distributed={key: 2})
        assert str(caught.value).startswith(f"in 'distributed.{key}': transformers ")
        assert str(caught.value).endswith(does)
        assert caught.value.hint == "run it in one process, without 'distributed'"


def test_a_model_that_transformers_does_not_build(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    for file in checkpoints("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    with pytest.raises(CheckpointError, match="cannot be divided: transformers does not build it"):
        planned(tmp_path, distributed={"tp_size": 2})


# Bytes of the bundled model, bfloat16: a table of 6144 rows of 256, which the head is tied to; 10 layers of 2 norms,
# queries and output of 256 x 256, keys and values of 128 x 256, and an MLP of 3 matrices of 640 x 256; a last norm.
TABLE = 6144 * 256 * 2
NORM = 256 * 2
MATRICES = (2 * 256 * 256 + 2 * 128 * 256 + 3 * 640 * 256) * 2
LAYER = MATRICES + 2 * NORM
CACHE = 2 * 2 * 64 * 1024 * 2  # keys and values of 2 heads of 64, for 1024 tokens


def test_each_layer_is_shared() -> None:
    ranks = planned(bundled_directory(), distributed={"tp_size": 2})
    share = (TABLE + 10 * MATRICES) // 2 + 21 * NORM
    assert [(one.rank, one.use.weights, one.use.kv_cache) for one in ranks] == [
        (0, share, 10 * CACHE // 2),
        (1, share, 10 * CACHE // 2),
    ]
    whole = planned(bundled_directory(), distributed={"pp_size": 2})
    assert ranks[0].use.activations < whole[0].use.activations


def test_layers_go_to_ranks_in_turn() -> None:
    ranks = planned(bundled_directory(), distributed={"pp_size": 3})
    # The last one has a copy of the table, for the head.
    assert [(one.use.weights, one.use.kv_cache) for one in ranks] == [
        (TABLE + 3 * LAYER, 3 * CACHE),
        (3 * LAYER, 3 * CACHE),
        (TABLE + 4 * LAYER + NORM, 4 * CACHE),
    ]


def test_heads_that_are_gathered_leave_the_cache_whole(checkpoints: Callable[[str], Path]) -> None:
    """phi-3 has one projection for queries, keys and values: its weights are cut, and what they make is gathered."""
    whole = planned(checkpoints("phi3"), distributed={"pp_size": 2}, context_length=256)
    shared = planned(checkpoints("phi3"), distributed={"tp_size": 2}, context_length=256)
    assert shared[0].use.kv_cache == sum(one.use.kv_cache for one in whole)
    assert shared[0].use.weights < sum(one.use.weights for one in whole)


def test_each_rank_has_a_device() -> None:
    on_gpus = planned(bundled_directory(), machine(GB, GB), distributed={"pp_size": 2})
    assert [one.use.device for one in on_gpus] == ["cuda:0", "cuda:1"]
    elsewhere = planned(bundled_directory(), machine(GB), distributed={"pp_size": 2})
    assert [one.use.device for one in elsewhere] == ["cuda:0", "cuda:0"]
    limited = planned(bundled_directory(), max_memory={"cpu": "90MB"}, distributed={"tp_size": 2})
    assert [one.use.limit for one in limited] == [90_000_000, 90_000_000]
    shared = planned(bundled_directory(), machine(ram=30 * GB), distributed={"pp_size": 3})
    assert [one.use.limit for one in shared] == [10 * GB] * 3


def test_more_processes_than_gpus() -> None:
    with pytest.raises(ConfigError) as caught:
        device_of(machine(GB, GB), 2)
    assert str(caught.value) == "process 2 of this machine has no GPU: there are 2"
    assert caught.value.hint == "run at most --nproc-per-node 2 here, and the others on further machines (--nnodes)"


def test_a_share_that_does_not_fit_names_its_rank() -> None:
    config = {"distributed": {"pp_size": 2}, "context_length": 1024}
    least = planned(bundled_directory(), **config)[0].use.used
    with pytest.raises(DoesNotFitError) as caught:
        planned(bundled_directory(), machine(ram=2 * least), **config)
    assert str(caught.value).startswith("rank 1: the model does not fit: it needs 19.2 MB of cpu (weights 10.0 MB, ")
    assert caught.value.hint == "try more processes, or a shorter context (--context), or a smaller model"


def test_a_context_left_open_is_shortened_until_all_fit() -> None:
    most = planned(bundled_directory(), distributed={"pp_size": 2})[1].use.used
    ranks = planned(bundled_directory(), machine(ram=2 * most - 2), distributed={"pp_size": 2})
    assert [one.plan.context_length for one in ranks] == [512, 512]
    assert ranks[1].plan.notes == ("the context is shortened to 512 tokens: 1024 do not fit",)


def test_a_rank_plans_its_own_share() -> None:
    config = ModelConfig(distributed={"pp_size": 2}, context_length=1024)
    index = read_checkpoint(bundled_directory())
    own = plan_here(config, index, Launch(1, 1, 2, 2))
    assert own.footprint == plan_ranks(config, index, machine())[1].plan.footprint


def test_the_plan_on_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LYRA_DISTRIBUTED", '{"tp_size": 2}')
    arguments = ["plan", "lyra-emergence/bundled", "--gpu", "1GB", "--gpu", "1GB"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("lyra-emergence/bundled, rank 0 of 2 (tp_size 2)")
    assert out.splitlines()[-3:] == [
        "rank  device  weights  KV cache  activations       of",
        "0     cuda:0  8.46 MB   2.62 MB      5.27 MB  1.00 GB",
        "1     cuda:1  8.46 MB   2.62 MB      5.27 MB  1.00 GB",
    ]
    assert err.splitlines()[0] == "note: each rank is planned as if it had one of this machine's GPUs"
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["distributed"] == {"tp_size": 2}
    assert [(one["rank"], one["device"], one["weights"]) for one in data["ranks"]] == [
        (0, "cuda:0", data["devices"][0]["weights"]),
        (1, "cuda:1", data["devices"][0]["weights"]),
    ]
    assert main([*arguments, "--explain", "model.layers.1"]) == 0
    assert capsys.readouterr().out.startswith("model.layers.1 is on cuda:0: ")


def test_a_check_is_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LYRA_DISTRIBUTED", '{"tp_size": 2}')
    assert main(["plan", "lyra-emergence/bundled", "--check"]) == 2
    assert capsys.readouterr().err == (
        "error: '--check' runs the model in one process, and 'distributed' divides it\n"
        "hint: the program says what each rank holds, beside what was planned, whenever it loads\n"
    )


# Passes


class Wire:
    """A channel between two in one process: what is sent is done at once."""

    def __init__(self) -> None:
        self.follower: Follower | None = None
        self.sent: list[Message] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)
        assert self.follower is not None
        self.follower._pass(message)


@pytest.fixture
def wired(checkpoints: Callable[[str], Path]) -> tuple[RankedModel, Follower, Wire]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"), local_files_only=True).eval()
    wire = Wire()
    wire.follower = Follower(Runner(model, "cpu", None, takes_keep=True), wire, lambda _: None)  # type: ignore[arg-type]

    def fatal(error: BaseException) -> None:
        raise AssertionError(f"a pass failed: {error}") from error

    leader = RankedModel(Runner(model, "cpu", None, takes_keep=True), wire, lambda _: None, fatal)  # type: ignore[arg-type]
    return leader, wire.follower, wire


def run(model: RankedModel, tokens: list[int], caches: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    output = model(input_ids=torch.tensor([tokens]), logits_to_keep=1, **caches)
    return int(output.logits[0, -1].argmax()), caches_of(output)


def test_the_others_keep_what_rank_0_keeps(
    wired: tuple[RankedModel, Follower, Wire], checkpoints: Callable[[str], Path]
) -> None:
    model, follower, wire = wired
    token, caches = run(model, list(PROMPT), {})
    found = [token]
    for _ in range(3):
        token, caches = run(model, [token], caches)
        found.append(token)
    assert found == reference(checkpoints("llama"))[:4]
    per_token = follower.held_bytes // (len(PROMPT) + 3)
    assert follower.held_bytes == per_token * (len(PROMPT) + 3)
    # Cut back, as a conversation's cache is: the next pass goes on from there.
    assert cut_back(caches, len(PROMPT))
    assert run(model, [found[0]], caches)[0] == found[1]
    assert follower.held_bytes == per_token * (len(PROMPT) + 1)
    # A second answer has a cache of its own; once the first one is dropped, the others drop it with the next pass.
    other = run(model, list(PROMPT), {})[1]
    assert follower.held_bytes == per_token * (2 * len(PROMPT) + 1)
    del caches
    run(model, [found[0]], other)
    assert follower.held_bytes == per_token * (len(PROMPT) + 1)
    assert [message.kind for message in wire.sent] == [PASS] * 7
    assert wire.sent[-1].dropped == [wire.sent[0].cache]


def test_a_rank_that_has_lost_its_place_says_so(wired: tuple[RankedModel, Follower, Wire]) -> None:
    _, follower, _ = wired
    with pytest.raises(RuntimeError, match=r"^rank 0 goes on from 5 tokens, of which this rank has 0$"):
        follower._pass(Message(PASS, cache=9, held=5, tokens=[1]))


def test_a_stage_answers_for_layers_that_it_does_not_have() -> None:
    cache = StageCache(LlamaConfig(num_hidden_layers=4), range(2, 4))
    keys = torch.zeros(1, 2, 5, 8)  # (batch, heads, tokens, width)
    cache.update(keys, keys, 2)
    assert [cache.get_seq_length(layer) for layer in (0, 2)] == [5, 5]
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(3, 0) == cache.get_mask_sizes(3, 2) == (8, 0)


def test_a_stage_answers_by_kind_of_layer() -> None:
    from transformers import Gemma2Config

    kinds = ["sliding_attention", "full_attention"] * 2
    cache = StageCache(Gemma2Config(num_hidden_layers=4, layer_types=kinds, sliding_window=4), range(2, 4))
    keys = torch.zeros(1, 2, 6, 8)
    for layer in (2, 3):
        cache.update(keys, keys, layer)
    assert [cache.get_mask_sizes(1, layer) for layer in range(4)] == [(4, 3), (7, 0)] * 2


# Failures


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (CheckpointError("the file is cut off", hint="get it again"), "the file is cut off", 1),
        (DoesNotFitError("rank 1: too large", needed=2, available=1), "too large", 3),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory ran out: CUDA out", 3),
        (KeyError("layer"), "unexpected KeyError: 'layer'", 1),
    ],
)
def test_what_is_told_of_a_failure(error: BaseException, message: str, code: int) -> None:
    failure = Failure.of(error, Launch(1, 1, 2, 2))
    where, _, said = failure.message.partition(": ")
    assert where.startswith("rank 1 on ")
    assert said.startswith(message)
    assert failure.exit_code == code


def test_what_the_end_of_another_looks_like() -> None:
    gone = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    assert is_lost_connection(gone)
    assert is_lost_connection(torch.distributed.DistNetworkError("the store is gone"))
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

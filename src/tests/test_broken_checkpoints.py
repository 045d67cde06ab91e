"""Checkpoints that are cut off, lack a part, change while they are loaded, or bring code: one error, nothing left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import CheckpointError
from lyra_emergence.load_report import TRUST_WARNING, LoadEvent
from lyra_emergence.loading import load
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan

from .families import build_checkpoint
from .running import greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]


@pytest.fixture
def copied(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("llama"), tmp_path / "llama")


def refusal(directory: Path, **given: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(ModelConfig(), directory=directory, **given)
    return str(caught.value)


def test_weights_cut_off_anywhere(copied: Path, sim: SimulatedAccelerator) -> None:
    path = copied / "model.safetensors"
    content = path.read_bytes()
    index = read_checkpoint(copied)
    data = 8 + int.from_bytes(content[:8], "little")
    borders = sorted({tensor.begin for tensor in index.tensors.values()})
    middles = [(begin + end) // 2 for begin, end in pairwise(borders)]
    places = [0, 1, 7, 8, 9, data // 2, data - 1, data, *borders, *middles, len(content) - 1]
    for length in places:
        path.write_bytes(content[:length])
        assert str(path) in refusal(copied), length
        assert sim.settled() == (0, 0), length
    path.write_bytes(content)
    loaded = load(ModelConfig(), directory=copied)
    assert greedy(loaded) == reference(copied)
    loaded.close()


def test_a_shard_that_is_missing_cut_off_or_another_ones(tmp_path: Path, sim: SimulatedAccelerator) -> None:
    directory = build_checkpoint("llama", tmp_path / "shards", max_shard_size="100KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        assert refusal(directory) == f"{shard} is missing"
        shard.write_bytes(content[: len(content) // 2])
        assert str(shard) in refusal(directory)
        shard.write_bytes(shards[shard == shards[0]].read_bytes())
        assert "though model.safetensors.index.json lists it" in refusal(directory)
        shard.write_bytes(content)
        assert sim.settled() == (0, 0)


@pytest.mark.parametrize("how", ["cut off", "deleted", "another size", "another model"])
def test_a_file_that_changed_since_it_was_planned(
    how: str, copied: Path, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    plan = make_plan(ModelConfig(), read_checkpoint(copied), probe_machine(with_torch=True))
    path = copied / "model.safetensors"
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "deleted":
        path.unlink()
    else:
        other = {"another size": "llama-tied", "another model": "gpt2"}[how]
        shutil.copytree(checkpoints(other), copied, dirs_exist_ok=True)
    said = refusal(copied, plan=plan)
    if other_model := how.startswith("another"):
        assert said == f"{copied} holds another model than the one that was planned"
    assert str(path) in said or other_model or how == "deleted"
    assert sim.settled() == (0, 0)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 10)


@pytest.mark.parametrize("change", [cut_off, grow, Path.unlink])
@pytest.mark.parametrize("step", ["load_tokenizer", "open_model"])
def test_a_file_that_changes_while_it_is_loaded(
    step: str,
    change: Callable[[Path], None],
    copied: Path,
    sim: SimulatedAccelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the header and the map, and between the map and the first page."""
    from lyra_emergence import loading

    real = getattr(loading, step)

    def then_change(*args: Any) -> Any:
        result = real(*args)
        change(copied / "model.safetensors")
        return result

    monkeypatch.setattr(loading, step, then_change)
    said = refusal(copied)
    assert said.startswith(f"{copied / 'model.safetensors'} ")
    assert said.endswith("when its header was read") or "is gone since its header was read" in said
    assert sim.settled() == (0, 0)


def test_a_model_in_use_survives_a_new_file_under_its_name(copied: Path, checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=copied)
    shutil.copy(checkpoints("gpt2") / "model.safetensors", copied / "new")
    (copied / "new").replace(copied / "model.safetensors")
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


# --- Code that comes with a checkpoint -------------------------------------------------------------


class Payload:
    """Pickled, it makes a file where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


PICKLED = ("pytorch_model.bin", "model.bin", "model.pt", "training_args.bin", "tokenizer.pkl")


def test_pickled_files_are_never_read(copied: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    for name in PICKLED:
        (copied / name).write_bytes(pickle.dumps(Payload(trace)))
    loaded = load(ModelConfig(device_map="cpu"), directory=copied)
    assert greedy(loaded) == reference(copied)
    loaded.close()
    (copied / "model.safetensors").unlink()
    assert "pickled (" in refusal(copied)
    assert not trace.exists()
    pickle.loads((copied / PICKLED[0]).read_bytes())  # it would have
    assert trace.exists()


def test_pickled_files_are_not_read_in_place_of_weights_that_vanish(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lyra_emergence import opening

    trace = tmp_path / "it ran"
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trace)))

    def vanish(_: Any) -> None:
        (copied / "model.safetensors").unlink(missing_ok=True)

    # As if the file went right after its size was compared.
    monkeypatch.setattr(opening, "check_files", vanish)
    assert refusal(copied).startswith(f"{copied}: ")
    assert not trace.exists()


def with_code(directory: Path, trace: Path) -> Path:
    """Let the checkpoint bring a configuration class of its own, which makes a file when it is imported."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "brought", "auto_map": {"AutoConfig": "brought.Brought"}}))
    (directory / "brought.py").write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).touch()\n"
        "from transformers import PretrainedConfig\nclass Brought(PretrainedConfig):\n    model_type = 'brought'\n"
    )
    return directory


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_checkpoint_runs_only_where_that_is_configured_and_said(
    trusted: bool, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trace = tmp_path / "it ran"
    seen: list[LoadEvent] = []
    ran_when_told: list[bool] = []

    def tell(event: LoadEvent) -> None:
        seen.append(event)
        ran_when_told.append(trace.exists())

    plan = make_plan(ModelConfig(device_map="cpu"), read_checkpoint(copied), probe_machine())
    with_code(copied, trace)
    # The class that it brings is no model of transformers': loading ends in an error either way.
    with pytest.raises(CheckpointError):
        load(ModelConfig(device_map="cpu", trust_remote_code=trusted), directory=copied, plan=plan, on_event=tell)
    assert trace.exists() is trusted
    assert [(event.kind, event.message) for event in seen] == ([("note", TRUST_WARNING)] if trusted else [])
    assert not any(ran_when_told)

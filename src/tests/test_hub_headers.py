"""A model on the hub, planned from its headers: what is asked for, what is refused, what is read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.cli import main
from lyra_emergence.errors import CheckpointError, ModelUnavailableError
from lyra_emergence.hub import RemoteModel, look_up
from lyra_emergence.hub.headers import read_remote_checkpoint

from .paper_checkpoints import phi2
from .standin_hub import StandInHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ID = "owner/small"
PHI = "microsoft/phi-2"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as standin:
        standin.use(monkeypatch, tmp_path / "cache")
        yield standin


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny Llama in several shards."""
    from .families import build_checkpoint

    return build_checkpoint("llama", tmp_path / "sharded", max_shard_size="100KB")


def test_a_sharded_model_reads_as_its_folder_does(hub: StandInHub, sharded: Path) -> None:
    hub.add(ID, sharded)
    remote, local = read_remote_checkpoint(look_up(ID)), read_checkpoint(sharded)
    assert remote.name == ID
    assert remote.tensors == local.tensors
    assert remote.blocks == local.blocks
    assert remote.config == local.config


def test_gigabytes_cost_kilobytes(hub: StandInHub, tmp_path: Path) -> None:
    folder = tmp_path / "phi-2"
    local = phi2(folder)
    hub.add(PHI, folder)
    remote = read_remote_checkpoint(look_up(PHI))
    assert remote.blocks == local.blocks
    assert (folder / "model.safetensors").stat().st_size > 5 * 10**9
    assert hub.sent < 200_000


def test_a_long_header_takes_a_second_request(hub: StandInHub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra_emergence.hub.headers._FIRST_BYTES", 64)
    hub.add(ID, sharded)
    assert read_remote_checkpoint(look_up(ID)).tensors == read_checkpoint(sharded).tensors


def test_the_token_goes_to_the_hub_and_to_no_other_host(
    hub: StandInHub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add(ID, sharded)
    hub.redirects = True
    assert read_remote_checkpoint(look_up(ID)).tensors == read_checkpoint(sharded).tensors
    assert any("/resolve/" in path for path in hub.tokens)
    assert not any(path.startswith("/elsewhere") for path in hub.tokens)


def test_a_server_that_ignores_ranges_is_cut_off(hub: StandInHub, tmp_path: Path) -> None:
    from .paper_checkpoints import write_paper

    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 1, "vocab_size": 4000}
    shapes = {"model.embed_tokens.weight": (4000, 4096), "model.layers.0.w.weight": (4096, 4096)}
    local = write_paper(tmp_path / "m", shapes, config | {"tie_word_embeddings": True})
    hub.add(ID, tmp_path / "m")
    hub.ignores_ranges = True
    assert read_remote_checkpoint(look_up(ID)).tensors == local.tensors


def test_a_busy_hub_is_asked_again_and_then_believed(hub: StandInHub, sharded: Path) -> None:
    hub.add(ID, sharded)
    remote = look_up(ID)
    hub.patience = 2
    read_remote_checkpoint(remote)
    hub.patience = 1000
    with pytest.raises(ModelUnavailableError, match="the hub answers no more requests from here for now"):
        read_remote_checkpoint(remote)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gated", "owner/small is gated"),
        ("unauthorized", "the hub has no model owner/small, or none for you to see"),
        ("forbidden", "the hub forbids access to owner/small"),
        ("failing", "the hub failed when asked for owner/small"),
    ],
)
def test_refusals_are_told_apart(hub: StandInHub, sharded: Path, fault: str, said: str) -> None:
    hub.add(ID, sharded)
    remote = look_up(ID)
    hub.file_fault = fault  # type: ignore[assignment]
    with pytest.raises(ModelUnavailableError, match=said):
        read_remote_checkpoint(remote)


def without_sizes(remote: RemoteModel) -> RemoteModel:
    return replace(remote, sizes=())


def overstate(hub: StandInHub) -> None:
    hub.overstated = 100


def cut(hub: StandInHub) -> None:
    hub.cuts = 1000


@pytest.mark.parametrize(
    ("spoil", "listed", "said"),
    [
        (overstate, True, r"the hub lists \d+ bytes and the server has \d+"),
        (overstate, False, r"only \d+ of \d+ bytes came"),
        (cut, True, r"only \d+ of \d+ bytes came"),
    ],
    ids=["not as listed", "longer than it is", "broken off"],
)
def test_lengths_that_do_not_add_up_are_refused(
    hub: StandInHub, sharded: Path, spoil: Callable[[StandInHub], None], listed: bool, said: str
) -> None:
    hub.add(ID, sharded)
    remote = look_up(ID)
    spoil(hub)
    with pytest.raises(CheckpointError, match=said):
        read_remote_checkpoint(remote if listed else without_sizes(remote))


def test_offline_mode_is_kept(hub: StandInHub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, sharded)
    remote = look_up(ID)
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailableError, match="HF_HUB_OFFLINE forbids"):
        read_remote_checkpoint(remote)
    assert len(hub.requests) == asked


def test_the_program_plans_a_model_on_the_hub(
    hub: StandInHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phi2(tmp_path / "phi-2")
    hub.add(PHI, tmp_path / "phi-2")
    assert main(["plan", PHI, "--json"]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert plan["model"] == PHI
    assert sum(device["weights"] for device in plan["devices"]) == 5_559_367_680
    assert "planned from its headers" in captured.err
    assert not (tmp_path / "cache").exists()

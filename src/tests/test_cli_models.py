"""The rule about models: what was named is never replaced, what was not named is never downloaded by surprise."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from lyra_emergence.bundled import BUNDLED_ID, bundled_directory
from lyra_emergence.cli.models import choose_model, describe_download, find_model
from lyra_emergence.config import resolve_config
from lyra_emergence.errors import ModelUnavailableError
from lyra_emergence.hub import RemoteModel

if TYPE_CHECKING:
    from lyra_emergence.config import ResolvedConfig

PHI = "microsoft/phi-2"
REMOTE = RemoteModel(model_id=PHI, revision="abc", files=("config.json", "model.safetensors"), nbytes=5_560_000_000)
UNREACHABLE = ModelUnavailableError(
    f"{PHI} is not on this machine, and the hub did not answer", hint="check the network"
)


@dataclass
class Hub:
    """A hub with the given models on disk and on the network, that records what was asked of it."""

    local: dict[str, Path] = field(default_factory=dict)
    remote: RemoteModel | None = None
    looked_up: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def find_local(self, model_id: str, /) -> Path | None:
        return self.local.get(model_id)

    def look_up(self, model_id: str, /) -> RemoteModel:
        self.looked_up.append(model_id)
        if self.remote is None:
            raise UNREACHABLE
        return self.remote

    def fetch(self, remote: RemoteModel) -> Path:
        self.fetched.append(remote.model_id)
        return Path("downloaded")


def not_asked(_remote: RemoteModel, /) -> NoReturn:
    raise AssertionError("nobody may be asked")


def resolved(directory: Path, text: str | None = None, **overrides: object) -> ResolvedConfig:
    if text is not None:
        (directory / "model_config.json").write_text(text)
    return resolve_config(overrides=overrides, environ={}, directory=directory)


def test_a_default_that_is_on_disk_is_used(tmp_path: Path) -> None:
    hub = Hub(local={PHI: tmp_path})
    choice = choose_model(resolved(tmp_path), fetch=hub.fetch, choose=not_asked, source=hub)
    assert (choice.directory, choice.config.model_id, choice.notes, choice.stands_in) == (tmp_path, PHI, (), False)
    assert hub.looked_up == []


def test_without_a_person_the_bundled_model_stands_in_without_touching_the_network(tmp_path: Path) -> None:
    hub = Hub(remote=REMOTE)
    choice = choose_model(resolved(tmp_path), fetch=hub.fetch, choose=None, source=hub)
    assert choice.stands_in
    assert (choice.config.model_id, choice.directory) == (BUNDLED_ID, bundled_directory())
    assert choice.notes == (
        (
            "microsoft/phi-2 (the default) is not on this machine "
            "(--model microsoft/phi-2 downloads it); using the bundled model"
        ),
    )
    assert (hub.looked_up, hub.fetched) == ([], [])


def test_the_note_names_the_file_that_was_found(tmp_path: Path) -> None:
    choice = find_model(resolved(tmp_path, '{"model_id": "some/model"}'), source=Hub())
    path = tmp_path / "model_config.json"
    assert choice.notes == (f"some/model (from {path}) is not on this machine; planning the bundled model",)


def test_an_unreachable_hub_is_said_in_one_line_and_nobody_is_asked(tmp_path: Path) -> None:
    hub = Hub()
    choice = choose_model(resolved(tmp_path), fetch=hub.fetch, choose=not_asked, source=hub)
    assert choice.stands_in
    assert choice.notes == (
        "microsoft/phi-2 is not on this machine, and the hub did not answer; using the bundled model",
    )


def test_a_person_who_takes_the_download_gets_it(tmp_path: Path) -> None:
    hub = Hub(remote=REMOTE)
    choice = choose_model(resolved(tmp_path), fetch=hub.fetch, choose=lambda _: "download", source=hub)
    assert (choice.directory, choice.config.model_id, choice.stands_in) == (Path("downloaded"), PHI, False)
    assert hub.fetched == [PHI]


def test_a_person_who_takes_the_bundled_model_gets_it(tmp_path: Path) -> None:
    hub = Hub(remote=REMOTE)
    choice = choose_model(resolved(tmp_path), fetch=hub.fetch, choose=lambda _: "bundled", source=hub)
    assert choice.stands_in
    assert choice.notes == ("using the bundled model",)
    assert hub.fetched == []


@pytest.mark.parametrize("named_by", ["command line", "named file", "environment"])
def test_a_named_model_is_fetched_without_a_question(tmp_path: Path, named_by: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(f'{{"model_id": "{PHI}"}}')
    configuration = {
        "command line": lambda: resolve_config(overrides={"model_id": PHI}, environ={}, directory=tmp_path),
        "named file": lambda: resolve_config(path, environ={}),
        "environment": lambda: resolve_config(environ={"LYRA_MODEL_ID": PHI}, directory=tmp_path),
    }[named_by]()
    assert configuration.origins["model_id"] == named_by
    hub = Hub(remote=REMOTE)
    choice = choose_model(configuration, fetch=hub.fetch, choose=not_asked, source=hub)
    assert choice.directory == Path("downloaded")
    assert hub.fetched == [PHI]


def test_a_named_model_is_never_replaced(tmp_path: Path) -> None:
    hub = Hub()
    with pytest.raises(
        ModelUnavailableError, match=r"^microsoft/phi-2 is not on this machine, and the hub did not answer$"
    ):
        choose_model(resolved(tmp_path, model_id=PHI), fetch=hub.fetch, choose=not_asked, source=hub)


def test_planning_a_named_model_asks_the_hub_and_downloads_nothing(tmp_path: Path) -> None:
    hub = Hub(remote=REMOTE)
    choice = find_model(resolved(tmp_path, model_id=PHI), source=hub)
    assert choice.remote == REMOTE
    assert choice.notes[0].startswith("microsoft/phi-2 is not on this machine: planned from its headers; a download is")
    assert (hub.looked_up, hub.fetched) == ([PHI], [])


def test_planning_a_model_that_was_merely_found_asks_nobody(tmp_path: Path) -> None:
    hub = Hub(remote=REMOTE)
    assert find_model(resolved(tmp_path, '{"model_id": "some/model"}'), source=hub).stands_in
    assert hub.looked_up == []


def test_settings_written_for_another_model_do_not_reach_the_bundled_one(tmp_path: Path) -> None:
    text = """{"model_id": "some/model", "device_map": {"model.layers.0": "cpu"}, "context_length": 100000,
               "load_in_4bit": true, "gpu_layers_fallback": 16, "max_memory": {"0": "6GB"},
               "pipeline_kwargs": {"max_new_tokens": 4000, "do_sample": true, "temperature": 0.7}}"""
    choice = find_model(resolved(tmp_path, text), source=Hub())
    config = choice.config
    assert (config.device_map, config.context_length, config.load_in_4bit) == (None, None, False)
    assert (config.gpu_layers_fallback, config.pipeline_kwargs, config.max_memory) == (16, {}, None)
    assert len(choice.notes) == 1
    assert choice.notes[0].endswith(
        "planning the bundled model, which ignores device_map, context_length, max_memory, load_in_4bit, "
        "max_new_tokens, do_sample, temperature"
    )


def test_what_was_said_for_this_run_reaches_the_bundled_model(tmp_path: Path) -> None:
    text = '{"pipeline_kwargs": {"do_sample": true, "temperature": 0.7, "top_p": 0.9}}'
    said = {"context_length": 256, "pipeline_kwargs": {"do_sample": True, "temperature": 0.2}}
    choice = find_model(resolved(tmp_path, text, **said), source=Hub())
    assert choice.config.context_length == 256
    assert choice.config.pipeline_kwargs == {"do_sample": True, "temperature": 0.2}
    assert choice.notes[0].endswith("planning the bundled model, which ignores top_p")


def test_choosing_changes_nothing_in_the_configuration_it_was_given(tmp_path: Path) -> None:
    configuration = resolved(tmp_path, '{"load_in_8bit": true}')
    find_model(configuration, source=Hub())
    assert (configuration.config.model_id, configuration.config.load_in_8bit) == (PHI, True)


def test_a_download_is_described_by_its_size() -> None:
    assert describe_download(REMOTE) == "5.56 GB in 2 files"

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.bundled import BUNDLED_ID, bundled_directory
from lyra_emergence.errors import ModelUnavailableError
from lyra_emergence.hub import RemoteModel, download, find_local, look_up
from lyra_emergence.hub.errors import UNREACHABLE_HINT
from lyra_emergence.hub.files import select_files

from .standin_hub import Fault, StandInHub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub.errors import HfHubHTTPError

ID = "owner/small"
WEIGHTS = bytes(range(256)) * 100
FILES = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b"{  }",
    "tokenizer_config.json": b"{   }",
    "model.safetensors": WEIGHTS,
}
UNNEEDED = {"README.md": b"x", "pytorch_model.bin": b"xx", "onnx/model.onnx": b"xxx", "model.gguf": b"xxxx"}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as standin:
        standin.add(ID, fill(tmp_path / "served", {**FILES, **UNNEEDED}))
        standin.use(monkeypatch, cache)
        yield standin


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub wait no time between its attempts."""
    clock = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    monkeypatch.setattr("huggingface_hub.file_download.time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)


def refusal(call: Any) -> tuple[str, str]:
    with pytest.raises(ModelUnavailableError) as caught:
        call()
    return str(caught.value), caught.value.hint


# --- Folders ------------------------------------------------------------------------------------------


def test_the_bundled_model_is_always_local() -> None:
    assert find_local(BUNDLED_ID) == bundled_directory()


def test_folders(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "owner" / "name", home / "models"):
        folder.mkdir(parents=True)
    assert find_local(str(tmp_path)) == tmp_path
    assert find_local("owner/name") is not None
    assert find_local("./owner/name") is not None
    assert find_local("owner/") is not None
    assert find_local("~/models") == home / "models"


@pytest.mark.parametrize("path", ["/none/such", "./none", "../none", "~/none", "~nobody-here/x", "none/", "C:\\none"])
def test_a_path_to_nothing_is_not_asked_of_the_hub(hub: StandInHub, path: str) -> None:
    assert refusal(lambda: find_local(path)) == (
        f"{path!r} looks like a path, and there is no such folder",
        "give the folder that holds config.json, or a hub id such as owner/name",
    )
    assert hub.requests == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert refusal(lambda: find_local(str(file))) == (f"{file} is a file", "give the folder that holds config.json")


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "-a", "a-", "a.", "a--b", "a..b", "o/a.git", "a b", "a\0", "é", "a/", "x" * 97, "a:b", "a\nb"]
)
def test_what_is_no_id(hub: StandInHub, name: str) -> None:
    for call in (find_local, look_up):
        message, hint = refusal(lambda call=call: call(name))
        assert message.startswith(ascii(name))
        assert hint in {
            "a hub id is written name or owner/name",
            "give the folder that holds config.json, or a hub id such as owner/name",
        }
    assert hub.requests == []


@pytest.mark.parametrize("name", ["gpt2", "microsoft/phi-2", "a", "TinyLlama/TinyLlama-1.1B", "x" * 96])
def test_ids_that_are_not_in_the_cache(hub: StandInHub, name: str) -> None:
    assert find_local(name) is None
    assert hub.requests == []


# --- The cache ----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(cache: Path, files: dict[str, bytes], *, reference: str | None = "main") -> Path:
    repository = cache / "models--owner--small"
    if reference:
        fill(repository, {f"refs/{reference}": COMMIT.encode()})
    return fill(repository / "snapshots" / COMMIT, files)


def sharded(*there: str, index: bytes | None = None) -> dict[str, bytes]:
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = dict.fromkeys(("config.json", "tokenizer.json", *there), b"")
    return {**files, "model.safetensors.index.json": json.dumps(shards).encode() if index is None else index}


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        (FILES, True),
        ({k: v for k, v in FILES.items() if k != "config.json"}, False),
        ({k: v for k, v in FILES.items() if k != "model.safetensors"}, False),
        ({k: v for k, v in FILES.items() if k != "tokenizer.json"}, False),
        (sharded("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), True),
        (sharded("model-00001-of-00002.safetensors"), False),
        (sharded("model-00001-of-00002.safetensors", index=b"{"), False),
        (sharded(index=b'{"weight_map": {"a": "../../x"}}'), False),
        ({"config.json": b"", "spiece.model": b"", "model.safetensors": b""}, True),
        ({"config.json": b"", "vocab.json": b"", "model.safetensors": b""}, True),
        ({"config.json": b"", "tokenizer.json": b"", "pytorch_model.bin": b""}, True),
        ({"config.json": b"", "tokenizer.json": b"", "model.onnx": b""}, False),
    ],
)
def test_a_snapshot_is_local_once_it_is_complete(
    hub: StandInHub, cache: Path, files: dict[str, bytes], complete: bool
) -> None:
    folder = snapshot(cache, files)
    assert find_local(ID) == (folder if complete else None)
    assert hub.requests == []


def test_a_link_to_a_blob_that_is_gone(hub: StandInHub, cache: Path) -> None:
    folder = snapshot(cache, FILES)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    assert find_local(ID) is None


def test_revisions(hub: StandInHub, cache: Path) -> None:
    folder = snapshot(cache, FILES, reference="refs/pr/1")
    assert find_local(ID) is None
    assert find_local(ID, revision="refs/pr/1") == folder
    assert find_local(ID, revision=COMMIT) == folder
    assert find_local(ID, revision="v2") is None


@pytest.mark.parametrize("revision", ["../../x", "/x", "a//b", "x/", "..", "a b"])
def test_a_revision_that_leaves_the_cache(hub: StandInHub, revision: str) -> None:
    assert refusal(lambda: find_local(ID, revision=revision)) == (
        f"{revision!r} is no revision",
        "give a branch, a tag or a commit",
    )


@pytest.mark.parametrize("reference", [b"../../../x", b"\xff", b"", b"a" * 40])
def test_a_reference_that_leads_nowhere(hub: StandInHub, cache: Path, reference: bytes) -> None:
    folder = snapshot(cache, FILES)
    fill(folder.parents[1], {"refs/main": reference})
    assert find_local(ID) is None


@pytest.mark.parametrize(
    ("record", "complete"),
    [
        ({f".no_exist/{COMMIT}/tokenizer_config.json": b""}, True),
        ({f"trees/{COMMIT}.json": b'{"files": {"config.json": {}}}'}, True),
        ({f"trees/{COMMIT}.json": b'{"files": {"tokenizer.json": {}}}'}, False),
        ({f"trees/{COMMIT}.json": b"{"}, False),
        ({f"trees/{COMMIT}.json": b"{}"}, False),
    ],
)
def test_a_model_that_has_no_tokenizer_on_the_hub(
    hub: StandInHub, cache: Path, record: dict[str, bytes], complete: bool
) -> None:
    folder = snapshot(cache, {"config.json": b"", "model.safetensors": b""})
    fill(folder.parents[1], record)
    assert (find_local(ID) == folder) is complete


# --- Which files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "needed"),
    [
        (
            [
                "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "config.json",
                "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "model-Q4.gguf",
                "README.md", "tokenizer.json", "vocab.json", "merges.txt", "consolidated.safetensors", "params.json",
            ],
            ["config.json", "merges.txt", "tokenizer.json", "vocab.json", "model.safetensors"],
        ),
        (
            [
                "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                "model.fp16-00001-of-00002.safetensors", "consolidated.safetensors", "original/consolidated.00.pth",
                "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json",
                "additional_chat_templates/tools.jinja", "other/tokenizer.json", "generation_config.json", "model.py",
                "tokenizer_config.json", "qwen.tiktoken", "pytorch_model.bin.index.json", "chat_template.json",
            ],
            [
                "config.json", "added_tokens.json", "additional_chat_templates/tools.jinja", "chat_template.jinja",
                "chat_template.json", "generation_config.json", "model.py", "qwen.tiktoken", "special_tokens_map.json",
                "tokenizer.model", "tokenizer_config.json", "model.safetensors.index.json",
                "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
            ],
        ),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], []),
        (["config.json", "adapter_model.safetensors", "consolidated.safetensors"], []),
        (["config.json", "../model.safetensors", "/model.safetensors"], []),
        ([], []),
    ],
)  # fmt: skip
def test_the_files_that_a_load_needs(listed: list[str], needed: list[str]) -> None:
    assert select_files(listed) == tuple(needed)


# --- Looking up ---------------------------------------------------------------------------------------

NO_WEIGHTS = "has no safetensors weights in transformers' form"


def test_look_up(hub: StandInHub) -> None:
    sizes = tuple(len(content) for content in FILES.values())
    remote = look_up(ID)
    assert remote == RemoteModel(ID, hub.commit(ID), tuple(FILES), sum(sizes), "main", sizes)
    assert hub.requests == [("GET", f"/api/models/{ID}")]


@pytest.mark.parametrize("answer", [[], {}, {"sha": "a"}, {"sha": "a", "siblings": [3]}, {"siblings": [{}]}, None, "x"])
def test_an_answer_that_is_no_listing(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    monkeypatch.setattr("httpx.Response.json", lambda _: answer)
    assert refusal(lambda: look_up(ID)) == (
        f"{hub.url} did not answer as a hub does, when asked for {ID}",
        "check HF_ENDPOINT, the proxy and whether this network asks for a login",
    )


def test_look_up_of_a_revision(hub: StandInHub) -> None:
    commit = hub.commit(ID)
    assert look_up(ID, revision=commit).reference == commit
    assert hub.requests == [("GET", f"/api/models/{ID}/revision/{commit}")]
    assert refusal(lambda: look_up(ID, revision="v9")) == (f"{ID} has no such revision", "check the revision's name")


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("unauthorized", "the hub has no model {id}, or none for you to see", "check the spelling; for a private"),
        ("gated", "{id} is gated: its license must be accepted before it can be downloaded", "accept the license at"),
        ("forbidden", "the hub forbids access to {id}", "run `hf auth login` with a token that may read it"),
        (
            "rate-limited",
            "the hub answers no more requests from here for now, asked for {id}",
            "wait 17 seconds, or run `hf auth login` for a higher limit",
        ),
        ("failing", "the hub failed when asked for {id} (HTTP 503)", "try again later"),
        ("login page", "{url} did not answer as a hub does, when asked for {id}", "check HF_ENDPOINT, the proxy"),
    ],
)  # fmt: skip
def test_a_hub_that_refuses(hub: StandInHub, fault: Fault, message: str, hint: str) -> None:
    hub.fault = fault
    said, advice = refusal(lambda: look_up(ID))
    assert said == message.format(id=ID, url=hub.url)
    assert advice.startswith(hint.format(id=ID, url=hub.url))
    assert len(hub.requests) == 1


def test_an_unknown_model(hub: StandInHub) -> None:
    assert refusal(lambda: look_up("owner/none")) == (
        "the hub has no model owner/none, or none for you to see",
        "check the spelling; for a private model run: hf auth login",
    )


def test_a_gated_model_is_listed_but_cannot_be_downloaded_without_a_token(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(ID)
    expected = (
        f"{ID} is gated: its license must be accepted before it can be downloaded",
        f"accept the license at {hub.url}/{ID}, then run: hf auth login",
    )
    assert refusal(lambda: look_up(ID)) == expected
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    remote = look_up(ID)
    hub.file_fault = "gated"
    assert refusal(lambda: download(remote)) == expected


@pytest.mark.parametrize("fault", ["hanging", "dripping"])
def test_a_hub_that_is_too_slow(hub: StandInHub, fault: Fault) -> None:
    hub.fault = fault
    start = time.monotonic()
    assert refusal(lambda: look_up(ID, timeout=0.4)) == (
        f"{ID} is not on this machine, and {hub.url} did not answer within 0.4 s",
        UNREACHABLE_HINT,
    )
    assert 0.4 <= time.monotonic() - start < 2.5


def test_a_name_server_that_does_not_answer(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, done = threading.Event(), threading.Event()

    def resolve(*_: Any, **__: Any) -> Any:
        asked.set()
        done.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        message, _ = refusal(lambda: look_up(ID, timeout=0.3))
    finally:
        done.set()
    assert asked.is_set()
    assert message.endswith("did not answer within 0.3 s")


def test_no_hub_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StandInHub() as gone:
        gone.use(monkeypatch, tmp_path)
    start = time.monotonic()
    message, hint = refusal(lambda: look_up(ID))
    assert message.startswith(f"{ID} is not on this machine, and {gone.url} cannot be reached: ")
    assert message.endswith("Connection refused")
    assert hint == UNREACHABLE_HINT
    assert time.monotonic() - start < 2


def test_offline_mode(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = look_up(ID)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    for call in (lambda: look_up(ID), lambda: download(remote)):
        assert refusal(call) == (
            f"{ID} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub",
            "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or give the folder of a checkpoint on this machine",
        )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], f"{NO_WEIGHTS}, only pytorch_model.bin"),
        (["x-Q4.gguf"], f"{NO_WEIGHTS}, only x-Q4.gguf"),
        (["config.json"], NO_WEIGHTS),
        (["model.safetensors"], "has no config.json"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_not_offered(
    hub: StandInHub, tmp_path: Path, files: list[str], message: str
) -> None:
    hub.add("odd", fill(tmp_path / "odd", dict.fromkeys(files, b"x")))
    assert refusal(lambda: look_up("odd"))[0] == f"odd {message}"


# --- Downloading --------------------------------------------------------------------------------------


def test_download(hub: StandInHub, cache: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = download(look_up(ID), progress=lambda *report: seen.append(report))
    assert folder == cache / "models--owner--small" / "snapshots" / hub.commit(ID)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert find_local(ID) == folder
    assert list(dict.fromkeys(name for name, _, _ in seen)) == list(FILES)
    assert [total for name, _, total in seen if name == "model.safetensors"][-1] == len(WEIGHTS)
    for name, content in FILES.items():
        done = [count for file, count, _ in seen if file == name]
        assert done == sorted(done)
        assert done[-1] == len(content)


def test_progress_is_driven_by_the_bytes_that_arrive(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    seen: list[tuple[int, int]] = []
    download(look_up(ID), progress=lambda name, *n: seen.append(n) if name == "model.safetensors" else None)
    assert seen == [(10_000, 25_600), (20_000, 25_600), (25_600, 25_600), (25_600, 25_600)]


def test_a_download_draws_nothing(hub: StandInHub, capfd: pytest.CaptureFixture[str]) -> None:
    download(look_up(ID))
    assert capfd.readouterr() == ("", "")


def test_what_is_there_is_not_fetched_again(hub: StandInHub) -> None:
    remote = look_up(ID)
    folder = download(remote)
    (folder / "tokenizer.json").unlink()
    hub.requests.clear()
    seen: list[str] = []
    assert download(remote, progress=lambda name, *_: seen.append(name)) == folder
    assert {path.rpartition("/")[2] for _, path in hub.requests} == {"tokenizer.json"}
    assert seen.count("model.safetensors") == 1


@pytest.mark.parametrize("ignores_ranges", [False, True])
@pytest.mark.usefixtures("impatient", "small_chunks")
def test_a_cut_connection_is_resumed(hub: StandInHub, ignores_ranges: bool) -> None:
    remote = look_up(ID)
    download(RemoteModel(ID, remote.revision, remote.files[:-1], 0))
    hub.cuts, hub.ignores_ranges = 3, ignores_ranges
    seen: list[int] = []
    folder = download(remote, progress=lambda _, done, __: seen.append(done))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert (hub.cuts, hub.resumed) == (0, 0 if ignores_ranges else 3)
    assert (seen == sorted(seen)) is not ignores_ranges
    assert seen[-1] == len(WEIGHTS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)


@pytest.mark.usefixtures("impatient", "small_chunks")
def test_a_connection_that_is_cut_again_and_again(hub: StandInHub) -> None:
    remote = look_up(ID)
    download(RemoteModel(ID, remote.revision, remote.files[:-1], 0))
    # Each attempt gets half of what is left, until that is less than a chunk: then five in a row get nothing.
    hub.cuts = 1000
    message, hint = refusal(lambda: download(remote))
    assert message.startswith(
        f"the connection broke while model.safetensors of {ID} was downloaded: peer closed connection without sending "
    )
    assert hint == "run it again: files that are complete are kept"
    assert find_local(ID) is None
    hub.cuts = 0
    hub.requests.clear()
    folder = download(remote)
    assert find_local(ID) == folder
    assert {path.rpartition("/")[2] for _, path in hub.requests} == {"model.safetensors"}


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_goes_away(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = look_up(ID)
    with StandInHub() as gone:
        gone.use(monkeypatch, hub.repositories[ID].parent / "other")
    message, hint = refusal(lambda: download(remote))
    assert message.startswith(f"the connection broke while config.json of {ID} was downloaded: ")
    assert message.endswith("Connection refused")
    assert hint == "run it again: files that are complete are kept"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unauthorized", f"the hub has no model {ID}, or none for you to see"),
        ("forbidden", f"the hub forbids access to {ID}"),
        ("failing", f"the hub failed when asked for {ID} (HTTP 503)"),
        ("login page", f"the download of config.json of {ID} failed: Response from"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_files_that_are_refused(hub: StandInHub, fault: Fault, message: str) -> None:
    remote = look_up(ID)
    hub.file_fault = fault
    assert refusal(lambda: download(remote))[0].startswith(message)


def test_a_file_that_is_gone_since(hub: StandInHub) -> None:
    remote = RemoteModel(ID, hub.commit(ID), ("vocab.txt",), 0)
    assert refusal(lambda: download(remote)) == (f"{ID} has lost a file since it was looked up", "run it again")


def test_a_name_that_leaves_the_cache(hub: StandInHub, cache: Path) -> None:
    remote = RemoteModel(ID, hub.commit(ID), ("../../../config.json",), 0)
    assert refusal(lambda: download(remote))[0].startswith(f"the download of ../../../config.json of {ID} failed: ")
    assert not (cache.parent / "config.json").exists()


def test_a_disk_that_is_too_small(hub: StandInHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = look_up(ID)
    download(RemoteModel(ID, remote.revision, ("config.json",), 2))
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    hub.requests.clear()
    # 25,600 bytes of weights, and 3 + 4 + 5 of small files; config.json's two are there already.
    assert refusal(lambda: download(remote)) == (
        f"{ID} needs 25.6 kB, and the disk of {cache} has 1.00 kB free",
        "free some space, or set HF_HOME to a folder on a larger disk",
    )
    assert hub.requests == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile(
    hub: StandInHub, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    remote = look_up(ID)
    assert refusal(lambda: download(remote)) == (
        f"the disk is full: {ID} cannot be stored in {cache}",
        "free some space, or set HF_HOME to a folder on a larger disk; files that are complete are kept",
    )


def test_a_cache_that_cannot_be_written(hub: StandInHub, cache: Path) -> None:
    remote = look_up(ID)
    cache.touch()
    assert refusal(lambda: download(remote)) == (
        f"{ID} cannot be stored in {cache}: Not a directory",
        "set HF_HOME to a folder that you may write to",
    )


def test_an_unfinished_download_does_not_replace_the_snapshot_before(hub: StandInHub, tmp_path: Path) -> None:
    old = download(look_up(ID))
    fill(tmp_path / "served", {"model.safetensors": WEIGHTS + b"new"})
    remote = look_up(ID)
    assert remote.revision != old.name
    hub.file_fault = "forbidden"
    refusal(lambda: download(remote))
    assert find_local(ID) == old
    hub.file_fault = None
    new = download(remote)
    assert (new.name, find_local(ID)) == (remote.revision, new)


def test_the_remaining_refusals() -> None:
    from huggingface_hub.errors import DisabledRepoError

    from lyra_emergence.hub.errors import unavailable

    disabled = unavailable(ID, http_error(DisabledRepoError, 403))
    assert (str(disabled), disabled.hint) == (f"the hub has disabled {ID}", "choose another model")
    from huggingface_hub.errors import HfHubHTTPError

    teapot = unavailable(ID, http_error(HfHubHTTPError, 418))
    assert str(teapot) == f"the hub refused to serve {ID} (HTTP 418)"


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    import httpx

    return kind("x", response=httpx.Response(status, request=httpx.Request("GET", "http://127.0.0.1/")))


# --- A process of its own -----------------------------------------------------------------------------


def test_the_environment_is_honored_and_nothing_heavy_is_imported(hub: StandInHub, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from lyra_emergence.hub import find_local, look_up, download\n"
        f"assert find_local({ID!r}) is None\n"
        "early = [m for m in ('torch', 'transformers', 'httpx') if m in sys.modules]\n"
        f"folder = download(look_up({ID!r}))\n"
        f"assert find_local({ID!r}) == folder\n"
        "print(early, [m for m in ('torch', 'transformers') if m in sys.modules], folder)"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    folder = tmp_path / "home" / "hub" / "models--owner--small" / "snapshots" / hub.commit(ID)
    assert done.stdout == f"[] [] {folder}\n"
    assert done.stderr == ""


def test_transformers_finds_what_was_downloaded(hub: StandInHub) -> None:
    from huggingface_hub import try_to_load_from_cache

    folder = download(look_up(ID))
    assert try_to_load_from_cache(ID, "model.safetensors") == str(folder / "model.safetensors")


def large(tmp_path: Path, standin: StandInHub) -> bytes:
    """Serve a model whose weights are large enough to be kept in part, and return them."""
    weights = bytes(range(256)) * (140 * 2**10)
    fill(tmp_path / "large", {**FILES, "model.safetensors": weights})
    standin.add(ID, tmp_path / "large")
    return weights


DOWNLOADING = f"""
import os, sys
from lyra_emergence.hub import download, look_up
steps = []
def progress(name, done, total):
    steps.append((name, done))
    weights = [done for name, done in steps if name == "model.safetensors"]
    if sys.argv[1] == "die" and len(weights) == 2:
        os.kill(os.getpid(), 9)
print(download(look_up({ID!r}), progress=progress) / "model.safetensors")
print(min(done for name, done in steps if name == "model.safetensors"))
"""


def test_another_process_goes_on_where_a_killed_one_stopped(tmp_path: Path, hub: StandInHub) -> None:
    weights = large(tmp_path, hub)
    home = tmp_path / "hf"
    environ = {**os.environ, **hub.environment(home)}

    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", DOWNLOADING, how]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)

    assert run("die").returncode == -9
    (part,) = home.rglob("*.lyra-part")
    kept = part.stat().st_size
    assert kept >= 2**20
    done = run("live")
    assert done.returncode == 0, done.stderr
    path, least = done.stdout.split()
    assert Path(path).read_bytes() == weights
    assert int(least) > kept
    assert hub.resumed == 1
    assert not list(home.rglob("*.lyra-part*"))


def test_a_large_file_on_another_host_is_kept_as_huggingface_hub_does(
    tmp_path: Path, hub: StandInHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = large(tmp_path, hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirects = True
    path = download(look_up(ID)) / "model.safetensors"
    assert path.read_bytes() == weights
    assert path.is_symlink()
    assert not list(cache.rglob("*.lyra-part*"))
    assert hub.tokens
    assert not any(asked.startswith("/elsewhere") for asked in hub.tokens)


def test_a_large_file_whose_content_is_not_what_the_hub_names_is_refused(
    tmp_path: Path, hub: StandInHub, cache: Path
) -> None:
    large(tmp_path, hub)
    hub.mislabels = True
    with pytest.raises(ModelUnavailableError) as caught:
        download(look_up(ID))
    assert "model.safetensors arrived damaged: its SHA-256 is not the one that the hub names" in str(caught.value)
    assert not list(cache.rglob("*.lyra-part"))

"""Configuration files: reading, the cache, and writing."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.config import ModelConfig, load_config, resolve_config, save_config
from lyra_emergence.errors import ConfigError, LyraError

if TYPE_CHECKING:
    from collections.abc import Iterator

SETTLED_SECONDS = 0.05
"""After this, a file's time stamp is older than a tick of the kernel's clock, so that its content is cached."""

_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Collect the name of every file that the interpreter opens."""
    global _opened  # noqa: PLW0603 - an audit hook cannot be removed, only told to stop
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LYRA_")]:
        monkeypatch.delenv(name)


def write(path: str, layers: int) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"gpu_layers_fallback": layers}))
    return file


def names() -> list[str]:
    """Return what stands in the current directory."""
    return sorted(path.name for path in Path().iterdir())


def problems_with(content: bytes | str) -> tuple[str, ...]:
    """Return the problems of a file named c.json with this content."""
    Path("c.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config("c.json")
    return caught.value.problems


# Reading


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"model_id": "a"\n  "task": 1}', "c.json:2:3: not valid JSON: expecting ',' delimiter"),
        ('{"model_id": }', "c.json:1:14: not valid JSON: expecting value"),
        ("{} {}", "c.json:1:4: not valid JSON: extra data"),
        ("", "c.json: is empty; write {} for the defaults"),
        (" \n", "c.json: is empty; write {} for the defaults"),
        ("[]", """c.json: a list where an object belongs; write {"key": value, ...}"""),
        ("null", """c.json: null where an object belongs; write {"key": value, ...}"""),
        ("NaN", """c.json: a number where an object belongs; write {"key": value, ...}"""),
        ('{"task": 1, "task": "text-generation"}', "c.json: in 'task': the key stands twice; keep one"),
        (
            '{"max_memory": {"0": "1GB", "0": "2GB"}}',
            "c.json: in 'max_memory.0': the key stands twice; keep one",
        ),
        (
            '{"pipeline_kwargs": {"top_p": NaN}}',
            "c.json: in 'pipeline_kwargs.top_p': NaN is not a number that JSON or Lyra can hold; write a smaller one",
        ),
        (
            '{"context_length": 1e999}',
            "c.json: in 'context_length': 1e999 is not a number that JSON or Lyra can hold; write a smaller one",
        ),
        (
            '{"pipeline_kwargs": {"stop": [-Infinity]}}',
            (
                "c.json: in 'pipeline_kwargs.stop.0': -Infinity is not a number that JSON or Lyra can hold; "
                "write a smaller one"
            ),
        ),
        ('{"max_memory": {"0": "6Gb"}}', "c.json: in 'max_memory.0': '6Gb' is bits; write '6GB'"),
        ('{"gpu_layer_fallback": 1}', "c.json: unknown key 'gpu_layer_fallback'; did you mean 'gpu_layers_fallback'?"),
        (b'{"model_id": "\xff"}', "c.json: is not UTF-8 text (byte 0xff at offset 14); save it as UTF-8"),
        ("{}".encode("utf-16"), "c.json: is UTF-16 text; save it as UTF-8"),
        (b" " * 1_000_001, "c.json: is larger than 1 MB, which no configuration is"),
        ("[" * 500_000, "c.json: the objects are nested too deeply"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "c.json: the objects are nested too deeply"),
    ],
)
def test_a_broken_file_is_named_with_its_position(content: bytes | str, problem: str) -> None:
    assert problems_with(content) == (problem,)


def test_a_number_of_many_digits_is_refused_without_reading_it() -> None:
    (problem,) = problems_with('{"context_length": ' + "9" * 100_000 + "}")
    assert problem == (
        f"c.json: in 'context_length': {'9' * 60}... is not a number that JSON or Lyra can hold; write a smaller one"
    )


def test_one_error_lists_every_problem_of_a_file() -> None:
    assert problems_with('{"task": 1, "task": 2, "dtype": "x", "load_in_8bit": true, "load_in_4bit": true}') == (
        "c.json: in 'task': the key stands twice; keep one",
        "c.json: in 'task': 2 is a number; write 'text-generation'",
        (
            "c.json: in 'dtype': 'x' is not a dtype that Lyra computes in; "
            "write 'bfloat16', 'float16', 'float32' or 'auto'"
        ),
        "in 'load_in_8bit' (c.json) and 'load_in_4bit' (c.json): both are true; set one of them to false",
    )


def test_a_byte_order_mark_is_tolerated() -> None:
    Path("c.json").write_bytes(b'\xef\xbb\xbf{"model_id": "a/b"}')
    assert load_config("c.json").model_id == "a/b"


def test_a_named_file_that_is_missing_is_an_error() -> None:
    write("model_config.json", 1)
    with pytest.raises(ConfigError) as caught:
        load_config("no/such.json")
    assert caught.value.problems == ("no/such.json: no such file",)
    assert caught.value.hint == "check the path, or write an example there with: lyra.py config init PATH"


def test_paths_that_no_file_can_have() -> None:
    for path, problem in (
        ("~nobody-of-this-name/c.json", "~nobody-of-this-name/c.json: no such file"),
        ("a\0b", "'a\\x00b': is not a path that a file can have"),
        ("", ".: is a folder, not a file"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert caught.value.problems == (problem,)


def test_a_folder_and_a_pipe_are_no_files() -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name, problem in (("folder", "is a folder, not a file"), ("pipe", "is not a regular file")):
        with pytest.raises(ConfigError) as caught:
            load_config(name)
        assert caught.value.problems == (f"{name}: {problem}",)


def test_a_found_file_that_is_broken_is_an_error_and_not_passed_over() -> None:
    write("model_config.json", 1)
    Path("config").mkdir()
    Path("config/model_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config/model_config\.json:1:2: not valid JSON"):
        load_config()
    Path("config/model_config.json").unlink()
    Path("config/model_config.json").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"config/model_config\.json: no such file"):
        load_config()


def test_control_characters_in_a_files_name_do_not_reach_the_terminal() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("a\x1b[31m.json")
    assert caught.value.problems == ("'a\\x1b[31m.json': no such file",)


# The cache


def test_a_file_is_read_once_until_it_changes() -> None:
    path = write("model_config.json", 1)
    time.sleep(SETTLED_SECONDS)
    with opened_files() as opened:
        for _ in range(5):
            assert load_config().gpu_layers_fallback == 1
        assert resolve_config(path.absolute(), environ={}).config.gpu_layers_fallback == 1
    assert opened == ["model_config.json"]
    write("model_config.json", 22)
    time.sleep(SETTLED_SECONDS)
    with opened_files() as opened:
        for _ in range(5):
            assert load_config().gpu_layers_fallback == 22
    assert opened == ["model_config.json"]


def test_a_change_of_the_same_size_at_once_is_noticed() -> None:
    for layers in range(10, 60):
        write("model_config.json", layers)
        assert load_config().gpu_layers_fallback == layers


def test_a_file_whose_next_change_might_not_show_is_not_cached() -> None:
    path = write("model_config.json", 1)
    future = time.time_ns() + 3_600_000_000_000
    os.utime(path, ns=(future, future))
    with opened_files() as opened:
        load_config()
        load_config()
    assert opened == ["model_config.json"] * 2


def test_a_change_under_a_kept_modification_time_is_noticed() -> None:
    path = write("model_config.json", 11)
    time.sleep(SETTLED_SECONDS)
    assert load_config().gpu_layers_fallback == 11
    before = path.stat()
    write("model_config.json", 22)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_config().gpu_layers_fallback == 22


def test_a_new_file_earlier_in_the_order_and_a_deleted_one_are_noticed() -> None:
    write("model_config.json", 1)
    time.sleep(SETTLED_SECONDS)
    assert load_config().gpu_layers_fallback == 1
    earlier = write("config/model_config.json", 2)
    assert load_config().gpu_layers_fallback == 2
    earlier.unlink()
    assert load_config().gpu_layers_fallback == 1
    Path("model_config.json").unlink()
    assert load_config().gpu_layers_fallback is None


def test_a_named_file_that_vanishes_is_an_error_though_it_was_cached() -> None:
    path = write("c.json", 1)
    time.sleep(SETTLED_SECONDS)
    load_config(path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"c\.json: no such file"):
        load_config(path)


def test_a_caller_cannot_change_what_the_next_one_gets() -> None:
    Path("c.json").write_text('{"max_memory": {"0": "6GB"}, "pipeline_kwargs": {"stop": ["a"]}}')
    time.sleep(SETTLED_SECONDS)
    config = load_config("c.json")
    assert config.max_memory is not None
    assert config.pipeline_kwargs is not None
    config.max_memory["cpu"] = "1GB"
    config.pipeline_kwargs["stop"].append("b")
    config.model_id = "other"
    again = load_config("c.json")
    assert (again.max_memory, again.pipeline_kwargs) == ({"0": "6GB"}, {"stop": ["a"]})
    assert again.model_id == "microsoft/phi-2"


def test_the_cache_follows_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a/model_config.json", 1)
    write("b/model_config.json", 2)
    time.sleep(SETTLED_SECONDS)
    for folder, layers in (("a", 1), ("b", 2), ("a", 1)):
        monkeypatch.chdir(tmp_path / folder)
        assert load_config().gpu_layers_fallback == layers


def test_threads_get_one_read_and_whole_values() -> None:
    write("model_config.json", 7)
    time.sleep(SETTLED_SECONDS)
    start = threading.Barrier(8)
    results: list[int | None] = []

    def load() -> None:
        start.wait(timeout=10)
        results.append(load_config().gpu_layers_fallback)

    threads = [threading.Thread(target=load) for _ in range(8)]
    with opened_files() as opened:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=10)
    assert results == [7] * 8
    assert opened == ["model_config.json"]


def test_a_reader_beside_a_writer_sees_whole_files_only() -> None:
    save_config(ModelConfig(gpu_layers_fallback=0), "c.json")
    done = threading.Event()

    def save() -> None:
        for layers in range(50):
            save_config(ModelConfig(gpu_layers_fallback=layers), "c.json")
        done.set()

    writer = threading.Thread(target=save)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(load_config("c.json").gpu_layers_fallback)
    writer.join(timeout=30)
    assert seen == sorted(seen)
    assert load_config("c.json").gpu_layers_fallback == 49


# Writing


def test_a_saved_configuration_loads_back() -> None:
    config = ModelConfig(
        model_id="a/ü",
        device_map={"model": 0, "lm_head": "cpu"},
        max_memory={"0": "90%", "cpu": 7},
        gpu_layers_fallback=3,
        load_in_8bit=True,
        pipeline_kwargs={"temperature": 0.7, "stop": ["\n"]},
        dtype="bfloat16",
    )
    save_config(config, "new/folder/c.json")
    assert load_config("new/folder/c.json") == config


def test_every_key_is_written_in_order() -> None:
    save_config(ModelConfig(max_memory={"0": "6GB"}), Path("c.json"))
    text = Path("c.json").read_text()
    assert text.startswith('{\n  "model_id": "microsoft/phi-2",\n  "task": "text-generation",\n  "device_map": null,\n')
    assert text.endswith('  "trust_remote_code": false\n}\n')
    assert list(json.loads(text)) == list(ModelConfig.model_fields)


def test_the_permissions_the_link_and_the_schema_reference_stay() -> None:
    target = Path("real.json")
    target.write_text('{"$schema": "./s.json"}')
    target.chmod(0o640)
    Path("link.json").symlink_to("real.json")
    save_config(ModelConfig(model_id="a/b"), "link.json")
    assert Path("link.json").is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert json.loads(target.read_text())["$schema"] == "./s.json"
    assert load_config("link.json").model_id == "a/b"


def test_a_new_files_permissions_follow_the_umask() -> None:
    old = os.umask(0o027)
    try:
        save_config(ModelConfig(), "c.json")
    finally:
        os.umask(old)
    assert stat.S_IMODE(Path("c.json").stat().st_mode) == 0o640


def test_a_broken_old_file_is_replaced() -> None:
    Path("c.json").write_bytes(b"\xff{")
    save_config(ModelConfig(model_id="a/b"), "c.json")
    assert load_config("c.json").model_id == "a/b"


def test_what_was_changed_in_place_is_checked_before_it_is_written() -> None:
    write("c.json", 1)
    config = ModelConfig(max_memory={"0": "6GB"})
    assert config.max_memory is not None
    config.max_memory["0"] = "6Gb"
    with pytest.raises(ConfigError) as caught:
        save_config(config, "c.json")
    assert caught.value.problems == ("in 'max_memory.0': '6Gb' is bits; write '6GB'",)
    assert load_config("c.json").gpu_layers_fallback == 1


def test_a_full_disk_leaves_the_old_file_and_nothing_else() -> None:
    write("c.json", 1)
    code = (
        "import resource, sys\n"
        "from lyra_emergence.config import ModelConfig, save_config\n"
        "from lyra_emergence.errors import LyraError\n"
        "sys.dont_write_bytecode = True\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    save_config(ModelConfig(), 'c.json')\n"
        "except LyraError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "cannot write c.json: file too large\n"
    assert names() == ["c.json"]
    assert load_config("c.json").gpu_layers_fallback == 1


def test_a_path_that_cannot_be_written_is_an_error_and_leaves_nothing() -> None:
    Path("folder/inside").mkdir(parents=True)
    with pytest.raises(LyraError, match=r"^cannot write folder: is a directory$"):
        save_config(ModelConfig(), "folder")
    write("file", 1)
    with pytest.raises(LyraError, match=r"^cannot write file/c\.json: a file stands where a folder belongs$"):
        save_config(ModelConfig(), "file/c.json")
    assert names() == ["file", "folder"]

"""What is fuzzed: each target takes bytes from a stranger and raises only where Lyra fell short.

An error of ours with a message is the right end for bytes that mean nothing. What may not happen: any other exception,
a hang, and a file that is accepted though the safetensors library refuses it. `benchmarks/fuzz.py` drives the targets
with atheris, `test_fuzz.py` with hypothesis; both begin with `SEEDS`.
"""

from __future__ import annotations

import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence import framework, packed_files, trial
from lyra_emergence.checkpoint import _weight_map, read_files
from lyra_emergence.checkpoint.json_files import parse_object
from lyra_emergence.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo, header_length, parse_header
from lyra_emergence.config import ModelConfig
from lyra_emergence.config.environment import read_environment
from lyra_emergence.config.files import _parse
from lyra_emergence.config.problems import Problems
from lyra_emergence.errors import LyraError
from lyra_emergence.footprint import estimate_footprint, is_known
from lyra_emergence.hub import _parse_listing
from lyra_emergence.hub.files import select_files
from lyra_emergence.journal import read_journal
from lyra_emergence.machine import Device, Machine
from lyra_emergence.plan import make_plan
from lyra_emergence.speed.machine_rates import MachineRates
from lyra_emergence.units import format_bytes, parse_bytes, parse_fraction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

GB = 10**9
MACHINE = Machine(
    (Device("cuda:0", "cuda", 0, 8 * GB, 8 * GB, 0, "a card"),), Device("cpu", "cpu", None, 16 * GB, 16 * GB, 0, "")
)
HIDDEN, VOCABULARY = 16, 48


def header(data: bytes) -> None:
    """A header; an odd first byte stands for a file whose length prefix is the fuzzer's own."""
    if not data:
        return
    raw = data[1:]
    content = raw if data[0] % 2 else len(raw).to_bytes(8, "little") + raw
    content += bytes(64 * (data[0] >> 1 & 1))
    try:
        length = header_length(content[:8], len(content), "w")
        found = parse_header(content[8 : 8 + length], length, len(content), "w", "w")
    except LyraError:
        return
    from safetensors import deserialize

    deserialize(content)
    assert all(a.end == b.begin for a, b in pairwise(found))
    assert not found or found[-1].end == len(content)


def index(data: bytes) -> None:
    """The index of a sharded checkpoint: whatever it names lies in its folder."""
    try:
        names = _weight_map(parse_object(data, "i", strict=True), "i").values()
    except LyraError:
        return
    for name in names:
        assert "\0" not in name
        inside = os.path.normpath(os.path.join("/a/b", name))  # noqa: PTH118 - what the system would make of it
        assert inside.startswith("/a/b/"), name


class _Files:
    """A small Llama whose config.json is the fuzzer's."""

    def __init__(self, config: bytes) -> None:
        self._config = config

    def names(self) -> list[str]:
        return ["config.json", "model.safetensors"]

    def exists(self, name: str) -> bool:
        return name in self.names()

    def where(self, name: str = "") -> str:
        return name or "m"

    def read_object(self, name: str, *, limit: int, strict: bool) -> dict[str, Any]:
        return parse_object(self._config, name, strict=strict)

    def read_headers(self, names: Iterable[str]) -> Mapping[str, tuple[TensorInfo, ...]]:
        return dict.fromkeys(names, _TENSORS)


def _tensors() -> tuple[TensorInfo, ...]:
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(2):
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.up_proj",
            "mlp.gate_proj",
        ):
            shapes[f"model.layers.{i}.{part}.weight"] = (HIDDEN, HIDDEN)
    found, position = [], 0
    for name, shape in shapes.items():
        end = position + DTYPE_BITS["F16"] // 8 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        found.append(TensorInfo(name, "F16", shape, "model.safetensors", position, end))
        position = end
    return tuple(found)


_TENSORS = _tensors()


def config_json(data: bytes) -> None:
    """A config.json, up to the plan where the type needs no trial forward."""
    try:
        found = read_files(_Files(data), Path("m"))
        _ = (found.name, found.model_type, found.architecture, found.dtype, found.context_length, found.nbytes)
        if is_known(found):
            json.dumps(make_plan(ModelConfig(), found, MACHINE).to_json(), allow_nan=False)
        else:
            estimate_footprint(found, context_length=64)
    except LyraError:
        return


def configuration(data: bytes) -> None:
    """A model_config.json, through to the object."""
    problems = Problems("c")
    values = _parse(data, problems)
    if not problems.lines:
        try:
            ModelConfig(**values)
        except LyraError:
            return


def environment(data: bytes) -> None:
    """A variable of the environment, for each kind of key."""
    text = data.decode("utf-8", "replace").replace("\0", "")
    for key in ("MAX_MEMORY", "DEVICE_MAP", "TRUST_REMOTE_CODE", "GPU_LAYERS_FALLBACK", "PIPELINE_KWARGS", "DTYPE"):
        read_environment({f"LYRA_{key}": text}, Problems("e"))


def units(data: bytes) -> None:
    """An amount of memory."""
    text = data.decode("utf-8", "replace")
    for parse in (parse_bytes, parse_fraction):
        try:
            value = parse(text)
        except ValueError as error:
            assert type(error) is ValueError  # noqa: PT017 - a subclass, such as an overflow's, would be a crash
            continue
        assert value is None or value >= 0
        if isinstance(value, int):
            format_bytes(value)


def journal(data: bytes) -> None:
    """A journal file."""
    path = _scratch()
    path.write_bytes(data)
    try:
        read = read_journal(path)
    except LyraError:
        return
    for entry in read.entries:
        _ = (entry.date, entry.label, entry.moment, entry.text.encode())


def caches(data: bytes) -> None:
    """What Lyra itself wrote into the user's cache folder, damaged: nothing but a measurement may be lost."""
    path = _scratch()
    path.write_bytes(data)
    trial._read(path)
    costs = framework._read(path)
    assert costs is None or costs.main_memory >= 0
    try:
        MachineRates.from_json(json.loads(data))
    except (ValueError, RecursionError):
        return


def packed(data: bytes) -> None:
    """A file of packed weights, damaged: what is found in it lies in it; and what a folder of them says of itself."""
    path = _scratch()
    path.write_bytes(data)
    for tensor in packed_files.read_packed(path) or ():
        assert 0 <= tensor.begin <= tensor.end <= len(data)
    folder = path.with_name("folder")
    folder.mkdir(exist_ok=True)
    (folder / packed_files.ABOUT).write_bytes(data)
    packed_files.read_about(folder)


def listing(data: bytes) -> None:
    """What a hub answers when it is asked for a model."""
    try:
        found = _parse_listing(json.loads(data))
    except (ValueError, RecursionError):
        return
    select_files(found.sizes)


_SCRATCH: list[Path] = []


def _scratch() -> Path:
    if not _SCRATCH:
        _SCRATCH.append(Path(tempfile.mkdtemp()) / "file")
    return _SCRATCH[0]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (header, index, config_json, configuration, environment, units, journal, caches, packed, listing)
}


def _seed(value: object) -> bytes:
    return json.dumps(value).encode()


_ENTRY = {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "head_dim": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "text_config": None,
    "num_experts_per_tok": 1,
    "num_nextn_predict_layers": 0,
}
_RATES = {
    "fingerprint": "here",
    "cpu": {"dtypes": {}, "copy": None, "crossing": None},
    "accelerators": {},
    "file_read": {"low": 1.0, "mid": 2.0, "high": 3.0},
}
_CODES = bytes(64)
SEEDS: dict[str, list[bytes]] = {
    "header": [
        b"\2" + _seed({"a": _ENTRY, "__metadata__": {"format": "pt"}}),
        b"\3" + len(_seed({"a": _ENTRY})).to_bytes(8, "little") + _seed({"a": _ENTRY}),
        b"\2" + _seed({"a": {**_ENTRY, "dtype": "F4", "shape": [128]}}),
        b"\0{}",
    ],
    "index": [
        _seed(
            {
                "metadata": {"total_size": 4},
                "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x/y.safetensors"},
            }
        )
    ],
    "config_json": [
        _seed(_LLAMA),
        _seed({**_LLAMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}),
        _seed({**_LLAMA, "model_type": "mixtral", "num_local_experts": 2}),
        _seed(
            {
                **_LLAMA,
                "model_type": "deepseek_v3",
                "kv_lora_rank": 4,
                "qk_rope_head_dim": 2,
                "v_head_dim": 4,
                "qk_nope_head_dim": 4,
            }
        ),
        _seed({"model_type": "x", "text_config": _LLAMA}),
    ],
    "configuration": [
        _seed(
            {"model_id": "a/b", "device_map": "auto", "max_memory": {"0": "6GB", "cpu": "90%"}, "load_in_4bit": True}
        ),
        _seed(
            {"device_map": {"": "cpu", "model.layers.0": 0}, "pipeline_kwargs": {"max_new_tokens": 4, "stop": ["a"]}}
        ),
        b'\xef\xbb\xbf{"gpu_layers_fallback": 1e400, "x": NaN}',
    ],
    "environment": [b"0=6GB,cpu=90%", b'{"": "cpu"}', b"true", b"12"],
    "units": [b"6GB", b"6.5GiB", b"90%", b"6Gb", b"1" * 40],
    "journal": [
        _seed(
            [{"id": "a", "timestamp": "2025-03-02T19:40:00", "text": "x", "title": "t", "tags": ["g"], "mood": "calm"}]
        ),
        _seed(
            {
                "entries": [
                    {
                        "id": 1,
                        "journal_entry": {
                            "timestamp": "2025-03-02",
                            "label": "l",
                            "description": "d",
                            "key_insights": ["k"],
                        },
                    }
                ]
            }
        ),
    ],
    "caches": [
        _seed(
            {
                "format": framework.JSON_FORMAT,
                "versions": framework._versions(),
                "costs": {"main_memory": 1, "quantization": 0, "gpus": {"cuda:0": 5}, "measured": True},
            }
        ),
        _seed(
            {
                "format": trial.JSON_FORMAT,
                "trials": {"k": {"kv_cache": [1], "activations": {"embedding": 1, "layer": 1, "head": 1}}},
            }
        ),
        _seed(_RATES),
    ],
    "packed": [
        b"".join(
            packed_files._parts([("a.codes", "U8", memoryview(bytes(64))), ("a.scales", "F16", memoryview(b"12"))])
        ),
        _seed(
            {
                "format": packed_files.FORMAT,
                "model": "m",
                "directory": "/d",
                "quantization": "4bit",
                "weights": "0" * 64,
            }
        ),
    ],
    "listing": [
        _seed(
            {
                "sha": "0" * 40,
                "gated": False,
                "siblings": [{"rfilename": "config.json", "size": 2}, {"rfilename": "model.safetensors", "size": 9}],
            }
        )
    ],
}
WORDS = sorted(
    {
        word
        for seeds in SEEDS.values()
        for seed in seeds
        for word in seed.decode("utf-8", "replace").split('"')[1::2]
        if 1 < len(word) < 30 and word.isascii() and word.isprintable()
    }
)
"""Keys and values that a mutation would not find by chance."""

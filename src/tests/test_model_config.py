"""The configuration's keys, their checks, and the order of their sources."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lyra_emergence.config import (
    CONFIG_LOCATIONS,
    ModelConfig,
    budget_bytes,
    config_schema,
    device_key,
    load_config,
    resolve_config,
    save_config,
)
from lyra_emergence.config.generation import GENERATION_SETTINGS
from lyra_emergence.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "config/model_config.json"
FIELDS = (
    "model_id",
    "task",
    "device_map",
    "max_memory",
    "low_cpu_mem_usage",
    "gpu_layers_fallback",
    "enable_progressive_fallback",
    "load_in_8bit",
    "load_in_4bit",
    "allow_quantization",
    "pipeline_kwargs",
    "dtype",
    "context_length",
    "cpu_kernels",
    "prompt_streaming",
    "prefill_chunk",
    "compile_decode",
    "packed_cache",
    "distributed",
    "embedding_model",
    "rerank_model",
    "trust_remote_code",
)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of the developer's: an empty current directory and no LYRA_ variable."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LYRA_")]:
        monkeypatch.delenv(name)


def write(path: str | Path, content: dict[str, Any]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def problems_of(**values: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**values)
    return caught.value.problems


# The model


def test_the_keys_and_their_defaults() -> None:
    assert tuple(ModelConfig.model_fields) == FIELDS
    assert ModelConfig().model_dump() == {
        "model_id": "microsoft/phi-2",
        "task": "text-generation",
        "device_map": None,
        "max_memory": None,
        "low_cpu_mem_usage": True,
        "gpu_layers_fallback": None,
        "enable_progressive_fallback": True,
        "load_in_8bit": False,
        "load_in_4bit": False,
        "allow_quantization": False,
        "pipeline_kwargs": None,
        "dtype": None,
        "context_length": None,
        "cpu_kernels": True,
        "prompt_streaming": True,
        "prefill_chunk": None,
        "compile_decode": False,
        "packed_cache": "20GB",
        "distributed": None,
        "embedding_model": None,
        "rerank_model": None,
        "trust_remote_code": False,
    }


def test_the_documented_call() -> None:
    config = ModelConfig(device_map="auto", gpu_layers_fallback=16, max_memory={"0": "8GB", "cpu": "16GB"})
    assert (config.device_map, config.gpu_layers_fallback) == ("auto", 16)
    assert config.max_memory == {"0": "8GB", "cpu": "16GB"}


def test_the_documented_import_path() -> None:
    from src.config import model_config

    assert model_config.ModelConfig is ModelConfig
    assert model_config.load_config is load_config
    assert model_config.save_config is save_config
    assert model_config.resolve_config is resolve_config


def test_a_call_reads_neither_environment_nor_files(monkeypatch: pytest.MonkeyPatch) -> None:
    write("model_config.json", {"model_id": "from/file"})
    monkeypatch.setenv("LYRA_MODEL_ID", "from/environment")
    assert ModelConfig().model_id == "microsoft/phi-2"


def test_model_kwargs_of_the_defaults() -> None:
    assert ModelConfig().to_model_kwargs() == {"low_cpu_mem_usage": True}
    assert ModelConfig(low_cpu_mem_usage=False, dtype="auto", max_memory={}).to_model_kwargs() == {}


def test_model_kwargs_in_the_form_that_hugging_face_reads() -> None:
    limits = {"0": "6GB", "cpu": "1.5GiB", "disk": 5, "mps": "90%", "xpu:1": "1 MB"}
    config = ModelConfig(device_map="auto", max_memory=limits, load_in_4bit=True, dtype="bf16")
    assert config.to_model_kwargs() == {
        "device_map": "auto",
        "max_memory": {0: 6_000_000_000, "cpu": 1_610_612_736, "disk": 5, "mps": "90%", "xpu:1": 1_000_000},
        "low_cpu_mem_usage": True,
        "load_in_4bit": True,
        "dtype": "bfloat16",
    }
    assert ModelConfig(load_in_8bit=True).to_model_kwargs()["load_in_8bit"] is True


def test_pipeline_kwargs() -> None:
    assert ModelConfig().to_pipeline_kwargs() == {}
    assert ModelConfig(pipeline_kwargs={"top_k": 5}).to_pipeline_kwargs() == {"top_k": 5}


def test_kwargs_are_copies() -> None:
    config = ModelConfig(device_map={"model": 0}, max_memory={"0": 1}, pipeline_kwargs={"stop": ["a"]})
    config.to_pipeline_kwargs()["stop"].append("b")
    config.to_model_kwargs()["device_map"]["model"] = "cpu"
    assert config.to_pipeline_kwargs() == {"stop": ["a"]}
    assert config.device_map == {"model": 0}


def test_the_callers_dict_is_neither_kept_nor_changed() -> None:
    mine: dict[Any, Any] = {0: "6GB", "cuda:1": "7GB"}
    config = ModelConfig(max_memory=mine)
    assert mine == {0: "6GB", "cuda:1": "7GB"}
    mine["cpu"] = "1GB"
    assert config.max_memory == {"0": "6GB", "1": "7GB"}


def test_copies_and_pickles_are_equal() -> None:
    config = ModelConfig(max_memory={"0": "8GB"}, pipeline_kwargs={"stop": ["a"]})
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert ModelConfig.model_validate(config.model_dump()) == config


# Assignment


def test_an_assignment_is_checked_and_normalized() -> None:
    config = ModelConfig()
    config.gpu_layers_fallback = 8
    config.max_memory = {"cuda:0": "8GB"}
    assert (config.gpu_layers_fallback, config.max_memory) == (8, {"0": "8GB"})


def test_a_wrong_assignment_changes_nothing() -> None:
    config = ModelConfig(load_in_8bit=True)
    for key, value, problem in (
        (
            "gpu_layers_fallback",
            "8",
            "in 'gpu_layers_fallback': '8' is text; write a whole number of at least 0, such as 16, or null",
        ),
        ("load_in_4bit", True, "in 'load_in_8bit' and 'load_in_4bit': both are true; set one of them to false"),
        ("gpu_layer_fallback", 8, "unknown key 'gpu_layer_fallback'; did you mean 'gpu_layers_fallback'?"),
    ):
        with pytest.raises(ConfigError) as caught:
            setattr(config, key, value)
        assert caught.value.problems == (problem,)
    assert config == ModelConfig(load_in_8bit=True)
    assert not hasattr(config, "gpu_layer_fallback")


# What is wrong with a value


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"gpu_layer_fallback": 1}, "unknown key 'gpu_layer_fallback'; did you mean 'gpu_layers_fallback'?"),
        ({"torch_dtype": "auto"}, "unknown key 'torch_dtype'; did you mean 'dtype'?"),
        ({"max_new_tokens": 9}, "unknown key 'max_new_tokens'; write it inside 'pipeline_kwargs'"),
        ({"zzz": 1}, f"unknown key 'zzz'; the keys are {', '.join(FIELDS)}"),
        ({"z\x1b[31m": 1}, f"unknown key 'z\\x1b[31m'; the keys are {', '.join(FIELDS)}"),
        ({"model_id": 3}, "in 'model_id': 3 is a number; write text, such as 'microsoft/phi-2'"),
        ({"model_id": None}, "in 'model_id': null is not allowed; write text, such as 'microsoft/phi-2'"),
        ({"model_id": " "}, "in 'model_id': the text is empty; write one such as 'microsoft/phi-2'"),
        ({"model_id": "a\n"}, "in 'model_id': 'a\\n' has blanks around it or control characters; remove them"),
        ({"task": "summarization"}, "in 'task': 'summarization' is not a task that Lyra runs; write 'text-generation'"),
        ({"low_cpu_mem_usage": 1}, "in 'low_cpu_mem_usage': 1 is a number; write true or false"),
        ({"load_in_8bit": "true"}, "in 'load_in_8bit': 'true' is text; write true or false"),
        (
            {"embedding_model": ""},
            "in 'embedding_model': the text is empty; write one such as 'sentence-transformers/all-MiniLM-L6-v2'",
        ),
        (
            {"rerank_model": 3},
            "in 'rerank_model': 3 is a number; write text, such as 'cross-encoder/ms-marco-MiniLM-L6-v2'",
        ),
        ({"packed_cache": True}, "in 'packed_cache': true is a boolean; write a size, such as '20GB', or 0 for none"),
        ({"packed_cache": None}, "in 'packed_cache': null is not allowed; write a size, such as '20GB', or 0 for none"),
        ({"packed_cache": "10%"}, "in 'packed_cache': '10%' is a share; write a size such as '20GB', or 0 for none"),
        ({"packed_cache": "5Gb"}, "in 'packed_cache': '5Gb' is bits; write '5GB'"),
        ({"packed_cache": -1}, "in 'packed_cache': -1 is negative; write '6GB'"),
        ({"trust_remote_code": None}, "in 'trust_remote_code': null is not allowed; write true or false"),
        (
            {"gpu_layers_fallback": True},
            "in 'gpu_layers_fallback': true is a boolean; write a whole number of at least 0, such as 16, or null",
        ),
        (
            {"gpu_layers_fallback": -1},
            "in 'gpu_layers_fallback': -1 is too small; write a whole number of at least 0, such as 16, or null",
        ),
        (
            {"context_length": 16.0},
            "in 'context_length': 16.0 has a decimal point; write a whole number of at least 1, such as 2048, or null",
        ),
        (
            {"context_length": 0},
            "in 'context_length': 0 is too small; write a whole number of at least 1, such as 2048, or null",
        ),
        (
            {"context_length": 2**31},
            "in 'context_length': 2147483648 is too large; write a whole number of at least 1, such as 2048, or null",
        ),
        ({"dtype": "bfloat"}, "in 'dtype': 'bfloat' is not a dtype that Lyra computes in; did you mean 'bfloat16'?"),
        (
            {"dtype": "int8"},
            (
                "in 'dtype': 'int8' is not a dtype that Lyra computes in; "
                "to quantize, set 'load_in_8bit' or 'load_in_4bit'"
            ),
        ),
        ({"dtype": 16}, "in 'dtype': 16 is a number; write 'bfloat16', 'float16', 'float32', 'auto' or null"),
        (
            {"load_in_8bit": True, "load_in_4bit": True},
            "in 'load_in_8bit' and 'load_in_4bit': both are true; set one of them to false",
        ),
        ({"$schema": 3}, "in '$schema': 3 is a number; write the address of a JSON Schema, or remove it"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(values: dict[str, Any], problem: str) -> None:
    assert problems_of(**values) == (problem,)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"0": "6Gb"}, "in 'max_memory.0': '6Gb' is bits; write '6GB'"),
        ({"0": "6gib"}, "in 'max_memory.0': '6gib' is bits; write '6GiB'"),
        ({0: "6G"}, "in 'max_memory.0': '6G' has no unit; write '6GB' or '6GiB'"),
        ({"cpu": "-1GB"}, "in 'max_memory.cpu': '-1GB' is not an amount of memory; write '6GB' or '6GiB'"),
        ({"cpu": -1}, "in 'max_memory.cpu': -1 is negative; write '6GB'"),
        ({"cpu": "101%"}, "in 'max_memory.cpu': '101%' is more than the device has; write at most '100%'"),
        ({"cpu": "9" * 33}, f"in 'max_memory.cpu': '{'9' * 33}' is not an amount of memory; write '6GB' or '6GiB'"),
        ({"cpu": 2**63}, "in 'max_memory.cpu': 9223372036854775808 is more than any device has; write '6GB' or '90%'"),
        (
            {"cpu": 6e9},
            "in 'max_memory.cpu': 6000000000.0 is a number; write an amount of memory, such as '6GB' or '90%'",
        ),
        ({"cpu": True}, "in 'max_memory.cpu': true is a boolean; write an amount of memory, such as '6GB' or '90%'"),
        ({"cpu": None}, "in 'max_memory.cpu': null is not allowed; write an amount of memory, such as '6GB' or '90%'"),
        ({"gpu": "6GB"}, "in 'max_memory.gpu': 'gpu' is not a device; did you mean 'cuda'?"),
        ({"cuda:x": "6GB"}, "in 'max_memory.cuda:x': 'cuda:x' is not a device; did you mean 'cuda:0'?"),
        ({"CPU": "6GB"}, "in 'max_memory.CPU': 'CPU' is not a device; did you mean 'cpu'?"),
        ({-1: "6GB"}, "in 'max_memory.-1': -1 is not a device; write 'cpu', or 'cuda:0' for the first GPU"),
        ({"-1": "6GB"}, "in 'max_memory.-1': '-1' is not a device; write 'cpu', or 'cuda:0' for the first GPU"),
        ({"00": "6GB"}, "in 'max_memory.00': '00' is not a device; write 'cpu', or 'cuda:0' for the first GPU"),
        ({"disk:0": "6GB"}, "in 'max_memory.disk:0': 'disk:0' is not a device; did you mean 'disk'?"),
        ({"qq": 1}, "in 'max_memory.qq': 'qq' is not a device; write '0', 'cuda:0', 'mps', 'cpu' or 'disk'"),
        ({"0": "6GB", "cuda:0": "7GB"}, "in 'max_memory.cuda:0': 'cuda:0' and '0' are one device; keep one"),
        ({"0": "6GB", 0: "7GB"}, "in 'max_memory.0': 0 and '0' are one device; keep one"),
    ],
)
def test_a_wrong_limit_is_named_with_its_remedy(limits: dict[Any, Any], problem: str) -> None:
    assert problems_of(max_memory=limits) == (problem,)


def test_limits_must_be_an_object() -> None:
    expected = """in 'max_memory': '6GB' is text; write an object such as {"0": "6GB", "cpu": "16GB"}, or null"""
    assert problems_of(max_memory="6GB") == (expected,)


@pytest.mark.parametrize(
    ("placement", "problem"),
    [
        ("gpu", "in 'device_map': 'gpu' is not a device map; did you mean 'cuda'?"),
        ("atuo", "in 'device_map': 'atuo' is not a device map; did you mean 'auto'?"),
        ("cuda:x", "in 'device_map': 'cuda:x' is not a device map; did you mean 'cuda:0'?"),
        ("gpu:1", "in 'device_map': 'gpu:1' is not a device map; did you mean 'cuda:1'?"),
        ("0", "in 'device_map': '0' is not a device map; did you mean 'cuda:0'?"),
        ("-1", "in 'device_map': '-1' is not a device map; write 'cpu', or 'cuda:0' for the first GPU"),
        (
            "disk",
            (
                "in 'device_map': 'disk' holds weights and computes nothing; "
                "write 'cpu' and limit max_memory.cpu: what exceeds it is read from disk"
            ),
        ),
        (
            -1,
            (
                "in 'device_map': -1 is a number; "
                "write 'auto', 'cpu', 'cuda:0', 'mps', an object of module names and devices, or null"
            ),
        ),
        ({}, "in 'device_map': the map names no module; write null or 'auto'"),
        ({"lm_head": -1}, "in 'device_map.lm_head': -1 is not a device; write 'cpu', or 'cuda:0' for the first GPU"),
        ({"lm_head": "gpu"}, "in 'device_map.lm_head': 'gpu' is not a device; did you mean 'cuda'?"),
        ({"lm_head": "cuda:x"}, "in 'device_map.lm_head': 'cuda:x' is not a device; did you mean 'cuda:0'?"),
        (
            {"lm_head": True},
            "in 'device_map.lm_head': true is a boolean; write '0', 'cuda:0', 'mps', 'cpu' or 'disk'",
        ),
        (
            {"model..norm": 0},
            "in 'device_map.model..norm': 'model..norm' is not a module name; write one such as 'model.layers.0'",
        ),
    ],
)
def test_a_wrong_placement_is_named_with_its_remedy(placement: Any, problem: str) -> None:
    assert problems_of(device_map=placement) == (problem,)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_new_tokens": 0}, ".max_new_tokens': 0 is too small; write a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, ".max_new_tokens': 2.5 is not a whole number of at least 1"),
        ({"max_new_tokens": "4000"}, ".max_new_tokens': '4000' is text; write a whole number of at least 1"),
        ({"temperature": -0.1}, ".temperature': -0.1 is too small; write a number of at least 0"),
        ({"temperature": float("nan")}, ".temperature': nan is not a number of at least 0"),
        ({"temperature": float("inf")}, ".temperature': inf is not a number of at least 0"),
        ({"top_p": 0}, ".top_p': 0 is too small; write a number above 0 and at most 1"),
        ({"top_p": 1.5}, ".top_p': 1.5 is too large; write a number above 0 and at most 1"),
        ({"top_k": -1}, ".top_k': -1 is too small; write a whole number of at least 0"),
        (
            {"top_k": 10**400},
            ".top_k': a number of more than 30 digits is too large; write a whole number of at least 0",
        ),
        ({"repetition_penalty": 0}, ".repetition_penalty': 0 is too small; write a number above 0"),
        ({"do_sample": 1}, ".do_sample': 1 is a number; write true or false"),
        ({"return_full_text": None}, ".return_full_text': null is not allowed; write true or false"),
        ({"stop": ["a", 3]}, ".stop.1': 3 is a number; write text"),
        ({"stop": [""]}, ".stop.0': an empty text would end every answer at once; remove it"),
        ({"stop": 3}, """.stop': 3 is a number; write a list of texts, such as ["User:"]"""),
        ({"temperatur": 1}, "': unknown key 'temperatur'; did you mean 'temperature'?"),
        ({"temp": 1}, "': unknown key 'temp'; did you mean 'temperature'?"),
        ({"max_length": 1}, "': unknown key 'max_length'; write 'max_new_tokens'"),
        (
            {"num_beams": 4},
            "': unknown key 'num_beams'; Lyra generates one sequence, greedily or by sampling; remove it",
        ),
        ({"qqq": 4}, f"': unknown key 'qqq'; Lyra honors {', '.join(GENERATION_SETTINGS)}"),
    ],
)
def test_a_wrong_generation_setting_is_named_with_its_remedy(settings: dict[str, Any], problem: str) -> None:
    assert problems_of(pipeline_kwargs=settings) == (f"in 'pipeline_kwargs{problem}",)


def test_one_error_lists_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(gpu_layer_fallback=3, max_memory={"0": "6Gb", "gpu": "3GB"}, load_in_8bit=1)
    assert str(caught.value) == (
        "the configuration has 4 problems:\n"
        "  unknown key 'gpu_layer_fallback'; did you mean 'gpu_layers_fallback'?\n"
        "  in 'max_memory.0': '6Gb' is bits; write '6GB'\n"
        "  in 'max_memory.gpu': 'gpu' is not a device; did you mean 'cuda'?\n"
        "  in 'load_in_8bit': 1 is a number; write true or false"
    )
    assert caught.value.exit_code == 2


# What is right, and the form in which it is kept


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (0, "0"),
        ("0", "0"),
        ("cuda", "0"),
        ("cuda:0", "0"),
        ("cuda:12", "12"),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("disk", "disk"),
        ("mps", "mps"),
        ("mps:0", "mps"),
        ("xpu", "xpu:0"),
        ("xpu:1", "xpu:1"),
    ],
)
def test_a_device_has_one_form(written: str | int, kept: str) -> None:
    assert device_key(written) == kept


def test_amounts_stay_as_written() -> None:
    limits = {"0": "6GB", "1": "6GiB", "cpu": 17, "disk": "90%", "mps": 0, "2": "0%", "3": "500 MB"}
    assert ModelConfig(max_memory=limits).max_memory == limits


def test_budget_bytes() -> None:
    assert budget_bytes("6GB", 0) == 6_000_000_000
    assert budget_bytes("6GiB", 0) == 6_442_450_944
    assert budget_bytes(17, 0) == 17
    assert budget_bytes("90%", 8_000_000_001) == 7_200_000_000
    with pytest.raises(ValueError, match=re.escape("'6Gb' is bits; write '6GB'")):
        budget_bytes("6Gb", 0)


@pytest.mark.parametrize(
    "written", ["auto", "balanced", "balanced_low_0", "sequential", "cuda", "cuda:1", "mps", "xpu"]
)
def test_a_placement_of_one_word_stays_as_written(written: str) -> None:
    assert ModelConfig(device_map=written).device_map == written


def test_the_documented_custom_map() -> None:
    placement = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.16": "cpu", "lm_head": "cpu"}
    assert ModelConfig(device_map=placement).device_map == placement


def test_devices_of_a_custom_map_have_one_form() -> None:
    placement = {"a": "0", "b": "cuda:1", "c": "disk", "d": "xpu", "": "cpu"}
    assert ModelConfig(device_map=placement).device_map == {"a": 0, "b": 1, "c": "disk", "d": "xpu:0", "": "cpu"}


@pytest.mark.parametrize(
    ("written", "kept"),
    [("bf16", "bfloat16"), ("torch.float16", "float16"), ("fp32", "float32"), ("auto", None), (None, None)],
)
def test_a_dtype_has_one_form(written: str | None, kept: str | None) -> None:
    assert ModelConfig(dtype=written).dtype == kept


def test_a_dtype_of_torch_itself() -> None:
    import torch

    assert ModelConfig(dtype=torch.bfloat16).dtype == "bfloat16"


def test_every_generation_setting() -> None:
    settings = {
        "max_new_tokens": 1,
        "do_sample": True,
        "temperature": 0,
        "top_k": 0,
        "top_p": 1,
        "repetition_penalty": 1.1,
        "max_repeats": 3,
        "stop": ["User:", "\n\n"],
        "seed": 0,
        "return_full_text": False,
    }
    assert list(settings) == list(GENERATION_SETTINGS)
    assert ModelConfig(pipeline_kwargs=settings).pipeline_kwargs == settings
    assert ModelConfig(pipeline_kwargs={"stop": "User:"}).pipeline_kwargs == {"stop": ["User:"]}


# The sources, from the lowest to the highest


def test_without_a_file_the_defaults_hold() -> None:
    resolved = resolve_config(environ={})
    assert resolved.config == ModelConfig()
    assert resolved.path is None
    assert dict(resolved.origins) == dict.fromkeys(FIELDS, "default")
    assert load_config() == ModelConfig()


def test_the_documented_example_loads_as_it_is() -> None:
    resolved = resolve_config(EXAMPLE, environ={})
    assert resolved.config.model_dump(include=set(json.loads(EXAMPLE.read_text()))) == {
        "model_id": "microsoft/phi-2",
        "task": "text-generation",
        "device_map": "auto",
        "max_memory": {"0": "6GB", "cpu": "16GB"},
        "low_cpu_mem_usage": True,
        "gpu_layers_fallback": 16,
        "enable_progressive_fallback": True,
        "load_in_8bit": False,
        "load_in_4bit": False,
        "pipeline_kwargs": {"max_new_tokens": 4000, "do_sample": True, "temperature": 0.7},
    }


def test_the_documented_search_order(tmp_path: Path) -> None:
    assert CONFIG_LOCATIONS == ("config/model_config.json", "data/model_config.json", "model_config.json")
    for count, location in enumerate(reversed(CONFIG_LOCATIONS)):
        write(location, {"gpu_layers_fallback": count})
        resolved = resolve_config(environ={})
        assert (resolved.config.gpu_layers_fallback, resolved.path) == (count, Path(location))
    named = write("other.json", {"gpu_layers_fallback": 99})
    assert load_config(named).gpu_layers_fallback == 99
    assert load_config(str(named)).gpu_layers_fallback == 99
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "data/model_config.json", {"gpu_layers_fallback": 77})
    resolved = resolve_config(directory=elsewhere, environ={})
    assert (resolved.config.gpu_layers_fallback, resolved.path) == (77, elsewhere / "data/model_config.json")


def test_each_source_wins_over_the_ones_below() -> None:
    write("model_config.json", {"model_id": "file/a", "context_length": 1, "dtype": "bf16", "gpu_layers_fallback": 1})
    environ = {"LYRA_MODEL_ID": "env/a", "LYRA_CONTEXT_LENGTH": "2", "LYRA_DTYPE": "auto"}
    resolved = resolve_config(environ=environ, overrides={"model_id": "line/a"})
    config = resolved.config
    assert (config.model_id, config.context_length, config.dtype) == ("line/a", 2, None)
    assert (config.gpu_layers_fallback, config.load_in_8bit) == (1, False)
    origins = resolved.origins
    assert [origins[key] for key in ("model_id", "context_length", "dtype", "gpu_layers_fallback", "load_in_8bit")] == [
        "command line",
        "environment",
        "environment",
        "file",
        "default",
    ]


def test_load_config_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_MODEL_ID", "env/a")
    assert load_config().model_id == "env/a"


def test_origins_of_a_named_file_and_of_a_call() -> None:
    path = write("other.json", {"model_id": "file/a"})
    resolved = resolve_config(path, overrides={"dtype": "fp32"}, overrides_origin="call", environ={})
    assert (resolved.origins["model_id"], resolved.origins["dtype"], resolved.path) == ("named file", "call", path)


def test_limits_and_generation_settings_merge_entry_by_entry() -> None:
    limits = {"0": "6GB", "cpu": "16GB"}
    settings = {"top_k": 5, "stop": ["a", "b"]}
    write("model_config.json", {"max_memory": limits, "pipeline_kwargs": settings, "device_map": {"model": 0}})
    environ = {"LYRA_MAX_MEMORY": "cuda:0=4GB", "LYRA_PIPELINE_KWARGS": '{"stop": ["c"], "seed": 1}'}
    resolved = resolve_config(environ=environ, overrides={"max_memory": {"disk": "0"}, "device_map": "cpu"})
    assert resolved.config.max_memory == {"0": "4GB", "cpu": "16GB", "disk": "0"}
    assert resolved.config.pipeline_kwargs == {"top_k": 5, "stop": ["c"], "seed": 1}
    assert resolved.config.device_map == "cpu"
    assert {key: origin for key, origin in resolved.origins.items() if key.startswith("max_memory")} == {
        "max_memory": "command line",
        "max_memory.0": "environment",
        "max_memory.cpu": "file",
        "max_memory.disk": "command line",
    }
    assert resolved.origins["pipeline_kwargs"] == "environment"


def test_null_in_a_higher_source_clears_what_is_below() -> None:
    write("model_config.json", {"max_memory": {"0": "6GB"}, "gpu_layers_fallback": 3})
    environ = {"LYRA_MAX_MEMORY": "null", "LYRA_GPU_LAYERS_FALLBACK": "none"}
    resolved = resolve_config(environ=environ)
    assert (resolved.config.max_memory, resolved.config.gpu_layers_fallback) == (None, None)
    assert "max_memory.0" not in resolved.origins
    assert resolve_config(environ={}, overrides={"max_memory": None}).config.max_memory is None


def test_limits_as_the_command_line_writes_them() -> None:
    overrides = {"max_memory": "0=6GB, cpu=16GB"}
    assert resolve_config(environ={}, overrides=overrides).config.max_memory == {"0": "6GB", "cpu": "16GB"}


def test_a_contradiction_between_sources_names_both() -> None:
    write("model_config.json", {"load_in_8bit": True})
    with pytest.raises(ConfigError) as caught:
        resolve_config(environ={"LYRA_LOAD_IN_4BIT": "true"})
    assert caught.value.problems == (
        (
            "in 'load_in_8bit' (model_config.json) and 'load_in_4bit' (LYRA_LOAD_IN_4BIT): "
            "both are true; set one of them to false"
        ),
    )
    environ = {"LYRA_LOAD_IN_4BIT": "true", "LYRA_LOAD_IN_8BIT": "false"}
    assert resolve_config(environ=environ).config.load_in_4bit is True


def test_one_error_lists_the_problems_of_every_source() -> None:
    write("model_config.json", {"max_memory": {"0": "6Gb"}})
    with pytest.raises(ConfigError) as caught:
        resolve_config(environ={"LYRA_CONTEXT_LENGTH": "many"}, overrides={"taks": "x"})
    assert caught.value.problems == (
        "model_config.json: in 'max_memory.0': '6Gb' is bits; write '6GB'",
        (
            "LYRA_CONTEXT_LENGTH: in 'context_length': 'many' is text; "
            "write a whole number of at least 1, such as 2048, or null"
        ),
        "command line: unknown key 'taks'; did you mean 'task'?",
    )
    assert caught.value.hint == "'lyra.py config schema' describes every key"


# distributed


@pytest.mark.parametrize("sizes", [None, {}, {"tp_size": 2}, {"pp_size": 4}, {"tp_size": 1, "pp_size": 4096}])
def test_processes_that_share_a_model(sizes: dict[str, int] | None) -> None:
    assert ModelConfig(distributed=sizes).distributed == sizes


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (2, "in 'distributed': 2 is a number; write an object such as {\"tp_size\": 2}, or null"),
        (
            {"tp_size": "2"},
            "in 'distributed.tp_size': '2' is text; write a whole number of processes from 1 to 4096",
        ),
        (
            {"tp_size": True},
            "in 'distributed.tp_size': true is a boolean; write a whole number of processes from 1 to 4096",
        ),
        (
            {"pp_size": 2.0},
            "in 'distributed.pp_size': 2.0 has a decimal point; write a whole number of processes from 1 to 4096",
        ),
        ({"tp_size": 0}, "in 'distributed.tp_size': 0 is too small; write a whole number of processes from 1 to 4096"),
        (
            {"tp_size": 5000},
            "in 'distributed.tp_size': 5000 is too large; write a whole number of processes from 1 to 4096",
        ),
        ({"tp_sise": 2}, "in 'distributed': unknown key 'tp_sise'; did you mean 'tp_size'?"),
        ({"nodes": 2}, "in 'distributed': unknown key 'nodes'; the keys are tp_size, pp_size"),
        (
            {"fsdp_size": 2},
            (
                "in 'distributed': unknown key 'fsdp_size'; it divides a batch, and Lyra runs one sequence; "
                "write 'tp_size' or 'pp_size'"
            ),
        ),
        (
            {"tp_plan": "auto"},
            "in 'distributed': unknown key 'tp_plan'; the plan is the architecture's own; remove it",
        ),
    ],
)
def test_processes_that_cannot_be_are_named(value: Any, problem: str) -> None:
    assert problems_of(distributed=value) == (problem,)


# The environment


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("LYRA_MODEL_ID", "a/b", "model_id", "a/b"),
        ("LYRA_TASK", "text-generation", "task", "text-generation"),
        ("LYRA_DEVICE_MAP", "cuda:1", "device_map", "cuda:1"),
        ("LYRA_DEVICE_MAP", '{"model": "cuda:1"}', "device_map", {"model": 1}),
        ("LYRA_DEVICE_MAP", "null", "device_map", None),
        ("LYRA_MAX_MEMORY", "0=6GB,cpu=16GB", "max_memory", {"0": "6GB", "cpu": "16GB"}),
        ("LYRA_MAX_MEMORY", '{"0": "6GB", "cpu": 5}', "max_memory", {"0": "6GB", "cpu": 5}),
        ("LYRA_LOW_CPU_MEM_USAGE", "no", "low_cpu_mem_usage", False),
        ("LYRA_GPU_LAYERS_FALLBACK", "16", "gpu_layers_fallback", 16),
        ("LYRA_ENABLE_PROGRESSIVE_FALLBACK", "0", "enable_progressive_fallback", False),
        ("LYRA_LOAD_IN_8BIT", "1", "load_in_8bit", True),
        ("LYRA_LOAD_IN_4BIT", "TRUE", "load_in_4bit", True),
        ("LYRA_PIPELINE_KWARGS", '{"top_k": 5}', "pipeline_kwargs", {"top_k": 5}),
        ("LYRA_DTYPE", "bf16", "dtype", "bfloat16"),
        ("LYRA_CONTEXT_LENGTH", "2048", "context_length", 2048),
        ("LYRA_CPU_KERNELS", "off", "cpu_kernels", False),
        ("LYRA_PROMPT_STREAMING", "no", "prompt_streaming", False),
        ("LYRA_PREFILL_CHUNK", "4096", "prefill_chunk", 4096),
        ("LYRA_COMPILE_DECODE", "yes", "compile_decode", True),
        ("LYRA_PACKED_CACHE", "5GiB", "packed_cache", "5GiB"),
        ("LYRA_DISTRIBUTED", '{"tp_size": 2}', "distributed", {"tp_size": 2}),
        ("LYRA_DISTRIBUTED", "null", "distributed", None),
        ("LYRA_EMBEDDING_MODEL", "BAAI/bge-small-en-v1.5", "embedding_model", "BAAI/bge-small-en-v1.5"),
        ("LYRA_TRUST_REMOTE_CODE", "on", "trust_remote_code", True),
    ],
)
def test_every_key_has_a_variable(variable: str, text: str, key: str, value: Any) -> None:
    resolved = resolve_config(environ={variable: text})
    assert getattr(resolved.config, key) == value
    assert resolved.origins[key] == "environment"


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        (
            "LYRA_LOAD_IN_4BIT",
            "maybe",
            "in 'load_in_4bit': 'maybe' is neither true nor false; write 'true' or 'false'",
        ),
        ("LYRA_MAX_MEMORY", "6GB", "in 'max_memory': '6GB' is not a device and its limit; write '0=6GB,cpu=16GB'"),
        ("LYRA_MAX_MEMORY", "0=6Gb", "in 'max_memory.0': '6Gb' is bits; write '6GB'"),
        ("LYRA_MAX_MEMORY", "0=6GB,0=7GB", "in 'max_memory.0': the device stands twice; keep one"),
        (
            "LYRA_PIPELINE_KWARGS",
            '{"top_k" 5}',
            "in 'pipeline_kwargs': not valid JSON: expecting ':' delimiter at line 1, column 10",
        ),
        (
            "LYRA_PIPELINE_KWARGS",
            "[1]",
            """in 'pipeline_kwargs': a list where an object belongs; write {"key": value, ...}""",
        ),
        (
            "LYRA_PIPELINE_KWARGS",
            '{"top_k": 5, "top_k": 6}',
            "in 'pipeline_kwargs.top_k': the key stands twice; keep one",
        ),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config(environ={variable: text})
    assert caught.value.problems == (f"{variable}: {problem}",)


def test_an_empty_variable_counts_as_not_set() -> None:
    assert resolve_config(environ={"LYRA_MODEL_ID": "", "LYRA_MAX_MEMORY": " "}).origins["model_id"] == "default"


def test_a_variable_that_looks_like_a_slip_is_a_note() -> None:
    resolved = resolve_config(environ={"LYRA_MODEL": "x", "LYRA_HOME": "/x", "LYRA_MAX_MEMORI": "0=1GB"})
    assert resolved.config == ModelConfig()
    assert resolved.notes == (
        "LYRA_MAX_MEMORI is not read; did you mean LYRA_MAX_MEMORY?",
        "LYRA_MODEL is not read; did you mean LYRA_MODEL_ID?",
    )


# The schema


def test_the_shipped_schema_is_the_models() -> None:
    shipped = ROOT / "src/lyra_emergence/config/model_config.schema.json"
    assert json.loads(shipped.read_text()) == config_schema()


def test_the_schema_describes_every_key() -> None:
    properties = config_schema()["properties"]
    assert tuple(properties) == ("$schema", *FIELDS)
    assert all(described["description"] for described in properties.values())
    assert "$defs" not in config_schema()


def test_the_schemas_patterns_agree_with_the_checks() -> None:
    properties = config_schema()["properties"]
    limits = properties["max_memory"]["anyOf"][0]
    device, amount = limits["propertyNames"]["pattern"], limits["additionalProperties"]["anyOf"][1]["pattern"]
    one_device = properties["device_map"]["anyOf"][0]["pattern"]
    for text in (
        "0",
        "7",
        "00",
        "-1",
        "cuda",
        "cuda:0",
        "cuda:x",
        "cpu",
        "cpu:0",
        "cpu:1",
        "mps",
        "disk",
        "disk:0",
        "gpu",
    ):
        assert bool(re.search(device, text)) is _accepted(max_memory={text: 1}), text
        assert bool(re.search(one_device, text)) is _accepted(device_map=text), text
    for text in ("6GB", "6GiB", "6Gb", "6G", "90%", "0", "1.5GB", "6 GB", "-1", "6XB", "", "6B", "1e3"):
        assert bool(re.search(amount, text)) is _accepted(max_memory={"0": text}), text


def _accepted(**values: Any) -> bool:
    try:
        ModelConfig(**values)
    except ConfigError:
        return False
    return True


def test_a_schema_reference_is_accepted_and_not_kept() -> None:
    path = write("a.json", {"$schema": "./model_config.schema.json", "model_id": "a/b"})
    assert load_config(path) == ModelConfig(model_id="a/b")
    assert ModelConfig(**{"$schema": "x"}) == ModelConfig()


# Import


def test_importing_the_configuration_needs_no_torch() -> None:
    code = (
        "import sys, lyra_emergence.config as c\n"
        "c.resolve_config(environ={'LYRA_MAX_MEMORY': '0=6GB'})\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic_settings', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

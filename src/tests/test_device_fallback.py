"""The documented loading functions, at their documented path, with real loaders on the simulated accelerator."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from langchain_huggingface import ChatHuggingFace, HuggingFaceEmbeddings, HuggingFacePipeline
from transformers import AutoModelForCausalLM

from lyra_emergence.errors import ConfigError, DoesNotFitError, MissingExtraError, ModelUnavailableError
from lyra_emergence.langchain import LyraPipeline
from src.config.model_config import ModelConfig
from src.utils import device_fallback
from src.utils.device_fallback import (
    safe_load_embeddings,
    safe_load_model,
    safe_load_model_with_config,
    safe_load_pipeline,
    safe_load_pipeline_legacy,
)

from .families import PROMPT, STORY, make_tokenizer
from .standin_hub import StandInHub

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

LOGGER = "src.utils.device_fallback"
REST = STORY.removeprefix(PROMPT)
TASK = "text-generation"
WHOLE_ON_0 = {"": 0}
from_pretrained = AutoModelForCausalLM.from_pretrained


def recite(model: Any) -> str:
    ids = make_tokenizer()(PROMPT, return_tensors="pt").input_ids.to(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False)
    return str(make_tokenizer().decode(out[0], skip_special_tokens=True))


def on(llm: LyraPipeline, device: str) -> int:
    """How many layers are on a device."""
    return sum(".layers." in block.name and block.device == device for block in llm.loaded.blocks)


def write_config(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration file is found unless a test writes one."""
    monkeypatch.chdir(tmp_path)


class Recorder:
    """A loader that takes any keyword, runs out of memory as often as it is told to, and keeps what it was given."""

    def __init__(self, *failures: Exception) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._failures = list(failures)

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append((args, kwargs))
        if self._failures:
            raise self._failures.pop(0)
        return "the model"

    @property
    def keywords(self) -> list[dict[str, Any]]:
        return [kwargs for _, kwargs in self.calls]


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# The documented interface.


def test_the_signatures_are_the_documented_ones() -> None:
    anything = "*args: 'Any', **kwargs: 'Any')"
    loader = "model_loader: 'Callable[..., T]'"
    named = "model_id: 'str', task: 'str'"
    assert [(name, str(inspect.signature(getattr(device_fallback, name)))) for name in device_fallback.__all__] == [
        ("safe_load_embeddings", "(**kwargs: 'Any') -> 'HuggingFaceEmbeddings'"),
        ("safe_load_model", f"({loader}, {anything} -> 'T'"),
        (
            "safe_load_model_with_config",
            f"({loader}, config: 'ModelConfig | None' = None, {anything} -> 'T'",
        ),
        (
            "safe_load_pipeline",
            f"({named}, config_path: 'str | Path | None' = None, **kwargs: 'Any') -> 'LyraPipeline'",
        ),
        ("safe_load_pipeline_legacy", f"({named}, **kwargs: 'Any') -> 'HuggingFacePipeline'"),
    ]


def test_the_same_functions_through_the_installed_package(checkpoints: Checkpoints) -> None:
    import lyra_emergence

    llm = lyra_emergence.safe_load_pipeline(str(checkpoints("llama")), TASK, device_map="cpu")
    assert isinstance(llm, lyra_emergence.LyraPipeline)
    llm.loaded.close()
    assert lyra_emergence.safe_load_model(lambda: 5) == 5
    assert lyra_emergence.safe_load_model_with_config(lambda: 6, lyra_emergence.ModelConfig()) == 6


# safe_load_pipeline.


def test_each_step_down_is_logged_under_the_documented_name(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(tmp_path / "named.json", gpu_layers_fallback=2, pipeline_kwargs={"max_new_tokens": 100})
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    # Embeddings, then 9 tensors a layer: memory runs out in the third layer.
    sim.fail_at(25)
    llm = safe_load_pipeline(model_id=str(checkpoints("llama")), task=TASK, config_path=str(path))
    assert isinstance(llm, HuggingFacePipeline)
    assert [(a.rung, a.outcome) for a in llm.report.attempts] == [("full", "out of memory"), ("fallback", "loaded")]
    assert (on(llm, "sim:0"), on(llm, "cpu")) == (2, 2)
    records = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == LOGGER]
    assert ("WARNING", "full: out of memory on sim:0 at model.layers.2") in records
    assert ("DEBUG", "model.layers.1 is on sim:0") in records
    assert records[0] == ("DEBUG", "llama is open, 39 tensors mapped")
    assert records[-1][0] == "INFO"
    assert records[-1][1].startswith("ready on rung 'fallback' in ")
    assert llm.invoke(PROMPT) == REST
    llm.loaded.close()


def test_without_debug_only_the_fallback_is_told(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, caplog: pytest.LogCaptureFixture
) -> None:
    sim.fail_at(1, persistent=True)
    llm = safe_load_pipeline(str(checkpoints("llama")), TASK, model_kwargs={"gpu_layers_fallback": 2})
    assert llm.report.rung == "cpu"
    told = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert [message.partition(" at ")[0] for message in told] == [
        "full: out of memory on sim:0",
        "fallback: out of memory on sim:0",
    ]
    assert llm.invoke(PROMPT, max_new_tokens=100) == REST
    llm.loaded.close()


def test_the_file_of_the_documented_places_is_found(checkpoints: Checkpoints, tmp_path: Path) -> None:
    write_config(tmp_path / "model_config.json", device_map="cpu", pipeline_kwargs={"stop": ["Three"]})
    llm = safe_load_pipeline(str(checkpoints("llama")), TASK)
    assert llm.invoke(PROMPT) == REST[: REST.index("Three")]
    llm.loaded.close()


def test_the_call_stands_above_the_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "c.json",
        model_id="nobody/nothing",
        device_map="auto",
        dtype="float16",
        pipeline_kwargs={"max_new_tokens": 7, "stop": ["Three"]},
    )
    llm = safe_load_pipeline(
        str(checkpoints("llama")),
        TASK,
        path,
        device=-1,
        model_kwargs={"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True, "use_safetensors": True},
        pipeline_kwargs={"max_new_tokens": 100},
        batch_size=2,
        tags=["journal"],
    )
    config = llm.loaded.config
    assert (config.device_map, config.dtype, llm.batch_size, llm.tags) == ("cpu", "bfloat16", 2, ["journal"])
    assert llm.loaded.model.dtype == torch.bfloat16
    assert llm.pipeline_kwargs == {"max_new_tokens": 100, "stop": ["Three"]}
    assert llm.invoke(PROMPT) == REST[: REST.index("Three")]
    llm.loaded.close()


def test_no_fallback_is_the_users_error_with_the_remedy(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "c.json", enable_progressive_fallback=False)
    sim.fail_at(10)
    with pytest.raises(DoesNotFitError, match=r"^out of memory on sim:0 while loading 'llama': SIM out") as caught:
        safe_load_pipeline(str(checkpoints("llama")), TASK, path)
    assert caught.value.hint == 'set "enable_progressive_fallback": true, or a lower "max_memory"'
    assert sim.used(0) == 0


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ({"task": "summarization"}, ["call: in 'task': 'summarization' is not a task that Lyra runs; write 'text-gen"]),
        ({"device": 0, "device_map": "auto"}, ["'device' and 'device_map' together: keep one"]),
        (
            {"device_map": "auto", "model_kwargs": {"device_map": "cpu"}},
            ["'device_map' and 'model_kwargs.device_map' together: keep one"],
        ),
        ({"backend": "openvino", "colour": 1}, ["'backend' 'openvino'", "'colour'"]),
        (
            {"model_kwargs": {"quantization_config": {"load_in_4bit": True}}},
            ["'quantization_config': write 'load_in_8bit': True or 'load_in_4bit': True"],
        ),
        ({"model_kwargs": {"dtype": "int3"}}, ["call: in 'dtype': "]),
        (
            {"pipeline_kwargs": {"max_length": 5}},
            ["call: in 'pipeline_kwargs': unknown key 'max_length'; write 'max_new_tokens'"],
        ),
    ],
)
def test_what_cannot_be_honored_is_named(
    arguments: dict[str, Any], problems: list[str], checkpoints: Checkpoints
) -> None:
    with pytest.raises(ConfigError) as caught:
        safe_load_pipeline(**{"model_id": str(checkpoints("llama")), "task": TASK, **arguments})
    assert len(caught.value.problems) == len(problems)
    assert all(found.startswith(said) for found, said in zip(caught.value.problems, problems, strict=True))


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        safe_load_pipeline("any", TASK, tmp_path / "nowhere.json")


def test_a_model_that_may_not_be_downloaded_is_an_error() -> None:
    with pytest.raises(ModelUnavailableError, match=r"^no/such is not on this machine, and 'local_files_only' forbids"):
        safe_load_pipeline("no/such", TASK, model_kwargs={"local_files_only": True})


def test_a_named_model_is_fetched_and_told_and_then_cached(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    with StandInHub() as hub:
        hub.add("owner/river", checkpoints("llama"))
        hub.use(monkeypatch, tmp_path / "cache")
        llm = safe_load_pipeline("owner/river", TASK, device_map="cpu")
        told = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == LOGGER]
        assert told[0][0] == "INFO"
        assert told[0][1].startswith("downloading owner/river, ")
        assert ("INFO", "model.safetensors is here") in told
        asked = len(hub.requests)
        assert llm.loaded.config.model_id == "owner/river"
        # LangChain's chat reads the tokenizer again, from the cache and not from the hub.
        assert ChatHuggingFace(llm=llm).invoke("Hello", max_new_tokens=3).content
        again = safe_load_pipeline("owner/river", TASK, device_map="cpu")
        assert again.invoke(PROMPT) == llm.invoke(PROMPT) == REST
        assert len(hub.requests) == asked
    llm.loaded.close()
    again.loaded.close()


# safe_load_model_with_config and HuggingFacePipeline.from_model_id.


@pytest.mark.parametrize(
    ("args", "kwargs", "where"),
    [
        ((TASK,), {}, ("sim:0", 4)),
        ((TASK, "default", -1), {}, ("cpu", 4)),
        ((TASK, "default", 1), {}, ("sim:1", 4)),
        ((TASK, "default", None, "cpu"), {}, ("cpu", 4)),
        ((), {"task": TASK, "device_map": {"": torch.device("cpu"), "model.layers.3": "sim:1"}}, ("sim:1", 1)),
        ((TASK,), {"device": "sim:1"}, ("sim:1", 4)),
    ],
)
def test_from_model_id_by_position_and_by_name(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: tuple[str, int],
    checkpoints: Checkpoints,
    sim: SimulatedAccelerator,
) -> None:
    config = ModelConfig(gpu_layers_fallback=2, pipeline_kwargs={"max_new_tokens": 100})
    before = config.model_copy(deep=True)
    llm = safe_load_model_with_config(
        HuggingFacePipeline.from_model_id, config, str(checkpoints("llama")), *args, **kwargs
    )
    assert isinstance(llm, LyraPipeline)
    assert on(llm, where[0]) == where[1]
    assert llm.invoke(PROMPT) == REST
    assert config == before
    llm.loaded.close()


def test_from_model_id_with_its_arguments_bound(checkpoints: Checkpoints) -> None:
    loader = functools.partial(HuggingFacePipeline.from_model_id, task=TASK, pipeline_kwargs={"max_new_tokens": 100})
    config = ModelConfig(device_map="cpu", model_id=str(checkpoints("llama")), pipeline_kwargs={"max_new_tokens": 1})
    llm = safe_load_model_with_config(loader, config)
    assert isinstance(llm, LyraPipeline)
    assert llm.invoke(PROMPT) == REST
    llm.loaded.close()


def test_too_many_arguments_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"too many positional|multiple values"):
        safe_load_model_with_config(HuggingFacePipeline.from_model_id, ModelConfig(), "a", TASK, task=TASK)


# safe_load_model_with_config and any other loader.


class Loader:
    """A callable object around transformers' own loader."""

    def __call__(self, name: str, *, device_map: Any = None) -> Any:
        return from_pretrained(name, device_map=device_map)


RUNGS = ["first", "fallback", "cpu"]
LOADERS: dict[str, Callable[..., Any]] = {
    "transformers": from_pretrained,
    "partial": functools.partial(from_pretrained, dtype="float32"),
    "object": Loader(),
    "function": lambda name, device_map: from_pretrained(name, device_map=device_map),
}


@pytest.mark.parametrize(
    ("kind", "rung"),
    [*(("transformers", rung) for rung in RUNGS), *((kind, "fallback") for kind in ("partial", "object", "function"))],
)
def test_any_loader_goes_down_the_ladder(
    kind: str,
    rung: str,
    checkpoints: Checkpoints,
    sim: SimulatedAccelerator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = ModelConfig(device_map=WHOLE_ON_0, gpu_layers_fallback=2)
    sim.fail_at({"first": 0, "fallback": 5, "cpu": 1}[rung], persistent=rung == "cpu")
    model = safe_load_model_with_config(LOADERS[kind], config, str(checkpoints("llama")))
    sim.fail_at(0)
    used = sim.used(0)
    assert {"first": used > 700_000, "fallback": 300_000 < used < 400_000, "cpu": used == 0}[rung]
    told = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert [message.partition(":")[0] for message in told] == RUNGS[: RUNGS.index(rung)]
    assert recite(model) == STORY


def test_the_middle_rung_has_the_documented_map(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loader = Recorder(out_of_memory(), out_of_memory())
    config = ModelConfig(gpu_layers_fallback=2, dtype="float32")
    assert safe_load_model_with_config(loader, config, str(checkpoints("llama"))) == "the model"
    assert loader.keywords == [
        {"device_map": "auto", "dtype": "float32"},
        {
            "device_map": {
                "model.embed_tokens": 0,
                "model.layers.0": 0,
                "model.layers.1": 0,
                "model.layers.2": "cpu",
                "model.layers.3": "cpu",
                "model.norm": "cpu",
                "lm_head": "cpu",
            },
            "dtype": "float32",
        },
        {"device_map": "cpu", "dtype": "float32"},
    ]


def test_the_middle_rung_places_the_layers_of_a_mixture_whole(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    loader = Recorder(out_of_memory(), out_of_memory())
    config = ModelConfig(gpu_layers_fallback=2, dtype="float32")
    assert safe_load_model_with_config(loader, config, str(checkpoints("mixtral"))) == "the model"
    devices = loader.keywords[1]["device_map"]
    assert [devices[f"model.layers.{i}"] for i in range(4)] == [0, 0, "cpu", "cpu"]
    assert not any("experts" in name for name in devices)


def test_the_middle_rung_names_modules_as_the_model_does(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    # GPT-2's own checkpoint on the hub lacks the prefix that the model's modules have.
    directory = shutil.copytree(checkpoints("gpt2"), tmp_path / "gpt2")
    weights = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})
    sim.fail_at(3)
    model = safe_load_model_with_config(
        from_pretrained, ModelConfig(device_map=WHOLE_ON_0, gpu_layers_fallback=1), str(directory)
    )
    assert {name for name, device in model.hf_device_map.items() if device == 0} >= {"transformer.h.0"}
    assert recite(model) == STORY


def test_what_a_failed_attempt_held_is_free_before_the_next(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    held: list[int] = []

    def loader(name: str, device_map: Any) -> Any:
        held.append(sim.used(0))
        model = from_pretrained(name, device_map=WHOLE_ON_0)
        if len(held) < 3:
            sim.fail_at(1)
            model.lm_head.weight.clone()
        return model

    config = ModelConfig(device_map=WHOLE_ON_0, gpu_layers_fallback=2)
    safe_load_model_with_config(loader, config, str(checkpoints("llama")))
    assert held == [0, 0, 0]


def test_a_true_shortage_is_met_by_the_middle_rung(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    sim.set_cap(700_000)  # the weights are 788 kB; two layers with the embeddings 394 kB
    config = ModelConfig(device_map=WHOLE_ON_0, gpu_layers_fallback=2, context_length=16)
    model = safe_load_model_with_config(from_pretrained, config, str(checkpoints("llama")))
    assert 300_000 < sim.used(0) < 400_000
    assert recite(model) == STORY


def test_plain_callables_are_just_called() -> None:
    thing = object()
    assert safe_load_model_with_config(lambda: thing, ModelConfig()) is thing
    assert safe_load_model_with_config(lambda a, b: (a, b), None, 1, b=2) == (1, 2)
    assert safe_load_model_with_config(int, ModelConfig(device_map="cpu"), "7") == 7


class OtherError(RuntimeError):
    """An error that is not about memory."""


def test_another_error_surfaces_unchanged_after_one_call(sim: SimulatedAccelerator) -> None:
    error = OtherError("CUDA error: device-side assert triggered")
    loader = Recorder(error)
    with pytest.raises(OtherError) as caught:
        safe_load_model_with_config(loader, ModelConfig(gpu_layers_fallback=2), "no/model")
    assert caught.value is error
    assert len(loader.calls) == 1


def test_no_fallback_allowed_is_an_error_with_the_remedy(sim: SimulatedAccelerator) -> None:
    loader = Recorder(out_of_memory())
    with pytest.raises(DoesNotFitError, match=r"^out of memory while loading: CUDA out of memory\. Tried") as caught:
        safe_load_model_with_config(loader, ModelConfig(enable_progressive_fallback=False), "no/model")
    assert caught.value.hint == 'set "enable_progressive_fallback": true, or a lower "max_memory"'
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert len(loader.calls) == 1


def test_out_of_memory_on_the_last_rung_is_an_error(sim: SimulatedAccelerator) -> None:
    loader = Recorder(out_of_memory(), MemoryError())
    with pytest.raises(DoesNotFitError) as caught:
        safe_load_model_with_config(loader, ModelConfig(), "no/model")
    assert caught.value.hint == "take a smaller model, or close what else uses the memory"
    assert [keywords.get("device_map") for keywords in loader.keywords] == ["auto", "cpu"]


def test_main_memory_is_not_tried_twice_where_there_is_no_other() -> None:
    loader = Recorder(MemoryError())
    with pytest.raises(DoesNotFitError):
        safe_load_model_with_config(loader, ModelConfig(), "no/model")
    assert len(loader.calls) == 1
    # A device that Lyra does not see is another matter.
    unseen = Recorder(out_of_memory())
    assert safe_load_model_with_config(unseen, ModelConfig(), "no/model") == "the model"
    assert unseen.keywords == [{}, {"device_map": "cpu"}]


def test_disguised_out_of_memory_falls_back(sim: SimulatedAccelerator) -> None:
    disguised = ValueError(
        "Could not load model x with any of the following classes: ...\n\nwhile loading with A, an error is thrown:\n"
        'Traceback (most recent call last):\n  File "a.py", line 1\ntorch.OutOfMemoryError: CUDA out of memory.\n'
    )
    loader = Recorder(disguised)
    assert safe_load_model_with_config(loader, ModelConfig(), "no/model") == "the model"
    assert len(loader.calls) == 2


def test_budgets_are_bytes_for_every_device(sim: SimulatedAccelerator) -> None:
    sim.set_cap(1000, device=0)
    sim.occupy(500, device=1)
    sim.set_cap(2000, device=1)
    loader = Recorder()
    limits = {"0": "90%", "cpu": "1MB", "7": "5GB", "disk": "9GB"}
    config = ModelConfig(max_memory=dict(limits), pipeline_kwargs={"seed": 1})
    safe_load_model_with_config(loader, config, "no/model")
    # What the user left out counts with what is free, what the machine lacks with nothing.
    assert loader.keywords == [{"device_map": "auto", "max_memory": {0: 900, 1: 1500, "cpu": 10**6}}]
    assert config.max_memory == limits


def test_a_budget_above_what_is_free_is_cut_to_it(sim: SimulatedAccelerator) -> None:
    sim.set_cap(1000, device=0)
    loader = Recorder()
    safe_load_model_with_config(loader, ModelConfig(device_map="auto", max_memory={0: "6GB"}), "no/model")
    assert loader.keywords[0]["max_memory"][0] == 1000


def test_a_device_that_is_lacking_is_told_once_and_the_cpu_is_used(caplog: pytest.LogCaptureFixture) -> None:
    loader = Recorder()
    config = ModelConfig(device_map={"model.layers": 0, "lm_head": "cpu"})
    safe_load_model_with_config(loader, config, "no/model")
    assert loader.keywords == [{"device_map": {"model.layers": "cpu", "lm_head": "cpu"}}]
    assert config.device_map == {"model.layers": 0, "lm_head": "cpu"}
    assert [r.getMessage() for r in caplog.records] == [
        "this machine lacks what 'device_map' names (0): the CPU is used"
    ]
    again = Recorder()
    safe_load_model_with_config(again, ModelConfig(device_map="cuda:1"), "no/model")
    assert again.keywords == [{"device_map": "cpu"}]


@pytest.mark.parametrize(
    "given", [{"device": 1}, {"device_map": {"": 1}}, {"model_kwargs": {"device_map": "auto"}}, {"device": "sim:1"}]
)
def test_the_callers_device_stands_above_the_configurations(given: dict[str, Any], sim: SimulatedAccelerator) -> None:
    loader = Recorder(out_of_memory())
    safe_load_model_with_config(loader, ModelConfig(device_map=WHOLE_ON_0), "no/model", **given)
    first, second = loader.keywords
    assert first == given
    assert second == {"device_map": "cpu", **({"model_kwargs": {}} if "model_kwargs" in given else {})}


def test_a_loader_gets_only_what_it_takes(sim: SimulatedAccelerator) -> None:
    seen: list[dict[str, Any]] = []

    def like_langchain(
        model_id: str,
        task: str,
        *,
        device: int | None = None,
        device_map: Any = None,
        model_kwargs: Any = None,
        pipeline_kwargs: Any = None,
    ) -> str:
        seen.append(
            {"device": device, "device_map": device_map, "model_kwargs": model_kwargs, "pipeline": pipeline_kwargs}
        )
        if len(seen) == 1:
            raise out_of_memory()
        return model_id

    config = ModelConfig(dtype="bfloat16", max_memory={"0": 5000}, pipeline_kwargs={"max_new_tokens": 3})
    assert safe_load_model_with_config(like_langchain, config, "m", TASK, model_kwargs={"revision": "x"}) == "m"
    first, second = seen
    assert first["device_map"] == "auto"
    assert first["model_kwargs"].keys() == {"dtype", "max_memory", "revision"}
    assert first["model_kwargs"]["max_memory"][0] == 5000
    # With a map of "cpu" a pipeline would move the model to the first GPU.
    assert second == {
        "device": -1,
        "device_map": None,
        "model_kwargs": {"dtype": "bfloat16", "revision": "x"},
        "pipeline": {"max_new_tokens": 3},
    }


def test_quantization_is_an_object_for_transformers_or_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Recorder()
    safe_load_model_with_config(loader, ModelConfig(load_in_4bit=True), "no/model")
    assert loader.keywords[0]["quantization_config"].load_in_4bit is True
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingExtraError, match=r"^'load_in_8bit' needs the extra 'quant'"):
        safe_load_model_with_config(loader, ModelConfig(load_in_8bit=True), "no/model")


# safe_load_model.


def test_the_second_call_asks_for_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    loader = Recorder(out_of_memory())
    assert safe_load_model(loader, "m", device_map="auto", dtype="float32") == "the model"
    assert loader.calls == [
        (("m",), {"device_map": "auto", "dtype": "float32"}),
        (("m",), {"device_map": "cpu", "dtype": "float32"}),
    ]
    assert [(r.levelname, r.getMessage()) for r in caplog.records if r.name == LOGGER] == [
        ("WARNING", "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): trying the CPU")
    ]


def test_an_error_without_a_message_falls_back_too() -> None:
    assert safe_load_model(Recorder(MemoryError())) == "the model"


def test_another_error_or_a_second_shortage_surfaces() -> None:
    with pytest.raises(OtherError, match=r"^no$"):
        safe_load_model(Recorder(OtherError("no")))
    loader = Recorder(out_of_memory(), MemoryError("the second"))
    with pytest.raises(MemoryError, match=r"^the second$"):
        safe_load_model(loader)
    assert len(loader.calls) == 2


def test_transformers_own_loader_ends_on_the_cpu(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    sim.fail_at(4)
    model = safe_load_model(from_pretrained, str(checkpoints("llama")), device_map="sim:0")
    assert (model.device.type, sim.used(0)) == ("cpu", 0)
    assert recite(model) == STORY


def test_langchains_own_loader_ends_on_the_cpu(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = str(checkpoints("llama"))
    settings = {"max_new_tokens": 100, "do_sample": False}
    # transformers' pipelines do not see the simulated device by themselves, and would bring a whole model home.
    on_cpu = [f"model.layers.{number}" for number in (1, 2, 3)]
    split = {"model.embed_tokens": 0, "model.layers.0": 0} | dict.fromkeys([*on_cpu, "model.norm", "lm_head"], "cpu")
    first = safe_load_pipeline_legacy(directory, TASK, device_map=split)
    assert type(first) is HuggingFacePipeline
    assert sim.used(0) > 0
    del first
    sim.fail_at(4)
    second = safe_load_pipeline_legacy(directory, TASK, device_map=split, pipeline_kwargs=settings)
    sim.fail_at(4)
    by_position = safe_load_model(
        HuggingFacePipeline.from_model_id, directory, TASK, "default", None, None, {"device_map": split}
    )
    assert sim.injected(0) == 2
    assert [llm.pipeline.model.device.type for llm in (second, by_position)] == ["cpu", "cpu"]
    assert second.pipeline.device.type == "cpu"
    assert second.invoke(PROMPT) == STORY


# safe_load_embeddings.


def test_embeddings_of_the_offline_model() -> None:
    from lyra_emergence.journal.embeddings import find_embedding_files

    if find_embedding_files()[0] is None:
        pytest.skip("the extra 'offline' is not installed")
    embeddings = safe_load_embeddings()
    assert isinstance(embeddings, HuggingFaceEmbeddings)
    garden, beds, engine = embeddings.embed_documents(["the garden in spring", "beds of flowers", "a steam engine"])
    assert len(garden) == 384

    def likeness(a: list[float], b: list[float]) -> float:
        return float(torch.cosine_similarity(torch.tensor(a), torch.tensor(b), dim=0))

    assert likeness(garden, beds) > likeness(garden, engine) + 0.1
    by_name = safe_load_embeddings(model_name="sentence-transformers/all-MiniLM-L6-v2")
    assert by_name.embed_query("beds of flowers") == pytest.approx(beds, abs=1e-5)


def test_embeddings_end_on_the_cpu(sim: SimulatedAccelerator) -> None:
    from lyra_emergence.journal.embeddings import find_embedding_files

    if find_embedding_files()[0] is None:
        pytest.skip("the extra 'offline' is not installed")
    sim.fail_at(3)
    embeddings = safe_load_embeddings(model_kwargs={"device": "sim:0"})
    assert embeddings._client.device.type == "cpu"
    assert sim.injected(0) == 1
    assert len(embeddings.embed_query("the river")) == 384

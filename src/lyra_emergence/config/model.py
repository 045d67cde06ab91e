"""`ModelConfig`: the keys of the configuration, their defaults, and the JSON Schema that editors read.

pydantic holds the values; the checks are `config_checks`', so that a call, a file and a variable are judged alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from lyra_emergence.config.checks import CHECKS, DTYPES, TASKS, check_together, check_values
from lyra_emergence.config.devices import AMOUNT_PATTERN, DEVICE_PATTERN, MAP_PATTERN, SIZE_PATTERN, budget_bytes
from lyra_emergence.config.distributed import distributed_schema
from lyra_emergence.config.generation import pipeline_kwargs_schema
from lyra_emergence.config.problems import Problems

if TYPE_CHECKING:
    from typing import Self

__all__ = ["EXAMPLE", "ModelConfig", "config_schema"]

EXAMPLE: Final[dict[str, Any]] = {
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
"""The documented example, which `config/model_config.json` holds in a checkout."""

_NULL = {"type": "null"}
_ORDINAL = {"type": "integer", "minimum": 0, "maximum": 999}
_DEVICE = {"anyOf": [_ORDINAL, {"type": "string", "pattern": DEVICE_PATTERN}]}
_AMOUNT = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": AMOUNT_PATTERN}]}

_Task = Annotated[str, WithJsonSchema({"enum": list(TASKS)})]
_Dtype = Annotated[str | None, WithJsonSchema({"enum": [*DTYPES, *(f"torch.{name}" for name in DTYPES), None]})]
_DeviceMap = Annotated[
    str | dict[str, str | int] | None,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": MAP_PATTERN},
                {"type": "object", "minProperties": 1, "additionalProperties": _DEVICE},
                _NULL,
            ]
        }
    ),
]
_MaxMemory = Annotated[
    dict[str, str | int] | None,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "propertyNames": {"pattern": DEVICE_PATTERN}, "additionalProperties": _AMOUNT},
                _NULL,
            ]
        }
    ),
]
_CacheSize = Annotated[
    str | int,
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": SIZE_PATTERN}]}),
]
_ModelName = Annotated[str | None, WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, _NULL]})]
_Distributed = Annotated[dict[str, int] | None, WithJsonSchema(distributed_schema())]
_PipelineKwargs = Annotated[dict[str, Any] | None, WithJsonSchema(pipeline_kwargs_schema())]


class ModelConfig(BaseModel):
    """Which model, where its layers may go, and how it generates.

    Values are checked on construction and on assignment; a wrong one raises `ConfigError`, which lists every problem
    with its key path. Device names are kept in one form (`config_devices` has the table), amounts of memory as
    written. The dicts are copies; one that is changed in place is checked when it is saved or used.
    """

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True, allow_inf_nan=False)

    model_id: str = Field(
        default="microsoft/phi-2",
        min_length=1,
        description="The model: a Hugging Face id such as 'microsoft/phi-2', or a folder with a checkpoint.",
    )
    task: _Task = Field(default="text-generation", description="What the model does; 'text-generation' is supported.")
    device_map: _DeviceMap = Field(
        default=None,
        description=(
            "Where layers go. null or 'auto': planned from the memory there is ('balanced', 'balanced_low_0' and "
            "'sequential' mean the same). One device for all: 'cpu', 'cuda', 'cuda:1', 'mps', 'xpu'. Or an object of "
            "module names (exact or prefixes, such as 'model.layers.0') and devices (0, 'cuda:1', 'cpu', 'disk')."
        ),
    )
    max_memory: _MaxMemory = Field(
        default=None,
        description=(
            "Most memory to use per device: '0' (or 'cuda:0') is the first GPU, then 'mps', 'xpu:0', 'cpu', 'disk'. "
            "Amounts: bytes, '6GB' (6e9 bytes), '6GiB' (6 * 2**30 bytes), '90%' (of what the device has); 0 for none. "
            "null, or a device left out: what is free."
        ),
    )
    low_cpu_mem_usage: bool = Field(
        default=True,
        description="Load without a second copy of the weights in main memory. Lyra's loader always does.",
    )
    gpu_layers_fallback: int | None = Field(
        default=None,
        ge=0,
        description="Layers that stay on the GPU after it ran out of memory once; null: as many as fit.",
    )
    enable_progressive_fallback: bool = Field(
        default=True,
        description="When memory runs out, move layers to a slower tier; false: the first time is an error.",
    )
    load_in_8bit: bool = Field(default=False, description="Quantize weights to 8 bits; not together with 4.")
    load_in_4bit: bool = Field(default=False, description="Quantize weights to 4 bits; not together with 8.")
    allow_quantization: bool = Field(
        default=False,
        description="Quantize, to 8 bits and then to 4, where the model does not fit the fastest memory otherwise.",
    )
    pipeline_kwargs: _PipelineKwargs = Field(default=None, description="Generation settings; null: their defaults.")
    dtype: _Dtype = Field(
        default=None,
        description=(
            "Number format to compute in: 'bfloat16', 'float16' or 'float32'; null or 'auto': the checkpoint's own."
        ),
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of context to make room for; null: the model's own, or fewer where they do not fit.",
    )
    cpu_kernels: bool = Field(
        default=True,
        description="Compile and use Lyra's own kernels for single tokens on the CPU; false: torch's operators alone.",
    )
    prompt_streaming: bool = Field(
        default=True,
        description=(
            "Let an accelerator run layers of main memory for a long prompt, their weights copied as they run; false: "
            "they always run on the CPU."
        ),
    )
    prefill_chunk: int | None = Field(
        default=None,
        ge=64,
        description=(
            "Tokens of a prompt that run at once; null: 1024. More take more memory, and read weights that are not in "
            "fast memory less often."
        ),
    )
    compile_decode: bool = Field(
        default=False,
        description=(
            "Compile the step of one token where the model lies wholly on one accelerator; the first answer waits for "
            "it."
        ),
    )
    packed_cache: _CacheSize = Field(
        default="20GB",
        description=(
            "Most disk space for packed weights that are kept in the cache folder for the next load: bytes, '20GB' or "
            "'20GiB'; 0: none are kept, and none used."
        ),
    )
    distributed: _Distributed = Field(
        default=None,
        description=(
            "How one model is divided between the processes that torchrun starts; their number is the product. null: "
            "one process runs it."
        ),
    )
    embedding_model: _ModelName = Field(
        default=None,
        description=(
            "The model that finds journal passages by their meaning: a hub id, or a folder. Used where it is on this "
            "machine; null: MiniLM, from the Hugging Face cache or the extra 'offline'. It is never downloaded."
        ),
    )
    rerank_model: _ModelName = Field(
        default=None,
        description=(
            "The cross-encoder that --rerank uses where it is on this machine: a hub id, or a folder; null: "
            "'cross-encoder/ms-marco-MiniLM-L6-v2'. It is never downloaded."
        ),
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the checkpoint. Only for sources that you trust."
    )

    if not TYPE_CHECKING:  # pydantic's own signature, with every key, is the one for type checkers and editors

        def __init__(self, **values: Any) -> None:
            problems = Problems()
            checked = check_values(values, problems)
            check_together(checked, problems)
            problems.raise_if_any()
            super().__init__(**checked)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check `value` and set the key `name`.

        Raises:
            ConfigError: There is no such key, or the value is wrong; the configuration is unchanged.
        """
        problems = Problems()
        checked = check_values({name: value}, problems)
        check_together({**self.__dict__, **checked}, problems)
        problems.raise_if_any()
        super().__setattr__(name, checked.get(name, value))

    @classmethod
    def model_validate(cls, obj: Any, **_options: Any) -> Self:
        """Return the configuration that a mapping holds; an instance is returned as it is.

        Raises:
            ConfigError: A value is wrong.
        """
        return obj if isinstance(obj, cls) else cls(**dict(obj))

    def to_model_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for a model loader; what is null or false is left out.

        `max_memory` has the keys that Hugging Face reads (0 instead of "0") and its amounts in bytes; a percentage
        stays text, since only the device knows its size (`budget_bytes` turns it into bytes).
        """
        kwargs: dict[str, Any] = {
            "device_map": dict(self.device_map) if isinstance(self.device_map, dict) else self.device_map,
            "max_memory": {_for_hugging_face(k): _in_bytes(v) for k, v in (self.max_memory or {}).items()} or None,
            "low_cpu_mem_usage": self.low_cpu_mem_usage or None,
            "load_in_8bit": self.load_in_8bit or None,
            "load_in_4bit": self.load_in_4bit or None,
            "dtype": self.dtype,
        }
        return {key: value for key, value in kwargs.items() if value is not None}

    @property
    def packed_cache_bytes(self) -> int:
        """`packed_cache` in bytes."""
        return budget_bytes(self.packed_cache, 0)

    def to_pipeline_kwargs(self) -> dict[str, Any]:
        """Return a copy of the generation settings; {} where there are none."""
        return {k: list(v) if isinstance(v, list) else v for k, v in (self.pipeline_kwargs or {}).items()}


def _for_hugging_face(device: str) -> str | int:
    return int(device) if device.isdecimal() else device


def _in_bytes(amount: str | int) -> str | int:
    return amount if isinstance(amount, str) and amount.rstrip().endswith("%") else budget_bytes(amount, 0)


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    generated = ModelConfig.model_json_schema()
    reference = {"type": "string", "description": "Address of this schema, for editors."}
    properties = {name: generated["properties"][name] for name in CHECKS}
    for described in properties.values():
        described.pop("title", None)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Lyra model configuration",
        "description": "Which model Lyra runs, where its layers may go, and how it generates.",
        "type": "object",
        "properties": {"$schema": reference, **properties},
        "additionalProperties": False,
    }

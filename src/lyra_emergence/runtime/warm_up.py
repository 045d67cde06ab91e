"""Running a small model of no meaning, so that frameworks make the thread pools, contexts and buffers that stay."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.runtime.kernel_caches import keep_few_kernels
from lyra_emergence.runtime.memory import give_back, return_freed_memory

if TYPE_CHECKING:
    from lyra_emergence.packing import Quantization

__all__ = ["run_packed_projection", "run_small_model"]

_SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
_PROMPT = 1024
_TOKENS = 3


def run_small_model() -> dict[str, int]:
    """Run it on the CPU in two dtypes and on every CUDA GPU; return the bytes that each GPU lost for good."""
    keep_few_kernels()
    return_freed_memory()
    for dtype in (torch.bfloat16, torch.float32):
        _run("cpu", dtype)
    gpus: dict[str, int] = {}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = f"cuda:{number}"
        before = _free_by_driver(number)
        _run(device, torch.bfloat16)
        give_back()
        if before is not None:
            gpus[device] = max(0, before - torch.cuda.mem_get_info(number)[0])
    return gpus


def run_packed_projection(quantization: Quantization) -> None:
    """Run a projection packed by bitsandbytes on the CPU, for many rows and for one: each loads kernels of its own."""
    from lyra_emergence.runtime.blocks import LoadedForm
    from lyra_emergence.runtime.quantized import quantized_module

    width = _SHAPE["hidden_size"]
    home = torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    packed = quantized_module(home, LoadedForm(torch.bfloat16, torch.bfloat16, quantization), "cpu")
    with torch.inference_mode():
        for rows in (_PROMPT, 1):
            packed(torch.zeros(1, rows, width, dtype=torch.bfloat16))


def _free_by_driver(number: int) -> int | None:
    """Return the free bytes of a GPU without making a context on it; None where the driver is not asked that way."""
    from lyra_emergence.machine import nvml_devices

    found = {device.name: device for device in nvml_devices()}.get(f"cuda:{number}")
    return found.free_bytes if found is not None else None


def _run(device: str, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**_SHAPE)).to(dtype).to(device).eval()
    cache = None
    with torch.inference_mode():
        for tokens in (_PROMPT, *[1] * _TOKENS):
            ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
            cache = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    del model, cache
    gc.collect()

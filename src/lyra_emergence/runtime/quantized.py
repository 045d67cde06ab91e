"""Projections packed to 8 or 4 bits by bitsandbytes, built one at a time from the checkpoint's map.

Covers `nn.Linear` and transformers' `Conv1D` (GPT-2), on GPUs and on the CPU. Heads, embeddings and fused experts stay
as they are, as in transformers' own integration.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lyra_emergence.errors import MissingExtraError
from lyra_emergence.main_memory import require
from lyra_emergence.packing import kernels_pack
from lyra_emergence.runtime.cpu.library import find_library
from lyra_emergence.runtime.cpu.linear import KINDS
from lyra_emergence.runtime.cpu.packed import PackedProjection

if TYPE_CHECKING:
    from lyra_emergence.packing import Quantization
    from lyra_emergence.runtime.blocks import LoadedForm
    from lyra_emergence.runtime.cpu.packed import PackedWeights

__all__ = ["quantized_module", "replaces", "require_bitsandbytes"]

OUTLIER_THRESHOLD = 6.0
"""Columns with an activation beyond it are computed unpacked: LLM.int8(), arXiv 2208.07339, section 3.2."""


def require_bitsandbytes(quantization: Quantization) -> None:
    """Check that bitsandbytes is installed.

    Raises:
        MissingExtraError: It is not; the error names the command that installs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"'load_in_{quantization}'", extra="quant")


def replaces(module: nn.Module) -> bool:
    """Return whether quantization replaces this module."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def quantized_module(home: Any, form: LoadedForm, device: str, kept: PackedWeights | None = None) -> nn.Module:
    """Return a packed copy of the projection `home` on `device`.

    Args:
        home: The projection as it is in the checkpoint's map.
        form: How it is packed.
        device: Where to.
        kept: What an earlier load packed `home` to for the kernels, where that was kept; its own weights are not read.

    Raises:
        RuntimeError: Memory ran out.
    """
    # Conv1D stores (inputs, outputs) where Linear stores (outputs, inputs).
    matrix = home.weight.detach()
    turned = type(home).__name__ == "Conv1D"
    rows, columns = matrix.shape[::-1] if turned else matrix.shape  # (outputs, inputs)
    quantization = form.quantization or "8bit"
    ours = device == "cpu" and form.cpu_kernels and kernels_pack(rows, columns) and matrix.dtype in KINDS
    library = find_library() if ours else None
    bias = None if home.bias is None else home.bias.detach().to(form.dtype)
    if library is not None and kept is not None and kept.belong_to(rows, columns, quantization, library):
        return PackedProjection.of(kept, bias, (rows, columns), quantization, library)
    if device == "cpu":
        require(matrix.numel() * form.dtype.itemsize, "packing a projection")
    weight = matrix.T.contiguous() if turned else matrix
    if library is not None:
        return PackedProjection(weight, bias, quantization, library)
    import bitsandbytes as bnb

    weight = weight.to(form.dtype)
    packed: Any
    if form.quantization == "8bit":
        packed = bnb.nn.Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
        )
        packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        packed = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=form.dtype, quant_type="nf4", device="meta")
        parameter = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False, module=packed
        )
        packed.weight = parameter.to(device)
    if bias is not None:
        packed.bias = nn.Parameter(bias.to(device), requires_grad=False)
    packed.eval()
    return cast("nn.Module", packed)

"""The step of one token, compiled, for a model that lies wholly on one accelerator (`compile_decode`).

Such a step is hundreds of small kernels, and to start one from Python takes longer than many of them run. torch.compile
traces the step once; on CUDA the whole of it is then replayed as one graph ("reduce-overhead").

Covered: models whose caches are all full attention, unquantized, with one accelerator that has room for the caches.
What fails to compile, and memory that runs out, end it for as long as the model is loaded; the answer goes on
uncompiled with what it has. Not covered: layers in main memory, windows that slide, recurrent states, packed weights.
Nothing here was measured on a GPU.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

import torch

from lyra_emergence.errors import is_out_of_memory
from lyra_emergence.load_report import LoadEvent
from lyra_emergence.plan import NOT_COMPILED, NOT_ON_ONE, PACKED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lyra_emergence.runtime.residency import Residency

__all__ = ["CompiledDecode", "compiled_decode", "why_not_compiled"]

_SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "cuda": {"backend": "inductor", "mode": "reduce-overhead"},
    "xpu": {"backend": "inductor"},
    "mps": {"backend": "inductor"},
}
_TRACED: Mapping[str, Any] = {"backend": "aot_eager"}
"""Where inductor writes no kernels, the traced step runs with those that there are."""


def why_not_compiled(model: Any, *, quantized: bool) -> str | None:
    """Return why the step of a model cannot be compiled, in words; None where it can."""
    if quantized:
        return PACKED
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not trace {type(model).__name__} as a whole"
    return None


def compiled_decode(
    model: Any, residency: Residency, tell: Callable[[LoadEvent], None], *, quantized: bool
) -> CompiledDecode | None:
    """Return the compiled step of a model; where it cannot be compiled, tell why and return None."""
    reason = why_not_compiled(model, quantized=quantized)
    if reason is None and residency.alone_on is None:
        reason = NOT_ON_ONE
    if reason is None:
        return CompiledDecode(model, residency, tell)
    tell(LoadEvent("note", NOT_COMPILED + reason))
    return None


class CompiledDecode:
    """The compiled step of one model. One generator at a time uses it: its caches' addresses are part of a graph.

    Args:
        model: The transformers model.
        residency: Where its blocks are.
        tell: Called when it is compiled, and when that ends.
    """

    def __init__(self, model: Any, residency: Residency, tell: Callable[[LoadEvent], None]) -> None:
        self._model = model
        self._residency = residency
        self._tell = tell
        self._call: Callable[..., Any] | None = None
        self._ended = False
        self._user: weakref.ref[Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether steps are not compiled any more."""
        return self._ended

    def device_for(self, user: object) -> str | None:
        """Return where `user` may take compiled steps now; None where it may not. The model's lock is held."""
        owner = self._user() if self._user is not None else None
        if self._ended or (owner is not None and owner is not user):
            return None
        return self._residency.alone_on

    def run(self, user: object, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Run one step and return its logits, (batch, tokens, vocab); None where it could not be compiled.

        Raises:
            RuntimeError: Memory ran out.
        """
        self._user = weakref.ref(user)
        if self._call is None:
            self._call = self._compiled()
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            logits: torch.Tensor = self._call(**inputs).logits
        except Exception as error:
            if is_out_of_memory(error) or not isinstance(error, torch._dynamo.exc.TorchDynamoException):  # noqa: SLF001
                raise
            # A backend's own error comes on the second line.
            failure = f"{type(error).__name__}: {' '.join(str(error).splitlines()[:2])}"
        else:
            return logits.clone()  # the next step writes where these lie
        self.end(f"it cannot be compiled ({failure})")
        return None

    def release(self, user: object) -> None:
        """Let another generator use it."""
        if self._user is not None and self._user() is user:
            self._user = None

    def end(self, why: str) -> None:
        """Take no compiled steps any more, and give back what they hold."""
        if self._ended:
            return
        self.close()
        self._tell(LoadEvent("note", f"steps of one token are not compiled any more: {why}"))

    def close(self) -> None:
        """As `end`, without a word."""
        self._ended = True
        if self._call is not None:
            self._call = None
            torch.compiler.reset()  # recorded graphs hold memory of their own

    def _compiled(self) -> Callable[..., Any]:
        kind = torch.device(self._residency.alone_on or "cpu").type
        self._tell(LoadEvent("note", "compiling the step of one token, once for each size of its caches"))
        step: Callable[..., Any] = self._model.__call__
        return torch.compile(step, dynamic=False, **_SETTINGS.get(kind, _TRACED))

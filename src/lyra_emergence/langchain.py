"""The LangChain model that Lyra returns: a `HuggingFacePipeline` that generates through `stream_generate`.

It differs from its base class on purpose: `stop` holds in `invoke` and in `stream`, for texts of any length; an error
reaches the caller at once; closing a stream ends the work; and `invoke` returns the answer alone, as `stream` does,
unless "return_full_text" asks for the prompt in front of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_huggingface import HuggingFacePipeline
from pydantic import PrivateAttr

from lyra_emergence.generation import Chunk, GenerationOptions, stream_generate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_core.callbacks import CallbackManagerForLLMRun

    from lyra_emergence.load_report import LoadReport
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan

__all__ = ["LyraPipeline"]


class LyraPipeline(HuggingFacePipeline):  # type: ignore[misc]  # the base class has no types
    """A loaded, placed model for LangChain.

    Made by `LyraPipeline.from_loaded`. Options per call are given as in the base class, in
    `pipeline_kwargs={"max_new_tokens": 50}`, or by themselves (`max_new_tokens=50`); `GenerationOptions` names them.
    """

    _loaded: Any = PrivateAttr(default=None)

    @classmethod
    def from_loaded(
        cls, loaded: LoadedModel, *, model_id: str, pipeline_kwargs: dict[str, Any] | None = None, batch_size: int = 4
    ) -> LyraPipeline:
        """Wrap a loaded model.

        Args:
            loaded: What `load` returned.
            model_id: The name that LangChain shows.
            pipeline_kwargs: Generation options of every call; the configuration's by default.
            batch_size: Kept for callers that read it; prompts run one after the other.
        """
        chosen = dict(loaded.config.pipeline_kwargs or {}) | (pipeline_kwargs or {})
        made = cls(
            pipeline=_transformers_pipeline(loaded),
            model_id=model_id,
            model_kwargs={},
            pipeline_kwargs=chosen,
            batch_size=batch_size,
        )
        made._loaded = loaded
        return made

    @property
    def loaded(self) -> LoadedModel:
        """The loaded model behind it."""
        loaded: LoadedModel = self._loaded
        return loaded

    @property
    def plan(self) -> Plan:
        """What was planned."""
        return self.loaded.plan

    @property
    def report(self) -> LoadReport:
        """How loading went."""
        return self.loaded.report

    @property
    def _llm_type(self) -> str:
        return "lyra_pipeline"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - the base class reports no tokens here
        **kwargs: Any,
    ) -> LLMResult:
        options, full_text = self._options(stop, kwargs, full_text=False)
        generations = []
        for prompt in prompts:
            chunks = list(stream_generate(self.loaded, prompt, options))
            text = "".join(chunk.text for chunk in chunks)
            answer = prompt + text if full_text else text
            generations.append([Generation(text=answer, generation_info=_info(chunks[-1]))])
        return LLMResult(generations=generations)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        options, full_text = self._options(stop, kwargs, full_text=False)
        if full_text:
            yield GenerationChunk(text=prompt)
        for chunk in stream_generate(self.loaded, prompt, options):
            if not chunk.text and chunk.finish_reason is None:
                continue
            piece = GenerationChunk(text=chunk.text, generation_info=_info(chunk))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece.text, chunk=piece)
            yield piece

    def _options(
        self, stop: list[str] | None, kwargs: dict[str, Any], *, full_text: bool
    ) -> tuple[GenerationOptions, bool]:
        """Return the options of one call, and whether the prompt belongs to its answer."""
        layers = (self.pipeline_kwargs or {}) | kwargs | kwargs.get("pipeline_kwargs", {})
        if "skip_prompt" in layers:
            full_text = not layers["skip_prompt"]
        full_text = bool(layers.get("return_full_text", full_text))
        stops = _texts(layers.get("stop")) + _texts(stop)
        return GenerationOptions.for_model(self.loaded, layers | {"stop": stops}), full_text


def _texts(stop: Any) -> tuple[str, ...]:
    if not stop:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _info(chunk: Chunk) -> dict[str, Any] | None:
    if chunk.finish_reason is None or chunk.stats is None:
        return None
    return {
        "finish_reason": chunk.finish_reason,
        "prompt_tokens": chunk.stats.prompt_tokens,
        "completion_tokens": chunk.stats.new_tokens,
    }


def _transformers_pipeline(loaded: LoadedModel) -> Any:
    """Return transformers' own pipeline around the model, for callers that use `llm.pipeline` directly."""
    from transformers import pipeline

    placed = getattr(loaded.model, "hf_device_map", None) is not None
    # Left to itself, the pipeline would move a model that is on the CPU to the first GPU.
    where = {} if placed else {"device": loaded.model.device}
    return pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer, **where)

"""The LangChain model that Lyra returns: a `HuggingFacePipeline` that generates through `stream_generate`.

It differs from its base class on purpose: `stop` holds in `invoke` and in `stream`, for texts of any length; an error
reaches the caller at once; closing a stream ends the work; a setting that would be ignored is an error; and `invoke`
returns the answer alone, as `stream` does, unless "return_full_text" asks for the prompt in front of it.

Two limits are LangChain's own. `ChatHuggingFace` around it generates and streams, but its asynchronous methods are not
made for any pipeline. And a chain with a further step behind the model (`llm | StrOutputParser()`), whose stream is
closed, reads the model's stream to its end for its traces; closing that of `llm` or of `prompt | llm` ends the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_huggingface import HuggingFacePipeline
from pydantic import PrivateAttr

from lyra_emergence.config.generation import check_pipeline_kwargs
from lyra_emergence.config.problems import Problems
from lyra_emergence.errors import GenerationError
from lyra_emergence.generation import Chunk, GenerationOptions, stream_generate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from langchain_core.callbacks import CallbackManagerForLLMRun

    from lyra_emergence.load_report import LoadReport
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan

__all__ = ["LyraPipeline"]

_NOT_SETTINGS: Final = frozenset({"pipeline_kwargs", "skip_prompt", "stream"})
"""Keywords of a call that are not generation settings: LangChain's own."""


class LyraPipeline(HuggingFacePipeline):  # type: ignore[misc]  # the base class has no types
    """A loaded, placed model for LangChain.

    Made by `LyraPipeline.from_loaded`. Options per call are given as in the base class, in
    `pipeline_kwargs={"max_new_tokens": 50}`, or by themselves (`max_new_tokens=50`); `GenerationOptions` names them.
    """

    _loaded: Any = PrivateAttr(default=None)

    @classmethod
    def from_loaded(
        cls,
        loaded: LoadedModel,
        *,
        model_id: str,
        pipeline_kwargs: dict[str, Any] | None = None,
        batch_size: int = 4,
        **fields: Any,
    ) -> LyraPipeline:
        """Wrap a loaded model.

        Args:
            loaded: What `load` returned.
            model_id: Where the tokenizer can be read from: `ChatHuggingFace` reads its own by this name, and asks the
                hub about an id even where all its files are cached, so a folder is best.
            pipeline_kwargs: Generation options of every call, above the configuration's.
            batch_size: Kept for callers that read it; prompts run one after the other.
            **fields: LangChain's own: `callbacks`, `tags`, `metadata`, `cache`, ...

        Raises:
            ConfigError: `pipeline_kwargs` holds something that is no generation setting.
        """
        chosen = (loaded.config.pipeline_kwargs or {}) | _checked(pipeline_kwargs or {})
        made = cls(
            pipeline=_transformers_pipeline(loaded),
            model_id=model_id,
            model_kwargs={},
            pipeline_kwargs=chosen,
            batch_size=batch_size,
            **fields,
        )
        made._loaded = loaded
        return made

    @classmethod
    def from_model_id(cls, model_id: str, task: str = "text-generation", *args: Any, **kwargs: Any) -> LyraPipeline:
        """Load a model as `safe_load_model_with_config(HuggingFacePipeline.from_model_id, ...)` does.

        Args:
            model_id: A hub id or the folder of a checkpoint.
            task: "text-generation".
            *args: The further arguments of `HuggingFacePipeline.from_model_id`.
            **kwargs: The same by name.
        """
        from lyra_emergence.device_fallback import safe_load_model_with_config

        return safe_load_model_with_config(cls.from_model_id, None, model_id, task, *args, **kwargs)

    @property
    def loaded(self) -> LoadedModel:
        """The loaded model behind it.

        Raises:
            GenerationError: There is none: the object was made from a bare transformers pipeline.
        """
        if self._loaded is None:
            raise GenerationError(
                "this LyraPipeline has no loaded model",
                hint="make it with safe_load_pipeline, or LyraPipeline.from_loaded(load(...), model_id=...)",
            )
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

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        named = self._loaded.config.model_id if self._loaded is not None else self.model_id
        return {"model_id": named, "model_kwargs": self.model_kwargs, "pipeline_kwargs": self.pipeline_kwargs}

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of `text` in the model's own tokens; LangChain would count in GPT-2's, from the hub."""
        return list(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - the base class reports no tokens here
        **kwargs: Any,
    ) -> LLMResult:
        options, full_text = self._options(stop, kwargs)
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
        options, full_text = self._options(stop, kwargs)
        if full_text:
            yield GenerationChunk(text=prompt)
        for chunk in stream_generate(self.loaded, prompt, options):
            if not chunk.text and chunk.finish_reason is None:
                continue
            piece = GenerationChunk(text=chunk.text, generation_info=_info(chunk))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece.text, chunk=piece)
            yield piece

    def _options(self, stop: list[str] | None, kwargs: dict[str, Any]) -> tuple[GenerationOptions, bool]:
        """Return the options of one call, and whether the prompt belongs to its answer."""
        given = {name: value for name, value in kwargs.items() if name not in _NOT_SETTINGS and value is not None}
        layers = (self.pipeline_kwargs or {}) | _checked(given | (kwargs.get("pipeline_kwargs") or {}))
        full_text = layers.get("return_full_text")
        if full_text is None:
            full_text = not kwargs.get("skip_prompt", True)
        stops = _texts(layers.get("stop")) + _texts(stop)
        return GenerationOptions.for_model(self.loaded, layers | {"stop": stops}), bool(full_text)


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    problems = Problems()
    checked = check_pipeline_kwargs(settings, "pipeline_kwargs", problems)
    problems.raise_if_any()
    return checked or {}


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

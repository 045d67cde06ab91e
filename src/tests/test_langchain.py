"""The LangChain model on a real checkpoint: chains, chat, stops, errors, closing, callbacks, threads."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import ConfigError, GenerationError
from lyra_emergence.generation import encode_prompt
from lyra_emergence.langchain import LyraPipeline
from lyra_emergence.loading import load

from .families import PROMPT, STORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

REST = STORY.removeprefix(PROMPT)
STOP = "Three herons"


@pytest.fixture(scope="module")
def llm(checkpoints: Checkpoints) -> Iterator[LyraPipeline]:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(device_map="cpu", model_id="river/llama"), directory=directory)
    yield LyraPipeline.from_loaded(loaded, model_id=str(directory), pipeline_kwargs={"max_new_tokens": 100})
    loaded.close()


class Steps:
    """Counts a model's forwards, and may raise in one of them."""

    def __init__(self, llm: LyraPipeline, fail_at: int = 0, error: Exception | None = None) -> None:
        self.count = 0
        self._fail_at = fail_at
        self._error = error
        self._model = llm.loaded.model

    def __enter__(self) -> Self:
        self._handle = self._model.register_forward_pre_hook(self._step)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _step(self, *_: object) -> None:
        self.count += 1
        if self.count == self._fail_at and self._error is not None:
            raise self._error


# Calls.


def test_it_is_a_pipeline_and_answers_without_the_prompt(llm: LyraPipeline) -> None:
    assert isinstance(llm, HuggingFacePipeline)
    assert llm.invoke(PROMPT) == REST


def test_the_stream_is_the_answer_in_pieces(llm: LyraPipeline) -> None:
    pieces = list(llm.stream(PROMPT))
    assert "".join(pieces) == REST
    assert len(pieces) > 50


def test_a_batch_answers_each_prompt(llm: LyraPipeline) -> None:
    prompts = [PROMPT, "Three herons stood"]
    alone = [llm.invoke(prompt) for prompt in prompts]
    assert llm.batch(prompts) == alone
    assert llm.batch(prompts, config={"max_concurrency": 1}) == alone


def test_asynchronous_calls(llm: LyraPipeline) -> None:
    async def both() -> tuple[str, str]:
        streamed = [piece async for piece in llm.astream(PROMPT)]
        return await llm.ainvoke(PROMPT), "".join(streamed)

    assert asyncio.run(both()) == (REST, REST)


def test_a_chain(llm: LyraPipeline) -> None:
    chain = PromptTemplate.from_template("The {what} was high") | llm | StrOutputParser()
    assert chain.invoke({"what": "river"}) == REST
    assert "".join(chain.stream({"what": "river"})) == REST
    assert chain.batch([{"what": "river"}] * 2) == [REST, REST]


def test_the_result_says_why_it_ended_and_what_it_cost(llm: LyraPipeline) -> None:
    prompt_tokens = len(llm.loaded.tokenizer(PROMPT)["input_ids"])
    result = llm.generate([PROMPT], max_new_tokens=3)
    assert result.generations[0][0].generation_info == {
        "finish_reason": "length",
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 3,
    }
    info = llm.generate([PROMPT]).generations[0][0].generation_info
    assert info is not None
    assert info["finish_reason"] == "stop"


def test_tokens_are_counted_in_the_models_own(llm: LyraPipeline) -> None:
    assert llm.get_num_tokens(PROMPT) == len(llm.loaded.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])


# Settings.


def test_settings_per_call_by_both_ways(llm: LyraPipeline) -> None:
    short = llm.invoke(PROMPT, max_new_tokens=4)
    assert REST.startswith(short)
    assert 0 < len(short) < len(REST)
    assert llm.invoke(PROMPT, pipeline_kwargs={"max_new_tokens": 4}) == short
    assert "".join(llm.stream(PROMPT, pipeline_kwargs={"max_new_tokens": 4})) == short
    assert llm.bind(max_new_tokens=4).invoke(PROMPT) == short


@pytest.mark.parametrize("setting", [{"return_full_text": True}, {"pipeline_kwargs": {"return_full_text": True}}])
def test_the_full_text_has_the_prompt_in_front(setting: dict[str, Any], llm: LyraPipeline) -> None:
    assert llm.invoke(PROMPT, **setting) == STORY
    assert "".join(llm.stream(PROMPT, **setting)) == STORY


def test_skip_prompt_as_in_the_base_class(llm: LyraPipeline) -> None:
    assert "".join(llm.stream(PROMPT, skip_prompt=False)) == llm.invoke(PROMPT, skip_prompt=False) == STORY
    assert "".join(llm.stream(PROMPT, skip_prompt=True)) == llm.invoke(PROMPT, skip_prompt=True) == REST


def test_a_setting_that_would_be_ignored_is_an_error(llm: LyraPipeline) -> None:
    with pytest.raises(ConfigError, match=r"in 'pipeline_kwargs': unknown key 'max_tokens'; write 'max_new_tokens'$"):
        llm.invoke(PROMPT, max_tokens=4)
    with pytest.raises(ConfigError, match=r"in 'pipeline_kwargs': unknown key 'num_beams'; "):
        list(llm.stream(PROMPT, pipeline_kwargs={"num_beams": 4}))


def test_the_configurations_settings_hold(checkpoints: Checkpoints) -> None:
    config = ModelConfig(device_map="cpu", pipeline_kwargs={"max_new_tokens": 100, "stop": [STOP]})
    loaded = load(config, directory=checkpoints("llama"))
    llm = LyraPipeline.from_loaded(loaded, model_id="river")
    before = REST[: REST.index(STOP)]
    assert llm.invoke(PROMPT) == before
    # A call adds its own stops to them, and may clear them.
    assert llm.invoke(PROMPT, stop=["rain"]) == REST[: REST.index("rain")]
    assert llm.invoke(PROMPT, pipeline_kwargs={"stop": []}) == REST
    loaded.close()


# Stops.


@pytest.mark.parametrize("stop", [[STOP], ["no such text", STOP], [STOP, "the garden"], [" herons stood at the", STOP]])
def test_a_stop_of_many_tokens_ends_the_answer_and_is_not_part_of_it(stop: list[str], llm: LyraPipeline) -> None:
    assert len(llm.loaded.tokenizer(STOP, add_special_tokens=False)["input_ids"]) > 1
    before = REST[: min(REST.index(text) for text in stop if text in REST)]
    assert llm.invoke(PROMPT, stop=stop) == before
    assert "".join(llm.stream(PROMPT, stop=stop)) == before
    assert llm.bind(stop=stop).invoke(PROMPT) == before
    assert llm.invoke(PROMPT, pipeline_kwargs={"stop": stop}) == before


def test_a_stop_ends_the_work_too(llm: LyraPipeline) -> None:
    with Steps(llm) as whole:
        llm.invoke(PROMPT)
    with Steps(llm) as stopped:
        llm.invoke(PROMPT, stop=[STOP])
    assert stopped.count < whole.count / 2


# Errors and closing.


class BrokenLayerError(Exception):
    """Nothing that LangChain or Lyra knows."""


@pytest.mark.parametrize("how", ["invoke", "stream", "chain", "chat", "ainvoke"])
def test_an_error_in_the_middle_arrives_at_once_and_unchanged(how: str, llm: LyraPipeline) -> None:
    error = BrokenLayerError("in the third step")
    calls: dict[str, Callable[[], Any]] = {
        "invoke": lambda: llm.invoke(PROMPT),
        "stream": lambda: list(llm.stream(PROMPT)),
        "chain": lambda: (PromptTemplate.from_template("{x}") | llm).invoke({"x": PROMPT}),
        "chat": lambda: list(ChatHuggingFace(llm=llm, tokenizer=llm.loaded.tokenizer).stream(PROMPT)),
        "ainvoke": lambda: asyncio.run(llm.ainvoke(PROMPT)),
    }
    with Steps(llm, fail_at=3, error=error) as steps, pytest.raises(BrokenLayerError) as caught:
        calls[how]()
    assert caught.value is error
    assert steps.count == 3
    assert llm.invoke(PROMPT, max_new_tokens=3)


def test_what_came_before_an_error_was_delivered(llm: LyraPipeline) -> None:
    seen: list[str] = []
    with Steps(llm, fail_at=5, error=BrokenLayerError()), pytest.raises(BrokenLayerError):
        seen.extend(llm.stream(PROMPT))  # extend keeps what came before the error
    assert len(seen) == 4
    assert REST.startswith("".join(seen))


def test_closing_a_stream_ends_the_work(llm: LyraPipeline) -> None:
    with Steps(llm) as steps:
        stream = llm.stream(PROMPT)
        next(stream)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        done = steps.count
        assert done <= 3
        threads = threading.active_count()
        assert llm.invoke(PROMPT, max_new_tokens=2)
    assert steps.count == done + 2
    assert threads == threading.active_count()


def test_a_chain_that_is_left_ends_the_work(llm: LyraPipeline) -> None:
    chain = PromptTemplate.from_template("{x}") | llm
    with Steps(llm) as steps:
        for piece in chain.stream({"x": PROMPT}):
            assert REST.startswith(piece)
            break
        assert steps.count <= 3


def test_a_prompt_beyond_the_context_is_lyras_error(llm: LyraPipeline) -> None:
    with pytest.raises(
        GenerationError, match=r"^the prompt has \d+ tokens, and the context holds 256 with the answer$"
    ):
        llm.invoke(STORY * 4)


# Callbacks.


class Listener(BaseCallbackHandler):
    """Keeps what LangChain tells."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.errors: list[BaseException] = []
        self.ends = 0

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.tokens.append(token)

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.errors.append(error)

    def on_llm_end(self, *_: Any, **__: Any) -> None:
        self.ends += 1


def test_callbacks_get_each_token_once(llm: LyraPipeline) -> None:
    listener = Listener()
    pieces = list(llm.stream(PROMPT, config={"callbacks": [listener]}))
    assert listener.tokens == pieces
    assert listener.ends == 1


def test_callbacks_get_the_error(llm: LyraPipeline) -> None:
    listener = Listener()
    error = BrokenLayerError()
    with Steps(llm, fail_at=2, error=error), pytest.raises(BrokenLayerError):
        list(llm.stream(PROMPT, config={"callbacks": [listener]}))
    assert listener.errors == [error]


# Chat.


def test_chat_with_a_tokenizer(llm: LyraPipeline) -> None:
    chat = ChatHuggingFace(llm=llm, tokenizer=llm.loaded.tokenizer)
    answer = chat.invoke([HumanMessage("Tell me of the river.")])
    prompt = "<bos>user: Tell me of the river.\nassistant:"
    assert answer.content == llm.invoke(prompt)
    assert "".join(str(chunk.content) for chunk in chat.stream("Tell me of the river.")) == answer.content
    stop = str(answer.content)[5:9]
    stopped = str(answer.content)[: str(answer.content).index(stop)]
    assert chat.invoke("Tell me of the river.", stop=[stop]).content == stopped
    assert "".join(str(chunk.content) for chunk in chat.stream("Tell me of the river.", stop=[stop])) == stopped


def test_chat_alone_takes_its_tokenizer_from_the_folder_and_no_second_model(
    llm: LyraPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    from transformers import PreTrainedModel

    asked: list[object] = []
    loads: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **_: asked.append(names) or [])
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *names, **_: loads.append(names))
    chat = ChatHuggingFace(llm=llm)
    assert chat.invoke("Hello", max_new_tokens=4).content
    assert (asked, loads) == ([], [])


def test_chat_streams_to_callbacks_once(llm: LyraPipeline) -> None:
    listener = Listener()
    chat = ChatHuggingFace(llm=llm, tokenizer=llm.loaded.tokenizer)
    chunks = list(chat.stream("Hello", config={"callbacks": [listener]}))
    assert "".join(listener.tokens) == "".join(str(chunk.content) for chunk in chunks)


def test_a_template_that_writes_the_beginning_token_gets_no_second_one(llm: LyraPipeline) -> None:
    tokenizer = llm.loaded.tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert text.startswith("<bos>")
    ids = encode_prompt(llm.loaded, text)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])["input_ids"]
    assert encode_prompt(llm.loaded, "Hello")[0] == tokenizer.bos_token_id


# Threads and devices.


def test_threads_that_share_a_model_get_the_answers_they_get_alone(llm: LyraPipeline) -> None:
    prompts = [PROMPT, "Three herons stood", "In the evening"]
    alone = [llm.invoke(prompt, max_new_tokens=30) for prompt in prompts]
    together: dict[int, str] = {}
    barrier = threading.Barrier(len(prompts))

    def run(number: int) -> None:
        barrier.wait()
        together[number] = "".join(llm.stream(prompts[number], max_new_tokens=30))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [together[number] for number in range(len(prompts))] == alone


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu", "model.layers.1": 0, "model.layers.2": 1}])
def test_the_pipeline_leaves_the_model_where_it_is(
    device_map: Any, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(device_map=device_map), directory=directory)
    before = (sim.used(0), sim.used(1), [parameter.device for parameter in loaded.model.parameters()])
    llm = LyraPipeline.from_loaded(loaded, model_id=str(directory))
    assert (sim.used(0), sim.used(1), [parameter.device for parameter in loaded.model.parameters()]) == before
    assert llm.invoke(PROMPT, max_new_tokens=100) == REST
    # transformers' own pipeline, for callers that use it directly.
    own = llm.pipeline(PROMPT, max_new_tokens=100, do_sample=False)
    assert own[0]["generated_text"] == STORY
    loaded.close()


# Construction.


def test_a_bare_pipeline_says_what_is_missing(llm: LyraPipeline) -> None:
    with pytest.raises(GenerationError, match=r"^this LyraPipeline has no loaded model$"):
        LyraPipeline(pipeline=llm.pipeline).invoke(PROMPT)


def test_from_model_id_is_lyras_own_loader(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoints("llama").parent)
    llm = LyraPipeline.from_model_id("llama", "text-generation", device=-1, pipeline_kwargs={"max_new_tokens": 100})
    assert llm.invoke(PROMPT) == REST
    assert llm.model_id == str(checkpoints("llama"))
    llm.loaded.close()


def test_langchains_fields_reach_the_object(llm: LyraPipeline) -> None:
    listener = Listener()
    made = LyraPipeline.from_loaded(llm.loaded, model_id="river", callbacks=[listener], tags=["journal"])
    made.invoke(PROMPT, max_new_tokens=2)
    assert (listener.ends, made.tags, made.batch_size) == (1, ["journal"], 4)
    assert made._identifying_params["model_id"] == "river/llama"

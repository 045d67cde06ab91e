"""The compiled step of one token, on the simulated accelerator: traced by torch.compile, run by its own kernels."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.generation import GenerationOptions, PromptCache, stream_generate
from lyra_emergence.loading import load
from lyra_emergence.runtime import compiled_decode
from lyra_emergence.runtime.compiled_decode import why_not_compiled
from lyra_emergence.runtime.kv_cache import RoomyLayer
from lyra_emergence.runtime.static_caches import CAPACITIES, StaticCaches, capacity_for

from .running import NEW_TOKENS, PROMPT, greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

COMPILING = "compiling the step of one token, once for each size of its caches"
ENDED = "steps of one token are not compiled any more: "


@pytest.fixture(autouse=True)
def _traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test traces anew, and leaves nothing traced."""
    # Torch writes down every step of tracing where somebody listens, and pytest does.
    tracing = logging.getLogger("torch.__trace")
    monkeypatch.setattr(tracing, "handlers", [])
    monkeypatch.setattr(tracing, "propagate", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(directory: Path, notes: list[str] | None = None, **settings: Any) -> LoadedModel:
    """Load onto the accelerator; `notes` get what loading and running tell."""

    def note(event: LoadEvent) -> None:
        if event.kind == "note" and notes is not None:
            notes.append(event.message)

    settings = {"device_map": {"": 0}, **settings}
    return load(ModelConfig(compile_decode=True, **settings), directory=directory, on_event=note)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3"])
@pytest.mark.usefixtures("sim")
def test_the_same_tokens(family: str, checkpoints: Checkpoints) -> None:
    before = graphs()
    notes: list[str] = []
    loaded = compiled(checkpoints(family), notes)
    assert greedy(loaded) == reference(checkpoints(family))
    assert notes == [COMPILING]
    assert graphs() - before == 1  # whole, and for all steps
    assert greedy(loaded) == reference(checkpoints(family))
    assert graphs() - before == 1
    loaded.close()


@pytest.mark.usefixtures("sim")
def test_a_conversation_goes_on_from_what_it_kept(checkpoints: Checkpoints) -> None:
    loaded, kept, before = compiled(checkpoints("llama")), PromptCache(), graphs()
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    first = list(stream_generate(loaded, PROMPT, options, kept=kept))
    answer = [token for chunk in first for token in chunk.token_ids]
    longer = (*PROMPT, *answer, *PROMPT)
    second = list(stream_generate(loaded, longer, options, kept=kept))
    assert [t for c in second for t in c.token_ids] == reference(checkpoints("llama"), prompt=longer)
    stats = second[-1].stats
    assert stats is not None
    assert stats.reused_tokens == len(PROMPT) + NEW_TOKENS - 1
    assert graphs() - before == 1
    kept.drop()
    loaded.close()


@pytest.mark.usefixtures("sim")
def test_one_answer_at_a_time_is_compiled(checkpoints: Checkpoints) -> None:
    loaded, before = compiled(checkpoints("llama")), graphs()
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    with (
        closing(stream_generate(loaded, PROMPT, options)) as one,
        closing(stream_generate(loaded, PROMPT, options)) as two,
    ):  # type: ignore[type-var]  # generators, which their annotation does not say
        pairs = list(zip(one, two, strict=True))
    for tokens in zip(*pairs, strict=True):
        assert [token for chunk in tokens for token in chunk.token_ids] == reference(checkpoints("llama"))
    assert graphs() - before == 1
    assert loaded.compiled is not None
    assert not loaded.compiled.ended
    loaded.close()


@pytest.mark.parametrize(("place", "persistent"), [(0.05, True), (0.5, False), (0.95, True)])
def test_memory_that_runs_out_costs_no_token(
    place: float, checkpoints: Checkpoints, sim: SimulatedAccelerator, *, persistent: bool
) -> None:
    directory = checkpoints("llama")
    notes: list[str] = []
    loaded = compiled(directory, notes)
    greedy(loaded)
    at_rest = sim.settled()
    before = sim.allocations()
    greedy(loaded)
    nth = int(place * (sim.allocations() - before))
    notes.clear()
    sim.fail_at(1 + nth, persistent=persistent)
    assert greedy(loaded) == reference(directory)
    assert sim.injected() >= 1
    assert f"{ENDED}memory ran out on sim:0" in notes
    sim.reset()
    assert greedy(loaded) == reference(directory)
    assert max(now - then for now, then in zip(sim.settled(at_rest), at_rest, strict=True)) <= 0
    loaded.close()


@pytest.mark.parametrize("nth", [150, 400])
def test_memory_may_run_out_while_it_is_compiled(nth: int, checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = compiled(checkpoints("llama"))
    sim.fail_at(nth)
    assert greedy(loaded) == reference(checkpoints("llama"))
    assert sim.injected() == 1
    assert loaded.compiled is not None
    assert loaded.compiled.ended
    loaded.close()


def test_there_may_be_no_room_for_caches_of_one_shape(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded, before = compiled(directory), graphs()
    sim.occupy(sim.free() - loaded.residency._activations(loaded.plan.placements, 0) - 2**16)
    assert greedy(loaded) == reference(directory)
    assert graphs() == before
    loaded.close()


@pytest.mark.usefixtures("sim")
def test_what_cannot_be_compiled_runs_as_ever(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no code for this")

    monkeypatch.setattr(compiled_decode, "_TRACED", {"backend": broken})
    notes: list[str] = []
    loaded = compiled(checkpoints("llama"), notes)
    assert greedy(loaded) == reference(checkpoints("llama"))
    assert notes[0] == COMPILING
    assert notes[1].startswith(f"{ENDED}it cannot be compiled (BackendCompilerFailed: ")
    assert notes[1].endswith("ValueError: no code for this)")
    assert len(notes) == 2
    loaded.close()


@pytest.mark.usefixtures("sim")
def test_what_is_raised_in_a_step_is_not_hidden(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        def step(*_: Any) -> Any:
            raise IndexError("index out of range in self")

        return step

    monkeypatch.setattr(compiled_decode, "_TRACED", {"backend": broken})
    loaded = compiled(checkpoints("llama"))
    with pytest.raises(IndexError, match="index out of range"):
        greedy(loaded)
    loaded.close()


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        (
            "llama",
            {"device_map": "cpu"},
            "'compile_decode' has no effect: the model does not lie wholly on one accelerator",
        ),
        ("mistral", {}, f"{ENDED}its caches are of a kind whose shapes change"),
    ],
)
@pytest.mark.usefixtures("sim")
def test_why_it_is_not_compiled_is_said(
    family: str, settings: dict[str, Any], why: str, checkpoints: Checkpoints
) -> None:
    notes: list[str] = []
    loaded = compiled(checkpoints(family), notes, **settings)
    tokens = greedy(loaded)
    assert why in notes
    assert COMPILING not in notes
    assert tokens == reference(checkpoints(family))
    loaded.close()


def test_packed_layers_and_models_that_cannot_be_traced_are_not_compiled() -> None:
    class Traced:
        _can_compile_fullgraph = True

    assert why_not_compiled(Traced(), quantized=True) == "its layers are packed"
    assert why_not_compiled(Traced(), quantized=False) is None
    assert why_not_compiled(object(), quantized=False) == "transformers does not trace object as a whole"


def test_blocks_that_left_end_it_without_a_word_too_many(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    notes: list[str] = []
    loaded = compiled(directory, notes)
    assert greedy(loaded) == reference(directory)
    sim.occupy(sim.free() - 2**12)
    assert greedy(loaded) == reference(directory)
    assert loaded.residency.alone_on is None
    assert notes.count(COMPILING) == 1
    loaded.close()


def test_nothing_to_be_had_is_one_error_and_the_model_serves_on(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    loaded = compiled(directory, enable_progressive_fallback=False)
    assert greedy(loaded) == reference(directory)
    sim.fail_at(1, persistent=True)
    with pytest.raises(DoesNotFitError):
        greedy(loaded)
    sim.reset()
    assert greedy(loaded) == reference(directory)
    loaded.close()


# The static form, by itself


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [(1, 4096, 512), (512, 4096, 512), (513, 4096, 2048), (2049, 4096, 4096), (100, 128, 128), (40000, 65536, 65536)],
)
def test_capacities(tokens: int, context: int, expected: int) -> None:
    assert capacity_for(tokens, context) == expected
    assert list(CAPACITIES) == sorted(CAPACITIES)


def filled(config: Any, tokens: int) -> DynamicCache:
    cache = DynamicCache(config=config)
    for at in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 1, config.num_key_value_heads, tokens, config.head_dim), at)
    return cache


def test_both_forms_share_their_memory(checkpoints: Checkpoints) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoints("llama"))
    cache = filled(config, 5)
    before = [layer.keys.clone() for layer in cache.layers]
    static = StaticCaches.over({"past_key_values": cache}, config, 5, 16)
    assert static is not None
    added = torch.randn(2, 1, config.num_key_value_heads, 1, config.head_dim)
    for at, layer in enumerate(static.caches["past_key_values"].layers):
        keys, values = layer.update(added[0] + at, added[1] - at)
        assert keys.shape == values.shape == (1, config.num_key_value_heads, 16, config.head_dim)
    static.advance(1)
    assert [layer.get_seq_length() for layer in cache.layers] == [5] * config.num_hidden_layers
    static.settle()
    for at, (layer, old) in enumerate(zip(cache.layers, before, strict=True)):
        assert type(layer) is RoomyLayer
        assert layer.room is not None
        assert layer.keys.data_ptr() == layer.room[0].data_ptr()
        assert torch.equal(layer.keys, torch.cat((old, added[0] + at), dim=-2))
        assert torch.equal(layer.values[..., 5:, :], added[1] - at)
        assert not layer.room[0][..., 6:, :].any()  # a mask does not hide what is not a number


def test_room_is_kept_where_it_suffices(checkpoints: Checkpoints) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoints("llama"))
    caches = {"past_key_values": filled(config, 5)}
    assert StaticCaches.over(caches, config, 5, 16) is not None
    first = [layer.room for layer in caches["past_key_values"].layers]
    assert StaticCaches.over(caches, config, 5, 16) is not None
    second = [layer.room for layer in caches["past_key_values"].layers]
    assert all(one is two for one, two in zip(first, second, strict=True))
    assert StaticCaches.over(caches, config, 5, 32) is not None
    assert caches["past_key_values"].layers[0].room[0].shape[-2] == 32

"""Main memory: what is left of it, and stopping before a kernel kills for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence import main_memory as module
from lyra_emergence.chat import ChatSession
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError, is_out_of_memory
from lyra_emergence.generation import GenerationOptions, stream_generate
from lyra_emergence.loading import load
from lyra_emergence.main_memory import KEPT_FREE, LowMainMemoryError, require, takeable_bytes

from .running import NEW_TOKENS, PROMPT, greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.load_report import LoadEvent

    Checkpoints = Callable[[str], Path]

MiB = 2**20
MEMINFO = "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\nSwapFree: 700 kB\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_pages_of_files_and_swap_can_be_taken(tmp_path: Path) -> None:
    free = tree(tmp_path / "free", {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/"})
    assert takeable_bytes(free) == 5700 * 1024
    stat = "anon 5\ninactive_file 1000000\nactive_file 500000"
    group = {"memory.max": "4000000", "memory.current": "3500000", "memory.stat": stat}
    files = {f"sys/fs/cgroup/a/{name}": text for name, text in group.items()}
    limited = tree(tmp_path / "v2", {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a", **files})
    # Of 3.5 MB in use, 1.5 are pages of files, old and new.
    assert takeable_bytes(limited) == 2_000_000
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 1000000\ntotal_active_file 500000"
    group = {"memory.limit_in_bytes": "4000000", "memory.usage_in_bytes": "3500000", "memory.stat": stat}
    files = {f"sys/fs/cgroup/memory/a/{name}": text for name, text in group.items()}
    limited = tree(tmp_path / "v1", {"proc/meminfo": MEMINFO, "proc/self/cgroup": "3:memory:/a", **files})
    assert takeable_bytes(limited) == 2_000_000


def test_what_is_left_alone_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "takeable_bytes", lambda: KEPT_FREE + 1000)
    require(1000, "a test")
    with pytest.raises(LowMainMemoryError) as caught:
        require(1001, "a test")
    assert str(caught.value) == "a test wants 1.00 kB of main memory, and 1.00 kB is left"
    assert is_out_of_memory(caught.value)


class Scarcity:
    """Main memory of which a test says how much is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 2**40
        for place in ("lyra_emergence.main_memory", "lyra_emergence.runtime.headroom"):
            monkeypatch.setattr(f"{place}.takeable_bytes", lambda: KEPT_FREE + self.left)


@pytest.fixture
def scarcity(monkeypatch: pytest.MonkeyPatch) -> Scarcity:
    return Scarcity(monkeypatch)


def test_a_prompt_runs_in_shorter_chunks_where_memory_is_short(checkpoints: Checkpoints, scarcity: Scarcity) -> None:
    events: list[LoadEvent] = []
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"), on_event=events.append)
    prompt = (PROMPT * 40)[:200]
    options = GenerationOptions(max_new_tokens=8)
    undisturbed = [token for chunk in stream_generate(loaded, prompt, options) for token in chunk.token_ids]
    activations = loaded.residency.temporaries_in_main_memory()
    scarcity.left = loaded.plan.footprint.kv_cache + activations // 2
    chunks = list(stream_generate(loaded, prompt, options))
    stats = chunks[-1].stats
    assert [token for chunk in chunks for token in chunk.token_ids] == undisturbed
    assert stats is not None
    assert not stats.recoveries
    assert len(stats.warnings) == 1
    assert stats.warnings[0].endswith(" left: the prompt runs in chunks of 64 tokens")
    assert [event.message for event in events if event.kind == "note"] == list(stats.warnings)
    loaded.close()


def test_an_answer_ends_before_the_last_memory_is_taken(
    checkpoints: Checkpoints, scarcity: Scarcity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lyra_emergence.runtime.headroom._STEPS_BETWEEN_LOOKS", 4)
    directory = checkpoints("llama")
    loaded = load(ModelConfig(device_map="cpu"), directory=directory)
    stream = stream_generate(loaded, PROMPT, GenerationOptions(max_new_tokens=NEW_TOKENS))
    tokens = [token for _ in range(3) for token in next(stream).token_ids]
    scarcity.left = 0
    with pytest.raises(
        DoesNotFitError, match=r"^memory ran out on cpu after \d+ tokens .* the next step wants "
    ) as caught:
        tokens += [token for chunk in stream for token in chunk.token_ids]
    assert caught.value.device == "cpu"
    assert 3 <= len(tokens) <= 3 + 4
    assert tokens == reference(directory)[: len(tokens)]
    scarcity.left = 2**40
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_a_chat_says_that_memory_is_short(checkpoints: Checkpoints, scarcity: Scarcity) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    session = ChatSession(loaded, options=GenerationOptions(max_new_tokens=4))
    scarcity.left = (loaded.plan.footprint.kv_cache + loaded.residency.temporaries_in_main_memory()) // 2
    answer = [chunk.answer for chunk in session.ask("What happened? " * 20)][-1]
    assert answer is not None
    assert [note for note in answer.notes if note.startswith("main memory has ")]
    loaded.close()


def test_copies_are_not_made_of_the_last_memory(checkpoints: Checkpoints, scarcity: Scarcity) -> None:
    # A dtype other than the stored one takes copies in main memory.
    scarcity.left = 1000
    with pytest.raises(DoesNotFitError, match="a copy of a weight in another form wants "):
        load(ModelConfig(device_map="cpu", dtype="bfloat16"), directory=checkpoints("llama"))
    scarcity.left = 2**40
    load(ModelConfig(device_map="cpu", dtype="bfloat16"), directory=checkpoints("llama")).close()


def control_group() -> Path:
    """An own group of the kernel's memory controller, v1 or v2; skips where none may be made."""
    for base in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = base / f"lyra-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if any((group / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            return group
        group.rmdir()
    pytest.skip("control groups cannot be made here")


# Keys and values of 128 kB a token; the limit leaves room for some 200 of them.
CHILD = """
import sys
from pathlib import Path
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.generation import GenerationOptions, stream_generate
from lyra_emergence.loading import load
from lyra_emergence.main_memory import KEPT_FREE

group, directory = map(Path, sys.argv[1:])
limit, used = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes") if (group / "memory.limit_in_bytes").exists()
    else ("memory.max", "memory.current")
)
(group / "cgroup.procs").write_text(str(__import__("os").getpid()))
loaded = load(ModelConfig(device_map="cpu", context_length=4000), directory=directory)
options = GenerationOptions(max_new_tokens=3000)
stream = stream_generate(loaded, [5, 6, 7] * 20, options)
tokens = list(next(stream).token_ids)
(group / limit).write_text(str(int((group / used).read_text()) + KEPT_FREE + 24 * 2**20))
try:
    for chunk in stream:
        tokens += chunk.token_ids
except DoesNotFitError as error:
    print("stopped", len(tokens), error, flush=True)
again = [t for c in stream_generate(loaded, [5, 6, 7] * 20, GenerationOptions(max_new_tokens=5)) for t in c.token_ids]
print("again", again == tokens[:5], flush=True)
"""


def test_a_control_group_does_not_get_to_kill(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from .families import make_tokenizer

    group = control_group()
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, head_dim=512, max_position_embeddings=8192, eos_token_id=399, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    try:
        command = [sys.executable, "-c", CHILD, str(group), str(tmp_path / "model")]
        environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    stopped, again = done.stdout.splitlines()
    assert stopped.startswith("stopped ")
    assert 16 < int(stopped.split()[1]) < 400
    assert "of main memory, and " in stopped
    assert again == "again True"

"""Refuses allocations of main memory while a program loads a checkpoint and answers, one run after the other.

The runs happen in a child process with the shim in front of its allocator (`allocator_shim`). A child that dies or
hangs is a finding about the run that it was in; the next child goes on behind it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any, Literal, Self

from .allocator_shim import NEVER, Refusing, RefusingAllocator, preloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .simulated_accelerator import SimulatedAccelerator

ROOT = Path(__file__).parents[2]
LONGEST_RUN = 240.0
"""Seconds without a word from a child after which it hangs. Runs take tenths of a second."""
_NEW_TOKENS = 12
_ABORTING = ("tokenizers.abi3", "safetensors_rust", "libgomp")
"""Rust and OpenMP end the process where they are refused memory: no caller can do anything about that."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is swept.

    Attributes:
        directory: The checkpoint.
        refusing: Which allocations count.
        settings: The model's configuration.
        prompt: Token ids; the families' own prompt by default.
        mode: "alone"; "shared" for two answers from one model at once; "parallel" for two loads and answers of each
            checkpoint at once.
        others: More checkpoints for "parallel".
    """

    directory: str
    refusing: Refusing
    settings: dict[str, Any] = field(default_factory=lambda: {"device_map": "cpu"})
    prompt: tuple[int, ...] = ()
    mode: Literal["alone", "shared", "parallel"] = "alone"
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One run: which allocation was refused (0: none), whether all after it were, and how the run ended.

    Attributes:
        outcome: "right" for the tokens of plain transformers (packed: of an undisturbed run); "refused" for one clear
            error, the text so far right and a following answer right; "memory error" for Python's own, where tensors
            are given; else what was wrong.
        allocations: Allocations counted.
        live: Bytes of the heap in use after it.
    """

    nth: int
    persistent: bool
    outcome: str
    allocations: int = 0
    live: int = 0

    @property
    def as_asked(self) -> bool:
        """Whether it ended as it should: one refusal is got over, lasting ones may end with an error."""
        return self.outcome in ("right", "memory error") or (self.persistent and self.outcome == "refused")


class Sweeper:
    """Runs cases in a child process, one after the other.

    Args:
        library: The shim.
        threads: Threads that compute, which the environment decides when the child starts.
        sim: The folder of the simulated accelerator's library, or None for a machine without accelerators.
    """

    def __init__(self, library: Path, *, threads: int = 1, sim: Path | None = None) -> None:
        self._library = library
        self._threads = threads
        self._sim = "" if sim is None else str(sim)
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()

    def count(self, case: Case) -> int:
        """Returns how many allocations an undisturbed run asks for.

        Raises:
            RuntimeError: It did not end right.
        """
        run = self.run(case, 0, persistent=False)
        if run.outcome != "right":
            raise RuntimeError(f"an undisturbed run ended with: {run.outcome}")
        return run.allocations

    def run(self, case: Case, nth: int, *, persistent: bool, cap: int | None = None, room: int | None = None) -> Run:
        """Refuses allocation `nth` (0 for none), or it and all after it.

        With `cap`, refuses what takes the heap that many bytes beyond what it had once the model was loaded; with
        `room`, the kernel refuses what takes the address space that many bytes beyond what it was before.
        """
        if self._child is None:
            environment = {**preloaded(self._library), "OMP_NUM_THREADS": str(self._threads), "RUST_BACKTRACE": "0"}
            self._child = _Child([sys.executable, "-m", "src.tests.cpu_sweep", self._sim], environment)
        request = {"case": dataclasses.asdict(case), "nth": nth, "persistent": persistent, "cap": cap, "room": room}
        try:
            answer, end = self._child.ask(json.dumps(request))
        except BaseException:
            # A test that ran out of time leaves no answer behind for the next one.
            self._child.close()
            self._child = None
            raise
        if answer:
            return Run(**json.loads(answer))
        self._child.close()
        self._child = None
        return Run(nth, persistent, f"the process {end}")


class _Child:
    """A process that answers each line with a line."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=PIPE, stdout=PIPE, stderr=self._complaints
        )

    def ask(self, line: str) -> tuple[str, str]:
        """Returns the answer, or "" and how the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        killer = threading.Timer(LONGEST_RUN, self._process.kill)
        killer.start()
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            killer.cancel()
        if answer:
            return answer, ""
        code = self._process.wait()
        self._complaints.seek(0)
        how = f"was killed after {LONGEST_RUN:.0f} s" if code == -signal.SIGKILL else f"died with {code}"
        return "", f"{how}: {self._complaints.read()[-4000:]}"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()


# What follows runs in the child.


def main() -> None:
    faulthandler.enable()
    # Others than the answers go to the terminal's other stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with _accelerator(sys.argv[1]) as sim:
        runners: dict[str, Runner] = {}
        for request in map(json.loads, sys.stdin):
            faulthandler.dump_traceback_later(LONGEST_RUN * 0.8)
            key = json.dumps(request["case"])
            if key not in runners:
                case = Case(**{**request["case"], "refusing": Refusing(**request["case"]["refusing"])})
                runners[key] = Runner(case, sim)
            run = runners[key].run(
                request["nth"], persistent=request["persistent"], cap=request["cap"], room=request["room"]
            )
            answers.write(json.dumps(dataclasses.asdict(run)) + "\n")
            answers.flush()


@contextmanager
def _accelerator(folder: str) -> Iterator[SimulatedAccelerator | None]:
    from . import simulated_accelerator

    if not folder:
        yield None
        return
    with simulated_accelerator.load(Path(folder)).lent() as sim:
        yield sim


@contextmanager
def _limited(room: int | None) -> Iterator[None]:
    """Lets the address space grow by `room` bytes at most."""
    if room is None:
        yield
        return
    import resource

    lines = Path("/proc/self/status").read_text().splitlines()
    size = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Runner:
    """Loads and answers with an allocation refused, and says how it ended."""

    def __init__(self, case: Case, sim: SimulatedAccelerator | None) -> None:
        from lyra_emergence.config import ModelConfig

        from .running import PROMPT, reference

        self._case = case
        self._config = ModelConfig(**case.settings)
        self._allocator = RefusingAllocator()
        first = tuple(case.prompt) or PROMPT
        self._prompts = (first, first[::-1])
        self._directories = tuple(Path(name) for name in (case.directory, *case.others))
        packed = self._config.load_in_8bit or self._config.load_in_4bit
        self._expected = {
            (directory, prompt): self._undisturbed(directory, prompt) if packed else reference(directory, prompt=prompt)
            for directory in self._directories
            for prompt in self._prompts
        }
        for library in (*_ABORTING, *(["libsim.so"] if sim is not None else [])):
            self._allocator.spare(library)
        self._sim = sim
        for _ in range(2):
            self.run(0, persistent=False)  # what is done once per process is done now
        # Giving memory back collects garbage: not every time through all of torch and transformers.
        gc.collect()
        gc.freeze()

    def run(self, nth: int, *, persistent: bool, cap: int | None = None, room: int | None = None) -> Run:
        """Loads and answers with allocation `nth` refused, and again with none."""
        self._loaded: Any = None
        self._cap, self._room = cap, room
        attempt = {"alone": self._alone, "shared": self._shared, "parallel": self._parallel}[self._case.mode]
        self._allocator.fail_at(nth, self._case.refusing, persistent=persistent)
        try:
            outcome = attempt()
        finally:
            self._allocator.disarm()
        allocations, refusals = self._allocator.allocations, self._allocator.refusals
        if (nth or cap is not None) and not refusals:
            outcome = "the failure was not met"
        outcome = self._again(outcome)
        self._loaded = None
        if self._sim is not None and any(self._sim.settled()):
            outcome = f"{outcome}; bytes left on the devices: {self._sim.settled()}"
        return Run(nth, persistent, outcome, allocations, self._allocator.live)

    def _alone(self) -> str:
        def action() -> None:
            with _limited(self._room):
                self._load_and_answer()

        return self._outcome(action)

    def _shared(self) -> str:
        """Two answers to two prompts from one model, side by side."""
        outcome = self._outcome(self._load)
        if outcome != "right":
            return outcome
        return self._side_by_side([partial(self._answer, self._loaded, prompt) for prompt in self._prompts])

    def _parallel(self) -> str:
        """Two loads of each checkpoint and an answer each, all side by side."""
        return self._side_by_side([partial(self._load_apart, directory) for directory in self._directories * 2])

    def _side_by_side(self, actions: Sequence[Callable[[], None]]) -> str:
        outcomes: list[str] = []
        begin = threading.Event()

        def work(action: Callable[[], None]) -> None:
            begin.wait()
            outcomes.append(self._outcome(action))

        threads = [threading.Thread(target=work, args=(action,)) for action in actions]
        with self._allocator.paused():
            for thread in threads:
                thread.start()
        with _limited(self._room):
            begin.set()
            for thread in threads:
                thread.join()
        wrong = [outcome for outcome in outcomes if outcome not in ("right", "refused")]
        if wrong or len(outcomes) < len(actions):
            return "; ".join([*wrong, f"{len(outcomes)} of {len(actions)} ended"])
        return "refused" if "refused" in outcomes else "right"

    def _outcome(self, action: Callable[[], None]) -> str:
        from lyra_emergence.errors import DoesNotFitError

        try:
            action()
        except DoesNotFitError:
            return "refused"
        except MemoryError as error:
            # Python's own, of an object: it is clean where what follows is right.
            ours = self._case.refusing.aligned < NEVER
            return _described(error) if ours else "memory error"
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
            return _described(error)
        return "right"

    def _again(self, outcome: str) -> str:
        again = self._outcome(self._answer_first if self._loaded is not None else self._load_and_answer)
        if self._loaded is not None:
            self._loaded.close()
        return outcome if again == "right" else f"{outcome}; then {again}"

    def _load(self) -> None:
        self._loaded = self._loaded_from(self._directories[0])
        if self._cap is not None:
            self._allocator.cap(self._cap, self._case.refusing)

    def _load_and_answer(self) -> None:
        self._load()
        self._answer_first()

    def _answer_first(self) -> None:
        self._answer(self._loaded, self._prompts[0])

    def _load_apart(self, directory: Path) -> None:
        loaded = self._loaded_from(directory)
        try:
            self._answer(loaded, self._prompts[0], directory)
        finally:
            loaded.close()

    def _loaded_from(self, directory: Path) -> Any:
        from lyra_emergence.loading import load

        return load(self._config, directory=directory)

    def _undisturbed(self, directory: Path, prompt: tuple[int, ...]) -> list[int]:
        """The tokens where nothing is refused: packed weights give others than the stored ones."""
        loaded = self._loaded_from(directory)
        try:
            return list(_tokens(loaded, prompt))
        finally:
            loaded.close()

    def _answer(self, loaded: Any, prompt: tuple[int, ...], directory: Path | None = None) -> None:
        """Answers, and checks every token as far as it comes."""
        tokens: list[int] = []
        expected = self._expected[directory or self._directories[0], prompt]
        try:
            tokens.extend(_tokens(loaded, prompt))
        finally:
            if tokens != expected[: len(tokens)]:
                raise WrongTokensError(f"{tokens} in place of {expected}")
        if len(tokens) < len(expected):
            raise WrongTokensError(f"the answer ended after {len(tokens)} of {len(expected)} tokens")


def _tokens(loaded: Any, prompt: tuple[int, ...]) -> Iterator[int]:
    from lyra_emergence.generation import GenerationOptions, stream_generate

    for chunk in stream_generate(loaded, prompt, GenerationOptions(max_new_tokens=_NEW_TOKENS)):
        yield from chunk.token_ids


class WrongTokensError(Exception):
    """The tokens are not those of plain transformers."""


def _described(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return f"{type(error).__name__}: {error} at " + " < ".join(f"{f.name}:{f.lineno}" for f in reversed(frames))


if __name__ == "__main__":
    main()

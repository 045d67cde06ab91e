"""What every test gets: an empty home, a seed, and on request the simulated accelerator and tiny checkpoints."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

# Neither torch nor transformers is imported here: the tests of what runs without them must not pay for them.
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

# The models here are tiny: a second thread only waits for the first, and on a busy machine it waits forty times as long
# as the work takes. Set before torch is imported; programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_MOST_WORKERS = 4
"""Each has torch, transformers and the models of its tests in memory, a gigabyte of it."""
_OUTCOME = pytest.StashKey[bool]()
# Set by a developer or a CI machine: a test must not see them.
_FOREIGN_VARIABLES = (
    "NO_COLOR",
    "FORCE_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "HF_ENDPOINT",
)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) and config.cache is not None:
        # Each of the programs that tests start would compile all of torch and transformers anew.
        sys.dont_write_bytecode = False
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = str(config.cache.mkdir("bytecode"))
    # huggingface_hub reads this once, when it is first imported: during collection, before any fixture.
    directory = tempfile.TemporaryDirectory(prefix="lyra-hf-home-")
    config.add_cleanup(directory.cleanup)
    os.environ["HF_HOME"] = directory.name


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs in several processes; what is asked for by name in this one."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not (config.option.keyword or config.option.lf)
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0))) if whole else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_OUTCOME] = report.passed
    return report


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, with the folders that programs look for below it.

    Compiled kernels are shared: to compile them for every program that a test starts would take seconds each.
    """
    directory = tmp_path_factory.mktemp("home")
    kernels = tmp_path_factory.getbasetemp() / "kernels"
    kernels.mkdir(exist_ok=True)
    (directory / ".cache" / "lyra-emergence").mkdir(parents=True)
    (directory / ".cache" / "lyra-emergence" / "kernels").symlink_to(kernels)
    for name in [*_FOREIGN_VARIABLES, *(name for name in os.environ if name.startswith("LYRA_"))]:
        monkeypatch.delenv(name, raising=False)
    for name, folder in {
        "HOME": "",
        "USERPROFILE": "",
        "XDG_CACHE_HOME": ".cache",
        "XDG_CONFIG_HOME": ".config",
        "XDG_DATA_HOME": ".local/share",
        "XDG_STATE_HOME": ".local/state",
        "HF_HOME": ".cache/huggingface",
    }.items():
        monkeypatch.setenv(name, str(directory / folder))
    return directory


@pytest.fixture(autouse=True)
def _seed() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def simulated_devices(request: pytest.FixtureRequest) -> Iterator[SimulatedAccelerator]:
    """The registered backend, switched off: what a test that asks for no device sees."""
    import transformers  # noqa: F401 - see below

    from . import simulated_accelerator

    cache = request.config.cache
    try:
        accelerator = simulated_accelerator.load(cache.mkdir("simulated_accelerator") if cache else None)
    except simulated_accelerator.CompilerMissingError as error:
        pytest.skip(str(error))
    # Recovering from a lack of memory collects garbage: not every time through all of torch and transformers.
    gc.collect()
    gc.freeze()
    yield accelerator
    gc.unfreeze()


@pytest.fixture
def sim(request: pytest.FixtureRequest, simulated_devices: SimulatedAccelerator) -> Iterator[SimulatedAccelerator]:
    """The simulated accelerator, on for this test alone, which must leave no byte on it.

    A failed test is not checked: its traceback holds its tensors.
    """
    with simulated_devices.lent() as accelerator:
        before = accelerator.settled()
        yield accelerator
        after = accelerator.settled(before)
        if request.node.stash.get(_OUTCOME, False):
            grown = [now - then for then, now in zip(before, after, strict=True)]
            assert max(grown) <= 0, f"the test left bytes on the devices: {grown}"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints("llama")` is the folder of a tiny checkpoint of that family, built on first use."""
    from .families import build_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    built: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in built:
            built[family] = build_checkpoint(family, root / family)
        return built[family]

    return find

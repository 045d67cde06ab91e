"""The names that users import, and what importing them costs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lyra_emergence

ROOT = Path(__file__).parents[2]
NAMES = [
    "ChatSession",
    "CheckpointIndex",
    "Chunk",
    "ConfigError",
    "DoesNotFitError",
    "Footprint",
    "GenerationError",
    "GenerationOptions",
    "LoadReport",
    "LoadedModel",
    "LyraError",
    "LyraPipeline",
    "Machine",
    "ModelConfig",
    "Placement",
    "Plan",
    "estimate_footprint",
    "find_local",
    "load",
    "load_config",
    "make_plan",
    "probe_machine",
    "read_checkpoint",
    "resolve_config",
    "safe_load_embeddings",
    "safe_load_model",
    "safe_load_model_with_config",
    "safe_load_pipeline",
    "safe_load_pipeline_legacy",
    "save_config",
    "stream_generate",
]


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_public_names_are_these() -> None:
    assert lyra_emergence.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_is_its_homes_own(name: str) -> None:
    found = getattr(lyra_emergence, name)
    home = importlib.import_module(f"lyra_emergence.{lyra_emergence._HOMES[name]}")
    assert found is getattr(home, name)
    assert found.__doc__
    assert name in dir(lyra_emergence)


def test_star_import_brings_them_all() -> None:
    found: dict[str, object] = {}
    exec("from lyra_emergence import *", found)
    assert set(NAMES) <= set(found)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'lyra_emergence' has no attribute 'safe_load'$"):
        _ = lyra_emergence.safe_load


def test_importing_costs_nothing() -> None:
    heavy = ("torch", "transformers", "pydantic", "numpy", "psutil")
    done = python(f"import sys, lyra_emergence\nprint([name for name in {heavy} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_planning_needs_neither_torch_nor_transformers() -> None:
    done = python(
        "import sys\n"
        "from lyra_emergence import ModelConfig, estimate_footprint, make_plan, probe_machine, read_checkpoint\n"
        "probe_machine()\n"
        "print([name for name in ('torch', 'transformers', 'accelerate', 'numpy') if name in sys.modules])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", ["src.lyra_emergence", "src.lyra_emergence.plan"])
def test_it_is_imported_by_one_name_alone(name: str) -> None:
    done = python(f"import {name}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: import it as 'lyra_emergence', not as 'src.lyra_emergence'"

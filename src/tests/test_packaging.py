"""The wheel holds the library and nothing else, and a checkout's helpers stay out of the way of other packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "lyra_emergence"
OUR_HOME = os.environ.get("HOME", "")
# What setuptools reads; the rest of the checkout has no business in a wheel.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "lyra.py", "src", "config", "data")
BUILD = "import setuptools.build_meta as backend, sys; backend.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the checkout by setuptools of this environment, or by uv without the network."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    dist = copy / "dist"
    dist.mkdir()
    if find_spec("setuptools") is not None:
        command = [sys.executable, "-c", BUILD, str(dist)]
    elif shutil.which("uv") is not None:
        command = ["uv", "build", "--wheel", "--offline", "--out-dir", str(dist)]
    else:
        pytest.skip("neither setuptools nor uv is here to build a wheel")
    environment = {**os.environ, "HOME": OUR_HOME}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode and command[0] == "uv" and "setuptools" in done.stderr:
        pytest.skip("uv has no setuptools at hand, and may not fetch it")
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(dist.glob("*.whl")))


def test_the_wheel_holds_the_library_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lyra_emergence"}
    held = {name for name in names if name.startswith("lyra_emergence/")}
    present = {
        f"lyra_emergence/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == present
    assert {"lyra_emergence/py.typed", "lyra_emergence/config/model_config.schema.json"} <= held


def test_the_wheel_brings_the_bundled_model(wheel: zipfile.ZipFile) -> None:
    bundled = {name.rpartition("/")[2] for name in wheel.namelist() if name.startswith("lyra_emergence/bundled/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= bundled


def test_the_wheel_has_the_command_the_license_and_the_extras(wheel: zipfile.ZipFile) -> None:
    folder = next(name.partition("/")[0] for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert (
        wheel.read(f"{folder}/entry_points.txt").decode()
        == "[console_scripts]\nlyra = lyra_emergence.cli:run_program\n"
    )
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    metadata = wheel.read(f"{folder}/METADATA").decode().splitlines()
    assert {
        "Provides-Extra: quant",
        "Provides-Extra: offline",
        "Provides-Extra: serve",
        "License-Expression: MIT",
    } <= set(metadata)


def test_every_package_of_the_library_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(path.parts) for path in found)


def test_the_wheel_works_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import lyra_emergence, lyra_emergence.cli;"
        "from lyra_emergence.bundled import bundled_directory; print(lyra_emergence.__file__);"
        "print((bundled_directory() / 'model.safetensors').is_file());"
        "sys.exit(lyra_emergence.cli.main(['config', 'schema']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [str(tmp_path / "lyra_emergence" / "__init__.py"), "True"]
    assert '"$schema"' in done.stdout


@pytest.mark.parametrize("name", ["utils", "config", "tests", "utils.device_fallback", "config.model_config"])
def test_no_general_name_is_taken(name: str, tmp_path: Path) -> None:
    code = f"import lyra_emergence, importlib; importlib.import_module({name!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: No module named ")


def test_a_second_copy_of_the_library_is_refused() -> None:
    with pytest.raises(ImportError, match=r"^import it as 'lyra_emergence', not as 'src\.lyra_emergence'$"):
        import src.lyra_emergence  # noqa: F401

"""What users install: the wheel holds every file of the three folders and works where there is no source tree.

The compiled kernels are in it, and only where no compiler is found the wheel does without.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("compression", "storage", "jobs")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DEAD = shutil.ignore_patterns("__pycache__", ".*", "*.so")
LIBRARIES = {"fleetpress/compression/kernels/_quantize.abi3.so", "fleetpress/storage/_symbols.abi3.so"}

ASK_KERNELS = """
from fleetpress.compression import kernels
from fleetpress.compression.scheme import SCHEMES
from fleetpress.storage import symbol_kernel
print(kernels.available(), kernels.supports("BF16", SCHEMES["W4A16"], (8, 256)), symbol_kernel.available())
"""

IMPORT_EVERYTHING = """
import importlib, json, sys
from importlib.metadata import version
modules = [importlib.import_module(name) for name in json.loads(sys.argv[1])]
print(json.dumps({"version": version("fleetpress"), "files": [module.__file__ for module in modules]}))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV"}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, **variables: str) -> Path:
    """Built from a copy: setuptools leaves a build folder behind, and packs what an earlier one held."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=DEAD)
    run(
        *(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", tree / "dist"),
        cwd=tree,
        **variables,
    )
    (built,) = (tree / "dist").iterdir()
    return built


def install(wheel: Path, home: Path) -> Path:
    """The bin folder of a fresh environment that holds the wheel and borrows its dependencies from this one."""
    venv.create(home, symlinks=True, with_pip=False)
    scheme = {"base": str(home), "platbase": str(home)}
    # A path line adds a folder but does not run the .pth files in it: this environment's editable install stays out.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(sysconfig.get_path("purelib", "venv", scheme), "borrowed.pth").write_text(
        "\n".join(sorted(borrowed))
    )
    scripts = Path(sysconfig.get_path("scripts", "venv", scheme))
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=home)
    return scripts


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its library is not optimized, which takes a tenth of the time of an install's, and gives the same results."""
    compiler = tmp_path_factory.mktemp("compiler") / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {sysconfig.get_config_var("CC")} "$@" -O0\n')
    compiler.chmod(0o755)
    return build("wheel", tmp_path_factory.mktemp("tree"), CC=str(compiler))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


def test_wheel_holds_every_file_of_the_folders_and_the_library_and_no_other(wheel: Path) -> None:
    files = [
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file()
    ]
    kept = [file for file in files if file.suffix != ".c" and not DEAD("", list(file.parts))]
    expected = {*LIBRARIES, *(f"fleetpress/{file.as_posix()}" for file in kept)}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        notices = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert packed == expected
    assert len(notices) == 1


def test_every_module_imports_from_the_wheel_alone_and_the_kernel_works(
    wheel: Path, installed: Path, tmp_path: Path
) -> None:
    assert "-cp311-abi3-" in wheel.name  # one for every Python
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.endswith(".py")]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]
    code = IMPORT_EVERYTHING + ASK_KERNELS
    told, kernels = run(installed / "python", "-c", code, json.dumps(modules), cwd=tmp_path).splitlines()
    assert kernels.split() == ["True", "True", "True"]
    found = json.loads(told)
    assert found["version"] == VERSION
    strangers = [file for file in found["files"] if not Path(file).is_relative_to(installed.parent)]
    assert not strangers


def test_the_command_of_the_wheel_answers(installed: Path, tmp_path: Path) -> None:
    assert "usage: fleetpress" in run(installed / "fleetpress", "--help", cwd=tmp_path)


def test_without_a_compiler_the_wheel_does_without_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    bare = build("wheel", tmp_path / "tree", CC="no-such-compiler")
    with zipfile.ZipFile(bare) as archive:
        assert not LIBRARIES & set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    code = f"{ASK_KERNELS}print(kernels.__file__)"
    *available, file = run(sys.executable, "-c", code, cwd=tmp_path / "installed").split()
    assert available == ["False"] * 3
    assert Path(file).is_relative_to(tmp_path / "installed")


def test_the_source_archive_can_build_the_kernel(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "compression/kernels/quantize.c", "storage/symbol_kernel.c"} <= names

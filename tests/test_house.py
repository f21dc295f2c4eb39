"""The rules of the house that no linter knows: what lies where, who imports what, what starts fast."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("compression", "storage", "jobs")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
STDLIB_COMPRESSION = {"_common", "bz2", "gzip", "lzma", "zlib", "zstd"}


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


@cache
def imported_modules(path: Path) -> list[str]:
    """Absolute imports of a file, those inside functions too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.append(node.module)
    return found


def importers(library: str) -> set[str]:
    """Files of the three packages that import `library`, as paths from the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in sources(*PACKAGES)
        if any(name.split(".")[0] == library for name in imported_modules(path))
    }


def run_python(code: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


# ---- what lies where


def test_pyproject_names_every_package() -> None:
    """A folder that the list forgets works in an editable install and is missing from the wheel."""
    folders = {"fleetpress." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources(*PACKAGES)}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed_and_initialised(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    for folder in {path.parent for path in sources(package)}:
        assert (folder / "__init__.py").exists(), f"{folder}: not a package, the wheel would miss it"


def test_no_file_is_too_long_to_read() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in sources(*PACKAGES, "tests")}
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MAX_LINES}


def test_every_file_is_named_for_what_it_holds() -> None:
    assert not [path for path in sources(*PACKAGES, "tests") if path.stem in VAGUE_NAMES]


def test_no_module_hides_one_of_the_standard_library() -> None:
    assert not [path for path in (ROOT / "compression").iterdir() if path.stem in STDLIB_COMPRESSION]


def test_the_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PYPROJECT["project"]["version"]


def test_every_dependency_is_pinned_for_the_tests() -> None:
    def canonical(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()

    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "exact public versions only"
    assert {canonical(name) for name in wanted} - {"fleetpress"} <= {canonical(pin) for pin in pins}


# ---- who imports what


def test_ray_is_imported_by_the_ray_executors_alone() -> None:
    assert not {path for path in importers("ray") if not re.fullmatch(r"jobs/executors/ray\w*\.py", path)}


def test_boto3_is_imported_by_the_s3_store_alone() -> None:
    found = importers("boto3") | importers("botocore")
    assert not {path for path in found if not re.fullmatch(r"storage/s3\w*\.py", path)}


def test_packages_are_imported_by_their_full_names() -> None:
    """The root may be on sys.path, and then `storage.x` is another module than `fleetpress.storage.x`."""
    for bare in PACKAGES:
        assert not importers(bare), f"import fleetpress.{bare}"


# ---- Python 3.14, whose standard library has a package `compression` of its own

SHADOWED = """
import os, sys
# Stands in for the standard library of 3.14: `compression/newcomer.py` beside os.py.
os.__file__ = os.path.join(sys.argv[1], "os.py")
sys.path.insert(0, sys.argv[2])
import compression
import compression.newcomer
assert compression.__file__.startswith(sys.argv[2]), compression.__file__
assert compression.__path__ == [os.path.join(sys.argv[2], "compression"), os.path.join(sys.argv[1], "compression")]
print(compression.newcomer.ANSWER)
"""


def test_the_standard_compression_package_is_found_behind_ours(tmp_path: Path) -> None:
    (tmp_path / "compression").mkdir()
    (tmp_path / "compression" / "newcomer.py").write_text("ANSWER = 42\n")
    done = run_python(SHADOWED, str(tmp_path), str(ROOT), cwd=tmp_path)
    assert (done.stdout.strip(), done.returncode) == ("42", 0), done.stderr


def test_our_compression_package_is_not_extended(tmp_path: Path) -> None:
    done = run_python("import fleetpress.compression as c; print(*c.__path__, sep='\\n')", cwd=tmp_path)
    assert done.stdout.splitlines() == [str(ROOT / "compression")], done.stderr


# ---- what starts fast

WATCH_IMPORTS = """
import sys
from fleetpress.jobs.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:  # argparse leaves this way after --help
    code = stop.code or 0
heavy = {"torch", "ray", "numpy", "pandas", "pyarrow", "boto3"} & set(sys.modules)
print("heavy:", *sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["status", "--help"],
        ["status", "nowhere"],
        ["status", "empty", "--json"],
    ],
    ids=" ".join,
)
def test_light_commands_load_no_heavy_library(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run_python(WATCH_IMPORTS, *args, cwd=tmp_path)
    assert done.returncode in ({0} if "--help" in args else {0, 2, 5}), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "heavy:"

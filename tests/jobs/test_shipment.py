"""What a job takes along: fleetpress itself, the spec, the user's code, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from fleetpress.jobs import shipment
from fleetpress.jobs.errors import UsageError
from fleetpress.jobs.shipment import SPEC_IN_JOB, pack

SPEC = """\
version: 1
name: nightly
output: {output}
models:
  - {{source: "{source}/net.pt", factory: "nets.small:build", recipe: w4}}
recipes:
  w4: {{quantize: {{scheme: W4A16}}}}
"""
TELL = """
import sys, fleetpress.jobs.submitted as submitted, fleetpress.compression.kernels as kernels, nets.small
from importlib.metadata import version
print(version("fleetpress"), submitted.__file__, kernels.__file__, nets.small.__file__, sep="\\n")
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "fleet.yaml"
    path.write_text(SPEC.format(output="s3://bucket/out", source="s3://bucket/in"))
    return str(path)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with a package of a factory, beside what is no code."""
    package = tmp_path / "code" / "nets"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "small.py").write_text("def build(): ...\n")
    (package / "__pycache__" / "small.pyc").touch()
    (tmp_path / "code" / ".env").write_text("PASSWORD=secret")
    return tmp_path / "code"


def test_what_is_laid_out_is_imported_before_what_the_node_has(spec: str, code: Path, tmp_path: Path) -> None:
    packed = pack(spec, allow_code=True, code=[code])
    environment = packed.lay_out(tmp_path / "job")
    assert set(environment) == {"working_dir", "py_modules"}
    work, (package, metadata) = Path(environment["working_dir"]), map(Path, environment["py_modules"])
    assert package.name == "fleetpress"
    assert metadata.parent == package.parent
    assert (work / SPEC_IN_JOB).read_text() == Path(spec).read_text()
    shipped = [path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()]
    assert sorted(shipped) == [SPEC_IN_JOB, "nets/__init__.py", "nets/small.py"]
    done = subprocess.run(
        [sys.executable, "-c", TELL],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(package.parent), str(work)))},
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    told, *files = done.stdout.splitlines()
    assert told == version("fleetpress")
    assert all(Path(file).is_relative_to(tmp_path / "job") for file in files), files


def test_all_of_fleetpress_goes_along_but_no_source_of_the_kernel(spec: str) -> None:
    root = Path(__file__).parents[2]
    files = {
        f"fleetpress/{path.relative_to(root).as_posix()}"
        for folder in ("jobs", "storage", "compression")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".html", ".yaml", ".typed", ".so")
    }
    packed = pack(spec, allow_code=False)
    assert files <= packed.package.keys()
    assert not [path for path in packed.package if path.endswith((".c", ".pyc"))]
    assert packed.warnings == ("nets.small:build is code: its models fail without --allow-code",)


def test_the_digest_is_that_of_what_the_job_does(
    spec: str, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pack(spec, allow_code=True).digest
    with_code = pack(spec, allow_code=True, code=[code]).digest
    assert pack(spec, allow_code=True).digest == plain
    assert pack(spec, allow_code=True, code=[code / "nets"]).digest == with_code
    (code / ".env").write_text("another")
    assert pack(spec, allow_code=True, code=[code]).digest == with_code
    (code / "nets" / "small.py").write_text("def build(): return 1\n")
    digests = {plain, with_code, pack(spec, allow_code=True, code=[code]).digest}
    digests.add(pack(spec, allow_code=False).digest)
    Path(spec).write_text(Path(spec).read_text() + "seed: 1\n")
    digests.add(pack(spec, allow_code=True).digest)
    monkeypatch.setattr(shipment, "_version", lambda: "9.9.9")
    digests.add(pack(spec, allow_code=True).digest)
    assert len(digests) == 6


def test_folders_are_right_only_where_every_node_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(SPEC.format(output="/shared/out", source="s3://bucket/in"))
    assert "/shared/out: folders are only right where every node sees them" in pack(
        str(path), allow_code=True
    ).warnings[0]  # fmt: skip
    path.write_text(SPEC.format(output="out", source="in/models"))
    with pytest.raises(UsageError) as caught:
        pack(str(path), allow_code=True)
    first, second = str(caught.value).splitlines()
    assert "fleet.yaml: output: `out` is relative" in first
    assert (
        "models[0].source: `in/models/net.pt` is relative to a folder that the cluster does not have"
        in second
    )


def hiding(code: Path) -> None:
    (code / "torch.py").touch()


def large(code: Path) -> None:
    (code / "weights.bin").write_bytes(bytes((20 << 20) + 1))


def foreign(code: Path) -> None:
    (code / "nets").rename(code / "other")


def linked(code: Path) -> None:
    (code.parent / "outside").write_text("secret")
    (code / "inside").symlink_to(code.parent / "outside")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hiding, "'torch' would hide another package"),
        (large, "more than 20 MiB are no code"),
        (foreign, r"holds no module of the spec's factories \(nets.small:build\)"),
        (linked, "inside: is a link that leads out of"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_code_does_not_go_along(
    change: Callable[[Path], None], message: str, spec: str, code: Path
) -> None:
    change(code)
    with pytest.raises(UsageError, match=message):
        pack(spec, allow_code=True, code=[code])


def test_code_needs_leave_and_a_place(spec: str, code: Path) -> None:
    with pytest.raises(UsageError, match="allow it with --allow-code"):
        pack(spec, allow_code=False, code=[code])
    with pytest.raises(UsageError, match="no Python file and no folder"):
        pack(spec, allow_code=True, code=[code / "missing"])
    (code / "nets.py").write_text("")
    assert list(pack(spec, allow_code=True, code=[code / "nets.py"]).code) == ["nets.py"]

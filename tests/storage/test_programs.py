"""Programs to bytes and back: the same function, the same bytes, and nothing but plain torch to run them."""

import copy
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fleetpress.storage.errors import InvalidModelFile
from fleetpress.storage.programs import load_program, module_to_program, save_program, weights_skeleton
from fleetpress.storage.store import ObjectStore, open_store

NETS = """
import torch
from torch import nn


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu()).flatten(1)) + torch.tensor([1.0, 2, 3, 4, 5])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, a, b):
        return {"sum": self.left(a) + self.right(b), "pair": (self.left(a) * self.scale, b)}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.block(x)


torch.manual_seed(0)
CASES = {
    "cnn": (Cnn(), (torch.randn(2, 1, 8, 8),)),
    "tied": (Tied(), (torch.randint(0, 20, (3, 5)),)),
    "recurrent": (Recurrent(), (torch.randn(2, 5, 3),)),
    "two_inputs": (TwoInputs(), (torch.randn(2, 3), torch.randn(2, 2))),
    "attention": (Attention(), (torch.randn(2, 5, 8),)),
}
"""
_scope: dict[str, Any] = {}
exec(NETS, _scope)
CASES: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = _scope["CASES"]


def program_of(name: str, dynamic: bool = True) -> ExportedProgram:
    module, inputs = CASES[name]
    return module_to_program(module, inputs, dynamic_batch=dynamic)


def outputs(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return pytree.tree_leaves(module(*inputs))


def assert_same_function(one: nn.Module, other: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    left, right = outputs(one, inputs), outputs(other, inputs)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, dynamic: bool) -> None:
    program = program_of(name, dynamic)
    data = save_program(program)
    loaded = load_program(data)
    assert list(loaded.state_dict) == list(program.state_dict)
    assert_same_function(program.module(), loaded.module(), CASES[name][1])
    assert save_program(loaded) == data
    assert save_program(copy.deepcopy(loaded)) == data
    larger = tuple(torch.cat([t, t, t]) for t in CASES[name][1])
    if dynamic:
        assert_same_function(program.module(), loaded.module(), larger)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            loaded.module()(*larger)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2).to(dtype)
    program = module_to_program(module, (torch.ones(2, 3, dtype=dtype),))
    loaded = load_program(save_program(program))
    assert loaded.state_dict["weight"].dtype == dtype
    assert torch.equal(loaded.state_dict["weight"], module.weight)


def test_the_input_is_left_alone() -> None:
    program = program_of("cnn")
    state = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    code, examples = program.graph_module.code, program.example_inputs
    save_program(program)
    assert program.graph_module.code == code
    assert program.example_inputs is examples
    assert all(torch.equal(state[name], tensor) for name, tensor in program.state_dict.items())


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    data = save_program(program_of("tied"), compress=False)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [n for n in archive.namelist() if "weight_" in n and "json" not in n] == [
            "archive/data/weights/weight_0"
        ]
    loaded = load_program(data)
    assert loaded.state_dict["embed.weight"] is loaded.state_dict["head.weight"]
    assert len({p.data_ptr() for p in loaded.module().parameters()}) == 1
    copied = copy.deepcopy(loaded).state_dict
    assert copied["embed.weight"].data_ptr() == copied["head.weight"].data_ptr()


def test_a_view_is_stored_without_the_rest_of_its_storage() -> None:
    program = program_of("two_inputs")
    big = torch.randn(1000, 3)
    program.state_dict["left.weight"] = nn.Parameter(big[10:14])
    data = save_program(program, compress=False)
    assert len(data) < 12_000 + 4 * 3 * 4
    assert torch.equal(load_program(data).state_dict["left.weight"], big[10:14])
    program.state_dict["left.weight"] = nn.Parameter(big[10:13].new_tensor(big[10:14].T.tolist()).T)
    assert save_program(program, compress=False) == data


def test_no_pickle_no_paths_no_clock() -> None:
    with zipfile.ZipFile(io.BytesIO(save_program(program_of("cnn")))) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert members["archive/data/sample_inputs/model.pt"] == b""
    assert "archive/.data/serialization_id" not in members
    for name, data in members.items():
        assert not data.startswith((b"\x80\x02", b"\x80\x04", b"PK")), name
    graph = members["archive/models/model.json"]
    for word in (b"stack_trace", b"nn_module_stack", b"torch_fn", b".py", b"/tmp", b": "):
        assert word not in graph.replace(b'\\": ', b"").replace(b", \\", b""), word


def test_compression_is_smaller_and_the_same_program() -> None:
    program = program_of("attention")
    small, large = save_program(program), save_program(program, compress=False)
    assert len(small) < len(large)
    assert save_program(load_program(small), compress=False) == large


def run_python(code: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_torch_runs_it_and_another_process_saves_the_same_bytes(tmp_path: Path) -> None:
    """In one process: first it has not loaded this package."""
    here = []
    for name in CASES:
        program = program_of(name)
        data = save_program(program)
        here.append(f"{name} {hashlib.sha256(data).hexdigest()}")
        (tmp_path / f"{name}.pt2").write_bytes(data)
        expected = [t.tolist() for t in outputs(program.module(), CASES[name][1])]
        (tmp_path / f"{name}.json").write_text(repr((expected, [t.tolist() for t in CASES[name][1]])))
    code = (
        "import sys, torch, pathlib\n"
        "for path in sorted(pathlib.Path('.').glob('*.pt2')):\n"
        "    expected, inputs = eval(path.with_suffix('.json').read_text())\n"
        "    out = torch.export.load(str(path)).module()(*(torch.tensor(i) for i in inputs))\n"
        "    leaves = torch.utils._pytree.tree_leaves(out)\n"
        "    assert all(torch.allclose(a, torch.tensor(b), atol=1e-6) for a, b in zip(leaves, expected, strict=True))\n"
        "    print(path)\n"
        "assert not any(name.split('.')[0] == 'fleetpress' for name in sys.modules)\n"
    )
    code += NETS + (
        "import hashlib\nfrom fleetpress.storage.programs import module_to_program, save_program\n"
        "for name in CASES:\n    data = save_program(module_to_program(*CASES[name]))\n"
        "    print(name, hashlib.sha256(data).hexdigest())\n"
    )
    printed = run_python(code, tmp_path).splitlines()
    assert len(printed[: -len(CASES)]) == len(CASES)
    assert printed[-len(CASES) :] == here


class Spy:
    """A store that remembers which ranges were read."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.ranges: list[tuple[int, int]] = []

    def get_range(self, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        self.ranges.append((start, start + length))
        return self._store.get_range(key, start, length, etag=etag)

    def get(self, key: str, *, etag: str | None = None, most_bytes: int | None = None) -> bytes:
        raise AssertionError(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.parametrize("plain", [True, False], ids=["torch_save", "save_program"])
@pytest.mark.parametrize("name", CASES)
def test_a_skeleton_reads_no_weight(name: str, plain: bool, tmp_path: Path) -> None:
    program = program_of(name)
    if plain:
        torch.export.save(program, tmp_path / "m.pt2")
    else:
        (tmp_path / "m.pt2").write_bytes(save_program(program))
    spy = Spy(open_store(str(tmp_path)))
    skeleton, bytes_read = weights_skeleton(spy, "m.pt2", spy.head("m.pt2").etag)  # type: ignore[arg-type]
    assert bytes_read == sum(end - start for start, end in spy.ranges)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        for info in archive.infolist():
            start = info.header_offset + 30 + len(info.filename)
            if "weights/weight_" in info.filename:
                assert all(end <= start or begin >= start + info.compress_size for begin, end in spy.ranges)
    for key, tensor in program.state_dict.items():
        assert skeleton.state_dict[key].shape == tensor.shape
        assert skeleton.state_dict[key].dtype == tensor.dtype
        assert skeleton.state_dict[key].untyped_storage().nbytes() == tensor.element_size()
    assert [str(n) for n in skeleton.graph.nodes] == [str(n) for n in program.graph.nodes]
    shared = len({t.data_ptr() for t in program.state_dict.values()})
    assert len({t.data_ptr() for t in skeleton.state_dict.values()}) == shared


def test_a_bad_skeleton_names_the_object(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"hello")
    with pytest.raises(InvalidModelFile, match=r"m\.pt2.*no ZIP"):
        weights_skeleton(open_store(str(tmp_path)), "m.pt2")


def test_exporting_a_module() -> None:
    module, (inputs,) = CASES["cnn"]
    module.train()
    program = module_to_program(module, {"x": inputs[:1]})
    assert module.training
    assert program.module()(x=torch.cat([inputs, inputs])).shape == (4, 5)
    program.state_dict["head.bias"].data.zero_()
    assert module.head.bias.abs().sum() > 0

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(6)

    assert not module_to_program(Fixed(), (torch.ones(2, 3),)).range_constraints

    class Untraceable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(InvalidModelFile, match="Untraceable cannot be exported"):
        module_to_program(Untraceable(), (torch.ones(2, 3),))


class Branches(nn.Module):
    """Control flow, a size derived from another, a map over rows, and a name that needs care."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b": nn.Linear(2, 2), "c d": nn.Linear(2, 2)})

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shorter = x[1:] + y
        with torch.no_grad():
            scale = torch.vmap(lambda row: row.sum() + row[0])(shorter)
        chosen = torch.cond(x.sum() > 0, self.parts["a-b"], self.parts["c d"], (shorter,))
        return (chosen * scale[:, None]).masked_fill(chosen > 9, float("-inf"))


def test_what_torch_itself_writes_for_unusual_programs_is_accepted() -> None:
    rows = torch.export.Dim("rows", min=3, max=50)
    inputs = (torch.randn(5, 2), torch.randn(4, 2))
    program = torch.export.export(Branches(), inputs, dynamic_shapes=({0: rows + 1}, {0: rows}))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    loaded = load_program(buffer.getvalue())
    for size in (4, 7):
        assert_same_function(
            program.module(), loaded.module(), (torch.ones(size + 1, 2), torch.ones(size, 2))
        )
    assert save_program(loaded) == save_program(program) == save_program(load_program(save_program(program)))


class Output(dict[str, torch.Tensor]):
    """What libraries return: a dict of their own type, which other processes do not have."""


def test_an_output_class_of_a_library_becomes_a_dict() -> None:
    pytree._register_pytree_node(
        Output,
        lambda output: (list(output.values()), list(output)),
        lambda values, keys: Output(zip(keys, values, strict=True)),
        serialized_type_name="library.Output",
    )

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Output:
            return Output(logits=x + 1, hidden=x)

    loaded = load_program(save_program(module_to_program(Model(), (torch.ones(2, 3),))))
    result = loaded.module()(torch.zeros(4, 3))
    assert type(result) is dict
    assert torch.equal(result["logits"], torch.ones(4, 3))


def test_a_skeleton_from_every_store(store: ObjectStore) -> None:
    info = store.put("m.pt2", save_program(program_of("tied")))
    skeleton, bytes_read = weights_skeleton(store, "m.pt2", info.etag)
    assert bytes_read < info.size_bytes
    assert {name: tuple(t.shape) for name, t in skeleton.state_dict.items()} == {
        "embed.weight": (20, 6),
        "head.weight": (20, 6),
    }

"""Exported programs to bytes and back: safely in, deterministically out, and headers only for planning.

torch.export.load is given only archives that `archive.clean_archive` built; see there for why.
"""

import copy
import io
import json
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

import torch
from torch._export.verifier import SpecViolationError
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim, ExportedProgram

from .archive import (
    CONSTANTS,
    CONSTANTS_CONFIG,
    MODEL,
    ROOT,
    WEIGHTS,
    WEIGHTS_CONFIG,
    Directory,
    clean_archive,
    clean_members,
    program_members,
    write_archive,
)
from .errors import InvalidModelFile, UnsafeModelFile
from .memory import is_out_of_memory
from .operators import is_safe_target
from .payloads import skeleton_config
from .program_payloads import Members, members_of
from .program_schema import Json
from .ranges import RangeFile
from .store import ObjectStore

# What torch raises for archives that are well-formed and still wrong, and for modules it cannot export.
_TORCH_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    SpecViolationError,
    SyntaxError,
    TypeError,
    ValueError,
)
# A size that is more than a number or one symbol, as torch writes it into the graph.
_COMPOUND_SIZE = re.compile(rb'"expr_str": ?"(?!Symbol\(\'\w+\'[^()"]*\)")')
_torch_lock = threading.Lock()  # torch's deserializer keeps its state in a module global


def load_program(data: bytes) -> ExportedProgram:
    """The program in the bytes of a `.pt2` archive, without sample inputs and node metadata.

    Nothing in `data` is unpickled, imported or evaluated. Raises UnsafeModelFile for archives that would have needed
    it, InvalidModelFile for every other defect.
    """
    return _load(clean_archive(data))


def save_program(program: ExportedProgram, *, compress: bool = True) -> bytes:
    """A `.pt2` archive that plain `torch.export.load` runs; a function of the program's graph and weights alone.

    No pickle, sample inputs, stack traces or source paths are in it. Tensors over one storage are stored once and stay
    tied; a view of a larger storage is stored as the view. Saving a loaded program gives the same bytes again. With
    `compress`, members are DEFLATE-compressed where that is smaller.
    Raises InvalidModelFile for programs that could not be loaded again (custom operators or objects, other devices).
    """
    return write_archive(_members(program), compress=compress)


def program_members_of(program: ExportedProgram) -> Members:
    """Graph, configs and raw tensors, as `save_program` writes them. Raises InvalidModelFile as it does."""
    found = {name.removeprefix(f"{ROOT}/"): data for name, data in _members(program).items()}
    graph, weights, constants = (
        json.loads(found[name]) for name in (MODEL, WEIGHTS_CONFIG, CONSTANTS_CONFIG)
    )
    configs = (WEIGHTS_CONFIG, CONSTANTS_CONFIG)
    raw = {
        name: data
        for name, data in found.items()
        if name.startswith((WEIGHTS, CONSTANTS)) and name not in configs
    }
    return members_of(graph, weights, constants, raw)


def program_without_weights(members: Members) -> ExportedProgram:
    """The program with its constants; each weight is a zero-stride view of one zero element, as in `weights_skeleton`.

    The members are checked (`members_with`). Raises InvalidModelFile if torch cannot make a program of them.
    """
    payloads = {
        payload.member: members.array(payload).tobytes()
        if payload.member.startswith(CONSTANTS)
        else bytes(payload.item_bytes if payload.layout.count else 0)
        for payload in members.payloads
    }
    weights = skeleton_config(members.weight_config)
    archive = program_members(members.graph, weights, members.constant_config, payloads)
    return _load(write_archive(archive, compress=False))


def _members(program: ExportedProgram) -> dict[str, bytes]:
    """Every member of the archive of a program, in canonical form."""
    slim = copy.copy(program)
    slim._state_dict = _compact(program.state_dict)
    slim._constants = _compact(program.constants)
    archive = _archived(slim)
    members = clean_members(archive, weights=True)
    model = f"{ROOT}/{MODEL}"
    if _COMPOUND_SIZE.search(members[model]):
        # Loading simplifies such sizes (Min(8, 8*s0) is 8 for s0 >= 1): the graph is that of the program loaded again.
        skeleton = _load(write_archive(clean_members(archive, weights=False), compress=False))
        members[model] = clean_members(_archived(skeleton), weights=False)[model]
    return _canonical(members, _state_order(program))


def _archived(program: ExportedProgram) -> Directory:
    """The archive torch writes, without sample inputs."""
    slim = copy.copy(program)
    slim._example_inputs = None
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(slim, buffer)
    return Directory(buffer, buffer.getbuffer().nbytes)


def weights_skeleton(store: ObjectStore, key: str, etag: str | None = None) -> tuple[ExportedProgram, int]:
    """The program `key` with its graph, names, shapes and dtypes, and how many bytes were read to get it.

    Weights are not read: each is a zero-stride view of one zero element (tied ones share it). Constants are read.
    Raises what `load_program` and the store raise; the message names the object.
    """
    info = store.head(key)
    size_bytes = info.size_bytes
    file = RangeFile(store, key, size_bytes, etag or info.etag)  # ranges of two versions must not mix
    try:
        directory = Directory(cast(IO[bytes], file), size_bytes)
        wanted = [name for name in directory.members if not name.startswith(f"{WEIGHTS}weight_")]
        file.prefetch(directory.spans(wanted))
        program = _load(write_archive(clean_members(directory, weights=False), compress=False))
    except InvalidModelFile as error:
        raise type(error)(f"{store.uri}/{key}: {error}") from None
    return program, file.bytes_read


def module_to_program(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    *,
    dynamic_batch: bool = True,
) -> ExportedProgram:
    """The module in eval mode as a program, its weights copied.

    `example_inputs`: positional tensors, or tensors by argument name. With `dynamic_batch` dimension 0 of all of them
    is the batch and may have any size; a module that fixes its batch size is exported for the example's.
    Raises InvalidModelFile if torch.export cannot trace the module.
    """
    frozen = copy.deepcopy(module).eval()
    named = isinstance(example_inputs, Mapping)
    tensors = list(example_inputs.values()) if isinstance(example_inputs, Mapping) else list(example_inputs)
    names = list(example_inputs) if isinstance(example_inputs, Mapping) else []

    def export(values: list[torch.Tensor], shapes: list[dict[int, Any]] | None) -> ExportedProgram:
        by_name = dict(zip(names, values, strict=True)) if named else {}
        dynamic = (
            None if shapes is None else (dict(zip(names, shapes, strict=True)) if named else tuple(shapes))
        )
        with _quiet():
            return torch.export.export(
                frozen, () if named else tuple(values), by_name, dynamic_shapes=dynamic
            )

    if dynamic_batch and tensors and len({t.shape[:1] for t in tensors}) == 1 and tensors[0].dim():
        # torch specializes sizes 0 and 1, so an example of one row is shown twice
        doubled = [torch.cat([t, t]) if len(t) == 1 else t for t in tensors]
        batch = Dim("batch", min=1)
        try:
            return export(doubled, [{0: batch} for _ in tensors])
        except (
            _TORCH_ERRORS
        ):  # the batch size stands in the code; the static export says so if that fails as well
            pass
    try:
        return export(tensors, None)
    except _TORCH_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise InvalidModelFile(
            f"{type(module).__name__} cannot be exported: {_first_line(error)}; its forward must suit torch.export"
        ) from None


def _load(clean: bytes) -> ExportedProgram:
    try:
        with _torch_lock, _quiet():
            program = torch.export.load(io.BytesIO(clean))
    except _TORCH_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise InvalidModelFile(
            f"torch cannot load the program: {_first_line(error)}; export it again"
        ) from None
    _check_targets(program)
    _share_tied(program)
    return program


def _share_tied(program: ExportedProgram) -> None:
    """Tied weights become one object under all their names: two objects over one storage fall apart when copied."""
    state = program.state_dict
    first: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.numel():
            same = (
                *_storage(tensor),
                *_view(tensor),
                isinstance(tensor, torch.nn.Parameter),
                tensor.requires_grad,
            )
            state[name] = first.setdefault(same, tensor)


def _check_targets(program: ExportedProgram) -> None:
    """What the names of the operators were resolved to is an operator."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            target = node.target
            if node.op == "call_function" and not isinstance(target, OpOverload | HigherOrderOperator):
                name = f"{getattr(target, '__module__', None)}.{getattr(target, '__name__', None)}"
                if not is_safe_target(name):
                    raise UnsafeModelFile(
                        f"node {node.name} calls {name}, which is no operator; export the model again"
                    )


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns and logs about what callers are told as errors, or what is meant (no sample inputs)."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    """The innermost cause in one line: torch wraps it in whole tracebacks."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _compact(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors; storages larger than what is seen of them are replaced, once for all tensors tied to them."""
    views: dict[tuple[int, torch.dtype], set[tuple[Any, ...]]] = {}
    for tensor in tensors.values():
        if isinstance(tensor, torch.Tensor):
            views.setdefault(_storage(tensor), set()).add(_view(tensor))
    copies: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        result[name] = tensor
        if isinstance(tensor, torch.Tensor) and len(views[_storage(tensor)]) == 1 and not _is_compact(tensor):
            copied = copies.setdefault(
                _storage(tensor), tensor.detach().clone(memory_format=torch.contiguous_format)
            )
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            result[name] = torch.nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return result


def _storage(tensor: torch.Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _is_compact(tensor: torch.Tensor) -> bool:
    return (
        tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _state_order(program: ExportedProgram) -> list[str]:
    """State names in the order of the graph's inputs, then those that no input takes."""
    lifted = [spec.target for spec in program.graph_signature.input_specs if spec.target is not None]
    return [*lifted, *sorted({*program.state_dict, *program.constants} - set(lifted))]


def _canonical(members: dict[str, bytes], order: list[str]) -> dict[str, bytes]:
    """The members with tensors numbered, and configs ordered, by `order`: torch's own order varies."""
    rank = {name: index for index, name in enumerate(order)}
    payloads: dict[str, bytes] = {}

    def renamed(config_member: str, folder: str, prefix: str) -> Json:
        entries = json.loads(members[f"{ROOT}/{config_member}"])["config"]
        numbers: dict[str, str] = {}
        config = {}
        for name in sorted(entries, key=lambda name: (rank.get(name, len(rank)), name)):
            old = entries[name]["path_name"]
            new = numbers.setdefault(old, f"{prefix}{len(numbers)}")
            payloads[f"{folder}{new}"] = members[f"{ROOT}/{folder}{old}"]
            config[name] = {**entries[name], "path_name": new}
        return {"config": config}

    weight_config = renamed(WEIGHTS_CONFIG, WEIGHTS, "weight_")
    constant_config = renamed(CONSTANTS_CONFIG, CONSTANTS, "tensor_")
    program = json.loads(members[f"{ROOT}/{MODEL}"])
    return program_members(program, weight_config, constant_config, payloads)

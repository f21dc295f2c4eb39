"""A `.pt2` archive from a stranger, checked and built again clean, with no pickle in it; torch is not imported here.

A `.pt2` (torch/export/pt2_archive) is a ZIP of one folder: `models/model.json` (the graph), raw tensors in
`data/weights/` and `data/constants/`, each with a JSON config, and pickled sample inputs, which nobody needs.
Only those members are read, and only what `program_schema` knows is kept; the rest is dropped, or refused if that
would change the model.
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from .errors import InvalidModelFile, UnsafeModelFile
from .payloads import Payload, read_payloads, skeleton_config
from .program_schema import SCHEMA_MAJOR, Json, clean_program
from .quoting import quoted
from .zip_files import ZipError, ZipReader

ROOT = "archive"
MODEL = "models/model.json"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
WEIGHTS_CONFIG = WEIGHTS + "model_weights_config.json"
CONSTANTS_CONFIG = CONSTANTS + "model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"

_FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", ".data/version": b"6\n"}
_DROPPED = re.compile(
    r"data/sample_inputs/model\.pt|extra/.+|\.data/serialization_id|\.format_version|\.storage_alignment"
)
_PAYLOAD = re.compile(r"data/weights/weight_[0-9]+|data/constants/tensor_[0-9]+")
_REQUIRED = ("archive_format", "archive_version", MODEL, WEIGHTS_CONFIG, CONSTANTS_CONFIG)
_REMEDY = "save it again with torch.export.save (torch 2.9 or newer)"
_MAX_JSON_BYTES = 256 << 20
_LOCAL_HEADER_BYTES = 30 + 128  # fixed part, and the padding torch aligns its tensors with
_EPOCH = (1980, 1, 1, 0, 0, 0)


class Directory:
    """The checked table of contents of an archive that is read from `file` (bytes, or ranges of an object)."""

    def __init__(self, file: IO[bytes], size_bytes: int) -> None:
        if size_bytes == 0:
            raise InvalidModelFile(f"the file is empty; {_REMEDY}")
        try:
            self._zip = ZipReader(file, size_bytes)
        except ZipError as error:
            raise InvalidModelFile(f"the file {error}; {_REMEDY}") from None
        self.members = _relative_names(self._zip.infos)
        _check_names(self.members)

    def spans(self, names: Iterable[str]) -> list[tuple[int, int]]:
        """Where the named members lie in the file: (start, end), local headers included."""
        starts = sorted(info.header_offset for info in self.members.values())
        ends = dict(zip(starts, [*starts[1:], self._zip.directory_start], strict=True))
        result = []
        for info in (self.members[name] for name in names):
            most = info.header_offset + _LOCAL_HEADER_BYTES + len(info.filename.encode()) + info.compress_size
            result.append((info.header_offset, min(most, ends[info.header_offset])))
        return result

    def read(self, name: str) -> bytes:
        """The bytes of member `name`, its checksum compared."""
        try:
            return self._zip.read(self.members[name])
        except ZipError as error:
            raise InvalidModelFile(f"the file {error}; {_REMEDY}") from None


def clean_archive(data: bytes, *, weights: bool = True) -> bytes:
    """The same program as a new archive that is safe to give to `torch.export.load`.

    With `weights=False` every weight is a zero-stride view of one zero element: names, shapes, dtypes and graph only.
    Raises UnsafeModelFile for what would run code (pickles, custom objects, foreign operators, crafted names or size
    expressions), InvalidModelFile for everything else that is wrong; both name the member.
    """
    directory = Directory(io.BytesIO(data), len(data))
    return write_archive(clean_members(directory, weights=weights), compress=False)


def clean_members(directory: Directory, *, weights: bool) -> dict[str, bytes]:
    """The members of the clean archive, by full name. Reads no weight member if `weights` is False."""
    _check_fixed(directory)
    program = clean_program(directory.read(MODEL), MODEL)
    if (major := program.get("schema_version", {}).get("major")) != SCHEMA_MAJOR:
        raise InvalidModelFile(f"{MODEL}: schema version {major} instead of {SCHEMA_MAJOR}; {_REMEDY}")
    sizes = {name: info.file_size for name, info in directory.members.items()}
    weight_config, weight_payloads = read_payloads(directory.read(WEIGHTS_CONFIG), WEIGHTS_CONFIG, sizes)
    constant_config, constants = read_payloads(directory.read(CONSTANTS_CONFIG), CONSTANTS_CONFIG, sizes)
    members = _read_payloads(directory, constants)
    if weights:
        members |= _read_payloads(directory, weight_payloads)
    else:
        weight_config = skeleton_config(weight_config)
        members |= {p.member: bytes(p.item_bytes if p.size_bytes else 0) for p in weight_payloads}
    return program_members(program, weight_config, constant_config, members)


def program_members(
    program: Json, weight_config: Json, constant_config: Json, payloads: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Every member of an archive that plain `torch.export.load` reads, by full name; no sample inputs, no pickle."""
    members = {
        **_FIXED,
        MODEL: _to_json(program, sort_keys=True),
        WEIGHTS_CONFIG: _to_json(weight_config, sort_keys=False),  # its order is the order of the state dict
        CONSTANTS_CONFIG: _to_json(constant_config, sort_keys=False),
        SAMPLE_INPUTS: b"",
        **payloads,
    }
    return {f"{ROOT}/{name}": data for name, data in members.items()}


def write_archive(members: Mapping[str, bytes], *, compress: bool) -> bytes:
    """A ZIP whose bytes depend on nothing but `members`: sorted names, no clock; `compress`: DEFLATE where it pays."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(members):
            data = members[name]
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3  # Python would write the system it runs on
            info.external_attr = 0o600 << 16
            shrinks = compress and len(zlib.compress(data, 9)) - 6 < len(
                data
            )  # 6: the zlib frame, which ZIP leaves out
            info.compress_type = zipfile.ZIP_DEFLATED if shrinks else zipfile.ZIP_STORED
            archive.writestr(info, data, compresslevel=9)
    return buffer.getvalue()


def _to_json(value: Json, *, sort_keys: bool) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=sort_keys).encode()


def _read_payloads(directory: Directory, payloads: Iterable[Payload]) -> dict[str, bytes]:
    return {member: directory.read(member) for member in dict.fromkeys(p.member for p in payloads)}


def _relative_names(infos: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Members by their names below the one top folder; folders themselves are left out."""
    members: dict[str, zipfile.ZipInfo] = {}
    roots = {info.orig_filename.split("/")[0] for info in infos}
    for info in infos:
        name = info.orig_filename
        parts = name.removesuffix("/").split("/")
        if (
            len(roots) != 1
            or "\\" in name
            or ":" in name
            or not name.isprintable()
            or {"", ".", ".."} & set(parts)
        ):
            raise InvalidModelFile(
                f"member {quoted(name)} does not lie in the archive's one folder; {_REMEDY}"
            )
        if name.endswith("/"):
            continue
        relative = "/".join(parts[1:])
        if relative in members:
            raise InvalidModelFile(f"member {quoted(name)} stands in the archive twice; {_REMEDY}")
        members[relative] = info
    return members


def _check_names(members: Mapping[str, zipfile.ZipInfo]) -> None:
    for name in _REQUIRED:
        if name not in members:
            why = ": torch.save and torch.jit.save write no programs" if name == _REQUIRED[0] else ""
            raise InvalidModelFile(f"member {name} is missing{why}; {_REMEDY}")
    for name, info in members.items():
        known = name in _FIXED or name in _REQUIRED or _PAYLOAD.fullmatch(name) or _DROPPED.fullmatch(name)
        if not known:
            raise UnsafeModelFile(
                f"member {quoted(name)} is not part of one plain exported program (pickles, custom objects and"
                f" compiled code are never loaded); {_REMEDY}, without them"
            )
        if name.endswith(".json") and info.file_size > _MAX_JSON_BYTES:
            raise InvalidModelFile(
                f"member {name} has {info.file_size} bytes, too many for a graph; {_REMEDY}"
            )


def _check_fixed(directory: Directory) -> None:
    for name, expected in _FIXED.items():
        if name in directory.members and not name.startswith(".") and directory.read(name) != expected:
            raise InvalidModelFile(f"member {name} is not {expected.decode()!r}; {_REMEDY}")

"""Coded models for the corpus: what a writer gives, cut, bent, and with heads that promise too much."""

import json
import lzma
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from fuzz_makers import program

_DEFLATE, _LZMA = b"\0", b"\1"


@cache
def coded(*, quantized: bool) -> bytes:
    """A small program of one layer, its weight as codes or as floats."""
    from fleetpress.compression.quantization import QUANTIZERS, quantize_weight
    from fleetpress.compression.scheme import QuantScheme
    from fleetpress.jobs.programs.coded_programs import coded_program, plain_program
    from fleetpress.storage.programs import load_program

    loaded = load_program(program())
    method = QUANTIZERS["round_to_nearest"]
    name, scheme = "layer.weight", QuantScheme(num_bits=4)
    weight = quantize_weight(name, loaded.state_dict[name], 0, scheme, method)
    weights = {name: weight} if quantized else {}
    return coded_program(plain_program(loaded, weights), weights)[0]


def sections() -> tuple[bytes, bytes, bytes, bytes]:
    """Head, directory, decisions and the rest of the file."""
    from fleetpress.storage.varints import ByteReader

    reader = ByteReader(coded(quantized=True)[4:])
    parts = [reader.take(reader.number(1 << 20)) for _ in range(3)]
    return parts[0], parts[1], parts[2], reader.take(reader.left)


def assembled(head: bytes, directory: bytes, decisions: bytes, rest: bytes) -> bytes:
    from fleetpress.storage.varints import varint

    parts = (varint(len(part)) + part for part in (head, directory, decisions))
    return b"fpz\x01" + b"".join(parts) + rest


def with_head(text: Callable[[], bytes], *, method: bytes = _DEFLATE) -> Callable[[], bytes]:
    def make() -> bytes:
        coder: Any = zlib.compressobj(9, zlib.DEFLATED, -15)
        if method == _LZMA:
            filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 24, "lc": 3, "lp": 0, "pb": 0}]
            coder = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
        return assembled(method + coder.compress(text()) + coder.flush(), *sections()[1:])

    return make


def edited(change: Callable[[Any], object]) -> Callable[[], bytes]:
    """The file with its head's JSON changed."""

    def text() -> bytes:
        from fleetpress.storage.graph_words import dictionary

        value = json.loads(zlib.decompressobj(-15, dictionary()).decompress(sections()[0][1:]))
        change(value)
        return json.dumps(value).encode()

    return with_head(text)


def with_directory(change: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    def make() -> bytes:
        head, directory, decisions, rest = sections()
        return assembled(head, change(directory), decisions, rest)

    return make


def _shape(value: Any, *sizes: int) -> None:
    value[0][0][0][1] = list(sizes)


CODED: dict[str, Callable[[], bytes]] = {
    f"coded_model/{name}": make
    for name, make in {
        "accepted-plain": lambda: coded(quantized=False),
        "accepted-quantized": lambda: coded(quantized=True),
        "empty": lambda: b"",
        "a-program": program,
        "of-tomorrow": lambda: b"fpz\x09" + coded(quantized=True)[4:],
        "cut-in-the-head": lambda: coded(quantized=True)[:30],
        "cut-in-the-arrays": lambda: coded(quantized=True)[:-20],
        "with-a-tail": lambda: coded(quantized=True) + bytes(9),
        "checksum-differs": lambda: coded(quantized=True)[:-1] + b"\x5a",
        "head-of-another-method": lambda: assembled(b"\x07", *sections()[1:]),
        "head-is-empty": lambda: assembled(b"", *sections()[1:]),
        "head-is-noise": lambda: assembled(b"\x00" + bytes(range(90)), *sections()[1:]),
        "head-bomb": with_head(lambda: b" " * (256 << 20)),
        "head-bomb-by-lzma": with_head(lambda: b"[" * (256 << 20), method=_LZMA),
        "head-nested-deeply": with_head(lambda: b"[" * 200_000),
        "head-is-a-number": with_head(lambda: b"5"),
        "head-of-a-huge-integer": with_head(lambda: b"[" + b"9" * 5000 + b"]"),
        "head-not-utf8": with_head(lambda: b'["\xff"]'),
        "shape-of-a-terabyte": edited(lambda v: _shape(v, 1 << 20, 1 << 20)),
        "shape-overflows": edited(lambda v: _shape(v, 1 << 62, 1 << 62)),
        "shape-negative": edited(lambda v: _shape(v, -5, 3)),
        "shape-shared-by-many": edited(
            lambda v: (_shape(v, *[10**15] * 60), v[0][1].append(["torch.ops.aten.relu.default", "self"]),
                       v[0][2].append([len(v[0][1]) - 1, len(v[0][0]) + len(v[0][2]), 0]),
                       v[0][2].extend([[len(v[0][1]) - 1, 1, 0]] * 10_000))
        ),
        "calls-system": edited(lambda v: v[0][1][0].__setitem__(0, "os.system")),
        "name-is-code": edited(lambda v: v[0][0][0].append("x=__import__('os')")),
        "template-missing": edited(lambda v: v[2].clear()),
        "template-of-floats-as-codes": edited(lambda v: v[2][0][2]["codes"].__setitem__(0, "F64")),
        "facts-of-99-bits": edited(lambda v: v[2][0][1]["scheme"].update(num_bits=99)),
        "directory-is-empty": with_directory(lambda _: b""),
        "directory-of-unknown-codings": with_directory(lambda d: b"\x63" * len(d)),
        "directory-of-constants": with_directory(lambda _: b"\x01\x00" * 40),
        "directory-of-models-without-decisions": with_directory(lambda d: b"\x03\x00\x01\x01\x00\x00" + d[6:]),
    }.items()
}  # fmt: skip

"""The page on storage formats: every scheme of its own kind is on it, with the bits that the code counts."""

import re
from pathlib import Path

import pytest

from fleetpress.compression.scheme import SCHEMES, QuantScheme, bits_per_weight, resolve

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
ROWS = {
    match[1]: (match[2], match[3])
    for match in re.finditer(
        r"^\| `([^|]+?)` \|[^|]+\| ([\d.]+) \| [\d.]+ dB \| ([^|]+) \|$", PAGE, re.MULTILINE
    )
}
LEARNED = {f"num_bits: {bits}`, `method: k_means": resolve(num_bits=bits, learned=True) for bits in (2, 3, 4)}


def test_every_kind_of_code_is_on_the_page() -> None:
    own = {name for name, scheme in SCHEMES.items() if scheme.type != "int" or scheme.activation_bits}
    assert own | LEARNED.keys() <= ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_bits_are_those_of_the_code(name: str) -> None:
    scheme: QuantScheme = LEARNED.get(name) or SCHEMES[name]
    told, loads = ROWS[name]
    assert float(told) == round(bits_per_weight(scheme, (1536, 384), 32), 2)
    only_programs = scheme.type == "codebook" or scheme.activation_bits is not None
    assert loads == ("programs" if only_programs else "programs, checkpoints")

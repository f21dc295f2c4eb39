import subprocess
import sys

import pytest

from fleetpress.compression.errors import MethodError
from fleetpress.compression.scheme import (
    CASTS,
    SCHEMES,
    QuantScheme,
    bits_per_weight,
    cast_of,
    dividing_group_size,
    resolve,
)

NF4 = {"type": "codebook", "codebook": "nf4"}
LEARNED = {"type": "codebook", "codebook": "learned"}


def test_plans_need_no_torch():
    code = "import sys, fleetpress.compression.scheme; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


def test_presets_say_in_their_names_what_they_are():
    for name, scheme in SCHEMES.items():
        if name in ("FP8", "NF4", "MXFP4", "TERNARY", "BINARY"):
            assert (scheme.codebook or "fp8").upper() == name
            continue
        assert scheme.type == "int"
        assert int(name[1]) == scheme.num_bits
        assert scheme.symmetric is not name.endswith("_ASYM")
        assert scheme.group_size == (None if scheme.num_bits == 8 else 128)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, SCHEMES["W8A16"]),
        ({"scheme": "W4A16_ASYM"}, SCHEMES["W4A16_ASYM"]),
        ({"num_bits": 3}, QuantScheme(num_bits=3)),
        (
            {"num_bits": 3, "group_size": None, "symmetric": False},
            QuantScheme(num_bits=3, symmetric=False),
        ),
        (
            {"scheme": "W8A16", "group_size": 64},
            QuantScheme(num_bits=8, strategy="group", group_size=64),
        ),
        (
            {"scheme": "W4A16", "num_bits": 6, "strategy": "tensor"},
            QuantScheme(num_bits=6, strategy="tensor"),
        ),
        ({"scheme": "W8A16", "strategy": "group"}, QuantScheme(num_bits=8, strategy="group", group_size=128)),
        (
            {"scheme": "W4A16", "group_size": None, "strategy": "tensor"},
            QuantScheme(num_bits=4, strategy="tensor"),
        ),
        ({"scheme": "FP8"}, QuantScheme(num_bits=8, type="float")),
        ({"scheme": "FP8", "group_size": None}, QuantScheme(num_bits=8, type="float")),
        ({"scheme": "NF4"}, QuantScheme(num_bits=4, strategy="group", group_size=64, **NF4)),
        ({"scheme": "NF4", "group_size": None}, QuantScheme(num_bits=4, **NF4)),
        ({"learned": True}, QuantScheme(num_bits=4, strategy="tensor", **LEARNED)),
        ({"learned": True, "num_bits": 1}, QuantScheme(num_bits=1, strategy="tensor", **LEARNED)),
        (
            {"learned": True, "num_bits": 8, "group_size": 16},
            QuantScheme(num_bits=8, strategy="group", group_size=16, **LEARNED),
        ),
        (
            {"scheme": "FP8", "strategy": "tensor"},
            QuantScheme(num_bits=8, type="float", strategy="tensor"),
        ),
    ],
)
def test_resolve_puts_options_over_the_preset(options, expected):
    assert resolve(**options) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "W4A61"}, "did you mean W4A16"),
        ({"scheme": "nonsense"}, "known schemes: W8A16"),
        ({"num_bits": 1}, "num_bits is 1; give a whole number from 2 to 8"),
        ({"scheme": "W4A16", "num_bits": 9}, "num_bits is 9"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 32, "strategy": "channel"}, "strategy channel has no groups"),
        ({"group_size": None, "strategy": "group"}, "group_size is None"),
        ({"strategy": "row"}, "strategy is 'row'; give one of tensor, channel, group"),
        ({"scheme": "FP8", "num_bits": 4}, "num_bits is 4, but FP8 codes have 8; leave num_bits out"),
        ({"scheme": "FP8", "symmetric": False}, "FP8 codes have no zero points; leave symmetric out"),
        (
            {"scheme": "FP8", "group_size": 32},
            "FP8 has one scale per channel or tensor; leave group_size out",
        ),
        ({"scheme": "FP8", "strategy": "group"}, "FP8 has one scale per channel or tensor"),
        ({"scheme": "FP"}, "did you mean FP8"),
        ({"scheme": "NF3"}, "did you mean NF4"),
        ({"scheme": "NF4", "num_bits": 3}, "num_bits is 3, but NF4 codes have 4; leave num_bits out"),
        ({"scheme": "BINARY", "symmetric": False}, "codebooks have no zero points; leave symmetric out"),
        ({"scheme": "MXFP4", "group_size": 64}, "MXFP4 shares an exponent among 32 weights"),
        ({"scheme": "MXFP4", "strategy": "channel"}, "MXFP4 shares an exponent among 32 weights"),
        ({"learned": True, "num_bits": 9}, "num_bits is 9; a learned codebook takes 1 to 8"),
        ({"learned": True, "scheme": "W4A16"}, "scheme W4A16 has its own codes, but the method learns"),
        ({"scheme": "BF61"}, "did you mean BF16"),
        ({"scheme": "BF16"}, "BF16 is a plain cast of checkpoints.*take a scheme such as W8A16 here"),
        (
            {"scheme": "FP16", "num_bits": 8, "symmetric": True, "strategy": "tensor", "group_size": 4},
            "FP16 is a plain cast.*leave out num_bits, symmetric, strategy, group_size",
        ),
        ({"scheme": "BF16", "group_size": None}, "BF16 is a plain cast.*leave out group_size"),
    ],
)
def test_contradictions_are_method_errors(options, words):
    with pytest.raises(MethodError, match=words):
        resolve(**options)


@pytest.mark.parametrize(
    ("columns", "size", "expected"), [(384, 128, 128), (100, 64, 50), (96, 128, 96), (131, 128, 1)]
)
def test_dividing_group_size_is_the_largest(columns, size, expected):
    assert dividing_group_size(columns, size) == expected


def test_codes_have_a_type():
    with pytest.raises(MethodError, match="type is 'uint'; give one of int, float, codebook"):
        QuantScheme(num_bits=8, type="uint")
    with pytest.raises(MethodError, match="codebook is None; give one of learned, nf4"):
        QuantScheme(num_bits=8, type="codebook")
    with pytest.raises(MethodError, match="codebook is 'nf4', but codes of type int have none"):
        QuantScheme(num_bits=4, codebook="nf4")


def test_casts_are_no_schemes():
    assert CASTS == {"BF16": "BF16", "FP16": "F16"}
    assert not CASTS.keys() & SCHEMES.keys()
    assert [cast_of(name) for name in ("BF16", "FP16", "FP8", "W4A16", None)] == [
        "BF16",
        "F16",
        None,
        None,
        None,
    ]


def test_bits_per_weight_counts_scales_and_zero_points():
    assert bits_per_weight(SCHEMES["W4A16"], (10, 256), 16) == 4 + 16 / 128
    assert bits_per_weight(SCHEMES["W4A16_ASYM"], (10, 256), 16) == 4 + 20 / 128
    assert bits_per_weight(SCHEMES["W8A16"], (10, 4, 5, 5), 32) == 8 + 32 / 100
    assert bits_per_weight(SCHEMES["W8A16"], (10, 4, 5, 5), 32, axis=1) == 8 + 32 / 250
    # 200 columns are one group of 128 and one of 72
    assert bits_per_weight(SCHEMES["W4A16"], (10, 200), 16) == 4 + 2 * 16 / 200
    assert bits_per_weight(resolve(strategy="tensor"), (10, 10), 32) == 8.32
    assert bits_per_weight(SCHEMES["FP8"], (10, 100), 16) == 8.16
    assert bits_per_weight(SCHEMES["NF4"], (10, 128), 16) == 4 + 16 / 64 + 16 * 32 / 1280
    assert bits_per_weight(SCHEMES["MXFP4"], (10, 128), 16) == 4 + 8 / 32 + 16 * 32 / 1280
    assert bits_per_weight(SCHEMES["TERNARY"], (10, 100), 16) == 1.6 + 0.16
    assert bits_per_weight(SCHEMES["BINARY"], (10, 100), 16) == 1.16
    assert bits_per_weight(resolve(num_bits=3, learned=True), (10, 100), 16) == 3 + 8 * 32 / 1000
    assert bits_per_weight(resolve("FP8", strategy="tensor"), (10, 10), 32) == 8.32

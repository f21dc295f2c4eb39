"""The types of a spec's values: names from the method tables, patterns, places, sizes. Each says what is valid."""

import difflib
import re
from collections.abc import Callable, Collection
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from fleetpress.storage.errors import InvalidUri
from fleetpress.storage.uri import normalize

from .yaml_lines import shortened

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)")
_PERCENT = re.compile(r"((?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2})?) ?%")
_SIZE_UNITS = {"B": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("iB", 1024), ("B", 1000))
}
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]+)")
_DURATION_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_LONGEST_DURATION = 1e9  # of any unit; infinity would never end
_LEAST_MEMORY_BYTES = 2**20
_MOST = 2**31  # of counts and sizes of an input: torch counts in so many bits, and a float holds them exactly


def nearest(word: str, valid: Collection[str]) -> str:
    """`did you mean `x`?` for the valid word closest to `word`, else all valid words."""
    spelled = {name.lower(): name for name in valid}
    close = difflib.get_close_matches(word.lower(), spelled, n=1)
    if close:
        return f"did you mean `{spelled[close[0]]}`?"
    return f"valid here: {', '.join(sorted(valid))}" if valid else "there are none here"


def mistake(what: str) -> PydanticCustomError:
    """An error whose text is shown to the user as it is."""
    return PydanticCustomError("spec", "{what}", {"what": what})


def tuple_of(value: object) -> object:
    """A YAML list as a tuple, a single text as a tuple of one; anything else as it is."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _key(value: str) -> str:
    if not _KEY.fullmatch(value):
        raise mistake(
            f"`{value}` cannot be a name; use letters, digits, `.`, `_` and `-`, a letter or digit first, at most 100"
        )
    return value


def _place(value: str) -> str:
    if value.startswith("~"):
        raise mistake("`~` is not expanded here; write the whole path")
    try:
        normalize(value)
    except InvalidUri as error:
        raise mistake(str(error)) from None
    return value


def _output(value: str) -> str:
    if "*" in value:
        raise mistake("the output is one place, not a pattern; delete the `*`")
    return value


def _factory(value: str) -> str:
    if not _FACTORY.fullmatch(value):
        raise mistake(f"`{value}` is not a factory; write package.module:callable")
    return value


def _pattern(value: str) -> str:
    if not value.removeprefix("re:"):
        raise mistake(
            "an empty pattern; name a layer, a kind such as Linear, or write re:<regular expression>"
        )
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise mistake(f"`{shortened(value)}` is not a regular expression: {error}") from None
    elif set(value) & set("*?^$|+\\"):
        glob = re.fullmatch(r"[\w.*?-]+", value)
        regex = value.replace(".", r"\.").replace("*", ".*").replace("?", ".") if glob else value
        raise mistake(f"`{value}` is neither a name nor a kind; for a pattern write `re:{regex}`")
    return value


def _dimension(value: Any) -> int | str:
    if value == "batch" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _MOST):
        return value  # type: ignore[no-any-return]
    raise mistake(f"should be a whole number from 1, or the word batch, not {shortened(repr(value))}")


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise mistake(f"should be a size such as 2GiB, 512MiB or 1.5GB, not {shortened(repr(value))}")
    number, unit = match[1], match[2] or "B"
    units = {name.upper(): factor for name, factor in _SIZE_UNITS.items()}
    if unit.upper() not in units:
        sign = next((name for name in ("K", "M", "G", "T") if unit.upper().startswith(name)), "")
        remedy = f"did you mean {number}{sign}iB?" if sign else f"valid units: {', '.join(_SIZE_UNITS)}"
        raise mistake(f"unknown unit `{unit}`; {remedy}")
    exact = float(number) * units[unit.upper()]
    if exact >= 2**63:
        raise mistake(f"{shortened(str(value))} is more than any machine has; such as 2GiB")
    return int(exact)


def _enough(size_bytes: int) -> int:
    if size_bytes < _LEAST_MEMORY_BYTES:
        raise mistake(f"{size_bytes} bytes is too little to work with; at least 1MiB, such as 2GiB")
    return size_bytes


def _duration(value: Any) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _DURATION_UNITS or not 0 < float(match[1]) < _LONGEST_DURATION:
        raise mistake(f"should be a time such as 6h, 90min or 45s, not {shortened(repr(value))}")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def _drop(value: Any) -> float | str:
    """A number stays absolute, `1%` stays relative; both in one spelling."""
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if match is not None and float(match[1]) < _MOST:
        return f"{float(match[1])!r}%".replace(".0%", "%")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MOST:
        raise mistake(
            "should be a number from 0 (absolute) or a percentage such as 1% (relative),"
            f" not {shortened(repr(value))}"
        )
    return float(value)


def _known(kind: str, *tables: Callable[[], Collection[str]]) -> AfterValidator:
    """Accepts the words of method tables, in any case, as they are spelled there.

    A table is looked at only if the word is in none before it, so that light ones stand first.
    """

    def check(word: str) -> str:
        spelled: dict[str, str] = {}
        for table in tables:
            spelled |= {name.lower(): name for name in table()}
            if word.lower() in spelled:
                return spelled[word.lower()]
        raise mistake(f"unknown {kind} `{word}`; {nearest(word, spelled.values())}")

    return AfterValidator(check)


def _pattern_n_m(value: str) -> str:
    from fleetpress.compression.errors import MethodError
    from fleetpress.compression.sparsity import parse_pattern

    try:
        parse_pattern(value)
    except MethodError as error:
        raise mistake(str(error)) from None
    return value


def _sparsifiers() -> Collection[str]:
    from fleetpress.compression.sparsity import SPARSIFIERS

    return SPARSIFIERS


def _default_quantizer() -> Collection[str]:
    from fleetpress.compression.scheme import DEFAULT_METHOD

    return (DEFAULT_METHOD,)


def _schemes() -> Collection[str]:
    from fleetpress.compression.scheme import CASTS, SCHEMES

    return (*SCHEMES, *CASTS)


# The other tables live beside the methods, behind torch: they are imported when the first name is looked up.
def _pruners() -> Collection[str]:
    from fleetpress.compression.pruning import PRUNERS

    return PRUNERS


def _structures() -> Collection[str]:
    from fleetpress.compression.pruning import STRUCTURES

    return STRUCTURES


def _one_way(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds in their one order, each once."""
    if {"head", "head_dim"} <= set(kinds):
        raise mistake("head and head_dim take the same layers apart; keep one of them")
    return tuple(kind for kind in _structures() if kind in kinds)


def _quantizers() -> Collection[str]:
    from fleetpress.compression.quantization import QUANTIZERS

    return QUANTIZERS


def _equalizers() -> Collection[str]:
    from fleetpress.compression.equalization import EQUALIZERS

    return EQUALIZERS


def _optimizers() -> Collection[str]:
    from fleetpress.compression.training import OPTIMIZERS

    return OPTIMIZERS


def _losses() -> Collection[str]:
    from fleetpress.compression.losses import LOSSES

    return LOSSES


def _metrics() -> Collection[str]:
    from fleetpress.compression.metrics import METRICS

    return METRICS


Key = Annotated[str, AfterValidator(_key)]
Word = Annotated[str, StringConstraints(min_length=1)]
Place = Annotated[str, AfterValidator(_place)]
Places = Annotated[tuple[Place, ...], BeforeValidator(tuple_of), Field(min_length=1)]
Output = Annotated[Place, AfterValidator(_output)]
Factory = Annotated[str, AfterValidator(_factory)]
Patterns = Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], BeforeValidator(tuple_of)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=1)]
Memory = Annotated[int, BeforeValidator(_size), AfterValidator(_enough)]
Duration = Annotated[float, BeforeValidator(_duration)]
Drop = Annotated[float | str, BeforeValidator(_drop)]
Shape = Annotated[tuple[Annotated[int | str, BeforeValidator(_dimension)], ...], BeforeValidator(tuple_of)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, lt=_MOST)]

Pruner = Annotated[str, _known("pruning method", _sparsifiers, _pruners)]
Structures = Annotated[
    tuple[Annotated[str, _known("structure", _structures)], ...],
    BeforeValidator(tuple_of),
    AfterValidator(_one_way),
]
PatternNM = Annotated[str, AfterValidator(_pattern_n_m)]
Quantizer = Annotated[str, _known("quantization method", _default_quantizer, _quantizers)]
Equalizer = Annotated[str, _known("equalization method", _equalizers)]
Scheme = Annotated[str, _known("scheme", _schemes)]
Optimizer = Annotated[str, _known("optimizer", _optimizers)]
Loss = Annotated[str, _known("loss", _losses)]
Metric = Annotated[str, _known("metric", _metrics)]

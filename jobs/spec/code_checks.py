"""What a spec may not ask of codebooks and integer kernels: options that they do not have, methods of other codes."""

from collections.abc import Iterator

from fleetpress.compression.scheme import (
    CASTS,
    DEFAULT_METHOD,
    LEARNING_METHODS,
    MX_GROUP_SIZE,
    SCHEMES,
    QuantScheme,
)

from .recipe import QuantizeStep
from .yaml_lines import Path


def check_codebook(path: Path, step: QuantizeStep, scheme: QuantScheme | None) -> Iterator[tuple[Path, str]]:
    """The mistakes in a step whose scheme has a fixed codebook, or whose method learns one."""
    asks = step.scheme if scheme is not None and scheme.type == "codebook" else step.method
    if scheme is not None and step.method in LEARNING_METHODS:
        what = (
            f"{step.scheme} has codes of its own, and {step.method} learns a codebook; give num_bits instead"
        )
        yield (*path, "scheme"), what
    elif scheme is not None and step.method != DEFAULT_METHOD:  # without loading torch
        from fleetpress.compression.quantization import QUANTIZERS

        if "codebook" not in QUANTIZERS[step.method].types:
            what = (
                f"{step.method} makes integer codes; {step.scheme} takes round_to_nearest or smallest_error"
            )
            yield (*path, "method"), what
    if step.symmetric is False:
        yield (*path, "symmetric"), f"false contradicts {asks}: codebooks have no zero points; delete it"
    if scheme is not None and scheme.codebook == "mxfp4":
        for name, value in (("group_size", step.group_size), ("strategy", step.strategy)):
            if value not in (None, MX_GROUP_SIZE, "group"):
                what = (
                    f"{value} contradicts {step.scheme}, whose groups are {MX_GROUP_SIZE} weights; delete it"
                )
                yield (*path, name), what
    if step.format is not None:
        yield (
            (*path, "format"),
            f"{step.format} is a layout of checkpoints, which hold no codebooks; delete it",
        )


def check_float(path: Path, step: QuantizeStep) -> Iterator[tuple[Path, str]]:
    """The mistakes in a step whose codes are 8-bit floats."""
    if step.symmetric is False:
        yield (
            (*path, "symmetric"),
            f"false contradicts scheme {step.scheme}, which has no zero points; delete it",
        )
    if step.group_size is not None or step.strategy == "group":
        name = "strategy" if step.group_size is None else "group_size"
        yield (*path, name), f"{step.scheme} has one scale per channel or tensor; delete it"
    if step.method != DEFAULT_METHOD:
        what = (
            f"{step.method} chooses ranges of integer codes; {step.scheme} takes {DEFAULT_METHOD}; delete it"
        )
        yield (*path, "method"), what
    if step.format is not None:
        yield (
            (*path, "format"),
            f"{step.format} is for integer codes; {step.scheme} has one format; delete it",
        )


def check_kernels(path: Path, step: QuantizeStep) -> Iterator[tuple[Path, str]]:
    """The mistakes in a step whose scheme runs on integer kernels."""
    for name, value in (("group_size", step.group_size), ("strategy", step.strategy)):
        if value not in (None, "channel"):
            yield (
                (*path, name),
                f"{step.scheme} has one scale per channel, as integer kernels take it; delete it",
            )


def integer_scheme(step: QuantizeStep) -> str | None:
    """The first scheme of the step, or of one of its layers, that runs on integer kernels."""
    schemes = [step.scheme, *(own.scheme for own in step.layers.values())]
    return next(
        (one for one in schemes if one is not None and one not in CASTS and SCHEMES[one].activation_bits),
        None,
    )


def check_file(form: str | None, step: QuantizeStep) -> Iterator[tuple[str, str]]:
    """The mistake in the recipe's key `format` when the file cannot hold what the step makes."""
    scheme = integer_scheme(step)
    if form == "archive" and scheme is not None:
        yield (
            "format",
            f"archive holds programs over floats, without the integer kernels of {scheme}; delete it",
        )

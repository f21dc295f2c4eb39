"""What a recipe does to every tensor of a checkpoint, told from names, shapes and dtypes alone.

Heads, routers, embeddings and norms are left alone unless they are named. Experts that a checkpoint holds together in
one tensor are treated as the matrices that they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fleetpress.compression.checkpoint.blocks import NamedBlocks, named_blocks
from fleetpress.compression.checkpoint.data_free import needs_inputs, without_inputs
from fleetpress.compression.checkpoint.layers import (
    HEADS,
    checkpoint_layers,
    expert_matrices,
    holds_experts,
    model_types,
    select_checkpoint,
)
from fleetpress.compression.errors import TargetError
from fleetpress.compression.scheme import cast_of
from fleetpress.compression.selection import Layer
from fleetpress.compression.sparsity import SPARSIFIERS, reason_against
from fleetpress.compression.treatment import (
    FLOAT,
    INT,
    KEPT,
    PACK,
    Treatment,
    fitted,
    quantization_config,
    stored_bits,
)
from fleetpress.storage.checkpoint import Checkpoint, TensorLocation
from fleetpress.storage.safetensors_header import TensorInfo

from ..errors import ModelError
from ..spec.schemes import scheme_of
from .layout import Item, item_at

_WEIGHTS = ("F64", "F32", "F16", "BF16")  # dtypes that are treated; all others are carried over
_CODES = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".qweight", ".qzeros", ".SCB", ".absmax")
_LLAMA4 = {"llama4", "llama4_text"}
_CODE_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F4")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Every tensor with its treatment, in the order of the source, and what is told about layers.

    `treated` are the layers that are changed, `skipped` those that the recipe would change but must not (layer ->
    reason). With `blocks` some are calibrated: the recipe looks at what the layers in these blocks read.
    """

    items: tuple[Item, ...]
    known: tuple[Layer, ...]
    treated: Mapping[str, Treatment]
    skipped: Mapping[str, str]
    warnings: tuple[str, ...]
    blocks: NamedBlocks | None = None


def check_plain(checkpoint: Checkpoint) -> None:
    """Raises ModelError for a checkpoint that is quantized already, by its config or by its tensors."""
    if checkpoint.quantized_by:
        raise ModelError(
            f"{checkpoint.uri} is quantized already (config.json says by {checkpoint.quantized_by}); "
            "give the original checkpoint as source"
        )
    for name, place in checkpoint.tensors.items():
        coded = name.endswith((".weight", "_blocks")) and place.info.dtype in _CODE_DTYPES
        if coded or name.endswith(_CODES):
            raise ModelError(
                f"{checkpoint.uri} is quantized already (it holds {name} as {place.info.dtype}); "
                "give the original checkpoint as source"
            )


def choose(checkpoint: Checkpoint, recipe: Mapping[str, Any]) -> Choice:
    """What the steps `prune` and `quantize` of a canonical recipe do. Raises TargetError if they reach no tensor."""
    tensors = _matrices(checkpoint)
    known = checkpoint_layers(
        {name: at.info.shape for name, at in tensors.items() if at.info.dtype in _WEIGHTS}
    )
    together = [name for name, at in tensors.items() if holds_experts(name, at.info.shape)]
    quantize = recipe.get("quantize", {})
    dtype = cast_of(quantize.get("scheme"))
    if together and quantize and not dtype and _LLAMA4 & model_types(checkpoint.config or {}):
        raise ModelError(
            f"{checkpoint.uri}: {together[0]} holds its experts as [experts, inputs, outputs]; readers of quantized "
            "Llama 4 look for one turned matrix an expert: save the checkpoint with an own tensor for each"
        )
    choosing = _Choosing({name: at.info for name, at in tensors.items()}, known)
    if prune := recipe.get("prune"):
        choosing.zero(prune)
    if dtype:
        choosing.cast(quantize, dtype)
    elif quantize:
        choosing.quantize(quantize)
    if not choosing.treated and not choosing.cast_too:
        raise TargetError(
            f"{checkpoint.uri}: the recipe reaches no layer; {_remedy(known, choosing.skipped, dtype)}"
        )
    blocks = _blocks(checkpoint, choosing)
    return Choice(
        items=tuple(_items(checkpoint, tensors, known, choosing)),
        known=known,
        blocks=blocks,
        treated=choosing.treated,
        skipped=choosing.skipped,
        warnings=(
            *(f"ignore {entry!r} matches no layer" for entry in dict.fromkeys(choosing.unused_ignores)),
            *(
                f"{name} holds its experts in a layout that is not known: it is kept"
                for name in together
                if name not in choosing.cast_too
            ),
            *_unread(choosing.treated),
            *choosing.uncalibrated,
        ),
    )


def _blocks(checkpoint: Checkpoint, choosing: "_Choosing") -> NamedBlocks | None:
    """The blocks that are run, if a treatment looks at what layers read; treatments in them are calibrated then.

    Raises ModelError for a checkpoint that is no language model in a folder of its own.
    """
    if not any(map(needs_inputs, choosing.treated.values())):
        return None
    blocks = named_blocks({name: at.info.shape for name, at in checkpoint.tensors.items()})
    if checkpoint.config is None or blocks is None:
        what = "has no config.json beside it" if checkpoint.config is None else "has no numbered blocks"
        raise ModelError(
            f"{checkpoint.uri} {what}, so it cannot be run to see what its layers read; take a method that needs no "
            "data, or export the model to a program (.pt2)"
        )
    choosing.calibrate(blocks)
    return blocks


def _cast_of_all(choice: Choice) -> str | None:
    """The dtype that every floating tensor but some layers is cast to, if so."""
    casts = {item.treatment.cast for item in choice.items if item.layer is None and item.dtype in _WEIGHTS}
    casts = casts or {treatment.cast for treatment in choice.treated.values()}
    return casts.pop() if len(casts) == 1 else None


def _with_dtype(config: Mapping[str, Any], cast: str | None) -> dict[str, Any]:
    """The config, and its parts, with the dtype that readers are to take."""
    if cast is None:
        return dict(config)
    name = {"BF16": "bfloat16", "F16": "float16"}[cast]
    return {
        key: name
        if key in ("torch_dtype", "dtype")
        else _with_dtype(value, cast)
        if isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def _unread(treated: Mapping[str, Treatment]) -> tuple[str, ...]:
    """A warning of experts in a form that transformers does not load (tried with 5.23)."""
    for name, treatment in treated.items():
        scheme = treatment.scheme
        if ".experts." in name and scheme is not None and (treatment.layout == INT or not scheme.symmetric):
            return (
                f"transformers loads experts such as {name} only if they are symmetric and pack-quantized, or FP8",
            )
    return ()


def _matrices(checkpoint: Checkpoint) -> dict[str, TensorLocation]:
    """Every tensor by name; one that holds the matrices of all experts is taken apart."""
    found: dict[str, TensorLocation] = {}
    for name, at in checkpoint.tensors.items():
        matrices = expert_matrices(name, at.info.shape, checkpoint.config or {})
        if not matrices or at.info.dtype not in _WEIGHTS:
            found[name] = at
        for matrix in matrices if name not in found else ():
            row_bytes = at.info.size_bytes // (at.info.shape[0] * at.info.shape[1])
            info = replace(
                at.info,
                name=name,  # where it comes from: an expert that nothing is done to stays in its tensor
                shape=matrix.shape,
                offset_bytes=at.info.offset_bytes + matrix.first_row * row_bytes,
                size_bytes=matrix.shape[0] * row_bytes,
            )
            found[matrix.name] = TensorLocation(file=at.file, info=info)
    return found


def _items(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorLocation],
    known: tuple[Layer, ...],
    choosing: "_Choosing",
) -> Iterator[Item]:
    weights = {layer.weights[0]: layer.name for layer in known}
    changed = {tensors[weight].info.name for weight, layer in weights.items() if layer in choosing.treated}
    whole = {at.info.name for name, at in tensors.items() if at.info.name != name} - changed
    places = [(name, at) for name, at in tensors.items() if at.info.name not in whole]
    places += [(name, checkpoint.tensors[name]) for name in sorted(whole)]
    for name, at in sorted(places, key=lambda entry: (entry[1].file.path, entry[1].info.offset_bytes)):
        layer = weights.get(name)
        treatment = choosing.cast_too.get(name, KEPT)
        if layer is not None:
            treatment = choosing.treated.get(layer, KEPT)
        # Buffers such as masks may be infinite by intention.
        check = name.endswith((".weight", ".bias")) or holds_experts(name, at.info.shape)
        yield item_at(name, at, treatment, layer=layer, check=check)


def config_of(choice: Choice, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `config.json` of the published checkpoint: the source's, with what was done to its weights."""
    result = _with_dtype(config or {}, _cast_of_all(choice))
    quantized = {name: t for name, t in choice.treated.items() if t.scheme is not None}
    if not quantized:
        return result
    groups: dict[Treatment, list[str]] = {}
    for name, treatment in quantized.items():
        # Zeroed weights are quantized like others: a reader needs not know.
        groups.setdefault(
            replace(treatment, sparsity=(), method="round_to_nearest", calibrated=False), []
        ).append(name)
    # The largest group is that of the classes, the others are named: names go before classes.
    ordered = sorted(groups.items(), key=lambda entry: -len(entry[1]))
    kinds = sorted({layer.kind for layer in choice.known if layer.name in quantized})
    told = [(treatment, kinds if index == 0 else names) for index, (treatment, names) in enumerate(ordered)]
    # Of any kind: what its path calls an embedding may be a Linear to the model's code.
    ignored = [layer.name for layer in choice.known if layer.name not in quantized]
    # A tied head is a layer of the model without tensors of its own: readers must not look for packed ones.
    ignored += [head for head in HEADS if head not in {layer.name for layer in choice.known}]
    result["quantization_config"] = quantization_config(told, ignored)
    return result


class _Choosing:
    """Grows with every step of the recipe: layers with their treatments, and what must be left alone."""

    def __init__(self, tensors: Mapping[str, TensorInfo], known: tuple[Layer, ...]) -> None:
        self._tensors = tensors
        self._known = known
        self.treated: dict[str, Treatment] = {}
        self.skipped: dict[str, str] = {}
        self.unused_ignores: list[str] = []
        self.cast_too: dict[str, Treatment] = {}  # tensors that are no layer's weights
        self.uncalibrated: list[str] = []  # warnings of layers whose inputs are not looked at

    def zero(self, step: Mapping[str, Any]) -> None:
        """The step `prune`."""
        options = tuple((key, step[key]) for key in ("method", "pattern", "sparsity") if key in step)
        for layer in self._selected(step, ()):
            info = self._tensors[layer.weights[0]]
            reason = reason_against(dict(options), info.dtype, info.shape)
            if layer.axis != 0 and ("pattern" in step or SPARSIFIERS[step["method"]].needs_inputs):
                reason = "its inputs lie along columns (Conv1D), but are looked for along rows"
            if reason:
                self.skipped[layer.name] = f"prune: {reason}"
            else:
                self.treated[layer.name] = Treatment(sparsity=options)

    def quantize(self, step: Mapping[str, Any]) -> None:
        """The step `quantize`, of zeroed weights too."""
        scheme = scheme_of(step)
        layout = FLOAT if scheme.type == "float" else step.get("format", PACK)
        for layer in self._selected(step, ()):
            if layer.axis != 0:
                self.skipped[layer.name] = "quantize: it is a Conv1D, which checkpoints cannot hold packed"
                continue
            info = self._tensors[layer.weights[0]]
            own = fitted(scheme, info.shape[1])
            treatment = replace(
                self.treated.get(layer.name, KEPT), scheme=own, method=step["method"], layout=layout
            )
            if stored_bits(layer.weights[0], info.dtype, info.shape, treatment) < 8 * info.size_bytes:
                self.treated[layer.name] = treatment
                continue
            groups = f"rows of {info.shape[1]} divide into groups of {own.group_size} only: "
            self.skipped[layer.name] = (
                f"quantize: {groups if own.group_size else ''}packed it would be larger"
            )

    def cast(self, step: Mapping[str, Any], dtype: str) -> None:
        """A `quantize` step that casts: chosen layers; without targets all other floating tensors, too."""
        kinds = tuple(dict.fromkeys(layer.kind for layer in self._known))
        for layer in self._selected(step, kinds):
            if self._tensors[layer.weights[0]].dtype != dtype:
                self.treated[layer.name] = replace(self.treated.get(layer.name, KEPT), cast=dtype)
        if not step.get("targets"):
            layered = {layer.weights[0] for layer in self._known}
            self.cast_too = {
                name: Treatment(cast=dtype)
                for name, info in self._tensors.items()
                if info.dtype in _WEIGHTS and info.dtype != dtype and name not in layered
            }

    def calibrate(self, blocks: NamedBlocks) -> None:
        """All treatments within the blocks are calibrated; outside of them, methods that need data give way."""
        for name, treatment in self.treated.items():
            if blocks.index_of(name) is not None:
                self.treated[name] = replace(treatment, calibrated=True)
                continue
            own = self.treated[name] = without_inputs(treatment)
            if own != treatment:
                methods = " and ".join(
                    [*(dict(own.sparsity)[key] for key in ("method",) if own.sparsity), own.method]
                )
                self.uncalibrated.append(
                    f"{name} lies outside of the blocks that are run: {methods} is used there"
                )

    def _selected(self, step: Mapping[str, Any], instead: tuple[str, ...]) -> tuple[Layer, ...]:
        """The layers that the step's `targets` and `ignore` choose; `instead` are the targets if it names none."""
        targets = tuple(step.get("targets", ())) or instead
        selection = select_checkpoint(self._known, targets, tuple(step.get("ignore", ())))
        self.unused_ignores += selection.unused_ignores
        return selection.layers


def _remedy(known: tuple[Layer, ...], skipped: Mapping[str, str], cast: str | None) -> str:
    if cast:
        return f"the tensors that it names are {cast} already"
    if any(layer.kind == "Conv1D" for layer in known):
        return "its layers are Conv1D, which checkpoints cannot hold packed; export the model to a program (.pt2)"
    return "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "widen its targets"

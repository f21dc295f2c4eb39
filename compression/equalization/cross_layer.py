"""Cross-layer equalization: channels of neighbouring layers get the same range, so that none needs a scale for two."""

import torch
from torch import Tensor

from fleetpress.compression.equalization.method import EqualizeContext, EqualizeMethod
from fleetpress.compression.equalization.pairs import Place
from fleetpress.compression.equalization.scaling import Equalization, Scaled

PASSES = 20  # over all places; the change halves with each of them
_ENOUGH = 1e-3  # largest change of a scale that is worth another pass
_WIDEST = 1e4  # a channel that one of the layers hardly uses is not stretched beyond this


def cross_layer(context: EqualizeContext) -> Equalization:
    """Scales s = sqrt(r1 / r2) of ranges r1 of the producer's rows and r2 of the readers' columns, until both agree.

    Only places between layers: a norm has no range of weights to share.
    """
    scaled = Scaled(context.values)
    pairs = [place for place in context.places if place.kind == "layer"]
    for _ in range(PASSES):
        most = 0.0
        for place in pairs:
            scale = _scale(scaled, place)
            scaled.apply(place, scale)
            most = max(most, float((scale.log()).abs().max()))
        if most < _ENOUGH:
            break
    return scaled.result()


def _scale(scaled: Scaled, place: Place) -> Tensor:
    name, axis = place.producers[0]
    ahead = scaled.value(name).movedim(axis, 0).flatten(1).abs().amax(1)
    behind = torch.zeros_like(ahead)
    for reader in place.readers:
        columns = scaled.value(reader.weight).movedim(reader.axis, 0).flatten(1).abs().amax(1)
        behind = torch.maximum(behind, columns.view(place.channels, reader.repeat).amax(1))
    usable = (ahead > 0) & (behind > 0)
    ratio = torch.where(usable, ahead / behind, 1.0).sqrt()
    return ratio.clamp(1 / _WIDEST, _WIDEST)


METHOD = EqualizeMethod(
    name="cross_layer",
    equalize=cross_layer,
    paper="Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv:1906.04721",
    summary="Gives channels of neighbouring layers equal ranges; needs no data.",
)

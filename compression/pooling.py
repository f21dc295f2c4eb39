"""Maximum pooling in trainings on processors: torch's kernel for channels that lie next to one another is the fast one.

With the channels of a pixel side by side (channels_last) torch compares a vector of them at once; otherwise it goes
through the windows one by one, which takes more time than the convolutions of a small net. What comes out is the same.
"""

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_POOLS = (aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
_VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
_TIED_TO_MEMORY = ("as_strided", "view_as_complex", "view_as_real", "view.dtype")


def pool_channels_last(module: fx.GraphModule) -> None:
    """Let images lie channels last from their first pooling on, in the module's graph; it is not yet recompiled.

    What follows keeps or changes that as it likes: views become reshapes, which do not mind. A graph with operators
    that look at memory itself stays as it is.
    """
    nodes = list(module.graph.nodes)
    pools = [node for node in nodes if node.target in _POOLS and _is_batch(node.args[0])]
    if not pools or any(word in str(node.target) for node in nodes for word in _TIED_TO_MEMORY):
        return
    for node in pools:
        with module.graph.inserting_before(node):
            node.replace_input_with(node.args[0], module.graph.call_function(channels_last, (node.args[0],)))
    for node in nodes:
        node.target = _VIEWS.get(node.target, node.target) if node.op == "call_function" else node.target


def channels_last(images: Tensor) -> Tensor:
    """Images [N, C, H, W] with the channels of a pixel side by side; as they are on other devices than processors."""
    if images.device.type != "cpu":
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _is_batch(node: object) -> bool:
    """Whether a node gives images [N, C, H, W], rather than one [C, H, W]."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 4

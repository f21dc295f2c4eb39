"""A language model as transformers builds it from its config, without weights; those of a part are put in and out.

This file alone knows transformers' loading: names of checkpoints become names of parameters (renamed, merged, split)
by transformers' own table of conversions, so that whatever `from_pretrained` loads is loaded here in parts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from fleetpress.compression.errors import DataMismatchError, MethodError, ProgramError

REMEDY = "export the model to a program (.pt2), or take a method that needs no data"
# One dtype everywhere: products of half-precision numbers are added up otherwise on every kind of processor.
COMPUTE = torch.float32
# What transformers' code raises for numbers that do not fit one another.
_MISFITS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    ImportError,
    ZeroDivisionError,
)

Read = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Tensors of the checkpoint by their names, in their own dtypes."""

ReadRows = Callable[[str, Tensor], Tensor]
"""Some rows of a matrix of the checkpoint, by name and row numbers (int64, rising)."""


class Skeleton:
    """The model of a `config.json`, and where the tensors of its checkpoint belong. No remote code is run.

    `blocks` are the modules that hidden states of `width` entries pass one after the other. Raises ProgramError for a
    model that transformers does not know, or that is no stack of blocks.
    """

    def __init__(
        self, config: Mapping[str, Any], names: Iterable[str], read: Read, read_rows: ReadRows
    ) -> None:
        self.model = _built(config)
        self._read, self._read_rows = read, read_rows
        path, self.blocks = _stack(self.model)
        self._places = _places(self.model, names)
        self._block_names = [self._names_below(f"{path}.{index}.") for index in range(len(self.blocks))]
        self._rows: Tensor | None = None  # of the embedding that is loaded, the numbers of its rows
        self._embedding = self.model.get_input_embeddings()
        self._tokens, self.width = self._embedding.weight.shape
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for name, module in self.model.named_modules():
            if module is self._embedding:
                module.register_forward_pre_hook(self._looked_up)
            elif id(module) not in inside and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._filling(name))

    def names_of(self, index: int) -> tuple[str, ...]:
        """The checkpoint's tensors that a block is made of."""
        return self._block_names[index]

    def place_of(self, name: str) -> str | None:
        """The parameter that a tensor of the checkpoint becomes, or becomes a part of; None if the model has none."""
        return self._places.get(name)

    def fill(self, index: int, values: Mapping[str, Tensor]) -> None:
        """Put weights into a block, by their names in the checkpoint. Raises ProgramError if some are missing."""
        self._load(values)
        for name, parameter in self.blocks[index].named_parameters():
            if parameter.is_meta:
                raise ProgramError(
                    f"block {index} has a parameter {name}, for which the checkpoint holds no tensor; {REMEDY}"
                )

    def empty(self, index: int) -> None:
        """Give a block's weights up."""
        _to_meta(self.blocks[index])

    def close(self) -> None:
        """Give all weights up: models and their hooks hold one another, so they would stay for long."""
        _to_meta(self.model)

    def embed_only(self, ids: Tensor) -> None:
        """Load those rows of the input embedding that `ids` (any shape) need; others are not there."""
        rows = torch.unique(ids)
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= self._tokens):
            raise DataMismatchError(
                f"input_ids reach from {int(rows[0])} to {int(rows[-1])}, but the model has {self._tokens} "
                "tokens; make the data with its own tokenizer"
            )
        name = next((name for name, place in self._places.items() if self._is_embedding(place)), None)
        if name is None:
            raise ProgramError(f"the checkpoint holds no tensor of the input embedding; {REMEDY}")
        self._set_embedding(rows, self._read_rows(name, rows).to(COMPUTE))

    def embed_nothing(self) -> None:
        """Every token is embedded as zeros: what blocks are given beside hidden states does not depend on them."""
        self._set_embedding(torch.empty(0, dtype=torch.int64), torch.zeros(1, self.width))

    def _set_embedding(self, rows: Tensor, values: Tensor) -> None:
        self._rows = rows
        self._embedding.padding_idx = None  # a number of a row that may not be there; it only means gradients
        self._embedding.weight = nn.Parameter(values, requires_grad=False)

    def _is_embedding(self, place: str) -> bool:
        path, _, leaf = place.rpartition(".")
        return leaf == "weight" and self.model.get_submodule(path) is self._embedding

    def _looked_up(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Token numbers as numbers of the rows that are loaded."""
        assert self._rows is not None, "embed_only or embed_nothing comes first"
        ids = args[0]
        found = torch.searchsorted(self._rows, ids) if len(self._rows) else torch.zeros_like(ids)
        return (found, *args[1:])

    def _filling(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Loads a module outside of the blocks when it is called for the first time."""

        def fill(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                return
            wanted = {f"{path}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
            self._load(self._read([name for name, place in self._places.items() if place in wanted]))
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(module, leaf, self._tied(f"{path}.{leaf}"))

        return fill

    def _tied(self, name: str) -> nn.Parameter:
        """A parameter that is another one by the config: its checkpoint holds only that."""
        owner = (getattr(self.model, "all_tied_weights_keys", None) or {}).get(name)
        names = [key for key, place in self._places.items() if place == owner]
        if len(names) != 1:
            raise ProgramError(f"the checkpoint holds no tensor for {name}; {REMEDY}")
        return nn.Parameter(self._read(names)[names[0]].to(COMPUTE), requires_grad=False)

    def _names_below(self, path: str) -> tuple[str, ...]:
        return tuple(name for name, place in self._places.items() if place.startswith(path))

    def _load(self, values: Mapping[str, Tensor]) -> None:
        """As `from_pretrained` would, of these tensors."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            dict(values),
            LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(self.model), dtype=COMPUTE),
        )
        wrong = {**info.conversion_errors, **dict.fromkeys(str(key) for key in info.mismatched_keys)}
        if wrong:
            raise ProgramError(
                f"{next(iter(wrong))} does not fit the model that config.json describes; {REMEDY}"
            )


def _built(config: Mapping[str, Any]) -> Any:
    """The model on the meta device, in eval mode; what is computed and not stored (rotary tables) is real."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is unusual in a config is no concern of the user's here
    kind, classes = config.get("model_type"), config.get("architectures") or [None]
    try:
        described = transformers.AutoConfig.for_model(
            kind, **{k: v for k, v in config.items() if k != "model_type"}
        )
    except (StrictDataclassError, *_MISFITS) as error:
        raise ProgramError(
            f"transformers {transformers.__version__} cannot read its config.json (model_type {kind!r}: "
            f"{_first_line(error)}); {REMEDY}"
        ) from None
    found = getattr(transformers, str(classes[0]), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ProgramError(
            f"transformers {transformers.__version__} has no model class {classes[0]!r}, which config.json names "
            f"in `architectures`; {REMEDY}"
        )
    if described.is_encoder_decoder:
        raise ProgramError(f"{classes[0]} has an encoder and a decoder, blocks of two kinds; {REMEDY}")
    described.use_cache = False
    described._experts_implementation = "eager"  # one product an expert, as its inputs are looked at
    try:
        with torch.device("meta"):
            model = cast(Any, found)._from_config(described, dtype=COMPUTE)
    except _MISFITS as error:
        raise ProgramError(
            f"{classes[0]} cannot be built as config.json says ({_first_line(error)}); {REMEDY}"
        ) from None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _compute_buffers(model)
    return model.eval()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _compute_buffers(model: Any) -> None:
    """Buffers that no checkpoint holds get their values from the code that would initialize them."""
    holders = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module.register_buffer(leaf, torch.empty_like(buffer, device="cpu"), persistent=False)
        holders.add(id(module))
    for module in model.modules():
        module._is_hf_initialized = id(module) not in holders
    model.initialize_weights()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in model.state_dict():
            raise ProgramError(f"the model has a table {name} that its code does not compute; {REMEDY}")


def _stack(model: Any) -> tuple[str, list[nn.Module]]:
    """The list of modules with most of the model's parameters: its blocks."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+(\.|$)", name) and len(module)
    }
    sizes = {name: sum(value.numel() for value in module.parameters()) for name, module in lists.items()}
    if not sizes:
        raise ProgramError(f"{type(model).__name__} has no list of blocks; {REMEDY}")
    path = max(sizes, key=lambda name: sizes[name])
    return path, list(lists[path])


def _places(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The parameter or buffer that each tensor of the checkpoint becomes, in the checkpoint's order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for name in names:
        place, _ = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, _ = rename_source_key(name, [], [], prefix, state)
        if place in state:
            found[name] = place
    return found


def _to_meta(module: nn.Module) -> None:
    """Parameters, and buffers that a checkpoint holds, without their memory."""
    for part in module.modules():
        for leaf, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, leaf, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def require_transformers() -> None:
    """Raises MethodError with what to install where transformers is missing."""
    with suppress(ImportError):
        import transformers  # noqa: F401

        return
    raise MethodError(
        "a checkpoint is calibrated by running it in transformers, which is not installed; "
        "pip install 'fleetpress[hf]'"
    )

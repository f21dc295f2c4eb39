"""Options of `prune` that only the deletion of units has: comparison of layers, compensation, rounds."""

from collections.abc import Iterator

from .recipe import PruneStep, TrainStep
from .yaml_lines import Path

Found = Iterator[tuple[Path, str]]


def check_layer_shares(path: Path, step: PruneStep, *, finetunes: bool) -> Found:
    """What is wrong with shares of single `layers` and with `zeros`; `finetunes`: zeros have a step to grow in."""
    from fleetpress.compression.sparsity import is_sparsifier

    if step.layers and (step.mean_threshold is not None or step.std_threshold is not None):
        yield (*path, "layers"), "gives shares, where thresholds tell what goes; keep one of them"
    if step.layers and step.pattern is not None:
        yield (
            (*path, "layers"),
            f"gives shares, where pattern {step.pattern} tells what goes; keep one of them",
        )
    if step.layers and step.schedule == "iterative":
        yield (*path, "layers"), "has no rounds; delete it, or schedule: iterative"
    if step.layers and step.scope == "global":
        yield (*path, "layers"), "gives shares layer by layer, which scope global excludes; keep one of them"
    zeros = step.zeros
    if zeros is None:
        return
    if is_sparsifier(step.method):
        what = f"grow beside units that are deleted, and {step.method} deletes none; delete it"
        yield (*path, "zeros"), f"{what}: schedule gradual does the same"
        return
    if not finetunes:
        yield (*path, "zeros"), "grow during finetune, which is no step here; add finetune"
    if zeros.sparsity is None and not zeros.layers:
        yield (*path, "zeros"), "does not say how much; add sparsity, such as 0.5, or layers"
    if zeros.layers and zeros.scope == "global":
        what = "gives shares layer by layer, which scope global excludes; keep one of them"
        yield (*path, "zeros", "layers"), what


def check_deletion_options(path: Path, step: PruneStep, finetune: TrainStep | None) -> Found:
    """What is wrong with these options, given the step `finetune`: the place and what to write instead."""
    from fleetpress.compression.sparsity import SPARSIFIERS

    if step.method in SPARSIFIERS:
        scores = SPARSIFIERS[step.method].needs_gradients
        for name in ("normalize", "compensate", "schedule", "rounds"):
            default = PruneStep.model_fields[name].default
            if getattr(step, name) not in (default, "gradual") and not (scores and name == "normalize"):
                yield (*path, name), f"has no meaning for {step.method}, which deletes no units; delete it"
        if not scores:
            return
    if step.normalize != "none" and step.scope == "layer":
        what = f"{step.normalize} has no meaning for scope layer, which compares no layers; delete it"
        yield (*path, "normalize"), what
    if step.method in SPARSIFIERS:
        return
    if step.schedule != "iterative":
        if step.rounds is not None:
            yield (*path, "rounds"), "has no meaning for one shot; delete it, or add schedule: iterative"
    elif step.rounds is None:
        yield (*path, "schedule"), "iterative does not say in how many rounds; add rounds, such as 3"
    elif step.sparsity is None:
        yield (*path, "schedule"), "iterative grows a share from round to round; give sparsity"
    elif finetune is None:
        yield (*path, "schedule"), "iterative tunes after every round; add the step finetune"
    elif finetune.epochs < step.rounds:
        what = f"{step.rounds} need as many epochs of finetune at least, and it has {finetune.epochs}"
        yield (*path, "rounds"), f"{what}; take fewer rounds or more epochs"

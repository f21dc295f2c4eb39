"""Options of `prune` that only the deletion of units has: comparison of layers, compensation, rounds."""

from collections.abc import Iterator

from .recipe import PruneStep, TrainStep
from .yaml_lines import Path


def check_deletion_options(
    path: Path, step: PruneStep, finetune: TrainStep | None
) -> Iterator[tuple[Path, str]]:
    """What is wrong with these options, given the step `finetune`: the place and what to write instead."""
    from fleetpress.compression.sparsity import is_sparsifier

    if is_sparsifier(step.method):
        for name in ("normalize", "compensate", "schedule", "rounds"):
            default = PruneStep.model_fields[name].default
            if getattr(step, name) not in (default, "gradual"):
                yield (*path, name), f"has no meaning for {step.method}, which deletes no units; delete it"
        return
    if step.normalize != "none" and step.scope == "layer":
        what = f"{step.normalize} has no meaning for scope layer, which compares no layers; delete it"
        yield (*path, "normalize"), what
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

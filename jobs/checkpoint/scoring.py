"""The step `score`: a chunk of held-out sequences through the whole model, one block after the other."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from fleetpress.compression.decoder.passage import Batch, advanced, check_independent, embedded, scores
from fleetpress.compression.decoder.skeleton import Skeleton, require_transformers
from fleetpress.compression.decoder.solving import solved
from fleetpress.compression.errors import CompressionError
from fleetpress.compression.metrics import METRICS, Sums
from fleetpress.compression.treatment import KEPT
from fleetpress.storage.store import open_store
from fleetpress.storage.tensors import DTYPES

from ..errors import ModelError
from ..handover import Payload, record
from ..tasks import StepResult
from ..threads import use_one_thread
from .choice import choose
from .layout import Item, item_at
from .quality import SCORED_TOKENS
from .steps import opened
from .token_data import check_room, token_batch
from .weights import SourceTensors, solved_matrix

_NO_TOKEN = -100  # what metrics leave out


def score(payload: Payload) -> StepResult:
    """Sums of the metric for every sequence alone, of the model before or after; of the latter with its new weights."""
    use_one_thread()
    try:
        return StepResult(result={"sums": _sums(payload)})
    except CompressionError as error:
        raise ModelError(f"{payload['uri']}: {error}") from None


def _sums(payload: Payload) -> list[Sums]:
    require_transformers()
    batch = token_batch(payload["uri"], payload["samples"], payload["quota"])
    if batch is None:
        return []
    checkpoint = opened(payload)
    source = SourceTensors(
        open_store(checkpoint.root), [item_at(name, at) for name, at in checkpoint.tensors.items()]
    )
    if payload["side"] == "after":
        items = choose(checkpoint, payload["recipe"]).items
        solvers = {
            name: digest
            for digest in payload["solvers"]
            for name in record(payload, digest, proved=False).result["parts"]
        }
        changed = [item for item in items if item.treatment != KEPT]
        source.renew(changed, partial(_new, payload, solvers))
    skeleton = Skeleton(checkpoint.config or {}, source.names, source.read, source.rows)
    check_room(payload["uri"], batch, skeleton.width, payload["memory_bytes"])
    check_independent(skeleton, Batch(input_ids=batch.input_ids[:1, :8]))
    skeleton.embed_only(batch.input_ids)
    parts = list(batch.parts())
    hidden = [embedded(skeleton, part) for _, part in parts]
    skeleton.embed_nothing()
    for index in range(len(skeleton.blocks)):
        skeleton.fill(index, source.read(skeleton.names_of(index)))
        hidden = [
            advanced(skeleton, index, part, states) for (_, part), states in zip(parts, hidden, strict=True)
        ]
        skeleton.empty(index)
    found = [
        sums
        for (_, part), states in zip(parts, hidden, strict=True)
        for sums in _measured(skeleton, part, states, payload["metric"])
    ]
    skeleton.close()
    return found


def _measured(skeleton: Skeleton, batch: Batch, hidden: Tensor, metric: str) -> list[Sums]:
    """The metric's sums of each sequence; scores of many tokens are large, so some come at a time.

    What follows the last block looks at every token alone. The last one of a run is the first one of the next: each run
    is measured by how well it foretells its tokens after the first.
    """
    rule, found = METRICS[metric], []
    kept = batch.attention_mask
    targets = batch.input_ids if kept is None else batch.input_ids.masked_fill(kept == 0, _NO_TOKEN)
    for index in range(len(batch)):
        sums = rule.start()
        for start in range(0, max(1, targets.shape[1] - 1), SCORED_TOKENS):
            at = slice(index, index + 1), slice(start, start + SCORED_TOKENS + 1)
            logits = scores(skeleton, Batch(input_ids=batch.input_ids[at]), hidden[at])
            rule.update(sums, logits, targets[at])
        found.append(sums)
    return found


def _new(payload: Payload, solvers: Mapping[str, str], item: Item, weight: Tensor) -> Tensor:
    """What becomes of a matrix: as a task has solved it, or as it will be converted."""
    if item.treatment.calibrated:
        return solved_matrix(payload, item, solvers[item.name])
    if item.treatment.cast:
        return weight.to(DTYPES[item.treatment.cast])
    return solved(item.name, weight, item.treatment, None).plain

"""How good a checkpoint is before and after: tasks that score held-out sequences, and what follows from it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fleetpress.storage.checkpoint import Checkpoint, TensorLocation

from ..digests import digest
from ..errors import ModelError
from ..handover import Payload, record
from ..tasks import Task
from ..validation import Quality, drop_facts, refusal
from .memory import LIBRARIES_BYTES, TORCH_BYTES, TRANSFORMERS_BYTES
from .samples import Shard, chunks_of, places_of, quota_of, spans_of

METRICS = ("perplexity", "token_accuracy")
SCORED_TOKENS = 256  # whose scores are there at once
_COMPUTE_BYTES = 4  # of a weight, and a score, while it is run
_SCORES = 3  # copies of scores while they are measured


def score_tasks(
    checkpoint: Checkpoint,
    *,
    name: str,
    work: str,
    shared: Mapping[str, Any],
    options: Mapping[str, Any],
    memory_bytes: int,
    shards: Sequence[str],
) -> list[Task]:
    """Spans of the eval data through the model as it is, and as it will be: `before` and `after` of each.

    The latter is read from its shards, which the tasks of the ids `shards` write. `shared` is what all payloads
    hold (output, root, uri, artifact, model, recipe, data), `options` are those of `calibrate`. Raises ModelError for a
    metric that has no meaning here, and a tensor that `memory_bytes` cannot hold.
    """
    data = shared["data"]
    metric = data["metric"] or METRICS[0]
    if metric not in METRICS or data["loss"] not in (None, "causal_lm"):
        asked = data["loss"] if metric in METRICS else metric
        raise ModelError(
            f"{checkpoint.uri}: a language model is measured by {' or '.join(METRICS)} of its own tokens, not by "
            f"{asked}; change the data's metric and loss, or give the model no eval data"
        )
    if checkpoint.config is None:
        raise ModelError(
            f"{checkpoint.uri} has no config.json beside it, so it cannot be run on the eval data; name the folder "
            "of a Hugging Face model, or give the model no eval data"
        )
    _check_memory(checkpoint, memory_bytes)
    seen_shards: Sequence[Shard] = data["eval"]
    spans = spans_of(chunks_of(seen_shards, options["samples"], options["batch_size"]))
    tasks = []
    for side in ("before", "after"):
        needs = tuple(shards) if side == "after" else ()
        for index, span in enumerate(spans):
            facts = {"side": side, "span": index, "metric": metric}
            seen = [
                [[shard["etag"], shard["bytes"], first, last] for shard, first, last in chunk]
                for chunk in span
            ]
            own = digest("score", work=work, name=name, seen=seen, **facts)
            payload = {
                **shared,
                **facts,
                "digest": own,
                "memory_bytes": memory_bytes,
                "quota": quota_of(seen_shards, options["samples"]),
                "samples": [places_of(chunk) for chunk in span],
            }
            tasks.append(
                Task(
                    id=f"{name}/score[{side}.{index}]",
                    model=name,
                    kind="score",
                    digest=own,
                    needs=needs,
                    payload=payload,
                    memory_bytes=memory_bytes,
                )
            )
    return tasks


def quality(payload: Payload) -> Quality | None:
    """What the score tasks of the payload have measured; None without any.

    Raises ModelError for data without a sample, or with which the original model gives no number.
    """
    scored = payload.get("scored")
    if not scored:
        return None
    from fleetpress.compression.confidence import difference

    sides = {
        side: [sums for own in digests for sums in record(payload, own).result["sums"]]
        for side, digests in scored.items()
    }
    uri, metric = payload["model"]["uri"], payload["data"]["metric"] or METRICS[0]
    if not sides["before"]:
        raise ModelError(f"{uri}: its eval data hold no sample; give at least one sequence of `input_ids`")
    found = difference(metric, sides["before"], sides["after"], seed=payload["seed"])
    if math.isnan(found.before):
        raise ModelError(
            f"{uri}: {metric} of the original model on the eval data is not a number; look for sequences without tokens"
        )
    limit = payload["recipe"]["validate"]["max_drop"]
    return Quality(
        metric=metric,
        before=found.before,
        after=found.after,
        drop=drop_facts(found),
        verdict=refusal(
            metric, found, limit, "use more bits, smaller groups, or a method that is calibrated"
        ),
    )


def run_bytes(at: TensorLocation) -> int:
    """What a tensor takes while it is put in place and run; a matrix as if it were the head, with its scores."""
    needed = _COMPUTE_BYTES * math.prod(at.info.shape) + at.info.size_bytes
    if len(at.info.shape) == 2:
        needed += _SCORES * _COMPUTE_BYTES * SCORED_TOKENS * at.info.shape[0]
    return needed


def _check_memory(checkpoint: Checkpoint, memory_bytes: int) -> None:
    """Raises ModelError naming the tensor, such as the head, that cannot be held while it is run."""
    for name, at in checkpoint.tensors.items():
        needed = run_bytes(at) + LIBRARIES_BYTES + TORCH_BYTES + TRANSFORMERS_BYTES
        if needed > memory_bytes:
            raise ModelError(
                f"{checkpoint.uri}: {name} needs {needed} bytes of memory to be run on the eval data, more than the "
                f"{memory_bytes} of resources.memory_per_task; raise it, or give the model no eval data"
            )

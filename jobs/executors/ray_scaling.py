"""Which kind of machine Ray's autoscaler starts: cheap ones first, others while AWS has none of those.

Runs on the head of a cluster from cluster.yaml, which names `prefer_available` in RAY_AUTOSCALER_UTILIZATION_SCORER.
"""

from typing import Any

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer


def prefer_available(
    node_resources: dict[str, Any],
    resources: list[dict[str, Any]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[Any, ...] | None:
    """Ray's own score, after whether machines of this type could be had at the last try; the highest is started.

    Ray remembers a failed start for 30 minutes. Its own scorer does not look at that, and would ask for a spot machine
    again and again while there is none. Of equal scores Ray takes the type whose name sorts last.
    """
    score = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    if score is None:
        return None
    last = node_availability_summary.node_availabilities.get(node_type)
    return (last is None or last.is_available, *score)

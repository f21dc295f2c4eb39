"""How long one call of a module takes on this machine."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def latency_ms(
    module: Callable[..., object],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    repeats: int = 30,
    warm_up: int = 3,
    limit_seconds: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median wall time of a call in milliseconds, without gradients.

    Calls stop after `repeats` or when the next one would pass `limit_seconds`, warm-up included; one call is always
    timed, so only a module slower than the limit takes longer, and then by that call.
    """
    import torch

    kwargs = kwargs or {}
    times: list[float] = []
    start = clock()
    with torch.no_grad():
        for call in range(warm_up + repeats):
            before = clock()
            module(*args, **kwargs)
            after = clock()
            # The first calls allocate and plan; they count only if there is no time for more.
            if call == warm_up:
                times.clear()
            times.append(after - before)
            if (after - start) + (after - before) > limit_seconds:
                break
    return statistics.median(times) * 1000

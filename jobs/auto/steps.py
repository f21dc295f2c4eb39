"""The steps of a search: what layers would cost, candidates, the one that is published."""

from collections.abc import Callable

from ..handover import Payload
from ..tasks import StepResult
from .publishing import publish
from .sensing import sense
from .trials import trial

STEPS: dict[str, Callable[[Payload], StepResult]] = {"sense": sense, "trial": trial, "publish": publish}

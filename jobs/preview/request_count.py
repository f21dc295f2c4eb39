"""How many requests a run makes of a fleet in which nothing has changed: predicted by `plan`, kept by `run`.

Not counted is what depends on time: every BEAT_SECONDS a PUT and a HEAD, and the summary's PUT while events are told.
"""

from collections import Counter
from collections.abc import Mapping
from posixpath import splitext

from fleetpress.storage.globs import has_glob, split_pattern
from fleetpress.storage.sources import KIND_BY_SUFFIX
from fleetpress.storage.store import ObjectStore, open_store
from fleetpress.storage.uri import normalize

from ..runs.past_runs import look_back, rows_of
from ..runs.published import ONE_BY_ONE, pointed_to
from ..runs.results import DETAILED, RUNS
from ..spec.fleet_spec import Spec
from ..threads import side_by_side

PAGE_KEYS = 1000  # of a listing, at most: S3's own limit
_OWN_KEYS = 3  # a run's spec, first summary and sign of life are listed when it looks at the runs before it
_OWN_PUTS = 6  # spec, first summary, sign of life, events, page, last summary


def unchanged_requests(spec: Spec, store: ObjectStore, digests: Mapping[str, str]) -> dict[str, int]:
    """Requests by kind of the next run, if every model is published under these digests (by name) and stays as it is.

    Lists what the run will list. Raises the store's errors.
    """
    told = spec.text is not None
    count = Counter(PUT=_OWN_PUTS if told else _OWN_PUTS - 1, DELETE=1)
    for entry in spec.models:
        count += _to_find(entry.source, is_file=splitext(normalize(entry.source))[1] in KIND_BY_SUFFIX)
    for data in spec.data.values():
        for pattern in (*(data.train or ()), *(data.eval or ())):
            count += _to_find(pattern, is_file=True)
    models = len(digests)
    if models <= ONE_BY_ONE:
        count["HEAD"] += models
    else:
        count["LIST"] += _pages(len(store.sizes("models/")))
    past = look_back(store, spec.name)
    known = rows_of(past.ended)
    rows = {name for name, digest in digests.items() if name in known and known[name].digest == digest}
    count["LIST"] += _pages(len(store.sizes(RUNS)) + (_OWN_KEYS if told else _OWN_KEYS - 1))
    count["GET"] += past.reads
    others = [name for name in digests if name not in rows]
    count["GET"] += models + len(others) + min(DETAILED, models)  # pointers, numbers, layers for the page
    pointers = side_by_side(lambda name: pointed_to(store, name), others)
    count["PUT"] += sum(digests[name] != shown for name, shown in zip(others, pointers, strict=True))
    return {kind: number for kind, number in sorted(count.items()) if number}


def _to_find(uri: str, *, is_file: bool) -> Counter[str]:
    """To find what a uri of the spec names: a pattern's folder is listed, a file is looked up."""
    if has_glob(uri):
        return Counter(LIST=_pages(_objects(split_pattern(uri)[0])))
    return Counter(HEAD=1) if is_file else Counter(LIST=_pages(_objects(uri)))


def _objects(uri: str) -> int:
    return len(open_store(uri).sizes())


def _pages(keys: int) -> int:
    return max(1, -(-keys // PAGE_KEYS))

"""The fault matrix as a table: which requests of a run each fault strikes, and how."""

from dataclasses import dataclass

from fault_relay import CutUpload, Delay, Flip, Refuse, Reset, Rule, Truncate

_WEIGHTS = r"/in/language/model-00001-of-00002\.safetensors$"
_BODY = r"range: bytes=\d{3,}-"  # a range of weights: behind the header
_HEADER = r"range: bytes=0-"
_SHARD = r"/out[^?]*/model-00001-of-00002\.safetensors"
_SMALL_SHARD = r"/out[^?]*/model-00002-of-00002\.safetensors"
_PART = r"partNumber=\d"
_CREATE = r"\?uploads"
_COMPLETE = r"uploadId=[^&]*$"
_RECORD = r"/records/[^/]*\.json$"
_CONDITIONAL = "if-none-match"
_ENDLESS = 0
# Seen while the run plans, or only once other tasks have worked on: the model fails, and running again reads anew.
_SEEN_LATE = ("config", "weights", "crumbs", "shard read back")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault; `resumes`: the first run may end because of it, and running again without it must mend all."""

    name: str
    rules: tuple[Rule, ...]
    resumes: bool = False


def _case(name: str, *rules: Rule, resumes: bool = False) -> Case:
    return Case(name=name, rules=rules, resumes=resumes)


def _one(name: str, resumes: bool = False, **rule: object) -> Case:
    return _case(name, Rule(name=name, **rule), resumes=resumes)  # type: ignore[arg-type]


def cases() -> list[Case]:
    """Every fault, with fresh counts."""
    return [*_refusals(), *_connections(), *_bodies(), *_uploads(), *_ends()]


def _refusals() -> list[Case]:
    slow, busy = Refuse(503, "SlowDown"), Refuse(429, "TooManyRequests")
    return [
        _one("503 SlowDown, 3 in a row", fault=slow, skip=40, times=3),
        _one("503 SlowDown, every 9th request", fault=slow, every=9, times=_ENDLESS),
        _one("503 SlowDown for 12 parts", fault=slow, method="PUT", target=_PART, times=12),
        _one("429 of writes", fault=busy, method="PUT", target="/out", skip=5, times=3),
        _one("500 of reads", fault=Refuse(500, "InternalError"), method="GET", target="/in/", times=3),
        _one("500 of lookups (HEAD)", fault=Refuse(500, "InternalError"), method="HEAD", times=3),
        _one(
            "409 of a conditional write",
            fault=Refuse(409, "ConditionalRequestConflict"),
            method="PUT",
            head=_CONDITIONAL,
            target="/leases/",
            times=2,
        ),
        _one("500 of lists, 3 in a row", fault=Refuse(500, "InternalError"), target="list-type=2", times=3),
        _one(
            "200 with an error in it",
            fault=Refuse(200, "InternalError"),
            method="POST",
            target=_COMPLETE,
            times=2,
        ),
    ]


def _connections() -> list[Case]:
    return [
        _one("reset before a read", fault=Reset(), method="GET", target=_WEIGHTS, head=_BODY, times=2),
        _one("reset before a write", fault=Reset(), method="PUT", target=_RECORD, times=2),
        _one("reset after a write", fault=Reset(after=True), method="PUT", target=_RECORD, times=2),
        _one("reset after a delete", fault=Reset(after=True), method="DELETE", target="/leases/"),
        _one("resets, every 7th request", fault=Reset(), every=7, times=_ENDLESS),
        _one("latency of every request", fault=Delay(0.02), times=_ENDLESS),
        _one(
            "stalled body",
            fault=Truncate("stall"),
            method="GET",
            target=_WEIGHTS,
            head=_BODY,
        ),
        _one("stalled reply", fault=Delay(4.0), method="PUT", target=_RECORD),
    ]


def _bodies() -> list[Case]:
    places = {
        "weights": {"target": _WEIGHTS, "head": _BODY},
        "program": {"target": r"/in/tiny\.pt2"},
        "data": {"target": r"/in/train-0\.npz"},
        "config": {"target": r"/in/language/config\.json"},
        "tokenizer": {"target": r"/in/language/tokenizer\.json"},
        "record": {"target": _RECORD},
        "tensors of a step": {"target": r"/records/[^/]*\.safetensors"},
        "crumbs": {"target": r"\.crumbs"},
        "shard read back": {"target": _SHARD, "head": r"range: bytes=\d{7,}-"},
        "small shard read back": {"target": _SMALL_SHARD},
        "manifest read back": {"target": r"manifest\.json"},
    }
    cut = [
        _one(f"body cut ({how}): {place}", method="GET", fault=Truncate(how), **places[place])  # type: ignore[arg-type]
        for how in ("close", "reset", "length")
        for place in ("weights", "program", "data", "record", "shard read back")
    ]
    cut += [
        _one(f"body cut (range): {place}", method="GET", fault=Truncate("range"), **places[place])
        for place in ("weights", "data", "shard read back")
    ]
    flipped = [
        _one(f"flipped bit: {place}", place in _SEEN_LATE, method="GET", fault=Flip(-3), **rule)  # type: ignore[arg-type]
        for place, rule in places.items()
    ]
    flipped += [
        _one(
            f"flipped bit: {what} in the header",
            resumes=True,
            method="GET",
            fault=Flip(after=after),
            target=target,
            head=_HEADER,
        )
        for what, target, after in (
            ("name", _WEIGHTS, b"model.layers.0.m"),
            ("dtype", _WEIGHTS, b'"dtype":"'),
            ("name alone", r"/in/lone\.safetensors$", b"layers."),
            ("name of the output", _SMALL_SHARD, b"model.layers."),
        )
    ]
    flipped += [
        _one(
            "flipped bit: etag in a list",
            resumes=True,
            fault=Flip(after=b"<ETag>&#34;"),
            target="list-type=2&prefix=[^&]*in%2Flanguage",
        ),
    ]
    return [*cut, *flipped]


def _uploads() -> list[Case]:
    after = Reset(after=True)
    return [
        _one("cut upload of a part", fault=CutUpload(1 << 20), method="PUT", target=_PART, times=2),
        _one("cut upload of an object", fault=CutUpload(1000), method="PUT", target=_SMALL_SHARD, times=2),
        _one(
            "lost reply: conditional write", fault=after, method="PUT", target="/leases/", head=_CONDITIONAL
        ),
        _one(
            "lost reply: self-test", fault=after, method="PUT", target="/fleetpress-probe", head=_CONDITIONAL
        ),
        _one("lost reply: part", fault=after, method="PUT", target=_PART, times=2),
        _one("lost reply: CreateMultipartUpload", fault=after, method="POST", target=_CREATE),
        _one("lost reply: CompleteMultipartUpload", fault=after, method="POST", target=_COMPLETE),
        _one("lost reply: manifest", fault=after, method="PUT", target=r"manifest\.json"),
    ]


def _ends() -> list[Case]:
    expired, gone, failing = Refuse(403, "ExpiredToken"), Reset(), Refuse(500, "InternalError")
    parts = rf"{_PART}|/records/"

    def last(name: str, **rule: object) -> Case:
        return _one(name, resumes=True, **{"times": _ENDLESS, **rule})

    return [
        last("lists fail", fault=failing, target="list-type=2.*(records|models)"),
        last("credentials expire before the plan", fault=expired, skip=4),
        last("credentials expire in the program", fault=expired, skip=40),
        last("credentials expire in the parts", fault=expired, target=parts, skip=28),
        last("credentials expire for 10 requests", fault=expired, skip=40, times=10),
        last("the store is gone in the middle", fault=gone, skip=70),
    ]

"""Templates with their style and script inside, and a policy that lets a browser run and fetch nothing else."""

import base64
import hashlib
import time
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..runs.figures import MISSING, sized

if TYPE_CHECKING:
    from jinja2 import Environment

# Kinds of tasks that have a colour in style.css; what a file calls them otherwise must not become another class.
_KINDS = (
    "train",
    "collect",
    "prune",
    "finetune",
    "calibrate",
    "observe",
    "equalize",
    "sense",
    "trial",
    "quantize",
    "convert",
    "advance",
    "solve",
    "score",
    "publish",
    "assemble",
    "finish",
    "open",
    "export",
)


def render(name: str, *, scripted: bool = False, **values: Any) -> str:
    """The page `name`.html, every value escaped, with style.css inside, and page.js if it is scripted."""
    style, script = _part("style.css"), _part("page.js") if scripted else ""
    allowed = f"'{_hash(script)}'" if scripted else "'none'"
    rules = (
        "default-src 'none'",
        f"style-src '{_hash(style)}'",
        f"script-src {allowed}",
        "base-uri 'none'",
        "form-action 'none'",
    )
    policy = "; ".join(rules)
    template = _environment().get_template(f"{name}.html")
    return template.render(policy=policy, style=Markup(style), script=Markup(script), **values)


@cache
def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=FunctionLoader(_part),
    )
    environment.filters.update(sized=sized, or_dash=lambda value: MISSING if value in (None, "") else value)
    environment.filters["kind_class"] = lambda kind: kind if kind in _KINDS else "other"
    environment.globals["plural"] = lambda number, word: f"{number:,} {word}" + ("" if number == 1 else "s")
    return environment


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls this style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def began_at(run: str) -> str | None:
    """`2026-11-30 02:15:26 UTC` of a run's id, which begins with the time; None of another one."""
    try:
        parsed = time.strptime(run[:15], "%Y%m%dT%H%M%S")
    except ValueError:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", parsed)

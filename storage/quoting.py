"""What strangers wrote, as a message may repeat it: on one line, printable, and not longer than it helps."""

_LONGEST = 120


def quoted(value: object) -> str:
    """A text in quotes, its control characters escaped; another plain value as Python writes it; both cut short."""
    if isinstance(value, str):
        return shortened(ascii(value) if not value.isprintable() else repr(value))
    if isinstance(value, list | tuple | dict) and len(value) > _LONGEST:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        return shortened(repr(value))
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return f"a {type(value).__name__}"


def shortened(text: str, longest: int = _LONGEST) -> str:
    """`text`, its end left out where a message would become unreadable."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def one_line(error: BaseException) -> str:
    """What another library says of an error: the first line, shortened; its kind if it says nothing."""
    lines = str(error).strip().splitlines() or [""]
    printable = "".join(sign if sign.isprintable() else "?" for sign in lines[0])
    return shortened(printable, 200) or type(error).__name__

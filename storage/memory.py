"""Whether an error is about this machine's memory and not about the file that was read."""

import re

# How torch, and threads that find no room for their stack, say it: as a RuntimeError.
_PHRASES = ("out of memory", "can't allocate", "not enough memory", "can't start new thread")
_ASKED = re.compile(r"tried to allocate (\d+) bytes")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: then the file may be sound, and less at once or a larger machine helps."""
    said = isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)
    return said or isinstance(error, MemoryError)


def asked_bytes(error: BaseException) -> int:
    """How much torch tried to allocate; 0 if the error does not tell."""
    found = _ASKED.search(str(error))
    return int(found[1]) if found else 0

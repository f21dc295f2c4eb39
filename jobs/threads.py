"""Threads. Tasks compute on one: the number of threads changes the last digits, and the other cores have tasks too."""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

AT_ONCE = 16  # requests of a driver that are on their way

_T = TypeVar("_T")
_R = TypeVar("_R")


def use_one_thread() -> None:
    """torch computes on one thread from here on. Call it each time: other libraries raise it behind our back."""
    import torch

    torch.set_num_threads(1)


def torch_is_loaded() -> bool:
    """Whether this process has paid for torch already."""
    return "torch" in sys.modules


def side_by_side(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """`function` of every item, in their order, several at once; for what waits for a store. Raises what it raises."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="driver")
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)

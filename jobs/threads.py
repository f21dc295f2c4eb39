"""Tasks compute on one thread: the number of threads changes the last digits, and the other cores have tasks too."""

import sys


def use_one_thread() -> None:
    """torch computes on one thread from here on. Call it each time: other libraries raise it behind our back."""
    import torch

    torch.set_num_threads(1)


def torch_is_loaded() -> bool:
    """Whether this process has paid for torch already."""
    return "torch" in sys.modules

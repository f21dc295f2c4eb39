"""Errors cross processes: one message string each, the same after pickling."""

import inspect
import pickle

import pytest

from fleetpress.storage import errors

_KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.__name__)
def test_message_survives(kind: type[errors.StorageError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what, where, remedy")))
    assert type(copy) is kind
    assert str(copy) == "what, where, remedy"
    assert isinstance(copy, errors.StorageError)


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_drawing(kind: type[errors.StorageError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")

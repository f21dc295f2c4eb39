"""What can go wrong with bytes and names. Every error takes one message string, so that it crosses processes unchanged.

    StorageError
    ├── InvalidUri            a uri or key that is malformed or would leave its root
    ├── ObjectNotFound        the store answers, the object is not there (or is a folder, or a dangling link)
    ├── AccessDenied          no credentials, wrong credentials, forbidden, unreadable
    ├── BucketNotFound        the endpoint answers, the bucket is not there
    ├── StoreUnreachable      endpoint down, time-outs, server errors that outlived the retries
    │   └── WriteConflict     a conditional write met another one of the same key; nobody knows yet who wins
    ├── SourceChanged         the object is not the one that was pinned (etag, length)
    ├── TooLarge              an object of more bytes than its reader takes
    ├── UploadGone            an upload in parts that was completed or aborted, or whose parts are not those recorded
    ├── NotWritable           read-only, full, or without the means of an atomic write
    ├── InvalidModelFile      a model file that is corrupt or lies about itself
    │   └── UnsafeModelFile   a model file that carries pickled code
    ├── InvalidData           a data shard that is corrupt or does not fit its model
    └── ArtifactCorrupt       a published file that is not what its manifest or its writer says

Only `StoreUnreachable` is worth a later try with nothing changed.
"""

_LONGEST_MESSAGE = 2_000
_END_OF_MESSAGE = 500


class StorageError(Exception):
    """Root of this package's errors; `str(error)` says what is wrong, where, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines()) if "\n" in message or "\r" in message else message
        if (
            len(line) > _LONGEST_MESSAGE
        ):  # names and shapes in it come from files; what to do stands at the end
            line = f"{line[: _LONGEST_MESSAGE - _END_OF_MESSAGE]} ... {line[5 - _END_OF_MESSAGE :]}"
        super().__init__(line)


class InvalidUri(StorageError):
    """A uri or an object key that is malformed, or that would leave its root."""


class ObjectNotFound(StorageError):
    """The store answers, but there is no such object."""


class AccessDenied(StorageError):
    """No credentials, wrong credentials, or credentials that may not do this."""


class BucketNotFound(StorageError):
    """The endpoint answers, but it has no such bucket."""


class StoreUnreachable(StorageError):
    """The store does not answer, or answers with errors that outlived the retries."""


class WriteConflict(StoreUnreachable):
    """Another write of the same key is under way: what came of it can be seen a little later."""


class SourceChanged(StorageError):
    """The object is not the one that was planned with: another etag, or fewer bytes."""


class TooLarge(StorageError):
    """The object has more bytes than whoever asked for it takes; none of them was read."""


class UploadGone(StorageError):
    """There is no such upload (any more), or its parts are not the ones that were recorded: it must be done again."""


class NotWritable(StorageError):
    """The destination takes no (atomic) writes."""


class InvalidModelFile(StorageError):
    """A model file that is corrupt, truncated, or whose header lies."""


class UnsafeModelFile(InvalidModelFile):
    """A model file that carries pickled code; it was not executed."""


class InvalidData(StorageError):
    """A data shard that is corrupt, or whose arrays do not fit together."""


class ArtifactCorrupt(StorageError):
    """A published file whose bytes are not those that were written or promised."""


UNUSABLE_STORE = (StoreUnreachable, AccessDenied, BucketNotFound, NotWritable)
"""Errors that are about the store itself, whatever object was asked for."""

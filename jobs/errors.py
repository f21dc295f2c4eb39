"""What can go wrong with a job; each message says what, where and what to do about it.

FleetpressError
├── UsageError            the command line or a call asks for something that cannot be
│   └── SpecError         the spec; every problem of the file at once, one per line
├── ModelError            one model cannot be done; the others go on
└── ClusterUnreachable    no Ray cluster answers at the address
"""


class FleetpressError(Exception):
    """Root of this package's errors; `exit_code` is what the command line leaves with."""

    exit_code = 1


class UsageError(FleetpressError):
    """The command line or a call asks for something that cannot be."""

    exit_code = 2


class SpecError(UsageError):
    """The spec is wrong: one line per problem, each `file:line: path: what; remedy`."""


class ModelError(FleetpressError):
    """One model cannot be done (state `failed`); the rest of the fleet goes on."""

    exit_code = 3


class ClusterUnreachable(FleetpressError):
    """No Ray cluster answers at the address."""

    exit_code = 5

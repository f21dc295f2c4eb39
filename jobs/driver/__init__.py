"""The driver of a run: scheduler, leases, journal, the loop, and how it is stopped."""

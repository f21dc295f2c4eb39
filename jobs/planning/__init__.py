"""From a spec to tasks: sources to models, models to chains of tasks under their digests."""

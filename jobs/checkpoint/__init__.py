"""Bare checkpoints: chosen and laid out from their headers, converted as streams, finished, proved and decoded.

`choice` says what happens to each tensor, `layout` where every byte will lie and which task makes it, `tasks` makes
that a graph of tasks, `steps` are what workers run: `stream` converts rows, `shard` writes and proves files.
"""

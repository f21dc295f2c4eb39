"""Bare checkpoints: chosen and laid out from their headers, converted as streams, finished, proved and decoded.

`choice` says what happens to each tensor, `layout` where every byte will lie and which task makes it, `tasks` makes
that a graph of tasks, `steps` are what workers run: `stream` converts rows, `shard` writes and proves files.

With data it is run, block by block: `calibrating` plans that, `advancing` takes hidden states through blocks, `solving`
makes matrices with what was seen, `spill` is what they leave to one another; `quality` and `scoring` measure the model.
"""

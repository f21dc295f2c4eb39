"""Language models that are run block by block: transformers builds them without weights, a few at a time are put in.

`skeleton` holds the model, `passage` sends hidden states through it, `observing` looks at what a block's layers read,
`solving` makes stored tensors of a block's matrices. Importing this does not import transformers.
"""

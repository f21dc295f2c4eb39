"""What happens to the tensors of a bare checkpoint: told from names and shapes, done to blocks of rows.

Nothing here imports torch at the top: workers that need only the compiled kernel never pay for it.
"""

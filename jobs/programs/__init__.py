"""The steps of a program: what a worker does to it, from source bytes to the published file."""

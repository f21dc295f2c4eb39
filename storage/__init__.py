"""Bytes and names: object stores, model files, data shards, artifacts."""

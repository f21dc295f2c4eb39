"""Runs as they are seen: states and results, events, signs of life, live views, what earlier runs left."""

"""The spec: YAML to strict values, with every problem of a file told at once, at its line."""

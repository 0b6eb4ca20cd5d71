"""The Python API: open a model folder, route its vision tokens, generate answers."""

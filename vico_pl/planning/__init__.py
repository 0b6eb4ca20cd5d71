"""What a run needs, before it starts: memory, operations and time."""

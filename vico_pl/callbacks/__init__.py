"""Callbacks of a run: they record, guard, save and stop; none changes a weight."""

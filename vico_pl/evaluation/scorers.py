"""Scores of an answer, 0 to 1, by name."""

from collections.abc import Callable, Sequence

SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": lambda text, answers: float(text.strip().lower() in [a.strip().lower() for a in answers])
}

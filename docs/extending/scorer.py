"""A score for boxes: intersection over union of `[x1, y1, x2, y2]` in an answer and an accepted one."""

import re
from collections.abc import Sequence

from vico_pl.evaluation.scorers import SCORERS

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def box_iou(prediction: str, answers: Sequence[str]) -> float:
    """Return the intersection over union of the best accepted box, from 0 to 1; 0 if there is no box.

    >>> round(box_iou("The box is [0, 0, 2, 2].", ["[1, 0, 3, 2]"]), 4)
    0.3333
    """
    return max((_iou(_box(prediction), _box(answer)) for answer in answers), default=0.0)


def _box(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)][:4]


def _iou(a: list[float], b: list[float]) -> float:
    if len(a) < 4 or len(b) < 4:
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


SCORERS["box_iou"] = box_iou

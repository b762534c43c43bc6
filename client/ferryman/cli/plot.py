"""A learning-rate curve in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ferryman.types import LearningRatePoint

_BRAILLE: Final = 0x2800
# The bit of each dot of a Braille cell, by column (2) and row (4, from the top): Unicode block "Braille Patterns".
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def draw_curve(points: Sequence[LearningRatePoint], width: int = 72, height: int = 16) -> str:
    """Return the curve as `height` lines of plot and two of step axis, none wider than `width` characters.

    The y axis begins at 0. Each character holds 2 x 4 dots. `width` is at least 24, `height` at least 2, and `points`,
    by rising step, are at least one.
    """
    assert points and width >= 24 and height >= 2
    highest = max(point.learning_rate for point in points) or 1.0
    labels = [f"{highest * (height - row) / height:.2e}" for row in range(height)]
    label_width = max(len(label) for label in labels)
    columns = width - label_width - 2
    cells = [[_BRAILLE] * columns for _ in range(height)]
    for x, y in _dots(points, highest, 2 * columns, 4 * height):
        row = 4 * height - 1 - y
        cells[row // 4][x // 2] |= _DOTS[x % 2][row % 4]
    # Every fourth line has its label: more would only be noise.
    rows = [
        f"{labels[row] if row % 4 == 0 else '':>{label_width}} ┤{''.join(map(chr, cells[row]))}"
        for row in range(height)
    ]
    return "\n".join([*rows, *_step_axis(points, label_width, columns)])


def _dots(points: Sequence[LearningRatePoint], highest: float, x_dots: int, y_dots: int) -> Iterator[tuple[int, int]]:
    """Yield (x, y) of every dot, y from the bottom; neighbours are joined, so that a steep curve has no holes."""
    first, last = points[0].step, points[-1].step
    previous: tuple[int, int] | None = None
    for point in points:
        x = round((point.step - first) / max(1, last - first) * (x_dots - 1))
        y = round(point.learning_rate / highest * (y_dots - 1))
        x0, y0 = previous or (x, y)
        count = max(abs(x - x0), abs(y - y0), 1)
        for i in range(1, count + 1):
            yield x0 + round((x - x0) * i / count), y0 + round((y - y0) * i / count)
        previous = (x, y)


def _step_axis(points: Sequence[LearningRatePoint], label_width: int, columns: int) -> tuple[str, str]:
    first, last = f"{points[0].step:,}", f"{points[-1].step:,}"
    middle = "training step"
    margin = " " * label_width
    axis = f"{margin} └{'─' * columns}"
    room = columns - len(first) - len(last)
    text = middle.center(room) if room >= len(middle) + 2 else " " * max(1, room)
    return axis, f"{margin}  {first}{text}{last}"

"""Plots a learning-rate curve in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ferryman.types import LearningRatePoint

_BRAILLE: Final = 0x2800
# The bit of each dot of a Braille cell, by column (2) and row (4, from the top): Unicode block "Braille Patterns".
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True, kw_only=True)
class _Style:
    """The characters of a plot: `dots` is the number of columns and rows of dots in one character."""

    dots: tuple[int, int]
    y_axis: str
    corner: str
    x_axis: str

    def character(self, dots: int) -> str:
        """Return the character with these dots, a sum of bits of _DOTS."""
        return chr(_BRAILLE + dots) if self.dots == (2, 4) else "*" if dots else " "


_UNICODE: Final = _Style(dots=(2, 4), y_axis="┤", corner="└", x_axis="─")
_ASCII: Final = _Style(dots=(1, 1), y_axis="|", corner="+", x_axis="-")
CHARACTERS: Final = "┤└─" + chr(_BRAILLE) + chr(_BRAILLE + 0xFF)
"""Characters that the terminal must support, unless the plot is in ASCII."""
MIN_WIDTH: Final = 24


def draw_curve(
    points: Sequence[LearningRatePoint], width: int = 72, height: int = 16, *, ascii_only: bool = False
) -> str:
    """Return the curve as `height` lines of plot and two of step axis, none wider than `width` characters.

    The y axis begins at 0. Each character holds 2 x 4 dots, in ASCII one. `width` is at least MIN_WIDTH, `height` at
    least 2, and `points`, by rising step, are at least one.
    """
    assert points and width >= MIN_WIDTH and height >= 2
    style = _ASCII if ascii_only else _UNICODE
    highest = max(point.learning_rate for point in points) or 1.0
    labels = [f"{highest * (height - row) / height:.2e}" for row in range(height)]
    label_width = max(len(label) for label in labels)
    columns = width - label_width - 2
    cells = [[0] * columns for _ in range(height)]
    across, down = style.dots
    for x, y in _dots(points, highest, across * columns, down * height):
        row = down * height - 1 - y
        cells[row // down][x // across] |= _DOTS[x % across][row % down]
    # Label every fourth line.
    margins = [f"{labels[row] if row % 4 == 0 else '':>{label_width}} {style.y_axis}" for row in range(height)]
    rows = [margin + "".join(map(style.character, row)) for margin, row in zip(margins, cells, strict=True)]
    return "\n".join([*rows, *_step_axis(points, label_width, columns, style)])


def _dots(points: Sequence[LearningRatePoint], highest: float, x_dots: int, y_dots: int) -> Iterator[tuple[int, int]]:
    """Yield (x, y) of every dot, y from the bottom; neighbours are joined, so that a steep curve has no gaps."""
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


def _step_axis(points: Sequence[LearningRatePoint], label_width: int, columns: int, style: _Style) -> tuple[str, str]:
    first, last = f"{points[0].step:,}", f"{points[-1].step:,}"
    middle = "training step"
    margin = " " * label_width
    axis = f"{margin} {style.corner}{style.x_axis * columns}"
    space = columns - len(first) - len(last)
    if space < 1:  # the last step is more useful than the first
        return axis, f"{margin}  {last:>{columns}}"
    text = middle.center(space) if space >= len(middle) + 2 else " " * space
    return axis, f"{margin}  {first}{text}{last}"

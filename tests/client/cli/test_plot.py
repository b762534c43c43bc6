from __future__ import annotations

import pytest

from ferryman import LearningRatePoint
from ferryman.cli.plot import draw_curve
from ferryman.testing import noam_learning_rate


def points(*rates: float) -> list[LearningRatePoint]:
    return [LearningRatePoint(step=step, learning_rate=rate) for step, rate in enumerate(rates, start=1)]


NOAM = [LearningRatePoint(step=step, learning_rate=noam_learning_rate(step)) for step in range(1, 50_001, 50)]


@pytest.mark.parametrize(("width", "height"), [(24, 2), (72, 16), (200, 40)])
def test_plot_has_requested_size(width, height):
    lines = draw_curve(NOAM, width, height).split("\n")
    assert len(lines) == height + 2
    assert {len(line) for line in lines[:height]} == {width}
    assert max(map(len, lines)) <= width


def test_rising_curve_goes_from_lower_left_to_upper_right():
    # 8 characters of label, 2 of axis, 14 of plot.
    plot = draw_curve(points(*(i / 15 for i in range(16))), width=24, height=4).split("\n")
    cells = [line.split("┤")[1] for line in plot[:4]]
    blank = chr(0x2800)
    assert cells[0][-1] != blank
    assert cells[3][0] != blank
    assert cells[0][:7].strip(blank) == ""
    assert cells[3][7:].strip(blank) == ""


def test_peak_is_at_end_of_warmup():
    width, height = 72, 16
    first_line = draw_curve(NOAM, width, height).split("\n")[0]
    cells = first_line.split("┤")[1]
    peak = next(i for i, cell in enumerate(cells) if cell != chr(0x2800))
    assert peak / len(cells) == pytest.approx(4000 / 50_000, abs=0.02)


def test_axes_show_peak_rate_and_steps():
    lines = draw_curve(NOAM, 72, 16).split("\n")
    assert lines[0].startswith("6.99e-04 ┤")
    assert lines[4].startswith("5.24e-04 ┤")
    assert lines[-1].split() == ["1", "training", "step", "49,951"]


def test_one_point_and_zero_curve_can_be_plotted():
    assert "┤" in draw_curve(points(0.5), 30, 3)
    assert "0.00e+00" not in draw_curve(points(0.0, 0.0), 30, 3).split("\n")[0]


def test_ascii_plot_is_ascii():
    plot = draw_curve(NOAM, 72, 16, ascii_only=True)
    assert plot.isascii()
    lines = plot.split("\n")
    assert {len(line) for line in lines[:16]} == {72}
    cells = [line.split("|")[1] for line in lines[:16]]
    assert cells[0].index("*") / len(cells[0]) == pytest.approx(4000 / 50_000, abs=0.02)


def test_largest_step_fits_narrowest_plot():
    curve = [LearningRatePoint(step=step, learning_rate=1.0) for step in (999_999_000, 1_000_000_000)]
    assert max(map(len, draw_curve(curve, 24, 2).split("\n"))) <= 24

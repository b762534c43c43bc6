"""The comparison of schedules under a limit of time, in small."""

import pytest

from bench import schedules
from bench.schedules import Row, recipe_of
from ferryman_service.domain.schedule import ScheduleKind


def test_rows_are_read_and_written_alike():
    for text in (*schedules.ROWS, *schedules.QUICK_ROWS):
        assert str(Row.parse(text)) == text
    with pytest.raises(ValueError, match="must be like"):
        Row.parse("news 5")


def test_only_the_schedule_differs():
    row = Row.parse("multi30k 5")
    wsd, noam = (recipe_of(row, kind) for kind in schedules.SCHEDULES)
    assert (wsd.schedule.kind, noam.schedule.kind) == (ScheduleKind.WSD, ScheduleKind.NOAM)
    assert wsd.model == noam.model and wsd.stop == noam.stop and wsd.optimization == noam.optimization
    assert wsd.stop.max_time_seconds == 300


@pytest.mark.system
def test_both_schedules_train_side_by_side(tmp_path):
    """Three seconds each: subwords, some updates, a decay that has ended for the one and not for the other."""
    found = schedules.run_side_by_side(Row(corpus="phrases", minutes=0.05, busy=False), tmp_path, (0, 0))
    assert set(found) == {"wsd", "noam"}
    assert found["wsd"]["last_rate_share"] < 0.2
    assert all(scores["steps"] >= 1 for scores in found.values())

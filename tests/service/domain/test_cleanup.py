"""Cleaning up: every step is tried."""

import logging

from ferryman_service.domain.cleanup import clean_up


def test_every_step_is_tried_whatever_the_others_raise(caplog):
    done = []

    def failing():
        done.append("failed")
        raise OSError("no space left")

    with caplog.at_level(logging.WARNING):
        clean_up(failing, lambda: done.append("removed"), failing, lambda: done.append("unlocked"))
    assert done == ["failed", "removed", "failed", "unlocked"]
    assert len(caplog.messages) == 2

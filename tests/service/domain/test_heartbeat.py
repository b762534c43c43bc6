"""Signs of life of a program that computes, waits, and waits without end."""

from ferryman_service.domain.heartbeat import Heartbeat


def test_only_a_wait_that_does_not_end_is_no_sign_of_life():
    heartbeat = Heartbeat()
    assert [heartbeat.is_alive() for _ in range(3)] == [True] * 3, "a long computation is alive"
    with heartbeat.waiting():
        assert [heartbeat.is_alive() for _ in range(3)] == [True, False, False]
    assert heartbeat.is_alive()
    for _ in range(3):
        with heartbeat.waiting():
            assert heartbeat.is_alive(), "another wait than at the last look: work goes on between them"

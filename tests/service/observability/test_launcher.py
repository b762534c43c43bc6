"""What /metrics tells of the starts of workers."""

from ferryman_service.observability.launcher import LaunchMetrics


def test_starts_by_outcome(registry, sample):
    metrics = LaunchMetrics(registry)
    outcomes = ("started", "failed_to_start")
    assert [sample("ferryman_launcher_attempts_total", outcome=outcome) for outcome in outcomes] == [0, 0]
    metrics.started()
    metrics.started()
    metrics.failed_to_start()
    assert [sample("ferryman_launcher_attempts_total", outcome=outcome) for outcome in outcomes] == [2, 1]

"""The corpus benchmark's limits: memory, and a second start that hardly depends on the number of pairs."""

import pytest

from bench.training import corpora


def start(first_update_s, peak_memory_mb=1000.0):
    return {"first_update_s": first_update_s, "peak_memory_mb": peak_memory_mb}


@pytest.mark.parametrize("machine", [1.0, 10.0])
def test_second_start_is_compared_with_small_corpus(machine):
    def result(second_s):
        starts = {"small": start(machine), "first": start(500 * machine), "second": start(second_s * machine)}
        return corpora.result_of(1000, 1.0, **starts)

    assert result(5.0).ok
    assert not result(5.1).ok
    assert result(5.1).details["second_ratio"] == 5.1


def test_larger_memory_peak_counts():
    found = corpora.result_of(1000, 1.0, small=start(1.0), first=start(9.0, 4096.0), second=start(1.0))
    assert (found.value, found.ok) == (0.5, False)

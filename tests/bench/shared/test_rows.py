"""Rows of a comparison."""

from bench.shared.rows import at_least, at_most, print_rows, reported


def test_ratio_above_upper_target_misses():
    assert at_most("latency", "ms", (0.8, 1.0), 0.8).ok
    assert not at_most("latency", "ms", (0.81, 1.0), 0.8).ok


def test_ratio_below_lower_target_misses():
    assert at_least("throughput", "subwords/s", (1.25, 1.0), 1.25).ok
    assert not at_least("throughput", "subwords/s", (1.24, 1.0), 1.25).ok


def test_absolute_target_ignores_peer():
    assert at_most("cold start", "s", (1.9, None), 2.0, relative=False).ok
    assert not at_most("cold start", "s", (2.1, None), 2.0, relative=False).ok
    assert not at_most("loss", "BLEU", (0.4, 9.0), 0.3, relative=False).ok


def test_reported_row_always_holds():
    row = reported("share", "share", (0.0, None))
    assert row.ok
    assert (row.as_dict()["ratio"], row.as_dict()["target_is"]) == (None, None)


def test_row_names_bounded_quantity():
    values = at_most("latency", "ms", (1.0, 2.0), 0.8).with_details(peer_batch=64).as_dict()
    assert (values["ratio"], values["target"], values["target_is"], values["ok"]) == (0.5, 0.8, "most ratio", True)
    assert values["peer_batch"] == 64
    assert at_least("x", "y", (1.0, 2.0), 1.25).as_dict()["target_is"] == "least ratio"


def test_table_marks_missed_rows(capsys):
    print_rows([at_most("fast", "ms", (1.0, 2.0), 0.8), at_most("slow", "ms", (2.0, 2.0), 0.8)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("missed") for line in lines if line.startswith(("fast", "slow"))] == [False, True]

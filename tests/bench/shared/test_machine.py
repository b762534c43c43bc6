"""Who else keeps the machine busy, from fake trees of /proc and for real."""

import subprocess
import sys
import time

import pytest

from bench.shared.machine import MachineWatch, busy_warning

OWN, CHILD, OTHER = 100, 101, 200
SPIN = "while True: pass"


class FakeProc:
    """A tree like /proc, of a machine with two processors that have worked 1,000 s."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "cpuinfo").write_text("processor : 0\nmodel name\t: A CPU (TM)\n")
        self.uptime_s, self.busy_s = 5000.0, 1000.0
        self.processes = {}
        self.add(1, "init", parent=0)
        self.add(OWN, "python3", parent=1)
        self.add(OTHER, "a (b) c", parent=1)
        self.write()

    def add(self, number, command, *, parent, started=1):
        self.processes[number] = {
            "command": command,
            "parent": parent,
            "started": started,
            "own_s": 0.0,
            "children_s": 0.0,
        }

    def spend(self, number, seconds, field="own_s"):
        self.processes[number][field] += seconds
        self.busy_s += seconds

    def write(self, seconds=0.0):
        self.uptime_s += seconds
        # user nice system idle iowait irq softirq steal guest guest_nice
        self.file("stat").write_text(f"cpu  {self.ticks(self.busy_s)} 0 0 99999 500 7000 8000 0 4444 0\ncpu0 1 2\n")
        self.file("uptime").write_text(f"{self.uptime_s} 1.0\n")
        self.file("loadavg").write_text("0.50 0.25 0.10 1/100 4242\n")
        for number, p in self.processes.items():
            (self.folder / str(number)).mkdir(exist_ok=True)
            fields = ["S", p["parent"], *[0] * 9, self.ticks(p["own_s"]), 0, self.ticks(p["children_s"]), 0]
            fields += [20, 0, 1, 0, p["started"], 0]
            self.file(f"{number}/stat").write_text(f"{number} ({p['command']}) {' '.join(map(str, fields))}\n")

    def end(self, number):
        del self.processes[number]
        self.file(f"{number}/stat").unlink()

    def file(self, name):
        return self.folder / name

    @staticmethod
    def ticks(seconds):
        return round(100 * seconds)


@pytest.fixture
def proc(tmp_path):
    return FakeProc(tmp_path)


@pytest.fixture
def watch(proc):
    return MachineWatch(proc.folder, OWN).read()


def test_time_of_another_process_is_foreign(proc, watch):
    proc.spend(OTHER, 4.0)
    proc.write(seconds=5.0)
    facts = watch.as_dict()
    assert facts["foreign_cpus"] == {"at_start": 0.8, "at_end": 0.8, "mean": 0.8, "most": 0.8}
    assert (facts["busy"], facts["busy_share"], facts["busiest_process"]) == (True, 1.0, "a (b) c")
    assert facts["cpu_model"] == "A CPU (TM)"
    assert facts["load_averages_at_start"] == {"1_min": 0.5, "5_min": 0.25}


def test_time_of_the_benchmark_and_its_children_is_not_foreign(proc, watch):
    proc.add(CHILD, "python3", parent=OWN)
    proc.spend(OWN, 4.0)
    proc.spend(CHILD, 3.0)
    proc.write(seconds=5.0)
    assert watch.as_dict()["foreign_cpus"]["most"] == 0.0
    assert watch.as_dict()["busy"] is False


def test_ended_child_is_not_foreign(proc, watch):
    proc.add(CHILD, "python3", parent=OWN)
    proc.spend(CHILD, 3.0)
    proc.write(seconds=5.0)
    watch.read()
    proc.spend(CHILD, 2.0)
    proc.end(CHILD)
    proc.processes[OWN]["children_s"] += 5.0
    proc.write(seconds=5.0)
    assert watch.as_dict()["foreign_cpus"]["most"] == 0.0


def test_orphan_of_benchmark_is_not_foreign(proc, watch):
    proc.add(CHILD, "python3", parent=OWN)
    proc.write(seconds=5.0)
    watch.read()
    proc.processes[CHILD]["parent"] = 1
    proc.spend(CHILD, 5.0)
    proc.write(seconds=5.0)
    assert watch.as_dict()["foreign_cpus"]["most"] == 0.0


def test_kernel_threads_are_not_foreign_and_another_process_of_their_number_is(proc, watch):
    proc.add(2, "kthreadd", parent=0)
    proc.add(3, "kworker/0", parent=2)
    proc.spend(3, 5.0)
    proc.write(seconds=5.0)
    assert watch.read().windows[-1].foreign_cpus == 0.0
    proc.processes[2]["command"] = "postgres"
    proc.spend(3, 5.0)
    proc.write(seconds=5.0)
    assert watch.read().windows[-1].foreign_cpus == pytest.approx(1.0)


def test_unreadable_process_counts_without_name(proc, watch):
    proc.busy_s += 5.0
    proc.write(seconds=5.0)
    facts = watch.as_dict()
    assert (facts["busy"], facts["busiest_process"]) == (True, None)
    assert "up to 1.0 processors; stop" in busy_warning(facts)


def test_short_disturbance_of_long_run_is_detected(proc, watch):
    for seconds in (5.0, *[0.0] * 9):
        proc.spend(OTHER, seconds)
        proc.write(seconds=5.0)
        watch.read()
    facts = watch.as_dict()
    assert (facts["busy"], facts["busy_share"], facts["foreign_cpus"]["mean"]) == (True, 0.1, 0.1)
    assert busy_warning(facts) == (
        "warning: the machine was busy for 10 % of the run: other processes took up to 1.0 processors, most of all "
        "'a (b) c'; stop them and run the benchmark again"
    )


def test_small_foreign_load_is_ignored(proc, watch):
    proc.spend(OTHER, 0.9)
    proc.write(seconds=5.0)
    facts = watch.as_dict()
    assert (facts["busy"], facts["busiest_process"], busy_warning(facts)) == (False, None, None)


def test_too_short_window_is_left_out(proc, watch):
    proc.write(seconds=5.0)
    watch.read()
    proc.spend(OTHER, 0.1)
    proc.write(seconds=0.1)
    assert watch.as_dict()["busy"] is False


def test_reused_pid_is_another_process(proc, watch):
    proc.add(CHILD, "python3", parent=OWN)
    proc.write(seconds=5.0)
    watch.read()
    proc.end(CHILD)
    proc.add(CHILD, "intruder", parent=1, started=7)
    proc.spend(CHILD, 5.0)
    proc.write(seconds=5.0)
    assert watch.as_dict()["busiest_process"] == "intruder"


def test_foreign_spinning_process_is_detected():
    """The one child spins for real; the watch of a sibling finds it foreign, that of this process does not."""
    with (
        subprocess.Popen([sys.executable, "-c", SPIN]) as spinning,
        subprocess.Popen(["sleep", "60"]) as sibling,
    ):
        try:
            ours, foreign = MachineWatch().read(), MachineWatch(own=sibling.pid).read()
            time.sleep(0.6)
            seen = foreign.read().windows[-1]
            own = ours.read().windows[-1]
        finally:
            spinning.kill()
            sibling.kill()
    assert seen.is_busy
    assert seen.busiest_cpus > 0.1
    assert seen.foreign_cpus - own.foreign_cpus > 0.1


def test_counters_are_read_during_block(proc):
    watch = MachineWatch(proc.folder, OWN)
    with watch.watching():
        assert len(watch.windows) == 1

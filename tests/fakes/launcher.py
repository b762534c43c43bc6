"""A launcher that starts nothing: tests say which workers live and how they ended."""

from __future__ import annotations


class FakeLauncher:
    """Implements ports.Launcher. `alive` holds (run_id, attempt); `fail_with` is raised by the next start; while
    `unkillable`, what was killed is not gone; `broken` runs cannot be looked at. Each look at a beat finds a new one,
    unless it is `stopped`."""

    def __init__(self):
        self.started = []
        self.killed = []
        self.workers_killed = []
        self.alive = set()
        self.broken = set()
        self.unkillable = False
        self.stopped = False
        self.beats = 0
        self.how = "exit status 1"
        self.fail_with = None

    def start(self, run_id, attempt, processes):
        if self.fail_with is not None:
            raise self.fail_with
        self.started.append((run_id, attempt))
        self.alive.add((run_id, attempt))

    def is_running(self, run_id, attempt, worker):
        if run_id in self.broken:
            raise KeyError("a bug")
        return (run_id, attempt) in self.alive

    def last_beat(self, run_id, attempt):
        self.beats += not self.stopped
        return self.beats

    def living(self):
        return set(self.alive)

    def kill(self, run_id, attempt, worker):
        if (run_id, attempt) in self.alive:
            self.killed.append((run_id, attempt))
            self.workers_killed.append(worker)
        if not self.unkillable:
            self.alive.discard((run_id, attempt))
        return not self.unkillable

    def exit_description(self, run_id, attempt):
        return self.how

    def log_tail(self, run_id, attempt):
        return f"last words of attempt {attempt}"

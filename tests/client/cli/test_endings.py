"""Every way in which the process of a command ends: its exit status, and nothing but messages on standard error."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import threading

import pytest

from examples.local_service import reserved_port

TIMEOUT_S = 120

# The tests may run in the background of a shell, which lets programs ignore SIGINT.
PYTHON = ["env", "--default-signal=INT", sys.executable]


def command(fake, *arguments):
    return [*PYTHON, "-m", "ferryman.cli", "--server", fake.target, *arguments]


def start(program, **streams):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(program, **pipes | streams)


def end(process):
    """Wait for the end without closing standard input; return the exit status and what was said."""
    status = process.wait(timeout=TIMEOUT_S)
    said = process.stderr.read().decode()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    return status, said


class Screen:
    """A process that has a terminal of its own for all streams."""

    def __init__(self, program):
        self.shown = b""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execvp(program[0], program)

    def type(self, keys):
        os.write(self._terminal, keys)

    def wait_for(self, text):
        while text not in self.shown:
            assert self._read(), self.shown

    def end(self):
        while self._read():
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self):
        assert select.select([self._terminal], [], [], TIMEOUT_S)[0], self.shown
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += data
        return bool(data)


@pytest.mark.parametrize(("keys", "status"), [(b"\x03", 130), (b"\x04", 0)])
def test_ctrl_c_and_ctrl_d_end_translation_at_terminal(fake, keys, status):
    fake.add_model("m")
    fake.translate = lambda sentence: f"{sentence.upper()}\x1b[2J"
    screen = Screen(command(fake, "translate", "m"))
    screen.type(b"eins\r")
    screen.wait_for(rb"EINS\x1b[2J")
    screen.type(keys)
    assert screen.end() == status
    assert b"Traceback" not in screen.shown
    assert b"Fatal" not in screen.shown


def test_error_ends_translation_with_open_stdin(fake):
    assert end(start(command(fake, "translate", "nope"))) == (2, "Error: model 'nope' not found\n")


def test_unreachable_server_ends_translation_with_open_stdin():
    with reserved_port() as port:
        status, said = end(start([*PYTHON, "-m", "ferryman.cli", "--server", f"127.0.0.1:{port}", "translate", "m"]))
    assert status == 1
    assert said.startswith("Error: ")
    assert said.count("\n") == 1


def test_sigint_ends_translation_of_a_file(fake):
    fake.add_model("m")
    process = start(command(fake, "translate", "m"))
    lines = threading.Thread(target=_write, args=(process.stdin, b"zeile\n" * 300_000))
    lines.start()
    assert process.stdout.readline() == b"ZEILE\n"
    process.send_signal(signal.SIGINT)
    ended = end(process)
    lines.join()
    assert ended == (130, "")


def _write(stream, data):
    with contextlib.suppress(BrokenPipeError):
        stream.write(data)
        stream.flush()


def test_closed_pipe_ends_translation_silently(fake):
    fake.add_model("m")
    process = start(command(fake, "translate", "m"))
    process.stdin.write(b"eins\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"EINS\n"
    process.stdout.close()
    process.stdin.write(b"zwei\n")
    process.stdin.flush()
    assert end(process) == (0, "")


@pytest.mark.parametrize("arguments", [["corpus", "list"], ["watch", "RUN"], ["--help"]], ids=" ".join)
def test_closed_pipe_is_not_an_error(fake, client, corpus, arguments):
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    reader, writer = os.pipe()
    os.close(reader)
    process = start(command(fake, *(run_id if word == "RUN" else word for word in arguments)), stdout=writer)
    os.close(writer)
    assert end(process) == (0, "")


def test_closed_stdin_and_full_disk_are_usage_errors(fake):
    fake.add_model("m")
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command(fake, "translate", "m")]
    message = "Error: standard input: closed; pass the sentences as arguments or redirect a file\n"
    assert end(start(closed)) == (2, message)
    with open("/dev/full", "wb") as full:
        status, said = end(start(command(fake, "models", "list"), stdout=full))
    assert (status, said) == (2, "Error: No space left on device\n")


def test_closed_stdout_descriptor_is_not_reused(fake):
    fake.add_model("m")
    assert end(start(["sh", "-c", 'exec "$@" >&-', "sh", *command(fake, "models", "list")])) == (0, "")


def test_ctrl_c_ends_command_that_hangs():
    """As gRPC if it is interrupted where it holds a lock that closing the connection waits for."""
    program = """if True:
        import threading
        from ferryman.cli.ending import run_process
        def command():
            try:
                print("ready", flush=True)
                threading.Event().wait()
            finally:
                threading.Event().wait()
        run_process(command)
    """
    process = start([*PYTHON, "-c", program])
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "")

"""Training, exporting and translating look no name up and call no other machine."""

import re
import subprocess
import time

import pytest

from ferryman.v1 import metrics_pb2, translation_pb2
from tests.ops.conftest import need_program
from tests.system.conftest import Stubs, small_recipe
from tests.system.service_process import ServiceProcess

pytestmark = pytest.mark.ops

ADDRESS = re.compile(r'sa_family=AF_INET6?, .*?port=htons\((\d+)\).*?(?:inet_addr\(|AF_INET6, )"([^"]*)"')
"""Port and address of a socket address as strace(1) writes it."""
TELEMETRY_S = 15
"""ONNX Runtime, left alone, sends its first report some seconds after the first use."""


def foreign(trace):
    """The addresses of other machines, and of any name server, that the traced programs have turned to."""
    found = {(address, int(port)) for port, address in ADDRESS.findall(trace)}
    return {
        (address, port)
        for address, port in found
        if port == 53 or not (address.startswith("127.") or address in ("::1", "::", "0.0.0.0", "::ffff:127.0.0.1"))
    }


def test_strace_sees_a_foreign_host(tmp_path):
    """The test below can fail."""
    strace = need_program("strace", "strace")
    look_up = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))"
    trace = tmp_path / "trace"
    subprocess.run(
        [strace, "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", trace, "python3", "-c", look_up],
        check=False,
    )
    assert foreign(trace.read_text()) == {("192.0.2.1", 53)}


def test_service_and_workers_turn_to_no_foreign_host(tmp_path):
    strace = need_program("strace", "strace")
    trace, home = tmp_path / "trace", tmp_path / "home"
    home.mkdir()
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    # -D: what was started is the service itself, and strace is its child.
    wrapper = (strace, "-D", "-f", "--seccomp-bpf", "-qq", "-e", calls, "-o", str(trace))
    service = ServiceProcess(tmp_path / "data", wrapper=wrapper, home=home)
    try:
        stubs = Stubs(service.address)
        run = stubs.start(stubs.upload().corpus_id, small_recipe(max_steps=30))
        *_, last = stubs.stream(run.run_id, timeout_s=300)
        assert last.state_change.state == metrics_pb2.RUN_STATE_SUCCEEDED
        stubs.translation.Translate(translation_pb2.TranslateRequest(model="reversal", sentences=["ba ce"]))
        time.sleep(TELEMETRY_S)
    finally:
        service.stop()
    text = trace.read_text()
    assert "127.0.0.1" in text or "::1" in text, "the trace holds the calls of torchrun and its worker"
    assert foreign(text) == set()
    assert list(home.rglob("*")) == []

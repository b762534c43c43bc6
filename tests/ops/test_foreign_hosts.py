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

STRACE = ("-f", "-qq", "-s", "256", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o")
ADDRESS = re.compile(r'sa_family=AF_INET6?, .*?port=htons\((\d+)\).*?(?:inet_addr\(|AF_INET6, )"([^"]*)"')
"""Port and address of a socket address as strace(1) writes it."""
QUERY = re.compile(r'"(?:\\[0-7]{1,3}|\\.|[^\\]){2}\\1(?:\\0| )\\0\\1(?:\\0){4}[^"]*"')
"""A DNS query (RFC 1035, section 4.1.1): any id, recursion desired, one question, no answer."""
LOOPBACK = ("127.", "::1", "::ffff:127.", "0.0.0.0")
TELEMETRY_S = 15
"""ONNX Runtime, left alone, looks its maker's host up at its first use, and again some seconds later."""


def foreign(trace):
    """What the traced programs have asked name servers for, and the addresses of other machines they have turned to."""
    queries = set(QUERY.findall(trace))
    addresses = {address for port, address in ADDRESS.findall(trace) if port not in ("0", "53")}
    return queries | {address for address in addresses if address != "::" and not address.startswith(LOOPBACK)}


def test_strace_sees_names_and_addresses(tmp_path):
    """The test below can fail."""
    strace = need_program("strace", "strace")
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    look_up = f"{code}; socket.getaddrinfo('no-such-host.invalid', 80)"
    trace = tmp_path / "trace"
    subprocess.run([strace, *STRACE, trace, "python3", "-c", look_up], check=False, capture_output=True)
    found = foreign(trace.read_text())
    assert "192.0.2.1" in found
    assert any("no-such-host" in each for each in found)


def test_service_and_workers_turn_to_no_foreign_host(tmp_path):
    strace = need_program("strace", "strace")
    trace, home = tmp_path / "trace", tmp_path / "home"
    home.mkdir()
    # -D: what was started is the service itself, and strace is its child.
    wrapper = (strace, "-D", "--seccomp-bpf", *STRACE, str(trace))
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
    assert "sendto(" in text or "sendmsg(" in text, "the trace holds the calls of the service"
    assert foreign(text) == set()
    assert list(home.rglob("*")) == []

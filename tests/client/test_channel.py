"""What both clients have by default: deadlines, balancing, repeating, keepalive, and servers that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grpc._cython import cygrpc

from ferryman import AsyncClient, Client, errors
from ferryman._channel import channel_options
from ferryman.testing import FakeFerryman, training_script
from ferryman_service.rpc.server import RpcConfig
from tests.fakes.dns_server import FakeDnsServer

_SERVER_PROGRAM = """
import sys, time
from ferryman.testing import FakeFerryman

def slow(sentence):
    time.sleep(0.02)
    return sys.argv[1]

fake = FakeFerryman(translate=slow)
fake.start()
fake.add_model("m")
print(fake.target, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def replicas(count: int, **options: object) -> Iterator[list[FakeFerryman]]:
    """Fakes that say who they are: each translates everything as its number."""
    with contextlib.ExitStack() as stack:
        fakes = [FakeFerryman(translate=lambda _, i=i: str(i), **options) for i in range(count)]
        for fake in fakes:
            stack.enter_context(fake)
            fake.add_model("m")
        yield fakes


def all_of(fakes: list[FakeFerryman]) -> str:
    return "ipv4:" + ",".join(fake.target for fake in fakes)


def who_answers(client: Client, calls: int) -> Counter[str]:
    return Counter(client.translate("m", "x").translations[0].text for _ in range(calls))


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


# --- Balancing --------------------------------------------------------------------------------------------------------


def test_calls_are_balanced_over_reachable_servers():
    with replicas(3) as fakes, Client(all_of(fakes)) as client:
        wait_until(lambda: len(who_answers(client, 6)) == 3)
        assert who_answers(client, 30) == {"0": 10, "1": 10, "2": 10}
        fakes[1].stop()
        assert who_answers(client, 30).keys() == {"0", "2"}
        fakes[1].start()
        wait_until(lambda: len(who_answers(client, 6)) == 3)


async def test_async_calls_are_balanced():
    with replicas(2) as fakes:
        async with AsyncClient(all_of(fakes)) as client:
            found: Counter[str] = Counter()
            deadline_s = time.monotonic() + 10
            while min(found["0"], found["1"]) < 5:
                assert time.monotonic() < deadline_s, found
                found[(await client.translate("m", "x")).translations[0].text] += 1


def test_name_with_several_addresses_is_balanced():
    """Two replicas on the same port of two addresses; later the name leads to a third one, and to no other."""
    with FakeFerryman(translate=lambda _: "1") as first:
        port = int(first.target.rpartition(":")[2])
        others = [FakeFerryman(translate=lambda _, i=i: str(i), host=f"127.0.0.{i}", port=port) for i in (2, 3)]
        for fake in [first, *others]:
            fake.add_model("m")
        with (
            others[0],
            others[1],
            FakeDnsServer(["127.0.0.1", "127.0.0.2"]) as dns,
            Client(f"dns://{dns.authority}/ferryman-headless.test:{port}") as client,
        ):
            wait_until(lambda: len(who_answers(client, 6)) == 2)
            assert who_answers(client, 20) == {"1": 10, "2": 10}
            dns.addresses = ["127.0.0.3"]
            first.stop()
            wait_until(lambda: who_answers(client, 6).keys() == {"3"})


# --- Repeating --------------------------------------------------------------------------------------------------------


def test_killed_server_fails_no_call():
    """SIGKILL of one of two server processes with twenty callers on them: every Translate is answered."""
    command = [sys.executable, "-c", _SERVER_PROGRAM]
    servers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    try:
        targets = [server.stdout.readline().strip() for server in servers]
        with Client("ipv4:" + ",".join(targets)) as client:
            wait_until(lambda: len(who_answers(client, 6)) == 2)
            found: list[str] = []
            failures: list[Exception] = []

            def call_often() -> None:
                try:
                    for _ in range(40):
                        found.append(client.translate("m", "x").translations[0].text)
                except errors.FerrymanError as error:
                    failures.append(error)

            callers = [threading.Thread(target=call_often) for _ in range(20)]
            for caller in callers:
                caller.start()
            wait_until(lambda: found.count("0") > 20)
            servers[0].kill()
            for caller in callers:
                caller.join()
        assert failures == []
        assert len(found) == 20 * 40
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def test_large_requests_are_retried(fake, client):
    fake.add_model("m")
    fake.fail_next("Translate", errors.Unavailable("not now"), times=2)
    sentence = "x" * 3_000_000
    assert client.translate("m", sentence).translations[0].text == sentence.upper()
    assert fake.calls == ["Translate"] * 3


def test_non_idempotent_calls_are_not_retried(fake, client):
    for call, name in (
        (client.delete_training_run, "DeleteTrainingRun"),
        (client.delete_corpus, "DeleteCorpus"),
        (client.delete_model_version, "DeleteModelVersion"),
        (client.unload_model, "UnloadModel"),
    ):
        fake.fail_next(name, errors.Unavailable("not now"))
        with pytest.raises(errors.Unavailable):
            call("x/1")
    assert fake.calls == ["DeleteTrainingRun", "DeleteCorpus", "DeleteModelVersion", "UnloadModel"]


async def test_retry_throttling_limits_calls_to_a_dead_service(fake):
    """Throttling: after 500 failed attempts of a connection a call is made once."""
    fake.fail_next("Translate", errors.Unavailable("down"), times=100_000)
    async with AsyncClient(fake.target) as client:
        await fail_often(client, 200)
        fake.calls.clear()
        await fail_often(client, 50)
    assert fake.calls == ["Translate"] * 50


async def fail_often(client: AsyncClient, count: int) -> None:
    outcomes = await asyncio.gather(*(client.translate("m", "x") for _ in range(count)), return_exceptions=True)
    assert all(isinstance(outcome, errors.Unavailable) for outcome in outcomes)


# --- Deadlines --------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_hanging_server_ends_in_client_deadline(silent_server):
    began_s = time.monotonic()
    with Client(silent_server, timeout_s=0.3) as client, pytest.raises(errors.DeadlineExceeded) as caught:
        client.get_training_run("run_x")
    assert 0.3 <= time.monotonic() - began_s < 5
    assert caught.value.code.name == "DEADLINE_EXCEEDED"


async def test_hanging_server_ends_in_async_client_deadline(silent_server):
    async with AsyncClient(silent_server, timeout_s=0.3) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.translate("m", "x")


def test_every_call_has_a_default_deadline(silent_server):
    """Uploads, downloads and streams excepted, which may take as long as they do and have keepalive."""
    with Client(silent_server) as client:
        assert client._timeout_s == 60
    unary = [
        lambda c: c.start_training("cor_x", "m"),
        lambda c: c.list_checkpoints("run_x"),
        lambda c: next(c.list_models()),
        lambda c: c.get_corpus("cor_x"),
        lambda c: c.get_lr_schedule(run_id="run_x"),
        lambda c: c.load_model("m"),
        lambda c: c.translate("m", "x"),
    ]
    with Client(silent_server, timeout_s=0.05) as client:
        for call in unary:
            with pytest.raises(errors.DeadlineExceeded):
                call(client)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e10])
def test_invalid_deadline_is_refused(timeout_s):
    with pytest.raises(ValueError, match="must be a number of seconds over 0 and at most 1,000,000,000"):
        Client("localhost:1", timeout_s=timeout_s)
    with pytest.raises(ValueError, match="must be a number of seconds over 0 and at most 1,000,000,000"):
        AsyncClient("localhost:1", timeout_s=timeout_s)


def test_longest_deadline_is_accepted(fake):
    with Client(fake.target, timeout_s=1e9) as client:
        assert list(client.list_models()) == []


# --- Connections ------------------------------------------------------------------------------------------------------


def test_caller_options_override_defaults():
    options = dict(channel_options([("grpc.keepalive_time_ms", 5), ("grpc.mine", 1)]))
    assert (options["grpc.keepalive_time_ms"], options["grpc.mine"]) == (5, 1)
    names = [name for name, _ in channel_options([("grpc.keepalive_time_ms", 5)])]
    assert names.count("grpc.keepalive_time_ms") == 1


NO_SERVER = (
    r"cannot reach a service at 127\.0\.0\.1:1 \(connection refused\); start one with `ferryman-service serve`, or pass"
)


async def test_unreachable_server_error_says_what_to_do():
    with Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable, match=NO_SERVER) as caught:
        client.get_corpus("cor_x")
    assert caught.value.metadata == {"target": "127.0.0.1:1", "cause": "connection refused"}
    with Client("127.0.0.1:1") as client, pytest.raises(errors.Unavailable, match=NO_SERVER):
        next(client.translate_stream("m", ["x"]))
    async with AsyncClient("127.0.0.1:1") as async_client:
        with pytest.raises(errors.Unavailable, match=NO_SERVER):
            await async_client.get_corpus("cor_x")


def test_deadline_error_names_the_server(silent_server):
    with (
        Client(silent_server, timeout_s=0.1) as client,
        pytest.raises(errors.DeadlineExceeded, match=f"{silent_server} did not answer before the deadline"),
    ):
        client.get_corpus("cor_x")


async def test_loopback_target_bypasses_proxy(fake, monkeypatch):
    """The proxy that the environment names does not exist: whoever asks it gets no answer."""
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    port = fake.target.rpartition(":")[2]
    for target in (fake.target, f"localhost:{port}", f"dns:///localhost:{port}", f"ipv4:127.0.0.1:{port}"):
        with Client(target) as client:
            assert list(client.list_models()) == []
        async with AsyncClient(target) as async_client:
            assert [model async for model in async_client.list_models()] == []


@pytest.mark.parametrize(
    "target", ["10.0.0.1:5", "dns:///ferryman:5", "ipv4:127.0.0.1:5,10.0.0.1:5", "localhost.example:5"]
)
def test_remote_target_may_use_proxy(target):
    assert "grpc.enable_http_proxy" not in dict(channel_options((), target))


def test_every_channel_option_exists_in_grpc():
    """gRPC says nothing of an option that it does not know, and a misspelt one has no effect."""
    library = Path(cygrpc.__file__).read_bytes()
    names = [
        name for name, _ in [*channel_options((), "localhost:1"), *RpcConfig().options(), *FakeFerryman()._options]
    ]
    assert [name for name in names if f"{name}\0".encode() not in library] == []


def test_ping_interval_respects_service_limit():
    client, server = dict(channel_options(())), dict(RpcConfig().options())
    assert client["grpc.keepalive_time_ms"] >= 2 * server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.per_rpc_retry_buffer_size"] >= server["grpc.max_receive_message_length"]
    assert client["grpc.max_receive_message_length"] >= server["grpc.max_send_message_length"]


def test_quiet_call_is_pinged_without_goaway():
    """Client's and service's intervals, thirty times as fast: no GOAWAY (too_many_pings) cuts the call."""
    keepalive_s = dict(channel_options(()))["grpc.keepalive_time_ms"] / 1000 / 30
    allowed_ms = dict(RpcConfig().options())["grpc.http2.min_ping_interval_without_data_ms"] // 30
    server_options = [("grpc.http2.min_ping_interval_without_data_ms", allowed_ms)]

    def quiet(sentence: str) -> str:
        time.sleep(6.5 * keepalive_s)  # one ping more than a server takes that does not allow them
        return sentence

    with FakeFerryman(translate=quiet, options=server_options) as fake:
        fake.add_model("m")
        options = [("grpc.keepalive_time_ms", int(keepalive_s * 1000)), ("grpc.enable_retries", 0)]
        with Client(fake.target, options=options) as client:
            assert client.translate("m", "x").translations[0].text == "x"
        assert fake.calls == ["Translate"]


class FreezingProxy:
    """Passes bytes on, until it is frozen: then the connections that it has are dead without a goodbye."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._backend = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._frozen: list[threading.Event] = []
        self.target = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        for frozen in self._frozen:
            frozen.set()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._backend)
                frozen = threading.Event()
                self._frozen.append(frozen)
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(*pair, frozen), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, frozen: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if frozen.is_set():
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_stream_resumes_after_silent_connection_loss(fake):
    fake.hold_after = 4
    proxy = FreezingProxy(fake.target)
    names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    options = [(name, dict(channel_options(()))[name] // 30) for name in names]
    with contextlib.closing(proxy), Client(proxy.target, options=options) as client:
        corpus = client.upload_corpus("toy", "en", "de", train=[("a", "b")], validation=[("c", "d")])
        run_id = client.start_training(corpus.corpus_id, "m").run_id
        sequences = []
        began_s = time.monotonic()
        for record in client.stream_metrics(run_id):
            sequences.append(record.sequence)
            if record.sequence == 4:
                proxy.freeze()
                fake.release(run_id)
    assert sequences == list(range(1, 11))
    assert time.monotonic() - began_s < 20, "a thirtieth of 40 s, and some for a busy machine"


AGED = (
    ("grpc.max_connection_age_ms", 200),
    ("grpc.max_connection_age_grace_ms", 100),
)


def upload_until_it_arrives(client: Client) -> str:
    """Return the corpus' id. An upload that a connection's end cuts is the caller's to repeat."""
    request_id = str(uuid.uuid4())
    while True:
        with contextlib.suppress(errors.Unavailable):
            corpus = client.upload_corpus(
                "toy", "en", "de", train=[("a", "b")], validation=[("c", "d")], request_id=request_id
            )
            return corpus.corpus_id


def test_connection_age_is_invisible():
    """Connections end every 0.3 s: a stream of metrics, a long translate_stream and many calls do not notice."""
    script = training_script(steps=300)
    with FakeFerryman(script=script, hold_after=150, options=AGED) as fake, Client(fake.target) as client:
        fake.add_model("m")
        run_id = client.start_training(upload_until_it_arrives(client), "m").run_id
        sequences: list[int] = []

        def watch() -> None:
            sequences.extend(record.sequence for record in client.stream_metrics(run_id))

        def slowly() -> Iterator[str]:
            for number in range(100):
                time.sleep(0.01)
                yield str(number)

        watching = threading.Thread(target=watch)
        watching.start()
        results = [result.translation.text for result in client.translate_stream("m", slowly(), in_order=True)]
        for number in itertools.count():
            assert client.translate("m", "x").translations[0].text == "X"
            if number > 200 and fake.calls.count("StreamMetrics") >= 4:
                break
            time.sleep(0.005)
        fake.release(run_id)
        watching.join(timeout=20)
        assert results == [str(number) for number in range(100)]
        assert fake.calls.count("StreamTranslate") >= 3
        assert sequences == list(range(1, len(script) + 1))

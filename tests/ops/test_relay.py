"""The example metrics-relay: its own tests, and a real browser that watches a real run through it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.demo import phrases_task
from ferryman import Client, StopRecipe
from ferryman.v1 import training_pb2
from tests.docs.markdown import marked
from tests.ops.conftest import need_program, run
from tests.system.conftest import Stubs, small_recipe
from tests.system.service_process import ServiceProcess

pytestmark = pytest.mark.ops

ROOT = Path(__file__).parents[2]
RELAY = ROOT / "examples" / "metrics-relay"
IMAGES = ROOT / "docs" / "images"
PICTURES_VARIABLE = "FERRYMAN_PICTURES"
"""If it is set, the pictures of the documentation are taken anew, which takes some minutes."""


@pytest.fixture(scope="module")
def built_relay() -> Path:
    """The folder of the relay, installed from its lock file and built."""
    need_program("npm", "npm")
    installed = RELAY / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (RELAY / "package-lock.json").stat().st_mtime:
        run(["npm", "ci"], cwd=RELAY)
    run(["npm", "run", "build"], cwd=RELAY)
    return RELAY


def test_its_own_tests(built_relay):
    printed = run(["npm", "test"], cwd=built_relay)
    assert re.search(r"^# fail 0$", printed, re.MULTILINE), printed
    assert int(re.search(r"^# pass (\d+)$", printed, re.MULTILINE).group(1)) >= 34


def test_the_lock_file_names_no_host():
    lock = json.loads((RELAY / "package-lock.json").read_text())
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
    assert all("integrity" in package for name, package in lock["packages"].items() if name)


def test_wrong_flags_are_said(built_relay):
    ended = subprocess.run(
        ["node", "dist/main.js", "--port", "x"], cwd=built_relay, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "--port is x, must be 0 to 65535" in ended.stderr
    assert "usage:" in ended.stderr


def test_the_readme_says_how_it_is_started(built_relay):
    [commands] = re.findall(r"^```\n(npm .*?)```$", (RELAY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert commands.splitlines() == ["npm ci && npm run build", "npm start"]


def test_typescript_of_the_clients_page_follows_a_run_across_a_restart(built_relay, tmp_path):
    """The page's block is the program; the service that it follows a run of is killed and started again meanwhile."""
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    for name in ("node_modules", "package.json", "tsconfig.json"):
        (tmp_path / name).symlink_to(built_relay / name)
    generate, follow = marked("docs/clients.md", "run by", "ops")
    assert (generate.language, follow.language) == ("shell", "ts")
    tools = built_relay / "node_modules" / ".bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", generate.text], cwd=tmp_path, env=environment, check=True)
    (tmp_path / "src").mkdir()
    (tmp_path / "gen").rename(tmp_path / "src" / "gen")
    with contextlib.ExitStack() as world:
        service = start_service(world, tmp_path / "data")
        stubs = Stubs(service.address)
        run_id = stubs.start(stubs.upload().corpus_id, small_recipe(max_steps=300)).run_id
        program = follow.text.replace("localhost:50051", service.address)
        (tmp_path / "src" / "follow.ts").write_text(program)
        run([tools / "tsc", "--project", tmp_path / "tsconfig.json", "--preserveSymlinks"], cwd=tmp_path)
        bundle = ("--bundle", "--platform=node", "--format=esm", "--packages=external", "--outfile=follow.mjs")
        run([tools / "esbuild", "src/follow.ts", *bundle], cwd=tmp_path)
        command = ["node", "follow.mjs", run_id]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as following:
            lines = [following.stdout.readline() for _ in range(5)]
            service.kill()
            start_service(world, tmp_path / "data", service.port)
            lines += following.stdout.readlines()
        assert following.returncode == 0
        records = list(stubs.stream(run_id))
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == [record.sequence for record in records] == list(range(1, len(records) + 1))
    assert lines[-1].split()[1] == "stateChange"


class Relay:
    """The relay's program."""

    def __init__(self, service: str, port: int = 0) -> None:
        command = ["node", "dist/main.js", "--service", service, "--port", str(port)]
        self._process = subprocess.Popen(command, cwd=RELAY, stdout=subprocess.PIPE, text=True)
        line = self._process.stdout.readline()
        self.url = re.search(r"http://\S+", line).group()
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        """End it, if that has not been done; return its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(timeout=10)
        self._process.stdout.close()
        return status


class Browser:
    """A page in Chromium; `seen` is what it last showed."""

    def __init__(self, url: str) -> None:
        chromium = need_program("chromium", "chromium")
        self._process = subprocess.Popen(
            ["node", "browser/drive.mjs", chromium, url], cwd=RELAY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.seen: dict[str, Any] = {}

    def do(self, **command: object) -> None:
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        # What is shown after the command, not what was on its way before.
        for _ in range(2):
            self._look(time.monotonic() + 20)

    def wait(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 90) -> dict[str, Any]:
        """Return what the page shows as soon as the condition holds."""
        deadline_s = time.monotonic() + seconds
        while not (self._look(deadline_s) and condition(self.seen)):
            pass
        assert self.seen["errors"] == []
        return self.seen

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        finally:
            self._process.kill()
            self._process.stdout.close()

    def _look(self, deadline_s: float) -> bool:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0 and select.select([self._process.stdout], [], [], left_s)[0], f"the page shows {self.seen}"
        line = self._process.stdout.readline()
        assert line, f"the browser has ended: {self._process.wait(timeout=10)}"
        self.seen = json.loads(line)
        return True


@pytest.fixture
def world(built_relay, tmp_path) -> Iterator[contextlib.ExitStack]:
    """Ends what a test has started, whatever becomes of it."""
    with contextlib.ExitStack() as stack:
        yield stack


def start_service(world: contextlib.ExitStack, data_dir: Path, port: int = 0) -> ServiceProcess:
    service = ServiceProcess(data_dir, port=port)
    world.callback(service.stop)
    return service


def start_relay(world: contextlib.ExitStack, address: str, port: int = 0) -> Relay:
    relay = Relay(address, port)
    world.callback(relay.stop)
    return relay


def open_browser(world: contextlib.ExitStack, url: str) -> Browser:
    browser = Browser(url)
    world.callback(browser.close)
    return browser


def test_a_browser_watches_runs_through_restarts_to_their_ends(world, tmp_path):
    service = start_service(world, tmp_path / "data")
    stubs = Stubs(service.address)
    corpus_id = stubs.upload().corpus_id
    run_id = stubs.start(corpus_id, small_recipe(max_steps=1_000_000)).run_id  # goes on until it is cancelled
    short_run_id = stubs.start(corpus_id, small_recipe(max_steps=60)).run_id  # waits for it
    relay = start_relay(world, service.address)
    browser = open_browser(world, f"{relay.url}/runs/{run_id}")

    # The curve grows while the run trains.
    first = browser.wait(lambda page: page["state"] == "running" and page["points"] >= 12)
    assert (first["link"], first["notice"], first["model"]) == ("live", "", "reversal")
    grown = browser.wait(lambda page: page["points"] >= first["points"] + 20)
    assert grown["drawn"]["loss"] > first["drawn"]["loss"] >= 10
    assert int(grown["tiles"]["step"].replace(",", "")) == grown["points"], "each step once"

    # The relay goes away and comes back.
    assert relay.stop() == 0
    gone = browser.wait(lambda page: page["link"] == "waiting")
    assert gone["notice"].startswith("The relay cannot be reached.")
    relay = start_relay(world, service.address, relay.port)
    back = browser.wait(lambda page: page["link"] == "live" and page["points"] >= gone["points"] + 20)
    assert (back["notice"], back["tiles"]["step"]) == ("", f"{back['points']:,}")

    # The service goes away and comes back; its worker trains on meanwhile.
    service.kill()
    gone = browser.wait(lambda page: page["link"] == "waiting")
    assert gone["notice"].startswith("The Ferryman service cannot be reached")
    service = start_service(world, tmp_path / "data", service.port)
    back = browser.wait(lambda page: page["link"] == "live" and page["points"] >= gone["points"] + 20)
    assert (back["notice"], back["tiles"]["step"]) == ("", f"{back['points']:,}")

    # It ends as the run does; a page that is opened later shows the same.
    stubs = Stubs(service.address)
    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run_id))
    ended = browser.wait(lambda page: page["link"] == "closed")
    assert (ended["state"], ended["notice"], ended["remarks"][0]) == ("cancelled", "", "cancelled")
    assert {"queued", "running", "TRAINING_STARTED"} <= set(ended["remarks"])
    assert ended["points"] == stubs.run(run_id).progress.step
    # The cancellation may come between a step and the validation after it.
    assert ended["scores"] in {ended["points"] // 30, (ended["points"] - 1) // 30}
    browser.do(reload=True)
    again = browser.wait(lambda page: page["link"] == "closed")
    assert (again["points"], again["remarks"]) == (ended["points"], ended["remarks"])

    # A run that succeeds.
    browser.do(open=f"{relay.url}/runs/{short_run_id}")
    published = browser.wait(lambda page: page["link"] == "closed")
    assert (published["state"], published["model"]) == ("succeeded", "reversal/1")
    assert (published["points"], published["scores"], published["progress"]) == (60, 2, "100 %")
    assert float(published["tiles"]["best BLEU"]) >= 0

    # The list of runs, and a run that is not there.
    browser.do(open=relay.url)
    lines = browser.wait(lambda page: page["runs"])["runs"]
    assert ["cancelled" in line for line in lines] == [False, True]
    assert "reversal/1succeeded" in lines[0]
    browser.do(open=f"{relay.url}/runs/run_unknown")
    missing = browser.wait(lambda page: page["link"] == "closed")
    assert missing["notice"].startswith("There is no run run_unknown.")
    if os.environ.get(PICTURES_VARIABLE):
        save_pictures(browser, relay, service)


def save_pictures(browser: Browser, relay: Relay, service: ServiceProcess) -> None:
    """Write the pictures of the documentation: a run like the demo's, but shorter, when it is most of the way."""
    task = phrases_task(minutes=1)
    recipe = replace(
        task.recipe,
        schedule=replace(task.recipe.schedule, warmup_steps=100),
        stop=StopRecipe(max_steps=600),
        validation=replace(task.recipe.validation, interval_steps=60),
    )
    with Client(service.address) as client:
        run_id = client.start_training(task.upload(client), task.model_name, recipe).run_id
        browser.do(open=f"{relay.url}/runs/{run_id}")
        browser.wait(lambda page: re.match(r"[89]\d %", page["progress"]), seconds=600)
        IMAGES.mkdir(exist_ok=True)
        for name, scheme in (("metrics-relay.png", "light"), ("metrics-relay-dark.png", "dark")):
            browser.do(screenshot=str(IMAGES / name), scheme=scheme)
            assert (IMAGES / name).stat().st_size < 200_000
        client.cancel_training(run_id)
        client.wait(run_id)


def test_the_page_says_that_the_service_was_never_there(world):
    relay = start_relay(world, "127.0.0.1:1")
    browser = open_browser(world, f"{relay.url}/runs/run_x")
    notice = browser.wait(lambda page: page["notice"])["notice"]
    assert notice.startswith("The Ferryman service cannot be reached")

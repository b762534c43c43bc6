"""Text from elsewhere is printed as text, by every command, at a terminal and for another program."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from ferryman import EventLevel, RunEvent, RunState, StateChange, errors
from ferryman.cli.app import app
from ferryman.cli.output import printable
from ferryman.testing import training_script

HOSTILE = "news [/data/x] [en-de] \x1b]0;title\x07\x1b[2J\x9b31m\ttab\nline\r\u2028end"
SHOWN = r"news [/data/x] [en-de] \x1b]0;title\x07\x1b[2J\x9b31m\ttab\nline\r\u2028end"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028]")
STYLE = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\r?\x1b\[[12][AK]|\r")
"""What rich itself writes: colours, the cursor, and the progress bar over itself."""

FILES = ("--train", os.devnull, os.devnull, "--validation", os.devnull, os.devnull)
COMMANDS = {
    "corpus upload": (HOSTILE, "--source", "en", "--target", "de", *FILES),
    "corpus list": (),
    "corpus show": ("CORPUS",),
    "corpus delete": ("CORPUS",),
    "schedule": ("--run", "RUN"),
    "train": ("CORPUS", "m", "--watch"),
    "watch": ("RUN",),
    "runs list": (),
    "runs show": ("RUN",),
    "runs events": ("RUN",),
    "runs checkpoints": ("RUN",),
    "runs cancel": ("RUN",),
    "runs pause": ("RUN",),
    "runs resume": ("RUN",),
    "runs delete": ("RUN",),
    "models list": (),
    "models show": ("m",),
    "models alias": ("m", HOSTILE, "1"),
    "models load": ("m",),
    "models unload": ("m",),
    "models download": ("m", HOSTILE),
    "models delete": ("m/1",),
    "translate": ("m", "x", "--n-best", "1"),
}


def command_paths(command=None, path=()):
    command = command or typer.main.get_command(app)
    children = getattr(command, "commands", {})
    if not children:
        yield " ".join(path)
    for name, child in children.items():
        yield from command_paths(child, (*path, name))


@pytest.fixture
def hostile(fake, client):
    """A service whose every text that people choose is hostile; the ids of its corpus and its run."""
    corpus = client.upload_corpus(HOSTILE, HOSTILE, HOSTILE, train=[(HOSTILE, HOSTILE)], validation=[("a", "b")])
    script = training_script(steps=4)
    event = RunEvent(level=EventLevel.WARNING, code="CODE", message=HOSTILE)
    failed = StateChange(state=RunState.FAILED, attempt=1, message=HOSTILE)
    fake.script = [*script[:3], event, *script[3:-2], failed]
    fake.translate = lambda _: HOSTILE
    version = fake.add_model("m")
    scores = dataclasses.replace(version.scores, bleu_signature=HOSTILE)
    fake.backend.models["m"][0] = dataclasses.replace(version, source_language=HOSTILE, digest=HOSTILE, scores=scores)
    return {"CORPUS": corpus.corpus_id, "RUN": client.start_training(corpus.corpus_id, "m").run_id}


def test_every_command_is_covered_and_has_help():
    assert set(command_paths()) == set(COMMANDS)
    for path in ("", "runs", *COMMANDS):
        assert CliRunner().invoke(app, [*path.split(), "-h"]).exit_code == 0, path


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_control_character_is_printed(fake, hostile, command, terminal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {"FERRYMAN_SERVER": fake.target} | ({"FORCE_COLOR": "1", "COLUMNS": "300"} if terminal else {})
    arguments = [*command.split(), *(hostile.get(word, word) for word in COMMANDS[command])]
    result = CliRunner().invoke(app, arguments, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    printed = STYLE.sub("", result.output) if terminal else result.output
    assert CONTROL.findall(printed) == []
    if command in ("corpus list", "corpus show", "models list", "runs events", "runs show", "watch", "models show"):
        assert SHOWN in printed
    if command.endswith("list") and not terminal:
        assert [line.count("\t") for line in printed.splitlines()] == [{"c": 4, "r": 6, "m": 5}[command[0]]]


def test_server_messages_are_printed_as_text(fake):
    fake.fail_next("GetCorpus", errors.CorpusNotFound(HOSTILE))
    shown = CliRunner().invoke(app, ["corpus", "show", "x"], env={"FERRYMAN_SERVER": fake.target})
    assert (shown.exit_code, CONTROL.findall(shown.stderr)) == (2, [])
    assert shown.stderr.startswith("Error: news [/data/x] [en-de] \\x1b]0;title\\x07")


def test_json_escapes_control_characters(fake):
    fake.add_model("m")
    fake.translate = lambda _: "\x9b31m \u2028 ä"
    result = CliRunner().invoke(app, ["translate", "m", "x", "--json"], env={"FERRYMAN_SERVER": fake.target})
    assert json.loads(result.stdout)["hypotheses"][0]["text"] == "\x9b31m \u2028 ä"
    assert CONTROL.findall(result.stdout) == []
    assert "ä" in result.stdout


def test_printable_text_is_unchanged():
    text = "C:\\temp 'a' \"b\" – Größe 日本語 👩‍👧 [red]"
    assert printable(text) == text


def run_in(environment, fake, *arguments):
    command = [sys.executable, "-m", "ferryman.cli", "--server", fake.target, *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120, check=False)


def test_schedule_fits_narrow_ascii_terminal(fake):
    drawn = run_in({"PYTHONIOENCODING": "ascii", "COLUMNS": "30"}, fake, "schedule", "--preset", "base")
    assert (drawn.returncode, drawn.stderr) == (0, b"")
    lines = drawn.stdout.decode("ascii").splitlines()
    assert len(lines) == 19
    assert max(map(len, lines[1:])) <= 30


def test_translations_are_utf8_in_any_locale(fake):
    fake.add_model("m")
    translated = run_in({"PYTHONIOENCODING": "ascii"}, fake, "translate", "m", "größe")
    assert (translated.returncode, translated.stdout.decode()) == (0, "GRÖSSE\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "show"),
        ("runs", "show", "\udcff"),
        ("runs", "shwo", "x"),
        ("runs", "list", "--state", "nope"),
        ("train", "c", "m", "--recipe", "/nope"),
        ("train", "c", "m", "--processes", "x"),
        ("models", "alias", "m", "p", "9" * 30),
        ("models", "download", "m", "/"),
    ],
)
def test_usage_error_is_one_line(fake, arguments):
    fake.add_model("m")
    result = CliRunner().invoke(app, arguments, env={"FERRYMAN_SERVER": fake.target}, prog_name="ferryman")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("Error: ")


def test_log_is_shown_for_unexplained_failures(fake, client, corpus):
    fake.script = [*training_script()[:3], StateChange(state=RunState.FAILED, attempt=1, message="it died")]
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    held = fake.backend.run(run_id)
    for reason, shown in (("WORKER_DIED", True), ("VOCABULARY_TOO_LARGE", False)):
        error = dataclasses.replace(held.run.error, reason=reason, log_tail="Traceback\n  line\n")
        held.run = dataclasses.replace(held.run, error=error)
        result = CliRunner().invoke(app, ["runs", "show", run_id], env={"FERRYMAN_SERVER": fake.target})
        assert ("Traceback" in result.stdout) is shown

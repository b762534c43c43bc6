"""Lines of the log in both forms, their fields, and what they must not hold."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ferryman_service.config.service_config import LogFormat
from ferryman_service.domain.errors import StoreUnavailable
from ferryman_service.domain.log_context import (
    FIELDS,
    MAY_HOLD_TEXT,
    add_log_fields,
    in_context,
    log_fields,
    logging_with,
)
from ferryman_service.observability.logs import LogConfig, formatter
from ferryman_service.search.beam import search
from ferryman_service.text.normalise import normalise

log = logging.getLogger("ferryman_service.some.module")
SENTENCE = "geheim"


@pytest.fixture
def lines():
    """What is logged, a line each, in the form that `configure` was given."""
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            found.append(self.format(record))

    handler = Handler()

    def configure(**config):
        handler.setFormatter(formatter(LogConfig(**config)))
        return found

    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield configure
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


def test_a_line_of_json(lines):
    found = lines(format=LogFormat.JSON, fields={"run": "run_1"})
    with logging_with(request_id="r-1", model="en-de/7"):
        log.info("%d sentences\nof %s", 2, "ünits", extra={FIELDS: {"seconds": 0.5, "code": "OK"}})
    [text] = found
    assert "\n" not in text
    line = json.loads(text)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "ferryman_service.some.module",
        "message": "2 sentences\nof ünits",
        "run": "run_1",
        "request_id": "r-1",
        "model": "en-de/7",
        "seconds": 0.5,
        "code": "OK",
    }


def test_a_line_for_a_person(lines):
    found = lines(fields={"run": "run_1"})
    with logging_with(request_id="r-1"):
        log.warning("trying again")
    log.warning("and again")
    assert found[0].endswith("WARNING ferryman_service.some.module: trying again [run=run_1 request_id=r-1]")
    assert found[1].endswith("and again [run=run_1]")


@pytest.mark.parametrize("form", LogFormat)
def test_an_error_has_its_traceback(lines, form):
    found = lines(format=form)
    try:
        raise OSError("no such disk") from KeyError("sda")
    except OSError:
        log.exception("failed")
    text = json.loads(found[0])["traceback"] if form is LogFormat.JSON else found[0]
    assert "OSError: no such disk" in text
    assert "KeyError: 'sda'" in text
    if form is LogFormat.JSON:
        assert json.loads(found[0])["error"] == "OSError"


@pytest.mark.parametrize("form", LogFormat)
def test_an_error_that_may_quote_a_sentence_is_told_without_its_message(lines, form):
    found = lines(format=form)
    log_failure(lambda: raise_two(SENTENCE))
    assert SENTENCE not in found[0]
    assert "LookupError" in found[0]
    assert "ValueError" in found[0]
    assert "in raise_two" in found[0], "where it happened is told"
    assert "--log-sentences" in found[0]


@pytest.mark.parametrize("form", LogFormat)
def test_error_is_logged_in_full_where_sentences_may_be_logged(lines, form):
    found = lines(format=form, sentences=True)
    log_failure(lambda: raise_two(SENTENCE))
    assert found[0].count(SENTENCE) == 2


@pytest.mark.parametrize("form", LogFormat)
def test_an_error_is_told_with_the_one_that_was_being_handled(lines, form):
    found = lines(format=form)
    log_failure(lambda: raise_while_handling(SENTENCE))
    assert "LookupError" in found[0]
    assert "in look_up" in found[0]
    assert SENTENCE not in found[0]


def test_an_error_of_a_layer_that_sees_no_text_is_told_in_full(lines):
    found = lines(format=LogFormat.JSON)
    log_failure(lambda: search(None, [(1, 2)], [None], lambda: None))
    log_failure(lambda: normalise(7))
    assert "'NoneType' object has no attribute" in found[0]
    assert "left out" not in found[0]
    assert "left out" in found[1]


def test_why_the_server_cannot_go_on_now_is_told_in_full_but_not_what_that_came_of(lines):
    found = lines(format=LogFormat.JSON)
    log_failure(store_out_of_reach)
    assert "StoreUnavailable: the database is locked" in found[0]
    assert SENTENCE not in found[0]


def store_out_of_reach():
    try:
        raise LookupError(SENTENCE)
    except LookupError as error:
        raise StoreUnavailable("the database is locked") from error


def raise_two(text):
    try:
        raise LookupError(text)
    except LookupError as error:
        raise ValueError(text) from error


def raise_while_handling(text):
    try:
        look_up(text)
    except LookupError:
        raise ValueError(text)  # noqa: B904 (without a cause is the point)


def look_up(text):
    raise LookupError(text)


def log_failure(work):
    try:
        work()
    except Exception as error:
        log.error("failed", exc_info=error, extra={MAY_HOLD_TEXT: True})


async def test_tasks_and_threads_have_fields_of_their_own():
    async def task(name):
        with logging_with(request_id=name):
            await asyncio.sleep(0.01)
            add_log_fields(model=f"of {name}")
            in_thread = await asyncio.to_thread(log_fields)
            assert in_thread == log_fields() == {"request_id": name, "model": f"of {name}"}
        assert log_fields() == {}

    await asyncio.gather(task("a"), task("b"))
    with ThreadPoolExecutor(1) as pool, logging_with(request_id="c"):
        assert pool.submit(in_context(log_fields)).result() == {"request_id": "c"}
        assert pool.submit(log_fields).result() == {}
        seen = []
        thread = threading.Thread(target=lambda: seen.append(log_fields()))
        thread.start()
        thread.join()
        assert seen == [{}]


def test_own_lines_of_a_process_have_the_same_form():
    code = """
import logging, warnings
from ferryman_service.config.service_config import LogFormat
from ferryman_service.observability.logs import LogConfig, configure_logging
configure_logging(LogConfig(format=LogFormat.JSON, level="INFO", fields={"run": "run_1"}))
logging.getLogger("a").debug("too fine")
warnings.warn("old")
raise OSError("the end")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    warning, end = map(json.loads, done.stderr.splitlines())
    assert (warning["level"], warning["run"]) == ("WARNING", "run_1")
    assert "old" in warning["message"]
    assert (end["level"], end["error"], done.returncode) == ("CRITICAL", "OSError", 1)
    assert "OSError: the end" in end["traceback"]


DYING = """
import sys, threading
from ferryman_service.config.service_config import LogFormat
from ferryman_service.observability.logs import LogConfig, configure_logging

class Lost:
    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise LookupError(self.text)

    def __repr__(self):
        return self.text

def in_thread():
    raise ValueError("geheim")

configure_logging(LogConfig(format=LogFormat.JSON, sentences=sys.argv[1] == "yes", reads_text=sys.argv[2] == "yes"))
thread = threading.Thread(target=in_thread, name="reader")
thread.start()
thread.join()
leaving = threading.Thread(target=sys.exit)
leaving.start()
leaving.join()
lost = Lost("geheim")
del lost
raise OSError("geheim")
"""


@pytest.mark.parametrize(
    ("sentences", "reads_text", "told"),
    [("no", "yes", [False, False, False]), ("no", "no", [False, False, True]), ("yes", "yes", [True, True, True])],
)
def test_fatal_errors_are_logged_with_places_and_without_text(sentences, reads_text, told):
    command = [sys.executable, "-c", DYING, sentences, reads_text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["message"], line["error"]) for line in lines] == [
        ("CRITICAL", "the thread reader ends with an error", "ValueError"),
        ("ERROR", "Exception ignored in: Lost.__del__", "LookupError"),
        ("CRITICAL", "this process ends with an error", "OSError"),
    ]
    assert [SENTENCE in json.dumps(line) for line in lines] == told
    places = [line["traceback"].splitlines()[-2].split(", ")[-1] for line in lines]
    assert places == ["in in_thread", "in __del__", "in <module>"]
    assert done.returncode == 1

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
def test_it_is_told_in_full_where_sentences_may_be_logged(lines, form):
    found = lines(format=form, sentences=True)
    log_failure(lambda: raise_two(SENTENCE))
    assert found[0].count(SENTENCE) == 2


def test_an_error_of_a_layer_that_sees_no_text_is_told_in_full(lines):
    found = lines(format=LogFormat.JSON)
    log_failure(lambda: search(None, [(1, 2)], [None], lambda: None))
    log_failure(lambda: normalise(7))
    assert "'NoneType' object has no attribute" in found[0]
    assert "left out" not in found[0]
    assert "left out" in found[1]


def raise_two(text):
    try:
        raise LookupError(text)
    except LookupError as error:
        raise ValueError(text) from error


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


def test_what_a_process_says_itself_has_the_same_form():
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

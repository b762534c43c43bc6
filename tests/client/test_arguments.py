"""Mistakes in calls of the SDK: both clients name argument, value and cure, and send nothing."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest

from ferryman import (
    AsyncClient,
    Client,
    LearningRateSchedule,
    ModelRecipe,
    Recipe,
    StopRecipe,
    StreamSentence,
    _checks,
    errors,
)

Refused = Callable[..., errors.FerrymanError]
FILES = ("a.en", "a.de")
PAIRS = [("one", "eins")]
RIGHT: dict[str, dict[str, object]] = {
    "start_training": {"corpus_id": "c", "model_name": "m"},
    "upload_corpus": {
        "display_name": "toy",
        "source_language": "en",
        "target_language": "de",
        "train": PAIRS,
        "validation": PAIRS,
    },
    "set_model_alias": {"name": "m", "alias": "a", "version": 1},
    "delete_model_alias": {"name": "m", "alias": "a"},
    "download_model": {"model": "m", "folder": "nowhere"},
    "translate": {"model": "m", "sentences": ["x"]},
    "translate_stream": {"model": "m", "sentences": ["x"]},
    "get_lr_schedule": {"recipe": Recipe()},
}
"""What a method needs beside the argument that is wrong; of the others, "x" for each that is required."""
TRUTH_VALUES = {"follow", "heartbeats", "in_order"}


@pytest.fixture(params=["sync", "async"])
def refused(fake, request) -> Refused:
    """Call a method wrongly; return the error. Nothing but the beginning of a stream must have reached the server."""
    fake.add_model("m")

    async def call(name: str, arguments: dict[str, object], closed: bool) -> None:
        async with AsyncClient(fake.target) as client:
            if closed:
                await client.close()
            outcome = getattr(client, name)(**arguments)
            if inspect.isawaitable(outcome):
                await outcome
            else:
                async for _ in outcome:
                    pass

    def call_sync(name: str, arguments: dict[str, object], closed: bool) -> None:
        with Client(fake.target) as client:
            if closed:
                client.close()
            outcome = getattr(client, name)(**arguments)
            if inspect.isgenerator(outcome):
                list(outcome)

    def refused(name: str, /, closed: bool = False, **arguments: object) -> errors.FerrymanError:
        with pytest.raises(errors.FerrymanError) as caught:
            asyncio.run(call(name, arguments, closed)) if request.param == "async" else call_sync(
                name, arguments, closed
            )
        assert fake.calls in ([], ["UploadCorpus"], ["StreamTranslate"])
        return caught.value

    return refused


def methods() -> list[tuple[str, list[inspect.Parameter]]]:
    return [
        (name, [each for each in inspect.signature(method).parameters.values() if each.name != "self"])
        for name, method in inspect.getmembers(Client, inspect.isfunction)
        if not name.startswith("_") and name != "close"
    ]


def right_arguments(name: str, parameters: list[inspect.Parameter]) -> dict[str, object]:
    required = (each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD)
    return dict.fromkeys(required, "x") | RIGHT.get(name, {})


@pytest.mark.parametrize(("name", "parameters"), methods(), ids=lambda each: each if isinstance(each, str) else "")
def test_every_argument_of_every_method_is_checked(refused, name, parameters):
    checked = [each for each in parameters if each.name not in TRUTH_VALUES and each.kind is not each.VAR_KEYWORD]
    for parameter in checked:
        arguments = right_arguments(name, parameters)
        if name == "get_lr_schedule" and parameter.name in ("schedule", "run_id"):
            arguments = {}
        error = refused(name, **{**arguments, parameter.name: object()})
        assert isinstance(error, errors.InvalidArgument)
        assert [violation.field for violation in error.violations] == [parameter.name]
        assert re.search(r"is <object object at .*>, must be ", str(error))


@pytest.mark.parametrize("name", [name for name, _ in methods()])
def test_closed_client_raises_client_closed(refused, name):
    arguments = right_arguments(name, dict(methods())[name])
    error = refused(name, closed=True, **arguments)
    assert type(error) is errors.ClientClosed
    assert "the client is closed; create a new one" in str(error)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "start_training",
            {"recipe": {"preset": "tiny"}},
            r"recipe: is \{'preset': 'tiny'\}, must be a Recipe; write Recipe\(preset=...\)",
        ),
        (
            "start_training",
            {"recipe": Recipe(model={"d_model": 64}, stop=ModelRecipe())},
            r"2 violations:\n  recipe.model: is \{'d_model': 64\}, must be a ModelRecipe; write ModelRecipe\(d_model=.."
            r".\)\n  recipe.stop: is ModelRecipe\(.*, must be a StopRecipe",
        ),
        (
            "start_training",
            {"model_name": None, "processes": 2**40, "recipe": Recipe(preset="huge", stop=StopRecipe(max_steps=2**80))},
            r"4 violations:\n  model_name: is None, must be UTF-8 text\n  processes: is 1099511627776, must be a whole "
            r"number from -2,147,483,648 to 2,147,483,647\n  recipe.preset: is 'huge', must be one of tiny, .*\n"
            r"  recipe.stop.max_steps: is 1208925819614629174706176, must be a whole number from -9,223,372",
        ),
        ("upload_corpus", {"train": "a.en"}, r"train: is 'a.en', must be a tuple \(source_file, target_file\), or an"),
        ("upload_corpus", {"train": ("a.en",)}, r"train: is \('a.en',\), must be a tuple \(source_file, target_file\)"),
        ("upload_corpus", {"train": list(FILES)}, r"train: is \['a.en', 'a.de'\], must be a tuple \(source_file,"),
        (
            "upload_corpus",
            {"train": "a", "validation": {}},
            r"2 violations:\n  train: is 'a', .*\n  validation: is \{\},",
        ),
        ("upload_corpus", {"train": [*PAIRS, ("x",)]}, r"train\[1\]: is \('x',\), must be a \(source, target\) pair"),
        (
            "upload_corpus",
            {"validation": [*PAIRS, "ab"]},
            r"validation\[1\]: is 'ab', must be a \(source, target\) pair",
        ),
        ("upload_corpus", {"train": [("x", "\udcff")]}, r"train\[0\]: is \('x', '\\udcff'\), must be .* UTF-8 texts"),
        (
            "upload_corpus",
            {"train": [("x" * 2**24, "")]},
            r"train\[0\]: has 16,777,228 bytes, a pair may have 524,256",
        ),
        (
            "list_training_runs",
            {"states": "queued"},
            r"""states: is 'queued', must be a list of states, such as \["queu""",
        ),
        (
            "list_training_runs",
            {"states": ["done"], "order": "up"},
            r"2 violations:\n  states\[0\]: is 'done', must be one of queued, .*\n  order: is 'up', must be one of new",
        ),
        (
            "stream_metrics",
            {"after_sequence": 2**80},
            r"after_sequence: is 1208925819614629174706176, must be a whole num",
        ),
        (
            "stream_metrics",
            {"reconnect_timeout_s": float("nan")},
            r"reconnect_timeout_s: is nan, must be a number of sec",
        ),
        (
            "translate",
            {"timeout_s": float("inf")},
            r"timeout_s: is inf, must be a number of seconds over 0 and at most",
        ),
        (
            "load_model",
            {"timeout_s": 1e10},
            r"timeout_s: is 10000000000.0, must be a number of seconds over 0 and at m",
        ),
        ("translate", {"sampling": {"seed": 7}}, r"options.sampling: is \{'seed': 7\}, must be a Sampling; write Samp"),
        ("translate", {"sentences": ["x", None]}, r"sentences\[1\]: is None, must be UTF-8 text"),
        (
            "translate",
            {"sentences": ["x" * 300_000] * 64},
            r"sentences: have 19,2.* bytes together, .* translate_stream",
        ),
        (
            "translate",
            {"sentences": ["x", "y" * 2**25]},
            r"sentences\[1\]: has 33,554,432 bytes, a request may have 4,194,304",
        ),
        ("translate", {"beam": 3}, "beam: is no option of a translation; the options are beam_size, n_best,"),
        (
            "translate_stream",
            {"sentences": "one text"},
            r"sentences: is 'one text', .*; pass \[sentence\], or call tr",
        ),
        (
            "translate_stream",
            {"sentences": ["x", 5]},
            r"sentences\[1\]: is 5, must be a text, an \(id, text\) pair or a",
        ),
        (
            "translate_stream",
            {"sentences": [StreamSentence(id="", sentence=None)]},
            r"sentences\[0\]: is StreamSentence\(",
        ),
        (
            "translate_stream",
            {"window": 2**40},
            r"window: is 1099511627776, must be a whole number from -2,147,483,648",
        ),
        (
            "get_lr_schedule",
            {"recipe": None, "schedule": {"kind": "noam"}},
            r"schedule: .* a LearningRateSchedule; write",
        ),
        (
            "get_lr_schedule",
            {"recipe": LearningRateSchedule()},
            r"recipe: is LearningRateSchedule\(.*, must be a Recipe",
        ),
        ("get_model", {"model": "m" * 2**25}, r"request: has 33,554,437 bytes, may have 4,194,304 at most"),
        ("wait", {"on_record": "print"}, r"on_record: is 'print', must be None or a function"),
    ],
)
def test_error_names_argument_value_and_cure(refused, name, arguments, message):
    parameters = dict(methods())[name]
    error = refused(name, **{**right_arguments(name, parameters), **arguments})
    assert isinstance(error, ValueError)
    assert re.match(message, str(error)), str(error)[:500]


def test_unknown_keyword_is_a_type_error(refused):
    assert isinstance(refused("translate", model="m", sentences="x", beam=3), TypeError)


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_all_bad_connection_arguments_are_reported_at_once(client):
    with pytest.raises(errors.InvalidRequest) as caught:
        client("http://localhost:50051/", credentials="secret", timeout_s="60", options={"grpc.mine": 1})
    assert [violation.field for violation in caught.value.violations] == [
        "target",
        "credentials",
        "timeout_s",
        "options",
    ]


@pytest.mark.parametrize(
    ("target", "cure"),
    [
        ("http://localhost:50051", "must be HOST:PORT, without http://; write localhost:50051"),
        ("https://ferryman.example/api", "must be HOST:PORT, without https://; write ferryman.example:50051"),
        ("grpc://10.0.0.1:7", "must be HOST:PORT, without grpc://; write 10.0.0.1:7"),
        ("localhost", "must be HOST:PORT; write localhost:50051"),
        ("localhost:50051/", "must be HOST:PORT, such as localhost:50051"),
        ("a:1,b:2", "must be HOST:PORT, such as localhost:50051"),
        ("localhost:99999", "must be HOST:PORT, with a port from 1 to 65,535"),
        ("", "must be HOST:PORT, such as localhost:50051"),
        (None, "must be HOST:PORT, such as localhost:50051"),
    ],
)
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_bad_target_is_refused_with_suggestion(client, target, cure):
    with pytest.raises(errors.InvalidRequest, match=re.escape(f"target: is {target!r}, {cure}")):
        client(target)


def test_every_grpc_address_form_is_accepted():
    forms = ["localhost:1", "[::1]:1", "dns:///a.b:1", "dns://9.9.9.9/a:1", "ipv4:1.2.3.4:5,6.7.8.9:1", "unix:/tmp/x"]
    for target in [*forms, "ipv6:[::1]:5", "dns:a", "[fe80::1%br-5F2c]:1"]:
        Client(target).close()


class Rows:
    """As data sets are that have no __iter__."""

    def __getitem__(self, index):
        return PAIRS[index]


def test_any_iterable_and_number_type_is_accepted(fake):
    fake.add_model("m")
    options = (pair for pair in [["grpc.mine", 1], ("grpc.other", 2)])
    with Client(fake.target, timeout_s=np.float32(60), options=options) as client:
        corpus = client.upload_corpus("toy", "en", "de", train=map(iter, PAIRS), validation=Rows())
        assert fake.pairs[corpus.corpus_id] == {"train": PAIRS, "validation": PAIRS}
        client.translate("m", ["x"], target_prefixes=None, split_sentences=None)
        assert list(client.list_training_runs(model_name=None)) == []


def test_options_may_come_from_a_generator():
    pairs = [("grpc.mine", 1)]
    assert _checks.check_connection("localhost:1", None, 1, iter(pairs)) == pairs


def test_bad_sentence_ends_reading_of_endless_source(fake, client):
    fake.add_model("m")
    results = client.translate_stream("m", itertools.chain(["one"], itertools.repeat(None)), in_order=True)
    assert next(results).translation.text == "ONE"
    with pytest.raises(errors.InvalidRequest, match=r"sentences\[1\]: is None"):
        next(results)

"""Ids, model names and references: what may become part of a path, and what may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.errors import InvalidRequest, RequestIdReused, RunNotFound
from ferryman_service.domain.ids import CORPUS_PREFIX, RUN_PREFIX, is_alias, is_id, is_model_name, new_id
from ferryman_service.domain.models import ModelReference, parse_exact_reference, parse_model_reference

DANGEROUS = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "a\0",
    "%2e%2e",
    "/etc/passwd",
    "a b",
    "ä",
    "-x",
    ".hidden",
    "A" * 65,
]


def test_ids_are_recognised_unique_and_sorted_by_time():
    ids = [new_id(RUN_PREFIX) for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(is_id(text, RUN_PREFIX) and not is_id(text, CORPUS_PREFIX) for text in ids)
    assert [text[:13] for text in ids] == sorted(text[:13] for text in ids)


@pytest.mark.parametrize("text", [*DANGEROUS, "run_", "run_../../../../../etc/pass"])
def test_nothing_else_is_an_id(text):
    assert not is_id(text, RUN_PREFIX)


@pytest.mark.parametrize("text", DANGEROUS)
def test_nothing_dangerous_names_a_model(text):
    assert not is_model_name(text)


@given(st.text())
def test_a_model_name_is_one_safe_path_component(text):
    if is_model_name(text):
        assert "/" not in text
        assert not text.startswith(".")
        assert text.isascii()


def test_references():
    assert parse_model_reference("en-de") == ModelReference(name="en-de")
    assert parse_model_reference("en-de/7") == ModelReference(name="en-de", version=7)
    assert parse_model_reference("en-de@v7") == ModelReference(name="en-de", alias="v7")


NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)


@given(NAMES, st.none() | st.integers(1, 10**9 - 1) | NAMES.filter(is_alias))
def test_a_reference_is_read_as_it_is_written(name, rest):
    version, alias = (rest, None) if isinstance(rest, int) else (None, rest)
    reference = ModelReference(name=name, version=version, alias=alias)
    assert parse_model_reference(str(reference)) == reference


@pytest.mark.parametrize("text", [*DANGEROUS, "7", "0123"])
def test_nothing_dangerous_and_no_number_is_an_alias(text):
    assert not is_alias(text)


@pytest.mark.parametrize(
    "text",
    [
        *["", "/", "en-de/", "en-de/0", "en-de/-1", "en-de/x", "en-de/1/2", "EN", "en-de/٣", "a/1e9"],
        *["@", "en-de@", "@x", "en-de@7", "en-de@X", "en-de@a@b", "en-de@a/1", "en-de/1@a", "en-de@../x"],
    ],
)
def test_bad_references_are_named(text):
    with pytest.raises(InvalidRequest) as caught:
        parse_model_reference(text)
    assert [(v.field, v.reason) for v in caught.value.violations] == [("model", "INVALID_MODEL_REFERENCE")]


def test_only_a_number_is_exact():
    assert parse_exact_reference("en-de/7") == ModelReference(name="en-de", version=7)
    for text in ("en-de", "en-de@production", "EN/1"):
        with pytest.raises(InvalidRequest) as caught:
            parse_exact_reference(text, "that")
        assert [(v.field, v.reason) for v in caught.value.violations] == [("that", "INVALID_MODEL_REFERENCE")]


def test_reasons_are_the_class_names():
    assert RunNotFound("x").reason == "RUN_NOT_FOUND"
    assert RequestIdReused("x", request_id=1).metadata == {"request_id": "1"}

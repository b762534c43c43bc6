"""Corpora: checked, normalised, stored whole or not at all."""

import gzip
import os
import re
import subprocess
import sys
import threading

import pytest
from sqlalchemy import event

from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Side, Split
from ferryman_service.domain.errors import CorpusNotFound, CorpusTooLarge, DiskFull, InvalidCorpus, RequestIdReused
from ferryman_service.domain.ids import CORPUS_PREFIX, is_id, new_id
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.corpus_text import check_split
from ferryman_service.stores.database import open_database
from ferryman_service.stores.sweep import sweep
from ferryman_service.trash import list_trash
from tests.fakes.failpoints import CRASHED, in_child

HEADER = CorpusHeader(display_name="Numbers", source_language="en", target_language="de")
GOOD = {
    (Split.TRAIN, Side.SOURCE): b"one two\nthree\n",
    (Split.TRAIN, Side.TARGET): b"eins zwei\ndrei\n",
    (Split.VALIDATION, Side.SOURCE): b"four\n",
    (Split.VALIDATION, Side.TARGET): b"vier\n",
}


@pytest.fixture
def make_store(database, folder):
    return lambda **limits: FileCorpusStore(database, folder, CorpusLimits(**limits))


@pytest.fixture
def store(make_store):
    return make_store()


def upload(store, changes=None, header=HEADER, request_id=""):
    """Upload GOOD with some files changed (None leaves one out)."""
    going = store.begin_upload(header, request_id)
    for (split, side), data in (GOOD | (changes or {})).items():
        if data is not None:
            going.add_chunk(split, side, data)
    return going.finish()


def refused(store, changes):
    with pytest.raises(InvalidCorpus) as caught:
        upload(store, changes)
    return [(violation.field, violation.reason, violation.description) for violation in caught.value.violations]


def contents(store, corpus):
    return {key: path.read_bytes() for key, path in store.files(corpus.corpus_id).files.items()}


def leftovers(folder):
    return [path for path in folder.corpora.iterdir() if path != folder.incoming] + list(folder.incoming.iterdir())


def test_a_good_corpus_is_stored_and_counted(store, folder):
    corpus = upload(store)
    assert is_id(corpus.corpus_id, CORPUS_PREFIX)
    assert corpus.header == HEADER
    assert (corpus.train.pairs, corpus.train.source_words, corpus.train.target_words) == (2, 3, 3)
    assert corpus.validation.samples == (SentencePair(source="four", target="vier"),)
    assert contents(store, corpus) == GOOD
    assert store.get(corpus.corpus_id) == corpus
    assert leftovers(folder) == [folder.corpus_dir(corpus.corpus_id)]


def test_chunks_may_end_anywhere_and_forms_do_not_matter(store):
    whole = upload(store)
    going = store.begin_upload(HEADER, "")
    for (split, side), data in GOOD.items():
        if split is Split.TRAIN:
            for byte in data:
                going.add_chunk(split, side, bytes([byte]))
    going.add_pairs(Split.VALIDATION, [SentencePair(source="four", target="vier")])
    pieces = going.finish()
    assert (pieces.digest, pieces.train, pieces.validation) == (whole.digest, whole.train, whole.validation)
    assert pieces.corpus_id != whole.corpus_id


def test_text_is_normalised_and_nothing_else_is_touched(store):
    strange = "a\x00b\x0bc\x0cd\x1ce\x85f\u2028g\u2029h\ti\rj \ufeff k"
    changes = {
        (Split.TRAIN, Side.SOURCE): b"\xef\xbb\xbfone\r\n" + strange.encode() + b"\r\n\r\nlast",
        (Split.TRAIN, Side.TARGET): b"eins\nzwei\n \nletzte\r",
    }
    corpus = upload(store, changes)
    stored = contents(store, corpus)
    assert stored[Split.TRAIN, Side.SOURCE] == b"one\n" + strange.encode() + b"\n\nlast\n"
    assert stored[Split.TRAIN, Side.TARGET] == b"eins\nzwei\n \nletzte\n"
    assert (corpus.train.pairs, corpus.train.empty_pairs) == (4, 1)
    assert [pair.target for pair in corpus.train.samples] == ["eins", "zwei", "letzte"]


def test_the_digest_is_of_content_and_languages(store):
    digest = upload(store).digest
    renamed = CorpusHeader(display_name="Other", source_language="en", target_language="de")
    assert upload(store, header=renamed).digest == digest
    windows = {key: data.replace(b"\n", b"\r\n") for key, data in GOOD.items()}
    assert upload(store, windows).digest == digest
    other = {
        upload(store, header=CorpusHeader(display_name="", source_language="en", target_language="nl")).digest,
        upload(store, {(Split.VALIDATION, Side.SOURCE): b"five\n"}).digest,
        upload(store, {key: GOOD[key[0], other] for key in GOOD for other in Side if other is not key[1]}).digest,
    }
    assert len(other | {digest}) == 4


def test_misaligned_files(store, folder):
    ((field, reason, text),) = refused(store, {(Split.TRAIN, Side.TARGET): b"eins\nzwei\ndrei"})
    assert (field, reason) == ("train.target", "LINE_COUNT_MISMATCH")
    assert "has 3 lines, train.source has 2" in text
    ((field, reason, text),) = refused(store, {(Split.VALIDATION, Side.SOURCE): None})
    assert (field, reason) == ("validation.target", "LINE_COUNT_MISMATCH")
    assert leftovers(folder) == []


def test_text_that_is_not_utf8_is_named_by_line_and_byte(store):
    source = "one\nzwölf\n".encode() + b"\xef\xbb\xbf ok\nf\xfcnf\n"
    target = b"a\nb\nc\nd\n"
    found = refused(store, {(Split.TRAIN, Side.SOURCE): source, (Split.TRAIN, Side.TARGET): target})
    ((field, reason, text),) = found
    assert (field, reason) == ("train.source", "NOT_UTF8")
    assert f"line 4, byte {source.index(0xFC)} of the file" in text
    with_mark = b"\xef\xbb\xbf" + b"\xfc\n"
    ((_, _, text),) = refused(store, {(Split.VALIDATION, Side.SOURCE): with_mark})
    assert "line 1, byte 3 of the file" in text


MARK = b"\xef\xbb\xbf"


def test_a_byte_order_mark_at_a_files_start_is_no_text(store):
    whole = upload(store)
    assert upload(store, {key: MARK + data for key, data in GOOD.items()}).digest == whole.digest
    going = store.begin_upload(HEADER, "")
    for (split, side), data in GOOD.items():
        for byte in MARK + data:
            going.add_chunk(split, side, bytes([byte]))
    assert going.finish().digest == whole.digest
    going = store.begin_upload(HEADER, "")
    going.add_pairs(Split.TRAIN, [SentencePair(source="\ufeffone two", target="\ufeffeins zwei")])
    going.add_pairs(Split.TRAIN, [SentencePair(source="three", target="drei")])
    going.add_pairs(Split.VALIDATION, [SentencePair(source="four", target="\ufeffvier")])
    assert going.finish().digest == whole.digest


SENTENCES = "Ein Hund bellt.\nEine Katze schläft.\n"
OTHER_FORMS = {
    "UTF-16 with the mark FF FE": (b"\xff\xfe" + SENTENCES.encode("utf-16-le"), "NOT_UTF8", "UTF-16.*FF FE.*iconv"),
    "UTF-16 with the mark FE FF": (b"\xfe\xff" + SENTENCES.encode("utf-16-be"), "NOT_UTF8", "UTF-16.*FE FF.*iconv"),
    "UTF-16 little-endian": (SENTENCES.encode("utf-16-le"), "NOT_UTF8", "UTF-16LE.*iconv"),
    "UTF-16 big-endian": (SENTENCES.encode("utf-16-be"), "NOT_UTF8", "UTF-16BE.*iconv"),
    "UTF-32": (SENTENCES.encode("utf-32"), "NOT_UTF8", "UTF-32.*iconv"),
    "gzip": (gzip.compress(SENTENCES.encode()), "COMPRESSED", "gzip.*gunzip"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_file_in_another_form_is_recognised_and_told_once(store, form):
    data, wanted_reason, cure = OTHER_FORMS[form]
    ((field, reason, text),) = refused(store, {(Split.TRAIN, Side.SOURCE): data})
    assert (field, reason) == ("train.source", wanted_reason)
    assert re.search(cure, text)


def test_carriage_returns_end_the_lines_of_a_file_without_line_feeds(store):
    old = {key: data.replace(b"\n", b"\r") for key, data in GOOD.items()}
    assert upload(store, old).digest == upload(store).digest
    source = MARK + b"one\rtwo\xc2\x85\r\rx\xff"
    ((field, _, text),) = refused(
        store, {(Split.TRAIN, Side.SOURCE): source, (Split.TRAIN, Side.TARGET): b"a\rb\rc\rd"}
    )
    assert field == "train.source"
    assert "line 4, byte 15 of the file" in text


def warned(corpus):
    return [(warning.code, warning.field, warning.count, warning.total) for warning in corpus.warnings]


def test_one_table_as_both_sides_is_warned_of(store):
    table = b"one\teins\ntwo\tzwei\n\nthree\tdrei\n"
    corpus = upload(store, {(Split.TRAIN, side): table for side in Side})
    assert warned(corpus) == [
        ("SAME_ON_BOTH_SIDES", "train", 3, 3),
        ("TABS", "train.source", 3, 3),
        ("TABS", "train.target", 3, 3),
    ]
    assert corpus.warnings[0].example == "one\teins"
    assert store.get(corpus.corpus_id) == corpus


def test_markup_is_warned_of(store):
    tmx = b'<tu>\n  <tuv xml:lang="en"><seg>One</seg></tuv>\n</tu>\n'
    lines = b'{"translation": "eins"},\n{"translation": "zwei"}\ndrei\n'
    corpus = upload(store, {(Split.TRAIN, Side.SOURCE): tmx, (Split.TRAIN, Side.TARGET): lines})
    assert warned(corpus) == [("MARKUP", "train.source", 3, 3), ("MARKUP", "train.target", 2, 3)]


@pytest.mark.parametrize(("common", "is_warned"), [(40, True), (8, True), (7, False), (0, False)])
def test_validation_pairs_that_are_trained_on_are_warned_of(store, common, is_warned):
    going = store.begin_upload(HEADER, "")
    going.add_pairs(Split.TRAIN, [SentencePair(source=f"s {number}", target=f"t {number}") for number in range(100)])
    first = 100 - common
    pairs = [SentencePair(source=f"s {number}", target=f"t {number}") for number in range(first, first + 40)]
    going.add_pairs(Split.VALIDATION, pairs)
    corpus = going.finish()
    assert warned(corpus) == [("VALIDATION_IN_TRAINING", "validation", common, 40)] * is_warned
    assert store.get(corpus.corpus_id).warnings == corpus.warnings


def test_plausible_text_gives_no_warning(store):
    changes = {
        (Split.TRAIN, Side.SOURCE): b"one\ntwo\tthree\n<b>\n,\nOK\n",
        (Split.TRAIN, Side.TARGET): b"eins\nzwei\tdrei\nb\n,\nOK\n",
    }
    corpus = upload(store, changes)
    assert warned(corpus) == []
    long = "x" * 300
    corpus = upload(store, {(Split.VALIDATION, side): long.encode() for side in Side})
    assert len(corpus.warnings[0].example) == 200


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_long_lines(make_store, end):
    store = make_store(max_line_bytes=10)
    assert upload(store, {(Split.VALIDATION, Side.SOURCE): b"x" * 10 + end}).validation.pairs == 1
    for length in (11, 12, 13, 5000):
        lines = b"ok\n" + b"x" * length + end
        found = refused(store, {(Split.VALIDATION, Side.SOURCE): lines, (Split.VALIDATION, Side.TARGET): b"a\nb\n"})
        ((field, reason, text),) = found
        assert (field, reason) == ("validation.source", "LINE_TOO_LONG")
        assert "line 2 is longer than 10 bytes" in text


def test_a_long_line_does_not_shift_what_follows(make_store):
    lines = b"x" * 500 + b"\n\xff\n"
    changes = {(Split.VALIDATION, Side.SOURCE): lines, (Split.VALIDATION, Side.TARGET): b"a\nb\n"}
    (long, bad) = refused(make_store(max_line_bytes=10), changes)
    assert long[1] == "LINE_TOO_LONG"
    assert "line 2, byte 501" in bad[2]


def test_line_with_a_long_run_of_combining_marks_is_named(store):
    lines = "ok\nde\u0301ja" + "\u0301" * 31 + " vu\nfine" + "\u0301" * 30 + "\n"
    target = b"a\nb\nc\n"
    found = refused(store, {(Split.VALIDATION, Side.SOURCE): lines.encode(), (Split.VALIDATION, Side.TARGET): target})
    ((field, reason, text),) = found
    assert (field, reason) == ("validation.source", "TOO_MANY_MARKS")
    assert text == "line 2, from character 6 on: more than 30 combining marks in a row: remove them"


@pytest.mark.parametrize("lines", [None, b"", b"\n\n", b" \n\t\n"])
def test_an_empty_split(store, lines):
    changes = {(Split.VALIDATION, side): lines for side in Side}
    ((field, reason, _),) = refused(store, changes)
    assert (field, reason) == ("validation", "EMPTY")


def test_an_empty_corpus(store, folder):
    with pytest.raises(InvalidCorpus) as caught:
        store.begin_upload(HEADER, "").finish()
    assert [(v.field, v.reason) for v in caught.value.violations] == [("train", "EMPTY"), ("validation", "EMPTY")]
    assert leftovers(folder) == []


def test_pairs_with_line_breaks(store):
    going = store.begin_upload(HEADER, "")
    going.add_pairs(Split.TRAIN, [SentencePair(source="a", target="b")])
    pairs = [SentencePair(source="a\nb", target="c"), SentencePair(source="d", target="e\n")]
    going.add_pairs(Split.TRAIN, pairs)
    going.add_pairs(Split.VALIDATION, [SentencePair(source="a", target="b")])
    with pytest.raises(InvalidCorpus) as caught:
        going.finish()
    assert [(v.field, v.reason) for v in caught.value.violations] == [
        ("train.source", "LINE_BREAK"),
        ("train.target", "LINE_BREAK"),
    ]
    assert "sentence 2 " in caught.value.violations[0].description
    assert "sentence 3 " in caught.value.violations[1].description


def test_a_split_in_two_forms(store):
    going = store.begin_upload(HEADER, "")
    going.add_pairs(Split.TRAIN, [SentencePair(source="a", target="b")])
    going.add_chunk(Split.VALIDATION, Side.SOURCE, b"x")
    for mixed in (
        lambda: going.add_chunk(Split.TRAIN, Side.SOURCE, b"x"),
        lambda: going.add_pairs(Split.VALIDATION, []),
    ):
        with pytest.raises(InvalidCorpus) as caught:
            mixed()
        assert caught.value.violations[0].reason == "MIXED_FORMS"
    going.abort()


def test_all_violations_come_at_once_and_none_is_crowded_out(store):
    bad = b"\xff\n" * 50
    changes = {
        (Split.TRAIN, Side.SOURCE): bad,
        (Split.TRAIN, Side.TARGET): b"ok\n" * 49 + b"\xff\n" + b"ok\n",
        (Split.VALIDATION, Side.SOURCE): b"\n",
        (Split.VALIDATION, Side.TARGET): b"\n",
    }
    found = refused(store, changes)
    assert len(found) == 20
    assert [(field, reason) for field, reason, _ in found[:4]] == [
        ("train.target", "LINE_COUNT_MISMATCH"),
        ("validation", "EMPTY"),
        ("train.source", "NOT_UTF8"),
        ("train.target", "NOT_UTF8"),
    ]
    assert {field for field, _, _ in found[4:]} == {"train.source"}


def test_a_corpus_over_the_limit_is_refused_as_it_comes(make_store, folder):
    going = make_store(max_bytes=100).begin_upload(HEADER, "")
    going.add_chunk(Split.TRAIN, Side.SOURCE, b"x" * 100)
    with pytest.raises(CorpusTooLarge, match="over 100 bytes"):
        going.add_chunk(Split.TRAIN, Side.SOURCE, b"x")
    with pytest.raises(CorpusTooLarge):
        going.add_pairs(Split.VALIDATION, [SentencePair(source="a", target="b")])
    going.abort()
    going.abort()
    assert leftovers(folder) == []


def test_the_same_request_returns_the_same_corpus(store, folder):
    corpus = upload(store, request_id="r")
    assert upload(store, request_id="r") == corpus
    with pytest.raises(RequestIdReused, match="r came before"):
        upload(store, {(Split.VALIDATION, Side.SOURCE): b"five\n"}, request_id="r")
    renamed = CorpusHeader(display_name="Other", source_language="en", target_language="de")
    with pytest.raises(RequestIdReused):
        upload(store, header=renamed, request_id="r")
    assert leftovers(folder) == [folder.corpus_dir(corpus.corpus_id)]


def test_the_same_request_at_the_same_time(store, folder):
    made = []
    barrier = threading.Barrier(6)

    def run():
        barrier.wait()
        made.append(upload(store, request_id="r"))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    assert len({corpus.corpus_id for corpus in made}) == 1
    assert leftovers(folder) == [folder.corpus_dir(made[0].corpus_id)]


def test_pages_newest_first(store):
    made = [upload(store).corpus_id for _ in range(5)]
    first = store.list_page(None, 2)
    second = store.list_page(first[-1].place, 9)
    assert [corpus.corpus_id for corpus in [*first, *second]] == made[::-1]


def test_a_corpus_that_does_not_exist_is_not_found(store):
    for name in (new_id(CORPUS_PREFIX), "../../etc"):
        with pytest.raises(CorpusNotFound, match="there is no corpus"):
            store.get(name)
        with pytest.raises(CorpusNotFound):
            store.files(name)


def test_samples_are_few_and_short(store):
    corpus = upload(store, {(Split.TRAIN, side): ("ü" * 30_000 + "\n").encode() * 5 for side in Side})
    cut = "ü" * 199 + "…"
    assert corpus.train.samples == (SentencePair(source=cut, target=cut),) * 3


def test_a_full_disk_leaves_nothing(store, folder, fill_disk):
    samples = ("ü" * 200 + "\n").encode() * 3  # more than a page of the database
    rows = {(split, side): samples for split in Split for side in Side}
    fill_disk()
    with pytest.raises(DiskFull):
        upload(store, rows)
    assert leftovers(folder) == []
    assert store.list_page(None, 9) == []


def test_leftovers_of_a_crash_are_removed_at_the_next_start(store, database, folder):
    corpus = upload(store)
    going = store.begin_upload(HEADER, "")
    going.add_chunk(Split.TRAIN, Side.SOURCE, b"x")
    database.dispose()  # no connection may pass through a fork

    def upload_and_die():
        mine = open_database(folder.database)
        event.listen(mine, "commit", lambda _: len(list(folder.corpora.iterdir())) == 3 and os._exit(CRASHED))
        upload(FileCorpusStore(mine, folder, CorpusLimits()))

    assert in_child(upload_and_die) == CRASHED
    assert len(list(folder.incoming.iterdir())) == 2
    assert len(leftovers(folder)) == 4  # two uploads, a corpus, and a folder that no row names
    store.recover()
    sweep(database, folder)
    (alive,) = folder.incoming.iterdir()  # the upload that goes on is left alone
    assert sorted(leftovers(folder)) == sorted([alive, folder.corpus_dir(corpus.corpus_id)])
    going.abort()
    assert contents(store, corpus) == GOOD
    assert [entry.reason for entry in list_trash(folder.trash)] == ["its publication was interrupted"]


def test_upload_is_never_held_in_memory(tmp_path):
    for side in Side:
        with (tmp_path / f"train.{side}").open("wb") as file:
            for _ in range(400):
                file.write(b"some words of a sentence " * 2_000 + b"\n")
    checked = tmp_path / "checked"
    checked.mkdir()
    script = (
        "import resource, sys; from pathlib import Path; from ferryman_service.stores.corpus_text import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "check_split(Split.TRAIN, Path(sys.argv[1]), Path(sys.argv[2]), CorpusLimits())\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(checked)]
    grown_kib = int(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert grown_kib < 8 * 1024
    assert os.path.getsize(checked / "train.source") == 400 * 50_001


def test_a_missing_file_counts_as_empty(tmp_path):
    checked = tmp_path / "checked"
    checked.mkdir()
    (tmp_path / "train.source").write_bytes(b"a\nb\n")
    result = check_split(Split.TRAIN, tmp_path, checked, CorpusLimits())
    assert result.statistics.pairs == result.statistics.empty_pairs == 2
    assert [violation.reason for violation in result.split_violations] == ["LINE_COUNT_MISMATCH"]


def test_limits_are_checked():
    with pytest.raises(ValueError, match="max_line_bytes is 0"):
        CorpusLimits(max_line_bytes=0)

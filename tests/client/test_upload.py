from __future__ import annotations

import gzip
import logging
from collections.abc import Iterator
from uuid import uuid4

import pytest

from ferryman import errors
from ferryman._upload import CHUNK_BYTES, read_pieces

SOURCE = [f"sentence number {i} – ß" for i in range(40_000)]
TARGET = [f"Satz Nummer {i}" for i in range(40_000)]


def write(path, lines, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    return path


def test_plain_and_gzipped_files_arrive_complete(fake, client, tmp_path):
    files = write(tmp_path / "a.en", SOURCE), write(tmp_path / "a.de.gz", TARGET, gzip.open)
    small = str(write(tmp_path / "b.en", ["x"])), str(write(tmp_path / "b.de", ["y"]))
    corpus = client.upload_corpus("files", "en", "de", train=files, validation=small)
    assert fake.pairs[corpus.corpus_id]["train"] == list(zip(SOURCE, TARGET, strict=True))
    assert fake.pairs[corpus.corpus_id]["validation"] == [("x", "y")]
    assert (corpus.display_name, corpus.source_language, corpus.target_language) == ("files", "en", "de")
    assert (corpus.train.pairs, corpus.validation.pairs) == (40_000, 1)


def test_pairs_arrive_complete(fake, client):
    pairs = list(zip(SOURCE, TARGET, strict=True))
    corpus = client.upload_corpus("pairs", "en", "de", train=iter(pairs), validation=(("a", "b"), ("c", "d")))
    assert fake.pairs[corpus.corpus_id] == {"train": pairs, "validation": [("a", "b"), ("c", "d")]}


def test_no_piece_exceeds_message_limit(tmp_path):
    files = write(tmp_path / "a", SOURCE), write(tmp_path / "b", TARGET)
    chunks = [piece.data for piece in read_pieces(files, []) if piece.side == "source"]
    assert {len(chunk) for chunk in chunks[:-1]} == {CHUNK_BYTES}
    assert b"".join(chunks).decode().splitlines() == SOURCE
    batches = [piece.pairs for piece in read_pieces([], [("", "")] * 100_000)]
    assert len(batches) > 1
    assert sum(map(len, batches)) == 100_000


def test_text_is_read_lazily():
    taken = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal taken
        while True:
            taken += 1
            yield "s" * 1000, "t" * 1000

    next(read_pieces(endless(), []))
    assert taken <= CHUNK_BYTES // 2000 + 1


def test_read_error_reaches_caller_and_nothing_is_stored(fake, client, tmp_path, caplog):
    def pairs() -> Iterator[tuple[str, str]]:
        yield "a", "b"
        raise RuntimeError("the caller's own")

    missing = tmp_path / "missing"
    with caplog.at_level(logging.ERROR):
        with pytest.raises(RuntimeError, match="the caller's own"):
            client.upload_corpus("x", "en", "de", train=pairs(), validation=[])
        with pytest.raises(FileNotFoundError, match="missing"):
            client.upload_corpus("x", "en", "de", train=(missing, missing), validation=[])
    assert list(client.list_corpora()) == []
    assert "Exception iterating requests" not in caplog.text


@pytest.mark.parametrize("suffix", ["gz", "GZ", "Gz"])
def test_gzip_suffix_is_case_insensitive(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n") + bytes(512))  # as tapes are padded
    assert b"".join(piece.data for piece in read_pieces((path, path), []) if piece.side == "source") == b"one\ntwo\n"


def test_extra_bytes_after_gzip_are_reported(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"one\n") + b"two\n")
    with pytest.raises(OSError, match=r"a\.gz: extra bytes after the compressed data"):
        list(read_pieces((path, path), []))


@pytest.mark.parametrize("damage", ["cut", "garbage", "plain"])
def test_error_names_damaged_gzip_file(client, tmp_path, damage):
    good = gzip.compress("\n".join(SOURCE).encode())
    data = {"cut": good[: len(good) // 2], "garbage": good[:1000] + bytes(1000) + good[2000:], "plain": b"text\n"}
    path = tmp_path / "a.gz"
    path.write_bytes(data[damage])
    with pytest.raises(OSError, match=r"a\.gz"):
        client.upload_corpus("x", "en", "de", train=(path, path), validation=[])
    assert list(client.list_corpora()) == []


def test_server_error_reaches_caller(client, tmp_path):
    with pytest.raises(errors.InvalidCorpus, match="train: has 2 source lines and 1 target lines"):
        client.upload_corpus(
            "x",
            "en",
            "de",
            train=(write(tmp_path / "a", ["1", "2"]), write(tmp_path / "b", ["1"])),
            validation=[("a", "b")],
        )


def test_request_id_makes_upload_idempotent(client):
    request_id = str(uuid4())
    ids = {
        client.upload_corpus("x", "en", "de", train=[("a", "b")], validation=[], request_id=request_id).corpus_id
        for _ in range(2)
    }
    assert len(ids) == 1
    with pytest.raises(errors.RequestIdReused):
        client.upload_corpus("x", "en", "de", train=[("a", "c")], validation=[], request_id=request_id)

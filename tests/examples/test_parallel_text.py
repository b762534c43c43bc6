"""Reading parallel text from files."""

import gzip

import pytest

from examples.parallel_text import TextMissing, find_files, read_lines


def write(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_plain_and_compressed_files_may_be_mixed(tmp_path):
    write(tmp_path / "train.en", b"one\ntwo\n")
    write(tmp_path / "train.de.gz", "eins\nzwölf".encode())
    lines = read_lines(find_files(f"{tmp_path}/train", "en", "de"))
    assert (lines.source, lines.target) == (["one", "two"], ["eins", "zwölf"])


def test_only_line_feeds_end_lines(tmp_path):
    write(tmp_path / "t.en", "a\u2028b\x0bc\r\n\nd\n".encode())
    write(tmp_path / "t.de", b"1\n2\n3\n")
    assert read_lines(find_files(f"{tmp_path}/t", "en", "de")).source == ["a\u2028b\x0bc", "", "d"]


def test_byte_order_mark_is_ignored(tmp_path):
    write(tmp_path / "t.en", b"\xef\xbb\xbfa\n")
    write(tmp_path / "t.de.gz", b"\xef\xbb\xbfb\n")
    lines = read_lines(find_files(f"{tmp_path}/t", "en", "de"))
    assert (lines.source, lines.target) == (["a"], ["b"])


def test_missing_file_error_names_both_candidates(tmp_path):
    write(tmp_path / "t.en", b"a\n")
    with pytest.raises(TextMissing, match=r"t\.de nor .*t\.de\.gz is a file"):
        find_files(f"{tmp_path}/t", "en", "de")


def test_different_line_counts_are_refused(tmp_path):
    write(tmp_path / "t.en", b"a\nb\n")
    write(tmp_path / "t.de", b"a\n")
    with pytest.raises(TextMissing, match=r"has 2 lines, but .* has 1"):
        read_lines(find_files(f"{tmp_path}/t", "en", "de"))


def test_non_utf8_text_is_refused(tmp_path):
    write(tmp_path / "t.en", b"a\xff\n")
    write(tmp_path / "t.de", b"a\n")
    with pytest.raises(TextMissing, match="not UTF-8"):
        read_lines(find_files(f"{tmp_path}/t", "en", "de"))

"""An upload that was probably not meant is stored, and its caller is warned: by the call, later, and at a terminal."""

import pytest
from typer.testing import CliRunner

from ferryman import Client
from ferryman.cli.app import app
from ferryman.v1 import corpus_pb2


@pytest.fixture
def upload(service, tmp_path):
    """Upload two files for each split at a terminal."""

    def run(train, validation, *, source="en", target="de"):
        files = {"--train": train, "--validation": validation}
        for name, (_, *texts) in enumerate((flag, *texts) for flag, texts in files.items()):
            for side, text in enumerate(texts):
                (tmp_path / f"{name}.{side}").write_bytes(text)
        arguments = ["corpus", "upload", "toy", "--source", source, "--target", target]
        for name, flag in enumerate(files):
            arguments += [flag, str(tmp_path / f"{name}.0"), str(tmp_path / f"{name}.1")]
        return CliRunner().invoke(app, arguments, env={"FERRYMAN_SERVER": service.address})

    return run


def test_warnings_are_in_the_answer_and_stay_with_the_corpus(service, upload):
    table, good = b"one\teins\ntwo\tzwei\n", (b"three\n", b"drei\n")
    done = upload((table, table), good)
    assert done.exit_code == 0, done.stderr
    corpus_id, summary = done.stdout.splitlines()
    assert summary == "2 training pairs, 1 validation pairs"
    lines = done.stderr.splitlines()
    assert [line.partition(": source and target")[0] for line in lines[:1]] == ["Warning: train"]
    assert "equal in 2 of 2 pairs" in lines[0]
    assert "SAME_ON_BOTH_SIDES" in lines[0]
    assert "'one\\teins'" in lines[0]
    assert [line.split()[1] for line in lines] == ["train:", "train.source:", "train.target:"]

    with Client(service.address) as client:
        known = client.get_corpus(corpus_id)
        assert [warning.code for warning in known.warnings] == ["SAME_ON_BOTH_SIDES", "TABS", "TABS"]
        assert next(iter(client.list_corpora())) == known
        assert client.upload_corpus("toy", "en", "de", train=[("a", "b")], validation=[("c", "d")]).warnings == ()
    wire = service.corpus_stub.GetCorpus(corpus_pb2.GetCorpusRequest(corpus_id=corpus_id)).corpus
    assert (wire.warnings[0].count, wire.warnings[0].total, wire.warnings[0].example) == (2, 2, "one\teins")


def test_validating_on_the_training_text_is_warned_of(upload):
    text = (b"one\ntwo\n", b"eins\nzwei\n")
    done = upload(text, text)
    [line] = done.stderr.splitlines()
    assert line.startswith("Warning: validation: 2 of 2 different validation pairs are training pairs too")


def test_a_language_that_is_no_tag_is_refused_with_the_tag(upload):
    done = upload((b"a", b"b"), (b"c", b"d"), source="english", target="pt_BR")
    assert (done.exit_code, done.stdout) == (2, "")
    assert 'write "en"' in done.stderr
    assert 'write "pt-BR"' in done.stderr

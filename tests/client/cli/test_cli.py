from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import pytest
from typer.testing import CliRunner

from ferryman import EventLevel, Int8Outcome, RunEvent, RunState, Sampling, StateChange, __version__, errors
from ferryman.cli.app import app
from ferryman.cli.models import int8_text, score_warnings
from ferryman.testing import noam_learning_rate, training_script


@pytest.fixture
def run(fake):
    def run(*arguments: str, stdin: str | bytes | None = None):
        return CliRunner().invoke(app, list(arguments), input=stdin, env={"FERRYMAN_SERVER": fake.target})

    return run


def test_version_is_printed(run):
    assert run("--version").stdout == f"ferryman {__version__}\n"


def test_schedule_prints_plot_or_csv(run, fake):
    plot = run("schedule", "--preset", "base")
    assert plot.exit_code == 0
    assert "6.98e-04 ┤" in plot.stdout
    assert "training step" in plot.stdout
    csv = run("schedule", "--kind", "noam", "--warmup-steps", "4000", "--last-step", "3", "--csv")
    assert csv.stdout.splitlines() == ["step,learning_rate", *(f"{s},{noam_learning_rate(s)!r}" for s in (1, 2, 3))]


def test_schedule_of_run_excludes_other_options(run, client, corpus):
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    assert run("schedule", "--run", run_id).exit_code == 0
    assert run("schedule", "--run", run_id, "--kind", "noam").exit_code == 2
    assert run("schedule", "--run", "run_x").exit_code == 2


def test_corpus_upload_list_show_delete(run, fake, tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\n")
    with gzip.open(tmp_path / "a.de.gz", "wt") as file:
        file.write("eins\nzwei\n")
    files = (str(tmp_path / "a.en"), str(tmp_path / "a.de.gz"))
    upload = ("corpus", "upload", "toy", "--source", "en", "--target", "de")
    uploaded = run(*upload, "--train", *files, "--validation", *files)
    assert uploaded.exit_code == 0, uploaded.stderr
    corpus_id, summary = uploaded.stdout.splitlines()
    assert fake.pairs[corpus_id]["train"] == [("one", "eins"), ("two", "zwei")]
    assert summary == "2 training pairs, 2 validation pairs"
    assert run("corpus", "list").stdout == f"{corpus_id}\ttoy\ten-de\t2\t2\n"
    assert "one → eins" in run("corpus", "show", corpus_id).stdout
    assert run("corpus", "delete", corpus_id).stdout == "deleted\n"
    assert run("corpus", "list").stdout == ""
    missing = run(*upload, "--train", "nope", "nope", "--validation", *files)
    assert (missing.exit_code, missing.stderr) == (2, "Error: nope: No such file or directory\n")


def test_train_and_watch(run, corpus, client, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[model]\nheads = 2\n")
    result = run("train", corpus.corpus_id, "m", "--recipe", str(recipe), "--set", "model.d_model=64", "--watch")
    assert result.exit_code == 0, result.stderr
    run_id = result.stdout.splitlines()[0]
    assert result.stdout.endswith(f"{run_id} succeeded: published m/1\n")
    model = client.get_training_run(run_id).recipe.model
    assert (model.heads, model.d_model) == (2, 64)
    assert run("watch", run_id).stdout.endswith("published m/1\n")


def test_runs_events_prints_lines_with_times(run, fake, client, corpus):
    dropped = RunEvent(level=EventLevel.WARNING, code="PAIRS_DROPPED", message="dropped 3 of 20 (3 EMPTY)")
    fake.script = [*training_script(steps=4)[:3], dropped, *training_script(steps=4)[3:]]
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    lines = run("runs", "events", run_id).stdout.splitlines()
    times, texts = zip(*(line.split("  ", 1) for line in lines), strict=True)
    assert all(datetime.strptime(time, "%Y-%m-%d %H:%M:%S") for time in times)
    assert "warning: PAIRS_DROPPED: dropped 3 of 20 (3 EMPTY)" in texts
    assert texts[0] == "queued"
    assert texts[-1] == "succeeded"
    assert sum(text.startswith("step ") for text in texts) == 1, "validations, not updates"


def test_printed_recipe_can_be_trained_again(run, corpus, client, tmp_path):
    first = run(
        "train", corpus.corpus_id, "m", "--set", "model.norm=pre", "--set", "schedule.factor=1.5"
    ).stdout.strip()
    shown = run("runs", "show", first).stdout
    (tmp_path / "again.toml").write_text(shown[shown.index("\n\n[") :])
    second = run("train", corpus.corpus_id, "m", "--recipe", str(tmp_path / "again.toml")).stdout.strip()
    assert client.get_training_run(second).recipe == client.get_training_run(first).recipe


def test_validate_only_prints_the_recipe(run, corpus, client):
    result = run("train", corpus.corpus_id, "m", "--set", "seed=5", "--validate-only")
    assert (result.stdout, result.stderr) == ("seed = 5\n", "valid\n")
    assert list(client.list_training_runs()) == []


def test_watching_failed_run_exits_with_1(run, fake, corpus):
    fake.script = [*training_script()[:5], StateChange(state=RunState.FAILED, attempt=1, message="out of memory")]
    result = run("train", corpus.corpus_id, "m", "--watch")
    assert result.exit_code == 1
    assert "WORKER_DIED: out of memory" in result.stdout


def test_ctrl_c_while_watching_leaves_run_running(fake, client, corpus):
    fake.hold_after = 5
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    command = [sys.executable, "-u", "-m", "ferryman.cli", "--server", fake.target, "watch", run_id]
    # The tests may run in the background of a shell, which lets programs ignore SIGINT.
    command = ["env", "--default-signal=INT", *command]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watch.stdout.readline() == "queued\n"
    watch.send_signal(signal.SIGINT)
    _, stderr = watch.communicate(timeout=20)
    assert watch.returncode == 130
    assert stderr == f"{run_id} continues; to follow it again: ferryman watch {run_id}\n"
    assert client.get_training_run(run_id).state is RunState.RUNNING


def test_runs_list_show_cancel(run, fake, client, corpus):
    done = client.start_training(corpus.corpus_id, "m").run_id
    fake.hold_after = 4
    held = client.start_training(corpus.corpus_id, "m").run_id
    lines = run("runs", "list").stdout.splitlines()
    assert [line.split("\t")[:6] for line in lines] == [
        [held, "running", "m", "1", "-", "-"],
        [done, "succeeded", "m", "4", "31.5", "2"],
    ]
    assert run("runs", "list", "--state", "running").stdout.splitlines() == lines[:1]
    assert "best BLEU:     31.5 (2 pairs)\n" in run("runs", "show", done).stdout
    assert run("runs", "cancel", held).stdout == "cancelled\n"
    refused = run("runs", "cancel", done)
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_runs_pause_resume_checkpoints_delete(run, fake, client, corpus):
    fake.hold_after = 8
    held = client.start_training(corpus.corpus_id, "m").run_id
    assert run("runs", "delete", held).exit_code == 2
    assert run("runs", "pause", held).stdout == "paused\n"
    assert "state:         paused\n" in run("runs", "show", held).stdout
    assert run("runs", "list", "--state", "paused").stdout.startswith(held)
    assert run("runs", "resume", held).stdout == "queued\n"
    fake.release(held)
    step, epoch, bleu, pairs, best, size, written = run("runs", "checkpoints", held).stdout.rstrip("\n").split("\t")
    assert (step, epoch, bleu, pairs, best, size) == ("4", "1", "31.5", "2", "best", "12.0 MB")
    assert written.endswith("+00:00")
    refused = run("runs", "pause", held)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert run("runs", "delete", held).stdout == "deleted\n"
    assert run("runs", "show", held).exit_code == 2


def test_train_fine_tunes_initial_model(run, fake, client, corpus):
    client.start_training(corpus.corpus_id, "base")
    started = run(
        "train", corpus.corpus_id, "m", "--initial-model", "base", "--keep-optimizer", "--processes", "2"
    ).stdout.strip()
    tuned = client.get_training_run(started)
    assert (tuned.initial_model, tuned.processes) == ("base/1", 2)
    shown = run("runs", "show", started).stdout
    assert "starts from:   base/1 with its optimizer\n" in shown
    assert "processes:     2\n" in shown
    afresh = run("train", corpus.corpus_id, "m", "--initial-model", "base").stdout.strip()
    assert "starts from:   base/1\n" in run("runs", "show", afresh).stdout
    missing = run("train", corpus.corpus_id, "m", "--initial-model", "nobody")
    assert (missing.exit_code, missing.stderr) == (2, "Error: model 'nobody' not found\n")


def test_models_list_show(run, fake):
    version = fake.add_model("en-de")
    assert run("models", "list").stdout.startswith("en-de/1\ten-de\t31.5\t2\t1,000,000\t")
    shown = run("models", "show", "en-de").stdout
    assert version.digest in shown
    assert "BLEU:          31.5 (2 pairs)\n" in shown
    assert "int8:          -0.25 BLEU against fp32 (1,000 pairs)\n" in shown
    missing = run("models", "show", "xx")
    assert (missing.exit_code, missing.stderr) == (2, "Error: model 'xx' not found\n")


@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        (None, "-"),
        (Int8Outcome(pairs=0, kept=True), "not measured"),
        (Int8Outcome(pairs=9, kept=True, fp32_bleu=30.0, int8_bleu=30.1), "+0.10 BLEU against fp32 (9 pairs)"),
        (
            Int8Outcome(pairs=9, kept=False, fp32_bleu=30.0, int8_bleu=29.0),
            "-1.00 BLEU against fp32 (9 pairs), not published",
        ),
        (Int8Outcome(pairs=9, kept=True, fp32_bleu=30.001, int8_bleu=30.0), "+0.00 BLEU against fp32 (9 pairs)"),
    ],
)
def test_models_show_prints_effect_of_int8(outcome, shown):
    assert int8_text(outcome) == shown


def test_models_list_warns_about_scores_that_are_not_comparable(fake):
    version = fake.add_model("en-de")
    other = replace(version, name="other", scores=replace(version.scores, translated_pairs=500))
    chars = replace(version, name="chars", scores=replace(version.scores, bleu_signature="tok:char"))
    elsewhere = replace(other, target_language="fr")
    assert list(score_warnings([version, version, elsewhere])) == []
    [warning] = score_warnings([version, other])
    assert warning == (
        "the en-de scores of en-de/1, other/1 are not comparable: they are of different numbers of pairs (2, 500)"
    )
    [warning] = score_warnings([version, chars])
    assert warning.endswith("not comparable: they are of different or unknown signatures")
    [warning] = score_warnings([version, replace(version, corpus_id="cor_0000000000000000000009")])
    assert warning.endswith("not comparable: they are validated on different corpora")
    unknown = replace(version, scores=replace(version.scores, translated_pairs=0))
    [warning] = score_warnings([unknown, unknown])
    assert warning.endswith("of different numbers of pairs (unknown)")


def test_models_alias_sets_and_deletes(run, fake):
    fake.add_model("en-de"), fake.add_model("en-de")
    assert run("models", "alias", "en-de", "production", "1").stdout == "en-de@production is en-de/1\n"
    assert run("models", "alias", "en-de", "canary", "2").exit_code == 0
    assert "aliases:       canary → 2, production → 1\n" in run("models", "show", "en-de@production").stdout
    assert "model:         en-de/1\n" in run("models", "show", "en-de@production").stdout
    assert run("translate", "en-de@canary", "x").stdout == "X\n"
    assert run("models", "alias", "en-de", "production", "--delete").stdout == "deleted\n"
    for wrong in (["en-de", "production"], ["en-de", "canary", "1", "--delete"], ["en-de", "x", "3"]):
        refused = run("models", "alias", *wrong)
        assert (refused.exit_code, refused.stdout) == (2, "")
    assert "aliases:       canary → 2\n" in run("models", "show", "en-de").stdout


def test_models_delete_removes_version(run, fake):
    fake.add_model("en-de"), fake.add_model("en-de")
    run("models", "alias", "en-de", "production", "1")
    refused = run("models", "delete", "en-de/1")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "production" in refused.stderr
    assert run("models", "delete", "en-de/2").stdout == "deleted\n"
    assert run("models", "list").stdout.startswith("en-de/1\t")


def test_models_download_creates_folder(run, fake, tmp_path):
    fake.add_model("en-de")
    folder = tmp_path / "bundle"
    downloaded = run("models", "download", "en-de", str(folder))
    assert downloaded.stdout == f"en-de/1: 4.0 MB in {folder}\n"
    assert (folder / "manifest.json").exists()
    again = run("models", "download", "en-de", str(folder))
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == f"Error: {folder} already exists; choose a new folder\n"


def test_models_load_list_unload(run, fake):
    fake.add_model("a"), fake.add_model("b")
    assert run("models", "load", "a").stdout == "a/1: 4.0 MB, loaded in 0.5 s\n"
    run("models", "load", "b")
    assert run("models", "list", "--loaded").stdout == "b/1\t4.0 MB\t0.5 s\na/1\t4.0 MB\t0.5 s\n"
    assert [run("models", "unload", "b").stdout for _ in range(2)] == ["unloaded\n", "was not loaded\n"]
    assert run("models", "load", "c").exit_code == 2


def test_translate_arguments_and_lines(run, fake):
    fake.add_model("m")
    assert run("translate", "m", "ein satz", "noch einer").stdout == "EIN SATZ\nNOCH EINER\n"
    lines = [f"zeile {i}" for i in range(130)]
    fake.calls.clear()
    result = run("translate", "m", stdin="\n".join(lines))
    assert result.stdout.splitlines() == [line.upper() for line in lines]
    assert fake.calls == ["StreamTranslate"]
    assert run("translate", "m", stdin="a\n\nb\n").stdout == "A\n\nB\n"
    assert run("translate", "m", "x", "--n-best", "2").stdout == "0\t-0.1000\tX\n0\t-0.2000\tX\n"
    objects = [json.loads(line) for line in run("translate", "m", "--json", stdin="ä\nb\n").stdout.splitlines()]
    assert [(o["source"], o["hypotheses"][0]["text"]) for o in objects] == [("ä", "Ä"), ("b", "B")]
    objects.append(json.loads(run("translate", "m", "x", "--json").stdout))
    assert [o["model"] for o in objects] == ["m/1"] * 3, "so a rollout can be watched"


def test_translate_many_lines_in_order(run, fake):
    fake.add_model("m")
    lines = [f"zeile {i}" for i in range(3000)]
    result = run("translate", "m", stdin="\n".join(lines))
    assert result.stdout.splitlines() == [line.upper() for line in lines]


def test_translate_options_reach_the_server(run, fake):
    fake.add_model("m")
    words = ["--beam-size", "2", "--n-best", "2", "--length-penalty", "0.5", "--max-length", "9", "--min-length", "1"]
    words += ["--max-length-ratio", "1.5", "--beam-patience", "2", "--early-stopping", "optimal", "--prefix", "Der"]
    words += ["--repetition-penalty", "1.1", "--no-repeat-ngram-size", "3", "--token-scores", "--alignment", "--json"]
    for stdin, arguments in ((None, ["hund"]), ("hund\n", [])):
        result = run("translate", "m", *arguments, *words, stdin=stdin)
        assert result.exit_code == 0, result.stderr
        [found] = [json.loads(line) for line in result.stdout.splitlines()]
        assert len(fake.translate_options[-1]) == 12
        assert fake.translate_options[-1]["early_stopping"] == "optimal"
        assert [hypothesis["text"] for hypothesis in found["hypotheses"]] == ["Der HUND"] * 2
        assert found["hypotheses"][0]["pieces"] == ["Der", "HUND", "</s>"]
        assert found["hypotheses"][0]["alignment"] == [0, 1, 2]
        assert found["source_pieces"] == ["hund", "</s>"]


def test_any_sampling_option_implies_sampling(run, fake):
    fake.add_model("m")
    for words in (["--sample"], ["--temperature", "0.5"], ["--top-k", "3"], ["--top-p", "0.9"], ["--seed", "7"]):
        assert run("translate", "m", "x", *words, "--n-best", "2").exit_code == 0
    assert all("sampling" in options for options in fake.translate_options)
    assert fake.translate_options[4] == {"n_best": 2, "sampling": Sampling(seed=7)}
    run("translate", "m", "x", "--split")
    assert fake.translate_options[5] == {}


def test_untranslatable_line_prints_empty_line(run, fake):
    def translate(sentence):
        if sentence == "bad":
            raise errors.InvalidSentence("has 300 subwords")
        return sentence.upper()

    fake.translate = translate
    fake.add_model("m")
    result = run("translate", "m", stdin="good\nbad\nlast\n")
    assert (result.exit_code, result.stdout) == (2, "GOOD\n\nLAST\n")
    assert result.stderr == "line 2: INVALID_SENTENCE: has 300 subwords\n"
    result = run("translate", "m", "--json", stdin="bad\n")
    error = {"reason": "INVALID_SENTENCE", "message": "has 300 subwords"}
    assert json.loads(result.stdout) == {"source": "bad", "model": "m/1", "error": error}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"\xff", "is not UTF-8: invalid start byte (byte 1); convert it to UTF-8, such as with iconv"),
        (b"caf\xe9", "is not UTF-8: unexpected end of data (byte 4); convert it to UTF-8, such as with iconv"),
        (b"x" * 2_000_000, "has 2,000,000 bytes, at most 1,048,576 are allowed; split the line"),
    ],
)
def test_line_that_is_not_text_leaves_others_intact(run, fake, line, problem):
    fake.add_model("m")
    result = run("translate", "m", stdin=b"good\n" + line + b"\nlast\n" + line)
    assert (result.exit_code, result.stdout) == (2, "GOOD\n\nLAST\n\n")
    assert result.stderr == f"line 2: INVALID_SENTENCE: {problem}\nline 4: INVALID_SENTENCE: {problem}\n"
    result = run("translate", "m", "--json", "--prefix", "Der", stdin=line)
    assert json.loads(result.stdout)["error"] == {"reason": "INVALID_SENTENCE", "message": problem}


def test_byte_order_mark_at_start_is_ignored(run, fake, corpus, tmp_path):
    fake.add_model("m")
    translated = run("translate", "m", stdin=b"\xef\xbb\xbfRoom 984\r\n\xef\xbb\xbfb\r\n")
    assert translated.stdout == "ROOM 984\n\ufeffB\n", "only at the start"
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbfseed = 5\r\n")
    checked = run("train", corpus.corpus_id, "m", "--recipe", str(tmp_path / "r.toml"), "--validate-only")
    assert checked.stdout == "seed = 5\n"


def test_all_violations_are_printed_without_stack_trace(run, corpus):
    result = run("train", corpus.corpus_id, "m", "--set", "model.norm=mid", "--set", "model.d_model=1.5")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: 2 violations:\n"
        "  model.d_model: is 1.5, must be a whole number from -2,147,483,648 to 2,147,483,647\n"
        "  model.norm: is 'mid', must be one of post, pre, deep\n"
    )


def test_violations_name_options(run, fake):
    fake.add_model("m")
    result = run("translate", "m", "x", "--seed", "-1", "--beam-size", str(2**40))
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: 2 violations:\n"
        "  --beam-size: is 1099511627776, must be a whole number from -2,147,483,648 to 2,147,483,647\n"
        "  --seed: is -1, must be a whole number from 0 to 18,446,744,073,709,551,615\n"
    )
    violations = [
        errors.Violation(field=field, description="is odd")
        for field in ("config.options.sampling.top_k", "config.window", "recipe.model.heads", "sentences[1]", "run_id")
    ]
    fake.fail_next(
        "Translate", errors.InvalidRequest("x", violations=violations, metadata={"violations_total": "1024"})
    )
    told = [line.strip() for line in run("translate", "m", "x").stderr.splitlines()]
    assert told[0] == "Error: 1,024 violations, the first 5:"
    assert [line.partition(": ")[0] for line in told[1:]] == ["--top-k", "--window", "model.heads", "sentence 2", "RUN"]


def test_all_invalid_options_are_reported_at_once(run):
    result = run("schedule", "--kind", "foo", "--decay-shape", "bar", "--warmup-steps", "0", "--preset", "base")
    assert result.exit_code == 2
    assert all(word in result.stderr for word in ("'--kind'", "'--decay-shape'", "'--warmup-steps'"))
    assert "3 errors" in result.stderr
    assert "'--preset'" not in result.stderr


def test_unreachable_server_error_names_server_option(run):
    result = run("--server", "127.0.0.1:1", "models", "list")
    cure = "start one with `ferryman-service serve`, or pass --server HOST:PORT"
    message = f"Error: cannot reach a service at 127.0.0.1:1 (connection refused); {cure}\n"
    assert (result.exit_code, result.stderr) == (1, message)
    result = run("--server", "http://localhost:50051", "models", "list")
    message = "--server: is 'http://localhost:50051', must be HOST:PORT, without http://; write localhost:50051"
    assert (result.exit_code, result.stderr) == (2, f"Error: {message}\n")


def test_error_includes_request_id(run, fake):
    fake.fail_next("Translate", errors.QueueFull("full", request_id="r-17"), times=2)
    fake.fail_next("StreamTranslate", errors.FerrymanError("internal", request_id="r-18"))
    assert run("translate", "m", "x").stderr == "Error: full [request r-17]\n"
    failed = run("translate", "m", "x", "--json")
    assert json.loads(failed.stdout) == {"error": {"reason": "QUEUE_FULL", "message": "full", "request_id": "r-17"}}
    assert failed.stderr == "Error: full [request r-17]\n"
    assert json.loads(run("translate", "m", "--json", stdin="x\n").stdout)["error"]["request_id"] == "r-18"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidSentence("bad"), 2),
        (errors.RoleNotServed("no"), 2),
        (errors.RequestIdReused("twice"), 2),
        (errors.TooManyRuns("full"), 1),
        (errors.DeadlineExceeded("late"), 1),
        (errors.ModelDamaged("broken"), 1),
        (errors.FerrymanError("internal"), 1),
    ],
)
def test_exit_status_separates_usage_and_server_errors(run, fake, error, status):
    fake.fail_next("Translate", error)
    result = run("translate", "m", "x")
    assert (result.exit_code, result.stderr) == (status, f"Error: {error.message}\n")

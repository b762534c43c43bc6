"""Which model the serving benchmarks take, and when they train one."""

import json
import random

import pytest

from bench.shared import trained_model
from bench.shared.trained_model import (
    ModelUnfit,
    digest_of,
    fault_of,
    left_bundles,
    recipe_fault,
    task_of,
    trained_bundle,
)
from ferryman_service.bundle.manifest import FORMAT_VERSION
from ferryman_service.domain.recipe import recipe_to_dict, resolve_recipe

LINEAR = {"kind": "linear", "warmup_steps": 10, "peak_learning_rate": 0.004, "total_steps": 100}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_corpus(folder, test_name="test_2016_flickr", line="a line"):
    folder.mkdir(exist_ok=True)
    for name in ("train", "val", test_name):
        for language in ("en", "de"):
            (folder / f"{name}.{language}").write_text(f"{line}\n")
    return folder


def write_bundle(folder, digest, *, bleu=35.0, step=100, **recipe):
    recipe = recipe_to_dict(resolve_recipe({"preset": "tiny", "schedule": LINEAR, **recipe}))
    lineage = {"corpus_digest": digest, "source_language": "en", "target_language": "de", "recipe": recipe}
    folder.mkdir(parents=True)
    header = {"lineage": lineage, "scores": {"bleu": bleu, "step": step}}
    (folder / "manifest.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "header": header}))
    return folder


@pytest.fixture
def task(tmp_path):
    """A corpus that is named as Multi30k is, so that the bound of its BLEU holds."""
    return task_of(write_corpus(tmp_path / "data"), "en", "de")


@pytest.fixture
def left(tmp_path):
    return tmp_path / trained_model.QUALITY_OUTPUT / "data/models" / trained_model.QUALITY_MODEL_NAME


def test_good_model_of_bench_quality_is_used(task, left):
    write_bundle(left / "9", digest_of(task))
    wanted = write_bundle(left / "10", digest_of(task))
    assert trained_bundle(None, task).resolve() == wanted


def test_newer_model_with_lower_bleu_is_skipped(task, left, capsys):
    wanted = write_bundle(left / "1", digest_of(task), bleu=28.0)
    write_bundle(left / "2", digest_of(task), bleu=27.9)
    assert trained_bundle(None, task).resolve() == wanted
    assert "bench/2 has validation BLEU 27.9, less than 28" in capsys.readouterr().out


def test_newer_model_of_another_size_is_skipped(task, left, capsys):
    wanted = write_bundle(left / "1", digest_of(task))
    write_bundle(left / "2", digest_of(task), model={"decoder_layers": 2})
    assert trained_bundle(None, task).resolve() == wanted
    assert "bench/2 has model.decoder_layers 2, not 4" in capsys.readouterr().out


def test_model_of_serving_benchmarks_is_reused(task, tmp_path):
    wanted = write_bundle(
        tmp_path / trained_model.OUTPUT / "data/models" / trained_model.MODEL_NAME / "1", digest_of(task)
    )
    assert [bundle.resolve() for bundle in left_bundles()] == [wanted]
    assert trained_bundle(None, task).resolve() == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "00" * 32}, "was trained on another corpus (en-de) than DATA"),
        ({"bleu": 12.0}, "has validation BLEU 12.0, less than 28"),
        ({"model": {"decoder_layers": 2}}, "has model.decoder_layers 2, not 4"),
        ({"data": {"vocabulary_size": 4000}}, "has data.vocabulary_size 4000, not 8000"),
    ],
)
def test_unfit_model_is_reported_with_its_fault(task, tmp_path, change, said):
    bundle = write_bundle(tmp_path / "bundle", **{"digest": digest_of(task)} | change)
    assert (fault_of(bundle, task, digest_of(task)) or recipe_fault(bundle, task)) == said


def test_model_of_another_corpus_needs_decayed_rate(tmp_path):
    """Nobody knows what BLEU is good there."""
    task = task_of(write_corpus(tmp_path / "data", "test"), "en", "de")
    digest = digest_of(task)
    ended = write_bundle(tmp_path / "ended", digest, bleu=3.0, step=80)
    assert (fault_of(ended, task, digest), recipe_fault(ended, task)) == (None, None)
    cut_off = write_bundle(tmp_path / "cut-off", digest, step=79)
    assert recipe_fault(cut_off, task) == "has weights of step 79, whose learning rate had not decayed"
    noam = write_bundle(tmp_path / "noam", digest, schedule={"kind": "noam"}, step=10_000)
    assert "had not decayed" in recipe_fault(noam, task)
    assert trained_bundle(noam, task) == noam


def test_model_of_command_line_may_have_any_size(task, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", digest_of(task), model={"decoder_layers": 2})
    assert trained_bundle(bundle, task) == bundle


def test_unfit_model_of_command_line_is_refused(task, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", "00" * 32)
    with pytest.raises(ModelUnfit, match=r"another corpus .* leave MODEL out"):
        trained_bundle(bundle, task)
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json: pass MODEL=folder of a bundle"):
        trained_bundle(tmp_path, task)


def test_digest_depends_on_text_and_languages(tmp_path):
    data = write_corpus(tmp_path / "data")
    other = write_corpus(tmp_path / "other", line="another line")
    digests = {digest_of(task_of(folder, *pair)) for folder in (data, other) for pair in (("en", "de"), ("de", "en"))}
    assert len(digests) == 4


@pytest.mark.full
def test_missing_model_is_trained_once(tmp_path, monkeypatch, capfd):
    data = tmp_path / "data"
    data.mkdir()
    generator = random.Random(1)
    for name, count in (("train", 3000), ("val", 4), ("test", 4)):
        for language in ("en", "de"):
            words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(6 * count)]
            lines = (" ".join(words[6 * number :][:6]) for number in range(count))
            (data / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines))
    task = task_of(data, "en", "de")
    monkeypatch.setattr(trained_model, "UPDATES", 2)
    first = trained_bundle(None, task)
    assert "training a model for the serving benchmarks, once: 2 updates" in capfd.readouterr().out
    assert trained_bundle(None, task) == first
    assert "training a model" not in capfd.readouterr().out
    assert trained_model.model_facts(first)["step"] == 2

"""The quality benchmark: its corpus, what it makes of two courses of training, and the whole of it in small."""

from dataclasses import replace

import pytest

from bench.quality import bleu as quality
from bench.quality.bleu import Outcome, Plan
from bench.quality.peer import PlainRecipe, Point, read_outcome
from bench.shared.corpus import Corpus, find_corpus
from examples.parallel_text import ParallelLines, TextMissing
from ferryman.types import DataRecipe, ModelRecipe, OptimizationRecipe, Recipe, StopRecipe, ValidationRecipe
from tests.system.conftest import reversal_corpus

PLAN = Plan(
    name="quality",
    source="en",
    target="de",
    recipe=quality.FULL_RECIPE,
    plain=quality.PLAIN_RECIPE,
    seconds=900.0,
    turns=3,
    has_target=True,
)


def write_corpus(folder, test_name):
    for name in ("train", "val", test_name):
        for language in ("en", "de"):
            (folder / f"{name}.{language}").write_text(f"{name} {language}\n")


@pytest.mark.parametrize("test_name", ["test_2016_flickr", "test"])
def test_corpus_is_found_by_file_names(tmp_path, test_name):
    write_corpus(tmp_path, test_name)
    corpus = find_corpus(tmp_path, "en", "de")
    assert corpus.test_name == test_name
    assert corpus.test.target == [f"{test_name} de"]
    assert corpus.train.source == tmp_path / "train.en"


def test_folder_without_test_files_is_refused(tmp_path):
    with pytest.raises(TextMissing, match="pass DATA=folder"):
        find_corpus(tmp_path, "en", "de")


def test_quick_form_is_shorter_unless_minutes_are_given():
    assert quality.parse([]).minutes == 15
    assert quality.parse(["--quick"]).minutes == 6
    assert quality.parse(["--quick", "--minutes", "2"]).minutes == 2


@pytest.mark.parametrize(
    ("test_name", "arguments", "name", "has_target"),
    [
        ("test_2016_flickr", [], "quality", True),
        ("test_2016_flickr", ["--quick"], "quality-quick", True),
        ("test", [], "quality", False),
        ("test_2016_flickr", ["--minutes", "2"], "quality", False),
        ("test_2016_flickr", ["--preset", "tiny"], "quality", False),
        ("test_2016_flickr", ["--target", "fr"], "quality-en-fr", False),
    ],
)
def test_only_the_known_task_has_a_target(tmp_path, test_name, arguments, name, has_target):
    write_corpus(tmp_path, test_name)
    corpus = find_corpus(tmp_path, "en", "de")
    plan = quality.plan_of(quality.parse(arguments), corpus)
    assert (plan.name, plan.has_target) == (name, has_target)


def test_preset_replaces_our_recipe(tmp_path):
    write_corpus(tmp_path, "test")
    plan = quality.plan_of(quality.parse(["--preset", "base"]), find_corpus(tmp_path, "en", "de"))
    assert plan.recipe == Recipe(preset="base")


def test_our_limit_of_time_leaves_room_for_the_starts_of_workers():
    recipe = quality.with_time(PLAN, start_s=8.0)
    assert recipe.stop.max_duration_s == 900 - 3 * (1.25 * 8 + 1)
    assert recipe.model == PLAN.recipe.model


def test_limits_of_the_recipe_stay():
    assert quality.with_time(TOY, start_s=8.0) == TOY.recipe


def point(seconds, bleu):
    return Point(seconds=seconds, step=int(seconds), bleu=bleu, nll_per_token=2.0)


PEER = Outcome(seconds=901.0, steps=900, curve=[point(600, 30.0), point(900, 32.0)], bleu=31.0, chrf=50.0)
OURS = Outcome(seconds=900.5, steps=900, curve=[point(500, 31.0), point(600, 32.0)], bleu=32.5, chrf=51.0)


def compared(ours=OURS, peer=PEER, plan=PLAN):
    corpus = Corpus(train=None, validation=None, test=ParallelLines(source=[], target=[]), test_name="test_2016_flickr")
    return quality.result(plan, corpus, ours, peer, selected=peer.curve[-1], details={})


def test_target_is_plain_loop_plus_advantage():
    result = compared()
    assert result.ok
    assert (result.value, result.peer.value) == (32.5, 31.0)
    assert result.target == 31.0 + quality.TARGET_ADVANTAGE_BLEU
    assert result.details["time_ratio"] == 1.5
    assert not compared(replace(OURS, bleu=31.9)).ok


def test_reaching_the_plain_loops_bleu_late_misses_the_target():
    assert not compared(replace(OURS, curve=[point(901, 32.0)])).ok
    assert not compared(replace(OURS, curve=[point(700, 31.9)])).ok


def test_more_wall_time_than_the_plain_loop_misses_the_target():
    assert not compared(replace(OURS, seconds=PEER.seconds + 0.1)).ok


def test_unknown_task_has_no_target():
    worse = replace(OURS, bleu=10.0, curve=[point(800, 10.0)])
    result = compared(worse, plan=replace(PLAN, has_target=False))
    assert (result.ok, result.target) == (True, None)


@pytest.fixture
def toy_corpus(tmp_path):
    for name, count, seed in (("train", 1000, 1), ("val", 20, 2), ("test", 10, 3)):
        pairs = reversal_corpus(count, seed)
        for language, side in (("en", 0), ("de", 1)):
            (tmp_path / f"{name}.{language}").write_text("".join(f"{pair[side]}\n" for pair in pairs))
    return find_corpus(tmp_path, "en", "de")


TOY = Plan(
    name="toy",
    source="en",
    target="de",
    recipe=Recipe(
        model=ModelRecipe(d_model=32, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=64, dropout=0.0),
        data=DataRecipe(vocabulary_size=50, max_sentence_tokens=64),
        optimization=OptimizationRecipe(batch_target_tokens=512),
        stop=StopRecipe(max_steps=20),
        validation=ValidationRecipe(interval_steps=10, max_translated_pairs=10),
    ),
    plain=PlainRecipe(peak_learning_rate=0.004, norm_first=False, max_tokens=256, validations=2),
    seconds=6.0,
    turns=2,
    has_target=True,
)
TOY_TASK = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "heads": 2,
    "ffn_dim": 64,
    "dropout": 0.0,
    "vocabulary": 50,
    "label_smoothing": 0.1,
    "clip_norm": 1.0,
    "max_tokens": 256,
    "norm_first": False,
}


@pytest.mark.full
def test_whole_benchmark_runs_in_small(tmp_path, toy_corpus):
    output = tmp_path / "output"
    result = quality.measure(toy_corpus, TOY, output)
    ours, peer = result.details["ferryman"], result.details["plain_loop"]
    assert ours["steps"] == 20
    assert [step for _, step, _ in ours["validation"]] == [10, 20]
    assert result.details["plain_job"]["task"] == TOY_TASK
    assert peer["steps"] == peer["validation"][-1][1] > 0
    assert ours["seconds"] <= peer["seconds"]
    assert len(read_outcome(output / "plain-loop").translations) == 10
    assert len((output / "translations.txt").read_text().splitlines()) == 10
    assert 0 < result.details["worker_start_s"] < ours["seconds"]
    assert result.target == pytest.approx(result.peer.value + quality.TARGET_ADVANTAGE_BLEU, abs=1e-3)


@pytest.mark.full
def test_peak_is_chosen_on_validation_only(tmp_path, toy_corpus, capsys):
    quality.choose_peak(toy_corpus, TOY, seconds=0.1, output=tmp_path / "choice", choices=[TOY.plain])
    titles, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (titles[0], row[:2]) == ("norm", ["post", "0.004"])
    assert read_outcome(tmp_path / "choice" / "plain-loop").translations == []

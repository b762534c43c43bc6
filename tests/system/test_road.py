"""The whole road through the real service: corpus → training → metrics → ONNX → translation."""

import math
import urllib.request

import pytest

from ferryman.v1 import metrics_pb2, model_pb2, training_pb2, translation_pb2
from tests.system.conftest import reversal_corpus

pytestmark = pytest.mark.system

STATES = ["QUEUED", "STARTING", "RUNNING", "EXPORTING", "SUCCEEDED"]


def test_the_records_are_numbered_without_gap_and_tell_the_whole_story(road):
    _, stubs, run, records = road
    assert [record.sequence for record in records] == list(range(1, run.last_sequence + 1))
    states = [record.state_change.state for record in records if record.HasField("state_change")]
    assert [metrics_pb2.RunState.Name(state).removeprefix("RUN_STATE_") for state in states] == STATES
    steps = [record.step.step for record in records if record.HasField("step")]
    assert steps == list(range(1, 301))
    assert list(stubs.stream(run.run_id)) == records


def test_each_step_says_what_the_contract_promises(road):
    _, _, run, records = road
    for step in (record.step for record in records if record.HasField("step")):
        assert step.epoch >= 1
        assert 0 < step.nll_per_token < 20
        assert step.perplexity == pytest.approx(math.exp(step.nll_per_token))
        assert step.gradient_norm > 0
        assert 0 < step.target_tokens <= run.recipe.optimization.batch_target_tokens
        assert step.target_tokens_per_second == pytest.approx(
            step.target_tokens / (step.duration.ToNanoseconds() / 1e9)
        )
        assert 0 <= step.padding_share < 1
        assert step.memory_bytes > 10_000_000


def test_a_step_reaches_a_live_subscriber_within_a_quarter_second(road, ages_s):
    """A record's time is that of its writing, which is at most 50 ms after the step. The median: other tests may keep
    the machine busy."""
    _, _, _, records = road
    ages_of_steps_s = sorted(age for age, record in zip(ages_s, records, strict=True) if record.HasField("step"))
    assert ages_of_steps_s[len(ages_of_steps_s) // 2] < 0.2


def test_training_learns_and_validation_says_so(road):
    _, _, run, records = road
    losses = [record.step.nll_per_token for record in records if record.HasField("step")]
    assert losses[-1] < losses[0] / 2
    validations = [record.validation for record in records if record.HasField("validation")]
    assert len(validations) >= 10
    best = max((v for v in validations if v.best), key=lambda v: v.step)
    assert run.progress.best_validation == best
    assert run.progress.step == 300
    assert run.progress.fraction == 1


def test_the_learning_rate_of_every_step_is_the_schedules_to_the_last_bit(road):
    _, stubs, run, records = road
    curve = stubs.training.GetLRSchedule(
        training_pb2.GetLRScheduleRequest(run_id=run.run_id, last_step=300, max_points=300)
    )
    reported = [(record.step.step, record.step.learning_rate) for record in records if record.HasField("step")]
    assert [(point.step, point.learning_rate) for point in curve.points] == reported
    assert curve.peak.step == run.recipe.schedule.warmup_steps == 20
    assert curve.peak.learning_rate == max(rate for _, rate in reported)
    formula = [32**-0.5 * min(step**-0.5, step * 20**-1.5) for step, _ in reported]
    assert [rate for _, rate in reported] == formula


def test_the_model_is_published_with_its_lineage(road):
    _, stubs, run, _ = road
    answer = stubs.models.GetModel(model_pb2.GetModelRequest(model="reversal/1"))
    assert (answer.version.run_id, answer.version.corpus_id) == (run.run_id, run.corpus_id)
    assert answer.version.recipe == run.recipe
    assert (answer.version.source_language, answer.version.target_language) == ("xx", "yy")
    assert answer.version.parameters > 10_000
    assert answer.model.latest_version.version == run.model_version == 1
    listed = stubs.models.ListModels(model_pb2.ListModelsRequest()).models
    assert [model.name for model in listed] == ["reversal"]


def test_scores_say_of_how_many_pairs_they_are(road):
    _, stubs, run, _ = road
    version = stubs.models.GetModel(model_pb2.GetModelRequest(model="reversal")).version
    assert version.scores.translated_pairs == run.progress.best_validation.translated_pairs == 20
    request = training_pb2.ListCheckpointsRequest(run_id=run.run_id)
    assert {item.translated_pairs for item in stubs.training.ListCheckpoints(request).checkpoints} == {20}


def translate(stubs, sentences, **options):
    request = translation_pb2.TranslateRequest(model="reversal", sentences=sentences)
    for name, value in options.items():
        setattr(request.options, name, value)
    return stubs.translation.Translate(request)


def test_the_model_translates_what_it_never_saw(road):
    _, stubs, _, _ = road
    pairs = reversal_corpus(50, seed=3)
    answer = translate(stubs, [source for source, _ in pairs])
    assert answer.model == "reversal/1"
    texts = [translation.hypotheses[0].text for translation in answer.translations]
    words = [set(text.split()) & set(target.split()) for text, (_, target) in zip(texts, pairs, strict=True)]
    assert sum(map(bool, words)) > 40, list(zip(texts, pairs, strict=True))[:5]
    assert answer.timings.total.ToNanoseconds() >= answer.timings.decode.ToNanoseconds() > 0


def test_search_options_do_what_they_say(road):
    _, stubs, _, _ = road
    sentence = "ba ce di fo gu"
    best = translate(stubs, [sentence], beam_size=4, n_best=4).translations[0].hypotheses
    assert len({hypothesis.text for hypothesis in best}) == len(best) == 4
    assert [h.score for h in best] == sorted((h.score for h in best), reverse=True)
    for hypothesis in best:
        assert hypothesis.score == pytest.approx(hypothesis.log_probability / hypothesis.target_tokens, abs=1e-5)
    cut = translate(stubs, [sentence], beam_size=1, max_length=2).translations[0].hypotheses[0]
    assert (cut.target_tokens, cut.finished) == (2, False)
    empty = translate(stubs, ["", " \n ", "\u2581 \u2581", "\u200b\ufeff"]).translations
    assert [(t.hypotheses[0].text, t.source_tokens) for t in empty] == [("", 0)] * 4


def test_a_translation_does_not_depend_on_its_neighbours(road):
    _, stubs, _, _ = road
    sentences = [source for source, _ in reversal_corpus(40, seed=4)]
    together = [t.hypotheses[0].text for t in translate(stubs, sentences).translations]
    alone = [translate(stubs, [sentence]).translations[0].hypotheses[0].text for sentence in sentences]
    assert together == alone


def test_road_leaves_home_and_working_folder_alone(road, home, working_folder):
    """ONNX Runtime's telemetry keeps a device id in the home folder as soon as it is imported."""
    _, stubs, _, _ = road
    stubs.translation.Translate(translation_pb2.TranslateRequest(model="reversal", sentences=["ba ce"]))
    assert list(home.rglob("*")) == []
    assert sorted(path.suffix for path in working_folder.iterdir()) == [".py"] * 5


def test_nobody_else_can_read_what_the_service_keeps(road):
    service, _, _, _ = road
    modes = {path: path.lstat().st_mode & 0o077 for path in (service.data_dir, *service.data_dir.rglob("*"))}
    assert len(modes) > 20
    assert {path: oct(mode) for path, mode in modes.items() if mode} == {}


def test_prometheus_can_scrape(road):
    service, stubs, _, _ = road
    stubs.training.ListTrainingRuns(training_pb2.ListTrainingRunsRequest())
    with urllib.request.urlopen(service.metrics_url()) as answer:
        text = answer.read().decode()
    assert 'grpc_server_handled_total{grpc_code="OK"' in text
    assert "ferryman_training_steps_total" in text
    assert "ferryman_translate_sentences_total" in text

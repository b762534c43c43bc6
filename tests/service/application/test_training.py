"""Starting and deleting runs, on the real stores."""

import dataclasses
import threading
import uuid

import pytest

from ferryman_service.application.paging import Pager
from ferryman_service.application.run_limits import RunLimits
from ferryman_service.application.training import CurveRequest, StartRequest, TrainingUseCases
from ferryman_service.bundle.manifest import CONTENT_FILES, WEIGHTS_FILE, Architecture, ManifestHeader, seal
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.errors import (
    CorpusNotFound,
    InvalidRecipe,
    OptimizerNotKept,
    RequestIdReused,
    RunNotFinished,
    RunNotFound,
    RunStillNeeded,
    TooManyRuns,
    Violation,
)
from ferryman_service.domain.models import ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import Positions, resolve_recipe
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import ProcessIdentity, RunProgress
from ferryman_service.domain.schedule import DecayPlan, DecayReason, ScheduleKind
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.run_folders import FileRunFolders
from ferryman_service.stores.runs import SqlRunStore
from tests.fakes.databases import open_migrated

UNKNOWN = Violation(field="recipe.preset", description="is 9, must be one of …", reason="UNKNOWN_ENUM_VALUE")


class House:
    """A data folder with a corpus and the version "base/1", whose run left a checkpoint."""

    def __init__(self, root):
        self.folder = DataFolder(root)
        self.folder.create()
        self.database = open_migrated(self.folder.database)
        self.runs = SqlRunStore(self.database)
        self.corpora = FileCorpusStore(self.database, self.folder, CorpusLimits())
        self.models = FileModelStore(self.database, self.folder, examine=lambda bundle: None)
        self.folders = FileRunFolders(self.folder)
        upload = self.corpora.begin_upload(
            CorpusHeader(display_name="", source_language="en", target_language="de"), ""
        )
        for split in Split:
            upload.add_pairs(split, [SentencePair(source="one", target="eins")])
        self.corpus_id = upload.finish().corpus_id
        self.source = self.use_cases().start(self.request(model_name="base")).run_id
        self.leave_checkpoint(self.source)
        self.runs.request_cancel(self.source)
        self.publish()

    def use_cases(self, folders=None, **limits):
        return TrainingUseCases(
            runs=self.runs,
            folders=folders or self.folders,
            corpora=self.corpora,
            models=self.models,
            pager=Pager(b"key"),
            served=True,
            limits=RunLimits(**{"max_processes": 4} | limits),
        )

    def request(self, **fields):
        values = {"request_id": "", "corpus_id": self.corpus_id, "model_name": "m", "recipe": {}}
        return StartRequest(**values | {"validate_only": False} | fields)

    def leave_checkpoint(self, run_id):
        (self.folder.run_dir(run_id) / "checkpoints" / "step-0000000007").mkdir(parents=True)

    def publish(self, **model):
        """Publish the next version of "base"; the keywords are its network's."""
        bundle = self.folder.root / f"elsewhere-{uuid.uuid4()}"
        bundle.mkdir()
        for name in (*CONTENT_FILES, WEIGHTS_FILE):
            (bundle / name).write_text(name)
        lineage = ModelLineage(
            run_id=self.source,
            corpus_id=self.corpus_id,
            corpus_digest="00" * 32,
            source_language="en",
            target_language="de",
            recipe=resolve_recipe({"model": model}),
        )
        scores = ModelScores(bleu=1.0, chrf=2.0, nll_per_token=3.0, weights=PublishedWeights.CHECKPOINT, step=1)
        network = lineage.recipe.model
        architecture = Architecture(
            d_model=network.d_model,
            decoder_layers=network.decoder_layers,
            heads=network.heads,
            vocabulary_size=32,
            rotates=network.positions is Positions.ROPE,
        )
        header = ManifestHeader(
            lineage=lineage, scores=scores, parameters=7, max_sentence_tokens=64, architecture=architecture
        )
        seal(bundle, header)
        return self.models.import_bundle(bundle, "base")


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.database.dispose()


def tuning(house, **fields):
    """A request that says all that can be checked."""
    return house.request(
        **{
            "request_id": str(uuid.uuid4()),
            "initial_model": "base",
            "keep_optimizer": True,
            "processes": 4,
            "recipe": {"model": {"d_model": 128}},
        }
        | fields
    )


def lose_the_weights(house):
    (house.models.bundle_dir(house.models.get("base").latest_version) / WEIGHTS_FILE).unlink()


def lose_the_model(house):
    with house.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM model_versions")


def lose_the_corpus(house):
    with house.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM corpora")


@pytest.mark.parametrize(
    ("change", "limits"),
    [
        (lambda house: house.folders.delete(house.source), {}),
        (lambda house: house.publish(d_model=256, heads=4), {}),
        (lose_the_weights, {}),
        (lose_the_model, {}),
        (lose_the_corpus, {}),
        (lambda house: None, {"max_processes": 1}),
        (lambda house: None, {"max_queued": 1}),
    ],
    ids=["no checkpoints", "a newer version", "no weights", "no model", "no corpus", "fewer processes", "full queue"],
)
def test_a_request_id_finds_its_run_whatever_has_changed(house, change, limits):
    request = tuning(house)
    first = house.use_cases().start(request)
    change(house)
    changed = house.use_cases(**limits)
    assert dataclasses.replace(changed.start(request), corpus_deleted=False) == first
    with pytest.raises(RequestIdReused):
        changed.start(dataclasses.replace(request, model_name="another"))


def test_a_known_request_id_with_content_that_is_wrong_is_reused(house):
    """What is unknown to the server is left out of the parsed recipe, but makes it another."""
    request = tuning(house)
    house.use_cases().start(request)
    for change in ({"model_name": "/"}, {"processes": 99}, {"unknown": [UNKNOWN]}):
        with pytest.raises(RequestIdReused):
            house.use_cases().start(dataclasses.replace(request, **change))


def test_checking_alone_does_not_look_the_request_id_up(house):
    request = tuning(house)
    house.use_cases().start(request)
    run = house.use_cases().start(dataclasses.replace(request, validate_only=True, model_name="another"))
    assert (run.run_id, run.model_name) == ("", "another")


def test_a_malformed_request_id_is_one_violation_of_many(house):
    request = tuning(house, request_id="x", processes=99, unknown=[UNKNOWN], model_name="/")
    with pytest.raises(InvalidRecipe) as caught:
        house.use_cases().start(request)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["request_id", "model_name", "processes", "recipe.preset"]


@pytest.mark.parametrize("rests", [False, True])
def test_a_run_is_kept_while_another_waits_for_its_optimizer(house, rests):
    use_cases = house.use_cases()
    needy = use_cases.start(tuning(house)).run_id
    if rests:
        use_cases.pause(needy)
    with pytest.raises(RunStillNeeded, match=needy) as caught:
        use_cases.delete(house.source)
    assert caught.value.metadata == {"run_id": house.source, "needed_by": needy}
    assert house.folders.last_checkpoint(house.source) is not None
    assert house.runs.get(house.source).state is RunState.CANCELLED


@pytest.mark.parametrize("release", ["checkpoint", "cancel"])
def test_a_run_that_nobody_needs_any_more_is_deleted(house, release):
    use_cases = house.use_cases()
    needy = use_cases.start(tuning(house)).run_id
    if release == "cancel":
        use_cases.cancel(needy)
    else:
        house.leave_checkpoint(needy)
    use_cases.delete(house.source)
    assert not house.folder.run_dir(house.source).exists()


def test_runs_that_need_no_optimizer_or_another_ones_keep_nothing(house):
    use_cases = house.use_cases()
    use_cases.start(tuning(house))
    use_cases.start(tuning(house, keep_optimizer=False))
    other = use_cases.start(house.request()).run_id
    use_cases.cancel(other)
    use_cases.delete(other)
    with pytest.raises(RunNotFound):
        use_cases.delete(other)
    running = use_cases.start(house.request()).run_id
    with pytest.raises(RunNotFinished):
        use_cases.delete(running)


def test_no_run_is_left_without_its_optimizer_by_a_deletion_at_the_same_time(house):
    outcome = []

    def delete():
        try:
            use_cases.delete(house.source)
            outcome.append("deleted")
        except RunStillNeeded:
            outcome.append("still needed")

    deletion = threading.Thread(target=delete)

    class Folders(FileRunFolders):
        """Somebody deletes the source as soon as the start has seen its checkpoint."""

        def last_checkpoint(self, run_id):
            found = super().last_checkpoint(run_id)
            if run_id == house.source:
                deletion.start()
                deletion.join(timeout=0.2)
            return found

    use_cases = house.use_cases(Folders(house.folder))
    needy = use_cases.start(tuning(house))
    deletion.join()
    assert outcome == ["still needed"]
    assert house.folders.last_checkpoint(house.source) is not None
    assert house.runs.get(needy.run_id).state is RunState.QUEUED


def test_a_run_that_is_being_deleted_gives_no_optimizer(house):
    refused = []

    class Runs(SqlRunStore):
        """Somebody starts a run as soon as the deletion is decided."""

        def delete(self, run_id):
            with pytest.raises(OptimizerNotKept) as caught:
                use_cases.start(tuning(house))
            refused.append(caught.value)
            super().delete(run_id)

    house.runs = Runs(house.database)
    use_cases = house.use_cases()
    use_cases.delete(house.source)
    assert len(refused) == 1


def test_the_folder_of_a_deleted_run_gives_no_optimizer(house):
    class Folders(FileRunFolders):
        """A folder that cannot be removed now."""

        def delete(self, run_id):
            pass

    house.use_cases(Folders(house.folder)).delete(house.source)
    assert house.folders.last_checkpoint(house.source) is not None
    with pytest.raises(OptimizerNotKept):
        house.use_cases().start(tuning(house))


WSD = {"kind": ScheduleKind.WSD, "warmup_steps": 10, "decay_share": 0.2}
BEGUN = (DecayPlan(first_step=81, last_step=100, reason=DecayReason.TIME),)


@pytest.mark.parametrize(
    ("stop", "step", "decays", "provisional"),
    [
        ({"max_steps": 1000}, 50, (), 0),
        ({"max_duration_s": 60.0}, 0, (), 1),
        ({"max_duration_s": 60.0}, 50, (), 51),
        ({"max_duration_s": 60.0}, 90, BEGUN, 91),
        ({"max_steps": 1000, "target_score": 30.0}, 50, (), 51),
        ({"max_steps": 1000, "target_score": 30.0}, 90, BEGUN, 0),
        ({"max_steps": 1000, "patience": 3}, 900, (), 0),
        ({"max_steps": 1000, "max_duration_s": 60.0}, 900, (), 901),
    ],
)
def test_curve_of_a_run_says_which_part_is_provisional(house, stop, step, decays, provisional):
    cases = house.use_cases()
    run = cases.start(house.request(recipe={"schedule": WSD, "stop": stop}))
    started = house.runs.begin_attempt(run.run_id, 0)
    house.runs.claim_attempt(run.run_id, started.attempt, ProcessIdentity(pid=1, start_ticks=1, boot_id="b"))
    house.runs.append(run.run_id, started.attempt, [], RunProgress(step=step, decays=decays))
    wanted = CurveRequest(schedule=None, recipe=None, run_id=run.run_id, first_step=0, last_step=0, max_points=0)
    curve = cases.learning_rate_curve(wanted)
    assert curve.provisional_from_step == provisional
    assert curve.decays == decays
    assert curve.points[-1] == ((100, 0.0) if decays else curve.points[-1])
    house.runs.change_state(run.run_id, started.attempt, RunState.CANCELLED)
    assert cases.learning_rate_curve(wanted).provisional_from_step == 0


def test_curve_of_a_schedule_without_steps_is_provisional(house):
    bare = CurveRequest(schedule=WSD, recipe=None, run_id=None, first_step=0, last_step=0, max_points=0)
    curve = house.use_cases().learning_rate_curve(bare)
    assert (curve.provisional_from_step, curve.points[-1]) == (1, (50_000, 1e-3))


def test_all_that_is_over_the_operators_limits_is_told_at_once(house):
    limits = {"max_parameters": 10**6, "max_batch_tokens": 2000, "max_hours": 0.5, "memory_bytes": 2**29}
    recipe = {
        "model": {"d_model": 1024, "heads": 16},
        "optimization": {"batch_target_tokens": 2001, "adam_beta1": 0.5},
        "stop": {"max_duration_s": 1801.0},
        "validation": {"keep_last": 0},
    }
    for request in (house.request(recipe=recipe), house.request(recipe=recipe, validate_only=True, model_name="")):
        with pytest.raises(InvalidRecipe) as caught:
            house.use_cases(**limits).start(request)
        found = [(violation.field, violation.reason) for violation in caught.value.violations]
        assert found[-5:] == [
            ("recipe.validation.keep_last", "OUT_OF_RANGE"),
            ("recipe.model", "OVER_LIMIT"),
            ("recipe.model", "OVER_LIMIT"),
            ("recipe.optimization.batch_target_tokens", "OVER_LIMIT"),
            ("recipe.stop.max_duration", "OVER_LIMIT"),
        ]
        text = "".join(violation.description for violation in caught.value.violations)
        for name in ("--max-parameters", "--max-batch-tokens", "--max-run-hours", "0.5 GiB of memory"):
            assert name in text
    with pytest.raises(InvalidRecipe, match=r"stop.max_duration: is not set, must be at most 1800"):
        house.use_cases(max_hours=0.5).start(house.request())
    with pytest.raises(InvalidRecipe, match="in 4 processes"):
        house.use_cases(memory_bytes=2**27).start(house.request(processes=4))
    on_the_limit = {"stop": {"max_duration_s": 1800.0}, "optimization": {"batch_target_tokens": 2000}}
    house.use_cases(max_hours=0.5, max_batch_tokens=2000, max_parameters=10**7).start(
        house.request(recipe=on_the_limit)
    )


@pytest.mark.parametrize("validate_only", [False, True])
def test_unfinished_runs_are_bounded_paused_ones_too(house, validate_only):
    run = house.use_cases(max_unfinished=1).start(house.request())
    house.runs.request_pause(run.run_id)
    with pytest.raises(TooManyRuns, match="--max-unfinished-runs"):
        house.use_cases(max_unfinished=1).start(house.request(validate_only=validate_only))
    house.runs.request_cancel(run.run_id)
    house.use_cases(max_unfinished=1).start(house.request(validate_only=validate_only))


def test_a_run_cannot_start_on_a_corpus_that_is_deleted_meanwhile(house):
    class Deleting(FileCorpusStore):
        def get(self, corpus_id):
            corpus = super().get(corpus_id)
            self.delete(corpus_id)
            return corpus

    house.corpora = Deleting(house.database, house.folder, CorpusLimits())
    with pytest.raises(CorpusNotFound):
        house.use_cases().start(house.request())

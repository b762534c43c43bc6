"""Rows of the database that hold anything: each is one bad row for every call, the supervisor and the observer."""

import json
import sqlite3
from contextlib import closing

import grpc
import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import select

from ferryman.v1 import corpus_pb2, metrics_pb2, model_pb2, training_pb2
from ferryman_service.application.supervisor import Supervisor, SupervisorConfig
from ferryman_service.domain.ids import CORPUS_PREFIX, RUN_PREFIX, new_id
from ferryman_service.domain.records import EventLevel, RunEvent, RunState
from ferryman_service.domain.threads import Threads
from ferryman_service.observability.store import StoreMetrics
from ferryman_service.observability.training import ObserverConfig, RunObserver
from ferryman_service.stores import tables
from ferryman_service.stores.database import reading
from ferryman_service.stores.run_folders import FileRunFolders
from ferryman_service.stores.run_rows import IS_THERE
from ferryman_service.stores.sweep import sweep
from ferryman_service.stores.tables import JsonText
from tests.fakes.launcher import FakeLauncher

TEXTS = [None, b"\xff\xfe", "nonsense", 2**62, -1.5]
JSONS = [None, b"\xff\xfe", 7, "{", "[]", "[" * 5000]
PARTS = [..., None, "x", 2**40, 2**70, [], {}, True, "\ud800"]
REMARK = RunEvent(level=EventLevel.INFO, code="SEEN", message="")


class House:
    """A service with a run that waits, a corpus and a model, and its database in the hands of a test."""

    def __init__(self, service):
        self.service = service
        self.path = service.folder.database
        self.execute("PRAGMA writable_schema = ON", "UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')")
        [[version]] = self.execute("PRAGMA schema_version")
        self.execute(f"PRAGMA schema_version = {version + 1}")
        self.run = service.start_run()
        service.import_model("good")
        self.alias("good", "a")

    def alias(self, name, alias):
        self.service.model_stub.SetModelAlias(model_pb2.SetModelAliasRequest(name=name, alias=alias, version=1))

    def execute(self, *statements, values=()):
        """Do what no service would; return the rows of the last statement."""
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA busy_timeout = 10000")
            *others, last = statements
            for statement in others:
                connection.execute(statement)
            rows = connection.execute(last, values).fetchall()
            connection.commit()
            return rows

    def add_damaged(self, table, keys, **fixed):
        """Add copies of the table's only row, each with one more thing wrong; `keys` makes their keys. Return how many
        there are."""
        with closing(sqlite3.connect(self.path)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = OFF")
            row = dict(connection.execute(f"SELECT * FROM {table}").fetchone())
            count = 0
            for column, value in damages(tables.metadata.tables[table], row):
                values = row | fixed | keys() | {column: value}
                names, places = ", ".join(values), ", ".join("?" * len(values))
                connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", list(values.values()))
                count += 1
            connection.commit()
        return count

    def runs(self, **fields):
        return pages(
            self.service.training_stub.ListTrainingRuns, training_pb2.ListTrainingRunsRequest, "runs", **fields
        )

    def corpora(self):
        return pages(self.service.corpus_stub.ListCorpora, corpus_pb2.ListCorporaRequest, "corpora")

    def models(self):
        return pages(self.service.model_stub.ListModels, model_pb2.ListModelsRequest, "models")

    def delete_run(self, run_id):
        self.service.training_stub.DeleteTrainingRun(training_pb2.DeleteTrainingRunRequest(run_id=run_id))


def damages(table, row):
    """Yield (column, value) for each kind of value that SQLite keeps, and for each part of a JSON that is missing,
    null, of another type, huge, or not UTF-8."""
    for column in table.columns:
        is_json = isinstance(column.type, JsonText)
        yield from ((column.name, value) for value in (JSONS if is_json else TEXTS))
        if is_json and row[column.name] is not None:
            for path in parts(json.loads(row[column.name])):
                for part in PARTS:
                    yield column.name, json.dumps(changed(json.loads(row[column.name]), path, part))


def parts(value, path=()):
    """Yield the path of each part of a JSON, but for those inside lists."""
    for key, part in value.items():
        yield (*path, key)
        if isinstance(part, dict):
            yield from parts(part, (*path, key))


def changed(value, path, part):
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if part is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = part
    return value


def pages(rpc, request, name, **fields):
    """Return what a list holds, page by page, until it ends."""
    found, token = [], ""
    for _ in range(100):
        page = rpc(request(page_size=37, page_token=token, **fields), timeout=30)
        found += getattr(page, name)
        token = page.next_page_token
        if not token:
            return found
    raise AssertionError("the pages do not end")


@pytest.fixture
def house(make_service):
    return House(make_service())


def test_whatever_its_row_holds_no_run_holds_up_another(house):
    """Lists, the supervisor, the observer and the recovery at a start."""
    service = house.service
    count = house.add_damaged("runs", lambda: {"run_id": new_id(RUN_PREFIX)}, state="paused", attempt=1)
    for order in (training_pb2.RUN_ORDER_NEWEST_FIRST, training_pb2.RUN_ORDER_OLDEST_FIRST):
        runs = house.runs(order=order)
        assert len(runs) == count + 1
        assert [run.unreadable for run in runs if run.run_id == house.run.run_id] == [""]
        assert sum(bool(run.unreadable) for run in runs) > 300
    launcher = FakeLauncher()
    bad = next(run.run_id for run in runs if "recipe is no JSON" in run.unreadable)
    launcher.alive.add((bad, 1))
    config = SupervisorConfig(exit_grace_s=0.0, leftovers_interval_s=0.0)
    supervisor = Supervisor(service.runs, launcher, config, Threads(1, "supervisor"))
    supervisor.tick()
    supervisor.tick()
    assert not launcher.started, "the worker of the run that cannot be read has the only place, and keeps it"
    assert not launcher.killed
    launcher.alive.clear()
    supervisor.tick()
    assert launcher.started == [(house.run.run_id, 1)]
    registry = CollectorRegistry()
    store = StoreMetrics(registry)
    folders = FileRunFolders(service.folder)
    RunObserver(service.runs, folders, registry, store, ObserverConfig(), Threads(1, "observer")).look()
    assert registry.get_sample_value("ferryman_training_runs", {"state": "starting"}) == 1
    service.runs.recover()
    sweep(service.database, service.folder)
    assert len(rows_of(service)) == count + 1
    house.delete_run(bad)
    assert len(rows_of(service)) == count


def rows_of(service):
    with reading(service.database) as connection:
        return connection.execute(select(tables.runs.c.run_id).where(IS_THERE)).all()


def test_whatever_its_row_holds_no_corpus_and_no_model_holds_up_another(house):
    count = house.add_damaged("corpora", lambda: {"corpus_id": new_id(CORPUS_PREFIX)})
    corpora = house.corpora()
    assert len(corpora) == count + 1
    assert [corpus.unreadable for corpus in corpora if corpus.corpus_id == house.run.corpus_id] == [""]
    assert sum(bool(corpus.unreadable) for corpus in corpora) > 30
    numbers = iter(range(10**6))
    house.add_damaged("model_versions", lambda: {"name": f"bad{next(numbers)}"})
    house.add_damaged("model_aliases", lambda: {"alias": f"bad{next(numbers)}"})
    models = {model.name: model for model in house.models()}
    assert not models["good"].latest_version.unreadable
    assert {"a"} < {alias.alias for alias in models["good"].aliases}
    assert sum(bool(model.latest_version.unreadable) for model in models.values()) > 300
    assert len(models["good"].unreadable) > 3
    house.service.models.recover()


def test_a_row_that_cannot_be_read_is_told_and_can_be_deleted(house, refused):
    service, run = house.service, house.run
    house.execute(
        "UPDATE runs SET recipe = '{}'", "UPDATE corpora SET train = 'x'", "UPDATE model_versions SET scores = NULL"
    )
    assert [bool(row.unreadable) for row in (*house.runs(), *house.corpora())] == [True, True]
    [model] = house.models()
    assert model.unreadable == ["good/1: in the database its scores is missing"]
    asked = [
        (service.training_stub.GetTrainingRun, training_pb2.GetTrainingRunRequest(run_id=run.run_id)),
        (service.training_stub.CancelTraining, training_pb2.CancelTrainingRequest(run_id=run.run_id)),
        (service.training_stub.GetLRSchedule, training_pb2.GetLRScheduleRequest(run_id=run.run_id)),
        (service.corpus_stub.GetCorpus, corpus_pb2.GetCorpusRequest(corpus_id=run.corpus_id)),
        (service.model_stub.GetModel, model_pb2.GetModelRequest(model="good")),
    ]
    for rpc, request in asked:
        refusal = refused(rpc, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "ROW_UNREADABLE")
    house.delete_run(run.run_id)
    service.corpus_stub.DeleteCorpus(corpus_pb2.DeleteCorpusRequest(corpus_id=run.corpus_id))
    service.model_stub.DeleteModelAlias(model_pb2.DeleteModelAliasRequest(name="good", alias="a"))
    service.model_stub.DeleteModelVersion(model_pb2.DeleteModelVersionRequest(model="good/1"))
    assert (house.runs(), house.corpora(), house.models()) == ([], [], [])
    assert house.execute("SELECT count(*) FROM records") == [(0,)]


def test_a_record_that_cannot_be_read_leaves_no_gap(house):
    service, run_id = house.service, house.run.run_id
    service.runs.begin_attempt(run_id, 0)
    columns = [column.name for column in tables.records.columns]
    service.runs.append(run_id, 1, [REMARK] * 6 * len(columns), None)
    service.runs.change_state(run_id, 1, RunState.CANCELLED)
    # Every second remark is damaged, each in another way.
    for number, column in enumerate(columns):
        value = "[]" if column == "payload" else None
        for kind, bad in enumerate((value, b"\xff\xfe", "nonsense")):
            sequence = 4 + 2 * (3 * number + kind)
            house.execute(
                f"UPDATE OR REPLACE records SET {column} = ? WHERE run_id = ? AND sequence = ?",
                values=(bad, run_id, sequence),
            )
    last = 3 + 6 * len(columns)
    for history_only in (False, True):
        request = training_pb2.StreamMetricsRequest(run_id=run_id, history_only=history_only)
        records = [item.record for item in service.training_stub.StreamMetrics(request, timeout=10)]
        assert [record.sequence for record in records] == list(range(1, last + 1))
        bad = [record.sequence for record in records if record.event.code == "RECORD_UNREADABLE"]
        assert bad == list(range(4, last, 2))


def test_a_stream_ends_although_the_last_record_or_the_state_is_damaged(house, refused):
    service, run_id = house.service, house.run.run_id
    service.runs.request_cancel(run_id)
    house.execute("DELETE FROM records WHERE sequence = 2")
    request = training_pb2.StreamMetricsRequest(run_id=run_id)
    assert [item.record.sequence for item in service.training_stub.StreamMetrics(request, timeout=10)] == [1]
    house.execute("UPDATE runs SET state = 'cancelle'")
    assert refused(service.training_stub.StreamMetrics, request).reason == "ROW_UNREADABLE"
    assert house.runs(states=[metrics_pb2.RUN_STATE_QUEUED]) == []


def test_aliases_of_a_model_are_bounded(house, refused):
    house.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 99) "
        "INSERT INTO model_aliases SELECT 'good', 'b' || i, 1, 1 FROM n"
    )
    house.alias("good", "b7")
    request = model_pb2.SetModelAliasRequest(name="good", alias="more", version=1)
    refusal = refused(house.service.model_stub.SetModelAlias, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_ALIASES")

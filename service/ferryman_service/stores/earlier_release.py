"""What runs of the release without restarts lack in their rows.

No migration can add it: a worker of that release outlives the service that started it, and goes on writing rows of its
own form into the migrated tables. Whoever takes its run over finds it so.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, func, select

from ferryman_service.stores import tables

_EVENTS: Final = frozenset(
    {
        "SUBWORDS_TRAINED",
        "PAIRS_DROPPED",
        "VALIDATION_PAIRS_DROPPED",
        "EARLY_STOP",
        "LIMIT_REACHED",
        "WEIGHTS_CHOSEN",
    }
)
"""The events of that release that belong to the series."""


def uncounted_reports(connection: Connection, run_id: str) -> dict[str, Any]:
    """Return the changes to a run's row that make its progress count the durable reports of the series; none if it
    does."""
    progress = connection.execute(select(tables.runs.c.progress).where(tables.runs.c.run_id == run_id)).scalar_one()
    if "reports" in progress:
        return {}
    of_run = tables.records.c.run_id == run_id
    kind, payload = tables.records.c.kind, tables.records.c.payload
    metrics = select(func.count()).select_from(tables.records).where(of_run, kind.in_(["step", "validation"]))
    events = connection.execute(select(payload).where(of_run, kind == "event")).scalars()
    reports = connection.execute(metrics).scalar_one() + sum(_code(event) in _EVENTS for event in events)
    return {"progress": progress | {"reports": reports}}


def _code(event: object) -> object:
    return event.get("code") if isinstance(event, dict) else None  # a record that cannot be read counts for nothing

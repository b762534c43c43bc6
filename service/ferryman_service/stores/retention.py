"""What goes by itself: checkpoints of runs that ended long ago, and prepared corpora beyond the operator's limit."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, select

from ferryman_service.domain.ids import RUN_PREFIX, is_id
from ferryman_service.domain.records import RunState
from ferryman_service.stores import tables
from ferryman_service.stores.database import reading
from ferryman_service.stores.folders import own_folders
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.run_folders import checkpoint_paths

_log = logging.getLogger(__name__)
_DAY_NS: Final = 24 * 3600 * 10**9
_ENDED: Final = [state.value for state in RunState if state.is_terminal]
_PREPARED: Final = re.compile(r"[0-9a-f]{40}")


def remove_old_checkpoints(engine: Engine, folder: DataFolder, keep_days: float, now_ns: int) -> None:
    """Remove the checkpoints of runs that ended over `keep_days` before `now_ns`.

    The last one of a run that made a published version stays as long as the version: fine-tuning with keep_optimizer
    starts from it, whenever somebody asks for that. No other is of use to anybody: an ended run is never resumed.
    """
    ended = _ended_before(engine, now_ns - round(keep_days * _DAY_NS))
    made_a_version = _runs_of_versions(engine)
    for path in own_folders(folder.runs, lambda name: is_id(name, RUN_PREFIX)):
        checkpoints = checkpoint_paths(folder, path.name) if path.name in ended else []
        is_needed = made_a_version is None or path.name in made_a_version
        unneeded = checkpoints[:-1] if is_needed else checkpoints
        if unneeded:
            _log.info(
                "removing %d checkpoints of %s, which ended over %g days ago", len(unneeded), path.name, keep_days
            )
        for checkpoint in unneeded:
            shutil.rmtree(checkpoint, ignore_errors=True)


def limit_prepared(prepared: Path, max_bytes: int) -> None:
    """Remove prepared corpora, the least recently used first, until they take at most `max_bytes`; one that a worker
    holds stays. A run that comes back to one makes the same again."""
    if not prepared.is_dir():
        return
    entries = [path for path in prepared.iterdir() if _PREPARED.fullmatch(path.name) and path.is_dir()]
    sizes = {path: _size_bytes(path) for path in entries}
    total = sum(sizes.values())
    used_s = {path: path.stat().st_mtime for path in entries if path.exists()}
    for path in sorted(used_s, key=used_s.__getitem__):
        if total <= max_bytes:
            return
        if _remove_unless_held(path):
            _log.info("removed the prepared corpus %s: all take over %d bytes", path.name, max_bytes)
            total -= sizes[path]


def _ended_before(engine: Engine, time_ns: int) -> set[str]:
    runs = tables.runs.c
    # A time that is no number is greater than every number: such a run keeps what it has.
    query = select(runs.run_id).where(runs.state.in_(_ENDED), runs.end_time_ns < time_ns)
    with reading(engine) as connection:
        return set(connection.execute(query).scalars())


def _runs_of_versions(engine: Engine) -> set[str] | None:
    """Return the runs that made the versions there are; None if a version cannot tell."""
    with reading(engine) as connection:
        lineages = connection.execute(select(tables.model_versions.c.lineage)).scalars().all()
    made = [lineage.get("run_id") if isinstance(lineage, dict) else None for lineage in lineages]
    return {run_id for run_id in made if isinstance(run_id, str)} if all(made) or not made else None


def _remove_unless_held(path: Path) -> bool:
    # Workers hold, find and put entries in their place under the lock of the folder above (training/prepared.py).
    with ExitStack() as opened:
        descriptors = []
        for folder in (path.parent, path):
            try:
                descriptors.append(os.open(folder, os.O_RDONLY))
            except FileNotFoundError:  # a worker was faster
                return True
            opened.callback(os.close, descriptors[-1])
        parent, entry = descriptors
        fcntl.flock(parent, fcntl.LOCK_EX)
        try:
            fcntl.flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(path, ignore_errors=True)
        return True


def _size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())

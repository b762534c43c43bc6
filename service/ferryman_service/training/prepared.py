"""Prepared corpora: subwords and tokenised training pairs, made once and shared by all runs that want them so.

An entry is a folder named by a digest of everything that it depends on. It is made under another name and then renamed,
so it is whole or not there; two workers that make it at once make the same, and the second finds its place taken.
Entries are put in their place, and removed, under a lock: nobody takes away what another has just found whole.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ferryman_service.domain.recipe import DataRecipe
from ferryman_service.domain.records import EventLevel
from ferryman_service.domain.training import TrainingJob
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.data import learn_subwords, tokenise_training_pairs
from ferryman_service.training.pairs import TokenPairs, open_pairs
from ferryman_service.training.reporting import Reporter

_FORMAT: Final = 3
_MANIFEST: Final = "prepared.json"
_SUBWORDS: Final = "subwords.model"
_PAIRS: Final = "pairs"
KEPT: Final = 16
_UNUSED_FOR_S: Final = 7 * 24 * 3600.0
_KEY_DIGITS: Final = 40
_OWN_NAME: Final = re.compile(rf"[0-9a-f]{{{_KEY_DIGITS}}}|\.[0-9a-f]{{{_KEY_DIGITS}}}-[0-9a-f]{{8}}")
"""Entries, and those in the making; what else is there is somebody else's."""


@dataclass(frozen=True)
class PreparedCorpus:
    """An entry. `remarks` says what was done and dropped: (level, code, message)."""

    folder: Path
    remarks: Sequence[tuple[EventLevel, str, str]]

    @property
    def subwords(self) -> Path:
        """The subword model."""
        return self.folder / _SUBWORDS

    def pairs(self) -> TokenPairs:
        """Return the tokenised training pairs; they stay in their files."""
        return open_pairs(self.folder / _PAIRS)

    def keep(self) -> None:
        """Say that the entry is still in use: one that nobody has used for a week may be removed."""
        with suppress(FileNotFoundError):
            os.utime(self.folder)


def prepare_corpus(job: TrainingJob, reporter: Reporter, *, threads: int) -> PreparedCorpus:
    """Return the entry for the job, made now unless it is there.

    Raises TrainingFailed, OSError, what `check` raises.
    """
    final = prepared_folder(job)
    job.prepared_dir.mkdir(parents=True, exist_ok=True)
    with _locked(job.prepared_dir):
        if (found := _open_checked(final)) is not None:
            found.keep()
            return _held(found)
        _prune(job.prepared_dir)
        is_damaged = final.exists()
    if is_damaged:
        text = "subwords and tokenised pairs of this corpus were damaged on the disk and are made again"
        reporter.event(EventLevel.WARNING, "PREPARED_CORPUS_DAMAGED", text)
    aside = job.prepared_dir / f".{final.name}-{secrets.token_hex(4)}"
    try:
        _make(aside, job, reporter, threads=threads)
        return _put_in_place(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, final: Path) -> PreparedCorpus:
    with _locked(final.parent):
        if (found := _open_checked(final)) is not None:  # another worker was faster, with the same
            return _held(found)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        aside.rename(final)
        made = open_prepared(final)
        assert made is not None, "what was just written can be read"
        return _held(made)


def _held(prepared: PreparedCorpus) -> PreparedCorpus:
    """Keep the entry from being removed as long as this process lives: the kernel drops the lock when it ends."""
    fcntl.flock(os.open(prepared.folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH)
    return prepared


def open_prepared(folder: Path) -> PreparedCorpus | None:
    """Return the entry; None if there is none, or if one of its files is not as long as it was. Digests are not
    checked: the worker that gets the entry from `prepare_corpus` has done so."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_bytes())
        intact = all((folder / name).stat().st_size == size for name, size in manifest["sizes"].items())
        remarks = [(EventLevel(level), code, text) for level, code, text in manifest["remarks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PreparedCorpus(folder, remarks) if intact else None


def _open_checked(folder: Path) -> PreparedCorpus | None:
    """Return the entry; None if there is none, or if it is not what was written, to the last byte. Reads all of it."""
    found = open_prepared(folder)
    return found if found is not None and _is_as_written(folder) else None


def _is_as_written(folder: Path) -> bool:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_bytes())
        digests, seal = manifest["sha256"], manifest.pop("seal")
        return bool(seal == _seal(manifest)) and all(_sha256(folder / name) == digests[name] for name in digests)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepared_folder(job: TrainingJob) -> Path:
    """Return where the entry for the job lies."""
    return job.prepared_dir / _key(job)


def _key(job: TrainingJob) -> str:
    """Return the digest of all that an entry depends on.

    Sampling is not among it: it begins from the text. Nor is the recipe's seed: an entry is a function of the corpus,
    so that runs with several seeds share it, and differ by their training alone.
    """
    data = {name: value for name, value in dataclasses.asdict(job.recipe.data).items() if name not in _NOT_PREPARED}
    given = "" if job.initial is None else hashlib.sha256(job.initial.subwords.read_bytes()).hexdigest()
    corpus = job.corpus_digest or job.run_id
    text = json.dumps([_FORMAT, corpus, data, given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


_NOT_PREPARED: Final = ("subword_regularization_alpha", "bpe_dropout")
# Of a corpus with more lines than the subword trainer takes, the same ones are drawn for every run.
_SAMPLE_SEED: Final = 1


def _make(folder: Path, job: TrainingJob, reporter: Reporter, *, threads: int) -> None:
    folder.mkdir()
    recipe: DataRecipe = job.recipe.data
    path = folder / _SUBWORDS
    if job.initial is None:
        subwords = learn_subwords(job.corpus, recipe, path, seed=_SAMPLE_SEED, check=reporter.check)
        remark = f"learnt {subwords.size} {recipe.subword_algorithm} subwords"
        remarks = [(EventLevel.INFO, "SUBWORDS_TRAINED", remark)]
        if subwords.size < recipe.vocabulary_size:
            text = f"the corpus yields only {subwords.size} subwords, fewer than the {recipe.vocabulary_size} asked for"
            remarks.append((EventLevel.INFO, "VOCABULARY_REDUCED", f"{text}: all of them are used"))
    else:
        shutil.copyfile(job.initial.subwords, path)
        subwords = Subwords.load(path)
        remark = f"took the {subwords.size} subwords of the model to start from"
        remarks = [(EventLevel.INFO, "SUBWORDS_TRAINED", remark)]
    dropped = tokenise_training_pairs(job.corpus, subwords, recipe, folder / _PAIRS, reporter.check, threads=threads)
    if dropped:
        remarks.append((EventLevel.WARNING, "PAIRS_DROPPED", f"dropped training pairs: {dropped}"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    digests = {str(path.relative_to(folder)): _sha256(path) for path in files}
    manifest = {"sizes": sizes, "sha256": digests, "remarks": remarks}
    (folder / _MANIFEST).write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    _sync(folder / _MANIFEST)


def _prune(parent: Path) -> None:
    """Remove the entries that nobody has used for a week, all but the last ones, and what workers that died a week ago
    have left. A run that comes back to one makes the same again."""
    ages_s = {path: _unused_for_s(path) for path in parent.iterdir() if _OWN_NAME.fullmatch(path.name)}
    entries = sorted((path for path in ages_s if not path.name.startswith(".")), key=ages_s.__getitem__)
    for path in ages_s.keys() - set(entries[:KEPT]):
        if ages_s[path] > _UNUSED_FOR_S:
            shutil.rmtree(path, ignore_errors=True)


def _unused_for_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # another worker has just given up what it was making
        return 0.0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Be the only worker that changes the folder's entries; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _seal(manifest: dict[str, Any]) -> str:
    """Return the digest of a manifest without its seal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The data folder: which path holds what.

ferryman.db                   runs, records, and the rows of corpora and models
page-token.key                secret, signs page tokens
reserve                       1 MiB that a worker frees to tell of a full disk
corpora/<corpus_id>/          the four files of a corpus
corpora/.incoming/            uploads in progress
prepared/<key>/               subwords and tokens of a corpus, for every run that wants them so
runs/<run_id>/                a run's checkpoints and logs
models/<name>/<version>/      published bundles
models/.staging/              bundles in the making
models/.imports/              bundles on their way in or out
trash/<id>/                   what was deleted; removed after a week (trash.py)
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferryman_service.domain.ids import CORPUS_PREFIX, RUN_PREFIX, is_id, is_model_name

_KEY_BYTES: Final = 32


@dataclass(frozen=True)
class DataFolder:
    """Paths below `root`. Only ids made by the server and valid model names become part of one."""

    root: Path

    def create(self) -> None:
        """Create the folders that are missing; raises OSError, which tells the cure, if they cannot be used."""
        self._refuse_other_encodings()
        try:
            for folder in (self.incoming, self.runs, self.staging, self.imports):
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        except OSError as error:
            raise OSError(
                f"the data folder {self.root.absolute()} cannot be used: {error.filename}: {error.strerror}; give "
                "--data-dir a folder that can be made and written, or let this user write there"
            ) from error

    def _refuse_other_encodings(self) -> None:
        path = str(self.root.resolve())
        try:
            path.encode()
        except UnicodeEncodeError as error:
            # The libraries that read models and corpora take paths as UTF-8 text.
            raise OSError(
                f"the data folder {path!a} cannot be used: its path is not UTF-8; rename the folder, or give "
                "--data-dir another one"
            ) from error

    @property
    def database(self) -> Path:
        """The database file."""
        return self.root / "ferryman.db"

    @property
    def reserve(self) -> Path:
        """The file that takes the room which a full disk must have left."""
        return self.root / "reserve"

    @property
    def corpora(self) -> Path:
        """The parent of all corpora."""
        return self.root / "corpora"

    @property
    def incoming(self) -> Path:
        """The parent of all uploads in progress."""
        return self.corpora / ".incoming"

    @property
    def runs(self) -> Path:
        """The parent of all run folders."""
        return self.root / "runs"

    @property
    def prepared(self) -> Path:
        """The parent of all tokenised corpora, which runs share."""
        return self.root / "prepared"

    @property
    def models(self) -> Path:
        """The parent of all models."""
        return self.root / "models"

    @property
    def staging(self) -> Path:
        """The parent of all bundles that runs are making; no model name starts with a dot."""
        return self.models / ".staging"

    @property
    def imports(self) -> Path:
        """The parent of all bundles that are being copied from elsewhere, or were deleted a moment ago."""
        return self.models / ".imports"

    @property
    def trash(self) -> Path:
        """The parent of what was deleted, for a week."""
        return self.root / "trash"

    def corpus_dir(self, corpus_id: str) -> Path:
        """Return the folder of a corpus."""
        assert is_id(corpus_id, CORPUS_PREFIX), f"not a corpus id: {corpus_id!r}"
        return self.corpora / corpus_id

    def run_dir(self, run_id: str) -> Path:
        """Return the folder of a run, for its checkpoints and logs."""
        assert is_id(run_id, RUN_PREFIX), f"not a run id: {run_id!r}"
        return self.runs / run_id

    def worker_log(self, run_id: str, attempt: int) -> Path:
        """Return the file that takes the output of an attempt's worker."""
        assert attempt >= 1, "attempts count from 1"
        return self.run_dir(run_id) / f"worker-{attempt}.log"

    def staging_dir(self, run_id: str) -> Path:
        """Return the folder where a run's bundle is made."""
        assert is_id(run_id, RUN_PREFIX), f"not a run id: {run_id!r}"
        return self.staging / run_id

    def bundle_dir(self, name: str, version: int) -> Path:
        """Return the folder of a published version."""
        assert is_model_name(name), f"not a model name: {name!r}"
        assert version >= 1, "versions count from 1"
        return self.models / name / str(version)

    def bundles(self) -> Iterator[tuple[str, int, Path]]:
        """Yield name, version and folder of every bundle that lies in its place, published or not."""
        for model in self.models.iterdir():
            for bundle in model.iterdir() if is_model_name(model.name) and model.is_dir() else ():
                if bundle.name.isascii() and bundle.name.isdigit() and bundle.is_dir():
                    yield model.name, int(bundle.name), bundle

    def page_token_key(self) -> bytes:
        """Return the secret that signs page tokens; the first call on a folder makes it, with mode 0600."""
        path = self.root / "page-token.key"
        if not path.exists():
            self._make_key(path)
        return path.read_bytes()

    def _make_key(self, path: Path) -> None:
        aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(aside, path)  # unlike a rename, a link never replaces a key that another process made meanwhile
            except FileExistsError:
                return
        finally:
            aside.unlink()

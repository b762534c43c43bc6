"""The data folder: which path holds what.

ferryman.db                   runs, records, and the rows of corpora and models
page-token.key                secret, signs page tokens
reserve                       1 MiB that a worker frees to tell of a full disk
corpora/<corpus_id>/          the four files of a corpus
corpora/.incoming/            uploads in progress
prepared/<key>/               subwords and tokens of a corpus, for every run that wants them so
runs/<run_id>/                a run's checkpoints and logs
runs/<run_id>/attempt-<n>/    temporary files of a worker, removed at its end
models/<name>/<version>/      published bundles
models/.staging/              bundles in the making
models/.imports/              bundles on their way in or out
trash/<id>/                   what was deleted, found without its row, or damaged; removed after a week (trash.py)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.ids import CORPUS_PREFIX, RUN_PREFIX, is_id, is_model_name
from ferryman_service.stores.modes import WorldWritable, close_to_others, umask_for

_log = logging.getLogger(__name__)
_KEY_BYTES: Final = 32
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class DataFolder:
    """Paths below `root`. Only ids made by the server and valid model names become part of one."""

    root: Path

    def create(self) -> None:
        """Create the folders that are missing; raises OSError, which tells the cure, if they cannot be used.

        Other users of the machine may do nothing in the data folder (stores/modes.py).
        """
        self._refuse_other_encodings()
        try:
            with contextlib.suppress(FileExistsError):
                self.root.mkdir(mode=0o700, parents=True)
            if not self.root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.root))
            close_to_others(self.root)
            mode = 0o777 & ~self.umask()
            for folder in (self.corpora, self.incoming, self.runs, self.models, self.staging, self.imports):
                folder.mkdir(mode=mode, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        except WorldWritable:
            raise
        except OSError as error:
            raise OSError(
                f"the data folder {self.root.absolute()} cannot be used: {error.filename}: {error.strerror}; give "
                "--data-dir a folder that can be made and written, or let this user write there"
            ) from error

    def umask(self) -> int:
        """Return the umask for processes that write into the folder, which must be there."""
        return umask_for(self.root)

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
        """The parent of what was moved away, until it is deleted."""
        return self.root / "trash"

    def relative(self, path: Path) -> str:
        """Return a path below the folder as it is told and announced: relative, with slashes."""
        return path.relative_to(self.root).as_posix()

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

    def scratch_dir(self, run_id: str, attempt: int) -> Path:
        """Return the folder of an attempt's temporary files."""
        assert attempt >= 1, "attempts count from 1"
        return self.run_dir(run_id) / f"attempt-{attempt}"

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
        """Yield name, version and folder of every bundle that lies in its place, published or not.

        What else lies there is nobody's; a folder that cannot be read is logged and left out.
        """
        for model in sorted(self.models.iterdir()):
            try:
                bundles = sorted(model.iterdir()) if is_model_name(model.name) and model.is_dir() else []
            except OSError as error:
                _log.warning("%s is left out: %s", model, error)
                continue
            for bundle in bundles:
                if _VERSION.fullmatch(bundle.name) and bundle.is_dir():
                    yield model.name, int(bundle.name), bundle

    def page_token_key(self) -> bytes:
        """Return the secret that signs page tokens; the first call on a folder makes it, with mode 0600. Raises OSError
        if the file holds another number of bytes: it is damaged, and whoever guesses the key can make tokens."""
        path = self.root / "page-token.key"
        if not path.exists():
            self._make_key(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            text = (
                f"{path} has {len(key)} bytes, must have {_KEY_BYTES}: remove it, and the next start makes another one"
            )
            raise OSError(text)
        return key

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
            clean_up(aside.unlink)

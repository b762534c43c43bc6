"""The folder that a download is written to: whole and checked, or not there at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from ferryman._checks import check_folder
from ferryman.errors import ModelDamaged
from ferryman.types import DownloadChunk, DownloadFile, DownloadHeader, ModelVersion

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ModelFolder:
    """The state of one `download_model`, shared by both clients: they make the call, this writes and checks.

    A `with` block holds a folder beside the wanted one, which `finish` renames; without it, nothing stays.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Store; the `with` block makes the folder aside. Raises InvalidRequest for what is no path."""
        check_folder(folder)
        self._folder = Path(os.path.abspath(folder))
        self._aside = self._folder.with_name(f".{self._folder.name}.{secrets.token_hex(8)}")
        self._version: ModelVersion | None = None
        self._files: tuple[DownloadFile, ...] = ()
        self._number = 0
        self._offset = 0
        self._digest = hashlib.sha256()
        self._open: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Raises FileExistsError if there is such a folder, and any other OSError if it cannot be made."""
        if self._folder.exists():
            raise FileExistsError(f"{self._folder} exists: give the name of a folder that does not")
        self._aside.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            # What was renamed is not there any more.
            stack.callback(shutil.rmtree, self._aside, ignore_errors=True)
            if self._open is not None:
                stack.callback(self._open.close)

    def accept(self, item: DownloadHeader | DownloadChunk) -> None:
        """Write what has arrived; raises ModelDamaged if it is not what the header promises, OSError."""
        if isinstance(item, DownloadHeader):
            self._begin(item)
        else:
            self._write(item)

    def finish(self) -> ModelVersion:
        """Put the folder in its place and return the version; raises ModelDamaged if something is missing, OSError."""
        if self._version is None or self._number < len(self._files):
            place = "before its header" if self._version is None else f"in {self._files[self._number].name}"
            raise ModelDamaged(f"the download ended {place}: download it again")
        _sync(self._aside)
        os.rename(self._aside, self._folder)
        return self._version

    def _begin(self, header: DownloadHeader) -> None:
        names = [file.name for file in header.files]
        if self._version is not None or len(set(names)) < len(names):
            raise ModelDamaged("the server sent two headers, or a file twice: this is no download of a model")
        for name in names:
            # No string from elsewhere becomes a path.
            if not _FILE_NAME.fullmatch(name):
                raise ModelDamaged(f"the server names a file {name[:80]!r}, which no model has")
        self._version, self._files = header.version, header.files
        self._open_next()

    def _write(self, chunk: DownloadChunk) -> None:
        if self._open is None or (chunk.file, chunk.offset) != (self._number, self._offset) or not chunk.data:
            raise ModelDamaged(
                f"the server sent bytes from {chunk.offset} of file {chunk.file}, the next are those from "
                f"{self._offset} of file {self._number}: download it again"
            )
        self._open.write(chunk.data)
        self._digest.update(chunk.data)
        self._offset += len(chunk.data)
        if self._offset >= self._files[self._number].size_bytes:
            self._close_file()

    def _close_file(self) -> None:
        assert self._open is not None, "only an open file is closed"
        self._open.flush()
        os.fsync(self._open.fileno())
        self._open.close()
        self._open = None
        wanted, sha256 = self._files[self._number], self._digest.hexdigest()
        if (self._offset, sha256) != (wanted.size_bytes, wanted.sha256):
            raise ModelDamaged(
                f"{wanted.name} arrived with {self._offset} bytes and SHA-256 {sha256}, published were "
                f"{wanted.size_bytes} bytes with SHA-256 {wanted.sha256}: download it again",
                metadata={"file": wanted.name},
            )
        self._number += 1
        self._open_next()

    def _open_next(self) -> None:
        """Open the next file; one without bytes is complete at once."""
        if self._number < len(self._files):
            self._open = (self._aside / self._files[self._number].name).open("xb")
            self._digest, self._offset = hashlib.sha256(), 0
            if self._files[self._number].size_bytes == 0:
                self._close_file()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

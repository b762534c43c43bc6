"""Writes a downloaded model to a folder: complete and verified, or no folder at all."""

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
    """The state of one `download_model`. Both clients make the call; this class writes and verifies the files.

    A `with` block holds a staging folder beside the final one. `finish` renames it; otherwise the block removes it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises InvalidRequest if `folder` is not a path. The `with` block creates the staging folder."""
        check_folder(folder)
        self._folder = Path(os.path.abspath(folder))
        self._staging = self._folder.with_name(f".{self._folder.name}.{secrets.token_hex(8)}")
        self._version: ModelVersion | None = None
        self._files: tuple[DownloadFile, ...] = ()
        self._file_index = 0
        self._offset = 0
        self._digest = hashlib.sha256()
        self._open_file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Create the staging folder. Raises FileExistsError if the final one exists, or another OSError."""
        if self._folder.exists():
            raise FileExistsError(f"{self._folder} already exists; choose a new folder")
        self._staging.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            # After `finish` it is gone: it has been renamed.
            stack.callback(shutil.rmtree, self._staging, ignore_errors=True)
            if self._open_file is not None:
                stack.callback(self._open_file.close)

    def accept(self, item: DownloadHeader | DownloadChunk) -> None:
        """Write a response. Raises ModelDamaged if it contradicts the header, or OSError."""
        if isinstance(item, DownloadHeader):
            self._begin(item)
        else:
            self._write(item)

    def finish(self) -> ModelVersion:
        """Rename the staging folder and return the version. Raises ModelDamaged if a file is incomplete, or OSError."""
        if self._version is None or self._file_index < len(self._files):
            where = "before its header" if self._version is None else f"in {self._files[self._file_index].name}"
            raise ModelDamaged(f"the download ended {where}; download it again")
        _sync(self._staging)
        os.rename(self._staging, self._folder)
        return self._version

    def _begin(self, header: DownloadHeader) -> None:
        names = [file.name for file in header.files]
        if self._version is not None or len(set(names)) < len(names):
            raise ModelDamaged("the server sent two headers or listed a file twice; check the server's version")
        for name in names:
            # A name from the server must not become another path.
            if not _FILE_NAME.fullmatch(name):
                raise ModelDamaged(f"the server sent {name[:80]!r}, which is not a valid file name of a model")
        self._version, self._files = header.version, header.files
        self._open_next()

    def _write(self, chunk: DownloadChunk) -> None:
        if self._open_file is None or (chunk.file, chunk.offset) != (self._file_index, self._offset) or not chunk.data:
            raise ModelDamaged(
                f"the server sent offset {chunk.offset} of file {chunk.file}, but offset {self._offset} of file "
                f"{self._file_index} is next; download it again"
            )
        self._open_file.write(chunk.data)
        self._digest.update(chunk.data)
        self._offset += len(chunk.data)
        if self._offset >= self._files[self._file_index].size_bytes:
            self._close_file()

    def _close_file(self) -> None:
        assert self._open_file is not None, "no file is open"
        self._open_file.flush()
        os.fsync(self._open_file.fileno())
        self._open_file.close()
        self._open_file = None
        expected, sha256 = self._files[self._file_index], self._digest.hexdigest()
        if (self._offset, sha256) != (expected.size_bytes, expected.sha256):
            raise ModelDamaged(
                f"{expected.name} has {self._offset} bytes with SHA-256 {sha256}, expected {expected.size_bytes} bytes "
                f"with SHA-256 {expected.sha256}; download it again",
                metadata={"file": expected.name},
            )
        self._file_index += 1
        self._open_next()

    def _open_next(self) -> None:
        """Open the next file; an empty file is complete at once."""
        if self._file_index < len(self._files):
            self._open_file = (self._staging / self._files[self._file_index].name).open("xb")
            self._digest, self._offset = hashlib.sha256(), 0
            if self._files[self._file_index].size_bytes == 0:
                self._close_file()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

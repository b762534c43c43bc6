"""Reading a published bundle, file by file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from ferryman_service.bundle.files import open_regular, size_of
from ferryman_service.bundle.manifest import MANIFEST_FILE, manifest_digest, read_manifest
from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.models import BundleFile, ModelVersion


class BundleReader:
    """A BundleReader. All files are open from the beginning, so a version that is deleted meanwhile is read to its
    end."""

    def __init__(self, version: ModelVersion, bundle: Path) -> None:
        """Open the files of `version`; raises ModelDamaged if one is missing or has another size than published,
        TooManyOpenFiles."""
        self.version = version
        check_manifest(version, bundle)
        digests = read_manifest(bundle).files
        manifest_bytes = version.size_bytes - sum(digest.size_bytes for digest in digests.values())
        self.files = (
            BundleFile(name=MANIFEST_FILE, size_bytes=manifest_bytes, sha256=version.digest),
            *(
                BundleFile(name=name, size_bytes=digest.size_bytes, sha256=digest.sha256)
                for name, digest in sorted(digests.items())
            ),
        )
        with ExitStack() as opened:
            self._open: Mapping[str, BinaryIO] = {
                file.name: opened.enter_context(_open(bundle, file)) for file in self.files
            }
            self._close = opened.pop_all().close

    def read(self, file: BundleFile, size_bytes: int) -> bytes:
        """Return the next bytes of the file, at most so many; none at its end."""
        return self._open[file.name].read(size_bytes)

    def close(self) -> None:
        """Close the files; harmless when repeated, and raises nothing."""
        clean_up(self._close)


def check_manifest(version: ModelVersion, bundle: Path) -> None:
    """Raise ModelDamaged unless the manifest, which holds the digest of every other file, is the version's own."""
    if manifest_digest(bundle) != version.digest:
        text = f"{MANIFEST_FILE} is not the one that was published as {version.reference}: restore the bundle"
        raise ModelDamaged(text, file=MANIFEST_FILE)


def _open(bundle: Path, file: BundleFile) -> BinaryIO:
    opened = open_regular(bundle / file.name)
    size_bytes = size_of(opened)
    if size_bytes != file.size_bytes:
        opened.close()
        text = f"{file.name} has {size_bytes} bytes, published were {file.size_bytes}: restore it, or train again"
        raise ModelDamaged(text, file=file.name)
    return opened

"""The manifest of a model bundle: what the bundle is, and the digest of every file in it.

A bundle is a folder that holds exactly the files named here, with fixed names: no name in a manifest becomes a path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.models import Int8Outcome, Int8Scores, ModelLineage, ModelScores
from ferryman_service.domain.os_errors import refuse_if_exhausted
from ferryman_service.domain.recipe import recipe_from_dict, recipe_to_dict
from ferryman_service.domain.translation import ComputeType

FORMAT_VERSION: Final = 3
"""Rises when a reader of the version before could not use the bundle. 2: weights.safetensors. 3: graphs for running
batches, the embedding outside them, int8."""
_READABLE_VERSIONS: Final = (FORMAT_VERSION,)

ENCODER_FILE: Final = "encoder.onnx"
DECODER_FILE: Final = "decoder.onnx"
EMBEDDING_FILE: Final = "embedding.npy"
SUBWORDS_FILE: Final = "subwords.model"
MANIFEST_FILE: Final = "manifest.json"
CONTENT_FILES: Final = (ENCODER_FILE, DECODER_FILE, EMBEDDING_FILE, SUBWORDS_FILE)
"""What every bundle holds beside its manifest, and what translating in float32 needs."""
ENCODER_INT8_FILE: Final = "encoder.int8.onnx"
DECODER_INT8_FILE: Final = "decoder.int8.onnx"
EMBEDDING_INT8_FILE: Final = "embedding.int8.npy"
EMBEDDING_SCALES_FILE: Final = "embedding.scales.npy"
INT8_FILES: Final = (ENCODER_INT8_FILE, DECODER_INT8_FILE, EMBEDDING_INT8_FILE, EMBEDDING_SCALES_FILE)
"""What translating in int8 needs beside the subwords; a bundle has all of them or none."""
ENCODER_FP16_FILE: Final = "encoder.fp16.onnx"
DECODER_FP16_FILE: Final = "decoder.fp16.onnx"
REORDER_FILE: Final = "reorder.fp16.onnx"
FP16_FILES: Final = (ENCODER_FP16_FILE, DECODER_FP16_FILE, REORDER_FILE)
"""What translating on a GPU needs beside the embedding and the subwords; a bundle has all of them or none."""
WEIGHTS_FILE: Final = "weights.safetensors"
"""The weights as training left them, for fine-tuning; a bundle may lack them."""

_OPTIONAL_GROUPS: Final = (INT8_FILES, FP16_FILES, (WEIGHTS_FILE,))
_MAX_MANIFEST_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers without which the graphs cannot be run."""

    d_model: int
    decoder_layers: int
    heads: int
    vocabulary_size: int
    rotates: bool = False

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.d_model // self.heads


@dataclass(frozen=True)
class GraphFiles:
    """The names of a compute type's graphs."""

    encoder: str
    decoder: str


def graph_files(compute_type: ComputeType) -> GraphFiles:
    """Return the names of the compute type's graphs in a bundle."""
    if compute_type is ComputeType.INT8:
        return GraphFiles(ENCODER_INT8_FILE, DECODER_INT8_FILE)
    if compute_type is ComputeType.FP16:
        return GraphFiles(ENCODER_FP16_FILE, DECODER_FP16_FILE)
    return GraphFiles(ENCODER_FILE, DECODER_FILE)


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """The SHA-256 of a file, hexadecimal, and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class ManifestHeader:
    """What a bundle says about its model. `max_sentence_tokens` counts the end symbol. `int8`: what its int8 graphs
    were measured to cost, or that there was nothing to measure them on; None as long as nobody has tried."""

    lineage: ModelLineage
    scores: ModelScores
    parameters: int
    max_sentence_tokens: int
    architecture: Architecture
    int8: Int8Scores | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A bundle's description and the digests of its files, by name."""

    format_version: int
    header: ManifestHeader
    files: Mapping[str, FileDigest]

    @property
    def has_int8(self) -> bool:
        """Whether the bundle can be translated with in int8."""
        return ENCODER_INT8_FILE in self.files

    @property
    def int8(self) -> Int8Outcome | None:
        """What became of int8 when the model was checked; None if nobody has said."""
        return None if self.header.int8 is None else Int8Outcome(scores=self.header.int8, kept=self.has_int8)

    @property
    def has_fp16(self) -> bool:
        """Whether the bundle can be translated with on a GPU."""
        return ENCODER_FP16_FILE in self.files

    def size_bytes(self, compute_type: ComputeType) -> int:
        """Return the size of the files that translating with the compute type reads."""
        return sum(self.files[name].size_bytes for name in _needed(compute_type))


def seal(bundle: Path, header: ManifestHeader) -> Manifest:
    """Write the manifest of the content files that lie in `bundle`; every file and the folder are fsynced.

    Raises OSError if a file is missing or the disk fails.
    """
    files = {}
    optional = [name for group in _OPTIONAL_GROUPS for name in group if (bundle / name).exists()]
    for name in (*CONTENT_FILES, *optional):
        _fsync(bundle / name)
        files[name] = _digest(bundle / name)
    manifest = Manifest(format_version=FORMAT_VERSION, header=header, files=files)
    with (bundle / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump(_to_dict(manifest), file, indent=1, sort_keys=True)
        file.write("\n")
    _fsync(bundle / MANIFEST_FILE)
    _fsync(bundle)
    return manifest


def settle_int8(bundle: Path, scores: Int8Scores, *, keep: bool) -> Manifest:
    """Write into the manifest what int8 costs, and remove its files unless it is kept. Raises OSError, ModelDamaged."""
    header = replace(read_manifest(bundle).header, int8=scores)
    if not keep:
        for name in INT8_FILES:
            (bundle / name).unlink(missing_ok=True)
    return seal(bundle, header)


def read_manifest(bundle: Path) -> Manifest:
    """Return the manifest; raises ModelDamaged if there is none that this version can read. Digests are not checked."""
    try:
        values = json.loads(_read_manifest_bytes(bundle))
        if values["format_version"] not in _READABLE_VERSIONS:
            raise ModelDamaged(
                f"{MANIFEST_FILE} has format version {values['format_version']!r}, this server reads {FORMAT_VERSION}: "
                "use a server of the version that wrote it, or train the model again",
                file=MANIFEST_FILE,
            )
        manifest = _from_dict(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelDamaged(f"{MANIFEST_FILE} is not a manifest: {error!r}", file=MANIFEST_FILE) from error
    if not _is_whole(manifest.files):
        found = ", ".join(sorted(manifest.files))
        raise ModelDamaged(f"{MANIFEST_FILE} names {found}, not {', '.join(CONTENT_FILES)}", file=MANIFEST_FILE)
    return manifest


def verify(bundle: Path, *, to_translate: ComputeType | None = None) -> Manifest:
    """Check size and digest of every file and return the manifest; raises ModelDamaged naming the first bad file,
    TooManyOpenFiles.

    With `to_translate` only the files are checked that translating with that compute type reads.
    """
    manifest = read_manifest(bundle)
    wanted = set(manifest.files) if to_translate is None else _needed(to_translate)
    for name, published in manifest.files.items():
        if name not in wanted:
            continue
        try:
            found = _digest(bundle / name)
        except OSError as error:
            refuse_if_exhausted(error)
            raise ModelDamaged(f"{name} cannot be read: {error.strerror}", file=name) from error
        if found != published:
            raise ModelDamaged(
                f"{name} has {found.size_bytes} bytes with SHA-256 {found.sha256}, published were "
                f"{published.size_bytes} bytes with SHA-256 {published.sha256}: restore the file, or train again",
                file=name,
            )
    return manifest


def _is_whole(files: Iterable[str]) -> bool:
    """Tell whether these are all of CONTENT_FILES and all or none of each optional group."""
    found = set(files)
    groups = [set(group) for group in _OPTIONAL_GROUPS]
    return found == set(CONTENT_FILES).union(*(group for group in groups if group <= found))


def _needed(compute_type: ComputeType) -> set[str]:
    if compute_type is ComputeType.INT8:
        return {*INT8_FILES, SUBWORDS_FILE}
    if compute_type is ComputeType.FP16:
        return {*FP16_FILES, EMBEDDING_FILE, SUBWORDS_FILE}
    return set(CONTENT_FILES)


def manifest_digest(bundle: Path) -> str:
    """Return the SHA-256 of the manifest, hexadecimal: it fixes every file of the bundle. Raises ModelDamaged."""
    return hashlib.sha256(_read_manifest_bytes(bundle)).hexdigest()


def bundle_size_bytes(bundle: Path) -> int:
    """Return the size of the bundle's files, manifest included, as published; raises ModelDamaged."""
    manifest_bytes = len(_read_manifest_bytes(bundle))
    return manifest_bytes + sum(file.size_bytes for file in read_manifest(bundle).files.values())


def _read_manifest_bytes(bundle: Path) -> bytes:
    try:
        with (bundle / MANIFEST_FILE).open("rb") as file:
            content = file.read(_MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        refuse_if_exhausted(error)
        raise ModelDamaged(f"{MANIFEST_FILE} cannot be read: {error.strerror}", file=MANIFEST_FILE) from error
    if len(content) > _MAX_MANIFEST_BYTES:
        raise ModelDamaged(f"{MANIFEST_FILE} is over {_MAX_MANIFEST_BYTES} bytes", file=MANIFEST_FILE)
    return content


def _digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(sha256=sha256, size_bytes=file.tell())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_dict(manifest: Manifest) -> dict[str, Any]:
    values = dataclasses.asdict(manifest)
    values["header"]["lineage"]["recipe"] = recipe_to_dict(manifest.header.lineage.recipe)
    return values


def _from_dict(values: Mapping[str, Any]) -> Manifest:
    header = values["header"]
    lineage = ModelLineage(**{**header["lineage"], "recipe": recipe_from_dict(header["lineage"]["recipe"])})
    return Manifest(
        format_version=values["format_version"],
        header=ManifestHeader(
            lineage=lineage,
            scores=ModelScores(**header["scores"]),
            parameters=header["parameters"],
            max_sentence_tokens=header["max_sentence_tokens"],
            architecture=Architecture(**header["architecture"]),
            int8=None if header["int8"] is None else Int8Scores(**header["int8"]),
        ),
        files={name: FileDigest(**digest) for name, digest in values["files"].items()},
    )

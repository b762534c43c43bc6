"""The manifest of a model bundle: what the bundle is, and the digest of every file in it.

A bundle is a folder that holds exactly the files named here, with fixed names: no name in a manifest becomes a path.
A manifest may come from anywhere: its values have the types and ranges below, and a file no more bytes than the
network that the manifest describes can need, or the manifest is refused with the name of the field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from ferryman_service.bundle.files import open_regular, size_of
from ferryman_service.bundle.sizes import NetworkSize
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.models import VERSION_LIMITS, Int8Outcome, Int8Scores, ModelLineage, ModelScores
from ferryman_service.domain.recipe import Positions, out_of_range, recipe_to_dict
from ferryman_service.domain.schema import Limits, Number, SchemaMismatch, Text, mapping_of, read_fields, shown
from ferryman_service.domain.translation import ComputeType

FORMAT_VERSION: Final = 4
"""Rises when a reader of the version before could not use the bundle. 2: weights.safetensors. 3: graphs for running
batches, the embedding outside them, int8. 4: names of the recipe's fields, the kind of weights, the model
that training started from."""
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
_MAX_GRAPH_BYTES: Final = 2**31 - 1
"""A protocol buffer cannot be longer."""
_MAX_SUBWORDS_BYTES: Final = 64 << 20
_OVERHEAD_BYTES: Final = 2 << 20
"""What a file may have beside the numbers of the network: names, nodes, constants, headers."""
_CHUNK_BYTES: Final = 1 << 20
_SHOWN_FILES: Final = 5
_CURE: Final = "restore the file, or train again"


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


_LIMITS: Final[Limits] = {
    **VERSION_LIMITS,
    (ManifestHeader, "parameters"): Number(1, 10**12),
    (ManifestHeader, "max_sentence_tokens"): Number(4, 4096),
    (Architecture, "d_model"): Number(8, 8192),
    (Architecture, "decoder_layers"): Number(1, 64),
    (Architecture, "heads"): Number(1, 128),
    (Architecture, "vocabulary_size"): Number(6, 256_000),
    (FileDigest, "sha256"): Text(64, "[0-9a-f]{64}", "64 hexadecimal digits"),
}


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
        json.dump(_to_dict(manifest), file, indent=1, sort_keys=True, allow_nan=False)
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
    return parse_manifest(_read_manifest_bytes(bundle))


def parse_manifest(content: bytes) -> Manifest:
    """Return the manifest that the file of this content is; raises ModelDamaged with the name of the field that is not
    what the format says."""
    try:
        values = mapping_of(_decode(content), "manifest")
        _check_version(values.get("format_version"))
        return _from_values(values)
    except SchemaMismatch as error:
        text = f"{MANIFEST_FILE} is not a manifest: {error}"
        raise ModelDamaged(text, file=MANIFEST_FILE, field=error.field) from error


def verify(bundle: Path, *, to_translate: ComputeType | None = None) -> Manifest:
    """Check size and digest of every file and return the manifest; raises ModelDamaged naming the first bad file,
    TooManyOpenFiles.

    With `to_translate` only the files are checked that translating with that compute type reads.
    """
    manifest = read_manifest(bundle)
    wanted = set(manifest.files) if to_translate is None else _needed(to_translate)
    for name, published in manifest.files.items():
        if name in wanted:
            with open_regular(bundle / name) as file:
                _read_whole(file, name, published, lambda chunk: None)
    return manifest


def copy_verified(bundle: Path, target: Path) -> Manifest:
    """Copy a bundle into a new folder, durably, and return its manifest. Each file is read once, so the bytes of the
    copy are those that were checked. Raises ModelDamaged, OSError if the copy cannot be written."""
    content = _read_manifest_bytes(bundle)
    manifest = parse_manifest(content)
    target.mkdir()
    for name, published in manifest.files.items():
        with open_regular(bundle / name) as source, (target / name).open("xb") as copy:
            _read_whole(source, name, published, copy.write)
            copy.flush()
            os.fsync(copy.fileno())
    (target / MANIFEST_FILE).write_bytes(content)
    _fsync(target / MANIFEST_FILE)
    _fsync(target)
    return manifest


def _read_whole(file: BinaryIO, name: str, published: FileDigest, take: Callable[[bytes], object]) -> None:
    """Pass all bytes on to `take`; raises ModelDamaged if they are not the published ones, and reads no more of a file
    that is longer."""
    sha256, size_bytes = hashlib.sha256(), size_of(file)
    if size_bytes == published.size_bytes:
        size_bytes = 0
        while size_bytes <= published.size_bytes and (chunk := _read_chunk(file, name)):
            size_bytes += len(chunk)
            sha256.update(chunk)
            take(chunk)
    if size_bytes != published.size_bytes:
        text = f"{name} has {size_bytes} bytes, published were {published.size_bytes} bytes: {_CURE}"
        raise ModelDamaged(text, file=name)
    if sha256.hexdigest() != published.sha256:
        text = f"{name} has SHA-256 {sha256.hexdigest()}, published was {published.sha256}: {_CURE}"
        raise ModelDamaged(text, file=name)


def _read_chunk(file: BinaryIO, name: str) -> bytes:
    try:
        return file.read(_CHUNK_BYTES)
    except OSError as error:
        raise ModelDamaged(f"{name} cannot be read: {error.strerror}", file=name) from error


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
    with open_regular(bundle / MANIFEST_FILE) as file:
        content = b""
        while len(content) <= _MAX_MANIFEST_BYTES and (chunk := _read_chunk(file, MANIFEST_FILE)):
            content += chunk
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


def _decode(content: bytes) -> object:
    """Return what the JSON text says. Names that come twice are refused: readers would not agree which one holds."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise SchemaMismatch("manifest", "is nested too deeply") from error
    except SchemaMismatch:
        raise
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise SchemaMismatch("manifest", f"is not JSON in UTF-8 ({shown(str(error))})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise SchemaMismatch("manifest", "names a field twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise SchemaMismatch("manifest", f"holds {name}, which is not a number of JSON")


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version not in _READABLE_VERSIONS:
        raise ModelDamaged(
            f"{MANIFEST_FILE} has format version {shown(version)}, this server reads {FORMAT_VERSION}: "
            "use a server of the version that wrote it, or train the model again",
            file=MANIFEST_FILE,
            field="format_version",
        )


def _from_values(values: Mapping[str, Any]) -> Manifest:
    if unknown := values.keys() - {"format_version", "header", "files"}:
        raise SchemaMismatch(shown(min(unknown)), "is not a field of this format")
    header = read_fields(ManifestHeader, values.get("header"), "header", _LIMITS)
    _check_consistency(header)
    files = mapping_of(values.get("files"), "files")
    if not _is_whole(files):
        found = ", ".join(sorted(files)[:_SHOWN_FILES])
        text = f"{MANIFEST_FILE} names {shown(found)}, not {', '.join(CONTENT_FILES)}"
        raise ModelDamaged(text, file=MANIFEST_FILE, field="files")
    bounds = _most_bytes(header)
    return Manifest(
        format_version=values["format_version"],
        header=header,
        files={name: _read_digest(digest, f"files.{name}", bounds[name]) for name, digest in files.items()},
    )


def _read_digest(values: object, path: str, most_bytes: int) -> FileDigest:
    limits: Limits = {**_LIMITS, (FileDigest, "size_bytes"): Number(0, most_bytes)}
    return read_fields(FileDigest, values, path, limits)


def _check_consistency(header: ManifestHeader) -> None:
    """Raise SchemaMismatch if a part of the header contradicts another, or the recipe is out of range."""
    for violation in out_of_range(header.lineage.recipe, "header.lineage.recipe"):
        raise SchemaMismatch(violation.field, violation.description)
    network, architecture = header.lineage.recipe.model, header.architecture
    for name, wanted in (
        ("d_model", network.d_model),
        ("decoder_layers", network.decoder_layers),
        ("heads", network.heads),
        ("rotates", network.positions is Positions.ROPE),
    ):
        if (found := getattr(architecture, name)) != wanted:
            raise SchemaMismatch(f"header.architecture.{name}", f"is {found}, but by the recipe it is {wanted}")
    if architecture.d_model % architecture.heads or architecture.d_model % 2:
        text = f"is {architecture.heads}, which does not divide d_model, {architecture.d_model}, or that is odd"
        raise SchemaMismatch("header.architecture.heads", text)


def _most_bytes(header: ManifestHeader) -> Mapping[str, int]:
    """Return how long each file may be."""
    vocabulary_size = header.architecture.vocabulary_size
    size = NetworkSize(
        network=header.lineage.recipe.model,
        vocabulary_size=vocabulary_size,
        max_sentence_tokens=header.max_sentence_tokens,
    )
    return {
        **dict.fromkeys((ENCODER_FILE, ENCODER_INT8_FILE, ENCODER_FP16_FILE), _graph_bytes(size.encoder)),
        **dict.fromkeys((DECODER_FILE, DECODER_INT8_FILE, DECODER_FP16_FILE), _graph_bytes(size.decoder)),
        EMBEDDING_FILE: 4 * size.embedding + _OVERHEAD_BYTES,
        EMBEDDING_INT8_FILE: size.embedding + _OVERHEAD_BYTES,
        EMBEDDING_SCALES_FILE: 4 * vocabulary_size + _OVERHEAD_BYTES,
        REORDER_FILE: _OVERHEAD_BYTES,
        SUBWORDS_FILE: _MAX_SUBWORDS_BYTES,
        WEIGHTS_FILE: 4 * size.weights + _OVERHEAD_BYTES,
    }


def _graph_bytes(numbers: int) -> int:
    return min(4 * numbers + _OVERHEAD_BYTES, _MAX_GRAPH_BYTES)

"""A bundle that nobody can translate with: the right files with the wrong content."""

from __future__ import annotations

import dataclasses

from ferryman_service.bundle import manifest as bundles
from ferryman_service.domain.models import ModelLineage, ModelScores, PublishedWeights
from ferryman_service.domain.recipe import resolve_recipe

HEADER = bundles.ManifestHeader(
    lineage=ModelLineage(
        run_id="run_0000000000000000000000",
        corpus_id="cor_0000000000000000000000",
        corpus_digest="00" * 32,
        source_language="en",
        target_language="de",
        recipe=resolve_recipe({}),
    ),
    scores=ModelScores(
        bleu=30.5, chrf=60.25, nll_per_token=1.25, weights=PublishedWeights.CHECKPOINT, step=100, translated_pairs=40
    ),
    parameters=1000,
    max_sentence_tokens=8,
    architecture=bundles.Architecture(d_model=128, decoder_layers=4, heads=4, vocabulary_size=32),
)


def write_bundle(folder, *, weights=False, run_id=HEADER.lineage.run_id, encoder=b"encoder.onnx"):
    """Write a bundle into a new folder; return the folder."""
    folder.mkdir(parents=True)
    for file in (*bundles.CONTENT_FILES, *([bundles.WEIGHTS_FILE] if weights else [])):
        (folder / file).write_bytes(encoder if file == bundles.ENCODER_FILE else file.encode())
    lineage = dataclasses.replace(HEADER.lineage, run_id=run_id)
    bundles.seal(folder, dataclasses.replace(HEADER, lineage=lineage))
    return folder

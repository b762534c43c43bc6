"""The setting that the sections of the GPU serving benchmark share: device, sizes, models and engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench.serving.gpu_models import base_recipe, random_bundle, small_recipe
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.domain.translation import ComputeType
from ferryman_service.translation.engine import BatchingEngine
from ferryman_service.translation.loader import ON_A_GPU, OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig

KINDS: Final[Mapping[str, Mapping[str, str]]] = {
    "post-norm": {},
    "pre-norm": {"norm": NormPlacement.PRE, "positions": Positions.ROPE, "activation": Activation.SWIGLU},
}
"""Small models that have all operators between them."""
FORCED_LENGTH: Final = 30
"""Subwords of every translation where speed is measured."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How large everything is: the real sizes, or small ones with which every line runs anywhere in seconds. `model`,
    `source` and `reference`: a trained bundle and lines of text, if there are any."""

    folder: Path
    device: str
    small: bool = False
    model: Path | None = None
    source: Path | None = None
    reference: Path | None = None
    check_vocabulary: int = 3000

    @property
    def onnx_config(self) -> OnnxConfig:
        """How graphs are run, without CUDA graphs."""
        return OnnxConfig(compute_type=ComputeType.FP16, device=self.device)

    @property
    def speed_vocabulary(self) -> int:
        """Subwords of the model that speed is measured of."""
        return 500 if self.small else 32_000

    @property
    def batch(self) -> int:
        """Sentences that run at the same time where throughput is measured."""
        return 8 if self.small else 128

    @property
    def check_sentences(self) -> int:
        """Sentences that are compared."""
        return 20 if self.small else 300

    def speed_bundle(self) -> Path:
        """Return the model that speed is measured of: `base`."""
        if self.small:
            return random_bundle(self.folder / "speed", small_recipe(self.speed_vocabulary))
        return random_bundle(self.folder / "speed", base_recipe(self.speed_vocabulary))

    def check_bundle(self, kind: str = "post-norm") -> Path:
        """Return a small model of one of KINDS."""
        return random_bundle(self.folder / kind, small_recipe(self.check_vocabulary, **KINDS[kind]))

    def engine(
        self, bundle: Path, beam_size: int, *, sentences: int | None = None, graphs: bool = False
    ) -> BatchingEngine:
        """Load a bundle in fp16 on the device, for so many sentences at a time."""
        scheduler = replace(ON_A_GPU, max_rows=(sentences or self.batch) * beam_size)
        config = replace(self.onnx_config, cuda_graphs=graphs)
        return OnnxBundleLoader(config, SchedulerConfig(), scheduler).load(bundle)

    def cpu_engine(self, bundle: Path) -> BatchingEngine:
        """Load a bundle in fp32 on the CPU."""
        return OnnxBundleLoader(OnnxConfig(), SchedulerConfig(threads=1 if self.small else 8)).load(bundle)

"""Benchmarks; see README.md."""

import ferryman_service  # noqa: F401 (it turns ONNX Runtime's telemetry off, before a benchmark imports that)

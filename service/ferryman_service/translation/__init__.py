"""Serving published models with ONNX Runtime. No torch here."""

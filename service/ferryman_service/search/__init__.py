"""Searching for a translation, over any model that decodes step by step. NumPy only: the same search runs on PyTorch
during training and on ONNX Runtime when serving."""

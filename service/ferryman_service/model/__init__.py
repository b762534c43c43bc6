"""The Transformer (Vaswani et al., 2017, "Attention Is All You Need"), as PyTorch modules."""

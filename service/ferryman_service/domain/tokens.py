"""The ids of the special subwords: the same in every vocabulary."""

from __future__ import annotations

from typing import Final

PAD: Final = 0
"""Fills the end of a shorter sentence in a batch; never predicted."""

UNK: Final = 1
"""Stands for text that the vocabulary cannot express."""

BOS: Final = 2
"""Starts the decoder's input; never predicted."""

EOS: Final = 3
"""Ends every source and every target sentence."""

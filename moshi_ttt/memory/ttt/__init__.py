"""Test-time training by mini-batches: the shared part, a file a fast model, slow references."""

from moshi_ttt.memory.ttt.linear import TTTLinear
from moshi_ttt.memory.ttt.mlp import TTTMLP

__all__ = ["TTTMLP", "TTTLinear"]

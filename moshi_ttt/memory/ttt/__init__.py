"""Test-time training by mini-batches: what is shared, what is trained, and slow references."""

from moshi_ttt.memory.ttt.mini_batch import TTTMLP, TTTLinear

__all__ = ["TTTMLP", "TTTLinear"]

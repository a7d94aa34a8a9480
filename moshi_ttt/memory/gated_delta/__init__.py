"""The gated delta rule, and its slow reference."""

from moshi_ttt.memory.gated_delta.chunked import GatedDelta

__all__ = ["GatedDelta"]

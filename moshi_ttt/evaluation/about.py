"""What was examined and with what, in words."""

from __future__ import annotations

from collections.abc import Sequence

from moshi.models.lm import LMModel

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.diagnosis.jumps import spans
from moshi_ttt.memory import rule_name
from moshi_ttt.model.hybrid import hybrid_layers


def about(lm: LMModel, recordings: Sequence[EncodedRecording], clock: Clock) -> dict[str, str]:
    """The memory of a model, and the recordings that it reads, by what a line is about."""
    minutes = clock.seconds(sum(one.steps for one in recordings)) / 60
    return {
        "memory": _memory(lm),
        "examined with": f"{len(recordings)} held-out recordings, {minutes:.0f} min",
    }


def _memory(lm: LMModel) -> str:
    """Rule, layers and size of the memories, e.g. `gated_delta in layers 0-5, ...`; or `none`."""
    hybrids = hybrid_layers(lm)
    if not hybrids:
        return "none"
    branches = [layer.branch for layer in hybrids.values()]
    rules = sorted({rule_name(branch.rule) for branch in branches})
    parameters = sum(one.numel() for branch in branches for one in branch.parameters())
    return (
        f"{' and '.join(rules)} in layers {spans(sorted(hybrids))}, {parameters:,} parameters, "
        f"{memory_bytes(lm) / 2**20:.2g} MiB of state a stream"
    )


def memory_bytes(lm: LMModel) -> int:
    """What the memories of one stream take; 0 without any."""
    states = [layer.branch.rule.init_state(1) for layer in hybrid_layers(lm).values()]
    return sum(one.numel() * one.element_size() for state in states for one in state.values())

"""Settings of the memory, and which layers get one."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moshi_ttt.errors import check_fields, check_setting

Rule = Literal["ttt_linear", "ttt_mlp", "gated_delta"]
RULES: tuple[Rule, ...] = get_args(Rule)
Projections = Literal["own", "attention", "shared"]
PROJECTIONS: tuple[Projections, ...] = get_args(Projections)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The test-time-training memory of the hybrid layers."""

    rule: Rule = "gated_delta"
    """How fast weights learn: the gated delta rule (Yang et al. 2024), which writes every step, or
    one linear map or a two-layer MLP trained by mini-batch gradient steps (Sun et al. 2024)."""
    layers: list[int] | str = "every:1"
    """Layers that get a memory: `last:N`, `every:N` (the last of each N), or a list of indices."""
    placement: Literal["parallel", "post_attention"] = "parallel"
    """What the memory reads and joins: the normed input of attention, or attention's output."""
    projections: Projections = "attention"
    """Where queries, keys, values and the read-out come from: `own` starts at random; `attention`
    starts as a copy of the layer's attention (before its rotation); `shared` uses attention's own
    frozen projections and learns a low-rank correction to them, which costs few parameters and
    reads no weight twice. The latter two need placement=parallel."""
    rank: int = 16
    """Rank of the corrections of `shared` projections; the others do not use it."""
    gate_init: float = 0.0
    """Where the output gates start; 0 starts as Moshi itself, bit for bit. What is added is at most
    tanh of it times the norm of the residual."""
    heads: int | None = None
    """Independent memories side by side, each with its own forgetting time; None: as many as
    attention has heads."""
    head_dim: int | None = None
    """Channels of a head's keys and values; a head stores head_dim^2 fast weights (ttt_mlp:
    8 x head_dim^2). None: model dimension / heads."""
    mini_batch_steps: int = 16
    """Steps per inner update of the ttt rules; 16 steps = 1.28 s. Not used by gated_delta."""
    inner_lr: float = 1.0
    """Inner learning rate of the ttt rules, multiplied by the write gate. Not used by
    gated_delta, whose rate is the write gate itself."""
    forgetting_time_steps: tuple[float, float] = (300.0, 20_000.0)
    """Shortest and longest initial forgetting time, in steps (24 s and 27 min); the heads sit at
    the centres of equal shares of this range on a log scale. Learned from there."""
    write_gate: float = 0.1
    """Initial write gate, in 0..1: how strongly one step is written."""
    bounded_readout: bool = True
    """Bound what is added to the residual by the residual's own norm. False reproduces the
    failure of the research notes: gate x projection, with a norm of its own choosing."""

    def __post_init__(self) -> None:
        _check("rule", self.rule, self.rule in RULES, f"use one of {', '.join(RULES)}")
        _check(
            "placement",
            self.placement,
            self.placement in ("parallel", "post_attention"),
            "use parallel or post_attention",
        )
        _check("layers", self.layers, _well_formed(self.layers), _LAYERS_RULE)
        check_setting(
            self.projections in PROJECTIONS,
            "projections",
            self.projections,
            f"is none of {', '.join(PROJECTIONS)}; use one of them",
        )
        check_setting(
            self.projections == "own" or self.placement == "parallel",
            "projections",
            self.projections,
            "are of the normed input, which only placement=parallel reads; use own",
        )
        check_fields(self, "rank", least=1, remedy="use e.g. 16")
        check_fields(self, "gate_init", above=-10, below=10, remedy="use e.g. 0.1")
        check_fields(self, "heads", least=1, remedy="use null for as many as attention has")
        check_fields(self, "head_dim", least=2, remedy="use null for the model's channels / heads")
        check_fields(self, "mini_batch_steps", least=1, most=4096, remedy="use e.g. 16")
        check_fields(self, "inner_lr", above=0, remedy="use e.g. 1.0")
        shortest, longest = self.forgetting_time_steps
        _check(
            "forgetting_time_steps",
            self.forgetting_time_steps,
            0 < shortest <= longest < float("inf"),
            "use [shortest, longest] in steps with 0 < shortest <= longest, e.g. [50, 20000]",
        )
        check_fields(self, "write_gate", above=0, below=1, remedy="use e.g. 0.03")

    def fitted(self, dim: int, attention_heads: int) -> MemoryConfig:
        """The same with `heads` and `head_dim` in numbers, for a layer of `dim` channels.

        Raises:
            UserError: the heads do not divide `dim`, are far wider than it, or do not fit
                attention's projections.
        """
        heads = self.heads or attention_heads
        if self.head_dim is None:
            _check(
                "heads",
                heads,
                dim % heads == 0 and dim // heads >= 2,
                f"it must divide the model's {dim} channels into 2 or more a head; "
                "use such a divisor, or set head_dim",
            )
        head_dim = self.head_dim or dim // heads
        # before anything is allocated
        _check(
            "head_dim",
            head_dim,
            heads * head_dim <= _WIDEST * dim,
            f"all {heads} heads together may have {_WIDEST} times the model's {dim} channels; use "
            "null for the model's channels / heads",
        )
        _check(
            "rank",
            self.rank,
            self.projections != "shared" or self.rank <= dim,
            f"the model has {dim} channels, and a rank is lower; use e.g. 16",
        )
        _check(
            "head_dim",
            head_dim,
            self.projections == "own" or heads * head_dim == dim,
            f"projections={self.projections} have the model's {dim} channels; use null for the "
            "model's channels / heads, or projections=own",
        )
        return dataclasses.replace(self, heads=heads, head_dim=head_dim)


_WIDEST = 4  # times the model's channels, of all heads together
_LAYERS_RULE = "use last:N, every:N or a list of distinct layer indices, e.g. [25, 26]"


def resolve_layers(layers: list[int] | str, num_layers: int) -> list[int]:
    """Sorted indices that a `MemoryConfig.layers` means in a model of `num_layers` layers.

    Raises:
        UserError: malformed, or it names no layer or layers that the model does not have.
    """
    _check("layers", layers, _well_formed(layers), _LAYERS_RULE)
    if isinstance(layers, str):
        kind, count = layers.split(":")
        n = int(count)
        first, stride = (num_layers - n, 1) if kind == "last" else (n - 1, n)
        _check(
            "layers",
            layers,
            n <= num_layers,
            f"the model has {num_layers} layers; use {kind}:N with N in 1..{num_layers}",
        )
        return list(range(first, num_layers, stride))
    _check(
        "layers",
        layers,
        all(0 <= index < num_layers for index in layers),
        f"the model has {num_layers} layers; use indices in 0..{num_layers - 1}",
    )
    return sorted(layers)


def _well_formed(layers: list[int] | str) -> bool:
    if isinstance(layers, str):
        return re.fullmatch(r"(last|every):0*[1-9]\d*", layers) is not None
    return len(layers) > 0 and len(set(layers)) == len(layers)


def _check(key: str, value: Any, holds: bool, remedy: str) -> None:
    check_setting(holds, key, value, f"is not possible: {remedy}")

"""What recording costs a generated step, side by side in one run.

    python scripts/bench/recorder.py --model moshi7b-random --streams 4
    python scripts/bench/recorder.py --model tiny --steps 60

One model, generations with and without the recorder by rounds (each captures its own CUDA graphs
on a GPU), medians over the rounds. The first generation of each kind only warms up.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from moshi.models.lm import LMModel

from moshi_ttt.command_line import add_device, add_model, parse, program_parser
from moshi_ttt.errors import UserError, run_program, settings_at
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep, Observer
from moshi_ttt.instruments.attention_mass import AttentionWatch
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import ModelConfig, build_lm
from moshi_ttt.model.source import RANDOM_7B, ModelSource, open_source
from moshi_ttt.rows import Rows

SKIPPED_STEPS = 30  # the graphs are captured in the first ones
Kind = Literal["plain", "recorder", "recorder + attention"]


def main(args: list[str] | None = None) -> dict[str, float]:
    """Print the table.

    Returns:
        Median milliseconds a step, by kind.
    """
    options = parse(_parser(), args)
    if options.steps <= SKIPPED_STEPS + 1:
        raise UserError(f"--steps={options.steps} must be more than {SKIPPED_STEPS + 1}")
    with settings_at("", source="--model"):
        source = open_source(options.model)
    lm = _model(source, options.memory, options.context_steps, options.device)
    watched = [0, source.num_layers // 2, source.num_layers - 1]
    kinds: list[Kind] = ["plain", "recorder"]
    if options.attention_every:
        kinds.append("recorder + attention")
    codes = torch.randint(
        0, min(lm.card, lm.text_card), (options.streams, Rows.of(lm).count, options.steps)
    )
    times_ms: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    for number in range(options.repeats + 1):
        # there and back again: a machine that slows down does so for both
        for kind in kinds if number % 2 else reversed(kinds):
            recorder = None
            if kind != "plain":
                watch = AttentionWatch(sorted(set(watched)), options.attention_every or 1)
                attention = watch if kind == "recorder + attention" else None
                recorder = Recorder(lm, options.streams, options.steps, attention)
            step_ms = _step_ms(lm, codes, recorder)
            if number:
                times_ms[kind].append(step_ms)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {options.model}, memory {options.memory}")
    print(f"{options.streams} streams, {options.steps} steps, {options.repeats} rounds")
    medians: dict[str, float] = {}
    for kind in kinds:
        medians[kind] = statistics.median(times_ms[kind])
        ratios = [ms / plain for ms, plain in zip(times_ms[kind], times_ms["plain"], strict=True)]
        print(
            f"{kind:22} {medians[kind]:8.3f} ms a step"
            f"  x {statistics.median(ratios):.4f} [{min(ratios):.4f}, {max(ratios):.4f}]"
        )
    return medians


def _model(source: ModelSource, memory: str, context_steps: int | None, device: str) -> LMModel:
    """The model under test; memory in the last five layers, or the last one of a small model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if source.name == RANDOM_7B else "float32"
    if memory == "none":
        return source.lm(device=device, dtype=getattr(torch, dtype), context_steps=context_steps)
    large = source.num_layers >= 10
    config = ModelConfig(
        source=source.name,
        dtype=dtype,
        context_steps=context_steps,
        train="memory",
        memory=MemoryConfig(
            rule=memory,  # type: ignore[arg-type]
            layers="last:5" if large else "last:1",
            heads=32 if large else 2,
        ),
    )
    return build_lm(config, source, device)


def _step_ms(lm: LMModel, codes: torch.Tensor, recorder: Recorder | None) -> float:
    """Wall time of one step, from steps after the graphs were captured."""
    at: list[float] = []

    def clock(step: int) -> None:
        if step in (SKIPPED_STEPS, codes.shape[-1] - 1):
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            at.append(time.perf_counter())

    gc.collect()  # moshi's streaming modules and their graphs hold themselves in cycles
    observers: list[Observer] = [] if recorder is None else [recorder]
    with borrowed(lm, 0):
        user = codes[:, Rows.of(lm).user]
        generate(lm, codes[:, :, :10], user, observers=[*observers, EachStep(clock)])
    return 1000 * (at[1] - at[0]) / (codes.shape[-1] - 1 - SKIPPED_STEPS)


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add_model(parser, default=RANDOM_7B)
    rules = Literal["none", "ttt_linear", "ttt_mlp", "gated_delta"]
    add("--memory", type=rules, default="gated_delta", help="Rule in the last five layers.")
    add("--streams", type=int, default=4, help="Rows of the batch.")
    add("--steps", type=int, default=300, help="Length of one generation.")
    add("--repeats", type=int, default=5, help="Rounds after the one that warms up.")
    add("--context_steps", type=int | None, default=375, help="Ring capacity C.")
    add("--attention_every", type=int, default=0, help="Also with attention mass every n steps.")
    add_device(parser)
    return parser


if __name__ == "__main__":
    run_program(main)

"""What the bundled tiny Moshi takes on a CPU: a step of generation, and one of training.

    python scripts/bench/tiny_cpu.py

`upstream` is moshi as moshi loads it, `vanilla` the same weights here, `memory` with the bundled
memory in every layer. The models take turns, so that what else the machine does slows all of them
alike; medians over the turns. Generation runs on one thread, as everywhere here; training is the
forward and backward pass of two clips of 60 s down to the first layer, on as many as torch takes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from jsonargparse import ArgumentParser
from moshi.models.lm import LMModel

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import run_program
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.model.source import ASSETS, TINY, open_source
from moshi_ttt.model.weights import load_trained
from moshi_ttt.progress import progress
from moshi_ttt.rows import Rows
from moshi_ttt.teacher_forcing.losses import LossConfig, lm_losses, read_clips

CONTEXT_STEPS = 188
STEPS, PROMPT_STEPS = 100, 5  # of a turn of generation
CLIPS, CLIP_STEPS = 2, 750
Turn = Callable[[], float]
"""Does some of the work; gives milliseconds a step."""


def models() -> dict[str, LMModel]:
    """By the names of their rows."""
    source = open_source(TINY)
    context = {"context": CONTEXT_STEPS}
    upstream = source._info.get_moshi(
        device="cpu", dtype=torch.float32, lm_kwargs_overrides=context
    )
    return {
        "upstream": upstream.eval().requires_grad_(False),
        "vanilla": source.lm(context_steps=CONTEXT_STEPS).requires_grad_(False),
        "memory": load_trained(ASSETS / TINY / "memory.safetensors")[0].requires_grad_(False),
    }


def codes_for(lm: LMModel, streams: int, steps: int) -> torch.Tensor:
    """Random codes, [streams, K, steps]."""
    return torch.randint(min(lm.card, lm.text_card), (streams, Rows.of(lm).count, steps))


def generating(lm: LMModel, streams: int) -> Turn:
    """A turn of free talk."""
    codes = codes_for(lm, streams, STEPS)

    def turn() -> float:
        with borrowed(lm, 0):
            start = time.perf_counter()
            generate(lm, codes[:, :, :PROMPT_STEPS], codes[:, Rows.of(lm).user])
            return 1000 * (time.perf_counter() - start) / STEPS

    return turn


def training(lm: LMModel, upstream: bool) -> Turn:
    """A turn of forward and backward, for the weights that the first layer multiplies with."""
    trained = next(lm.transformer.layers[0].parameters()).requires_grad_()
    codes, config = codes_for(lm, CLIPS, CLIP_STEPS), LossConfig()

    def turn() -> float:
        start = time.perf_counter()
        if upstream:
            text, audio = lm_losses(lm, lm(codes), codes, config)
        else:
            text, audio = read_clips(lm, codes, config)[1:]
        torch.autograd.grad(text + audio, trained)
        return 1000 * (time.perf_counter() - start)

    return turn


def take_turns(turns: Mapping[str, Turn], rounds: int) -> dict[str, float]:
    """Median of each, after a turn to warm up."""
    found = defaultdict[str, list[float]](list)
    for count in progress(range(rounds + 1), desc="rounds"):
        for name, turn in turns.items():
            taken = turn()
            if count:
                found[name].append(taken)
    return {name: median(times) for name, times in found.items()}


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parse(_parser(), args)
    rows = models()
    works: dict[str, dict[str, Turn]] = {
        f"generation, {streams} stream{'s' if streams > 1 else ''}": {
            name: generating(lm, streams) for name, lm in rows.items()
        }
        for streams in options.streams
    }
    works[f"training, {CLIPS} x {CLIP_STEPS} steps"] = {
        name: training(lm, name == "upstream") for name, lm in rows.items()
    }
    for work, turns in works.items():
        found = take_turns(turns, options.rounds)
        said = [f"{name} {ms:.1f} ms" for name, ms in found.items()]
        ratios = [f"x {found['upstream'] / ms:.2f}" for ms in found.values()]
        print(f"{work}: {', '.join(said)} ({', '.join(ratios)})", flush=True)


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--streams", type=int, nargs="+", default=[1, 4], help="Streams at once.")
    add("--rounds", type=int, default=7, help="Turns of each model.")
    return parser


if __name__ == "__main__":
    run_program(main)

"""What a step of generation costs on Moshi 7B's shape, with and without a memory (one GPU).

    python scripts/bench/generation7b.py                            # 1 and 4 streams
    python scripts/bench/generation7b.py --rows hybrid --streams 1 --kernels

Random weights: times and memory are those of the real model. Every row runs `LMGen` with its CUDA
graphs and 30 s of attention, and says how long a step takes, the graph of the temporal
transformer and that of the depformer alone, and how many kernels a step launches. `upstream` is
moshi as it is loaded by moshi.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from moshi.models import loaders
from moshi.models.lm import LMGen, LMModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training7b import free

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import run_program
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import ModelConfig, build_lm
from moshi_ttt.model.source import RANDOM_7B, open_source

CONTEXT_STEPS = 375
Kind = Literal["upstream", "vanilla", "hybrid"]


def model(kind: Kind, memory: MemoryConfig) -> LMModel:
    """The model of a row, on the GPU."""
    if kind == "upstream":
        context = {"context": CONTEXT_STEPS}
        lm = loaders.get_moshi_lm(
            None, loaders._lm_kwargs, "cuda", torch.bfloat16, lm_kwargs_overrides=context
        )
    elif kind == "vanilla":
        lm = open_source(RANDOM_7B).lm(
            device="cuda", dtype=torch.bfloat16, context_steps=CONTEXT_STEPS
        )
    else:
        config = ModelConfig(
            source=RANDOM_7B,
            dtype="bfloat16",
            context_steps=CONTEXT_STEPS,
            train="memory",
            memory=memory,
        )
        lm = build_lm(config, open_source(RANDOM_7B), "cuda")
    return lm.eval()


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Mean wall time of `run`, which has run before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / repeats


@torch.no_grad()
def measure(lm: LMModel, streams: int, with_kernels: bool) -> str:
    """A line of the table without its name."""
    user = torch.randint(0, 2048, (streams, 8, 1), device="cuda")
    lm_gen = LMGen(lm)

    def step() -> None:
        lm_gen.step(user)

    with lm_gen.streaming(streams):
        milliseconds(step, 30)
        step_ms = milliseconds(step, 300)
        state: Any = lm_gen._streaming_state
        temporal_ms = milliseconds(state.graphed_main._graph.replay, 200)
        depformer_ms = milliseconds(state.graphed_depth._graph.replay, 200)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
    kernels = [one for one in seen.key_averages() if one.device_type == DeviceType.CUDA]
    if with_kernels:
        for one in sorted(kernels, key=lambda one: -one.self_device_time_total)[:40]:
            print(f"{one.self_device_time_total:9.1f} us {one.count:5}  {one.key[:100]}")
    return (
        f"{step_ms:6.2f} ms  (temporal {temporal_ms:5.2f}, depformer {depformer_ms:5.2f}; "
        f"{sum(one.count for one in kernels)} kernels)"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parse(_parser(), args)
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, C = {CONTEXT_STEPS}")
    for kind in options.rows:
        for streams in options.streams:
            lm = model(kind, MemoryConfig(**vars(options.memory)))
            found = measure(lm, streams, options.kernels)
            print(f"{kind:9} {streams} streams  {found}", flush=True)
            del lm
            free()


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    kinds: list[Kind] = ["upstream", "vanilla", "hybrid"]
    add("--rows", nargs="+", choices=kinds, default=kinds, help="Models to measure.")
    add("--streams", type=int, nargs="+", default=[1, 4], help="Streams at once.")
    add("--kernels", action="store_true", help="Also print the kernels of a step.")
    parser.add_class_arguments(MemoryConfig, "memory")
    parser.set_defaults({"memory.projections": "shared", "memory.rank": 64})
    return parser


if __name__ == "__main__":
    run_program(main)

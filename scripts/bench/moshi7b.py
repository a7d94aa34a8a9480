"""Cost of the memory and of recording on Moshi 7B's shape, side by side in one run (one GPU).

    python scripts/bench/moshi7b.py
    python scripts/bench/moshi7b.py --rules gated_delta --memory.layers every:1 \
        --memory.projections shared --memory.rank 64 --steps 950

Random weights: times and memory are those of the real model, the tokens mean nothing. Prints a
table of training steps (clips of 60 s, memory in layers 25-29 unless told otherwise) and of
generation steps (CUDA graphs, 4 streams): vanilla, hybrid, hybrid with the recorder. Medians after
warm-up.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import run_program
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep, Observer
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import RULES
from moshi_ttt.model.build import ModelConfig, build_lm, trainable_groups
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.lora import LoraConfig
from moshi_ttt.model.source import RANDOM_7B, open_source
from moshi_ttt.teacher_forcing.losses import LossConfig, read_clips

CLIP_STEPS, STREAMS = 750, 4


def config(memory: MemoryConfig) -> ModelConfig:
    """As `configs/moshiko.yaml` has it."""
    return ModelConfig(
        source=RANDOM_7B,
        dtype="bfloat16",
        context_steps=375,
        train="memory",
        memory=memory,
        lora=LoraConfig(),
    )


def codes(streams: int, steps: int) -> torch.Tensor:
    """Random tokens, [streams, 17, steps]."""
    return torch.randint(0, 2048, (streams, 17, steps), device="cuda")


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run` after two warm-ups."""
    times_ms = []
    for number in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if number >= 2:
            times_ms.append(1000 * (time.perf_counter() - start))
    return statistics.median(times_ms)


def training(chosen: ModelConfig, clips: int) -> tuple[float, float]:
    """Milliseconds and peak GiB of one optimizer step."""
    lm = build_lm(chosen, open_source(RANDOM_7B), "cuda", gradient_checkpointing=True).train()
    groups = trainable_groups(lm)
    parameters = [p for group in groups.values() for p in group.values()]
    print(f"  trained parameters: {sum(p.numel() for p in parameters) / 1e6:.1f} M")
    optimizer = torch.optim.AdamW(parameters, fused=True)
    batch = codes(clips, CLIP_STEPS)
    heard = [True] * clips

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            _, text_loss, audio_loss = read_clips(lm, batch, LossConfig(), heard)
        (text_loss + audio_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    return milliseconds(step, repeats=5), torch.cuda.max_memory_allocated() / 2**30


def generation(memory: MemoryConfig | None, recorded: bool, steps: int) -> float:
    """Milliseconds a step, from steps after the graphs were captured."""
    source = open_source(RANDOM_7B)
    if memory is None:
        lm = source.lm(device="cuda", dtype=torch.bfloat16, context_steps=375)
    else:
        lm = build_lm(config(memory), source, "cuda")
        states = [layer.branch.rule.init_state(1) for layer in hybrid_layers(lm).values()]
        size = sum(
            part.numel() * part.element_size() for state in states for part in state.values()
        )
        print(f"  state of a stream: {size / 2**20:.1f} MiB")
    prompt = codes(STREAMS, steps)
    at: list[float] = []

    def clock(step: int) -> None:
        if step in (50, steps - 1):
            torch.cuda.synchronize()
            at.append(time.perf_counter())

    with borrowed(lm, 0):
        recorders = [Recorder(lm, STREAMS, steps)] if recorded else []
        watching: list[Observer] = [*recorders, EachStep(clock)]
        generate(lm, prompt[:, :, :10], prompt[:, 9:], observers=watching)
    return 1000 * (at[1] - at[0]) / (steps - 1 - 50)


def free() -> None:
    """Drop the last model; moshi's streaming modules hold themselves in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def main(args: list[str] | None = None) -> None:
    """Print the table."""
    options = parse(_parser(), args)
    memory = MemoryConfig(**vars(options.memory))
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    memories = {rule: replace(memory, rule=rule) for rule in options.rules}
    if "ttt_linear" in memories:
        memories["ttt_linear, 64"] = replace(memories["ttt_linear"], mini_batch_steps=64)
    for name, one in memories.items():
        step_ms, peak_gib = training(config(one), options.clips)
        what = f"{options.clips} x 60 s, {name}"
        print(f"training step, {what:26} {step_ms:8.1f} ms  peak {peak_gib:.1f} GiB")
        free()
    vanilla_ms = generation(None, recorded=False, steps=options.steps)
    free()
    print(f"generation step, vanilla                {vanilla_ms:8.2f} ms")
    for rule in options.rules:
        for recorded in (False, True):
            step_ms = generation(memories[rule], recorded, options.steps)
            what = f"{rule}{' + recorder' if recorded else ''}"
            print(f"generation step, {what:22} {step_ms:8.2f} ms  x {step_ms / vanilla_ms:.3f}")
            free()


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--rules", nargs="+", choices=RULES, default=list(RULES), help="Memory rules to measure.")
    add("--clips", type=int, default=1, help="Clips of 60 s in a training step.")
    add("--steps", type=int, default=300, help="Steps to generate.")
    parser.add_class_arguments(MemoryConfig, "memory", skip={"rule"})
    parser.set_defaults({"memory.layers": [25, 26, 27, 28, 29], "memory.heads": 32})
    return parser


if __name__ == "__main__":
    run_program(main)

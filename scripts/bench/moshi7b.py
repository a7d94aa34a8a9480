"""Cost of the memory and of recording on Moshi 7B's shape, side by side in one run (one GPU).

    python scripts/bench/moshi7b.py

Random weights: times and memory are those of the real model, the tokens mean nothing. Prints a
table of training steps (1 clip of 60 s, memory in layers 25-29) and of generation steps (CUDA
graphs, 4 streams): vanilla, hybrid, hybrid with the recorder. Medians after warm-up.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import RULES, Rule
from moshi_ttt.model.build import ModelConfig, build_lm, trainable_groups
from moshi_ttt.model.lora import LoraConfig
from moshi_ttt.model.source import RANDOM_7B, open_source
from moshi_ttt.teacher_forcing.losses import LossConfig, lm_losses

CLIP_STEPS, GENERATED_STEPS, STREAMS = 750, 300, 4


def config(rule: Rule, mini_batch_steps: int = 16) -> ModelConfig:
    """Memory in layers 25 to 29, as `configs/moshiko.yaml` has it."""
    return ModelConfig(
        source=RANDOM_7B,
        dtype="bfloat16",
        context_steps=375,
        train="memory",
        memory=MemoryConfig(
            rule=rule, layers=[25, 26, 27, 28, 29], heads=32, mini_batch_steps=mini_batch_steps
        ),
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


def training(chosen: ModelConfig) -> tuple[float, float]:
    """Milliseconds and peak GiB of one optimizer step."""
    lm = build_lm(chosen, open_source(RANDOM_7B), "cuda", gradient_checkpointing=True).train()
    parameters = [p for group in trainable_groups(lm).values() for p in group.values()]
    optimizer = torch.optim.AdamW(parameters)
    clip = codes(1, CLIP_STEPS)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            losses = lm_losses(lm, lm(clip), clip, LossConfig())
        sum(losses).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    return milliseconds(step, repeats=5), torch.cuda.max_memory_allocated() / 2**30


def generation(rule: Rule | None, recorded: bool) -> float:
    """Milliseconds a step, from steps after the graphs were captured."""
    source = open_source(RANDOM_7B)
    if rule is None:
        lm = source.lm(device="cuda", dtype=torch.bfloat16, context_steps=375)
    else:
        lm = build_lm(config(rule), source, "cuda")
    prompt = codes(STREAMS, GENERATED_STEPS)
    at: list[float] = []

    def clock(step: int) -> None:
        if step in (50, GENERATED_STEPS - 1):
            torch.cuda.synchronize()
            at.append(time.perf_counter())

    with borrowed(lm, 0):
        recorder = Recorder(lm, STREAMS, GENERATED_STEPS) if recorded else None
        generate(lm, prompt[:, :, :10], prompt[:, 9:], recorder=recorder, on_step=clock)
    return 1000 * (at[1] - at[0]) / (GENERATED_STEPS - 1 - 50)


def free() -> None:
    """Drop the last model; moshi's streaming modules hold themselves in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Print the table."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    trained = [(rule, config(rule)) for rule in RULES]
    for rule, chosen in [*trained, ("ttt_linear", config("ttt_linear", mini_batch_steps=64))]:
        step_ms, peak_gib = training(chosen)
        what = f"{rule}, mini-batch {chosen.memory.mini_batch_steps}"
        print(f"training step, 1 x 60 s, {what:26} {step_ms:8.1f} ms  peak {peak_gib:.1f} GiB")
        free()
    vanilla_ms = generation(None, recorded=False)
    free()
    print(f"generation step, vanilla                {vanilla_ms:8.2f} ms")
    for rule in RULES:
        for recorded in (False, True):
            step_ms = generation(rule, recorded)
            what = f"{rule}{' + recorder' if recorded else ''}"
            print(f"generation step, {what:22} {step_ms:8.2f} ms  x {step_ms / vanilla_ms:.3f}")
            free()


if __name__ == "__main__":
    main()

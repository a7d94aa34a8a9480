"""Where a training step of Moshi 7B's shape spends its time, beside its floor (one GPU).

    python scripts/bench/training7b.py                          # every row
    python scripts/bench/training7b.py --rows memory_25_29 --operators

Random weights: times and memory are those of the real model. One table: milliseconds of an
optimizer step (median after warm-up), tokens a second (9 a step of a clip), peak memory, and the
floor, which is the operations of its matrix products at the rate that one large product reaches
here. `upstream` is moshi's own forward and moshi's own LoRA on the same codes.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jsonargparse import ArgumentParser
from moshi.models import loaders
from moshi.models.lm import LMModel
from moshi.utils.compile import no_compile
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import run_program
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.build import ModelConfig, Trained, build_lm, trainable_groups
from moshi_ttt.model.hybrid import observe_branches
from moshi_ttt.model.lora import LoraConfig
from moshi_ttt.model.source import RANDOM_7B, open_source
from moshi_ttt.teacher_forcing.losses import LossConfig, lm_losses, magnitude_penalty, read_clips

TOKENS_A_STEP = 9  # text and Moshi's own codebooks: what is predicted
LAST = [25, 26, 27, 28, 29]
EVERY = MemoryConfig(projections="shared", rank=64)
TTT = MemoryConfig(rule="ttt_linear", layers=LAST, projections="own", heads=32)


@dataclass(frozen=True)
class Row:
    """A model and a batch."""

    clips: int
    seconds: int
    train: Trained | None = "memory"  # None: a weight of layer 25
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    rank: int = 128
    checkpointing: bool = False
    upstream: bool = False
    regularised: bool = False  # as moshiko.yaml has it


def _last(clips: int, seconds: int) -> Row:
    return Row(clips, seconds, memory=MemoryConfig(layers=LAST, projections="shared", rank=64))


ROWS = {
    "layers_25_29": Row(8, 60, None),
    "memory_25_29": _last(8, 60),
    "ttt_25_29": Row(8, 60, memory=TTT),
    "every": Row(8, 60, memory=EVERY),
    "moshiko": Row(8, 60, memory=EVERY, regularised=True),
    "every_checkpointed": Row(8, 60, memory=EVERY, checkpointing=True),
    "lora": Row(16, 100, "lora", checkpointing=True),
    "lora_upstream": Row(16, 100, "lora", checkpointing=True, upstream=True),
    "short": _last(1, 15),
    "short_layers": Row(1, 15, None),
    "every_4x60": Row(4, 60, memory=EVERY),
    "every_1x60": Row(1, 60, memory=EVERY),
    "every_1x120": Row(1, 120, memory=EVERY),
    "lora_1x60": Row(1, 60, "lora", rank=64),
    "ttt_1x60": Row(1, 60, memory=TTT),
}


def model(row: Row) -> LMModel:
    """The model of a row, on the GPU, in training mode."""
    if row.upstream:
        settings = dict(loaders._lm_kwargs)
        overrides: dict[str, Any] = {"context": 375, "gradient_checkpointing": True}
        overrides |= {"lora": True, "lora_rank": row.rank, "lora_scaling": 2.0}
        lm = loaders.get_moshi_lm(
            None, settings | overrides, "cuda", torch.bfloat16, fuse_lora=False
        )
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return lm.train()
    config = ModelConfig(
        source=RANDOM_7B,
        dtype="bfloat16",
        context_steps=375,
        train=row.train or "memory",
        memory=row.memory,
        lora=LoraConfig(rank=row.rank, targets=("qkv", "attention_out", "ffn", "depformer")),
    )
    source = open_source(RANDOM_7B)
    if row.train is not None:
        return build_lm(config, source, "cuda", row.checkpointing).train()
    lm = source.lm(device="cuda", dtype=torch.bfloat16, context_steps=375).requires_grad_(False)
    lm.get_submodule(f"transformer.layers.{LAST[0]}.self_attn.in_projs.0").requires_grad_(True)
    return lm.train()


def optimizer_step(lm: LMModel, row: Row) -> Callable[[], None]:
    """What trains `lm` once on random codes."""
    parameters = [p for group in trainable_groups(lm).values() for p in group.values()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    codes = torch.randint(0, 2048, (row.clips, 17, round(12.5 * row.seconds)), device="cuda")
    config, heard = LossConfig(), [True] * row.clips

    def losses() -> tuple[Tensor, Tensor]:
        if row.upstream:
            return lm_losses(lm, lm(codes), codes, config)
        return read_clips(lm, codes, config, heard)[1:]

    def step() -> None:
        scope: AbstractContextManager[Any] = nullcontext({})
        if row.regularised:
            scope = observe_branches(lm)
        with torch.autocast("cuda", torch.bfloat16):
            with scope as stats:
                text_loss, audio_loss = losses()
            loss = text_loss + audio_loss
            if stats:
                loss = loss + magnitude_penalty(stats, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `run`, which has run before."""
    times_ms = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times_ms.append(1000 * (time.perf_counter() - start))
    return statistics.median(times_ms)


def ceiling() -> float:
    """Operations a second of one product of 8192 x 8192 in bf16."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    milliseconds(lambda: a @ b, 5)
    return 2 * 8192**3 / milliseconds(lambda: a @ b, 20) * 1000


def operators(step: Callable[[], None]) -> str:
    """Which kernels a step spends its time in, and how many it launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    averages = seen.key_averages()
    return averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)


def operations(lm: LMModel, row: Row) -> int:
    """Of the matrix products of a step."""
    # of one clip: counting keeps what checkpointing would let go of
    one = optimizer_step(lm, replace(row, clips=1))
    # what is compiled is not counted, and would never be compiled again
    with no_compile(), FlopCounterMode(display=False) as counter:
        one()
    return row.clips * counter.get_total_flops()


@contextmanager
def kept(lm: LMModel) -> Iterator[Counter[str]]:
    """Bytes that a forward in the scope keeps for its backward pass, by type and shape."""
    weights = {one.untyped_storage().data_ptr() for one in (*lm.parameters(), *lm.buffers())}
    found: Counter[str] = Counter()
    seen: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_cuda and storage.data_ptr() not in weights | seen:
            seen.add(storage.data_ptr())
            found[f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def measure(name: str, row: Row, rate: float, with_operators: bool, with_kept: bool) -> str:
    """A line of the table."""
    lm = model(row)
    step = optimizer_step(lm, row)
    for _ in range(2):
        step()
    floor_ms = 1000 * operations(lm, row) / rate
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step_ms = milliseconds(step, repeats=5)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    if with_operators:
        print(operators(step))
    if with_kept:
        with kept(lm) as found:
            step()
        for what, size in found.most_common(25):
            print(f"{size / 2**30:6.2f} GiB  {what}")
    tokens = row.clips * 12.5 * row.seconds * TOKENS_A_STEP
    return (
        f"{name:20} {row.clips:2} x {row.seconds:3} s  {step_ms:7.0f} ms  "
        f"{tokens / step_ms:6.1f} ktok/s  {peak_gib:5.1f} GiB  "
        f"floor {floor_ms:6.0f} ms ({floor_ms / step_ms:4.0%})"
    )


def free() -> None:
    """Let go of the last model; moshi's streaming modules hold themselves in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()  # the next is compiled for its own shapes


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = parse(_parser(), args)
    torch.set_float32_matmul_precision("high")  # as train/fit.py has it in mixed precision
    rate = ceiling()
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s")
    for name in options.rows or ROWS:
        try:
            print(measure(name, ROWS[name], rate, options.operators, options.kept), flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"{name:20} does not fit", flush=True)
        free()


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), help="Rows to measure; all of them unless told.")
    add("--operators", action="store_true", help="Also print the kernels of a step.")
    add("--kept", action="store_true", help="Also print what is kept for the backward pass.")
    return parser


if __name__ == "__main__":
    run_program(main)

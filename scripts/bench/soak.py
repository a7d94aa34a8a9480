"""Half an hour of speech without a break: does anything grow, slow down or stop being finite?

    python scripts/bench/soak.py                     # the bundled model, eight minutes on a CPU
    python scripts/bench/soak.py --model moshi7b-random --streams 4 --device cuda

A model with a memory in every layer, its gates open, talks freely against a user of random codes,
recorded at every step. Prints one table with a row for each tenth of the run, and ends with status
1 and what is wrong if anything is: a logit, hidden state or recorded norm that is not finite;
memory of the process or the GPU, or the time of a step, that grows; a branch beyond its bound; a
hidden state or fast weights that go on growing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from moshi.models.lm import LMModel
from torch import Tensor, nn

from moshi_ttt.command_line import add_device, add_model, parse, program_parser
from moshi_ttt.errors import check_bounds, run_program, settings_at
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import EachStep, Observer
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.memory.config import Rule
from moshi_ttt.model.build import ModelConfig, build_lm
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.source import RANDOM_7B, open_source
from moshi_ttt.progress import progress
from moshi_ttt.rows import Rows

PARTS, PROMPT_STEPS = 10, 10
MIB = 2**20
# what a run may do, most of it against its first tenth
PROCESS_GROWTH_MIB, CUDA_GROWTH_MIB = 8.0, 1.0
SLOWER, P99_TO_MEDIAN = 1.25, 5.0
LARGER = 2.0


class Health(Observer):
    """Whether all is finite, on the device; memory used at the end of each tenth of the run."""

    def __init__(self, lm: LMModel, steps: int) -> None:
        self._lm = lm
        self._ends = set(edges(steps)[1:])
        self._finite = torch.ones((), dtype=torch.bool, device=lm.device)
        self.anonymous_mib: list[float] = []
        self.cuda_mib: list[float] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Look at every logit and every hidden state while the scope is open."""
        lm = self._lm
        with ExitStack() as scope:
            for module in (*lm.transformer.layers, lm.transformer, lm.text_linear, *lm.linears):
                scope.callback(module.register_forward_hook(self._look).remove)
            yield

    def _look(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self._finite.logical_and_(output.isfinite().all())

    def after_step(self, step: int, /) -> None:
        """Read the memory, if it is time to."""
        if step + 1 in self._ends:
            gc.collect()  # what holds itself in cycles waits for Python, for thousands of steps
            # not what it maps of files, which comes and goes as the machine needs room
            status = Path("/proc/self/status").read_text()
            self.anonymous_mib.append(int(status.split("RssAnon:")[1].split()[0]) / 1024)
            self.cuda_mib.append(torch.cuda.memory_allocated() / MIB)

    @property
    def finite(self) -> bool:
        """Whether every logit and hidden state has been, so far."""
        return bool(self._finite)


@dataclass(frozen=True, slots=True)
class Part:
    """A tenth of the run; norms are the largest of any stream and layer in it."""

    first_step: int
    median_ms: float
    p99_ms: float
    anonymous_mib: float
    cuda_mib: float
    hidden_norm: float
    branch_ratio: float
    fast_weight_norm: float


def edges(steps: int) -> list[int]:
    """First step of each tenth, and the end."""
    return [steps * part // PARTS for part in range(PARTS + 1)]


def soak(lm: LMModel, streams: int, steps: int) -> tuple[list[Part], list[str]]:
    """Let a model talk.

    Returns:
        The tenths of the run, and what is wrong with it.
    """
    recorder, health = Recorder(lm, streams, steps), Health(lm, steps)
    codes = torch.randint(min(lm.card, lm.text_card), (streams, Rows.of(lm).count, steps))
    with borrowed(lm, 0), progress(total=steps, unit="step") as bar:
        prompt, user = codes[:, :, :PROMPT_STEPS], codes[:, Rows.of(lm).user]
        each = EachStep(lambda _: bar.update())
        generate(lm, prompt, user, observers=[recorder, health, each])
    recorded = recorder.arrays()
    parts = []
    for part, (first, stop) in enumerate(pairwise(edges(steps))):
        step_ms = recorded["step_ms"][max(first, PROMPT_STEPS) : stop]
        largest = (
            float(recorded[name][..., first:stop].max())
            for name in ("input_norm", "branch_ratio", "fast_weight_norm")
        )
        parts.append(
            Part(
                first,
                float(np.median(step_ms)),
                float(np.percentile(step_ms, 99)),
                health.anonymous_mib[part],
                health.cuda_mib[part],
                *largest,
            )
        )
    wrong = [f"{name} is not finite" for name, values in recorded.items() if not _finite(values)]
    if not health.finite:
        wrong.insert(0, "a logit or a hidden state is not finite")
    return parts, wrong + wrong_with(parts, _bound(lm))


def wrong_with(parts: list[Part], bound: float) -> list[str]:
    """What is wrong with the tenths of a run whose branches may have at most `bound` as ratio."""
    first, last, wrong = parts[0], parts[-1], []
    for name, grown, allowed in (
        ("process", last.anonymous_mib - first.anonymous_mib, PROCESS_GROWTH_MIB),
        ("GPU", last.cuda_mib - first.cuda_mib, CUDA_GROWTH_MIB),
    ):
        if grown > allowed:
            wrong.append(f"memory of the {name} grew by {grown:.1f} MiB; at most {allowed:g}")
    if last.median_ms > SLOWER * first.median_ms:
        wrong.append(f"a step went from {first.median_ms:.2f} to {last.median_ms:.2f} ms")
    for part in parts:
        where = f"from step {part.first_step} on"
        if part.p99_ms > P99_TO_MEDIAN * part.median_ms:
            wrong.append(f"{where} p99 is {part.p99_ms:.1f} ms, median {part.median_ms:.1f} ms")
        if part.branch_ratio > bound:
            wrong.append(f"{where} a branch has ratio {part.branch_ratio:.3f}, bound {bound:.3f}")
    # not against the first tenth: a memory that forgets in 27 minutes fills for as long
    for name in ("hidden_norm", "fast_weight_norm"):
        before = max(getattr(part, name) for part in parts[: PARTS // 2])
        after = max(getattr(part, name) for part in parts[PARTS // 2 :])
        if not after <= LARGER * before:
            what = f"the largest {name.replace('_', ' ')}"
            wrong.append(f"{what} went from {before:.1f} in the first half to {after:.1f}")
    return wrong


def _finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def _bound(lm: LMModel) -> float:
    """The most that any branch may add, over what it is added to."""
    gates = [layer.branch.gate.detach() for layer in hybrid_layers(lm).values()]
    return 1.001 * max(float(gate.float().tanh().abs().max()) for gate in gates)


def _table(parts: list[Part]) -> str:
    lines = ["from step  median ms  p99/median  anon MiB  CUDA MiB  hidden  branch/x  fast weights"]
    for part in parts:
        lines.append(
            f"{part.first_step:9} {part.median_ms:10.2f} {part.p99_ms / part.median_ms:11.2f}"
            f" {part.anonymous_mib:9.1f} {part.cuda_mib:9.1f} {part.hidden_norm:7.1f}"
            f" {part.branch_ratio:9.4f} {part.fast_weight_norm:13.2f}"
        )
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Print the table.

    Raises:
        SystemExit: with what is wrong.
    """
    options = parse(_parser(), args)
    check_bounds("--steps", options.steps, least=PARTS * (PROMPT_STEPS + 1))
    with settings_at("", source="--model", context_steps="--context_steps"):
        source = open_source(options.model)
        config = ModelConfig(
            source=source.name,
            dtype="bfloat16" if source.name == RANDOM_7B else "float32",
            context_steps=options.context_steps,
            train="memory",
            memory=MemoryConfig(rule=options.memory, layers="every:1", gate_init=options.gate),
        )
        torch.manual_seed(0)
        lm = build_lm(config, source, options.device)
    parts, wrong = soak(lm, options.streams, options.steps)
    where = torch.cuda.get_device_name() if lm.device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {options.model}, {options.memory} in every layer")
    minutes = source.clock.seconds(options.steps) / 60
    print(f"{options.streams} streams, {options.steps} steps ({minutes:.1f} min of speech)")
    print(_table(parts))
    if wrong:
        raise SystemExit("\n".join(wrong))
    print("nothing is wrong")


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add_model(parser, default="tiny")
    add("--memory", type=Rule, default="gated_delta", help="Rule in every layer.")
    add("--gate", type=float, default=0.5, help="Where all gates are, before tanh.")
    add("--streams", type=int, default=1, help="Rows of the batch.")
    add("--steps", type=int, default=22_500, help="Length of the generation; 22 500 = 30 min.")
    add("--context_steps", type=int | None, help="Ring capacity C; null: the model's own.")
    add_device(parser)
    return parser


if __name__ == "__main__":
    run_program(main)

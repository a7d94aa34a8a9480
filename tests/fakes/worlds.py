"""Cells of simulated worlds in which one hypothesis, or none, is true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from synthetic_trace import noise

from moshi_ttt.attribution.conditions import Cell, Condition
from moshi_ttt.attribution.evidence import Evidence
from moshi_ttt.attribution.verdict import Verdict, judge
from moshi_ttt.clock import Clock

CAPACITIES = (150, 225, 300)
STEPS = 750
SEEDS = (0, 1, 2)
Rise = Callable[[Condition], np.ndarray]  # [T] added to the log norm of layers 2 and deeper

EVICTION, LINEAGE = "eviction of the first key", "2C lineage"
ABSOLUTE, TRAINED = "absolute position", "training length"
DRIFT, MEMORY = "self-conditioning drift", "the memory (TTT) itself"


def matrix(*, trained: tuple[int, ...] = (188,), memory: bool = True) -> list[Condition]:
    plain = [
        Condition(context_steps=c, model="a", trained_steps=trained[0], has_memory=memory)
        for c in CAPACITIES
    ]
    conditions = list(plain)
    for one in plain:
        conditions += [replace(one, sinks=4), replace(one, regime="forced")]
        if memory:
            conditions.append(replace(one, gates_shut=True))
    middle = plain[1]
    conditions += [replace(middle, start_position=start) for start in (137, 5000)]
    conditions.append(replace(middle, regime="silent"))
    for number, steps in enumerate(trained[1:]):
        conditions.append(replace(plain[-1], model=f"b{number}", trained_steps=steps))
    return conditions


def world(
    rise: Rise,
    *,
    seed: int = 0,
    sd: float = 0.06,
    prompts: int = 3,
    seeds: int = 3,
    trend: float = 0.0,
    steps: int = STEPS,
    **settings: object,
) -> list[Cell]:
    """Cells of the matrix: noise as of speech, and what the world adds under each condition."""
    generator = np.random.default_rng(seed)
    cells = []
    for condition in matrix(**settings):  # type: ignore[arg-type]
        log_norm = noise(generator, (prompts * seeds, 4, steps), sd=sd)
        log_norm[:, 2:] += rise(condition)[:steps]
        log_norm += trend * np.arange(steps) / steps
        cells.append(
            Cell(condition, log_norm, np.repeat(np.arange(prompts), seeds), prompt_steps=50)
        )
    return cells


def verdict(cells: list[Cell]) -> Verdict:
    return judge(Evidence(cells), Clock())


def step_at(position: float, size: float = 0.4) -> np.ndarray:
    return size * (np.arange(STEPS) >= position)


def eviction(one: Condition) -> np.ndarray:
    return step_at(one.context_steps, 0.04 if one.sinks else 0.4)


def lineage(one: Condition) -> np.ndarray:
    return step_at(2 * one.context_steps - 1, 0.04 if one.sinks else 0.4)


def absolute(one: Condition) -> np.ndarray:
    return step_at(430 - one.start_position) * (one.start_position < 430)


def beyond_training(one: Condition) -> np.ndarray:
    assert one.trained_steps is not None
    return 0.0012 * np.maximum(0, np.arange(STEPS) - one.trained_steps)


def drift(one: Condition) -> np.ndarray:
    return (one.regime != "forced") * np.linspace(0, 0.5, STEPS)


def sudden_drift(one: Condition) -> np.ndarray:
    return (one.regime != "forced") * step_at(400)


def memory_grows(one: Condition) -> np.ndarray:
    return (not one.gates_shut) * np.linspace(0, 0.5, STEPS)


def nothing(one: Condition) -> np.ndarray:
    return np.zeros(STEPS)


WORLDS: dict[str, tuple[Rise, str, set[str]]] = {
    # world: what it adds, the true hypothesis, hypotheses that may stay undecided
    "eviction": (eviction, EVICTION, set()),
    "lineage": (lineage, LINEAGE, set()),
    "absolute": (absolute, ABSOLUTE, set()),
    "drift": (drift, DRIFT, {TRAINED}),
    "sudden drift": (sudden_drift, DRIFT, set()),
    "memory": (memory_grows, MEMORY, {TRAINED}),
}


def turns(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Who speaks, in turns of some seconds, [..., T] of 0 and 1."""
    lengths = generator.integers(15, 80, size=(*shape[:-1], shape[-1] // 15 + 1))
    number = np.cumsum(lengths, axis=-1)[..., None] <= np.arange(shape[-1])
    return (number.sum(axis=-2) % 2).astype(float)


def talked_over(cells: list[Cell], seed: int, to: float = -0.7) -> list[Cell]:
    """The same with norms that follow who speaks, as those of the tiny Moshi do."""
    generator = np.random.default_rng(seed)
    found = []
    for cell in cells:
        streams, _, steps = cell.log_norm.shape
        speaking = turns(generator, (streams, 2, steps))
        log_norm = cell.log_norm + to * speaking[:, :1] - 0.5 * to * speaking[:, 1:]
        found.append(replace(cell, log_norm=log_norm, speaking=speaking))
    return found

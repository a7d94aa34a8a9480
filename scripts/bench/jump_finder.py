"""How often the jump finder finds what is there, and reports what is not: the table of the docs.

    python scripts/bench/jump_finder.py --trials 300
    pip install ruptures && python scripts/bench/jump_finder.py --ruptures

Noise as of speech: autocorrelated over 5 steps, heavy-tailed, half of it shared by the layers,
and talking and listening by turns. A run is 900 steps of 4 layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.signal import lfilter

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.instruments.critical import Lengths, critical_steps
from moshi_ttt.progress import progress

LAYERS, STEPS = 4, 900
NEAR_STEPS = 25
Finder = Callable[[np.ndarray], list[int]]  # log norm [S, L, T] to steps
Shape = Callable[[np.random.Generator, int], np.ndarray]  # streams to something like [S, L, T]


def noise(generator: np.random.Generator, streams: int, sd: float) -> np.ndarray:
    """Log-norm noise [S, L, T]."""
    innovations = generator.standard_t(4, size=(streams, LAYERS + 1, STEPS)) / np.sqrt(2)
    correlated = lfilter([np.sqrt(1 - 0.8**2)], [1.0, -0.8], innovations, axis=-1)
    talks = np.cumsum(generator.random((streams, 1, STEPS)) < 1 / 25, axis=-1) % 2
    return np.asarray(sd * (correlated[:, :1] + correlated[:, 1:]) / np.sqrt(2) + 0.1 * talks)


def _flat(_: np.random.Generator, __: int) -> np.ndarray:
    return np.zeros(STEPS)


def _linear(_: np.random.Generator, __: int) -> np.ndarray:
    return np.log(np.linspace(1, 3, STEPS))


def _exponential(_: np.random.Generator, __: int) -> np.ndarray:
    return np.linspace(0, 1.5, STEPS)


def _later_growth(_: np.random.Generator, __: int) -> np.ndarray:
    return np.asarray(0.0015 * np.maximum(0, np.arange(STEPS) - 400))


def _waves(generator: np.random.Generator, _: int) -> np.ndarray:
    phase = generator.uniform(0.5, 2) * np.linspace(0, 2 * np.pi, STEPS) + generator.uniform(0, 6)
    return np.asarray(0.3 * np.sin(phase))


def _walks(generator: np.random.Generator, streams: int) -> np.ndarray:
    return np.cumsum(0.005 * generator.normal(size=(streams, 1, STEPS)), axis=-1)


def _bursts(generator: np.random.Generator, _: int) -> np.ndarray:
    bursts = np.zeros(STEPS)
    for start in generator.integers(50, STEPS - 60, size=6):
        length = generator.integers(2, 40)
        bursts[start : start + length] += np.log(generator.uniform(1.5, 3))
    return bursts


def _long_burst(generator: np.random.Generator, _: int) -> np.ndarray:
    burst = np.zeros(STEPS)
    burst[400 : 400 + generator.integers(40, 140)] = np.log(1.7)
    return burst


def _fall(_: np.random.Generator, __: int) -> np.ndarray:
    return np.linspace(0, np.log(0.5), STEPS)


def _fall_that_ends(_: np.random.Generator, __: int) -> np.ndarray:
    return np.asarray(np.log(0.5) * np.minimum(np.arange(STEPS), 300) / 300)


WITHOUT_A_STEP: dict[str, Shape] = {
    "noise alone": _flat,
    "linear growth to x3": _linear,
    "exponential growth to x4.5": _exponential,
    "growth from step 400 on": _later_growth,
    "a fall to half": _fall,
    "a fall to half in 300 steps": _fall_that_ends,
    "slow waves of x1.35": _waves,
    "random walks": _walks,
    "six bursts of up to 40 steps": _bursts,
    "one burst of 40-140 steps": _long_burst,
}


_AT = np.arange(STEPS)
GROWTH: dict[str, np.ndarray] = {
    "to x2 with a time constant of 75 steps, from the beginning": np.log(2 - np.exp(-_AT / 75)),
    "logistic to x2, 10 to 90 % in 176 steps": np.log(2) / (1 + np.exp(-(_AT - 450) / 40)),
    "to x1.6 in 100 steps": np.log(1.6) * np.clip((_AT - 400) / 100, 0, 1),
    "to x1.6 in 50 steps": np.log(1.6) * np.clip((_AT - 400) / 50, 0, 1),
    "a step to x1.25": np.log(1.25) * (_AT >= 400),
    "a step to x1.6": np.log(1.6) * (_AT >= 400),
}


@dataclass(frozen=True, slots=True)
class Planted:
    """Runs with rises of two of the layers."""

    streams: int
    ratio: float
    sd: float = 0.06
    at: tuple[int, ...] = ()
    """Where; somewhere if empty."""
    on: Shape = _flat

    def run(self, generator: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
        """Log norms [S, L, T], and where they rise."""
        log_norm = noise(generator, self.streams, self.sd) + self.on(generator, self.streams)
        places = self.at or (int(generator.integers(150, STEPS - 140)),)
        for at in places:
            log_norm[:, 2:, at:] += np.log(self.ratio)
        return log_norm, places

    def describe(self) -> str:
        """The row's name."""
        where = f" at {' and '.join(map(str, self.at))}" if self.at else ""
        on = " on a fall to half" if self.on is _fall else ""
        rise = f"+{round(100 * (self.ratio - 1))} %"
        return f"{self.streams} streams, {rise}{where}{on}, noise {self.sd:g}"


def near(step: int, at: int) -> bool:
    """Whether a found step is the planted one."""
    return abs(step - at) <= NEAR_STEPS


@dataclass(frozen=True, slots=True)
class Norms:
    """A run of which nothing but the norms is known."""

    input_norm: np.ndarray  # [S, L, T]

    def critical_steps(self) -> dict[str, int]:
        """Of a ring of 375 slots."""
        return critical_steps(Lengths(375, self.input_norm.shape[-1]), structural=True)


def ours(log_norm: np.ndarray) -> list[int]:
    """Steps that `find_jumps` reports."""
    return [jump.step for jump in find_jumps(Norms(np.exp(log_norm)))]


def with_ruptures() -> dict[str, Finder]:
    """PELT of the library, on the layers' median curve over streams, in blocks of 5 steps."""
    try:
        import ruptures
    except ImportError as error:
        raise UserError("--ruptures: the package is not installed; pip install ruptures") from error

    def finder(model: str, weight: float) -> Finder:
        def find(log_norm: np.ndarray) -> list[int]:
            curve = np.median(log_norm, axis=0)[:, 8:]  # [L, T]
            blocks = curve[:, : curve.shape[1] // 5 * 5].reshape(len(curve), -1, 5).mean(-1).T
            usual = np.median(np.abs(np.diff(blocks, axis=0))) * 1.4826 / np.sqrt(2)
            signal = blocks / usual
            if model == "clinear":  # piecewise linear: level and trend
                signal = signal.mean(axis=1, keepdims=True)
            penalty = weight * np.log(len(signal)) * signal.shape[1]
            ends = ruptures.Pelt(model=model, min_size=10, jump=1).fit(signal).predict(pen=penalty)
            edges = [0, *ends]
            found = []
            for first, at, last in zip(edges, edges[1:], edges[2:], strict=False):
                before, after = blocks[first:at].mean(axis=0), blocks[at:last].mean(axis=0)
                if (after - before).max() >= np.log(1.15):
                    found.append(8 + 5 * at)
            return found

        return find

    return {
        "PELT, level": finder("l2", 12.0),
        "PELT, level + trend": finder("clinear", 12.0),
        "PELT, kernel": finder("rbf", 3.0),
    }


def _growth_table(trials: int) -> list[str]:
    """How smooth growth is reported, and steps beside it."""
    lines = ["\nRuns with growth, 4 streams, %:\n"]
    lines += ["| | reported as growth | as a step |\n|---|---|---|"]
    for name, growth in GROWTH.items():
        kinds = [
            {jump.gradual for jump in find_jumps(Norms(np.exp(noise(generator, 4, 0.06) + growth)))}
            for generator in map(np.random.default_rng, range(trials))
        ]
        shares = [100 * sum(kind in one for one in kinds) / trials for kind in (True, False)]
        lines.append(f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |")
    return lines


def main(args: list[str] | None = None) -> None:
    """Measure and print."""
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--trials", type=int, default=100, help="Runs of each kind.")
    add("--ruptures", action="store_true", help="The library beside it.")
    options = parse(parser, args)
    finders: dict[str, Finder] = {"find_jumps": ours}
    if options.ruptures:
        finders |= with_ruptures()
    header = "| | " + " | ".join(finders) + " |\n|---|" + "---|" * len(finders)
    lines = [f"Found within {NEAR_STEPS} steps (and runs with anything elsewhere), %:\n", header]
    for planted in (
        Planted(1, 1.4),
        Planted(1, 1.68),
        Planted(4, 1.2),
        Planted(4, 1.4),
        Planted(4, 1.68),
        Planted(8, 1.2),
        Planted(4, 1.4, sd=0.12),
        Planted(8, 1.2, sd=0.12),
        Planted(4, 1.5, at=(375, 750)),
        Planted(2, 2.0, at=(375, 750)),
        Planted(4, 1.3, on=_fall),
    ):
        row = [planted.describe()]
        for name, find in finders.items():
            hits = wrong = 0
            for trial in progress(range(options.trials), desc=f"{row[0]}, {name}", leave=False):
                log_norm, places = planted.run(np.random.default_rng(trial))
                found = find(log_norm)
                hits += all(any(near(step, at) for step in found) for at in places)
                wrong += any(not any(near(step, at) for at in places) for step in found)
            row.append(f"{100 * hits / options.trials:.1f} ({100 * wrong / options.trials:.1f})")
        lines.append(f"| {' | '.join(row)} |")
    lines += ["\nRuns with a false alarm, 4 streams, %:\n", header]
    for shape_name, shape in WITHOUT_A_STEP.items():
        row = [shape_name]
        for name, find in finders.items():
            alarms = 0
            for trial in progress(range(options.trials), desc=f"{shape_name}, {name}", leave=False):
                generator = np.random.default_rng(10_000 + trial)
                alarms += bool(find(noise(generator, 4, 0.06) + shape(generator, 4)))
            row.append(f"{100 * alarms / options.trials:.1f}")
        lines.append(f"| {' | '.join(row)} |")
    lines += _growth_table(options.trials)
    print("\n".join(lines))
    for streams, layers, steps in ((8, 32, 950), (8, 32, 6100)):
        log_norm = np.random.default_rng(0).normal(size=(streams, layers, steps)) * 0.1
        log_norm[:, 20:, steps // 2 :] += 0.4
        start = time.monotonic()
        ours(log_norm)
        print(f"\n{streams} streams x {layers} layers x {steps} steps: ", end="")
        print(f"{time.monotonic() - start:.2f} s")


if __name__ == "__main__":
    run_program(main)

"""What was run, and how it is looked at: curves in pairs, intervals from resampled streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moshi_ttt.attribution.activity import coupling
from moshi_ttt.attribution.changepoint import (
    UNKNOWN,
    Interval,
    contrasts,
    growth,
    resampled_weights,
)
from moshi_ttt.attribution.conditions import Cell, Condition, Regime

MIN_STREAMS = 4


class Runs:
    """The cells side by side: curves, local rises, and intervals over resampled streams.

    Args:
        cells: plain runs of at least one capacity, and whatever interventions were made; equal
            streams in all of them. The first plain run tells what the user does in the others.
        seed: of the resampling.

    Raises:
        ValueError: no reference cell, or cells with different streams.
    """

    def __init__(self, cells: Sequence[Cell], seed: int = 0) -> None:
        self._cells = {cell.condition: cell for cell in cells}
        first = next((c.condition for c in cells if c.condition.is_plain), None)
        if first is None:
            raise ValueError("no reference cell: a free run without any intervention")
        self.model = first.model
        self.regime: Regime = first.regime
        self.prompts = self._cells[first].prompts
        if any(not np.array_equal(cell.prompts, self.prompts) for cell in cells):
            raise ValueError("the cells do not hold the same streams")
        self.weights = resampled_weights(self.prompts, seed=seed)
        self.references: dict[int, Condition] = {
            condition.context_steps: condition
            for condition in sorted(self._cells, key=lambda one: one.context_steps)
            if self._is_reference(condition) and condition.model == self.model
        }
        self._usual, self._coupling = self._speaking()
        self.layer = self._most_changed_layer()

    def _is_reference(self, one: Condition) -> bool:
        return one.is_plain and one.regime == self.regime

    @property
    def conditions(self) -> list[Condition]:
        """All conditions, in the order given."""
        return list(self._cells)

    def where(self, of: Callable[[Condition], bool]) -> list[Condition]:
        """Conditions of the first model that differ from a reference as `of` says."""
        return [one for one in self._cells if one.model == self.model and of(one)]

    def curve(self, condition: Condition) -> np.ndarray:
        """Log norm of the examined layer after the prompt, [S, T'].

        Without what follows who speaks: as if that were always the same.
        """
        return self._curve(condition, self.layer)

    def heard_curve(self, condition: Condition) -> np.ndarray:
        """The same as it was."""
        return self._heard(self._cells[condition], self.layer)

    def _heard(self, cell: Cell, layer: int) -> np.ndarray:
        return np.asarray(cell.log_norm[:, layer, cell.first_step :], dtype=float)

    def _curve(self, condition: Condition, layer: int) -> np.ndarray:
        cell = self._cells[condition]
        heard = self._heard(cell, layer)
        if cell.speaking is None:
            return heard
        more = cell.speaking[..., cell.first_step :] - self._usual[:, None]
        return heard - np.einsum("a,sat->st", self._coupling[layer], more)

    def _speaking(self) -> tuple[np.ndarray, np.ndarray]:
        """How much is spoken in the references, [2], and how each layer's norm follows it, [L, 2].

        Zeros if it is not known.
        """
        cells = [self._cells[one] for one in self.references.values()]
        layers = cells[0].log_norm.shape[1]
        talk = [one.speaking[..., one.first_step :] for one in cells if one.speaking is not None]
        if len(talk) < len(cells):
            return np.zeros(2), np.zeros((layers, 2))
        speaking = np.concatenate(talk).astype(float)
        norms = [np.concatenate([self._heard(one, i) for one in cells]) for i in range(layers)]
        return speaking.mean(axis=(0, 2)), np.array([coupling(one, speaking) for one in norms])

    def first_step(self, condition: Condition) -> int:
        """Step of the first point of `curve`."""
        return self._cells[condition].first_step

    def contrast(self, condition: Condition, gap_steps: int = 0) -> np.ndarray:
        """Local rise at every step of the run, [S, T]; NaN where it cannot be told."""
        inside = contrasts(self.curve(condition), gap_steps=gap_steps)
        before = np.full((len(inside), self._cells[condition].first_step), np.nan)
        return np.concatenate([before, inside], axis=1)

    def interval(self, per_stream: np.ndarray) -> Interval:
        """Mean over streams, [S]."""
        if len(per_stream) < MIN_STREAMS or not np.isfinite(per_stream).all():
            return UNKNOWN
        return self._interval(float(per_stream.mean()), self.weights @ per_stream)

    def _interval(self, value: float, replicates: np.ndarray) -> Interval:
        return Interval.of(value, replicates, len(self.prompts))

    def share(self, part: np.ndarray, whole: np.ndarray) -> Interval:
        """Mean of `part` over mean of `whole`, both [S]; unknown unless `whole` is above 0."""
        base = self.interval(whole)
        if not (base.known and base.low > 0 and np.isfinite(part).all()):
            return UNKNOWN
        return self._interval(
            float(part.mean() / whole.mean()), (self.weights @ part) / (self.weights @ whole)
        )

    def _most_changed_layer(self) -> int:
        """The layer whose mean rise over the reference runs is largest, at a place or slowly."""
        layers = self._cells[next(iter(self.references.values()))].log_norm.shape[1]
        rises = np.zeros(layers)
        for layer in range(layers):
            curves = [self._curve(one, layer).mean(axis=0) for one in self.references.values()]
            steepest = [np.nanmax(contrasts(one), initial=-np.inf) for one in curves]
            rises[layer] = max(np.mean(steepest), np.mean([growth(one) for one in curves]))
        return int(np.argmax(rises))

"""What controlled generations say about a change of the norm: arrays in, evidence out.

Conditions differ in one thing at a time and share prompts and seeds, so streams are compared in
pairs; intervals come from resampling prompts and streams. `attribution.hypotheses` decides each
explanation from this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from moshi_ttt.attribution.changepoint import (
    GAP_STEPS,
    UNKNOWN,
    WINDOW_STEPS,
    Interval,
    Presence,
    growth,
    held_out,
    linear_slope,
    onset,
    peaks,
    presence,
)
from moshi_ttt.attribution.conditions import Condition
from moshi_ttt.attribution.runs import MIN_STREAMS, Runs
from moshi_ttt.diagnosis.jumps import SETTLE_STEPS

FIRST_PLACE_STEPS = SETTLE_STEPS + WINDOW_STEPS + GAP_STEPS  # after the prompt; first place seen


@dataclass(frozen=True, slots=True)
class Location:
    """Where the norm rises in the reference runs of one capacity."""

    context_steps: int
    presence: Presence
    log_ratio: Interval
    """Rise at the place that the other prompts' streams point to."""
    step: Interval
    """Place of the largest rise; meaningful where one is present."""


class Evidence(Runs):
    """Everything the verdict needs, computed from the cells when it is asked for."""

    def rise_at(self, condition: Condition, step: float) -> np.ndarray:
        """Rise of each stream at a given step, [S]; up to `GAP_STEPS` away counts in full.

        NaN where no step that near has room for the windows around it.
        """
        contrast = self.contrast(condition, GAP_STEPS)
        places = np.flatnonzero(np.isfinite(contrast).all(axis=0))
        near = places[np.abs(places - step) <= GAP_STEPS]
        if not near.size:
            return np.full(len(contrast), np.nan)
        return np.asarray(contrast[:, near[np.argmin(np.abs(near - step))]])

    @cached_property
    def locations(self) -> list[Location]:
        """One for each capacity of the reference, in order of capacity."""
        found = []
        for capacity, condition in self.references.items():
            contrast = self.contrast(condition)
            if not np.isfinite(contrast).any() or len(contrast) < MIN_STREAMS:
                found.append(Location(capacity, "unclear", UNKNOWN, UNKNOWN))
                continue
            rise = self.interval(self._held_out(condition))
            step = self._interval(float(peaks(contrast.mean(axis=0))), self._steps(condition))
            found.append(Location(capacity, presence(rise), rise, step))
        return found

    def _held_out(self, condition: Condition) -> np.ndarray:
        """Rise of each stream where those of the other prompts rise most, [S]."""
        return held_out(self.contrast(condition), self.prompts)

    def _steps(self, condition: Condition) -> np.ndarray:
        """Place of the largest rise in each resample, [B]."""
        contrast = self.contrast(condition)
        valid = np.isfinite(contrast).all(axis=0)
        places = np.flatnonzero(valid)
        return places[np.argmax(self.weights @ contrast[:, valid], axis=1)].astype(float)

    @cached_property
    def slope(self) -> Interval:
        """Steps that the rise moves for each step of capacity; needs three capacities."""
        risen = [one for one in self.locations if one.presence == "present"]
        if len(risen) < 3 or len(risen) < len(self.locations):
            return UNKNOWN
        capacities = np.array([one.context_steps for one in risen], dtype=float)
        steps = np.stack([self._steps(self.references[one.context_steps]) for one in risen])
        return self._interval(
            linear_slope(capacities, np.array([one.step.value for one in risen])[:, None])[0],
            linear_slope(capacities, steps),
        )

    @cached_property
    def growth(self) -> Interval:
        """Log norm late in the run less early in it, over all reference runs."""
        rises = [growth(self.curve(one)) for one in self.references.values()]
        return self.interval(np.mean(rises, axis=0))

    @cached_property
    def growth_as_heard(self) -> Interval:
        """The same with what follows who speaks."""
        rises = [growth(self.heard_curve(one)) for one in self.references.values()]
        return self.interval(np.mean(rises, axis=0))

    @cached_property
    def followed(self) -> float:
        """Share of what the norm does within a stream that follows who speaks."""

        def variance(of: Callable[[Condition], np.ndarray]) -> float:
            curves = np.concatenate([of(one) for one in self.references.values()])
            return float(np.nanmean(np.nanvar(curves, axis=1)))

        return 1 - variance(self.curve) / variance(self.heard_curve)

    @cached_property
    def located(self) -> list[Location]:
        """Capacities at which the rise has a place."""
        return [one for one in self.locations if one.presence == "present"]

    @property
    def change(self) -> Literal["step", "growth", "none", "unclear"]:
        """A rise at one place, a slow one, neither, or not to be told."""
        if 2 * len(self.located) > len(self.locations):
            return "step"
        slow = presence(self.growth)
        if slow == "present":
            return "growth"
        # over all capacities: each alone has a third of the streams
        rises = [self._held_out(one) for one in self.references.values()]
        sudden = presence(self.interval(np.mean(rises, axis=0)))
        return "none" if not self.located and sudden == slow == "absent" else "unclear"

    def size(self, condition: Condition) -> np.ndarray:
        """The change of each stream under a condition, [S].

        At the place where the reference of that capacity rises if it rises at a place, else
        late over early.
        """
        if self.change == "step":
            places = {one.context_steps: one.step.value for one in self.located}
            if condition.context_steps not in places:
                return np.full(len(self.prompts), np.nan)
            return self.rise_at(condition, places[condition.context_steps])
        return growth(self.curve(condition))

    def remaining(self, conditions: Sequence[Condition]) -> Interval:
        """Share of the reference's change that is left under these conditions, paired."""
        pairs = []
        for one in conditions:
            if one.context_steps in self.references:
                pair = self.size(one), self.size(self.references[one.context_steps])
                if all(np.isfinite(values).all() for values in pair):
                    pairs.append(pair)
        if not pairs:
            return UNKNOWN
        part, whole = np.mean(pairs, axis=0)
        return self.share(part, whole)

    def added_growth(self, condition: Condition) -> tuple[int, Interval]:
        """Late over early log norm, less that of the plain run of the same capacity.

        In the layer where that is most, and which layer it is: an intervention may act elsewhere.
        """
        reference = self.references[condition.context_steps]
        layers = range(self._cells[reference].log_norm.shape[1])
        added = [
            growth(self._curve(condition, layer)) - growth(self._curve(reference, layer))
            for layer in layers
        ]
        layer = int(np.argmax([one.mean() for one in added]))
        return layer, self.interval(added[layer])

    def trained_slope(self) -> tuple[Interval, list[int]]:
        """Steps that the change moves for each step of training length, and the lengths."""
        runs = {
            one.trained_steps: one
            for one in self._cells
            if self._is_reference(one)
            and one.trained_steps is not None
            and one.context_steps == next(reversed(self.references))
        }
        lengths = sorted(runs)
        if len(lengths) < 2:
            return UNKNOWN, lengths
        replicates = []
        values = []
        for length in lengths:
            curve = self.curve(runs[length])
            first = self._cells[runs[length]].first_step
            rise = presence(self.interval(self._held_out(runs[length])))
            if rise == "present":
                values.append(float(peaks(self.contrast(runs[length]).mean(axis=0))))
                replicates.append(self._steps(runs[length]))
            elif presence(self.interval(growth(curve))) == "present":
                values.append(float(onset(curve.mean(axis=0, keepdims=True))[0]) + first)
                replicates.append(onset(self.weights @ curve) + first)
            else:
                return UNKNOWN, lengths
        at = np.array(lengths, dtype=float)
        return self._interval(
            linear_slope(at, np.array(values)[:, None])[0], linear_slope(at, np.stack(replicates))
        ), lengths

    @property
    def passes_trained_length(self) -> bool:
        """Whether a reference run goes on for two windows after the length it was trained on."""
        return any(
            one.trained_steps is not None
            and self._cells[one].log_norm.shape[-1] >= one.trained_steps + 2 * WINDOW_STEPS
            for one in self.references.values()
        )

    def nll_rise(self, condition: Condition) -> tuple[Interval, Interval] | None:
        """Late less early NLL of text and first codebook, in nats; None where not measured."""
        cell = self._cells[condition]
        if cell.nll is None:
            return None
        after = cell.nll[..., cell.first_step :]
        window = after.shape[-1] // 3
        with np.errstate(invalid="ignore"):
            late = np.nanmean(after[..., -window:], axis=-1)
            rise = late - np.nanmean(after[..., :window], axis=-1)
        return self.interval(rise[:, 0]), self.interval(rise[:, 1])

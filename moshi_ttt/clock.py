"""The one owner of time units: steps, seconds, samples and the research notes' legacy tokens."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moshi_ttt.errors import check_setting

LEGACY_TOKENS_PER_STEP = 8  # the notes count Moshi's own 8 codebooks: 8 x 12.5 Hz = 100 a second


@dataclass(frozen=True, slots=True)
class Clock:
    """Conversions of one codec, counted in whole samples.

    `ceil(seconds * 12.5)` is wrong for many exact durations, because 12.5 Hz times a binary
    fraction is rounded before the ceiling; samples are integers, so nothing is rounded twice.
    """

    sample_rate: int = 24_000
    samples_per_step: int = 1_920

    @property
    def step_sec(self) -> float:
        """Length of one step, 0.08 s for Mimi."""
        return self.samples_per_step / self.sample_rate

    def steps(self, seconds: float) -> int:
        """Steps that cover `seconds`, rounded up on whole samples."""
        return -(-round(seconds * self.sample_rate) // self.samples_per_step)

    def interval(self, key: str, length: int | str) -> int:
        """Steps between two things, 0 for never, as people write it.

        Args:
            key: name of the setting.
            length: in steps (`100`, `100steps`), seconds (`8s`) or legacy tokens (`800tokens`).

        Raises:
            SettingError: it is none of these.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|steps?|s|sec|tokens?)", str(length))
        rule = "must be a length in steps, seconds or legacy tokens; use e.g. 100, 8s or 800tokens"
        check_setting(found is not None, key, length, rule)
        assert found is not None
        count, unit = float(found[1]), found[2]
        if unit in ("s", "sec"):
            return self.steps(count)
        return math.ceil(count / LEGACY_TOKENS_PER_STEP if unit.startswith("token") else count)

    def seconds(self, steps: float) -> float:
        """Time at which step number `steps` begins."""
        return steps * self.samples_per_step / self.sample_rate

    def legacy_tokens(self, steps: float) -> int:
        """The notes' position for a step: "token 6000" is step 750, 60 s."""
        return round(steps * LEGACY_TOKENS_PER_STEP)

    def describe(self, steps: int) -> str:
        """All three clocks at once, e.g. `step 750 (60.00 s, legacy token 6000)`."""
        return (
            f"step {steps} ({self.seconds(steps):.2f} s, legacy token {self.legacy_tokens(steps)})"
        )

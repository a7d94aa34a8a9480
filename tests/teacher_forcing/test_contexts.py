"""The same seconds behind contexts of several lengths."""

from __future__ import annotations

import numpy as np
import torch
from lm_fakes import MakeLM

from moshi_ttt.clock import Clock
from moshi_ttt.data import EncodedRecording
from moshi_ttt.rows import GROUPS
from moshi_ttt.teacher_forcing.contexts import ContextSweep

SWEEP = ContextSweep((0.4, 1.6), target_sec=0.4, spacing_sec=0.8)


def recording(steps: int, seed: int = 0) -> EncodedRecording:
    generator = torch.Generator().manual_seed(seed)
    return EncodedRecording(f"talk_{seed}", torch.randint(0, 16, (17, steps), generator=generator))


def test_every_stretch_is_measured_by_itself_and_known_again(make_lm: MakeLM) -> None:
    lm = make_lm().eval()
    recordings = [recording(40), recording(25, 1), recording(24, 2)]  # 2, 1 and 0 stretches
    found = SWEEP.record(lm, recordings, Clock())
    assert found is not None
    assert len(set(found["stretches"])) == 3
    together = SWEEP.nll(lm, SWEEP.stretches(recordings, Clock()), Clock())
    for group in GROUPS:
        assert np.shape(found[group]) == (3, 2)
        # as many tokens in each
        np.testing.assert_allclose(np.mean(found[group], axis=0), together[group], rtol=1e-5)
    again = SWEEP.record(lm, recordings[1:], Clock())
    assert again is not None
    assert again["stretches"] == found["stretches"][2:]
    np.testing.assert_allclose(again["text"], found["text"][2:], rtol=1e-5)
    assert SWEEP.record(lm, recordings[2:], Clock()) is None

"""The soak finds what it is for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hybrid_fakes import MakeLM, with_memory
from soak import Part, soak, wrong_with

TENTHS = [Part(100 * n, 20.0, 30.0, 500.0, 70.0, 130.0, 0.1, 25.0) for n in range(10)]


def test_a_steady_run_is_all_right() -> None:
    assert wrong_with(TENTHS, bound=0.5) == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("anonymous_mib", 520.0, "memory of the process grew by 20.0 MiB"),
        ("cuda_mib", 75.0, "memory of the GPU grew by 5.0 MiB"),
        ("median_ms", 29.0, "a step went from 20.00 to 29.00 ms"),
        ("p99_ms", 150.0, "from step 900 on p99 is 150.0 ms"),
        ("branch_ratio", 0.6, "from step 900 on a branch has ratio 0.600, bound 0.500"),
        (
            "hidden_norm",
            300.0,
            "the largest hidden norm went from 130.0 in the first half to 300.0",
        ),
        ("fast_weight_norm", 60.0, "the largest fast weight norm went from 25.0"),
    ],
)
def test_what_grows_is_said(field: str, value: float, words: str) -> None:
    parts = [*TENTHS[:-1], dataclasses.replace(TENTHS[-1], **{field: value})]
    (wrong,) = wrong_with(parts, bound=0.5)
    assert words in wrong


@pytest.mark.parametrize("poisoned", [False, True])
def test_one_logit_that_is_not_finite_is_found(make_lm: MakeLM, poisoned: bool) -> None:
    lm = with_memory(make_lm(), gate=0.5).eval()
    if poisoned:
        with torch.no_grad():
            lm.linears[5].weight[3, 0] = torch.nan  # of a codebook whose entropy nobody records
    parts, wrong = soak(lm, streams=2, steps=110)
    assert ("a logit or a hidden state is not finite" in wrong) == poisoned
    assert not any("not finite" in one for one in wrong if not poisoned)
    assert [part.first_step for part in parts] == list(range(0, 110, 11))
    assert all(0 < part.branch_ratio < 1 for part in parts)

"""Window, sinks, thinned keys and bounded distance: both forms against a slow fp64 attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_fakes import (
    CHANNELS,
    HEADS,
    controlled_attention,
    keys_seen,
    projections,
    reference,
)
from lm_fakes import MakeLM
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moshi_ttt.model.kept import Kept
from moshi_ttt.model.rings import ring_of
from moshi_ttt.model.sinks import keep, windows_alone

ROWS, DIM = 3, HEADS * CHANNELS
KEPT: list[tuple[int, dict[str, Any]]] = [
    (5, {"sinks": 1}),
    (5, {"sinks": 3}),
    (7, {"sinks": 7}),
    (6, {"thinning": 1}),
    (7, {"thinning": 3}),
    (5, {"thinning": 3}),  # a part of one slot
    (8, {"sinks": 3, "thinning": 2}),
    (5, {"sinks": 2, "farthest_steps": 4}),
    (7, {"farthest_steps": 3}),
    (7, {"thinning": 3, "farthest_steps": 6}),
    (9, {"sinks": 2, "thinning": 2, "farthest_steps": 8}),
    (9, {"sinks": 1, "thinning": 2, "farthest_steps": 1}),
    (4, {"sinks": 1, "farthest_steps": 30}),
]


def expected(attention: Any, x: Tensor, window: int, kept: dict[str, Any]) -> Tensor:
    """What the last step of a row [t, dim] gives, in fp64."""
    q, k, v = projections(attention, x)
    options = {name: one for name, one in kept.items() if name != "farthest_steps"}
    seen = keys_seen(len(x) - 1, window, **options)
    out: Tensor = reference(q[:, -1], k, v, seen, kept.get("farthest_steps"))
    return attention.out_projs[0](out.flatten())


@pytest.mark.parametrize(("window", "kept"), KEPT)
def test_a_whole_clip_sees_what_it_is_to_see_and_its_gradient_does(
    make_lm: MakeLM, window: int, kept: dict[str, Any]
) -> None:
    attention = controlled_attention(make_lm, window, **kept)
    x = torch.randn(2, 6 * window, DIM, dtype=torch.float64, requires_grad=True)
    slow = torch.stack(
        [
            torch.stack([expected(attention, row[: t + 1], window, kept) for t in range(len(row))])
            for row in x
        ]
    )
    fast = attention(x, x, x)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(fast)
    names = [x, attention.in_projs[0].weight]
    slow_gradients = torch.autograd.grad((slow * weights).sum(), names)
    for got, wanted in zip(
        torch.autograd.grad((fast * weights).sum(), names), slow_gradients, strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("window", "kept"), KEPT)
@pytest.mark.parametrize("start_position", [0, 50])
def test_a_stream_gives_what_a_whole_clip_gives(
    make_lm: MakeLM, window: int, kept: dict[str, Any], start_position: int
) -> None:
    attention = controlled_attention(make_lm, window, start_position=start_position, **kept)
    x = torch.randn(2, 8 * window, DIM, dtype=torch.float64)
    with torch.no_grad():
        whole = attention(x, x, x)
        with attention.streaming(2):
            steps = [attention(step, step, step) for step in x.split(1, dim=1)]
        # rotations are fp32, as moshi's are
        torch.testing.assert_close(whole, torch.cat(steps, dim=1), atol=1e-6, rtol=1e-5)
        attention.sinks, attention.thinning, attention.farthest_steps = 0, 0, None
        changed = not torch.allclose(attention(x, x, x), whole, atol=1e-4)
        assert changed


@pytest.mark.parametrize(("window", "kept"), KEPT)
def test_a_stream_is_right_through_wraps_resets_and_pauses(
    make_lm: MakeLM, window: int, kept: dict[str, Any]
) -> None:
    attention = controlled_attention(make_lm, window, **kept)
    generator = torch.Generator().manual_seed(window)
    history: list[list[Tensor]] = [[] for _ in range(ROWS)]
    checked = 0
    with torch.no_grad(), attention.streaming(ROWS):
        for step in range(9 * window):
            if step == 4 * window + 1:
                attention.reset_streaming(torch.tensor([False, True, False]))
                history[1] = []
            x = torch.randn(ROWS, 1, DIM, generator=generator).double()
            runs = torch.rand(ROWS, generator=generator) < 0.7
            attention.set_exec_mask(runs)
            y = attention(x, x, x)
            for row in runs.nonzero().flatten().tolist():
                history[row].append(x[row, 0])
                wanted = expected(attention, torch.stack(history[row]), window, kept)
                torch.testing.assert_close(y[row, 0], wanted, atol=1e-6, rtol=1e-5)
                checked += 1
    assert max(len(one) for one in history) > 4 * window  # the ring has turned
    assert checked > 50


@pytest.mark.parametrize(("window", "kept"), KEPT)
def test_a_clip_of_any_length_is_the_beginning_of_a_longer_one(
    make_lm: MakeLM, window: int, kept: dict[str, Any]
) -> None:
    # as one block, as several, and with a last one that is not full
    attention = controlled_attention(make_lm, window, **kept)
    x = torch.randn(2, 6 * window, DIM, dtype=torch.float64)
    with torch.no_grad():
        whole = attention(x, x, x)
        for steps in range(1, 6 * window):
            part = x[:, :steps]
            torch.testing.assert_close(
                attention(part, part, part), whole[:, :steps], atol=1e-6, rtol=1e-5
            )


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU or depends on data, and so cannot be in a CUDA graph."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "index.Tensor")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.refused), func
        return func(*args, **kwargs or {})


def test_a_step_of_a_stream_may_be_part_of_a_cuda_graph(make_lm: MakeLM) -> None:
    attention = controlled_attention(make_lm, 9, sinks=2, thinning=2, farthest_steps=8)
    x = torch.randn(ROWS, 1, DIM, dtype=torch.float64)
    with torch.no_grad(), attention.streaming(ROWS):
        ring, state = ring_of(attention), attention.get_streaming_state()[""]
        held = (ring.cache, ring.unrotated, ring.end_offset, state.offset)
        places = [one.data_ptr() for one in held]
        for _ in range(30):
            with NoWaiting():
                attention(x, x, x)
        now = (ring.cache, ring.unrotated, ring.end_offset, state.offset)
        assert [one.data_ptr() for one in now] == places
        assert ring.end_offset.tolist() == [30] * ROWS
        with pytest.raises(AssertionError), NoWaiting():
            ring.end_offset.max().item()


def test_what_is_ahead_is_not_seen(make_lm: MakeLM) -> None:
    kept = {"sinks": 2, "thinning": 2, "farthest_steps": 8}
    attention = controlled_attention(make_lm, 9, **kept)
    x = torch.randn(1, 40, DIM, dtype=torch.float64, requires_grad=True)
    for at in (0, 3, 17, 38):
        (gradient,) = torch.autograd.grad(attention(x, x, x)[0, at].sum(), x)
        assert not gradient[0, at + 1 :].any()
        assert gradient[0, at].any()


def test_a_ring_has_a_slot_for_each_key_and_each_reach_doubles() -> None:
    kept = Kept(188, thinning=3)
    assert sum(size for *_, size in kept.levels) == 188
    assert [stride * size for _, stride, size in kept.levels] == [616, 296, 148, 74]
    assert kept.window == 74
    assert Kept(188, sinks=4).window == 188


def test_the_teachers_window_has_nothing_beside_it(make_lm: MakeLM) -> None:
    codes = torch.randint(0, 16, (1, 17, 40))
    plain, other = make_lm().eval(), make_lm().eval()
    keep(other, sinks=1, thinning=2, farthest_steps=15)
    with torch.no_grad():
        wanted = plain(codes).text_logits
        with windows_alone(other):
            alone = other(codes).text_logits
        torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(other(codes).text_logits, wanted, atol=1e-3)

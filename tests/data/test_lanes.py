from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from moshi_ttt.data import EncodedRecording, LaneLoader, WindowLoader
from moshi_ttt.data.windows import cut_windows
from moshi_ttt.errors import UserError

CLIP = 10
LENGTHS = 57, 30, 82, 41, 9, 66  # 6 + 3 + 8 + 4 + 1 + 7 = 29 windows


def recordings(*steps: int) -> list[EncodedRecording]:
    """Codes that tell where they come from: 1000 x recording + step."""
    return [
        EncodedRecording(str(index), (1000 * index + torch.arange(length)).expand(17, -1))
        for index, length in enumerate(steps)
    ]


def loader(*steps: int, batch_size: int = 2, **options: Any) -> LaneLoader:
    return LaneLoader(recordings(*steps), CLIP, batch_size, **{"seed": 0, **options})


def lanes(batches: list[dict[str, Any]]) -> list[list[tuple[str, int, bool]]]:
    """Recording, first step and whether it goes on, for each row of the batch from clip to clip."""
    rows = [
        list(zip(batch["recording"], batch["start_step"].tolist(), batch["continues"], strict=True))
        for batch in batches
    ]
    return [list(lane) for lane in zip(*rows, strict=True)]


def in_words(batches: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(map(tuple, lanes([batch]))) for batch in batches]


def test_each_row_goes_through_its_part_of_all_windows_and_knows_where_a_recording_begins() -> None:
    first, second = lanes(list(loader(30, 25, 40, seed=None)))
    assert first == [
        ("0", 0, False),
        ("0", 10, True),
        ("0", 20, True),
        ("1", 0, False),
        ("1", 10, True),
    ]
    assert second == [
        ("1", 20, False),  # the rest of a recording that the first row broke off
        ("2", 0, False),
        ("2", 10, True),
        ("2", 20, True),
        ("2", 30, True),
    ]


@pytest.mark.parametrize("steps", range(CLIP + 3, 5 * CLIP + 3))
def test_touching_windows_are_as_many_lie_inside_and_end_in_at_least_an_eighth_of_a_clip(
    steps: int,
) -> None:
    count = len(cut_windows([steps], CLIP))
    firsts = []
    for offset in range(CLIP):
        starts = [start for _, start in cut_windows([steps], CLIP, [offset], touching=True)]
        assert len(starts) == count > 1
        assert all(other - one == CLIP for one, other in pairwise(starts))
        assert starts[-1] <= steps - CLIP / 8
        firsts.append(starts[0])
    assert firsts == sorted(firsts)
    assert firsts[0] == 0 < firsts[-1] < CLIP  # it slides


@pytest.mark.parametrize("steps", [4, CLIP, 12])
def test_a_lone_window_stays_inside(steps: int) -> None:
    for offset in range(CLIP):
        alone = cut_windows([steps], CLIP, [offset], touching=True)
        assert alone == cut_windows([steps], CLIP, [offset])


def test_every_epoch_goes_through_each_recording_once_from_clip_to_clip() -> None:
    shuffled = loader(*LENGTHS)
    counts = [len(cut_windows([steps], CLIP)) for steps in LENGTHS]
    orders, firsts = set(), set()
    for _ in range(6):
        batches = list(shuffled)
        assert len(batches) == len(shuffled) == 29 // 2
        line = [window for lane in lanes(batches) for window in lane]
        border = len(batches)  # where the second lane begins
        seen = Counter(name for name, _, _ in line)
        assert sum(counts) - seen.total() == 1
        assert all(seen[str(index)] >= count - 1 for index, count in enumerate(counts))
        before: tuple[str, int] | None = None
        for place, (name, start, continues) in enumerate(line):
            touches = before == (name, start - CLIP)
            # a recording goes on unless it begins, or the lane does
            assert touches == (Counter(n for n, _, _ in line[:place])[name] > 0)
            assert continues == (touches and place != border)
            before = name, start
        orders.add(tuple(dict.fromkeys(name for name, _, _ in line)))
        firsts.add(next(start for name, start, _ in line if name == "2"))
    assert len(orders) == 6
    assert len(firsts) > 2


def test_rows_hold_the_codes_of_their_windows_and_only_the_end_of_a_recording_is_padded() -> None:
    shuffled, padded = loader(*LENGTHS), 0
    for batch in (batch for _ in range(3) for batch in shuffled):
        for codes, start, name in zip(
            batch["codes"], batch["start_step"].tolist(), batch["recording"], strict=True
        ):
            known = min(CLIP, LENGTHS[int(name)] - start)
            first = 1000 * int(name) + start
            assert codes[3].tolist() == [*range(first, first + known), *[-1] * (CLIP - known)]
            padded += known < CLIP
    assert padded > 3


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 3), (2, 2), (3, 1), (2, 7)])
def test_processes_share_an_epoch_equally_without_overlap(world_size: int, batch_size: int) -> None:
    ranks = [
        loader(*LENGTHS, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(3):
        shares = [list(rank) for rank in ranks]
        assert {len(share) for share in shares} == {29 // (world_size * batch_size)}
        assert {len(batch["recording"]) for share in shares for batch in share} == {batch_size}
        windows = [
            (name, start) for share in shares for lane in lanes(share) for name, start, _ in lane
        ]
        assert len(windows) == len(set(windows)) > 29 - world_size * batch_size


def test_what_is_left_out_differs_from_epoch_to_epoch() -> None:
    shuffled = loader(*LENGTHS, batch_size=6)  # 24 of 29
    missing = []
    for _ in range(4):
        seen = Counter(name for lane in lanes(list(shuffled)) for name, _, _ in lane)
        missing.append(tuple(seen[str(index)] for index in range(len(LENGTHS))))
    assert len(set(missing)) > 1


@pytest.mark.parametrize("done", [0, 1, 7, 14, 20])
def test_a_restored_position_goes_on_with_the_next_batch(done: int) -> None:
    uninterrupted = loader(*LENGTHS)
    expected = in_words([batch for _ in range(3) for batch in uninterrupted])
    interrupted, seen = loader(*LENGTHS), []
    while len(seen) < done:
        for batch in interrupted:
            seen.append(batch)
            if len(seen) == done:
                break
    restored = loader(*LENGTHS)
    restored.load_state_dict(interrupted.state_dict())
    got = in_words([*seen, *restored])
    assert got == expected[: len(got)]
    assert len(got) >= done + 14


@pytest.mark.parametrize(
    ("before", "after"), [(LaneLoader, WindowLoader), (WindowLoader, LaneLoader)]
)
def test_carrying_is_switched_between_epochs_only(
    before: type[WindowLoader], after: type[WindowLoader]
) -> None:
    one = before(recordings(*LENGTHS), CLIP, 2, seed=0)
    batches = iter(one)
    next(batches)
    change = f"carry {before is LaneLoader} -> {after is LaneLoader}"
    with pytest.raises(UserError, match=rf"undefined now \({change}\); restore the data settings"):
        after(recordings(*LENGTHS), CLIP, 2, seed=0).load_state_dict(one.state_dict())
    list(batches)
    after(recordings(*LENGTHS), CLIP, 2, seed=0).load_state_dict(one.state_dict())


def test_a_position_from_before_there_were_lanes_is_one_without() -> None:
    windows = WindowLoader(recordings(*LENGTHS), CLIP, 2, seed=0)
    next(iter(windows))
    state = windows.state_dict()
    del state["plan"]["carry"]
    WindowLoader(recordings(*LENGTHS), CLIP, 2, seed=0).load_state_dict(state)
    with pytest.raises(UserError, match="carry False -> True"):
        loader(*LENGTHS).load_state_dict(state)


@pytest.mark.parametrize(
    ("steps", "options", "carries"),
    [
        ((10, 12, 9), {"batch_size": 1}, False),  # recordings of one clip
        ((30,), {"batch_size": 2}, False),  # one batch
        ((50,), {"batch_size": 1, "world_size": 3}, False),
        ((40,), {"batch_size": 2}, True),
        ((50,), {"batch_size": 1, "world_size": 2}, True),
    ],
)
def test_it_says_whether_anything_is_ever_carried(
    steps: tuple[int, ...], options: dict[str, int], carries: bool
) -> None:
    lanes = loader(*steps, **options)
    assert lanes.carries is carries
    assert any(any(batch["continues"]) for batch in lanes) is carries

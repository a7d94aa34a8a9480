from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch

from moshi_ttt.data import EncodedRecording, WindowLoader
from moshi_ttt.data.windows import cut_windows
from moshi_ttt.errors import UserError

CLIP = 10


def recordings(*steps: int) -> list[EncodedRecording]:
    """Codes that tell where they come from: 1000 x recording + step."""
    return [
        EncodedRecording(str(index), (1000 * index + torch.arange(length)).expand(17, -1))
        for index, length in enumerate(steps)
    ]


def loader(*steps: int, batch_size: int = 2, **options: Any) -> WindowLoader:
    return WindowLoader(recordings(*steps), CLIP, batch_size, **{"seed": 0, **options})


def windows(batches: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    return [
        window
        for batch in batches
        for window in zip(batch["recording"], batch["start_step"].tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("steps", "starts"),
    [
        (30, [0, 10, 20]),
        (33, [0, 10, 20, 30]),  # 3 of 10 steps are over a quarter
        (32, [0, 10, 20]),  # 2 of 10 are not
        (10, [0]),
        (2, [0]),  # a recording is never left out
        (1, [0]),
    ],
)
def test_windows_cover_a_recording_from_its_start(steps: int, starts: list[int]) -> None:
    assert cut_windows([steps], CLIP) == [(0, start) for start in starts]


def test_a_rest_of_exactly_a_quarter_is_kept() -> None:
    assert cut_windows([10], 8) == [(0, 0), (0, 8)]


@pytest.mark.parametrize("steps", range(CLIP, 55))
def test_slid_windows_are_as_many_lie_inside_and_cover_every_step_about_equally(
    steps: int,
) -> None:
    count = len(cut_windows([steps], CLIP))
    seen = torch.zeros(steps)
    starts = set()
    for offset in range(CLIP):
        slid = [start for _, start in cut_windows([steps], CLIP, [offset])]
        assert len(slid) == count
        assert 0 <= slid[0] <= slid[-1] <= steps - CLIP
        assert all(one < other <= one + CLIP for one, other in pairwise(slid))
        starts.update(slid)
        for start in slid:
            seen[start : start + CLIP] += 1
    assert starts == set(range(steps - CLIP + 1))
    seen /= seen.mean()
    assert 0.4 < seen.min() <= seen.max() < 2


def test_slid_windows_that_are_whole_inside_touch_and_the_first_begins_at_0_half_the_time() -> None:
    cuts = [[start for _, start in cut_windows([50], CLIP, [offset])] for offset in range(CLIP)]
    assert cuts[0] == [0, 5, 15, 25, 35]
    assert cuts[5] == [0, 10, 20, 30, 40]
    assert cuts[9] == [4, 14, 24, 34, 40]
    assert sum(cut[0] == 0 for cut in cuts) == 6  # of 10


def test_a_recording_shorter_than_a_clip_does_not_slide() -> None:
    assert {tuple(cut_windows([9], CLIP, [offset])) for offset in range(CLIP)} == {((0, 0),)}


def test_batches_hold_the_codes_of_their_windows_padded_with_the_zero_token() -> None:
    batches = list(loader(25, 4, seed=None))
    assert windows(batches) == [("0", 0), ("0", 10), ("0", 20), ("1", 0)]
    codes = torch.cat([batch["codes"] for batch in batches])
    assert codes.shape == (4, 17, CLIP)
    assert codes.dtype == torch.int64
    assert codes[:, 3].tolist() == [
        [*range(10)],
        [*range(10, 20)],
        [*range(20, 25), *[-1] * 5],
        [*range(1000, 1004), *[-1] * 6],
    ]


def test_epochs_have_equally_many_windows_cut_and_ordered_by_seed_and_epoch() -> None:
    shuffled = loader(100, 50)
    epochs = [windows(shuffled) for _ in range(4)]
    assert all(len(set(epoch)) == 15 == len(epoch) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, windows(loader(100, 50, seed=1))]}) == 5
    assert all(epoch != sorted(epoch) for epoch in epochs)
    # two of four may be cut at the same steps by chance
    assert len({frozenset(epoch) for epoch in epochs}) >= 3
    again = loader(100, 50)
    assert [windows(again) for _ in range(4)] == epochs


def test_recordings_slide_independently() -> None:
    shuffled = loader(100, 100)
    second_starts = []
    for _ in range(10):
        epoch = sorted(windows(shuffled))
        second_starts.append((epoch[1][1], epoch[11][1]))
    assert any(one != other for one, other in second_starts)


def test_start_step_is_where_the_codes_of_a_slid_window_begin() -> None:
    for batch in loader(100, 57, 4):
        for codes, start, name in zip(
            batch["codes"], batch["start_step"].tolist(), batch["recording"], strict=True
        ):
            first = 1000 * int(name) + start
            length = 4 if name == "2" else CLIP  # the short one alone is padded
            assert codes[5].tolist() == [*range(first, first + length), *[-1] * (CLIP - length)]


def test_over_many_epochs_every_step_is_seen_about_equally_often() -> None:
    shuffled = loader(57, batch_size=6)
    seen = torch.zeros(57)
    for _ in range(200):
        for _, start in windows(shuffled):
            seen[start : start + CLIP] += 1
    seen /= seen.mean()
    assert 0.5 < seen.min() <= seen.max() < 1.7


def test_the_last_batch_is_smaller_and_a_large_batch_is_not_an_empty_epoch() -> None:
    assert [len(batch["recording"]) for batch in loader(50, batch_size=2)] == [2, 2, 1]
    assert [len(batch["recording"]) for batch in loader(50, batch_size=64)] == [5]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_an_epoch_equally_without_overlap(world_size: int) -> None:
    ranks = [loader(170, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    for _ in range(3):
        shares = [windows(rank) for rank in ranks]
        assert {len(share) for share in shares} == {17 // world_size}
        seen = Counter(window for share in shares for window in share)
        assert set(seen.values()) == {1}


def test_epochs_leave_out_other_places_of_the_order() -> None:
    ranks = [loader(170, rank=rank, world_size=7) for rank in range(7)]
    missing: Counter[int] = Counter()
    for _ in range(3):
        seen = sorted(window for rank in ranks for window in windows(rank))
        missing.update(set(range(17)) - {(start + 5) // CLIP for _, start in seen})
    assert sum(missing.values()) == 3 * (17 % 7)
    assert all(count < 3 for count in missing.values())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_in_order_every_window_goes_to_exactly_one_process(world_size: int) -> None:
    shares = [
        windows(loader(50, seed=None, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    dealt = [window for share in shares for window in share]
    assert sorted(dealt) == [("0", start) for start in range(0, 50, CLIP)]


def test_fewer_windows_than_processes_is_refused() -> None:
    with pytest.raises(UserError, match=r"2 window\(s\) of 10 steps for 3 process"):
        loader(20, rank=0, world_size=3)


def test_a_pass_that_was_cut_short_in_order_starts_again() -> None:
    unshuffled = loader(50, seed=None)
    next(iter(unshuffled))
    assert len(windows(unshuffled)) == 5


@pytest.mark.parametrize("done", range(7))
def test_a_restored_position_goes_on_with_the_next_batch(done: int) -> None:
    uninterrupted = loader(50)
    expected = windows(uninterrupted) + windows(uninterrupted) + windows(uninterrupted)

    interrupted = loader(50)
    seen: list[tuple[str, int]] = []
    while done > 0:
        for batch in interrupted:
            seen += windows([batch])
            done -= 1
            if done == 0:
                break
    restored = loader(50)
    restored.load_state_dict(interrupted.state_dict())
    seen += windows(restored)
    assert seen == expected[: len(seen)]
    assert len(windows(restored)) >= 3  # and a pass is always a full one


def test_the_batch_in_hand_counts_only_when_it_was_trained_on() -> None:
    trained = 0
    shuffled = loader(50, trained_batches=lambda: trained)
    batches = iter(shuffled)
    assert shuffled.state_dict()["done_batches"] == 0
    next(batches)
    assert shuffled.state_dict()["done_batches"] == 0
    trained = 1
    assert shuffled.state_dict()["done_batches"] == 1
    next(batches)
    next(batches)
    trained = 3
    state = shuffled.state_dict()
    assert (state["epoch"], state["done_batches"]) == (1, 0)


@pytest.mark.parametrize("other", [{"batch_size": 3}, {"seed": 1}, {"world_size": 2}])
def test_other_data_settings_resume_between_epochs_only(other: dict[str, Any]) -> None:
    shuffled = loader(100)
    batches = iter(shuffled)
    next(batches)
    with pytest.raises(UserError, match=rf"after 1 batches of epoch 0.*{next(iter(other))}"):
        loader(100, **other).load_state_dict(shuffled.state_dict())
    list(batches)
    changed = loader(100, **other)
    changed.load_state_dict(shuffled.state_dict())
    reference = loader(100, **other)
    windows(reference)
    assert windows(changed) == windows(reference)  # its epoch 1


def test_other_recordings_are_noticed_in_mid_epoch() -> None:
    shuffled = loader(100)
    next(iter(shuffled))
    for others in ((50, 50), (101,)):
        with pytest.raises(UserError, match="recordings"):
            loader(*others).load_state_dict(shuffled.state_dict())


def test_a_batch_tells_which_of_its_rows_know_any_audio() -> None:
    silent, late = torch.ones(17, 30, dtype=torch.int64), torch.ones(17, 30, dtype=torch.int64)
    silent[1:], late[1:, :25] = -1, -1
    made = [EncodedRecording("silent", silent), EncodedRecording("late", late)]
    (batch,) = WindowLoader(made, 20, 4, seed=None)
    known = (batch["codes"][:, 1:] != -1).flatten(1).any(1)
    assert batch["heard"] == known.tolist() == [False, False, False, True]

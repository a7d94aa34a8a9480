from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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


def test_an_epoch_gives_every_window_once_in_an_order_of_seed_and_epoch() -> None:
    shuffled = loader(100, 50)
    epochs = [windows(shuffled) for _ in range(3)]
    everything = sorted(windows(loader(100, 50, seed=None)))
    assert len(everything) == 15
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, windows(loader(100, 50, seed=1))]}) == 4
    again = loader(100, 50)
    assert [windows(again) for _ in range(3)] == epochs


def test_the_last_batch_is_smaller_and_a_large_batch_is_not_an_empty_epoch() -> None:
    assert [len(batch["recording"]) for batch in loader(50, batch_size=2)] == [2, 2, 1]
    assert [len(batch["recording"]) for batch in loader(50, batch_size=64)] == [5]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_an_epoch_equally_without_overlap(world_size: int) -> None:
    left_out: Counter[tuple[str, int]] = Counter()
    ranks = [loader(170, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    for _ in range(3):
        shares = [windows(rank) for rank in ranks]
        assert {len(share) for share in shares} == {17 // world_size}
        seen = Counter(window for share in shares for window in share)
        assert set(seen.values()) == {1}
        left_out.update({("0", start) for start in range(0, 170, CLIP)} - set(seen))
    assert sum(left_out.values()) == 3 * (17 % world_size)
    assert all(count < 3 for count in left_out.values())


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
    with pytest.raises(UserError, match="windows"):
        loader(50, 50).load_state_dict(shuffled.state_dict())

"""Memories that go on from one training batch to the next, and over the end of a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lm_fakes import hybrid, random_codes
from moshi.models.lm import LMModel

from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryState
from moshi_ttt.model.hybrid import memory_carried, memory_swapped
from train.carry import Carry
from train.fit import FitCLI, main
from train.recipes import CONFIGS

MakeLM = Callable[..., LMModel]


@pytest.fixture(scope="module")
def carried(small: list[str]) -> list[str]:
    """Two rows that go through a recording of four clips each, in each of two epochs."""
    more = ["data.carry=true", "data.batch_size=2", "model.memory.gate_init=0.2"]
    more += ["model.optim.lr_memory=0.01", "trainer.limit_val_batches=0"]
    return [*small, *(f"--{one}" for one in more)]


KEEPS_ALL = [
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_top_k=-1",
]


@pytest.fixture(scope="module")
def whole(carried: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of such a run that nothing interrupted, beside those of each step."""
    folder = tmp_path_factory.mktemp("whole")
    return last(main([*carried, *KEEPS_ALL, f"--run_dir={folder}"]))


def last(folder: Path) -> Path:
    return folder / "checkpoints/last.ckpt"


def at_step(step: int, whole: Path) -> Path:
    (path,) = whole.parent.glob(f"*step={step}.ckpt")
    return path


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def equal(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in mine.items())


class Interrupt(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("power cut")


@contextmanager
def power_cut() -> Iterator[None]:
    """A run in here ends after its third step, the last but one of an epoch."""
    build = FitCLI.instantiate_trainer

    def with_interrupt(self: FitCLI, **kwargs: Any) -> Any:
        trainer = build(self, **kwargs)
        trainer.callbacks.append(Interrupt())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitCLI, "instantiate_trainer", with_interrupt)
        with pytest.raises(RuntimeError, match="power cut"):
            yield


def test_a_run_cut_within_recordings_ends_as_if_nothing_had_happened(
    carried: list[str], whole: Path, tmp_path: Path
) -> None:
    arguments = [*carried, f"--run_dir={tmp_path}", "--checkpoint.every_n_steps=2"]
    with power_cut():
        main(arguments)
    assert equal(last(main([*arguments, "--ckpt_path=last"])), whole)


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_run_goes_on_from_any_step_with_the_memories_that_it_carried(
    carried: list[str], whole: Path, tmp_path: Path, step: int
) -> None:
    resume = [*carried, f"--run_dir={tmp_path}"]
    resumed = main([*resume, f"--ckpt_path={at_step(step, whole)}"])
    assert equal(last(resumed), whole)


def test_without_what_it_carried_a_run_goes_on_otherwise(
    carried: list[str], whole: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(at_step(3, whole), weights_only=True)
    del checkpoint["carried"]
    torch.save(checkpoint, tmp_path / "forgetful.ckpt")
    resume = [*carried, f"--run_dir={tmp_path}/runs", f"--ckpt_path={tmp_path}/forgetful.ckpt"]
    assert not equal(last(main(resume)), whole)


def test_activation_checkpointing_changes_nothing(
    carried: list[str], whole: Path, tmp_path: Path
) -> None:
    recomputed = [*carried, "--model.gradient_checkpointing=true", f"--run_dir={tmp_path}"]
    assert equal(last(main(recomputed)), whole)


def test_gradients_accumulate_over_clips_of_a_recording(carried: list[str], tmp_path: Path) -> None:
    accumulated = [*carried, "--trainer.accumulate_grad_batches=2"]
    whole = last(main([*accumulated, f"--run_dir={tmp_path}/whole"]))
    cut = [*accumulated, f"--run_dir={tmp_path}/cut", "--checkpoint.every_n_steps=1"]
    with power_cut():  # step 3 is the first of the second epoch
        main(cut)
    assert equal(last(main([*cut, "--ckpt_path=last"])), whole)


def test_two_processes_carry_and_resume_each_its_own(carried: list[str], tmp_path: Path) -> None:
    # four rows, two clips each
    both = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]

    def run(name: str, *more: str) -> Path:
        program, folder = CONFIGS.parent / "train" / "fit.py", tmp_path / name
        command = [sys.executable, program, *carried, *both, f"--run_dir={folder}", *more]
        subprocess.run(command, check=True, timeout=140)
        return last(folder / "000")

    whole = run("whole", *KEEPS_ALL)
    first, second = torch.load(at_step(1, whole), weights_only=True)["carried"]
    (one,), (other,) = first.values(), second.values()
    assert not torch.equal(one["weight"], other["weight"])
    assert equal(run("resumed", f"--ckpt_path={at_step(1, whole)}"), whole)


def test_carrying_is_switched_between_epochs_and_not_within_them(
    carried: list[str], whole: Path, tmp_path: Path
) -> None:
    off = [*carried, "--data.carry=false", f"--run_dir={tmp_path}"]
    within = f"--ckpt_path={at_step(3, whole)}"
    with pytest.raises(UserError, match="carry True -> False"):
        main([*off, within])
    assert "carried" in torch.load(whole, weights_only=True)
    folder = main([*off, f"--ckpt_path={whole}", "--trainer.max_epochs=3"])
    assert "carried" not in torch.load(last(folder), weights_only=True)
    on = [*carried, f"--run_dir={tmp_path}", f"--ckpt_path={last(folder)}"]
    folder = main([*on, "--trainer.max_epochs=4"])
    assert "carried" in torch.load(last(folder), weights_only=True)


def test_without_a_memory_the_same_batches_are_trained_on(
    carried: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = main([*carried, "--model.train=lora", f"--run_dir={tmp_path}"])
    mine, theirs = (torch.load(one, weights_only=True) for one in (last(folder), whole))
    assert "carried" in theirs
    assert "carried" not in mine
    assert mine["ConversationData"] == theirs["ConversationData"]


def test_recordings_of_one_clip_are_trained_on_with_a_warning(
    carried: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = main([*carried, "--data.duration_sec=8", f"--run_dir={tmp_path}"])
    assert "data.carry has nothing to carry" in caplog.text
    assert "2 clip(s) of 8 s" in caplog.text
    assert "carried" not in torch.load(last(folder), weights_only=True)


def trainer_after(batches: int) -> Any:
    progress = SimpleNamespace(total=SimpleNamespace(processed=batches))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(fit_loop=loops, world_size=1, global_rank=0)


def kept(carry: Carry, batches: int) -> dict[int, MemoryState]:
    checkpoint: dict[str, Any] = {}
    carry.save(checkpoint, trainer_after(batches))
    return checkpoint["carried"][0] if checkpoint else {}


def updates(memories: dict[int, MemoryState]) -> list[list[int]]:
    return [state["updates"].tolist() for state in memories.values()]


def test_the_batch_in_hand_is_not_carried_from_until_it_was_trained_on(make_lm: MakeLM) -> None:
    lm, carry, codes = hybrid(make_lm, rule="gated_delta"), Carry(), random_codes(20)
    assert kept(carry, 0) == {}
    for batch, continues in enumerate(([False, False], [True, False], [True, True])):
        before = kept(carry, batch)
        with carry.reading(lm, continues, trainer_after(batch)):
            lm(codes)
        assert updates(kept(carry, batch)) == updates(before)
        expected = [[20, 20], [40, 20], [60, 40]][batch]
        assert updates(kept(carry, batch + 1)) == [expected] * 2
    assert not any(one.requires_grad for state in kept(carry, 3).values() for one in state.values())
    # as many batches later, from a checkpoint
    again = Carry()
    again.load({"carried": [kept(carry, 3)]}, trainer_after(3), mini_batch_steps=16)
    with again.reading(lm, [False, True], trainer_after(3)):
        lm(codes)
    assert updates(kept(again, 4)) == [[20, 60]] * 2


def test_other_rows_or_data_that_do_not_carry_begin_afresh(make_lm: MakeLM) -> None:
    lm, carry, codes = hybrid(make_lm, rule="gated_delta"), Carry(), random_codes(20)
    with carry.reading(lm, [False, False], trainer_after(0)):
        lm(codes)
    with carry.reading(lm, [True], trainer_after(1)):
        lm(codes[:1])
    assert updates(kept(carry, 2)) == [[20]] * 2
    with carry.reading(lm, None, trainer_after(2)):
        lm(codes)
    assert kept(carry, 3) == {}


def test_a_row_whose_memory_is_not_finite_begins_afresh_in_all_layers(make_lm: MakeLM) -> None:
    lm, carry, codes = hybrid(make_lm, rule="gated_delta"), Carry(), random_codes(20)
    with memory_swapped(lm) as swaps:
        lm(codes)
    memories = {index: dict(swap.last or {}) for index, swap in swaps.items()}
    hurt = memories[2]["memory"].detach().clone()
    hurt[1, 0, 0, 0] = torch.inf
    memories[2]["memory"] = hurt
    carry.load({"carried": [memories]}, trainer_after(1), mini_batch_steps=16)
    with carry.reading(lm, [True, True], trainer_after(1)):
        got = lm(codes).text_logits
    assert updates(kept(carry, 2)) == [[40, 20]] * 2
    with memory_carried(lm, memories, torch.tensor([True, False])):
        assert torch.equal(lm(codes).text_logits, got)
    assert got.isfinite().all()


def test_memories_in_a_longer_mini_batch_than_there_is_now_are_dropped(
    make_lm: MakeLM, caplog: pytest.LogCaptureFixture
) -> None:
    lm, codes = hybrid(make_lm), random_codes(19)  # 4 steps into a mini-batch of 5
    with memory_swapped(lm) as swaps:
        lm(codes)
    memories = {index: swap.last for index, swap in swaps.items()}
    for steps, states in ((5, 2), (4, 0)):
        carry = Carry()
        carry.load({"carried": [memories]}, trainer_after(1), mini_batch_steps=steps)
        assert len(kept(carry, 1)) == states
        assert ("model.memory.mini_batch_steps=4 is less" in caplog.text) == (states == 0)

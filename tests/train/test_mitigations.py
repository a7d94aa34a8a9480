"""Windows that differ from batch to batch, and a base that teaches, in a run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fakes import scalars, trained

from moshi_ttt.errors import UserError
from moshi_ttt.model.weights import load_trained
from train.fit import main
from train.module import MoshiTTT
from train.windows import RandomWindows

FAR = "--model.farthest_steps=19"


def test_windows_are_drawn_between_the_two_and_only_for_training(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, validate = [], MoshiTTT.validation_step

    def watched(model: MoshiTTT, *batch: Any) -> None:
        seen.append(model.lm.context)
        validate(model, *batch)

    monkeypatch.setattr(MoshiTTT, "validation_step", watched)
    args = [*small, "--windows.shortest_steps=3", "--windows.longest_steps=24"]
    folder = main([*args, f"--run_dir={tmp_path}", "--checkpoint.every_n_steps=3"])
    found = scalars(folder, "train/window_steps")
    windows = RandomWindows(3, 24)
    assert found == [windows.draw(step, step % 4) for step in range(8)]
    assert len(set(found)) > 2
    lm, _, config, _ = load_trained(folder / "checkpoints/last.ckpt")
    assert config.context_steps == lm.context == 20
    plain = main([*small, f"--run_dir={tmp_path}"])
    one, other = trained(folder), trained(plain)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert set(seen) == {20}


def test_windows_too_short_to_be_thinned_are_refused(small: list[str], tmp_path: Path) -> None:
    args = [*small, "--model.thinning=3", "--windows.longest_steps=24", f"--run_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"model\.thinning=3 must be at least 0 and at most 2"):
        main([*args, "--windows.shortest_steps=4"])


def test_what_is_kept_is_kept_in_training_and_in_what_is_saved(
    small: list[str], tmp_path: Path
) -> None:
    weights = []
    for kept in ([], ["--model.thinning=3"], ["--model.sinks=2"], ["--model.sinks=2", FAR]):
        folder = main([*small, *kept, "--trainer.max_epochs=1", f"--run_dir={tmp_path}"])
        weights.append(trained(folder))
    _, _, config, _ = load_trained(folder / "checkpoints/last.ckpt")
    assert (config.sinks, config.thinning, config.farthest_steps) == (2, 0, 19)
    for one, other in itertools.combinations(weights, 2):
        assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_may_be_counted_beyond_the_window_of_each_batch(
    small: list[str], tmp_path: Path
) -> None:
    args = [*small, "--model.loss.beyond_window=true", "--trainer.max_epochs=1"]
    windows = ["--windows.shortest_steps=3", "--windows.longest_steps"]
    refused = r"model\.loss\.beyond_window=True would count nothing: clips have 25 steps"
    with pytest.raises(UserError, match=refused):
        main([*args, *windows, "25", f"--run_dir={tmp_path}"])
    with pytest.raises(UserError, match=refused):
        main([*args, "--model.context_steps=25", f"--run_dir={tmp_path}"])
    folder = main([*args, *windows, "24", f"--run_dir={tmp_path}"])
    plain = main([*small, "--trainer.max_epochs=1", *windows, "24", f"--run_dir={tmp_path}"])
    one, other = (scalars(run, "train/loss") for run in (folder, plain))
    assert all(math.isfinite(loss) for loss in one)
    assert one != other


def test_draws_are_log_uniform() -> None:
    windows = RandomWindows(10, 1000)
    draws = [windows.draw(step, 0) for step in range(2000)]
    assert 10 <= min(draws) <= 11
    assert 900 <= max(draws) <= 1000
    assert 0.45 < sum(draw < 100 for draw in draws) / len(draws) < 0.55


@pytest.mark.parametrize(
    ("shortest", "longest", "says"),
    [(None, 9, "both or neither"), (9, 4, "longest_steps"), (1, 4, "shortest_steps")],
)
def test_windows_that_make_no_sense_are_refused(
    shortest: int | None, longest: int | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        RandomWindows(shortest, longest)


def test_a_run_is_pulled_towards_the_base(small: list[str], tmp_path: Path) -> None:
    args = [*small, "--model.memory.gate_init=0.5", "--trainer.max_epochs=4"]
    args += ["--data.carry=false"]  # clips that begin a recording are as far off, pulled or not
    free, pulled = (
        scalars(
            main([*args, f"--model.distillation.weight={weight}", f"--run_dir={tmp_path}"]),
            "train/divergence",
        )
        for weight in (1e-9, 100)
    )
    assert free[0] == pulled[0] > 0
    assert sum(pulled) < 0.95 * sum(free)


def test_a_base_that_trains_cannot_teach(small: list[str], tmp_path: Path) -> None:
    args = [*small, "--model.train=full", "--model.distillation.weight=1"]
    with pytest.raises(UserError, match=r"model\.distillation\.weight=1 needs a frozen base"):
        main([*args, f"--run_dir={tmp_path}"])
    assert not any(tmp_path.iterdir())

"""Nothing is lost, nothing silently wrong: signals, damage, two runs at once, NaN, resuming."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moshi_ttt import files
from moshi_ttt.errors import UserError
from moshi_ttt.files import claim_folder
from moshi_ttt.model.forward import forward
from moshi_ttt.model.weights import load_trained, save_trained
from train.fit import main
from train.run_folder import find_checkpoint, locked


def last(folder: Path) -> bytes:
    return (folder / "checkpoints/last.safetensors").read_bytes()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    small: list[str],
    dropout: list[str],
    uncut: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(uncut, root / "000")
    newest, before = root / "000/checkpoints/last.ckpt", root / "000/checkpoints/previous.ckpt"
    assert find_checkpoint(root, "last") == newest
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (b"", bytes(content[:1000]), bytes(content)):
        newest.write_bytes(damaged)
        assert find_checkpoint(root, "last") == before
        assert "missing or damaged; resuming from the one before it" in capsys.readouterr().out
        with pytest.raises(UserError, match="is damaged or no checkpoint"):
            find_checkpoint(root, str(newest))
    newest.unlink()
    assert find_checkpoint(root, "last") == before
    assert main([*small, *dropout, f"--run_dir={root}", "--ckpt_path=last"]) == root / "000"
    assert last(root / "000") == last(uncut)
    before.write_bytes(b"")
    newest.write_bytes(b"")
    with pytest.raises(UserError, match="no other is there"):
        find_checkpoint(root, "last")


def test_a_checkpoint_does_not_pass_through_the_temporary_folder(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = main([*small, f"--run_dir={tmp_path}", "--trainer.max_epochs=1"])
    assert load_trained(folder / "checkpoints/last.ckpt")[3] == 25


def test_a_full_disk_leaves_the_checkpoint_before(
    small: list[str],
    dropout: list[str],
    uncut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(uncut, root / "000")
    kept = (root / "000/checkpoints/last.ckpt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoints.torch.save", full_disk)
        more = [f"--run_dir={root}", "--ckpt_path=last", "--trainer.max_epochs=3"]
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            main([*small, *dropout, *more])
    assert (root / "000/checkpoints/last.ckpt").read_bytes() == kept
    assert not list((root / "000/checkpoints").glob(".*"))


def full_disk(checkpoint: Any, file: Any) -> None:
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_runs_that_start_at_once_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert claim_folder(tmp_path / "a/b", "run_dir") == tmp_path / "a/b/000"
    answers = iter([tmp_path / "a/b/000", tmp_path / "a/b/001"])
    monkeypatch.setattr(files, "next_folder", lambda root: next(answers))
    assert claim_folder(tmp_path / "a/b", "run_dir") == tmp_path / "a/b/001"
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir="):
        claim_folder(tmp_path / "file", "run_dir")


def test_a_folder_that_is_written_to_is_refused_to_others_and_litter_goes(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    litter = tmp_path / "checkpoints/.last.ckpt.abc.tmp"
    litter.write_text("half")
    with locked(tmp_path):
        assert not litter.exists()
        litter.write_text("being written")
        refused = pytest.raises(UserError, match=f"is being written to by process {os.getpid()} on")
        with refused, locked(tmp_path):
            pytest.fail("it was let in")
        assert litter.exists()
    with locked(tmp_path):
        assert not litter.exists()


def test_a_refused_resume_changes_nothing_and_a_copied_checkpoint_begins_a_new_run(
    small: list[str],
    dropout: list[str],
    uncut: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, elsewhere = tmp_path / "runs", tmp_path / "gift/checkpoints"
    shutil.copytree(uncut, root / "000")
    config = (root / "000/config.yaml").read_text()
    with pytest.raises(UserError, match="trains other weights"):
        main([*small, f"--run_dir={root}", "--ckpt_path=last", "--model.train=lora"])
    assert (root / "000/config.yaml").read_text() == config
    elsewhere.mkdir(parents=True)
    shutil.copy(uncut / "checkpoints/previous.ckpt", elsewhere / "last.ckpt")
    arguments = [*small, *dropout, f"--run_dir={root}", f"--ckpt_path={elsewhere}/last.ckpt"]
    folder = main(arguments)
    assert folder == root / "001"
    assert f"resuming from {elsewhere}/last.ckpt, writing to {folder}" in capsys.readouterr().out
    assert [path.name for path in elsewhere.iterdir()] == ["last.ckpt"]
    assert last(folder) == last(uncut)
    # what it went on from is no part of the recipe: run again it begins anew
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None


def test_a_resume_goes_on_with_the_learning_rates_it_is_given(
    small: list[str], dropout: list[str], uncut: Path, tmp_path: Path
) -> None:
    shutil.copytree(uncut, tmp_path / "000")
    more = ["--trainer.max_epochs=3", "--model.optim.lr_memory=7e-5", "--model.optim.beta2=0.9"]
    main([*small, *dropout, f"--run_dir={tmp_path}", "--ckpt_path=last", *more])
    checkpoint = torch.load(tmp_path / "000/checkpoints/last.ckpt", weights_only=True)
    groups = {g["name"]: g for g in checkpoint["optimizer_states"][0]["param_groups"]}
    assert groups["memory/matrices"]["initial_lr"] == 7e-5
    assert groups["memory/matrices"]["lr"] == pytest.approx(7e-6)  # the end of the schedule
    assert groups["rest/matrices"]["initial_lr"] == 1e-4
    assert all(group["betas"] == (0.9, 0.9) for group in groups.values())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the forward pass of a training batch give NaN from layer 3 on."""

    def poison(batch: int) -> None:
        count = [0]

        def hurt(lm: Any, codes: torch.Tensor, *rows: Any, **more: Any) -> Any:
            count[0] += lm.training and torch.is_grad_enabled()
            if count[0] != batch:
                return forward(lm, codes, *rows, **more)
            layer = lm.transformer.layers[3]
            handle = layer.register_forward_pre_hook(lambda _, x: (x[0] * float("nan"),))
            try:
                return forward(lm, codes, *rows, **more)
            finally:
                handle.remove()

        monkeypatch.setattr("moshi_ttt.teacher_forcing.losses.forward", hurt)

    return poison


def test_nan_stops_the_run_names_its_place_and_spares_the_weights(
    small: list[str], tmp_path: Path, poisoned: Callable[[int], None]
) -> None:
    poisoned(3)
    saved = ["--checkpoint.every_n_steps=1", f"--run_dir={tmp_path}"]
    with pytest.raises(UserError) as stopped:
        main([*small, *saved])
    message = str(stopped.value)
    where = "step 2: the text and audio loss is not finite, first in layer 3, on "
    assert message.startswith(where)
    assert ".wav from step" in message
    assert "No weight has been changed by it" in message
    assert set(load_file(tmp_path / "000/nonfinite_step_2.safetensors")) == {"codes_0"}
    kept = torch.load(tmp_path / "000/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_nan_can_be_left_out_a_few_times(
    small: list[str], tmp_path: Path, poisoned: Callable[[int], None], capsys: Any
) -> None:
    poisoned(3)
    folder = main([*small, f"--run_dir={tmp_path}", "--finite.skip_at_most=1"])
    assert (
        "step 2: update left out, the text and audio loss is not finite" in capsys.readouterr().out
    )
    kept = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 8
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_weights_that_are_not_finite_are_neither_written_nor_read(
    uncut: Path, tmp_path: Path
) -> None:
    file = uncut / "checkpoints/last.safetensors"
    _, source, config, steps = load_trained(file)
    weights = load_file(file)
    path = tmp_path / "x.safetensors"
    save_trained(path, weights, config, steps, source)
    assert path.read_bytes() == file.read_bytes()
    name = sorted(weights)[0]
    damaged = weights | {name: weights[name] * float("nan")}
    with pytest.raises(UserError, match=rf"{name} is not finite; .* is not written over"):
        save_trained(path, damaged, config, steps, source)
    assert path.read_bytes() == file.read_bytes()
    size = len(weights[name].flatten()) * 4
    path.write_bytes(file.read_bytes()[:-size] + b"\xff" * size)
    with pytest.raises(UserError, match=r"is not finite; .* take an earlier checkpoint"):
        load_trained(path)


@pytest.mark.parametrize(("limit", "batches"), [("1", 1), ("1.0", 1), ("2", 2), ("0.5", 2)])
def test_a_whole_number_of_batches_is_a_number_of_batches(
    small: list[str], tmp_path: Path, limit: str, batches: int
) -> None:
    limits = [f"--trainer.limit_train_batches={limit}", "--trainer.max_epochs=1"]
    folder = main([*small, *limits, f"--run_dir={tmp_path}"])
    kept = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == batches

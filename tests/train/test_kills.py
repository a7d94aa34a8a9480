"""A run that is killed again and again ends as if nobody had touched it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from killed_run import Kill, run

KILLS = [
    Kill("pathlib:Path.replace", ending=".safetensors"),  # the first codes
    Kill("moshi.models.lm:LMGen.step", call=20),
    Kill("train.module:MoshiTTT.training_step", call=4),
    Kill("pathlib:Path.replace", ending="last.ckpt"),
    Kill("pathlib:Path.replace", ending="report.html"),
]


def test_a_run_that_is_killed_anywhere_ends_with_equal_weights_and_no_litter(
    small: list[str],
    dropout: list[str],
    uncut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch, root, cache = (tmp_path / name for name in ("scratch", "killed", "cache"))
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    often = ["--checkpoint.every_n_steps=2", "--long_generation.every_n_epochs=2"]
    arguments = [*small, *dropout, *often, f"--data.cache_dir={cache}"]
    for kill in KILLS:
        resumes = any(root.glob("*/checkpoints/*.ckpt"))
        resume = ["--ckpt_path=last"] * resumes
        assert run([*arguments, *resume, f"--run_dir={root}"], kill) == -signal.SIGKILL, kill
    assert list(cache.glob("*.safetensors"))
    assert run([*arguments, "--ckpt_path=last", f"--run_dir={root}"], None) == 0
    killed = max(root.glob("[0-9]*"))
    for weights in ("last.safetensors", "best.safetensors"):
        found, expected = (one / "checkpoints" / weights for one in (killed, uncut))
        assert found.read_bytes() == expected.read_bytes()
    evaluated = {path.parent.name for path in killed.glob("longgen/*/summary.json")}
    assert evaluated == {"epoch_000", "epoch_002"}
    assert [*killed.rglob(".*.tmp"), *cache.rglob(".*.tmp"), *scratch.rglob("*.ckpt")] == []

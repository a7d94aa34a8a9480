"""A run of seconds, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from train.fit import main


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run of seconds: 2 recordings of 8 s, clips of 2 s, 4 batches an epoch."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(2):
        time_sec = np.arange(8 * 24_000) / 24_000
        pitch_hz = rng.uniform(100, 300, size=2)
        audio = 0.3 * np.sin(2 * np.pi * pitch_hz * time_sec[:, None] ** 1.2)
        soundfile.write(folder / f"{number}.wav", audio, 24_000)
        words = [["hello", [0.5 + t, 0.9 + t], "SPEAKER_MAIN"] for t in range(7)]
        (folder / f"{number}.json").write_text(json.dumps({"alignments": words}))
        lines.append(json.dumps({"path": f"{number}.wav", "duration": 8.0}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return [
        "--config=long60s_scratch.yaml",
        f"--data.manifest={folder}/data.jsonl",
        f"--data.val_manifest={folder}/data.jsonl",
        f"--data.cache_dir={folder}/cache",
        "--data.duration_sec=2",
        "--data.allow_any_duration=true",
        "--data.batch_size=2",
        "--model.context_steps=20",
        "--model.memory.rule=ttt_linear",
        "--model.memory.layers=last:1",
        "--model.memory.projections=own",
        "--model.memory.gate_init=0",
        "--model.memory.head_dim=8",
        "--model.memory.mini_batch_steps=5",
        "--model.loss.magnitude_reg=1",
        "--trainer.max_epochs=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--long_generation.every_n_epochs=0",
        "--long_generation.run.prompts=1",
        "--long_generation.run.seeds=1",
        "--long_generation.run.prompt_sec=1",
        "--long_generation.run.seconds=4",
        "--long_generation.run.nll_sec=4",
    ]


@pytest.fixture(scope="session")
def dropout() -> list[str]:
    """Arguments that make weights depend on the random state."""
    return ["--model.train=memory+lora", "--model.lora.rank=2", "--model.lora.dropout=0.5"]


@pytest.fixture(scope="module")
def uncut(small: list[str], dropout: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uncut")
    return main([*small, *dropout, f"--run_dir={folder}"])

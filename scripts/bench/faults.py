"""Kill a training run again and again, resume it, and compare it with one that nobody disturbed.

    python scripts/bench/faults.py --kills 100       # about an hour and a half on two cores
    python scripts/bench/faults.py --kills 20 --signals SIGTERM SIGINT

The run is a real one, in a process of its own: a memory on the bundled tiny model, clips of 15 s,
two epochs, each with validation, long generation and report, and a checkpoint every two steps.
Kills (SIGKILL, or what `--signals` names) fall anywhere between its start and its end, and
checkpoints are written with the temporary folder on another file system. A run that is over starts
anew. Each that ends must have the weights of the undisturbed one, byte by byte, all its
evaluations, and no half-written file. What can be caught must end the run within 5 seconds, with
the status that shells expect and without a traceback.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import run_program
from moshi_ttt.progress import progress

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 2
ARGUMENTS = (
    "--config=long15s.yaml",
    "--model.context_steps=50",
    "--trainer.accelerator=cpu",
    f"--trainer.max_epochs={EPOCHS}",
    "--trainer.limit_train_batches=5",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
    "--checkpoint.every_n_steps=2",
    "--long_generation.every_n_epochs=1",
    "--long_generation.run.seconds=6",
    "--long_generation.run.prompt_sec=2",
    "--long_generation.run.prompts=1",
    "--long_generation.run.seeds=1",
    "--long_generation.run.nll_recordings=1",
)
WEIGHTS = ("checkpoints/last.safetensors", "checkpoints/best.safetensors")
STOPS_WITHIN_SEC = 5.0
MEMORY = Path("/dev/shm")  # another file system than that of the runs


def main(kills: int, seed: int, out: Path | None, signals: list[str]) -> Counter[str]:
    """Kill and resume until all kills are spent, and the last run has ended.

    Returns:
        How often it was killed in which phase, and how many runs ended.

    Raises:
        SystemExit: a run ended otherwise than the undisturbed one, or failed by itself.
    """
    rng, counts = random.Random(seed), Counter[str]()
    elsewhere = MEMORY if MEMORY.is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=out) as folder,
        tempfile.TemporaryDirectory(dir=elsewhere) as other,
    ):
        scratch = Path(other)
        whole = Path(folder) / "whole"
        started_sec = time.monotonic()
        _run(whole, scratch, None)
        lasts_sec = time.monotonic() - started_sec
        number, left = 0, kills
        with progress(total=kills, unit="kill") as bar:
            while left:
                root, number = Path(folder) / f"run_{number}", number + 1
                while left:
                    signum = signal.Signals[rng.choice(signals)]
                    if _run(root, scratch, rng.uniform(0, lasts_sec), signum):
                        break
                    counts[f"{signum.name} {_phase(root)}"] += 1
                    left -= 1
                    bar.update()
                _run(root, scratch, None)
                _compare(_newest(root), _newest(whole), scratch)
                counts["ended with equal weights"] += 1
    return counts


def _run(
    root: Path,
    scratch: Path,
    kill_after_sec: float | None,
    signum: signal.Signals = signal.SIGKILL,
) -> bool:
    """Start or resume, and kill after a while.

    Returns:
        Whether it came to its end.
    """
    resumable = any(root.glob("*/checkpoints/*.ckpt"))
    command = [sys.executable, str(ROOT / "train/fit.py"), *ARGUMENTS, f"--run_dir={root}"]
    command += ["--ckpt_path=last"] * resumable
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=kill_after_sec)
        except subprocess.TimeoutExpired:
            process.send_signal(signum)
            asked_sec = time.monotonic()
            _, errors = process.communicate()
            lasted_sec = time.monotonic() - asked_sec
            _check_stop(signum, process.returncode, lasted_sec, errors)
            return process.returncode == 0
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed by itself:\n{errors[-2000:]}")
    return True


def _check_stop(signum: signal.Signals, status: int, lasted_sec: float, errors: str) -> None:
    """Leave with what is wrong with how a run stopped, if anything is."""
    if status == -signum:
        return  # while it is loaded, Python ends as it always does
    # what falls into a finalizer is printed, and sent again
    tracebacks = errors.count("Traceback") - errors.count("Exception ignored")
    if status not in (128 + signum, 0) or tracebacks > 0:
        raise SystemExit(f"{signum.name} ended the run with status {status}:\n{errors[-2000:]}")
    if lasted_sec > STOPS_WITHIN_SEC:
        raise SystemExit(f"{signum.name} ended the run after {lasted_sec:.1f} s")


def _newest(root: Path) -> Path:
    return max(path for path in root.iterdir() if path.is_dir())


def _phase(root: Path) -> str:
    """Where the run stood when it was killed, from what it left."""
    if not any(root.glob("*/checkpoints/*.ckpt")):
        return "before its first checkpoint"
    run = _newest(root)
    if any(run.glob("checkpoints/.*.tmp")):
        return "writing a checkpoint"
    evaluated = [path for path in run.glob("longgen/*") if not (path / "summary.json").is_file()]
    return "in an evaluation" if evaluated else "elsewhere"


def _compare(found: Path, expected: Path, scratch: Path) -> None:
    """Leave with what is wrong, if anything is."""
    wrong = []
    for weights in WEIGHTS:
        if (found / weights).read_bytes() != (expected / weights).read_bytes():
            wrong.append(f"{found / weights} differs from {expected / weights}")
    for epoch in range(EPOCHS + 1):
        if not (found / f"longgen/epoch_{epoch:03d}/summary.json").is_file():
            wrong.append(f"{found} lacks the evaluation of epoch {epoch}")
    wrong += [f"{path} is left over" for path in found.rglob(".*.tmp")]
    wrong += [f"{path} is left over" for path in scratch.rglob("*.ckpt")]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--kills", type=int, default=100, help="How often to kill.")
    add("--seed", type=int, default=0, help="Seed of when.")
    catchable = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]
    add("--signals", nargs="+", choices=["SIGKILL", *catchable], default=["SIGKILL"], help="Which.")
    add("--out", type=Path, help="Folder for the runs; null: the temporary one.")
    for what, count in sorted(run_program(partial(main, **vars(parse(parser, None)))).items()):
        print(f"{count:4} {what}")

"""What a reader wants to know first: what was run, with what, for how long, and what next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moshi_ttt.evaluation.folder import CONFIG, Evaluation
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.comparison import common_contexts
from moshi_ttt.report.intervals import loss_difference, share_difference
from moshi_ttt.teacher_forcing.controls import beyond_window

CHECKPOINT = Path("checkpoints/last.ckpt")


def at_a_glance(
    run_folder: Path, evaluations: Sequence[Evaluation], trace: Trace
) -> list[tuple[str, str]]:
    """What each line is about, and the line.

    Args:
        run_folder: of a training, or of scripts/evaluate.py; or one evaluation by itself.
        evaluations: of the run.
        trace: of the latest one.
    """
    config = _config(run_folder)
    lines = {
        "model": _model(evaluations[-1], trace),
        "data": _data(config, evaluations[-1], trace),
        "run": _run(trace),
        "took": _took(evaluations),
        f"since {evaluations[0].label}": _gain(evaluations, trace),
    }
    if config:
        lines |= _commands(run_folder, config, evaluations[-1])
    return [(name, text) for name, text in lines.items() if text]


def _config(run_folder: Path) -> dict[str, Any]:
    path = run_folder / CONFIG
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return found if isinstance(found, dict) else {}


def _model(latest: Evaluation, trace: Trace) -> str:
    memory = latest.summary.get("about", {}).get("memory", "")
    sees = f"attention sees {trace.clock.seconds(trace.context_steps):g} s"
    return "; ".join(filter(None, (trace.source, memory and f"memory: {memory}", sees)))


def _data(config: dict[str, Any], latest: Evaluation, trace: Trace) -> str:
    clips = f"{_seconds(trace, trace.trained_steps)} clips" if trace.trained_steps else ""
    parts = []
    if "trainer" in config:
        manifest = config.get("data", {}).get("manifest") or "the bundled recordings"
        parts.append(", ".join(filter(None, (f"trained on {manifest}", clips))))
    elif clips:
        parts.append(f"trained on {clips}")
    if examined := latest.summary.get("about", {}).get("examined with"):
        parts.append(f"examined with {examined}")
    return "; ".join(parts)


def _gain(evaluations: Sequence[Evaluation], trace: Trace) -> str:
    """What the latest evaluation does better, or worse, than the first one."""
    if len(evaluations) == 1:
        return ""
    ends = [evaluations[-1], evaluations[0]]
    window_sec, gains = trace.clock.seconds(trace.context_steps), []
    pools = [beyond_window(one.recall or {}, window_sec).get("own", {}) for one in ends]
    if all("kept" in pool for pool in pools):
        gain = share_difference(*(pool["kept"] for pool in pools))
        gains.append(f"own facts recalled beyond the window {gain}")
    for name, losses in common_contexts([one.contexts for one in ends]).items():
        if name.endswith(", text"):
            gains.append(f"{name} {loss_difference(*losses)}")
    return "; ".join(gains)


def _run(trace: Trace) -> str:
    return (
        f"{_seconds(trace, trace.steps)} in each of {len(trace.streams)} streams, the first "
        f"{_seconds(trace, trace.prompt_steps)} forced from a recording"
    )


def _seconds(trace: Trace, steps: int) -> str:
    return f"{trace.clock.seconds(steps):g} s"


def _took(evaluations: Sequence[Evaluation]) -> str:
    took = f"{evaluations[-1].summary['wall_sec']:.0f} s for the evaluation"
    first, last = (one.summary.get("ended_unix_sec") for one in (evaluations[0], evaluations[-1]))
    if first is None or last is None or len(evaluations) == 1:
        return took
    minutes = (last - first + evaluations[0].summary["wall_sec"]) / 60
    return f"{minutes:.1f} min from the first evaluation to the last; {took}"


def _commands(run_folder: Path, config: dict[str, Any], latest: Evaluation) -> dict[str, str]:
    """How to do it again, and what to do next."""
    program, subject = "scripts/evaluate.py", f"--model {config.get('model')}"
    if "trainer" in config:
        program, subject = "train/fit.py", f"--checkpoint {run_folder / CHECKPOINT}"
    elif config.get("checkpoint"):
        subject = f"--checkpoint {config['checkpoint']}"
    then = f"python scripts/evaluate.py --compare {run_folder} OTHER_RUN (side by side)"
    if latest.jumps:
        then = f"python scripts/attribute_jump.py {subject} (why the norm jumps)"
    elif "trainer" in config:
        then = f"python scripts/evaluate.py {subject} --seconds 300 (further)"
    return {"again": f"python {program} --config {run_folder / CONFIG}", "next": then}

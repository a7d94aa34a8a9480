"""Show one evaluation folder, and the settings of a run, in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.report.figures import evaluation_pictures
from moshi_ttt.report.headline import headline

FIRST = {
    "longgen/recall/beyond_window/kept": "at_a_glance/recall_kept",
    "longgen/recall/beyond_window/reset": "at_a_glance/recall_reset",
    "longgen/nll/text/behind_10s": "at_a_glance/nll_behind_10s",
    "longgen/nll/text/behind_100s": "at_a_glance/nll_behind_100s",
    "longgen/jump/count": "at_a_glance/jumps",
    "longgen/times_real_time": "at_a_glance/times_real_time",
}
"""Scalars of an evaluation that TensorBoard shows on its first page, under these tags."""
RESULTS = ("val/loss", *FIRST.values())
"""Scalars that the table of runs shows beside their settings, as they were last."""


def log_settings(writer: SummaryWriter, text: str, settings: Mapping[str, Any]) -> None:
    """Write the resolved settings as text, and as hyper-parameters beside `RESULTS`.

    Args:
        writer: of the run's scalars.
        text: the settings as they are saved.
        settings: the same, by key; those that are None are left out of the table.
    """
    writer.add_text("settings", f"```\n{text}\n```")
    plain = (bool, int, float, str)
    values = {
        key: value if isinstance(value, plain) else str(value)
        for key, value in settings.items()
        if value is not None
    }
    # not `add_hparams`, which begins a run of its own and logs each result once as it is now
    for summary in hparams(values, dict.fromkeys(RESULTS, 0.0)):
        writer.file_writer.add_summary(summary)


def log_evaluation(writer: SummaryWriter, folder: Path, global_step: int) -> dict[str, np.ndarray]:
    """Write the headline, scalars, figures (norms, memory, losses, recall, ...) and Moshi's voice.

    The voice is given whole, and cut out around each critical position.

    Args:
        writer: where to; flushed, so that a running TensorBoard sees the evaluation at once.
        folder: a finished evaluation; undefined scalars (null) are skipped.
        global_step: optimizer steps taken so far.

    Returns:
        The figures as they were drawn, for the report.

    Raises:
        UserError: the folder does not hold a finished evaluation.
    """
    evaluation = Evaluation.load(folder)
    trace = evaluation.trace()
    lines = "\n".join(f"- {line}" for line in headline(evaluation, trace))
    writer.add_text("longgen/headline", lines, global_step)
    for tag, value in evaluation.scalars.items():
        writer.add_scalar(FIRST.get(tag, tag), value, global_step)
    pictures = evaluation_pictures(evaluation, trace)
    for name, picture in pictures.items():
        writer.add_image(f"longgen/figures/{name}", picture, global_step, dataformats="HWC")
    for path in [*evaluation.audio, *evaluation.cuts]:
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
        # TensorBoard plays mono; the left channel is Moshi
        tag = f"longgen/audio/{path.stem}"
        writer.add_audio(tag, samples[:, 0], global_step, sample_rate=sample_rate)
    writer.flush()
    return pictures

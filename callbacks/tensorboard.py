"""Show one evaluation folder in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from torch.utils.tensorboard import SummaryWriter

from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.report.figures import evaluation_pictures
from moshi_ttt.report.headline import headline


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
        writer.add_scalar(tag, value, global_step)
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

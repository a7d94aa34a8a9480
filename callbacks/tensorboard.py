"""Show one evaluation folder in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import soundfile
from torch.utils.tensorboard import SummaryWriter

from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.report.figures import evaluation_figures, pixels


def log_evaluation(writer: SummaryWriter, folder: Path, global_step: int) -> None:
    """Write scalars, figures (norms, heat map, memory, losses, recall, sound) and Moshi's voice.

    The voice is given whole, and cut out around each critical position.

    Args:
        writer: where to; flushed, so that a running TensorBoard sees the evaluation at once.
        folder: a finished evaluation; undefined scalars (null) are skipped.
        global_step: optimizer steps taken so far.

    Raises:
        UserError: the folder does not hold a finished evaluation.
    """
    evaluation = Evaluation.load(folder)
    for tag, value in evaluation.scalars.items():
        writer.add_scalar(tag, value, global_step)
    clips = evaluation.audio
    figures = evaluation_figures(
        evaluation.trace(),
        evaluation.jumps,
        evaluation.nll,
        evaluation.recall,
        clips[0] if clips else None,
    )
    for name, figure in figures.items():
        tag = f"longgen/figures/{name}"
        writer.add_image(tag, pixels(figure), global_step, dataformats="HWC")
    for path in [*clips, *evaluation.cuts]:
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
        # TensorBoard plays mono; the left channel is Moshi
        tag = f"longgen/audio/{path.stem}"
        writer.add_audio(tag, samples[:, 0], global_step, sample_rate=sample_rate)
    writer.flush()

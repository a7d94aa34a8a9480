"""A model to examine: plain Moshi from a source, or what was trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from moshi.models.lm import LMModel

from moshi_ttt.errors import UserError, check_bounds, settings_at
from moshi_ttt.model.build import Dtype
from moshi_ttt.model.hybrid import set_inner_rate
from moshi_ttt.model.sinks import check_thinning, keep
from moshi_ttt.model.source import ModelSource, open_source
from moshi_ttt.model.weights import load_trained


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to examine, and what is known of it."""

    lm: LMModel
    """In eval mode."""
    source: ModelSource
    """Whose codec, tokenizer and clock go with it."""
    trained_steps: int | None
    """Clip length of its training in steps; None: unknown."""
    label: str
    """What a report calls it."""


def open_subject(
    name: str | Path,
    device: torch.device | str,
    *,
    dtype: Dtype | None = None,
    context_steps: int | None = None,
    base: str | None = None,
    sinks: int | None = None,
    thinning: int | None = None,
    farthest_steps: int | None = None,
    inner_rate: float | None = None,
) -> Subject:
    """Open a source, or a trained checkpoint.

    Args:
        name: of a source, as `open_source` has it; or the path of a checkpoint, as `load_trained`
            has it: a `Path`, or a name that ends in .ckpt or .safetensors.
        device: where to put the model.
        dtype: weights' type of a source; None: float32.
        context_steps: ring capacity C; None: its own, or what a checkpoint was trained with.
        base: where the base of a checkpoint lies, as `load_trained` has it.
        sinks: first steps that are never evicted; None: as a checkpoint was trained, or none.
        thinning: how often older keys are halved within C; None: likewise.
        farthest_steps: how far away a key may seem; None: likewise.
        inner_rate: multiplies the write gates of a memory; None: as it was trained.

    Raises:
        UserError: no such model; an impossible capacity; type of a checkpoint, which has its own;
            base of a source, which is one; an inner rate where there is no memory.
    """
    check_bounds("--inner_rate", inner_rate, least=0)
    subject = _opened(name, device, dtype, context_steps, base)
    changes = [] if context_steps is None else [f"C = {context_steps} steps"]
    changes += _keep(subject.lm, sinks, thinning, farthest_steps)
    if inner_rate is not None:
        set_inner_rate(subject.lm, inner_rate)
        changes.append(f"inner rate x {inner_rate:g}")
    if not is_checkpoint(name):
        return replace(subject, label=f"{subject.label} ({', '.join(['vanilla', *changes])})")
    return replace(subject, label=", ".join([subject.label, *changes]))


def _keep(
    lm: LMModel, sinks: int | None, thinning: int | None, farthest_steps: int | None
) -> list[str]:
    """Change what attention keeps; what was changed, in words."""
    most = lm.context - 1 if lm.context else None
    check_bounds("--sinks", sinks, least=0, most=most, remedy="they stand beside the window")
    check_thinning("--thinning", thinning, lm.context)
    check_bounds("--farthest_steps", farthest_steps, least=1)
    if (sinks, thinning, farthest_steps) == (None, None, None):
        return []
    keep(lm, sinks=sinks, thinning=thinning, farthest_steps=farthest_steps)
    said = []
    if sinks is not None:
        said.append(f"{sinks} sinks")
    if thinning is not None:
        said.append(f"older keys halved x {thinning}")
    if farthest_steps is not None:
        said.append(f"keys seem at most {farthest_steps} steps away")
    return said


def _opened(
    name: str | Path,
    device: torch.device | str,
    dtype: Dtype | None,
    context_steps: int | None,
    base: str | None,
) -> Subject:
    if is_checkpoint(name):
        if dtype is not None:
            raise UserError("--dtype goes with --model; a checkpoint brings its own")
        path = Path(name)
        lm, source, _, trained_steps = load_trained(path, device, base, context_steps)
        label = f"{_run_folder(path).parent.name}/{_run_folder(path).name} {path.stem}"
        return Subject(lm=lm, source=source, trained_steps=trained_steps, label=label)
    if base is not None:
        raise UserError(f"--base={base} goes with --checkpoint; --model {name} is a base itself")
    with settings_at("", source="--model"):
        source = open_source(str(name))
    lm = source.lm(
        device=device, dtype=getattr(torch, dtype or "float32"), context_steps=context_steps
    )
    steps = source.trained_steps
    return Subject(lm=lm, source=source, trained_steps=steps, label=source.name)


def is_checkpoint(name: str | Path) -> bool:
    """Whether a name means a trained checkpoint."""
    return isinstance(name, Path) or Path(name).suffix in (".ckpt", ".safetensors")


def short_name(name: str | Path) -> str:
    """What a model is called in the names of files."""
    path = Path(name)
    if is_checkpoint(name):
        return f"{_run_folder(path).parent.name}-{_run_folder(path).name}-{path.stem}"
    return path.name


def _run_folder(checkpoint: Path) -> Path:
    """Of `RUN/checkpoints/last.ckpt`, `RUN`."""
    return checkpoint.absolute().parent.parent

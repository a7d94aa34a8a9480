"""The base as a teacher of what was added to it: the same weights, another window, one forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torch.nn import functional as F

from moshi_ttt.errors import check_fields, check_setting
from moshi_ttt.model.build import TRAIN_BASE, Trained
from moshi_ttt.model.forward import forward
from moshi_ttt.model.hybrid import gates_forced_to_zero
from moshi_ttt.model.lora import adapters_off
from moshi_ttt.model.sinks import windows_alone
from moshi_ttt.model.window import window
from moshi_ttt.rows import GROUPS

Group = Literal["text", "first_codebook", "other_codebooks"]  # GROUPS, for the command line


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What training learns from the base itself, read without memory and adapters."""

    weight: float = 0.0
    """Weight of the divergence from the base, nats a token; 0 switches it off, and saves the
    second forward."""
    groups: tuple[Group, ...] = ("text", "first_codebook", "other_codebooks")
    """Whose predictions are compared, of the clips whose audio is predicted where it is audio. A
    base that does not see the answers either should teach only what it knows better, or what a
    memory is not for: `[other_codebooks]`."""
    window_steps: int | None = None
    """Attention window of the base meanwhile, steps of 80 ms; null lets it see the whole clip."""

    def __post_init__(self) -> None:
        check_fields(self, "weight", least=0)
        check_fields(self, "window_steps", least=2, remedy="null lets the base see the whole clip")
        check_setting(
            len(self.groups) > 0 and set(self.groups) <= set(GROUPS),
            "groups",
            list(self.groups),
            f"must name one or more of {', '.join(GROUPS)}",
        )

    @property
    def teaches_audio(self) -> bool:
        """Whether audio must be predicted for it."""
        return self.weight > 0 and self.groups != ("text",)

    def check_fits(self, train: Trained) -> None:
        """Hold it against what learns.

        Raises:
            UserError: the base itself does.
        """
        check_setting(
            not self.weight or train not in TRAIN_BASE,
            "weight",
            f"{self.weight:g}",
            f"needs a frozen base to learn from, and with model.train={train} it learns itself; "
            "use memory, lora or memory+lora, or 0",
        )


@torch.no_grad()
def base_output(
    lm: LMModel,
    codes: Tensor,
    config: DistillationConfig,
    heard: Sequence[bool] | None = None,
    predicted: Sequence[bool] | None = None,
) -> LMOutput:
    """What the frozen base says of clips [B, 17, T].

    Call it before the forward that trains: shutting the gates writes to them.

    Args:
        lm: with a memory, adapters or both upon a frozen base.
        codes: the clips.
        config: window and groups.
        heard: as for `forward`.
        predicted: as for `forward`.
    """
    if config.groups == ("text",):
        predicted = [False] * len(codes)
    with ExitStack() as scope:
        scope.enter_context(window(lm, config.window_steps))
        scope.enter_context(windows_alone(lm))
        scope.enter_context(gates_forced_to_zero(lm))
        scope.enter_context(adapters_off(lm))
        return forward(lm, codes, heard, predicted=predicted)


def divergence(student: LMOutput, teacher: LMOutput, groups: Sequence[Group]) -> Tensor:
    """KL(teacher, student), nats a token: the sum of the groups' means over known positions.

    Args:
        student: of the forward that trains.
        teacher: of `base_output` on the same clips.
        groups: those compared.
    """
    return torch.stack([_divergence(*_of(group, student, teacher)) for group in groups]).sum()


def _of(group: Group, student: LMOutput, teacher: LMOutput) -> tuple[Tensor, Tensor, Tensor]:
    if group == "text":
        return student.text_logits, teacher.text_logits, student.text_mask
    books = slice(1) if group == "first_codebook" else slice(1, None)
    return student.logits[:, books], teacher.logits[:, books], student.mask[:, books]


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    # both are NaN where nothing is known
    said, taught = (
        one.masked_fill(~mask[..., None], 0).float().log_softmax(dim=-1)
        for one in (student, teacher)
    )
    each = F.kl_div(said, taught, reduction="none", log_target=True).sum(dim=-1)
    return (each * mask).sum() / mask.sum().clamp(min=1)

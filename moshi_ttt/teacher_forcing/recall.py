"""How well planted facts are remembered, against the time since they were last mentioned.

A memory probe (`moshi_ttt.data.probes`) is a question whose answer was said some seconds before.
The recording is read teacher-forced, and the words of the answer are what is measured: a model
whose attention still reaches the fact, or whose memory holds it, names them; any other can only
guess among the values of the kind.

That a memory is used is another claim: `moshi_ttt.teacher_forcing.controls`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from moshi_ttt.data import Probe
from moshi_ttt.rows import TEXT_ROW

GAP_CENTRES_SEC = (4, 10, 20, 40, 60, 90, 120, 180, 240)
"""Middles of the bins of `ProbeRecall`; their edges are the geometric means of neighbours."""
GROUPS = ("own", "heard", "own_unseen", "heard_unseen")
"""Classes of probes; apart from them those of which something is in no training recording."""
RIVALS = 3
"""How many rivals are told apart: none, one, and two or more."""
Recall = dict[str, dict[str, list[float]]]
"""By group, then by quantity: what `recall_record` gives."""


class ProbeRecall(Metric):
    """NLL and accuracy of the answers of memory probes, by group, gap, when they were asked, and
    how many rivals they had.

    The NLL is over the full vocabulary, in nats a token. The accuracy is of words, *given that a
    word is spoken*: each of its tokens must be the likeliest that is not padding. When to speak is
    another question, and one that a model can answer without remembering anything.

    Args:
        window_steps: length of a window of the conversation; a question counts in the one in which
            it begins.
        windows: how many there are; the last one is open.
        kwargs: of the `Metric`.
    """

    full_state_update = False
    tokens: Tensor
    nll: Tensor
    words: Tensor
    right: Tensor
    chance: Tensor

    def __init__(self, window_steps: int, windows: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window_steps = window_steps
        self.windows = windows
        for name in ("tokens", "nll", "words", "right", "chance"):
            # the last place of the last axis is for probes whose rivals nobody knows
            shape = len(GROUPS), len(GAP_CENTRES_SEC), windows, RIVALS + 1
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, lm: LMModel, output: LMOutput, codes: Tensor, probes: Sequence[Probe]) -> None:
        """Add the answers of one recording.

        Args:
            lm: tells which text tokens are padding.
            output: of `lm(codes)`.
            codes: [1, K, T] from the start of the recording.
            probes: of the recording; answers that are not wholly inside T are left out.
        """
        words = [
            (self._place(probe), probe.chance, steps)
            for probe in probes
            if all(steps.stop <= codes.shape[-1] for steps in probe.answer_steps)
            for steps in probe.answer_steps
        ]
        if not words:
            return
        at = torch.tensor([step for *_, steps in words for step in steps], device=codes.device)
        assert output.text_mask[0, 0, at].all(), "the text row is known wherever a word is"
        logits = output.text_logits[0, 0, at].float()  # [tokens, card]
        targets = codes[0, TEXT_ROW, at]
        lengths = [len(steps) for *_, steps in words]
        nll = F.cross_entropy(logits, targets, reduction="none").double().split(lengths)
        logits[:, [lm.text_padding_token_id, lm.end_of_text_padding_id]] = -math.inf
        right = (logits.argmax(dim=-1) == targets).split(lengths)
        for word, (place, chance, steps) in enumerate(words):
            self.tokens[place] += len(steps)
            self.nll[place] += nll[word].sum()
            self.words[place] += 1
            self.right[place] += right[word].all()
            self.chance[place] += chance

    def _place(self, probe: Probe) -> tuple[int, int, int, int]:
        window = min(probe.question_step // self.window_steps, self.windows - 1)
        rivals = RIVALS if probe.rivals is None else min(probe.rivals, RIVALS - 1)
        return group_of(probe), gap_bin(probe.gap_sec), window, rivals

    def compute(self) -> dict[str, Tensor]:
        """[groups, bins] each: `words`, and `accuracy`, `chance` and `nll`, NaN without a word;
        [groups, bins, windows] each: `asked_words` and `asked_right`; [groups, bins, `RIVALS`]
        each: `rival_words` and `rival_right`."""
        words = self.words.sum((-2, -1))
        return {
            "words": words,
            "accuracy": self.right.sum((-2, -1)) / words,
            "chance": self.chance.sum((-2, -1)) / words,
            "nll": self.nll.sum((-2, -1)) / self.tokens.sum((-2, -1)),
            "asked_words": self.words.sum(-1),
            "asked_right": self.right.sum(-1),
            "rival_words": self.words.sum(-2)[..., :RIVALS],
            "rival_right": self.right.sum(-2)[..., :RIVALS],
        }


def group_of(probe: Probe) -> int:
    """Index into `GROUPS`."""
    return GROUPS.index(probe.recall_class + "_unseen" * bool(probe.unseen))


def gap_bin(gap_sec: float) -> int:
    """The bin of a gap; the first and the last bin are open to their sides."""
    return sum(gap_sec >= math.sqrt(low * high) for low, high in pairwise(GAP_CENTRES_SEC))


def recall_record(metric: ProbeRecall) -> Recall | None:
    """Lists over the bins that hold words, by group and quantity.

    `gap_sec` (middle of the bin), `words`, `accuracy`, `low` and `high` (95 % Wilson interval of
    the accuracy, as if words were independent), `chance` (mean of the probes), `nll`. And over the
    windows of the conversation and bins that hold words together: `asked_step` (where the window
    begins), `asked_gap_sec`, `asked_words`, `asked_right`. And over numbers of rivals and bins:
    `rival_count` (the last stands for as many or more), `rival_gap_sec`, `rival_words`,
    `rival_right`.

    Returns:
        None if no probe was measured.
    """
    values = metric.compute()
    record: Recall = {}
    for group, name in enumerate(GROUPS):
        of = {what: value[group] for what, value in values.items()}
        rows = of["words"].nonzero()[:, 0]
        if not len(rows):
            continue
        found = {what: of[what][rows].tolist() for what in ("words", "accuracy", "chance", "nll")}
        pairs = zip(found["accuracy"], found["words"], strict=True)
        intervals = [wilson_interval(accuracy, words) for accuracy, words in pairs]
        windows, bins = of["asked_words"].T.nonzero(as_tuple=True)  # in order of time
        rivals, rival_bins = of["rival_words"].T.nonzero(as_tuple=True)
        record[name] = {
            "gap_sec": [GAP_CENTRES_SEC[row] for row in rows],
            **found,
            "low": [low for low, _ in intervals],
            "high": [high for _, high in intervals],
            "asked_step": (windows * metric.window_steps).tolist(),
            "asked_gap_sec": [GAP_CENTRES_SEC[row] for row in bins],
            "asked_words": of["asked_words"][bins, windows].tolist(),
            "asked_right": of["asked_right"][bins, windows].tolist(),
            "rival_count": rivals.tolist(),
            "rival_gap_sec": [GAP_CENTRES_SEC[row] for row in rival_bins],
            "rival_words": of["rival_words"][rival_bins, rivals].tolist(),
            "rival_right": of["rival_right"][rival_bins, rivals].tolist(),
        }
    return record or None


def wilson_interval(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share seen in `count` trials; unlike the normal one it stays within 0..1."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)

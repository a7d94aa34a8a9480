"""Running one cell of the matrix, and keeping what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from torch import Tensor, nn

from moshi_ttt.attribution.activity import moshi_speaks, user_speaks
from moshi_ttt.attribution.conditions import Cell, Condition
from moshi_ttt.diagnosis.listening import decode
from moshi_ttt.files import write_atomic, write_json
from moshi_ttt.generation.generate import borrowed, generate
from moshi_ttt.generation.observer import Observer
from moshi_ttt.generation.prompts import Start, cut_recordings
from moshi_ttt.generation.users import user_codes
from moshi_ttt.instruments.recorder import Recorder
from moshi_ttt.model.hybrid import gates_forced_to_zero
from moshi_ttt.model.sinks import AttentionControls
from moshi_ttt.rows import Rows


@dataclass(frozen=True)
class Streams:
    """What the streams of every cell read."""

    codes: Tensor  # [P, 17, T] recordings from their starting points; -1 where nothing is known
    silence: Tensor  # [K_user, 1] codes of a silent user
    user_speaks: np.ndarray  # [P, T] as `activity.user_speaks` has it
    prompt_steps: int
    seeds: int

    @property
    def prompts(self) -> np.ndarray:
        """Prompt of each stream, [S]."""
        return np.repeat(np.arange(len(self.codes)), self.seeds)

    def fingerprint(self) -> str:
        """Equal for equal codes."""
        digest = hashlib.sha256(self.codes.contiguous().numpy().tobytes())
        digest.update(self.silence.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def speaking(self, condition: Condition, text: np.ndarray, lm: LMModel) -> np.ndarray:
        """Who speaks under a condition in which Moshi says `text` [S, T'], [S, 2, T].

        The last step's text is not known yet, and taken for that of the step before.
        """
        user = np.repeat(self.user_speaks, self.seeds, axis=0)
        if condition.regime == "silent":
            user[:, self.prompt_steps :] = 0.0
        padding_ids = lm.text_padding_token_id, lm.end_of_text_padding_id
        own = moshi_speaks(text, padding_ids)
        missing = user.shape[-1] - own.shape[-1]
        return np.stack([np.pad(own, ((0, 0), (0, missing)), mode="edge"), user], axis=1)

    def batch(self, condition: Condition, rows: Rows) -> tuple[Tensor, Tensor]:
        """Forced codes [S, 17, P] and user [S, K_user, T]; one row a prompt where all is forced."""
        codes = self.codes
        if condition.regime != "forced":
            # without sampling, seeds would repeat each other
            codes = codes.repeat_interleave(self.seeds, dim=0)
        silent_from = self.prompt_steps if condition.regime == "silent" else None
        user = user_codes(codes, self.silence, rows, silent_from=silent_from)
        forced_steps = codes.shape[-1] if condition.regime == "forced" else self.prompt_steps
        return codes[..., :forced_steps], user


def streams_from(
    starts: Sequence[Start],
    silence: Tensor,
    *,
    steps: int,
    prompt_steps: int,
    seeds: int,
    codec: MimiModel,
    rows: Rows,
) -> Streams:
    """Cut the recordings; what a recording lacks at its end is unknown (-1)."""
    codes = cut_recordings(starts, steps)
    sound = decode(codec, user_codes(codes, silence, rows).numpy())
    speaks = user_speaks(sound, codec.frame_size)
    return Streams(codes, silence, speaks, prompt_steps, seeds)


class _ForcedNLL(Observer):
    """NLL of forced text and first-codebook tokens, recorded on the device at every step."""

    def __init__(self, lm: LMModel, codes: Tensor) -> None:
        self._lm = lm
        rows = Rows.of(lm)
        targets = torch.cat([codes[:, rows.text], codes[:, rows.first_codebook]], dim=1)
        self._targets = targets.permute(1, 2, 0).contiguous().to(lm.device)  # [2, T, S]
        self._values = torch.full(self._targets.shape, torch.nan, device=lm.device)
        self._step = torch.full((1,), -1, dtype=torch.long, device=lm.device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [self._lm.transformer.register_forward_pre_hook(self._next_step)]
        for row, module in enumerate((self._lm.text_linear, self._lm.linears[0])):
            assert isinstance(module, nn.Module)
            handles.append(module.register_forward_hook(self._hook(row)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _next_step(self, *_: Any) -> None:
        self._step.add_(1)

    def _hook(self, row: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, logits: Tensor) -> None:
            target = self._targets[row].index_select(0, self._step)[0]  # [S]
            log_p = logits.float().reshape(len(target), -1).log_softmax(-1)
            nll = -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
            nll = nll.masked_fill(target < 0, torch.nan)
            self._values[row].index_copy_(0, self._step, nll[None])

        return hook

    def array(self) -> np.ndarray:
        """[S, 2, T] nats."""
        return self._values.permute(2, 0, 1).cpu().numpy()


def run_cell(
    lm: LMModel,
    controls: AttentionControls,
    condition: Condition,
    streams: Streams,
    *,
    seed: int,
    observers: Sequence[Observer] = (),
) -> Cell:
    """Generate under one condition; the model is handed back as it was.

    Args:
        lm: model in eval mode.
        controls: of `lm`.
        condition: what to hold and what to change.
        streams: prompts and users.
        seed: of the sampling.
        observers: watch the run besides what is recorded for the cell.
    """
    forced, user = streams.batch(condition, Rows.of(lm))
    controls.set(
        context_steps=condition.context_steps,
        sinks=condition.sinks,
        start_position=condition.start_position,
    )
    recorder = Recorder(lm, len(user), user.shape[-1])
    forced_nll = _ForcedNLL(lm, forced) if condition.regime == "forced" else None
    watching: list[Observer] = [recorder]
    if forced_nll is not None:
        watching.append(forced_nll)
    with (
        borrowed(lm, seed),
        gates_forced_to_zero(lm) if condition.gates_shut else nullcontext(),
    ):
        said = generate(lm, forced, user, observers=[*watching, *observers])
    text = said[:, 0].cpu().numpy()
    norm = recorder.arrays()["input_norm"]
    nll = None
    if forced_nll is not None:
        norm = np.repeat(norm, streams.seeds, axis=0)
        nll = np.repeat(forced_nll.array(), streams.seeds, axis=0)
        text = np.repeat(text, streams.seeds, axis=0)
    with np.errstate(divide="ignore"):
        log_norm = np.log(norm)
    speaking = streams.speaking(condition, text, lm)
    return Cell(condition, log_norm, streams.prompts, streams.prompt_steps, nll, speaking)


def weights_fingerprint(lm: LMModel) -> str:
    """Tells models apart by the size of each of their tensors' values."""
    digest = hashlib.sha256()
    for name, value in sorted(lm.state_dict().items()):
        digest.update(f"{name} {value.double().abs().sum().item():.10e}\n".encode())
    return digest.hexdigest()[:16]


def save_cell(folder: Path, cell: Cell, settings: dict[str, Any]) -> None:
    """Write `NAME.npz`, then `NAME.json`, which marks the cell as finished."""
    stem = folder / cell.condition.name
    arrays: dict[str, Any] = {"prompts": cell.prompts}
    for name in ("log_norm", "nll", "speaking"):
        values = getattr(cell, name)
        if values is not None:
            arrays[name] = values.astype(np.float32)
    write_atomic(
        stem.with_name(f"{stem.name}.npz"), lambda file: np.savez_compressed(file, **arrays)
    )
    record = {"condition": dataclasses.asdict(cell.condition), "prompt_steps": cell.prompt_steps}
    write_json(stem.with_name(f"{stem.name}.json"), record | {"settings": settings})


def load_cell(folder: Path, condition: Condition, settings: dict[str, Any]) -> Cell | None:
    """What `save_cell` wrote; None unless it was made under the same condition and settings."""
    stem = folder / condition.name
    try:
        record = json.loads(stem.with_name(f"{stem.name}.json").read_text())
        if record["settings"] != settings or record["condition"] != dataclasses.asdict(condition):
            return None
        with np.load(stem.with_name(f"{stem.name}.npz"), allow_pickle=False) as data:
            log_norm, prompts, speaking = (data[one] for one in ("log_norm", "prompts", "speaking"))
            nll = data.get("nll")
            return Cell(condition, log_norm, prompts, record["prompt_steps"], nll, speaking)
    except (OSError, ValueError, KeyError):
        return None

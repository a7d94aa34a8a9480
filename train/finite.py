"""A loss or gradient that is not finite ends the run before it reaches the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save
from torch import Tensor, nn

from moshi_ttt.errors import UserError, check_bounds
from moshi_ttt.files import write_bytes
from moshi_ttt.teacher_forcing.losses import read_clips


class FiniteUpdates(Callback):
    """Looks at the gradient before every optimizer step; it is finite only if the loss was.

    Args:
        skip_at_most: Updates whose gradient is not finite that are left out before the run is
            stopped; 0 stops at the first.
    """

    def __init__(self, skip_at_most: int = 0) -> None:
        check_bounds("finite.skip_at_most", skip_at_most, least=0)
        self.skip_at_most = skip_at_most
        self._skipped = 0
        self._batches: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """How many were left out, for the checkpoint."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batches of this optimizer step."""
        self._batches.append(batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Leave the update out, or end the run.

        Raises:
            UserError: naming step, stream, layer and recordings, with the batches kept in a file.
        """
        batches, self._batches = self._batches, []
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        if not gradients or torch.nn.utils.get_total_norm(gradients.values()).isfinite():
            return
        if trainer.precision == "16-mixed" and _losses_are_finite(pl_module, batches):
            return  # too large for fp16, which its scaler sees to
        self._skipped += 1
        found = _finding(pl_module, batches, gradients)
        if self._skipped <= self.skip_at_most:
            optimizer.zero_grad(set_to_none=True)
            trainer.print(f"step {trainer.global_step}: update left out, {found}")
            return
        step, kept = trainer.global_step, ""
        if trainer.is_global_zero and trainer.logger is not None:
            path = Path(str(trainer.logger.log_dir)) / f"nonfinite_step_{step}.safetensors"
            codes = {f"codes_{number}": one["codes"].cpu() for number, one in enumerate(batches)}
            write_bytes(path, save(codes))
            kept = f" The batch is in {path}."
        raise UserError(
            f"step {step}: {found}. No weight has been changed by it.{kept} Use smaller learning "
            "rates (model.optim.lr_*), or finite.skip_at_most to leave a few such updates out"
        )


def _losses_are_finite(module: Any, batches: list[dict[str, Any]]) -> bool:
    return all(value.isfinite() for batch in batches for value in _losses(module, batch).values())


@torch.no_grad()
def _losses(module: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    _, text, audio = read_clips(module.lm, batch["codes"], module.loss_config, batch.get("heard"))
    return {"text": text, "audio": audio}


def _finding(module: Any, batches: list[dict[str, Any]], gradients: dict[str, Tensor]) -> str:
    """Where it is not finite: of the losses, of the layers, and of the recordings."""
    for batch in batches:
        with _layers_not_finite(module.lm.transformer) as layers:
            losses = _losses(module, batch)
        streams = [name for name, loss in losses.items() if not loss.isfinite()]
        if streams:
            where = f", first in layer {layers[0]}" if layers else ""
            starts = zip(batch["recording"], batch["start_step"].tolist(), strict=True)
            clips = ", ".join(f"{name} from step {start}" for name, start in starts)
            return f"the {' and '.join(streams)} loss is not finite{where}, on {clips}"
    name = next(name for name, one in gradients.items() if not one.isfinite().all())
    names = sorted({name for batch in batches for name in batch["recording"]})
    return f"the gradient of {name} is not finite, on clips of {', '.join(names)}"


@contextmanager
def _layers_not_finite(transformer: nn.Module) -> Iterator[list[int]]:
    """Indices of the layers whose output is not finite, in the order of computing."""
    found: list[int] = []

    def look(index: int) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            if not output.isfinite().all():
                found.append(index)

        return hook

    layers: Any = transformer.layers
    handles = [layer.register_forward_hook(look(index)) for index, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

"""Fine-tune: `python train/fit.py --config long60s.yaml [--config more.yaml] [--key value]`.

Every field is explained by `--help`; `--print_config` prints the resolved configuration.
"""

from __future__ import annotations

import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.long_generation import LongGeneration
from moshi_ttt.errors import UserError, run_program, settings_at
from train.checkpoints import CheckpointWithWeights, RunCheckpoints
from train.data import ConversationData
from train.module import MoshiTTT
from train.recipes import resolve_configs

# the docstring under each config field is its help text
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class FitCLI(LightningCLI):
    """LightningCLI with one run folder, the long generation, and checkpoints that travel."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that lets a config name the recipe it builds on."""
        return super().init_parser(parser_mode="recipe", **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to a run and not to model, data or trainer."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/run",
            help="Folder of the runs; each new run gets the next numbered folder in it.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Resume: `last` (newest run in run_dir that has a checkpoint) or a .ckpt file.",
        )
        parser.add_lightning_class_args(LongGeneration, "long_generation")
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.link_arguments("model.source", "data.source")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with `--config NAME` found in `configs/`."""
        self.config = parser.parse_args(resolve_configs(sys.argv[1:] if args is None else args))

    def before_instantiate_classes(self) -> None:
        """Check the configs, and decide the run folder: a new one, or that of the checkpoint."""
        for place, config in nested_configs().items():
            # jsonargparse would name their fields alone
            with settings_at(place):
                config(**vars(self.config[place]))
        root, resume = Path(self.config.run_dir), self.config.ckpt_path
        self.ckpt_path = find_checkpoint(root, resume)
        if self.ckpt_path is not None:
            self.run_folder = self.ckpt_path.parent.parent
        else:
            self.run_folder = next_run_folder(root)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give the trainer its folder, logger, checkpoint files and sampler rule."""
        trainer = self.config.trainer
        decided = {"logger": None, "plugins": None, "use_distributed_sampler": True}
        for key, default in decided.items():
            if trainer[key] != default:
                raise UserError(
                    f"trainer.{key}={trainer[key]} is decided by train/fit.py; leave it out"
                )
        return super().instantiate_trainer(
            logger=TensorBoardLogger(self.run_folder, name="", version="", default_hp_metric=False),
            plugins=[CheckpointWithWeights(self.model, self.datamodule)],
            # the data module's own sampler is distributed, and resumes within an epoch
            use_distributed_sampler=False,
            **kwargs,
        )


def nested_configs() -> dict[str, type]:
    """The dataclasses among the settings, by their keys."""
    holders: dict[str, type] = {"model": MoshiTTT, "long_generation": LongGeneration}
    return {
        f"{place}.{name}": hint
        for place, holder in holders.items()
        for name, hint in get_type_hints(holder.__init__).items()  # type: ignore[misc]
        if is_dataclass(hint) and isinstance(hint, type)
    }


def next_run_folder(root: Path) -> Path:
    """The first unused `root/000`, `root/001`, ...; nothing is ever overwritten."""
    taken = [int(path.name) for path in root.glob("[0-9][0-9][0-9]") if path.is_dir()]
    return root / f"{max(taken, default=-1) + 1:03d}"


def find_checkpoint(root: Path, resume: str | None) -> Path | None:
    """The checkpoint file that `--ckpt_path` means.

    Raises:
        UserError: there is none.
    """
    if resume is None:
        return None
    if resume == "last":
        found = sorted(root.glob("[0-9][0-9][0-9]/checkpoints/last.ckpt"))
        if not found:
            raise UserError(
                f"--ckpt_path last: no {root}/NNN/checkpoints/last.ckpt; start without it, or set "
                "--run_dir to the folder of the run to resume"
            )
        return found[-1]
    if not Path(resume).is_file():
        raise UserError(f"--ckpt_path {resume} does not exist; give a .ckpt file or `last`")
    return Path(resume)


def multiply_fast(trainer: Trainer) -> None:
    """In mixed precision let a GPU multiply in TF32 what stays fp32, such as a memory's own maths.

    Products lose digits that bf16 has lost around them; sums and states stay fp32.
    """
    if torch.cuda.is_available() and trainer.precision.endswith("-mixed"):
        torch.set_float32_matmul_precision("high")


def main(args: list[str] | None = None) -> Path:
    """Fit as the command line says.

    Returns:
        The run folder.
    """
    cli = FitCLI(
        MoshiTTT,
        ConversationData,
        args=args,
        run=False,
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": [LearningRateMonitor("step")]},
        save_config_kwargs={"overwrite": True},
    )
    cli.model.check()
    multiply_fast(cli.trainer)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path)
    lines = ["", f"run folder:  {cli.run_folder}"]
    if (best := cli.config_init.checkpoint).best_epoch:
        weights = cli.run_folder / "checkpoints" / "best.safetensors"
        lines.append(
            f"best:        {weights} (held-out loss {best.best_loss:.4f}, epoch {best.best_epoch})"
        )
    if (report := cli.run_folder / "report.html").exists():
        lines.append(f"report:      {report}")
    lines.append(f"TensorBoard: tensorboard --logdir {cli.run_folder}")
    if torch.cuda.is_available():
        lines.append(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU")
    cli.trainer.print("\n".join(lines))
    return cli.run_folder


if __name__ == "__main__":
    run_program(main)

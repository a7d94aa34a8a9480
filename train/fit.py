"""Fine-tune: `python train/fit.py --config long60s.yaml [--config more.yaml] [--key value]`.

Every field is explained by `--help`; `--print_config` prints the resolved configuration.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from callbacks.long_generation import LongGeneration
from callbacks.progress import ProgressLines
from callbacks.tensorboard import log_settings
from moshi_ttt.command_line import LOG_LEVEL_HELP, USAGE, LogLevel, log_from, underscored
from moshi_ttt.errors import UserError, run_program, settings_at
from moshi_ttt.evaluation.folder import find_evaluations
from moshi_ttt.files import claim_folder, next_folder
from moshi_ttt.progress import is_seen
from moshi_ttt.report import headline
from train.checkpoints import CheckpointWithWeights, RunCheckpoints, SaveBeforeEvaluation
from train.data import ConversationData
from train.finite import FiniteUpdates
from train.module import MoshiTTT
from train.pace import Pace
from train.recipes import CONFIGS, resolve_configs
from train.resume import check_is_ours
from train.run_folder import BEST, LAST, find_checkpoint, folder_of, locked
from train.stopping import StopOnSignal, Stopped
from train.trainer_settings import check_trainer, trainer_errors
from train.windows import RandomWindows

# the docstring under each config field is its help text
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _is_of_trainer(group: Any) -> bool:
    return any(action.dest.startswith("trainer") for action in group._group_actions)


class FitCLI(LightningCLI):
    """LightningCLI with one run folder, the long generation, and checkpoints that travel."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that lets a config name the recipe it builds on."""
        return super().init_parser(
            **kwargs, parser_mode="recipe", allow_abbrev=False, usage=USAGE, description=__doc__
        )

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
            help="Resume: `last` (newest run in run_dir that has a checkpoint) or a .ckpt file. A "
            "run in run_dir goes on in its folder; from any other checkpoint a new run begins.",
        )
        parser.add_argument("--log_level", type=LogLevel, default="info", help=LOG_LEVEL_HELP)
        parser.add_lightning_class_args(LongGeneration, "long_generation")
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.add_lightning_class_args(FiniteUpdates, "finite")
        parser.add_lightning_class_args(RandomWindows, "windows")
        parser.link_arguments("model.source", "data.source")
        # what people look for is ours, and Lightning's trainer has many more
        parser._action_groups = sorted(parser._action_groups, key=_is_of_trainer)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with `--config NAME` found in `configs/`."""
        given = underscored(sys.argv[1:] if args is None else args)
        self.config = parser.parse_args(resolve_configs(given))
        log_from(self.config.log_level, "lightning.pytorch")

    def before_instantiate_classes(self) -> None:
        """Check the configs, and decide the run folder: a new one, or that of the checkpoint."""
        for place, config in nested_configs().items():
            # jsonargparse would name their fields alone
            with settings_at(place):
                config(**vars(self.config[place]))
        root = Path(self.config.run_dir)
        self.ckpt_path = find_checkpoint(root, self.config.ckpt_path)
        if self.ckpt_path is not None:
            check_is_ours(self.ckpt_path)
        resumed = folder_of(self.ckpt_path, root) if self.ckpt_path else None
        self.run_folder = resumed or next_folder(root)
        self._is_new = resumed is None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Give the trainer its checkpoint files, signals and sampler rule."""
        trainer = self.config.trainer
        check_trainer(trainer)
        # jsonargparse takes every number for a part of the whole, and Lightning 1.0 for all of it
        counts = {
            key: int(value)
            for key, value in trainer.items()
            if key.startswith(("limit_", "overfit_")) and value and value == int(value)
        }
        plugins: list[Any] = [CheckpointWithWeights(self.model, self.datamodule)]
        if SLURMEnvironment.detect():
            # it would save and requeue by itself, and resume from what it finds in the folder
            plugins.append(SLURMEnvironment(auto_requeue=False))
        lines = not is_seen() and trainer.enable_progress_bar is not False
        if lines:
            kwargs["enable_progress_bar"] = False
        with trainer_errors():
            made: Any = super().instantiate_trainer(
                logger=False,  # until the run folder is claimed
                plugins=plugins,
                default_root_dir=self.run_folder,
                # the data module's own sampler is distributed, and resumes within an epoch
                use_distributed_sampler=False,
                **(counts | kwargs),
            )
        made.callbacks += [ProgressLines()] * lines
        return made

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Claim the run folder, keep others from it in here, and let the trainer log into it.

        Raises:
            UserError: it cannot be made, or another process writes to it.
        """
        lock: AbstractContextManager[None] = nullcontext()
        if self.trainer.is_global_zero:  # the others write nothing
            if self._is_new:
                self.run_folder = claim_folder(Path(self.config.run_dir), "run_dir")
            lock = locked(self.run_folder)
        with lock:
            if self.ckpt_path is not None:
                self.trainer.print(f"resuming from {self.ckpt_path}, writing to {self.run_folder}")
            self.trainer.logger = TensorBoardLogger(
                self.run_folder, name="", version="", default_hp_metric=False
            )
            yield


class SaveConfigLate(SaveConfigCallback):
    """Writes the config only when the run has begun: one that is refused leaves that of its run.

    What is resumed from is no part of it.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Not yet."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Now."""
        self.config.ckpt_path = None
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Lightning's hook for other places: TensorBoard shows the settings too."""
        logger: Any = trainer.logger
        text = Path(logger.log_dir, self.config_filename).read_text(encoding="utf-8")
        log_settings(logger.experiment, text, vars(self.config.as_flat()))


def nested_configs() -> dict[str, type]:
    """The dataclasses among the settings, by their keys."""
    holders: dict[str, type] = {"model": MoshiTTT, "long_generation": LongGeneration}
    return {
        f"{place}.{name}": hint
        for place, holder in holders.items()
        for name, hint in get_type_hints(holder.__init__).items()  # type: ignore[misc]
        if is_dataclass(hint) and isinstance(hint, type)
    }


def without_tips() -> None:
    """Lightning's messages, but none about products."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_no_tip)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip: " not in record.getMessage()


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

    Raises:
        UserError: no recipe is given, or something in it cannot be used.
    """
    without_tips()
    cli = FitCLI(
        MoshiTTT,
        ConversationData,
        args=args,
        run=False,
        auto_configure_optimizers=False,
        trainer_defaults={
            "callbacks": [LearningRateMonitor("step"), Pace()],
            "enable_model_summary": False,  # the module says by itself how much trains
        },
        save_config_callback=SaveConfigLate,
        save_config_kwargs={"overwrite": True},
    )
    if not cli.config.get("config"):
        raise UserError(
            "nothing says what to train; give a recipe: python train/fit.py --config long60s.yaml "
            f"({CONFIGS} has others)"
        )
    cli.model.check()
    multiply_fast(cli.trainer)
    with cli.writing():
        _fit(cli)
    lines = ["", f"run folder:  {cli.run_folder}"]
    if (best := cli.config_init.checkpoint).best_epoch:
        weights = cli.run_folder / BEST
        lines.append(
            f"best:        {weights} (held-out loss {best.best_loss:.4f}, epoch {best.best_epoch})"
        )
    if (report := cli.run_folder / "report.html").exists():
        latest = find_evaluations(cli.run_folder)[-1]
        lines = ["", *headline(latest, latest.trace()), *lines, f"report:      {report}"]
    lines.append(f"TensorBoard: tensorboard --logdir {cli.run_folder.parent}")
    if torch.cuda.is_available():
        lines.append(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU")
    cli.trainer.print("\n".join(lines))
    return cli.run_folder


def _fit(cli: FitCLI) -> None:
    """Train to the end, or until a signal; then say how to go on, and exit as signals do."""
    signals = StopOnSignal()
    trainer: Any = cli.trainer
    trainer.callbacks[:0] = signals, SaveBeforeEvaluation()
    try:
        with signals.listening():
            trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path)
    except Stopped as stopped:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)  # the other processes may be waiting for this one
        last = cli.run_folder / LAST
        on = f"--ckpt_path {last} goes on" if last.is_file() else "nothing was trained yet"
        print(f"stopped by {stopped}: {on}", file=sys.stderr)
        sys.exit(stopped.status)


if __name__ == "__main__":
    run_program(main)

"""The rows of a study: what is trained for each, and how it is read and run."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer

from moshi_ttt.errors import UserError, check_fields, settings_at
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.model.build import WITH_MEMORY
from train.data import ConversationData
from train.finite import FiniteUpdates
from train.fit import multiply_fast
from train.module import MoshiTTT
from train.recipes import load_recipe, upon
from train.windows import RandomWindows

Made = TypeVar("Made")
Settings = dict[str, Any]
SAID_ONCE = ("seconds", "nll_window_sec", "nll_sec", "nll_recordings", "context_sec")
"""Of `LongRunConfig`: what a study says for all of its rows alike, or does not measure."""
SHARED = ("source", "manifest", "val_manifest", "cache_dir", "seed")
"""Of `ConversationData`: what all rows have in common; they differ in how it is cut into clips."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a study, as its YAML file has it."""

    name: str
    """Of its files; `NAME_seed1` differs from `NAME` in its seed alone."""
    seed: int = 0
    """Of what is drawn at random, and of the clips that it is trained on."""
    steps: int = 0
    """Optimizer steps it is trained for; 0: none."""
    weights: str | None = None
    """Another variant, whose settings and trained weights it has."""
    model: Settings = field(default_factory=dict)
    """What it changes of the recipe's `model`, or of that of the variant whose weights it has."""
    data: Settings = field(default_factory=dict)
    """How the recordings it is trained on are cut, where that is not the recipe's `data`."""
    windows: Settings = field(default_factory=dict)
    """Attention windows that are drawn for the batches of its training, as in train/fit.py."""
    inner_rate: float | None = None
    """Multiplies the write gates of its memory while it is measured; null: as it was trained."""
    run: Settings = field(default_factory=dict)
    """What it changes of the study's `run`: how it talks."""

    def __post_init__(self) -> None:
        check_fields(self, "seed", "steps", "inner_rate", least=0)


class Study:
    """A YAML file of a recipe and variants of it.

    Args:
        path: of the file.

    Raises:
        UserError: there is no such file, or it has a variant that cannot be.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"--study {path} does not exist; give a YAML file such as configs/study/*"
            )
        self.path = path
        self.recipe: Settings = load_recipe(path.read_text(encoding="utf-8"), path)
        self.rows: dict[str, Settings] = {}
        """What the file says of each variant."""
        self.variants: dict[str, Variant] = {}
        if not self.recipe.get("variants"):
            raise UserError(f"{path} has no variants; list some, as configs/study/README.md says")
        for row in self.recipe["variants"]:
            one = made(Variant, row, f"{path}: variant {row.get('name', row)}")
            if one.name in self.rows:
                raise UserError(f"{self.place(one)} is there twice; give one another name")
            self.rows[one.name], self.variants[one.name] = row, one
        for one in self.variants.values():
            self._check_training(one)

    def _check_training(self, one: Variant) -> None:
        """Hold against each other what says how it is trained."""
        if one.weights is None:
            if not one.steps and (one.data or one.windows):
                raise UserError(
                    f"{self.place(one)} has data or windows to be trained with, and no steps; give "
                    "them, or leave those out"
                )
            return
        place = f"{self.place(one)}: weights={one.weights}"
        trained = [name for name, other in self.variants.items() if other.steps]
        if one.weights not in trained:
            raise UserError(
                f"{place} is no variant that is trained; those are {', '.join(trained) or 'none'}"
            )
        if one.steps or one.data or one.windows:
            raise UserError(
                f"{place} are trained already, as {one.weights} says; leave out steps, data and "
                "windows, or weights"
            )

    def chosen(self, only: Sequence[str] | None) -> list[Variant]:
        """All of them, or those that `--only` names.

        Raises:
            UserError: there is none of that name.
        """
        missing = set(only or ()) - self.variants.keys()
        if missing:
            raise UserError(
                f"--only {', '.join(sorted(missing))}: {self.path} has {', '.join(self.variants)}"
            )
        return [one for one in self.variants.values() if not only or one.name in only]

    def trained(self, one: Variant) -> Variant:
        """The variant whose training it comes from."""
        return one if one.weights is None else self.variants[one.weights]

    def check(self, one: Variant, model: Settings, run: Settings) -> None:
        """Find what cannot be built or run, before anything is trained.

        Args:
            one: the variant.
            model: settings of the study.
            run: how it lets models talk, without what is `SAID_ONCE`.
        """
        place = self.place(one)
        built = self.model(one, model)
        made(ConversationData, one.data, f"{place}.data", SHARED)
        with settings_at(place):
            built.check()
            RandomWindows(**one.windows)
        if one.inner_rate is not None and built.config.train not in WITH_MEMORY:
            raise UserError(
                f"{place}: inner_rate={one.inner_rate:g} needs a memory that learns; leave it out, "
                f"or set model.train to {', '.join(WITH_MEMORY)}"
            )
        self.run(one, run)

    def model(self, one: Variant, common: Settings, weights: Path | None = None) -> MoshiTTT:
        """The model of a variant, nothing loaded yet.

        Args:
            one: the variant.
            common: settings of the study.
            weights: file to start from instead of the one that the settings name.
        """
        if one.weights is not None:
            common = upon(common, self.variants[one.weights].model)
        settings = upon(common, one.model)
        if weights is not None:
            settings["init_from"] = str(weights)
        return made(MoshiTTT, settings, self.place(one))

    def run(self, one: Variant, common: Settings, **said: Any) -> LongRunConfig:
        """How a variant talks.

        Args:
            one: the variant.
            common: settings of the study.
            said: what is `SAID_ONCE`.
        """
        run = made(LongRunConfig, upon(common, one.run), f"{self.place(one)}.run", SAID_ONCE)
        return replace(run, **said)

    def place(self, one: Variant) -> str:
        """Where a variant stands, for messages."""
        return f"{self.path}: variant {one.name}"


def made(kind: type[Made], values: Settings, place: str, skip: Collection[str] = ()) -> Made:
    """Built as the command line builds it; what it does not know is an error that says where."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it", skip=set(skip))
    try:
        with settings_at(place):
            one: Made = parser.instantiate(parser.parse_object({"it": values})).it
    except ArgumentError as error:
        problem = str(error).replace("Group 'it'", "it")
        raise UserError(f"{place}: {problem}") from error
    return one


def fitted(
    model: MoshiTTT,
    data: ConversationData,
    steps: int,
    *,
    device: str,
    precision: str,
    callbacks: Sequence[Callback] = (),
) -> MoshiTTT:
    """Fit for a number of optimizer steps; with 0, only build."""
    trainer = Trainer(
        max_steps=max(steps, 1),
        accelerator=device,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[FiniteUpdates(), *callbacks],
    )
    multiply_fast(trainer)
    if steps:
        trainer.fit(model, data)
    else:
        model.check()
        trainer.datamodule = data  # type: ignore[attr-defined]
        model._trainer = trainer
        model.configure_model()
    return model.to(device)

"""A study at work: variants are trained unless they are, and measured; the cost is said first."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from moshi.models.lm import LMModel

from moshi_ttt.errors import UserError, check_bounds, settings_at
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.evaluate import evaluate
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.evaluation.free_answers import answer_freely
from moshi_ttt.evaluation.free_talk import talk_record
from moshi_ttt.files import write_json
from moshi_ttt.model.hybrid import hybrid_layers, set_inner_rate
from moshi_ttt.model.source import open_source
from moshi_ttt.model.weights import save_trained, trained_steps_of
from moshi_ttt.report.study import record_lines
from moshi_ttt.teacher_forcing.recordings import (
    TeacherForced,
    nothing_read,
    read_teacher_forced,
)
from train.costs import TRAINED_STEPS, Laps, reading_sec, talking_sec
from train.data import ConversationData
from train.module import MoshiTTT
from train.variants import Study, Variant, fitted
from train.windows import RandomWindows


class StudyRun:
    """Trains variants of a study, and measures them.

    Args:
        study: whose variants they are.
        options: the command line of scripts/study.py.

    Raises:
        UserError: no held-out recording lasts as long as is to be measured.
    """

    def __init__(self, study: Study, options: Any) -> None:
        check_bounds("--minutes", options.minutes, least=1)
        check_bounds("--recordings", options.recordings, least=1)
        check_bounds("--talk_minutes", options.talk_minutes, least=0)
        self.study, self.options, self.out = study, options, Path(options.out)
        self.clock = open_source(options.model.source).clock
        self.data = ConversationData(**vars(options.data), source=options.model.source)
        self.data.prepare_data()
        self.data.setup("fit")
        self.recordings = self.data.val_recordings()[: options.recordings]
        self._check_minutes()

    def _check_minutes(self) -> None:
        """Say whose loss is measured minute by minute, before anything is trained."""
        reached = [one.steps // self.clock.steps(60) for one in self.recordings]
        minutes = self.options.minutes
        count = sum(one >= minutes for one in reached)
        if not count:
            raise UserError(
                f"--minutes={minutes}: none of {len(reached)} held-out recordings lasts that "
                f"long; the longest has {max(reached)} whole minutes. Use less, or longer "
                "recordings"
            )
        print(
            f"loss by minute: of the {count} of {len(reached)} held-out recordings that last "
            f"{minutes} minutes"
        )

    def run(self, variants: Sequence[Variant]) -> None:
        """Say what they will take, then train and measure them.

        Raises:
            UserError: nothing would be measured of one of them.
        """
        for one in variants:
            chunk_sec = self._run_of(one).chunk_sec
            if chunk_sec is not None and not self.options.talk_minutes:
                raise UserError(
                    f"{self.study.place(one)}.run.chunk_sec={chunk_sec:g} with --talk_minutes=0: "
                    "it would do nothing, as reading knows no chunks; give --talk_minutes 2"
                )
        if variants:
            self._say_costs(variants)
        for one in variants:
            print(f"{one.name} ...", flush=True)
            trained_sec = self._train(one)
            if not self.options.train_only:
                found = self._measured(one, trained_sec)
                write_json(self.out / f"{one.name}.json", found)
                print(record_lines(one.name, found), flush=True)
            torch.cuda.empty_cache()

    def _say_costs(self, variants: Sequence[Variant]) -> None:
        print("measuring the pace of a few steps ...", flush=True)
        minutes, trains = {}, set()  # each training once, however many read its weights
        for one in variants:
            parts: dict[str, float] = {}
            trained = self.study.trained(one)
            if trained.steps and not self._times(one).exists() and trained.name not in trains:
                trains.add(trained.name)
                laps = Laps()
                self._fitted(trained, TRAINED_STEPS, laps)
                parts["training"] = laps.step_sec * trained.steps
            if not self.options.train_only:
                parts |= self._measuring_sec(one)
            minutes[one.name] = sum(parts.values()) / 60
            said = ", ".join(f"{what} {seconds / 60:.1f}" for what, seconds in parts.items())
            print(f"  {one.name}: {minutes[one.name]:.1f} min ({said or 'nothing to do'})")
        print(f"  together: about {sum(minutes.values()):.0f} min", flush=True)

    def _measuring_sec(self, one: Variant) -> dict[str, float]:
        model, run = self._fitted(one), self._run_of(one)
        parts = {}
        if run.chunk_sec is None:
            steps = self.options.minutes * self.clock.steps(60)
            parts["reading"] = reading_sec(model.lm, self.recordings, steps)
        if self.options.talk_minutes:
            parts["talking"] = talking_sec(model.lm, model.source, self.recordings, run)
        return parts

    def _weights(self, one: Variant) -> Path:
        """Where those that it comes from are kept."""
        folder = Path(self.options.trained or self.out) / "trained"
        return folder / f"{self.study.trained(one).name}.safetensors"

    def _times(self, one: Variant) -> Path:
        """Written after its weights."""
        return self._weights(one).with_suffix(".json")

    def _fitted(self, one: Variant, steps: int = 0, *callbacks: Callback) -> MoshiTTT:
        """Trained for some steps; with 0, built upon what was trained before, if anything was."""
        seed_everything(one.seed, verbose=False)
        kept = not steps and self.study.trained(one).steps and self._times(one).exists()
        model = self.study.model(
            one, self.options.model.as_dict(), self._weights(one) if kept else None
        )
        return fitted(
            model,
            self._clips(one),
            steps,
            device=self.options.device,
            precision=self.options.precision,
            callbacks=callbacks,
        )

    def _clips(self, one: Variant) -> ConversationData:
        """The recordings of all, cut and dealt out as it says."""
        data = copy(self.data)
        for key, value in self.study.trained(one).data.items():
            setattr(data, key, value)
        # a memory that starts from attention draws nothing at random: the clips must differ too
        data.seed += one.seed
        return data

    def _train(self, one: Variant) -> float:
        """Train what it comes from, unless that is trained; seconds of its own training."""
        trained, weights, times = self.study.trained(one), self._weights(one), self._times(one)
        if trained.steps and not times.exists():
            if self.options.trained:
                raise UserError(
                    f"--trained {self.options.trained}: {weights} was not trained there"
                )
            started_sec = time.monotonic()
            windows = RandomWindows(**trained.windows)
            model = self._fitted(trained, trained.steps, windows)
            clip_steps = self._clips(trained).clip_steps
            save_trained(weights, model.trained_weights(), model.config, clip_steps, model.source)
            write_json(times, {"trained_sec": time.monotonic() - started_sec})
        return float(json.loads(times.read_text())["trained_sec"]) if one.steps else 0.0

    def _run_of(self, one: Variant) -> LongRunConfig:
        run = self.study.run(one, self.options.run.as_dict())
        seconds = run.prompt_sec + 60 * self.options.talk_minutes
        return replace(run, seconds=seconds or None, nll_recordings=len(self.recordings))

    @torch.no_grad()
    def _measured(self, one: Variant, trained_sec: float) -> dict[str, Any]:
        """All that its record holds."""
        model, run, options = self._fitted(one), self._run_of(one), self.options
        lm, source = model.lm, model.source
        if one.inner_rate is not None:
            set_inner_rate(lm, one.inner_rate)
        read = self._read(lm, run)
        found = {
            "variant": self.study.rows[one.name],
            "trained_sec": trained_sec,
            "context_steps": lm.context,
            "context_sec": None if lm.context is None else self.clock.seconds(lm.context),
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "recall": read.recall or {},
            "nll": read.nll,
            "gates": {
                index: float(layer.branch.gate.tanh().square().mean().sqrt())
                for index, layer in hybrid_layers(lm).items()
            },
            "branch_ratios": read.branch_ratios,
        }
        if options.talk_minutes:
            folder, start = self.out / f"{one.name}_talk", model.init_from
            trained_steps = source.trained_steps if start is None else trained_steps_of(start)
            with settings_at(f"{self.study.place(one)}.run"):
                evaluate(
                    lm,
                    source,
                    self.recordings,
                    run,
                    folder,
                    label=one.name,
                    trained_steps=trained_steps,
                    read=read,
                )
            found["talk"] = talk_record(lm, source, Evaluation.load(folder))
        if options.free_answers:
            folder, count = self.out / f"{one.name}_answers", options.free_answers
            found["free_answers"] = answer_freely(
                lm, source, self.recordings, count, options.free_after, folder
            )
        return found

    def _read(self, lm: LMModel, run: LongRunConfig) -> TeacherForced:
        """What reading the recordings gives; nothing of a model that is run in chunks."""
        minute = self.clock.steps(60)
        if run.chunk_sec is not None:
            return nothing_read(minute)
        lm.eval()
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.device.type == "cuda"):
            return read_teacher_forced(lm, self.recordings, self.options.minutes * minute, minute)

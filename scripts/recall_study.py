"""What makes a memory remember: variants trained on the same clips, measured on the same questions.

    python scripts/recall_study.py --study configs/study/rules.yaml
    python scripts/recall_study.py --study configs/study/rules.yaml --out runs/final \
        --trained runs/recall_study --data.val_manifest build/final/manifest.jsonl

A study is a YAML file: a recipe (`model` and `data`, usually those of its `base`) and variants.
Each has a name, the optimizer steps it trains for (0: none) and what it changes of `model`. All of
one `seed` see the same clips in the same order. After each its recall is measured with the memory
kept, taken away before each question, and exchanged, and its loss minute by minute;
`OUT/NAME.json` holds the numbers, `OUT/trained/NAME.safetensors` the weights, `OUT/recall.png` and
`OUT/recall.md` show all of them beside one another, where `NAME_seed1` is another seed of `NAME`
(scripts/recall_figure.py draws a choice).
What is trained and what is measured is kept: started again, only what is missing runs. A machine
with a GPU may do the one (`--train_only`) and another machine the rest. With `--trained FOLDER`,
the weights of a study in that folder are measured, on other recordings. With `--free_answers N`
up to N questions are also answered freely: `OUT/NAME_answers/` holds what was said, and ten answers
to listen to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything

from moshi_ttt.command_line import add_device, parse, program_parser
from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError, check_bounds, run_program
from moshi_ttt.evaluation.folder import write_wav
from moshi_ttt.evaluation.free_answers import (
    After,
    answer_sound,
    answers_record,
    choose_questions,
    free_answers,
)
from moshi_ttt.files import write_bytes, write_json
from moshi_ttt.generation.users import silence_codes
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.source import open_source
from moshi_ttt.model.weights import save_trained
from moshi_ttt.report import png
from moshi_ttt.report.study import Record, read_record, record_lines, study_figure, variants_of
from moshi_ttt.report.study_table import study_table
from moshi_ttt.rows import Rows
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced
from train.data import ConversationData
from train.finite import FiniteUpdates
from train.fit import multiply_fast
from train.module import MoshiTTT
from train.recipes import load_recipe, upon

ANSWER_SEC = 5.0  # within which the value has to be said
LEAD_SEC = 10.0  # of the recording, to be heard before an answer
HEARD_ANSWERS = 10


def main(args: list[str] | None = None) -> dict[str, Record]:
    """Run what is missing of a study.

    Returns:
        What there is of its variants, by name.
    """
    study = Path(parse(_parser({}), args).study)
    recipe = _recipe(study)
    options = parse(_parser(recipe), args)
    out, variants = Path(options.out), recipe["variants"]
    chosen = _chosen(variants, options.only, study)
    finished = _records(out, variants)
    data = ConversationData(**vars(options.data), source=options.model.source)
    data.prepare_data()
    data.setup("fit")
    _check_minutes(options, data.val_recordings())
    for variant in chosen:
        name = variant["name"]
        if name not in finished:
            print(f"{name} ...", flush=True)
            found = _run(variant, data, options)
            if found:
                write_json(out / f"{name}.json", found)
                print(record_lines(name, found), flush=True)
    # once more: another process may have run others of them
    records = _records(out, variants)
    shown = variants_of([*records.values()])
    if records:
        write_bytes(out / "recall.md", study_table(shown).encode())
    if any(record["recall"] for record in records.values()):
        write_bytes(out / "recall.png", png(study_figure(shown)))
    return records


def _records(out: Path, variants: Sequence[Mapping[str, Any]]) -> dict[str, Record]:
    """What there is of each variant that is finished, by name."""
    paths = {variant["name"]: out / f"{variant['name']}.json" for variant in variants}
    return {name: read_record(path) for name, path in paths.items() if path.is_file()}


def _check_minutes(options: Any, recordings: Sequence[EncodedRecording]) -> None:
    """Say whose loss is measured minute by minute, before anything is trained."""
    check_bounds("--minutes", options.minutes, least=1)
    minute = open_source(options.model.source).clock.steps(60)
    reached = [one.steps // minute for one in recordings]
    count = sum(minutes >= options.minutes for minutes in reached)
    if not count:
        raise UserError(
            f"--minutes={options.minutes}: none of {len(reached)} held-out recordings lasts that "
            f"long; the longest has {max(reached)} whole minutes. Use less, or longer recordings"
        )
    print(
        f"loss by minute: of the {count} of {len(reached)} held-out recordings that last "
        f"{options.minutes} minutes"
    )


def _run(variant: Mapping[str, Any], data: ConversationData, options: Any) -> Record | None:
    """Train one variant unless it is trained, and measure it.

    Returns:
        Its record; None if it was only to be trained.
    """
    name, steps, seed = variant["name"], variant.get("steps", 0), variant.get("seed", 0)
    settings = upon(options.model.as_dict(), variant.get("model", {}))
    trained = Path(options.trained or options.out) / "trained" / name
    times, weights = Path(f"{trained}.json"), Path(f"{trained}.safetensors")
    seed_everything(seed, verbose=False)
    # a memory that starts from attention draws nothing at random: the clips must differ too
    data.seed = options.data.seed + seed
    if steps and not times.exists():
        if options.trained:
            raise UserError(f"--trained {options.trained}: {weights} was not trained there")
        started_sec = time.monotonic()
        model = _built(_model(settings), data, steps, options)
        save_trained(weights, model.trained_weights(), model.config, data.clip_steps, model.source)
        write_json(times, {"trained_sec": time.monotonic() - started_sec})
        del model
        torch.cuda.empty_cache()
    if options.train_only:
        return None
    if steps:
        settings["init_from"] = str(weights)
    model = _built(_model(settings), data, 0, options)
    recordings = data.val_recordings()
    trained_sec = json.loads(times.read_text())["trained_sec"] if steps else 0.0
    measured = _measured(model, recordings, options.minutes)
    found = {"variant": variant, "trained_sec": trained_sec, **measured}
    if options.free_answers:
        folder = Path(options.out) / f"{name}_answers"
        found["free_answers"] = _answered(model, recordings, options, folder)
    del model
    torch.cuda.empty_cache()
    return found


def _built(model: MoshiTTT, data: ConversationData, steps: int, options: Any) -> MoshiTTT:
    """Fit for a number of optimizer steps; with 0, only build."""
    trainer = Trainer(
        max_steps=max(steps, 1),
        accelerator=options.device,
        devices=1,
        precision=options.precision,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[FiniteUpdates()],
    )
    multiply_fast(trainer)
    if steps:
        trainer.fit(model, data)
    else:
        model.check()
        trainer.datamodule = data  # type: ignore[attr-defined]
        model._trainer = trainer
        model.configure_model()
    return model.to(options.device)


@torch.no_grad()
def _measured(model: MoshiTTT, recordings: list[EncodedRecording], minutes: int) -> dict[str, Any]:
    lm, clock = model.lm.eval(), model.source.clock
    minute = clock.steps(60)
    with torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.device.type == "cuda"):
        read = read_teacher_forced(lm, recordings, minutes * minute, minute)
    gates = {
        index: float(layer.branch.gate.tanh().square().mean().sqrt())
        for index, layer in hybrid_layers(lm).items()
    }
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "context_steps": lm.context,
        "context_sec": None if lm.context is None else clock.seconds(lm.context),
        "parameters": trained,
        "recall": read.recall or {},
        "nll": read.nll,
        "gates": gates,
        "branch_ratios": read.branch_ratios,
    }


def _answered(
    model: MoshiTTT, recordings: list[EncodedRecording], options: Any, folder: Path
) -> dict[str, Any]:
    """Shares of questions that are answered freely, by memory, group and gap."""
    lm, source = model.lm, model.source
    codec, clock, rows = source.codec(lm.device), source.clock, Rows.of(model.lm)
    silence = silence_codes(codec, clock, rows.user_codebooks).cpu()
    questions = choose_questions(recordings, options.free_answers)
    shares: dict[str, Any] = {}
    memories: tuple[Literal["kept", "reset"], ...] = ("kept", "reset")
    for memory in memories if hybrid_layers(lm) else memories[:1]:
        answers = free_answers(
            lm,
            source.tokenizer(),
            questions,
            silence,
            answer_steps=clock.steps(ANSWER_SEC),
            memory=memory,
            after=options.free_after,
        )
        shares[memory] = answers_record(answers)
        write_json(folder / f"{memory}.json", {"answers": [one.record() for one in answers]})
        if memory == "kept" and lm.card <= codec.cardinality:
            for number, one in enumerate(answers[:HEARD_ANSWERS]):
                wav = answer_sound(codec, one, rows, clock.steps(LEAD_SEC))
                write_wav(folder / f"{number:02d}_{one.name}.wav", wav, clock.sample_rate)
    return shares


def _model(settings: dict[str, Any]) -> MoshiTTT:
    """Built as the command line builds it; unknown keys are errors."""
    parser = ArgumentParser()
    parser.add_class_arguments(MoshiTTT, "model")
    model: MoshiTTT = parser.instantiate(parser.parse_object({"model": settings})).model
    return model


def _recipe(study: Path) -> dict[str, Any]:
    """What the file and its base say."""
    if not study.is_file():
        raise UserError(f"--study {study} does not exist; give a YAML file such as configs/study/*")
    recipe: dict[str, Any] = load_recipe(study.read_text(encoding="utf-8"), study)
    return recipe


def _chosen(
    variants: Sequence[dict[str, Any]], only: Sequence[str] | None, study: Path
) -> list[dict[str, Any]]:
    names = [variant["name"] for variant in variants]
    missing = set(only or []) - set(names)
    if missing:
        raise UserError(f"--only {', '.join(sorted(missing))}: {study} has {', '.join(names)}")
    return [variant for variant in variants if not only or variant["name"] in only]


def _parser(recipe: Mapping[str, Any]) -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--study", type=str, required=True, help="YAML file of variants.")
    add("--only", type=str, nargs="+", help="Names of the variants to run.")
    add("--out", type=str, default="runs/recall_study", help="Folder to write.")
    add("--trained", type=str, help="Folder of a finished study, to be measured again.")
    add("--train_only", action="store_true", help="Measure nothing: another call does.")
    add("--free_answers", type=int, default=0, help="Questions to be answered freely.")
    add(
        "--free_after",
        type=After,
        default="question",
        help="What is forced last: the `question`, or Moshi's own naming of the `key` it is about.",
    )
    add(
        "--minutes",
        type=int,
        default=5,
        help="Minutes of loss to measure, of the held-out recordings that last so long.",
    )
    add(
        "--precision", type=str, default="bf16-mixed", help="Of the training, as Lightning says it."
    )
    add_device(parser)
    parser.add_class_arguments(MoshiTTT, "model")
    parser.add_class_arguments(ConversationData, "data", skip={"source"})
    parser.set_defaults({key: recipe[key] for key in ("model", "data") if key in recipe})
    return parser


if __name__ == "__main__":
    run_program(main)

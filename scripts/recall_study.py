"""What makes a memory remember: variants trained on the same clips, measured on the same questions.

    python scripts/recall_study.py --study configs/study/rules.yaml --model.source build/tiny \
        --data.manifest build/far/with_text.jsonl --data.val_manifest build/heldout/manifest.jsonl

A study is a YAML file of variants: each has a name, the optimizer steps it trains for (0: none) and
what it changes of `model`. All of them see the same clips in the same order. After each one its
recall is measured with the memory kept, taken away before each question, and exchanged, and its
loss minute by minute; `OUT/NAME.json` holds the numbers, `OUT/NAME.safetensors` the weights.
Finished variants are kept: started again, only what is missing runs. With `--free_answers N`
up to N questions are also answered freely: `OUT/NAME_answers/` holds what was said, and ten answers
to listen to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer, seed_everything

from moshi_ttt.command_line import add_device, parse, program_parser
from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError, run_program
from moshi_ttt.evaluation.folder import write_wav
from moshi_ttt.evaluation.free_answers import (
    answer_sound,
    answers_record,
    choose_questions,
    free_answers,
)
from moshi_ttt.files import write_json
from moshi_ttt.generation.users import silence_codes
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.weights import save_trained
from moshi_ttt.rows import GROUPS, Rows
from moshi_ttt.teacher_forcing.recordings import read_teacher_forced
from train.data import ConversationData
from train.fit import multiply_fast
from train.module import MoshiTTT
from train.recipes import upon

ANSWER_SEC = 5.0  # within which the value has to be said
LEAD_SEC = 10.0  # of the recording, to be heard before an answer
HEARD_ANSWERS = 10


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing of a study.

    Returns:
        Results by variant.
    """
    parser = _parser()
    options = parse(parser, args)
    out = Path(options.out)
    variants = _variants(Path(options.study), options.only)
    data = ConversationData(**vars(options.data), source=options.model.source)
    results: dict[str, Any] = {}
    for variant in variants:
        record = out / f"{variant['name']}.json"
        if record.is_file():
            results[variant["name"]] = json.loads(record.read_text())
            continue
        print(f"{variant['name']} ...", flush=True)
        seed_everything(variant.get("seed", 0), verbose=False)
        chosen = upon(options.model.as_dict(), variant.get("model", {}))
        model = _model(chosen)
        started_sec = time.monotonic()
        steps = variant.get("steps", 0)
        model = _trained(model, data, steps, options)
        trained_sec = time.monotonic() - started_sec
        results[variant["name"]] = found = {
            "variant": variant,
            "trained_sec": trained_sec,
            **_measured(model, data.val_recordings(), options.minutes),
        }
        if options.free_answers:
            folder = out / f"{variant['name']}_answers"
            found["free_answers"] = _answered(
                model, data.val_recordings(), options.free_answers, folder
            )
        if steps:
            path = record.with_suffix(".safetensors")
            weights = model.trained_weights()
            save_trained(path, weights, model.config, data.clip_steps, model.source)
        write_json(record, found)
        print(_line(variant["name"], found), flush=True)
        del model
        torch.cuda.empty_cache()
    return results


def _trained(model: MoshiTTT, data: ConversationData, steps: int, options: Any) -> MoshiTTT:
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
    )
    multiply_fast(trainer)
    if steps:
        trainer.fit(model, data)
    else:
        data.prepare_data()
        data.setup("fit")
        model.check()
        trainer.datamodule = data  # type: ignore[attr-defined]
        model._trainer = trainer
        model.configure_model()
    return model.to(options.device)


@torch.no_grad()
def _measured(model: MoshiTTT, recordings: list[EncodedRecording], minutes: int) -> dict[str, Any]:
    lm = model.lm.eval()
    minute = model.source.clock.steps(60)
    with torch.autocast(lm.device.type, torch.bfloat16, enabled=lm.device.type == "cuda"):
        read = read_teacher_forced(lm, recordings, minutes * minute, minute)
    gates = {
        index: float(layer.branch.gate.tanh().square().mean().sqrt())
        for index, layer in hybrid_layers(lm).items()
    }
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"recall": read.recall or {}, "nll": read.nll, "gates": gates, "parameters": trained}


def _answered(
    model: MoshiTTT, recordings: list[EncodedRecording], count: int, folder: Path
) -> dict[str, Any]:
    """Shares of questions that are answered freely, by memory, group and gap."""
    lm, source = model.lm, model.source
    codec, clock, rows = source.codec(lm.device), source.clock, Rows.of(model.lm)
    silence = silence_codes(codec, clock, rows.user_codebooks).cpu()
    questions = choose_questions(recordings, count)
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
        )
        shares[memory] = answers_record(answers)
        write_json(folder / f"{memory}.json", {"answers": [one.record() for one in answers]})
        if memory == "kept" and lm.card <= codec.cardinality:
            for number, one in enumerate(answers[:HEARD_ANSWERS]):
                wav = answer_sound(codec, one, rows, clock.steps(LEAD_SEC))
                write_wav(folder / f"{number:02d}_{one.name}.wav", wav, clock.sample_rate)
    return shares


def _line(name: str, found: Mapping[str, Any]) -> str:
    """What came of one variant, on a few lines."""
    lines = [f"{name}: {found['trained_sec']:.0f} s, {found['parameters']:,} trained"]
    for memory, recall in found["recall"].items():
        for group, bins in recall.items():
            shares = "  ".join(
                f"{gap:g}s {share:.0%}/{words:.0f}"
                for gap, share, words in zip(
                    bins["gap_sec"], bins["accuracy"], bins["words"], strict=True
                )
            )
            lines.append(f"  {memory:6} {group:13} {shares}")
    for memory, recall in found.get("free_answers", {}).items():
        for group, bins in recall.items():
            shares = "  ".join(
                f"{gap:g}s {share:.0%}/{count}"
                for gap, share, count in zip(
                    bins["gap_sec"], bins["right"], bins["questions"], strict=True
                )
            )
            lines.append(f"  said, {memory:6} {group:13} {shares}")
    for group in GROUPS:
        values = " ".join(f"{value:.3f}" for value in found["nll"][group])
        lines.append(f"  nll {group:16} {values}")
    lines.append("  gates " + " ".join(f"{gate:.2f}" for gate in found["gates"].values()))
    return "\n".join(lines)


def _model(settings: dict[str, Any]) -> MoshiTTT:
    """Built as the command line builds it; unknown keys are errors."""
    parser = ArgumentParser()
    parser.add_class_arguments(MoshiTTT, "model")
    model: MoshiTTT = parser.instantiate(parser.parse_object({"model": settings})).model
    return model


def _variants(study: Path, only: list[str] | None) -> list[dict[str, Any]]:
    if not study.is_file():
        raise UserError(f"--study {study} does not exist; give a YAML file such as configs/study/*")
    variants: list[dict[str, Any]] = yaml.safe_load(study.read_text())["variants"]
    names = [variant["name"] for variant in variants]
    missing = set(only or []) - set(names)
    if missing:
        raise UserError(f"--only {', '.join(sorted(missing))}: {study} has {', '.join(names)}")
    return [variant for variant in variants if not only or variant["name"] in only]


def _parser() -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--study", type=str, required=True, help="YAML file of variants.")
    add("--only", type=list[str] | None, help="Names of the variants to run.")
    add("--out", type=str, default="runs/recall_study", help="Folder to write.")
    add("--free_answers", type=int, default=0, help="Questions to be answered freely.")
    add("--minutes", type=int, default=5, help="Minutes of loss to measure.")
    add(
        "--precision", type=str, default="bf16-mixed", help="Of the training, as Lightning says it."
    )
    add_device(parser)
    parser.add_class_arguments(MoshiTTT, "model")
    parser.add_class_arguments(ConversationData, "data", skip={"source"})
    return parser


if __name__ == "__main__":
    run_program(main)

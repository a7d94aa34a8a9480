"""What makes a memory remember, and a model last: variants beside one another.

    python scripts/study.py --study configs/study/mitigations_small.yaml    # 20 minutes on 2 cores
    python scripts/study.py --study configs/study/rules.yaml
    python scripts/study.py --study configs/study/rules.yaml --out runs/final \
        --trained runs/study --data.val_manifest build/final/manifest.jsonl

A study is a YAML file: a recipe (`model`, `data`, `run`, usually those of its `base`) and variants.
Each has a name and what it changes: of `model` and `data`, trained for `steps` (0: not at all); or,
with the `weights` of another variant, of how that one is read (`model`, `inner_rate`) and how it
talks (`run`). All of one `seed` see the same clips in the same order. After each its recall is
measured with the memory kept, taken away before each question, and exchanged; its loss minute by
minute; and, with `--talk_minutes`, what it says freely. Reading knows no chunks: a variant that is
run in chunks only talks.

`OUT/NAME.json` holds the numbers, `OUT/trained/NAME.safetensors` the weights, `OUT/NAME_talk/` the
evaluation of what was said, with its sound. `OUT/study.md`, `OUT/study.png` and `OUT/recall.png`
show all variants beside one another, where `NAME_seed1` is another seed of `NAME`
(scripts/recall_figure.py draws a choice).
What it will take is said first. What is trained and what is measured is kept: started again, only
what is missing runs. A machine with a GPU may do the one (`--train_only`) and another machine the
rest. With `--trained FOLDER`, the weights of a study in that folder are measured, on other
recordings. With `--free_answers N` up to N questions are also answered freely: `OUT/NAME_answers/`
holds what was said, and ten answers to listen to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from moshi_ttt.command_line import add_device, parse, program_parser
from moshi_ttt.errors import run_program
from moshi_ttt.evaluation.config import LongRunConfig
from moshi_ttt.evaluation.free_answers import After
from moshi_ttt.files import write_bytes
from moshi_ttt.report import png
from moshi_ttt.report.drift import drift_figure
from moshi_ttt.report.study import Record, read_record, study_figure, variants_of
from moshi_ttt.report.study_table import study_table
from train.data import ConversationData
from train.module import MoshiTTT
from train.study import StudyRun
from train.variants import SAID_ONCE, Study

OF_FILE = ("model", "data", "run", "minutes", "recordings", "talk_minutes")
"""Settings that a study's file may hold beside its variants; the command line goes before it."""


def main(args: list[str] | None = None) -> dict[str, Record]:
    """Run what is missing of a study.

    Returns:
        What there is of its variants, by name.
    """
    study = Study(Path(parse(_parser({}), args).study))
    options = parse(_parser(study.recipe), args)
    chosen = study.chosen(options.only)
    for one in chosen:
        study.check(one, options.model.as_dict(), options.run.as_dict())
    out = Path(options.out)
    StudyRun(study, options).run([one for one in chosen if one.name not in _records(out, study)])
    # once more: another process may have run others of them
    records = _records(out, study)
    shown = variants_of([*records.values()])
    if records:
        write_bytes(out / "study.md", study_table(shown).encode())
        write_bytes(out / "study.png", png(drift_figure(shown)))
    if any(record["recall"] for record in records.values()):
        write_bytes(out / "recall.png", png(study_figure(shown)))
    return records


def _records(out: Path, study: Study) -> dict[str, Record]:
    """What there is of each variant that is finished, by name."""
    paths = {name: out / f"{name}.json" for name in study.variants}
    return {name: read_record(path) for name, path in paths.items() if path.is_file()}


def _parser(recipe: Mapping[str, Any]) -> ArgumentParser:
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("--study", type=str, required=True, help="YAML file of variants.")
    add("--only", type=str, nargs="+", help="Names of the variants to run.")
    add("--out", type=str, default="runs/study", help="Folder to write.")
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
    add("--recordings", type=int, help="Held-out recordings to read, the first ones; null: all.")
    add(
        "--talk_minutes",
        type=float,
        default=0.0,
        help="Minutes to talk freely after the prompt; whole ones are listened to. 0: not at all.",
    )
    add(
        "--precision", type=str, default="bf16-mixed", help="Of the training, as Lightning says it."
    )
    add_device(parser)
    parser.add_class_arguments(MoshiTTT, "model")
    parser.add_class_arguments(ConversationData, "data", skip={"source"})
    parser.add_class_arguments(LongRunConfig, "run", skip=set(SAID_ONCE))
    parser.set_defaults({key: recipe[key] for key in OF_FILE if key in recipe})
    return parser


if __name__ == "__main__":
    run_program(main)

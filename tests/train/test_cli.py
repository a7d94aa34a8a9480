"""The command line of a training: configs, mistakes and help."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar

from callbacks.progress import ProgressLines
from moshi_ttt.errors import UserError, run_program
from train.data import ConversationData
from train.fit import FitCLI, main
from train.module import MoshiTTT, OptimConfig
from train.recipes import CONFIGS


def parse(*args: str) -> FitCLI:
    return FitCLI(MoshiTTT, ConversationData, args=list(args), run=False, save_config_callback=None)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.fit.is_seen", lambda: terminal)
    call = ("--config=long15s.yaml", "--trainer.accelerator=cpu")
    bars = {
        name: [type(one) for one in parse(*call, *more).trainer.callbacks]
        for name, more in (("usual", ()), ("quiet", ("--trainer.enable_progress_bar=false",)))
    }
    assert (TQDMProgressBar in bars["usual"]) == terminal
    assert (ProgressLines in bars["usual"]) == (not terminal)
    assert not {TQDMProgressBar, ProgressLines} & {*bars["quiet"]}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("long*.yaml")))
@pytest.mark.parametrize(
    "overlays", [[], ["moshiko.yaml"], ["moshiko.yaml", "moshi7b_random.yaml"]]
)
def test_every_shipped_config_loads_alone_and_with_its_overlays(
    name: str, overlays: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [part for config in [name, *overlays] for part in ("--config", config)]
    cli = parse(*args, "--trainer.accelerator=cpu")
    scratch = name.endswith("_scratch.yaml")
    assert f"long{cli.datamodule.duration_sec:g}s{'_scratch' * scratch}.yaml" == name
    assert cli.model.init_from == (None if scratch or overlays else "tiny")
    assert cli.run_folder == Path(f"runs/{name.removesuffix('.yaml')}/000")
    expected = {0: "tiny", 1: "kyutai/moshiko-pytorch-bf16", 2: "moshi7b-random"}[len(overlays)]
    assert cli.model.config.source == cli.datamodule.source == expected
    assert not list(tmp_path.iterdir()), "looking at a config must not write anything"


@pytest.mark.parametrize("before", [[], ["moshiko.yaml"]])
def test_every_shipped_mitigation_loads_upon_a_recipe_and_changes_it(
    before: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = resolved("long60s.yaml", *before)
    names = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("mitigations/*.yaml"))
    assert "mitigations/sinks.yaml" in names
    for name in names:
        assert resolved("long60s.yaml", *before, name) != plain, name


def test_shipped_overlays_are_all_tried() -> None:
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert names - {n for n in names if n.startswith("long")} == {
        "base.yaml",
        "moshiko.yaml",
        "moshi7b_random.yaml",
        "tiny_base.yaml",
        "tiny_memory.yaml",
    }


WHOLE = """
run_dir: runs/long{0}s
seed_everything: 0
model:
  source: tiny
  context_steps: 188
  init_from: tiny
  train: memory
  memory:
    gate_init: 0.1
  loss:
    text_padding_weight: 0.1
    audio_weight: 0.1
    audio_every: 8
    first_codebook_weight: 8
    magnitude_reg: 0
  optim:
    lr_memory: 1.0e-4
    lr_gates: 1.0e-3
data:
  duration_sec: {0}
  batch_size: 2
  carry: true
trainer:
  max_epochs: 2
  limit_val_batches: 20
  precision: 32-true
  gradient_clip_val: 1.0
  log_every_n_steps: 1
long_generation:
  every_n_epochs: 1
  run:
    seconds: 72
    nll_sec: 180
    nll_recordings: 8
"""


def resolved(*configs: str | Path) -> dict[str, Any]:
    args = [part for config in configs for part in ("--config", str(config))]
    cli = parse(*args, "--trainer.accelerator=cpu")
    return yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))


@pytest.mark.parametrize("duration_sec", [15, 30, 60, 120])
def test_a_recipe_upon_its_base_is_the_whole_recipe(duration_sec: int, tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(WHOLE.format(duration_sec))
    shipped = f"long{duration_sec}s.yaml"
    whole = resolved(tmp_path / "whole.yaml")
    assert whole["data"]["duration_sec"] == duration_sec
    assert resolved(shipped) == whole
    assert resolved(shipped, "moshiko.yaml") == resolved(tmp_path / "whole.yaml", "moshiko.yaml")


def test_a_recipe_of_ones_own_builds_on_what_is_beside_it_or_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    mine = tmp_path / "deep/mine.yaml"
    mine.write_text("base: long30s.yaml\nmodel:\n  memory: {layers: [1, 3]}\n")
    found = resolved("deep/mine.yaml")
    assert found["model"]["memory"] == resolved("long30s.yaml")["model"]["memory"] | {
        "layers": [1, 3]
    }
    assert found["data"]["duration_sec"] == 30
    assert "base" not in found
    (tmp_path / "deep/long30s.yaml").write_text("base: base.yaml\ndata: {duration_sec: 45}\n")
    assert resolved("deep/mine.yaml")["data"]["duration_sec"] == 45
    assert resolved("deep/mine.yaml")["data"]["batch_size"] == 2
    mine.write_text("base: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"base=nowhere\.yaml of .*mine\.yaml"):
        resolved("deep/mine.yaml")


@pytest.mark.parametrize(
    ("recipe", "train", "clip_sec"), [("tiny_base", "base", 20), ("tiny_memory", "memory", 120)]
)
def test_the_recipes_of_the_bundle_train_moshi_alone_and_then_a_memory_alone(
    recipe: str, train: str, clip_sec: float
) -> None:
    # what they name is built by scripts/bundle/tiny_bundle.sh: stand in what was shipped of it
    cli = parse(
        f"--config={recipe}.yaml",
        "--model.source=tiny",
        "--data.manifest=assets/conversations/train/manifest.jsonl",
        "--data.val_manifest=assets/conversations/heldout/manifest.jsonl",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.max_steps=1",  # how long is said by the script too
    )
    assert cli.model.config.train == train
    assert cli.datamodule.duration_sec == clip_sec
    assert cli.datamodule.source == "tiny"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.durations_sec=60", "durations_sec"),
        ("--model.memory.lairs=last:1", "lairs"),
        ("--data.duration_sec=180", "outside 15..120; use 15-120, or set data.allow_any_duration"),
        ("--model.memory.layers=last:0", "model.memory.layers=last:0 is not possible"),
        ("--model.memory.heads=0", "model.memory.heads=0 must be at least 1"),
        ("--model.lora.dropout=1", "model.lora.dropout=1.0 must be at least 0 and below 1"),
        ("--model.loss.magnitude_reg=-1", "model.loss.magnitude_reg=-1.0 must be at least 0"),
        ("--model.context_steps=1000000000", "model.context_steps=1000000000 must be at least 2"),
        ("--model.memory.mini_batch_steps=1000000000", "must be at least 1 and at most 4096"),
        ("--model.context_steps=1", "model.context_steps=1 must be at least 2"),
        ("--checkpoint.every_n_steps=0", "checkpoint.every_n_steps=0 must be at least 1"),
        ("--long_generation.every_n_epochs=-1", "long_generation.every_n_epochs=-1 must be"),
        ("--model.optim.lr_memory=-1", "model.optim.lr_memory=-1"),
        ("--model.train=everything", "everything"),
        ("--model.memory.rul=gated_delta", "unrecognized arguments: --model.memory.rul"),
        ("--long_generation.run.prompts=0", "long_generation.run.prompts=0 must be at least 1"),
        ("--data.manifest=nowhere.jsonl", "data.manifest=nowhere.jsonl"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt does not exist"),
        ("--ckpt_path=last", "last.ckpt"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded_and_name_their_key(
    argument: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.module.build_lm", None)
    with pytest.raises((SystemExit, UserError)) as error:
        parse("--config", "long60s.yaml", argument)
    assert message in str(error.value) + capsys.readouterr().err


def test_without_a_recipe_it_is_said_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python train/fit\.py --config long60s\.yaml"):
        main([f"--run_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_help_explains_every_field_of_every_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    options = re.split(r"\n  (?=--)", capsys.readouterr().out)
    ours = [o for o in options if re.match(r"--(model|data|long_generation|checkpoint)\.", o)]
    assert len(ours) > 45
    for option in ours:
        text = re.sub(r"\(type: .*", "", option, flags=re.DOTALL).split(maxsplit=2)
        if "CONFIG" not in option.split("\n")[0]:
            assert len(text) == 3, option
            assert len(text[2].split()) >= 4, option


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.memory.layers=[7]", "model.memory.layers=[7] is not possible: the model has 6"),
        ("--model.memory.layers=[7]", "use indices in 0..5"),
        ("--model.memory.heads=3", "model.memory.heads=3 is not possible"),
        ("--model.memory.heads=3", "must divide the model's 256 channels"),
        ("--model.source=nope", "model.source='nope'"),
        ("--model.memory.head_dim=1000000", "model.memory.head_dim=1000000 is not possible"),
        ("--model.source=moshi7b-random", "model.init_from=tiny: "),
        ("--model.source=moshi7b-random", "null starts without any"),
        ("--model.init_from=tinny", "model.init_from=tinny: tinny.safetensors does not exist"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_audio_is_encoded(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ConversationData, "prepare_data", None)
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--config", "long60s.yaml", argument])
    assert not list(tmp_path.iterdir())


def test_a_rank_that_no_model_has_is_refused_before_audio_is_encoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ConversationData, "prepare_data", None)
    lora = ["--model.train=lora", "--model.lora.rank=1000000000"]
    with pytest.raises(UserError, match=r"model\.lora\.rank=1000000000 must be at most 256"):
        main(["--config", "long60s.yaml", *lora])


def test_programs_end_with_a_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("a.b=1 must be 2; write 2")

    with pytest.raises(SystemExit) as stop:
        run_program(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.b=1 must be 2; write 2\n"


def test_learning_rates_written_as_yaml_floats_without_a_dot_are_numbers() -> None:
    cli = parse("--config", "long60s.yaml", "--model.optim.lr_memory=2e-6")
    assert cli.model.optim_config.lr_memory == 2e-6


def test_schedule_warms_up_then_decays_to_its_final_fraction() -> None:
    config = OptimConfig(warmup_fraction=0.1, final_lr_fraction=0.1)
    factors = [config.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))

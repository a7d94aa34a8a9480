"""Train the bundled model's codec, a small Mimi, on the speech of some manifests.

    python scripts/bundle/train_codec.py speech/manifest.jsonl --out codec --minutes 10
    python scripts/bundle/train_codec.py speech/manifest.jsonl --out codec --minutes 15 --resume

Writes OUT/mimi.safetensors and OUT/mimi_config.json, which moshi's loaders read, anew after every
epoch; OUT/last.ckpt to go on from; OUT/tensorboard to watch. Minutes are those of training, over
all resumptions: the learning rate and the phases (`codec_recipe.Phase`) follow the share of them
that is spent.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from codec_module import LOG_EVERY_UPDATES, CodecTraining
from codec_recipe import Recipe
from codec_speech import Speech, span_steps
from codec_training import CARD, CODEC_CONFIG, codebooks, scale_convolutions, usage_bits
from jsonargparse import ArgumentParser
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from moshi.models import MimiModel, loaders
from moshi.utils.compile import no_compile

from moshi_ttt.command_line import add_device, parse, program_parser
from moshi_ttt.compiling import compile_on_gpu_only
from moshi_ttt.errors import UserError, run_program


def build(config: dict[str, Any], speech: Speech, seed: int) -> MimiModel:
    """A codec whose convolutions are scaled to this speech."""
    compile_on_gpu_only()
    torch.manual_seed(seed)
    codec = loaders.get_mimi(None, config, num_codebooks=config["quantizer"]["n_q"])
    scale_convolutions(codec, speech.pieces(8, 32))
    return codec.train()  # codebooks follow only in training mode, and moshi builds in eval mode


def train(
    speech: Speech,
    out: Path,
    recipe: Recipe,
    *,
    config: dict[str, Any] = CODEC_CONFIG,
    device: str = "cuda",
    precision: str | None = None,
    resume: bool = False,
    compiled: bool = False,
    progress_bar: bool = True,
) -> CodecTraining:
    """Train a codec and write it into `out`.

    Args:
        speech: all of it; the last 2 % are held out.
        out: folder of the result, checkpoint and logs.
        recipe: how long and how.
        config: of the codec.
        device: `cuda` or `cpu`.
        precision: Lightning's name of it; None for bf16 autocast on a GPU, fp32 on a CPU.
        resume: go on from `out`/last.ckpt.
        compiled: compile encoder and decoder: slow to start, then faster.
        progress_bar: show one.

    Raises:
        UserError: nothing to resume, or something there that is not to be resumed; too little
            speech.
    """
    checkpoint = out / "last.ckpt"
    _refuse(checkpoint, recipe, resume)
    seed_everything(recipe.seed, verbose=False)
    kept, held_out = speech.split(0.02, span_steps(4 * recipe.piece_steps, recipe.detune) + 2)
    codec = build(config, kept, recipe.seed)
    module = CodecTraining(codec, config, kept, held_out, recipe, out)
    if compiled:
        codec.encoder.compile(dynamic=False)
        codec.decoder.compile(dynamic=False)
    trainer = _trainer(out, device, precision, progress_bar)
    # Lightning only counts: the audio is on the device already
    batches, validation = range(recipe.updates_per_epoch), range(2)
    # moshi would compile its smallest functions, for each shape and mode anew
    with no_compile():
        trainer.fit(
            module,
            batches,
            validation,
            ckpt_path=checkpoint if resume else None,
        )
        trainer.validate(module, validation, verbose=progress_bar)
    return module


def _refuse(checkpoint: Path, recipe: Recipe, resume: bool) -> None:
    if resume and not checkpoint.is_file():
        raise UserError(f"--resume: {checkpoint} does not exist; leave --resume out to begin anew")
    if not resume and checkpoint.exists():
        raise UserError(
            f"{checkpoint} exists; add --resume to go on from it, or give another --out"
        )
    if recipe.rows % 4:
        raise UserError(f"--rows {recipe.rows} is not a multiple of 4; use e.g. 24")


def _trainer(out: Path, device: str, precision: str | None, progress_bar: bool) -> Trainer:
    return Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        precision=precision or ("bf16-mixed" if device == "cuda" else "32-true"),  # type: ignore[arg-type]
        max_epochs=-1,
        benchmark=True,
        num_sanity_val_steps=0,
        log_every_n_steps=LOG_EVERY_UPDATES,
        inference_mode=False,  # windows made while validating would be refused in training
        enable_checkpointing=False,  # the module writes its own
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
        logger=TensorBoardLogger(out / "tensorboard", name=None, version=""),
        callbacks=[TQDMProgressBar(refresh_rate=LOG_EVERY_UPDATES)] if progress_bar else [],
    )


def _parser() -> ArgumentParser:
    usual = Recipe()
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("manifest", type=Path, nargs="+", help="Recordings, two channels each.")
    add("--out", type=Path, required=True, help="Folder to write.")
    add("--minutes", type=float, default=10.0, help="Of training, in all.")
    add("--updates", type=float, default=math.inf, help="At most, in all.")
    add_device(parser)
    add("--precision", choices=("bf16-mixed", "32-true"), help="Null: bf16-mixed on a GPU.")
    add("--resume", action="store_true", help="Go on from OUT/last.ckpt.")
    add("--rows", type=int, default=usual.rows, help="Pieces of 2.56 s in an update.")
    add("--peak_lr", type=float, default=usual.peak_lr, help="Of the codec.")
    add("--compile", action="store_true", help="Compile encoder and decoder.")
    add("--seed", type=int, default=0, help="Of weights and pieces.")
    return parser


def main(args: list[str] | None = None) -> None:
    """Do what the command line says."""
    options = parse(_parser(), args)
    torch.set_float32_matmul_precision("high")
    recipe = Recipe(
        minutes=options.minutes,
        updates=options.updates,
        rows=options.rows,
        peak_lr=options.peak_lr,
        seed=options.seed,
    )
    begun = time.perf_counter()
    speech = Speech.read(options.manifest)
    hours = len(speech.samples) / CODEC_CONFIG["sample_rate"] / 3600
    print(f"{hours:.2f} h of one channel read in {time.perf_counter() - begun:.0f} s", flush=True)
    module = train(
        speech,
        options.out,
        recipe,
        device=options.device,
        precision=options.precision,
        resume=options.resume,
        compiled=options.compile,
    )
    size = (options.out / "mimi.safetensors").stat().st_size
    print(f"{options.out / 'mimi.safetensors'}: {size / 1e6:.2f} MB, {module._updates} updates")
    for level, codebook in enumerate(codebooks(module.averaged())):
        print(f"codebook {level}: {float(usage_bits(codebook)):.2f} of {math.log2(CARD):.0f} bits")


if __name__ == "__main__":
    run_program(main)

"""Assemble the tiny Moshi around its codec: moshi's structure and layout, ten million weights.

    python scripts/bundle/make_tiny.py begin FOLDER          # tokenizer, config, untrained LM
    python scripts/bundle/make_tiny.py begin FOLDER --dim 320 --layers 8 --norm layer_norm_f32
    python scripts/bundle/make_tiny.py finish FOLDER --trained RUN/checkpoints/best.safetensors

`begin` adds what is missing to a folder in which `train_codec.py` has left a codec, so that
`train/fit.py --config tiny_base.yaml --model.source FOLDER` can train it; `finish` puts the trained
weights in the untrained ones' place, in bf16, or a trained memory beside them, in fp16, as that of
the bundled model. `tiny_bundle.sh` runs the whole chain.
"""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece
import torch
from codec_training import CODEC_CONFIG
from conversation import sentences
from moshi.models import LMModel, loaders
from torch import Tensor, nn

from moshi_ttt.command_line import parse, program_parser
from moshi_ttt.errors import UserError, check_bounds, check_setting, run_program
from moshi_ttt.files import write_bytes, write_json
from moshi_ttt.model.source import TINY, open_source
from moshi_ttt.model.weights import load_trained, save_trained, trainable_weights

TEXT_CARD = 1000
HEAD_DIM = 64
DEPFORMER_DIM = 96

FILES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
    "model_type": "moshi",
}


def lm_config(dim: int = 256, layers: int = 6, norm: str = "rms_norm_f32") -> dict[str, Any]:
    """moshi's settings of a small LM.

    Args:
        dim: channels of the temporal transformer, in heads of 64.
        layers: of the temporal transformer.
        norm: what moshi calls it.

    Raises:
        UserError: channels that make no whole heads, or no layer.
    """
    check_setting(
        dim > 0 and dim % HEAD_DIM == 0,
        "--dim",
        dim,
        f"makes no heads of {HEAD_DIM} channels; use a multiple, e.g. 256",
    )
    check_bounds("--layers", layers, least=1)
    return loaders._lm_kwargs | {
        "dim": dim,
        "text_card": TEXT_CARD,
        "card": CODEC_CONFIG["quantizer"]["bins"],
        "num_heads": dim // HEAD_DIM,
        "num_layers": layers,
        "norm": norm,
        "context": 375,  # 30 s, so that the ring turns within a minute
        "depformer_dim": DEPFORMER_DIM,
        "depformer_dim_feedforward": int(4.125 * DEPFORMER_DIM),
        "depformer_num_heads": 4,
        "depformer_num_layers": 2,
    }


def build_tokenizer(seed: int) -> bytes:
    """A sentencepiece model with moshi's special ids: 0 unknown, 1 begin, 2 end, 3 padding.

    It reads what the generated speakers might say, and the commonest words of English in general.
    """
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(seed),
        model_writer=model,
        vocab_size=TEXT_CARD,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def build_lm(seed: int, config: dict[str, Any]) -> LMModel:
    """A seeded LM whose activations are of order one in every layer.

    moshi leaves the depformer and attention's projections as torch initialises them. Here every
    linear has standard deviation 1 / sqrt(inputs), and what writes into the residual stream is
    divided by sqrt(2 * layers), so that the stream's variance does not grow with depth.
    """
    torch.manual_seed(seed)
    lm = loaders.get_moshi_lm(None, config, dtype=torch.float32)
    for name, module in lm.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        std = 1 / math.sqrt(module.in_features)
        if "out_projs" in name or name.endswith("linear_out"):
            std /= math.sqrt(2 * config["num_layers"])
        nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
    # 16 of the 17 rows that are added up at the input are audio: at the start they weigh as much as
    # the text, which has most of what there is to learn, and is otherwise drowned
    with torch.no_grad():
        for table in lm.emb:
            table.weight.mul_(lm.n_q**-0.5)  # type: ignore[operator]
    return lm


def begin(folder: Path, seed: int, config: dict[str, Any]) -> None:
    """Make a folder with a codec loadable: tokenizer, config, seeded untrained LM in float32.

    Raises:
        UserError: the codec is missing.
    """
    for name in (FILES["mimi_name"], FILES["mimi_config_name"]):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing; train the codec first: "
                f"python scripts/bundle/train_codec.py MANIFEST --out {folder}"
            )
    _write(folder / FILES["tokenizer_name"], build_tokenizer(seed))
    _write(folder / FILES["moshi_name"], _stored(build_lm(seed, config), torch.float32))
    write_json(folder / "config.json", FILES | config)


def finish(folder: Path, trained: Path) -> None:
    """Write what a run trained into the folder: Moshi's own weights in bf16, or a memory in fp16.

    Adapters that were trained with a memory lie in its file.

    Raises:
        UserError: the file holds neither, or belongs to another base.
    """
    lm, source, config, trained_steps = load_trained(trained, base=str(folder))
    if config.train == "base":
        _write(folder / FILES["moshi_name"], _stored(lm, torch.bfloat16))
        parameters = sum(p.numel() for p in open_source(str(folder)).lm().parameters())
    elif config.train in ("memory", "memory+lora"):
        weights = trainable_weights(lm)
        halves = {name: weight.half() for name, weight in weights.items()}
        # by the name that the base has wherever it lies
        config = replace(config, source=TINY)
        save_trained(folder / "memory.safetensors", halves, config, trained_steps, source)
        parameters = sum(weight.numel() for weight in weights.values())
    else:
        raise UserError(
            f"{trained} was trained with model.train={config.train}; use base, memory or "
            "memory+lora"
        )
    print(
        f"{folder}: {parameters:,} parameters, trained on clips of "
        f"{source.clock.describe(trained_steps)}"
    )


def _stored(model: nn.Module, dtype: torch.dtype) -> bytes:
    tensors: dict[str, Tensor] = model.state_dict()
    return safetensors.torch.save({k: v.to(dtype).contiguous() for k, v in tensors.items()})


def _write(path: Path, data: bytes) -> None:
    write_bytes(path, data)
    print(f"{path}: {len(data) / 1e6:.2f} MB")


def main(args: list[str] | None = None) -> None:
    """Begin or finish a folder."""
    parser = program_parser(__doc__)
    add: Any = parser.add_argument
    add("stage", choices=("begin", "finish"), help="Before or after LM training.")
    add("folder", type=Path, help="Folder in moshi's layout.")
    add("--trained", type=Path, help="For `finish`: RUN/checkpoints/best.safetensors.")
    add("--seed", type=int, default=0, help="For `begin`: seed of the weights.")
    add("--dim", type=int, default=256, help="For `begin`: channels, a multiple of 64.")
    add("--layers", type=int, default=6, help="For `begin`: layers.")
    norms = ("rms_norm_f32", "layer_norm_f32")
    add("--norm", choices=norms, default=norms[0], help="For `begin`: of the LM's layers.")
    arguments = parse(parser, args)
    if arguments.stage == "begin":
        config = lm_config(arguments.dim, arguments.layers, arguments.norm)
        begin(arguments.folder, arguments.seed, config)
    elif arguments.trained is None:
        raise UserError("--trained is missing; give RUN/checkpoints/best.safetensors")
    else:
        finish(arguments.folder, arguments.trained)


if __name__ == "__main__":
    run_program(main)

"""Build the bundled tiny Moshi: moshi's structure and checkpoint layout in five million parameters.

    python scripts/make_tiny.py            # writes assets/tiny, about fifteen minutes on a core

Needs the demo set (`make_demo.py`), whose speech the codec learns to copy, and nothing outside the
project's own dependencies. The language model is untrained: seeded random weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import moshi_ttt  # isort: skip  # before moshi: it decides whether moshi compiles

import numpy as np
import safetensors.torch
import sentencepiece
import soundfile
import torch
from codec_training import fit_codebooks, scale_to_unit_variance, train
from conversation import BACKCHANNELS, conversation
from moshi.models import LMModel, MimiModel, loaders
from torch import Tensor, nn

from moshi_ttt.errors import UserError
from moshi_ttt.trace import write_atomic, write_json

ASSETS = Path(moshi_ttt.__file__).resolve().parent.parent / "assets"
TEXT_CARD = 1000
CARD = 512
DIM = 128
DEPFORMER_DIM = 64
CODEC_DIM = 128

FILES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
    "model_type": "moshi",
}
LM_CONFIG: dict[str, Any] = loaders._lm_kwargs | {
    "dim": DIM,
    "text_card": TEXT_CARD,
    "card": CARD,
    "num_heads": 4,
    "num_layers": 4,
    "context": 375,  # 30 s, so that the ring turns within a minute
    "depformer_dim": DEPFORMER_DIM,
    "depformer_dim_feedforward": int(4.125 * DEPFORMER_DIM),
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
}
CODEC_CONFIG: dict[str, Any] = loaders._mimi_config | {
    "seanet": loaders._seanet_kwargs | {"dimension": CODEC_DIM, "n_filters": 8},
    "quantizer": {
        "dimension": 32,
        "n_q": 8,
        "bins": CARD,
        "input_dimension": CODEC_DIM,
        "output_dimension": CODEC_DIM,
    },
    "transformer": loaders._transformer_kwargs
    | {
        "d_model": CODEC_DIM,
        "num_heads": 4,
        "num_layers": 2,
        "dim_feedforward": 4 * CODEC_DIM,
        "input_dimension": CODEC_DIM,
        "output_dimensions": [CODEC_DIM],
    },
}


def build_tokenizer(seed: int) -> bytes:
    """A sentencepiece model with moshi's special ids: 0 unknown, 1 begin, 2 end, 3 padding."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(seed),
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


def _sentences(seed: int) -> Iterator[str]:
    """What the demo set's speakers might say, and the commonest words of English in general."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        for turn in itertools.islice(conversation(rng), 80):
            yield from turn.sentences
    yield from BACKCHANNELS
    words = (Path(__file__).parent / "common_english.txt").read_text().split()
    for _ in range(20):
        order = rng.permutation(len(words))
        for first in range(0, len(words), 10):
            yield " ".join(words[i] for i in order[first : first + 10])


def build_lm(seed: int) -> LMModel:
    """A seeded LM whose activations are of order one in every layer.

    moshi leaves the depformer and attention's projections as torch initialises them. Here every
    linear has standard deviation 1 / sqrt(inputs), and what writes into the residual stream is
    divided by sqrt(2 * layers), so that the stream's variance does not grow with depth.
    """
    torch.manual_seed(seed)
    lm = loaders.get_moshi_lm(None, LM_CONFIG, dtype=torch.float32)
    for name, module in lm.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        std = 1 / math.sqrt(module.in_features)
        if "out_projs" in name or name.endswith("linear_out"):
            std /= math.sqrt(2 * LM_CONFIG["num_layers"])
        nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
    return lm


def build_codec(speech: Tensor, updates: int, seed: int) -> MimiModel:
    """A small Mimi that has heard `speech` [samples] for `updates` optimizer steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    codec = loaders.get_mimi(None, CODEC_CONFIG)
    loud = speech.unfold(0, codec.frame_size * 100, codec.frame_size * 100)  # [pieces, 8 s]
    loud = loud[loud.std(dim=1).argsort(descending=True)[:8], None]
    scale_to_unit_variance(codec, loud)
    if updates:
        train(codec, speech, updates, generator)
    else:
        fit_codebooks(codec, speech, generator)
    return codec


def read_speech(manifest: Path) -> Tensor:
    """Both channels of every recording, one after the other, [samples]."""
    if not manifest.exists():
        raise UserError(
            f"{manifest} does not exist; build the demo set: python scripts/make_demo.py"
        )
    parts = []
    for line in manifest.read_text().splitlines():
        audio, sample_rate = soundfile.read(
            manifest.parent / json.loads(line)["path"], dtype="float32", always_2d=True
        )
        if sample_rate != CODEC_CONFIG["sample_rate"]:
            raise UserError(
                f"{manifest}: {line} has {sample_rate} Hz, but the codec hears "
                f"{CODEC_CONFIG['sample_rate']}; rebuild the demo set: python scripts/make_demo.py"
            )
        parts.append(torch.from_numpy(audio.T.copy()).flatten())
    return torch.cat(parts)


def stored(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state to write: weights in `dtype`, buffers (codebooks) as they are."""
    parameters = dict(model.named_parameters())
    return {
        name: (value.to(dtype) if name in parameters else value).contiguous()
        for name, value in model.state_dict().items()
    }


def codebook_report(codec: MimiModel, speech: Tensor) -> list[tuple[int, float]]:
    """Codewords used and entropy in bits of every level, over `speech` [samples]."""
    samples = codec.frame_size * 375
    rows = speech[: len(speech) // samples * samples].reshape(-1, 1, 1, samples)
    with torch.no_grad():
        codes = torch.cat([codec.encode(row) for row in rows], dim=2)[0]  # [levels, steps]
    report = []
    for level in codes:
        share = torch.bincount(level, minlength=CARD) / len(level)
        entropy = -(share * share.clamp(min=1e-12).log2()).sum()
        report.append((int((share > 0).sum()), float(entropy)))
    return report


def _write(path: Path, data: bytes) -> None:
    write_atomic(path, lambda file: file.write(data))
    print(f"{path}: {len(data) / 1e6:.2f} MB")


def main(out: Path, demo: Path, updates: int, seed: int) -> None:
    """Write the bundle into `out`, each file whole or not at all."""
    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it
    speech = read_speech(demo / "train.jsonl")
    lm = build_lm(seed)
    codec = build_codec(speech, updates, seed)
    write_json(out / "config.json", FILES | LM_CONFIG)
    write_json(out / "mimi_config.json", CODEC_CONFIG)
    _write(out / FILES["tokenizer_name"], build_tokenizer(seed))
    _write(out / FILES["moshi_name"], safetensors.torch.save(stored(lm, torch.bfloat16)))
    _write(out / FILES["mimi_name"], safetensors.torch.save(stored(codec, torch.float16)))
    used = codebook_report(loaders.get_mimi(out / "mimi.safetensors", CODEC_CONFIG), speech)
    for level, (count, bits) in enumerate(used):
        print(f"codebook {level}: {count} of {CARD} codewords used, {bits:.2f} bits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny", help="folder to write")
    parser.add_argument("--demo", type=Path, default=ASSETS / "demo", help="demo set to hear")
    parser.add_argument(
        "--codec-updates", type=int, default=2400, help="optimizer steps of the codec; 0 for none"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and training")
    arguments = parser.parse_args()
    try:
        main(arguments.out, arguments.demo, arguments.codec_updates, arguments.seed)
    except UserError as error:
        sys.exit(f"error: {error}")

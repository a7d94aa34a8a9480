"""Quality around critical positions of made-up generations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from moshi.modules.transformer import StreamingMultiheadAttention
from synthetic_trace import make_trace

from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.diagnosis.listening import (
    cut_outs,
    decode,
    listen,
    listening_positions,
    word_starts,
)
from moshi_ttt.evaluation.scalars import quality_scalars
from moshi_ttt.files import plain
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.source import open_source

NLL = {
    "window_steps": 63,
    "start_step": [63 * n for n in range(15)],
    "text": [2.0 if 63 * n < 750 else 3.0 for n in range(15)],
}


class ToneCodec(torch.nn.Module):
    """Sound that follows the codes: the first codebook is the level, in hundredths."""

    frame_size, frame_rate, encoder_frame_rate = 1920, 12.5, 25.0

    def __init__(self) -> None:
        super().__init__()
        self.decoder_transformer = StreamingMultiheadAttention(2, 1, context=500)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        level = codes[:, :1].float().repeat_interleave(1920, dim=-1) / 100
        time = torch.arange(level.shape[-1]) / 24_000
        return level * torch.sin(2 * torch.pi * 440 * time)


def planted(**overrides: Any) -> Trace:
    """At 2C = 750 the sound gets louder, the text falls silent and the codes get poorer."""
    trace = make_trace(jump_at=750)
    fields = {name: getattr(trace, name) for name in Trace.__slots__}
    codes = np.random.default_rng(0).integers(0, 512, size=trace.codes.shape)
    codes[:, 0] = 10
    codes[:, 0, 750:] = 80
    codes[:, 1:, 750:] = 7
    text = np.random.default_rng(1).integers(4, 1000, size=trace.text_tokens.shape)
    text[:, 750:] = 3
    return Trace(**fields | {"codes": codes, "text_tokens": text} | overrides)


def quality_of(trace: Trace, codec: Any = None) -> dict[str, Any]:
    return listen(
        trace,
        find_jumps(trace),
        NLL,
        window_steps=60,
        starts_word=np.arange(1000) % 2 == 0,
        cardinality=512,
        sound=None if codec is None else decode(codec, trace.codes),
    )


def at(quality: dict[str, Any], name: str) -> Any:
    return next(one for one in quality["positions"] if name in one["names"])["measures"]


def test_a_planted_change_is_found_where_it_is_and_nowhere_else() -> None:
    quality = quality_of(planted(), ToneCodec())
    change = at(quality, "2C")
    assert change["rms"]["before"] == pytest.approx(0.1 / 2**0.5, rel=0.01)
    assert change["rms"]["after"] == pytest.approx(0.8 / 2**0.5, rel=0.01)
    assert change["rms"]["low"] > 0.4
    assert change["padding_share"]["change"] == 1
    assert change["words_per_minute"]["before"] == pytest.approx(375, rel=0.2)
    assert change["words_per_minute"]["after"] == 0
    assert change["code_perplexity_others"]["after"] == pytest.approx(1)
    assert change["nll_text"]["change"] == 1
    before = at(quality, "C")
    for name in ("rms", "padding_share", "nll_text"):
        assert before[name]["change"] == pytest.approx(0, abs=1e-3), name


def test_jumps_are_positions_too() -> None:
    trace = planted()
    jumps = find_jumps(trace)
    positions = listening_positions(trace, jumps)
    assert [step for step, names in positions.items() if "jump" in names] == [jumps[0].step]
    # the same step under several names is one position
    assert {"2C", "trained length", "legacy token 6000"} <= set(positions[750])
    assert not any("prompt end" in names for names in positions.values())


def test_codes_without_sound_have_no_audio_measures() -> None:
    quality = quality_of(planted())
    assert not quality["audible"]
    assert "rms" not in at(quality, "2C")
    assert "distinct_2" in at(quality, "2C")


def test_positions_too_close_to_an_end_are_left_out() -> None:
    positions = quality_of(planted(prompt_steps=370))["positions"]
    names = [name for one in positions for name in one["names"]]
    assert "C" not in names
    assert "2C" in names


def test_scalars_and_json_hold_what_was_measured() -> None:
    quality = quality_of(planted(), ToneCodec())
    scalars = quality_scalars(quality)
    assert scalars["longgen/quality/padding_share/change_at_2C"] == 1
    assert scalars["longgen/quality/nll_text/change_at_2C"] == 1
    # another name of the same step would be the same curve again
    assert not any(name.endswith("legacy_token_6000") for name in scalars)
    assert "longgen/quality/distinct_2/whole" in scalars
    stored = json.loads(json.dumps(plain(quality), allow_nan=False))
    assert stored["positions"][0]["before"] == [315, 375]
    # one value over all recordings has no interval
    assert at(stored, "2C")["nll_text"]["low"] is None


def test_cut_outs_hold_both_windows() -> None:
    wav = np.arange(900 * 10)[:, None]
    cuts = cut_outs(quality_of(planted()), wav, 10)
    assert cuts["2C"][0, 0] == 6900
    assert len(cuts["2C"]) == 1200
    assert set(cuts) >= {"C", "2C"}


def test_words_start_where_the_tokenizer_says() -> None:
    tokenizer = open_source("tiny").tokenizer()
    starts = word_starts(tokenizer)
    for text in ("we met in the morning", "yes"):
        assert starts[tokenizer.encode(text)].sum() == len(text.split())

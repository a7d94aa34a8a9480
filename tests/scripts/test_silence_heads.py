"""What a memory recalls with some of its heads silenced."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_fakes import MakeLM, hybrid, random_codes

from moshi_ttt.errors import UserError
from moshi_ttt.model.hybrid import hybrid_layers
from moshi_ttt.model.source import ASSETS


@pytest.fixture
def script() -> Any:
    return importlib.import_module("silence_heads")


def test_a_silenced_head_adds_nothing_and_the_others_what_they_did(
    script: Any, make_lm: MakeLM
) -> None:
    lm = hybrid(make_lm, rule="gated_delta", write_gate=0.3)
    rule = hybrid_layers(lm)[2].branch.rule
    x = torch.randn(2, 9, lm.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = rule(x)[0].unflatten(-1, (rule.heads, -1))
        with script.silenced(lm, [(2, 1), (0, 0)]):
            after = rule(x)[0].unflatten(-1, (rule.heads, -1))
        again = rule(x)[0].unflatten(-1, (rule.heads, -1))
    assert (after[..., 1, :] == 0).all()
    assert torch.equal(after[..., 0, :], before[..., 0, :])
    assert torch.equal(again, before)


def test_a_silenced_memory_is_one_whose_gates_are_shut(script: Any, make_lm: MakeLM) -> None:
    lm = hybrid(make_lm, rule="gated_delta", write_gate=0.3)
    codes = random_codes()
    with torch.no_grad():
        with script.silenced(lm, script.cases(lm, None)["the whole memory"]):
            silent = lm(codes).text_logits
        loud = lm(codes).text_logits
        for layer in hybrid_layers(lm).values():
            layer.branch.gate.zero_()
        shut = lm(codes).text_logits
    torch.testing.assert_close(silent, shut, equal_nan=True)
    assert not torch.allclose(loud.nan_to_num(), shut.nan_to_num())


def test_each_layer_and_head_is_silenced_once_and_left_alone_once(
    script: Any, make_lm: MakeLM
) -> None:
    lm = hybrid(make_lm, rule="gated_delta")  # in layers 0 and 2, two heads
    cases = script.cases(lm, [2])
    assert cases["nothing"] == ()
    assert cases["layer 0"] == [(0, 0), (0, 1)]
    assert cases["layer 2, head 1"] == [(2, 1)]
    assert cases["all but layer 2, head 1"] == [(0, 0), (0, 1), (2, 0)]
    assert "layer 0, head 0" not in cases
    with pytest.raises(UserError, match=r"--layers \[1\] have no memory; use some of \[0, 2\]"):
        script.cases(lm, [1, 2])


def test_the_bundled_memory_without_itself_recalls_less(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(ASSETS / "tiny/memory.safetensors"), "--device", "cpu"]
    arguments += ["--recordings", "1", "--out", str(tmp_path), "--cache_dir", str(tmp_path)]
    few = {
        "nothing": (),
        "the whole memory": [(layer, head) for layer in range(6) for head in range(4)],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "cases", lambda *_: few)
        script.main(arguments)
    written = json.loads((tmp_path / "heads.json").read_text())
    assert list(written) == [*few]
    assert written["nothing"]["words"] == written["the whole memory"]["words"] >= 5
    assert written["nothing"]["right"] > 2 * written["the whole memory"]["right"]
    assert "the whole memory" in capsys.readouterr().out

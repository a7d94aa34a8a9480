"""Mistakes on the command line of scripts/evaluate.py."""

from __future__ import annotations

import importlib

import pytest

from moshi_ttt.errors import UserError


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "exactly one of"),
        (["--model", "tiny", "--checkpoint", "x.ckpt"], "exactly one of"),
        (["--checkpoint", "nowhere/last.ckpt"], "does not exist"),
        (["--checkpoint", "x.ckpt", "--dtype", "bfloat16"], "--dtype goes with --model"),
        (["--model", "tiny", "--manifest", "nowhere.jsonl"], "cannot be read"),
        (["--compare", "nowhere", "--out", "x"], "nowhere"),
        (["--model", "nowhere"], "^--model='nowhere' is neither"),
        (["--model", "tiny", "--seconds", "0"], "^--seconds=0.0 must be above 0"),
        (["--model", "tiny", "--log-interval", "-1"], "^--log_interval=-1 must be a length in"),
        (["--model", "tiny", "--run.prompts", "0"], "^run.prompts=0 must be at least 1"),
        (["--model", "tiny", "--run.attention_layers", "[6]"], r"^run.attention_layers=\[6\]"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        importlib.import_module("evaluate").main(args)

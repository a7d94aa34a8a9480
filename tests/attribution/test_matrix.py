"""Cells of the matrix: what they hold, what they record, and that finished ones are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moshi.models.lm import LMModel

from moshi_ttt.attribution.cells import (
    Streams,
    load_cell,
    run_cell,
    save_cell,
    streams_from,
    weights_fingerprint,
)
from moshi_ttt.attribution.conditions import Condition
from moshi_ttt.attribution.matrix import (
    MatrixConfig,
    conditions,
    least_capacity,
    usual_capacities,
)
from moshi_ttt.data import EncodedRecording
from moshi_ttt.errors import UserError
from moshi_ttt.memory import MemoryConfig
from moshi_ttt.model.hybrid import add_memory, hybrid_layers
from moshi_ttt.model.sinks import AttentionControls
from moshi_ttt.model.source import open_source
from moshi_ttt.rows import Rows
from moshi_ttt.teacher_forcing.losses import token_nll

MakeLM = Callable[..., LMModel]
STEPS = 30
MATRIX = MatrixConfig(capacities=(188, 281, 375))


def streams() -> Streams:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, 17, STEPS), generator=generator)
    user_speaks = np.tile(np.linspace(0, 1, STEPS), (2, 1))
    return Streams(codes, torch.zeros(8, 1, dtype=torch.long), user_speaks, prompt_steps=5, seeds=2)


def cells_of(make_lm: MakeLM, *changes: Condition, memory: bool = False) -> list[Any]:
    lm = make_lm().eval()
    if memory:
        torch.manual_seed(3)
        add_memory(lm, MemoryConfig(layers=[1], heads=2, mini_batch_steps=5))
        torch.nn.init.normal_(hybrid_layers(lm)[1].branch.gate, std=2.0)
    controls = AttentionControls(lm)
    return [run_cell(lm, controls, one, streams(), seed=0) for one in changes]


def test_every_cell_differs_from_a_plain_run_in_one_thing() -> None:
    planned = conditions(MATRIX, model="a", trained_steps=188, has_memory=True)
    assert len({one.name for one in planned}) == len(planned) == 20
    plain = planned[:3]
    assert [one.context_steps for one in plain] == [188, 281, 375]
    for one in planned[3:]:
        changed = [one.sinks > 0, one.start_position > 0, one.regime != "free", one.gates_shut]
        # only the price of sinks in prediction needs both: sinks while forced
        assert sum(changed) == 1 or (one.sinks and one.regime == "forced")
    silent = conditions(
        replace(MATRIX, user="silence"), model="a", trained_steps=None, has_memory=False
    )
    assert [one.regime for one in silent[:6]] == ["silent"] * 6
    assert [one.regime for one in silent[-3:]] == ["free"] * 3
    quick = conditions(
        replace(MATRIX, quick=True), model="a", trained_steps=None, has_memory=False, forced=False
    )
    assert not any(one.regime == "forced" or one.gates_shut for one in quick)


def test_a_cell_generates_under_its_condition(make_lm: MakeLM) -> None:
    plain = Condition(context_steps=10)
    free, sunk, silent, gates, hybrid = (
        *cells_of(make_lm, plain, replace(plain, sinks=2), replace(plain, regime="silent")),
        *cells_of(make_lm, replace(plain, gates_shut=True), plain, memory=True),
    )
    assert free.log_norm.shape == (4, 3, STEPS)
    assert free.prompts.tolist() == [0, 0, 1, 1]
    # alike until something is evicted, the prompt ends, or the memory has written
    np.testing.assert_allclose(sunk.log_norm[..., :10], free.log_norm[..., :10], atol=1e-5)
    assert np.abs(free.log_norm[..., 11:] - sunk.log_norm[..., 11:]).max() > 1e-3
    assert np.array_equal(free.log_norm[..., :5], silent.log_norm[..., :5])
    assert not np.array_equal(free.log_norm[..., 7:], silent.log_norm[..., 7:])
    assert np.array_equal(free.log_norm, gates.log_norm)
    assert not np.array_equal(free.log_norm, hybrid.log_norm)


def test_forced_nll_is_that_of_the_training_forward(make_lm: MakeLM) -> None:
    (cell,) = cells_of(make_lm, Condition(context_steps=10, regime="forced"))
    lm = make_lm(context=10).eval()
    codes = streams().codes
    with torch.no_grad():
        output = lm(codes)
    text = token_nll(output.text_logits, codes[:, :1], output.text_mask)[:, 0]
    audio = token_nll(output.logits, codes[:, 1:9], output.mask)[:, 0]
    for row, expected in enumerate((text, audio)):
        got = torch.from_numpy(cell.nll[::2, row])
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    # seeds of a forced run are one run
    assert np.array_equal(cell.nll[0], cell.nll[1])


def test_what_a_recording_lacks_is_unknown_and_heard_as_silence() -> None:
    recording = EncodedRecording("a", torch.ones(17, 20, dtype=torch.long))
    silence = torch.full((8, 1), 7)
    cut = streams_from(
        [(recording, 5)],
        silence,
        steps=30,
        prompt_steps=5,
        seeds=2,
        codec=open_source("tiny").codec(),
        rows=Rows(8, 8),
    )
    assert cut.user_speaks.shape == (1, 30)
    assert (cut.codes[..., 15:] == -1).all()
    prompt, user = cut.batch(Condition(context_steps=10), Rows(8, 8))
    assert prompt.shape == (2, 17, 5)
    assert (user[..., :15] == 1).all()
    assert (user[..., 15:] == 7).all()
    _, silent = cut.batch(Condition(context_steps=10, regime="silent"), Rows(8, 8))
    assert (silent[..., 5:] == 7).all()


def test_a_cell_is_kept_only_for_its_own_settings(make_lm: MakeLM, tmp_path: Path) -> None:
    condition = Condition(context_steps=10, regime="forced")
    (cell,) = cells_of(make_lm, condition)
    assert load_cell(tmp_path, condition, {"seed": 0}) is None
    save_cell(tmp_path, cell, {"seed": 0})
    kept = load_cell(tmp_path, condition, {"seed": 0})
    assert kept is not None
    assert np.array_equal(kept.nll, cell.nll.astype(np.float32))
    assert kept.condition == condition
    assert load_cell(tmp_path, condition, {"seed": 1}) is None
    assert load_cell(tmp_path, replace(condition, trained_steps=5), {"seed": 0}) is None
    (tmp_path / f"{condition.name}.npz").write_bytes(b"half of a file")
    assert load_cell(tmp_path, condition, {"seed": 0}) is None


def test_other_weights_have_another_fingerprint(make_lm: MakeLM) -> None:
    assert weights_fingerprint(make_lm()) == weights_fingerprint(make_lm())
    assert weights_fingerprint(make_lm()) != weights_fingerprint(make_lm(seed=1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"capacities": (10, 10)}, "twice"),
        ({"capacities": ()}, "capacities"),
        ({"sinks": 0}, "sinks=0"),
        ({"prompts": 1, "seeds": 3}, "fewer than 4"),
        ({"starts": (0,)}, "starts"),
    ],
)
def test_a_matrix_that_shows_nothing_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MatrixConfig(**{"capacities": (188, 281, 375)} | setting)
    with pytest.raises(UserError, match="prompt"):
        MATRIX.check_prompt(150)


@pytest.mark.parametrize(
    ("context", "quick", "expected"),
    [
        (375, False, (188, 281, 375)),
        (375, True, (94, 141, 188)),
        (188, False, (113, 150, 188)),  # the window of the recipes: half of it is too short
        (188, True, (88, 132, 176)),
    ],
)
def test_unless_it_is_said_rings_are_as_short_as_can_be_compared(
    context: int, quick: bool, expected: tuple[int, ...]
) -> None:
    prompt_steps = 25 if quick else 50
    capacities = usual_capacities(context, least_capacity(prompt_steps), quick)
    assert capacities == expected
    MatrixConfig(capacities=capacities).check_prompt(prompt_steps)


def test_the_script_ends_in_a_verdict_and_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import attribute_jump

    def few(*args: Any, **settings: Any) -> list[Condition]:
        planned = conditions(*args, **settings)
        return [*planned[:4], next(one for one in planned if one.regime == "forced")]

    monkeypatch.setattr(attribute_jump, "conditions", few)
    settings = {
        "capacities": "[75,77,79]",
        "prompts": 2,
        "seeds": 2,
        "prompt_sec": 0.16,
        "steps_past_2c": 5,
    }
    arguments = ["--model", "tiny", "--quick", "--out", str(tmp_path / "out")]
    arguments += ["--cache_dir", str(tmp_path / "codes"), "--device", "cpu"]
    arguments += [f"--matrix.{name}={value}" for name, value in settings.items()]
    threads = torch.get_num_threads()
    try:
        verdict = attribute_jump.main(arguments)
        record = json.loads((tmp_path / "out/verdict.json").read_text())
        assert record["headline"] == verdict.headline
        assert len(record["hypotheses"]) == 6
        page = (tmp_path / "out/attribution.html").read_text()
        assert page.count("<img") == 3
        assert "://" not in page  # base64 may well spell http
        assert "steps/s" in capsys.readouterr().out
        monkeypatch.setattr(attribute_jump, "run_cell", None)  # would fail if anything ran
        assert attribute_jump.main(arguments).text() == verdict.text()
    finally:
        torch.set_num_threads(threads)


def test_the_script_wants_one_kind_of_model_and_a_matrix_that_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import attribute_jump

    with pytest.raises(UserError, match="either --model"):
        attribute_jump.main([])
    with pytest.raises(UserError, match="either --model"):
        attribute_jump.main(["--model", "tiny", "--checkpoint", "x.ckpt"])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(UserError, match=r"^matrix\.sinks=0 must be at least 1"):
        attribute_jump.main(["--model", "tiny", "--matrix.sinks", "0", "--device", "cpu"])

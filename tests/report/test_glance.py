"""What a report says first of how it came about."""

from __future__ import annotations

from pathlib import Path

from synthetic_trace import make_trace, remembered, write_evaluation

from moshi_ttt.evaluation.folder import find_evaluations
from moshi_ttt.files import write_json
from moshi_ttt.report.glance import at_a_glance
from moshi_ttt.rows import GROUPS


def glance(run: Path) -> dict[str, str]:
    evaluations = find_evaluations(run)
    return dict(at_a_glance(run, evaluations, evaluations[-1].trace()))


def test_a_training_says_what_was_trained_on_and_how_to_repeat_it(tmp_path: Path) -> None:
    for epoch in range(3):
        write_evaluation(tmp_path / f"longgen/epoch_{epoch:03d}", make_trace(), clips=0)
    (tmp_path / "config.yaml").write_text("trainer: {}\ndata:\n  manifest: my.jsonl\n")
    found = glance(tmp_path)
    assert found == {
        "model": "tiny; memory: ttt_linear in layers 2-3; attention sees 30 s",
        "data": "trained on my.jsonl, 60 s clips; examined with 2 recordings",
        "run": "72 s in each of 4 streams, the first 8 s forced from a recording",
        # 600 s an epoch, and the evaluation before the first
        "took": "20.2 min from the first evaluation to the last; 12 s for the evaluation",
        "again": f"python train/fit.py --config {tmp_path}/config.yaml",
        "next": f"python scripts/evaluate.py --checkpoint {tmp_path}/checkpoints/last.ckpt "
        "--seconds 300 (further)",
    }
    for epoch, kept in ((0, 0.2), (2, 0.9)):
        folder = tmp_path / f"longgen/epoch_{epoch:03d}"
        write_json(folder / "probes.json", remembered(kept, 0.1, 0.1))
        losses = [[2.0 - 0.1 * epoch, 1.9]] * 3
        contexts = {"context_sec": [10, 100], "target_sec": 5, "stretches": [1, 2, 3]}
        write_json(folder / "contexts.json", contexts | dict.fromkeys(GROUPS, losses))
    gain = glance(tmp_path)["since epoch 1"]  # as all of them are called here
    # at 60 and 240 s, 50 words: 10 were right and 45 are
    assert gain == (
        "own facts recalled beyond the window +70% [+53%, +80%]; loss behind 10 s, text "
        "-0.200 [-0.200, -0.200]; loss behind 100 s, text +0.000 [+0.000, +0.000]"
    )
    (tmp_path / "config.yaml").write_text("trainer: {}\n")
    assert glance(tmp_path)["data"].startswith("trained on the bundled recordings, ")


def test_an_evaluation_with_a_jump_says_how_to_find_out_why(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "longgen/evaluation", make_trace(jump_at=763), clips=0)
    assert set(glance(tmp_path)) == {"model", "data", "run", "took"}
    for config, subject in (
        ("model: tiny", "--model tiny"),
        ("checkpoint: a/last.ckpt\nmodel: null", "--checkpoint a/last.ckpt"),
    ):
        (tmp_path / "config.yaml").write_text(config)
        found = glance(tmp_path)
        assert found["data"] == "trained on 60 s clips; examined with 2 recordings"
        assert found["again"] == f"python scripts/evaluate.py --config {tmp_path}/config.yaml"
        assert found["next"].startswith(f"python scripts/attribute_jump.py {subject} (why")


def test_without_a_jump_it_is_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "longgen/evaluation", make_trace(), clips=0)
    (tmp_path / "config.yaml").write_text("model: tiny")
    assert glance(tmp_path)["next"].startswith(f"python scripts/evaluate.py --compare {tmp_path} ")

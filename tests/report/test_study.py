"""A study as figures and as tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic_trace import BINS

from moshi_ttt.errors import UserError
from moshi_ttt.report.drift import drift_figure
from moshi_ttt.report.figures import pixels
from moshi_ttt.report.study import Record, Variant, study_figure, variants_of
from moshi_ttt.report.study_table import study_table
from moshi_ttt.teacher_forcing.recall import wilson_interval

NEAR, FAR = [0.9, 0.6], [0.2, 0.0]  # of `BINS`: 4 and 20 s, 60 and 240 s


def record(name: str, far: float | None = None, **changes: Any) -> Record:
    """Results of a variant; with a memory, own facts beyond 30 s are right to the share `far`."""
    shares = {"kept": BINS["accuracy"]}
    if far is not None:
        shares = {"kept": [*NEAR, far, far], "reset": BINS["accuracy"], "other": [*NEAR, 0.1, 0.1]}
    recall = {
        memory: {"own": BINS | {"accuracy": share}, "heard": BINS}
        for memory, share in shares.items()
    }
    gates = {} if far is None else {"0": 0.4, "5": 0.9}
    losses = {"text": [0.5, 0.6], "first_codebook": [1.7, 1.8], "other_codebooks": [2.3, None]}
    return {
        "variant": {"name": name, "steps": 0 if far is None else 1200},
        "trained_sec": 300.0,
        "parameters": 1_234_567,
        "context_steps": 375,
        "context_sec": 30.0,
        "recall": recall,
        "nll": {"window_steps": 750, "start_step": [0, 750], "recordings": [7, 7], **losses},
        "gates": gates,
        "branch_ratios": {
            layer: {"median": gate / 2, "p95": 0.7, "p99": 0.8, "max": gate}
            for layer, gate in gates.items()
        },
    } | changes


def seeds(*far: float) -> list[Record]:
    found = []
    for seed, share in enumerate(far):
        name = "memory" if seed == 0 else f"memory_seed{seed}"
        variant = {"name": name, "steps": 1200, "seed": seed}
        one = record(name, share, variant=variant, trained_sec=300.0 + 20 * seed)
        found.append(one)
    return found


def rows(table: str, *first: str) -> list[list[str]]:
    """Cells of the rows that begin with `first`."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [row for row in cells if tuple(row[: len(first)]) == first]


def test_seeds_are_one_variant_with_mean_and_range() -> None:
    first, second, third = seeds(0.9, 0.8, 0.7)
    base = record("base")
    variants = variants_of([first, base, second, third])
    assert variants == [Variant("memory", (first, second, third)), Variant("base", (base,))]
    found = variants[0].mean("kept", "own")
    assert found is not None
    assert found["accuracy"] == pytest.approx([*NEAR, 0.8, 0.8])
    assert found["least"] == pytest.approx([*NEAR, 0.7, 0.7])
    assert found["most"] == pytest.approx([*NEAR, 0.9, 0.9])
    # of the words of one seed: all are asked for the same
    assert (found["low"][2], found["high"][2]) == pytest.approx(wilson_interval(0.8, 40))
    assert variants[1].mean("reset", "own") is None


def test_seeds_of_one_variant_upon_the_seeds_of_another_are_one_as_well() -> None:
    first, second = seeds(0.9, 0.8)
    for number, one in enumerate((first, second)):
        seed = f"_seed{number}" * bool(number)
        one["variant"] |= {"name": f"read{seed}", "weights": f"memory{seed}"}
    (found,) = variants_of([first, second])
    assert (found.name, len(found.records)) == ("read", 2)
    assert rows(study_table([found]), "read", "2")[0][3] == "as memory"


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": {"name": "memory_seed1", "seed": 1, "steps": 900}},
        {"context_steps": 188},
        {"recall": {"kept": {"own": BINS}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_seeds_that_differ_in_more_are_refused(changes: dict[str, Any]) -> None:
    first, second = seeds(0.9, 0.8)
    with pytest.raises(UserError, match=r"memory_seed1 differs from memory in more than its seed"):
        variants_of([first, {**second, **changes}])


def test_one_name_in_two_folders_is_no_second_seed() -> None:
    with pytest.raises(UserError, match="base: in more than one of these folders"):
        variants_of([record("base"), record("other"), record("base")])


def test_the_tables_hold_what_was_measured() -> None:
    table = study_table(variants_of([record("base"), *seeds(0.9, 0.8), record("once", 0.5)]))
    (trained,) = rows(table, "memory", "2")
    assert trained[2:6] == ["1,234,567", "1200", "310 (300 to 320)", "0.40 to 0.90"]
    # of the louder of two layers
    assert trained[6] == "0.450 (0.450 to 0.450)"
    assert trained[9] == "0.900 (0.900 to 0.900)"
    assert rows(table, "base", "1") == [["base", "1", "0", "0", *["-"] * 6]]
    own, heard = rows(table, "memory", "kept")
    assert own[2:] == [
        *("200", "90 (90 to 90)", "60 (60 to 60)", "85 (80 to 90)", "85 (80 to 90)"),
        "85 (80 to 90)",
    ]
    # 8 of 50 words
    assert heard[-1] == "16 (16 to 16)"
    assert rows(table, "memory", "reset")[0][5:] == ["20 (20 to 20)", "0 (0 to 0)", "16 (16 to 16)"]
    low, high = wilson_interval(0.5, 50)
    assert rows(table, "once", "kept")[0][-1] == f"50 [{100 * low:.0f} to {100 * high:.0f}]"
    assert len(rows(table, "base", "kept")) == 2
    assert rows(table, "base", "reset") == []
    assert table.count("gives 10\n") == 2
    assert rows(table, "base", "text") == [
        ["base", "text", "7", "0.500", "0.600", "1.200", "1.000"],
    ]
    assert rows(table, "base", "other codebooks")[0][4:] == ["-", "-", "-"]
    assert rows(table, "memory", "text")[0][4] == "0.600 (0.600 to 0.600)"
    assert "Free talk" not in table


def talk(name: str, words: list[float], **changes: Any) -> Record:
    """Results of a variant that has talked for as many minutes as there are `words`."""
    minutes = dict.fromkeys(("silence_share", "distinct_1", "codes_used"), [0.5] * len(words))
    jump = {"ratio": 1.24, "seconds": 60.4, "gradual": False}
    found = {
        "streams": 4,
        "searched": True,
        "jumps": [jump | {"ratio": 3.0, "gradual": True}, jump, jump | {"ratio": 1.1}],
        "norm_growth": 1.05,
        "branch_ratio": None,
        "step_ms": 20.0,
        "state_bytes": 4096,
        "by_minute": {"words_per_minute": words, **minutes},
    }
    return record(name, talk=found | changes)


def test_a_variant_is_seen_at_a_glance() -> None:
    unread = {"text": [], "first_codebook": [], "other_codebooks": [], "recordings": []}
    slow = talk("slow", [100.0, 50.0], jumps=[], branch_ratio=0.5)
    heard = {"voice_distance_db": [1.04, 2.25], "recogniser_agreement": [0.976, None]}
    slow["talk"]["by_minute"] |= heard
    slow |= {"recall": {}, "nll": {"window_steps": 750, "start_step": [], **unread}}
    worse = record("worse")
    worse["nll"]["text"] = [0.5, 0.9]
    table = study_table(variants_of([talk("base", [80.0, 80.0, 60.0]), slow, worse]))
    base, other, silent = (rows(table, name)[0][1:] for name in ("base", "slow", "worse"))
    low, high = (f"{100 * edge:.0f}" for edge in wilson_interval(38 / 90, 90))
    longer = f"{100 * wilson_interval(0, 10)[1]:.0f}"
    assert base[:2] == [f"42 [{low} to {high}]", "-"]
    assert base[2:5] == [f"0 [0 to {longer}]", "-", "1.20 (1.00)"]
    assert base[6:] == [
        *("-", "x1.24 at 60 s", "1.05", "-", "80, 60", "50, 50", "50, 50", "50, 50", "-", "-"),
        *("20.0", "4"),
    ]
    assert other[:8] == [*["-"] * 7, "none"]
    assert other[9:11] == ["0.50", "100, 50"]
    assert other[14:16] == ["1.0, 2.2", "98, -"]
    assert silent[4] == "1.80 (1.50)"
    assert silent[7:] == ["-"] * 11
    assert rows(table, "base", "words a minute") == [
        ["base", "words a minute", "80", "80", "60", "0.75"],
    ]
    (voice,) = rows(table, "slow", "voice off minute 1 (dB)")
    assert voice[2:] == ["1.04", "2.25", "2.16"]
    assert rows(table, "slow", "text") == []


@pytest.mark.filterwarnings("error")
def test_the_last_minute_is_drawn_against_the_first() -> None:
    worse = record("worse")
    worse["nll"]["text"] = [0.5, 0.9]
    figure = drift_figure(variants_of([talk("base", [80.0, 60.0]), worse]))
    assert pixels(figure).std() > 5
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:4] == ["1.00", "1.00", "-", "0.75"]  # of the base, losses against its own
    assert texts[7:] == ["1.50", "1.00", "-", *["-"] * 4]


def test_a_window_that_reaches_over_every_gap_leaves_nothing_beyond_it() -> None:
    for seconds in (240.0, None):
        table = study_table(variants_of([record("wide", context_sec=seconds)]))
        assert rows(table, "wide", "kept")[0][-1] == "-"


@pytest.mark.filterwarnings("error")
def test_the_figure_has_a_panel_a_class_and_dashes_for_the_memory_reset() -> None:
    narrow = record("narrow", context_steps=188, context_sec=15.04)
    figure = study_figure(variants_of([*seeds(0.9, 0.7), record("base"), narrow]))
    assert pixels(figure).std() > 5
    own, heard = figure.axes
    lines = {str(line.get_label()): line for line in own.lines}
    assert [name for name in lines if not name.startswith("_")] == [
        *("memory", "memory, reset", "base", "narrow"),
    ]
    np.testing.assert_allclose(lines["memory"].get_ydata(), [*NEAR, 0.8, 0.8])
    np.testing.assert_allclose(lines["memory, reset"].get_ydata(), [*NEAR, *FAR])
    assert lines["memory, reset"].get_linestyle() == "--"
    assert lines["memory, reset"].get_color() == lines["memory"].get_color()
    # intervals and seeds of all four curves
    assert len(own.collections) == 8
    assert [text.get_text() for text in own.texts] == [
        *("chance", "attention window\n30 s", "attention window\n15.04 s"),
    ]
    assert [own.texts[1].get_color(), own.texts[2].get_color()] == [
        *("#4a4a4a", lines["narrow"].get_color()),
    ]
    assert "heard" in heard.get_ylabel()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4
    assert "bars: seeds" in own.get_title(loc="right")


@pytest.mark.filterwarnings("error")
def test_many_variants_are_drawn_without_their_intervals() -> None:
    figure = study_figure(variants_of([record(f"v{number}", 0.5) for number in range(9)]))
    assert pixels(figure).std() > 5
    assert figure.axes[0].get_title(loc="right") == "dashed: memory reset before each question"

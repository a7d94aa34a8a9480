"""The report's figures of the inside of the layers, and its words about what can be heard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from synthetic_trace import make_trace

from moshi_ttt.errors import UserError
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report.audible import audible_finding, audible_section
from moshi_ttt.report.figures import pixels
from moshi_ttt.report.inside import inside_figures
from moshi_ttt.report.text import CAPTIONS


def measure(before: float, after: float, half: float) -> dict[str, float]:
    change = after - before
    return {
        "before": before,
        "after": after,
        "change": change,
        "low": change - half,
        "high": change + half,
    }


def position(**measures: Any) -> dict[str, Any]:
    return {"names": ["2C", "legacy token 6000"], "step": 750, "measures": measures}


def quality(*positions: Any) -> dict[str, Any]:
    return {"window_sec": 5.0, "audible": True, "positions": list(positions)}


def test_a_finding_names_what_changes_and_of_how_many() -> None:
    one = position(rms=measure(0.1, 0.3, 0.05), distinct_2=measure(0.9, 0.91, 0.2))
    assert audible_finding(one) == (
        "2C, legacy token 6000: 1 of 2 measures change: level (RMS) 0.1 to 0.3."
    )
    calm = position(rms=measure(0.1, 0.1, 0.05))
    assert audible_finding(calm).endswith("none of 1 measures of sound, text and codes changes.")
    single = position(rms=measure(0.1, 0.9, math.nan))
    assert "too few streams" in audible_finding(single)


def test_the_section_has_a_table_and_the_sound(tmp_path: Path) -> None:
    path = tmp_path / "stream_00_at_2C.wav"
    soundfile.write(path, np.zeros((24_000, 2)), 24_000)
    one = position(rms=measure(0.1, 0.3, 0.05), nll_text=measure(2, 2.5, math.nan))
    text = "\n".join(audible_section(quality(one), [path]))
    assert "0.1 to 0.3 *" in text
    assert "2 to 2.5<" in text  # without an interval there is no star
    assert "stream 00 at 2C" in text
    assert "data:audio/ogg" in text
    assert audible_section(quality(), []) == []


def measured() -> Trace:
    trace = make_trace(shape=(2, 4, 900))
    fields = {name: getattr(trace, name) for name in Trace.__slots__}
    generator = np.random.default_rng(0)
    for name in ("input_max", "attention_norm", "ffn_norm"):
        fields[name] = 1 + generator.random((2, 4, 900))
    for name in ("fast_weight_norm", "fast_weight_distance", "write_gate"):
        fields[name] = 1 + generator.random((2, 2, 900))
    fields["step_ms"] = 15 + generator.random(900)
    fields["attention_mass_layers"] = np.array([0, 3])
    fields["attention_mass_steps"] = np.arange(0, 900, 25)
    fields["attention_mass"] = generator.random((2, 2, 36, 3))
    return Trace(**fields)


def test_figures_are_drawn_of_what_was_measured_only() -> None:
    assert inside_figures(make_trace()) == {}
    figures = inside_figures(measured())
    assert set(figures) == {"contributions", "fast_weights", "attention_mass", "pace"}
    assert set(figures) < set(CAPTIONS)
    for name, figure in figures.items():
        picture = pixels(figure)
        assert picture.shape[1:] == (1600, 3), name
        assert picture.std() > 5, name


def test_what_stays_the_same_in_a_run_has_no_panel() -> None:
    trace = measured()
    labels = [axes.get_ylabel() for axes in inside_figures(trace)["fast_weights"].axes]
    # forgetting was not measured
    assert [label.split("\n")[0] for label in labels] == [
        "from where they began",
        "fast weights",
        "write gate",
        "inner updates",
    ]
    for name in ("fast_weight_norm", "fast_weight_distance", "write_gate", "inner_updates"):
        getattr(trace, name)[:] = 1.0
    assert len(inside_figures(trace)["fast_weights"].axes) == 1


def test_what_was_not_measured_survives_saving_as_not_measured(tmp_path: Path) -> None:
    make_trace().save(tmp_path)
    trace = Trace.load(tmp_path)
    assert np.isnan(trace.step_ms).all()
    assert trace.attention_norm.shape == trace.input_norm.shape
    assert trace.attention_mass.size == 0
    measured().save(tmp_path)
    trace = Trace.load(tmp_path)
    assert trace.attention_mass.shape == (2, 2, 36, 3)
    assert np.isfinite(trace.step_ms).all()


@pytest.mark.parametrize("lost", ["step_ms", "write_gate", "channels", "text_padding_ids"])
def test_traces_of_another_version_are_refused_with_the_remedy(tmp_path: Path, lost: str) -> None:
    make_trace().save(tmp_path)
    path = tmp_path / "traces.npz"
    with np.load(path) as data:
        kept = {name: data[name] for name in data.files if name != lost}
    meta = json.loads(str(kept["meta"]))
    meta.pop(lost, None)
    np.savez(path, **kept | {"meta": np.array(json.dumps(meta))})
    with pytest.raises(UserError, match=rf"not a trace of this version.*{lost}.*evaluate again"):
        Trace.load(tmp_path)


def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    trace = make_trace()
    fields = {name: getattr(trace, name) for name in Trace.__slots__}
    for name, axes in (("text_tokens", "St"), ("gate", "SMT"), ("step_ms", "T")):
        with pytest.raises(ValueError, match=rf"{name} is .* its axes {axes} are"):
            Trace(**fields | {name: fields[name][..., :-1]})
    make_trace().save(tmp_path)
    path = tmp_path / "traces.npz"
    with np.load(path) as data:
        kept = {name: data[name] for name in data.files}
    np.savez(path, **kept | {"codes": kept["codes"][:1]})
    with pytest.raises(UserError, match=r"codes is .* its axes SQt are"):
        Trace.load(tmp_path)

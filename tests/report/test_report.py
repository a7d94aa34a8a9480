from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import soundfile
from synthetic_trace import make_trace, write_evaluation

from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.errors import UserError
from moshi_ttt.evaluation.folder import find_evaluations
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.model.rings import CacheSnapshot
from moshi_ttt.report import compare_report, html, write_report
from moshi_ttt.report.figures import (
    evaluation_figures,
    norm_figure,
    pixels,
)
from moshi_ttt.report.overlays import comparison_figures
from moshi_ttt.report.tables import half_life_table
from moshi_ttt.report.text import findings


class Page(HTMLParser):
    """Collects tags and text, and checks that every element is closed in order."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.links: list[str] = []
        self.count: dict[str, int] = {}
        self.words: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def make_run(folder: Path, epochs: int = 2) -> Path:
    """A training run; its jump is at 61.04 s."""
    for epoch in range(epochs):
        trace = make_trace(label=f"epoch {epoch} <b>", seed=epoch, jump_at=763)
        write_evaluation(folder / "longgen" / f"epoch_{epoch:03d}", trace)
    config = "trainer: {}\ndata:\n  name: <script>alert('x')</script>\n"
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Report of a training run with two finished evaluations and an unfinished one."""
    run = make_run(tmp_path_factory.mktemp("runs") / "long60s" / "000")
    make_trace(label="torn").save(run / "longgen" / "epoch_002")
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path)


def test_report_of_a_run_tells_where_the_jump_is_in_three_clocks(page: Page) -> None:
    assert "long60s/000" in page.text
    assert "at step 763 (61.04 s, legacy token 6104), 13 steps after 2C" in page.text
    assert "cannot tell which one matters" in page.text


def test_report_shows_every_figure_clip_and_ring(page: Page) -> None:
    assert page.count["img"] == 6 + 3
    assert page.count["audio"] == 2
    assert page.count["input"] == page.count["img"]  # each can be shown larger
    first, experts = page.text.index("In 72 s of talking"), page.text.index("For experts")
    assert (
        first < page.text.index("trained on the bundled") < page.text.index("Loss on rec") < experts
    )
    folded = re.findall(r"<details>.*?</details>", page.source, flags=re.DOTALL)
    assert any("epoch 1 &lt;b&gt;: heat_map" in one for one in folded)
    assert not any("epoch 1 &lt;b&gt;: input_norm" in one for one in folded)
    assert "transformer.layers.[0-3].self_attn" in page.text


def test_report_needs_nothing_but_itself(page: Page) -> None:
    assert all(link.startswith("data:") for link in page.links)
    assert "http" not in re.sub(r"data:[^\"]*", "", page.source)
    assert "url(" not in page.source


def test_whatever_comes_from_outside_is_escaped(page: Page) -> None:
    assert "script" not in page.count
    assert "b" not in page.count
    assert "<script>alert('x')</script>" in page.text
    assert "Hello <b> " in page.text
    assert "epoch 1 <b>" in page.text


def test_an_unfinished_evaluation_is_passed_over(page: Page) -> None:
    assert "torn" not in page.text


def test_embedded_audio_is_the_clip(page: Page) -> None:
    link = next(link for link in page.links if link.startswith("data:audio/ogg"))
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(link.partition(",")[2])))
    assert rate == 24_000
    assert samples.shape == (48_000, 2)
    spectrum = np.abs(np.fft.rfft(samples[:, 0]))
    assert np.argmax(spectrum) == 440  # 220 Hz for 2 s, on the left


def test_long_audio_is_cut_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "AUDIO_LIMIT_SEC", 2.5)
    soundfile.write(tmp_path / "long.wav", np.zeros(4 * 24_000), 24_000)
    text = html.player(tmp_path / "long.wav", "epoch 1")
    assert "epoch 1 (the first 2.5 s)" in text
    data = re.search(r"base64,([^\"]+)", text)
    assert data is not None
    assert soundfile.info(io.BytesIO(base64.b64decode(data[1]))).frames == 60_000


def test_vanilla_without_audio_and_loss_has_a_report(tmp_path: Path) -> None:
    trace = make_trace(label="tiny (vanilla)", hybrid_layers=(), trained_steps=None)
    write_evaluation(tmp_path / "longgen" / "evaluation", trace, nll=False, clips=0)
    page = Page(write_report(tmp_path))
    assert "In 72 s of talking no norm jumps." in page.text
    assert "There is no memory." in page.text
    assert page.count["img"] == 3
    assert "audio" not in page.count
    assert "nan" not in page.text.lower()


def test_one_evaluation_folder_by_itself_has_a_report(tmp_path: Path) -> None:
    write_evaluation(tmp_path, make_trace())
    assert write_report(tmp_path) == tmp_path / "report.html"


def test_a_folder_without_evaluations_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json"):
        write_report(tmp_path)


def test_comparison_lays_runs_of_different_context_over_each_other(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "long60s" / "000", epochs=1)
    other = tmp_path / "vanilla" / "longgen" / "evaluation"
    trace = make_trace(
        label="tiny (vanilla)", hybrid_layers=(), context_steps=250, jump_at=513, trained_steps=None
    )
    write_evaluation(other, trace, nll=False, clips=0)
    out = compare_report([run, other, run], tmp_path / "out" / "compare.html")
    page = Page(out)
    assert "long60s/000, epoch 0 <b> [1]" in page.text
    assert "long60s/000, epoch 0 <b> [3]" in page.text
    assert "13 steps after 2C;" in page.text
    assert page.count["img"] == 3


def test_many_evaluations_are_all_in_the_table_and_few_in_the_overlays(tmp_path: Path) -> None:
    for epoch in range(10):
        trace = make_trace(label=f"epoch {epoch}", shape=(1, 2, 250), hybrid_layers=(1,))
        write_evaluation(tmp_path / "longgen" / f"epoch_{epoch:03d}", trace, clips=0)
    page = Page(write_report(tmp_path))
    assert all(f"epoch {epoch}" in page.text for epoch in range(10))
    assert page.count["img"] == 5 + 3


def test_rings_of_the_depformer_are_not_measured_in_seconds(tmp_path: Path) -> None:
    trace = make_trace()
    trace.rings.append(CacheSnapshot("depformer.layers.0.self_attn", 8, 8))  # type: ignore[attr-defined]
    write_evaluation(tmp_path, trace)
    source = Page(write_report(tmp_path)).source
    row = re.search(r"<tr><td>depformer\.layers\.\[0\]\.self_attn.*?</tr>", source)
    assert row is not None
    cells = re.findall(r">([^<>]+)</td>", row[0])
    assert cells[:6] == ["depformer.layers.[0].self_attn", "8", "-", "8", "0", "0"]
    assert cells[6:9] == ["0 to 7", "-", "-"]  # held, lost, overwritten


def test_half_lives_are_said_of_the_fastest_the_middle_and_the_slowest_head() -> None:
    trace = make_trace()
    assert half_life_table(trace) == ""  # not measured
    rates = np.log(2) * 0.08 / np.array([[3.0, 50.0, 600.0], [150.0, 7200.0, 8e6]])
    trace = dataclasses.replace(trace, head_forgetting=rates)
    assert re.findall(r"<td[^>]*>([^<]*)</td>", half_life_table(trace)) == [
        *("2", "3 s", "50 s", "10 min"),
        *("3", "2.5 min", "2 h", "92.6 days"),
    ]


def test_findings_warn_of_norms_that_are_not_finite() -> None:
    trace = make_trace()
    trace.input_norm[1, 0, 600:] = np.inf
    assert any("Norms of 1 of 4 streams are not finite" in line for line in findings(trace, []))


def test_findings_say_that_a_position_was_not_reached() -> None:
    lines = findings(make_trace(context_steps=600), [])
    assert any(
        line.startswith("2C, step 1200 (96.00 s, legacy token 9600), lies beyond") for line in lines
    )


def test_evaluations_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    evaluations = find_evaluations(make_run(tmp_path))
    assert [one.label for one in evaluations] == ["epoch 0 <b>", "epoch 1 <b>"]
    assert evaluations[0].jumps == find_jumps(evaluations[0].trace())
    assert evaluations[0].events[-1]["event"] == "jump"
    assert evaluations[0].nll is not None
    path = evaluations[0].folder / "nll.json"
    path.write_text(json.dumps({"window_steps": 63, "start_step": [], "text": []}))
    assert evaluations[0].nll is None


def broken_trace() -> Trace:
    trace = make_trace(shape=(1, 2, 40), hybrid_layers=(0,), prompt_steps=39)
    for array in (trace.input_norm, trace.branch_ratio, trace.gate, trace.text_entropy):
        array[:] = np.nan
    return trace


@pytest.mark.parametrize(
    "trace",
    [
        make_trace(shape=(1, 1, 300), hybrid_layers=()),
        make_trace(shape=(2, 12, 300), hybrid_layers=(3, 4)),
        broken_trace(),
    ],
    ids=["one stream, one layer", "more layers than a legend holds", "nothing measured, tiny"],
)
@pytest.mark.filterwarnings("error")
def test_figures_of_unusual_runs_are_drawn_without_warnings(trace: Trace) -> None:
    figures = evaluation_figures(trace, find_jumps(trace), None, None)
    figures |= comparison_figures({"a": trace, "b": trace}, *[{"a": None, "b": None}] * 2)
    for figure in figures.values():
        assert pixels(figure).std() > 5


def test_a_found_jump_is_marked_in_the_figure() -> None:
    trace = make_trace(jump_at=763)
    jumps = find_jumps(trace)
    texts = [text.get_text() for text in norm_figure(trace, jumps).axes[0].texts]
    assert "2C\ntrained length\nlegacy token 6000" in texts
    assert any(f"step {jumps[0].step} = {0.08 * jumps[0].step:.1f} s" in text for text in texts)


def test_figures_leave_the_global_settings_alone() -> None:
    before = dict(mpl.rcParams)
    pixels(norm_figure(make_trace(), []))
    assert dict(mpl.rcParams) == before

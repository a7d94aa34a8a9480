"""The first sentences of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_trace import (
    BINS,
    RECALL,
    make_trace,
    quiet,
    remembered,
    trace_of,
    write_evaluation,
)

from moshi_ttt.diagnosis.jumps import find_jumps
from moshi_ttt.evaluation.folder import Evaluation
from moshi_ttt.files import write_json
from moshi_ttt.instruments.trace import Trace
from moshi_ttt.report import headline, write_report
from moshi_ttt.report.text import findings


@pytest.fixture
def say(tmp_path: Path) -> Any:
    """What the headline says of a trace, recall and losses."""

    def said(trace: Trace, recall: Any = None, nll: Any = None, contexts: Any = None) -> str:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        write_evaluation(folder, trace, nll=False, clips=0)
        for name, content in (("probes", recall), ("nll", nll), ("contexts", contexts)):
            if content is not None:
                write_json(folder / f"{name}.json", content)
        return "\n".join(headline(Evaluation.load(folder), trace))

    return said


def losses(seconds: float, *minutes: float) -> dict[str, Any]:
    """Windows of 5.04 s until `seconds`, a value a minute; the first codebook costs 1 more."""
    starts = range(0, round(12.5 * seconds), 63)
    text = [minutes[int((start + 31.5) * 0.08 // 60)] for start in starts]
    text[0] = None  # type: ignore[call-overload]
    codes = [None if value is None else value + 1 for value in text]
    return {"window_steps": 63, "start_step": [*starts], "text": text, "first_codebook": codes}


def test_a_memory_that_is_used_is_said_to_be_with_both_controls_and_chance(say: Any) -> None:
    recall = remembered(0.92, 0.1, 0.12)
    text = say(make_trace(context_steps=188), recall)
    verdict, own, heard, *_ = text.splitlines()
    # 30 of 50 at 20 s whatever the memory, and 92, 10 and 12 % of 50 further back
    assert own == (
        "Recall of what Moshi had said, once attention (the last 15 s) no longer holds it: of 100 "
        "answer words 76% [67%, 83%] are right with its memory, 35% [26%, 45%] with the memory "
        "emptied and 36% [27%, 46%] with another conversation's (guessing: 10%); about 60 s later "
        "92%, 10% and 12% of 40."
    )
    assert heard.startswith("Recall of what only the user had said, once attention")
    assert heard.endswith("about 60 s later 20%, 20% and 20% of 40.")
    assert verdict.startswith("The memory is used for what Moshi had said: ")


def test_a_memory_that_does_not_beat_both_controls_is_not_shown_to_be_used(say: Any) -> None:
    for other in (0.92, None):  # as good with another conversation's; only one recording
        text = say(make_trace(context_steps=188), remembered(0.92, 0.1, other))
        assert "76% [67%, 83%] are right with its memory" in text
        assert ("another conversation's" in text) == (other is not None)
        assert text.startswith("That the memory is used is not shown: ")


def test_a_model_without_a_memory_is_told_without_controls_and_verdict(say: Any) -> None:
    text = say(make_trace(hybrid_layers=()), RECALL)
    # attention sees 30 s: of 40 words at 60 s and 10 at 240 s, 8 are right
    assert "of 50 answer words 16% [8%, 29%] are right (guessing: 10%); about 60 s" in text
    assert "\nThere is no memory.\n" in text
    assert "used" not in text
    assert "the user" not in text


def test_recall_is_told_at_the_gap_nearest_to_a_minute_that_was_asked_for(say: Any) -> None:
    late = {"kept": {"own_unseen": {key: values[3:] for key, values in BINS.items()}}}
    assert "; about 240 s later 0% of 10." in say(make_trace(), late)
    near = {"kept": {"own": {key: values[:1] for key, values in BINS.items()}}}
    text = say(make_trace(), near)
    assert text.startswith("Nothing was asked for that attention, which sees 30 s, had lost.\n")
    assert say(make_trace()).startswith("No planted fact was asked for")


def test_the_loss_is_told_for_every_whole_minute(say: Any) -> None:
    text = say(make_trace(), nll=losses(195, 2.0, 2.1, 2.2, 9.0))
    assert (
        "The loss on recordings is, minute by minute, 2.00, 2.10 and 2.20 for words, and 3.00, "
        "3.10 and 3.20 for the first codebook (nats a token).\nIn 72 s"
    ) in text


def test_the_loss_behind_contexts_is_told_with_what_more_of_it_helps(say: Any) -> None:
    contexts = {"context_sec": [100, 10], "text": [[2.0, 2.5], [2.2, 2.5], [None, 9.0]]}
    contexts["first_codebook"] = [[None, None]] * 3
    assert say(make_trace(), contexts=contexts).splitlines()[1] == (
        "Behind 10 s and behind 100 s of what was said before them, the same seconds of recordings "
        "cost 2.50 and 2.10 for words (-0.400 [-1.671, +0.871]) (nats a token; negative: more "
        "helps)."
    )
    alone = {key: [[2.0]] for key in ("text", "first_codebook")} | {"context_sec": [10]}
    assert "Behind" not in say(make_trace(), contexts=alone)


def test_less_than_two_minutes_of_loss_are_not_compared(say: Any) -> None:
    text = say(make_trace(), nll=losses(72, 2.0, 2.0))
    assert "over less than two minutes, 2.00 for words, and 3.00 for the first codebook" in text
    # read for two minutes, by recordings of one
    short = losses(125, 2.0, 2.1, 2.2)
    short["text"][14:] = [None] * len(short["text"][14:])
    assert "over less than two minutes" in say(make_trace(), nll=short)
    assert "loss" not in say(make_trace())


def test_a_jump_is_told_with_its_place_and_the_memory_with_its_share(say: Any) -> None:
    trace = make_trace(jump_at=763)
    text = say(trace)
    assert "In 72 s of talking there is a jump: input norm x1.4" in text
    assert "at step 763 (61.04 s, legacy token 6104), 13 steps after 2C = trained l" in text
    assert "; layers 1-3.\nThe memory adds" in text
    share = np.median(trace.branch_ratio[:, :, 100:], axis=(0, 2))
    layer = (2, 3)[int(share.argmax())]
    added = (
        f"The memory adds {share.max():.1%} of the residual's norm in layer {layer}, where it adds"
    )
    assert f"\n{added} most.\n" in text


def test_whether_the_fast_weights_move_is_told_with_the_memory(say: Any) -> None:
    trace = make_trace()
    trace.fast_weight_norm[:] = 5.0
    trace.fast_weight_distance[:] = 0.0
    assert "adds most; its fast weights stay where they began.\n" in say(trace)
    trace.fast_weight_distance[:, 1, -1] = 2.0
    line = "its fast weights end 0% to 40% of their norm away from where they began.\n"
    assert line in say(trace)


def test_growth_is_told_from_a_jump(say: Any) -> None:
    ramp = np.log(1.6) * np.clip((np.arange(900) - 400) / 100, 0, 1)
    grown = trace_of(quiet() + ramp)
    assert "in 72 s of talking there is growth, no jump: input norm grows x1." in say(grown).lower()
    (line, *_) = findings(grown, find_jumps(grown))
    assert line.startswith("Growth, no jump: input norm grows x1.")
    assert line.endswith("% of the streams rise.")
    both = trace_of(quiet() + ramp + np.log(1.5) * (np.arange(900) >= 700))
    assert "there are 2 lasting rises, the largest: input norm" in say(both)


def test_no_jump_is_told_apart_from_none_that_could_be_seen(say: Any) -> None:
    assert "In 72 s of talking no norm jumps.\n" in say(make_trace())
    short = make_trace(shape=(2, 2, 200), hybrid_layers=(), prompt_steps=20)
    assert "In 16 s of talking no jump of the norms could be seen.\nThere" in say(short)
    broken = make_trace(hybrid_layers=(1,))
    broken.input_norm[..., 500] = np.nan
    broken.branch_ratio[:] = np.nan
    assert "In 72 s of talking no jump of the norms could be seen.\n" in say(broken)
    assert "memory" not in say(broken)
    read = make_trace(prompt_steps=900)
    assert "In 72 s of reading no norm jumps.\n" in say(read)


def test_speed_is_told_last_in_steps_and_in_real_time(say: Any) -> None:
    assert say(make_trace()).endswith(
        "\n72 steps a second of 4 streams at once: 5.8 times real time."
    )


def test_a_report_begins_with_it(tmp_path: Path) -> None:
    trace = make_trace(jump_at=763)
    write_evaluation(tmp_path, trace)
    text = write_report(tmp_path).read_text()
    title = text.index("</h1>")
    first = text[title:].split("<li>", 3)
    assert first[1].startswith("No planted fact was asked for.</li>")
    assert first[2].startswith("The loss on recordings is, ")
    assert "In 72 s of talking there is a jump" in first[3]

"""The memory probes of generated conversations: gaps, classes, words."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conversation_fakes import (
    SPLITS,
    bare,
    every_plan,
    every_probe,
)


def test_a_question_comes_after_its_gap_and_not_long_after(plans: dict[str, list[Any]]) -> None:
    late_sec = []
    for probe in every_probe(plans):
        record = probe.record()
        last_mention = (record["echo"] or record["fact"])[-1][1][1]
        assert record["gap_sec"] == pytest.approx(record["asked_at"] - last_mention, abs=2e-3)
        assert record["asked_at"] < record["answer"][0][1][0]
        late_sec.append(record["gap_sec"] - probe.drawn_gap_sec)
    # rounding to the millisecond may take a little
    assert min(late_sec) >= -2e-3
    assert np.median(late_sec) < 1.5
    # questions that are due at once wait for each other
    assert np.quantile(late_sec, 0.95) < 10


def test_gaps_are_short_in_training_long_in_far_and_spread_in_held_out_sets(
    scripts: dict[str, ModuleType], plans: dict[str, list[Any]]
) -> None:
    def share(split: str, *gaps_sec: float) -> float:
        drawn = [probe.drawn_gap_sec for plan in plans[split] for probe in plan.probes]
        return sum(gap_sec in gaps_sec for gap_sec in drawn) / len(drawn)

    assert 0.6 < share("train", 1, 3, 4, 6, 8) < 0.98
    assert 0.75 < share("far", 20, 40, 60, 90, 120) < 0.98
    assert share("far", 180, 240) == 0
    assert 0.05 < share("farther", 180, 240) < 0.3
    for gap_sec in scripts["splits"].SPREAD.gap_shares:
        for split in ("heldout", "final"):
            assert 0.05 < share(split, gap_sec) < 0.18


def test_facts_of_one_kind_crowd_where_they_are_to_be_mixed_up(plans: dict[str, list[Any]]) -> None:
    def rivals(split: str) -> float:
        found = []
        for plan in plans[split]:
            facts = [(one.fact.kind, one.planted.start_sec, one.asked) for one in plan.probes]
            for kind, planted_sec, asked in facts:
                assert asked is not None
                span = planted_sec, asked.start_sec
                found.append(sum(k == kind and span[0] < at < span[1] for k, at, _ in facts))
        return float(np.mean(found))

    # as many in training as where it is measured, and many more
    assert rivals("farther") == pytest.approx(rivals("heldout"), rel=0.5)
    assert rivals("crowded") > 2 * rivals("farther")


def test_shares_of_gaps_add_up(scripts: dict[str, ModuleType]) -> None:
    for split in scripts["splits"].SPLITS.values():
        for pace in split.paces:
            assert sum(pace.gap_shares.values()) == pytest.approx(1)


def test_calm_and_drilling_conversations_are_both_trained_on(plans: dict[str, list[Any]]) -> None:
    every_sec = [plan.duration_sec / len(plan.probes) for plan in plans["train"]]
    assert min(every_sec) < 12 < 14 < max(every_sec)
    for split in ("far", "farther", "crowded", "heldout", "final"):
        assert all(8 < plan.duration_sec / len(plan.probes) < 18 for plan in plans[split])


def test_most_facts_of_a_drill_are_planted_asked_and_answered_within_a_clip_of_15_s(
    plans: dict[str, list[Any]],
) -> None:
    drills = [p for p in plans["train"] if max(q.drawn_gap_sec for q in p.probes) <= 8]
    assert drills
    assert len(drills) < len(plans["train"])
    spans_sec = [
        probe.answered.end_sec - (probe.echo or probe.planted).start_sec
        for drill in drills
        for probe in drill.probes
    ]
    assert np.quantile(spans_sec, 0.75) < 15


def test_the_user_asks_nearly_always(plans: dict[str, list[Any]]) -> None:
    records = [probe.record() for probe in every_probe(plans)]
    assert 0.9 < np.mean([r["asked_by"] == "SPEAKER_USER" for r in records]) < 0.99


def test_most_facts_are_the_answering_sides_own_in_training_and_half_in_held_out_sets(
    plans: dict[str, list[Any]],
) -> None:
    for split, share in zip(SPLITS, (0.7, 0.7, 0.7, 0.7, 0.5, 0.5), strict=True):
        own = [probe.fact.recall_class == "own" for p in plans[split] for probe in p.probes]
        assert np.mean(own) == pytest.approx(share, abs=0.08)


def test_an_own_fact_is_said_key_first_by_who_answers_and_a_heard_one_only_in_the_answer(
    plans: dict[str, list[Any]],
) -> None:
    for plan in every_plan(plans):
        replies = {id(said): reply for said, reply in itertools.pairwise(plan.placed)}
        for probe in plan.probes:
            record, fact = probe.record(), probe.fact
            key = fact.key.replace("my ", "your ").lower()

            def text(placed: Any) -> str:
                return " ".join(bare(word) for word, _ in placed.words)

            value = fact.value.lower()
            assert text(probe.planted).endswith(value)
            for said in (probe.answered, probe.echo):
                if said is not None:
                    assert f"{key} " in text(said)
                    assert text(said).index(key) < text(said).rindex(value)
            assert (probe.echo is not None) == (record["class"] == "own")
            if record["class"] == "heard":
                assert record["echo"] == []
                promise = replies[id(probe.planted)]
                assert promise.speaker == 1 - probe.owner
                assert not {value, fact.kind} & set(text(promise).split())


def test_a_question_ends_after_it_began_and_before_the_answer(plans: dict[str, list[Any]]) -> None:
    for plan in every_plan(plans):
        words = {(speaker, span[1]) for _, span, speaker in plan.alignments()}
        for probe in plan.probes:
            record = probe.record()
            assert record["asked_at"] < record["asked_until"] < record["answer"][0][1][0]
            assert (record["asked_by"], record["asked_until"]) in words


def test_only_held_out_sets_have_unseen_templates_keys_and_values(
    scripts: dict[str, ModuleType], plans: dict[str, list[Any]]
) -> None:
    kinds = scripts["probe_words"].KINDS
    for split, share in zip(SPLITS, (0, 0, 0, 0, 0.25, 0.5), strict=True):
        records = [probe.record() for plan in plans[split] for probe in plan.probes]
        assert np.mean([bool(r["unseen"]) for r in records]) == pytest.approx(share, abs=0.07)
        for record in records:
            kind = kinds[record["kind"]]
            assert record["key"] in kind.keys.of("key" in record["unseen"])
            for word, _ in record["answer"]:
                assert word.strip(".") in kind.values.of("value" in record["unseen"])
        if share:
            for part in ("template", "key", "value"):
                assert 0.2 < np.mean([part in r["unseen"] for r in records if r["unseen"]]) < 0.8


def test_unseen_templates_are_said_by_those_probes_that_name_them(
    scripts: dict[str, ModuleType],
) -> None:
    words, rng = scripts["probe_words"], np.random.default_rng(0)
    for unseen, recall_class in itertools.product(((), ("template",)), ("own", "heard")):
        fact = scripts["probes"].Fact("day", "my free day", "Friday", recall_class, unseen)
        echo = words.ECHO if recall_class == "own" else words.PROMISE
        for say, choice in (
            (fact.plant, words.PLANT),
            (fact.acknowledge, echo),
            (fact.ask, words.ASK),
            (fact.answer, words.ANSWER),
        ):
            yours = say in (fact.acknowledge, fact.answer)
            key = "your free day" if yours else "my free day"
            possible = {t.format(key=key, value="Friday") for t in choice.of(bool(unseen))}
            assert {say(rng) for _ in range(300)} == possible


def test_nothing_is_both_seen_and_unseen_and_what_is_unseen_has_words_that_training_says(
    scripts: dict[str, ModuleType],
) -> None:
    words = scripts["probe_words"]
    kinds = words.KINDS.values()
    choices = [words.PLANT, words.ECHO, words.PROMISE, words.ASK, words.ANSWER]
    choices += [choice for kind in kinds for choice in (kind.keys, kind.values)]
    keys = [key for kind in kinds for key in kind.keys.all]
    assert len(set(keys)) == len(keys)
    talk = scripts["conversation"].conversation(np.random.default_rng(0))
    said = {
        bare(word)
        for contribution in itertools.islice(talk, 2000)
        for sentence in contribution.sentences
        for word in sentence.split()
    }
    said |= {word for choice in choices for text in choice.seen for word in text.split()}
    for choice in choices:
        assert choice.unseen
        assert not set(choice.seen) & set(choice.unseen)
        for text in choice.unseen:
            assert {bare(word) for word in text.split() if "{" not in word} <= said, text


def test_templates_end_with_the_value_and_answers_name_the_key_before_it(
    scripts: dict[str, ModuleType],
) -> None:
    words = scripts["probe_words"]
    for template in words.PLANT.all + words.ECHO.all + words.ANSWER.all:
        assert template.endswith("{key} is {value}.") or template.endswith("{key} was {value}.")
    assert not any("{" in template for template in words.PROMISE.all)
    assert all("{key}" in template and "{value}" not in template for template in words.ASK.all)

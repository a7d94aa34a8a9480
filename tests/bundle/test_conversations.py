"""What is said in generated conversations, and when."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
from conversation_fakes import (
    SPLITS,
    bare,
    every_plan,
    every_probe,
    make_plan,
)


def test_a_seed_says_the_same_again_and_another_seed_does_not(
    scripts: dict[str, ModuleType],
) -> None:
    first, again, other = (make_plan(scripts, "train", seed, minutes=2) for seed in (1, 1, 2))
    assert first.alignments() == again.alignments()
    assert [p.record() for p in first.probes] == [p.record() for p in again.probes]
    assert first.alignments() != other.alignments()


def test_a_recipe_depends_on_nothing_before_it(scripts: dict[str, ModuleType]) -> None:
    make = scripts["make_conversations"]
    few, many = (list(make.recipes(hours, "train", 0, (3.0, 15.0))) for hours in (1, 4))
    assert many[: len(few)] == few
    assert [recipe.least_sec for recipe in many[: len(few)]] == [r.least_sec for r in few]
    assert all(180 <= recipe.least_sec <= 900 for recipe in many)
    assert sum(recipe.least_sec for recipe in many) >= 4 * 3600
    assert len({float(recipe.rng(1).random()) for recipe in many}) == len(many)
    later = list(make.recipes(1, "train", 0, (3.0, 15.0), first=2))
    assert later[:3] == many[2:5]


def test_splits_and_seeds_draw_different_numbers(scripts: dict[str, ModuleType]) -> None:
    recipe = scripts["make_conversations"].Recipe
    drawn = {
        float(recipe(seed, split, 0, (3.0, 15.0)).rng(stream).random())
        for seed, split, stream in itertools.product((0, 1), SPLITS, (0, 1))
    }
    assert len(drawn) == 2 * len(SPLITS) * 2


def test_conversations_reach_their_length_and_end_soon_after(plans: dict[str, list[Any]]) -> None:
    for plan in every_plan(plans):
        assert 480 <= plan.duration_sec < 520


def test_nobody_talks_over_himself(plans: dict[str, list[Any]]) -> None:
    for plan, side in itertools.product(every_plan(plans), ("SPEAKER_MAIN", "SPEAKER_USER")):
        spans = [span for _, span, speaker in plan.alignments() if speaker == side]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_every_fact_is_asked_once_and_answered_as_planted(plans: dict[str, list[Any]]) -> None:
    for probe in every_probe(plans):
        record = probe.record()
        said = [" ".join(word for word, _ in record[name]) for name in ("fact", "answer")]
        assert said[0] == said[1] == probe.fact.value + "."
        if record["echo"]:
            assert " ".join(word for word, _ in record["echo"]) == said[0]
    for plan in every_plan(plans):
        asked = [id(probe.asked) for probe in plan.probes]
        assert len(set(asked)) == len(asked)


def test_the_value_is_said_by_those_the_probe_names(plans: dict[str, list[Any]]) -> None:
    for plan in every_plan(plans):
        words = {(word, span, speaker) for word, span, speaker in plan.alignments()}
        for probe in plan.probes:
            record = probe.record()
            assert {record["asked_by"], record["answered_by"]} == {"SPEAKER_MAIN", "SPEAKER_USER"}
            assert all((*item, record["asked_by"]) in words for item in record["fact"])
            for name in ("echo", "answer"):
                assert all((*item, record["answered_by"]) in words for item in record[name])


def test_keys_are_unique_among_living_facts_and_kinds_are_not(plans: dict[str, list[Any]]) -> None:
    rivals = 0
    for plan in every_plan(plans):
        for probe in plan.probes:
            born, dies = probe.planted.start_sec, probe.asked.start_sec
            alive = [p for p in plan.probes if p.planted.start_sec < born < p.answered.start_sec]
            assert probe.fact.key not in {other.fact.key for other in alive}
            rivals += any(
                other is not probe
                and other.fact.kind == probe.fact.kind
                and other.planted.start_sec < dies
                and other.answered.start_sec > born
                for other in plan.probes
            )
    assert rivals > 0.2 * len(every_probe(plans))


def test_small_talk_mentions_values_of_probes_too(plans: dict[str, list[Any]]) -> None:
    for plan in plans["train"]:
        values = {probe.fact.value for probe in plan.probes if probe.fact.words == 1}
        spoken_sec = {
            span[0]
            for probe in plan.probes
            for item in (probe.planted, probe.echo, probe.answered)
            if item
            for _, span in item.words
        }
        assert any(
            word.strip(".,?!") in values and span[0] not in spoken_sec
            for word, span, _ in plan.alignments()
        )


def test_chance_is_one_over_the_words_to_choose_from(
    scripts: dict[str, ModuleType], plans: dict[str, list[Any]]
) -> None:
    kinds = scripts["probe_words"].KINDS
    seen: dict[str, set[str]] = {kind: set() for kind in kinds}
    for probe in every_probe(plans):
        record = probe.record()
        words = [word.strip(".") for word, _ in record["answer"]]
        assert len(words) == {"code": 3, "number": 2}.get(record["kind"], 1)
        # what training never answers is no choice for one who knows only the kind
        assert record["chance"] == 1 / len(kinds[record["kind"]].values.seen)
        seen[record["kind"]] |= set(words)
    assert all(seen[kind] == set(kinds[kind].values.all) for kind in kinds)
    assert all(6 <= len(kind.values.seen) <= 10 for kind in kinds.values())


def test_held_out_topics_are_never_in_training(
    scripts: dict[str, ModuleType], plans: dict[str, list[Any]]
) -> None:
    topics = scripts["conversation"].topics
    names = {held_out: {topic.name for topic in topics(held_out)} for held_out in (True, False)}
    assert len(names[True]) >= 11
    assert len(names[False]) >= 47
    assert not names[True] & names[False]

    def words(split: str) -> set[str]:
        return {bare(word) for plan in plans[split] for word, _, _ in plan.alignments()}

    only_held_out = {"tent", "telescope", "chess", "snowman", "bandage", "theatre"}
    for split in ("heldout", "final"):
        assert len(words(split) & only_held_out) >= 4
    for split in ("train", "far", "farther", "crowded"):
        assert not words(split) & only_held_out


def test_held_out_voices_are_never_in_training(scripts: dict[str, ModuleType]) -> None:
    make, voices = scripts["make_conversations"], scripts["voices"]
    rng = np.random.default_rng(0)
    drawn = {split: {make.user_voice(split, rng) for _ in range(100)} for split in SPLITS}
    assert (
        drawn["train"]
        == drawn["far"]
        == drawn["farther"]
        == drawn["crowded"]
        == set(voices.USER_VOICES)
    )
    assert drawn["final"] == set(voices.HELD_OUT_VOICES)
    assert drawn["heldout"] == {*voices.USER_VOICES, *voices.HELD_OUT_VOICES}
    assert not set(voices.USER_VOICES) & set(voices.HELD_OUT_VOICES)
    assert voices.MOSHI_VOICE not in drawn["heldout"]


def test_noise_floors_differ_between_conversations_and_sides(
    scripts: dict[str, ModuleType],
) -> None:
    plan = make_plan(scripts, "train", 0, minutes=1)
    rms = np.array([plan.mix(np.random.default_rng(seed)).std(axis=0) for seed in range(60)])
    silent = rms == 0
    assert 0.02 < silent.mean() < 0.25
    level_db = 20 * np.log10(rms[~silent])
    assert -81 < level_db.min() < -75
    assert -60 < level_db.max() < -54
    # one side's says nothing about the other's
    assert abs(np.corrcoef(rms.T)[0, 1]) < 0.4
    again = plan.mix(np.random.default_rng(3))
    np.testing.assert_array_equal(again, plan.mix(np.random.default_rng(3)))


def test_sentences_hold_every_word_that_is_ever_said(
    scripts: dict[str, ModuleType], plans: dict[str, list[Any]]
) -> None:
    sentences = scripts["conversation"].sentences(0)
    known = {bare(word) for text in sentences for word in text.split()}
    said = {bare(word) for plan in every_plan(plans) for word, _, _ in plan.alignments()}
    assert said <= known


def test_every_sentence_is_plain_words_the_synthesisers_can_read(
    scripts: dict[str, ModuleType],
) -> None:
    for text in itertools.islice(scripts["conversation"].sentences(0), 5000):
        assert text[0].isupper()
        assert text[-1] in ".?!"
        assert not set("{}[]|0123456789-") & set(text)

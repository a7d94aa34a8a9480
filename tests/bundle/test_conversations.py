from __future__ import annotations

import importlib
import itertools
import json
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moshi_ttt.data.alignments import read_alignments

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"
WORD_SEC, SPOKEN_SEC, MARGIN_SEC = 0.25, 0.21, 0.05
MODULES = (
    "conversation",
    "make_conversations",
    "probe_words",
    "probes",
    "splits",
    "timeline",
    "voices",
)
SPLITS = ("train", "far", "heldout", "final")


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    return {name: importlib.import_module(name) for name in MODULES}


def bare(word: str) -> str:
    return word.strip(".,?!").lower()


class Metronome:
    """Says every word in the same time."""

    def __init__(self, utterance: type) -> None:
        self._utterance = utterance

    def say(self, sentence: str) -> Any:
        starts = [(word, MARGIN_SEC + i * WORD_SEC) for i, word in enumerate(sentence.split())]
        samples = round((2 * MARGIN_SEC + len(starts) * WORD_SEC) * 24_000)
        words = tuple((word, start, start + SPOKEN_SEC) for word, start in starts)
        return self._utterance(np.zeros(samples, np.float32), words)


def make_plan(scripts: dict[str, ModuleType], split: str, seed: int, minutes: float = 8) -> Any:
    speaker = Metronome(scripts["voices"].Utterance)
    rng = np.random.default_rng(seed)
    chosen = scripts["splits"].SPLITS[split]
    return scripts["timeline"].plan((speaker, speaker), rng, 60 * minutes, chosen)


@pytest.fixture(scope="module")
def plans(scripts: dict[str, ModuleType]) -> dict[str, list[Any]]:
    return {s: [make_plan(scripts, s, seed) for seed in range(4, 13)] for s in SPLITS}


def every_plan(plans: dict[str, list[Any]]) -> list[Any]:
    return [plan for split in SPLITS for plan in plans[split]]


def every_probe(plans: dict[str, list[Any]]) -> list[Any]:
    return [probe for plan in every_plan(plans) for probe in plan.probes]


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
    assert len(drawn) == 16


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
    for gap_sec in scripts["splits"].SPREAD.gap_shares:
        for split in ("heldout", "final"):
            assert 0.05 < share(split, gap_sec) < 0.18


def test_shares_of_gaps_add_up(scripts: dict[str, ModuleType]) -> None:
    for split in scripts["splits"].SPLITS.values():
        for pace in split.paces:
            assert sum(pace.gap_shares.values()) == pytest.approx(1)


def test_calm_and_drilling_conversations_are_both_trained_on(plans: dict[str, list[Any]]) -> None:
    every_sec = [plan.duration_sec / len(plan.probes) for plan in plans["train"]]
    assert min(every_sec) < 12 < 14 < max(every_sec)
    for split in ("far", "heldout", "final"):
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
    for split, share in (("train", 0.7), ("far", 0.7), ("heldout", 0.5), ("final", 0.5)):
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
    for split, share in (("train", 0), ("far", 0), ("heldout", 0.25), ("final", 0.5)):
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
    for split in ("train", "far"):
        assert not words(split) & only_held_out


def test_held_out_voices_are_never_in_training(scripts: dict[str, ModuleType]) -> None:
    make, voices = scripts["make_conversations"], scripts["voices"]
    rng = np.random.default_rng(0)
    drawn = {split: {make.user_voice(split, rng) for _ in range(100)} for split in SPLITS}
    assert drawn["train"] == drawn["far"] == set(voices.USER_VOICES)
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


def test_an_interrupted_run_keeps_what_is_finished(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    make = scripts["make_conversations"]
    recipe = make.Recipe(0, "train", 3, (3.0, 15.0))
    path = tmp_path / f"{recipe.name}.wav"
    assert make.finished_sec(path, recipe) is None
    with path.open("wb") as file:
        make._write_audio(file, np.zeros((48_000, 2), np.float32), ".wav")
    assert make.finished_sec(path, recipe) is None, "the words are missing"
    content = {"recipe": {"seed": 0, "split": "train", "index": 3, "minutes": [3.0, 15.0]}}
    path.with_suffix(".json").write_text(json.dumps(content))
    assert make.finished_sec(path, recipe) == 2.0
    assert make.finished_sec(path, make.Recipe(1, "train", 3, (3.0, 15.0))) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hours": 0}, "--hours 0 must"),
        ({"hours": 1, "minutes": (5.0, 3.0)}, "--minutes 5 3 must"),
        ({"hours": 1, "workers": 0}, "--workers 0 must"),
        ({"hours": 1, "first": -1}, "--first -1 must"),
    ],
)
def test_impossible_arguments_are_named(
    scripts: dict[str, ModuleType], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    from moshi_ttt.errors import UserError

    with pytest.raises(UserError, match=message):
        scripts["make_conversations"].main(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "arguments"),
    [("make_conversations", ["{out}", "--hours", "1"]), ("make_demo", ["--out", "{out}"])],
)
def test_programs_without_the_voices_end_with_status_2(
    scripts: dict[str, ModuleType],
    tmp_path: Path,
    program: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [one.format(out=tmp_path) for one in arguments]
    monkeypatch.setattr("sys.argv", [program, *filled])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "bundle" / f"{program}.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot import hibari")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train-01", "train-02", "train-03", "train-04", "val-01"])
def test_probes_of_the_demo_point_at_the_right_words(name: str) -> None:
    path = DEMO / f"{name}.json"
    content = json.loads(path.read_text())
    words = {(word, *span, speaker) for word, span, speaker in content["alignments"]}
    assert len(content["probes"]) >= 5
    for probe in content["probes"]:
        for part, speaker in (
            ("fact", "asked_by"),
            ("echo", "answered_by"),
            ("answer", "answered_by"),
        ):
            assert all((word, *span, probe[speaker]) in words for word, span in probe[part])
        assert [word for word, _ in probe["answer"]] == [word for word, _ in probe["fact"]]
        last_mention = (probe["echo"] or probe["fact"])[-1][1][1]
        assert probe["asked_at"] > last_mention
        assert probe["gap_sec"] == pytest.approx(probe["asked_at"] - last_mention, abs=2e-3)
        # somebody begins to speak at the question
        assert any(
            start == probe["asked_at"] and speaker == probe["asked_by"]
            for _, start, _, speaker in words
        )
    read = read_alignments(path, duration_sec=300.0, step_sec=0.08)
    assert read.words
    assert not read.problems
    assert content["split"] == ("heldout" if name == "val-01" else "train")

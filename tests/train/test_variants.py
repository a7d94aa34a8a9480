"""The variants of a study: what they may say, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from moshi_ttt.errors import UserError
from train.recipes import CONFIGS
from train.variants import Study

VARIANTS = [{"name": "base", "model": {"train": "lora"}}, {"name": "memory", "steps": 2}]


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"stpes": 3}, r"study\.yaml: variant x: it does not accept option 'stpes'"),
        ({"steps": -1}, r"variant x\.steps=-1 must be at least 0"),
        ({"data": {"carry": True}}, r"variant x has data or windows .* and no steps; give"),
        ({"name": "base"}, r"variant base is there twice; give one another name"),
        ({"weights": "base"}, r"x: weights=base is no variant that is trained; those are memory"),
        ({"weights": "lora"}, r"weights=lora is no variant that is trained"),
        ({"weights": "memory", "steps": 3}, r"weights=memory are trained already.*leave out steps"),
        ({"model": {"contxt": 3}}, r"variant x: it does not accept option 'contxt'"),
        ({"model": {"sinks": 188}}, r"variant x\.model\.sinks=188 must be .*at most 187"),
        (
            {"steps": 1, "data": {"manifest": "x"}},
            r"variant x\.data: it does not accept option 'manifest'",
        ),
        ({"run": {"chunk_sec": 1}}, r"variant x\.run\.chunk_sec=1.0 must be above 5"),
        ({"run": {"seconds": 9}}, r"variant x\.run: it does not accept option 'seconds'"),
        ({"steps": 1, "windows": {"shortest_steps": 63}}, r"windows\.longest_steps=None: both"),
        ({"inner_rate": 0, "model": {"train": "lora"}}, r"x: inner_rate=0 needs a memory"),
    ],
    ids=str,
)
def test_a_variant_that_cannot_be_is_refused(
    tmp_path: Path, variant: dict[str, Any], message: str
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"variants": [*VARIANTS, {"name": "x", **variant}]}))
    with pytest.raises(UserError, match=message):
        check(file, ["x"], {"context_steps": 188}, {})


def check(file: Path, names: Sequence[str] | None, model: dict[str, Any], run: Any) -> None:
    study = Study(file)
    for one in study.chosen(names):
        study.check(one, model, run)


def test_a_study_without_variants_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("model: {}")
    with pytest.raises(UserError, match=r"study\.yaml has no variants; list some"):
        Study(tmp_path / "study.yaml")
    with pytest.raises(UserError, match=r"--study nowhere\.yaml does not exist; give a YAML file"):
        Study(Path("nowhere.yaml"))


@pytest.mark.parametrize("name", ["mitigations", "mitigations_small"])
def test_the_shipped_mitigations_are_variants_that_can_be(name: str) -> None:
    path = CONFIGS / f"study/{name}.yaml"
    recipe = Study(path).recipe
    # what they name is built by scripts/bundle/tiny_bundle.sh: stand in what was shipped of it
    shipped = {"source": "tiny", "init_from": "tiny"}
    check(path, None, recipe["model"] | shipped, recipe.get("run", {}))

"""Recipes: the committed ones are sound, and whatever is wrong in one is refused by its path."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.train.recipe import Recipe, load_recipe, parse_recipe, recipe_names
from service.types.errors import SettingsError


def test_committed_recipes_load() -> None:
    assert "nano-v2.3" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_a_recipe_from_a_file(tmp_path: Path, content: dict[str, Any], recipe_with: Callable[..., Recipe]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_recipe(str(path)) == recipe_with()


@pytest.mark.parametrize("name", ["nano-v9.9", "/nowhere/at/all.yaml"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(SettingsError, match="recipe"):
        load_recipe(name)


def paths(content: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in content.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


def edited(content: dict[str, Any], path: tuple[str, ...], edit: Callable[[dict[str, Any], str], Any]) -> str:
    changed = deepcopy(content)
    part = changed
    for key in path[:-1]:
        part = part[key]
    edit(part, path[-1])
    return yaml.safe_dump(changed)


def test_every_key_is_required_and_typed(content: dict[str, Any]) -> None:
    for path in paths(content):
        with pytest.raises(SettingsError, match=path[-1]):
            parse_recipe(edited(content, path, lambda part, key: part.pop(key)))
        with pytest.raises(SettingsError, match=path[-1]):
            parse_recipe(edited(content, path, lambda part, key: part.update({key: {"a": 1}})))


def test_unknown_keys_are_refused(content: dict[str, Any]) -> None:
    for path in [("extra",), ("schedule", "extra"), ("publish", "extra")]:
        with pytest.raises(SettingsError, match="unknown keys: extra"):
            parse_recipe(edited(content, path, lambda part, key: part.update({key: 1})))
    with pytest.raises(SettingsError, match=r"lengths\[0\] has unknown keys: x"):
        parse_recipe(edited(content, ("schedule", "lengths"), lambda part, key: part.update({key: [{"until": 1.0, "tokens": 8, "x": 1}]})))


@pytest.mark.parametrize("text", ["[1, 2]", "name: [", "", "just words"])
def test_what_is_no_recipe(text: str) -> None:
    with pytest.raises(SettingsError, match="recipe"):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"optimizer": {"kind": "sgd"}}, "kind"),
        ({"dtype": "int8"}, "dtype"),
        ({"publish": {"dtype": "int8"}}, "publish"),
        ({"schedule": {"steps": 0, "minutes": 0}}, "minutes"),
        ({"schedule": {"lengths": []}}, "length"),
        ({"schedule": {"lengths": [{"until": 1.0, "tokens": 48}]}}, "length"),
        ({"schedule": {"micro_tokens": 0}}, "micro_tokens"),
        ({"schedule": {"batch_tokens": 200}}, "batch_tokens"),
        ({"schedule": {"decay_from": 1.0}}, "decay_from"),
        ({"schedule": {"warmup_steps": -1}}, "warmup_steps"),
        ({"average": {"decay": 1.0}}, "decay"),
        ({"average": {"init": 1.0}}, "init"),
        ({"corpus": {"recall_at_end": 1.5}}, "recall_at_end"),
        ({"corpus": {"recall_fewest_lines": 0}}, "recall_fewest_lines"),
        ({"corpus": {"recall_fewest_lines": 200}}, "recall_fewest_lines"),
        ({"segments": {"tokens": 24}}, "segments.tokens"),
        ({"segments": {"tokens": 0}}, "segments.tokens"),
        ({"segments": {"tokens": 32, "memory_tokens": -1}}, "memory_tokens"),
        ({"segments": {"tokens": 32}, "distil": {"kl": 0.5, "mse": 0.0, "temperature": 1.0}}, "not both"),
        ({"distil": {"kl": 0.8, "mse": 0.3, "temperature": 1.0}}, "sum"),
        ({"distil": {"kl": 0.0, "mse": 0.0, "temperature": 1.0}}, "sum"),
        ({"distil": {"kl": 0.5, "mse": 0.0, "temperature": 0.0}}, "temperature"),
        ({"distil": {"kl": 0.5, "mse": 0.0}}, "lacks: temperature"),
        ({"quantise": {"start": 1.0}}, "start"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing"),
    ],
)
def test_values_that_make_no_sense(recipe_with: Callable[..., Recipe], changes: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        recipe_with(**changes)


def test_rates_rise_stay_and_fall(recipe_with: Callable[..., Recipe]) -> None:
    plan = recipe_with(schedule={"warmup_steps": 4, "decay_from": 0.5, "floor": 0.1}).schedule
    assert [plan.rate(0.0, step) for step in (1, 2, 4, 5)] == [0.25, 0.5, 1.0, 1.0]
    assert plan.rate(0.49, 99) == 1.0
    assert plan.rate(0.75, 99) == pytest.approx(0.55)
    assert plan.rate(1.0, 99) == pytest.approx(0.1)


def test_lengths_follow_progress(recipe_with: Callable[..., Recipe]) -> None:
    plan = recipe_with().schedule
    assert [plan.length(progress) for progress in (0.0, 0.69, 0.7, 1.0)] == [32, 32, 64, 64]
    assert plan.pass_tokens(32) == 128 and plan.pass_tokens(512) == 512


def test_parts_that_a_recipe_need_not_have(recipe_with: Callable[..., Recipe]) -> None:
    plain = recipe_with()
    assert plain.segments is None and plain.distil is None and plain.quantise is None and not plain.gradient_checkpointing
    assert recipe_with(gradient_checkpointing=False).digest == plain.digest  # a recipe without a part keeps the digest it always had
    assert recipe_with(segments={"tokens": 32}).segments.memory_tokens == 0
    assert recipe_with(quantise={"start": 0.5}).digest != plain.digest
    assert recipe_with(corpus={"recall_documents": 0}).digest == plain.digest != recipe_with(corpus={"recall_documents": 5}).digest


def test_digest_follows_content(recipe_with: Callable[..., Recipe]) -> None:
    assert recipe_with().digest == recipe_with().digest != recipe_with(seed=1).digest

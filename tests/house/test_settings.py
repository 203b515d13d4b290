"""Every flag of `deepseek-serve` belongs to a room's settings, every setting has a flag, and defaults are spelled once."""

from __future__ import annotations

import ast
from dataclasses import fields

from service.config.definition import SHORT_FORMS, Definition
from service.types.settings import AttentionSettings, EngineSettings, FleetSettings, HttpLimits, HttpSettings, SchedulerSettings
from tests.house.source import ROOT, SourceTree

ROOMS = (HttpSettings, HttpLimits, SchedulerSettings, EngineSettings, AttentionSettings, FleetSettings)
# Flags that are no field of a room: they choose models, are short for another flag, or are named in the singular because they repeat.
OF_CONFIG = {"model", "version", "restore", "registry", "api_key", *SHORT_FORMS}
OF_ROOMS_ONLY = {"limits", "api_keys"}


def test_flags_and_settings_are_the_same_names() -> None:
    settings = [field.name for room in ROOMS for field in fields(room)]
    assert len(settings) == len(set(settings)), "two rooms have a setting of one name"
    assert set(settings) - OF_ROOMS_ONLY == set(Definition.model_fields) - OF_CONFIG


def test_no_default_is_spelled_in_the_definition() -> None:
    """A default is an attribute of the rooms' settings, or says that nothing was given."""
    file = SourceTree(ROOT).file("service/config/definition.py")
    assert file is not None
    spelled = []
    for owner in (node for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)):
        for line in (node for node in owner.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            default = line.value.args[0]  # type: ignore[union-attr]
            if not any(isinstance(node, ast.Attribute) for node in ast.walk(default)) and ast.unparse(default) not in ("[]", "''", "False"):
                spelled.append(ast.unparse(line))
    assert spelled == []


def test_every_flag_says_what_it_does() -> None:
    for name, field in Definition.model_fields.items():
        assert field.description and len(field.description) > 10, name
        assert not field.description.endswith("."), name

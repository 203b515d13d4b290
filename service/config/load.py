"""Joins flags, environment and configuration file into the settings of every room; the one place that reads the environment.

It does not know what the settings do. Invariants: flags > environment > file > defaults, for the short forms of a setting too; whatever is
wrong ends in a `SettingsError` that names the flag, variable or key and says what would be right; keys are never shown.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

import service
from service.config.bundled import choose_sources, registry_path
from service.config.definition import ENVIRONMENT_PREFIX, SECTIONS, SHORT_FORMS, Definition
from service.config.describe import default_note, expectation, is_list, metavar, renamed
from service.config.flags import FlagParser
from service.config.machine import this_machine
from service.config.tiers import choose as choose_tier
from service.types.errors import SettingsError
from service.types.settings import (
    AttentionSettings,
    EngineSettings,
    FleetSettings,
    HttpLimits,
    HttpSettings,
    ModelSource,
    SchedulerSettings,
    TierChoice,
)

PROGRAM = "deepseek-serve"
DESCRIPTION = "Serve language models over HTTP. Every flag --name is also the environment variable DEEPSEEK_NAME and a key of --config."
_SECRET = frozenset({"api_key"})
_Room = TypeVar("_Room", HttpLimits, SchedulerSettings, EngineSettings, AttentionSettings, FleetSettings)


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `deepseek-serve` was asked for: the models, the default first, the settings of each room, and the registry, if one is kept.

    `restored` models were good when they were served before. `tier` says which defaults were the tier's. `named` models were asked for one
    by one; others come because nothing was named, and may be left out.
    """

    models: tuple[ModelSource, ...]
    http: HttpSettings
    scheduler: SchedulerSettings
    engine: EngineSettings
    attention: AttentionSettings
    registry: Path | None = None
    fleet: FleetSettings = field(default_factory=FleetSettings)
    restored: bool = False
    tier: TierChoice | None = None
    named: bool = True


def serve_parser() -> FlagParser:
    """The flags of `deepseek-serve`, made from the definition."""
    parser = FlagParser(PROGRAM, DESCRIPTION, service.__version__)
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML file with any of these settings")
    for section in SECTIONS:
        group = parser.add_argument_group(section.__doc__)
        for name, entry in section.model_fields.items():
            text = f"{entry.description}{default_note(entry)}".replace("%", "%%")
            if entry.annotation is bool:
                group.add_argument(f"--{name}", nargs="?", const="true", metavar=metavar(entry), default=None, help=text)
                group.add_argument(f"--no_{name}", dest=name, action="store_const", const="false", default=None, help=argparse.SUPPRESS)
            else:
                action = "append" if is_list(entry) else "store"
                group.add_argument(f"--{name}", action=action, metavar=metavar(entry), default=None, help=text)
    return parser


def load_settings(arguments: Sequence[str]) -> ServeSettings:
    """Read flags, environment and configuration file. Raises SettingsError; prints and exits for --help and --about."""
    given = {name: value for name, value in serve_parser().read(arguments).items() if value is not None}
    _refuse_unknown_variables(os.environ)
    path = given.pop("config", None) or os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG") or None
    said = (
        _Origin(given, lambda name: f"--{name}"),
        _Origin(EnvSettingsSource(Definition)(), lambda name: ENVIRONMENT_PREFIX + name.upper()),
        _Origin(_read_file(Path(str(path))) if path else {}, lambda name: f"{name} in {path}"),
    )
    by_name = {name: value for origin in reversed(said) for name, value in origin.values.items()}
    tier, defaults = choose_tier(by_name, this_machine())
    if tier.name == "edge":  # no worker can tell; whether there is a GPU it knows better
        defaults["tier"] = tier.name
    origins = (*said, _Origin(defaults, lambda name: f"{name} of the tier {tier.name}"))
    return replace(_convert(_join(origins), origins), tier=tier)


class _Origin:
    """Values of one source by setting name, short forms written out, and how the source spells a name."""

    def __init__(self, values: Mapping[str, Any], spell: Callable[[str], str]) -> None:
        self.values, self.spell = dict(values), spell
        for short, (name, value) in SHORT_FORMS.items():
            if str(self.values.get(short, "false")).lower() in ("false", "no", "off", "0"):
                self.values.pop(short, None)
                continue
            if self.values.get(name, value) != value:
                raise SettingsError(f"{spell(short)} contradicts another choice of {name} ({self.values[name]}): give only one of them.")
            self.values[name] = value


def _join(origins: Sequence[_Origin]) -> Definition:
    joined: dict[str, Any] = {}
    for origin in reversed(origins):
        joined.update(origin.values)
    try:
        return Definition(**joined)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
    origin = next(origin for origin in origins if name in origin.values)
    setting, value = Definition.model_fields[name], origin.values[name]
    shown = "" if name in _SECRET else f", not {_shown(value)}{renamed(setting, value)}"
    raise SettingsError(f"{origin.spell(name)} must be {expectation(setting)}{shown}.")


def _convert(given: Definition, origins: Sequence[_Origin]) -> ServeSettings:
    def spell(name: str) -> str:
        return next((origin.spell(name) for origin in origins if name in origin.values), f"--{name}")

    keys = tuple(given.api_key)
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise SettingsError(f"{spell('api_key')} must be printable ASCII without spaces, and not empty.")
    if not (_is_loopback(given.host) or keys or given.insecure):
        raise SettingsError(
            f"{spell('host')} {given.host} can be reached from outside and no key is set: set --api_key (or DEEPSEEK_API_KEY), "
            "or give --insecure."
        )
    if given.step_tokens < given.batch_size:
        raise SettingsError(
            f"{spell('step_tokens')} ({given.step_tokens}) must be at least {spell('batch_size')} ({given.batch_size}): "
            "every running sequence takes a token of a step."
        )
    http = HttpSettings(
        host=given.host,
        port=given.port,
        api_keys=keys,
        insecure=given.insecure,
        metrics_key=given.metrics_key,
        metrics_compat=given.metrics_compat,
        allowed_origins=tuple(given.allowed_origins),
        image_hosts=tuple(given.image_hosts),
        drain_s=given.drain_s,
        access_log=given.access_log,
        limits=_room(HttpLimits, given),
    )
    registry = registry_path(given.registry)
    sources = choose_sources(given.model, given.version, given.restore, registry)
    dense_layers = tuple(given.dense_layers) if "dense_layers" in given.model_fields_set else None
    attention = replace(_room(AttentionSettings, given), dense_layers=dense_layers)
    fleet = _room(FleetSettings, given)
    named = bool(given.model or given.version or given.restore)
    if fleet.load == "auto":
        # What is restored may have been loaded on demand, and need not fit all at once.
        on_demand = len(sources) > 1 if given.restore else not named
        fleet = replace(fleet, load="demand" if on_demand else "start")
    scheduler, engine = _room(SchedulerSettings, given), _room(EngineSettings, given)
    return ServeSettings(sources, http, scheduler, engine, attention, registry, fleet, given.restore, named=named)


def _room(room: type[_Room], given: Definition) -> _Room:
    return room(**{entry.name: getattr(given, entry.name) for entry in fields(room)})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _read_file(path: Path) -> dict[str, object]:
    try:
        text = path.read_text("utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except FileNotFoundError:
        raise SettingsError(f"--config {path} does not exist: name an existing YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise SettingsError(f"--config {path} is not valid YAML{where}: write one 'name: value' a line.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"--config {path} must hold one 'name: value' a line.")
    keys = [str(key.value).replace("-", "_") for key, _ in root.value]
    for name in keys:
        if name not in Definition.model_fields:
            raise SettingsError(f"--config {path} has {_shown(name)}, which is not a setting{_nearest(name, Definition.model_fields)}.")
        if keys.count(name) > 1:
            raise SettingsError(f"--config {path} has {_shown(name)} twice: keep one.")
    return {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}


def _refuse_unknown_variables(environment: Iterable[str]) -> None:
    known = {ENVIRONMENT_PREFIX + name.upper() for name in (*Definition.model_fields, "config")}
    for name in environment:
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in known:
            raise SettingsError(f"the environment has {_shown(name)}, which is not a setting{_nearest(name, known)}: unset it.")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

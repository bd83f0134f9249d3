"""From YAML files and dotted overrides to a checked configuration, or one message with every problem."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ardist.config.base import Section
from ardist.config.migration import migrate
from ardist.errors import ConfigError, did_you_mean

SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-4 as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.(?:inf|Inf)$|^\.nan$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping in a YAML text; `source` names it in errors."""
    try:
        # Not yaml.load of arbitrary tags: _Loader is a SafeLoader and builds plain values only.
        value = yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: expected a mapping of settings at the top, found {type(value).__name__}")
    return value


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one ``dotted.key=value`` in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node: Any = settings
    for depth, part in enumerate(path[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(path[: depth + 1])} is a value, not a section")
    node[path[-1]] = value


def load_config(schema: type[SectionT], path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> SectionT:
    """Read `path`, apply the overrides, check everything; raises `ConfigError` with all problems at once."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(file)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {str(file)!r} is not UTF-8 text: {error}") from None
    settings = parse_yaml(text, str(file))
    for override in overrides:
        apply_override(settings, override)
    return check(schema, settings, str(file))


def check(schema: type[SectionT], settings: Mapping[str, Any], source: str) -> SectionT:
    """Build `schema` from plain settings; raises one `ConfigError` that lists every problem.

    Settings that are wrong by themselves hide how the others contradict each other; so these are looked at again
    with the default in the place of what was wrong, and said unless they could come from that default.
    """
    if "version" in schema.model_fields:
        settings = migrate(settings, source)
    try:
        return schema.model_validate(dict(settings))
    except ValidationError as error:
        problems = _problems(schema, error)
        remaining, replaced = _without(settings, error)
    if replaced:
        try:
            schema.model_validate(remaining)
        except ValidationError as error:
            for problem in _problems(schema, error):
                if problem not in problems and not any(re.search(rf"\b{name}\b", problem) for name in replaced):
                    problems.append(problem)
    noun = "problem" if len(problems) == 1 else "problems"
    raise ConfigError(f"{source}: {len(problems)} {noun}\n" + "\n".join(f"  {problem}" for problem in problems))


def _problems(schema: type[BaseModel], error: ValidationError) -> list[str]:
    return [line for details in error.errors() for line in _problem(schema, details).split("\n")]


def _without(settings: Mapping[str, Any], error: ValidationError) -> tuple[dict[str, Any], set[str]]:
    """The settings without those that are wrong, and the names by which another problem may mean what now has its
    default."""
    remaining, replaced = copy.deepcopy(dict(settings)), set()
    for details in error.errors():
        path = [str(part) for part in details["loc"]]
        node: Any = remaining
        for part in path[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if path and isinstance(node, dict) and path[-1] in node:
            del node[path[-1]]
            # A misspelt setting leaves a default somewhere in its section, a wrong one in its own place.
            misspelt = details["type"] == "extra_forbidden" and len(path) > 1
            replaced.add(re.escape(path[0] if misspelt else path[-1]))
    return remaining, replaced


def _problem(schema: type[BaseModel], details: Any) -> str:
    path = [part for part in details["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    where = ".".join(str(part) for part in path) or "(top)"
    if details["type"] == "extra_forbidden":
        names = sorted(_fields_at(schema, path[:-1]))
        return f"{where}: no such setting{did_you_mean(str(path[-1]), names)}; legal here: {', '.join(names)}"
    if details["type"] == "missing":
        return f"{where}: this setting is required"
    given = details.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | None) and path else ""
    message = str(details["msg"]).removeprefix("Value error, ")
    # Contradictions between sections name their settings themselves.
    return f"{where}: {message}{shown}" if path else message


def _fields_at(schema: type[BaseModel], path: Iterable[Any]) -> list[str]:
    """Names of the settings legal at `path` below `schema`."""
    here: Any = schema
    for part in path:
        field = here.model_fields.get(part) if isinstance(here, type) and issubclass(here, BaseModel) else None
        if field is None:
            continue
        here = _model_in(field.annotation) or here
    return list(here.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)


def dump_config(config: Section, path: Path) -> None:
    """Write a configuration as YAML that `load_config` reads back to an equal one."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")

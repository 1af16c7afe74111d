"""Reads YAML files and mappings with `key=value` overrides; every mistake is one sentence."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from operators import RestoreError
from operators.naming import check_known, suggest
from restore.paths import configs_dir

REFERENCE = re.compile(r"\$\{[^${}:]*\}")  # to another key, by OmegaConf's rules


def read_config(
    config: str | os.PathLike | Mapping[str, Any],
    overrides: Sequence[str],
    folder: str,
    defaults: Mapping[str, Any] | None = None,
    placeholder: str | None = None,
) -> dict[str, Any]:
    """Return a configuration with its overrides as plain containers.

    config: a file, the name of one shipped in configs/`folder`, or a mapping. overrides: `key=value` with dots between
    levels; entries of lists have numbers. defaults: values of keys that a file may leave out; if given, overrides may
    only name existing keys.
    placeholder: in place of values left open (`???`).
    Raises RestoreError if the content is not a YAML mapping, and for values left open without a placeholder.
    """
    for setting in overrides:
        if "=" not in setting:
            raise RestoreError(f"a setting must be key=value, got {setting}")
    try:
        is_file = isinstance(config, (str, os.PathLike))
        given = OmegaConf.load(_find(config, folder)) if is_file else OmegaConf.create(copy.deepcopy(dict(config)))
        if not OmegaConf.is_dict(given):
            raise RestoreError(f"{config} must be a mapping of keys to values, not a list")
        if defaults is not None:
            given = OmegaConf.merge(dict(defaults), given)
            check_known([setting.split("=", 1)[0] for setting in overrides], _keys(given), f"{config} has no key")
        for setting in overrides:
            _override(given, *setting.split("=", 1))
        for key in sorted(OmegaConf.missing_keys(given)):
            if placeholder is None:
                raise RestoreError(f"the configuration leaves {key} open; give {key}=VALUE")
            OmegaConf.update(given, key, placeholder)
        plain = resolve_references(given)
    except OmegaConfBaseException as error:
        raise RestoreError(_sentence(error)) from error
    except (yaml.YAMLError, OSError, UnicodeError, RecursionError) as error:
        raise RestoreError(f"{config} is not valid YAML: {' '.join(str(error).split())}") from error
    return plain


def _override(given: Any, key: str, text: str) -> None:
    """Set a key to what the text says in YAML; entries of lists have numbers: guidance.0.pag.layers."""
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    try:
        OmegaConf.update(given, key, value, force_add=True)
    except (IndexError, TypeError, ValueError) as error:
        raise RestoreError(f"{key} must name an entry of the configuration, got: {error}") from error


def read_yaml(source: str | os.PathLike, what: str = "configuration") -> Any:
    """Return the content of a YAML file, or of YAML text between braces or brackets, as plain containers.

    what: names the file in messages. Raises RestoreError if the file is missing or is not readable YAML.
    """
    text = str(source)
    try:
        loaded = OmegaConf.create(text) if text.lstrip()[:1] in ("{", "[") else OmegaConf.load(text)
        return resolve_references(loaded)
    except FileNotFoundError:
        raise RestoreError(f"the {what} file {text} does not exist") from None
    except RestoreError as error:
        raise RestoreError(f"the {what} {text}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RestoreError(f"the {what} {text} is not readable YAML: {reason}") from None


def fill_defaults(schema: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` completed with the defaults of a schema. Raises RestoreError for wrong names and types."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise RestoreError(f"the configuration lacks {key}")
        return OmegaConf.to_container(merged)
    except OmegaConfBaseException as error:
        raise RestoreError(_sentence(error)) from error
    except (TypeError, ValueError) as error:  # a list in place of a mapping, or the other way round
        raise RestoreError(f"the configuration cannot be read: {' '.join(str(error).split())}") from error


def resolve_references(config: Any) -> Any:
    """Return an OmegaConf container as plain ones, with references to other keys resolved.

    Raises RestoreError for anything else in ${...}: resolvers read the environment, and what they return would stand in
    the protocol of a run.
    """
    _refuse_resolvers(OmegaConf.to_container(config), "")
    plain = OmegaConf.to_container(config, resolve=True)
    _refuse_resolvers(plain, "")  # nor one that references have put together, for the next reader
    return plain


def _refuse_resolvers(value: Any, place: str) -> None:
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_resolvers(child, f"{place}.{key}" if place else str(key))
    elif isinstance(value, str) and "${" in value:
        rest = value
        while (shorter := REFERENCE.sub("", rest)) != rest:  # from the innermost outwards
            rest = shorter
        if "${" in rest:
            raise RestoreError(
                f"{place} must not have {value}: only references to other keys, such as ${{data.folder}}, are resolved;"
                f" give {place}=VALUE (a shell replaces variables)"
            )


def _find(config: str | os.PathLike, kind: str) -> Path:
    folder = configs_dir() / kind
    for path in (Path(config), folder / f"{config}.yaml"):
        if path.is_file():
            return path
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    raise RestoreError(f"the configuration {config} does not exist; {suggest(Path(config).stem, shipped)}")


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """All keys, with dots between levels."""
    keys = []
    for key in config:
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            keys += _keys(config[key], f"{prefix}{key}.")
    return keys


def _sentence(error: OmegaConfBaseException) -> str:
    """OmegaConf's complaint in one sentence, with the full key."""
    if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
        known = [f.name for f in fields(error.object_type)]
        return f"the configuration has no key {error.full_key}; {suggest(error.key, known)}"
    message = str(error.msg or error).splitlines()[0]
    wrong = re.match(r"Value (.*?) (?:of type .* could not be converted to|is not a valid) (\w+)", message)
    if not wrong:
        return f"the configuration cannot be read: {f'{error.full_key}: ' if error.full_key else ''}{message}"
    kinds = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
    return f"{error.full_key}={wrong[1]} must be {kinds.get(wrong[2], wrong[2])}"

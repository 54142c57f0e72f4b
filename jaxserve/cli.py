"""The command line and the YAML file of configurations: a flag and a setting for each field of their dataclasses.

``token_budget`` is ``--token-budget``, and either in the file. The command line wins, wherever it has ``--config``.

The work is argparse's and PyYAML's. jsonargparse would spare half of this, but under it a file that is named last wins,
'64' and null pass for integers, a type's error takes five lines, and importing it takes as long as half of serve.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxserve.errors import ConfigError


@dataclass(frozen=True)
class _Accepted:
    """What a field's annotation lets a flag or a file say: for ``int | Literal["auto"]``, an integer or a word."""

    types: tuple[type, ...]
    """What a flag is made of comes first, None's second."""
    words: tuple[str, ...]

    @classmethod
    def by_field(cls, config: type) -> dict[str, _Accepted]:
        accepted, annotations = {}, typing.get_type_hints(config)
        for name in (f.name for f in dataclasses.fields(config)):
            annotation = annotations[name]
            members = typing.get_args(annotation) or (annotation,)
            words = tuple(word for member in members for word in typing.get_args(member))
            accepted[name] = cls(tuple(member for member in members if isinstance(member, type)), words)
        return accepted

    @property
    def __name__(self) -> str:
        """For argparse's messages, and ours."""
        return " or ".join((self.types[0].__name__, *self.words))

    def __call__(self, text: str) -> Any:
        return text if text in self.words else self.types[0](text)


def as_flags(config: Any) -> list[str]:
    """The command line that ``parse_config`` makes ``config`` of."""
    flags = []
    for name, value in vars(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags.append(f"--{flag}={value}")
    return flags


def read_config_file(path: str, *configs: type) -> dict[str, Any]:
    """The settings of a YAML file, keyed by field name; unknown names and wrong types raise ConfigError."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config: cannot read {path!r}: {error}") from error
    if not isinstance(data, dict | None):
        raise ConfigError(f"config: {path!r} must hold a mapping of settings, got {type(data).__name__}")
    known = {name: accepted for config in configs for name, accepted in _Accepted.by_field(config).items()}
    settings = {}
    for key, value in (data or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"config: unknown setting {key!r} in {path!r}; known: {', '.join(sorted(known))}")
        accepted = known[name]
        if float in accepted.types and type(value) is int:
            value = float(value)
        if type(value) not in accepted.types and value not in accepted.words:
            raise ConfigError(f"config: {key} must be of type {accepted.__name__}, got {value!r} in {path!r}")
        settings[name] = value
    return settings


def _by_heading(configs: Sequence[type]) -> dict[str, list[tuple[dataclasses.Field[Any], _Accepted]]]:
    """The fields of all configurations, those of one heading together."""
    groups: dict[str, list[tuple[dataclasses.Field[Any], _Accepted]]] = {}
    for config in configs:
        headings, heading, accepted = getattr(config, "HEADINGS", {}), config.__name__, _Accepted.by_field(config)
        for f in dataclasses.fields(config):
            heading = headings.get(f.name, heading)
            groups.setdefault(heading, []).append((f, accepted[f.name]))
    return groups


def settings_page(*configs: type) -> str:
    """All settings as tables in Markdown, one for each heading."""
    lines = []
    for heading, fields in _by_heading(configs).items():
        lines += [f"## {heading.capitalize()}", "", "| flag | in YAML | default | |", "|---|---|---|---|"]
        for f, accepted in fields:
            flag = f.name.replace("_", "-")
            flags = f"`--{flag}`, `--no-{flag}`" if bool in accepted.types else f"`--{flag}`"
            default = "" if f.default is None else f"`{yaml.safe_dump(f.default).split()[0]}`"
            choices = f.metadata["choices"]
            text = f.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
            lines.append(f"| {flags} | `{f.name}` | {default} | {text} |")
        lines.append("")
    return "\n".join(lines)


def parse_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None, *configs: type) -> tuple[Any, ...]:
    """Instances of ``configs`` from ``argv`` and the YAML file that ``--config`` names, then the parsed namespace.

    Wrong flags and ConfigErrors end the program with the parser's usage message and exit code 2. Flags that are not
    given stay out of the namespace.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line wins")
    for heading, fields in _by_heading(configs).items():
        group = parser.add_argument_group(heading)
        for f, accepted in fields:
            kind: dict[str, Any] = {"type": accepted, "choices": f.metadata["choices"]}
            if bool in accepted.types:
                kind = {"action": argparse.BooleanOptionalAction}
            text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
            group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    args = parser.parse_args(argv)
    try:
        settings = (read_config_file(args.config, *configs) if args.config else {}) | vars(args)
        made = []
        for config in configs:
            names = [f.name for f in dataclasses.fields(config) if f.name in settings]
            made.append(config(**{name: settings[name] for name in names}))
    except ConfigError as error:
        parser.error(str(error))
    return (*made, args)

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
        accepted = {}
        for name, annotation in typing.get_type_hints(config).items():
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


def parse_config(parser: argparse.ArgumentParser, argv: Sequence[str] | None, *configs: type) -> tuple[Any, ...]:
    """Instances of ``configs`` from ``argv`` and the YAML file that ``--config`` names, then the parsed namespace.

    Wrong flags and ConfigErrors end the program with the parser's usage message and exit code 2. Flags that are not
    given stay out of the namespace.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line wins")
    for config in configs:
        accepted, group = _Accepted.by_field(config), parser.add_argument_group(config.__name__)
        for f in dataclasses.fields(config):
            kind: dict[str, Any] = {"type": accepted[f.name], "choices": f.metadata["choices"]}
            if bool in accepted[f.name].types:
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

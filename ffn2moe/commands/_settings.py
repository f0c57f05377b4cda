"""Add the settings of a conversion to a command, and read them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ffn2moe.commands._command import count, number, one_of
from ffn2moe.conversion.settings import OPTIONS, Option, Settings, count_or_auto
from ffn2moe.decompose.partition import AUTO


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the dense model and every setting of its conversion."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a hub name, or package:NAME")
    for one in fields(Settings):
        option = OPTIONS[one.name]
        if isinstance(one.default, bool):
            action = "store_false" if one.default else "store_true"
            parser.add_argument(option.flag, dest=one.name, action=action, help=option.help)
            continue
        names = option.names() if option.names else ()
        parser.add_argument(
            option.flag,
            dest=one.name,
            default=one.default,
            type=_reader(option),
            metavar=option.metavar or f"{{{','.join(names)}}}",
            help=option.help,
        )


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that were given."""
    return Settings(**{name: getattr(options, name) for name in OPTIONS})


def _reader(option: Option) -> Callable[[str], Any]:
    if option.names is not None:
        return one_of("value", option.names)
    if option.kind not in (int, count_or_auto):
        return option.kind
    read = count if option.minimum else number
    return read if option.kind is int else lambda text: text if text == AUTO else read(text)

"""The commands, one short file each, and how their words are read."""

import argparse
import re
import sys

from mlm_jax.config import KEYS
from mlm_jax.errors import ConfigError

Overrides = dict[str, str]


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are a ConfigError: one message, exit status 2, like all others."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConfigError(f"{message}; `{self.prog} --help` shows what there is")


def command_parser(name: str, doc: str | None) -> CommandParser:
    """A parser that is called like the command and described by its main's docstring."""
    return CommandParser(
        prog=f"mlm-jax {name}", description=doc, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="SPEC",
        help="a shipped config, gpt2:124m, or a file, path/x.py:ARG",
    )  # fmt: skip
    parser.add_argument(
        "--config.KEY=VALUE", action="store_true", dest="_",
        help="any setting; --help-config lists them",
    )  # fmt: skip
    parser.add_argument("--help-config", action=HelpConfig, nargs=0, help="list every setting")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Overrides]:
    """The command's own words, and `--config.KEY=VALUE` or `--config.KEY VALUE` from anywhere."""
    overrides, rest, words = {}, [], iter(argv)
    for word in words:
        match = re.fullmatch(r"--config\.([^=]+)(=(.*))?", word, re.DOTALL)
        if not match:
            rest.append(word)
            continue
        value = match[3] if match[2] else next(words, None)
        if value is None:
            raise ConfigError(f"{word} has no value; give {word}=VALUE")
        overrides[match[1]] = value
    return parser.parse_args(rest), overrides


class HelpConfig(argparse.Action):
    """Prints every setting with its default and meaning."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for key, field in KEYS.items():
            kind = getattr(field.type, "__name__", str(field.type).replace("typing.", ""))
            print(f"{key:32} {field.default!s:12} {field.metadata['doc']}  ({kind})")
        sys.exit(0)

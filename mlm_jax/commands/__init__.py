"""The commands, one short file each, and how their words are read."""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm_jax.config import KEYS, RunConfig, takes
from mlm_jax.door import from_dict
from mlm_jax.errors import ConfigError

Overrides = dict[str, str]


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are a ConfigError: one message, exit status 2, like all others."""

    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise ConfigError(f"{message}; `{self.prog} --help` shows what there is")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word, known = unknown[0].partition("=")[0], self._option_string_actions
            near = difflib.get_close_matches(word, known, n=1) if word.startswith("-") else []
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found


def command_parser(name: str, doc: str | None) -> CommandParser:
    """A parser that is called like the command and described by its main's docstring."""
    return CommandParser(
        prog=f"mlm-jax {name}", description=inspect.cleandoc(doc or ""), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="SPEC",
        help="a shipped config, gpt2:124m; a file, path/x.py:ARG; or the folder of a run",
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
        value = match[3] if match[2] else next(words, "--")
        if not match[2] and value.startswith("--"):  # the next option, or the end
            raise ConfigError(f"{word} has no value; give {word}=VALUE")
        overrides[match[1]] = value
    return parser.parse_args(rest), overrides


def check_only_layout(overrides: Overrides) -> None:
    if other := [key for key in overrides if not key.startswith("layout.")]:
        raise ConfigError(f"{', '.join(other)}: only layout.* can be set; the model is the run's")


def layout_asked_for(run: RunConfig, overrides: Overrides) -> Any:
    """The Layout of these layout.* for a trained model; None where nothing is asked for."""
    check_only_layout(overrides)
    if not overrides:
        return None
    from mlm_jax.layout import Layout

    wanted = {key.removeprefix("layout."): value for key, value in overrides.items()}
    return Layout.from_config(from_dict(run.to_dict() | {"layout": wanted}), training=False)


def path(text: str) -> Path:
    """A path from the command line. An empty one is a variable that is not set, not this folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    if "://" in text:  # which only data.path takes
        raise argparse.ArgumentTypeError(f"{text} is an address; copy it to a disk first")
    return Path(text).expanduser()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows with their columns aligned; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


class HelpConfig(argparse.Action):
    """Prints every setting with its default and meaning."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for key, field in KEYS.items():
            doc = field.metadata["doc"]
            default = str(field.default).replace("\n", "\\n")
            print(f"{key:32} {default:12} {doc}  ({takes(field)})")
        sys.exit(0)

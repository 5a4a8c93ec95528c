"""The one door that settings come in through.

`load_config("gpt2:124m", {"layout.tp": 2})` reads a config file, applies overrides, collects every
problem and raises one ConfigError, or returns a frozen RunConfig. Nothing here touches jax.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import traceback
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlm_jax.config import KEYS, SECTIONS, RunConfig, Table, kinds_of
from mlm_jax.errors import ConfigError
from mlm_jax.misfits import misfits

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# What the config.json of a run has beside its settings.
ABOUT = ("format", "versions", "fingerprint", "checksums", "origin")


def load_config(spec: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run that a config file and overrides describe.

    spec       a shipped config, `gpt2:124m`, from any folder; a file, `path/x.py:ARG`, which is
               code: read a stranger's before you run it; or the folder of a run, for its settings
    overrides  {"model.n_layers": 2} or text, {"model.n_layers": "2"}, typed by the setting

    Raises ConfigError with every problem at once.
    """
    cfg = _read_spec(spec)
    problems = []
    for key, value in (overrides or {}).items():
        section, _, name = key.rpartition(".")
        if key not in KEYS:
            problems.append(_unknown(key))
            continue
        try:
            typed = _typed(value, KEYS[key])
        except ValueError as why:
            problems.append(f"{key}={value!r} is not {why}")
            continue
        group: Any = cfg[section] if section else cfg
        with cfg.unlocked(), cfg.ignore_type():  # references to this key (4 * d_model) follow
            group[name] = typed
    return from_dict({"name": str(spec)} | _set_values(cfg), problems)


def from_dict(values: Mapping[str, Any], problems: list[str] | None = None) -> RunConfig:
    """A RunConfig from nested plain values (config.json, a ConfigDict); missing keys take defaults.

    `problems` found before are reported together with those found here.
    """
    problems = list(problems or [])
    odd = [s for s in SECTIONS if not isinstance(values.get(s, {}), Mapping)]
    values = {key: value for key, value in values.items() if key not in odd}
    flat = {
        f"{section}.{name}" if section else name: value
        for section, group in [*((s, values.get(s, {})) for s in SECTIONS), ("", values)]
        for name, value in group.items()
        if section or name not in SECTIONS
    }
    problems += [_unknown(key) for key in flat if key not in KEYS]
    problems += [f"{s} is no group of settings" for s in odd]
    good, bad = {}, {problem.partition("=")[0] for problem in problems}
    for key in KEYS.keys() & flat.keys():
        try:
            good[key] = _typed(flat[key], KEYS[key])
            _in_range(good[key], KEYS[key].metadata)
        except ValueError as why:
            problems.append(f"{key}={flat[key]!r} is not {why}")
            bad.add(key)
    sections = {
        s: kind(
            **{
                k.rpartition(".")[2]: v
                for k, v in good.items()
                if k.startswith(s + ".") and k not in bad
            }
        )
        for s, kind in SECTIONS.items()
    }
    loose = {key: value for key, value in good.items() if "." not in key and value is not None}
    run = RunConfig(**sections, **loose)
    problems += [p for p in misfits(run) if not any(f"{key}=" in p for key in bad)]
    if problems:
        many = f"{len(problems)} settings" if len(problems) > 1 else "a setting"
        raise ConfigError(f"{many} cannot be used:\n  " + "\n  ".join(sorted(set(problems))))
    return run


def _typed(value: Any, field: dataclasses.Field) -> Any:
    """value, text or not, as the field's type. ValueError says what was expected."""
    kinds = kinds_of(field)
    if types.NoneType in kinds and (value is None or str(value).lower() == "none"):
        return None
    kind = kinds[0]
    text = value.strip() if isinstance(value, str) else ""
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool) or text.lower() in known:
            return value if isinstance(value, bool) else known[text.lower()]
        raise ValueError("true or false")
    if kind in (int, float):
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or number != number:
            raise ValueError("a whole number" if kind is int else "a number")
        if kind is int:
            if number in (float("inf"), float("-inf")) or number != int(number):
                raise ValueError("a whole number")
            return value if isinstance(value, int) else int(text) if _digits(text) else int(number)
        return number
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise ValueError(
            f"one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    if kind is str:
        if isinstance(value, str) and value:  # empty: a variable of the shell that is not set
            return value
        raise ValueError("text")
    return _table(value)


def _table(value: Any) -> Table:
    """Rows from text, a mapping, or pairs: name -> names."""
    if value is None:
        return ()
    if isinstance(value, str):
        rows = [row.partition("=") for row in value.split(";") if row.strip()]
        if not all(equals for _, equals, _ in rows):
            raise ValueError("a table like 'mlp=tp,fsdp; heads='")
        value = [(name.strip(), names.split(",")) for name, _, names in rows]
    try:
        pairs = value.items() if hasattr(value, "items") else value
        rows = [(k, [v] if isinstance(v, str) else v) for k, v in pairs]
        return tuple((str(k), tuple(str(n).strip() for n in v if str(n).strip())) for k, v in rows)
    except (TypeError, ValueError):
        raise ValueError("a table from names to names, like {'mlp': ('tp', 'fsdp')}") from None


def _in_range(value: Any, metadata: Mapping[str, Any]) -> None:
    low, below = metadata.get("low"), metadata.get("below")
    if isinstance(value, int | float) and low is not None:
        if low == -1 and value in (0,):
            raise ValueError("a size of 1 or more, or -1 for the rest of the devices")
        if not (value >= low and value < (below if below is not None else float("inf"))):
            least = f"at least {low}" if low != -1 else "a size of 1 or more, or -1 for the rest"
            raise ValueError(least + (f" and below {below}" if below is not None else ""))


def _digits(text: str) -> bool:
    return text.lstrip("+-").replace("_", "").isdigit()


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, KEYS, n=2, cutoff=0.7)
    same_name = [k for k in KEYS if k.rpartition(".")[2] == key.rpartition(".")[2]]
    meant = list(dict.fromkeys(same_name + near))[:3]
    return f"{key} is no setting" + (f"; did you mean {' or '.join(meant)}?" if meant else "")


def _read_spec(spec: str | Path) -> "ConfigDict":
    name, _, arg = str(spec).partition(":")
    found = os.path.isfile(os.path.join(spec, "config.json")) or (
        os.path.isdir(spec) and "/" in name
    )
    if found and not (shipped_configs() / f"{name}.py").is_file():
        return _read_run(Path(spec))
    is_file = name.endswith(".py") or "/" in name
    path = Path(name) if is_file else shipped_configs() / f"{name}.py"
    if not os.path.isfile(path):  # which, unlike Path.is_file, takes any text
        shipped = sorted(p.stem for p in shipped_configs().glob("*.py"))
        near = difflib.get_close_matches(name.lower(), shipped, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no config {name!r}; {hint}shipped: {', '.join(shipped)}")
    sizes: Any = ()
    try:
        module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        sizes = getattr(module, "SIZES", ())
        cfg = module.get_config(*([arg] if arg else []))
        _require_config(cfg)
        return cfg
    except (Exception, SystemExit) as why:  # whatever a config file, which is code, may raise
        has = f"; it has {', '.join(sizes)}" if sizes and isinstance(why, KeyError) else ""
        raise ConfigError(_where(path, why) + _what(why) + has) from why


def _read_run(folder: Path) -> "ConfigDict":
    """The settings of a run, or of a converted model."""
    from mlm_jax.config import defaults

    cfg, path = defaults(), folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "format" not in content and "model_type" in content:
            raise ConfigError(
                f"{folder} is a model of Hugging Face; first `mlm-jax convert from-hf {folder}"
                " --workdir W`, then give W"
            )
        values = {key: value for key, value in content.items() if key not in ABOUT}
        model = from_dict(values).model  # which tells what is wrong in it
        for field in dataclasses.fields(model):  # what follows from others, still follows
            if dataclasses.replace(model, **{field.name: field.default}) == model:
                values.get("model", {}).pop(field.name, None)
        with cfg.unlocked(), cfg.ignore_type():
            cfg.update(values)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no run: there is no {path}") from None
    except (OSError, ValueError, TypeError, AttributeError) as why:
        raise ConfigError(f"{path} cannot be read: {why}") from None
    return cfg


def _require_config(cfg: Any) -> None:
    from ml_collections import ConfigDict

    if not all(type(part) is ConfigDict for part in (cfg, *(getattr(cfg, s, 0) for s in SECTIONS))):
        raise TypeError("get_config returns what mlm_jax.config.defaults() gives, with changes")


def _where(path: Path, why: BaseException) -> str:
    """'path, line 5: ', or without a line where none of this file was at work."""
    frames = traceback.extract_tb(why.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename) == path.absolute()]
    return f"{path}, line {lines[-1]}: " if lines else f"{path}: "


def _what(why: BaseException) -> str:
    """The error, without the list of every other key that ml_collections adds."""
    if near := re.search(r'Did you mean "(.*)" instead of "(.*)"', str(why)):
        return f"{near[2]} is no setting; did you mean {near[1]}?"
    return f"{type(why).__name__}: {str(why).partition(' and cannot be added')[0]}"


def shipped_configs() -> Path:
    """The folder of the configs that come with the package: inside a wheel, beside a checkout's."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def _set_values(cfg: "ConfigDict") -> dict:
    """A ConfigDict as nested dicts, without the Nones that mean 'not set'."""
    prune = lambda tree: {  # noqa: E731
        k: prune(v) if k in SECTIONS else v for k, v in tree.items() if v is not None
    }
    return prune(cfg.to_dict())

"""The house has floors: a module imports from floors below its own, and from its own room.

A package is a room; the loose files of a floor are one room. `mlm_jax/__init__.py` stands above all
floors, and nothing inside imports from it.
"""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlm_jax

ROOT = Path(mlm_jax.__file__).parent
FLOORS = (
    {
        "errors", "config", "misfits", "batch_sizes", "door", "layout", "layout_misfits",
        "layout_rules", "mesh", "distributed", "watchdog", "links", "stop", "host", "metrics",
        "terminal", "boards", "profiling",
    },
    {"layers/", "data/"},
    {"models/", "losses", "optimizer", "schedules"},
    {"step", "gradients", "stages", "checkpoint/", "inference/"},
    {"evaluate/", "report", "charts", "summary", "bad_steps"},
    {"loop"},
    {"__main__", "commands/"},
)  # fmt: skip
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}


def test_every_module_has_a_floor_and_every_name_on_a_floor_a_module():
    assert {name_on_floor(dotted(file)) for file in MODULES} == FLOOR_OF.keys()


def test_imports_go_down_or_stay_in_the_room():
    wrong = []
    for file in MODULES:
        here = name_on_floor(dotted(file))
        for line, module in imports(file, dotted(file)):
            there = name_on_floor(module)
            if module and FLOOR_OF[there] >= FLOOR_OF[here] and room(there) != room(here):
                floors = f"{here} is on floor {FLOOR_OF[here]}, {there} on {FLOOR_OF[there]}"
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}: {floors}")
    assert not wrong, "\n".join(wrong)


def test_nothing_inside_imports_the_package_itself():
    found = [(file, line) for file in MODULES for line, m in imports(file, dotted(file)) if not m]
    assert not found


def test_only_the_two_doors_import_by_name():
    by_name = {file.name for file in ROOT.rglob("*.py") if "import_module" in file.read_text()}
    assert by_name == {"__init__.py", "__main__.py"}  # what `imports` cannot see


def test_a_wheel_has_every_package():
    with (ROOT.parent / "pyproject.toml").open("rb") as file:
        listed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    there = {".".join(f.parent.relative_to(ROOT.parent).parts) for f in ROOT.rglob("__init__.py")}
    assert listed == there | {"mlm_jax.configs"}


def test_names_say_what_is_inside():
    assert not VAGUE & {part for file in MODULES for part in dotted(file).split(".")}


def test_the_reader_of_imports_sees_every_form(tmp_path):
    (tmp_path / "x.py").write_text("""
import jax, mlm_jax.step
def f():
    from mlm_jax.data.tokenizer import Tokenizer
    from .cache import Cache
    from ..config import KEYS
    from .. import __version__
    from mlm_jax import load
""")
    found = [(2, "step"), (4, "data.tokenizer"), (5, "layers.cache"), (6, "config")]
    assert list(imports(tmp_path / "x.py", "layers.x")) == [*found, (7, ""), (8, "")]


def test_floors_0_to_3_do_without_what_a_bare_gpu_image_lacks():
    lower = [dotted(f) for f in MODULES if FLOOR_OF[name_on_floor(dotted(f))] <= 3]
    python(f"""
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ml_collections", "grain", "tensorboard"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for module in {lower}:
    importlib.import_module("mlm_jax." + module)
""")


def test_the_door_answers_without_jax():
    done = python("""
import sys
import mlm_jax
from mlm_jax.__main__ import main

def status(*words):
    try:
        status = main(list(words))
    except SystemExit as end:  # as argparse leaves after --help
        status = end.code
    assert not {"jax", "flax", "numpy"} & sys.modules.keys(), words
    return status

assert mlm_jax.load_config("gpt2:124m", {"layout.tp": 2}).layout.tp == 2
for words in (["--help"], ["--version"], ["train", "--help-config"]):
    assert status(*words) == 0
for command in ("train", "generate", "explain", "data", "convert"):
    assert status(command, "--help") == 0
    assert status(command) == 2
for words in (["--config.modle.x=1"], ["--config", "gpt22"], ["--wordkir=x"]):
    assert status("train", "--config=gpt2", "--workdir=x", *words) == 2
    assert status("explain", "--config=gpt2", *words) == 2
assert status("trian") == 2
""")
    assert done.stderr.count("mlm-jax: ") == 5 + 6 + 1


def test_what_the_package_exports_is_there():
    assert set(mlm_jax.__all__) <= set(dir(mlm_jax))
    for name in mlm_jax.__all__:
        assert getattr(mlm_jax, name).__module__ == mlm_jax.EXPORTS[name]
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; it has .*load"):
        mlm_jax.lod  # noqa: B018


def dotted(file: Path) -> str:
    """'layers.norm' of mlm_jax/layers/norm.py, 'layers.__init__' of mlm_jax/layers/__init__.py."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def name_on_floor(module: str) -> str:
    top = module.partition(".")[0]
    return f"{top}/" if (ROOT / top).is_dir() else top


def room(name: str) -> str | int:
    """A package is a room of its own; the loose files of a floor share one."""
    return name if name.endswith("/") else FLOOR_OF[name]


def imports(file: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, module below mlm_jax) of its imports, those in functions too; '' is mlm_jax itself."""
    inside = ["mlm_jax", *module.split(".")]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside[: -node.level] if node.level else []
            names = [".".join([*above, *([node.module] if node.module else [])])]
        for top, _, below in (name.partition(".") for name in names):
            if top == "mlm_jax":
                yield node.lineno, below


def python(script: str) -> subprocess.CompletedProcess:
    """A fresh interpreter: what this one has imported does not count."""
    env = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done

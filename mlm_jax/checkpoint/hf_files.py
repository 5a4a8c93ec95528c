"""The tensors in a folder of Hugging Face: one file or shards with an index, read one by one."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the name bfloat16, which safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from mlm_jax.checkpoint.names import Row
from mlm_jax.checkpoint.streaming import Shape, some
from mlm_jax.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE = 4096  # rows compared at a time


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read ({why.strerror})") from None
    except ValueError as why:
        raise CheckpointError(f"{path} is no JSON: {why}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


class SafetensorsFiles:
    """A Source. Every file is opened, and its size compared with its header, before any is read."""

    def __init__(self, folder: Path, files: list[Path]):
        self.folder, self._places = folder, {}
        for file in files:
            try:
                opened = safe_open(file, "np")
                self._places |= dict.fromkeys(opened.keys(), opened)
            except (SafetensorError, OSError) as why:
                raise CheckpointError(
                    f"{file} is no whole safetensors file ({why}): is its download complete?"
                ) from None

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> Shape:
        return tuple(self._places[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._places[name].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._places[name].get_slice(name)[start:stop]


class TorchFiles:
    """A Source of pytorch_model.bin: mapped into memory, and nothing in it is run."""

    def __init__(self, folder: Path, files: list[Path]):
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise CheckpointError(
                f"{files[0]} can be read with torch only; `pip install torch`, or save the model"
                " as safetensors"
            ) from None
        self.folder, self._tensors = folder, {}
        for file in files:
            try:
                self._tensors |= torch.load(file, "cpu", weights_only=True, mmap=True)
            except Exception as why:  # what is broken in a pickle, torch says in many ways
                told = str(why).splitlines()[0]
                raise CheckpointError(f"{file} cannot be read ({told})") from None
        self._to_numpy = lambda t: t.view(torch.int16).numpy().view("bfloat16") if (
            t.dtype == torch.bfloat16) else t.numpy()  # fmt: skip

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        return self._to_numpy(self._tensors[name].detach().contiguous())

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._to_numpy(self._tensors[name][start:stop].detach().contiguous())


class Tensors:
    """A Source: the tensors of a folder under the names that a make's table has."""

    def __init__(self, files: SafetensorsFiles | TorchFiles, names: Mapping[str, str]):
        self._files, self._names = files, names

    def __str__(self) -> str:
        return str(self._files.folder)

    @property
    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> Shape:
        return self._files.shape(self._names[name])

    def read(self, name: str) -> np.ndarray:
        return self._files.read(self._names[name])

    def repeats(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, bit for bit; compared a few rows at a time."""
        if not {one, other} <= self.names or self.shape(one) != self.shape(other):
            return False
        a, b = self._names[one], self._names[other]
        n = self.shape(one)[0]
        parts = ((start, min(start + PIECE, n)) for start in range(0, n, PIECE))
        return all(np.array_equal(self._files.rows(a, *p), self._files.rows(b, *p)) for p in parts)

    def without(self, name: str) -> "Tensors":
        return Tensors(self._files, {k: v for k, v in self._names.items() if k != name})


def open_folder(folder: Path) -> SafetensorsFiles | TorchFiles:
    """The tensors in a folder. Raises CheckpointError where there are none or a file is damaged."""
    for single, index, kind in (
        (SINGLE, INDEX, SafetensorsFiles),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", TorchFiles),
    ):
        if (folder / single).is_file():  # which counts, where both are there
            return kind(folder, [folder / single])
        if (folder / index).is_file():
            return kind(folder, shards(folder, index))
    raise CheckpointError(
        f"{folder} has no weights: there is no {SINGLE}, {INDEX} or pytorch_model.bin"
    )


def shards(folder: Path, index: str) -> list[Path]:
    """The files that an index names. Raises CheckpointError for those that are missing."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index} has no weight_map")
    files = sorted(set(map(str, weight_map.values())))
    if any(Path(file).name != file for file in files):
        raise CheckpointError(f"{folder / index} names files outside of {folder}")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise CheckpointError(f"{folder} lacks {some(missing)}, which {index} names")
    return [folder / file for file in files]


def renamed(
    files: SafetensorsFiles | TorchFiles, table: tuple[Row, ...], prefix: str, ignored: str
) -> Tensors:
    """The tensors without those that say nothing, under the names that the table has.

    A model that was saved without its head lacks the prefix; the first BERTs were TensorFlow's, and
    say gamma and beta.
    """
    top = {name.partition(".")[0] for row in table for name in row.theirs}
    bare = bool(prefix) and not any(name.startswith(prefix) for name in files.names)
    names = {}
    for theirs in files.names:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", theirs)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if bare and name.partition(".")[0] not in top:
            name = prefix + name
        if not re.fullmatch(ignored, name):
            names[name] = theirs
    return Tensors(files, names)

"""Tensors in Megatron-LM's checkpoints by name, whole whatever TP and PP they were saved with.

Both formats are pickles, which can run anything. Nothing here unpickles freely: torch.load has
weights_only=True, and classes that are not needed come back as the empty `Left`; the index of
torch_dist has a reader that knows its own few classes.
"""

import argparse
import contextlib
import io
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mlm_jax.checkpoint.streaming import Shape, some
from mlm_jax.errors import CheckpointError

TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")  # a row a token, then padding
MODEL = ("embedding.", "decoder.", "output_layer.")  # how names of a GPT's tensors begin
SAME = {  # layers without TransformerEngine have norms apart: names there, names in torch_dist
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
INSIDE, ROWS = ("linear_proj.weight", "linear_fc2.weight"), (
    *TABLES, "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias",
)  # fmt: skip


class Left:
    """Stands for what a checkpoint holds and a model does not need."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


LEFT_OUT = [
    "_codecs.encode",
    "_io.BytesIO",
    "types.SimpleNamespace",
    "signal.Signals",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.dtypes.UInt32DType",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
]


def load(file: Path | io.BytesIO, name: str = "") -> Any:
    """What torch.save wrote, its tensors not read yet. Raises CheckpointError."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            "Megatron-LM's checkpoints are read with torch, which is not there; pip install"
            " 'mlm_jax[megatron]'"
        ) from None
    known: list[Any] = [argparse.Namespace, *((Left, name) for name in LEFT_OUT)]
    mapped = {"mmap": True} if isinstance(file, Path) else {}
    others = torch.serialization.get_safe_globals()  # megatron.core adds its own
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(file, map_location="cpu", weights_only=True, **mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except pickle.UnpicklingError as why:
        reason = str(why).partition("WeightsUnpickler error: ")[2] or str(why)
        raise CheckpointError(
            f"{name or file} is not read: it needs more than tensors and settings, which could run"
            f" code ({reason.splitlines()[0]})"
        ) from None
    except Exception as why:  # a damaged pickle may raise anything
        reason = f"{type(why).__name__}: {why}".splitlines()[0]
        raise CheckpointError(
            f"{name or file} is damaged, or no file of torch ({reason})"
        ) from None
    finally:
        torch.serialization.add_safe_globals(others)


def to_numpy(tensor: Any) -> np.ndarray:
    """Without a copy; bfloat16 too, which NumPy has no word for."""
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


class Ranks:
    """A Source of legacy files: mp_rank_TT/ or mp_rank_TT_PPP/model_optim_rng.pt, mapped."""

    def __init__(self, folder: Path):
        self.folder = folder
        found = {self._place(f.parent.name): f for f in sorted(folder.glob(f"mp_rank_*/{FILE}"))}
        if not found:
            raise CheckpointError(f"{folder} has no mp_rank_00/{FILE}")
        first = load(found[min(found)])
        self.args = first.get("args") if isinstance(first, dict) else None
        if not isinstance(self.args, argparse.Namespace):
            raise CheckpointError(f"{found[min(found)]} holds no arguments of Megatron-LM")
        self._tp = getattr(self.args, "tensor_model_parallel_size", 1)
        pp = getattr(self.args, "pipeline_model_parallel_size", 1)
        expected = {(t, p) for t in range(self._tp) for p in range(pp)}
        if expected != found.keys():
            lacks = [self._name(place, pp) for place in sorted(expected - found.keys())]
            more = [found[place].parent.name for place in sorted(found.keys() - expected)]
            told = [f"it lacks {some(lacks)}"] * bool(lacks) + [f"it has {some(more)}"] * bool(more)
            raise CheckpointError(
                f"{folder} was saved with tp {self._tp} and pp {pp}, but {' and '.join(told)}"
            )
        self._parts: dict[str, list[Any]] = {}  # of all TP ranks
        for rank in range(self._tp):
            files = [load(found[rank, stage]) for stage in range(pp)]
            for name, tensor in numbered(files, folder):
                self._parts.setdefault(name, []).append(tensor)
        odd = [name for name, parts in self._parts.items() if len(parts) != self._tp]
        if odd:
            raise CheckpointError(f"{folder}: not all ranks have {some(odd)}")

    @staticmethod
    def _place(name: str) -> tuple[int, ...]:
        numbers = [int(n) for n in name.removeprefix("mp_rank_").split("_") if n.isdecimal()]
        return tuple([*numbers, 0][:2]) if len(numbers) < 3 else tuple(numbers)

    @staticmethod
    def _name(place: tuple[int, ...], pp: int) -> str:
        return f"mp_rank_{place[0]:02d}" + (f"_{place[1]:03d}" if pp > 1 else "")

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def names(self) -> set[str]:
        return set(self._parts)

    def shape(self, name: str) -> Shape:
        shape, dim = list(self._parts[name][0].shape), split_dim(name)
        if dim is not None:
            shape[dim] = sum(part.shape[dim] for part in self._parts[name])
        return tuple(shape)

    def read(self, name: str) -> np.ndarray:
        parts, dim = [to_numpy(part) for part in self._parts[name]], split_dim(name)
        if dim is None or len(parts) == 1:
            return parts[0]
        if ".linear_fc1." in name and getattr(self.args, "swiglu", False):  # each has both halves
            halves = [np.split(part, 2) for part in parts]
            parts = [half[i] for i in range(2) for half in halves]
        return np.concatenate(parts, dim)


FILE = "model_optim_rng.pt"


def split_dim(name: str) -> int | None:
    """The dim that TP splits; None: every rank has the whole."""
    return 1 if name.endswith(INSIDE) else 0 if name.endswith(ROWS) else None


def numbered(stages: list[Any], folder: Path) -> Iterable[tuple[str, Any]]:
    """Tensors of one TP rank, layers numbered through all stages and their chunks in order."""
    before = 0
    chunks = sorted({k for s in stages for k in s if k == "model" or k[5:].isdecimal()})
    for chunk in chunks:
        for stage, content in enumerate(stages):
            tensors = content.get(chunk)
            if not isinstance(tensors, Mapping) or "language_model" in tensors:
                raise CheckpointError(f"{folder} was not written by Megatron-LM's core models")
            layers = set()
            for name, value in tensors.items():
                if name.endswith("_extra_state"):
                    continue
                number, rest = layer_of(name)
                if number is None:
                    if name == "output_layer.weight" and _copies(content, stage, stages):
                        continue  # of the embedding, for the last stage
                    yield name, value
                else:
                    layers.add(number)
                    yield canonical(f"decoder.layers.{number + before}.{rest}"), value
            before += len(layers)


def _copies(content: Mapping[str, Any], stage: int, stages: list[Any]) -> bool:
    untied = getattr(content.get("args"), "untie_embeddings_and_output_weights", False)
    return not untied and 0 < stage == len(stages) - 1


def layer_of(name: str) -> tuple[int | None, str]:
    """decoder.layers.3.mlp.x -> 3, mlp.x"""
    words = name.split(".", 3)
    if name.startswith("decoder.layers.") and len(words) == 4 and words[2].isdecimal():
        return int(words[2]), words[3]
    return None, name


def canonical(name: str) -> str:
    for local, fused in SAME.items():
        name = name.replace(local, fused)
    return name


class Chunk(NamedTuple):
    """A part of a tensor, and where its bytes are."""

    start: Shape
    shape: Shape
    file: Path
    offset: int
    length: int


class Distributed:
    """A Source of torch_dist: .metadata says which bytes of which .distcp are which part."""

    def __init__(self, folder: Path):
        self.folder, self._chunks, self._shapes = folder, {}, {}
        common = load(folder / "common.pt") if (folder / "common.pt").exists() else {}
        self.args = common.get("args") if isinstance(common, dict) else None
        needed: dict[Path, int] = {}
        try:
            self._read(read_index(folder / ".metadata"), needed)
        except (TypeError, AttributeError, ValueError, IndexError) as why:
            raise CheckpointError(f"{folder / '.metadata'} is damaged: {why}") from None
        self._check(needed)

    def _read(self, index: Any, needed: dict[Path, int]) -> None:
        """Where which part is; of each file the number of bytes that it needs to have."""
        folder = self.folder
        places = {
            (i.fqn, tuple(i.offset or ())): place for i, place in index.storage_data.items()
        }  # fmt: skip
        for key, about in index.state_dict_metadata.items():
            if not key.startswith(MODEL) or about.chunks is None:
                continue
            chunks = []
            for chunk in about.chunks:
                start, shape = tuple(chunk.offsets), tuple(chunk.sizes)
                place = places.get((key, start))
                if place is None or place.transform_descriptors:
                    raise CheckpointError(f"{folder}: it is not told where {key} is, uncompressed")
                if Path(place.relative_path).name != place.relative_path:
                    raise CheckpointError(f"{folder}: {key} is outside, {place.relative_path}")
                file = folder / place.relative_path
                needed[file] = max(needed.get(file, 0), place.offset + place.length)
                chunks.append(Chunk(start, shape, file, place.offset, place.length))
            self._add(canonical(key), tuple(about.size), chunks)

    def _add(self, key: str, size: Shape, chunks: list[Chunk]) -> None:
        """Of a stack of layers, each by its own name."""
        stacked = key.startswith("decoder.layers.") and layer_of(key)[0] is None
        if not stacked:
            self._shapes[key], self._chunks[key] = size, [(None, chunk) for chunk in chunks]
            return
        for layer in range(size[0]):
            name = key.replace("layers.", f"layers.{layer}.", 1)
            holding = [c for c in chunks if c.start[0] <= layer < c.start[0] + c.shape[0]]
            self._shapes[name] = size[1:]
            self._chunks[name] = [(layer - chunk.start[0], chunk) for chunk in holding]

    def _check(self, needed: Mapping[Path, int]) -> None:
        problems = [f"{file.name} is missing" for file in needed if not file.exists()]
        problems += [
            f"{file.name} has {file.stat().st_size} bytes, and not all {end}"
            for file, end in needed.items()
            if file.exists() and file.stat().st_size < end
        ]
        for name, chunks in self._chunks.items():
            there = sum(math.prod(c.shape[layer is not None :]) for layer, c in chunks)
            if there != math.prod(self._shapes[name]):
                problems.append(f"parts of {name} are missing")
        if problems:
            more = f"\n  and {len(problems) - 8} more" * (len(problems) > 8)
            told = "\n  ".join(sorted(problems)[:8])
            raise CheckpointError(f"{self.folder} is not whole:\n  {told}{more}")

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        whole = None
        for layer, chunk in self._chunks[name]:
            with chunk.file.open("rb") as file:
                file.seek(chunk.offset)
                tensor = load(io.BytesIO(file.read(chunk.length)), f"{chunk.file}: {name}")
            part = to_numpy(tensor)
            if part.shape != chunk.shape:
                raise CheckpointError(f"{chunk.file}: {name} has another shape than .metadata says")
            start, part = (
                (chunk.start, part) if layer is None else (chunk.start[1:], part[layer])
            )  # fmt: skip
            if whole is None:
                whole = np.empty(self._shapes[name], part.dtype)
            whole[tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))] = part
        assert whole is not None
        return whole


INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan", "TensorWriteData", "BytesIOWriteData", "WriteItem", "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"float32", "bfloat16", "float16", "float64", "uint8", "int64", "int32", "int8",
              "bool", "float8_e4m3fn", "float8_e5m2"},
}  # fmt: skip


class IndexReader(pickle.Unpickler):
    """Of a .metadata: its classes are empty here and filled with what they say of themselves."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if name in INDEX.get(module, ()):
            return Told
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that an index needs")


class Told:
    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __getattr__(self, name: str) -> None:
        """What is not said: an index of version 1.0.0 leaves out what is None."""
        if name.startswith("__"):
            raise AttributeError(name)


def read_index(file: Path) -> Any:
    try:
        index = IndexReader(io.BytesIO(file.read_bytes())).load()
        with contextlib.suppress(AttributeError):
            if isinstance(index.storage_data, dict) and isinstance(index.state_dict_metadata, dict):
                return index
        raise pickle.UnpicklingError("it names no tensors")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except Exception as why:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file} is no index of torch_dist: {why}") from None

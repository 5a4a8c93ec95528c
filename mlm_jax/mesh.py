"""The mesh: which axes there are, how large a preset makes them, which device stands where."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from mlm_jax.config import LayoutConfig
from mlm_jax.errors import LayoutError

log = logging.getLogger(__name__)

MESH_AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")  # slowest network first, fastest last

REST, NODE = -1, 0  # sizes that a preset leaves open: the rest of the devices; those of a node
PRESETS = {  # an explicit size wins; devices left over go to dp, unless dp is set
    "single": {"dp": 1},
    "dp": {"dp": REST},
    "zero1": {"dp": REST, "zero": 1},
    "zero2": {"dp": REST, "zero": 2},
    "zero3": {"fsdp": REST},
    "fsdp": {"fsdp": REST},
    "hybrid": {"fsdp": NODE, "dp": REST},
    "tp": {"tp": REST},
    "tp_sp": {"tp": REST, "sequence_parallel": True},
    "fsdp_tp": {"fsdp": REST, "tp": 2},
}
IMAGINED_NODE = 8  # devices of a node where devices are only imagined: a DGX, an HGX


def resolve(cfg: LayoutConfig, count: int, node: int = IMAGINED_NODE) -> dict[str, Any]:
    """Sizes of all axes on `count` devices, sequence_parallel and zero: what Layout.create takes.

    node: devices of a node, over which `hybrid` puts fsdp, and beside it cp and tp where set.
    """
    preset = PRESETS[cfg.preset or ("single" if count == 1 else "dp")]
    given = {a: n for a in MESH_AXES if (n := getattr(cfg, a)) is not None}
    sizes = (
        dict.fromkeys(MESH_AXES, 1) | {a: n for a, n in preset.items() if a in MESH_AXES} | given
    )
    rest = [a for a in MESH_AXES if given.get(a) == REST]
    if len(rest) > 1:
        raise LayoutError(
            f"{' and '.join(f'layout.{a}=-1' for a in rest)}: at most one takes the rest"
        )
    if sizes["fsdp"] == NODE and "fsdp" not in given:
        sizes["fsdp"] = max(min(node, count) // math.prod(sizes[a] for a in ("ep", "cp", "tp")), 1)
    if rest:  # given by hand: the preset's own gives way
        sizes = {a: 1 if n == REST and a not in rest else n for a, n in sizes.items()}
    elif "dp" not in given and cfg.preset != "single" and REST not in sizes.values():
        rest, sizes["dp"] = ["dp"], REST
    rest = [a for a, n in sizes.items() if n == REST]
    if rest:
        others = math.prod(n for n in sizes.values() if n != REST)
        if count % others:
            shown = shown_sizes({a: n for a, n in sizes.items() if n != REST})
            raise LayoutError(
                f"layout {shown} takes {others} devices at a time, which does not divide the"
                f" {count} there are; try sizes whose product divides {count}"
            )
        sizes[rest[0]] = count // others
    split = {  # a preset's own where there is something to split, an explicit one in any case
        "sequence_parallel": bool(preset.get("sequence_parallel")) and sizes["tp"] > 1,
        "zero": preset.get("zero", 0) if sizes["dp"] > 1 else 0,
    }
    return sizes | {k: n if (said := getattr(cfg, k)) is None else said for k, n in split.items()}


def node_size(cfg: LayoutConfig, devices: Sequence[Any] | int) -> int:
    """Devices of a node, which `resolve` asks for."""
    if isinstance(devices, int):
        return IMAGINED_NODE
    size, processes = len(nodes(devices)[0]), len({d.process_index for d in devices})
    if cfg.preset == "hybrid" and cfg.fsdp is None and 1 < processes == size == len(devices):
        log.warning(
            "layout.preset='hybrid' has fsdp over all %d devices: each is a process, and JAX knows"
            " no nodes among them; if there are, set layout.fsdp to the devices of one", size,
        )  # fmt: skip
    return size


def make_mesh(devices: Sequence[Any] | int, sizes: Mapping[str, int]) -> Mesh | AbstractMesh:
    """The mesh over these devices; over a number of them, which are only imagined, an abstract one.

    Axes are GSPMD's (Auto): jax.make_mesh alone would give Explicit ones, and refuses devices of
    several nodes.
    """
    auto = (AxisType.Auto,) * len(MESH_AXES)
    if isinstance(devices, int):
        return AbstractMesh(tuple(sizes[a] for a in MESH_AXES), MESH_AXES, axis_types=auto)
    return Mesh(arranged(devices, sizes), MESH_AXES, axis_types=auto)


def arranged(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Devices [pp, dp, fsdp, ep, cp, tp] such that the last axes stay within a node.

    They do where their sizes divide a node's, one after the other from tp on; then each node is a
    block of the mesh. Other sizes are taken as well, in the order of devices, with a warning if tp
    leaves a node.
    """
    groups = nodes(devices)
    size = len(groups[0])
    if len(groups) > 1 and size % sizes["tp"]:
        best = max(n for n in range(1, min(size, sizes["tp"]) + 1) if size % n == 0)
        log.warning(
            "layout.tp=%d reaches over several nodes of %d devices, at the speed of the network"
            " between them; layout.tp=%d stays inside", sizes["tp"], size, best,
        )  # fmt: skip
    inside = block(sizes, size) if {len(g) for g in groups} == {size} else None
    if len(groups) == 1 or inside is None:
        return mesh_utils.create_device_mesh(tuple(sizes[a] for a in MESH_AXES), devices)
    return mesh_utils.create_hybrid_device_mesh(
        [inside[a] for a in MESH_AXES], [sizes[a] // inside[a] for a in MESH_AXES], devices,
        process_is_granule=node_key(devices) == "process_index",
    )  # fmt: skip


def block(sizes: Mapping[str, int], node: int) -> dict[str, int] | None:
    """The part of the mesh that a node of so many devices is, fastest axes first; None: none is."""
    inside = {}
    for axis in reversed(MESH_AXES):
        inside[axis] = min(sizes[axis], node)
        if sizes[axis] % inside[axis] or node % inside[axis]:
            return None
        node //= inside[axis]
    return inside


def nodes(devices: Sequence[Any]) -> list[list[Any]]:
    key, groups = node_key(devices), {}
    for device in devices:
        groups.setdefault(getattr(device, key) if key else 0, []).append(device)
    return list(groups.values())


def node_key(devices: Sequence[Any]) -> str | None:
    """The attribute by which devices of a node are the same; None: all are of one.

    A node is what JAX calls a slice, the devices of one fast network (NVLink, ICI). Where it knows
    one slice only, as on CPUs, it is a process, unless each has a single device.
    """
    slices = {getattr(d, "slice_index", 0) for d in devices}
    if len(slices) > 1:
        return "slice_index"
    processes = {d.process_index for d in devices}
    return "process_index" if 1 < len(processes) < len(devices) else None


def shown_sizes(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "of size 1"

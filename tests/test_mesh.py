"""Which device stands where: the fast axes within a node, and presets that know of nodes."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mlm_jax.config import LayoutConfig
from mlm_jax.errors import LayoutError
from mlm_jax.layout import Layout
from mlm_jax.mesh import IMAGINED_NODE, MESH_AXES, arranged, node_size, nodes, resolve

NODES, EACH = 8, 8


def gpus(nodes=NODES, each=EACH, *, slices=True, per_process=EACH, seed=None):
    """Devices as JAX lists them, in the order of processes; ids count the same way."""
    found = [
        SimpleNamespace(
            id=i, process_index=i // per_process, slice_index=i // each if slices else 0,
            platform="gpu", device_kind="NVIDIA H100",
        )
        for i in range(nodes * each)
    ]  # fmt: skip
    return found if seed is None else list(np.random.default_rng(seed).permutation(found))


def sizes(**given):
    return {axis: given.get(axis, 1) for axis in MESH_AXES}


def groups(mesh, *axes):
    """Nodes of the devices along these axes, one set for each group."""
    kept = [i for i, axis in enumerate(MESH_AXES) if axis not in axes]
    moved = np.moveaxis(mesh, kept, range(len(kept)))
    rows = moved.reshape(int(np.prod(moved.shape[: len(kept)])), -1)
    return [{device.id // EACH for device in row} for row in rows]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("known", [{"slices": True, "per_process": 1}, {"slices": False}], ids=str)
@pytest.mark.parametrize(
    ("given", "inside"),
    [
        ({"dp": 8, "tp": 8}, ["tp"]),
        ({"pp": 4, "dp": 2, "tp": 8}, ["tp"]),
        ({"pp": 8, "dp": 2, "tp": 4}, ["dp", "tp"]),
        ({"dp": 8, "fsdp": 8}, ["fsdp"]),
        ({"dp": 4, "fsdp": 4, "cp": 2, "tp": 2}, ["cp", "tp"]),
        ({"pp": 2, "fsdp": 8, "cp": 2, "tp": 2}, ["cp", "tp"]),
    ],
    ids=str,
)
def test_groups_of_the_fast_axes_stay_in_a_node(given, inside, known, seed):
    mesh = arranged(gpus(**known, seed=seed), sizes(**given))
    assert mesh.shape == tuple(sizes(**given).values())
    assert len({device.id for device in mesh.flat}) == NODES * EACH
    assert all(len(group) == 1 for group in groups(mesh, *inside))


def test_stages_of_a_pipeline_are_on_nodes_of_their_own():
    mesh = arranged(gpus(), sizes(pp=8, tp=8))
    assert groups(mesh, "tp") == [{n} for n in range(8)]
    assert groups(mesh, "pp") == [set(range(8))] * 8


def test_tp_over_two_nodes_is_taken_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        mesh = arranged(gpus(), sizes(dp=4, tp=16))
    assert all(len(group) == 2 for group in groups(mesh, "tp"))
    assert "layout.tp=16 reaches over several nodes of 8 devices" in caplog.text
    assert "layout.tp=8 stays inside" in caplog.text


def test_sizes_that_no_node_is_a_block_of_are_taken_in_order(caplog):
    mesh = arranged(gpus(nodes=6), sizes(dp=8, tp=6))
    assert [device.id for device in mesh.flat] == list(range(48))
    assert "layout.tp=4 stays inside" in caplog.text


def test_fitting_sizes_and_a_single_node_are_silent(caplog):
    arranged(gpus(), sizes(pp=2, dp=4, tp=8))
    arranged(gpus(nodes=1), sizes(dp=2, tp=4))
    arranged(gpus(nodes=1, per_process=1), sizes(tp=8))  # a process a device, one node
    assert not caplog.records


def test_this_machines_devices_are_one_node_in_their_order():
    layout = Layout.create(dp=2, tp=4)
    assert len(nodes(jax.devices())) == 1
    assert list(layout.mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
    ("given", "count", "node", "expected"),
    [
        ({}, 64, 8, {"dp": 8, "fsdp": 8}),
        ({}, 8, 8, {"fsdp": 8}),
        ({}, 4, 8, {"fsdp": 4}),
        ({"tp": 2}, 64, 8, {"dp": 8, "fsdp": 4, "tp": 2}),
        ({"pp": 2}, 64, 8, {"pp": 2, "dp": 4, "fsdp": 8}),
        ({"fsdp": 4}, 64, 8, {"dp": 16, "fsdp": 4}),  # nodes of another size than these
        ({"tp": 16}, 64, 8, {"dp": 4, "tp": 16}),
        ({}, 32, 4, {"dp": 8, "fsdp": 4}),
    ],
)
def test_hybrid_has_fsdp_in_a_node_and_dp_across(given, count, node, expected):
    found = resolve(LayoutConfig(preset="hybrid", **given), count, node)
    assert {axis: n for axis, n in found.items() if axis in MESH_AXES and n > 1} == expected


def test_imagined_nodes_have_eight_devices_and_others_must_divide():
    assert resolve(LayoutConfig(preset="hybrid"), 32)["fsdp"] == 8
    with pytest.raises(LayoutError, match=r"fsdp=8 takes 8 devices .* divides 12"):
        resolve(LayoutConfig(preset="hybrid"), 12)


@pytest.mark.parametrize(
    ("settings", "devices", "size", "warned"),
    [
        ({"preset": "hybrid"}, gpus(slices=False, per_process=1), 64, True),
        ({"preset": "hybrid", "fsdp": 8}, gpus(slices=False, per_process=1), 64, False),
        ({"preset": "fsdp"}, gpus(slices=False, per_process=1), 64, False),
        ({"preset": "hybrid"}, gpus(slices=False), 8, False),
        ({"preset": "hybrid"}, gpus(per_process=1), 8, False),
        ({"preset": "hybrid"}, gpus(nodes=1), 8, False),  # of one process
        ({"preset": "hybrid"}, 64, IMAGINED_NODE, False),
    ],
)
def test_hybrid_says_where_it_knows_no_nodes(settings, devices, size, warned, caplog):
    assert node_size(LayoutConfig(**settings), devices) == size
    assert ("set layout.fsdp to the devices of one" in caplog.text) == warned


def test_a_stage_of_zero_is_the_presets_unless_set():
    assert resolve(LayoutConfig(preset="zero2"), 8)["zero"] == 2
    assert resolve(LayoutConfig(preset="zero2", zero=1), 8)["zero"] == 1
    assert resolve(LayoutConfig(preset="zero2"), 1)["zero"] == 0

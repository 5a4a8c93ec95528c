import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mlm_jax.errors import ConfigError
from mlm_jax.host import XLA_PRESETS, missing_xla_flags, set_xla_flags
from mlm_jax.loop import check_xla, train
from tests.conftest import tiny_run

ON_GPUS = SimpleNamespace(on_gpu=lambda: True)


def test_xla_knows_every_flag_of_every_preset():
    flags = " ".join(f"--{k}={v}" for preset in XLA_PRESETS.values() for k, v in preset.items())
    command = [sys.executable, "-c", "import jax; jax.devices()"]  # an unknown flag aborts here
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, check=True)


def test_a_preset_adds_to_the_flags_that_are_there(monkeypatch):
    mine = "--xla_gpu_enable_pipelined_all_gather=false"
    monkeypatch.setenv("XLA_FLAGS", mine)
    assert "xla_gpu_enable_pipelined_all_reduce" in missing_xla_flags("overlap")
    set_xla_flags("overlap")
    assert os.environ["XLA_FLAGS"].startswith(f"{mine} --xla_gpu_enable_latency_hiding_scheduler")
    assert os.environ["XLA_FLAGS"].count("pipelined_all_gather") == 1
    check_xla("overlap", ON_GPUS)


def test_a_preset_that_does_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.xla='overlap' does nothing without GPUs"):
        train(tiny_run(train={"xla": "overlap"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"too late.*set_xla_flags\('overlap'\) before jax"):
        check_xla("overlap", ON_GPUS)
    check_xla("default", ON_GPUS)

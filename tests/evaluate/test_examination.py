from types import SimpleNamespace

import pytest

from mlm_jax.evaluate.examination import Examination
from mlm_jax.step import make_steps
from tests.conftest import tiny_layout, tiny_run


@pytest.mark.parametrize(("width", "able"), [(64, True), (60, False)])
def test_no_samples_where_layers_that_no_stage_divides_would_be_whole_on_each_device(width, able):
    run = tiny_run(
        model={"n_layers": 8, "d_model": width, "n_heads": 2, "vocab_size": 128},
        train={"accumulate": 8},
    )
    layout = tiny_layout(run, pp=8)
    data = SimpleNamespace(valid=None)
    examination = Examination(run, layout, data, make_steps(run, layout), None, None)
    assert examination.can_generate == able

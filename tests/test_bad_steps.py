"""Steps that are not finite: counted in a row, told with what is known of them."""

import numpy as np
import pytest

from mlm_jax.bad_steps import BadSteps
from mlm_jax.errors import MlmJaxError

WEIGHTS = ["embedding.tokens", "blocks.mlp.up", "norm.scale"]


def step(*norms: float, loss: float = 2.5) -> dict:
    """The metrics of a step whose three weights have gradients of these norms."""
    norm = np.sqrt(np.square(norms).sum())
    applied = np.isfinite(loss) and np.isfinite(norm)
    return {"loss": loss, "grad_norm": norm, "grad_norms": np.array(norms), "applied": applied}


GOOD, BAD = step(1, 2, 3), step(1, np.inf, 3)


def test_only_a_bad_step_is_written_down_with_its_weights():
    bad_steps = BadSteps(9, WEIGHTS)
    assert bad_steps.look(1, GOOD) is None
    written = {"loss": 2.5, "grad_norm": np.inf, "weights": ["blocks.mlp.up"]}
    assert bad_steps.look(2, BAD) == written
    bad_steps.check(0)


def test_good_steps_in_between_start_the_count_again():
    bad_steps = BadSteps(2, WEIGHTS)
    for n, metrics in enumerate([BAD, GOOD, BAD, GOOD]):
        bad_steps.look(n, metrics)
        bad_steps.check(0)


def test_too_many_in_a_row_are_told_even_after_a_good_one():
    bad_steps = BadSteps(2, WEIGHTS)
    for n, metrics in enumerate([GOOD, BAD, BAD, BAD, GOOD], start=11):
        bad_steps.look(n, metrics)  # all of them may come between two checks
    with pytest.raises(MlmJaxError) as why:
        bad_steps.check(10)
    said = str(why.value)
    assert said.startswith("2 steps in a row, to step 13, were not applied, as loss or gradient")
    assert "The newest checkpoint is of step 10." in said
    assert "train.batch(12)" in said
    assert "train.bad_steps_limit=20" in said


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (BAD, "loss 2.5, gradient norm inf, weights with such a gradient: blocks.mlp.up."),
        (step(np.nan, np.nan, np.nan, loss=np.nan), "loss nan, gradient norm nan, weights with such"
         " a gradient: all."),
        (step(1, 2, 3, loss=np.inf), "loss inf, gradient norm 3.74166, weights with such a"
         " gradient: none by itself."),
    ],
)  # fmt: skip
def test_the_message_says_what_to_look_at(metrics, said):
    bad_steps = BadSteps(1, WEIGHTS)
    bad_steps.look(4, metrics)
    with pytest.raises(MlmJaxError) as why:
        bad_steps.check(0)
    assert str(why.value).startswith("step 4 was not applied, as loss or gradient is not finite:")
    assert said in str(why.value)
    assert "Nothing was saved yet." in str(why.value)

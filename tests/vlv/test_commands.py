import pytest

from core_jax.commands import config_names, unknown_value
from vlv_jax.experiment import Experiment


def test_names_of_every_group_are_known():
    """Suggestions for a mistyped value come from these, also from a group that may be None."""
    names = config_names(Experiment)
    wanted = {"run.steps", "optimizer.learning_rate", "data.limits.max_pixels",
              "data.source.split", "evaluation.num_captions"}  # fmt: skip
    assert wanted <= names
    assert "EvaluationConfig" not in names


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("optimizer.lerning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("stpes", "'stpes' is unknown"),
        ("optimizer.eps", "'optimizer.eps' can be set, but this config file leaves it"),
    ],
)
def test_a_value_that_cannot_be_set(given, said):
    """The second kind is a field of the dataclass that the config file does not have."""
    argv = ["train", "--config=configs/x.py", "--config.run.steps=3", f"--config.{given}=1"]
    error = KeyError(f"'{given.rsplit('.', maxsplit=1)[-1]}'\nDid you mean nothing?")
    assert said in unknown_value(argv, Experiment, error)

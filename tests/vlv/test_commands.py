from core_jax.commands import config_names
from vlv_jax.experiment import Experiment


def test_names_of_every_group_are_known():
    """Suggestions for a mistyped value come from these, also from a group that may be None."""
    names = config_names(Experiment)
    assert {"steps", "learning_rate", "max_pixels", "split", "num_captions"} <= names
    assert "EvaluationConfig" not in names

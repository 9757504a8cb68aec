import types

import jax
import jax.numpy as jnp
import pytest

from core_jax.commands import config_names, core_errors, unknown_value
from core_jax.diffusion.samplers import inference_timesteps
from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.models import load_config
from core_jax.partition import split
from core_jax.sharding import make_mesh
from core_jax.train.optimizer import OptimizerConfig, make_optimizer
from vlv_jax.experiment import Experiment
from vlv_jax.loading import load_processor, load_schedule
from vlv_jax.redrawing import compose
from vlv_jax.stage1 import DenoisingConfig, draw


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


def _start(**changes):
    make_optimizer(OptimizerConfig(**changes)).init({"up": {"bias": jnp.zeros(2)}})


def _draw(min_timestep):
    networks = types.SimpleNamespace(schedule=NoiseSchedule.stable_diffusion())
    config = DenoisingConfig(min_timestep=min_timestep)
    draw(networks, config, jax.random.key(0), jnp.arange(2), (2, 2, 4))


MISTAKES = {
    "does not fit": lambda folder: make_mesh({"data": 1, "fsdp": jax.device_count() + 1}),
    "unknown mesh axes": lambda folder: make_mesh({"model": 1}),
    "match no parameter: 'down/": lambda folder: split({"up": 1}, ["down/.*"]),
    "no regular expression": lambda folder: split({"up": 1}, ["up/("]),
    "match no trainable parameter": lambda folder: _start(lr_multipliers=(("down/.*", 0.1),)),
    "matched by several": lambda folder: _start(lr_multipliers=((".*", 0.1), ("up/.*", 0.1))),
    "is not JSON": load_config,
    "preprocessor_config.json: size": load_processor,
    "scheduler_config.json: .*FlowMatch": load_schedule,
    "min_timestep must be below": lambda folder: _draw(1000),
    "has 3 embeddings; 4": lambda folder: compose(
        jnp.zeros((1, 3, 2)), jnp.zeros((1, 3, 2)), num_first=4, num_second=1
    ),
    "between 1 and 1000": lambda folder: inference_timesteps(
        NoiseSchedule.stable_diffusion(), "ddim", 1001
    ),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_what_a_user_can_mend_needs_no_traceback(said, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"')
    (tmp_path / "preprocessor_config.json").write_text('{"size": "large"}')
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatch"}')
    with pytest.raises(core_errors(), match=said):
        MISTAKES[said](tmp_path)

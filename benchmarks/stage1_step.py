"""The stage-1 training step of the full-size config, with random weights made on the devices.

The step is the one that `vlv_jax.train` runs: its loss, optimizer, trainable set, shardings and
donation; only the hub's weights and the pictures are made up.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_weights import random_leaves
from configs import vlv_stage1
from core_jax.config import to_dataclass
from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.flops import count_flops
from core_jax.models import autoencoder_kl, clip_text, florence2, unet
from core_jax.models.auto import family_of
from core_jax.ops.execution import Execution
from core_jax.partition import count_parameters, split
from core_jax.sharding import batch_sharding, fsdp_by_size, make_mesh
from core_jax.train.hardware import compiler_flops
from core_jax.train.optimizer import make_optimizer, make_schedule
from core_jax.train.state import create_state
from core_jax.train.step import jit_train_step, make_train_step
from vlv_jax import networks as names
from vlv_jax.bridge import Bridge
from vlv_jax.experiment import Experiment
from vlv_jax.networks import Networks
from vlv_jax.training import make_loss, trainable_patterns

PROMPT_LENGTH = 14  # of the task prompt, in Florence-2's tokens


@dataclasses.dataclass
class Step:
    """A compiled step and what it takes.

    Attributes:
      call: one training step; waits for it, keeps the new state, returns the loss.
      flops: useful operations of one step over all devices (`count_flops`).
      compiler_flops: the compiler's count of one device's program; None where it has none.
      devices: how many take part.
      facts: sizes, for the record.
    """

    call: Any
    flops: float
    compiler_flops: float | None
    devices: int
    facts: dict[str, Any]


def experiment_of(size: str) -> Experiment:
    """The full-size experiment; "tiny" has its settings, small pictures, and float32."""
    experiment = to_dataclass(Experiment, vlv_stage1.get_config().to_dict())
    if size == "full":
        return experiment
    model = dataclasses.replace(
        experiment.model, frozen_dtype="float32", compute_dtype="float32", num_queries=8
    )
    data = dataclasses.replace(experiment.data, image_size=32)
    return dataclasses.replace(experiment, model=model, data=data)


def networks_of(size: str, num_queries: int, execution: Execution) -> Networks:
    """Florence-2-large and Stable Diffusion 2.1-base, or tiny ones of the same classes."""
    if size == "full":
        florence = florence2.Florence2Config.large()
        text = clip_text.CLIPTextConfig.sd21()
        denoiser = unet.UNet2DConditionConfig.sd21_base()
        vae = autoencoder_kl.AutoencoderKLConfig.sd21()
    else:
        from benchmarks.unet import unet_config
        from miniature import standins

        florence = florence2.Florence2Config.tiny()
        denoiser = unet_config("tiny")
        text = clip_text.CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, hidden_act="gelu",
        )  # fmt: skip
        vae = dataclasses.replace(
            standins.vae_config(0.5), block_out_channels=(4, 4, 8), norm_num_groups=2
        )
    kind: Any = {"execution": execution}
    return Networks(
        florence2=florence2.Florence2(config=florence, **kind),
        bridge=Bridge(num_queries, florence.text_config.d_model, text.hidden_size),
        text_encoder=clip_text.CLIPTextModel(config=text, **kind),
        schedule=NoiseSchedule.stable_diffusion(),
        prompt_ids=tuple(range(PROMPT_LENGTH)),
        empty_ids=(0,) * num_queries,
        unet=unet.UNet2DConditionModel(config=denoiser, **kind),
        vae=autoencoder_kl.AutoencoderKL(config=vae, **kind),
    )


def abstract_params(networks: Networks) -> dict[str, Any]:
    """Shapes of all parameters, by network."""
    parts = {
        names.FLORENCE2: networks.florence2, names.TEXT_ENCODER: networks.text_encoder,
        names.UNET: networks.unet, names.VAE: networks.vae,
    }  # fmt: skip
    shapes = {name: family_of(m).abstract_params(m) for name, m in parts.items()}
    bridge = jax.eval_shape(networks.bridge.init, jax.random.key(0))["params"]
    return {**shapes, names.BRIDGE: bridge}


def random_batch(batch_size: int, image_size: int, florence_size: int) -> dict[str, np.ndarray]:
    """Pictures of noise, as the data pipeline delivers pictures."""
    rng = np.random.default_rng(0)
    sides = {"image": image_size, "florence_image": florence_size}
    views = {
        name: rng.integers(0, 256, (batch_size, side, side, 3), np.uint8)
        for name, side in sides.items()
    }
    return {"index": np.arange(batch_size, dtype=np.int32), **views}


def build(size: str, batch_per_device: int, execution: Execution) -> Step:
    """Makes the weights, compiles the step.

    Args:
      size: "full" or "tiny".
      batch_per_device: pictures of a step on each device.
      execution: backends and rematerialisation.
    """
    experiment = experiment_of(size)
    mesh = make_mesh({"data": 1, "fsdp": -1})
    batch_size = batch_per_device * mesh.size
    model = experiment.model
    networks = networks_of(size, model.num_queries, execution)
    trainable, frozen = split(abstract_params(networks), trainable_patterns(experiment))
    place = functools.partial(fsdp_by_size, mesh=mesh)
    masters = random_leaves(trainable, shardings=place(trainable))
    frozen = _frozen(frozen, place, model)

    schedule = make_schedule(experiment.optimizer)
    optimizer = make_optimizer(experiment.optimizer, schedule)
    state, shardings = create_state(
        masters, optimizer, param_shardings=place(trainable), mesh=mesh
    )
    del masters

    def step_for(networks: Networks) -> Any:
        return make_train_step(
            make_loss(experiment, networks), optimizer, schedule,
            compute_dtype=model.compute_dtype, seed=experiment.run.seed, keyed_by_example=True,
        )  # fmt: skip

    sharding = batch_sharding(mesh)
    florence_size = 768 if size == "full" else 64
    batch = jax.device_put(
        random_batch(batch_size, experiment.data.image_size, florence_size), sharding
    )
    plain = networks_of(size, model.num_queries, Execution())
    flops = count_flops(step_for(plain), *_shapes((state, frozen, batch)))
    step = jit_train_step(step_for(networks), shardings, place(frozen), sharding, mesh)
    compiled = step.lower(state, frozen, batch).compile()
    held = [state]

    def call() -> float:
        state, metrics = compiled(held.pop(), frozen, batch)
        held.append(state)
        metrics = jax.device_get(metrics)
        if metrics["nonfinite"]:
            raise FloatingPointError("the step with random weights is not finite")
        return float(metrics["loss"])

    memory = compiled.memory_analysis()
    facts = {
        "batch": batch_size, "remat": execution.remat, "attention": execution.attention,
        "GB of state": _gigabytes(state), "GB of frozen weights": _gigabytes(frozen),
        **(_planned(experiment, mesh) if size == "full" else {}),
        "GB of temporaries a device": memory and memory.temp_size_in_bytes / 1e9,
        "trained parameters": count_parameters(trainable),
        "frozen parameters": count_parameters(frozen),
    }  # fmt: skip
    return Step(call, flops, compiler_flops(compiled), mesh.size, facts)


def _frozen(abstract: Mapping[str, Any], place: Any, model: Any) -> dict[str, Any]:
    return {
        name: random_leaves(
            tree, shardings=place(tree),
            dtype=model.vae_dtype if name == names.VAE else model.frozen_dtype,
        )
        for name, tree in abstract.items()
    }  # fmt: skip


def _gigabytes(tree: Any) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9


def _planned(experiment: Experiment, mesh: Any) -> dict[str, float]:
    """The same bytes by the plan (launch.plan): of the state and of what is frozen."""
    from vlv_jax.planning import abstract_job

    state, frozen, _ = abstract_job(experiment, mesh).program.arguments
    return {
        "GB of state, planned": _gigabytes(state),
        "GB of frozen weights, planned": _gigabytes(frozen),
    }


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)

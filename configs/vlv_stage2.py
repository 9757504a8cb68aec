"""VLV stage 2: the captioner, with Qwen2.5 0.5B, 1.5B (default) or 3B; `:mini` on two CPU cores.

Paper (section 4.1): AdamW, learning rate 1e-5 with a linear decay, batch 64, 100,000 steps. The
default is 1.5B because 3B's licence forbids commercial use.
"""

from ml_collections import ConfigDict

from configs import common
from vlv_jax.experiment import Experiment

_SIZES = {
    "": "hub/Qwen/Qwen2.5-1.5B",
    "0.5b": "hub/Qwen/Qwen2.5-0.5B",
    "1.5b": "hub/Qwen/Qwen2.5-1.5B",
    "3b": "hub/Qwen/Qwen2.5-3B",
}
# Variant -> language model and Muon's rate. After 1,000 steps of 2,000 the medium one has 0.77 of
# the held-out objects right, at 7e-4 0.73, at 2.4e-3 0.75; the large one was trained at 7e-4 only.
_MINI = {
    "mini": ("qwen2.5-medium", 1.2e-3),
    "mini-small": ("qwen2.5-small", 1.2e-3),
    "mini-medium": ("qwen2.5-medium", 1.2e-3),
    "mini-large": ("qwen2.5-large", 7e-4),
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in (*_SIZES, *_MINI):
        known = ", ".join(repr(v) for v in (*_SIZES, *_MINI))
        raise ValueError(f"vlv_stage2 has the variants {known}, not {variant!r}")
    config = ConfigDict({
        "stage": 2,
        "model": common.full_model(),
        "data": common.data("data/laion-captions", batch_size=64),
        "run": common.run(100_000, mesh={"data": 1, "fsdp": -1}, init_from="runs/vlv_stage1"),
        "optimizer": {
            "name": "adamw", "learning_rate": 1e-5, "schedule": "linear", "warmup_steps": 500,
            "b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "clip_norm": 1.0,
            "lr_multipliers": (),  # (path pattern, factor) pairs
        },
        "denoising": {
            "loss": "mse", "condition_dropout": 0.0, "min_timestep": 0, "draws_per_image": 1,
        },
        "captioning": {
            "reconstruction_weight": 0.0, "reconstruction_every": 1, "supervise_eos": True,
            "logits_chunk": 64,
        },
        "sampling": common.sampling(num_beams=4),
        "evaluation": common.evaluation(),
        "trainable": (),
    })  # fmt: skip
    config.model.language_model = _SIZES.get(variant, "")
    if variant in _MINI:
        _mini(config, *_MINI[variant])
    return common.complete(config, Experiment)


def _mini(config: ConfigDict, language_model: str, rate: float) -> None:
    config.model = common.mini_model(language_model)
    config.data = common.mini_data()
    config.run = common.run(3000, save_every=1500, sample_every=1500, init_from="runs/demo/stage1")
    # Muon gets with 1,400 steps where AdamW is after 2,000, and a step takes a tenth longer.
    # The projector alone is fresh. The encoder moves slowly: at the language model's it forgets
    # more than it learns (AdamW, 300 steps: 0.54 nats a token; 0.43 at 0.3 of it), and at 2e-4 it
    # is worse at combinations that no training scene has (0.79 of the objects right; 0.80 at 7e-5).
    config.optimizer.update(name="muon", learning_rate=rate, warmup_steps=50)
    config.optimizer.lr_multipliers = ((r"projector/.*", 10.0), (r"florence2/.*", 0.06))
    # Without stage 1's loss the pixel error of what is redrawn doubles; two images of the batch's
    # eight are enough to keep it.
    config.captioning.update(reconstruction_weight=1.0, reconstruction_every=4)
    config.sampling = common.mini_sampling()
    config.evaluation = common.mini_evaluation()

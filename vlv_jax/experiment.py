"""What an experiment's config means, typed. `main` builds one of these from the ConfigDict."""

import dataclasses
from typing import Literal

from core_jax.config_checks import (
    at_least,
    check_drawing,
    check_micro_batches,
    check_run,
    is_fraction,
)
from core_jax.data.images import ImageLimits
from core_jax.data.sources import SourceSpec
from core_jax.ops.execution import Execution
from core_jax.train.optimizer import OptimizerConfig
from vlv_jax.stage1 import DenoisingConfig
from vlv_jax.stage2 import CaptioningConfig

Dtype = Literal["float32", "bfloat16"]
TASK_PROMPT = "Describe with a paragraph what is shown in the image."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which networks, and in what precision.

    Attributes:
      florence2: hub directory with tokenizer and preprocessor_config.json.
      diffusion: diffusers pipeline directory (SD 2.1-base, SD 1.5, or a stand-in).
      language_model: hub directory of a Qwen2; empty in stage 1.
      num_queries: Q, at most the text encoder's positions.
      task_prompt: Florence-2's instruction; what <MORE_DETAILED_CAPTION> stands for.
      frozen_dtype: how frozen networks are held.
      compute_dtype: what trained parameters are cast to in a step (their masters are float32).
      vae_dtype: the VAE loses detail in bfloat16.
      execution: backends and rematerialisation.
    """

    florence2: str
    diffusion: str
    language_model: str = ""
    num_queries: int = 77
    task_prompt: str = TASK_PROMPT
    frozen_dtype: Dtype = "bfloat16"
    compute_dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    execution: Execution = Execution()

    def __post_init__(self):
        at_least("model", self, num_queries=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, captions, and how they become batches.

    Attributes:
      source: where examples come from.
      batch_size: examples a step, over all processes.
      image_size: side of the square that the VAE sees, in pixels.
      crop: how an image becomes square (core_jax.data.resize.CropSpec).
      resample: the released code resizes bilinearly (torchvision's default).
      native_crops: crop at Florence-2's input size and shrink for the VAE, instead of enlarging
        a crop of `image_size` for Florence-2, as the paper does.
      max_tokens: longest caption in tokens, end of text included; longer ones are cut.
      max_bad_fraction: of images that cannot be used, before the run stops.
      limits: what an acceptable image is.
      cache: folder that `vlv_jax.cache` wrote; empty: images are encoded on the fly.
      num_threads: of image decoding.
    """

    source: SourceSpec
    batch_size: int
    image_size: int = 384
    crop: Literal["center", "random", "squash"] = "center"
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    native_crops: bool = False
    max_tokens: int = 300
    max_bad_fraction: float = 0.01
    limits: ImageLimits = ImageLimits()
    cache: str = ""
    num_threads: int = 8

    def __post_init__(self):
        at_least("data", self, batch_size=1, image_size=1, max_tokens=1, num_threads=0)
        is_fraction("data", self, "max_bad_fraction")
        if self.cache and (self.crop == "random" or self.native_crops):
            raise ValueError(
                "data.cache holds one fixed crop of every image; it cannot be combined with "
                "data.crop='random' or data.native_crops. Use crop='center', or no cache"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The training run.

    Attributes:
      steps: updates in all.
      seed: of data order, noise and fresh parameters.
      grad_accum: micro-batches a step.
      ema_decay: of the averaged weights that `export` prefers; None keeps none.
      mesh: size of each mesh axis (data, fsdp, tensor); -1 is the rest.
      log_every, save_every, sample_every: steps; sample_every 0 never samples.
      keep: checkpoints kept.
      init_from: a workdir or an exported directory to start from; empty: the hub's weights.
      hang_seconds: after which a process that comes no further is named, and all end; longer than
        the longest compilation, save and evaluation. 0 waits for ever.
    """

    steps: int
    seed: int = 42
    grad_accum: int = 1
    ema_decay: float | None = None
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000
    keep: int = 2
    init_from: str = ""
    hang_seconds: float = 1800.0

    def __post_init__(self):
        check_run(self)
        at_least("run", self, sample_every=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are redrawn and captions written.

    Attributes:
      sampler: ddpm, ddim or euler.
      num_steps: denoising steps.
      guidance: classifier-free guidance scale (arXiv 2207.12598); 1 is none.
      num_beams: 1 is greedy (or sampling where temperature > 0); the released setting is 4.
      temperature: 0 takes the most likely token.
      top_k: 0 is no limit.
      top_p: 1 is no limit.
      max_new_tokens: longest caption.
      batch_size: images a call; the last batch is padded to it.
      seed: of noise and sampling.
      num_samples: images on a sample sheet.
    """

    sampler: Literal["ddpm", "ddim", "euler"] = "ddpm"
    num_steps: int = 50
    guidance: float = 2.0
    num_beams: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 300
    batch_size: int = 16
    seed: int = 42
    num_samples: int = 8

    def __post_init__(self):
        counts = ("num_steps", "num_beams", "max_new_tokens", "batch_size", "num_samples")
        at_least("sampling", self, **dict.fromkeys(counts, 1))
        check_drawing("sampling", self)
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"sampling.num_beams {self.num_beams} and sampling.temperature {self.temperature} "
                "exclude each other: set num_beams=1 to sample, or temperature=0 to search"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What `evaluate` measures.

    Attributes:
      source: held-out examples; unset in the full-size configs, since nobody but the user has them.
      num_captions: images captioned and scored.
      num_redrawn: images redrawn.
      num_denoising: images of the denoising comparison; 0 leaves it out.
      timesteps_per_image: of the denoising comparison, one in each equal part of the schedule.
      scorer: 'package.module:function' that scores captions against ground truth; may be empty.
      reference_key: the entry of an example's extras that the scorer gets.
      bootstrap_samples: of every interval.
      seed: of timesteps, noise and bootstrap.
    """

    source: SourceSpec = SourceSpec()
    num_captions: int = 500
    num_redrawn: int = 48
    num_denoising: int = 0
    timesteps_per_image: int = 4
    scorer: str = ""
    reference_key: str = ""
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self):
        at_least(
            "evaluation", self, num_captions=0, num_redrawn=0, num_denoising=0,
            timesteps_per_image=1, bootstrap_samples=1,
        )  # fmt: skip

    @property
    def has_source(self) -> bool:
        """Whether the held-out examples are named."""
        return self.source.path is not None or self.source.name is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a VLV job is told.

    Attributes:
      stage: 1 (bottleneck) or 2 (captioner).
      trainable: path patterns; empty: the stage's own (vlv_jax.stage1/stage2.TRAINABLE).
    """

    stage: Literal[1, 2]
    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optimizer: OptimizerConfig
    denoising: DenoisingConfig = DenoisingConfig()
    captioning: CaptioningConfig = CaptioningConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig | None = None
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        if self.stage == 2 and not self.model.language_model:
            raise ValueError("stage 2 needs model.language_model")
        self.optimizer.check_length(self.run.steps)
        check_micro_batches(self.data, self.run)
        joint, every = self.captioning.reconstruction_weight, self.captioning.reconstruction_every
        if joint and (self.data.batch_size // self.run.grad_accum) % every:
            raise ValueError(
                f"captioning.reconstruction_every {every} does not divide the "
                f"{self.data.batch_size // self.run.grad_accum} images of a micro-batch"
            )

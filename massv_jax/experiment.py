"""What an experiment's config means, typed. `main` builds one of these from the ConfigDict."""

import dataclasses
from typing import Literal

from core_jax.config_checks import (
    at_least,
    check_drawing,
    check_lengths,
    check_micro_batches,
    check_run,
    is_fraction,
)
from core_jax.data.images import ImageLimits
from core_jax.data.sources import SourceSpec
from core_jax.ops.execution import Execution
from core_jax.train.optimizer import OptimizerConfig
from massv_jax.losses import LossConfig
from massv_jax.speculative.options import MAX_GAMMA

Dtype = Literal["float32", "bfloat16"]
Task = Literal["phase1", "distill", "phase2", "eval", "lossless"]

# Ends of LLaVA's questions after which answers are a word or two, and teach a drafter little.
SHORT_ANSWER_SUFFIXES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which target and drafter, and in what precision.

    Attributes:
      target: hub directory of the target, with tokenizer and preprocessor_config.json.
      language_model: hub directory of the small language model.
      kind: the drafter's kind; "auto" is the family's stock form.
      pooling: side of the squares of image tokens that the drafter sees as one.
      init_from_target: start a "merger" from the target's first layer.
      drafter: a drafter directory, export or working directory, for jobs that use one.
      frozen_dtype: how frozen networks are held.
      compute_dtype: what trained parameters are cast to in a step (their masters are float32).
      execution: backends and rematerialisation.
    """

    target: str
    language_model: str
    kind: Literal["auto", "merger", "mlp", "gemma", "prefix", "text"] = "auto"
    pooling: int = 1
    init_from_target: bool = True
    drafter: str = ""
    frozen_dtype: Dtype = "bfloat16"
    compute_dtype: Dtype = "bfloat16"
    execution: Execution = Execution()

    def __post_init__(self):
        at_least("model", self, pooling=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Conversations and how they become batches.

    Attributes:
      source: LLaVA-format instructions; captions of any other source serve phase 1.
      answers: folder of a target's answers (massv_jax.answers) to learn instead of the source's
        own; image names are relative to `answer_images`.
      answer_images: see `answers`.
      format: "plain" is image and caption without a template; "chat" the target's template.
      plain_end: what ends a caption in "plain".
      turns: "all" of a conversation, or the "first" only.
      image_place: see `parse_dialogue`.
      exclude: file with the names of evaluation images, which are left out; "" for none.
      batch_size: examples a step, over all processes.
      max_length: tokens of an example, image tokens included; longer ones are cut.
      image_windows: attention windows of an example's images together (Qwen2.5-VL); an example
        that needs more is refused and counted.
      max_images: images of an example (Gemma 3); examples with more are refused.
      min_pixels, max_pixels: limits of Qwen2.5-VL's resizing; 0: as the target's processor has
        them. A drafter must be trained and used under the same.
      max_bad_fraction: of examples that cannot be used, before the run stops.
      limits: what an acceptable image is.
      num_threads: of image decoding.
    """

    source: SourceSpec = SourceSpec()
    answers: str = ""
    answer_images: str = ""
    format: Literal["plain", "chat"] = "chat"
    plain_end: str = "\n"
    turns: Literal["all", "first"] = "all"
    image_place: Literal["first", "kept"] = "first"
    exclude: str = ""
    batch_size: int = 128
    max_length: int = 2048
    image_windows: int = 100
    max_images: int = 1
    min_pixels: int = 0
    max_pixels: int = 0
    max_bad_fraction: float = 0.02
    limits: ImageLimits = ImageLimits()
    num_threads: int = 8

    def __post_init__(self):
        at_least("data", self, batch_size=1, max_length=2, image_windows=1, max_images=0)
        at_least("data", self, min_pixels=0, max_pixels=0, num_threads=0)
        is_fraction("data", self, "max_bad_fraction")
        if self.answers and not self.answer_images:
            raise ValueError("data.answers needs data.answer_images, the folder of their images")
        if self.answers and self.format == "plain":
            raise ValueError("data.answers are conversations; they go with data.format='chat'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Attributes:
      steps: updates in all.
      seed: of data order and fresh parameters.
      grad_accum: micro-batches a step.
      ema_decay: of averaged weights that `export` prefers; None keeps none.
      mesh: size of each mesh axis (data, fsdp, tensor); -1 is the rest.
      log_every, save_every: steps.
      keep: checkpoints kept.
      init_from: a workdir or drafter directory to start from; empty: a fresh projector and the
        hub's language model.
      hang_seconds: after which a process that comes no further is named, and all end; longer than
        the longest compilation and save. 0 waits for ever.
    """

    steps: int = 1
    seed: int = 42
    grad_accum: int = 1
    ema_decay: float | None = None
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    log_every: int = 50
    save_every: int = 1000
    keep: int = 2
    init_from: str = ""
    hang_seconds: float = 1800.0

    def __post_init__(self):
        check_run(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How the target answers the instructions.

    Attributes:
      greedy_fraction: share of the instructions that are answered greedily, chosen by id.
      temperature, top_k, top_p: of the others.
      max_new_tokens: where answers are cut.
      turns: "first" asks the first question only; "all" asks every one, after the target's own
        earlier answers.
      suffixes: ends of questions that may be dropped.
      drop_suffix_fraction: share of the questions with such an end that lose it, chosen by id.
      on_policy: the drafter (model.drafter) writes, decoding.gamma tokens at a time, and the target
        adds a token after each window. Such answers are contexts to match the target's
        probabilities in (loss.teacher), not labels.
      store_top_k: so many of the target's probabilities are stored with each token; 0: none.
      max_samples: stop after so many instructions; 0: all.
      chunk_size: instructions that are committed together.
      batch_size: rows of a device's micro-batch; the result depends on it to rounding.
      prompt_lengths: allowed lengths of prompts; each is a program to compile.
      seed: of every choice and draw.
    """

    greedy_fraction: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    turns: Literal["first", "all"] = "first"
    suffixes: tuple[str, ...] = SHORT_ANSWER_SUFFIXES
    drop_suffix_fraction: float = 0.5
    on_policy: bool = False
    store_top_k: int = 0
    max_samples: int = 0
    chunk_size: int = 256
    batch_size: int = 16
    prompt_lengths: tuple[int, ...] = (512, 1024, 1536)
    seed: int = 0

    def __post_init__(self):
        is_fraction("distill", self, "greedy_fraction", "drop_suffix_fraction")
        at_least("distill", self, max_new_tokens=1, chunk_size=1, batch_size=1)
        at_least("distill", self, store_top_k=0, max_samples=0)
        check_drawing("distill", self)
        check_lengths("distill", self.prompt_lengths)
        if self.temperature <= 0:
            raise ValueError("distill.temperature must be positive; greedy_fraction=1 is greedy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How answers are generated with a drafter.

    Attributes:
      gamma: tokens of a draft.
      accept: see `DecodeOptions` (massv_jax.speculative).
      temperature: 0 is greedy.
      top_k: 0 is no limit.
      top_p: 1 is no limit.
      min_confidence: see `DecodeOptions`.
      max_new_tokens: longest answer.
      batch_size: rows of a call.
      prompt_lengths: allowed lengths of prompts.
      seed: of draws.
    """

    gamma: int = 5
    accept: Literal["rejection", "coupled"] = "rejection"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_confidence: float = 0.0
    max_new_tokens: int = 256
    batch_size: int = 1
    prompt_lengths: tuple[int, ...] = (512, 1024, 1536)
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.gamma <= MAX_GAMMA:
            raise ValueError(f"decoding.gamma is {self.gamma}; it must be from 1 to {MAX_GAMMA}")
        at_least("decoding", self, max_new_tokens=1, batch_size=1)
        is_fraction("decoding", self, "min_confidence")
        check_drawing("decoding", self)
        check_lengths("decoding", self.prompt_lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured.

    Attributes:
      source: held-out instructions, in LLaVA's format.
      num_prompts: of each task.
      gammas: tokens of a draft to try.
      temperatures: to try.
      min_answer_tokens: shorter answers do not count as descriptions.
      kernel_keys: keys with which `lossless` runs the accept rule on each recorded context.
      contexts: that `lossless` records.
      num_timed: questions of each task whose wall-clock is measured, at batch 1; 0: none.
      bootstrap_samples: of every interval.
      seed: of draws and bootstrap.
    """

    source: SourceSpec = SourceSpec()
    num_timed: int = 0
    num_prompts: int = 100
    gammas: tuple[int, ...] = (3, 5)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    min_answer_tokens: int = 40
    kernel_keys: int = 100_000
    contexts: int = 16
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self):
        at_least("evaluation", self, num_prompts=1, kernel_keys=1, contexts=0, bootstrap_samples=1)
        at_least("evaluation", self, num_timed=0, min_answer_tokens=0)
        for gamma in self.gammas:
            if not 1 <= gamma <= MAX_GAMMA:
                raise ValueError(f"evaluation.gammas has {gamma}; each is from 1 to {MAX_GAMMA}")
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError(f"evaluation.temperatures {self.temperatures} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a MASSV job is told.

    Attributes:
      task: which command the file is for.
      trainable: path patterns; empty: the phase's own (massv_jax.phase1/phase2.TRAINABLE).
    """

    task: Task
    model: ModelConfig
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        self.optimizer.check_length(self.run.steps)
        check_micro_batches(self.data, self.run)
        if self.task == "phase1" and self.model.kind == "text":
            raise ValueError("a text drafter has no projector to train; start at phase 2")

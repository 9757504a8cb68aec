"""What the MASSV experiments share. Values only: the types are in massv_jax/experiment.py.

Tags: [paper] the abstract of arXiv 2505.10526 says so; [LLaVA] LLaVA-1.5's scripts, where the
paper's own value is unknown; [ViSpec] that project's; [ours] a choice of this project, the paper
being silent.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import STANDINS

# Where checkpoints were downloaded to; override with --config.model.target=... and so on.
# The pairs 7B with 1.5B and 12B with 1B are the paper's; 32B and 27B with the same drafters are a
# stretch: their towers are other weights, so their drafters must be trained anew.
_MODELS: dict[str, tuple[str, str]] = {
    "qwen2_5_vl_7b": ("hub/Qwen/Qwen2.5-VL-7B-Instruct", "hub/Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen2_5_vl_32b": ("hub/Qwen/Qwen2.5-VL-32B-Instruct", "hub/Qwen/Qwen2.5-1.5B-Instruct"),
    "gemma3_12b": ("hub/google/gemma-3-12b-it", "hub/google/gemma-3-1b-it"),
    "gemma3_27b": ("hub/google/gemma-3-27b-it", "hub/google/gemma-3-1b-it"),
    "vlv": ("runs/vlv_captioner", "hub/Qwen/Qwen2.5-0.5B"),  # an export of vlv_jax, stage 2
    "mini": (f"{STANDINS}/qwen2.5-vl", f"{STANDINS}/qwen2.5-text"),
    "mini_gemma": (f"{STANDINS}/gemma-3", f"{STANDINS}/gemma-3-text"),
}
DEFAULT = "qwen2_5_vl_7b"
VARIANTS = ("", *_MODELS)
LCS_558K = ("data/llava-pretrain/blip_laion_cc_sbu_558k.json", "data/llava-pretrain/images")
MIX_665K = ("data/llava-instruct/llava_v1_5_mix665k.json", "data/llava-instruct/images")
# Held-out questions (a LLaVA-format file): massv_eval asks them, training leaves their images out.
HELD_OUT = ("data/massv_eval/questions.json", "data/massv_eval/images")
MINI_CAPTIONS = ("runs/miniature_llava/captions.json", "runs/miniature_llava/images")
MINI_QUESTIONS = ("runs/miniature_llava/instructions.json", "runs/miniature_llava/images")
# Where miniature.demo puts what it makes of the first; the other goes beside it.
MINI_RUNS = {"mini": "runs/demo/massv", "mini_gemma": "runs/demo/massv_gemma"}


def resolve(variant: str, file: str) -> str:
    """The variant that is meant.

    Raises:
        ValueError: it is unknown.
    """
    if variant not in VARIANTS:
        known = ", ".join(repr(v) for v in VARIANTS)
        raise ValueError(f"{file} has the variants {known}, not {variant!r}")
    return variant or DEFAULT


def is_mini(variant: str) -> bool:
    """Whether a variant runs on two CPU cores."""
    return variant.startswith("mini")


def base(variant: str, task: str) -> ConfigDict:
    """A whole experiment, to be changed by each file."""
    return ConfigDict({
        "task": task,
        "model": _model(variant),
        "data": _data(variant),
        "run": _run(variant, task),
        "optimizer": {
            "name": "adamw", "learning_rate": 1e-3, "schedule": "cosine",
            "warmup_steps": 65,  # 3 % [LLaVA]
            "b1": 0.9, "b2": 0.999, "weight_decay": 0.0, "clip_norm": 1.0,
        },
        "loss": {
            "ce": 1.0,  # [paper]: the target's answers as hard labels
            "kl": 0.0, "tv": 0.0, "log_acceptance": 0.0, "teacher": "none", "top_k": 0,
            "temperature": 1.0, "logits_chunk": 128,
        },
        "distill": {
            "greedy_fraction": 0.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0,  # [ours]
            "max_new_tokens": 256, "turns": "first", "drop_suffix_fraction": 0.5,  # [ours]
            "on_policy": False, "store_top_k": 0, "max_samples": 0, "chunk_size": 256,
            "batch_size": 16, "prompt_lengths": (512, 1024, 1536), "seed": 0,
        },
        "decoding": {
            "gamma": 5,  # [paper]
            "accept": "rejection", "temperature": 0.0, "top_k": 0, "top_p": 1.0,
            "min_confidence": 0.0, "max_new_tokens": 256, "batch_size": 1,
            "prompt_lengths": (512, 1024, 1536), "seed": 0,
        },
        "evaluation": {
            "source": {"kind": "auto"},
            "num_prompts": 100, "gammas": (1, 2, 3, 5, 7), "temperatures": (0.0, 1.0),
            "min_answer_tokens": 40, "kernel_keys": 100_000, "contexts": 16,
            "num_timed": 0, "bootstrap_samples": 1000, "seed": 0,
        },
        "trainable": (),
    })  # fmt: skip


def use_source(config: ConfigDict, files: tuple[str, str]) -> None:
    """Reads a LLaVA-format file (a tfds source does as well)."""
    config.data.source = ConfigDict({"kind": "llava", "path": files[0], "images": files[1]})


def use_steps(config: ConfigDict, steps: int, learning_rate: float) -> None:
    """Length and peak of a run, with 3 % of warm-up."""
    config.run.steps = steps
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = round(0.03 * steps)


def _model(variant: str) -> dict[str, Any]:
    target, language_model = _MODELS[variant]
    precision = "float32" if is_mini(variant) else "bfloat16"
    return {
        "target": target, "language_model": language_model,
        "kind": "auto", "pooling": 1, "init_from_target": True,  # [ours]: the stock forms
        "drafter": "", "frozen_dtype": precision, "compute_dtype": precision,
        "execution": {
            "attention": "xla", "conv": "xla", "depthwise_conv": "xla",
            "remat": "none" if is_mini(variant) else "full",
            "unroll": 8 if is_mini(variant) else 1,
        },
    }  # fmt: skip


def _data(variant: str) -> dict[str, Any]:
    data: dict[str, Any] = {
        "source": {"kind": "auto"},
        "answers": "", "answer_images": "", "format": "chat", "plain_end": "\n",
        "turns": "all", "image_place": "first", "exclude": HELD_OUT[0],
        "batch_size": 128,  # [LLaVA]
        "max_length": 2048,  # [LLaVA], image tokens included
        "image_windows": 112,  # room for 1280 tokens in any shape of up to 1 : 16
        "max_images": 1,
        "min_pixels": 0, "max_pixels": 0, "max_bad_fraction": 0.02, "num_threads": 16,
    }  # fmt: skip
    if variant.startswith("qwen2_5_vl"):
        data.update(min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28)  # [ViSpec]
    if variant.startswith("gemma3"):
        data.update(max_length=1536)  # 256 image tokens in place of up to 1280
    if variant == "vlv":
        data.update(format="plain", max_length=384)  # 77 embeddings and 300 tokens of caption
    if is_mini(variant):
        # The small world's held-out images are none of its others.
        data.update(batch_size=32, max_length=128, image_windows=4, num_threads=2, exclude="")
    return data


def _run(variant: str, task: str) -> dict[str, Any]:
    mini = is_mini(variant)
    # A step of training takes many tokens for every weight, so weights may travel; a step of
    # decoding takes a few, so they must not.
    mesh = {"data": 1, "fsdp": -1} if task.startswith("phase") else {"data": 1, "tensor": -1}
    return {
        "steps": 2180, "seed": 42, "grad_accum": 1,
        "mesh": {"data": -1} if mini else mesh,
        "log_every": 20, "save_every": 100 if mini else 500, "keep": 2, "init_from": "",
        "hang_seconds": 1800.0,
    }  # fmt: skip

"""A hub of tiny networks with random weights, with tokenizers, and a few pictures."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.models import save_model
from core_jax.models.autoencoder_kl import FAMILY as VAE_FAMILY
from core_jax.models.autoencoder_kl import AutoencoderKL
from core_jax.models.clip_text import FAMILY as CLIP_FAMILY
from core_jax.models.clip_text import CLIPTextModel
from core_jax.models.florence2 import FAMILY as FLORENCE2_FAMILY
from core_jax.models.florence2 import Florence2
from core_jax.models.qwen2 import FAMILY as QWEN2_FAMILY
from core_jax.models.qwen2 import Qwen2ForCausalLM
from core_jax.models.unet import FAMILY as UNET_FAMILY
from core_jax.models.unet import UNet2DConditionModel
from miniature import standins
from miniature.tokenizers import build_tokenizers

WIDTH = 16  # of the text encoder


@dataclasses.dataclass(frozen=True)
class TinyHub:
    """Paths of a tiny hub.

    Attributes:
      florence2, diffusion, language_model: hub directories.
      images: a folder of ten pictures of the miniature world with captions.jsonl.
    """

    florence2: str
    diffusion: str
    language_model: str
    images: str

    def model(self, *, stage: int = 1) -> dict:
        """A model config for these networks, float32."""
        return {
            "florence2": self.florence2,
            "diffusion": self.diffusion,
            "language_model": self.language_model if stage == 2 else "",
            "num_queries": 12,
            "frozen_dtype": "float32",
            "compute_dtype": "float32",
        }

    def experiment(self, *, stage: int = 1, steps: int = 2, **run) -> dict:
        """A whole experiment on the pictures, as a plain dictionary."""
        return {
            "stage": stage,
            "model": self.model(stage=stage),
            "data": {
                "source": {
                    "kind": "folder", "path": self.images,
                    "manifest": f"{self.images}/captions.jsonl",
                },
                "batch_size": 8, "image_size": 32, "max_tokens": 24, "num_threads": 1,
            },
            "run": {
                "steps": steps, "seed": 1, "mesh": {"data": -1}, "log_every": 1,
                "save_every": 1000, "sample_every": 0, **run,
            },
            "optimizer": {"learning_rate": 1e-3, "total_steps": 100},
            "sampling": {
                "sampler": "ddim", "num_steps": 2, "max_new_tokens": 8, "batch_size": 4,
                "num_samples": 2,
            },
        }  # fmt: skip


def save_random(family, model_class, config, path, seed):
    """Writes random weights, drawn by numpy: an initialiser takes long to compile."""
    model = model_class(config=config)
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        # As large as fresh ones, with noise on every tensor: fresh biases and norms hide errors.
        name = path[-1].key
        fresh = {"kernel": math.prod(x.shape[:-1]) ** -0.5, "embedding": 0.02}.get(name, 0)
        noise = rng.standard_normal(x.shape) * math.hypot(fresh, 0.05)
        return jnp.asarray(noise + (name == "scale"), jnp.float32)

    params = jax.tree_util.tree_map_with_path(leaf, family.abstract_params(model))
    save_model(path, model, params)


def write_hub(root: pathlib.Path) -> TinyHub:
    """Builds the hub in a folder."""
    from transformers import AutoTokenizer

    from miniature.world.folder import write_folder

    built = build_tokenizers(root / "tokenizers")
    pipeline, florence2, lm = root / "sd", root / "florence2", root / "qwen2"
    for path in (pipeline, florence2, lm):
        path.mkdir()
    for name, target in (("clip", pipeline / "tokenizer"), ("florence2", florence2),
                         ("qwen2", lm)):  # fmt: skip
        shutil.copytree(built[name], target, dirs_exist_ok=True)
    clip, bart, qwen = (AutoTokenizer.from_pretrained(built[n]) for n in
                        ("clip", "florence2", "qwen2"))  # fmt: skip

    text = dataclasses.replace(
        standins.text_encoder_config(
            len(clip), clip.pad_token_id, clip.bos_token_id, clip.eos_token_id
        ),
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    save_random(CLIP_FAMILY, CLIPTextModel, text, pipeline / "text_encoder", 0)
    unet = dataclasses.replace(
        standins.unet_config(), sample_size=8, in_channels=4, out_channels=4,
        block_out_channels=(8, 16), attention_head_dim=(1, 2), cross_attention_dim=WIDTH,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    save_random(UNET_FAMILY, UNet2DConditionModel, unet, pipeline / "unet", 1)
    vae = dataclasses.replace(
        standins.vae_config(0.5), block_out_channels=(4, 4, 8), latent_channels=4,
        norm_num_groups=2, sample_size=32,
    )  # fmt: skip
    save_random(VAE_FAMILY, AutoencoderKL, vae, pipeline / "vae", 2)
    (pipeline / "scheduler").mkdir()
    schedule = json.dumps(NoiseSchedule.stable_diffusion().to_hf())
    (pipeline / "scheduler" / "scheduler_config.json").write_text(schedule)

    full = standins.florence2_config(len(bart), len(bart) - 1)
    config = dataclasses.replace(
        full,
        vision_config=dataclasses.replace(
            full.vision_config, embed_dim=(4, 8, 8, 12), num_heads=(1, 1, 2, 2),
            num_groups=(1, 1, 2, 2), projection_dim=24, window_size=4,
        ),
        text_config=dataclasses.replace(
            full.text_config, d_model=24, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        ),
    )  # fmt: skip
    save_random(FLORENCE2_FAMILY, Florence2, config, florence2, 3)
    preprocessor = standins.FLORENCE2_PREPROCESSOR | {"size": {"height": 32, "width": 32}}
    (florence2 / "preprocessor_config.json").write_text(json.dumps(preprocessor))

    lm_config = dataclasses.replace(
        standins.language_model_config(
            "qwen2.5-small", len(qwen), qwen.eos_token_id, qwen.pad_token_id
        ),
        hidden_size=20, intermediate_size=32, num_hidden_layers=1,
    )  # fmt: skip
    save_random(QWEN2_FAMILY, Qwen2ForCausalLM, lm_config, lm, 4)
    write_folder(root / "images", split="train", start=0, count=10)
    return TinyHub(str(florence2), str(pipeline), str(lm), str(root / "images"))

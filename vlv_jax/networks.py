"""The networks that VLV is composed of, as one static value."""

import dataclasses

from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.models.autoencoder_kl import AutoencoderKL
from core_jax.models.clip_text import CLIPTextModel
from core_jax.models.florence2 import Florence2
from core_jax.models.qwen2 import Qwen2ForCausalLM
from core_jax.models.unet import UNet2DConditionModel
from vlv_jax.bridge import Bridge, CaptionProjector

# Parameter trees are dictionaries with these keys; a job loads only those it needs.
FLORENCE2 = "florence2"
BRIDGE = "bridge"
TEXT_ENCODER = "text_encoder"
UNET = "unet"
VAE = "vae"
PROJECTOR = "projector"
LANGUAGE_MODEL = "language_model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """Modules and constants; parameters are always passed beside it.

    Attributes:
      florence2: image tower, BART encoder and decoder.
      bridge: queries and phi.
      text_encoder: T, the frozen CLIP text transformer of the diffusion pipeline.
      schedule: the diffusion pipeline's noise schedule.
      prompt_ids: Florence-2's task prompt, tokenised.
      empty_ids: the empty caption for T, padded to the queries' number (unconditional context).
      image_mean, image_std: Florence-2's normalisation of pixels in [0, 1].
      unet, vae: the frozen decoder; None where only captioning is needed.
      projector, language_model: psi and the LLM; None in stage 1.
    """

    florence2: Florence2
    bridge: Bridge
    text_encoder: CLIPTextModel
    schedule: NoiseSchedule
    prompt_ids: tuple[int, ...]
    empty_ids: tuple[int, ...]
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    unet: UNet2DConditionModel | None = None
    vae: AutoencoderKL | None = None
    projector: CaptionProjector | None = None
    language_model: Qwen2ForCausalLM | None = None

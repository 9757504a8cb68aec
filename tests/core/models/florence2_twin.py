"""Tiny Florence-2 models: checkpoints that transformers built, and ones without PyTorch."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models import load_model
from core_jax.models.florence2 import FAMILY, Florence2, Florence2Config
from core_jax.ops.execution import Execution
from tests.oracle import randomize

# "tall": windows of 4 on grids of 24x16, 12x8, 6x4 and 3x2, so the last two are padded.
# "wide": sides that neither strides nor windows divide, grids 18x42, 9x21, 5x11 and 3x6; scaled
# token embeddings, no bias on queries, depth in another stage, heads and groups that differ.
CONFIGS = {
    "tall": dict(
        size=(96, 64),
        vision=dict(
            depths=(1, 1, 2, 1), embed_dim=(16, 32, 48, 64), num_heads=(1, 2, 3, 4),
            num_groups=(1, 2, 3, 4), window_size=4, projection_dim=32,
            max_temporal_embeddings=8, max_position_embeddings=10, drop_path_rate=0.0,
        ),
        text=dict(
            d_model=32, vocab_size=120, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=128,
        ),
    ),
    "wide": dict(
        size=(70, 165),
        vision=dict(
            depths=(2, 1, 1, 1), embed_dim=(8, 16, 24, 40), num_heads=(2, 4, 3, 5),
            num_groups=(4, 2, 6, 2), window_size=4, mlp_ratio=2.0, qkv_bias=False,
            projection_dim=48, max_temporal_embeddings=5, max_position_embeddings=7,
            drop_path_rate=0.1,
        ),
        text=dict(
            d_model=48, vocab_size=90, encoder_layers=3, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=6, encoder_ffn_dim=40,
            decoder_ffn_dim=72, max_position_embeddings=40, scale_embedding=True,
        ),
    ),
}  # fmt: skip


@dataclasses.dataclass
class Twin:
    """A PyTorch model, its directory, and inputs.

    `pixels` [2, H, W, 3], `prompt` [2, 6] without placeholders, `decoder_ids` [2, 9].
    """

    oracle: Any
    path: pathlib.Path
    pixels: Any
    prompt: Any
    decoder_ids: Any

    @functools.cached_property
    def loaded(self):
        """(model, params) of ours."""
        return load_model(self.path)

    @functools.cached_property
    def logits(self):
        """Params, pixels -> logits of our model, compiled once."""
        model = self.loaded[0]
        return jax.jit(
            lambda params, pixels: model.apply(
                {"params": params}, pixels, self.prompt, self.decoder_ids
            )
        )

    def torch_pixels(self):
        torch = pytest.importorskip("torch")

        return torch.tensor(np.array(self.pixels)).permute(0, 3, 1, 2)

    def torch_inputs(self):
        """What the PyTorch model takes, image placeholders included."""
        torch = pytest.importorskip("torch")

        with torch.no_grad():
            P = self.oracle.get_image_features(self.torch_pixels()).pooler_output.shape[1]
        image = torch.full((2, P), self.oracle.config.image_token_id)
        ids = torch.cat([image, torch.tensor(np.array(self.prompt, np.int64))], 1)
        return dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self.torch_pixels(),
            decoder_input_ids=torch.tensor(np.array(self.decoder_ids, np.int64)),
        )


@functools.cache
def make_twin(name: str) -> Twin:
    """Builds, randomises and saves a tiny model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    c = CONFIGS[name]
    vocab = c["text"]["vocab_size"]
    config = transformers.Florence2Config(
        vision_config=c["vision"], image_token_id=vocab - 1,
        text_config=dict(
            model_type="bart", dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2, **c["text"],
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomize(transformers.Florence2ForConditionalGeneration(config).eval())
    model.scratch = tempfile.TemporaryDirectory()  # lives as long as the model
    path = pathlib.Path(model.scratch.name)
    model.save_pretrained(path)
    rng = np.random.default_rng(0)
    prompt, decoder_ids = (
        jnp.asarray(rng.integers(3, vocab - 2, (2, length)), jnp.int32) for length in (6, 9)
    )
    pixels = jnp.asarray(rng.standard_normal((2, *c["size"], 3)), jnp.float32)
    return Twin(model, path, pixels, prompt, decoder_ids)


@functools.cache
def random_model(
    config: Florence2Config | None = None, execution: Execution | None = None
) -> tuple[Florence2, Any]:
    """A model and random parameters, without PyTorch and without compiling an initialiser."""
    model = Florence2(config or Florence2Config.tiny(), execution or Execution())
    rng = np.random.default_rng(0)

    def leaf(path, x):
        noise = rng.standard_normal(x.shape) * (0.15 if len(x.shape) > 1 else 0.08)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(leaf, FAMILY.abstract_params(model))

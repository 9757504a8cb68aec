"""Tiny targets and language models of both families in hub layout, with tokenizers of one family.

Weights come from numpy: nothing to compile. Sizes are unequal on purpose, so that a transposed
projector cannot pass. The drafters' tables are padded less than the targets'.
"""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.models import gemma3, gemma3_text, qwen2, qwen2_5_vl, save_model
from core_jax.models.siglip import SiglipVisionConfig

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_PIXELS = {
    "min_pixels": 4 * 8 * 8, "max_pixels": 40 * 8 * 8, "patch_size": 4, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.4] * 3,
    "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>",
                 "<start_of_image>", "<end_of_image>"]  # fmt: skip
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXTS = ["describe the image in detail", "two cats on a mat", "what is it? a red circle"] * 9
QWEN_ROWS, GEMMA_ROWS = 320, 300  # of the targets' tables
QWEN_LM_ROWS, GEMMA_LM_ROWS = 310, 297  # of the drafters': Gemma's placeholder is outside
GEMMA_PLACEHOLDER = 297


@dataclasses.dataclass(frozen=True)
class Pair:
    """Hub directories of a target and of a small language model."""

    target: pathlib.Path
    language_model: pathlib.Path


def _tokenizer(path, special, extra=(), **options):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(TEXTS, trainer)
    if special is GEMMA_SPECIAL:
        room = GEMMA_PLACEHOLDER - inner.get_vocab_size()
        inner.add_tokens([f"<unused{i}>" for i in range(room)])
        inner.add_special_tokens(list(extra))
    PreTrainedTokenizerFast(tokenizer_object=inner, **options).save_pretrained(path)


def save_random(family, model, path, seed, std=0.15):
    """Writes a model whose every tensor is random."""
    rng = np.random.default_rng(seed)

    def leaf(where, x):
        name = where[-1].key
        fan = math.prod(x.shape[1:-1] if len(x.shape) == 3 else x.shape[:-1])
        scale = {"kernel": fan**-0.5, "embedding": 0.2}.get(name, 0.0)
        if name == "mm_input_projection_weight":
            scale = x.shape[0] ** -0.5
        noise = rng.standard_normal(x.shape) * math.hypot(scale, std)
        plain = name == "scale" and family.name.startswith("qwen")
        return jnp.asarray(noise + plain, jnp.float32)

    params = jax.tree_util.tree_map_with_path(leaf, family.abstract_params(model))
    save_model(path, model, params)


def qwen_target_config():
    return qwen2_5_vl.Qwen2_5_VLConfig(
        text_config=qwen2_5_vl.Qwen2_5_VLTextConfig(
            vocab_size=QWEN_ROWS, hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
            mrope_section=(2, 3, 3), num_hidden_layers=2, intermediate_size=40, rope_theta=1e4,
            rms_norm_eps=1e-6, max_position_embeddings=512, bos_token_id=None, eos_token_id=2,
        ),
        vision_config=qwen2_5_vl.Qwen2_5_VLVisionConfig(
            depth=2, hidden_size=32, num_heads=2, intermediate_size=24, patch_size=4,
            window_size=16, out_hidden_size=48, fullatt_block_indexes=(1,),
        ),
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip


def qwen_lm_config(tied=True):
    return qwen2.Qwen2Config(
        vocab_size=QWEN_LM_ROWS, hidden_size=24, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=2, intermediate_size=36, rope_theta=1e4, tie_word_embeddings=tied,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip


def gemma_target_config():
    return gemma3.Gemma3Config(
        text_config=gemma3_text.Gemma3TextConfig(
            vocab_size=GEMMA_ROWS, hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
            head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=3, intermediate_size=40,
            sliding_window=16, sliding_window_pattern=2, max_position_embeddings=512,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
            image_size=56, patch_size=7,
        ),
        mm_tokens_per_image=16, boi_token_index=5, eoi_token_index=6,
        image_token_index=GEMMA_PLACEHOLDER, eos_token_id=(1, 4),
    )  # fmt: skip


def gemma_lm_config():
    return gemma3_text.Gemma3TextConfig(
        vocab_size=GEMMA_LM_ROWS, hidden_size=24, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=4, intermediate_size=36,
        sliding_window=12, sliding_window_pattern=3, max_position_embeddings=512,
        eos_token_id=(1, 4),
    )  # fmt: skip


def write_qwen(root: pathlib.Path, tied=True) -> Pair:
    """A Qwen2.5-VL target and a Qwen2."""
    pair = Pair(root / "target", root / "lm")
    model = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(config=qwen_target_config())
    save_random(qwen2_5_vl.FAMILY, model, pair.target, 0)
    save_random(
        qwen2.FAMILY, qwen2.Qwen2ForCausalLM(config=qwen_lm_config(tied)), pair.language_model, 1
    )
    for path in (pair.target, pair.language_model):
        _tokenizer(
            path, QWEN_SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>",
            additional_special_tokens=QWEN_SPECIAL[1:], chat_template=QWEN_TEMPLATE,
        )  # fmt: skip
    (pair.target / "preprocessor_config.json").write_text(json.dumps(QWEN_PIXELS))
    (pair.target / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return pair


def write_gemma(root: pathlib.Path) -> Pair:
    """A Gemma 3 target and a text-only Gemma 3."""
    pair = Pair(root / "target", root / "lm")
    model = gemma3.Gemma3ForConditionalGeneration(config=gemma_target_config())
    save_random(gemma3.FAMILY, model, pair.target, 2)
    lm = gemma3_text.Gemma3ForCausalLM(config=gemma_lm_config())
    save_random(gemma3_text.FAMILY, lm, pair.language_model, 3)
    options = dict(
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=GEMMA_TEMPLATE
    )
    _tokenizer(pair.language_model, GEMMA_SPECIAL, **options)
    _tokenizer(
        pair.target, GEMMA_SPECIAL, ["<image_soft_token>"], **options,
        extra_special_tokens=dict(boi_token="<start_of_image>", eoi_token="<end_of_image>",
                                  image_token="<image_soft_token>"),
    )  # fmt: skip
    pixels = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56},
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (pair.target / "preprocessor_config.json").write_text(json.dumps(pixels))
    return pair


def pictures(count=3, seed=0):
    """uint8 images of different shapes."""
    sizes = [(40, 24), (17, 60), (33, 33), (24, 40)]
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*sizes[i % 4], 3), np.uint8) for i in range(count)]

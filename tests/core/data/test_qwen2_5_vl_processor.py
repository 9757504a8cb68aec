"""Qwen2.5-VL's preprocessing against transformers: sizes, patches, templates, whole batches."""

import json

import numpy as np
import pytest
from PIL import Image

from core_jax.data.qwen2_5_vl_images import Qwen2_5_VLImageProcessor, smart_resize
from core_jax.data.qwen2_5_vl_processor import IMAGE_PAD, Qwen2_5_VLProcessor
from core_jax.models.qwen2_5_vl import (
    ImagePromptError,
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from tests.core.data.image_files import noise

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# As the released one treats text and images.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RELEASED = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
SMALL = RELEASED | {"min_pixels": 4 * 28 * 28, "max_pixels": 20 * 28 * 28}
OTHER = {
    "size": {"shortest_edge": 16 * 16, "longest_edge": 40 * 64}, "patch_size": 4, "merge_size": 2,
    "temporal_patch_size": 2, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.4] * 3,
}  # fmt: skip
SIZES = [(60, 84), (97, 41), (200, 301), (20, 300), (28, 28)]


def oracle_processor(config):
    pytest.importorskip("torch")
    from transformers import Qwen2VLImageProcessorPil

    skipped = ("image_processor_type", "processor_class")
    return Qwen2VLImageProcessorPil(**{k: v for k, v in config.items() if k not in skipped})


def oracle(config, images):
    out = oracle_processor(config)(images, return_tensors="np")
    return np.asarray(out["pixel_values"]), np.asarray(out["image_grid_thw"])


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["released keys", "size key"])
def test_patches_equal_transformers_bit_for_bit(config):
    processor = Qwen2_5_VLImageProcessor.from_hf(config)
    images = [Image.fromarray(noise(seed, *size)) for seed, size in enumerate(SIZES)]
    want, grids = oracle(config, images)
    cut = [processor(image) for image in images]
    assert [list(g) for _, g in cut] == grids.tolist()
    got = np.concatenate([p for p, _ in cut])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want.astype(np.float32))
    assert len({tuple(g) for g in grids.tolist()}) >= 4
    turned = processor(images[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT))[0]
    assert np.abs(turned - cut[2][0]).max() > 0.1  # the control


def test_transparent_and_grey_images_equal_transformers():
    rgba = np.dstack([noise(0, 60, 70), noise(1, 60, 70)[:, :, :1]])
    palette = Image.fromarray(noise(2, 50, 60)).convert("P")
    palette.info["transparency"] = 3
    images = [Image.fromarray(rgba), Image.fromarray(noise(3, 40, 60)).convert("L"), palette]
    want, _ = oracle(SMALL, images)
    got = [Qwen2_5_VLImageProcessor.from_hf(SMALL)(image)[0] for image in images]
    np.testing.assert_array_equal(np.concatenate(got), want.astype(np.float32))


def test_sizes_equal_transformers_over_many_shapes():
    pytest.importorskip("torch")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (int(x) for x in np.exp(rng.uniform(np.log(3), np.log(4000), 2)))
        if max(height, width) > 200 * min(height, width):
            continue
        for low, high in ((3136, 12845056), (256 * 784, 1280 * 784), (784, 784 * 4)):
            want = theirs(height, width, 28, low, high)
            got = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert got == want
    with pytest.raises(ValueError, match="2010 x 10 pixels"):
        smart_resize(2010, 10, factor=28, min_pixels=1, max_pixels=9999)


def test_configurations_go_both_ways_and_unknown_keys_are_errors():
    for config in (RELEASED, OTHER):
        processor = Qwen2_5_VLImageProcessor.from_hf(config)
        assert Qwen2_5_VLImageProcessor.from_hf(json.loads(json.dumps(processor.to_hf()))) == (
            processor
        )
    assert Qwen2_5_VLImageProcessor.from_hf(RELEASED).max_pixels == 12845056
    image = Image.fromarray(noise(5, 90, 50))
    written = oracle(Qwen2_5_VLImageProcessor.from_hf(SMALL).to_hf(), [image])[0]
    np.testing.assert_array_equal(written, oracle(SMALL, [image])[0])
    # What transformers itself writes.
    saved = oracle_processor(SMALL).to_dict()
    assert Qwen2_5_VLImageProcessor.from_hf(saved) == Qwen2_5_VLImageProcessor.from_hf(SMALL)
    for change, message in (
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"sharpen": 2}, "sharpen"),
        ({"do_center_crop": True}, "do_center_crop"),
    ):
        with pytest.raises(ValueError, match=message):
            Qwen2_5_VLImageProcessor.from_hf(SMALL | change)
    fixed = Qwen2_5_VLImageProcessor.from_hf(SMALL | {"do_resize": False})
    assert fixed(noise(0, 56, 84))[1] == (1, 4, 6)
    with pytest.raises(ValueError, match="do_resize"):
        fixed(noise(0, 60, 84))
    with pytest.raises(ValueError, match="uint8"):
        fixed(np.zeros((56, 84, 3)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A hub directory without weights, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(["describe the image in detail", "two cats on a mat"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:], chat_template=TEMPLATE,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("hub")
    tokenizer.save_pretrained(path)
    config = Qwen2_5_VLConfig(
        text_config=Qwen2_5_VLTextConfig(
            vocab_size=320, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
            mrope_section=(2, 3, 3), num_hidden_layers=1, intermediate_size=8,
        ),
        vision_config=Qwen2_5_VLVisionConfig(
            depth=1, hidden_size=32, num_heads=2, out_hidden_size=32, window_size=56
        ),
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config.to_hf()))
    (path / "preprocessor_config.json").write_text(json.dumps(SMALL))
    return path, tokenizer


MESSAGES = [
    [
        {"role": "user", "content": [
            {"type": "image"}, {"type": "text", "text": "two cats"}, {"type": "image"}]},
        {"role": "assistant", "content": "on a mat"},
        {"role": "user", "content": [{"type": "text", "text": "describe"}]},
    ],
    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the image"}]}],
    [{"role": "user", "content": "no image in this row"}],
]  # fmt: skip


def _their_processor(tokenizer):
    import transformers

    class NoVideo:  # the real one needs torchvision
        merge_size = temporal_patch_size = 2
        model_input_names = ()

        def to_dict(self):
            return {}

    class Processor(transformers.Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, arg):
            if name == "video_processor":
                return None
            return super().check_argument_for_proper_class(name, arg)

    return Processor(
        image_processor=oracle_processor(SMALL), tokenizer=tokenizer, video_processor=NoVideo(),
        chat_template=TEMPLATE,
    )  # fmt: skip


def test_whole_batches_equal_transformers(directory):
    path, tokenizer = directory
    ours = Qwen2_5_VLProcessor.from_pretrained(path)
    theirs = _their_processor(tokenizer)
    texts = [ours.render(m) for m in MESSAGES]
    assert texts == [
        theirs.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in MESSAGES
    ]
    pictures = [Image.fromarray(noise(seed, *size)) for seed, size in enumerate(SIZES[:3])]
    images = [pictures[:2], pictures[2:], []]
    tokenizer.padding_side = "left"
    want = theirs(text=texts, images=pictures, padding=True, return_tensors="np")
    got = ours(texts, images)
    np.testing.assert_array_equal(got.ids, want["input_ids"])
    np.testing.assert_array_equal(got.valid, want["attention_mask"].astype(bool))
    np.testing.assert_array_equal(got.places.image_slots >= 0, want["mm_token_type_ids"] == 1)
    assert got.images is not None
    assert [list(g) for g in got.images.grids] == want["image_grid_thw"].tolist()
    # Every patch is somewhere, and the rest is zero.
    packed = got.images.batch
    flat = packed.patches.reshape(-1, 4, packed.patches.shape[-1])
    order = np.concatenate(got.images.token_slots)
    np.testing.assert_array_equal(
        flat[order].reshape(-1, flat.shape[-1]), np.float32(want["pixel_values"])
    )
    assert np.sum(packed.segments > 0) == 4 * len(order)
    assert not packed.patches[packed.segments == 0].any()


def test_right_padding_to_a_fixed_length(directory):
    ours = Qwen2_5_VLProcessor.from_pretrained(directory[0])
    texts = [ours.render(m, add_generation_prompt=False) for m in MESSAGES[2:]] + ["a mat"]
    got = ours(texts, length=64, padding_side="right")
    assert got.ids.shape == (2, 64)
    assert got.images is None
    assert got.valid[:, 0].all()
    assert not got.valid[:, -1].any()
    assert got.places.next_positions.tolist() == got.valid.sum(1).tolist()
    with pytest.raises(ValueError, match="longer than 4"):
        ours(texts, length=4)
    with pytest.raises(ValueError, match="padding_side"):
        ours(texts, padding_side="middle")


def test_wrong_images_are_named(directory):
    path, tokenizer = directory
    ours = Qwen2_5_VLProcessor.from_pretrained(path)
    text, image = ours.render(MESSAGES[1]), noise(0, 60, 60)
    with pytest.raises(ImagePromptError, match=r"row 1 has 1 places .* 0 images"):
        ours([text, text], [[image], []])
    with pytest.raises(ImagePromptError, match=r"row 0 has 1 places .* 2 images"):
        ours([text], [[image, image]])
    with pytest.raises(ImagePromptError, match="images for 1"):
        ours([text, text], [[image]])
    assert text.count(IMAGE_PAD) == 1
    with pytest.raises(ValueError, match="another model"):
        Qwen2_5_VLProcessor(
            tokenizer, Qwen2_5_VLImageProcessor.from_hf(OTHER), ours.config
        )


def test_the_processors_own_template_goes_first(directory, tmp_path):
    import shutil

    shutil.copytree(directory[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages|length }}!"}')
    assert Qwen2_5_VLProcessor.from_pretrained(tmp_path).render(MESSAGES[0]) == "3!"
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        Qwen2_5_VLProcessor.from_pretrained(tmp_path)
    nested = {"image_processor": SMALL, "processor_class": "Qwen2_5_VLProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert Qwen2_5_VLProcessor.from_pretrained(tmp_path).image_processor.max_pixels == 20 * 784

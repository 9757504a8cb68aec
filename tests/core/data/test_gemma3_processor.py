"""Gemma 3's processor against transformers': ids, which are placeholders, pixels, templates."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from core_jax.data.gemma3_processor import Gemma3Processor, gemma3_image_processor
from core_jax.data.processors import ProcessorError
from core_jax.models.gemma3 import Gemma3Config, ImagePromptError
from core_jax.models.gemma3_text import Gemma3TextConfig
from core_jax.models.siglip import SiglipVisionConfig
from tests.core.data.image_files import noise

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
           "<end_of_image>", "<image_soft_token>"]  # fmt: skip
CONFIG = Gemma3Config(
    text_config=Gemma3TextConfig(vocab_size=300), mm_tokens_per_image=4, boi_token_index=5,
    vision_config=SiglipVisionConfig(image_size=56, patch_size=14), eoi_token_index=6,
    image_token_index=7,
)  # fmt: skip
# The released template, to the letter.
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""


def _say(*content):
    return [{"type": "image"} if x is None else {"type": "text", "text": x} for x in content]


CHATS = [
    [{"role": "user", "content": _say(None, "what is it?")}],
    [{"role": "system", "content": _say("be brief")},
     {"role": "user", "content": _say("first", None, "then", None)},
     {"role": "assistant", "content": _say("two cats ")},
     {"role": "user", "content": _say("sure?")}],
    [{"role": "user", "content": _say("hello")}],
]  # fmt: skip
IMAGES = [[0], [1, 2], []]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A processor's directory as transformers writes it, and transformers' processor."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["a photo of a cat on a mat"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    extra = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>",
                 image_token="<image_soft_token>")  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        extra_special_tokens=extra, padding_side="left",
    )  # fmt: skip
    oracle = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}), fast, chat_template=TEMPLATE,
        image_seq_length=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("processor")
    oracle.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    return path, oracle


def _images():
    shapes = [(60, 84), (97, 41), (30, 200)]
    return [Image.fromarray(noise(i, *shape)) for i, shape in enumerate(shapes)]


def test_chats_with_images_equal_transformers(directory):
    path, oracle = directory
    ours, images = Gemma3Processor.from_pretrained(path), _images()
    texts = [ours.render(chat) for chat in CHATS]
    assert texts == [
        oracle.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in CHATS
    ]
    assert not ours.render(CHATS[0], add_generation_prompt=False).endswith("model\n")
    got = ours(texts, [[images[i] for i in row] for row in IMAGES])
    want = oracle(
        text=texts, images=[[images[i] for i in row] for row in IMAGES], padding=True,
        add_special_tokens=False, return_tensors="np",
    )  # fmt: skip
    np.testing.assert_array_equal(got.ids, want["input_ids"])
    np.testing.assert_array_equal(got.valid, want["attention_mask"])
    np.testing.assert_array_equal(got.ids == CONFIG.image_token_index, want["token_type_ids"])
    assert got.num_images.tolist() == [1, 2, 0]
    assert got.pixel_values.shape == (3, 2, 56, 56, 3)
    flat = np.concatenate([got.pixel_values[i, :n] for i, n in enumerate(got.num_images)])
    theirs = np.moveaxis(np.asarray(want["pixel_values"]), 1, -1)
    np.testing.assert_array_equal(flat, theirs.astype(np.float32))
    assert not got.pixel_values[2].any()


def test_plain_text_gets_its_begin_token_and_fixed_shapes(directory):
    path, oracle = directory
    ours, image = Gemma3Processor.from_pretrained(path), _images()[0]
    text = "a <start_of_image> cat"
    want = oracle(text=text, images=[image], return_tensors="np")["input_ids"][0].tolist()
    assert want[0] == 2
    assert ours.tokens(text, 1) == want
    got = ours([text], [[image]], length=40, padding_side="right", max_images=2)
    assert got.ids[0, : len(want)].tolist() == want
    assert got.valid.sum() == len(want)
    assert got.pixel_values.shape == (1, 2, 56, 56, 3)
    assert ours(["a cat"], length=8).pixel_values is None


@pytest.mark.parametrize("size", [(896, 896), (56, 48)])
def test_image_processor_equals_transformers(size):
    pytest.importorskip("torch")
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    config = {  # google/gemma-3-4b-it, and a size that is not square
        "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256,
        "pan_and_scan_max_num_crops": None, "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None, "processor_class": "Gemma3Processor",
        "resample": 2, "rescale_factor": 0.00392156862745098,
        "size": {"height": size[0], "width": size[1]},
    }  # fmt: skip
    skipped = ("image_processor_type", "image_seq_length", "processor_class")
    oracle = Gemma3ImageProcessorPil(
        **{k: v for k, v in config.items() if k not in skipped and v is not None}
    )
    image = _images()[0]
    want = np.moveaxis(np.asarray(oracle(image, return_tensors="np")["pixel_values"]), 1, -1)
    ours = gemma3_image_processor(config)
    np.testing.assert_array_equal(ours(image), want.astype(np.float32))
    assert gemma3_image_processor(json.loads(json.dumps(ours.to_hf()))) == ours
    other = gemma3_image_processor(config | {"resample": 3})
    assert np.abs(other(image) - want).max() > 1e-2
    with pytest.raises(ProcessorError, match="do_pan_and_scan"):
        gemma3_image_processor(config | {"do_pan_and_scan": True})


def test_what_does_not_fit_is_refused(directory):
    path, _ = directory
    ours, image = Gemma3Processor.from_pretrained(path), _images()[0]
    with pytest.raises(ImagePromptError, match=r"row 0 has 1 places .* 2 images"):
        ours(["<start_of_image>"], [[image, image]])
    with pytest.raises(ImagePromptError, match=r"row 1 has 1 places .* 0 images"):
        ours(["a", "<start_of_image>"])
    with pytest.raises(ImagePromptError, match="row 0 has 5 placeholders"):
        ours(["<start_of_image> <image_soft_token>"], [[image]])
    with pytest.raises(ImagePromptError, match="2 prompts, but images for 1"):
        ours(["a", "b"], [[]])
    with pytest.raises(ValueError, match="longer than 3"):
        ours(["a long prompt"], length=3)
    with pytest.raises(ValueError, match="max_images 1"):
        ours(["<start_of_image>" * 2], [[image, image]], max_images=1)
    with pytest.raises(ValueError, match="padding_side"):
        ours(["a"], padding_side="middle")
    with pytest.raises(ProcessorError, match="tokenizer of another model"):
        Gemma3Processor(
            ours.tokenizer, ours.image_processor, dataclasses.replace(CONFIG, eoi_token_index=9)
        )
    tower = SiglipVisionConfig(image_size=28, patch_size=14)
    with pytest.raises(ProcessorError, match="28 x 28"):
        Gemma3Processor(
            ours.tokenizer, ours.image_processor, dataclasses.replace(CONFIG, vision_config=tower)
        )
    (path / "elsewhere").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (path / "elsewhere" / name).write_text((path / name).read_text())
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        Gemma3Processor.from_pretrained(path / "elsewhere")

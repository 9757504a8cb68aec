import json

import numpy as np
import pytest
from PIL import Image

from core_jax.data.processors import ImageProcessor
from tests.core.data.image_files import noise

FLORENCE = {
    "auto_map": {"AutoProcessor": "processing_florence2.Florence2Processor"},
    "_valid_processor_keys": ["images"],
    "image_seq_length": 577,
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True, "size": {"height": 768, "width": 768}, "resample": 3,
    "do_center_crop": False, "crop_size": {"height": 768, "width": 768},
    "do_rescale": True, "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": None,
}  # fmt: skip
CONFIGS = {
    "florence2": FLORENCE | {"size": {"height": 96, "width": 96}},
    "not square": FLORENCE | {"size": {"height": 40, "width": 64}},
    "clip defaults": {},
    "clip crop pads": {"size": {"shortest_edge": 33}, "crop_size": {"height": 41, "width": 38}},
    "bilinear": {"size": {"shortest_edge": 50}, "resample": 2, "crop_size": 31},
    "no normalise": {"do_normalize": False, "do_resize": False, "crop_size": 24},
    "no rescale": {"do_rescale": False, "do_center_crop": False, "size": {"height": 9, "width": 9}},
}
SIZES = [(60, 84), (97, 41), (224, 224), (37, 300)]


def oracle(config, image, kind="CLIPImageProcessorPil"):
    """transformers' processor without torchvision, channels moved last."""
    pytest.importorskip("torch")
    if kind == "CLIPImageProcessorPil":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as cls
    else:
        from transformers.models.siglip.image_processing_pil_siglip import (
            SiglipImageProcessorPil as cls,
        )
    skipped = ("auto_map", "_valid_processor_keys", "image_processor_type", "image_seq_length")
    processor = cls(**{k: v for k, v in config.items() if k not in skipped and v is not None})
    return np.moveaxis(np.asarray(processor(image, return_tensors="np")["pixel_values"]), 1, -1)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers_bit_for_bit(name):
    processor = ImageProcessor.from_hf(CONFIGS[name])
    for seed, size in enumerate(SIZES):
        image = Image.fromarray(noise(seed, *size))
        want, got = oracle(CONFIGS[name], image), processor(image)
        assert got.dtype == np.float32
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want.astype(np.float32))
        other = noise(seed, *size)
        other[size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4] ^= 255
        assert np.abs(processor(other) - want).max() > 0.1  # the control


def test_florence_at_full_size_equals_transformers():
    image = Image.fromarray(noise(0, 384, 384))
    want, got = oracle(FLORENCE, image), ImageProcessor.from_hf(FLORENCE)(image)
    assert got.shape == (1, 768, 768, 3)
    np.testing.assert_array_equal(got, want)
    control = ImageProcessor.from_hf(FLORENCE | {"resample": 2})(image)
    assert np.abs(control - want).max() > 0.1


def test_siglip_equals_transformers():
    config = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 48}}
    image = Image.fromarray(noise(0, 60, 84))
    want = oracle(config, image, "siglip")
    np.testing.assert_array_equal(ImageProcessor.from_hf(config)(image), want)
    assert np.abs(ImageProcessor.from_hf(config | {"resample": 2})(image) - want).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name):
    processor = ImageProcessor.from_hf(CONFIGS[name])
    written = json.loads(json.dumps(processor.to_hf()))
    assert ImageProcessor.from_hf(written) == processor
    image = Image.fromarray(noise(0, 60, 84))
    np.testing.assert_array_equal(oracle(written, image), processor(image))


def test_batches_arrays_and_images_agree():
    processor = ImageProcessor.from_hf(CONFIGS["florence2"])
    arrays = np.stack([noise(0), noise(1)])
    batch = processor(arrays)
    assert batch.shape == (2, 96, 96, 3)
    np.testing.assert_array_equal(batch, processor([Image.fromarray(a) for a in arrays]))
    np.testing.assert_array_equal(batch[1:], processor(arrays[1]))
    np.testing.assert_array_equal(batch[0], processor.normalize(processor.resize(arrays[0])))


def test_refusals():
    with pytest.raises(ValueError, match="ConvNextImageProcessor"):
        ImageProcessor.from_hf({"image_processor_type": "ConvNextImageProcessor"})
    with pytest.raises(ValueError, match="do_splines"):
        ImageProcessor.from_hf({"do_splines": True})
    with pytest.raises(ValueError, match="do_pad"):
        ImageProcessor.from_hf({"do_pad": True})
    with pytest.raises(ValueError, match="longest_edge"):
        ImageProcessor.from_hf({"size": {"longest_edge": 3}})
    with pytest.raises(ValueError, match="uint8"):
        ImageProcessor.from_hf({})(np.zeros((1, 4, 4, 3), np.float32))

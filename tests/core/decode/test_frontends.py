"""Pictures that a target is shown: in memory they have the fate of their files."""

import numpy as np
import pytest
from PIL import Image

from core_jax.data.images import BadImage, ImageLimits
from core_jax.data.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from core_jax.decode.frontends import open_image
from tests.core.data.image_files import noise


@pytest.fixture
def turned(tmp_path):
    """A file with transparency whose picture lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.dstack([noise(0, 40, 60), noise(1, 40, 60)[..., :1]])
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    return tmp_path / "a.png"


def test_pillow_images_are_read_as_their_files_are(turned):
    read = open_image(turned)
    with Image.open(turned) as image:
        opened = open_image(image)
        cut, grid = Qwen2_5_VLImageProcessor()(image)
    assert opened.size == (40, 60)
    np.testing.assert_array_equal(opened, read)
    want, want_grid = Qwen2_5_VLImageProcessor()(read)
    assert grid == want_grid
    np.testing.assert_array_equal(cut, want)
    with Image.open(turned) as image:  # the control
        assert np.abs(np.asarray(image.convert("RGB").rotate(-90, expand=True)) - read).max() > 9


def test_limits_hold_for_pictures_in_memory_where_they_are_named():
    small = noise(0, 8, 9)
    for image in (small, Image.fromarray(small)):
        np.testing.assert_array_equal(open_image(image), small)
        with pytest.raises(BadImage, match="too_small"):
            open_image(image, ImageLimits())
    with pytest.raises(BadImage, match="transparent"):
        open_image(Image.new("RGBA", (40, 40)))
    with pytest.raises(ValueError, match="uint8"):
        open_image(small[..., 0])

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from core_jax.data import images
from core_jax.data.images import BadImage, ImageLimits, Reason, decode_image, inspect_header
from core_jax.data.resize import CropSpec, crop_image, resize_shorter_side_and_center_crop
from tests.core.data.image_files import (
    GRADIENT,
    animated,
    encode,
    exif_rotated,
    noise,
    png_16_bit,
    png_header,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def reason_of(data, **limits):
    with pytest.raises(BadImage) as caught:
        decode_image(data, ImageLimits(**limits))
    assert str(caught.value) == caught.value.reason
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.reason


def close_to_gradient(decoded, tolerance=16, target=GRADIENT):
    assert decoded.mode == "RGB"
    difference = np.abs(np.asarray(decoded).astype(int) - target).mean()
    assert difference < tolerance, difference
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes(name):
    assert close_to_gradient(decode_image(encode(GRADIENT, name)))


@pytest.mark.parametrize("name", FORMATS)
def test_half_a_file_is_refused(name):
    data = encode(noise(0), name)
    assert reason_of(data[: len(data) // 2]) in (Reason.TRUNCATED, Reason.BROKEN)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged TIFF tags
@pytest.mark.parametrize("name", FORMATS)
def test_random_damage_never_leaks_an_exception(name):
    """Any byte flipped anywhere: pixels or a BadImage, never another exception."""
    rng, data = np.random.default_rng(1), encode(noise(0, 40, 40), name)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for where in rng.integers(0, len(data) if rng.random() < 0.5 else 64, 3):
            damaged[where] = rng.integers(256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except BadImage:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (b"", {}, Reason.EMPTY),
        (b"<html>404</html>", {}, Reason.NOT_AN_IMAGE),
        (encode(GRADIENT, "PPM"), {}, Reason.NOT_AN_IMAGE),
        (encode(GRADIENT, "GIF"), {"formats": ("JPEG", "PNG")}, Reason.NOT_AN_IMAGE),
        (encode(GRADIENT), {"max_bytes": 50}, Reason.TOO_MANY_BYTES),
        (encode(noise(0, 1, 1)), {}, Reason.TOO_SMALL),
        (encode(noise(0, 31, 100)), {}, Reason.TOO_SMALL),
        (encode(noise(0, 40, 900)), {}, Reason.TOO_ELONGATED),
        (encode(GRADIENT), {"max_pixels": 64 * 80 - 1}, Reason.TOO_MANY_PIXELS),
        (png_header(20000, 20000), {}, Reason.TOO_MANY_PIXELS),
        (encode(np.zeros((64, 64, 4), np.uint8)), {}, Reason.TRANSPARENT),
        (encode(np.full((64, 64, 3), 7, np.uint8)), {"reject_flat": True}, Reason.FLAT),
        (animated("GIF"), {"animated": "reject"}, Reason.ANIMATED),
        (animated("PNG"), {"animated": "reject"}, Reason.ANIMATED),
        (animated("WEBP"), {"animated": "reject"}, Reason.ANIMATED),
        (encode(Image.new("F", (64, 64), 3.0), "TIFF"), {}, Reason.UNSUPPORTED_MODE),
        (encode(Image.new("I", (64, 64), 1 << 20), "TIFF"), {}, Reason.UNSUPPORTED_MODE),
    ],
)
def test_refusals(data, limits, reason):
    assert reason_of(data, **limits) == reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_is_checked_before_pixels_are_decoded(monkeypatch):
    small = encode(GRADIENT)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for data in (png_header(10000, 9000), png_header(8, 8), png_header(5000, 40)):
        with pytest.raises(BadImage):
            decode_image(data)
    header = inspect_header(small, ImageLimits())
    assert (header.format, header.mode, header.width, header.height) == ("PNG", "RGB", 80, 64)


def test_files(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(GRADIENT))
    assert close_to_gradient(decode_image(path), 0.1)
    assert close_to_gradient(decode_image(str(path)), 0.1)
    assert reason_of(path, max_bytes=10) == Reason.TOO_MANY_BYTES
    assert reason_of(tmp_path / "none.png") == Reason.MISSING_FILE
    assert reason_of(tmp_path) == Reason.MISSING_FILE


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP"])
def test_animated_gives_its_first_frame(name):
    assert close_to_gradient(decode_image(animated(name)))


@pytest.mark.parametrize("name", ["MPO", "TIFF"])
def test_several_pictures_in_one_still_file_are_not_an_animation(name, tmp_path):
    frames = [Image.fromarray(np.roll(GRADIENT, i, axis=2)) for i in range(2)]
    frames[0].save(tmp_path / "x", name, save_all=True, append_images=frames[1:])
    decoded = decode_image(tmp_path / "x", ImageLimits(animated="reject"))
    assert close_to_gradient(decoded, 16)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(name):
    decoded = decode_image(exif_rotated(name))
    assert decoded.size == (64, 80)
    assert close_to_gradient(decoded, 16, np.rot90(GRADIENT, -1))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_keeps_the_pixels():
    data = encode(GRADIENT, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert close_to_gradient(decode_image(data))


def test_colour_modes():
    cmyk = encode(Image.fromarray(GRADIENT).convert("CMYK"), "JPEG")
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    assert close_to_gradient(decode_image(cmyk))
    for mode in ("CMYK", "YCbCr"):
        assert close_to_gradient(
            decode_image(encode(Image.fromarray(GRADIENT).convert(mode), "TIFF"))
        )
    grey = np.broadcast_to(GRADIENT[..., :1], GRADIENT.shape)
    assert close_to_gradient(decode_image(encode(GRADIENT[..., 0])), 0.1, grey)
    assert close_to_gradient(decode_image(encode(Image.fromarray(GRADIENT).quantize(64))), 16)
    black_and_white = decode_image(encode(Image.fromarray(GRADIENT).convert("1")))
    assert set(np.unique(np.asarray(black_and_white))) == {0, 255}


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(name):
    grey = GRADIENT[..., 0].astype(np.uint16) * 257
    decoded = decode_image(encode(grey, name))
    target = np.broadcast_to(GRADIENT[..., :1], GRADIENT.shape)
    assert close_to_gradient(decoded, 1e-6, target)
    # What Pillow does by itself, for comparison: everything above 255 is white.
    naive = np.asarray(Image.fromarray(grey).convert("L").convert("RGB")).astype(int)
    assert np.abs(naive - target).mean() > 50


def test_16_bit_colour_keeps_the_upper_bits():
    wide = GRADIENT.astype(np.uint16) * 257
    assert close_to_gradient(decode_image(png_16_bit(wide)), 1e-6)
    wide = np.dstack([wide, np.full((64, 80), 65535, np.uint16)])
    assert close_to_gradient(decode_image(png_16_bit(wide)), 1e-6)
    wide[..., 3] = 0
    assert reason_of(png_16_bit(wide)) == Reason.TRANSPARENT
    grey = np.broadcast_to(GRADIENT[..., :1], GRADIENT.shape)
    assert close_to_gradient(decode_image(png_16_bit(wide[..., [0, 3]] | [0, 65535])), 1e-6, grey)


def test_transparency_becomes_white():
    rgba = np.dstack([GRADIENT, np.full((64, 80), 255, np.uint8)])
    rgba[:, :40, 3] = 0
    rgba[:, :40, :3] = 0  # the hidden colour of most editors: black
    decoded = np.asarray(decode_image(encode(rgba)))
    assert (decoded[:, :40] == 255).all()
    np.testing.assert_array_equal(decoded[:, 40:], GRADIENT[:, 40:])
    half = np.zeros((64, 64, 4), np.uint8)
    half[..., 3] = 128
    assert (np.abs(np.asarray(decode_image(encode(half))).astype(int) - 127) <= 1).all()


def test_palette_and_colour_key_transparency_become_white():
    indices = np.zeros((64, 64), np.uint8)
    indices[:, 32:] = 1
    palette = Image.fromarray(indices, "L").convert("P")
    palette.putpalette([0, 0, 0, 10, 200, 30] + [0] * 750)
    for name in ("PNG", "GIF"):
        decoded = np.asarray(decode_image(encode(palette, name, transparency=0)))
        assert (decoded[:, :32] == 255).all()
        assert (decoded[:, 32:] == (10, 200, 30)).all()
    keyed = np.zeros((64, 64, 3), np.uint8)
    keyed[:, 32:] = (10, 200, 30)
    decoded = np.asarray(decode_image(encode(keyed, transparency=(0, 0, 0))))
    assert (decoded[:, :32] == 255).all()


def test_a_decoded_picture_has_the_fate_of_its_file():
    rgba = np.dstack([0 * GRADIENT, np.full((64, 80), 255, np.uint8)])
    rgba[:, :40, 3] = 0
    grey = GRADIENT[..., 0].astype(np.uint16) * 257
    for data in (encode(rgba), encode(grey), exif_rotated("PNG"), encode(GRADIENT)):
        opened = Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(images.upright_rgb(opened), decode_image(data))
    with pytest.raises(BadImage, match="transparent"):
        images.upright_rgb(Image.new("RGBA", (64, 64), (0, 0, 0, 0)))
    with pytest.raises(BadImage, match="small"):
        images.upright_rgb(Image.new("RGB", (64, 8)))
    assert np.asarray(Image.fromarray(rgba).convert("RGB"))[:, :40].max() == 0  # what it mends


def test_bad_image_survives_pickling():
    assert pickle.loads(pickle.dumps(BadImage(Reason.BROKEN))).reason is Reason.BROKEN


@pytest.mark.parametrize(
    "bad", [{"formats": ("PDF",)}, {"animated": "all"}, {"max_pixels": 10**10}, {"min_side": 0}]
)
def test_limits_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ImageLimits(**bad)


def test_pillow_guard_is_not_switched_off():
    assert Image.MAX_IMAGE_PIXELS * 2 == images.PILLOW_MAX_PIXELS


class TestCrops:
    image = Image.fromarray(noise(3, 90, 150))

    def test_center(self):
        got = resize_shorter_side_and_center_crop(self.image, 32, "bilinear")
        want = self.image.resize((53, 32), Image.Resampling.BILINEAR).crop((10, 0, 42, 32))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        assert crop_image(self.image, CropSpec(size=200)).size == (200, 200)

    def test_random_is_seeded_and_moves_along_the_longer_side(self):
        spec = CropSpec(size=32, kind="random")
        crops = [
            np.asarray(crop_image(self.image, spec, np.random.default_rng(s))) for s in range(6)
        ]
        again = np.asarray(crop_image(self.image, spec, np.random.default_rng(0)))
        np.testing.assert_array_equal(crops[0], again)
        assert len({crop.tobytes() for crop in crops}) > 2
        with pytest.raises(ValueError, match="generator"):
            crop_image(self.image, spec)

    def test_native_pixels_are_never_resized(self):
        got = np.asarray(crop_image(self.image, CropSpec(size=80, kind="native")))
        np.testing.assert_array_equal(got, noise(3, 90, 150)[5:85, 35:115])
        rng = np.random.default_rng(0)
        got = np.asarray(crop_image(self.image, CropSpec(size=80, kind="native_random"), rng))
        windows = np.lib.stride_tricks.sliding_window_view(noise(3, 90, 150), (80, 80, 3))
        assert (windows.reshape(-1, 80 * 80 * 3)[:, :8] == got.reshape(-1)[:8]).all(1).sum() == 1

    def test_native_of_a_small_image(self):
        with pytest.raises(BadImage, match="too_small"):
            crop_image(self.image, CropSpec(size=91, kind="native"))
        assert crop_image(self.image, CropSpec(size=91, kind="native", small="resize")).size == (
            91,
            91,
        )

    @pytest.mark.parametrize("bad", [{"kind": "x"}, {"resample": "x"}, {"small": "x"}])
    def test_spec_is_checked(self, bad):
        with pytest.raises(ValueError, match="known"):
            CropSpec(size=8, **bad)

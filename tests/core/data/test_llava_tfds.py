"""LLaVA's sets prepared as TFDS without TensorFlow come back as the file's own examples."""

import json
import sys

import pytest
from PIL import Image

from core_jax.data.llava import LlavaSource
from core_jax.data.sources import SourceError, SourceSpec, open_source
from tests.core.data.image_files import noise


def test_prepared_sets_have_the_file_s_examples(tmp_path):
    from core_jax.data.llava_tfds import LlavaMix665k

    Image.fromarray(noise(0, 40, 50)).save(tmp_path / "000000000009.png")
    Image.fromarray(noise(1, 40, 50)).save(tmp_path / "000000000025.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    spoken = [{"from": "human", "value": "What? <image>"}, {"from": "gpt", "value": "Ein Bär"}]
    records = [
        {"id": "a", "image": "000000000009.png", "conversations": spoken},
        {"id": "text", "conversations": [{"from": "human", "value": "q"}, spoken[1]]},
        {"id": "b", "image": "broken.png", "conversations": spoken},
        {"id": "c", "image": "000000000025.png", "conversations": spoken},
        {"id": "d", "image": ["000000000009.png"] * 2, "conversations": spoken},
    ]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps(records))
    (tmp_path / "exclude.txt").write_text("COCO_val2014_000000000025.jpg\n")
    builder = LlavaMix665k(
        data_dir=tmp_path / "tfds", file_format="array_record", annotations=file,
        exclude=tmp_path / "exclude.txt",
    )  # fmt: skip
    builder.download_and_prepare()
    assert builder.left_out == {"b": "not_an_image", "d": "several images"}
    path = tmp_path / "tfds" / "llava_mix665k" / "1.0.0"
    source = open_source(SourceSpec(kind="tfds", path=str(path), split="train"))
    got = {source[i].id: source[i] for i in range(len(source))}
    want = LlavaSource(file)
    assert set(got) == {"a", "text"}
    assert got["text"].image is None
    assert got["a"].encoded_image() == want[0].encoded_image()
    assert got["a"].extras["conversations"] == records[0]["conversations"]
    assert got["a"].caption == "Ein Bär"
    assert got["a"].extras["image_names"] == ["000000000009.png"]
    assert "tensorflow" not in sys.modules
    half = open_source(SourceSpec(kind="tfds", path=str(path), split="train[:1]"))
    assert half.fingerprint != source.fingerprint
    assert source.fingerprint.startswith("llava_mix665k/1.0.0 train [('llava_mix665k-train")


def test_a_local_copy_must_be_named(tmp_path):
    from core_jax.data.llava_tfds import LlavaPretrain558k

    builder = LlavaPretrain558k(data_dir=tmp_path, file_format="array_record")
    with pytest.raises(SourceError, match="local copy"):
        builder.download_and_prepare()

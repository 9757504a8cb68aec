"""An image is prepared alike wherever a target is asked about it."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from core_jax.data.images import ImageLimits
from core_jax.data.llava import LlavaSource, open_images
from core_jax.decode.frontends import open_image
from massv_jax.distilling import load_limited_target
from massv_jax.distilling_instructions import make_instruction
from massv_jax.evaluation.prompts import read_questions
from massv_jax.experiment import DataConfig, DistillConfig, Experiment, ModelConfig
from massv_jax.generating import GenerateJob, make_decoder, read_rows
from tests.massv.tiny_pairs import pictures

LIMITS = ImageLimits(min_side=1)


@pytest.fixture
def folder(tmp_path):
    """A picture on its side with a transparent part: there is much to do alike."""
    pixels = pictures(1)[0]
    alpha = np.where(np.arange(pixels.shape[1]) > 9, 255, 0).astype(np.uint8)
    pixels = np.dstack([pixels, np.broadcast_to(alpha, pixels.shape[:2])])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    asked = [{"from": "human", "value": "<image>\nwhat is it?"}]
    records = [{"id": "a", "image": "a.png", "conversations": asked}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    line = {"id": "a", "image": "a.png", "prompt": "what is it?"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_generate_distill_and_evaluate_see_the_same(family, folder, qwen_pair, gemma_pair):
    path = str({"qwen": qwen_pair, "gemma": gemma_pair}[family].target)
    data = DataConfig(limits=LIMITS)
    experiment = Experiment(
        task="distill", model=ModelConfig(target=path, language_model="l", frozen_dtype="float32"),
        data=data,
    )  # fmt: skip
    source = LlavaSource(folder / "data.json")
    limited = load_limited_target(experiment).frontend

    def prepared(frontend, images, prompt):
        return frontend.prepare([frontend.render(prompt, len(images))], [images])

    row = next(iter(read_rows(GenerateJob(input=folder / "prompts.jsonl", output=folder / "o"))))
    images = [open_image(image, LIMITS) for image in row.images]
    generated = prepared(make_decoder(path, "none").target.frontend, images, row.prompt)
    instruction = make_instruction(source[0], 0, DistillConfig())
    images = open_images(source[0], LIMITS)
    distilled = prepared(limited, images, instruction.messages(0, []))
    question = read_questions(source, data, num_prompts=1)[0][0]
    evaluated = prepared(limited, list(question.images), question.prompt)
    assert generated.images is not None
    for other in (distilled, evaluated):
        np.testing.assert_array_equal(other.ids, generated.ids)
        jax.tree.map(np.testing.assert_array_equal, other.images, generated.images)

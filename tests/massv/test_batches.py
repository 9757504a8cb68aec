"""Conversations as rows of fixed shape, through both families' templates."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core_jax.data.bad import TooManyBadExamples
from core_jax.data.gemma3_processor import Gemma3Processor
from core_jax.data.images import BadImage, ImageLimits, Reason
from core_jax.data.llava import LlavaSource
from core_jax.data.pipeline import make_batches
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.data.sources import Example, SourceError
from massv_jax.answers import AnsweredTurn, AnswerRecord, AnswerSource, SamplingRecord
from massv_jax.batches import RowMaker, check_supervision, policy_of
from massv_jax.drafter_config import DrafterConfig, PrefixConfig
from massv_jax.experiment import DataConfig
from tests.massv import tiny_pairs


def say(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    for i, picture in enumerate(tiny_pairs.pictures(2)):
        Image.fromarray(picture).save(path / f"{i}.png")
    records = [
        {"id": "a", "image": "0.png", "conversations": say("<image>\nwhat is it?", "two cats",
                                                           "sure?", "a red circle")},
        {"id": "b", "conversations": say("no image", "on a mat")},
        {"id": "c", "image": "1.png", "conversations": say("describe\n<image>", "a mat")},
        {"id": "d", "image": "0.png", "conversations": [{"from": "gpt", "value": "lost"}]},
        {"id": "e", "image": "none.png", "conversations": say("<image>", "a mat")},
        {"id": "f", "image": "0.png", "conversations": say("<image> <|image_pad|>", "a mat")},
    ]  # fmt: skip
    (path / "data.json").write_text(json.dumps(records))
    return path


CONFIG = DataConfig(
    batch_size=2, max_length=128, image_windows=20, num_threads=1, limits=ImageLimits(min_side=8)
)


@pytest.fixture(scope="module")
def qwen(qwen_pair):
    processor = Qwen2_5_VLProcessor.from_pretrained(qwen_pair.target)
    config = DrafterConfig.for_pair(processor.config, tiny_pairs.qwen_lm_config())
    return RowMaker(config, CONFIG, processor)


@pytest.fixture(scope="module")
def gemma(gemma_pair):
    processor = Gemma3Processor.from_pretrained(gemma_pair.target)
    config = DrafterConfig.for_pair(processor.config, tiny_pairs.gemma_lm_config())
    return RowMaker(config, CONFIG, processor)


def learned(rows, row):
    ids = row["tokens"][row["supervised"]]
    return rows.processor.tokenizer.decode(ids.tolist())


def test_qwen_rows_learn_answers_and_their_ends(qwen, folder):
    source = LlavaSource(folder / "data.json")
    row = qwen.row(source[0])
    assert learned(qwen, row) == "two cats<|im_end|>a red circle<|im_end|>"
    tokens = (row["slots"] >= 0).sum()
    assert tokens == (row["tokens"] == 5).sum() == (row["segments"] > 0).sum() // 4 == 15
    shown = qwen.show(source[0])
    assert shown.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    assert "<|vision_start|><15 image tokens><|vision_end|>what is it?" in shown
    assert "assistant\n[[two cats<|im_end|>]]\n<|im_start|>user\nsure?" in shown
    # Text counts on from the larger side of the image.
    after = np.flatnonzero(row["slots"] >= 0)[-1] + 1
    assert (row["positions"][:, after] == row["positions"][:, after][0]).all()
    assert row["positions"][0, after] < after
    assert row["patches"].shape == (20 * 16, 3 * 4 * 4)  # one of two equal frames
    half = dataclasses.replace(qwen, image_dtype="bfloat16").row(source[0])["patches"]
    assert half.dtype == jnp.bfloat16
    text = qwen.row(source[1])
    assert not text["segments"].any()
    assert (text["slots"] < 0).all()
    assert {k: (v.shape, v.dtype) for k, v in text.items()} == {
        k: (v.shape, v.dtype) for k, v in row.items()
    }


def test_gemma_rows_learn_answers_and_their_ends(gemma, folder):
    source = LlavaSource(folder / "data.json")
    row = gemma.row(source[0])
    assert learned(gemma, row) == "two cats<end_of_turn>a red circle<end_of_turn>"
    assert row["tokens"][0] == 2  # one begin of sequence, not two
    assert (row["tokens"] == 2).sum() == 1
    assert (row["tokens"] == tiny_pairs.GEMMA_PLACEHOLDER).sum() == 16
    assert row["pixels"].shape == (1, 56, 56, 3)
    assert not gemma.row(source[1])["pixels"].any()


def test_plain_captions_are_learned_without_a_template(qwen, gemma, folder):
    plain = dataclasses.replace(CONFIG, format="plain")
    source = LlavaSource(folder / "data.json")
    rows = dataclasses.replace(qwen, config=plain)
    assert rows.show(source[2]) == "<|vision_start|><16 image tokens><|vision_end|>[[a mat\n]]"
    rows = dataclasses.replace(gemma, config=plain)
    shown = rows.show(source[2])
    assert shown.startswith("<bos>\n\n<start_of_image><16 image tokens><end_of_image>\n\n[[a mat")
    # A source of images and captions serves as well.
    example = Example("x", (folder / "0.png"), "a red circle")
    assert learned(qwen, dataclasses.replace(qwen, config=plain).row(example)) == "a red circle\n"


def test_first_turns_alone(qwen, folder):
    rows = dataclasses.replace(qwen, config=dataclasses.replace(CONFIG, turns="first"))
    assert learned(rows, rows.row(LlavaSource(folder / "data.json")[0])) == "two cats<|im_end|>"


@pytest.mark.parametrize(
    ("index", "reason", "words"),
    [(3, Reason.NO_CAPTION, "no question"), (4, Reason.MISSING_FILE, ""),
     (5, Reason.NO_CAPTION, "places for images")],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_reason(qwen, folder, index, reason, words):
    with pytest.raises(BadImage) as caught:
        qwen.row(LlavaSource(folder / "data.json")[index])
    assert caught.value.reason == reason
    assert words in " ".join(qwen.log.refused)


def test_images_that_are_too_large_or_cut_are_refused(qwen, folder):
    source = LlavaSource(folder / "data.json")
    for change, words in (({"image_windows": 1}, "do not fit"), ({"max_length": 40}, "cut")):
        rows = dataclasses.replace(qwen, config=dataclasses.replace(CONFIG, **change))
        with pytest.raises(BadImage):
            rows.row(source[0])
        assert words in " ".join(rows.log.refused)


def test_drafters_with_prompts_of_their_own(qwen, folder):
    source = LlavaSource(folder / "data.json")
    whole = qwen.row(source[2])
    pooling = dataclasses.replace(qwen.drafter, pooling=2)
    rows = dataclasses.replace(qwen, drafter=pooling, with_target=True)
    row = rows.row(source[2])
    assert learned(rows, row) == learned(qwen, whole)
    np.testing.assert_array_equal(row["target_tokens"], whole["tokens"])
    kept = row["source"] >= 0
    np.testing.assert_array_equal(row["tokens"][kept], whole["tokens"][row["source"][kept]])
    assert (row["slots"] >= 0).sum() == 4 < (whole["slots"] >= 0).sum() == 16
    assert row["leaders"].shape == (20 * 4,)
    text = dataclasses.replace(qwen.drafter, kind="text", text=tiny_pairs.qwen_lm_config())
    row = dataclasses.replace(qwen, drafter=text).row(source[2])
    assert learned(qwen, row) == learned(qwen, whole)
    assert "patches" not in row
    assert not np.isin(row["tokens"], [3, 4, 5]).any()


def record(tokenizer, *, finish="stop", top=False, **changes):
    ids = tokenizer("a red circle")["input_ids"]
    ids = [*ids, 2] if finish == "stop" else ids
    extra = {}
    if top:
        extra = {"top_ids": tuple((i, 9, 10) for i in ids),
                 "top_logprobs": tuple((-0.1, -3.0, -4.0) for _ in ids)}  # fmt: skip
    turn = AnsweredTurn(question=(None, "what?"), answer_ids=tuple(ids), finish_reason=finish,
                        text="a red circle", **extra)  # fmt: skip
    values = dict(id="a", images=("0.png",), turns=(turn,), seed=3, target="t" * 64,
                  sampling=SamplingRecord(temperature=1.0))  # fmt: skip
    return AnswerRecord(**values | changes)


def test_answers_come_back_as_they_were_written(qwen, folder, tmp_path):
    tokenizer = qwen.processor.tokenizer
    records = [record(tokenizer, top=True), record(tokenizer, finish="length", id="b")]
    (tmp_path / "answers-0.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    source = AnswerSource(tmp_path, images=str(folder), target="t" * 64)
    assert [source[i].extras["record"] for i in range(2)] == records
    assert json.loads(records[0].to_json())["turns"][0]["finish_reason"] == "stop"
    assert learned(qwen, qwen.row(source[0])) == "a red circle<|im_end|>"
    assert learned(qwen, qwen.row(source[1])) == "a red circle"  # cut off: no end is learned
    rows = dataclasses.replace(qwen, top_k=2)
    row = rows.row(source[0])
    at = np.flatnonzero(row["supervised"])
    np.testing.assert_array_equal(row["top_ids"][at, 0], row["tokens"][at])
    assert row["top_ids"].shape == (128, 2)
    with pytest.raises(BadImage):
        rows.row(source[1])
    with pytest.raises(SourceError, match="answered by"):
        AnswerSource(tmp_path, images=str(folder), target="u" * 64)
    for text, words in (
        ('{"format": 2}', "format 2"), ("{", "not valid JSON"), ('{"format": 1}', "one turn"),
        (records[0].to_json().replace("0.png", "../0.png"), "leads out"),
    ):  # fmt: skip
        (tmp_path / "answers-1.jsonl").write_text(text + "\n")
        with pytest.raises(SourceError, match=words):
            AnswerSource(tmp_path, images=str(folder))
    (tmp_path / "answers-1.jsonl").write_text(records[0].to_json().replace("seed", "sead"))
    with pytest.raises(SourceError, match="sead"):
        AnswerSource(tmp_path, images=str(folder))[2]


def test_answers_that_the_drafter_cannot_say_are_refused(qwen, folder):
    """319 is a row of the target's table and none of the drafter's."""
    turn = AnsweredTurn(question=("q",), answer_ids=(319, 2), finish_reason="stop")
    example = Example("x", None, "", {"record": record(qwen.processor.tokenizer, turns=(turn,),
                                                       images=())})  # fmt: skip
    with pytest.raises(BadImage):
        qwen.row(example)
    assert "no row in the drafter's table" in " ".join(qwen.log.refused)


def test_batches_replace_what_they_refuse(qwen, folder):
    source = LlavaSource(folder / "data.json")
    config = dataclasses.replace(CONFIG, max_bad_fraction=1.0)
    batches = make_batches(source, batch_size=2, seed=0, transform=qwen.transform(),
                           policy=policy_of(config), num_threads=0)  # fmt: skip
    with batches:
        batch = next(batches)
    assert batch["tokens"].shape == (2, 128)
    assert len(batch["ids"]) == 2  # the examples' names, for messages
    assert batch["patches"].shape[:2] == (2, 20 * 16)
    check_supervision(batch, qwen.log)
    with pytest.raises(SourceError, match="no token"):
        check_supervision({"supervised": np.zeros((2, 9), bool)}, qwen.log)
    assert TooManyBadExamples  # what a stricter policy raises


class Frontend:
    """A target that reads an image as a prefix of embeddings."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def prepare(self, texts, images):
        assert texts == [""]
        assert len(images[0]) == 1
        return types.SimpleNamespace(images=np.full((1, 4, 4, 3), 7, np.uint8))


def test_rows_behind_a_prefix(qwen, folder):
    """The prefix has no tokens; a text drafter begins with an end token instead."""
    tokenizer = qwen.processor.tokenizer
    target = PrefixConfig(num_embeddings=6, embed_dim=9, vocab_size=320)
    config = DrafterConfig.for_pair(target, tiny_pairs.qwen_lm_config())
    rows = RowMaker(config, dataclasses.replace(CONFIG, max_length=40), Frontend(tokenizer))
    example = Example("x", folder / "0.png", "a red circle")
    row = rows.row(example)
    assert row["slots"].tolist() == [*range(6), *[-1] * 34]
    assert learned(rows, row) == "a red circle<|im_end|>"
    assert np.flatnonzero(row["supervised"])[0] == 6
    assert row["images"].shape == (4, 4, 3)
    cut = record(tokenizer, finish="length")
    assert learned(rows, rows.row(Example("x", folder / "0.png", "", {"record": cut}))) == (
        "a red circle"
    )
    text = dataclasses.replace(rows, drafter=DrafterConfig.for_pair(
        target, tiny_pairs.qwen_lm_config(), kind="text"))  # fmt: skip
    row = text.row(example)
    assert row["tokens"][0] == tokenizer.eos_token_id
    assert learned(rows, row) == "a red circle<|im_end|>"
    assert set(row) == {"tokens", "valid", "supervised"}
    with pytest.raises(BadImage):
        rows.row(Example("x", None, "a red circle"))

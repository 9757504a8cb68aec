"""The command line of distillation with tiny networks, and what phase 2 makes of its answers."""

import json

import numpy as np
import pytest
from PIL import Image

from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.decode.target import load_target
from massv_jax.answers import AnswerSource
from massv_jax.batches import RowMaker
from massv_jax.distilling_answers import Answerer, answer_chunk
from massv_jax.drafter_config import DrafterConfig
from massv_jax.experiment import DataConfig, DistillConfig
from massv_jax.loading import load_config, target_config
from massv_jax.speculative.decoder import SpeculativeDecoder
from tests.massv import tiny_pairs
from tests.massv.test_massv_commands import ROOT, run


@pytest.fixture
def instructions(tmp_path):
    for i, picture in enumerate(tiny_pairs.pictures(3)):
        Image.fromarray(picture).resize((48, 40)).save(tmp_path / f"{i}.png")
    ask = [{"from": "human", "value": "<image>\nwhat is it?"}]
    more = [*ask, {"from": "gpt", "value": "x"}, {"from": "human", "value": "two cats"}]
    records = [{"id": i, "image": f"{i}.png", "conversations": more} for i in range(3)]
    records += [{"id": 3, "image": "none.png", "conversations": ask},
                {"id": 4, "conversations": [{"from": "human", "value": "a mat"}]}]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def _flags(pair, folder, *more):
    return [
        "--config", ROOT / "configs" / "massv_distill.py:mini", "--out", folder / "answers",
        f"--config.model.target={pair.target}", "--config.distill.chunk_size=2",
        f"--config.data.source.path={folder / 'data.json'}", "--config.distill.batch_size=2",
        f"--config.data.source.images={folder}", "--config.distill.max_new_tokens=6", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_and_phase_2_on_its_answers(qwen_pair, instructions):
    flags = _flags(qwen_pair, instructions, "--config.distill.turns=all")
    code, out, error = run("massv_jax.distill", *flags, "--process_index=1", "--process_count=2")
    assert code == 0, error
    assert "missing" in out
    code, out, error = run("massv_jax.distill", *flags)
    assert code == 0, error
    assert "4 succeeded + 1 failed + 0 skipped = 5 instructions (image_missing_file 1)" in out
    answers = AnswerSource(instructions / "answers", images=str(instructions))
    config = DrafterConfig.for_pair(
        target_config(qwen_pair.target), load_config(qwen_pair.language_model)[1]
    )
    processor = Qwen2_5_VLProcessor.from_pretrained(qwen_pair.target, config.target)
    maker = RowMaker(config, DataConfig(max_length=128, image_windows=12), processor)
    record = answers[0].extras["record"]
    tokens = maker.tokens(answers[0])
    learned = tokens.ids[tokens.supervised].tolist()
    first = record.turns[0].answer_ids
    assert learned[: len(first) - 1] == list(first[:-1])
    assert maker.row(answers[0])["supervised"].sum() == len(learned)
    code, _, error = run("massv_jax.distill", *flags, "--config.distill.seed=1")
    assert code == 1
    assert error.startswith("error: ")
    assert "distill.seed was 0, is 1" in error


@pytest.mark.slow
def test_gemma_answers_with_its_probabilities(gemma_pair, instructions):
    """The caches of local layers hold what is read to score an answer: nothing differs."""
    from core_jax.data.llava import LlavaSource

    target = load_target(gemma_pair.target)
    config = DistillConfig(
        max_new_tokens=24, store_top_k=2, greedy_fraction=1.0, batch_size=2, prompt_lengths=(64,)
    )
    decoder = SpeculativeDecoder(target, None, batch_size=2, prompt_lengths=(64,))
    answerer = Answerer(decoder=decoder, config=config, target="t", num_threads=1)
    source = LlavaSource(instructions / "data.json", images=instructions)
    chunk = answer_chunk(answerer, source, 0, [0, 1])
    assert len(chunk.lines) == 2
    for line in chunk.lines:
        turn = json.loads(line)["turns"][0]
        chosen = np.array(turn["top_ids"])[:, 0]
        np.testing.assert_array_equal(chosen, turn["answer_ids"])
        assert len(chosen) > 16  # past the local layers' window

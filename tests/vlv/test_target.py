"""The captioner as a target: found by entry point, and saying what it says as a captioner."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core_jax.config import to_dataclass
from core_jax.decode.target import TargetError, load_target
from vlv_jax import networks as names
from vlv_jax.experiment import Experiment
from vlv_jax.exporting import Exportable, write_export
from vlv_jax.inference import Captioner
from vlv_jax.loading import load_networks
from vlv_jax.target import load, target_of


@pytest.fixture(scope="module")
def exported(tiny_hub, tmp_path_factory):
    """A captioner with layers strong enough to say many different things."""
    experiment = to_dataclass(Experiment, tiny_hub.experiment(stage=2))
    networks, params, _ = load_networks(experiment.model)
    rng = np.random.default_rng(0)
    # A tied table finds large embeddings again, whatever the layers do: one word for ever.
    lm = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0.5 if path[-1].key == "embedding"
        else x + jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype),
        params[names.LANGUAGE_MODEL],
    )  # fmt: skip
    params |= {names.LANGUAGE_MODEL: lm}
    out = tmp_path_factory.mktemp("out") / "model"
    write_export(
        Exportable(experiment=experiment, networks=networks, params=params, origin="Test.",
                   facts={}),
        out,
    )  # fmt: skip
    return out


def _images(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)) for _ in range(count)]


def test_prompts_become_arrays(exported):
    target = load_target(exported)
    assert target.model_type == "vlv"
    a, b = _images(2)
    inputs = target.frontend.prepare(["", "two red", ""], [[a], [], [b]], lengths=[4, 8])
    assert inputs.ids.shape[1] in (4, 8)
    np.testing.assert_array_equal(inputs.prompt.has_image, [True, False, True])
    np.testing.assert_array_equal(inputs.valid.any(axis=1), [False, True, False])
    assert inputs.images.shape == (3, 32, 32, 3)
    assert not inputs.images[1].any()
    assert target.frontend.prepare([""], [[a]], lengths=[4]).ids.shape == (1, 0)
    with pytest.raises(ValueError, match="neither an image nor a text"):
        target.frontend.prepare([""], [[]])
    with pytest.raises(ValueError, match="row 0 has 2 images"):
        target.frontend.prepare([""], [[a, b]])
    with pytest.raises(ValueError, match="takes no messages"):
        target.frontend.render([{"role": "user", "content": "hello"}], 1)
    with pytest.raises(TargetError, match="leave `rules` out"):
        load(exported, rules={})


@pytest.mark.slow
def test_decoded_by_windows_it_says_what_it_says_as_a_captioner(exported):
    """The drafts are its own later words, right and wrong ones."""
    captioner = Captioner.from_pretrained(exported)
    images = _images(3)
    want = captioner.caption(images, max_new_tokens=8)
    target = dataclasses.replace(target_of(captioner), eos_ids=(-1,))
    inputs = target.frontend.prepare([""] * 3, [[image] for image in images])

    @jax.jit
    def begin(params, prompt, images):
        vision = target.decoder.encode_images(params, images)
        return target.decoder.begin(params, prompt, vision, max_new_tokens=8, window=3)

    logits, state = begin(target.params, inputs.prompt, inputs.images)
    extend = jax.jit(target.decoder.extend)
    said = np.argmax(logits, -1)[:, None]
    rng = np.random.default_rng(0)
    while said.shape[1] < 8:
        wrong = rng.integers(0, target.vocab_size, (3, 3))
        before = target.decoder.ends(state)
        window = np.concatenate([said[:, -1:], wrong], axis=1).astype(np.int32)
        logits, state = extend(target.params, state, window)
        said = np.concatenate([said, np.argmax(logits[:, 0], -1)[:, None]], axis=1)
        state = target.decoder.rewind(state, before + 1)
    assert len(np.unique(said)) >= 5
    for row, caption in zip(said, want, strict=True):
        text = target.tokenizer.decode(row[: caption.num_tokens], skip_special_tokens=True)
        assert text.strip() == caption.text


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "accept"), [(0.0, "rejection"), (1.0, "coupled")])
def test_drafted_for_it_says_what_it_says_plainly(exported, temperature, accept):
    from massv_jax.speculative.decoder import SpeculativeDecoder
    from tests.massv.speculative.test_networks import near

    target = dataclasses.replace(load_target(exported), eos_ids=(-1,))
    drafter = dataclasses.replace(target, params=near(target.params, 0.08))
    how = {"max_new_tokens": 12, "temperature": temperature}

    def answers(drafter):
        decoder = SpeculativeDecoder(target, drafter, accept=accept, prompt_lengths=(4,))
        return decoder.generate(_images(3), [""] * 3, gamma=3, **how)

    plain, made = answers(None), answers(drafter)
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    assert len(np.unique(plain.tokens)) >= 5
    total = made.statistics.total
    assert 0 < total.accepted.sum() < total.judged.sum()

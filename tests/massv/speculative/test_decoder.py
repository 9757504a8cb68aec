"""`SpeculativeDecoder` around the toy network: batches, seeds, streams, policies, errors."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode.frontends import allowed_length
from core_jax.decode.target import Target, TargetInputs
from massv_jax.binding import BindingError
from massv_jax.speculative.adaptive import (
    ALL,
    AdaptiveGamma,
    FixedGamma,
    GammaChoice,
    Replay,
    policy_of,
)
from massv_jax.speculative.decoder import RequestError, SpeculativeDecoder
from massv_jax.speculative.drafters import LookupDrafter, ModelDrafter, text_prompt, text_rows
from massv_jax.speculative.profile import profile
from tests.massv.speculative.toy import PIXELS, ToyDecoder, ToyPrompt, toy_params

VOCAB, IMAGE = 23, 22  # letters a .. w; w stands for an image


class ToyTokenizer:
    """A letter is a token."""

    pad_token_id = 0

    def __init__(self, letters="abcdefghijklmnopqrstuvw"):
        self.letters = letters

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.letters)}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(97 + i) for i in ids)


@dataclasses.dataclass(frozen=True)
class ToyFrontend:
    tokenizer: ToyTokenizer = dataclasses.field(default_factory=ToyTokenizer)
    image_ids: tuple[int, ...] = (IMAGE,)

    def render(self, prompt, num_images):
        return "w" * num_images + prompt

    def prepare(self, texts, images, *, lengths=None):
        rows = [[ord(c) - 97 for c in text] for text in texts]
        P = allowed_length(max(map(len, rows)), lengths)
        ids, valid = np.zeros((len(rows), P), np.int32), np.zeros((len(rows), P), bool)
        for i, row in enumerate(rows):
            if row.count(IMAGE) != len(images[i]):
                raise ValueError(f"row {i}: {row.count(IMAGE)} places, {len(images[i])} images")
            ids[i, P - len(row) :], valid[i, P - len(row) :] = row, True
        has_image = np.array([len(row) > 0 for row in images])
        seen = [row[0] if len(row) else np.zeros(PIXELS) for row in images]
        pixels = np.array(seen, np.float32) if has_image.any() else None
        return TargetInputs(ToyPrompt(ids, valid, has_image), pixels, ids, valid)


def target(eos=(), seed=3, apart=0.0):
    return Target(
        model_type="toy", decoder=ToyDecoder(), params=toy_params(VOCAB, seed=seed, apart=apart),
        frontend=ToyFrontend(), vocab_size=VOCAB, max_positions=60, eos_ids=eos, pad_id=0,
    )  # fmt: skip


NEAR = target(apart=0.3)
PROMPTS = ["hello", "abcde", "no", "fog", "bus"]
IMAGES = [np.full(PIXELS, 0.3), None, np.arange(PIXELS) / 3, None, None]
OPTIONS = dict(max_new_tokens=12)


def decoder(drafter=NEAR, **options):
    options = dict(prompt_lengths=(8, 16)) | options
    return SpeculativeDecoder(target(), drafter, **options)


def test_batches_are_filled_up_and_say_the_same():
    plain = decoder(None).generate(IMAGES, PROMPTS, **OPTIONS)
    whole = decoder().generate(IMAGES, PROMPTS, gamma=3, **OPTIONS)
    parts = decoder(batch_size=2).generate(IMAGES, PROMPTS, gamma=3, **OPTIONS)
    for made in (whole, parts):
        assert made.texts == plain.texts
        np.testing.assert_array_equal(made.tokens, plain.tokens)
        assert made.tokens.shape == (5, 12)
        assert not made.finished.any()
    assert len(parts.choices) == 3
    assert parts.choices[0] == (GammaChoice(3, ALL),)
    np.testing.assert_array_equal(parts.statistics.rounds, whole.statistics.rounds)
    assert len(set(plain.texts)) == 5
    blank = decoder(None).generate([IMAGES[2], *IMAGES[1:]], PROMPTS, **OPTIONS)
    assert blank.texts[0] != plain.texts[0]
    assert blank.texts[1:] == plain.texts[1:]


def test_statistics_say_what_was_saved():
    made = decoder().generate(IMAGES, PROMPTS, gamma=3, **OPTIONS)
    s = made.statistics
    np.testing.assert_array_equal(s.emitted, made.lengths - 1)  # the first is the prompt's
    total = s.total
    assert total.emitted[0] == s.emitted.sum()
    np.testing.assert_allclose(total.emitted_length, s.emitted.sum() / s.rounds.sum())
    assert 0 < total.accepted_length[0] <= total.emitted_length[0] - 0.5
    assert ((s.acceptance >= 0) & (s.acceptance <= 1) | np.isnan(s.acceptance)).all()
    summary = s.summary()
    assert summary["tokens"] == 55
    assert len(summary["acceptance"]) == 3


def test_seeds_belong_to_rows():
    hot = dict(temperature=1.0, gamma=3, seed=5, **OPTIONS)
    made = decoder().generate(IMAGES, PROMPTS, **hot)
    one = decoder().generate(IMAGES[2:3], PROMPTS[2:3], row_seeds=[2], **hot)
    assert one.texts == made.texts[2:3]
    again = decoder(batch_size=2).generate(IMAGES, PROMPTS, **hot)
    assert again.texts == made.texts
    other = decoder().generate(IMAGES, PROMPTS, **(hot | dict(seed=6)))
    assert other.texts != made.texts
    plain = decoder(None).generate(IMAGES, PROMPTS, **hot)
    coupled = decoder(accept="coupled").generate(IMAGES, PROMPTS, **hot)
    assert coupled.texts == plain.texts


def test_a_stream_grows_to_the_whole_answer():
    whole = decoder().generate(IMAGES, PROMPTS, gamma=3, **OPTIONS)
    seen = list(decoder().stream(IMAGES, PROMPTS, gamma=3, rounds_per_call=2, **OPTIONS))
    assert len(seen) > 2
    assert seen[-1] == whole.texts
    for before, after in itertools.pairwise(seen):
        assert all(b.startswith(a) for a, b in zip(before, after, strict=True))


def test_an_adaptive_run_can_be_repeated_from_its_log():
    policy = AdaptiveGamma(gammas=(1, 2, 4), rounds_per_call=2, measure=False,
                           seconds={1: 1.0, 4: 1.6})  # fmt: skip
    hot = dict(temperature=1.0, **OPTIONS)
    made = decoder(batch_size=3).generate(IMAGES, PROMPTS, gamma=policy, **hot)
    used = {call.gamma for calls in made.choices for call in calls}
    assert used <= {1, 2, 4}
    assert made.max_gamma == 4
    assert Replay(made.choices).max_gamma == max(used)
    for repeated in (made.choices, made.replay()):
        again = decoder(batch_size=3).generate(IMAGES, PROMPTS, gamma=repeated, **hot)
        assert again.texts == made.texts
        assert again.choices == made.choices
    assert again.max_gamma == 4
    short = [made.choices[0][:1], made.choices[1]]
    with pytest.raises(ValueError, match="logged choices end"):
        decoder(batch_size=3).generate(IMAGES, PROMPTS, gamma=short, **hot)
    greedy = decoder().generate(IMAGES, PROMPTS, gamma=AdaptiveGamma(gammas=(1, 3)), **OPTIONS)
    assert greedy.texts == decoder(None).generate(IMAGES, PROMPTS, **OPTIONS).texts


def test_a_replay_has_the_room_of_the_run_that_it_repeats():
    choices = ((GammaChoice(2, 8),),)
    assert Replay(choices).max_gamma == 2
    assert Replay(choices, 5).max_gamma == 5


def test_a_window_that_the_caches_have_no_room_for_is_refused():
    """Writes beyond a cache would be clamped into it."""
    session = decoder().begin(IMAGES, PROMPTS, max_gamma=2, **OPTIONS)
    for gamma in (0, 3):
        with pytest.raises(RequestError, match=f"window of {gamma} drafts"):
            session.advance(gamma)
    session.advance(2)
    assert session.done
    with pytest.raises(RequestError, match="window of 1"):
        decoder(None).begin(IMAGES, PROMPTS, **OPTIONS).advance(1)


def test_numpy_numbers_are_numbers():
    assert policy_of(np.int64(5)) == FixedGamma(5)


def test_a_policy_weighs_acceptance_against_cost():
    def policy(accepted, seconds):
        made = AdaptiveGamma(gammas=(1, 3, 6), measure=False, seconds=seconds)
        made._judged[:], made._accepted[:] = 10.0, 10.0 * np.asarray(accepted)
        return made

    cheap, dear = {1: 1.0, 3: 1.1, 6: 1.2}, {1: 1.0, 3: 2.0, 6: 4.0}
    assert policy([0.9] * 6, cheap).choose() == 6
    assert policy([0.9] * 6, dear).choose() == 1
    assert policy([0.2] * 6, cheap).choose() == 1
    made = policy([0.5] * 6, cheap)
    assert made.expected_tokens(3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert policy([0.5] * 6, {1: 1.0, 3: 2.0}).cost(6) == pytest.approx(3.5)
    with pytest.raises(ValueError, match="gammas"):
        AdaptiveGamma(gammas=(0,))
    with pytest.raises(ValueError, match="seconds"):
        AdaptiveGamma(measure=False)


def test_lookup_needs_no_network():
    made = decoder(LookupDrafter()).generate(IMAGES, PROMPTS, gamma=4, **OPTIONS)
    assert made.texts == decoder(None).generate(IMAGES, PROMPTS, **OPTIONS).texts
    with pytest.raises(ValueError, match="n-grams"):
        LookupDrafter(max_ngram=1, min_ngram=2)


def test_a_profile_adds_up():
    made = profile(decoder(), IMAGES, PROMPTS, gamma=2, rounds=4, repeats=1)
    parts = (made.vision, made.target_prefill, made.drafter_prefill, made.draft, made.verify)
    assert min(parts) > 0
    assert min(made.step, made.round) > 0
    assert made.overhead == pytest.approx(made.round / (made.draft + made.verify) - 1)
    want = 2.0 * made.step / (made.draft + made.verify)
    assert made.predicted_speedup(2.0) == pytest.approx(want)
    assert made.summary()["draft_ms"] == pytest.approx(1e3 * made.draft)
    with pytest.raises(RequestError, match="needs a drafter"):
        profile(decoder(None), IMAGES, PROMPTS)


def test_a_text_drafter_sees_no_placeholder():
    inputs = ToyFrontend().prepare(["wab", "c", "w"], [[IMAGES[0]], [], [IMAGES[2]]], lengths=[4])
    own = target(eos=(7,))
    assert [row.tolist() for row in text_rows(inputs, own)] == [[0, 1], [2], []]
    ids, valid = text_prompt(inputs, own, [3])
    np.testing.assert_array_equal(ids, [[0, 0, 1], [0, 0, 2], [0, 0, 7]])
    np.testing.assert_array_equal(valid, [[0, 1, 1], [0, 0, 1], [0, 0, 1]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gamma=0), "gamma is 0"),
        (dict(gamma=17), "gamma is 17"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(max_new_tokens=0), "at least 1"),
        (dict(max_new_tokens=60), "leave no room"),
        (dict(row_seeds=[1]), "row_seeds"),
    ],
)
def test_impossible_requests_fail_before_anything_is_compiled(changes, message, monkeypatch):
    from massv_jax.speculative import decoder as module

    monkeypatch.setattr(module, "start", None)
    with pytest.raises(RequestError, match=message):
        decoder().generate(IMAGES, PROMPTS, **(OPTIONS | changes))


def test_prompts_that_do_not_fit_their_images_or_the_cache(monkeypatch):
    from massv_jax.speculative import decoder as module

    monkeypatch.setattr(module, "start", None)
    with pytest.raises(ValueError, match="longer than the cache has room for"):
        decoder().generate(None, ["a" * 17], **OPTIONS)
    with pytest.raises(ValueError, match="row 0: 1 places, 0 images"):
        decoder().generate(None, ["wa"], chat=False, **OPTIONS)
    with pytest.raises(RequestError, match="images for 1"):
        decoder().generate(IMAGES[:1], PROMPTS, **OPTIONS)
    with pytest.raises(RequestError, match="list of at least one"):
        decoder().generate(None, "hello", **OPTIONS)
    with pytest.raises(RequestError, match="give texts"):
        decoder().generate(None, [[{"role": "user"}]], chat=False, **OPTIONS)


def test_a_prompt_that_fits_is_not_refused_for_its_padding():
    """60 positions: with 50 new tokens there is room for 10, which is no length of the list."""
    wide = decoder(None, prompt_lengths=(8, 16))
    assert wide.allowed_lengths(44) == [8, 16]
    assert wide.allowed_lengths(50) == [8, 10]
    assert wide.allowed_lengths(55) == [5]
    wide.check(None, ["a" * 10], {"max_new_tokens": 50})
    with pytest.raises(ValueError, match="longer than the cache has room for"):
        wide.check(None, ["a" * 11], {"max_new_tokens": 50})


def test_what_is_no_drafter():
    with pytest.raises(TypeError, match="dict is no drafter"):
        decoder({})
    with pytest.raises(BindingError, match="share the target's vision tower"):
        decoder(dataclasses.replace(NEAR, model_type="other"))
    other = dataclasses.replace(NEAR, frontend=ToyFrontend(ToyTokenizer("bacdefghijklmnopqrstuvw")))
    with pytest.raises(BindingError, match="2 of the target's tokens"):
        decoder(other)
    made = ModelDrafter(decoder=ToyDecoder(), params=NEAR.params, vocab_size=VOCAB)
    assert decoder(made).drafter is made
    assert jnp.asarray(made.params["head"]).shape[1] == made.proposer.vocab_size

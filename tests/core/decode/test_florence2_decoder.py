"""Florence-2's decoder under our generation, against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import beam_search, generate
from core_jax.decode.adapters import EncoderDecoder, EncoderPrefix
from core_jax.models import load_model
from core_jax.models.florence2 import Florence2
from tests.oracle import randomize


def _oracle(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config = transformers.Florence2Config(
        vision_config=dict(
            depths=(1, 1, 1, 1), embed_dim=(8, 8, 16, 16), num_heads=(1, 1, 2, 2),
            num_groups=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0, projection_dim=32,
            max_temporal_embeddings=4, max_position_embeddings=10,
        ),
        text_config=dict(
            model_type="bart", d_model=32, vocab_size=120, encoder_layers=1, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=128, dropout=0.0, pad_token_id=1,
            bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        ),
        image_token_id=119,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomize(transformers.Florence2ForConditionalGeneration(config).eval(), std=0.2)
    with torch.no_grad():  # the head is tied: a strong table would repeat one token
        model.get_input_embeddings().weight.mul_(0.2)
        dict(model.named_modules())["model.language_model.decoder.embed_positions"].weight.mul_(5)
    model.save_pretrained(tmp_path)
    return model


def test_greedy_and_beams_equal_transformers(tmp_path):
    torch = pytest.importorskip("torch")

    oracle = _oracle(tmp_path)
    model, params = load_model(tmp_path)
    assert isinstance(model, Florence2)
    embeds = np.random.default_rng(0).normal(size=(3, 9, 32)).astype(np.float32)
    with torch.no_grad():
        states = oracle.get_encoder()(inputs_embeds=torch.tensor(embeds))
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
    prefix = EncoderPrefix(encode(params, jnp.asarray(embeds)))
    np.testing.assert_allclose(prefix.states, states.last_hidden_state, atol=1e-4)

    common = dict(
        encoder_outputs=states, decoder_input_ids=torch.full((3, 1), 2), max_new_tokens=20,
        do_sample=False, forced_eos_token_id=None, forced_bos_token_id=0, eos_token_id=[7, 30],
        pad_token_id=1,
    )  # fmt: skip
    decoder = EncoderDecoder(model, forced_bos_token_id=0)
    ours = dict(max_new_tokens=20, eos_ids=(7, 30), pad_id=1)
    for num_beams in (1, 4):
        want = oracle.generate(num_beams=num_beams, early_stopping=num_beams > 1, **common)
        want = want[:, 1:].numpy()
        assert len(np.unique(want)) >= 10
        if num_beams == 1:
            out = generate(decoder, params, prefix, **ours)
        else:
            out = beam_search(decoder, params, prefix, early_stopping=True, **ours)
        width = want.shape[1]
        np.testing.assert_array_equal(np.array(out.tokens)[:, :width], want)
        assert (np.array(out.tokens)[:, width:] == 1).all()
        assert (np.array(out.tokens)[:, 0] == 0).all()

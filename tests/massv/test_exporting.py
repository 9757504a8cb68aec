"""Drafter directories: exported ones in transformers, all of them read back, bound to a target."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speculative import sighted_of
from core_jax.data.gemma3_processor import Gemma3Processor
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.partition import flatten
from massv_jax import exporting
from massv_jax.binding import BindingError, bind, check_vocabularies, weight_hashes
from massv_jax.companions import load_tokenizer
from massv_jax.exporting import ExportError, export_drafter, pad_vocabulary
from massv_jax.loading import load_drafter, load_tower, make_drafter, read_config, save_drafter
from tests.massv.tiny_pairs import GEMMA_ROWS, QWEN_LM_ROWS, QWEN_ROWS, pictures
from tests.oracle import close, relative_error

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


@functools.partial(jax.jit, static_argnames=("drafter", "method"))
def run(drafter, method, *args):
    return getattr(drafter, method)(*args)


def same(one, two):
    a, b = flatten(one), flatten(two)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def qwen(qwen_pair, tmp_path_factory):
    """A drafter, its stock directory."""
    parts = make_drafter(qwen_pair.target, qwen_pair.language_model)
    out = tmp_path_factory.mktemp("export") / "qwen"
    assert export_drafter(parts, out, qwen_pair.target, facts={"step": 3})
    return parts, out


def test_stock_qwen_directory_in_transformers(qwen_pair, qwen):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parts, out = qwen
    oracle = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(out).eval()
    assert oracle.config.get_text_config().vocab_size == QWEN_ROWS
    processor = Qwen2_5_VLProcessor.from_pretrained(out)  # the target's, copied
    made = processor([processor.render(QUESTION)], [[pictures()[0]]])
    patches, grid = processor.image_processor(pictures()[0])
    inputs = dict(
        input_ids=torch.tensor(made.ids).long(), attention_mask=torch.tensor(made.valid).long(),
        pixel_values=torch.tensor(patches), image_grid_thw=torch.tensor([grid]),
        mm_token_type_ids=torch.tensor(made.ids == 5).int(),
    )  # fmt: skip
    with torch.no_grad():
        want = oracle(**inputs).logits.numpy()
    b = made.images.batch
    drafter, tower = parts.drafter, load_tower(qwen_pair.target)
    features = run(drafter, "features", tower, *map(jnp.asarray, (b.patches, b.positions,
                                                                 b.segments)))  # fmt: skip
    tokens = run(drafter, "image_tokens", parts.params, features)
    args = map(jnp.asarray, (made.places.image_slots, made.places.positions))
    hidden = run(drafter, "hidden", parts.params, jnp.asarray(made.ids), jnp.asarray(made.valid),
                 tokens, *args)  # fmt: skip
    ours = np.asarray(hidden @ drafter.head_table(parts.params).T)
    assert close(ours, want[..., :QWEN_LM_ROWS], 1e-4)
    # New rows say what the last of the old ones says, which no token has.
    np.testing.assert_array_equal(
        want[..., QWEN_LM_ROWS:], np.repeat(want[..., QWEN_LM_ROWS - 1 : QWEN_LM_ROWS], 10, -1)
    )
    blind = inputs | {"pixel_values": inputs["pixel_values"] * 0}
    with torch.no_grad():
        control = oracle(**blind).logits.numpy()
    assert relative_error(ours, control[..., :QWEN_LM_ROWS]) > 1e-2


def assisted(torch, transformers, target, drafter):
    """Both models in transformers, a question about a picture, and how it is answered."""
    load = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
    processor = Qwen2_5_VLProcessor.from_pretrained(target)
    ids = torch.tensor(processor([processor.render(QUESTION)], [[pictures()[0]]]).ids).long()
    patches, grid = processor.image_processor(pictures()[0])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                  pixel_values=torch.tensor(patches), image_grid_thw=torch.tensor([grid]),
                  mm_token_type_ids=(ids == 5).int())  # fmt: skip
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return load(target).eval(), load(drafter).eval(), inputs, options


def test_stock_directory_serves_as_an_assistant(qwen_pair, qwen):
    """transformers' own speculative decoding: greedy answers stay the target's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, out = qwen
    target, drafter, inputs, options = assisted(torch, transformers, qwen_pair.target, out)
    want = target.generate(**inputs, **options)
    got = target.generate(**inputs, **options, assistant_model=drafter)
    assert torch.equal(got, want)
    assert len(set(want[0, inputs["input_ids"].shape[1] :].tolist())) > 1


def test_the_cards_lines_show_the_image_to_an_assistant(qwen_pair, qwen, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, out = qwen
    target, drafter, inputs, options = assisted(torch, transformers, qwen_pair.target, out)
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    looks = []
    look = drafter.model.visual.forward
    monkeypatch.setattr(
        drafter.model.visual, "forward", lambda *a, **k: looks.append(1) or look(*a, **k)
    )
    want = target.generate(**inputs, **options)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), want)
    assert not looks  # if this fails, transformers has mended it: say so in the card
    sees = sighted_of(out)(drafter, **images)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=sees), want)
    assert len(looks) == 1


@pytest.fixture(scope="module")
def gemma(gemma_pair, tmp_path_factory):
    """A drafter, its stock directory."""
    parts = make_drafter(gemma_pair.target, gemma_pair.language_model)
    out = tmp_path_factory.mktemp("export") / "gemma"
    assert export_drafter(parts, out, gemma_pair.target)
    return parts, out


def test_stock_gemma_directory_in_transformers(gemma_pair, gemma):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parts, out = gemma
    oracle = transformers.Gemma3ForConditionalGeneration.from_pretrained(out).eval()
    assert oracle.config.get_text_config().vocab_size == GEMMA_ROWS
    processor = Gemma3Processor.from_pretrained(gemma_pair.target)
    made = processor([processor.render(QUESTION)], [[pictures()[0]]])
    ids = torch.tensor(made.ids).long()
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids),
        pixel_values=torch.tensor(np.moveaxis(made.pixel_values[0], -1, 1).copy()),
        token_type_ids=(ids == parts.drafter.config.image_token_id).long(),
    )  # fmt: skip
    with torch.no_grad():
        want = oracle(**inputs).logits.numpy()
        control = oracle(**inputs | {"pixel_values": inputs["pixel_values"] * 0}).logits.numpy()
    tower, drafter = load_tower(gemma_pair.target), parts.drafter
    features = run(drafter, "features", tower, jnp.asarray(made.pixel_values[0]))
    tokens = run(drafter, "image_tokens", parts.params, features)
    hidden = run(drafter, "hidden", parts.params, jnp.asarray(made.ids), jnp.asarray(made.valid),
                 tokens)  # fmt: skip
    ours = np.asarray(hidden @ drafter.head_table(parts.params).T)
    rows = drafter.config.vocab_size
    assert close(ours, want[..., :rows], 1e-4)
    assert relative_error(ours, control[..., :rows]) > 1e-2
    # All its rows have tokens, so those that pad the table repeat one that is kept free of text.
    vocabulary = load_tokenizer(gemma_pair.language_model).get_vocab()
    free = max(i for token, i in vocabulary.items() if token.startswith("<unused"))
    assert len(vocabulary) == rows
    np.testing.assert_array_equal(
        want[..., rows:], np.repeat(want[..., free : free + 1], GEMMA_ROWS - rows, -1)
    )


def test_gemma_as_an_assistant_sees_the_image_by_the_cards_lines(gemma_pair, gemma, monkeypatch):
    """Greedy answers stay the target's; the image's block is attended to in both directions."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parts, out = gemma
    load = transformers.Gemma3ForConditionalGeneration.from_pretrained
    target, drafter = load(gemma_pair.target).eval(), load(out).eval()
    processor = Gemma3Processor.from_pretrained(gemma_pair.target)
    made = processor([processor.render(QUESTION)], [[pictures()[0]]])
    ids = torch.tensor(made.ids).long()
    types = (ids == parts.drafter.config.image_token_id).long()
    pixels = torch.tensor(np.moveaxis(made.pixel_values[0], -1, 1).copy())
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                  token_type_ids=types)  # fmt: skip
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        direct = drafter(**inputs).logits[0, -1]
        causal = drafter(**inputs | {"token_type_ids": torch.zeros_like(types)}).logits[0, -1]
    looks, read = [], []
    look = drafter.model.vision_tower.forward
    monkeypatch.setattr(
        drafter.model.vision_tower, "forward", lambda *a, **k: looks.append(1) or look(*a, **k)
    )
    want = target.generate(**inputs, **options)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=drafter), want)
    assert not looks  # if this fails, transformers has mended it: say so in the card
    drafter.register_forward_hook(lambda *a: read.append(a[-1].logits[0, -1].detach().numpy()))
    sees = sighted_of(out)(drafter, pixel_values=pixels)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=sees), want)
    assert len(looks) == 1
    assert close(read[0], direct.numpy(), 1e-4)
    assert relative_error(read[0], causal.numpy()) > 1e-2


def test_directories_come_back_bit_for_bit(qwen_pair, qwen, tmp_path):
    parts, out = qwen
    again = load_drafter(out, qwen_pair.target)
    same(again.params, parts.params)
    assert again.drafter == parts.drafter
    assert (out / "generation_config.json").is_file()
    assert (out / "preprocessor_config.json").is_file()
    card = (out / "README.md").read_text()
    assert "assistant_model" in card
    assert "- step: 3" in card
    mlp = make_drafter(qwen_pair.target, qwen_pair.language_model, kind="mlp", pooling=2)
    assert not export_drafter(mlp, tmp_path / "mlp", qwen_pair.target)
    assert "no stock architecture" in (tmp_path / "mlp" / "README.md").read_text()
    back = load_drafter(tmp_path / "mlp", qwen_pair.target)
    same(back.params, mlp.params)
    assert back.drafter == mlp.drafter
    # A drafter that was loaded can be saved again.
    save_drafter(tmp_path / "again", back)
    same(load_drafter(tmp_path / "again", qwen_pair.target).params, mlp.params)
    assert not (tmp_path / "mlp" / "model.safetensors").is_file()


def test_padding_is_off_on_request(qwen_pair, qwen, tmp_path):
    parts, _ = qwen
    export_drafter(parts, tmp_path / "out", qwen_pair.target, pad_vocab_to_target=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == QWEN_LM_ROWS
    with pytest.raises(ExportError, match="no drafter"):
        export_drafter(parts, qwen_pair.target, qwen_pair.target)


def test_rows_that_pad_a_table():
    table = {"embed_tokens": {"embedding": jnp.arange(6.0).reshape(3, 2)}}
    repeated = pad_vocabulary(table, 5, like=1)["embed_tokens"]["embedding"]
    assert repeated.tolist() == [[0, 1], [2, 3], [4, 5], [2, 3], [2, 3]]
    assert pad_vocabulary(table, 3, like=1) == table


@pytest.mark.parametrize(
    ("words", "pad", "row"),
    [
        (["a", "b"], None, 3),  # the last one without a token
        (["a", "<unused7>", "<unused9>", "b"], None, 2),
        (["<pad>", "a", "b", "c"], 0, 0),
        (["a", "b", "c", "d"], None, None),
    ],
)
def test_a_row_that_no_text_uses(words, pad, row, monkeypatch, tmp_path):
    tokenizer = Vocabulary({word: i for i, word in enumerate(words)})
    tokenizer.pad_token_id = pad
    monkeypatch.setattr(exporting, "load_tokenizer", lambda path: tokenizer)
    if row is not None:
        assert exporting.unlikely_row(tmp_path, 4) == row
        return
    with pytest.raises(ExportError, match="--nopad_vocab_to_target"):
        exporting.unlikely_row(tmp_path, 4)


def test_a_drafter_of_another_target_is_refused_by_name(qwen_pair, qwen, tmp_path):
    parts, out = qwen
    other = tmp_path / "other"
    shutil.copytree(qwen_pair.target, other)
    same_target = bind(other, load_tokenizer(other))
    parts.binding.check(same_target, where="x")  # another folder, the same target
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"max_pixels": 1280}))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(BindingError) as caught:
        load_drafter(out, other)
    message = str(caught.value)
    assert "the chat template" in message
    assert "limits of the image processor" in message
    assert "tower" not in message
    content = dict(read_config(out))
    changed = dataclasses.replace(parts.binding, weights="0" * 64, tower="1" * 64)
    with pytest.raises(BindingError, match="vision tower"):
        changed.check(parts.binding, where="x")
    assert content["target"]["weights"] == parts.binding.weights
    with pytest.raises(FileNotFoundError, match=r"massv_config\.json"):
        load_drafter(qwen_pair.language_model, qwen_pair.target)


def test_hashes_are_of_tensors_not_of_files(qwen_pair, tmp_path):
    from core_jax.models import load_model, save_model

    model, params = load_model(qwen_pair.target)
    save_model(tmp_path / "sharded", model, params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    before = weight_hashes(qwen_pair.target)
    assert weight_hashes(tmp_path / "sharded") == before
    merger = params["visual"]["merger"]["ln_q"]
    merger["scale"] = merger["scale"] + 1
    save_model(tmp_path / "merger", model, params)
    after = weight_hashes(tmp_path / "merger")
    assert (after[0] == before[0], after[1] == before[1]) == (False, True)
    norm = params["visual"]["blocks"]["norm1"]
    norm["scale"] = norm["scale"] + 1
    save_model(tmp_path / "tower", model, params)
    assert weight_hashes(tmp_path / "tower")[1] != before[1]


class Vocabulary(dict):
    def get_vocab(self):
        return dict(self)


def test_language_models_of_other_tokenizers_are_refused():
    target = Vocabulary(a=0, b=1, image=5)
    check_vocabularies(target, Vocabulary(a=0, b=1), vocab_size=3, hidden=(5,))
    with pytest.raises(BindingError, match="'b' is 1, not 2"):
        check_vocabularies(target, Vocabulary(a=0, b=2), vocab_size=3, hidden=(5,))
    with pytest.raises(BindingError, match="other ids"):
        check_vocabularies(target, Vocabulary(a=0, c=1), vocab_size=3, hidden=(5,))
    with pytest.raises(BindingError, match="3 rows"):
        check_vocabularies(target, Vocabulary(a=0, b=1), vocab_size=3, hidden=())

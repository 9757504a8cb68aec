"""The stand-ins' tokenizers: hub layout, one token a word, captions that fit."""

import filecmp
import json
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer, BartTokenizer, CLIPTokenizer, Qwen2Tokenizer

from miniature.tokenizers import CLIP_LENGTH, PROMPTS, build_tokenizers, learn_merges
from miniature.world import STYLES, describe, questions, sample_scene

CLASSES = {"clip": CLIPTokenizer, "florence2": BartTokenizer, "qwen2": Qwen2Tokenizer}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return build_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def tokenizers(directories):
    return {name: AutoTokenizer.from_pretrained(path) for name, path in directories.items()}


def test_files_are_the_same_every_time(directories, tmp_path):
    for name, path in build_tokenizers(tmp_path).items():
        files = sorted(p.name for p in directories[name].iterdir())
        layout = {"tokenizer.json", "tokenizer_config.json"}
        layout |= set() if name.startswith("gemma") else {"vocab.json", "merges.txt"}
        assert layout <= set(files)
        same, different, odd = filecmp.cmpfiles(path, directories[name], files, shallow=False)
        assert (sorted(same), different, odd) == (files, [], [])


@pytest.mark.parametrize("name", CLASSES)
def test_vocab_and_merges_alone_give_the_same_tokenizer(directories, tokenizers, tmp_path, name):
    """What older and other readers of the hub's layout use."""
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((directories[name] / file).read_bytes())
    other = CLASSES[name].from_pretrained(tmp_path)
    for index in range(20):
        caption = describe(sample_scene(4, index, "heldout"))
        assert other(caption)["input_ids"] == tokenizers[name](caption)["input_ids"]
    assert isinstance(tokenizers[name], CLASSES[name])
    vocab = json.loads((directories[name] / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert len(tokenizers[name]) == len(vocab) < 1000


@pytest.mark.parametrize("name", CLASSES)
def test_captions_are_short_and_come_back(tokenizers, name):
    tokenizer = tokenizers[name]
    captions = {
        style: [describe(sample_scene(3, i, "heldout"), 0, style) for i in range(2000)]
        for style in STYLES
    }
    for style, texts in captions.items():
        ids = tokenizer(texts)["input_ids"]
        lengths = [len(row) for row in ids]
        assert max(lengths) <= CLIP_LENGTH - 10
        if style == "default":
            assert min(lengths) >= 25
            assert 40 < sum(lengths) / len(lengths) < 52
        if name != "clip":  # which lowers case and spaces punctuation
            assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


@pytest.mark.parametrize("name", CLASSES)
def test_words_of_the_world_are_single_tokens(tokenizers, name):
    tokenizer, pieces = tokenizers[name], 0
    texts = list(PROMPTS)
    for index in range(200):
        scene = sample_scene(6, index, "validation")
        texts += [describe(scene, 0, style) for style in STYLES]
        texts += [f"{qa.question} {qa.answer}" for qa in questions(scene)]
    backend = tokenizer.backend_tokenizer
    for text in texts:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            assert len(backend.model.tokenize(piece)) == 1, piece
            pieces += 1
    assert pieces > 10_000


def test_special_tokens_are_the_hubs(tokenizers):
    clip, florence2, qwen2 = (tokenizers[name] for name in CLASSES)
    ids = clip("red circle", padding="max_length")["input_ids"]
    assert len(ids) == CLIP_LENGTH
    size = len(clip)
    assert [ids[0], ids[3], ids[4]] == [size - 2, size - 1, 0]
    assert (clip.bos_token, clip.eos_token, clip.pad_token_id) == (
        "<|startoftext|>", "<|endoftext|>", 0,
    )  # fmt: skip
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    assert florence2.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert florence2.image_token_id == len(florence2) - 1
    prompt = florence2("<image>Describe.")["input_ids"]
    assert (prompt[0], prompt[1], prompt[-1]) == (0, florence2.image_token_id, 2)
    assert qwen2("red circle")["input_ids"] == qwen2.convert_tokens_to_ids(["red", "Ġcircle"])
    assert qwen2.eos_token == qwen2.pad_token == "<|endoftext|>"
    row = qwen2("<|im_start|><|vision_start|><|image_pad|><|vision_end|><|im_end|>")["input_ids"]
    tokens = ["<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>"]
    assert qwen2.convert_ids_to_tokens(row) == tokens
    chat = qwen2.apply_chat_template(
        [{"role": "user", "content": "Is there a red circle?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == ("<|im_start|>user\nIs there a red circle?<|im_end|>\n<|im_start|>assistant\n")


GEMMA = ("gemma3-text", "gemma3")


@pytest.mark.parametrize("name", GEMMA)
def test_gemma_captions_come_back_word_by_word(tokenizers, name):
    tokenizer = tokenizers[name]
    for index in range(100):
        scene = sample_scene(6, index, "validation")
        for style in STYLES:
            text = describe(scene, 0, style)
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert len(ids) - 1 == len(re.findall(r"\w+|[^\w\s]+", text)), text


def test_gemma_image_placeholder_lies_after_the_text_models_table(tokenizers):
    text, sees = (tokenizers[name] for name in GEMMA)
    assert sees.convert_tokens_to_ids(sees.image_token) == len(text) == len(sees) - 1
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    for tokenizer in (text, sees):
        assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm?"}]}]
    chat = sees.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    expected = (
        "<bos><start_of_turn>user\n<start_of_image>Hm?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert chat == expected
    row = sees(chat, add_special_tokens=False)["input_ids"]
    assert sees.convert_ids_to_tokens(row)[:5] == [
        "<bos>", "<start_of_turn>", "user", "\n", "<start_of_image>",
    ]  # fmt: skip


def test_chat_template_of_pictures(tokenizers):
    tokenizer = tokenizers["qwen2-chat"]
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hm?"}]}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Hm?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.get_vocab() == tokenizers["qwen2"].get_vocab()


@pytest.mark.parametrize("name", ["florence2", "qwen2", *GEMMA])
def test_any_text_survives(tokenizers, name):
    for text in ("Grüße, 12 ☃s!", "tab\tand\nnew line", "日本語", "zebra {x}"):
        ids = tokenizers[name](text)["input_ids"]
        assert tokenizers[name].decode(ids, skip_special_tokens=True) == text


def test_merges_are_the_most_frequent_pairs_first():
    words = Counter({tuple("low"): 5, tuple("lower"): 2, tuple("aa"): 2, tuple("xyx"): 1})
    expected = [("l", "o"), ("lo", "w"), ("a", "a"), ("e", "r"), ("low", "er")]
    assert learn_merges(words, minimum=2) == expected
    assert learn_merges(Counter({("a",): 9}), minimum=1) == []

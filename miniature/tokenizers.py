"""Small tokenizers in the hub's layouts, learned from the miniature world's text.

Their algorithms, special tokens and files are those of the big ones; only the merges are few, so
that every word of the world is one token. `clip` is Stable Diffusion 2.1's (77 tokens, padded with
'!', id 0), `florence2` is BART's with Florence-2's `<image>`, `qwen2` is Qwen2.5's with the special
tokens of Qwen2.5-VL, `qwen2-chat` the same with the chat template of Qwen2.5-VL, `gemma3-text` is
Gemma 3's and `gemma3` the same with the placeholder of an image, whose id is the next one after
the text model's table, as in the released models. All know every byte, hence every text.

    python -m miniature.tokenizers OUT_DIR
"""

import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import (
    AddedToken,
    BartTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    Qwen2Tokenizer,
)

from miniature.world import STYLES, describe, questions, sample_scene

CLIP_LENGTH = 77
QWEN2_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# What models are asked, beside the world's own questions.
PROMPTS = (
    "Describe with a paragraph what is shown in the image.",  # <MORE_DETAILED_CAPTION>
    "Describe in detail what is shown in the image.",
    "What does the image describe?",
    "Describe the image in detail.",
    "Caption: Question: Answer:",
    "Caption:\nQuestion:\nAnswer:",
    " Question: What is in the picture? Answer: Answer with one or two words.",
    "You are a helpful assistant.",
    "system\nuser\nassistant\n",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Without the tools and videos of the released template, which is otherwise the same.
_IMAGE_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
GEMMA_IMAGE_TOKEN = "<image_soft_token>"
_GEMMA_TOKEN_NAMES = ("sot_token", "eot_token", "boi_token", "eoi_token", "image_token")
# As the released one, without its check that turns alternate.
_GEMMA_CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = (messages[0]['content'] if messages[0]['content'] is string else"
    " messages[0]['content'][0]['text']) + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ first if loop.first else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_SCENES = 1500  # enough for every word in every place of a sentence

Word = tuple[str, ...]
Pair = tuple[str, str]


def build_tokenizers(out_dir: str | Path, seed: int = 0) -> dict[str, Path]:
    """Learns and writes the tokenizers; equal seeds give equal files, byte for byte.

    Args:
        out_dir: receives a directory for each.
        seed: of the world whose text they learn from.

    Returns:
        The directory of each, by name; `transformers.AutoTokenizer.from_pretrained` reads them.
    """
    out_dir = Path(out_dir)
    texts = list(corpus(seed))
    qwen2 = learn_merges(_count_words(Qwen2Tokenizer(), texts))
    words = _gemma_words(texts)
    gemma3 = learn_merges(words)
    return {
        "clip": _build_clip(out_dir / "clip", texts),
        "florence2": _build_florence2(out_dir / "florence2", texts),
        "qwen2": _build_qwen2(out_dir / "qwen2", qwen2, _CHAT_TEMPLATE),
        "qwen2-chat": _build_qwen2(out_dir / "qwen2-chat", qwen2, _IMAGE_CHAT_TEMPLATE),
        "gemma3-text": _build_gemma3(out_dir / "gemma3-text", words, gemma3, sees=False),
        "gemma3": _build_gemma3(out_dir / "gemma3", words, gemma3, sees=True),
    }


def corpus(seed: int) -> Iterator[str]:
    """Captions by every author, questions, answers and prompts."""
    for index in range(_SCENES):
        scene = sample_scene(seed, index, "train")
        for style in STYLES:
            yield describe(scene, 0, style)
        for qa in questions(scene, 0):
            yield f"{qa.question} {qa.answer}"
            yield qa.answer
            yield qa.answer.capitalize()
    for _ in range(100):
        yield from PROMPTS


def learn_merges(words: Counter[Word], minimum: int = 8) -> list[Pair]:
    """Byte-pair encoding until no pair occurs `minimum` times.

    Args:
        words: symbols of each distinct word with its frequency.
        minimum: frequency below which nothing is merged.

    Returns:
        Merges in order; among equally frequent pairs the alphabetically first goes first, so the
        result depends on nothing but the words.
    """
    merges: list[Pair] = []
    while True:
        pairs: Counter[Pair] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda p: (-pairs[p], p))
        if pairs[best] < minimum:
            return merges
        merges.append(best)
        words = Counter({_merge(word, best): count for word, count in words.items()})


def _merge(word: Word, pair: Pair) -> Word:
    result, at = [], 0
    while at < len(word):
        if word[at : at + 2] == pair:
            result.append(pair[0] + pair[1])
            at += 2
        else:
            result.append(word[at])
            at += 1
    return tuple(result)


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """The 256 characters that byte-level BPE writes bytes with (GPT-2's table), in hub order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return tuple(map(chr, printable)) + tuple(chr(256 + i) for i in range(len(others)))


def _count_words(tokenizer, texts: list[str], end: str = "") -> Counter[Word]:
    """Splits texts as the tokenizer will, into symbols; `end` marks a word's last one."""
    backend = tokenizer.backend_tokenizer
    words: Counter[Word] = Counter()
    for text, count in Counter(texts).items():
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            words[(*piece[:-1], piece[-1] + end)] += count
    return words


def _write(directory: Path, cls, tokens: list[str], merges: list[Pair], **kwargs) -> Path:
    """Writes vocab.json and merges.txt, lets transformers read them and add its own files."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = _numbered(tokens, directory.name)
    text = json.dumps(vocab, ensure_ascii=False)
    (directory / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = cls(vocab=vocab, merges=merges, **kwargs)
    tokenizer.save_pretrained(directory)
    return directory


def _numbered(tokens: list[str], name: str) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{name}: a token occurs twice in the vocabulary")
    return vocab


def _build_clip(directory: Path, texts: list[str]) -> Path:
    bytes_ = byte_symbols()
    base = [*bytes_, *(b + "</w>" for b in bytes_)]
    merges = learn_merges(_count_words(CLIPTokenizer(), texts, end="</w>"))
    tokens = [*base, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    kwargs = {"pad_token": "!", "model_max_length": CLIP_LENGTH}
    return _write(directory, CLIPTokenizer, tokens, merges, **kwargs)


def _build_florence2(directory: Path, texts: list[str]) -> Path:
    merges = learn_merges(_count_words(BartTokenizer(), texts))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *byte_symbols()]
    tokens += [*(a + b for a, b in merges), "<mask>", "<image>"]
    kwargs = {"model_max_length": 1024, "extra_special_tokens": {"image_token": "<image>"}}
    return _write(directory, BartTokenizer, tokens, merges, **kwargs)


def _build_qwen2(directory: Path, merges: list[Pair], template: str) -> Path:
    tokens = [*byte_symbols(), *(a + b for a, b in merges), *QWEN2_SPECIAL_TOKENS]
    special = [AddedToken(t, special=True, normalized=False) for t in QWEN2_SPECIAL_TOKENS[1:]]
    kwargs = {
        "model_max_length": 32768,
        "additional_special_tokens": special,
        "chat_template": template,
    }
    return _write(directory, Qwen2Tokenizer, tokens, merges, **kwargs)


def _gemma_words(texts: list[str]) -> Counter[Word]:
    """Gemma's BPE runs over whole texts with spaces as '▁'; merges are learned within words."""
    words: Counter[Word] = Counter()
    for text, count in Counter(texts).items():
        for piece in re.findall(r" ?\w+| ?[^\w\s]+|\s", text):
            words[tuple(piece.replace(" ", "▁"))] += count
    words[tuple("model")] += len(texts)  # of the chat template
    return words


def _build_gemma3(
    directory: Path, words: Counter[Word], merges: list[Pair], *, sees: bool
) -> Path:
    letters = sorted({letter for word in words for letter in word})
    tokens = [*GEMMA_SPECIAL_TOKENS, *_GEMMA_TURNS, *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [*letters, *(a + b for a, b in merges)]
    special: list | dict = [AddedToken(t, special=True, normalized=False) for t in _GEMMA_TURNS]
    if sees:
        tokens.append(GEMMA_IMAGE_TOKEN)
        special = dict(zip(_GEMMA_TOKEN_NAMES, (*special, GEMMA_IMAGE_TOKEN), strict=True))
    tokenizer = GemmaTokenizer(
        vocab=_numbered(tokens, directory.name), merges=merges, model_max_length=32768,
        add_bos_token=True,
        extra_special_tokens=special, chat_template=_GEMMA_CHAT_TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m miniature.tokenizers OUT_DIR")
    for name, path in build_tokenizers(sys.argv[1]).items():
        print(f"{name}: {path}")

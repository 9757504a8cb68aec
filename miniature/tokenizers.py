"""Three small tokenizers in the hub's layouts, learned from the miniature world's text.

Their algorithms, special tokens and files are those of the big ones; only the merges are few, so
that every word of the world is one token. `clip` is Stable Diffusion 2.1's (77 tokens, padded with
'!', id 0), `florence2` is BART's with Florence-2's `<image>`, `qwen2` is Qwen2.5's with the special
tokens of Qwen2.5-VL. All know every byte, hence every text.

    python -m miniature.tokenizers OUT_DIR
"""

import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import AddedToken, BartTokenizer, CLIPTokenizer, Qwen2Tokenizer

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
_SCENES = 1500  # enough for every word in every place of a sentence

Word = tuple[str, ...]
Pair = tuple[str, str]


def build_tokenizers(out_dir: str | Path, seed: int = 0) -> dict[str, Path]:
    """Learns and writes the three tokenizers; equal seeds give equal files, byte for byte.

    Args:
        out_dir: receives the directories `clip`, `florence2` and `qwen2`.
        seed: of the world whose text they learn from.

    Returns:
        The directory of each, by name; `transformers.AutoTokenizer.from_pretrained` reads them.
    """
    out_dir = Path(out_dir)
    texts = list(corpus(seed))
    builders = {"clip": _build_clip, "florence2": _build_florence2, "qwen2": _build_qwen2}
    return {name: build(out_dir / name, texts) for name, build in builders.items()}


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
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{directory.name}: a token occurs twice in the vocabulary")
    text = json.dumps(vocab, ensure_ascii=False)
    (directory / "vocab.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = cls(vocab=vocab, merges=merges, **kwargs)
    tokenizer.save_pretrained(directory)
    return directory


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


def _build_qwen2(directory: Path, texts: list[str]) -> Path:
    merges = learn_merges(_count_words(Qwen2Tokenizer(), texts))
    tokens = [*byte_symbols(), *(a + b for a, b in merges), *QWEN2_SPECIAL_TOKENS]
    special = [AddedToken(t, special=True, normalized=False) for t in QWEN2_SPECIAL_TOKENS[1:]]
    kwargs = {
        "model_max_length": 32768,
        "additional_special_tokens": special,
        "chat_template": _CHAT_TEMPLATE,
    }
    return _write(directory, Qwen2Tokenizer, tokens, merges, **kwargs)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m miniature.tokenizers OUT_DIR")
    for name, path in build_tokenizers(sys.argv[1]).items():
        print(f"{name}: {path}")

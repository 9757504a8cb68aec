"""BLEU, ROUGE-L and CIDEr-D of captions, equal to pycocoevalcap's, without Java.

Every metric gives one number per example and one per corpus; `estimates` adds intervals.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from core_jax.evaluation.bootstrap import Estimate, bootstrap_mean, bootstrap_sums
from vlv_jax.evaluation.tokenization import tokenize

MAX_N = 4
_ROUGE_BETA = 1.2  # weight of recall
_CIDER_SIGMA = 6.0  # of the length penalty, in words
# Guards against 0 / 0; part of pycocoevalcap's definition, visible in per-example BLEU.
_TINY, _SMALL = 1e-15, 1e-9


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Scores of a corpus of captions.

    Attributes:
        corpus: Metric name -> corpus value.
        per_example: Metric name -> values [n]. Their mean is the corpus value for rouge_l and
            cider_d, not for BLEU, which is a ratio of sums.
        bleu_rows: Addends of BLEU, [n, 10], see `bleu_of_sums`.
    """

    corpus: dict[str, float]
    per_example: dict[str, np.ndarray]
    bleu_rows: np.ndarray

    def estimates(self, **options) -> dict[str, Estimate]:
        """Returns bootstrap intervals of all metrics; `options` as for `bootstrap_sums`.

        CIDEr's document frequencies stay those of the whole corpus.
        """
        result = {}
        for name, values in self.per_example.items():
            if name.startswith("bleu_"):
                order = int(name.removeprefix("bleu_")) - 1
                result[name] = bootstrap_sums(
                    self.bleu_rows, lambda sums, k=order: bleu_of_sums(sums)[..., k], **options
                )
            else:
                result[name] = bootstrap_mean(values, **options)
        return result


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores captions against one or more reference captions each.

    Args:
        captions: One caption an example; may be empty text.
        references: The reference captions of each example.

    Returns:
        bleu_1 .. bleu_4, rouge_l and cider_d (which is on the scale 0 to 10, as pycocoevalcap
        prints it; a corpus of one example has CIDEr 0, since no word is then informative).

    Raises:
        ValueError: No examples, lengths that differ, an example without a reference, or a plain
            string where a list of references belongs.
    """
    if len(captions) != len(references) or not captions:
        raise ValueError(
            f"{len(captions)} captions and {len(references)} lists of references; they must be as "
            "many, and at least one"
        )
    for i, listed in enumerate(references):
        if isinstance(listed, str) or not listed:
            raise ValueError(
                f"the references of example {i} are {listed!r}; they must be a list of captions"
            )
    words = [tokenize(caption) for caption in captions]
    wanted = [[tokenize(reference) for reference in listed] for listed in references]
    return score_tokens(words, wanted)


def score_tokens(
    captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]
) -> CaptionScores:
    """As `score_captions`, of captions that are tokenized already."""
    grams = [_ngrams(words) for words in captions]
    reference_grams = [[_ngrams(words) for words in listed] for listed in references]
    rows = np.array(
        [
            _bleu_row(words, counts, listed, listed_counts)
            for words, counts, listed, listed_counts in zip(
                captions, grams, references, reference_grams, strict=True
            )
        ]
    )
    per_example = {f"bleu_{k + 1}": bleu_of_sums(rows)[:, k] for k in range(MAX_N)}
    corpus = {f"bleu_{k + 1}": float(bleu_of_sums(rows.sum(0))[k]) for k in range(MAX_N)}
    per_example["rouge_l"] = np.array(
        [_rouge_l(words, listed) for words, listed in zip(captions, references, strict=True)]
    )
    per_example["cider_d"] = _cider_d(grams, reference_grams)
    for name in ("rouge_l", "cider_d"):
        corpus[name] = float(per_example[name].mean())
    return CaptionScores(corpus, per_example, rows)


def _ngrams(words: list[str]) -> collections.Counter:
    return collections.Counter(
        tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1)
    )


def _bleu_row(words, counts, references, reference_counts) -> list[float]:
    """Right n-grams (4), n-grams (4), length, length of the reference closest in length."""
    most = collections.Counter()
    for listed in reference_counts:
        most |= listed
    right = [0] * MAX_N
    for gram, count in counts.items():
        right[len(gram) - 1] += min(count, most[gram])
    total = [max(0, len(words) - n) for n in range(MAX_N)]
    closest = min((abs(len(listed) - len(words)), len(listed)) for listed in references)[1]
    return [*right, *total, len(words), closest]


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Returns BLEU-1 .. 4 [..., 4] of summed rows [..., 10] (Papineni et al., 2002)."""
    right, total = sums[..., :MAX_N], sums[..., MAX_N : 2 * MAX_N]
    precision = np.cumprod((right + _TINY) / (total + _SMALL), axis=-1)
    mean = precision ** (1 / np.arange(1, MAX_N + 1))
    length = (sums[..., 8:9] + _TINY) / (sums[..., 9:10] + _SMALL)
    # Without a word the exponent is about -1e15 and the penalty exactly 0.
    return mean * np.exp(np.minimum(0, 1 - 1 / length))


def _lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of bits at a time (Hyyro, 2004)."""
    places = collections.defaultdict(int)
    for i, word in enumerate(a):
        places[word] |= 1 << i
    mask = (1 << len(a)) - 1
    row = mask
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & mask
    return len(a) - row.bit_count()


def _rouge_l(words: list[str], references: Sequence[list[str]]) -> float:
    """ROUGE-L (Lin, 2004) of the best precision and the best recall over references."""
    common = [_lcs(words, listed) for listed in references]
    # Nothing has one (empty) token in pycocoevalcap; it equals another nothing.
    if not words:
        return float(any(not listed for listed in references))
    precision = max(common) / len(words)
    recall = max(c / max(1, len(listed)) for c, listed in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    weight = _ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _cider_d(grams, reference_grams) -> np.ndarray:
    """CIDEr-D (Vedantam et al., 2015) with document frequencies of these references."""
    frequency = collections.Counter()
    for listed in reference_grams:
        frequency.update(set().union(*listed))
    log_documents = math.log(len(grams))

    def vector(counts):
        weights = [{} for _ in range(MAX_N)]
        for gram, count in counts.items():
            rarity = log_documents - math.log(max(1, frequency[gram]))
            weights[len(gram) - 1][gram] = count * rarity
        norms = [math.sqrt(sum(w * w for w in part.values())) for part in weights]
        return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 1)

    scores = []
    for counts, listed in zip(grams, reference_grams, strict=True):
        mine, total = vector(counts), 0.0
        for reference in listed:
            theirs = vector(reference)
            penalty = math.exp(-((mine[2] - theirs[2]) ** 2) / (2 * _CIDER_SIGMA**2))
            total += penalty * sum(_clipped_cosine(mine, theirs, n) for n in range(MAX_N))
        scores.append(10 * total / MAX_N / len(listed))
    return np.array(scores)


def _clipped_cosine(mine, theirs, n: int) -> float:
    weights, reference = mine[0][n], theirs[0][n]
    dot = sum(min(w, reference[g]) * reference[g] for g, w in weights.items() if g in reference)
    norm = mine[1][n] * theirs[1][n]
    return dot / norm if norm else dot

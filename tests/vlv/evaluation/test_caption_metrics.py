"""Caption metrics against pycocoevalcap (its Python parts) and recorded tokens of its Java part."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vlv_jax.evaluation.caption_metrics import score_captions, score_tokens
from vlv_jax.evaluation.tokenization import tokenize

# [text, tokens] from stanford-corenlp-3.4.1 as pycocoevalcap 1.2 runs it.
PTB = json.loads((Path(__file__).parent / "ptb_tokens.json").read_text())
WORDS = "a the red blue circle square is left of big small with and striped".split()  # noqa: SIM905


@pytest.mark.parametrize(("text", "tokens"), PTB)
def test_tokens_equal_stanfords(text, tokens):
    assert tokenize(text) == tokens.split()


def test_punctuation_case_and_line_breaks_do_not_count():
    assert tokenize("A red\nCircle, left of: the BLUE square!") == (
        "a red circle left of the blue square !".replace(" !", "").split()
    )


def _corpus(seed=0, n=40):
    rng = np.random.default_rng(seed)

    def caption(low):
        return list(rng.choice(WORDS, rng.integers(low, 14)))

    captions = [caption(0) for _ in range(n)]
    references = [[caption(1) for _ in range(rng.integers(1, 4))] for _ in range(n)]
    for i in range(0, n, 3):  # some that are right, or nearly
        captions[i] = list(references[i][0])
        captions[i][len(captions[i]) // 2] = WORDS[i % len(WORDS)]
    captions[1], references[2] = [], [[], ["a"]]
    return captions, references


def _theirs(captions, references):
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {i: [" ".join(r) for r in listed] for i, listed in enumerate(references)}
    said = {i: [" ".join(c)] for i, c in enumerate(captions)}
    corpus, per_example = {}, {}
    bleu, bleus = Bleu(4).compute_score(truth, said, verbose=0)
    for k in range(4):
        corpus[f"bleu_{k + 1}"], per_example[f"bleu_{k + 1}"] = bleu[k], bleus[k]
    corpus["rouge_l"], per_example["rouge_l"] = Rouge().compute_score(truth, said)
    corpus["cider_d"], per_example["cider_d"] = Cider().compute_score(truth, said)
    return corpus, per_example


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocoevalcap(seed):
    captions, references = _corpus(seed)
    ours = score_tokens(captions, references)
    corpus, per_example = _theirs(captions, references)
    assert ours.corpus.keys() == corpus.keys()
    for name, value in corpus.items():
        assert ours.corpus[name] == pytest.approx(value, rel=1e-9), name
        np.testing.assert_allclose(ours.per_example[name], per_example[name], rtol=1e-9, atol=1e-12)
    # Control: another caption for one of those that were nearly right.
    longest = max(range(0, len(captions), 3), key=lambda i: len(captions[i]))
    captions[longest] = ["other"] * 20
    changed = score_tokens(captions, references).corpus
    assert all(abs(changed[name] - corpus[name]) > 1e-5 for name in corpus)


def test_values_worked_out_by_hand():
    scores = score_captions(
        ["The cat sat on the mat.", "a dog"], [["the cat sat on a mat"], ["a dog runs", "the dog"]]
    )
    # Unigrams 5/6 and 2/2, bigrams 3/5 and 1/1; lengths 8 of 6 + 2 (the closest reference).
    assert scores.corpus["bleu_1"] == pytest.approx(7 / 8)
    assert scores.corpus["bleu_2"] == pytest.approx(math.sqrt(7 / 8 * 4 / 6))
    # Common subsequence of 5 words in 6 and 6; 2 in 2 and, at best, 2 in 3 and 1 in 2.
    f = 2.44 * (2 / 3) / (2 / 3 + 1.44)
    np.testing.assert_allclose(scores.per_example["rouge_l"], [5 / 6, f])


def test_perfect_and_unrelated_captions():
    truth = ["a red circle left of a square", "two small blue stars in the corner"]
    perfect = score_captions(truth, [[t] for t in truth]).corpus
    assert perfect["bleu_4"] == pytest.approx(1)
    assert perfect["rouge_l"] == pytest.approx(1)
    assert perfect["cider_d"] == pytest.approx(10)
    wrong = score_captions(truth[::-1], [[t] for t in truth]).corpus
    assert wrong["bleu_1"] < 0.01
    assert wrong["cider_d"] == 0


def test_intervals_hold_the_corpus_values():
    captions, references = _corpus()
    scores = score_tokens(captions, references)
    estimates = scores.estimates(seed=3, num_resamples=300)
    assert estimates.keys() == scores.corpus.keys()
    for name, estimate in estimates.items():
        assert estimate.value == pytest.approx(scores.corpus[name])
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.n, estimate.seed) == (40, 3)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 captions and 2"):
        score_captions(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="at least one"):
        score_captions([], [])
    with pytest.raises(ValueError, match="references of example 0"):
        score_captions(["a"], ["a"])
    with pytest.raises(ValueError, match="references of example 1"):
        score_captions(["a", "b"], [["a"], []])

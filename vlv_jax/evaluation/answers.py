"""When an answer is right: the normalisation and the accuracy of VQA v2 (Goyal et al., 2017)."""

import re
from collections.abc import Sequence

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(_NUMBERS.split())}}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_SHORT_FORMS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
    how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
    you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _SHORT_FORMS.split()}


def normalise_answer(answer: str) -> str:
    """Returns an answer as VQA v2 compares it.

    Lower case, no articles, no punctuation (removed beside a space or in a number with commas,
    otherwise a space), numbers up to ten as digits, apostrophes put back into contractions. The
    official script skips all of this where every annotator gave the same answer; here it never is.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if is_loose or has_comma else " ")
    words = (_DIGITS.get(w, w) for w in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the normalised prediction is one of the normalised answers, else 0.0."""
    return float(normalise_answer(prediction) in {normalise_answer(a) for a in answers})


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns VQA v2's accuracy: min(1, agreeing annotators / 3), leaving out each in turn.

    Defined for several annotators (ten in VQA v2); a single answer is matched exactly.
    """
    if len(answers) == 1:
        return exact_match(prediction, answers)
    said = normalise_answer(prediction)
    agree = [normalise_answer(answer) == said for answer in answers]
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)

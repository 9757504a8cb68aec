"""The words that caption metrics count: Penn Treebank tokens, lower case, without punctuation.

pycocoevalcap runs Stanford's PTBTokenizer in Java and drops a list of punctuation marks. This is
the same for text as captions contain it, quirks included, so that numbers can be compared:
hyphenated words stay whole, "isn't" becomes "is n't", "Mr." keeps its dot, brackets survive as
-lrb- and -rrb- (the list has them in upper case, the tokens are in lower case), and so do runs
like "?!". Americanisation is off, as there.
"""

import re

PUNCTUATION = frozenset(
    {
        *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
        *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
    }
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|inc|ltd|co|corp|gen|col|capt|lt|sgt|rev|hon|gov|sen|rep|ave|"
    "blvd|rd|mt|ft|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|wed|thu|fri|bros|dept"
)
# Words that the treebank splits without an apostrophe to mark the place.
_SPLIT = re.compile(
    r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b", re.IGNORECASE
)
_TOKEN = re.compile(
    rf"""
    https?://\S+[^\s.,;:!?'")] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+    # addresses
  | \.\.\.+ | --+                                                 # ellipsis, dash
  | (?:[a-z]\.)+[a-z]\. (?!\w) | \b(?!i\b)[a-z]\.(?!\w)          # u.s. e.g. b.
  | \b(?:{_ABBREVIATIONS})\.(?!\w) | \bno\.(?=\s*\d)
  | 'n'(?!\w) | '\d0s\b | \bo'(?=clock\b)clock | \by'(?=all\b)
  | [a-z]+(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b               # contractions
  | \d+(?:[.,:/]\d+)+(?:-\w+)* | \.\d+                            # numbers
  | \w+(?:-\w+|[./]\w+|(?<!s)'(?!(?:s|m|d|ll|re|ve|t)\b)[a-z]{{2,}}\b)*
  | [!?]+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What the Java tokenizer makes of characters outside the treebank's alphabet.
_REPLACED = str.maketrans(
    {
        **{"\u2018": "`", "\u2019": "'", "\u201c": '"', "\u201d": '"'},
        **{"\u2013": "--", "\u2014": "--", "\u2026": "..."},
        **{"\u20ac": "$", "\u00a3": "#", "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4"},
    }
)


def tokenize(text: str) -> list[str]:
    """Returns the tokens of a caption; line breaks count as spaces, emoji are dropped."""
    text = _SPLIT.sub(
        lambda match: " ".join(part for part in match.groups() if part),
        text.translate(_REPLACED).replace('"', " '' "),
    )
    tokens = (_BRACKETS.get(match[0], match[0].lower()) for match in _TOKEN.finditer(text))
    return [token for token in tokens if token not in PUNCTUATION and token[0] <= "\uffff"]

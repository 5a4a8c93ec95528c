"""Text to sentences, by rules that need no download."""

import re

# A sentence ends at . ! ? … with the quotes and brackets that close behind it, where white space
# and something that can begin a sentence follow; at the full stops of Chinese and Japanese, which
# need no space; and at an empty line.
CLOSING, OPENING = "\"'»)\\]\u201d\u2019", "\"'«(\\[¿¡\u201c\u2018"
WIDE_STOPS, WIDE_CLOSING = "\u3002\uff01\uff1f", "\u201d\u2019\u300d\u300f\uff09"
END = re.compile(
    rf"(?P<stop>[.!?…]+)[{CLOSING}]*\s+(?=[{OPENING}]*[^\W_a-z])"
    rf"|[{WIDE_STOPS}]+[{WIDE_CLOSING}]*"
    r"|[ \t]*\n[ \t]*\n\s*"
)
# Words that a full stop belongs to, in lower case; so do single letters (J. S. Bach, e.g.).
ABBREVIATIONS = frozenset(
    word
    for words in (
        "mr mrs ms dr prof st sr jr rev gen col capt lt sgt hon dept inc ltd co corp est",
        "vs no nos fig figs vol vols ch sec eq eqs ref refs pp al approx cf ca",
        "jan feb mar apr jun jul aug sep sept oct nov dec",
    )
    for word in words.split()
)
LONGEST = max(map(len, ABBREVIATIONS))


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the white space between them.

    Nothing else is lost. Megatron-LM asks nltk's Punkt, which learned abbreviations from
    newspapers; the two differ where only such knowledge helps.
    """
    found, begin = [], 0
    for match in END.finditer(text):
        if match["stop"] == "." and is_abbreviation(text, match.start()):
            continue
        found.append(text[begin : match.end()].strip())
        begin = match.end()
    found.append(text[begin:].strip())
    return [sentence for sentence in found if sentence]


def is_abbreviation(text: str, stop: int) -> bool:
    """Whether the full stop at this place need not end a sentence; behind "I" it may well."""
    word = re.search(r"\w*\Z", text[max(stop - LONGEST - 1, 0) : stop])
    assert word is not None  # it may be empty
    single = len(word[0]) == 1 and word[0].isalpha() and word[0] != "I"
    return single or word[0].lower() in ABBREVIATIONS

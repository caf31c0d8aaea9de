"""How alike two texts are, from 0 to 1, by the metrics that OpenAI's text_similarity grader names. Pure; may take a second.

Words are runs of letters and digits, or of other signs, in lower case; nltk counts for bleu, gleu and meteor, rapidfuzz for
fuzzy_match. nltk is imported with the first text that needs it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

METRICS = tuple("fuzzy_match bleu gleu meteor cosine rouge_1 rouge_2 rouge_3 rouge_4 rouge_5 rouge_l".split())
MAX_CHARS = 100_000
MAX_FUZZY_CHARS = 20_000
MAX_FUZZY_UNEQUAL_CHARS = 2000  # its time grows with the third power
MAX_METEOR_WORDS = 2000  # its time grows with the product of the two lengths

_WORD = re.compile(r"\w+|[^\w\s]+")


class TooLong(ValueError):
    """A text that a metric would take too long for; says how long it may be."""


def similarity(metric: str, text: str, reference: str) -> float:
    """Any of METRICS but cosine, which needs a model. Raises TooLong."""
    if max(len(text), len(reference)) > MAX_CHARS:
        raise TooLong(f"{metric} compares texts of at most {MAX_CHARS} characters")
    if metric == "fuzzy_match":
        _check_fuzzy(len(text), len(reference))
        return float(fuzz.WRatio(text, reference)) / 100
    words, expected = _words(text), _words(reference)
    if not words or not expected:
        return float(words == expected)
    if metric.startswith("rouge_"):
        n = metric.removeprefix("rouge_")
        return _rouge_l(words, expected) if n == "l" else _rouge_n(words, expected, int(n))
    if metric == "meteor" and max(len(words), len(expected)) > MAX_METEOR_WORDS:
        raise TooLong(f"meteor compares texts of at most {MAX_METEOR_WORDS} words")
    return _by_nltk(metric, words, expected)


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two vectors of length 1; what points apart counts as nothing in common."""
    return min(1.0, max(0.0, sum(a * b for a, b in zip(first, second, strict=True))))


def _check_fuzzy(*lengths: int) -> None:
    """rapidfuzz holds the interpreter while it compares, and looks for the shorter text at each place of a longer one."""
    shorter, longer = sorted(lengths)
    most = MAX_FUZZY_CHARS if longer < 1.5 * shorter else MAX_FUZZY_UNEQUAL_CHARS
    if longer > most:
        raise TooLong(
            f"fuzzy_match compares texts of at most {MAX_FUZZY_CHARS} characters, and of at most {MAX_FUZZY_UNEQUAL_CHARS} "
            f"where one is half as long again as the other; here are {lengths[0]} and {lengths[1]}"
        )


def _by_nltk(metric: str, words: list[str], expected: list[str]) -> float:
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from nltk.translate.gleu_score import sentence_gleu
    from nltk.translate.meteor_score import meteor_score

    if metric == "bleu":
        n = min(4, len(words), len(expected))
        weights = (1 / n,) * n  # texts of fewer than four words have no runs of four
        return float(sentence_bleu([expected], words, weights, SmoothingFunction().method1))
    if metric == "gleu":
        return float(sentence_gleu([expected], words))
    return float(meteor_score([expected], words, stemmer=PorterStemmer(), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """In WordNet's place, which would be a download: words match as they are, or by their stem."""

    def synsets(self, _: str) -> list[object]:
        return []


def _rouge_n(words: list[str], expected: list[str], n: int) -> float:
    """F1 over the runs of n words that both have."""
    made, wanted = _runs(words, n), _runs(expected, n)
    return _f1((made & wanted).total(), made.total(), wanted.total())


def _rouge_l(words: list[str], expected: list[str]) -> float:
    """F1 over the longest sequence of words that both have in order."""
    return _f1(LCSseq.similarity(words, expected), len(words), len(expected))


def _runs(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _f1(common: int, made: int, wanted: int) -> float:
    return 2 * common / (made + wanted) if made and wanted else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())

"""What the paper asks of generated pairs in words, as small functions: not copied from the caption, no leaking words,
no near-duplicates, not answerable without the image.

They are deliberately simple, so that a person can say why a pair was rejected; thresholds stand here as constants. A
near-duplicate is found with MinHash: five bands of four hashes find 99.5 % of pairs whose words overlap by 0.9 and
93 % of those at the threshold of 0.8, and an exact comparison follows. Memory: about half a kilobyte per kept pair.
"""

import hashlib
import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .generate_prompt import Pair

COPIED_RUN = 8  # consecutive words that answer and caption share; shorter terms may well be the right answer
COPIED_ANSWER = 5  # or the whole answer, from this many words on
NEAR_DUPLICATE = 0.8  # of the words of both together
BLIND_MATCH = 0.6  # F1 of the words of a blind guess and of the answer
BANDS, HASHES_PER_BAND = 5, 4
_MULTIPLIERS, _ADDENDS = np.random.default_rng(0).integers(
    0, 2**64, (2, BANDS * HASHES_PER_BAND, 1), np.uint64
) | np.uint64(1)

STOP_WORDS = {
    *("a", "an", "and", "are", "as", "at", "be", "by", "can", "do", "does", "for", "from", "how", "in", "is", "it"),
    *("its", "of", "on", "or", "that", "the", "there", "this", "to", "was", "were", "what", "where", "which", "with"),
    *("figure", "image", "picture", "seen", "shown", "visible"),
}
_TEXT = r"(?:captions?|legends?|text|description)"
_SAYS = r"(?:say|state|mention|describe|indicate|note|report|suggest|explain|specif(?:y|ie))(?:s|d|ed|ing)?"
LEAKS = re.compile(
    rf"\bcaptions?\b|\bfigure legends?\b"
    rf"|\b(?:according to|based on|from|per) (?:the|this|its) (?:\w+ )?(?:{_TEXT}|figure)\b"
    rf"|\bthe (?:\w+ )?{_TEXT} {_SAYS}\b"
    rf"|\b(?:{_SAYS}|given|provided) (?:in|by) the (?:\w+ )?{_TEXT}\b",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """Lower-case words in order, numbers and hyphenated words whole."""
    return re.findall(r"[^\W_]+(?:[.'’-][^\W_]+)*", text.lower())


def content_words(text: str) -> frozenset[str]:
    """The words that carry the meaning, or all where none does."""
    every = frozenset(words(text))
    return every - STOP_WORDS or every


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """The share of words that both have (Jaccard)."""
    return len(one & other) / len(one | other) if one or other else 1.0


def several_questions(question: str) -> bool:
    """Whether it is more than one question ("a single, clear sentence")."""
    return question.count("?") > 1


def leaks(pair: Pair) -> bool:
    """Whether question or answer speaks of the caption, which a reader of the pair does not have."""
    return bool(LEAKS.search(pair.question) or LEAKS.search(pair.answer))


def copied(answer: str, caption: str) -> bool:
    """Whether the answer holds a long run of the caption's words, or is nothing but one."""
    answered, text = words(answer), f" {' '.join(words(caption))} "
    length = min(COPIED_RUN, len(answered))
    if length < COPIED_ANSWER:
        return False
    runs = (answered[start : start + length] for start in range(len(answered) - length + 1))
    return any(f" {' '.join(run)} " in text for run in runs)


def answerable_blind(answer: str, guess: str) -> bool:
    """Whether a guess made without the image says what the answer says."""
    one, other = content_words(answer), content_words(guess)
    common = len(one & other)
    return bool(common) and 2 * common / (len(one) + len(other)) >= BLIND_MATCH


def own_fault(pair: Pair, caption: str) -> str | None:
    """Why a pair cannot be used, as far as the pair and its caption tell."""
    if several_questions(pair.question):
        return "more than one question"
    if leaks(pair):
        return "speaks of the caption"
    if copied(pair.answer, caption):
        return "answer copied from the caption"
    return None


class NearDuplicates:
    """The pairs kept so far: does a new one ask the same image nearly the same, or say nearly the same of any?

    An image's earlier questions are those of the rows just before; rows of one image are expected together.
    """

    def __init__(self) -> None:
        self._image = ""
        self._questions: list[frozenset[str]] = []
        self._kept: list[bytes] = []
        self._bands: list[dict[bytes, int]] = [{} for _ in range(BANDS)]

    def fault(self, pair: Pair, image: str) -> str | None:
        """Why the pair is a near-duplicate; None keeps it. `image` identifies its image."""
        if image != self._image:
            self._image, self._questions = image, []
        question = content_words(pair.question)
        if any(overlap(question, earlier) >= NEAR_DUPLICATE for earlier in self._questions):
            return "near-duplicate of a question about the same image"
        codes = _codes(question | content_words(pair.answer))
        keys = _band_keys(codes)
        candidates = {band[key] for band, key in zip(self._bands, keys, strict=True) if key in band}
        if any(self._overlap(codes, number) >= NEAR_DUPLICATE for number in candidates):
            return "near-duplicate of an earlier pair"
        self._questions.append(question)
        for band, key in zip(self._bands, keys, strict=True):
            band[key] = len(self._kept)
        self._kept.append(codes.tobytes())
        return None

    def _overlap(self, codes: NDArray[np.uint64], number: int) -> float:
        kept = np.frombuffer(self._kept[number], np.uint64)
        common = len(np.intersect1d(codes, kept, assume_unique=True))
        return common / (len(codes) + len(kept) - common)


@lru_cache(100_000)
def _code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def _codes(meaning: frozenset[str]) -> NDArray[np.uint64]:
    """Each word as a number, the same in every process."""
    return np.array([_code(word) for word in sorted(meaning)], np.uint64)


def _band_keys(codes: NDArray[np.uint64]) -> list[bytes]:
    """MinHash: for each band its smallest values under HASHES_PER_BAND hash functions (modulo 2^64, the upper half)."""
    hashed = (codes * _MULTIPLIERS + _ADDENDS) >> np.uint64(32)
    smallest = hashed.min(axis=1, initial=np.uint64(2**32)).astype(np.uint32)
    return [band.tobytes() for band in smallest.reshape(BANDS, HASHES_PER_BAND)]

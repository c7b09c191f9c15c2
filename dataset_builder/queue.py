"""The text queue: up to 30 texts related to a row's image, the anchors of the paper's semantic loss (section 3.2).

"From its corresponding caption or by retrieving from an existing knowledge base": a training image that has a caption
gives the caption, its sentences, phrases and n-grams; the rest is filled by BM25. The knowledge base holds training
texts only, sentences of captions and, for a source without captions, questions with their answers; a row never
retrieves what is said of its own image, because there the answer stands in other words. Rows outside the training
split get only retrieved texts, so their own captions enter no queue. Texts are sentences rather than whole captions:
the model encodes a queue text to the length of a question.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import bm25s

from .schema import Row

STOP_WORDS = {  # they start and end no phrase and count nothing for BM25; the last line says nothing about an image
    *("a", "an", "and", "are", "as", "at", "by", "for", "from", "how", "in", "is", "it", "its", "of", "on", "or"),
    *("than", "that", "the", "there", "this", "to", "what", "where", "which", "with"),
    *("about", "all", "finding", "findings", "image", "less", "picture", "places", "shown", "shows"),
}
ORGAN_WORDS = {  # VQA-RAD's codes for body parts, in the words of captions
    "HEAD": "head brain",
    "CHEST": "chest lungs heart",
    "ABD": "abdomen liver kidney bowel",
}
MARGIN = 100  # texts retrieved beyond the queue's size, because some are of the row's own image or in its caption


@dataclass(frozen=True)
class QueueOptions:
    """How many texts a row gets, and how many of them at most from its own caption."""

    size: int = 30
    from_caption: int = 15


@dataclass(frozen=True)
class Entry:
    """One text to retrieve, with the groups (images) of which it is said."""

    text: str
    groups: set[str]


class KnowledgeBase:
    """Texts to retrieve from, by BM25. Texts that differ in letter case or numbers only are one entry."""

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        """`texts` are (text, group) pairs; an entry keeps the wording that came first."""
        entries: dict[str, Entry] = {}
        for text, group in texts:
            entries.setdefault(_folded(text), Entry(text, set())).groups.add(group)
        self.entries = list(entries.values())
        self._index = bm25s.BM25()
        if self.entries:
            self._index.index([_content_words(entry.text) for entry in self.entries], show_progress=False)

    def nearest(self, queries: Sequence[str], count: int) -> list[list[Entry]]:
        """For each query the `count` best entries, best first, none that shares no word with it."""
        if not self.entries or not queries:
            return [[] for _ in queries]
        found, scores = self._index.retrieve(
            [_content_words(query) for query in queries],
            k=min(count, len(self.entries)),
            show_progress=False,
            backend_selection="numpy",  # numba, where it is installed, breaks ties differently
        )
        return [
            [self.entries[n] for n, score in zip(row, row_scores, strict=True) if score > 0]
            for row, row_scores in zip(found, scores, strict=True)
        ]


def _content_words(text: str) -> list[str]:
    """Lower-case words as BM25 compares them."""
    return [word.lower() for word in _words(text) if _is_content(word)]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w-]+|%", text)


def _is_content(word: str) -> bool:
    return any(map(str.isalpha, word)) and word.lower() not in STOP_WORDS


def knowledge_texts(rows: Iterable[Row]) -> Iterator[tuple[str, str]]:
    """The (text, group) pairs that training `rows` give: caption sentences, or question and answer without a
    caption.
    """
    for row in rows:
        if row["caption"]:
            yield from ((sentence, row["group"]) for sentence in sentences(row["caption"]))
        else:
            yield f"{row['question']} {row['answer']}", row["group"]


def fill_queues(rows: Sequence[Row], training_ids: set[str], options: QueueOptions) -> None:
    """Set `queue` of every row. `training_ids` are the ids of the rows that may be trained on.

    A queue has at most `options.size` texts, in a fixed order, none empty, none twice, none equal to the row's answer
    (letter case and a final full stop aside).
    """
    knowledge = KnowledgeBase(knowledge_texts(row for row in rows if row["id"] in training_ids))
    queries = [query(row, trained=row["id"] in training_ids) for row in rows]
    unique = list(dict.fromkeys(queries))
    retrieved = dict(zip(unique, knowledge.nearest(unique, options.size + MARGIN), strict=True))
    own_texts: dict[str, list[str]] = {}
    for row, asked in zip(rows, queries, strict=True):
        own: list[str] = []
        if row["caption"] and row["id"] in training_ids:
            own = own_texts.setdefault(row["caption"], caption_texts(row["caption"]))
        others = [entry.text for entry in retrieved[asked] if row["group"] not in entry.groups]
        row["queue"] = queue_of(row["answer"], own, others, options)


def query(row: Row, trained: bool) -> str:
    """What a row searches for: its question, with its caption (training rows only) or its modality and organ."""
    if trained and row["caption"]:
        return f"{row['question']} {row['caption']}"
    organ = row["organ"] or ""
    return f"{row['question']} {row['modality'] or ''} {ORGAN_WORDS.get(organ, organ.replace('_', ' '))}"


def queue_of(answer: str, own: Sequence[str], others: Sequence[str], options: QueueOptions) -> list[str]:
    """The caption's texts, then the retrieved ones, without the answer and without repetitions.

    Texts that differ in numbers only ("about 12 %", "about 13 %") count as one: as anchors they would be one too.
    """
    seen = {_folded(answer), ""}
    queue: list[str] = []
    for text, limit in [(text, options.from_caption) for text in own] + [(text, options.size) for text in others]:
        folded = _folded(text)
        if folded not in seen and len(queue) < min(limit, options.size):
            seen.add(folded)
            queue.append(text)
    return queue


@functools.cache
def _folded(text: str) -> str:
    """What two texts have in common that count as one."""
    return re.sub(r"\b\d+\b", "0", text.casefold().strip().rstrip(".").rstrip())


def caption_texts(caption: str) -> list[str]:
    """The texts that a caption gives, whole first: caption, sentences, phrases, then n-grams of 3, 2 and 1 words."""
    parts = sentences(caption)
    phrases = [phrase for part in parts for phrase in split_phrases(part)]
    grams = [gram for n in (3, 2, 1) for phrase in phrases for gram in n_grams(phrase, n)]
    return list(dict.fromkeys([caption, *parts, *phrases, *grams]))


def sentences(caption: str) -> list[str]:
    """The caption cut after full stops, question marks and exclamation marks that end a word."""
    return [part for part in re.split(r"(?<=[.?!])\s+", caption.strip()) if part]


def split_phrases(sentence: str) -> list[str]:
    """The pieces of a sentence between commas, verbs of being and "and", without stop words at their ends."""
    pieces = re.split(r",|\b(?:and|is|are|shows)\b", sentence.rstrip(".?!"))
    return [phrase for phrase in (_trimmed(_words(piece)) for piece in pieces) if phrase]


def _trimmed(words: list[str]) -> str:
    """The words joined, without stop words and numbers at either end."""
    kept = [n for n, word in enumerate(words) if _is_content(word)]
    return " ".join(words[kept[0] : kept[-1] + 1]) if kept else ""


def n_grams(phrase: str, n: int) -> list[str]:
    """Runs of `n` words of a phrase that start and end with a word that is neither a stop word nor a number."""
    words = phrase.split()
    runs = [words[start : start + n] for start in range(len(words) - n + 1)]
    return [" ".join(run) for run in runs if _is_content(run[0]) and _is_content(run[-1])]

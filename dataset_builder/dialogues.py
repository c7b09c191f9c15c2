"""Short dialogues out of single questions (paper section 2).

A source's own turns stay as they are. Of the others, a share gets the questions that stand before it about the same
image as earlier turns, in their order: the model then also learns to answer when something has been said already.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from .schema import Row

MAX_TURNS = 3  # questions of a dialogue, the row's own included


def join_dialogues(rows: Iterable[Row], share: float) -> list[Row]:
    """The rows, the share of them that have an earlier question about their image with it in `history`.

    Which rows, and how many turns (2 or 3), follows from their ids alone. No row is lost: a question that becomes an
    earlier turn stays a row of its own. A row that would hear its own answer, or its own question, stays as it is.
    """
    joined = []
    earlier: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        draw = int(hashlib.sha256(row["id"].encode()).hexdigest()[:8], 16)
        same_image = earlier[row["image_sha256"], row["language"]]
        turns = same_image[-(1 + draw % (MAX_TURNS - 1)) :]
        same_image.append(row)
        said = {row["answer"].casefold(), row["question"].casefold()}
        heard = {turn[field].casefold() for turn in turns for field in ("question", "answer")}
        if turns and not row["history"] and draw / 2**32 < share and not said & heard:
            row = {**row, "history": [message for turn in turns for message in _messages(turn)]}
        joined.append(row)
    return joined


def _messages(row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]

"""Question-answer pairs about an image and its caption, written by a vision-language model (the paper's section 2).

Two steps over the same rows. `ask` sends what is not yet recorded; `generated_rows` makes rows out of what is. The
second step is a function of rows and record alone, so the order in which answers came changes nothing, and a rebuild
from the same record gives the same rows, with the time at which each reply was recorded. Both rest on `recorded`: what
the record says of a row. A reply is found by the hash of what it answers (model, prompt, caption, the image's sha256),
so rows with the same image and caption share one.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from .generate_checks import NearDuplicates, answerable_blind, own_fault
from .generate_endpoint import Model, Request, Sender, read_body
from .generate_journal import GenerateError, Journal
from .generate_prompt import (
    BLIND_PROMPT_SHA256,
    PROMPT_SHA256,
    RESPONSE_FORMAT,
    Pair,
    UnusableReplyError,
    blind_messages,
    first_messages,
    parse_pairs,
    repair_messages,
)
from .images import BadImageError
from .schema import Row, new_row

Rejected: TypeAlias = Callable[[dict[str, Any]], None]  # takes {id, reason, and question and answer of a pair}

REPLY_TOKENS = {"generate": 180, "repair": 180, "blind": 25}  # of output, about
REASONS = 10  # printed at most
CARRIED = (
    *("image", "image_id", "image_sha256", "image_phash", "organ", "modality", "language", "caption"),
    *("source", "source_split", "license", "group", "filter_score"),
)


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate. `blind` is a text-only model that is asked each question without the image, or None; `budget`
    in dollars over all that the journal records, `timeout` and `first_wait` (before the first retry) in seconds.
    """

    model: Model
    blind: Model | None = None
    concurrency: int = 16
    budget: float | None = None
    timeout: float = 120.0
    first_wait: float = 0.5


@dataclass(frozen=True)
class Recorded:
    """What the journal knows of a row: a usable reply's line and pairs, and why the replies before it are unusable."""

    line: dict[str, Any] | None
    pairs: list[Pair]
    faults: list[UnusableReplyError]

    @property
    def failed(self) -> bool:
        """Whether the repair failed too."""
        return len(self.faults) == 2


def _hash(*texts: str) -> str:
    """32 hexadecimal digits that stand for these texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def pairs_key(row: Row, model: Model) -> str:
    """Identifies the request for a row's pairs."""
    return _hash("generate", model.name, PROMPT_SHA256, row["caption"], row["image_sha256"])


def repair_key(key: str) -> str:
    """Identifies the repair of the reply to request `key`."""
    return _hash("repair", key)


def blind_key(question: str, model: Model) -> str:
    """Identifies the request for a guess."""
    return _hash("blind", model.name, BLIND_PROMPT_SHA256, question)


def recorded(row: Row, model: Model, journal: Journal) -> Recorded:
    """The row's usable reply, the first or its repair."""
    key, faults = pairs_key(row, model), list[UnusableReplyError]()
    for line in (journal.reply(key), journal.reply(repair_key(key))):
        if line is None:
            break
        try:
            return Recorded(line, parse_pairs(read_body(line["body"]).content), faults)
        except UnusableReplyError as fault:
            faults.append(fault)
    return Recorded(None, [], faults)


def next_request(row: Row, options: GenerateOptions, journal: Journal) -> Request | None:
    """What is still to be asked for a row; None if nothing is. BadImageError if its image cannot be sent."""
    if not row["caption"]:
        return None
    found = recorded(row, options.model, journal)
    if found.line is None:
        return None if found.failed else _pairs_request(row, options.model, journal, found.faults)
    for pair in found.pairs:
        if options.blind is None or own_fault(pair, row["caption"]) is not None:
            continue
        key = blind_key(pair.question, options.blind)
        if journal.reply(key) is None:
            messages = blind_messages(pair.question)
            return Request(key, "blind", row["id"], options.blind, BLIND_PROMPT_SHA256, messages)
    return None


def _pairs_request(row: Row, model: Model, journal: Journal, faults: list[UnusableReplyError]) -> Request:
    key, kind = pairs_key(row, model), "generate"
    messages = first_messages(row["caption"], row["image"]["bytes"])
    if faults:
        unusable = journal.reply(key)
        assert unusable is not None
        messages = repair_messages(messages, read_body(unusable["body"]).content, faults[0])
        key, kind = repair_key(key), "repair"
    return Request(key, kind, row["id"], model, PROMPT_SHA256, messages, RESPONSE_FORMAT)


def ask(rows: Iterable[Row], options: GenerateOptions, journal: Journal) -> list[str]:
    """Send all that is not yet recorded, at most `options.concurrency` requests at once, and record the answers.

    It ends early when the budget does not allow another request. Returns, in lines for a person, what came to nothing
    this time; the same call again asks for that again. GenerateError where going on is of no use (a wrong key or model,
    an endpoint that does not answer), after the requests under way have ended and are recorded.
    """
    if options.budget is not None and journal.unpriced:
        raise GenerateError(
            f"{journal.path}: {journal.unpriced} replies are recorded without a price, so a budget cannot be kept"
        )
    return asyncio.run(_ask(rows, options, journal))


async def _ask(rows: Iterable[Row], options: GenerateOptions, journal: Journal) -> list[str]:
    models = [options.model] if options.blind is None else [options.model, options.blind]
    sender = Sender(journal, models, options.budget, options.timeout, options.first_wait)
    unanswered: Counter[str] = Counter()
    under_way: dict[str, asyncio.Event] = {}
    left = iter(rows)  # shared: each row goes to one worker

    async def work() -> None:
        for row in left:
            if sender.stopped:
                return
            reason = await _finish(row, options, journal, sender, under_way)
            if reason is not None and not sender.stopped:
                unanswered[reason] += 1
            await asyncio.sleep(0)  # a long stretch of recorded rows must not hold up the others

    try:
        await asyncio.gather(*(work() for _ in range(options.concurrency)))
    finally:
        await sender.close()
    if sender.fatal is not None:
        raise sender.fatal
    notes = [f"{count} images without an answer: {reason}" for reason, count in unanswered.most_common(REASONS)]
    if sender.budget.exhausted:
        notes.append(f"stopped: no further request fits into the budget of ${options.budget}; a higher one goes on")
    return notes


async def _finish(
    row: Row, options: GenerateOptions, journal: Journal, sender: Sender, under_way: dict[str, asyncio.Event]
) -> str | None:
    """Ask all that a row needs, one thing after the other; why it could not be, or None."""
    while True:
        try:
            request = next_request(row, options, journal)
        except BadImageError as error:
            return f"image: {error}"
        if request is None:
            return None
        if request.key in under_way:  # for another row with the same image and caption, or the same question
            await under_way[request.key].wait()
            if journal.reply(request.key) is None:
                return "asked for another row, without an answer"
            continue
        under_way[request.key] = asyncio.Event()
        try:
            reason = await sender.send(request)
        finally:
            under_way.pop(request.key).set()
        if reason is not None:
            return reason


def generated_rows(
    rows: Iterable[Row], options: GenerateOptions, journal: Journal, kept: NearDuplicates, rejected: Rejected
) -> Iterator[Row]:
    """A row for each recorded pair that passes the checks; the others go to `rejected`, with the reason.

    `kept` holds the pairs kept so far, of other splits too. Of rows with the same image and caption the first has the
    reply's pairs. The id is the source row's with "-q1" to "-q3", the pair's
    place in the reply, so that a rejected pair renumbers none.
    """
    seen: set[str] = set()
    for row in rows:
        if not row["caption"]:
            rejected({"id": row["id"], "reason": "no caption"})
            continue
        key = pairs_key(row, options.model)
        if key in seen:
            rejected({"id": row["id"], "reason": "same image and caption as an earlier row"})
            continue
        seen.add(key)
        found = recorded(row, options.model, journal)
        if found.line is None:
            unusable = found.failed and f"unusable reply, and its repair too: {found.faults[-1]}"
            rejected({"id": row["id"], "reason": unusable or "no answer yet"})
            continue
        for number, pair in enumerate(found.pairs, 1):
            identity = f"{row['id']}-q{number}"
            reason = pair_fault(pair, row, options, journal, kept)
            if reason is None:
                yield _row(row, identity, pair, found.line)
            else:
                rejected({"id": identity, "reason": reason, **pair.model_dump()})


def pair_fault(pair: Pair, row: Row, options: GenerateOptions, journal: Journal, kept: NearDuplicates) -> str | None:
    """Why a pair is rejected, or None: then it is among `kept`."""
    fault = own_fault(pair, row["caption"])
    if fault is None and options.blind is not None:
        line = journal.reply(blind_key(pair.question, options.blind))
        if line is None:
            return "not yet asked without the image"
        if answerable_blind(pair.answer, read_body(line["body"]).content):
            return "answerable without the image"
    return fault or kept.fault(pair, row["image_sha256"])


def _row(row: Row, identity: str, pair: Pair, line: dict[str, Any]) -> Row:
    generator = {name: line[name] for name in ("model", "prompt_sha256", "created")}
    carried = {name: row[name] for name in CARRIED}
    return new_row(id=identity, question=pair.question, answer=pair.answer, generator=generator, **carried)


@dataclass
class Estimate:
    """What a run would ask: images with something left to ask, requests, tokens, dollars (None without a price)."""

    images: int = 0
    requests: int = 0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    usd: float | None = 0.0
    most_usd: float | None = 0.0

    def add(self, request: Request, journal: Journal) -> None:
        """Count a request: its tokens are the mean of what is recorded of its kind, else a guess."""
        done = journal.totals.get(request.kind)
        tokens = (request.input_tokens(bytes_per_token=4.0), REPLY_TOKENS[request.kind])
        if done is not None and done.replies:
            tokens = (round(done.input_tokens / done.replies), round(done.output_tokens / done.replies))
        self.requests += 1
        self.input_tokens += tokens[0]
        self.output_tokens += tokens[1]
        usd, most = request.model.usd(*tokens), request.most_usd
        self.usd = None if usd is None or self.usd is None else self.usd + usd
        self.most_usd = None if most is None or self.most_usd is None else self.most_usd + most


def estimate(rows: Iterable[Row], options: GenerateOptions, journal: Journal) -> Estimate:
    """What `ask` would send, without sending; repairs, of which there should be few, are left out.

    `most_usd` counts a token for each byte of text, and every reply as long as `max_tokens` allows.
    """
    total, seen = Estimate(), set()
    for row in rows:
        try:
            request = next_request(row, options, journal)
        except BadImageError:
            continue
        if request is None or request.key in seen:
            continue
        seen.add(request.key)
        total.images += 1
        total.add(request, journal)
        if options.blind is not None and request.kind != "blind":
            for number in range(3):  # a question of usual length for each pair
                messages = blind_messages("x" * 90)
                total.add(Request(str(number), "blind", row["id"], options.blind, "", messages), journal)
    return total

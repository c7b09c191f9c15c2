"""One request to an OpenAI-compatible endpoint: within the budget, retried, and recorded before it is used.

The client's own retries are off: they hide attempts, and an attempt that timed out may have been charged, so each one
is reserved in the budget and written to the journal by itself. A 429, a 5xx, a time-out and a lost connection are tried
again, after the wait that Retry-After asks for or one that doubles; a wrong key or model stops the whole run; any
other refusal is that request's own end. None of these is final: only answers are, and the next run asks again.
"""

import asyncio
import email.utils
import itertools
import json
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp
import openai

from .generate_journal import GenerateError, Journal
from .generate_prompt import Messages

RETRIES = 8
EARLY_RETRIES = 3  # before the first answer: a wrong address should not take minutes to tell
MAX_WAIT = 600.0  # seconds; where the server asks for more, the request waits for the next run
FAILURES_IN_A_ROW = 20  # requests that came to nothing, without an answer between them: the endpoint is not there
OVERHEAD = 200  # tokens, at most, that a server adds around the messages
NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


@dataclass(frozen=True)
class Model:
    """A model at an endpoint. The API key stands in an environment variable and nowhere else.

    `price` is (input, output) in dollars per million tokens, None if unknown; `image_tokens` the most input tokens that
    one image can count for.
    """

    name: str
    base_url: str | None = None  # None: OPENAI_BASE_URL, or OpenAI
    key_variable: str = "OPENAI_API_KEY"
    price: tuple[float, float] | None = None
    max_tokens: int = 1024
    image_tokens: int = 1445

    def client(self, timeout: float) -> openai.AsyncOpenAI:
        """A client for it. GenerateError where OpenAI itself is meant and there is no key; other servers need none.

        On aiohttp, because with 64 connections the default client takes half as much time again for its own pool.
        """
        key, url = os.environ.get(self.key_variable), self.base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not url:
            raise GenerateError(f"{self.key_variable} is not set; export it, or name another endpoint with --base-url")
        if url and not url.startswith(("http://", "https://")):
            raise GenerateError(
                f"the endpoint {url!r} should start with http:// or https://, and end with /v1 as a rule"
            )
        return openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=self.base_url,
            timeout=timeout,
            max_retries=0,
            http_client=openai.DefaultAioHttpClient(),
        )

    def usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """What so many tokens cost; None without a price. Discounts for cached input are not counted."""
        if self.price is None:
            return None
        return round((input_tokens * self.price[0] + output_tokens * self.price[1]) / 1e6, 9)


@dataclass(frozen=True)
class Request:
    """One thing to ask. `key` identifies it among all that was ever recorded, `row` says for which row it is asked."""

    key: str
    kind: str  # generate, repair or blind
    row: str
    model: Model
    prompt_sha256: str
    messages: Messages
    response_format: dict[str, Any] | None = None

    def input_tokens(self, bytes_per_token: float = 1.0) -> int:
        """Input tokens: at most, because no token is less than a byte of text; with 4, about right for English."""
        texts, images = 0, 0
        for message in self.messages:
            parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
            texts += sum(len(part["text"].encode()) for part in parts if "text" in part)
            images += sum("image_url" in part for part in parts)
        schema = len(json.dumps(self.response_format)) if self.response_format else 0
        return int((texts + schema + OVERHEAD) / bytes_per_token) + images * self.model.image_tokens

    @property
    def most_usd(self) -> float | None:
        """The most that it can cost."""
        return self.model.usd(self.input_tokens(), self.model.max_tokens)


@dataclass
class Budget:
    """Dollars that all requests together may cost; a request under way counts for the most that it can cost."""

    limit: float | None
    spent: float
    exhausted: bool = False
    _reserved: float = 0.0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def reserve(self, most: float) -> bool:
        """Set `most` dollars aside, waiting for requests under way while they could leave enough; False if not."""
        async with self._changed:
            while self.limit is not None and self.spent + self._reserved + most > self.limit:
                self.exhausted = self.exhausted or self._reserved == 0
                if self.exhausted:
                    self._changed.notify_all()
                    return False
                await self._changed.wait()
            self._reserved += most
            return True

    async def settle(self, most: float, usd: float) -> None:
        """A request for which `most` was set aside has ended and cost `usd`."""
        async with self._changed:
            self._reserved = max(0.0, self._reserved - most)
            self.spent += usd
            self._changed.notify_all()


class Sender:
    """Sends requests and records what comes back; many tasks may call it at once."""

    def __init__(
        self, journal: Journal, models: Iterable[Model], budget: float | None, timeout: float, first_wait: float
    ) -> None:
        """`budget` in dollars, `timeout` and `first_wait` in seconds; a wait doubles with each retry."""
        self.journal, self.budget, self.first_wait = journal, Budget(budget, journal.spent), first_wait
        self.fatal: GenerateError | None = None
        self._clients = {model: model.client(timeout) for model in models}
        self._dearest: dict[Model, float] = {}  # dollars of the dearest reply so far, should `image_tokens` be too low
        self._answers = self._failures = 0  # answers in all, and failures since the last of them

    @property
    def stopped(self) -> bool:
        """Whether no further request should be sent."""
        return self.budget.exhausted or self.fatal is not None

    async def send(self, request: Request) -> str | None:
        """Send until there is an answer and it is recorded; else why there is none."""
        reason = None
        for attempt in itertools.count():
            most = max(request.most_usd or 0.0, self._dearest.get(request.model, 0.0))
            if self.fatal is not None or not await self.budget.reserve(most):
                return reason or "not asked: the run stopped before"
            wait, reason = await self._attempt(request, most, attempt)
            if reason is None:
                self._answers, self._failures = self._answers + 1, 0
                return None
            if wait is None or attempt >= (RETRIES if self._answers else EARLY_RETRIES):
                break
            await asyncio.sleep(wait)
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW and self.fatal is None:
            self.fatal = GenerateError(f"{self._failures} requests in a row came to nothing, the last one: {reason}")
        return reason

    async def _attempt(self, request: Request, most: float, attempt: int) -> tuple[float | None, str | None]:
        """Send once: (seconds until a retry is of use or None, why there is no answer or None)."""
        identity = (request.key, request.kind, request.row)
        priced = request.model.price is not None
        self.journal.sent(*identity, most if priced else None)
        usd = most
        try:
            body = await self._post(request)
            usd = await self._record(request, body, most)
        except openai.APIError as error:
            usd = most if _maybe_charged(error) else 0.0
            reason = self.journal.without_secrets(_reason(error))
            self.journal.failed(*identity, reason, usd if priced else None)
            self._check_fatal(error, reason)
            return self._wait(error, attempt), reason
        finally:
            await self.budget.settle(most, usd)
        return None, None

    async def _post(self, request: Request) -> str:
        """The body of the server's answer, as it came."""
        model = request.model
        body = {"model": model.name, "messages": request.messages, "max_completion_tokens": model.max_tokens}
        if request.response_format is not None:
            body["response_format"] = request.response_format
        # not chat.completions.create: it walks through the whole request by its types, 2 ms of CPU each time
        try:
            return await self._clients[model].post("/chat/completions", cast_to=str, body=body)
        except aiohttp.ClientError as error:  # what the client lets through, such as an answer that is not HTTP
            raise openai.APIConnectionError(message=str(error), request=cast(Any, None)) from error

    async def _record(self, request: Request, body: str, most: float) -> float:
        """Write an answer to the journal and return what it cost; without a token count, the most that it can cost."""
        model = request.model
        try:
            answer = read_body(body)
        except ValueError as error:  # a proxy's page, or an error under status 200: as good as no answer
            raise openai.APIConnectionError(message=str(error), request=cast(Any, None)) from error
        usd = None if model.price is None else most
        if answer.input_tokens is not None and answer.output_tokens is not None:
            usd = model.usd(answer.input_tokens, answer.output_tokens)
        self._dearest[model] = max(self._dearest.get(model, 0.0), usd or 0.0)
        await self.journal.answered(
            *(request.key, request.kind, request.row),
            model=answer.model or model.name,
            prompt_sha256=request.prompt_sha256,
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
            usd=usd,
            body=body,
        )
        return usd or 0.0

    def _wait(self, error: openai.APIError, attempt: int) -> float | None:
        """Seconds to wait before the next try; None where trying again is of no use."""
        if isinstance(error, openai.APIStatusError):
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                return None
            asked = retry_after(error.response.headers)
            if asked:  # a little later, and not all at the same moment
                return asked * random.uniform(1.0, 1.1) if asked <= MAX_WAIT else None
        return float(min(60.0, self.first_wait * 2**attempt) * random.uniform(0.75, 1.25))

    def _check_fatal(self, error: openai.APIError, reason: str) -> None:
        wrong = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        if isinstance(error, wrong) or error.code == "insufficient_quota":
            self.fatal = self.fatal or GenerateError(f"the endpoint refused: {reason}")

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()


@dataclass(frozen=True)
class Answer:
    """What stands in a server's body: the model's text ("" without one), its full name, the token counts."""

    content: str
    model: str | None
    input_tokens: int | None
    output_tokens: int | None


def read_body(body: str) -> Answer:
    """Read a chat completion; ValueError for a body that is none."""
    try:
        completion = json.loads(body)
        message = completion["choices"][0]["message"]
        content = message.get("content") or message.get("refusal") or ""
        usage = completion.get("usage") or {}
        tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {body[:300]!r}") from error
    counts = [count if isinstance(count, int) else None for count in tokens]
    return Answer(content, completion.get("model"), *counts)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (`retry-after-ms`, or `retry-after` in seconds or as a date); None if it
    does not say.
    """
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "")
        if value.replace(".", "", 1).isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _maybe_charged(error: openai.APIError) -> bool:
    """Whether the server may have answered, and charged, though no answer came: a time-out, or a connection lost after
    the request was sent.
    """
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 502, 504)
    causes = error.__cause__, getattr(error.__cause__, "__cause__", None)
    return not any(isinstance(cause, NEVER_SENT) for cause in causes)


def _reason(error: openai.APIError) -> str:
    status = f"HTTP {error.status_code}: " if isinstance(error, openai.APIStatusError) else ""
    return " ".join(f"{status}{error.message}".split())[:500]

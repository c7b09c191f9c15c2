"""Calls to the Hugging Face Hub that are tried again while they fail for a reason that passes.

huggingface_hub retries uploads of files itself, but not the making of a repo, the check of a card and the commit.
"""

import json
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds
TRANSIENT = {408, 429, 500, 502, 503, 504}

T = TypeVar("T")


def with_retries(call: Callable[[], T]) -> T:
    """`call()`, again after each of WAITS (longer where the Hub asks for it) while it fails for a reason that
    passes."""
    for wait in WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(max(wait, float(asked) if asked.isdigit() else 0))
        except (HTTPError, json.JSONDecodeError):  # no connection; or, checking a card, a proxy's error page
            time.sleep(wait)
    return call()


def reason(error: BaseException) -> str:
    """One line: the Hub's own words, with the status."""
    if isinstance(error, RuntimeError) and error.__cause__:
        return f"{error} {reason(error.__cause__)}"
    if isinstance(error, HfHubHTTPError):
        words = (error.server_message or error.response.reason_phrase).splitlines()
        return f"{error.response.status_code}, {words[0] if words else 'without a word'}"
    return " ".join(str(error).split()) or type(error).__name__

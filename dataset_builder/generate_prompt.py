"""What the generator is asked and what it must answer: the paper's prompt (section 2), the JSON schema, the parser.

The prompt is the paper's word for word but for its format line: `["question": "xxx", "answer": "xxx", ...]` is no JSON,
and strict structured output wants an object at the root. The instructions are the system message, caption and image the
user's. A reply's key in the record is a hash of these texts (see `generate`), so changing a letter of PROMPT asks every
image again, and pays for it again.
"""

import base64
import hashlib
from io import BytesIO
from typing import Annotated, Any, TypeAlias

from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from .images import FORMATS, BadImageError, decode

Messages: TypeAlias = list[dict[str, Any]]

PROMPT = """\
You are an AI assistant specialized in biomedical topics. Generate 2-3 clinically meaningful open-ended \
question-and-answer pairs based on the provided medical image and caption.
Requirements:
- Each question must be a single, clear sentence; each answer should directly address it.
- Cover overall understanding and specific details, without copying the caption.
- Answers must require examining the image, not just medical background knowledge.
- Ensure clinical relevance, professionalism, and conciseness.
- Format: {"pairs": [{"question": "xxx", "answer": "xxx"}, ...]}"""
REPAIR = "Your reply cannot be used: {error}. Reply again with nothing but the JSON, with 2 or 3 pairs."
BLIND_PROMPT = """\
You are an AI assistant specialized in biomedical topics. The question is about a medical image that you cannot see. \
Give your best guess of the answer in one short sentence, or say "unknown"."""
PROMPT_SHA256, BLIND_PROMPT_SHA256 = (hashlib.sha256(text.encode()).hexdigest() for text in (PROMPT, BLIND_PROMPT))

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # what every endpoint reads; the other FORMATS are sent as PNG
MAX_SIDE = 2048  # pixels; GPT-4o scales larger images down to this itself


class UnusableReplyError(ValueError):
    """A reply that is not 2 or 3 pairs in the schema; the message is what a repair attempt shows the model."""


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    if not text:
        raise ValueError("is empty")
    return text


class Pair(BaseModel, extra="forbid"):
    """A question about the image and its answer, each one line and not empty."""

    question: Annotated[str, AfterValidator(_one_line)]
    answer: Annotated[str, AfterValidator(_one_line)]


class Reply(BaseModel, extra="forbid"):
    """The whole reply."""

    pairs: Annotated[list[Pair], Field(min_length=2, max_length=3)]


RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "pairs", "strict": True, "schema": Reply.model_json_schema()},
}


def parse_pairs(content: str) -> list[Pair]:
    """The pairs of a reply; UnusableReplyError for anything that is not exactly the schema's JSON."""
    try:
        return Reply.model_validate_json(content).pairs
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'reply'}: {e['msg']}" for e in error.errors()]
        raise UnusableReplyError("; ".join(faults)) from error


def first_messages(caption: str, image: bytes) -> Messages:
    """The request for an image's pairs. BadImageError if `image` cannot be read."""
    text = {"type": "text", "text": f"caption: {caption}"}
    picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
    return [{"role": "system", "content": PROMPT}, {"role": "user", "content": [text, picture]}]


def repair_messages(first: Messages, reply: str, error: UnusableReplyError) -> Messages:
    """The one more try, after a reply that could not be used."""
    return [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": REPAIR.format(error=error)}]


def blind_messages(question: str) -> Messages:
    """The question alone, for a model that does not get the image."""
    return [{"role": "system", "content": BLIND_PROMPT}, {"role": "user", "content": question}]


def data_url(data: bytes) -> str:
    """An image file as a data URL: as it is where every endpoint reads its format, else as PNG."""
    try:
        header = Image.open(BytesIO(data), formats=FORMATS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(str(error)) from error
    name = header.format or ""
    if name not in SENT_AS_THEY_ARE or max(header.size) > MAX_SIDE:
        name, data = "PNG", _as_png(decode(data))
    return f"data:{Image.MIME[name]};base64,{base64.b64encode(data).decode()}"


def _as_png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(stream, "PNG")
    return stream.getvalue()

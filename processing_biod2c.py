"""Question, image and text queue to BioD2C's inputs: the prompt's tokens, and beside them the question's own.

Unusual here: the question goes in twice. The language model reads it inside the prompt ("<image>Question: … Answer:"),
and the fusion decoder reads it alone (paper section 3.1), as `question_input_ids`, padded or cut to Q tokens on the
right. The chat template is the only place where the prompt's form is written; a plain question goes through it as well.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from .image_processing_biod2c import BioD2CImageProcessor

# {% generation %} marks what a model learns: every answer and its end token
CHAT_TEMPLATE = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
  {%- if message['role'] == 'assistant' -%}
    {{- ' Answer:' -}}
    {%- generation -%}
      {{- ' ' -}}{%- for part in parts -%}{{- part['text'] -}}{%- endfor -%}{{- eos_token -}}
    {%- endgeneration -%}
  {%- else -%}
    {%- for part in parts if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {{- 'Question: ' if message['role'] == 'user' else '' -}}
    {%- for part in parts if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {{- '\n' if message['role'] == 'system' else '' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' Answer:' -}}{%- endif -%}
"""
# the same with the image before the BOS token, as the authors' code joins them
AUTHORS_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{{- bos_token or '' -}}\n", "", 1).replace(
    "{{- '<image>' -}}{%- endfor -%}", "{{- '<image>' -}}{%- endfor -%}{{- bos_token if loop.first -}}", 1
)


class BioD2CProcessor(ProcessorMixin):
    """Tokenizer, image processor and the prompt of BioD2C.

    Args:
        image_processor: a `BioD2CImageProcessor`.
        tokenizer: the language model's; `<image>` is added to it where it is missing.
        num_visual_tokens: Q, placeholders an image and tokens a question.
        question_template: what the fusion decoder reads of a question: "{question}", or, as in the authors' code,
            "{bos}Question: {question} Answer:".
        chat_template: Jinja template of the prompt.
    """

    image_token = "<image>"
    text_kwargs = {"padding": True}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_visual_tokens: int = 32,
        question_template: str = "{question}",
        chat_template: str | None = None,
    ) -> None:
        if "{question}" not in question_template:
            raise ValueError(f'question_template={question_template!r}: must contain "{{question}}"')
        self.num_visual_tokens = num_visual_tokens
        self.question_template = question_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        tokenizer.add_special_tokens({"extra_special_tokens": [self.image_token]}, replace_extra_special_tokens=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # answers are written on the right; many tokenizers come with "right" saved
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        questions: str | list[str] | None = None,
        queue: list[Any] | None = None,
        image_index: list[int] | None = None,
        is_prompt: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for a batch of questions, padded on the left.

        Args:
            images: one image or a list (PIL, NumPy, tensor, path, URL).
            text: a question, or a whole prompt that contains `<image>`; or a list of these.
            questions: what the fusion decoder is asked; by default the question itself, or, of a whole prompt, what
                stands between its last "Question:" and "Answer:".
            queue: for each row a list of texts related to its image (None or empty: no queue); for one row, its list.
            image_index: for each row the image it asks, -1 for none; by default each row with an image has its own.
            is_prompt: `text` is whole prompts, BOS included, also where there is no `<image>`.
            kwargs: for the tokenizer and the image processor, such as `padding`, `return_tensors` (default "pt").

        Returns:
            input_ids, attention_mask [B, L]; pixel_values [I, 3, H, W]; question_input_ids, question_attention_mask
            [B, Q]; queue_input_ids, queue_attention_mask [B, k, Q] where a queue is given; image_index [B] where a row
            does not ask the image of its own number.

        Raises:
            ValueError: an empty question, an empty text in a queue, images and `<image>` that do not match, an image
                that cannot be read.
        """
        # BOS and EOS are the template's business
        kwargs = {"return_tensors": "pt", **kwargs, "add_special_tokens": False}
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        texts = [text] if isinstance(text, str) else list(text or [])
        self._check_questions(texts, "text")
        if image_index is not None and len(image_index) != len(texts):
            raise ValueError(f"image_index has {len(image_index)} rows, text has {len(texts)}")
        images = [] if images is None else make_flat_list_of_images(self.image_processor.fetch_images(images))
        whole = [is_prompt or self.image_token in t for t in texts]
        asks = [0 if images else -1] * len(texts) if image_index is None else image_index
        prompts = [
            (t if is_prompt else self._with_bos(t)) if is_whole else self._prompt(t, has_image=bool(image >= 0))
            for t, is_whole, image in zip(texts, whole, asks, strict=True)
        ]
        image_index = self._image_index(prompts, len(images), image_index)
        placeholders = [self.image_token * self.num_visual_tokens] * sum(
            prompt.count(self.image_token) for prompt in prompts
        )
        prompts, offsets = self.get_text_with_replacements(prompts, placeholders)
        data = dict(self.tokenizer(prompts, **merged["text_kwargs"]))
        self._check_special_mm_tokens(prompts, data, modalities=["image"])
        if merged["return_text_replacement_offsets"]:
            data["text_replacement_offsets"] = offsets
        if images:
            data.update(self.image_processor(images, **merged["images_kwargs"]))
            asked = [questions] if isinstance(questions, str) else questions
            asked = asked or [self._question_of(t) if whole[row] else t for row, t in enumerate(texts)]
            data.update(self._tokenize_questions(asked, len(texts)))
        if queue:
            data.update(self._tokenize_queues([queue] if isinstance(queue[0], str) else queue, len(texts)))
        if images and image_index != list(range(len(images))):
            data["image_index"] = image_index
        return BatchFeature(
            data, tensor_type=kwargs["return_tensors"], skip_tensor_conversion=self.skip_tensor_conversion
        )

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the text of a conversation's last user turn is the question that the image is asked."""
        if kwargs.get("tokenize"):
            batch = conversation if isinstance(conversation[0], (list, tuple)) else [conversation]
            kwargs["processor_kwargs"] = {
                "questions": [last_question(c) for c in batch],
                "is_prompt": True,
                **(kwargs.get("processor_kwargs") or {}),
            }
        return super().apply_chat_template(conversation, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # else the last call's padding and truncation would be saved as the tokenizer's own
            backend.no_padding()
            backend.no_truncation()
        for trace in ("is_local", "local_files_only"):  # and where it was loaded from
            self.tokenizer.init_kwargs.pop(trace, None)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, folder: Any, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        # transformers would look our image processor up among its own; and, without a config, ask on stdin whether to
        # run the folder's code to read one, although the tokenizer needs none
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", folder, config=PreTrainedConfig(), **kwargs)
        return [BioD2CImageProcessor.from_pretrained(folder, **kwargs), tokenizer]

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "pixel_values",
            "question_input_ids",
            "question_attention_mask",
            "queue_input_ids",
            "queue_attention_mask",
            "image_index",
        ]

    def _with_bos(self, text: str) -> str:
        bos = self.tokenizer.bos_token
        return text if bos is None or bos in text else bos + text

    def _prompt(self, question: str, has_image: bool) -> str:
        content = [{"type": "image"}] * has_image + [{"type": "text", "text": question}]
        return super().apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _image_index(self, prompts: list[str], num_images: int, image_index: list[int] | None) -> list[int]:
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if max(counts) > 1:
            row = counts.index(max(counts))
            raise ValueError(
                f"row {row} has {counts[row]} {self.image_token}: BioD2C answers about one image a question"
            )
        if image_index is None:
            if sum(counts) != num_images:
                raise ValueError(
                    f"{num_images} images for {sum(counts)} rows with {self.image_token}: give one image a row, or say "
                    "with image_index which row asks which image"
                )
            images = iter(range(num_images))
            return [next(images) if count else -1 for count in counts]
        image_index = [int(index) for index in image_index]
        if [index >= 0 for index in image_index] != [count == 1 for count in counts] or max(image_index) >= num_images:
            raise ValueError(
                f"image_index={image_index}: must name, for each of {len(prompts)} rows, one of {num_images} images "
                f"where the row has {self.image_token} and -1 where it has none"
            )
        return image_index

    def _question_of(self, text: str) -> str:
        """The question in a prompt of our form; of any other text, all but the placeholder and special tokens."""
        before, _, after = text.rpartition("Question:")[2].rpartition("Answer:")
        question = before or after
        for token in [self.image_token, *self.tokenizer.all_special_tokens]:
            question = question.replace(token, " ")
        return question.strip()

    def _check_questions(self, questions: list[str], name: str) -> None:
        if not questions:
            raise ValueError(f"{name} is empty: give a question")
        for row, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"{name}, row {row}: expected a question, got {question!r}")

    def _tokenize_questions(self, questions: list[str], num_rows: int) -> dict[str, Any]:
        self._check_questions(questions, "questions")
        if len(questions) != num_rows:
            raise ValueError(f"questions has {len(questions)} rows, text has {num_rows}")
        bos = self.tokenizer.bos_token or ""
        return self._to_length([self.question_template.format(question=q, bos=bos) for q in questions], "question")

    def _tokenize_queues(self, queues: list[list[str] | None], num_rows: int) -> dict[str, Any]:
        """[B, k, Q]; the k of the longest queue, absent texts masked whole."""
        if len(queues) != num_rows:
            raise ValueError(f"queue has {len(queues)} rows, text has {num_rows}")
        rows = [list(row or []) for row in queues]
        for number, row in enumerate(rows):
            if isinstance(queues[number], str):
                raise ValueError(f"queue, row {number}: expected a list of texts, got {queues[number]!r}")
            for position, text in enumerate(row):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(
                        f"queue, row {number}, text {position}: expected a text, got {text!r}; leave it out"
                    )
        longest = max(len(row) for row in rows)
        if longest == 0:
            return {}
        flat = self._to_length([text for row in rows for text in row + [""] * (longest - len(row))], "queue")
        grouped = {}
        for name, values in flat.items():
            grouped[name] = [values[start : start + longest] for start in range(0, len(values), longest)]
        return grouped

    def _to_length(self, texts: list[str], name: str) -> dict[str, list[list[int]]]:
        """Token ids padded on the right or cut to Q, with their mask."""
        number = {text: position for position, text in enumerate(dict.fromkeys(texts))}  # rows of one image share texts
        encoded = self.tokenizer(
            list(number),
            add_special_tokens=False,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.num_visual_tokens,
        )
        return {
            f"{name}_{field}": [encoded[field][number[text]] for text in texts]
            for field in ("input_ids", "attention_mask")
        }


def last_question(conversation: list[dict]) -> str:
    """The text of the last user turn.

    Raises:
        ValueError: if no user turn has text.
    """
    for message in reversed(conversation):
        if message["role"] == "user":
            content = message["content"]
            parts = [content] if isinstance(content, str) else [str(p["text"]) for p in content if p["type"] == "text"]
            if question := " ".join(parts).strip():
                return question
    raise ValueError("the conversation has no user turn with text: an image needs a question")


BioD2CProcessor.register_for_auto_class()

__all__ = ["BioD2CProcessor"]

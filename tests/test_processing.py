"""Prompt, question, queue and image tokens of a batch, written out; the chat template; one error for each misuse."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from biod2c import BioD2CImageProcessor, BioD2CProcessor
from biod2c.processing_biod2c import AUTHORS_CHAT_TEMPLATE, CHAT_TEMPLATE, last_question

Q = 8
IMAGE = "<image>" * Q


@pytest.fixture(scope="module")
def build(make_tokenizer):
    def make(bos_token="<s>", tokenizer=None, **kwargs):
        image_processor = BioD2CImageProcessor(size={"height": 64, "width": 64})
        return BioD2CProcessor(image_processor, tokenizer or make_tokenizer(bos_token), num_visual_tokens=Q, **kwargs)

    return make


@pytest.fixture(scope="module")
def image(make_image):
    return make_image()


def texts(processor, inputs, name="input_ids"):
    """Each row without its padding, as text."""
    mask = inputs[name.replace("input_ids", "attention_mask")]
    return [processor.tokenizer.decode(ids[kept.bool()]) for ids, kept in zip(inputs[name], mask, strict=True)]


def turn(role, *parts):
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


# ------------------------------------------------------------------------------------------------------------- prompts


def test_a_question(processor, image):
    inputs = processor(images=image, text="Where is the liver?")
    assert texts(processor, inputs) == [f"<s>{IMAGE}Question: Where is the liver? Answer:"]
    assert texts(processor, inputs, "question_input_ids")[0] in "Where is the liver?"
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "pixel_values",
        "question_input_ids",
        "question_attention_mask",
    }
    assert all(isinstance(value, torch.Tensor) for value in inputs.values())
    assert all(value.dtype == torch.int64 for key, value in inputs.items() if key != "pixel_values")


def test_input_names_and_image_token(processor):
    assert processor.model_input_names[:3] == ["input_ids", "attention_mask", "pixel_values"]
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert processor.tokenizer("<image>", add_special_tokens=False)["input_ids"] == [processor.image_token_id]


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_kinds_of_tensors(processor, image, return_tensors):
    inputs = processor(images=[image, image], text=["Where?", "Why is it?"], return_tensors=return_tensors)
    wanted = {"pt": torch.Tensor, "np": np.ndarray, None: list}[return_tensors]
    assert all(isinstance(value, wanted) for value in inputs.values())


def test_a_whole_prompt_stays_as_it_is(processor, image):
    prompt = "The scan: <image> Question: Is it left? Answer: yes</s>"
    inputs = processor(images=image, text=prompt)
    assert texts(processor, inputs) == ["<s>" + prompt.replace("<image>", IMAGE)]
    assert texts(processor, inputs, "question_input_ids") == ["Is it left?"]
    with_bos = processor(images=image, text="<s>" + prompt)
    assert torch.equal(with_bos["input_ids"], inputs["input_ids"])


def test_a_prompt_without_an_image(processor):
    question = processor(text="Is it left?")
    assert texts(processor, question) == ["<s>Question: Is it left? Answer:"]
    for prompt in ("<s>Question: Is it left? Answer: no", "no BOS and no form"):  # taken as it is
        assert texts(processor, processor(text=prompt, is_prompt=True)) == [prompt]


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("<image>Question: Is it left? Answer:", "Is it left?"),
        ("<image>Question: a? Answer: b</s>Question: and c? Answer:", "and c?"),
        ("<image>Question: a? Answer: b</s>", "a?"),
        ("<s><image>Is it left?", "Is it left?"),
        ("Is <image> left?</s>", "Is   left?"),
    ],
)
def test_the_question_in_a_prompt(processor, image, prompt, question):
    inputs = processor(images=image, text=prompt)
    assert texts(processor, inputs, "question_input_ids") == [question]


@pytest.mark.parametrize("question", ["Answer: yes or no", "Question: a or b", "{x} 5 % </p>"])
def test_a_plain_question_is_taken_whole(processor, image, question):
    """Also where it looks like a prompt or a template."""
    inputs = processor(images=image, text=question)
    wanted = processor.tokenizer(question, add_special_tokens=False)["input_ids"][:Q]
    assert inputs["question_input_ids"][0, : len(wanted)].tolist() == wanted
    assert f"Question: {question} Answer:" in texts(processor, inputs)[0]


def test_what_the_decoder_is_asked_can_be_said(processor, image):
    inputs = processor(images=[image, image], text=["Where?", "Why?"], questions=["left?", "right?"])
    assert texts(processor, inputs, "question_input_ids") == ["left?", "right?"]
    assert "Question: Where? Answer:" in texts(processor, inputs)[0]


def test_question_tokens_are_padded_or_cut(processor, image):
    long = "Where is the liver, and is it larger than it should be?"
    inputs = processor(images=[image, image], text=["Why?", long])
    ids, mask = inputs["question_input_ids"], inputs["question_attention_mask"]
    assert ids.shape == mask.shape == (2, Q)
    full = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Why?", long)]
    assert len(full[0]) < Q < len(full[1])
    assert ids[0].tolist() == full[0] + [processor.tokenizer.pad_token_id] * (Q - len(full[0]))
    assert mask[0].tolist() == [1] * len(full[0]) + [0] * (Q - len(full[0]))
    assert ids[1].tolist() == full[1][:Q]
    assert mask[1].tolist() == [1] * Q


def test_batches_are_padded_on_the_left(processor, image, build, make_tokenizer):
    """Whatever the tokenizer came with: answers are written on the right."""
    saved = make_tokenizer()
    saved.init_kwargs["padding_side"] = saved.padding_side = "right"
    for one in (processor, build(tokenizer=saved)):
        inputs = one(images=[image, image], text=["Why?", "Where is the liver?"])
        assert inputs["attention_mask"][0, 0] == 0
        assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
        assert inputs["input_ids"][0, 0] == one.tokenizer.pad_token_id
    right = processor(images=[image, image], text=["Why?", "Where is the liver?"], padding_side="right")
    assert right["attention_mask"][0, -1] == 0
    padded = processor(images=image, text="Why?", padding="max_length", max_length=50)
    assert padded["input_ids"].shape == (1, 50)
    assert padded["attention_mask"][0, -1] == 1
    assert texts(processor, processor(images=image, text="Why?")) == texts(processor, padded)


def test_a_batch_equals_its_rows(processor, make_image):
    questions = ["Why?", "Where is the liver?", "Is it left, or is it right"]
    images, queue = [make_image(seed) for seed in range(3)], [["a", "b c"], None, ["the liver"]]
    together = processor(images=images, text=questions, queue=queue)
    for row in range(3):
        single = processor(images=images[row], text=questions[row], queue=[queue[row]] if queue[row] else None)
        kept = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][kept], single["input_ids"][0])
        for name in ("question_input_ids", "question_attention_mask", "pixel_values"):
            assert torch.equal(together[name][row], single[name][0])
        if queue[row]:
            texts_ = len(queue[row])
            assert torch.equal(together["queue_input_ids"][row, :texts_], single["queue_input_ids"][0])


# -------------------------------------------------------------------------------------------------------------- queues


def test_queue_shapes(processor, image):
    queue = [["the liver", "left", "it is right"], None, ["a"], []]
    inputs = processor(images=[image] * 4, text=["Why?"] * 4, queue=queue)
    ids, mask = inputs["queue_input_ids"], inputs["queue_attention_mask"]
    assert ids.shape == mask.shape == (4, 3, Q)
    assert mask.any(-1).tolist() == [[True] * 3, [False] * 3, [True, False, False], [False] * 3]
    for row, members in enumerate(queue):
        for position, text in enumerate(members or []):
            wanted = processor.tokenizer(text, add_special_tokens=False)["input_ids"][:Q]
            assert ids[row, position][mask[row, position].bool()].tolist() == wanted
            assert mask[row, position].tolist() == sorted(mask[row, position].tolist(), reverse=True)  # on the right


def test_queue_of_one_row(processor, image):
    flat = processor(images=image, text="Why?", queue=["the liver", "left"])
    nested = processor(images=image, text="Why?", queue=[["the liver", "left"]])
    assert torch.equal(flat["queue_input_ids"], nested["queue_input_ids"])
    assert flat["queue_input_ids"].shape == (1, 2, Q)


@pytest.mark.parametrize("queue", [None, [], [[]], [None]])
def test_no_queue(processor, image, queue):
    assert not [name for name in processor(images=image, text="Why?", queue=queue) if name.startswith("queue")]


# -------------------------------------------------------------------------------------------------------------- images


def test_all_kinds_of_images(processor, image, tmp_path):
    image.save(tmp_path / "scan.png")
    wanted = processor(images=image, text="Why?")
    for kind in (
        str(tmp_path / "scan.png"),
        tmp_path / "scan.png",
        np.asarray(image),
        torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()),
        [image],
        [[tmp_path / "scan.png"]],
        np.asarray(image)[None],
    ):
        inputs = processor(images=kind, text="Why?")
        assert set(inputs) == set(wanted)
        assert all(torch.equal(inputs[name], wanted[name]) for name in wanted)


def test_grey_arrays_and_deep_png(processor, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    wanted = processor(images=Image.fromarray(grey), text="Why?")["pixel_values"]
    assert torch.equal(processor(images=grey, text="Why?")["pixel_values"], wanted)
    assert torch.equal(processor(images=tmp_path / "deep.png", text="Why?")["pixel_values"], wanted)
    message = turn("user", {"type": "image", "path": str(tmp_path / "deep.png")}, "Why?")
    by_chat = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    assert torch.equal(by_chat["pixel_values"], wanted)


@pytest.mark.parametrize("none", [None, []])
def test_no_images(processor, none):
    assert set(processor(images=none, text=["Why?", "Where?"])) == {"input_ids", "attention_mask"}


def test_image_index(processor, make_image):
    images = [make_image(0), make_image(1)]
    inputs = processor(images=images, text=["Why?", "Where?", "Is it?"], image_index=[1, -1, 1])
    assert inputs["image_index"].tolist() == [1, -1, 1]
    assert inputs["pixel_values"].shape[0] == 2
    assert [text.count("<image>") for text in texts(processor, inputs)] == [Q, 0, Q]
    assert inputs["question_input_ids"].shape == (3, Q)
    tensor = processor(images=images, text=["Why?", "Where?", "Is it?"], image_index=torch.tensor([1, -1, 1]))
    assert torch.equal(tensor["image_index"], inputs["image_index"])
    own = processor(images=images, text=["Why?", "Where?"], image_index=[0, 1])
    assert "image_index" not in own  # what every row does by itself is not said


def test_prompts_with_and_without_images(processor, make_image):
    prompts = [
        "Question: a? Answer:",
        "<image>Question: b? Answer:",
        "Question: c? Answer:",
        "<image>Question: d? Answer:",
    ]
    inputs = processor(images=[make_image(0), make_image(1)], text=prompts, is_prompt=True)
    assert inputs["image_index"].tolist() == [-1, 0, -1, 1]
    wanted = [prompt.replace("<image>", IMAGE) for prompt in prompts]
    assert texts(processor, inputs) == wanted


# -------------------------------------------------------------------------------------------------------------- errors


def test_misuse_is_named(processor, image, tmp_path):
    cut = tmp_path / "cut.png"
    image.save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    two = {"images": [image, image], "text": ["Why?", "Where?"]}
    for arguments, message in (
        ({"images": image, "text": ""}, "text, row 0: expected a question, got ''"),
        ({"images": [image] * 2, "text": ["Why?", "  "]}, "text, row 1: expected a question, got '  '"),
        ({"images": image, "text": [None]}, "text, row 0: expected a question, got None"),
        ({"images": image}, "text is empty"),
        ({"images": image, "text": []}, "text is empty"),
        ({"images": image, "text": "<image>Question:  Answer:"}, "questions, row 0: expected a question, got ''"),
        ({"text": "<image>Why?"}, "0 images for 1 rows with <image>"),
        ({"images": [image] * 3, "text": ["Why?", "Where?"]}, "3 images for 2 rows with <image>"),
        ({"images": image, "text": ["Why?", "Where?"]}, "1 images for 2 rows with <image>.*image_index"),
        ({"images": image, "text": "<image><image>Why?"}, "row 0 has 2 <image>"),
        ({"images": [image] * 2, "text": ["<image>a", "<image> b <image>"]}, "row 1 has 2 <image>"),
        ({**two, "image_index": [0]}, "image_index has 1 rows, text has 2"),
        ({**two, "image_index": [0, 2]}, r"image_index=\[0, 2\].* 2 rows, one of 2 images"),
        ({"text": ["Why?"], "image_index": [0]}, r"image_index=\[0\].* one of 0 images"),
        ({"images": image, "text": ["<image>a", "<image>b"], "image_index": [0, -1]}, r"image_index=\[0, -1\]"),
        ({**two, "questions": ["a?"]}, "questions has 1 rows, text has 2"),
        ({**two, "questions": ["a?", ""]}, "questions, row 1: expected a question, got ''"),
        ({**two, "queue": [["a"]]}, "queue has 1 rows, text has 2"),
        ({**two, "queue": ["a", "b"]}, "queue has 1 rows, text has 2"),
        ({**two, "queue": [["a"], ["b", ""]]}, "queue, row 1, text 1: expected a text, got ''"),
        ({**two, "queue": [["a"], ["b", None]]}, "queue, row 1, text 1: expected a text, got None"),
        ({**two, "queue": [["a"], "liver"]}, "queue, row 1: expected a list of texts, got 'liver'"),
        ({"images": image, "text": "Why?", "queue": ["a", " "]}, "queue, row 0, text 1: expected a text, got ' '"),
        ({"images": tmp_path / "no.png", "text": "Why?"}, "no.png: no such image file"),
        ({"images": cut, "text": "Why?"}, "cut.png: the image is damaged or cut off"),
        ({"images": [image, None], "text": ["a", "b"]}, "expected an image .* got NoneType"),
        ({"images": image, "text": "Why?", "truncation": True, "max_length": 5}, "image.* token count"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            processor(**arguments)
        assert len(str(error.value)) < 300


def test_a_template_without_a_question(build):
    with pytest.raises(ValueError, match=r"question_template='Why' *: must contain"):
        build(question_template="Why")


# ------------------------------------------------------------------------------------------------------- chat template

TALK = [
    turn("user", {"type": "image"}, "Is it left?"),
    turn("assistant", "Yes, it is."),
    turn("user", "And the liver?"),
    turn("assistant", "no"),
]


def test_chat_as_text(processor):
    wanted = "<s><image>Question: Is it left? Answer: Yes, it is.</s>Question: And the liver? Answer: no</s>"
    assert processor.apply_chat_template(TALK) == wanted
    asked = processor.apply_chat_template(TALK[:3], add_generation_prompt=True)
    assert asked == wanted.removesuffix(" no</s>")
    plain = [{"role": "user", "content": "Is it left?"}, {"role": "assistant", "content": "no"}]
    assert processor.apply_chat_template(plain) == "<s>Question: Is it left? Answer: no</s>"
    system = [turn("system", "Be brief."), *TALK[:1]]
    assert processor.apply_chat_template(system) == "<s>Be brief.\n<image>Question: Is it left?"


def test_a_chat_equals_the_question_it_asks(processor, image):
    """The same inputs as from the question itself, and the last user turn is what the decoder reads."""
    message = turn("user", {"type": "image", "image": image}, "Where is it?")
    by_chat = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    wanted = processor(images=image, text="Where is it?")
    assert set(by_chat) == set(wanted)
    assert all(torch.equal(by_chat[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("key", ["image", "url", "path", "base64"])
def test_images_in_messages(processor, image, tmp_path, key):
    import base64

    file = tmp_path / "scan.png"
    image.save(file)
    sources = {"image": image, "url": str(file), "path": file, "base64": base64.b64encode(file.read_bytes()).decode()}
    message = turn("user", {"type": "image", key: sources[key]}, "Why?")
    inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    assert torch.equal(inputs["pixel_values"], processor(images=image, text="Why?")["pixel_values"])
    file.write_bytes(file.read_bytes()[:2000])
    if key in ("url", "path"):
        with pytest.raises(ValueError, match=r"scan.png: the image is damaged or cut off"):
            processor.apply_chat_template([message], tokenize=True, return_dict=True)


def test_several_turns(processor, image):
    talk = [turn("user", {"type": "image", "image": image}, "Is it left?"), *TALK[1:3]]
    inputs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    wanted = "<s><image>Question: Is it left? Answer: Yes, it is.</s>Question: And the liver? Answer:"
    assert texts(processor, inputs) == [wanted.replace("<image>", IMAGE)]
    assert texts(processor, inputs, "question_input_ids") == ["And the liver?"]


def test_a_batch_of_chats_where_some_have_no_image(processor, make_image):
    chats = [
        [turn("user", "Why?"), turn("assistant", "so"), turn("user", "Is it left?")],
        [turn("user", {"type": "image", "image": make_image(0)}, "Where is the liver?")],
        [{"role": "user", "content": "Where?"}],
        [
            turn("user", {"type": "image", "image": make_image(1)}, "What?"),
            turn("assistant", "it"),
            turn("user", "Is it?"),
        ],
    ]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert texts(processor, inputs) == [
        "<s>Question: Why? Answer: so</s>Question: Is it left? Answer:",
        f"<s>{IMAGE}Question: Where is the liver? Answer:",
        "<s>Question: Where? Answer:",
        f"<s>{IMAGE}Question: What? Answer: it</s>Question: Is it? Answer:",
    ]
    assert inputs["image_index"].tolist() == [-1, 0, -1, 1]
    assert texts(processor, inputs, "question_input_ids")[3] == "Is it?"
    assert inputs["pixel_values"].shape[0] == 2
    without = processor.apply_chat_template(chats[2], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert set(without) == {"input_ids", "attention_mask"}
    assert texts(processor, without) == ["<s>Question: Where? Answer:"]


def test_a_queue_goes_with_a_chat(processor, image):
    message = turn("user", {"type": "image", "image": image}, "Why?")
    inputs = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, processor_kwargs={"queue": ["a", "the liver"]}
    )
    assert inputs["queue_input_ids"].shape == (1, 2, Q)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, AUTHORS_CHAT_TEMPLATE], ids=["ours", "the authors'"])
def test_assistant_masks_cover_the_answers_and_their_end(build, image, template):
    """What a model learns: each answer and EOS, not the prompt, the questions, the image or the padding."""
    processor = build(chat_template=template)
    talks = [
        [turn("user", {"type": "image", "image": image}, "Is it left?"), *TALK[1:]],
        [turn("user", "Why?"), TALK[3]],
    ]
    inputs = processor.apply_chat_template(
        talks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    learned = [
        processor.tokenizer.decode(torch.as_tensor(ids)[torch.as_tensor(mask).bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    ]
    assert learned == [" Yes, it is.</s> no</s>", " no</s>"]
    assert len(inputs["assistant_masks"][0]) == len(inputs["input_ids"][0])


def test_the_authors_prompt(build, image):
    """Their code joins image, BOS and question: "<image>" stands before BOS; their decoder reads the prompt."""
    assert AUTHORS_CHAT_TEMPLATE.count("bos_token") == CHAT_TEMPLATE.count("bos_token") == 1
    processor = build(chat_template=AUTHORS_CHAT_TEMPLATE, question_template="{bos}Question: {question} Answer:")
    inputs = processor(images=image, text="Is it?")
    assert texts(processor, inputs) == [f"{IMAGE}<s>Question: Is it? Answer:"]
    prompt = processor.tokenizer("<s>Question: Is it? Answer:", add_special_tokens=False)["input_ids"]
    assert inputs["question_input_ids"][0].tolist()[: len(prompt)] == prompt[:Q]
    assert inputs["input_ids"][0, Q:].tolist() == prompt
    assert texts(processor, processor(text="Is it?")) == ["<s>Question: Is it? Answer:"]
    talk = processor.apply_chat_template(TALK)
    assert talk == "<image><s>Question: Is it left? Answer: Yes, it is.</s>Question: And the liver? Answer: no</s>"
    system = processor.apply_chat_template([turn("system", "Be brief."), *TALK[:1]])
    assert system == "<s>Be brief.\n<image>Question: Is it left?"


def test_last_question():
    assert last_question(TALK) == "And the liver?"
    assert last_question([turn("user", {"type": "image"}, "a", "b?")]) == "a b?"
    assert last_question([turn("user", "first"), turn("user", {"type": "image"})]) == "first"
    assert last_question([{"role": "user", "content": "plain"}]) == "plain"
    for silent in ([], [turn("assistant", "x")], [turn("user", {"type": "image"})]):
        with pytest.raises(ValueError, match="no user turn with text"):
            last_question(silent)


@pytest.mark.parametrize("number", [3, 2.5, 0])
def test_a_number_as_text_is_read_as_it_is_printed(processor, number):
    """Answers of data sets are numbers now and then."""
    talk = [turn("user", {"type": "text", "text": "How many?"}), turn("assistant", {"type": "text", "text": number})]
    assert processor.apply_chat_template(talk) == f"<s>Question: How many? Answer: {number}</s>"
    asked = [turn("user", {"type": "text", "text": number})]
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True)
    assert texts(processor, inputs) == [f"<s>Question: {number}"]


# ---------------------------------------------------------------------------------------------------- other tokenizers


def test_a_tokenizer_without_bos(build, image):
    processor = build(bos_token=None)
    inputs = processor(images=image, text="Is it?")
    assert texts(processor, inputs) == [f"{IMAGE}Question: Is it? Answer:"]
    assert texts(processor, processor(text="Is it?")) == ["Question: Is it? Answer:"]
    authors = build(bos_token=None, chat_template=AUTHORS_CHAT_TEMPLATE, question_template="{bos}{question}")
    assert texts(authors, authors(images=image, text="Is it?")) == [f"{IMAGE}Question: Is it? Answer:"]
    assert texts(authors, authors(images=image, text="Is it?"), "question_input_ids") == ["Is it?"]
    chat = [turn("user", "Is it?")]
    encoded = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert texts(processor, encoded) == ["Question: Is it? Answer:"]


def test_a_tokenizer_without_pad(make_tokenizer, build, image):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    processor = build(tokenizer=tokenizer)
    inputs = processor(images=[image, image], text=["a", "Is it larger than it should be?"])
    assert tokenizer.pad_token == tokenizer.eos_token
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["question_attention_mask"][0, -1] == 0


def test_a_tokenizer_that_adds_bos_itself(make_tokenizer, build, image):
    """As LLaMA's does: the template's BOS stays the only one, and neither question nor queue gets one."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("left")["input_ids"][0] == 1
    processor = build(tokenizer=tokenizer)
    inputs = processor(images=image, text="Is it?", queue=["left"])
    assert (inputs["input_ids"] == 1).sum() == 1
    assert not (inputs["question_input_ids"] == 1).any()
    assert not (inputs["queue_input_ids"] == 1).any()


def test_a_tokenizer_with_other_special_tokens_keeps_them(make_tokenizer, build):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<organ>"]})
    processor = build(tokenizer=tokenizer)
    assert {"<organ>", "<image>"} <= set(processor.tokenizer.all_special_tokens)
    size = len(processor.tokenizer)
    assert len(build(tokenizer=processor.tokenizer).tokenizer) == size  # and `<image>` is added once


# ------------------------------------------------------------------------------------------------------- save and load


def test_save_and_load(build, image, tmp_path):
    processor = build(question_template="Q: {question}", chat_template=AUTHORS_CHAT_TEMPLATE)
    wanted = processor(images=[image, image], text=["Is it?", "Where is the liver?"], queue=[["a"], None])
    processor.save_pretrained(tmp_path / "one")
    again = BioD2CProcessor.from_pretrained(tmp_path / "one")
    assert (again.num_visual_tokens, again.question_template) == (Q, "Q: {question}")
    assert again.chat_template == AUTHORS_CHAT_TEMPLATE
    inputs = again(images=[image, image], text=["Is it?", "Where is the liver?"], queue=[["a"], None])
    assert set(inputs) == set(wanted)
    assert all(torch.equal(inputs[name], wanted[name]) for name in wanted)
    again.save_pretrained(tmp_path / "two")
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    backend = json.loads(one["tokenizer.json"])
    assert backend["padding"] is None  # that of the last call is not the tokenizer's
    assert backend["truncation"] is None


def test_loading_asks_nobody(tiny_checkpoint, monkeypatch):
    """A folder with code of its own makes transformers ask on stdin; this class needs none of it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.resolve_trust_remote_code", lambda *_, **__: pytest.fail("asked")
    )
    assert BioD2CProcessor.from_pretrained(tiny_checkpoint).num_visual_tokens == Q


def test_travels_to_a_data_loaders_worker(processor, image):
    again = pickle.loads(pickle.dumps(processor))
    inputs, wanted = (p(images=image, text="Is it?") for p in (again, processor))
    assert all(torch.equal(inputs[name], wanted[name]) for name in wanted)


def test_decoding(processor):
    ids = processor.tokenizer(["the liver</s>", "left"], add_special_tokens=False)["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["the liver", "left"]

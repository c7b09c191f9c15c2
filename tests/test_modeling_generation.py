"""`generate`: a padded batch answers as its rows do, however it is decoded, and each image is encoded once."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

QUESTIONS = ["Where?", "Where is the liver, and is it larger than it should be?", "Is it left"]
GREEDY = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}


@pytest.fixture
def lively(make_model):
    """A tiny model whose answers depend on image, question and position: larger weights than a fresh model has."""

    def make(**fields):
        model = make_model(**fields)
        with torch.no_grad():
            for parameter in model.language_model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(12)
            for name, parameter in model.fusion.named_parameters():
                if "linear2.weight" in name or name == "gate.beta":
                    parameter.mul_(5)
        return model

    return make


@pytest.fixture(scope="module")
def images(make_image):
    return [make_image(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def batch(processor, images):
    return dict(processor(images=images, text=QUESTIONS))


@pytest.fixture(scope="module")
def singles(processor, images):
    return [dict(processor(images=i, text=q)) for i, q in zip(images, QUESTIONS, strict=True)]


def answers(model, inputs, **settings):
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def greedy_by_hand(model, inputs, steps=6):
    """Argmax of a whole forward pass for each token: no cache, no `generate`."""
    inputs, tokens = dict(inputs), []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**inputs).logits[:, -1].clone()
        logits[:, [model.config.image_token_id, model.generation_config.eos_token_id]] = -torch.inf
        tokens.append(logits.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens[-1])], 1)
    return torch.cat(tokens, 1).tolist()


DECODINGS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("fields", [{}, {"use_fusion": False}], ids=["fused", "w/o fm"])
def test_batch_equals_single(lively, batch, singles, decoding, fields):
    model, settings = lively(**fields), {**GREEDY, **DECODINGS[decoding]}
    wanted = greedy_by_hand(model, batch)
    assert wanted[0] != wanted[1] != wanted[2]
    assert wanted == [greedy_by_hand(model, single)[0] for single in singles]
    assert [answers(model, single, **settings)[0] for single in singles] == wanted
    if decoding != "prompt lookup":  # which takes one row at a time
        assert answers(model, batch, **settings) == wanted


def test_answers_depend_on_the_image_and_on_the_question(lively, batch):
    model = lively()
    wanted = answers(model, batch, **GREEDY)
    assert answers(model, {**batch, "pixel_values": -3 * batch["pixel_values"]}, **GREEDY) != wanted
    question = {key: batch[key].flip(0) for key in ("question_input_ids", "question_attention_mask")}
    assert answers(model, {**batch, **question}, **GREEDY) != wanted
    assert answers(lively(use_fusion=False), {**batch, **question}, **GREEDY) == answers(
        lively(use_fusion=False), batch, **GREEDY
    )


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.5}], ids=str)
def test_beams_of_a_batch_equal_single(lively, batch, singles, beams):
    model, settings = lively(), {**GREEDY, **beams}
    wanted = [answers(model, single, **settings)[0] for single in singles]
    assert answers(model, batch, **settings) == wanted
    assert answers(model, batch, **settings, use_cache=False) == wanted


def test_pad_id_changes_nothing(lively, batch):
    model = lively()
    other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 17)
    question = torch.where(batch["question_attention_mask"].bool(), batch["question_input_ids"], 17)
    changed = {**batch, "input_ids": other, "question_input_ids": question}
    assert answers(model, changed, **GREEDY) == answers(model, batch, **GREEDY)


@pytest.mark.parametrize("past", ["none", "dynamic", "static"])
def test_a_cache_by_hand(lively, batch, past):
    """A left-padded batch step by step through `forward`, with only the new token and the whole mask."""
    model = lively()
    caches = {
        "none": None,
        "dynamic": DynamicCache(config=model.config.text_config),
        "static": StaticCache(config=model.config.text_config, max_cache_len=64),
    }
    wanted, mask = greedy_by_hand(model, batch), batch["attention_mask"]
    inputs, tokens, cache = batch, [], caches[past]
    for _ in range(6):
        with torch.no_grad():
            output = model(**{**inputs, "attention_mask": mask}, past_key_values=cache, use_cache=True)
        output.logits[:, -1, [model.config.image_token_id, 2]] = -torch.inf
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
        inputs, cache = {"input_ids": tokens[-1]}, output.past_key_values
        mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
    assert torch.cat(tokens, 1).tolist() == wanted


# ----------------------------------------------------------------------------------------------- one encoding an image


@pytest.fixture
def count_encodings(monkeypatch):
    """Images that the vision encoder saw, call by call, and the decoder's passes."""

    def watch(model):
        seen = {"images": [], "decoder": 0}
        model.vision_model.register_forward_pre_hook(lambda _, args: seen["images"].append(len(args[0])))

        def decoder_ran(*_):
            seen["decoder"] += 1

        model.fusion.decoder.register_forward_hook(decoder_ran)
        return seen

    return watch


MANY = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams and sequences": {"num_beams": 4, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("settings", MANY.values(), ids=MANY)
def test_each_image_is_encoded_once(make_model, batch, count_encodings, settings):
    model = make_model()
    seen = count_encodings(model)
    torch.manual_seed(0)
    output = model.generate(**batch, **{**GREEDY, **settings})
    assert seen == {"images": [3], "decoder": 2}
    assert len(output) == 3 * settings.get("num_return_sequences", 1)


def test_an_image_is_encoded_once_for_all_its_questions(lively, processor, images, count_encodings):
    model, index = lively(), [0, 1, 0, 0]
    questions = [*QUESTIONS, "Why?"]
    separate = processor(images=[images[i] for i in index], text=questions)
    wanted = answers(model, separate, **GREEDY)
    seen = count_encodings(model)
    shared = processor(images=images[:2], text=questions, image_index=index)
    assert answers(model, shared, **GREEDY) == wanted
    assert answers(model, shared, **GREEDY, num_beams=2) == answers(model, separate, **GREEDY, num_beams=2)
    assert seen["images"][:2] == [2, 2]
    del seen["images"][:]
    grid = model.encode_image(shared["pixel_values"])
    rest = {key: value for key, value in shared.items() if key != "pixel_values"}
    assert answers(model, {**rest, "image_grid": grid}, **GREEDY) == wanted
    assert seen["images"] == [2]


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_without_an_image(lively, processor, images, beams):
    model, settings = lively(), {**GREEDY, "num_beams": beams}
    mixed = processor(images=images[:2], text=QUESTIONS, image_index=[1, -1, 0])
    together = answers(model, mixed, **settings)
    assert together[1] == answers(model, processor(text=QUESTIONS[1]), **settings)[0]
    for row, image in ((0, images[1]), (2, images[0])):
        assert together[row] == answers(model, processor(images=image, text=QUESTIONS[row]), **settings)[0]
    several = processor(text=QUESTIONS)
    assert answers(model, several, **settings)[1] == together[1]


def test_queue_and_attentions_do_no_harm(make_model, processor, images, batch):
    """What is only for training may lie in the inputs of `generate`."""
    model = make_model()
    queued = processor(images=images, text=QUESTIONS, queue=[["liver", "left"]] * 3)
    assert answers(model, queued, **GREEDY, num_beams=2) == answers(model, batch, **GREEDY, num_beams=2)


# --------------------------------------------------------------------------------------------------- transformers' own


def test_generation_config_as_transformers_takes_it(make_model, batch):
    model = make_model()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    output = model.generate(batch["input_ids"], GenerationConfig(**GREEDY), **rest)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == answers(model, batch, **GREEDY)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_the_placeholder_is_never_an_answer(make_model, batch, settings):
    """Its id lies in this vocabulary, and the model would say it: the next step would look for an image there."""
    model = make_model()
    favourite, second, forbidden = model.config.image_token_id, 40, 41

    def insist(module, args, logits):
        logits[..., [favourite, second, forbidden]] = torch.tensor([200.0, 100.0, 150.0])
        return logits

    model.language_model.lm_head.register_forward_hook(insist)
    assert answers(model, batch, **{**GREEDY, **settings}, suppress_tokens=[forbidden]) == [[second] * 6] * 3
    by_config = GenerationConfig(**{**GREEDY, **settings}, suppress_tokens=[forbidden])
    assert answers(model, batch, generation_config=by_config) == [[second] * 6] * 3


def test_sampling(lively, batch):
    model = lively()
    settings = {**GREEDY, "do_sample": True, "temperature": 2.0, "top_k": 0}
    torch.manual_seed(1)
    one = answers(model, batch, **settings)
    torch.manual_seed(1)
    assert answers(model, batch, **settings) == one
    assert answers(model, batch, **settings) != one
    torch.manual_seed(1)
    assert answers(model, batch, **{**settings, "top_k": 1}) == answers(model, batch, **GREEDY)


def test_scores_are_the_logits_of_forward(lively, batch):
    model = lively()
    output = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    inputs = {**batch, "input_ids": output.sequences[:, :-1]}
    inputs["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -6:]
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=1e-5, rtol=1e-5)


def test_bfloat16_generates(make_model, batch):
    output = make_model().to(torch.bfloat16).generate(**batch, **GREEDY)
    assert output.shape == (3, batch["input_ids"].shape[1] + 6)


def test_the_end_of_an_answer_is_padded(make_model, batch):
    """A row that ends first is padded with the pad id."""
    model = make_model()
    forced = iter([[5, 2, 5], [6, 6, 2], [2, 2, 2]])

    def say(module, args, logits):
        logits[:] = 0
        for row, token in enumerate(next(forced)):
            logits[row, -1, token] = 1
        return logits

    model.language_model.lm_head.register_forward_hook(say)
    assert answers(model, batch, do_sample=False, max_new_tokens=9) == [[5, 6, 2], [2, 0, 0], [5, 2, 0]]

"""The whole model in batches: a row answers as it would alone, what a mask covers is never read, the losses add up."""

import pytest
import torch

from biod2c import BioD2CForConditionalGeneration, BioD2CVisionConfig

QUESTIONS = ["Where?", "Where is the liver, and is it larger than it should be?", "Is it left"]
QUEUES = [["the liver is left", "a b", "Where is it, and what is it?"], None, ["right", "on the left"]]
LABELLED = [" left</s>", " Yes, it is.</s>", " no</s>"]


def close(actual, wanted, atol=1e-5):
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def images(make_image):
    return [make_image(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def batch(processor, images):
    return dict(processor(images=images, text=QUESTIONS, queue=QUEUES))


@pytest.fixture(scope="module")
def labelled(processor, images):
    """Prompts with their answers, labels where the answer stands."""
    return with_answers(processor, images, range(3))


def with_answers(processor, images, rows, **kwargs):
    prompts = [f"<image>Question: {QUESTIONS[row]} Answer:{LABELLED[row]}" for row in rows]
    inputs = dict(processor(images=[images[r] for r in rows], text=prompts, queue=[QUEUES[r] for r in rows], **kwargs))
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        length = len(processor.tokenizer(LABELLED[rows[row]], add_special_tokens=False)["input_ids"])
        end = int(mask.nonzero().max()) + 1
        labels[row, end - length : end] = ids[end - length : end]
    return {**inputs, "labels": labels}


def alone(inputs, row):
    """One row of a batch, without its padding in the prompt."""
    keep = inputs["attention_mask"][row].bool()
    single = {key: value[row : row + 1] for key, value in inputs.items()}
    for key in ("input_ids", "attention_mask", "labels"):
        if key in single:
            single[key] = single[key][:, keep]
    return single


@torch.no_grad()
def run(model, **inputs):
    return model(**inputs)


# ------------------------------------------------------------------------------------------------- batch equals single


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fields", [{}, {"use_fusion": False}, {"image_position_embedding": "sine"}], ids=str)
def test_batch_equals_single(make_model, processor, images, side, fields):
    model = make_model(**fields)
    inputs = with_answers(processor, images, range(3), padding_side=side)
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 3  # three lengths, so two rows are padded
    padded = inputs["attention_mask"][:, 0 if side == "left" else -1]
    assert padded.sum() == 1
    together = run(model, **inputs)
    for row in range(3):
        single = run(model, **alone(inputs, row))
        close(together.logits[row][inputs["attention_mask"][row].bool()], single.logits[0])
        close(together.image_hidden_states[row], single.image_hidden_states[0])


def test_losses_of_a_batch_are_those_of_its_rows(make_model, labelled):
    model = make_model()
    together = run(model, **labelled)
    rows = [run(model, **alone(labelled, row)) for row in range(3)]
    tokens = (labelled["labels"] != -100).sum(1)
    close(together.nll_loss, sum(n * row.nll_loss for n, row in zip(tokens, rows, strict=True)) / tokens.sum())
    assert rows[1].semantic_loss.item() == 0  # it has no queue
    close(together.semantic_loss, (rows[0].semantic_loss + rows[2].semantic_loss) / 2)
    close(together.loss, together.nll_loss + together.semantic_loss)


def test_nll_is_the_mean_over_answer_tokens(make_model, labelled):
    """Written out: the token after column c is predicted at column c."""
    output = run(make_model(semantic_loss_weight=0.0), **labelled)
    log_p = output.logits.double().log_softmax(-1)
    terms = [
        -log_p[row, column - 1, token]
        for row, ids in enumerate(labelled["labels"].tolist())
        for column, token in enumerate(ids)
        if token != -100
    ]
    close(output.loss.double(), torch.stack(terms).mean())
    assert output.semantic_loss is None  # lambda 0: not even computed


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_lambda_weighs_the_semantic_loss(make_model, labelled, weight):
    output = run(make_model(semantic_loss_weight=weight), **labelled)
    close(output.loss, output.nll_loss + weight * output.semantic_loss)


# -------------------------------------------------------------------------------------------------- what a mask covers


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_under_a_mask_changes_nothing(make_model, labelled, seed):
    """The pad id, or any other, in prompt, question and queue: to the bit."""
    model = make_model()
    wanted = run(model, **labelled)
    changed = dict(labelled)
    random = torch.Generator().manual_seed(seed)
    for ids, mask in (
        ("input_ids", "attention_mask"),
        ("question_input_ids", "question_attention_mask"),
        ("queue_input_ids", "queue_attention_mask"),
    ):
        noise = torch.randint(3, 290, labelled[ids].shape, generator=random)
        changed[ids] = torch.where(labelled[mask].bool(), labelled[ids], noise)
        assert not torch.equal(changed[ids], labelled[ids])
    actual = run(model, **changed)
    seen = labelled["attention_mask"].bool()
    assert torch.equal(actual.logits[seen], wanted.logits[seen])
    assert torch.equal(actual.loss, wanted.loss)
    assert torch.equal(actual.semantic_loss, wanted.semantic_loss)


def test_gradients_ignore_what_lies_under_a_mask(make_model, labelled):
    """Nor does a masked token's embedding learn."""
    model = make_model()
    model.language_model.lm_head.requires_grad_(False)
    model(**{**labelled, "labels": labelled["labels"]}).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert (gradient[0] == 0).all()  # the pad id
    assert gradient[1].abs().sum() > 0


def test_mask_padding_false_reads_padding(make_model, batch):
    """The authors' code reads the pad id as text; so then it does matter."""
    model = make_model(mask_padding=False)
    changed = {**batch, "question_input_ids": batch["question_input_ids"].masked_fill(
        batch["question_attention_mask"] == 0, 7)}  # fmt: skip
    assert not torch.equal(run(model, **changed).logits[0], run(model, **batch).logits[0])


def test_a_question_without_tokens_makes_no_nan(make_model, labelled):
    model = make_model()
    mask = labelled["question_attention_mask"].clone()
    mask[0] = 0
    loss = model(**{**labelled, "question_attention_mask": mask}).loss
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


# ------------------------------------------------------------------------- several questions of an image, rows without


def test_several_questions_of_one_image(make_model, processor, images):
    model = make_model()
    index = [0, 0, 1, 0]
    questions = [*QUESTIONS, "Why?"]
    shared = processor(images=images[:2], text=questions, image_index=index, queue=[QUEUES[0]] * 4)
    separate = processor(images=[images[i] for i in index], text=questions, queue=[QUEUES[0]] * 4)
    assert shared["pixel_values"].shape[0] == 2
    assert "image_index" not in separate
    one, other = (run(model, **inputs, output_fusion_attentions=True) for inputs in (shared, separate))
    close(one.logits, other.logits)
    close(one.semantic_loss, other.semantic_loss)
    close(one.image_hidden_states, other.image_hidden_states)
    for shared_weights, separate_weights in zip(one.fusion_attentions, other.fusion_attentions, strict=True):
        close(shared_weights, separate_weights)


def test_a_precomputed_grid_equals_the_image(make_model, batch):
    model = make_model()
    wanted = run(model, **batch)
    grid = model.encode_image(batch["pixel_values"])
    assert grid.shape == (3, 128, 4, 4)
    rest = {key: value for key, value in batch.items() if key != "pixel_values"}
    assert torch.equal(run(model, **rest, image_grid=grid).logits, wanted.logits)
    question = {key: batch[key] for key in ("question_input_ids", "question_attention_mask")}
    features = model.get_image_features(batch["pixel_values"], **question)
    assert torch.equal(features, wanted.image_hidden_states)
    assert torch.equal(model.get_image_features(image_grid=grid, **question), features)
    assert torch.equal(run(model, **rest, image_features=features).logits, wanted.logits)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_rows_without_an_image(make_model, processor, images, mask_padding):
    model = make_model(mask_padding=mask_padding)
    prompts = ["<image>Question: Where? Answer: left", "Is it left", "<image>Question: Is it left? Answer: no"]
    queue = [["liver", "left x"], ["right", "a b"], ["no", "yes"]]
    mixed = processor(images=images[:2], text=prompts, queue=queue, image_index=[0, -1, 1])
    assert mixed["image_index"].tolist() == [0, -1, 1]
    output = run(model, **mixed)
    seen = mixed["attention_mask"].bool()
    for row, image in ((0, images[0]), (2, images[1])):
        single = run(model, **processor(images=image, text=prompts[row], queue=queue[row]))
        close(output.logits[row][seen[row]], single.logits[0])
    text_only = processor(text=prompts[1])
    assert set(text_only) == {"input_ids", "attention_mask"}
    close(output.logits[1][seen[1]], run(model, **text_only).logits[0])
    with_images = processor(images=images[:2], text=[prompts[0], prompts[2]], queue=[queue[0], queue[2]])
    close(output.semantic_loss, run(model, **with_images).semantic_loss)


def test_text_only_equals_the_language_model(make_model, processor):
    model = make_model()
    inputs = processor(text=["Is it left", "Why is it on the left side of it"])
    assert torch.equal(run(model, **inputs).logits[1], run(model.language_model, **inputs).logits[1])


# --------------------------------------------------------------------------------------------------- what does not fit


def test_inputs_that_do_not_fit_are_named(make_model, batch):
    model = make_model()
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    question = {key: batch[key] for key in ("question_input_ids", "question_attention_mask")}
    pixels = batch["pixel_values"]
    seven = {**batch, "input_ids": batch["input_ids"].clone()}
    first = (seven["input_ids"][2] == model.config.image_token_id).nonzero()[0]
    seven["input_ids"][2, first] = 5
    cases = [
        (text | {"pixel_values": pixels}, r"question_input_ids.*\[B, 8\], got none"),
        (batch | {key: value[:, :5] for key, value in question.items()}, r"\[B, 8\], got 5 tokens"),
        (batch | {"pixel_values": pixels[:2]}, "2 images for 3 rows"),
        (batch | {"image_index": torch.tensor([0, 1, 3])}, "asks image 3, there are 3"),
        (batch | {"image_index": torch.tensor([0])}, "images of 1 rows, there are 3 questions"),
        (text | question | {"pixel_values": pixels[:1], "question_input_ids": question["question_input_ids"][:1]},
         r"ids of shape \[1, 8\] with a mask of shape \[3, 8\]"),
        (text | {"pixel_values": pixels[:1]} | {key: value[:1] for key, value in question.items()},
         "input_ids has 3 rows, the image features 1"),
        (seven, r"rows have \[8, 8, 7\] <image> placeholders, their images need \[8, 8, 8\]"),
        (batch | {"image_index": torch.tensor([0, -1, 2])}, r"have \[8, 8, 8\] .* need \[8, 0, 8\]"),
        (text, "24 <image> placeholders, but no image is given"),
        (batch | {"input_ids": None, "inputs_embeds": torch.zeros(3, 9, 32)}, "needs input_ids"),
    ]  # fmt: skip
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            run(model, **inputs)


def test_ablation_with_too_few_images_or_no_question(make_model, batch):
    model = make_model(use_fusion=False)
    unasked = {key: value for key, value in batch.items() if not key.startswith("question")}
    with pytest.raises(ValueError, match="a queue is compared with the question, but question_input_ids is missing"):
        run(model, **unasked)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="input_ids has 3 rows, the image features 2"):
        run(model, **text, pixel_values=batch["pixel_values"][:2])


# ------------------------------------------------------------------------------------------------------------ training


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_training_computes_only_the_logits_that_predict_a_label(make_model, labelled):
    model = make_model(fusion_dropout=0.0)
    for module in model.vision_model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats, module.momentum = True, 0.0
    resting = model(**labelled)
    resting.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    model.train()
    model.vision_model.eval()
    training = model(**labelled)
    training.loss.backward()
    columns = (labelled["labels"][:, 1:] != -100).any(0)
    assert training.logits.shape[1] == columns.sum() < resting.logits.shape[1] - 1
    close(training.logits, resting.logits[:, :-1][:, columns])
    close(training.loss, resting.loss)
    for name, gradient in gradients(model).items():
        close(gradient, wanted[name])


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([-4, -3, -2])], ids=str)
def test_logits_to_keep_goes_with_labels(make_model, labelled, keep):
    """The loss is that of the columns which are kept."""
    model = make_model(semantic_loss_weight=0.0)
    full = run(model, **labelled).logits
    columns = torch.arange(full.shape[1])[-keep:] if isinstance(keep, int) else keep
    shifted = torch.nn.functional.pad(labelled["labels"][:, 1:], (0, 1), value=-100)[:, columns]
    output = run(model, **{**labelled, "logits_to_keep": keep})
    close(output.logits, full[:, columns])
    wanted = torch.nn.functional.cross_entropy(full[:, columns].flatten(0, 1), shifted.flatten())
    assert torch.equal(output.loss.isnan(), wanted.isnan())
    if not wanted.isnan():
        close(output.loss, wanted)


@pytest.mark.parametrize("split", [[[0], [1], [2]], [[0, 1], [2]], [[1], [0, 2]]], ids=str)
def test_accumulated_micro_batches_equal_the_whole(make_model, processor, images, labelled, split):
    """Both losses are sums over the whole batch divided by its counts, however it is cut; and so are the gradients."""
    model = make_model()
    whole = model(**labelled)
    whole.loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    counts = {
        "num_items_in_batch": (labelled["labels"][:, 1:] != -100).sum(),
        "num_semantic_items_in_batch": 2,  # rows with a queue
    }
    parts = [model(**with_answers(processor, images, rows), **counts) for rows in split]
    for name in ("loss", "nll_loss", "semantic_loss"):
        losses = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        close(sum(losses), whole[name])
    sum(part.loss for part in parts).backward()
    for name, gradient in gradients(model).items():
        close(gradient, wanted[name], atol=2e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_nothing(make_model, labelled, frozen):
    """Also with a frozen language model (stage 1), through which the gradients of what feeds it pass."""
    found = []
    for checkpointing in (False, True):
        model = make_model()
        model.language_model.requires_grad_(not frozen)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        torch.manual_seed(5)  # dropout is on: the recomputation must draw the same masks
        runs = []
        in_layers = [layer.linear1 for layer in model.fusion.decoder.layers]
        in_layers += [layer.self_attn for layer in model.language_model.model.layers]
        assert model.language_model.model.layers[0].self_attn.training is not frozen
        for module in in_layers:
            module.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(**labelled).loss.backward()
        found.append((gradients(model), len(runs)))
    assert found[1][1] == 2 * found[0][1]  # each layer ran twice, so that its activations need not be kept
    for name, gradient in found[0][0].items():
        close(found[1][0][name], gradient)


def test_frozen_parts_rest_while_the_others_train(make_model, labelled):
    model = make_model()
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    assert not any(module.training for module in model.vision_model.modules())
    assert not any(module.training for module in model.language_model.modules())
    assert all(module.training for module in model.fusion.modules())
    model(**labelled).loss.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert set(gradients(model)) == {n for n, _ in model.named_parameters() if n.startswith("fusion.")}
    model.vision_model.requires_grad_(True)
    model.train()
    model(**labelled)
    assert not torch.equal(model.vision_model.bn1.running_mean, before["vision_model.bn1.running_mean"])
    model.fusion.requires_grad_(False)
    model.train()
    assert not model.fusion.training
    assert not any(module.training for module in model.eval().modules())


def test_one_step_lowers_the_loss(make_model, labelled):
    model = make_model(fusion_dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model(**labelled).loss
    before.backward()
    optimizer.step()
    assert run(model, **labelled).loss < before


def test_every_new_part_learns(make_model, labelled):
    """Each parameter between the encoders has a gradient, also the value bias; only a key bias cancels by nature."""
    model = make_model()
    model.train()
    model(**labelled).loss.backward()
    for name, parameter in model.fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------------------------------ precision and the variants


def test_bfloat16(make_model, labelled):
    wanted = run(make_model(), **labelled)
    model = make_model().to(torch.bfloat16)
    output = model(**labelled)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    close(output.logits.float(), wanted.logits, atol=0.1)
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=0.02)


@pytest.mark.parametrize("part", ["fusion", "vision_model", "language_model"])
def test_parts_in_different_precision(make_model, labelled, part):
    """What trains is kept in float32 beside a frozen language model or encoder in bfloat16."""
    wanted = run(make_model(), **labelled)
    model = make_model().to(torch.bfloat16)
    getattr(model, part).float()
    output = model(**labelled)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=0.02)


def test_autocast(make_model, labelled):
    model = make_model()
    wanted = run(model, **labelled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**labelled)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=0.02)


VARIANTS = {
    "the paper": {},
    "t_v": {"semantic_divergence": "t_v"},
    "pooled": {"semantic_similarity": "pooled"},
    "projected": {"semantic_features": "projected"},
    "sine": {"image_position_embedding": "sine"},
    "w/o fm": {"use_fusion": False},
    "mask_padding": {"mask_padding": False},
}


def test_variants_run_and_differ(make_model, labelled):
    losses = {}
    for name, fields in VARIANTS.items():
        model = make_model(**fields)
        output = model(**labelled)
        output.loss.backward()
        losses[name] = output.loss.item()
    assert len({round(loss, 6) for loss in losses.values()}) == len(VARIANTS), losses


def test_projected_features_train_only_the_projection(make_model, batch):
    """The authors' variant aligns Proj(X_v): the gate and the text path get no gradient from it; the paper's do."""
    for features, learns in (("projected", False), ("fused", True)):
        model = make_model(semantic_features=features)
        model(**batch).semantic_loss.backward()
        assert (model.fusion.gate.beta.grad is not None) is learns
        assert model.fusion.proj.linear1.weight.grad.abs().sum() > 0


def test_ablation_has_none_of_the_fusion(make_model, batch):
    full, ablated = make_model(), make_model(use_fusion=False)
    names = {name for name, _ in ablated.fusion.named_parameters()}
    assert not any(part in name for name in names for part in ("text_encoder", "mfe", "gate"))
    model = BioD2CForConditionalGeneration(ablated.config).eval()
    state = {name: value for name, value in full.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(state)
    full.fusion.gate.beta.data.zero_()  # eq. 2 with beta = 0 is the ablation
    assert torch.equal(run(model, **batch).logits, run(full, **batch).logits)
    without_question = {key: value for key, value in batch.items() if not key.startswith(("question", "queue"))}
    assert torch.equal(run(model, **without_question).logits, run(model, **batch).logits)


def test_positions_matter_only_where_they_are_added(make_model):
    """Shuffled cells are the same to the learned queries without positions (the paper), and not with them."""
    grid = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    shuffled = grid.flatten(2)[..., torch.randperm(16)].view_as(grid)
    question = torch.ones(1, 8, dtype=torch.long)
    for kind, same in (("none", True), ("sine", False)):
        model = make_model(image_position_embedding=kind, use_fusion=False)
        with torch.no_grad():
            one, other = (model.get_image_features(None, question, image_grid=g) for g in (grid, shuffled))
        assert torch.allclose(one, other, atol=1e-5) is same


@pytest.mark.parametrize("fields", [{}, {"use_fusion": False}], ids=["fused", "w/o fm"])
def test_fusion_attentions(make_model, batch, fields):
    model = make_model(**fields)
    assert run(model, **batch).fusion_attentions is None
    output = run(model, **batch, output_fusion_attentions=True)
    shapes = [(3, 2, 4, 8, 16), (3, 2, 4, 8, 21)][: len(output.fusion_attentions)]
    assert [tuple(weights.shape) for weights in output.fusion_attentions] == shapes
    assert len(shapes) == (1 if fields else 2)
    for weights in output.fusion_attentions:
        close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights >= 0).all()


def test_attention_follows_what_it_is_asked_of(make_model, batch):
    """The grid pass is the same for every question of an image, the multi-scale pass is not."""
    model = make_model()
    pixels = batch["pixel_values"][:1].expand(3, -1, -1, -1)
    grid, multiscale = run(model, **{**batch, "pixel_values": pixels}, output_fusion_attentions=True).fusion_attentions
    close(grid[0], grid[1])
    assert (multiscale[0] - multiscale[1]).abs().max() > 1e-3


def test_outputs_as_a_tuple(make_model, labelled):
    model = make_model()
    output, values = run(model, **labelled), run(model, **labelled, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.loss)


def test_a_trunk_with_attention_pool_gives_the_same_grid(make_model, batch):
    pooled = BioD2CVisionConfig(
        layers=(1, 1, 1, 1), width=8, image_size=64, attention_pool=True, attention_pool_heads=4
    )
    one, other = make_model(vision_config=pooled), make_model()
    other.load_state_dict({k: v for k, v in one.state_dict().items() if k in other.state_dict()})
    assert torch.equal(run(one, **batch).logits, run(other, **batch).logits)


@pytest.mark.slow
def test_compiled_forward(make_model, labelled):
    model = make_model()
    wanted = run(model, **labelled)
    compiled = torch.compile(model, backend="aot_eager")
    output = run(compiled, **labelled)
    close(output.logits, wanted.logits)
    close(output.loss, wanted.loss)

"""The boxes of Fig. 2 one by one, each against a second implementation: direct loops, torch's own modules, finite
differences.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from biod2c import BioD2CForConditionalGeneration
from biod2c.modeling_biod2c import (
    CrossAttention,
    FusionDecoder,
    Gate,
    MultiScaleFeatureEnhancement,
    SelfAttention,
    TextEncoderMLP,
    semantic_distribution,
    semantic_loss,
    sine_positions,
)


def close(actual, wanted, atol=1e-6, rtol=1e-6):
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=rtol)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------- multi-scale feature enhancement


def pool_block_by_block(grid, num_scales):
    """The paper's definition; block i of n over a side of N cells is [floor(i N / n), ceil((i + 1) N / n))."""
    height, width = grid.shape[-2:]
    rows = []
    for s in range(num_scales):
        n = 2**s
        for y, x in itertools.product(range(n), range(n)):
            block = grid[:, :, y * height // n : -(-(y + 1) * height // n), x * width // n : -(-(x + 1) * width // n)]
            rows.append(block.amax((2, 3)) + block.mean((2, 3)))
    return torch.stack(rows, dim=1)


@given(
    num_scales=st.integers(1, 4),
    cells=st.integers(1, 3),
    wider=st.integers(1, 2),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_mfe_equals_a_loop_over_blocks(num_scales, cells, wider, batch, seed):
    side = cells * 2 ** (num_scales - 1)
    grid = draw(batch, 3, side, side * wider, seed=seed)
    ours, theirs = grid.clone().requires_grad_(), grid.clone().requires_grad_()
    actual = MultiScaleFeatureEnhancement(num_scales)(ours)
    wanted = pool_block_by_block(theirs, num_scales)
    assert actual.shape == (batch, sum(4**s for s in range(num_scales)), 3)
    close(actual, wanted)
    weights = draw(*wanted.shape, seed=1)
    (actual * weights).sum().backward()
    (wanted * weights).sum().backward()
    close(ours.grad, theirs.grad)


def test_mfe_of_the_papers_size():
    grid = draw(1, 4, 32, 32)
    close(MultiScaleFeatureEnhancement(6)(grid), pool_block_by_block(grid, 6))


@pytest.mark.parametrize(("side", "num_scales"), [(side, s) for s in (1, 2, 3, 4) for side in range(2 ** (s - 1), 18)])
def test_mfe_loses_no_cell(side, num_scales):
    grid = draw(1, 2, side, side).requires_grad_()
    rows = MultiScaleFeatureEnhancement(num_scales)(grid)
    close(rows, pool_block_by_block(grid, num_scales))
    start = 0
    for s in range(num_scales):  # each scale by itself covers the whole grid
        gradient = torch.autograd.grad(rows[:, start : start + 4**s].sum(), grid, retain_graph=True)[0]
        assert (gradient > 0).all()
        start += 4**s


@pytest.mark.parametrize(("side", "num_scales"), [(1, 2), (3, 3), (7, 4), (31, 6)])
def test_mfe_finer_than_the_grid(side, num_scales):
    finest = 2 ** (num_scales - 1)
    with pytest.raises(
        ValueError, match=f"num_scales={num_scales} needs .* at least {finest} cells a side, got {side}"
    ):
        MultiScaleFeatureEnhancement(num_scales)(draw(1, 2, side, side))
    with pytest.raises(ValueError, match=f"got {side}"):  # the shorter side counts
        MultiScaleFeatureEnhancement(num_scales)(draw(1, 2, 64, side))


# --------------------------------------------------------------------------------------------------------- the decoder

B, Q, M, D, HEADS = 2, 5, 11, 12, 3
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def attention_pair(kind, dropout=0.0):
    """Ours and torch's, with the same weights, in float64: equal but for rounding means equal to 1e-12."""
    dtype = torch.float64
    theirs = nn.MultiheadAttention(D, HEADS, dropout=dropout, batch_first=True, dtype=dtype)
    ours = kind(D, HEADS, dropout).to(dtype)
    values = {name: draw(*value.shape, seed=seed, dtype=dtype) / 2 for seed, (name, value) in
              enumerate(theirs.state_dict().items())}  # fmt: skip
    ours.load_state_dict(values)  # torch's own names: a checkpoint needs no renaming
    theirs.load_state_dict(values)
    return ours, theirs


def compare_gradients(output, reference, ours, theirs, inputs):
    """Of a random linear function of the outputs, for all parameters and inputs."""
    weights = draw(*output.shape, seed=9).double()
    actual = torch.autograd.grad((output * weights).sum(), [*ours.parameters(), *inputs], retain_graph=True)
    wanted = torch.autograd.grad((reference * weights).sum(), [*theirs.parameters(), *inputs])
    for one, other in zip(actual, wanted, strict=True):
        close(one, other, **EXACT)


@pytest.mark.parametrize("positions", [False, True], ids=["no positions", "positions on the keys"])
def test_cross_attention_equals_torchs(positions):
    ours, theirs = attention_pair(CrossAttention)
    x, cells = draw(B, Q, D).double().requires_grad_(), draw(B, M, D, seed=1).double().requires_grad_()
    added = draw(M, D, seed=2).double() if positions else None
    output, weights = ours(x, cells, added)
    reference, wanted = theirs(x, cells if added is None else cells + added, cells, average_attn_weights=False)
    close(output, reference, **EXACT)
    close(weights, wanted, **EXACT)
    compare_gradients(output, reference, ours, theirs, [x, cells])


@pytest.mark.parametrize("seed", range(3))
def test_cross_attention_in_training_equals_torchs_under_the_same_dropout(monkeypatch, seed):
    """One fixed mask for both; the value bias must feel it, since a dropped row no longer sums to one."""
    p = 0.4
    ours, theirs = attention_pair(CrossAttention, dropout=p)
    ours.train(), theirs.train()
    kept = (draw(B, HEADS, Q, M, seed=seed) > -0.25).double()
    calls = []

    def fixed_dropout(weights, p, training=True, inplace=False):
        calls.append(tuple(weights.shape))
        return weights * kept.reshape(weights.shape) / (1 - p) if training else weights

    monkeypatch.setattr(F, "dropout", fixed_dropout)
    x, cells = draw(B, Q, D).double().requires_grad_(), draw(B, M, D, seed=1).double().requires_grad_()
    output, weights = ours(x, cells, None)
    reference, dropped = theirs(x, cells, cells, average_attn_weights=False)
    assert calls == [(B, HEADS * Q, M), (B * HEADS, Q, M)]
    close(output, reference, **EXACT)
    close(weights * kept / (1 - p), dropped, **EXACT)  # the weights that are returned are those before dropout
    compare_gradients(output, reference, ours, theirs, [x, cells])


def test_cross_attention_gradients_equal_finite_differences():
    ours, _ = attention_pair(CrossAttention)
    x, cells = draw(1, 2, D, dtype=torch.float64), draw(1, 3, D, seed=1, dtype=torch.float64)
    inputs = [x.requires_grad_(), cells.requires_grad_(), *ours.parameters()]
    assert torch.autograd.gradcheck(lambda x, cells, *_: ours(x, cells, None)[0], inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_equals_torchs(masked):
    ours, theirs = attention_pair(SelfAttention)
    x = draw(B, Q, D).double().requires_grad_()
    mask = torch.tensor([[True] * Q, [True, True, False, False, False]]) if masked else None
    output = ours(x, mask)
    reference, _ = theirs(x, x, x, key_padding_mask=None if mask is None else ~mask)
    close(output, reference, **EXACT)
    compare_gradients(output, reference, ours, theirs, [x])


def torchs_decoder(ours, config):
    """torch.nn.TransformerDecoder, pre-norm, with the weights of ours."""
    layer = nn.TransformerDecoderLayer(
        config.vision_hidden_size,
        config.fusion_heads,
        config.fusion_ffn_dim,
        config.fusion_dropout,
        batch_first=True,
        norm_first=True,
    )
    theirs = nn.TransformerDecoder(layer, config.fusion_layers, norm=nn.LayerNorm(config.vision_hidden_size))
    theirs.load_state_dict({k.replace("cross_attn", "multihead_attn"): v for k, v in ours.state_dict().items()})
    return theirs.eval()


@pytest.mark.parametrize("masked", [False, True])
def test_fusion_decoder_equals_torchs(make_model, masked):
    model = make_model(fusion_layers=3)
    ours, theirs = model.fusion.decoder, torchs_decoder(model.fusion.decoder, model.config)
    x, cells = draw(2, 8, 128).requires_grad_(), draw(2, 21, 128, seed=1).requires_grad_()
    mask = torch.arange(8) < torch.tensor([[8], [3]]) if masked else None
    output, weights = ours(x, cells, None, mask, output_attentions=True)
    reference = theirs(x, cells, tgt_key_padding_mask=None if mask is None else ~mask)
    close(output, reference, atol=2e-5)
    assert weights.shape == (2, 3, 4, 8, 21)
    close(weights.sum(-1), torch.ones(2, 3, 4, 8))
    actual = torch.autograd.grad(output.square().sum(), [x, cells], retain_graph=True)
    for one, other in zip(actual, torch.autograd.grad(reference.square().sum(), [x, cells]), strict=True):
        close(one, other, atol=1e-4)


def test_dropout_trains_and_rests(make_config):
    decoder = FusionDecoder(make_config(fusion_dropout=0.3))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, cells = draw(1, 8, 128), draw(1, 21, 128)
    torch.manual_seed(0)
    assert not torch.equal(decoder(x, cells)[0], decoder(x, cells)[0])
    decoder.eval()
    assert torch.equal(decoder(x, cells)[0], decoder(x, cells)[0])


# ---------------------------------------------------------------------------------- text encoder, gate, sine positions


def test_padding_enters_the_decoder_as_zeros(make_config):
    encoder = TextEncoderMLP(make_config())
    embeds, mask = draw(2, 8, 32), torch.arange(8) < torch.tensor([[5], [8]])
    text = encoder(embeds, mask)
    assert (text[0, 5:] == 0).all()
    torch.testing.assert_close(text[mask], encoder.linear2(encoder.linear1(embeds[mask]).relu()))
    torch.testing.assert_close(encoder(embeds, None)[mask], text[mask])


@pytest.mark.parametrize("beta", [-2.0, 0.0, 0.2, 5.0])
def test_gate(make_config, beta):
    gate = Gate(make_config())
    gate.beta.data.fill_(beta)
    projected, fused = draw(2, 8, 32).double(), draw(2, 8, 32, seed=1).double()
    np.testing.assert_allclose(gate(projected, fused).detach(), projected + np.tanh(beta) * fused, rtol=1e-6, atol=1e-6)


def test_gate_starts_where_the_config_says(make_model):
    assert make_model().fusion.gate.beta.item() == pytest.approx(0.2)
    assert make_model(gate_init=0.1).fusion.gate.beta.item() == pytest.approx(0.1)


@pytest.mark.parametrize("width", [8, 10, 128])
def test_sine_positions(width):
    side = 6
    positions = sine_positions(side, width, torch.zeros(()))
    assert positions.shape == (side**2, width)
    cells = positions.view(side, side, width)
    half = 2 * (width // 4)
    assert (cells[:, :1, :half] == cells[:, :, :half]).all()  # y does not change along a row
    torch.testing.assert_close(cells[..., :half], cells.transpose(0, 1)[..., half : 2 * half])
    assert torch.pdist(positions).min() > 0.1  # no two cells share a position
    y, frequency = 2 * np.pi * 3.5 / side, 10000.0 ** -(1 / (width // 4))
    assert cells[3, 0, 1].item() == pytest.approx(np.sin(y * frequency), abs=1e-6)
    assert cells[3, 0, width // 4].item() == pytest.approx(np.cos(y), abs=1e-6)


# --------------------------------------------------------------------------------------------------- the semantic loss


def log_distribution_by_loops(features, queue, mask, queue_mask, temperature, similarity):
    """Eq. 3 for one row, text by text and token by token, in float64; absent texts are left out."""
    features, queue = features.double().numpy(), queue.double().numpy()

    def cosine(a, b):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    scores = []
    for text, present in zip(queue, queue_mask, strict=True):
        if not present.any():
            continue
        if similarity == "tokenwise":
            both = [n for n in range(len(features)) if mask[n] and present[n]]
            scores.append(np.mean([cosine(features[n], text[n]) for n in both]) if both else 0.0)
        else:
            mine = np.mean([features[n] for n in range(len(features)) if mask[n]], axis=0)
            scores.append(cosine(mine, np.mean([text[n] for n in range(len(text)) if present[n]], axis=0)))
    return torch.log_softmax(torch.tensor(scores) / temperature, dim=0)


def semantic_case(seed, rows=3, k=4, length=5, width=6, dtype=torch.float32):
    """Features, question, queue and masks: prefixes of random length, one absent text, and one row without a queue."""
    random = np.random.default_rng(seed)
    question_mask = torch.arange(length) < torch.tensor(random.integers(1, length + 1, (rows, 1)))
    queue_mask = torch.arange(length) < torch.tensor(random.integers(1, length + 1, (rows, k, 1)))
    queue_mask[0, 1] = False
    queue_mask[-1] = False
    shapes = [(rows, length, width), (rows, length, width), (rows, k, length, width)]
    tensors = [draw(*shape, seed=seed + number, dtype=dtype) for number, shape in enumerate(shapes)]
    return (*tensors, question_mask, queue_mask)


@pytest.mark.parametrize("similarity", ["tokenwise", "pooled"])
@pytest.mark.parametrize("divergence", ["v_t", "t_v"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_semantic_loss_equals_torchs_divergence_of_loops(similarity, divergence, temperature):
    image, question, queue, question_mask, queue_mask = semantic_case(seed=3)
    # token by token the image is read where the question has tokens; pooled, all its rows are real
    image_mask = question_mask if similarity == "tokenwise" else torch.ones_like(question_mask)
    wanted = []
    for row in range(len(image) - 1):  # the last row has no queue
        log_v, log_t = (
            log_distribution_by_loops(features[row], queue[row], mask[row], queue_mask[row], temperature, similarity)
            for features, mask in ((image, image_mask), (question, question_mask))
        )
        first, second = (log_v, log_t) if divergence == "v_t" else (log_t, log_v)
        categorical = [torch.distributions.Categorical(logits=log_p) for log_p in (first, second)]
        divergences = [
            torch.distributions.kl_divergence(*categorical),
            F.kl_div(second, first, reduction="sum", log_target=True),  # F.kl_div(log q, log p) is KL(p || q)
        ]
        torch.testing.assert_close(*divergences)
        wanted.append(divergences[0])
    settings_ = {"temperature": temperature, "divergence": divergence, "similarity": similarity}
    masks = {"question_mask": question_mask, "queue_mask": queue_mask}
    actual = semantic_loss(image, question, queue, **masks, **settings_)
    close(actual, torch.stack(wanted).mean().float())
    summed = semantic_loss(image, question, queue, **masks, **settings_, num_items=7)
    close(summed, torch.stack(wanted).sum().float() / 7)
    close(semantic_loss(image, question, queue, **masks, **settings_, num_items=torch.tensor(7)), summed)


VARIANTS = [
    {"temperature": 0.1, "divergence": divergence, "similarity": similarity}
    for divergence in ("v_t", "t_v")
    for similarity in ("tokenwise", "pooled")
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v['divergence']}-{v['similarity']}")


@variants
@given(seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=15, deadline=None)
def test_semantic_loss_properties(variant, seed, data):
    image, question, queue, question_mask, queue_mask = semantic_case(seed)
    masks = {"question_mask": question_mask, "queue_mask": queue_mask}
    loss = semantic_loss(image, question, queue, **masks, **variant)
    assert loss >= -1e-6
    order = data.draw(st.permutations(range(queue.shape[1])))
    permuted = {**masks, "queue_mask": queue_mask[:, order]}
    close(semantic_loss(image, question, queue[:, order], **permuted, **variant), loss)
    # what lies under a mask, of the question's own features and of the queue, is never read
    noise = 100 * draw(*queue.shape, seed=seed + 9)
    hidden = torch.where(queue_mask[..., None], queue, noise)
    asked = torch.where(question_mask[..., None], question, noise[:, 0])
    seen = torch.where(question_mask[..., None], image, noise[:, 1]) if variant["similarity"] == "tokenwise" else image
    close(semantic_loss(seen, asked, hidden, **masks, **variant), loss)
    # rows without a queue add nothing, here or in the gradient
    close(
        semantic_loss(image[:-1], question[:-1], queue[:-1], **{k: v[:-1] for k, v in masks.items()}, **variant), loss
    )


@variants
def test_semantic_loss_is_zero_where_both_agree(variant):
    _, question, queue, question_mask, queue_mask = semantic_case(seed=1)
    question_mask[:] = True  # pooled, the image is read at every position
    scaled = 3 * question  # the cosine does not see a length
    loss = semantic_loss(scaled, question, queue, question_mask=question_mask, queue_mask=queue_mask, **variant)
    close(loss, torch.tensor(0.0))
    assert semantic_loss(draw(3, 5, 6, seed=8), question, queue, **variant) > 1e-3  # and not where they do not


@variants
@pytest.mark.parametrize("masked", [False, True])
def test_semantic_loss_gradient_equals_finite_differences(variant, masked):
    image, question, queue, question_mask, queue_mask = semantic_case(seed=2, dtype=torch.float64)
    masks = {"question_mask": question_mask, "queue_mask": queue_mask} if masked else {}
    smooth = {**variant, "temperature": 0.5}

    def loss(features):
        value = semantic_loss(features, question, queue, **masks, **smooth)
        assert value.dtype == torch.float64  # a double stays one
        return value

    assert torch.autograd.gradcheck(loss, image.requires_grad_(), eps=1e-6, atol=1e-7)
    if masked:
        (gradient,) = torch.autograd.grad(loss(image), image)
        assert (gradient[-1] == 0).all()  # the row without a queue
        if variant["similarity"] == "tokenwise":
            assert (gradient[~question_mask] == 0).all()


@variants
def test_the_text_side_is_a_target(variant):
    tensors = [tensor.requires_grad_() for tensor in semantic_case(seed=4)[:3]]
    semantic_loss(*tensors, **variant).backward()
    assert tensors[0].grad.abs().sum() > 0
    assert tensors[1].grad is None
    assert tensors[2].grad is None


@variants
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_no_queue_anywhere(variant, num_items):
    image, question, queue, question_mask, queue_mask = semantic_case(seed=5)
    masks = {"question_mask": question_mask, "queue_mask": torch.zeros_like(queue_mask)}
    loss = semantic_loss(image.requires_grad_(), question, queue, **masks, **variant, num_items=num_items)
    loss.backward()
    assert loss.item() == 0
    assert (image.grad == 0).all()


def test_zero_features_make_no_nan():
    image = torch.zeros(1, 5, 6, requires_grad=True)
    for variant in VARIANTS:
        loss = semantic_loss(image, draw(1, 5, 6), draw(1, 4, 5, 6), **variant)
        (gradient,) = torch.autograd.grad(loss, image)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_semantic_loss_keeps_its_digits_in_bfloat16():
    image, question, queue, *_ = (x.bfloat16() for x in semantic_case(seed=6, width=64))
    exact = semantic_loss(image.double(), question.double(), queue.double(), temperature=0.1)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            for tensors in ((image, question, queue), (image.float(), question.float(), queue.float())):
                close(semantic_loss(*tensors, temperature=0.1).double(), exact, atol=1e-5, rtol=1e-4)


def test_distribution_sums_to_one_over_the_present():
    features, _, queue, mask, queue_mask = semantic_case(seed=7)
    p = semantic_distribution(features, queue, position_mask=mask, queue_mask=queue_mask, temperature=0.1).exp()
    close(p[:-1].sum(-1), torch.ones(2))
    assert p[0, 1] == 0


# ------------------------------------------------------------------------------------------------------ initialisation


def test_every_parameter_is_initialised(make_config):
    """Uninitialised memory is caught by filling it with NaN first; two models of a seed are equal."""

    def build():
        torch.manual_seed(3)
        torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, torch.empty gives NaN
        try:
            return BioD2CForConditionalGeneration(make_config(image_position_embedding="sine"))
        finally:
            torch.use_deterministic_algorithms(False)

    one, other = build(), build()
    for (name, parameter), (_, same) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.isfinite(parameter).all(), name
        assert torch.equal(parameter, same), name

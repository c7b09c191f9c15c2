"""The configuration refuses what cannot be built, survives a round trip, takes other encoders and language models."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    BertConfig,
    CLIPConfig,
    ConvNextConfig,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
)

from biod2c import BioD2CConfig, BioD2CForConditionalGeneration, BioD2CVisionConfig
from biod2c.modeling_biod2c import BioD2CVisionModel

IMPOSSIBLE_VISION = {
    "width": ({"width": 0}, "width=0", "1 or more"),
    "width type": ({"width": "64"}, "width='64'", "whole number"),
    "odd width": ({"width": 7}, "width=7", "even"),
    "no layers": ({"layers": ()}, "out_stage=3", "0 stages"),
    "empty stage": ({"layers": (3, 0, 6, 3)}, "layers=[3, 0, 6, 3]", "1 block or more"),
    "out_stage": ({"out_stage": 5}, "out_stage=5", "from 1 to 4"),
    "out_stage zero": ({"out_stage": 0}, "out_stage=0", "from 1 to 4"),
    "image_size": ({"image_size": 500}, "image_size=500", "a multiple of 16"),
    "image_size zero": ({"image_size": 0}, "image_size=0", "1 or more"),
    "image_size negative": ({"image_size": -32}, "image_size=-32", "1 or more"),
    "image_size of the pool": ({"image_size": 240, "attention_pool": True}, "image_size=240", "a multiple of 32"),
    "pool heads": (
        {"attention_pool": True, "image_size": 224, "attention_pool_heads": 7},
        "attention_pool_heads=7",
        "divide the last stage's 2048",
    ),
    "num_channels": ({"num_channels": 0}, "num_channels=0", "1 or more"),
    "projection_dim": ({"projection_dim": 0}, "projection_dim=0", "1 or more"),
}
IMPOSSIBLE = {
    "question tokens": ({"num_question_tokens": 9}, "num_question_tokens=9", "num_visual_tokens=8"),
    "visual tokens": ({"num_visual_tokens": 0, "num_question_tokens": 0}, "num_visual_tokens=0", "1 or more"),
    "heads": ({"fusion_heads": 5}, "fusion_heads=5", "width 128"),
    "no heads": ({"fusion_heads": 0}, "fusion_heads=0", "1 or more"),
    "no layers": ({"fusion_layers": 0}, "fusion_layers=0", "1 or more"),
    "ffn": ({"fusion_ffn_dim": 0}, "fusion_ffn_dim=0", "1 or more"),
    "mlp": ({"text_mlp_dim": -1}, "text_mlp_dim=-1", "1 or more"),
    "no scales": ({"num_scales": 0}, "num_scales=0", "1 or more"),
    "fraction of a scale": ({"num_scales": 2.5}, "num_scales=2.5", "whole number"),
    "scales as text": ({"num_scales": "six"}, "num_scales='six'", "whole number"),
    "too many scales": ({"num_scales": 4}, "num_scales=4", "at most 3"),
    "dropout": ({"fusion_dropout": 1.0}, "fusion_dropout=1.0", "below 1"),
    "negative dropout": ({"fusion_dropout": -0.1}, "fusion_dropout=-0.1", "at least 0"),
    "positions": ({"image_position_embedding": "learned"}, "image_position_embedding='learned'", "'none', 'sine'"),
    "features": ({"semantic_features": "raw"}, "semantic_features='raw'", "'fused', 'projected'"),
    "divergence": ({"semantic_divergence": "js"}, "semantic_divergence='js'", "'v_t', 't_v'"),
    "similarity": ({"semantic_similarity": "dot"}, "semantic_similarity='dot'", "'tokenwise', 'pooled'"),
    "temperature": ({"semantic_temperature": 0.0}, "semantic_temperature=0.0", "above 0"),
    "negative lambda": ({"semantic_loss_weight": -1.0}, "semantic_loss_weight=-1.0", "0 or more"),
    "queue size": ({"semantic_queue_size": 0}, "semantic_queue_size=0", "1 or more"),
    "vision without a width": ({"vision_config": CLIPConfig()}, "vision_config.model_type='clip'", "backbone"),
    "text without a width": ({"text_config": CLIPConfig()}, "text_config.model_type='clip'", "causal language model"),
    "unknown model": ({"text_config": {"model_type": "lama"}}, "lama", "llama"),
}


@pytest.mark.parametrize(("fields", "named", "allowed"), IMPOSSIBLE_VISION.values(), ids=IMPOSSIBLE_VISION)
def test_impossible_vision_encoder(fields, named, allowed):
    with pytest.raises(ValueError) as error:
        BioD2CVisionConfig(**fields)
    assert f"vision_config.{named}" in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(("fields", "named", "allowed"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_combination(make_config, fields, named, allowed):
    with pytest.raises(ValueError) as error:
        make_config(**fields)
    assert named in str(error.value)
    assert allowed in str(error.value)


def test_a_field_set_later_is_checked_when_the_model_is_built(make_config):
    config = make_config()
    config.num_scales = 5
    with pytest.raises(ValueError, match="num_scales=5"):
        BioD2CForConditionalGeneration(config)


def test_the_ablation_needs_no_scales_to_fit(make_config):
    assert make_config(num_scales=6, use_fusion=False).num_scales == 6


def test_defaults_are_the_papers():
    config = BioD2CConfig()
    assert (config.vision_config.grid_size, config.vision_hidden_size, config.vision_config.stride) == (32, 1024, 16)
    assert sum(4**s for s in range(config.num_scales)) == 1365
    assert (config.gate_init, config.semantic_queue_size, config.semantic_loss_weight) == (0.2, 30, 1.0)
    assert (config.semantic_features, config.semantic_divergence) == ("fused", "v_t")
    assert (config.fusion_layers, config.num_visual_tokens, config.mask_padding) == (12, 32, True)


def test_dictionary_round_trip(make_config, tmp_path):
    config = make_config(gate_init=0.15, semantic_divergence="t_v", image_position_embedding="sine")
    again = BioD2CConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert (again.vision_config.model_type, again.text_config.model_type) == ("biod2c_vision", "llama")
    config.save_pretrained(tmp_path)
    assert BioD2CConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert (tmp_path / "config.json").read_text() == config.to_json_string()


def test_a_classifiers_config_as_vision_config_is_refused(make_config):
    config = make_config(vision_config=BertConfig(hidden_size=64), num_scales=1)  # has a width, but is no backbone
    with pytest.raises(ValueError, match="BertConfig"):
        BioD2CForConditionalGeneration(config)


# ---------------------------------------------------------------------------------------------- other vision backbones

BACKBONES = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic"),
    "resnet, an earlier stage": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage2"]
    ),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], out_features=["stage1", "stage3"]),
    "dinov2": Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14),
    "swin": SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=64, window_size=4),
}


@pytest.mark.parametrize("vision_config", BACKBONES.values(), ids=BACKBONES)
def test_any_transformers_backbone(make_model, processor, make_image, tmp_path, vision_config):
    model = make_model(vision_config=vision_config, num_scales=2)
    assert model.config.vision_hidden_size == AutoBackbone.from_config(vision_config).channels[-1]
    inputs = processor(images=make_image(), text="Where is the liver?")
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = BioD2CForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)


def test_a_backbone_of_another_width_is_refused(make_config):
    """Swin's configuration names its last stage's width whichever stage it gives."""
    swin = SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=64, window_size=4, out_features=["stage1"]
    )
    with pytest.raises(ValueError, match="its hidden_size is 32, but SwinBackbone gives 16"):
        BioD2CForConditionalGeneration(make_config(vision_config=swin, num_scales=2))


def test_a_grid_that_only_the_backbone_knows_is_checked_by_the_model(make_model, processor, make_image):
    model = make_model(vision_config=BACKBONES["dinov2"], num_scales=4)  # 64 pixels, patches of 14: 4 cells a side
    with pytest.raises(ValueError, match="num_scales=4 needs a grid of at least 8 cells a side, got 4"):
        model(**processor(images=make_image(), text="Where is the liver?"))


# ----------------------------------------------------------------------------------------------- other language models

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LANGUAGE_MODELS = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "mistral": {**SIZES, "sliding_window": 16},
    "gemma2": {**SIZES, "sliding_window": 16},
    "gemma3_text": {**SIZES, "sliding_window": 16},
    "phi3": SIZES,
    "gpt_neox": SIZES,
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_any_causal_language_model(make_model, processor, make_image, model_type):
    """Builds, trains a step, and answers a left-padded batch as it answers each row alone."""
    model = make_model(text_config=AutoConfig.for_model(model_type, **LANGUAGE_MODELS[model_type]))
    questions = ["Where?", "Where is the liver, and is it larger than it should be?"]
    images = [make_image(0), make_image(1)]
    batch = processor(images=images, text=questions)
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    answers = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    with torch.no_grad():
        logits = model(**batch).logits[:, -1]
    for row, (image, question) in enumerate(zip(images, questions, strict=True)):
        single = processor(images=image, text=question)
        alone = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert answers[row].tolist() == alone.tolist()
        with torch.no_grad():
            torch.testing.assert_close(logits[row], model(**single).logits[0, -1], atol=1e-5, rtol=0)
    model.train()
    loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] > 290, -100)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.fusion.query_embed.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- PMC-CLIP's own encoder


def test_vision_encoder_alone():
    config = BioD2CVisionConfig(
        layers=(1, 2, 1, 1), width=8, image_size=64, attention_pool=True, attention_pool_heads=4
    )
    model = BioD2CVisionModel(config).eval()
    output = model(torch.randn(2, 3, 64, 64))
    assert output.image_grid.shape == (2, config.hidden_size, config.grid_size, config.grid_size) == (2, 128, 4, 4)
    assert output.image_features.shape == (2, 768)
    trunk = BioD2CVisionModel(BioD2CVisionConfig(layers=(1, 2, 1, 1), width=8, image_size=64))
    assert not any(name.startswith(("layer4", "attnpool")) for name, _ in trunk.named_parameters())

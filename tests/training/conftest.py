"""A small dataset in the project's schema, with real encoded images, and a recipe that trains on it in seconds."""

import io
import time

import pytest
import yaml
from datasets import Dataset

ANSWERS = ("Yes", "No", "the left lung", "MRI")


@pytest.fixture(scope="session")
def make_rows(make_image):
    """Rows of the dataset's schema: `per_image` questions on each image, answers of unequal length, every other queue
    empty."""

    def make(num_images: int, per_image: int, first: int = 0) -> list[dict]:
        from biod2c.dataset_builder.schema import new_row

        rows = []
        for image in range(first, first + num_images):
            buffer = io.BytesIO()
            make_image(image).save(buffer, "PNG")
            rows += [
                new_row(
                    id=f"{image}-{number}",
                    image={"bytes": buffer.getvalue(), "path": None},
                    image_id=f"{image}.png",
                    image_sha256=f"sha-{image}",
                    question=f"Is organ {number} in picture {image}?",
                    answer=ANSWERS[(image + number) % 4],
                    answer_type="closed" if (image + number) % 4 < 2 else "open",
                    queue=["a liver", "the lung", f"organ {number}"] if number % 2 else [],
                    source="slake" if image % 2 else "vqa_rad",
                    **dict.fromkeys(("image_phash", "source_split", "license", "group"), "-"),
                )
                for number in range(per_image)
            ]
        return rows

    return make


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory, make_rows):
    """What `load_dataset` opens: 6 images with 4 questions each to train, 2 more to validate."""
    from biod2c.dataset_builder.schema import FEATURES

    folder = tmp_path_factory.mktemp("dataset")
    splits = {"train": make_rows(6, 4), "validation": make_rows(2, 4, first=6)}
    for split, rows in splits.items():
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def make_recipe(tmp_path, dataset_folder, make_config):
    """Write a recipe with these fields changed; None takes a field out."""

    def make(name: str = "recipe.yaml", **changes):
        config = make_config().to_dict()
        own = (
            "num_visual_tokens",
            "num_question_tokens",
            "num_scales",
            "text_mlp_dim",
            "fusion_layers",
            "fusion_ffn_dim",
        )
        fields = {
            "vocab_size": 299,
            "train": ["vision", "fusion", "language_model"],
            "dataset": str(dataset_folder),
            "config": {
                "vision_config": {"layers": [1, 1, 1], "width": 8, "image_size": 64},
                "text_config": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                },
                **{field: config[field] for field in own},
            },
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in fields.items() if value is not None}))
        return path

    return make


@pytest.fixture(scope="session")
def wait_until():
    """Wait for a condition, at most so many seconds."""

    def wait(condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.02)

    return wait

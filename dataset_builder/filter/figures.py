"""The figures of a dataset: its distinct images, however many rows, splits and configurations show one.

Rows stay on disk (memory-mapped by `datasets`); here lie only the identities and where each image is.
"""

from pathlib import Path

from datasets import Image, concatenate_datasets, get_dataset_config_names, load_dataset

from ..images import BadImageError

COLUMNS = ["image", "image_sha256", "group", "caption"]


class Figures:
    """Figures by their image's sha256: `groups` {sha256: what must stay on one side of a split}, bytes and captions."""

    def __init__(self, folder: Path) -> None:
        """Open every configuration of a dataset that this builder wrote. ValueError where `folder` holds none."""
        configs = load_configs(folder)
        parts = [rows.select_columns(COLUMNS) for splits in configs.values() for rows in splits.values()]
        self.rows = concatenate_datasets(parts).cast_column("image", Image(decode=False))
        self._row: dict[str, int] = {}
        self.groups: dict[str, str] = {}
        names = self.rows.select_columns(["image_sha256", "group"])
        start = 0
        for batch in names.iter(batch_size=10_000):
            for offset, (sha, group) in enumerate(zip(batch["image_sha256"], batch["group"], strict=True)):
                self._row.setdefault(sha, start + offset)
                self.groups.setdefault(sha, group)
            start += len(batch["group"])

    def image(self, sha: str) -> bytes:
        """The source file's bytes. BadImageError where the row holds none."""
        data = self.rows[self._row[sha]]["image"]
        if not data or not data["bytes"]:
            raise BadImageError("the row holds no image")
        return bytes(data["bytes"])

    def caption(self, sha: str) -> str:
        """The caption of the first row that shows the figure, "" without one."""
        return self.rows[self._row[sha]]["caption"] or ""


def load_configs(folder: Path) -> dict:
    """{configuration: {split: rows}} of a dataset's folder. ValueError where it is none, or lacks a column."""
    if not any(folder.rglob("*.parquet")):
        raise ValueError(f"{folder}: holds no Parquet file; give the folder of a dataset, as `biod2c build` writes it")
    configs = {name: load_dataset(str(folder), name) for name in get_dataset_config_names(str(folder))}
    for name, splits in configs.items():
        for split, rows in splits.items():
            if missing := [column for column in COLUMNS if column not in rows.column_names]:
                raise ValueError(f"{folder}: {name}/{split} has no column {missing}; build it with `biod2c build`")
    return configs

"""A built dataset to the Hugging Face Hub: whole, in one commit, and nothing that names a local file.

bad_rows.jsonl and dropped_rows.jsonl stay here: their file names may be a hospital's. The token is read by
huggingface_hub alone, from HF_TOKEN or its own login.
"""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError

from ..hub_retries import reason, with_retries
from .assemble import is_complete, read_build_record
from .report import SourceError

PUSHED = ("README.md", "leakage.md", "leakage.json", "statistics.md", "figures/*", "data/**/*.parquet")


def push_dataset(folder: Path, name: str, private: bool = False) -> str:
    """Make the dataset repo `name`, unless it is there, put the dataset of `folder` into it and return the commit's
    address.

    Raises:
        SourceError: if `folder` holds no finished build, without a token, or if the Hub refuses or does not answer.
    """
    record = read_build_record(folder)
    if record is None or not is_complete(folder, record):
        raise SourceError(f"{folder}: no finished build; build it with `biod2c build all RECIPE.yaml` first")
    if get_token() is None:
        raise SourceError("push needs a token: set HF_TOKEN or run `hf auth login`")
    api = HfApi()
    try:
        repo = with_retries(lambda: api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)).repo_id
        files = {str(path.relative_to(folder)): path for glob in PUSHED for path in sorted(folder.glob(glob))}
        there = with_retries(lambda: api.list_repo_files(repo, repo_type="dataset"))
        stale = [path for path in there if path.startswith("data/") and path not in files]
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path) for path in stale),
            *(CommitOperationAdd(path, local) for path, local in files.items()),
        ]
        message = f"Content {record['content']}"
        commit = with_retries(
            lambda: api.create_commit(repo, changes, commit_message=message, repo_type="dataset", num_threads=2)
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of a file's upload
        raise SourceError(f"push to {name} failed: {reason(error)}. The dataset is whole in {folder}") from error
    return str(commit.commit_url)

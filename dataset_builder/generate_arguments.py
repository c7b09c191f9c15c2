"""The arguments of the verb `generate`, apart from it so that `--help` works without the extra `generate`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to `parser`."""
    parser.add_argument("dataset", help="what load_dataset opens: rows with an image and a caption")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write, and to continue")
    parser.add_argument("--config", help="the dataset's configuration (default: its own default)")
    parser.add_argument("--model", required=True, help="a vision-language model's name at the endpoint")
    parser.add_argument("--base-url", help="an OpenAI-compatible endpoint (default: OPENAI_BASE_URL, or OpenAI)")
    parser.add_argument(
        "--price", nargs=2, type=float, metavar=("IN", "OUT"), help="dollars per million input and output tokens"
    )
    parser.add_argument("--budget", type=float, help="dollars to spend at most, earlier runs included; needs --price")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (default: 16)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one request (default: 120)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of one reply (default: 1024)")
    parser.add_argument(
        "--image-tokens", type=int, default=1445, help="an image's input tokens at most (default: 1445, as GPT-4o)"
    )
    parser.add_argument("--check-blind", metavar="MODEL", help="reject what this text-only model answers blindly")
    parser.add_argument("--blind-url", help="that model's endpoint, its key in BLIND_API_KEY (default: as --base-url)")
    parser.add_argument("--blind-price", nargs=2, type=float, metavar=("IN", "OUT"), help="that model's prices")
    parser.add_argument("--dry-run", action="store_true", help="estimate requests, tokens and dollars; send nothing")

"""Requests a second of the step `generate` against a local server, and what that makes of PMC-OA's 1.65 M pairs.

    python benchmarks/generate.py [--images 2000] [--concurrency 64] [--latency 0.1] [--price 2.5 10]

The server, a process of its own, answers each request `latency` seconds after it has come, so that no client can do
better than concurrency / latency. Images are of 512 x 384 pixels, different ones; answers are recorded (and fsynced)
as in real use. The projection takes the tokens of GPT-4o's own arithmetic for such an image (1 tile in 512 x 512, so
85 + 170) and those of the prompt at four bytes a token; prices are what you give.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from biod2c.dataset_builder.generate import REPLY_TOKENS, GenerateOptions, ask, estimate, generated_rows
from biod2c.dataset_builder.generate_checks import NearDuplicates
from biod2c.dataset_builder.generate_endpoint import Model
from biod2c.dataset_builder.generate_journal import Journal
from biod2c.dataset_builder.images import read_image
from biod2c.dataset_builder.schema import Row, new_row

PMC_OA = 1_650_000
CAPTION = "Axial contrast-enhanced CT of the abdomen, patient {n}: a hypodense lesion in segment VII of the liver. " * 4


def serve(port: "multiprocessing.queues.Queue[int]", latency: float) -> None:
    """A keep-alive HTTP server that answers well, in a process of its own."""
    numbers = itertools.count()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            await asyncio.sleep(latency)
            name = f"m{next(numbers)}"
            pairs = [{"question": f"Where is {kind} {name}?", "answer": f"At {kind}, beside {name}."} for kind in "abc"]
            message = {"role": "assistant", "content": json.dumps({"pairs": pairs})}
            usage = {"prompt_tokens": 700, "completion_tokens": 180}
            body = json.dumps({"model": "local", "choices": [{"message": message}], "usage": usage}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=2**24)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stderr(io.StringIO()):  # connections' ends
        asyncio.run(run())


def rows(count: int) -> Iterator[Row]:
    """Rows of different images and captions."""
    base = np.random.default_rng(0).integers(0, 255, (384, 512), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(base).save(stream, "JPEG", quality=40)
    image = read_image(stream.getvalue())
    for number in range(count):
        yield new_row(
            id=f"bench-{number}",
            image={"bytes": image.data, "path": None},
            image_id=str(number),
            image_sha256=f"{number:064x}",
            image_phash=image.phash,
            question="Describe this image.",
            answer="-",
            caption=CAPTION.format(n=number),
            source="bench",
            source_split="train",
            license="CC0-1.0",
            group=str(number),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--price", type=float, nargs=2, default=(2.5, 10.0), help="$ per million tokens, in and out")
    arguments = parser.parse_args()
    port: multiprocessing.queues.Queue[int] = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port, arguments.latency), daemon=True)
    server.start()
    model = Model("local", f"http://127.0.0.1:{port.get()}/v1", "NO_KEY", tuple(arguments.price), image_tokens=255)
    options = GenerateOptions(model, concurrency=arguments.concurrency)
    with tempfile.TemporaryDirectory() as folder:
        forecast = estimate(rows(1), options, Journal(Path(folder) / "none"))
        with Journal(Path(folder) / "replies.jsonl", write=True) as journal:
            start, cpu = time.perf_counter(), time.process_time()
            assert ask(rows(arguments.images), options, journal) == []
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            start = time.perf_counter()
            made = sum(1 for _ in generated_rows(rows(arguments.images), options, journal, NearDuplicates(), print))
            checking = time.perf_counter() - start
            size = journal.path.stat().st_size
    server.terminate()
    rate = arguments.images / seconds
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(
        f"{rate:.0f} requests/s at {arguments.concurrency} at once, {1000 * arguments.latency:.0f} ms a request: ",
        end="",
    )
    print(f"{100 * rate * arguments.latency / arguments.concurrency:.0f} % of what that allows; ", end="")
    print(f"{1000 * cpu / arguments.images:.1f} ms of CPU and {size / arguments.images:.0f} bytes of record a request")
    print(f"{made} rows made at {arguments.images / checking:.0f} images/s; ", end="")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    tokens_in, tokens_out = forecast.input_tokens, REPLY_TOKENS["generate"]
    dollars = model.usd(tokens_in * PMC_OA, tokens_out * PMC_OA)
    print(
        f"PMC-OA, {PMC_OA / 1e6} M images x ({tokens_in:.0f} input + {tokens_out} output tokens) at ${model.price}: ",
        end="",
    )
    print(f"${dollars:,.0f}; {PMC_OA / rate / 3600:.1f} hours at this rate, or ", end="")
    print(f"{PMC_OA * (tokens_in + tokens_out) / 1e6 / 60:.0f} hours at a limit of 1 M tokens a minute")


if __name__ == "__main__":
    main()

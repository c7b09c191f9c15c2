"""Generation against a real HTTP server that answers well, badly, slowly and not at all; what reached the server is
counted there.
"""

import asyncio
import base64
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from biod2c.cli import main
from biod2c.dataset_builder.generate import GenerateOptions, ask, blind_key, estimate, generated_rows, pairs_key
from biod2c.dataset_builder.generate_checks import NearDuplicates
from biod2c.dataset_builder.generate_endpoint import Model
from biod2c.dataset_builder.generate_journal import GenerateError, Journal
from biod2c.dataset_builder.generate_prompt import PROMPT_SHA256, data_url
from biod2c.dataset_builder.images import read_image
from biod2c.dataset_builder.schema import FEATURES, new_row

KEY = "sk-test-0123456789abcdef"
PRICE = (2.5, 10.0)  # dollars per million tokens
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}
COST = (1000 * PRICE[0] + 100 * PRICE[1]) / 1e6


def pairs_json(*pairs):
    return json.dumps({"pairs": [{"question": q, "answer": a} for q, a in pairs]})


def good_pairs(caption):
    """Two pairs that no check rejects, different for each caption."""
    name = caption.split()[-1]
    return pairs_json((f"Where is the {name} mass?", f"Beside {name}."), (f"How large is {name}?", f"{name} is tiny."))


def completion(content, usage=USAGE):
    body = {"model": "gpt-test-2026", "choices": [{"message": {"role": "assistant", "content": content}}]}
    return 200, {}, json.dumps({**body, "usage": usage})


def asked(request):
    """What the last user message says."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"].removeprefix("caption: ")


class Server:
    """An endpoint whose `behave(request, number)` gives status, headers and body; it counts what it is asked."""

    def __init__(self):
        self.requests, self.answered, self.at_once, self.most_at_once = [], Counter(), 0, 0
        self.behave = lambda request, number: completion(good_pairs(asked(request)))
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append((self.path, self.headers["Authorization"], request))
                    number = len(server.requests)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                answer = server.behave(request, number)
                with server.lock:
                    server.at_once -= 1
                if isinstance(answer, bytes):  # as it stands, and then the connection ends
                    self.wfile.write(answer)
                    self.close_connection = True
                    return
                status, headers, body = answer
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body.encode())
                    self.wfile.flush()
                    server.answered[asked(request)] += 1
                except OSError:  # the client is gone
                    pass

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def make_rows(make_jpeg):
    """Rows about different images with the captions "Scan of m0", "Scan of m1" and so on, or those given."""

    def make(*captions):
        return [caption_row(number, caption, make_jpeg(number, (8, 6))) for number, caption in enumerate(captions)]

    return make


def caption_row(number, caption, data, split="train"):
    image = read_image(data)
    return new_row(
        id=f"src-{number}",
        image={"bytes": data, "path": f"{number}.jpg"},
        image_id=f"{number}.jpg",
        image_sha256=image.sha256,
        image_phash=image.phash,
        question="Describe this image.",
        answer=caption or "none",
        caption=caption,
        source="slake",
        source_split=split,
        license="CC0-1.0",
        group=image.sha256,
    )


@pytest.fixture
def run(server, tmp_path):
    """Ask and make rows: (rows, rejected, journal, notes)."""

    def run(rows, **options):
        blind = options.pop("blind", None)
        model = Model("gpt-test", server.url, price=PRICE, max_tokens=options.pop("max_tokens", 100))
        chosen = GenerateOptions(model, blind, **{"concurrency": 4, "timeout": 5.0, "first_wait": 0.01, **options})
        rejected = []
        with Journal(tmp_path / "replies.jsonl", (KEY,), write=True) as journal:
            notes = ask(rows, chosen, journal)
            made = list(generated_rows(rows, chosen, journal, NearDuplicates(), rejected.append))
        return made, rejected, journal, notes

    return run


def scans(count):
    return [f"Scan of m{number}" for number in range(count)]


# --- what is asked, and the rows that come of it


def test_rows_carry_their_source_and_the_recorded_reply(server, run, make_rows):
    [source] = make_rows("Scan of m0")
    made, rejected, journal, notes = run([source])
    assert [row["id"] for row in made] == ["src-0-q1", "src-0-q2"]
    assert (made[0]["question"], made[0]["answer"]) == ("Where is the m0 mass?", "Beside m0.")
    for name in ("image", "image_sha256", "caption", "source", "source_split", "license", "group"):
        assert made[1][name] == source[name]
    [line] = [json.loads(line) for line in journal.path.read_text().splitlines() if '"reply"' in line]
    generator = {"model": "gpt-test-2026", "prompt_sha256": PROMPT_SHA256, "created": line["created"]}
    assert made[0]["generator"] == generator and made[0]["answer_type"] is None
    assert (line["input_tokens"], line["output_tokens"], line["usd"]) == (1000, 100, pytest.approx(COST))
    assert json.loads(line["body"])["usage"] == USAGE
    assert (rejected, notes) == ([], [])


def test_the_request_is_the_papers(server, run, make_rows):
    run(make_rows("Scan of m0 {x}"))
    [(path, authorization, request)] = server.requests
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    system, user = request["messages"]
    assert "Generate 2-3 clinically meaningful open-ended question-and-answer pairs" in system["content"]
    assert user["content"][0]["text"] == "caption: Scan of m0 {x}"
    assert user["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    schema = request["response_format"]["json_schema"]
    assert schema["strict"] and (schema["schema"]["properties"]["pairs"]["minItems"]) == 2
    assert request["max_completion_tokens"] == 100


def test_the_second_run_asks_nothing_and_gives_the_same_rows(server, run, make_rows):
    rows = make_rows(*scans(6))
    first, second = run(rows), run(rows)
    assert len(server.requests) == 6
    assert first[0] == second[0] and len(first[0]) == 12


def test_the_key_of_a_request_does_not_change(make_rows):
    """A version that computes other keys would pay for every recorded reply again."""
    [row] = make_rows("Scan of m0")
    row["image_sha256"] = "0" * 64
    assert pairs_key(row, Model("gpt-4o", "http://anywhere/v1", max_tokens=7)) == "8f00de1ced9455f6880cb02d844cab32"
    assert blind_key("Where?", Model("gpt-4o")) == "c4971a9d0a52e3b00bc3a9053c1cc76e"


@pytest.mark.parametrize(
    ("kind", "size", "sent"),
    [
        ("JPEG", (40, 30), ("JPEG", (40, 30))),
        ("TIFF", (40, 30), ("PNG", (40, 30))),
        ("PNG", (4096, 64), ("PNG", (2048, 32))),
    ],
)
def test_an_image_is_sent_in_a_format_and_size_that_endpoints_read(kind, size, sent):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    header, data = data_url(file.getvalue()).split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (header, image.format, image.size) == (f"data:image/{sent[0].lower()}", *sent)
    assert (base64.b64decode(data) == file.getvalue()) is (kind == "JPEG")


def test_rows_of_one_image_and_caption_share_a_reply(server, run, make_rows):
    [row] = make_rows("Scan of m0")
    server.behave = lambda request, number: time.sleep(0.05) or completion(good_pairs(asked(request)))
    made, rejected, *_ = run([row, {**row, "id": "src-9"}])
    assert len(server.requests) == 1
    assert rejected == [{"id": "src-9", "reason": "same image and caption as an earlier row"}]
    assert {row["id"] for row in made} == {"src-0-q1", "src-0-q2"}


def test_a_row_without_a_caption_or_with_a_broken_image_is_not_asked(server, run, make_rows):
    rows = make_rows(None, "", "Scan of m2")
    rows[2]["image"] = {"bytes": b"not an image", "path": None}
    made, rejected, _, notes = run(rows)
    assert (made, server.requests) == ([], [])
    assert [line["reason"] for line in rejected] == ["no caption", "no caption", "no answer yet"]
    assert len(notes) == 1 and "cannot identify image" in notes[0]


# --- bad answers

GOOD = good_pairs("m")
BAD_REPLIES = {
    "prose around it": f"Here you are:\n```json\n{GOOD}\n```",
    "one pair": pairs_json(("Where?", "There.")),
    "five pairs": pairs_json(*[(f"Where {n}?", "There.") for n in range(5)]),
    "an empty answer": pairs_json(("Where?", "There."), ("Who?", " \n")),
    "cut JSON": GOOD[: len(GOOD) // 2],
    "no text": None,
    "a further field": json.dumps({"pairs": json.loads(GOOD)["pairs"], "note": 1}),
    "a number": pairs_json(("Where?", 3), ("Who?", "Me.")),
}


@pytest.mark.parametrize("reply", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_bad_reply_is_repaired_once_then_recorded_as_failed(server, run, make_rows, reply):
    rows = make_rows("Scan of m0", "Scan of m1")

    def behave(request, number):
        repaired = len(request["messages"]) == 4 and "m0" in json.dumps(request["messages"][1]["content"][0])
        return completion(GOOD if repaired else reply)

    server.behave = behave
    made, rejected, *_ = run(rows)
    assert {row["id"] for row in made} == {"src-0-q1", "src-0-q2"}
    assert [(line["id"], line["reason"][:16]) for line in rejected] == [("src-1", "unusable reply, ")]
    repairs = [request["messages"] for _, _, request in server.requests if len(request["messages"]) == 4]
    assert [message["role"] for message in repairs[0]] == ["system", "user", "assistant", "user"]
    assert repairs[0][2]["content"] == (reply or "") and "cannot be used: " in repairs[0][3]["content"]
    run(rows)
    assert len(server.requests) == 4  # failed for good: not asked, and not paid, again


@pytest.mark.parametrize("body", ["<html>", '{"error": {"code": 502}}', completion(GOOD)[2][:90], '{"choices": []}'])
def test_a_body_that_is_no_completion_is_no_answer(server, run, make_rows, body):
    server.behave = lambda request, number: (200, {}, body) if number == 1 else completion(GOOD)
    made, _, journal, _ = run(make_rows("Scan of m0"))
    assert len(made) == 2 and "not a chat completion" in journal.path.read_text() and journal.maybe_charged > 0
    assert [len(request["messages"]) for _, _, request in server.requests] == [2, 2]  # asked again, not repaired


# --- a server in trouble


def test_429_waits_as_long_as_retry_after_says(server, run, make_rows):
    times = []

    def behave(request, number):
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, "{}") if number == 1 else completion(GOOD)

    server.behave = behave
    made, _, journal, _ = run(make_rows("Scan of m0"))
    assert len(made) == 2 and 0.4 <= times[1] - times[0] < 1.5
    assert journal.spent == pytest.approx(COST)  # the refusal cost nothing


@pytest.mark.parametrize("status", [500, 503, 408])
def test_a_server_error_is_tried_again(server, run, make_rows, status):
    server.behave = lambda request, number: (status, {}, "no") if number < 4 else completion(GOOD)
    assert len(run(make_rows("Scan of m0"))[0]) == 2 and len(server.requests) == 4


def test_a_time_out_is_tried_again_and_counts_as_charged(server, run, make_rows):
    server.behave = lambda request, number: (number == 1 and time.sleep(0.6)) or completion(GOOD)
    made, _, journal, _ = run(make_rows("Scan of m0"), timeout=0.3)
    assert len(made) == 2 and len(server.requests) == 2
    assert journal.maybe_charged > 0 and journal.spent == pytest.approx(COST + journal.maybe_charged)


@pytest.mark.parametrize(
    "wire",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"ch', b"SSH-2.0-\r\n\r\n"],
)
def test_an_answer_cut_on_the_wire_is_tried_again(server, run, make_rows, wire):
    server.behave = lambda request, number: wire if number == 1 else completion(GOOD)
    made, _, journal, _ = run(make_rows("Scan of m0"))
    assert len(made) == 2 and len(server.requests) == 2 and journal.maybe_charged > 0


def test_a_refused_request_is_that_rows_end_and_the_next_run_asks_again(server, run, make_rows):
    refused = '{"error": {"message": "content policy"}}'
    server.behave = lambda request, number: (400, {}, refused) if "m1" in asked(request) else completion(GOOD)
    made, rejected, _, notes = run(make_rows("Scan of m0", "Scan of m1"))
    assert len(made) == 2 and rejected == [{"id": "src-1", "reason": "no answer yet"}]
    assert len(server.requests) == 2 and "HTTP 400" in notes[0] and "content policy" in notes[0]
    server.behave = lambda request, number: completion(good_pairs(asked(request)))
    assert len(run(make_rows("Scan of m0", "Scan of m1"))[0]) == 4 and len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "code"), [(401, None), (403, None), (404, "model_not_found"), (429, "insufficient_quota")]
)
def test_a_wrong_key_or_model_stops_the_run(server, run, make_rows, status, code):
    body = json.dumps({"error": {"message": f"refused {KEY}", "code": code}})
    server.behave = lambda request, number: (status, {}, body)
    with pytest.raises(GenerateError, match="refused: HTTP") as error:
        run(make_rows(*scans(40)))
    assert len(server.requests) <= 4 and KEY not in str(error.value)


def test_an_endpoint_that_is_not_there_stops_the_run(server, run, make_rows, tmp_path):
    server.url = "http://127.0.0.1:1/v1"
    with pytest.raises(GenerateError, match="20 requests in a row"):
        run(make_rows(*scans(40)), budget=1.0)
    assert Journal(tmp_path / "replies.jsonl").spent == 0  # what never left costs nothing


# --- limits


def test_no_more_requests_at_once_than_allowed(server, run, make_rows):
    server.behave = lambda request, number: time.sleep(0.03) or completion(good_pairs(asked(request)))
    run(make_rows(*scans(24)), concurrency=5)
    assert server.most_at_once == 5


@pytest.mark.parametrize("usage", [USAGE, None])
def test_the_budget_stops_before_it_is_exceeded_and_a_higher_one_goes_on(server, run, make_rows, usage):
    server.behave = lambda request, number: time.sleep(0.01) or completion(good_pairs(asked(request)), usage)
    rows = make_rows(*scans(12))
    budget = 5 * COST + 0.02
    made, rejected, journal, notes = run(rows, budget=budget, concurrency=8)
    asked_first = len(server.requests)
    assert journal.spent <= budget and 1 <= asked_first < 12
    if usage:  # what the server charged, by its own count; and the budget was used
        assert asked_first * COST <= budget and asked_first >= 5
    assert "budget" in notes[0] and len(rejected) == 12 - asked_first and len(made) == 2 * asked_first
    run(rows, budget=budget)
    assert len(server.requests) == asked_first  # earlier runs count
    run(rows, budget=10.0)
    assert len(server.requests) == 12


def test_a_dearer_image_than_foreseen_raises_what_is_set_aside(server, run, make_rows):
    dear = {"prompt_tokens": 50_000, "completion_tokens": 100}
    server.behave = lambda request, number: completion(good_pairs(asked(request)), dear)
    *_, journal, _ = run(make_rows(*scans(12)), budget=0.3, concurrency=1)
    assert len(server.requests) == 2 and journal.spent <= 0.3  # 0.126 each


def test_the_estimate_is_near_what_it_then_costs(server, run, make_rows, tmp_path):
    rows = make_rows(*scans(8))
    options = GenerateOptions(Model("gpt-test", server.url, price=PRICE, image_tokens=700))
    before = estimate([*rows, rows[0]], options, Journal(tmp_path / "none.jsonl"))
    assert (before.requests, server.requests) == (8, [])
    assert before.usd < before.most_usd and not (tmp_path / "none.jsonl").exists()
    *_, journal, _ = run(rows)
    more = estimate(make_rows(*scans(9)), options, journal)
    assert (more.requests, more.input_tokens, more.output_tokens) == (1, 1000, 100)  # as measured so far
    assert more.usd == pytest.approx(COST)


# --- checks against other models and pairs


def test_pairs_that_a_blind_model_answers_are_rejected(server, run, make_rows):
    def behave(request, number):
        if request["model"] == "text-only":
            return completion("Beside m0." if "m0 mass" in asked(request) else "unknown")
        return completion(good_pairs(asked(request)))

    server.behave = behave
    made, rejected, journal, _ = run(make_rows(*scans(2)), blind=Model("text-only", server.url, price=PRICE))
    assert [(line["id"], line["reason"]) for line in rejected] == [("src-0-q1", "answerable without the image")]
    assert len(made) == 3 and journal.totals["blind"].replies == 4
    blind = [request for _, _, request in server.requests if request["model"] == "text-only"]
    assert "image_url" not in json.dumps(blind) and "response_format" not in blind[0]


# --- killed, and the record


def write_dataset(folder, rows):
    folder.mkdir(parents=True)
    Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "train.parquet")
    return str(folder)


def command(server, dataset, output, *more):
    fixed = ["--base-url", server.url, "--model", "gpt-test", "--concurrency", "4"]
    return ["generate", dataset, "--output", str(output), *fixed, *more]


def test_kill_9_pays_nothing_twice_and_loses_nothing(server, make_rows, tmp_path):
    rows = make_rows(*scans(40))
    dataset, output = write_dataset(tmp_path / "in", rows), tmp_path / "out"
    server.behave = lambda request, number: time.sleep(0.05) or completion(good_pairs(asked(request)))
    arguments = [sys.executable, "-m", "biod2c.dataset_builder", *command(server, dataset, output)]
    process = subprocess.Popen(arguments, env={**os.environ, "HF_HOME": str(tmp_path / "hf")})
    while sum(server.answered.values()) < 12:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)  # the server ends what was under way
    journal = output / "replies.jsonl"
    whole = [json.loads(line) for line in journal.read_text().split("\n")[:-1]]
    recorded = {line["row"] for line in whole if line["event"] == "reply"}
    assert 8 <= len(recorded) < 40
    with journal.open("a") as file:
        file.write('{"event": "reply", "key": "half a li')  # as if the power had gone too
    assert main(["build", *command(server, dataset, output)]) == 0
    paid = Counter({caption: count for caption, count in server.answered.items() if count > 1})
    captions = {row["id"]: row["caption"] for row in rows}
    assert not {captions[row] for row in recorded} & paid.keys()  # what was recorded was asked once
    assert len(paid) <= 4  # under way at the kill, at most as many as there were at once
    made = load_dataset(str(output), split="train")
    assert sorted(made["id"]) == sorted(f"src-{n}-q{q}" for n in range(40) for q in (1, 2))
    requests = len(server.requests)
    assert main(["build", *command(server, dataset, output)]) == 0
    assert len(server.requests) == requests


def test_a_full_disk_stops_the_run_and_the_next_goes_on(server, run, make_rows):
    rows, limits = make_rows(*scans(12)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            run(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 1 <= len(server.requests) < 12
    made, rejected, journal, _ = run(rows)
    assert len(made) == 24 and rejected == [] and journal.skipped_lines <= 1
    assert len(server.requests) <= 12 + 4  # asked again: at most what was under way


def test_a_second_process_may_not_write_the_same_record(tmp_path):
    with (
        Journal(tmp_path / "replies.jsonl", write=True),
        pytest.raises(GenerateError, match="another process"),
    ):
        Journal(tmp_path / "replies.jsonl", write=True)


def test_what_was_under_way_at_a_kill_counts_in_full(tmp_path):
    with Journal(tmp_path / "replies.jsonl", write=True) as journal:
        journal.sent("a", "generate", "src-0", 0.5)
        journal.sent("b", "generate", "src-1", 0.5)
        columns = {"model": "m", "prompt_sha256": "p", "input_tokens": 1, "output_tokens": 1, "body": ""}
        asyncio.run(journal.answered("b", "generate", "src-1", usd=0.1, **columns))
    assert Journal(tmp_path / "replies.jsonl").spent == pytest.approx(0.6)


# --- the verb


def test_the_verb_writes_a_dataset_and_the_key_nowhere(server, make_rows, tmp_path, capsys):
    rows = make_rows("Scan of m0", "Scan of m1", "Scan of m2")
    dataset, output = write_dataset(tmp_path / "in", rows), tmp_path / "out"
    leak = pairs_json(("What does the caption say?", KEY), ("Where is m1?", "Left of m1."))

    def behave(request, number):  # a server that echoes the key, in an error and in an answer
        if number == 1:
            return 500, {}, json.dumps({"error": {"message": f"bad {request['model']} {KEY}"}})
        return completion(leak if "m1" in asked(request) else good_pairs(asked(request)))

    server.behave = behave
    prices = ["--price", "2.5", "10", "--budget", "1"]
    assert main(["build", *command(server, dataset, output, *prices, "--dry-run")]) == 0
    assert "3 images left to ask: 3 requests" in capsys.readouterr().out and not output.exists()
    assert main(["build", *command(server, dataset, output, *prices)]) == 0
    printed = capsys.readouterr()
    assert "1 x pair: speaks of the caption" in printed.out and "3 generate replies: 3000 input" in printed.out
    made = load_dataset(str(output), split="train")
    assert (made.num_rows, made.features) == (5, FEATURES)
    [rejected] = map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    assert (rejected["id"], rejected["reason"]) == ("src-1-q1", "speaks of the caption")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6 and not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in printed.out + printed.err


def test_the_key_of_one_endpoint_is_not_sent_to_another(server, make_rows, tmp_path):
    other = Server()
    other.behave = lambda request, number: completion("unknown")
    dataset = write_dataset(tmp_path / "in", make_rows("Scan of m0"))
    blind = ["--check-blind", "text-only", "--blind-url", other.url]
    assert main(["build", *command(server, dataset, tmp_path / "out", *blind)]) == 0
    other.http.shutdown()
    other.http.server_close()
    assert [authorization for _, authorization, _ in other.requests] == ["Bearer none"] * 2
    assert load_dataset(str(tmp_path / "out"), split="train").num_rows == 2


def test_the_verbs_errors_are_one_line(server, make_rows, tmp_path, capsys, monkeypatch):
    dataset, output = write_dataset(tmp_path / "in", make_rows("Scan of m0")), tmp_path / "out"
    assert main(["build", *command(server, dataset, output, "--budget", "1")]) == 2
    assert main(["build", *command(server, str(tmp_path / "no"), output)]) == 2
    assert main(["build", *command(server, dataset, tmp_path / "in")]) == 2
    assert main(["build", *command(server, dataset, tmp_path)]) == 2
    assert main(["build", *command(server, dataset, output, "--concurrency", "0")]) == 2
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(["build", "generate", dataset, "--output", str(output), "--model", "gpt-test"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "biod2c build: " in line]  # not progress bars
    found = ["needs --price", "cannot open it", "dataset that is read", "not empty", "--concurrency is 0"]
    assert all(message in line for message, line in zip([*found, "OPENAI_API_KEY is not set"], errors, strict=True))
    assert server.requests == []

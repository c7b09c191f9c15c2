"""The labelling page in a real browser: the command is started, keys are pressed, the command is killed and started
again."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

from biod2c.dataset_builder.filter.labels import seeded_order

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
NASTY = "A <script>alert(1)</script> ${1 + 1} {{ figure }} & more"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(BROWSERS)} is installed"),
]


@pytest.fixture
def small(make_dataset, figures):
    """A dataset of three figures of each kind, one of them broken, and their order under seed 0."""
    rows = [(data, group, NASTY) for data, _, group in figures[:6]]
    rows.append((figures[6][0][:500], "broken", None))
    return make_dataset(rows), seeded_order([hashlib.sha256(data).hexdigest() for data, _, _ in rows], 0)


@contextmanager
def annotating(dataset, labels, annotator):
    """The page's address, while the command runs; at the end it is killed."""
    command = [sys.executable, "-u", "-m", "biod2c.dataset_builder", "annotate", dataset, "--labels", labels]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO")}
    process = subprocess.Popen([*command, "--annotator", annotator], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield address.group()
                return
        raise AssertionError(f"the command ended: {printed}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def open_page():
    """Open an address in the browser; returns the page and the addresses that it asked for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])

        def open_it(address):
            page = browser.new_page(viewport={"width": 1100, "height": 800})
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            return page, asked

        yield open_it
        browser.close()


def shown(page, sha):
    """Wait until the page shows this figure ("" when none is left)."""
    page.wait_for_function("sha => document.querySelector('#shown textarea, #shown input')?.value === sha", arg=sha)


def written(labels):
    return [(line["image_sha256"], line["label"]) for line in map(json.loads, labels.read_text().splitlines())]


def test_keys_label_figures_and_a_killed_page_goes_on(small, tmp_path, open_page):
    dataset, order = small
    labels = tmp_path / "labels.jsonl"
    with annotating(dataset, labels, "ann") as address:
        page, asked = open_page(address)
        shown(page, order[0])
        page.get_by_text("0 of 7 labelled by ann").wait_for()
        for key, sha in zip("cPub", [*order[1:4], order[2]], strict=True):  # the last goes back to the third
            page.keyboard.press(key)
            shown(page, sha)
        page.get_by_text("this one as unsure").wait_for()
        page.keyboard.press("c")
        shown(page, order[3])
        page.get_by_text("3 of 7 labelled by ann").wait_for()
        assert not [
            url for url in asked if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))
        ]
    assert written(labels) == [(order[0], "clean"), (order[1], "polluted"), (order[2], "unsure"), (order[2], "clean")]
    with annotating(dataset, labels, "ann") as address:
        page, _ = open_page(address)
        for sha in [*order[3:], ""]:
            shown(page, sha)
            page.keyboard.press("p")
        page.get_by_text("All figures are labelled").wait_for()
    assert [sha for sha, _ in written(labels)[4:]] == order[3:]


def test_images_and_captions_as_they_are_and_a_second_annotator_blind(small, tmp_path, open_page):
    dataset, order = small
    labels = tmp_path / "labels.jsonl"
    labels.write_text(
        "".join(
            json.dumps({"image_sha256": sha, "label": "polluted", "annotator": "ann", "time": "2026-01-01"}) + "\n"
            for sha in order
        )
    )
    with annotating(dataset, labels, "bob") as address:
        page, _ = open_page(address)
        captions = []
        for number, sha in enumerate(order):
            shown(page, sha)
            assert "this one as" not in page.locator("body").inner_text()
            captions.append(page.locator("#figure figcaption").inner_text())
            images = page.locator("#figure img")
            if captions[-1] == "no caption":
                assert "cannot be read" in page.locator("#figure").inner_text()
            else:
                assert images.evaluate("image => image.complete && image.naturalWidth > 50")
            page.get_by_role("button", name="clean (c)").dblclick()  # the second click finds its figure labelled
            shown(page, [*order, ""][number + 1])
        assert sorted(captions) == sorted([NASTY] * 6 + ["no caption"])
    assert written(labels)[7:] == [(sha, "clean") for sha in order]

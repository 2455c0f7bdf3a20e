"""`make docs` builds strictly, its links lead somewhere, nothing comes from elsewhere, and a browser can use it."""

from __future__ import annotations

import functools
import html.parser
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
TELEPHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


class Page(html.parser.HTMLParser):
    """What a page of the site refers to, what can be referred to in it, and what a browser fetches for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "stylesheet icon preload preconnect".count(given.get("rel", "-").split()[0]):
            self.fetched.append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module, reason=f"{module} is not installed; the extra docs has it")
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": ":".join(sys.path)},
    )
    said = made.stdout + made.stderr
    assert made.returncode == 0, said
    assert "WARNING" not in said
    return folder


@cache
def read(path: Path) -> Page:
    return Page(path)


def test_navigation_lists_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert sorted(re.findall(r"^ +- (\w+)\.md$", text, re.MULTILINE)) == PAGES


def test_site_has_every_page(site: Path) -> None:
    assert [name for name in PAGES if not (site / f"{name}.html").is_file()] == []
    assert not list(site.rglob("*.py"))


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    lost = []
    for path in site.glob("*.html"):
        for link in [*read(path).links, *read(path).fetched]:
            target, anchor = urldefrag(link)
            if target.startswith(("http:", "https:", "mailto:")) or path.name == "404.html":
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file.suffix == ".html" and unquote(anchor) not in read(file).ids):
                lost.append(f"{path.name}: {link}")
    assert lost == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    foreign = {link for path in site.glob("*.html") for link in read(path).fetched if re.match(r"(https?:)?//", link)}
    assert foreign == set()


def test_equations_are_mathml(site: Path) -> None:
    for name in ("adamw", "lamb", "adafactor", "came", "galore", "badam"):
        text = (site / f"{name}.html").read_text()
        assert text.count("<math") >= 3, name
        assert "\\frac" not in text.split("</main>")[0].split("<main")[1], name


def test_search_index_has_every_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert {entry["location"].partition("#")[0].removesuffix(".html") for entry in index["docs"]} >= set(PAGES)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra test has it")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium; Debian has it as a package of this name")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


def opened(browser: Any, address: str, size: dict[str, int]) -> tuple[Any, list[str]]:
    """A tab, and a list of what its console says, of what failed, and of what was asked of other servers."""
    page = browser.new_page(viewport=size)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    # What a page still fetches when the next one is opened is given up, and is no failure.
    page.on("requestfailed", lambda request: None if "ABORTED" in str(request.failure) else said.append(request.url))
    page.on("request", lambda request: None if request.url.startswith(address) else said.append(request.url))
    return page, said


@pytest.mark.parametrize("size", [TELEPHONE, DESKTOP], ids=["telephone", "desktop"])
def test_pages_are_as_wide_as_the_screen_and_say_nothing(address: str, browser: Any, size: dict[str, int]) -> None:
    wrong = {}
    page, said = opened(browser, address, size)
    for name in PAGES:
        said.clear()
        page.goto(f"{address}/{name}.html")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > size["width"] or said:
            wrong[name] = (width, list(said))
    assert wrong == {}


def test_search_finds_a_page(address: str, browser: Any) -> None:
    page, said = opened(browser, address, DESKTOP)
    page.goto(f"{address}/index.html")
    page.fill(".md-search__input", "subnormal")
    page.wait_for_selector(".md-search-result__link", timeout=20_000)
    found = [link.get_attribute("href") for link in page.query_selector_all(".md-search-result__link")]
    assert any("numerics.html" in link for link in found)
    page.click(".md-search-result__link >> nth=0")
    page.wait_for_url("**/numerics.html*")
    assert said == []

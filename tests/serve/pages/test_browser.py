"""The pages in a real browser: claimed, edited and exported; tinted; nobody twice; and usable by all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import answered, asked, done
from fastapi import FastAPI
from parrot import Parrot

from gyrocompass.core.store import Store
from gyrocompass.serve.answer import Token
from gyrocompass.serve.app import make_app
from gyrocompass.serve.assembly import assemble, make_lane
from gyrocompass.serve.feedback import export
from gyrocompass.serve.keys import create_key
from gyrocompass.serve.review import Reviews, ReviewSettings
from gyrocompass.serve.services import OneWay, ServeSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
Serve = Callable[[Any], str]
ONCE = ReviewSettings(double_share=0.0)


def app_of(store: Store) -> FastAPI:
    ways = OneWay(make_lane(store, Parrot()))
    return make_app(assemble(store, ways, reviews=ONCE), ServeSettings())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Site:
    """A server with one item to decide on, and a key for it."""

    def __init__(self, store: Store, served: Serve) -> None:
        self.store = store
        self.key = create_key(store.database, "ann", ["infer", "review"])
        self.other = create_key(store.database, "bob", ["review"])
        tokens = [
            Token("It ", 1, -0.01, 0.1, []),
            Token("is ", 2, -0.1, 0.1, []),
            Token("five", 3, -4.0, 1.0, [("four", -0.5)]),
        ]
        answer = answered("It is five")._replace(tokens=tokens)
        self.item = done(Reviews(store.database, ONCE).put(asked(), answer, ["doubt"], None, 1.0))
        self.url = served(app_of(store))

    def log_in(self, browser: Any, key: str, **context: Any) -> Any:
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(15_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and page.errors.append(said.text))
        page.goto(self.url)
        page.fill("#key", key)
        page.click("text=Log in >> nth=-1")
        page.wait_for_url("**/overview")
        return page


@pytest.fixture
def site(tmp_path: Path, served: Serve) -> Site:
    return Site(Store(tmp_path / "store"), served)


def test_claim_edit_approve_ends_as_an_exported_row(site: Site, browser: Any) -> None:
    page = site.log_in(browser, site.key)
    page.goto(f"{site.url}/review")
    with page.expect_navigation(url=f"**/review/{site.item}"):
        page.keyboard.press("n")
    assert page.locator(".lease").inner_text().startswith("yours for")
    shades = [page.locator(".tokens > .t").nth(n).get_attribute("class") for n in range(3)]
    assert shades == ["t p0", "t p0", "t p3"]
    colours = page.eval_on_selector_all(
        ".tokens > .t", "all => all.map(t => getComputedStyle(t).backgroundColor)"
    )
    assert colours[2] != colours[0]
    assert not page.locator(".tip").nth(2).is_visible()
    page.locator(".tokens > .t").nth(2).focus()
    assert page.locator(".tip").nth(2).is_visible() and "four" in page.locator(".tip").nth(2).inner_text()
    page.locator("body").press("e")
    page.fill("#text", "It is four.")
    page.keyboard.press("Escape")
    with page.expect_navigation(url="**/review"):
        page.keyboard.press("e")
    assert page.locator(".tabs").inner_text().count("decided (1)") == 1
    assert page.errors == []
    done = export(site.store)
    (row,) = [json.loads(line) for line in (done.artifact.path / "preference.jsonl").read_text().splitlines()]
    assert (row["chosen"], row["rejected"]) == ("It is four.", "It is five")
    assert row["provenance"]["review"] == site.item


def test_a_second_person_cannot_claim_it(site: Site, browser: Any) -> None:
    first, second = site.log_in(browser, site.key), site.log_in(browser, site.other)
    for page in (first, second):
        page.goto(f"{site.url}/review/{site.item}")
    first.click("text=Claim")
    first.wait_for_selector("text=Approve")
    second.click("text=Claim")
    assert "somebody else has this item" in second.locator("[role=alert]").inner_text()
    second.goto(f"{site.url}/review")
    second.click("text=Next item")
    second.wait_for_load_state()
    assert second.url.endswith("/review")


def test_the_playground_shows_tokens_without_a_new_page(site: Site, browser: Any) -> None:
    page = site.log_in(browser, site.key)
    page.goto(f"{site.url}/playground")
    page.evaluate("window.same = true")
    page.fill("#prompt", "<b>hi</b>")
    page.click("button.main")
    page.wait_for_selector(".tokens")
    assert page.locator(".tokens > .t").count() == 9 and page.locator("main b").count() == 0
    assert page.evaluate("window.same") is True
    assert page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_no_serious_fault_for_anybody(site: Site, browser: Any, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = site.log_in(
        browser, site.key, viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    for path in ("/overview", "/review", f"/review/{site.item}", "/models", "/runs", "/playground"):
        page.goto(site.url + path)
        found = Axe().run(page).response["violations"]
        serious = [
            (one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")
        ]
        assert serious == [], path
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            f"{path} is wider than {width}"
        )
    assert page.errors == []

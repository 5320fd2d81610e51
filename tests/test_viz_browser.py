"""The page in a real browser: what a reader can see and do, by keyboard alone, from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium, why_not
from pages import IMAGE, SCRIPT, failed_trace, hostile_diff, large_diff, pipeline_trace, small_diff

from autodeploy.viz.page import render_page

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

MAX_BOXES = 150
BOXES = ".box, .frame"
SMALL = f"(pane) => pane.querySelectorAll('{BOXES}').length <= {MAX_BOXES}"
SELECTED = "document.querySelector('.selected')?.dataset.key"
# Milliseconds until a key has done all its work and the page is laid out again.
TIMED = """(() => {
  const start = performance.now();
  document.dispatchEvent(new KeyboardEvent('keydown', { key: arguments[0], bubbles: true }));
  document.body.getBoundingClientRect();
  return performance.now() - start;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def show(browser: Chromium, tmp_path: Path) -> Iterator[Any]:
    """Opens a trace or diff; the console must have stayed silent in the end."""

    def open_page(shown: Any) -> Chromium:
        path = tmp_path / "page.html"
        path.write_text(render_page(shown))
        browser.errors()
        browser.open(path)
        return browser

    yield open_page
    assert browser.errors() == []


def test_loads_without_network(show) -> None:
    page = show(pipeline_trace())
    assert 5 < page.count(BOXES) <= MAX_BOXES
    assert page.run("performance.getEntriesByType('resource').length") == 0
    assert page.text("#passes .current .pass") == "all passes"


def test_only_changed_branches_are_open(show) -> None:
    page = show(small_diff())
    assert page.count(".frame") == 2  # layers.0 and its attention; the other two layers are alike
    assert page.text(".box:has(.shadow)").count("2 ") >= 1
    page = show(pipeline_trace())
    go_to(page, "share_metadata")
    frames = page.run("[...document.querySelectorAll('.frame .name')].map((name) => name.firstChild.data)")
    assert any("layers.0" in frame for frame in frames)
    assert not any("layers.2" in frame for frame in frames)


def test_opening_and_closing(show) -> None:
    page = show(pipeline_trace())
    page.press("c")
    closed = page.count(BOXES)
    assert page.count(".frame") == 0
    page.press("ArrowDown", "Enter")
    opened = page.run(SELECTED)
    assert page.count(".frame") == 1
    page.press("Enter")
    assert (page.count(BOXES), page.run(SELECTED)) == (closed, opened)
    page.click(".box[data-key^=g]")
    assert page.count(".frame") == 1
    page.press("e")
    assert page.count(".frame") == 0 or page.count(BOXES) != closed


def go_to(page: Chromium, name: str) -> None:
    steps = page.run("[...document.querySelectorAll('#passes .pass')].map((pass) => pass.textContent)")
    page.click(f"#passes li:nth-child({steps.index(name) + 1}) button")


def test_search(show) -> None:
    page = show(pipeline_trace())
    page.press("/")
    page.type("layers.3 sdpa_paged")
    assert page.count("#found div") == 1
    page.press("Enter")
    assert "sdpa_paged_attention" in page.text("#details h2")
    assert page.text(".selected .name").endswith("sdpa_paged_attention")
    assert page.count(BOXES) <= MAX_BOXES
    page.press("/")
    page.run("document.querySelector('#query').select()")
    page.type(r"/rotary.*(cos|sin)$")
    found = page.run("[...document.querySelectorAll('#found b')].map((name) => name.textContent)")
    assert page.count("#found div") == 0 or all(name[:3] in ("cos", "sin") for name in found)
    page.press("/", "Escape")
    assert page.run("document.activeElement.id") != "query"


def test_changes_by_keyboard(show) -> None:
    page = show(small_diff())
    page.press("n")
    first = page.run(SELECTED)
    assert page.count("#changes .current") == 1
    page.press("N")
    second = page.run(SELECTED)
    page.press("P")
    assert page.run(SELECTED) == first != second
    page = show(pipeline_trace())
    seen = set()
    for _ in range(6):
        page.press("n")
        seen.add(page.run(SELECTED))
        assert page.count(BOXES) <= MAX_BOXES
    page.press("p")
    assert len(seen) > 3
    assert page.run(SELECTED) in seen


def test_views_share_one_selection(show) -> None:
    page = show(pipeline_trace())
    page.press("n", "n")
    key = page.run(SELECTED)
    page.press("2")
    assert page.count(".pane") == 2
    assert page.run("[...document.querySelectorAll('.selected')].every((box) => box.dataset.key === arguments[0])", key)
    page.press("3")
    assert page.count(".outline") == 1
    assert page.run(SELECTED) == key
    page.press("ArrowDown")
    moved = page.run(SELECTED)
    page.press("1")
    assert page.run(SELECTED) == moved != key


SEEN = """(() => {
  const pane = document.querySelector('.pane').getBoundingClientRect();
  const isSeen = (box) => {
    const { left, right, top, bottom } = box.getBoundingClientRect();
    return left >= pane.left && right <= pane.right && top >= pane.top && bottom <= pane.bottom;
  };
  const boxes = [...document.querySelectorAll('.box .border')];
  return [boxes.filter(isSeen).length, boxes.length, document.querySelectorAll('.box:not(.unchanged)').length];
})()"""


def test_each_step_shows_what_it_changed(show) -> None:
    """All of it in the window: nothing has to be scrolled to."""
    trace = pipeline_trace()
    page = show(trace)
    for index in range(page.count("#passes li")):
        assert page.run("Number(document.querySelector('#slider').value)") == index
        seen, drawn, changed = page.run(SEEN)
        assert seen == drawn
        assert changed > 0 or trace.diff(max(index - 1, 0), index).is_empty
        page.press("j")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "lfm2", "mixtral"])
def test_the_first_screen_of_share_metadata(show, model_type: str) -> None:
    """These layers' metadata became that node, and who reads it."""
    page = show(pipeline_trace(model_type=model_type))
    go_to(page, "share_metadata")
    links = page.run("[...document.querySelectorAll('.link title')].map((title) => title.textContent)")
    assert any("nodes became this" in link for link in links)
    assert any("read" in link for link in links)
    frames = page.run("[...document.querySelectorAll('.frame .name')].map((name) => name.firstChild.data)")
    assert any("before, layer by layer" in frame for frame in frames)
    boxes = page.run("[...document.querySelectorAll('.box[data-key^=g] .name')].map((name) => name.textContent)")
    assert len([name for name in frames + boxes if "prepare_metadata" in name]) == 1
    assert page.count(".box[aria-label*='prepare_metadata = ']") == 0  # its frame is all there is of it


def test_counts_are_those_of_the_diff(show) -> None:
    """Legend and timeline, of every step."""
    trace = pipeline_trace()
    page = show(trace)
    last = len(trace.stages) - 1
    for first, second in [(0, last), *((index, index + 1) for index in range(last))]:
        diff = trace.diff(first, second)
        legend = page.run("[...document.querySelectorAll('#legend .key')].map((key) => key.textContent)")
        assert [f"{kind} {number}" for kind, number in diff.counts.items()] == [
            text[1:].strip() for text in legend[: len(diff.counts)]
        ]
        number = sum(diff.counts.values()) - diff.counts["unchanged"]
        assert page.text("#passes .current .count") == (f"{number} nodes" if number else "no change")
        page.press("j")


def test_an_address_names_a_place(show, browser: Chromium, tmp_path: Path) -> None:
    page = show(pipeline_trace())
    go_to(page, "share_metadata")
    page.press("/")
    page.type("sdpa_paged_attention layers.2")
    page.press("Enter", "3")
    address = page.run("location.hash")
    name = page.text("#details h2")
    assert address == f"#step=share_metadata&node={name}&view=text"
    page.open(tmp_path / "page.html")
    page.run(f"location.assign({address!r})")
    assert page.text("#passes .current .pass") == "share_metadata"
    assert page.text("#details h2") == name
    assert page.count(".outline") == 1


def test_zoom_stays_at_the_pointer(show) -> None:
    page = show(pipeline_trace())
    page.press("+", "+", "+", "+", "+")
    at = "(document.querySelector('.box').getBoundingClientRect())"
    x, y = page.run(f"[{at}.x, {at}.y]")
    page.run(
        "document.querySelector('.pane').dispatchEvent(new WheelEvent('wheel', "
        "{deltaY: -1, ctrlKey: true, bubbles: true, clientX: arguments[0], clientY: arguments[1]}))",
        x,
        y,
    )
    moved = page.run(f"[{at}.x, {at}.y]")
    assert max(abs(moved[0] - x), abs(moved[1] - y)) < 4


def test_panels_close_and_phones_are_wide_enough(show, tmp_path: Path) -> None:
    page = show(pipeline_trace())
    assert page.count("#changes:not([hidden])") == 1
    page.click("header [data-act=changes]")
    assert page.count("#changes:not([hidden])") == 0
    page.press("n")
    page.click("#details .close")
    assert page.count("#details:not([hidden])") == 0
    with Chromium(tmp_path / "phone", (500, 844)) as phone:
        phone.open(tmp_path / "page.html")
        assert phone.count("#changes:not([hidden])") == 0
        assert phone.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert phone.run("document.querySelector('#stage').clientHeight > 0.4 * window.innerHeight")


def test_slider_and_greyed_passes(show) -> None:
    page = show(pipeline_trace())
    page.run("document.querySelector('#slider').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert page.text("#passes .current .pass") == "find_attention"
    trace = pipeline_trace()
    greyed = page.run("[...document.querySelectorAll('#passes .empty .pass')].map((pass) => pass.textContent)")
    last = range(1, len(trace.stages))
    assert greyed == [trace.stages[index].name for index in last if trace.diff(index - 1, index).is_empty]


def test_details_tell_what_made_a_node_and_what_it_came_from(show) -> None:
    page = show(pipeline_trace())
    page.press("/")
    page.type("sdpa_paged_attention layers.0")
    page.press("Enter")
    details = page.text("#details")
    for part in ("call_function", "autodeploy.sdpa_paged_attention", "model.layers.0.self_attn", ".py:", "attention"):
        assert part in details
    assert "made byinsert_cached_attention" in details
    assert "came from" in details
    page.click("#details [data-step]")
    assert page.text("#passes .current .pass") == "insert_cached_attention"


def test_far_reaching_tensors_are_names(show) -> None:
    page = show(pipeline_trace(num_layers=10))
    page.press("/")
    page.type("sdpa_paged_attention layers.0")
    page.press("Enter")
    names = page.run("[...document.querySelectorAll('.selected .port')].map((port) => port.textContent)")
    assert "key_0" in names
    page.click(".selected .port:nth-of-type(1)")
    assert page.text("#details h2") == names[0]
    assert "readers" in page.run("document.querySelector('.ad-picture').textContent")


def test_focus(show) -> None:
    page = show(pipeline_trace())
    page.press("/")
    page.type("layers.1 silu")
    page.press("Enter", "f")
    one = page.count(".box")
    page.press("]")
    assert 1 < one < page.count(".box") < 40
    page.press("[")
    assert page.count(".box") == one
    page.press("Escape")
    assert page.count(".box") > one


def colors(page: Chromium) -> list[str]:
    script = "['body', '.box.replaced .border'].map((name) => getComputedStyle(document.querySelector(name)))"
    return page.run(f"{script}.map((style) => style.backgroundColor + style.fill)")


def test_themes(show, tmp_path: Path) -> None:
    page = show(small_diff())
    light = colors(page)
    page.press("t")
    dark = colors(page)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.press("t")
    assert colors(page) == light
    path = tmp_path / "page.html"
    with Chromium(tmp_path / "dark", dark=True) as other:
        other.open(path)
        assert colors(other) == dark


def test_markup_in_names_stays_text(show) -> None:
    page = show(hostile_diff())
    for key in ("n", "n", "2", "3", "1", "f", "f", "?", "?"):
        page.press(key)
        assert page.run("globalThis.pwned") is None
        assert page.count("main img, main script, main iframe") == 0
    assert SCRIPT in page.run("document.querySelector('.ad-picture').textContent") + page.text("#details")
    assert IMAGE in page.text("#details")


def test_what_a_policy_forbids_does_not_run(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render_page(small_diff()).replace("</main>", f"</main>{SCRIPT.removeprefix('</script>')}"))
    browser.open(path)
    assert browser.run("globalThis.pwned") is None
    assert any("Content Security Policy" in error for error in browser.errors())


def test_failed_pass_is_the_last(show) -> None:
    page = show(failed_trace())
    assert "fail_halfway failed" in page.text("#alert")
    assert f"halfway {IMAGE}" in page.text("#alert")
    assert page.count("#timeline:not([hidden])") == 0  # one pass, one step
    texts = page.run("[...document.querySelectorAll('.box.replaced .name')].map((name) => name.textContent)")
    assert texts == ["± scaled_dot_product_attention", "± neg"]


def test_nodes_without_values_have_a_mark(show) -> None:
    page = show(small_diff())
    assert page.count(".mark") == page.count(".box:not([data-key^=g])") - page.run(
        "[...document.querySelectorAll('.box')].filter((box) => box.ariaLabel.endsWith('= output')).length"
    )
    page = show(large_diff(1000))
    page.click("[data-whole='1']")
    page.click(".box.unchanged[data-key^=g]")
    assert page.count(".value") > 5
    assert page.run("document.querySelector('.ad-picture').textContent").count("f32[2, 3]") >= 1


def test_side_by_side_shows_each_graph(show) -> None:
    page = show(small_diff())
    page.press("2")
    texts = page.run("[...document.querySelectorAll('.ad-picture')].map((picture) => picture.textContent)")
    assert ["scaled_dot_product_attention" in text for text in texts] == [True, False]
    assert ["softmax" in text for text in texts] == [False, True]


def test_10_000_nodes_stay_responsive(show) -> None:
    page = show(large_diff(10_000))
    assert page.count(BOXES) <= MAX_BOXES
    times = {}
    for key in ("n", "n", "n", "N", "2", "3", "1", "f", "]", "]", "f", "c", "e", "j", "ArrowDown"):
        times[key] = max(times.get(key, 0.0), page.run(TIMED, key))
        assert page.run(f"[...document.querySelectorAll('.pane')].every({SMALL})")
    print(f"\nmilliseconds for each key at 10,000 nodes: { {key: round(time) for key, time in times.items()} }")
    assert max(times.values()) < 1000
    page.press("/")
    page.type("layers.994 gelu")
    assert page.count("#found div") > 0

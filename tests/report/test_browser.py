"""The pages in a real browser: what a reader can see, reach and hear."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dense2conv.report import write_comparison, write_report
from tests.report.run_folders import FOUND, write_log, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

Opener = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Opener]:
    """Opens a page, and holds it to no error, no message and no request but for itself."""
    contexts, complaints, requests = [], [], []

    def visit(path: Path, width: int = 1280, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        if settings.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", timeout=10_000)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert len([url for url in requests if not url.startswith("data:")]) == len(contexts)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("report") / "run"))


def heading(page: Any) -> str:
    return str(page.locator(".unit h3").first.inner_text())


def told(page: Any) -> dict[str, str]:
    """What the panel says of the unit shown."""
    terms = page.locator(".unit .facts dt").all_inner_texts()
    return dict(zip(terms, page.locator(".unit .facts dd").all_inner_texts(), strict=True))


def cells(page: Any) -> Any:
    return page.get_by_role("gridcell")


def choose(page: Any, label: str, option: str) -> None:
    page.get_by_label(label).first.select_option(label=option)


FIELD = "document.querySelector('.field').toDataURL()"
TILE = """([step, place]) => {
    const picture = document.querySelectorAll(".layer:not([hidden]) .tiles img")[step];
    const data = JSON.parse(document.querySelector(".explorer script").textContent);
    const {tile: [height, width], columns} = data[0];
    const canvas = Object.assign(document.createElement("canvas"), {width, height});
    const [x, y] = [place % columns * (width + 1), Math.floor(place / columns) * (height + 1)];
    canvas.getContext("2d").drawImage(picture, -x, -y);
    return canvas.toDataURL();
}"""


def test_hovering_shows_the_unit_and_its_place(report: Path, visit: Opener) -> None:
    page = visit(report)
    for place in (0, 17):
        cells(page).nth(place).hover()
        name = cells(page).nth(place).get_attribute("aria-label")
        assert name.startswith(heading(page).split(",")[0].lower())
        facts = told(page)
        assert f"{facts['centre']}, radius {facts['radius'].split()[0]}" in name
        assert facts["in the end"] in name
        row, column = (float(word.split()[1]) for word in facts["centre"].split(", "))
        mark = page.locator(".map .reach")
        assert (float(mark.get_attribute("cy")), float(mark.get_attribute("cx"))) == (
            row + 0.5,
            column + 0.5,
        )
        assert page.evaluate(FIELD) == page.evaluate(TILE, [3, place])


def test_keys_walk_from_unit_to_unit_with_one_tab_stop(report: Path, visit: Opener) -> None:
    page = visit(report)
    columns = json.loads(page.locator(".explorer script").inner_text())[0]["columns"]
    page.get_by_label("Highlight").focus()
    page.keyboard.press("Tab")

    def focused() -> int:
        return int(
            page.evaluate(
                "[...document.querySelectorAll('[role=gridcell]')].indexOf(document.activeElement)"
            )
        )

    start = focused()
    assert start >= columns
    for key, place in (
        ("ArrowRight", start + 1),
        ("ArrowDown", start + 1 + columns),
        ("ArrowLeft", start + columns),
        ("ArrowUp", start),
        ("Home", start - start % columns),
        ("End", start - start % columns + columns - 1),
        ("Control+End", 31),
        ("ArrowRight", 31),
        ("Control+Home", 0),
        ("ArrowUp", 0),
    ):
        page.keyboard.press(key)
        assert focused() == place, key
        name = cells(page).nth(place).get_attribute("aria-label")
        assert name.split(",")[0] == heading(page).split(",")[0].lower()
        assert page.locator("[role=gridcell][tabindex='0']").count() == 1
    page.keyboard.press("Tab")
    assert focused() == -1
    page.keyboard.press("Shift+Tab")
    assert focused() == 0


def test_a_click_carries_on_with_the_keys(report: Path, visit: Opener) -> None:
    page = visit(report)
    cells(page).nth(3).click()
    page.keyboard.press("ArrowRight")
    assert cells(page).nth(4).get_attribute("aria-selected") == "true"
    assert page.locator("[aria-selected=true]").count() == 1


def test_steps_and_layers_are_chosen(report: Path, visit: Opener) -> None:
    page = visit(report)
    assert page.locator(".tiles img:visible").count() == 1
    cells(page).nth(5).hover()
    before, unit = told(page), heading(page).split(",")[0]
    choose(page, "Step", "step 10")
    assert heading(page) == f"{unit}, step 10"
    assert (
        page.locator(".tiles img:visible")
        .get_attribute("alt")
        .startswith("Receptive fields of 32 units of layer1, step 10:")
    )
    assert page.evaluate(FIELD) == page.evaluate(TILE, [1, 5])
    assert told(page)["radius"] != before["radius"]  # of this step
    assert told(page)["in the end"] == before["in the end"]  # of the unit
    choose(page, "Layer", "Layer 2")
    assert cells(page).count() == 9
    assert page.get_by_role("grid").get_attribute("aria-label").startswith("Units of layer2")
    choose(page, "Layer", "Layer 1")
    assert cells(page).count() == 32


def test_the_units_of_a_kernel_and_those_left_over_are_highlighted(
    report: Path, visit: Opener
) -> None:
    page = visit(report)
    options = page.get_by_label("Highlight").locator("option").all_inner_texts()
    assert options[0] == "all units"
    assert sum(int(option.split("(")[1].rstrip(")")) for option in options[1:]) == 32
    for option in options[1:]:
        choose(page, "Highlight", option)
        group, size = option.rstrip(")").split(" (")
        clear = page.locator("[role=gridcell]:not(.faint)")
        assert clear.count() == int(size)
        assert all(group in (cell.get_attribute("aria-label") or "") for cell in clear.all())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_no_barrier_is_found(report: Path, visit: Opener, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core")
    beside = write_comparison(report.parent, write_run(report.parent.parent / f"{scheme}{width}"))
    for path in (report, beside):
        page = visit(path, width, color_scheme=scheme)
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        red, green, blue = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert (red + green + blue > 600) == (scheme == "light")


def test_without_scripts_every_picture_is_there_to_read(report: Path, visit: Opener) -> None:
    page = visit(report, java_script_enabled=False)
    assert page.locator(".tiles img:visible").count() == 2 * 4
    assert page.locator(".bank li:visible").count() == 2 * 2
    assert page.get_by_role("combobox").count() == 0


def test_motion_is_spared_where_asked(report: Path, visit: Opener) -> None:
    for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        page = visit(report, reduced_motion=wish)
        assert (
            page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour
        )


def test_two_runs_are_walked_through_on_their_own(tmp_path: Path, visit: Opener) -> None:
    pair = write_run(tmp_path / "a", name="a"), write_run(tmp_path / "b", channels=3, name="b")
    page = visit(write_comparison(*pair))
    first, second = page.locator(".explorer").all()
    before = second.locator(".unit h3").inner_text()
    first.get_by_label("Step").select_option(label="step 0")
    first.get_by_role("gridcell").nth(2).hover()
    assert first.locator(".unit h3").inner_text().endswith("step 0")
    assert second.locator(".unit h3").inner_text() == before
    boxes = [part.bounding_box() for part in (first, second)]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]


def test_a_run_that_is_only_trained_and_still_going_on(tmp_path: Path, visit: Opener) -> None:
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder / "extracted")
    for path in (folder / "summary.json", *(folder / "fields").glob("*_pruned.npz")):
        path.unlink()
    config = json.loads((folder / "config.yaml").read_text()) | {"train": {"steps": 90}}
    (folder / "config.yaml").write_text(json.dumps(config))
    page = visit(write_report(folder))
    text = page.locator("body").inner_text()
    assert "The log ends at step 29 of 90" in text
    assert "No verdict yet" in text
    assert told(page).keys() == {
        "centre", "radius", "participation", "exactly zero", "largest weight"
    }  # fmt: skip
    assert page.get_by_label("Highlight").locator("option").all_inner_texts() == [
        "all units",
        "not analysed (32)",
    ]
    assert (
        page.get_by_role("combobox", name="Layer").count() == 0
    )  # the second one's grid is not known


def test_dead_units_and_no_kernels(tmp_path: Path, visit: Opener) -> None:
    folder = write_run(tmp_path / "run")
    with np.load(folder / "extracted" / "analysis.npz") as file:
        analysis = dict(file)
    analysis["layer1/kernel"][:] = -1
    analysis["layer1/alive"][:] = np.arange(64) != 4
    np.savez(folder / "extracted" / "analysis.npz", **analysis)
    (folder / "extracted" / "module.safetensors").unlink()
    layers = [FOUND["layers"][0] | {"num_kernels": 0, "kernels": [], "left_over_fraction": 0.98}]
    none = FOUND | {"num_kernels": 0, "left_over_fraction": 0.98, "layers": layers}
    (folder / "summary.json").write_text(json.dumps(none))
    pruned = folder / "fields" / "layer1_pruned.npz"
    with np.load(pruned) as file:
        weight, units = file["weight"], file["units"]
    weight[units == 4] = 0.0
    np.savez(pruned, weight=weight, units=units)
    page = visit(write_report(folder))
    dead = page.get_by_role("gridcell", name="unit 4,")
    dead.hover()
    assert dead.get_attribute("aria-label") == "unit 4, dead, all weights zero"
    assert told(page)["centre"].startswith("none")
    assert told(page)["exactly zero"] == "100.0 %"
    text = page.locator("body").inner_text()
    assert "No kernel was found: every unit is left over or dead." in text
    assert "63 of 64 units are left over; 1 dead: 4." in text


def test_one_layer_in_colour_by_its_log_and_fields_alone(tmp_path: Path, visit: Opener) -> None:
    write_log(tmp_path)
    (tmp_path / "fields").mkdir()
    weight = np.random.default_rng(0).normal(size=(1, 3 * 25))
    np.savez(tmp_path / "fields" / "layer1_step00000000.npz", weight=weight, units=np.arange(1))
    page = visit(write_report(tmp_path), color_scheme="dark")
    assert cells(page).count() == 1
    # Colours are shown as they are, in the dark as well.
    style = "getComputedStyle(document.querySelector('{}')).filter"
    for selector in (".tiles img", ".field"):
        assert page.evaluate(style.format(selector)) == "none"
    assert page.evaluate(style.format(".ramp")) != "none"


def test_a_name_that_is_a_script_stays_a_name(tmp_path: Path, visit: Opener) -> None:
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    folder = write_run(tmp_path / "run", name=name)
    assert name in visit(write_report(folder)).locator("h1 ~ p, header").first.inner_text()

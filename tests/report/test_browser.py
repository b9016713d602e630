"""The page in a real browser: from disk, without a network, sorted, opened, looked at."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.look import colour
from medseg.core.volume import LabelMap
from medseg.evaluate.score import score
from medseg.report import page
from medseg.report.scan import Organ, ScanPage, scan_report
from medseg.report.tables import Scored

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = "<img src=x onerror=document.title='taken'>\"'&"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def a_run(cases: int = 12, organs: tuple[str, ...] = ("liver", HOSTILE), task: str = "Task00_made") -> page.RunPage:
    """Cuboids and how they were found, the later the worse; what is first in the last case was missed."""
    grid, labels = Grid.from_spacing((60, 50, 40), (1.0, 1.0, 2.0)), LabelSet.from_names(organs)
    rows, maps = [], []
    for n in range(cases):
        truth, found = (np.zeros(grid.shape, np.uint8) for _ in "ab")
        for k in range(len(organs)):
            start = 5 + (50 // len(organs)) * k
            truth[start : start + 18, 10:40, 8:32] = k + 1
            if not (n == cases - 1 and k == 0):
                found[start : start + 18, 10 + n : 40, 8:32] = k + 1
        reference, prediction = (LabelMap(values, grid, labels) for values in (truth, found))
        rows += score(prediction, reference, case=f"case_{n:03}")
        maps.append((reference, prediction))
    image = np.random.default_rng(0).normal(0, 10, grid.shape) + 100 * (maps[0][0].values > 0)
    dice = page.case_dice(rows)
    overlays = [
        page.Overlay(case, "3d", kind, image, grid, *maps[int(case[-3:])], dice[case])
        for kind, case in page.pick_cases(rows).items()
    ]
    records = tuple(
        {"step": s, "steps": 50, "seconds": 10.0 * s, "loss": 1 / s} | ({"dice": 0.9 - 1 / s} if s % 10 == 0 else {})
        for s in range(2, 51)
    )
    predicted = {(row.case, row.label): 0.9 for row in rows}
    return page.RunPage(
        "A made-up run",
        task,
        cases=cases,
        folds=1,
        scored=(Scored("3d", 0, tuple(rows), predicted),),
        curves=(page.Curve("3d", 0, records),),
        overlays=tuple(overlays),
        flagged=(page.Flagged("3d", "case_011", (f"{HOSTILE} is missing",)),),
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield one
        one.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.report(a_run()), encoding="utf-8")
    return path


class Tab:
    """A page opened from disk, with all that it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, **how: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | how))
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def column(self, number: int) -> list[str]:
        """The texts of a column of the table of cases."""
        found: list[str] = self.page.locator(f"#all-cases tbody tr > :nth-child({number})").all_inner_texts()
        return found

    def pixels(self, selector: str) -> np.ndarray:
        picture = Image.open(io.BytesIO(self.page.locator(selector).screenshot())).convert("RGB")
        return np.asarray(picture, dtype=int)


def near(pixels: np.ndarray, rgb: tuple[int, int, int], reach: int = 40) -> int:
    return int((np.abs(pixels - rgb).max(axis=-1) < reach).sum())


def test_it_opens_from_disk_and_asks_for_nothing(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        assert tab.page.title() == "A made-up run"
        tab.page.locator("#distribution").scroll_into_view_if_needed()
        tab.page.wait_for_selector("#distribution canvas")
        assert tab.faults == []
        assert [url for url in tab.asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()]
        assert tab.page.evaluate("document.querySelectorAll('img').length") == 0


def test_cases_are_sorted_and_narrowed(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        assert len(tab.column(1)) == 24
        tab.page.locator("#all-cases thead button", has_text="Dice").first.click()
        dice = [float(text) for text in tab.column(6)]
        assert dice == sorted(dice)
        assert tab.page.locator("#all-cases th[aria-sort=ascending]").count() == 1
        tab.page.locator("#all-cases thead button", has_text="Dice").first.click()
        assert [float(text) for text in tab.column(6)] == sorted(dice, reverse=True)
        tab.page.fill("#find", "case_003")
        assert set(tab.column(1)) == {"case_003"}
        assert tab.page.inner_text("#shown").startswith("2 of 24 rows")
        tab.page.fill("#find", "")
        tab.page.select_option("#status", "missed")
        assert tab.column(1) == ["case_011◧"]
        tab.page.select_option("#status", "flagged")
        assert len(tab.column(1)) == 2
        organs = tab.page.locator("#organs-1")
        organs.locator("thead button", has_text="Missed").click()
        assert organs.locator("tbody th").all_inner_texts() == [HOSTILE, "liver"]
        # However the table is sorted, a button opens its own case.
        tab.page.locator(".flags button").click()
        assert tab.page.inner_text("#viewer-title") == "case_011 · 3d"
        assert tab.faults == []


def test_a_case_opens_with_its_scan(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        tab.page.locator("#all-cases button.open", has_text="case_000").first.press("Enter")
        tab.page.wait_for_selector("#stage[data-drawn='3d|case_000']", timeout=60_000)
        tab.page.wait_for_timeout(1500)
        assert tab.page.inner_text("#viewer-title") == "case_000 · 3d"
        seen = tab.pixels("#stage")
        assert seen.std() > 20
        red, green, blue = colour(0)
        blueish = int(((seen[..., 2] - seen[..., 0]) > 40).sum())  # the first organ's colour over grey
        assert (red, green, blue) == (0x56, 0xB4, 0xE9)
        assert blueish > 1000
        tab.page.uncheck("#layer-prediction")
        tab.page.wait_for_timeout(800)
        bare = tab.pixels("#stage")
        assert int(((bare[..., 2] - bare[..., 0]) > 40).sum()) < blueish / 20
        assert tab.page.locator("#facts tr").count() == 2
        tab.page.keyboard.press("Escape")
        assert not tab.page.locator("#viewer").is_visible()
        assert tab.faults == []
        assert all(url.startswith(("data:", "blob:", "file:")) for url in tab.asked)


def test_a_case_without_a_scan_still_tells(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        tab.page.locator("#all-cases button.open", has_text="case_002").first.click()
        assert "holds the scans of the best" in tab.page.inner_text("#no-scan")
        assert not tab.page.locator("#stage").is_visible()
        assert tab.page.locator("#facts tr").count() == 2


def test_a_point_of_a_plot_opens_its_case(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        tab.page.locator("#distribution").scroll_into_view_if_needed()
        tab.page.wait_for_selector("#distribution canvas")
        place = tab.page.evaluate(
            """() => { const chart = echarts.getInstanceByDom(document.getElementById("distribution"));
            const point = chart.getOption().series[1].data[0];
            const [x, y] = chart.convertToPixel({ xAxisIndex: 0, yAxisIndex: 1 }, point);
            return [x, y, data.cases[data.rows[point[2]][0]]]; }"""
        )
        tab.page.locator("#distribution canvas").click(position={"x": place[0], "y": place[1]})
        assert tab.page.inner_text("#viewer-title").endswith("· 3d")
        assert tab.page.locator("#viewer").is_visible()
        for field in ("volume_error_percent", "hd95_mm"):
            tab.page.keyboard.press("Escape")
            tab.page.select_option("#measure", field)
        assert "1 missed or invented" in tab.page.inner_text("#unmeasured")
        assert tab.faults == []


def test_flags_open_their_case_and_names_stay_names(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        tab.page.locator(".flags button").click()
        assert HOSTILE in tab.page.inner_text("#why")
        assert HOSTILE in tab.page.inner_text("#facts")
        assert tab.page.title() == "A made-up run"
        assert tab.page.locator("img").count() == 0


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_follows_the_readers_light(browser: Any, file: Path, scheme: str, dark: bool) -> None:
    with Tab(browser, file, color_scheme=scheme) as tab:
        assert (tab.pixels("#spread").mean() < 100) == dark


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_runs_off_a_small_screen(browser: Any, file: Path, width: int) -> None:
    with Tab(browser, file, viewport={"width": width, "height": 800}) as tab:
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        tab.page.locator("#all-cases button.open").first.click()
        assert tab.page.locator("#viewer").bounding_box()["width"] <= width


def test_where_nothing_was_there_the_page_still_works(browser: Any, tmp_path: Path) -> None:
    grid, labels = Grid.from_spacing((8, 8, 8), 1.0), LabelSet.from_names(["liver"])
    nothing = LabelMap(np.zeros(grid.shape, np.uint8), grid, labels)
    rows = tuple(row for n in range(3) for row in score(nothing, nothing, case=f"case_{n}"))
    (tmp_path / "nothing.html").write_text(
        page.report(page.RunPage("R", "T", scored=(Scored("3d", 0, rows),))), "utf-8"
    )
    with Tab(browser, tmp_path / "nothing.html") as tab:
        assert tab.column(1) == ["case_0", "case_1", "case_2"]
        assert tab.faults == []


def test_it_prints(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        assert len(tab.page.pdf(format="A4")) > 20_000


def test_every_field_and_picture_has_a_name(browser: Any, file: Path) -> None:
    with Tab(browser, file) as tab:
        nameless = tab.page.evaluate(
            """() => [...document.querySelectorAll("input, select, button, [role=img], canvas#stage")].filter(e =>
            !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim())).map(e => e.outerHTML)"""
        )
        assert nameless == []


def test_the_page_of_a_scan_shows_it(browser: Any, tmp_path: Path) -> None:
    run = a_run()
    one = run.overlays[0]
    shown = ScanPage(
        "scan.nii.gz",
        one.image,
        one.grid,
        one.prediction,
        [Organ("liver", 9.0, 0.9, 0.9, False)],
        [],
        [],
        4,
        {"model": "m"},
    )
    (tmp_path / "scan.html").write_text(scan_report(shown), encoding="utf-8")
    with Tab(browser, tmp_path / "scan.html") as tab:
        tab.page.wait_for_selector("#stage[data-drawn='scan']", timeout=60_000)
        tab.page.wait_for_timeout(1500)
        seen = tab.pixels("#stage")
        assert int(((seen[..., 2] - seen[..., 0]) > 40).sum()) > 1000
        assert tab.faults == []
        assert [url for url in tab.asked if not url.startswith(("data:", "blob:", "file:"))] == []

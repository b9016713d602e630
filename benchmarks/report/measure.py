"""A report over 1,000 cases of 25 organs: how long it takes to build and to open, how large and how smooth it is.

    python benchmarks/report/measure.py               Chromium has to be there (Debian: chromium), and playwright

Scores are drawn at random, as are nine scans of 256x256x160 voxels with 25 organs for its pictures and viewer. Building
is the page, its tables and report.json; opening is timed by the browser, from its start to the end of its load event
and to the first frame after it (drawn by software, no GPU); smoothness is the time between frames while the page is
scrolled from top to bottom in 5 s, and what a change of the plot and of the table takes.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from medseg.core.grid import Grid
from medseg.core.labels import LabelSet
from medseg.core.volume import LabelMap
from medseg.evaluate.score import DISTANCES, OVERLAPS, CaseMetrics
from medseg.report import page
from medseg.report.tables import Scored, to_csv, to_json

SCROLL = """() => new Promise(done => {
  const gaps = []; let last = performance.now(); const begin = last, end = document.body.scrollHeight - innerHeight;
  const step = now => {
    gaps.push(now - last); last = now;
    const share = (now - begin) / 5000; scrollTo({ top: end * share, behavior: "instant" });
    share < 1 ? requestAnimationFrame(step) : done(gaps.slice(1));
  };
  requestAnimationFrame(step);
})"""


ACT = """() => new Promise(done => {
  const begin = performance.now(); %s; requestAnimationFrame(() => setTimeout(() => done(performance.now() - begin)));
})"""


def row(rng: np.random.Generator, case: str, label: int) -> CaseMetrics:
    dice = float(np.clip(rng.normal(0.9 - 0.01 * label, 0.05), 0, 1)) if rng.random() > 0.002 else 0.0
    volume = 1e5 * label
    error = float(rng.normal(0, 0.1)) * volume
    return CaseMetrics(
        case=case,
        subject=case,
        label=label,
        name=f"organ {label}",
        status="ok" if dice else "missed",
        cut="",
        **dict.fromkeys(OVERLAPS, dice),
        **dict.fromkeys(DISTANCES, 10 * (1 - dice)),
        tolerance_mm=2.0,
        reference_mm3=volume,
        predicted_mm3=volume + error,
        volume_error_mm3=error,
        volume_error_percent=100 * error / volume,
    )


def large_run(cases: int, organs: int) -> page.RunPage:
    rng = np.random.default_rng(0)
    names = [f"case_{n:04d}" for n in range(cases)]
    rows = tuple(row(rng, case, label) for case in names for label in range(1, organs + 1))
    grid = Grid.from_spacing((256, 256, 160), (1.5, 1.5, 2.0))
    values = np.zeros(grid.shape, np.uint8)
    index = np.ogrid[: grid.shape[0], : grid.shape[1], : grid.shape[2]]
    for label in range(1, organs + 1):
        middle = rng.uniform(0.2, 0.8, 3) * grid.shape
        values[sum(((i - m) / r) ** 2 for i, m, r in zip(index, middle, (18, 14, 9), strict=True)) < 1] = label
    labels = LabelMap(values, grid, LabelSet.from_names([f"organ {n}" for n in range(1, organs + 1)]))
    image = (rng.normal(0, 30, grid.shape) + 20.0 * values).astype(np.float32)
    kinds: list[page.Kind] = ["best", "median", "worst", *["flagged"] * 6]
    overlays = tuple(
        page.Overlay(case, "3d", kind, image, grid, labels, labels, 0.9)
        for case, kind in zip(names, kinds, strict=False)
    )
    predicted = {(one.case, one.label): 0.9 for one in rows}
    return page.RunPage(
        "A large run", "Task00", cases=cases, folds=5, scored=(Scored("3d", 0, rows, predicted),), overlays=overlays
    )


def opened(path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        loads, frames = [], []
        for _ in range(5):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(path.as_uri())
            frames.append(
                tab.evaluate("() => new Promise(done => requestAnimationFrame(() => done(performance.now())))")
            )
            loads.append(tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
            tab.close()
        load, frame = (statistics.median(times) / 1000 for times in (loads, frames))
        print(f"opened: load event after {load:.2f} s, a frame after {frame:.2f} s")
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(path.as_uri())
        tab.wait_for_timeout(1000)
        gaps = sorted(tab.evaluate(SCROLL))
        late = gaps[int(0.95 * len(gaps))]
        print(f"scrolled: {statistics.median(gaps):.0f} ms between frames, 95 % within {late:.0f} ms")
        for name, section, act in (
            (
                "another metric",
                "spread",
                "byId('measure').value = 'hd95_mm'; byId('measure').dispatchEvent(new Event('change'))",
            ),
            ("cases sorted", "cases", "document.querySelectorAll('#all-cases thead button')[5].click()"),
            (
                "cases narrowed",
                "cases",
                "byId('find').value = 'case_0123'; byId('find').dispatchEvent(new Event('input'))",
            ),
        ):
            tab.locator(f"#{section}").scroll_into_view_if_needed()
            tab.wait_for_timeout(3000)  # until what came into view is drawn
            seconds = tab.evaluate(ACT % act)
            print(f"{name}: {seconds:.0f} ms to the next frame")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--organs", type=int, default=25)
    given = parser.parse_args()
    run = large_run(given.cases, given.organs)
    begin = time.perf_counter()
    html = page.report(run)
    drawn = time.perf_counter() - begin
    to_csv(run.scored), to_json(run.scored, {})
    seconds = time.perf_counter() - begin
    print(f"built: {seconds:.1f} s (the page {drawn:.1f} s), {len(html.encode()) / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(html, encoding="utf-8")
        opened(path)


if __name__ == "__main__":
    main()

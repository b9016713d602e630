"""What the page promises: nothing loaded, nothing unescaped, the same bytes, and the right numbers."""

import base64
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.grid import Grid
from medseg.core.labels import Label, LabelSet
from medseg.core.volume import LabelMap
from medseg.evaluate.instances import InstanceSummary
from medseg.evaluate.score import CaseMetrics
from medseg.report import page
from medseg.report import pictures as looks
from medseg.report.overview import Run, overview
from medseg.report.published import published
from medseg.report.summary import summary
from medseg.report.tables import Scored, text_of, to_csv, to_json, to_markdown

VOID = {"meta", "link", "input", "br", "hr", "img"}
VENDOR = Path(page.__file__).parent / "vendor"
HOSTILE = "<script>alert('1')</script>\"|&"


def row(case: str, label: int, dice: float | None, *, status: str = "ok", name: str = "") -> CaseMetrics:
    found = status == "ok"
    return CaseMetrics(
        case=case,
        subject=case,
        label=label,
        name=name or f"organ {label}",
        status=status,
        cut="",
        dice=dice,
        iou=None if dice is None else dice / (2 - dice),
        precision=dice,
        recall=dice,
        boundary_iou=dice,
        cldice=None,
        nsd=dice,
        hd_mm=None if dice is None else 12 * (1 - dice) if found else 500.0,
        hd95_mm=None if dice is None else 10 * (1 - dice) if found else 500.0,
        assd_mm=None if dice is None else 3 * (1 - dice) if found else 500.0,
        centroid_mm=None if dice is None else 2 * (1 - dice) if found else 500.0,
        tolerance_mm=2.0,
        reference_mm3=0.0 if status == "invented" else 1000.0,
        predicted_mm3=0.0 if status == "missed" else 900.0,
        volume_error_mm3=-100.0,
        volume_error_percent=None if status == "invented" else -10.0,
    )


def overlay(kind: page.Kind = "best", case: str = "case_1", size: int = 40) -> page.Overlay:
    grid = Grid.from_spacing((size, size, 20), (1, 1, 5))
    values = np.zeros(grid.shape, np.uint8)
    values[5 : size - 5, 5 : size - 5, 4:16] = 1
    labels = LabelMap(values, grid, LabelSet.from_names(["liver", "spleen"]))
    image = np.random.default_rng(0).normal(size=grid.shape)
    return page.Overlay(case, "3d", kind, image, grid, labels, labels, 1.0)


def test_the_curves_of_networks_one_after_the_other_are_not_joined() -> None:
    one = curve()
    later = tuple({**record, "seconds": record["seconds"] + 200} for record in one.records)
    both = dataclasses.replace(one, records=one.records + later)
    for curves, lines in (((both,), 2), ((one,), 1)):
        (found,) = data_of(page.report(page.RunPage("A run", "Task01", curves=curves)))["curves"]
        assert (len(found["loss"]), len(found["dice"])) == (lines, lines)
    assert found["dice"][0][-1] == [200 / 60, 0.99] or found["dice"][0][-1] == pytest.approx([200 / 60, 0.99], abs=1e-3)


def data_of(html: str) -> dict[str, Any]:
    """What the page's script draws."""
    found: dict[str, Any] = json.loads(
        html.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    )
    return found


def curve(steps: int = 100, reached: int = 100) -> page.Curve:
    records = [
        {"step": s, "steps": steps, "seconds": 2.0 * s, "loss": 1 / s, "learning_rate": 0.01}
        | ({"dice": 1 - 1 / s, "dice_by_label": {"liver": 1 - 1 / s}} if s % 10 == 0 else {})
        for s in range(1, reached + 1)
    ]
    return page.Curve("3d", 0, tuple(records))


def run(**changes) -> page.RunPage:
    rows = tuple(row(f"case_{n}", label, 0.5 + 0.04 * n + 0.1 * label) for n in range(8) for label in (1, 2))
    full = page.RunPage(
        title="A run",
        task="Task01",
        description="Two organs.",
        cases=8,
        folds=2,
        decisions=(page.Decision("patch", "64x64", "It fits.", "2d"), page.Decision("seed", "7", "Given.")),
        scored=(Scored("3d", 0, rows), Scored("2d", 0, rows[:8]), Scored("2d", 1, rows[8:])),
        curves=(curve(),),
        overlays=(overlay("worst", "case_9"), overlay()),
        provenance={"medseg": "0.1"},
        commands=("medseg report runs/1",),
        warnings=("Few cases.",),
    )
    return dataclasses.replace(full, **changes)


class Reader(HTMLParser):
    """Keeps the open elements, and what was loaded, named and said."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.faults.append(f"an attribute twice in {tag}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


PAGES = {
    "full": run(),
    "nothing": page.RunPage("A run", "Task01"),
    "training": page.RunPage("A run", "Task01", curves=(curve(reached=30), page.Curve("2d", 0, ()))),
    "unvalidated": page.RunPage("A run", "Task01", curves=(curve(reached=5),)),
    "empty fold": page.RunPage("A run", "Task01", scored=(Scored("3d", 0, ()),)),
    "both empty": page.RunPage("A", "T", scored=(Scored("3d", 0, (row("a", 1, None, status="both empty"),)),)),
}


@pytest.mark.parametrize("which", PAGES)
def test_every_page_is_sound(which):
    html = page.report(PAGES[which])
    reader = read(html)
    assert html.lstrip().startswith("<!doctype html>")
    assert reader.faults == []
    assert reader.open == []
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = [a["href"] for tag, a in reader.elements if tag == "a"]
    assert {href[1:] for href in anchors} <= set(ids)


@pytest.mark.parametrize("which", PAGES)
def test_nothing_is_loaded(which):
    html = page.report(PAGES[which])
    ours = html
    for vendor in (VENDOR / "echarts.min.js", VENDOR / "niivue.umd.js"):
        ours = ours.replace(vendor.read_text("utf-8"), "")
    assert len(ours) < 300_000
    assert not re.search(r"https?:|@import|url\(|//[a-z]+\.", ours)
    for tag, attributes in read(html).elements:
        assert tag not in ("link", "iframe", "object", "base")
        assert not attributes.get("src")
        assert (attributes.get("href") or "#").startswith(("#", "data:image/png"))


def test_tables_and_pictures_can_be_heard():
    reader = read(page.report(run()))
    assert all(a.get("scope") in ("row", "col") for tag, a in reader.elements if tag == "th")
    pictures = [a for tag, a in reader.elements if tag == "svg" and a.get("role") == "img"]
    assert pictures
    assert all(a.get("aria-label") for a in pictures)
    assert all(
        "aria-hidden" in a or "role" in a or "preserveaspectratio" in a for t, a in reader.elements if t == "svg"
    )


def test_the_same_run_gives_the_same_bytes():
    assert page.report(run()) == page.report(run())
    turned = run(scored=run().scored[::-1], overlays=run().overlays[::-1])
    assert page.report(turned) == page.report(run())


def test_hostile_names_are_only_names():
    rows = (row(HOSTILE, 1, 0.5, name=HOSTILE), row("b", 1, 0.6, name=HOSTILE), row("c", 1, 0.6, name=HOSTILE))
    hostile = page.RunPage(
        title=HOSTILE,
        task=HOSTILE,
        description=HOSTILE,
        decisions=(page.Decision(HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
        scored=(Scored(HOSTILE, 0, rows),),
        curves=(dataclasses.replace(curve(), configuration=HOSTILE),),
        overlays=(dataclasses.replace(overlay(case=HOSTILE), configuration=HOSTILE),),
        provenance={HOSTILE: HOSTILE},
        commands=(HOSTILE,),
        warnings=(HOSTILE,),
    )
    reader = read(page.report(hostile))
    kinds = [a.get("type") for tag, a in reader.elements if tag == "script"]
    assert kinds == ["application/json", "application/json", "text/plain", None, None]
    assert reader.faults == []
    assert reader.text.count(HOSTILE) > 10
    assert all(not name.startswith("on") for _, attributes in reader.elements for name in attributes)


def test_an_unfinished_run_says_so():
    assert "not finished: no training has been logged" in page.report(PAGES["nothing"])
    training = page.report(PAGES["training"])
    assert "not finished: training has begun" in training
    assert '<td class="bad">30</td><td>100</td>' in training


def test_a_missed_organ_is_named_and_counted():
    rows = (*(row(f"case_{n}", 1, 0.9) for n in range(3)), row("case_3", 1, 0.0, status="missed"))
    html = page.report(run(scored=(Scored("3d", 0, rows),)))
    assert "1 of 4 structures was missed entirely, and case_3 is the worst case with 0.00" in html
    assert '<dd class="bad">1 of 4</dd>' in html
    assert [line[4] for line in data_of(html)["rows"]].count("missed") == 1


def test_summary_speaks_of_the_better_configuration():
    good, poor = (tuple(row(f"case_{n}", 1, d) for n in range(3)) for d in (0.9, 0.6))
    html = page.report(run(scored=(Scored("2d", 0, poor), Scored("3d", 0, good))))
    assert "Configuration 3d reaches a mean Dice of 0.90 (2d 0.60) on 3 cases" in html
    assert "no structure was missed, and case_0 is the worst case with 0.90" in html


def test_the_mean_counts_every_organ_the_same():
    rows = (row("a", 1, 1.0), row("b", 1, 1.0), row("c", 1, 1.0), row("a", 2, 0.5))
    assert '<p class="big">0.750 ' in page.report(run(scored=(Scored("3d", 0, rows),)))


def test_a_case_scored_twice_is_refused():
    rows = (row("a", 1, 1.0),)
    with pytest.raises(InputError, match="comes twice"):
        page.report(run(scored=(Scored("3d", 0, rows), Scored("3d", 1, rows))))


def test_pick_cases_known_answer():
    dice = {"a": (0.9, 0.9), "b": (0.2, 0.4), "c": (0.7, None), "d": (0.6, 0.6), "e": (1.0, 0.9)}
    rows = [
        row(case, label, d, status="ok" if d is not None else "both empty")
        for case, pair in dice.items()
        for label, d in enumerate(pair, start=1)
    ]
    assert page.pick_cases(rows) == {"best": "e", "median": "c", "worst": "b"}
    assert page.pick_cases(reversed(rows)) == page.pick_cases(rows)


def test_pick_cases_of_few_and_of_equals():
    assert page.pick_cases([]) == {}
    assert page.pick_cases([row("a", 1, None, status="both empty")]) == {}
    assert page.pick_cases([row("a", 1, 0.5)]) == {"median": "a"}
    assert page.pick_cases([row("a", 1, 0.5), row("b", 1, 0.4)]) == {"best": "a", "worst": "b"}
    assert page.pick_cases([row(c, 1, 0.5) for c in "dbca"]) == {"worst": "a", "median": "b", "best": "d"}


def test_aspect_of_an_anisotropic_scan_reaches_the_page():
    html = page.report(run(overlays=(overlay(),)))
    # The organ spans all but 5 voxels, so 30 mm around it is the whole scan: 40 x 40 x 100 mm.
    boxes = re.findall(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)" role', html)
    assert [tuple(map(float, b)) for b in boxes] == [(40, 40), (40, 100), (40, 100)]


def test_maps_on_another_grid_are_refused_by_name():
    moved = dataclasses.replace(overlay(), grid=Grid.from_spacing((40, 40, 20), (1, 1, 4)))
    with pytest.raises(InputError, match="case case_1: the reference does not lie"):
        page.report(run(overlays=(moved,)))


def test_pictures_lose_resolution_before_the_page_gets_too_large(monkeypatch):
    sharp = page.report(run())
    monkeypatch.setattr(page, "_PAGE_BYTES", 0)
    monkeypatch.setattr(looks, "_SIDES", (512, 8))
    small = page.report(run())
    assert len(small) < len(sharp)
    assert read(small).faults == []


def test_a_large_run_stays_below_ten_megabytes(monkeypatch):
    rows = tuple(
        row(f"case_{n:03d}", label, 0.5 + (n * label % 97) / 200) for n in range(60) for label in range(1, 105)
    )
    kinds: tuple[page.Kind, ...] = ("best", "median", "worst")
    shown = tuple(dataclasses.replace(overlay(k, size=300), configuration=c) for k in kinds for c in ("2d", "3d"))
    html = page.report(run(scored=tuple(Scored(c, 0, rows) for c in ("2d", "3d")), overlays=shown))
    assert len(html.encode()) < 10_000_000
    monkeypatch.setattr(page, "_ROWS", 100)
    few = page.report(run(scored=(Scored("3d", 0, rows),)))
    assert f"The worst 100 of {len(rows)} rows" in few
    assert max(line[9] for line in data_of(few)["rows"]) == sorted(r.dice for r in rows)[99]


def test_what_is_of_others_is_as_they_publish_it():
    told = (Path(__file__).parents[2] / "docs" / "decisions" / "0017-reports.md").read_text("utf-8")
    for file in ("echarts.min.js", "niivue.umd.js"):
        assert hashlib.sha256((VENDOR / file).read_bytes()).hexdigest() in told
        assert (VENDOR / f"{file.split('.')[0]}.LICENSE").stat().st_size > 1000


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_in_light_and_dark():
    """WCAG AA: 4.5 for text, 3 for graphics."""
    css = (VENDOR.parent / "page.css").read_text("utf-8")
    for block in re.findall(r":root \{(.*?)\}", css, re.S)[:2]:
        found = {
            name: "#" + "".join(c * 2 for c in value) if len(value) == 3 else f"#{value}"
            for name, value in re.findall(r"--([a-z0-9-]+): #([0-9a-f]{3,6});", block)
        }
        for ink in ("ink", "soft", "accent", "bad", "warn"):
            for paper in ("page", "card", "stripe"):
                light, dark = sorted((luminance(found[ink]), luminance(found[paper])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)
        for n in range(8):
            light, dark = sorted((luminance(found[f"c{n}"]), luminance(found["card"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, n


def test_scans_of_the_viewer_are_as_fine_as_the_page_allows(monkeypatch):
    def scan(html: str) -> Any:
        return json.loads(html.split('id="scans">')[1].split("</script>")[0])["3d|case_1"]

    fine = scan(page.report(run()))
    assert [label[:2] for label in fine["labels"]] == [[1, "liver"], [2, "spleen"]]
    monkeypatch.setattr(page, "_PAGE_BYTES", 0)
    monkeypatch.setattr(looks, "_VOXELS", (40_000, 2_000))
    coarse = scan(page.report(run()))
    assert len(coarse["image"]) < len(fine["image"]) / 4


def test_labels_above_a_byte_are_seen_as_what_they_are():
    one = overlay()
    labels = LabelSet((Label("liver", 1), Label("rib", 257)))
    values = one.reference.values.astype(np.uint16)
    values[values == 1] = 257
    ribs = LabelMap(values, one.grid, labels)
    html = page.report(run(overlays=(dataclasses.replace(one, reference=ribs, prediction=ribs),)))
    found = json.loads(html.split('id="scans">')[1].split("</script>")[0])["3d|case_1"]
    assert [label[:2] for label in found["labels"]] == [[1, "liver"], [2, "rib"]]
    seen = np.frombuffer(gzip.decompress(base64.b64decode(found["prediction"])), np.uint8)[352:]
    assert set(seen.tolist()) == {0, 2}


def test_flags_and_published_results_are_told():
    known = (page.Published("nnU-Net", "its own folds", "a paper", (0.9, 0.8), 0.85, alike=False),)
    html = page.report(run(flagged=(page.Flagged("3d", "case_1", ("liver is cut",)),), published=known))
    assert "1 case flagged for review" in html
    assert "liver is cut" in html
    assert "Another protocol than this run" in html
    alike = (dataclasses.replace(known[0], alike=True),)
    assert "Another protocol" not in page.report(run(published=alike))


def test_things_that_are_counted_have_a_table():
    one = InstanceSummary(1, "nodule", 0.1, 5, 9, 8, 7, 0.875, 0.778, 0.824, 0.7, 0.58, 0.75, 0.6, (0.5,) * 7)
    html = page.report(run(counted=(page.Counted("3d", 0, (one,)),)))
    assert "Things, one by one" in html
    assert "<td>0.778</td>" in html
    assert "Things, one by one" not in page.report(run())


def test_published_results_are_alike_only_under_the_same_protocol():
    def alike(**how: Any) -> list[bool]:
        return [one.alike for one in published("Task04_Hippocampus", **how)]

    same = {"cases": 260, "all_folds": True, "by_subject": False}
    assert sorted(alike(**same)) == [False, False, True, True]
    for other in ({"cases": 200}, {"all_folds": False}, {"by_subject": True}):
        assert not any(alike(**same | other))
    assert published("Task99_Nothing", **same) == ()
    means = [one.mean for one in published("Task05_Prostate", **same | {"cases": 32})]
    assert means == sorted(means, reverse=True)
    assert len(means) == 5


def test_tables_for_programs_hold_every_case():
    scored = run().scored
    lines = list(csv.DictReader(io.StringIO(to_csv(scored))))
    assert len(lines) == sum(len(s.rows) for s in scored)
    assert (lines[0]["configuration"], lines[0]["fold"], lines[0]["case"], lines[0]["predicted_dice"]) == (
        "2d",
        "0",
        "case_0",
        "",
    )
    document = json.loads(json.dumps(to_json(scored, {"task": "T"}), allow_nan=False))
    assert (document["task"], list(document["configurations"])) == ("T", ["2d", "3d"])
    mean = document["configurations"]["3d"][-1]
    assert mean["label"] is None
    assert mean["dice_interval"][0] < mean["dice_mean"] < mean["dice_interval"][1]


def test_one_page_over_all_tasks():
    other = run(task="Task02", title=HOSTILE, scored=())
    html = overview([Run(run(), "a/report.html"), Run(other, None)])
    reader = read(html)
    assert reader.faults == []
    assert [a["href"] for tag, a in reader.elements if tag == "a"] == ["a/report.html"] * 3
    assert HOSTILE in reader.text
    assert "not finished" in reader.text
    assert not re.search(r"https?:|@import|url\(", html)
    with pytest.raises(InputError, match="two runs are of Task01"):
        overview([Run(run(), None), Run(run(), None)])


@pytest.mark.parametrize("which", PAGES)
def test_every_run_has_a_summary_on_paper(which):
    document = summary(PAGES[which])
    assert document.startswith(b"%PDF-")
    assert document == summary(PAGES[which])


def test_many_organs_take_more_pages():
    rows = tuple(row(case, label, 0.8) for case in "ab" for label in range(1, 46))
    document = summary(page.RunPage("R", "T", scored=(Scored("3d", 0, rows),)))
    assert len(re.findall(rb"/Type /Page\b(?!s)", document)) == 1 + 2 + 3  # the front, 46 lines, 45 boxes


def test_names_on_paper_are_no_formulas():
    rows = (row("$x_1$", 1, 0.5, name="$\\frac$"), row("b", 1, 0.6, name="$\\frac$"))
    assert summary(run(title="$\\bad{", scored=(Scored("3d", 0, rows),))).startswith(b"%PDF-")


def test_markdown_known_answer():
    rows = (row("a", 1, 0.8, name="li|ver"), row("b", 1, 0.6, name="li|ver"))
    lines = to_markdown([Scored("3d", 0, rows)]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(r"| 3d | li\|ver | 2 | 0.700 ± 0.141 | – | 0.700 |")
    assert lines[3].startswith("| 3d | **mean over organs** | 2 | 0.700 | – | 0.700 |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(to_markdown([]).splitlines()) == 2


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (-0.04, "0.0"), (-1.25, "−1.2"), (3, "3.0")])
def test_numbers_as_words(value, text):
    assert text_of(value, 1) == text

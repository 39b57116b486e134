"""The report page, seen in headless Chromium as a person sees it: on a phone and a desk, by light and in the dark."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.command import Usage
from pipelines.report import POINTS, ReportInputs, RunFacts, build_report, main, read_curves

pytest.importorskip("playwright", reason="playwright is not installed: make install")
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
browsed = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
ARGUMENTS = [  # no sandbox: it refuses to run as root, as in a container; nothing that calls home
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
TEMPLATES = Path(__file__).parents[2] / "pipelines" / "templates"
SCRIPT = "<script>document.title = 'taken'</script>"

FRECHET = {"vqvae": 12.5, "flow": 3.25, "gan": 7.0}
NATS = {"vqvae": -10.0, "flow": 2e-5, "gan": -9.5}  # in this order as words, in another as numbers


def write_run(root: Path, name: str, metrics: dict[str, Any], columns: dict[str, list[float | str]]) -> None:
    folder = root / "evaluations" / name
    (folder / "figures").mkdir(parents=True)
    figures = []
    for shade, file in enumerate(("real.png", "reconstructions.png", "samples.png", "interpolations.gif")):
        Image.new("L", (34, 34), 60 * shade).save(folder / "figures" / file)
        figures.append({"file": f"figures/{file}", "caption": f"{file[:-4].capitalize()} (4)"})
    warnings = [f"the codebook uses 3 of `codes` 128 {SCRIPT}"] if name == "vqvae" else []
    about = {"metrics": metrics, "figures": figures, "warnings": warnings, "environment": {"torch": "2.13.0"}}
    (folder / "evaluation.json").write_text(json.dumps(about))
    for file, content in (("config", {"model": "x", "config": {"hidden": 64}}), ("recipe", {"steps": 200})):
        (root / "models" / name).mkdir(parents=True, exist_ok=True)
        (root / "models" / name / f"{file}.json").write_text(json.dumps(content))
    (root / "plots" / name).mkdir(parents=True)
    with (root / "plots" / name / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))


def metric(value: float | None, floor: float | None = None, error: float | None = None, **context: Any) -> dict:
    return {"value": value, "floor": floor, "error": error, "context": context}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    root = tmp_path_factory.mktemp("report")
    steps = list(range(50, 1050, 50))
    falling = [3 * math.exp(-s / 300) + 1 for s in steps]
    for name, frechet in FRECHET.items():
        metrics = {"frechet": metric(frechet, 0.9, split="test", n=360, ema=False)}
        metrics["seconds_per_sample"] = metric(6e-4, error=3.2e-5, batch_size=250)
        metrics["log_likelihood"] = metric(NATS[name])
        metrics |= {f"a_rather_long_metric_{i}": metric(1.0 * i, n=360) for i in range(8)}
        columns: dict[str, list[float | str]] = {"step": steps, "train/model/loss": falling}
        if name == "flow":
            metrics["bits_per_dim"] = metric(2.5, error=0.013, split="test")
            columns["val/bits_per_dim"] = [v if s % 250 == 0 else "" for s, v in zip(steps, falling, strict=True)]
        if name == "gan":
            metrics["frechet"] = metric(6.5, 0.9)  # the first seed's; the page shows the mean
            metrics["kid"] = metric(None)
            columns["train/critic/loss"] = [1 - v for v in falling]  # negative throughout
        write_run(root, name, metrics, columns)
    (root / "metrics").mkdir()
    (root / "metrics" / "gan.json").write_text(json.dumps({"seeds": 3, "frechet": 7.0, "frechet_sd": 0.5}))
    facts = [
        RunFacts("vqvae", "vq_vae2", "digits", "latent", mlflow_id="abcdef0123", mlflow_url="http://127.0.0.1:5000/#/x")
    ]
    facts += [RunFacts("flow", "real_nvp", "digits", "flow"), RunFacts("gan", "wgan_gp", "digits", "adversarial")]
    nodes = ["prepare@digits", "judge@digits", "report"]
    edges = [("prepare@digits", "judge@digits")]
    for name in FRECHET:
        nodes += [f"train@{name}", f"evaluate@{name}"]
        edges += [("prepare@digits", f"train@{name}"), (f"train@{name}", f"evaluate@{name}")]
        edges += [("judge@digits", f"evaluate@{name}"), (f"evaluate@{name}", "report")]
    return ReportInputs(root, facts, nodes, edges)


@pytest.fixture(scope="module")
def html(inputs: ReportInputs) -> str:
    return build_report(inputs)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


class Visit:
    """A page that is open, with all that it asked for and complained of."""

    def __init__(self, browser: Browser, address: str, width: int = 1280, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#chart svg .line")

    def column(self, heading: str) -> list[str]:
        """A column of the metrics table, from top to bottom."""
        return self.page.evaluate(
            """heading => {
                const table = document.querySelector('table.pivot');
                const at = [...table.tHead.rows[0].cells].findIndex(c => c.innerText.startsWith(heading));
                return [...table.tBodies[0].rows].map(row => row.cells[at].innerText.trim());
            }""",
            heading,
        )


@pytest.fixture(scope="module")
def address(html: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    found = Visit(browser, address)
    yield found
    found.page.close()


@browsed
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out_is_fetched_or_complains(browser: Browser, address: str, width: int, scheme: str) -> None:
    visit = Visit(browser, address, width, scheme)
    for details in visit.page.query_selector_all("details"):
        details.evaluate("d => { d.open = true; }")
    visit.page.wait_for_selector(".small svg .line")
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    sticking_out = visit.page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg')
            && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert sticking_out == []
    detail = "[...document.querySelectorAll('.detail')].every(t => t.scrollWidth <= t.parentElement.clientWidth)"
    assert visit.page.evaluate(detail)  # the metrics of one run need no scrolling sideways, even on a phone
    assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
    assert visit.complaints == []
    visit.page.close()


@browsed
def test_pictures_load_and_say_what_they_show(visit: Visit) -> None:
    pictures = visit.page.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.alt])))"
    )
    assert len(pictures) == 4 * len(FRECHET)
    assert all(width == 34 for width, _ in pictures)
    assert [alt for _, alt in pictures].count("flow: Samples (4)") == 1


@browsed
def test_kinds_of_pictures_stand_side_by_side_on_a_desk(visit: Visit) -> None:
    tops = visit.page.evaluate(
        "[...document.querySelector('.pictures').children].map(f => f.getBoundingClientRect().top)"
    )
    assert len(tops) == 4
    assert len(set(tops)) == 1


@browsed
def test_a_heading_sorts_by_number_both_ways(visit: Visit) -> None:
    visit.page.get_by_role("button", name="frechet").first.click()
    assert visit.column("run") == ["flow", "gan", "vqvae"]
    head = visit.page.locator("table.pivot th", has_text="frechet")
    assert head.get_attribute("aria-sort") == "ascending"
    visit.page.get_by_role("button", name="frechet").first.click()
    assert visit.column("run") == ["vqvae", "gan", "flow"]
    assert head.get_attribute("aria-sort") == "descending"


@browsed
def test_signs_and_exponents_are_numbers_to_the_sorting(visit: Visit) -> None:
    visit.page.get_by_role("button", name="log_likelihood").first.click()
    assert visit.column("run") == ["vqvae", "gan", "flow"]


@browsed
def test_sorting_works_by_keyboard_and_leaves_one_heading_sorted(visit: Visit) -> None:
    visit.page.get_by_role("button", name="frechet").first.click()
    visit.page.locator("table.pivot").get_by_role("button", name="model").focus()
    visit.page.keyboard.press("Enter")
    assert visit.column("model") == ["real_nvp", "vq_vae2", "wgan_gp"]
    expect(visit.page.locator("table.pivot [aria-sort]")).to_have_count(1)


@browsed
def test_empty_cells_stay_last_either_way(visit: Visit) -> None:
    for _ in range(2):
        visit.page.get_by_role("button", name="bits_per_dim").first.click()
        assert visit.column("run")[0] == "flow"


@browsed
def test_a_number_leads_to_its_context(visit: Visit) -> None:
    visit.page.get_by_role("link", name="3.25").click()
    row = visit.page.locator("tr:target")
    assert row.locator(".context").inner_text() == "split test, n 360, ema no"
    assert row.locator(".floor").inner_text() == "0.9"


@browsed
def test_seeds_and_standard_errors_are_told_apart(visit: Visit) -> None:
    assert visit.column("frechet") == ["12.5", "3.25", "7.00 ± 0.50"]
    assert visit.column("bits_per_dim") == ["", "2.500 ± 0.013", ""]
    assert "mean ± sd of 3 seeds" in visit.page.locator("[id='run-gan-frechet'] .context").inner_text()
    assert "± standard error" in visit.page.locator("[id='run-flow-bits_per_dim'] .context").inner_text()
    assert visit.column("kid") == ["", "", "–"]


@browsed
def test_curves_of_several_runs_can_be_chosen_hidden_and_put_on_a_logarithmic_scale(visit: Visit) -> None:
    lines = visit.page.locator("#chart .line")
    assert visit.page.locator("#column").input_value() == "val/bits_per_dim"
    expect(lines).to_have_count(1)
    visit.page.select_option("#column", "train/model/loss")
    expect(lines).to_have_count(3)
    linear = lines.first.get_attribute("d")
    visit.page.check("#log")
    assert lines.first.get_attribute("d") != linear
    visit.page.locator("#legend").get_by_role("button", name="flow").click()
    expect(lines).to_have_count(2)
    assert visit.page.locator("#legend [aria-pressed=false]").inner_text() == "flow"
    visit.page.select_option("#column", "train/critic/loss")
    assert visit.page.locator("#readout").inner_text() == "20 points at or below zero are not shown"
    assert visit.complaints == []


@browsed
def test_a_curve_is_drawn_to_scale(visit: Visit) -> None:
    """Heights on the screen are the values, up to shift and scale."""
    visit.page.select_option("#column", "train/model/loss")
    path = visit.page.locator("#chart .line").first.get_attribute("d") or ""
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path) if p]
    values = [3 * math.exp(-s / 300) + 1 for s in range(50, 1050, 50)]
    spans = [(y - points[0][1]) / (points[-1][1] - points[0][1]) for _, y in points]
    wanted = [(v - values[0]) / (values[-1] - values[0]) for v in values]
    assert spans == pytest.approx(wanted, abs=2e-3)  # half a tenth of a pixel in 250, and five digits of a value


@browsed
def test_the_chart_is_read_by_keyboard(visit: Visit) -> None:
    visit.page.select_option("#column", "train/model/loss")
    visit.page.focus("#chart")
    for _ in range(3):
        visit.page.keyboard.press("ArrowRight")
    assert visit.page.locator("#readout").inner_text().startswith("round 121: vqvae ")


@browsed
def test_a_runs_own_curves_are_drawn_when_opened(visit: Visit) -> None:
    details = visit.page.locator("details[data-run=flow]")
    details.locator("summary").click()
    expect(details.locator("svg")).to_have_count(2)


@browsed
def test_what_runs_say_is_text(visit: Visit) -> None:
    assert visit.page.title() == "Deep generative models"
    assert SCRIPT in visit.page.locator(".warnings").inner_text()
    assert visit.page.locator(".warnings code").inner_text() == "codes"


class Outline(HTMLParser):
    """Headings and ids, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if (given.get("href") or "").startswith("#"):
            self.targets.append(str(given["href"])[1:])


def test_headings_are_in_order_ids_unique_and_links_lead_somewhere(html: str) -> None:
    outline = Outline()
    outline.feed(html)
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(outline.targets) <= set(outline.ids)


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("back", ["--paper", "--card", "--alert", "--mark"])
def test_text_can_be_read_on_every_ground(back: str, scheme: int) -> None:
    """WCAG 2: a contrast of 4.5 for text (links and soft text stand on paper and cards only)."""
    css = (TEMPLATES / "report.css").read_text()
    colours = dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", css.split("prefers-color-scheme: dark")[scheme]))
    fronts = ["--ink"] + (["--soft", "--link"] if back in ("--paper", "--card") else [])
    for front in fronts:
        assert contrast(colours[front], colours[back]) >= 4.5, (front, back)


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) > 4 else "".join(2 * c for c in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_run_that_is_not_evaluated_is_named(inputs: ReportInputs) -> None:
    more = [*inputs.runs, RunFacts("vae", "vae", "digits")]
    with pytest.raises(FileNotFoundError, match=r"dvc repro evaluate@vae"):
        build_report(ReportInputs(inputs.root, more, inputs.nodes, inputs.edges))


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "flow", {}, {"step": []})
    (tmp_path / "evaluations" / "flow" / "figures" / "samples.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"samples\.png"):
        build_report(ReportInputs(tmp_path, [RunFacts("flow", "real_nvp", "digits")], [], []))


def test_the_page_is_the_same_bytes_every_time(inputs: ReportInputs, html: str) -> None:
    assert build_report(inputs) == html


def test_curves_skip_what_is_no_number_and_keep_their_mean_when_thinned(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    n = 10 * POINTS
    lines = [f"{i},{i},{'' if i % 2 else 'nan'}" for i in range(n)]
    path.write_text("\n".join(["step,loss,gap", *lines, f"{n},,3.5"]))
    curves = read_curves(path)
    assert curves["gap"] == [(n, 3.5)]
    assert len(curves["loss"]) == POINTS
    assert sum(y for _, y in curves["loss"]) / POINTS == pytest.approx((n - 1) / 2)
    assert [x for x, _ in curves["loss"]] == sorted({x for x, _ in curves["loss"]})
    assert curves["loss"][-1][0] == n - 1  # the last round is where the curve ends


def test_the_stage_reads_params_graph_and_tracking(
    inputs: ReportInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(inputs.root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "params.yaml").write_text(
        "datasets:\n  digits: {source: digits}\n"
        "runs:\n  flow: {model: real_nvp, family: flow, data: digits, judge: digits}\n"
    )
    (tmp_path / "dvc.yaml").write_text("stages:\n  train:\n    foreach: [flow]\n    do:\n      cmd: echo ${item}\n")
    (tmp_path / ".dgm" / "tracking").mkdir(parents=True)
    (tmp_path / ".dgm" / "tracking" / "flow.json").write_text(
        json.dumps({"run_id": "0123456789", "uri": "https://tracking", "url": "https://tracking/#/runs/0123456789"})
    )
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True, capture_output=True)
    assert main([]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert '<a href="https://tracking/#/runs/0123456789">MLflow run 01234567</a>' in page
    assert "make dashboards" not in page  # only a store on this machine needs it
    assert "<title>train@flow</title>" in page
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["index.html"]
    assert capsys.readouterr().out.startswith("report/index.html: 1 runs")
    (tmp_path / "evaluations" / "flow" / "evaluation.json").unlink()
    with pytest.raises(Usage, match="dvc repro evaluate@flow"):
        main([])
    assert (tmp_path / "report" / "index.html").read_text() == page

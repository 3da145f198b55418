"""The page of an export and of a run: what it shows, that it stands alone, that names are text in it, and what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny import make_model, make_text
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.digests import sha256_of, sha256_of_value
from gradmap_pipeline.metrics import Metric
from gradmap_pipeline.page.comparison import Compared, draw_tradeoff, find_front, make_comparison_page
from gradmap_pipeline.page.facts import Facts, facts_of_lineage, facts_of_run
from gradmap_pipeline.page.page import make_page
from gradmap_pipeline.page.pictures import draw_layers
from gradmap_pipeline.page.training_picture import draw_training
from gradmap_pipeline.page.views import Base, Decision, Limit, ModelLine, Ranking, Step, Training, TrainingMoment, read_all
from gradmap_pipeline.run.run_files import list_runs
from gradmap_pipeline.run.store import Store

_VOID = {"meta", "br", "hr", "img", "link", "input"}
_LOADS = {"src", "href", "srcset", "data", "action", "poster", "background"}
_TEXT = {"dataset": {"path": "text.txt"}, "samples": 4, "sequence_length": 32}
_SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """A page, parsed strictly: every tag is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check_alone(page: Page, text: str) -> None:
    """Nothing in the page loads or runs anything."""
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    assert not [pair for pair in page.attributes if pair[0] in _LOADS or pair[0].startswith("on")]
    assert "@import" not in text
    assert "url(" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def gradmap(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a recipe ran to its end, with an export."""
    folder = tmp_path_factory.mktemp("ran")
    make_model(folder / "model", num_hidden_layers=6)
    make_text(folder / "text.txt")
    steps: list[dict[str, Any]] = [
        {"use": "evaluate", "id": "evaluate_dense", "with": _TEXT},
        {"use": "calibrate", "with": _TEXT},
        {"use": "gradmap_score", "with": {"layers": 2}},
        {"use": "prune", "with": {"layers": 1}},
        {"use": "project_compensate"},
        {"use": "evaluate", "with": _TEXT, "limits": {"perplexity": {"max": 100000, "max_ratio": 50}}},
        {"use": "export", "with": {"to": "out"}},
    ]
    (folder / "r.yaml").write_text("# <b>a recipe</b>\n" + json.dumps({"version": 1, "model": {"path": "model"}, "steps": steps}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = gradmap("run", "r.yaml", "--set", "prune.layers=2")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(ran: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ran)
    return ran


def test_page_of_a_run_shows_what_was_recorded(folder: Path, tmp_path: Path) -> None:
    result = gradmap("report", "r.yaml", "--to", tmp_path / "r.html", "--svg", tmp_path / "r.svg")
    assert (result.exit_code, result.stdout.splitlines()) == (0, [f"wrote {tmp_path / 'r.html'}", f"wrote {tmp_path / 'r.svg'}"])
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    check_alone(page, text)
    record = Store(folder / ".gradmap").load_run(folder / "r.yaml")
    assert record is not None
    dense, *_, last = record["models"]
    assert (dense["layers"], last["layers"]) == (6, 4)
    for shown in (
        "model, 4 of 6 layers",
        "Layers 6 → 4 \N{MINUS SIGN}33.3%",
        f"Parameters {dense['parameters']:,} → {last['parameters']:,}",
        f"Removed, counted from 0: {', '.join(str(layer) for layer in range(6) if layer not in last['kept'])}.",
        "# <b>a recipe</b>",
        "Set on the command line: prune.layers=2.",
        "kept evaluate perplexity on text.txt max 1e+05",
        "dense text.txt, 4 x 32 tokens",
        f"torch version {record['versions']['torch']}",
        record["base"]["sha256"],
        f"export: model.safetensors {(folder / 'out' / 'model.safetensors').stat().st_size:,} ",
        sha256_of(folder / "out" / "model.safetensors"),
    ):
        assert shown in page.text, shown
    evaluations = [step["outputs"]["evaluation"] for step in record["steps"] if step["stage"] == "evaluate"]
    assert len(evaluations) == 2
    for evaluation in evaluations:
        assert f"{evaluation['loss']:.4f} {evaluation['perplexity']:.4g} {evaluation['label']} text.txt" in page.text
    assert [limit["missed_by"] for limit in record["limits"]] == [None, None]
    assert page.attributes.count(("class", "good")) == 2
    assert all(step["seconds"] > 0 and step["peak_bytes"] > 10**8 for step in record["steps"])
    assert "A limit is missed" not in page.text
    assert ElementTree.parse(tmp_path / "r.svg").getroot().tag == f"{_SVG}svg"


def test_page_of_an_export_is_one_of_its_files(folder: Path, tmp_path: Path) -> None:
    lineage = json.loads((folder / "out" / "gradmap.json").read_text())
    written = lineage["files"]["report.html"]
    assert written == {"size": (folder / "out" / "report.html").stat().st_size, "sha256": sha256_of(folder / "out" / "report.html")}
    assert gradmap("report", "out", "--to", tmp_path / "again.html").exit_code == 0
    text = (tmp_path / "again.html").read_text()
    assert text == (folder / "out" / "report.html").read_text()
    page = Page(text)
    check_alone(page, text)
    assert lineage["files"]["model.safetensors"]["sha256"] in page.text
    assert f"{lineage['metrics'][0]['value']:.3f}" in page.text
    assert lineage["model"]["bytes"] == (folder / "out" / "model.safetensors").stat().st_size
    verified = gradmap("verify", "out")
    assert verified.exit_code == 0
    assert "besides" not in verified.stdout
    again = gradmap("run", "r.yaml", "--set", "prune.layers=2")
    assert "export: done (from the store)" in again.stdout


def test_run_that_misses_a_limit_says_so(folder: Path, tmp_path: Path) -> None:
    (folder / "missed.yaml").write_text((folder / "r.yaml").read_text().replace("100000", "2"))
    assert gradmap("run", "missed.yaml").exit_code == 5
    assert gradmap("report", "missed.yaml", "--to", tmp_path / "m.html").exit_code == 0
    page = Page((tmp_path / "m.html").read_text())
    assert re.search(r"A limit is missed\. perplexity [\d.e+]+ on 'text.txt' is over max 2 by", page.text)
    assert "missed by" in page.text


def test_without_a_name_the_latest_finished_run_is_reported(folder: Path, tmp_path: Path) -> None:
    assert gradmap("run", "r.yaml", "--set", "prune.layers=1").exit_code == 0
    head = json.loads(gradmap("log", "--json", "--limit", 1).stdout)
    assert gradmap("run", "r.yaml", "--set", "model.path=out/nowhere").exit_code == 2
    result = gradmap("report", "--to", tmp_path / "l.html")
    assert result.exit_code == 0, result.output
    told, wrote = result.stdout.splitlines()
    assert re.fullmatch(rf"run {head['id']} of r\.yaml, ended [\d-]+ [\d:]+ UTC", told)
    assert wrote == f"wrote {tmp_path / 'l.html'}"
    assert "Set on the command line: prune.layers=1." in Page((tmp_path / "l.html").read_text()).text
    refused = gradmap("report", "--store", "nowhere", "--to", tmp_path / "n.html")
    advice = "run a recipe first, name the store with --store, or name the folder of an export"
    assert (refused.exit_code, refused.stderr) == (2, f"error: the store 'nowhere' has no finished run; {advice}\n")
    assert not (tmp_path / "n.html").exists()


def test_comparison_does_not_take_the_place_of_a_run(folder: Path) -> None:
    before = Store(folder / ".gradmap").load_run(folder / "r.yaml")
    assert gradmap("compare", "r.yaml", "--out", folder / "comparison").exit_code == 0
    assert Store(folder / ".gradmap").load_run(folder / "r.yaml") == before
    result = gradmap("report", "comparison")
    assert (result.exit_code, result.stderr) == (4, "error: 'comparison' holds no model; name the folder of an export\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nix.yaml"], "'nix.yaml' is neither a folder nor a recipe: there is no such file; name an export or a recipe"),
        (["text.txt"], "has no finished run of 'text.txt'; run it with `gradmap run text.txt`, or name the store with --store"),
        (["out", "--to", "out/page.html"], "'out/page.html' lies in "),
        (["out", "--to", "text.txt"], "--to 'text.txt' is a file that no report has written; name another file, or move it away"),
        (["out", "--to", "model"], "--to 'model' is a folder; name another file"),
        (["out", "--svg", "text.txt"], "--svg 'text.txt' is a file that no report has written"),
        (["out", "--to", "a.html", "--svg", "./a.html"], "--to and --svg name the same file, 'a.html'; name two"),
        (["out", "--to", "text.txt/a.html"], "--to 'text.txt/a.html' cannot be written: "),
        (["model"], "'model' is not an export: gradmap.json cannot be read"),
    ],
)
def test_what_cannot_be_reported_is_refused(folder: Path, arguments: list[str], told: str) -> None:
    result = gradmap("report", *arguments)
    assert result.exit_code == (4 if arguments == ["model"] else 2)
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_an_earlier_page_is_replaced(folder: Path, tmp_path: Path) -> None:
    target, picture = tmp_path / "x.html", tmp_path / "x.svg"
    for _ in range(2):
        assert gradmap("report", "out", "--to", target, "--svg", picture).exit_code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.html", "x.svg"]


def test_record_that_was_changed_counts_as_not_there(folder: Path, tmp_path: Path) -> None:
    (folder / "other.yaml").write_text((folder / "r.yaml").read_text())
    assert gradmap("run", "other.yaml", "--set", "prune.layers=2").exit_code == 0
    file = list_runs(folder / ".gradmap")[0].path
    assert gradmap("report", "other.yaml", "--to", tmp_path / "o.html").exit_code == 0
    file.write_text(file.read_text().replace("gradmap-pipeline", "gradmap_pipeline"))
    assert gradmap("report", "other.yaml", "--to", tmp_path / "o.html").exit_code == 2
    file.unlink()


_EVIL = "</title></style><script>alert('x')</script><img src=x onerror=\"y\">\x1b[31m\u202e& {{ 7 * 7 }}"


_CURVE = [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.25, "held_out": 2.0}, {"step": 40, "loss": 2.0, "held_out": 2.5}]


def make_facts(scores: dict[int, float], removed: tuple[int, ...] = (), name: str = "m", layers: int = 4) -> Facts:
    """A model whose layers have these scores; `name` stands wherever there is a name."""
    metric = Metric(name=name, value=1.5, better="lower", unit=name, on=name)
    scored = {"method": name, "decisions": [{"removed": layer, "scores": scores} for layer in removed or (0,)]}
    site = {"layer": 0, "parameter": name, "role": name, "shift": 1.0, "relative_shift": 0.5, "missing_left": 0.25}
    answer = {"prompt": name, "answer": name, "base_answer": name, "repetition": 0.5, "base_repetition": 0.4}
    outputs: dict[str, Any] = {
        name: scored,
        "compensation": {"sites": [site], "shifts": {}},
        "answers": {"answers": [answer], "tokens": 8},
        "distillation": {"before": 3.0, "after": 2.0, "best_step": 20, "steps": 40, "trained_parameters": 7, "curve": _CURVE},
    }
    return Facts(
        base=Base(name=name, sha256=name, layers=layers, parameters=100, bytes=2000),
        kept=tuple(layer for layer in range(layers) if layer not in removed),
        models=[ModelLine(label=name, layers=layers), ModelLine(label=name, layers=layers, metrics={name: metric})],
        steps=[Step(id=name, stage=name, options={name: [name]}, outputs=outputs)],
        made_by=name,
        versions={name: name},
        patched=(name,),
        quantisation=name,
        recipe_name=name,
        failure=name,
        machine={name: name},
        limits=[Limit(step=name, metric=name, bound=name, limit=1, value=2, missed_by=1)],
    )


@pytest.mark.parametrize("recipe", ["", _EVIL])
def test_names_are_text(recipe: str) -> None:
    facts = make_facts({0: 1.0, 1: 2.0}, (1,), _EVIL)
    text = make_page(Facts(**{**vars(facts), "recipe": recipe}))
    page = Page(text)
    check_alone(page, text)
    assert "{{ 7 * 7 }}" in page.text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert page.text.count("<script>alert('x')</script>") > 15
    ElementTree.fromstring(draw_layers(facts))


def bars_of(facts: Facts) -> dict[int, tuple[float, float, str]]:
    """Top, bottom and kind of each layer's bar."""
    bars = {}
    for rect in ElementTree.fromstring(draw_layers(facts)).iter(f"{_SVG}rect"):
        title = rect.find(f"{_SVG}title")
        if title is not None and title.text is not None:
            layer = int(re.findall(r"layer (\d+)", title.text)[0])
            top = float(rect.attrib["y"])
            bars[layer] = (top, top + float(rect.attrib["height"]), rect.attrib["class"])
    return bars


def test_bars_are_as_high_as_scores() -> None:
    bars = bars_of(make_facts({0: 4.0, 1: 1.0, 2: 2.0, 3: 3.0}, (1,)))
    assert [kind for _, _, kind in bars.values()] == ["gm-keep", "gm-cut", "gm-keep", "gm-keep"]
    heights = {layer: bottom - top for layer, (top, bottom, _) in bars.items()}
    for layer, times in ((0, 4), (2, 2), (3, 3)):
        assert heights[layer] == pytest.approx(times * heights[1], abs=0.3)
    assert len({bottom for _, bottom, _ in bars.values()}) == 1


def test_scores_below_zero_hang_from_the_line_of_zero() -> None:
    bars = bars_of(make_facts({0: -2.0, 1: 1.0, 2: 0.0, 3: 2.0}))
    assert bars[0][0] == pytest.approx(bars[3][1], abs=0.2)
    assert bars[0][1] - bars[0][0] == pytest.approx(bars[3][1] - bars[3][0], abs=0.2)


def test_scores_far_apart_are_on_a_logarithmic_scale() -> None:
    facts = make_facts({0: 1000.0, 1: 1.0, 2: 10.0, 3: 100.0})
    assert "logarithmic scale" in draw_layers(facts)
    heights = [bottom - top for top, bottom, _ in bars_of(facts).values()]
    steps = [heights[2] - heights[1], heights[3] - heights[2], heights[0] - heights[3]]
    assert steps[0] > 20
    assert steps == pytest.approx([steps[0]] * 3, abs=0.3)
    assert "logarithmic" not in draw_layers(make_facts({0: 40.0, 1: 1.0}))


def test_training_curve_is_where_the_losses_are() -> None:
    """From step 0 to 40 across, from loss 2 to 3 upwards; held-out losses begin with the one before training."""
    curve = Training(before=3.0, after=2.0, best_step=20, steps=40, trained_parameters=7, curve=read_all(TrainingMoment, _CURVE))
    picture = ElementTree.fromstring(draw_training(curve))
    circles = [(float(at.get("cx", 0)), float(at.get("cy", 0)), at.get("class")) for at in picture.iter(f"{_SVG}circle")]
    assert [circle for circle in circles if circle[1] != 36.0] == [
        (64.0, 58.0, "gm-ring"),
        (506.0, 212.0, "gm-fix"),
        (948.0, 135.0, "gm-ring"),
    ]
    (line,) = picture.iter(f"{_SVG}polyline")
    assert line.get("points") == "285.0,135.0 506.0,173.5 948.0,212.0"
    assert draw_training(curve.model_copy(update={"curve": ()})) == ""


@pytest.mark.parametrize("layers", [1, 4, 80, 126])
@pytest.mark.parametrize("scores", [{}, {0: 0.0}, {0: 5.0}, {0: 1e-30, 1: 1e30}, {99: 1.0}])
def test_every_layer_has_a_place(layers: int, scores: dict[int, float]) -> None:
    facts = make_facts(scores, layers=layers)
    assert sorted(bars_of(facts)) == list(range(layers))
    assert all(0 <= top <= bottom <= 260 for top, bottom, _ in bars_of(facts).values())


def test_what_has_another_form_is_left_out() -> None:
    lineage: dict[str, Any] = {
        "base": {"name": "m", "sha256": "0", "layers": 3},
        "layers_kept": [0, 2],
        "steps": [
            {"id": "a", "stage": "a", "options": {}, "outputs": {"x": {"method": 3, "decisions": "none"}, "y": [1], "z": None}},
            "no step",
        ],
        "metrics": [{"name": "p", "value": float("nan"), "better": "lower"}, {"name": "q", "value": 1.0, "better": "lower"}, 7],
        "files": [],
        "versions": None,
    }
    facts = facts_of_lineage(lineage)
    assert facts is not None
    assert facts.ranking is None
    assert [step.id for step in facts.steps] == ["a"]
    assert facts.columns == ["q"]
    assert facts.removed == [1]
    Page(make_page(facts))
    assert facts_of_lineage({"holds": "comparison"}) is None
    assert facts_of_run({}) is None


@pytest.mark.parametrize("value", [0, -1, 5e-324, -5e-324, 1e-99, 1e99, -1e99, 1e308, -1e308, 10**400, "7", True, None])
def test_odd_numbers_of_a_lineage_are_drawn_or_left_out(value: Any) -> None:
    """A page must not fail when hours of work are about to be written."""
    for other in (0.0, 1.0, -1e308, 1e308, 1e-308):
        scores = {"0": value, "1": other, "2": 1.0, "-5": 1.0, "99999999999999999999": 1.0}
        site = {"layer": value, "parameter": "p", "shift": other, "relative_shift": value, "missing_left": other}
        outputs = {
            "scores": {"method": "m", "decisions": [{"removed": 0, "scores": scores}], "protected": [value]},
            "correction": {"sites": [site, {**site, "layer": 1}], "shifts": {"0": value, "1": other}},
            "loss": {
                "label": "",
                "dataset": "",
                "samples": 1,
                "sequence_length": 1,
                "loss": value,
                "perplexity": other,
                "tokens": value,
            },
        }
        step = {"id": "a", "stage": "a", "options": {"x": value}, "outputs": outputs, "seconds": value, "peak_bytes": value}
        lineage = {
            "base": {"name": "m", "sha256": "0", "layers": 3, "parameters": value, "bytes": value},
            "model": {"label": "", "parameters": value, "bytes": 1},
            "layers_kept": [0, value, [value], {}],
            "steps": [step, {**step, "seconds": other}],
            "metrics": [{"name": "p", "value": value, "better": "lower"}, {"name": "q", "value": other, "better": "lower"}],
            "files": {"f": {"size": value, "sha256": ""}},
            "max_logit_difference": value,
        }
        facts = facts_of_lineage(lineage)
        if facts is not None:
            Page(make_page(facts))
            ElementTree.fromstring(draw_layers(facts))
    assert facts_of_lineage({"base": {"name": "m", "sha256": "0", "layers": 10**9}, "layers_kept": [0]}) is None


def test_last_ranking_is_shown() -> None:
    steps = []
    for name in ("first", "last"):
        ranking = {"method": name, "decisions": [{"removed": 0, "scores": {"0": 1.0}}]}
        steps.append({"id": name, "stage": name, "options": {}, "outputs": {"scores": ranking}})
    facts = facts_of_lineage({"base": {"name": "m", "sha256": "0", "layers": 1}, "layers_kept": [0], "steps": steps})
    assert facts is not None
    assert facts.ranking == Ranking(method="last", decisions=(Decision(removed=0, scores={0: 1.0}),))


def compare_models(points: list[tuple[int, float]], better: Any = "lower", name: str = "m") -> list[Compared]:
    """Variants with these bytes and values of one metric."""
    metrics = [Metric(name=name, value=value, better=better) for _, value in points]
    sizes = [size for size, _ in points]
    return [Compared(name, name, 1, 2, size, {name: metric}, 1.0) for size, metric in zip(sizes, metrics, strict=True)]


@pytest.mark.parametrize(
    ("points", "better", "front"),
    [
        ({1: (3, 1), 2: (2, 2), 3: (2, 3), 4: (1, 5), 5: (3, 2)}, "lower", [4, 2, 1]),
        ({1: (3, 1), 2: (2, 2), 3: (2, 3), 4: (1, 5), 5: (3, 2)}, "higher", [4]),
        ({1: (1, 1), 2: (1, 1), 3: (2, 1)}, "lower", [1, 2]),
        ({7: (1, 1)}, "higher", [7]),
    ],
)
def test_front_is_what_no_other_beats(points: dict[int, tuple[float, float]], better: Any, front: list[int]) -> None:
    assert find_front(points, better) == front


@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0), (10.0, 1000.0, 1e5), (-5.0, 0.0, 5.0), (0.0, 0.0, 0.0), (7.0, 7.0, 7.0)])
def test_points_of_a_comparison_lie_where_their_values_are(values: tuple[float, ...]) -> None:
    variants = compare_models([(1000 * number, value) for number, value in enumerate(values, 1)])
    root = ElementTree.fromstring(draw_tradeoff(variants, "m"))
    heights = [-float(circle.attrib["cy"]) for circle in root.iter(f"{_SVG}circle")]
    across = [float(circle.attrib["cx"]) for circle in root.iter(f"{_SVG}circle")]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2) != 0
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert (heights[1] > heights[0]) == (values[1] > values[0])
    lines = root.findall(f"{_SVG}line")
    assert 2 <= len(lines) <= 12
    assert all(0 <= float(line.attrib["y1"]) <= 420 for line in lines)


def test_page_of_a_comparison_stands_alone() -> None:
    text = make_comparison_page(compare_models([(1, 2.0), (2, 1.0)], name=_EVIL), [_EVIL], _EVIL)
    page = Page(text)
    check_alone(page, text)
    assert page.text.count("<script>alert('x')</script>") > 8
    assert page.tags.count("circle") == 2


def test_digest_of_an_export_covers_its_page(folder: Path) -> None:
    lineage = json.loads((folder / "out" / "gradmap.json").read_text())
    assert lineage.pop("sha256") == sha256_of_value(lineage)

"""Metrics: what an artifact says of a model, the columns of tables, limits on any metric, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gradmap_pipeline import Artifact, Measurement, Metric, StageError
from gradmap_pipeline.cli import app
from gradmap_pipeline.recipe.limits import Limit
from gradmap_pipeline.run.limits import check_limits
from gradmap_pipeline.run.measured import Measured, name_columns, read_metrics


def make_metric(value: float = 0.5, **fields: Any) -> Metric:
    return Metric.model_validate({"name": "acc", "value": value, "better": "higher", "on": "task", "model": "m", **fields})


PLUGIN = '''
"""Measure how long a text is, and count how often that was done."""
from pathlib import Path
from pydantic import BaseModel, Field
from gradmap_pipeline import Artifact, Context, DatasetSource, Measurement, Metric, ModelGraph, Stage, hookimpl

class Length(Artifact):
    """How long a text is, for a model of so many layers."""
    model: str
    characters: float
    def list_metrics(self):
        return LIST

class MeasureLength(Stage):
    """Measure the length of a text, divided by the layers of the model."""
    name = "measure_length"
    dataset: DatasetSource = Field(description="Text.")
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        measurement: Measurement
        length: Length
    def run(self, inputs: Inputs, context: Context) -> Outputs:
        with Path("calls.txt").open("a") as file:
            file.write(f"{len(inputs.model.layers)}\\n")
        value = sum(map(len, self.dataset.documents())) / len(inputs.model.layers)
        metric = Metric(name="length", value=value, better="lower", unit="characters", on=self.dataset.name, on_option="dataset")
        digest = inputs.model.digest
        return self.Outputs(measurement=Measurement(model=digest, metrics=(metric,)), length=Length(model=digest, characters=value))

@hookimpl
def gradmap_stages():
    return [MeasureLength]
'''


@pytest.fixture
def folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a stage that measures the length of a text of 120 characters, and keeps count of its runs."""
    monkeypatch.chdir(tmp_path)
    write_plugin(tmp_path, '[Metric(name="half", value=self.characters / 2, better="lower")]')
    (tmp_path / "text.txt").write_text("x" * 120)
    steps = [
        {"use": "prune", "with": {"layers": [1]}},
        {"use": "measure_length", "id": "length", "with": {"dataset": {"path": "text.txt"}}},
    ]
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    return tmp_path


def write_plugin(folder: Path, metrics: str) -> None:
    (folder / "plugin.py").write_text(PLUGIN.replace("LIST", metrics))


def gradmap(command: str, *overrides: str) -> Result:
    settings = [part for override in overrides for part in ("--set", override)]
    return CliRunner().invoke(app, [command, "r.yaml", "--plugin", "plugin.py", *settings])


def count_calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().split()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": float("nan")}, "metric 'acc on task' is nan; a metric is a finite number"),
        ({"value": float("-inf")}, "metric 'acc on task' is -inf; a metric is a finite number"),
        ({"stderr": float("inf")}, "the standard error of metric 'acc on task' is inf; a metric is a finite number"),
    ],
)
def test_a_metric_is_finite(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=f"^{re.escape(message)}$"):
        make_metric(**fields)


@pytest.mark.parametrize(
    ("value", "stderr", "figure"),
    [
        (18.6234, None, "18.623"),
        (0.43125, 0.01234, "0.4313 ± 0.012"),
        (0.0, None, "0.000"),
        (-2.5, 0.5, "-2.500 ± 0.5"),
        (1.234e-5, None, "1.234e-05"),
    ],
)
def test_figures(value: float, stderr: float | None, figure: str) -> None:
    assert make_metric(value, stderr=stderr).figure == figure


class Broken(Artifact):
    """An artifact of a plugin whose metrics cannot be had."""

    given: Any = None

    def list_metrics(self) -> Any:
        if self.given == "fail":
            raise SystemExit(3)
        return self.given


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        (
            Measurement(model="m", metrics=(make_metric(0.1), make_metric(0.2))),
            "its output 'a' has the metric 'acc on task' of a model that has it already; give the two different names, or say what "
            "each was measured on",
        ),
        (
            Broken(given=[make_metric(model="")]),
            "its output 'a' has the metric 'acc on task' and does not say of which model; give the metric the digest of the model "
            "as 'model'",
        ),
        (Broken(given="fail"), "list_metrics() of its output 'a' failed: SystemExit: 3"),
        (Broken(given=3), "list_metrics() of its output 'a' must return a list of Metric, got 3"),
        (Broken(given=["acc"]), "list_metrics() of its output 'a' must return a list of Metric, got ['acc']"),
    ],
)
def test_what_artifacts_say_must_be_plain(artifact: Artifact, message: str) -> None:
    with pytest.raises(StageError, match=f"^{re.escape(message)}$"):
        read_metrics({"a": artifact})


def test_metrics_get_the_model_of_their_artifact() -> None:
    metrics = read_metrics({"a": Measurement(model="one", metrics=(make_metric(model=""), make_metric(model="other")))})
    assert [metric.model for metric in metrics] == ["one", "other"]


def test_columns_tell_apart_what_cannot_be_compared() -> None:
    def columns(*fields: tuple[str, dict[str, Any]]) -> list[str]:
        return name_columns([Measured(step, make_metric(**more)) for step, more in fields])

    assert columns(("a", {}), ("b", {"model": "other"})) == ["acc on task"] * 2
    assert columns(("a", {"unit": "%", "on": ""})) == ["acc (%)"]
    assert columns(("a", {"setting": "5-shot"}), ("b", {"setting": "5-shot", "model": "other"})) == ["acc on task"] * 2
    assert columns(("a", {"setting": "5-shot"}), ("b", {})) == ["acc on task, 5-shot", "acc on task"]
    assert columns(("a", {"value": 0.1}), ("b", {"value": 0.2})) == ["acc on task, step a", "acc on task, step b"]
    assert columns(("a", {"value": 0.1}), ("b", {"value": 0.1})) == ["acc on task"] * 2
    assert columns(("a", {}), ("b", {"better": "lower", "model": "other"})) == ["acc on task, step a", "acc on task, step b"]


@pytest.mark.parametrize(
    ("limit", "missed_by"),
    [
        ({"min": 0.4}, None),
        ({"max": 0.4}, None),
        ({"min": 0.5}, 0.1),
        ({"max": 0.25}, 0.15),
        ({"max_ratio": 0.5}, None),
        ({"max_ratio": 0.4}, 0.1),
        ({"min_ratio": 0.5}, None),
        ({"min_ratio": 0.75}, 0.25),
    ],
)
def test_how_far_a_limit_is_missed(limit: dict[str, float], missed_by: float | None) -> None:
    """0.4, where the unpruned model has 0.8."""
    base = [make_metric(0.3, setting="5-shot"), make_metric(0.8)]
    (checked,) = check_limits([make_metric(0.4)], {"acc": Limit.model_validate(limit)}, base)
    assert checked.missed_by == (None if missed_by is None else pytest.approx(missed_by))


def test_a_limit_on_a_name_holds_for_all_of_it() -> None:
    metrics = [make_metric(0.4), make_metric(0.6, on="other"), make_metric(0.1, name="em")]
    checked = check_limits(metrics, {"acc": Limit(min=0.5), "acc on other": Limit(max=0.5)})
    assert [(limit.metric, limit.bound, limit.missed_by is not None) for limit in checked] == [
        ("acc on task", "min", True),
        ("acc on other", "min", False),
        ("acc on other", "max", True),
    ]


def test_ratios_need_a_value_of_the_unpruned_model() -> None:
    with pytest.raises(StageError, match=r"a ratio limits 'acc on task', which the step does not give for the unpruned model"):
        check_limits([make_metric()], {"acc": Limit(min_ratio=0.5)}, [make_metric(on="other")])
    with pytest.raises(StageError, match=r"a ratio limits 'acc on task', which is 0\.000 for the unpruned model; use min or max"):
        check_limits([make_metric()], {"acc": Limit(min_ratio=0.5)}, [make_metric(0.0)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("length.limits={length: 30}", "steps.limits.length: found 30, accepted: a mapping, as in {max: 30} or {min: 30}"),
        ("length.limits={length: {max: much}}", "steps.limits.length.max: found 'much', accepted: a number"),
        ("length.limits={length: {max: .nan}}", "steps.limits.length.max: found .nan, accepted: a finite number"),
        ("length.limits={length: {}}", "steps.limits.length: found no bound, accepted: min, max, min_ratio, max_ratio, as in"),
        ("length.limits={length: {maximum: 3}}", "unknown key 'maximum'; did you mean 'max'?"),
        (
            "length.limits={length: {min: 4, max: 3}}",
            "steps.limits.length: found 4 as the least value and 3 as the largest; no value passes",
        ),
        (
            "length.limits={length: {min_ratio: 2, max_ratio: 1}}",
            "steps.limits.length: found 2 as the least value and 1 as the largest; no value passes",
        ),
        ("length.limits=[length]", 'steps.limits: found ["length"], accepted: a mapping'),
        ("prune.limits={length: {max: 3}}", "step 'prune' gives no metric 'length'; none of its outputs has metrics"),
    ],
)
def test_wrong_limits_before_anything_runs(setting: str, message: str, folder: Path) -> None:
    result = gradmap("check", setting)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_limits_that_a_stage_cannot_have(folder: Path) -> None:
    recipe = json.loads((folder / "r.yaml").read_text())
    text = {"dataset": {"path": "text.txt"}, "samples": 1, "sequence_length": 32}
    recipe["steps"] = [
        {"use": "evaluate", "with": text, "limits": {"perplexty": {"max": 3}, "perplexity on text.txt": {"max": 3}}},
        {"use": "evaluate", "id": "inside", "with": {**text, "limits": {"perplexity": {"max": 3}}}},
    ]
    (folder / "r.yaml").write_text(json.dumps(recipe))
    result = gradmap("check")
    assert result.exit_code == 2
    told = [line.partition(": ")[2].partition(": ")[2] for line in result.stderr.splitlines()]
    assert told == [
        "step 'evaluate' gives no metric 'perplexty'; did you mean 'perplexity'?",
        "step 'inside': option 'limits': stands beside 'with', not in it: `limits: {perplexity: {max: 30}}`",
    ]


def test_ratios_need_one_model_to_compare_with(folder: Path) -> None:
    plugin = (folder / "plugin.py").read_text()
    (folder / "plugin.py").write_text(
        plugin.replace("        model: ModelGraph\n    class", "        model: ModelGraph\n        other: ModelGraph\n    class")
    )
    recipe = json.loads((folder / "r.yaml").read_text())
    recipe["steps"][1] |= {"from": {"other": "model.model"}, "limits": {"half": {"max_ratio": 2}}}
    (folder / "r.yaml").write_text(json.dumps(recipe))
    result = gradmap("check")
    assert result.exit_code == 2
    assert (
        "step 'length': 'max_ratio' compares with the unpruned model, which can take the place of one input, and the"
        in result.stderr
    )


def test_a_limit_on_any_metric_ends_the_run_and_costs_nothing_to_change(folder: Path) -> None:
    """120 characters over 3 of 4 layers: 40, where the unpruned model has 30."""
    result = gradmap("run", "length.limits={length: {max: 35}, half: {min: 20.5, max_ratio: 1.3}}")
    assert result.exit_code == 5
    assert "length: done" in result.stdout
    assert re.search(r"pruned .*40\.000", result.stdout)
    assert result.stderr == (
        "error: step 'length': length 40 characters on 'text.txt' is over max 35 by 5; half 20 is under min 20.5 by 0.5; "
        "half 20 is 1.333 times that of the unpruned model (15), over max_ratio 1.3 by 0.03333; remove fewer layers, calibrate on "
        "more text, quantise less, or change the limit\n"
    )
    assert count_calls(folder) == ["3", "4"]
    result = gradmap("run", "length.limits={length: {max: 45}, half: {min: 19, max_ratio: 1.4}}")
    assert result.exit_code == 0, result.stderr
    assert "length: done (from the store)" in result.stdout
    assert count_calls(folder) == ["3", "4"]
    assert re.search(r"model +layers .* length on text\.txt \(characters\) +half *\n", result.stdout)
    assert re.search(r"dense +4 .* 30\.000 +15\.000 *\n +pruned +3 .* 40\.000 +20\.000 *\n", result.stdout)


def test_a_limit_on_what_is_not_measured_is_refused_when_that_is_known(folder: Path) -> None:
    result = gradmap("run", "length.limits.width.max=3")
    assert result.exit_code == 4
    assert (
        result.stderr
        == "error: step 'length': 'limits' names 'width', which was not measured; measured: length on text.txt, half\n"
    )
    assert gradmap("run", "length.limits.half.max=30").exit_code == 0
    assert count_calls(folder) == ["3"]


def test_a_measurement_from_the_store_has_the_name_of_now(folder: Path) -> None:
    assert gradmap("run").exit_code == 0
    (folder / "text.txt").rename(folder / "moved.txt")
    result = gradmap("run", "length.dataset.path=moved.txt", "length.limits={length on moved.txt: {max: 45}}")
    assert result.exit_code == 0, result.stderr
    assert "length on moved.txt (characters)" in result.stdout
    assert count_calls(folder) == ["3"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ('[Metric(name="half", value=float("inf"), better="lower")]', "metric 'half' is inf; a metric is a finite number"),
        ("[1 / 0]", "list_metrics() of its output 'length' failed: ZeroDivisionError: division by zero"),
        ('[Metric(name="half", value=1, better="lower", model="me")]', "it gives the metric 'half' of a model 'me', which nobody"),
    ],
)
def test_broken_metrics_of_a_plugin(metrics: str, message: str, folder: Path) -> None:
    write_plugin(folder, metrics)
    result = gradmap("run")
    assert result.exit_code == 4
    assert result.stderr.startswith(f"error: step 'length': stage 'measure_length': {message}")


def test_a_table_of_its_own_for_many_metrics(folder: Path) -> None:
    metrics = '[Metric(name=f"figure {number}", value=self.characters, better="lower") for number in range(20)]'
    write_plugin(folder, metrics)
    result = gradmap("run", "length.limits.figure 0.max_ratio=9")
    assert re.search(r"metric +dense +pruned *\n.*\n +length on text\.txt \(characters\) +30\.000 +40\.000", result.stdout)
    assert re.search(r"figure 19 +30\.000 +40\.000", result.stdout)


def test_option_of_a_stage_cannot_be_called_as_the_key_of_steps(folder: Path) -> None:
    (folder / "plugin.py").write_text((folder / "plugin.py").read_text().replace("    dataset: D", "    limits: D"))
    result = gradmap("check")
    assert result.exit_code == 2
    assert "stage 'measure_length': option 'limits' has the name of a key of steps; give it another name" in result.stderr


def test_what_was_measured_counts_for_the_card_of_an_export(folder: Path) -> None:
    """An export is written again where an earlier step has measured something new, and only there."""
    recipe = json.loads((folder / "r.yaml").read_text())
    measure = recipe["steps"].pop()
    recipe["steps"].append({"use": "export", "with": {"to": "out"}})
    (folder / "r.yaml").write_text(json.dumps(recipe))
    assert gradmap("run").exit_code == 0
    assert "| metric |" not in (folder / "out" / "README.md").read_text()
    recipe["steps"].insert(1, measure)
    (folder / "r.yaml").write_text(json.dumps(recipe))
    assert gradmap("run").exit_code == 0
    card = (folder / "out" / "README.md").read_text()
    assert "| length | text.txt | 40.000 characters | lower |\n| half |  | 20.000 | lower |\n" in card
    lineage = json.loads((folder / "out" / "gradmap.json").read_text())
    assert [step["id"] for step in lineage["steps"]] == ["prune", "length", "export"]
    assert "export: done (from the store)" in gradmap("run").stdout


def test_a_ratio_pays_for_the_unpruned_model(folder: Path) -> None:
    recipe = json.loads((folder / "r.yaml").read_text())
    (folder / "text.txt").write_text("some text " * 1000)
    options = {"dataset": {"path": "text.txt"}, "samples": 8, "sequence_length": 32}
    recipe["steps"][1] = {"use": "evaluate", "with": options}
    (folder / "r.yaml").write_text(json.dumps(recipe))

    def count_flops(*settings: str) -> float:
        plan = json.loads(CliRunner().invoke(app, ["plan", "r.yaml", "--json", *settings]).stdout)
        return next(float(step["estimate"]["flops"]) for step in plan["steps"] if step["step"] == "evaluate")

    alone = count_flops("--set", "evaluate.limits.perplexity.max=9")
    both = count_flops("--set", "evaluate.limits.perplexity.max_ratio=9")
    assert both == pytest.approx(count_flops("--set", "evaluate.max_perplexity_ratio=9"))
    assert both > 2 * alone

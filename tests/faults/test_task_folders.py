"""Folders of lm-eval tasks: no code runs that is not allowed, data are found beside the tasks and by their names, and count."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from gradmap_plugins.evaluate_lm_eval import EvaluateLmEval
from tiny import make_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gradmap_pipeline import Forecasts, OptionError, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.machine.digests import sha256_of
from gradmap_pipeline.tasks import TaskFolder
from gradmap_pipeline.testing import run_stage

pytest.importorskip("lm_eval")

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: "DATA"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


def write(folder: Path, data: str = "rows.jsonl", words: str = "one two three", task: str = TASK) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.yaml").write_text(task.replace("DATA", data))
    (folder / "rows.jsonl").write_text(json.dumps({"question": words}) + "\n")
    return folder


def make_stage(folder: Path, **options: Any) -> EvaluateLmEval:
    return EvaluateLmEval.model_validate({"tasks": ["mine"], "task_folder": folder, **options})


def score(folder: Path, model: Path, place: Path, **options: Any) -> float:
    scores = run_stage(make_stage(folder, **options), place, model=open_folder(model)).task_scores.scores
    return float(scores[0].metrics["byte_perplexity"])


FUNCTION = TASK.replace('doc_to_text: ""', "doc_to_text: !function evil.run")
CODE: dict[str, tuple[dict[str, str], str]] = {
    "function": ({"t.yaml": FUNCTION}, r"'.*t\.yaml', line 6: !function evil\.run"),
    "function in a list": ({"t.yaml": TASK + "x: [{y: [!function evil.run]}]\n"}, r"line 10: !function evil\.run"),
    "function as a key": ({"t.yaml": TASK + "!function evil.run : 1\n"}, r"line 10: !function"),
    "other file of the folder": (
        {"t.yaml": TASK, "sub/u.yaml": "class: !function evil.C\ntask: u\n"},
        r"u\.yaml', line 1: !function",
    ),
    "included": (
        {"t.yaml": "include: sub/base\ntask: mine\n", "sub/base": "include: [more]\n", "sub/more": FUNCTION},
        r"more', line 6: !function",
    ),
    "included from outside": ({"t.yaml": "include: ../outside.txt\n" + TASK, "../outside.txt": FUNCTION}, r"outside\.txt', line 6"),
    "group": (
        {"t.yaml": TASK, "g.yaml": "group: g\ntask:\n  - task: mine\n    process_docs: !function evil.run\n"},
        r"g\.yaml', line 4",
    ),
    "script": (
        {"t.yaml": TASK.replace("path: json", "path: ./load.py")},
        r"line 2: dataset_path '\./load\.py' is a loading script",
    ),
    "folder of a script": (
        {"t.yaml": TASK.replace("path: json", "path: rows"), "rows/rows.py": ""},
        "line 2: dataset_path 'rows' is a loading script",
    ),
    "pickles": ({"t.yaml": TASK.replace("path: json", "path: pandas")}, "dataset_path 'pandas' is a loading script, or unpickles"),
    "trust": ({"t.yaml": TASK.replace("{data", "{trust_remote_code: true, data")}, "line 3: trust_remote_code"),
    "metric of evaluate": (
        {"t.yaml": TASK.replace("{metric", "{hf_evaluate: true, metric")},
        "line 9: hf_evaluate loads a metric's code",
    ),
    "python tag": (
        {"t.yaml": TASK + "x: !!python/object/apply:os.system [touch ran]\n"},
        "line 10: tag:yaml.org,2002:python/object/apply",
    ),
    "own tag": ({"t.yaml": TASK + "x: !include evil.py\n"}, "line 10: !include evil.py"),
}


@pytest.mark.parametrize("case", CODE)
def test_code_is_refused_and_not_run(case: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files, message = CODE[case]
    write(tmp_path / "tasks")
    for name, content in files.items():
        file = tmp_path / "tasks" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    (tmp_path / "tasks" / "evil.py").write_text("open('ran', 'w')\ndef run(doc): return ''\n")
    with pytest.raises(OptionError, match=f"would run Python code: .*{message}.*set `allow_code: true` if it may run") as caught:
        make_stage(Path("tasks")).forecast(Forecasts(EvaluateLmEval))
    assert caught.value.option == "task_folder"
    step = {"use": "evaluate_lm_eval", "with": {"tasks": ["mine"], "task_folder": "tasks"}}
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [step]}))
    for command in ("check", "run"):
        assert CliRunner().invoke(app, [command, "r.yaml"]).exit_code == 2
    assert not list(tmp_path.rglob("ran"))


def test_a_metric_that_is_not_of_lm_eval_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", task=TASK.replace("byte_perplexity", "./mine.py"))
    with pytest.raises(OptionError, match=r"line 9: lm-eval has no metric '\./mine\.py' of its own, and would load its code"):
        make_stage(folder).forecast(Forecasts(EvaluateLmEval))


def test_templates_do_not_reach_python(llama: Path, tmp_path: Path) -> None:
    reach = '"{{ question.__class__.__mro__[1].__subclasses__() }}"'
    folder = write(tmp_path / "tasks", task=TASK.replace('"{{question}}"', reach))
    with pytest.raises(Exception, match="access to attribute '__class__' of 'str' object is unsafe"):
        score(folder, llama, tmp_path / "step")


def test_allowed_code_runs_and_is_recorded(llama: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", task=TASK.replace('"{{question}}"', "!function mine.target"))
    (folder / "mine.py").write_text("def target(doc): return doc['question']\n")
    stage = make_stage(folder, allow_code=True)
    assert stage.model_dump(mode="json")["allow_code"] is True
    assert score(folder, llama, tmp_path / "a", allow_code=True) == score(write(tmp_path / "plain"), llama, tmp_path / "b")


def test_data_lie_beside_their_task_wherever_the_run_starts(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "tasks")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    beside = score(folder, llama, tmp_path / "a")
    write(tmp_path / "elsewhere", words="abc abc")  # of the same name in the current folder, as lm-eval itself would find it
    assert score(folder, llama, tmp_path / "b") != beside
    monkeypatch.chdir(tmp_path)
    sub = write(tmp_path / "tasks" / "sub", task="include: ../base\ntask: mine\n")
    (folder / "base").write_text(TASK.replace("DATA", "only.jsonl"))
    (folder / "t.yaml").unlink()
    (folder / "only.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    assert sub.is_dir()
    assert score(folder, llama, tmp_path / "c") == beside
    (folder / "only.jsonl").unlink()
    with pytest.raises(OptionError, match=r"no data 'only\.jsonl': looked in the current folder, .* and beside the task"):
        score(folder, llama, tmp_path / "d")


def test_data_are_read_by_their_names(llama: Path, tmp_path: Path) -> None:
    names = ["part[1]", "a*b", "{a,b}", "a#b", "100%20", "a::b", "c:d", "数据é", "http:"]
    folder = write(tmp_path / "tasks")
    for name in names:
        (folder / f"{name}.jsonl").write_text(json.dumps({"question": f"words of {name}"}) + "\n")
    for other in ("part1", "axb", "a", "b"):
        (folder / f"{other}.jsonl").write_text('{"question": "wrong"}\n')
    task = TASK.replace('"DATA"', json.dumps([f"{name}.jsonl" for name in names]))
    (folder / "t.yaml").write_text(task)
    plain = write(tmp_path / "plain")
    (plain / "rows.jsonl").write_text("".join((folder / f"{name}.jsonl").read_text() for name in names))
    assert score(folder, llama, tmp_path / "a") == score(plain, llama, tmp_path / "b")


def test_a_pattern_is_one_where_no_file_has_its_name(llama: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", data="r*s.jsonl")
    assert score(folder, llama, tmp_path / "a") == score(write(tmp_path / "plain"), llama, tmp_path / "b")


def test_data_outside_the_folder_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data")
    write(tmp_path / "tasks", data="../data/rows.jsonl")
    (tmp_path / "tasks" / "u.yaml").write_text("include: ../base\ntask: u\n")
    (tmp_path / "base").write_text("dataset_kwargs: {data_dir: data}\n")
    folder = TaskFolder(Path("tasks"))
    outside = {path.resolve() for path in folder.outside_files()}
    assert outside == {tmp_path / "data/rows.jsonl", tmp_path / "data/t.yaml", tmp_path / "base"}
    assert {path.resolve() for path in folder.local_paths()} == {tmp_path / "tasks", *outside}
    before = folder.fingerprint(sha256_of)
    for file in sorted(outside):
        file.write_text(file.read_text() + "\n")
        after = folder.fingerprint(sha256_of)
        assert after != before
        before = after
    (tmp_path / "tasks" / "__pycache__").mkdir()
    (tmp_path / "tasks" / "__pycache__" / "x.pyc").write_text("x")
    assert folder.fingerprint(sha256_of) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML: "),
        ("[" * 100_000, "holds values that are nested more than 64 deep"),
        ("include: nowhere.yaml\n", r"t\.yaml', line 1 includes 'nowhere\.yaml', and there is no such file beside it"),
        (
            "a: &a ["
            + "x, " * 999
            + "x]\n"
            + "".join(f"{n}: &{n} [" + f"*{o}, " * 999 + "x]\n" for o, n in ["ab", "bc", "cd", "de"]),
            "",
        ),
        ("a: \x07\n", "is not valid YAML"),
        (b"\xff\xfe", "is not valid YAML"),
    ],
)
def test_files_that_are_no_tasks(content: str | bytes, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks")
    (folder / "t.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    if not message:
        assert make_stage(folder).forecast(Forecasts(EvaluateLmEval)) == {}
        return
    with pytest.raises(OptionError, match=message):
        make_stage(folder).forecast(Forecasts(EvaluateLmEval))


CHOICE = (
    TASK.replace("loglikelihood_rolling", "multiple_choice")
    .replace("{metric: byte_perplexity", "{metric: acc")
    .replace(", aggregation: weighted_perplexity, higher_is_better: false}", "}")
)
FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "include of itself": (
        {"t.yaml": "include: t.yaml\n" + TASK},
        r"t\.yaml', line 1 includes itself; lm-eval takes each file once",
    ),
    "include in a circle": (
        {"t.yaml": "include: a\n" + TASK, "a": "include: b\n", "b": "x: y\ninclude: [a]\n"},
        r"b', line 2 includes 'a', which is included already",
    ),
    "include twice": (
        {"t.yaml": "include: [a, b]\n" + TASK, "a": "include: b\n", "b": "num_fewshot: 0\n"},
        r"t\.yaml', line 1 includes 'b', which is included already",
    ),
    "ending": ({"t.yaml": "a: b\n", "u.yml": TASK}, r"u\.yml', line 1 defines 'mine', .* rename the file to 'u\.yaml'"),
    "list": (
        {"t.yaml": TASK.replace("task: mine", "task: [mine]")},
        r"t\.yaml', line 1: task is a list; accepted: text, .*`group: NAME`",
    ),
    "number": (
        {"t.yaml": TASK.replace("task: mine", "task: 5")},
        r"line 1: task is 5; accepted: text, its name; put quotes around it",
    ),
    "group": ({"t.yaml": TASK, "g.yaml": "group: [g]\ntask: [mine]\n"}, r"g\.yaml', line 1: group is a list; accepted: text"),
    "setting": (
        {"t.yaml": TASK.replace("doc_to_text", "doc_to_txt")},
        r"line 6: .* no setting 'doc_to_txt'; did you mean 'doc_to_text'",
    ),
    "split": (
        {"t.yaml": TASK.replace("test_split: test", "test_split: tset")},
        r"line 4: test_split is 'tset'; accepted: 'test', as data_files \('.*t\.yaml', line 3\) has them",
    ),
    "split of a list": (
        {"t.yaml": TASK.replace('{test: "DATA"}', "[rows.jsonl]")},
        r"line 4: test_split is 'test'; accepted: 'train'",
    ),
    "split, included": (
        {"t.yaml": "include: base\ntest_split: tset\n", "base": TASK},
        r"t\.yaml', line 2: test_split is 'tset'; accepted: 'test', as data_files \('.*base', line 3\)",
    ),
    "no split": (
        {"t.yaml": TASK.replace("test_split", "training_split")},
        "has neither 'test_split'",
    ),
    "data": (
        {"t.yaml": TASK.replace("DATA", "rosw.jsonl")},
        r"line 3: no data 'rosw\.jsonl': looked in the current folder, .* beside",
    ),
    "template": (
        {"t.yaml": TASK.replace("{{question}}", "{{ question")},
        r"line 7: doc_to_target is .*no Jinja template: unexpected end",
    ),
    "filter of a template": (
        {"t.yaml": TASK.replace("{{question}}", "{{ question | nothing }}")},
        r"line 7: .*which is no Jinja template: No filter named 'nothing'",
    ),
    "field": (
        {"t.yaml": TASK.replace("{{question}}", "{{ qestion }}")},
        r"line 7: doc_to_target is '\{\{ qestion \}\}', but no row has a field 'qestion'; fields: 'question'",
    ),
    "choices": (
        {"t.yaml": CHOICE + "doc_to_choice: options\n"},
        r"line 10: doc_to_choice is 'options', but no row has a field 'options'",
    ),
    "output type": (
        {"t.yaml": TASK.replace("loglikelihood_rolling", "loglikelyhood")},
        r"line 5: output_type is 'loglikelyhood'; accepted: generate_until, loglikelihood, loglikelihood_rolling, multiple_choice",
    ),
    "metric": (
        {"t.yaml": TASK.replace("byte_perplexity", "byte_perplexty")},
        r"line 9: .* no metric 'byte_perplexty' .*did you mean 'b",
    ),
    "entry of metrics": (
        {"t.yaml": TASK.replace("{metric: byte_perplexity", "{name: x")},
        "line 9: an entry of metric_list is a mapping",
    ),
    "aggregation": (
        {"t.yaml": TASK.replace("weighted_perplexity", "avg")},
        r"line 9: lm-eval has no aggregation 'avg'; accepted: .*mean",
    ),
    "filter": (
        {"t.yaml": TASK + "filter_list:\n  - {name: a, filter: [{function: regexp}]}\n"},
        r"line 11: lm-eval has no filter 'regexp'; accepted: .*regex",
    ),
    "member of a group": (
        {"t.yaml": TASK.replace("mine", "inner").replace("split: test", "split: tset"), "g.yaml": "group: mine\ntask: [inner]\n"},
        r"t\.yaml', line 4: test_split is 'tset'",
    ),
    "all with a tag": (
        {"t.yaml": "tag: mine\n" + TASK.replace("task: mine", "task: a").replace("split: test", "split: tset")},
        r"t\.yaml', line 5: test_split is 'tset'",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_tasks_are_told_by_a_check(case: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files, message = FAULTS[case]
    write(tmp_path / "tasks", task="a: b")
    for name, content in files.items():
        (tmp_path / "tasks" / name).write_text(content.replace("DATA", "rows.jsonl"))
    step = {"use": "evaluate_lm_eval", "with": {"tasks": ["mine"], "task_folder": "tasks"}}
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [step]}))
    result = CliRunner().invoke(app, ["check", "r.yaml"])
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1


def test_data_that_are_no_file_are_told_and_not_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", data="pipe.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(OptionError, match=r"line 3: '.*pipe\.jsonl' is a named pipe, not a file"):
        make_stage(folder).forecast(Forecasts(EvaluateLmEval))


def test_tasks_that_lm_eval_takes_pass(tmp_path: Path) -> None:
    """Names that come late, or not at all, in ways that a template allows; faults of tasks that nobody asks for."""
    folder = write(
        tmp_path / "tasks",
        task="<<: {repeats: 1}\n"
        + TASK.replace("{{question}}", "{{late}}{% if x is defined %}{{x}}{% endif %}{{ y | default('') }}"),
    )
    (folder / "t.yaml").write_text((folder / "t.yaml").read_text().replace("DATA", "rows.jsonl"))
    (folder / "rows.jsonl").write_text('{"question": 1}\n{"question": 2, "late": "x"}\n')
    (folder / "other.yaml").write_text("task: other\noutput_type: x\n")
    assert make_stage(folder).forecast(Forecasts(EvaluateLmEval)) == {}


def test_what_only_lm_eval_can_tell_is_told_before_the_run(llama: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", task=TASK.replace("{{question}}", "{{ question.nothing.more }}"))
    with pytest.raises(OptionError, match=r"t\.yaml': task 'mine': lm-eval cannot make it: .*has no attribute 'nothing'") as caught:
        make_stage(folder).inspect(Forecasts(EvaluateLmEval), None)  # type: ignore[arg-type]
    assert caught.value.option == "task_folder"
    choice = CHOICE.replace("{{question}}", "qestion") + "doc_to_choice: [one, two]\n"
    with pytest.raises(OptionError, match="in the first row doc_to_target gives 'qestion', which is none of the choices"):
        make_stage(write(tmp_path / "choice", task=choice)).inspect(Forecasts(EvaluateLmEval), None)  # type: ignore[arg-type]
    make_stage(write(tmp_path / "fine")).inspect(Forecasts(EvaluateLmEval), None)  # type: ignore[arg-type]


def test_ids_beyond_the_embeddings_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", vocab_size=259)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    folder = write(tmp_path / "tasks", words="<|im_start|>user")
    with pytest.raises(StageError, match=r"token '<\|im_start\|>' has the id 259, but the model has 259 token embeddings"):
        score(folder, model, tmp_path / "step")


def test_largest_seed(llama: Path, tmp_path: Path) -> None:
    stage = make_stage(write(tmp_path / "tasks"))
    run_stage(stage, tmp_path / "step", seed=2**63 - 1, model=open_folder(llama))


def test_a_faulty_file_in_the_folder_is_no_bug_of_a_check(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the recipe itself lies in the folder, and its data are looked for before its faults are told."""
    folder = write(tmp_path / "tasks").parent
    monkeypatch.chdir(folder)
    Path("other.yaml").write_text("a: {b:{c: d}}")
    Path("r.yaml").write_text(
        f"version: 1\nmodel: {{path: {llama}}}\nsteps:\n  - use: evaluate_lm_eval\n    with: {{tasks: [mine], task_folder: .}}\n"
    )
    result = CliRunner().invoke(app, ["check", "r.yaml"])
    assert result.exit_code == 2, result.output
    assert "other.yaml' is not valid YAML" in result.stderr
    Path("other.yaml").unlink()

    def refuse(self: TaskFolder) -> list[Path]:
        raise PermissionError(13, "Permission denied", "elsewhere")

    monkeypatch.setattr(TaskFolder, "_own_files", refuse)
    result = CliRunner().invoke(app, ["check", "r.yaml"])
    assert result.exit_code == 2, result.output
    assert "Permission denied" in result.stderr

"""Tasks of lm-eval from a folder: found, checked, and measured on a model."""

from pathlib import Path

import pytest

from gradmap_pipeline import ModelSource, OptionError, TaskFolder, TaskHarness, open_model
from gradmap_pipeline.testing import make_context

Path("tasks").mkdir()
Path("tasks/rows.jsonl").write_text('{"text": "the sky is", "answer": " blue"}\n{"text": "grass is", "answer": " green"}\n')
Path("tasks/colours.yaml").write_text("""\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" blue", " green"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""")

harness = TaskHarness(["colours"], TaskFolder(Path("tasks")), allow_code=False)
harness.check_folder()  # raises OptionError where the folder would run code, or a task is faulty
harness.try_tasks()
model = open_model(ModelSource(builtin="docs-llama"))
loaded = harness.load(model, batch_size=2, context=make_context(Path("step")))
results = harness.measure(loaded, "colours", harness.find_manager(), fewshot=0, samples=None, seed=0)
assert results["results"]["colours"]["acc,none"] in (0.0, 0.5, 1.0)
assert set(harness.fingerprint()["inside"]) == {"colours.yaml", "rows.jsonl"}

Path("tasks/code.yaml").write_text("task: code\ndataset_path: json\ndoc_to_text: !function tools.make_text\n")
with pytest.raises(OptionError, match="would run Python code"):
    TaskHarness(["code"], TaskFolder(Path("tasks")), allow_code=False).check_folder()

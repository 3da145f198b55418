"""Tokens a second of two models in turn: what is timed, in which order, what is kept for how long, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.benchmark import Benchmark
from tiny import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from gradmap_pipeline import CapacityError, DecodingShape, ExportedFile, GgufFolder, Metric, ModelGraph, StageError, measure_speed
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.cost.decoding_costs import Residency, count_pass_bytes, plan_residency
from gradmap_pipeline.export import speed
from gradmap_pipeline.export.decoders import Decoding, GgufDecoder, open_decoder
from gradmap_pipeline.export.llamacpp import pythons
from gradmap_pipeline.export.llamacpp.pythons import DECODER
from gradmap_pipeline.export.llamacpp.session import GgufSession
from gradmap_pipeline.page.facts import facts_of_run
from gradmap_pipeline.page.page import make_page
from gradmap_pipeline.run.measured import read_metrics
from gradmap_pipeline.run.store import Store
from gradmap_pipeline.testing import make_context

SHAPE = DecodingShape(2, 10, 5)


@pytest.fixture
def pruned(llama: Path) -> ModelGraph:
    return open_folder(llama).without_layers([2])


def test_what_is_timed_is_greedy_decoding_of_the_pruned_model(pruned: ModelGraph) -> None:
    prompts = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(1))
    with open_decoder(pruned, "float32", "cpu") as decoder:
        done = decoder.decode(prompts, 6)
    whole = AutoModelForCausalLM.from_pretrained(pruned.base.folder).eval()
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[number] for number in pruned.layers)
    ids = prompts
    with torch.no_grad():
        for _ in range(7):
            ids = torch.cat([ids, whole(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert done.ids.tolist() == ids[:, 9:].tolist()
    assert done.prefill > 0
    assert done.decode > 0


class Clock:
    """Models whose passes take the seconds that a test says, and a list of what was opened, run and closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: tuple[float, ...]) -> None:
        self.seconds, self.log = seconds, list[str]()
        self.passes = dict.fromkeys(seconds, 0)
        monkeypatch.setattr(speed, "open_decoder", self.open)

    @contextmanager
    def open(self, model: Any, dtype: str, device: str) -> Iterator[Any]:
        clock = self

        class Fake:
            def decode(self, prompts: torch.Tensor, tokens: int) -> Decoding:
                taken = clock.seconds[model.label][clock.passes[model.label]]
                clock.passes[model.label] += 1
                clock.log.append(model.label)
                return Decoding(taken, 2 * taken, torch.zeros(len(prompts), tokens + 1, dtype=torch.long))

        self.log.append(f"open {model.label}")
        yield Fake()
        self.log.append(f"close {model.label}")


def test_models_take_turns_and_the_median_of_what_counts_is_given(
    pruned: ModelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, dense=(9.0, 4.0, 5.0, 3.0), pruned=(9.0, 2.0, 1.0, 3.0))
    measured = measure_speed(pruned, pruned.dense, [SHAPE], make_context(tmp_path), rounds=3, warmup=1)
    assert clock.log == [
        "open pruned", "open dense", "dense", "pruned", "pruned", "dense", "dense", "pruned", "pruned", "dense", "close dense",
        "close pruned",
    ]  # fmt: skip
    metrics = {(metric.title, metric.is_reference): metric for metric in read_metrics({"speed": measured})}
    own = metrics["prefill on 2 x 10 tokens", False]
    assert (own.value, own.low, own.high, own.unit) == (10.0, 20 / 3, 20.0, "tokens/s")
    other = metrics["decode on 2 x 5 tokens after 10", True]
    assert (other.value, other.low, other.high) == (10 / 8, 10 / 10, 10 / 6)
    assert other.model == pruned.dense.digest != own.model == pruned.digest
    ratio = metrics["decode_speedup on 2 x 5 tokens after 10", False]
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 1.0, 5.0)
    assert "1 thread" in ratio.setting
    assert "on cpu (" in ratio.setting
    assert len(metrics) == 6


def test_models_that_do_not_fit_together_are_read_anew_in_each_round(
    pruned: ModelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, dense=(9.0, 4.0) * 3, pruned=(9.0, 2.0) * 3)
    monkeypatch.setattr(speed, "plan_residency", lambda *_: Residency(False, 0))
    notes: list[str] = []
    measured = measure_speed(pruned, pruned.dense, [SHAPE], make_context(tmp_path, notes=notes), rounds=3, warmup=1)
    one, two = (["open dense", "dense", "dense", "close dense"], ["open pruned", "pruned", "pruned", "close pruned"])
    assert clock.log == [*one, *two, *two, *one, *one, *two]
    assert set(measured.cases[0].rates.prefill) == {10.0}
    assert notes == ["both models do not fit into memory together; each is read anew in every round"]


def test_a_model_is_not_measured_beside_itself(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, dense=(1.0,) * 8)
    dense = open_folder(llama)
    stage = Benchmark(prompt_tokens=(8,), new_tokens=4, rounds=3)
    for reference in (None, dense):
        made = stage.run(stage.Inputs(model=dense, reference=reference), make_context(tmp_path)).speed
        assert [metric.name for metric in made.list_metrics()] == ["prefill", "decode"]
    assert clock.passes == {"dense": 8}


def test_memory_decides_how_models_share_it(pruned: ModelGraph) -> None:
    weights, beside = count_pass_bytes(pruned, SHAPE, "float32")
    assert weights == pruned.count_parameters() * 4
    assert count_pass_bytes(pruned, DecodingShape(4, 10, 5), "float32")[1] == 2 * beside
    assert plan_residency([300, 400], 50, 750, "float32") == Residency(True, 750)
    assert plan_residency([300, 400], 50, 749, "float32") == Residency(False, 450)
    with pytest.raises(CapacityError, match=r"a benchmark takes the whole model in memory, .* --dtype bfloat16, leave the "):
        plan_residency([300, 400], 50, 449, "float32")


def write_recipe(model: Path, options: dict[str, Any], limits: dict[str, Any] | None = None) -> None:
    step = {"use": "benchmark", "with": options, **({} if limits is None else {"limits": limits})}
    recipe = {"version": 1, "model": {"path": str(model)}, "steps": [{"use": "prune", "with": {"layers": [1]}}, step]}
    Path("r.yaml").write_text(json.dumps(recipe))


def gradmap(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


SMALL = {"prompt_tokens": [8], "new_tokens": 4, "rounds": 3}


def test_a_time_is_kept_for_the_machine_it_was_measured_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(llama, SMALL)
    threads = torch.get_num_threads()
    ran = gradmap("run", "r.yaml", "--threads", "1")
    assert ran.exit_code == 0, ran.output
    assert "benchmark: transformers in float32 on cpu (" in ran.output
    assert "1 thread; medians of 3 rounds, in turn with the dense model, 20" in ran.output
    assert "benchmark: done (from the store)" in gradmap("run", "r.yaml", "--threads", "1").output
    record = Store(Path(".gradmap")).load_run(Path("r.yaml"))
    assert record is not None
    facts = facts_of_run(record)
    assert facts is not None
    page = make_page(facts)
    assert re.search(r"<h2[^>]*>Speed</h2>", page)
    assert "decode, 1 x 4 tokens after 8" in page
    try:
        again = gradmap("run", "r.yaml", "--threads", "2")
    finally:
        torch.set_num_threads(threads)
    assert "prune: done (from the store)" in again.output
    assert "benchmark: done (from the store)" not in again.output
    assert "2 threads; medians" in again.output
    with monkeypatch.context() as patch:
        patch.setattr("gradmap_pipeline.run.keys.name_device", lambda _: "another processor")
        assert "benchmark: done (from the store)" not in gradmap("run", "r.yaml", "--threads", "1").output


def test_limits_hold_for_the_model_and_not_for_the_one_beside_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Clock(monkeypatch, dense=(1.0,) * 8, pruned=(0.5,) * 8)
    on = "on 1 x 8 tokens"
    write_recipe(llama, SMALL, {"prefill": {"min": 12}, f"prefill {on}": {"min_ratio": 1.9}, "decode_speedup": {"min": 2.5}})
    ran = gradmap("run", "r.yaml")
    assert ran.exit_code == 5
    assert "decode_speedup 2 on '1 x 4 tokens after 8' is under min 2.5 by 0.5" in ran.output
    assert "prefill" not in ran.output.partition("error:")[2]
    assert gradmap("run", "r.yaml", "--set", "benchmark.limits.decode_speedup={min: 1.9}").exit_code == 0
    wrong = gradmap("check", "r.yaml", "--set", "benchmark.limits={speedup: {min: 1}}")
    assert wrong.exit_code == 2
    assert "step 'benchmark' gives no metric 'speedup'; did you mean" in wrong.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": [1, 0]}, "option 'batch_sizes': found 0; accepted: whole numbers from 1"),
        ({"prompt_tokens": [8, 8]}, "option 'prompt_tokens': found [8, 8]; name each value once"),
        ({"batch_sizes": list(range(1, 34))}, "option 'batch_sizes': 33 combinations with 'prompt_tokens'; accepted: at most 32"),
        ({"prompt_tokens": [8, 60]}, "60 and 4 new ones are more than the 62 tokens that the model is made for"),
        ({"rounds": 2}, "option 'rounds': found 2, accepted: at least 3"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(short, {**SMALL, **options})
    checked = gradmap("check", "r.yaml")
    assert checked.exit_code == 2
    assert message in checked.output


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("short") / "model", max_position_embeddings=62)


def test_a_model_that_does_not_fit_is_refused_before_the_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(llama, {"batch_sizes": [40000], "prompt_tokens": [48], "new_tokens": 8})
    for command in ("plan", "run"):
        refused = gradmap(command, "r.yaml", "--memory", "2GiB")
        assert refused.exit_code == 3, refused.output
        assert "step 'benchmark': a benchmark takes the whole model in memory" in refused.output
        assert "prune: done" not in refused.output
    fits = gradmap("plan", "r.yaml", "--set", "benchmark.batch_sizes=[1]")
    assert fits.exit_code == 0
    assert "both models in memory" in fits.output


def test_a_stage_says_that_its_results_belong_to_a_machine() -> None:
    assert Benchmark.machine_bound
    assert Benchmark.metric_names == ("prefill", "decode", "prefill_speedup", "decode_speedup")


LLAMA_CPP = '''
"""Stands in for llama-cpp-python: the likeliest token is the sum of all ids of its sequence so far, modulo the vocabulary."""
import ctypes
from types import SimpleNamespace
WORDS = 50
seen, logits = {}, []
def llama_log_callback(call): return call
def llama_log_set(*_): pass
def llama_model_default_params(): return SimpleNamespace()
def llama_context_default_params(): return SimpleNamespace(kv_unified=False)
def llama_model_load_from_file(file, options):
    assert options.n_gpu_layers == 0
    return file
def llama_model_get_vocab(model): return model
def llama_vocab_n_tokens(vocab): return WORDS
def llama_init_from_model(model, options):
    assert options.kv_unified
    assert options.n_threads == options.n_threads_batch == 1
    return options
def llama_free(context): pass
def llama_get_memory(context): return context
def llama_memory_clear(memory, data): seen.clear()
def llama_batch_init(count, embeddings, sequences):
    zeros = lambda: [0] * count
    return SimpleNamespace(
        n_tokens=0, token=zeros(), pos=zeros(), n_seq_id=zeros(), seq_id=[[0] for _ in range(count)], logits=zeros()
    )
def llama_batch_free(batch): pass
def llama_decode(context, batch):
    global logits
    logits = []
    assert batch.n_tokens <= context.n_batch
    for place in range(batch.n_tokens):
        row = seen.setdefault(batch.seq_id[place][0], [])
        assert batch.pos[place] == len(row)
        assert batch.seq_id[place][0] < context.n_seq_max
        row.append(batch.token[place])
        values = (ctypes.c_float * WORDS)()
        values[sum(row) % WORDS] = 1.0
        logits.append(values if batch.logits[place] else None)
    return 1 if sum(map(len, seen.values())) > context.n_ctx else 0
def llama_get_logits_ith(context, place): return ctypes.cast(logits[place], ctypes.POINTER(ctypes.c_float))
'''


def test_gguf_files_are_decoded_in_sequences_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    prompts = [[1, 2, 3], [10, 20, 30]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with GgufSession(tmp_path / "model.gguf", sys.executable, DECODER) as session:
            assert session.words == 50
            decoder = GgufDecoder(session)
            done = [decoder.decode(torch.tensor(prompts[:rows]), 4) for rows in (2, 1, 2)]
    finally:
        torch.set_num_threads(threads)
    expected = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(5):
            row.append(sum(row) % 50)
        expected.append(row[3:])
    assert [one.ids.tolist() for one in done] == [expected, expected[:1], expected]
    assert all(one.prefill > 0 and one.decode > 0 for one in done)


def test_a_gguf_file_is_measured_alone(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pythons, "_ask", lambda *_: [])
    files = {"model.gguf": ExportedFile(size=4, sha256="0" * 64)}
    model = GgufFolder(graph=open_folder(llama).without_layers([1]), folder=tmp_path, files=files, type="q8_0")
    stage, notes = Benchmark(batch_sizes=(2,), prompt_tokens=(4,), new_tokens=3, rounds=3), list[str]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = stage.run(stage.Inputs(model=model), make_context(tmp_path / "step", notes=notes)).speed
    finally:
        torch.set_num_threads(threads)
    assert measured.setting.startswith("llama.cpp in q8_0 on cpu (")
    assert [metric.title for metric in measured.list_metrics()] == ["prefill on 2 x 4 tokens", "decode on 2 x 3 tokens after 4"]
    assert "from: {model: STEP, reference: STEP}" in notes[0]
    monkeypatch.setattr(pythons, "_ask", lambda _, modules, __: list(modules))
    with pytest.raises(StageError, match="lacks llama-cpp-python"):
        stage.run(stage.Inputs(model=model), make_context(tmp_path / "step"))


def test_a_figure_of_several_rounds_shows_their_range() -> None:
    metric = Metric(name="decode_speedup", value=1.31, low=1.28, high=1.35, better="higher")
    assert metric.figure == "1.31 (1.28 to 1.35)"
    with pytest.raises(StageError, match="the largest metric 'decode_speedup' is nan; a metric is a finite number"):
        Metric(name="decode_speedup", value=1.31, low=1.28, high=float("nan"), better="higher")


def test_a_sweep_over_layers_shows_no_rate_that_looks_like_the_speed_of_the_model(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradmap_pipeline.report.reporters._SECONDS_BETWEEN_LINES", -1.0)
    options = {"dataset": {"path": str(text)}, "samples": 4, "sequence_length": 16}
    steps = [{"use": "calibrate", "with": options}, {"use": "gradmap_score"}, {"use": "evaluate", "with": options}]
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": steps}))
    lines = gradmap("run", "r.yaml").output.splitlines()
    assert any(re.search(r"^gradmap_score: .*/s, .* left$", line) for line in lines)
    scored = [line for line in lines if line.startswith("evaluate: score text")]
    assert any(line.endswith(" left") for line in scored)
    assert not any("/s" in line for line in scored)

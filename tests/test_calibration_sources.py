"""What a calibration set is made of: mixes by weight, text of the model itself, chats, and what is refused of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from pydantic import ValidationError
from tiny import make_model, make_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gradmap_pipeline import (
    CalibrationSource,
    CapacityError,
    Context,
    DatasetSource,
    ModelCosts,
    ModelGraph,
    OptionError,
    StageError,
    digest_sequences,
    draw_samples,
    load_tokenizer,
    make_sequences,
)
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.data import generation
from gradmap_pipeline.data.calibration_sources import GeneratedText
from gradmap_pipeline.data.generation import generate_rows
from gradmap_pipeline.machine.digests import sha256_of
from gradmap_pipeline.machine.machine import Machine
from gradmap_pipeline.testing import make_context, run_stage


@pytest.fixture(scope="module")
def graph(llama: Path) -> ModelGraph:
    return open_folder(llama)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two texts that share no line."""
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    make_text(first)
    second.write_text("".join(f"line {number} of another text altogether\n" for number in range(600)))
    return [first, second]


def mix(*parts: dict[str, Any]) -> CalibrationSource:
    return CalibrationSource.model_validate({"mix": list(parts)})


@pytest.mark.parametrize("weights", [(1, 1), (2, 1, 1), (0.3, 0.3, 0.4), (5, 1), (7, 3, 2, 1)])
@pytest.mark.parametrize("samples", [16, 37, 128])
def test_samples_are_shared_out_by_weight(weights: tuple[float, ...], samples: int) -> None:
    counts = mix(*({"builtin": "calibration", "weight": weight} for weight in weights)).share_out(samples)
    exact = [samples * weight / sum(weights) for weight in weights]
    assert sum(counts) == samples
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    raised = [share - int(share) for count, share in zip(counts, exact, strict=True) if count > int(share)]
    left = [share - int(share) for count, share in zip(counts, exact, strict=True) if count == int(share)]
    assert not raised or not left or min(raised) >= max(left) - 1e-9


def test_each_part_is_drawn_alone_and_stands_in_turn(graph: ModelGraph, texts: list[Path], tmp_path: Path) -> None:
    source = mix({"path": str(texts[0]), "weight": 3}, {"path": str(texts[1])})
    ids, mask, parts = draw_samples(source, graph, 16, 12, "documents", make_context(tmp_path / "a", seed=5))
    alone = [
        make_sequences(load_tokenizer(graph.base), DatasetSource(path=text).documents(5 + number), 16, count, seed=5 + number)
        for number, (text, count) in enumerate(zip(texts, (9, 3), strict=True))
    ]
    belongs = [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]  # at (place + 1/2) / count: 1/18, 3/18, 1/6, 5/18 ...; equal places by part
    order = sorted([((k + 0.5) / 9, 0, k) for k in range(9)] + [((k + 0.5) / 3, 1, k) for k in range(3)])
    assert [part for _, part, _ in order] == belongs
    assert torch.equal(ids, torch.stack([alone[part][0][k] for _, part, k in order]))
    assert mask.all()
    assert [(part.samples, part.tokens) for part in parts] == [(9, 144), (3, 48)]
    assert [part.sha256 for part in parts] == [digest_sequences(*drawn) for drawn in alone]
    again, _, _ = draw_samples(source, graph, 16, 12, "documents", make_context(tmp_path / "b", seed=5))
    other, _, _ = draw_samples(source, graph, 16, 12, "documents", make_context(tmp_path / "c", seed=6))
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)


def test_one_source_is_drawn_as_before(graph: ModelGraph, texts: list[Path], tmp_path: Path) -> None:
    source = CalibrationSource(path=texts[0])
    ids, _, parts = draw_samples(source, graph, 16, 6, "documents", make_context(tmp_path / "a", seed=3))
    plain, _ = make_sequences(load_tokenizer(graph.base), source.documents(3), 16, 6, seed=3)
    assert torch.equal(ids, plain)
    assert parts == ()


def test_parts_of_several_lengths_are_padded(graph: ModelGraph, tmp_path: Path) -> None:
    for name, size in (("short", 5), ("long", 12)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": "x" * size}) + "\n" for _ in range(4)))
    source = mix({"path": str(tmp_path / "short.jsonl")}, {"path": str(tmp_path / "long.jsonl")})
    ids, mask, parts = draw_samples(source, graph, 32, 4, "none", make_context(tmp_path / "a"), shuffle=False)
    assert mask.sum(1).tolist() == [6, 13, 6, 13]  # with BOS
    assert ids.shape == (4, 13)
    assert [part.tokens for part in parts] == [12, 26]


def test_the_record_names_parts(graph: ModelGraph, texts: list[Path], tmp_path: Path) -> None:
    stage = Calibrate(dataset=mix({"path": str(texts[0]), "weight": 3}, {"self": {"top_k": 5}}), samples=8, sequence_length=12)
    made = run_stage(stage, tmp_path / "step", model=graph).calibration
    assert made.source == f"mix of {texts[0]} (75%), text of the model itself (25%)"
    assert [part.samples for part in made.parts] == [6, 2]
    assert made.tokens == sum(part.tokens for part in made.parts) == 96


def test_what_a_mix_depends_on(texts: list[Path]) -> None:
    def key(*parts: dict[str, Any]) -> str:
        return json.dumps(mix(*parts).fingerprint(sha256_of))

    first, second = ({"path": str(text)} for text in texts)
    before = key(first, second)
    assert before == key(first, second)
    assert before != key(second, first)
    assert before != key({**first, "weight": 2}, second)
    assert key(first, {"self": {}}) != key(first, {"self": {"temperature": 0.5}})
    prompted = {"self": {"prompts": second}}
    assert key(first, {"self": {}}) != key(first, prompted)
    with_old_prompts = key(first, prompted)
    texts[1].write_text("other words")
    assert before != key(first, second)
    assert with_old_prompts != key(first, prompted)
    moved = texts[0].rename(texts[0].with_name("moved.txt"))
    assert key({"path": str(moved)}, second) == key({"path": str(make_text(texts[0]))}, second)


def test_places_that_a_mix_reads(texts: list[Path]) -> None:
    source = mix({"path": str(texts[0])}, {"self": {"prompts": {"path": str(texts[1])}}})
    assert set(source.local_paths()) == set(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of 'path', 'id', 'builtin', 'self' and 'mix'; found none"),
        ({"self": {}, "builtin": "heldout"}, "found 'builtin' and 'self'"),
        ({"mix": [{"builtin": "heldout"}]}, "'mix' needs at least two parts; found 1"),
        ({"mix": [{"builtin": "heldout"}, {"weight": 2}]}, "give exactly one of 'path', 'id', 'builtin' and 'self'; found none"),
        ({"mix": [{"builtin": "heldout", "weight": 0}, {"self": {}}]}, "greater than 0"),
        ({"self": {}, "column": "body"}, "'column' does not go with 'self'"),
        ({"self": {}, "split": "test"}, "'split' belongs to a hub data set"),
        ({"self": {"prompt_tokens": 4}}, "'prompt_tokens' counts the tokens of 'prompts', which is missing"),
    ],
)
def test_sources_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("(", r"\(")):
        CalibrationSource.model_validate(options)


def test_a_part_that_fails_is_named(graph: ModelGraph, texts: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    source = mix({"path": str(texts[0])}, {"path": str(short)})
    with pytest.raises(OptionError, match=r"part 2 of the mix: 400 samples of 16 tokens are more than the 5 bytes"):
        source.check_amount(800, 16, "documents")
    with pytest.raises(StageError, match=r"^part 2 of the mix \(.*short\.txt\): the data set gives only 0 of 4 samples"):
        draw_samples(source, graph, 16, 8, "documents", make_context(tmp_path / "a"))
    with pytest.raises(OptionError, match=r"part 2 of the mix \(builtin heldout\) gets none of 4 samples"):
        mix({"builtin": "calibration", "weight": 20}, {"builtin": "heldout"}).share_out(4)
    prompted = mix({"self": {"prompts": {"path": str(texts[0])}, "prompt_tokens": 16}}, {"path": str(texts[0])})
    with pytest.raises(OptionError, match=r"part 1 of the mix: 'prompt_tokens' is 16, and a sample has 16"):
        prompted.check_amount(8, 16, "documents")


def rows_of(graph: ModelGraph, folder: Path, samples: int, length: int, seed: int = 0, **options: Any) -> list[list[int]]:
    context = make_context(folder, seed=seed)
    return [row.tolist() for row in generate_rows(GeneratedText(**options), graph, length, samples, seed, context)]


def test_the_likeliest_token_is_what_transformers_generates(graph: ModelGraph, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    wanted = [1]
    for _ in range(19):
        with torch.no_grad():
            logits = model(torch.tensor([wanted]), use_cache=False).logits[0, -1]
        wanted.append(int(logits[: len(AutoTokenizer.from_pretrained(llama))].argmax()))
    assert rows_of(graph, tmp_path, 2, 20, top_k=1) == [wanted, wanted]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, 3), (2.0, 4)])
def test_tokens_are_drawn_by_their_shares(temperature: float, top_k: int | None, graph: ModelGraph, tmp_path: Path) -> None:
    """Against the softmax, with the tokens that are not among the likeliest left out, in fp64."""
    text = GeneratedText(temperature=temperature, top_k=top_k)
    writer = generation._Writer(text, graph, 8, 6, make_context(tmp_path))
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    drawn = torch.tensor(writer._draw(logits.expand(count, 6), [generator] * count)).bincount(minlength=6).double() / count
    kept = logits.double() / temperature
    if top_k is not None:
        kept[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
    wanted = kept.softmax(0)
    assert (drawn[wanted == 0] == 0).all()
    assert ((drawn - wanted).abs() <= 4 * (wanted * (1 - wanted) / count).sqrt()).all()


def test_sequences_differ_and_are_the_same_again(graph: ModelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(graph, tmp_path, 10, 24)
    assert len({tuple(row) for row in rows}) == 10
    assert all(len(row) == 24 and row[0] == 1 and max(row) < 259 for row in rows)
    assert rows == rows_of(graph, tmp_path, 10, 24)
    assert rows[:9] == rows_of(graph, tmp_path, 9, 24)
    assert not {tuple(row) for row in rows} & {tuple(row) for row in rows_of(graph, tmp_path, 10, 24, seed=1)}
    model, each = generation.count_generation_bytes(graph, 24, "float32")
    monkeypatch.setattr(generation, "resident_bytes", lambda _: 0)
    tight = replace(make_context(tmp_path, memory=model + 3 * each + each // 2))
    writer = generation._Writer(GeneratedText(), graph, 24, 259, tight)
    assert writer._together == 3
    assert [row.tolist() for row in generate_rows(GeneratedText(), graph, 24, 10, 0, tight)] == rows


def test_prompts_are_gone_on_with(graph: ModelGraph, texts: list[Path], tmp_path: Path) -> None:
    rows = rows_of(graph, tmp_path, 3, 20, seed=2, prompts=DatasetSource(path=texts[1]), prompt_tokens=7)
    prompts, _ = make_sequences(load_tokenizer(graph.base), DatasetSource(path=texts[1]).documents(2), 7, 3, seed=2)
    assert [row[:7] for row in rows] == prompts.tolist()
    assert all(one[7:] != other[7:] for one, other in pairwise(rows))


def remembering(context: Context, kept: dict[str, Any]) -> Context:
    def remember(key: Any, compute: Callable[[], Any]) -> Any:
        named = json.dumps(key, sort_keys=True)
        if named not in kept:
            kept[named] = json.loads(json.dumps(compute()))
        return kept[named]

    return replace(context, remember=remember)


def test_what_was_generated_is_kept(graph: ModelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends early leaves the sequences that are done; another draws the rest, and a third loads no model."""
    kept: dict[str, Any] = {}
    context = remembering(make_context(tmp_path), kept)
    write = generation._Writer.write

    def end_early(self: Any, starts: Any, *rest: Any) -> Any:
        if len(starts) < generation.GENERATED_TOGETHER:
            raise KeyboardInterrupt
        return write(self, starts, *rest)

    monkeypatch.setattr(generation, "GENERATED_TOGETHER", 8)
    monkeypatch.setattr(generation._Writer, "write", end_early)
    with pytest.raises(KeyboardInterrupt):
        generate_rows(GeneratedText(), graph, 16, 10, 0, context)
    assert len(kept) == 1
    monkeypatch.setattr(generation._Writer, "write", write)
    rows = [row.tolist() for row in generate_rows(GeneratedText(), graph, 16, 10, 0, context)]
    assert len(kept) == 2
    assert rows == rows_of(graph, tmp_path, 10, 16)
    monkeypatch.setattr("gradmap_pipeline.checkpoint.whole.load_whole", lambda *_: pytest.fail("a model was loaded"))
    assert rows == [row.tolist() for row in generate_rows(GeneratedText(), graph, 16, 10, 0, context)]
    with pytest.raises(pytest.fail.Exception):
        generate_rows(GeneratedText(temperature=0.9), graph, 16, 10, 0, context)


def test_a_model_that_does_not_fit_is_refused(graph: ModelGraph, tmp_path: Path) -> None:
    source = mix({"self": {}}, {"builtin": "calibration"})
    wanted = (
        r"^part 1 of the mix \(text of the model itself\): generating text takes the whole model in memory, .* in float32, and .*"
    )
    with pytest.raises(CapacityError, match=wanted + "use --dtype bfloat16, lower 'sequence_length', leave 'self' out, or allow "):
        draw_samples(source, graph, 16, 8, "documents", make_context(tmp_path, memory=1))


def test_cached_bytes_are_those_of_the_cache(graph: ModelGraph, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    cache = model(torch.ones(1, 30, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weights, each = generation.count_generation_bytes(graph, 30, "float32")
    assert held <= each <= 2 * held + 16 * 300
    assert weights == sum(parameter.nbytes for parameter in model.parameters())


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def write_chats(file: Path, *chats: Any) -> Path:
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def test_roles_are_checked(llama: Path, tmp_path: Path) -> None:
    odd = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}]
    source = DatasetSource(path=write_chats(tmp_path / "chats.jsonl", CHAT, odd), column="messages")
    tokenizer = load_tokenizer(open_folder(llama).base)
    tokenizer.chat_template = TEMPLATE
    message = r"chats\.jsonl', line 2: message 2 has the role 'bot'; accepted: system, developer, user, assistant, tool, and roles"
    with pytest.raises(StageError, match=message):
        make_sequences(tokenizer, source.documents(), 32, None, "none")
    tokenizer.chat_template = TEMPLATE + "{# 'bot' #}"
    assert len(make_sequences(tokenizer, source.documents(), 32, None, "none")[0]) == 2
    unnamed = [{"role": 3, "content": "hi"}]
    source = DatasetSource(path=write_chats(tmp_path / "chats.jsonl", unnamed), column="messages")
    with pytest.raises(StageError, match=r"line 1: message 1 has the role a number \(3\); accepted: system"):
        make_sequences(tokenizer, source.documents(), 32, None, "none")


def check(folder: Path, *, dataset: dict[str, Any], model: Path, stage: str = "calibrate") -> tuple[int, str]:
    recipe = folder / "recipe.yaml"
    step = {"use": stage, "with": {"dataset": dataset, "samples": 8, "sequence_length": 16}}
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": [step]}))
    result = CliRunner().invoke(app, ["check", str(recipe)])
    return result.exit_code, result.output


@pytest.mark.parametrize("stage", ["calibrate", "evaluate"])
def test_chats_without_a_template_are_refused_at_check(stage: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    chats = {"path": str(write_chats(tmp_path / "chats.jsonl", *[CHAT] * 9)), "column": "messages"}
    code, said = check(tmp_path, dataset=chats, model=model, stage=stage)
    assert code == 2
    assert "line 1: found chat messages, and the tokenizer has no chat template to make text of them" in said
    if stage == "calibrate":
        code, said = check(tmp_path, dataset={"mix": [{"builtin": "calibration"}, chats]}, model=model)
        assert code == 2
        assert "part 2 of the mix: " in said
        assert "the tokenizer has no chat template" in said
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    assert check(tmp_path, dataset=chats, model=model, stage=stage)[0] == 0
    odd = {**chats, "path": str(write_chats(tmp_path / "odd.jsonl", [{"role": "gpt", "content": "hi"}]))}
    code, said = check(tmp_path, dataset=odd, model=model, stage=stage)
    assert code == 2
    assert "message 1 has the role 'gpt'" in said


def test_a_model_that_starts_from_nothing_is_refused_at_check(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert check(tmp_path, dataset={"self": {}}, model=model)[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    code, said = check(tmp_path, dataset={"self": {}}, model=model)
    assert code == 2
    assert "the tokenizer has neither a BOS nor an EOS token to start from; give 'prompts' under 'self'" in said
    prompted = {"self": {"prompts": {"builtin": "calibration"}, "prompt_tokens": 4}}
    assert check(tmp_path, dataset=prompted, model=model)[0] == 0


def test_the_plan_counts_what_generating_takes(graph: ModelGraph, llama: Path, tmp_path: Path) -> None:
    costs = ModelCosts(llama, "llama", None, Machine(threads=1), tmp_path / "store")
    weights, each = generation.count_generation_bytes(graph, 32, "float32")
    few, many = costs.generated_text(4, 2, 32), costs.generated_text(4, 64, 32)
    besides = costs.occupied
    assert few.peak_bytes == max(costs.occupied, besides + weights + 2 * each)
    assert many.peak_bytes == max(costs.occupied, besides + weights + generation.GENERATED_TOGETHER * each)
    assert many.flops == pytest.approx(32 * few.flops)
    costs.memory = besides + weights + 3 * each
    assert costs.generated_text(4, 64, 32).how == "3 sequences at a time"
    costs.memory = besides + weights + each - 1
    with pytest.raises(CapacityError, match=r"^generating text takes the whole model in memory, .* use --dtype bfloat16"):
        costs.generated_text(4, 64, 32)


@pytest.mark.parametrize(("data", "told"), [("text", True), ("chats", False), ("mix", False), ("self", False)])
def test_plain_text_for_a_model_that_answers_chats_is_said(data: str, told: bool, text: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    plain, notes = {"path": str(text)}, []  # type: ignore[var-annotated]
    chats = {"path": str(write_chats(tmp_path / "chats.jsonl", *[CHAT] * 40)), "column": "messages"}
    sources = {"text": plain, "chats": chats, "mix": {"mix": [plain, chats]}, "self": {"self": {}}}
    for is_chat_model in (False, True):
        if is_chat_model:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
        elif "chats" in str(sources[data]):
            continue
        source = CalibrationSource.model_validate(sources[data])
        draw_samples(source, open_folder(folder), 16, 4, "documents", make_context(tmp_path / "work", notes=notes))
        chat_notes = [note for note in notes if "the tokenizer has a chat template, and none of this text is a chat" in note]
        assert len(chat_notes) == (told and is_chat_model)

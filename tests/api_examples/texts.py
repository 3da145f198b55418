"""Text to token ids."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from gradmap_pipeline import (
    SHUFFLE_POOL,
    Answer,
    Answers,
    CalibrationPart,
    CalibrationSet,
    CalibrationSource,
    DatasetSource,
    ModelForecast,
    ModelGraph,
    ModelSource,
    OptionError,
    Prompts,
    Stage,
    agreeing_share,
    answer_prompts,
    check_length,
    check_tokenizer,
    count_embeddings,
    digest_sequences,
    draw_samples,
    load_tokenizer,
    make_sequences,
    open_model,
    repetition,
)
from gradmap_pipeline.testing import make_context, make_inputs

model = open_model(ModelSource(builtin="docs-llama"))
dataset = DatasetSource(builtin="calibration")
dataset.check_amount(8, 32, "documents")  # raises OptionError where the text cannot give so much

tokenizer, embeddings = load_tokenizer(model.base), count_embeddings(model.base)
ids, mask = make_sequences(tokenizer, dataset.documents(shuffle_seed=0), 32, 8, seed=0, embeddings=embeddings)
assert ids.shape == mask.shape == (8, 32)
assert int(ids.max()) < embeddings
again, _ = make_sequences(tokenizer, dataset.documents(shuffle_seed=0), 32, 8, seed=0, embeddings=embeddings)
assert digest_sequences(ids, mask) == digest_sequences(again, mask)
assert SHUFFLE_POOL * 8 == 64  # sequences that are read to draw eight of them

# A calibration set may be a mix, with text that the model writes itself; parts stand in turn.
mix = CalibrationSource.model_validate({"mix": [{"builtin": "calibration", "weight": 3}, {"self": {"top_k": 20}}]})
ids, mask, parts = draw_samples(mix, model, 32, 8, "documents", make_context(Path("mix")))
first: CalibrationPart = parts[0]
assert [part.samples for part in parts] == mix.share_out(8) == [6, 2]
assert first.tokens == 6 * 32

# A plan knows how long sequences may be.
assert check_length(None, ModelForecast(layers=12, positions=64)) == 64
with pytest.raises(OptionError, match="100"):
    check_length(100, ModelForecast(layers=12, positions=64))


class UseText(Stage):
    """Takes a calibration set."""

    name = "use_text"

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph


inputs = make_inputs(UseText, Path("inputs"))
check_tokenizer(inputs["calibration"], inputs["model"])  # raises StageError where another tokenizer made the ids

# What a model says to prompts, the likeliest token at each place.
prompts = Prompts(model.base, ["def read(self):"], tokens=8)
(said,) = answer_prompts(model, prompts, make_context(Path("answers")))
assert len(said) <= 8
text, repeated = prompts.decode(said), repetition(said)
same = agreeing_share(said, said)
answer = Answer(
    prompt="def read(self):", answer=text, base_answer=text, repetition=repeated, base_repetition=repeated, agreement=same
)
answers = Answers(model=model.digest, tokens=8, answers=(answer,))
assert [metric.name for metric in answers.list_metrics()] == ["repetition", "agreement"]
assert repetition([1, 2, 3, 4] * 3) == 5 / 9
assert agreeing_share([1, 2, 3], [1, 2, 4, 5]) == 2 / 4

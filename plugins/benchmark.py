"""How many tokens a second a model takes and gives, beside the unpruned one.

Prefill is one pass over the prompts of a batch, decoding one pass for each further token, with the cache of keys and values.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    DecodingShape,
    Estimate,
    Forecasts,
    GgufFolder,
    ModelCosts,
    ModelForecast,
    ModelGraph,
    OnnxFolder,
    OptionError,
    Outlook,
    Speed,
    Stage,
    StructureProbe,
    TransformersFolder,
    check_room_for_decoding,
    estimate_decoding,
    explain_missing,
    hookimpl,
    known,
    measure_speed,
)

_MOST_SHAPES = 32


class Benchmark(Stage):
    """Measure tokens a second of the model and the unpruned one in turn: prefill, and decoding with a cache."""

    name = "benchmark"
    machine_bound = True
    metric_names = ("prefill", "decode", "prefill_speedup", "decode_speedup")
    libraries = ("torch", "transformers", "onnxruntime", "llama-cpp-python")

    batch_sizes: tuple[int, ...] = Field((1,), min_length=1, description="Sequences that are computed together; each is measured.")
    prompt_tokens: tuple[int, ...] = Field((128,), min_length=1, description="Tokens of a prompt; each is measured.")
    new_tokens: int = Field(32, ge=1, description="Tokens that are decoded after the prompt, one after another.")
    rounds: int = Field(5, ge=3, description="How often each is measured; the median counts, and the range is shown.")
    warmup: int = Field(1, ge=0, description="Rounds before that, which do not count.")

    class Inputs(BaseModel):
        model: ModelGraph | TransformersFolder | OnnxFolder | GgufFolder
        reference: ModelGraph | TransformersFolder | OnnxFolder | GgufFolder | None = None
        """Beside which the model is measured. Default: the unpruned model in transformers, where transformers runs the model."""

    class Outputs(BaseModel):
        speed: Speed

    @property
    def _shapes(self) -> list[DecodingShape]:
        return [DecodingShape(rows, length, self.new_tokens) for rows in self.batch_sizes for length in self.prompt_tokens]

    def forecast(self, inputs: Forecasts) -> Outlook:
        for option in ("batch_sizes", "prompt_tokens"):
            values = getattr(self, option)
            wrong = next((value for value in values if value < 1), None)
            if wrong is not None:
                raise OptionError(option, f"found {wrong}; accepted: whole numbers from 1")
            if len(set(values)) < len(values):
                raise OptionError(option, f"found {list(values)}; name each value once")
        if len(self._shapes) > _MOST_SHAPES:
            raise OptionError(
                "batch_sizes", f"{len(self._shapes)} combinations with 'prompt_tokens'; accepted: at most {_MOST_SHAPES}"
            )
        for name in inputs:
            model = inputs[name]
            if not isinstance(model, ModelForecast):
                continue
            longest = max(self.prompt_tokens) + self.new_tokens
            if model.positions is not None and longest > model.positions:
                raise OptionError(
                    "prompt_tokens",
                    f"{max(self.prompt_tokens)} and {self.new_tokens} new ones are more than the {model.positions} tokens that "
                    "the model is made for",
                )
            unusable = model.explain_unusable()
            if unusable is not None:
                raise OptionError("", unusable)
        if inputs.has(OnnxFolder):
            missing = explain_missing(("onnxruntime",), "onnx")
            if missing is not None:
                raise OptionError("", missing)
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_loadable()
        if probe.room is not None and not (inputs.has(OnnxFolder) or inputs.has(GgufFolder)):
            check_room_for_decoding(probe.graph, self._shapes, probe.room.free, probe.room.dtype)

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        model = inputs["model"]
        if not isinstance(model, ModelForecast) or "reference" in inputs or inputs.has(OnnxFolder) or inputs.has(GgufFolder):
            return None  # another program runs one of them
        layers, whole = known(model.layers), len(costs.graph.layers)
        depths = [layers] if layers == whole else [layers, whole]
        return estimate_decoding(costs, depths, self._shapes, self.rounds + self.warmup)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model, reference = inputs.model, inputs.reference
        if reference is None and isinstance(model, ModelGraph | TransformersFolder):
            reference = model.graph.dense
        if reference is not None and reference.digest == model.digest:
            reference = None
        elif reference is None:
            context.note(
                "nothing is measured beside the model; name an export of the unpruned model with "
                "`from: {model: STEP, reference: STEP}` for a speedup"
            )
        speed = measure_speed(model, reference, self._shapes, context, rounds=self.rounds, warmup=self.warmup)
        return self.Outputs(speed=speed)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [Benchmark]

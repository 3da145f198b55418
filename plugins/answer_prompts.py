"""Answers of the unpruned and the pruned model to the same prompts."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Answer,
    Answers,
    CapacityError,
    Context,
    Estimate,
    Forecasts,
    Model,
    ModelCosts,
    ModelGraph,
    OptionError,
    Outlook,
    Prompts,
    Stage,
    StructureProbe,
    agreeing_share,
    answer_prompts,
    hookimpl,
    known,
    lack_of_memory,
    repetition,
)

_PROMPT_TOKENS = 32  # for the estimate


class AnswerPrompts(Stage):
    """Have the model and the unpruned model answer prompts, the likeliest token at each place; the report shows both.

    `repetition` is the share of an answer's four tokens in a row that stood in it before, and `agreement` the share of the answer,
    from its first token on, that the unpruned model gives too; both are means over the answers.
    """

    name = "answer_prompts"
    metric_names = ("repetition", "agreement")
    libraries = ("torch", "transformers", "tokenizers")

    prompts: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="What to answer. Default: three questions where the tokenizer has a chat template, three beginnings of text "
        "where it has none.",
    )
    tokens: int = Field(48, ge=1, description="Most tokens of an answer.")

    class Inputs(BaseModel):
        model: Model

    class Outputs(BaseModel):
        answers: Answers

    def forecast(self, inputs: Forecasts) -> Outlook:
        empty = next((number for number, prompt in enumerate(self.prompts or (), 1) if not prompt.strip()), None)
        if empty is not None:
            raise OptionError("prompts", f"prompt {empty} is empty; write what the model should answer")
        unusable = inputs.of(Model).explain_unusable()
        if unusable is not None:
            raise OptionError("", unusable)
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        Prompts(probe.graph.base, self.prompts, self.tokens)

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        if not inputs.has(ModelGraph):
            return None  # another program runs it
        count, length = len(self.prompts) if self.prompts else 3, _PROMPT_TOKENS + self.tokens
        layers, whole = known(inputs.of(Model).layers), len(costs.graph.layers)
        try:
            return costs.generated_text(layers, count, length) + costs.generated_text(whole, count, length)
        except CapacityError as error:
            raise lack_of_memory(
                "answering prompts takes the whole model in memory, which does not fit",
                error.enough or costs.memory,
                ["leave the step out"],
                dtype=costs.dtype,
            ) from None

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model = inputs.model
        prompts = Prompts(model.graph.base, self.prompts, self.tokens)
        before = answer_prompts(model.graph.dense, prompts, context)
        after = answer_prompts(model, prompts, context)
        answers = tuple(
            Answer(
                prompt=prompt,
                answer=prompts.decode(said),
                base_answer=prompts.decode(base),
                repetition=repetition(said),
                base_repetition=repetition(base),
                agreement=agreeing_share(said, base),
            )
            for prompt, base, said in zip(prompts.texts, before, after, strict=True)
        )
        repeating = [number for number, answer in enumerate(answers, 1) if answer.repeats]
        empty = [number for number, answer in enumerate(answers, 1) if not answer.answer.strip()]
        for numbers, what in ((repeating, "repeat themselves"), (empty, "are empty")):
            if numbers:
                which = f"{len(numbers)} of {len(answers)} answers of the {model.label} model {what}"
                context.note(f"warning: {which}: to prompt {', '.join(map(str, numbers))}")
        return self.Outputs(answers=Answers(model=model.digest, tokens=self.tokens, answers=answers))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [AnswerPrompts]

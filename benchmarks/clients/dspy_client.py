"""DSPy against a running server: plain calls, several answers, log probabilities, typed outputs.

pip install dspy
smol serve --port 8077 &
python benchmarks/clients/dspy_client.py
"""

import os
import sys
from typing import Any, Literal


def show(what: str, value: object) -> None:
    """Print one outcome."""
    sys.stdout.write(f"{what}: {value!r}\n")


def main() -> None:
    """Call the model in each way and print what comes back."""
    import dspy  # type: ignore[import-not-found, unused-ignore]

    url = os.environ.get("SMOL_URL", "http://127.0.0.1:8077/v1")
    model = "openai/HuggingFaceTB/SmolLM2-135M-Instruct"

    def language_model(**options: Any) -> Any:
        return dspy.LM(model, api_base=url, api_key="none", cache=False, max_tokens=60, **options)

    lm = language_model(temperature=0)
    show("call", lm("What is the capital of France?"))
    show("n=2", language_model(temperature=0.9)("Once upon a time", n=2))
    show("logprobs", len(lm("Hi", logprobs=True)[0]["logprobs"].content) > 0)
    text = dspy.LM(
        f"text-completion-{model}", model_type="text", api_base=url, api_key="none", cache=False
    )
    show("text completion", text("The capital of France is", max_tokens=8))

    class Sentiment(dspy.Signature):  # type: ignore[misc, unused-ignore]
        """Classify the sentiment of a sentence."""

        sentence: str = dspy.InputField()
        sentiment: Literal["positive", "negative"] = dspy.OutputField()

    # DSPy asks only models that it knows for a JSON Schema, so that one is given here.
    labels = {"type": "object", "properties": {"sentiment": {"enum": ["positive", "negative"]}}}
    schema = labels | {"required": ["sentiment"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "sentiment", "schema": schema}}
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        predict = dspy.Predict(Sentiment, response_format=form)
        show("typed", predict(sentence="What a lovely day!").sentiment)


if __name__ == "__main__":
    main()

"""Drives function calling with unchanged Python clients, and prints what each of them got.

    pip install openai pydantic-ai-slim[openai] instructor langchain-openai
    smol serve
    python benchmarks/clients/tools_python.py http://127.0.0.1:8000/v1

The model is small: the calls are valid, their values may not be right.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "What is the weather in Paris?"
PERSON = "Who is this? Maria Lopez is 34."


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return f"18 degrees and sunny in {city}"


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}


def openai_chat() -> Any:
    """A tool loop, as the SDK's documentation writes it."""
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    tools: Any = [{"type": "function", "function": FUNCTION}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: Any = {"model": MODEL, "tools": tools, "max_tokens": 100}
    message = (
        client.chat.completions.create(messages=messages, tool_choice="required", **asked)
        .choices[0]
        .message
    )
    messages.append(message)
    for call in message.tool_calls or ():
        result = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return client.chat.completions.create(messages=messages, **asked).choices[0].message.content


def openai_responses() -> Any:
    """The same with the Responses API, streamed."""
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    asked: Any = {"model": MODEL, "tools": [{"type": "function", **FUNCTION}]}
    asked["max_output_tokens"] = 100
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    with client.responses.stream(input=items, tool_choice="required", **asked) as stream:
        response = stream.get_final_response()
    items += response.output
    for item in response.output:
        if item.type == "function_call":
            result = get_weather(**json.loads(item.arguments))
            items.append(
                {"type": "function_call_output", "call_id": item.call_id, "output": result}
            )
    return client.responses.create(input=items, **asked).output_text


def openai_parse() -> Any:
    """A parsed response."""
    from openai import OpenAI

    client = OpenAI(base_url=URL, api_key="none")
    return client.responses.parse(model=MODEL, input=PERSON, text_format=Person).output_parsed


def pydantic_ai() -> Any:
    """The default output type, which is a tool."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))
    return Agent(model, output_type=Person).run_sync(PERSON).output


def instructor_tools() -> Any:
    """Instructor's mode TOOLS."""
    import instructor
    from openai import OpenAI

    client = instructor.from_openai(
        OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.TOOLS
    )
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": PERSON}], response_model=Person
    )


def _langchain() -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=URL, api_key="none", max_tokens=100)


def langchain_bind_tools() -> Any:
    """`bind_tools` with a forced choice."""
    return _langchain().bind_tools([get_weather], tool_choice="any").invoke(QUESTION).tool_calls


def langchain_structured() -> Any:
    """`with_structured_output` by function calling."""
    structured = _langchain().with_structured_output(Person, method="function_calling")
    return structured.invoke(PERSON)


def main() -> None:
    """Run every client."""
    clients: list[Callable[[], Any]] = [
        openai_chat,
        openai_responses,
        openai_parse,
        pydantic_ai,
        instructor_tools,
        langchain_bind_tools,
        langchain_structured,
    ]
    num_failed = 0
    for client in clients:
        try:
            sys.stdout.write(f"{client.__name__}: {client()!r}"[:300] + "\n")
        except Exception as exc:
            num_failed += 1
            failed = f"{client.__name__}: FAILED: {type(exc).__name__}: {exc}"
            sys.stdout.write(failed[:600] + "\n")
    sys.exit(num_failed)


if __name__ == "__main__":
    main()

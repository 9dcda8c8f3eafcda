"""The Python API: a model that answers prompts, conversations and files."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, cast, overload

from smolcli.backends.base import Backend, BackendWrapper, stream
from smolcli.errors import QueryError, UsageError
from smolcli.settings import (
    DEFAULT_MODEL,
    DEFAULT_SEED,
    Dtype,
    EngineSettings,
    InputFile,
    QueryDefaults,
    RemoteSettings,
    RowSettings,
    RunSettings,
)
from smolcli.types import ErrorCode, Message, Query, Result, Sampling

if TYPE_CHECKING:
    from smolcli.batch.statistics import RunStatistics

_DEFAULTS = EngineSettings()

Conversation = Sequence[Mapping[str, Any] | Message]
Prompt = str | Conversation


class SamplingOptions(TypedDict, total=False):
    """How an answer is generated: the fields of a query, with the same defaults and limits."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    min_tokens: int
    ignore_eos: bool
    stop: str | list[str]
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    bad_words: list[str]
    allowed_token_ids: list[int]
    continue_final_message: bool
    n: int
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: int
    response_format: dict[str, Any]
    choices: list[str]
    structured_outputs: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool


class LLM:
    """A loaded model that answers prompts.

    Everything that is submitted together is answered in one continuous batch. Methods may be
    called from several threads. Close the object, or use it as a context manager, to free the
    model.

    >>> from smolcli import LLM
    >>> with LLM() as llm:
    ...     llm.chat("What is the capital of France?").response
    'The capital of France is Paris.'

    Args:
        model: a name on the Hugging Face Hub, a local directory or a .gguf file.
        dtype: data type to compute in; auto chooses bfloat16 if the hardware supports it. int8 is
            faster but less exact, and only available on the CPU.
        device: cpu, cuda, cuda:1 and so on, or auto.
        threads: number of CPU threads; 0 means one per available physical core.
        max_batch_size: maximum number of prompts in a batch; 0 chooses for the machine.
        kv_cache_mb: size of the KV cache in MiB; 0 chooses for the machine.
        prefix_cache_mb: size of the prefix cache in MiB; 0 disables it. Default: 1/32 of the
            memory, at most 256.
        speculation: whether to draft tokens while one prompt runs alone; answers stay the same.
        chat_template: source of a Jinja chat template to use instead of the model's own.
        via: URLs of servers to send prompts to instead of loading a model.
        api_key: API key for these servers.

    Raises:
        ModelError: the model cannot be found or used.
        UsageError: the device is not available, or the chat template is invalid or given for other
            servers.
        BackendError: no server of `via` can be reached, or threads cannot be started.
    """

    def __init__(
        self,
        model: str | PathLike[str] = DEFAULT_MODEL,
        *,
        dtype: Dtype = "auto",
        device: str = "cpu",
        threads: int = 0,
        max_batch_size: int = 0,
        kv_cache_mb: int = _DEFAULTS.kv_cache_mb,
        prefix_cache_mb: int | None = _DEFAULTS.prefix_cache_mb,
        speculation: bool = _DEFAULTS.speculation,
        chat_template: str = "",
        via: str | Sequence[str] = (),
        api_key: str | None = None,
    ) -> None:
        self._settings = EngineSettings(
            model=str(model),
            dtype=dtype,
            device=device,
            threads=threads,
            max_batch_size=max_batch_size,
            kv_cache_mb=kv_cache_mb,
            prefix_cache_mb=prefix_cache_mb,
            speculation=speculation,
            chat_template=chat_template,
        )
        urls = (via,) if isinstance(via, str) else tuple(via)
        self._is_remote = bool(urls)
        if urls:
            if chat_template:
                raise UsageError("chat_template has no effect on the servers of via")
            self._backend = _open_remote(urls, api_key, self._settings)
        else:
            from smolcli.backends.local import open_local

            self._backend = open_local(self._settings)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the answers: model, revision, dtype, versions and so on."""
        return self._backend.identity()

    @overload
    def chat(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
        self,
        prompts: str | Conversation,
        *,
        system_prompt: str | None = None,
        seed: int | None = None,
        schema: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> Result: ...

    @overload
    def chat(
        self,
        prompts: Sequence[Prompt],
        *,
        system_prompt: str | None = None,
        seed: int | None = None,
        schema: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Result]: ...

    def chat(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        system_prompt: str | None = None,
        seed: int | None = None,
        schema: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> Result | list[Result]:
        """Answer one prompt, one conversation, or a list of them in one batch.

        >>> results = llm.chat(["What is gravity?", "What is light?"], max_new_tokens=8)
        >>> [result.usage.completion_tokens for result in results]
        [8, 8]
        >>> conversation = [
        ...     {"role": "user", "content": "My name is Ada."},
        ...     {"role": "assistant", "content": "Hello, Ada!"},
        ...     {"role": "user", "content": "What is my name?"},
        ... ]
        >>> llm.chat(conversation, max_new_tokens=8).finish_reason in ("stop", "length")
        True
        >>> llm.chat("Is the sky blue?", choices=["yes", "no"]).response in ("yes", "no")
        True

        Args:
            prompts: a string, a list of messages with `role` and `content`, or a list of these.
            system_prompt: system prompt for prompts without one; by default the model's own.
            seed: sampling seed; by default random. Prompts of a list also differ by position.
            schema: JSON Schema that the answers must follow, as a dict or a pydantic model.
            options: see `SamplingOptions`.

        Returns:
            A result for one prompt, or a list of results in the order of the prompts. A prompt
            that cannot be answered has a result with `error` and `error_code` instead.

        Raises:
            QueryError: an option is invalid.
            BackendError: the model or every server has failed.
        """
        from smolcli.batch.pipeline import answer_all

        is_single = isinstance(prompts, str) or _is_conversation(prompts)
        each = cast("Sequence[Prompt]", [prompts] if is_single else prompts)
        defaults = _defaults(system_prompt, seed, schema, options)
        items = [_query(item, str(at), defaults, options) for at, item in enumerate(each)]
        results = list(answer_all(items, self._backend))
        return results[0] if is_single else results

    @overload
    def complete(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
        self,
        prompts: str | Sequence[int],
        *,
        seed: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Result: ...

    @overload
    def complete(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        seed: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Result]: ...

    def complete(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        seed: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Result | list[Result]:
        """Continue one text, or a list of them, without the chat template.

        A control token written in a text is a control token. With `max_new_tokens=0` and
        `prompt_logprobs`, texts are only scored.

        >>> llm.complete("The capital of France is", max_new_tokens=1).response
        ' Paris'
        >>> scored = llm.complete("Rome is in Italy", max_new_tokens=0, prompt_logprobs=0)
        >>> [token["token"] for token in scored.prompt_logprobs]
        ['Rome', ' is', ' in', ' Italy']

        Args:
            prompts: a text, a list of token ids, or a list of either.
            seed: as for `chat`.
            options: see `SamplingOptions`.

        Returns:
            As for `chat`.

        Raises:
            QueryError: an option is invalid.
            BackendError: the model or every server has failed.
        """
        from smolcli.batch.pipeline import answer_all

        is_single = isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], int))
        each: Sequence[Any] = [prompts] if is_single else prompts
        defaults = _defaults(None, seed, None, options)
        contents = [{"raw_prompt": p if isinstance(p, str) else list(p)} for p in each]
        items = [_parsed(c, str(at), defaults, options) for at, c in enumerate(contents)]
        results = list(answer_all(items, self._backend))
        return results[0] if is_single else results

    def stream(
        self,
        prompt: Prompt,
        *,
        system_prompt: str | None = None,
        seed: int | None = None,
        schema: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the text of an answer as it is generated; closing the iterator stops it.

        >>> "".join(llm.stream("What is the capital of France?"))
        'The capital of France is Paris.'

        Args:
            prompt: a string, or a list of messages.
            system_prompt: as for `chat`.
            seed: as for `chat`.
            schema: as for `chat`.
            options: see `SamplingOptions`.

        Raises:
            QueryError: an option is invalid, or the prompt cannot be answered.
            BackendError: the model or every server has failed.
        """
        query = _query(prompt, "0", _defaults(system_prompt, seed, schema, options), options)
        if isinstance(query, Result):
            raise _error(query)
        if query.tools is not None:
            raise QueryError("tools cannot be combined with stream; use chat", field="tools")
        return self._stream_query(query)

    def _stream_query(self, query: Query) -> Iterator[str]:
        pieces, future = stream(self._backend, query)
        try:
            yield from pieces
        finally:
            future.cancel()
        if (result := future.result()).is_error:
            raise _error(result)

    def run(
        self,
        input: str | PathLike[str] | Sequence[str | PathLike[str]],
        output: str | PathLike[str] | None = None,
        *,
        prompt: str | None = None,
        id_column: str | None = None,
        fields: Sequence[str] = (),
        truncate_prompt: bool = False,
        errors: str | PathLike[str] | None = None,
        limit: int | None = None,
        overwrite: bool = False,
        retry_errors: bool = False,
        timings: bool = False,
        system_prompt: str | None = None,
        seed: int | None = None,
        schema: Any = None,
        **options: Unpack[SamplingOptions],
    ) -> "RunStatistics":
        """Answer every query of a file, as `smol run` does; an interrupted run is resumed.

        >>> statistics = llm.run("queries.jsonl", "results.jsonl", max_new_tokens=8)
        >>> statistics.num_answered
        2

        Args:
            input: JSON Lines, or a table such as CSV, Parquet or SQLite; or a list of files, whose
                results carry the name of their `file`.
            output: JSON Lines or a table; by default next to the input. Required for a list.
            prompt: template for each row of a table, with columns in braces.
            id_column: column to use as chat_id.
            fields: columns to copy into the results; `["*"]` copies all.
            truncate_prompt: whether to cut the middle of the longest column or message of a prompt
                that leaves no room for its answer.
            errors: file to move failed lines to.
            limit: number of lines to answer.
            overwrite: whether to replace an existing output.
            retry_errors: whether to answer only the failed lines of a finished output again.
            timings: whether to add timings to the results.
            system_prompt: system prompt for queries without one.
            seed: sampling seed; by default a random one, which a resumed run keeps.
            schema: as for `chat`.
            options: defaults for queries that do not set these fields: how tokens are sampled, but
                not `stop`, `include_stop_str_in_output`, `bad_words`, `n`, log probabilities and
                formats.

        Returns:
            Counts, tokens and speed of the whole output.

        Raises:
            UsageError: options contradict each other, or the output belongs to another run.
            RunError: the input cannot be read, the output cannot be written, or the model failed.
        """
        from smolcli.batch.progress import LogProgress
        from smolcli.batch.runner import default_output, run_file
        from smolcli.data.detection import table_kind
        from smolcli.data.table_writer import journal_path

        names = [input] if isinstance(input, str | PathLike) else list(input)
        files = tuple(InputFile(str(name), Path(name)) for name in names)
        is_list = not isinstance(input, str | PathLike)
        if truncate_prompt and self._is_remote:
            raise UsageError("truncate_prompt needs a model on this machine, not a server")
        if not files or (is_list and output is None):
            raise UsageError("a list of inputs needs at least one file, and an output")
        target = default_output(files[0].path) if output is None else Path(output)
        settings = RunSettings(
            input=files[0].path,
            output=journal_path(target),
            defaults=_defaults(system_prompt, seed, schema, options, for_file=True),
            engine=self._settings,
            seed=_given(seed),
            limit=limit,
            errors=None if errors is None else Path(errors),
            retry_errors=retry_errors,
            overwrite=overwrite,
            with_timings=timings,
            rows=RowSettings(prompt, id_column, tuple(fields), truncate_prompt=truncate_prompt),
            table=target if table_kind(target) else None,
            files=files if is_list else (),
        )
        return run_file(settings, lambda _: _Borrowed(self._backend), LogProgress())

    def close(self) -> None:
        """Stop all work and free the model."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Borrowed(BackendWrapper):
    """A backend that a run does not close."""

    def close(self) -> None:
        pass


def _open_remote(urls: tuple[str, ...], api_key: str | None, settings: EngineSettings) -> Backend:
    from smolcli.backends.remote.backend import open_remote

    model = None if settings.model == DEFAULT_MODEL else settings.model
    return open_remote(RemoteSettings(urls, api_key=api_key, model=model, dtype=settings.dtype))


def _is_conversation(prompts: Sequence[Any]) -> bool:
    return bool(prompts) and isinstance(prompts[0], Mapping | Message)


def _given(seed: int | None) -> int | None:
    return None if seed == DEFAULT_SEED else seed


def _defaults(
    system_prompt: str | None,
    seed: int | None,
    schema: Any,
    options: SamplingOptions,
    for_file: bool = False,
) -> QueryDefaults:
    """Defaults for queries, validated together with the options that each query repeats.

    Args:
        system_prompt: default system prompt.
        seed: sampling seed; random if None.
        schema: schema of every answer, if any.
        options: query fields.
        for_file: whether the options become defaults for the queries of a file.

    Raises:
        QueryError: an option is invalid.
    """
    from smolcli.protocol.answer_formats import schema_format
    from smolcli.protocol.query import parse_query
    from smolcli.text.grammar import check_format

    own = {name: value for name, value in options.items() if value is not None}
    if for_file and (unsupported := own.keys() - Sampling.__dataclass_fields__.keys()):
        name = sorted(unsupported)[0]
        raise QueryError(f"{name} must be set by each query of a file", field=name)
    example = {"chat_id": "0", "user_prompt": "-", "seed": seed, **own}
    parsed = parse_query(example, QueryDefaults())
    seed = _given(seed)
    sampling = Sampling(seed=secrets.randbelow(2**31) if seed is None else seed)
    if for_file:
        values = {n: getattr(parsed.sampling, n) for n in own}
        sampling = Sampling(**values, seed=sampling.seed)
    answers = None
    if schema is not None:
        check_format(answers := schema_format(_json_schema(schema)))
    return QueryDefaults(sampling=sampling, system_prompt=system_prompt, format=answers)


def _json_schema(schema: Any) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    from smolcli.protocol.answer_formats import model_schema

    return model_schema(schema)


def _query(
    prompt: Prompt, chat_id: str, defaults: QueryDefaults, options: SamplingOptions
) -> Query | Result:
    """A query, or the error result of an invalid prompt."""
    content: dict[str, Any] = {"user_prompt": prompt}
    if not isinstance(prompt, str):
        content = {"messages": [_message(message) for message in prompt]}
    return _parsed(content, chat_id, defaults, options)


def _parsed(
    content: dict[str, Any], chat_id: str, defaults: QueryDefaults, options: SamplingOptions
) -> Query | Result:
    """The query with a content, or the error result of one that is invalid."""
    from smolcli.protocol.query import parse_query

    try:
        return parse_query({"chat_id": chat_id, **content, **options}, defaults)
    except QueryError as exc:
        return Result(chat_id, error=str(exc), error_code=exc.code, field=exc.field)


def _message(message: Mapping[str, Any] | Message) -> Mapping[str, Any]:
    if isinstance(message, Message):
        from smolcli.protocol.tools import message_record

        return message_record(message)
    return message


def _error(result: Result) -> QueryError:
    return QueryError(str(result.error), result.error_code or ErrorCode.INTERNAL, result.field)

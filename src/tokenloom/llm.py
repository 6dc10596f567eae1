"""The offline API: a model in this process, no server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenloom.config import Settings, load_settings
from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import Completion, Delta, RequestOutput, TokenLogprob, collect
from tokenloom.engine.request import Request
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import RequestError
from tokenloom.finetune.local import FinetuneResult, Rows, StepReport, finetune_folder
from tokenloom.methods.defaults import methods_of, with_drafter, with_methods
from tokenloom.models.adapters import load_adapter
from tokenloom.models.catalog import DEFAULT_MODEL
from tokenloom.structured import Structured, grammars_of
from tokenloom.text.chat_context import context_tokens
from tokenloom.text.tokenizer import Tokenizer

Prompt = str | list[int]
Message = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text. Natural logarithms; the first token has no prediction."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]

    @property
    def total(self) -> float:
        """Log-probability of all tokens after the first."""
        return sum(entry.logprob for entry in self.logprobs if entry is not None)

    @property
    def perplexity(self) -> float:
        """exp(-mean log-probability); NaN for a text of one token."""
        count = len(self.token_ids) - 1
        return math.exp(-self.total / count) if count else math.nan


class LLM:
    """A model ready to use.

    Args:
        model: a catalog name, a folder of safetensors, or a GGUF file.
        settings: any key of the settings tree with its dot as a double underscore, e.g.
            `model__dtype="bfloat16"`, `cache__kv_bytes=2**30`, `scheduler__max_batch_tokens=256`.

    Raises:
        ModelError: the model cannot be found, read or held.
        ConfigError: a setting is unknown or out of range; the message names its key.

    Example:
        >>> llm = LLM("smollm2-135m-instruct")
        >>> llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))[0].text
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        flags = {key.replace("__", ".", 1): value for key, value in settings.items()}
        self.engine = with_drafter(Engine(with_methods(load_settings({"model.name": model, **flags}))))
        self._num_requests = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> LLM:
        """A model by a settings tree that was read already."""
        llm = cls.__new__(cls)
        llm.engine, llm._num_requests = with_drafter(Engine(with_methods(settings))), 0
        return llm

    @property
    def settings(self) -> Settings:
        return self.engine.settings

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        kv: str | None = None,
        draft: str | None = None,
        compress_upto: int | Sequence[int] | None = None,
        structured: Structured | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; all of them run together.

        Args:
            prompts: strings or lists of token ids (or one of either).
            params: for all prompts, or one for each; by default 16 tokens at temperature 1.
            adapter: the name of a loaded adapter; None is the base model.
            kv: which cached tokens are kept and read, such as `"snapkv(budget=1024)"`; `"off"`: all. None:
                as the settings say.
            draft: how tokens are guessed ahead, such as `"token_recycling+ngram"`; `"off"`: not at all. The
                answer is the same. None: as the settings say.
            compress_upto: tokens of each prompt (or of all) that `kv` compresses before the others are
                computed: a text, without the question that follows it. None: the whole prompt.
            structured: what each answer must look like, such as `Structured(json=schema)`. None: anything.

        Returns:
            One output per prompt, in order.

        Raises:
            RequestError: a prompt or parameter cannot be served; nothing has been run then.
        """
        many: list[Prompt] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        each = [params or SamplingParams()] * len(many) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(many):
            raise RequestError(f"params has {len(each)} entries for {len(many)} prompts", param="params")
        each = self._constrained(each, structured)
        upto = list(compress_upto) if isinstance(compress_upto, Sequence) else [compress_upto] * len(many)
        if len(upto) != len(many):
            raise RequestError(
                f"compress_upto has {len(upto)} entries for {len(many)} prompts", param="compress_upto"
            )
        token_ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in many]
        loaded, (method, guesses) = self._adapter(adapter), methods_of(self.settings, kv, draft)
        return self._run(
            [
                Request(
                    self._next_id(), ids, p, adapter=loaded, kv=method, draft=guesses, compress_upto=first
                )
                for ids, p, first in zip(token_ids, each, upto, strict=True)
            ]
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        kv: str | None = None,
        draft: str | None = None,
        compress_upto: int | None = None,
        structured: Structured | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several together.

        Args:
            messages: `{"role": ..., "content": ...}` dictionaries, or a list of such lists.
            params, adapter, kv, draft, structured: as in `generate`.
            compress_upto: so many first messages are what `kv` compresses, before the others are computed.
            template_variables: passed to the model's chat template.

        Returns:
            One output per conversation.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        single = bool(messages) and isinstance(messages[0], dict)
        conversations: Any = [messages] if single or not messages else messages
        prompts: list[list[int]] = [
            self.tokenizer.encode(
                self.tokenizer.render_chat(list(conversation), **template_variables), add_special_tokens=False
            )
            for conversation in conversations
        ]
        upto = None
        if compress_upto is not None:
            render = partial(self.tokenizer.render_chat, add_generation_prompt=False, **template_variables)
            upto = [
                context_tokens(self.tokenizer, render, list(conversation), compress_upto, prompt)
                for conversation, prompt in zip(conversations, prompts, strict=True)
            ]
        return self.generate(
            prompts, params, adapter=adapter, kv=kv, draft=draft, compress_upto=upto, structured=structured
        )

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        kv: str | None = None,
        draft: str | None = None,
        structured: Structured | None = None,
        compress_upto: int | None = None,
    ) -> Iterator[Delta]:
        """Continue one prompt, piece by piece. Ending the iteration early aborts it.

        Args:
            prompt: a string, or token ids. The others are as in `generate`.

        Yields:
            What each choice gained, in the order in which it came.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        chosen, (method, guesses) = self._adapter(adapter), methods_of(self.settings, kv, draft)
        [wanted] = self._constrained([params or SamplingParams()], structured)
        request = Request(
            self._next_id(),
            ids,
            wanted,
            adapter=chosen,
            kv=method,
            draft=guesses,
            compress_upto=compress_upto,
        )
        self.engine.add(request)
        try:
            while not request.finished:
                for output in self.engine.step():
                    yield from output.deltas
        finally:
            self.engine.abort(request.request_id)

    def score(
        self, texts: Prompt | Sequence[Prompt], *, top: int = 0, adapter: str | None = None
    ) -> list[Score]:
        """Log-probability of every token of each text, given the ones before it.

        Args:
            texts: strings or lists of token ids.
            top: how many alternatives (0..20) to report at each position.
        """
        params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=top)
        outputs = self.generate(texts, params, adapter=adapter)
        return [Score(output.prompt_token_ids, output.prompt_logprobs or []) for output in outputs]

    def embed(self, texts: Prompt | Sequence[Prompt], *, adapter: str | None = None) -> list[list[float]]:
        """Mean of the last hidden states of each text, `[hidden_size]` each."""
        many: list[Prompt] = [texts] if _is_one(texts) else list(texts)  # type: ignore[list-item,arg-type]
        none, chosen = SamplingParams(max_tokens=0), self._adapter(adapter)
        requests = [
            Request(
                self._next_id(),
                self.tokenizer.encode(t) if isinstance(t, str) else t,
                none,
                kind="embed",
                adapter=chosen,
            )
            for t in many
        ]
        return [output.embedding or [] for output in self._run(requests)]

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Make a PEFT adapter available under a name, instead of what had that name before.

        Raises:
            AdapterError: it cannot be read, or does not fit the model.
        """
        engine, path = self.engine, Path(folder)
        loaded = load_adapter(path, engine.config, engine.dtype, engine.device)
        engine.adapters.put(name, loaded, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises RequestError if none of that name is loaded."""
        if self.engine.adapters.remove(name) is None:
            raise self._unknown_adapter(name)

    def finetune(
        self,
        data: Rows,
        output: str | Path,
        *,
        validation: Rows | None = None,
        seed: int = 0,
        on_step: Callable[[StepReport], None] = lambda report: None,
        **options: Any,
    ) -> FinetuneResult:
        """Train a LoRA adapter on examples; the base weights stay as they are.

        An interrupted call can be made again with the same arguments: it goes on from what `output` holds.

        Args:
            data: a JSONL file, or its rows: `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`.
            output: a folder that gets `adapter` (PEFT's format), one adapter per checkpoint, and what going
                on needs.
            validation: more such data, to evaluate on at each checkpoint.
            on_step: told of each optimizer step; what it raises ends the call.
            options: keys of the jobs API, e.g. `n_epochs`, `batch_size`, `learning_rate`, `r`, `alpha`,
                `dropout`, `target_modules`, `max_seq_tokens`, `retain`.

        Returns:
            The adapter's folder, the steps of this call, and warnings (e.g. how many rows were truncated).

        Raises:
            RequestError: an option is unknown or out of range (the message names it), a row is faulty (with
                its line), or `output` holds another job.
            TrainingDiverged: a loss is not a number any more; earlier checkpoints stay.

        Example:
            >>> result = llm.finetune("train.jsonl", "my-adapter", n_epochs=2, r=8)
            >>> llm.load_adapter("mine", result.adapter)
            >>> llm.chat([{"role": "user", "content": "Hello!"}], adapter="mine")
        """
        return finetune_folder(
            self.engine,
            data,
            Path(output),
            validation=validation,
            seed=seed,
            on_step=on_step,
            options=options,
        )

    def _constrained(
        self, params: list[SamplingParams], structured: Structured | None
    ) -> list[SamplingParams]:
        if structured is None:
            return params
        grammar = grammars_of(self.engine).compile(structured)
        return [replace(each, processors=(*each.processors, grammar)) for each in params]

    def _adapter(self, name: str | None) -> LoadedAdapter | None:
        if name is None:
            return None
        adapter = self.engine.adapters.get(name)
        if adapter is None:
            raise self._unknown_adapter(name)
        return adapter

    def _unknown_adapter(self, name: str) -> RequestError:
        known = ", ".join(adapter.name for adapter in self.engine.adapters.list()) or "none is"
        return RequestError(f"no adapter {name!r} is loaded ({known})", param="adapter")

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"llm-{self._num_requests}"

    def _run(self, requests: list[Request]) -> list[RequestOutput]:
        for request in requests:
            self.engine.validate(request)
        outputs = {
            r.request_id: RequestOutput(r.request_id, r.prompt, [Completion(i) for i in range(r.params.n)])
            for r in requests
        }
        for request in requests:
            self.engine.add(request)
        try:
            while self.engine.has_work:
                for step in self.engine.step():
                    collect(outputs[step.request_id], step)
        except BaseException:  # an interrupt too: the next call must find an empty engine
            for request in requests:
                self.engine.abort(request.request_id)
            raise
        return list(outputs.values())


def _is_one(prompts: Any) -> bool:
    """Whether this is a single prompt: a string, or a list of token ids."""
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))

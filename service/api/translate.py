"""From validated bodies to GenerationRequests: defaults, limits that are settings, one request for each sequence.

It does not know JSON, streams or how prompts were rendered (prompts.py). Invariants: the seed is fixed here; every limit is checked before
anything is queued; prompt + max_tokens fits the context of the version.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from service.api.calls import Call
from service.api.placement import ChatPrompt
from service.api.schemas import ChatBody, CompletionBody, SamplingBody
from service.types.errors import ContextLengthExceeded, InvalidRequest
from service.types.request import GenerationRequest, Sampling, Stop
from service.types.settings import HttpLimits

if TYPE_CHECKING:
    from service.schedulers.router import ServedVersion

Number = TypeVar("Number", int, float)

COMPLETION_TOKENS = 16
SEED_BITS = 63
LOGIT_BIAS = 100.0


def context_of(served: ServedVersion) -> int:
    """The most tokens that prompt and answer may have together."""
    info = served.info
    return info.context_tokens if info is not None else served.manifest.spec.context_tokens


@dataclass(frozen=True, slots=True)
class Scoring:
    """Log-probs asked for: of generated tokens and of the prompt's (None: not)."""

    generated: int | None = None
    prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Translator:
    """Turns one body into requests for one version."""

    served: ServedVersion
    call: Call
    limits: HttpLimits

    def completion(self, body: CompletionBody, prompts: list[list[int]]) -> list[GenerationRequest]:
        """Requests in the order of the choices: prompt by prompt, `n` each."""
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequest("`best_of` must equal `n`: choices are not ranked here.", param="best_of")
        self.check_prompt_count(len(prompts), body.n)
        logprobs = self._checked_logprobs(body.logprobs, "logprobs")
        empty = body.max_tokens == 0
        if empty and not body.echo:
            raise InvalidRequest("`max_tokens` must be at least 1 unless `echo` is true.", param="max_tokens")
        prompt_logprobs = (logprobs if logprobs is not None else 0 if empty else None) if body.echo else None
        budget = [self._budget(prompt, body.max_tokens, COMPLETION_TOKENS) for prompt in prompts]
        return self._expand(body, prompts, budget, Scoring(logprobs, prompt_logprobs))

    def chat(self, body: ChatBody, prompt: ChatPrompt) -> list[GenerationRequest]:
        """`n` requests with the same prompt."""
        self.check_prompt_count(1, body.n)
        top = self._checked_logprobs(body.top_logprobs, "top_logprobs")
        if top is not None and not body.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if body.max_tokens not in (None, asked):
            raise InvalidRequest("`max_tokens` and `max_completion_tokens` differ; send one of them.", param="max_tokens")
        if asked == 0:
            raise InvalidRequest("`max_tokens` must be at least 1.", param="max_tokens")
        budget = self._budget(prompt.ids, asked, context_of(self.served))
        requests = self._expand(body, [prompt.ids], [budget], Scoring((top or 0) if body.logprobs else None))
        return [replace(request, images=prompt.images) for request in requests] if prompt.images else requests

    def check_prompt_count(self, prompts: int, n: int | None) -> None:
        """Prompts, choices and their product are bounded."""
        limits, choices = self.limits, n or 1
        if choices > limits.choices:
            raise InvalidRequest(f"`n` may be at most {limits.choices}.", param="n")
        if prompts > limits.prompts:
            raise InvalidRequest(f"`prompt` may hold at most {limits.prompts} prompts.", param="prompt")
        if prompts * choices > limits.sequences:
            raise InvalidRequest(f"Prompts times `n` may be at most {limits.sequences}.", param="n")

    def _expand(self, body: SamplingBody, prompts: list[list[int]], budgets: list[int], scoring: Scoring) -> list[GenerationRequest]:
        seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed % 2**SEED_BITS
        requests: list[GenerationRequest] = []
        for prompt, budget in zip(prompts, budgets, strict=True):
            ids, stop = tuple(prompt), self._stop(body, budget)
            for _ in range(body.n or 1):
                requests.append(
                    GenerationRequest(
                        request_id=self.call.request_id,
                        version=self.served.name,
                        prompt=ids,
                        stop=stop,
                        sampling=self._sampling(body, seed, len(requests), scoring.generated),
                        tenant=self.call.tenant,
                        priority=body.priority or 0,
                        cache_salt=body.cache_salt or "",
                        prompt_logprobs=scoring.prompt,
                        route=self.call.route,
                    )
                )
        return requests

    def _sampling(self, body: SamplingBody, seed: int, choice: int, logprobs: int | None) -> Sampling:
        plain, own = Sampling(), self.served.manifest.generation
        return Sampling(
            temperature=_first(body.temperature, own.temperature, plain.temperature),
            top_p=_first(body.top_p, own.top_p, plain.top_p),
            top_k=max(0, _first(body.top_k, own.top_k, plain.top_k)),
            min_p=_first(body.min_p, None, plain.min_p),
            repetition_penalty=_first(body.repetition_penalty, own.repetition_penalty, plain.repetition_penalty),
            presence_penalty=_first(body.presence_penalty, None, plain.presence_penalty),
            frequency_penalty=_first(body.frequency_penalty, None, plain.frequency_penalty),
            logit_bias=self._logit_bias(body),
            seed=seed,
            choice=choice,
            logprobs=logprobs,
        )

    def _stop(self, body: SamplingBody, max_tokens: int) -> Stop:
        limits, strings = self.limits, tuple(body.stop or ())
        if len(strings) > limits.stop_strings:
            raise InvalidRequest(f"`stop` may hold at most {limits.stop_strings} strings.", param="stop")
        if any(not 0 < len(text) <= limits.stop_characters for text in strings):
            raise InvalidRequest(f"Each `stop` string must have 1 to {limits.stop_characters} characters.", param="stop")
        self.check_ids(body.stop_token_ids or [], "stop_token_ids")
        minimum = body.min_tokens or 0
        if minimum > max_tokens:
            raise InvalidRequest("`min_tokens` is more than the tokens that may be generated.", param="min_tokens")
        return Stop(
            max_tokens=max_tokens,
            min_tokens=minimum,
            strings=strings,
            token_ids=tuple(body.stop_token_ids or ()),
            end_ids=self.served.manifest.spec.end_ids,
            ignore_eos=bool(body.ignore_eos),
        )

    def _logit_bias(self, body: SamplingBody) -> tuple[tuple[int, float], ...]:
        bias = body.logit_bias or {}
        if len(bias) > self.limits.logit_bias_entries:
            raise InvalidRequest(f"`logit_bias` may have at most {self.limits.logit_bias_entries} entries.", param="logit_bias")
        entries: dict[int, float] = {}
        for key, value in bias.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise InvalidRequest("The keys of `logit_bias` must be token ids.", param="logit_bias")
            if not -LOGIT_BIAS <= value <= LOGIT_BIAS:
                raise InvalidRequest("The values of `logit_bias` must lie between -100 and 100.", param="logit_bias")
            entries[int(key)] = value
        self.check_ids(list(entries), "logit_bias")
        return tuple(sorted(entries.items()))

    def check_ids(self, ids: list[int], param: str) -> None:
        """Token ids must exist in the version's vocabulary."""
        vocabulary = self.served.manifest.spec.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
            raise InvalidRequest(f"`{param}`: token ids of this model lie between 0 and {vocabulary - 1}.", param=param)

    def _budget(self, prompt: list[int], asked: int | None, default: int) -> int:
        context = context_of(self.served)
        room = context - len(prompt)
        if room < (1 if asked is None else asked):
            wanted = "" if asked is None else f" and {asked} tokens to generate"
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens{wanted}; this model's context is {context} tokens.",
                param="messages" if self.call.route.endswith("chat/completions") else "prompt",
            )
        return min(default, room) if asked is None else asked

    def _checked_logprobs(self, asked: int | None, param: str) -> int | None:
        if asked is not None and asked > self.limits.top_logprobs:
            raise InvalidRequest(f"`{param}` may be at most {self.limits.top_logprobs}.", param=param)
        return asked


def _first(asked: Number | None, own: Number | None, plain: Number) -> Number:
    if asked is not None:
        return asked
    return own if own is not None else plain

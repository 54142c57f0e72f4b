"""The model as every door sees it: from a prompt and what its caller says to token ids and sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.sampling_params import MAX_INT32, SamplingParams, checked_integer

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.tokenizer import Tokenizer

LOGPROBS = ("logprobs", "prompt_logprobs")
NOTHING: Mapping[str, Any] = MappingProxyType({})
MAX_TEXT_TOKENS = 128 * 1024
"""What is tokenized or detokenized for its own sake, or max_model_len where that is more."""


class UnknownModelError(RequestError):
    """A request names another model than the one that is served."""


class TokenLimit(NamedTuple):
    """Most tokens of a text, and what errors call that limit."""

    num_tokens: int
    name: str


@dataclass(frozen=True)
class ServedModel:
    """One model's tokenizer, limits and sampling defaults. Its methods may be called from any thread."""

    names: Sequence[str]
    """What requests may call it; responses call it by the first."""
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    sampling_defaults: Mapping[str, Any]
    """The model's own, for fields that a request leaves open."""

    @classmethod
    def of(cls, engine: Engine, names: Sequence[str] = ()) -> Self:
        """An engine's model; without ``names`` it has the one of the configuration."""
        return cls(
            names=names or (engine.config.model,),
            tokenizer=engine.tokenizer,
            max_model_len=engine.max_model_len,
            vocab_size=engine.model_config.vocab_size,
            sampling_defaults=engine.sampling_defaults,
        )

    @property
    def prompt_limit(self) -> TokenLimit:
        """Of a prompt to continue."""
        return TokenLimit(self.max_model_len, "max_model_len")

    @property
    def text_limit(self) -> TokenLimit:
        """Of a text that is only tokenized, or token ids that are only detokenized."""
        return max(self.prompt_limit, TokenLimit(MAX_TEXT_TOKENS, "the limit of"))

    def check_name(self, name: str) -> None:
        """Raise UnknownModelError if a request means another model."""
        if name not in self.names:
            raise UnknownModelError(f"model must be {any_of(self.names)}, which is served here, got {name!r:.80}")

    def token_ids(
        self, prompt: ParsedPrompt, limit: TokenLimit | None = None, sampling: Mapping[str, Any] = NOTHING
    ) -> list[int]:
        """The prompt as token ids, through tokenizer and chat template where needed. Raises RequestError.

        A text over ``limit`` is refused, where its length alone tells, before it is tokenized. Without one it is the
        engine that refuses a prompt that is too long, as it does everything that tokens can be wrong in.
        ``sampling``: the fields of SamplingParams that the request gives; truncate_prompt_tokens is heeded.
        """
        asked = sampling.get("truncate_prompt_tokens")
        if asked is None:
            return self._all_token_ids(prompt, limit)
        num_tokens = checked_integer("truncate_prompt_tokens", asked, -1, MAX_INT32)
        if num_tokens == -1:
            num_tokens = max(1, self.max_model_len - (sampling.get("max_tokens") or 1))
        return self._all_token_ids(prompt, limit and self.text_limit)[-num_tokens:]

    def _all_token_ids(self, prompt: ParsedPrompt, limit: TokenLimit | None) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        encode = self.tokenizer.encode
        if limit is not None:
            encode = partial(encode, max_tokens=limit.num_tokens, limit_name=limit.name)
            if isinstance(prompt.messages, list) and len(prompt.messages) > limit.num_tokens:
                raise RequestError(f"messages of {len(prompt.messages)} items exceeds {limit.name} {limit.num_tokens}")
        prompt = self.rendered(prompt)
        assert prompt.text is not None
        return encode(prompt.text, add_special_tokens=prompt.add_special_tokens)

    def rendered(self, prompt: ParsedPrompt) -> ParsedPrompt:
        """The prompt as token ids or a text that the tokenizer takes. Raises RequestError."""
        if prompt.token_ids is None and prompt.text is None:
            text = self.tokenizer.apply_chat_template(prompt.messages, **prompt.template_options)
            prompt = ParsedPrompt(text, add_special_tokens=False)
        if prompt.token_ids is None and prompt.text is not None:
            self.tokenizer.check(prompt.text)
        return prompt

    def tokenized(self, rendered: Sequence[ParsedPrompt]) -> list[ParsedPrompt]:
        """These prompts with token ids, many at once, which takes all cores; each has been ``rendered``."""
        prompts = list(rendered)
        for special in (True, False):
            which = [i for i, one in enumerate(prompts) if one.token_ids is None and one.add_special_tokens is special]
            texts = [prompts[i].text or "" for i in which]
            for i, token_ids in zip(which, self.tokenizer.encode_all(texts, special), strict=True):
                prompts[i] = prompts[i]._replace(token_ids=token_ids)
        return prompts

    def text(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises RequestError."""
        # A model's vocabulary may be padded beyond its tokenizer's: such ids are sampled, and have no text.
        limit = max(self.tokenizer.vocab_size, self.vocab_size)
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < limit):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < limit)
            raise RequestError(f"token_ids must be in [0, {limit - 1}], got {wrong}")
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def sampling_params(
        self, given: Mapping[str, Any], num_prompt_tokens: int, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """The fields ``given`` by a request; the others have the model's defaults, then the door's ``defaults``, then
        those of SamplingParams. Raises RequestError.

        A max_tokens that is not given is cut to what max_model_len leaves after the prompt, and logprobs of -1 become
        the vocabulary's.
        """
        defaults = {**(defaults or {}), **self.sampling_defaults}
        given = {**given, **{name: self.vocab_size for name in LOGPROBS if given.get(name) == -1}}
        return SamplingParams.with_defaults(given, defaults, self.max_model_len - num_prompt_tokens)


def any_of(values: Sequence[Any]) -> str:
    """These values as errors list them."""
    return " or ".join(map(repr, values))

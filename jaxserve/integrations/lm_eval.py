"""lm-evaluation-harness on jaxserve's engine: importing this registers the model ``jaxserve`` there.

The engine batches by its token budget; the harness's batch sizes are not used. The choices of a question follow one
another, so all but the first find its blocks in the prefix cache and compute their own tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxserve.llm import LLM
from jaxserve.prompts import TokensPrompt
from jaxserve.request import RequestOutput
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

PAGE_ROUNDS = 16
"""Requests of a page, for each that can run at once. The answers of a page are kept in the harness's cache before the
next begins: a run that is killed loses one page, and the end of a page leaves little of the engine idle."""


Scored = tuple[list[int], SamplingParams]
"""A prompt of token ids that ends with a continuation to score."""
Likelihood = tuple[float, bool]
"""Log-likelihood of a continuation, and whether it is the greedy one."""


@register_model("jaxserve")
class JaxserveLM(TemplateLM):
    """``pretrained`` is the engine's model, ``config`` the rest of EngineConfig. ``max_gen_toks``: output tokens where
    a task names no limit. Raises ConfigError and ModelError.

    ``batch_size``, ``max_batch_size`` and ``device`` are what the harness gives to every model.
    """

    def __init__(
        self,
        pretrained: str = "smollm2-135m",
        *,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **config: Any,
    ) -> None:
        super().__init__()
        # The harness asks for no other tokens' log-probabilities: nobody has to look for the likeliest.
        self.llm = LLM(pretrained, **{"max_logprobs": 0, **config})
        self.max_gen_toks = max_gen_toks
        self._tokenizer, self._config = self.llm.engine.tokenizer, self.llm.engine.config

    @property
    def max_length(self) -> int:
        """In tokens, of a prompt and what follows it."""
        return self.llm.engine.max_model_len

    @property
    def eot_token_id(self) -> int:
        return self.llm.engine.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        bos_token_id = self._tokenizer.bos_token_id
        return self.eot_token_id if bos_token_id is None else bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return (self._config.tokenizer or self._config.model).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own, for the harness's records."""
        template = self._tokenizer.chat_template
        return template.source if chat_template and template is not None else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises RequestError, also for a model without a template."""
        return self._tokenizer.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Where it is left open, with the tokenizer's special tokens unless a chat template has written them."""
        if add_special_tokens is None:
            bos = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(bos)
        return self._tokenizer.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Likelihood]:
        scored = [_scored(context, continuation, self.max_length) for _, context, continuation in requests]

        def keep(index: int, answer: Likelihood) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)

        return self._answers(scored, _likelihood, keep, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that overlap by a token where a text is longer than ``max_length``."""
        totals = []
        for page in batched(requests, self._page_size):
            windows = [list(self._windows(text)) for (text,) in (request.args for request in page)]
            scored = [window for windows_of_text in windows for window in windows_of_text]
            answers = iter(self._answers(scored, _likelihood, lambda *_: None, disable_tqdm))
            for request, windows_of_text in zip(page, windows, strict=True):
                totals.append(sum(next(answers)[0] for _ in windows_of_text))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedily unless the task samples; the text ends before the first of its stop sequences."""

        def keep(index: int, text: str) -> None:
            self.cache_hook.add_partial("generate_until", requests[index].args, text)

        asked = [self._generation(*request.args) for request in requests]
        return self._answers(asked, lambda output: output.outputs[0].text, keep, disable_tqdm)

    @property
    def _page_size(self) -> int:
        return PAGE_ROUNDS * self._config.max_num_seqs

    def _answers[Answer](
        self,
        asked: Sequence[tuple[list[int], SamplingParams]],
        answer: Callable[[RequestOutput], Answer],
        keep: Callable[[int, Answer], None],
        disable_tqdm: bool,
    ) -> list[Answer]:
        """Serve prompts of token ids page by page; ``keep`` gets the answers of each with their indices."""
        answers: list[Answer] = []
        for page in batched(asked, self._page_size):
            prompts = [TokensPrompt(prompt_token_ids=token_ids) for token_ids, _ in page]
            outputs = self.llm.generate(prompts, [params for _, params in page], use_tqdm=not disable_tqdm)
            for output in outputs:
                answers.append(answer(output))
                keep(len(answers) - 1, answers[-1])
        return answers

    def _generation(self, context: str, options: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        """Prompt and parameters of a task's ``options``. What is not the harness's is SamplingParams'."""
        given: dict[str, Any] = {"temperature": 0.0, **normalize_gen_kwargs(options, self.max_gen_toks)}
        wanted, until, _ = given.pop("max_gen_toks"), given.pop("until"), given.pop("do_sample")
        token_ids, max_tokens = maybe_truncate(
            self.tok_encode(context), max_gen_toks=wanted, max_model_len=self.max_length
        )
        # A special token has no text to be found in the output.
        special_ids = {token_id for stop in until if (token_id := self._tokenizer.token_id(stop)) is not None}
        given["stop_token_ids"] = special_ids & self._tokenizer.special_token_ids
        given["stop"] = [stop for stop in until if stop]
        return token_ids, SamplingParams(**given, max_tokens=max_tokens)

    def _windows(self, text: str) -> Iterator[Scored]:
        windows: Iterable[tuple[list[int], list[int]]] = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - 1,
            context_len=1,
        )
        for window in windows:
            context, continuation = make_disjoint_window(window)
            yield _scored(context, continuation, self.max_length)


def _scored(context: list[int], continuation: list[int], max_length: int) -> Scored:
    """A continuation to score, whose context loses its first tokens where both are too long."""
    token_ids = (context + continuation)[-max_length:]
    first = max(1, len(token_ids) - len(continuation))
    return token_ids, SamplingParams(max_tokens=0, prompt_logprobs=0, logprob_start_len=first)


def _likelihood(output: RequestOutput) -> Likelihood:
    """Of the tokens that were scored."""
    entries = [next(iter(position.values())) for position in output.prompt_logprobs or () if position]
    return sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)

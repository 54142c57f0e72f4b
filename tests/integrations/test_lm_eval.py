"""The harness's model against transformers' logits. The harness itself, which these tests' environment has not, is a
stub here; tests/clients/eval_client.py runs the real one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from jaxserve import ConfigError, RequestError
from tests.models.golden import Golden

GOLDEN = Golden("llama_gqa_tied")
TOKENS = GOLDEN.prompt + GOLDEN.greedy
LOGPROBS = log_softmax(GOLDEN.logits.astype(np.float64), axis=-1)
MODULE = "jaxserve.integrations.lm_eval"


class TemplateLM:
    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *answer: self.kept.append(answer))


def truncated(tokens: list[int], max_gen_toks: int, max_model_len: int) -> tuple[list[int], int]:
    return tokens[-(max_model_len - max_gen_toks) :], max_gen_toks


STUB = {
    "lm_eval": {},
    "lm_eval.api": {},
    "lm_eval.api.model": {"TemplateLM": TemplateLM},
    "lm_eval.api.registry": {"register_model": lambda name: lambda model: model},
    "lm_eval.models": {},
    "lm_eval.models.utils": {
        "maybe_truncate": truncated,
        "normalize_gen_kwargs": lambda o, limit: {"max_gen_toks": limit, "until": [], "do_sample": False} | o,
    },
    "lm_eval.utils": {
        "get_rolling_token_windows": lambda token_list, prefix_token, **_: [([prefix_token], token_list)],
        "make_disjoint_window": lambda window: window,
    },
}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        for name, members in STUB.items():
            patch.setitem(sys.modules, name, ModuleType(name))
            vars(sys.modules[name]).update(members)
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def lm(module: ModuleType, tokenizer: Path) -> Iterator[Any]:
    lm = module.JaxserveLM(
        str(GOLDEN.checkpoint), tokenizer=str(tokenizer), max_model_len=GOLDEN.length, token_budget=16,
        max_num_seqs=4, num_blocks=40, block_size=8, batch_size=8, device="cpu", max_gen_toks=len(GOLDEN.greedy),
    )  # fmt: skip
    yield lm
    lm.llm.close()


@pytest.fixture(autouse=True)
def forgotten(lm: Any) -> None:
    lm.kept.clear()


def text(tokens: list[int]) -> str:
    return " ".join(f"<{token}>" for token in tokens)


def loglikelihood(start: int, continuation: list[int]) -> float:
    """By transformers, of a continuation of the first ``start`` tokens that begins as its own does."""
    assert continuation[:-1] == TOKENS[start : start + len(continuation) - 1]
    return sum(LOGPROBS[start + i - 1, token] for i, token in enumerate(continuation))


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_loglikelihoods_are_those_of_transformers(lm: Any) -> None:
    context, others = GOLDEN.prompt, (GOLDEN.greedy[0] + 1) % 96
    choices = [GOLDEN.greedy, GOLDEN.greedy[:3], [others]]
    requests = [(("context", str(choice)), context, choice) for choice in choices]
    answers = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for (logprob, is_greedy), choice in zip(answers, choices, strict=True):
        assert logprob == pytest.approx(loglikelihood(len(context), choice), abs=1e-4)
        assert is_greedy == (choice != [others])
    assert lm.kept == [("loglikelihood", key, answer) for (key, *_), answer in zip(requests, answers, strict=True)]


def test_choices_share_what_has_been_computed_of_their_context(lm: Any) -> None:
    hits = lm.llm.engine.metrics.registry.get_sample_value
    before = hits("jaxserve_prefix_cache_hits_total") or 0
    context = TOKENS[:20]
    lm._loglikelihood_tokens([(("", ""), context, [token]) for token in range(3, 9)], disable_tqdm=True)
    assert hits("jaxserve_prefix_cache_hits_total") - before >= 5 * 16


def test_a_context_that_is_too_long_loses_its_beginning(lm: Any) -> None:
    whole = lm._loglikelihood_tokens([(("", ""), TOKENS[:-2], TOKENS[-2:])], disable_tqdm=True)
    longer = lm._loglikelihood_tokens([(("", ""), [5] * 9 + TOKENS[:-2], TOKENS[-2:])], disable_tqdm=True)
    assert longer == whole
    ((logprob, _),) = lm._loglikelihood_tokens([(("", ""), [5], TOKENS)], disable_tqdm=True)
    assert logprob == pytest.approx(loglikelihood(1, TOKENS[1:]), abs=1e-4)


def test_a_whole_text_follows_the_prefix_token(lm: Any) -> None:
    assert lm.prefix_token_id == lm.eot_token_id
    tokens = TOKENS[:12]
    expected = lm._loglikelihood_tokens([(("", ""), [lm.eot_token_id], tokens)], disable_tqdm=True)[0][0]
    requests = [request(text(tokens)), request(text(tokens))]
    lm.kept.clear()
    assert lm.loglikelihood_rolling(requests, disable_tqdm=True) == [expected, expected]
    assert lm.kept == [("loglikelihood_rolling", one.args, expected) for one in requests]


def test_generation_is_that_of_transformers_up_to_a_stop(lm: Any) -> None:
    stop = f"<{GOLDEN.greedy[4]}>"
    before = GOLDEN.greedy[: GOLDEN.greedy.index(GOLDEN.greedy[4])]
    requests = [
        request(text(GOLDEN.prompt), {"until": [stop, ""], "max_gen_toks": 8}),
        request(text(GOLDEN.prompt), {}),
    ]
    until_stop, whole = lm.generate_until(requests, disable_tqdm=True)
    assert until_stop.split() == text(before).split()
    assert whole.split() == text(GOLDEN.greedy).split()
    assert [key for _, key, _ in lm.kept] == [one.args for one in requests]


def test_pages_are_kept_before_the_next_begins(lm: Any, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted evaluation has answered need not be asked again."""
    monkeypatch.setattr(module, "PAGE_ROUNDS", 1)
    requests = [((f"context {i}", "choice"), TOKENS[: 5 + i], [7]) for i in range(10)]
    generate, calls = lm.llm.generate, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(lm.llm, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [key for _, key, _ in lm.kept] == [key for key, *_ in requests[:8]]


def test_what_it_is_called(lm: Any, tokenizer: Path) -> None:
    assert (lm.max_length, lm.tokenizer_name) == (GOLDEN.length, str(tokenizer).replace("/", "__"))
    assert lm.chat_template(True) is None


def test_mistakes(lm: Any, module: ModuleType) -> None:
    with pytest.raises(RequestError, match="the model has no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "hi"}])
    with pytest.raises(ConfigError, match="token_budget"):
        module.JaxserveLM(str(GOLDEN.checkpoint), token_budget=0)
    with pytest.raises(RequestError, match="temperature must be in"):
        lm.generate_until([request(text([5]), {"temperature": -1.0, "do_sample": True})])

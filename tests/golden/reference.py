"""What make_tiny.py and make_gguf.py share: random models, greedy continuations, and the arrays kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

Config = dict[str, Any]

NEW_TOKENS = 16
FEWEST_DISTINCT_TOKENS = 4
SMALLEST_EFFECT = 2e-3  # on some logit, of a setting that a case is there to exercise: tests allow 1e-3
SMALLEST_MARGIN = 1e-3  # between the best two logits of a greedy step, and the last expert chosen and the next


def best_gap(logits: torch.Tensor) -> list[float]:
    """Distance from the best to the second-best logit of each row: logits [n, vocab] -> n numbers."""
    best = logits.float().topk(2, dim=-1).values
    return [round(gap, 6) for gap in (best[:, 0] - best[:, 1]).tolist()]


@dataclass(frozen=True)
class Continuation:
    """A prompt with its greedy continuation, [1, P + 16], and the logits of all of it, [P + 16, vocab]."""

    sequence: torch.Tensor
    prompt_length: int
    logits: torch.Tensor
    router_margin: float

    @property
    def gaps(self) -> list[float]:
        """The logit gap at each greedy step."""
        return best_gap(self.logits[self.prompt_length - 1 : -1])

    @property
    def is_telling(self) -> bool:
        """Not one token over and over, and no choice so close that another implementation may choose otherwise."""
        distinct = self.sequence[0, self.prompt_length :].unique().numel()
        return distinct >= FEWEST_DISTINCT_TOKENS and min(*self.gaps, self.router_margin) > SMALLEST_MARGIN

    def save(self, path: Path) -> None:
        """Write the arrays of README.md."""
        np.savez_compressed(
            path,
            input_ids=self.sequence[0, : self.prompt_length].numpy().astype(np.int32),
            greedy_ids=self.sequence[0, self.prompt_length :].numpy().astype(np.int32),
            greedy_gaps=np.asarray(self.gaps, np.float32),
            logits=self.logits.numpy(),
        )

    def __str__(self) -> str:
        text = f"largest logit {self.logits.abs().max():.1f}, smallest gap {min(self.gaps):.4f}"
        return text if self.router_margin == float("inf") else f"{text}, router margin {self.router_margin:.4f}"


def build(config: Config) -> Any:
    """The model of a config.json, in float32."""
    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager").eval()


def randomise(model: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Give every parameter random values of `dtype`, biases too: norm weights around one, Gemma's around zero.

    Gemma's also vary more, as its embeddings are scaled up: otherwise each token would just predict itself. Those of
    Gemma 4 are around zero too, but not stored less one.
    """
    gemma = model.config.model_type.startswith("gemma")
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("router.scale"):  # Gemma 4 takes this out again
            noise *= len(noise) ** 0.5 / 0.3
        if parameter.ndim == 1 and name.endswith(".weight"):
            parameter.data.copy_((noise if gemma else 1 + 0.3 * noise).to(dtype))
        else:
            parameter.data.copy_((0.3 * noise).to(dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("layer_scalar"):
            buffer.copy_((1 + 0.3 * torch.randn(buffer.shape, generator=generator)).to(dtype))


def router_scores(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What a router chooses by, [n, experts]."""
    if hasattr(router, "proj"):  # Gemma 4's
        return router.proj(router.norm(hidden) * router.scale * router.scalar_root_size)
    logits = torch.nn.functional.linear(hidden, router.weight, getattr(router, "bias", None))
    bias = getattr(router, "e_score_correction_bias", None)
    return logits if bias is None else logits.sigmoid() + bias


def continue_greedily(model: Any, generator: torch.Generator, prompt_length: int) -> Continuation:
    """Continue a random prompt by 16 tokens, then evaluate prompt and continuation in one forward pass."""
    sequence = torch.randint(0, model.config.vocab_size, (1, prompt_length), generator=generator)
    length = prompt_length + NEW_TOKENS
    # Dynamic NTK takes its frequencies from the longest sequence seen so far; seeing the final length first makes them
    # the same for every step. The other kinds keep no such memory.
    model(torch.zeros(1, length, dtype=torch.long))
    while sequence.shape[1] < length:
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(dim=-1)], dim=1)
    margins = [float("inf")]

    def note_margin(router: Any, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
        top_k = router.top_k if hasattr(router, "top_k") else router.config.top_k_experts
        best = router_scores(router, inputs[0].flatten(0, -2)).topk(top_k + 1, dim=-1).values
        margins.append((best[:, -2] - best[:, -1]).min().item())

    hooks = [m.register_forward_hook(note_margin) for m in model.modules() if type(m).__name__.endswith("Router")]
    logits = model(sequence).logits[0]
    for hook in hooks:
        hook.remove()
    made = Continuation(sequence, prompt_length, logits, min(margins))
    steps = logits[prompt_length - 1 : -1]
    assert torch.equal(steps.argmax(dim=-1), sequence[0, prompt_length:]), "the continuation is not greedy"
    assert logits.abs().max() > 1, "logits this flat would prove little"
    return made


def smallest_effect(model: Any, config: Config, matters: tuple[Config, ...], made: Continuation) -> float:
    """How much the most harmless change of the configuration changes the logit that it changes most."""
    effects = [float("inf")]
    for change in matters:
        other = build(config | change)
        other.load_state_dict(model.state_dict())
        effects.append((other(made.sequence).logits[0] - made.logits).abs().max().item())
    return min(effects)


def make_model(
    config: Config,
    dtype: torch.dtype,
    prompt_length: int,
    first_seed: int,
    matters: tuple[Config, ...],
    store: Callable[[Any], None] = lambda _model: None,
) -> tuple[Any, Continuation]:
    """A random model whose continuation is telling and whose logits change with every change in `matters`.

    `store` may round the weights to what its file will hold.
    """
    for seed in range(first_seed, first_seed + 5000, 100):
        model = build(config)
        generator = torch.Generator().manual_seed(seed)
        randomise(model, generator, dtype)
        store(model)
        made = continue_greedily(model, generator, prompt_length)
        effect = smallest_effect(model, config, matters, made)
        if made.is_telling and effect > SMALLEST_EFFECT:
            print(f"seed {seed}, smallest effect {effect:.3f}")
            return model, made
    raise AssertionError(f"no seed will do; with the last: {made}, smallest effect {effect}")

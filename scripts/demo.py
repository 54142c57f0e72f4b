"""make demo: start the server, stream concurrent generations through a real gRPC channel, and shut it down cleanly.

A long prompt arrives while the others decode; stall-free batching keeps their time between tokens (TBT) short.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from jaxserve.server.client import ChatMessages, Client, StreamTiming
from jaxserve.server.process import ServerProcessError, running_server

SERVER = Path(__file__).with_name("serve.py")
SERVER_FLAGS = [
    "--port", "0", "--http-port", "0", "--max-model-len", "2048", "--token-budget", "128", "--max-num-seqs", "16",
]  # fmt: skip
LONG_PROMPT_AFTER_SECONDS = 2.0
LONG_PROMPT = "The river rose in spring, and the people of the valley moved their herds to the hills. " * 60


class DemoError(RuntimeError):
    pass


@dataclass
class Generation:
    """One request of the demo and what came back."""

    name: str
    prompt: str | ChatMessages
    max_tokens: int
    delay_seconds: float = 0.0
    text: str = ""
    timing: StreamTiming = field(default_factory=StreamTiming)
    num_prompt_tokens: int = 0


def chat(question: str) -> ChatMessages:
    return [{"role": "user", "content": question}]


def generations() -> list[Generation]:
    return [
        Generation("chat, short", chat("What is the capital of France?"), 32),
        Generation("chat, list", chat("Name three uses of a paperclip."), 96),
        Generation("chat, story", chat("Tell me a story about a lighthouse."), 128),
        Generation("raw, fact", "The three states of matter are", 64),
        Generation("raw, story", "Once upon a time, in a village by the sea,", 128),
        Generation("raw, long", LONG_PROMPT + "In autumn", 32, delay_seconds=LONG_PROMPT_AFTER_SECONDS),
    ]


def run(client: Client, generation: Generation) -> None:
    time.sleep(generation.delay_seconds)
    generation.timing = StreamTiming()
    for response in client.generate(generation.prompt, max_tokens=generation.max_tokens, temperature=0.0):
        generation.timing.record(response)
        generation.text += response.text
        generation.num_prompt_tokens = response.usage.prompt_tokens
    if generation.timing.ttft_seconds is None:
        raise DemoError(f"{generation.name!r} produced no tokens")


def milliseconds(generation: Generation) -> list[str]:
    """TTFT, and TBT p50, p99 and max."""
    timing, tbt_seconds = generation.timing, generation.timing.tbt_seconds
    numbers = [timing.ttft_seconds, None, None, None]
    if len(tbt_seconds) > 1:
        p99 = statistics.quantiles(tbt_seconds, n=100, method="inclusive")[98]
        numbers[1:] = statistics.median(tbt_seconds), p99, max(tbt_seconds)
    return ["-" if seconds is None else f"{seconds * 1e3:.0f}" for seconds in numbers]


def show(generation: Generation) -> None:
    prompt = generation.prompt if isinstance(generation.prompt, str) else generation.prompt[-1]["content"]
    if len(prompt) > 100:
        prompt = f"{prompt[:45]} ... {prompt[-45:]}"
    ttft, p50, p99, worst = milliseconds(generation)
    print(f"\n--- {generation.name}\nprompt: {prompt}\ntext:   {generation.text.strip()}")
    print(f"TTFT {ttft} ms   TBT p50 {p50} ms, p99 {p99} ms, max {worst} ms")


def show_table(done: list[Generation]) -> None:
    print(f"\n{'request':14}{'prompt':>8}{'output':>8}{'TTFT ms':>9}{'TBT p50':>9}{'p99':>8}{'max':>8}")
    for generation in done:
        ttft, p50, p99, worst = milliseconds(generation)
        lengths = f"{generation.num_prompt_tokens:8}{len(generation.timing.token_seconds):8}"
        print(f"{generation.name:14}{lengths}{ttft:>9}{p50:>9}{p99:>8}{worst:>8}")


def main() -> int:
    try:
        with running_server([sys.executable, str(SERVER), *SERVER_FLAGS]) as address:
            with Client(address) as client:
                client.wait_ready(timeout_seconds=10)
                work = generations()
                print(
                    f"\nStreaming {len(work)} generations; the long prompt comes {LONG_PROMPT_AFTER_SECONDS} s later."
                )
                with ThreadPoolExecutor(len(work)) as pool:
                    for _ in pool.map(lambda generation: run(client, generation), work):
                        pass
            for generation in work:
                show(generation)
            show_table(work)
        print("\nThe server has shut down cleanly.")
    except grpc.RpcError as error:
        print(f"demo.py: error: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except (DemoError, ServerProcessError, TimeoutError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

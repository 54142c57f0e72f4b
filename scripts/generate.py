"""Stream one generation from a running server: python scripts/generate.py "The capital of France is" """

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import grpc

from jaxserve.errors import RequestError
from jaxserve.server.client import DEFAULT_TARGET, ChatMessages, Client, StreamTiming


def stream(client: Client, prompt: str | ChatMessages, **sampling: Any) -> StreamTiming:
    """Print the text as it comes."""
    timing = StreamTiming()
    for response in client.generate(prompt, **sampling):
        timing.record(response)
        print(response.text, end="", flush=True)
    print()
    return timing


def report(timing: StreamTiming) -> str:
    if timing.ttft_seconds is None:
        return "no tokens"
    text = f"TTFT {timing.ttft_seconds * 1e3:.0f} ms"
    tbt_seconds = timing.tbt_seconds
    if tbt_seconds:
        text += f"   TBT p50 {statistics.median(tbt_seconds) * 1e3:.0f} ms, max {max(tbt_seconds) * 1e3:.0f} ms"
    return f"{text}   {len(timing.token_seconds)} tokens"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Stream one generation from a running server.")
    parser.add_argument("prompt")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's message of a chat")
    parser.add_argument("--max-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="makes a sampled output repeatable")
    parser.add_argument("--target", default=DEFAULT_TARGET, help="host:port of the server (default: %(default)s)")
    parser.add_argument("--ca-file", help="authority (PEM) of a server with TLS")
    args = parser.parse_args(argv)
    prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
    with Client(args.target, ca_file=args.ca_file) as client:
        try:
            timing = stream(
                client, prompt, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed
            )  # fmt: skip
        except RequestError as error:
            print(f"generate.py: error: {error}", file=sys.stderr)
            return 1
        except grpc.RpcError as error:
            where = f" at {args.target}" if error.code() == grpc.StatusCode.UNAVAILABLE else ""
            print(f"generate.py: error: {error.code().name}{where}: {error.details()}", file=sys.stderr)
            return 1
    print(report(timing), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

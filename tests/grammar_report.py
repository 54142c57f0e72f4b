"""By hand: which schemas of a file, a JSON list of them, outputs can follow, what that costs, and whether they do.

    python -m tests.grammar_report SCHEMAS.json

The package schemastore has some hundred from the world.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import Counter
from typing import Any

import jsonschema
import numpy as np

from jaxserve.errors import RequestError
from jaxserve.grammars import Grammar, Grammars
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer import Tokenizer

MAX_TOKENS = 400
EOS = 2


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, mask_seconds: list[float]) -> str | None:
    """An output of random tokens; None where it does not end in time."""
    matcher, chance, ids = grammar.matcher(), random.Random(seed), list[int]()
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    closing = [EOS, *(tokenizer.encode(text)[0] for text in '"}]')]
    while len(ids) < MAX_TOKENS:
        start = time.perf_counter()
        matcher.fill(mask)
        mask_seconds.append(time.perf_counter() - start)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        preferred = [token_id for token_id in closing if token_id in allowed]
        token_id = preferred[0] if preferred and chance.random() < 0.6 else chance.choice(allowed)
        matcher.accept(token_id)
        if token_id == EOS:
            return tokenizer.decode(ids)
        ids.append(token_id)
    return None


def report(schemas: list[dict[str, Any]]) -> None:
    tokenizer = open_checkpoint("smollm2-135m").tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [EOS])
    grammars.compile(StructuredOutputsParams(json={}))
    compile_seconds, refusal_seconds, mask_seconds = list[float](), list[float](), list[float]()
    reasons, outcomes = Counter[str](), Counter[str]()
    for number, schema in enumerate(schemas):
        start = time.perf_counter()
        try:
            grammar = grammars.compile(StructuredOutputsParams(json=schema))
        except RequestError as error:
            refusal_seconds.append(time.perf_counter() - start)
            reasons[re.sub(r"at #\S*|got '.*': ", "", str(error), flags=re.DOTALL)[:100]] += 1
            continue
        compile_seconds.append(time.perf_counter() - start)
        try:
            output = walk(grammar, tokenizer, number, mask_seconds)
        except RequestError as error:
            outcomes[str(error)[:100]] += 1
            continue
        if output is None:
            outcomes["not at its end in time"] += 1
            continue
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        error = next(validator(schema).iter_errors(json.loads(output)), None)
        outcomes["follows its schema" if error is None else "DOES NOT FOLLOW"] += 1
        if error is not None:
            print(f"schema {number}: {output[:200]!r}: {error.message[:300]}")
    print(f"{len(schemas)} schemas, {len(compile_seconds)} compiled")
    for name, found in (("compile", compile_seconds), ("refuse", refusal_seconds), ("mask", mask_seconds)):
        p50, p99 = np.percentile(found, (50, 99)) * 1e3
        print(f"{name}: P50 {p50:.2f} ms, P99 {p99:.1f} ms, most {max(found) * 1e3:.1f} ms")
    for counts in (outcomes, reasons):
        print(*(f"{number:5} {reason}" for reason, number in counts.most_common(25)), sep="\n")


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        report(json.load(file))

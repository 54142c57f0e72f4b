"""Write any model as a sharded Orbax checkpoint that restores straight onto a mesh."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from jaxserve.errors import ModelError
from jaxserve.models.loading import orbax
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.registry import family_of
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters


def convert(source: str, destination: Path, dtype: str, tensor: int) -> None:
    """Write ``source`` to ``destination``, loaded over ``tensor`` devices. Raises ModelError."""
    checkpoint = open_checkpoint(source)
    config, family = checkpoint.config, family_of(checkpoint.config.architecture)
    sampling_defaults, tokenizer = checkpoint.sampling_defaults, checkpoint.tokenizer()
    eos_token_ids = checkpoint.eos_token_ids(tokenizer)
    _, state = abstract_model(family.model, config, max_len=config.max_position_embeddings, dtype=jnp.dtype(dtype))
    abstract, weights = abstract_parameters(state, make_mesh(tensor)), family.weights(config)
    checkpoint.check(abstract, weights)
    parameters = checkpoint.load(abstract, weights)
    orbax.save(
        destination,
        parameters,
        config,
        eos_token_ids=eos_token_ids,
        sampling_defaults=sampling_defaults,
        kv_scales=checkpoint.kv_scales,
        tokenizer=tokenizer,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="smollm2-135m, a local folder or .gguf file, or a Hugging Face hub id")
    parser.add_argument("destination", type=Path, help="new folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tensor", type=int, default=1, help="devices to spread the parameters over while converting")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.destination, args.dtype, args.tensor)
    except ModelError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

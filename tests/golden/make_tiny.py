"""Write tiny/<case>/, the random models of a few KB that the tests compare the engine with; see README.md.

Run it in an environment of its own, with torch and transformers:

    python tests/golden/make_tiny.py                       # everything
    python tests/golden/make_tiny.py --only falcon_7b gpt2_hub
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from gemma4_cases import GEMMA4_CASES
from hybrid_cases import HYBRID_CASES
from latent_cases import LATENT_CASES
from recent_cases import RECENT_CASES
from reference import make_model
from safetensors.torch import load_file, save_file
from tiny_cases import TINY_CASES, TinyCase
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

CASES = TINY_CASES | RECENT_CASES | HYBRID_CASES | LATENT_CASES | GEMMA4_CASES


def save(model: Any, case: TinyCase, folder: Path) -> None:
    """Write config.json and model.safetensors in the case's layout, and under the hub's tensor names."""
    model.to(case.dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    if case.layout == "hub":
        dtype = str(case.dtype).removeprefix("torch.")
        config = case.config | {"architectures": [case.architecture], "torch_dtype": dtype}
    elif case.layout == "transformers 4":
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if case.layout != "transformers 5":
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if case.to_hub:
        tensors = case.to_hub(load_file(folder / "model.safetensors"), config)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check_reload(folder: Path, case: TinyCase, sequence: torch.Tensor, logits: torch.Tensor) -> None:
    """Load the folder as anybody would; for architectures unknown to transformers, only if the names are Llama's."""
    if case.computed_as and case.to_hub:
        return
    config = CONFIG_MAPPING[case.computed_as["model_type"]].from_dict(case.computed_as) if case.computed_as else None
    again, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(again).__name__ == case.architecture or case.computed_as, type(again)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    assert not wrong, f"{folder.name}: {wrong}"
    assert torch.allclose(again(sequence).logits[0], logits, atol=1e-5), f"{folder.name}: the saved folder differs"


def make(folder: Path, case: TinyCase, first_seed: int) -> None:
    """Write config.json, model.safetensors and expected.npz."""
    config = case.computed_as or case.config
    model, made = make_model(config, case.dtype, case.prompt_length, first_seed, case.matters)
    save(model, case, folder)
    check_reload(folder, case, made.sequence, made.logits)
    made.save(folder / "expected.npz")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {size / 1000:.0f} KB, {made}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    args = parser.parse_args()
    with torch.inference_mode():
        for first_seed, (name, case) in enumerate(CASES.items()):
            if name in args.only:
                make(args.out / name, case, first_seed)


if __name__ == "__main__":
    main()

"""Write docs/settings.md, all flags and YAML settings of scripts/serve.py: make settings"""

from __future__ import annotations

from pathlib import Path

from jaxserve.cli import settings_page
from jaxserve.config import EngineConfig
from jaxserve.hosts.group import HostsConfig
from jaxserve.server.config import ServerConfig

PATH = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = """# Settings

Every setting of `scripts/serve.py` is a flag, and a line of the YAML file that `--config FILE` names; the command line
wins. Those from model to parallelism are arguments of `LLM` as well. An empty default is none, or what the last column
says. Secrets are in the variables `JAXSERVE_API_KEYS` and `JAXSERVE_GROUP_SECRET`; `JAXSERVE_CACHE` is the folder of
weights and compiled programs; `JAXSERVE_CPU_ISA` is what native CPU kernels are compiled for, generic, avx2, avx512,
avx512_vnni, avx512_bf16 or amx, otherwise the fastest that the processor has. `make settings` writes this page from
`jaxserve/config.py` and `jaxserve/hosts/group.py`.
"""


def page() -> str:
    return f"{INTRODUCTION}\n{settings_page(EngineConfig, ServerConfig, HostsConfig)}"


if __name__ == "__main__":
    PATH.write_text(page())

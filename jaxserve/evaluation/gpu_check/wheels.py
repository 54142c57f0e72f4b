"""Which of the project's requirements a machine lacks, and how to carry them to one without a network."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CUDA_EXTRAS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}
"""By the plugin of jax that is installed; cuda13 without one."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
FOLDER, SITE = ".whl", "site"
"""Of the wheels, and of what is unpacked from them: no installation is changed."""


def installed_packages() -> dict[str, str]:
    """Versions by name, of this machine."""
    return {canonicalize_name(found.metadata["Name"]): found.version for found in metadata.distributions()}


def read_packages(path: Path) -> dict[str, str]:
    """Versions by name, of what pip freeze has printed: name==version, one a line."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    parts = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): version for name, _, version in parts}


def missing_wheels(root: Path, installed: Mapping[str, str]) -> dict[str, str]:
    """What the checkout at ``root`` requires on GPUs and ``installed`` has not, or not in such a version: versions by
    name, as constraints.txt pins them."""
    pins = read_packages(root / "constraints.txt")
    return {
        name: pins[name]
        for name, requirement in sorted(_requirements(root, installed), key=lambda found: found[0])
        if name not in installed or not requirement.specifier.contains(installed[name], prereleases=True)
    }


def _requirements(root: Path, installed: Mapping[str, str]) -> Iterator[tuple[str, Requirement]]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = next((extra for plugin, extra in CUDA_EXTRAS.items() if plugin in installed), "cuda13")
    for text in (*project["dependencies"], *project["optional-dependencies"][extra]):
        requirement = Requirement(text)
        yield canonicalize_name(requirement.name), requirement


def carry_commands(wheels: Mapping[str, str], python_version: str) -> list[str]:
    """To be run where there is a network, and then on the machine."""
    platforms = " ".join(f"--platform {platform}" for platform in PLATFORMS)
    names = " ".join(f"{name}=={version}" for name, version in wheels.items())
    return [
        f"python3 -m pip download --no-deps --only-binary=:all: --python-version {python_version} --implementation cp "
        f"{platforms} -d {FOLDER} {names}",
        "python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade "
        f"--target {SITE} {FOLDER}/*.whl",
    ]


def describe_wheels(wheels: Mapping[str, str], python_version: str) -> str:
    """For a terminal."""
    if not wheels:
        return "This machine lacks no package."
    lacking = ", ".join(f"{name} {version}" for name, version in wheels.items())
    download, install = carry_commands(wheels, python_version)
    return (
        f"This machine lacks {lacking}. Where there is a network:\n  {download}\nand here:\n  {install}\n"
        f"with {SITE} first in PYTHONPATH."
    )

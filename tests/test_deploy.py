"""The files in docs/deploy, as far as they can be checked without a cluster."""

from __future__ import annotations

import argparse
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.hosts.group import Group, HostsConfig
from jaxserve.server.listener import SERVICE_NAME

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
KUBERNETES_VERSION = "1.33"
FIELDS = {
    "spec": {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"},
    "template": {
        "leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy", "volumeClaimTemplates",
        "persistentVolumeClaimRetentionPolicy", "resizePolicy",
    },
}  # fmt: skip
"""Of LeaderWorkerSet's v1 CRD."""


def parse(flags: list[str], environment: dict[str, str]) -> tuple[EngineConfig, ServerConfig, Group | None]:
    """As scripts/serve.py does."""
    engine, server, hosts, _ = parse_config(argparse.ArgumentParser(), flags, EngineConfig, ServerConfig, HostsConfig)
    return engine, server, Group.find(hosts, environment)


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "leaderworkerset.yaml").read_text()))


def test_manifests_follow_the_schemas(manifests: list[dict[str, Any]]) -> None:
    workers, service = manifests
    assert (workers["apiVersion"], workers["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = workers["spec"]["leaderWorkerTemplate"]
    assert workers["spec"].keys() <= FIELDS["spec"]
    assert template.keys() <= FIELDS["template"]
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    kubernetes_validate.validate(service, KUBERNETES_VERSION, strict=True)
    for role in ("leaderTemplate", "workerTemplate"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role}, "spec": template[role]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_pods_serve_one_model_together(manifests: list[dict[str, Any]]) -> None:
    workers, service = manifests
    template = workers["spec"]["leaderWorkerTemplate"]
    groups = []
    for rank, role in enumerate(("leaderTemplate", "workerTemplate")):
        pod = template[role]["spec"]
        (container,) = pod["containers"]
        assert (ROOT / container["command"][1]).exists()
        environment = {
            "LWS_LEADER_ADDRESS": "jaxserve-0.jaxserve.default", "LWS_GROUP_SIZE": str(template["size"]),
            "LWS_WORKER_INDEX": str(rank),
        }  # fmt: skip
        engine, server, group = parse(container["args"], environment)
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert engine.tensor_parallel * engine.pipeline_parallel == gpus * template["size"]
        assert pod["terminationGracePeriodSeconds"] > server.drain_seconds
        groups.append(group)
        if rank == 0:
            assert container["livenessProbe"]["grpc"] == {"port": server.port}
            assert container["readinessProbe"]["grpc"] == {"port": server.port, "service": SERVICE_NAME}
            assert service["spec"]["ports"][0]["port"] == server.port
    assert groups == [Group("jaxserve-0.jaxserve.default", 2, rank, 8476) for rank in (0, 1)]


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_the_slurm_script_starts_the_group_until_it_ends_well(tmp_path: Path) -> None:
    """A stand-in for srun writes its arguments down and fails, as after the loss of a host, but the last time."""
    calls = tmp_path / "calls"
    fake(tmp_path, "scontrol", 'test "$*" = "show hostnames gpu[1-2]" && printf "gpu1\\ngpu2\\n"')
    fake(tmp_path, "srun", f'echo "$*" >> {calls}; test $(wc -l < {calls}) -ge 3')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    command = ["bash", str(DEPLOY / "slurm.sh"), "--seed", "7"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done
    assert done.stdout.count("starting it again") == 2
    option, python, script, *flags = calls.read_text().splitlines()[-1].split()
    assert (option, python) == ("--kill-on-bad-exit=1", ".venv/bin/python")
    assert (ROOT / script).exists()
    for rank in (0, 1):
        engine, _, group = parse(flags, {"SLURM_PROCID": str(rank)})
        assert group == Group("gpu1", 2, rank, 8476)
        assert engine.seed == 7
        assert engine.tensor_parallel * engine.pipeline_parallel == 8


def test_the_slurm_script_does_not_repeat_what_cannot_work(tmp_path: Path) -> None:
    fake(tmp_path, "scontrol", "echo gpu1")
    fake(tmp_path, "srun", "exit 2")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu1"}
    done = subprocess.run(["bash", str(DEPLOY / "slurm.sh")], env=environment, capture_output=True, timeout=20)
    assert done.returncode == 2

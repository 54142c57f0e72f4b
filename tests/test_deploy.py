"""The files in docs/deploy, as far as they can be checked without a cluster."""

from __future__ import annotations

import argparse
import configparser
import fnmatch
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig
from jaxserve.hosts.group import Group, HostsConfig
from jaxserve.hosts.ranks import WRONG
from jaxserve.hosts.trust import VARIABLE
from jaxserve.server.config import ServerConfig
from jaxserve.server.http.door import OPEN_PATHS
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


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, of both stages."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


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
        assert VARIABLE in {variable["name"] for variable in container["env"]}
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


def test_every_task_of_the_slurm_array_has_a_share_of_the_lines_and_results_of_its_own(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    fake(tmp_path, "srun", f'echo "$*" >> {calls}')
    command = ["bash", str(DEPLOY / "slurm_array.sh"), "requests.jsonl", str(tmp_path / "results"), "--seed", "7"]
    array = {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"}
    for task in ("4", "5", "6"):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": task} | array
        subprocess.run(command, env=environment, check=True, timeout=20)
    folder = tmp_path / "results"
    assert folder.is_dir()
    for shard, call in enumerate(calls.read_text().splitlines()):
        python, script, *arguments = call.split()
        assert (python, (ROOT / script).exists()) == (".venv/bin/python", True)
        assert arguments[:2] == ["requests.jsonl", str(folder / f"{shard}.jsonl")]
        assert arguments[2:] == ["--shard", f"{shard}/3", "--seed", "7"]


# ---- one host


def test_the_image_has_what_a_server_needs(instructions: list[tuple[str, str]]) -> None:
    """And nothing else of the folder that it is built in."""
    copied = {source for name, rest in instructions if name == "COPY" for source in rest.split()[:-1]}
    sources = {source for source in copied if source[0] not in "-/"}
    assert all((ROOT / source).exists() for source in sources)
    links = {str(path.resolve().relative_to(ROOT)) for path in (ROOT / "jaxserve").iterdir() if path.is_symlink()}
    assert sources >= {"jaxserve", "pyproject.toml", *links}
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == sources
    assert any(fnmatch.fnmatch("jaxserve/__pycache__", line) for line in ignored)


def test_the_image_serves_and_is_watched_where_it_listens(instructions: list[tuple[str, str]]) -> None:
    last = dict(instructions)
    python, script, *flags = json.loads(last["ENTRYPOINT"])
    assert python == "python"
    assert (ROOT / script).exists()
    _, server, _ = parse(flags, {})
    _, changed, _ = parse([*flags, "--http-port", "9"], {})
    assert changed.http_port == 9, "flags behind the image's win"
    assert last["EXPOSE"].split() == [str(server.port), str(server.http_port)]
    assert f"http://127.0.0.1:{server.http_port}/health" in last["HEALTHCHECK"]
    assert (last["USER"], last["STOPSIGNAL"]) == ("10001", "SIGTERM")
    assert last["ARG"] == "EXTRA="
    extras = set(re.findall(r"^(cuda\d+) =", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert extras == {"cuda12", "cuda13"}, "which the Dockerfile names"


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "jaxserve.service")
    return parser


def test_the_unit_starts_again_what_failed_and_no_wrong_configuration(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", str(WRONG))
    assert int(service["TimeoutStopSec"]) > ServerConfig().drain_seconds
    python, script, *flags = service["ExecStart"].split()
    assert python == f"{service['WorkingDirectory']}/.venv/bin/python"
    assert (ROOT / script).exists()
    assert flags == ["--config", "/etc/jaxserve/serve.yaml"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """With a program and a user that are there."""
    text = (DEPLOY / "jaxserve.service").read_text()
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
    (tmp_path / "jaxserve.service").write_text(text.replace("User=jaxserve", "User=root"))
    command = ["systemd-analyze", "verify", str(tmp_path / "jaxserve.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_pods_that_serve_alone() -> None:
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    deployment, claim, service, budget = manifests
    spec = deployment["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (ROOT / container["command"][1]).exists()
    # Its key file is checked when it is read.
    engine, server, group = parse(container["args"], {})
    assert group is None
    assert engine.tensor_parallel == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert server.max_waiting_per_key is not None
    assert server.max_waiting_per_key < server.max_waiting
    pause_seconds = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > server.drain_seconds + pause_seconds
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": server.port, "http": server.http_port, "metrics": server.metrics_port}
    assert [port["port"] for port in service["spec"]["ports"]] == [server.port, server.http_port]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/ready", "liveness": "/health", "readiness": "/ready"}
    assert set(paths.values()) <= set(OPEN_PATHS), "probes have no key"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert server.api_key_file is not None
    assert server.api_key_file.startswith("/keys/")
    assert pod["securityContext"]["runAsUser"] == 10001, "the image's"
    for selector in (
        spec["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
    ):
        assert selector == spec["template"]["metadata"]["labels"]
    assert budget["spec"]["minAvailable"] < spec["replicas"]

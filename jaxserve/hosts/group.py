"""Several hosts as one mesh: which processes belong together, and jax.distributed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxserve.config import Headings, check_readable, option
from jaxserve.errors import ConfigError
from jaxserve.hosts.trust import BLIND, Trust

HEARTBEAT_TIMEOUT_SECONDS = 10
"""jax ends a process when another has been silent for so long."""
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Those that gRPC knows."""


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """The processes that serve one model together, one on each host. Raises ConfigError."""

    HEADINGS: ClassVar[Headings] = {"hosts": "several hosts"}

    hosts: str | None = option(
        None, "hosts that share the model, the leader first, separated by commas; by default those of LeaderWorkerSet"
    )
    host_rank: int | None = option(None, "this one's place in hosts, from 0; by default SLURM_PROCID")
    coordinator_port: int = option(8476, "port of the leader for jax.distributed; the one above it carries the steps")

    group_secret_file: str | None = option(
        None,
        "a secret, the same on all hosts, without which no process can join or drain the group; by default that of the "
        "variable JAXSERVE_GROUP_SECRET",
    )
    group_certfile: str | None = option(
        None, "this host's certificate chain (PEM), the leader's for its name in hosts: steps travel in mutual TLS"
    )
    group_keyfile: str | None = option(None, "its private key (PEM)")
    group_ca_certs: str | None = option(None, "authorities (PEM) of the hosts' certificates")

    def __post_init__(self) -> None:
        if self.host_rank is not None and self.hosts is None:
            raise ConfigError(f"host_rank is a place in hosts, which must be given, got host_rank {self.host_rank}")
        if not 1 <= self.coordinator_port < 65535:
            raise ConfigError(f"coordinator_port must be in [1, 65534], got {self.coordinator_port}")
        check_readable(self, "group_secret_file", "group_certfile", "group_keyfile", "group_ca_certs")
        files = (self.group_certfile, self.group_keyfile, self.group_ca_certs)
        if any(files) and not all(files):
            raise ConfigError(f"group_certfile, group_keyfile and group_ca_certs must be given together, got {files}")


@dataclass(frozen=True)
class Group:
    """One process's place among those that run every step together."""

    leader: str
    """Host name or address of rank 0."""
    size: int
    rank: int
    port: int
    trust: Trust = BLIND

    @classmethod
    def find(cls, config: HostsConfig, environment: Mapping[str, str]) -> Group | None:
        """From flags, or from what LeaderWorkerSet or SLURM set; None for a host alone. Raises ConfigError."""
        if config.hosts is None:
            if "LWS_LEADER_ADDRESS" not in environment:
                return None
            leader, size, rank = environment["LWS_LEADER_ADDRESS"], "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"
            place = leader, _number(environment, size), _number(environment, rank)
        else:
            hosts = config.hosts.split(",")
            if not all(hosts):
                raise ConfigError(f"hosts must be names separated by commas, got {config.hosts!r}")
            given = config.host_rank
            if given is None and "SLURM_PROCID" in environment:
                given = _number(environment, "SLURM_PROCID")
            if given is None:
                raise ConfigError("host_rank must be given with hosts outside of SLURM, got none")
            place = hosts[0], len(hosts), given
        group = cls(*place, config.coordinator_port, Trust.find(config, environment))
        if not 0 <= group.rank < group.size:
            raise ConfigError(f"host_rank must be in [0, {group.size - 1}], got {group.rank}")
        return group if group.size > 1 else None

    @property
    def step_address(self) -> str:
        """Where the leader's steps come from."""
        host = f"[{self.leader}]" if ":" in self.leader else self.leader
        return f"{host}:{self.port + 1}"

    def join(self) -> None:
        """Wait for the others; afterwards ``jax.devices()`` are those of all. Call it before anything else of jax.

        From now on the process is aborted, without an exception, some ten seconds after another has died.
        """
        import jax

        if any(name in os.environ for name in PROXY_VARIABLES):
            # jax's channel to the leader would go by it; this one is gRPC's own.
            os.environ.update(no_grpc_proxy=self.leader)
        # It would swallow SIGTERM, which is ours.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            self.step_address.rpartition(":")[0] + f":{self.port}",
            num_processes=self.size,
            process_id=self.rank,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise ConfigError(f"{name} must be a number in the environment of a group of hosts, got {value!r}")
    return int(value)

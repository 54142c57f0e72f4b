"""How the processes of a group know each other, and keep their steps from others: a secret, certificates, or both."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from jaxserve.errors import ConfigError
from jaxserve.server.listener import server_credentials

if TYPE_CHECKING:
    from jaxserve.hosts.group import HostsConfig

VARIABLE = "JAXSERVE_GROUP_SECRET"
HEADER = "group-secret-bin"


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files. Every host shows its certificate, and trusts those of its authorities."""

    chain: str
    key: str
    authorities: str


@dataclass(frozen=True)
class Trust:
    """What a process shows to the others, and asks of them; without anything, nothing. ``digest``: of the secret."""

    digest: bytes | None = field(default=None, repr=False)
    certificates: Certificates | None = None

    @classmethod
    def find(cls, config: HostsConfig, environment: Mapping[str, str]) -> Trust:
        """From flags and the variable JAXSERVE_GROUP_SECRET. Raises ConfigError."""
        secret = environment.get(VARIABLE, "").encode() or None
        if config.group_secret_file is not None:
            secret = Path(config.group_secret_file).read_bytes().strip()
            if not secret:
                raise ConfigError(f"group_secret_file must hold a secret, got none in {config.group_secret_file!r}")
        certificates = None
        if config.group_certfile is not None:
            assert config.group_keyfile is not None
            assert config.group_ca_certs is not None
            certificates = Certificates(config.group_certfile, config.group_keyfile, config.group_ca_certs)
        return cls(None if secret is None else sha256(secret).digest(), certificates)

    @property
    def is_blind(self) -> bool:
        return self.digest is None and self.certificates is None

    @property
    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Of every call to the leader."""
        return () if self.digest is None else ((HEADER, self.digest),)

    def admits(self, metadata: Iterable[tuple[str, Any]]) -> bool:
        """Whether a call comes from a process of the group. How long it takes tells nothing of the secret."""
        return self.digest is None or hmac.compare_digest(dict(metadata).get(HEADER, b""), self.digest)

    def add_port(self, server: grpc.Server, address: str) -> int:
        """Let a server listen there, and give its port. Raises ConfigError for what is in the files."""
        if self.certificates is None:
            return server.add_insecure_port(address)
        files = self.certificates
        credentials = server_credentials(files.chain, files.key, files.authorities, settings="group")
        return server.add_secure_port(address, credentials)

    def channel(self, address: str, options: Sequence[tuple[str, int]]) -> grpc.Channel:
        """To the leader, whose certificate must be for the host in its address."""
        if self.certificates is None:
            return grpc.insecure_channel(address, options)
        files = self.certificates
        authorities, key, chain = (Path(path).read_bytes() for path in (files.authorities, files.key, files.chain))
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities, key, chain), options)


BLIND = Trust()
"""Shows nothing and asks for nothing."""

"""Who may take part in a group's steps, and read them."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme

from jaxserve.engine.runner import Kind
from jaxserve.errors import ConfigError
from jaxserve.hosts.group import Group, HostsConfig
from jaxserve.hosts.steps import SERVICE
from jaxserve.hosts.trust import BLIND, VARIABLE, Certificates, Trust
from tests.hosts.test_steps import TIMEOUT_SECONDS, FakeRunner, Following, Leading


def secret(text: str) -> Trust:
    return Trust.find(HostsConfig(), {VARIABLE: text})


def issue(folder: Path, authority: trustme.CA, host: str = "127.0.0.1") -> Certificates:
    """A host's certificate and key, and the authority's, in files of the folder."""
    folder.mkdir()
    issued = authority.issue_cert(host)
    chain, key, authorities = (folder / name for name in ("chain.pem", "key.pem", "authorities.pem"))
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(chain)
    authority.cert_pem.write_to_path(authorities)
    return Certificates(str(chain), str(key), str(authorities))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def certificates(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return issue(tmp_path_factory.mktemp("group") / "all", authority)


@pytest.fixture
def lead() -> Iterator[Callable[[Trust], Leading]]:
    made = []

    def lead(trust: Trust) -> Leading:
        made.append(Leading(1, trust))
        return made[-1]

    yield lead
    for leading in made:
        leading.followers.stop()


def check_group_lives(leading: Leading, trust: Trust) -> None:
    """A follower of the group joins, and runs a step; nobody else's call has left a trace."""
    follower = Following(leading, 1, trust=trust)
    leading.followers.wait(FakeRunner())
    leading.followers.send(Kind.SAMPLE, 4, np.arange(3, dtype=np.int32))
    leading.followers.stop()
    follower.join(TIMEOUT_SECONDS)
    assert [call[:2] for call in follower.runner.calls] == [(Kind.SAMPLE, 4)]
    assert not leading.lost
    assert not leading.drain.is_set()


@pytest.mark.parametrize("other", [BLIND, secret("wrong")], ids=["missing", "wrong"])
def test_who_does_not_know_the_secret_is_refused(
    lead: Callable[[Trust], Leading], other: Trust, caplog: pytest.LogCaptureFixture
) -> None:
    leading = lead(secret("ours"))
    stranger = Following(leading, 1, trust=other)
    stranger.join(TIMEOUT_SECONDS)
    assert str(stranger.error) == "the group's secret must be the same on all hosts"
    with grpc.insecure_channel(leading.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/Drain")(b"", metadata=other.metadata, timeout=TIMEOUT_SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert caplog.text.count("without the group's secret is refused") == 2
    assert "can read this group's steps" not in caplog.text
    check_group_lives(leading, secret("ours"))


def test_a_drain_with_the_secret(lead: Callable[[Trust], Leading]) -> None:
    leading = lead(secret("ours"))
    follower = Following(leading, 1, trust=secret("ours"))
    leading.followers.wait(FakeRunner())
    follower.follower.drain()
    assert leading.drain.wait(TIMEOUT_SECONDS)


def test_without_a_secret_there_is_a_warning(
    lead: Callable[[Trust], Leading], caplog: pytest.LogCaptureFixture
) -> None:
    leading = lead(BLIND)
    check_group_lives(leading, BLIND)
    assert caplog.text.count("whoever reaches 127.0.0.1:0 can read this group's steps, join and end it") == 1


def test_steps_travel_encrypted(
    lead: Callable[[Trust], Leading], certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    trust = dataclasses.replace(secret("ours"), certificates=certificates)
    check_group_lives(lead(trust), trust)
    assert not caplog.text
    check_group_lives(lead(Trust(None, certificates)), Trust(None, certificates))
    assert not caplog.text, "certificates without a secret tell who may join, too"


def test_certificates_of_others_are_refused(
    lead: Callable[[Trust], Leading], certificates: Certificates, authority: trustme.CA, tmp_path: Path
) -> None:
    trust = Trust(None, certificates)
    leading = lead(trust)
    foreign = issue(tmp_path / "foreign", trustme.CA())
    strangers = [
        BLIND,
        Trust(None, foreign),
        Trust(None, dataclasses.replace(foreign, authorities=certificates.authorities)),
    ]
    for other in strangers:
        stranger = Following(leading, 1, trust=other)
        assert stranger.lost.wait(TIMEOUT_SECONDS)
        assert stranger.message.startswith("the leader of the group is gone: ")
    elsewhere = lead(Trust(None, issue(tmp_path / "elsewhere", authority, "elsewhere.example")))
    misled = Following(elsewhere, 1, trust=trust)
    assert misled.lost.wait(TIMEOUT_SECONDS), "a certificate for another host is not the leader's"
    check_group_lives(leading, trust)


def test_files_that_are_no_certificates(lead: Callable[[Trust], Leading], certificates: Certificates) -> None:
    with pytest.raises(ConfigError, match="group_certfile and group_keyfile must be a certificate and its key"):
        lead(Trust(None, dataclasses.replace(certificates, chain=__file__)))


def test_a_group_finds_its_trust(certificates: Certificates, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("ours\n")
    config = HostsConfig(
        hosts="a,b", host_rank=1, group_secret_file=str(file), group_certfile=certificates.chain,
        group_keyfile=certificates.key, group_ca_certs=certificates.authorities,
    )  # fmt: skip
    group = Group.find(config, {VARIABLE: "another"})
    assert group is not None
    assert group.trust == Trust(secret("ours").digest, certificates)
    assert pickle.loads(pickle.dumps(group)) == group, "it goes to the leader's process"
    assert str(group.trust.digest) not in repr(group)

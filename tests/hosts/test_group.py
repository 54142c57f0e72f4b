"""Which processes belong together, and what they refuse."""

from __future__ import annotations

import os
import re

import pytest

from jaxserve.errors import ConfigError
from jaxserve.hosts.group import Group, HostsConfig

LWS = {"LWS_LEADER_ADDRESS": "serve-0.serve.default", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}


@pytest.mark.parametrize(
    ("settings", "environment", "group"),
    [
        ({}, {}, None),
        ({}, {"SLURM_PROCID": "3"}, None),
        ({"hosts": "a"}, {"SLURM_PROCID": "0"}, None),
        ({"hosts": "a,b", "host_rank": 1}, {}, Group("a", 2, 1, 8476)),
        ({"hosts": "a,b,c", "coordinator_port": 7000}, {"SLURM_PROCID": "2"}, Group("a", 3, 2, 7000)),
        ({"hosts": "a,b", "host_rank": 0}, {"SLURM_PROCID": "1"}, Group("a", 2, 0, 8476)),
        ({}, LWS, Group("serve-0.serve.default", 2, 1, 8476)),
        ({"hosts": "a,b", "host_rank": 0}, LWS, Group("a", 2, 0, 8476)),
        ({}, LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}, None),
    ],
)
def test_groups_are_found_in_flags_and_environments(settings, environment, group):
    assert Group.find(HostsConfig(**settings), environment) == group


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"host_rank": 1}, {}, "host_rank is a place in hosts, which must be given, got host_rank 1"),
        ({"hosts": "a,b"}, {}, "host_rank must be given with hosts outside of SLURM, got none"),
        ({"hosts": "a,,b", "host_rank": 0}, {}, "hosts must be names separated by commas, got 'a,,b'"),
        ({"hosts": "a,b", "host_rank": 2}, {}, "host_rank must be in [0, 1], got 2"),
        ({"hosts": "a,b"}, {"SLURM_PROCID": "4"}, "host_rank must be in [0, 1], got 4"),
        ({"coordinator_port": 65535}, {}, "coordinator_port must be in [1, 65534], got 65535"),
        ({"group_secret_file": "/no"}, {}, "group_secret_file must be a file that can be read, got '/no'"),
        (
            {"hosts": "a,b", "host_rank": 0, "group_secret_file": os.devnull},
            {},
            "group_secret_file must hold a secret, got none in '/dev/null'",
        ),
        (
            {"group_certfile": __file__, "group_keyfile": __file__},
            {},
            "group_certfile, group_keyfile and group_ca_certs must be given together, got ",
        ),
        (
            {},
            LWS | {"LWS_WORKER_INDEX": "x"},
            "LWS_WORKER_INDEX must be a number in the environment of a group of hosts",
        ),
    ],
)
def test_wrong_groups_are_clear_errors(settings, environment, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        Group.find(HostsConfig(**settings), environment)


def test_steps_come_from_the_port_above_the_coordinators():
    assert Group("host", 2, 1, 8476).step_address == "host:8477"
    assert Group("fd00::1", 2, 1, 8476).step_address == "[fd00::1]:8477"

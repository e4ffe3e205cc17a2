"""What a server tells other processes, and servers that hold the memory of hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cli.local_server import local_server, servers_on
from kimi_mlx.cli.open_model import OpenedModel
from kimi_mlx.client.local_servers import announce
from kimi_mlx.cluster.hosts.host import Cluster, Host, Hostfile
from kimi_mlx.model.config import load_config
from kimi_mlx.session.model_status import ModelDeployment
from kimi_mlx.store.model_ref import resolve_model_name
from tests.fakes import KIMI_MINI, FixedSession


def test_servers_on_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    cluster = Cluster(Hostfile((Host("mac-a"), Host("mac-b"))), "ring", {})
    deployment = ModelDeployment("kimi-mini", "pipeline", cluster, load_config(KIMI_MINI))
    opened = OpenedModel(FixedSession([]), KIMI_MINI, deployment)
    server = local_server(resolve_model_name("kimi-mini"), opened, "http://127.0.0.1:8080", needs_key=True)
    size = sum(file.stat().st_size for file in KIMI_MINI.glob("*.safetensors"))
    assert (server.hosts, server.source, server.needs_key) == (("mac-a", "mac-b"), str(KIMI_MINI), True)
    assert server.weights_bytes == pytest.approx(size, rel=0.1)
    with announce(server), announce(replace(server, pid=1, hosts=())):
        assert servers_on(["mac-b", "mac-c"]) == [server]
        assert servers_on(["mac-c"]) == []

"""MLX's hostfile: round trips, the examples, and the message for each mistake."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cluster.hosts.host import Backend, Host, Hostfile
from kimi_mlx.cluster.hosts.hostfile import parse_hostfile, parse_hosts, read_hostfile, to_json, write_hostfile
from kimi_mlx.errors import HostfileError

EXAMPLES = sorted((Path(__file__).parents[4] / "hostfiles").glob("*.json"))

A = {"ssh": "mac-a", "ips": ["192.168.0.1"]}
B = {"ssh": "mac-b", "ips": ["192.168.0.2"]}
C = {"ssh": "mac-c", "ips": ["192.168.0.3"]}


def mesh(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Return hosts with a cable between every two."""
    return [
        {
            "ssh": f"mac-{i}",
            "ips": [f"10.0.0.{i + 1}"],
            "rdma": [None if i == j else f"rdma_en{j}" for j in range(count)],
        }
        | changes
        for i in range(count)
    ]


@st.composite
def hostfiles(draw: st.DrawFn) -> Hostfile:
    count = draw(st.integers(1, 8))
    backend: Backend | None = draw(st.sampled_from(["ring", "jaccl", "jaccl-ring", None]))
    wires = 1 if backend == "ring" else draw(st.integers(0 if backend is None else 1, 4))
    letters = st.text("abcxyz09_.-", min_size=1, max_size=8)
    names = [f"{rank}{name}z" for rank, name in enumerate(draw(st.lists(letters, min_size=count, max_size=count)))]
    rdma = [
        tuple(tuple(f"rdma_en{j * 4 + k}" for k in range(wires)) if i != j else () for j in range(count))
        for i in range(count)
    ]
    values = draw(st.lists(st.text(st.characters(min_codepoint=32), max_size=5), max_size=3))
    return Hostfile(
        hosts=tuple(
            Host(name, (f"10.0.0.{rank + 1}",), rdma[rank] if wires else ()) for rank, name in enumerate(names)
        ),
        backend=backend,
        envs=tuple(f"_NAME{number}={value}" for number, value in enumerate(values)),
    )


@given(hostfiles())
def test_round_trip(hostfile: Hostfile) -> None:
    assert parse_hostfile(json.loads(to_json(hostfile)), "`x`") == hostfile


def test_examples_exist() -> None:
    assert [path.stem for path in EXAMPLES] == [
        "four-mesh-jaccl", "two-local", "two-m3-ultra-jaccl", "two-m3-ultra-ring", "unequal",
    ]  # fmt: skip
    readme = EXAMPLES[0].with_name("README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_in_our_format(path: Path, tmp_path: Path) -> None:
    hostfile = read_hostfile(path)
    write_hostfile(tmp_path / "copy.json", hostfile)
    assert (tmp_path / "copy.json").read_text() == path.read_text()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # MLX leaves the file open
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_mlx_reads_examples(path: Path) -> None:
    theirs = pytest.importorskip("mlx._distributed_utils.common").Hostfile.from_file(path)
    ours = read_hostfile(path)
    assert theirs.backend == ours.backend
    assert [(host.ssh_hostname, tuple(host.ips)) for host in theirs.hosts] == [(h.ssh, h.ips) for h in ours.hosts]
    assert [[[each] if each else [] for each in host.rdma] for host in theirs.hosts] == [
        [list(each) for each in host.rdma] for host in ours.hosts
    ]


def test_list_form() -> None:
    assert parse_hostfile([A, B], "`x`") == Hostfile((Host("mac-a", ("192.168.0.1",)), Host("mac-b", ("192.168.0.2",))))


def test_jaccl_needs_only_the_address_of_rank_0() -> None:
    hosts = mesh(4)
    for host in hosts[1:]:
        host["ips"] = []
    assert len(parse_hostfile(hosts, "`x`").hosts) == 4
    assert parse_hostfile({"hosts": hosts, "backend": "jaccl", "envs": []}, "`x`").backend == "jaccl"


def test_backend_may_be_an_empty_string_as_mlx_writes_it() -> None:
    assert parse_hostfile({"hosts": [A], "backend": ""}, "`x`").backend is None


BAD: list[tuple[object, str]] = [
    (3, "must be an object, not a number"),
    ("mac-a", "must be an object, not a string"),
    ({}, "lacks `hosts`"),
    ({"hosts": {}}, "must be a list, not an object"),
    ({"hosts": [A, B], "backends": "ring", "x": 1}, "unknown key `backends`, `x`"),
    ({"hosts": [A, B], "backend": "mpi"}, "the unknown backend 'mpi'"),
    ({"hosts": [A, B], "backend": ["ring"]}, r"the unknown backend \['ring'\]"),
    ([], "has 0 hosts"),
    ([{"ssh": f"m{i}", "ips": [f"10.0.0.{i + 1}"]} for i in range(65)], "has 65 hosts, but must have 1 to 64"),
    ([A, "mac-b"], "host 1 must be an object, not a string"),
    ([A, {"ips": ["1.2.3.4"]}], "host 1 lacks `ssh`"),
    ([A, {**B, "ip": "1.2.3.4"}], "host 1 has the unknown key `ip`"),
    ([A, {**B, "ssh": None}], "`ssh` must be a string, not None"),
    ([A, {**B, "ips": "1.2.3.4"}], "host 1: `ips` must be a list, not a string"),
    ([A, {**B, "ips": [1]}], "contains 1, which is not a string"),
    ([A, {**B, "ips": ["mac-b"]}], "has the invalid address 'mac-b'"),
    ([A, {**B, "ips": ["192.168.0.2:32323"]}], "has the invalid address"),
    ([A, {**B, "ips": ["192.168.0.2/24"]}], "has the invalid address"),
    ([A, {**B, "ips": ["fe80::1"]}], "IPv6 address fe80::1, but MLX"),
    ([A, {**B, "ips": ["0.0.0.0"]}], "cannot belong to a host"),
    ([A, {**B, "ips": ["224.0.0.1"]}], "cannot belong to a host"),
    ([A, {**B, "ips": []}], r"host 1 \(`mac-b`\) has no address"),
    ([{"ssh": "mac-a"}, {"ssh": "mac-b"}], "host 0 .* has no address"),
    ([A, {**B, "ips": ["192.168.0.2", "10.0.0.2"]}], "has 2 addresses but host 0 has 1"),
    ([A, {**B, "ssh": "MAC-A"}], "has `MAC-A` twice"),
    ([A, {**B, "ips": ["192.168.0.1"]}], "address 192.168.0.1 twice"),
    ([A, {**B, "ips": ["127.0.0.1"]}], "mixes the loopback address 127.0.0.1 with 192.168.0.1"),
    ([{**A, "ips": ["127.0.0.1"]}, {**B, "ips": ["127.0.0.1"]}], "only loopback addresses for 2 hosts"),
    ({"hosts": [A, B], "backend": "jaccl"}, "sets the backend jaccl but has no `rdma`"),
    ({"hosts": mesh(3, ips=[]), "backend": "jaccl"}, "host 0 .* has no address"),
    ({"hosts": mesh(9), "backend": "jaccl"}, "for 9 hosts; a mesh has at most 8"),
    ([*mesh(2), C], r"host 0 \(`mac-0`\) has 2 entries in `rdma` for 3"),
    ([mesh(2)[0], {**mesh(2)[1], "rdma": []}], "has 0 entries in `rdma` for 2"),
    ([{**mesh(2)[0], "rdma": ["rdma_en0", "rdma_en1"]}, mesh(2)[1]], "the device rdma_en0 to itself"),
    ([{**mesh(2)[0], "rdma": [None, None]}, mesh(2)[1]], "1 devices lead from host 1 .* but 0 lead back"),
    ([{**mesh(2)[0], "rdma": [None, ["rdma_en1", "rdma_en2"]]}, mesh(2)[1]], "1 devices .* but 2 lead back"),
    ([{**mesh(2)[0], "rdma": [None, "en1"]}, mesh(2)[1]], "the device 'en1'; device names look like rdma_en5"),
    ([{**mesh(2)[0], "rdma": [None, 5]}, mesh(2)[1]], "entry 1 of `rdma` must be a list, not a number"),
    ([{**mesh(3)[0], "rdma": [None, "rdma_en1", "rdma_en1"]}, *mesh(3)[1:]], "rdma_en1 twice, but a port"),
    ({"hosts": [A], "envs": ["HOME"]}, "`envs` has 'HOME', which is not NAME=value"),
    ({"hosts": [A], "envs": ["a b=c"]}, "not NAME=value"),
    ({"hosts": [A], "envs": ["A=b\nC=d"]}, "the value of `A` has a control character"),
    ({"hosts": [A], "envs": ["MLX_RANK=1"]}, "sets `MLX_RANK`"),
    ({"hosts": [A], "envs": ["A=1", "A=2"]}, "`envs` sets `A` twice"),
    ({"hosts": [A], "envs": "A=1"}, "`envs` must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "message"), BAD, ids=[message for _, message in BAD])
def test_error_message_of_mistake(value: object, message: str) -> None:
    with pytest.raises(HostfileError, match=message) as caught:
        parse_hostfile(value, "`x.json`")
    assert caught.value.message.startswith("`x.json`")


@pytest.mark.parametrize(
    "name", ["", "-oProxyCommand=touch x", "me@-x", "a b", "a\nb", "a;b", "$(x)", "a'b", 'a"b', "a\x1bb", "a\u202eb"]
)
def test_name_cannot_be_an_option_or_have_shell_characters(name: str) -> None:
    with pytest.raises(HostfileError, match="has the invalid name"):
        parse_hostfile([{"ssh": name, "ips": ["1.2.3.4"]}], "`x`")


@given(st.text())
def test_accepted_name_is_one_word_and_not_an_option(name: str) -> None:
    try:
        parse_hostfile([{"ssh": name}], "`x`")
    except HostfileError:
        return
    assert name.split() == [name]
    assert name.isprintable()
    assert not name.startswith("-")


def circle(count: int, wires: int) -> list[dict[str, Any]]:
    """Return hosts with cables to their two neighbors."""
    names = itertools.cycle([[f"rdma_en{k}" for k in range(wires)], [f"rdma_en{k + 9}" for k in range(wires)]])
    return [
        {
            "ssh": f"mac-{i}",
            "ips": [f"10.0.0.{i + 1}"],
            "rdma": [next(names) if (i - j) % count in (1, count - 1) else None for j in range(count)],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize(("count", "wires"), [(2, 1), (3, 1), (4, 1), (4, 2), (9, 4)])
def test_cables_in_a_circle_are_valid_for_jaccl_ring(count: int, wires: int) -> None:
    value = {"hosts": circle(count, wires), "backend": "jaccl-ring"}
    assert parse_hostfile(value, "`x`").backend == "jaccl-ring"


def test_circle_is_not_a_mesh_and_line_is_not_a_circle() -> None:
    with pytest.raises(HostfileError, match=r"none between host 0 .* and host 2") as caught:
        parse_hostfile({"hosts": circle(4, 1), "backend": "jaccl"}, "`x`")
    assert "jaccl-ring" in (caught.value.hint or "")
    line = circle(4, 1)
    line[0]["rdma"][3] = line[3]["rdma"][0] = None
    with pytest.raises(HostfileError, match="no or different numbers of cables"):
        parse_hostfile({"hosts": line, "backend": "jaccl-ring"}, "`x`")
    with pytest.raises(HostfileError, match="has 5 cables"):
        parse_hostfile({"hosts": circle(3, 5), "backend": "jaccl-ring"}, "`x`")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"hosts": [], "hosts": []}', "an object has a key twice"),
        (b" " * (1 << 21), "is larger than"),
    ],
)
def test_file_that_is_not_json(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_bytes(data)
    with pytest.raises(HostfileError, match=message) as caught:
        read_hostfile(path)
    assert str(path) in caught.value.message


def test_missing_file_and_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match="No such file"):
        read_hostfile(tmp_path / "none.json")
    with pytest.raises(HostfileError, match="directory"):
        read_hostfile(tmp_path)
    with pytest.raises(HostfileError, match="cannot be written"):
        write_hostfile(tmp_path / "no" / "x.json", Hostfile((Host("a"),)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["127.0.0.1", "10.0.0.1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["hosts", "ssh", "ips", "rdma", "backend", "envs", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_a_hostfile_or_a_hostfile_error(value: object) -> None:
    try:
        hostfile = parse_hostfile(value, "`x`")
    except HostfileError:
        return
    assert parse_hostfile(json.loads(to_json(hostfile)), "`x`") == hostfile


def test_hosts_option_is_parsed() -> None:
    assert parse_hosts("mac-a, me@mac-b,10.0.0.3") == (
        Host("mac-a"), Host("me@mac-b"), Host("10.0.0.3", ("10.0.0.3",)),
    )  # fmt: skip
    for text in ("", "a,,b", "a,-b"):
        with pytest.raises(HostfileError, match=r"`--hosts`: host .* has the invalid name"):
            parse_hosts(text)
    with pytest.raises(HostfileError, match="`--hosts` has `a` twice"):
        parse_hosts("a,b,a")

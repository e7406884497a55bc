"""The tests of tun6. `python test_tun6.py` checks format, lint and types and runs all; `pytest test_tun6.py -k WORDS` some.

The first half needs no root. The second runs the real tun6 in the namespaces of tun6.Lab, through a NAT:

    internet ---------- server ---------- nat ---------- client ---------- lan
    2001:db8:ffff::2    10.9.0.1          masquerades    10.8.0.2
                                          +------------- second, 10.8.1.2

There each test proves at its end that addresses, routes, firewalls and sysctls of all six hosts are as they were, that no process, device,
namespace or thread is left, that every tun6 exits with 0 when told to, and that none of them logged a traceback. It takes
root; without it those tests are skipped, and with CI=true in the environment a skipped test is a failed one.

The file, top to bottom. Each section of tun6.py has one here; each helper stands in the section that uses it, or in the kit:

    kit: packet builders         packets, frames and messages by hand
    kit: fakes and stores        what stands in for files and connections
    kit: hosts                   the Lab, and what a test must leave as it was
    kit: programs                Program and Tunnel: the real tun6 on these hosts
    kit: peers spoken by hand    Peer, TlsPeer: the wire without tun6
    wire                         without root, from here on
    prefixes
    send queue                   with a simulated link
    queue in the path            with a simulated bottleneck
    network plans
    storage                      with a crash at every system call
    cluster rules                a simulated cluster, whose steps come in any order
    kernel
    connections
    session
    hooks
    neighbour proxy
    service manager
    server
    firewall
    lan
    client
    administration
    metrics                      also the dashboard's queries
    installation
    demo
    command line
    cluster store                on a stub of its database
    sources and documents        maps, order of definitions, links
    packages                     what is in sdist and wheel, man page, completion
    benchmark                    contrib/bench_tun6.py: options, tables, the emulated link
    end to end: lifecycle        with root, from here on: how sessions begin and end, takeovers, outages
    end to end: several servers  a client with a list, drain
    end to end: hooks
    end to end: neighbour proxy  and a tunnel of Hurricane Electric's to the server
    end to end: legacy peers
    end to end: offload
    end to end: ingress filter
    end to end: firewall
    end to end: TLS and keys
    end to end: one pool         of several servers
    end to end: administration
    end to end: LAN              router advertisements, forwarding, other routers
    end to end: metrics
    end to end: faults           of disks, files, links, names, devices, `ip`
    end to end: doctor           machines that are broken in one way each
    end to end: scale            many clients, and limits
    fuzzing                      `test_tun6.py fuzz`
    soak                         `test_tun6.py soak`
    observers                    `test_tun6.py observers`: a real Prometheus and a real browser
    systemd                      `test_tun6.py systemd`
    debian                       `test_tun6.py packages`: the .deb, and what the Dockerfile does
    cluster                      `test_tun6.py cluster`: three servers, BIRD, PostgreSQL, and faults
    cluster on machines          `test_tun6.py machines`: docs/cluster.md to the letter, on machines that boot
    real store                   `test_tun6.py store`: the cluster's store and a real PostgreSQL
    main
"""

from __future__ import annotations

import argparse
import ast
import base64
import calendar
import configparser
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import heapq
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import tracemalloc
import uuid
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from html.parser import HTMLParser
from ipaddress import IPv6Address, IPv6Network
from itertools import accumulate, chain, count, groupby, takewhile
from pathlib import Path
from typing import Any, Callable, ClassVar, NamedTuple, Optional, Protocol, TypeVar, Union, cast
from unittest import mock
from urllib.parse import quote

import gevent
import gevent.event
import gevent.lock
import gevent.pool
import gevent.socket
import pytest
import pytun
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import tun6
from tun6 import Lab, wait_until

sys.path.insert(0, str(Path(__file__).resolve().parent / "contrib"))
# isort: split
import bench_tun6

settings.register_profile("tun6", deadline=None)
settings.load_profile("tun6")

FEW_EXAMPLES = settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a failing example takes seconds: no shrinking
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

T = TypeVar("T")

# ---- kit: packet builders --------------------------------------------------------------------------------------------

BOTH = frozenset({"tso6", "uso6"})  # all GSO kinds
TCP, UDP, HOP_BY_HOP, NOTHING = 6, 17, 0, 59  # next header
POOL = IPv6Network("2001:db8:1::/56")


def subnet(number: int) -> IPv6Network:
    """The /64 of this number in POOL."""
    return IPv6Network(((int(POOL.network_address) >> 64) + number << 64, 64))


def packet(payload: bytes = b"", next_header: int = NOTHING) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(payload), next_header, 64) + bytes(15) + b"\1" + bytes(15) + b"\2" + payload


def packet_length(data: bytes) -> int:
    """Of the IPv6 packet that begins here."""
    return 40 + int.from_bytes(data[4:6], "big")


def first_frame(stream: bytes, header: int) -> bytes:
    """The frame that the stream begins with, whose offload header has so many bytes; b"" when it is not there as a whole."""
    end = header + packet_length(stream[header:])
    return stream[:end] if len(stream) >= end else b""


def offload(flags: int = 1, gso_type: int = 0, hdr_len: int = 0, gso_size: int = 0, csum_start: int = 40, csum_offset: int = 16) -> bytes:
    """A virtio_net_hdr; as it is, one that leaves a TCP checksum open."""
    return struct.pack("<BBHHHH", flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)


def random_offload(rng: random.Random, length: int) -> tuple[int, int, int, int, int, int]:
    """The fields of a virtio_net_hdr that is often nearly right for a packet of this length."""

    def number() -> int:
        near = rng.choice((0, 1, 16, 40, 60, 500, 1440, length // 128, length - 60, length, rng.randrange(65_536)))
        return min(max(near + rng.choice((-2, -1, 0, 0, 0, 1, 2)), 0), 65_535)

    flags = rng.choice((0, 1, 1, 1, 1, 1, 1, rng.randrange(256)))
    gso_type = rng.choice((0, 4, 4, 4, 5, 5, 0x84, 0x85, 1, 3, rng.randrange(256)))
    return flags, gso_type, rng.choice((0, 40, number())), number(), rng.choice((40, 40, 40, number())), rng.choice((16, 6, number()))


def is_good_offload(header: bytes, length: int, kinds: frozenset[str] = BOTH) -> bool:
    """Whether check_offload takes it."""
    try:
        tun6.check_offload(memoryview(header), length, kinds)
    except tun6.ProtocolError:
        return False
    return True


PLAIN = bytes(10)  # the virtio_net_hdr of a finished packet
TSO6, USO6 = offload(gso_type=4, gso_size=1440), offload(gso_type=5, gso_size=1452, csum_offset=6)
HOME = subnet(1)  # the /64 of the client whose ingress_filter it is
ABROAD = IPv6Address(Lab.INTERNET)


def between(source: IPv6Address, destination: IPv6Address, payload: bytes = b"", next_header: int = NOTHING) -> bytes:
    made = packet(payload, next_header)
    return made[:8] + source.packed + destination.packed + made[40:]


def internet_sum(data: bytes) -> int:
    """RFC 1071 section 1, without the complement at the end."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo_sum(packet: bytes) -> int:
    """Of a UDP packet's pseudo header, RFC 8200 section 8.1."""
    return internet_sum(packet[8:40] + struct.pack(">II", len(packet) - 40, UDP))


def with_checksum(packet: bytes) -> bytes:
    """A UDP packet with the checksum that RFC 768 wants."""
    blank = packet[:46] + bytes(2) + packet[48:]
    checksum = 0xFFFF - internet_sum(struct.pack(">H", pseudo_sum(blank)) + blank[40:])
    return packet[:46] + struct.pack(">H", checksum or 0xFFFF) + packet[48:]


def udp_between(source: IPv6Address, destination: IPv6Address, payload: bytes, port: int = 9) -> bytes:
    """A UDP packet as RFC 768 wants it; port 9 throws it away."""
    return with_checksum(between(source, destination, struct.pack(">HHHH", 1000, port, 8 + len(payload), 0) + payload, UDP))


def icmp_between(source: IPv6Address, destination: IPv6Address, kind: int, body: bytes) -> bytes:
    """An ICMPv6 packet with hop limit 255, as neighbours have to send it."""
    made = between(source, destination, bytes([kind, 0, 0, 0]) + body, 58)
    checksum = ~internet_sum(made[8:40] + struct.pack(">II", len(made) - 40, 58) + made[40:]) & 0xFFFF
    return made[:7] + b"\xff" + made[8:42] + struct.pack(">H", checksum) + made[44:]


OPEN_UDP = offload(csum_offset=6)


def datagram(payload: bytes, flow: int = 0, label: int = 0, finished: bool = False) -> bytes:
    """A frame with a UDP datagram, its checksum finished or left open as a kernel does."""
    made = packet(struct.pack(">HHHH", 1000 + flow, 9, 8 + len(payload), 0) + payload, UDP)
    made = struct.pack(">I", 6 << 28 | label) + made[4:]
    if finished:
        return PLAIN + with_checksum(made)
    return OPEN_UDP + made[:46] + struct.pack(">H", pseudo_sum(made)) + made[48:]


def damaged(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def batch(frames: list[bytes]) -> tuple[memoryview, list[int]]:
    """The frames as a pump has them: in a larger buffer, one behind the other, and where each ends."""
    return memoryview(bytearray(b"".join(frames) + bytes(100))), list(accumulate(map(len, frames)))


def cut_apart(frame: bytes) -> list[bytes]:
    """The packets that a kernel makes of a frame before they leave the machine: Linux's networking/segmentation-offloads.rst."""
    (flags, gso_type, _, gso_size, start, offset), made = struct.unpack_from("<BBHHHH", frame), frame[10:]
    if not flags:
        return [made]
    assert (flags, start, offset) == (1, 40, 6)
    assert struct.unpack_from(">H", made, 46)[0] % 0xFFFF == pseudo_sum(made) % 0xFFFF
    if not gso_type:
        return [with_checksum(made)]
    assert gso_type == 5
    length = struct.unpack_from(">H", made, 44)[0]
    assert length == len(made) - 40 == struct.unpack_from(">H", made, 4)[0]
    payload = made[48:]
    parts = [payload[at : at + gso_size] for at in range(0, len(payload), gso_size)]
    return [
        with_checksum(made[:4] + struct.pack(">H", 8 + len(part)) + made[6:44] + struct.pack(">HH", 8 + len(part), 0) + part)
        for part in parts
    ]


def hello(id_: object, key: str | None = None, offload: list[str] | None = None) -> bytes:
    optional = {"Key": key, "Offload": offload}
    return json.dumps({"Id": id_, **{name: value for name, value in optional.items() if value is not None}}).encode()


MAC = "b8:27:eb:12:34:56"


SPELLINGS = [MAC, "B8:27:EB:12:34:56", "b8-27-eb-12-34-56", "B8-27-EB-12-34-56", "b827.eb12.3456"]


# ---- kit: fakes and stores -------------------------------------------------------------------------------------------


class PermitAll(tun6.IngressFilter):
    """Lets everything pass."""

    def permits(self, source: int, destination: int) -> bool:
        return True


PERMIT_ALL = PermitAll(POOL, True)
BUFFER = bytearray(2 * (tun6.OFFLOAD_HEADER.size + tun6.PACKET_MAX))  # shared by all Deframers, as in the program
Segments = list[Optional[bytes]]  # as a connection brings them; at a None there is nothing to read


class Wire:
    def __init__(self, segments: Segments) -> None:
        self.segments = segments

    def read(self, view: memoryview) -> int | None:
        data = self.segments.pop(0)
        if data is None:
            return None
        got = min(len(view), len(data))
        view[:got] = data[:got]
        if got < len(data):
            self.segments.insert(0, data[got:])
        return got


def deframe(deframer: tun6.Deframer, wire: Wire) -> list[bytes]:
    """The frames of one pull; none when there is nothing to read."""
    return [bytes(frame) for frame in deframer.pull(wire.read, tun6.PACKET_MAX)]


def join(frames: list[bytes]) -> list[bytes]:
    """What becomes of these frames, each of which the peer has to take."""
    view, ends = batch(frames)
    ends = tun6.coalesce_datagrams(view, ends)
    stream = bytes(view[: ends[-1]])
    deframer, joined = tun6.Deframer(BUFFER, BOTH, PERMIT_ALL), []
    for at in range(0, len(stream), tun6.MESSAGE_MAX):
        joined += [bytes(frame) for frame in deframer.push(stream[at : at + tun6.MESSAGE_MAX])]
    assert ends == list(accumulate(map(len, joined)))
    return joined


def spawn(function: Callable[..., object], *args: object) -> Any:
    """A greenlet whose error is for `results`, not for stderr."""

    def run() -> object:
        try:
            return function(*args)
        except Exception as error:
            return error

    return gevent.spawn(run)


def becomes_true(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it does within so many seconds, in which other greenlets go on."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        gevent.sleep(0.02)
    return True


def results(greenlets: list[Any]) -> list[Any]:
    """What they returned or raised, within five seconds."""
    gevent.joinall(greenlets, timeout=5)
    assert all(greenlet.ready() for greenlet in greenlets), "a caller waits for ever"
    return [greenlet.value if greenlet.successful() else greenlet.exception for greenlet in greenlets]


OpenStore = Callable[..., tun6.AssignmentStore]


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Opens stores of POOL and closes them at the end."""
    stores: list[tun6.AssignmentStore] = []

    def open_(path: Path | None, pool: IPv6Network = POOL) -> tun6.AssignmentStore:
        stores.append(tun6.AssignmentStore(tun6.PrefixPool(pool), str(path) if path else None))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


def refusal_of(store: tun6.Keys, id_: str, key: str) -> tuple[str, str]:
    """Code and text that the client gets."""
    with pytest.raises(tun6.Refusal) as caught:
        store.check(id_, key)
    return caught.value.code, caught.value.text


# ---- kit: hosts ------------------------------------------------------------------------------------------------------


def namespaces() -> set[str]:
    """The namespaces of Labs, but not those of a Lab in another process that still runs."""
    names = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
    owner = {name: int(found[1]) for name in names if (found := re.fullmatch(r"tun6-(\d+)-\w+", name))}
    return {name for name, pid in owner.items() if pid == os.getpid() or not os.path.exists(f"/proc/{pid}")}


def children() -> set[int]:
    """The processes that this one has started and not waited for."""
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            if int(Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(process))
    return found


def leftovers() -> dict[str, set[Any]]:
    """What a test must not leave behind."""
    return {
        "namespaces": namespaces(),
        "processes": children(),
        "devices": {name for _, name in socket.if_nameindex()},
        "threads": {thread.name for thread in threading.enumerate()},
    }


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = leftovers()
    yield
    try:
        wait_until("the leftovers of the test go", lambda: all(now <= before[kind] for kind, now in leftovers().items()), 3)
    except tun6.KernelError:
        left = {kind: now - before[kind] for kind, now in leftovers().items()}
        pytest.fail(f"the test left behind {left}")


VOLATILE = {"expires", "valid_life_time", "preferred_life_time"}  # fields of `ip -j` that change by themselves
WATCHED_SYSCTLS = ("forwarding", "accept_ra", "disable_ipv6", "addr_gen_mode", "mtu")


def without_volatile(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in VOLATILE}


def tables_on(lab: Lab, host: str) -> list[bytes]:
    """The tables of nftables with the number of their chains, as the kernel tells them: a run of `nft` would take ten times as long."""
    with socket_on(lab, host, socket.AF_NETLINK, socket.SOCK_RAW, tun6.NETLINK_NETFILTER) as sock:
        # NFT_MSG_GETTABLE, NLM_F_REQUEST and NLM_F_DUMP (linux/netlink.h), struct nfgenmsg; the answer is NFT_MSG_NEWTABLE = 0
        sock.send(struct.pack("=IHHII4x", 20, 10 << 8 | 1, 0x301, 0, 0))
        messages = tun6.split_netlink(sock.recv(1 << 16), tun6.DeviceMonitor.MESSAGE_HEADER)
        return [body[4:] for kind, body in messages if kind == 10 << 8]


def state_of(lab: Lab, host: str) -> dict[str, Any]:
    """Links, addresses, routes, tables of nftables and sysctls of a host, comparable."""
    state: dict[str, Any] = {"tables": tables_on(lab, host)}
    for what in ("addr", "-4 route show table all", "-6 route show table all"):
        for entry in json.loads(lab.ip(host, f"-j {what}") or "[]", object_hook=without_volatile):
            name = f"{what} {entry.get('ifname') or entry.get('dst')} {entry.get('dev', '')} {entry.get('metric', '')}"
            state[name] = entry
    with lab.inside(host):
        for conf in Path("/proc/sys/net/ipv6/conf").iterdir():
            for key in WATCHED_SYSCTLS:
                state[f"{conf.name}.{key}"] = tun6.read_text(conf / key)
    return state


def settled(lab: Lab, host: str) -> bool:
    """Whether all links of the host have their link-local addresses, with the routes that these bring."""
    links = len(json.loads(lab.ip(host, "-j link"))) - 1  # the loopback has none
    tentative = "tentative" in lab.ip(host, "-6 addr")
    return not tentative and lab.ip(host, "-6 route show table local type local").count("fe80::") == links


@pytest.fixture(scope="session")
def hosts() -> Iterator[Lab]:
    """The six hosts, made once; tests take `lab`, which checks how they leave them."""
    if os.geteuid():
        pytest.skip("makes network namespaces and TUN devices, which takes root")
    before = namespaces()
    with Lab() as lab:
        for host in Lab.HOSTS:
            wait_until(f"the links of {host} have their addresses", lambda host=host: settled(lab, host))  # type: ignore[misc]
        yield lab
    assert namespaces() <= before, "the Lab left namespaces behind"


@pytest.fixture
def lab(hosts: Lab) -> Iterator[Lab]:
    before = {host: state_of(hosts, host) for host in Lab.HOSTS}
    yield hosts
    for host in Lab.HOSTS:
        assert state_of(hosts, host) == before[host], f"{host} is not as it was"
        assert not hosts.run(host, "ip", "netns", "pids", hosts._names[host]).stdout.split()[1:], f"a process is left on {host}"


def server_devices(lab: Lab) -> set[str]:
    """The names of the sessions' TUNs."""
    return {link["ifname"] for link in json.loads(lab.ip("server", "-j link")) if link["ifname"].startswith("tun6-")}


def server_routes(lab: Lab, kind: str = "unicast") -> set[str]:
    """Where the server's own routes lead: those of the sessions, or with "unreachable" that of the pool."""
    return {route["dst"] for route in json.loads(lab.ip("server", f"-6 -j route show type {kind} proto {tun6.ROUTE_PROTOCOL}"))}


def wait_until_no_sessions(lab: Lab, seconds: float = 3) -> None:
    wait_until("TUNs and routes of the sessions go", lambda: not server_devices(lab) and not server_routes(lab), seconds)


def tun_of(lab: Lab, host: str = "client", device: str = "tun6") -> dict[str, Any]:
    """What `ip -j addr` says of the client's TUN; {} when there is none."""
    return next((link for link in json.loads(lab.ip(host, "-j addr")) if link["ifname"] == device), {})


def addresses(lab: Lab, host: str = "client") -> list[str]:
    return [f"{entry['local']}/{entry['prefixlen']}" for entry in tun_of(lab, host).get("addr_info", [])]


def way_to_internet(lab: Lab, host: str = "client") -> str:
    """The device that a packet for the IPv6 Internet leaves by."""
    return str(json.loads(lab.ip(host, f"-6 -j route get {Lab.INTERNET}"))[0]["dev"])


@contextmanager
def changed(lab: Lab, host: str, *commands: str) -> Iterator[None]:
    """Runs commands of `ip` that add or delete something, and undoes them at the end."""
    opposite = {"add": "del", "del": "add"}
    with ExitStack() as undo:
        for command in commands:
            what, do, which = re.split(" (add|del) ", command)
            lab.ip(host, command)
            undo.callback(lab.ip, host, f"{what} {opposite[do]} {which.replace(' nodad', '')}")
        yield


@contextmanager
def sysctl(lab: Lab, host: str, name: str, value: str) -> Iterator[None]:
    """A sysctl of the host has this value meanwhile."""
    with lab.inside(host):
        before = tun6.read_sysctl(name)
    lab.set_sysctl(host, name, value)
    try:
        yield
    finally:
        lab.set_sysctl(host, name, before)


@contextmanager
def lan_behind(lab: Lab, prefix: IPv6Network) -> Iterator[str]:
    """The prefix's addresses on the LAN behind the client; gives that of the host there."""
    of_the_host = (f"addr add {prefix[16]}/64 dev eth0 nodad", f"-6 route add default via {prefix[2]}")
    with changed(lab, "client", f"addr add {prefix[2]}/64 dev eth1 nodad"), changed(lab, "lan", *of_the_host):
        wait_until("the LAN host reaches its router", lambda: lab.pings("lan", str(prefix[2])))
        yield str(prefix[16])


@contextmanager
def running(lab: Lab, host: str, *command: str) -> Iterator[None]:
    """A program runs on the host meanwhile."""
    process = lab.popen(host, *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def ping(lab: Lab, host: str, address: str = Lab.INTERNET, size: int = 56, count: int = 5) -> None:
    """So many pings of this many bytes all come back, once the path's MTU is known to both ends."""

    def comes_back() -> bool:  # `ping -c 5` would wait for the last no longer than twice what the others took
        return lab.run(host, "ping", "-6", "-q", "-c", "1", "-W", "2", "-s", str(size), address).returncode == 0

    wait_until(f"{host} pings {address} with {size} bytes", comes_back)
    for number in range(count):
        assert comes_back(), f"ping {number} of {size} bytes from {host} to {address} was lost"


def socket_on(lab: Lab, host: str, family: int = socket.AF_INET6, kind: int = socket.SOCK_DGRAM, protocol: int = 0) -> socket.socket:
    with lab.inside(host):
        return socket.socket(family, kind, protocol)


class SocketOwner:
    """The end of a `with` block closes its socket."""

    sock: socket.socket

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Echo(SocketOwner):
    """Pings the Internet host from a host's own socket: what `send` has returned from is in the TUN's queue."""

    def __init__(self, lab: Lab, host: str = "client") -> None:
        self.sock = socket_on(lab, host, socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        self.sock.settimeout(5)

    def send(self, number: int) -> None:
        self.sock.sendto(struct.pack(">BBHHH", 128, 0, 0, number, number), (Lab.INTERNET, 0))  # the kernel fills the checksum

    def expect_replies(self, numbers: set[int]) -> None:
        deadline = time.monotonic() + 5
        while numbers:
            assert time.monotonic() < deadline, f"no replies to the pings {numbers}"
            packet = self.sock.recv(65_536)
            if packet[0] == 129:
                numbers = numbers - {int.from_bytes(packet[4:6], "big")}


@contextmanager
def repeated(action: Callable[[], object], pause: float) -> Iterator[None]:
    """Meanwhile a thread does this again and again, with a pause of so many seconds before each time."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(pause):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


@contextmanager
def udp_flood(lab: Lab, targets: Iterable[IPv6Network], rate: int, train: int = 20) -> Iterator[None]:
    """Meanwhile the Internet host sends so many UDP packets a second to a client of each prefix; the kernel gets them in trains."""
    data = bytes(1400 * train)
    sock = socket_on(lab, "internet")
    sock.setsockopt(socket.SOL_UDP, 103, 1400)  # UDP_SEGMENT, linux/udp.h

    def send() -> None:
        for target in targets:
            with suppress(OSError):  # it hears that nobody listens there
                sock.sendto(data, (str(target[1]), 9))

    with sock, repeated(send, train / rate):
        yield


@contextmanager
def tcp_between(lab: Lab, source: str, sink: str, address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """One TCP connection to this address of the sink: its end on the source, and that on the sink."""
    with lab.inside(sink):
        listener = socket.create_server((address, 0), family=socket.AF_INET6)
    with listener, socket_on(lab, source, kind=socket.SOCK_STREAM) as sender:
        for sock in (listener, sender):
            sock.settimeout(20)
        sender.connect(listener.getsockname()[:2])
        receiver, _ = listener.accept()
        with receiver:
            receiver.settimeout(20)
            yield sender, receiver


def transfer(lab: Lab, source: str, sink: str, address: str, size: int, rate: int = 0) -> None:
    """Moves random bytes over one TCP connection, at most `rate` a second; what arrives at `address` of the sink must have their hash."""
    data = os.urandom(size)
    with tcp_between(lab, source, sink, address) as (sender, receiver), ThreadPoolExecutor() as threads:
        if rate:
            sender.setsockopt(socket.SOL_SOCKET, 47, rate)  # SO_MAX_PACING_RATE, asm-generic/socket.h

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)

        sent = threads.submit(send)
        arrived = receiver.makefile("rb").read()
        sent.result()
    assert (len(arrived), hashlib.sha256(arrived).digest()) == (size, hashlib.sha256(data).digest())


# ---- kit: programs ---------------------------------------------------------------------------------------------------

TUN6 = str(Path(tun6.__file__).resolve())
SERVER_ENDS_S = 2.0  # the issue: SIGTERM and SIGINT undo everything in under 2 s


def write_ini(path: Path, **sections: Mapping[str, object]) -> Path:
    """A config.ini of these sections, without the keys whose value is None; gives its path."""
    lines = []
    for name, keys in sections.items():
        lines += [f"[{name}]", *(f"{key} = {value}" for key, value in keys.items() if value is not None), ""]
    path.write_text("\n".join(lines))
    return path


def many(ci: int, long: int) -> int:
    """How many times, in CI or with TUN6_LONG=1 in the environment."""
    return long if os.environ.get("TUN6_LONG") == "1" else ci


class Program:
    """A tun6 that runs on a host of the lab."""

    def __init__(self, lab: Lab, host: str, role: str, config: Path, log: Path) -> None:
        self.lab, self.host, self.role, self.config, self._log = lab, host, role, config, log
        log.write_text("")
        self.start()

    def start(self) -> None:
        """Also starts it again when it has ended; its log goes on."""
        command = (sys.executable, TUN6, self.role, "-v", "-c", str(self.config))
        with open(self._log, "a") as stderr:
            self.process = self.lab.popen(self.host, *command, stderr=stderr, stdin=subprocess.DEVNULL)

    def log(self) -> str:
        return self._log.read_text()

    def control(self) -> Path:
        """Its control socket."""
        return Path(re.findall("(?m)^control = (.*)$", self.config.read_text())[0])

    def wait_for(self, pattern: str, times: int = 1, seconds: float = 10) -> list[str]:
        """What the pattern finds in the log, as soon as it does so this many times."""

        def found() -> list[str]:
            matches = re.findall(pattern, self.log())
            assert matches or self.process.poll() is None, f"the {self.role} ended by itself:\n{self.log()}"
            return matches if len(matches) >= times else []

        try:
            return wait_until("the log", found, seconds)
        except tun6.KernelError:
            raise AssertionError(f"{pattern!r} is not {times} times in the log of the {self.role}:\n{self.log()}") from None

    def said(self, pattern: str, times: int) -> list[str]:
        """As `wait_for`, but it must not be there more often. The log's thread may write a little later than what it tells of happens."""
        matches = self.wait_for(pattern, times)
        assert len(matches) == times, f"{pattern!r} is {len(matches)} times in the log of the {self.role}:\n{self.log()}"
        return matches

    def prefix(self, times: int = 1, seconds: float = 10) -> IPv6Network:
        """The prefix of the client when it has connected so many times."""
        return IPv6Network(self.wait_for(r": has (\S+) on", times, seconds)[-1])

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Ends it by a signal; it must exit with 0. Gives the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the {self.role} did not end within 10 s of signal {number}:\n{self.log()}") from None
        assert status == 0, f"the {self.role} exited with {status}:\n{self.log()}"
        return time.monotonic() - began

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Tunnel:
    """Starts tun6 programs on the lab's hosts, with a pool and a port of their own, and ends those that still run."""

    _numbers = itertools.count(0x100)

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self._folder = lab, folder
        self.port = 10_000 + next(self._numbers)
        self.pool = self.new_pool()
        self._programs: list[Program] = []
        self._undo = ExitStack()  # the peers

    def new_pool(self) -> IPv6Network:
        """A pool that no test had before: the hosts remember the path MTUs of addresses."""
        return IPv6Network(f"2001:db8:{next(self._numbers):x}::/56")

    def server(self, host: str = "server", **settings: object) -> Program:
        """A server that listens. The settings are those of its section of config.ini, None to leave one out."""
        server = self.start("server", host, **settings)
        server.wait_for(' serving |"serving ')
        return server

    def client(self, host: str = "client", **settings: object) -> Program:
        return self.start("client", host, **settings)

    def start(self, role: str, host: str, **settings: object) -> Program:
        number = len(self._programs)
        program = Program(self.lab, host, role, self.config(role, **settings), self._folder / f"{number}-{role}.log")
        self._programs.append(program)
        return program

    def config(self, role: str, **settings: object) -> Path:
        """A config.ini of one section."""
        usual: dict[str, object] = {
            "server": {
                "localhost": "0.0.0.0",
                "listenport": self.port,
                "prefixrange": self.pool,
                "assignments": "assignments.json",
                "control": self._folder / f"{len(self._programs)}.sock",
                "documentation_addresses": "yes",
            },
            "client": {"remotehost": Lab.SERVER, "remoteport": self.port, "control": self._folder / f"{len(self._programs)}.sock"},
        }[role]
        return write_ini(self._folder / f"{len(self._programs)}-{role}.ini", **{role: {**usual, **settings}})

    def failure_at_start(self, role: str, status: int = 1, host: str = "", /, **settings: object) -> str:
        """Starts a tun6 that can not begin: it must exit with this status and say why in one sentence, which this gives."""
        done = self.lab.run(host or role, sys.executable, TUN6, role, "-c", str(self.config(role, **settings)), timeout=10)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert "Traceback" not in done.stderr
        (sentence,) = re.findall(r"^tun6: (.*)$", done.stderr, re.MULTILINE)
        assert done.stderr.endswith(f"tun6: {sentence}\n")
        assert status == 1 or done.stderr == f"tun6: {sentence}\n"  # a wrong configuration is found before there is anything to log
        return str(sentence)

    def peer(self, id_: str = "by-hand", host: str = "client", offload: list[str] | None = None) -> Peer:
        """A client spoken by hand that has said its hello."""
        peer = self.connect(host)
        peer.hello(id_, offload)
        return peer

    def connect(self, host: str = "client", source: str = "") -> Peer:
        """One that has said nothing. On the server's own host it may come from any 127.x.x.x."""
        peer = Peer(self.lab, self.port, host, source)
        self._undo.callback(peer.sock.close)
        return peer

    def crowd(self, number: int, *kinds: list[str] | None) -> list[Peer]:
        """So many clients, all connected, of these kinds in turn."""
        peers = [self.peer(f"client {n}", offload=kinds[n % len(kinds)] if kinds else None) for n in range(number)]
        return [peer.connected() for peer in peers]

    def visit(self, id_: str, host: str = "client") -> IPv6Network:
        """A client comes, pings and leaves; gives its prefix."""
        with self.peer(id_, host) as peer:
            peer.connected().echo()
            return peer.prefix

    def refusal(self, id_: str, ends: str = "closed") -> dict[str, Any]:
        """What the server says to this client, before it ends the connection."""
        with self.peer(id_) as peer:
            answer = peer.answer()
            assert (sorted(answer), peer.ended()) == (["Error", "Text"], ends)
            return answer

    def close(self) -> None:
        """Ends, and asks of all programs that they behaved."""
        self._undo.close()
        slow = [p.role for p in reversed(self._programs) if p.process.poll() is None and p.stop() > SERVER_ENDS_S]
        assert not slow, f"took more than {SERVER_ENDS_S} s to end: {slow}"
        for program in self._programs:
            assert not re.search("Traceback|internal error", program.log()), program.log()

    def kill(self) -> None:
        self._undo.close()
        for program in self._programs:
            program.kill()


@pytest.fixture
def tunnel(lab: Lab, tmp_path: Path) -> Iterator[Tunnel]:
    tunnel = Tunnel(lab, tmp_path)
    with ExitStack() as undo:
        undo.callback(tunnel.kill)
        yield tunnel
        tunnel.close()


@pytest.fixture
def server(tunnel: Tunnel) -> Program:
    return tunnel.server()


def run_tun6(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs tun6.py as a user does."""
    command = [sys.executable, str(Path(tun6.__file__).resolve()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, **options)


def only_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """What it said on stderr, which is one line."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    return done.stderr


def asked(config: Path, command: str, *words: str) -> Any:
    """What a command of tun6.py answers in JSON."""
    done = run_tun6(command, "-c", str(config), "--json", *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def status_of(server: Program) -> dict[str, Any]:
    return dict(asked(server.config, "status"))


def memory(program: Program) -> int:
    """Bytes that it has in RAM."""
    return int(re.findall(r"^VmRSS:\s*(\d+) kB", Path(f"/proc/{program.process.pid}/status").read_text(), re.MULTILINE)[0]) << 10


def served(visit: Callable[..., object], id_: str, host: str, seconds: float) -> None:
    """A client that comes again whenever it is turned away is served within this time, by the visit of a Tunnel or a Site."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        with suppress(EOFError, OSError):
            visit(id_, host=host)
            break
        time.sleep(0.1)
    assert time.monotonic() - began < seconds, "an honest client is locked out"


@contextmanager
def paused(program: Program) -> Iterator[None]:
    program.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        program.process.send_signal(signal.SIGCONT)


@contextmanager
def descriptors(program: Program, room: int) -> Iterator[None]:
    """It may have only so many more meanwhile."""
    pid = program.process.pid
    most, limits = len(os.listdir(f"/proc/{pid}/fd")) + room, resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, limits[1]))
    yield
    if program.process.poll() is None:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def open_files(program: Program) -> list[str]:
    """What its descriptors are."""
    links = []
    for path in Path(f"/proc/{program.process.pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            links.append(os.readlink(path))
    return links


def pending(program: Program, sessions: int = 0) -> int:
    """The server's connections that have no session."""
    return sum(link.startswith("socket:") for link in open_files(program)) - sessions


@contextmanager
def tun6_with(folder: Path, *lines: str) -> Iterator[None]:
    """The tun6 programs that start meanwhile have a fault: these lines of Python come first."""
    script = folder / "faulty_tun6.py"
    begin = ["import errno, os, sys, time", f"sys.path.insert(0, {str(Path(tun6.__file__).resolve().parent)!r})", "import tun6"]
    script.write_text("\n".join([*begin, *lines, "sys.exit(tun6.main())", ""]))
    with mock.patch.object(sys.modules[__name__], "TUN6", str(script)):
        yield


class Disk:
    """What a server does to its disk: each fsync is counted, and waits while the disk is stuck."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stuck, self._count = folder, folder / "stuck", folder / "fsyncs"
        self._count.touch()
        self.lines = f"""
fsync = os.fsync
def slow_fsync(fd):
    with open({str(self._count)!r}, "ab", 0) as count:
        count.write(b".")
    while os.path.exists({str(self._stuck)!r}):
        time.sleep(0.01)
    fsync(fd)
os.fsync = slow_fsync
"""

    def server(self, tunnel: Tunnel, **settings: object) -> Program:
        with tun6_with(self._folder, self.lines):
            return tunnel.server("server", **settings)

    def fsyncs(self) -> int:
        """How many have begun."""
        return self._count.stat().st_size

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """It does not answer meanwhile, unless told to."""
        self._stuck.touch()
        try:
            yield
        finally:
            self.answer()

    def answer(self) -> None:
        self._stuck.unlink(missing_ok=True)


def assignments_in(path: Path) -> dict[str, IPv6Network]:
    """What the file says, read without the program; it is whole, and no prefix has two owners."""
    text = path.read_text() if path.exists() else "{}"
    found = {id_: IPv6Network(prefix) for id_, prefix in json.loads(text).items()}
    assert len(set(found.values())) == len(found), "a prefix has two owners"
    return found


def untouched(path: Path) -> tuple[bytes, int, int]:
    """What changes when somebody writes the file, or puts another one in its place."""
    return path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino


def prefix_of_pool(tunnel: Tunnel, number: int) -> IPv6Network:
    """The /64 of this number in the tunnel's pool."""
    return next(itertools.islice(tunnel.pool.subnets(new_prefix=64), number, None))


def processes_of(pid: int) -> list[str]:
    """The processes that the threads of this one have started."""
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


@contextmanager
def locked(path: Path) -> Iterator[dict[str, list[Any]]]:
    """The object in a JSON file, which is written back if it was changed; nobody else has it meanwhile."""
    with open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = file.read()
        content = json.loads(before)
        yield content
        if json.dumps(content) != before:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(content))


class SharedStore(tun6.Store):
    """A cluster's store without PostgreSQL, for servers on one machine: a file that each looks at every 20 ms.

    It has {Id: [prefix, epoch, server, limit]}, and can't be reached while it is renamed. What a server does is as true as with the real
    one; what the real one does is not shown by it.
    """

    def __init__(self, path: str, config: tun6.ServerConfig) -> None:
        self.pool, self.keys = tun6.PrefixPool(config.prefixrange), tun6.open_keys(config)
        self._path, self._name = Path(path), f"server {config.listenport}"
        self._rows: dict[str, list[Any]] = {}
        self._held: dict[str, tuple[tun6.Claim, tun6.Lease]] = {}
        self._limits: dict[str, int | None] = {}  # of Ids that have or had a session here

    @property
    def path(self) -> object:
        return None

    def limit_of(self, id_: str) -> int | None:
        return self._limits.get(id_)

    def set_limit(self, id_: str, bits_per_s: int | None) -> None:
        with self._locked() as rows:
            rows[id_][3] = bits_per_s

    def start(self) -> None:
        gevent.spawn(self._watch)

    def find(self, id_: str) -> IPv6Network | None:
        return self.pool.find(id_)

    def takeovers(self, id_: str) -> Sequence[float]:
        return ()

    @contextmanager
    def begin(self, claim: tun6.Claim) -> Iterator[tun6.Lease]:
        said = claim.epoch if claim.proved else 0
        try:
            with self._locked() as rows:
                prefix, epoch, _, limit = rows.get(claim.id) or (str(self.pool.assign(claim.id)), 0, "", None)
                rows[claim.id] = [prefix, max(epoch, said) + 1, self._name, limit]
        except FileNotFoundError:
            if claim.id not in self._rows:
                raise tun6.StorageError("the store can't be reached") from None
            prefix, epoch, _, limit = self._rows[claim.id]
            self._rows[claim.id] = [prefix, max(epoch, said) + 1, self._name, limit]
        lease = tun6.Lease(IPv6Network(prefix), max(epoch, said) + 1)
        self._held[claim.id], self._limits[claim.id] = (claim, lease), limit
        yield lease
        if self._held[claim.id][1] is lease:
            del self._held[claim.id]

    @contextmanager
    def _locked(self) -> Iterator[dict[str, list[Any]]]:
        with locked(self._path) as self._rows:
            for id_, (prefix, *_) in self._rows.items():
                self.pool.pin(id_, IPv6Network(prefix))
            yield self._rows

    def _watch(self) -> None:
        while True:
            gevent.sleep(0.02)
            with suppress(FileNotFoundError), self._locked() as rows:
                for id_, (claim, lease) in self._held.items():
                    _, epoch, server, limit = rows[id_]
                    if limit != self._limits[id_]:
                        self._limits[id_] = limit
                        claim.on_limit()
                    if epoch > (lease.epoch or 0) and server == self._name:
                        lease.epoch = epoch
                        claim.on_epoch(epoch)
                    elif epoch > (lease.epoch or 0) and not lease.superseded:
                        lease.superseded = f"{server} has it now"
                        claim.end(lease.superseded)
                    elif epoch < (lease.epoch or 0):
                        rows[id_][1:3] = lease.epoch, self._name


class SharedPool:
    """Servers of one pool on one host, each at a port of its own, with a SharedStore that the test sees, too."""

    def __init__(self, tunnel: Tunnel, folder: Path) -> None:
        self._tunnel, self._folder, self.path = tunnel, folder, folder / "shared.json"
        self.path.write_text("{}")
        self._ports = itertools.count(tunnel.port)

    def server(self, *faults: str, **settings: object) -> Program:
        """The next one. The faults are as those of tun6_with."""
        source = inspect.getsource(locked) + inspect.getsource(SharedStore)  # as an import of the tests takes seconds
        lines = [
            *faults,
            "import __future__, fcntl, functools, gevent, json",
            "from contextlib import contextmanager, suppress; from ipaddress import IPv6Network; from pathlib import Path",
            f"exec(compile({source!r}, 'SharedStore', 'exec', __future__.annotations.compiler_flag))",
            f"tun6.open_store = functools.partial(SharedStore, {str(self.path)!r})",
        ]
        with tun6_with(self._folder, *lines):
            return self._tunnel.server("server", listenport=next(self._ports), assignments=None, **settings)

    def peer(self, number: int, id_: str = "a", **hello: object) -> Peer:
        """A client of the server of this number, whose hello has these fields more; it knows extensions, unless Offload is None."""
        message = {"Id": id_, "Offload": [], **hello}
        peer = Peer(self._tunnel.lab, self._tunnel.port + number)
        self._tunnel._undo.callback(peer.sock.close)
        peer._header = b"" if message["Offload"] is None else bytes(10)
        peer.sock.sendall(json.dumps({name: value for name, value in message.items() if value is not None}).encode())
        return peer

    def row(self, id_: str = "a") -> list[Any]:
        with locked(self.path) as rows:
            return list(rows.get(id_, ["", 0, "", None]))

    def change(self, id_: str, epoch: int, server: int) -> None:
        """As if this server had begun another session of the Id."""
        with locked(self.path) as rows:
            rows[id_][1:3] = epoch, f"server {self._tunnel.port + server}"

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody reaches the store meanwhile."""
        away = self.path.rename(self._folder / "away.json")
        yield
        away.rename(self.path)


@pytest.fixture
def shared(tunnel: Tunnel, tmp_path: Path) -> SharedPool:
    return SharedPool(tunnel, tmp_path)


# ---- kit: peers spoken by hand ---------------------------------------------------------------------------------------


def echo_request(source: IPv6Address, number: int, size: int = 16) -> bytes:
    """An IPv6 packet: an ICMPv6 echo request (RFC 4443) to the Internet host; the number is its id and sequence number."""
    return icmp_between(source, ABROAD, 128, struct.pack(">HH", number, number) + bytes(size))


def is_reply(packet: bytes, number: int) -> bool:
    return packet[6] == 58 and packet[40] == 129 and packet[44:48] == struct.pack(">HH", number, number)


def parts_of(stream: bytes, at: set[int]) -> list[bytes]:
    """The parts of the stream between these places."""
    ends = [*sorted(at & set(range(len(stream)))), len(stream)]
    return [stream[start:end] for start, end in zip([0, *ends], ends)]


def send_segments(sock: socket.socket, segments: Iterable[bytes]) -> None:
    """Sends them so that each is a segment of its own: the one before has arrived."""
    unacknowledged = bytearray(4)

    def arrived() -> bool:
        fcntl.ioctl(sock.fileno(), 0x5411, unacknowledged)  # SIOCOUTQ, tcp(7)
        return not any(unacknowledged)

    for segment in segments:
        wait_until("the segment is acknowledged", arrived)
        sock.sendall(segment)


class Peer(SocketOwner):
    """A connection to the server, spoken by hand from a host of the lab."""

    def __init__(self, lab: Lab, port: int, host: str = "client", source: str = "") -> None:
        self.sock = socket_on(lab, host, socket.AF_INET, socket.SOCK_STREAM)
        self.sock.settimeout(5)
        self.sock.bind((source, 0))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect((Lab.SERVER, port))
        self._buffer = b""
        self._header = b""
        self._numbers = itertools.count(1)
        self.prefix = IPv6Network("::/64")

    def hello(self, id_: str, offload: list[str] | None = None, key: str | None = None) -> None:
        self._header = b"" if offload is None else bytes(10)
        self.sock.sendall(hello(id_, key, offload))

    def answer(self) -> dict[str, Any]:
        """The server's message, and the prefix that it brings is kept."""
        while b"}" not in self._buffer:
            self._more()
        text, _, self._buffer = self._buffer.partition(b"}")
        answer: dict[str, Any] = json.loads(text + b"}")
        self.prefix = IPv6Network(answer.get("Prefix", "::/64"))
        return answer

    def connected(self) -> Peer:
        """Itself, when the server has taken it."""
        assert "Prefix" in self.answer()
        return self

    def frame(self) -> tuple[bytes, bytes]:
        """The next frame: offload header (empty when there is none) and packet."""
        header = len(self._header)
        while not (frame := first_frame(self._buffer, header)):
            self._more()
        self._buffer = self._buffer[len(frame) :]
        return frame[:header], frame[header:]

    def send_echo(self) -> int:
        number = next(self._numbers)
        self.sock.sendall(self._header + echo_request(self.prefix[1], number))
        return number

    def echo(self) -> None:
        """Pings the Internet host: the tunnel works both ways."""
        self.expect_reply(self.send_echo())

    def expect_reply(self, number: int) -> None:
        deadline = time.monotonic() + 5
        while not is_reply(self.frame()[1], number):
            assert time.monotonic() < deadline, "no reply to the ping"

    def expect_probe(self) -> None:
        """Waits for a question of the server whether this end is alive, and does not answer it."""
        while (packet := self.frame()[1])[6] != socket.IPPROTO_ICMPV6 or packet[40] != tun6.ECHO_REQUEST:
            pass

    def ended(self) -> str:
        """How the server ended the connection, whatever it sent before."""
        try:
            while self.sock.recv(65_536):
                pass
        except ConnectionResetError:
            return "reset"
        return "closed"

    def do(self, *steps: Step) -> None:
        for step in steps:
            if isinstance(step, bytes):
                self.sock.sendall(step)
            else:
                step(self)

    def close(self) -> None:
        self.sock.close()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Leaves with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _more(self) -> None:
        data = self.sock.recv(65_536)
        if not data:
            raise EOFError(f"the server closed the connection behind {self._buffer[:200]!r}")
        self._buffer += data


Step = Union[bytes, Callable[[Peer], object]]  # what a peer sends, or what is done with it
GARBAGE = b"\x45" + bytes(100)  # begins as IPv4 does


class ServerByHand(SocketOwner):
    """A server that a test speaks for, a connection at a time."""

    def __init__(self, lab: Lab, tunnel: Tunnel) -> None:
        self._prefix = IPv6Network(f"{tunnel.pool[0]}/64")
        with lab.inside("server"):
            self.sock = socket.create_server((Lab.SERVER, tunnel.port))
        self.sock.settimeout(10)

    def accept(self, offload: list[str] | None, **extensions: object) -> socket.socket:
        """The client's next connection, its hello kept and answered."""
        sock, _ = self.sock.accept()
        sock.settimeout(10)
        self.hello: dict[str, Any] = json.loads(sock.recv(4096))
        answer = {"Prefix": str(self._prefix), **({} if offload is None else {"Offload": offload}), **extensions}
        sock.sendall(json.dumps(answer).encode())
        return sock


def all_of(sock: socket.socket) -> bytes:
    """Everything that comes until the peer leaves."""
    data = b""
    with suppress(OSError):
        while more := sock.recv(1 << 16):
            data += more
    return data


def received_up_to(sock: socket.socket, last: bytes) -> bytes:
    """What comes, until these bytes have come."""
    stream = b""
    while last not in stream:
        data = sock.recv(1 << 16)
        assert data, "the other side closed the connection"
        stream += data
    return stream


def fingerprint_in(pem: str) -> str:
    """Of the first certificate, computed by other means than the program's."""
    body = pem.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END CERTIFICATE-----")[0]
    return "sha256:" + hashlib.sha256(base64.b64decode(body)).hexdigest()


def make_certificate(path: Path, *options: str) -> str:
    """A certificate and its key in a PEM file; gives its fingerprint."""
    how = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout - -out -"
    what = options or ("-subj", "/CN=tun6", "-days", "2")
    made = subprocess.run(["openssl", *how.split(), *what], capture_output=True, text=True, check=True)
    path.write_text(made.stdout)
    return fingerprint_in(made.stdout)


@pytest.fixture
def cert(tmp_path: Path) -> Path:
    make_certificate(tmp_path / "server.pem")
    return tmp_path / "server.pem"


def trusting() -> ssl.SSLContext:
    """TLS that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def tls_pair(client: ssl.SSLContext, cert: Path) -> tuple[ssl.SSLObject, ssl.SSLObject, ssl.MemoryBIO]:
    """A client's and a server's end of TLS, and what the client says to the server, when they have shaken hands."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server)
    far = tun6.server_tls_context(str(cert)).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in near, far:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return near, far, to_server


class TlsSocket:
    """A socket with a client's TLS in it, for a Peer; records are made and sent in two steps."""

    def __init__(self, sock: socket.socket, cut: Callable[[bytes], Iterable[bytes]] = lambda data: [data], hold_last: bool = False) -> None:
        """`cut`: the segments that each flight of the handshake travels in; `hold_last`: the last flight goes with what is sent next."""
        self.raw = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = trusting().wrap_bio(self._incoming, self._outgoing)
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                send_segments(sock, cut(self._outgoing.read()))
                self._take()
        if not hold_last:
            send_segments(sock, cut(self._outgoing.read()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def fingerprint(self) -> str:
        """Of the certificate that the server showed."""
        return "sha256:" + hashlib.sha256(self.tls.getpeercert(binary_form=True) or b"").hexdigest()

    def encrypt(self, data: bytes) -> bytes:
        """The records that say this."""
        self.tls.write(data)
        return self._outgoing.read()

    def new_keys(self, times: int, ask: bool = False) -> bytes:
        """Records that announce new keys so many times, and ask for those of the other side. Python can't say that, OpenSSL can."""
        openssl = ctypes.CDLL(sys.modules["_ssl"].__file__)
        at = (
            id(cast(Any, self.tls)._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
        )  # struct PySSLSocket: head, pointer, this one
        connection = ctypes.c_void_p.from_address(at)
        for _ in range(times):
            assert openssl.SSL_key_update(connection, int(ask)) == 1
            openssl.SSL_do_handshake(connection)
        return self._outgoing.read()

    def sendall(self, data: bytes) -> None:
        self.raw.sendall(self.encrypt(data))

    def recv(self, size: int) -> bytes:
        while True:
            try:
                return self.tls.read(size)
            except ssl.SSLWantReadError:
                if not self._take():
                    return b""

    def _take(self) -> bool:
        data = self.raw.recv(1 << 16)
        self._incoming.write(data)
        if not data:
            self._incoming.write_eof()
        return bool(data)


def tls_client_hello() -> bytes:
    """The first bytes that a TLS client says."""
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        trusting().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


class TlsPeer(Peer):
    """A client spoken by hand inside TLS."""

    def __init__(self, lab: Lab, port: int, host: str = "client", **options: Any) -> None:
        """`options` are those of TlsSocket."""
        super().__init__(lab, port, host)
        self.tls = TlsSocket(self.sock, **options)
        self.sock = cast(socket.socket, self.tls)
        self._header = bytes(10)


class Site:
    """The certificate and keys of a server, whose config.ini lies beside them."""

    def __init__(self, tunnel: Tunnel, name: str = "site") -> None:
        self.tunnel, self.folder = tunnel, tunnel._folder
        self.cert, self.keys, self.assignments = (self.folder / f"{name}-{file}" for file in ("cert.pem", "keys.json", "assignments.json"))
        self.fingerprint = make_certificate(self.cert)
        self.settings: dict[str, object] = {"cert": self.cert.name, "keys": self.keys.name, "assignments": self.assignments.name}
        self.config = Path()

    def serve(self, **settings: object) -> Program:
        self.config = self.folder / f"{len(self.tunnel._programs)}-server.ini"
        return self.tunnel.server("server", **{**self.settings, **settings})

    def write_config(self, **settings: object) -> None:
        """The server's config.ini, while there is no server."""
        self.config = self.tunnel.config("server", **{**self.settings, **settings})

    def issue(self, id_: str) -> str:
        """A key for the Id, put into the file behind the back of any server."""
        return tun6.KeyStore(str(self.keys)).issue(id_)

    def clients(self, *arguments: str) -> Any:
        """What `tun6.py clients` answers in JSON."""
        return asked(self.config, "clients", *arguments)

    def complaint(self, *arguments: str) -> str:
        """What `tun6.py clients` says to a request that can't be done."""
        return only_line(run_tun6("clients", "-c", str(self.config), *arguments), 2)

    def of(self, id_: str) -> dict[str, Any]:
        """What `clients list` says of the Id."""
        return next(entry for entry in self.clients("list") if entry["id"] == id_)

    def connect(self, host: str = "client", **options: Any) -> TlsPeer:
        """A client spoken by hand inside TLS that has said nothing. The options are those of TlsSocket."""
        peer = TlsPeer(self.tunnel.lab, self.tunnel.port, host, **options)
        self.tunnel._undo.callback(peer.sock.close)
        return peer

    def peer(self, id_: str, key: str | None = None, host: str = "client", bare: bool = False) -> TlsPeer:
        """One that has said its hello; bare: as a legacy client does, that takes no offload headers."""
        peer = self.connect(host)
        peer.hello(id_, None if bare else [], key)
        return peer

    def visit(self, id_: str, key: str | None = None, host: str = "client") -> IPv6Network:
        """One that comes, pings and leaves; gives its prefix."""
        with self.peer(id_, key, host) as peer:
            peer.connected().echo()
            return peer.prefix

    def answer(self, id_: str, key: str | None) -> dict[str, Any]:
        with self.peer(id_, key) as peer:
            return peer.answer()

    def client(self, id_: str, key: str | None, host: str = "client", **settings: object) -> Program:
        """A tun6 client that knows the server."""
        return self.tunnel.client(host, id=id_, key=key, **{"fingerprint": self.fingerprint, **settings})


@pytest.fixture
def site(tunnel: Tunnel) -> Site:
    return Site(tunnel)


# ---- wire ------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def parse(segments: Sequence[bytes | None]) -> object:
    """The message and the bytes behind it; None when it is not complete, the complaint when it is wrong."""
    parser = tun6.MessageParser()
    for number, segment in enumerate(segments):
        try:
            found = parser.feed(segment or b"")
        except tun6.ProtocolError as error:
            return str(error)
        if found:
            return found[0], found[1] + b"".join(rest or b"" for rest in segments[number + 1 :])
    return None


@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4), st.booleans(), st.binary(max_size=80))
def test_a_message_is_found_and_the_bytes_behind_it_are_kept(message: dict[str, Any], ascii_only: bool, frames: bytes) -> None:
    text = tun6.encode_message(message) if ascii_only else json.dumps(message, ensure_ascii=False).encode()
    assert text.isascii() or not ascii_only
    for segments in [text + frames], [bytes([byte]) for byte in text + frames]:
        assert repr(parse(segments)) == repr((message, frames))  # nan is not equal to itself


@pytest.mark.parametrize(
    "text",
    [
        '{"Id": "}{][", "a": [{"b": "}"}]}',
        r'{"Id": "\"}", "b": "\\"}',
        r'{"Id": "\\\"}{", "b": {}}',
        r'{"Id": "\u00e9\ud83d\ude00"}',
        '{"Id": "é😀"}',
        ' {"Id": "x"}'[1:],
        "{" + '"a":{' * 15 + "}" * 16,
        '{"a":"' + "x" * (tun6.MESSAGE_MAX - 8) + '"}',
    ],
)
def test_brackets_and_quotes_in_strings_are_text_and_the_limits_themselves_are_allowed(text: str) -> None:
    single = [bytes([byte]) for byte in text.encode()]
    for segments in [text.encode() + b"}`"], [*single, b"}`"]:
        assert parse(segments) == (json.loads(text), b"}`")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        *[(data, "begin") for data in (b'\x16\x03\x01{"Id": "x"}', b' {"Id": "x"}', b'["Id"]', b'"Id"')],
        (b"{" + b'"a":{' * 16, "16 nested"),
        (b'{"a":' + b"[" * 16, "16 nested"),
        (b'{"a":"' + b"x" * (tun6.MESSAGE_MAX - 7) + b'"}', "longer than 4096"),
        (b"{" + b" " * 5000, "longer than 4096"),
        *[(b'{"Id": "%s"}' % no_utf_8, "JSON") for no_utf_8 in (b"\xff", b"\xed\xa0\x80", b"\xc0\xaf")],  # a surrogate; overlong
        *[(data, "JSON") for data in (b'{"Id": "x"]', b'{"Id"}', b"{'Id': 'x'}", b'{"Id": "control\ncharacter"}')],
    ],
)
def test_what_is_no_message_is_refused_as_soon_as_that_is_certain(data: bytes, complaint: str) -> None:
    for step in 1, len(data):
        parser = tun6.MessageParser()
        with pytest.raises(tun6.ProtocolError, match=complaint):
            for at in range(0, len(data), step):
                assert parser.feed(data[at : at + step]) is None


def test_a_legacy_answer_has_exactly_the_bytes_of_the_original() -> None:
    assert tun6.encode_message({"Prefix": "2000:aaaa:bbbb:ccdd::/64"}) == b'{"Prefix": "2000:aaaa:bbbb:ccdd::/64"}'


@pytest.mark.parametrize("id_", ["00:11:22:aa:bb:cc", "x", "x" * 64, "é😀" * 32, "a b", '"', "{}"])
def test_an_id_of_1_to_64_printable_characters_is_taken(id_: str) -> None:
    assert tun6.parse_hello({"Id": id_}) == tun6.Hello(id_, None, "")


@pytest.mark.parametrize(
    "id_", ["", "x" * 65, "a\nb", "\0", "a\x7f", "\x1b[2J", "\u202e", "\u200b", "\ud800", None, 7, True, ["x"], {"x": 1}]
)
def test_any_other_id_is_refused(id_: object) -> None:
    with pytest.raises(tun6.ProtocolError, match="Id"):
        tun6.parse_hello({"Id": id_})


def test_a_hello_without_id_is_refused_and_unknown_fields_are_ignored() -> None:
    with pytest.raises(tun6.ProtocolError, match="Id"):
        tun6.parse_hello({"id": "x"})
    assert tun6.parse_hello({"Id": "x", "Key": "k", "Error": "e"}) == tun6.Hello("x", None, "k")


@pytest.mark.parametrize(
    "value, epoch",
    [(1, 1), (tun6.EPOCH_MAX, tun6.EPOCH_MAX), *((each, 0) for each in (0, -1, tun6.EPOCH_MAX + 1, 10**400, True, 7.0, "7", [7], None))],
)
def test_an_epoch_that_could_be_none_is_ignored_and_each_that_counts_makes_a_metric(value: object, epoch: int) -> None:
    assert tun6.parse_hello({"Id": "x", "Epoch": value}).epoch == epoch
    assert tun6.parse_epoch({"Prefix": "2001:db8::/64", "Epoch": value}) == epoch
    assert 0 < tun6.METRIC_MAX - epoch < tun6.REJECT_BASE


@pytest.mark.parametrize(
    "value, rate",
    [
        *((each, each) for each in (tun6.WIRE_RATE_MIN, 9_500_000, tun6.WIRE_RATE_MAX)),
        *((each, None) for each in (0, -1, tun6.WIRE_RATE_MIN - 1, tun6.WIRE_RATE_MAX + 1, 10**400, -(10**400), True, False)),
        *((each, None) for each in (1e7, math.inf, math.nan, "10000000", "10M", [10**7], {"a": 10**7}, None)),
    ],
)
def test_a_rate_that_could_be_none_is_ignored(value: object, rate: int | None) -> None:
    assert tun6.parse_hello({"Id": "x", "Rate": value}).rate == rate
    assert tun6.parse_wire_rate({"Prefix": "2001:db8::/64", "Rate": value}) == rate


@pytest.mark.parametrize(("value", "kinds"), [(None, None), ([], frozenset()), (["tso6"], {"tso6"}), (["tso6", "new"], {"tso6", "new"})])
def test_offload_is_a_list_of_kinds_and_its_absence_is_a_legacy_peer(value: object, kinds: object) -> None:
    assert tun6.parse_hello({"Id": "x", "Offload": value})[1] == kinds
    assert tun6.parse_answer({"Prefix": "2001:db8::/64", "Offload": value})[1] == kinds


@pytest.mark.parametrize("value", ["tso6", {"tso6": 1}, 1, True, [1], ["tso6", None], [["tso6"]], 0, "", False])
def test_offload_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(tun6.ProtocolError, match="Offload"):
        tun6.parse_hello({"Id": "x", "Offload": value})
    with pytest.raises(tun6.ProtocolError, match="Offload"):
        tun6.parse_answer({"Prefix": "2001:db8::/64", "Offload": value})


@pytest.mark.parametrize("prefix", ["2001:db8:1:2::/64", "2001:DB8:1:2:0:0:0:0/64", "2001:db8:1:2::1/64"])
def test_a_prefix_is_taken_in_any_of_its_spellings(prefix: str) -> None:
    assert tun6.parse_answer({"Prefix": prefix}) == (IPv6Network("2001:db8:1:2::/64"), None)


@pytest.mark.parametrize(
    "prefix",
    [
        *("::/64", "::1/64", "::/0", "fe80::/64", "ff00::/64", "ff02::1/64"),  # not unicast
        *("2001:db8::/48", "2001:db8::/65", "2001:db8::"),  # not a /64
        *("10.0.0.0/8", "", "junk", "x" * 3000, "/64", "2001:db8::/64/64", "2001:db8::/64 dev lo", "2001:db8::/\uff16\uff14"),
        *("2001:db8::%eth0/64", "2001:db8::%a\nb/64"),
        *(None, 64, 2**125, -1, 10**100, 1.5, True, [], ["2001:db8::", 64], {}),
    ],
)
def test_what_is_no_unicast_64_is_no_prefix(prefix: object) -> None:
    with pytest.raises(tun6.ProtocolError, match="Prefix") as caught:
        tun6.parse_answer({"Prefix": prefix})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_an_error_from_the_server_is_a_refusal_whose_text_can_be_printed() -> None:
    with pytest.raises(tun6.Refusal) as caught:
        tun6.parse_answer({"Error": "pool-exhausted", "Text": "no free\n\x1b[31m/64\ud800"})
    assert (caught.value.code, caught.value.text) == ("pool-exhausted", "no free??[31m/64?")
    assert str(caught.value) == "pool-exhausted: no free??[31m/64?"
    with pytest.raises(tun6.Refusal) as caught:
        tun6.parse_answer({"Error": ["\0"], "Text": "x" * 4000, "Prefix": "2001:db8::/64"})
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kinds", [None, BOTH])
def test_a_stream_of_the_largest_packets_is_cut_in_single_bytes_and_in_full_buffers(kinds: frozenset[str] | None) -> None:
    head = b"" if kinds is None else PLAIN
    frames = [head + packet(bytes([n]) * 0xFFFF) for n in range(5)] + [head + packet(), head + packet(b"end")]
    for sent, size in (frames, 1009), (frames, 1 << 20), (frames[-2:], 1):
        stream, deframer, found = b"".join(sent), tun6.Deframer(BUFFER, kinds, PERMIT_ALL), []
        wire = Wire([stream[at : at + size] for at in range(0, len(stream), size)])
        while wire.segments:
            found += deframe(deframer, wire)
        assert found == sent


@pytest.mark.parametrize("kinds", [None, BOTH])
@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (b"\x45" + bytes(39), "0x45 is no IPv6"),
        (bytes(40), "0x00 is no IPv6"),
        (b"{" + packet()[1:], "0x7b"),
        (packet(b"", HOP_BY_HOP), "jumbogram"),
    ],
)
def test_what_is_no_ipv6_packet_with_a_length_ends_the_stream(kinds: frozenset[str] | None, bad: bytes, complaint: str) -> None:
    head = b"" if kinds is None else PLAIN
    for data in head + bad, head + packet(b"good") + head + bad:
        with pytest.raises(tun6.ProtocolError, match=complaint):
            tun6.Deframer(BUFFER, kinds, PERMIT_ALL).push(data)


def test_the_end_of_the_stream_is_an_eof_error_even_within_a_frame() -> None:
    deframer = tun6.Deframer(BUFFER, None, PERMIT_ALL)
    deframer.push(packet(b"half")[:20])
    with pytest.raises(EOFError):
        deframer.pull(lambda view: 0, 1)


LONG = packet(bytes(20 + 1440 * 3), TCP)  # a TCP header without options, and three segments
GOOD_HEADERS = [
    (PLAIN, packet()),
    (offload(0, hdr_len=40), packet()),
    (offload(csum_start=40, csum_offset=16), packet(bytes(18), TCP)),  # the checksum is the last that there is
    (offload(hdr_len=60, csum_offset=6), packet(bytes(20), UDP)),
    (TSO6, LONG),
    (offload(gso_type=0x84, gso_size=1440), LONG),  # with ECN
    (USO6, packet(bytes(8 + 1452 * 3), UDP)),
    (offload(gso_type=4, gso_size=65535), LONG),
    (offload(gso_type=5, gso_size=100, csum_offset=6), packet(bytes(8 + 128 * 100), UDP)),  # UDP_MAX_SEGMENTS: the header is not data
    (offload(gso_type=4, gso_size=500), packet(bytes(32 + 128 * 500), TCP)),  # as many as gso_max_segs lets our kernel make
]


@pytest.mark.parametrize(("header", "body"), GOOD_HEADERS)
def test_offload_headers_that_a_kernel_makes_are_taken(header: bytes, body: bytes) -> None:
    tun6.check_offload(memoryview(header), len(body), BOTH)
    assert tun6.Deframer(BUFFER, BOTH, PERMIT_ALL).push(header + body) == [header + body]


BAD_HEADERS = [
    (offload(2), packet(bytes(40), TCP), "flags 0x2"),
    (offload(3), packet(bytes(40), TCP), "flags 0x3"),
    (offload(0x80), packet(bytes(40), TCP), "flags 0x80"),
    (offload(0, hdr_len=41), packet(), "hdr_len 41"),
    (offload(hdr_len=101), packet(bytes(60), TCP), "hdr_len 101"),
    (offload(csum_start=39), packet(bytes(60), TCP), "checksum at 39"),
    (offload(csum_start=0, csum_offset=50), packet(bytes(60), TCP), "checksum at 0"),
    (offload(), packet(bytes(17), TCP), "checksum at 40 . 16"),
    (offload(csum_start=65535, csum_offset=65535), packet(bytes(60), TCP), "checksum"),
    (offload(gso_type=1, gso_size=1440), LONG, "gso_type 0x1"),  # TCP over IPv4
    (offload(gso_type=3, gso_size=1440), LONG, "gso_type 0x3"),  # UFO
    (offload(gso_type=0x80, gso_size=1440), LONG, "gso_type 0x80"),
    (offload(gso_type=0x85, gso_size=1440), LONG, "gso_type 0x85"),
    (offload(0, gso_type=4, gso_size=1440), LONG, "no checksum"),
    (offload(gso_type=4, gso_size=0), LONG, "gso_size 0"),
    (offload(gso_type=4, gso_size=1), LONG, "gso_size 1 "),
    (offload(gso_type=5, gso_size=100, csum_offset=6), packet(bytes(8 + 130 * 100), UDP), "gso_size 100"),
    (offload(gso_type=4, gso_size=500), packet(bytes(20 + 130 * 500), TCP), "gso_size 500"),
    # From csum_start these are few segments; kernels before 6.11 (and stable ones of mid-2024) cut from the real header.
    (offload(gso_type=4, gso_size=5, csum_start=64_400), packet(bytes(64_960), TCP), "checksum at 64400"),
    (offload(gso_type=5, gso_size=5, csum_start=64_400, csum_offset=6), packet(bytes(64_960), UDP), "checksum at 64400"),
]


@pytest.mark.parametrize(("header", "body", "complaint"), BAD_HEADERS)
def test_any_other_offload_header_ends_the_session(header: bytes, body: bytes, complaint: str) -> None:
    with pytest.raises(tun6.ProtocolError, match=complaint):
        tun6.check_offload(memoryview(header), len(body), BOTH)
    with pytest.raises(tun6.ProtocolError, match=complaint):
        tun6.Deframer(BUFFER, BOTH, PERMIT_ALL).push(header + body)


@pytest.mark.parametrize(("header", "offered", "other"), [(TSO6, "tso6", "uso6"), (USO6, "uso6", "tso6")])
def test_a_kind_of_offload_is_taken_only_when_it_was_offered(header: bytes, offered: str, other: str) -> None:
    tun6.check_offload(memoryview(header), len(LONG), frozenset({offered}))
    for kinds in frozenset({other}), frozenset[str]():
        with pytest.raises(tun6.ProtocolError, match="not offered"):
            tun6.check_offload(memoryview(header), len(LONG), kinds)


@pytest.mark.parametrize(
    ("frame", "all_kinds", "no_kinds", "legacy"),
    [
        (PLAIN + packet(b"data"), True, True, True),
        (PLAIN + packet(), True, True, True),
        (PLAIN + packet(bytes(8), HOP_BY_HOP), True, True, True),
        (offload() + packet(bytes(60), TCP), True, True, False),  # a checksum is open
        (TSO6 + LONG, True, False, False),  # a segmentation too
        (USO6 + LONG, True, False, False),
        (offload(gso_type=1, gso_size=1440) + LONG, False, False, False),  # segments of IPv4
        (PLAIN + b"\x45" + bytes(59), False, False, False),  # IPv4
        (PLAIN + packet()[:39], False, False, False),
        (PLAIN, False, False, False),
        (b"", False, False, False),
        (PLAIN + packet(b"data")[:-1], False, False, False),
        (PLAIN + packet(b"data") + b"\0", False, False, False),
        (PLAIN + packet(b"", HOP_BY_HOP), False, False, False),  # every receiver would end the session
        (PLAIN + packet(b"", HOP_BY_HOP) + bytes(8), False, False, False),  # a jumbogram, BIG TCP
    ],
)
def test_only_packets_that_the_peer_can_take_are_sent(frame: bytes, all_kinds: bool, no_kinds: bool, legacy: bool) -> None:
    buffer = bytearray(b"\xff" * 7 + frame + b"\xff" * 60)
    for kinds, sent in ((BOTH, all_kinds), (frozenset[str](), no_kinds), (None, legacy)):
        assert tun6.is_sendable(memoryview(buffer), 7, len(frame), kinds) is sent
        assert buffer == b"\xff" * 7 + frame + b"\xff" * 60
        if sent:  # and our own receiver agrees
            packet_ = frame if kinds is not None else frame[len(PLAIN) :]
            assert tun6.Deframer(BUFFER, kinds, PERMIT_ALL).push(packet_) == [packet_]


@pytest.mark.parametrize(("flags", "left"), [(2, 0), (3, 1)])
def test_the_kernels_own_flag_is_cleared_and_keeps_no_packet_from_a_legacy_peer(flags: int, left: int) -> None:
    buffer = bytearray(offload(flags, csum_start=40 * left) + packet(bytes(60), TCP))
    assert tun6.is_sendable(memoryview(buffer), 0, len(buffer), None) is (not left)
    assert buffer[0] == left
    assert len(tun6.Deframer(BUFFER, BOTH, PERMIT_ALL).push(bytes(buffer))) == 1


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("sizes", "together"),
    [
        ([64] * 3, [3]),
        ([64, 64, 10], [3]),
        ([64, 64, 10, 10], [3, 1]),
        ([64, 65], [1, 1]),
        ([65, 64, 65, 64], [2, 2]),
        ([64, 0], [1, 1]),
        ([0, 0], [1, 1]),
        ([1, 1], [2]),
        ([64] * 130, [64, 64, 2]),
        ([1400] * 7, [5, 2]),
        ([9000, 9000], [1, 1]),
    ],
)
def test_neighbours_of_one_flow_and_size_are_joined(sizes: list[int], together: list[int], finished: bool) -> None:
    assert [len(cut_apart(frame)) for frame in join([datagram(bytes(size), finished=finished) for size in sizes])] == together


@pytest.mark.parametrize(
    "other",
    [
        datagram(bytes(64), flow=1),
        datagram(bytes(64), label=1),
        datagram(bytes(64), label=0x300000),
        datagram(bytes(64), finished=True),
        datagram(bytes(64))[:17] + b"\1" + datagram(bytes(64))[18:],  # hop limit
        datagram(bytes(64))[:55] + b"\1" + datagram(bytes(64))[56:],  # UDP's length
        damaged(datagram(bytes(64), finished=True)),
    ],
)
def test_what_differs_in_more_than_its_payload_is_not_joined(other: bytes) -> None:
    frames = [datagram(bytes(64)), other, datagram(bytes(64))]
    assert join(frames) == frames


def test_a_datagram_whose_checksum_is_wrong_stays_as_it_is_wherever_it_is() -> None:
    good = datagram(bytes(64), finished=True)
    assert [len(frame) for frame in join([good, good, damaged(good), good, damaged(good)])] == [10 + 48 + 128, *[len(good)] * 3]
    assert join([damaged(good), good]) == [damaged(good), good]


@pytest.mark.parametrize("id_", ["b827eb123456", "b8:27:eb:12:34", "b8:27-eb:12:34:5g", "greenhouse-7", "b8:27:eb:12:34:56 ", "B8"])
def test_what_is_no_mac_address_is_an_id_as_it_is(id_: str) -> None:
    assert tun6.parse_hello({"Id": id_}).id == id_


@given(st.binary(max_size=1500))
def test_the_error_for_a_refused_source_is_a_whole_packet_with_a_right_checksum(payload: bytes) -> None:
    refused = between(IPv6Address("fd00::2"), IPv6Address("2001:db8::1"), payload, UDP)
    error = cast(bytes, tun6.source_refused(memoryview(refused), subnet(1)[1]))
    assert error[:8] == struct.pack(">IHBB", 6 << 28, len(error) - 40, 58, 64)
    assert (error[8:24], error[24:40]) == (subnet(1)[1].packed, IPv6Address("fd00::2").packed)
    assert error[40:42] == b"\x01\x05"
    assert error[48:] == refused[: 1280 - 48]
    assert internet_sum(error[8:40] + struct.pack(">IxxxB", len(error) - 40, 58) + error[40:]) in (0, 0xFFFF)


@pytest.mark.parametrize(
    ("source", "destination", "payload"),
    [
        ("fd00::2", "2001:db8::1", b"\x01\x00"),  # an error is not answered by an error
        ("::", "2001:db8::1", b""),
        ("fe80::1", "2001:db8::1", b""),
        ("ff02::1", "2001:db8::1", b""),
        ("fd00::2", "ff02::16", b""),
    ],
)
def test_what_must_not_be_answered_by_an_error_is_not(source: str, destination: str, payload: bytes) -> None:
    assert tun6.source_refused(memoryview(between(IPv6Address(source), IPv6Address(destination), payload, 58)), subnet(1)[1]) is None


# ---- prefixes --------------------------------------------------------------------------------------------------------


class PoolBesideADict(RuleBasedStateMachine):
    """A PrefixPool of eight and what it should hold."""

    IDS = st.sampled_from("abcdefghij")
    NETWORK = IPv6Network("2001:db8:1::/61")
    ALL = tuple(NETWORK.subnets(new_prefix=64))

    def __init__(self) -> None:
        super().__init__()
        self.pool = tun6.PrefixPool(self.NETWORK)
        self.owned: dict[str, IPv6Network] = {}
        self.kept: dict[IPv6Network, str] = {}  # what its Id had before
        self.only_assigned = True

    @rule(id_=IDS)
    def assign(self, id_: str) -> None:
        free = [prefix for prefix in self.ALL if prefix not in (*self.owned.values(), *self.kept)]
        if id_ in self.owned or free:
            prefix = self.pool.assign(id_)
            assert prefix == self.owned.get(id_, prefix)
            assert id_ in self.owned or prefix in free
            assert id_ in self.owned or not self.only_assigned or prefix == free[0]
            self.owned[id_] = prefix
        else:
            with pytest.raises(tun6.Refusal, match=f"no free /64 in {self.NETWORK}") as caught:
                self.pool.assign(id_)
            assert caught.value.code == "pool-exhausted"

    @rule(id_=IDS, prefix=st.sampled_from(ALL))
    def pin(self, id_: str, prefix: IPv6Network) -> None:
        if {its: other for other, its in self.owned.items()}.get(prefix, id_) == self.kept.get(prefix, id_) == id_:
            self.pool.pin(id_, prefix)
            if self.owned.get(id_, prefix) != prefix:
                self.kept[self.owned[id_]] = id_
            self.kept.pop(prefix, None)
            self.owned[id_] = prefix
        else:
            with pytest.raises(ValueError, match="already"):
                self.pool.pin(id_, prefix)

    @rule(prefix=st.sampled_from(ALL))
    def unreserve(self, prefix: IPv6Network) -> None:
        self.only_assigned = self.only_assigned and prefix not in self.kept
        self.pool.unreserve(prefix)
        self.kept.pop(prefix, None)

    @rule(id_=IDS)
    def release(self, id_: str) -> None:
        self.only_assigned = False
        if id_ in self.owned:
            self.pool.release(id_)
            del self.owned[id_]
        else:
            with pytest.raises(KeyError):
                self.pool.release(id_)

    @invariant()
    def same(self) -> None:
        assert {id_: self.pool.find(id_) for id_ in "abcdefghij"} == {id_: self.owned.get(id_) for id_ in "abcdefghij"}


test_a_pool_holds_what_a_plain_dict_holds = PoolBesideADict.TestCase


@pytest.mark.parametrize(
    ("prefix", "complaint"),
    [("2001:db8:1:100::/64", "outside"), ("2001:db8:0:ffff::/64", "outside"), ("2001:db8:1::/65", "not a /64"), ("2001:db8:1::/63", "not")],
)
def test_only_a_64_of_the_pool_can_be_pinned(prefix: str, complaint: str) -> None:
    pool = tun6.PrefixPool(POOL)
    with pytest.raises(ValueError, match=complaint):
        pool.pin("a", IPv6Network(prefix))
    assert (pool.find("a"), pool.assign("b")) == (None, subnet(0))


@pytest.mark.parametrize("network", ["2001:db8::/32", "2000::/3", "2001:db8:0:7::/64"])
def test_a_pool_of_any_size_gives_its_first_64_first_and_has_its_last(network: str) -> None:
    whole = IPv6Network(network)
    last = IPv6Network((int(whole.broadcast_address) >> 64 << 64, 64))
    pool = tun6.PrefixPool(whole)  # one that kept its 2,305,843,009,213,693,952 /64s would not come back
    assert pool.assign("a") == IPv6Network((whole.network_address, 64))
    if whole.prefixlen == 64:
        with pytest.raises(tun6.Refusal):
            pool.assign("z")
        assert pool.find("z") is None
    else:
        pool.pin("z", last)
        assert pool.assign("z") == last
    assert pool.assign("a") == IPv6Network((whole.network_address, 64))


def test_what_is_kept_for_the_server_is_no_clients_until_it_is_unreserved() -> None:
    pool = tun6.PrefixPool(IPv6Network("2001:db8:1::/62"))
    pool.pin("last", subnet(3))
    assert pool.keep() == subnet(2)
    assert [pool.assign(id_) for id_ in "ab"] == [subnet(0), subnet(1)]
    with pytest.raises(tun6.Refusal, match="no free /64"):
        pool.assign("c")
    assert pool.keep() is None
    assert pool.owners() == ["last", "a", "b"]
    pool.unreserve(subnet(2))
    assert pool.assign("c") == subnet(2)
    assert tun6.PrefixPool(IPv6Network("2001:db8::/64")).keep() is None


# ---- send queue ------------------------------------------------------------------------------------------------------

TARGET, INTERVAL = tun6.CODEL_TARGET_S, tun6.CODEL_INTERVAL_S
NOT_ECT, ECT_1, ECT_0, CE = range(4)  # RFC 3168 section 5
SMALLEST = 58  # bytes of a frame that has room for its number
LARGEST = len(PLAIN) + tun6.PACKET_MAX
RATE = 2_500_000.0  # bytes a second: 20 Mbit/s
NEVER = 1e9  # seconds: as a target, no CoDel


def frame(flow: int, number: int = 0, size: int = 1510, ecn: int = NOT_ECT, header: bytes = PLAIN, next_header: int = UDP) -> bytes:
    """A frame of `size` bytes in all; `flow` stands where the ports are, `number` behind it."""
    made = bytearray(header + packet(struct.pack(">II", flow, number) + bytes(size - SMALLEST), next_header))
    made[len(header) + 1] |= ecn << 4
    return bytes(made)


Bytes = Union[bytes, bytearray, memoryview]


def flow_of(frame: Bytes) -> int:
    return int.from_bytes(frame[50:54], "big")


def number_of(frame: Bytes) -> int:
    return int.from_bytes(frame[54:58], "big")


def ecn_of(frame: Bytes) -> int:
    return frame[11] >> 4 & 3


def with_ce(frame: Bytes) -> bytes:
    """The frame with the mark CE, RFC 3168 section 5."""
    return bytes(frame[:11]) + bytes([frame[11] | 0x30]) + bytes(frame[12:])


def push(queue: tun6.FqCodelQueue, now: float, *frames: Bytes) -> None:
    for each in frames:
        queue.push(bytearray(each), now)


def pop(queue: tun6.FqCodelQueue, now: float = 0) -> bytes:
    """The next frame; there must be one."""
    out = queue.pop(now)
    assert out is not None
    return bytes(out)


def flow_states(queue: tun6.FqCodelQueue) -> int:
    """How many flows it remembers, in whatever place."""
    return len({id(flow) for flow in chain(queue._flows.values(), queue._new, queue._old, queue._long)})


def drain(queue: tun6.FqCodelQueue, now: float = 0) -> list[bytes]:
    """All that waits, as it comes out; leaves nothing behind."""
    out = [bytes(popped) for popped in iter(lambda: queue.pop(now), None)]
    assert queue.bytes == 0
    assert not flow_states(queue)
    return out


def check_arrivals(arrived: list[bytes], sent: dict[tuple[int, int], bytes], dropped: int) -> None:
    """What was sent arrived whole, at most with a mark, once and in its flow's order, or was counted as dropped.

    The keys of `sent` are flow and number, and the numbers of a flow rise.
    """
    assert len(arrived) + dropped == len(sent)
    last: dict[int, int] = {}
    for each in arrived:
        flow, number = flow_of(each), number_of(each)
        assert number > last.get(flow, -1)
        last[flow] = number
        original = sent[flow, number]
        assert each == original or (ecn_of(original) and each == with_ce(original))


class Reference:
    """RFC 8289 sections 5.5 to 5.8 as they stand there, with marking as in Linux's codel_impl.h; for one flow.

    One thing is RFC 8290's way: a flow that has become empty is forgotten.
    """

    def __init__(self) -> None:
        self.queue: deque[tuple[float, bytes]] = deque()
        self.dropped = self.marked = 0
        self.forget()

    def forget(self) -> None:
        self.first_above_time = self.drop_next = 0.0
        self.count = self.lastcount = 0
        self.dropping = False

    def dodequeue(self, now: float) -> tuple[bytes | None, bool]:
        if not self.queue:
            self.first_above_time = 0
            return None, False
        arrived, p = self.queue.popleft()
        ok_to_drop = False
        if now - arrived < TARGET or sum(len(waiting) for _, waiting in self.queue) <= tun6.QUANTUM:
            self.first_above_time = 0
        else:
            if self.first_above_time == 0:
                self.first_above_time = now + INTERVAL
            elif now >= self.first_above_time:
                ok_to_drop = True
        return p, ok_to_drop

    def dequeue(self, now: float) -> bytes | None:
        p, ok_to_drop = self.dodequeue(now)
        if p is None:
            self.forget()
            return None
        if self.dropping:
            if not ok_to_drop:
                self.dropping = False
            while self.dropping and now >= self.drop_next:
                assert p is not None
                self.count += 1
                if ecn_of(p):
                    self.drop_next += INTERVAL / self.count**0.5
                    return self.mark(p)
                self.dropped += 1
                p, ok_to_drop = self.dodequeue(now)
                if not ok_to_drop:
                    self.dropping = False
                else:
                    self.drop_next += INTERVAL / self.count**0.5
        elif ok_to_drop:
            if ecn_of(p):
                p = self.mark(p)
            else:
                self.dropped += 1
                p, _ = self.dodequeue(now)
            self.dropping = True
            delta, self.count = self.count - self.lastcount, 1
            if delta > 1 and now - self.drop_next < 16 * INTERVAL:
                self.count = delta
            self.drop_next = now + INTERVAL / self.count**0.5
            self.lastcount = self.count
        return p

    def mark(self, p: bytes) -> bytes:
        self.marked += 1
        return with_ce(p)


PHASES = st.lists(
    st.tuples(
        st.sampled_from([0.003, 0.05, 0.12, 0.3, 1.0, 2.5]),  # seconds
        st.sampled_from([0.0, 0.5, 0.95, 1.0, 1.1, 1.5, 4.0, 2, 10, 60, 200]),  # frames that arrive for one that leaves; int: that wait
        st.sampled_from([SMALLEST, 700, 1510, 20_000]),
        st.sampled_from([NOT_ECT, NOT_ECT, ECT_0, ECT_1, CE]),
        st.sampled_from([0.0, 0.0, 0.004, 0.2, 3.0]),  # the link stands still afterwards
    ),
    max_size=12,
)


@given(PHASES)
@example([(1.0, 4.0, 1510, NOT_ECT, 0.0), (2.5, 0.0, 1510, NOT_ECT, 0.0)])
@example([(1.0, 1.5, 1510, NOT_ECT, 0.0), (0.12, 0.5, 1510, NOT_ECT, 0.0)] * 3)
@example([(2.5, 4.0, 700, ECT_0, 3.0), (1.0, 1.0, 700, NOT_ECT, 0.2)])
@example([(2.5, 60, 1510, NOT_ECT, 0.0), (0.3, 10, 1510, NOT_ECT, 0.0), (1.0, 60, 1510, NOT_ECT, 0.0)])  # soon again: goes on as before
@example([(2.5, 60, 1510, NOT_ECT, 0.0), (7.0, 10, 1510, NOT_ECT, 0.0), (1.0, 60, 1510, NOT_ECT, 0.0)])  # late: begins anew
def test_what_is_dropped_and_marked_and_when_is_what_rfc_8289_says(phases: list[tuple[float, float, int, int, float]]) -> None:
    queue, reference, now, number = tun6.FqCodelQueue(limit=1 << 30), Reference(), 1000.0, 0
    for seconds, load, size, ecn_of_phase, stall in phases:
        due, end = 0.0, now + seconds
        while now < end:
            now += 0.003
            due = load - len(reference.queue) if isinstance(load, int) else due + load
            while due >= 1:
                due -= 1
                made = frame(7, number, size, ecn_of_phase)
                push(queue, now, made)
                reference.queue.append((now, made))
                number += 1
            assert queue.pop(now) == reference.dequeue(now)
            assert (queue.dropped, queue.marked) == (reference.dropped, reference.marked), now
        now += stall


def test_drops_follow_the_control_law() -> None:
    queue, now, period, drops = tun6.FqCodelQueue(), 0.0, 0.001, []
    for number in range(16_000):
        before = queue.dropped
        push(queue, now, *(frame(1, 3 * number + third, 100) for third in range(3)))
        queue.pop(now)
        drops += [now] * (queue.dropped - before)
        now += period
    assert drops[0] == pytest.approx(1.5 * TARGET + INTERVAL, abs=2 * period)  # thrice the link's rate: one that waits 50 ms leaves at 75
    for number in range(1, 200):
        expected = drops[0] + sum(INTERVAL / math.sqrt(nth) for nth in range(1, number + 1))
        assert drops[number] == pytest.approx(expected, abs=2 * period)


class Delivery(NamedTuple):
    flow: int
    number: int
    size: int  # bytes
    sent: float  # when it was pushed
    waited: float  # until its first byte went onto the link
    ecn: int


class Link:
    """A link with a FqCodelQueue before it, in time of its own. All that goes over it is in `deliveries`."""

    def __init__(self, queue: tun6.FqCodelQueue, rate: float = RATE) -> None:
        self.queue, self.rate, self.now = queue, rate, 0.0
        self.deliveries: list[Delivery] = []
        self.receivers: dict[int, Callable[[Delivery], None]] = {}  # by flow
        self._pushed: dict[tuple[int, int], float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial, self._busy = count(), False

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._serial), action))

    def send(self, data: bytes) -> None:
        self._pushed[flow_of(data), number_of(data)] = self.now
        push(self.queue, self.now, data)
        if not self._busy:
            self._serve()

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def delivered(self, flow: int, since: float = 0) -> list[Delivery]:
        return [each for each in self.deliveries if each.flow == flow and each.sent >= since]

    def _serve(self) -> None:
        out = self.queue.pop(self.now)
        self._busy = out is not None
        if out is None:
            return
        flow, number = flow_of(out), number_of(out)
        sent = self._pushed.pop((flow, number))
        done = Delivery(flow, number, len(out), sent, self.now - sent, ecn_of(out))
        self.deliveries.append(done)
        self.at(self.now + len(out) / self.rate, self._serve)
        if flow in self.receivers:
            self.receivers[flow](done)


@pytest.mark.parametrize(("drained_in", "loses"), [(0.04, False), (TARGET + INTERVAL - 0.002, False), (TARGET + INTERVAL + 0.06, True)])
def test_a_burst_passes_if_within_an_interval_it_is_below_the_target_again(drained_in: float, loses: bool) -> None:
    link = Link(tun6.FqCodelQueue())
    burst = int(drained_in * RATE / 1510)
    for number in range(burst):
        link.send(frame(1, number))
    link.run(10)
    # All arrive at once, so that each has waited longer than the one before: the first that waits too long begins the interval.
    assert (link.queue.dropped > 0) == loses
    assert len(link.deliveries) == burst - link.queue.dropped


@pytest.mark.parametrize(("round_trip", "loses"), [(0.0, True), (0.04, True), (0.2, False)])
def test_an_interval_lasts_for_three_round_trips_of_the_path_at_least(round_trip: float, loses: bool) -> None:
    link = Link(tun6.FqCodelQueue())
    link.queue.set_round_trip(round_trip)
    for number in range(int((TARGET + 2.5 * 0.2) * RATE / 1510)):
        link.send(frame(1, number))
    link.run(10)
    assert (link.queue.dropped > 0) == loses


@pytest.mark.parametrize(("round_trip", "loses"), [(0.0, True), (0.05, True), (0.15, False)])
def test_a_queue_of_one_round_trip_of_the_path_may_stand(round_trip: float, loses: bool) -> None:
    link = Link(tun6.FqCodelQueue())
    link.queue.set_round_trip(round_trip)
    for number in range(int(0.1 * RATE / 1510)):
        link.send(frame(1, number))
    for number in range(1000, 2000):
        link.at((number - 1000) * 1510 / RATE, functools.partial(link.send, frame(1, number)))
    link.run(10)
    assert (link.queue.dropped > 0) == loses


class Window:
    """A source like TCP: slow start, then additive increase; at a loss or mark it halves its window, once a round trip."""

    def __init__(self, link: Link, flow: int, round_trip: float, size: int = 1510, ecn: int = NOT_ECT) -> None:
        self._link, self._flow, self._round_trip, self._size, self._ecn = link, flow, round_trip, size, ecn
        self.window, self.slow_start, self._recover = 10.0, True, 0
        self._next = self._expected = 0
        link.receivers[flow] = lambda done: link.at(link.now + round_trip, lambda: self._acknowledged(done))
        link.at(0, self._send)

    def _send(self) -> None:
        while self._next - self._expected < self.window:
            self._next += 1
            self._link.send(frame(self._flow, self._next - 1, self._size, self._ecn))

    def _acknowledged(self, done: Delivery) -> None:
        congested = done.number > self._expected or (done.ecn == CE and self._ecn != CE)
        self._expected = done.number + 1
        if congested and done.number >= self._recover:
            self.window, self.slow_start, self._recover = max(2.0, self.window / 2), False, self._next
        elif not congested:
            self.window += 1 if self.slow_start else 1 / self.window
        self._send()


@pytest.mark.parametrize("size", [500, 1510, 6000])
@pytest.mark.parametrize("marks", [False, True])
def test_the_standing_queue_of_a_tcp_is_brought_to_about_the_target_and_the_link_stays_busy(marks: bool, size: int) -> None:
    link = Link(tun6.FqCodelQueue())
    Window(link, 1, 0.03, size, ECT_0 if marks else NOT_ECT)
    link.run(30)
    late = link.delivered(1, since=5)
    assert 0.2 * TARGET < statistics.median(each.waited for each in late) < 1.5 * TARGET
    assert max(each.waited for each in late) < TARGET + 2 * INTERVAL
    assert sum(each.size for each in late) / 25 > 0.95 * RATE
    assert bool(link.queue.marked) == marks
    assert bool(link.queue.dropped) != marks
    assert any(each.ecn == CE for each in late) == marks


def test_without_codel_that_queue_would_be_several_times_as_long() -> None:
    link = Link(tun6.FqCodelQueue(target=NEVER, limit=1 << 20))
    Window(link, 1, 0.03)
    link.run(30)
    assert statistics.median(each.waited for each in link.delivered(1, since=5)) > 4 * TARGET


class Regular:
    """A source that sends a frame every `period`, whatever happens to them."""

    def __init__(self, link: Link, flow: int, period: float, size: int = 1510, start: float = 0) -> None:
        self._link, self._flow, self._period, self._size = link, flow, period, size
        self._numbers = count()
        link.at(start, self._send)

    def _send(self) -> None:
        self._link.send(frame(self._flow, next(self._numbers), self._size))
        self._link.at(self._link.now + self._period, self._send)


def test_a_source_that_does_not_slow_down_is_cut_to_the_rate_of_the_link() -> None:
    link = Link(tun6.FqCodelQueue(interval=0.1))
    Regular(link, 1, 1510 / (1.1 * RATE))
    link.run(40)
    assert max(each.waited for each in link.delivered(1, since=20)) < TARGET + 0.1
    assert link.queue.bytes < (TARGET + 0.1) * RATE


@pytest.mark.parametrize("header", [PLAIN, TSO6, USO6])
@pytest.mark.parametrize("codepoint", [NOT_ECT, ECT_1, ECT_0, CE])
def test_what_knows_ecn_is_marked_and_nothing_else_in_it_changes_and_what_does_not_is_dropped(codepoint: int, header: bytes) -> None:
    queue = tun6.FqCodelQueue()
    sent = [bytearray(frame(1, number, 1510, codepoint, header)) for number in range(100)]
    for each in sent:
        each[10] |= 0x0B  # all other bits of traffic class and flow label, which share bytes with it
        each[11] |= 0xCF if number_of(each) % 2 else 0
    push(queue, 0, *sent)
    out = [pop(queue, TARGET + step * INTERVAL) for step in range(5)]
    if codepoint == NOT_ECT:
        assert (queue.dropped, queue.marked) == (len(sent) - 5 - len(drain(queue, 0)), 0)
        assert set(out) <= {bytes(each) for each in sent}
        assert queue.dropped >= 4
    else:
        assert (queue.dropped, queue.marked) == (0, 4)
        assert out == [bytes(sent[0]), *map(with_ce, sent[1:5])]


@pytest.mark.parametrize("bulks", [1, 8])
@pytest.mark.parametrize("size", [1510, LARGEST])
def test_a_ping_waits_only_for_the_frame_that_is_on_the_link(size: int, bulks: int) -> None:
    link = Link(tun6.FqCodelQueue(target=NEVER))  # the bulk flows never become empty, and so never new again
    for flow in range(bulks):
        Regular(link, flow, size / RATE, size)
    Regular(link, 99, 0.3, 114, start=1.234)  # after the time in which all flows are new; sparse: a round of 8 largest takes 0.21 s
    link.run(6)
    pings = link.delivered(99)
    assert [ping.number for ping in pings] == list(range(16))
    assert max(ping.waited for ping in pings) <= (size + 114) / RATE + 1e-9


@pytest.mark.parametrize("sizes", [(1510, 1510), (1510, LARGEST), (100, 1510), (SMALLEST, LARGEST), (LARGEST, LARGEST, 9000, 200)])
def test_bulk_flows_share_by_bytes_whatever_the_size_of_their_frames(sizes: tuple[int, ...]) -> None:
    queue, got = tun6.FqCodelQueue(target=NEVER, limit=1 << 40), [0] * len(sizes)
    for flow, size in enumerate(sizes):
        push(queue, 0, *[frame(flow, size=size)] * 3)
    while sum(got) < 3_000_000:
        out = pop(queue)
        got[flow_of(out)] += len(out)
        push(queue, 0, out)
        assert max(got) - min(got) <= max(sizes) + 2 * tun6.QUANTUM


def test_a_flow_gains_nothing_by_being_empty_again_and_again() -> None:
    queue, got = tun6.FqCodelQueue(target=NEVER), Counter[int]()
    push(queue, 0, *[frame(1, size=SMALLEST)] * 3)
    for _ in range(10_000):
        out = pop(queue)
        got[flow_of(out)] += len(out)
        if flow_of(out) == 1:
            push(queue, 0, out)
            if queue.bytes < 1510:  # the other has nothing here and has just been found empty
                push(queue, 0, frame(2))
    assert got[2] == pytest.approx(got[1], rel=0.1)


class RoundByRound(tun6.FqCodelQueue):
    """Does each round by itself, as in RFC 8290."""

    def _skip_rounds(self) -> None:
        pass


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([SMALLEST, 100, 1510, 5000, LARGEST]), st.booleans()), max_size=100))
def test_rounds_that_are_done_at_once_change_no_order(frames: list[tuple[int, int, bool]]) -> None:
    queue, reference = tun6.FqCodelQueue(target=NEVER), RoundByRound(target=NEVER)
    for number, (flow, size, pops) in enumerate(frames):
        for each in queue, reference:
            push(each, 0.0, frame(flow, number, size))
        if pops:
            assert queue.pop(0.0) == reference.pop(0.0)
    while queue.frames:
        assert queue.pop(0.0) == reference.pop(0.0)


@pytest.mark.parametrize("sizes", [(1510, 1510), (1510, 9000), (1510, LARGEST)])
def test_two_tcps_share_the_link_however_unlike_their_frames(sizes: tuple[int, int]) -> None:
    link = Link(tun6.FqCodelQueue(), 4 * RATE)
    for flow, size in enumerate(sizes):
        Window(link, flow, 0.03, size)
    link.run(30)
    shares = [sum(each.size for each in link.delivered(flow, since=5)) for flow in (0, 1)]
    assert min(shares) > 0.4 * sum(shares)


PORTS = 0x12345678  # source and destination port


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (frame(PORTS), frame(PORTS, number=1, size=999, ecn=CE, header=USO6), True),
        (frame(PORTS), frame(PORTS + 1), False),
        (frame(PORTS), frame(0x92345678), False),
        (frame(PORTS, next_header=TCP), frame(PORTS), False),
        (frame(PORTS, next_header=58), frame(PORTS, next_header=58, number=1 << 15), True),  # the same echo Id, another sequence number
        (frame(PORTS, next_header=58), frame(PORTS, next_header=58, number=1 << 16), False),
        (frame(PORTS, next_header=44), frame(1, next_header=44), True),  # fragments of one packet stay in order: their Id is no port
        (frame(PORTS), frame(PORTS)[:20] + b"\1" + frame(PORTS)[21:], False),  # addresses
        (frame(PORTS), frame(PORTS)[:49] + b"\3" + frame(PORTS)[50:], False),
        (PLAIN + packet(b"", TCP), PLAIN + packet(b"ab", TCP), False),  # too short for ports
    ],
)
def test_a_flow_has_addresses_next_header_and_ports_in_common(one: bytes, other: bytes, same: bool) -> None:
    queue = tun6.FqCodelQueue()
    push(queue, 0, one, other)
    assert flow_states(queue) == 2 - same


@given(
    st.lists(
        st.tuples(
            st.integers(0, 12),
            st.sampled_from([SMALLEST, 100, 1510, 9000, LARGEST]),
            st.integers(0, 3),
            st.sampled_from([0, 0.01, 0.07, 0.3]),
        ),
        max_size=150,
    ),
    st.sampled_from([5000, 100_000, 1 << 30]),
    st.sampled_from([1, 4, 1024]),
)
def test_what_is_pushed_comes_out_or_counts_as_dropped(operations: list[tuple[int, int, int, float]], limit: int, flows_max: int) -> None:
    with mock.patch.object(tun6, "FLOWS_MAX", flows_max):
        queue = tun6.FqCodelQueue(limit=limit)
        pushed: dict[tuple[int, int], bytes] = {}
        popped: list[bytes] = []
        now = 0.0
        for number, (flow, size, pops, pause) in enumerate(operations):
            now += pause
            pushed[flow, number] = frame(flow, number, size)
            push(queue, now, pushed[flow, number])
            assert queue.bytes <= limit
            popped += [bytes(out) for out in (queue.pop(now) for _ in range(pops)) if out is not None]
            assert flow_states(queue) <= min(2 * flows_max, 13)
            waiting = len(pushed) - len(popped) - queue.dropped
            assert waiting * SMALLEST <= queue.bytes <= waiting * LARGEST
        waiting_bytes, dropped = queue.bytes, queue.dropped
        rest = drain(queue, now)
        if queue.dropped == dropped:
            assert waiting_bytes == sum(map(len, rest))
    check_arrivals(popped + rest, pushed, queue.dropped)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([SMALLEST, 500, 1510, 9000, LARGEST]), st.booleans()), max_size=200))
@example([(100, 1510, False)] * 20 + [(1, 1510, False)] * 4)  # the other flow never has half of what the long one has
@example([(100, SMALLEST, False)] * 400 + [(flow, SMALLEST, False) for flow in range(50)])
@example([(flow, 1000, False) for flow in range(5)] + [(9, LARGEST, False)])
@example([(9, LARGEST, False), (1, 500, False)])
def test_who_loses_had_half_of_what_the_longest_had_and_loses_its_oldest(operations: list[tuple[int, int, bool]]) -> None:
    limit = 20_000
    queue, waiting, dropped = tun6.FqCodelQueue(target=NEVER, limit=limit), defaultdict[int, deque[bytes]](deque), 0
    for number, (flow, size, pops) in enumerate(operations):
        made = frame(flow, number, size)
        waiting[flow].append(made)
        push(queue, 0, made)
        left = {flow_of(state.frames[0][1]): state.bytes for state in queue._flows.values() if state.frames}
        lengths = {flow: sum(map(len, frames)) for flow, frames in waiting.items()}
        lost = []
        for loser in (flow for flow, length in lengths.items() if left.get(flow, 0) < length):
            assert 2 * lengths[loser] >= max(lengths.values()), "the first to lose"
            while left.get(loser, 0) < sum(map(len, waiting[loser])):
                lost.append(waiting[loser].popleft())
        assert queue.bytes <= limit
        assert not lost or queue.bytes + max(map(len, lost)) > limit, "no more is lost than has to be"
        dropped += len(lost)
        assert queue.dropped == dropped
        if pops and queue.bytes:
            out = pop(queue)
            assert waiting[flow_of(out)].popleft() == out
    for out in drain(queue):
        assert waiting[flow_of(out)].popleft() == out
    assert not any(waiting.values())


def test_a_new_flow_in_each_frame_neither_grows_the_state_nor_keeps_the_old_flows_from_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun6, "FLOWS_MAX", 64)
    queue, bulk, most = tun6.FqCodelQueue(target=NEVER), 0, 0
    push(queue, 0, *(frame(1 << 31, number) for number in range(1000)))
    pop(queue)
    pop(queue)  # now it is an old flow
    for number in range(20_000):
        push(queue, 0, frame(number, size=SMALLEST), frame(1 << 30 | number, size=SMALLEST))
        bulk += len(pop(queue)) > SMALLEST
        most = max(most, len(queue._flows))
    assert most <= 2 * tun6.FLOWS_MAX
    round_ = most * (tun6.QUANTUM // SMALLEST + 2)  # frames, when each flow takes its turn
    assert bulk >= 20_000 // round_
    drain(queue)


def test_a_new_flow_in_each_frame_does_not_make_a_full_queue_look_at_all_flows_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    class Counted(tun6.FlowQueue):
        __slots__ = ()

        def __getattribute__(self, attribute: str) -> Any:
            nonlocal looks
            looks += attribute == "bytes"
            return super().__getattribute__(attribute)

    monkeypatch.setattr(tun6, "FlowQueue", Counted)
    queue = tun6.FqCodelQueue(limit=4000 * SMALLEST)
    push(queue, 0, *(frame(number, size=SMALLEST) for number in range(4000)))
    looks = 0
    push(queue, 0, *(frame(number, size=SMALLEST) for number in range(5000, 7000)))
    assert queue.dropped == 2000
    assert looks < 2000 * 50


@pytest.mark.parametrize("size", [SMALLEST, 1510])
def test_queues_that_share_a_bound_keep_it_in_memory_too_however_small_their_frames_are(size: int) -> None:
    bound = 4 << 20
    tracemalloc.start()
    try:
        shared = tun6.SharedBuffer(bound)
        queues = [tun6.FqCodelQueue(shared=shared) for _ in range(10)]
        while not all(queue.dropped for queue in queues):
            for queue in queues:
                queue.push(bytearray(frame(1, 0, size)), time.monotonic())
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bound / 2 < used < 1.25 * bound
    for queue in queues:
        queue.clear()
    assert shared.free == shared.size == bound


class Connection:
    """A connection that takes at each write as many bytes as `takes` says, and then everything; at 0 it is full.

    What is written to a bare peer has to be one packet, or the rest of one that was taken in part. If the connection `encrypts`,
    each record is its number and the bytes reversed, and all records have to be written in their order.
    """

    def __init__(self, takes: Iterable[int] = (), bare: bool = False, encrypts: bool = False) -> None:
        self.takes, self._bare, self._encrypts = list(takes), bare, encrypts
        self.stream = bytearray()
        self.pieces: list[Bytes] = []  # what was to be encrypted, or to be written if nothing is encrypted
        self._records = bytearray()
        self._rest = b""

    def send_queue(self, clock: Callable[[], float] = lambda: 0.0, whole_batches: bool = True) -> tun6.SendQueue:
        """The queue before this connection."""
        encrypt = self._encrypt if self._encrypts else None
        return tun6.SendQueue(self._write, self._bare, encrypt, clock=clock, whole_batches=whole_batches)

    def received(self) -> list[bytes]:
        """What the peer makes of it, with offload headers, which a bare peer has not seen."""
        assert not self._encrypts or self.stream == self._records
        stream, out = b"".join(self.pieces) if self._encrypts else bytes(self.stream), []
        deframer = tun6.Deframer(BUFFER, None if self._bare else BOTH, PERMIT_ALL)
        for at in range(0, len(stream), tun6.MESSAGE_MAX):
            out += [self._bare * PLAIN + bytes(cut) for cut in deframer.push(stream[at : at + tun6.MESSAGE_MAX])]
        assert sum(map(len, out)) == len(stream) + self._bare * len(out) * len(PLAIN)  # no part of a frame is left
        return out

    def _encrypt(self, data: Bytes) -> bytes:
        assert len(data)
        record = bytes([len(self.pieces) % 256]) + bytes(data)[::-1]
        self.pieces.append(bytes(data))
        self._records += record
        return record

    def _write(self, data: memoryview) -> int | None:
        assert len(data)
        if self._encrypts:
            begin = len(self.stream)
            assert data == self._records[begin : begin + len(data)], "what is written is not what was encrypted, in its order"
        else:
            self.pieces.append(data)
            assert not self._bare or data == self._rest or (not self._rest and len(data) == packet_length(bytes(data)))
        took = min(self.takes.pop(0), len(data)) if self.takes else len(data)
        self.stream += data[:took]
        if took:
            self._rest = bytes(data[took:])
        return took or None


def flush_all(send_queue: tun6.SendQueue) -> None:
    while send_queue.blocked:
        send_queue.flush()


SOME_FRAMES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([SMALLEST, 100, 1510, 5000, LARGEST]),
        st.sampled_from([NOT_ECT, NOT_ECT, ECT_0]),
        st.sampled_from([PLAIN, PLAIN, USO6]),
    ),
    min_size=1,
    max_size=8,
)
TAKES = st.lists(st.sampled_from([0, 0, 1, 39, 58, 1500, 1510, 4000, 100_000, 1 << 20]) | st.integers(0, 10_000), max_size=60)
Steps = list[tuple[Optional[list[tuple[int, int, int, bytes]]], float]]  # frames as of SOME_FRAMES, None for a flush; seconds before
STEPS = st.lists(st.tuples(st.none() | SOME_FRAMES, st.sampled_from([0, 0.02, 0.06, 0.2])), max_size=30)
EACH_WAY = pytest.mark.parametrize(("encrypts", "whole_batches"), [(False, True), (True, True), (True, False)])


@EACH_WAY
@given(steps=STEPS, takes=TAKES, bare=st.booleans())
def test_what_is_not_dropped_arrives_whole_in_order(
    encrypts: bool, whole_batches: bool, steps: Steps, takes: list[int], bare: bool
) -> None:
    connection, now = Connection(takes, bare, encrypts), 0.0
    send_queue = connection.send_queue(lambda: now, whole_batches)
    sent: dict[tuple[int, int], bytes] = {}
    for kinds, pause in steps:
        now += pause
        if kinds is None:
            send_queue.flush()
            continue
        frames = [frame(flow, len(sent) + at, size, ecn, PLAIN if bare else header) for at, (flow, size, ecn, header) in enumerate(kinds)]
        sent.update(((flow_of(each), number_of(each)), each) for each in frames)
        view, ends = batch(frames)
        send_queue.send(view, ends)
        view[:] = bytes(len(view))  # the pump uses its buffer again
    flush_all(send_queue)
    check_arrivals(connection.received(), sent, send_queue.dropped)


@pytest.mark.parametrize("encrypts", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_while_the_connection_takes_everything_a_batch_is_sent_at_once(bare: bool, encrypts: bool) -> None:
    connection = Connection([], bare, encrypts)
    send_queue = connection.send_queue(clock=lambda: pytest.fail("nothing waits: no need to know the time"))
    frames = [frame(flow, size=size) for flow, size in enumerate([1510, LARGEST, SMALLEST, 100])]
    pieces = [each[10:] for each in frames] if bare else [b"".join(frames)]
    for times in range(1, 4):
        view, ends = batch(frames)
        send_queue.send(view, ends)
        assert not send_queue.blocked
        assert connection.pieces == pieces * times
        assert encrypts or all(memoryview(piece).obj is view.obj for piece in connection.pieces[-len(pieces) :]), "it was copied"
    assert connection.received() == frames * 3


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("takes", [[0], [1, 0], [1500, 0], [1510, 0], [3000, 0], [1500, 1500, 0], [4529, 0]])
def test_it_is_blocked_from_the_first_byte_that_is_not_taken_until_the_last(takes: list[int], bare: bool) -> None:
    connection = Connection(takes, bare)
    send_queue = connection.send_queue()
    frames = [frame(1, number) for number in range(3)]
    send_queue.send(*batch(frames))
    assert send_queue.blocked
    connection.takes = [0]
    send_queue.flush()
    assert send_queue.blocked
    late = frame(1, 3)
    send_queue.send(*batch([late]))  # does not overtake
    send_queue.flush()
    assert not send_queue.blocked
    assert not flow_states(send_queue.queue)
    assert connection.received() == [*frames, late]
    connection.pieces.clear()
    send_queue.send(*batch([late]))
    assert (len(connection.pieces), send_queue.blocked) == (1, False)  # straight through again


@EACH_WAY
def test_what_arrives_while_much_waits_is_behind_only_a_little(encrypts: bool, whole_batches: bool) -> None:
    connection = Connection([0], encrypts=encrypts)
    send_queue = connection.send_queue(whole_batches=whole_batches)
    send_queue.send(*batch([frame(9)]))  # is encrypted at once, with whole_batches
    send_queue.send(*batch([frame(1, number) for number in range(150)]))
    connection.takes = [1, 0]
    send_queue.flush()
    assert not encrypts or sum(map(len, connection.pieces)) <= tun6.FLUSH_BYTES + 1510
    send_queue.send(*batch([frame(2, size=114)]))
    flush_all(send_queue)
    before = [flow_of(each) for each in connection.received()].index(2)
    assert before * 1510 <= tun6.FLUSH_BYTES + 1510


def test_without_whole_batches_nothing_is_encrypted_before_the_flush_and_the_urgent_goes_first() -> None:
    connection = Connection(encrypts=True)
    send_queue = connection.send_queue(whole_batches=False)
    send_queue.send(*batch([frame(1, number) for number in range(100)]))
    send_queue.send(*batch([frame(2, size=114)]))
    assert (send_queue.blocked, connection.pieces) == (True, [])
    flush_all(send_queue)
    order = [flow_of(each) for each in connection.received()]
    assert order.index(2) * 1510 <= tun6.QUANTUM + 1510
    assert max(map(len, connection.pieces)) < tun6.FLUSH_BYTES + 1510


def test_one_flush_writes_about_a_batch_so_that_others_get_their_turn() -> None:
    connection = Connection([0] * 3)
    send_queue = connection.send_queue()
    for first in range(0, 600, 200):
        send_queue.send(*batch([frame(1, number) for number in range(first, first + 200)]))
    connection.takes.clear()
    flushes = 0
    while send_queue.blocked:
        before = len(connection.stream)
        send_queue.flush()
        flushes += 1
        assert 0 < len(connection.stream) - before <= tun6.BATCH_BYTES + tun6.FLUSH_BYTES + LARGEST
    assert flushes > 2
    assert len(connection.received()) == 600


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("whole_batches", [False, True])
def test_real_tls_records_of_large_batches_arrive_whole(whole_batches: bool, version: ssl.TLSVersion, cert: Path) -> None:
    context = tun6.client_tls_context(pinned=True)
    context.minimum_version = context.maximum_version = version
    sender, receiver, to_server = tls_pair(context, cert)
    rng, link = random.Random(1), bytearray()

    def encrypt(data: Bytes) -> bytes:
        sender.write(data)
        return to_server.read()

    def write(data: memoryview) -> int | None:
        took = rng.choice([0, 1, 5, 1000, 20_000, 1 << 20])
        link.extend(data[:took])
        return min(took, len(data)) or None

    send_queue = tun6.SendQueue(write, False, encrypt, clock=lambda: 0.0, whole_batches=whole_batches)
    sent, came = b"", b""
    for number in range(20):
        frames = [frame(1, number * 30 + at, size) for at, size in enumerate([1510, LARGEST, LARGEST, SMALLEST])]
        sent += b"".join(frames)
        send_queue.send(*batch(frames))
        flush_all(send_queue)
    to_server.write(bytes(link))
    with suppress(ssl.SSLWantReadError):
        while data := receiver.read(1 << 16):
            came += data
    assert came == sent


@pytest.mark.parametrize(("size", "flows"), [(LARGEST, 1), (LARGEST, 1 << 20), (1510, 1 << 20), (SMALLEST, 1), (SMALLEST, 1 << 20)])
def test_however_long_the_connection_is_full_memory_is_bounded(size: int, flows: int) -> None:
    send_queue = tun6.SendQueue(lambda _: None, False, clock=lambda: 0.0)
    total = max(1, int(1.25 * tun6.SEND_QUEUE_MAX) // (size * 500)) * 500 if size < LARGEST else 100
    batches = [
        batch([frame(number % flows, number, size) for number in range(first, min(first + 500, total))]) for first in range(0, total, 500)
    ]
    tracemalloc.start()
    try:
        for view, ends in batches:
            send_queue.send(view, ends)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert send_queue.dropped
    assert 0.9 * tun6.SEND_QUEUE_MAX < send_queue.queue.bytes <= tun6.SEND_QUEUE_MAX
    state = 200 * (total - send_queue.dropped) + 2 * tun6.FLOWS_MAX * 1500  # bytes a frame, and a flow
    assert taken < 1.2 * send_queue.queue.bytes + state


MBIT = 1_000_000


def segments_of(frame: bytes) -> int:
    """Bytes of the packets of a frame on a link without offload, by cutting it apart."""
    return sum(map(len, cut_apart(frame)))


@pytest.mark.parametrize("datagrams", [1, 2, 3, 4])
@pytest.mark.parametrize("last", [1, 999, 1000])
def test_a_large_packet_counts_as_its_segments_do(datagrams: int, last: int) -> None:
    (joined,) = join([datagram(bytes(1000))] * (datagrams - 1) + [datagram(bytes(last))])
    assert tun6.count_bytes(bytearray(joined)) == segments_of(joined) == datagrams * 48 + (datagrams - 1) * 1000 + last
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 8 << 4, 0x10, 5, 0, 0) + bytes(12)  # with timestamps
    large = offload(1, tun6.GSO_TCPV6, 72, 1000) + packet(tcp + bytes(1000 * (datagrams - 1) + last), TCP)
    assert tun6.count_bytes(bytearray(large)) == datagrams * 72 + (datagrams - 1) * 1000 + last


@given(st.binary(min_size=50, max_size=120))
@example(offload(1, tun6.GSO_TCPV6, 0, 100, 40, 0) + packet(bytes(4)))
def test_no_large_packet_that_was_let_in_upsets_the_count(data: bytes) -> None:
    made = bytearray(data)
    made[10], made[14:16] = 0x60, struct.pack(">H", len(made) - 50)
    try:
        tun6.check_offload(memoryview(made)[:10], len(made) - 10, BOTH)
    except tun6.ProtocolError:
        return
    assert tun6.count_bytes(made) >= len(made) - 10


def pop_all(limit: tun6.RateLimit, queue: tun6.FqCodelQueue, now: float) -> list[bytearray]:
    """What may leave at this time."""
    return list(iter(lambda: limit.pop(queue, now), None))


@pytest.mark.parametrize(
    ("bits", "size", "header"),
    [
        (MBIT, 110, PLAIN),
        (MBIT, 1510, PLAIN),
        (MBIT, 60_010, USO6),
        (10 * MBIT, 1510, PLAIN),
        (100 * MBIT, 60_010, PLAIN),
        (1000 * MBIT, 60_010, PLAIN),
        (1000 * MBIT, 60_010, USO6),
    ],
)
def test_a_limit_is_exact_however_late_the_event_loop_comes(bits: int, size: int, header: bytes) -> None:
    limit, queue, rng = tun6.RateLimit(bits), tun6.FqCodelQueue(target=NEVER, limit=1 << 30), random.Random(bits + size)
    each, now, moved = tun6.count_bytes(bytearray(frame(1, 0, size, header=header))), 100.0, 0
    while now < 105:
        push(queue, now, *[frame(1, 0, size, header=header)] * (1 + int(bits * tun6.CATCH_UP_S / 8 / each) - queue.frames + 1))
        moved += each * len(pop_all(limit, queue, now))
        assert 0 < limit.pause(now) <= tun6.PAUSE_MAX_S
        now += limit.pause(now) + rng.uniform(0, 0.8 * tun6.CATCH_UP_S)
    late = bits / 8 * tun6.CATCH_UP_S
    assert bits / 8 * 5 - each - late <= moved <= bits / 8 * 5 + each + late
    assert abs(moved / (bits / 8 * 5) - 1) < 0.05 or each > bits / 8 * 0.1


@pytest.mark.parametrize("bits", [MBIT, 50 * MBIT])
def test_after_idleness_there_is_no_burst_and_a_long_stall_is_not_made_up_for(bits: int) -> None:
    def most(seconds: float) -> int:
        return int(bits * seconds / 8 / 1500)

    limit, queue = tun6.RateLimit(bits), tun6.FqCodelQueue(target=NEVER, limit=1 << 30)
    for now in (10.0, 20.0, 100.0):
        push(queue, now, *(frame(1, number) for number in range(1000)))
        assert len(pop_all(limit, queue, now)) in (1 + most(tun6.BURST_S), 2 + most(tun6.BURST_S))  # the second is of its first quantum
        assert len(pop_all(limit, queue, now + 5)) == 1 + most(tun6.CATCH_UP_S)
        queue.clear()
        assert pop_all(limit, queue, now + 6) == []


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.2, 3.0]),  # seconds before
        st.sampled_from([SMALLEST, 1510, 20_000, LARGEST]),
        st.integers(0, 30),  # frames
        st.sampled_from(["one flow", "new flows", "at once"]),
    ),
    max_size=40,
)


@given(ARRIVALS, st.sampled_from([MBIT // 10, MBIT, 30 * MBIT, 1000 * MBIT]))
@example([(0.0, LARGEST, 9, "at once")] * 40, 1000 * MBIT)
@example([(0.0, 1510, 1, "new flows")] * 100, MBIT)
def test_at_no_time_does_more_leave_than_the_limit_and_what_was_late_permit(arrivals: list[tuple[float, int, int, str]], bits: int) -> None:
    limit, queue, now, left, flows = tun6.RateLimit(bits), tun6.FqCodelQueue(target=NEVER), 50.0, [(50.0, 0)], count(1)
    for pause, size, frames, kind in arrivals:
        now += pause
        if kind == "at once":
            if not queue.frames and limit.admits(frames * (size - 10), now):
                left.append((now, frames * (size - 10)))
        else:
            push(queue, now, *(frame(next(flows) if kind == "new flows" else 0, number, size) for number in range(frames)))
        left += [(now, len(each) - 10) for each in pop_all(limit, queue, now)]
    for at, (begin, _) in enumerate(left):
        moved = 0
        for end, size in left[at:]:
            assert moved <= bits / 8 * (end - begin + tun6.CATCH_UP_S) + tun6.PACKET_MAX + 1
            moved += size


def test_a_sparse_flow_does_not_wait_for_the_time_of_a_large_packet() -> None:
    limit, queue, now = tun6.RateLimit(MBIT), tun6.FqCodelQueue(), 10.0
    push(queue, now, *(frame(1, number, LARGEST) for number in range(3)))
    assert [len(each) for each in pop_all(limit, queue, now)] == [LARGEST]
    for number in range(5):
        now += 0.05
        push(queue, now, frame(2, number, 100))
        assert [flow_of(each) for each in pop_all(limit, queue, now)] == [2]
    now = 10.0 - tun6.BURST_S + 8 * (tun6.PACKET_MAX + 5 * 90) / MBIT - 0.001
    assert pop_all(limit, queue, now) == []
    assert [flow_of(each) for each in pop_all(limit, queue, now + 0.002)] == [1]


@EACH_WAY
@pytest.mark.parametrize("bare", [False, True])
def test_a_limit_can_be_set_changed_and_removed_while_frames_wait(encrypts: bool, whole_batches: bool, bare: bool) -> None:
    connection, now, number = Connection([], bare, encrypts), 100.0, 0
    send_queue = connection.send_queue(lambda: now, whole_batches)

    def moved(seconds: float) -> float:
        """Mbit/s that go out in the next seconds, of more than can."""
        nonlocal now, number
        before, end = len(connection.received()), now + seconds
        while now < end:
            send_queue.send(*batch([frame(1, number + n) for n in range(10)]))
            number += 10
            while send_queue.blocked and not send_queue.pause():
                send_queue.flush()
            now += min(max(send_queue.pause(), 0.002), 0.01)
        return (len(connection.received()) - before) * 1500 * 8 / seconds / MBIT

    assert moved(0.02) >= 24
    for mbit in (1, 10, 2):
        send_queue.set_limit(tun6.RateLimit(mbit * MBIT))
        assert send_queue.takes_large is False
        assert moved(0.5) == pytest.approx(mbit, rel=0.05, abs=0.03)
    assert send_queue.blocked
    send_queue.set_limit(None)
    assert send_queue.pause() == 0
    flush_all(send_queue)
    pieces = len(connection.pieces)
    assert moved(0.02) >= 24
    assert bare or not whole_batches or len(connection.pieces) <= pieces + 11  # again a batch is one write
    assert send_queue.takes_large
    assert len(connection.received()) + send_queue.dropped == number


def test_under_its_limit_nothing_waits_and_a_full_connection_is_waited_for_not_the_limit() -> None:
    now, connection = 100.0, Connection([100_000, 700, 0])
    send_queue = connection.send_queue(lambda: now)
    send_queue.set_limit(tun6.RateLimit(200 * MBIT))
    frames = [frame(1, number) for number in range(50)]
    send_queue.send(*batch(frames))
    assert (len(connection.pieces), send_queue.blocked) == (1, False)  # as one
    now += 1
    send_queue.send(*batch(frames))
    for _ in range(2):
        assert send_queue.blocked
        assert send_queue.pause() == 0
        send_queue.flush()
    for _ in range(3):  # what the connection did not take does not count twice: 49 frames are 3 ms
        send_queue.flush()
    assert connection.received() == 2 * frames
    connection.takes = [700, 0]
    send_queue.set_limit(tun6.RateLimit(MBIT))
    send_queue.send(*batch(frames[:1]))
    for _ in range(2):
        send_queue.flush()
        assert (send_queue.blocked, send_queue.pause()) == (True, 0)
    send_queue.flush()
    assert connection.received() == [*frames, *frames, frames[0]]


@pytest.mark.parametrize("bits", [MBIT, 5 * MBIT])
def test_who_does_not_slow_down_is_read_at_a_few_times_its_limit_and_a_sparse_flow_passes(bits: int) -> None:
    queue, now = tun6.ReceiveQueue(clock=lambda: 100.0), 100.0
    assert queue.active is False
    queue.set_limit(tun6.RateLimit(bits))
    began = now + tun6.DRAIN_S
    read = passed = 0
    for step in range(6000):
        now += 0.001
        if queue.may_read(now):
            assert list(queue.push([memoryview(frame(1, step)) for _ in range(10)], False, now)) == []
            read += 15_000 * (now >= began)
        if step % 100 == 0:
            queue.push([memoryview(frame(2, step, 100))], False, now)
        while (out := queue.pop(now)) is not None:
            passed += (len(out) - 10) * (now >= began)
            assert flow_of(out) == 1 or number_of(out) == step  # the sparse flow does not wait
        assert queue._queue.bytes <= tun6.HELD_MIN
        pause = queue.pause(now)
        assert pause is not None
        assert pause <= tun6.PAUSE_MAX_S
    assert passed * 8 / 5 == pytest.approx(bits, rel=0.02)
    assert read * 8 / 5 == pytest.approx(tun6.read_rate(bits), rel=0.1)
    queue.set_limit(None)
    assert queue.active
    assert queue.may_read(now)  # else nothing would be read any more: who does not wait for the limit does not ask again
    while queue.pop(now) is not None:
        passed += 1
    assert (queue.active, queue.pause(now + 1)) == (False, None)
    assert queue._queue.frames == 0


# ---- queue in the path -----------------------------------------------------------------------------------------------


MSS = 1448  # bytes


class Control(Protocol):
    """The congestion control of a Flow; times in seconds."""

    def acknowledge(self, now: float, sent_at: float, delivered_then: int) -> None:
        """A packet has arrived; `delivered_then` is what had been delivered when it was sent, in bytes."""

    def lose(self, now: float, sent_at: float) -> None:
        """A packet is lost."""


class Flow:
    """A connection over a SimulatedPath, which sends as much as its pacing rate and its window permit."""

    def __init__(self, control: Callable[[Flow, float], Control], round_trip: float) -> None:
        self.round_trip = 0.0  # smoothed, as the kernel has it
        self.shortest, self.lost_at = round_trip, -math.inf
        self.window, self.pacing, self.cap = 10.0 * MSS, math.inf, math.inf  # bytes, bytes/s
        self.in_flight = self.delivered = self.lost = self.sent = 0
        self.demand: Callable[[float], float] = lambda now: math.inf  # bytes/s
        self.full = False
        self._credit = self._waiting = 0.0
        self.control = control(self, 0.0)

    def take(self, now: float, seconds: float) -> int:
        """How many packets it sends in these seconds."""
        self._waiting = min(self._waiting + self.demand(now) * seconds, 1e6)
        rate = min(self.pacing, self.cap)
        self._credit = min(self._credit + rate * seconds, max(rate * 0.01, 2.0 * MSS)) if rate < math.inf else math.inf
        number = int(max(min(self._credit, self._waiting, self.window - self.in_flight), 0) // MSS)
        self._credit -= number * MSS
        self._waiting -= number * MSS
        self.full |= self._waiting > max(0.01 * min(rate, 2 * self.window / self.shortest), 2 * MSS)
        self.in_flight += number * MSS
        self.sent += number
        return number

    def acknowledge(self, now: float, sent_at: float, delivered_then: int) -> None:
        self.in_flight -= MSS
        self.delivered += MSS
        round_trip = now - sent_at
        self.round_trip = self.round_trip or round_trip
        self.round_trip += (round_trip - self.round_trip) / 16  # every second packet is acknowledged, and counts an eighth
        self.shortest = min(self.shortest, round_trip)
        self.control.acknowledge(now, sent_at, delivered_then)

    def lose(self, now: float, sent_at: float) -> None:
        self.in_flight -= MSS
        self.lost += 1
        self.lost_at = now
        self.control.lose(now, sent_at)


class Cubic:
    """RFC 9438 in short."""

    def __init__(self, flow: Flow, now: float) -> None:
        self._flow, self._most, self._epoch, self._slow_start = flow, 0.0, now, True
        flow.pacing = math.inf

    def acknowledge(self, now: float, sent_at: float, delivered_then: int) -> None:
        flow = self._flow
        if self._slow_start:
            flow.window += MSS
        elif flow.in_flight > flow.window / 2:  # else the window is not what limits it
            past = now - self._epoch - (self._most / MSS * 0.75) ** (1 / 3)
            target = 0.4 * past**3 * MSS + self._most
            flow.window += max(min((target - flow.window) / flow.window, 0.5), 0.01) * MSS

    def lose(self, now: float, sent_at: float) -> None:
        flow = self._flow
        if sent_at > self._epoch:
            self._most, self._epoch, self._slow_start = flow.window, now, False
            flow.window *= 0.7


class Bbr:
    """BBRv1 in short, net/ipv4/tcp_bbr.c."""

    def __init__(self, flow: Flow, now: float) -> None:
        self._flow = flow
        self.state, self.gain = "STARTUP", 2.885
        self._rates: deque[tuple[int, float]] = deque()  # of ten rounds
        self._round, self._round_ends, self._full, self._full_rounds = 0, flow.delivered, 0.0, 0
        self._shortest_at = self._cycle_at = now
        flow.pacing = self.gain * flow.window / (flow.round_trip or flow.shortest)
        self._cycle = 2

    def lose(self, now: float, sent_at: float) -> None:
        """It does not care."""

    def acknowledge(self, now: float, sent_at: float, delivered_then: int) -> None:
        flow = self._flow
        if now - sent_at <= flow.shortest:
            self._shortest_at = now
        new_round = delivered_then >= self._round_ends
        if new_round:
            self._round, self._round_ends = self._round + 1, flow.delivered
        self._rates.append((self._round, (flow.delivered - delivered_then) / (now - sent_at)))
        while self._rates[0][0] < self._round - 10 or (len(self._rates) > 1 and self._rates[0][1] <= self._rates[-1][1]):
            self._rates.popleft()
        rate = self._rates[0][1]
        if self.state == "STARTUP" and new_round:
            if rate > 1.25 * self._full:
                self._full, self._full_rounds = rate, 0
            else:
                self._full_rounds += 1
                if self._full_rounds >= 3:
                    self.state, self.gain = "DRAIN", 1 / 2.885
        if self.state == "DRAIN" and flow.in_flight <= rate * flow.shortest:
            self.state, self.gain, self._cycle_at = "PROBE_BW", 1.0, now
        if self.state == "PROBE_BW" and now - self._cycle_at > flow.shortest:
            self._cycle, self._cycle_at = (self._cycle + 1) % 8, now
            self.gain = (1.25, 0.75, 1, 1, 1, 1, 1, 1)[self._cycle]
        if self.state == "PROBE_RTT" and now - self._shortest_at > 0.2:
            self.state, self.gain, self._shortest_at = "PROBE_BW", 1.0, now
        elif self.state != "PROBE_RTT" and now - self._shortest_at > 10:
            self.state, self.gain, self._shortest_at = "PROBE_RTT", 1.0, now
        gain = 2.885 if self.state in ("STARTUP", "DRAIN") else 2
        target = 4.0 * MSS if self.state == "PROBE_RTT" else gain * rate * flow.shortest + 3 * MSS
        flow.window = max(min(flow.window + MSS, max(target, flow.window if self.state == "STARTUP" else 0)), 4 * MSS)
        flow.pacing = max(self.gain * rate, flow.pacing) if self.state == "STARTUP" else self.gain * rate


class SimulatedPath:
    """A bottleneck with a drop-tail buffer, a delay and losses, in steps of a millisecond, for several flows."""

    STEP = 0.001

    def __init__(self, mbit: float, round_trip: float, buffer: float, loss: float = 0, jitter: float = 0) -> None:
        """`round_trip`, `buffer` and `jitter`, on the way back, in seconds."""
        self.rate, self.round_trip, self.loss, self.jitter = mbit * 1e6 / 8 * MSS / 1500, round_trip, loss, jitter
        self.now, self.flows = 0.0, cast(list[Flow], [])
        self.queue = 0  # bytes
        self.delays: list[tuple[float, float]] = []  # time, seconds that a packet would wait
        self._buffer, self._random = buffer * self.rate, random.Random(1)
        self._waiting: deque[tuple[Flow, float, int]] = deque()
        self._credit = self._latest = 0.0
        self._back: deque[tuple[float, Flow, float, int, bool]] = deque()
        self.each: list[Callable[[], None]] = []  # is called each 50 ms
        self.events: list[tuple[float, Callable[[], None]]] = []

    def at(self, when: float, action: Callable[[], None]) -> None:
        self.events.append((when, action))
        self.events.sort(key=operator.itemgetter(0))

    def run(self, until: float) -> None:
        while self.now < until:
            while self.events and self.events[0][0] <= self.now:
                self.events.pop(0)[1]()
            self._step()
            if round(self.now / self.STEP) % 50 == 0:
                for action in self.each:
                    action()
                self.delays.append((self.now, self.queue / self.rate))

    def _step(self) -> None:
        self.now += self.STEP
        while self._back and self._back[0][0] <= self.now:
            _, flow, sent_at, delivered_then, lost = self._back.popleft()
            if lost:
                flow.lose(self.now, sent_at)
                continue
            flow.acknowledge(self.now, sent_at, delivered_then)
        for flow in self.flows:
            for _ in range(flow.take(self.now, self.STEP)):
                if self.queue + MSS <= self._buffer:
                    self.queue += MSS
                    self._waiting.append((flow, self.now, flow.delivered))
                else:
                    self._return(flow, self.now, flow.delivered, True)
        self._credit = min(self._credit + self.rate * self.STEP, self.rate * self.STEP + MSS) if self._waiting else 0.0
        while self._waiting and self._credit >= MSS:
            self._credit -= MSS
            self.queue -= MSS
            flow, sent_at, delivered_then = self._waiting.popleft()
            self._return(flow, sent_at, delivered_then, self._random.random() < self.loss)

    def _return(self, flow: Flow, sent_at: float, delivered_then: int, lost: bool) -> None:
        self._latest = max(self.now + self.round_trip + self._random.random() * self.jitter, self._latest)
        self._back.append((self._latest, flow, sent_at, delivered_then, lost))


class ControlledFlow(Flow):
    """A Flow with a QueueController, as PacedWriter has it."""

    def __init__(self, path: SimulatedPath, carrier: Callable[[Flow, float], Control] = Bbr) -> None:
        super().__init__(carrier, path.round_trip)
        self.path, self._carrier, self.received = path, carrier, 0
        self.controller = tun6.QueueController()
        self.history: list[tuple[float, int, float]] = []  # time, bytes delivered, cap
        self.competed = False  # whether it ever did
        path.flows.append(self)
        path.each.append(self.tick)

    def tick(self) -> None:
        """Is called each 50 ms."""
        now, controller = self.path.now, self.controller
        competed, hurried = controller.competes, controller.hurries
        starting = self.control.state == "STARTUP" if isinstance(self.control, Bbr) else None
        times = (self.round_trip or self.shortest, self.shortest)
        repairing = now - self.lost_at < self.round_trip
        sample = tun6.PathSample(now, self.delivered, self.received, *times, self.full, self.sent, self.lost, starting, repairing)
        controller.update(sample)
        self.full = False
        if controller.competes != competed or controller.hurries > hurried or controller.renews:
            self.control = (Cubic if controller.competes else self._carrier)(self, now)
        self.competed |= controller.competes
        self.cap = math.inf if controller.cap is None else controller.cap
        self.history.append((now, self.delivered, self.cap))

    def mbit(self, begin: float, end: float) -> float:
        """Its goodput between two times, in Mbit/s of the link."""
        at = {round(now, 2): delivered for now, delivered, _ in self.history}
        return (at[round(end, 2)] - at[round(begin, 2)]) / (end - begin) * 8e-6 * 1500 / MSS


def controlled(
    mbit: float, round_trip: float, buffer: float, loss: float = 0, jitter: float = 0, carrier: Callable[[Flow, float], Control] = Bbr
) -> tuple[SimulatedPath, ControlledFlow]:
    """A path, and a connection with a QueueController over it."""
    path = SimulatedPath(mbit, round_trip, buffer, loss, jitter)
    return path, ControlledFlow(path, carrier)


@pytest.mark.parametrize(
    ("mbit", "round_trip", "buffer", "loss", "carrier"),
    [
        (2, 0.08, 1.5, 0, Bbr),
        (2, 0.08, 1.5, 0, Cubic),
        (5, 0.08, 0.3, 0, Bbr),
        (10, 0.12, 0.6, 0.002, Bbr),
        (20, 0.03, 1, 0, Bbr),
        (20, 0.03, 1, 0, Cubic),
        (50, 0.05, 0.2, 0.005, Bbr),
        (50, 0.04, 0.1, 0.01, Bbr),
    ],
)
def test_a_full_path_has_a_short_queue_and_stays_full(
    mbit: float, round_trip: float, buffer: float, loss: float, carrier: Callable[[Flow, float], Control]
) -> None:
    path, flow = controlled(mbit, round_trip, buffer, loss, carrier=carrier)
    path.run(30)
    queue = sorted(each for now, each in path.delays if now >= 3)
    assert statistics.mean(queue) < 0.03
    assert queue[int(0.95 * len(queue))] < (0.1 if loss else 0.08)
    assert flow.mbit(3, 30) > 0.97 * mbit


@pytest.mark.parametrize("idle", [0.0, 5.0])
def test_the_rate_of_the_path_is_found_within_two_seconds_whatever_was_sent_before(idle: float) -> None:
    path, flow = controlled(38, 0.12, 0.6, 0.002)
    flow.demand = lambda now: 0.05e6 if now < 15 else 0 if now < 15 + idle else math.inf  # acknowledgements of an upload, then a download
    path.run(25)
    assert flow.mbit(17 + idle, 19 + idle) > 0.9 * 38


def test_the_cap_of_a_slow_time_does_not_bind_a_fast_one() -> None:
    path, flow = controlled(2, 0.12, 0.6)
    path.at(8, lambda: setattr(path, "rate", path.rate * 19))
    flow.demand = lambda now: math.inf if now < 8 or now > 12 else 0
    path.run(20)
    assert flow.history[150][2] < 0.3e6
    assert flow.mbit(14, 20) > 0.9 * 38


@pytest.mark.parametrize("jitter", [0.02, 0.05])
def test_noise_of_the_path_is_not_taken_for_a_queue(jitter: float) -> None:
    path, flow = controlled(20, 0.04, 0.3, jitter=jitter)
    path.run(30)
    assert flow.mbit(3, 30) > 0.93 * 20
    assert not flow.competed


@pytest.mark.parametrize("round_trip", [0.04, 0.12])
def test_a_rate_that_halves_and_doubles_is_followed_within_two_seconds(round_trip: float) -> None:
    path, flow = controlled(20, round_trip, 0.5)
    full = path.rate
    for number in range(1, 4):
        path.at(10 * number, functools.partial(setattr, path, "rate", full / (1 + number % 2)))
    path.run(40)
    late = sorted(each for now, each in path.delays if now % 10 >= 2)
    assert statistics.mean(late) < 0.04
    assert late[int(0.95 * len(late))] < 0.08
    assert flow.mbit(22, 30) > 0.95 * 20
    assert flow.mbit(12, 20) > 0.95 * 10
    assert not flow.competed


def competition(begin: float, end: float) -> tuple[SimulatedPath, ControlledFlow]:
    """A long buffer that a CUBIC upload outside of the tunnel fills between two times."""
    path, flow = controlled(20, 0.03, 1)
    other = Flow(Cubic, path.round_trip)
    other.demand = lambda now: math.inf if begin <= now < end else 0
    path.flows.append(other)
    return path, flow


def test_beside_a_cubic_upload_it_gets_its_share() -> None:
    path, flow = competition(8, math.inf)
    path.run(45)
    assert 0.35 * 20 < flow.mbit(16, 45) < 0.65 * 20  # after it has found out, and a slow start with a round trip of a second


def test_when_the_other_upload_has_ended_the_queue_is_short_again() -> None:
    path, flow = competition(5, 20)
    path.run(60)
    assert statistics.mean(each for now, each in path.delays if 10 < now < 20) > 0.3
    late = sorted(each for now, each in path.delays if now >= 40)
    assert statistics.mean(late) < 0.03
    assert late[int(0.95 * len(late))] < 0.08
    assert not flow.controller.competes


@pytest.mark.parametrize("mbit", [1, 1.5, 2, 5])
def test_on_a_slow_link_too_it_finds_out_that_the_other_upload_has_ended(mbit: float) -> None:
    path, flow = controlled(mbit, 0.05, 1)
    path.flows.append(Flow(Cubic, path.round_trip))
    path.flows[-1].demand = lambda now: math.inf if 5 <= now < 20 else 0
    path.run(60)
    assert flow.competed
    assert not flow.controller.competes


@pytest.mark.parametrize("round_trip", [0.05, 0.12, 0.3])
def test_after_some_seconds_in_which_nearly_all_was_lost_the_path_is_soon_full_again(round_trip: float) -> None:
    path, flow = controlled(38, round_trip, 0.6, 0.002)
    path.at(10, lambda: setattr(path, "loss", 0.98))
    path.at(14, lambda: setattr(path, "loss", 0.002))
    path.run(20)
    assert flow.mbit(13, 14) < 1
    assert flow.mbit(16.5, 20) > 0.9 * 38


class Unmoved:
    """The congestion control of a flow that keeps its window."""

    def __init__(self, flow: Flow, now: float) -> None:
        flow.window = 1_000 * MSS

    def acknowledge(self, now: float, sent_at: float, delivered_then: int) -> None:
        """It does not grow."""

    def lose(self, now: float, sent_at: float) -> None:
        """It does not shrink."""


@pytest.mark.parametrize("loss", [0, 0.01])
def test_only_on_a_path_without_losses_it_competes_with_cubic(loss: float) -> None:
    path, flow = controlled(20, 0.03, 1, loss)
    path.run(8)
    path.flows.append(Flow(Unmoved, path.round_trip))
    path.flows[-1].demand = lambda now: math.inf
    path.run(15)
    assert flow.controller.cap is None
    assert flow.controller.competes == (not loss)


def test_pauses_of_what_is_sent_do_not_lower_the_cap() -> None:
    path, flow = controlled(20, 0.04, 0.5)
    flow.demand = lambda now: 0 if now % 1 < 0.3 else math.inf
    path.run(20)
    assert flow.controller.cap is not None
    assert flow.mbit(5, 20) > 0.9 * 0.7 * 20


class MeasuredPath:
    """Tells a QueueController each 50 ms what the kernel would say of a path."""

    def __init__(self, round_trip: float = 0.05) -> None:
        """`round_trip` without a queue, in seconds."""
        self.controller = tun6.QueueController()
        self._round_trip, self._now = round_trip, 0.0
        self._delivered = self._received = self._segments = self._repeated = 0
        self.starting: bool | None = None  # whether BBR is
        self.repairing = False  # whether losses are being repaired
        self.renewals = 0  # times that it was to begin anew

    def pass_time(self, seconds: float) -> None:
        """Nothing is sent, and nobody asks."""
        self._now += seconds

    def caps(self, seconds: float, rate: float, queue: float, received: float = 0, full: bool = True, losses: int = 0) -> list[float]:
        """The caps while this is so for some seconds; rates in bytes/s, the queue in seconds, losses of 100 segments."""
        caps = []
        for _ in range(round(seconds / tun6.PACING_UPDATE_S)):
            self._now += tun6.PACING_UPDATE_S
            self._delivered += round(rate * tun6.PACING_UPDATE_S)
            self._received += round(received * tun6.PACING_UPDATE_S)
            self._segments, self._repeated = self._segments + 100, self._repeated + losses
            times = (self._round_trip + queue, self._round_trip)
            numbers = (self._delivered, self._received, *times, full, self._segments, self._repeated, self.starting, self.repairing)
            self.controller.update(tun6.PathSample(self._now, *numbers))
            self.renewals += self.controller.renews
            caps.append(self.controller.cap or math.inf)
        return caps

    def cap_after(self, seconds: float, rate: float, queue: float, received: float = 0, full: bool = True, losses: int = 0) -> float:
        """The last one of them."""
        return (self.caps(seconds, rate, queue, received, full, losses) or [self.controller.cap or math.inf])[-1]


def competing(rate: float = 1e6, queue: float = 0.2, best: float = 0) -> MeasuredPath:
    """A path on which another sender has been found. `best`: what was moved before it came, in bytes/s, 0: nothing."""
    path = MeasuredPath()
    if best:
        path.cap_after(0.5, best, 0.1)
        path.cap_after(1, best, 0)
    for _ in range(200):
        path.cap_after(tun6.PACING_UPDATE_S, rate, queue)
        if path.controller.competes:
            return path
    raise AssertionError("it does not compete")


def looking(path: MeasuredPath, rate: float = 1e6, queue: float = 0.2) -> float:
    """Waits until it looks whether the other sender has gone. Returns the cap then."""
    for _ in range(round(1.2 * tun6.COMPETE_S / tun6.PACING_UPDATE_S)):
        cap = path.cap_after(tun6.PACING_UPDATE_S, rate, queue)
        if cap < math.inf:
            return cap
    raise AssertionError("it does not look")


def test_on_a_path_with_losses_noise_is_told_from_a_queue_also_after_somebody_elses_queue() -> None:
    path = MeasuredPath()
    path.cap_after(1, 1e6, 0, losses=1)
    assert path.cap_after(5, 1e6, 0.2, losses=1) == math.inf
    path.cap_after(tun6.COMPETE_S, 1e6, 0, losses=1)
    assert path.cap_after(5, 1e6, 0.05, losses=1) < math.inf


@pytest.mark.parametrize(("full", "received", "brakes"), [(True, 4e6, True), (False, 0.5e6, True), (False, 4e6, False)])
def test_only_the_side_brakes_whose_own_socket_is_full_or_that_mostly_sends(full: bool, received: float, brakes: bool) -> None:
    assert (MeasuredPath().cap_after(0.5, 1e6, 0.1, received, full) < 1e6) == brakes


def test_nothing_is_learned_while_the_connection_stalls() -> None:
    path = MeasuredPath()
    cap = path.cap_after(0.5, 1e6, 0.1)
    assert cap < 1e6
    for rate in (0, 0, 0, 1e6, 1e6, 1e6):
        assert path.cap_after(tun6.PACING_UPDATE_S, rate, 0.1) == cap


def test_times_without_a_packet_are_no_stall_on_a_slow_path() -> None:
    path = MeasuredPath()
    for _ in range(10):
        path.cap_after(tun6.PACING_UPDATE_S, 30_000, 0.5)
        cap = path.cap_after(tun6.PACING_UPDATE_S, 0, 0.5)
    assert cap < 15_000


def test_a_round_trip_moves_a_few_packets_in_any_case() -> None:
    path = MeasuredPath(0.01)
    assert path.cap_after(0.3, 40_000, 0.2) < 40_000
    assert path.cap_after(0.3, 40_000, 0.08) == pytest.approx(tun6.LEAST_BYTES / 0.09)


@pytest.mark.parametrize("losses", [0, 1])
def test_a_path_with_losses_may_have_a_longer_queue(losses: int) -> None:
    path = MeasuredPath()
    path.cap_after(1, 1e6, 0, losses=losses)
    assert path.cap_after(0.3, 1e6, 0.06, losses=losses) < 0.9e6
    assert (path.cap_after(0.3, 1e6, 0.02, losses=losses) > 1e6) == bool(losses)


@pytest.mark.parametrize("losses", [0, 1])
def test_a_path_with_losses_has_its_highest_rate_of_the_last_second_as_soon_as_the_queue_is_short(losses: int) -> None:
    path = MeasuredPath()
    path.cap_after(1, 1e6, 0, losses=losses)
    assert path.cap_after(0.5, 1e6, 0.06, losses=losses) < 0.9e6
    assert path.cap_after(0.3, 0.6e6, 0.06, losses=losses) < 0.6e6
    assert (path.cap_after(0.2, 0.6e6, 0.01, losses=losses) > 0.9e6) == bool(losses)


def test_only_a_queue_of_twice_the_target_begins_to_be_controlled() -> None:
    assert MeasuredPath().cap_after(1, 1e6, 0.03) == math.inf
    assert MeasuredPath().cap_after(0.5, 1e6, 0.04) < 1e6


def test_two_packets_may_wait_on_a_slow_path() -> None:
    path = MeasuredPath()
    assert path.cap_after(0.3, 100_000, 0.3) < 100_000
    assert path.cap_after(0.3, 100_000, 0.025) > 100_000


def test_a_time_in_which_nothing_was_sent_does_not_count() -> None:
    path = MeasuredPath()
    cap = path.cap_after(0.5, 1e6, 0.1)
    path.pass_time(0.9)
    assert path.cap_after(0.15, 1e6, 0.1) == cap


def test_what_a_sender_has_that_does_not_fill_its_socket_raises_no_cap() -> None:
    path = MeasuredPath()
    cap = path.cap_after(0.5, 1e6, 0.1)
    assert path.cap_after(0.9, 1e6, 0, full=False) == cap
    assert path.cap_after(0.5, 1e6, 0) > cap


def test_what_was_taken_for_noise_is_a_queue_again_a_minute_later() -> None:
    path = MeasuredPath()
    assert path.cap_after(10, 1e6, 0.05) > 1e6
    caps = [path.cap_after(0.1, 1e6, 0.05) for _ in range(10 * int(tun6.NOISE_S))]
    assert min(caps[: 10 * int(tun6.NOISE_S - 12)]) > 1e6 > min(caps)


def test_a_path_that_became_slower_long_ago_may_have_noise() -> None:
    path = MeasuredPath()
    path.cap_after(0.5, 2e6, 0.1)
    path.cap_after(1, 2e6, 0)
    path.cap_after(2 * tun6.BEST_S, 1e6, 0)
    path.cap_after(5, 1e6, 0.05)
    assert not path.controller.competes


def test_beside_a_queue_that_stays_it_competes_whatever_is_lost_then() -> None:
    path = MeasuredPath()
    assert path.cap_after(5, 1e6, 0.2, losses=5) == math.inf
    assert path.controller.competes


@pytest.mark.parametrize("stays", [False, True])
def test_it_looks_from_time_to_time_whether_the_other_sender_has_gone(stays: bool) -> None:
    path = MeasuredPath()
    path.cap_after(3, 1e6, 0.2)
    assert path.controller.competes
    assert path.cap_after(tun6.COMPETE_S - 3, 1e6, 0.2) == math.inf
    looks = [cap for cap in path.caps(5, 1e6, 0.2) if cap < math.inf]
    assert all(cap == pytest.approx(tun6.COMPETE_TEST * 1e6) for cap in looks) and 5 <= len(looks) <= 20
    path.cap_after(tun6.COMPETE_S - 4, 1e6, 0.2)
    assert any(path.cap_after(tun6.PACING_UPDATE_S, 1e6, 0.2) < math.inf for _ in range(100)), "it does not look again"
    path.cap_after(0.5, 0.9e6, 0.2 if stays else 0)
    assert path.controller.competes == stays


def test_a_look_in_a_moment_in_which_little_arrives_neither_holds_all_back_nor_ends_at_once() -> None:
    path = competing()
    path.cap_after(tun6.COMPETE_S - 2, 1e6, 0.2)
    caps = path.caps(5, 2e5, 0.2)
    assert sum(cap == pytest.approx(tun6.COMPETE_TEST * 1e6) for cap in caps) >= 5
    path.cap_after(tun6.COMPETE_S - 6, 4e5, 0.2)
    later = [cap for cap in path.caps(10, 4e5, 0.2) if cap < math.inf]
    assert later and all(cap == pytest.approx(tun6.COMPETE_TEST * 4e5) for cap in later)


def test_a_look_leaves_half_of_very_little() -> None:
    path = competing(30_000, 1)
    assert min(path.caps(1.2 * tun6.COMPETE_S, 30_000, 1)) == pytest.approx(15_000)


def test_a_path_with_losses_that_moves_nearly_nothing_may_have_a_few_packets_in_each_round_trip() -> None:
    path = MeasuredPath()
    path.cap_after(1, 1e6, 0, losses=1)
    path.cap_after(0.5, 1e6, 0.1, losses=1)
    assert path.cap_after(300, 1_000, 0, losses=1) == pytest.approx(tun6.LEAST_BYTES / 0.05)


def test_samples_that_are_rare_as_the_cap_is_low_count() -> None:
    path = MeasuredPath()
    path.cap_after(0.3, 20_000, 0.2)
    low = path.cap_after(0.5, 4_000, 2)
    assert low < 10_000
    for _ in range(20):
        path.pass_time(0.3)
        cap = path.cap_after(tun6.PACING_UPDATE_S, 60_000, 0)
    assert cap > 2 * low


@pytest.mark.parametrize("rate", [0.8e6, 1e6])
def test_it_looks_sooner_when_the_best_rate_of_before_is_back(rate: float) -> None:
    path = MeasuredPath()
    path.cap_after(0.5, 1e6, 0.1)
    path.cap_after(1, 1e6, 0)
    path.cap_after(2, 0.6e6, 0.3)
    assert path.controller.competes
    assert (min(path.caps(4, rate, 0.3)) < rate) == (rate > 0.9e6)


def test_a_pause_begins_the_search_for_the_owner_of_a_queue_anew() -> None:
    path = MeasuredPath()
    path.cap_after(1.3, 1e6, 0.2)
    path.pass_time(1.1 * tun6.PAUSE_S)
    path.cap_after(1.2, 1e6, 0.2)
    assert not path.controller.competes
    path.cap_after(0.5, 1e6, 0.2)
    assert path.controller.competes


@pytest.mark.parametrize("pause", [0.0, 1.1 * tun6.PAUSE_S])
def test_after_a_pause_the_cap_grows_fast_at_once(pause: float) -> None:
    path = MeasuredPath()
    path.cap_after(0.5, 1e6, 0.1)
    path.pass_time(pause)
    assert (path.cap_after(0.4, 1e6, 0) > 1.9e6) == bool(pause)


def test_after_a_queue_the_cap_grows_slowly_again() -> None:
    path = MeasuredPath()
    path.cap_after(0.5, 1e6, 0.1)
    assert path.cap_after(10, 1e6, 0) == pytest.approx(2e6, rel=0.01)
    assert path.cap_after(0.3, 1e6, 0.1) < 1e6
    assert path.cap_after(0.25, 1e6, 0) < 1.3e6


@pytest.mark.parametrize("rate", [1.2e6, 1.6e6])
def test_a_queue_that_took_a_third_of_the_best_rate_is_no_noise(rate: float) -> None:
    path = MeasuredPath()
    path.cap_after(0.5, 2e6, 0.1)
    path.cap_after(1, 2e6, 0)
    path.cap_after(3, rate, 0.05)
    assert path.controller.competes == (rate < tun6.FALLEN * 2e6)


def test_where_a_queue_was_noise_the_cap_is_what_arrived_before_it_braked() -> None:
    path = MeasuredPath()
    path.cap_after(0.5, 1e6, 0.1)
    path.cap_after(2, 1e6, 0)
    path.cap_after(0.3, 1e6, 0.05)
    caps = path.caps(5, 0.75e6, 0.05)
    assert caps[10] < 0.7e6
    assert next(cap for cap in caps[10:] if cap > 0.7e6) == pytest.approx(1e6)


def test_a_queue_that_grows_has_its_own_time_to_go() -> None:
    path = MeasuredPath()
    path.cap_after(0.3, 1e6, 0.1)
    path.cap_after(1.5, 1e6, 0.4)
    assert not path.controller.competes
    path.cap_after(1, 1e6, 0.4)
    assert path.controller.competes


@pytest.mark.parametrize(("rate", "grows"), [(1e6, False), (0.6e6, True)])
def test_what_arrives_less_while_a_queue_still_grows_says_nothing_of_its_owner(rate: float, grows: bool) -> None:
    path = MeasuredPath()
    path.cap_after(0.9, 1e6, 0.2)
    path.cap_after(0.6, rate, 0.3 if grows else 0.2)
    assert path.controller.competes != grows


def test_a_queue_of_which_half_has_gone_is_ours() -> None:
    path = MeasuredPath()
    path.cap_after(1.5, 1e6, 0.4)
    path.cap_after(5, 1e6, 0.15)
    assert not path.controller.competes


@pytest.mark.parametrize(("best", "bound"), [(0, True), (4e6, False)])
def test_it_competes_with_a_few_slow_starts_or_as_many_as_it_needs_where_the_best_rate_is_known(best: float, bound: bool) -> None:
    path = competing(best=best)
    begun, hurried = [0.0], True
    for step in range(1, 1200):
        path.repairing = hurried
        path.cap_after(tun6.PACING_UPDATE_S, 1e6, 0.2)
        hurries = path.controller.hurries
        if hurries > hurried:
            begun.append(step * tun6.PACING_UPDATE_S)
        hurried = hurries
    assert (len(begun) == 1 + tun6.COMPETE_STARTS) if bound else (len(begun) > 3 * tun6.COMPETE_STARTS)
    assert all(later - earlier > 0.99 * (2 * 0.25 + 0.5) for earlier, later in zip(begun, begun[1:]))


def test_with_half_of_the_best_rate_it_needs_no_slow_start() -> None:
    path = competing(best=2e6)
    assert not any(path.cap_after(tun6.PACING_UPDATE_S, 1e6, 0.2) < math.inf or path.controller.hurries for _ in range(100))


@pytest.mark.parametrize("full", [False, True])
def test_it_does_not_look_while_it_has_all_that_it_wants(full: bool) -> None:
    path = competing()
    assert (min(path.caps(1.2 * tun6.COMPETE_S, 1e6, 0.2, full=full)) < math.inf) == full
    path.cap_after(1, 1e6, 0, full=False)
    assert full or not path.controller.competes


@pytest.mark.parametrize("left", [0.09, 0.12])
def test_an_eighth_of_a_long_queue_may_be_left_where_the_other_sender_has_gone(left: float) -> None:
    path = competing(queue=0.8)
    looking(path, queue=0.8)
    path.cap_after(0.3, 0.25e6, left)
    assert path.controller.competes == (left > 0.8 / 8)


@pytest.mark.parametrize("looked", [False, True])
def test_what_was_found_to_be_gone_leaves_the_rate_of_before_as_the_cap_or_none(looked: bool) -> None:
    path = competing()
    if looked:
        looking(path)
    for _ in range(round(1.2 * tun6.COMPETE_S / tun6.PACING_UPDATE_S)):
        cap = path.cap_after(tun6.PACING_UPDATE_S, 1e6, 0)
        if not path.controller.competes:
            break
    assert cap == (pytest.approx(1e6) if looked else math.inf)


def test_the_best_rate_of_before_the_other_sender_does_not_count_after_it() -> None:
    path = competing(best=2e6, queue=0.3)
    looking(path, queue=0.3)
    path.cap_after(2, 1e6, 0)
    assert not path.controller.competes
    path.cap_after(5, 1e6, 0.05)
    assert not path.controller.competes


@pytest.mark.parametrize(("obeyed", "shortest", "longest"), [(True, 0.6, 0.7), (False, 0.85, 1.1)])
def test_a_look_ends_as_soon_as_less_is_sent_and_the_queue_stays(obeyed: bool, shortest: float, longest: float) -> None:
    path = competing()
    looking(path)
    steps = 1
    while path.cap_after(tun6.PACING_UPDATE_S, 0.25e6 if obeyed else 1e6, 0.2) < math.inf:
        steps += 1
    assert shortest <= steps * tun6.PACING_UPDATE_S <= longest


def test_bbr_begins_anew_before_it_would_stop_to_look_for_a_shorter_round_trip() -> None:
    path = MeasuredPath()
    path.starting = True
    path.cap_after(0.5, 1e6, 0.1)
    assert path.renewals == 1
    path.cap_after(3.5 * tun6.BBR_RENEWAL_S, 1e6, 0)
    assert path.renewals == 4


@pytest.mark.parametrize("losses", [0, 1])
def test_bbr_that_has_started_begins_anew_at_once_only_where_nothing_is_lost(losses: int) -> None:
    path = MeasuredPath()
    path.cap_after(1, 1e6, 0, losses=losses)
    path.cap_after(0.5, 1e6, 0.1, losses=losses)
    path.starting = True
    path.cap_after(0.1, 1e6, 0.1, losses=losses)
    path.renewals, path.starting = 0, False
    path.cap_after(tun6.PACING_UPDATE_S, 1e6, 0.1, losses=losses)
    assert path.renewals == (0 if losses else 1)


@pytest.mark.parametrize(("losses", "times"), [(0, 2), (1, 1 + tun6.GROWTH_LOSSY)])
def test_the_cap_grows_to_so_many_times_of_what_arrives_however_long_there_was_no_queue(losses: int, times: float) -> None:
    path = MeasuredPath()
    path.cap_after(1, 1e6, 0, losses=losses)
    path.cap_after(0.5, 1e6, 0.1, losses=losses)
    assert path.cap_after(300, 1e6, 0, losses=losses) == pytest.approx(times * 1e6, rel=0.01)


# ---- network plans ---------------------------------------------------------------------------------------------------


def inverse(command: str) -> str:
    """What takes back an `ip` command that adds something."""
    return re.sub(r"^(\w+) (add|replace) ", r"\1 del ", command).replace(" nodad", "")


def test_a_plan_undoes_what_removing_its_device_would_not() -> None:
    stays = [*tun6.pool_plan(POOL, 7), *tun6.address_plan("tun6", subnet(3), 7), *tun6.tunnel_plan("tun6", True, 7)]
    for step in stays:  # the address can change, and the routes go, while the device stays
        assert step.undo == inverse(step.do) != step.do or "flush" in step.do
    for step in tun6.server_plan("tun6-0", 1500, subnet(3), 7):
        assert re.search(r" dev tun6-0( |$)", step.do)  # it goes with the device


def test_plans_name_the_device_its_mtu_its_routes_and_the_first_address_of_the_prefix() -> None:
    def said(plan: list[tun6.Step]) -> str:
        return "; ".join(step.do for step in plan)

    pool, server = said(tun6.pool_plan(POOL, 7)), said(tun6.server_plan("tun6-0", 1400, subnet(3), None))
    assert f"unreachable {POOL} " in pool
    listing = pool.replace("route add ", "") + " dev lo pref medium\n2001:db8:1:3::/64 dev tun6-0 metric 1024\n"
    assert tun6.parse_rejects(listing) == [(str(POOL), 7, tun6.REJECT_BASE)]
    rejects = said(tun6.address_plan("tun6", subnet(3), 7)).replace("route add ", "").replace("; ", "\n")
    assert tun6.parse_rejects(rejects) == [(str(subnet(3)), 7, tun6.REJECT_BASE), ("default", 7, tun6.REJECT_BASE)]
    for base in (0x7400_0000, 0xE400_0000):  # what older ones have left, too
        rejects = f"unreachable {POOL} dev lo proto 116 metric {base + 7} pref medium\n"
        assert tun6.parse_rejects(rejects) == [(str(POOL), 7, base)]
        assert tun6.reject_step(str(POOL), 7, base).undo == f"route del unreachable {POOL} metric {base + 7} proto 116"
    assert not tun6.parse_rejects(f"unreachable {POOL} dev lo proto 116 metric {tun6.METRIC_MAX} pref medium\n")
    rules = said(tun6.reject_plan(subnet(3), 7)).replace("rule add priority ", "").replace("; ", "\n").replace(" from", ": from")
    assert tun6.parse_sources(rules) == [(f"from {subnet(3)}", 7)]
    assert re.search(r"mtu 1400 .*addrgenmode none.*; link set dev tun6-0 up; .*route replace 2001:db8:1:3::/64 dev", server)
    assert server.endswith(" dev tun6-0 proto 116")
    assert re.search(r"dev tun6 mtu 1280 .*; link set dev tun6 up; ", said(tun6.device_plan("tun6", 1280)))
    assert re.fullmatch(r"route add default dev tun6 table \d+ proto 116", said(tun6.tunnel_plan("tun6", False, 7)))
    assert "not from 2000::/3 lookup " in said(tun6.tunnel_plan("tun6", True, 7))
    assert said(tun6.address_plan("tun6", subnet(3), 7)).startswith("addr add 2001:db8:1:3::1/128 dev tun6")


# ---- storage ---------------------------------------------------------------------------------------------------------


class GatedWork:
    """The work of a GroupCommit: each call waits at a gate, and then negates its items, or fails if `wrong` is one of them."""

    def __init__(self, wrong: int | None = None) -> None:
        self.wrong = wrong
        self.batches: list[list[int]] = []  # what each call got
        self.gate = gevent.lock.Semaphore(0)
        self.submit = tun6.GroupCommit(self._work).submit

    def submit_each(self, number: int) -> list[Any]:
        """Greenlets that submit 0, 1, 2 and so on, all waiting; the others come when the first is being worked on."""
        greenlets = [spawn(self.submit, 0)]
        assert becomes_true(lambda: self.batches, 5)
        greenlets += [spawn(self.submit, item) for item in range(1, number)]
        gevent.sleep(0)  # each has run up to its wait
        return greenlets

    def open_gate(self, batches: int) -> None:
        for _ in range(batches):
            self.gate.release()

    def _work(self, items: list[int]) -> list[int]:
        self.batches.append(items)  # what `ip` or a thread has begun goes on, whoever waits for it
        self.gate.acquire()
        if self.wrong in items:
            raise tun6.StorageError("disk full")
        return [-item for item in items]


def test_what_arrives_during_the_work_is_the_next_batch_and_each_gets_its_own_result() -> None:
    work = GatedWork()
    callers = work.submit_each(100)
    work.open_gate(3)
    assert results(callers) == [-number for number in range(100)]
    assert work.batches == [[0], list(range(1, 100))]
    assert work.submit(7) == -7


def test_what_the_work_raises_reaches_all_of_its_batch_and_nobody_else() -> None:
    work = GatedWork(wrong=5)
    callers = work.submit_each(10)
    work.open_gate(3)
    first, *others = results(callers)
    assert first == 0
    assert {str(error) for error in others} == {"disk full"}
    assert work.submit(1) == -1


def test_killing_a_caller_neither_loses_nor_repeats_the_work_of_the_others() -> None:
    work = GatedWork()
    callers = work.submit_each(5)
    work.open_gate(1)
    assert becomes_true(lambda: len(work.batches) == 2, 5)
    for number in 1, 3:
        callers[number].kill()
    callers.append(spawn(work.submit, 5))
    work.open_gate(5)
    values = results(callers)
    assert [values[number] for number in (0, 2, 4, 5)] == [0, -2, -4, -5]
    assert work.batches == [[0], [1, 2, 3, 4], [5]]


@pytest.fixture
def assignment_file(tmp_path: Path) -> Path:
    return tmp_path / "assignments.json"


IDS = ["00:11:22:aa:bb:cc", "é😀", '"{}\\', "a b", "x" * 64]


def test_assignments_last_over_restarts(assignment_file: Path, open_store: OpenStore) -> None:
    store = open_store(assignment_file)
    assigned = {id_: store.assign(id_) for id_ in IDS}
    assert assigned == {id_: subnet(number) for number, id_ in enumerate(IDS)}
    assert json.loads(assignment_file.read_text()) == {id_: str(prefix) for id_, prefix in assigned.items()}
    store.close()
    again = open_store(assignment_file)
    assert {id_: again.assign(id_) for id_ in reversed(IDS)} == assigned
    assert again.assign("new") == subnet(len(IDS))


def saved(path: Path) -> dict[str, IPv6Network | None]:
    """What a server that starts now knows; by way of a copy, as the test may have a store open."""
    with tempfile.TemporaryDirectory() as folder:
        reader = tun6.AssignmentStore(tun6.PrefixPool(POOL), str(shutil.copy(path, folder)))
        reader.close()
    return {id_: reader.pool.find(id_) for id_ in reader.pool.owners()}


@pytest.mark.parametrize("content", [None, b"", b" \n\t\r\n", b"{}", b"{\n}\n"])
def test_a_missing_or_empty_file_is_an_empty_map(content: bytes | None, assignment_file: Path, open_store: OpenStore) -> None:
    if content is not None:
        assignment_file.write_bytes(content)
    store = open_store(assignment_file)
    assert store.assign("a") == subnet(0)
    assert saved(assignment_file) == {"a": subnet(0)}


def test_the_originals_own_file_is_read_as_it_is(assignment_file: Path, open_store: OpenStore) -> None:
    assignment_file.write_text('{"00:11:22:aa:bb:cc": "2000:aaaa:bbbb:ccdd::/64", "00:11:22:aa:bb:dd": "2000:aaaa:bbbb:cc00:0:0:0:0/64"}')
    store = open_store(assignment_file, IPv6Network("2000:aaaa:bbbb:cc00::/56"))
    assert store.assign("00:11:22:aa:bb:cc") == IPv6Network("2000:aaaa:bbbb:ccdd::/64")
    assert store.assign("00:11:22:aa:bb:dd") == IPv6Network("2000:aaaa:bbbb:cc00::/64")
    assert store.assign("new") == IPv6Network("2000:aaaa:bbbb:cc01::/64")


def test_without_a_file_assignments_live_in_memory(open_store: OpenStore) -> None:
    store = open_store(None)
    assert [store.assign("a"), store.assign("b"), store.assign("a")] == [subnet(0), subnet(1), subnet(0)]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"a": "2001:db8:1::/64", "b": "2001:db8:1:1::/64", "a": "2001:db8:1:2::/64"}', "entry 'a'.*twice"),
        (b'{"a": "2001:db8:1::/64", "b": "2001:db8:1:0::/64"}', "entry 'b'.*already the prefix of 'a'"),
        (b'{"a": "2001:db8:2::/64"}', "entry 'a'.*outside 2001:db8:1::/56"),
        (b'{"a": "2001:db8:1::/60"}', "entry 'a'.*not a /64"),
        (b'{"a": "2001:db8:1::"}', "entry 'a'.*not a /64"),
        (b'{"a": "2001:db8:1::1/64"}', "entry 'a'.*host bits"),
        *((b'{"a": "%s"}' % prefix, "entry 'a'") for prefix in (b"2001:db8:1::%x/64", b"10.0.0.0/8", b"")),
        *((b'{"a": %s}' % value, "entry 'a'.*not a string") for value in (b"null", b"7", b'{"b": "2001:db8:1::/64"}')),
        (b'{"": "2001:db8:1::/64"}', "entry ''.*printable"),
        (b'{"a\\n": "2001:db8:1::/64"}', r"entry 'a\?'.*printable"),
        (b'{"' + b"x" * 65 + b'": "2001:db8:1::/64"}', "entry 'xxx.*64 printable"),
        *((content, "not one object") for content in (b"[]", b'["a"]', b"[{}]", b"null", b'"a"', b"7")),
        *((content, "not a file of assignments") for content in (b"a = b", b'{"a": "2001:db8:1::/64",}', b"\0" * 100)),
        *((opening * 100_000, "not a file of assignments") for opening in (b"[", b'{"a":')),
        (b'{"a": "2001:db8:1::/64"} x', "Extra data"),
        (b'{"a": "\xff"}', "utf-8"),
    ],
)
def test_a_corrupt_file_stops_the_start_until_mended(content: bytes, named: str, assignment_file: Path, open_store: OpenStore) -> None:
    assignment_file.write_bytes(content)
    with pytest.raises(tun6.ConfigError, match=f"^{re.escape(str(assignment_file))}\\b.*{named}") as caught:
        open_store(assignment_file)
    assert str(caught.value).isprintable()
    assert assignment_file.read_bytes() == content
    assert sorted(os.listdir(assignment_file.parent)) in (["assignments.json"], ["assignments.json", "assignments.json.lock"])
    assignment_file.write_text("{}")  # the lock is free again
    assert open_store(assignment_file).assign("a") == subnet(0)


def test_a_folder_in_place_of_the_file_stops_the_start(tmp_path: Path, open_store: OpenStore) -> None:
    with pytest.raises(tun6.ConfigError, match=f"{tmp_path} is no regular file"):
        open_store(tmp_path)


def test_a_file_cut_short_is_refused_and_left_as_it_is(tmp_path: Path, assignment_file: Path, open_store: OpenStore) -> None:
    store = open_store(assignment_file)
    whole = {id_: store.assign(id_) for id_ in ("a", "é", '"}')}
    content, accepted = assignment_file.read_bytes(), []
    for length in range(len(content)):
        cut = tmp_path / f"{length}.json"
        cut.write_bytes(content[:length])
        before = untouched(cut)
        if content[:length].strip() and content[length:].strip():
            with pytest.raises(tun6.ConfigError, match=str(cut)):
                open_store(cut)
        else:
            open_store(cut)
            accepted.append(saved(cut))
        assert untouched(cut) == before, f"cut to {length} bytes"
    assert accepted == [{}, whole]  # the empty file, as `touch` makes it, and without the last line feed


def test_a_second_server_on_the_same_file_is_refused_until_the_first_ends(tmp_path: Path, open_store: OpenStore) -> None:
    path, link = tmp_path / "assignments.json", tmp_path / "link.json"
    link.symlink_to(path)
    first = open_store(path)
    first.assign("a")
    for name in path, link:
        with pytest.raises(tun6.ConfigError, match="in use by another tun6 server"):
            open_store(name)
    first.close()
    assert open_store(link).assign("a") == subnet(0)


def test_a_save_keeps_the_symbolic_link_and_the_mode_of_the_file(tmp_path: Path, open_store: OpenStore) -> None:
    path, link = tmp_path / "elsewhere" / "real.json", tmp_path / "assignments.json"
    path.parent.mkdir()
    path.touch()
    path.chmod(0o640)
    link.symlink_to(path)
    open_store(link).assign("a")
    assert link.is_symlink()
    assert saved(path) == {"a": subnet(0)}
    assert path.stat().st_mode & 0o7777 == 0o640
    assert sorted(os.listdir(path.parent)) == ["real.json", "real.json.bak", "real.json.lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to others, which takes root")
def test_what_root_saves_is_the_services_whose_folder_or_file_it_is(tmp_path: Path, open_store: OpenStore) -> None:
    def owners(prefix: str) -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_uid, path.stat().st_gid) for path in tmp_path.glob(f"{prefix}*")}

    os.chown(tmp_path, 4711, 4712)
    open_store(tmp_path / "new.json").assign("a")
    tun6.KeyStore(str(tmp_path / "new-keys.json")).issue("a")
    assert set(owners("new").values()) == {(4711, 4712)}
    assert sorted(owners("new")) == ["new-keys.json", "new.json", "new.json.bak", "new.json.lock"]
    for name, mode in (("old.json", 0o640), ("old-keys.json", 0o640)):
        (tmp_path / name).touch()
        os.chown(tmp_path / name, 0, 4713)
        (tmp_path / name).chmod(mode)
    (tmp_path / "old.json.lock").symlink_to("somebody-elses")
    open_store(tmp_path / "old.json").assign("a")  # without a lock
    (tmp_path / "old.json.lock").unlink()
    tun6.KeyStore(str(tmp_path / "old-keys.json")).issue("a")
    assert owners("old") == dict.fromkeys(("old.json", "old.json.bak", "old-keys.json"), (0, 4713))
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in owners("old")} == {0o640}
    assert not (tmp_path / "somebody-elses").exists()


def test_an_assignment_is_on_disk_before_it_is_returned(assignment_file: Path, open_store: OpenStore) -> None:
    store, synced = open_store(assignment_file), []
    assignment_file.touch()

    def note(fd: int) -> None:
        synced.append((os.fstat(fd).st_ino, assignment_file.stat().st_ino))  # of what is made to last, of what has the name

    with mock.patch.object(os, "fsync", note):
        store.assign("a")
        (file, before), (folder, after) = synced[:2]
        assert file == after != before  # the content before the name
        assert folder == assignment_file.parent.stat().st_ino  # and then the name
        assert len(synced) == 4  # likewise the first backup
        store.assign("a")
    assert len(synced) == 4  # nothing new, nothing written


def test_many_assignments_at_once_share_few_writes(assignment_file: Path, open_store: OpenStore) -> None:
    store, number = open_store(assignment_file), 200
    with mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
        prefixes = results([spawn(store.assign, str(id_)) for id_ in range(number)])
    assert prefixes == [subnet(index) for index in range(number)]
    assert saved(assignment_file) == {str(id_): subnet(id_) for id_ in range(number)}
    assert 2 <= fsync.call_count <= 20


def test_however_a_save_fails_the_id_owns_nothing_new(assignment_file: Path, open_store: OpenStore) -> None:
    store = open_store(assignment_file)
    with mock.patch.object(tun6, "run_in_thread", side_effect=RuntimeError("can't start new thread")):
        for _ in range(2):  # the second time it is not taken for known
            with pytest.raises(RuntimeError, match="can't start new thread"):
                store.assign("a")
            assert store.pool.find("a") is None
    assert store.assign("a") == subnet(0)


def test_a_disk_that_can_not_be_written_refuses_newcomers_only_and_later_recovers(tmp_path: Path, open_store: OpenStore) -> None:
    path = tmp_path / "folder" / "assignments.json"
    path.parent.mkdir()
    store = open_store(path)
    assert store.assign("old") == subnet(0)
    path.parent.rename(tmp_path / "away")
    errors = results([spawn(store.assign, id_) for id_ in "abcdef"])
    assert {type(error) for error in errors} == {tun6.StorageError}
    assert re.fullmatch(rf"{path}.* can't be written: No such file or directory.*", str(errors[0]))
    assert [store.pool.find(id_) for id_ in "abcdef"] == [None] * 6
    assert store.assign("old") == subnet(0)
    (tmp_path / "away").rename(path.parent)
    told = {id_: store.assign(id_) for id_ in "cba"}
    assert len({*told.values(), subnet(0)}) == 4
    assert saved(path) == {"old": subnet(0), **told}


@pytest.mark.parametrize("calls_before", [0, 1])  # the first is for the file, the second for its folder
def test_a_full_disk_neither_spoils_the_file_nor_makes_two_owners(calls_before: int, assignment_file: Path, open_store: OpenStore) -> None:
    store = open_store(assignment_file)
    store.assign("old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "fsync", side_effect=[*[None] * calls_before, full, None, None]):
        with pytest.raises(tun6.StorageError, match="No space left on device"):
            store.assign("a")
        assert store.pool.find("a") is None
        assert saved(assignment_file)["old"] == subnet(0)
        assert store.assign("b") == subnet(1)
    assert saved(assignment_file) == {"old": subnet(0), "b": subnet(1)}


def crash(path: Path, at: int) -> tuple[int, bool]:
    """Two newcomers and a child that dies at its `at`-th call of an operating-system or file function, before or after it.

    Gives how many of them were told their prefix, and whether it died.
    """
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        countdown = [at]

        def hook(frame: object, event: str, function: object) -> None:
            if event not in ("c_call", "c_return"):
                return
            owner = getattr(function, "__self__", None)
            if isinstance(owner, io.IOBase) or getattr(function, "__module__", "") in ("posix", "io", "_io") or owner is os:
                countdown[0] -= 1
                if not countdown[0]:
                    os._exit(9)

        def serve() -> None:  # in a thread, which has an event loop of its own: the parent's does not survive the fork
            store = tun6.AssignmentStore(tun6.PrefixPool(POOL), str(path))
            for id_ in "ab":
                store.assign(id_)
                sys.setprofile(None)
                os.write(tell, b".")
                sys.setprofile(hook)
            os._exit(0)

        threading.setprofile(hook)
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        os._exit(1)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        count = len(pipe.read())
    status = os.waitpid(child, 0)[1] >> 8
    assert status in (0, 9), "the child failed"
    return count, status == 9


def test_a_crash_at_any_system_call_leaves_the_old_map_or_the_new_and_all_that_was_told(tmp_path: Path) -> None:
    maps: list[dict[str, IPv6Network | None]] = [
        {"old": subnet(0)},
        {"old": subnet(0), "a": subnet(1)},
        {"old": subnet(0), "a": subnet(1), "b": subnet(2)},
    ]
    seen, at, died = set(), 0, True
    while died:
        at += 1
        path = tmp_path / f"{at}.json"
        path.write_text(json.dumps({"old": str(subnet(0))}))
        told, died = crash(path, at)
        found = saved(path)
        assert found in maps[told : told + 2], f"after a crash at call {at}"
        seen.add((told, len(found)))
    assert {(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)} <= seen  # it died before and after the name changed hands, both times


@pytest.fixture
def key_store(tmp_path: Path) -> tun6.KeyStore:
    return tun6.KeyStore(str(tmp_path / "keys.json"))


def reopened(store: tun6.KeyStore) -> tun6.KeyStore:
    """What another process reads."""
    return tun6.KeyStore(str(store.path))


def test_only_the_right_key_of_an_id_lets_it_in_and_who_has_none_learns_nothing(key_store: tun6.KeyStore) -> None:
    key, others, revoked = (key_store.issue(id_) for id_ in ("a", "other", "revoked"))
    key_store.set_revoked("revoked", True)
    key_store.check("a", key)
    denied = refusal_of(key_store, "nobody", key)
    assert denied[0] == "denied"
    wrong = ["", "x", others, key[:-1], key + "=", key.swapcase(), "\ud800", "é" * 43]
    for id_ in "a", "nobody", "revoked":
        assert {refusal_of(key_store, id_, each) for each in wrong} == {denied}
    assert refusal_of(key_store, "revoked", revoked)[0] == "revoked"
    key_store.set_revoked("revoked", False)
    key_store.check("revoked", revoked)


def test_a_new_key_ends_the_old_one_and_keys_last_over_restarts(key_store: tun6.KeyStore) -> None:
    old = {id_: key_store.issue(id_) for id_ in IDS}
    new = key_store.issue(IDS[0])
    key_store.set_revoked(IDS[1], True)
    assert len({new, *old.values()}) == len(IDS) + 1
    again = reopened(key_store)
    assert again.ids() == IDS
    again.check(IDS[0], new)
    assert refusal_of(again, IDS[0], old[IDS[0]])[0] == "denied"
    assert refusal_of(again, IDS[1], old[IDS[1]])[0] == "revoked"
    for id_ in IDS[2:]:
        again.check(id_, old[id_])


def test_the_keys_file_is_for_its_owner_alone_and_has_no_key_in_it(key_store: tun6.KeyStore) -> None:
    keys = [key_store.issue("a"), key_store.issue("b"), key_store.issue("b")]
    assert key_store.path.stat().st_mode & 0o7777 == 0o600
    assert os.listdir(key_store.path.parent) == [key_store.path.name]
    text = key_store.path.read_text()
    for key in keys:
        assert re.fullmatch("[A-Za-z0-9_-]{43}", key)
        assert key not in text
        assert base64.urlsafe_b64decode(key + "=").hex() not in text
    assert json.loads(text)["a"] == {"key": "sha256:" + hashlib.sha256(keys[0].encode()).hexdigest()}


HASH = "0a" * 32
GOOD_KEY = f'"key": "sha256:{HASH}"'


@pytest.mark.parametrize(
    ("content", "named"),
    [
        *((json.dumps({"a": entry}), "entry 'a'") for entry in (None, 7, f"sha256:{HASH}", [["key", f"sha256:{HASH}"]])),
        *((content, "entry 'a'") for content in ('{"a": []}', '{"a": {}}')),
        *((json.dumps({"a": {"key": key}}), "entry 'a'") for key in (7, HASH, f"sha256:{HASH[2:]}", f"sha256:{HASH.upper()}")),
        *((json.dumps({"a": {"key": key}}), "entry 'a'") for key in (f"sha256:{HASH}\n", f"sha512:{HASH}")),
        ('{"a": {' + GOOD_KEY + ', "revokd": true}}', "entry 'a'"),
        ('{"a": {' + GOOD_KEY + ', "revoked": 1}}', "entry 'a': revoked is neither true nor false"),
        ('{"a": {' + GOOD_KEY + ', "revoked": null}}', "entry 'a': revoked is neither true nor false"),
        ('{"a": {' + GOOD_KEY + ', "revoked": "no"}}', "entry 'a': revoked is neither true nor false"),
        ('{"a": {' + GOOD_KEY + ', "revoked": true, "revoked": false}}', "entry 'a'"),
        ('{"a": {' + GOOD_KEY + '}, "b": {"revoked": true}}', "entry 'b'"),
        ('{"a": {' + GOOD_KEY + '}, "a": {' + GOOD_KEY + "}}", "entry 'a': the Id is there twice"),
        ("[]", "not one object"),
        ("{" + GOOD_KEY + "}", "entry 'key'"),
        ('{"a": {' + GOOD_KEY + "}", "not a file of keys"),
    ],
)
def test_a_corrupt_keys_file_is_a_sentence_and_changes_nothing(content: str, named: str, key_store: tun6.KeyStore) -> None:
    key = key_store.issue("known")
    key_store.path.write_text(content)
    for read in (key_store.reload, lambda: reopened(key_store)):
        with pytest.raises(tun6.ConfigError, match=f"^{re.escape(str(key_store.path))}\\b.*{named}") as caught:
            read()
        assert str(caught.value).isprintable()
    assert key_store.path.read_text() == content
    key_store.check("known", key)
    assert key_store.ids() == ["known"]


def test_a_reload_takes_what_the_file_says_now(key_store: tun6.KeyStore) -> None:
    editor = reopened(key_store)
    gone, replaced, revoked = (editor.issue(id_) for id_ in ("gone", "replaced", "revoked"))
    key_store.reload()
    for id_, key in {"gone": gone, "replaced": replaced, "revoked": revoked}.items():
        key_store.check(id_, key)
    new = editor.issue("replaced")
    editor.set_revoked("revoked", True)
    entries = json.loads(key_store.path.read_text())
    del entries["gone"]
    key_store.path.write_text(json.dumps(entries))
    key_store.reload()
    assert refusal_of(key_store, "gone", gone)[0] == refusal_of(key_store, "replaced", replaced)[0] == "denied"
    assert refusal_of(key_store, "revoked", revoked)[0] == "revoked"
    key_store.check("replaced", new)


def test_an_edit_of_the_keys_that_is_not_read_yet_is_not_written_over(key_store: tun6.KeyStore) -> None:
    stolen = key_store.issue("stolen")
    key_store.issue("b")
    edit = key_store.path.read_text().replace('"}', '", "revoked": true}', 1)
    key_store.path.write_text(edit)
    for change in (lambda: key_store.issue("c"), lambda: key_store.set_revoked("b", True)):
        with pytest.raises(tun6.RequestError, match=r"keys\.json was edited.*kill -HUP"):
            change()
    key_store.path.write_text(edit + "}")  # and a wrong one is not read either
    with pytest.raises(tun6.ConfigError):
        key_store.reload()
    with pytest.raises(tun6.RequestError, match="was edited"):
        key_store.issue("c")
    key_store.path.write_text(edit)
    key_store.reload()
    key_store.issue("c")
    for reader in (key_store, reopened(key_store)):
        assert refusal_of(reader, "stolen", stolen)[0] == "revoked"
        assert reader.ids() == ["stolen", "b", "c"]


def test_a_save_of_keys_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "keys.json"
    path.parent.mkdir()
    key_store = tun6.KeyStore(str(path))
    key = key_store.issue("a")
    path.parent.rename(tmp_path / "away")
    for change in (lambda: key_store.issue("a"), lambda: key_store.issue("b"), lambda: key_store.set_revoked("a", True)):
        with pytest.raises(tun6.StorageError, match=f"^{path} can't be written: No such file"):
            change()
        key_store.check("a", key)
        assert key_store.ids() == ["a"]
    (tmp_path / "away").rename(path.parent)
    with pytest.raises(KeyError):
        key_store.set_revoked("nobody", True)
    key_store.check("a", key)
    assert reopened(key_store).ids() == ["a"]


def test_changes_of_keys_at_once_are_all_kept(key_store: tun6.KeyStore) -> None:
    keys = results([spawn(key_store.issue, str(number)) for number in range(20)])
    again = reopened(key_store)
    for number, key in enumerate(keys):
        again.check(str(number), key)


def test_limits_last_over_restarts_in_a_file_that_older_versions_do_not_know(tmp_path: Path, open_store: OpenStore) -> None:
    path = tmp_path / "map.json"
    store = open_store(path)
    store.assign("a")
    before = path.read_bytes()
    assert (store.limit_of("a"), os.path.exists(f"{path}.limits")) == (None, False)
    for id_, limit in {"a": 50 * MBIT, "b": 0, "c": 100_000, "d": 1000 * MBIT}.items():
        store.set_limit(id_, limit)
        assert store.limit_of(id_) == limit
    store.set_limit("d", None)
    assert path.read_bytes() == before
    store.close()
    again = open_store(path)
    assert [again.limit_of(id_) for id_ in "abcd"] == [50 * MBIT, 0, 100_000, None]
    in_memory = open_store(None)
    in_memory.set_limit("a", MBIT)
    in_memory.reload_limits()
    assert in_memory.limit_of("a") == MBIT


@pytest.mark.parametrize("content", ['{"a": "50M"}', '{"a": true}', '{"a": 99999}', '{"a": 1e6}', '{"a": -1}', '{"a": null}', "[]", "{"])
def test_a_corrupt_file_of_limits_is_a_sentence_and_changes_nothing(tmp_path: Path, open_store: OpenStore, content: str) -> None:
    path = tmp_path / "map.json"
    store, limits = open_store(path), Path(f"{path}.limits")
    store.set_limit("a", MBIT)
    limits.write_text('{"a": 2000000, "b": 0}')
    with pytest.raises(tun6.RequestError, match=r"map\.json\.limits was edited.*kill -HUP"):
        store.set_limit("c", MBIT)
    store.reload_limits()
    assert [store.limit_of(id_) for id_ in "abc"] == [2 * MBIT, 0, None]
    limits.write_text(content)
    named = "the limit is neither 0" if "a" in content else "not a file of limits"
    with pytest.raises(tun6.ConfigError, match=f"^{limits}.*{named}"):
        store.reload_limits()
    assert [store.limit_of(id_) for id_ in "abc"] == [2 * MBIT, 0, None]
    store.close()
    with pytest.raises(tun6.ConfigError, match=named):
        tun6.AssignmentStore(tun6.PrefixPool(POOL), str(path))
    limits.unlink()
    assert open_store(path).limit_of("a") is None  # the failure has released the lock


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path, open_store: Any, bom: str) -> None:
    config = write_config(tmp_path, server=SERVER)
    Path(config).write_text(bom + Path(config).read_text(), encoding="utf-8")
    assert tun6.read_config(config, "server").listenport == 10000
    path = tmp_path / "map.json"
    path.write_text(bom + json.dumps({"a": str(subnet(3))}), encoding="utf-8")
    assert open_store(path).pool.find("a") == subnet(3)
    (tmp_path / "keys.json").write_text(bom + json.dumps({"a": {"key": f"sha256:{64 * '0'}"}}), encoding="utf-8")
    assert tun6.KeyStore(str(tmp_path / "keys.json")).ids() == ["a"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mac_address_is_one_id_in_every_spelling(tmp_path: Path, open_store: OpenStore, spelling: str) -> None:
    assert tun6.parse_hello({"Id": spelling}).id == MAC
    path = tmp_path / "assignments.json"
    path.write_text(json.dumps({spelling: str(subnet(7))}))
    store = open_store(path)
    assert store.assign(MAC) == subnet(7)
    store.assign("another")
    assert saved(path) == {MAC: subnet(7), "another": subnet(0)}
    (tmp_path / "keys.json").write_text(json.dumps({spelling: {"key": f"sha256:{tun6.key_digest('k')}"}}))
    tun6.KeyStore(str(tmp_path / "keys.json")).check(MAC, "k")


@pytest.mark.parametrize("order", list(itertools.permutations([MAC, *SPELLINGS[1:3]])))
def test_of_several_spellings_in_a_file_one_counts_and_no_prefix_is_lost(
    tmp_path: Path, open_store: OpenStore, caplog: pytest.LogCaptureFixture, order: tuple[str, ...]
) -> None:
    path = tmp_path / "assignments.json"
    path.write_text(json.dumps({id_: str(subnet(number)) for number, id_ in enumerate(order)}))
    store = open_store(path)
    assert store.assign(MAC) == subnet(order.index(MAC))
    assert [record.getMessage().count("remove it") for record in caplog.records] == [1, 1]
    store.assign("another")
    assert saved(path) == {**{id_: subnet(number) for number, id_ in enumerate(order)}, "another": subnet(3)}


def test_a_file_of_assignments_that_was_lost_stops_the_start(tmp_path: Path, open_store: OpenStore) -> None:
    path = tmp_path / "assignments.json"
    path.touch()  # the first start may be empty
    store = open_store(path)
    store.assign("a")
    store.close()
    path.write_bytes(b"")
    with pytest.raises(tun6.ConfigError, match=r"copy that file to this one; to give all clients new prefixes, remove it"):
        open_store(path)
    path.unlink()
    with pytest.raises(tun6.ConfigError, match="it was lost"):
        open_store(path)
    shutil.copy(f"{path}.bak", path)
    store = open_store(path)
    assert store.pool.find("a") == subnet(0)
    store.close()
    path.unlink()
    os.unlink(f"{path}.bak")
    assert open_store(path).pool.owners() == []


def test_the_backup_is_what_was_there_before_a_change_of_several_entries_and_a_day_old_at_most(
    tmp_path: Path, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "assignments.json", 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    store = open_store(path)
    for id_ in ("a", "b"):
        store.assign(id_)
    assert set(saved(Path(f"{path}.bak"))) == {"a"}
    gevent.joinall([gevent.spawn(store.assign, id_) for id_ in ("c", "d", "e")])
    assert set(saved(Path(f"{path}.bak"))) in ({"a", "b"}, {"a", "b", "c"})
    now = tun6.BACKUP_S + 1.0
    store.assign("f")
    assert set(saved(Path(f"{path}.bak"))) == {"a", "b", "c", "d", "e"}
    assert stat.S_IMODE(os.stat(f"{path}.bak").st_mode) == stat.S_IMODE(path.stat().st_mode)


# ---- cluster rules ---------------------------------------------------------------------------------------------------


class Violation(AssertionError):
    """An invariant of the cluster does not hold."""


class LateCommit(NamedTuple):
    """A transaction whose COMMIT has no answer yet: it keeps its rows locked, and is done or undone later."""

    server: str
    rows: list[tun6.Row]


class SimulatedDatabase:
    """PostgreSQL as servers see it: rows, locks, notifications to who listens, and snapshots to which a failover goes back."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.rows: dict[str, tun6.Row] = {}
        self.next = 0  # as the pool's
        self.late: list[LateCommit] = []
        self.reachable = True
        self.timeline = self.accepted = 1
        self.written_back: dict[str, int] = {}  # timeline, by server
        self.listeners: list[SimulatedServer] = []
        self._lost: Any = None  # what a failover goes back to
        self.now = 0.0

    def changes(self, changes: Sequence[tun6.Change], late: str = "") -> list[tun6.Row | Exception] | None:
        """Makes changes as Database does. None: they are locked. `late` is the server whose COMMIT is not answered; or it is at once."""
        self.now += 1
        if any(row.id == change.id for each in self.late for row in each.rows for change in changes):
            return None
        rows, results = dict(self.rows), list[Union[tun6.Row, Exception]]()
        for change in changes:
            try:
                row = change.decide(rows.get(change.id) or change.create(self.now), self.now)
                results.append(row._replace(prefix=next(self._free())) if row.prefix == tun6.UNASSIGNED else row)
            except (tun6.Tun6Error, EOFError, KeyError) as error:
                results.append(error)
                continue
            rows[change.id] = cast(tun6.Row, results[-1])
        changed = [row for row in rows.values() if self.rows.get(row.id) != row]
        if late:
            self.late.append(LateCommit(late, changed))
        else:
            self._write(changed)
        return results

    def _free(self) -> Iterator[IPv6Network]:
        if self.accepted != self.timeline:
            raise tun6.StorageError("commits may be lost")
        rows = [*self.rows.values(), *(row for late in self.late for row in late.rows)]
        taken = {prefix for row in rows for prefix in (row.prefix, *row.former)}
        while subnet(self.next) in taken:
            self.next += 1
        self.next += 1
        yield subnet(self.next - 1)

    def _write(self, rows: Iterable[tun6.Row]) -> None:
        for row in rows:
            self.rows[row.id] = row
            for server in self.listeners:
                server.notified.append(row.id)

    def end_late(self, server: str | None = None) -> None:
        """What was late is done, or undone: one, or all of this server."""
        for late in [each for each in self.late if each.server == server] if server else [self._rng.choice(self.late)]:
            self.late.remove(late)
            if self._rng.random() < 0.7:
                self._write(late.rows)

    def remember(self) -> None:
        """What the standby has."""
        self._lost = dict(self.rows), self.next, dict(self.written_back), self.accepted

    def fail_over(self) -> None:
        """The standby is promoted: what it does not have is lost."""
        if self._lost:
            rows, self.next, written_back, self.accepted = self._lost
            self.rows, self.written_back = dict(rows), dict(written_back)
        self.late.clear()
        self.timeline += 1
        for server in list(self.listeners):
            server.disconnect()

    def enter(self, server: SimulatedServer) -> list[tun6.Row]:
        """As Database.enter: writes back what was lost."""
        known = list(server.view.rows.values())
        taken: list[tun6.Row] = []
        if self.written_back.get(server.name) != self.timeline or any(tun6.lost_rows(known, self.rows)):
            back, taken = tun6.lost_rows(known, self.rows)
            self._write(back)
        self.written_back[server.name] = self.timeline
        if set(self.written_back.values()) == {self.timeline}:
            self.accepted = self.timeline
        return taken


class SimulatedClient:
    """A client with one Id: it has one connection at a time, and knows the epoch of its last answer."""

    def __init__(self, id_: str, has_key: bool) -> None:
        self.id, self.has_key = id_, has_key
        self.at: SimulatedServer | None = None  # where it has a session
        self.asks: Asked | None = None  # at whom it waits for an answer
        self.epoch = 0
        self.unanswered = 0  # beginnings that are in the store, or may be, since the last answer after a COMMIT
        self.pinned = 0  # its epoch in the store after the last pin, which ends sessions up to it also where it is not heard of yet


@dataclasses.dataclass(eq=False)
class Asked:
    """A client's hello that is not answered yet."""

    client: SimulatedClient
    begin: tun6.SessionBegin
    row: tun6.Row | None = None  # as the transaction left it; None: that is still to be made

    @property
    def is_alive(self) -> bool:
        return self.client.asks is self


class SimulatedServer:
    """One server: a ClusterView, and the order in which things reach it."""

    def __init__(self, name: str, cluster: SimulatedCluster) -> None:
        self.name, self._cluster = name, cluster
        self.view = tun6.ClusterView(name)
        self.notified: list[str] = []  # Ids of which it will hear
        self.read: list[tun6.Row] = []  # rows that it has read, and not taken in: in any order
        self.asked: list[Asked] = []
        self.is_cut = False
        self.connected = False
        self.timeline = 0
        self.holds: dict[str, SimulatedClient] = {}  # its sessions
        self._saved: list[tun6.Row] = []  # in the cache

    def disconnect(self) -> None:
        """The store is down: what it has not answered by now is not known, whatever it answers."""
        self.connected = False
        self.notified.clear()
        self.read.clear()
        if self in self._cluster.database.listeners:
            self._cluster.database.listeners.remove(self)
        asked, self.asked = self.asked, []
        for each in asked:
            row = self.view.begin_alone(each.begin)
            if each.is_alive and row and not row.revoked:
                self._hold(each, row, False)
            elif each.is_alive:
                each.client.asks = None
            self.view.conclude(each.begin)

    def connect(self) -> None:
        database = self._cluster.database
        if self.connected or self.is_cut or not database.reachable:
            return
        if database.late and database.written_back.get(self.name) != database.timeline:
            return  # all rows are locked for it
        database.listeners.append(self)
        for row in list(database.rows.values()):
            self.hear(row)
        for row in database.enter(self):
            self._end(row.id, None)
            self.view.forget(row.id)
        if self.timeline != database.timeline:
            self.timeline = database.timeline
            self.view.unsettle()
        self.connected = True

    def hear(self, row: tun6.Row) -> None:
        held, known = self.view.held.get(row.id), self.view.rows.get(row.id)
        before = held.settled if held else False
        reason = self.view.hear(row)
        if not known or known.prefix != row.prefix:
            self.save()
        if reason:
            self._end(row.id, "newest" if before and row.live and "newer" in reason else None)  # a pin ends it, too

    def _end(self, id_: str, why: str | None) -> None:
        """Ends a session. A client that is still there must not lose it to an older one."""
        if id_ not in self.holds:
            return
        client, epoch = self.holds[id_], self.view.held[id_].epoch
        self.leave(id_)
        if client.at is self:
            client.at = None
            can_know = client.unanswered <= 1 and epoch > client.pinned  # the store, that this one is newer than what it has
            strict = client.has_key and (why == "newest" or (why == "settlement" and can_know))
            if strict and not self._cluster.lost_commits:
                raise Violation(f"{id_} lost its newest session at {self.name}, {why}")

    def leave(self, id_: str) -> None:
        """The connection of a session has ended."""
        if id_ in self.holds:
            del self.holds[id_]
            self.view.release(id_)

    def is_asked(self, client: SimulatedClient) -> None:
        """A client says hello."""
        self.leave(client.id)
        for older in [each for each in self.asked if each.client is client]:  # a kill of who waits
            self.asked.remove(older)
            self.view.conclude(older.begin)
        claim = tun6.Claim(client.id, client.epoch, proved=client.has_key, is_alive=lambda: asked_now.is_alive)
        asked_now = client.asks = Asked(client, self.view.begin_change(claim))
        self.asked.append(asked_now)
        if not self.connected:
            self.disconnect()

    def transact(self, asked: Asked, fate: str, leaves: bool = False) -> None:
        """The database makes the beginning. The client may leave while it waits in vain."""
        results = self._cluster.database.changes([asked.begin], self.name if fate == "late" else "")
        result = results[0] if results else None
        if isinstance(result, Exception):
            self.asked.remove(asked)
            self.view.conclude(asked.begin)
            asked.client.asks = None if asked.is_alive else asked.client.asks
            return
        if result:
            asked.row = result
            asked.client.unanswered += 1
            if result.revoked:
                raise Violation(f"{asked.client.id} was revoked, and begins")
        if fate == "late" or not result:
            asked.client.asks = None if asked.is_alive and leaves else asked.client.asks
            self.disconnect()

    def finish(self, asked: Asked) -> None:
        """COMMIT is answered; the client may have left, without a word."""
        self.asked.remove(asked)
        assert asked.row
        self.hear(asked.row)
        self._hold(asked, asked.row, True)
        self.view.conclude(asked.begin)

    def _hold(self, asked: Asked, row: tun6.Row, settled: bool) -> None:
        client, is_alive = asked.client, asked.is_alive
        if is_alive:
            client.asks = None
        if not self.view.hold(asked.begin, row, settled):
            return
        self.holds[client.id] = client
        if not is_alive:
            return
        if asked.begin.claim.proved and client.epoch >= row.epoch:
            raise Violation(f"{client.id} had {client.epoch}, and gets {row.epoch}")
        client.at, client.epoch = self, row.epoch
        client.unanswered = 0 if settled else client.unanswered
        self._cluster.answered(client, row.prefix, row.epoch)

    def pay(self, fate: str) -> None:
        if not self.connected:
            return
        for debt in self.view.debts():
            results = self._cluster.database.changes([debt], self.name if fate == "late" else "")
            if results is None or fate == "late":
                self.disconnect()
                return
            row = results[0] if isinstance(results[0], tun6.Row) else None
            if row:
                self.hear(row)
            reason = self.view.pay(debt, row)
            if reason:
                self._end(debt.id, "settlement" if "newer" in reason else None)

    def restart(self) -> None:
        """It is killed, and starts from its cache."""
        for client in self.holds.values():
            client.at = None if client.at is self else client.at
        for asked in self.asked:
            asked.client.asks = None if asked.is_alive else asked.client.asks
        self.holds.clear()
        self.asked.clear()
        self._cluster.database.end_late(self.name)
        self.disconnect()
        self.view = tun6.ClusterView(self.name)
        for row in self._saved:
            self.view.hear(row)

    def save(self) -> None:
        self._saved = list(self.view.rows.values())


class SimulatedCluster:
    """Servers, a database and clients, whose steps come in an order that a seed decides; it also decides which are frequent."""

    def __init__(self, seed: int) -> None:
        self._rng = rng = random.Random(seed)
        self.database = SimulatedDatabase(rng)
        self.servers = [SimulatedServer(name, self) for name in "ABC"]
        self.clients = [SimulatedClient(f"c{number}", rng.random() < 0.7) for number in range(3)]
        self.lost_commits = False
        self._accepted = False  # whether the operator gave up what was lost
        self._owner: dict[IPv6Network, str] = {}  # who was last told of it
        self._epochs: dict[IPv6Network, int] = {}  # the highest that routers have heard
        self._pinned: set[tuple[str, IPv6Network]] = set()
        self._limits: dict[str, int | None] = {}  # those that the operator has set last
        self.trace: list[str] = []
        often = {"ask": 25, "transact": 35, "finish": 30, "notify": 15, "take": 15, "pay": 15, "connect": 15}
        seldom = {"leave": 4, "cut": 4, "outage": 2, "late": 6, "pin": 3, "revoke": 2, "limit": 2, "restart": 2, "save": 2, "remember": 4}
        seldom["fail over"] = 2
        self._weights = {
            **often,
            **{what: weight * rng.choice((0, 1, 4)) for what, weight in seldom.items()},
            "accept": rng.choice((0, 0, 1)),
        }
        self._late = rng.choice((0.0, 0.2, 0.5))  # how many COMMITs hang
        for server in self.servers:
            server.connect()

    def answered(self, client: SimulatedClient, prefix: IPv6Network, epoch: int) -> None:
        """A client is told of its prefix."""
        owner = self._owner.get(prefix, client.id)
        if owner != client.id and not self._accepted:
            if (client.id, prefix) not in self._pinned:
                raise Violation(f"{prefix} of {owner} is told to {client.id}")
            if any(server.view.held[id_].prefix == prefix for server in self.servers for id_ in server.holds if id_ != client.id):
                raise Violation(f"{prefix} is told to {client.id}, and another one has it still")
            if epoch <= self._epochs.get(prefix, 0):
                raise Violation(f"routers have heard {self._epochs[prefix]} of {prefix}, which {client.id} now has with {epoch}")
        self._owner[prefix] = client.id
        self._epochs[prefix] = max(self._epochs.get(prefix, 0), epoch)

    def step(self) -> None:
        """One thing happens."""
        rng, database = self._rng, self.database
        what = rng.choices(list(self._weights), list(self._weights.values()))[0]
        server, client = rng.choice(self.servers), rng.choice(self.clients)
        fate = "late" if rng.random() < self._late else "committed"
        made = [asked for asked in server.asked if asked.row]
        unmade = [asked for asked in server.asked if not asked.row]
        self.trace.append(f"{what} {server.name} {client.id}")
        if what == "ask":
            if client.at and rng.random() < 0.5:  # else it leaves without a word, and its session stays until somebody notices
                client.at.leave(client.id)
            client.at = None
            server.is_asked(client)
        elif what == "transact" and unmade and server.connected:
            server.transact(rng.choice(unmade), fate, rng.random() < 0.5)
        elif what == "finish" and made:
            server.finish(rng.choice(made))
        elif what == "notify" and server.connected:
            ids, server.notified = set(server.notified) | (set(server.holds) if rng.random() < 0.3 else set()), []
            server.read += [database.rows[id_] for id_ in sorted(ids) if id_ in database.rows]
        elif what == "take" and server.read:
            server.hear(server.read.pop(rng.randrange(len(server.read))))
        elif what == "pay":
            server.pay(fate)
        elif what == "connect":
            server.connect()
        elif what == "leave" and server.holds:
            self._notice(server, rng.choice(sorted(server.holds)))
        elif what == "cut":
            server.is_cut = not server.is_cut
            if server.is_cut:
                server.disconnect()
        elif what == "outage":
            database.reachable = not database.reachable
            for each in self.servers if not database.reachable else ():
                each.disconnect()
        elif what == "late" and database.late:
            database.end_late()
        elif what == "pin" and client.id in database.rows:
            self.pin(client, subnet(rng.randrange(8)))
        elif what == "revoke" and client.id in database.rows and database.reachable:
            row = database.rows[client.id]
            database.changes([tun6.KeyChange(client.id, row.key or "", not row.revoked)])
        elif what == "limit" and client.id in database.rows and database.reachable:
            limit = rng.choice((None, 0, MBIT))
            if database.changes([tun6.LimitChange(client.id, limit)]):
                self._limits[client.id] = limit
        elif what == "restart":
            server.restart()
        elif what == "save":
            server.save()
        elif what == "remember":
            database.remember()
        elif what == "fail over":
            self.lost_commits = True
            database.fail_over()
        elif what == "accept" and database.accepted != database.timeline:
            self._accepted, database.accepted = True, database.timeline
        for each in self.servers:
            for id_, held in each.view.held.items():
                if held.settled and each.view.epoch_of(id_) > held.epoch:
                    raise Violation(f"{each.name} holds {held.epoch} of {id_}, and has heard {each.view.epoch_of(id_)}")

    def _notice(self, server: SimulatedServer, id_: str) -> None:
        """The connection of a session ends, or turns out to be dead."""
        client = server.holds[id_]
        server.leave(id_)
        client.at = None if client.at is server else client.at

    def pin(self, client: SimulatedClient, prefix: IPv6Network) -> None:
        """The operator gives a client another /64; one that another had only when all have heard that it is free."""
        database = self.database
        if not database.reachable or database.late or database.accepted != database.timeline:
            return
        rows = list(database.rows.values())
        epochs = [row.epoch for row in rows if row.id != client.id and prefix in row.former]
        heard = all(server.connected and not (server.notified or server.read or server.asked) for server in self.servers)
        if any(row.prefix == prefix for row in rows) or (epochs and not heard):
            return
        self._pinned.add((client.id, prefix))
        database.changes([tun6.Pin(client.id, prefix, max(epochs) + tun6.FREED_LEAD if epochs else 0)])
        client.pinned = database.rows[client.id].epoch

    def heal(self) -> None:
        """All faults end; then each client that is still there has one session, and it is the newest."""
        database, rng = self.database, self._rng
        gone = [client for client in self.clients if rng.random() < 0.3]
        database.reachable = True
        while database.late:
            database.end_late()
        for server in self.servers:
            server.is_cut = False
            for id_ in [id_ for id_, client in server.holds.items() if client in gone]:
                self._notice(server, id_)
        for client in gone:
            client.asks = None
        for _ in range(4):
            for server in self.servers:
                server.connect()
            for server in self.servers:
                for asked in list(server.asked):
                    if not asked.row:
                        server.transact(asked, "committed")
                    if asked.row:
                        server.finish(asked)
                for id_ in [id_ for id_, client in server.holds.items() if client in gone]:
                    self._notice(server, id_)
                server.pay("committed")
            for server in self.servers:
                rng.shuffle(server.read)
                ids = {*server.notified, *server.holds}
                server.notified.clear()
                for row in [*server.read, *(database.rows[id_] for id_ in sorted(ids) if id_ in database.rows)]:
                    server.hear(row)
                server.read.clear()
            for client in self.clients:
                found = database.rows.get(client.id)
                if not client.at and not client.asks and client not in gone and not (found and found.revoked):
                    rng.choice(self.servers).is_asked(client)
        for client in self.clients:
            self._check(client, client in gone)
        prefixes = [server.view.held[id_].prefix for server in self.servers for id_ in server.holds]
        if len(set(prefixes)) < len(prefixes):
            raise Violation("two Ids have one /64")

    def _check(self, client: SimulatedClient, is_gone: bool) -> None:
        row = self.database.rows.get(client.id)
        if row and not self.lost_commits and row.limit != self._limits.get(client.id):
            raise Violation(f"{client.id} was limited to {self._limits.get(client.id)}, and the store says {row}")
        holders = [server for server in self.servers if client.id in server.holds]
        for each in self.servers:
            if each.view.rows.get(client.id) != row:
                raise Violation(f"{each.name} knows {each.view.rows.get(client.id)}, and the store has {row}")
        if row is None or row.revoked or is_gone:
            if holders or (row and row.live):
                raise Violation(f"{client.id} has no connection, and yet a session at {[each.name for each in holders]}: {row}")
            return
        if not client.at or holders != [client.at]:
            raise Violation(f"{client.id} is at {client.at and client.at.name}, its sessions are at {[each.name for each in holders]}")
        held = client.at.view.held[client.id]
        if (row.server, row.epoch, row.live) != (client.at.name, held.epoch, True) or not held.settled:
            raise Violation(f"{client.id} has {held.epoch} at {client.at.name}, and the store says {row}")


def simulate(seed: int, steps: int = 100) -> None:
    """One interleaving. Raises Violation, with the steps that led to it."""
    cluster = SimulatedCluster(seed)
    try:
        for _ in range(steps):
            cluster.step()
        cluster.trace.append("heal")
        cluster.heal()
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}; after {', '.join(cluster.trace[-25:])}") from None


def row_of(id_: str = "x", **fields: Any) -> tun6.Row:
    return tun6.Row(id_, subnet(0), **fields)


def test_what_rows_say_together_does_not_depend_on_which_was_read_first() -> None:
    old = row_of(version=1, epoch=5, server="a", live=True)
    ended = old._replace(live=False, last=9.0)
    operators: dict[str, Any] = {"version": 2, "key": "k", "limit": MBIT, "former": (subnet(7),), "moved": 3.0}
    changed = row_of(epoch=4, server="b", live=True, **operators)._replace(prefix=subnet(1))
    both = changed._replace(epoch=5, server="a", live=False, last=9.0, former=(subnet(7), subnet(0)))
    for rows in itertools.permutations([old, ended, changed]):
        assert functools.reduce(tun6.merge_rows, rows) == both
    twice = [
        ended._replace(**fields) for fields in ({"since": 8.0}, {"since": 8.0, "last": 10.0}, {"since": 7.0, "last": 11.0, "server": "b"})
    ]
    for rows in itertools.permutations(twice):  # what an epoch was given for, that was given again after a failover
        assert functools.reduce(tun6.merge_rows, rows) == twice[1]


@pytest.mark.parametrize(
    ("proved", "said", "floor"),
    [
        (True, 7, 7),
        (True, 2, 3),
        (False, 7, 3),
        (True, 3 + tun6.EPOCH_LEAD_MAX, 3 + tun6.EPOCH_LEAD_MAX),
        (True, 4 + tun6.EPOCH_LEAD_MAX, 3),
    ],
)
def test_the_clients_epoch_counts_if_it_proved_its_key_and_within_a_bound(proved: bool, said: int, floor: int) -> None:
    view = tun6.ClusterView("a")
    view.hear(row_of(epoch=3))
    assert view.begin_change(tun6.Claim("x", epoch=said, proved=proved)).floor == floor


def test_a_session_does_not_begin_when_its_key_was_changed_meanwhile_or_its_epochs_are_used_up() -> None:
    begin = tun6.SessionBegin("x", "a", 0, "old", tun6.Claim("x"))
    for fields, code in (
        ({"key": "new"}, "busy"),
        ({"key": "old", "revoked": True}, "revoked"),
        ({"key": "old", "epoch": tun6.EPOCH_MAX}, "server-error"),
    ):
        with pytest.raises(tun6.Refusal) as caught:
            begin.decide(row_of(**fields), 1.0)
        assert caught.value.code == code
    assert tun6.Lease(subnet(0), begin.decide(row_of(key="old", epoch=tun6.EPOCH_MAX - 1), 1.0).epoch).metric == 1


def test_takeovers_are_those_from_sessions_that_lived_and_the_last_few_are_kept() -> None:
    row = row_of()
    for now, (server, ends) in enumerate([("a", True), ("b", False), ("a", False), ("a", False), ("b", False), ("c", False)]):
        row = tun6.SessionBegin("x", server, 0, None, tun6.Claim("x")).decide(row, now)
        if ends:
            row = tun6.SessionEnd("x", server, row.epoch).decide(row, now)
    assert row.takeovers == (2, 4, 5)  # not from a to a: who took over there says its server
    assert tun6.SessionBegin("x", "c", 0, None, tun6.Claim("x", took_over=True)).decide(row, 6).takeovers == (4, 5, 6)


def test_what_can_not_be_written_back_is_what_another_id_has_by_now() -> None:
    stored = {"new": row_of("new")}
    lost, other = row_of("lost"), row_of("other")._replace(prefix=subnet(1))
    assert tun6.lost_rows([lost, other, stored["new"]], stored) == ([other], [lost])


@pytest.mark.parametrize(
    ("row", "after"),
    [
        ((4, "b", True), (5, "a", True)),  # an older one
        ((5, "a", True), (5, "a", True)),  # its own: COMMIT was done, and not answered
        ((5, "a", False), (6, "a", True)),
        ((5, "b", True), (6, "a", True)),  # which of the two is newer is not known
        ((5, "b", False), (6, "a", True)),
        ((7, "b", False), (8, "a", True)),
        ((7, "b", True), (7, "b", True)),  # it has lost
    ],
)
def test_a_session_of_an_outage_goes_on_unless_a_higher_one_lives(row: tuple[int, str, bool], after: tuple[int, str, bool]) -> None:
    epoch, server, live = row
    settled = tun6.SessionSettlement("x", "a", 5).decide(row_of(epoch=epoch, server=server, live=live), 1.0)
    assert (settled.epoch, settled.server, settled.live) == after


@pytest.mark.parametrize(("epoch", "server", "lives"), [(5, "a", False), (4, "a", False), (6, "a", True), (5, "b", True), (4, "b", True)])
def test_an_end_is_that_of_its_own_session_and_those_before(epoch: int, server: str, lives: bool) -> None:
    row = tun6.SessionEnd("x", "a", 5, 10, 20).decide(row_of(epoch=epoch, server=server, live=True), 1.0)
    assert (row.live, row.received, row.sent) == ((True, 0, 0) if lives else (False, 10, 20))


def test_a_session_ends_whose_prefix_is_changed_even_while_the_store_does_not_know_it() -> None:
    view = tun6.ClusterView("a")
    view.hear(row_of())
    begin = view.begin_change(tun6.Claim("x"))
    assert view.hold(begin, view.begin_alone(begin) or row_of(), False)
    assert view.hear(row_of(version=2)._replace(prefix=subnet(1))) == "its prefix was changed"
    view.held["x"].settled = True
    view.unsettle()  # commits may be lost
    assert [type(debt) for debt in view.debts()] == [tun6.SessionSettlement]


def test_a_pin_ends_sessions_also_when_it_is_undone_at_once_and_begins_above_all_that_routers_have_heard() -> None:
    row = tun6.Pin("x", subnet(1)).decide(row_of(epoch=5, server="a", live=True), 1.0)
    assert (row.epoch, row.live, row.former) == (6, False, (subnet(0),))
    back = tun6.Pin("x", subnet(0)).decide(row, 1.0)
    assert (back.epoch, back.former, back.version > row.version) == (7, (subnet(1),), True)
    assert tun6.Pin("x", subnet(2), floor=900).decide(row, 1.0).epoch == 900
    assert tun6.Pin("new", subnet(2), floor=900).create(1.0).epoch == 900


def test_a_limit_is_another_version_of_its_row_only_where_it_changes() -> None:
    row = row_of(epoch=5, server="a", live=True)
    for limit in (MBIT, 0, None):
        changed = tun6.LimitChange("x", limit).decide(row, 1.0)
        assert changed == row._replace(limit=limit, version=changed.version) and changed.version > row.version
        row = tun6.LimitChange("x", limit).decide(changed, 2.0)
        assert row is changed
    with pytest.raises(KeyError):
        tun6.LimitChange("x", MBIT).create(1.0)


@pytest.mark.parametrize(("pins", "stays"), [(0, True), (2, False)])
def test_a_session_where_a_pin_and_its_undoing_are_not_heard_of_may_lose_to_one_that_its_client_left_unanswered(
    pins: int, stays: bool
) -> None:
    cluster = SimulatedCluster(0)
    database, client, (a, _, c) = cluster.database, cluster.clients[0], cluster.servers
    client.has_key = True

    def ask(server: SimulatedServer) -> Asked:
        server.is_asked(client)
        asked = cast(Asked, client.asks)
        server.transact(asked, "committed")
        return asked

    c.finish(ask(c))
    c.disconnect()
    home = database.rows[client.id].prefix
    for prefix in (subnet(7), home)[:pins]:
        cluster.pin(client, prefix)
    left = ask(a)
    c.is_asked(client)  # which counts on from what the client says, and can't know of the numbers that pins have used
    a.finish(left)
    c.connect()
    c.pay("committed")
    assert (client.at is c) == stays
    if not stays:
        c.finish(ask(c))
    row = database.rows[client.id]
    assert client.at is c and (row.server, row.epoch, row.live) == ("C", c.view.held[client.id].epoch, True)


def test_in_a_thousand_interleavings_no_64_has_two_ids_and_the_newest_session_of_each_id_stays() -> None:
    for seed in range(1000):
        simulate(seed)


@pytest.mark.parametrize(
    "said, proved, floor",
    [
        (6, True, 7),
        (8, True, 8),
        (7 + tun6.EPOCH_LEAD_MAX, True, 7 + tun6.EPOCH_LEAD_MAX),
        (8 + tun6.EPOCH_LEAD_MAX, True, 7),
        (tun6.EPOCH_MAX, True, 7),
        (8, False, 7),
    ],
)
def test_what_a_client_says_of_its_epoch_counts_within_a_bound_and_only_with_its_key(said: int, proved: bool, floor: int) -> None:
    view = tun6.ClusterView("here")
    view.hear(tun6.Row("a", subnet(0), epoch=7))
    assert view.floor(tun6.Claim("a", said, proved)) == floor
    assert view.floor(tun6.Claim("unknown", said, proved)) == (said if proved and said <= tun6.EPOCH_LEAD_MAX else 0)


@pytest.mark.parametrize(
    "said, proved, took_over, server, times",
    [
        (0, True, False, "other", (1.0, 9.0)),  # of a legacy client nobody knows
        (6, True, False, "other", (1.0, 9.0)),  # one that had an older session
        (7, True, False, "other", (1.0,)),
        (7, False, False, "other", (1.0, 9.0)),  # anybody could say so
        (7, True, True, "here", (1.0,)),
        (6, True, True, "here", (1.0, 9.0)),
        (6, True, False, "here", (1.0,)),  # nobody had it
    ],
)
def test_a_client_that_moves_with_its_own_session_takes_it_from_nobody(
    said: int, proved: bool, took_over: bool, server: str, times: object
) -> None:
    row = tun6.Row("a", subnet(0), epoch=7, server=server, live=True, takeovers=(1.0,))
    begin = tun6.SessionBegin("a", "here", 7, None, tun6.Claim("a", said, proved, took_over=took_over))
    assert begin.decide(row, 9.0).takeovers == times


# ---- kernel ----------------------------------------------------------------------------------------------------------

FAKE_IP = r"""#!/bin/sh
# like `ip -6 -force -batch -` of iproute2: notes each run and its commands, goes on behind those that fail
echo run >> "$0.log"
status=0 number=0
while read -r line; do
    number=$((number + 1))
    echo "$line" >> "$0.log"
    case "$line" in
        broken*) echo "Cannot open netlink socket: Out of memory" >&2; exit 255 ;;
        *bad*) printf 'RTNETLINK answers: Bad luck with %s\nCommand failed -:%d\n' "$line" "$number" >&2; status=1 ;;
        *noisy*) echo "Warning: noise" >&2 ;;
    esac
done
exit $status
"""


Batches = Callable[[], list[list[str]]]


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batches:
    """A fake `ip`; gives the commands of each run of it."""
    program = tmp_path / "ip"
    program.write_text(FAKE_IP)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def read() -> list[list[str]]:
        _, *runs = (tmp_path / "ip.log").read_text().split("run\n")
        return [run.splitlines() for run in runs]

    return read


def steps(*commands: str) -> list[tun6.Step]:
    return [tun6.Step(command, f"undo {command}") for command in commands]


def test_a_plan_is_one_run_of_ip_and_is_undone_last_step_first(batches: Batches) -> None:
    kernel = tun6.Kernel()
    plan = [*steps("one", "two"), tun6.Step("with the device"), *steps("noisy")]
    kernel.apply(plan)
    kernel.undo(plan)
    assert batches() == [["one", "two", "with the device", "noisy"], ["undo noisy", "undo two", "undo one"]]


def test_when_steps_fail_the_error_names_the_first_and_the_others_are_undone_last_first(batches: Batches) -> None:
    with pytest.raises(tun6.KernelError, match=r"^`ip -6 bad four` failed: .*Bad luck with bad four$"):
        tun6.Kernel().apply(steps("one", "two", "three", "bad four", "five"))
    assert batches()[1:] == [["undo five", "undo three", "undo two", "undo one"]]
    with pytest.raises(tun6.KernelError, match=r"`ip -6 bad two` failed: Bad luck with bad two$"):
        tun6.Kernel().apply(steps("one", "bad two", "bad three"))
    tun6.Kernel().undo(steps("one", "bad", "three"))
    assert batches()[-1] == ["undo three", "undo bad", "undo one"]


def test_plans_that_wait_share_a_process_and_those_at_fault_fail_each_for_its_own_reason(batches: Batches) -> None:
    kernel = tun6.Kernel()
    outcomes = results([spawn(kernel.apply, steps(f"{number}", f"bad {number}" if number in (13, 31) else "fine")) for number in range(50)])
    failed = {number: str(outcome) for number, outcome in enumerate(outcomes) if outcome is not None}
    assert failed == {number: f"`ip -6 bad {number}` failed: Bad luck with bad {number}" for number in (13, 31)}
    commands = [command for run in batches() for command in run]
    assert [command for command in commands if command.isdigit()] == [str(number) for number in range(50)]
    assert [command for command in commands if "undo" in command] == ["undo 13", "undo 31"]
    assert len(batches()) <= 4


def test_an_ip_that_breaks_or_is_missing_is_a_kernel_error(batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tun6.Kernel()
    with pytest.raises(tun6.KernelError, match="Out of memory"):
        kernel.apply(steps("broken", "two"))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(tun6.KernelError, match="`ip` can't be run: No such file"):
        kernel.apply(steps("one", "two"))
    kernel.undo(steps("one", "two"))  # nothing more can be done


def test_when_ip_is_killed_amid_its_commands_none_of_them_counts_as_done(batches: Batches, tmp_path: Path) -> None:
    (tmp_path / "ip").write_text(FAKE_IP.replace("noisy*)", "killed*) kill -9 $$ ;;\n        noisy*)"))
    kernel = tun6.Kernel()
    outcomes = results([spawn(kernel.apply, steps(command)) for command in ("good", "bad", "killed", "behind it")])
    assert [type(outcome) for outcome in outcomes] == [tun6.KernelError] * 4
    assert "behind it" not in [command for run in batches() for command in run]


def test_where_the_kernel_gives_no_larger_buffer_devices_are_watched_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun6.DeviceMonitor, "SO_RCVBUFFORCE", 0x7777)  # as in an unprivileged container: an error
    tun6.DeviceMonitor()._open().close()


@pytest.mark.parametrize(
    ("machine", "number"), [("x86_64", 0x400454D0), ("armv7l", 0x400454D0), ("mips64", 0x800454D0), ("ppc64le", 0x800454D0)]
)
def test_ioctl_numbers_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch, machine: str, number: int) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert tun6.write_ioctl("T", 208) == number


def test_an_undo_whose_ip_was_killed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ip = tmp_path / "ip"
    ip.write_text(f"#!/bin/sh\ncat >> {tmp_path}/commands\n[ -e {tmp_path}/killed ] || {{ touch {tmp_path}/killed; kill -9 $$; }}\n")
    ip.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tun6.Kernel().undo([tun6.Step("up", "down")])
    assert (tmp_path / "commands").read_text() == "down\ndown\n"


@pytest.mark.parametrize(("pool", "has"), [("2001:db8::/48", "2001:db8:1::1"), ("fd00:1::/48", "fd00:2::1")])
def test_which_address_of_the_machine_is_routed_where_the_pool_is(monkeypatch: pytest.MonkeyPatch, pool: str, has: str) -> None:
    found = [("lo", IPv6Address("::1")), ("eth0", IPv6Address("fe80::1")), ("tun6", IPv6Address(has))]
    monkeypatch.setattr(tun6, "machine_addresses", lambda: found)
    assert not tun6.has_routed_address(IPv6Network(pool))
    found.append(("eth1", IPv6Address("fd00:2::1" if has.startswith("2") else "2001:db8:1::1")))
    assert not tun6.has_routed_address(IPv6Network(pool))
    found.append(("eth2", IPv6Address(has)))
    assert tun6.has_routed_address(IPv6Network(pool))
    assert not tun6.has_routed_address(IPv6Network(pool), IPv6Address(has))


def test_the_addresses_of_the_machine_are_those_that_ip_shows() -> None:
    shown = json.loads(subprocess.run(["ip", "-6", "-j", "addr"], capture_output=True, text=True, check=True).stdout)
    expected = {(link["ifname"], IPv6Address(entry["local"])) for link in shown for entry in link["addr_info"]}
    assert set(tun6.machine_addresses()) == expected


# ---- connections -----------------------------------------------------------------------------------------------------


class FakeTcp:
    """A socket that tells of its segments what a test says."""

    def __init__(self) -> None:
        self.mss, self.segments, self.with_data = 1448, 1000, 900

    def getsockopt(self, *_: int) -> bytes:
        info = bytearray(200)
        for at, value in ((16, self.mss), (136, self.segments % 2**32), (156, self.with_data % 2**32)):
            struct.pack_into("I", info, at, value)
        return bytes(info)


def test_a_rate_on_the_wire_has_room_for_headers_and_for_acknowledgements() -> None:
    tcp = FakeTcp()
    rate, now, second = tun6.WireRate(cast(gevent.socket.socket, tcp), 12_000_000), 100.0, 1_500_000.0
    assert rate.payload(now) == pytest.approx(second * 1448 / 1500)  # from the first second on
    tcp.segments = tcp.with_data = 2**32 - 500  # a connection may be old
    rate = tun6.WireRate(cast(gevent.socket.socket, tcp), 12_000_000)
    for _ in range(100):
        payload, now = rate.payload(now), now + 0.05
        tcp.with_data += round(payload * 0.05 / 1448)
        tcp.segments += round(payload * 0.05 / 1448) + 100  # 2,000 acknowledgements a second
    assert payload * 1500 / 1448 + 2000 * 52 == pytest.approx(second, rel=0.001)
    now += 5  # in which nothing was sent
    assert rate.payload(now) > 0.99 * second * 1448 / 1500
    tcp.segments += 10**6
    assert rate.payload(now + 0.05) == pytest.approx(second / 2 * 1448 / 1500)  # whatever comes, data go on
    tcp.mss = 536
    assert rate.payload(now + 50) == pytest.approx(second * 536 / 588, rel=0.02)


@pytest.mark.parametrize("bytes_per_s", [12_500, 12_500_000_000, 1e30])
def test_the_kernel_holds_a_pacing_rate_however_large_it_is(bytes_per_s: float) -> None:
    with gevent.socket.socket() as sock:
        tun6.set_pacing_rate(sock, bytes_per_s)
        held = sock.getsockopt(socket.SOL_SOCKET, tun6.SO_MAX_PACING_RATE, 8)
        assert int.from_bytes(held, sys.byteorder) == min(bytes_per_s, 2 ** (8 * len(held)) - 2)


@pytest.mark.parametrize(("aes", "ciphers"), [(True, "AES"), (False, "CHACHA20")])
def test_a_client_gets_the_cipher_that_is_fast_on_its_cpu(aes: bool, ciphers: str, cert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun6, "has_aes_instructions", lambda: aes)
    client, _, _ = tls_pair(tun6.client_tls_context(pinned=True), cert)
    cipher = client.cipher()
    assert cipher
    assert ciphers in cipher[0]


@contextmanager
def tls_stream(cert: Path) -> Iterator[tuple[tun6.TlsStream, TlsSocket]]:
    """A server's end of a connection inside TLS, whose socket does not block, and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), timeout=5)
        ours, _ = listener.accept()
    with theirs, gevent.socket.socket(fileno=ours.detach()) as sock, ThreadPoolExecutor() as threads:
        encrypted = threads.submit(TlsSocket, theirs)
        stream = tun6.TlsStream(sock, tun6.server_tls_context(str(cert)))
        while not encrypted.done():
            gevent.sleep(0.001)
        yield stream, encrypted.result()


READ_INTO = memoryview(bytearray(tun6.BATCH_BYTES))


def next_read(stream: tun6.TlsStream) -> bytes | None:
    """What one turn of the pump gets as soon as something is there."""
    gevent.socket.wait_read(stream.sock.fileno(), timeout=5)
    got = stream.readinto(READ_INTO)
    return None if got is None else bytes(READ_INTO[:got])


def test_a_tls_session_that_moved_full_batches_keeps_little_memory_of_them(cert: Path) -> None:
    plain = os.urandom(tun6.BATCH_BYTES)
    with ExitStack() as sessions:
        pairs = [sessions.enter_context(tls_stream(cert)) for _ in range(50)]
        ctypes.CDLL(None).malloc_trim(0)
        before = tun6.process_resources()["memory"]
        for stream, peer in pairs:
            came = bytearray()
            assert len(stream.encrypt(plain)) > len(plain)
            records = b"".join(peer.encrypt(plain[at : at + 10_000]) for at in range(0, len(plain), 10_000))
            peer.raw.setblocking(False)
            while len(came) < len(plain):
                with suppress(BlockingIOError):
                    records = records[peer.raw.send(records) :] if records else records
                came += next_read(stream) or b""
            assert came == plain
        ctypes.CDLL(None).malloc_trim(0)
        grown = tun6.process_resources()["memory"] - before
        assert grown < len(pairs) * (128 << 10)  # half of it for the peers, which are of this process too


def test_a_peer_that_asks_for_new_keys_without_end_is_sent_away(cert: Path) -> None:
    most = 0
    with tls_stream(cert) as (stream, peer), pytest.raises(tun6.ProtocolError, match="more new keys than it takes"):
        for _ in range(200):
            peer.raw.sendall(peer.new_keys(tun6.POST_HANDSHAKE_RECORDS_MAX, ask=True) + peer.encrypt(b"x"))
            assert next_read(stream) == b"x"
            assert len(stream._outgoing) > most
            most = len(stream._outgoing)
            assert most < tun6.RECORD_MAX + 1000
    assert most > tun6.RECORD_MAX - 1000


def test_what_tls_itself_has_to_say_goes_to_its_own_peer_alone(cert: Path) -> None:
    with tls_stream(cert) as (one, its_peer), tls_stream(cert) as (other, other_peer):
        its_peer.raw.sendall(its_peer.new_keys(2, ask=True) + its_peer.encrypt(b"x"))
        assert next_read(one) == b"x"
        for stream, peer in ((other, other_peer), (one, its_peer)):
            stream.send(b"what it has to say")
            assert peer.recv(100) == b"what it has to say"


def test_a_peer_that_says_nothing_but_new_keys_is_sent_away(cert: Path) -> None:
    with tls_stream(cert) as (stream, peer):
        for _ in range(3):
            peer.raw.sendall(peer.new_keys(tun6.POST_HANDSHAKE_RECORDS_MAX))
            assert next_read(stream) is None
        peer.raw.sendall(peer.new_keys(tun6.POST_HANDSHAKE_RECORDS_MAX + 1))
        with pytest.raises(tun6.ProtocolError, match="more of TLS itself"):
            next_read(stream)


def test_records_of_a_byte_each_come_fewer_at_a_time(cert: Path) -> None:
    count = 30_000
    with tls_stream(cert) as (stream, peer), ThreadPoolExecutor() as threads:
        sent = threads.submit(peer.raw.sendall, b"".join(peer.encrypt(bytes([number % 251])) for number in range(count)))
        turns, came = [], b""
        while len(came) < count:
            data = next_read(stream) or b""
            turns.append(len(data))
            came += data
        sent.result()
        assert came == bytes(number % 251 for number in range(count))
        first = next(number for number, size in enumerate(turns) if size > tun6.BATCH_RECORDS)
        assert all(size < 1.5 * tun6.BATCH_RECORDS for size in turns[first + 1 :]), turns


def test_the_socket_has_the_cap_and_the_congestion_control_that_the_controller_wants() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = gevent.socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    round_trips: list[float] = []
    with sock, peer, io.FileIO(sock.fileno(), "r+", closefd=False) as file:

        def option(level: int, name: int) -> bytes:
            return cast(bytes, sock.getsockopt(level, name, 16))

        def state() -> tuple[str, int]:
            writer._update(time.monotonic())
            name = option(socket.IPPROTO_TCP, tun6.TCP_CONGESTION).rstrip(b"\0").decode()
            return name, int.from_bytes(option(socket.SOL_SOCKET, tun6.SO_MAX_PACING_RATE), sys.byteorder)

        bbr = tun6.find_congestion_controls("auto", "real").real or "reno"
        sock.setsockopt(socket.IPPROTO_TCP, tun6.TCP_CONGESTION, bbr.encode())
        writer = tun6.PacedWriter(sock, file.write, False, None, round_trips.append)
        assert writer(memoryview(bytes(1000))) == 1000
        assert len(peer.recv(1000)) == 1000
        wait_until("all is acknowledged", lambda: not tun6.is_unacknowledged(sock))
        controller = mock.Mock(cap=None, competes=False, hurries=False, renews=False)
        writer._controller = controller
        _, unlimited = state()
        assert unlimited > 1 << 60
        sample = controller.update.call_args[0][0]
        assert 1000 <= sample.delivered <= 1001
        assert 0 < sample.shortest <= sample.round_trip < 1
        assert (sample.full, sample.segments, sample.repeated, sample.repairing) == (False, 1, 0, False)
        assert sample.starting == (True if bbr == "bbr" else None)
        assert round_trips[-1] == sample.round_trip
        controller.cap, controller.renews = 123_456.7, True
        assert state() == (bbr, 123_456)
        controller.competes, controller.hurries, controller.renews = True, True, False
        assert state()[0] == "reno"
        controller.hurries = False
        assert state()[0] == "cubic"
        controller.competes, controller.cap = False, None
        name, rate = state()
        assert (name, rate > 1 << 60) == (bbr, True)


# ---- session ---------------------------------------------------------------------------------------------------------


def test_memory_is_given_back_after_the_start_and_when_little_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, trims = tun6.SharedBuffer(10 << 20), []
    for name, value in {"SHARED_BUFFER": shared, "TRIM_INTERVAL_S": 0.001, "run_in_thread": lambda *_: trims.append(shared.free)}.items():
        monkeypatch.setattr(tun6, name, value)
    work = spawn(tun6.trim_heap)
    try:
        for waits in (0, 5 << 20, 1000, 5 << 20, 0):
            shared.free = shared.size - waits
            gevent.sleep(0.02)  # some of its turns
        assert trims == [shared.size, shared.size - 1000, shared.size]
    finally:
        work.kill()


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        ([TSO6] * 8 + [USO6] * 8, None),
        ([TSO6] * 9, "tso6"),
        ([offload(gso_type=0x84, gso_size=1440)] * 9, "tso6"),
        ([TSO6] * 8 + [USO6] * 9, "uso6"),
        ([PLAIN, offload()] * 50, None),
        ([b"\x60\x40"] * 50, None),  # a legacy peer's, whose second byte is as that of a kind
    ],
    ids=["few", "tcp", "ecn", "udp", "not offloaded", "legacy"],
)
def test_a_frame_that_the_kernel_refuses_is_dropped_and_many_of_a_gso_kind_end_the_session(
    monkeypatch: pytest.MonkeyPatch, sent: list[bytes], kind: str | None
) -> None:
    refuse, bare = mock.Mock(side_effect=OSError(errno.EINVAL, "Invalid argument")), len(sent[0]) != len(PLAIN)
    monkeypatch.setattr(os, "writev", refuse)
    tun, deframer, traffic = mock.Mock(), mock.Mock(), tun6.TrafficCounters()
    tun.file.write = refuse
    deframer.push.return_value = [memoryview(header + packet()) for header in sent]
    deframer.pull.side_effect = EOFError
    near, far = socket.socketpair()
    far.close()
    with near, pytest.raises((EOFError, tun6.OffloadRefused)) as ended:
        tun6.pump_tcp_to_tun(near.fileno(), mock.Mock(), tun, deframer, b"", bare, traffic)
    assert getattr(ended.value, "kind", None) == kind
    assert traffic.dropped == refuse.call_count == len(sent)
    assert traffic.refused == Counter("none" if bare else tun6.GSO_KINDS.get(header[1], "none") for header in sent)
    if kind:
        setting = {"tso6": "no", "uso6": "tso6"}[kind]
        assert str(ended.value) == (
            f"this kernel refuses its {kind} frames, so it is not offered {kind} again; `offload = {setting}` in config.ini does so"
            " from the start"
        )


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("bits", [100_000, 100_000 * MBIT])
def test_what_a_limited_peer_sends_reaches_the_tun_as_it_is(monkeypatch: pytest.MonkeyPatch, bare: bool, bits: int) -> None:
    packets, written = [packet(bytes([number]) * 1400) for number in range(5)], cast("list[bytes]", [])

    def write(frame: Bytes) -> int:
        written.append(bytes(frame))
        if len(written) == len(packets):
            far.close()
        return len(frame)

    def pull(read: object, most: int) -> list[memoryview]:
        if far.fileno() < 0:
            raise EOFError
        with suppress(BlockingIOError):
            near.recv(1, socket.MSG_DONTWAIT)
            return frames.pop(0)
        return []

    frames = [[memoryview(each if bare else PLAIN + each) for each in packets[at : at + 2]] for at in range(0, 5, 2)]
    monkeypatch.setattr(os, "writev", lambda fd, parts: write(b"".join(parts)))
    tun, deframer, traffic, queue = mock.Mock(), mock.Mock(), tun6.TrafficCounters(), tun6.ReceiveQueue()
    tun.file.write, deframer.push.return_value, deframer.pull = write, [], pull
    queue.set_limit(tun6.RateLimit(bits))
    near, far = socket.socketpair()
    far.send(b"...")  # behind them the socket is silent, and what waits must pass all the same
    with near, gevent.Timeout(20), pytest.raises(EOFError):
        tun6.pump_tcp_to_tun(near.fileno(), mock.Mock(), tun, deframer, b"", bare, traffic, queue)
    assert written == [PLAIN + each for each in packets]
    assert (traffic.received_packets, traffic.received) == (5, sum(map(len, packets)) + 50 * (not bare))
    assert traffic.all_dropped == 0


def test_those_that_move_much_take_turns_and_the_others_do_not_wait_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun6, "BUSY_S", 1e-6)  # one is called in each round
    calls, enough = cast("list[int]", []), gevent.event.Event()

    def call(number: int) -> bool:
        calls.append(number)
        if len(calls) == 1100:
            enough.set()
        return number > 0  # all but this one move much

    with ExitStack() as undo:
        for number in range(50):
            near, far = map(undo.enter_context, socket.socketpair())
            far.send(b"something is ready until it is read")
            undo.callback(spawn(tun6.ReadinessCallbacks(near.fileno()).run, functools.partial(call, number)).kill)
        assert enough.wait(10)  # without other timers, each of which would split a round of the event loop
    calls = calls[100:1100]  # at first nobody is known to move much
    between = [len(list(group)) for busy, group in groupby(calls, bool) if busy]
    assert max(between) <= 2, "who moves little waited for many others"  # the last one of a round, and the first one of the next
    turns = Counter(filter(None, calls))
    assert len(turns) == 49
    assert max(turns.values()) - min(turns.values()) <= 1
    assert not tun6.ReadinessCallbacks._busy


def test_what_waits_is_sent_although_packets_come_without_end() -> None:
    full, one = True, frame(1, size=LARGEST)

    def read(view: memoryview) -> int:
        view[: len(one)] = one
        return len(one)

    send_queue = tun6.SendQueue(lambda data: None if full else len(data), False)
    near, far = socket.socketpair()
    with near, far:
        far.send(b"packets wait in the TUN")
        tun = mock.Mock(fd=near.fileno())
        tun.file.readinto = read
        pump = spawn(tun6.pump_tun_to_tcp, tun, far.fileno(), send_queue, BOTH, PERMIT_ALL, tun6.TrafficCounters())
        try:
            with gevent.Timeout(10):
                while send_queue.queue.frames < 50:
                    gevent.sleep(0.001)
                full = False
                while send_queue.blocked:
                    gevent.sleep(0.001)
        finally:
            pump.kill()


def test_a_busy_session_is_probed_until_it_has_answered_and_then_only_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sent = mock.Mock(return_value=1000.0), cast("list[float]", [])
    monkeypatch.setattr(time, "monotonic", clock)
    monitor, session = tun6.PathMonitor(tun6.DEAD_AFTER_S), mock.Mock(lan=False)
    session.unacknowledged_s.return_value = session.traffic.received = 0
    path = tun6.PeerPath("lo", IPv6Address(0), IPv6Address(1), 255)

    def probe(*_: object) -> None:
        path.asked = clock()
        sent.append(path.asked)

    monkeypatch.setattr(monitor, "_probe", probe)

    def pass_time(seconds: int, received: int) -> list[float]:
        """When it was probed in so many seconds, in each of which it received so many bytes; then from 0 again."""
        sent.clear()
        began = clock.return_value
        for _ in range(seconds):
            clock.return_value += 1
            session.traffic.received += received
            monitor._check(7, session, path)
        return [at - began for at in sent]

    assert pass_time(45, 100) == [10, 20, 30, 40]
    path.answers = 1
    assert pass_time(45, 100) == []
    assert pass_time(29, 0) == [10, 20]
    session.close.assert_not_called()
    pass_time(1, 0)
    assert str(session.close.call_args[0][0]) == "no sign of life for 30 s"


@pytest.mark.parametrize(("dead_after", "earliest", "latest"), [(6, 0.17, 0.35), (35, 1, 2), (350, 1, 2)])
def test_the_first_probe_comes_the_sooner_the_sooner_a_dead_path_is_to_be_noticed(dead_after: int, earliest: float, latest: float) -> None:
    path = tun6.PeerPath("lo", IPv6Address(0), IPv6Address(1), 255)
    with mock.patch("gevent.spawn_later") as spawn_later, tun6.PathMonitor(dead_after).watch(mock.Mock(), path):
        assert earliest < spawn_later.call_args[0][0] < latest


# ---- hooks -----------------------------------------------------------------------------------------------------------


def hook_file(folder: Path, *lines: str, shebang: str = "#!/bin/sh") -> str:
    """An executable hook of these lines; $OUT is a file beside it, for what it has to tell."""
    path = folder / "hook"
    path.write_text("\n".join([shebang, f"OUT={folder / 'told'}", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def told(folder: Path) -> list[str]:
    """The whole lines that the hook has put into $OUT."""
    path = folder / "told"
    return path.read_text().split("\n")[:-1] if path.exists() else []


@contextmanager
def hooks_of(*lines: str, folder: Path, shebang: str = "#!/bin/sh") -> Iterator[tun6.Hooks]:
    hooks = tun6.Hooks(hook_file(folder, *lines, shebang=shebang))
    try:
        yield hooks
    finally:
        hooks.close()


def test_a_hook_runs_in_order_for_each_id_and_for_few_ids_at_a_time(tmp_path: Path) -> None:
    ids = [f"{number:02d}" for number in range(2 * tun6.HOOKS_AT_ONCE)]
    with hooks_of('echo "+ $TUN6_ID $TUN6_PEER" >> $OUT', "sleep 0.1", 'echo "- $TUN6_ID $TUN6_PEER" >> $OUT', folder=tmp_path) as hooks:
        began = time.monotonic()
        for number, id_ in itertools.product("123", ids):
            assert hooks.run("session-up", id_, peer=number)
        assert time.monotonic() - began < 0.1  # nobody waits
    lines = told(tmp_path)
    for id_ in ids:
        assert [line for line in lines if f" {id_} " in line] == [f"{sign} {id_} {number}" for number in "123" for sign in "+-"]
    at_once = list(accumulate(1 if line.startswith("+") else -1 for line in lines))
    assert 2 <= max(at_once) <= tun6.HOOKS_AT_ONCE


def test_a_hook_gets_values_in_a_clean_environment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("SECRET", "not for hooks")
    id_ = "$(touch /tmp/x); \"'*` é\u6c34"
    near, far = socket.socketpair()
    far.sendall(b"for tun6 itself")
    own = os.dup(0)
    os.dup2(near.fileno(), 0)
    near.set_inheritable(True)
    commands = (
        "/usr/bin/env | sort > $OUT",
        "echo at $(pwd)",
        "wc -c",
        "ls /proc/self/fd",
        "exit 0",
    )
    with near, far, hooks_of(*commands, folder=tmp_path) as hooks:
        hooks.run("session-up", id_, prefix=POOL, peer="a\nb\0c")
    os.dup2(own, 0)
    os.close(own)
    values = dict(line.split("=", 1) for line in told(tmp_path))
    assert {name: value for name, value in values.items() if name.startswith("TUN6_")} == {
        **{"TUN6_EVENT": "session-up", "TUN6_ID": id_, "TUN6_PREFIX": str(POOL), "TUN6_PEER": "a?b?c"},
        **dict.fromkeys(("TUN6_OLD_PREFIX", "TUN6_DEVICE", "TUN6_REASON"), ""),
    }
    assert "/usr/sbin" in values["PATH"] and "SECRET" not in values
    output = [message.rpartition(": ")[2] for message in caplog.messages]
    assert all(message.startswith(f"hook for session-up of {id_!r}: ") for message in caplog.messages)
    assert output[:2] == ["at /", "0"]  # and nothing to read
    assert output[2:] == ["0", "1", "2", "3"]  # 3 is the folder that `ls` reads


@pytest.mark.parametrize(
    ("commands", "shebang", "failure"),
    [
        (("echo fine",), "#!/bin/sh", ""),
        (("exit 3",), "#!/bin/sh", "ended with status 3"),
        (("kill -TERM $$",), "#!/bin/sh", "was ended by signal 15"),
        (("exit 0",), "# no interpreter", "can't be run: Exec format error; its first line must be like #!/bin/sh"),
        (("exit 0",), "#!/nobody/has/this", "can't be run: No such file or directory; its first line names a missing program"),
        (("sleep 987654 & echo $! > $OUT; wait",), "#!/bin/sh", "did not end within 1 s and was killed"),
        (("exec >&- 2>&-; sleep 987654",), "#!/bin/sh", "did not end within 1 s and was killed"),
        (("yes 'a lot of text'",), "#!/bin/sh", "did not end within 1 s and was killed"),
    ],
    ids=[
        "fine",
        "status",
        "signal",
        "no shebang",
        "no interpreter",
        "hangs with a child",
        "closes its output and hangs",
        "writes without end",
    ],
)
def test_a_hook_that_fails_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, commands: Sequence[str], shebang: str, failure: str
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tun6, "HOOK_S", 1.0)
    used = time.process_time()
    with hooks_of(*commands, folder=tmp_path, shebang=shebang) as hooks:
        hooks.run("up", "a")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == (
        [f"hook for up of 'a': it {failure}"] if failure else []
    )
    assert len(caplog.messages) <= tun6.HOOK_LINES_MAX + 2
    assert time.process_time() - used < 0.5, "what is left out costs time"
    if "yes" in commands[0]:
        assert "hook for up of 'a': ..., the rest of its output is left out" in caplog.messages
    for pid in told(tmp_path):
        assert becomes_true(lambda pid=pid: not processes_named(f"/proc/{pid}", "sleep"), 3), "its child lives on"  # type: ignore[misc]


def python_hook(folder: Path, *lines: str) -> str:
    """A hook without a shell, which would change its signals."""
    path = folder / "python-hook"
    path.write_text("\n".join([f"#!{sys.executable}", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_a_hook_has_no_signals_blocked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the thread inherits this
    try:
        hooks = tun6.Hooks(
            python_hook(tmp_path, "print(*[line for line in open('/proc/self/status') if line.startswith('SigBlk')], end='')")
        )
        hooks.run("up", "a")
        hooks.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert [message.split()[-1] for message in caplog.messages] == ["0" * 16]


def test_a_hook_that_writes_without_end_is_slowed_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun6, "HOOK_S", 1.0)
    count = tmp_path / "count"
    writes = ("    os.write(1, bytes(1 << 16))", "    file.write(b'.')")
    hooks = tun6.Hooks(python_hook(tmp_path, "import os", f"file = open({str(count)!r}, 'wb', 0)", "while True:", *writes))
    hooks.run("up", "a")
    hooks.close()
    assert 1 <= count.stat().st_size <= 1.5 / tun6.HOOK_READ_S


def processes_named(process: str, name: str) -> bool:
    """Whether this process in /proc has this name and lives."""
    with suppress(OSError):
        fields = Path(process, "stat").read_text()
        return f"({name})" in fields and fields.rpartition(")")[2].split()[0] != "Z"
    return False


def test_what_a_hook_leaves_running_holds_nobody_up(tmp_path: Path) -> None:
    with hooks_of("sleep 60 & echo $! >> $OUT", folder=tmp_path) as hooks:
        hooks.run("up", "a")
        hooks.run("down", "a")
        began = time.monotonic()
    assert time.monotonic() - began < 3
    left = [int(pid) for pid in told(tmp_path)]
    assert len(left) == 2
    for pid in left:
        os.kill(pid, signal.SIGKILL)  # that it lives is the operator's will


def test_when_too_many_wait_for_their_hook_whole_sessions_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tun6, "HOOKS_WAITING_MAX", 2)
    with hooks_of('echo "$TUN6_EVENT $TUN6_ID" >> $OUT; sleep 0.1', folder=tmp_path) as hooks:
        assert [hooks.run("session-up", id_) for id_ in "aab"] == [True, True, False]
        assert hooks.run("session-down", "a", required=True)  # as it was told of the beginning
    assert told(tmp_path) == ["session-up a", "session-up a", "session-down a"]
    assert caplog.messages == ["hook for session-up of 'b': left out, and its end too, as 2 others wait already"]


def test_the_end_waits_for_hooks_and_kills_those_that_take_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tun6, "HOOKS_END_S", 1.0)
    with hooks_of("echo $$ >> $OUT; [ $TUN6_ID = quick ] || exec sleep 987654", folder=tmp_path) as hooks:
        hooks.run("session-down", "quick")
        for id_ in range(20):
            hooks.run("session-up", str(id_))
            hooks.run("session-down", str(id_))
        began = time.monotonic()
        hooks.close()
    assert 0.9 < time.monotonic() - began < 2.5
    assert caplog.messages == ["hook: 40 runs did not end within 1 s and are killed or left out"]
    assert len(told(tmp_path)) == 1 + tun6.HOOKS_AT_ONCE
    assert not any(processes_named(f"/proc/{pid}", "sleep") for pid in told(tmp_path))


@pytest.mark.parametrize("section", ["server", "client"])
def test_a_hook_that_is_not_there_or_not_executable_stops_the_start(tmp_path: Path, section: str) -> None:
    make: Callable[[str], object] = {
        "server": lambda hook: tun6.Server(tun6.ServerConfig("127.0.0.1", 1, POOL, hook=hook)),
        "client": lambda hook: tun6.Client(tun6.ClientConfig((tun6.RemoteHost("192.0.2.1", None),), 1, hook=hook)),
    }[section]
    path = tmp_path / "hook"
    for prepare, complaint in ((path.touch, "it is not executable; `chmod"), (path.unlink, "no such file"), (path.mkdir, "no such file")):
        prepare()
        with pytest.raises(tun6.ConfigError, match=f"^hook = {path}: .*{complaint}"):
            make(str(path))


# ---- neighbour proxy -------------------------------------------------------------------------------------------------

ROUTER, HOST = IPv6Address("fe80::1"), subnet(3)[0x99]
LINK_ADDRESS = bytes.fromhex("02000000aa01")


def solicited_node(target: IPv6Address) -> IPv6Address:
    """RFC 4291 section 2.7.1."""
    return IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + target.packed[13:])


def solicitation(target: IPv6Address, source: IPv6Address = ROUTER, options: bytes | None = None) -> bytes:
    """Somebody looks for the target, RFC 4861 section 4.3, or for duplicates of it."""
    usual = b"" if source.is_unspecified else b"\1\1" + LINK_ADDRESS
    return icmp_between(source, solicited_node(target), 135, bytes(4) + target.packed + (usual if options is None else options))


def advertisement(packet: bytes) -> tuple[IPv6Address, IPv6Address, IPv6Address, int, bytes] | None:
    """Source, destination, target, flags and options of a neighbour advertisement, None for anything else; its checksum must be right."""
    if len(packet) < 64 or packet[6] != 58 or packet[40] != 136:
        return None
    assert packet[7] == 255 and len(packet) == packet_length(packet)
    assert internet_sum(packet[8:40] + struct.pack(">II", len(packet) - 40, 58) + packet[40:]) == 0xFFFF
    source, destination, target = (IPv6Address(packet[at : at + 16]) for at in (8, 24, 48))
    return source, destination, target, packet[44], packet[64:]


ADDRESSES = st.integers(0, 2**128 - 1).map(IPv6Address)


@given(ADDRESSES, ADDRESSES, ADDRESSES)
def test_a_solicitation_is_answered_as_by_a_proxy(target: IPv6Address, source: IPv6Address, own: IPv6Address) -> None:
    found = tun6.parse_solicitation(solicitation(target, source))
    if target.is_multicast or source.is_multicast:
        assert found is None
        return
    assert found == (source, target)
    for_all = source.is_unspecified
    expected = own, ALL_NODES if for_all else source, target, 0x80 if for_all else 0xC0, b"\2\1" + LINK_ADDRESS
    assert advertisement(tun6.encode_advertisement(found, own, LINK_ADDRESS)) == expected


ALL_NODES = IPv6Address("ff02::1")
GOOD = solicitation(HOST)
WRONG_SOLICITATIONS = {
    "hop limit": GOOD[:7] + b"\xfe" + GOOD[8:],
    "checksum": GOOD[:42] + bytes([GOOD[42] ^ 1]) + GOOD[43:],
    "short": icmp_between(ROUTER, solicited_node(HOST), 135, bytes(4) + HOST.packed[:15]),
    "cut": GOOD[:-1],
    "code": icmp_between(ROUTER, solicited_node(HOST), 135, b"").replace(b"\x87\0", b"\x87\1"),
    "kind": icmp_between(ROUTER, solicited_node(HOST), 136, GOOD[44:]),
    "multicast target": icmp_between(ROUTER, solicited_node(HOST), 135, bytes(4) + ALL_NODES.packed),
    "multicast source": solicitation(HOST, ALL_NODES),
    "option of length 0": solicitation(HOST, options=b"\1\0" + LINK_ADDRESS),
    "option beyond the end": solicitation(HOST, options=b"\1\2" + LINK_ADDRESS),
    "half an option": solicitation(HOST, options=b"\1"),
    "duplicates with an option": solicitation(HOST, IPv6Address(0), b"\1\1" + LINK_ADDRESS),
    "duplicates to the host": icmp_between(IPv6Address(0), HOST, 135, bytes(4) + HOST.packed),
    "behind an extension header": between(ROUTER, solicited_node(HOST), b"\x3a\0" + bytes(6) + GOOD[40:], 0)[:7] + b"\xff" + GOOD[8:],
    "IPv4": b"\x45" + GOOD[1:],
}


@pytest.mark.parametrize("name", WRONG_SOLICITATIONS)
def test_a_wrong_solicitation_is_none(name: str) -> None:
    assert tun6.parse_solicitation(GOOD)
    assert tun6.parse_solicitation(GOOD + bytes(6)), "padding is no fault"
    assert tun6.parse_solicitation(solicitation(HOST, options=b"\x0e\1" + bytes(6))), "a nonce (RFC 7527) is no fault"
    assert tun6.parse_solicitation(WRONG_SOLICITATIONS[name]) is None


@given(st.one_of(st.binary(max_size=200), st.tuples(st.binary(max_size=64), st.booleans())))
def test_no_bytes_upset_the_parser_of_solicitations(data: bytes | tuple[bytes, bool]) -> None:
    made = data if isinstance(data, bytes) else solicitation(HOST, IPv6Address(0) if data[1] else ROUTER, data[0])
    found = tun6.parse_solicitation(made)
    assert found is None or found.target == HOST
    for cut in range(len(made)):
        assert found is None or tun6.parse_solicitation(made[:cut]) is None


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_a_damaged_solicitation_is_none_or_another(at: int, change: int) -> None:
    damaged = GOOD[:at] + bytes([GOOD[at] ^ change]) + GOOD[at + 1 :]
    assert tun6.parse_solicitation(damaged) in (None, tun6.Solicitation(ROUTER, HOST))
    if at >= 4:  # the bytes before are traffic class and flow label, which the checksum leaves out
        assert tun6.parse_solicitation(damaged) is None


def neighbour_proxy(pool: IPv6Network = POOL) -> tun6.NeighbourProxy:
    with mock.patch.object(tun6.NeighbourProxy, "ARPHRD_ETHER", 772):  # the loopback's kind, ARPHRD_LOOPBACK
        return tun6.NeighbourProxy("lo", pool)


def test_the_proxy_answers_for_prefixes_with_a_session_up_to_its_rates() -> None:
    now = 1000.0
    with mock.patch.object(time, "monotonic", lambda: now), mock.patch.object(tun6.TokenBucket.__init__, "__defaults__", (lambda: now,)):
        proxy = neighbour_proxy()
        prefixes = list(itertools.islice(POOL.subnets(new_prefix=64), 20))
        assert not proxy._answers_for(prefixes[0][1])
        for prefix in prefixes[:-1]:
            proxy.add(prefix)
        answered = [sum(proxy._answers_for(prefix[number]) for number in range(1, 200)) for prefix in prefixes]
        assert answered == [100] * 10 + [0] * 10  # one prefix's scan leaves room for others, up to the rate of all
        now += 1
        assert proxy._answers_for(prefixes[18][1])
        proxy.remove(prefixes[18])
        assert not proxy._answers_for(prefixes[18][1])


@pytest.mark.parametrize("pool", ["2001:db8:1::/56", "2001:db0::/28", "2001:db8:1:2::/64", "2001:db8:1::/48"])
def test_the_kernel_passes_only_solicitations_for_the_pool(pool: str) -> None:
    network = IPv6Network(pool)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        tun6.attach_filter(cast(Any, near), tun6.filter_program(tun6.solicitation_fields(network)))

        def passes(data: bytes) -> bool:
            far.send(data)
            with suppress(BlockingIOError):
                return near.recv(2000) == data
            return False

        inside = network[0], network[1], network.broadcast_address
        outside = network[0] - 1, network.broadcast_address + 1
        assert [passes(solicitation(target)) for target in (*inside, *outside)] == [True] * 3 + [False] * 2
        good = solicitation(network[1])
        others = good[:6] + b"\0" + good[7:], good[:7] + b"\xfe" + good[8:], good[:40] + b"\x88" + good[41:], good[:40], packet()
        assert not any(passes(other) for other in others)


def test_the_proxy_leaves_addresses_and_networks_of_this_machine_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = subnet(3)
    lines = [(prefix[1], 128, "lo"), (prefix[0x10_0000_0001], 112, "eth0"), (POOL[5], POOL.prefixlen, "eth1"), (ROUTER, 64, "eth1")]
    text = "".join(f"{address.packed.hex()} 02 {length:02x} 00 80 {name:>8}\n" for address, length, name in lines)
    monkeypatch.setattr(tun6, "read_text", lambda _: text)
    assert tun6.parse_addresses(text) == [(name, address, length) for address, length, name in lines]
    proxy = neighbour_proxy()
    for each in (prefix, subnet(0)):
        proxy.add(each)
    ours = (prefix[1], prefix[0x10_0000_0002], POOL[5])
    assert [proxy._answers_for(target) for target in (*ours, prefix[2], POOL[6])] == [False] * 3 + [True] * 2


def test_however_many_solicitations_come_the_event_loop_goes_on() -> None:
    proxy, sock = neighbour_proxy(), mock.MagicMock()
    sock.__enter__.return_value.recvfrom.side_effect = [(GOOD, ("lo", 0, 0, 0, LINK_ADDRESS))] * 100_000  # there is always one more
    with mock.patch.object(proxy, "_open", lambda: sock):
        work, began = spawn(proxy.run), time.monotonic()
        gevent.sleep(0.1)
        seconds, read = time.monotonic() - began, sock.__enter__.return_value.recvfrom.call_count
        work.kill()
    assert 0 < read <= tun6.SOLICITATIONS_AT_ONCE * (seconds / tun6.SOLICITATIONS_PAUSE_S + 2)


def test_ndp_needs_an_interface_that_can_have_neighbours() -> None:
    for interface, complaint in (("lo", "it is not like Ethernet"), ("eth-none", "No such device; `ip link` shows")):
        with pytest.raises(tun6.ConfigError, match=f"^ndp = {interface}: {complaint}"):
            tun6.Server(tun6.ServerConfig("127.0.0.1", 1, POOL, ndp=interface))


# ---- service manager -------------------------------------------------------------------------------------------------


class ManagerByHand(SocketOwner):
    """What systemd is to a service: the socket that it reads, and the environment that it gives."""

    def __init__(self, address: str) -> None:
        self.sock: Any = gevent.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address[0] == "@" else address)
        self.sock.settimeout(10)
        self.environment = {"NOTIFY_SOCKET": address}

    def hears(self, *wanted: str) -> list[str]:
        """What it hears until it has heard these, in this order; between them may be others."""
        heard, missing = [], list(wanted)
        while missing:
            heard += self.sock.recv(4096).decode().split("\n")
            while missing and missing[0] in heard:
                del heard[: heard.index(missing.pop(0)) + 1]
        return heard


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_hears_of_the_state_and_that_the_event_loop_runs(tmp_path: Path, abstract: bool) -> None:
    with ManagerByHand(f"@tun6-test-{os.getpid()}" if abstract else str(tmp_path / "notify")) as manager:
        service, state = tun6.ServiceManager({**manager.environment, "WATCHDOG_USEC": "200000"}), ["connecting"]
        with cast(Any, service)._socket:
            feeder = spawn(service.run, lambda: state[0])
            assert manager.hears("WATCHDOG=1", "STATUS=connecting", "WATCHDOG=1", "WATCHDOG=1") == []
            state[0] = "connected"
            manager.hears("STATUS=connected", "WATCHDOG=1")
            feeder.kill()
            with service.reloading():
                service.notify("in between")
            manager.hears("RELOADING=1", "in between", "READY=1")


def test_without_a_service_manager_nothing_is_said() -> None:
    service = tun6.ServiceManager({"WATCHDOG_USEC": "1000"})
    service.notify("READY=1")
    service.run(lambda: "state")  # ends at once


def test_a_watchdog_that_is_anothers_is_not_fed_and_a_manager_that_is_gone_or_slow_holds_nobody(tmp_path: Path) -> None:
    with ManagerByHand(str(tmp_path / "notify")) as manager:
        service = tun6.ServiceManager({**manager.environment, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"})
        with cast(Any, service)._socket:
            feeder = spawn(service.run, lambda: "state")
            assert manager.hears("STATUS=state") == []
            with pytest.raises(TimeoutError), gevent.Timeout(0.3, TimeoutError):
                manager.sock.recv(1)
            feeder.kill()
            for _ in range(10_000):  # it does not read
                service.notify("STATUS=x")
            manager.sock.close()
            service.notify("READY=1")


# ---- server ----------------------------------------------------------------------------------------------------------


def test_a_rate_limit_lets_its_number_through_then_one_for_each_part_of_the_hour() -> None:
    now = 1000.0
    limit = tun6.TokenBucket(60, 3600, clock=lambda: now)
    assert [limit.take() for _ in range(62)] == [True] * 60 + [False] * 2
    now += 59
    assert not limit.take()
    now += 1.5
    assert [limit.take() for _ in range(2)] == [True, False]
    now += 10 * 3600  # a day off saves nothing up
    assert [limit.take() for _ in range(61)] == [True] * 60 + [False]
    unlimited = tun6.TokenBucket(0, 3600, clock=lambda: now)
    assert all(unlimited.take() for _ in range(10_000))


@given(st.integers(1, 50), st.lists(st.tuples(st.floats(0, 4000), st.integers(1, 60)), max_size=20))
def test_a_rate_limit_lets_no_more_through_than_the_hours_bring(per_hour: int, steps: list[tuple[float, int]]) -> None:
    now = 0.0
    limit = tun6.TokenBucket(per_hour, 3600, clock=lambda: now)
    passed = 0
    for pause, tries in steps:
        now += pause
        passed += sum(limit.take() for _ in range(tries))
        assert passed <= per_hour + now * per_hour / 3600 + 1e-6


class Admission:
    """An AdmissionControl, and those whom it let in; each stays until it is told to go."""

    def __init__(self) -> None:
        self.control = tun6.AdmissionControl(self._begin)
        self.peers: list[str] = []  # whom it let in, in that order
        self.greenlets: dict[str, Any] = {}

    def _begin(self, sock: socket.socket, peer: str) -> Any:
        self.peers.append(peer)
        self.greenlets[peer] = gevent.spawn(self._read, sock)
        return self.greenlets[peer]

    @staticmethod
    def _read(sock: socket.socket) -> None:
        sock.recv(10)
        gevent.sleep(60)

    def admit(self, host: str, number: int = 0, says: bytes = b"{") -> str:
        """A connection from this host, which says so much; gives the peer's name."""
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.send(says)
            self.control.admit(gevent.socket.socket(fileno=ours.detach()), host, number)
        return f"{host} port {number}"

    def inside(self) -> list[str]:
        for _ in range(10):
            gevent.sleep(0)  # all runs that was due before
        return [peer for peer in self.peers if not self.greenlets[peer].dead]


@pytest.fixture
def admission() -> Iterator[Admission]:
    admission = Admission()
    yield admission
    admission.control.close()
    gevent.killall(list(admission.greenlets.values()))


def test_more_than_eight_of_a_host_come_in_one_by_one_as_others_leave_until_the_end(admission: Admission) -> None:
    names = [admission.admit("a", number) for number in range(12)]
    other = admission.admit("b")
    assert admission.inside() == [*names[:8], other]
    admission.control.release(admission.greenlets[names[3]])  # has said who it is, and goes on
    assert admission.inside() == [*names[:8], other, names[8]]
    gevent.kill(admission.greenlets[names[0]])
    assert admission.inside() == [*names[1:8], other, *names[8:10]]
    admission.control.close()
    admission.control.release(admission.greenlets[names[1]])
    assert admission.inside() == [*names[1:8], other, *names[8:10]]


def test_who_says_nothing_while_it_waits_outside_is_not_let_in(admission: Admission) -> None:
    names = [admission.admit("a", number, b"" if number in (8, 9) else b"{") for number in range(11)]
    admission.control.release(admission.greenlets[names[0]])
    assert admission.inside() == [*names[:8], names[10]]


def test_after_a_second_whoever_waits_outside_takes_the_place_of_the_oldest(admission: Admission) -> None:
    names = [admission.admit("a", number) for number in range(9)]
    assert admission.inside() == names[:8]
    wait_until("it comes in", lambda: admission.inside() == names[1:], 3)


@pytest.mark.parametrize(
    ("segments", "reads", "answers", "goes"),
    [
        (1, "not yet", 0, False),
        (1, "is about to", 0, False),
        (1, "has read", 0, False),  # and is at work on it
        (30, "not yet", 0, True),  # the peer plays for time
        (30, "has read", 0, True),
        (0, "waits", 0, True),  # the peer is silent
        (0, "waits", 1, False),  # it has had no time yet
    ],
)
def test_a_handshake_is_slow_only_while_we_wait_for_the_peer(segments: int, reads: str, answers: int, goes: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as theirs:
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with gevent.socket.socket(fileno=listener.accept()[0].detach()) as ours:
            time.sleep(0.3)
            reader = None if reads == "not yet" else spawn(ours.recv, 99)
            gevent.sleep(0.01)
            for way, number in ((theirs, segments), (ours, answers)):
                for _ in range(number):
                    way.sendall(b"a")
            if reads == "has read":
                gevent.sleep(0.01)
            assert tun6.is_waited_for(ours, 0.2) is goes
            if reader:
                reader.kill()
    assert not tun6.is_waited_for(ours, 0)  # closed


@pytest.mark.parametrize(
    ("hosts_", "goes"),
    [
        (["a"] * 3 + ["b"] * 8 + [f"{number}" for number in range(53)], 10),  # the newest of the host that has most
        (["x"] + [host for host in "cdefghi" for _ in range(8)] + ["j"] * 7, 8),
        ([f"{number}" for number in range(64)], None),  # all alike, and young: the newcomer waits, and the oldest goes
    ],
)
def test_when_all_places_are_taken_the_host_with_most_makes_room(admission: Admission, hosts_: list[str], goes: int | None) -> None:
    names = [admission.admit(host, number) for number, host in enumerate(hosts_)]
    assert admission.inside() == names
    began = time.monotonic()
    newcomer = admission.admit("newcomer")
    took = time.monotonic() - began
    assert admission.inside() == [name for name in names if name != names[goes or 0]] + [newcomer]
    assert (took > 0.5 * tun6.SLOW_HANDSHAKE_S) is (goes is None)


def test_newcomers_take_the_places_of_the_slow_and_never_are_there_more(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun6, "SLOW_HANDSHAKE_S", 60.0)  # however slow this machine is
    old = [admission.admit(host, number) for host in "abcdefgh" for number in range(12)]
    began = admission.inside()
    assert len(began) == tun6.HANDSHAKES_MAX
    monkeypatch.setattr(tun6, "SLOW_HANDSHAKE_S", 0.0)
    first = admission.admit("first")
    assert admission.inside() == [*began[1:], first]  # and not whoever waited behind the one that had to go
    newcomers = [admission.admit(f"host {number}") for number in range(70)]
    inside = admission.inside()
    assert len(inside) == tun6.HANDSHAKES_MAX
    assert set(newcomers[-50:]) <= set(inside)
    monkeypatch.setattr(tun6, "SLOW_HANDSHAKE_S", 60.0)
    for name in newcomers:
        admission.control.release(admission.greenlets[name])
    assert set(old) & set(admission.inside()), "of those who waited outside nobody came in"


def test_who_was_sent_away_at_the_last_moment_is_not_served(admission: Admission) -> None:
    name = admission.admit("a")
    assert admission.control.release(admission.greenlets[name])
    assert not admission.control.release(admission.greenlets[name])
    server = tun6.Server(tun6.ServerConfig("127.0.0.1", 1, POOL))
    with pytest.raises(tun6.Refusal, match="busy"):  # this greenlet has no place in the server's admission control
        server._serve_client(cast(tun6.Stream, None), "peer", tun6.Hello("a", None, ""), b"")
    assert (server.sessions, server.store.pool.owners()) == ({}, [])


@pytest.mark.parametrize("said, has_key, slowed", [(7, True, False), (6, True, True), (8, True, True), (0, True, True), (7, False, True)])
def test_of_a_contended_id_only_the_client_of_the_newest_session_is_not_slowed(
    said: int, has_key: bool, slowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = cast(Any, tun6.Server(tun6.ServerConfig("127.0.0.1", 1, POOL)))
    monkeypatch.setattr(server, "store", store := mock.Mock())
    monkeypatch.setattr(server, "keys", mock.Mock(find=lambda _: has_key or None))
    monkeypatch.setattr(tun6, "CONTENTION_PAUSE_S", 0)
    store.holder.return_value, store.whereabouts.return_value = "other", {"epoch": 7}
    store.takeovers.return_value = [time.monotonic()] * tun6.CONTENTION_TAKEOVERS
    assert server._take_over(tun6.Hello("a", None, "", epoch=said), "peer") is False
    assert ("a" in server._contended) == slowed


@pytest.mark.parametrize("about", ["disk", "store"])
def test_who_asks_while_nothing_new_can_be_kept_is_told_so_unless_it_has_a_prefix(about: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, stream = tun6.Server(tun6.ServerConfig("127.0.0.1", 1, POOL)), mock.Mock()
    monkeypatch.setattr(server, "_leave_admission", lambda: None)
    server.store.assign("known")
    monkeypatch.setitem(tun6.standing_warnings, about, "it can't be reached")
    server._answer_dry(stream, "peer", tun6.Hello("known", None, "", True), b"")
    assert json.loads(stream.send.call_args[0][0]) == {"Dry": True, "Prefix": str(subnet(0))}
    with pytest.raises(tun6.Refusal, match="server-error"):
        server._answer_dry(stream, "peer", tun6.Hello("new", None, "", True), b"")


def test_a_server_remembers_refused_kinds_for_each_id_and_for_no_more_ids_than_clients() -> None:
    server = tun6.Server(tun6.ServerConfig("0.0.0.0", 1, POOL, max_clients=2))
    for id_, kind in (("a", "uso6"), ("b", "uso6"), ("a", "tso6"), ("c", "tso6")):
        server._stop_offering(id_, kind)
    assert server._not_offered == {"a": {"tso6", "uso6"}, "c": {"tso6"}}


# ---- firewall --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="asks nft, which takes root")
@pytest.mark.parametrize("device", ["tun6", "ip", "0", "-", "...", "_", "6in4", "table", "inet", "drop", "tun6-tun6", "x" * 15, "a-b.c_d"])
def test_nft_takes_the_rules_of_every_device_and_opening(device: str) -> None:
    openings = tun6.parse_openings("::22 tcp 443, ::ffff:ffff:ffff:ffff udp 1-65535, ::1.2.3.4 tcp 080, this tcp 22, this udp 5-5")
    done = subprocess.run(
        ["nft", "-c", "-f", "-"], input=tun6.firewall_rules(f"tun6-{device}", device, openings), text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- lan -------------------------------------------------------------------------------------------------------------

ANNOUNCEMENT = tun6.Announcement("eth1", True, subnet(2), {}, 1400, (), "medium")


@pytest.mark.parametrize("routed", [True, False])
def test_what_the_hosts_are_told_is_a_file_that_radvd_takes(tmp_path: Path, routed: bool) -> None:
    old, dns = {subnet(1): 777}, (IPv6Address("2001:db8::53"), IPv6Address("2001:db8::54"))
    text = ANNOUNCEMENT._replace(routed=routed, old=old, dns=dns, preference="low").radvd_conf()
    lifetimes = [int(seconds) for seconds in re.findall(r"(?:DefaultLifetime|PreferredLifetime|ValidLifetime|RDNSSLifetime) (\d+);", text)]
    assert lifetimes == ([1800, 2700, 5400, 0, 777, 1200] if routed else [0, 0, 5400, 0, 777, 0])
    assert "RDNSS" not in ANNOUNCEMENT.radvd_conf()
    (tmp_path / "radvd.conf").write_text(text)
    checked = subprocess.run(["radvd", "-c", "-m", "stderr", "-C", str(tmp_path / "radvd.conf")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_forwarding_is_turned_on_without_a_loss_of_what_router_advertisements_gave() -> None:
    conf = {
        f"{name}/{key}": "0" for name in ("all", "default", "lo", "eth0", "eth1", "eth2", "tun6") for key in ("forwarding", "accept_ra")
    }
    conf |= dict.fromkeys(("all/accept_ra", "default/accept_ra", "lo/accept_ra", "eth0/accept_ra", "eth1/accept_ra"), "1")
    conf["eth2/forwarding"] = "1"
    accepting = ["default/accept_ra", "eth0/accept_ra"]
    for uplink, more in ((False, []), (True, ["eth1/accept_ra"])):
        do, back = tun6.forwarding_plan(conf, "eth1", uplink)
        assert sorted(do) == sorted([*accepting, *more, "all/forwarding"])
        assert list(do)[-1] == "all/forwarding"  # the kernel removes routes at once
        assert list(back) == ["all/forwarding", "eth2/forwarding", *list(do)[:-1]]  # in this order, as the first one sets all of its kind
        assert all(back[name] == conf[name] for name in back)
    assert tun6.forwarding_plan({**conf, "all/forwarding": "1"}, "eth1", True) == ({}, {})


def test_an_interface_whose_default_route_is_by_router_advertisements_is_known() -> None:
    zero, router = "0" * 32, "fe80" + "0" * 27 + "1"
    line = f"{zero} 00 {zero} 00 {router} 00000400 00000001 00000000 %s     eth0"
    assert tun6.has_ra_route(f"{line % '00450003'}\n", "eth0")
    assert not tun6.has_ra_route(f"{line % '00450003'}\n", "eth1")
    assert not tun6.has_ra_route(f"{line % '00000003'}\n\n", "eth0")


@pytest.fixture
def router() -> Any:
    """The router of a LAN that is not there."""
    return tun6.LanRouter(tun6.Kernel(), "lan-of-nobody", "tun6", 1500, (), "auto", 10)


def test_a_flood_of_router_advertisements_leaves_the_others_their_turn(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flood(mock.MagicMock):
        count = 0

        def recvfrom(self, _: int) -> tuple[bytes, tuple[str, int]]:
            Flood.count += 1
            assert Flood.count < 1000, "nobody else had a turn"
            lifetime = 1800 if Flood.count > 3 else 0  # that of one who is no router
            return struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, lifetime, 0, 0), ("fe80::bad%lan-of-nobody", 0)

        def __enter__(self) -> Flood:
            return self

    monkeypatch.setattr(tun6, "open_icmpv6", lambda _: Flood())
    listener = spawn(router._listen)
    gevent.sleep(0)
    assert Flood.count == 1
    results([listener])  # it has heard enough
    assert (Flood.count, router._other_router) == (4, "fe80::bad")


def test_a_server_that_changes_the_prefix_all_the_time_does_not_make_the_announcement_long(
    router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_prove", lambda *_: None)
    for number in range(1, 50):
        router._announced = True
        router.tunnel_up("tun6", subnet(number))
    assert list(router._old) == [subnet(number) for number in range(49 - tun6.OLD_PREFIXES_MAX, 49)]


def test_an_end_while_the_prefix_changes_leaves_no_address(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    undone: list[list[tun6.Step]] = []
    monkeypatch.setattr(router._kernel, "undo", undone.append)
    monkeypatch.setattr(router._changes, "save", mock.Mock(side_effect=gevent.GreenletExit))
    monkeypatch.setattr(router._changes, "write", lambda _: None)
    router._index, router._changes.prefix = 1, subnet(1)
    with pytest.raises(gevent.GreenletExit):
        router._keep_address(subnet(2))
    router._changes.undo()
    assert tun6.lan_address_plan("lan-of-nobody", subnet(1)) in undone


def test_what_keeps_the_lan_from_being_as_it_should_is_said_once(
    router: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full, denied = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(router, "_look_at_interface", mock.Mock(side_effect=[full] * 5 + [denied, None, denied, gevent.GreenletExit]))
    monkeypatch.setattr(router, "_keep_forwarding", lambda: None)
    monkeypatch.setattr(tun6, "LAN_CHECK_S", 0.001)
    spawn(router._run).join(5)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [full.strerror, denied.strerror, denied.strerror]


# ---- client ----------------------------------------------------------------------------------------------------------


def test_an_answer_of_a_slow_name_server_counts_at_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = [], gevent.event.Event()

    def look_up(*arguments: object) -> list[tuple[object, ...]]:
        asked.append(arguments)
        answer.wait()
        return [(None, None, None, "", ("10.0.0.2", 1))]

    monkeypatch.setattr(gevent.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(tun6, "LOOKUP_S", 0.01)
    remote = tun6.Client(tun6.ClientConfig((tun6.RemoteHost("moved.example", None),), 1)).remote
    with pytest.raises(OSError, match="no name server has answered yet"):  # there is another server to be tried
        remote.find_addresses(is_last=False)
    remote.last_good = old = [("10.0.0.1", 1)]
    assert remote.find_addresses() == old
    assert remote.find_addresses() == old
    assert len(asked) == 1  # the first goes on
    answer.set()
    gevent.joinall([cast(Any, remote)._lookup])
    answer.clear()
    assert remote.find_addresses() == [("10.0.0.2", 1), *old]
    assert remote.find_addresses() == old
    assert len(asked) == 2
    answer.set()
    gevent.joinall([cast(Any, remote)._lookup])


def test_a_client_with_a_list_begins_with_the_server_that_served_it_last(tmp_path: Path) -> None:
    remotes = tuple(tun6.RemoteHost(host, None) for host in ("a.example", "b.example", "c.example"))
    config = tun6.ClientConfig(remotes, 1, file=str(tmp_path / "config.ini"))
    last = tmp_path / "config.ini.last-server"

    def first() -> set[str]:
        return {tun6.Client(config).remote.name for _ in range(30)}

    assert len(first()) == 3
    for host in ("b.example", "c.example"):
        client = cast(Any, tun6.Client(config))
        client._remember_last(next(remote for remote in client.remotes if remote.host == host))
        running = client._remembering
        client._remember_last(next(remote for remote in client.remotes if remote.host != host))
        assert client._remembering is running  # however long the disk takes, one thread waits for it
        wait_until("it is remembered", lambda host=host: gevent.sleep(0.01) or (last.exists() and host in last.read_text()))  # type: ignore[misc]
        assert first() == {f"{host} port 1"}
    for text in (b"d.example port 1\n", b"", b"\xff"):
        last.write_bytes(text)
        assert len(first()) == 3
    last.unlink()
    last.mkdir()
    assert len(first()) == 3


def failed(failover: tun6.Failover, *codes: str, session_s: float | None = None) -> list[int]:
    """The servers that were tried and failed, one for each of these codes; the first of them after a session of this length."""
    tried = []
    for code in codes:
        tried.append(failover.server)
        failover.note_failure(tun6.Failure(code, "why"), session_s)
        session_s = None
    return tried


def test_one_server_after_the_other_is_tried_at_once_and_there_is_a_pause_when_all_have_failed() -> None:
    failover = tun6.Failover(3)
    for _ in range(3):
        first = failed(failover, "")
        assert 0 <= failover.pause() <= 0.3
        second = failed(failover, "?")
        assert 0 <= failover.pause() <= 0.3 and failover.is_last
        third = failed(failover, "denied")
        assert 1 <= failover.pause() <= 3 and not failover.is_last
        assert sorted(first + second + third) == [0, 1, 2]


def test_clients_begin_with_a_server_at_random_and_wait_at_random() -> None:
    assert {tun6.Failover(3).server for _ in range(200)} == {0, 1, 2}
    failover = tun6.Failover(2)
    failed(failover, "")
    pauses = [failover.pause() for _ in range(500)]
    assert 0 <= min(pauses) < 0.05 and 0.25 < max(pauses) <= 0.3


def test_the_server_whose_session_ended_goes_last_and_all_have_their_turn_anew() -> None:
    failover = tun6.Failover(3)
    failed(failover, "", "")
    good = failover.server
    assert failed(failover, "", session_s=100) == [good] and not failover.is_last
    others = failed(failover, "", "")
    assert good not in others and failover.pause() <= 0.3 and failover.is_last
    assert failed(failover, "") == [good]
    assert failover.pause() >= 1
    single = tun6.Failover(1)
    failed(single, "", session_s=100)
    assert single.pause() >= 1


def test_sessions_that_end_at_once_on_every_server_are_no_reason_to_spin() -> None:
    failover = tun6.Failover(2)
    for _ in range(5):
        failed(failover, "", session_s=0.1)
        assert failover.pause() <= 0.3
        failed(failover, "", session_s=0.1)
        assert failover.pause() >= 1


def test_only_when_every_server_has_refused_for_good_there_is_a_long_pause() -> None:
    failover = tun6.Failover(3)
    failed(failover, "denied", "revoked", "")
    assert (failover.pause_s, failover.is_final) == (2, False)
    failed(failover, "denied", "revoked")
    assert (failover.pause_s, failover.is_final) == (0, False)
    failed(failover, "tls-required")
    assert (failover.pause_s, failover.is_final) == (60, True)
    single = tun6.Failover(1)
    failed(single, "denied")
    assert (single.pause_s, single.is_final) == (60, True)


@pytest.mark.parametrize("codes", [["busy"], ["moved", "moved"], ["moved", ""], ["busy", "denied", "moved"]])
def test_where_a_server_is_busy_or_sends_all_away_the_pauses_double_up_to_half_a_minute(codes: list[str]) -> None:
    failover, pauses = tun6.Failover(len(codes)), []
    for _ in range(6):
        failed(failover, *codes)
        pauses.append(failover.pause_s)
    assert pauses == [2, 4, 8, 16, 30, 30]
    failed(failover, *("" for _ in codes))
    assert failover.pause_s == 2
    failed(failover, *codes)
    failed(failover, *codes, session_s=0.1)  # who was served starts anew
    assert failover.pause_s == 2


def test_after_a_fault_of_the_clients_own_machine_it_goes_back_to_the_same_server_after_a_pause() -> None:
    failover = tun6.Failover(3)
    failed(failover, "busy")
    serves = failover.server
    failover.note_failure(tun6.Failure("?", "the device is gone"), 100, is_ours=True)
    assert (failover.server, failover.pause_s, list(failover.failures)) == (serves, 2, [serves])


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from(["", "?", "denied", "busy", "moved"]), st.sampled_from([None, 0.1, 9.0]))))
def test_whatever_the_servers_do_none_is_left_out_and_no_client_spins(servers: int, events: list[tuple[str, float | None]]) -> None:
    failover, without_pause = tun6.Failover(servers), 0
    tried: list[int] = []
    for code, session_s in events:
        tried.append(failover.server)
        assert len(set(tried[-servers:])) == min(len(tried), servers)
        is_last = failover.is_last
        failover.note_failure(tun6.Failure(code, "why"), session_s)
        lasted = (session_s or 0) >= 2
        assert is_last == (failover.pause_s > 0) or lasted
        without_pause = 0 if failover.pause_s or lasted else without_pause + 1
        assert without_pause < servers
        assert failover.pause_s <= 60


def test_clients_do_not_try_again_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 300:
            raise gevent.GreenletExit

    client = tun6.Client(tun6.ClientConfig((tun6.RemoteHost("192.0.2.1", None),), 1))
    monkeypatch.setattr(client, "_open_tun", lambda: None)
    monkeypatch.setattr(client, "_run_session", mock.Mock(side_effect=OSError(errno.ECONNREFUSED, "refused")))
    monkeypatch.setattr(client._kernel, "remove_stale", lambda: None)
    monkeypatch.setattr(gevent, "sleep", sleep)
    with pytest.raises(gevent.GreenletExit):
        client.run()
    assert 1 <= min(pauses) < 1.2 and 2.8 < max(pauses) <= 3
    assert 1.9 < statistics.mean(pauses) < 2.1


def test_what_a_drain_has_begun_is_over_when_it_is_stopped_or_another_one_begins() -> None:
    server = cast(Any, tun6.Server(tun6.ServerConfig("127.0.0.1", 1, POOL)))

    def ended() -> int:
        return sum(session.ending for session in server.sessions.values())

    for begins in (None, 3600):
        server.sessions.update({f"client {number}": tun6.Session("a peer") for number in range(4)})
        server.drain(0.2)
        assert server.state() == f"draining, {POOL} on 127.0.0.1 port 1: 4 clients"
        gevent.sleep(0.01)
        assert ended() >= 1  # the first one goes at once
        server.drain(begins)
        left = ended()
        gevent.sleep(0.3)
        assert ended() <= left + (begins is not None)
    assert "drain" in tun6.standing_warnings
    server.drain(None)
    assert "drain" not in tun6.standing_warnings and not server.state().startswith("draining")


def test_the_doctor_knows_the_last_id_of_a_client_that_is_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("etc", "var"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tun6, "CONFIG_FOLDER", tmp_path / "etc")
    monkeypatch.setattr(tun6, "STATE_FOLDER", tmp_path / "var")
    monkeypatch.setattr(tun6, "default_id", lambda: MAC)

    def warned(config: Path) -> list[str]:
        caplog.clear()
        assert (
            tun6.ClientDoctor(tun6.ClientConfig((tun6.RemoteHost("192.0.2.1", None),), 1, file=str(config)))._check_Id()
            == f"this machine is {MAC!r}"
        )
        return re.findall("was (.*) at the last start", caplog.text)

    config, by_hand = tmp_path / "etc/config.ini", tmp_path / "config.ini"
    Path(f"{config}.last-id").write_text("by hand\n")
    assert warned(config) == ["by hand"]
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "var"))
    tun6.warn_of_another_id(tun6.path_of_last("id", str(config)), "of the service", remember=True)
    monkeypatch.delenv("STATE_DIRECTORY")
    assert warned(config) == ["of the service"]
    assert warned(by_hand) == []


def test_what_the_servers_end_undoes_while_ip_runs_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    server, route, address = cast(Any, tun6.Server(tun6.ServerConfig("127.0.0.1", 1, POOL))), [tun6.Step("a")], [tun6.Step("b")]
    server._own = POOL, address
    applied: list[list[tun6.Step]] = []

    def end_meanwhile(plan: list[tun6.Step]) -> None:
        applied.append(plan)
        server._own = None  # as _take_address does before it undoes that

    monkeypatch.setattr(server._kernel, "apply", end_meanwhile)
    server._restore(route)
    assert applied == [route]


# ---- administration --------------------------------------------------------------------------------------------------


def test_a_control_socket_may_lie_beside_the_config_and_its_folder_can_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("server.sock", "new/server.sock"):
        with tun6.ControlSocket(path, cast(tun6.AdminRequestHandler, None)):
            assert stat.S_ISSOCK(os.stat(path).st_mode)
            assert os.stat(path).st_mode & 0o7777 == 0o600
        assert not os.path.exists(path)
    assert os.stat("new").st_mode & 0o700 == 0o700


def status_by_hand(clients: int, id_: str = "{:02x}:22:33:44:55:66") -> dict[str, Any]:
    """The status of a server with so many clients, each with other figures."""
    entries = [
        {
            "id": id_.format(number),
            "prefix": str(subnet(number)),
            "limit": None,
            "session": {
                "peer": f"192.0.2.{number % 256} port {number}", "device": f"tun6-{number}", "seconds": number * 977, "tls": True,
                "received": number**4, "sent": number**3, "received_packets": number, "sent_packets": number, "round_trip": number / 1e4,
                "rates": {"received_bits": number**3, "sent_bits": number, "received_packets": 1, "sent_packets": 1},
                "drops": {"not taken": number}, "congestion": "bbr", "limit": number % 3 * 12_500_000 or None,
            },
        }
        for number in range(clients)
    ]  # fmt: skip
    rates = tun6.Rates(1e6, 2e6, 3, 4)._asdict()
    return {
        "side": "server", "state": "up", "version": "1", "seconds": 277_500, "listens": "0.0.0.0 port 1", "pool": str(POOL), "free": 1,
        "sessions": clients, "assignments": clients, "latency": {"p99": 0.0021}, "queued": 5, "received": 10**9, "sent": 1, "rates": rates,
        "received_packets": 7, "sent_packets": 8, "drops": {"multicast": 3}, "handshakes": {"denied": 2}, "certificate": None,
        "warnings": ["a warning that is <b>long</b> " * 9], "clients": entries, "limit": None,
    }  # fmt: skip


CLUSTER_BY_HAND: dict[str, Any] = {
    "store": {"address": "postgresql://db/tun6", "down": None, "seconds": 90, "owed": 3, "unsettled": 1},
    "servers": [
        {"name": "a", "address": "192.0.2.1", "here": True, "heard": 0.4, "sessions": 2},
        {"name": "b", "address": "192.0.2.2", "here": False, "heard": 75.2, "sessions": 1},
    ],
}


def test_the_status_of_a_cluster_shows_its_store_its_servers_and_who_has_whom() -> None:
    status = {**status_by_hand(2), **CLUSTER_BY_HAND}
    assert [status["clients"][0].setdefault("server", "a"), status["clients"][1].setdefault("server", "b")] == ["a", "b"]
    del status["clients"][1]["session"]
    status["clients"][1]["since"] = time.time() - 7201
    lines = tun6.format_status(status, 100)
    assert lines[2:5] == [
        "store    postgresql://db/tun6, up for 1m30s; owed: 3 changes, 1 sessions",
        "         a: 192.0.2.1, 2 connected, this one",
        "         b: 192.0.2.2, 1 connected, heard 1m15s ago",
    ]
    table = [line.split() for line in lines[lines.index("") + 1 :]]
    assert table[0][:5] == ["id", "prefix", "server", "since", "rcvd/s"]
    assert table[2][:5] == ["01:22:33:44:55:66", str(subnet(1)), "b", "2h00m", "-"]
    status["store"] = {**CLUSTER_BY_HAND["store"], "down": "no answer within 2 s"}
    assert "down for 1m30s: no answer within 2 s; owed" in tun6.format_status(status, 100)[2]
    assert "down for 1m30s" in tun6.render_page(status, [])


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_status_of_many_clients_fits_the_terminal_a_line_each(width: int) -> None:
    status = status_by_hand(1000, "{:x} has an Id as long as one may be, which is 64 characters, or")
    lines = tun6.format_status(status, width)
    assert all(len(line) <= width for line in lines if width >= 80), max(lines, key=len)
    table = lines[lines.index("") + 1 :]
    assert len(table) == 1001
    assert table[0].split()[:7] == ["id", "prefix", "since", "rcvd/s", "sent/s", "rtt", "drops"][: 7 if width >= 80 else 5]
    assert ("congestion" in table[0]) == (width == 200)


def test_clients_are_sorted_by_id_rate_or_age() -> None:
    status = status_by_hand(20)
    for order, first in (("id", "00:"), ("rate", "13:"), ("since", "00:")):
        lines = tun6.format_status(status, 80, order)
        ids = [line.split()[0] for line in lines[lines.index("") + 2 :]]
        assert ids == sorted(ids, reverse=order == "rate"), order
        assert ids[0].startswith(first)


def test_what_others_said_can_not_steer_the_terminal() -> None:
    status = status_by_hand(2, "\x1b[31mred\x07{}\n")
    status["warnings"] = ["\x1b]0;title\x07"]
    assert all(line.isprintable() for line in tun6.format_status(status, 80))


@pytest.mark.parametrize("text", ["100k", "999.999k", "1M", "2.5M", "12.5M", "50M", "1G", "1.000000001G", "100G"])
def test_a_limit_is_shown_as_it_is_written(text: str) -> None:
    assert tun6.format_limit(tun6.parse_rate(text)) == text


def test_limits_are_in_the_status_where_there_are_any() -> None:
    lines = tun6.format_status({**status_by_hand(3), "limit": 50 * MBIT}, 200)
    assert any(line.endswith("prefixes free, each limited to 50M") for line in lines)
    table = lines[lines.index("") + 1 :]
    column = table[0].index("limit")
    assert [line[column:].split()[0] for line in table[1:]] == ["none", "12.5M", "25M"]
    assert not any("limited" in line for line in tun6.format_status(status_by_hand(3), 200))


@pytest.mark.parametrize(
    ("own", "here", "shown"), [(None, 0, "-"), (0, 0, "none"), (MBIT, 0, "1M"), (None, MBIT, "1M"), (MBIT, None, "none")]
)
def test_of_another_servers_client_the_limit_is_shown_if_it_is_its_own(own: int | None, here: int | None, shown: str) -> None:
    assert tun6.client_limit({"limit": own, **({} if here == 0 else {"session": {"limit": here}})}) == shown


def test_only_a_known_id_is_limited_and_to_a_rate_that_makes_sense(open_store: OpenStore) -> None:
    store, told = open_store(None), cast("list[str]", [])
    handler = tun6.AdminRequestHandler(store, [], {}, lambda *_: None, apply_limit=told.append)
    store.assign("a")
    for rate, limit in {"50M": 50 * MBIT, "none": 0, "2.5M": 2_500_000, "default": None}.items():
        assert handler.limit("a", rate)["limit"] == store.limit_of("a") == limit
    assert told == ["a"] * 4
    for rate in ("", "50", "50 M", "50m", "99k", "101G", "-5M", "1e3k", "None", "5\u0664M"):
        with pytest.raises(tun6.RequestError, match=f"^limit {re.escape(rate)}: it must be bits a second.*2.5M.*; or none, or default"):
            handler.limit("a", rate)
    with pytest.raises(tun6.RequestError, match=r"^'b' is not known; `clients list` shows who is$"):
        handler.limit("b", "50M")
    assert (store.limit_of("a"), store.limit_of("b"), len(told)) == (None, None, 4)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (999, "999"), (1000, "1.0k"), (9960, "10k"), (12_345, "12k"), (999_900, "1.0M"), (1.5e15, "1500T")]
)
def test_amounts_are_short(value: float, shown: str) -> None:
    assert tun6.format_amount(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0s"), (59, "59s"), (61, "1m01s"), (7500, "2h05m"), (277_500, "3d05h")])
def test_durations_have_two_units(seconds: int, shown: str) -> None:
    assert tun6.format_duration(seconds) == shown


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_an_answer_in_slices_is_the_same_json(answer: object) -> None:
    assert json.loads("".join(tun6.encode_in_slices(answer))) == answer


def test_others_run_while_a_long_answer_is_made() -> None:
    turns: list[None] = []

    def take_turns() -> None:
        while True:
            turns.append(gevent.sleep(0))

    other = gevent.spawn(take_turns)
    assert list(tun6.in_slices(range(10 * tun6.SLICE))) == list(range(10 * tun6.SLICE))
    assert len(turns) >= 10
    other.kill()


def test_the_validity_of_a_certificate_is_what_openssl_says(tmp_path: Path) -> None:
    for days in ("1", "36500"):  # the second one's end has four digits of the year
        make_certificate(tmp_path / days, "-days", days, "-subj", "/CN=tun6")
        begins, expires = tun6.certificate_validity(str(tmp_path / days)) or (0, 0)
        assert expires - begins == int(days) * 86_400
        assert abs(begins - time.time()) < 60
    (tmp_path / "no").write_text("nothing")
    assert tun6.certificate_validity(str(tmp_path / "no")) is None
    assert tun6.certificate_validity(str(tmp_path / "missing")) is None


def test_a_request_of_another_version_is_refused() -> None:
    handler = tun6.RequestHandler(dict, tun6.LoopLatency())
    for request in ({"do": "list"}, {"do": "status", "more": 1}, {}):
        with pytest.raises(tun6.RequestError, match="the client that runs here is of another version"):
            handler.handle(request)


# ---- metrics ---------------------------------------------------------------------------------------------------------

DASHBOARD = Path(__file__).parent / "contrib" / "grafana-tun6.json"


def client_status_by_hand() -> dict[str, Any]:
    """The status of a client that is up."""
    common = {key: value for key, value in status_by_hand(0).items() if key not in ("clients", "certificate", "pool", "free", "listens")}
    session = {"round_trip": 0.02, "offload": None, "tls": True, "congestion": "bbr"}
    return {
        **common, "side": "client", "state_seconds": 5, "session": session, "outage": None, "id": "x", "server": "s", "address": "a",
        "prefix": "p", "device": "tun6", "parts": {"lan": {"router": "<i>", "hosts": 3}},
    }  # fmt: skip


def web_of(status: dict[str, Any]) -> tun6.Web:
    """What serves this status."""
    latency = tun6.LoopLatency()
    latency.buckets[1], latency.sum = 3, 0.006
    handler = mock.Mock(spec=tun6.RequestHandler, loop_latency=latency, status=lambda **_: status)
    return tun6.Web(("127.0.0.1", 1), handler, True)


def scraped(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The samples in Prometheus' text format, by name and labels, read by its own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(text))
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for family in families for each in family.samples}


def answer_of(web: tun6.Web, path: str, host: str = "127.0.0.1:10116", method: str = "GET") -> tuple[str, dict[str, str], str]:
    """Status, headers and text of what a request is answered."""
    told: list[Any] = []
    (body,) = web._answer({"REQUEST_METHOD": method, "PATH_INFO": path, "HTTP_HOST": host}, lambda *what: told.extend(what))
    return told[0], dict(told[1]), body.decode()


HOSTILE = '"}} <script>alert(1)</script> & \\ {}'


def test_metrics_are_what_prometheus_reads_and_an_id_is_a_label_whatever_it_is() -> None:
    status, headers, text = answer_of(web_of({**status_by_hand(3, HOSTILE), "certificate": {"begins": 1, "expires": 2}}), "/metrics")
    assert status == "200 OK"
    assert headers["Content-Type"].startswith("text/plain; version=")
    found = scraped(text)
    for name, labels, value in (
        ("tun6_up", {}, 1), ("tun6_sessions", {}, 3), ("tun6_bytes_total", {"direction": "received"}, 10**9), ("tun6_queue_bytes", {}, 5),
        ("tun6_dropped_packets_total", {"reason": "multicast"}, 3), ("tun6_dropped_packets_total", {"reason": "not taken"}, 0),
        ("tun6_handshakes_total", {"outcome": "denied"}, 2), ("tun6_certificate_expires_timestamp_seconds", {}, 2),
        ("tun6_loop_latency_seconds_bucket", {"le": "0.0025"}, 3), ("tun6_loop_latency_seconds_bucket", {"le": "+Inf"}, 3),
        ("tun6_loop_latency_seconds_sum", {}, 0.006), ("tun6_client_bytes_total", {"id": HOSTILE.format(2), "direction": "sent"}, 8),
        ("tun6_client_dropped_packets_total", {"id": HOSTILE.format(2)}, 2),
        ("tun6_client_round_trip_seconds", {"id": HOSTILE.format(1)}, 1e-4),
        ("tun6_client_limit_bits", {"id": HOSTILE.format(1)}, 12_500_000),
    ):  # fmt: skip
        assert found[name, tuple(sorted(labels.items()))] == value, name
    assert ("process_open_fds", ()) in found


def test_without_metrics_clients_no_client_is_named() -> None:
    status = status_by_hand(3)
    del status["clients"]
    for path in ("/metrics", "/"):
        text = answer_of(web_of(status), path)[2]
        assert "22:33:44" not in text
        assert "tun6_client_" not in text


class PageReader(HTMLParser):
    """Tags and texts of a page; each tag that is opened must be closed."""

    VOID: ClassVar[set[str]] = {"meta", "polyline"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attributes
        self._open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_page_stands_alone_and_what_others_said_is_text_in_it(side: str) -> None:
    status = status_by_hand(50, HOSTILE) if side == "server" else client_status_by_hand()
    tun6.TRAFFIC.history.extend([tun6.Rates(1e6, 2e6), tun6.Rates()])
    try:
        _, headers, text = answer_of(web_of(status), "/")
    finally:
        tun6.TRAFFIC.history.clear()
    page = PageReader(text)
    assert not {"script", "b"} & (page.tags.keys() - {"b"})
    assert page.tags["b"] == 1  # that of the state, not that of the warning
    assert page.tags["polyline"] == 2
    assert not {"src", "href", "style", "onclick", "data"} & {name for name, _ in page.attributes}
    assert any("<b>long</b>" in each for each in page.texts)
    if side == "server":
        assert page.tags["tr"] == len(tun6.status_rows(status)) + 51
        assert HOSTILE.format(7) in page.texts
    else:
        assert "router <i>, hosts 3" in page.texts
    policy = headers["Content-Security-Policy"]
    style = base64.b64encode(hashlib.sha256(re.findall("<style>(.*)</style>", text)[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{style}';" in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(
    ("path", "host", "method", "status"),
    [
        ("/", "[::1]:10116", "GET", "200"), ("/", "localhost", "GET", "200"), ("/metrics", "192.0.2.1", "GET", "200"),
        ("/", "rebound.example:10116", "GET", "421"), ("/metrics", "", "GET", "421"), ("/", "127.0.0.1.example", "GET", "421"),
        ("/", "127.0.0.1@x", "GET", "421"), ("/etc/passwd", "127.0.0.1", "GET", "404"), ("/../metrics", "127.0.0.1", "GET", "404"),
        ("/", "127.0.0.1", "POST", "405"), ("/metrics", "127.0.0.1", "DELETE", "405"),
    ],
)  # fmt: skip
def test_only_reading_two_paths_by_address_is_answered(path: str, host: str, method: str, status: str) -> None:
    assert answer_of(web_of(status_by_hand(1)), path, host, method)[0].startswith(status)


def test_a_defect_while_a_page_is_made_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    assert answer_of(web_of({}), "/metrics")[0] == "500 Internal Server Error"
    assert "metrics: internal error" in caplog.text


def dashboard_queries() -> list[str]:
    """The queries of the dashboard, as Grafana would ask for all instances."""
    targets = [target for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    return [target["expr"].replace("$instance", ".*").replace("$__rate_interval", "10s") for target in targets]


def test_the_dashboard_asks_only_for_metrics_that_there_are_and_for_each_of_them() -> None:
    texts = [answer_of(web_of(status), "/metrics")[2] for status in (
        {**status_by_hand(3), "certificate": {"begins": 1, "expires": 2}, **CLUSTER_BY_HAND}, client_status_by_hand()
    )]  # fmt: skip
    names = {name for text in texts for name, _ in scraped(text)}
    asked = set(re.findall(r"\b(?:tun6|process)_\w+", " ".join(dashboard_queries())))
    assert asked <= names
    left_out = {
        "tun6_build_info",
        "tun6_certificate_begins_timestamp_seconds",
        "tun6_loop_latency_seconds_count",
        "tun6_loop_latency_seconds_sum",
    }
    assert {name for name in names if name.startswith("tun6_")} - asked == left_out
    documented = (Path(__file__).parent / "docs" / "operating.md").read_text()
    assert not [name for name in names if f"`{re.sub('_(count|sum|bucket)$', '', name)}`" not in documented and "process" not in name]


# ---- installation ----------------------------------------------------------------------------------------------------

EXAMPLE = ("--set", "documentation_addresses=yes")
JOINED = {"remotehost": "tun6.example", "remoteport": "443", "id": "é # 1", "key": "k" * 43, "fingerprint": "sha256:" + "0f" * 32}


class FileRoot:
    """A folder that stands for the whole of a machine's files, on which nothing runs."""

    def __init__(self, folder: Path) -> None:
        self.root, self.here = folder / "root", folder / "here"
        self.here.mkdir(parents=True)

    def install(self, *arguments: str, status: int = 0) -> list[str]:
        """What `tun6.py install` says that it does, or in one line why it does not."""
        done = run_tun6("install", *arguments, "--root", str(self.root), cwd=self.here)
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
        return [line.strip() for line in (done.stderr if status else done.stdout).splitlines()]

    def config(self, section: str) -> dict[str, str]:
        """What stands in the section of the config.ini of the service."""
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(self.root / "etc/tun6/config.ini", "utf-8")
        return dict(parser[section])

    def files(self) -> dict[str, int]:
        """All files but the copied packages, with their mode."""
        copied = self.root / "opt/tun6/lib"
        found = [path for path in self.root.rglob("*") if path.is_file() and copied not in path.parents]
        return {str(path.relative_to(self.root)): stat.S_IMODE(path.stat().st_mode) for path in found}


@pytest.fixture
def machine(tmp_path: Path) -> FileRoot:
    return FileRoot(tmp_path)


def test_a_token_carries_what_a_client_has_to_know_and_no_part_of_it_can_be_lost() -> None:
    token = tun6.encode_token(JOINED)
    assert re.fullmatch("tun6:[A-Za-z0-9_-]{200,280}", token)
    assert tun6.decode_token(f" {token[:80]}\n{token[80:]} \n") == JOINED
    other = b"[2]" + hashlib.sha256(b"[2]").digest()[:4]
    mistyped = tun6.encode_token({**JOINED, "key": "j" + "k" * 42})[:-6] + token[-6:]  # all but the check is as good
    wrong = [
        mistyped,
        token[:-1],
        token[:50] + token[51:],
        token.replace("tun6:", ""),
        "tun6:",
        "",
        token + "A",
        token.swapcase(),
        "tun6:é",
    ]
    for text in wrong:
        with pytest.raises(tun6.RequestError, match=r"no token that `tun6.py clients add` printed: .*; copy the whole line"):
            tun6.decode_token(text)
    with pytest.raises(tun6.RequestError, match="more than one line"):
        tun6.decode_token(tun6.encode_token({**JOINED, "id": "a\ntun = theirs"}))
    with pytest.raises(tun6.RequestError, match="another version"):
        tun6.decode_token("tun6:" + base64.urlsafe_b64encode(other).decode().rstrip("="))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[client]\nid = b\nnew = \\1\n"),
        ("[server]\nid = a\n", "[server]\nid = a\n\n[client]\nid = b\nnew = \\1\n"),
        ("[client]\nID: a # c\n\n[server]\nid = a\n", "[client]\nid = b\nnew = \\1\n\n[server]\nid = a\n"),
        ("# x\n[client]\n# says\n#id = a\n#new = 1\nz = 1", "# x\n[client]\n# says\nid = b\nnew = \\1\nz = 1"),
    ],
)
def test_settings_are_changed_in_their_section_and_other_lines_stay(before: str, after: str) -> None:
    assert tun6.set_in_section(before, "client", {"id": "b", "new": "\\1"}).replace("\n\n", "\n") == after.replace("\n\n", "\n")
    assert tun6.set_in_section(after, "client", {"id": "b", "new": "\\1"}) == after


@pytest.mark.parametrize("role", ["server", "client"])
def test_the_units_in_contrib_are_those_that_install_writes(role: str) -> None:
    assert (Path(__file__).parent / f"contrib/tun6-{role}.service").read_text() == tun6.service_unit(role)
    assert "CAP_NET_BIND_SERVICE" not in tun6.service_unit(role)
    assert "\nRuntimeDirectoryPreserve=yes\n" in tun6.service_unit(role)  # else a killed one leaves its LAN's address for ever
    assert tun6.service_unit(role, True).count("CAP_NET_RAW CAP_NET_BIND_SERVICE") == 2


def test_install_puts_a_new_server_in_place_once_and_takes_it_away_but_for_its_state(machine: FileRoot) -> None:
    said = machine.install("server", "--prefix", "2001:db8:7::/48", "--set", "listenport=443", *EXAMPLE)
    assert "made the certificate /var/lib/tun6/server.pem" in said
    state = {name: f"/var/lib/tun6/{name}" for name in ("assignments.json", "keys.json", "server.pem")}
    assert machine.config("server") == {
        "localhost": "0.0.0.0", "listenport": "443", "prefixrange": "2001:db8:7::/48", "documentation_addresses": "yes",
        "assignments": state["assignments.json"], "keys": state["keys.json"], "cert": state["server.pem"],
        "control": "/run/tun6-server/server.sock",
    }  # fmt: skip
    files = machine.files()
    assert files["etc/tun6/config.ini"] == 0o640
    assert files["var/lib/tun6/server.pem"] == 0o600
    assert "CAP_NET_BIND_SERVICE" in (machine.root / "etc/systemd/system/tun6-server.service").read_text()
    assert (machine.root / "etc/sysctl.d/60-tun6.conf").read_text() == "net.ipv6.conf.all.forwarding=1\n"
    launcher = (machine.root / "usr/local/bin/tun6").read_text()
    python = getattr(sys, "_base_executable", sys.executable)
    assert launcher.startswith(f"#!{python}\n")
    copied = launcher.replace("/opt/tun6", f"{machine.root}/opt/tun6")
    done = subprocess.run([python, "-S", "-", "--version"], input=copied, capture_output=True, text=True)
    assert done.stdout == f"tun6 {tun6.__version__}\n", done.stderr
    assert list(machine.root.glob("opt/tun6/__pycache__/tun6.*.pyc"))  # so that it starts fast

    before = {path: untouched(machine.root / path) for path in files}
    assert machine.install("server") == []
    assert {path: untouched(machine.root / path) for path in machine.files()} == before
    assert machine.install("server", "--set", "mtu=1400") == ["wrote /etc/tun6/config.ini"]
    assert machine.config("server")["mtu"] == "1400"
    assert machine.install("client", "--remote", "tun6.example:10001") == [
        "wrote /etc/tun6/config.ini", "wrote /etc/systemd/system/tun6-client.service",
    ]  # fmt: skip
    control = "/run/tun6-client/client.sock"
    assert machine.config("client") == {"remotehost": "tun6.example", "remoteport": "10001", "control": control}
    assert machine.install("client", "--remote", "a.example:443, b.example") == ["wrote /etc/tun6/config.ini"]
    assert machine.config("client") == {"remotehost": "a.example:443, b.example", "remoteport": "10001", "control": control}
    assert machine.config("server")["mtu"] == "1400"
    assert "removed /opt/tun6" not in machine.install("server", "--remove")
    assert "removed /opt/tun6" in machine.install("client", "--remove")
    assert sorted(machine.files()) == ["etc/tun6/config.ini", "var/lib/tun6/server.pem"]


def test_install_puts_a_server_of_a_cluster_in_place_without_files_of_assignments(machine: FileRoot) -> None:
    shutil.copy(Path(tun6.__file__).with_name("config.ini"), machine.here)
    store = ["--set", "store=postgresql://tun6:secret@db/tun6"]
    machine.install("server", "--prefix", "2001:db8:7::/48", *store, *EXAMPLE)
    state = {"cert": "/var/lib/tun6/server.pem", "store_cache": "/var/lib/tun6/store-cache.json"}
    config = machine.config("server")
    assert {key: config.get(key) for key in (*state, "assignments", "keys")} == {**state, "assignments": None, "keys": None}
    files = machine.files()
    assert files["etc/tun6/config.ini"] == 0o640  # it has the password
    assert files["var/lib/tun6/server.pem"] == 0o600
    assert machine.install("server") == []
    (machine.root / "etc/tun6/old.json").write_text("{}")
    (complaint,) = machine.install("server", "--set", "assignments=old.json", status=2)
    assert re.search(
        "has a store, and beside it assignments = .*old.json; take them into the store with `tun6.py cluster import`", complaint
    )
    assert machine.files() == {**files, "etc/tun6/old.json": mock.ANY}


def test_install_uses_the_program_and_the_unit_of_debians_package(machine: FileRoot) -> None:
    program, unit, ours = (
        machine.root / path for path in ("usr/lib/tun6/tun6.py", "usr/lib/systemd/system/tun6-server.service", "etc/systemd")
    )
    for path, text in ((program, Path(TUN6).read_text()), (unit, tun6.service_unit("server", program=tun6.PACKAGE))):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert "\nExecStart=/usr/bin/tun6 server " in unit.read_text()

    def install(*arguments: str) -> str:
        command = [sys.executable, str(program), "install", "server", "--root", str(machine.root), *arguments]
        done: subprocess.CompletedProcess[str] = subprocess.run(command, cwd=machine.here, check=True, capture_output=True, text=True)
        return done.stdout

    assert "etc/systemd" not in install("--prefix", "2001:db8:7::/48", *EXAMPLE)
    assert {path.split("/")[0] for path in machine.files()} == {"etc", "var", "usr"}
    assert not [path for path in machine.files() if path.startswith(("usr/local", "etc/systemd"))]
    assert "wrote /etc/systemd/system/tun6-server.service" in install("--set", "listenport=443")
    written = (ours / "system/tun6-server.service").read_text()
    assert "ExecStart=/usr/bin/tun6 " in written and "CAP_NET_BIND_SERVICE" in written
    assert "removed /etc/systemd/system/tun6-server.service" in install("--set", "listenport=10000")
    install("--remove")
    assert unit.exists() and program.exists()


def test_a_client_joins_by_a_token_in_the_command_or_on_standard_input(machine: FileRoot) -> None:
    token = tun6.encode_token({**JOINED, "id": "pi"})
    machine.install("client", "--join", token)
    assert machine.config("client") == {**JOINED, "id": "pi", "control": "/run/tun6-client/client.sock"}
    (machine.root / "etc/tun6/config.ini").unlink()
    command = [sys.executable, TUN6, "install", "client", "--join", "-", "--root", str(machine.root)]
    subprocess.run(command, input=token + "\n", text=True, cwd=machine.here, check=True, timeout=30, stdout=subprocess.DEVNULL)
    assert machine.config("client") == {**JOINED, "id": "pi", "control": "/run/tun6-client/client.sock"}
    assert machine.files()["etc/tun6/config.ini"] == 0o640
    (line,) = machine.install("client", "--join", "tun6:x", status=2)
    assert "no token" in line


def test_install_asks_for_what_it_must_know_when_it_is_at_a_terminal(machine: FileRoot) -> None:
    asked = {
        "tun6.example": ([], "remotehost (name or address of the server): "),
        tun6.encode_token({**JOINED, "remotehost": "joined.example"}): (["--join", "-"], "Paste the line tun6:... "),
    }
    for answer, (options, question) in asked.items():
        ours, terminal = os.openpty()
        with open(ours, "w") as keyboard, open(terminal) as stdin:
            keyboard.write(f"{answer}\n")
            keyboard.flush()
            command = [sys.executable, TUN6, "install", "client", *options, "--root", str(machine.root)]
            done = subprocess.run(command, stdin=stdin, cwd=machine.here, timeout=30, capture_output=True, text=True)
            assert done.stdout.startswith(question), done.stderr
        assert machine.config("client")["remotehost"] == (answer if not options else "joined.example")
    assert "[client] remotehost is missing" in FileRoot(machine.here).install("client", status=2)[-1]  # no terminal


def test_the_address_that_clients_add_prints_is_the_operators_or_the_kernels() -> None:
    config = tun6.ServerConfig("0.0.0.0", 1, POOL)
    assert tun6.public_address(dataclasses.replace(config, address="tun6.example", localhost="10.0.0.1")) == "tun6.example"
    assert tun6.public_address(dataclasses.replace(config, localhost="10.0.0.1")) == "10.0.0.1"
    for address, edit in (("10.0.0.1", "unless it is"), ("9.9.9.9", "where the client sees"), ("tun6.example", "where the client sees")):
        assert f"# EDIT THIS {edit}" in tun6.format_client_section({**JOINED, "remotehost": address}, "p")
    for hosts, edit in (("a.example, 10.0.0.1:443", "unless it is"), ("9.9.9.9:1, a.example", "where the client sees")):
        assert f"# EDIT THIS {edit}" in tun6.format_client_section({**JOINED, "remotehost": hosts}, "p")


def test_install_moves_what_a_server_has_and_refuses_to_begin_empty_where_any_existed(machine: FileRoot) -> None:
    config = machine.here / "config.ini"
    settings = {**SERVER, "assignments": "who.json", "keys": "keys.json", "cert": "cert.pem"}
    for name, text in (
        ("who.json", '{"a": "2001:db8:1:2::/64"}'), ("who.json.bak", "{}"), ("who.json.limits", '{"a": 1000000}'), ("keys.json", "{}"),
    ):  # fmt: skip
        (machine.here / name).write_text(text)
    make_certificate(machine.here / "cert.pem")
    inode = (machine.here / "who.json").stat().st_ino
    write_ini(config, server={key: value for key, value in settings.items() if key != "assignments"})
    (machine.here / "assignments.json").write_text("{}")
    (line,) = machine.install("server", status=2)
    assert "assignments.json has assignments" in line
    (machine.here / "assignments.json").unlink()
    write_ini(config, server=settings)
    with AnotherServer(machine.here / "who.json"):
        assert "in use by another tun6 server" in machine.install("server", status=2)[0]
    said = machine.install("server")
    state = machine.root / "var/lib/tun6"
    assert sorted(os.listdir(state)) == ["cert.pem", "keys.json", "who.json", "who.json.bak", "who.json.limits"]
    assert (state / "who.json").stat().st_ino == inode
    assert sorted(os.listdir(machine.here)) == ["config.ini", "who.json.lock"]
    assert machine.config("server")["assignments"] == "/var/lib/tun6/who.json"
    assert not any("certificate" in line for line in said)
    assert machine.install("server") == []
    (line,) = machine.install("server", "-c", str(config), status=2)
    assert "is there already" in line
    (line,) = machine.install("server", "--set", "mtu=1", status=2)
    assert "must be a whole number from 1280" in line
    (line,) = machine.install("server", "--set", "mtu", status=2)
    assert "--set mtu: it must be KEY=VALUE" in line


def test_install_takes_over_a_config_ini_but_for_the_other_sides_example(machine: FileRoot) -> None:
    shipped = (Path(TUN6).parent / "config.ini").read_text()
    used = {"server": {"prefixrange": "2a00:1234::/48"}, "client": {"remotehost": "tun6.example"}}
    for role, other, option in (("server", "client", "--prefix=2a00:1234::/48"), ("client", "server", "--remote=tun6.example")):
        for text, kept in ((shipped, False), (tun6.set_in_section(shipped, other, used[other]), True)):
            here = FileRoot(machine.here / f"{role} {kept}")
            (here.here / "config.ini").write_text(text)
            here.install(role, option)
            made = (here.root / "etc/tun6/config.ini").read_text()
            assert (f"\n[{role}]\n" in made, f"\n[{other}]\n" in made, "\n#mtu = 1500\n" in made) == (True, kept, True)


def test_install_says_which_interface_is_not_there(machine: FileRoot) -> None:
    client = ("client", "--remote", "tun6.example", "--set")
    assert not [line for line in machine.install(*client, "lan=eth7") if "warning" in line]  # it is no machine that runs
    (machine.root / "sys/class/net/eth0").mkdir(parents=True)
    assert not [line for line in machine.install(*client, "lan=eth0") if "warning" in line]
    what = "there is no such interface now, see `ip link`"
    later = f"warning: lan = eth7: {what}; the LAN is served as soon as there is one"
    assert later in machine.install(*client, "lan=eth7")
    needed = f"warning: ndp = eth7: {what}; the server does not start without it"
    assert needed in machine.install("server", "--prefix", "2001:db8:7::/48", "--set", "ndp=eth7", *EXAMPLE)


class AnotherServer(SocketOwner):
    """One that has these assignments open."""

    def __init__(self, path: Path) -> None:
        self._store = tun6.AssignmentStore(tun6.PrefixPool(POOL), str(path))

    def __exit__(self, *_: object) -> None:
        self._store.close()


# ---- demo ------------------------------------------------------------------------------------------------------------


@pytest.mark.waits
def test_the_demo_shows_every_step_and_leaves_nothing(hosts: Lab, tmp_path: Path) -> None:
    command = [sys.executable, TUN6, "demo"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as demo:
        try:
            out, err = demo.communicate(timeout=60)
        finally:
            demo.kill()
    assert demo.returncode == 0, out + err
    for step in (
        "hello and prefix",
        "a LAN host where nothing is configured",
        "a LAN host reaches",
        "the client ends",
        "bulk transfer up",
        "firewall",
        "bulk transfer down",
        "server killed",
        "a second client",
        "native IPv6 beside the tunnel",
        "keys and encryption",
    ):
        assert f"  ok  {step}" in out
    assert not [name for name in os.listdir("/run/netns") if name.startswith(f"tun6-{demo.pid}-")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_told_to_stop_leaves_nothing(hosts: Lab, tmp_path: Path, number: int) -> None:
    command = [sys.executable, TUN6, "demo"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as demo:
        try:
            assert demo.stdout
            next(line for line in demo.stdout if "hello and prefix" in line)
            demo.send_signal(number)
            _, err = demo.communicate(timeout=20)
        finally:
            demo.kill()
    assert demo.returncode == 128 + number
    assert "Traceback" not in err
    assert not [name for name in os.listdir("/run/netns") if name.startswith(f"tun6-{demo.pid}-")]


# ---- command line ----------------------------------------------------------------------------------------------------

SERVER = {"localhost": "192.0.2.1", "listenport": "10000", "prefixrange": "2001:db8:1::/56", "documentation_addresses": "yes"}
CLIENT = {"remotehost": "tun6.example", "remoteport": "10000"}
REQUIRED = {"server": SERVER, "client": CLIENT}


def write_config(folder: Path, **sections: dict[str, str]) -> str:
    """A config.ini; gives its path."""
    return str(write_ini(folder / "config.ini", **sections))


def test_what_a_config_leaves_out_has_the_documented_defaults(tmp_path: Path) -> None:
    path = write_config(tmp_path, server={**SERVER, "assignments": ""}, client={**CLIENT, "id": ""})
    assert dataclasses.asdict(tun6.read_config(path, "server")) == {
        "localhost": "192.0.2.1", "listenport": 10000, "prefixrange": POOL,
        "assignments": None, "congestion": "auto", "offload": "auto", "tun": "tun6-%d", "mtu": 1500, "max_clients": 1000, "cert": None,
        "keys": None, "keys_required": True, "link": "auto", "control": "/run/tun6/server.sock", "new_ids_per_hour": 0,
        "client_to_client": True, "documentation_addresses": True, "address": None, "fingerprint": (), "hook": None, "ndp": None,
        "log": "text", "metrics": None, "metrics_clients": False, "dead_after": 35, "limit": None,
        "store": None, "store_cache": "store-cache.json", "name": "",
        "file": path,
    }  # fmt: skip
    assert dataclasses.asdict(tun6.read_config(path, "client")) == {
        "remotehost": (("tun6.example", None),), "remoteport": 10000,
        "id": None, "congestion": "auto", "offload": "auto", "tun": "tun6", "mtu": 1500, "default_route": True, "tls": False,
        "lan": None, "lan_dns": (), "lan_preference": "auto", "firewall": None, "open": (), "link": "auto", "grace": 10, "mss": None,
        "rate_up": None, "rate_down": None,
        "fingerprint": (), "key": None, "hook": None, "control": "/run/tun6/client.sock", "log": "text", "metrics": None,
        "documentation_addresses": False, "dead_after": 35, "file": path,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "key", "text", "value"),
    [
        ("server", "localhost", "0.0.0.0 ; all of them", "0.0.0.0"),
        ("server", "LISTENPORT", "65535", 65535),
        ("server", "prefixrange", "2001:db8:1::7:8/56 # host bits", POOL),
        ("server", "prefixrange", "2001:db8::/64", IPv6Network("2001:db8::/64")),
        ("server", "assignments", "/var/lib/tun6/a b.json", "/var/lib/tun6/a b.json"),
        ("server", "tun", "v%dpn", "v%dpn"),
        ("server", "tun", "t" * 11 + "%d", "t" * 11 + "%d"),
        ("server", "mtu", "1280", 1280),
        ("server", "max_clients", "1", 1),
        ("client", "remotehost", "10.0.0.7", (("10.0.0.7", None),)),
        ("client", "remotehost", "a.example,10.0.0.7:443 , b, b", (("a.example", None), ("10.0.0.7", 443), ("b", None))),
        ("client", "fingerprint", f"sha256:{'0F' * 32}, SHA256:{'a1:' * 31}a1", (f"sha256:{'0f' * 32}", f"sha256:{'a1' * 32}")),
        ("server", "address", "a.example, 10.0.0.7:443", "a.example, 10.0.0.7:443"),
        ("server", "fingerprint", f"sha256:{'0f' * 32}", (f"sha256:{'0f' * 32}",)),
        ("server", "ndp", "enp1s0.100", "enp1s0.100"),
        ("client", "id", "my raspberry é", "my raspberry é"),
        ("client", "tun", "t" * 15, "t" * 15),
        ("client", "lan", "eth0.5", "eth0.5"),
        ("client", "lan_dns", "2001:db8::53,fd00::1", (IPv6Address("2001:db8::53"), IPv6Address("fd00::1"))),
        ("client", "lan_preference", "low", "low"),
        ("client", "default_route", "No", False),
        ("client", "default_route", "on", True),
        ("client", "firewall", "yes", True),
        ("client", "open", "::22 tcp 443, this TCP 22", (tun6.Opening(0x22, "tcp", 443, 443), tun6.Opening(None, "tcp", 22, 22))),
        ("client", "open", "0:0:0:0:1:2:3:4  udp 5000-5010", (tun6.Opening(0x0001_0002_0003_0004, "udp", 5000, 5010),)),
        ("client", "log", "json", "json"),
        ("client", "metrics", "127.0.0.1:10116", ("127.0.0.1", 10116)),
        ("server", "metrics", "[2001:db8::1]:1", ("2001:db8::1", 1)),
        ("server", "limit", "50M", 50_000_000),
        ("server", "limit", "1.5G", 1_500_000_000),
        ("server", "limit", "100k", 100_000),
        ("client", "rate_up", "2.5M ; ADSL", 2_500_000),
        ("client", "rate_down", "100G", 100_000_000_000),
    ],
)
def test_good_values_are_taken_without_their_comments(section: str, key: str, text: str, value: object, tmp_path: Path) -> None:
    path = write_config(tmp_path, **{section: {**{k: v for k, v in REQUIRED[section].items() if k != key.lower()}, key: text}})
    assert getattr(tun6.read_config(path, section), key.lower()) == value


@pytest.mark.parametrize(
    ("section", "key", "text", "right"),
    [
        *[("server", "localhost", text, "IPv4 address") for text in ("::1", "localhost", "10.0.0.256", "10.0.0.0/8")],
        *[("server", "listenport", text, "whole number from 1 to 65535") for text in ("0", "65536", "-1", "http", "9" * 5000)],
        *[("server", "listenport", text, "whole number from 1 to 65535") for text in ("1.5", "1_0", "\uff19")],
        *[("server", "prefixrange", text, "/64 or shorter") for text in ("2001:db8::/65", "2001:db8::1", "2001:db8::/128")],
        *[("server", "prefixrange", text, "IPv6 range such as") for text in ("10.0.0.0/8", "junk", "2001:db8::/x", "2001:db8::%eth0/48")],
        *[("server", "prefixrange", text, "range of yours") for text in ("::/0", "fe80::/56", "ff00::/56")],
        *[("server", "tun", text, "one %d") for text in ("tun6", "a%db%d", "t" * 12 + "%d", "a/%d", "a b%d", "%s")],
        *[(section, "mtu", text, "from 1280 to 65500") for section in REQUIRED for text in ("1279", "65501", "big")],
        *[("server", "max_clients", text, "whole number from 1") for text in ("0", "-5", "many")],
        *[("client", "remotehost", text, "name or the IPv4") for text in ("::1", "a b", "http://x", "a..b", "x" * 64, "a,,b", "a b, c")],
        *[("client", "remotehost", text, "1 to 65535") for text in ("x:0", "a, x:", "a:1:2", "x:65536")],
        *[("client", "fingerprint", text, "64 hexadecimal digits") for text in ("0f" * 32, f"sha256:{'0f' * 32},", "sha256:0f")],
        *[("client", "remoteport", text, "whole number from 1 to 65535") for text in ("0", "x")],
        *[("client", "id", text, "1 to 64 printable") for text in ("x" * 65, "a\tb", "a\x1bb")],
        *[("client", "tun", text, "at most 15 characters") for text in ("t" * 16, "tun%d", "a/b", ".", "..")],
        *[("client", "default_route", text, "yes or no") for text in ("maybe", "2")],
        *[
            ("client", "open", text, "entries like ::22 tcp 443")
            for text in ("443", "::22", "::22 tcp", "::22 sctp 5", "this tcp ssh", ",")
        ],
        *[("client", "open", text, "entries like ::22 tcp 443") for text in ("x tcp 1", "::22%eth0 tcp 1", "::22/64 tcp 1", "::5 tcp 1 2")],
        *[("client", "open", f"this tcp 1, this udp {ports}", "ports from 1 to 65535") for ports in ("0", "65536", "2-1", "0-9", "00000")],
        *[
            ("client", "open", f"{host} tcp 443", "lower half of its address")
            for host in ("2001:db8::22", "::", "::1", "::1::2", "1.2.3.4")
        ],
        *[("client", "lan", text, "one interface, such as eth1") for text in ("lo", "eth0, eth1", "eth0 eth1", "a/b", "..", "t" * 16)],
        *[("client", "lan_dns", text, "IPv6 addresses, separated by commas") for text in ("192.0.2.1", "fe80::1%eth0", "fd00::1,,")],
        ("client", "lan_preference", "lowest", "auto, low, medium or high"),
        *[(section, "metrics", text, "127.0.0.1:10116") for section in REQUIRED for text in ("10116", ":1", "::1:1", "[1.2.3.4]:1", "a:1")],
        *[("server", "metrics", text, "127.0.0.1:10116") for text in ("127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1", "[::1%lo]:1")],
        ("server", "log", "xml", "text or json"),
        *[
            (section, key, text, "from 100k to 100G")
            for section, key in (("server", "limit"), ("client", "rate_up"), ("client", "rate_down"))
            for text in ("50", "50m", "50 M", "50Mbit", "0M", "99.9k", "100.1G", "-1M", ".5M")
        ],
        # An indented line is a part of the value above it.
        *[(section, key, f"{value}\n  mtu = 1400", "") for section in REQUIRED for key, value in REQUIRED[section].items()],
        ("server", "assignments", "a.json\n  mtu = 1400", ""),
    ],
)
def test_a_bad_value_is_one_sentence_that_says_what_would_be_right(section: str, key: str, text: str, right: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, **{section: {**REQUIRED[section], key: text}})
    with pytest.raises(tun6.ConfigError) as caught:
        tun6.read_config(path, section)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: [{section}] {key}")
    assert right in sentence
    assert "".join(takewhile(str.isprintable, text[:10])) in sentence
    assert sentence.isprintable()
    assert len(sentence) < 600


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[serve]\nlocalhost = 0.0.0.0\n", r"unknown section \[serve\].*did you mean \[server\]\?"),
        ("[DEFAULT]\nmtu = 1500\n", r"unknown section \[DEFAULT\].*known are \[server\], \[client\]"),
        ("[server]\nlistnport = 10000\n", r"\[server\] listnport = 10000.*unknown key.*did you mean listenport\?"),
        ("[client]\nlistenport = 10000\n", r"\[client\] listenport = 10000.*unknown key"),
        ("[server]\nqqq = a\n b\n", r"\[server\] qqq.*unknown key.*known are localhost, "),
        ("[client]\nremotehost = a\n", r"no section \[server\]"),
        ("", r"no section \[server\]"),
        ("[server]\nlocalhost = 0.0.0.0\nprefixrange = 2001:db8::/56\n", r"\[server\] listenport is missing.*add"),
        ("[server]\nlistenport =  # none\n", r"\[server\] \w+ is missing"),
        ("localhost = 0.0.0.0\n", "no section headers.*line: 1"),
        ("[server]\nlocalhost\n", "line  ?2.*localhost"),
        ("[server]\nmtu = 1500\nmtu = 1400\n", "line  ?3.*'mtu'.*already exists"),
        ("[server]\nMTU = 1500\nmtu = 1400\n", "line  ?3.*'mtu'.*already exists"),
        ("[server]\n[server]\n", "line  ?2.*'server' already exists"),
    ],
)
def test_a_bad_config_is_one_sentence_that_names_the_file_and_the_fault(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text(text)
    with pytest.raises(tun6.ConfigError, match=complaint) as caught:
        tun6.read_config(str(path), "server")
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_config_that_can_not_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"[client]\nid = \xe9\n")
    for name, complaint in ("missing", "No such file"), ("latin", "not UTF-8"), (".", "directory"):
        path = str(tmp_path / name)
        with pytest.raises(tun6.ConfigError, match=f"^{re.escape(path)}.*{complaint}"):
            tun6.read_config(path, "server")


def test_the_config_is_the_named_one_or_that_in_etc_or_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etc = tmp_path / "etc.ini"
    monkeypatch.setattr(tun6, "CONFIG_FILES", (str(etc), "config.ini"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tun6.ConfigError, match=r"neither .*etc.ini nor ./config.ini.*-c FILE"):
        tun6.find_config(None)
    write_config(tmp_path)
    assert tun6.find_config(None) == "config.ini"
    etc.touch()
    assert tun6.find_config(None) == str(etc)
    assert tun6.find_config("other.ini") == "other.ini"


def test_the_shipped_examples_are_read_once_their_addresses_are_permitted(open_store: OpenStore, tmp_path: Path) -> None:
    folder = Path(tun6.__file__).parent
    for section, key, value, what in (
        ("server", "prefixrange", "2001:db8:1::/48", "the range that is routed to this machine"),
        ("client", "remotehost", "192.0.2.1", "your server's name or address"),
    ):
        complaint = rf"config.ini: \[{section}\] {key} = {value}: it is an example, which reaches nobody; set {what}$"
        with pytest.raises(tun6.ConfigError, match=complaint):
            tun6.read_config(str(folder / "config.ini"), section)
    shipped = (folder / "config.ini").read_text()
    config, permitted = tmp_path / "config.ini", shipped.replace("#documentation_addresses = no", "documentation_addresses = yes")
    config.write_text(permitted)
    server = tun6.read_config(str(config), "server")
    assert tun6.read_config(str(config), "client").remoteport == server.listenport
    shutil.copy(folder / "assignments.json.example", tmp_path / "example.json")
    open_store(tmp_path / "example.json", server.prefixrange)


@pytest.mark.parametrize("command", ["server", "client"])
def test_a_configuration_error_is_one_line_on_stderr_and_status_2(command: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, **{command: {**REQUIRED[command], "mtu": "12"}})
    said = only_line(run_tun6(command, "-c", path), 2)
    assert said == f"tun6: {path}: [{command}] mtu = 12: it must be a whole number from 1280 to 65500\n"
    assert "missing.ini: No such file" in only_line(run_tun6(command, "-c", "missing.ini", cwd=tmp_path), 2)


def test_a_config_with_a_key_that_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write_config(tmp_path, client={**CLIENT, "key": "k" * 43})
    for mode, warnings_ in ((0o644, 1), (0o640, 0), (0o600, 0)):
        os.chmod(config, mode)
        caplog.clear()
        tun6.ClientDoctor(tun6.read_config(config, "client")).warn()  # as the client does at its start
        assert caplog.text.count(f"{config} has a key, and whoever reads it can be this client; `chmod o= {config}`") == warnings_


def test_usage_errors_have_status_2_and_help_and_version_0() -> None:
    for arguments in [], ["serve"], ["server", "--what"], ["server", "-c"]:
        done = run_tun6(*arguments)
        assert (done.returncode, done.stderr.startswith("usage: ")) == (2, True)
    assert run_tun6("--version").stdout == f"tun6 {tun6.__version__}\n"
    for arguments in ["--help"], ["server", "--help"]:
        done = run_tun6(*arguments)
        assert (done.returncode, done.stdout.startswith("usage: "), done.stderr) == (0, True, "")


@pytest.mark.parametrize(("module", "package"), [("gevent", "gevent"), ("netifaces", "netifaces"), ("pytun", "python-pytun")])
def test_a_missing_dependency_is_one_sentence_with_the_command_that_installs_it(module: str, package: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
    said = only_line(run_tun6("--version", env={**os.environ, "PYTHONPATH": str(tmp_path)}), 1)
    assert f"package {package} is missing" in said
    assert f"{sys.executable} -m pip install " in said
    assert package in said.split("pip install ")[1]


def drop_privilege() -> None:
    """In a child: its program will have no CAP_NET_ADMIN, even as root."""
    ctypes.CDLL(None).prctl(24, 12, 0, 0, 0)  # PR_CAPBSET_DROP, linux/prctl.h


@pytest.mark.parametrize("command", ["server", "client", "demo"])
def test_without_privilege_it_is_one_sentence(command: str, tmp_path: Path) -> None:
    config = [] if command == "demo" else ["-c", write_config(tmp_path, server=dict(SERVER), client=dict(CLIENT))]
    said = only_line(run_tun6(command, *config, preexec_fn=drop_privilege), 1)
    assert "needs root" in said
    assert "sudo" in said


@pytest.mark.parametrize("journal", [False, True])
def test_events_are_a_line_each_with_the_time_unless_the_journal_adds_it(journal: bool, tmp_path: Path) -> None:
    script = "import tun6; end = tun6.set_up_logging(False); tun6.log.warning('told %s', 'so'); tun6.log.debug('not said')\n"
    script += "tun6.log.info('two\\nlines'); end.write_line('tun6: the end')"
    with open(tmp_path / "log", "w+") as file:
        status = os.fstat(file.fileno())
        stream = f"{status.st_dev}:{status.st_ino + (not journal)}"  # the journal of something else is not ours
        environment = {**os.environ, "PYTHONPATH": str(Path(tun6.__file__).parent), "JOURNAL_STREAM": stream}
        subprocess.run([sys.executable, "-c", script], env=environment, stderr=file, check=True, timeout=30)
    text = (tmp_path / "log").read_text()
    if journal:
        assert text == "<4>WARNING told so\n<6>INFO two\n<6>lines\n<3>tun6: the end\n"
    else:
        assert re.fullmatch(r"[0-9-]{10} [0-9:]{8}\S* WARNING told so\n\S+ \S+ INFO two\nlines\ntun6: the end\n", text)


def test_warnings_that_differ_only_in_their_arguments_are_collapsed_and_counted() -> None:
    now = 0.0
    collapse = tun6.WarningRateLimit(clock=lambda: now)

    def log(message: str, *args: object, level: int = logging.WARNING) -> str | None:
        record = logging.LogRecord("tun6", level, __file__, 1, message, args, None)
        return record.getMessage() if collapse.filter(record) else None

    written = [log("%s: refused", number) for number in range(100)]
    assert written == [f"{number}: refused" for number in range(tun6.WARNINGS_MAX)] + [None] * (100 - tun6.WARNINGS_MAX)
    assert log("another %s", 1) == "another 1"
    assert log("%s: refused", 1, level=logging.ERROR) == "1: refused"
    assert all(log("%s: has", number, level=logging.INFO) for number in range(100))
    now = float(tun6.WARNINGS_INTERVAL_S)
    assert log("%s: refused", "x") == f"x: refused (and {100 - tun6.WARNINGS_MAX} more like this in between)"
    assert log("%s: refused", "y") == "y: refused"


@pytest.mark.parametrize("value", ['"assignments.json"', "'a b'", '""', "\u201ca\u201d", "\u2018a b\u2019"])
def test_a_value_in_quotes_is_refused(tmp_path: Path, value: str) -> None:
    config = write_config(tmp_path, server={**SERVER, "assignments": value})
    with pytest.raises(tun6.ConfigError, match=re.escape(f"[server] assignments = {value}: it is in quotes, write it without")):
        tun6.read_config(config, "server")


def test_a_config_in_utf_16_is_refused_with_what_helps(tmp_path: Path) -> None:
    config = tmp_path / "config.ini"
    config.write_text("[client]\n", "utf-16")  # as Windows calls "Unicode"
    with pytest.raises(tun6.ConfigError, match="it is not UTF-8 text; save it as UTF-8"):
        tun6.read_config(str(config), "client")


def test_an_interface_that_goes_while_it_is_looked_at_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> object:
        raise ValueError("You must specify a valid interface name.")

    monkeypatch.setattr(cast(Any, tun6).netifaces, "ifaddresses", gone)
    tun6.warn_of_overlap(POOL)
    with pytest.raises(tun6.SessionError, match="set `id`"):
        tun6.default_id()


@pytest.mark.parametrize(("section", "config"), [("server", tun6.ServerConfig), ("client", tun6.ClientConfig)])
def test_each_setting_has_a_parser_and_is_in_readme_and_config_ini(section: str, config: type) -> None:
    names = {field.name for field in dataclasses.fields(config)} - {"file"}
    assert names == tun6._PARSERS[section].keys()
    here = Path(__file__).parent
    shipped = (here / "config.ini").read_text().partition("\n[client]\n")
    for name in names:
        assert f"`{name}`" in (here / "README").read_text(), name
        assert re.search(f"^#?{name} = ", shipped[0 if section == "server" else 2], re.MULTILINE), name


@pytest.mark.parametrize("section", ["server", "client"])
def test_offload_is_auto_tso6_or_no(tmp_path: Path, section: str) -> None:
    settings = {"server": SERVER, "client": CLIENT}[section]
    for value in ("auto", "tso6", "no"):
        assert tun6.read_config(write_config(tmp_path, **{section: {**settings, "offload": value}}), section).offload == value
    assert tun6.read_config(write_config(tmp_path, **{section: settings}), section).offload == "auto"
    with pytest.raises(tun6.ConfigError, match=r"offload = uso6: it must be auto, tso6 or no"):
        tun6.read_config(write_config(tmp_path, **{section: {**settings, "offload": "uso6"}}), section)


# ---- cluster store ---------------------------------------------------------------------------------------------------


class StubError(Exception):
    """What psycopg.Error is."""


class StubDatabase:
    """Database's interface, with rows in memory that all of them share, and faults."""

    rows: ClassVar[dict[str, tun6.Row]] = {}
    notified: ClassVar[dict[StubDatabase, list[str]]] = {}  # by who listens
    is_down: ClassVar[bool] = False
    change_s: ClassVar[float] = 0.0  # before each COMMIT
    answer_s: ClassVar[float] = 0.0  # behind it
    keys: ClassVar[str] = "none"

    def __init__(self, url: str, application: str) -> None:
        self._closed = threading.Event()

    def open(self, known: Sequence[tun6.Row]) -> tuple[tun6.PoolRow, list[tun6.Row], float]:
        self._fail()
        self.notified[self] = []
        return tun6.PoolRow(uuid.UUID(int=1), tun6.SCHEMA_VERSION, POOL, self.keys, 0, "1", "1"), list(self.rows.values()), 0.0

    def close(self) -> None:
        self._closed.set()
        self.notified.pop(self, None)

    def enter(self, name: str, address: str, known: Sequence[tun6.Row]) -> tuple[int, str, list[tun6.Row]]:
        self._fail()
        return 0, "1", []

    def beat(self, name: str) -> tuple[float, str, list[tuple[str, str, float]]]:
        self._fail()
        return 0.0, "1", []

    def listen(self, ids: Sequence[str]) -> list[tun6.Row]:
        heard = list(ids)
        for _ in range(20):
            self._fail()
            heard += self.notified.get(self, [])
            self.notified.get(self, heard).clear()
            if heard:
                break
            time.sleep(0.01)
        return [self.rows[id_] for id_ in heard if id_ in self.rows]

    def change(self, batch: tun6.Batch, new_ids_per_hour: int) -> None:
        self._fail()
        time.sleep(self.change_s)
        rows = {}
        for number, change in enumerate(batch.changes):
            try:
                row = change.decide(self.rows.get(change.id) or change.create(1.0), 1.0)
            except (tun6.Tun6Error, EOFError, KeyError) as error:
                batch.results.append(error)
                continue
            rows[change.id] = row._replace(prefix=subnet(len(self.rows) + number)) if row.prefix == tun6.UNASSIGNED else row
            batch.results.append(rows[change.id])
        if not batch.begin_commit():
            return
        self.rows.update(rows)
        for each in self.notified.values():
            each += rows
        time.sleep(self.answer_s)

    def _fail(self) -> None:
        if self.is_down or self._closed.is_set():
            raise StubError("it is\nnot there")


OpenCluster = Callable[..., tun6.ClusterStore]


@pytest.fixture
def open_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenCluster]:
    """Opens the ClusterStore of a server of this name, on a StubDatabase."""
    stub = type("Stub", (StubDatabase,), {"rows": {}, "notified": {}})
    monkeypatch.setattr(tun6, "Database", stub)
    monkeypatch.setattr(tun6, "require_psycopg", lambda: mock.Mock(Error=StubError))
    monkeypatch.setattr(tun6, "COMMIT_S", 1.0)
    monkeypatch.setattr(tun6, "RETRY_S", 0.05)
    with ExitStack() as undo:

        def open_(name: str) -> tun6.ClusterStore:
            store = tun6.ClusterStore("postgresql://u:secret@db/x", POOL, "required", str(tmp_path / f"{name}.json"), name)
            undo.callback(store.close)
            store.start()
            return store

        yield open_


def stub() -> type[StubDatabase]:
    return cast("type[StubDatabase]", tun6.Database)


def test_the_newest_session_of_a_cluster_wins_and_ends_are_told(open_cluster: OpenCluster) -> None:
    a, b, ends = open_cluster("a"), open_cluster("b"), list[str]()
    with a.begin(tun6.Claim("x", end=ends.append)) as first, b.begin(tun6.Claim("x")) as second:
        assert (first.epoch, second.epoch, first.prefix) == (1, 2, second.prefix)
        assert becomes_true(lambda: ends, 3)
        with pytest.raises(tun6.Refusal, match="newer session"):
            first.require_newest()
        second.require_newest()
        second.received = 7
    assert becomes_true(lambda: not stub().rows["x"].live, 3)
    assert stub().rows["x"].received == 7
    assert a.find("x") == first.prefix and str(a.path) == "postgresql://db/x"


@pytest.mark.parametrize("lands", [False, True])
def test_a_store_that_does_not_commit_in_time_is_down_until_it_answers_again(open_cluster: OpenCluster, lands: bool) -> None:
    a = open_cluster("a")
    with a.begin(tun6.Claim("x")):
        pass
    setattr(stub(), "answer_s" if lands else "change_s", 2.0)
    with a.begin(tun6.Claim("x")) as lease:
        epoch = 3 if lands else 2  # above the one that was heard of
        assert lease.epoch == epoch and "no answer" in a.figures()["store"]["down"]
        with pytest.raises(tun6.StorageError, match="store is down"):
            a.assign("new")
        stub().answer_s = stub().change_s = 0.0
        assert becomes_true(lambda: not a.figures()["store"]["down"] and not a.figures()["store"]["owed"], 5)
        assert (stub().rows["x"].epoch, stub().rows["x"].live) == (epoch, True)
        gevent.sleep(2)  # until the thread that was given up is at its end
        assert stub().rows["x"].epoch == lease.epoch == epoch


def test_of_two_sessions_of_an_outage_the_one_that_is_told_last_goes_on_when_their_epochs_are_the_same(open_cluster: OpenCluster) -> None:
    servers, epochs, ends = [open_cluster(name) for name in "ab"], list[int](), list[str]()
    with servers[0].begin(tun6.Claim("x")):
        pass
    assert becomes_true(lambda: servers[1].find("x"), 3)
    stub().is_down = True
    assert becomes_true(lambda: all(server.figures()["store"]["down"] for server in servers), 3)
    with ExitStack() as undo:
        leases = [undo.enter_context(server.begin(tun6.Claim("x", on_epoch=epochs.append, end=ends.append))) for server in servers]
        assert [lease.epoch for lease in leases] == [2, 2]
        stub().is_down = False
        assert becomes_true(lambda: epochs and ends, 5)
        assert len(ends) == 1 and epochs == [3]
        assert sorted(lease.metric or 0 for lease in leases) == [tun6.METRIC_MAX - 3, tun6.METRIC_MAX - 2]
        assert [bool(lease.superseded) for lease in leases] == [lease.epoch == 2 for lease in leases]


def test_who_is_killed_while_it_begins_leaves_no_session(open_cluster: OpenCluster) -> None:
    a = open_cluster("a")
    stub().answer_s = 0.2

    def visit() -> None:
        with a.begin(tun6.Claim("x")):
            pytest.fail("nobody waits for it any more")

    begins = gevent.spawn(visit)
    assert becomes_true(lambda: "x" in stub().rows, 3)
    begins.kill()
    assert becomes_true(lambda: not stub().rows["x"].live and not a.figures()["store"]["owed"], 5)


def test_a_server_starts_from_a_cache_that_others_can_not_read(
    open_cluster: OpenCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub().keys = "required"
    a = open_cluster("a")
    a.assign("x")
    a.pin("x", subnet(9))
    assert a.keys
    key, own = a.keys.issue("x"), a.keep()
    a.close()
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600
    stub().is_down = True
    again = open_cluster("a")
    assert again.keys and (again.find("x"), again.keep()) == (subnet(9), own)
    again.keys.check("x", key)
    assert refusal_of(again.keys, "x", "wrong")[0] == refusal_of(again.keys, "y", key)[0] == "denied"
    for damaged in ("{", "[]", '{"": {}, "x": {"prefix": 7}}'):
        (tmp_path / "b.json").write_text(damaged)
        caplog.clear()
        with pytest.raises(tun6.StorageError, match="it is not there"):
            open_cluster("b")
        assert "can't be used" in caplog.text


def test_a_limit_that_any_server_sets_reaches_the_session_and_is_known_without_the_store(open_cluster: OpenCluster) -> None:
    a, b, told = open_cluster("a"), open_cluster("b"), list[Optional[int]]()
    handler = tun6.AdminRequestHandler(b, [], {}, lambda *_: None)
    with a.begin(tun6.Claim("x", on_limit=lambda: told.append(a.limit_of("x")))):
        b.assign("y")
        assert becomes_true(lambda: a.find("y") and b.find("x"), 3)
        for rate, limit in {"none": 0, "2.5M": 2_500_000, "default": None, "50M": 50 * MBIT}.items():
            assert handler.limit("x", rate)["limit"] == b.limit_of("x") == stub().rows["x"].limit == limit
            assert becomes_true(functools.partial(lambda limit: told[-1:] == [limit], limit), 1)
        handler.limit("y", "none")
        assert becomes_true(lambda: a.limit_of("y") == 0, 1)
        with pytest.raises(tun6.RequestError, match="'z' is not known; `clients list` shows who is"):
            handler.limit("z", "50M")
        b._view.rows["z"] = row_of("z")  # as if the database had lost it
        with pytest.raises(tun6.RequestError, match="the store does not know 'z' yet"):
            handler.limit("z", "50M")
        stub().is_down = True
        assert becomes_true(lambda: b.figures()["store"]["down"], 3)
        with pytest.raises(tun6.StorageError, match=r"^the store is down: postgresql://db/x: it is not there$"):
            handler.limit("x", "default")
        assert (b.limit_of("x"), stub().rows["x"].limit) == (50 * MBIT, 50 * MBIT)
    a.close()
    again = open_cluster("a")
    assert [again.limit_of(id_) for id_ in "xyz"] == [50 * MBIT, 0, None]


@pytest.mark.parametrize("more", [False, True])
def test_a_server_that_ends_while_its_cache_is_written_leaves_the_whole_of_it(
    open_cluster: OpenCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: bool
) -> None:
    began, done, overlaps, replace = list[bytes](), list[bytes](), list[bool](), tun6.CacheFile._replace

    def write_slowly(self: tun6.CacheFile, path: Path, content: bytes) -> None:
        overlaps.append(len(began) > len(done))
        began.append(content)
        time.sleep(0.3)
        replace(self, path, content)
        done.append(content)

    monkeypatch.setattr(tun6.CacheFile, "_replace", write_slowly)
    a = open_cluster("a")
    known = {"", a.assign("x") and "x"}
    assert becomes_true(lambda: len(began) > len(done), 3)
    if more:
        known.add(a.assign("y") and "y")
    a.close()
    assert began == done and not any(overlaps)
    assert json.loads((tmp_path / "a.json").read_text()).keys() == known


def test_another_64_of_an_id_is_in_the_cache_at_once(open_cluster: OpenCluster, tmp_path: Path) -> None:
    a, cache = open_cluster("a"), tmp_path / "a.json"

    def prefix() -> object:
        return json.loads(cache.read_text()).get("x", {}).get("prefix") if cache.exists() else None

    first = str(a.assign("x"))
    assert becomes_true(lambda: prefix() == first, tun6.CACHE_S / 2)
    a.pin("x", subnet(40))
    assert becomes_true(lambda: prefix() == str(subnet(40)), tun6.CACHE_S / 2)


def test_a_cache_of_the_version_that_had_no_limits_is_used(open_cluster: OpenCluster, tmp_path: Path) -> None:
    a = open_cluster("a")
    prefix = a.assign("x")
    a.close()
    cache = tmp_path / "a.json"
    entries = json.loads(cache.read_text())
    del entries["x"]["limit"]
    cache.write_text(json.dumps(entries))
    stub().is_down = True
    again = open_cluster("a")
    assert (again.find("x"), again.limit_of("x")) == (prefix, None)


def test_what_is_wrong_with_a_store_in_the_configuration_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for given_settings, complaint in (
        ({"store": "mysql://db"}, "must be an address such as postgresql://"),
        ({"store": "postgresql://db/x", "assignments": "a.json"}, "`tun6.py cluster import`"),
        ({"store": "postgresql://db/x"}, r"install it with: .* -m pip install 'psycopg\[binary\]'"),
    ):
        with pytest.raises(tun6.ConfigError, match=complaint):
            tun6.open_store(tun6.read_config(write_config(tmp_path, server={**SERVER, **given_settings}), "server"))


def test_a_cluster_command_without_a_store_is_a_sentence(tmp_path: Path) -> None:
    assert "store is missing" in only_line(run_tun6("cluster", "init", "-c", write_config(tmp_path, server=SERVER)), 2)


# ---- sources and documents -------------------------------------------------------------------------------------------


def sections_of(path: Path) -> dict[str, range]:
    """The lines of each section of a Python file, by the name in its banner; those before the first banner are in none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    begins = [(number, banner[1]) for number, line in enumerate(lines, 1) if (banner := re.fullmatch(r"# ---- (.+?) -+", line))]
    assert len({name for _, name in begins}) == len(begins), "two banners have one name"
    ends = [number for number, _ in begins[1:]] + [len(lines) + 1]
    return {name: range(begin, end) for (begin, name), end in zip(begins, ends)}


def names_used(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[str]:
    """All names that the code reads and that are not local to a function in it; annotations count."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        inner = list(ast.walk(node))
        local |= {each.arg for each in inner if isinstance(each, ast.arg)}
        local |= {each.id for each in inner if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from names_used(child, local)


def names_defined(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    return {each.id for each in ast.walk(statement) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}


def uses_before_definition(path: Path) -> list[str]:
    """Each use of a name in a section above the one that defines it."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    defined = {name: statement.lineno for statement in reversed(statements) for name in names_defined(statement)}
    faults = []
    for section, lines in sections_of(path).items():
        for statement in statements:
            if statement.lineno in lines:
                later = {name for name in names_used(statement) if defined.get(name, 0) >= lines.stop}
                faults += [f"{section} uses {name} of line {defined[name]}" for name in sorted(later)]
    return faults


def test_no_name_of_the_module_is_given_twice() -> None:
    """The later one would count for what stands above it, too."""
    names: Counter[str] = Counter()
    for node in ast.parse(Path(TUN6).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        given = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        names.update([node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else given)
    assert [name for name, times in names.items() if times > 1] == []


@pytest.mark.parametrize("name", ["tun6.py", "test_tun6.py", "contrib/bench_tun6.py"])
def test_the_map_in_a_files_docstring_names_its_sections_in_their_order(name: str) -> None:
    path = Path(__file__).parent / name
    _, _, map_ = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("The file, top to bottom")
    assert re.findall(r"^    (\S+(?: \S+)*)(?:  |$)", map_, re.MULTILINE) == list(sections_of(path))


def test_a_section_uses_only_names_that_are_defined_in_it_or_above_it() -> None:
    assert uses_before_definition(Path(tun6.__file__)) == []


def test_a_use_of_a_later_sections_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("# ---- a ---\ndef f(x: B) -> None:\n    c = x\n    print(c, d)\n# ---- b ---\nclass B: ...\nc = d = 1\n")
    assert uses_before_definition(path) == ["a uses B of line 6", "a uses d of line 7"]


README_LINES_MAX = 250  # what a person reads on the first day


def without_code_blocks(document: Path) -> str:
    """The text of a Markdown file, in which nothing that only looks like a heading or a link is left in a block of code."""
    return re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(document: Path) -> set[str]:
    """What a link may name behind # of this Markdown file, by GitHub's rule: a heading in lower case, without punctuation, - for blanks."""
    anchors: set[str] = set()
    for heading in re.findall(r"^ {0,3}#{1,6} +(.*?) *#* *$", without_code_blocks(document), re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link, its text
        slug = anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while anchor in anchors:  # the second one of a name gets -1
            number += 1
            anchor = f"{slug}-{number}"
        anchors.add(anchor)
    return anchors


def links_of(document: Path) -> list[str]:
    """Where the links and images of a Markdown file lead, but for addresses on the Internet."""
    prose = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", without_code_blocks(document))  # without code spans
    links = re.findall(r"(?:\]\(|^ {0,3}\[[^\]]+\]: *)<?([^)>\s]+)", prose, re.MULTILINE)
    return [link for link in links if not re.match(r"[a-z][a-z0-9+.-]*:", link)]


def faults_of_documents(root: Path) -> list[str]:
    """What is wrong with README and docs/ in this folder, a sentence each."""
    readme, folder, faults = root / "README", root / "docs", []
    length = len(readme.read_text(encoding="utf-8").splitlines())
    if length > README_LINES_MAX:
        faults.append(f"README has {length} lines")
    leads_to: dict[Path, set[Path]] = {}
    for document in (readme, *sorted(folder.glob("*.md"))):
        found = leads_to[document.resolve()] = set()
        for link in links_of(document):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document.resolve()
            if not target.exists() or not target.is_relative_to(root.resolve()):
                faults.append(f"{document.name}: {link}: there is no such file here")
            elif anchor and anchor not in anchors_of(target):
                faults.append(f"{document.name}: {link}: there is no such heading")
            else:
                found.add(target)
    reached, new = set[Path](), {readme.resolve()}
    while new:
        reached |= new
        new = set[Path]().union(*(leads_to.get(document, ()) for document in new)) - reached
    return faults + [f"no link leads from README to {each.name}" for each in sorted(folder.iterdir()) if each.resolve() not in reached]


def test_each_fault_of_the_cluster_is_in_the_document_with_its_figures() -> None:
    rows = re.findall(r"(?m)^\| (.*?) \| \d+ \| [\d.]+ s \| [\d.]+ s \|$", (CHECKOUT / "docs/cluster.md").read_text())
    assert set(rows) == {fault.name for fault in CLUSTER_FAULTS if fault.whom != "none"}


def test_the_configurations_of_bird_know_the_figures_of_our_routes() -> None:
    text = (CHECKOUT / "contrib/bird.conf").read_text()
    assert f"krt_source != {tun6.ROUTE_PROTOCOL} " in text
    assert re.findall(r"(\d+) - krt_metric", text) == re.findall(r"(\d+) - bgp_local_pref", text) == [str(tun6.METRIC_MAX)]
    assert int(re.findall(r"(?m)^    metric (\d+);", text)[0]) > tun6.METRIC_MAX
    assert {f"define RANGE = {CLUSTER_RANGE};"} == set(
        re.findall("define RANGE.*?;", text + (CHECKOUT / "contrib/bird-router.conf").read_text())
    )


def test_links_between_the_documents_lead_somewhere_and_readme_is_short() -> None:
    assert faults_of_documents(Path(__file__).parent) == []


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("README", "(docs/a.md)", "(docs/c.md)", "README: docs/c.md: there is no such file here"),
        ("README", "(docs/a.md)", "(../README)", "README: ../README: there is no such file here"),
        ("docs/a.md", "#the-first-day-1", "#the-first-day-2", "a.md: ../README#the-first-day-2: there is no such heading"),
        ("docs/a.md", "b.md#messages-and-log", "b.md#a-comment", "a.md: b.md#a-comment: there is no such heading"),
        ("docs/a.md", "(plot.svg)", "`(plot.svg)`", "no link leads from README to plot.svg"),
        ("README", "1\n", "1\n" * README_LINES_MAX, f"README has {README_LINES_MAX + 8} lines"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, file: str, old: str, new: str, fault: str) -> None:
    documents = {
        "README": "# The *first* day\n\n[a](docs/a.md), [far](https://x.org/#x), `[b](c)`\n## The first day\n\n```sh\n[b](c)\n```\n1\n",
        "docs/a.md": "[up](../README#the-first-day-1) [log][1] ![plot](plot.svg) [here](#end)\n# `End`?\n\n[1]: b.md#messages-and-log\n",
        "docs/b.md": "1. a list\n\n   ```sh\n   # a comment\n   ```\n\n## Messages, and [log](a.md)\n",
        "docs/plot.svg": "",
    }
    for name, text in documents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults_of_documents(tmp_path) == []
    assert old in documents[file]
    (tmp_path / file).write_text(documents[file].replace(old, new, 1))
    assert fault in faults_of_documents(tmp_path)


# ---- packages --------------------------------------------------------------------------------------------------------

CHECKOUT = Path(__file__).resolve().parent


def copy_checkout(to: Path) -> set[str]:
    """Copies what belongs to the project, and gives its files."""
    ignored = [line.strip("/") for line in (CHECKOUT / ".gitignore").read_text().splitlines()]
    shutil.copytree(CHECKOUT, to, ignore=shutil.ignore_patterns(".git", *ignored))
    return {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}


def build_packages(source: Path, *options: str) -> list[Path]:
    """The sdist, and the wheel that is made of it."""
    command = [sys.executable, "-m", "build", "-o", str(source.parent / "dist"), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted((source.parent / "dist").iterdir(), key=lambda path: path.suffix)


def test_the_sdist_is_complete_and_the_wheel_made_of_it_runs(tmp_path: Path) -> None:
    wanted = copy_checkout(tmp_path / "source")
    assert {"LICENSE", "contrib/debian/rules", "docs/operating.md", "test_tun6.py"} < wanted
    sdist, wheel = build_packages(tmp_path / "source", "--no-isolation")
    shutil.unpack_archive(sdist, tmp_path)
    (unpacked,) = tmp_path.glob("tun6-*/")
    assert wanted <= {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", "--prefix"]
    subprocess.run([*install, tmp_path / "prefix", wheel], check=True, stdout=subprocess.DEVNULL)
    (packages,) = tmp_path.glob("prefix/**/*-packages")
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([tmp_path / "prefix/bin/tun6", "--version"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"tun6 {tun6.__version__}\n", done.stderr
    (about,) = packages.glob("tun6-*.dist-info")
    assert list(about.rglob("LICENSE"))
    assert {"gevent", "netifaces", "python-pytun"} == set(re.findall(r"(?m)^Requires-Dist: ([\w-]+)$", (about / "METADATA").read_text()))


def made_by_manual(kind: str) -> str:
    return subprocess.run([sys.executable, CHECKOUT / "contrib/manual.py", kind], capture_output=True, text=True, check=True).stdout


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from chain.from_iterable(map(all_parsers, action.choices.values()))


def shown_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All but --help and what is hidden."""
    return [action for action in parser._actions if action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)]


def test_the_man_page_has_each_command_and_each_option_with_what_it_does() -> None:
    page = made_by_manual("man").replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\fI", "")
    assert page.startswith(f'.TH TUN6 8 "" "tun6 {tun6.__version__}"\n')
    sections = dict(zip(*[iter(re.split(r"(?m)^\.SS (.*)\n", "top\n" + page)[1:])] * 2))
    options, _, _ = page.partition(".SH COMMANDS")
    parsers = list(all_parsers(tun6.build_parser()))
    assert list(sections) == [each.prog for each in parsers[1:]]
    for each in parsers:
        for action in shown_actions(each):
            text = options if each is parsers[0] else options + sections[each.prog]
            choices = () if isinstance(action, argparse._SubParsersAction) else action.choices or ()
            for word in (*action.option_strings, *choices, str(action.help or "")):
                assert word in text, (each.prog, word)


def test_bash_completes_each_command_option_and_choice() -> None:
    cases = {}
    for each in all_parsers(tun6.build_parser()):
        words = {"--help"}
        for action in shown_actions(each):
            words |= set(action.option_strings or action.choices or ())
            if action.nargs != 0:
                cases.update({f"{each.prog} {flag}": set(action.choices or ()) for flag in action.option_strings})
        cases[each.prog] = words
        cases[f"{each.prog} -v"] = words
    script = f"""set -u; {made_by_manual("bash")}
        while read -r line; do COMP_WORDS=($line ""); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tun6; echo "${{COMPREPLY[@]}}"; done"""
    done = subprocess.run(["bash", "-c", script], input="\n".join(cases) + "\n", capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert dict(zip(cases, (set(line.split()) for line in done.stdout.splitlines()))) == cases


def test_the_debian_package_is_of_this_version() -> None:
    assert (CHECKOUT / "contrib/debian/changelog").read_text().startswith(f"tun6 ({tun6.__version__}) ")


# ---- benchmark -------------------------------------------------------------------------------------------------------


def start_benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECKOUT / "contrib/bench_tun6.py", *options], capture_output=True, text=True)


def test_the_benchmarks_help_names_its_rows_sections_and_links() -> None:
    words = set(re.findall(r"[\w.-]+", start_benchmark("--help").stdout))
    assert {tunnel.key for tunnel in bench_tun6.TUNNELS} <= words
    assert {section.key for section in bench_tun6.SECTIONS} <= words
    assert {"lte", "adsl", "dsl", "cable", "wlan", "fibre", "beside-cubic", "changing"} <= words


@pytest.mark.parametrize("options", [("--only", "nothing"), ("--links", "lte,nothing"), ("--limits", "nothing"), ("--beside", "nothing")])
def test_the_benchmark_refuses_names_that_it_does_not_know(options: tuple[str, str]) -> None:
    done = start_benchmark(*options)
    assert done.returncode == 2
    assert "nothing" in done.stderr


def test_each_link_of_the_benchmark_is_measured_plain_and_inside_tls() -> None:
    keys = [link.key for link in bench_tun6.BUFFERBLOAT_LINKS]
    assert list(bench_tun6.TUN6_BUFFERBLOAT_ROWS) == [f"{key}{kind}" for key in keys for kind in ("", "-tls")]
    assert bench_tun6.BUFFERBLOAT_ROWS["lte-wireguard-go"].tunnel.key == "wireguard-go"
    assert "cable-rate" in bench_tun6.BUFFERBLOAT_ROWS
    assert "changing-rate" not in bench_tun6.BUFFERBLOAT_ROWS


def test_the_quick_benchmark_leaves_out_what_takes_long() -> None:
    quick = bench_tun6.parse_selection(None, quick=True).sections
    assert [section.key for section in quick] == ["tcp", "udp", "rtt", "loss1", "limits", "clients"]
    assert list(bench_tun6.parse_selection(None, quick=False).sections) == list(bench_tun6.SECTIONS)


def test_another_version_is_measured_next_to_what_it_is_compared_with() -> None:
    def rows(names: str | None, beside: bool) -> list[str]:
        return [tunnel.key for tunnel in bench_tun6.parse_selection(names, quick=False, beside=beside).tunnels]

    assert rows("tun6-tls,tun6,tcp", beside=True) == ["tun6", "other", "tun6-tls", "other-tls"]
    assert [key for key in rows(None, beside=True) if not key.startswith("other")] == rows(None, beside=False)
    with pytest.raises(ValueError, match="other"):
        rows("other", beside=False)


def test_the_ratio_to_another_version_is_the_median_over_the_pairs(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("# tun6")
    selection = bench_tun6.parse_selection("bufferbloat,tun6,tcp", quick=False, beside=True)
    settings_ = bench_tun6.Settings(bufferbloat_rows=("lte", "lte-direct"), beside=str(tmp_path / "old.py"))
    benchmark = bench_tun6.Benchmark(settings_, selection, tmp_path)
    assert (tmp_path / "other/tun6.py").read_text() == "# tun6"
    assert list(benchmark.rows(bench_tun6.BUFFERBLOAT)) == ["lte", "lte-other", "lte-direct"]
    for mine, other in ((10.0, 5.0), (3.0, 2.0), (8.0, 8.0)):  # ratios 2, 1.5 and 1; that of the medians is 1.6
        benchmark.samples["bufferbloat"]["lte"]["up"].append(mine)
        benchmark.samples["bufferbloat"]["lte-other"]["up"].append(other)
        benchmark.samples["tcp"]["tun6"]["tcp_up"].append(mine)
        benchmark.samples["tcp"]["other"]["tcp_up"].append(other)
    (row,) = [line for line in bench_tun6.format_table(benchmark, bench_tun6.BUFFERBLOAT) if line.startswith("lte: 10/50")]
    assert " 8.0  1.500" in row
    assert list(bench_tun6.format_pairs(benchmark)) == ["tun6 / other, tcp: up 1.500"]


@given(st.floats(0.1, 1e4), st.floats(0, 1e6))
def test_a_changing_rate_says_the_same_of_times_and_of_bytes(half_s: float, when: float) -> None:
    rate = bench_tun6.Rate(1e6, half_s)
    assert rate.time_of(rate.bytes_until(when)) == pytest.approx(when, abs=1e-4)


def test_a_changing_rate_is_full_and_half_in_turn() -> None:
    rate = bench_tun6.Rate(100, 10)
    assert [rate.bytes_until(when) for when in (0, 10, 20, 30, 40)] == [0, 1000, 1500, 2500, 3000]
    assert [rate.halves_between(begin, begin + 1) for begin in (8.9, 9.5, 10.5, 19.5, 29.5)] == [False, True, False, False, True]
    constant = bench_tun6.Rate(100, 0)
    assert (constant.bytes_until(25), constant.time_of(2500), constant.halves_between(0, 100)) == (2500, 25, False)


def through_emulated_link(link: bench_tun6.Link, packets: int, seconds: float) -> list[float]:
    """When those of so many packets of 1,000 bytes, which are sent at once, arrive that are not lost: seconds from then on."""
    clock, arrivals = [0.0], []
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    with ExitStack() as undo:
        for sock in chain.from_iterable(ends):
            undo.enter_context(sock).setblocking(False)
        (sender, source), (sink, receiver) = ends
        direction = bench_tun6.LinkDirection(source.fileno(), sink.fileno(), link.up, link)
        with mock.patch("time.monotonic", lambda: clock[0]):
            for _ in range(packets):
                sender.send(bytes(1000))
                direction.accept_packets()
            while clock[0] < seconds:
                next_arrival = direction.deliver_packets()
                with suppress(BlockingIOError):
                    while receiver.recv(2000):
                        arrivals.append(clock[0])
                clock[0] = next_arrival
    return arrivals


def test_an_emulated_link_has_its_rate_delay_and_buffer() -> None:
    link = bench_tun6.Link("", "", up=8, down=8, rtt=40, buffer=50, loss=0)  # a packet takes 1 ms; 50 wait behind the first
    arrivals = through_emulated_link(link, 100, 1)
    assert arrivals == [pytest.approx(0.021 + number / 1000) for number in range(51)]


def test_what_waits_for_an_emulated_link_meets_its_change() -> None:
    link = bench_tun6.Link("", "", up=8, down=8, rtt=40, buffer=50, loss=0, half_s=0.010)
    arrivals = through_emulated_link(link, 100, 1)
    assert arrivals[:16] == [pytest.approx(0.020 + at / 1000) for at in (*range(1, 11), 12, 14, 16, 18, 20, 21)]


# ---- end to end: lifecycle -------------------------------------------------------------------------------------------


@pytest.mark.waits
@pytest.mark.parametrize(
    ("server_mtu", "client_mtu"), [(1500, 1500), (1280, 1280), (1280, 1500), (1500, 1280), (1400, 9000), (65_500, 65_500)]
)
def test_a_lan_host_behind_the_nat_pings_and_moves_bulk_both_ways(lab: Lab, tunnel: Tunnel, server_mtu: int, client_mtu: int) -> None:
    tunnel.server(mtu=server_mtu)
    client = tunnel.client(mtu=client_mtu)
    prefix = client.prefix()
    assert prefix == IPv6Network(f"{tunnel.pool[0]}/64")  # the first of the pool
    assert tun_of(lab)["mtu"] == client_mtu
    assert tun_of(lab, "server", "tun6-0")["mtu"] == server_mtu
    bulk = 48 << 20 if server_mtu == client_mtu == 1500 else 8 << 20
    with lan_behind(lab, prefix) as address:
        for size in (64, 1440, 3000):
            ping(lab, "lan", size=size)
        transfer(lab, "lan", "internet", Lab.INTERNET, bulk)
        transfer(lab, "internet", "lan", address, bulk)


@pytest.mark.waits
def test_two_clients_at_once_have_their_own_prefixes_and_both_move_bulk(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    hosts = ("client", "second")
    prefixes = [client.prefix() for client in [tunnel.client(host) for host in hosts]]
    assert len(set(prefixes)) == 2
    ways = [
        *((host, "internet", Lab.INTERNET) for host in hosts),
        *(("internet", host, str(prefix[1])) for host, prefix in zip(hosts, prefixes)),
        ("client", "second", str(prefixes[1][1])),
    ]
    with ThreadPoolExecutor(len(ways)) as pool:
        for moved in [pool.submit(transfer, lab, *way, 16 << 20) for way in ways]:
            moved.result(60)


@pytest.mark.waits
def test_the_id_is_the_mac_of_the_interface_with_the_default_route_unless_it_is_set(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    tunnel.client().prefix()
    tunnel.client("second", id="pi in the attic").prefix()
    mac = json.loads(lab.ip("client", "-j link show eth0"))[0]["address"]
    assert set(server.wait_for("INFO '(.*)' from .*: has", 2)) == {mac, "pi in the attic"}


def expect_answer(lab: Lab, address: IPv6Address, text: str) -> None:
    """Waits until the Internet host gets this answer to a ping of the address."""
    ping_once = ("ping", "-6", "-c", "1", "-W", "1", str(address))
    wait_until(f"{address} answers {text}", lambda: text in lab.run("internet", *ping_once).stdout)


@pytest.mark.waits
def test_an_unassigned_prefix_is_unreachable_and_does_not_loop(lab: Lab, tunnel: Tunnel) -> None:
    its_router = changed(lab, "server", f"-6 route add default via {Lab.INTERNET}")
    with its_router, sysctl(lab, "internet", "net.ipv6.conf.all.forwarding", "1"):  # the provider's, which sends the pool back to us
        server = tunnel.server()
        assert (server_devices(lab), server_routes(lab)) == (set(), set())
        assert server_routes(lab, "unreachable") == {str(tunnel.pool)}
        expect_answer(lab, tunnel.pool[1], "Destination unreachable")
        server.stop()
        expect_answer(lab, tunnel.pool[1], "Time exceeded")  # without the server, it loops


@pytest.mark.waits
@pytest.mark.parametrize("length", [56, 64])
@pytest.mark.parametrize("devices", [("newer", "older"), ("older", "newer")])
def test_of_the_routes_of_two_sessions_the_kernel_takes_the_newer_ones_before_the_pools(
    lab: Lab, tunnel: Tunnel, devices: tuple[str, str], length: int
) -> None:
    def way() -> str:
        try:
            return str(re.findall(r"dev (\S+)", lab.ip("server", f"-6 route get {prefix[9]}"))[0])
        except tun6.KernelError as error:
            return "rejected" if "No route to host" in str(error) else str(error)

    prefix, epochs = IPv6Network(f"{tunnel.pool[0]}/64"), {"newer": 2, "older": 1}
    (reject,) = tun6.pool_plan(IPv6Network(f"{tunnel.pool[0]}/{length}"), 1 << 22)  # the largest process id, proc(5)
    with changed(lab, "server", f"-6 {reject.do}"), ExitStack() as undo:
        for device in devices:
            lab.ip("server", f"tuntap add {device} mode tun")
            undo.callback(lab.ip, "server", f"link del {device}")
            for step in tun6.server_plan(device, 1500, prefix, tun6.Lease(prefix, epochs[device]).metric):
                lab.ip("server", f"-6 {step.do}")
        assert way() == "newer"
        lab.ip("server", "link set newer down")
        assert way() == "older"
        lab.ip("server", "link set older down")
        assert way() == "rejected"


@pytest.mark.waits
def test_a_client_says_the_last_epoch_that_it_was_told_to_each_server(lab: Lab, tunnel: Tunnel) -> None:
    with ServerByHand(lab, tunnel) as server:
        tunnel.client()
        told: list[tuple[dict[str, object], object]] = [({"Epoch": 7}, None), ({}, 7), ({"Epoch": "x"}, 7), ({"Epoch": 5}, 7), ({}, 5)]
        for answer, said in told:  # one in no cluster answers none; whoever answers a smaller one knows it better
            with server.accept([], **answer):
                assert server.hello.get("Epoch") == said


@pytest.mark.waits
def test_an_address_in_no_lan_of_the_client_is_unreachable_and_does_not_loop(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    expect_answer(lab, tunnel.client().prefix()[0xDEAD], "Destination unreachable")


@pytest.mark.waits
def test_a_client_without_default_route_leaves_the_way_to_the_internet_alone(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    prefix = tunnel.client(default_route="no").prefix()
    with pytest.raises(tun6.KernelError, match="unreachable"):
        way_to_internet(lab)
    lab.ip("client", f"-6 route add {Lab.INTERNET} dev tun6")
    ping(lab, "internet", str(prefix[1]))


@pytest.mark.waits
def test_an_existing_default_route_is_in_effect_again_when_the_client_has_gone(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    with changed(lab, "client", "-6 route add default dev eth1 metric 1024"):
        client = tunnel.client()
        client.prefix()
        assert way_to_internet(lab) == "tun6"
        client.stop()
        assert way_to_internet(lab) == "eth1"


@pytest.mark.waits
def test_a_start_that_fails_says_why_and_leaves_the_others_alone(lab: Lab, tunnel: Tunnel, server: Program, tmp_path: Path) -> None:
    tunnel.client().prefix()
    peer = tunnel.peer("by-hand").connected()
    files = [tmp_path / name for name in ("assignments.json", "keys.json", "corrupt.json")]
    files[1].write_text("{}")
    files[2].write_text('{"a": "2001:db8:1::/64", "b": "2001:db8:1:1')
    before = [untouched(file) for file in files]
    keygen = "`tun6.py keygen` makes"
    other_pool = {"assignments": "other.json", "prefixrange": "2001:db8:fffe::/56"}
    other_port = {"listenport": tunnel.port + 5000}
    keyed = {"keys": "keys.json", **other_port}
    starts: list[tuple[str, int, Mapping[str, object], str]] = [
        ("server", 1, other_pool, f"can't listen on 0.0.0.0 port {tunnel.port}: Address already in use"),
        ("server", 2, other_port, f"{files[0]} is in use by another tun6 server.*"),
        ("server", 2, {"assignments": "corrupt.json", **other_port}, f"{files[2]} is not a file of assignments.*"),
        ("server", 2, keyed, rf".*\[server\] has keys but no cert, and keys go only through TLS; {keygen} a certificate"),
        ("server", 2, {"cert": "missing.pem", **keyed}, f".*missing.pem: No such file or directory; {keygen} one"),
        ("server", 2, {"cert": "keys.json", **keyed}, f".*keys.json is not a certificate with its key: .*; {keygen} one"),
        ("client", 1, {}, "TUN device tun6 can't be made: Device or resource busy.*"),
        ("client", 1, {"tun": "eth1"}, "TUN device eth1 can't be made: .*"),
    ]
    for role, status, options, sentence in starts:
        assert re.fullmatch(sentence, tunnel.failure_at_start(role, status, **options))
        assert [untouched(file) for file in files] == before
        assert server_routes(lab, "unreachable") == {str(tunnel.pool)}
        peer.echo()
        ping(lab, "client", count=1)
    tunnel.visit("newcomer")


@pytest.mark.waits
def test_without_ipv6_in_the_kernel_nothing_starts(lab: Lab, tunnel: Tunnel) -> None:
    with sysctl(lab, "second", "net.ipv6.conf.default.disable_ipv6", "1"):
        for role in ("server", "client"):
            assert tunnel.failure_at_start(role, 1, "second").startswith("IPv6 is off in this kernel")


@pytest.mark.waits
@pytest.mark.parametrize(
    ("host", "options", "warning"),
    [
        ("second", {}, "IPv6 forwarding is off.*sysctl -w net.ipv6.conf.all.forwarding=1.*/etc/sysctl.d/.*accept_ra=2"),
        ("server", {"assignments": None}, "no `assignments` file in .*forgotten"),
        ("server", {"prefixrange": "2001:db8:ffff::/48"}, "2001:db8:ffff::1 of eth1 is in prefixrange 2001:db8:ffff::/48"),
    ],
    ids=["no forwarding", "no file", "own address in the pool"],
)
def test_a_server_that_starts_warns_once(tunnel: Tunnel, host: str, options: dict[str, object], warning: str) -> None:
    server = tunnel.server(host, **options)
    server.wait_for(f"WARNING {warning}")
    server.said("WARNING (?!open: whoever reaches port|this machine has no IPv6 (?:address that is routed|default route))", 1)


BARE_HELLO: dict[str, object] = {"Id": "cut } { anyhow"}
OFFLOAD_HELLO: dict[str, object] = {"Offload": ["tso6"], "Id": 'a "quoted" one'}


@pytest.mark.waits
@FEW_EXAMPLES
@example(hello=BARE_HELLO, cuts=set(range(1, 40)))  # each byte of the hello in a segment of its own
@example(hello=BARE_HELLO, cuts=set())  # the packets in the same segment as the hello
@given(hello=st.sampled_from([BARE_HELLO, OFFLOAD_HELLO]), cuts=st.sets(st.integers(1, 800), max_size=6))
def test_however_hello_and_packets_are_cut_all_arrives(tunnel: Tunnel, server: Program, hello: dict[str, object], cuts: set[int]) -> None:
    prefix = tunnel.visit(str(hello["Id"]))
    with tunnel.connect() as peer:
        peer._header = bytes(10) if "Offload" in hello else b""
        stream = json.dumps(hello).encode() + b"".join(peer._header + echo_request(prefix[1], number) for number in range(50, 60))
        send_segments(peer.sock, parts_of(stream, cuts))
        assert peer.connected().prefix == prefix
        for number in range(50, 60):
            peer.expect_reply(number)
        peer.echo()


@pytest.mark.waits
def test_garbage_instead_of_a_hello_is_refused_and_the_server_lives(tunnel: Tunnel, server: Program) -> None:
    for garbage in (
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(100),
        b"\x16\x03\x01",
        b"[]",
        b'{"Id": 7}',
        b'{"Id": ""}',
        b"{}",
        b"{" * 5000,
        b'{"Id": "\xff"}',
        b'{"Id": "x", "Offload": 1}',
    ):
        peer = tunnel.connect()
        peer.sock.sendall(garbage)
        assert (peer.answer()["Error"], peer.ended()) == ("bad-hello", "closed"), garbage
        tunnel.visit("by-hand")


@pytest.mark.waits
def test_a_refused_peer_that_goes_on_sending_is_cut_off(tunnel: Tunnel, server: Program) -> None:
    peer = tunnel.connect()
    peer.sock.sendall(b"{}")
    with pytest.raises(ConnectionError):
        for _ in range(100_000):  # 6 GB; the server reads for a second
            peer.sock.sendall(bytes(1 << 16))


@pytest.mark.waits
def test_a_peer_without_whole_hello_is_dropped_after_ten_seconds_and_disturbs_nobody(tunnel: Tunnel, site: Site) -> None:
    server = site.serve(keys=None)
    others = [tunnel.peer("plain").connected(), site.peer("inside TLS").connected()]
    waiting = silent, slow, half, whole = [tunnel.connect().sock for _ in range(4)]
    began = time.monotonic()
    half.sendall(tls_client_hello()[:100])
    whole.sendall(tls_client_hello())
    assert whole.recv(1 << 16)[0] == 0x16  # and now it would be its turn
    while waiting and time.monotonic() < began + 30:  # the silent one waits in the kernel first
        for sock in select.select(waiting, [], [], 1)[0]:
            said = b""
            with suppress(ConnectionResetError):  # the slow one has just sent something that nobody read
                said = sock.recv(1 << 16)
            assert not said or sock is whole  # the rest of what the server says in the handshake
            if not said:
                assert 9 < time.monotonic() - began < (30 if sock is silent else 13)
                waiting.remove(sock)
        for other in others:
            other.echo()
        if slow in waiting:
            slow.send(b"{" if time.monotonic() < began + 2 else b" ")
    assert not waiting
    server.said("left during the handshake: no answer within 10 s", 4)


@pytest.mark.waits
def test_a_newcomer_with_the_id_of_a_live_session_takes_over(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    first, other = tunnel.peer("same").connected(), tunnel.peer("other").connected()
    first.echo()
    second = tunnel.peer("same", host="second").connected()
    assert second.prefix == first.prefix
    assert first.ended() == "closed"
    second.echo()
    other.echo()
    assert server_routes(lab) == {str(first.prefix), str(other.prefix)}
    assert len(server_devices(lab)) == 2
    server.wait_for("'same' from .*: gone, a newcomer from")


@pytest.mark.waits
@pytest.mark.parametrize("number", [10, 100])
def test_of_many_hellos_with_one_id_at_once_one_session_is_left(lab: Lab, tunnel: Tunnel, server: Program, number: int) -> None:
    began = time.monotonic()
    peers = [tunnel.peer("same") for _ in range(number)]

    def one_is_left() -> bool:
        for peer in [peer for peer in peers if select.select([peer.sock], [], [], 0)[0]]:
            try:
                peer._more()
            except (EOFError, OSError):
                peers.remove(peer)
        return len(peers) == 1 and b"Prefix" in peers[0]._buffer

    wait_until("all but one are closed", one_is_left, 12)
    assert time.monotonic() - began < 10
    peers[0].connected().echo()
    assert len(server_devices(lab)) == len(server_routes(lab)) == 1
    assert len(re.findall("take it from each other", server.log())) <= 1


@pytest.mark.waits
def test_two_clients_that_take_one_id_from_each_other_are_slowed_and_the_log_says_it_once(
    tunnel: Tunnel, server: Program, tmp_path: Path
) -> None:
    other = tunnel.peer("other").connected()
    tunnel.peer("twin").connected()
    took = []
    for number in range(6):
        began = time.monotonic()
        peer = tunnel.peer("twin", host=("second", "client")[number % 2])
        peer.sock.settimeout(8)
        peer.connected().echo()
        took.append(time.monotonic() - began)
        other.echo()
    assert max(took[: tun6.CONTENTION_TAKEOVERS]) < 2, took
    assert all(4.5 < slow < 7 for slow in took[tun6.CONTENTION_TAKEOVERS :]), took
    server.said("WARNING 'twin': clients at .* and .* take it from each other", 1)
    found = Patient(tunnel.lab, tmp_path, server.config).findings()
    assert found["server"] == ["warn several clients have the Id 'twin', and take it from each other; give each an `id` of its own"]


@pytest.mark.waits
def test_a_lone_client_that_comes_back_again_and_again_is_not_slowed(tunnel: Tunnel, server: Program) -> None:
    for number in range(12):
        began = time.monotonic()
        with tunnel.peer("lone") as peer:
            peer.connected().echo()
            if number % 2:
                peer.reset()
        assert time.monotonic() - began < 2
    assert "take it from each other" not in server.log()


@pytest.mark.waits
def test_a_client_started_before_the_server_connects_when_it_comes(lab: Lab, tunnel: Tunnel) -> None:
    client = tunnel.client()
    client.wait_for("DEBUG no connection")  # the second attempt
    tunnel.server()
    client.prefix()
    assert way_to_internet(lab) == "tun6"
    ping(lab, "client")
    assert len(re.findall("WARNING no", client.log())) == 1


@pytest.mark.waits
def test_a_server_killed_and_started_again_gives_the_same_prefix_and_what_waited_is_delivered(lab: Lab, tunnel: Tunnel) -> None:
    server = tunnel.server()
    client = tunnel.client()
    prefix = client.prefix()
    tun = tun_of(lab)
    server.kill()
    client.wait_for("WARNING no connection")
    wait_until_no_sessions(lab)
    assert server_routes(lab, "unreachable") == {str(tunnel.pool)}  # stale, and no obstacle
    assert tun_of(lab) == tun  # device, address and route stay
    assert way_to_internet(lab) == "tun6"
    with Echo(lab) as echo:
        for number in range(100):
            echo.send(number)
        client.wait_for("DEBUG no connection", 2)
        tunnel.server()
        assert client.prefix(times=2) == prefix
        echo.expect_replies(set(range(100)))
    assert tun_of(lab) == tun
    assert len(re.findall("WARNING no", client.log())) == 1  # once, and not every two seconds


@pytest.mark.waits
def test_prefixes_outlive_the_server_whatever_order_the_clients_come_back_in(tunnel: Tunnel, server: Program) -> None:
    def prefixes(*ids: str) -> dict[str, IPv6Network]:
        return {id_: tunnel.peer(id_).connected().prefix for id_ in ids}

    before = prefixes("a", "b", "c")
    peer = tunnel.peer("a").connected()
    peer.echo()
    wait_until("no more comes", lambda: not select.select([peer.sock], [], [], 0.2)[0] or not peer.sock.recv(65_536))
    server.stop()
    assert peer.ended() == "closed"  # by the server, whose kernel then keeps the port for a while: TIME_WAIT
    server = tunnel.server()
    assert prefixes("c", "a", "b") == before
    server.kill()
    tunnel.server()
    assert prefixes("new", "b", "c", "a").items() > before.items()


@pytest.mark.waits
def test_the_address_follows_when_the_server_gives_another_prefix(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    old = client.prefix()
    assert addresses(lab) == [f"{old[1]}/128"]
    server.stop()
    tunnel.pool = tunnel.new_pool()
    tunnel.server(assignments=None)
    new = client.prefix(times=2)
    assert new != old
    assert addresses(lab) == [f"{new[1]}/128"]
    ping(lab, "client")


@pytest.mark.waits
def test_a_server_removes_the_route_that_a_killed_one_left_and_not_that_of_one_that_lives(lab: Lab, tunnel: Tunnel) -> None:
    living, left, older = tunnel.new_pool(), tunnel.new_pool(), tunnel.new_pool()
    tunnel.server(prefixrange=living, assignments=None, listenport=tunnel.port + 5000)
    killed = tunnel.server(prefixrange=left, assignments=None)
    killed.kill()
    lab.ip("server", f"-6 route add unreachable {older} metric {0x7400_0000 + killed.process.pid} proto 116")  # of an older tun6
    assert server_routes(lab, "unreachable") == {str(living), str(left), str(older)}
    tunnel.server()
    assert server_routes(lab, "unreachable") == {str(living), str(tunnel.pool)}


@pytest.mark.waits
def test_a_client_started_after_a_killed_one_has_its_prefix_and_removes_its_route(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    def unreachable() -> set[tuple[str, int]]:
        found = json.loads(lab.ip("client", f"-6 -j route show type unreachable proto {tun6.ROUTE_PROTOCOL}"))
        return {(route["dst"], route["metric"] - tun6.REJECT_BASE) for route in found}

    clients = [tunnel.client()]
    prefix = clients[0].prefix()
    assert unreachable() == {(str(prefix), clients[0].process.pid)}
    clients[0].kill()
    wait_until("the kernel removes the TUN", lambda: not tun_of(lab))
    wait_until_no_sessions(lab)
    assert unreachable() == {(str(prefix), clients[0].process.pid)}
    clients.append(tunnel.client())
    assert clients[1].prefix() == prefix
    ping(lab, "client")
    clients[1].kill()
    assert unreachable() == {(str(prefix), clients[1].process.pid)}
    server.stop()
    client = tunnel.client()
    client.wait_for("WARNING no connection")  # it does not take a server to clear it
    assert unreachable() == set()


@pytest.mark.waits
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (Peer.close, "(the peer closed the connection|Connection reset by peer)"),  # reset when frames wait that it has not read
        (Peer.half_close, "the peer closed the connection"),
        (Peer.reset, "Connection reset by peer"),
        (GARBAGE, "frame that begins with 0x45 is no IPv6 packet"),
        (packet(next_header=HOP_BY_HOP) + bytes(100), "frame is a jumbogram"),
    ],
    ids=["close", "half-close", "reset", "garbage", "jumbogram"],
)
def test_whatever_a_peer_does_ends_its_own_session_alone(lab: Lab, tunnel: Tunnel, server: Program, end: Step, reason: str) -> None:
    other, peer = tunnel.peer("by-stander").connected(), tunnel.peer("culprit").connected()
    peer.echo()
    assert len(server_devices(lab)) == 2
    peer.do(end)
    server.wait_for(f"'culprit' from .*: gone, {reason}; after . s, [1-9][0-9]* bytes received, [1-9][0-9]* sent, 0 packets dropped")
    wait_until("its TUN and route go", lambda: len(server_devices(lab)) == 1 and server_routes(lab) == {str(other.prefix)})
    other.echo()
    if peer.sock.fileno() >= 0:
        assert peer.ended() in ("closed", "reset")
    tunnel.visit("culprit")  # may come back


@pytest.mark.waits
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_told_to_stop_undoes_everything_in_two_seconds(lab: Lab, tunnel: Tunnel, server: Program, number: int) -> None:
    client = tunnel.client()
    client.prefix()
    peers = tunnel.crowd(20)
    tunnel.connect()  # has said nothing yet
    peers[0].echo()
    assert len(server_devices(lab)) == 21
    assert server.stop(number) < SERVER_ENDS_S
    assert all(peer.ended() in ("closed", "reset") for peer in peers)
    assert server.log().count(": gone, the server stops;") == 21
    client.wait_for("WARNING no connection .*: (the peer closed the connection|Connection reset by peer)")


@pytest.mark.waits
@pytest.mark.parametrize("devices", [0, 1, 20])
def test_a_server_told_to_stop_while_clients_connect_stops_in_time(lab: Lab, tunnel: Tunnel, server: Program, devices: int) -> None:
    for number in range(40):
        tunnel.peer(f"client {number % 30}")  # some take over
    wait_until("some have been served", lambda: len(server_devices(lab)) >= devices)
    assert server.stop() < SERVER_ENDS_S


@pytest.mark.waits
@pytest.mark.parametrize("said", [b'{"Id": "half', b'{"Id": "caf\xc3', b"\x16\x03\x01"], ids=["hello", "character", "TLS"])
def test_a_server_told_to_stop_in_the_midst_of_a_hello_ends_in_time(tunnel: Tunnel, site: Site, said: bytes) -> None:
    server = site.serve(keys=None)
    before = pending(server)
    peer = tunnel.connect()
    peer.sock.sendall(said)
    wait_until("the server listens to it", lambda: pending(server) > before)
    assert server.stop() < SERVER_ENDS_S
    assert peer.ended() in ("closed", "reset")


@pytest.mark.waits
def test_a_server_stops_in_time_while_a_client_does_not_read(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    not_reading, other = tunnel.crowd(2)
    (device,) = [route["dev"] for route in json.loads(lab.ip("server", f"-6 -j route show {not_reading.prefix}"))]

    def drops() -> int:
        return int(json.loads(lab.ip("server", f"-s -j link show {device}"))[0]["stats64"]["tx"]["dropped"])

    with udp_flood(lab, [not_reading.prefix], rate=20_000):
        wait_until("the connection and the TUN's queue are full", drops)
        other.echo()
        assert server.stop() < SERVER_ENDS_S


@pytest.mark.waits
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["it has its TUN", "connected", "outage"])
def test_a_client_told_to_stop_undoes_everything_in_two_seconds(lab: Lab, tunnel: Tunnel, number: int, when: str) -> None:
    if when != "outage":
        tunnel.server()
    client = tunnel.client()
    if when == "it has its TUN":
        wait_until("there is a TUN", lambda: tun_of(lab))
    else:
        client.wait_for(r": has \S+ on" if when == "connected" else "no connection")
    assert client.stop(number) < SERVER_ENDS_S
    wait_until_no_sessions(lab)


@pytest.mark.waits
@pytest.mark.parametrize("said", [b"", b'{"Prefix": "2001:db8'])
def test_a_client_told_to_stop_in_the_midst_of_the_answer_ends_in_time(lab: Lab, tunnel: Tunnel, said: bytes) -> None:
    with ServerByHand(lab, tunnel) as server:
        client = tunnel.client(id="client")
        sock, _ = server.sock.accept()
        with sock:
            sock.settimeout(10)
            assert b"client" in sock.recv(4096)
            sock.sendall(said)
            assert client.stop() < SERVER_ENDS_S


@contextmanager
def bulk(lab: Lab, source: str, sink: str, address: str) -> Iterator[list[int]]:
    """Moves what it can over one TCP connection until the end or an error; gives the bytes that arrived."""
    arrived = [0]
    with tcp_between(lab, source, sink, address) as (sender, receiver), ThreadPoolExecutor() as threads:

        def send() -> None:
            with suppress(OSError):
                while True:
                    sender.sendall(bytes(1 << 20))

        def receive() -> None:
            with suppress(OSError):
                while data := receiver.recv(1 << 20):
                    arrived[0] += len(data)

        threads.submit(send)
        threads.submit(receive)
        try:
            yield arrived
        finally:
            for sock in (sender, receiver):
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.waits
@pytest.mark.parametrize("role", ["server", "client"])
def test_told_to_stop_while_bulk_moves_both_ways_it_stops_in_time(lab: Lab, tunnel: Tunnel, role: str) -> None:
    programs = {"server": tunnel.server(), "client": tunnel.client()}
    address = str(programs["client"].prefix()[1])
    with bulk(lab, "client", "internet", Lab.INTERNET) as up, bulk(lab, "internet", "client", address) as down:
        wait_until("much has moved both ways", lambda: min(up[0], down[0]) > 20 << 20)
        assert programs[role].stop() < SERVER_ENDS_S


@pytest.mark.waits
@pytest.mark.parametrize(
    "routes",
    [
        ["route del default", "route add default via 10.8.0.1 table 100", "rule add table 100 priority 100"],
        ["route replace default dev eth0"],
        ["route replace default nexthop via 10.8.0.1 dev eth0 nexthop via 10.8.0.1 dev eth0 weight 2"],
    ],
    ids=["another table", "no gateway", "multipath"],
)
def test_the_default_id_is_the_mac_of_the_interface_with_whatever_default_route(lab: Lab, routes: list[str]) -> None:
    mac = json.loads(lab.ip("client", "-j link show eth0"))[0]["address"]
    try:
        for route in routes:
            lab.ip("client", route)
        with lab.inside("client"):
            assert tun6.default_id() == mac
            assert tun6.public_address(tun6.ServerConfig("0.0.0.0", 1, POOL)) == "10.8.0.2"
    finally:
        with suppress(tun6.KernelError):
            lab.ip("client", "rule del table 100 priority 100")
            lab.ip("client", "route flush table 100")
        lab.ip("client", "route replace default via 10.8.0.1 dev eth0")


@pytest.mark.waits
def test_a_client_and_its_operator_may_spell_its_mac_address_differently(tunnel: Tunnel, server: Program) -> None:
    prefix = tunnel.visit(SPELLINGS[3])
    assert tunnel.visit(MAC) == prefix
    pinned = next(itertools.islice(tunnel.pool.subnets(new_prefix=64), 9, None))
    done = run_tun6("clients", "pin", SPELLINGS[4], str(pinned), "-c", str(server.config))
    assert (done.returncode, done.stderr) == (0, "")
    assert tunnel.visit(SPELLINGS[1]) == pinned


@pytest.mark.waits
def test_a_mac_address_that_may_change_is_warned_of_and_so_is_one_that_did(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()  # veth devices have random addresses
    client.prefix()
    client.said("WARNING the Id is the MAC address of eth0, which its hardware does not have", 1)
    client.stop()
    config = client.config
    last = Path(f"{config}.last-id")
    assert last.read_text() == json.loads(lab.ip("client", "-j link show eth0"))[0]["address"] + "\n"
    last.write_text("00:11:22:33:44:55\n")
    again = lab.popen("client", sys.executable, TUN6, "client", "-c", str(config), stderr=subprocess.PIPE)
    try:
        lines = list(itertools.islice(cast(Any, again.stderr), 3))
        assert any("was 00:11:22:33:44:55 at the last start" in line for line in lines), lines
    finally:
        again.terminate()
        again.communicate()
    assert last.read_text() != "00:11:22:33:44:55\n"


@pytest.mark.waits
def test_an_id_that_is_set_is_not_warned_of(tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(id="set", firewall="no")
    client.prefix()
    assert "WARNING" not in client.log()
    assert not Path(f"{client.config}.last-id").exists()


@contextmanager
def native_ipv6(lab: Lab) -> Iterator[str]:
    """The client's host has IPv6 from its provider, too, by way of the NAT's host; gives its address there."""
    lab.ip("internet", f"link add eth1 type veth peer name eth2 netns {lab._names['client']}")
    try:
        for host, device, address in (("internet", "eth1", "2001:db8:aaaa::1/64"), ("client", "eth2", "2001:db8:aaaa::5/64")):
            lab.ip(host, f"link set {device} up")
            lab.ip(host, f"addr add {address} dev {device} nodad")
        lab.ip("client", "-6 route add default via 2001:db8:aaaa::1 metric 1")
        wait_until("the native address works", lambda: lab.pings("client"))
        yield "2001:db8:aaaa::5"
    finally:
        lab.ip("internet", "link del eth1")


def talks(lab: Lab, source: str, address: str = Lab.INTERNET) -> bool:
    """Whether the client's host gets answers at this address of its own."""
    return lab.run("client", "ping", "-6", "-c", "1", "-W", "0.5", "-I", source, address).returncode == 0


@pytest.mark.waits
@pytest.mark.parametrize("default_route", ["yes", "no"])
def test_native_ipv6_and_the_tunnel_work_beside_each_other(lab: Lab, tunnel: Tunnel, server: Program, default_route: str) -> None:
    with native_ipv6(lab) as native:
        with lab.inside("internet"):
            listener = socket.create_server((Lab.INTERNET, 0), family=socket.AF_INET6)
        with lab.inside("client"):
            before = socket.create_connection(listener.getsockname()[:2])
        far, _ = listener.accept()
        with listener, before, far:
            client = tunnel.client(default_route=default_route)
            own = str(client.prefix()[1])
            wait_until("the tunnel works", lambda: talks(lab, own))
            assert talks(lab, native)
            before.sendall(b"x")
            assert far.recv(1) == b"x", "a connection that was there before is cut"
            for address in (own, native):  # from the Internet
                wait_until(f"{address} answers", functools.partial(lab.pings, "internet", address))
            assert json.loads(lab.ip("client", f"-6 -j route get {Lab.INTERNET} from {own}"))[0]["dev"] == "tun6"
            first = json.loads(lab.ip("client", f"-6 -j route get {Lab.INTERNET}"))[0]
            assert first["dev"] == ("tun6" if default_route == "yes" else "eth2")
            client.stop()
        assert talks(lab, native)


@pytest.mark.waits
def test_a_unique_local_address_that_has_a_way_of_its_own_keeps_it(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    with native_ipv6(lab), changed(lab, "internet", "addr add fd00:9::1/64 dev eth1 nodad"):  # as of a VPN
        lab.ip("client", "addr add fd00:9::5/64 dev eth2 nodad")
        wait_until("the local address works", lambda: talks(lab, "fd00:9::5"))
        client = tunnel.client()
        own = str(client.prefix()[1])
        wait_until("the tunnel works", lambda: talks(lab, own))
        wait_until("the local address still works", lambda: talks(lab, "fd00:9::5"), 5)


@pytest.mark.waits
def test_a_second_client_of_one_machine_leaves_the_first_ones_rules_alone(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    def rules() -> str:
        return lab.ip("client", "-6 rule show")

    first = tunnel.client(id="first")
    first.prefix()
    before = rules()
    second = tunnel.client(id="second", tun="tun7")
    own = str(second.prefix()[1])
    wait_until("the second tunnel works", lambda: talks(lab, own))
    second.stop()
    assert "failed" not in second.log()
    assert rules() == before
    ping(lab, "client")


@pytest.mark.waits
def test_ipv4_that_comes_inside_ipv6_lives_and_carries_the_tunnel(lab: Lab, tunnel: Tunnel) -> None:
    tunnel.server()
    with native_ipv6(lab):
        lab.ip("server", "addr add 2001:db8:bbbb::1/128 dev lo")
        lab.ip("server", "-6 route add 2001:db8:aaaa::/64 via 2001:db8:ffff::2")
        lab.set_sysctl("internet", "net.ipv6.conf.all.forwarding", "1")
        for host, local, remote in (("client", "2001:db8:aaaa::5", "2001:db8:bbbb::1"), ("server", "2001:db8:bbbb::1", "2001:db8:aaaa::5")):
            lab.ip(host, f"link add v4in6 type vxlan id 1 local {local} remote {remote} dstport 4789")
        try:
            for host, address in (("client", "192.0.0.2"), ("server", "192.0.0.1")):
                lab.ip(host, "link set v4in6 up")
                lab.ip(host, f"addr add {address}/29 dev v4in6")
            client = tunnel.client(remotehost="192.0.0.1")
            prefix = client.prefix()
            wait_until("the tunnel works", lambda: talks(lab, str(prefix[1])))
            ping(lab, "client")
            assert lab.run("client", "ping", "-c", "1", "-W", "1", "192.0.0.1").returncode == 0
            client.stop()
        finally:
            for host in ("client", "server"):
                lab.ip(host, "link del v4in6")
            lab.ip("server", "addr del 2001:db8:bbbb::1/128 dev lo")
            lab.ip("server", "-6 route del 2001:db8:aaaa::/64")
            lab.set_sysctl("internet", "net.ipv6.conf.all.forwarding", "0")


def connect_time(lab: Lab, host: str, source: str = "") -> float:
    """Seconds until a new connection to the Internet fails."""
    with lab.inside(host):
        sock = socket.socket(socket.AF_INET6)
    began = time.monotonic()
    with sock, pytest.raises(OSError, match=r"unreachable|No route|Cannot assign"):
        sock.settimeout(20)
        if source:
            sock.bind((source, 0))
        sock.connect((Lab.INTERNET, 9))
    return time.monotonic() - began


@pytest.mark.waits
def test_without_a_tunnel_new_connections_fail_at_once_and_nothing_old_arrives_later(lab: Lab, tunnel: Tunnel) -> None:
    client = tunnel.client(grace=1)
    client.wait_for("no connection")
    assert connect_time(lab, "client") < 1  # before the first connection
    server = tunnel.server()
    prefix = client.prefix()
    with lan_behind(lab, prefix) as lan:
        ping(lab, "lan")
        with socket_on(lab, "internet") as arrived, socket_on(lab, "client") as sender:
            arrived.bind((Lab.INTERNET, 5005))
            arrived.settimeout(5)
            server.kill()
            client.wait_for("no connection", 2)
            sender.sendto(b"old", (Lab.INTERNET, 5005))
            client.wait_for("WARNING no tunnel for 1 s: IPv6 traffic is rejected until it is back")
            for host, source in (("client", ""), ("client", str(prefix[1])), ("lan", lan)):
                took = connect_time(lab, host, source)
                assert took < 3, f"{host} waited {took:.1f} s"
            tunnel.server()
            client.prefix(2)
            wait_until("it works again", lambda: lab.pings("lan"))
            sender.sendto(b"new", (Lab.INTERNET, 5005))
            assert arrived.recv(16) == b"new"


@pytest.mark.waits
def test_an_outage_within_the_grace_is_a_pause_that_loses_nothing(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(id="c")
    client.prefix()
    with socket_on(lab, "internet") as arrived, socket_on(lab, "client") as sender:
        arrived.bind((Lab.INTERNET, 5006))
        arrived.settimeout(10)
        server.kill()
        client.wait_for("no connection")
        sender.sendto(b"waits", (Lab.INTERNET, 5006))
        tunnel.server()
        assert arrived.recv(16) == b"waits"


@pytest.mark.waits
def test_with_grace_off_packets_wait_for_ever(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(grace="off")
    client.prefix()
    server.kill()
    client.wait_for("no connection")
    assert json.loads(lab.ip("client", f"-6 -j route get {Lab.INTERNET}"))[0]["dev"] == "tun6"
    tunnel.server()


@pytest.mark.waits
def test_rules_and_routes_of_a_killed_client_are_removed_at_the_next_start(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    def rules() -> int:
        return lab.ip("client", "-6 rule show").count("proto 116")

    client = tunnel.client()
    client.prefix()
    assert rules() == 5
    client.kill()
    assert rules() == 5
    again = tunnel.client(default_route="no")
    again.prefix()
    assert rules() == 2
    again.stop()
    assert (rules(), lab.ip("client", "-6 route show table all proto 116")) == (0, "")


@pytest.mark.waits
def test_serving_says_how_many_assignments_there_are(tunnel: Tunnel, server: Program) -> None:
    server.wait_for(r" serving .*, with 0 assignments")
    tunnel.visit("a")
    server.stop()
    tunnel.server().wait_for(r" serving .*, with 1 assignments")


# ---- end to end: several servers -------------------------------------------------------------------------------------


class Pair:
    """Two servers on the server's host, each on its own port, where the same clients have the same prefixes."""

    def __init__(self, tunnel: Tunnel, number: int = 2) -> None:
        self._tunnel = tunnel
        self.known = {"c": f"{tunnel.pool[0]}/64", "d": f"{tunnel.pool[1 << 64]}/64"}
        self.ports = [tunnel.port, *(10_000 + next(Tunnel._numbers) for _ in range(number - 1))]
        self.list = ", ".join(f"{Lab.SERVER}:{port}" for port in self.ports)
        self.servers: list[Program] = [self.start(at) for at in range(number)]

    def start(self, at: int, **settings: object) -> Program:
        """Starts the server at this place of the list, with the assignments of all."""
        (self._tunnel._folder / f"assignments-{at}.json").write_text(json.dumps(self.known))
        usual: dict[str, object] = {"listenport": self.ports[at], "assignments": f"assignments-{at}.json", "tun": f"tun6-{at}-%d"}
        return self._tunnel.server("server", **{**usual, **settings})

    def client(self, host: str = "client", **settings: object) -> Program:
        return self._tunnel.client(host, **{"remotehost": self.list, "id": "c", **settings})

    def serving(self, client: Program, times: int = 1, seconds: float = 10) -> int:
        """The place of the server that the client has when it has connected so many times."""
        return self.ports.index(int(client.wait_for(r" at \S+ port (\d+): has ", times, seconds)[-1]))

    def names(self, *at: int) -> str:
        """How the client's log names these, as a pattern."""
        return "; ".join(f"{Lab.SERVER} port {self.ports[each]}: [^;]*" for each in at)


@pytest.fixture
def pair(tunnel: Tunnel) -> Pair:
    return Pair(tunnel)


@contextmanager
def steady_stream(lab: Lab, source: str, sink: str, address: str) -> Iterator[list[float]]:
    """A TCP connection that carries a block each 20 ms, all of which arrive; gives the times when some did."""
    block = os.urandom(1000)
    arrivals: list[float] = []
    with tcp_between(lab, source, sink, address) as (sender, receiver), ThreadPoolExecutor() as threads:

        def receive() -> bytes:
            data = b""
            while more := receiver.recv(1 << 16):
                data += more
                arrivals.append(time.monotonic())
            return data

        sent: list[None] = []
        received = threads.submit(receive)
        with repeated(lambda: sent.append(sender.sendall(block)), 0.02):  # type: ignore[func-returns-value]
            wait_until("it flows", lambda: len(arrivals) > 20)
            yield arrivals
            until = len(arrivals)
            wait_until("it flows on", lambda: len(arrivals) > until + 20)
        sender.shutdown(socket.SHUT_WR)
        assert received.result(20) == block * len(sent), "the stream did not arrive as it was sent"


def longest_stall(arrivals: list[float]) -> float:
    return max(late - early for early, late in zip(arrivals, arrivals[1:]))


@pytest.mark.waits
@pytest.mark.parametrize("way", ["up", "down"])
def test_when_its_server_is_killed_a_client_goes_on_at_the_next_one_at_once_and_tcp_with_it(lab: Lab, pair: Pair, way: str) -> None:
    client = pair.client()
    first = pair.serving(client)
    own = str(client.prefix()[1])
    ends = ("client", "internet", Lab.INTERNET) if way == "up" else ("internet", "client", own)
    with steady_stream(lab, *ends) as arrivals:
        pair.servers[first].kill()
        assert pair.serving(client, 2) == 1 - first
    assert longest_stall(arrivals) < 3  # mostly 0.3; an attempt of its own would come after 1 to 3 s
    assert addresses(lab) == [f"{own}/128"]
    client.said(f"WARNING no connection to {pair.names(first)}; trying {Lab.SERVER} port {pair.ports[1 - first]} now", 1)
    assert len(re.findall("WARNING no connection", client.log())) == 1
    assert "trying again" not in client.log()
    pair.start(first)  # which clears up after the killed one
    assert asked(client.config, "status")["server"] == f"{Lab.SERVER} port {pair.ports[1 - first]}"


@pytest.mark.waits
def test_when_no_server_serves_the_log_says_it_once_and_the_first_that_is_back_is_taken(pair: Pair) -> None:
    client = pair.client()
    first = pair.serving(client)
    for server in (1 - first, first):  # so that the other one does not get the client meanwhile
        pair.servers[server].stop()
    client.wait_for(f"DEBUG no connection to any server: {pair.names(0, 1)}; trying again every 2 s", 2)
    warnings = re.findall("WARNING no connection to (.*)", client.log())
    assert len(warnings) == 2, warnings  # the end of the session, and that there is no other server
    assert re.fullmatch(f"any server: {pair.names(0, 1)}; trying again every 2 s", warnings[1])
    pair.servers[first].start()
    assert pair.serving(client, 2) == first


@pytest.mark.waits
def test_a_server_that_does_not_answer_is_tried_last_and_holds_nobody_up_for_long(lab: Lab, tunnel: Tunnel, pair: Pair) -> None:
    client = pair.client()
    dead = pair.serving(client)
    port = pair.ports[dead]
    with black_hole(lab, port):
        with repeated(lambda: lab.pings("client"), 0.1):
            assert pair.serving(client, 2) == 1 - dead
        wait_until("the session has lasted", lambda: asked(client.config, "status")["state_seconds"] > tun6.RETRY_S)
        lab.ip("server", f"link del {next(name for name in server_devices(lab) if name.startswith(f'tun6-{1 - dead}-'))}")
        assert pair.serving(client, 3, 20) == 1 - dead
        client.said(f"WARNING no connection to {pair.names(1 - dead)}; trying {Lab.SERVER} port {port} now", 1)
        client.said(f"DEBUG no connection to {Lab.SERVER} port {port}: no answer within 3 s; trying ", 1)
        assert "trying again" not in client.log()
        starting = pair.client("second", id="d", tun="tun6-d")  # as a client that begins with the dead one
        assert pair.serving(starting) == 1 - dead
    with repeated(lambda: lab.pings("client"), 0.1):  # the dead one is not out for ever
        pair.servers[1 - dead].stop()
        assert pair.serving(client, 4) == dead


@pytest.mark.waits
def test_one_servers_refusal_for_good_does_not_keep_a_client_from_the_other(tunnel: Tunnel, site: Site, pair: Pair) -> None:
    pair.servers[0].stop()
    keyed = pair.start(0, **{**site.settings, "assignments": "assignments-0.json"})
    client = pair.client()
    assert pair.serving(client) == 1
    pair.servers[1].stop()
    client.wait_for(f"WARNING no connection to any server: {Lab.SERVER} port {pair.ports[0]}: tls-required: .*; .*; trying again every 2 s")
    pair.start(1)
    assert pair.serving(client, 2) == 1
    keyed.stop()
    pair._tunnel._programs[-1].stop()
    both = [pair.start(at, **{**site.settings, "assignments": f"assignments-{at}.json"}) for at in (0, 1)]
    client.wait_for(
        "WARNING no connection to any server: .*tls-required.*tls-required.*; the server won't .* that; trying again every 60 s"
    )
    for server in both:
        assert len(re.findall("tls-required", server.log())) <= 2


@pytest.mark.waits
def test_only_a_client_with_a_list_says_that_it_may_be_sent_to_another_server(lab: Lab, tunnel: Tunnel) -> None:
    with ServerByHand(lab, tunnel) as server:
        for remotehost, moved in ((Lab.SERVER, None), (f"{Lab.SERVER}, {Lab.SERVER}:1", True)):
            client = tunnel.client(id="c", remotehost=remotehost)
            sock, _ = server.sock.accept()
            with sock:
                sock.settimeout(10)
                assert json.loads(sock.recv(4096)).get("Moved") is moved
            client.stop()


@contextmanager
def black_hole(lab: Lab, port: int) -> Iterator[None]:
    """The server's host resets connections to this port, and answers no new one."""
    rules = f"tcp dport {port} tcp flags & (syn | ack) == syn drop; tcp dport {port} reject with tcp reset"
    done = lab.run("server", "nft", f"table ip hole {{ chain in {{ type filter hook input priority 0; {rules}; }}; }}")
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        lab.run("server", "nft", "delete table ip hole")


def drained(server: Program, *options: str) -> str:
    """What `tun6.py drain` says."""
    done = run_tun6("drain", "-c", str(server.config), *options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def status_while_draining(server: Program) -> dict[str, Any]:
    done = run_tun6("status", "-c", str(server.config), "--json")
    assert (done.returncode, done.stderr) == (1, "")
    return dict(json.loads(done.stdout))


@pytest.mark.waits
def test_a_server_that_drains_sends_its_clients_to_others_and_none_is_long_without_a_tunnel(lab: Lab, tunnel: Tunnel, pair: Pair) -> None:
    old, new = pair.servers
    new.stop()
    clients = {"c": pair.client(), "d": pair.client("second", id="d", tun="tun6-d")}
    legacy, single = tunnel.peer("legacy").connected(), tunnel.client("second", id="single", tun="tun6-s")
    for client in (*clients.values(), single):
        client.prefix()
    pair.start(1)

    def have_lasted() -> bool:
        return all(asked(client.config, "status")["state_seconds"] > tun6.RETRY_S for client in clients.values())

    wait_until("the sessions count as such", have_lasted)
    with steady_stream(lab, "client", "internet", Lab.INTERNET) as arrivals:
        said = drained(old, "--minutes", "0.03")
        assert "its 4 sessions end within 0.03 minutes" in said
        for client in clients.values():
            assert pair.serving(client, 2) == 1
        assert legacy.ended() in ("closed", "reset")
    assert longest_stall(arrivals) < 3
    for client in clients.values():
        assert "trying again" not in client.log().partition(": has ")[2]
    single.wait_for("WARNING no connection to .*: busy: this server is being drained; trying again every 2 to 30 s")
    old.wait_for("INFO drained: all sessions that there were have ended")
    old.said(
        "WARNING draining since .*: newcomers are sent to other servers, and 4 sessions end within 2 s; `tun6.py drain --stop` ends", 1
    )
    for hello, code in (
        ({}, "busy"),
        ({"Moved": True}, "moved"),
        ({"Moved": True, "Dry": True, "Offload": []}, "moved"),
        ({"Moved": 1}, "busy"),
    ):
        with tunnel.connect() as peer:
            peer.sock.sendall(json.dumps({"Id": "c", **hello}).encode())
            assert peer.answer() == {"Error": code, "Text": "this server is being drained"}
    status = status_while_draining(old)
    assert (status["state"], status["sessions"]) == ("draining", 0)
    assert status["warnings"][-1].startswith("draining since ")
    assert drained(old, "--stop") == "The server serves newcomers again.\n"
    status = status_of(old)
    assert (status["state"], [each for each in status["warnings"] if each.startswith("draining")]) == ("up", [])
    single.prefix(2, seconds=30)
    for client in clients.values():  # nobody is sent back
        assert len(re.findall(": has ", client.log())) == 2


@pytest.mark.waits
def test_a_restart_ends_a_drain_and_a_signal_begins_none(tunnel: Tunnel, pair: Pair) -> None:
    server = pair.servers[0]
    drained(server, "--minutes", "60")
    assert tunnel.refusal("c")["Error"] == "busy"
    assert server.stop() < SERVER_ENDS_S
    server.start()
    server.wait_for(" serving ", 2)
    tunnel.visit("c")
    client = pair.client()
    pair.serving(client)
    server.stop()
    assert "moved" not in client.log() and server.log().count("draining since") == 1


@pytest.mark.waits
def test_sessions_of_a_server_that_drains_end_one_by_one_and_a_second_drain_takes_its_own_time(tunnel: Tunnel, server: Program) -> None:
    peers = tunnel.crowd(4)
    drained(server, "--minutes", "60")
    wait_until("one has gone", lambda: status_while_draining(server)["sessions"] == 3)  # the next one would go after 15 minutes
    with ThreadPoolExecutor() as threads:
        ends = [threads.submit(peer.ended) for peer in peers]
        wait_until("one hears it", lambda: sum(end.done() for end in ends) == 1)
        drained(server, "--minutes", "0")
        assert {end.result(10) for end in ends} <= {"closed", "reset"}
    wait_until("all have gone", lambda: status_while_draining(server)["sessions"] == 0)
    assert sum(warning.startswith("draining") for warning in status_while_draining(server)["warnings"]) == 1


@pytest.mark.waits
def test_a_client_that_all_servers_send_away_does_not_spin_and_is_served_when_one_has_ended_that(tunnel: Tunnel, pair: Pair) -> None:
    client = pair.client()
    pair.serving(client)
    for server in pair.servers:
        drained(server, "--minutes", "0")
    client.wait_for(f"WARNING no connection to any server: {pair.names(0, 1)}; trying again every 2 to 30 s")
    client.wait_for("DEBUG no connection to any server", 2, 20)
    times = [
        int(minute) * 60 + float(second.replace(",", "."))
        for minute, second in re.findall(r":(\d\d):(\S+) \w+ no .* any server", client.log())
    ]
    assert (times[2] - times[0]) % 3600 >= 3  # pauses of 2 s and 4 s on average
    for server in pair.servers:
        assert 3 <= len(re.findall("refused, moved", server.log())) <= 5
    drained(pair.servers[0], "--stop")
    assert pair.serving(client, len(re.findall(": has ", client.log())) + 1, 40) == 0


@pytest.mark.waits
def test_drain_needs_a_server_that_runs_and_a_time_that_makes_sense(tunnel: Tunnel) -> None:
    config = str(tunnel.config("server"))
    assert only_line(run_tun6("drain", "-c", config), 1).startswith("tun6: no server listens at ")
    for minutes in ("-1", "nan", "1e9", "1441", "soon"):
        done = run_tun6("drain", "-c", config, f"--minutes={minutes}")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith("error: argument --minutes: must be a number from 0 to 1440\n")


@pytest.mark.waits
def test_two_servers_that_give_other_prefixes_are_of_use_too_and_hook_and_routes_follow(
    lab: Lab, tunnel: Tunnel, pair: Pair, tmp_path: Path
) -> None:
    prefixes = [prefix_of_pool(tunnel, 0), prefix_of_pool(tunnel, 7)]
    pair.servers[1].stop()
    pair.known["c"] = str(prefixes[1])
    servers = [pair.servers[0], pair.start(1)]
    hook = hook_file(tmp_path, 'echo "$TUN6_EVENT $TUN6_PREFIX $TUN6_PEER" >> $OUT')
    client = pair.client(hook=hook)
    expected: list[str] = []
    at = pair.serving(client)
    for times in range(2, 5):
        peer = f"{Lab.SERVER} port {pair.ports[at]}"
        expected += [f"prefix {prefixes[at]} {peer}", f"up {prefixes[at]} {peer}", f"down {prefixes[at]} {peer}"]
        assert addresses(lab) == [f"{prefixes[at][1]}/128"]
        ping(lab, "client")
        servers[at].stop()
        at = 1 - at
        assert (pair.serving(client, times), client.prefix(times)) == (at, prefixes[at])
        servers[1 - at].start()
        servers[1 - at].wait_for(" serving ", times // 2 + 1)
    wait_until("the hook ran", lambda: told(tmp_path)[: len(expected)] == expected)


@pytest.mark.waits
def test_a_token_carries_the_list_of_servers_and_certificates_and_each_lets_its_client_in(
    lab: Lab, tunnel: Tunnel, site: Site, tmp_path: Path
) -> None:
    other, ports = Site(tunnel, "other"), (tunnel.port, 10_000 + next(Tunnel._numbers))
    address = f"{Lab.SERVER}, {Lab.SERVER}:{ports[1]}"
    server = site.serve(address=address, fingerprint=other.fingerprint)
    added = site.clients("add", "c")
    token = tun6.decode_token(added["token"])
    assert (token["remotehost"], token["remoteport"]) == (address, str(ports[0]))
    assert token["fingerprint"] == added["fingerprint"] == f"{site.fingerprint}, {other.fingerprint}"
    named = run_tun6("clients", "-c", str(site.config), "add", "d", "--address", "a.example, b.example:443")
    assert "\nremotehost = a.example, b.example:443\n" in named.stdout
    assert "--address a,, b: it must be the name or the IPv4 address of a server" in site.complaint("add", "e", "--address", "a,, b")
    assert "e" not in {entry["id"] for entry in site.clients("list")}
    shutil.copy(site.keys, other.keys)  # as an operator does
    shutil.copy(site.assignments, other.assignments)
    second = other.serve(listenport=ports[1], tun="tun6-other-%d")
    client = tunnel.client(**cast(dict[str, Any], token))
    for times in (1, 2):
        serving = ports.index(int(client.wait_for(r" at \S+ port (\d+): has .*, over TLS", times)[-1]))
        (server, second)[serving].stop()
        assert client.prefix(times + 1) == IPv6Network(added["prefix"])
        (server, second)[serving].start()
        (server, second)[serving].wait_for(" serving ", 2)
    stranger = make_certificate(tmp_path / "stranger.pem")
    wrong = tunnel.client("second", **{**cast(dict[str, Any], token), "id": "d", "tun": "tun6-w", "fingerprint": stranger})
    wrong.wait_for(
        f"WARNING no connection to any server: .*another fingerprint, {site.fingerprint}; .*another fingerprint, {other.fingerprint}"
    )


# ---- end to end: hooks -----------------------------------------------------------------------------------------------


def events(folder: Path) -> list[list[str]]:
    return [line.split("|") for line in told(folder)]


@pytest.mark.waits
def test_hooks_hear_of_each_session_and_packets_do_not_wait_for_them(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    sides = {side: tmp_path / f"{side}-hook" for side in ("server", "client")}
    for folder in sides.values():
        folder.mkdir()
    values = 'echo "$TUN6_EVENT|$TUN6_ID|$TUN6_PREFIX|$TUN6_OLD_PREFIX|$TUN6_DEVICE|$TUN6_PEER|$TUN6_REASON" >> $OUT'
    at_the_end = '[ "$TUN6_REASON" != "the server stops" ] || sleep 0.5'
    slow = hook_file(
        sides["server"], at_the_end, values, f"[ $TUN6_EVENT = session-down ] || while [ -e {tmp_path}/busy ]; do sleep 0.05; done"
    )
    (tmp_path / "busy").touch()
    server = tunnel.server(hook=slow)
    client = tunnel.client(id="pi", hook=hook_file(sides["client"], values))
    prefix = str(client.prefix())
    wait_until("both hooks run", lambda: len(events(sides["server"])) == 1 and len(events(sides["client"])) == 2)
    ping(lab, "client")  # although the server's hook is still at work
    assert [event[:5] for event in events(sides["client"])] == [[name, "pi", prefix, "", "tun6"] for name in ("prefix", "up")]
    ((event, id_, given, _, device, peer, reason),) = events(sides["server"])
    assert (event, id_, given, device, reason) == ("session-up", "pi", prefix, "tun6-0", "")
    assert re.fullmatch(r"10\.9\.0\.2 port \d+", peer)

    assert client.stop() < SERVER_ENDS_S
    assert events(sides["client"])[2] == ["down", "pi", prefix, "", "tun6", f"{Lab.SERVER} port {tunnel.port}", "the client stops"]
    with tunnel.peer("pi") as newcomer:  # takes the Id over while the hook still runs for its first session
        newcomer.connected().echo()
        with tunnel.peer("pi") as newer:
            newer.connected().echo()
            assert [event for event, *_ in events(sides["server"])] == ["session-up"]
            (tmp_path / "busy").unlink()
            expected = ["session-up", "session-down"] * 2 + ["session-up"]
            wait_until("the hooks catch up", lambda: [event for event, *_ in events(sides["server"])] == expected)
            assert "newcomer" in events(sides["server"])[3][6]
            assert server.stop() < SERVER_ENDS_S
    assert [event[0] for event in events(sides["server"])] == [*expected, "session-down"]
    assert events(sides["server"])[-1][6] == "the server stops"


@pytest.mark.waits
def test_a_client_whose_prefix_changes_tells_its_hook_of_both(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    server = tunnel.server()
    hook = hook_file(tmp_path, 'echo "$TUN6_EVENT $TUN6_OLD_PREFIX $TUN6_PREFIX" >> $OUT')
    client = tunnel.client(id="pi", hook=hook)
    old, new = client.prefix(), prefix_of_pool(tunnel, 7)
    asked(server.config, "clients", "pin", "pi", str(new))
    assert client.prefix(2) == new
    expected = [f"prefix  {old}", f"up  {old}", f"down  {old}", f"prefix {old} {new}", f"up  {new}"]
    wait_until("the hook ran", lambda: told(tmp_path) == expected)


@pytest.mark.waits
def test_a_hook_that_is_missing_ends_the_start_with_2(tunnel: Tunnel, tmp_path: Path) -> None:
    for role in ("server", "client"):
        sentence = tunnel.failure_at_start(role, 2, hook="missing")
        assert sentence == f"hook = {tmp_path / 'missing'}: there is no such file"


# ---- end to end: neighbour proxy -------------------------------------------------------------------------------------


@contextmanager
def on_link(lab: Lab, pool: IPv6Network) -> Iterator[None]:
    """A second link between the Internet and the server, on which the Internet looks for the pool's addresses instead of routing them."""
    lab.ip("internet", f"link add eth7 type veth peer name eth7 netns {lab._names['server']}")
    try:
        for host in ("internet", "server"):
            lab.ip(host, "link set eth7 up")
        for host in ("internet", "server"):
            wait_until("the link has its address", lambda host=host: "fe80" in lab.ip(host, "-6 addr show dev eth7 -tentative"))  # type: ignore[misc]
        lab.ip("internet", f"-6 route add {pool} dev eth7")
        yield
    finally:
        lab.ip("internet", "link del eth7")


class Neighbour(SocketOwner):
    """Speaks on that link by hand, from the Internet's end."""

    def __init__(self, lab: Lab) -> None:
        self.sock = socket_on(lab, "internet", socket.AF_PACKET, socket.SOCK_DGRAM)
        self.sock.bind(("eth7", 0x86DD))
        self.sock.settimeout(5)
        self.mac = self.sock.getsockname()[4]

    def solicit(self, target: IPv6Address, source: IPv6Address = ROUTER) -> None:
        group = solicited_node(target).packed
        self.sock.sendto(solicitation(target, source), ("eth7", 0x86DD, 0, 0, b"\x33\x33" + group[12:]))

    def advertisements(self, last: IPv6Address) -> list[Any]:
        """Those that come until the last target is answered, which this asks for; each with the kind of its MAC address (packet(7))."""
        self.solicit(last)
        found: list[Any] = []
        while not found or found[-1][2] != last:
            data, sender = self.sock.recvfrom(2000)
            answer = advertisement(data)
            found += [(*answer, sender[2])] if answer else []
        return found


@pytest.mark.waits
def test_a_range_that_is_only_on_the_link_works_by_answers_to_solicitations(lab: Lab, tunnel: Tunnel) -> None:
    with on_link(lab, tunnel.pool):
        tunnel.server()
        first = tunnel.client(id="pi")
        address = str(first.prefix()[1])
        assert not any(lab.pings("internet", address) for _ in range(3))  # the control: nobody answers the router
        for program in reversed(tunnel._programs):
            program.stop()
        server = tunnel.server(ndp="eth7")
        server.wait_for("neighbours on eth7 are told")
        prefix = tunnel.client(id="pi").prefix()
        ping(lab, "internet", str(prefix[1]))
        with lan_behind(lab, prefix) as behind, Neighbour(lab) as neighbour:
            ping(lab, "internet", behind)
            transfer(lab, "internet", "lan", behind, 1 << 20)
            mac = json.loads(lab.ip("server", "-j link show eth7"))[0]["address"]
            of_the_link = IPv6Address(re.findall(r"fe80::\S+(?=/)", lab.ip("server", "-6 addr show dev eth7"))[0])
            own, elsewhere, nobody = prefix[0x77], prefix[0x10_0000_0005], prefix_of_pool(tunnel, 9)[1]
            with changed(lab, "server", f"addr add {own}/128 dev lo nodad", f"addr add {prefix[0x10_0000_0001]}/112 dev eth0 nodad"):
                time.sleep(tun6.OWN_ADDRESSES_S)  # after so long the server looks at its addresses again
                for target in (own, elsewhere, nobody):
                    neighbour.solicit(target)
                neighbour.solicit(prefix[0xDAD], IPv6Address(0))
                answers = neighbour.advertisements(prefix[2])
            options = b"\2\1" + bytes.fromhex(mac.replace(":", ""))
            assert [answer for answer in answers if answer[1] in (ROUTER, ALL_NODES)] == [  # the others are for the Internet's kernel
                (of_the_link, ALL_NODES, prefix[0xDAD], 0x80, options, 2),
                (of_the_link, ROUTER, prefix[2], 0xC0, options, 0),
            ]
            with tunnel.peer("another") as peer:
                peer.connected()
                tunnel._programs[-1].stop()
                server.wait_for("'pi' from .*: gone")
                neighbour.solicit(prefix[3])
                assert prefix[3] not in [answer[2] for answer in neighbour.advertisements(peer.prefix[1])]


@pytest.mark.waits
def test_a_flood_of_solicitations_costs_little_and_an_uplink_may_go_and_come_back(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    is_multicast_for_all = "test $(($(cat /sys/class/net/eth7/flags) & 0x200)) != 0"  # IFF_ALLMULTI, linux/if.h: an Ethernet card needs it
    with on_link(lab, tunnel.pool), tun6_with(tmp_path, "tun6.UPLINK_RETRY_S = 0.1"):
        assert lab.run("server", "sh", "-c", is_multicast_for_all).returncode == 1
        server = tunnel.server(ndp="eth7")
        server.wait_for("neighbours on eth7 are told")
        assert lab.run("server", "sh", "-c", is_multicast_for_all).returncode == 0
        prefix = tunnel.client().prefix()
        packets = [solicitation(base[number]) for number in range(1000, 1500) for base in (prefix, prefix_of_pool(tunnel, 9))]
        with Neighbour(lab) as neighbour:
            began, used, sent = time.monotonic(), cpu_s(server), 0
            while time.monotonic() - began < 2:
                for data in packets:
                    with suppress(BlockingIOError, InterruptedError):
                        neighbour.sock.sendto(data, ("eth7", 0x86DD, 0, 0, b"\x33\x33\xff\0\0\1"))
                sent += len(packets)
            used, seconds = cpu_s(server) - used, time.monotonic() - began
            ping(lab, "client", count=2)
            answers = 0
            neighbour.sock.settimeout(0.5)
            with suppress(TimeoutError, socket.timeout):
                while True:
                    answers += advertisement(neighbour.sock.recv(2000)) is not None
            assert sent > 5000 and 50 <= answers <= tun6.ADVERTISEMENTS_OF_PREFIX_MAX * (seconds + 2), (sent, answers)
            assert used < 0.4 * seconds, (used, sent)
        wait_until("it answers again", lambda: lab.pings("internet", str(prefix[1])))
        lab.ip("server", "link set eth7 down")
        server.wait_for("ndp = eth7: Network is down; nobody there can reach clients until that changes")
        time.sleep(0.5)  # several attempts
    with on_link(lab, tunnel.pool):
        server.said("neighbours on eth7 are told", 2)
        wait_until("it answers again", lambda: lab.pings("internet", str(prefix[1])))
    server.said("nobody there can reach clients", 2)  # once for each time it was gone


@contextmanager
def internet_beyond(lab: Lab) -> Iterator[None]:
    """A host `far` of the IPv6 Internet, behind that of the tunnel's provider; both ends of its link carry 1500 bytes."""
    lab._names["far"] = f"tun6-{os.getpid()}-far"
    try:
        lab._ip(f"netns add {lab._names['far']}")
        lab.ip("internet", f"link add eth8 type veth peer name eth8 netns {lab._names['far']}")
        for host, address in (("internet", f"{FAR_NETWORK[0xFF]}/64"), ("far", f"{FAR_NETWORK[1]}/64")):
            lab.ip(host, "link set eth8 up")
            lab.ip(host, f"addr add {address} dev eth8 nodad")
        lab.ip("far", f"-6 route add default via {FAR_NETWORK[0xFF]}")
        yield
    finally:
        with suppress(tun6.KernelError):
            lab.ip("internet", "link del eth8")
        lab._ip(f"netns del {lab._names.pop('far')}")


@contextmanager
def six_in_four(lab: Lab, host: str, device: str, local: str, remote: str) -> Iterator[None]:
    """A TUN that carries its packets to another host in IPv4, protocol 41 (RFC 4213), as the kernel's sit does, which not every one has."""
    with lab.inside(host):
        tun = pytun.TunTapDevice(device, pytun.IFF_TUN | pytun.IFF_NO_PI)
    sock, stop = socket_on(lab, host, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IPV6), threading.Event()
    sock.bind((local, 0))
    sock.connect((remote, 0))
    sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER is DO: what is too long with its 20 bytes more is not sent, in no way

    def move() -> None:
        while not stop.is_set():
            readable, _, _ = select.select([tun, sock], [], [], 0.1)
            with suppress(OSError):  # the device is not up yet, or the packet is too long
                if sock in readable:
                    packet = sock.recv(65_536)
                    os.write(tun.fileno(), packet[(packet[0] & 15) * 4 :])
            with suppress(OSError):
                if tun in readable:
                    sock.send(os.read(tun.fileno(), 65_536))

    thread = threading.Thread(target=move, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        sock.close()
        tun.close()


FAR_NETWORK = IPv6Network("2001:db8:fa00::/64")
TUNNEL_BROKER, VPS = "198.51.100.1", "203.0.113.5"  # as in the recipe
BROKERS_PREFIX = IPv6Network("2001:db8:4700::/48")


@pytest.mark.waits
def test_a_tunnel_brokers_range_goes_on_to_clients_by_the_recipes_commands(lab: Lab, tunnel: Tunnel) -> None:
    """All but the first, which makes the device that `six_in_four` stands in for."""
    text = (Path(__file__).parent / "docs" / "operating.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"<!-- 6in4 -->\n```sh\n(.*?)```", text, re.DOTALL)
    first, *commands = recipe.splitlines()
    assert first == f"ip tunnel add he-ipv6 mode sit local {VPS} remote {TUNNEL_BROKER} ttl 255"
    tunnel.pool = BROKERS_PREFIX
    with ExitStack() as undo:
        for host, device, own, far in (("server", "eth1", VPS, TUNNEL_BROKER), ("internet", "eth0", TUNNEL_BROKER, VPS)):
            undo.enter_context(changed(lab, host, f"addr add {own}/32 dev {device}", f"-4 route add {far}/32 dev {device} src {own}"))
            undo.enter_context(six_in_four(lab, host, "he-ipv6", own, far))
        undo.enter_context(internet_beyond(lab))
        undo.enter_context(sysctl(lab, "internet", "net.ipv6.conf.all.forwarding", "1"))
        lab.ip("internet", "link set he-ipv6 up mtu 1480")
        lab.ip("internet", "addr add 2001:db8:470a::1/64 dev he-ipv6 nodad")
        lab.ip("internet", f"-6 route add {BROKERS_PREFIX} dev he-ipv6")
        # the VPS has IPv6 of its own, by a router that takes nothing from the range
        undo.enter_context(changed(lab, "server", "-6 route add default via 2001:db8:ffff::dead dev eth1"))
        for command in commands:
            done = lab.run("server", "sh", "-c", command)
            assert done.returncode == 0, (command, done.stderr)
            if " rule add " in command:
                undo.callback(lab.ip, "server", command.removeprefix("ip ").replace(" add ", " del "))
        tunnel.server(mtu=1480)
        prefix, other = tunnel.client(mtu=1480).prefix(), tunnel.client("second", id="with the default MTU").prefix()
        with lan_behind(lab, prefix) as behind:
            for host, address in (("lan", behind), ("second", str(other[1]))):
                ping(lab, host, str(FAR_NETWORK[1]), 1432, count=1)  # 1480 bytes, as many as pass
                ping(lab, host, str(FAR_NETWORK[1]), 1452, count=1)  # 1500: it is told of the path's MTU
                ping(lab, "far", address, 1452, count=1)
                transfer(lab, host, "far", str(FAR_NETWORK[1]), 2 << 20)
                transfer(lab, "far", host, address, 2 << 20)
            ping(lab, "client", str(other[1]), count=2)  # it does not go to the broker and back:
            route = lab.ip("server", f"-6 route get {other[1]} from {prefix[1]} iif {min(server_devices(lab))}")
            assert "dev tun6-" in route, route


# ---- end to end: legacy peers ----------------------------------------------------------------------------------------


class Legacy:
    """Half of a program of the original's kind: a TUN without offload header, one connection, and a thread for both.

    As in the original, what one read of the TUN gives is one send.
    """

    def __init__(self, lab: Lab, host: str) -> None:
        with lab.inside(host):
            self._tun = pytun.TunTapDevice("legacy", flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
        os.set_blocking(self._tun.fileno(), False)
        lab.ip(host, "link set legacy addrgenmode none")
        lab.ip(host, "link set legacy up")
        self.sock: socket.socket | None = None
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(1)
        self._work: Future[None] | None = None

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        try:
            if self._work:
                self._work.result(10)
        finally:
            self._threads.shutdown()
            self._drop()
            self._tun.close()

    def _start(self) -> None:
        self._work = self._threads.submit(self._run)

    def _sources(self) -> list[Any]:
        return [self._tun, *([self.sock] if self.sock else [])]

    def _run(self) -> None:
        while not self._stop.is_set():
            for source in select.select(self._sources(), [], [], 0.1)[0]:
                self._serve(source)

    def _serve(self, source: Any) -> None:
        if source is self._tun:
            packet = os.read(self._tun.fileno(), 65_536)
            if self.sock:
                try:
                    self.sock.sendall(packet)
                except OSError:
                    self._drop()
        elif self.sock and source is self.sock:
            data = b""
            with suppress(OSError):
                data = self.sock.recv(65_536)
            if data:
                self._received(data)
            else:
                self._drop()

    def _received(self, data: bytes) -> None:
        raise NotImplementedError

    def _drop(self) -> None:
        if self.sock:
            self.sock.close()
            self.sock = None


class LegacyClient(Legacy):
    """The original client: its first recv is the whole answer."""

    def __init__(self, lab: Lab, tunnel: Tunnel, host: str = "client", delay: float = 0) -> None:
        """`delay` seconds pass before the first recv, as on a small machine that is busy."""
        super().__init__(lab, host)
        self._stream = b""
        try:
            with lab.inside(host):
                self.sock = socket.create_connection((Lab.SERVER, tunnel.port), timeout=5)
            self.sock.sendall(b'{"Id": "legacy"}')
            time.sleep(delay)
            self.first = self.sock.recv(4096)
            self.prefix = IPv6Network(json.loads(self.first)["Prefix"])
            lab.ip(host, f"addr add {self.prefix[1]}/128 dev legacy nodad")
            lab.ip(host, "-6 route add default dev legacy metric 5")
        except BaseException:
            self.__exit__()
            raise
        self._start()

    def _received(self, data: bytes) -> None:
        self._stream += data
        while frame := first_frame(self._stream, 0):
            os.write(self._tun.fileno(), frame)
            self._stream = self._stream[len(frame) :]


@pytest.mark.waits
def test_a_legacy_client_pings_and_moves_bulk_both_ways(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    tunnel.client("second").prefix()
    with LegacyClient(lab, tunnel) as client:
        assert set(json.loads(client.first)) == {"Prefix"}
        for kinds in ([], ["tso6", "uso6", "new"]):
            assert "tso6" in tunnel.peer("modern", offload=kinds).answer()["Offload"]
        for size in (64, 1440, 3000):
            ping(lab, "client", size=size)
        transfer(lab, "client", "internet", Lab.INTERNET, 2 << 20)
        transfer(lab, "internet", "client", str(client.prefix[1]), 2 << 20)
        transfer(lab, "second", "client", str(client.prefix[1]), 1 << 20)  # its modern neighbour's packets, finished for it
        transfer(lab, "client", "second", addresses(lab, "second")[0].split("/")[0], 1 << 20)


@pytest.mark.waits
def test_traffic_for_a_legacy_client_does_not_spoil_its_first_recv(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    assert tun6.LEGACY_READ_TIME_S >= 0.2
    with tun6_with(tmp_path, "tun6.LEGACY_READ_TIME_S = 1.0"):  # so that it tells a busy machine from a frame that came too early
        tunnel.server()
    prefix = tunnel.visit("legacy")
    with running(lab, "internet", "ping", "-6", "-q", "-i", "0.002", str(prefix[1])):
        for delay in (0, 0, 0, 0.25, 0.5):
            wait_until_no_sessions(lab)
            with LegacyClient(lab, tunnel, delay=delay) as client:
                assert json.loads(client.first) == {"Prefix": str(prefix)}
                ping(lab, "client")


class LegacyServer(Legacy):
    """The original server, with one prefix to give, the first of the pool: every recv is one packet for it."""

    def __init__(self, lab: Lab, tunnel: Tunnel) -> None:
        super().__init__(lab, "server")
        self.hellos: list[dict[str, Any]] = []
        self.recvs: list[bytes] = []  # since the last hello
        self.prefix = IPv6Network(f"{tunnel.pool[0]}/64")
        lab.ip("server", f"-6 route add {self.prefix} dev legacy")
        with lab.inside("server"):
            self._listener = socket.create_server((Lab.SERVER, tunnel.port))
        self._start()

    def __exit__(self, *_: object) -> None:
        with self._listener:
            super().__exit__()

    def _sources(self) -> list[Any]:
        return [self._listener, *super()._sources()]

    def _serve(self, source: Any) -> None:
        if source is not self._listener:
            super()._serve(source)
            return
        self._drop()
        self.sock, _ = self._listener.accept()
        self.sock.settimeout(5)
        self.hellos.append(json.loads(self.sock.recv(4096)))
        self.recvs = []
        self.sock.sendall(json.dumps({"Prefix": str(self.prefix)}).encode())

    def _received(self, data: bytes) -> None:
        self.recvs.append(data)
        os.write(self._tun.fileno(), data)  # of several packets, the kernel takes the first


def is_one_packet(data: bytes) -> bool:
    return len(data) >= 40 and data[0] >> 4 == 6 and len(data) == packet_length(data)


@pytest.mark.waits
def test_a_legacy_server_gets_one_packet_a_recv_and_traffic_works_both_ways(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    no_probe = tun6_with(tmp_path, "tun6.PROBE_FIRST_S = 600.0, 600.0")  # it could share the recv of a ping
    with no_probe, LegacyServer(lab, tunnel) as server:
        assert tunnel.client().prefix() == server.prefix
        assert "Id" in server.hellos[0]
        for size in (64, 1440):  # not 3000, nor several: the original loses what comes together, as fragments do
            ping(lab, "client", size=size, count=1)
        server.recvs.clear()
        with Echo(lab) as echo:
            for number in range(50):  # each when the one before is back: the server keeps up
                echo.send(number)
                echo.expect_replies({number})
        assert all(map(is_one_packet, server.recvs))
        sent = [got for got in server.recvs if len(got) == 48 and got[6] == 58 and got[40] == 128]  # what else comes is of the kernel
        assert [int.from_bytes(got[44:46], "big") for got in sent] == list(range(50))
        transfer(lab, "client", "internet", Lab.INTERNET, 256 << 10)
        transfer(lab, "internet", "client", str(server.prefix[1]), 256 << 10)


@pytest.mark.waits
def test_packets_that_waited_leave_for_a_legacy_server_one_a_send(lab: Lab, tunnel: Tunnel) -> None:
    with sysctl(lab, "client", "net.ipv4.tcp_autocorking", "0"):  # so that each send is a segment, and can be told on the way
        with LegacyServer(lab, tunnel):
            client = tunnel.client()
            client.prefix()
        client.wait_for("WARNING no connection")
        with Echo(lab) as echo:
            for number in range(8):  # fewer than the segments that TCP may send at once
                echo.send(number)
        sniffer = socket_on(lab, "server", socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        with sniffer, LegacyServer(lab, tunnel):
            sniffer.bind(("eth0", 0x0800))
            client.prefix(times=2)
            sniffer.settimeout(5)
            segments: dict[int, bytes] = {}  # by sequence number: a retransmission is no send
            request = ABROAD.packed + b"\x80\0"  # the end of an IPv6 header and the beginning of an echo request
            while b"".join(segments.values()).count(request) < 8:
                packet = sniffer.recv(65_536)
                tcp = packet[(packet[0] & 15) * 4 : int.from_bytes(packet[2:4], "big")]
                payload = tcp[(tcp[12] >> 4) * 4 :]
                if int.from_bytes(tcp[2:4], "big") == tunnel.port and payload:
                    segments[int.from_bytes(tcp[4:8], "big")] = payload
        hello, *frames = segments.values()
        assert json.loads(hello)
        assert all(map(is_one_packet, frames))


@pytest.mark.waits
def test_a_client_keeps_its_tun_from_a_modern_server_to_a_legacy_one_and_back(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    client.prefix()
    index = tun_of(lab)["ifindex"]
    transfer(lab, "client", "internet", Lab.INTERNET, 4 << 20)
    server.stop()
    with LegacyServer(lab, tunnel) as legacy:
        assert client.prefix(times=2) == legacy.prefix
        ping(lab, "client", size=1440)
        transfer(lab, "client", "internet", Lab.INTERNET, 256 << 10)
        transfer(lab, "internet", "client", str(legacy.prefix[1]), 256 << 10)
    tunnel.server()
    assert client.prefix(times=3) == legacy.prefix
    assert tun_of(lab)["ifindex"] == index
    transfer(lab, "client", "internet", Lab.INTERNET, 4 << 20)
    transfer(lab, "internet", "client", str(legacy.prefix[1]), 4 << 20)


# ---- end to end: offload ---------------------------------------------------------------------------------------------


def send_datagrams_at_once(lab: Lab, size: int) -> None:
    """The client's host sends four UDP datagrams, which the kernel hands on as one packet while the TUN may have it."""
    with socket_on(lab, "client") as sender:
        sender.setsockopt(socket.SOL_UDP, 103, size // 4)  # UDP_SEGMENT, linux/udp.h
        sender.sendto(bytes(size), (Lab.INTERNET, 9))


def datagrams(sock: socket.socket, header: int) -> Iterator[tuple[bytes, bytes]]:
    """Offload header (of so many bytes) and packet of each frame that comes with UDP or an echo request in it.

    Others are the kernel's own: reports of multicast listeners.
    """
    stream = b""
    while data := sock.recv(65_536):
        stream += data
        while frame := first_frame(stream, header):
            stream, packet = stream[len(frame) :], frame[header:]
            if packet[6] == UDP or (packet[6] == 58 and packet[40] == 128):
                yield frame[:header], packet
    raise EOFError("the client closed the connection")


@pytest.mark.parametrize("offload", [["tso6", "uso6"], ["tso6"], []], ids=["all", "tcp", "none"])
def test_a_server_gets_only_the_kinds_of_offloaded_packets_that_it_can_take(lab: Lab, tunnel: Tunnel, offload: list[str]) -> None:
    with ServerByHand(lab, tunnel) as server:
        client = tunnel.client()
        with server.accept(offload) as sock:
            client.prefix()
            send_datagrams_at_once(lab, 4000)
            header, packet = next(datagrams(sock, 10))
    tun6.check_offload(memoryview(header), len(packet), frozenset(offload))
    assert (header[1] == tun6.GSO_UDP_L4) == ("uso6" in offload)


@pytest.mark.parametrize("offload", [["tso6"], [], None], ids=["tcp", "none", "legacy"])
def test_what_waited_for_a_server_with_offload_suits_one_with_less(lab: Lab, tunnel: Tunnel, offload: list[str] | None) -> None:
    with ServerByHand(lab, tunnel) as server:
        client = tunnel.client()
        with server.accept(["tso6", "uso6"]):
            client.prefix()
        client.wait_for("WARNING no connection")
        send_datagrams_at_once(lab, 4000)  # waits in the TUN, as one packet
        with server.accept(offload) as sock, Echo(lab) as echo:
            client.prefix(times=2)
            echo.send(77)  # behind it
            for header, packet in datagrams(sock, 0 if offload is None else 10):
                if header:
                    tun6.check_offload(memoryview(header), len(packet), frozenset(offload or []))
                if packet[6] == 58:  # the echo request
                    break
                assert len(packet) <= 1500


def send_datagrams(lab: Lab, payloads: list[bytes], finished: bool) -> None:
    """Sends them from the client; finished: with their checksums, which the kernel else leaves to the TUN's other end."""
    source = IPv6Address(next(address.split("/")[0] for address in addresses(lab) if address.startswith("2001:db8:1")))
    with socket_on(lab, "client", socket.AF_INET6, *((socket.SOCK_RAW, UDP) if finished else (socket.SOCK_DGRAM, 0))) as sock:
        sock.bind((str(source), 0 if finished else 1000))
        for payload in payloads:
            made = udp_between(source, ABROAD, payload, 4000)
            sock.sendto(made[40:] if finished else payload, (Lab.INTERNET, 0 if finished else 4000))


@pytest.mark.parametrize("finished", [False, True])
def test_datagrams_that_wait_together_travel_joined_and_arrive_as_they_were(lab: Lab, tunnel: Tunnel, finished: bool) -> None:
    payloads = [struct.pack(">I", number) * (16 if number % 40 else 4) for number in range(200)]
    with ServerByHand(lab, tunnel) as server:
        client = tunnel.client()
        with server.accept(["tso6", "uso6"]) as sock:
            client.prefix()
            with paused(client):
                send_datagrams(lab, payloads, finished)
            joined, frames = datagrams(sock, 10), 0
            cut: list[bytes] = []
            while len(cut) < len(payloads):
                cut += cut_apart(b"".join(next(joined)))
                frames += 1
    assert [part[48:] for part in cut] == payloads
    assert frames < 20
    tunnel.server()
    with socket_on(lab, "internet") as sink:
        sink.bind((Lab.INTERNET, 4000))
        sink.settimeout(10)
        client.prefix(times=2)
        with paused(client):
            send_datagrams(lab, payloads, finished)
        assert [sink.recv(4096) for _ in payloads] == payloads


KERNEL_FAULT = re.compile("WARNING|BUG|Oops|Call Trace|bad gso|hw csum|general protection|skb_|page allocation", re.IGNORECASE)


@contextmanager
def no_kernel_faults() -> Iterator[None]:
    """The kernel's log has no new line about a fault afterwards."""

    def lines() -> Counter[str]:
        return Counter(subprocess.run(["dmesg"], capture_output=True, text=True).stdout.splitlines())

    before = lines()
    yield
    assert not [line for line in lines() - before if KERNEL_FAULT.search(line)]


def test_any_offload_header_ends_at_most_its_own_session_and_the_kernel_stays_well(tunnel: Tunnel, server: Program) -> None:
    rng = random.Random(20_241_123)
    ended, passed = 0, 0
    with no_kernel_faults():
        other = tunnel.peer("by-stander").connected()
        other.echo()
        peer: Peer | None = None
        while ended < 40 or passed < 400:
            if peer is None:
                peer = tunnel.peer(f"hostile {ended}", offload=["tso6", "uso6"]).connected()
            following = rng.choice((TCP, UDP, 58, NOTHING))
            made = between(peer.prefix[1], ABROAD, rng.randbytes(rng.choice((8, 20, 60, 400, 5000, 60_000))), following)
            header = offload(*random_offload(rng, len(made)))
            good = is_good_offload(header, len(made))
            if good:
                passed += 1
            elif rng.random() > 0.05 or ended > 60:  # few of those, as each takes a session
                continue
            try:
                peer.sock.sendall(header + made)
                if not good or passed % 10 == 0:
                    peer.echo()
                    assert good
            except (OSError, EOFError):
                peer, ended = None, ended + 1
                other.echo()
        other.echo()
        server.wait_for("'hostile .*: gone", ended)
    reasons = re.findall(r"'hostile .*: gone, (.*?);", server.log())
    assert [why for why in reasons if why.startswith("offload header with")]
    allowed = ("offload header with", "this kernel refuses its ", "the peer closed", "Connection reset")
    assert all(why.startswith(allowed) for why in reasons), reasons


@pytest.mark.parametrize(
    ("header", "following", "body"),
    [(offload(gso_type=4, gso_size=100), TCP, 32), (offload(gso_type=5, gso_size=100, csum_offset=6), UDP, 8)],
    ids=["tcp", "udp"],
)
def test_a_frame_of_too_many_segments_ends_the_session(tunnel: Tunnel, server: Program, header: bytes, following: int, body: int) -> None:
    peer = tunnel.peer("greedy", offload=["tso6", "uso6"]).connected()
    peer.sock.sendall(header + between(peer.prefix[1], ABROAD, bytes(body + 100 * 128), following))
    peer.echo()
    peer.sock.sendall(header + between(peer.prefix[1], ABROAD, bytes(60 + 100 * 128 + 1), following))
    peer.ended()
    server.wait_for("'greedy' from .*: gone, offload header with gso_size 100 for .* bytes: over 128 segments")


REFUSES = """
class File:
    def __init__(self, file):
        self._file, self.readinto = file, file.readinto
    def write(self, frame):
        if frame[1] & 0x7F in {types}:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._file.write(frame)
def set_up_refusing(tun):
    set_up(tun)
    tun.file = File(tun.file)
set_up, tun6.Tun._set_up = tun6.Tun._set_up, set_up_refusing
"""


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_kernel_that_refuses_large_packets_costs_one_reconnect(lab: Lab, tunnel: Tunnel, tmp_path: Path, role: str) -> None:
    fault = REFUSES.format(types=[4])
    with tun6_with(tmp_path, fault if role == "server" else ""):
        server = tunnel.server()
    other = tunnel.peer("other", offload=["tso6", "uso6"])
    assert other.answer()["Offload"] == ["tso6", "uso6"]
    with tun6_with(tmp_path, fault if role == "client" else ""):
        client = tunnel.client(id="c")
    prefix = client.prefix()
    for _ in range(2):
        if role == "server":
            transfer(lab, "client", "internet", Lab.INTERNET, 4 << 20)
        else:
            transfer(lab, "internet", "client", str(prefix[1]), 4 << 20)
    assert client.prefix(2) == prefix
    client.said(": has ", 2)
    faulty, well = (server, client) if role == "server" else (client, server)
    faulty.said(r"WARNING .*this kernel refuses its tso6 frames, so it is not offered tso6 again; `offload = no` in config.ini", 1)
    faulty.said("this kernel refuses", 1)
    assert "kernel refuses" not in well.log()
    other.echo()
    server.wait_for("'c' from .*: gone, .* packets dropped" + r" \(9 as the kernel refused them, offload tso6\)" * (role == "server"))
    client.said("WARNING no connection", 1)
    if role == "server":
        assert tunnel.peer("new", offload=["tso6", "uso6"]).answer()["Offload"] == ["tso6", "uso6"]
        assert tunnel.peer("c", offload=["tso6", "uso6"]).answer()["Offload"] == ["uso6"]
    else:
        server.stop()
        assert next_hello(lab, tunnel)["Offload"] == ["uso6"]


def next_hello(lab: Lab, tunnel: Tunnel) -> dict[str, Any]:
    """What the client says to the server next."""
    with ServerByHand(lab, tunnel) as server:
        sock, _ = server.sock.accept()
        with sock:
            sock.settimeout(10)
            hello: dict[str, Any] = json.loads(sock.recv(4096))
    return hello


def test_a_client_of_whom_all_kinds_were_refused_is_served_without_and_the_others_as_before(
    lab: Lab, tunnel: Tunnel, tmp_path: Path
) -> None:
    with tun6_with(tmp_path, REFUSES.format(types=[4, 5])):
        server = tunnel.server()
    kinds = ["tso6", "uso6"]
    other, legacy = tunnel.peer("other", offload=kinds).connected(), tunnel.peer("legacy").connected()
    for header, following, kind in ((TSO6, TCP, "tso6"), (USO6, UDP, "uso6")):
        with tunnel.peer("hostile", offload=["tso6", "uso6"]) as peer:
            assert peer.answer()["Offload"] == kinds
            frame = header + between(peer.prefix[1], ABROAD, bytes(2000), following)
            peer.sock.sendall(frame * 8)
            peer.echo()  # as many are only dropped
            peer.sock.sendall(frame)
            assert peer.ended() in ("closed", "reset")
        server.wait_for(f"WARNING 'hostile' from .*: gone, this kernel refuses its {kind} frames")
        kinds.remove(kind)
    peer = tunnel.peer("hostile", offload=["tso6", "uso6"])
    assert peer.answer()["Offload"] == []
    peer.echo()
    other.echo()
    legacy.echo()
    peer.sock.sendall(TSO6 + between(peer.prefix[1], ABROAD, bytes(2000), TCP))
    server.wait_for("INFO 'hostile' from .*: gone, offload header with gso_type 0x4, which was not offered")
    assert tunnel.peer("new", offload=["tso6", "uso6"]).answer()["Offload"] == ["tso6", "uso6"]
    server.said("WARNING 'hostile'", 2)


@pytest.mark.parametrize(("setting", "kinds"), [("auto", ["tso6", "uso6"]), ("tso6", ["tso6"]), ("no", [])], ids=["auto", "tso6", "no"])
def test_the_setting_offload_is_what_each_side_offers(lab: Lab, tunnel: Tunnel, setting: str, kinds: list[str]) -> None:
    server = tunnel.server(offload=setting)
    peer = tunnel.peer("a", offload=["tso6", "uso6"])
    assert peer.answer()["Offload"] == kinds
    peer.echo()  # frames have a header all the same
    legacy = tunnel.peer("legacy")
    assert sorted(legacy.answer()) == ["Prefix"]
    legacy.echo()
    client = tunnel.client(offload=setting)
    prefix = client.prefix()
    transfer(lab, "client", "internet", Lab.INTERNET, 1 << 20)
    transfer(lab, "internet", "client", str(prefix[1]), 1 << 20)
    client.said(": has ", 1)
    for header, following, kind in ((USO6, UDP, "uso6"), (TSO6, TCP, "tso6")):
        with tunnel.peer("b", offload=["tso6", "uso6"]) as sender:
            sender.connected()
            sender.sock.sendall(header + between(sender.prefix[1], ABROAD, bytes(2000), following))
            if kind in kinds:
                sender.echo()
            else:
                assert sender.ended() in ("closed", "reset")
    server.stop()
    assert next_hello(lab, tunnel)["Offload"] == kinds


# ---- end to end: ingress filter --------------------------------------------------------------------------------------


MARK, LAST = b"injected, must not pass", b"sentinel, must pass"


class Capture:
    """The IPv6 packets that cross a device of a host from now on, in both directions, until the tunnel ends."""

    def __init__(self, tunnel: Tunnel, host: str, device: str) -> None:
        self._sock = socket_on(tunnel.lab, host, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x86DD))
        tunnel._undo.callback(self._sock.close)
        self._sock.bind((device, 0x86DD))
        self._sock.settimeout(5)

    def up_to(self, last: bytes) -> Iterator[bytes]:
        """The packets before the one that has these bytes in it."""
        while last not in (found := self._sock.recv(70_000)):
            yield found

    def so_far(self) -> Iterator[bytes]:
        """Those that are there already."""
        self._sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                yield self._sock.recv(70_000)


def router_advertisement(source: IPv6Address, destination: IPv6Address) -> bytes:
    """RFC 4861 section 4.2: a default route, and a prefix to take an address from."""
    prefix = struct.pack(">BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + IPv6Address("2001:db8:bad::").packed
    return icmp_between(source, destination, 134, struct.pack(">BBHII", 64, 0, 1800, 0, 0) + prefix + MARK + b"\0")


def redirect(source: IPv6Address, destination: IPv6Address) -> bytes:
    """RFC 4861 section 4.5: packets for the Internet host are to go to the source."""
    return icmp_between(source, destination, 137, bytes(4) + source.packed + ABROAD.packed + MARK)


def behind(header: int, packet_: bytes) -> bytes:
    """The packet with an extension header (RFC 8200 section 4) before what it carries: fragment (44), or options of padding."""
    extension = bytes([packet_[6], 0]) + (struct.pack(">HI", 1, 77) if header == 44 else b"\x01\x04\0\0\0\0")  # the first of several
    return packet_[:4] + struct.pack(">HB", len(packet_) - 40 + len(extension), header) + packet_[7:40] + extension + packet_[40:]


STRANGER, LINK_LOCAL, ALL_NODES, LOOPBACK, NOBODY = map(IPv6Address, ("2001:db8:bad::1", "fe80::bad", "ff02::1", "::1", "::"))


def wrong_from_a_client(own: IPv6Network, other: IPv6Network) -> dict[str, list[bytes]]:
    """Packets, all with MARK in them, that no client may send whose /64 is `own`, by what the log says of them."""
    me, neighbour = own[1], other[1]
    return {
        "outside its /64": [
            *(udp_between(source, ABROAD, MARK) for source in (neighbour, STRANGER, LINK_LOCAL, ALL_NODES, LOOPBACK, NOBODY)),
            *(udp_between(source, neighbour, MARK) for source in (STRANGER, ABROAD, LINK_LOCAL)),
            *(behind(header, udp_between(neighbour, ABROAD, MARK)) for header in (44, HOP_BY_HOP, 43, 60)),
            *(router_advertisement(LINK_LOCAL, to) for to in (ALL_NODES, neighbour)),
            behind(44, router_advertisement(LINK_LOCAL, ALL_NODES)),
            redirect(LINK_LOCAL, neighbour),
        ],
        "within its /64": [udp_between(me, own[2], MARK)],
        "multicast": [
            *(udp_between(me, IPv6Address(to), MARK) for to in ("ff02::1", "ff05::2", "ff0e::1")),
            router_advertisement(me, ALL_NODES),
            redirect(me, ALL_NODES),
        ],
        "link-local": [udp_between(me, IPv6Address("fe80::1"), MARK)],
        "loopback": [udp_between(me, to, MARK) for to in (LOOPBACK, NOBODY, IPv6Address("::ffff:10.9.0.1"))],
    }


def refusals(log: str, id_: str) -> Counter[str]:
    """What the log counts at the end of the Id's session."""
    (line,) = re.findall(f"'{id_}' from .*: gone, .*", log)
    return Counter({reason: int(times) for times, reason in re.findall(r"(\d+) refused as ([^,\n]+)", line)})


@pytest.mark.parametrize("kinds", [None, ["tso6", "uso6"]], ids=["legacy", "offload"])
def test_what_no_client_may_send_reaches_nobody_and_is_counted(lab: Lab, tunnel: Tunnel, server: Program, kinds: list[str] | None) -> None:
    before = state_of(lab, "internet")
    internet, loopback = Capture(tunnel, "internet", "eth0"), Capture(tunnel, "server", "lo")
    culprit, victim = tunnel.crowd(2, kinds)
    culprit.echo()
    routes = lab.ip("server", "-6 route show table all")
    wrong = wrong_from_a_client(culprit.prefix, victim.prefix)
    last = [udp_between(culprit.prefix[1], destination, LAST) for destination in (ABROAD, victim.prefix[1])]
    culprit.sock.sendall(b"".join(culprit._header + each for each in [*chain(*wrong.values()), *last]))
    assert not [each for each in internet.up_to(LAST) if MARK in each]
    while LAST not in (got := victim.frame()[1]):
        assert MARK not in got
    culprit.echo()
    victim.echo()
    assert not [each for each in loopback.so_far() if MARK in each]
    assert lab.ip("server", "-6 route show table all") == routes
    assert state_of(lab, "internet") == before
    culprit.close()
    server.wait_for("'client 0' from .*: gone")
    assert refusals(server.log(), "client 0") == {reason: len(packets) for reason, packets in wrong.items()}


def wrong_from_a_server(prefix: IPv6Network, behind_it: IPv6Address) -> list[bytes]:
    """Packets, all with MARK in them, that no server may send to the client that has this /64."""
    me = prefix[1]
    return [
        *(udp_between(ABROAD, to, MARK) for to in (behind_it, LOOPBACK, ALL_NODES, LINK_LOCAL, STRANGER)),
        *(udp_between(IPv6Address(source), me, MARK) for source in ("::1", "::", "fe80::1", "ff02::1", "::ffff:10.8.0.2")),
        udp_between(prefix[16], me, MARK),
        *(behind(header, udp_between(ABROAD, behind_it, MARK)) for header in (44, HOP_BY_HOP)),
        *(router_advertisement(LINK_LOCAL, to) for to in (ALL_NODES, me)),
        router_advertisement(ABROAD, ALL_NODES),
        redirect(LINK_LOCAL, me),
        behind(44, redirect(LINK_LOCAL, me)),
    ]


@pytest.mark.parametrize("kinds", [None, ["tso6", "uso6"]], ids=["legacy", "offload"])
def test_what_a_server_may_not_send_reaches_neither_the_client_nor_its_lan(lab: Lab, tunnel: Tunnel, kinds: list[str] | None) -> None:
    lan_network = IPv6Network("fd00:77::/64")
    with ServerByHand(lab, tunnel) as server, ExitStack() as undo:
        client = tunnel.client()
        sock = undo.enter_context(server.accept(kinds))
        prefix = client.prefix()
        for host, address in (("client", f"{lan_network[1]}/64 dev eth1"), ("lan", f"{lan_network[2]}/64 dev eth0")):
            undo.enter_context(changed(lab, host, f"addr add {address} nodad"))
        undo.enter_context(lan_behind(lab, prefix))
        wait_until("client and LAN reach each other", lambda: lab.pings("client", str(lan_network[2])))
        before = [state_of(lab, host) for host in ("client", "lan")]
        lan, loopback = Capture(tunnel, "lan", "eth0"), Capture(tunnel, "client", "lo")
        header = b"" if kinds is None else PLAIN
        last = [udp_between(ABROAD, prefix[16], LAST), icmp_between(ABROAD, prefix[1], 128, struct.pack(">HH", 7, 7))]
        sock.sendall(b"".join(header + each for each in [*wrong_from_a_server(prefix, lan_network[2]), *last]))
        assert not [each for each in lan.up_to(LAST) if MARK in each]
        assert MARK not in received_up_to(sock, prefix[1].packed + ABROAD.packed + b"\x81")  # the echo reply; an ICMP error would have it
        assert not [each for each in loopback.so_far() if MARK in each]
        assert [state_of(lab, host) for host in ("client", "lan")] == before
        sock.close()
        client.wait_for("no connection to")


@pytest.mark.parametrize("allowed", [True, False])
def test_clients_reach_each_other_only_if_they_may_and_the_internet_anyway(lab: Lab, tunnel: Tunnel, allowed: bool) -> None:
    server = tunnel.server(client_to_client="yes" if allowed else "no")
    clients = [tunnel.client(host, id=host) for host in ("client", "second")]
    prefixes = [client.prefix() for client in clients]
    for client, other in zip(clients, reversed(prefixes)):
        ping(lab, client.host)
        if allowed:
            ping(lab, client.host, str(other[1]))
        else:
            assert not lab.pings(client.host, str(other[1]))
        ping(lab, client.host)
    for client in clients:
        client.stop()
    server.wait_for(": gone", 2)
    for client in clients:
        assert (refusals(server.log(), client.host)["to another client"] > 0) is (not allowed)


def test_a_peer_can_not_change_the_routes_of_the_other_by_router_advertisements(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    tunnel.client().prefix()
    for host, device in (("server", "tun6-0"), ("client", "tun6")):
        with lab.inside(host):
            assert [tun6.read_sysctl(f"net.ipv6.conf.{device}.{key}") for key in ("accept_ra", "accept_redirects", "autoconf")] == ["0"] * 3


def test_a_healthy_session_ends_without_a_refused_or_dropped_packet(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    client.prefix()
    ping(lab, "client")
    for host, devices in (("client", ["tun6"]), ("server", server_devices(lab))):
        assert devices
        for device in devices:
            lab.run(host, "ping", "-6", "-c", "1", "-W", "0.1", f"ff02::1%{device}")
    client.stop()
    (end,) = server.wait_for(": gone, .*")
    assert end.endswith(" 0 packets dropped")
    server.stop()


def test_multicast_without_an_interface_does_not_go_into_a_tun(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    tunnel.client().prefix()
    for host in ("client", "server"):
        routes = lab.ip(host, "-6 route show table local")
        assert "ff00::/8 dev eth0" in routes
        assert not re.search(r"ff00::/8 dev tun6", routes)


def test_a_source_of_another_prefix_on_the_lan_hears_at_once_that_it_is_refused(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    client.prefix()
    lab.ip("client", "addr add fd00:1::1/64 dev eth1 nodad")
    lab.ip("lan", "addr add fd00:1::2/64 dev eth0 nodad")
    lab.ip("lan", "-6 route add default via fd00:1::1")
    try:
        wait_until("the neighbours know each other", lambda: lab.pings("lan", "fd00:1::1"))
        with lab.inside("lan"):
            sock = socket.socket(socket.AF_INET6)
        with sock:
            sock.settimeout(5)
            with pytest.raises(PermissionError):
                sock.connect((Lab.INTERNET, 9))
        done = lab.run("lan", "ping", "-6", "-c", "30", "-i", "0.01", "-W", "1", Lab.INTERNET)
        answers = re.findall(r"From (\S+):? icmp_seq=\d+ Destination unreachable", done.stdout)
        assert set(answers) == {str(client.prefix()[1])}
        assert 5 <= len(answers) <= 20
    finally:
        lab.ip("client", "addr del fd00:1::1/64 dev eth1")
        lab.ip("lan", "addr del fd00:1::2/64 dev eth0")
        lab.ip("lan", "-6 route del default via fd00:1::1")


# ---- end to end: firewall --------------------------------------------------------------------------------------------


def knock(lab: Lab, address: str, port: int, source: str = "internet", seconds: float = 2) -> str:
    """How a TCP connection from another host goes: open, or the error that it ends with."""
    with socket_on(lab, source, kind=socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect((address, port))
            return "open"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "silent")


@contextmanager
def open_ports(lab: Lab, host: str, *ports: int) -> Iterator[None]:
    """TCP on these ports of all of the host's addresses."""
    with ExitStack() as undo:
        for port in ports:
            with lab.inside(host):
                undo.enter_context(socket.create_server(("::", port), family=socket.AF_INET6))
        yield


def table_of(lab: Lab, name: str = "tun6", host: str = "client") -> str:
    """The firewall's table, without its counters and sets; "" when there is none."""
    return lab.run(host, "nft", "-s", "-t", "list", "table", "inet", name).stdout


def neighbours(lab: Lab) -> int:
    """How many hosts of the LAN the client's kernel looks for, or has found."""
    return len(lab.ip("client", "-6 neigh show dev eth1").splitlines())


@contextmanager
def from_abroad(lab: Lab) -> Iterator[str]:
    """An address of the Internet host in another network than its own."""
    route = f"-6 route add 2001:db8:fffe::/64 via {Lab.INTERNET}"
    with changed(lab, "internet", "addr add 2001:db8:fffe::2/128 dev lo nodad"), changed(lab, "server", route):
        yield "2001:db8:fffe::2"


@pytest.mark.waits
def test_the_internet_reaches_only_what_is_opened_and_what_began_inside(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(firewall="yes", open="::10 tcp 4430, ::10 udp 5000-5010, this tcp 2200, this UDP 53")
    prefix = client.prefix()
    this = str(prefix[1])
    with lan_behind(lab, prefix) as host, open_ports(lab, "lan", 4430, 4431, 2200), open_ports(lab, "client", 4430, 2200):
        assert [knock(lab, host, port) for port in (4430, 4431, 2200)] == ["open", "EACCES", "EACCES"]
        assert [knock(lab, address, port) for address in (this, str(prefix[2])) for port in (4430, 2200)] == ["EACCES", "open"] * 2
        with socket_on(lab, "lan") as udp, socket_on(lab, "internet") as sender:
            udp.settimeout(5)
            udp.bind(("::", 5010))
            sender.connect((host, 5011))
            sender.send(b"refused")
            with pytest.raises(PermissionError):
                sender.recv(1)
            sender.sendto(b"taken", (host, 5010))
            assert udp.recv(10) == b"taken"
        for inside in ("lan", "client"):  # also large packets, of which a router on the way says that they are too big
            ping(lab, inside, count=1)
            lab.ip("server", "link set eth1 mtu 1400")
            try:
                transfer(lab, inside, "internet", Lab.INTERNET, 1 << 20)
            finally:
                lab.ip("server", "link set eth1 mtu 1500")
        with lab.inside("internet"):
            listener = socket.create_server(("::", 0), family=socket.AF_INET6)
        with listener, socket_on(lab, "lan", kind=socket.SOCK_STREAM) as sock:
            sock.connect((Lab.INTERNET, listener.getsockname()[1]))
            sender, _ = listener.accept()
            with sender:  # what comes down is let in as an answer
                sender.sendall(bytes(1 << 16))
                sock.settimeout(5)
                assert sock.recv(1)
        # What does not come from the tunnel is as it was.
        assert knock(lab, str(prefix[2]), 4430, "lan") == "open"
        with changed(lab, "nat", "addr add fd00:9::1/64 dev eth1 nodad"), changed(lab, "client", "addr add fd00:9::2/64 dev eth0 nodad"):
            wait_until("the link carries packets", lambda: knock(lab, "fd00:9::2", 4430, "nat") == "open")
        assert "`firewall = yes`" not in client.log()


@pytest.mark.waits
def test_a_ping_sweep_does_not_fill_the_neighbour_table_and_others_can_ping(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    prefix = tunnel.client(firewall="yes").prefix()
    with lan_behind(lab, prefix) as host, from_abroad(lab) as abroad, ExitStack() as undo:
        sock = undo.enter_context(socket_on(lab, "internet", kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMPV6))
        targets = itertools.count(1 << 32)
        kinds = itertools.cycle([128, 1, 2, 3, 4])

        def sweep() -> None:
            for target in itertools.islice(targets, 20):
                sock.sendto(bytes([next(kinds), 0, 0, 0]) + bytes(100), (str(prefix[target]), 0))

        def passes() -> bool:
            return lab.run("internet", "ping", "-6", "-c", "1", "-W", "1", "-I", abroad, host).returncode == 0

        ping(lab, "internet", host, count=2)
        before = neighbours(lab)
        undo.enter_context(repeated(sweep, 0.005))
        wait_until("the sweep is at work", lambda: next(targets) > (1 << 32) + 400)
        for _ in range(3):
            wait_until("others can ping", passes)
        wait_until("2,000 addresses are swept", lambda: next(targets) > (1 << 32) + 2000)
        assert neighbours(lab) - before < 200  # of 1,024 that the table can hold


def fragments(packet: bytes, *pieces: tuple[int, int, bool]) -> list[bytes]:
    """IPv6 fragments of a packet (RFC 8200 section 4.5) from one offset to another, with whether more follow."""
    made, number = [], random.getrandbits(32)
    for begin, end, more in pieces:
        header = struct.pack(">BBHI", packet[6], 0, begin | more, number)
        piece = header + packet[40:][begin:end]
        made.append(packet[:4] + struct.pack(">HB", len(piece), 44) + packet[7:40] + piece)
    return made


def tcp_packet(source: IPv6Address, destination: IPv6Address, port: int, flags: int, from_port: int = 443, data: bytes = b"") -> bytes:
    """A TCP segment with a right checksum."""
    made = between(source, destination, struct.pack(">HHIIBBHHH", from_port, port, 1, 1, 5 << 4, flags, 1000, 0, 0) + data, TCP)
    checksum = ~internet_sum(made[8:40] + struct.pack(">II", len(made) - 40, TCP) + made[40:]) & 0xFFFF
    return made[:56] + struct.pack(">H", checksum) + made[58:]


def with_extension(packet: bytes, kind: int, header: bytes) -> bytes:
    """The packet with an extension header of this kind, whose first byte is filled in."""
    body = bytes([packet[6]]) + header[1:] + packet[40:]
    return packet[:4] + struct.pack(">HB", len(body), kind) + packet[7:40] + body


def attacks(source: IPv6Address, target: IPv6Address, opened: int) -> Iterator[bytes]:
    """Packets that have to stay outside; `opened` is an opened TCP port of this target."""
    closed = opened + 1
    for flags in (0x02, 0x12, 0x10, 0x04, 0x11, 0x00, 0x29):  # SYN, SYN and ACK, ACK, RST, FIN and ACK, none, "xmas"
        yield tcp_packet(source, target, closed, flags)
    yield udp_between(source, target, b"an answer?", 53)
    syn = tcp_packet(source, target, closed, 0x02)
    long_syn = tcp_packet(source, target, closed, 0x02, data=bytes(24))
    for kind, header in (
        (0, bytes([0, 0, 1, 4, 0, 0, 0, 0])),  # hop-by-hop
        (60, bytes([0, 0, 1, 4, 0, 0, 0, 0])),  # destination options
        (43, bytes([0, 2, 0, 1, 0, 0, 0, 0]) + target.packed),  # routing headers of types 0, 2, 4
        (43, bytes([0, 2, 2, 1, 0, 0, 0, 0]) + target.packed),
        (43, bytes([0, 2, 4, 0, 0, 0, 0, 0]) + target.packed),
        (51, bytes([0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]) + bytes(12)),  # authentication, which says what it likes
        (135, bytes([0, 0, 0, 0, 0, 0, 0, 0])),  # mobility
    ):
        yield with_extension(syn, kind, header)
        yield (
            with_extension(tcp_packet(source, target, opened, 0x02), 51, header)
            if kind == 51
            else with_extension(with_extension(syn, kind, header), 60, header[:8])
        )
    for kind in (4, 41, 47, 50, 59, 103, 132, 253):
        yield between(source, target, syn[40:], kind)
    for kind in (0, 129, *range(130, 138), 139, 140, 143, 151, 200, 255):  # ICMPv6: answers, multicast and neighbour discovery, others
        yield icmp_between(source, target, kind, bytes(4) + target.packed)
    yield from fragments(long_syn, (0, 24, True), (24, 44, False))
    yield from fragments(long_syn, (24, 44, False), (0, 24, True))
    yield from fragments(long_syn, (0, 8, True), (8, 44, False))
    yield from fragments(long_syn, (0, 44, False))
    yield from fragments(long_syn, (8, 44, False))
    # Half of an opened one first, and then other ports over it.
    yield from fragments(tcp_packet(source, target, opened, 0x02, data=bytes(24)), (0, 16, True))
    yield from fragments(long_syn, (0, 24, True), (16, 44, False))
    yield from fragments(long_syn, (8, 44, False), (0, 8, True))


AFTER = """table inet after {
    chain input { type filter hook input priority 10; ip6 saddr 2001:db8:bad::/48 counter; }
    chain forward { type filter hook forward priority 10; ip6 saddr 2001:db8:bad::/48 counter; ip6 saddr 2001:db8:1bad::1 counter; }
}"""


@pytest.mark.waits
def test_what_a_hostile_server_sends_stays_outside_even_without_the_ingress_filter(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    prefix = IPv6Network(f"{tunnel.pool[0]}/64")
    with tun6_with(tmp_path, "tun6.IngressFilter.permits = lambda *_: True"), ServerByHand(lab, tunnel) as server, ExitStack() as undo:
        client = tunnel.client(firewall="yes", open="::10 tcp 4430, this tcp 4430")
        sock = undo.enter_context(server.accept(None))
        client.prefix()
        host = IPv6Address(undo.enter_context(lan_behind(lab, prefix)))
        link_local = next(
            IPv6Address(entry["local"])
            for link in json.loads(lab.ip("client", "-6 -j addr show dev eth0"))
            for entry in link["addr_info"]
            if entry["scope"] == "link"
        )
        undo.enter_context(changed(lab, "client", "addr add fd00:9::2/64 dev eth0 nodad"))
        assert lab.run("client", "nft", AFTER).returncode == 0
        undo.callback(lab.run, "client", "nft", "delete table inet after")
        numbers = itertools.count(1)

        def passed() -> tuple[int, int]:
            """Packets behind the firewall: those of the attacks, and those that have to be let in."""
            found = re.findall(r"saddr (\S+) counter packets (\d+)", lab.run("client", "nft", "list table inet after").stdout)
            return sum(int(n) for net, n in found if "1bad" not in net), sum(int(n) for net, n in found if "1bad" in net)

        def source() -> IPv6Address:
            return IPv6Network(f"2001:db8:bad:{next(numbers):x}::/64")[7]

        def let_in(packets: Iterable[bytes]) -> int:
            """How many of these are let in, by the time that one is which has to be."""
            before, last = passed()
            for each in packets:
                sock.sendall(each)
            sock.sendall(tcp_packet(IPv6Address("2001:db8:1bad::1"), host, 4430, 0x02, 1000 + next(numbers)))
            wait_until("the last packet passes", lambda: passed()[1] > last)
            return passed()[0] - before

        for target in (host, prefix[1], prefix[2]):
            assert let_in(attacks(source(), target, 4430)) == 0
        for target in (
            prefix[0x11],
            prefix[(0xABCD << 48) + 0x10],
            IPv6Address("2001:db8:9::10"),
            IPv6Address("ff02::1"),
            IPv6Address("ff0e::1"),
        ):
            assert let_in([tcp_packet(source(), target, 4431, 0x02)]) == 0
        for target in (IPv6Address("fd00:9::2"), link_local, IPv6Address("::1"), IPv6Address("ff02::1"), IPv6Address("ff02::2")):
            assert let_in([tcp_packet(source(), target, 4431, 0x02), udp_between(source(), target, b"", 5353)]) == 0
            assert let_in([icmp_between(source(), target, kind, bytes(20)) for kind in (133, 134, 135, 136, 137, 143)]) == 0
        good = tcp_packet(source(), prefix[1], 4430, 0x02, data=bytes(24))
        assert let_in([*fragments(good, (0, 24, True), (24, 44, False)), with_extension(good, 60, bytes([0, 0, 1, 4, 0, 0, 0, 0]))]) == 2
        before = neighbours(lab)
        let_in(icmp_between(source(), prefix[(1 << 32) + n], (128, 1, 2, 3, 4)[n % 5], bytes(100)) for n in range(2000))
        assert neighbours(lab) - before < 200  # although each comes from another network


FIREWALL_BACK = "WARNING somebody removed or changed the firewall's table inet tun6; it is back"


@pytest.mark.waits
def test_a_firewall_that_somebody_flushes_is_back_and_what_is_connected_stays(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(firewall="yes", open="this tcp 2200")
    prefix = client.prefix()
    table = table_of(lab)
    with tcp_between(lab, "client", "internet", Lab.INTERNET) as (near, far):
        for times, command in enumerate(
            (
                "flush ruleset",
                "delete table inet tun6",
                "flush table inet tun6",
                "add table inet tun6 { flags dormant; }",
                "insert rule inet tun6 input accept",
            ),
            1,
        ):
            assert lab.run("client", "nft", command).returncode == 0
            wait_until("the table is back", lambda: table_of(lab) == table, 3)
            client.said(FIREWALL_BACK, times)
            far.sendall(b"still there")
            assert near.recv(20) == b"still there"
        assert knock(lab, str(prefix[1]), 2201) == "EACCES"
        lab.run("client", "nft", "table inet other { chain tun6 { }; }; delete table inet other")
        ping(lab, "client", count=1)
        client.said(FIREWALL_BACK, times)


@pytest.mark.waits
def test_the_paths_probes_and_its_mtu_pass_the_firewall_however_many_pings_come(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    target = str(prefix_of_pool(tunnel, 0)[1])
    with socket_on(lab, "internet", kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMPV6) as sock, ExitStack() as undo:
        undo.enter_context(tun6_with(tmp_path, QUICK_PROBES))

        def flood() -> None:
            """Pings from the server's own /64, each of which is new to the connection tracking."""
            for _ in range(10):
                sock.sendto(struct.pack(">BBHI", 128, 0, 0, random.getrandbits(32)), (target, 0))

        undo.enter_context(repeated(flood, 0.002))
        server, client = tunnel.server(), tunnel.client(firewall="yes")
        assert client.prefix()[1] == IPv6Address(target)
        for program in (server, client):
            program.wait_for("DEBUG the path answers")
        lab.ip("server", "link set eth1 mtu 1400")
        try:
            transfer(lab, "client", "internet", Lab.INTERNET, 1 << 18)
        finally:
            lab.ip("server", "link set eth1 mtu 1500")


def nft_that(folder: Path, script: str) -> str:
    """A line for tun6_with: before the real nft a shell does this."""
    (folder / "bin").mkdir(exist_ok=True)
    nft = folder / "bin" / "nft"
    nft.write_text(f'#!/bin/sh\n{script}\nexec {shutil.which("nft")} "$@"\n')
    nft.chmod(0o755)
    return f"os.environ['PATH'] = '{nft.parent}:' + os.environ['PATH']"


@pytest.mark.waits
def test_without_the_firewall_that_is_wanted_there_is_no_tunnel(lab: Lab, tunnel: Tunnel, server: Program, tmp_path: Path) -> None:
    with tun6_with(tmp_path, f"os.environ['PATH'] = '{tmp_path}'"):
        for wanted in ({"firewall": "yes"}, {"lan": "eth1"}):
            assert "`apt-get install nftables`" in tunnel.failure_at_start("client", 2, **wanted)
    with tun6_with(tmp_path, nft_that(tmp_path, "echo 'Error: no nf_tables' >&2; exit 1")):
        assert "the firewall can't be set, `nft` failed: Error: no nf_tables" in tunnel.failure_at_start("client", firewall="yes")
    with tun6_with(tmp_path, nft_that(tmp_path, "exec sleep 1"), "tun6.IP_S = 0.3"):
        assert "`nft` failed: it did not end within" in tunnel.failure_at_start("client", firewall="yes")
    assert "set `firewall = yes`" in tunnel.failure_at_start("client", 2, open="this tcp 22")
    assert tun_of(lab) == {}


@pytest.mark.waits
def test_a_firewall_that_can_not_be_put_back_ends_the_tunnel_until_it_can(
    lab: Lab, tunnel: Tunnel, server: Program, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    with tun6_with(tmp_path, nft_that(tmp_path, f"[ -e {broken} ] && exit 1"), "tun6.RETRY_S = 0.2"):
        client = tunnel.client(firewall="yes")
    client.prefix()
    broken.touch()
    lab.run("client", "nft", "flush ruleset")
    client.wait_for("WARNING no connection to .*: the firewall can't be set, `nft` failed: it ended with 1")
    wait_until("the TUN goes", lambda: tun_of(lab) == {})
    broken.unlink()
    client.prefix(2)
    assert table_of(lab)


@pytest.mark.waits
def test_what_a_killed_client_left_of_a_firewall_is_found_and_two_clients_have_one_each(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    wanted = {"tun6": "yes", "-.x": "no"}  # at the next start
    killed = [tunnel.client(firewall="yes", tun=device, id=device) for device in wanted]
    for each in killed:
        each.prefix()
        each.kill()
    for device, name in ("tun6", "tun6"), ("-.x", "tun6--.x"):
        assert f'iifname != "{device}" accept' in table_of(lab, name)
        wait_until("the TUN of the killed one goes", lambda device=device: tun_of(lab, device=device) == {})  # type: ignore[misc]
    for client in [tunnel.client(firewall=firewall, tun=device, id=device) for device, firewall in wanted.items()]:
        client.prefix()
    client.said("INFO removing the firewall's table inet tun6--.x, which a killed tun6 has left", 1)
    assert [bool(table_of(lab, name)) for name in ("tun6", "tun6--.x")] == [True, False]


@pytest.mark.waits
def test_a_client_says_once_what_its_address_means_unless_the_config_says_so(tunnel: Tunnel, server: Program) -> None:
    silent = [tunnel.client(firewall="no", id="a"), tunnel.client(lan="eth1", id="b", tun="b")]
    client = tunnel.client("second")
    for each in (*silent, client):
        each.prefix()
    client.said("WARNING the whole IPv6 Internet reaches this machine .*`firewall = yes`", 1)
    assert not any("the whole IPv6 Internet" in each.log() for each in silent)


@pytest.mark.waits
def test_a_client_with_a_lan_has_a_firewall_and_says_which_other_one_drops_what_it_forwards(
    lab: Lab, tunnel: Tunnel, server: Program, tmp_path: Path
) -> None:
    with tun6_with(tmp_path, OFTEN):
        client = tunnel.client(lan="eth1")
    prefix = client.prefix()
    assert table_of(lab)
    with firewall(lab, "inet mine", FIREWALLS["inet mine"][0], "client"):
        client.said(f"WARNING the firewall's chain inet mine onward .*tun6 and {prefix}: the LAN can reach this machine only", 1)
    client.said("INFO the firewall's chain inet mine onward does not stand in the way of the LAN", 1)
    assert client.log().count("WARNING the firewall") == 1


# ---- end to end: TLS and keys ----------------------------------------------------------------------------------------


SECRET = "s" * 43


@pytest.fixture
def open_server(site: Site) -> Program:
    """A server with a certificate that serves everybody."""
    return site.serve(keys=None)


@pytest.fixture
def key(site: Site) -> str:
    """The key of the Id "a"."""
    return site.issue("a")


@pytest.fixture
def keyed_server(site: Site, key: str) -> Program:
    """A server that serves "a" alone, with its key."""
    return site.serve()


@pytest.mark.waits
@pytest.mark.parametrize("mtu", [1280, 1500, 65_500])
def test_a_client_with_its_key_pings_and_moves_bulk_both_ways_over_tls(lab: Lab, site: Site, key: str, mtu: int) -> None:
    server = site.serve(mtu=mtu)
    client = site.client("a", key, mtu=mtu)
    prefix = client.prefix()
    assert prefix == IPv6Network(f"{site.tunnel.pool[0]}/64")
    server.wait_for(f"'a' from .*: has {prefix} on .*, over TLS")
    client.said(f"'a' at .*: has {prefix} on tun6, over TLS", 1)
    for size in (0, 56, 1440, 3000, 60_000):
        ping(lab, "client", size=size)
        ping(lab, "internet", str(prefix[1]), size=size)
    bulk = 24 << 20 if mtu == 1500 else 4 << 20
    transfer(lab, "client", "internet", Lab.INTERNET, bulk)
    transfer(lab, "internet", "client", str(prefix[1]), bulk)
    for program in (server, client):
        assert key not in program.log()


@pytest.mark.waits
def test_a_client_over_tls_comes_back_to_a_server_that_was_killed(lab: Lab, site: Site, key: str, keyed_server: Program) -> None:
    client = site.client("a", key)
    prefix = client.prefix()
    keyed_server.kill()
    site.serve()
    assert client.prefix(times=2) == prefix
    ping(lab, "client")


@pytest.mark.waits
def test_a_legacy_client_inside_tls_gets_its_packets_inside_tls_too(lab: Lab, site: Site, key: str, keyed_server: Program) -> None:
    peer = site.peer("a", key, bare=True).connected()
    for _ in range(3):
        peer.echo()
    with socket_on(lab, "internet") as sender:
        for number in range(200):
            sender.sendto(struct.pack(">I", number) + bytes(1000), (str(peer.prefix[1]), 9))
    came: list[int] = []
    while len(came) < 200:
        _, packet = peer.frame()
        if packet[6] == UDP:
            came += struct.unpack(">I", packet[48:52])
    assert came == list(range(200))
    peer.echo()


HELLO = hello("cut } { anyhow", None, [])
CUTS = st.sets(st.integers(1, 100) | st.integers(1, 600) | st.integers(1, 16_000), max_size=6)


@pytest.mark.waits
@settings(FEW_EXAMPLES, max_examples=8)
@example(flights=set(range(3, 2000, 20)), records=set(range(1, 50)), segments=set(range(23, 1150, 23)), hold_last=False)  # of one byte
@example(flights=set(), records=set(), segments=set(), hold_last=True)  # all in one record, in the flight that ends the handshake
@example(flights=set(), records=set(range(len(HELLO), 16_000, 1458)), segments=set(), hold_last=True)  # there, in one each
@given(flights=CUTS, records=CUTS, segments=CUTS, hold_last=st.booleans())
def test_however_tls_is_cut_into_records_and_segments_the_session_works(
    site: Site, open_server: Program, flights: set[int], records: set[int], segments: set[int], hold_last: bool
) -> None:
    prefix = site.visit("cut } { anyhow")
    stream = HELLO + b"".join(bytes(10) + echo_request(prefix[1], number, 1400) for number in range(50, 60))
    with site.connect(cut=lambda flight: parts_of(flight, flights), hold_last=hold_last) as peer:
        send_segments(peer.tls.raw, parts_of(b"".join(map(peer.tls.encrypt, parts_of(stream, records))), segments))
        assert peer.connected().prefix == prefix
        for number in range(50, 60):
            peer.expect_reply(number)
        peer.echo()


@pytest.mark.waits
@pytest.mark.parametrize("together", [True, False])
def test_packets_directly_behind_the_servers_answer_are_delivered(lab: Lab, site: Site, together: bool) -> None:
    own, body = site.tunnel.pool[1], struct.pack(">HH", 7, 7) + bytes(16)
    answer = json.dumps({"Prefix": f"{site.tunnel.pool[0]}/64", "Offload": []}).encode()
    request = icmp_between(ABROAD, own, 128, body)
    with ServerByHand(lab, site.tunnel) as server:
        site.client("a", SECRET)
        raw, _ = server.sock.accept()
        raw.settimeout(10)
        with tun6.server_tls_context(str(site.cert)).wrap_socket(raw, server_side=True) as sock:
            hello = json.loads(sock.recv(4096))
            assert (hello["Id"], hello["Key"], sorted(hello)) == ("a", SECRET, ["Id", "Key", "Offload"])
            for part in [answer + bytes(10) + request] if together else [answer, bytes(10), request[:50], request[50:]]:
                sock.sendall(part)
            received_up_to(sock, icmp_between(own, ABROAD, 129, body)[8:])  # all of the reply behind the hop limit


@pytest.mark.waits
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(site: Site, open_server: Program, version: ssl.TLSVersion) -> None:
    context = trusting()
    context.minimum_version = context.maximum_version = version
    peer = site.tunnel.connect()
    peer.sock = context.wrap_socket(peer.sock)
    peer.hello("a", [])
    peer.connected().echo()


@pytest.mark.waits
def test_older_tls_is_not_spoken(site: Site, open_server: Program) -> None:
    context = trusting()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)version"):
        context.wrap_socket(site.tunnel.connect().sock)


@pytest.mark.waits
def test_garbage_behind_the_first_byte_of_tls_ends_its_own_connection_alone(lab: Lab, site: Site, open_server: Program) -> None:
    live, hello = site.peer("live").connected(), tls_client_hello()
    for garbage in (
        b"\x16",
        b"\x16\x03\x01",
        b"\x16" * 1000,
        b"\x16\x03\x01\xff\xff" + bytes(5000),
        b"\x16\x03\x01\x00\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + os.urandom(5000),
        b'\x16{"Id": "a"}',
        b"\x16\0\0" + hello[3:],  # another version
        hello[:-1],
        hello[:43] + os.urandom(len(hello) - 43),
        hello + hello,
        hello + b'{"Id": "a"}' + bytes(100),
        hello + os.urandom(20_000),
    ):
        with site.tunnel.connect() as peer:
            peer.sock.sendall(garbage)
            with suppress(OSError):
                peer.half_close()
            peer.ended()
        live.echo()
    no_hello = site.connect()
    no_hello.tls.raw.sendall(os.urandom(100))
    no_hello.half_close()
    with suppress(ssl.SSLError):
        no_hello.ended()
    session = site.peer("a")
    session.connected().echo()
    session.tls.raw.sendall(b"\x17\x03\x03\x00\x20" + os.urandom(32))
    wait_until("its session ends", lambda: server_routes(lab) == {str(live.prefix)})
    live.echo()


@pytest.mark.waits
@pytest.mark.parametrize("over_tls", [False, True], ids=["plain", "TLS"])
def test_peers_that_stop_in_the_handshake_keep_their_host_out_for_a_second(site: Site, open_server: Program, over_tls: bool) -> None:
    stopped = [site.tunnel.connect() for _ in range(tun6.HANDSHAKES_PER_HOST_MAX)]
    for peer, said in zip(stopped, itertools.cycle([tls_client_hello()[:200], b"\x16"] if over_tls else [b"{"])):
        peer.sock.sendall(said)
    site.tunnel.visit("elsewhere", "server")
    served(site.visit if over_tls else site.tunnel.visit, "late", "second", 3)  # they have a second before one has to go
    assert stopped[0].ended() in ("closed", "reset")


@pytest.mark.waits
def test_a_server_that_is_slow_itself_sends_nobody_away(site: Site, tmp_path: Path) -> None:
    slow = ("wait = tun6.TlsStream._wait_for", "tun6.TlsStream._wait_for = lambda *arguments: time.sleep(0.02) or wait(*arguments)")
    with tun6_with(tmp_path, *slow):
        site.serve(keys=None)

    def come(number: int, peer: Peer) -> dict[str, Any]:
        peer.sock.settimeout(30)
        peer.sock = cast(socket.socket, TlsSocket(peer.sock))
        peer.hello(f"client {number}", [])
        return peer.answer()

    peers = [site.tunnel.connect("server", f"127.0.4.{1 + number}") for number in range(tun6.HANDSHAKES_MAX + 32)]
    with ThreadPoolExecutor(len(peers)) as pool:
        answers = list(pool.map(come, count(), peers))
    assert [answer for answer in answers if "Prefix" not in answer] == []


@pytest.mark.waits
def test_who_talks_tls_without_end_instead_of_hello_is_refused_and_delays_nobody(site: Site, open_server: Program) -> None:
    live = site.tunnel.peer("live", host="second").connected()
    live.echo()
    hostile = site.connect()
    with suppress(ConnectionError):
        hostile.tls.raw.sendall(hostile.tls.new_keys(100_000))
    open_server.wait_for("refused, bad hello: more than 32768 bytes of TLS", seconds=5)
    live.echo()


GETS = {
    "served": r": has \S+ on",
    "no TLS": "no connection to .*TLS failed: the other side does not speak TLS; trying again every 2 s",
    "denied": "no connection to .*: denied: .* every 60 s",
    "tls-required": "no connection to .*: tls-required: .* every 60 s",
}


@pytest.mark.waits
@pytest.mark.parametrize(
    ("without", "gets"),
    [
        pytest.param(["cert", "keys"], ["served", "no TLS", "no TLS", "served", "no TLS"], id="open, plain only"),
        pytest.param(["keys"], ["served", "served", "served", "served", "served"], id="open, with cert"),
        pytest.param([], ["tls-required", "denied", "served", "tls-required", "served"], id="keyed"),
    ],
)
def test_each_kind_of_server_serves_or_refuses_each_kind_of_client(site: Site, without: list[str], gets: list[str]) -> None:
    expected = dict(zip(["plain", "tls", "key", "legacy by hand", "tls by hand"], gets))
    keys = {id_: site.issue(id_) for id_ in ("key", "tls by hand")}
    server = site.serve(**dict.fromkeys(without))
    programs = {}
    for id_, known in {"plain": (None, None), "tls": (site.fingerprint, None), "key": (site.fingerprint, keys["key"])}.items():
        programs[id_] = site.tunnel.client(id=id_, tun=f"tun6-{id_}", default_route="no", fingerprint=known[0], key=known[1])
    for id_, program in programs.items():
        program.wait_for(GETS[expected[id_]])
    if expected["legacy by hand"] == "served":
        site.tunnel.visit("legacy by hand")
    else:
        assert site.tunnel.refusal("legacy by hand")["Error"] == expected["legacy by hand"]
    if expected["tls by hand"] == "served":
        site.peer("tls by hand", keys["tls by hand"], bare=True).connected().echo()
    else:
        peer = site.tunnel.connect()
        peer.sock.sendall(tls_client_hello())
        assert peer.answer() == {"Error": "bad-hello", "Text": "it speaks TLS, and there is no `cert` in config.ini"}
    served = {id_ for id_, what in expected.items() if what == "served"}
    assert set(server.said(r"INFO '(.+?)' from .*: has ", len(served))) == served
    assert set(re.findall(r"INFO '(.+?)' from .*, over TLS", server.log())) == served & {"tls", "key", "tls by hand"}


@pytest.mark.waits
def test_an_id_that_has_a_key_is_served_with_it_only(lab: Lab, site: Site, key: str, keyed_server: Program) -> None:
    for number in range(2):  # as well before as after it had a session
        assert site.answer("a", None)["Error"] == "denied"
        assert site.answer("a", "")["Error"] == "denied"
        assert site.tunnel.refusal("a")["Error"] == "tls-required"
        plain = site.tunnel.connect()
        plain.sock.sendall(hello("a", key, []))  # not even with its key, which it should not have told
        assert plain.answer()["Error"] == "tls-required"
        assert not server_devices(lab)
        assert site.assignments.exists() == bool(number)
        site.visit("a", key)
        wait_until_no_sessions(lab)


@pytest.mark.waits
def test_what_is_no_text_is_no_key(site: Site, keyed_server: Program) -> None:
    wrong: object
    for wrong in (7, None, [], {"sha256": ""}, True):
        peer = site.connect()
        peer.sock.sendall(json.dumps({"Id": "a", "Key": wrong}).encode())
        assert peer.answer() == {"Error": "bad-hello", "Text": "Key is not a string"}


@pytest.mark.waits
def test_a_stranger_with_the_id_of_a_live_client_changes_nothing_and_costs_it_no_ping(lab: Lab, site: Site) -> None:
    key, other = site.issue("victim"), site.issue("other")
    server = site.serve()
    victim = site.client("victim", key)
    victim.prefix()
    ping(lab, "client")
    before = site.keys.read_bytes(), site.assignments.read_bytes(), server_devices(lab)
    with lab.popen("client", "ping", "-6", "-i", "0.02", "-c", "200", "-w", "15", Lab.INTERNET, stdout=subprocess.PIPE) as pings:
        stranger = site.client("victim", other, "second")  # a right key, but of another Id
        stranger.wait_for(
            "WARNING no connection to .*: denied: unknown Id or wrong key;"
            " the server won't serve this client until its operator changes that; trying again every 60 s"
        )
        answers = [site.answer("victim", each) for each in ("", other, key[:-1], None)] + [site.answer("unknown", key)]
        assert answers == [{"Error": "denied", "Text": "unknown Id or wrong key"}] * 5
        assert site.tunnel.refusal("victim")["Error"] == "tls-required"
        came = set(map(int, re.findall(r"icmp_seq=(\d+) ", pings.communicate(timeout=20)[0])))
        assert came >= set(range(1, 200)), "a ping of the victim was lost"  # `ping` may leave before the last one comes
    assert (site.keys.read_bytes(), site.assignments.read_bytes(), server_devices(lab)) == before
    assert len(re.findall("no connection", stranger.log())) == 1  # of attempts every 2 s there would be three by now
    server.said("refused, denied: 'victim', wrong key", 5)
    server.wait_for("refused, denied: 'unknown', unknown Id")
    server.wait_for("refused, tls-required: 'victim' without TLS")
    assert victim.log().count(": has ") == 1
    assert other not in server.log()


@pytest.mark.waits
def test_a_newcomer_that_waits_is_not_served_when_its_id_is_revoked(lab: Lab, site: Site, key: str, keyed_server: Program) -> None:
    for _ in range(tun6.CONTENTION_TAKEOVERS + 1):
        last = site.peer("a", key).connected()
    newcomer = site.peer("a", key)
    keyed_server.wait_for("take it from each other")
    site.clients("revoke", "a")
    assert last.ended() == "closed"
    newcomer.sock.settimeout(10)
    assert newcomer.answer()["Error"] == "revoked"
    wait_until_no_sessions(lab)


@contextmanager
def listening(lab: Lab, port: int, serve: Callable[[socket.socket], bytes]) -> Iterator[list[bytes]]:
    """Serves each connection in a thread by this function, which returns what the peer said; gives the list of that."""
    with lab.inside("server"):
        listener = socket.create_server((Lab.SERVER, port))
    said: list[bytes] = []

    def run() -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.settimeout(5)
                with sock:
                    said.append(serve(sock))

    with listener, ThreadPoolExecutor(1) as threads:
        threads.submit(run)
        try:
            yield said
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.waits
def test_a_man_in_the_middle_with_another_certificate_gets_neither_id_nor_key(lab: Lab, site: Site) -> None:
    key = site.issue("who I am")
    server = site.serve()
    other = make_certificate(site.folder / "other.pem")
    context = tun6.server_tls_context(str(site.folder / "other.pem"))

    def relay(sock: socket.socket) -> bytes:
        """Ends TLS on both sides; gives what the client said."""
        said = b""
        raw = socket_on(lab, "server", socket.AF_INET, socket.SOCK_STREAM)
        with raw, suppress(OSError), context.wrap_socket(sock, server_side=True) as to_client:
            raw.settimeout(5)  # a client that is deceived would otherwise keep the test for ever
            raw.connect((Lab.SERVER, site.tunnel.port))
            with trusting().wrap_socket(raw) as to_server:
                while more := to_client.recv(1 << 16):
                    said += more
                    to_server.sendall(more)
                    to_client.sendall(to_server.recv(1 << 16))
        return said

    with listening(lab, site.tunnel.port + 5000, relay) as said:
        victim = site.client("who I am", key, remoteport=site.tunnel.port + 5000)
        victim.wait_for(f"WARNING no connection to .*the server's certificate has another fingerprint, {other}; nothing was said to it")
        wait_until("it tries again", lambda: len(said) >= 2)
        with Peer(lab, site.tunnel.port + 5000) as gullible:  # the same man gets what a client says that takes any certificate
            gullible.sock = trusting().wrap_socket(gullible.sock)
            gullible.hello("gullible")
            assert gullible.answer()["Error"] == "denied"
        wait_until("he has heard that one", lambda: said[-1])
        assert said[-1] == b'{"Id": "gullible"}'
        assert not any(said[:-1])
    assert "who I am" not in server.log()
    assert not victim.log().count(": has ")


@pytest.mark.waits
def test_a_client_with_a_key_never_falls_back_to_a_plain_server(lab: Lab, site: Site) -> None:
    answers = iter([b"", b'{"Error": "bad-hello", "Text": "?"}', json.dumps({"Prefix": f"{site.tunnel.pool[0]}/64"}).encode()])

    def answer_plainly(sock: socket.socket) -> bytes:
        first = sock.recv(1 << 16)
        sock.sendall(next(answers, b""))
        sock.shutdown(socket.SHUT_WR)
        return first + all_of(sock)

    with listening(lab, site.tunnel.port, answer_plainly) as said:
        client = site.client("who I am", SECRET)
        wait_until("it has tried all answers", lambda: len(said) >= 4)
        assert all(each[0] == 0x16 for each in said)
        client.stop()
    for text in (b"who I am", SECRET.encode(), b"Id"):
        assert text not in b"".join(said)
    assert ": has " not in client.log()
    assert not any(address.startswith("2001:") for address in addresses(lab))


@pytest.mark.waits
@pytest.mark.parametrize("how", [{"tls": "yes"}, {"key": SECRET}], ids=["tls", "key"])
def test_without_fingerprint_a_certificate_needs_an_authority(site: Site, how: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    authority, signed = site.folder / "authority.pem", site.folder / "signed.pem"
    make_certificate(authority, "-subj", "/CN=an authority")
    by = ("-CA", str(authority), "-CAkey", str(authority))
    make_certificate(signed, "-subj", "/CN=tun6", "-addext", f"subjectAltName=IP:{Lab.SERVER}", *by)
    site.serve(cert=signed.name, keys=None)
    client = site.tunnel.client("client", **how)
    client.wait_for("no connection to .*: the server's certificate is not to be trusted: unable to get local issuer certificate; trying")
    client.stop()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    site.tunnel.client("client", **how).prefix()


@pytest.mark.waits
def test_without_fingerprint_a_certificate_of_another_name_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificate(site.cert, "-subj", "/CN=tun6", "-addext", "subjectAltName=IP:192.0.2.1")
    site.serve(keys=None)
    monkeypatch.setenv("SSL_CERT_FILE", str(site.cert))
    site.tunnel.client(tls="yes").wait_for("the server's certificate is not to be trusted: IP address mismatch.*10.9.0.1")


@pytest.mark.waits
def test_an_expired_certificate_is_taken_by_its_fingerprint(site: Site) -> None:
    """A Raspberry Pi has no clock."""
    again = ["openssl", "x509", "-in", str(site.cert), "-signkey", str(site.cert), "-days", "-1"]
    expired = subprocess.run(again, capture_output=True, text=True, check=True).stdout
    site.cert.write_text(site.cert.read_text().partition("-----BEGIN CERTIFICATE-----")[0] + expired)
    site.fingerprint = fingerprint_in(expired)
    site.serve(keys=None)
    site.client("a", None).prefix()


@pytest.mark.waits
def test_another_certificate_is_told_even_when_the_outage_began_with_silence(site: Site, open_server: Program) -> None:
    client = site.client("a", None)
    client.prefix()
    open_server.stop()
    client.wait_for("WARNING no connection to .*: (the peer closed the connection|Connection re)")
    make_certificate(site.cert)
    site.serve(keys=None)
    client.wait_for("no connection to .* another fingerprint")
    assert "WARNING no connection" in next(line for line in client.log().splitlines() if "another fingerprint" in line)


# ---- end to end: one pool --------------------------------------------------------------------------------------------


def routes_to(lab: Lab, prefix: IPv6Network) -> dict[int, str]:
    """The devices of the server's routes to this /64, by metric."""
    return {route["metric"]: route["dev"] for route in json.loads(lab.ip("server", f"-6 -j route show {prefix} type unicast"))}


def test_a_client_that_goes_to_another_server_keeps_its_prefix_and_the_newest_session_wins(
    lab: Lab, tunnel: Tunnel, shared: SharedPool
) -> None:
    def only_route(epoch: int) -> bool:
        return list(routes_to(lab, prefix_of_pool(tunnel, 0))) == [tun6.METRIC_MAX - epoch]

    servers, peers = [shared.server(), shared.server()], [shared.peer(0)]
    assert peers[0].answer()["Epoch"] == 1
    for epoch in range(2, 6):
        old, new = epoch % 2, 1 - epoch % 2
        peers.append(shared.peer(new))
        assert peers[-1].answer() == {"Prefix": str(prefix_of_pool(tunnel, 0)), "Offload": mock.ANY, "Dry": True, "Epoch": epoch}
        peers[-1].echo()
        assert peers[-2].ended() == "closed"
        servers[old].wait_for(f"'a' from .*: gone, server {tunnel.port + new} has it now", epoch // 2)
        wait_until("the route of the older session is gone", functools.partial(only_route, epoch))


def test_whom_another_server_has_served_meanwhile_is_not_answered(lab: Lab, tunnel: Tunnel, shared: SharedPool) -> None:
    slow = "make = tun6.Tun.set_offload; tun6.Tun.set_offload = lambda self, kinds: (tun6.gevent.sleep(1), make(self, kinds))[1]"
    servers = [shared.server(slow), shared.server()]
    old = shared.peer(0)
    wait_until("the first has begun", lambda: shared.row()[1] == 1)
    new = shared.peer(1).connected()
    assert old.answer() == {"Error": "busy", "Text": "a newer connection has this Id"}
    servers[0].wait_for(f"refused, busy: server {tunnel.port + 1} has it now")
    new.echo()
    assert list(routes_to(lab, new.prefix)) == [tun6.METRIC_MAX - 2]


def test_a_legacy_client_of_a_cluster_is_told_nothing_new(shared: SharedPool) -> None:
    shared.server()
    peer = shared.peer(0, Offload=None, Epoch=7)
    assert list(peer.answer()) == ["Prefix"]
    peer.echo()
    assert shared.row()[1] == 1


def test_a_clients_epoch_counts_only_when_it_proved_its_key(site: Site, shared: SharedPool, tunnel: Tunnel) -> None:
    key = site.issue("a")
    shared.server(cert=site.cert, keys=site.keys, keys_required="no")
    for id_, epoch in (("a", 801), ("b", 1)):
        with site.connect() as peer:
            peer.sock.sendall(json.dumps({"Id": id_, "Offload": [], "Epoch": 800, "Key": key}).encode())
            assert peer.answer()["Epoch"] == epoch


def test_while_the_store_is_down_sessions_go_on_known_clients_are_served_and_new_ones_refused(
    lab: Lab, tunnel: Tunnel, shared: SharedPool
) -> None:
    server = shared.server()
    stays = shared.peer(0, "stays").connected()
    shared.peer(0).connected().close()
    with shared.down():
        peer = shared.peer(0)
        assert peer.answer()["Epoch"] == 2
        peer.echo()
        assert shared.peer(0, "new").answer() == {"Error": "server-error", "Text": "the server can't serve a new client at the moment"}
        stays.echo()
    wait_until("the store knows of it", lambda: shared.row()[1] == 2)
    for each in (stays, peer, shared.peer(0, "new").connected()):
        each.echo()
    assert not re.search("stays.*gone", server.log())


def test_a_limit_holds_on_whichever_server_the_session_is_and_the_default_is_that_servers(tunnel: Tunnel, shared: SharedPool) -> None:
    servers = [shared.server(limit="200M"), shared.server(limit="300M")]

    def holds(number: int, own: int | None, limit: int | None) -> bool:
        (entry,) = asked(servers[number].config, "clients", "list", "--here")
        return [entry["limit"], entry["session"]["limit"]] == [own, limit]

    first = shared.peer(0, Offload=["tso6"])
    assert "tso6" in first.answer()["Offload"] and holds(0, None, 200 * MBIT)
    for rate, own, limit in (("300k", 300_000, 300_000), ("none", 0, None), ("default", None, 200 * MBIT), ("10M", 10 * MBIT, 10 * MBIT)):
        asked(servers[1].config, "clients", "limit", "a", rate)
        wait_until(f"{rate} holds", functools.partial(holds, 0, own, limit), 2)
    second = shared.peer(1, Offload=["tso6"])
    assert (second.answer()["Offload"], holds(1, 10 * MBIT, 10 * MBIT)) == ([], True)  # from its beginning on
    asked(servers[0].config, "clients", "limit", "a", "default")
    wait_until("the default of this server holds", functools.partial(holds, 1, None, 300 * MBIT), 2)


def test_a_session_whose_epoch_is_raised_has_the_new_metric_without_a_gap_and_without_a_warning(
    lab: Lab, tunnel: Tunnel, shared: SharedPool
) -> None:
    server = shared.server()
    peer = shared.peer(0).connected()
    peer.echo()
    with lab.inside("server"), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as news:
        news.bind((0, tun6.DeviceMonitor.GROUPS))
        shared.change("a", 40, 0)
        wait_until("the route has its new metric", lambda: list(routes_to(lab, peer.prefix)) == [tun6.METRIC_MAX - 40])
        kinds = [kind for kind, _ in tun6.split_netlink(news.recv(1 << 16) + news.recv(1 << 16), tun6.DeviceMonitor.MESSAGE_HEADER)]
    assert kinds == [tun6.DeviceMonitor.NEWROUTE, tun6.DeviceMonitor.DELROUTE]
    peer.echo()
    for each, epoch in ((shared.peer(0, "b").connected(), 1), (peer, 40)):
        device = routes_to(lab, each.prefix)[tun6.METRIC_MAX - epoch]
        assert f"{device}: somebody" not in server.log()
        lab.ip("server", f"-6 route del {each.prefix} dev {device}")
        server.wait_for(f"WARNING TUN device {device}: somebody removed its route; it is back")
        assert list(routes_to(lab, each.prefix)) == [tun6.METRIC_MAX - epoch]
        each.echo()


# ---- end to end: administration --------------------------------------------------------------------------------------


@pytest.mark.waits
@pytest.mark.parametrize("running", [True, False], ids=["on the running server", "on its files"])
def test_an_operator_lists_adds_pins_revokes_and_restores_clients(site: Site, running: bool) -> None:
    first, third, fifth = (f"{site.tunnel.pool[number << 64]}/64" for number in (0, 3, 5))
    if running:
        site.serve()
    else:
        site.write_config()
    assert site.clients("list") == []
    added = site.clients("add", "a")
    assert (added["id"], added["prefix"], sorted(added)) == ("a", first, ["fingerprint", "id", "key", "prefix", "token"])
    tun6.KeyStore(str(site.keys)).check("a", added["key"])
    with_prefix = site.clients("add", "b c", "--prefix", third)
    assert with_prefix["prefix"] == third
    assert json.loads(site.assignments.read_text()) == {"a": first, "b c": third}
    files = site.keys.read_bytes(), site.assignments.read_bytes()
    for complaint, *arguments in (
        ("'a' has a key already; with --new-key it gets another one, and the old one ends", "add", "a"),
        ("'a' has a key already; with --new-key it gets another one, and the old one ends", "add", "a", "--prefix", third),
        (f"{third} is already the prefix of 'b c'", "add", "d", "--prefix", third),
        (f"{third} is already the prefix of 'b c'", "pin", "a", third),
        (f"2001:db8::/64 is outside {site.tunnel.pool}", "pin", "a", "2001:db8::/64"),
        (f"{site.tunnel.pool} is not a /64", "pin", "a", str(site.tunnel.pool)),
        ("it is not written like 2001:db8:1:2::/64", "pin", "a", "fe80::%eth0/64"),
        ("'nobody' has no key; `clients list` shows who has", "revoke", "nobody"),
        ("'nobody' has no key; `clients list` shows who has", "restore", "nobody"),
        ("the Id must be 1 to 64 printable characters", "add", ""),
        ("the Id must be 1 to 64 printable characters", "revoke", "x" * 65),
        ("the Id must be 1 to 64 printable characters", "add", "a\nb"),
    ):
        assert site.complaint(*arguments) == f"tun6: {complaint}\n"
    assert (site.keys.read_bytes(), site.assignments.read_bytes()) == files
    assert site.clients("pin", "a", "--", fifth)["prefix"] == fifth
    nobody = {"key": False, "revoked": False, "limit": None}
    assert site.clients("pin", "not yet here", first) == {**nobody, "id": "not yet here", "prefix": first}
    assert site.clients("revoke", "b c") == {**nobody, "id": "b c", "prefix": third, "key": True, "revoked": True}
    assert sorted(entry["id"] for entry in site.clients("list")) == ["a", "b c", "not yet here"]
    assert site.of("b c")["revoked"]
    assert site.clients("restore", "b c") == {**nobody, "id": "b c", "prefix": third, "key": True}
    tun6.KeyStore(str(site.keys)).check("b c", with_prefix["key"])
    again = site.clients("add", "a", "--new-key")
    assert again["key"] != added["key"]
    assert refusal_of(tun6.KeyStore(str(site.keys)), "a", added["key"])[0] == "denied"
    assert json.loads(site.assignments.read_text()) == {"a": again["prefix"], "b c": third, "not yet here": first}


@pytest.mark.waits
def test_what_add_prints_is_a_config_with_which_the_client_connects_and_a_pin_moves_it(lab: Lab, site: Site) -> None:
    site.serve()
    done = lab.run("server", sys.executable, TUN6, "clients", "-c", str(site.config), "add", "it's 100 % = a:b[c]")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "# EDIT THIS unless it is on the same network, as nobody else reaches this address; or name another with --address" in done.stdout
    )
    text, replaced = re.subn("(?m)^remotehost = .*$", f"remotehost = {Lab.SERVER}", done.stdout)
    assert replaced == 1
    token = tun6.decode_token(text.splitlines()[-1])
    assert [f"{key} = {value}" in done.stdout for key, value in token.items()] == [True] * 5
    assert (token["id"], token["remoteport"]) == ("it's 100 % = a:b[c]", str(site.tunnel.port))
    (site.folder / "pasted.ini").write_text(text)
    client = Program(lab, "client", "client", site.folder / "pasted.ini", site.folder / "pasted.log")
    site.tunnel._programs.append(client)
    prefix = client.prefix()
    assert f"its prefix is {prefix}." in text
    ping(lab, "client")
    (entry,) = site.clients("list")
    assert (entry["id"], entry["prefix"], entry["key"], entry["revoked"]) == ("it's 100 % = a:b[c]", str(prefix), True, False)
    session = entry["session"]
    assert session["peer"].startswith("10.9.0.2 port ")
    assert session["device"] in server_devices(lab)
    assert min(session["received"], session["sent"]) > 5 * 56
    line = run_tun6("clients", "-c", str(site.config), "list").stdout
    assert re.fullmatch(
        rf"\"it's 100 % = a:b\[c\]\"  {prefix}  has a key, connected for \d+ s from 10.9.0.2 port \d+ on tun6-\d+, \d+ bytes received,"
        r" \d+ sent, 0 packets dropped, \d+ refused\n",
        line,
    )
    moved = IPv6Network(f"{site.tunnel.pool[9 << 64]}/64")
    site.clients("pin", entry["id"], str(moved))
    assert client.prefix(times=2) == moved
    client.wait_for(f"the server changed our prefix from {prefix} to {moved}")
    ping(lab, "client")
    assert client.log().count("no connection") == 1


@pytest.mark.waits
@pytest.mark.parametrize(
    ("cert", "id_", "complaint"),
    [
        *(("site-cert.pem", id_, "config.ini") for id_ in ("a #1", "#1", "; a", "a ;b", " a", "a ")),
        *((cert, "a", f"{cert}: .*`tun6.py keygen` makes one") for cert in ("missing.pem", "keys-only.pem")),
    ],
)
def test_a_key_whose_config_ini_can_not_be_shown_is_not_made(site: Site, cert: str, id_: str, complaint: str) -> None:
    (site.folder / "keys-only.pem").write_text(site.cert.read_text().partition("-----BEGIN CERTIFICATE-----")[0])
    site.write_config(cert=cert)
    assert re.search(complaint, site.complaint("add", id_))
    assert not site.keys.exists()
    assert not site.assignments.exists()


@pytest.mark.waits
def test_options_of_clients_may_be_before_the_action_and_behind_it(site: Site) -> None:
    site.write_config()
    config = ["-c", str(site.config)]
    options = [*config, "--json"]
    for arguments in (["clients", "list", *options], ["clients", *options, "list"], [*config, "-v", "clients", "list", "--json"]):
        done = run_tun6(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.waits
def test_revoke_new_key_and_pin_end_the_live_session_at_once(site: Site, key: str) -> None:
    of_other = site.issue("other")
    server = site.serve()
    other = site.peer("other", of_other, "second").connected()
    peer = site.peer("a", key)
    prefix = peer.connected().prefix
    peer.echo()

    site.clients("revoke", "a")
    assert peer.ended()
    server.wait_for("'a' from .*: gone, it was revoked;")
    assert site.answer("a", key) == {"Error": "revoked", "Text": "this Id was revoked by the server's operator"}
    assert site.answer("a", of_other)["Error"] == "denied"
    assert site.clients("add", "new")["prefix"] not in (str(prefix), str(other.prefix))  # it stays reserved
    assert f"{prefix} is already the prefix of 'a'" in site.complaint("pin", "new", str(prefix))

    site.clients("restore", "a")
    peer = site.peer("a", key)
    assert peer.connected().prefix == prefix
    new = site.clients("add", "a", "--new-key")["key"]
    assert peer.ended()
    server.wait_for("'a' from .*: gone, it got another key;")
    assert site.answer("a", key)["Error"] == "denied"

    peer = site.peer("a", new)
    assert peer.connected().prefix == prefix
    site.clients("pin", "a", str(prefix))  # which it has
    peer.echo()
    moved = site.clients("pin", "a", f"{site.tunnel.pool[77 << 64]}/64")["prefix"]
    assert peer.ended()
    server.wait_for("'a' from .*: gone, its prefix was changed;")
    assert str(site.visit("a", new)) == moved
    other.echo()


@pytest.mark.waits
def test_a_revoked_program_says_so_and_asks_again_every_minute_only(lab: Lab, site: Site, key: str, keyed_server: Program) -> None:
    client = site.client("a", key)
    client.prefix()
    site.clients("revoke", "a")
    client.wait_for("WARNING no connection to .*: the peer closed the connection; trying again every 2 s")
    client.wait_for("WARNING no connection to .*: revoked: this Id was revoked by the server's operator; .*trying again every 60 s")
    wait_until_no_sessions(lab)


@pytest.mark.waits
def test_an_open_server_has_no_keys_to_administrate_but_prefixes(site: Site) -> None:
    site.serve(cert=None, keys=None)
    peer = site.tunnel.peer("a").connected()
    entry = site.of("a")
    assert (entry["prefix"], entry["key"], entry["revoked"]) == (str(peer.prefix), False, False)
    for action in ("add", "revoke", "restore"):
        assert site.complaint(action, "a") == (
            "tun6: this server is open to everybody; name a file with `keys` in config.ini, and restart it\n"
        )
    peer.echo()
    pinned = IPv6Network(f"{site.tunnel.pool[2 << 64]}/64")
    site.clients("pin", "a", str(pinned))
    assert peer.ended() == "closed"
    assert site.tunnel.visit("a") == pinned


@pytest.mark.waits
def test_an_open_server_gets_keys_without_a_cut(lab: Lab, site: Site) -> None:
    old, new = site.tunnel.client("client", id="old"), site.tunnel.client("second", id="new")
    open_server = site.serve(keys=None)
    prefixes = {"old": old.prefix(), "new": new.prefix()}
    open_server.stop()
    server = site.serve(keys_required="no", new_ids_per_hour=1)
    server.wait_for("WARNING open: whoever reaches port .* may claim any Id that has no key yet; `keys_required = yes` in .* closes it")
    assert (old.prefix(times=2), new.prefix(times=2)) == (prefixes["old"], prefixes["new"])
    lines = run_tun6("clients", "-c", str(site.config), "list").stdout.splitlines()
    assert {re.sub(", connected.*", "", line) for line in lines} >= {f"{id_!r}  {prefix}  no key yet" for id_, prefix in prefixes.items()}

    key = site.clients("add", "old")["key"]  # its session goes on until the client is told
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("INFO keys, limits and certificate read anew")
    ping(lab, "client", count=1)
    assert "gone, " not in server.log()
    assert site.tunnel.refusal("old")["Error"] == "tls-required"
    assert site.answer("old", None)["Error"] == "denied"
    ping(lab, "client", count=1)
    old.stop()
    keyed = site.client("old", key)
    assert keyed.prefix() == prefixes["old"]
    keyed.wait_for("over TLS")
    assert site.tunnel.visit("one more") == site.visit("one more")  # plain, and inside TLS with its own or no key
    assert site.tunnel.refusal("too many")["Text"] == "more than 1 new Ids in an hour"
    assert "Prefix" in site.answer("has a key", site.clients("add", "has a key")["key"])  # that limit is for those without
    site.clients("revoke", "old")
    assert site.answer("old", key)["Error"] == "revoked"

    server.stop()
    server = site.serve()
    new.wait_for("no connection to .*: tls-required")
    assert site.answer("new", site.clients("add", "new")["key"])["Prefix"] == str(prefixes["new"])
    server.stop()


@pytest.mark.waits
def test_sighup_reads_keys_and_certificate_anew_and_ends_only_who_may_not_come_in_any_more(site: Site) -> None:
    keys = {id_: site.issue(id_) for id_ in ("stays", "removed", "revoked", "has another key")}
    server = site.serve()
    peers = {id_: site.peer(id_, key).connected() for id_, key in keys.items()}
    entries = json.loads(site.keys.read_text())
    del entries["removed"]
    entries["revoked"]["revoked"] = True
    site.keys.write_text(json.dumps(entries))
    site.issue("has another key")
    added = site.issue("added")
    certificate = make_certificate(site.cert)
    assert site.answer("added", added)["Error"] == "denied"
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("INFO keys, limits and certificate read anew")
    for id_ in ("removed", "revoked", "has another key"):
        assert peers[id_].ended() == "closed"
        server.wait_for(f"'{id_}' from .*: gone, its key was taken away;")
    peers["stays"].echo()
    assert site.connect().tls.fingerprint() == certificate != site.fingerprint
    assert "Prefix" in site.answer("added", added)
    peers["stays"].echo()
    assert (site.answer("removed", keys["removed"])["Error"], site.answer("revoked", keys["revoked"])["Error"]) == ("denied", "revoked")


@pytest.mark.waits
@pytest.mark.parametrize("broken", ["keys", "cert", "no cert"])
def test_sighup_with_a_broken_file_keeps_keys_and_certificate(site: Site, key: str, keyed_server: Program, broken: str) -> None:
    peer = site.peer("a", key).connected()
    if broken == "keys":
        make_certificate(site.cert)
        site.keys.write_text('{"a": {}}')
    else:
        site.keys.write_text("{}")
        site.cert.write_text("-----BEGIN CERTIFICATE-----\n")
        if broken == "no cert":
            site.cert.unlink()
    keyed_server.process.send_signal(signal.SIGHUP)
    keyed_server.wait_for(f"ERROR keys and certificate stay as they were: {site.keys if broken == 'keys' else site.cert}")
    peer.echo()
    assert site.connect().tls.fingerprint() == site.fingerprint
    assert site.answer("a", "wrong")["Error"] == "denied"
    peer.echo()
    site.visit("a", key)
    assert keyed_server.process.poll() is None


@pytest.mark.waits
def test_a_socket_that_a_killed_server_left_is_replaced_and_that_of_a_live_one_is_not(site: Site) -> None:
    control = site.folder / "server.sock"
    site.serve(control=control).kill()
    assert control.exists()
    site.clients("add", "a")  # nobody listens there, so it is done on the files
    server = site.serve(control=control)
    assert "can't reach this server" not in server.log()
    added = site.clients("add", "b")
    assert site.answer("b", added["key"])["Prefix"] == added["prefix"]  # the running server knows it
    second = Site(site.tunnel, "second")
    beside_it = second.serve(control=control, listenport=site.tunnel.port + 1, prefixrange=site.tunnel.new_pool())
    beside_it.wait_for(f"WARNING control = {control}: Address already in use; `tun6.py clients` can't reach this server")
    sentence = second.complaint("add", "c")
    assert re.match(r"tun6: the server that runs here has other files, .*site-assignments.json.*; name its config.ini with -c", sentence)
    assert sorted(entry["id"] for entry in site.clients("list")) == ["a", "b"]
    assert not second.keys.exists()
    beside_it.stop()
    assert control.exists()
    assert len(site.clients("list")) == 2
    server.stop()
    assert not control.exists()
    assert len(site.clients("list")) == 2  # from the files


@pytest.mark.waits
def test_clients_do_not_touch_the_files_of_a_server_that_they_can_not_reach(site: Site) -> None:
    site.serve(control=site.folder / "elsewhere.sock")
    site.config.write_text(site.config.read_text().replace("elsewhere.sock", "wrong.sock"))
    assert re.search(r"site-assignments.json is in use by another tun6 server", site.complaint("add", "a"))
    assert not site.keys.exists()


@pytest.mark.waits
def test_without_server_and_without_assignments_file_there_is_nothing_to_administrate(site: Site) -> None:
    site.write_config(assignments=None)
    assert "no server listens at" in site.complaint("list")
    site.serve(assignments=None)
    added = site.clients("add", "a")
    assert site.answer("a", added["key"])["Prefix"] == added["prefix"]


def control_connection(site: Site) -> socket.socket:
    """A connection to the control socket of the first server; it is closed at the end."""
    sock = socket.socket(socket.AF_UNIX)
    site.tunnel._undo.callback(sock.close)
    sock.connect(str(site.folder / "0.sock"))
    sock.settimeout(5)
    return sock


@pytest.mark.waits
def test_a_request_that_no_tun6_makes_hurts_nobody(site: Site) -> None:
    site.serve()
    files = json.dumps([str(site.assignments), str(site.keys)]).encode()
    for request in (
        *(b"", b"garbage", b"{}", b'{"do": "list"}', b"{" * 9999),
        *(b'{"do": "%s", "files": %s}' % (action, files) for action in (b"_drop", b"add")),
    ):
        sock = control_connection(site)
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        answer = all_of(sock)
        assert not answer or list(json.loads(answer)) == ["error"]
        assert site.clients("list") == []


@pytest.mark.waits
def test_whoever_says_nothing_on_the_control_socket_keeps_neither_others_nor_the_end_waiting(site: Site) -> None:
    server = site.serve()
    for _ in range(20):
        control_connection(site)
    assert site.clients("list") == []
    server.stop()


@pytest.mark.waits
def test_a_server_that_ran_out_of_descriptors_can_be_administrated_when_it_has_some_again(site: Site) -> None:
    server = site.serve()
    with descriptors(server, 2):
        socks = [control_connection(site) for _ in range(5)]
        server.wait_for("ERROR control: can't accept a connection: Too many open files")
    for sock in socks:
        sock.close()
    assert site.clients("list") == []


@pytest.mark.waits
@pytest.mark.parametrize("cert", ["made.pem", None])
def test_keygen_makes_a_certificate_that_clients_accept_and_never_overwrites(site: Site, cert: str | None) -> None:
    site.write_config(cert=cert, keys=None)
    file = site.folder / (cert or "server.pem")
    done = run_tun6("keygen", "-c", str(site.config))
    assert (done.returncode, done.stderr) == (0, "")
    assert ("cert = server.pem" in done.stdout) == (cert is None)
    (fingerprint,) = re.findall("^Clients know the server by .* fingerprint = (sha256:[0-9a-f]{64})$", done.stdout, re.MULTILINE)
    assert file.stat().st_mode & 0o7777 == 0o600
    made = file.read_bytes()
    assert fingerprint == fingerprint_in(made.decode())
    sentence = only_line(run_tun6("keygen", "-c", str(site.config)), 2)
    assert sentence == f"tun6: {file} is there already, its fingerprint is {fingerprint}; move it away to make another\n"
    assert file.read_bytes() == made
    site.serve(cert=file.name, keys=None)
    site.client("a", None, fingerprint=fingerprint).prefix()
    colons = ":".join(re.findall("..", fingerprint.partition(":")[2].upper()))  # as openssl shows it
    site.client("b", None, "second", fingerprint=f"SHA256:{colons}").prefix()


@pytest.mark.waits
def test_keygen_that_can_not_make_the_file_says_so(site: Site, tmp_path: Path) -> None:
    site.write_config(cert="nowhere/server.pem", keys=None)
    assert "nowhere/server.pem can't be written: No such file" in only_line(run_tun6("keygen", "-c", str(site.config)), 1)
    site.write_config(cert="new.pem", keys=None)
    done = run_tun6("keygen", "-c", str(site.config), env={**os.environ, "PATH": str(tmp_path)})
    assert "`openssl` can't be run: No such file or directory; install it with" in only_line(done, 1)
    assert not (site.folder / "new.pem").exists()


def expect_no_server(server: Program) -> None:
    """Asking says that no server runs."""
    for arguments in ([], ["--json"]):
        assert "no server" in only_line(run_tun6("status", "-c", str(server.config), *arguments), 1)


@pytest.mark.waits
def test_status_says_how_the_running_server_is(tunnel: Tunnel, server: Program) -> None:
    began = time.monotonic()
    empty = status_of(server)
    assert empty.keys() >= {"seconds", "sessions", "assignments", "greenlets", "threads", "files", "memory", "queued", "latency"}
    assert (empty["sessions"], empty["assignments"], empty["queued"]) == (0, 0, 0)
    assert empty["greenlets"] >= 2
    assert empty["threads"] >= 1
    assert empty["files"] == pytest.approx(len(os.listdir(f"/proc/{server.process.pid}/fd")), abs=3)  # while it is asked, one more
    assert empty["memory"] == pytest.approx(memory(server), rel=0.2)
    peers = tunnel.crowd(3)
    for peer in peers:
        peer.echo()
    asked = time.monotonic()
    full = status_of(server)
    assert (full["sessions"], full["assignments"]) == (3, 3)
    assert full["files"] - empty["files"] == 6  # a socket and a TUN each
    assert 6 <= full["greenlets"] - empty["greenlets"] <= 15
    assert asked - began - 1 <= full["seconds"] <= time.monotonic() - began + 2
    assert full["latency"]["samples"] > empty["latency"]["samples"]
    assert 0 <= full["latency"]["median"] <= full["latency"]["p99"] <= full["latency"]["max"] < 10  # and not in ms
    for peer in peers:
        peer.close()
    kinds = ("sessions", "files", "greenlets")
    wait_until("all they had is released", lambda: [status_of(server)[kind] for kind in kinds] == [empty[kind] for kind in kinds])
    assert status_of(server)["assignments"] == 3

    done = run_tun6("status", "-c", str(server.config))
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^server +up for \d+s, serves {tunnel.pool} on 0.0.0.0 port {tunnel.port}$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^clients +0 connected, 3 assignments, 253 prefixes free$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^process +loop p99 .* ms, 0 bytes queued, .* MiB$", done.stdout, re.MULTILINE), done.stdout

    server.kill()
    expect_no_server(server)  # its socket is left
    server.start()
    server.wait_for(" serving ", 2)
    server.stop()
    expect_no_server(server)  # its socket has gone


@pytest.mark.waits
def test_a_server_that_stood_still_says_for_how_long(server: Program) -> None:
    wait_until("it has begun to measure", lambda: status_of(server)["latency"]["samples"] > 5)
    before = status_of(server)["latency"]["max"]
    with paused(server):
        time.sleep(before + 1)  # as long as it stands still
    wait_until("it says so", lambda: status_of(server)["latency"]["max"] >= before + 0.8)
    latency = status_of(server)["latency"]
    assert latency["max"] < before + 3
    assert latency["median"] < 0.4


def status_text(config: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_tun6("status", "-c", str(config), *words, **options)


@pytest.mark.waits
def test_a_client_says_how_it_is_before_during_and_after_an_outage(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(id="the client", grace=1)
    prefix = client.prefix()
    ping(lab, "client")
    wait_until("the rates are known", lambda: asked(client.config, "status")["rates"]["sent_packets"], 8)
    up = asked(client.config, "status")
    assert (up["side"], up["state"], up["id"], up["prefix"], up["device"]) == ("client", "up", "the client", str(prefix), "tun6")
    assert up["address"] == f"{Lab.SERVER} port {tunnel.port}"
    assert (up["outage"], up["handshakes"], up["parts"]) == (None, {"served": 1}, {})
    assert 0 < up["session"]["round_trip"] < 10
    assert up["session"]["tls"] is False
    assert up["session"]["sent"] >= 5 * 104
    assert up["sent_packets"] == up["session"]["sent_packets"] >= 5
    done = status_text(client.config)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^prefix   {prefix} on tun6$", done.stdout, re.MULTILINE)
    assert re.search(r"^path     round trip .* ms, plain, congestion control \w+, offload \w+", done.stdout, re.MULTILINE)

    server.stop()
    wait_until("it notices", lambda: status_text(client.config).returncode == 1)
    client.wait_for("IPv6 traffic is rejected")
    down = asked_status(client.config, 1)
    assert (down["state"], down["session"], down["prefix"]) == ("rejecting", None, str(prefix))
    assert (down["outage"]["reason"], down["outage"]["seconds"]) == ("the peer closed the connection", None)
    assert "rejecting for" in status_text(client.config).stdout
    server.start()
    client.prefix(2)
    again = asked(client.config, "status")
    assert again["state"] == "up"
    assert 1 <= again["outage"]["seconds"] < 20
    assert again["sent"] >= up["sent"]  # those of the session that has ended count, too
    client.stop()
    assert f"no client listens at {client.control()}" in only_line(status_text(client.config), 1)


def asked_status(config: Path, status: int) -> Any:
    """What `status --json` answers with this exit status."""
    done = status_text(config, "--json")
    assert (done.returncode, done.stderr) == (status, "")
    return json.loads(done.stdout)


@pytest.mark.waits
def test_a_client_is_connecting_while_what_is_sent_waits(tunnel: Tunnel) -> None:
    client = tunnel.client(grace="off", id="early")
    wait_until("it can be asked", lambda: client.control().exists())
    client.wait_for("no connection to")
    status = asked_status(client.config, 1)
    assert (status["state"], status["prefix"], status["handshakes"]["failed"] > 0) == ("connecting", None, True)


@pytest.mark.waits
def test_where_both_run_status_shows_both_or_the_one_that_is_named(tunnel: Tunnel, server: Program, tmp_path: Path) -> None:
    client = tunnel.client(id="one")
    client.prefix()
    both = tmp_path / "both.ini"
    both.write_text(server.config.read_text() + client.config.read_text())
    done = status_text(both)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall("^(server|client) .*up for", done.stdout, re.MULTILINE) == ["server", "client"]
    for side in ("server", "client"):
        assert asked(both, "status", side)["side"] == side
    assert "name one of them" in only_line(status_text(both, "--json"), 2)
    client.stop()
    assert asked(both, "status")["side"] == "server"
    assert "no client listens" in only_line(status_text(both, "client"), 1)
    both.write_text(f"{server.config.read_text()}\n[client]\nremotehost = 192.0.2.1\nremoteport = 1\n")  # as the config.ini of a checkout
    assert asked(both, "status")["side"] == "server"
    assert "is an example" in only_line(status_text(both, "client"), 2)


@pytest.mark.waits
def test_status_shows_the_warnings_that_stand(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    lines = ["tun6.FORWARDING_CHECK_S = 0.2"]
    with sysctl(lab, "server", "net.ipv6.conf.all.forwarding", "0"), tun6_with(tmp_path, *lines):
        server = tunnel.server(assignments=None)
        kinds = ("no `assignments` file", "open: ", "IPv6 forwarding is off")
        assert [any(text.startswith(kind) for text in status_of(server)["warnings"]) for kind in kinds] == [True] * 3
        assert "warning  open: whoever" in status_text(server.config).stdout
        lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "1")
        wait_until("it does not stand any more", lambda: not any("forwarding" in text for text in status_of(server)["warnings"]))
        lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "0")
        wait_until("it does again", lambda: any("somebody turned" in text for text in status_of(server)["warnings"]))


@pytest.mark.waits
def test_status_ends_quietly_with_its_reader_and_its_terminal_may_be_resized(tunnel: Tunnel, server: Program) -> None:
    tunnel.crowd(30)
    command = f"{sys.executable} {TUN6} status -c {server.config}"
    done = subprocess.run(["sh", "-c", f"{command} | head -1; {command} >/dev/full"], capture_output=True, text=True, timeout=30)
    assert done.stdout.startswith("server   up")
    assert (done.returncode, done.stderr) == (1, "tun6: the answer can't be written: No space left on device\n")
    main, terminal = os.openpty()
    shown = b""

    def resize(lines: int, columns: int) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def seen(pattern: bytes) -> bool:
        nonlocal shown
        while select.select([main], [], [], 0)[0]:
            shown += os.read(main, 65_536)
        return re.search(pattern, shown.rpartition(b"\x1b[H\x1b[J")[2]) is not None

    resize(24, 80)
    environment = {**os.environ}  # without COLUMNS, which readline has set behind Python's back
    words = [*command.split(), "--watch", "--sort", "rate"]
    watch = subprocess.Popen(words, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL, env=environment)
    try:
        wait_until("it shows what fits", lambda: seen(rb"rtt +drops.*\r\n(.*\r\n)+\.\.\. and \d+ lines more\r\n$"), 20)
        assert b"congestion" not in shown
        resize(50, 200)
        wait_until("it shows all, with all columns", lambda: seen(rb"congestion\r\n(client .*\r\n){30}$"), 20)
        server.stop()
        wait_until("it goes on without a server", lambda: seen(rb"no server listens at .*\r\n$"), 20)
        watch.send_signal(signal.SIGINT)
        assert watch.wait(10) == 1
        assert not seen(rb"Traceback")
    finally:
        watch.kill()
        watch.wait()
        os.close(main)
        os.close(terminal)


@pytest.mark.waits
def test_with_log_json_each_line_is_an_object_with_its_fields_in_order(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    server = tunnel.server(log="json")
    client = tunnel.client(log="json", id='hostile "\\ é')
    prefix = client.prefix()
    tunnel.connect().sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
    server.wait_for('"event": "refused"')
    client.stop()
    server.wait_for('"event": "session-end"')
    server.stop()
    events: dict[str, Any] = {}
    for program in (server, client):
        for line in program.log().splitlines():
            entry = json.loads(line)
            names = [*entry]
            assert names[:3] == ["time", "level", "message"]
            assert calendar.timegm(time.strptime(entry["time"][:19], "%Y-%m-%dT%H:%M:%S")) == pytest.approx(time.time(), abs=60)
            known = [name for name in tun6.EVENT_FIELDS if name in names]
            assert names[3:] == known
            events[f"{program.role} {entry.get('event')}"] = entry
    begin, end = events["server session-begin"], events["server session-end"]
    for event in (begin, end):
        assert (event["id"], event["prefix"], event["level"]) == ('hostile "\\ é', str(prefix), "INFO")
        assert event["message"].startswith("'hostile")
    assert (begin["device"], begin["security"]) == (end["device"], "plain")
    assert isinstance(end["sent"], int)
    assert events["client session-begin"]["device"] == "tun6"
    assert events["server refused"]["reason"] == "bad-hello"
    bad = tunnel.config("server", log="json", localhost="192.0.2.77")
    done = lab.run("server", sys.executable, TUN6, "server", "-c", str(bad), timeout=10)
    assert done.returncode == 1
    last = [json.loads(line) for line in done.stderr.splitlines()][-1]
    assert (last["level"], last["message"]) == (
        "CRITICAL",
        f"can't listen on 192.0.2.77 port {tunnel.port}: Cannot assign requested address",
    )


@contextmanager
def flood_between(lab: Lab, source: str, sink: str, address: str) -> Iterator[Callable[[], int]]:
    """Meanwhile UDP goes to this address of the sink, several Mbit/s; yields what tells how many bytes of packets came so far."""
    with socket_on(lab, source) as sender, socket_on(lab, sink) as receiver:
        receiver.bind((address, 0))
        target, came = receiver.getsockname()[:2], 0

        def exchange() -> None:
            nonlocal came
            for _ in range(5):
                with suppress(OSError):
                    sender.sendto(bytes(1200), target)
            with suppress(BlockingIOError):
                while receiver.recv(2000, socket.MSG_DONTWAIT):  # at once, as what its buffer can't hold would not count
                    came += 1248

        with repeated(exchange, 0.01):
            yield lambda: came


@pytest.mark.waits
def test_a_client_gets_no_more_than_its_limit_each_way_and_the_limit_can_be_changed_while_it_runs(lab: Lab, site: Site) -> None:
    server = site.serve(keys=None, cert=None, limit="300k")
    client = site.tunnel.client(id="a")
    address = str(client.prefix()[1])

    def check(bits: int, seconds: float) -> None:
        """So much comes through and no more, both ways at once."""
        began, before = time.monotonic(), (up(), down())
        time.sleep(seconds)
        came = up() - before[0], down() - before[1]
        most = bits / 8 * (time.monotonic() - began + tun6.CATCH_UP_S + tun6.PAUSE_MAX_S) + tun6.PACKET_MAX
        assert 0.8 * bits / 8 * seconds <= min(came) <= max(came) <= most, (came, most)

    assert site.of("a")["limit"] is None
    assert site.of("a")["session"]["limit"] == 300_000
    transfer(lab, "client", "internet", Lab.INTERNET, 20_000)
    transfer(lab, "internet", "client", address, 20_000)
    with flood_between(lab, "client", "internet", Lab.INTERNET) as up, flood_between(lab, "internet", "client", address) as down:
        wait_until("something comes each way", lambda: up() and down())
        check(300_000, 3)
        ping(lab, "client", count=3)
        assert site.clients("limit", "a", "1M")["session"]["limit"] == 1_000_000
        check(1_000_000, 1)
    Path(f"{site.assignments}.limits").write_text('{"a": 200000}')
    assert "was edited and is not read yet" in site.complaint("limit", "a", "none")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("INFO limits read anew")
    assert (site.of("a")["limit"], site.of("a")["session"]["limit"]) == (200_000, 200_000)
    site.clients("limit", "a", "none")
    began = time.monotonic()
    transfer(lab, "client", "internet", Lab.INTERNET, 2_000_000)
    transfer(lab, "internet", "client", address, 2_000_000)
    assert time.monotonic() - began < 2 * 2_000_000 * 8 / 300_000 / 2  # half of what it would take at the limit
    assert "gone, " not in server.log()
    server.stop()
    site.serve(keys=None, cert=None, limit="300k")
    client.prefix(times=2)
    assert (site.of("a")["limit"], site.of("a")["session"]["limit"]) == (0, None)
    site.clients("limit", "a", "default")
    assert (site.of("a")["limit"], site.of("a")["session"]["limit"]) == (None, 300_000)
    lines = run_tun6("clients", "-c", str(site.config), "limit", "a", "2.5M").stdout
    assert ", limited to 2.5M, connected for " in lines


def wire_bytes(lab: Lab) -> tuple[int, int]:
    """Bytes of IPv4 packets that the client has sent and received."""
    (device,) = json.loads(lab.ip("client", "-json -stats link show eth0"))
    return cast(
        "tuple[int, int]", tuple(device["stats64"][way]["bytes"] - 14 * device["stats64"][way]["packets"] for way in ("tx", "rx"))
    )  # without Ethernet's headers


def wire_rates(lab: Lab, seconds: float) -> list[float]:
    """Bits/s of these, after the first ones: the kernel does not pace the first ten segments of a connection."""
    start = wire_bytes(lab)
    wait_until("something is sent", lambda: wire_bytes(lab)[0] - start[0] > 50_000)
    before, began = wire_bytes(lab), time.monotonic()
    time.sleep(seconds)
    after, ended = wire_bytes(lab), time.monotonic()
    return [(now - earlier) * 8 / (ended - began) for now, earlier in zip(after, before)]


@pytest.fixture
def single_segments(lab: Lab) -> Iterator[None]:
    """What counts the packets between client and server counts each segment of TCP with its headers."""
    for host, most in (("client", 1), ("server", 1)):
        lab.ip(host, f"link set eth0 gso_max_segs {most}")
    yield
    for host in ("client", "server"):
        lab.ip(host, "link set eth0 gso_max_segs 65535")


@pytest.mark.waits
@pytest.mark.usefixtures("single_segments")
@pytest.mark.parametrize(("link", "tls"), [("auto", False), ("auto", True), ("real", False)])
def test_a_line_that_the_client_knows_is_not_filled_either_way(lab: Lab, site: Site, link: str, tls: bool) -> None:
    site.serve(keys=None, link=link, cert=site.cert.name if tls else None)
    client = site.tunnel.client(rate_up="1M", rate_down="2M", link=link, fingerprint=site.fingerprint if tls else None)
    address = str(client.prefix()[1])
    with flood_between(lab, "client", "internet", Lab.INTERNET) as up, flood_between(lab, "internet", "client", address) as down:
        wait_until("something comes each way", lambda: up() and down())
        rates = wire_rates(lab, 4)
    for rate, setting in zip(rates, (1_000_000, 2_000_000)):
        assert 0.8 * setting < rate < 0.97 * setting, rates
    status = status_of(client)
    assert (status["session"]["rate"], status["session"]["peer_rate"]) == (950_000, 1_900_000)
    assert not any("rate_down" in text for text in status["warnings"])
    assert any(line.endswith(", up shaped to 950k, down shaped to 1.9M") for line in tun6.format_status(status, 300))


@pytest.mark.waits
@pytest.mark.usefixtures("single_segments")
def test_with_a_legacy_server_a_client_holds_its_own_direction_and_says_that_the_server_does_not(lab: Lab, tunnel: Tunnel) -> None:
    with ServerByHand(lab, tunnel) as server, ThreadPoolExecutor() as threads:
        client = tunnel.client(rate_up="1M", rate_down="2M")
        with server.accept(None) as sock:
            reads = threads.submit(all_of, sock)
            client.wait_for(f"WARNING .*{Lab.SERVER} port {tunnel.port} does not know rate_down")
            with socket_on(lab, "client") as sender, repeated(lambda: sender.sendto(bytes(1200), (Lab.INTERNET, 9)), 0.002):
                rate, _ = wire_rates(lab, 3)
            session = status_of(client)["session"]
            client.stop()
            reads.result()
    assert 0.8e6 < rate < 0.97e6
    assert (session["rate"], session["peer_rate"]) == (950_000, None)


@pytest.mark.waits
def test_a_client_asks_each_server_for_its_rate_and_warns_while_one_does_not_know_it(lab: Lab, tunnel: Tunnel) -> None:
    with ServerByHand(lab, tunnel) as server:
        client = tunnel.client(rate_down="10M")
        answers: list[tuple[dict[str, object], int | None]] = [({}, None), ({"Rate": 9_500_000}, 9_500_000), ({"Rate": "9.5M"}, None)]
        for number, (answer, known) in enumerate(answers, 1):
            with server.accept([], **answer):
                assert server.hello["Rate"] == 9_500_000
                client.prefix(times=number)
                wait_until("it is up", lambda: status_of(client)["session"])
                status = status_of(client)
                assert (status["session"]["rate"], status["session"]["peer_rate"]) == (None, known)
                assert any("does not know rate_down" in text for text in status["warnings"]) == (known is None)
    assert len(re.findall("does not know rate_down", client.log())) == 2


@pytest.mark.waits
@pytest.mark.parametrize("offload", [None, []])
def test_a_server_answers_a_rate_that_it_holds_and_no_other(tunnel: Tunnel, server: Program, offload: list[str] | None) -> None:
    for number, (value, answered) in enumerate(
        [(10**7, 10**7), (-(10**7), None), (10**30, None), (True, None), ("10M", None), (1e7, None)]
    ):
        with tunnel.connect() as peer:
            fields = {} if offload is None else {"Offload": offload}
            peer.sock.sendall(json.dumps({"Id": f"rate {number}", "Rate": value, **fields}).encode())
            answer = peer.answer()
            assert "Prefix" in answer
            assert answer.get("Rate") == answered
    with tunnel.peer("says none", offload=offload) as peer:
        assert "Rate" not in peer.answer()


# ---- end to end: LAN -------------------------------------------------------------------------------------------------

LISTEN_SHORTLY = "tun6.LISTEN_S = 0.3"


class Advertisement(NamedTuple):
    """A router advertisement, RFC 4861 section 4.2."""

    lifetime: int
    preference: str
    prefixes: dict[str, tuple[int, int]]  # valid and preferred lifetime
    mtu: int
    dns: list[str]
    at: float  # when it came

    @classmethod
    def parse(cls, message: bytes, at: float) -> Advertisement:
        preference = {0: "medium", 1: "high", 3: "low"}[message[5] >> 3 & 3]
        prefixes, mtu, dns, options = {}, 0, [], message[16:]
        while options:
            kind, option, options = options[0], options[: options[1] * 8], options[options[1] * 8 :]
            if kind == 3:
                prefixes[f"{IPv6Address(option[16:32])}/{option[2]}"] = cast("tuple[int, int]", struct.unpack_from(">II", option, 4))
            elif kind == 5:
                mtu = int.from_bytes(option[4:8], "big")
            elif kind == 25:
                dns += [str(IPv6Address(option[at : at + 16])) for at in range(8, len(option), 16)]
        return cls(int.from_bytes(message[6:8], "big"), preference, prefixes, mtu, dns, at)


class Lan(SocketOwner):
    """The LAN behind the client: what is said there, and what its host, where nothing is configured, makes of it."""

    def __init__(self, lab: Lab, host: str, device: str) -> None:
        self.lab, self.host, self.device = lab, host, device
        self.sock = socket_on(lab, host, kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMPV6)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        self.sock.setblocking(False)
        self._heard: list[Advertisement] = []

    def heard(self) -> list[Advertisement]:
        """All router advertisements until now."""
        with suppress(BlockingIOError):
            while True:
                message, (sender, *_) = self.sock.recvfrom(2048)
                if message[0] == 134 and sender.partition("%")[0] not in self.lab.ip(self.host, f"-6 addr show dev {self.device}"):
                    self._heard.append(Advertisement.parse(message, time.monotonic()))
        return self._heard

    def hears(self, what: str, condition: Callable[[Advertisement], object], seconds: float = 10) -> Advertisement:
        """Waits until the latest one fulfils this."""
        return wait_until(what, lambda: next((each for each in self.heard()[-1:] if condition(each)), None), seconds)  # type: ignore[return-value]

    def routed(self) -> bool:
        """Whether the host has a default route from there."""
        return bool(self.lab.ip(self.host, f"-6 route show default dev {self.device} proto ra"))

    def address(self, prefix: IPv6Network) -> str:
        """The one of this prefix that the host gave itself."""
        found: list[str] = re.findall(r"inet6 (\S+)/64 scope global dynamic", self.lab.ip(self.host, f"-6 addr show dev {self.device}"))
        return next(each for each in found if IPv6Address(each) in prefix)


@contextmanager
def forgetful(lab: Lab, host: str, device: str) -> Iterator[None]:
    """What router advertisements told the host is forgotten at the end."""
    try:
        yield
    finally:
        lab.ip(host, f"-6 addr flush dev {device} dynamic")
        for root in ("default", "root 2001:db8::/32"):
            lab.ip(host, f"-6 route flush {root} dev {device}")
        lab.set_sysctl(host, f"net.ipv6.conf.{device}.mtu", "1500")


@pytest.fixture
def beyond(lab: Lab) -> Iterator[None]:
    """The server has a way to the Internet, whose first router is the Internet host."""
    with changed(lab, "server", f"-6 route add default via {Lab.INTERNET}"), sysctl(lab, "internet", "net.ipv6.conf.all.forwarding", "1"):
        yield


@pytest.fixture
def no_forwarding(lab: Lab) -> Iterator[None]:
    """The client has forwarding off, as machines have it."""
    with sysctl(lab, "client", "net.ipv6.conf.all.forwarding", "0"):
        yield


@pytest.fixture
def lan(lab: Lab, no_forwarding: None) -> Iterator[Lan]:
    with forgetful(lab, "lan", "eth0"), Lan(lab, "lan", "eth0") as lan:
        yield lan


def lan_folder(lab: Lab) -> Path:
    """Where the client keeps radvd's files and what it has changed."""
    with lab.inside("client"):
        return tun6.RUNTIME_FOLDER / f"tun6-{os.stat('/proc/thread-self/ns/net').st_ino}"


def radvds(lab: Lab) -> set[str]:
    """The process ids of the client's radvd."""
    found, folder = set(), str(lan_folder(lab))
    for process in filter(str.isdigit, os.listdir("/proc")):
        if folder in (text := tun6.read_text(Path("/proc", process, "cmdline"))) and "radvd" in text.split("\0")[0]:
            found.add(process)
    return found


def as_before(lab: Lab, before: dict[str, Any]) -> None:
    """The client is again as it was, without radvd or files of ours."""
    now = state_of(lab, "client")
    assert {name: (before.get(name), now.get(name)) for name in before.keys() | now.keys() if before.get(name) != now.get(name)} == {}
    assert not radvds(lab)
    assert not lan_folder(lab).exists()


@pytest.mark.waits
def test_a_lan_has_ipv6_by_one_line_and_afterwards_all_is_as_before(
    lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, beyond: None
) -> None:
    before = state_of(lab, "client")
    began = time.monotonic()
    client = tunnel.client(lan="eth1", lan_dns="2001:db8::53, 2001:db8::54", mtu=1400)
    wait_until("the LAN host's ping is answered", lambda: lab.pings("lan"), 20)
    print(f"FIGURE client started to LAN host's first answered ping: {time.monotonic() - began:.2f} s")
    prefix = client.prefix()
    assert asked(client.config, "status")["parts"] == {
        "lan": {"interface": "eth1", "missing": None, "announces": str(prefix), "other_router": None},
        "firewall": {"table": "inet tun6", "active": True},
    }
    host = lan.address(prefix)
    heard = lan.heard()[-1]
    assert heard[:-1] == (1800, "medium", {str(prefix): (5400, 2700)}, 1400, ["2001:db8::53", "2001:db8::54"])
    assert "mtu 1400" in lab.ip("lan", "-6 route show default")
    assert lab.pings("lan", str(prefix[1])), "the address that is announced is out of the hosts' reach"
    assert lab.pings("internet", host)
    ping(lab, "client", count=1)
    transfer(lab, "lan", "internet", Lab.INTERNET, 4 << 20)
    assert client.stop() < SERVER_ENDS_S
    end = lan.hears("the end", lambda each: not each.lifetime)
    assert end.prefixes[str(prefix)][1] == 0
    assert not lan.routed()
    as_before(lab, before)


@pytest.mark.waits
@pytest.mark.parametrize("setpriv", [True, False])
def test_a_killed_client_leaves_no_route_on_the_lan_and_the_next_one_clears_the_rest(
    lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, beyond: None, tmp_path: Path, setpriv: bool
) -> None:
    before = state_of(lab, "client")
    lines = (
        []
        if setpriv
        else ["which = tun6.shutil.which", "tun6.shutil.which = lambda name, **more: name != 'setpriv' and which(name, **more)"]
    )
    with tun6_with(tmp_path, LISTEN_SHORTLY, *lines):
        client = tunnel.client(lan="eth1", firewall="yes" if setpriv else "no")
        wait_until("the host has a route", lan.routed)
        client.kill()
        if setpriv:
            wait_until("radvd ends, and the route with it", lambda: not radvds(lab) and not lan.routed(), 3)
        assert state_of(lab, "client") != before
        (lan_folder(lab) / "changes.json.new").touch()  # as when it is killed while it writes
        again = tunnel.client(tun="tun6" if setpriv else "other")  # without `lan`, too
        again.said("removing what a killed tun6 has left for its LAN eth1", 1)
        wait_until("the host has no route", lambda: not lan.routed())
        again.prefix()
        again.stop()
        as_before(lab, before)


def routing_client(tunnel: Tunnel, lan: Lan, folder: Path) -> Program:
    """A client that is the router of the LAN, whose host has the route."""
    with tun6_with(folder, LISTEN_SHORTLY):
        client = tunnel.client(lan="eth1")
    wait_until("the host has a route", lan.routed)
    return client


@pytest.mark.waits
def test_hosts_lose_the_route_after_ten_seconds_and_notice_nothing_of_a_restart(
    lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, beyond: None, tmp_path: Path
) -> None:
    client = routing_client(tunnel, lan, tmp_path)
    prefix = client.prefix()
    server.stop()
    time.sleep(2)  # an outage of some seconds
    server.start()
    client.prefix(2)
    ping(lab, "lan", count=1)
    assert all(each.lifetime for each in lan.heard())
    server.kill()
    began = time.monotonic()
    gone = lan.hears("the route goes", lambda each: not each.lifetime, 20)
    print(f"FIGURE server's death to host's lost default route: {gone.at - began:.2f} s")
    assert 9.5 < gone.at - began < 14
    assert gone.prefixes == {str(prefix): (5400, 0)}
    assert not lan.routed()
    with changed(lab, "lan", f"-6 route add default via {prefix[1]}"):  # one that did not hear it
        wait_until("the client rejects", lambda: "unreachable" in lab.run("lan", "ping", "-6", "-c", "1", "-W", "1", Lab.INTERNET).stdout)
    server.start()
    began = time.monotonic()
    wait_until("the host has a route again", lan.routed, 8)
    print(f"FIGURE server's return to the route: {time.monotonic() - began:.2f} s")


@pytest.mark.waits
def test_a_revoked_client_tells_its_lan_at_once(lab: Lab, lan: Lan, site: Site, beyond: None, tmp_path: Path) -> None:
    key = site.issue("router")
    site.serve()
    with tun6_with(tmp_path, LISTEN_SHORTLY):
        client = site.client("router", key, lan="eth1")
    wait_until("the host has a route", lan.routed)
    site.clients("revoke", "router")
    client.wait_for("no connection to .*: (?:denied|revoked)")
    lan.hears("the route goes", lambda each: not each.lifetime, 2)


@pytest.mark.waits
def test_a_new_prefix_is_announced_beside_the_end_of_the_old_one(
    lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, beyond: None, tmp_path: Path
) -> None:
    client = routing_client(tunnel, lan, tmp_path)
    old = client.prefix()
    server.stop()
    tunnel.server(prefixrange=tunnel.new_pool(), assignments=None)
    new = client.prefix(2)
    heard = lan.hears("the new prefix", lambda each: str(new) in each.prefixes)
    assert heard.lifetime == 1800
    assert heard.prefixes[str(new)] == (5400, 2700)
    assert heard.prefixes[str(old)][1] == 0
    assert 5300 < heard.prefixes[str(old)][0] <= 5400
    wait_until("the host uses the new one", lambda: lab.pings("lan"))
    assert f"from {lan.address(new)}" in lab.run("lan", "ping", "-6", "-c", "1", "-W", "1", "-I", lan.address(new), Lab.INTERNET).stdout


@pytest.mark.waits
def test_a_lan_follows_its_client_to_a_server_with_another_prefix_and_back(
    lab: Lab, lan: Lan, tunnel: Tunnel, pair: Pair, beyond: None, tmp_path: Path
) -> None:
    prefixes = [prefix_of_pool(tunnel, 0), prefix_of_pool(tunnel, 7)]
    pair.servers[1].stop()
    pair.known["c"] = str(prefixes[1])
    servers = [pair.servers[0], pair.start(1)]
    with tun6_with(tmp_path, LISTEN_SHORTLY):
        client = pair.client(lan="eth1")
    wait_until("the host has a route", lan.routed)
    for times in (2, 3):
        at = pair.serving(client, times - 1)
        wait_until("the LAN works", lambda: lab.pings("lan"))
        servers[at].stop()
        assert pair.serving(client, times) == 1 - at
        new, old = prefixes[1 - at], prefixes[at]
        heard = lan.hears("the new prefix", lambda each: each.prefixes.get(str(new), (0, 0))[1] == 2700)  # noqa: B023
        assert (heard.lifetime, heard.prefixes[str(old)][1]) == (1800, 0)
        servers[at].start()
        servers[at].wait_for(" serving ", 2)
    wait_until("the LAN works", lambda: lab.pings("lan"))


@pytest.mark.waits
@pytest.mark.parametrize(("preference", "expected"), [("auto", "low"), ("high", "high")])
def test_another_router_is_said_and_preferred(
    lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, beyond: None, preference: str, expected: str
) -> None:
    with socket_on(lab, "lan", kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMPV6) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        advertisement = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
        deaf = sysctl(lab, "client", "net.ipv6.conf.eth1.accept_ra", "0")
        with deaf, repeated(functools.partial(other.sendto, advertisement, ("ff02::1", 0)), 0.2):
            client = tunnel.client(lan="eth1", lan_preference=preference)
            (advice,) = client.said("WARNING LAN eth1: fe80::[0-9a-f:]+ is an IPv6 router there already(.*)", 1)
            assert ("`lan_preference`" in advice) == (preference == "auto")
            assert lan.hears("ours", lambda each: each.prefixes).preference == expected
    assert not lab.ip("client", "-6 route show default proto ra")


@pytest.mark.waits
def test_the_lan_may_be_the_network_that_the_machine_has_ipv4_and_native_ipv6_from(
    lab: Lab, no_forwarding: None, tunnel: Tunnel, server: Program, beyond: None, tmp_path: Path
) -> None:
    conf = tmp_path / "native.conf"
    conf.write_text("interface eth1 { AdvSendAdvert on; MaxRtrAdvInterval 4; MinRtrAdvInterval 3; prefix 2001:db8:bbbb::/64 { }; };")
    conf.chmod(0o600)
    with ExitStack() as undo:
        undo.enter_context(forgetful(lab, "client", "eth0"))
        undo.enter_context(forgetful(lab, "lan", "eth0"))
        undo.enter_context(sysctl(lab, "nat", "net.ipv6.conf.all.forwarding", "1"))
        undo.enter_context(running(lab, "nat", "radvd", "-n", "-C", str(conf), "-p", str(tmp_path / "pid"), "-m", "none"))
        wait_until("the client has native IPv6", lambda: "proto ra" in lab.ip("client", "-6 route show default"))
        wait_until("and its address", lambda: " 2001:db8:bbbb:" in lab.ip("client", "-6 addr show dev eth0 -tentative"))
        before = state_of(lab, "client")
        nat = undo.enter_context(Lan(lab, "nat", "eth1"))
        client = tunnel.client(lan="eth0", default_route="no")
        prefix = client.prefix()
        client.said("WARNING LAN eth0: fe80::[0-9a-f:]+ is an IPv6 router there already", 1)
        nat.hears("ours", lambda each: str(prefix) in each.prefixes and each.preference == "low")
        assert "proto ra" in lab.ip("client", "-6 route show default dev eth0")
        with changed(lab, "nat", f"addr add {prefix[16]}/64 dev eth1 nodad", f"-6 route add default via {prefix[1]}"):
            ping(lab, "nat", count=1)  # a host of that network
        client.stop()
        as_before(lab, before)


@pytest.mark.waits
def test_what_others_do_to_the_lan_is_mended(
    lab: Lab, no_forwarding: None, tunnel: Tunnel, server: Program, beyond: None, tmp_path: Path
) -> None:
    new_link = f"link add usb0 type veth peer name eth9 netns {lab._names['lan']}"

    def plug_in() -> None:
        lab.ip("client", new_link)
        lab.ip("client", "link set usb0 up")
        lab.ip("lan", "link set eth9 up")

    with tun6_with(tmp_path, LISTEN_SHORTLY):
        client = tunnel.client(lan="usb0")
    prefix = client.prefix()
    client.said("WARNING LAN usb0: there is no such interface; the tunnel works without it", 1)
    ping(lab, "client", count=1)
    try:
        plug_in()
        client.said("INFO LAN usb0: it is there now", 1)
        wait_until("the host has a route", lambda: lab.ip("lan", "-6 route show default proto ra"))
        lab.ip("client", f"addr del {prefix[1]}/64 dev usb0")
        client.said(f"WARNING LAN usb0: somebody removed its address {prefix[1]}; it is back", 1)
        with Lan(lab, "lan", "eth9") as heard:
            with paused(client):
                lab.set_sysctl("client", "net.ipv6.conf.all.forwarding", "0")
                heard.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
                heard.sock.sendto(b"\x85" + bytes(7), ("ff02::2", 0))  # a router solicitation
                heard.hears("that the client is no router now", lambda each: not each.lifetime)
            client.said("WARNING LAN usb0: somebody turned IPv6 forwarding off, .*; it is on again", 1)
            heard.hears("at once that it is again", lambda each: each.lifetime, 5)
        wait_until("the host reaches the Internet", lambda: lab.pings("lan"))
        for _ in range(2):
            pid = tun6.read_text(lan_folder(lab) / "radvd.pid")
            os.kill(int(pid), signal.SIGKILL)
            wait_until("radvd is there again", lambda pid=pid: any(int(each) > int(pid) for each in radvds(lab)))  # type: ignore[misc]
        client.said("ERROR LAN usb0: radvd ended with -9; it is started again", 1)
        lab.ip("client", "link del usb0")
        client.said("WARNING LAN usb0: there is no such interface", 2)
        plug_in()
        wait_until("the host reaches the Internet again", lambda: lab.pings("lan"))
        client.stop()
        assert not radvds(lab)
    finally:
        with suppress(tun6.KernelError):
            lab.ip("client", "link del usb0")


@pytest.mark.waits
def test_two_clients_of_one_machine_have_a_lan_each_and_forwarding_ends_with_the_last(
    lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, beyond: None, tmp_path: Path
) -> None:
    lab.ip("client", f"link add usb0 type veth peer name eth9 netns {lab._names['lan']}")
    try:
        lab.ip("client", "link set usb0 up")
        lab.ip("lan", "link set eth9 up")
        wait_until("the link is up", lambda: "tentative" not in lab.ip("client", "-6 addr"))
        before = state_of(lab, "client")
        with tun6_with(tmp_path, LISTEN_SHORTLY):
            first = tunnel.client(lan="eth1", id="a")
            first.wait_for("LAN eth1: announces")
            second = tunnel.client(lan="usb0", id="b", tun="b")
            second.wait_for("LAN usb0: announces")
            refused = tunnel.failure_at_start("client", 1, lan="eth1", tun="c")
            assert f"lan = eth1: another tun6 client is that LAN's router, process {first.process.pid}" in refused
        first.stop()
        second.wait_for("somebody turned IPv6 forwarding off, .*; it is on again")
        renamed = lab.run("client", "ip", "link", "set", "usb0", "name", "other").returncode == 0  # Linux 6.2 and newer can, while it is up
        second.stop()
        if renamed:
            lab.ip("client", "link set other name usb0")
        as_before(lab, before)
    finally:
        lab.ip("client", "link del usb0")


@pytest.mark.waits
def test_hosts_are_told_only_when_the_internet_has_answered(lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, tmp_path: Path) -> None:
    with tun6_with(tmp_path, LISTEN_SHORTLY):
        client = tunnel.client(lan="eth1")
        client.said("WARNING LAN eth1: the server has no way to the Internet, so the hosts are not told of it yet", 1)
    time.sleep(1.5)  # they are told within 0.3 s where the Internet answers
    assert not lan.heard()
    with changed(lab, "server", f"-6 route add default via {Lab.INTERNET}"):
        with sysctl(lab, "internet", "net.ipv6.conf.all.forwarding", "1"):
            wait_until("the host has a route", lan.routed)
        client.stop()
        with tun6_with(tmp_path, LISTEN_SHORTLY, "tun6.PROVE_S = 2.0"):
            silent = tunnel.client(lan="eth1")
            silent.said("WARNING LAN eth1: nothing behind the server answers; the hosts are told of the tunnel all the same", 1)
        wait_until("the host has a route", lan.routed)


@pytest.mark.waits
def test_packets_of_1500_bytes_pass_a_path_of_1400_without_a_fragment(
    lab: Lab, lan: Lan, tunnel: Tunnel, server: Program, beyond: None, tmp_path: Path
) -> None:
    def fragments(host: str) -> list[str]:
        names = ("Ip6FragCreates", "Ip6ReasmReqds", "IpFragCreates", "IpReasmReqds")
        counters = lab.run(host, "nstat", "-asz", *names).stdout
        found = re.findall(r"^(\w+) +(\d+)", counters, re.MULTILINE)
        assert len(found) == len(names)
        return found

    narrow = [("server", "eth0"), ("nat", "eth0")]
    for host, device in narrow:
        lab.ip(host, f"link set {device} mtu 1400")
    try:
        with tun6_with(tmp_path, LISTEN_SHORTLY):
            tunnel.client(lan="eth1")
        wait_until("the host has a route", lambda: lab.pings("lan"))
        before = [fragments(host) for host in Lab.HOSTS]
        for number in range(3):
            largest = lab.run("lan", "ping", "-6", "-c", "1", "-W", "2", "-M", "do", "-s", "1452", Lab.INTERNET)  # 1500 with both headers
            assert largest.returncode == 0, f"ping {number}: {largest.stdout}"
        transfer(lab, "lan", "internet", Lab.INTERNET, 1 << 20)
        assert "mtu 14" not in lab.ip("lan", f"-6 route get {Lab.INTERNET}")
        assert [fragments(host) for host in Lab.HOSTS] == before
    finally:
        for host, device in narrow:
            lab.ip(host, f"link set {device} mtu 1500")


@pytest.mark.waits
def test_a_lan_that_cannot_be_is_refused_at_the_start(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    assert "that is the tunnel's own device" in tunnel.failure_at_start("client", 2, lan="tun6")
    with tun6_with(tmp_path, "tun6.shutil.which = lambda name, **_: None if name == 'radvd' else name"):
        assert tunnel.failure_at_start("client", 2, lan="eth1").endswith("radvd is missing; install it with `apt-get install radvd`")


# ---- end to end: metrics ---------------------------------------------------------------------------------------------


@contextmanager
def web_connection(lab: Lab, host: str, port: int = 10_116) -> Iterator[socket.socket]:
    """A connection to the metrics of the tun6 on this host, from there."""
    with socket_on(lab, host, socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect(("127.0.0.1", port))
        yield sock


def fetched(lab: Lab, host: str, path: str) -> str:
    """What the tun6 on this host answers by HTTP."""
    with web_connection(lab, host) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:10116\r\n\r\n".encode())
        head, _, body = all_of(sock).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\n"), head
    return body


@pytest.mark.waits
def test_both_sides_serve_metrics_and_a_page(lab: Lab, tunnel: Tunnel) -> None:
    server = tunnel.server(metrics="127.0.0.1:10116", metrics_clients="yes")
    client = tunnel.client(metrics="127.0.0.1:10116", id="<b>hostile</b>")
    client.prefix()
    ping(lab, "client")
    for program in (server, client):
        wait_until("a sample", lambda: scraped(fetched(lab, program.host, "/metrics"))["tun6_loop_latency_seconds_count", ()])  # noqa: B023
        found = scraped(fetched(lab, program.host, "/metrics"))
        assert found["tun6_up", ()] == 1
        assert found["tun6_packets_total", (("direction", "sent"),)] >= 5
        assert found["tun6_handshakes_total", (("outcome", "served"),)] == 1
        page = PageReader(fetched(lab, program.host, "/"))
        assert any("<b>hostile</b>" in text for text in page.texts)
    assert scraped(fetched(lab, "server", "/metrics"))["tun6_sessions", ()] == 1
    status = status_of(server)
    assert [entry["id"] for entry in status["clients"]] == ["<b>hostile</b>"]
    server.stop()
    client.wait_for("no connection to")
    assert scraped(fetched(lab, "client", "/metrics"))["tun6_up", ()] == 0
    server.start()  # its port is free again
    server.wait_for(" serving ", 2)
    wait_until("it serves them again", lambda: "tun6_up 1.0" in fetched(lab, "server", "/metrics"))


@pytest.mark.waits
def test_slow_and_many_connections_to_the_metrics_end_and_disturb_nobody(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, "tun6.WEB_S = 2.0"):
        server = tunnel.server(metrics="127.0.0.1:10116")
    wait_until("it serves them", lambda: " tun6_up" in " " + fetched(lab, "server", "/metrics"))
    with ExitStack() as undo:
        slow = [undo.enter_context(web_connection(lab, "server")) for _ in range(3 * tun6.WEB_CONNECTIONS_MAX)]
        for sock in slow:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        tunnel.visit("an honest client")
        assert pending(server) <= tun6.WEB_CONNECTIONS_MAX + 20
        for sock in slow:
            assert all_of(sock) == b""
    assert "tun6_up 1.0" in fetched(lab, "server", "/metrics")
    with web_connection(lab, "server") as sock:
        sock.sendall(b"GET /\x1b[31m HTTP/1.1\r\nHost: " + b"x" * 100_000)
        all_of(sock)
    assert "\x1b" not in server.log()


@pytest.mark.waits
def test_metrics_that_can_not_be_served_are_said_once_and_the_tunnel_works(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, "tun6.WEB_RETRY_S = 0.2"), socket_on(lab, "server", socket.AF_INET, socket.SOCK_STREAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier test
        other.bind(("127.0.0.1", 10_116))
        other.listen()
        server = tunnel.server(metrics="127.0.0.1:10116")
        server.wait_for("WARNING metrics = 127.0.0.1 port 10116: Address already in use; trying again")
        server.wait_for("DEBUG metrics = 127.0.0.1 port 10116", 2)
        tunnel.visit("a client")
        assert any(text.startswith("metrics = ") for text in status_of(server)["warnings"])
    wait_until("they are served", lambda: not any(text.startswith("metrics = ") for text in status_of(server)["warnings"]))
    assert "tun6_up 1.0" in fetched(lab, "server", "/metrics")
    assert server.log().count("WARNING metrics") == 1


@pytest.mark.waits
@pytest.mark.parametrize("role", ["server", "client"])
def test_metrics_without_prometheus_client_is_a_sentence(tunnel: Tunnel, role: str, tmp_path: Path) -> None:
    with tun6_with(tmp_path, "sys.modules['prometheus_client'] = None"):
        sentence = tunnel.failure_at_start(role, 2, metrics="127.0.0.1:10116")
    assert "`metrics` needs the Python package prometheus_client: `apt-get install python3-prometheus-client`, or `" in sentence


# ---- end to end: faults ----------------------------------------------------------------------------------------------


def test_a_server_killed_at_any_moment_of_an_assignment_keeps_what_was_told(tunnel: Tunnel, tmp_path: Path) -> None:
    pool, path = IPv6Network(f"{tunnel.pool.network_address}/48"), tmp_path / "assignments.json"
    told: dict[str, IPv6Network] = {}
    for kill in range(many(40, 500)):
        server = tunnel.server(prefixrange=pool)
        wave = {f"{kill} {number}": tunnel.connect() for number in range(6)}
        die_at = time.monotonic() + random.uniform(0, 0.06)
        for id_, peer in wave.items():  # with pauses, so that one save follows the other
            peer.hello(id_)
            time.sleep(max(0, min(random.uniform(0, 0.015), die_at - time.monotonic())))
        time.sleep(max(0, die_at - time.monotonic()))
        server.kill()
        for id_, peer in wave.items():
            with peer, suppress(EOFError, OSError):
                told[id_] = peer.connected().prefix
        assert told.items() <= assignments_in(path).items(), f"after kill {kill}"
    assert told, "no kill came late enough"
    tunnel.server(prefixrange=pool, max_clients=len(told))
    for id_ in random.sample(sorted(told), min(len(told), 60)):
        with tunnel.peer(id_) as peer:
            assert peer.connected().prefix == told[id_]


def test_what_a_server_killed_in_the_midst_of_a_save_left_is_cleared(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    path, new = tmp_path / "assignments.json", tmp_path / "assignments.json.new"
    disk = Disk(tmp_path)
    server = disk.server(tunnel)
    old = tunnel.visit("old")
    with disk.stuck():
        peer = tunnel.peer("never told")
        wait_until("the save is under way", new.exists)
        server.kill()
        with pytest.raises((EOFError, OSError)):
            peer.answer()
    assert assignments_in(path) == {"old": old}
    new.write_bytes(b'{"old": "2001:db8:bad::/64')  # as after a power cut, which keeps what it likes of a file that was not synced
    assert server_routes(lab, "unreachable") == {str(tunnel.pool)}
    tunnel.server()
    assert len(json.loads(lab.ip("server", f"-6 -j route show type unreachable proto {tun6.ROUTE_PROTOCOL}"))) == 1  # its own
    newcomer = tunnel.visit("newcomer")
    assert tunnel.visit("old") == old
    assert assignments_in(path) == {"old": old, "newcomer": newcomer}
    assert not new.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tun6-test", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_takes_no_assignment_stops_newcomers_only(tunnel: Tunnel, small_disk: Path) -> None:
    path = small_disk / "assignments.json"
    told = dict(zip(("witness", "old"), tunnel.pool.subnets(new_prefix=64)))
    path.write_text(json.dumps({id_: str(prefix) for id_, prefix in told.items()}))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    server = tunnel.server(assignments=path)
    writable = f"mount -o remount,rw {small_disk}"
    faults = {  # what makes each fault, and what ends it; the server sees a mount of its own
        "Read-only file system": ("true", f"nsenter -m -t {server.process.pid} {writable} && {writable}"),
        "No space left on device": ("cat /dev/zero > filler 2> /dev/null || true", "rm filler"),
        "Is a directory": ("rm -f assignments.json.new && mkdir assignments.json.new", "rmdir assignments.json.new"),
    }
    witness = tunnel.peer("witness").connected()
    for outage, (reason, (begin, end)) in enumerate(faults.items(), 1):
        newcomers = [f"newcomer {outage}.{number}" for number in range(3)]
        subprocess.run(begin, shell=True, cwd=small_disk, check=True)
        before = untouched(path), os.listdir(small_disk)
        for id_ in newcomers:
            assert tunnel.refusal(id_)["Error"] == "server-error"
        witness.echo()
        for id_ in told.keys() - {"witness"}:
            assert tunnel.visit(id_) == told[id_]
        assert (untouched(path), os.listdir(small_disk)) == before
        subprocess.run(end, shell=True, cwd=small_disk, check=True)
        for id_ in reversed(newcomers):
            told[id_] = tunnel.visit(id_)
        assert assignments_in(path) == told
        server.wait_for(rf"INFO {path}.* can be written again", outage)
        errors = server.said(r"(?:ERROR|CRITICAL) .*", outage)
        assert re.search(rf"ERROR {path}.* can't be written: .*{reason}.*known Ids are served", errors[-1])


def test_while_the_disk_does_not_answer_only_those_wait_who_need_it(tunnel: Tunnel, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.server(tunnel)
    prefix = tunnel.visit("known")
    live = tunnel.peer("live").connected()
    with disk.stuck():
        newcomer = tunnel.peer("newcomer")
        wait_until("the newcomer's save is under way", (tmp_path / "assignments.json.new").exists)
        for _ in range(50):
            live.echo()
        assert tunnel.visit("known") == prefix
        assert not select.select([newcomer.sock], [], [], 0)[0]  # neither an answer nor the end
        disk.answer()
        newcomer.connected().echo()


def test_a_prefix_that_the_operator_pins_is_told_to_nobody_before_it_is_on_disk(tunnel: Tunnel, tmp_path: Path) -> None:
    disk, path = Disk(tmp_path), tmp_path / "assignments.json"
    server = disk.server(tunnel)
    old, new = tunnel.visit("pinned"), list(tunnel.pool.subnets(new_prefix=64))[200]
    with ThreadPoolExecutor() as pool, disk.stuck():
        pin = pool.submit(run_tun6, "clients", "-c", str(server.config), "pin", "pinned", str(new))
        wait_until("the pin is under way", (tmp_path / "assignments.json.new").exists)
        peer = tunnel.peer("pinned")
        assert not select.select([peer.sock], [], [], 0.3)[0] or peer.connected().prefix == assignments_in(path)["pinned"]
        disk.answer()
        assert peer.connected().prefix in (old, new)
        assert pin.result(5).returncode == 0
    assert assignments_in(path) == {"pinned": new}


def test_a_server_whose_disk_does_not_answer_stops_in_time_and_undoes_everything(tunnel: Tunnel, tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    server = disk.server(tunnel)
    with disk.stuck():
        tunnel.peer("newcomer")
        wait_until("the save is under way", (tmp_path / "assignments.json.new").exists)
        assert server.stop() < SERVER_ENDS_S


class FaultyIp:
    """An `ip` that fails as the real one does, and notes which files it was given."""

    NOTHING = "^$"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "bin"
        self._folder.mkdir()
        self._program, self._fails, self._files = (self._folder / name for name in ("ip", "fails", "files"))
        self._program.write_text(f"""#!/bin/sh
PATH={os.environ["PATH"]}; cd {self._folder}
[ "$*" = "-6 -force -batch -" ] || exec ip "$@"
ls -l /proc/$$/fd >> files
sed -E "s/.*($(cat fails)).*/link set dev missing up/" | ip "$@"
""")
        self._program.chmod(0o755)
        self._fails.write_text(self.NOTHING)

    @contextmanager
    def seen(self) -> Iterator[None]:
        """The tun6 programs that start meanwhile have this `ip`."""
        with tun6_with(self._folder, f"os.environ['PATH'] = {str(self._folder)!r}"):
            yield

    @contextmanager
    def failing_at(self, pattern: str) -> Iterator[None]:
        """Meanwhile it fails at the commands that match."""
        self._fails.write_text(pattern)
        yield
        self._fails.write_text(self.NOTHING)

    @contextmanager
    def missing(self) -> Iterator[None]:
        """There is none meanwhile."""
        self._program.rename(self._folder / "away")
        yield
        (self._folder / "away").rename(self._program)

    def files(self) -> list[str]:
        """What it had open, in all runs."""
        return re.findall(r"-> (.*)", self._files.read_text())


def test_when_ip_fails_at_any_step_that_client_alone_is_refused(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    ip = FaultyIp(tmp_path)
    with ip.seen():
        server = tunnel.server()
    steps = ("link set dev tun6-.* mtu", "link set dev tun6-.* up", "route replace .* dev tun6-")
    faults = {f"{step}.* failed: Cannot find device": ip.failing_at(step) for step in steps}
    faults["can't be run: No such file"] = ip.missing()
    live = tunnel.peer("live").connected()
    live.echo()
    for why, fault in faults.items():
        with fault:
            assert tunnel.refusal("newcomer")["Error"] == "server-error"
            server.wait_for(rf"ERROR 'newcomer' from .*: can't be served: `ip.*{why}")
            wait_until("nothing of it is left", lambda: len(server_devices(lab)) == 1 and server_routes(lab) == {str(live.prefix)})
            live.echo()
        tunnel.visit("another")
        wait_until("it is gone", lambda: len(server_devices(lab)) == 1)


def test_a_server_or_client_whose_ip_fails_at_the_start_says_so_and_leaves_nothing(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    ip = FaultyIp(tmp_path)
    before = {host: state_of(lab, host) for host in ("server", "client")}
    steps = (
        ("server", "route add unreachable"),
        ("client", "link set dev tun6 mtu"),
        ("client", "link set dev tun6 up"),
    )
    faults = [(role, f"`ip.*{step}.* failed: Cannot find device", ip.failing_at(step)) for role, step in steps]
    faults += [(role, "can't be run: No such file or directory; it comes with iproute2", ip.missing()) for role in before]
    for role, why, fault in faults:
        with ip.seen(), fault:
            assert re.search(why, tunnel.failure_at_start(role))
        assert state_of(lab, role) == before[role]


@pytest.mark.parametrize("step", ["addr add", "route add unreachable", "rule add", "route add default dev"])
def test_a_client_whose_address_can_not_be_set_tries_again(lab: Lab, tunnel: Tunnel, server: Program, tmp_path: Path, step: str) -> None:
    ip = FaultyIp(tmp_path)
    with ip.failing_at(step):
        with ip.seen():
            client = tunnel.client()
        client.wait_for(f"WARNING no connection .*{step}.* failed: Cannot find device")
        wait_until("nothing of the attempt is left", lambda: not tun_of(lab) and "unreachable" not in lab.ip("client", "-6 route"))
    client.prefix()
    ping(lab, "client")


def test_ip_gets_none_of_the_servers_files(tunnel: Tunnel, tmp_path: Path) -> None:
    ip = FaultyIp(tmp_path)
    with ip.seen():
        server = tunnel.server()
    for id_ in ("one", "two"):  # for two `ip` runs while the TUN and the socket of one are open
        tunnel.peer(id_).connected()
    assert "/dev/net/tun" in open_files(server)
    assert any(file.startswith("pipe:") for file in ip.files())
    assert [file for file in ip.files() if file.startswith(("/dev/net", "socket:", "anon_inode:"))] == []


@pytest.mark.parametrize(
    ("function", "when", "error"),
    [("tun6.pytun.TunTapDevice", "True", "tun6.pytun.Error"), ("tun6.fcntl.ioctl", "tun6.Tun.TUNSETVNETLE in args", "OSError")],
    ids=["to make it", "to set it up"],
)
def test_without_memory_for_a_tun_only_its_client_is_refused(tunnel: Tunnel, tmp_path: Path, function: str, when: str, error: str) -> None:
    out = tmp_path / "out-of-memory"
    fault = f"""
real = {function}
def fails(*args, **options):
    if os.path.exists({str(out)!r}) and {when}:
        raise {error}(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return real(*args, **options)
{function} = fails
"""
    with tun6_with(tmp_path, fault):
        server = tunnel.server()
        live = tunnel.peer("live").connected()
        live.echo()
        out.touch()
        assert tunnel.refusal("newcomer")["Error"] == "server-error"
        server.wait_for("ERROR 'newcomer' from .*: can't be served: TUN device .*Cannot allocate memory")
        wait_until("nothing of it is left", lambda: len(server_devices(tunnel.lab)) == 1)
        live.echo()
        assert "Cannot allocate memory" in tunnel.failure_at_start("client")
    out.unlink()
    tunnel.visit("newcomer")
    live.echo()


def test_while_a_tun_takes_its_time_to_go_nobody_else_waits(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    slow, goes = tmp_path / "slow", tmp_path / "goes"
    fault = f"""
class SlowDevice:
    def __init__(self, *args, **options):
        self._device = device(*args, **options)
    def __getattr__(self, name):
        return getattr(self._device, name)
    def close(self):
        open({str(goes)!r}, "w").close()
        while os.path.exists({str(slow)!r}):
            time.sleep(0.01)
        self._device.close()
device, tun6.pytun.TunTapDevice = tun6.pytun.TunTapDevice, SlowDevice
"""
    with tun6_with(tmp_path, fault):
        tunnel.server()
    slow.touch()
    live = tunnel.peer("stays").connected()
    live.echo()
    tunnel.visit("leaves")
    wait_until("its TUN goes", goes.exists)
    live.echo()
    tunnel.peer("comes").connected().echo()
    assert len(server_devices(lab)) == 3
    slow.unlink()
    wait_until("it is gone", lambda: len(server_devices(lab)) == 2)


def session_of(server: Program, id_: str) -> tuple[IPv6Network, str]:
    """Prefix and device of the Id's last session."""
    server.wait_for(f"'{id_}' from .*: has ")
    prefix, device = re.findall(f"'{id_}' from .*: has (\\S+) on ([^ ,\n]+)", server.log())[-1]
    return IPv6Network(prefix), str(device)


def test_what_somebody_takes_from_a_session_is_put_back_in_place_or_the_client_comes_back(
    lab: Lab, tunnel: Tunnel, server: Program
) -> None:
    damages = {"device": "link del dev {device}", "state": "link set dev {device} down", "route": "-6 route del {prefix} dev {device}"}
    in_place = {"state": "set it down", "route": "removed its route"}
    clients = {id_: tunnel.client(id=id_, tun=id_, default_route="yes" if id_ == "device" else "no") for id_ in damages}
    prefixes = {id_: client.prefix() for id_, client in clients.items()}
    bystander = tunnel.peer("by-stander").connected()
    for do in ("add", "del"):  # what is not ours may go
        lab.ip("server", f"addr {do} 2001:db8:f000::1/128 dev {session_of(server, 'by-stander')[1]} nodad")
    for id_, command in damages.items():
        prefix, device = session_of(server, id_)
        assert prefix == prefixes[id_]
        lab.ip("server", command.format(device=device, prefix=prefix))
        said = (
            f"WARNING TUN device {device}: somebody {in_place[id_]}; it is back"
            if id_ in in_place
            else (f"'{id_}' from .*: gone, TUN device {device}: somebody removed it; after")
        )
        server.wait_for(said, seconds=4)
    assert clients["device"].prefix(times=2) == prefixes["device"]
    assert server_routes(lab) == {*map(str, prefixes.values()), str(bystander.prefix)}
    assert len(server_devices(lab)) == 4
    bystander.echo()
    for prefix in prefixes.values():
        ping(lab, "internet", str(prefix[1]))
    for id_ in in_place:
        assert f"ff00::/8 dev {session_of(server, id_)[1]} " not in lab.ip("server", "-6 route show table local")
    server.said(": gone,", 1)
    prefix, device = session_of(server, "state")
    for number in range(2, tun6.REPAIRS_MAX + 1):
        lab.ip("server", f"link set dev {device} down")
        server.wait_for(f"TUN device {device}: somebody set it down; it is back", number)
    lab.ip("server", f"link set dev {device} down")  # too often for one session
    server.wait_for(f"'state' from .*: gone, TUN device {device}: somebody set it down; after")
    assert clients["state"].prefix(times=2) == prefixes["state"]


@pytest.mark.waits
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "outage"])
def test_what_somebody_takes_from_the_client_is_restored(lab: Lab, tunnel: Tunnel, server: Program, connected: bool) -> None:
    damages = {
        "device": ("link del dev {device}", "removed it"),
        "state": ("link set dev {device} down", "set it down"),
        "address": ("addr del {address}/128 dev {device}", "removed its address"),
        "tun6": ("-6 route del default dev {device} table {table}", "removed its route"),
    }
    in_place = damages.keys() - {"device"}
    clients = {
        device: tunnel.client(id=device, tun=device, grace=60, default_route="yes" if device == "tun6" else "no") for device in damages
    }
    prefixes = {device: client.prefix() for device, client in clients.items()}
    before = {device: tun_of(lab, "client", device)["ifindex"] for device in damages}
    if not connected:
        server.stop()
        for client in clients.values():
            client.wait_for("WARNING no connection")
    for device, (command, _) in damages.items():
        table = tun6.OWNER_BASE + clients[device].process.pid
        lab.ip("client", command.format(device=device, address=prefixes[device][1], table=table))
    for device, (_, what) in damages.items():
        sentence = f"TUN device {device}: somebody {what}; "
        outage = f"no connection to {Lab.SERVER} port {tunnel.port}: {sentence}trying again every 2 s"
        clients[device].wait_for(f"WARNING {sentence}it is back" if device in in_place else outage, seconds=4)
    remade = damages.keys() - in_place
    wait_until("all are made anew", lambda: all(tun_of(lab, "client", each).get("ifindex", 0) > before[each] for each in remade))
    assert all(tun_of(lab, "client", each)["ifindex"] == before[each] for each in in_place)
    wait_until("the way to the Internet is there", lambda: way_to_internet(lab) == "tun6")
    if not connected:
        tunnel.server()
    for device, client in clients.items():
        assert client.prefix(times=1 if connected and device in in_place else 2) == prefixes[device]
        tun = tun_of(lab, "client", device)
        assert "UP" in tun["flags"]
        assert [(entry["local"], entry["prefixlen"]) for entry in tun["addr_info"]] == [(str(prefixes[device][1]), 128)]
    assert way_to_internet(lab) == "tun6"
    ping(lab, "client")
    ping(lab, "internet", str(prefixes["tun6"][1]))
    for device, client in clients.items():
        client.said(": has ", 1 if connected and device in in_place else 2)


def cpu_s(program: Program) -> float:
    """Seconds of processor time that it and the processes that it started and waited for have had: proc(5), stat, fields 14 to 17."""
    times = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def test_whoever_removes_things_again_and_again_makes_nobody_spin(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    prefix = client.prefix()
    for host, route in (("server", tunnel.pool), ("client", prefix)):
        lab.ip(host, f"-6 route del unreachable {route}")
        wait_until("that route is back", lambda h=host, r=route: str(r) in lab.ip(h, "-6 route show type unreachable"))  # type: ignore[misc]
    bystander = tunnel.peer("by-stander", host="server").connected()
    _, spared = session_of(server, "by-stander")
    before = {program: cpu_s(program) for program in (server, client)}
    end = time.monotonic() + 4
    while time.monotonic() < end:
        for device in server_devices(lab) - {spared}:
            lab.run("server", "ip", "link", "del", device)
        lab.run("server", "ip", "-6", "route", "del", "unreachable", str(tunnel.pool))
        lab.run("client", "ip", "link", "del", "tun6")
    for program, earlier in before.items():
        assert cpu_s(program) - earlier < 1.5, f"the {program.role} spins"
    assert len(re.findall(r"DEBUG no connection|WARNING no connection", client.log())) <= 5  # one in two seconds, and what they find
    assert server.log().count(": gone,") <= 5
    bystander.echo()
    wait_until("the pool's route is back", lambda: server_routes(lab, "unreachable") == {str(tunnel.pool)})
    wait_until("the client has all it had", lambda: lab.pings("client"))
    assert client.prefix() == prefix


def netlink_drops(lab: Lab, host: str) -> int:
    """Messages that the listeners for news of routes on the host have lost."""
    table = [line.split() for line in lab.run(host, "cat", "/proc/net/netlink").stdout.splitlines()[1:]]
    return sum(int(drops) for _, protocol, _, groups, _, _, _, _, drops, *_ in table if protocol == "0" and int(groups, 16))


def test_a_flood_of_news_about_other_routes_and_addresses_hides_nothing(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    prefix = client.prefix()
    hosts = ("server", "client")

    def batch(commands: Iterable[str]) -> None:
        """Runs these commands of `ip` on both hosts at the same time."""
        lines = "\n".join(commands)
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(lab.run, host, "ip", "-6", "-batch", "-", input=lines) for host in hosts]
        for run in runs:
            assert run.result().returncode == 0, run.result().stderr

    bystander, downed, cut_off = (tunnel.peer(id_, host="server").connected() for id_ in ("by-stander", "downed", "cut off"))
    for peer in (bystander, downed, cut_off):
        peer.echo()
    before = {program: memory(program) for program in (server, client)}
    for do in ("add", "del"):
        batch(f"route {do} 2001:db8:f000::{number:x}/128 dev eth1 proto 99" for number in range(20_000))
    bystander.echo()
    ping(lab, "client")

    with paused(server), paused(client):
        batch(f"addr {do} 2001:db8:f000::{number:x}/128 dev eth1 nodad" for number in range(10_000) for do in ("add", "del"))
        _, device = session_of(server, "downed")
        lab.ip("server", f"link set dev {device} down")
        lab.ip("server", f"-6 route del {cut_off.prefix}")
        lab.ip("server", f"-6 route del unreachable {tunnel.pool}")
        lab.ip("client", f"addr del {prefix[1]}/128 dev tun6")
        assert all(netlink_drops(lab, host) for host in hosts), "the flood was too small"
    server.wait_for(f"WARNING TUN device {device}: somebody set it down; it is back", seconds=3)
    left = {str(tunnel.pool)}, {str(each) for each in (prefix, bystander.prefix, downed.prefix, cut_off.prefix)}
    wait_until("the routes are back", lambda: (server_routes(lab, "unreachable"), server_routes(lab)) == left, 3)
    wait_until("the address is back", lambda: addresses(lab) == [f"{prefix[1]}/128"], 5)
    client.prefix(times=client.log().count("no connection") + 1)
    ping(lab, "client")
    for peer in (bystander, downed, cut_off):
        peer.echo()
    for program, earlier in before.items():
        assert memory(program) < earlier + (8 << 20), program.role


@contextmanager
def cut(lab: Lab, host: str, comes: str, goes: str) -> Iterator[None]:
    """The host drops IPv4 packets that match, those that come and those that go, without a word to anybody."""

    def nft(rules: str) -> None:
        done = lab.run(host, "nft", rules)
        assert not done.returncode, done.stderr

    chain = "chain {0} {{ type filter hook {0}routing priority 0; {1} drop; }};"
    nft(f"table ip cut {{ {chain.format('pre', comes)} {chain.format('post', goes)} }}")
    try:
        yield
    finally:
        nft("delete table ip cut")


def forget_connections(lab: Lab) -> None:
    """The NAT forgets all connections that it knows."""
    with lab.inside("nat"), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:  # NETLINK_NETFILTER
        # nlmsghdr with IPCTNL_MSG_CT_DELETE of all, REQUEST | ACK, and nfgenmsg: linux/netfilter/nfnetlink_conntrack.h
        sock.send(struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 1 | 4, 1, 0, socket.AF_INET, 0, 0))
        assert struct.unpack_from("=i", sock.recv(4096), 16) == (0,)


@pytest.mark.waits
def test_whoever_falls_silent_is_noticed_within_35_seconds_and_the_clients_come_back(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    """All who have to wait wait at the same time: it takes 30 seconds."""
    beyond = tunnel.port + 5000  # the port of the server that vanishes
    tunnel.server(listenport=beyond, prefixrange=tunnel.new_pool(), assignments=None)
    lone: dict[str, Any] = {"default_route": "no"}

    with ExitStack() as undo:
        # so that the NAT knows no connection whose beginning it did not see
        undo.enter_context(sysctl(lab, "nat", "net.netfilter.nf_conntrack_tcp_loose", "0"))
        undo.enter_context(cut(lab, "nat", "ct state invalid", "ct state invalid"))
        clients = {
            "NAT forgets, idle": tunnel.client(id="NAT forgets, idle", tun="idle", **lone),
            "NAT forgets, busy": tunnel.client(id="NAT forgets, busy"),
            "server vanishes": tunnel.client(id="server vanishes", tun="beyond", remoteport=beyond, **lone),
        }
        for client in clients.values():
            client.prefix()
        undo.enter_context(running(lab, "client", "ping", "-6", "-i", "0.2", Lab.INTERNET))
        bystander = tunnel.peer("by-stander", host="server").connected()
        forget_connections(lab)
        began = dict.fromkeys(clients, time.monotonic())

        outage = undo.enter_context(ExitStack())
        outage.enter_context(cut(lab, "server", f"tcp dport {beyond}", f"tcp sport {beyond}"))
        clients["address changes, idle"] = tunnel.client("second", id="address changes, idle", tun="idle", **lone)
        clients["address changes, busy"] = tunnel.client("second", id="address changes, busy")
        peers = {name: tunnel.peer(name, host="second").connected() for name in ("gone, idle", "gone, busy", "same")}
        prefixes = {name: client.prefix() for name, client in clients.items()}
        undo.enter_context(running(lab, "second", "ping", "-6", "-i", "0.2", Lab.INTERNET))
        for prefix in (prefixes["NAT forgets, busy"], prefixes["address changes, busy"], peers["gone, busy"].prefix):
            undo.enter_context(running(lab, "internet", "ping", "-6", "-i", "0.2", str(prefix[1])))
        for peer in peers.values():  # so that the next probe goes to those that are idle when 10 s of their silence are over
            peer.expect_probe()
            peer.echo()
            sockets = ("ss", "-Htn", f"dport = :{peer.sock.getsockname()[1]}")  # the NAT keeps the port
            wait_until("all is acknowledged", lambda: lab.run("server", *sockets).stdout.split()[2] == "0")  # noqa: B023
        route = "default via 10.8.1.1"
        readdress = (f"route del {route}", "addr del 10.8.1.2/24 dev eth0", "addr add 10.8.1.3/24 dev eth0", f"route add {route}")
        undo.enter_context(changed(lab, "second", *readdress))
        began = {**dict.fromkeys([*clients, *peers], time.monotonic()), **began}
        late = tunnel.client("second", id="late", tun="late", remoteport=beyond, **lone)  # never had a connection

        with tunnel.peer("same", host="server") as again:  # the server holds the other one for alive still
            assert again.connected().prefix == peers["same"].prefix
            again.echo()
            assert time.monotonic() - began["same"] < 5
        server.said(": gone,", 1)  # that one

        # what TCP heard last from IP, or what found that nothing came
        silence = "(Connection timed out|No route to host|Network is unreachable|Invalid argument|no sign of life for 30 s);"
        signs = {name: (client, f"WARNING no connection to .*: {silence}") for name, client in clients.items()}
        signs.update({name: (server, f"'{name}' from .*: gone, {silence}") for name in ("gone, idle", "gone, busy")})
        signs["late"] = (late, r"WARNING no connection to .*: no answer within 10 s;")
        began["late"] = began["same"]
        unnoticed = set(signs)
        while unnoticed:
            bystander.echo()
            for name in list(unnoticed):
                program, sign = signs[name]
                if re.search(sign, program.log()):
                    unnoticed.remove(name)
                else:
                    assert time.monotonic() - began[name] < 35, f"{name}: not noticed; {unnoticed} are open\n{program.log()}"
            time.sleep(0.1)
        for name in clients.keys() - {"server vanishes"}:
            assert clients[name].prefix(times=2) == prefixes[name], name
        ping(lab, "client")
        ping(lab, "second")
        bystander.echo()
        assert len(re.findall("no answer within 10 s", late.log())) <= 3
        outage.close()
        assert clients["server vanishes"].prefix(times=2, seconds=15) == prefixes["server vanishes"]
        late.prefix(seconds=15)


@pytest.mark.waits
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_dead_after_says_how_soon_a_dead_path_is_noticed(lab: Lab, tunnel: Tunnel, busy: bool) -> None:
    server, client = tunnel.server(dead_after=6), tunnel.client(dead_after=6)
    prefix = client.prefix()
    ping(lab, "client")
    with ExitStack() as undo:
        if busy:
            undo.enter_context(running(lab, "client", "ping", "-6", "-i", "0.2", Lab.INTERNET))
            undo.enter_context(running(lab, "internet", "ping", "-6", "-i", "0.2", str(prefix[1])))
        began = time.monotonic()
        undo.enter_context(cut(lab, "nat", f"tcp dport {tunnel.port}", f"tcp sport {tunnel.port}"))
        for program, sign in ((client, "WARNING no connection to "), (server, ": gone, ")):
            program.wait_for(sign + ".*(Connection timed out|no sign of life for 5 s)", seconds=40)
        assert time.monotonic() - began < 20  # by default no less than 30
    assert client.prefix(2) == prefix


def sent_into(lab: Lab, host: str, device: str = "tun6") -> int:
    """Bytes that the host has sent into a TUN."""
    return int(json.loads(lab.ip(host, f"-s -j link show {device}"))[0]["stats64"]["tx"]["bytes"])


@pytest.mark.waits
def test_an_outage_shorter_than_tcps_patience_costs_neither_the_session_nor_a_byte(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    clients = [tunnel.client(host) for host in ("client", "second")]
    for client in clients:
        client.prefix()

    def begin(host: str) -> Future[None]:
        """A transfer, when it has begun and is far from its end."""
        transfer_ = pool.submit(transfer, lab, host, "internet", Lab.INTERNET, 100_000_000, 25_000_000)
        wait_until("bulk is on its way", lambda: sent_into(lab, host) > 1_000_000)
        return transfer_

    with ThreadPoolExecutor(2) as pool:
        moved = [begin("second")]
        with changed(lab, "second", "route del default via 10.8.1.1"):
            moved.append(begin("client"))
            with cut(lab, "nat", "iifname eth1", "oifname eth1"):
                time.sleep(3)  # as long as the outage lasts
                assert not any(each.done() for each in moved), "the transfer was over too early to be disturbed"
        for each in moved:
            each.result(30)
    for client in clients:
        assert client.log().count(": has ") == 1
        assert "no connection" not in client.log()
    assert ": gone," not in server.log()


def test_a_client_whose_server_has_no_address_says_so_and_stops_in_time_while_it_asks_again(lab: Lab, tunnel: Tunnel) -> None:
    client = tunnel.client(remotehost="no-such-host.invalid")
    client.wait_for("WARNING no connection to no-such-host.invalid port", seconds=30)
    assert tun_of(lab)


class NameServer(socketserver.UDPServer):
    """The only name server of a client's host, on the NAT beside it; it knows one name, or says what it is told to.

    `says`: an IPv4 address, "nothing", or "SERVFAIL". `asked` and `answered` count the queries, and those that it answered
    with an address; `lookups` has, for each id of a query, which stays the same when it is repeated, its first and last time.
    """

    NAME = "server.tun6.test."

    def __init__(self, lab: Lab, host: str, address: str) -> None:
        self.says = Lab.SERVER
        self.asked = self.answered = 0
        self.lookups: dict[int, tuple[float, float]] = {}
        with lab.inside("nat"):
            super().__init__((address, 53), socketserver.BaseRequestHandler)
        self._folder = Path("/etc/netns", lab._names[host])  # what `ip netns exec` lays over /etc: ip-netns(8)
        self._folder.mkdir(parents=True)
        self.resolv_conf = self._folder / "resolv.conf"
        self.resolv_conf.write_text(f"nameserver {address}\n")

    def server_close(self) -> None:
        super().server_close()
        self.resolv_conf.unlink()
        os.removedirs(self._folder)

    def check_that_they_were_one_at_a_time(self) -> None:
        spans = sorted(self.lookups.values())
        assert all(end < begin for (_, end), (begin, _) in zip(spans, spans[1:])), spans

    def finish_request(self, request: Any, client_address: Any) -> None:
        query, sock = request
        end = query.index(b"\0", 12) + 5
        asked_for_it = query[12:end].lower() == b"\6server\4tun6\4test\0\0\1\0\1"  # RFC 1035 section 4.1.2: type A, class IN
        says, failed = self.says, self.says == "SERVFAIL"
        knows = asked_for_it and says not in ("nothing", "SERVFAIL")
        now, id_ = time.monotonic(), int.from_bytes(query[:2], "big")
        self.lookups[id_] = (self.lookups.get(id_, (now, now))[0], now)
        self.asked += 1
        self.answered += knows
        if says != "nothing":
            answer = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(says) if knows else b""
            header = query[:2] + struct.pack(">HHHHH", 0x8580 | 2 * failed, 1, bool(answer), 0, 0)
            sock.sendto(header + query[12:end] + answer, client_address)


@pytest.fixture
def name_servers(lab: Lab) -> Iterator[list[NameServer]]:
    """Those of the hosts `client` and `second`."""
    with NameServer(lab, "client", "10.8.0.1") as first, NameServer(lab, "second", "10.8.1.1") as second, ThreadPoolExecutor(2) as pool:
        for names in (first, second):
            pool.submit(names.serve_forever, 0.05)
        yield [first, second]
        for names in (first, second):
            names.shutdown()


@pytest.mark.waits
def test_a_client_connects_within_five_seconds_of_its_name_servers_repair(tunnel: Tunnel, name_servers: list[NameServer]) -> None:
    tunnel.server()
    silent, failing = name_servers
    silent.says, failing.says = "nothing", "SERVFAIL"
    clients = [tunnel.client(host, remotehost=NameServer.NAME) for host in ("client", "second")]
    for client, names in zip(clients, name_servers):
        client.wait_for(f"WARNING no connection to {NameServer.NAME} port .*: Temporary failure in name resolution; trying again")
        wait_until("it asks again", lambda names=names: len(names.lookups) > 1)  # type: ignore[misc]
    repaired = time.monotonic()
    silent.says = failing.says = Lab.SERVER
    for client in clients:
        client.prefix(seconds=10)
    assert time.monotonic() - repaired < 5
    for names in name_servers:
        names.check_that_they_were_one_at_a_time()
        assert names.answered == 1


@pytest.mark.waits
def test_without_name_servers_a_client_finds_the_server_where_it_was(lab: Lab, tunnel: Tunnel, name_servers: list[NameServer]) -> None:
    server = tunnel.server()
    silent, failing = name_servers
    silent.resolv_conf.write_text(silent.resolv_conf.read_text() * 2)  # each entry is asked three times if it says nothing
    clients = [tunnel.client(host, remotehost=NameServer.NAME) for host in ("client", "second")]
    prefixes = [client.prefix() for client in clients]
    known = [names.answered for names in name_servers]
    silent.says, failing.says = "nothing", "SERVFAIL"
    server.kill()
    clients[0].wait_for("no connection", 2)  # the first lookup can be under way still when it tries again
    server = tunnel.server()
    assert [client.prefix(times=2) for client in clients] == prefixes
    assert [names.answered for names in name_servers] == known
    assert all(names.asked > names.answered for names in name_servers)  # they asked, in vain

    moved = "10.9.0.3"
    with changed(lab, "server", f"addr add {moved}/24 dev eth0"):
        server.stop()
        silent.says = failing.says = moved
        tunnel.server(localhost=moved)
        assert [client.prefix(times=3, seconds=15) for client in clients] == prefixes
        for names in name_servers:
            names.check_that_they_were_one_at_a_time()


CLOCK = r"""
// the time of day is wrong by as many seconds as the file $CLOCK says, in whatever reads it by the C library
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *wrong;
__attribute__((constructor)) static void begin(void) {
    wrong = mmap(NULL, sizeof *wrong, PROT_READ, MAP_SHARED, open(getenv("CLOCK"), O_RDONLY | O_CLOEXEC), 0);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *wrong;
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
"""


class Clock:
    """The time of day that tun6 programs see which start meanwhile; all other clocks are as they are."""

    def __init__(self, folder: Path) -> None:
        self._file, self._library = folder / "clock", folder / "clock.so"
        self._file.write_bytes(bytes(8))
        (folder / "clock.c").write_text(CLOCK)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", self._library, folder / "clock.c"], check=True)

    @contextmanager
    def seen(self) -> Iterator[None]:
        with mock.patch.dict(os.environ, LD_PRELOAD=str(self._library), CLOCK=str(self._file)):
            yield

    def jump(self, year: int) -> None:
        """To the second day of that year."""
        wrong = calendar.timegm((year, 1, 2, 0, 0, 0)) - int(time.time())
        with open(self._file, "r+b", 0) as file:
            file.write(struct.pack("q", wrong))


@pytest.mark.waits
def test_a_clock_that_jumps_to_1970_or_2040_changes_nothing(lab: Lab, site: Site, tmp_path: Path) -> None:
    clock, tunnel = Clock(tmp_path), site.tunnel
    with clock.seen():
        server = site.serve(keys=None, new_ids_per_hour=10)
        client = tunnel.client(id="client", fingerprint=site.fingerprint)
    prefix = client.prefix()
    witness = tunnel.peer("witness", host="second").connected()
    witness.echo()
    for outage, year in enumerate((1970, 2040), 1):
        slow = tunnel.connect()
        with tunnel.peer("client") as rival:
            slow.sock.sendall(b'{"Id": "slow')
            assert rival.connected().prefix == prefix
            client.wait_for("no connection", outage)
            clock.jump(year)  # while the client waits to try again, and the server for the rest of a hello
            slow.sock.sendall(b' client"}')
            slow.connected().echo()
        witness.echo()
        tunnel.visit(f"newcomer of {year}")
        assert client.prefix(outage + 1) == prefix
        ping(lab, "client")
        for program in (server, client):
            assert re.findall(r"^\d+", program.log(), re.MULTILINE)[-1] == str(year)  # it did see the jump
    witness.echo()
    server.said("INFO 'witness'", 1)
    assert all(program.stop() < SERVER_ENDS_S for program in (client, server))


@pytest.mark.waits
def test_a_client_that_stops_for_ten_seconds_is_in_nobodys_way_and_works_again(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    stopped, near, far = tunnel.client(), tunnel.client(id="near", tun="near", default_route="no"), tunnel.client("second")
    prefixes = {client: client.prefix() for client in (stopped, near, far)}
    lab.ip("client", f"-6 route add {Lab.INTERNET} dev near")
    deaf = tunnel.peer("deaf", host="second").connected()

    def up(client: Program) -> None:
        transfer(lab, client.host, "internet", Lab.INTERNET, 3_000_000)

    def down(client: Program) -> None:
        transfer(lab, "internet", client.host, str(prefixes[client][1]), 3_000_000)

    before = memory(server)
    began, moved, most, queued = time.monotonic(), 0, 0, 0
    with paused(stopped), udp_flood(lab, (deaf.prefix, prefixes[stopped]), rate=5000), ThreadPoolExecutor(2) as pool:
        while time.monotonic() < began + 10:
            for move in (up, down):
                for each in [pool.submit(move, client) for client in (near, far)]:
                    each.result(20)
            moved += 1
            most = max(most, memory(server))
            queued = max(queued, status_of(server)["queued"])
    assert moved > 1
    assert 1 << 20 < queued <= 2.5 * tun6.SEND_QUEUE_MAX, "the flood never filled the connections"
    assert most - before < 16 << 20
    lab.ip("client", f"-6 route del {Lab.INTERNET} dev near")
    ping(lab, "client")
    assert stopped.log().count(": has ") == 1
    assert ": gone," not in server.log()


def test_thirty_peers_that_do_not_read_share_a_bounded_memory(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    bound = 64 << 20
    bystander = tunnel.peer("by-stander", host="second").connected()
    deaf = tunnel.crowd(30, ["tso6", "uso6"])
    for peer in deaf:
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    before = memory(server)
    with udp_flood(lab, [peer.prefix for peer in deaf], rate=4000, train=40):
        wait_until("much waits", lambda: status_of(server)["queued"] > bound * 3 // 4, 20)
        enough = sent_into(lab, "server", session_of(server, "client 0")[1]) + 2 * tun6.SEND_QUEUE_MAX
        wait_until("more came than one may have", lambda: sent_into(lab, "server", session_of(server, "client 0")[1]) > enough, 20)
        assert status_of(server)["queued"] <= bound
        bystander.echo()
        assert memory(server) - before < bound + (16 << 20)
    for peer in [bystander, *deaf]:
        peer.close()
    wait_until("what waited is forgotten", lambda: status_of(server)["queued"] == 0)
    wait_until("its memory is given back", lambda: memory(server) - before < bound // 4)


@pytest.mark.waits
def test_a_log_that_nobody_reads_stops_nothing_and_later_says_what_was_lost(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    control = str(tmp_path / "control")
    config = tunnel.config("server", control=control)
    pipe, stderr = os.pipe()
    fcntl.fcntl(pipe, 1031, 4096)  # F_SETPIPE_SZ, fcntl(2): the least
    text = ""

    def read(words: str) -> None:
        """Reads the log up to where these are."""
        nonlocal text
        while words not in text:
            assert select.select([pipe], [], [], 5)[0], f"{words!r} do not come"
            text += os.read(pipe, 1 << 16).decode()

    def complain(times: int) -> None:
        """Lets the server say so many times that a request makes no sense."""
        for _ in range(times):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(control)
                sock.sendall(b"?")
                assert sock.recv(1) == b""

    with ExitStack() as undo:
        undo.callback(os.close, pipe)
        server = lab.popen("server", sys.executable, TUN6, "server", "-v", "-c", str(config), stderr=stderr, stdin=subprocess.DEVNULL)
        undo.callback(server.wait)
        undo.callback(server.kill)
        os.close(stderr)
        read(" serving ")
        complaints = tun6.LOG_LINES_MAX + 1500
        complain(complaints)
        peer = tunnel.peer().connected()
        peer.echo()
        read("lines of the log were lost")
        while select.select([pipe], [], [], 2)[0]:  # what else waits
            text += os.read(pipe, 1 << 16).decode()
        lost = sum(map(int, re.findall(r"WARNING (\d+) lines of the log were lost, as nobody read them\n", text)))
        assert lost > 1000
        assert complaints <= text.count(" control: ") + lost <= complaints + 10  # what else it said about the peer
        complain(1000)  # the pipe is full again
        peer.echo()
        server.terminate()
        assert server.wait(SERVER_ENDS_S + tun6.LOG_FLUSH_S) == 0


BUSYBOX = "BusyBox v1.36.1 (2023-11-07 18:53:09 UTC) multi-call binary.\\n\\nUsage: ip [OPTIONS] address|route|link [ARGS]"


def test_the_ip_of_busybox_is_named(tunnel: Tunnel, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    ip = tmp_path / "bin" / "ip"
    ip.write_text(f"#!/bin/sh\nprintf '{BUSYBOX}' >&2; exit 1\n")
    ip.chmod(0o755)
    with tun6_with(tmp_path, f"os.environ['PATH'] = '{ip.parent}:' + os.environ['PATH']"):
        for role in ("server", "client"):
            sentence = tunnel.failure_at_start(role)
            assert "install iproute2 (on OpenWrt the package ip-full)" in sentence
            assert "Usage" not in sentence


def slow_ip(folder: Path, seconds: float, pattern: str = ".", once: bool = False) -> str:
    """Lines of Python by which tun6 gets an `ip` that waits before it runs commands in which the pattern is."""
    (folder / "slow").mkdir()
    wait = f"sleep {seconds}" if seconds < 5 else "exec sleep 600"
    if once:
        wait = f"[ -e {folder}/waited ] || {{ touch {folder}/waited; {wait}; }}"
    ip = folder / "slow" / "ip"
    ip.write_text(f"""#!/bin/sh
PATH={os.environ["PATH"]}
[ "$*" = "-6 -force -batch -" ] || exec {shutil.which("ip")} "$@"
commands=$(cat)
case "$commands" in *{pattern}*) {wait};; esac
echo "$commands" | {shutil.which("ip")} "$@"
""")
    ip.chmod(0o755)
    return f"os.environ['PATH'] = {str(ip.parent)!r}"


def test_a_client_for_whom_ip_hangs_is_refused_and_the_others_go_on(tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, slow_ip(tmp_path, 600, str(prefix_of_pool(tunnel, 1))), "tun6.IP_S = 0.5"):
        server = tunnel.server()
    first = tunnel.peer("first").connected()
    newcomer = tunnel.peer("newcomer")
    assert newcomer.answer()["Error"] == "server-error"
    server.wait_for("ERROR `ip` did not end within")
    first.echo()
    tunnel.visit("first")


def test_a_server_whose_ip_hangs_ends_in_time(tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, slow_ip(tmp_path, 600, "del"), "tun6.IP_S = 0.3"):
        server = tunnel.server()
    tunnel.peer().connected()
    assert server.stop() < SERVER_ENDS_S
    tunnel.lab.ip("server", f"-6 route del unreachable {tunnel.pool}")


@pytest.mark.parametrize("role", ["server", "client"])
def test_an_ip_that_hangs_once_at_the_end_leaves_nothing(lab: Lab, tunnel: Tunnel, tmp_path: Path, role: str) -> None:
    with tun6_with(tmp_path, slow_ip(tmp_path, 600, "route?del", once=True), "tun6.IP_S = 0.5"):
        server = tunnel.server()
        client = tunnel.client()
        client.prefix()
    program = {"server": server, "client": client}[role]
    assert program.stop() < SERVER_ENDS_S
    program.wait_for("ERROR `ip` did not end within")
    assert "unreachable" not in lab.ip(role, "-6 route show table all proto 116")


CLOSE_HANGS = """
class Device:
    def __init__(self, *args, **options):
        self._device = make(*args, **options)
        self.name, self.fileno = self._device.name, self._device.fileno
    def close(self):
        time.sleep(600 if self.name == 'tun6-0' else 0)
        self._device.close()
make, tun6.pytun.TunTapDevice = tun6.pytun.TunTapDevice, Device
tun6.TUN_CLOSE_S = 0.5
"""


def test_a_tun_that_does_not_close_keeps_its_id_out_no_longer(tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, CLOSE_HANGS):
        server = tunnel.server()
    prefix = tunnel.visit("a")
    server.wait_for("ERROR TUN device tun6-0: its close does not end")
    assert tunnel.visit("a") == prefix
    server.kill()
    tunnel.server()  # removes the pool's route


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_signal_to_the_whole_process_group_leaves_no_route(lab: Lab, tunnel: Tunnel, tmp_path: Path, role: str) -> None:
    with tun6_with(tmp_path, slow_ip(tmp_path, 0.3, "unreachable"), "os.setpgid(0, 0)"):
        server = tunnel.server()
        client = tunnel.client()
        client.prefix()
    program = {"server": server, "client": client}[role]
    program.process.terminate()  # now `ip` runs for 0.3 s
    wait_until("ip runs", lambda: processes_of(program.process.pid))
    os.killpg(program.process.pid, signal.SIGTERM)
    assert program.process.wait(10) == 0
    assert "unreachable" not in lab.ip(role, "-6 route show proto 116")


NO_DEVICE = """
def fail(*args, **options):
    raise OSError(errno.{code}, os.strerror(errno.{code}))
tun6.pytun.TunTapDevice = fail
"""


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("ENOENT", "modprobe tun"),
        ("ENODEV", "reboot"),
        ("EPERM", "let this container have the device /dev/net/tun"),
        ("EBUSY", "another `tun`"),
    ],
)
def test_a_tun_that_can_not_be_made_comes_with_advice(tunnel: Tunnel, tmp_path: Path, code: str, advice: str) -> None:
    with tun6_with(tmp_path, NO_DEVICE.format(code=code)):
        assert advice in tunnel.failure_at_start("client")


READ_ONLY = """
write_text = tun6.Path.write_text
def refuse(path, text, *more):
    if str(path).startswith('/proc/sys'):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    return write_text(path, text, *more)
tun6.Path.write_text = refuse
"""


def test_a_read_only_proc_sys_is_warned_of_once(tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, READ_ONLY):
        server = tunnel.server()
    tunnel.visit("a")
    tunnel.visit("b")
    server.said("can't be turned off: Read-only file system; make /proc/sys writable", 3)


RELAY = """
import asyncio, sys
listen, to, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
async def copy(reader, writer):
    loop = asyncio.get_running_loop()
    while data := await reader.read(65536):
        if delay:
            loop.call_later(delay, writer.write, data)
        else:
            writer.write(data)
            await writer.drain()
async def serve(reader, writer):
    far_reader, far_writer = await asyncio.open_connection('127.0.0.1', to)
    copies = [asyncio.create_task(copy(reader, far_writer)), asyncio.create_task(copy(far_reader, writer))]
    await asyncio.wait(copies, return_when='FIRST_COMPLETED')
    writer.transport.abort()
    far_writer.transport.abort()
async def main():
    server = await asyncio.start_server(serve, '0.0.0.0', listen)
    print('ready', flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def relayed(lab: Lab, port: int, delay: float = 0) -> Iterator[int]:
    """A relay on the server's host, which answers for the server whatever happens to that; gives its port."""
    relay = lab.popen("server", sys.executable, "-c", RELAY, str(port + 20_000), str(port), str(delay), stdout=subprocess.PIPE)
    try:
        assert cast(Any, relay.stdout).readline() == "ready\n"
        yield port + 20_000
    finally:
        relay.kill()
        relay.communicate()


QUICK_PROBES = "tun6.PROBE_AFTER_S, tun6.DEAD_PATH_S, tun6.PATH_CHECK_S, tun6.PROBE_FIRST_S = 1.0, 3.0, 0.2, (0.1, 0.2)"


@pytest.mark.waits
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("role", ["server", "client"])
def test_a_peer_that_is_dead_behind_a_relay_is_noticed(lab: Lab, tunnel: Tunnel, tmp_path: Path, role: str, busy: bool) -> None:
    with tun6_with(tmp_path, QUICK_PROBES), relayed(lab, tunnel.port) as port, ExitStack() as undo:
        server = tunnel.server()
        client = tunnel.client(remoteport=port)
        prefix = client.prefix()
        dead, alive = (server, client) if role == "server" else (client, server)
        if busy:
            host, address = ("client", Lab.INTERNET) if role == "server" else ("internet", str(prefix[1]))
            undo.enter_context(running(lab, host, "ping", "-6", "-i", "0.01", "-s", "1400", address))
        alive.wait_for("DEBUG the path answers")
        with paused(dead):
            alive.wait_for("no sign of life for 3 s")
        client.prefix(2, 20)
        ping(lab, "client")


@pytest.mark.waits
def test_a_path_that_answers_no_probe_is_not_taken_for_dead(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "0")
    try:
        with tun6_with(tmp_path, QUICK_PROBES):
            server = tunnel.server()
            client = tunnel.client()
        client.prefix()
        time.sleep(6)  # twice the time in which one that had answered would be dead
        assert "no sign of life" not in client.log() + server.log()
        assert len(re.findall(": has ", client.log())) == 1
    finally:
        lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "1")


@pytest.mark.waits
def test_a_path_that_only_stalls_for_less_than_the_limit_loses_no_session(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, QUICK_PROBES), relayed(lab, tunnel.port) as port:
        server = tunnel.server()
        client = tunnel.client(remoteport=port)
        client.prefix()
        client.wait_for("DEBUG the path answers")
        with paused(server):
            time.sleep(2)  # DEAD_PATH_S is 3
        ping(lab, "client")
        assert len(re.findall(": has ", client.log())) == 1


@pytest.mark.parametrize(("delay", "link", "real"), [(0.01, "auto", True), (0, "auto", False), (0, "real", True), (0.01, "lan", False)])
def test_the_round_trip_to_the_program_tells_a_lan_from_a_real_link(
    lab: Lab, tunnel: Tunnel, tmp_path: Path, delay: float, link: str, real: bool
) -> None:
    with tun6_with(tmp_path, QUICK_PROBES), relayed(lab, tunnel.port, delay) as port:
        server = tunnel.server(link=link)
        client = tunnel.client(remoteport=port, link=link)
        client.prefix()
        ping(lab, "client")
        if real:
            for program in (server, client):
                program.wait_for(": congestion control bbr")
        else:
            client.wait_for("DEBUG the path answers")
            server.wait_for("DEBUG the path answers")
            assert "congestion control bbr" not in server.log() + client.log()
        transfer(lab, "client", "internet", Lab.INTERNET, 1 << 20)


@contextmanager
def silent_path(lab: Lab, *rules: str, mtu: int = 1500) -> Iterator[None]:
    """The NAT, or its link to the server with this MTU, loses what is larger than it takes, and nobody says so.

    The rules are of nftables, of its chain forward, where "up" stands for what goes to the server, and "down" for what comes.
    """
    large = "; ".join(rule.replace("up", "oifname eth0").replace("down", "iifname eth0") for rule in rules)
    silent = "chain out { type filter hook output priority 0; icmp type destination-unreachable drop; }"
    table = f"table inet silent {{ {silent}; chain on {{ type filter hook forward priority 0; {large}; }}; }}"
    ends = ("client", "server")
    with ExitStack() as undo:
        for host in ends:
            (link,) = json.loads(lab.ip(host, "-d -j link show dev eth0"))
            undo.callback(lab.ip, host, f"link set eth0 gso_max_segs {link['gso_max_segs']}")
            lab.ip(host, "link set eth0 gso_max_segs 1")  # otherwise the NAT gets many segments as one packet
            undo.callback(lab.ip, host, "route flush cache")
            lab.ip(host, "route flush cache")
        undo.callback(lab.ip, "nat", "link set eth0 mtu 1500")
        lab.ip("nat", f"link set eth0 mtu {mtu}")
        done = lab.run("nat", "nft", table)
        assert not done.returncode, done.stderr
        undo.callback(lab.run, "nat", "nft", "delete table inet silent")
        yield


UP, DOWN = "up ip length > 1300 drop", "down ip length > 1300 drop"
STALL_MAX_S = 10  # the issue: within that time traffic passes
VANISH = "WARNING large packets to .* vanish on the path: from now on it gets none above (1280|576) bytes"


def timed_transfer(lab: Lab, way: str, prefix: IPv6Network, size: int = 256 << 10) -> float:
    """Moves so many bytes "up" to the Internet or "down" from there. Gives the seconds that it took."""
    began = time.monotonic()
    ends = ("client", "internet", Lab.INTERNET) if way == "up" else ("internet", "client", str(prefix[1]))
    transfer(lab, *ends, size)
    return time.monotonic() - began


@pytest.mark.waits
@pytest.mark.parametrize(
    ("rules", "mtu", "stalls"),
    [
        ((UP,), 1500, {"up": "client"}),
        ((DOWN,), 1500, {"down": "server"}),
        ((UP, DOWN), 1500, {"down": "server", "up": "client"}),
        ((), 1400, {"up": "client"}),
    ],
    ids=["upload", "download", "both", "routers fragment"],
)
def test_where_large_packets_vanish_traffic_passes_within_ten_seconds_and_then_without_a_stall(
    lab: Lab, tunnel: Tunnel, server: Program, rules: tuple[str, ...], mtu: int, stalls: dict[str, str]
) -> None:
    client = tunnel.client()
    prefix = client.prefix()
    ping(lab, "client")
    programs = {"client": client, "server": server}
    with silent_path(lab, *rules, mtu=mtu):
        for way, role in stalls.items():
            assert 1 < timed_transfer(lab, way, prefix) < STALL_MAX_S
            programs[role].said(VANISH, 1)
            assert timed_transfer(lab, way, prefix) < 1
        assert len(re.findall(": has ", client.log())) == 1
        if len(rules) == 1:  # the other end begins anew, and the kernels have forgotten
            for host in programs:
                lab.ip(host, "route flush cache")
            other = programs["server" if role == "client" else "client"]
            other.stop()
            other.start()
            client.prefix(2)
            assert timed_transfer(lab, way, prefix) < 1
            programs[role].said(VANISH, 1)


@pytest.mark.waits
def test_where_small_packets_are_lost_the_path_keeps_its_mtu(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    client.prefix()
    with Echo(lab) as echo:
        with silent_path(lab, "up ip length > 60 drop"):  # only empty segments pass
            echo.send(1)
            time.sleep(5)  # in 3 s a large one would have been found
        echo.expect_replies({1})
    time.sleep(tun6.MTU_CHECK_S)
    assert not re.search("vanish", client.log())


@pytest.mark.waits
def test_without_the_right_to_tell_the_kernel_routers_may_fragment(lab: Lab, tunnel: Tunnel, server: Program, tmp_path: Path) -> None:
    with tun6_with(tmp_path, "def refuse(*_): raise PermissionError", "tun6.set_path_mtu = refuse"):
        client = tunnel.client()
    prefix = client.prefix()
    with silent_path(lab, mtu=1400):
        assert timed_transfer(lab, "up", prefix) < STALL_MAX_S
    client.said("WARNING the server does not get what is sent, perhaps .*: routers may fragment them now", 1)


@pytest.mark.waits
def test_what_the_kernel_forgets_of_the_path_is_renewed(lab: Lab, tunnel: Tunnel, server: Program, tmp_path: Path) -> None:
    with tun6_with(tmp_path, "tun6.MTU_RENEWAL_S = 1.0"):
        client = tunnel.client()
    prefix = client.prefix()
    with sysctl(lab, "client", "net.ipv4.route.mtu_expires", "3"), silent_path(lab, UP):
        timed_transfer(lab, "up", prefix)
        client.said(VANISH, 1)
        time.sleep(4)
        assert timed_transfer(lab, "up", prefix) < 1
        client.stop()


@pytest.mark.waits
def test_a_tls_handshake_passes_where_large_packets_vanish(lab: Lab, site: Site) -> None:
    key = site.issue("a")
    server = site.serve()
    with silent_path(lab, UP.replace("1300", "600"), DOWN.replace("1300", "600")):
        client = site.client("a", key)
        client.prefix(1, STALL_MAX_S)
        server.said(VANISH, 1)
        assert "no connection" not in client.log()


@pytest.mark.waits
def test_a_legacy_peer_is_helped_as_far_as_that_is_possible(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    server = tunnel.server()
    with silent_path(lab, DOWN), LegacyClient(lab, tunnel) as old:
        assert timed_transfer(lab, "down", old.prefix) < STALL_MAX_S
        server.said(VANISH, 1)
    server.stop()
    with silent_path(lab, DOWN), LegacyServer(lab, tunnel), tun6_with(tmp_path, QUICK_PROBES):
        client = tunnel.client()
        client.wait_for("DEBUG the path answers")
        with tcp_between(lab, "internet", "client", str(client.prefix()[1])) as (sender, receiver):
            sender.sendall(bytes(100_000))
            client.wait_for("no sign of life for 3 s")
            client.prefix(2)
            client.said("WARNING perhaps large packets from the server vanish on the path: it is asked for segments of 1220 bytes", 1)
            assert len(receiver.makefile("rb").read(100_000)) == 100_000


@contextmanager
def loaded(lab: Lab, prefix: IPv6Network, size: int) -> Iterator[None]:
    """Meanwhile two connections move so many bytes through the tunnel, one each way; all must arrive by the end, but not in a hurry."""
    ends = [("client", "internet", Lab.INTERNET), ("internet", "client", str(prefix[1]))]
    with ExitStack() as undo:
        pairs = [undo.enter_context(tcp_between(lab, *each)) for each in ends]
        threads = undo.enter_context(ThreadPoolExecutor())
        for sock in chain(*pairs):
            sock.settimeout(60)
        sent = [threads.submit(sender.sendall, bytes(size)) for sender, _ in pairs]
        arrived = [threads.submit(lambda end=receiver: len(end.makefile("rb").read(size))) for _, receiver in pairs]  # type: ignore[misc]
        yield
        assert [work.result(60) for work in arrived] == [size, size]
        for done in sent:
            done.result(1)


@contextmanager
def slow_link(lab: Lab) -> Iterator[None]:
    """The NAT's links carry 8 Mbit/s each way, behind a buffer of a second."""
    with ExitStack() as undo:
        for device in ("eth0", "eth1"):
            undo.callback(lab.run, "nat", "tc", "qdisc", "del", "dev", device, "root")
            done = lab.run("nat", *f"tc qdisc add dev {device} root tbf rate 8mbit burst 10k latency 1s".split())
            assert not done.returncode, done.stderr
        yield


@pytest.mark.waits
def test_a_path_that_is_dead_for_twenty_seconds_slow_or_lossy_costs_neither_session_nor_size(
    lab: Lab, tunnel: Tunnel, server: Program
) -> None:
    client = tunnel.client()
    prefix = client.prefix()
    ping(lab, "client")
    with loaded(lab, prefix, 8 << 20), silent_path(lab, "up drop", "down drop"):
        time.sleep(20)
    with slow_link(lab), loaded(lab, prefix, 2 << 20):
        pass
    with silent_path(lab, "numgen random mod 100 < 5 drop"):
        for way in ("up", "down"):
            timed_transfer(lab, way, prefix, 64 << 10)
    assert len(re.findall(": has ", client.log())) == 1
    assert "large packets" not in client.log() + server.log()
    for host, address in (("client", Lab.SERVER), ("server", "10.9.0.2")):
        assert "mtu" not in lab.ip(host, f"route get {address}")


@pytest.mark.waits
def test_with_mss_set_both_directions_pass_where_large_packets_vanish(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(mss=1220)
    prefix = client.prefix()
    with silent_path(lab, UP, DOWN):
        for way in ("up", "down"):
            assert timed_transfer(lab, way, prefix) < 1
    assert "large packets" not in client.log() + server.log()


def test_what_a_manager_strips_from_the_client_is_put_back_in_place(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client()
    prefix = client.prefix()
    ping(lab, "client")
    index = tun_of(lab)["ifindex"]
    table = tun6.OWNER_BASE + client.process.pid
    steps = [f"addr del {prefix[1]}/128 dev tun6", f"-6 route del default dev tun6 table {table}", "link set dev tun6 down"]
    with running(lab, "internet", "ping", "-6", "-q", "-i", "0.01", str(prefix[1])):  # so that something comes in the midst of each
        for number, command in enumerate([*steps, *steps[1:]], 1):
            lab.ip("client", command)
            client.wait_for("WARNING TUN device tun6: somebody .*; it is back", number)
            wait_until("it works again", lambda: lab.pings("client"))
    assert addresses(lab) == [f"{prefix[1]}/128"]
    assert "ff00::/8 dev tun6" not in lab.ip("client", "-6 route show table local")
    assert (tun_of(lab)["ifindex"], len(re.findall(": has ", client.log()))) == (index, 1)
    lab.ip("client", steps[0])  # the sixth time in a minute
    client.prefix(2)
    assert tun_of(lab)["ifindex"] != index


def test_a_client_whose_prefix_is_changed_does_not_blame_others(tunnel: Tunnel, server: Program) -> None:
    client = tunnel.client(id="c")
    client.prefix()
    done = run_tun6("clients", "pin", "c", str(prefix_of_pool(tunnel, 9)), "-c", str(server.config))
    assert (done.returncode, done.stderr) == (0, "")
    assert client.prefix(2) == prefix_of_pool(tunnel, 9)
    tunnel.visit("another")  # by now the news of routes and addresses has been looked at
    assert "somebody" not in client.log()


OFTEN = "tun6.FORWARDING_CHECK_S = 0.2"


BEHIND = "2001:db8:cccc::2"  # on the Internet, over a link with a smaller MTU


UPLINK = (("server", "eth1"), ("internet", "eth0"))


@contextmanager
def link_local_server(lab: Lab) -> Iterator[None]:
    """The server's host has link-local addresses only, by which it and the Internet route to each other."""
    near, far = (re.findall(r"fe80::\S+(?=/)", lab.ip(host, f"-6 addr show dev {device}"))[0] for host, device in UPLINK)
    changes = (
        ("internet", f"addr add {BEHIND}/128 dev lo", f"addr del {BEHIND}/128 dev lo"),
        ("internet", f"-6 route replace default via {near} dev eth0", "-6 route replace default via 2001:db8:ffff::1 dev eth0"),
        ("server", "addr del 2001:db8:ffff::1/64 dev eth1", "addr add 2001:db8:ffff::1/64 dev eth1 nodad"),
        ("server", f"-6 route add {Lab.INTERNET} via {far} dev eth1", f"-6 route del {Lab.INTERNET}"),
        ("server", f"-6 route add {BEHIND} via {far} dev eth1 mtu lock 1300", f"-6 route del {BEHIND}"),
    )
    with ExitStack() as undo:
        for host, change, back in changes:
            lab.ip(host, change)
            undo.callback(lab.ip, host, back)
        yield


def own_addresses(lab: Lab) -> list[str]:
    """The server's addresses on lo, besides ::1."""
    return re.findall(r"inet6 (2\S+)/128", lab.ip("server", "-6 addr show dev lo"))


def last_of(pool: IPv6Network, number: int = 1) -> IPv6Network:
    """The last /64, or with 2 the one before."""
    return IPv6Network(((int(pool.broadcast_address) >> 64) - number + 1 << 64, 64))


def test_a_server_with_link_local_addresses_only_sends_errors_that_arrive(lab: Lab, tunnel: Tunnel) -> None:
    with link_local_server(lab):
        server = tunnel.server()
        last = last_of(tunnel.pool)
        server.said(f"WARNING this machine has no IPv6 address that is routed, .*; so lo has {last[1]}, and no client gets {last}", 1)
        client = tunnel.client()
        prefix = client.prefix()
        with lan_behind(lab, prefix) as lan:
            ping(lab, "lan", BEHIND)
            transfer(lab, "lan", "internet", BEHIND, 5 << 20)
            assert "mtu 1300" in lab.ip("lan", f"-6 route get {BEHIND}")
            hops = [lab.run("lan", "ping", "-6", "-c", "1", "-W", "2", "-t", str(hop), BEHIND).stdout for hop in (1, 2)]
            assert [re.findall("From (\\S+):? icmp_seq=1 Time exceeded", hop) for hop in hops] == [[str(prefix[2])], [str(last[1])]], hops
            too_far = lab.run("internet", "ping", "-6", "-c", "1", "-W", "2", "-t", "1", "-I", BEHIND, lan).stdout
            assert f"From {last[1]}" in too_far, too_far
        client.stop()
        server.stop()
        assert own_addresses(lab) == []


def test_the_address_of_a_killed_server_is_found_and_used_again(lab: Lab, tunnel: Tunnel) -> None:
    with link_local_server(lab):
        tunnel.server().kill()
        address = str(last_of(tunnel.pool)[1])
        assert own_addresses(lab) == [address]
        server = tunnel.server()
        server.said(f"removing the address {address}, which a killed tun6 has left", 1)
        assert "is in prefixrange" not in server.log()
        assert own_addresses(lab) == [address]
        server.kill()
        lab.ip("server", "addr add 2001:db8:ffff::1/64 dev eth1 nodad")
        tunnel.server()  # now it needs none
        assert own_addresses(lab) == []
        lab.ip("server", "addr del 2001:db8:ffff::1/64 dev eth1")


def test_the_servers_own_address_comes_back_when_somebody_removes_it(lab: Lab, tunnel: Tunnel) -> None:
    with link_local_server(lab):
        server = tunnel.server()
        address = str(last_of(tunnel.pool)[1])
        lab.ip("server", f"addr del {address}/128 dev lo")
        server.said(f"WARNING somebody removed the address {address}; it is back", 1)
        assert own_addresses(lab) == [address]
        lab.ip("server", f"-6 route flush proto {tun6.ROUTE_PROTOCOL}")
        server.said(f"WARNING somebody removed the route of {tunnel.pool}; it is back", 1)
        server.said("it is back", 2)
        assert server_routes(lab, "unreachable") == {str(tunnel.pool)}


def test_an_owner_of_the_last_prefix_keeps_it_and_nobody_gets_the_servers(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    (tmp_path / "assignments.json").write_text(json.dumps({"a": str(last_of(tunnel.pool))}))
    with link_local_server(lab):
        server = tunnel.server()
        kept = last_of(tunnel.pool, 2)
        server.said(f"WARNING .*; so lo has {kept[1]}, and no client gets {kept}", 1)
        assert tunnel.visit("a") == last_of(tunnel.pool)
        done = run_tun6("clients", "pin", "b", str(kept), "-c", str(server.config))
        assert f"{kept} is already the prefix of the server itself" in only_line(done, 2)


def test_a_server_whose_machine_gets_and_loses_its_address_lends_itself_one_meanwhile(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    last, uplink = last_of(tunnel.pool), "2001:db8:ffff::1/64 dev eth1"
    with link_local_server(lab), tun6_with(tmp_path, OFTEN):
        server = tunnel.server()  # at the boot, before its router or DHCPv6 has told it one
        assert own_addresses(lab) == [str(last[1])]
        with changed(lab, "server", f"addr add {uplink} nodad"):
            server.wait_for(f"INFO this machine has an IPv6 address that is routed; {last[1]} is gone from lo")
            assert own_addresses(lab) == []
            assert tunnel.visit("a") == prefix_of_pool(tunnel, 0)
            assert run_tun6("clients", "pin", "b", str(last), "-c", str(server.config)).returncode == 0
        kept = last_of(tunnel.pool, 2)
        server.wait_for(f"WARNING this machine has no IPv6 address .*; so lo has {kept[1]}, and no client gets {kept}")
        assert own_addresses(lab) == [str(kept[1])]
        lab.ip("server", f"addr del {kept[1]}/128 dev lo")
        server.wait_for(f"WARNING somebody removed the address {kept[1]}; it is back")
        lab.ip("server", f"addr add {uplink} nodad valid_lft 2 preferred_lft 1")  # it expires
        server.wait_for("INFO this machine has an IPv6 address", 2)
        server.wait_for(f"WARNING this machine has no IPv6 address .*; so lo has {kept[1]}", 2)
        server.said("WARNING this machine has no IPv6 address", 3)
        server.stop()
        assert own_addresses(lab) == []


@pytest.mark.parametrize("how", ["a /64", "lo without IPv6"])
def test_a_server_that_can_have_no_address_warns_and_serves(lab: Lab, tunnel: Tunnel, how: str) -> None:
    pool = IPv6Network((tunnel.pool.network_address, 64 if how == "a /64" else 63))
    with link_local_server(lab):
        if how != "a /64":
            lab.set_sysctl("server", "net.ipv6.conf.lo.disable_ipv6", "1")
        try:
            server = tunnel.server(prefixrange=pool)
            words = f"{pool} has no /64 to spare" if how == "a /64" else "and it can't be given one of the pool: .*addr add"
            server.said(f"WARNING this machine has no IPv6 address that is routed, .*; {words}", 1)
            assert own_addresses(lab) == []
            for number in range(pool.num_addresses >> 64):
                tunnel.peer(f"client {number}").connected()
        finally:
            if how != "a /64":
                lab.set_sysctl("server", "net.ipv6.conf.lo.disable_ipv6", "0")
    tunnel.close()


def test_a_server_with_an_address_that_is_routed_gets_no_other(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    assert "this machine has no IPv6 address" not in server.log()
    assert own_addresses(lab) == []
    last = last_of(tunnel.pool)
    assert run_tun6("clients", "pin", "a", str(last), "-c", str(server.config)).returncode == 0
    assert tunnel.visit("a") == last


def test_forwarding_that_somebody_turns_off_is_said_once_and_so_is_its_return(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, OFTEN):
        server = tunnel.server()
    assert "IPv6 forwarding" not in server.log()
    for times in (1, 2):
        lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "0")
        try:
            server.said("WARNING somebody turned IPv6 forwarding off.*`sysctl -w net.ipv6.conf.all.forwarding=1`", times)
            time.sleep(1)
        finally:
            lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "1")
        server.said("WARNING somebody turned IPv6 forwarding off", times)
        server.said("INFO IPv6 forwarding is on again", times)


def test_forwarding_that_is_off_at_the_start_is_not_said_twice(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "0")
    try:
        with tun6_with(tmp_path, OFTEN):
            server = tunnel.server()
        server.said("WARNING IPv6 forwarding is off", 1)
        time.sleep(1)
        assert "turned IPv6 forwarding off" not in server.log()
    finally:
        lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "1")
    server.said("INFO IPv6 forwarding is on again", 1)


HOOK = "type filter hook forward priority 0;"


FIREWALLS = {  # table -> its chains, and what the server says of it
    "inet mine": (f"chain onward {{ {HOOK} policy drop; }}", "inet mine onward .*; it is nftables'; `nft insert rule inet mine onward"),
    "ip6 filter": (
        f"chain FORWARD {{ {HOOK} policy drop; }}",
        "ip6 filter FORWARD .*; it is that of ip6tables; `ip6tables -I FORWARD -i tun6-\\+",
    ),
    "inet firewalld": (
        f"chain filter_FORWARD {{ {HOOK} ct state established,related accept; reject with icmpx admin-prohibited; }}",
        "inet firewalld filter_FORWARD .*; it is firewalld's; `firewall-cmd --permanent --zone=trusted --add-source=2001:",
    ),
    "ip6 docker-bridges": (
        f"chain filter-FORWARD {{ {HOOK} policy drop; }}",
        "ip6 docker-bridges filter-FORWARD .*; it is Docker's; `nft insert",
    ),
}


OF_IPTABLES = {  # a chain beside ip6 filter FORWARD -> what the server says of it
    "DOCKER-USER": "it is Docker's; `ip6tables -I DOCKER-USER -i tun6-\\+ -j ACCEPT` and the same with -o help",
    "DOCKER": "it is Docker's; `ip6tables -I FORWARD -i tun6-\\+ -j ACCEPT` and the same with -o help",  # 20.10 with ip6tables
    "ufw6-before-forward": "it is ufw's; `ufw route allow from 2001:",
}


CASES = [(table, *rest) for table, rest in FIREWALLS.items()] + [
    ("ip6 filter", f"chain {other} {{ }}; chain FORWARD {{ {HOOK} policy drop; jump {other}; }}", words)
    for other, words in OF_IPTABLES.items()
]


@contextmanager
def firewall(lab: Lab, table: str, chains: str, host: str = "server") -> Iterator[None]:
    """A table of nftables on this host."""
    done = lab.run(host, "nft", f"table {table} {{ {chains.replace('};', '}' + chr(10))} \n}}")
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        assert lab.run(host, "nft", f"delete table {table}").returncode == 0


@pytest.mark.parametrize(("table", "chains", "words"), CASES, ids=[f"{case[0]} {case[2][:20]}" for case in CASES])
def test_a_firewall_that_drops_is_named_with_its_owner_and_what_helps(
    lab: Lab, tunnel: Tunnel, tmp_path: Path, table: str, chains: str, words: str
) -> None:
    with tun6_with(tmp_path, OFTEN):
        server = tunnel.server()
    with firewall(lab, table, chains):
        server.said(f"WARNING the firewall's chain .*{words}", 1)
        time.sleep(0.6)
        server.said("WARNING the firewall", 1)
    server.said("INFO the firewall's chain .* does not stand in the way", 1)


def test_what_the_warning_says_helps(lab: Lab, tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, OFTEN):
        server = tunnel.server()
    tunnel.client().prefix()
    ping(lab, "client")
    with firewall(lab, "inet mine", FIREWALLS["inet mine"][0]):
        (command,) = server.said("WARNING the firewall's chain inet mine onward .*`(.*)`", 1)
        assert not lab.pings("client")
        for name in ("iifname", "oifname"):
            assert lab.run("server", "sh", "-c", command.replace("iifname", name)).returncode == 0
        ping(lab, "client")
        server.said("INFO the firewall's chain inet mine onward does not stand in the way", 1)


@pytest.mark.parametrize(
    ("table", "chains"),
    [
        ("ip filter", f"chain FORWARD {{ {HOOK} policy drop; }}"),
        ("inet a", "chain input { type filter hook input priority 0; policy accept; ip6 saddr 2001:db8:dead::1 drop; }"),
        ("inet firewalld_policy_drop", f"chain filter_forward {{ {HOOK} policy drop; ct state established,related accept; }}"),
        ("inet a", f"chain onward {{ {HOOK} policy accept; ip6 saddr 2001:db8:dead::1 drop; counter; }}"),
        ("inet a", f'chain onward {{ {HOOK} policy drop; iifname "tun6-*" accept; oifname "tun6-*" accept; }}'),
    ],
)
def test_a_firewall_that_lets_clients_pass_is_not_warned_of(lab: Lab, tunnel: Tunnel, tmp_path: Path, table: str, chains: str) -> None:
    with firewall(lab, table, chains):
        with tun6_with(tmp_path, OFTEN):
            server = tunnel.server()
        with firewall(lab, "inet mine", FIREWALLS["inet mine"][0]):
            server.said("WARNING the firewall's chain inet mine", 1)
        server.said("WARNING the firewall", 1)


IP6TABLES = {
    "-P FORWARD DROP": "that of ip6tables; `ip6tables -I FORWARD",
    "-P FORWARD DROP\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER": "Docker's",
    "-P FORWARD DROP\n-A FORWARD -j ufw6-before-forward": "ufw's",
    "-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp6-adm-prohibited": "that of ip6tables",
    "-P FORWARD ACCEPT\n-A FORWARD -s 2001:db8:dead::1/128 -j DROP": "",
    "-P FORWARD DROP\n-A FORWARD -i tun6-+ -j ACCEPT": "",
}


@pytest.mark.parametrize(("rules", "words"), IP6TABLES.items())
def test_without_nft_ip6tables_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: str, words: str) -> None:
    (tmp_path / "ip6tables").write_text(f"#!/bin/sh\n[ \"$*\" = '-w -S' ] && echo '{rules}'\n")
    (tmp_path / "ip6tables").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = tun6.run_in_thread(tun6.find_dropping_chains, "tun6-*", POOL)
    assert list(found) == (["ip6 filter FORWARD"] if words else [])
    assert words in "".join(found.values())
    (tmp_path / "ip6tables").unlink()
    assert tun6.run_in_thread(tun6.find_dropping_chains, "tun6-*", POOL) == {}


@pytest.mark.parametrize("script", ["exec sleep 2", "echo no JSON", "echo '{}'", "exit 1"])
def test_an_nft_that_hangs_or_fails_keeps_nobody_waiting(lab: Lab, tunnel: Tunnel, tmp_path: Path, script: str) -> None:
    (tmp_path / "bin").mkdir()
    nft = tmp_path / "bin" / "nft"
    nft.write_text(f"#!/bin/sh\n: > {tmp_path}/begun\n{script}\n")
    nft.chmod(0o755)
    with tun6_with(tmp_path, OFTEN, "tun6.IP_S = 1.0", f"os.environ['PATH'] = '{nft.parent}:' + os.environ['PATH']"):
        server = tunnel.server()
    wait_until("nft begins", (tmp_path / "begun").exists)
    began = time.monotonic()
    tunnel.visit("a")
    assert time.monotonic() - began < 0.9
    if script != "echo '{}'":
        server.wait_for("DEBUG the firewall can't be looked at", 2)
    lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "0")
    try:
        server.said("WARNING somebody turned IPv6 forwarding off", 1)
    finally:
        lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "1")
    assert server.stop() < SERVER_ENDS_S
    wait_until("the last nft ends", lambda: not lab.run("server", "ip", "netns", "pids", lab._names["server"]).stdout.split()[1:])


# ---- end to end: doctor ----------------------------------------------------------------------------------------------

QUICK_DOCTOR = ("tun6.POOL_S = 0.5", "tun6.LISTEN_S = 0.5", "tun6.PROVE_AGAIN_S = 0.3", "tun6.CONNECT_S = 1.0", "tun6.HANDSHAKE_S = 3.0")


WITHOUT_BBR = [
    "class Socket(tun6.socket.socket):",
    "    def setsockopt(self, *option):",
    "        if option[-1] == b'bbr':",
    "            raise FileNotFoundError(errno.ENOENT, 'No such file or directory')",
    "        super().setsockopt(*option)",
    "tun6.socket.socket = Socket",
]


class Patient:
    """A machine of the lab, examined by a config.ini."""

    def __init__(self, lab: Lab, folder: Path, config: Path, host: str = "", role: str = "") -> None:
        self._lab, self._folder, self.config = lab, folder, config
        self._role = role or config.stem.partition("-")[2]
        self._host = host or self._role

    def findings(self, *first: str, faults: Sequence[str] = ()) -> dict[str, list[str]]:
        """What each check finds: results and texts. The program `first` runs the doctor, which itself has these faults."""
        (folder := self._folder / "doctor").mkdir(exist_ok=True)
        with tun6_with(folder, *QUICK_DOCTOR, *faults):
            command = [*first, sys.executable, TUN6, "doctor", self._role, "-c", str(self.config), "--json"]
            done = self._lab.run(self._host, *command, timeout=60)
        assert done.stderr == "", done.stderr
        found: dict[str, list[str]] = {}
        for each in json.loads(done.stdout)[self._role]:
            found.setdefault(each["check"], []).append(f"{each['result']} {each['text']}")
        assert done.returncode == int(any(text.startswith("FAIL") for texts in found.values() for text in texts)), found
        return found

    def shows(self, *first: str, faults: Sequence[str] = (), **symptoms: str) -> None:
        """These checks, with _ for a blank, find something that begins with this pattern, and all others find nothing wrong."""
        found = self.findings(*first, faults=faults)
        for check, pattern in symptoms.items():
            assert any(re.match(pattern, text) for text in found[check.replace("_", " ")]), (check, pattern, found)
        others = [text for check, texts in found.items() if check.replace(" ", "_") not in symptoms for text in texts]
        assert not [text for text in others if re.match("FAIL|warn", text)], others

    def edit(self, **settings: object) -> Patient:
        """The same machine with another config.ini, None to leave a key out."""
        section, *lines = [line for line in self.config.read_text().splitlines() if line]
        keys: dict[str, Any] = dict(line.split(" = ", 1) for line in lines)
        other = write_ini(self.config.with_name(f"other-{self.config.name}"), **{section.strip("[]"): {**keys, **settings}})
        other.chmod(0o600)
        return Patient(self._lab, self._folder, other, self._host, self._role)


def mounting(what: str, *command: str) -> tuple[str, ...]:
    """The beginning of a command that sees this mount alone."""
    return "unshare", "-m", "sh", "-c", f'mount {what} && exec "$@"', "sh", *command


@contextmanager
def without_file(path: Path) -> Iterator[None]:
    """A file is away meanwhile."""
    away = path.rename(path.with_name(path.name + ".away"))
    try:
        yield
    finally:
        away.rename(path)


@contextmanager
def link_with(lab: Lab, host: str, device: str, setting: str, usual: str) -> Iterator[None]:
    """A setting of `ip link` is another one meanwhile."""
    lab.ip(host, f"link set {device} {setting}")
    try:
        yield
    finally:
        lab.ip(host, f"link set {device} {usual}")


@contextmanager
def without_table(lab: Lab) -> Iterator[None]:
    """The client's firewall is away; the client, which does not run, puts it back."""
    assert lab.run("client", "nft", "delete table inet tun6").returncode == 0
    yield


@contextmanager
def another_router(lab: Lab) -> Iterator[None]:
    """A LAN host says that it is an IPv6 router."""
    with socket_on(lab, "lan", kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMPV6) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        said = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
        deaf = sysctl(lab, "client", "net.ipv6.conf.eth1.accept_ra", "0")
        with deaf, repeated(functools.partial(other.sendto, said, ("ff02::1", 0)), 0.1):
            yield


@contextmanager
def rules_gone(lab: Lab) -> Iterator[None]:
    """The client's own rules for IPv6 are away meanwhile."""
    own = [f"priority {line.strip()}".replace(":", "", 1) for line in lab.ip("client", "-6 rule show").splitlines() if "proto 116" in line]
    for each in own:
        lab.ip("client", f"-6 rule del {each}")
    try:
        yield
    finally:
        for each in own:
            lab.ip("client", f"-6 rule add {each}")


@contextmanager
def stranger(lab: Lab) -> Iterator[int]:
    """Another program than tun6 answers on a port of the server's machine, which it gives."""
    with lab.inside("server"):
        listener = socket.create_server((Lab.SERVER, 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as sock:
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    (thread := threading.Thread(target=serve)).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture
def good_server(site: Site, beyond: None) -> Program:
    """With TLS, keys and a backup."""
    site.fingerprint = make_certificate(site.cert, "-subj", "/CN=tun6", "-days", "36500")
    site.issue("somebody")
    for path in (site.cert, site.keys):
        path.chmod(0o600)
    server = site.serve(metrics="127.0.0.1:10116")
    site.clients("add", "other")
    return server


@pytest.fixture
def good_client(lab: Lab, lan: Lan, site: Site, good_server: Program, tmp_path: Path) -> Program:
    """With TLS, a key and a LAN, whose host pings."""
    key = site.clients("add", "me")["key"]
    with tun6_with(tmp_path, LISTEN_SHORTLY):
        client = site.client("me", key, lan="eth1")
    client.config.chmod(0o600)
    wait_until("the LAN host's ping is answered", lambda: lab.pings("lan"), 20)
    return client


@pytest.mark.waits
def test_the_doctor_finds_nothing_on_good_machines_and_takes_no_session(
    lab: Lab, lan: Lan, tunnel: Tunnel, good_server: Program, good_client: Program, tmp_path: Path
) -> None:
    prefix = good_client.prefix()
    before = {host: state_of(lab, host) for host in Lab.HOSTS}
    patients = [Patient(lab, tmp_path, program.config) for program in (good_client, good_server)]
    with repeated(lambda: lab.pings("internet", str(prefix[1])), 0.1):
        found = {check: texts for patient in patients for check, texts in patient.findings().items()}
    assert {host: state_of(lab, host) for host in Lab.HOSTS} == before
    assert not [text for texts in found.values() for text in texts if not text.startswith("ok ")], found
    assert found["hello"] == [f"ok the server has {prefix} for this client"]
    assert found["range"] == [f"ok packets for {tunnel.pool} come by eth1"]
    good_server.said("'me' from .*: asks whether it would be served", 1)
    good_client.said(": has ", 1)  # it goes on, in the same session
    done = lab.run("client", sys.executable, TUN6, "doctor", "-c", str(good_client.config))
    assert (done.returncode, done.stderr) == (0, "")
    assert all(re.match("(ok     |skipped| {24}|The client of )", line) for line in done.stdout.splitlines()), done.stdout


@pytest.mark.waits
def test_the_doctor_names_what_is_wrong_with_a_client(
    lab: Lab, lan: Lan, site: Site, good_server: Program, good_client: Program, tmp_path: Path
) -> None:
    me = Patient(lab, tmp_path, good_client.config)
    prefix = good_client.prefix()
    resolv = tmp_path / "resolv.conf"
    resolv.write_text(f"nameserver {Lab.INTERNET}\noptions timeout:1 attempts:1\n")
    names = mounting(f"--bind {resolv} /etc/resolv.conf")
    # what is wrong with config.ini
    me.edit(id=None).shows(Id="warn the Id is the MAC address of eth0, which its hardware does not have", hello="FAIL denied")
    me.edit(fingerprint="sha256:" + 64 * "0").shows(TLS=f"FAIL the server's certificate has another fingerprint, {site.fingerprint}")
    me.edit(remoteport=1).shows(TCP="FAIL 10.9.0.1 port 1: Connection refused; does the server run")
    other = me.edit(tun="other", lan=None, control="none.sock")
    other.config.chmod(0o644)
    found = other.findings()
    assert found["hello"] == ["skipped no client runs that knows if this server can be asked without taking its session over"]
    assert [text.partition(";")[0] for text in found["config"]] == [
        f"warn {other.config} has a key, and whoever reads it can be this client",
        "warn the whole IPv6 Internet reaches this machine at the address that it gets",
    ]
    assert found["TUN"] == ["FAIL there is no device other, so no client runs; start it, and see what its log says"]
    me.edit(remotehost="tun6.example").shows(
        *names,
        DNS="FAIL tun6.example: .*; is the name right",
        TCP="FAIL tun6.example",
        name_servers=f"FAIL {Lab.INTERNET}: all name servers are reached only through the tunnel, nor the server without it; add",
    )
    me.edit(hook="missing").shows(programs="FAIL hook = .*missing: there is no such file")
    # what is wrong with the machine
    with another_router(lab), firewall(lab, "inet mine", f"chain onward {{ {HOOK} policy drop; }}", "client"):
        me.shows(
            *names,
            LAN="FAIL the firewall's chain inet mine onward drops .*: the LAN can reach this machine only; .*`nft insert rule inet mine",
            other_routers="warn fe80::[0-9a-f:]+ is an IPv6 router on eth1, too",
            name_servers=f"warn {Lab.INTERNET}: all name servers are reached only through the tunnel; add one with IPv4",
        )
    with changed(lab, "client", "-6 route add default dev eth0 table 77", "-6 rule add priority 100 to 2000::/3 lookup 77"):
        me.shows(
            routes="FAIL what this machine begins goes to eth0, not to tun6: another program, such as a VPN, takes it",
            server_end="FAIL the other end of the tunnel can't be asked, see routes",
        )
    with rules_gone(lab):
        me.shows(routes="FAIL .* goes to nowhere, not to tun6: somebody removed that; restart", server_end="FAIL .*, see routes")
    with link_with(lab, "client", "tun6", "mtu 1400", "mtu 1500"), link_with(lab, "client", "eth1", "down", "up"):
        me.shows(TUN="warn somebody has given tun6 an mtu of 1400, not 1500", LAN="FAIL there is no interface eth1, or it is down")
    wait_until("the LAN is served again", lambda: str(prefix[1]) in lab.ip("client", "-6 addr show dev eth1"))
    stateful = "chain INPUT { type filter hook input priority 0; policy drop; iif lo accept; ct state established,related accept; }"
    with firewall(lab, "ip6 filter", stateful, "client"):
        me.shows(LAN="FAIL the firewall's chain ip6 filter INPUT drops ICMPv6, .*`ip6tables -I INPUT -p ipv6-icmp -j ACCEPT`")
    with link_with(lab, "lan", "eth0", "down", "up"):
        me.shows(LAN="FAIL eth1 has no carrier: its cable is out")
    with sysctl(lab, "client", "net.ipv6.conf.eth1.disable_ipv6", "1"):
        me.shows(LAN="FAIL IPv6 is off on eth1; turn it on with `sysctl -w net.ipv6.conf.eth1.disable_ipv6=0`")
    wait_until("the LAN is served again", lambda: str(prefix[1]) in lab.ip("client", "-6 addr show dev eth1"))
    with ExitStack() as undo:
        for interface in ("lo", "eth1"):  # radvd, without forwarding, says that it is no router, which this machine would listen to
            undo.enter_context(sysctl(lab, "client", f"net.ipv6.conf.{interface}.accept_ra", "0"))
        undo.enter_context(paused(good_client))
        undo.enter_context(without_table(lab))
        lab.ip("client", f"addr del {prefix[1]}/64 dev eth1")
        symptoms: dict[str, Any] = {
            "firewall": "FAIL the client's firewall is not there, so that everything is open",
            "server_end": "FAIL the other end of the tunnel does not answer",
        }
        lab.set_sysctl("client", "net.ipv6.conf.all.forwarding", "0")
        me.shows(LAN=f"FAIL eth1 has not got {prefix[1]}", **symptoms)
        me.shows(LAN="FAIL IPv6 forwarding is off, so that eth1 reaches this machine only", **symptoms)


@pytest.mark.waits
def test_the_doctor_names_what_is_wrong_between_client_and_server(
    lab: Lab, lan: Lan, site: Site, good_server: Program, good_client: Program, tmp_path: Path
) -> None:
    me, server = Patient(lab, tmp_path, good_client.config), Patient(lab, tmp_path, good_server.config)
    with sysctl(lab, "server", "net.ipv6.conf.all.forwarding", "0"):
        me.shows(server_end="FAIL the other end of the tunnel does not answer; is IPv6 forwarding on there")
        server.shows(forwarding="FAIL IPv6 forwarding is off, .*`sysctl -w net.ipv6.conf.all.forwarding=1`")
    with sysctl(lab, "internet", "net.ipv6.conf.all.forwarding", "0"):
        me.shows(Internet="warn nothing behind the server answers; is its range routed to it")
    route = f"default via {Lab.INTERNET}"
    lab.ip("server", f"-6 route del {route}")
    try:
        me.shows(Internet="FAIL the server 2001:db8:ffff::1 has no way to the Internet")
        with sysctl(lab, "server", "net.ipv6.conf.eth1.accept_ra", "1"):
            server.shows(uplink="FAIL this machine has no IPv6 default route, .*`sysctl -w net.ipv6.conf.eth1.accept_ra=2` helps")
        with sysctl(lab, "server", "net.ipv6.conf.eth1.accept_ra", "0"), sysctl(lab, "server", "net.ipv6.conf.eth0.accept_ra", "0"):
            server.shows(uplink="FAIL this machine has no IPv6 default route, so that clients reach nobody; ask its provider")
    finally:
        lab.ip("server", f"-6 route add {route}")
    with firewall(lab, "ip hole", f"chain onward {{ {HOOK} meta length > 1400 drop; }}", "nat"):
        me.shows(path_MTU="warn packets of 1500 bytes to or from 10.9.0.1 vanish, .*mss = 1220", large_packets="FAIL packets of 1500")
    with firewall(lab, "ip hole", f"chain onward {{ {HOOK} tcp dport {site.tunnel.port} tcp flags syn drop; }}", "nat"):
        me.shows(TCP="FAIL 10.9.0.1 port .*: no answer within .*; 10.9.0.1 answers pings, so a firewall")
    with stranger(lab) as port:
        other = "FAIL TLS failed: the other side does not speak TLS; is there another program"
        me.edit(remoteport=port).shows(TLS=other)
    site.clients("revoke", "me")
    good_client.wait_for("revoked")
    me.shows(
        hello="FAIL the client that runs has no connection: revoked: this Id was revoked",
        server_end="FAIL the other end of the tunnel does not answer: there is no connection to the server, see TCP, TLS and hello",
        LAN="FAIL the hosts of eth1 are told of no router here",
    )
    site.clients("restore", "me")
    lab.ip("client", "route del default")
    try:
        symptoms: dict[str, Any] = {"TCP": "FAIL", "server_end": "FAIL", "hello": "FAIL", "LAN": "FAIL"}
        me.shows(IPv4_route="FAIL there is no IPv4 way to the server: Network is unreachable; connect the network", **symptoms)
    finally:
        lab.ip("client", "route add default via 10.8.0.1")


@pytest.mark.waits
def test_the_doctor_names_what_is_wrong_with_a_server(lab: Lab, tunnel: Tunnel, site: Site, good_server: Program, tmp_path: Path) -> None:
    server = Patient(lab, tmp_path, good_server.config)
    site.clients("add", "another")
    (tmp_path / "hook").write_text("#!/bin/sh\n")
    # what is wrong with files and config.ini, each in a check of its own
    site.keys.chmod(0o604)
    short = tmp_path / "short.pem"
    make_certificate(short)
    short.chmod(0o600)
    filled = mounting(f"-t tmpfs -o size=64k none {tmp_path / 'full'}")
    (tmp_path / "full").mkdir()
    with firewall(lab, "ip6 filter", f"chain DOCKER-USER {{ }}; chain FORWARD {{ {HOOK} policy drop; jump DOCKER-USER; }}"):
        server.edit(max_clients=1_000_000, congestion="nonesuch", hook="hook", cert=short.name, assignments="full/a.json", mtu=1500).shows(
            *filled,
            config=f"warn others can read the secret in {site.keys}; `chmod o= ",
            descriptors="warn max_clients = 1000000 takes 2000100 descriptors, the limit is",
            BBR="FAIL congestion = nonesuch: this kernel has no such",
            hook_and_ndp="FAIL hook = .*hook: it is not executable",
            certificate="warn the certificate is valid from .*: others have no way in without `fingerprint`",
            disk="FAIL the disk of .* is full or can only be read, 64 KiB are free",
            firewall="FAIL the firewall's chain ip6 filter FORWARD .*; it is Docker's; `ip6tables -I DOCKER-USER",
        )
    site.keys.chmod(0o600)
    used = IPv6Network(f"{tunnel.pool[0]}/63")
    with without_file(site.assignments.with_name(site.assignments.name + ".bak")):
        server.shows(assignments="warn there is no .*bak, which the server makes")
    with without_file(site.assignments):
        server.shows(assignments="FAIL .* has no assignments, but .*bak has, so it was lost")
    server.edit(prefixrange=used).shows(assignments=f"FAIL all 2 /64s of {used} have an owner")
    with running(lab, "internet", "ping", "-6", "-i", "0.2", "2001:db8:ffff::1"):  # what comes for the server itself proves nothing
        server.edit(prefixrange="2001:db8:ffff::/64").shows(
            overlap="FAIL 2001:db8:ffff::1 of eth1 is in prefixrange",
            assignments="FAIL .* is outside 2001:db8:ffff::/64",
            range="warn 2001:db8:ffff::/64 is within the network of eth1: perhaps it is not routed, but needs `ndp = eth1`",
        )
    with on_link(lab, tunnel.pool), running(lab, "internet", "ping", "-6", "-i", "0.2", str(tunnel.pool[77])):
        server.shows(
            faults=["tun6.POOL_S = 4.0"],
            range=f"FAIL {tunnel.pool} is not routed here, its addresses are looked for on the link of eth7; set `ndp = eth7`",
        )
        with link_with(lab, "server", "eth7", "down", "up"):
            server.edit(ndp="eth7").shows(hook_and_ndp="FAIL ndp = eth7: it is down")
        lab.ip("internet", f"-6 route replace {tunnel.pool} dev eth7")  # it went with the link
    # what is wrong with the machine
    proc = mounting("--bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys /proc/sys")
    server.shows(*proc, faults=["tun6.RELEASED *= 2"], machine="warn /proc/sys is read-only")
    server.shows(faults=["tun6.RELEASED *= 2"], machine="warn the clock says 20.*, which is wrong")
    server.shows(*mounting("-t tmpfs none /dev/net"), machine="FAIL there is no /dev/net/tun")
    lacking: dict[str, Any] = {
        "server": "FAIL no server listens on 0.0.0.0 port",
        "forwarding": "FAIL IPv6 forwarding is off",
        "uplink": "FAIL this machine has no IPv6 default route",
        "own_address": "warn no IPv6 address here is routed",
    }
    second = Patient(lab, tmp_path, good_server.config, "second").edit(control="none.sock")
    with sysctl(lab, "second", "net.ipv6.conf.default.disable_ipv6", "1"):
        second.shows(machine="FAIL IPv6 is off in this kernel; turn it on with `sysctl -w net.ipv6.conf.all.disable_ipv6=0`", **lacking)
        of_container = "FAIL IPv6 is off in this kernel; turn it on for this container, from outside with `sysctl"
        second.shows(*proc, faults=["tun6.RELEASED *= 2"], machine=of_container, **lacking)
    second.shows(*mounting("-t tmpfs none /proc/sys/net/ipv6"), machine="FAIL this kernel has no IPv6; boot it without", **lacking)
    server.edit(control="none.sock").shows(server="FAIL another program listens on 0.0.0.0 port .*none.sock")
    with tun6_with(tmp_path, "tun6.open_icmpv6 = lambda *kinds: os.open('/dev/none', 0)"):
        good_server.stop()
        good_server.start()
        good_server.wait_for(" serving ", 2)
    server.shows(warnings="warn dead paths behind relays can't be noticed: No such file or directory")


@pytest.mark.waits
def test_the_doctor_names_a_program_a_kernels_part_and_a_firewall_that_are_in_the_way(
    lab: Lab, lan: Lan, good_server: Program, good_client: Program, tmp_path: Path
) -> None:
    server, me = Patient(lab, tmp_path, good_server.config), Patient(lab, tmp_path, good_client.config)
    (programs := tmp_path / "programs").mkdir()
    for name in ("nft", "radvd"):
        (programs / name).symlink_to(str(shutil.which(name, path=tun6.HOOK_PATH)))
    without_ip = "env", f"PATH={programs}"
    missing = "FAIL the program `ip` is missing; install it with `apt-get install iproute2`"
    for patient in (server, me):
        found = {
            check: texts for check, texts in patient.findings(*without_ip).items() if any(re.match("FAIL|warn", text) for text in texts)
        }
        assert found == {"machine": [missing]}
    with stranger(lab) as port:
        taken = "warn metrics = 10.9.0.1 port .*: they don't answer: another program has the port"
        server.edit(metrics=f"{Lab.SERVER}:{port}").shows(hook_and_ndp=taken)
    me.edit(metrics="127.0.0.1:1").shows(programs="warn metrics = 127.0.0.1 port 1: they don't answer")
    server.shows(faults=WITHOUT_BBR, BBR="warn this kernel has no BBR .`modprobe tcp_bbr`., which makes the tunnel fast")
    for table, chains, words in CASES:
        if "firewalld's" in words or "ufw's" in words:
            with firewall(lab, table, chains):
                server.shows(firewall=f"FAIL the firewall's chain .*{words}")


def dry_answer(peer: Peer, id_: str, key: str | None = None) -> dict[str, Any]:
    """What the server says to this peer's question whether it would serve the Id."""
    with peer:
        peer.sock.sendall(json.dumps({**json.loads(hello(id_, key)), "Dry": True}).encode())
        answer = peer.answer()
        assert peer.ended() == "closed"
        return answer


@pytest.mark.waits
def test_a_dry_hello_is_answered_as_a_real_one_would_be_and_changes_nothing(lab: Lab, tunnel: Tunnel) -> None:
    server = tunnel.server(prefixrange=f"{tunnel.pool[0]}/63", max_clients=1)

    def asked(id_: str) -> dict[str, Any]:
        return dry_answer(tunnel.connect(), id_)

    assert asked("first") == {"Dry": True}
    assert not assignments_in(tunnel._folder / "assignments.json")
    with tunnel.peer("first", offload=[]) as first:
        assert first.answer()["Dry"] is True  # so that its client knows
        assert asked("first") == {"Dry": True, "Prefix": str(first.prefix)}
        assert asked("second")["Error"] == "busy"
        first.echo()  # its session goes on
    wait_until("there is room", lambda: "Dry" in asked("second"))
    with tunnel.peer("second") as legacy:
        assert set(legacy.answer()) == {"Prefix"}
    wait_until_no_sessions(lab)
    wait_until("there is room, but no prefix", lambda: asked("third")["Error"] == "pool-exhausted")
    server.wait_for("'first' from .*: asks whether it would be served", 2)


@pytest.mark.waits
def test_a_dry_hello_is_no_new_id_and_hears_when_there_are_too_many(tunnel: Tunnel) -> None:
    tunnel.server(new_ids_per_hour=1)
    assert [dry_answer(tunnel.connect(), id_) for id_ in ("first", "second")] == 2 * [{"Dry": True}]
    prefix = tunnel.visit("first")
    assert dry_answer(tunnel.connect(), "second") == tunnel.refusal("second")
    assert dry_answer(tunnel.connect(), "first") == {"Dry": True, "Prefix": str(prefix)}


@pytest.mark.waits
def test_a_dry_hello_tells_who_has_no_right_key_only_what_a_real_one_tells_and_only_so_often(site: Site, tmp_path: Path) -> None:
    key = site.issue("mine")

    def asked(id_: str, of: str | None) -> dict[str, Any]:
        return dry_answer(site.connect(), id_, of)

    with tun6_with(tmp_path, "tun6.DRY_HELLOS_MAX, tun6.DRY_HELLOS_S = 3, 3600"):
        server = site.serve()
        assert [asked(id_, "k" * 43) for id_ in ("mine", "nobody's")] == 2 * [site.answer("mine", "k" * 43)]
        assert [asked("mine", key) for _ in range(4)] == 4 * [{"Dry": True}]  # who has the key may ask
        assert dry_answer(site.tunnel.connect(), "mine") == site.tunnel.refusal("mine")
        server.stop()
        server = site.serve(keys_required="no")
        assert dry_answer(site.tunnel.connect(), "mine")["Error"] == "tls-required"
        assert [asked("mine", key), asked("has none", None)] == 2 * [{"Dry": True}]
        for id_, of in (("mine", key), ("mine", None), ("has none", None)):
            assert asked(id_, of)["Text"] == "more than 3 have asked within 3600 s whether they would be served"
        assert "Prefix" in site.answer("mine", key)  # who really comes is served


@pytest.mark.waits
def test_a_default_route_that_will_be_lost_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, accept_ra, forwarding in (("eth0", 1, 1), ("eth1", 2, 1), ("eth2", 1, 0), ("eth3", 1, 1), ("lo", 1, 1), ("tun6", 1, 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "accept_ra").write_text(f"{accept_ra}\n")
        (tmp_path / name / "forwarding").write_text(f"{forwarding}\n")
    monkeypatch.setattr(tun6, "IPV6_CONF", tmp_path)
    monkeypatch.setattr(tun6, "has_ra_route", lambda routes, name: name != "eth3")
    tun6.warn_of_expiring_routes("tun6")
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["eth0 ignores router advertisements"]


def test_status_shows_the_list_and_the_doctor_examines_each_server_of_it(lab: Lab, tunnel: Tunnel, pair: Pair, tmp_path: Path) -> None:
    client = pair.client()
    at = pair.serving(client)
    names = [f"{Lab.SERVER} port {port}" for port in pair.ports]
    status = asked(client.config, "status")
    assert (status["server"], status["servers"], status["address"]) == (names[at], names, names[at])
    shown = run_tun6("status", "-c", str(client.config)).stdout
    assert f"server   {names[at]}, connected to {names[at]}\nservers  {names[0]}, {names[1]}\n" in shown
    ping(lab, "client")
    patient = Patient(lab, tmp_path, client.config)
    found = patient.findings()
    assert [text.partition(" ms")[0].rpartition(" ")[0] for text in found["TCP"]] == [f"ok {name} answers in" for name in names]
    assert found["DNS"] == ["ok " + f"{name}: the server is {Lab.SERVER}" for name in names]
    assert found["TLS"] == ["ok " + f"{name}: none is asked for" for name in names]
    assert found["hello"] == [f"ok the server has {client.prefix()} for this client"]
    pair.servers[1 - at].stop()
    found = patient.findings()
    assert [text for text in found["TCP"] if "refused" in text] == [
        f"warn {names[1 - at]}: Connection refused; does the server run, are `remotehost` and `remoteport` right, does a firewall drop it?"
    ]
    assert found["TLS"] == [
        f"{'ok' if each == at else 'skipped'} {names[each]}: {'none is asked for' if each == at else 'not possible, see TCP'}"
        for each in (0, 1)
    ]
    pair.servers[at].stop()
    found = patient.findings()
    assert [text[:4] for text in found["TCP"]] == ["FAIL", "FAIL"]


@pytest.mark.waits
def test_what_the_doctor_finds_is_warned_of_at_the_start(site: Site, beyond: None) -> None:
    key = site.issue("somebody")
    site.keys.chmod(0o644)
    server = site.serve(max_clients=1_000_000)
    server.said(f"WARNING others can read the secret in {site.keys}", 1)
    server.said("WARNING max_clients = 1000000 takes 2000100 descriptors", 1)
    server.said("WARNING the certificate is valid from .* set the clock", 1)
    client = site.client("somebody", key)
    client.prefix()
    client.said(f"WARNING {client.config} has a key, and whoever reads it can be this client", 1)


@pytest.mark.waits
def test_the_doctor_says_what_only_root_can_see_and_names_the_sides_it_has_examined(tmp_path: Path) -> None:
    path = write_ini(
        tmp_path / "both.ini",
        server={"localhost": "127.0.0.1", "listenport": 1, "prefixrange": "fd00:1::/48", "control": "none.sock"},
        client={"remotehost": "127.0.0.1", "remoteport": 1, "tun": "none"},
    )
    (tmp_path / "quick").mkdir()
    with tun6_with(tmp_path / "quick", *QUICK_DOCTOR):
        command = [sys.executable, TUN6, "doctor", "-c", str(path), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, preexec_fn=drop_privilege)
    assert (done.returncode, done.stderr) == (1, "")
    found = {side: {each["check"]: each for each in findings} for side, findings in json.loads(done.stdout).items()}
    assert list(found) == ["server", "client"]
    assert found["server"]["firewall"] == {"check": "firewall", "result": "skipped", "text": "only root can see this; run it with sudo"}
    assert found["client"]["TCP"]["text"].startswith("127.0.0.1 port 1: Connection refused")
    for wrong in (("-c", str(tmp_path / "missing")), ("client", "-c", str(write_ini(path, server={}))), ("nobody",)):
        assert run_tun6("doctor", *wrong).returncode == 2


@pytest.mark.parametrize("command", ["doctor client", "clients list"])
def test_a_command_whose_reader_has_gone_says_nothing_about_it(command: str, tmp_path: Path) -> None:
    path = write_ini(
        tmp_path / "both.ini",
        server={"localhost": "127.0.0.1", "listenport": 1, "prefixrange": "fd00:1::/48", "control": "none.sock", "assignments": "a.json"},
        client={"remotehost": "127.0.0.1", "remoteport": 1, "tun": "none"},
    )
    (tmp_path / "a.json").write_text('{"somebody": "fd00:1::/64"}')
    reader, writer = os.pipe()
    os.close(reader)
    (tmp_path / "quick").mkdir()
    with tun6_with(tmp_path / "quick", *QUICK_DOCTOR), open(writer, "wb") as output:
        words = [sys.executable, TUN6, *command.split(), "-c", str(path)]
        done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.stderr == ""


LIBPQ = 'connection failed: connection to server at "10.5.0.12", port 5432 failed: session is read-only'


@pytest.mark.parametrize(
    "text, short",
    [
        ("the connection is lost\n\tafter 3 s\n", "the connection is lost after 3 s"),
        (LIBPQ, "10.5.0.12: session is read-only"),
        (
            f"{LIBPQ}\nMultiple connection attempts failed. All failures were:\n- host: 'db1', port: '', hostaddr: '10.5.0.11': connection"
            ' failed: connection to server at "db1" (10.5.0.11), port 5432 failed: Connection refused\n\tIs the server running on that host'
            f" and accepting TCP/IP connections?\n- host: '10.5.0.12', port: '', hostaddr: '10.5.0.12': {LIBPQ}",
            "10.5.0.12: session is read-only, db1: Connection refused",
        ),
    ],
)
def test_why_the_database_can_not_be_reached_is_said_once_for_each_host(text: str, short: str) -> None:
    assert tun6.shorten_failure(text) == short


class StoreByHand:
    """Stands for tun6.Database: says of the database what the test wants, or raises it."""

    def __init__(self, answer: object) -> None:
        self._answer, self.closed = answer, False

    def __call__(self, *_: str) -> StoreByHand:
        return self

    def connect(self) -> None:
        if isinstance(self._answer, Exception):
            raise self._answer

    def examine(self) -> object:
        return self._answer

    def close(self) -> None:
        self.closed = True


POOL_ROW = tun6.PoolRow(uuid.UUID(int=1), tun6.SCHEMA_VERSION, POOL, "required", 0, "1", "1")


@pytest.mark.parametrize(
    "answer, finding",
    [
        ((POOL_ROW, [], []), "ok postgresql://db/tun6 has the pool .*, and commits wait for a synchronous standby; it answered in"),
        (tun6.StoreDown("postgresql://db/tun6: refused"), "FAIL postgresql://db/tun6: refused; known Ids are served as each server knows"),
        ((POOL_ROW._replace(prefix=HOME), [], []), f"FAIL postgresql://db/tun6 has the pool {HOME}, and prefixrange is {POOL}; all"),
        ((POOL_ROW._replace(keys="optional"), [], []), "FAIL .*the pool's clients have keys, and keys_required is yes here and not there"),
        ((POOL_ROW._replace(version=0), [], []), "FAIL .*its tables are of version 0, and not 1; `tun6.py cluster upgrade` brings it up"),
        ((POOL_ROW._replace(keys="none"), [], []), "warn open: .*claim any Id; a pool made without `cluster init --open` closes it"),
        ((POOL_ROW._replace(current="2"), ["b", "c"], []), "FAIL the store may have lost changes, .* until b, c wrote back theirs; start"),
        ((POOL_ROW, [], ["disk is slow"]), "warn the database's disk is slow"),
    ],
)
def test_the_doctor_says_how_the_store_of_a_cluster_is(answer: object, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreByHand(answer)
    monkeypatch.setattr(tun6, "Database", store)
    monkeypatch.setattr(tun6, "require_psycopg", lambda: mock.Mock(Error=StubError))
    config = tun6.ServerConfig("127.0.0.1", 1, POOL, store="postgresql://tun6:secret@db/tun6", cert="server.pem")
    doctor = tun6.ServerDoctor(config)
    found = [f"{each.result} {each.text}" for each in doctor._make("store", doctor._check_store)]
    tun6.standing_warnings.pop("open", None)
    assert len(found) == 1 and re.match(finding, found[0]), found
    assert store.closed and "secret" not in found[0]


# ---- end to end: scale -----------------------------------------------------------------------------------------------


def test_forty_clients_at_once_have_forty_prefixes_devices_and_routes_until_they_leave(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    peers = tunnel.crowd(40, None, [], ["tso6", "uso6", "new"])
    prefixes = {str(peer.prefix) for peer in peers}
    assert len(prefixes) == len(server_devices(lab)) == 40
    assert all(IPv6Network(prefix).subnet_of(tunnel.pool) for prefix in prefixes)
    assert server_routes(lab) == prefixes
    for peer, number in [(peer, peer.send_echo()) for peer in peers]:
        peer.expect_reply(number)
    for peer in peers:
        peer.close()
    wait_until_no_sessions(lab)
    server.wait_for(": gone, (?:the peer closed the connection|Connection reset by peer);", 40)


def test_a_server_with_five_hundred_clients_told_to_stop_undoes_everything_in_three_seconds(lab: Lab, tunnel: Tunnel) -> None:
    server = tunnel.server(prefixrange=IPv6Network(f"{tunnel.pool.network_address}/48"))
    peers = tunnel.crowd(500, None, ["tso6"])
    for peer in peers[:2]:
        peer.echo()
    assert len(server_devices(lab)) == 500
    assert server.stop() < 3
    assert all(peer.ended() in ("closed", "reset") for peer in peers)


def test_a_killed_servers_clients_hear_of_it_before_its_devices_are_gone(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    peers = tunnel.crowd(60)
    server.process.kill()
    assert {peer.ended() for peer in peers} <= {"closed", "reset"}
    assert len(server_devices(lab)) > 30
    server.process.wait()
    server.start()  # which removes what is left
    server.wait_for(" serving ", 2)
    wait_until_no_sessions(lab, 10)


def test_a_thousand_new_ids_at_once_cost_a_handful_of_fsyncs(tunnel: Tunnel, tmp_path: Path) -> None:
    disk, count = Disk(tmp_path), 1000
    server = disk.server(tunnel, prefixrange=IPv6Network(f"{tunnel.pool.network_address}/48"), max_clients=2000)
    with disk.stuck():  # so that they come at once whatever the machine
        peers = {f"client {number}": tunnel.peer(f"client {number}") for number in range(count)}
        wait_until("the server has them all", lambda: pending(server) >= count)
    told = {}
    for id_, peer in peers.items():
        peer.sock.settimeout(30)
        told[id_] = peer.connected().prefix
    assert assignments_in(tmp_path / "assignments.json") == told
    assert 4 <= disk.fsyncs() <= 20


def test_a_server_knows_the_last_of_ten_thousand_assignments(tunnel: Tunnel, tmp_path: Path) -> None:
    pool = IPv6Network(f"{tunnel.pool.network_address}/48")
    known = {f"client {number}": prefix for number, prefix in zip(range(10_000), pool.subnets(new_prefix=64))}
    path = tmp_path / "assignments.json"
    path.write_text(json.dumps({id_: str(prefix) for id_, prefix in known.items()}))
    tunnel.server(prefixrange=pool)
    assert tunnel.visit("client 9999") == known["client 9999"]
    known["newcomer"] = tunnel.visit("newcomer")
    assert assignments_in(path) == known


def test_the_fifth_client_of_a_pool_of_four_is_refused_and_the_four_go_on(lab: Lab, tunnel: Tunnel) -> None:
    tunnel.pool = IPv6Network(f"{tunnel.pool[0]}/62")
    tunnel.server()
    four = tunnel.crowd(4)
    refusal = tunnel.refusal("client 4")
    assert (refusal["Error"], str(tunnel.pool) in refusal["Text"]) == ("pool-exhausted", True)
    for peer in four:
        peer.echo()
    assert len(server_devices(lab)) == 4
    refused = tunnel.client("second")
    refused.wait_for("DEBUG no connection .* pool-exhausted: no free /64")
    assert len(re.findall("WARNING no connection", refused.log())) == 1


def test_a_client_too_many_is_told_that_the_server_is_busy_until_another_leaves(tunnel: Tunnel) -> None:
    server = tunnel.server(max_clients=2)
    first, _ = tunnel.crowd(2)
    assert tunnel.refusal("c")["Error"] == "busy"
    tunnel.visit("client 1")  # takes over, so it is none too many
    first.echo()
    server.wait_for("'client 1' from .*: gone", 2)
    tunnel.visit("c")


def test_new_ids_are_so_many_an_hour_and_those_that_are_known_go_on(tunnel: Tunnel) -> None:
    server = tunnel.server(new_ids_per_hour=3)
    ids = ["client 0", "client 1", "client 2"]
    tunnel.crowd(3)
    for newcomer in ("a", "b"):
        refusal = tunnel.refusal(newcomer)
        assert (refusal["Error"], "3 new Ids in an hour" in refusal["Text"]) == ("busy", True)
    for id_ in ids:
        tunnel.visit(id_)
    server.stop()
    tunnel.server(new_ids_per_hour=1)  # what the file says is known, too
    for id_ in [*ids, "new"]:
        tunnel.visit(id_)
    assert tunnel.refusal("newer")["Error"] == "busy"


def test_a_thousand_silent_connections_keep_no_honest_client_waiting(tunnel: Tunnel, server: Program) -> None:
    listening = pending(server)
    silent = []
    for number in range(1000):
        silent.append(tunnel.connect())
        if number % 250 == 249:
            served(tunnel.visit, f"elsewhere {number}", "server", 2)  # another IPv4 address
            served(tunnel.visit, f"same {number}", "second", 2)  # behind the same NAT
    assert pending(server) - listening <= tun6.HANDSHAKES_PER_HOST_MAX  # they wait in the kernel
    for peer in silent:
        peer.close()
    wait_until("all are gone", lambda: pending(server) == listening)


def test_connections_that_are_reset_while_others_come_do_no_harm(tunnel: Tunnel, server: Program) -> None:
    for _ in range(20):
        for peer in [tunnel.connect("server", f"127.0.1.{number % 4}") for number in range(100)]:
            peer.reset()
    tunnel.visit("by-hand")
    assert server.process.poll() is None


def test_who_left_while_it_waited_for_a_place_is_not_served(tunnel: Tunnel, server: Program) -> None:
    places = [tunnel.connect() for _ in range(tun6.HANDSHAKES_PER_HOST_MAX)]
    for peer in places:
        peer.sock.sendall(b"{")
    wait_until("all places are taken", lambda: pending(server) >= len(places))
    tunnel.peer("left").close()
    for peer in places:
        peer.close()
    server.wait_for("left during the handshake", len(places) + 1)
    tunnel.visit("stays")
    assert "'left'" not in server.log()


def test_those_who_say_a_byte_and_no_more_lock_nobody_out(tunnel: Tunnel, server: Program) -> None:
    for number in range(12 * 8):  # more than there is room for
        tunnel.connect("server", f"127.0.3.{1 + number // 8}").sock.sendall(b"{")
    served(tunnel.visit, "elsewhere", "client", 3)
    for _ in range(20):
        tunnel.connect().sock.sendall(b"{")
    served(tunnel.visit, "same", "second", 3)
    trickling = [tunnel.connect() for _ in range(8)]
    for _ in range(3):
        for peer in trickling:
            with suppress(OSError):  # it had to go
                peer.sock.sendall(b" ")
        served(tunnel.visit, "same", "second", 3)


def test_two_hundred_of_those_a_second_from_forty_addresses_lock_nobody_out(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    began = time.monotonic()
    socks: list[socket.socket] = []

    def connect() -> None:
        """Makes the connections that are due; each says one byte and stays."""
        while len(socks) < 200 * (time.monotonic() - began):
            socks.append(socket_on(lab, "server", socket.AF_INET, socket.SOCK_STREAM))
            socks[-1].setblocking(False)
            socks[-1].bind((f"127.0.6.{1 + len(socks) % 40}", 0))
            socks[-1].connect_ex((Lab.SERVER, tunnel.port))
            with suppress(OSError):
                socks[-1].send(b"{")

    with repeated(connect, 0.005):
        wait_until("there are many", lambda: len(socks) > 400)
        for number in range(5):
            served(tunnel.visit, f"honest {number}", "client", 2)
    for sock in socks:
        sock.close()


def come_and_go(tunnel: Tunnel, number: int, id_: str) -> None:
    """One connection from beginning to end, in one of the ways that there are."""
    hello, half = json.dumps({"Id": id_}).encode(), b'{"Id": '
    ways: list[list[Step]] = [
        [hello, Peer.connected],
        [hello, Peer.connected, Peer.echo],
        [hello, Peer.connected, Peer.reset],
        [hello, Peer.reset],  # before the answer
        [hello, Peer.connected, GARBAGE, Peer.ended],
        [hello, Peer.connected, Peer.half_close, Peer.ended],
        [half],
        [half, Peer.reset],
        [b"GET / HTTP/1.0\r\n\r\n", Peer.ended],
        [b"\x16\x03\x01\x00\x05", Peer.reset],
        [],  # silent
        [Peer.reset],
    ]
    with Peer(tunnel.lab, tunnel.port, ("client", "second", "server")[number % 3]) as peer:
        peer.do(*ways[number % len(ways)])


def test_after_many_connections_of_all_kinds_the_server_is_as_before(lab: Lab, tunnel: Tunnel, server: Program) -> None:
    fresh = status_of(server)
    crowd = 12

    def visit(numbers: range) -> None:
        def visitor(own: int) -> None:
            for number in numbers[own::crowd]:
                come_and_go(tunnel, number // crowd + own, f"visitor {own} {number % 5}")

        with ThreadPoolExecutor(crowd) as pool:
            list(pool.map(visitor, range(crowd)))  # and raises what they raise

    def quiet() -> dict[str, Any]:
        status = status_of(server)
        return {} if server_devices(lab) or status["sessions"] or status["queued"] else status

    visit(range(many(300, 1000)))  # threads of the pool, caches, the heap
    before = wait_until("all have left", quiet)
    began = time.monotonic()
    visit(range(many(1500, 20_000)))
    took = time.monotonic() - began

    kinds = ("sessions", "queued", "greenlets", "files")
    wait_until("all that they had is released", lambda: [status_of(server)[kind] for kind in kinds] == [fresh[kind] for kind in kinds], 15)
    after = quiet()
    print(f"\n{many(1500, 20_000)} connections in {took:.1f} s; fresh {fresh}, before {before}, after {after}")
    assert after["threads"] <= tun6.TUN_CLOSERS + 4
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    aligned = [int(begin, 16) % (64 << 20) == 0 for begin in re.findall(r"^(\w+)-\w+ rw-p 0+ 00:00 0 *$", maps, re.MULTILINE)]
    assert not any(aligned), "threads have heaps of their own, which glibc aligns so"
    assert after["memory"] - before["memory"] < many(4, 6) << 20
    assert not server_routes(lab)
    tunnel.visit("by-hand")


# Says each full collection of garbage, and makes objects, as many as a thousand clients do, when the file is there.
GROWING = """
import gc, gevent
kept = []
def told(phase, info):
    if phase == "start" and info["generation"] == 2:
        tun6.log.info("a full collection")
def grow():
    while not os.path.exists({flag!r}):
        gevent.sleep(0.05)
    tun6.log.info("begins to grow")
    kept.extend([number] for number in range(200_000))
    tun6.log.info("has grown")
gc.callbacks.append(told)
gevent.spawn(grow)
"""


def test_the_event_loop_does_not_wait_for_full_collections_of_garbage(tunnel: Tunnel, tmp_path: Path) -> None:
    with tun6_with(tmp_path, GROWING.format(flag=str(tmp_path / "grow"))):
        server = tunnel.server()
    (tmp_path / "grow").touch()
    server.wait_for("has grown")
    assert "a full collection" not in server.log().partition("begins to grow")[2]


# Python does not look for cycles of references, and the log says how many objects of sessions there are.
COUNTED = """
import gc, gevent
gc.disable()
kinds = tun6.Session, tun6.Stream, tun6.Tun, tun6.SendQueue, tun6.Deframer, tun6.ReadinessCallbacks, tun6.PeerPath
def count():
    while True:
        gevent.sleep(0.1)
        tun6.log.info("%d objects of sessions", sum(isinstance(each, kinds) for each in gc.get_objects()))
gevent.spawn(count)
tun6.RETRY_S = 0.1
"""


def test_what_a_session_had_is_free_at_its_end_and_not_only_when_python_looks_for_cycles(lab: Lab, site: Site, tmp_path: Path) -> None:
    of_one = 8  # objects: the interpreter may hold those of the last session until the next

    def objects(program: Program) -> int:
        before = len(re.findall("objects of sessions", program.log()))
        return int(program.wait_for(r"(\d+) objects of sessions", before + 2)[-1])

    with tun6_with(tmp_path, COUNTED):
        server = site.serve(keys=None)
        for number in range(12):
            come_and_go(site.tunnel, number, f"visitor {number % 5}")
            site.visit(f"visitor {number % 5}")
        wait_until_no_sessions(lab)
        with site.peer("a").connected() as peer:
            lab.ip("server", f"link del {server_devices(lab).pop()}")
            peer.ended()
        wait_until("all is free", lambda: objects(server) <= of_one)
        for number, settings in enumerate([{}, {"fingerprint": site.fingerprint}]):
            client = site.tunnel.client(id=f"client {number}", **settings)
            client.prefix()
            first = objects(client)
            for times in range(2, 5):
                lab.ip("server", f"link del {server_devices(lab).pop()}")
                client.prefix(times)
            wait_until("the client has what it had", lambda: objects(client) <= first + of_one)  # noqa: B023
            client.stop()
        wait_until("all is free", lambda: objects(server) <= of_one)


def test_without_descriptors_newcomers_hear_it_and_when_some_leave_there_is_room(tunnel: Tunnel, server: Program) -> None:
    peers: list[Peer] = []
    answers: list[dict[str, Any]] = []
    with descriptors(server, 18):
        while sum("Error" in answer for answer in answers) < 4:
            peers.append(tunnel.peer(f"client {len(peers)}"))
            answers.append(peers[-1].answer())
        connected = peers[:-4]
        assert all("Prefix" in answer for answer in answers[:-4]), "a newcomer was served though one before it was not"
        assert 3 <= len(connected) < 27
        assert {answer["Error"] for answer in answers[-4:]} <= {"busy", "server-error"}
        for peer in connected:
            peer.echo()
        crowd = [tunnel.connect("server", f"127.0.4.{number // 8}") for number in range(24)]  # more than there is room for, and silent

        def heard() -> bool:
            with suppress(OSError):
                return any(sock.recv(1, socket.MSG_PEEK) for sock in select.select([peer.sock for peer in crowd], [], [], 0)[0])
            return False

        wait_until("one hears it", heard)
        for peer in connected:
            peer.echo()
        for peer in [*crowd, *connected[:3]]:
            peer.close()
        served(tunnel.visit, "newcomer", "client", 10)
        for peer in connected[3:]:
            peer.echo()


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_server_without_descriptors_stops_in_time_and_undoes_everything(tunnel: Tunnel, tmp_path: Path, room: int) -> None:
    with tun6_with(tmp_path, "tun6.with_high_descriptor = lambda sock: sock"):  # so that the limit is their number
        server = tunnel.server()
    for number in range(5):  # one after the other: while hellos come at once, `ip` has descriptors too
        tunnel.peer(f"client {number}").connected()
    with descriptors(server, room):
        refusal = tunnel.refusal("too many", "closed" if room else "reset")
        busy = {"Error": "busy", "Text": "the server has no room for another connection"}
        assert refusal["Error"] == "server-error" if room else refusal == busy
        assert server.stop() < SERVER_ENDS_S


# ---- fuzzing ---------------------------------------------------------------------------------------------------------


def refused_as(source: IPv6Address, destination: IPv6Address, from_client: bool = True, denied: IPv6Network | None = None) -> str:
    """Why a packet may not cross the ingress_filter of HOME, by the words of IngressFilter; "" when it may."""
    near, far = (source, destination) if from_client else (destination, source)
    if near not in HOME:
        return "outside its /64"
    if far in HOME:
        return "within its /64"
    if far.is_multicast:
        return "multicast"
    if far.is_link_local:
        return "link-local"
    if far in IPv6Network("::/64"):
        return "loopback"
    return "to another client" if denied and far in denied else ""


class Fuzz:
    """Cases at random, each from its own seed, so that it can be had again by itself."""

    MESSAGES = (
        b'{"Id": "00:11:22:aa:bb:cc", "Offload": ["tso6", "uso6"]}',
        b'{"Id": "00:11:22:aa:bb:cc"}',
        b'{"Key": "' + b"k" * 43 + b'", "Id": "\xc3\xa9 \\" \\u00e9", "Offload": []}',
        b'{"Prefix": "2001:db8:1:2::/64", "Offload": ["tso6", "uso6"]}',
        b'{"Prefix": "2001:db8:1:2::/64"}',
        b'{"Error": "busy", "Text": "no room {} [] \\\\"}',
        b'{"a": {"b": [1, -2.5e7, null, true, {"c": []}]}, "Id": "x"}',
        b'{"Id": ',
        b'{"Id": "',
        b"",
    )
    FIELDS = ("Id", "Key", "Prefix", "Offload", "Error", "Text", "Dry", "Moved", "Epoch", "Rate")
    VALUES: tuple[object, ...] = (None, True, 64, -1, 2**125, 10**7, 1.5, 1e999, [], [None], ["tso6"], [["::/64", 64]], {}, {"": []})
    TEXTS = ("", "\0", "\ud800", "x" * 4000, "fe80::/64", "2001:db8::%a\nb/64")
    TOKENS = (b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"\xff", b"\0", b"%", b"/", b"::", b"null", b"1e999", b"-", b",", b":", b'"Id"')
    PLACES = (  # of addresses
        *[HOME] * 12,
        *[IPv6Network("2001:db8:ffff::/64"), IPv6Network("2000::/3")] * 6,
        *(subnet(0), subnet(2), subnet(255), POOL),
        *map(IPv6Network, ("2001:db8:0:ffff::/64", "2001:db8:1:100::/64")),  # beside the pool
        *map(IPv6Network, ("ff00::/8", "ff02::/64", "fe00::/8", "fe80::/10", "fe80::/64", "fec0::/10", "feff::/16")),
        *map(IPv6Network, ("::/64", "::/120", "::/0", "::ffff:0:0/96", "0:0:0:1::/64", "fc00::/7")),
    )
    CLOSED = (None, POOL, IPv6Network("2000::/4"), subnet(2))
    BODIES = (
        *[(PLAIN, b"", NOTHING), (PLAIN, bytes(16), NOTHING), (PLAIN, bytes(8), HOP_BY_HOP), (offload(), bytes(40), TCP)] * 3,
        (offload(hdr_len=60), bytes(30), TCP),
        (offload(gso_type=4, gso_size=50), bytes(300), TCP),
        (offload(gso_type=5, gso_size=100, csum_offset=6), bytes(208), UDP),
        (PLAIN, bytes(2000), UDP),
    )
    OTHERS_DATA = b"\x60" * 4096  # what another connection leaves in the shared buffer
    DATAGRAMS = tuple(
        datagram(payload, flow, label, finished)
        for payload in (b"", b"a", b"ab", bytes(range(64)), b"\xff" * 64, bytes(65), bytes(150))
        for flow in (0, 1)
        for label in (0, 1, 0x300000)  # flow label; CE
        for finished in (False, True)
    )
    NEVER_JOINED = (
        *map(damaged, DATAGRAMS[1::2]),  # finished ones
        datagram(bytes(64), finished=True)[:56] + bytes(2) + bytes(64),  # no checksum
        PLAIN + packet(struct.pack(">HHHH", 1000, 9, 72, 0) + bytes(70), UDP),  # UDP's length is another
        PLAIN + packet(bytes(4), UDP),  # shorter than UDP's header
        PLAIN + packet(bytes(72), TCP),
        PLAIN + packet(bytes(1400), HOP_BY_HOP),
        PLAIN + packet(),
    )
    REPETITIONS = (*[1, 2, 3] * 30, 70)
    PARTS: ClassVar = {frame: cut_apart(frame) for frame in (*DATAGRAMS, *NEVER_JOINED)}

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def run(self) -> None:
        """One case."""
        self.random.choice((self.handshake, self.deframer, self.deframer, self.offload_header, self.offload_header, self.joined))()

    def mutated(self, data: bytes) -> bytes:
        """With a few bytes changed, put in, taken out or copied; often with none."""
        made, pick = bytearray(data), self.random
        for _ in range(pick.choice((0, 1, 1, 2, 3))):
            at = pick.randrange(len(made) + 1)
            kind = pick.randrange(5)
            if kind == 0 and at < len(made):
                made[at] = pick.randrange(256)
            elif kind == 1 and at < len(made):
                made[at] ^= 1 << pick.randrange(8)
            elif kind == 2:
                made[at:at] = pick.choice(self.TOKENS)
            elif kind == 3:
                del made[at : at + pick.choice((1, 1, 2, 40))]
            else:
                made[at:at] = made[at // 2 : at // 2 + pick.randrange(20)]
        return bytes(made)

    def segments(self, data: bytes) -> Segments:
        """Cut anyhow; at a None there is nothing to read."""
        cuts = sorted(self.random.randrange(len(data) + 1) for _ in range(self.random.choice((0, 1, 2, 5))))
        return [data[start:end] or None for start, end in zip([0, *cuts], [*cuts, len(data)])]

    def address(self) -> IPv6Address:
        """At the beginning, the end or anywhere in one of the places."""
        place = self.random.choice(self.PLACES)
        return place[self.random.choice((0, 1, -1, self.random.randrange(place.num_addresses)))]

    def handshake(self) -> None:
        """Any bytes begin with the object that `json` finds in them, wherever they are cut, or are no message, or no valid one."""
        behind = self.random.choice((b"", b"`", b"}{", bytes(50)))
        stream = self.mutated(self.random.choice(self.MESSAGES)) + behind
        whole = parse([stream])
        assert whole == parse(self.segments(stream))
        try:
            text = stream.decode(errors="surrogateescape")  # what is behind the message may be anything
            expected, end = json.JSONDecoder().raw_decode(text)
            text[:end].encode()
        except ValueError:  # UnicodeEncodeError is one
            assert not isinstance(whole, tuple)
            return
        if not isinstance(expected, dict):
            assert isinstance(whole, str)
            return
        assert isinstance(whole, tuple)
        message, rest = whole
        assert (repr(message), rest) == (repr(expected), text[end:].encode(errors="surrogateescape"))  # NaN is not itself
        if self.random.random() < 0.5:
            message[self.random.choice(self.FIELDS)] = self.random.choice(self.VALUES + self.TEXTS)
        try:
            id_, kinds, key, dry, epoch, moved, rate = tun6.parse_hello(message)
            assert isinstance(dry, bool) and isinstance(moved, bool)
            assert 0 <= epoch <= tun6.EPOCH_MAX
            assert rate is None or (type(rate) is int and tun6.WIRE_RATE_MIN <= rate <= tun6.WIRE_RATE_MAX)
            assert tun6.is_valid_id(id_)
            assert isinstance(key, str)
            assert kinds is None or all(isinstance(kind, str) for kind in kinds)
        except tun6.ProtocolError as error:
            assert str(error).isprintable()
        try:
            prefix, kinds = tun6.parse_answer(message)
            assert prefix.prefixlen == 64
            assert not (prefix.is_multicast or prefix.is_link_local or ipaddress.IPv6Address("::1") in prefix)
        except tun6.SessionError as error:
            assert str(error).isprintable()

    def deframer(self) -> None:
        """Of any bytes the frames that may cross come out, whole and in order, up to the first that breaks a rule."""
        pick, bare, from_client = self.random, self.random.random() < 0.3, self.random.random() < 0.7
        frames = []
        for _ in range(pick.randrange(1, 6)):
            header, body, following = pick.choice(self.BODIES)
            frames.append((b"" if bare else header) + between(self.address(), self.address(), body, following))
        stream = self.mutated(b"".join(frames))
        kinds = None if bare else pick.choice((BOTH, BOTH, frozenset({"tso6"}), frozenset[str]()))
        ingress_filter = tun6.IngressFilter(HOME, from_client, pick.choice(self.CLOSED))
        deframer, error = tun6.Deframer(BUFFER, kinds, ingress_filter), False
        found: list[bytes] = []
        early = pick.choice((0, 0, pick.randrange(min(len(stream), tun6.MESSAGE_MAX) + 1)))  # came behind the handshake
        wire = Wire(self.segments(stream[early:]))
        try:
            found += map(bytes, deframer.push(stream[:early]))
            while wire.segments:
                BUFFER[: len(self.OTHERS_DATA)] = self.OTHERS_DATA
                found += deframe(deframer, wire)
        except tun6.ProtocolError:
            error = True
        skip, at = 0 if bare else len(PLAIN), 0
        expected, refused = [], Counter[str]()
        while at + skip + 40 <= len(stream):
            end = at + skip + packet_length(stream[at + skip :])
            if end > len(stream) or not self.is_good(stream[at:end], skip, kinds):
                break
            source, destination = (IPv6Address(stream[at + skip + begin : at + skip + begin + 16]) for begin in (8, 24))
            reason = refused_as(source, destination, from_client, ingress_filter._denied)
            if reason:
                refused[reason] += 1
            else:
                expected.append(stream[at:end])
            at = end
        if error:  # those of the last segment never came out
            assert found == expected[: len(found)]
        else:
            assert found == expected
            assert ingress_filter.refused == refused

    @staticmethod
    def is_good(frame: bytes, skip: int, kinds: frozenset[str] | None) -> bool:
        """Whether a frame keeps the rules of the wire."""
        body = frame[skip:]
        if body[0] >> 4 != 6 or (len(body) == 40 and body[6] == HOP_BY_HOP):
            return False
        return kinds is None or is_good_offload(frame[:skip], len(body), kinds)

    def offload_header(self) -> None:
        """Whatever passes stays within the packet and its kinds, and makes few segments of it."""
        pick = self.random
        length = pick.choice((40, 41, 60, 100, 1500, 1500, 9000, 65_575, pick.randrange(40, 65_576)))
        kinds = pick.choice((BOTH, BOTH, frozenset({"tso6"}), frozenset({"uso6"}), frozenset[str]()))
        fields = flags, gso_type, hdr_len, gso_size, csum_start, csum_offset = random_offload(pick, length)
        if not is_good_offload(offload(*fields), length, kinds):
            return
        assert flags in (0, 1)
        assert hdr_len <= length
        assert not flags or 40 <= csum_start <= csum_start + csum_offset + 2 <= length
        if not gso_type:
            return
        assert {4: "tso6", 0x84: "tso6", 5: "uso6"}[gso_type] in kinds
        assert flags
        assert gso_size
        header = csum_start + (8 if gso_type == 5 else 60)
        assert math.ceil(max(length - header, 0) / gso_size) <= 128

    def joined(self) -> None:
        """Whatever is joined is, cut apart, what it was."""
        frames: list[bytes] = []
        for _ in range(self.random.randrange(1, 5)):
            frames += [self.random.choice(self.DATAGRAMS)] * self.random.choice(self.REPETITIONS)
        if self.random.random() < 0.3:
            frames[self.random.randrange(len(frames))] = self.random.choice(self.NEVER_JOINED)
        joined = [(frame, cut_apart(frame)) for frame in join(frames)]
        assert [part for _, parts in joined for part in parts] == [part for frame in frames for part in self.PARTS[frame]]
        for frame, parts in joined:
            assert len(parts) == 1 or (len(parts) <= tun6.COALESCED_DATAGRAMS_MAX and len(frame) <= tun6.COALESCED_BYTES_MAX)


def fuzz(cases: int, seed: int) -> None:
    """So many cases; one that fails is had again with one case and its seed, which the error says."""
    for number in range(seed, seed + cases):
        try:
            Fuzz(number).run()
        except Exception as error:
            raise AssertionError(f"fuzzing failed; again with: fuzz --cases 1 --seed {number}") from error


def test_twenty_thousand_random_cases_break_no_rule() -> None:
    fuzz(20_000, random.randrange(1 << 48))


def test_a_failing_case_says_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun6, "check_offload", lambda *_: None)
    with pytest.raises(AssertionError, match=r"--cases 1 --seed \d+") as failed:
        fuzz(1000, 7)
    seed = int(str(failed.value).rpartition(" ")[2])
    with pytest.raises(AssertionError, match=f"--seed {seed}"):
        fuzz(1, seed)


def fuzz_command(arguments: list[str]) -> int:
    """`python test_tun6.py fuzz`: many cases, by a seed that nobody had before."""
    parser = argparse.ArgumentParser(prog="test_tun6.py fuzz")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 48))
    options = parser.parse_args(arguments)
    began = time.monotonic()
    print(f"{options.cases} cases from seed {options.seed}", flush=True)
    fuzz(options.cases, options.seed)
    print(f"no failure in {time.monotonic() - began:.0f} s")
    return 0


# ---- soak ------------------------------------------------------------------------------------------------------------

SOAK_PORT = 10_000  # of the server, and of the echo services on the Internet host
SOAK_POOL = IPv6Network("2001:db8:5000::/48")
MARGIN_S = 1.0  # a client's fault window is so much longer than the outage, on both sides
OUTAGE_S = 5.0  # so long without an echo and without a fault: an outage that nobody caused
LOST_S = 90.0  # a probe that has no echo by then is lost
NOTICED_S = 35.0  # so long after a program was hung up, whoever talked with it has noticed
PATH_MTU_S = 13.0  # from a stall by large packets that vanish until all passes: 10 s, and the TCP inside may wait for 2 s more
REPAIRED_S = 2.0  # from a manager's change of a client's TUN until it is as before
UNANSWERED_MAX = 32  # blocks of a stream
BLOCK = struct.Struct(">IQII")  # client, sequence number, bytes of the payload, bytes that the answer's is to have
PROBE = struct.Struct(">IQ")  # client, sequence number
DIGEST = 16  # bytes of BLAKE2b behind both
LONG_MINUTES = 10  # a run at least so long has outages longer than TCP_USER_TIMEOUT, too
TCP_RTO_MAX_MS = 44  # linux/tcp.h, since Linux 6.15
SESSION_GREENLETS = 3  # of a session: the connection's and two pumps
CLUSTER_SIZE = 4  # clients of a cluster


def with_digest(data: bytes) -> bytes:
    return data + hashlib.blake2b(data, digest_size=DIGEST).digest()


def receive_blocks(sock: Any) -> Iterator[tuple[int, int, int, int]]:
    """The heads of those that a connection brings. Raises AssertionError for a wrong one, EOFError, OSError."""
    with sock.makefile("rb") as file:
        for expected in count():
            head = file.read(BLOCK.size)
            if len(head) < BLOCK.size:
                raise EOFError
            client, number, length, wanted = BLOCK.unpack(head)
            assert number == expected, f"block {number} came instead of {expected}"
            assert length <= 1 << 20, f"block {number} says that it has {length} bytes"
            data = head + file.read(length + DIGEST)
            assert with_digest(data[:-DIGEST]) == data, f"block {number} has other bytes than were sent"
            yield client, number, length, wanted


def set_long_timeout(sock: Any) -> None:
    """The connection itself endures an outage of minutes, and goes on soon after it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 86_400_000)
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, 2000)


class SoakLab(Lab):
    """A Lab with many more clients, c0, c1 and so on, each a host on one bridge at nat; every fourth is far away, at lan.

    nat ---------- c0, c1, c2, c4 ...      10.7.0.0/16
     |
     +--- 10 ms --- lan ---- c3, c7 ...    10.6.0.0/16; what tun6 does on a real link happens here
    """

    DELAY_S = 0.01  # one way

    def __init__(self, size: int) -> None:
        super().__init__()
        self.client_hosts = [f"c{number}" for number in range(size)]
        self._names.update({host: f"tun6-{os.getpid()}-{host}" for host in self.client_hosts})

    @staticmethod
    def router(number: int) -> tuple[str, str]:
        """The host that a client is connected to, and the first half of all IPv4 addresses there."""
        return ("lan", "10.6") if number % 4 == 3 else ("nat", "10.7")

    @contextmanager
    def delayed_link(self) -> Iterator[None]:
        """Meanwhile this process carries packets between nat and lan, and takes its time for it."""
        with ExitStack() as undo:
            ends: list[int] = []
            for host, route in (("nat", "10.6.0.0/16"), ("lan", "default")):
                with self.inside(host):
                    tun = pytun.TunTapDevice("far", flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
                undo.callback(tun.close)
                os.set_blocking(tun.fileno(), False)
                os.set_inheritable(tun.fileno(), False)
                self.ip(host, "link set far txqueuelen 5000 addrgenmode none up")
                self.ip(host, f"-4 route add {route} dev far")
                ends.append(tun.fileno())
            undo.callback(gevent.killall, [gevent.spawn(self._forward, *ends), gevent.spawn(self._forward, *reversed(ends))])
            yield

    def _forward(self, source: int, sink: int) -> None:
        delayed: deque[list[bytes]] = deque()

        def deliver() -> None:
            for packet in delayed.popleft():
                with suppress(OSError):  # the queue is full
                    os.write(sink, packet)

        while True:
            gevent.socket.wait_read(source)
            delayed.append([])
            with suppress(BlockingIOError):
                while len(delayed[-1]) < 100:
                    delayed[-1].append(os.read(source, 2048))
            gevent.spawn_later(self.DELAY_S, deliver)

    def address(self, number: int, changes: int = 0) -> str:
        """A client's IPv4 address, when it has changed so many times."""
        net = ipaddress.IPv4Address(f"{self.router(number)[1]}.1.0")
        return str(net + number + changes % (60_000 // len(self.client_hosts)) * len(self.client_hosts))

    def output_of(self, host: str, *command: str, lines: str = "") -> str:
        """What a program on a host says to these lines. Raises KernelError."""
        done = self.run(host, *command, input=lines)
        if done.returncode:
            raise tun6.KernelError(f"{' '.join(command)} {lines[:200]}: {done.stderr.strip()}")
        return str(done.stdout)

    def _build(self) -> None:
        super()._build()
        for host in self.client_hosts:
            self.set_sysctl(host, "net.ipv6.conf.default.dad_transmits", "0")
        for host in ("internet", *self.client_hosts):  # without a route TCP gives up after so many attempts, whatever TCP_USER_TIMEOUT says
            self.set_sysctl(host, "net.ipv4.tcp_retries2", "255")
        self.set_sysctl("lan", "net.ipv4.ip_forward", "1")
        for router, net in self.router(0), self.router(3):
            lines = f"link add br0 address 02:00:00:00:00:01 type bridge\naddr add {net}.0.1/16 dev br0\nlink set br0 up\n"
            for number, host in enumerate(self.client_hosts):
                if self.router(number)[0] == router:
                    lines += f"link add {host} type veth peer name eth0 netns {self._names[host]}\nlink set {host} master br0 up\n"
            self.output_of(router, "ip", "-batch", "-", lines=lines)
        for number, host in enumerate(self.client_hosts):
            routes = f"addr add {self.address(number)}/16 dev eth0\nroute add default via {self.router(number)[1]}.0.1\n"
            self.output_of(host, "ip", "-batch", "-", lines=f"link set lo up\nlink set eth0 up\n{routes}")
        ruleset = """table ip soak {
            set cut { type ipv4_addr; }
            set refused { type ipv4_addr; }
            set unfragmented { type ipv4_addr; }
            set forgotten { type ipv4_addr . inet_service; }
            chain up { type filter hook prerouting priority -300; ip saddr @cut drop; ip saddr . tcp sport @forgotten drop; }
            chain routed { type filter hook prerouting priority 0;
                ip saddr @unfragmented ip frag-off set 0x4000; ip daddr @unfragmented ip frag-off set 0x4000; }
            chain down { type filter hook forward priority 0; ip daddr @cut drop; ip daddr . tcp dport @forgotten drop;
                meta l4proto tcp ip saddr @refused reject with tcp reset; }
            chain silent { type filter hook output priority 0; icmp type destination-unreachable icmp code frag-needed drop; }
        }"""
        self.output_of("nat", "nft", "-f", "-", lines=ruleset)


class SoakProgram(Program):
    """A tun6 that is ended and started again, and measured meanwhile."""

    WARM_UP_S, WINDOW_S = 20.0, 15.0  # it has all clients and its caches by then; figures are medians of so long
    GROWTH_MAX: ClassVar = {"memory": 16 << 20, "files": 4, "greenlets": 6, "threads": tun6.TUN_CLOSERS}  # from one start to the end
    FLAT_AFTER_S, FLAT_WINDOW_S, FLAT_MAX = 600.0, 60.0, 3 << 20  # by then each TLS session has had its full records; later come new Ids

    def __init__(self, lab: Lab, host: str, role: str, folder: Path, settings: dict[str, object]) -> None:
        self._bytes_read = 0  # of the log
        super().__init__(lab, host, role, write_ini(folder / f"{host}.ini", **{role: settings}), folder / f"{host}.log")

    def start(self) -> None:
        super().start()
        self.ending, self._started, self._samples = False, time.monotonic(), list[dict[str, float]]()
        self.disturbed = False  # whether a fault hit all clients since

    def end(self, number: int) -> tuple[int, float]:
        """By a signal; gives its exit status and the seconds that it took."""
        self.ending, began = True, time.monotonic()
        self.process.send_signal(number)
        assert becomes_true(lambda: self.process.poll() is not None, 30), f"the {self.role} on {self.host} did not end within 30 s"
        return int(self.process.returncode), time.monotonic() - began

    @contextmanager
    def hanging_ip(self) -> Iterator[None]:
        """Its `ip` does not end meanwhile."""
        flag = Path(f"{self.config}.ip-hangs")
        flag.touch()
        try:
            yield
        finally:
            flag.unlink()

    def new_lines(self) -> str:
        """The whole lines that are new in the log."""
        with open(self._log, "rb") as file:
            file.seek(self._bytes_read)
            text = file.read().rpartition(b"\n")[0]
        self._bytes_read += len(text)
        return text.decode(errors="replace")

    def measure(self, told: dict[str, float]) -> None:
        """Notes its descriptors, threads, bytes of memory, and what it told itself; without what each session takes."""
        if self.ending:
            return
        proc, sessions = Path(f"/proc/{self.process.pid}"), told.get("sessions", 0)
        sample = {
            "memory": int((proc / "statm").read_text().split()[1]) * resource.getpagesize(),
            "files": len(os.listdir(proc / "fd")) - 2 * sessions,
            "threads": len(os.listdir(proc / "task")),
            "age": time.monotonic() - self._started,
        }
        if "greenlets" in told:
            sample["greenlets"] = told["greenlets"] - SESSION_GREENLETS * sessions
        self._samples.append(sample)

    def growth(self) -> tuple[float, dict[str, tuple[float, float]]]:
        """Its age, and of each figure what it was soon after the start and is now; {} when that is too short a time."""
        age = self._samples[-1]["age"] if self._samples else 0.0
        if age < self.WARM_UP_S + 2 * self.WINDOW_S:
            return age, {}
        ends = self._between(self.WARM_UP_S, self.WINDOW_S), self._between(max(age - self.WINDOW_S, self.WARM_UP_S + self.WINDOW_S))
        if not all(ends):
            return age, {}
        return age, {figure: (median_of(ends[0], figure), median_of(ends[1], figure)) for figure in self.GROWTH_MAX if figure in ends[1][0]}

    def late_growth(self) -> float | None:
        """Of its memory since FLAT_AFTER_S; None when it is not judged."""
        age = self._samples[-1]["age"] if self._samples else 0.0
        if self.disturbed or age < self.FLAT_AFTER_S + 2 * self.FLAT_WINDOW_S:
            return None
        first, last = self._between(self.FLAT_AFTER_S, self.FLAT_WINDOW_S), self._between(age - self.FLAT_WINDOW_S)
        return median_of(last, "memory") - median_of(first, "memory")

    def memory_by_minute(self) -> list[float]:
        """MiB: the median of each minute since its start."""
        minutes = range(math.ceil(self._samples[-1]["age"] / 60) if self._samples else 0)
        return [median_of(found, "memory") / (1 << 20) for minute in minutes if (found := self._between(60 * minute, 60))]

    def _between(self, age: float, seconds: float = math.inf) -> list[dict[str, float]]:
        return [each for each in self._samples if age <= each["age"] <= age + seconds]


def median_of(samples: list[dict[str, float]], figure: str) -> float:
    return statistics.median(each[figure] for each in samples)


@dataclasses.dataclass(eq=False)
class Fault:
    """One that is in effect, or that not all whom it affects have recovered from."""

    kind: FaultKind
    end: float = math.inf


class SoakClient(SoakProgram):
    """A client on a host of its own, and its traffic with the Internet host: probes, and a stream of blocks that outlives all faults."""

    def __init__(self, soak: Soak, number: int, settings: dict[str, object]) -> None:
        self.number, self.id, self._soak = number, f"02:00:00:00:00:{number:02x}", soak
        self.address, self.address_changes = soak.lab.address(number), 0
        self.router, self.net = soak.lab.router(number)
        self.network: IPv6Network | None = None
        self.faults: list[Fault] = []
        self.last_fault = "no fault"
        self.session_ends = 0  # as the logs of both sides say
        self.stripped = -math.inf  # when somebody last took something from its TUN
        self.windows: deque[list[float]] = deque([[0.0, math.inf]], 100)  # when there was a fault; the start is one
        self._probes: dict[int, float] = {}  # without an echo yet: number, and when it was sent
        self.echoed = 0.0  # when the last probe was sent that has its echo
        self.delays: list[float] = []  # of echoes outside the windows, s
        self.outage_reported = False
        self.bulk: deque[tuple[int, int]] = deque()  # blocks to be sent without a pause: bytes, bytes of the answer
        self._wanted: deque[int] = deque()  # bytes of the answers that are due
        self.answered = self.moved = 0  # blocks, bytes
        control = soak.folder / f"c{number}.sock"
        settings = {"remotehost": Lab.SERVER, "remoteport": SOAK_PORT, "id": self.id, "control": control, **settings}
        super().__init__(soak.lab, f"c{number}", "client", soak.folder, settings)

    @property
    def ip(self) -> str:
        return str(self.network[1]) if self.network else ""

    @property
    def table(self) -> int:
        """Of its routes into the tunnel."""
        return tun6.OWNER_BASE + int(self.process.pid)

    @property
    def nat_device(self) -> str:
        """By which NAT reaches it."""
        return "far" if self.router == "lan" else "br0"

    @property
    def path_table(self) -> int:
        """Of routes of its own at NAT."""
        return 1000 + self.number

    def moves(self, length: int, wanted: int) -> bool:
        """Whether 1 MiB in blocks of this kind, and all before it, passes within PATH_MTU_S."""
        self.bulk += [(length, wanted)] * ((1 << 20) // (length + wanted))
        return becomes_true(lambda: not self.bulk and not self._wanted, PATH_MTU_S)

    def begin_traffic(self) -> None:
        with self.lab.inside(self.host):
            probes, stream = (gevent.socket.socket(socket.AF_INET6, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
        for sock in probes, stream:
            sock.bind((self.ip, 0))
        set_long_timeout(stream)
        stream.connect((Lab.INTERNET, SOAK_PORT))
        self.windows[0][1] = time.monotonic() + MARGIN_S
        for work, sock in (
            (self._send_probes, probes),
            (self._receive_echoes, probes),
            (self._send_blocks, stream),
            (self._receive_answers, stream),
        ):
            self._soak.spawn(self, work, sock)

    def begin_fault(self, fault: Fault) -> None:
        if not self.faults:
            self.windows.append([time.monotonic() - MARGIN_S, math.inf])
        self.faults.append(fault)

    def lost(self, age: float) -> list[float]:
        """When probes older than this were sent that have no echo; they are forgotten."""
        old = [number for number, sent in self._probes.items() if time.monotonic() - sent > age]
        return [self._probes.pop(number) for number in old]

    def had_fault(self, when: float) -> bool:
        return any(begin <= when <= end for begin, end in self.windows)

    def _send_probes(self, sock: Any) -> None:
        for number in count():
            self._probes[number] = time.monotonic()
            with suppress(OSError):  # no route, for example
                data = PROBE.pack(self.number, number) + os.urandom(random.randrange(20, 1100))
                sock.sendto(with_digest(data), (Lab.INTERNET, SOAK_PORT))
            gevent.sleep(0.1 if self.faults else 0.25)

    def _receive_echoes(self, sock: Any) -> None:
        while True:
            data, now = sock.recv(2048), time.monotonic()
            client, number = PROBE.unpack_from(data)
            intact = with_digest(data[:-DIGEST]) == data and client == self.number
            assert intact, f"probe {number} of client {client} came back altered"
            sent = self._probes.pop(number, None)
            assert sent, f"probe {number} came back twice, after more than {LOST_S:.0f} s, or after it had to be discarded"
            self.echoed, self.outage_reported = max(self.echoed, sent), False
            if not self.had_fault(sent):
                self.delays.append(now - sent)
            end = max((fault.end for fault in self.faults), default=math.inf)
            if sent >= end:
                self._soak.recovered(max((fault.kind for fault in self.faults), key=lambda kind: kind.within), now - end, self)
                self.faults.clear()
                self.windows[-1][1] = now + MARGIN_S

    def _send_blocks(self, sock: Any) -> None:
        for number in count():
            while number - self.answered >= UNANSWERED_MAX:
                gevent.sleep(0.05)
            length, wanted = self.bulk.popleft() if self.bulk else (random.randrange(3000), random.randrange(3000))
            self._wanted.append(wanted)
            sock.sendall(with_digest(BLOCK.pack(self.number, number, length, wanted) + os.urandom(length)))
            self.moved += length + wanted
            if not self.bulk:
                gevent.sleep(random.uniform(0.3, 1.5))

    def _receive_answers(self, sock: Any) -> None:
        for client, number, length, _ in receive_blocks(sock):
            assert (client, length) == (self.number, self._wanted.popleft()), f"block {number} is client {client}'s or has another length"
            self.answered += 1


class Soak:
    """A server, many clients, their traffic, and faults at random."""

    def __init__(self, minutes: float, size: int, seed: int, kinds: list[FaultKind]) -> None:
        self.random, self.lab = random.Random(seed), SoakLab(size)
        self._minutes, self._size, self._kinds = minutes, size, kinds
        self.clients: list[SoakClient] = []
        self.violations: list[str] = []
        self.finished = False
        self._told: dict[str, IPv6Network] = {}  # prefixes that Ids heard of
        self._numbers = itertools.count()  # of new Ids
        self._times: dict[str, list[float]] = {kind.name: [] for kind in kinds}  # to recovery, s
        self._injected: Counter[str] = Counter()  # faults by kind
        self._impossible: Counter[str] = Counter()  # those that could not be done
        self._busy, self._last_fault = False, "no fault"  # whether a fault is in effect that is not one client's
        self._lost_inside, self._lost_outside, self._growths = 0, list[str](), list[str]()
        self._late = 0.0  # seconds that this process itself was late at most: when many, the machine was overloaded
        self._late_growths: list[tuple[float, str]] = []  # of memory, bytes; whose
        self._began, self._group = time.monotonic(), gevent.pool.Group()

    @property
    def _programs(self) -> list[SoakProgram]:
        return [self.server, *self.clients]

    def run(self) -> None:
        """All of it; removes what it made however it ends."""
        with ExitStack() as undo:
            self.folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="tun6-soak-")))
            self.disk = self.folder / "disk"
            self.disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(self.disk)], check=True)
            undo.callback(subprocess.run, ["umount", "-l", str(self.disk)])
            undo.enter_context(self.lab)
            undo.enter_context(self.lab.delayed_link())
            settings: dict[str, object] = {
                "localhost": "0.0.0.0",
                "listenport": SOAK_PORT,
                "prefixrange": SOAK_POOL,
                "documentation_addresses": "yes",
                "assignments": self.disk / "assignments.json",
                "control": self.folder / "control",
                "cert": self.folder / "server.pem",
            }
            fingerprint = make_certificate(self.folder / "server.pem")
            undo.enter_context(tun6_with(self.folder, self._ip_that_may_hang()))
            self.server = SoakProgram(self.lab, "server", "server", self.folder, settings)
            undo.callback(self._kill)
            undo.callback(self._group.kill)
            self._start_clients(fingerprint)
            self._say(f"{self._size} clients are up; faults for {self._minutes:g} minutes")
            self._inject_faults()
            self._check_recovery()
            self._group.kill()
            self._end()
            self.finished = True
            if self.violations:
                kept = tempfile.mkdtemp(prefix="tun6-soak-failed-")
                shutil.copytree(self.folder, kept, dirs_exist_ok=True)
                self._say(f"the logs are in {kept}")

    def _kill(self) -> None:
        for program in self._programs:
            program.kill()

    def _ip_that_may_hang(self) -> str:
        """A line of Python by which tun6 gets an `ip` that hangs as `hanging_ip` says."""
        ip = self.folder / "bin" / "ip"
        ip.parent.mkdir()
        ip.write_text(f"""#!/bin/sh\n[ ! -e "$TUN6_CONFIG.ip-hangs" ] || exec sleep 600\nexec {shutil.which("ip")} "$@"\n""")
        ip.chmod(0o755)
        return f"os.environ.update(TUN6_CONFIG=sys.argv[-1], PATH='{ip.parent}:' + os.environ['PATH'])"

    def spawn(self, client: SoakClient | None, function: Callable[..., None], *args: object) -> None:
        """In a greenlet, whose failure is a violation."""

        def guarded() -> None:
            try:
                function(*args)
            except Exception as error:
                self._violation(f"{function.__name__}: {error!r}", client)

        self._group.spawn(guarded)

    def recovered(self, kind: FaultKind, seconds: float, client: SoakClient | None) -> None:
        self._times[kind.name].append(seconds)
        if seconds > kind.within:
            self._violation(f"back only {seconds:.1f} s after {kind.name}", client)

    def _violation(self, what: str, program: SoakProgram | None = None) -> None:
        who, last = (f"{program.host}: ", program.last_fault) if isinstance(program, SoakClient) else ("", self._last_fault)
        self.violations.append(what)
        self._say(f"VIOLATION {who}{what}; after {last}")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    # faults: what FAULT_KINDS names; each returns at its end, or raises KernelError when it is not possible at the moment

    def run_commands(self, client: SoakClient, where: str, do: str, undo: str) -> None:
        """Done on a host, and undone some seconds later; in long runs sometimes later than TCP_USER_TIMEOUT."""
        names: dict[str, Any] = {"client": client, "device": ""}
        if "{device}" in do:
            names["device"] = json.loads(self.lab.ip("server", f"-6 -j route get {client.ip}"))[0]["dev"]
        self.lab.output_of(where.format(**names), *do.format(**names).split())
        if undo:
            gevent.sleep(45 if self._minutes >= LONG_MINUTES and self.random.random() < 0.1 else self.random.uniform(1, 10))
            self.lab.output_of(where.format(**names), *undo.format(**names).split())

    def restart(self, program: SoakProgram, number: int) -> None:
        self._check_growth(program)
        self._end_program(program, number, 3)
        gevent.sleep(self.random.uniform(0, 3))
        program.start()

    def respell(self, client: SoakClient) -> None:
        """It comes back with another spelling of its MAC address."""
        digits = client.id.replace(":", "")
        dotted = ".".join(digits[at : at + 4] for at in (0, 4, 8))
        spelling = self.random.choice([client.id.upper(), client.id.replace(":", "-"), dotted])
        client.config.write_text(re.sub("(?m)^id = .*", f"id = {spelling}", client.config.read_text()))
        self.restart(client, signal.SIGTERM)

    def pause(self, program: SoakProgram, longest: float) -> None:
        if isinstance(program, SoakClient):
            program.bulk += [(0, 256 << 10)] * 64
            gevent.sleep(0.1)
        with paused(program):
            gevent.sleep(self.random.uniform(1, longest))

    def hang_up(self, program: SoakProgram) -> None:
        """It stands still for longer than the others may take to notice, while its kernel acknowledges what they send."""
        before = {client: client.session_ends for client in ([program] if isinstance(program, SoakClient) else self._steady_clients())}
        with paused(program):
            gevent.sleep(NOTICED_S)
            unnoticed = [client.host for client, ends in before.items() if client.session_ends == ends]
            if isinstance(program, SoakClient) and any(fault.kind.whom == "all" for fault in program.faults):
                unnoticed = []  # the server was killed or hung meanwhile, so that it can't have noticed
            gevent.sleep(5)
        assert not unnoticed, f"not noticed within {NOTICED_S:.0f} s on the connections of {unnoticed}"

    def stop_forwarding(self, _: SoakProgram) -> None:
        """The server's kernel forwards nothing for some seconds: no session ends."""
        with self._sessions_live_on():
            self.lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "0")
            gevent.sleep(self.random.uniform(1, 8))
            self.lab.set_sysctl("server", "net.ipv6.conf.all.forwarding", "1")

    def hang_servers_ip(self, _: SoakProgram) -> None:
        """Newcomers are refused in time, and those who are connected go on."""
        with self._sessions_live_on(), self.server.hanging_ip():
            began = time.monotonic()
            self._connect_all(
                [*self._known_ids(2), self._new_id()], "server-error", 2 * tun6.IP_S + 2
            )  # the second run has those that wait
            silent = [client.host for client in self._steady_clients() if client.echoed < began]
        assert not silent, f"no echo for {silent} while the server's `ip` hung"

    def hang_clients_ip(self, client: SoakClient) -> None:
        with client.hanging_ip():
            self.lab.ip(client.host, "link del tun6")
            gevent.sleep(self.random.uniform(1, 7))

    def strip(self, client: SoakClient, *commands: str) -> None:
        """As managers of networks do: all is put back, on the same device."""

        def state() -> list[str]:
            return [self.lab.ip(client.host, what) for what in ("-o -6 addr show dev tun6", f"-6 route show table {client.table}")]

        if time.monotonic() - client.stripped < tun6.REPAIRS_S:
            raise tun6.KernelError("somebody has just done that, and often it is not repaired in place")
        client.stripped, before = time.monotonic(), state()
        for command in commands:
            self.lab.ip(client.host, command.format(client=client))
        gevent.sleep(REPAIRED_S)
        assert state() == before, f"{state()} is not {before}"

    def shrink_path(self, client: SoakClient, *commands: str) -> None:
        """Behind the NAT only smaller packets pass, and nobody says so: bulk passes all the same, each way."""
        done: list[list[str]] = []
        try:
            for command in commands:
                done.insert(0, command.format(do="delete", client=client).split())
                self.lab.output_of("nat", *command.format(do="add", client=client).split())
            passed = {"up": client.moves(128 << 10, 0), "down": client.moves(0, 128 << 10)}
        finally:
            for undo in done:
                self.lab.output_of("nat", *undo)
        assert all(passed.values()), f"bulk passed within {PATH_MTU_S:.0f} s: {passed}"

    def refuse(self, client: SoakClient) -> None:
        """No tunnel for longer than the grace time: IPv6 fails at once, and what was sent by then never arrives."""
        self.lab.output_of("nat", "nft", f"add element ip soak refused {{ {client.address} }}")
        gevent.sleep(cast(int, tun6.ClientConfig.grace) + 3)
        for source in client.ip, "::":
            with self.lab.inside(client.host):
                sock = gevent.socket.socket(socket.AF_INET6)
            with sock:
                sock.settimeout(1)
                sock.bind((source, 0))
                error = sock.connect_ex((Lab.INTERNET, SOAK_PORT))
            assert error in (errno.ENETUNREACH, errno.EHOSTUNREACH), f"from {source}: {os.strerror(error)} without a tunnel"
        self._lost_inside += len(client.lost(0))
        self.lab.output_of("nat", "nft", f"delete element ip soak refused {{ {client.address} }}")

    def add_native_ipv6(self, client: SoakClient) -> None:
        """The client has IPv6 of a provider, too, for some seconds: that works, and so does the tunnel, as `_watch` sees."""
        net, link = IPv6Network(f"2001:db8:aaaa:{client.number:x}::/64"), f"n{client.number}"
        self.lab.ip("internet", f"link add {link} type veth peer name eth2 netns {self.lab._names[client.host]}")
        try:
            for host, device, address in (("internet", link, net[1]), (client.host, "eth2", net[5])):
                self.lab.ip(host, f"addr add {address}/64 dev {device} nodad")
                self.lab.ip(host, f"link set {device} up")
            self.lab.ip(client.host, f"-6 route add default via {net[1]} metric 1")

            def answered() -> bool:
                return self.lab.run(client.host, "ping", "-6", "-c", "1", "-W", "1", "-I", str(net[5]), Lab.INTERNET).returncode == 0

            assert becomes_true(answered, 5), "the native address does not work beside the tunnel"
            for _ in range(self.random.randrange(5, 20)):
                gevent.sleep(0.3)
                assert answered(), "the native address works no longer"
        finally:
            self.lab.ip("internet", f"link del {link}")

    def drop_nat_mapping(self, client: SoakClient) -> None:
        """The NAT lets nothing of the client's connections pass any more."""
        lines = Path(f"/proc/{client.process.pid}/net/tcp").read_text().splitlines()[1:]
        ports = [int(line.split()[1].partition(":")[2], 16) for line in lines if line.split()[2].endswith(f":{SOAK_PORT:04X}")]
        if not ports:
            raise tun6.KernelError("the client has no connection")
        flows = ", ".join(f"{client.address} . {port}" for port in ports)
        self.lab.output_of("nat", "nft", f"add element ip soak forgotten {{ {flows} }}")

    def change_address(self, client: SoakClient) -> None:
        old, client.address_changes = client.address, client.address_changes + 1
        client.address = self.lab.address(client.number, client.address_changes)
        lines = f"addr del {old}/16 dev eth0\naddr add {client.address}/16 dev eth0\nroute add default via {client.net}.0.1\n"
        self.lab.output_of(client.host, "ip", "-batch", "-", lines=lines)

    def reload_server(self, _: SoakClient) -> None:
        for _number in range(10):
            self.server.process.send_signal(signal.SIGHUP)
            gevent.sleep(0.01)

    def connect_new_ids(self, _: SoakClient) -> None:
        self._connect_all([*(self._new_id() for _number in range(20)), *self._known_ids(5)])

    def fill_disk(self, _: SoakClient) -> None:
        """New Ids are refused or get what lasts; those that have a prefix get it."""
        filler, deadline = self.disk / "filler", time.monotonic() + self.random.uniform(1, 6)
        try:
            with suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            while time.monotonic() < deadline:
                self._connect_all([self._new_id() for _number in range(5)], "server-error")
                self._connect_all(self._known_ids(3))
                gevent.sleep(0.3)
        finally:
            filler.unlink()

    def connect_with_garbage(self, _: SoakClient) -> None:
        """Connections that say nothing, half or what they shouldn't, and leave with FIN or RST; and one whose frames are none."""
        garbage = [b"", b"{", b'{"Id": "half', os.urandom(500), b'{"Id": 7}', b"{" * 5000, b"GET / HTTP/1.1\r\n\r\n"]
        garbage += [b"\x16\x03\x01\x02\x00\x01" + os.urandom(90), b"\x16\x03\x01\x02"]

        def send(data: bytes) -> None:
            with self._new_socket() as sock, suppress(OSError), gevent.Timeout(15, False):
                sock.connect((Lab.SERVER, SOAK_PORT))
                sock.sendall(data)
                gevent.sleep(self.random.uniform(0, 3))
                if self.random.random() < 0.5:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        sent = [hello(id_) + os.urandom(2000) for id_ in self._known_ids(1)] + self.random.choices(garbage, k=20)
        gevent.joinall([gevent.spawn(send, data) for data in sent])

    def flood_without_reader(self, _: SoakClient) -> None:
        """A client by hand that a flood is for, and that reads none of it."""
        with self.lab.inside("internet"):
            flood = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with flood, self._new_socket() as sock:
            prefix, deadline = self._say_hello(self._new_id(), sock), time.monotonic() + self.random.uniform(1, 5)
            while prefix and time.monotonic() < deadline:
                for _number in range(20):
                    flood.sendto(bytes(1200), (str(prefix[1]), 9))
                gevent.sleep(0.01)

    def _steady_clients(self) -> list[SoakClient]:
        """Those that have no fault but one of all clients, and had none for a while."""
        since = time.monotonic() - OUTAGE_S
        own = {client: [fault for fault in client.faults if fault.kind.whom == "client"] for client in self.clients}
        return [client for client in self.clients if not own[client] and (len(client.windows) < 2 or client.windows[-2][1] < since)]

    @contextmanager
    def _sessions_live_on(self) -> Iterator[None]:
        """No session ends meanwhile of those that nothing else happens to."""
        before = {client: client.session_ends for client in self._steady_clients()}
        yield
        gevent.sleep(1)  # `_watch` reads the logs
        ended = [client.host for client, ends in before.items() if client.session_ends > ends]
        assert not ended, f"the sessions of {ended} ended"

    def _end_program(self, program: SoakProgram, number: int, seconds: float) -> None:
        status, took = program.end(number)
        if number != signal.SIGKILL and (status or took > seconds):
            self._violation(f"exit status {status}, {took:.1f} s after signal {number}", program)

    def _check_growth(self, program: SoakProgram) -> None:
        """It did not grow since it was started, and after a while its memory is flat."""
        age, growth = program.growth()
        late = program.late_growth()
        if program is self.server:
            figures = [f"{figure} {before:.0f} -> {after:.0f}" for figure, (before, after) in growth.items()]
            self._growths.append(f"{age:.0f} s: {', '.join(figures) or 'too short to be judged'}")
        if late is not None:
            self._late_growths.append((late, program.host))
            if late > program.FLAT_MAX:
                self._violation(f"memory of {program.host} grew by {late:.0f} bytes after the first {program.FLAT_AFTER_S:.0f} s", program)
        for figure, (before, after) in growth.items():
            if after - before > program.GROWTH_MAX[figure]:
                self._violation(f"{figure} of {program.host} grew from {before:.0f} to {after:.0f} in {age:.0f} s", program)

    # clients by hand

    def _new_socket(self) -> Any:
        with self.lab.inside("second"):
            return gevent.socket.socket()

    def _new_id(self) -> str:
        return f"by hand {next(self._numbers)}"

    def _known_ids(self, most: int) -> list[str]:
        known = [id_ for id_ in self._told if id_.startswith("by hand")]
        return self.random.sample(known, min(most, len(known)))

    def _say_hello(self, id_: str, sock: Any, refusal: str = "", seconds: float = OUTAGE_S) -> IPv6Network | None:
        """The prefix that the server gives; whatever else it says, but this refusal, is a violation."""
        text = b""
        with suppress(OSError), gevent.Timeout(seconds, False):
            sock.connect((Lab.SERVER, SOAK_PORT))
            sock.sendall(hello(id_))
            while b"}" not in text and (data := sock.recv(4096)):
                text += data
        answer = json.loads(text[: text.find(b"}") + 1] or b"{}")
        if "Prefix" in answer:
            return self._check_prefix(id_, IPv6Network(answer["Prefix"]))
        if answer.get("Error", " ") != refusal:
            self._violation(f"{id_!r} got the answer {text[:200]!r}")
        return None

    def _connect_all(self, ids: list[str], refusal: str = "", seconds: float = OUTAGE_S) -> None:
        def connect(id_: str) -> None:
            with self._new_socket() as sock:
                self._say_hello(id_, sock, refusal, seconds)

        gevent.joinall([gevent.spawn(connect, id_) for id_ in ids])

    def _check_prefix(self, id_: str, prefix: IPv6Network) -> IPv6Network:
        """An Id has heard of its prefix: the same as ever."""
        if self._told.setdefault(id_, prefix) != prefix:
            self._violation(f"{id_!r} had {self._told[id_]} and now has {prefix}")
        return prefix

    # start and end

    def _start_clients(self, fingerprint: str) -> None:
        """Eight at a time, every second of them inside TLS."""
        for work in (self._watch, self._measure, self._serve_echoes):
            self.spawn(None, work)
        for at in range(0, self._size, 8):
            numbers = range(at, min(at + 8, self._size))
            started = [SoakClient(self, number, {"fingerprint": fingerprint} if number % 2 else {}) for number in numbers]
            self.clients += started
            for client in started:
                assert becomes_true(lambda client=client: client.network, 30), f"{client.host} has no prefix after 30 s"  # type: ignore[misc]
                client.begin_traffic()
        self.spawn(None, self._request_bulk)

    def _check_recovery(self) -> None:
        """The last faults are over: all must be up and all streams advance; nobody's prefix is another one, or another's."""
        becomes_true(lambda: not self._busy and not any(client.faults for client in self.clients), 60)  # if not, that is found now
        now, before = time.monotonic(), {client: client.answered for client in self.clients}

        def failed() -> list[SoakClient]:
            return [client for client in self.clients if client.echoed < now or client.answered == before[client]]

        becomes_true(lambda: not failed(), 60)
        for client in failed():
            self._violation(f"at the end {client.answered - before[client]} blocks and {client.echoed > now} probes pass", client)
        gevent.sleep(SoakProgram.WINDOW_S)  # without faults
        self._count_lost(OUTAGE_S)
        owners = Counter(self._told.values())
        kept = json.loads((self.disk / "assignments.json").read_text())
        for id_, prefix in self._told.items():
            if owners[prefix] > 1 or kept.get(id_) != str(prefix):
                self._violation(f"{id_!r} was told {prefix}, {owners[prefix]} have it, the assignments have {kept.get(id_)}")

    def _end(self) -> None:
        """Ends server and clients, who leave nothing."""
        for program in self._programs:
            self._check_growth(program)
        for name, times in self._impossible.items():
            if times > 2 and not self._injected[name]:
                self._violation(f"{name} was never possible")
        self._end_program(self.server, signal.SIGTERM, 3)
        gevent.joinall([gevent.spawn(self._end_program, client, signal.SIGTERM, 25) for client in self.clients])  # all at once
        self._read_logs()
        for host in ("server", *self.lab.client_hosts):
            links = {link["ifname"] for link in json.loads(self.lab.ip(host, "-j link"))} - {"lo", "eth0", "eth1"}
            routes = self.lab.ip(host, f"-6 route show table all proto {tun6.ROUTE_PROTOCOL}").splitlines()
            processes = self.lab.output_of(host, "ip", "netns", "pids", self.lab._names[host]).split()[1:]  # the first is this `ip`
            if links or routes or processes:
                self._violation(f"left on {host}: {links} {routes} {processes}")

    # what goes on meanwhile

    def _serve_echoes(self) -> None:
        with self.lab.inside("internet"):
            probes, listener = (gevent.socket.socket(socket.AF_INET6, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
        for sock in probes, listener:
            sock.bind((Lab.INTERNET, SOAK_PORT))
        listener.listen(self._size)

        def echo() -> None:
            while True:
                data, sender = probes.recvfrom(2048)
                client, number = PROBE.unpack_from(data)
                if sender[0] != self.clients[client].ip or with_digest(data[:-DIGEST]) != data:
                    self._violation(f"probe {number} of client {client} came from {sender[0]}, or altered")
                probes.sendto(data, sender)

        def answer(sock: Any, sender: str) -> None:
            set_long_timeout(sock)
            for client, number, _, wanted in receive_blocks(sock):
                assert self.clients[client].ip == sender, f"block {number} of client {client} came from {sender}"
                sock.sendall(with_digest(BLOCK.pack(client, number, wanted, 0) + os.urandom(wanted)))

        self.spawn(None, echo)
        while True:
            sock, sender = listener.accept()
            self.spawn(next(client for client in self.clients if client.ip == sender[0]), answer, sock, sender[0])

    def _request_bulk(self) -> None:
        """Bulk transfers of random clients, up and down in turn."""
        for block in itertools.cycle(((128 << 10, 0), (0, 128 << 10))):
            self.random.choice(self.clients).bulk += [block] * 16
            gevent.sleep(0.7)

    def _watch(self) -> None:
        """Notices what nothing else brings to light: in the logs, processes that end, outages without a fault or end."""
        due = time.monotonic()
        while True:
            self._late = max(self._late, time.monotonic() - due)
            self._read_logs()
            now = time.monotonic()
            for program in self._programs:
                if not program.ending and program.process.poll() is not None:
                    self._violation(f"the process ended by itself with {program.process.poll()}", program)
                    program.start()
            for client in self.clients:
                ends = [fault.end + fault.kind.within for fault in client.faults]
                due = max(ends) if ends else max(client.echoed, client.windows[-1][1]) + OUTAGE_S
                if now > due and not client.outage_reported:
                    client.outage_reported = True
                    self._violation("no echo, and " + ("the fault is long over" if ends else "no fault"), client)
            self._count_lost(LOST_S)
            due = time.monotonic() + 0.5
            gevent.sleep(0.5)

    def _read_logs(self) -> None:
        for program in self._programs:
            lines = program.new_lines()
            for line in re.findall(r".*(?:Traceback|internal error).*", lines):
                self._violation(f"in the log: {line}", program)
            if isinstance(program, SoakClient):
                program.session_ends += len(re.findall(" no connection to ", lines))
                for prefix in re.findall(r": has (\S+) on", lines):
                    program.network = self._check_prefix(program.id, IPv6Network(prefix))
            else:
                ends = Counter(re.findall(r"'(\S+)' from \S+ port \d+: gone", lines))
                for client in self.clients:
                    client.session_ends += ends[client.id]

    def _count_lost(self, age: float) -> None:
        for client in self.clients:
            for sent in client.lost(age):
                if client.had_fault(sent):
                    self._lost_inside += 1
                else:
                    self._lost_outside.append(f"{client.host} at {sent - self._began:.1f} s")

    def _measure(self) -> None:
        control, request = str(self.folder / "control"), {"do": "status", "files": [str(self.disk / "assignments.json"), None]}
        while True:
            everybody_comes_back = any(fault.kind.whom == "all" for client in self.clients for fault in client.faults)
            with suppress(OSError, tun6.RequestError):  # there is no server at the moment
                if not everybody_comes_back:  # what old and new sessions have at once is no growth
                    self.server.measure(tun6.run_in_thread(tun6.ask_server, control, request))
            for client in self.clients:
                with suppress(OSError):  # it has just ended
                    client.measure({})
            gevent.sleep(3)

    def _inject_faults(self) -> None:
        """All kinds in random order, again and again; those of all clients every sixth time, and early: the server lives on."""
        deadline = time.monotonic() + self._minutes * 60
        for number in count():
            usual = [kind for kind in self._kinds if kind.whom != "all"]
            self.random.shuffle(usual)
            half = len(usual) // 2
            early = usual[:half] + [kind for kind in self._kinds if kind.whom == "all" and number % 6 == 0]
            due = self.random.sample(early, len(early)) + usual[half:]
            while due:
                gevent.sleep(self.random.uniform(1, 5))
                if time.monotonic() > deadline:
                    return
                kind = next((kind for kind in due if kind.whom == "client" or not self._busy), None)
                free = [client for client in self.clients if not client.faults]
                if kind and free:
                    due.remove(kind)
                    self._group.spawn(self._inject, kind, self.random.choice(free))

    def _inject(self, kind: FaultKind, client: SoakClient) -> None:
        """One fault, from its beginning until all have recovered."""
        fault, own = Fault(kind), client if kind.whom == "client" else None
        affected = {"client": [client], "all": self.clients, "none": []}[kind.whom]
        self.server.disturbed |= kind.whom == "all"
        self._last_fault = f"{kind.name}{f' of {own.host}' if own else ''} at {time.monotonic() - self._began:.1f} s"
        self._busy |= own is None
        for each in affected:
            each.begin_fault(fault)
            each.last_fault = self._last_fault
        try:
            kind.inject(self, self.server if kind.whom == "all" else client, *kind.arguments)
            self._injected[kind.name] += 1
        except tun6.KernelError as error:
            self._impossible[kind.name] += 1
            self._say(f"{self._last_fault} was not possible: {error!r}")
        except Exception as error:
            self._violation(f"{kind.name}: {error!r}", own)
        fault.end = time.monotonic()
        if kind.whom == "none":
            self._connect_all([self._new_id()])
            self.recovered(kind, time.monotonic() - fault.end, None)
        becomes_true(lambda: not any(fault in each.faults for each in affected), 60)  # if not, `_watch` has said it
        self._busy &= own is not None

    def report(self) -> None:
        def rank(values: list[float], share: float) -> float:
            return values[min(int(share * len(values)), len(values) - 1)]

        print(f"\n{'fault':24}{'times':>6}{'recovered':>11}   s: median{'p99':>8}{'max':>8}{'bound':>8}")
        for kind in self._kinds:
            times = sorted(self._times[kind.name]) or [math.nan]
            figures = f"{statistics.median(times):11.2f}{rank(times, 0.99):8.2f}{times[-1]:8.2f}{kind.within:8.0f}"
            print(f"{kind.name:24}{self._injected[kind.name]:6}{len(self._times[kind.name]):11}{figures}")
        delays = sorted(chain.from_iterable(client.delays for client in self.clients)) or [math.nan]
        blocks, moved = sum(client.answered for client in self.clients), sum(client.moved for client in self.clients)
        lost = [f"{len(self._lost_outside)} lost there and {self._lost_inside} inside", *self._lost_outside[:9]]
        print(f"TCP: {blocks} blocks with {moved >> 20} MiB in {self._size} streams, each checked at both ends")
        print(f"UDP: {len(delays)} echoes outside fault windows", "; ".join(lost), sep=", ")
        middle, high = 1000 * rank(delays, 0.5), 1000 * rank(delays, 0.99)
        print(f"round trip outside: median {middle:.1f} ms, p99 {high:.1f} ms, max {delays[-1]:.2f} s")
        for growth in self._growths:
            print(f"server, {growth}")
        for program in self._programs[:3]:
            print(f"{program.host}, memory by minute, MiB: {' '.join(f'{mib:.1f}' for mib in program.memory_by_minute())}")
        if self._late_growths:
            late = sorted(self._late_growths)
            middle, (most, who) = late[len(late) // 2][0], late[-1]
            print(f"memory of {len(late)} lives after {SoakProgram.FLAT_AFTER_S:.0f} s: {middle:+.0f} bytes, at most {most:+.0f} ({who})")
        used = sum(sum(resource.getrusage(whose)[:2]) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        seconds = time.monotonic() - self._began
        print(f"{seconds:.0f} s, {used / seconds:.2f} processors busy on average; this process was late by {self._late:.1f} s at most")
        print(f"{len(self.violations)} violations")


class FaultKind(NamedTuple):
    name: str
    whom: str  # it affects: a "client", "all" of them, "none"
    within: float  # seconds after its end an echo must come back; where TCP has to notice, TCP_USER_TIMEOUT and a little
    inject: Callable[..., None]
    arguments: tuple[object, ...] = ()
    long: bool = False  # takes so long that only runs of LONG_MINUTES have it


def by_commands(name: str, within: float, where: str, do: str, undo: str = "") -> FaultKind:
    """A kind that is commands on a host."""
    return FaultKind(name, "client", within, Soak.run_commands, (where, do, undo))


def by_manager(name: str, *commands: str) -> FaultKind:
    """A kind that is commands of `ip` on the client's host, whose effect the client repairs in place."""
    return FaultKind(name, "client", 5, Soak.strip, commands)


TUN_ADDRESS, TUN_ROUTE = "addr del {client.ip}/128 dev tun6", "-6 route del default dev tun6 table {client.table}"
SMALLER_LINK = (
    "ip route {do} {client.address}/32 dev {client.nat_device} mtu lock 1300",
    "ip route {do} 10.9.0.0/24 dev eth0 mtu lock 1300 table {client.path_table}",
    "ip rule {do} from {client.address} lookup {client.path_table}",
)
FAULT_KINDS = (
    FaultKind("client-killed", "client", 5, Soak.restart, (signal.SIGKILL,)),
    FaultKind("client-ended", "client", 5, Soak.restart, (signal.SIGTERM,)),
    FaultKind("client-respelled", "client", 5, Soak.respell),
    FaultKind("client-stopped", "client", 5, Soak.pause, (10,)),
    FaultKind("client-hung", "client", 8, Soak.hang_up, long=True),
    FaultKind("client-ip-hangs", "client", 18, Soak.hang_clients_ip),  # a run that hangs, then pauses: what it left is in the way
    FaultKind("nat-mapping-lost", "client", 40, Soak.drop_nat_mapping),
    FaultKind("address-changed", "client", 40, Soak.change_address),
    FaultKind("large-fragmented", "client", 5, Soak.shrink_path, SMALLER_LINK),
    FaultKind("large-vanish", "client", 5, Soak.shrink_path, (*SMALLER_LINK, "nft {do} element ip soak unfragmented {{{client.address}}}")),
    FaultKind("refused-after-grace", "client", 5, Soak.refuse),
    by_commands(
        "link-cut", 40, "nat", "nft add element ip soak cut {{{client.address}}}", "nft delete element ip soak cut {{{client.address}}}"
    ),
    by_commands("link-down", 40, "{client.router}", "ip link set {client.host} down", "ip link set {client.host} up"),
    by_commands("route-removed", 40, "{client.host}", "ip route del default", "ip route add default via {client.net}.0.1"),
    by_commands("tun-removed", 5, "{client.host}", "ip link del tun6"),
    by_commands("tun-down", 5, "{client.host}", "ip link set tun6 down"),
    by_manager("tun-address-removed", TUN_ADDRESS),
    by_manager("tun-route-removed", TUN_ROUTE),
    by_manager("tun-flushed", "-6 addr flush dev tun6", "-6 route flush dev tun6 table {client.table}"),
    by_commands("session-tun-removed", 5, "server", "ip link del {device}"),
    by_commands("session-tun-down", 5, "server", "ip link set {device} down"),
    by_commands("session-route-removed", 5, "server", "ip -6 route del {client.network} dev {device}"),
    FaultKind("server-killed", "all", 8, Soak.restart, (signal.SIGKILL,)),  # the last of all clients counts
    FaultKind("server-ended", "all", 8, Soak.restart, (signal.SIGTERM,)),
    FaultKind("server-stopped", "all", 5, Soak.pause, (5,)),
    FaultKind("server-hung", "all", 15, Soak.hang_up, long=True),
    FaultKind("server-ip-hangs", "all", 15, Soak.hang_servers_ip),  # for those who come anew: as on the client
    FaultKind("forwarding-off", "all", 5, Soak.stop_forwarding),
    FaultKind("server-reloaded", "none", 5, Soak.reload_server),
    FaultKind("native-ipv6", "none", 5, Soak.add_native_ipv6),
    FaultKind("new-ids", "none", 5, Soak.connect_new_ids),
    FaultKind("disk-full", "none", 5, Soak.fill_disk),
    FaultKind("garbage", "none", 5, Soak.connect_with_garbage),
    FaultKind("client-not-reading", "none", 5, Soak.flood_without_reader),
)


def soak_command(arguments: list[str]) -> int:
    """`python test_tun6.py soak`: faults for some minutes, and a report; 0 when nothing was violated."""
    parser = argparse.ArgumentParser(prog="test_tun6.py soak")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--clients", type=int, help=f"by default 100, or {CLUSTER_SIZE}")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 48), help="of the faults, whose times depend on the machine too")
    parser.add_argument("--cluster", action="store_true", help="three servers on one store, and the faults of `test_tun6.py cluster`")
    known = {kind.name: [kind] for kind in FAULT_KINDS} | {"server-faults": [kind for kind in FAULT_KINDS if kind.whom == "all"]}
    parser.add_argument("--faults", nargs="+", choices=known, default=known, metavar="KIND", help=f"only these, of {', '.join(known)}")
    parser.add_argument("--without", nargs="+", choices=known, default=(), metavar="KIND", help="not these")
    options = parser.parse_args(arguments)
    options.clients = options.clients or (CLUSTER_SIZE if options.cluster else 100)
    print(f"{options.clients} clients, {options.minutes:g} minutes, seed {options.seed}", flush=True)
    tun6.raise_descriptor_limit()
    if options.cluster:
        return soak_cluster(options.minutes, options.clients, options.seed)
    wanted, unwanted = ([kind for name in names for kind in known[name]] for names in (options.faults, options.without))
    if options.faults is known and options.minutes < LONG_MINUTES:
        unwanted += [kind for kind in FAULT_KINDS if kind.long]
    soak = Soak(options.minutes, options.clients, options.seed, [kind for kind in FAULT_KINDS if kind in wanted and kind not in unwanted])
    tun6.run_until_signalled(soak.run, lambda: "")
    soak.report()
    return 0 if soak.finished and not soak.violations else 1


# ---- observers -------------------------------------------------------------------------------------------------------

OBSERVED_S = 20  # of traffic, before anybody looks
PROMETHEUS_CONFIG = """
global: {scrape_interval: 1s, evaluation_interval: 1s}
scrape_configs: [{job_name: tun6, static_configs: [{targets: ["127.0.0.1:10116", "10.9.0.1:10116"]}]}]
"""


def figures_of(lab: Lab, query: str) -> list[float]:
    """What the Prometheus on the client's host answers."""
    with lab.inside("client"):
        sock = socket.create_connection(("127.0.0.1", 9090), 10)
    with sock:
        sock.sendall(f"GET /api/v1/query?query={quote(query)} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        answer = json.loads(all_of(sock).partition(b"\r\n\r\n")[2])
    return [float(series["value"][1]) for series in answer.get("data", {}).get("result", [])]


def observe(lab: Lab, folder: Path, screenshot: Path) -> list[str]:
    """A real Prometheus and a real browser look at a server of a cluster and a client; gives what is wrong, a sentence each."""
    faults = []
    cert = folder / "server.pem"
    make_certificate(cert, "-subj", "/CN=tun6")
    (folder / "prometheus.yml").write_text(PROMETHEUS_CONFIG)
    tunnel = Tunnel(lab, folder)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/browser", "--enable-logging=stderr"]
    with ExitStack() as undo:
        bench = undo.enter_context(StoreBench(lab, folder, "server"))
        bench.fresh("optional", tunnel.pool)
        bench.store("other", network=tunnel.pool, keys="optional")
        bench.close_all()  # a server that is silent from now on
        undo.callback(tunnel.kill)
        shared: dict[str, Any] = {"store": bench.url, "name": "one", "assignments": None, "keys_required": "no", "limit": "900M"}
        tunnel.server(metrics="10.9.0.1:10116", metrics_clients="yes", cert=cert, new_ids_per_hour=100, **shared)
        client = tunnel.client(metrics="127.0.0.1:10116", id="b8:27:eb:12:34:56", fingerprint=fingerprint_in(cert.read_text()))
        tunnel.crowd(3)
        tunnel.peer("<script>alert('hostile')</script>").connected()
        client.prefix()
        prometheus = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        undo.enter_context(running(lab, "client", *prometheus, "--web.listen-address=127.0.0.1:9090"))
        undo.enter_context(
            repeated(lambda: transfer(lab, "client", "internet", Lab.INTERNET, random.randint(100_000, 400_000), 400_000), 1)
        )
        down = random.Random(6)
        own = str(client.prefix()[1])
        undo.enter_context(repeated(lambda: transfer(lab, "internet", "client", own, down.randint(10**6, 4 * 10**6), 10**6), 1))
        time.sleep(OBSERVED_S)
        for query in dashboard_queries():
            found: list[float] = []
            with suppress(tun6.KernelError, OSError):
                found = wait_until(query, lambda query=query: figures_of(lab, query))  # type: ignore[misc]
            print(f"{'ok  ' if found and not any(map(math.isnan, found)) else 'FAIL'} {query}: {found[:4]}", flush=True)
            if not found or any(map(math.isnan, found)):
                faults.append(f"Prometheus has no figure for {query}")
        for side, address in (("server", "10.9.0.1:10116"), ("client", "127.0.0.1:10116")):
            looks = [["--dump-dom"], [f"--screenshot={screenshot}", "--window-size=1060,560", "--hide-scrollbars"]]
            for options in looks if side == "server" else looks[:1]:
                done = lab.run("client", *browser, *options, f"http://{address}/", timeout=60)
                refused = re.findall(".*(?:Content Security Policy|Refused to|Uncaught).*", done.stderr)
                if done.returncode or refused:
                    faults.append(f"the browser could not show the page of the {side}: {done.returncode} {refused}")
                if options == ["--dump-dom"]:
                    page = done.stdout
                    print(f"page of the {side} in the browser: {len(page)} characters", flush=True)
                    if f"tun6 {side}: up" not in page or "<polyline" not in page:
                        faults.append(f"the browser does not show the page of the {side}: {page[:200]}")
                    if "<script>" in page or (side == "server" and "&lt;script&gt;alert('hostile')" not in page):
                        faults.append("what a client said is no text in the page")
    return faults


def observers_command(arguments: Sequence[str]) -> int:
    """`test_tun6.py observers`: needs root, and `apt-get install -y prometheus chromium`; gives the exit status.

    It installs PostgreSQL as `test_tun6.py store` does.
    """
    parser = argparse.ArgumentParser(prog="test_tun6.py observers", description=observe.__doc__)
    parser.add_argument("--screenshot", metavar="FILE", type=Path, help="where the picture of the page goes")
    options = parser.parse_args(arguments)
    install_cluster_packages()
    with tempfile.TemporaryDirectory() as folder, Lab() as lab:
        faults = observe(lab, Path(folder), (options.screenshot or Path(folder, "page.png")).absolute())
    print("\n".join(faults) or "every query has a figure, and the pages are shown", flush=True)
    return int(bool(faults))


# ---- systemd ---------------------------------------------------------------------------------------------------------

DEBIANS = {"bookworm": "3.11", "trixie": "3.13"}  # and their Python, for which the one package is fetched that Debian does not have
MACHINE_PACKAGES = (
    "systemd,systemd-sysv,dbus,iproute2,python3,python3-venv,python3-gevent,python3-netifaces,openssl,procps,iputils-ping,nftables,radvd"
)
MACHINE = r"""  # $1: the root below the overlay; $2: its name; $3: this checkout. It boots again when it reboots.
# $4: the network namespace where its wires end, or none; then for each wire its name there, and what systemd-networkd is to know of its
# other end: eth0, eth1 ...
mount --make-rprivate /
mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd  # of which nspawn wants to be sure that it is none of the disk
mount -t cgroup2 none /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$2" && echo $$ > "/sys/fs/cgroup/$2/cgroup.procs"
over=$(mktemp -d) && mount -t tmpfs tmpfs "$over" && mkdir "$over"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=$1,upperdir=$over/upper,workdir=$over/work" "$over/root"
echo 'z /dev/net/tun 0666 - - -' > "$over/root/etc/tmpfiles.d/tun.conf"  # as udev has it on a machine
start=() wires=()
if [ "$4" ]; then
    start=(nsenter "--net=$4")
    for ((i = 5; i < $#; i += 2)); do
        eth="eth$((${#wires[@]}))"
        wires+=("--network-veth-extra=${!i}:$eth") next=$((i + 1))
        printf '[Match]\nName=%s\n[Network]\n%s\n' "$eth" "${!next}" > "$over/root/etc/systemd/network/$eth.network"
    done
    for unit in networkd.service:multi-user networkd-wait-online.service:network-online; do
        mkdir -p "$over/root/etc/systemd/system/${unit#*:}.target.wants"
        ln -s "/lib/systemd/system/systemd-${unit%:*}" "$over/root/etc/systemd/system/${unit#*:}.target.wants/"
    done
fi
status=133
while [ $status = 133 ]; do
    status=0
    "${start[@]}" systemd-nspawn -q -D "$over/root" -M "$2" -b --private-network "${wires[@]}" --console=pipe --register=no --keep-unit \
        --bind-ro="$3:/mnt" || status=$?
done
umount -R "$over" && rmdir "$over"
echo $$ > /sys/fs/cgroup/cgroup.procs
find "/sys/fs/cgroup/$2" -depth -type d -exec rmdir {} \;
"""


def debian_root(suite: str, cache: Path) -> Path:
    """A root of this Debian with what tun6 needs, made once; in it, /root/venv is a virtual environment that sees Debian's packages."""
    root = cache / suite
    if not (root / "root/ready").exists():
        print(f"making {root}, which takes a minute or two", flush=True)
        shutil.rmtree(root, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        include = f"--include={MACHINE_PACKAGES}"
        subprocess.run(["debootstrap", "--variant=minbase", include, suite, str(root)], check=True, stdout=subprocess.DEVNULL)
        fetch = [
            "download",
            "-q",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--python-version",
            DEBIANS[suite],
            "-d",
            str(root / "root/wheels"),
        ]
        subprocess.run([sys.executable, "-m", "pip", *fetch, "python-pytun"], check=True)
        script = (
            "python3 -m venv --system-site-packages /root/venv && /root/venv/bin/pip install -q --no-index -f /root/wheels python-pytun"
        )
        subprocess.run(["chroot", str(root), "sh", "-ec", script], check=True)
        (root / "root/ready").touch()
    return root


class Machine:
    """A Debian that boots with systemd as process 1 in namespaces of its own. What it writes is gone with it.

    It has no network, or wires lead from its eth0, eth1 ... to interfaces in a network namespace.
    """

    def __init__(
        self,
        root: Path,
        name: str = "systemd",
        namespace: str = "",
        wires: Mapping[str, str] | None = None,
        plug: Callable[[], object] = lambda: None,
    ) -> None:
        """`wires`: by the interface there, [Network] of a systemd.network(5); `plug` is called at each boot, when they are there."""
        self._name, self._plug = f"tun6-{name}-{os.getpid()}", plug
        where = [str(root), self._name, str(Path(__file__).resolve().parent), namespace and f"/run/netns/{namespace}"]
        where += chain.from_iterable((wires or {}).items())
        command = ["unshare", "-m", "-C", "bash", "-euc", MACHINE, "machine", *where]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self._init = 0

    def __enter__(self) -> Machine:
        self.wait_for_boot()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None and not self._init:
            self.wait_for_boot()
        if self._process.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.kill(self._init, signal.SIGRTMIN + 4)  # systemd(1): power off
                self._process.wait(30)
        if self._process.poll() is None:
            self.kill()

    def wait_for_boot(self) -> None:
        """Returns when it has booted, with a process 1 that is not the one of before."""

        def find() -> int:
            assert self._process.poll() is None, "the machine did not start; does this one have systemd-nspawn (package systemd-container)?"
            of = [self._process.pid]
            for pid in of:
                with suppress(FileNotFoundError):
                    of += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                    status = Path(f"/proc/{pid}/status").read_text()
                    if pid != self._init and re.search(r"^NSpid:.*\t1$", status, re.MULTILINE) and "Name:\tsystemd\n" in status:
                        return pid
            return 0

        self._init = wait_until("process 1", find, 60)
        self._plug()
        wait_until("systemd", lambda: self.run("systemctl", "is-system-running", status=None) in ("running", "degraded"), 60)

    def run(self, *command: str, status: int | None = 0, text: str = "") -> str:
        """What a command, which has no terminal, says on standard output, with this exit status (None: any)."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        inside = ["nsenter", "-t", str(self._init), "-a", "--wd=/root", "env", "-i", f"PATH={path}", "HOME=/root", *command]
        done = subprocess.run(
            inside, capture_output=True, text=True, input=text, timeout=600, start_new_session=True
        )  # without our terminal
        assert status in (None, done.returncode), f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}{self.journal()}"
        return done.stdout.strip() if status is None or not status else done.stderr.strip()

    def sh(self, script: str, text: str = "") -> str:
        return self.run("bash", "-euc", script, text=text)

    def kill(self) -> None:
        """Ends it without a word to anybody inside."""
        os.kill(self._init, signal.SIGKILL)  # and with it all that it contains
        self._process.wait(30)

    def journal(self) -> str:
        done = subprocess.run(
            ["nsenter", "-t", str(self._init), "-a", "journalctl", "-n", "60", "--no-pager"], capture_output=True, text=True
        )
        return done.stdout

    def show(self, role: str, name: str) -> str:
        """A property of the service."""
        return self.run("systemctl", "show", "-P", name, f"tun6-{role}")

    def drop_in(self, role: str, *lines: str) -> None:
        """Changes the service's unit by these lines, in place of those of the last call."""
        folder = f"/run/systemd/system/tun6-{role}.service.d"
        self.run(
            "sh", "-ec", f"mkdir -p {folder}; cat > {folder}/test.conf; systemctl daemon-reload", text="\n".join(["[Service]", *lines])
        )

    def network(self) -> str:
        """All that tun6 might leave behind."""
        return self.sh("for what in addr route rule link; do ip -6 $what; done; ip -6 route show table all; ls /run")

    def must_be(self, before: str) -> None:
        """Fails, with the journal, unless the network is as it was."""
        left, missing = (set(a.splitlines()) - set(b.splitlines()) for a, b in itertools.permutations((self.network(), before)))
        assert not left | missing, f"left: {left}, missing: {missing}\n{self.journal()}"

    def connected(self) -> str:
        """The client's prefix, when it has one."""
        found: list[str] = wait_until("a tunnel", lambda: re.findall("^has (.*?) on tun6", self.show("client", "StatusText")), 30)
        return found[0]


def network_section(*lines: str) -> str:
    """The lines of a .network, where one that has several values becomes several."""
    return "\n".join(f"{key}={value}" for line in lines for key, _, values in [line.partition("=")] for value in values.split())


class Home(Lab):
    """A VPS and a home: Machines `server` and `client` among namespaces.

    internet -------- server      10.9.0.1, 2001:db8:ffff::1, and 2001:db8:1::/48 is routed to it
       |
    router, a NAT: only IPv4 passes
       |
       +------ client, laptop     192.168.1.2 and 192.168.1.3, on one LAN
    """

    HOSTS = ("internet", "router", "laptop")
    WIRES: ClassVar = {  # of each Machine: the host where its wire ends, the bridge there, and its own addresses
        "server": ("internet", "vps", "Address=10.9.0.1/24 2001:db8:ffff::1/64", "Gateway=10.9.0.2 2001:db8:ffff::2"),
        "client": ("router", "lan", "Address=192.168.1.2/24", "Gateway=192.168.1.1"),
    }

    def machine(self, name: str, root: Path) -> Machine:
        """The Machine of this name, not yet booted."""
        host, bridge, *network = self.WIRES[name]
        plug = functools.partial(self.ip, host, f"link set {name} master {bridge} up")
        return Machine(root, name, self._names[host], {name: network_section(*network)}, plug)

    def _build(self) -> None:
        for host in self.HOSTS:
            self.set_sysctl(host, "net.ipv6.conf.default.dad_transmits", "0")
            self.ip(host, "link set lo up")
        self.ip("internet", f"link add home type veth peer name eth0 netns {self._names['router']}")
        self.ip("router", f"link add laptop type veth peer name eth0 netns {self._names['laptop']}")
        self.ip("internet", "link add vps type bridge")
        self.ip("router", "link add lan type bridge")
        self.ip("router", "link set laptop master lan")
        for host, device, *addresses in (
            ("internet", "vps", "10.9.0.2/24", f"{self.INTERNET}/64"),
            ("internet", "home", "10.7.0.1/24"),
            ("router", "eth0", "10.7.0.2/24"),
            ("router", "lan", "192.168.1.1/24"),
            ("router", "laptop"),
            ("laptop", "eth0", "192.168.1.3/24"),
        ):
            self.ip(host, f"link set {device} up")
            for address in addresses:
                self.ip(host, f"addr add {address} dev {device}")
        self.ip("internet", "-6 route add 2001:db8:1::/48 via 2001:db8:ffff::1")
        self.ip("router", "route add default via 10.7.0.1")
        self.ip("laptop", "route add default via 192.168.1.1")
        for host in ("internet", "router"):
            self.set_sysctl(host, "net.ipv4.ip_forward", "1")
        nat = "table ip nat { chain out { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }"
        self._check(["ip", "netns", "exec", self._names["router"], "nft", nat])


def check_install(machine: Machine) -> None:
    python = "/root/venv/bin/python /mnt/tun6.py install"
    settings = "--set documentation_addresses=yes --set localhost=127.0.0.1"
    said = machine.sh(f"{python} server --prefix 2001:db8:7::/48 {settings}")
    assert "started tun6-server.service" in said, said
    added = json.loads(machine.run("tun6", "clients", "add", "pi", "--address", "127.0.0.1", "--json"))
    machine.run("tun6", "install", "client", "--join", "-", "--set", "default_route=no", text=added["token"])
    assert machine.connected() == added["prefix"]
    machine.run("ping", "-c1", "-W5", "-I", str(IPv6Network(added["prefix"])[1]), "2001:db8:7:ffff::1")
    for role in ("server", "client"):
        said = machine.sh(f"{python} {role}")
        assert said == f"tun6-{role}.service runs, nothing had to be changed", said
        exposure = machine.run("systemd-analyze", "security", "--no-pager", f"tun6-{role}").splitlines()[-1]
        print(f"    {exposure}")
        assert float(re.findall(r": ([\d.]+)", exposure)[0]) <= 2.5
        assert machine.run("systemd-analyze", "verify", f"/etc/systemd/system/tun6-{role}.service") == ""


def check_stops(machine: Machine) -> None:
    machine.run("systemctl", "stop", "tun6-client", "tun6-server")
    before, number = machine.network(), many(20, 100)
    for _ in range(number):
        machine.run("systemctl", "start", "tun6-server", "tun6-client")
        machine.connected()
        machine.run("systemctl", "stop", "tun6-client", "tun6-server")
        machine.must_be(before)
    print(f"    {number} stops, nothing left")
    for role in ("server", "client"):  # the program does not depend on KillMode=mixed: `ip` holds out against the signal that it gets, too
        machine.drop_in(role, "KillMode=control-group")
    for _ in range(number // 4):
        machine.run("systemctl", "start", "tun6-server", "tun6-client")
        machine.connected()
        machine.run("systemctl", "stop", "tun6-client", "tun6-server")
        machine.must_be(before)
    print(f"    {number // 4} stops with KillMode=control-group, nothing left")
    for role in ("server", "client"):
        machine.drop_in(role)
    machine.run("systemctl", "start", "tun6-server", "tun6-client")
    machine.connected()
    for role in ("server", "client"):
        assert machine.show(role, "Result") == "success"


def check_crashes(machine: Machine) -> None:
    machine.run("systemctl", "stop", "tun6-client", "tun6-server")
    before = machine.network()
    for role in ("server", "client"):
        machine.drop_in(role, "WatchdogSec=3")
    machine.run("systemctl", "start", "tun6-server", "tun6-client")
    for role, number in itertools.product(("server", "client"), ("KILL", "STOP")):
        machine.connected()
        restarts = int(machine.show(role, "NRestarts"))
        began = time.monotonic()
        machine.run("systemctl", "kill", f"--signal={number}", "--kill-whom=main", f"tun6-{role}")
        wait_until("a restart", functools.partial(lambda role, more: int(machine.show(role, "NRestarts")) == more, role, restarts + 1), 30)
        wait_until("the start", functools.partial(lambda role: machine.show(role, "ActiveState") == "active", role), 30)
        print(f"    SIG{number} to the {role}: active again after {time.monotonic() - began:.1f} s")
    machine.connected()
    machine.run("systemctl", "stop", "tun6-client", "tun6-server")
    machine.must_be(before)
    machine.run("systemctl", "start", "tun6-server", "tun6-client")
    machine.connected()


def check_reload_and_bad_configuration(machine: Machine) -> None:
    pid = machine.show("server", "MainPID")
    machine.run("systemctl", "reload", "tun6-server")
    wait_until("the reload", lambda: "keys, limits and certificate read anew" in machine.journal(), 10)
    assert (machine.show("server", "MainPID"), machine.show("server", "ActiveState")) == (pid, "active")
    machine.sh("cp -p /etc/tun6/config.ini /root/kept; sed -i 's/^listenport = .*/listenport = x/' /etc/tun6/config.ini")
    assert "failed" in machine.run("systemctl", "restart", "tun6-server", status=1)
    assert [machine.show("server", name) for name in ("ActiveState", "ExecMainStatus")] == ["failed", "2"]
    machine.sh("cp -p /root/kept /etc/tun6/config.ini")
    machine.run("systemctl", "start", "tun6-server")
    machine.connected()
    warnings_ = machine.run("journalctl", "-q", "-p", "warning", "-u", "tun6-*", "-o", "cat")
    assert "must be a whole number" in warnings_
    assert "INFO" not in warnings_
    assert "WARNING" in warnings_


def check_state_of_root(machine: Machine) -> None:
    machine.run("systemctl", "stop", "tun6-server")
    machine.run("tun6", "clients", "add", "while stopped")
    assert set(machine.sh("stat -c %U:%G /var/lib/tun6/*").split()) == {"tun6:tun6"}
    machine.run("systemctl", "start", "tun6-server")
    machine.connected()
    assert "nothing keeps a second server off" not in machine.journal()


def check_reboot(machine: Machine) -> None:
    prefix, boot = machine.connected(), machine.run("cat", "/proc/sys/kernel/random/boot_id")
    machine.run("systemctl", "reboot", status=None)
    machine.wait_for_boot()
    assert machine.run("cat", "/proc/sys/kernel/random/boot_id") != boot
    assert machine.connected() == prefix
    print(f"    up again: {machine.run('systemd-analyze').splitlines()[0]}")


def check_lan(machine: Machine) -> None:
    """What a client with `lan` does inside the same sandbox. Without an Internet, radvd stays out of it."""
    machine.run("systemctl", "stop", "tun6-client")
    machine.sh("ip link add lan0 type veth peer name host0; ip link set lan0 up; ip link set host0 up")
    for device in ("lan0", "host0"):
        wait_until("link-local addresses", functools.partial(machine.sh, f"ip -6 addr show dev {device} scope link -tentative"), 10)
    before, tables = machine.network(), machine.sh("nft list tables")
    machine.run("tun6", "install", "client", "--set", "lan=lan0")
    prefix = IPv6Network(machine.connected())
    wait_until("the address on the LAN", lambda: f"{prefix[1]}/64" in machine.sh("ip -6 addr show dev lan0"), 10)
    assert "table inet tun6" in machine.sh("nft list tables")
    machine.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", "tun6-client")
    wait_until("the next one clears up", lambda: "killed tun6 has left for its LAN lan0" in machine.sh("journalctl -u tun6-client"), 30)
    assert IPv6Network(machine.connected()) == prefix
    machine.run("systemctl", "stop", "tun6-client")
    machine.must_be(before)
    assert machine.sh("nft list tables") == tables
    machine.sh("sed -i '/^lan = /d' /etc/tun6/config.ini; ip link del lan0; systemctl start tun6-client")
    machine.connected()


def check_upgrade(machine: Machine) -> None:
    """A server that was set up before there was `install`: as root, and all in /etc/tun6."""
    machine.run("systemctl", "stop", "tun6-client", "tun6-server")
    machine.sh("cd /etc/tun6; mv /var/lib/tun6/{assignments,keys}.json /var/lib/tun6/server.pem .; rm -r /var/lib/tun6; chown -R root: .")
    machine.sh(r"sed -i 's|/var/lib/tun6/||; /^control/d' /etc/tun6/config.ini; chmod 644 /etc/tun6/config.ini")
    machine.sh("cd /etc/systemd/system; sed -i '/^User=/d; /^Group=/d; /^StateDir/d; /^ProtectSystem/d; /^RuntimeD/d' tun6-server.service")
    machine.sh("systemctl daemon-reload; systemctl start tun6-server; ls /etc/tun6/assignments.json.lock")
    said = machine.sh("/root/venv/bin/python /mnt/tun6.py install server")
    assert "moved /etc/tun6/assignments.json to /var/lib/tun6/assignments.json" in said, said
    machine.run("systemctl", "start", "tun6-client")
    machine.connected()
    assert set(machine.sh("stat -c %U:%G /var/lib/tun6/*; stat -c %a /etc/tun6/config.ini").split()) == {"tun6:tun6", "640"}


def check_remove(machine: Machine) -> None:
    for role in ("client", "server"):
        machine.run("/root/venv/bin/python", "/mnt/tun6.py", "install", role, "--remove")
    left = machine.sh("ls -d /opt/tun6 /usr/local/bin/tun6 /etc/sysctl.d/60-tun6.conf /etc/systemd/system/*tun6* 2>/dev/null || true")
    assert left == ""
    assert machine.sh("ls /etc/tun6 /var/lib/tun6/keys.json /var/lib/tun6/server.pem").splitlines()[-1] == "config.ini"
    assert "tun6" not in machine.sh("ip -6 addr; ip -6 route; ip -6 rule")


def connects(home: Home, address: str) -> bool:
    """Whether a connection from the Internet to this address of the laptop is let in."""
    with home.inside("laptop"):
        listener = socket.create_server((address, 5001), family=socket.AF_INET6)
    with listener, home.inside("internet"), suppress(OSError):
        socket.create_connection((address, 5001), 5).close()
        return True
    return False


def check_home(root: Path) -> None:
    """README's way from a VPS and a Pi to a LAN with IPv6, but for its packages; both machines are rebooted."""
    home = Home()
    with home, ExitStack() as undo:
        server, client = machines = [undo.enter_context(home.machine(name, root)) for name in Home.WIRES]
        python = "/root/venv/bin/python /mnt/tun6.py install"
        server.sh(f"{python} server --prefix 2001:db8:1::/48 --set documentation_addresses=yes")
        token = server.sh("tun6 clients add pi --address 10.9.0.1").splitlines()[-1]
        began = time.monotonic()
        said = client.run(*python.split(), "client", "--set", "lan=eth0", "--join", "-", text=f"{token}\n")
        assert "started tun6-client.service: has 2001:db8:1::/64 on tun6" in said, said
        wait_until("the laptop reaches the Internet", lambda: home.pings("laptop"), 60)
        print(f"    the laptop reaches the Internet {time.monotonic() - began:.1f} s after `install client` began")
        address = re.findall(r"inet6 (\S+)/64 scope global", home.ip("laptop", "-6 addr show dev eth0"))[0]
        assert not connects(home, address), "the firewall is open"
        client.run("tun6", "install", "client", "--set", f"open=::{':'.join(IPv6Address(address).exploded.split(':')[4:])} tcp 5001")
        wait_until("the connection is let in", lambda: home.pings("laptop") and connects(home, address), 60)
        for machine in machines:
            machine.run("systemctl", "reboot", status=None)
        for machine in machines:
            machine.wait_for_boot()
        began = time.monotonic()
        wait_until("the laptop reaches the Internet again", lambda: home.pings("laptop") and connects(home, address), 60)
        print(f"    and {time.monotonic() - began:.1f} s after both machines have booted again")
        for machine in machines:
            assert "up for" in machine.run("tun6", "status")
            examined = machine.run("tun6", "doctor", status=None)
            assert " FAIL " not in f" {examined} ".replace("\n", " "), examined
            assert machine.run("journalctl", "-q", "-b", "-p", "warning", "-u", "tun6-*", "-o", "cat") == ""


def systemd_command(arguments: list[str]) -> int:
    """`test_tun6.py systemd`: install, units and their service manager in a Debian that really boots; takes root. Gives the exit status."""
    parser = argparse.ArgumentParser(prog="test_tun6.py systemd", description=systemd_command.__doc__)
    parser.add_argument("--debian", nargs="+", choices=DEBIANS, default=list(DEBIANS))
    parser.add_argument("--cache", type=Path, default=Path("/var/cache/tun6-systemd"), help="folder for the roots, made once")
    options = parser.parse_args(arguments)
    checks = (
        check_install,
        check_stops,
        check_crashes,
        check_reload_and_bad_configuration,
        check_state_of_root,
        check_reboot,
        check_lan,
        check_upgrade,
        check_remove,
    )
    for suite in options.debian:
        with Machine(debian_root(suite, options.cache)) as machine:
            print(f"{suite}: {machine.run('systemctl', '--version').splitlines()[0]}", flush=True)
            for check in checks:
                began = time.monotonic()
                check(machine)
                print(f"  ok  {check.__name__}, {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
        check_home(options.cache / suite)
        print(f"  ok  check_home, {time.monotonic() - began:.0f} s", flush=True)
    return 0


# ---- debian ----------------------------------------------------------------------------------------------------------

LAYER = r"""  # $1: the layer's folder; $2: the root below it; $3: what is at /mnt in it; $4: downloads that are kept; $5: what runs in it
mount --make-rprivate /
mkdir -p "$1"/{upper,work,root} "$4"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
mount --bind "$3" "$1/root/mnt"
mount --bind "$4" "$1/root/var/cache/apt/archives"
cp -L --remove-destination /etc/resolv.conf "$1/root/etc/resolv.conf"
chroot "$1/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive \
    PIP_NO_INDEX=1 PIP_FIND_LINKS=/mnt sh -ec "$5"
"""


class Layer:
    """What is changed above a root of Debian, in a folder; nothing boots in it."""

    def __init__(self, folder: Path, below: Path, shared: Path) -> None:
        """In it, `shared` is to be seen at /mnt, and pip finds its packages there and nowhere else."""
        self.folder, self._below, self._shared, self.upper = folder, below, shared, folder / "upper"
        self.upper.mkdir(parents=True)

    def sh(self, script: str) -> str:
        """What the script says on standard output."""
        plain = Path(str(self._below).rpartition(":")[2])
        downloads = plain.with_name(f"{plain.name}-downloads")
        words = [LAYER, "layer", *map(str, (self.folder, self._below, self._shared, downloads)), script]
        done = subprocess.run(["unshare", "-m", "bash", "-euc", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.returncode}\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
        return done.stdout.strip()


def plain_root(suite: str, cache: Path) -> Path:
    """The smallest root of this Debian, made once."""
    root = cache / f"{suite}-plain"
    if not root.exists():
        print(f"making {root}, which takes a minute", flush=True)
        making = cache / f"{suite}-plain.new"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        subprocess.run(["debootstrap", "--variant=minbase", suite, str(making)], check=True, stdout=subprocess.DEVNULL)
        making.rename(root)
    return root


def follow_dockerfile(root: Path, folder: Path, shared: Path) -> list[Layer]:
    """Does on this root what contrib/Dockerfile says, without Docker; gives its stages."""
    stages: dict[str, Layer] = {}
    work = ""
    for line in re.sub(r"\\\n", "", (CHECKOUT / "contrib/Dockerfile").read_text()).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages[rest.split()[-1]] = stage = Layer(folder / f"stage{len(stages)}", root, shared)
            work = ""
        elif word == "WORKDIR":
            work = rest
        elif word == "COPY":
            *sources, to = rest.split()
            origin = stages[sources.pop(0).partition("=")[2]].upper if sources[0].startswith("--from=") else CHECKOUT
            target = stage.upper / (to.strip("/") if to.startswith("/") else f"{work}/{to}".strip("/"))
            target.mkdir(parents=True, exist_ok=True)
            for source in chain.from_iterable(origin.glob(source.strip("/")) for source in sources):
                if source.is_dir():
                    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, target)
        elif word == "RUN":
            stage.sh(f"cd /{work}; {rest}")
        else:
            assert word in ("", "#", "ARG", "VOLUME", "HEALTHCHECK", "ENTRYPOINT", "CMD"), line
    return list(stages.values())


SKIPPED = "".join(f"-path {path} -prune -o " for path in ("/proc", "/mnt", "/var/log", "/var/cache/man"))
LEFT = f"find / -xdev {SKIPPED} -name '*tun6*' ! -name 'tun6.deb' -print"


def check_deb(machine: Machine) -> None:
    """The package alone, on a machine that boots: `tun6 install`, a tunnel, a reboot, removal, installation anew, purge."""
    said = machine.sh("tun6 install server --prefix 2001:db8:7::/48 --set documentation_addresses=yes --set localhost=127.0.0.1")
    assert "started tun6-server.service" in said, said
    added = json.loads(machine.run("tun6", "clients", "add", "pi", "--address", "127.0.0.1", "--json"))
    machine.run("tun6", "install", "client", "--join", "-", "--set", "default_route=no", text=added["token"])
    assert machine.connected() == added["prefix"]
    machine.run("ping", "-c1", "-W5", "-I", str(IPv6Network(added["prefix"])[1]), "2001:db8:7:ffff::1")
    assert machine.sh("ls -d /opt/tun6 /usr/local/bin/tun6 /etc/systemd/system/tun6* 2>/dev/null || true") == ""
    assert "1 connected" in machine.run("tun6", "status", "server")
    for role in ("server", "client"):
        unit = machine.show(role, "FragmentPath")
        assert unit.endswith(f"/lib/systemd/system/tun6-{role}.service")
        assert machine.run("systemd-analyze", "verify", unit) == ""
    check_reboot(machine)
    state = machine.sh("sha256sum /var/lib/tun6/*.json /etc/tun6/config.ini")
    pid = machine.show("server", "MainPID")
    machine.run("dpkg", "-i", "/tun6.deb")  # as an upgrade does
    assert machine.connected() == added["prefix"]
    assert machine.show("server", "MainPID") != pid
    machine.run("dpkg", "-r", "tun6")
    assert "tun6" not in machine.sh("ip -6 addr; ip -6 route; ip -6 rule; ls /usr/bin /usr/lib; systemctl list-units --all --plain 'tun6*'")
    assert machine.sh("sha256sum /var/lib/tun6/*.json /etc/tun6/config.ini") == state
    machine.run("dpkg", "-i", "/tun6.deb")
    for role in ("server", "client"):
        machine.run("tun6", "install", role)
    assert machine.connected() == added["prefix"]
    machine.run("dpkg", "-P", "tun6")
    left = machine.sh(LEFT)
    assert left == "", left
    assert "tun6" not in machine.sh("ip -6 addr; ip -6 route; ip -6 rule; ls /run")


def check_pip(folder: Path) -> None:
    """What `python -m build` makes, in fresh virtual environments, with its dependencies from where pip has them."""
    copy_checkout(folder / "source")
    for package in build_packages(folder / "source"):
        venv = folder / f"venv{package.suffix}"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin/pip", "install", "-q", package], check=True, cwd=folder)
        done = subprocess.run([venv / "bin/tun6", "--version"], capture_output=True, text=True, cwd=folder)
        assert done.stdout == f"tun6 {tun6.__version__}\n", done.stderr


def packages_command(arguments: Sequence[str]) -> int:
    """`test_tun6.py packages`: sdist, wheel, contrib/Dockerfile and the .deb in fresh roots; takes root. Gives the exit status."""
    parser = argparse.ArgumentParser(prog="test_tun6.py packages", description=packages_command.__doc__)
    parser.add_argument("--debian", nargs="+", choices=DEBIANS, default=list(DEBIANS))
    parser.add_argument(
        "--cache", type=Path, default=Path("/var/cache/tun6-systemd"), help="folder for the roots, made once; not in an overlay"
    )
    options = parser.parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.cache) as name:
        folder, shared = Path(name), Path(name, "shared")
        check_pip(folder / "pip")
        print("ok  sdist and wheel install and run", flush=True)
        source = re.findall(r"python-pytun==\S+", (CHECKOUT / "contrib/debian/rules").read_text())
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(shared), *source]
        subprocess.run(fetch, check=True)
        for suite in options.debian:
            root = plain_root(suite, options.cache)
            build, image = follow_dockerfile(root, folder / suite, shared)
            assert image.sh("tun6 --version") == f"tun6 {tun6.__version__}"
            (package,) = build.upper.glob("tun6_*.deb")
            print(f"ok  {suite}: the Dockerfile's lines build {package.name}, {package.stat().st_size >> 10} KiB", flush=True)
            fresh = Layer(folder / suite / "fresh", root, shared)
            shutil.copy(package, fresh.upper / "tun6.deb")
            fresh.sh("apt-get update; apt-get install -y --no-install-recommends /tun6.deb; tun6 --version")
            alone = Layer(folder / suite / "purged", Path(f"{fresh.upper}:{root}"), shared)
            assert alone.sh(f"apt-get purge -y tun6 >&2; {LEFT}") == ""
            fresh.sh("apt-get install -y --no-install-recommends systemd-sysv dbus iputils-ping man-db groff-base bash-completion")
            assert fresh.sh("man --warnings -l /usr/share/man/man8/tun6.8.gz 2>&1 >/dev/null") == ""
            with Machine(Path(f"{fresh.upper}:{root}")) as machine:
                check_deb(machine)
            print(f"ok  {suite}: installed, upgraded, removed and purged", flush=True)
    return 0


# ---- cluster ---------------------------------------------------------------------------------------------------------

CLUSTER_PACKAGES = {"bird2": ["bird"], "postgresql": ["postgresql"], "keepalived": ["keepalived"]}  # and their units
CLUSTER_SERVERS = ("s1", "s2", "s3")
CLUSTER_RANGE = IPv6Network("2001:db8:1::/48")  # that of contrib/bird.conf
CLUSTER_UPSTREAMS = ("ibgp", "ebgp", "range")  # our own router; a provider's that takes each prefix; that takes only the range
CLUSTER_DEAD_AFTER_S = 6  # `dead_after` on both sides, the least
CLUSTER_PORT = 10_000  # of the servers, and of the echo service on the Internet host
SETTLED_S = 5.0  # after the last fault is healed and `dead_after` ran out, the least that must be true is true
TICK_S = 0.02  # between two blocks of a stream: a stall is known to within this
PG_BIN = "/usr/lib/postgresql"
UNREACHABLE = "RTNETLINK answers: No route to host"  # what `ip route get` says of a route that rejects


def install_cluster_packages() -> None:
    """Installs with apt-get what the cluster's tests need and is not there. None of it is started, then or at the next boot."""
    present = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"], capture_output=True, text=True).stdout
    missing = [package for package in CLUSTER_PACKAGES if f"{package} installed\n" not in present]
    if not missing:
        return
    print(f"installing {' '.join(missing)}", flush=True)
    policy, kept = Path("/usr/sbin/policy-rc.d"), Path("/usr/sbin/policy-rc.d.tun6")  # which Debian asks before it starts a service
    with ExitStack() as undo:
        if policy.exists() or policy.is_symlink():
            policy.rename(kept)
            undo.callback(kept.rename, policy)
        else:
            undo.callback(policy.unlink)
        policy.write_text("#!/bin/sh\nexit 101\n")  # "action forbidden by policy"
        policy.chmod(0o755)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in ("apt-get update -q", f"apt-get install -qy --no-install-recommends {' '.join(missing)}"):
            subprocess.run(command.split(), check=True, env=environment, stdout=subprocess.DEVNULL)
        if os.path.isdir("/run/systemd/system"):
            subprocess.run(["systemctl", "disable", "-q", *(unit for package in missing for unit in CLUSTER_PACKAGES[package])], check=True)


class ClusterLab(Lab):
    """A Lab with three servers. All networks but that of internet and router are bridges in the host `switch`, where a cable can be cut.

    internet ----- router ==== wan ==== s1, s2, s3                2001:db8:fffe::/64, where BGP tells the router where a prefix is
                                        |   |   |
                         peers =========+===+===+                 fd00:116::/64, the servers' own
                         store =========+===+===+==== db1, db2    10.5.0.0/24
                        access =========+===+===+==== nat, hand   10.9.0.0/24
                                                      |
                                                      c0, c1 ...  10.8.0.0/16
    """

    HOSTS = ("internet", "router", *CLUSTER_SERVERS, "switch", "db1", "db2", "nat", "hand")
    ADDRESSES: ClassVar = {  # by network: those of its hosts
        "wan": {"router": "2001:db8:fffe::1/64", "s1": "2001:db8:fffe::11/64", "s2": "2001:db8:fffe::12/64", "s3": "2001:db8:fffe::13/64"},
        "peers": {"s1": "fd00:116::1/64", "s2": "fd00:116::2/64", "s3": "fd00:116::3/64"},
        "store": {"s1": "10.5.0.1/24", "s2": "10.5.0.2/24", "s3": "10.5.0.3/24", "db1": "10.5.0.11/24", "db2": "10.5.0.12/24"},
        "access": {"s1": "10.9.0.1/24", "s2": "10.9.0.2/24", "s3": "10.9.0.3/24", "nat": "10.9.0.254/24", "hand": "10.9.0.250/24"},
    }

    def __init__(self, size: int) -> None:
        super().__init__()
        self.client_hosts = [f"c{number}" for number in range(size)]
        self._names.update({host: f"tun6-{os.getpid()}-{host}" for host in self.client_hosts})
        self._cut: set[tuple[str, str]] = set()  # hosts, and their networks whose cables are cut

    @classmethod
    def address(cls, network: str, host: str) -> str:
        return cls.ADDRESSES[network][host].partition("/")[0]

    def batch(self, host: str, *lines: str) -> None:
        """Runs these commands of `ip`. Raises KernelError."""
        done = self.run(host, "ip", "-batch", "-", input="\n".join(lines))
        if done.returncode:
            raise tun6.KernelError(f"{lines}: {done.stderr.strip()}")

    def cut(self, host: str, *networks: str) -> None:
        """Takes the other end of its cables off the switch: what it sends is lost, and nothing tells it so."""
        self.batch("switch", *(f"link set {host}-{network} nomaster" for network in networks))
        self._cut |= {(host, network) for network in networks}

    def heal(self, host: str, *networks: str) -> None:
        self.batch("switch", *(f"link set {host}-{network} master {network}" for network in networks))
        self._cut -= {(host, network) for network in networks}

    def heal_all(self) -> None:
        for host, network in [*self._cut]:
            self.heal(host, network)

    def _build(self) -> None:
        for host in self._names:
            self.set_sysctl(host, "net.ipv6.conf.default.dad_transmits", "0")
            self.ip(host, "link set lo up")
        for network, ends in self.ADDRESSES.items():
            self.batch("switch", f"link add {network} address 02:00:00:00:00:01 type bridge mcast_snooping 0", f"link set {network} up")
            for host, address in ends.items():
                port = f"{host}-{network}"
                self.batch(
                    "switch",
                    f"link add {port} type veth peer name {network} netns {self._names[host]}",
                    f"link set {port} master {network} up",
                )
                self.batch(host, f"link set {network} up", f"addr add {address} dev {network}{' nodad' if ':' in address else ''}")
        self.ip("internet", f"link add eth0 type veth peer name world netns {self._names['router']}")
        self.batch("internet", "link set eth0 up", f"addr add {self.INTERNET}/64 dev eth0 nodad", "route add default via 2001:db8:ffff::1")
        self.batch("router", "link set world up", "addr add 2001:db8:ffff::1/64 dev world nodad")
        self.batch("nat", "link add br0 type bridge", "addr add 10.8.0.1/16 dev br0", "link set br0 up")
        for number, host in enumerate(self.client_hosts):
            self.batch("nat", f"link add {host} type veth peer name eth0 netns {self._names[host]}", f"link set {host} master br0 up")
            self.batch(host, "link set eth0 up", f"addr add 10.8.1.{number}/16 dev eth0", "route add default via 10.8.0.1")
        for host in ("router", *CLUSTER_SERVERS):
            self.set_sysctl(host, "net.ipv6.conf.all.forwarding", "1")
        self.set_sysctl("nat", "net.ipv4.ip_forward", "1")
        nat = "table ip nat { chain out { type nat hook postrouting priority 100; oifname access masquerade; }; }"
        self._check(["ip", "netns", "exec", self._names["nat"], "nft", nat])
        # a second machine with the Id of a client would end the connections of the first
        rule = f"ip6 saddr {CLUSTER_RANGE} tcp flags & rst == rst drop"
        quiet = f"table ip6 quiet {{ chain out {{ type filter hook output priority 0; {rule}; }}; }}"
        self._check(["ip", "netns", "exec", self._names["hand"], "nft", quiet])
        wait_until("the router reaches the Internet", lambda: self.pings("router"))

    def session_routes(self, host: str) -> dict[IPv6Network, str]:
        """The sessions' prefixes in the kernel of a server, and their devices."""
        routes = json.loads(self.ip(host, f"-6 -j route show type unicast proto {tun6.ROUTE_PROTOCOL}") or "[]")
        return {IPv6Network(route["dst"]): route["dev"] for route in routes}

    def path(self, host: str, address: IPv6Address) -> list[str]:
        """The hosts that a packet from this one passes on its way there, and at last a device, or why it ends."""
        path = [host]
        while len(path) < 8:
            done = self.run(path[-1], "ip", "-6", "-j", "route", "get", str(address))
            if done.returncode:
                return [*path, done.stderr.strip()]
            route = json.loads(done.stdout)[0]
            device, gateway = str(route["dev"]), f" {route.get('gateway')}/"
            there = [
                end for end in self.ADDRESSES.get(device, ()) if end != path[-1] and gateway in self.ip(end, f"-6 addr show dev {device}")
            ]
            if not there:
                return [*path, device]
            path.append(there[0])
            if self._cut & {(end, device) for end in path[-2:]}:
                return [*path, f"the cut network {device}"]
        return [*path, "a loop"]


class Service:
    """A program on a host of the lab, which is no tun6."""

    def __init__(self, lab: Lab, host: str, log: Path, *command: str) -> None:
        self.lab, self.host, self._log, self._command = lab, host, log, command
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with open(self._log, "a") as log:
            self.process = self.lab.popen(self.host, *self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def log(self) -> str:
        return self._log.read_text()

    def send_signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process:
            self.send_signal(number)
            self.process.wait(30)
            self.process = None


class Bird(Service):
    """BIRD on the router or a server, with the configuration that contrib/ has for it."""

    def __init__(self, lab: ClusterLab, host: str, folder: Path, upstream: str = "ibgp") -> None:
        self._control = folder / f"{host}.ctl"
        config, log = folder / f"{host}-bird.conf", folder / f"{host}-bird.log"
        config.write_text(self.configuration(host, upstream).replace("log syslog all", f'log "{log}" all'))
        super().__init__(lab, host, log, "bird", "-f", "-c", str(config), "-s", str(self._control))

    @staticmethod
    def configuration(host: str, upstream: str) -> str:
        """As contrib/ has it, with this host's addresses; `upstream` is one of CLUSTER_UPSTREAMS."""
        own = (CLUSTER_SERVERS.index(host) if host != "router" else 0) + 1
        others = sorted({1, 2, 3} - {own})
        if host == "router":
            text = (CHECKOUT / "contrib/bird-router.conf").read_text()
            provider = {
                "local ADDRESS as OUR_AS": "local ADDRESS as 65000",
                "rr client;": "",
                " || (net ~ RANGE && net.len > RANGE.len)": "",
            }
            only_range = {"import where net ~ RANGE": "import where net = RANGE"}
            changes = {**(provider if upstream != "ibgp" else {}), **(only_range if upstream == "range" else {})}
        else:
            text = (CHECKOUT / "contrib/bird.conf").read_text()
            changes = {"192.0.2.1;": f"192.0.2.{own};", "fffe::11;": f"fffe::1{own};", "INNER = fd00:116::1;": f"INNER = fd00:116::{own};"}
            for sample, other in zip((2, 3), others):
                changes[f"server{sample} from server {{ neighbor fd00:116::{sample}"] = (
                    f"server{other} from server {{ neighbor fd00:116::{other}"
                )
            ways = [f"via fd00:116::{other} bfd" for other in others]
            if upstream != "ibgp":
                changes["GATEWAY_AS = 65001"] = "GATEWAY_AS = 65000"
                sample_line = re.findall("(?m)^# (protocol bgp server2b .*)", text)[0]
                for other in others:
                    text += sample_line.replace("server2b", f"server{other}b").replace("::12 ", f"::1{other} ") + "\n"
                    ways.append(f"via 2001:db8:fffe::1{other} bfd")
            changes["via fd00:116::2 bfd via fd00:116::3 bfd"] = " ".join(ways)
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text

    def ask(self, *words: str) -> str:
        """What birdc answers; "" when there is no BIRD."""
        done = self.lab.run(self.host, "birdc", "-r", "-s", str(self._control), *words)
        return str(done.stdout) if done.returncode == 0 else ""

    def talks(self, *protocol: str) -> bool:
        """Whether it does with all its neighbours, or by this protocol."""
        states = [line.split()[-1] for line in self.ask("show", "protocols", *protocol).splitlines() if " BGP " in line]
        return bool(states) and set(states) == {"Established"}

    def watched(self) -> dict[str, tuple[str, float]]:
        """What BFD watches: the neighbours' addresses, and the state and how often it says that we are there, s."""
        rows = re.findall(r"(?m)^(\S*:\S*) +\S+ +(\w+) +\S+ +([\d.]+)", self.ask("show", "bfd", "sessions"))
        return {address: (state, float(interval)) for address, state, interval in rows}

    def is_whole(self) -> bool:
        """Whether it talks with all its neighbours, and would notice a link that is lost."""
        return self.talks() and {state for state, _ in self.watched().values()} == {"Up"}


class Postgres(Service):
    """A PostgreSQL in a folder of its own, as the user postgres, which initdb asks for."""

    USER: ClassVar = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
    SETTINGS = """
        listen_addresses = '*'
        max_connections = 200
        wal_sender_timeout = 5s
        wal_receiver_timeout = 5s
        hot_standby = on
    """

    def __init__(self, lab: Lab, host: str, folder: Path) -> None:
        self._data = folder / f"{host}-data"
        self._sockets = folder / f"{host}-sockets"
        self._sockets.mkdir()
        shutil.chown(self._sockets, "postgres", "postgres")
        self._bin = max(Path(PG_BIN).glob("*/bin"), key=lambda path: int(path.parent.name))
        super().__init__(
            lab, host, folder / f"{host}.log", *self.USER, str(self._bin / "postgres"), "-D", str(self._data), "-k", str(self._sockets)
        )

    @property
    def address(self) -> str:
        """In the network of the stores."""
        return ClusterLab.address("store", self.host)

    def _run(self, program: str, *words: str) -> None:
        done = self.lab.run(self.host, *self.USER, str(self._bin / program), *words)
        assert done.returncode == 0, f"{program} {words}: {done.stdout}{done.stderr}"

    def make(self) -> None:
        """A new one, empty."""
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "tun6", "--no-sync", "--locale=C.UTF-8")
        with open(self._data / "postgresql.conf", "a") as config:
            config.write(self.SETTINGS)
        with open(self._data / "pg_hba.conf", "a") as access:
            access.write("host all all 10.5.0.0/24 trust\nhost replication all 10.5.0.0/24 trust\n")

    def follow(self, primary: Postgres) -> None:
        """Becomes its standby, with all that it has now."""
        shutil.rmtree(self._data, ignore_errors=True)
        source = f"host={primary.address} user=tun6 application_name={self.host}"
        self._run("pg_basebackup", "-D", str(self._data), "-d", source, "-R", "-c", "fast", "--no-sync")
        self.configure("synchronous_standby_names = ''")  # when it is promoted, it has no standby of its own

    def configure(self, *lines: str) -> None:
        """Sets what is to be other than in SETTINGS; takes effect at the next start, or `reload`."""
        with open(self._data / "postgresql.auto.conf", "a") as config:
            config.write("\n".join(["", *lines, ""]))

    def synchronous_with(self, standby: str) -> None:
        """Each COMMIT waits from now on for the standby of this name, or with "" for none."""
        self.query(f"ALTER SYSTEM SET synchronous_standby_names = '{standby}'")
        self.query("SELECT pg_reload_conf()")

    def promote(self) -> None:
        self._run("pg_ctl", "promote", "-D", str(self._data))

    def start(self) -> None:
        super().start()
        wait_until(f"PostgreSQL on {self.host} answers", lambda: self.query("SELECT 1") == "1", 30)

    def signal_all(self, number: int) -> None:
        """To it and all its children."""
        assert self.process
        for pid in [self.process.pid, *map(int, processes_of(self.process.pid))]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_all(self) -> None:
        """Like a host that loses its power, but for what the kernel has still in memory."""
        self.signal_all(signal.SIGSTOP)  # so that no child is born meanwhile
        self.signal_all(signal.SIGKILL)
        self.kill()

    def query(self, text: str, database: str = "postgres") -> str:
        """What psql says to this, "" when there is no answer."""
        words = ("psql", "-h", str(self._sockets), "-U", "tun6", "-d", database, "-Atqc", text)
        done = self.lab.run(self.host, *self.USER, *words, timeout=20)
        return str(done.stdout).strip()

    def followed(self) -> bool:
        """Whether its standby is at work, synchronously."""
        return self.query("SELECT sync_state FROM pg_stat_replication") == "sync"


class ClusterClient:
    """A tun6 on a host of its own, and its traffic: a TCP stream to the Internet host and back, and packets from there."""

    def __init__(self, lab: ClusterLab, number: int, program: SoakProgram) -> None:
        self.lab, self.number, self.host, self.program = lab, number, program.host, program
        self.id = Cluster.client_id(number)
        self.prefix = program.prefix(seconds=30)
        self.stream = socket_on(lab, self.host, kind=socket.SOCK_STREAM)
        self.stream.bind((str(self.prefix[1]), 0))
        self.stream.settimeout(10)
        self.stream.connect((Lab.INTERNET, CLUSTER_PORT))
        self.stream.setblocking(False)
        with lab.inside(self.host):
            self.sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(tun6.ETH_P_IPV6))
        self.sniffer.setblocking(False)
        self.unanswered = bytearray()  # what was sent and has not come back
        self.sent = self.answered = 0  # bytes
        self.last = time.monotonic()  # when something came back
        self._stall = 0.0  # the longest since `mark` that is over, s
        self.packets = 0  # that came for its prefix
        self.broken = False  # whether its traffic was found wrong, which is a violation once

    def mark(self) -> None:
        """From now on stalls count."""
        self._stall, self.last = 0.0, time.monotonic()

    @property
    def stall(self) -> float:
        """The longest time since `mark` in which nothing came back, s."""
        return max(self._stall, time.monotonic() - self.last)

    def send(self) -> None:
        """Sends the next block, unless so many are on their way that TCP has stopped taking them."""
        if len(self.unanswered) > 1 << 16:
            return
        block = os.urandom(64)
        with suppress(BlockingIOError):
            sent = self.stream.send(block)
            self.unanswered += block[:sent]
            self.sent += sent

    def receive(self) -> None:
        """Raises AssertionError for a byte that is not what was sent, OSError when the connection has broken."""
        data = self.stream.recv(1 << 16)
        assert data, "the stream was ended"
        assert self.unanswered.startswith(data), f"the stream has other bytes than were sent, after {self.answered}"
        del self.unanswered[: len(data)]
        self.answered += len(data)
        self._stall, self.last = self.stall, time.monotonic()

    def sniff(self) -> None:
        """Raises AssertionError for a packet that is for another's prefix."""
        packet, (_, _, kind, *_) = self.sniffer.recvfrom(2048)
        target = IPv6Address(packet[24:40])
        if kind != socket.PACKET_OUTGOING and target in CLUSTER_RANGE:
            assert target in self.prefix, f"a packet for {target} came to {self.prefix}"
            self.packets += 1

    def close(self) -> None:
        self.stream.close()
        self.sniffer.close()


class ClusterTraffic(SocketOwner):
    """A thread that moves the traffic of all clients, at both ends, and notes what must not be."""

    def __init__(self, lab: ClusterLab) -> None:
        with lab.inside("internet"):
            self.sock = socket.create_server(("::", CLUSTER_PORT), family=socket.AF_INET6)
            self._probes = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.violations: list[str] = []
        self.late = 0.0  # seconds that this thread was late at most: a stall is known to within this
        self._poll, self._callbacks = select.epoll(), dict[int, Callable[[], None]]()
        self._owners: dict[int, ClusterClient] = {}
        self._clients: list[ClusterClient] = []
        self._echoes: list[socket.socket] = []
        self._watch(self.sock, self._accept)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, client: ClusterClient) -> None:
        for sock, callback in ((client.stream, client.receive), (client.sniffer, client.sniff)):
            self._watch(sock, callback)
            self._owners[sock.fileno()] = client
        client.mark()
        self._clients = [*self._clients, client]

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        for sock in (self.sock, self._probes, *self._echoes):
            sock.close()
        for client in self._clients:
            client.close()
        self._poll.close()

    def _watch(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        self._callbacks[sock.fileno()] = callback
        self._poll.register(sock.fileno(), select.EPOLLIN)

    def _accept(self) -> None:
        sock, _ = self.sock.accept()
        self._echoes.append(sock)

        def echo() -> None:
            data = sock.recv(1 << 16)
            assert data, "the stream was ended on its way to the Internet"
            sock.sendall(data)

        self._watch(sock, echo)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            for number, _ in self._poll.poll(max(0.0, due - time.monotonic())):
                self._do(number)
            now = time.monotonic()
            if now < due:
                continue
            self.late, due = max(self.late, now - due), now + TICK_S
            for client in self._clients:
                self._send(client)

    def _do(self, number: int) -> None:
        try:
            self._callbacks[number]()
        except (AssertionError, OSError) as error:
            owner = self._owners.get(number)
            self.violations.append(f"{owner.host if owner else 'internet'}: {error!r}")
            self._poll.unregister(number)
            if owner:
                owner.broken = True

    def _send(self, client: ClusterClient) -> None:
        with suppress(OSError):  # the connection has broken, which its receiver says, or there is no route
            client.send()
        with suppress(OSError):
            self._probes.sendto(client.prefix.network_address.packed, (str(client.prefix[1]), 9))


ClusterT = TypeVar("ClusterT", bound="Cluster")


class Cluster:
    """Three servers on one store, the routers, and clients with their traffic; and what must be true of them."""

    EXTRA = 99  # number of a client that is there only sometimes, on the host `hand`

    def __init__(self, folder: Path, size: int, upstream: str = "ibgp") -> None:
        self.folder, self.lab, self._upstream = folder, ClusterLab(size), upstream
        self.routers: tuple[str, ...] = ("router", *CLUSTER_SERVERS)  # whose paths are looked at
        self.birds: dict[str, Bird] = {}
        self.servers: dict[str, SoakProgram] = {}
        self.clients: list[ClusterClient] = []
        self.told: dict[str, IPv6Network] = {}  # the prefix that each Id was told last
        self.violations: list[str] = []
        self.notes = defaultdict[str, list[float]](list)
        self._keys: dict[int, dict[str, object]] = {}  # settings of clients, by number
        self._began, self._undo, self._numbers = time.monotonic(), ExitStack(), itertools.count()

    def __enter__(self: ClusterT) -> ClusterT:
        with ExitStack() as undo:
            undo.enter_context(self.lab)
            os.chmod(self.folder, 0o755)  # so that the user postgres gets to its own
            (self.folder / "pg").mkdir()
            shutil.chown(self.folder / "pg", "postgres", "postgres")
            self.primary, self.standby = (Postgres(self.lab, host, self.folder / "pg") for host in ("db1", "db2"))
            for database in (self.primary, self.standby):
                undo.callback(database.kill, signal.SIGQUIT)
            self.primary.make()
            self.primary.start()
            self.primary.query("CREATE DATABASE tun6")
            self.add_standby()
            self._start_routing(undo)
            undo.callback(self._kill)
            self.traffic = undo.enter_context(ClusterTraffic(self.lab))
            self._make_pool()
            self._start_servers(undo)
            self._start_clients()
            self._undo = undo.pop_all()
        return self

    def _start_routing(self, undo: ExitStack) -> None:
        for host in self.routers:
            self.birds[host] = Bird(self.lab, host, self.folder, self._upstream)
            undo.callback(self.birds[host].kill)
            self.birds[host].start()
        wait_until("the routers talk with each other", self.routers_talk, 30)

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _kill(self) -> None:
        for program in (*(client.program for client in self.clients), *self.servers.values()):
            program.kill()

    def _settings(self, host: str) -> dict[str, object]:
        """Of a server."""
        return {
            "localhost": self.lab.address("access", host),
            "listenport": CLUSTER_PORT,
            "prefixrange": CLUSTER_RANGE,
            "documentation_addresses": "yes",
            "control": self.folder / f"{host}.sock",
            "max_clients": 2000,
            "store": f"postgresql://tun6@{self.primary.address},{self.standby.address}/tun6",
            "store_cache": f"{host}-cache.json",
            "name": host,
            "cert": self.folder / "server.pem",
            "keys_required": "no",
            "dead_after": CLUSTER_DEAD_AFTER_S,
        }

    def _make_pool(self) -> None:
        self._fingerprint = make_certificate(self.folder / "server.pem")
        config = write_ini(self.folder / "s1.ini", server=self._settings("s1"))
        done = self.lab.run("s1", sys.executable, TUN6, "cluster", "init", "-c", str(config))
        assert done.returncode == 0, done.stderr

    def _start_servers(self, undo: ExitStack) -> None:
        self._start_servers_of(*CLUSTER_SERVERS)

    def _start_servers_of(self, *hosts: str) -> None:
        for host in hosts:
            self.servers[host] = SoakProgram(self.lab, host, "server", self.folder, self._settings(host))
        for host in hosts:
            self.servers[host].wait_for("serving ", seconds=30)

    def _start_clients(self) -> None:
        for number in (*range(len(self.lab.client_hosts)), self.EXTRA):
            added = asked(next(iter(self.servers.values())).config, "clients", "add", self.client_id(number))
            self._keys[number] = {"fingerprint": self._fingerprint, "key": added["key"]}
        programs = [self.client(number, host) for number, host in enumerate(self.lab.client_hosts)]
        for number, program in enumerate(programs):
            self.clients.append(ClusterClient(self.lab, number, program))
            self.traffic.add(self.clients[-1])

    @staticmethod
    def client_id(number: int) -> str:
        return f"02:00:00:00:00:{number:02x}"

    def start_server(self, host: str) -> None:
        """Starts one that has ended, and waits until it serves."""
        server, before = self.servers[host], self.servers[host].log().count("serving ")
        server.start()
        server.wait_for("serving ", before + 1, 20)

    @contextmanager
    def extra_client(self, servers: Sequence[str], number: int = EXTRA) -> Iterator[SoakProgram]:
        """Meanwhile there is one more client, by its number one with an Id of its own or of another one."""
        client = self.client(number, "hand", servers)
        try:
            yield client
        finally:
            client.kill()

    def new_id(self) -> str:
        return f"new {next(self._numbers)}"

    def note(self, what: str, seconds: float) -> None:
        """Keeps a time for the report."""
        self.notes[what].append(seconds)
        self.say(f"    {what}: {seconds:.1f} s")

    def client(self, number: int, host: str, servers: Sequence[str] = CLUSTER_SERVERS) -> SoakProgram:
        """A tun6 that has the Id and the key of this number, and knows these servers."""
        settings: dict[str, object] = {
            "remotehost": ", ".join(self.lab.address("access", server) for server in servers),
            "remoteport": CLUSTER_PORT,
            "id": self.client_id(number),
            "control": self.folder / f"{host}.sock",
            **self._keys[number],
            "dead_after": CLUSTER_DEAD_AFTER_S,
        }
        return SoakProgram(self.lab, host, "client", self.folder, settings)

    def add_standby(self) -> None:
        """Makes the standby anew from the primary, for which each COMMIT waits from then on."""
        self.standby.follow(self.primary)
        self.standby.start()
        self.primary.synchronous_with(self.standby.host)
        wait_until("the standby is synchronous", self.primary.followed, 20)

    def routers_talk(self) -> bool:
        return all(bird.is_whole() for bird in self.birds.values())

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def repair(self) -> None:
        """Ends what a fault that failed has left."""
        self.lab.heal_all()
        for service in (*self.birds.values(), self.primary, self.standby):
            if not service.process:
                service.start()
        for host, server in self.servers.items():
            server.process.send_signal(signal.SIGCONT)
            if server.process.poll() is not None:
                self.start_server(host)

    # what must be true

    def violated(self, what: str) -> None:
        self.violations.append(what)
        self.say(f"VIOLATION {what}")

    def tell(self, id_: str, prefix: IPv6Network) -> None:
        """An Id was told its prefix: the same as ever, and nobody else's."""
        if self.told.setdefault(id_, prefix) != prefix:
            self.violated(f"{id_} was told {prefix}, and {self.told[id_]} before")
        if others := [other for other, its in self.told.items() if its == prefix and other != id_]:
            self.violated(f"{id_} was told {prefix}, as {others}")

    def routes(self) -> dict[IPv6Network, dict[str, str]]:
        """The servers whose kernels have a route of a session to each prefix, and its device there."""
        found = defaultdict[IPv6Network, dict[str, str]](dict)
        for host in CLUSTER_SERVERS:
            for prefix, device in self.lab.session_routes(host).items():
                found[prefix][host] = device
        return found

    def server_of(self, client: ClusterClient) -> str:
        """The one that has its session; "" for none, or several."""
        hosts = [*self.routes()[client.prefix]]
        return hosts[0] if len(hosts) == 1 else ""

    def misroutes(self, prefixes: Iterable[IPv6Network] = ()) -> list[str]:
        """What is not as it must be of these, or all clients' prefixes: one kernel has a session's route, and every path ends there."""
        routes, wrong = self.routes(), []
        for prefix in prefixes or [client.prefix for client in self.clients]:
            ends = [[host, device] for host, device in routes[prefix].items()]
            paths = [self.lab.path(host, prefix[1]) for host in self.routers] if len(ends) == 1 else []
            if len(ends) != 1 or any(path[-2:] != ends[0] for path in paths):
                wrong.append(f"{prefix} has the routes {ends} and the paths {paths}")
        return wrong

    def settle(self) -> float:
        """The last fault is healed: gives the seconds until all is as it must be. What is not within the time for it is a violation."""
        began, answered = time.monotonic(), [client.answered for client in self.clients]
        late = began + CLUSTER_DEAD_AFTER_S + SETTLED_S

        def wrong() -> list[str]:
            stopped = [client.host for client, before in zip(self.clients, answered) if client.answered == before and not client.broken]
            return [*self.misroutes(), *(f"the stream of {host} does not go on" for host in stopped)]

        while (found := wrong()) and time.monotonic() < late:
            time.sleep(0.2)
        took = time.monotonic() - began
        for what in found:
            self.violated(what)
        for client in self.clients:
            for prefix in re.findall(r": has (\S+) on", client.program.log()):
                self.tell(client.id, IPv6Network(prefix))
        for program in (*self.servers.values(), *(client.program for client in self.clients)):
            for line in re.findall(".*(?:Traceback|internal error|the store is down: the store is down).*", program.new_lines()):
                self.violated(f"in the log of {program.host}: {line}")
        while self.traffic.violations:
            self.violated(self.traffic.violations.pop())
        return took


class SmallCluster(Cluster):
    """Two servers without BGP: keepalived says which is active, and the test does what the service manager is told."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(folder, size)
        self.routers = ("router",)
        self.keepers: dict[str, Service] = {}

    def _start_routing(self, undo: ExitStack) -> None:
        self.lab.ip("router", f"-6 route add {CLUSTER_RANGE} via 2001:db8:fffe::10")
        for host in CLUSTER_SERVERS[:2]:
            self.lab.ip(host, "-6 route add default via 2001:db8:fffe::1")
            text, active = (CHECKOUT / "contrib/keepalived.conf").read_text(), self.folder / f"{host}.active"
            for old, new in (
                ("interface eth0", "interface wan"),
                ("/usr/bin/systemctl start tun6-server", f"/usr/bin/touch {active}"),
                ("/usr/bin/systemctl stop tun6-server", f"/usr/bin/rm -f {active}"),
            ):
                assert old in text, old
                text = text.replace(old, new)
            config = self.folder / f"{host}-keepalived.conf"
            config.write_text(text)
            files = [f"--{kind}={self.folder}/{host}-{kind}" for kind in ("pid", "vrrp_pid")]
            self.keepers[host] = Service(
                self.lab, host, self.folder / f"{host}-keepalived.log", "keepalived", "-n", "-l", "-P", "-f", str(config), *files
            )
            undo.callback(self.keepers[host].kill, signal.SIGTERM)

    def _start_servers(self, undo: ExitStack) -> None:
        for host in CLUSTER_SERVERS[:2]:
            self.keepers[host].start()
        undo.enter_context(repeated(self._do_as_told, 0.05))
        wait_until("one of them is active", lambda: self.servers, 20)
        next(iter(self.servers.values())).wait_for("serving ", seconds=30)

    def _do_as_told(self) -> None:
        for host in self.keepers:
            told, server = (self.folder / f"{host}.active").exists(), self.servers.get(host)
            runs = server is not None and server.process.poll() is None
            if told and server is None:
                self.servers[host] = SoakProgram(self.lab, host, "server", self.folder, self._settings(host))
            elif server and told != runs:
                if told:
                    server.start()
                else:
                    server.end(signal.SIGTERM)


class GrowingCluster(Cluster):
    """A server with files and its clients, which becomes a cluster as docs/cluster.md says."""

    def _make_pool(self) -> None:
        self._fingerprint = make_certificate(self.folder / "server.pem")

    def _start_servers(self, undo: ExitStack) -> None:
        settings = {name: value for name, value in self._settings("s1").items() if name not in ("store", "store_cache", "name")}
        settings.update(assignments="assignments.json", keys="keys.json")
        self.servers["s1"] = SoakProgram(self.lab, "s1", "server", self.folder, settings)
        self.servers["s1"].wait_for("serving ", seconds=30)

    def grow(self) -> None:
        """Server one moves into the store, by the commands of the document; then there are two more."""
        id_ = self.client_id(0)
        asked(self.servers["s1"].config, "clients", "limit", id_, "50M")
        self.servers["s1"].end(signal.SIGTERM)
        config = self.servers["s1"].config
        new = {name: self._settings("s1")[name] for name in ("store", "store_cache", "name")}
        config.write_text(config.read_text() + "".join(f"{name} = {value}\n" for name, value in new.items()))
        commands = re.findall("<!-- import -->\n```sh\n(.*?)```", (CHECKOUT / "docs/cluster.md").read_text(), re.DOTALL)[0]
        commands = re.sub(r"\.venv/bin/python tun6.py cluster (\w+)", rf"{sys.executable} {TUN6} cluster \1 -c {config}", commands)
        commands = commands.replace("/etc/tun6/config.ini", str(config)).replace(".venv/bin/python tun6.py install server", "")
        done = self.lab.run("s1", "sh", "-euc", commands)
        assert done.returncode == 0, done.stderr
        self.start_server("s1")
        back = becomes_true(lambda: {self.server_of(client) for client in self.clients} == {"s1"}, 15)
        assert back, "the clients do not come back to the first server"
        super()._start_servers_of("s2", "s3")
        limits = [each["limit"] for each in asked(self.servers["s3"].config, "clients", "list") if each["id"] == id_]
        assert limits == [50 * MBIT], limits


class Hand:
    """A client by hand, which is many: it says its Id to one server after the other, and holds the session that it gets."""

    def __init__(self, cluster: Cluster, id_: str, servers: Sequence[str]) -> None:
        self.id, self._cluster, self.servers = id_, cluster, list(servers)
        self.prefix: IPv6Network | None = None
        self.answer: dict[str, Any] = {}
        self.answers = 0  # that gave it its prefix
        self.reached = 0.0  # when the last packet for its prefix came, by time.monotonic()
        self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        while True:
            with self._cluster.lab.inside("hand"):
                sock = gevent.socket.socket()
            with sock, suppress(OSError, EOFError):
                self._live(sock)
            self.servers.append(self.servers.pop(0))
            gevent.sleep(random.uniform(0, 0.3))

    def _live(self, sock: Any) -> None:
        with gevent.Timeout(15, EOFError):
            sock.connect((self._cluster.lab.address("access", self.servers[0]), CLUSTER_PORT))
            sock.sendall(json.dumps({"Id": self.id, "Offload": []}).encode())
            data = b""
            while b"}" not in data:
                data += self._more(sock)
        text, _, data = data.partition(b"}")
        self.answer = json.loads(text + b"}")
        if "Prefix" not in self.answer:
            raise EOFError
        self.prefix = IPv6Network(self.answer["Prefix"])
        self._cluster.tell(self.id, self.prefix)
        self.answers += 1
        while True:
            while frame := first_frame(data, 10):
                data = data[len(frame) :]
                target = IPv6Address(frame[34:50])
                if target not in self.prefix:
                    self._cluster.violated(f"a packet for {target} came to {self.id}, which has {self.prefix}")
                self.reached = time.monotonic()
            data += self._more(sock)

    @staticmethod
    def _more(sock: Any) -> bytes:
        data = sock.recv(4096)
        if not data:
            raise EOFError
        return cast(bytes, data)

    def leave(self) -> None:
        """Goes to the next server."""
        self._greenlet.kill(EOFError, block=False)

    def close(self) -> None:
        self._greenlet.kill()


@contextmanager
def hands(cluster: Cluster, wanted: Mapping[str, Sequence[str]]) -> Iterator[list[Hand]]:
    """Meanwhile these Ids connect, each to the first of its servers that takes it."""
    crowd = [Hand(cluster, id_, servers) for id_, servers in wanted.items()]
    try:
        yield crowd
    finally:
        for hand in crowd:
            hand.close()


Outage = Callable[[Cluster], AbstractContextManager[None]]


def restart_killed(cluster: Cluster, victim: str) -> None:
    """Its clients go to the others; some seconds later it is back."""
    cluster.servers[victim].end(signal.SIGKILL)
    gevent.sleep(3)
    cluster.start_server(victim)


def end_and_start(cluster: Cluster, victim: str) -> None:
    cluster.servers[victim].end(signal.SIGTERM)
    gevent.sleep(1)
    cluster.start_server(victim)


def pause_server(cluster: Cluster, victim: str, seconds: float) -> None:
    """Its kernel acknowledges what clients send, and its routes stay, until it wakes up as the loser."""
    gevent.sleep(1)  # clients that have come only now have no sign of life yet that they could miss
    with paused(cluster.servers[victim]):
        gevent.sleep(seconds)


def drain_server(cluster: Cluster, victim: str) -> None:
    config = cluster.servers[victim].config
    assert run_tun6("drain", "-c", str(config), "--minutes", "0.1").returncode == 0
    assert becomes_true(lambda: not cluster.lab.session_routes(victim), 12), "sessions are left on a server that drains"
    assert run_tun6("drain", "-c", str(config), "--stop").returncode == 0


def cut_server(cluster: Cluster, victim: str, *networks: str) -> None:
    """These networks of a server, without a word to anybody, for twice as long as it takes to notice."""
    cluster.lab.cut(victim, *networks)
    gevent.sleep(2 * CLUSTER_DEAD_AFTER_S)
    cluster.lab.heal(victim, *networks)
    wait_until("the routers talk with each other again", cluster.routers_talk, 30)


def flap_link(cluster: Cluster, victim: str, network: str) -> None:
    """It comes back, and is lost again as soon as BGP trusts it."""
    cluster.lab.cut(victim, network)
    wait_until("BGP has noticed", lambda: not cluster.birds[victim].talks("uplink"))
    gevent.sleep(random.uniform(1, 3))  # for another phase of what tries again
    cluster.lab.heal(victim, network)
    wait_until("BGP is up", lambda: cluster.birds[victim].talks("uplink"))
    gevent.sleep(0.3)
    cut_server(cluster, victim, network)


def restart_bird(cluster: Cluster, victim: str, seconds: float) -> None:
    """It is killed, and started again so many seconds later."""
    cluster.birds[victim].kill()
    gevent.sleep(seconds)
    cluster.birds[victim].start()
    wait_until("the routers talk with each other again", cluster.routers_talk, 30)


@contextmanager
def store_stopped(cluster: Cluster) -> Iterator[None]:
    cluster.primary.kill(signal.SIGINT)  # "fast": ends all sessions
    yield
    cluster.primary.start()


@contextmanager
def store_killed(cluster: Cluster) -> Iterator[None]:
    cluster.primary.kill_all()
    yield
    cluster.primary.start()


@contextmanager
def store_hung(cluster: Cluster) -> Iterator[None]:
    """Its kernel takes what is sent, and nothing answers."""
    cluster.primary.signal_all(signal.SIGSTOP)
    yield
    cluster.primary.signal_all(signal.SIGCONT)


@contextmanager
def store_slow(cluster: Cluster) -> Iterator[None]:
    """Each statement that writes to the table of clients takes 2 s."""
    cluster.primary.query(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(2); RETURN NULL; END'", "tun6"
    )
    cluster.primary.query("CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON client FOR EACH STATEMENT EXECUTE FUNCTION slow()", "tun6")
    assert cluster.primary.query("SELECT count(*) FROM pg_trigger WHERE tgname = 'slow'", "tun6") == "1"
    yield
    cluster.primary.query("DROP FUNCTION slow CASCADE", "tun6")
    assert cluster.primary.query("SELECT count(*) FROM pg_trigger WHERE tgname = 'slow'", "tun6") == "0"


@contextmanager
def standby_stopped(cluster: Cluster) -> Iterator[None]:
    """No COMMIT ends: each waits for the standby."""
    cluster.standby.kill(signal.SIGINT)
    yield
    cluster.standby.start()
    wait_until("the standby is synchronous again", cluster.primary.followed, 30)


@contextmanager
def store_failed_over(cluster: Cluster) -> Iterator[None]:
    """The primary is killed and the standby promoted, which gets a standby later."""
    cluster.primary.kill_all()
    cluster.lab.heal(cluster.standby.host, "store")
    cluster.standby.promote()
    cluster.primary, cluster.standby = cluster.standby, cluster.primary
    yield
    cluster.add_standby()


def disturb_store(cluster: Cluster, _: str, outage: Outage) -> None:
    with outage(cluster):
        gevent.sleep(8)


def move_meanwhile(cluster: Cluster, victim: str, outage: Outage) -> None:
    """The store does not answer as it should when the server is killed."""
    with outage(cluster):
        gevent.sleep(1)
        restart_killed(cluster, victim)
        gevent.sleep(4)


def lose_commits(cluster: Cluster, victim: str) -> None:
    """The standby that is promoted was cut off before Ids were new. No Id is new until all have written back what they know."""
    cluster.primary.synchronous_with("")
    cluster.lab.cut(cluster.standby.host, "store")
    with hands(cluster, {cluster.new_id(): [server] for server in CLUSTER_SERVERS for _ in range(5)}) as crowd:
        assert becomes_true(lambda: all(hand.answers for hand in crowd), 15), "new Ids are not served"
        with store_failed_over(cluster):
            with hands(cluster, {cluster.new_id(): [server] for server in CLUSTER_SERVERS for _ in range(5)}) as newcomers:
                served = becomes_true(lambda: all(hand.answers for hand in newcomers), 40)
                assert served, f"new Ids are not served after commits were lost: {newcomers[0].answer}"
            restart_killed(cluster, victim)
            served = becomes_true(lambda: all(hand.answers > (hand.servers[0] == victim) for hand in crowd), 15)
            assert served, "Ids whose commits were lost are not served"


def revoke_in_an_outage(cluster: Cluster, victim: str) -> None:
    """A server cut off from the store serves a revoked Id until it is healed, and then no longer."""
    other = next(host for host in CLUSTER_SERVERS if host != victim)
    config, id_ = cluster.servers[other].config, cluster.client_id(cluster.EXTRA)
    with cluster.extra_client([victim, other]) as client:
        held = client.prefix()
        if [*cluster.routes()[held]] != [victim]:
            restart_killed(cluster, other)
        cluster.lab.cut(victim, "store")
        gevent.sleep(1)
        asked(config, "clients", "revoke", id_)
        gevent.sleep(3)
        assert [*cluster.routes()[held]] == [victim], "a server cut off from the store does not go on as before"
        began = time.monotonic()
        cluster.lab.heal(victim, "store")
        assert becomes_true(lambda: not cluster.routes()[held], 15), "a revoked Id is served"
        cluster.note("a revoked Id served after the cut was healed", time.monotonic() - began)
        gevent.sleep(3)
        assert not cluster.routes()[held], "a revoked Id is served again"
    asked(config, "clients", "restore", id_)
    with cluster.extra_client([victim, other]) as client:
        assert client.prefix(seconds=15) == held, "a restored Id has another prefix"


def move_on_both_sides(cluster: Cluster, victim: str) -> None:
    """A server is cut off from the others and the store, and a client comes to it and to another one in turn."""
    other = next(host for host in CLUSTER_SERVERS if host != victim)
    with cluster.extra_client([victim]) as client:
        held = client.prefix()
    cluster.lab.cut(victim, "store", "peers")
    for server in (other, victim) * 3:
        with cluster.extra_client([server]) as client:
            assert client.prefix(seconds=15) == held, "another prefix on the other side of a cut"
    with cluster.extra_client([victim]) as client:
        client.prefix(seconds=15)
        cluster.lab.heal(victim, "store", "peers")
        wait_until("the routers talk with each other again", cluster.routers_talk, 30)
        alone = becomes_true(lambda: not cluster.misroutes([held]), CLUSTER_DEAD_AFTER_S + SETTLED_S)
        assert alone, f"after both sides of a cut had it: {cluster.misroutes([held])}"


def use_an_id_twice(cluster: Cluster, victim: str) -> None:
    """Two machines with one Id, and one key: they take it from each other, and are slowed down wherever they connect."""
    client = next(client for client in cluster.clients if cluster.server_of(client) == victim)
    seconds, before = 30, client.program.log().count(": has ")
    quiet = (
        f"chain out {{ {HOOK.replace('forward', 'output')} tcp flags rst drop; }}"  # the second knows nothing of the first's connections
    )
    with firewall(cluster.lab, "ip6 quiet", quiet, "hand"), cluster.extra_client(CLUSTER_SERVERS, client.number) as second:
        gevent.sleep(seconds)
        takeovers = client.program.log().count(": has ") - before + second.log().count(": has ")
    most = tun6.CONTENTION_TAKEOVERS + seconds / tun6.CONTENTION_PAUSE_S + 3
    assert takeovers <= most, f"two machines with one Id took it from each other {takeovers} times in {seconds} s"


def pin_a_freed_prefix(cluster: Cluster, victim: str) -> None:
    """Only `pin` gives it again, when all servers know that it is free; so not while one is stopped that may still have its route."""
    other = next(host for host in CLUSTER_SERVERS if host != victim)
    config = str(cluster.servers[other].config)
    first, second, newcomer = (cluster.new_id() for _ in range(3))
    with hands(cluster, {first: [victim], second: [other]}) as crowd:
        assert becomes_true(lambda: all(hand.answers for hand in crowd), 15), "new Ids are not served"
        freed, spare = cluster.told.pop(first), CLUSTER_RANGE[0xF000 + int(first.split()[1]) << 64]
        with paused(cluster.servers[victim]):
            moved = becomes_true(lambda: run_tun6("clients", "-c", config, "pin", first, f"{spare}/64").returncode == 0, 10)
            assert moved, "an Id can't be pinned while a server stands still, perhaps in the middle of a transaction"
            with hands(cluster, {newcomer: [other]}) as new:
                assert becomes_true(lambda: bool(new[0].answers), 15), "a new Id is not served"
            done = run_tun6("clients", "-c", config, "pin", second, str(freed))
            assert done.returncode == 2 and freed in map(IPv6Network, re.findall(r"[0-9a-f:]+/64", done.stderr)), done.stderr
        cluster.told.pop(second)
        pinned = becomes_true(lambda: run_tun6("clients", "-c", config, "pin", second, str(freed)).returncode == 0, 40)
        assert pinned, run_tun6("clients", "-c", config, "pin", second, str(freed)).stderr
        assert becomes_true(lambda: crowd[1].prefix == freed, 15), "a pinned prefix is not told"
        assert becomes_true(lambda: not cluster.misroutes([freed]), 15), cluster.misroutes([freed])


def connect_new_ids(cluster: Cluster, _: str) -> None:
    """500 at once on each of two servers."""
    began = time.monotonic()
    with hands(cluster, {cluster.new_id(): [server] for server in CLUSTER_SERVERS[:2] for _ in range(500)}) as crowd:
        served = becomes_true(lambda: all(hand.answers for hand in crowd), 60)
        unserved = [hand.answer for hand in crowd if not hand.answers]
        assert served, f"{len(unserved)} of 1,000 new Ids are not served: {unserved[:1]}"
        cluster.note("1,000 new Ids served", time.monotonic() - began)


def move_a_thousand(cluster: Cluster, victim: str) -> None:
    """1,000 clients leave a server at once whose host is dead: each has packets from the Internet again.

    It is not killed, as all servers have one kernel here: it would remove 1,000 devices for 23 s and more, and let no other make one.
    """
    others = [host for host in CLUSTER_SERVERS if host != victim]
    wanted = {f"many {number}": [victim, *random.sample(others, 2)] for number in range(1000)}

    def reached(since: float) -> bool:
        with socket_on(cluster.lab, "internet") as probes:
            for hand in crowd:
                if hand.prefix and hand.reached < since:
                    probes.sendto(b"", (str(hand.prefix[1]), 9))
        gevent.sleep(0.3)
        return all(hand.reached >= since for hand in crowd)

    with hands(cluster, wanted) as crowd:
        assert becomes_true(lambda: reached(1), 90), "not all of 1,000 clients are served"
        cluster.lab.cut(victim, "wan", "peers", "store", "access")
        began = time.monotonic()
        for hand in crowd:
            if hand.servers[0] == victim:
                hand.leave()
        moved = becomes_true(lambda: reached(began), 60)
        cluster.note("1,000 clients moved", max(hand.reached for hand in crowd) - began)
        assert moved, f"{sum(hand.reached < began for hand in crowd)} of 1,000 clients are not served by another server"
        cluster.lab.heal(victim, "wan", "peers", "store", "access")

        def have_one_route() -> bool:
            routes = cluster.routes()
            return all(len(routes[cast(IPv6Network, hand.prefix)]) == 1 for hand in crowd)

        assert becomes_true(have_one_route, CLUSTER_DEAD_AFTER_S + SETTLED_S), "clients that have left a dead host have two routes"


def set_clock(cluster: Cluster, victim: str) -> None:
    """The clock of one server, as Python has it, jumps by an hour; clients come to it and leave it."""
    jump = cluster.folder / "clock"
    lines = ("now = time.time", f"time.time = lambda: now() + 3600 * os.path.exists({str(jump)!r})")
    cluster.servers[victim].end(signal.SIGTERM)
    with tun6_with(cluster.folder, *lines):
        cluster.start_server(victim)
    with cluster.extra_client([victim]) as client:
        held = client.prefix()
        jump.touch()
        gevent.sleep(5)
        for host in CLUSTER_SERVERS:
            if host != victim:
                restart_killed(cluster, host)
        alone = becomes_true(lambda: not cluster.misroutes([held]), 10)
        assert alone, f"one server's clock is an hour ahead: {cluster.misroutes([held])}"
    cluster.servers[victim].end(signal.SIGTERM)
    jump.unlink()
    cluster.start_server(victim)


def check_routes(upstream: str) -> None:
    """contrib/bird.conf with routes made by hand: the newest epoch wins, and no server is a black hole whatever link is cut."""
    prefix, other = itertools.islice(CLUSTER_RANGE.subnets(new_prefix=64), 2)
    told = upstream != "range"  # whether the router hears of each prefix
    lab = ClusterLab(0)
    with tempfile.TemporaryDirectory() as name, lab, ExitStack() as undo:

        def route(host: str, epoch: int) -> str:
            return f"-6 route add {prefix} dev session proto {tun6.ROUTE_PROTOCOL} metric {tun6.METRIC_MAX - epoch}"

        def leads(to: str, *hosts: str) -> bool:
            return all(lab.path(host, prefix[1])[-2:] == [to, "session"] for host in hosts)

        def expect(what: str, condition: Callable[[], bool], seconds: float = 15) -> None:
            began = time.monotonic()
            wait_until(what, condition, seconds)
            print(f"    {time.monotonic() - began:4.1f} s  {upstream}: {what}", flush=True)

        birds = [Bird(lab, host, Path(name), upstream) for host in ("router", *CLUSTER_SERVERS)]
        for bird in birds:
            undo.callback(bird.kill)
            bird.start()
        wait_until("the routers talk with each other", lambda: all(bird.is_whole() for bird in birds), 30)
        for host in CLUSTER_SERVERS:
            lab.ip(host, "tuntap add session mode tun")
            lab.ip(host, "link set session up")
        every = ("router", *CLUSTER_SERVERS)
        lab.ip("s1", route("s1", 5))
        expect("the route of epoch 5 on s1 is known everywhere", lambda: leads("s1", *every))
        lab.ip("s2", route("s2", 6))
        if told:
            expect("that of epoch 6 on s2 wins at the router and at s3, while s1 still has its own", lambda: leads("s2", "router", "s3"))
        lab.ip("s1", route("s1", 5).replace("add", "del"))
        expect("s1, which has none any more, finds that of s2", lambda: leads("s2", *every))
        birds[1].send_signal(signal.SIGSTOP)
        lab.ip("s1", route("s1", 7))
        expect("a new route of s1 is before that of BIRD there, which has not heard of it yet", lambda: leads("s1", "s1"), 0)
        lab.ip("s1", route("s1", 7).replace("add", "del"))
        birds[1].send_signal(signal.SIGCONT)
        lab.ip("s1", f"-6 route add unreachable {CLUSTER_RANGE} proto {tun6.ROUTE_PROTOCOL} metric {tun6.OWNER_BASE}")
        lab.ip("s1", f"-6 route add {other} dev session proto {tun6.ROUTE_PROTOCOL} metric 1")
        expect("BIRD has heard of a later route of s1", lambda: str(other) in birds[1].ask("show", "route", "protocol", "kernel1"))
        assert str(CLUSTER_RANGE) not in birds[1].ask("show", "route", "protocol", "kernel1"), "BIRD learns tun6's unreachable route"
        lab.cut("s2", "wan")
        expect(
            "the link from s2 to the router is cut: all lead there through another server",
            lambda: leads("s2", *every) and "s2" not in lab.path("router", prefix[1])[1:2],
        )
        watch = birds[2].watched()["2001:db8:fffe::1"]  # an interval of 1 s, and a link that comes and goes again is a black hole for 9 s
        assert watch[0] in ("Down", "Init") and watch[1] <= 0.1, watch
        expect("and so does the way from s2 to the Internet", lambda: lab.path("s2", IPv6Address(Lab.INTERNET))[-2:] == ["router", "world"])
        lab.heal("s2", "wan")
        wait_until("all is as before", lambda: all(bird.is_whole() for bird in birds), 30)
        lab.cut("s2", "peers")
        expect("the link from s2 to the other servers is cut", lambda: leads("s2", *every))
        lab.heal("s2", "peers")
        wait_until("all is as before", lambda: all(bird.is_whole() for bird in birds), 30)
        birds[2].kill()
        lab.ip("s2", route("s2", 6).replace("add", "del"))
        lab.ip("s3", route("s3", 7))
        expect("BIRD on s2 is killed, and the prefix is at s3", lambda: leads("s3", "router", "s1", "s3"))
        lab.cut("s1", "wan", "peers")
        expect("s1 is cut off, too: the router finds s3, which is alone", lambda: leads("s3", "router"))
        expect(
            "and packets for no session's prefix end there",
            lambda: lab.path("router", CLUSTER_RANGE[1 << 70]) == ["router", "s3", UNREACHABLE],
        )


def administer_anywhere(cluster: Cluster, victim: str) -> None:
    """What the operator does on one server holds on all; and on the store itself, while the server does not run."""
    other, third = (cluster.servers[host].config for host in ("s2", "s3"))
    id_ = cluster.client_id(cluster.EXTRA)

    with cluster.extra_client(["s1"]) as client:
        held = client.prefix()
        found = next(each for each in asked(other, "clients", "list") if each["id"] == id_)
        assert (found["server"], found["connected"], found["prefix"]) == ("s1", True, str(held)), found
        knows_all = becomes_true(lambda: len(asked(third, "status")["servers"]) == 3, tun6.HEARTBEAT_S + 3)  # if all have just started
        status = asked(third, "status")
        servers = [(each["name"], each["here"]) for each in status["servers"]]
        assert knows_all and servers == [("s1", False), ("s2", False), ("s3", True)], status
        assert status["store"]["down"] is None
        here = {host: asked(cluster.servers[host].config, "status", "--here")["clients"] for host in CLUSTER_SERVERS}
        assert [host for host, clients in here.items() if any(each["id"] == id_ for each in clients)] == ["s1"]
        assert any(each["id"] == id_ and each["server"] == "s1" for each in status["clients"])

        def limits(host: str) -> list[list[int | None]]:
            """Its own one and the one that holds, as a server shows them."""
            found = [each for each in asked(cluster.servers[host].config, "status")["clients"] if each["id"] == id_]
            return [[each["limit"], each["session"]["limit"] if "session" in each else None] for each in found]

        for rate, own in (("300k", 300_000), ("none", 0), ("2.5M", 2_500_000), ("default", None)):
            assert asked(other, "clients", "limit", id_, rate)["limit"] == own
            heard = becomes_true(functools.partial(lambda own: limits("s1") == [[own, own or None]], own), 2)
            assert heard, f"a limit of {rate}, set on s2, does not hold on s1: {limits('s1')}"
            assert becomes_true(functools.partial(lambda own: limits("s3") == [[own, None]], own), 2), limits("s3")
        before = cluster.servers["s1"].log().count("gone, it was revoked")
        asked(third, "clients", "revoke", id_)
        began = time.monotonic()
        cluster.servers["s1"].wait_for("gone, it was revoked", before + 1, 5)
        cluster.note("a session ended after its Id was revoked on another server", time.monotonic() - began)
        client.wait_for("no connection to .*: revoked")
        asked(other, "clients", "restore", id_)
    with cluster.extra_client(["s2"]) as client:
        assert client.prefix() == held

    def on_victim(*words: str) -> Any:
        done = cluster.lab.run(victim, sys.executable, TUN6, *words, "-c", str(cluster.servers[victim].config), "--json")
        assert done.returncode == 0 or words[0] == "doctor", done.stderr
        return json.loads(done.stdout)

    (store,) = (each for each in on_victim("doctor", "server")["server"] if each["check"] == "store")
    assert re.match("ok .* commits wait for a synchronous standby", f"{store['result']} {store['text']}"), store
    cluster.servers[victim].end(signal.SIGTERM)
    new = cluster.new_id()
    added = on_victim("clients", "add", new)
    assert {each["id"]: each["prefix"] for each in on_victim("clients", "list")}[new] == added["prefix"]
    cluster.start_server(victim)
    for host in CLUSTER_SERVERS:
        known = {each["id"]: each["prefix"] for each in asked(cluster.servers[host].config, "clients", "list")}
        assert known[new] == added["prefix"], host


def check_growth() -> None:
    """From one server to three: clients keep prefix, key and limit, and go on when the first server dies."""
    with tempfile.TemporaryDirectory(prefix="tun6-cluster-") as name, GrowingCluster(Path(name), 2) as cluster:
        cluster.grow()
        cluster.settle()
        assert {cluster.server_of(client) for client in cluster.clients} == {"s1"}
        restart_killed(cluster, "s1")
        cluster.settle()
        assert not cluster.violations
        print("    from one server to three: the clients have their prefixes and keys, and have left the first when it died", flush=True)


def check_keepalived() -> None:
    """contrib/keepalived.conf on two servers: one is active, whatever happens to it, and the clients are there."""
    with tempfile.TemporaryDirectory(prefix="tun6-cluster-") as name, SmallCluster(Path(name), 2) as cluster:
        for what in ("all links of the active one cut", "keepalived ended on the active one", "tun6 killed on the active one"):
            (active,) = {cluster.server_of(client) for client in cluster.clients}
            for client in cluster.clients:
                client.mark()
            if what.startswith("all"):
                cut_server(cluster, active, "wan", "peers", "store", "access")
            elif what.startswith("keepalived"):
                cluster.keepers[active].kill(signal.SIGTERM)
                gevent.sleep(5)
                cluster.keepers[active].start()
            else:
                cluster.servers[active].process.kill()
                gevent.sleep(3)
            cluster.settle()
            now = {cluster.server_of(client) for client in cluster.clients}
            assert len(now) == 1, f"{what}, which was {active}: {now} are active"
            assert what.startswith("all") or (now == {active}) == what.startswith("tun6"), f"{what}, which was {active}: {now} is active"
            cluster.say(f"keepalived: {what}: stalls {' '.join(f'{client.stall:.2f}' for client in cluster.clients)} s")
        assert not cluster.violations


def start_without_store(cluster: Cluster, victim: str) -> None:
    """A server that starts while PostgreSQL is down says that once, serves whom it knows, and refuses what would be new."""
    server = cluster.servers[victim]
    with cluster.extra_client([victim]) as client:
        held = client.prefix()
    with store_stopped(cluster):
        server.end(signal.SIGTERM)
        before = len(server.log())
        cluster.start_server(victim)
        with cluster.extra_client([victim]) as client:
            assert client.prefix() == held
        store = asked(server.config, "status")["store"]
        assert store["down"] and store["unsettled"] <= 1 + len(cluster.clients), store
        done = run_tun6("clients", "add", "-c", str(server.config), cluster.new_id())
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "the store is down" in done.stderr, done
        with hands(cluster, {cluster.new_id(): [victim]}) as crowd:
            assert becomes_true(lambda: crowd[0].answer, 10) and "server-error" in str(crowd[0].answer), crowd[0].answer
    server.wait_for(f"(?s)^.{{{before}}}.*/tun6 is back", seconds=15)
    said = server.log()[before:]
    assert [said.count(text) for text in ("known Ids are served as they are known here", "/tun6 is back")] == [1, 1], said


class ClusterFault(NamedTuple):
    name: str
    inject: Callable[..., None]
    arguments: tuple[object, ...] = ()
    whom: str = "the server's"  # clients whose traffic it may stall; or "all", "none" where it is not to be judged
    quick: bool = False  # is among those of --quick


CLUSTER_FAULTS = (
    ClusterFault("server killed (kill -9)", restart_killed, quick=True),
    ClusterFault("server ended (SIGTERM)", end_and_start),
    ClusterFault("server drained", drain_server, quick=True),
    ClusterFault("server stopped (SIGSTOP) for 3 s", pause_server, (3,)),
    ClusterFault("server stopped (SIGSTOP) for 15 s", pause_server, (15,), quick=True),
    ClusterFault("host dead: all its links cut", cut_server, ("wan", "peers", "store", "access"), quick=True),
    ClusterFault("link to the clients cut", cut_server, ("access",)),
    ClusterFault("link to the router cut", cut_server, ("wan",), quick=True),
    ClusterFault("link to the router cut, back and cut again", flap_link, ("wan",)),
    ClusterFault("link to the other servers cut", cut_server, ("peers",)),
    ClusterFault("link to the store cut", cut_server, ("store",)),
    ClusterFault("BIRD killed, back after 0.2 s", restart_bird, (0.2,)),
    ClusterFault("BIRD killed, back after 10 s", restart_bird, (10,)),
    ClusterFault("PostgreSQL stopped", disturb_store, (store_stopped,)),
    ClusterFault("PostgreSQL killed", disturb_store, (store_killed,)),
    ClusterFault("PostgreSQL killed, then a server", move_meanwhile, (store_killed,), quick=True),
    ClusterFault("PostgreSQL hangs, then a server is killed", move_meanwhile, (store_hung,)),
    ClusterFault("PostgreSQL takes 2 s a statement, then a server is killed", move_meanwhile, (store_slow,)),
    ClusterFault("its standby stopped, then a server killed", move_meanwhile, (standby_stopped,)),
    ClusterFault("PostgreSQL failed over", disturb_store, (store_failed_over,)),
    ClusterFault("PostgreSQL failed over, then a server killed", move_meanwhile, (store_failed_over,), quick=True),
    ClusterFault("PostgreSQL failed over, commits lost, then a server killed", lose_commits),
    ClusterFault("an Id revoked while its server can't reach the store", revoke_in_an_outage),
    ClusterFault("a client on both sides of a cut in turn", move_on_both_sides),
    ClusterFault("an Id on two machines", use_an_id_twice, whom="none"),
    ClusterFault("a freed /64 pinned to another Id", pin_a_freed_prefix, whom="none"),
    ClusterFault("500 new Ids at once on each of two servers", connect_new_ids, whom="all"),
    ClusterFault("1,000 clients moved at once", move_a_thousand, whom="all"),
    ClusterFault("clock of a server set one hour ahead", set_clock, whom="all"),
    ClusterFault("administered on any server", administer_anywhere, whom="none", quick=True),
    ClusterFault("server started while PostgreSQL is stopped", start_without_store),
)


def run_fault(cluster: Cluster, fault: ClusterFault) -> list[float]:
    """Makes one and waits until all is as it must be. Gives the longest stall of each stream that it may have stalled, s."""
    client = random.choice(cluster.clients)
    assert becomes_true(lambda: cluster.server_of(client), 30), f"{client.host} has no server"
    victim = cluster.server_of(client)
    affected = [each for each in cluster.clients if fault.whom == "all" or (fault.whom != "none" and cluster.server_of(each) == victim)]
    cluster.say(f"{fault.name}: {victim} with {len(affected)} of {len(cluster.clients)} clients")
    for each in cluster.clients:
        each.mark()
    try:
        fault.inject(cluster, victim, *fault.arguments)
    except (AssertionError, tun6.KernelError) as error:
        cluster.violated(f"{fault.name}: {error}")
        cluster.repair()
    took = cluster.settle()
    stalls = [each.stall for each in affected]
    cluster.say(f"    stalls {' '.join(f'{stall:.2f}' for stall in stalls)} s; all as it must be {took:.1f} s after the end")
    return stalls


def run_faults(cluster: Cluster, faults: Iterable[ClusterFault]) -> int:
    """Makes them, one after the other, and reports. Gives the exit status."""
    stalls = defaultdict[str, list[float]](list)
    try:
        for fault in faults:
            stalls[fault.name] += run_fault(cluster, fault)
    finally:
        if cluster.violations:
            kept = tempfile.mkdtemp(prefix="tun6-cluster-failed-")
            unwanted = shutil.ignore_patterns("*-data", "*-sockets", "*.sock", "*.ctl")
            shutil.copytree(cluster.folder, kept, dirs_exist_ok=True, ignore=unwanted)
            cluster.say(f"the logs are in {kept}")
    print("\n| fault | streams | median stall | longest |\n| --- | --- | --- | --- |")
    for fault in CLUSTER_FAULTS:
        if found := stalls[fault.name]:
            print(f"| {fault.name} | {len(found)} | {statistics.median(found):.2f} s | {max(found):.2f} s |")
    for what, seconds in cluster.notes.items():
        print(f"{what}: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s, of {len(seconds)}")
    print(f"measured to within {cluster.traffic.late + TICK_S:.2f} s; {len(cluster.violations)} violations", flush=True)
    return int(bool(cluster.violations))


def cluster_command(arguments: list[str]) -> int:
    """`python test_tun6.py cluster`: three servers, BIRD, PostgreSQL, and faults; prints a table of their stalls for docs/cluster.md."""
    parser = argparse.ArgumentParser(prog="test_tun6.py cluster", description=cluster_command.__doc__)
    parser.add_argument("--quick", action="store_true", help="only the most important faults, each once")
    what = "only faults with these words in their names; or `routes`, `growth`, `keepalived`"
    parser.add_argument("--fault", action="append", metavar="WORDS", help=what)
    parser.add_argument("--times", type=int, default=3, help="each fault so often")
    parser.add_argument("--clients", type=int, default=CLUSTER_SIZE)
    parser.add_argument("--upstream", choices=CLUSTER_UPSTREAMS, default="ibgp", help="what the upstream router is")
    options = parser.parse_args(arguments)
    install_cluster_packages()
    tun6.raise_descriptor_limit()
    every = [fault for fault in CLUSTER_FAULTS if fault.quick or not options.quick]
    wanted = [fault for fault in every if any(words in fault.name for words in options.fault or [""])]
    if not options.fault or "routes" in options.fault:
        for upstream in CLUSTER_UPSTREAMS:
            check_routes(upstream)
    if not options.fault or "growth" in options.fault:
        check_growth()
    if not options.fault or "keepalived" in options.fault:
        check_keepalived()
    if not wanted:
        return 0
    with tempfile.TemporaryDirectory(prefix="tun6-cluster-") as name, Cluster(Path(name), options.clients, options.upstream) as cluster:
        return run_faults(cluster, (fault for fault in wanted for _ in range(1 if options.quick else options.times)))


def soak_cluster(minutes: float, size: int, seed: int) -> int:
    """Faults in random order for some minutes, while new and known Ids come and go at all servers. Gives the exit status."""
    install_cluster_packages()
    random.seed(seed)

    def visit() -> None:
        known: list[str] = []
        while True:
            id_ = random.choice(known) if known and random.random() < 0.5 else cluster.new_id()
            visitor = Hand(cluster, id_, random.sample(CLUSTER_SERVERS, 3))
            gevent.sleep(random.uniform(0, 4))
            visitor.close()
            if visitor.answers:
                known.append(id_)
                visits.append(id_)

    def faults() -> Iterator[ClusterFault]:
        deadline = time.monotonic() + 60 * minutes
        while True:
            for fault in random.sample(CLUSTER_FAULTS, len(CLUSTER_FAULTS)):
                if time.monotonic() > deadline:
                    return
                yield fault

    visits: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tun6-cluster-") as name, Cluster(Path(name), size) as cluster:
        visitors = [gevent.spawn(visit) for _ in range(5)]
        try:
            status = run_faults(cluster, faults())
        finally:
            gevent.killall(visitors)
        print(f"{len(visits)} visits of {len(set(visits))} other Ids")
    return status


# ---- cluster on machines ---------------------------------------------------------------------------------------------

TOWN_SERVERS = ("one", "two", "three")
TOWN_PACKAGES = "postgresql bird2 keepalived"  # are only fetched: docs/cluster.md installs them
README_HOME = "## A VPS and a Raspberry Pi: IPv6 for a home"
LATE_S = 3.0  # until a link carries packets, as a real one takes it


def code_blocks(document: Path, heading: str) -> list[str]:
    """The blocks of code below a heading of a Markdown file, without their indentation."""
    text = document.read_text(encoding="utf-8")
    level = heading.partition(" ")[0]
    (section,) = re.findall(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in re.findall(r"^ *```\w+\n(.*?)^ *```$", section, re.DOTALL | re.MULTILINE)]


def town_root(cache: Path) -> str:
    """The folders of a root, topmost first, that has README's packages, and those of docs/cluster.md to be installed without a network."""
    root, folder = debian_root("bookworm", cache), cache / "bookworm-town"
    if not (folder / "ready").exists():
        print(f"making {folder}, which takes a minute", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        wheels = folder / "upper/srv/wheels"
        layer = Layer(folder, root, root / "root/wheels")
        shutil.copytree(root / "root/wheels", wheels)
        fetch = ["download", "-q", "--only-binary", ":all:", "--python-version", DEBIANS["bookworm"], "-d", str(wheels), "psycopg[binary]"]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
        (packages,) = re.findall("apt-get install -y (git .*)", code_blocks(CHECKOUT / "README", README_HOME)[0])
        layer.sh(f"apt-get update; apt-get install -y {packages}; apt-get install -y --download-only {TOWN_PACKAGES}")
        shutil.copytree(
            cache / "bookworm-downloads", layer.upper / "var/cache/apt/archives", ignore=shutil.ignore_patterns("lock"), dirs_exist_ok=True
        )
        (layer.upper / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /srv/wheels\n")
        (folder / "ready").touch()
    return f"{folder}/upper:{root}"


class Town(Lab):
    """The picture of docs/cluster.md, with its addresses, of Machines; and a client's machine.

    internet, 2001:db8:ffff::2 --- core --- router --- wan --- one, two, three, in this order
        |                                                       |    |    |
        +--- home --- client, behind a NAT                    inner -+----+---- db1, db2
    """

    HOSTS = ("internet", "switch")
    WIRES: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {  # of each Machine: the bridge, and what systemd-networkd is to know
        **{
            host: {
                "wan": (f"Address=203.0.113.{number}/24 2001:db8:fffe::1{number}/64", "Gateway=203.0.113.254 2001:db8:fffe::1"),
                "inner": (f"Address=10.5.0.{number}/24 fd00:116::{number}/64",),
            }
            for number, host in enumerate(TOWN_SERVERS, 1)
        },
        "db1": {"inner": ("Address=10.5.0.11/24",)},
        "db2": {"inner": ("Address=10.5.0.12/24",)},
        "router": {
            "wan": ("Address=203.0.113.254/24 2001:db8:fffe::1/64", "IPForward=yes"),
            "core": ("Address=198.51.100.1/24 2001:db8:ffff::1/64", "Gateway=198.51.100.2 2001:db8:ffff::2", "IPForward=yes"),
        },
        "client": {"home": ("Address=192.168.1.2/24", "Gateway=192.168.1.1")},
    }

    def __init__(self) -> None:
        super().__init__()
        self.late_s = 0.0  # at a boot, until links carry packets

    def machine(self, name: str, root: str) -> Machine:
        """The Machine of this name, not yet booted."""
        host = "internet" if name == "client" else "switch"

        def plug() -> None:
            time.sleep(self.late_s)
            for bridge in self.WIRES[name]:
                self.ip(host, f"link set {name}-{bridge} master {bridge} up")

        wires = {f"{name}-{bridge}": network_section("IPv6AcceptRA=no", *lines) for bridge, lines in self.WIRES[name].items()}
        return Machine(Path(root), name, self._names[host], wires, plug)

    def _build(self) -> None:
        for host in self.HOSTS:
            self.set_sysctl(host, "net.ipv6.conf.default.dad_transmits", "0")
            self.ip(host, "link set lo up")
        for host, bridge in (("switch", "wan"), ("switch", "inner"), ("switch", "core"), ("internet", "home")):
            self.ip(host, f"link add {bridge} type bridge")
            self.ip(host, f"link set {bridge} up")
        self.ip("internet", f"link add eth0 type veth peer name internet netns {self._names['switch']}")
        self.ip("internet", "link set eth0 up")
        self.ip("switch", "link set internet master core up")
        for device, address in (("eth0", "198.51.100.2/24"), ("eth0", f"{self.INTERNET}/64"), ("home", "192.168.1.1/24")):
            self.ip("internet", f"addr add {address} dev {device}")
        self.ip("internet", "route add 203.0.113.0/24 via 198.51.100.1")
        self.ip("internet", "-6 route add 2001:db8::/32 via 2001:db8:ffff::1")
        self.set_sysctl("internet", "net.ipv4.ip_forward", "1")
        nat = "table ip nat { chain out { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }"
        self._check(["ip", "netns", "exec", self._names["internet"], "nft", nat])

    @contextmanager
    def pinged(self, address: IPv6Address, limit_s: float, what: str) -> Iterator[None]:
        """Meanwhile the Internet pings it; fails when there was no answer for so long."""
        with tempfile.TemporaryFile("w+") as output:
            with self.popen("internet", "ping", "-6", "-D", "-i", "0.1", str(address), stdout=output) as ping:
                time.sleep(1)
                try:
                    yield
                    time.sleep(1)
                finally:
                    ping.send_signal(signal.SIGINT)
            output.seek(0)
            times = list(map(float, re.findall(r"(?m)^\[([\d.]+)\] \d+ bytes from", output.read())))
        assert len(times) > 5, f"{what}: {len(times)} pings were answered"
        gap = max(after - before for before, after in zip(times, times[1:]))
        print(f"    {what}: the client's longest time without an answer to a ping is {gap:.1f} s", flush=True)
        assert gap < limit_s and time.time() - times[-1] < 3, what


class Newcomer:
    """Does on the Machines of a Town what README and docs/cluster.md say, to the letter but for what they tell to set."""

    def __init__(self, town: Town, machines: Mapping[str, Machine]) -> None:
        self.town, self.machines = town, machines
        self.secrets = {name: f"{random.getrandbits(128):x}" for name in ("tun6", "standby")}
        self.prefix = IPv6Network("::/64")

    def follow(self, name: str, block: str, changes: Mapping[str, str] | None = None, text: str = "") -> str:
        """Runs a block of code in a root shell on a machine, with changes that each have to be possible, and gives what it says."""
        for old, new in (changes or {}).items():
            assert old in block, f"{old} is not in\n{block}"
            block = block.replace(old, new)
        return self.machines[name].sh(f"export DEBIAN_FRONTEND=noninteractive; cd\n[ ! -d /opt/tun6 ] || cd /opt/tun6\n{block}", text)

    def all_of(self, names: Iterable[str], step: Callable[[str], object]) -> None:
        """Does a step on several machines at once."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(step, names))

    def serving(self) -> str:
        """The server that has the client, or ""."""
        found = re.findall(r"^has (\S+) on tun6 from 203\.0\.113\.(\d) ", self.machines["client"].show("client", "StatusText"))
        assert not found or IPv6Network(found[0][0]) == self.prefix
        return TOWN_SERVERS[int(found[0][1]) - 1] if found else ""

    def must_work(self, *servers: str) -> None:
        """All servers know each other, the store is up, the client has its prefix and the Internet reaches it."""
        self.all_of(servers, lambda host: wait_until(f"{host} knows all servers", functools.partial(self.knows, host, servers), 60))
        self.all_of(servers, lambda host: wait_until(f"{host} is well", functools.partial(self._is_well, host), 60))
        wait_until("the client is served", self.serving, 30)
        wait_until("the Internet reaches the client", lambda: self.town.pings("internet", str(self.prefix[1])), 30)

    def knows(self, host: str, servers: Iterable[str]) -> bool:
        """Whether a server has its store, and has heard of these less than a minute ago."""
        said = self.machines[host].run("tun6", "status", status=None)  # which it also is while tun6 does not run
        ages = dict(re.findall(r"(?m)^ +(\w+): 203\.0\.113\.\d, .*?(this one|heard \S+ ago)$", said))
        return ", up for" in " ".join(said.split()) and all(re.match(r"this one|heard \d+s", ages.get(each, "")) for each in servers)

    def _is_well(self, host: str) -> bool:
        found = json.loads(self.machines[host].run("tun6", "doctor", "--json", status=None))["server"]
        (store,) = (each for each in found if each["check"] == "store")
        return store["result"] == "ok" and "commits wait for a synchronous standby" in store["text"] and "FAIL" not in str(found)

    def talk(self, *names: str) -> bool:
        """Whether BIRD there has all its neighbours."""
        said = {name: re.findall(r"(?m)^\w+ +BGP .* (\w+) *$", self.machines[name].run("birdc", "show", "protocols")) for name in names}
        return all(states == ["Established"] * 3 for states in said.values())

    def has_reconfigured(self, name: str) -> bool:
        """Whether systemd-networkd has done to eth0 there what `networkctl reload` told it."""
        said = self.machines[name].sh("journalctl -b -u systemd-networkd; networkctl --no-legend list eth0")
        return "eth0: Reconfiguring" in said and " configured" in said.splitlines()[-1]

    def reboot(self, name: str) -> None:
        self.machines[name].run("systemctl", "reboot", status=None)
        self.machines[name].wait_for_boot()


SAMPLES = "--set documentation_addresses=yes"  # is what the test needs beside what the documents say


def follow_readme(person: Newcomer) -> None:
    """Server one, which is then as README leaves it, and its client."""
    both, server, client = code_blocks(CHECKOUT / "README", README_HOME)[:3]
    clone = {"git clone <this repository> /opt/tun6": "cp -r /srv/tun6 /opt/tun6", "apt-get update && ": ""}
    person.all_of((*TOWN_SERVERS, "client"), lambda name: person.follow(name, both, clone))
    said = person.follow("one", server, {"203.0.113.5": "203.0.113.1", "--prefix 2001:db8:1::/48": f"--prefix 2001:db8:1::/48 {SAMPLES}"})
    person.machines["router"].sh("ip -6 route add 2001:db8:1::/48 via 2001:db8:fffe::11")  # which is the provider's part
    said = person.follow("client", client, {"--set lan=eth0": SAMPLES}, said.splitlines()[-1].strip("# ") + "\n")
    person.prefix = IPv6Network(re.findall(r"has (\S+) on tun6 from 203\.0\.113\.1 port 10000, over TLS", said)[0])
    wait_until("the Internet reaches the client", lambda: person.town.pings("internet", str(person.prefix[1])), 30)


def follow_databases(person: Newcomer) -> None:
    first, standby, last = code_blocks(CHECKOUT / "docs/cluster.md", "### 1. PostgreSQL with a synchronous standby")
    person.all_of(("db1", "db2"), lambda name: person.follow(name, first.splitlines()[0]))  # at the same time, what both begin with
    parts = re.split("(?m)^(.*--pwprompt.*\n)", first)  # the first one of two that ask would read all that there is
    for part, password in zip(parts, ("", person.secrets["tun6"], "", person.secrets["standby"], "")):
        person.follow("db1", part, text=f"{password}\n" * 2)
    person.follow("db2", standby, {"SECRET": person.secrets["standby"]})
    person.follow("db1", last)
    wait_until("db2 is synchronous", lambda: re.search(r" db2 +\| sync", person.follow("db1", last.splitlines()[-1])), 10)


def follow_servers(person: Newcomer) -> None:
    secret = person.secrets["tun6"]
    stop, lines, move = code_blocks(CHECKOUT / "docs/cluster.md", "### 2. Server one moves into the store")
    person.follow("one", stop)
    person.machines["one"].run("sed", "-i", "/^\\[server\\]/r /dev/stdin", "/etc/tun6/config.ini", text=lines.replace("SECRET", secret))
    person.follow("one", move)
    (block,) = code_blocks(CHECKOUT / "docs/cluster.md", "### 3. Servers two and three")
    certificate = person.machines["one"].run("cat", "/var/lib/tun6/server.pem")
    copy = {"scp one:/var/lib/tun6/server.pem": "cp /root/server.pem", "--prefix 2001:db8:1::/48": f"--prefix 2001:db8:1::/48 {SAMPLES}"}

    def install(name: str) -> None:
        person.machines[name].run("sh", "-ec", "umask 077; cat > /root/server.pem", text=f"{certificate}\n")
        person.follow(name, block, {**copy, "SECRET": secret, "name=two": f"name={name}"})

    person.all_of(("two", "three"), install)
    person.must_work(*TOWN_SERVERS)


def follow_bird(person: Newcomer) -> None:
    put, networkd, ask = code_blocks(CHECKOUT / "docs/cluster.md", "### 4. BIRD")
    names = dict(zip(("router", *TOWN_SERVERS), ("router", *CLUSTER_SERVERS)))  # and those in the other test of this configuration

    def configure(name: str) -> None:
        person.machines[name].sh("ln -sfn /srv/tun6 /opt/tun6") if name == "router" else None
        person.follow(name, put, {"contrib/bird.conf": "contrib/bird-router.conf"} if name == "router" else {})
        sample = person.machines[name].run("cat", "/etc/bird/bird.conf")
        assert sample in (CHECKOUT / f"contrib/{'bird-router' if name == 'router' else 'bird'}.conf").read_text()
        person.machines[name].run("sh", "-ec", "cat > /etc/bird/bird.conf", text=Bird.configuration(names[name], "ibgp"))
        person.follow(name, networkd)
        person.follow(name, ask)

    person.all_of(names, configure)
    wait_until("BIRD is Established everywhere", lambda: person.talk(*names), 30)
    for name in names:
        person.machines[name].sh("sed -i '/^Gateway=2001:/d' /etc/systemd/network/eth*.network; networkctl reload")
    for name in TOWN_SERVERS:
        wait_until("networkd has reconfigured eth0", functools.partial(person.has_reconfigured, name), 10)
        assert "default via 2001:db8:fffe::1 dev eth0 proto bird" in person.machines[name].sh("ip -6 route show default"), name
    person.machines["router"].sh("ip -6 route del 2001:db8:1::/48 via 2001:db8:fffe::11")
    assert str(person.prefix) in person.machines["router"].run("birdc", "show", "route")
    person.must_work(*TOWN_SERVERS)
    (client,) = code_blocks(CHECKOUT / "docs/cluster.md", "### 5. The clients")
    person.follow("client", client)
    person.must_work(*TOWN_SERVERS)


def check_town_faults(person: Newcomer) -> None:
    """A server is killed and stopped; then each machine of the cluster is rebooted."""
    address = person.prefix[1]
    victim = person.serving()
    with person.town.pinged(address, 10, "tun6 killed and its service stopped"):
        person.machines[victim].sh("systemctl kill -s KILL --kill-whom=main tun6-server; systemctl stop tun6-server")
        wait_until("another server has the client", lambda: person.serving() not in ("", victim), 10)
    person.machines[victim].run("systemctl", "start", "tun6-server")
    person.must_work(*TOWN_SERVERS)
    person.town.late_s = LATE_S
    for what in (person.serving(), "db1", "db2"):
        with person.town.pinged(address, 10, f"{what} rebooted"):
            person.reboot(what)
        wait_until("BIRD is Established everywhere", lambda: person.talk("router", *TOWN_SERVERS), 30)
        person.must_work(*TOWN_SERVERS)


def check_town_failover(person: Newcomer) -> None:
    """PostgreSQL ends on db1; db2 is promoted, and db1 becomes its standby, as docs/cluster.md says."""
    _, standby, last = code_blocks(CHECKOUT / "docs/cluster.md", "### 1. PostgreSQL with a synchronous standby")
    person.machines["db1"].run("systemctl", "stop", "postgresql@15-main")
    (command,) = re.findall(r"`(pg_ctlcluster 15 main promote)`", (CHECKOUT / "docs/cluster.md").read_text())
    person.machines["db2"].run(*command.split())
    for name in TOWN_SERVERS:
        wait_until("the store is up", functools.partial(person.knows, name, ()), 60)
    wait_until("a new client is added", lambda: "tun6:" in person.machines["two"].run("tun6", "clients", "add", "new", status=None), 30)
    swapped = {"10.5.0.12'": "10.5.0.11'", "host=10.5.0.11": "host=10.5.0.12", "application_name=db2": "application_name=db1"}
    person.follow("db1", standby, {**swapped, "SECRET": person.secrets["standby"]})
    person.follow("db2", last, {"'db2'": "'db1'"})
    person.must_work(*TOWN_SERVERS)


def check_small_version(person: Newcomer) -> None:
    """The same with keepalived on servers one and two, without BGP; the machine of the active one dies."""
    put, start = code_blocks(CHECKOUT / "docs/cluster.md", "## The small version: two servers without BGP")
    person.machines["three"].kill()
    person.machines["router"].sh("systemctl disable --now bird; ip -6 route add 2001:db8:1::/48 via 2001:db8:fffe::10")
    person.machines["router"].sh("ip -6 route replace default via 2001:db8:ffff::2")
    for name in ("one", "two"):
        person.machines[name].sh("systemctl disable --now bird; printf 'Gateway=2001:db8:fffe::1\\n' >> /etc/systemd/network/eth0.network")
        person.machines[name].sh("networkctl reload")
        person.follow(name, put)
    for name in ("one", "two"):
        person.follow(name, start)
    (client,) = code_blocks(CHECKOUT / "docs/cluster.md", "### 5. The clients")
    person.follow("client", client, {", 203.0.113.3": ""})

    def active() -> list[str]:
        return [name for name in ("one", "two") if person.machines[name].show("server", "ActiveState") == "active"]

    wait_until("one of them is active", active, 30)
    wait_until("the client is there", lambda: [person.serving()] == active(), 60)
    wait_until("the Internet reaches the client", lambda: person.town.pings("internet", str(person.prefix[1])), 30)
    (waiting,) = {"one", "two"}.difference(active())
    person.machines[waiting].run("tun6", "install", "server")
    person.follow(waiting, start)  # as the document says
    (first,) = active()
    with person.town.pinged(person.prefix[1], 30, "the active one rebooted"):
        person.reboot(first)
        wait_until("the other one has the client", lambda: person.serving() == waiting, 60)
    assert active() == [waiting]
    with person.town.pinged(person.prefix[1], 30, "the active one's machine killed"):
        person.machines[waiting].kill()
        wait_until("the other one has the client", lambda: person.serving() == first, 60)


def machines_command(arguments: list[str]) -> int:
    """`test_tun6.py machines`: docs/cluster.md to the letter, on Debian 12 that really boots; takes root. Gives the exit status."""
    parser = argparse.ArgumentParser(prog="test_tun6.py machines", description=machines_command.__doc__)
    parser.add_argument("--cache", type=Path, default=Path("/var/cache/tun6-systemd"), help="folder for the roots, made once")
    options = parser.parse_args(arguments)
    root = town_root(options.cache)
    steps = (follow_readme, follow_databases, follow_servers, follow_bird, check_town_faults, check_town_failover, check_small_version)
    town = Town()
    with tempfile.TemporaryDirectory(dir=options.cache) as top, town, ExitStack() as undo:
        copy_checkout(Path(top, "srv/tun6"))
        machines = {name: undo.push(town.machine(name, f"{top}:{root}")) for name in town.WIRES}
        for machine in machines.values():
            machine.wait_for_boot()
        person = Newcomer(town, machines)
        for step in steps:
            began = time.monotonic()
            step(person)
            print(f"  ok  {step.__name__}, {time.monotonic() - began:.0f} s", flush=True)
    return 0


# ---- real store ------------------------------------------------------------------------------------------------------

STORE_KEY = "0" * 64  # a digest of a key


class StoreBench:
    """A PostgreSQL, and the stores of several servers that share it, all in this process."""

    def __init__(self, lab: Lab, folder: Path, host: str = "db1") -> None:
        self.folder, self._undo, self._numbers = folder, ExitStack(), itertools.count()
        os.chmod(folder, 0o755)
        (folder / "pg").mkdir()
        shutil.chown(folder / "pg", "postgres", "postgres")
        self.postgres = Postgres(lab, host, folder / "pg")
        self.url = f"postgresql://tun6@/tun6?host={folder / 'pg' / f'{host}-sockets'}"

    def __enter__(self) -> StoreBench:
        self.postgres.make()
        self.postgres.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close_all()
        self.postgres.kill(signal.SIGQUIT)

    def fresh(self, keys: str = "none", network: IPv6Network = POOL) -> None:
        """All stores are closed, and the database is a new one."""
        self.close_all()
        self.postgres.query("DROP DATABASE IF EXISTS tun6 WITH (FORCE)")
        self.postgres.query("CREATE DATABASE tun6")
        for cache in self.folder.glob("*.json"):
            cache.unlink()
        with self.database() as database:
            database.create(network, keys)

    @contextmanager
    def database(self) -> Iterator[tun6.Database]:
        database = tun6.Database(self.url, "test")
        try:
            database.connect()
            yield database
        finally:
            database.close()

    def store(self, name: str, **settings: Any) -> tun6.ClusterStore:
        """That of the server of this name."""
        given = {"network": POOL, "keys": "none", "cache": str(self.folder / f"{name}.json"), "address": "192.0.2.1", **settings}
        store = tun6.ClusterStore(self.url, name=name, **given)
        self._undo.callback(store.close)
        store.start()
        return store

    def close_all(self) -> None:
        self._undo.close()

    @contextmanager
    def session(self, store: tun6.ClusterStore, id_: str, **claim: Any) -> Iterator[tuple[tun6.Lease, list[str]]]:
        """A session of this Id, and why it was to end."""
        reasons: list[str] = []
        with store.begin(tun6.Claim(id_, end=reasons.append, **claim)) as lease:
            yield lease, reasons

    def visit(self, store: tun6.ClusterStore, id_: str, **claim: Any) -> tun6.Lease:
        """A session that ends at once."""
        with self.session(store, id_, **claim) as (lease, _):
            return lease

    def sql(self, text: str) -> str:
        return self.postgres.query(text, "tun6")

    @contextmanager
    def locked(self, id_: str) -> Iterator[None]:
        """Somebody has locked the row of this Id, in a transaction that does not end."""
        with self.database() as other:
            other._worker.execute("set idle_in_transaction_session_timeout = 0")
            other._worker.execute("begin")
            other._worker.execute("select 1 from client where id = %s for update", (id_,))
            yield
            other._worker.execute("rollback")

    def row(self, id_: str) -> list[str]:
        """Its epoch, server and whether it lives, as the database has them."""
        return self.sql(f"SELECT epoch, server, live FROM client WHERE id = '{id_}'").split("|")


def wait_for_store(what: str, condition: Callable[[], object], seconds: float = 10) -> None:
    """As wait_until does, while the greenlets of the stores go on."""
    assert becomes_true(condition, seconds), what


def is_down(store: tun6.ClusterStore) -> bool:
    return bool(store.figures()["store"]["down"])


def is_settled(store: tun6.ClusterStore) -> bool:
    return not is_down(store) and not store.figures()["store"]["owed"]


def check_the_newest_session_wins_wherever_it_is(bench: StoreBench) -> None:
    a, b = bench.store("a"), bench.store("b")
    with bench.session(a, "x") as (first, first_ends), bench.session(b, "x") as (second, second_ends):
        assert (first.prefix, first.epoch, second.prefix, second.epoch) == (subnet(0), 1, subnet(0), 2)
        wait_for_store("the older one is told to end", lambda: first_ends, 1)
        assert "b" in first_ends[0] and not second_ends
        with pytest.raises(tun6.Refusal):
            first.require_newest()
        second.require_newest()
        assert a.holder("x") == "b" and b.holder("x") is None
        assert len(a.takeovers("x")) == len(b.takeovers("x")) == 1
    wait_for_store("its end is known everywhere", lambda: not a.whereabouts("x")["connected"], 1)
    assert bench.row("x") == ["2", "b", "f"]


def check_new_ids_at_once_on_two_servers_get_each_its_own(bench: StoreBench) -> None:
    bench.fresh(network=CLUSTER_RANGE)
    servers = [bench.store(name, network=CLUSTER_RANGE) for name in "ab"]
    ids = [f"new {number}" for number in range(500)]
    visits = [
        gevent.spawn(bench.visit, server, f"{id_} {number}")
        for number, server in enumerate(servers)
        for id_ in random.sample(ids, len(ids))
    ]
    gevent.joinall(visits)
    assert [visit.exception for visit in visits if visit.exception] == []
    assert len({visit.value.prefix for visit in visits}) == 1000


def check_batches_in_any_order_do_not_deadlock(bench: StoreBench) -> None:
    with bench.database() as one, bench.database() as other:
        ids = [f"id {number}" for number in range(100)]
        one.change(tun6.Batch([tun6.Assignment(id_) for id_ in ids], {}))
        known = {id_: tun6.Row(id_, subnet(0)) for id_ in ids}

        def work(database: tun6.Database, name: str) -> None:
            for _ in range(20):
                changes = [tun6.SessionBegin(id_, name, 0, None, tun6.Claim(id_)) for id_ in random.sample(ids, len(ids))]
                database.change(tun6.Batch(changes, known))

        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(work, one, "one"), threads.submit(work, other, "other")]:
                done.result()
    assert bench.sql("SELECT deadlocks FROM pg_stat_database WHERE datname = 'tun6'") == "0"
    assert bench.sql("SELECT min(epoch), max(epoch) FROM client") == "40|40"


def check_a_refused_id_fails_alone(bench: StoreBench) -> None:
    with bench.database() as database:
        database.change(tun6.Batch([tun6.Assignment("a"), tun6.Assignment("b")], {}))
        database.change(tun6.Batch([tun6.KeyChange("b", STORE_KEY, True)], {}))
        changes = [
            tun6.SessionBegin(id_, "s", 0, None, tun6.Claim(id_, is_alive=functools.partial(operator.ne, id_, "c"))) for id_ in "abcd"
        ]
        batch = tun6.Batch([*changes, tun6.KeyChange("nobody", STORE_KEY, False)], {})
        database.change(batch)
    assert [type(result) for result in batch.results] == [tun6.Row, tun6.Refusal, EOFError, tun6.Row, KeyError]
    assert bench.sql("SELECT string_agg(id || epoch, ' ' ORDER BY id) FROM client") == "a1 b0 d1"


def check_a_client_that_left_before_commit_begins_nothing(bench: StoreBench) -> None:
    a, alive = bench.store("a"), [True]
    bench.visit(a, "x")
    with bench.locked("x"):
        asks = gevent.spawn(bench.visit, a, "x", is_alive=lambda: alive[0])
        gevent.sleep(0.3)
        alive[0] = False
    asks.join(3)
    assert isinstance(asks.exception, EOFError)
    assert bench.row("x")[0] == "1"


def check_a_kill_of_who_waits_leaves_no_session(bench: StoreBench) -> None:
    a = bench.store("a")
    bench.visit(a, "x")
    with bench.locked("x"):
        asks = gevent.spawn(bench.visit, a, "x")
        gevent.sleep(0.3)
        asks.kill()
    wait_for_store("nothing is owed", lambda: is_settled(a), 3)
    assert bench.row("x") in (["1", "a", "f"], ["2", "a", "f"])


def check_a_slow_store_is_a_store_that_is_down(bench: StoreBench) -> None:
    a, b = bench.store("a"), bench.store("b")
    bench.visit(a, "x")
    wait_for_store("b knows it, too", lambda: b.find("x"))
    with ExitStack() as undo:
        with bench.locked("x"):
            began = time.monotonic()
            lease, ends = undo.enter_context(bench.session(b, "x", epoch=1, proved=True))
            waited = time.monotonic() - began
            assert lease.epoch == 2 and waited < 2 * tun6.COMMIT_S, waited
        wait_for_store("it is told to the store", lambda: bench.row("x")[1:] == ["b", "t"], 10)
        assert not ends and lease.epoch == int(bench.row("x")[0])


def check_a_commit_that_hangs_and_lands_late_ends_no_newer_session(bench: StoreBench) -> None:
    a, b = bench.store("a"), bench.store("b")
    bench.visit(a, "x")
    with ExitStack() as undo:
        bench.postgres.synchronous_with("nobody")
        older, older_ends = undo.enter_context(bench.session(a, "x", epoch=1, proved=True))
        newer, newer_ends = undo.enter_context(bench.session(b, "x", epoch=older.epoch or 0, proved=True))
        assert cast(int, newer.epoch) > cast(int, older.epoch) > 1
        with pytest.raises(tun6.StorageError):
            bench.visit(b, "new")
        gevent.sleep(6)  # attempts to reach it again
        backends = int(bench.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'tun6 %'"))
        assert backends <= 8, f"{backends} connections are left"
        bench.postgres.synchronous_with("")
        wait_for_store("the newer one is told to the store", lambda: is_settled(a) and is_settled(b), 15)
        assert bench.row("x") == [str(newer.epoch), "b", "t"]
        assert older_ends and not newer_ends


def check_an_outage_ends_no_session_and_afterwards_the_newest_stays(bench: StoreBench) -> None:
    a, b = bench.store("a"), bench.store("b")
    with ExitStack() as undo:
        moved, moved_ends = undo.enter_context(bench.session(a, "moves"))
        _, stays_ends = undo.enter_context(bench.session(a, "stays"))
        wait_for_store("b knows both", lambda: b.find("moves") and b.find("stays"))
        bench.postgres.kill_all()
        here, here_ends = undo.enter_context(bench.session(b, "moves", epoch=moved.epoch, proved=True))
        assert here.epoch == 2
        for refused in (lambda: bench.visit(b, "new"), lambda: a.assign("new"), lambda: a.pin("moves", subnet(9))):
            with pytest.raises(tun6.StorageError, match=r"store|postgresql"):
                refused()
        gevent.sleep(1)
        assert not (moved_ends or stays_ends or here_ends)
        bench.postgres.start()
        began = time.monotonic()
        wait_for_store("all is told to the store", lambda: is_settled(a) and is_settled(b) and bench.row("moves") == ["2", "b", "t"], 15)
        print(f"    settled {time.monotonic() - began:.1f} s after PostgreSQL answered", flush=True)
        wait_for_store("the older session is told to end", lambda: moved_ends, 3)
        assert not stays_ends and not here_ends
        assert bench.row("stays") == ["1", "a", "t"]


def check_what_an_operator_changes_is_heard_everywhere(bench: StoreBench) -> None:
    bench.fresh("required")
    a, b = (bench.store(name, keys="required") for name in "ab")
    assert a.keys and b.keys
    for id_ in ("revoked", "pinned", "keyed"):
        a.assign(id_)
        key = a.keys.issue(id_)
        wait_for_store("b knows the key", functools.partial(b.keys.find, id_))
        b.keys.check(id_, key)
    with ExitStack() as undo:
        ends = {id_: undo.enter_context(bench.session(b, id_))[1] for id_ in ("revoked", "pinned", "keyed")}
        a.keys.set_revoked("revoked", True)
        a.pin("pinned", subnet(40))
        a.keys.issue("keyed")
        wait_for_store("all three are told to end", lambda: all(ends.values()), 1)
    wait_for_store("b knows that it is revoked", lambda: b.keys and b.keys.find("revoked").revoked)  # type: ignore[union-attr]


def check_a_limit_is_heard_within_a_second_by_who_has_the_session_and_lasts(bench: StoreBench) -> None:
    bench.fresh("required")
    a, b = (bench.store(name, keys="required") for name in "ab")
    assert a.keys
    for id_ in ("x", "y"):
        a.assign(id_)
    wait_for_store("b knows both", lambda: b.find("x") and b.find("y"))
    heard: list[tuple[int | None, float]] = []
    with bench.session(a, "x", on_limit=lambda: heard.append((a.limit_of("x"), time.monotonic()))) as (lease, ends):
        for limit in (MBIT, 0, None, tun6.LIMIT_MAX, 50 * MBIT):
            began = time.monotonic()
            b.set_limit("x", limit)
            wait_for_store(f"a hears of {limit}", functools.partial(lambda limit: heard and heard[-1][0] == limit, limit), 1)
            took = next(when for value, when in heard if when > began and value == limit) - began
            print(f"    {limit}: heard after {1000 * took:.0f} ms", flush=True)
            assert b.limit_of("x") == limit and bench.sql("SELECT rate FROM client WHERE id = 'x'") == ("" if limit is None else str(limit))
        assert not ends and lease.epoch == 1
        b.set_limit("y", 0)
        a.pin("x", subnet(40))  # ends the session; the changes of an operator leave each other alone
    a.keys.issue("x")
    a.keys.set_revoked("x", True)
    a.keys.set_revoked("x", False)
    with bench.session(b, "x"):  # a takeover, and its end
        pass
    wait_for_store("all is told to the store", lambda: is_settled(a) and is_settled(b))
    assert bench.sql("SELECT id, rate FROM client ORDER BY id") == f"x|{50 * MBIT}\ny|0"
    bench.sql("UPDATE client SET rate = 7000000, version = version + 1 WHERE id = 'x'")  # without a word
    with bench.session(a, "x"):
        wait_for_store("it is found by looking", lambda: a.limit_of("x") == 7 * MBIT, tun6.POLL_S + 3)
    with pytest.raises(tun6.RequestError, match="does not know 'nobody'"):
        a.set_limit("nobody", MBIT)
    bench.postgres.kill(signal.SIGQUIT)
    with pytest.raises(tun6.StorageError, match=r"store|postgresql"):
        a.set_limit("x", None)
    bench.close_all()
    a = bench.store("a", keys="required")
    assert is_down(a) and [a.limit_of(id_) for id_ in ("x", "y", "nobody")] == [7 * MBIT, 0, None]
    with bench.session(a, "x"):
        bench.postgres.start()
        wait_for_store("it is told to the store", lambda: is_settled(a), 10)
    assert bench.sql("SELECT id, rate FROM client ORDER BY id") == "x|7000000\ny|0"


def check_what_is_not_notified_is_found_by_looking(bench: StoreBench) -> None:
    a = bench.store("a")
    with bench.session(a, "x") as (_, ends):
        bench.sql("UPDATE client SET epoch = 7, server = 'elsewhere'")
        wait_for_store("it is told to end", lambda: ends, tun6.POLL_S + 3)


def check_a_server_with_many_descriptors_hears_what_is_notified(bench: StoreBench) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as undo:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        null = undo.enter_context(open(os.devnull))
        while (descriptor := os.dup(null.fileno())) <= 1023:  # which select() takes
            undo.callback(os.close, descriptor)
        undo.callback(os.close, descriptor)
        a, b = bench.store("a"), bench.store("b")
        with bench.session(a, "x") as (_, ends), bench.session(b, "x"):
            wait_for_store("the older one is told to end", lambda: ends, 1)
        assert not is_down(a) and not is_down(b)
        bench.close_all()


STOPS_IN_TRANSACTION = """
import sys, time
sys.path.insert(0, sys.argv[1])
import tun6
database = tun6.Database(sys.argv[2], "stopped")
database.connect()
database._worker.execute("begin")
database.require_pool("for update")
print("locked", flush=True)
time.sleep(60)
"""


def check_a_server_that_stops_in_a_transaction_does_not_stop_the_others(bench: StoreBench) -> None:
    a = bench.store("a")
    command = [sys.executable, "-c", STOPS_IN_TRANSACTION, str(Path(tun6.__file__).resolve().parent), bench.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stopped:
        try:
            assert stopped.stdout and stopped.stdout.readline() == "locked\n"
            stopped.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            assert bench.visit(a, "new").prefix == subnet(0)
            print(f"    served {time.monotonic() - began:.1f} s after the other one had stopped", flush=True)
        finally:
            stopped.kill()


def check_a_64_that_was_anothers_is_given_only_by_pin_and_above_its_epochs(bench: StoreBench) -> None:
    a = bench.store("a")
    bench.visit(a, "x")
    a.pin("x", subnet(1))
    assert [a.assign(id_) for id_ in "yz"] == [subnet(2), subnet(3)]
    with pytest.raises(ValueError, match="may not have heard"):
        a.pin("y", subnet(0))
    bench.sql("UPDATE client SET moved = moved - interval '20 s'")
    a.pin("y", subnet(0))
    assert cast(int, bench.visit(a, "y").epoch) > tun6.FREED_LEAD
    for prefix, complaint in (
        (subnet(1), "already the prefix of 'x'"),
        (subnet(255), "kept for the servers"),
        (IPv6Network("2001:db8:2::/64"), "outside"),
        (POOL, "not a /64"),
    ):
        with pytest.raises(ValueError, match=complaint):
            a.pin("y", prefix)
    assert bench.sql("INSERT INTO client (id, prefix) VALUES ('overlaps', '2001:db8:1::/60') RETURNING 1") == ""


def check_new_ids_count_in_the_whole_cluster_and_the_pool_has_an_end(bench: StoreBench) -> None:
    network = IPv6Network("2001:db8:1::/61")  # eight /64s, two of which are the servers'
    bench.fresh(network=network)
    a, b = (bench.store(name, network=network, new_ids_per_hour=3) for name in "ab")
    for server, id_ in ((a, "1"), (b, "2"), (a, "3")):
        bench.visit(server, id_, counted=True)
    for server in (a, b):
        with pytest.raises(tun6.Refusal, match="more than 3 new Ids"):
            bench.visit(server, "4", counted=True)
    assert [a.assign(id_) for id_ in "456"] == [IPv6Network(f"2001:db8:1:{number}::/64") for number in (3, 4, 5)]
    with pytest.raises(tun6.Refusal, match="no free /64"):
        b.assign("7")
    assert {a.keep(), b.keep()} == {IPv6Network(f"2001:db8:1:{number}::/64") for number in (6, 7)}


def check_a_server_starts_from_its_cache(bench: StoreBench) -> None:
    bench.fresh("required")
    a = bench.store("a", keys="required")
    assert a.keys
    a.assign("x")
    key = a.keys.issue("x")
    own = a.keep()
    bench.close_all()
    assert stat.S_IMODE(os.stat(bench.folder / "a.json").st_mode) == 0o600
    bench.postgres.kill(signal.SIGQUIT)
    with pytest.raises(tun6.StorageError):  # no cache
        bench.store("b", keys="required")
    a = bench.store("a", keys="required")
    assert a.keys and (a.find("x"), a.keep()) == (subnet(0), own)
    a.keys.check("x", key)
    with bench.session(a, "x") as (lease, ends):
        assert (lease.prefix, lease.epoch) == (subnet(0), 1)
        bench.postgres.start()
        wait_for_store("it is told to the store", lambda: bench.row("x") == ["1", "a", "t"], 10)
        assert not ends
    bench.close_all()
    cache = (bench.folder / "a.json").read_text()
    bench.fresh("required")
    (bench.folder / "a.json").write_text(cache)
    bench.postgres.kill(signal.SIGQUIT)
    a = bench.store("a", keys="required")
    bench.postgres.start()
    wait_for_store("it says that this is another pool", lambda: "of another pool" in str(a.figures()["store"]["down"]), 10)
    assert bench.sql("SELECT count(*) FROM client") == "0"


def check_who_does_not_fit_does_not_start(bench: StoreBench) -> None:
    for wrong, complaint in (
        ({"network": CLUSTER_RANGE}, "prefixrange is"),
        ({"keys": "none"}, "there is no `cert`"),
        ({"keys": "optional"}, "keys_required is no here and not there"),
    ):
        bench.fresh("required")
        with pytest.raises(tun6.ConfigError, match=complaint):
            bench.store("a", **{"keys": "required", **wrong})
    bench.sql("UPDATE pool SET version = 99")
    with pytest.raises(tun6.ConfigError, match="too old"):
        bench.store("a", keys="required")
    bench.sql("DROP TABLE pool")
    with pytest.raises(tun6.ConfigError, match="cluster init"):
        bench.store("a", keys="required")
    bench.fresh()
    a = bench.store("a")
    twin = tun6.ClusterStore(bench.url, POOL, "none", str(bench.folder / "twin.json"), "a")
    bench._undo.callback(twin.close)
    twin.start()
    assert "another server is named a" in str(twin.figures()["store"]["down"])
    assert not is_down(a)


def check_tables_of_an_older_version_are_upgraded_whole_or_not_at_all(bench: StoreBench) -> None:
    a = bench.store("a")
    held = bench.visit(a, "x")
    a.set_limit("x", MBIT)
    bench.close_all()
    newer, steps = tun6.SCHEMA_VERSION + 2, "alter table client add column one int; alter table client add column two int"
    first, second = steps.split("; ")
    upgrades = {newer - 2: first, newer - 1: second}
    columns = "SELECT string_agg(attname, ' ') FROM pg_attribute WHERE attrelid = 'client'::regclass AND attname IN ('one', 'two')"
    with mock.patch.multiple(tun6, SCHEMA_VERSION=newer, UPGRADES=upgrades):
        with pytest.raises(
            tun6.ConfigError, match=f"of version {newer - 2}, and not {newer}; `tun6.py cluster upgrade` brings it up to date"
        ):
            bench.store("a")
        with mock.patch.dict(upgrades, {newer - 1: "nonsense"}), bench.database() as database, pytest.raises(Exception, match="syntax"):
            database.upgrade()
        assert (bench.sql(columns), bench.sql("SELECT version FROM pool")) == ("", str(newer - 2))
        for before in (newer - 2, newer):
            with bench.database() as database:
                assert database.upgrade() == before
        assert (bench.sql(columns), bench.sql("SELECT version FROM pool")) == ("one two", str(newer))
        a = bench.store("a")
        assert (bench.visit(a, "x").prefix, a.limit_of("x")) == (held.prefix, MBIT)
        bench.close_all()
    with bench.database() as database, pytest.raises(tun6.RequestError, match=f"of version {newer}, and this tun6 knows only"):
        database.upgrade()


def check_lost_commits_are_written_back_before_anybody_is_new(bench: StoreBench) -> None:
    a, b = bench.store("a"), bench.store("b")
    bench.visit(a, "old")
    bench.postgres.kill(signal.SIGINT)
    copy = bench.folder / "pg/copy"
    shutil.copytree(bench.postgres._data, copy)
    bench.postgres.start()
    wait_for_store("both are back", lambda: is_settled(a) and is_settled(b), 15)
    with bench.session(a, "lost") as (lease, ends):
        b.set_limit("old", 0)
        b.set_limit("lost", MBIT)
        wait_for_store("both know it, and the limits", lambda: b.find("lost") and a.limit_of("lost") and a.limit_of("old") == 0)
        bench.postgres.kill(signal.SIGQUIT)
        shutil.rmtree(bench.postgres._data)
        shutil.move(copy, bench.postgres._data)
        for path in (bench.postgres._data, *bench.postgres._data.rglob("*")):
            shutil.chown(path, "postgres", "postgres")
        (bench.postgres._data / "standby.signal").touch()
        b.close()  # it does not come back
        bench.postgres.start()
        bench.postgres.promote()
        wait_for_store("a has written back", lambda: bench.row("lost") == ["1", "a", "t"], 20)
        assert not ends and lease.prefix == subnet(1)
        assert bench.sql("SELECT id, rate FROM client ORDER BY id") == f"lost|{MBIT}\nold|0"
        wait_for_store("a is back", lambda: is_settled(a))
        for gives in (lambda: bench.visit(a, "new"), lambda: a.pin("old", subnet(9))):  # what b may know as another's
            with pytest.raises(tun6.StorageError, match="cluster accept"):
                gives()
        with bench.database() as database, pytest.raises(tun6.StorageError, match="cluster accept"):
            database.take_in({"imported": subnet(9)}, {}, {})
        a.pin("old", bench.visit(a, "old").prefix)  # nobody gets anything by these two
        with bench.database() as database:
            assert database.take_in({"old": subnet(0)}, {}, {"old": 0}) == 0
        with bench.database() as database:
            assert database.accept() and not database.accept()
        assert bench.visit(a, "new").prefix == subnet(2)


def check_import_and_export(bench: StoreBench) -> None:
    bench.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    names_of_files = ("assignments.json", "keys.json", "assignments.json.limits", "a.json", "k.json", "a.json.limits")
    files = {name: bench.folder / name for name in names_of_files}
    make_certificate(bench.folder / "server.pem")
    names = {"assignments": "assignments.json", "keys": "keys.json", "cert": "server.pem"}
    config = str(write_ini(bench.folder / "config.ini", server={**SERVER, **names, "store": bench.url}))
    before = {"é": str(subnet(3)), "y": str(subnet(0)), "z": str(subnet(254))}
    files["assignments.json"].write_text(json.dumps(before))
    keys = tun6.KeyStore(str(files["keys.json"]))
    for id_ in ("é", "z"):
        keys.issue(id_)
    keys.set_revoked("z", True)
    limits = {"é": 50 * MBIT, "y": 0}
    files["assignments.json.limits"].write_text(json.dumps(limits))

    def cluster(*words: str) -> subprocess.CompletedProcess[str]:
        return run_tun6("cluster", *words, "-c", config)

    assert "cluster init" in only_line(cluster("import"), 2)
    assert "made the pool" in cluster("init").stdout
    assert "has a pool already" in only_line(cluster("init"), 2)
    assert "took in 3 Ids" in cluster("import").stdout
    assert "took in 0 Ids" in cluster("import").stdout
    assert "import" in only_line(run_tun6("clients", "list", "-c", config), 2)
    assert bench.sql("SELECT id, rate FROM client ORDER BY id") == f"y|0\nz|\né|{50 * MBIT}"
    files["a.json.limits"].touch()
    assert "a.json.limits is there already" in only_line(cluster("export", str(files["a.json"]), str(files["k.json"])), 2)
    files["a.json.limits"].unlink()
    assert "3 assignments, 2 keys and 2 limits" in cluster("export", str(files["a.json"]), str(files["k.json"])).stdout
    assert json.loads(files["a.json.limits"].read_text()) == limits
    assert json.loads(files["a.json"].read_text()) == before
    assert json.loads(files["k.json"].read_text()) == json.loads(files["keys.json"].read_text())
    assert stat.S_IMODE(files["k.json"].stat().st_mode) == 0o600
    assert "is there already" in only_line(cluster("export", str(files["a.json"])), 2)
    for wrong, complaint in (({**before, "new": str(subnet(9)), "y": str(subnet(1))}, "'y' has"), ({"w": str(subnet(0))}, "'w'")):
        files["assignments.json"].write_text(json.dumps(wrong))
        assert complaint in only_line(cluster("import"), 2)
        assert bench.sql("SELECT count(*) FROM client") == "3"
    files["assignments.json"].write_text(json.dumps(before))
    files["assignments.json.limits"].write_text(json.dumps({"z": MBIT, "y": MBIT}))
    assert "'y' has another limit" in only_line(cluster("import"), 2)
    assert bench.sql("SELECT rate FROM client WHERE id = 'z'") == ""
    files["assignments.json.limits"].write_text(json.dumps({"z": MBIT}))
    assert "took in 1 Ids" in cluster("import").stdout
    assert bench.sql("SELECT id, rate FROM client ORDER BY id") == f"y|0\nz|{MBIT}\né|{50 * MBIT}"
    assert "version 1 already" in cluster("upgrade").stdout
    assert "nothing to accept" in cluster("accept").stdout
    write_ini(Path(config), server={**SERVER, "cert": "server.pem", "store": bench.url})
    added = asked(Path(config), "clients", "add", "w")
    assert added["prefix"] == str(subnet(1))
    assert asked(Path(config), "clients", "limit", "w", "none")["limit"] == 0
    listed = {entry["id"]: (entry["revoked"], entry["limit"]) for entry in asked(Path(config), "clients", "list")}
    assert listed == {"é": (False, 50 * MBIT), "y": (False, 0), "z": (True, MBIT), "w": (False, 0)}


STORE_CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_") and "bench" in check.__annotations__]


def store_command(arguments: list[str]) -> int:
    """`test_tun6.py store`: the store of a cluster against a real PostgreSQL; takes root, installs it if need be. Gives the exit status."""
    parser = argparse.ArgumentParser(prog="test_tun6.py store", description=store_command.__doc__)
    parser.add_argument("words", nargs="*", help="only the checks with one of these words in their names")
    options = parser.parse_args(arguments)
    install_cluster_packages()
    gevent.get_hub().NOT_ERROR += (Exception,)
    wanted = [check for check in STORE_CHECKS if any(word in check.__name__ for word in options.words or [""])]
    failed: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="tun6-store-") as folder,
        ClusterLab(0) as lab,
        StoreBench(lab, Path(folder)) as bench,
    ):
        for check in wanted:
            bench.fresh()
            began = time.monotonic()
            try:
                check(bench)
            except (Exception, pytest.fail.Exception):  # the other one is of `pytest.raises`
                failed.append(check.__name__)
                traceback.print_exc()
            print(f"{'FAIL' if check.__name__ in failed else '  ok'}  {check.__name__}, {time.monotonic() - began:.1f} s", flush=True)
    return int(bool(failed))


# ---- main ------------------------------------------------------------------------------------------------------------


class SkippedIsFailed:
    """pytest plugin for CI: a test that does not run there tests nothing."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.skipped:
            report.outcome = "failed"
        return report


class Share:
    """pytest plugin: runs one of so many shares of the tests, as in "1/2"."""

    def __init__(self, share: str) -> None:
        self._number, self._shares = map(int, share.split("/"))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._number - 1 :: self._shares]


def run_tests(*options: str, share: str = "1/1") -> int:
    """Gives the exit status; in CI a skipped test is a failed one."""
    quiet = ["-q", "--durations=5", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    plugins = [Share(share), *([SkippedIsFailed()] if os.environ.get("CI") == "true" else [])]
    return int(pytest.main([*quiet, *options, __file__], plugins))


def main() -> int:
    """Format, lint, types, tests; gives the exit status. A word such as `fuzz` or `soak`, see the map above: only that.

    In CI two minutes of soak, and the tests that wait, run beside the others.
    """
    if sys.argv[1:2] == ["fuzz"]:
        return fuzz_command(sys.argv[2:])
    if sys.argv[1:2] == ["soak"]:
        return soak_command(sys.argv[2:])
    if sys.argv[1:2] == ["observers"]:
        return observers_command(sys.argv[2:])
    if sys.argv[1:2] == ["systemd"]:
        return systemd_command(sys.argv[2:])
    if sys.argv[1:2] == ["packages"]:
        return packages_command(sys.argv[2:])
    if sys.argv[1:2] == ["cluster"]:
        return cluster_command(sys.argv[2:])
    if sys.argv[1:2] == ["machines"]:
        return machines_command(sys.argv[2:])
    if sys.argv[1:2] == ["store"]:
        return store_command(sys.argv[2:])
    if sys.argv[1:2] == ["waits"]:
        return run_tests("-m", "waits", share=(sys.argv[2:] or ["1/1"])[0])
    os.chdir(Path(__file__).parent)
    for command in ("ruff format --check .", "ruff check .", "mypy"):
        print(f"$ {command}", flush=True)
        status = subprocess.run([sys.executable, "-m", *command.split()]).returncode
        if status:
            return status
    if os.environ.get("CI") != "true":
        print("$ pytest", flush=True)
        return run_tests(*sys.argv[1:])
    soak = ["soak", "--minutes", "2", "--clients", "50"]  # as all else runs beside it, on two processors perhaps
    beside = {"soak": soak, **{f"pytest -m waits, {share}": ["waits", share] for share in ("1/2", "2/2")}}
    with ExitStack() as undo:
        reports = {name: undo.enter_context(tempfile.TemporaryFile("w+")) for name in beside}
        running = {
            name: undo.enter_context(subprocess.Popen([sys.executable, __file__, *words], stdout=reports[name], stderr=reports[name]))
            for name, words in beside.items()
        }
        print('$ pytest -m "not waits"', flush=True)
        statuses = [run_tests("-m", "not waits", *sys.argv[1:])]
        for name, process in running.items():
            statuses.append(process.wait())
            reports[name].seek(0)
            print(f"$ {name}\n{reports[name].read()}", flush=True)
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""bench_tun6: measures tun6 beside direct routing, the same data path in C, and other tunnels where they are installed.

Usage, as root: `contrib/bench_tun6.py [--quick] [--only NAME,...] [--beside FILE] [--json FILE] [--plot FILE]`; `--help` lists the names.

Each tunnel carries IPv6 between the hosts `client` and `internet` of a tun6.Lab, over IPv4 and through its NAT. `direct` routes
IPv6 over the same links. The speed of a machine changes with time. Therefore each repeat measures all tunnels, one after the
other, and figures of different runs are comparable only by their ratios to `direct`. The tables show medians over the repeats.

    machine     tcp: iperf3 up, down and 4 streams up, and the CPU time that both ends of the tunnel take for a GB
                udp: 64-byte datagrams up, the most that arrive at <= 1 % loss, found by bisection, and those of a flood
                rtt: the round trip when idle, and during the TCP upload
    wan         home, loss0.1, loss1, slow: an emulated link, with rate, delay, buffer and loss, between nat and server;
                TCP up and down, and the round trip meanwhile
    neighbours  three tun6 clients of one server: one downloads, one pings, and the third gets datagrams, while it runs and
                while it is stopped (SIGSTOP); the server's event-loop latency meanwhile, as `tun6.py status` reports it
    limits      a client with the setting `limit`: how much of it TCP and UDP get, and the round trip of a ping meanwhile; on a LAN
                and over a link with a round trip of 40 ms, plain, inside TLS, and as a legacy peer
    bufferbloat latency under load: a ping beside an upload and then a download, over the emulated links lte, adsl, dsl, cable, wlan,
                fibre; beside another upload from the same house (beside-cubic); and while the rate halves and doubles (changing)
    clients     1, 100, 1,000 and 4,000 plain sockets become clients of one tun6 server, at most 1,000 at once, and each has
                a working tunnel when its echo request is answered; then the costs of one more client, and of the shutdown
    active      1 and 100 plain sockets of one process are clients of one tun6 server, and all of them are active: at 2 Mbit/s each
                way, then up and down as fast as they can; meanwhile one more, real client pings

With `--beside FILE`, another version's tun6.py is measured in turn with this one, and the figures have their ratio.

All hosts use the congestion control CUBIC, as most in the world do; a tunnel may choose another one for its own connection.

The file, top to bottom:

    what is measured     Metric, Section, Link, Settings: the tables and their columns, the emulated links
    the testbed          Testbed: hosts, programs that run on them, CPU time; LinkDirection: the emulated links at work
    the tunnels          Tunnel: the rows, and how each tunnel is started
    measuring            ping, iperf3, the bisection
    isolation            the section neighbours
    limits               the section limits
    bufferbloat          the section bufferbloat
    clients              the section clients
    active clients       the section active
    the run              Benchmark: the order of the measurements, figures and faults
    reports              machine, tables, JSON, plot
    command line         options, signals, exit status
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tun6.py of this checkout, even where another one is installed

import tun6  # before the next ones, as it tells how to install them
from tun6 import Lab, wait_until

# isort: split
import gevent
import gevent.socket
import pytun

log = logging.getLogger("bench_tun6")


class BenchError(tun6.Tun6Error):
    """Something could not be measured. Ends the measurement, or all those of a tunnel that does not start."""


# ---- what is measured ------------------------------------------------------------------------------------------------

UDP_PAYLOAD = 64  # bytes of each datagram in the section udp


class Metric(NamedTuple):
    """One column of a table."""

    key: str
    title: str
    decimals: int
    ratio: bool = False  # whether the ratio to direct is shown beside it


class Section(NamedTuple):
    """One table."""

    key: str
    title: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Link:
    """An emulated path between nat and server."""

    key: str
    label: str
    up: float  # Mbit/s of IP packets
    down: float  # Mbit/s of IP packets
    rtt: float  # ms, half of it in each direction
    buffer: float  # ms in each direction: a packet that would wait longer for its turn is dropped
    loss: float  # per cent in each direction
    half_s: float = 0  # for so many seconds in turn it has its rates and half of them; 0 for always its rates


LINKS = (
    Link("home", "20 Mbit/s up, 100 down, 30 ms, 1 s of buffer", 20, 100, 30, 1000, 0),
    Link("loss0.1", "100 Mbit/s, 40 ms, 0.1 % loss, 100 ms of buffer", 100, 100, 40, 100, 0.1),
    Link("loss1", "100 Mbit/s, 40 ms, 1 % loss, 100 ms of buffer", 100, 100, 40, 100, 1),
    Link("slow", "5 Mbit/s, 80 ms, 300 ms of buffer", 5, 5, 80, 300, 0),
)
TCP = Section(
    "tcp",
    "TCP through the tunnel, Mbit/s (x direct), and CPU seconds that its two ends took for a GB",
    (
        Metric("tcp_up", "up", 0, True),
        Metric("tcp_down", "down", 0, True),
        Metric("tcp_4", "4 streams", 0, True),
        Metric("up_cpu_client", "up: client", 2),
        Metric("up_cpu_server", "server", 2),
        Metric("down_cpu_client", "down: client", 2),
        Metric("down_cpu_server", "server", 2),
    ),
)
UDP = Section(
    "udp",
    f"UDP of {UDP_PAYLOAD} bytes up, delivered, thousands of packets/s (x direct)",
    (Metric("udp_clean", "<= 1 % loss", 1, True), Metric("udp_flood", "flood", 1, True)),
)
RTT = Section(
    "rtt",
    "Round trip, ms: idle, and during the TCP upload",
    (
        Metric("rtt_idle", "idle", 3),
        Metric("rtt_extra", "over direct", 3),
        Metric("rtt_load", "upload: mean", 2),
        Metric("rtt_load_max", "max", 2),
    ),
)
WAN_SECTIONS = tuple(
    Section(
        link.key,
        f"WAN {link.label}: Mbit/s (x direct), and the round trip under it, ms",
        (
            Metric("rtt_idle", "idle", 1),
            Metric("up", "up", 1, True),
            Metric("up_rtt", "mean", 0),
            Metric("up_rtt_max", "max", 0),
            Metric("down", "down", 1, True),
            Metric("down_rtt", "mean", 0),
            Metric("down_rtt_max", "max", 0),
        ),
    )
    for link in LINKS
)
CLIENTS = Section(
    "clients",
    "tun6 with many clients: all say hello at once, while one more, real client pings; then what it costs beside them",
    (
        Metric("all_s", "all work, s", 2),
        Metric("one_ms", "half, ms", 0),
        Metric("ping_max", "ping max, ms", 0),
        Metric("kib", "KiB each", 0),
        Metric("next_ms", "next, ms", 1),
        Metric("idle_cpu", "idle CPU %", 1),
        Metric("rtt", "RTT, ms", 2),
        Metric("tcp_up", "TCP, Mbit/s", 0),
        Metric("cpu_gb", "CPU s/GB", 2),
        Metric("shutdown_s", "shutdown, s", 2),
    ),
)
ISOLATION = Section(
    "neighbours",
    "tun6 with three clients: one downloads, one pings, the third gets datagrams; the server's event-loop latency meanwhile",
    (
        Metric("tcp_down", "TCP, Mbit/s", 0),
        Metric("rtt", "RTT, ms", 2),
        Metric("rtt_max", "max", 2),
        Metric("loop_p99", "loop p99, ms", 1),
        Metric("loop_max", "max", 1),
        Metric("mib", "server MiB", 1),
    ),
)
ACTIVE = Section(
    "active",
    "tun6 with active clients: at 2 Mbit/s each way, half of them in small packets, then up and down as fast as they can; ping beside it",
    (
        Metric("paced_back", "2 Mbit/s: % back", 1),
        Metric("paced_cpu", "CPU %", 0),
        Metric("paced_ping", "ping p99, ms", 1),
        Metric("up", "up: Mbit/s", 0),
        Metric("up_cpu", "CPU s/GB", 2),
        Metric("up_jain", "Jain", 3),
        Metric("up_ping", "ping p99", 1),
        Metric("down", "down: Mbit/s", 0),
        Metric("down_cpu", "CPU s/GB", 2),
        Metric("down_jain", "Jain", 3),
        Metric("down_ping", "ping p99", 1),
    ),
)
ISOLATION_ROWS = {"runs": "the third runs", "stopped": "the third is stopped"}  # keys and labels
LIMITS = Section(
    "limits",
    "tun6 with a limit: % of it that TCP and UDP get, headers included; and the round trip meanwhile, ms: mean and p95",
    (
        Metric("idle", "idle", 1),
        *(
            Metric(f"{protocol}_{way}{what}", title or f"{protocol.upper()} {way} %", 1)
            for protocol in ("tcp", "udp")
            for way in ("up", "down")
            for what, title in (("", ""), ("_mean", "mean"), ("_p95", "p95"))
        ),
    ),
)
BUFFERBLOAT = Section(
    "bufferbloat",
    "Latency under load: round trip idle and beside an upload or download as fast as it can, ms; its Mbit/s (x the other version's)",
    (
        Metric("idle", "idle", 0),
        *(
            Metric(f"{way}{what}", title, decimals, ratio)
            for way in ("up", "down")
            for what, title, decimals, ratio in (
                ("_floor_mean", f"at half {way}:", 0, False),  # with losses only: what their repair costs without any queue
                ("_floor_p95", "p95", 0, False),
                ("", way, 1, True),
                ("_early_mean", "at first", 0, False),
                ("_mean", "mean", 0, False),
                ("_p95", "p95", 0, False),
            )
        ),
        Metric("share", "share %", 0),
    ),
)
MACHINE_SECTIONS = (TCP, UDP, RTT)
SECTIONS = (*MACHINE_SECTIONS, *WAN_SECTIONS, ISOLATION, LIMITS, BUFFERBLOAT, CLIENTS, ACTIVE)
SECTION_GROUPS = {"machine": MACHINE_SECTIONS, "wan": WAN_SECTIONS}  # --only takes these names for several sections


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    repeats: int = 3
    seconds: int = 4  # of one TCP measurement; iperf3 takes whole seconds only
    udp_seconds: int = 2  # of each UDP rate
    udp_steps: int = 6  # of the bisection; each one halves the range of rates
    pings: int = 100  # for the idle round trip
    wan_seconds: int = 8  # of one TCP measurement over an emulated link
    wan_skip: int = 2  # of those seconds, before the goodput counts
    limit_seconds: int = 5  # of each measurement with a limit
    limit_skip: int = 2  # seconds before these, which do not count
    limit_rows: tuple[str, ...] = ()  # of the section limits; () for all
    load_skip: int = 3  # seconds of a load in the section bufferbloat until what counts; the first one of them is not shown
    load_seconds: int = 11  # of it that count
    bufferbloat_rows: tuple[str, ...] = ()  # of the section bufferbloat; () for all of tun6
    beside: str = ""  # another tun6.py that is measured, too
    clients: tuple[int, ...] = (1, 100, 1000, 4000)  # the rows of the section clients
    active: tuple[int, ...] = (1, 100)  # the rows of the section active


QUICK_SETTINGS = Settings(
    repeats=1,
    seconds=2,
    udp_seconds=1,
    udp_steps=3,
    pings=20,
    wan_seconds=4,
    wan_skip=1,
    limit_seconds=3,
    limit_rows=("1M", "100M"),
    load_seconds=5,
    bufferbloat_rows=("lte", "cable"),
    clients=(100,),
)


# ---- the testbed -----------------------------------------------------------------------------------------------------

REPOSITORY = Path(tun6.__file__).parent
START_S = 15.0  # seconds from the start of a tunnel until the first ping through it is answered, at most
CLIENT_ADDRESS = "2001:db8:1::1"  # tun6's server gives it to its first client, too
CLIENT_PREFIX = "2001:db8:1::/64"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # they end the benchmark


class Testbed:
    """The hosts of a Lab, and the programs of the tunnel that runs between them. They run in a folder that has their files."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.undo = ExitStack()  # what is undone when the tunnel ends
        self.programs: dict[str, subprocess.Popen[str]] = {}  # by host
        for host in Lab.HOSTS:
            lab.set_sysctl(host, "net.ipv4.tcp_congestion_control", "cubic")
            lab.set_sysctl(host, "net.ipv4.tcp_no_metrics_save", "1")  # the next tunnel must not use what this one's connections learned

    @contextmanager
    def run_tunnel(self, tunnel: Tunnel) -> Iterator[None]:
        """Runs the tunnel from client to internet meanwhile. Raises BenchError, which tells why it does not start."""
        with ExitStack() as self.undo:
            self.undo.callback(self.programs.clear)
            tunnel.start(self)
            self.wait_for("the first ping is answered", lambda: self.lab.pings("client"))
            yield

    def start_program(self, host: str, command: str, listens: str = "", clean_exit: bool = False) -> None:
        """Starts a program of the tunnel, which runs until the tunnel ends.

        `listens` is the protocol and port on which it soon listens, such as "tcp 10000". With `clean_exit`, SIGTERM must end it
        with status 0. Raises BenchError.
        """
        with open(self.folder / f"{host}.log", "w") as log_file:
            process = self.lab.popen(
                host,
                *shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                start_new_session=True,  # Ctrl-C does not reach it
            )
        self.programs[host] = process
        self.undo.push(lambda failure, *_: end_program(process, clean_exit and not failure))  # the first fault tells more
        if listens:
            self.wait_for(f"it listens on {listens}", lambda: self._listens(host, *listens.split()))

    def run_program(self, command: str, stdin: str = "") -> str:
        """Runs a program to its end and returns what it prints. Raises BenchError when it fails."""
        done = subprocess.run(shlex.split(command), input=stdin, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"`{command[:60]}` failed: {' '.join(done.stderr.split())[:200]}")
        return done.stdout

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        """Waits until the condition holds. Raises BenchError after START_S, or as soon as a program of the tunnel has ended."""

        def holds() -> bool:
            for host, process in self.programs.items():
                if process.poll() is not None:
                    raise BenchError(f"the {host}'s program ended with {process.returncode}: {self._last_log_line(host)}")
            return bool(condition())

        try:
            wait_until(what, holds, START_S)
        except tun6.KernelError as error:
            raise BenchError("; ".join([str(error), *(f"{host}: {self._last_log_line(host)}" for host in self.programs)])) from None

    def add_routes(self, client_device: str, server_device: str) -> None:
        """Waits for the devices that the tunnel's programs make, and routes the client's IPv6 through them."""
        for host, device in (("server", server_device), ("client", client_device)):
            self.wait_for(f"{device} is there", functools.partial(self._has_device, host, device))
            self.lab.ip(host, f"link set dev {device} up")
        self.lab.ip("server", f"-6 route replace {CLIENT_PREFIX} dev {server_device}")
        self.lab.ip("client", f"addr add {CLIENT_ADDRESS}/128 dev {client_device} nodad")
        self.lab.ip("client", f"-6 route replace default dev {client_device} metric 1")

    def cpu_seconds(self, host: str) -> float:
        """Returns the CPU time that the tunnel's program on the host has taken so far, 0 where there is none."""
        return read_cpu_seconds(self.programs[host].pid) if host in self.programs else 0.0

    def _has_device(self, host: str, name: str) -> bool:
        return f": {name}: " in self.lab.ip(host, "link show")

    def _listens(self, host: str, protocol: str, port: str) -> bool:
        state = "0A" if protocol == "tcp" else "07"  # TCP_LISTEN and TCP_CLOSE, include/net/tcp_states.h
        return f":{int(port):04X} 00000000:0000 {state} " in self.lab.run(host, "cat", f"/proc/net/{protocol}").stdout

    def _last_log_line(self, host: str) -> str:
        lines = (self.folder / f"{host}.log").read_text(errors="replace").strip().splitlines()
        return tun6.to_printable(lines[-1].strip() if lines else "its log is empty", 120)


def end_program(process: subprocess.Popen[str], clean_exit: bool = False, seconds: float = 10) -> None:
    """Ends a program with SIGTERM, or after so many seconds with SIGKILL, and kills what is left of the programs that it started.

    Raises BenchError with `clean_exit` when it did not end by itself with status 0.
    """
    pids = list_process_tree(process.pid)
    process.terminate()
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = -signal.SIGKILL
    for pid in pids:
        if pid != process.pid or process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    if clean_exit and status:
        raise BenchError(f"tun6 did not end within {seconds:.0f} s of SIGTERM" if status < 0 else f"tun6 ended with status {status}")


def list_process_tree(root: int) -> list[int]:
    """Returns the ids of a process and of all that it started, directly or not, and that still live."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
    pids = [root]
    for pid in pids:
        pids += children[pid]
    return pids


def read_cpu_seconds(root: int) -> float:
    """Returns the CPU time of a process and of those that it started: utime + stime, proc_pid_stat(5)."""
    ticks = 0
    for pid in list_process_tree(root):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def allow_cubic() -> Iterator[None]:
    """Allows all network namespaces to use CUBIC meanwhile. The machine has one list of what is allowed."""
    path = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    before = path.read_text()
    if "cubic" in before.split():
        yield
        return
    path.write_text(f"{before.strip()} cubic")
    try:
        yield
    finally:
        path.write_text(before)


class Rate:
    """What a link can send: its full rate for `half_s` seconds, half of it for as long, and so on; with 0 always the full rate.

    Times are those of time.monotonic(), so every process knows when the rate changes: at multiples of half_s.
    """

    def __init__(self, bytes_per_s: float, half_s: float) -> None:
        self._bytes_per_s, self._half_s = bytes_per_s, half_s

    def bytes_until(self, when: float) -> float:
        """Returns the bytes that it could have sent since the clock's 0."""
        if not self._half_s:
            return when * self._bytes_per_s
        periods, since = divmod(when, 2 * self._half_s)
        return self._bytes_per_s * (1.5 * self._half_s * periods + min(since, (since + self._half_s) / 2))

    def time_of(self, sent: float) -> float:
        """Returns when it could have sent so many bytes since the clock's 0."""
        if not self._half_s:
            return sent / self._bytes_per_s
        periods, seconds = divmod(sent / self._bytes_per_s, 1.5 * self._half_s)  # seconds at the full rate
        return 2 * self._half_s * periods + max(seconds, 2 * seconds - self._half_s)

    def halves_between(self, begin: float, end: float) -> bool:
        """Returns whether the rate becomes half of what it was in this time."""
        period = 2 * self._half_s
        return period > 0 and (begin - self._half_s) // period < (end - self._half_s) // period


class LinkDirection:
    """One direction of an emulated link: a rate with a drop-tail buffer before it, and a delay and losses behind it."""

    PACKET_MAX = 2048  # bytes, more than the MTU of the devices
    BATCH = 64  # packets that one direction accepts before the other one does

    def __init__(self, source: int, sink: int, mbit: float, link: Link) -> None:
        """`source` and `sink` are the descriptors of two TUNs, `mbit` is the rate in Mbit/s."""
        self.source, self._sink = source, sink
        self._rate = Rate(mbit * 1e6 / 8, link.half_s)
        self._delay_s, self._buffer, self._loss = link.rtt / 2e3, link.buffer / 1e3 * mbit * 1e6 / 8, link.loss / 100
        self._accepted = 0.0  # the bytes that the link could have sent, when all packets accepted so far have been sent
        self._in_flight: deque[tuple[float, bytes]] = deque()  # times of arrival and packets

    def accept_packets(self) -> None:
        """Reads the packets that wait at the source, at most BATCH. Drops those that are lost or exceed the buffer."""
        sent = self._rate.bytes_until(time.monotonic())
        for _ in range(self.BATCH):
            try:
                packet = os.read(self.source, self.PACKET_MAX)
            except BlockingIOError:
                return
            begins = max(sent, self._accepted)
            if begins - sent <= self._buffer and (not self._loss or random.random() >= self._loss):
                self._accepted = begins + len(packet)
                self._in_flight.append((self._rate.time_of(self._accepted) + self._delay_s, packet))

    def deliver_packets(self) -> float:
        """Writes the packets that have arrived to the sink, and returns when the next one arrives."""
        now, in_flight = time.monotonic(), self._in_flight
        while in_flight and in_flight[0][0] <= now:
            with suppress(OSError):  # the queue of the device is full, so the packet is lost
                os.write(self._sink, in_flight.popleft()[1])
        return in_flight[0][0] if in_flight else now + 1


def emulate_link(nat: int, server: int, link: Link) -> None:
    """Carries packets between two TUNs, in a process of its own, until its parent kills it or has ended.

    It works in user space, as the kernel would count a packet on the link against the limits of the socket that sent it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    directions = (LinkDirection(nat, server, link.up, link), LinkDirection(server, nat, link.down, link))
    with selectors.DefaultSelector() as selector:
        for direction in directions:
            selector.register(direction.source, selectors.EVENT_READ, direction)
        while os.getppid() == parent:
            arrival = min(direction.deliver_packets() for direction in directions)
            for key, _ in selector.select(max(0.0, arrival - time.monotonic())):
                key.data.accept_packets()


@contextmanager
def insert_link(lab: Lab, link: Link) -> Iterator[None]:
    """Replaces the link between nat and server by an emulated one, whose ends have the same name and addresses."""
    lab.ip("nat", "link del eth0")
    with ExitStack() as undo:
        descriptors = []
        for host, address in (("nat", "10.9.0.2/24"), ("server", f"{Lab.SERVER}/24")):
            with lab.inside(host):
                device = pytun.TunTapDevice(name="eth0", flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
            undo.callback(device.close)
            descriptors.append(device.fileno())
            os.set_blocking(device.fileno(), False)
            lab.ip(host, f"addr add {address} dev eth0")
            lab.ip(host, "link set eth0 txqueuelen 5000 addrgenmode none up")
        process = multiprocessing.get_context("fork").Process(target=emulate_link, args=(*descriptors, link), daemon=True)
        process.start()
        undo.callback(process.join)
        undo.callback(process.kill)
        yield


# ---- the tunnels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tunnel:
    """A row of the tables: a way to carry IPv6 from client to internet."""

    key: str
    label: str
    start: Callable[[Testbed], None]
    needs: tuple[str, ...] = ()  # programs
    must_work: bool = False  # whether the benchmark fails when it fails
    quick: bool = False  # whether --quick measures it on this machine
    quick_wan: bool = False  # whether --quick measures it over an emulated link

    def missing_programs(self) -> list[str]:
        """Returns the programs that it needs and that are not installed."""
        return [name for name in self.needs if not shutil.which(name)]


def start_direct(testbed: Testbed) -> None:
    """Lets nat route IPv6, too, without a tunnel. The routers have global addresses, as a TUN has no link-local one."""
    ip, undo = testbed.lab.ip, testbed.undo
    testbed.lab.set_sysctl("nat", "net.ipv6.conf.all.forwarding", "1")
    for host, kind, what in (
        ("client", "addr", f"{CLIENT_ADDRESS}/128 dev lo nodad"),
        ("client", "addr", "2001:db8:a::2/64 dev eth0 nodad"),
        ("nat", "addr", "2001:db8:a::1/64 dev eth1 nodad"),
        ("nat", "addr", "2001:db8:b::2/64 dev eth0 nodad"),
        ("server", "addr", "2001:db8:b::1/64 dev eth0 nodad"),
        ("client", "route", f"default via 2001:db8:a::1 src {CLIENT_ADDRESS}"),
        ("nat", "route", f"{CLIENT_PREFIX} via 2001:db8:a::2"),
        ("nat", "route", "default via 2001:db8:b::1"),
        ("server", "route", f"{CLIENT_PREFIX} via 2001:db8:b::2"),
    ):
        ip(host, f"-6 {kind} add {what}")
        undo.callback(ip, host, f"-6 {kind} del {what.removesuffix(' nodad')}")


C_SOURCE = r"""
/* The data path of tun6 in C: two blocking threads with offload, without handshake and checks. Usage: datapath server|client */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
enum { BATCH_BYTES = 256 << 10, FRAME = 10 + 40 + 65535, HEADERS = 10 + 40 };
static int tun, sock;
static void *tun_to_tcp(void *unused)
{
    static unsigned char buffer[BATCH_BYTES + FRAME];
    struct pollfd readable = {tun, POLLIN, 0};
    for (;;) {
        size_t have = 0;
        poll(&readable, 1, -1);
        while (have < BATCH_BYTES) {
            ssize_t got = read(tun, buffer + have, FRAME);
            if (got < 0 && errno != EAGAIN) exit(1);
            if (got < 0) break;
            have += got;
        }
        for (size_t at = 0; at < have;) {
            ssize_t sent = send(sock, buffer + at, have - at, 0);
            if (sent <= 0) exit(1);
            at += sent;
        }
    }
    return unused;
}
static void tcp_to_tun(void)
{
    static unsigned char buffer[1 << 20];
    size_t have = 0;
    for (;;) {
        size_t at = 0;
        ssize_t got = recv(sock, buffer + have, sizeof buffer - have, 0);
        if (got <= 0) exit(1);
        have += got;
        while (have - at >= HEADERS) {
            size_t length = HEADERS + (buffer[at + 14] << 8 | buffer[at + 15]);
            if (have - at < length) break;
            if (write(tun, buffer + at, length) < 0 && errno == EBADF) exit(1); /* other packets are lost */
            at += length;
        }
        memmove(buffer, buffer + at, have -= at);
    }
}
int main(int count, char **words)
{
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(10000), .sin_addr.s_addr = inet_addr("10.9.0.1")};
    struct ifreq device = {.ifr_name = "tun0", .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    pthread_t thread;
    int one = 1;
    sock = socket(AF_INET, SOCK_STREAM, 0);
    if (count > 1 && !strcmp(words[1], "server")) {
        setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(sock, (void *)&server, sizeof server) || listen(sock, 1)) return 1;
        sock = accept(sock, 0, 0);
    } else if (connect(sock, (void *)&server, sizeof server)) return 1;
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (ioctl(tun, TUNSETIFF, &device) || ioctl(tun, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO6)) return 2;
    if (pthread_create(&thread, 0, tun_to_tcp, 0)) return 3;
    tcp_to_tun();
}
"""


def start_c_data_path(testbed: Testbed) -> None:
    """Starts the C program above on both hosts. Compiles it when that has not been done yet."""
    if not (testbed.folder / "datapath").exists():
        (testbed.folder / "datapath.c").write_text(C_SOURCE)
        testbed.run_program("cc -O2 -pthread -o datapath datapath.c")
    testbed.start_program("server", "./datapath server", listens="tcp 10000")
    testbed.start_program("client", "./datapath client")
    testbed.add_routes("tun0", "tun0")


# Python code of the tun6 programs. All run the real tun6; two change one thing in it first.
TUN6_UNCHANGED = "import sys, tun6; sys.exit(tun6.main())"
TUN6_WITHOUT_OFFLOAD = """
import fcntl, sys, tun6
ioctl = fcntl.ioctl
def refuse_offload(fd, request, argument=0, *more):  # as an old kernel does
    if request == tun6.Tun.TUNSETOFFLOAD and argument:
        raise OSError(22, "Invalid argument")
    return ioctl(fd, request, argument, *more)
fcntl.ioctl = refuse_offload
sys.exit(tun6.main())
"""
TUN6_LEGACY = """
import sys, tun6
encode_message = tun6.encode_message
tun6.encode_message = lambda message: encode_message({key: value for key, value in message.items() if key != "Offload"})
sys.exit(tun6.main())
"""
TUN6_OTHER = f"import sys; sys.path.insert(0, 'other'); {TUN6_UNCHANGED}"  # the tun6.py of --beside, of which the folder has a copy
TUN6_CONFIG = """
[server]
localhost = 0.0.0.0
listenport = 10000
prefixrange = 2001:db8:1::/48
documentation_addresses = yes
assignments = assignments.json
max_clients = 60000
control = /run/tun6-bench.sock
[client]
remotehost = 10.9.0.1
remoteport = 10000
control = /run/tun6-bench-client.sock
"""


def start_tun6(
    client_code: str, encrypted: bool = False, settings: str = "", server_code: str = TUN6_UNCHANGED, client_settings: str = ""
) -> Callable[[Testbed], None]:
    """Returns a function that starts tun6's server and a client, with these settings besides. Each of them runs its code."""

    def start(testbed: Testbed) -> None:
        config = testbed.folder / "config.ini"
        text = f"{TUN6_CONFIG}{client_settings}\n".replace("[client]", f"{settings}\n[client]")
        config.write_text(text)
        for file in testbed.folder.glob("assignments.json*"):  # so that the first client gets CLIENT_PREFIX
            file.unlink()
        if encrypted:
            (testbed.folder / "server.pem").unlink(missing_ok=True)
            output = testbed.run_program(f"{sys.executable} {REPOSITORY}/tun6.py keygen -c config.ini")
            (fingerprint,) = re.findall("fingerprint = .*", output)
            config.write_text(text.replace("[client]", f"cert = server.pem\n[client]\n{fingerprint}"))
        start_tun6_program(testbed, "server", "server", server_code, listens="tcp 10000")
        start_tun6_program(testbed, "client", "client", client_code)

    return start


def start_tun6_program(
    testbed: Testbed, host: str, role: str, code: str = TUN6_UNCHANGED, config: str = "config.ini", listens: str = ""
) -> None:
    """Starts tun6 on a host as a server or client, which is its role."""
    testbed.start_program(host, shlex.join([sys.executable, "-c", code, role, "-c", config]), listens, clean_exit=True)


def start_openvpn(protocol: str, encrypted: bool) -> Callable[[Testbed], None]:
    """Returns a function that starts OpenVPN from point to point over "tcp" or "udp". Without encryption it sends plain text."""

    def start(testbed: Testbed) -> None:
        if encrypted and not (testbed.folder / "vpn.crt").exists():  # one self-signed certificate for both ends
            new = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout vpn.key -out vpn.crt"
            testbed.run_program(f"openssl req -x509 -subj /CN=bench -days 2 {new}")
        for role, listens, more in (
            ("server", f"{protocol} 1194", "--dh none" if encrypted else ""),
            ("client", "", f"--remote {Lab.SERVER}"),
        ):
            path = "--proto udp" if protocol == "udp" else f"--proto tcp-{role} --socket-flags TCP_NODELAY"
            safety = "--cipher none --auth none"
            if encrypted:
                safety = f"--tls-{role} --data-ciphers AES-128-GCM --cipher AES-128-GCM --ca vpn.crt --cert vpn.crt --key vpn.key"
            testbed.start_program(role, f"openvpn --dev tun0 --dev-type tun --port 1194 {path} {safety} {more}", listens)
        testbed.add_routes("tun0", "tun0")

    return start


def start_tinc(testbed: Testbed) -> None:
    """Starts tinc, over TCP as tun6 is."""
    for host, more, where in (
        ("server", "", f"Address = {Lab.SERVER}\nSubnet = ::/0\n"),
        ("client", "ConnectTo = server\n", f"Subnet = {CLIENT_PREFIX}\n"),
    ):
        hosts = testbed.folder / f"tinc-{host}" / "hosts"
        if not hosts.exists():
            hosts.mkdir(parents=True)
            (hosts.parent / "tinc.conf").write_text(f"Name = {host}\nInterface = tun0\nDeviceType = tun\nAddressFamily = ipv4\n{more}")
            (hosts / host).write_text(f"TCPOnly = yes\n{where}")
            testbed.run_program(f"tincd -c tinc-{host} -K 2048")
    for host, other in (("server", "client"), ("client", "server")):  # each gets the other's public key
        shutil.copy(testbed.folder / f"tinc-{host}" / "hosts" / host, testbed.folder / f"tinc-{other}" / "hosts" / host)
    for host in ("server", "client"):
        (testbed.folder / f"tinc-{host}.pid").unlink(missing_ok=True)
        testbed.start_program(host, f"tincd -c tinc-{host} -D -d1 --pidfile={testbed.folder}/tinc-{host}.pid", listens="tcp 655")
    testbed.add_routes("tun0", "tun0")


def start_wireguard_go(testbed: Testbed) -> None:
    """Starts wireguard-go. The names of its devices are unique on this machine, as all control sockets are in one folder."""
    devices = {host: f"tun6{host[0]}{os.getpid()}" for host in ("server", "client")}
    keys = {}
    for host, device in devices.items():
        private = testbed.run_program("wg genkey")
        (testbed.folder / f"wg-{host}.key").write_text(private)
        keys[host] = testbed.run_program("wg pubkey", private).strip()
        control = Path(f"/var/run/wireguard/{device}.sock")
        testbed.undo.callback(control.unlink, missing_ok=True)
        testbed.start_program(host, f"env LOG_LEVEL=error wireguard-go -f {device}")
        testbed.wait_for("its control socket is there", control.exists)
    for host, settings, peer, more in (
        ("server", "listen-port 51820", "client", f"allowed-ips {CLIENT_PREFIX}"),
        ("client", "", "server", f"allowed-ips ::/0 endpoint {Lab.SERVER}:51820 persistent-keepalive 25"),
    ):
        testbed.run_program(f"wg set {devices[host]} private-key wg-{host}.key {settings} peer {keys[peer]} {more}")
        testbed.lab.ip(host, f"link set dev {devices[host]} mtu 1420")
    testbed.add_routes(devices["client"], devices["server"])


def start_ssh(testbed: Testbed) -> None:
    """Starts `ssh -w` and an sshd for it, with keys of their own. The sshd and the ~/.ssh of this machine are not used."""
    for key in ("ssh_key", "ssh_host_key"):
        if not (testbed.folder / key).exists():
            testbed.run_program(f"ssh-keygen -q -t ed25519 -N '' -f {key}")
    privilege_separation = Path("/run/sshd")  # sshd needs this empty folder, which most machines have
    if not privilege_separation.exists():
        privilege_separation.mkdir(0o755)
        testbed.undo.callback(privilege_separation.rmdir)
    (testbed.folder / "sshd_config").write_text(
        f"Port 2222\nListenAddress {Lab.SERVER}\nHostKey {testbed.folder}/ssh_host_key\nAuthorizedKeysFile {testbed.folder}/ssh_key.pub\n"
        "PidFile none\nStrictModes no\nPermitRootLogin prohibit-password\nPermitTunnel yes\nPasswordAuthentication no\nUsePAM no\n"
    )
    testbed.start_program("server", f"{shutil.which('sshd')} -D -e -f {testbed.folder}/sshd_config", listens="tcp 2222")
    options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o IdentitiesOnly=yes -o LogLevel=ERROR"
    tunnel = "-o ExitOnForwardFailure=yes -o Tunnel=point-to-point -N -w 0:0"
    testbed.start_program("client", f"ssh -F /dev/null {options} {tunnel} -i ssh_key -p 2222 root@{Lab.SERVER}")
    testbed.add_routes("tun0", "tun0")


TUNNELS = (
    Tunnel("direct", "direct routing, no tunnel", start_direct, must_work=True, quick=True, quick_wan=True),
    Tunnel("c", "C data path", start_c_data_path, ("cc",), must_work=True, quick=True),
    Tunnel("tun6", "tun6", start_tun6(TUN6_UNCHANGED), must_work=True, quick=True, quick_wan=True),
    Tunnel("tun6-tls", "tun6 inside TLS", start_tun6(TUN6_UNCHANGED, encrypted=True), ("openssl",), must_work=True),
    Tunnel("tun6-bare", "tun6, peer without offload", start_tun6(TUN6_WITHOUT_OFFLOAD), must_work=True, quick=True),
    Tunnel("tun6-legacy", "tun6, legacy peer", start_tun6(TUN6_LEGACY), must_work=True, quick=True),
    Tunnel("openvpn", "OpenVPN TCP, no cipher", start_openvpn("tcp", False), ("openvpn",), quick=True, quick_wan=True),
    Tunnel("openvpn-aes", "OpenVPN TCP, AES-128-GCM", start_openvpn("tcp", True), ("openvpn", "openssl")),
    Tunnel("openvpn-udp", "OpenVPN UDP, no cipher", start_openvpn("udp", False), ("openvpn",)),
    Tunnel("tinc", "tinc over TCP", start_tinc, ("tincd",)),
    Tunnel("wireguard-go", "wireguard-go", start_wireguard_go, ("wireguard-go", "wg")),
    Tunnel("ssh", "ssh -w", start_ssh, ("ssh", "sshd", "ssh-keygen")),
)
TUN6, TUN6_TLS = (tunnel for tunnel in TUNNELS if tunnel.key in ("tun6", "tun6-tls"))
OTHERS = {  # with --beside, by what they are measured in turn with
    TUN6.key: Tunnel("other", "the other tun6", start_tun6(TUN6_OTHER, server_code=TUN6_OTHER), quick=True, quick_wan=True),
    TUN6_TLS.key: Tunnel("other-tls", "the other inside TLS", start_tun6(TUN6_OTHER, True, server_code=TUN6_OTHER), ("openssl",)),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


UDP_LOSS_MAX = 0.01  # of the datagrams that are sent, for the metric udp_clean


class TcpResult(NamedTuple):
    """The figures of one TCP measurement."""

    mbit: float  # Mbit/s of payload
    cpu: dict[str, float]  # seconds of CPU for 10^9 bytes, by host
    round_trips: list[float]  # ms, of the pings meanwhile


def measure_round_trips(testbed: Testbed, count: int, interval: float) -> list[float]:
    """Pings internet from client. Returns the round trips in ms. Raises BenchError when no ping is answered."""
    return parse_round_trips(testbed.lab.run("client", "ping", "-6", "-c", str(count), "-i", str(interval), "-W", "3", Lab.INTERNET).stdout)


@contextmanager
def ping_meanwhile(testbed: Testbed, host: str, interval: float, sent_at: list[float] | None = None) -> Iterator[list[float]]:
    """Pings internet from a host meanwhile. Afterwards the list that is yielded has the round trips in ms. Raises BenchError likewise.

    `sent_at` gets for each of them when the request was sent, as time.monotonic() tells it.
    """
    round_trips: list[float] = []
    with tempfile.TemporaryFile("w+") as output:  # a pipe is full after some hundred answers, and ping would wait
        with testbed.lab.popen(host, "ping", "-6", "-D", "-i", str(interval), Lab.INTERNET, stdout=output) as process:
            try:
                yield round_trips
            finally:
                process.send_signal(signal.SIGINT)
        output.seek(0)
        round_trips += parse_round_trips(text := output.read())
    if sent_at is not None:
        ahead = time.time() - time.monotonic()
        answered_at = map(float, re.findall(r"^\[([\d.]+)\].* time=", text, re.MULTILINE))
        sent_at += [answer - ahead - round_trip / 1e3 for answer, round_trip in zip(answered_at, round_trips)]


def parse_round_trips(output: str) -> list[float]:
    """Returns the round trips in ms that ping printed. Raises BenchError when there is none."""
    round_trips = [float(value) for value in re.findall(r" time=([\d.]+) ms", output)]
    if not round_trips:
        raise BenchError("no ping was answered")
    return round_trips


@contextmanager
def run_iperf3(testbed: Testbed, seconds: int, *options: str) -> Iterator[Callable[[], Any]]:
    """Starts iperf3 from client to internet. Yields a function that waits for its end and returns its figures, or raises BenchError."""
    with ExitStack() as undo:
        server = testbed.lab.popen("internet", "iperf3", "-s", "-1", "--forceflush", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        undo.enter_context(server)
        undo.callback(server.kill)
        assert server.stdout
        while "listening" not in (line := server.stdout.readline()):
            if not line:
                raise BenchError("iperf3's server ended")
        command = ("iperf3", "-6", "-J", "-c", Lab.INTERNET, "-t", str(seconds), *options)
        client = testbed.lab.popen("client", *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        undo.enter_context(client)
        undo.callback(client.kill)

        def wait_for_figures() -> Any:
            try:
                output, _ = client.communicate(timeout=seconds + 20)
                report = json.loads(output)
            except subprocess.TimeoutExpired:
                raise BenchError("iperf3 did not end") from None
            except ValueError:
                raise BenchError(f"iperf3 failed: {tun6.to_printable(output)}") from None
            if "error" in report:
                raise BenchError(f"iperf3: {tun6.to_printable(report['error'])}")
            return report["end"]

        yield wait_for_figures


def measure_tcp(testbed: Testbed, seconds: int, *options: str, skip: int = 0, pings: bool = False) -> TcpResult:
    """Measures TCP from client to internet, or back with the option -R, for `seconds` after `skip` seconds that do not count.

    With `pings`, it pings meanwhile. Raises BenchError.
    """
    before = {host: testbed.cpu_seconds(host) for host in ("client", "server")}
    round_trips = []
    with run_iperf3(testbed, seconds, *(("-O", str(skip)) if skip else ()), *options) as wait_for_figures:
        if pings:
            time.sleep(skip + 0.4)
            round_trips = measure_round_trips(testbed, max(3, int((seconds - 0.8) / 0.1)), 0.1)
        received = wait_for_figures()["sum_received"]
    # the CPU time includes the skipped seconds and iperf3's bytes do not, so `cpu` is right only without any
    return TcpResult(
        received["bits_per_second"] / 1e6,
        {host: (testbed.cpu_seconds(host) - before[host]) / (received["bytes"] / 1e9) for host in before} if received["bytes"] else {},
        round_trips,
    )


def measure_udp(testbed: Testbed, seconds: int, packets_per_s: float = 0) -> tuple[float, float]:
    """Sends datagrams from client to internet, with 0 as many as it can. Returns packets/s sent and delivered. Raises BenchError."""
    options = ("-u", "-l", str(UDP_PAYLOAD), "-b", str(int(packets_per_s * UDP_PAYLOAD * 8)))
    with run_iperf3(testbed, seconds, *options) as wait_for_figures:
        total = wait_for_figures()["sum"]
    return total["bytes"] / UDP_PAYLOAD / total["seconds"], (total["packets"] - total["lost_packets"]) / total["seconds"]


def find_udp_rate(testbed: Testbed, settings: Settings, flood: tuple[float, float]) -> float:
    """Returns the most packets/s that are delivered with a loss of at most UDP_LOSS_MAX. Bisects from the figures of a flood."""
    sent, rate = flood
    if rate >= sent * (1 - UDP_LOSS_MAX):
        return rate
    low, high, best = 0.0, min(sent, 1.6 * rate), 0.0  # at a lower rate than a flood's, more CPU is left to deliver packets
    for _ in range(settings.udp_steps):
        sent, delivered = measure_udp(testbed, settings.udp_seconds, rate)
        if delivered >= sent * (1 - UDP_LOSS_MAX):
            low, best = rate, max(best, delivered)
        else:
            high = rate
        rate = (low + high) / 2 if low else high * 0.75
    return best


# ---- isolation -------------------------------------------------------------------------------------------------------


@contextmanager
def send_datagrams(testbed: Testbed, address: str) -> Iterator[None]:
    """Sends datagrams of 1,200 bytes from internet to this address meanwhile: 10,000 a second, about 100 Mbit/s."""
    done = threading.Event()
    with testbed.lab.inside("internet"):
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)

    def send() -> None:
        while not done.wait(0.002):
            for _ in range(20):
                with suppress(OSError):  # no program has this port, and an ICMPv6 error may tell so
                    sock.sendto(bytes(1200), (address, 9))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sock.close()


def measure_isolation(testbed: Testbed, settings: Settings, row: str) -> dict[str, float]:
    """Returns the figures of one row of ISOLATION. Adds the second and the third client to a tunnel of tun6 that runs."""
    for name, more in (("third", "tun = tun7\ndefault_route = no"), ("second", "")):
        (testbed.folder / f"{name}.ini").write_text(f"{TUN6_CONFIG}id = {name}\n{more}\n")
        start_tun6_program(testbed, "second", "client", config=f"{name}.ini")
        if name == "third":
            third = testbed.programs["second"]
            testbed.wait_for("the third client has its address", lambda: " 2001:db8:1" in testbed.lab.ip("second", "-6 addr show"))
    address = re.findall(r"inet6 (2001:db8:1[0-9a-f:]+)/", testbed.lab.ip("second", "-6 addr show dev tun7"))[0]
    testbed.wait_for("the second client reaches internet", lambda: testbed.lab.pings("second"))
    with send_datagrams(testbed, address):
        if row == "stopped":
            third.send_signal(signal.SIGSTOP)
        try:
            with ping_meanwhile(testbed, "second", 0.05) as round_trips:
                tcp = measure_tcp(testbed, 3 * settings.seconds, "-R")  # most of the time that `status` reports on
                status = json.loads(testbed.run_program(f"{sys.executable} {REPOSITORY}/tun6.py status --json -c config.ini"))
        finally:
            third.send_signal(signal.SIGCONT)
    return {
        "tcp_down": tcp.mbit,
        "rtt": statistics.median(round_trips),
        "rtt_max": max(round_trips),
        "loop_p99": status["latency"]["p99"] * 1e3,
        "loop_max": status["latency"]["max"] * 1e3,
        "mib": status["memory"] / 2**20,
    }


# ---- limits ----------------------------------------------------------------------------------------------------------

LIMIT_LINK = Link("limit", "200 Mbit/s, 40 ms, 100 ms of buffer", 200, 200, 40, 100, 0)
LIMIT_DATAGRAM = 1200  # bytes of payload
MTU, TCP_DATA = 1500, 1428  # bytes of a full packet, and of the data in it: 40 of IPv6, 20 of TCP, 12 of its timestamps


class LimitRow(NamedTuple):
    """A row of the section limits."""

    label: str
    mbit: int  # the limit
    tunnel: Tunnel
    link: Link | None


def limit_rows() -> dict[str, LimitRow]:
    """Returns the rows by their keys."""
    rows = {}
    for text, mbit in (("1M", 1), ("10M", 10), ("100M", 100), ("1G", 1000)):
        for kind, label, code, encrypted, link in (
            ("", "LAN", TUN6_UNCHANGED, False, None),
            ("-tls", "LAN, TLS", TUN6_UNCHANGED, True, None),
            ("-legacy", "LAN, legacy", TUN6_LEGACY, False, None),
            ("-real", "40 ms", TUN6_UNCHANGED, False, LIMIT_LINK),
            ("-real-tls", "40 ms, TLS", TUN6_UNCHANGED, True, LIMIT_LINK),
        ):
            if link is None or mbit < link.up:
                start = start_tun6(code, encrypted, f"limit = {text}")
                rows[text + kind] = LimitRow(f"{text}, {label}", mbit, Tunnel(text + kind, label, start, must_work=True), link)
    return rows


LIMIT_ROWS = limit_rows()


def measure_limits(testbed: Testbed, settings: Settings, row: str) -> dict[str, float]:
    """Returns the figures of one row of LIMITS, of a tunnel with that limit which runs."""
    limit, seconds = LIMIT_ROWS[row].mbit, settings.limit_seconds
    figures = {"idle": statistics.median(measure_round_trips(testbed, settings.pings // 5, 0.02))}
    for protocol, options in (("tcp", ()), ("udp", ("-u", "-l", str(LIMIT_DATAGRAM), "-b", f"{1.5 * limit}M"))):
        for way, more, receiver in (("up", (), "internet"), ("down", ("-R",), "client")):
            skip = ("-O", str(settings.limit_skip)) if protocol == "tcp" else ()
            length = seconds + (0 if skip else settings.limit_skip + 1)
            with run_iperf3(testbed, length, *skip, *options, *more) as wait_for_figures:
                time.sleep(settings.limit_skip)
                with ping_meanwhile(testbed, "client", 0.05) as round_trips:
                    began, before = time.monotonic(), count_datagrams(testbed, receiver)
                    time.sleep(seconds)
                    datagrams, took = count_datagrams(testbed, receiver) - before, time.monotonic() - began
                rate = wait_for_figures()["sum_received"]["bits_per_second"] * MTU / TCP_DATA
            if protocol == "udp":
                rate = datagrams * 8 * (tun6.IPV6_HEADER + tun6.UDP_HEADER + LIMIT_DATAGRAM) / took
            figures[f"{protocol}_{way}"] = rate / limit / 1e4
            figures[f"{protocol}_{way}_mean"] = statistics.mean(round_trips)
            figures[f"{protocol}_{way}_p95"] = sorted(round_trips)[len(round_trips) * 95 // 100]
            time.sleep(1)  # what still waits must not meet the next measurement
    return figures


def count_datagrams(testbed: Testbed, host: str) -> int:
    """Returns how many datagrams the host has received for one of its sockets, also those for which that had no room."""
    counters = dict(line.split() for line in testbed.lab.run(host, "cat", "/proc/net/snmp6").stdout.splitlines())
    return int(counters["Udp6InDatagrams"]) + int(counters["Udp6RcvbufErrors"])


# ---- bufferbloat -----------------------------------------------------------------------------------------------------

BUFFERBLOAT_LINKS = (
    Link("lte", "10/50 Mbit/s, 120 ms, 600 ms of buffer, 0.2 % loss", 10, 50, 120, 600, 0.2),
    Link("adsl", "2/16 Mbit/s, 80 ms, 1,500 ms", 2, 16, 80, 1500, 0),
    Link("dsl", "5/20 Mbit/s, 80 ms, 300 ms", 5, 20, 80, 300, 0),
    Link("cable", "20/100 Mbit/s, 60 ms, 1,000 ms", 20, 100, 60, 1000, 0),
    Link("wlan", "50/50 Mbit/s, 50 ms, 200 ms, 0.5 % loss", 50, 50, 50, 200, 0.5),
    Link("fibre", "300/300 Mbit/s, 20 ms, 50 ms, 0.01 % loss", 300, 300, 20, 50, 0.01),
    Link("beside-cubic", "20/100 Mbit/s, 60 ms, 1,000 ms, and an upload beside it", 20, 100, 60, 1000, 0),
    Link("changing", "40/40 and 20/20 Mbit/s, 10 s each, 40 ms, 300 ms", 40, 40, 40, 300, 0, half_s=10),
)
CHANGE_S = 2.0  # after the rate became half of what it was, in which the round trips do not count
AFTER_LOAD_S = 3.0  # until what waits in tunnel and link is gone: more than the longest buffer holds
EARLY_S = 1.0  # of a load that are never shown
SO_MAX_PACING_RATE = 47  # asm-generic/socket.h


class BufferbloatRow(NamedTuple):
    """A row of the section bufferbloat."""

    label: str
    link: Link
    tunnel: Tunnel
    other: Tunnel | None  # the same of another version of tun6


def bufferbloat_rows() -> dict[str, BufferbloatRow]:
    """Returns the rows by their keys: LINK for tun6, LINK-tls for tun6 inside TLS, and LINK-TUNNEL for all others.

    LINK-rate is for tun6 that is told the rates of the link.
    """
    rows = {}
    for link in BUFFERBLOAT_LINKS:
        for tunnel in TUNNELS:
            name = {TUN6.key: "", TUN6_TLS.key: "-tls"}.get(tunnel.key, f"-{tunnel.key}")
            label = f"{link.key}: {link.label if tunnel is TUN6 else tunnel.label}"
            rows[link.key + name] = BufferbloatRow(label, link, tunnel, OTHERS.get(tunnel.key))
        if not link.half_s:
            known = start_tun6(TUN6_UNCHANGED, client_settings=f"rate_up = {link.up}M\nrate_down = {link.down}M")
            tunnel = Tunnel("tun6-rate", "tun6 with rate_up, rate_down", known, must_work=True)
            rows[f"{link.key}-rate"] = BufferbloatRow(f"{link.key}: {tunnel.label}", link, tunnel, None)
    return rows


BUFFERBLOAT_ROWS = bufferbloat_rows()
TUN6_BUFFERBLOAT_ROWS = tuple(key for key, row in BUFFERBLOAT_ROWS.items() if row.tunnel in (TUN6, TUN6_TLS))


@contextmanager
def send_meanwhile(testbed: Testbed, source: str, address: str, down: bool = False, mbit: float = 0) -> Iterator[Callable[[], int]]:
    """Sends over one TCP connection from a host to this address of internet or server, or from there to it with `down`, meanwhile.

    It sends as fast as it can, or, with `mbit`, so many Mbit/s of data, evenly. Yields a function that returns the bytes received so far.
    """
    received, block, done = 0, bytes(128 << 10), threading.Event()

    def move() -> None:
        nonlocal received
        buffer = bytearray(1 << 20)
        with selectors.DefaultSelector() as selector, suppress(ConnectionError):
            selector.register(sender, selectors.EVENT_WRITE)
            selector.register(receiver, selectors.EVENT_READ)
            while not done.is_set():
                for key, _ in selector.select(0.1):
                    if key.fileobj is sender:
                        sender.send(block)
                    else:
                        received += receiver.recv_into(buffer)

    with ExitStack() as undo:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with testbed.lab.inside("internet" if address == Lab.INTERNET else "server"):
            listener = undo.enter_context(socket.create_server((address, 0), family=family))
        with testbed.lab.inside(source):
            near = undo.enter_context(socket.create_connection(listener.getsockname()[:2], timeout=10))
        listener.settimeout(10)
        far = undo.enter_context(listener.accept()[0])
        sender, receiver = (far, near) if down else (near, far)
        for sock in (sender, receiver):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # at the end, nothing unsent is sent any more
        if mbit:
            sender.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, int(mbit * 1e6 / 8))
        thread = threading.Thread(target=move)
        thread.start()
        undo.callback(thread.join)
        undo.callback(done.set)
        yield lambda: received


class UnderLoad(NamedTuple):
    """What a load moved, and what a ping met beside it, after the first `skip` seconds, and before that since EARLY_S."""

    mbit: float  # of data
    early_mbit: float
    round_trips: list[float]  # ms
    early_round_trips: list[float]  # ms
    beside_mbit: float  # of a CUBIC upload outside of the tunnel


def measure_under_load(testbed: Testbed, link: Link, skip: float, seconds: float, down: bool = False, mbit: float = 0) -> UnderLoad:
    """Sends from client to internet, or back with `down`, as send_meanwhile does, and pings. Raises BenchError."""
    sent_at: list[float] = []
    with ExitStack() as undo:
        beside = undo.enter_context(send_meanwhile(testbed, "second", Lab.SERVER)) if link.key == "beside-cubic" else None
        moved = undo.enter_context(send_meanwhile(testbed, "client", Lab.INTERNET, down, mbit))
        began = time.monotonic()
        round_trips = undo.enter_context(ping_meanwhile(testbed, "client", 0.1, sent_at))
        marks = []
        for after in (EARLY_S, skip, skip + seconds):
            time.sleep(max(0.0, began + after - time.monotonic()))
            marks.append((time.monotonic(), moved(), beside() if beside else 0))
        time.sleep(link.buffer / 1e3)  # what was sent at the end meets no less of the load
    (begin, *_), (middle, *_), (end, *_) = marks
    rate = Rate(1, link.half_s)

    def between(begin: float, end: float) -> list[float]:
        return [
            round_trip
            for at, round_trip in zip(sent_at, round_trips)
            if begin <= at < end and not rate.halves_between(at - CHANGE_S, at + round_trip / 1e3)
        ]

    def mbits(column: int, first: int) -> float:
        return (marks[first + 1][column] - marks[first][column]) * 8 / 1e6 / (marks[first + 1][0] - marks[first][0])

    return UnderLoad(mbits(1, 1), mbits(1, 0), between(middle, end), between(begin, middle), mbits(2, 1))


def measure_bufferbloat(testbed: Testbed, settings: Settings, link: Link) -> dict[str, float]:
    """Returns the figures of one row of BUFFERBLOAT, of a tunnel over that link which runs. Raises BenchError."""
    skip, seconds = settings.load_skip, settings.load_seconds
    if link.half_s:
        seconds = int(-(-seconds // (2 * link.half_s)) * 2 * link.half_s)  # whole periods
    if link.key == "beside-cubic":
        seconds *= 3  # until two senders have found their shares
    figures = {"idle": statistics.median(measure_round_trips(testbed, 10, 0.1))}
    for way, mbit in (("up", link.up), ("down", link.down)):
        down = way == "down"
        if link.loss:
            floor = measure_under_load(testbed, link, skip, seconds, down, mbit / 2)
            figures |= summarize(f"{way}_floor", floor.round_trips)
            time.sleep(AFTER_LOAD_S)
        load = measure_under_load(testbed, link, skip, seconds, down)
        figures |= {way: load.mbit, f"{way}_early": load.early_mbit}
        figures |= summarize(way, load.round_trips) | summarize(f"{way}_early", load.early_round_trips)
        if link.key == "beside-cubic":
            figures |= {"share": 100 * load.mbit / link.up, "beside": load.beside_mbit}
            break  # the upload beside a download is the business of that upload's own sender
        time.sleep(AFTER_LOAD_S)
    return figures


def summarize(name: str, round_trips: list[float]) -> dict[str, float]:
    """Returns mean and 95th percentile of the round trips, by names of metrics. Raises BenchError when there is none."""
    if not round_trips:
        raise BenchError(f"no ping was answered beside the {name}")
    return {f"{name}_mean": statistics.mean(round_trips), f"{name}_p95": sorted(round_trips)[len(round_trips) * 95 // 100]}


# ---- clients ---------------------------------------------------------------------------------------------------------

CLIENTS_AT_ONCE = 1000  # clients that connect at once; tun6.BACKLOG bounds how many of one address may wait for admission
_frame_buffer = bytearray(2 * (tun6.OFFLOAD_HEADER.size + tun6.PACKET_MAX))  # of all deframers


class OpenTunnel(NamedTuple):
    """The tunnel of a client that is a plain socket."""

    seconds: float  # that it took until it worked
    sock: gevent.socket.socket
    address: bytes  # packed, the first one of its prefix


def open_tunnels(testbed: Testbed, numbers: range, undo: ExitStack, seconds: float = 60) -> list[OpenTunnel]:
    """Opens the tunnels of clients with these numbers at once. Raises BenchError.

    `undo` closes them. All must work within `seconds`.
    """
    with testbed.lab.inside("second"):
        sockets = [undo.enter_context(gevent.socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in numbers]
    greenlets = [gevent.spawn(open_tunnel, sock, number) for sock, number in zip(sockets, numbers)]
    gevent.get_hub().loop.update_now()  # else a timeout counts from when the loop ran last, perhaps minutes ago
    try:
        waiting = len(greenlets) - len(gevent.joinall(greenlets, timeout=seconds, raise_error=True))
    except (OSError, EOFError, tun6.SessionError) as error:
        raise BenchError(f"a client failed: {tun6.describe_end(error)}") from None
    finally:
        gevent.killall(greenlets)
    if waiting:
        raise BenchError(f"{waiting} of {len(greenlets)} clients have no working tunnel after {seconds:.0f} s")
    return [greenlet.value for greenlet in greenlets]


def open_tunnel(sock: gevent.socket.socket, number: int) -> OpenTunnel:
    """Makes the socket a client of tun6. Returns when its echo request, which it sends as a frame, is answered.

    Raises EOFError, OSError, and SessionError when the server refuses it or breaks a rule of the wire.
    """
    began = time.monotonic()
    sock.connect((Lab.SERVER, 10_000))
    stream = tun6.Stream(sock)
    stream.send(tun6.encode_message({"Id": f"client {number}", "Offload": ["tso6", "uso6"]}))
    message, data = tun6.receive_message(stream)
    prefix, _ = tun6.parse_answer(message)
    stream.send(bytes(tun6.OFFLOAD_HEADER.size) + echo_request(prefix[1].packed))
    deframer = tun6.Deframer(_frame_buffer, frozenset(), tun6.IngressFilter(prefix, from_client=False))
    while not any(frame[16] == 58 and frame[50] == 129 for frame in deframer.push(data)):  # ICMPv6, echo reply
        data = stream.receive()
    return OpenTunnel(time.monotonic() - began, sock, prefix[1].packed)


def echo_request(source: bytes, length: int = 48) -> bytes:
    """Returns an IPv6 packet of so many bytes from this packed address to the host internet.

    RFC 8200 sections 3 and 8.1, RFC 4443 section 4.1.
    """
    payload = length - tun6.IPV6_HEADER
    addresses = source + socket.inet_pton(socket.AF_INET6, Lab.INTERNET)
    echo = struct.Struct(">BBHHH")  # type, code, checksum, identifier, sequence number
    summed = addresses + struct.pack(">II", payload, 58) + echo.pack(128, 0, 0, 1, 1)
    checksum = -int.from_bytes(summed, "big") % 0xFFFF  # 2**16 is 1, modulo 0xFFFF
    return struct.pack(">IHBB", 6 << 28, payload, 58, 64) + addresses + echo.pack(128, 0, checksum, 1, 1) + bytes(payload - echo.size)


def read_resident_kib(pid: int) -> int:
    """Returns the KiB of memory of a process, proc_pid_status(5)."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def measure_clients(testbed: Testbed, settings: Settings, row: str) -> dict[str, float]:
    """Returns the figures of one row of CLIENTS. Adds so many clients to a tunnel of tun6 that runs, and ends its server."""
    server, count, figures = testbed.programs["server"], int(row), {}
    with ExitStack() as undo:
        memory = read_resident_kib(server.pid)
        with ping_meanwhile(testbed, "client", 0.01) as round_trips:
            time.sleep(0.3)
            began = time.monotonic()
            each = []
            for first in range(0, count, CLIENTS_AT_ONCE):
                each += [tunnel.seconds for tunnel in open_tunnels(testbed, range(first, min(first + CLIENTS_AT_ONCE, count)), undo)]
            figures["all_s"], figures["one_ms"] = time.monotonic() - began, statistics.median(each) * 1e3
            time.sleep(0.3)
        figures["ping_max"] = max(round_trips)
        if count >= 100:  # with fewer, the server's other memory changes by more than they take
            figures["kib"] = (read_resident_kib(server.pid) - memory) / count
        before, began = read_cpu_seconds(server.pid), time.monotonic()
        time.sleep(2)
        figures["idle_cpu"] = (read_cpu_seconds(server.pid) - before) / (time.monotonic() - began) * 100
        figures["next_ms"] = (
            statistics.median(open_tunnels(testbed, range(count + n, count + n + 1), undo)[0].seconds for n in range(5)) * 1e3
        )
        figures["rtt"] = statistics.median(measure_round_trips(testbed, settings.pings, 0.02))
        tcp = measure_tcp(testbed, settings.seconds)
        figures["tcp_up"], figures["cpu_gb"] = tcp.mbit, tcp.cpu["server"]
        began = time.monotonic()
        end_program(server, clean_exit=True, seconds=120)
        figures["shutdown_s"] = time.monotonic() - began
    return figures


# ---- active clients --------------------------------------------------------------------------------------------------

PACED_BYTES_PER_S = 250_000  # of each client, each way, in the first part
PACED_LENGTHS = (1_400, 200)  # bytes of a packet of every other client, and of the others
PACED_ROUND_S = 0.01  # in which each client sends once
FLOOD_DATAGRAM, FLOOD_DATAGRAMS = 1_400, 42  # bytes of payload, and how many travel as one frame, in the other parts
FRAME_HEADERS = tun6.OFFLOAD_HEADER.size + tun6.IPV6_HEADER + tun6.UDP_HEADER  # bytes
FLOOD_WINDOW = 1 << 20  # bytes of a client that are on their way, about
FLOOD_STALL_S = 0.05  # after which datagrams that have not come are lost
WARM_UP_S = 1.0  # before each measurement
UDP_SEGMENT, SO_SNDBUFFORCE = 103, 32  # linux/udp.h, asm-generic/socket.h
NOWHERE = "2001:db8:fffe::1"  # the host internet, which does not forward, receives and drops what is sent to it
_received = bytearray(1 << 20)  # by any client


class ActiveClient:
    """A client that is a plain socket. It sends one frame again and again, and counts the bytes of frames each way."""

    def __init__(self, tunnel: OpenTunnel) -> None:
        self.address, self.host = tunnel.address, socket.inet_ntop(socket.AF_INET6, tunnel.address)
        self.fd = tunnel.sock.fileno()
        tunnel.sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, FLOOD_WINDOW)
        self.sent = self.received = 0
        self._frame_bytes, self._frames, self._at = 1, memoryview(b""), 0

    def use_frame(self, frame: bytes) -> None:
        """From now on sends this frame, when the one that was begun is sent."""
        os.set_blocking(self.fd, True)
        while self._at % self._frame_bytes:
            self.send(-self._at % self._frame_bytes)
        os.set_blocking(self.fd, False)
        self._frame_bytes, self._frames, self._at = len(frame), memoryview(frame * (tun6.BATCH_BYTES // len(frame))), 0

    def send(self, most: int = tun6.BATCH_BYTES) -> None:
        """Sends the next bytes of its frames, as many as the socket takes."""
        with suppress(BlockingIOError):
            sent = os.write(self.fd, self._frames[self._at : self._at + most])
            self._at = (self._at + sent) % len(self._frames)
            self.sent += sent

    def receive(self) -> None:
        """Receives what is there, and forgets it."""
        with suppress(BlockingIOError):
            self.received += os.readv(self.fd, [_received])


class Load:
    """What active clients do: they receive what is there, and send as fast as they can."""

    events = selectors.EVENT_READ | selectors.EVENT_WRITE

    def __init__(self, clients: list[ActiveClient]) -> None:
        self.clients = clients

    def run(self, seconds: float) -> None:
        """Does it for so many seconds."""
        with selectors.DefaultSelector() as selector:
            for client in self.clients:
                selector.register(client.fd, self.events, client)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                for key, events in selector.select(0.001):
                    if events & selectors.EVENT_READ:
                        key.data.receive()
                        self.after_receipt(key.data)
                    if events & selectors.EVENT_WRITE:
                        key.data.send()
                self.after_turn()

    def after_receipt(self, client: ActiveClient) -> None:
        """Is called when a client has received something."""

    def after_turn(self) -> None:
        """Is called at least every millisecond."""


class PacedLoad(Load):
    """Clients that each send PACED_BYTES_PER_S, one after the other in each PACED_ROUND_S."""

    events = selectors.EVENT_READ

    def __init__(self, clients: list[ActiveClient]) -> None:
        super().__init__(clients)
        self._began, self._done = time.monotonic(), 0

    def after_turn(self) -> None:
        now = time.monotonic() - self._began
        due = int(now / PACED_ROUND_S * len(self.clients))
        for number in range(self._done, due):
            client = self.clients[number % len(self.clients)]
            client.send(int(now * PACED_BYTES_PER_S) - client.sent)
        self._done = due


class FloodFromInternet(Load):
    """Clients to each of which the host internet sends as fast as it can, so that FLOOD_WINDOW bytes are on their way."""

    events = selectors.EVENT_READ

    def __init__(self, clients: list[ActiveClient], sock: socket.socket) -> None:
        super().__init__(clients)
        self._sock, self._payload = sock, bytes(FLOOD_DATAGRAMS * FLOOD_DATAGRAM)
        self._looked_at = 0.0
        self._received = [client.received for client in clients]  # at that time

    def after_receipt(self, client: ActiveClient) -> None:
        while client.sent - client.received < FLOOD_WINDOW:
            self._sock.sendto(self._payload, (client.host, 9))
            client.sent += len(self._payload) + FRAME_HEADERS

    def after_turn(self) -> None:
        if time.monotonic() < self._looked_at + FLOOD_STALL_S:
            return
        for client, received in zip(self.clients, self._received):
            if client.received == received:
                client.sent = received  # what was on its way is lost
                self.after_receipt(client)
        self._received, self._looked_at = [client.received for client in self.clients], time.monotonic()


class LoadResult(NamedTuple):
    """What was moved and what it cost."""

    sent: list[int]  # bytes of each client
    received: list[int]
    delivered: int  # bytes that the host internet received
    seconds: float
    cpu: float  # seconds that the server took
    ping_p99: float  # ms


def measure_load(testbed: Testbed, load: Load, seconds: float) -> LoadResult:
    """Runs the load for WARM_UP_S, and then for so many seconds that count. A host without load pings meanwhile."""
    load.run(WARM_UP_S)
    with ping_meanwhile(testbed, "client", 0.01) as round_trips:
        sent, received = [client.sent for client in load.clients], [client.received for client in load.clients]
        delivered, cpu, began = read_received_bytes(testbed), testbed.cpu_seconds("server"), time.monotonic()
        load.run(seconds)
        result = LoadResult(
            [client.sent - before for client, before in zip(load.clients, sent)],
            [client.received - before for client, before in zip(load.clients, received)],
            read_received_bytes(testbed) - delivered,
            time.monotonic() - began,
            testbed.cpu_seconds("server") - cpu,
            0,
        )
    return result._replace(ping_p99=statistics.quantiles(round_trips, n=100)[98])


def read_received_bytes(testbed: Testbed) -> int:
    """Returns the bytes that the host internet has received from the server."""
    (device,) = json.loads(testbed.lab.ip("internet", "-json -stats link show eth0"))
    return int(device["stats64"]["rx"]["bytes"])


def flood_frame(source: bytes) -> bytes:
    """Returns FLOOD_DATAGRAMS from this packed address to NOWHERE as one frame."""
    length = tun6.UDP_HEADER + FLOOD_DATAGRAMS * FLOOD_DATAGRAM
    addresses = source + socket.inet_pton(socket.AF_INET6, NOWHERE)
    checksum = tun6.sum_words(addresses + struct.pack(">HH", length, 17))  # of the pseudo header; the kernel does the rest
    return (
        tun6.OFFLOAD_HEADER.pack(tun6.NEEDS_CSUM, tun6.GSO_UDP_L4, tun6.IPV6_HEADER + tun6.UDP_HEADER, FLOOD_DATAGRAM, tun6.IPV6_HEADER, 6)
        + struct.pack(">IHBB", 6 << 28, length, 17, 64)
        + addresses
        + struct.pack(">HHHH", 9, 9, length, checksum)
        + bytes(length - tun6.UDP_HEADER)
    )


def fairness(amounts: list[int]) -> float:
    """Returns Jain's index: 1 when all got the same, 1 / n when one of n got everything."""
    return sum(amounts) ** 2 / (len(amounts) * sum(amount**2 for amount in amounts) or 1)


def measure_active(testbed: Testbed, settings: Settings, row: str) -> dict[str, float]:
    """Returns the figures of one row of ACTIVE. Adds so many clients to a tunnel of tun6 that runs."""
    testbed.lab.ip("server", f"-6 route replace {NOWHERE}/128 via {Lab.INTERNET}")
    with ExitStack() as undo:
        clients = [ActiveClient(tunnel) for tunnel in open_tunnels(testbed, range(int(row)), undo)]
        with testbed.lab.inside("internet"):
            sender = undo.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, FLOOD_DATAGRAM)
        for number, client in enumerate(clients):
            client.use_frame(bytes(tun6.OFFLOAD_HEADER.size) + echo_request(client.address, PACED_LENGTHS[number % 2]))
        paced = measure_load(testbed, PacedLoad(clients), settings.seconds)
        for client in clients:
            client.use_frame(flood_frame(client.address))
        up = measure_load(testbed, Load(clients), settings.seconds)
        down = measure_load(testbed, FloodFromInternet(clients, sender), settings.seconds)
    moved = sum(down.received)
    return {
        "paced_back": 100 * sum(paced.received) / sum(paced.sent),
        "paced_cpu": 100 * paced.cpu / paced.seconds,
        "paced_ping": paced.ping_p99,
        "up": up.delivered * 8 / 1e6 / up.seconds,
        "up_cpu": up.cpu / (up.delivered / 1e9),
        "up_jain": fairness(up.sent),
        "up_ping": up.ping_p99,
        "down": moved * 8 / 1e6 / down.seconds,
        "down_cpu": down.cpu / (moved / 1e9),
        "down_jain": fairness(down.received),
        "down_ping": down.ping_p99,
    }


# ---- the run ---------------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """The rows and sections that are measured."""

    tunnels: Sequence[Tunnel]
    wan_tunnels: Sequence[Tunnel]  # over the emulated links
    sections: Sequence[Section]


class Benchmark:
    """Measures what was selected, and keeps all figures and faults."""

    def __init__(self, settings: Settings, selection: Selection, folder: Path) -> None:
        self.settings, self._folder = settings, folder
        self.tunnels, self._wan_tunnels, self.sections = selection
        self.samples: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        #              by section, row and metric
        self.faults: dict[str, dict[str, str]] = defaultdict(dict)  # the first one by section and row; "machine" is one section here
        self.failed = False  # whether something failed that must work
        if settings.beside:
            (folder / "other").mkdir()
            shutil.copy(settings.beside, folder / "other" / "tun6.py")

    def run(self) -> None:
        """Measures everything. A fault ends only its measurement, or all those of a tunnel that does not start."""
        if any(section in MACHINE_SECTIONS for section in self.sections):
            with Lab() as lab:
                self._measure_tunnels("machine", Testbed(lab, self._folder), self.tunnels, self._measure_machine)
        for link in LINKS:
            if any(section.key == link.key for section in self.sections):
                with Lab() as lab, insert_link(lab, link):
                    measure = functools.partial(self._measure_wan, link)
                    self._measure_tunnels(link.key, Testbed(lab, self._folder), self._wan_tunnels, measure)
        for section, measure_row in ((ISOLATION, measure_isolation), (CLIENTS, measure_clients), (ACTIVE, measure_active)):
            if section in self.sections:
                with Lab() as lab:
                    self._measure_tun6(Testbed(lab, self._folder), section, measure_row)
        if BUFFERBLOAT in self.sections:
            for link in BUFFERBLOAT_LINKS:
                rows = [row for row in self.settings.bufferbloat_rows or TUN6_BUFFERBLOAT_ROWS if BUFFERBLOAT_ROWS[row].link == link]
                if rows:
                    with Lab() as lab, insert_link(lab, link):
                        self._measure_bufferbloat(Testbed(lab, self._folder), rows, link)
        if LIMITS in self.sections:
            for emulated in (None, LIMIT_LINK):
                rows = [row for row in self.rows(LIMITS) if LIMIT_ROWS[row].link == emulated]
                if rows:
                    with Lab() as lab, insert_link(lab, emulated) if emulated else nullcontext():
                        self._measure_limits(Testbed(lab, self._folder), rows)

    def _measure_tunnels(self, where: str, testbed: Testbed, tunnels: Sequence[Tunnel], measure: Callable[[Testbed, Tunnel], None]) -> None:
        for repeat in range(self.settings.repeats):
            for tunnel in tunnels:
                missing = tunnel.missing_programs()
                if missing:
                    self.faults[where][tunnel.key] = f"not installed: {', '.join(missing)}"
                    continue
                log.info("%s, repeat %d of %d: %s", where, repeat + 1, self.settings.repeats, tunnel.label)
                with self._record_fault(where, tunnel.key, tunnel.must_work), testbed.run_tunnel(tunnel):
                    measure(testbed, tunnel)

    def _measure_tun6(self, testbed: Testbed, section: Section, measure: Callable[[Testbed, Settings, str], dict[str, float]]) -> None:
        for repeat in range(self.settings.repeats):
            for row, label in self.rows(section).items():
                log.info("%s, repeat %d of %d: %s", section.key, repeat + 1, self.settings.repeats, label)
                with self._record_fault(section.key, row, must_work=True), testbed.run_tunnel(TUN6):
                    self._record(section.key, row, **measure(testbed, self.settings, row))

    def _measure_limits(self, testbed: Testbed, rows: Sequence[str]) -> None:
        for repeat in range(self.settings.repeats):
            for row in rows:
                log.info("limits, repeat %d of %d: %s", repeat + 1, self.settings.repeats, LIMIT_ROWS[row].label)
                with self._record_fault("limits", row, must_work=True), testbed.run_tunnel(LIMIT_ROWS[row].tunnel):
                    self._record("limits", row, **measure_limits(testbed, self.settings, row))

    def _measure_bufferbloat(self, testbed: Testbed, rows: Sequence[str], link: Link) -> None:
        """Measures the rows of one link. Records a row and the same of the other version only together, so that they are pairs."""
        for repeat in range(self.settings.repeats):
            for row in rows:
                _, _, tunnel, other = BUFFERBLOAT_ROWS[row]
                versions = {row: tunnel, **({f"{row}-other": other} if other and self.settings.beside else {})}
                figures = {}
                with self._record_fault("bufferbloat", row, tunnel.must_work):
                    for key in sorted(versions, reverse=repeat % 2 > 0):  # in turn each is the first one
                        log.info("bufferbloat, repeat %d of %d: %s, %s", repeat + 1, self.settings.repeats, link.key, versions[key].label)
                        with testbed.run_tunnel(versions[key]):
                            figures[key] = measure_bufferbloat(testbed, self.settings, link)
                    for key, values in figures.items():
                        self._record("bufferbloat", key, **values)

    def _measure_machine(self, testbed: Testbed, tunnel: Tunnel) -> None:
        settings, wanted = self.settings, {section.key for section in self.sections}
        record_fault = functools.partial(self._record_fault, "machine", tunnel.key, tunnel.must_work)
        if "rtt" in wanted:
            with record_fault("idle round trip: "):
                round_trips = measure_round_trips(testbed, settings.pings, 0.02)
                self._record("rtt", tunnel.key, rtt_idle=statistics.median(round_trips))
        for name, options in (("up", ()), ("down", ("-R",)), ("4", ("-P", "4"))):
            if "tcp" in wanted or ("rtt" in wanted and name == "up"):
                with record_fault(f"TCP {name}: "):
                    tcp = measure_tcp(testbed, settings.seconds, *options, pings=name == "up")
                    self._record("tcp", tunnel.key, **{f"tcp_{name}": tcp.mbit})
                    if testbed.programs and name != "4":
                        self._record("tcp", tunnel.key, **{f"{name}_cpu_{host}": seconds for host, seconds in tcp.cpu.items()})
                    if tcp.round_trips:
                        self._record("rtt", tunnel.key, rtt_load=statistics.mean(tcp.round_trips), rtt_load_max=max(tcp.round_trips))
        if "udp" in wanted:
            with record_fault("UDP: "):
                flood = measure_udp(testbed, settings.udp_seconds)
                udp_clean = find_udp_rate(testbed, settings, flood)
                self._record("udp", tunnel.key, udp_flood=flood[1] / 1e3, udp_clean=udp_clean / 1e3)

    def _measure_wan(self, link: Link, testbed: Testbed, tunnel: Tunnel) -> None:
        seconds, skip = self.settings.wan_seconds, self.settings.wan_skip
        self._record(link.key, tunnel.key, rtt_idle=statistics.median(measure_round_trips(testbed, 10, 0.1)))
        for name, options in (("up", ()), ("down", ("-R",))):
            with self._record_fault(link.key, tunnel.key, tunnel.must_work, f"TCP {name}: "):
                tcp = measure_tcp(testbed, seconds - skip, *options, skip=skip, pings=True)
                figures = {name: tcp.mbit, f"{name}_rtt": statistics.mean(tcp.round_trips), f"{name}_rtt_max": max(tcp.round_trips)}
                self._record(link.key, tunnel.key, **figures)
            if name == "up":
                time.sleep(1)  # the next measurement must not meet what still waits in the tunnel and in the link

    def _record(self, section: str, row: str, **figures: float) -> None:
        for key, value in figures.items():
            self.samples[section][row][key].append(value)

    @contextmanager
    def _record_fault(self, where: str, row: str, must_work: bool, what: str = "") -> Iterator[None]:
        """Records an error that ends the `with` block, with `what` before its text."""
        try:
            yield
        except (tun6.Tun6Error, OSError) as error:
            fault = f"{what}{tun6.describe_end(error)}"
            self.faults[where].setdefault(row, fault)
            self.failed |= must_work
            log.info("%s: %s: %s", where, row, fault)

    def rows(self, section: Section) -> dict[str, str]:
        """Returns the labels of the section's rows by their keys."""
        if section is ISOLATION:
            return ISOLATION_ROWS
        if section is LIMITS:
            return {row: LIMIT_ROWS[row].label for row in self.settings.limit_rows or LIMIT_ROWS}
        if section is BUFFERBLOAT:
            labels = {}
            for row in self.settings.bufferbloat_rows or TUN6_BUFFERBLOAT_ROWS:
                labels[row] = BUFFERBLOAT_ROWS[row].label
                if self.settings.beside and BUFFERBLOAT_ROWS[row].other:
                    labels[f"{row}-other"] = "  the other version"
            return labels
        if section is CLIENTS:
            return {str(count): f"{count:,}" for count in self.settings.clients}
        if section is ACTIVE:
            return {str(count): f"{count:,}" for count in self.settings.active}
        return {tunnel.key: tunnel.label for tunnel in self.tunnels}

    def median(self, section: str, row: str, key: str) -> float | None:
        """Returns the median of all repeats, None when there are no figures."""
        if key == "rtt_extra":
            mine, direct = self.median(section, row, "rtt_idle"), self.median(section, "direct", "rtt_idle")
            return None if mine is None or direct is None else mine - direct
        values = self.samples.get(section, {}).get(row, {}).get(key)
        return statistics.median(values) if values else None

    def ratio(self, section: str, row: str, key: str) -> float | None:
        """Returns the ratio to direct, and in the section bufferbloat to the other version: None when one of them has no figures."""
        if section == BUFFERBLOAT.key:
            return self.pair_ratio(section, row, f"{row}-other", key)
        mine, direct = self.median(section, row, key), self.median(section, "direct", key)
        return None if mine is None or not direct else mine / direct

    def pair_ratio(self, section: str, row: str, other: str, key: str) -> float | None:
        """Returns the median of the ratios of what was measured in the same repeats, None when one of the rows lacks figures."""
        mine, others = (self.samples.get(section, {}).get(name, {}).get(key, []) for name in (row, other))
        ratios = [value / base for value, base in zip(mine, others) if base]
        return statistics.median(ratios) if ratios and len(mine) == len(others) else None


# ---- reports ---------------------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, str]:
    """Returns what the figures depend on: the machine, and the versions of all programs."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    machine = {
        "cores": str(os.cpu_count()),
        "CPU": model[1] if model else platform.machine(),
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "gevent": importlib.metadata.version("gevent"),
        "tun6": tun6.__version__,
    }
    for program in ("iperf3", "cc", "openvpn", "tincd", "wireguard-go", "ssh"):
        machine[program] = "not installed"
        if shutil.which(program):
            done = subprocess.run([program, "-V" if program == "ssh" else "--version"], capture_output=True, text=True)
            version = re.search(r"\d+(\.\w+)+", done.stdout + done.stderr)
            machine[program] = version[0] if version else "unknown"
    return machine


def format_table(benchmark: Benchmark, section: Section) -> Iterator[str]:
    """Yields the lines of one section's table."""
    faults = benchmark.faults["machine" if section in MACHINE_SECTIONS else section.key]
    widths = [max(len(metric.title), 7 + 7 * metric.ratio) for metric in section.metrics]
    rows = benchmark.rows(section)
    left = max(map(len, rows.values()))
    yield ""
    yield section.title
    yield "  ".join([" " * left, *(f"{metric.title:>{width}}" for metric, width in zip(section.metrics, widths))])
    for row, label in rows.items():
        fault = faults.get(row)
        if row not in benchmark.samples[section.key]:
            if fault:
                yield from textwrap.wrap(f"{label:<{left}}  {fault}", 118, subsequent_indent=" " * (left + 2))
            continue
        cells = [format_figure(benchmark, section.key, row, metric, width) for metric, width in zip(section.metrics, widths)]
        yield "  ".join([f"{label:<{left}}", *cells]).rstrip()
        if fault:
            yield from textwrap.wrap(f"! {fault}", 118, initial_indent=" " * (left + 2), subsequent_indent=" " * (left + 4))


def format_pairs(benchmark: Benchmark) -> Iterator[str]:
    """Yields lines with the ratios of tun6 to the other version, for what the tables show beside direct."""
    for section in benchmark.sections:
        for mine, other in OTHERS.items():
            ratios = [
                f"{metric.title} {ratio:.3f}"
                for metric in section.metrics
                if metric.ratio and (ratio := benchmark.pair_ratio(section.key, mine, other.key, metric.key)) is not None
            ]
            if ratios:
                yield f"{mine} / {other.key}, {section.key}: {', '.join(ratios)}"


def format_figure(benchmark: Benchmark, section: str, row: str, metric: Metric, width: int) -> str:
    """Returns the text of one figure, with its ratio to direct where the metric wants that."""
    value = benchmark.median(section, row, metric.key)
    text = "-" if value is None else f"{value:,.{metric.decimals}f}"
    if metric.ratio:
        ratio = benchmark.ratio(section, row, metric.key)
        text += "       " if ratio is None else f" {ratio:6.{3 if ratio < 10 else 1}f}"
    return f"{text:>{width}}"


def to_json(benchmark: Benchmark, machine: dict[str, str]) -> dict[str, Any]:
    """Returns all samples with their medians, the ratios of these to direct, and how they were measured."""
    return {
        "machine": machine,
        "settings": dataclasses.asdict(benchmark.settings),
        "links": [dataclasses.asdict(link) for link in LINKS + BUFFERBLOAT_LINKS],
        "faults": benchmark.faults,
        "sections": {
            section.key: {
                row: {
                    key: {
                        "median": benchmark.median(section.key, row, key),
                        "ratio": benchmark.ratio(section.key, row, key),
                        "samples": values,
                    }
                    for key, values in metrics.items()
                }
                for row, metrics in benchmark.samples[section.key].items()
            }
            for section in benchmark.sections
        },
    }


def draw_plot(benchmark: Benchmark, path: str, machine: dict[str, str]) -> None:
    """Draws bars for the sections of this machine, and the goodput over the delay for each emulated link."""
    from matplotlib.figure import Figure

    def draw_bars(section: Section, title: str, keys: dict[str, str], scale: str, axes: Any) -> None:
        rows = [tunnel for tunnel in reversed(benchmark.tunnels) if tunnel.key in benchmark.samples[section.key]]
        for number, (key, label) in enumerate(keys.items()):
            places = [at + 0.4 - 0.8 * (number + 0.5) / len(keys) for at in range(len(rows))]
            axes.barh(places, [benchmark.median(section.key, tunnel.key, key) or 0 for tunnel in rows], 0.8 / len(keys), label=label)
        axes.set_yticks(range(len(rows)), [tunnel.label for tunnel in rows])
        axes.set_xscale(scale)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=7)
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_formatter("{x:,g}")

    def draw_goodput_over_delay(link: Link, axes: Any) -> None:
        colours = {tunnel.key: f"C{number}" if number < 10 else "black" for number, tunnel in enumerate(TUNNELS)}
        for tunnel in benchmark.tunnels:
            for name, marker in (("up", "^"), ("down", "v")):
                goodput, delay = (benchmark.median(link.key, tunnel.key, key) for key in (name, f"{name}_rtt"))
                if goodput is not None and delay is not None:
                    axes.plot(
                        delay,
                        goodput,
                        marker,
                        color=colours.get(tunnel.key, "grey"),
                        label=tunnel.label if name == "up" else None,
                        alpha=0.8,
                    )
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("{x:,g}")
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
        axes.set_xlabel("mean round trip meanwhile, ms", fontsize=8)
        axes.set_ylabel("Mbit/s, ▲ up ▼ down", fontsize=8)
        axes.set_title(link.label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:,g}")

    panels: list[Callable[[Any], None]] = []  # each draws into axes of its own
    for section, title, keys, scale in (
        (TCP, "TCP, Mbit/s", {"tcp_up": "up", "tcp_down": "down", "tcp_4": "4 streams"}, "log"),
        (UDP, "64-byte UDP, 1,000 packets/s", {"udp_clean": "<= 1 % loss", "udp_flood": "flood"}, "linear"),
        (RTT, "round trip, ms", {"rtt_idle": "idle", "rtt_load": "during an upload"}, "log"),
    ):
        if benchmark.samples[section.key]:
            panels.append(functools.partial(draw_bars, section, title, keys, scale))
    panels += [functools.partial(draw_goodput_over_delay, link) for link in LINKS if benchmark.samples[link.key]]
    if not panels:
        log.info("nothing to plot")
        return
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 3.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        panel(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels()) if axes.get_xlabel()}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(", ".join(f"{name} {value}" for name, value in list(machine.items())[:6]), fontsize=9)
    figure.savefig(path, dpi=110)


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_selection(names: str | None, quick: bool, beside: bool = False) -> Selection:
    """Returns the rows and sections that --only names, and where it names no row or no section the default. Raises ValueError.

    `beside`: another version is measured, too.
    """
    tunnels = [each for tunnel in TUNNELS for each in (tunnel, OTHERS.get(tunnel.key) if beside else None) if each]
    wanted = set(names.split(",")) if names else set()
    for group in wanted & set(SECTION_GROUPS):
        wanted |= {section.key for section in SECTION_GROUPS[group]}
    if beside:
        wanted |= {OTHERS[key].key for key in wanted & set(OTHERS)}
    unknown = wanted - {tunnel.key for tunnel in tunnels} - {section.key for section in SECTIONS} - set(SECTION_GROUPS)
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; see --help for the names")
    named = [tunnel for tunnel in tunnels if tunnel.key in wanted]
    slow = (*WAN_SECTIONS, ISOLATION, ACTIVE, BUFFERBLOAT)
    return Selection(
        named or [tunnel for tunnel in tunnels if tunnel.quick or not quick],
        named or [tunnel for tunnel in tunnels if tunnel.quick_wan or not quick],
        [section for section in SECTIONS if section.key in wanted]
        or [section for section in SECTIONS if not quick or section not in slow or section.key == "loss1"],
    )


def parse_counts(text: str) -> tuple[int, ...]:
    """Returns the numbers of clients in the value of --clients. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one number or more, such as 100,4000")
    return tuple(map(int, text.split(",")))


def parse_rows(known: Sequence[str], text: str) -> tuple[str, ...]:
    """Returns the rows in the value of --limits or --links, of those that are known. Raises argparse.ArgumentTypeError."""
    rows = tuple(text.split(","))
    unknown = set(rows) - set(known)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {' '.join(known)}")
    return rows


def main() -> int:
    """Runs the program and returns its exit status: 1 when something failed that must work, 2 for usage, 130 for a stop signal."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures tun6 beside direct routing, a C program and other tunnels, in network namespaces. Needs root.",
        epilog=f"rows:     {' '.join(tunnel.key for tunnel in TUNNELS)}\n"
        f"sections: {' '.join(section.key for section in SECTIONS)}; {' '.join(SECTION_GROUPS)} for several\n\n"
        "A tunnel that is not installed is left out and the table says so. On Debian this installs all of them:\n"
        "  apt-get install --no-install-recommends \\\n"
        "    iproute2 nftables iputils-ping iperf3 gcc libc6-dev openssl openvpn tinc wireguard-go wireguard-tools openssh-server",
    )
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: one repeat, short, fewer tunnels, one WAN")
    parser.add_argument("--only", metavar="NAME,...", help="these rows and sections only")
    parser.add_argument("--repeats", type=int, metavar="N", help=f"default: {Settings.repeats}, with --quick {QUICK_SETTINGS.repeats}")
    parser.add_argument("--clients", metavar="N,...", type=parse_counts, help="the rows of the section clients")
    parser.add_argument(
        "--limits",
        metavar="ROW,...",
        type=functools.partial(parse_rows, tuple(LIMIT_ROWS)),
        help=f"the rows of the section limits: {' '.join(LIMIT_ROWS)}",
    )
    parser.add_argument(
        "--links",
        metavar="ROW,...",
        type=functools.partial(parse_rows, tuple(BUFFERBLOAT_ROWS)),
        help=f"the rows of the section bufferbloat: {' '.join(link.key for link in BUFFERBLOAT_LINKS)}, "
        "each also with -tls, -rate (rate_up, rate_down), -direct, and the other rows' names behind it",
    )
    parser.add_argument("--beside", metavar="FILE", help="another version's tun6.py, which is measured in turn with this one")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there, .png or .svg; needs matplotlib")
    options = parser.parse_args()
    try:
        selection = parse_selection(options.only, options.quick, bool(options.beside))
    except ValueError as error:
        parser.error(str(error))
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    settings = QUICK_SETTINGS if options.quick else Settings()
    settings = dataclasses.replace(settings, repeats=options.repeats or settings.repeats, clients=options.clients or settings.clients)
    settings = dataclasses.replace(
        settings,
        limit_rows=options.limits or settings.limit_rows,
        bufferbloat_rows=options.links or settings.bufferbloat_rows,
        beside=options.beside or "",
    )
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    if options.beside and not os.path.isfile(options.beside):
        parser.error(f"--beside: {options.beside} is no file")
    try:
        tun6.require_privilege()
        if options.plot and not importlib.util.find_spec("matplotlib"):
            raise BenchError("--plot needs matplotlib; install it with: pip install matplotlib")
        machine = describe_machine()
        print(textwrap.fill(", ".join(f"{name} {value}" for name, value in machine.items()), 118), flush=True)
        tun6.raise_descriptor_limit()
        gevent.get_hub().NOT_ERROR += (BaseException,)  # open_tunnels raises it, so gevent need not print it
        for number in STOP_SIGNALS:
            signal.signal(number, interrupt)
        with allow_cubic(), tempfile.TemporaryDirectory(prefix="tun6-bench-") as folder:
            benchmark = Benchmark(settings, selection, Path(folder))
            benchmark.run()
    except KeyboardInterrupt:
        log.info("stopped; all namespaces, devices and files are removed")
        return 130
    except tun6.Tun6Error as error:
        print(f"bench_tun6: {error}", file=sys.stderr)
        return 1
    for section in benchmark.sections:
        print(*format_table(benchmark, section), sep="\n", flush=True)
    print(*format_pairs(benchmark), sep="\n", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(to_json(benchmark, machine), indent=1) + "\n")
    if options.plot:
        draw_plot(benchmark, options.plot, machine)
    return int(benchmark.failed)


def interrupt(*_: object) -> NoReturn:
    """Handles a stop signal: raises KeyboardInterrupt, so that everything is undone, and ignores further signals meanwhile."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

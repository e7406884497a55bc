#!/usr/bin/env python3
"""tun6: a stable, routed IPv6 /64 for any machine that can open one IPv4 TCP connection.

A server with a routed IPv6 range gives each client, known by its Id (usually a MAC address), one /64 for ever and carries
that client's IPv6 packets over the client's TCP connection. Usage: `tun6.py server`, `tun6.py client`, `tun6.py demo`.
With keys (`tun6.py keygen`, `tun6.py clients`) it serves only whom it knows, inside TLS.

The path of a packet, from a host on the client's LAN to the Internet (the way back is the same, mirrored):

    LAN host -> client's kernel -> TUN "tun6"                 routed there by the client's default route
                 pump_tun_to_tcp  reads all that waits in the TUN, joins small datagrams, sends one batch of frames (SendQueue)
                 -> TCP over IPv4, through any NAT ->
                 pump_tcp_to_tun  receives, cuts frames (Deframer), drops who may not cross (IngressFilter), writes each into this client's TUN
    server's kernel <- TUN "tun6-0"                           which forwards it to the Internet

The wire, on one TCP connection (README.md has it in full):

    client -> server   {"Id": "00:11:22:aa:bb:cc", "Offload": ["tso6", "uso6"]}
    server -> client   {"Prefix": "2001:db8:1:2::/64", "Offload": ["tso6", "uso6"]}   or {"Error": code, "Text": why}, then close
    both ways          frame frame frame ...

A frame is an IPv6 packet (40 + payload-length bytes; no other length is needed), behind a 10-byte virtio_net_hdr when both
sides sent "Offload". A legacy peer (one that sends no "Offload") gets bare packets, each in a send of its own. Inside TLS, on the
same port, the wire is the same, and the client may add "Key".

The file, top to bottom; a section uses only names defined above it, and the pure ones touch neither socket nor file:

    constants, errors            what ends when each is raised
    pure: wire                   Handshake, messages, offload header, IngressFilter, Deframer, coalesce_datagrams
    pure: prefixes               PrefixPool
    pure: the queue              FqCodelQueue, SendQueue: what waits for a connection that is full
    pure: network plans          what is to be said to `ip`, as do/undo pairs
    edge: batching, stores       GroupCommit, AssignmentStore, KeyStore
    edge: kernel, TUN, identity  Kernel, Tun, default_id
    edge: streams                Stream, TlsStream: a connection's bytes, as they are or inside TLS
    pumps, Session               the two hot loops, and what ends them
    Server, Client
    administration               AdminRequestHandler, and ControlSocket, its Unix socket
    demo                         Lab, a network of namespaces on this machine
    command line                 configuration, logging, signals, exit status
"""

from __future__ import annotations

import argparse
import bisect
import configparser
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import inspect
import io
import ipaddress
import json
import logging
import math
import os
import queue
import re
import resource
import secrets
import signal
import socket as system_socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Callable, Generic, NamedTuple, NoReturn, Optional, TypeVar, Union, cast

try:
    import gevent
    import gevent.event
    import gevent.lock
    import gevent.pool
    import netifaces
    import pytun
    from gevent import socket
except ImportError as missing:
    sys.exit(
        f"tun6: the Python package {'python-pytun' if missing.name == 'pytun' else missing.name} is missing for {sys.executable}; "
        f"install what tun6 needs with: {sys.executable} -m pip install gevent netifaces python-pytun"
    )

__version__ = "0.1.0"

log = logging.getLogger("tun6")
T = TypeVar("T")
R = TypeVar("R")
# As readinto and write of Python's raw files: they give how many bytes they moved, None when that would block, and Read 0 at the end.
Read = Callable[[memoryview], Optional[int]]
Write = Callable[[memoryview], Optional[int]]
Encrypt = Callable[[Union[bytes, bytearray, memoryview]], memoryview]  # plain text to TLS records; valid until the next call

# ---- constants of the wire -------------------------------------------------------------------------------------------

MESSAGE_MAX = 4096  # bytes of a handshake message
MESSAGE_DEPTH = 16  # nested brackets in one; json itself fails with RecursionError at some thousands
ID_MAX = 64  # characters of an Id
KEY_BYTES = 32  # random ones of a key; on the wire and in config.ini in URL-safe base64, RFC 4648 section 5
IPV6_HEADER = 40  # bytes, RFC 8200 section 3
PACKET_MAX = IPV6_HEADER + 0xFFFF  # bytes: the largest that payload-length can say
OFFLOAD_HEADER = struct.Struct("<BBHHHH")  # struct virtio_net_hdr, linux/virtio_net.h, little-endian:
#                                            flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
EMPTY_OFFLOAD_HEADER = bytes(OFFLOAD_HEADER.size)
TLS_HANDSHAKE = 0x16  # first byte of a client that speaks TLS, RFC 8446 section 5.1; { is that of a plain one
NEEDS_CSUM, DATA_VALID = 1, 2  # flags
GSO_NONE, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 4, 5, 0x80  # gso_type
GSO_KINDS = {GSO_TCPV6: "tso6", GSO_TCPV6 | GSO_ECN: "tso6", GSO_UDP_L4: "uso6"}  # as "Offload" names them
UDP_HEADER = 8  # bytes, RFC 768
EXTENSIONS_MAX = 256  # bytes of extension headers in a GSO frame
GSO_SEGMENTS_MAX = 128  # that one frame may become; UDP_MAX_SEGMENTS of linux/udp.h, and we set it for TCP on our TUNs

# ---- constants of this implementation --------------------------------------------------------------------------------

RETRY_S = 2.0  # between two attempts of a client to connect
FINAL = {"denied", "revoked", "tls-required"}  # refusals that will be the same the next time
FINAL_RETRY_S = 60.0  # between two attempts after one of those
CONNECT_S = 10.0  # for one TCP connect
HANDSHAKE_S = 10.0  # for the whole handshake
LEGACY_READ_TIME_S = 0.2  # that a legacy client gets to read the answer, once its kernel has it, before the first frame follows
TCP_CONGESTION, TCP_NOTSENT_LOWAT = 13, 25  # linux/tcp.h; Python has the latter since 3.12
SIOCOUTQ, SIOCOUTQNSD = 0x5411, 0x894B  # linux/sockios.h: bytes that are not acknowledged, not sent
KEEPALIVE = (20, 5, 2)  # seconds idle, seconds between probes, probes: TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT
USER_TIMEOUT_MS = 30_000  # TCP_USER_TIMEOUT: sent data that stays unacknowledged this long ends the connection
BACKLOG = 1024  # connections that wait for accept
ACCEPT_BATCH = 32  # connections accepted before others get their turn
HANDSHAKES_MAX, HANDSHAKES_PER_HOST_MAX = 64, 8  # connections that have not said who they are: in all, from one IPv4 address
DEFER_ACCEPT_S = 5  # that a connection may say nothing without being accepted, TCP_DEFER_ACCEPT; the kernel rounds it up
SLOW_HANDSHAKE_S = 1.0  # for so long none of them has to go for another
TAKEOVERS_MAX, TAKEOVERS_S = 3, 60  # so many of one Id in so many seconds mean that two clients have it
TAKEOVER_PAUSE_S = 5.0  # for each of them then
WARNINGS_MAX, WARNINGS_INTERVAL_S = 20, 60  # warnings of one kind in the log, in so many seconds
SECRET = 0o600  # mode of a file with keys
ACCEPT_PAUSE_S = 0.5  # when accept fails for want of descriptors or memory
BATCH_BYTES = 256 << 10  # bytes moved before others get their turn
RECORD_DATA_MAX = 16 << 10  # bytes in a TLS record: RFC 8446 section 5.1
RECORD_HEADER = 5  # bytes, the last two its length
RECORD_MAX = 17 << 10  # bytes, more than a TLS record with its header: section 5.2
TLS_HANDSHAKE_BYTES_MAX = 32 << 10  # bytes of TLS with which a peer says who it is: certificates, hello, 4 KiB behind it
POST_HANDSHAKE_RECORDS_MAX = 16  # records of TLS itself in a turn: new keys and session tickets, which are rare
BATCH_FRAMES = 1_000  # frames moved, or TLS records opened, likewise: about 5 ms
COALESCED_DATAGRAMS_MAX = 64  # datagrams joined to one frame: UDP_MAX_SEGMENTS before Linux 6.9
COALESCED_BYTES_MAX = 8 << 10  # of such a frame: no more than a link gets before it can send it, see UNSENT_MIN
TUN_CLOSERS = 64  # threads: a TUN takes 24 ms to close, and in threads the closes overlap
LOOKUP_S = 2.0  # that a lookup of the server's name may take before the last good address is tried
DEVICE_REMOVED, DEVICE_SET_DOWN = "somebody removed it", "somebody set it down"  # what may happen to a device of ours
ADDRESS_REMOVED, ROUTE_REMOVED = "somebody removed its address", "somebody removed its route"
EVENTS_LOST = "perhaps somebody removed something of it"  # there was more news than we read
SETTLE_S = 0.1  # after the first sign that somebody changed a device: by then all has happened
LATENCY_INTERVAL_S, LATENCY_SAMPLES = 0.1, 600  # the event loop is asked so often how late it is; so many answers count
LOG_LINES_MAX, LOG_FLUSH_S = 10_000, 1.0  # lines that may wait for whoever reads the log; seconds at the end for that
ROUTE_PROTOCOL = 116  # marks the routes that are ours, `ip -6 route show proto 116`; free in iproute2's rt_protos
OWNER_BASE = 0x74000000  # with the process id added: the metric of its pool's route, behind every real one, and its device group
DEFAULT_METRIC = 1  # of the client's default route: before every other one (router advertisements get 1024)


# ---- constants for real links (a LAN has neither BBR nor a bound on unsent bytes) -------------------------------------

LAN_RTT_US = 2_000  # a path with a shorter round trip is a LAN
UNSENT_S = 0.01  # of data that a socket gets before it can send it: what is behind it can't overtake it
UNSENT_MIN, UNSENT_MAX = 8 << 10, 256 << 10  # bytes, bounds of that; with less, BBR takes us for a sender that has nothing to say
PACING_UPDATE_S = 0.05  # how often that is computed anew
FLUSH_BYTES = 4 << 10  # bytes taken from the queue at a time, so that what comes next can overtake the others
QUANTUM = 1524  # bytes of a flow's turn: a full frame, RFC 8290 section 5.2
# RFC 8289 sections 4.3 and 4.4 have 100 ms and 5 ms. With those, four uploads over 100 Mbit/s, 40 ms and 1 % loss moved 57, 61, 75
# and 75 Mbit/s, with these, in turn, 67, 75, 74 and 70: when the outer TCP mends a loss, all that it carries is late, which is
# no standing queue.
CODEL_INTERVAL_S, CODEL_TARGET_S = 0.2, 0.05
SEND_QUEUE_MAX = 4 << 20  # bytes that may wait for one connection: 50 ms at 640 Mbit/s
SHARED_BUFFER_MAX = 64 << 20  # bytes that may wait for all connections
FRAME_COST = 150  # bytes that a frame takes in memory beside its own: bytearray, tuple, float
TRIM_INTERVAL_S, TRIM_MIN = 1.0, 1 << 20  # how often it is looked whether so many bytes have waited, and do no more
FLOWS_MAX = 1024  # that have a queue of their own; Linux's fq_codel has as many, RFC 8290 section 5.2


# ---- errors: the class says what ends --------------------------------------------------------------------------------


class Tun6Error(Exception):
    """Root of all errors of tun6; its text is one sentence for the user."""

    exit_status = 1


class ConfigError(Tun6Error):
    """Ends the process, before it has done anything: usage, config.ini or the assignments file."""

    exit_status = 2


class KernelError(Tun6Error):
    """`ip` or a TUN device failed: ends the session, and at the start the process."""


class StorageError(Tun6Error):
    """An assignment could not be saved: ends the handshake of its client."""


class RequestError(Tun6Error):
    """What the operator asked for can't be done; nothing has changed."""

    exit_status = 2


class SessionError(Tun6Error):
    """Ends the session."""


class ProtocolError(SessionError):
    """The peer broke a rule of the wire: ends the session, as a stream of frames can't be resynchronised."""


class Refusal(SessionError):
    """The server won't serve this client; code as in README's wire protocol, text for people."""

    def __init__(self, code: str, text: str, detail: str = "") -> None:
        """`detail`: what only the server's log is to say."""
        super().__init__(f"{code}: {detail or text}")
        self.code, self.text, self.detail = code, text, detail


# ---- pure: wire ------------------------------------------------------------------------------------------------------


def encode_message(message: dict[str, Any]) -> bytes:
    """The bytes of one handshake message."""
    return json.dumps(message).encode("ascii")


class MessageParser:
    """Finds the one JSON object that a connection begins with, however it is cut into segments."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._depth = 0  # of brackets
        self._in_string = self._escaped = False

    def feed(self, data: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Takes received bytes; gives None until the closing brace, then the object and the bytes behind it (frames).

        Raises ProtocolError for what is not one object of at most MESSAGE_MAX bytes of UTF-8.
        """
        for at, byte in enumerate(data):
            self._text.append(byte)
            if len(self._text) > MESSAGE_MAX:
                raise ProtocolError(f"handshake message longer than {MESSAGE_MAX} bytes")
            if self._closes(byte):
                return self._parse(), data[at + 1 :]
        return None

    def _closes(self, byte: int) -> bool:
        """Follows strings and brackets over one more byte; True for the one that closes the object."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif byte == ord("\\"):
                self._escaped = True
            elif byte == ord('"'):
                self._in_string = False
            return False
        if not self._depth and byte != ord("{"):
            raise ProtocolError("handshake message does not begin with {")
        if byte == ord('"'):
            self._in_string = True
        elif byte in b"{[":
            self._depth += 1
            if self._depth > MESSAGE_DEPTH:
                raise ProtocolError(f"handshake message with more than {MESSAGE_DEPTH} nested brackets")
        elif byte in b"}]":
            self._depth -= 1
        return not self._depth

    def _parse(self) -> dict[str, Any]:
        try:
            message = json.loads(self._text.decode("utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
            raise ProtocolError(f"handshake message is not JSON: {error}") from None
        assert isinstance(message, dict)  # it began with a brace
        return message


def is_id(text: object) -> bool:
    """Whether it may be an Id: 1 to ID_MAX printable characters."""
    return isinstance(text, str) and 1 <= len(text) <= ID_MAX and text.isprintable()


def parse_offload(message: dict[str, Any]) -> frozenset[str] | None:
    """The GSO kinds that the sender of this message can take; None from a legacy peer."""
    kinds = message.get("Offload")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ProtocolError("Offload is not a list of strings")
    return frozenset(kinds)


class Hello(NamedTuple):
    """What a client says."""

    id: str
    kinds: frozenset[str] | None  # as of parse_offload
    key: str  # "" when it gave none


def parse_hello(message: dict[str, Any]) -> Hello:
    """Raises ProtocolError."""
    if not is_id(message.get("Id")):
        raise ProtocolError(f"Id is not a string of 1 to {ID_MAX} printable characters")
    key = message.get("Key", "")
    if not isinstance(key, str):
        raise ProtocolError("Key is not a string")
    return Hello(message["Id"], parse_offload(message), key)


def parse_answer(message: dict[str, Any]) -> tuple[IPv6Network, frozenset[str] | None]:
    """Prefix and offload kinds of a server's message. Raises Refusal for an Error, ProtocolError."""
    if "Error" in message:
        raise Refusal(printable(message["Error"]), printable(message.get("Text", "")))
    try:
        prefix = parse_network(message.get("Prefix"), strict=False)
        require_unicast(prefix)
    except ValueError as error:
        raise ProtocolError(f"Prefix {printable(message.get('Prefix'))!r} is no unicast IPv6 network: {printable(error)}") from None
    if prefix.prefixlen != 64:
        raise ProtocolError(f"Prefix {prefix} is not a /64")
    return prefix, parse_offload(message)


def printable(text: object, limit: int = 200) -> str:
    """A peer's text made safe for one line of a log or terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:limit])


def parse_network(text: object, strict: bool = True) -> IPv6Network:
    """As IPv6Network, but takes neither numbers nor scopes (RFC 4007: anything behind a %). Raises ValueError."""
    if not isinstance(text, str) or "%" in text:
        raise ValueError("it is not written like 2001:db8:1:2::/64")
    return IPv6Network(text, strict=strict)


def require_unicast(network: IPv6Network) -> None:
    """Raises ValueError for a network whose addresses nobody could use as global ones (RFC 4291 section 2.4)."""
    for special, name in (("::/64", "loopback"), ("fe80::/10", "link-local"), ("ff00::/8", "multicast")):
        if network.overlaps(IPv6Network(special)):
            raise ValueError(f"it contains {name} addresses")


def check_offload(header: memoryview, length: int, kinds: frozenset[str]) -> None:
    """Checks a virtio_net_hdr that came with a packet of `length` bytes before the kernel sees it.

    `kinds` are the GSO kinds that we offered. Raises ProtocolError. Rules: struct virtio_net_hdr in linux/virtio_net.h,
    virtio_net_hdr_to_skb() in the kernel, and GSO_SEGMENTS_MAX.
    """
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset = OFFLOAD_HEADER.unpack(header)
    if flags not in (0, NEEDS_CSUM):
        raise ProtocolError(f"offload header with flags {flags:#x}")
    if hdr_len > length:
        raise ProtocolError(f"offload header with hdr_len {hdr_len} in a packet of {length} bytes")
    if flags and not IPV6_HEADER <= csum_start <= csum_start + csum_offset + 2 <= length:
        raise ProtocolError(f"offload header with a checksum at {csum_start} + {csum_offset} in a packet of {length} bytes")
    if gso_type == GSO_NONE:
        return
    kind = GSO_KINDS.get(gso_type)
    if kind not in kinds:
        raise ProtocolError(f"offload header with gso_type {gso_type:#x}, which was not offered")
    if not flags:
        raise ProtocolError("offload header with a gso_type but no checksum to fill in")
    if csum_start > IPV6_HEADER + EXTENSIONS_MAX:  # older kernels cut from where the transport header is, whatever this says
        raise ProtocolError(f"offload header with a gso_type and a checksum at {csum_start}")
    transport = 60 if kind == "tso6" else 8  # bytes of header, at most: they are not part of any segment's gso_size
    if length - csum_start - transport > gso_size * GSO_SEGMENTS_MAX or not gso_size:
        raise ProtocolError(f"offload header with gso_size {gso_size} for {length} bytes: over {GSO_SEGMENTS_MAX} segments")


class IngressFilter:
    """Which packets may cross the ingress_filter of a client's /64, by the upper halves of their addresses; counts the others.

    What comes from a client has a source in its /64 (RFC 2827), what comes from its server a destination there. The other
    address is outside, and none that is only for one link or host (RFC 4291 section 2.4): so neither side can feed
    the other's kernel router advertisements, redirects, or packets in somebody else's name.
    """

    def __init__(self, prefix: IPv6Network, from_client: bool, closed: IPv6Network | None = None) -> None:
        """`closed`: a range that is not to be reached, either."""
        self.inside = int(prefix.network_address) >> 64
        self.from_client = from_client
        self._closed = closed
        self.refused: Counter[str] = Counter()  # by reason

    def permits(self, source: int, destination: int) -> bool:
        """Whether a packet with these upper halves may cross."""
        near, far = (source, destination) if self.from_client else (destination, source)
        if near != self.inside:
            reason = "outside its /64"
        elif far == self.inside:
            reason = "within its /64"
        elif far >> 56 == 0xFF:
            reason = "multicast"
        elif far >> 54 == 0xFE80 >> 6:
            reason = "link-local"
        elif not far:
            reason = "loopback"
        elif self._closed and IPv6Address(far << 64) in self._closed:
            reason = "to another client"
        else:
            return True
        self.refused[reason] += 1
        return False


class Deframer:
    """Cuts what one TCP connection brings into frames, without those that may not cross the ingress_filter.

    `buffer` may belong to the whole process: nothing stays in it between two calls but what `pull` gave out, which
    is valid until the next use of the buffer. `kinds` as in check_offload, None when frames are bare packets.
    """

    def __init__(self, buffer: bytearray, kinds: frozenset[str] | None, ingress_filter: IngressFilter) -> None:
        assert len(buffer) >= 2 * (OFFLOAD_HEADER.size + PACKET_MAX)
        self._buffer, self._view = buffer, memoryview(buffer)
        self._kinds, self._ingress_filter = kinds, ingress_filter
        self._rest = b""  # the beginning of a frame

    def push(self, data: bytes) -> list[memoryview]:
        """The frames that are complete with these bytes, of which there are at most MESSAGE_MAX."""
        have = len(self._rest) + len(data)
        self._view[:have] = self._rest + data
        return self._cut(have)

    def pull(self, read: Read, most: int) -> list[memoryview]:
        """The frames that are complete after one call of `read`, for `most` bytes.

        Raises EOFError at the end, ProtocolError, and what `read` raises; after the latter pull can be called again.
        """
        kept = len(self._rest)
        if kept:
            self._view[:kept] = self._rest
        got = read(self._view[kept : kept + most])
        if got:
            return self._cut(kept + got)
        if got is None:
            return []
        raise EOFError

    # Offload header but csum_offset, which matters only with flags; version nibble, payload length, next header; upper halves
    # of source and destination.
    _WITH_HEADER = struct.Struct(">QxxBxxxHBxQ8xQ8x")
    _BARE = struct.Struct(">BxxxHBxQ8xQ8x")

    def _cut(self, have: int) -> list[memoryview]:
        buffer, view, frames, at = self._buffer, self._view, [], 0
        kinds, ingress_filter = self._kinds, self._ingress_filter
        shortest = IPV6_HEADER if kinds is None else OFFLOAD_HEADER.size + IPV6_HEADER
        unpack_with, unpack_bare = self._WITH_HEADER.unpack_from, self._BARE.unpack_from
        while at + shortest <= have:
            if kinds is None:
                offload, (first, payload, following, source, destination) = 0, unpack_bare(buffer, at)
            else:
                offload, first, payload, following, source, destination = unpack_with(buffer, at)
            if first >> 4 != 6:
                raise ProtocolError(f"frame that begins with {first:#04x} is no IPv6 packet")
            if not payload and not following:  # a hop-by-hop header of no length: RFC 2675, and the kernel's BIG TCP
                raise ProtocolError("frame is a jumbogram")
            end = at + shortest + payload
            if end > have:
                break
            if offload and kinds is not None:  # small packets mostly have none
                check_offload(view[at : at + OFFLOAD_HEADER.size], IPV6_HEADER + payload, kinds)
            if ingress_filter.permits(source, destination):
                frames.append(view[at:end])
            at = end
        self._rest = bytes(view[at:have]) if at < have else b""
        return frames


_SHORTEST = OFFLOAD_HEADER.size + IPV6_HEADER  # bytes
_unpack_to_send = struct.Struct(">BBxxxxxxxxBxxxHB").unpack_from  # flags, gso_type; version nibble, payload length, next header


def is_sendable(buffer: memoryview, at: int, length: int, kinds: frozenset[str] | None) -> bool:
    """Whether what one read of a TUN put into the buffer (offload header and packet) may go to a peer that takes these GSO kinds.

    Not what is no IPv6 packet or has no length that the wire could say (IPv4, jumbograms, BIG TCP); nor what waited in the TUN
    from a time when its peer took more. Clears the flag that drivers set for the kernel's own use.
    """
    if length < _SHORTEST:
        return False
    flags, gso_type, first, payload, following = _unpack_to_send(buffer, at)
    if flags or gso_type:
        if flags & DATA_VALID:
            flags &= ~DATA_VALID
            buffer[at] = flags
        if (flags or gso_type) and (kinds is None or (gso_type and GSO_KINDS.get(gso_type) not in kinds)):
            return False
    return bool(first >> 4 == 6 and payload == length - _SHORTEST and (payload or following))


_OPEN_UDP = OFFLOAD_HEADER.pack(NEEDS_CSUM, GSO_NONE, 0, 0, IPV6_HEADER, 6)  # of a datagram whose checksum is still to be filled in
# Offload header; version to flow label; payload length; next header to ports; UDP length.
_unpack_datagram = struct.Struct(">10s4sH38sHxx").unpack_from


def coalesce_datagrams(frames: memoryview, ends: list[int]) -> list[int]:
    """Makes one GSO frame of neighbours that are datagrams of one UDP flow and of one size (the last may be shorter).

    Works in place, and gives the new ends; arguments as of SendQueue.send. The peer's kernel takes and routes such a frame as one
    packet, where each small one costs as much. Cut apart again, they are as they were: none joins whose checksum is wrong.
    """
    joined: list[int] = []
    kind = label = flow = b""  # what the datagrams of the last frame have in common
    start = to = begin = datagrams = size = 0  # place of that frame; beginning of the next; its datagrams, the length of each
    for end in ends:
        its_kind, its_label, length, its_flow, udp_length = _unpack_datagram(frames, begin)
        if (
            its_flow == flow
            and UDP_HEADER < length <= size
            and length == udp_length
            and its_label == label
            and its_kind == kind
            and datagrams < COALESCED_DATAGRAMS_MAX
            and to - start + length < COALESCED_BYTES_MAX
            and (kind == _OPEN_UDP or (_has_valid_checksum(frames[begin:end]) and (datagrams > 1 or _has_valid_checksum(frames[start:to]))))
        ):
            datagrams += 1
            grown = to + length - UDP_HEADER
            frames[to:grown] = frames[end - length + UDP_HEADER : end]
            joined[-1] = to = grown
            if length < size:
                flow = b""  # it was the last
        else:
            if datagrams > 1:
                _write_gso_headers(frames[start:to], size)
            start, to = to, to + end - begin
            if start != begin:
                frames[start:to] = frames[begin:end]
            joined.append(to)
            datagrams = 1
            kind, label, size = its_kind, its_label, length
            flow = its_flow if its_flow[0] == 17 and length == udp_length and kind in (_OPEN_UDP, EMPTY_OFFLOAD_HEADER) else b""
        begin = end
    if datagrams > 1:
        _write_gso_headers(frames[start:to], size)
    return joined


def _has_valid_checksum(frame: memoryview) -> bool:
    """Whether the checksum of a UDP datagram is there and right: with the pseudo header, RFC 8200 section 8.1, the sum of all is 0."""
    udp = frame[_SHORTEST:]
    summed = int.from_bytes(frame[OFFLOAD_HEADER.size + 8 :], "big") << 8 * (len(frame) % 2)  # 2**16 is 1, modulo 0xFFFF
    return bool((udp[6] or udp[7]) and (summed + len(udp) + 17) % 0xFFFF == 0)


def _write_gso_headers(frame: memoryview, size: int) -> None:
    """Makes the first datagram's headers those of the frame of datagrams of `size` bytes, UDP header included."""
    length = len(frame) - _SHORTEST
    addresses = int.from_bytes(frame[OFFLOAD_HEADER.size + 8 : _SHORTEST], "big")
    OFFLOAD_HEADER.pack_into(frame, 0, NEEDS_CSUM, GSO_UDP_L4, IPV6_HEADER + UDP_HEADER, size - UDP_HEADER, IPV6_HEADER, 6)
    struct.pack_into(">H", frame, OFFLOAD_HEADER.size + 4, length)
    struct.pack_into(">HH", frame, _SHORTEST + 4, length, (addresses + length + 17) % 0xFFFF)


# ---- pure: prefixes --------------------------------------------------------------------------------------------------


class PrefixPool:
    """Which Id owns which /64 of a range. Every method takes constant time (assign: amortised), however full it is."""

    def __init__(self, network: IPv6Network) -> None:
        """`network` is /64 or shorter."""
        self.network = network
        self.size = 1 << (64 - network.prefixlen)  # /64s
        self._base = int(network.network_address) >> 64
        self._index_of: dict[str, int] = {}
        self._owner_of: dict[int, str] = {}
        self._released: list[int] = []
        self._next = 0  # every index below is owned or released

    def owners(self) -> list[str]:
        """All Ids that own a /64."""
        return list(self._index_of)

    def find(self, id_: str) -> IPv6Network | None:
        """The /64 that the Id owns."""
        index = self._index_of.get(id_)
        return None if index is None else self._prefix(index)

    def assign(self, id_: str) -> IPv6Network:
        """The Id's /64: the one it owns, one that was released, or the lowest that never had an owner. Raises Refusal."""
        index = self._index_of.get(id_)
        if index is None:
            index = self._free_index()
            self._own(id_, index)
        return self._prefix(index)

    def pin(self, id_: str, prefix: IPv6Network) -> None:
        """Gives the Id this /64; one that it has already stays reserved for it until `free`.

        Raises ValueError when it is no /64 of the range, or belongs to another Id.
        """
        index = (int(prefix.network_address) >> 64) - self._base
        if prefix.prefixlen != 64:
            raise ValueError(f"{prefix} is not a /64")
        if not 0 <= index < self.size:
            raise ValueError(f"{prefix} is outside {self.network}")
        if self._owner_of.get(index, id_) != id_:
            raise ValueError(f"{prefix} is already the prefix of {self._owner_of[index]!r}")
        self._own(id_, index)

    def unreserve(self, prefix: IPv6Network) -> None:
        """Lets others have a /64 that was its Id's before that one got another, and is no other's."""
        index = (int(prefix.network_address) >> 64) - self._base
        if index in self._owner_of and self._index_of.get(self._owner_of[index]) != index:
            del self._owner_of[index]
            self._released.append(index)

    def release(self, id_: str) -> None:
        """Takes back what the Id owns, as it never heard of it. Raises KeyError."""
        index = self._index_of.pop(id_)
        del self._owner_of[index]
        self._released.append(index)

    def _free_index(self) -> int:
        while self._released:
            index = self._released.pop()
            if index not in self._owner_of:  # it may have been pinned since
                return index
        while self._next < self.size:
            self._next += 1
            if self._next - 1 not in self._owner_of:
                return self._next - 1
        raise Refusal("pool-exhausted", f"no free /64 in {self.network}")

    def _own(self, id_: str, index: int) -> None:
        self._index_of[id_], self._owner_of[index] = index, id_

    def _prefix(self, index: int) -> IPv6Network:
        return IPv6Network(((self._base + index) << 64, 64))


# ---- pure: the queue before a blocked socket --------------------------------------------------------------------------


class FlowQueue:
    """The frames of one flow, and CoDel's state for them: RFC 8289 section 5.2, with its names."""

    __slots__ = ("bytes", "count", "deficit", "drop_next", "dropping", "first_above_time", "frames", "key", "lastcount")

    def __init__(self, key: bytes | int) -> None:
        self.key = key
        self.frames: deque[tuple[float, bytearray]] = deque()  # time of arrival, frame
        self.bytes = 0
        self.deficit = QUANTUM
        self.dropping = False
        self.first_above_time = self.drop_next = 0.0
        self.count = self.lastcount = 0


class SharedBuffer:
    """What several queues share: bytes that may wait in all of them.

    Each may grow to what is left for the others, as in M. Choudhury and E. Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches", 1998: few queues have all they want, and many can't fill the memory.
    """

    def __init__(self, size: int) -> None:
        self.size = self.free = size


class FqCodelQueue:
    """FQ-CoDel (RFC 8290) for frames that a blocked socket does not take: a queue a flow, sparse flows first.

    Flows beyond FLOWS_MAX share as many more queues by a hash of their key, as all do in the RFC: a new flow with each
    packet would otherwise grow the state without bound and keep the old ones from their turn for ever. Times in seconds
    of any one clock. What is dropped or marked is counted.
    """

    def __init__(
        self,
        target: float = CODEL_TARGET_S,
        interval: float = CODEL_INTERVAL_S,
        limit: int = SEND_QUEUE_MAX,
        shared: SharedBuffer | None = None,
    ) -> None:
        """`limit`: bytes that may wait; `room`: what it shares with other queues, until it is cleared."""
        self._target, self._interval, self._limit = target, interval, limit
        self._shared = shared or SharedBuffer(8 * limit)
        self._flows: dict[bytes | int, FlowQueue] = {}
        self._new: deque[FlowQueue] = deque()
        self._old: deque[FlowQueue] = deque()
        self._longest = 0  # bytes: no flow has more
        self._long: list[FlowQueue] = []  # those that had at least half of the longest when it was last looked for
        self.bytes = self.frames = self.dropped = self.marked = 0

    def push(self, frame: bytearray, now: float) -> None:
        """A frame that arrived now. When too much waits, the longest flow (or one at least half as long) loses its oldest."""
        key: bytes | int = self._key(frame)
        shared = hash(key) % FLOWS_MAX  # bytes hash differently in each process: nobody can aim at a queue
        flow = self._flows.get(key) or self._flows.get(shared)
        if flow is None:
            key = key if len(self._flows) < FLOWS_MAX else shared
            flow = self._flows[key] = FlowQueue(key)
            self._new.append(flow)
        flow.frames.append((now, frame))
        flow.bytes += len(frame)
        self.bytes += len(frame)
        self._shared.free -= len(frame) + FRAME_COST
        self.frames += 1
        self._longest = max(self._longest, flow.bytes)
        while self.bytes > min(self._limit, self._shared.free):
            self._take(self._long_flow(flow))
            self.dropped += 1

    def pop(self, now: float) -> bytearray | None:
        """The frame to be sent next; None when there is none."""
        while self._new or self._old:
            queue = self._new or self._old
            flow = queue[0]
            if flow.deficit <= 0:
                flow.deficit += QUANTUM
                self._old.append(queue.popleft())
                continue
            frame = self._codel(flow, now)
            if frame is None:
                queue.popleft()
                if queue is self._new and self._old:  # RFC 8290 section 4.2: not at once new again
                    self._old.append(flow)
                else:
                    del self._flows[flow.key]
                continue
            flow.deficit -= len(frame)
            return frame
        self._longest = 0
        self._long.clear()
        return None

    def clear(self) -> None:
        """Forgets what waits."""
        self._shared.free += self.bytes + FRAME_COST * self.frames
        self.bytes = self.frames = self._longest = 0
        for each in (self._flows, self._new, self._old, self._long):
            each.clear()

    def _long_flow(self, flow: FlowQueue) -> FlowQueue:
        """This flow or else another, with at least half of the longest one's bytes.

        All of them at a time, so that looking is rare: for the very longest, each frame would wait for O(flows), which with
        a new flow in each packet held the event loop for seconds.
        """
        while 2 * flow.bytes < self._longest:
            if not self._long:
                self._longest = max(flow.bytes for flow in self._flows.values())
                self._long = [flow for flow in self._flows.values() if 2 * flow.bytes >= self._longest]
            flow = self._long[-1]
            if 2 * flow.bytes < self._longest:
                self._long.pop()
        return flow

    def _key(self, frame: bytearray) -> bytes:
        """What packets of one flow have in common: addresses, next header, and ports or the Id of an echo."""
        at = OFFLOAD_HEADER.size
        following = frame[at + 6]
        ports = frame[at + 44 : at + 46] if following == 58 else frame[at + 40 : at + 44] if following in (6, 17) else b""
        return bytes(frame[at + 6 : at + 7] + frame[at + 8 : at + 40] + ports)

    def _take(self, flow: FlowQueue) -> tuple[float, bytearray]:
        arrived, frame = flow.frames.popleft()
        flow.bytes -= len(frame)
        self.bytes -= len(frame)
        self._shared.free += len(frame) + FRAME_COST
        self.frames -= 1
        return arrived, frame

    def _dodequeue(self, flow: FlowQueue, now: float) -> tuple[bytearray | None, bool]:
        if not flow.frames:
            flow.first_above_time = 0
            return None, False
        arrived, frame = self._take(flow)
        if now - arrived < self._target or flow.bytes <= QUANTUM:
            flow.first_above_time = 0
        elif not flow.first_above_time:
            flow.first_above_time = now + self._interval
        elif now >= flow.first_above_time:
            return frame, True
        return frame, False

    def _codel(self, flow: FlowQueue, now: float) -> bytearray | None:
        frame, ok_to_drop = self._dodequeue(flow, now)
        if flow.dropping:
            if not ok_to_drop:
                flow.dropping = False
            while flow.dropping and now >= flow.drop_next:
                flow.count += 1
                marked = self._mark(frame)
                if not marked:
                    frame, ok_to_drop = self._dodequeue(flow, now)
                if not ok_to_drop:
                    flow.dropping = False
                else:
                    flow.drop_next += self._interval / math.sqrt(flow.count)
                if marked:
                    break
        elif ok_to_drop:
            if not self._mark(frame):
                frame, _ = self._dodequeue(flow, now)
            flow.dropping = True
            delta = flow.count - flow.lastcount
            flow.count = delta if delta > 1 and now - flow.drop_next < 16 * self._interval else 1
            flow.drop_next = now + self._interval / math.sqrt(flow.count)
            flow.lastcount = flow.count
        return frame

    def _mark(self, frame: bytearray | None) -> bool:
        """Sets CE in a packet whose sender knows ECN (RFC 3168 section 5); else counts it as dropped."""
        assert frame is not None
        at = OFFLOAD_HEADER.size + 1  # the low half of the traffic class begins this byte
        if frame[at] & 0x30:
            frame[at] |= 0x30
            self.marked += 1
            return True
        self.dropped += 1
        return False


class SendQueue:
    """What goes to one peer. While the connection takes everything there is no queue; when it does not, frames wait in a FqCodelQueue."""

    def __init__(
        self,
        write: Write,
        bare: bool,
        encrypt: Encrypt | None = None,
        clock: Callable[[], float] = time.monotonic,
        whole_batches: bool = True,
        shared: SharedBuffer | None = None,
    ) -> None:
        """bare: each packet is written by itself, without its offload header; `encrypt` encrypts what is written; `room`: see FqCodelQueue.

        whole_batches: a whole batch is encrypted, if there is no queue; else it comes in small pieces from the queue, as what is
        encrypted can't be overtaken any more.
        """
        self._write, self._bare, self._encrypt, self._clock, self._whole_batches = write, bare, encrypt, clock, whole_batches
        self._queue = FqCodelQueue(shared=shared)
        self._begun = memoryview(b"")  # the rest of what the connection took in part
        self.blocked = False  # something waits for the connection

    @property
    def dropped(self) -> int:
        """Frames that waited too long."""
        return self._queue.dropped

    def close(self) -> None:
        """Forgets what waits."""
        self._queue.clear()

    def send(self, frames: memoryview, ends: list[int]) -> None:
        """Takes frames, each with its offload header, that lie one behind the other; `ends` says where each one ends."""
        taken = 0
        if not self.blocked and self._whole_batches:
            if self._bare:
                taken = self._send_each(frames, ends)
            elif self._encrypt:
                taken = len(ends)
                data = self._encrypt(frames[: ends[-1]])
                self._begun = memoryview(bytes(data[self._write(data) or 0 :]))
            else:
                sent = self._write(frames[: ends[-1]]) or 0
                taken = len(ends) if sent == ends[-1] else self._taken(frames, ends, sent)
            if taken == len(ends) and not self._begun:
                return
        self.blocked = True
        now = self._clock()
        begin = ends[taken - 1] if taken else 0
        for end in ends[taken:]:
            self._queue.push(bytearray(frames[begin:end]), now)
            begin = end

    def flush(self) -> None:
        """Writes what waits, until the connection is full, nothing waits, or it has been a batch: others get their turn."""
        now, size = self._clock(), 0
        few = self._queue.frames - BATCH_FRAMES
        while size < BATCH_BYTES and (self._begun or (self._queue.frames > few and self._begin(now))):
            size += len(self._begun)
            self._begun = self._begun[self._write(self._begun) or 0 :]
            if self._begun:
                return
        self.blocked = self._queue.frames > 0

    def _begin(self, now: float) -> bool:
        """Takes the next few frames from the queue; few, as what is behind them could be more urgent a moment later."""
        frames: list[bytearray] = []
        size = 0
        while size < FLUSH_BYTES and (frame := self._queue.pop(now)) is not None:
            frames.append(frame)
            size += len(frame)
            if self._bare:
                break
        if frames:
            data = frames[0][OFFLOAD_HEADER.size :] if self._bare else b"".join(frames)
            self._begun = memoryview(bytes(self._encrypt(data)) if self._encrypt else data)
        return bool(frames)

    def _taken(self, frames: memoryview, ends: list[int], sent: int) -> int:
        """Gives how many frames the connection took with so many bytes, one that it took in part among them."""
        whole = bisect.bisect_right(ends, sent)
        if sent == (ends[whole - 1] if whole else 0):
            return whole
        self._begun = memoryview(bytes(frames[sent : ends[whole]]))
        return whole + 1

    def _send_each(self, frames: memoryview, ends: list[int]) -> int:
        begin = 0
        for number, end in enumerate(ends):
            packet = frames[begin + OFFLOAD_HEADER.size : end]
            data = self._encrypt(packet) if self._encrypt else packet
            sent = self._write(data) or 0
            if sent < len(data):
                begun = bool(sent or self._encrypt)  # what is encrypted has to be sent
                self._begun = memoryview(bytes(data[sent:])) if begun else self._begun
                return number + begun
            begin = end
        return len(ends)


# ---- pure: network plans ---------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One command for `ip -6 -batch`, and the one that undoes it; None where removing the device does."""

    do: str
    undo: str | None = None


def pool_plan(pool: IPv6Network, process: int) -> list[Step]:
    """Traffic to prefixes that no client holds ends here, not in a loop between us and the provider's router."""
    route = f"unreachable {pool} metric {OWNER_BASE + process} proto {ROUTE_PROTOCOL}"
    return [Step(f"route add {route}", f"route del {route}")]


def parse_pools(routes: str) -> list[tuple[IPv6Network, int]]:
    """Pool and process of each pool_plan that stands in what `ip -6 route show proto 116` says."""
    found = re.findall(r"^unreachable (\S+) .*metric (\d+)", routes, re.MULTILINE)
    return [(IPv6Network(pool), int(metric) - OWNER_BASE) for pool, metric in found if int(metric) > OWNER_BASE]


def device_plan(device: str, mtu: int) -> list[Step]:
    """Brings a TUN up, without a link-local address; what it sends in one piece becomes GSO_SEGMENTS_MAX packets at most."""
    return [
        Step(f"link set dev {device} mtu {mtu} gso_max_segs {GSO_SEGMENTS_MAX} addrgenmode none"),
        Step(f"link set dev {device} up"),  # in one command with addrgenmode, this would come first
    ]


def server_plan(device: str, mtu: int, prefix: IPv6Network) -> list[Step]:
    """A session's device on the server."""
    return [*device_plan(device, mtu), Step(f"route add {prefix} dev {device} proto {ROUTE_PROTOCOL}")]


def client_plan(device: str, mtu: int, default_route: bool) -> list[Step]:
    """The client's device, before it has an address. An existing default route stays, behind ours."""
    route = f"route add default dev {device} metric {DEFAULT_METRIC} proto {ROUTE_PROTOCOL}"
    return [*device_plan(device, mtu), *([Step(route)] if default_route else [])]


def address_plan(device: str, prefix: IPv6Network, process: int) -> list[Step]:
    """The client's own address, ::1 of its prefix. What no LAN of the client has must not go back into the tunnel (RFC 7084, WPD-5)."""
    address = f"{prefix[1]}/128 dev {device}"
    return [Step(f"addr add {address} nodad", f"addr del {address}"), *pool_plan(prefix, process)]


# ---- edge: batching and the stores -----------------------------------------------------------------------------------


class GroupCommit(Generic[T, R]):
    """Group commit: one call of `work` handles all items that wait at the moment, the next ones gather while it runs.

    `work` takes the items in order and gives as many results; what it raises, all of its callers get.
    """

    def __init__(self, work: Callable[[list[T]], list[R]]) -> None:
        self._work = work
        self._waiting: list[tuple[T, gevent.event.AsyncResult]] = []
        self._worker: gevent.Greenlet | None = None

    def __call__(self, item: T) -> R:
        """Waits for the item's turn and gives its result. Raises what `work` does. Killing the caller does not stop the work."""
        outcome = gevent.event.AsyncResult()
        self._waiting.append((item, outcome))
        if self._worker is None:
            self._worker = gevent.spawn(self._commit_waiting)
        return cast(R, outcome.get())

    def _commit_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = self._work([item for item, _ in batch])
            except Exception as error:  # it is for whoever waits
                for _, outcome in batch:
                    outcome.set_exception(error)
            else:
                for (_, outcome), result in zip(batch, results):
                    outcome.set(result)
        self._worker = None


def in_thread(function: Callable[..., R], *args: Any) -> R:
    """Runs what blocks in a thread; the event loop goes on."""
    return cast(R, gevent.get_hub().threadpool.apply(function, args))


class JsonFile:
    """A JSON object in a file, replaced whole at every save: it is never half written, and lasts."""

    ADVICE = "mend the entry, or move the file away to begin an empty one"

    def __init__(self, path: str, holds: str, mode: int) -> None:
        """`holds`: what is in it, for messages; `mode` of a new file; an old one keeps its own, but nobody is let into a SECRET one."""
        self.path = Path(os.path.realpath(path))  # a symbolic link stays one
        self._holds, self._mode, self._most = holds, mode, mode if mode == SECRET else 0o777

    def version(self) -> tuple[int, ...]:
        """Another one whenever it is another file, or somebody wrote it; () when it is not there."""
        with suppress(OSError):
            found = self.path.stat()
            return found.st_ino, found.st_mtime_ns, found.st_size
        return ()

    def load(self) -> list[tuple[str, Any]]:
        """Its entries; missing or empty has none. Raises ConfigError."""
        if self.path.exists() and not self.path.is_file():  # every save replaces it: /dev/null would be a file from then on
            raise ConfigError(f"{self.path} is no regular file; name another one")
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}; make it readable, or name another file") from None
        if not text.strip():
            return []
        try:
            entries = json.loads(text.decode("utf-8"), object_pairs_hook=list)
            if not text.lstrip().startswith(b"{"):
                raise ValueError('it is not one object {"<id>": ..., ...}')
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path} is not a file of {self._holds}: {error}; {self.ADVICE}") from None
        ids = set()
        for id_, _ in entries:
            if not is_id(id_):
                raise self.entry_error(id_, f"the Id is not 1 to {ID_MAX} printable characters")
            if id_ in ids:
                raise self.entry_error(id_, "the Id is there twice")
            ids.add(id_)
        return cast("list[tuple[str, Any]]", entries)

    def entry_error(self, id_: object, why: object) -> ConfigError:
        """The error that an entry is."""
        return ConfigError(f"{self.path}: entry {printable(id_)!r}: {printable(why)}; {self.ADVICE}")

    def save(self, entries: dict[str, Any]) -> None:
        """In a thread: when this returns, the file has these entries for good. Raises StorageError."""
        try:
            in_thread(self._write, entries)
        except OSError as error:
            raise StorageError(f"{self.path} can't be written: {error.strerror}") from error

    def _write(self, entries: dict[str, Any]) -> None:
        new = self.path.with_name(self.path.name + ".new")
        try:
            self._replace(new, entries)
        except OSError:
            with suppress(OSError):
                new.unlink()  # on a full disk, others need the room
            raise

    def _replace(self, new: Path, entries: dict[str, Any]) -> None:
        # each entry on a line of its own; one json.dumps of all would hold the interpreter, and so the event loop, all the time
        lines = (f"{json.dumps(id_)}: {json.dumps(value)}" for id_, value in entries.items())
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode), "w", encoding="ascii") as file:
            if self.path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(self.path.stat().st_mode) & self._most)
            file.write("{\n " + ",\n ".join(lines) + "\n}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class AssignmentStore:
    """The map Id -> /64, in memory and, with a path, in a JSON file {"<id>": "<prefix>/64", ...}.

    One process at a time: the lock is on `<path>.lock`, as `<path>` itself is replaced at every save.
    """

    def __init__(self, pool: PrefixPool, path: str | None = None) -> None:
        """Locks and reads the file; missing or empty is an empty map. Raises ConfigError, which names the entry at fault."""
        self.pool = pool
        self._file = JsonFile(path, "assignments", 0o644) if path else None
        self._saved: dict[str, str] = {}
        self._failing = False  # and the log has said so
        self._changing: dict[str, gevent.event.Event] = {}  # by Id: set when that is done
        self._save = GroupCommit(self._save_batch)
        if self._file:
            self._lock = self._lock_file(self._file.path)
            try:
                self._load(self._file)
            except ConfigError:
                self.close()
                raise

    @property
    def path(self) -> Path | None:
        """Of the file, without symbolic links."""
        return self._file.path if self._file else None

    def assign(self, id_: str) -> IPv6Network:
        """The Id's /64, saved before it is returned.

        Raises Refusal when the pool is exhausted, StorageError when it can't be saved; the Id then owns nothing new.
        """
        with self._exclusive(id_):
            known = self.pool.find(id_)
            if known:
                return known
            prefix = self.pool.assign(id_)
            self._save((id_, str(prefix)))
            return prefix

    def pin(self, id_: str, prefix: IPv6Network) -> None:
        """Gives the Id this /64 instead of the one it may have, and saves that.

        Raises ValueError when it is no free /64 of the range, StorageError when it can't be saved; then all is as before.
        """
        with self._exclusive(id_):
            old = self.pool.find(id_)
            if old == prefix:
                return
            self.pool.pin(id_, prefix)
            try:
                self._save((id_, str(prefix)))
            except Exception:  # whatever it is, the Id keeps what it had
                if old:
                    self.pool.pin(id_, old)
                raise
            if old:
                self.pool.unreserve(old)

    @contextmanager
    def _exclusive(self, id_: str) -> Iterator[None]:
        """Nobody else changes or learns the prefix of this Id meanwhile, which may not be on disk yet."""
        while id_ in self._changing:
            self._changing[id_].wait()
        done = self._changing[id_] = gevent.event.Event()
        try:
            yield
        finally:
            del self._changing[id_]
            done.set()

    def close(self) -> None:
        """Gives up the lock."""
        if self._file and self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @staticmethod
    def _lock_file(path: Path) -> int | None:
        try:
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            raise ConfigError(f"{path}: its folder does not exist; make it, or name another file") from None
        except OSError as error:
            log.warning("%s.lock: %s; nothing keeps a second server off these assignments", path, error.strerror)
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(f"{path} is in use by another tun6 server; stop that one, or give this one another file") from None
        return lock

    def _load(self, file: JsonFile) -> None:
        for id_, prefix in file.load():
            try:
                if not isinstance(prefix, str):
                    raise ValueError("the prefix is not a string")
                self.pool.pin(id_, parse_network(prefix))
            except ValueError as error:
                raise file.entry_error(id_, error) from None
            self._saved[id_] = prefix

    def _save_batch(self, entries: list[tuple[str, str]]) -> list[None]:
        if self._file:
            everything = {**self._saved, **dict(entries)}
            try:
                self._file.save(everything)
            except Exception as error:  # whatever it is, an Id that is not on disk must not be taken for known
                for id_, _ in entries:
                    self.pool.release(id_)
                log.log(logging.DEBUG if self._failing else logging.ERROR, "%s; known Ids are served, new ones refused until it can", error)
                self._failing = True
                raise
            self._saved = everything
            if self._failing:
                log.info("%s can be written again", self.path)
                self._failing = False
        return [None] * len(entries)


class KeyEntry(NamedTuple):
    """What the server knows of an Id's key."""

    digest: str  # SHA-256 of the key's text, hexadecimal; the key has 256 random bits, so nothing slower is needed
    revoked: bool


class KeyStore:
    """Which Ids may come in, and with which key, in a JSON file {"<id>": {"key": "sha256:<digest>", "revoked": true}, ...}."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError, which names the entry at fault."""
        self._file = JsonFile(path, "keys", SECRET)
        self._entries: dict[str, KeyEntry] = {}
        self._version: tuple[int, ...] = ()  # of the file that they are from
        self._changing = gevent.lock.RLock()
        self.reload()

    @property
    def path(self) -> Path:
        """Of the file, without symbolic links."""
        return self._file.path

    def reload(self) -> None:
        """Reads the file anew. Raises ConfigError, and then knows what it knew."""
        with self._changing:
            self._reload()

    def _reload(self) -> None:
        version = self._file.version()
        if self._entries and not self.path.exists():
            raise ConfigError(f"{self.path} is not there any more; put it back, or an empty one in its place to keep everybody out")
        entries = {}
        for id_, value in self._file.load():
            fields = dict(value) if isinstance(value, list) and all(isinstance(item, tuple) for item in value) else {}
            digest = fields.get("key")
            known = isinstance(digest, str) and re.fullmatch("sha256:[0-9a-f]{64}", digest) and not set(fields) - {"key", "revoked"}
            if not known or len(fields) != len(value):
                raise self._file.entry_error(id_, 'it is not {"key": "sha256:<64 hexadecimal digits>"}, perhaps with "revoked": true')
            if not isinstance(fields.get("revoked", False), bool):
                raise self._file.entry_error(id_, "revoked is neither true nor false")
            entries[id_] = KeyEntry(cast(str, digest)[len("sha256:") :], fields.get("revoked", False))
        self._entries, self._version = entries, version

    def find(self, id_: str) -> KeyEntry | None:
        """What is known of this Id's key."""
        return self._entries.get(id_)

    def ids(self) -> list[str]:
        """All that have a key."""
        return list(self._entries)

    def check(self, id_: str, key: str) -> None:
        """Raises Refusal unless this is the Id's key. To the client, an unknown Id and a wrong key look and last the same."""
        entry = self._entries.get(id_, UNKNOWN_CLIENT)
        right = hmac.compare_digest(key_digest(key), entry.digest)
        if not right or entry is UNKNOWN_CLIENT:
            raise Refusal("denied", "unknown Id or wrong key", "wrong key" if id_ in self._entries else "unknown Id")
        if entry.revoked:
            raise Refusal("revoked", "this Id was revoked by the server's operator")

    def issue(self, id_: str) -> str:
        """Makes and saves a new key for the Id, in place of the one it may have, and gives its text. Raises RequestError, StorageError."""
        key = secrets.token_urlsafe(KEY_BYTES)
        self._change(id_, KeyEntry(key_digest(key), False))
        return key

    def set_revoked(self, id_: str, revoked: bool) -> None:
        """Raises KeyError, RequestError, StorageError."""
        self._change(id_, self._entries[id_]._replace(revoked=revoked))

    def _change(self, id_: str, entry: KeyEntry) -> None:
        with self._changing:
            if self._file.version() not in ((), self._version):  # () is what a failed save says better
                raise RequestError(f"{self.path} was edited and is not read yet; tell the server to (`kill -HUP`), and try again")
            entries = {**self._entries, id_: entry}
            self._file.save(
                {id_: {"key": "sha256:" + digest, **({"revoked": True} if revoked else {})} for id_, (digest, revoked) in entries.items()}
            )
            self._entries, self._version = entries, self._file.version()


def key_digest(key: str) -> str:
    """As KeyEntry has it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


UNKNOWN_CLIENT = KeyEntry(key_digest(secrets.token_urlsafe(KEY_BYTES)), False)  # whom an unknown Id is compared with


# ---- edge: kernel, TUN, identity -------------------------------------------------------------------------------------


class Kernel:
    """Runs plans with `ip`; all that wait at the moment share one process of 2 ms."""

    def __init__(self) -> None:
        self._run = GroupCommit(self._run_batch)

    def apply(self, plan: Sequence[Step]) -> None:
        """Does the steps. Raises KernelError when one fails, after undoing the others."""
        failures = self._run([step.do for step in plan])
        if failures:
            self.undo([step for number, step in enumerate(plan) if number not in failures])
            number, reason = min(failures.items())
            raise KernelError(f"`ip -6 {plan[number].do}` failed: {reason}")

    def reapply(self, plan: Sequence[Step]) -> None:
        """Does again those of the steps that others may have undone; what stands fails, and stays."""
        self._run([step.do for step in plan])

    def undo(self, plan: Sequence[Step]) -> None:
        """Undoes the steps, last first; what is gone already is as it should be."""
        undone = [step.undo for step in reversed(plan) if step.undo]
        for number, reason in self._run(undone).items() if undone else ():
            log.debug("`ip -6 %s` failed: %s", undone[number], reason)

    def remove_stale_pools(self) -> None:
        """Removes the unreachable routes of servers and clients that were killed."""
        for pool, process in parse_pools(in_thread(self._show_routes)):
            if process == os.getpid() or not Path(f"/proc/{process}").exists():  # ours: in a container every start has the same
                log.info("removing the route of %s, which a killed tun6 has left", pool)
                self.undo(pool_plan(pool, process))

    def remove_devices(self, names: Sequence[str]) -> None:
        """Removes many devices at once, 1,000 in 0.3 s, where one by one each takes 24 ms."""
        group = OWNER_BASE + os.getpid()
        self._run([*(f"link set dev {name} group {group}" for name in names), f"link del group {group}"])

    def _run_batch(self, jobs: list[list[str]]) -> list[dict[int, str]]:
        """Gives, for each list of commands, the number and reason of those that failed."""
        commands = [(job, number, command) for job, commands in enumerate(jobs) for number, command in enumerate(commands)]
        failures: list[dict[int, str]] = [{} for _ in jobs]
        try:
            done = in_thread(self._ip, "".join(f"{command}\n" for _, _, command in commands))
        except OSError as error:
            return [
                dict.fromkeys(range(len(commands)), f"`ip` can't be run: {error.strerror}; it comes with iproute2") for commands in jobs
            ]
        reasons: list[str] = []
        for line in done.stderr.splitlines():
            failed = re.fullmatch(r"Command failed -:(\d+)", line)
            if failed:
                job, number, _ = commands[int(failed[1]) - 1]
                failures[job][number] = "; ".join(reasons) or "for no stated reason"
                reasons = []
            else:
                reasons.append(line.replace("RTNETLINK answers: ", "").strip())
        if done.returncode < 0 or (done.returncode and not any(failures)):  # nobody knows to which commands it came
            return [{0: "; ".join(reasons) or f"`ip` ended with {done.returncode}"} for _ in jobs]
        return failures

    @staticmethod
    def _show_routes() -> str:
        try:
            return subprocess.run(["ip", "-6", "route", "show", "proto", str(ROUTE_PROTOCOL)], capture_output=True, text=True).stdout
        except OSError:  # the next command says so
            return ""

    @staticmethod
    def _ip(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", "-6", "-force", "-batch", "-"], input=text, capture_output=True, text=True)


class Tun:
    """A TUN device that always has a virtio_net_hdr before each packet; the only user of pytun.

    Read and write frames with `file` (`fd` is its descriptor), one at a time; instead of blocking, it gives None, as Python's files do.
    """

    IFF_VNET_HDR, TUNSETVNETLE, TUNSETOFFLOAD = 0x4000, 0x400454DC, 0x400454D0  # linux/if_tun.h, as are the next
    CSUM, TSO6, USO = 0x01, 0x04, 0x20 | 0x40  # TUN_F_...; USO for both IP versions, since Linux 6.2

    def __init__(self, name: str) -> None:
        """Makes the device; in `name` the kernel fills a %d with the next free number. Raises KernelError."""
        try:
            self._device = pytun.TunTapDevice(name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI | self.IFF_VNET_HDR)
        except (pytun.Error, OSError) as error:
            code, reason = error.args if len(error.args) == 2 else (0, str(error))
            advice = {
                errno.ENOENT: "load the kernel's module with `modprobe tun`",
                errno.EPERM: "run tun6 as root",
                errno.EACCES: "run tun6 as root",
                errno.EBUSY: "another program has a device of this name; end it, or set another `tun` in config.ini",
            }.get(code, "see the kernel's log")
            raise KernelError(f"TUN device {name} can't be made: {reason}; {advice}") from None
        self.name: str = self._device.name
        self.fd: int = self._device.fileno()
        self.file = io.FileIO(self.fd, "r+", closefd=False)
        try:
            self._set_up()
        except (KernelError, OSError) as error:
            self.close()
            raise error if isinstance(error, KernelError) else tun_error(self.name, error) from None

    def _set_up(self) -> None:
        os.set_blocking(self.fd, False)
        os.set_inheritable(self.fd, False)  # a child would keep the device alive
        fcntl.ioctl(self.fd, self.TUNSETVNETLE, struct.pack("i", 1))
        for key in ("accept_ra", "accept_redirects", "autoconf"):  # the peer must not change this machine's routes
            try:
                Path(f"/proc/sys/net/ipv6/conf/{self.name}/{key}").write_text("0")
            except OSError as error:
                log.warning("TUN device %s: %s can't be turned off: %s", self.name, key, error.strerror)
        self.kinds = frozenset({"tso6", "uso6"} if self._offload(self.USO) else {"tso6"} if self._offload(0) else ())
        if "uso6" not in self.kinds:
            log_missing_offloads(self.kinds)
        self.set_offload(None)

    def set_offload(self, kinds: frozenset[str] | None) -> None:
        """From now on reads may bring GSO packets of these kinds and open checksums; None: finished packets only. Raises KernelError."""
        if kinds is not None and self._offload(self.USO if {"tso6", "uso6"} <= kinds & self.kinds else 0, "tso6" in kinds):
            return
        try:
            fcntl.ioctl(self.fd, self.TUNSETOFFLOAD, 0)
        except OSError as error:
            raise tun_error(self.name, error) from None

    def close(self) -> None:
        """Removes the device with its addresses and routes. Takes 24 ms, in a thread. Nobody may still wait for `fd`."""
        in_thread(self._device.close)

    def _offload(self, more: int, tso: bool = True) -> bool:
        try:
            fcntl.ioctl(self.fd, self.TUNSETOFFLOAD, self.CSUM | (self.TSO6 if tso else 0) | more)
            return True
        except OSError:
            return False


def tun_error(name: str, error: OSError) -> KernelError:
    """What a failed read or write says of the TUN."""
    reason = {errno.EBADFD: DEVICE_REMOVED, errno.EIO: DEVICE_SET_DOWN}.get(error.errno or 0, error.strerror)
    return KernelError(f"TUN device {name}: {reason}")


class DeviceMonitor:
    """Says at once when somebody removes a device of ours, sets it down, or takes its address or route away: rtnetlink(7)."""

    NEWLINK, DELLINK, DELADDR, NEWROUTE, DELROUTE = 16, 17, 21, 24, 25  # linux/rtnetlink.h, as are the next
    GROUPS = 0x1 | 0x100 | 0x400  # RTMGRP_LINK, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE
    IFA_ADDRESS, RTA_OIF = 1, 4
    SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33  # asm-generic/socket.h
    IFF_UP, SIOCGIFFLAGS = 0x1, 0x8913  # linux/if.h, linux/sockios.h

    def __init__(self) -> None:
        self._lost: dict[int, Callable[[str, bytes], None]] = {}  # by index of the device
        self._pending: set[tuple[int, str, bytes]] = set()

    def add(self, device: str, lost: Callable[[str, bytes], None]) -> int:
        """From now on `lost` is told what was taken from the device, and with an address which one. Gives what `discard` takes."""
        try:
            index = system_socket.if_nametoindex(device)
        except OSError:  # it is gone already: whoever reads or writes it finds out
            return 0
        self._lost[index] = lost
        return index

    def discard(self, index: int) -> None:
        """No more."""
        self._lost.pop(index, None)

    def run(self) -> None:
        """Until it is killed."""
        try:
            with self._open() as sock:
                while True:
                    self._read(sock)
        except OSError as error:
            log.warning("what others do to our devices can't be watched: %s", error.strerror)
        finally:
            self._lost.clear()  # whoever ends undoes: nobody is to put anything back meanwhile

    def _read(self, sock: socket.socket) -> None:
        try:
            messages = sock.recv(1 << 16)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            log.debug("the kernel had more news of devices than we read")
            for index in list(self._lost):
                self._suspect(index, EVENTS_LOST, b"")
        else:
            for index, what, address in parse_losses(messages):
                self._suspect(index, what, address)

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        with suppress(OSError):  # not in an unprivileged container, where EVENTS_LOST comes more often
            sock.setsockopt(socket.SOL_SOCKET, self.SO_RCVBUFFORCE, 4 << 20)
        with suppress(OSError):  # it only spares us what `parse_losses` drops: all routes of a router
            sock.setsockopt(socket.SOL_SOCKET, self.SO_ATTACH_FILTER, self._filter())
        sock.bind((0, self.GROUPS))
        return sock

    def _filter(self) -> bytes:
        """A struct sock_fprog, linux/filter.h: no new routes, and of removed ones only ours."""
        load_half, load_byte, equal, give = 0x28, 0x30, 0x15, 0x06
        deleted, new = (int.from_bytes(struct.pack("=H", kind), "big") for kind in (self.DELROUTE, self.NEWROUTE))
        program = [
            (load_half, 0, 0, 4),  # nlmsg_type, which the filter takes for big-endian
            (equal, 0, 2, deleted),
            (load_byte, 0, 0, 16 + 5),  # rtm_protocol
            (equal, 1, 2, ROUTE_PROTOCOL),
            (equal, 1, 0, new),
            (give, 0, 0, 0xFFFF_FFFF),
            (give, 0, 0, 0),
        ]
        self._program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
        return struct.pack("HP", len(program), ctypes.addressof(self._program))

    def _suspect(self, index: int, what: str, address: bytes) -> None:
        sign = index, what, address
        if index in self._lost and sign not in self._pending:
            self._pending.add(sign)
            gevent.spawn_later(SETTLE_S, self._look, sign)

    def _look(self, sign: tuple[int, str, bytes]) -> None:
        """Tells of it: a device that is removed loses its address and routes first, and one that was just made was not up yet."""
        self._pending.discard(sign)
        index, what, address = sign
        try:
            name = system_socket.if_indextoname(index)
            with system_socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                ifreq = fcntl.ioctl(sock, self.SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
            if not struct.unpack_from("H", ifreq, 16)[0] & self.IFF_UP:
                what = DEVICE_SET_DOWN
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENODEV):  # for want of a descriptor nobody knows
                return
            what = DEVICE_REMOVED
        if what and index in self._lost:
            self._lost[index](what, address)


def parse_losses(messages: bytes) -> Iterator[tuple[int, str, bytes]]:
    """What messages of rtnetlink say was taken away: index of the device, what ("" for the device itself), the address."""
    at = 0
    while at + 16 <= len(messages):
        length, kind = struct.unpack_from("=IH", messages, at)
        body = messages[at + 16 : at + length]
        at += max(length, 16) + 3 & ~3
        if kind in (DeviceMonitor.NEWLINK, DeviceMonitor.DELLINK) and len(body) >= 16:
            family, index, flags = struct.unpack_from("=BxxxiI", body)
            if family == 0 and (kind == DeviceMonitor.DELLINK or not flags & DeviceMonitor.IFF_UP):
                yield index, "", b""
        elif kind == DeviceMonitor.DELADDR and len(body) >= 8:
            yield int.from_bytes(body[4:8], sys.byteorder), ADDRESS_REMOVED, parse_attributes(body[8:]).get(DeviceMonitor.IFA_ADDRESS, b"")
        elif kind == DeviceMonitor.DELROUTE and len(body) >= 12 and body[5] == ROUTE_PROTOCOL:
            yield int.from_bytes(parse_attributes(body[12:]).get(DeviceMonitor.RTA_OIF, b""), sys.byteorder), ROUTE_REMOVED, b""


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a message of rtnetlink, by type."""
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind] = data[at + 4 : at + length]
        at += max(length, 4) + 3 & ~3
    return found


@functools.cache
def log_missing_offloads(kinds: frozenset[str]) -> None:
    """Says once what this kernel can't do, and why that is no fault."""
    what = "UDP packets (Linux 6.2 and newer can)" if kinds else "packets"
    log.info("this kernel hands %s to a TUN only one by one: it works, but slower", what)


def default_id() -> str:
    """The MAC address of the interface that has the IPv4 default route. Raises SessionError when there is none."""
    try:
        _, interface = netifaces.gateways()["default"][netifaces.AF_INET][:2]
    except KeyError:
        raise SessionError(
            "no IPv4 default route, whose interface would give the Id; connect the network, or set `id` in config.ini"
        ) from None
    try:
        address: str = netifaces.ifaddresses(interface)[netifaces.AF_LINK][0]["addr"]
    except (KeyError, ValueError):
        raise SessionError(f"{interface} has the IPv4 default route but no MAC address to be the Id; set `id` in config.ini") from None
    return address


def sysctl(name: str) -> str:
    """The value of a sysctl such as net.ipv6.conf.all.forwarding; "" when there is no such one."""
    try:
        return Path("/proc/sys", *name.split(".")).read_text().strip()
    except OSError:
        return ""


# ---- edge: streams ---------------------------------------------------------------------------------------------------


class Stream:
    """The bytes of one connection, as they are.

    While two messages are exchanged, `receive` and `send` wait; then the pumps use `readinto`, and `encrypt` and `write`.
    """

    encrypt: Encrypt | None = None
    security = ""  # for the log

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        file = io.FileIO(sock.fileno(), "r+", closefd=False)
        self.readinto: Read = file.readinto
        self.write: Write = file.write  # to the socket: what `encrypt` gave, if there is one

    def receive(self) -> bytes:
        """What comes next. Raises EOFError, OSError, ProtocolError."""
        data: bytes = self.sock.recv(MESSAGE_MAX)
        if not data:
            raise EOFError
        return data

    def send(self, data: bytes) -> None:
        """Sends it all. Raises OSError."""
        self.sock.sendall(data)


# Of the process, as those of the pumps; a turn brings no more than they take. Fresh memory of that size would cost more than to encrypt.
_ciphertext_buffer = memoryview(bytearray(BATCH_BYTES + OFFLOAD_HEADER.size + PACKET_MAX))
_record_buffer = memoryview(bytearray(len(_ciphertext_buffer) + 3 * RECORD_MAX))


class TlsStream(Stream):
    """A connection inside TLS. Its records are taken from memory, many with one read of the socket; `ssl`'s sockets read twice for each.

    A MemoryBIO keeps the size of the most that it ever held, so that it is given no more than one record at a time.
    """

    security = ", over TLS"

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str | None = None) -> None:
        """Does the TLS handshake; `server_name`, as which the server has to identify itself, where the context asks for that.

        Raises ProtocolError, EOFError, OSError.
        """
        super().__init__(sock)
        self._read_socket = self.readinto
        self.readinto = self._read_records
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._header = b""  # the begin of a record's header, not in `_incoming` yet
        self._missing = 0  # bytes of the record whose begin is there
        self._greeting = 0  # bytes that came before the pumps
        self._share = 1  # of the room that a turn has, the part that is read: 1 / this
        server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side, None if server_side else server_name)
        self._wait_for(self._tls.do_handshake)

    def fingerprint(self) -> str:
        """Of the peer's certificate: "sha256:" and 64 hexadecimal digits."""
        return fingerprint_of(self._tls.getpeercert(binary_form=True) or b"")

    def receive(self) -> bytes:
        """All that has come: nothing of it may stay behind in memory when the pumps begin to wait for the socket."""
        data = self._wait_for(self._tls.read, MESSAGE_MAX)
        if not data:
            raise EOFError
        with _tls_errors(), suppress(ssl.SSLWantReadError):
            while more := self._tls.read(RECORD_MAX):
                data += more
        return data

    def send(self, data: bytes) -> None:
        """Sends it all. Raises OSError, ProtocolError."""
        self.sock.sendall(bytes(self.encrypt(data)))

    def encrypt(self, data: bytes | bytearray | memoryview) -> memoryview:
        """The records that say this, behind what TLS itself has to say; valid until the next call. Raises ProtocolError."""
        filled = 0
        with _tls_errors():
            for at in range(0, len(data), RECORD_DATA_MAX):
                self._tls.write(data[at : at + RECORD_DATA_MAX])
                record = self._outgoing.read()
                _record_buffer[filled : filled + len(record)] = record
                filled += len(record)
        return _record_buffer[:filled]

    def _wait_for(self, step: Callable[..., R], *args: Any) -> R:
        """The result of a step that needs more from the peer, or has something to say to it."""
        with _tls_errors():
            while True:
                try:
                    return step(*args)
                except ssl.SSLWantReadError:
                    pass
                finally:
                    if self._outgoing.pending:
                        self.sock.sendall(self._outgoing.read())
                data = super().receive()
                self._greeting += len(data)
                if self._greeting > TLS_HANDSHAKE_BYTES_MAX:
                    raise ProtocolError(f"more than {TLS_HANDSHAKE_BYTES_MAX} bytes of TLS, and the handshake is not over")
                gevent.sleep()  # recv does not wait for a peer that floods
                for piece in self._pieces(memoryview(self._header + data)):
                    self._incoming.write(piece)

    def _pieces(self, data: memoryview) -> Iterator[memoryview]:
        """Cuts what came, and `_header` before it, behind each record; `_missing` is then 0."""
        at = 0
        while at < len(data):
            if not self._missing:
                if len(data) - at < RECORD_HEADER:
                    break
                self._missing = RECORD_HEADER + int.from_bytes(data[at + RECORD_HEADER - 2 : at + RECORD_HEADER], "big")
            piece = data[at : at + self._missing]
            at += len(piece)
            self._missing -= len(piece)
            yield piece
        self._header = bytes(data[at:])

    def _read_records(self, view: memoryview) -> int | None:
        """A Read. What it leaves in memory is less than a record, as the view has room for all others."""
        begin = len(self._header)
        _ciphertext_buffer[:begin] = self._header
        got = self._read_socket(_ciphertext_buffer[begin : begin + (len(view) - RECORD_MAX - begin) // self._share])
        if not got:
            return got
        if self._outgoing.pending > RECORD_MAX:
            raise ProtocolError("the other side asks for more new keys than it takes")
        filled = records = chatter = 0
        with _tls_errors():
            for piece in self._pieces(_ciphertext_buffer[: begin + got]):
                self._incoming.write(piece)
                if not self._missing:
                    records += 1
                    try:
                        filled += cast(int, self._tls.read(len(view) - filled, cast(bytearray, view[filled:])))
                    except ssl.SSLWantReadError:  # it was of TLS itself
                        chatter += 1
                        if chatter > POST_HANDSHAKE_RECORDS_MAX:
                            raise ProtocolError("the other side says more of TLS itself than it has reason to") from None
        self._share = 8 if records > BATCH_FRAMES // self._share else 1
        return filled or None


@contextmanager
def _tls_errors() -> Iterator[None]:
    """ReadinessCallbacks what `ssl` raises into an error of ours."""
    try:
        yield
    except ssl.SSLWantReadError:
        raise
    except ssl.SSLZeroReturnError:
        raise EOFError from None
    except ssl.SSLCertVerificationError as error:
        raise ProtocolError(f"the server's certificate is not to be trusted: {error.verify_message}") from None
    except ssl.SSLError as error:
        reason = "the other side does not speak TLS" if error.reason == "WRONG_VERSION_NUMBER" else error.reason or str(error)
        raise ProtocolError(f"TLS failed: {reason.replace('_', ' ').lower() if reason.isupper() else reason}") from None


def fingerprint_of(certificate: bytes) -> str:
    """Of a certificate in DER."""
    return "sha256:" + hashlib.sha256(certificate).hexdigest()


def server_tls(path: str) -> ssl.SSLContext:
    """TLS with the certificate and key of this PEM file. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    context.num_tickets = 0  # nothing comes back but new connections
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE  # the weaker CPU is a client's, mostly, and says what is fast for it
    try:
        context.load_cert_chain(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{path} is not a certificate with its key: {error.reason or error}; `tun6.py keygen` makes one") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; `tun6.py keygen` makes one") from None
    return context


def client_tls(pinned: bool) -> ssl.SSLContext:
    """TLS to a server whose certificate the caller compares (pinned), or which the system's authorities vouch for."""
    if pinned:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # neither authority nor date, as a Raspberry Pi has no clock
    else:
        context = ssl.create_default_context()
    _harden(context)
    if not has_aes():
        # Python can't order the ciphers of TLS 1.3, where AES is first; in software ChaCha20 is several times as fast.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+CHACHA20:ECDHE+AESGCM")
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; all that TLS 1.3 has are good


def has_aes() -> bool:
    """Whether this CPU has instructions for AES; on x86 the flag is among `flags`, on ARM among `Features`."""
    return re.search(r"^(flags|Features)\s*:.*\baes\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None


# ---- pumps -----------------------------------------------------------------------------------------------------------

SHARED_BUFFER = SharedBuffer(SHARED_BUFFER_MAX)  # of all sessions' queues
# One pair of buffers for the process, not for each session: a pump never switches while it has something in them.
_tun_buffer = memoryview(bytearray(BATCH_BYTES + OFFLOAD_HEADER.size + PACKET_MAX))
_tcp_buffer = bytearray(BATCH_BYTES + OFFLOAD_HEADER.size + PACKET_MAX)


@dataclass
class TrafficCounters:
    """What a session has moved."""

    sent: int = 0  # bytes of frames, TUN -> TCP; those that were late among them
    received: int = 0  # bytes of frames, TCP -> TUN
    dropped: int = 0  # packets that could not go on
    late: int = 0  # packets that waited too long for the connection


class ReadinessCallbacks:
    """Calls a function whenever `source` can be read and, while it is `blocked`, `sink` can be written, for the greenlet that runs it.

    The function is called in the hub, so it may not wait for anything; to switch to the greenlet and back for each call would cost
    0.03 of 0.35 ms of an idle round trip. The watchers stay started: `hub.wait` would start and stop them each time, another 0.1.
    """

    def __init__(self, source: int, sink: int | None = None) -> None:
        self._hub = gevent.get_hub()
        self._source = self._hub.loop.io(source, 1)
        self._sink = self._hub.loop.io(source if sink is None else sink, 2)
        self._turn: Callable[[], None]
        self.blocked = False

    def run(self, turn: Callable[[], None]) -> NoReturn:
        """Raises what `turn` raises."""
        wake = gevent.getcurrent().switch
        failed: list[BaseException] = []

        def guarded() -> None:
            try:
                turn()
            except BaseException as error:  # the greenlet's business
                self._stop()
                failed.append(error)
                wake()

        self._turn = guarded
        self._source.start(guarded)
        try:
            self._hub.switch()
            raise failed[0]
        finally:
            self._stop()
            self._source.close()
            self._sink.close()

    def block(self, blocked: bool) -> None:
        """Whether room to write is waited for, too."""
        self.blocked = blocked
        if blocked:
            self._sink.start(self._turn)
        else:
            self._sink.stop()

    def _stop(self) -> None:
        self._source.stop()
        self._sink.stop()


def pump_tun_to_tcp(tun: Tun, fd: int, send_queue: SendQueue, kinds: frozenset[str] | None, traffic: TrafficCounters) -> NoReturn:
    """Sends what the TUN gives, all that waits there as one batch, through the send_queue of the connection `fd`.

    `kinds`: the GSO kinds that the peer takes, None for a legacy peer.

    Raises KernelError when the TUN fails, OSError when the connection does.
    """
    view, frame_max, read = _tun_buffer, OFFLOAD_HEADER.size + PACKET_MAX, tun.file.readinto
    joins = kinds is not None and "uso6" in kinds
    turns = ReadinessCallbacks(tun.fd, fd)
    most = 1

    def turn() -> None:
        nonlocal most
        have, room = 0, view
        ends: list[int] = []
        try:
            for _ in range(most):  # those that can not be sent among them
                got = read(room)
                if got is None:
                    break
                if is_sendable(view, have, got, kinds):
                    have += got
                    ends.append(have)
                    if have >= BATCH_BYTES:
                        break
                else:
                    traffic.dropped += 1
                room = view[have : have + frame_max]
        except OSError as error:
            raise tun_error(tun.name, error) from None
        found = len(ends)
        if found:
            small = joins and found > 1 and have < found * COALESCED_BYTES_MAX // 2  # large ones are no datagrams to be joined
            send_queue.send(view, coalesce_datagrams(view, ends) if small else ends)
            traffic.sent += have
        if send_queue.blocked:
            send_queue.flush()
            traffic.late = send_queue.dropped
        # after a small lone packet the next one is sent before looking for more
        most = 1 if found <= 1 < most and have < QUANTUM else BATCH_FRAMES
        if send_queue.blocked != turns.blocked:
            turns.block(send_queue.blocked)

    turns.run(turn)


def pump_tcp_to_tun(fd: int, read: Read, tun: Tun, deframer: Deframer, early: bytes, bare: bool, traffic: TrafficCounters) -> NoReturn:
    """Writes what `read` brings from the connection `fd` into the TUN, a frame at a time; `early` came behind the handshake.

    Raises EOFError or OSError when the connection ends, KernelError when the TUN fails, ProtocolError.
    """

    def write_bare(packet: memoryview) -> int:
        return os.writev(tun.fd, [EMPTY_OFFLOAD_HEADER, packet])

    write: Write = write_bare if bare else tun.file.write
    size = BATCH_BYTES  # bytes that a turn may bring: less from a peer whose frames are small

    def write_all(frames: list[memoryview]) -> None:
        for frame in frames:
            try:
                if write(frame) is None:
                    traffic.dropped += 1
                traffic.received += len(frame)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise ProtocolError("frame that the kernel refuses as a packet") from None
                if error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM):
                    raise tun_error(tun.name, error) from None
                traffic.dropped += 1

    def turn() -> None:
        nonlocal size
        frames = deframer.pull(read, size)
        write_all(frames)
        size = BATCH_BYTES if len(frames) < BATCH_FRAMES * size // BATCH_BYTES else BATCH_BYTES // 8

    write_all(deframer.push(early))
    ReadinessCallbacks(fd).run(turn)


# ---- Session ---------------------------------------------------------------------------------------------------------


def set_tcp_options(sock: socket.socket) -> None:
    """Sends at once, and notices a dead peer: after KEEPALIVE when idle, after USER_TIMEOUT_MS when not."""
    idle, interval, probes = KEEPALIVE
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


class CongestionControls(NamedTuple):
    """Names of TCP congestion controls; None for the system's default."""

    link: str | None  # on a real link
    lan: str | None


class PacedWriter:
    """Writes to a connection over a real link no more than that can send in UNSENT_S.

    Bytes that the kernel holds unsent are a queue that nobody manages, as ours is. TCP_NOTSENT_LOWAT alone lets in 64 KiB more.
    """

    def __init__(self, sock: socket.socket, write: Write, whole: bool) -> None:
        """`write` is that of the connection; whole: what is written is not to be cut."""
        self._sock, self._write, self._whole = sock, write, whole
        self._limit = UNSENT_MIN
        self._unsent = bytearray(4)
        self._retune_at = 0.0

    def __call__(self, data: memoryview) -> int | None:
        """As a Write. Raises OSError."""
        now = time.monotonic()
        if now >= self._retune_at:
            self._retune_at = now + PACING_UPDATE_S
            bytes_per_s = tcp_info(self._sock, "Q", 104)  # tcpi_pacing_rate
            self._limit = min(max(int(bytes_per_s * UNSENT_S), UNSENT_MIN), UNSENT_MAX)
            self._sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, self._limit)
        fcntl.ioctl(self._sock.fileno(), SIOCOUTQNSD, self._unsent)
        room = self._limit - int.from_bytes(self._unsent, sys.byteorder)
        if room <= 0:
            return None
        return self._write(data if self._whole else data[:room])


def tcp_info(sock: socket.socket, kind: str, at: int) -> int:
    """A field of struct tcp_info, linux/tcp.h; 0 where the kernel is too old to have it."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return cast(int, struct.unpack_from(kind, info.ljust(256, b"\0"), at)[0])


def choose_congestion_control(sock: socket.socket, congestion: CongestionControls) -> bool:
    """Suits the connection to its path, by the shortest round trip that the kernel has seen on it; gives whether that is a LAN.

    On a real link BBR hides losses from the TCP inside the tunnel. On a LAN BBR's pacing would cost half of the speed.
    """
    rtt_us = tcp_info(sock, "I", 148)  # tcpi_min_rtt
    lan = rtt_us < LAN_RTT_US
    name = congestion.lan if lan else congestion.link
    if name:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name.encode())
    log.debug("round trip %.1f ms: congestion control %s", rtt_us / 1000, name or "as the system has it")
    return lan


def receive_message(stream: Stream) -> tuple[dict[str, Any], bytes]:
    """The peer's handshake message and the first bytes behind it. Raises ProtocolError, EOFError, OSError."""
    handshake = MessageParser()
    while True:
        found = handshake.feed(stream.receive())
        if found:
            return found


def wait_until_answer_is_read(sock: socket.socket) -> None:
    """Returns when the peer's kernel has what we sent, and its program, which waits for it, had time to take it.

    A legacy client takes whatever its first recv brings as the answer: the first frame must not be behind it by then.
    """
    unacknowledged = bytearray(4)
    while True:
        fcntl.ioctl(sock.fileno(), SIOCOUTQ, unacknowledged)
        if not any(unacknowledged):
            break
        gevent.sleep(0.01)
    gevent.sleep(LEGACY_READ_TIME_S)


def describe_end(error: BaseException) -> str:
    """Why a connection ended, in words for the log."""
    if isinstance(error, EOFError):
        return "the peer closed the connection"
    if isinstance(error, gevent.Timeout):
        return f"no answer within {error.seconds:.0f} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def log_defect(where: str, error: Exception) -> None:
    """An error that nobody expected is a defect of tun6: one line, and with -v where it happened."""
    log.error("%s: internal error, please report it: %r", where, error, exc_info=log.isEnabledFor(logging.DEBUG))


def trim_heap() -> None:
    """Gives the memory that full queues took back to the system when little waits again; until it is killed.

    glibc would keep it: 35 MB after eight queues were full.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries don't need it
    full = False
    while trim:
        gevent.sleep(TRIM_INTERVAL_S)
        if SHARED_BUFFER.free < SHARED_BUFFER.size - TRIM_MIN:
            full = True
        elif full:
            full = False
            in_thread(trim, 0)


class Session:
    """A connection whose handshake is done and a TUN, with a pump each way, from `run` until the first of them ends.

    Whoever made the socket and the TUN closes them afterwards.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.device: str | None = None  # name of its TUN
        self.prefix: IPv6Network | None = None
        self.refused: Counter[str] = Counter()  # packets that may not cross the ingress_filter, by reason
        self.gone = gevent.event.Event()  # all it had is released
        self.traffic = TrafficCounters()
        self.began = time.monotonic()
        self._end: gevent.event.AsyncResult = gevent.event.AsyncResult()

    @property
    def ending(self) -> bool:
        """Whether it was closed, or a pump has ended it."""
        return bool(self._end.ready())

    def close(self, why: BaseException) -> None:
        """Lets `run` return, now or as soon as it is called. The first reason counts."""
        if not self._end.ready():
            self._end.set(why)

    def run(
        self,
        stream: Stream,
        tun: Tun,
        ingress_filter: IngressFilter,
        congestion: CongestionControls,
        kinds: frozenset[str] | None,
        early: bytes,
    ) -> BaseException:
        """Moves frames until the session ends, and gives the reason.

        `ingress_filter` is for what the peer sends; `kinds` are the GSO kinds that it takes, None for a legacy peer; `early` the bytes
        behind its message.
        """
        bare = kinds is None
        sock = stream.sock
        self.refused = ingress_filter.refused
        lan = choose_congestion_control(sock, congestion)
        write = stream.write if lan else PacedWriter(sock, stream.write, whole=bare)
        send_queue = SendQueue(write, bare, stream.encrypt, whole_batches=lan or not stream.encrypt, shared=SHARED_BUFFER)
        deframer = Deframer(_tcp_buffer, None if bare else tun.kinds, ingress_filter)

        def tun_to_tcp() -> None:
            if bare and ingress_filter.from_client:
                wait_until_answer_is_read(sock)
            pump_tun_to_tcp(tun, sock.fileno(), send_queue, kinds, self.traffic)

        pumps = [
            gevent.spawn(self._guard, pump_tcp_to_tun, sock.fileno(), stream.readinto, tun, deframer, early, bare, self.traffic),
            gevent.spawn(self._guard, tun_to_tcp),
        ]
        try:
            why: BaseException = self._end.get()
        finally:
            gevent.killall(pumps)
            send_queue.close()
        return why

    def _guard(self, pump: Callable[..., None], *args: object) -> None:
        try:
            pump(*args)
        except (Tun6Error, EOFError, OSError) as error:
            self.close(error)
        except Exception as error:  # a defect of ours ends this session, not the process
            log_defect("session", error)
            self.close(error)

    def summary(self) -> str:
        """Its traffic and age, for the log."""
        age = time.monotonic() - self.began
        moved = self.traffic
        refused = "".join(f", {count} refused as {reason}" for reason, count in self.refused.items())
        dropped = moved.dropped + moved.late
        return f"after {age:.0f} s, {moved.received} bytes received, {moved.sent} sent, {dropped} packets dropped{refused}"


# ---- Server ----------------------------------------------------------------------------------------------------------


def quote_id(id_: str) -> str:
    """An Id as the log shows it."""
    return repr(id_[:ID_MAX])


class TokenBucket:
    """At most so many events an hour, as a token bucket that is full at first."""

    def __init__(self, per_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_hour` 0: no limit."""
        self._per_hour, self._clock = per_hour, clock
        self._left, self._at = float(per_hour), clock()

    def take(self) -> bool:
        """Whether one more may happen now; it counts as happened."""
        now = self._clock()
        self._left = min(self._left + (now - self._at) * self._per_hour / 3600, self._per_hour)
        self._at = now
        if self._per_hour and self._left < 1:
            return False
        self._left -= 1
        return True


def has_data(sock: socket.socket) -> bool:
    """Whether there is something to read; does not wait."""
    try:
        return not sock.closed and bool(system_socket.socket.recv(sock._sock, 1, socket.MSG_PEEK))
    except OSError:
        return False


class AdmissionControl:
    """Lets connections say who they are, HANDSHAKES_PER_HOST_MAX of a host and HANDSHAKES_MAX in all at a time.

    When all places are taken, the slow go, then those of whoever has most inside.

    What more comes from a host waits until that host has room, so that one which says nothing, or a thousand behind one NAT that
    come back all at once, are in nobody else's way.
    """

    def __init__(self, begin: Callable[[socket.socket, str], gevent.Greenlet]) -> None:
        """`begin` lets the connection of this peer speak, in the greenlet that it gives; that calls `release`."""
        self._begin = begin
        self._inside: dict[gevent.Greenlet, tuple[str, float]] = {}  # host, since when; oldest first
        self._of_host: Counter[str] = Counter()
        self._outside: dict[str, deque[tuple[socket.socket, str]]] = {}  # by host

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """A new connection: it comes in as soon as there is room."""
        peer = f"{host} port {port}"
        if self._of_host[host] < HANDSHAKES_PER_HOST_MAX:
            while len(self._inside) >= HANDSHAKES_MAX:
                if not (self._send_slow_away("") or self._send_one_of_many_away()):
                    gevent.sleep(0.01)
            self._enter(sock, host, peer)
            return
        waiting = self._outside.setdefault(host, deque())
        if len(waiting) < BACKLOG:
            waiting.append((sock, peer))
            gevent.spawn_later(SLOW_HANDSHAKE_S, self._send_slow_away, host)
        else:
            log.warning("%s: turned away, %d others from there wait already", peer, BACKLOG)
            sock.close()

    def release(self, greenlet: gevent.Greenlet, another: bool = True) -> bool:
        """It has said who it is, or is gone; `another` of its host may come in instead. Gives whether it was still inside."""
        host, _ = self._inside.pop(greenlet, ("", 0.0))
        if not host:
            return False
        self._of_host[host] -= 1
        if not self._of_host[host]:
            del self._of_host[host]
        waiting = self._outside.get(host, deque())
        while waiting and another:
            sock, peer = waiting.popleft()
            if has_data(sock):
                self._enter(sock, host, peer)
                break
            sock.close()  # it had the time until its turn
        if not waiting:
            self._outside.pop(host, None)
        return True

    def close(self) -> None:
        """Nobody comes in any more."""
        for waiting in self._outside.values():
            for sock, _ in waiting:
                sock.close()
        self._outside.clear()

    def _enter(self, sock: socket.socket, host: str, peer: str) -> None:
        greenlet = self._begin(sock, peer)
        self._inside[greenlet] = host, time.monotonic()
        self._of_host[host] += 1

        def forget(_: object) -> None:  # it may be killed before it has begun
            self.release(greenlet)
            sock.close()

        greenlet.rawlink(forget)

    def _send_slow_away(self, host: str) -> bool:
        """Ends the oldest of the host, "" for any host, if it has been inside for long."""
        oldest = next((greenlet for greenlet, (its, _) in self._inside.items() if host in ("", its)), None)
        if oldest is None or time.monotonic() - self._inside[oldest][1] < SLOW_HANDSHAKE_S:
            return False
        its = self._inside[oldest][0]
        oldest.kill(block=False)
        self.release(oldest, another=bool(host) or self._of_host[its] == 1)  # who waits outside depends on one of its host inside
        return True

    def _send_one_of_many_away(self) -> bool:
        """Ends the newest of the host that has most, so that few hosts can't keep all others out; False when each has one."""
        host, most = self._of_host.most_common(1)[0]
        if most == 1:
            return False
        newest = [greenlet for greenlet, (its, _) in self._inside.items() if its == host][-1]
        newest.kill(block=False)
        self.release(newest, another=False)
        return True


class Policy(NamedTuple):
    """Whom a server serves, and what they may."""

    tls: Callable[[], ssl.SSLContext] | None  # reads the certificate; None: no TLS
    keys: KeyStore | None  # None: whoever comes
    max_clients: int
    new_ids_per_hour: int
    client_to_client: bool


class Server:
    """Gives each client its prefix, a TUN and a route, and pumps."""

    def __init__(
        self,
        address: tuple[str, int],
        store: AssignmentStore,
        kernel: Kernel,
        congestion: CongestionControls,
        policy: Policy,
        tun: str,
        mtu: int,
    ) -> None:
        """Raises ConfigError for the certificate."""
        self._address, self._store, self._kernel, self._congestion = address, store, kernel, congestion
        self._policy, self._tun, self._mtu = policy, tun, mtu
        self._tls = policy.tls and policy.tls()
        self._new_ids = TokenBucket(policy.new_ids_per_hour)
        self.sessions: dict[str, Session] = {}  # by Id
        self._successors: dict[str, gevent.event.Event] = {}  # by Id: whoever waits to take it over, the newest only
        self._takeovers: dict[str, deque[float]] = {}  # by Id: when that last happened
        self._contended: set[str] = set()  # Ids of which the log has said that several clients have them
        self._connections = gevent.pool.Group()  # a greenlet each
        self._greeting: set[gevent.Greenlet] = set()  # those of them that have nothing to be undone yet
        self._admission = AdmissionControl(self._begin)
        self._monitor = DeviceMonitor()
        self._spare: int | None = None  # a descriptor, for the connection that there is none for

    def run(self) -> NoReturn:
        """Serves until killed, then undoes everything. Raises KernelError or ConfigError when it can't begin."""
        gevent.get_hub().threadpool.maxsize = TUN_CLOSERS
        route = pool_plan(self._store.pool.network, os.getpid())
        with ExitStack() as undo:
            undo.callback(self._store.close)
            listener = undo.enter_context(self._listen())
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self._kernel.remove_stale_pools()
            undo.callback(self._kernel.undo, route)
            self._kernel.apply(route)
            self._monitor.add("lo", lambda what, _: self._restore(route))
            for work in (self._monitor.run, trim_heap):
                undo.callback(gevent.spawn(work).kill)
            undo.callback(self._end_sessions)
            log.info("serving %s on %s port %d", self._store.pool.network, *self._address)
            while True:
                for _ in range(ACCEPT_BATCH):
                    self._accept(listener)
                gevent.sleep()  # accept does not wait while others do

    def _restore(self, route: list[Step]) -> None:
        """Puts the pool's route back. Somebody removed one of that kind, but perhaps another tun6 its own."""
        with suppress(KernelError):
            self._kernel.apply(route)
            log.warning("somebody removed the route of %s; it is back", self._store.pool.network)

    def reload(self) -> None:
        """Reads keys and certificate anew; sessions go on, but those of Ids that may not come in any more. Raises ConfigError."""
        tls, keys = self._policy.tls and self._policy.tls(), self._policy.keys
        if keys:
            before = {id_: keys.find(id_) for id_ in self.sessions}
            keys.reload()
            for id_, old in before.items():
                now = keys.find(id_)
                if now is None or now.revoked or now != old:
                    self.drop(id_, "its key was taken away")
        self._tls = tls

    def drop(self, id_: str, why: str) -> None:
        """Ends the session of the Id, if there is one."""
        if id_ in self.sessions:
            self.sessions[id_].close(SessionError(why))

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_ACCEPT_S)  # who says nothing waits in the kernel
            listener.bind(self._address)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            host, port = self._address
            raise KernelError(f"can't listen on {host} port {port}: {error.strerror}") from None
        return listener

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, (host, port) = listener.accept()
        except ConnectionAbortedError:
            return
        except OSError as error:
            log.error("can't accept a connection: %s", error.strerror)
            if error.errno == errno.EMFILE:
                self._turn_away(listener)
            gevent.sleep(ACCEPT_PAUSE_S)
            return
        self._admission.admit(sock, host, port)

    def _begin(self, sock: socket.socket, peer: str) -> gevent.Greenlet:
        greenlet = self._connections.spawn(self._serve, sock, peer)
        self._greeting.add(greenlet)
        greenlet.rawlink(self._greeting.discard)
        return greenlet

    def _turn_away(self, listener: socket.socket) -> None:
        """Tells a connection that there is no descriptor for it."""
        if self._spare is not None:
            os.close(self._spare)
        with suppress(OSError), gevent.Timeout(ACCEPT_PAUSE_S, False):
            sock, _ = listener.accept()
            with sock:
                sock.sendall(encode_message({"Error": "busy", "Text": "the server has no room for another connection"}))
        with suppress(OSError):
            self._spare = None
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _serve(self, sock: socket.socket, peer: str) -> None:
        """One connection from its first byte to its last."""
        stream = None
        with sock:
            try:
                set_tcp_options(sock)
                with gevent.Timeout(HANDSHAKE_S):
                    stream = self._open_stream(sock)
                    message, early = receive_message(stream)
                hello = parse_hello(message)
                self._require_key(hello, stream)
                self._serve_id(stream, peer, hello, early)
            except Refusal as refusal:
                log.warning("%s: refused, %s", peer, refusal)
                self._refuse(stream or Stream(sock), refusal)
            except ProtocolError as error:
                log.warning("%s: refused, bad hello: %s", peer, error)
                self._refuse(stream or Stream(sock), Refusal("bad-hello", str(error)))
            except (gevent.Timeout, EOFError, OSError) as error:
                log.debug("%s: left during the handshake: %s", peer, describe_end(error))
            except Exception as error:  # a defect of ours ends this connection, not the process
                log_defect(peer, error)

    def _open_stream(self, sock: socket.socket) -> Stream:
        """Plain or TLS, as the first byte says. Raises ProtocolError, EOFError, OSError."""
        first = sock.recv(1, socket.MSG_PEEK)
        if not first:
            raise EOFError
        if first[0] != TLS_HANDSHAKE:
            return Stream(sock)
        if self._tls is None:
            raise ProtocolError("it speaks TLS, and there is no `cert` in config.ini")
        return TlsStream(sock, self._tls)

    def _require_key(self, hello: Hello, stream: Stream) -> None:
        """Raises Refusal for who may not come in."""
        if self._policy.keys is None:
            return
        if stream.encrypt is None:
            raise Refusal("tls-required", "this server serves only clients with a key, over TLS", f"{quote_id(hello.id)} without TLS")
        try:
            self._policy.keys.check(hello.id, hello.key)
        except Refusal as refusal:
            raise Refusal(refusal.code, refusal.text, f"{quote_id(hello.id)}, {refusal.detail or refusal.text}") from None

    def _refuse(self, stream: Stream, refusal: Refusal) -> None:
        """Says why, and waits a little for the client to go: a close with its bytes unread would destroy the message."""
        self._admission.release(gevent.getcurrent())
        with gevent.Timeout(1, False):
            try:
                stream.send(encode_message({"Error": refusal.code, "Text": refusal.text}))
                stream.sock.shutdown(socket.SHUT_WR)
                while stream.sock.recv(MESSAGE_MAX):
                    gevent.sleep()  # recv does not wait for a peer that floods, and then the timeout would never come
            except (OSError, ProtocolError) as error:
                log.debug("the refused client left: %s", describe_end(error))

    def _serve_id(self, stream: Stream, peer: str, hello: Hello, early: bytes) -> None:
        """A client that said who it is, until it leaves. Raises Refusal, OSError, ProtocolError."""
        id_, kinds, _ = hello
        if not self._admission.release(gevent.getcurrent()):  # it was sent away just now, and the end may strike anywhere
            raise Refusal("busy", "too many say who they are at the moment")
        self._take_over(id_, peer)
        self._require_key(hello, stream)  # it may have waited, and its key been taken away meanwhile
        if len(self.sessions) >= self._policy.max_clients:
            raise Refusal("busy", f"{self._policy.max_clients} clients are connected already")
        if self._policy.keys is None and self._store.pool.find(id_) is None and not self._new_ids.take():
            raise Refusal("busy", f"more than {self._policy.new_ids_per_hour} new Ids in an hour")
        session = self.sessions[id_] = Session(peer)
        try:
            with ExitStack() as undo:
                prefix = session.prefix = self._store.assign(id_)
                self._greeting.discard(gevent.getcurrent())  # the end does not wait for a disk that does not answer, but for TUNs
                tun = Tun(self._tun)
                undo.callback(tun.close)
                session.device = tun.name
                tun.set_offload(kinds)
                plan = server_plan(tun.name, self._mtu, prefix)
                self._kernel.apply(plan)

                def lost(what: str, _: bytes) -> None:
                    if what == EVENTS_LOST:
                        self._kernel.reapply(plan)
                    elif what != ADDRESS_REMOVED:  # it has none of ours
                        session.close(KernelError(f"TUN device {tun.name}: {what}"))

                undo.callback(self._monitor.discard, self._monitor.add(tun.name, lost))
                answer: dict[str, Any] = {"Prefix": str(prefix)}
                if kinds is not None:
                    answer["Offload"] = sorted(tun.kinds)
                stream.send(encode_message(answer))
                log.info("%s from %s: has %s on %s%s", quote_id(id_), peer, prefix, tun.name, stream.security)
                ingress_filter = IngressFilter(prefix, True, None if self._policy.client_to_client else self._store.pool.network)
                why = session.run(stream, tun, ingress_filter, self._congestion, kinds, early)
            log.info("%s from %s: gone, %s; %s", quote_id(id_), peer, describe_end(why), session.summary())
        except (StorageError, KernelError) as error:
            level = logging.DEBUG if isinstance(error, StorageError) else logging.ERROR  # the store said it, once
            log.log(level, "%s from %s: can't be served: %s", quote_id(id_), peer, error)
            raise Refusal("server-error", "the server can't serve a new client at the moment") from None
        finally:
            del self.sessions[id_]
            session.gone.set()

    def _take_over(self, id_: str, peer: str) -> None:
        """Ends the session that the Id has, and waits until all it had is gone; of several newcomers the last one wins. Raises Refusal."""
        if id_ in self._successors:
            self._successors.pop(id_).set()
        if id_ not in self.sessions:
            return
        me = self._successors[id_] = gevent.event.Event()  # there is a newer one
        live = not self.sessions[id_].ending
        past = self._takeovers.setdefault(id_, deque(maxlen=TAKEOVERS_MAX))
        if live and len(past) == TAKEOVERS_MAX and time.monotonic() - past[0] < TAKEOVERS_S:
            if id_ not in self._contended:
                self._contended.add(id_)
                other = self.sessions[id_].peer
                log.warning("%s: clients at %s and %s take it from each other; give each an `id` of its own", quote_id(id_), other, peer)
            me.wait(TAKEOVER_PAUSE_S)
        elif live:
            self._contended.discard(id_)
        while id_ in self.sessions and self._successors.get(id_) is me:
            old = self.sessions[id_]
            old.close(SessionError(f"a newcomer from {peer} has its Id"))
            old.gone.wait()
        if self._successors.get(id_) is not me:
            raise Refusal("busy", "a newer connection has this Id")
        del self._successors[id_]
        if live:
            past.append(time.monotonic())
        if len(self._takeovers) > self._policy.max_clients:
            self._takeovers = {
                each: times for each, times in self._takeovers.items() if times and time.monotonic() - times[-1] < TAKEOVERS_S
            }
            self._contended &= set(self._takeovers)

    def _end_sessions(self) -> None:
        self._admission.close()
        gevent.killall(list(self._greeting))
        for session in self.sessions.values():
            session.close(SessionError("the server stops"))
        self._kernel.remove_devices([session.device for session in self.sessions.values() if session.device])
        self._connections.join()


# ---- Client ----------------------------------------------------------------------------------------------------------


class Trust(NamedTuple):
    """How a client knows its server, and what shows the server that it is the client."""

    tls: ssl.SSLContext
    fingerprint: str | None  # of the server's certificate, as fingerprint_of gives it; None: the context checks it
    key: str | None


class Client:
    """Keeps a TUN, and a connection to the server whenever there is one to be had."""

    def __init__(
        self,
        remote: tuple[str, int],
        id_: str | None,
        trust: Trust | None,
        kernel: Kernel,
        congestion: CongestionControls,
        tun: str,
        mtu: int,
        default_route: bool,
    ) -> None:
        """`trust`: None for a plain connection."""
        self._remote, self._id, self._trust, self._kernel, self._congestion = remote, id_, trust, kernel, congestion
        self._name, self._mtu, self._default_route = tun, mtu, default_route
        self._tun: Tun | None = None
        self._prefix: IPv6Network | None = None  # whose address the TUN has
        self._told: str | None = None  # what the log says of the outage; None while connected
        self._pause = RETRY_S
        self._monitor = DeviceMonitor()
        self._watched = 0  # the TUN, by it
        self._broken: KernelError | None = None  # what somebody did to the TUN
        self._session: Session | None = None
        self._lookup: gevent.Greenlet | None = None  # of the server's addresses, whose answer nobody has seen
        self._good: list[tuple[str, int]] = []  # the address where the server was

    def run(self) -> NoReturn:
        """Serves until killed, then removes the TUN. Raises KernelError when it can't be made at the start."""
        self._kernel.remove_stale_pools()
        self._monitor.add("lo", lambda what, _: self._restore())
        helpers = [gevent.spawn(self._monitor.run), gevent.spawn(trim_heap)]
        try:
            self._open()
            while True:
                try:
                    self._connect(self._tun or self._open())
                except KernelError as error:  # somebody took the device or what belongs to it: make all anew
                    self._tell(error)
                    self._close()
                except (SessionError, gevent.Timeout, EOFError, OSError) as error:
                    self._tell(error)
                gevent.sleep(self._pause)
        finally:
            gevent.killall(helpers)
            self._close()

    def _open(self) -> Tun:
        self._broken = None
        self._tun = Tun(self._name)
        self._kernel.apply(client_plan(self._tun.name, self._mtu, self._default_route))
        self._watched = self._monitor.add(self._tun.name, self._lost)
        return self._tun

    def _restore(self) -> None:
        """Puts back the route that keeps what no LAN has out of the tunnel, if it is that which somebody removed."""
        if self._prefix:
            self._kernel.reapply(pool_plan(self._prefix, os.getpid()))

    def _lost(self, what: str, address: bytes) -> None:
        if self._tun and what == EVENTS_LOST:
            address_steps = address_plan(self._tun.name, self._prefix, os.getpid()) if self._prefix else []
            self._kernel.reapply([*client_plan(self._tun.name, self._mtu, self._default_route), *address_steps])
            return
        if self._tun and not (address and self._prefix and address != self._prefix[1].packed):  # one that it had before
            self._broken = KernelError(f"TUN device {self._tun.name}: {what}")
            if self._session:
                self._session.close(self._broken)

    def _close(self) -> None:
        self._monitor.discard(self._watched)
        prefix, self._prefix = self._prefix, None
        if prefix and self._tun:
            self._kernel.undo(address_plan(self._tun.name, prefix, os.getpid()))
        if self._tun:
            self._tun.close()
        self._tun = None

    def _connect(self, tun: Tun) -> NoReturn:
        """One connection, from dialling to its end, which it raises."""
        if self._broken:
            raise self._broken
        self._id = self._id or default_id()
        with self._dial() as sock:
            set_tcp_options(sock)
            with gevent.Timeout(HANDSHAKE_S):
                stream = self._open_stream(sock)
                hello: dict[str, Any] = {"Id": self._id, "Offload": sorted(tun.kinds)}
                if self._trust and self._trust.key:
                    hello["Key"] = self._trust.key
                stream.send(encode_message(hello))
                message, early = receive_message(stream)
            prefix, kinds = parse_answer(message)
            tun.set_offload(kinds)
            self._take_address(tun, prefix)
            log.info("%s at %s port %d: has %s on %s%s", quote_id(self._id), *self._remote, prefix, tun.name, stream.security)
            self._told = None
            self._good = [sock.getpeername()]
            self._session = Session("the server")
            if self._broken:
                raise self._broken
            raise self._session.run(stream, tun, IngressFilter(prefix, from_client=False), self._congestion, kinds, early)

    def _open_stream(self, sock: socket.socket) -> Stream:
        """What the server is asked through; before that, it is the right server. Raises ProtocolError, EOFError, OSError."""
        if self._trust is None:
            return Stream(sock)
        stream = TlsStream(sock, self._trust.tls, self._remote[0])
        if self._trust.fingerprint not in (None, stream.fingerprint()):
            raise ProtocolError(f"the server's certificate has another fingerprint, {stream.fingerprint()}; nothing was said to it")
        return stream

    def _dial(self) -> socket.socket:
        """A connection to the first of the server's addresses that takes it."""
        for address in self._addresses():
            with ExitStack() as undo:
                sock = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                try:
                    with gevent.Timeout(CONNECT_S):
                        sock.connect(address)
                except (gevent.Timeout, OSError) as error:
                    failure = error
                else:
                    undo.pop_all()
                    return sock
        raise failure

    def _addresses(self) -> list[tuple[str, int]]:
        """The server's IPv4 addresses, others would be routed into our TUN; last the one where it was. Raises OSError when there is none.

        A lookup goes on until it is answered, and no other begins meanwhile; each answer counts once, however late it comes.
        """
        if self._lookup is None:
            self._lookup = gevent.spawn(socket.getaddrinfo, *self._remote, socket.AF_INET, socket.SOCK_STREAM)
        lookup = self._lookup
        lookup.join(LOOKUP_S if self._good else None)
        if lookup.ready():
            self._lookup = None
        if lookup.successful():
            return list(dict.fromkeys([*(address for *_, address in lookup.value), *self._good]))
        if not self._good:
            raise lookup.exception
        log.debug("%s: %s; trying the address that it had", self._remote[0], lookup.exception or "no answer yet")
        return self._good

    def _take_address(self, tun: Tun, prefix: IPv6Network) -> None:
        if prefix == self._prefix:
            return
        old, self._prefix = self._prefix, prefix  # before it has it: whoever is killed meanwhile undoes it
        self._kernel.apply(address_plan(tun.name, prefix, os.getpid()))
        if old:
            log.warning("the server changed our prefix from %s to %s", old, prefix)
            self._kernel.undo(address_plan(tun.name, old, os.getpid()))

    def _tell(self, error: BaseException) -> None:
        """Says why there is no connection: once an outage, and again when silence turns into a refusal or a wrong server, or back."""
        kind = error.code if isinstance(error, Refusal) else "?" if isinstance(error, ProtocolError) else ""
        level = logging.DEBUG if kind == self._told else logging.WARNING
        final = isinstance(error, Refusal) and error.code in FINAL
        self._pause = FINAL_RETRY_S if final else RETRY_S
        log.log(
            level,
            "no connection to %s port %d: %s; %strying again every %.0f s",
            *self._remote,
            describe_end(error),
            "the server won't serve this client until its operator changes that; " if final else "",
            self._pause,
        )
        self._told = kind


# ---- administration --------------------------------------------------------------------------------------------------


class LoopLatency:
    """How late the event loop is: the time that whoever becomes ready waits for its turn."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._late: deque[float] = deque(maxlen=LATENCY_SAMPLES)

    def run(self) -> NoReturn:
        """Until it is killed."""
        while True:
            due = time.monotonic() + LATENCY_INTERVAL_S
            gevent.sleep(LATENCY_INTERVAL_S)
            self._late.append(max(time.monotonic() - due, 0.0))

    def latency(self) -> dict[str, float]:
        """Of the last minute, in seconds."""
        late = sorted(self._late) or [0.0]
        return {"samples": len(self._late), "median": late[len(late) // 2], "p99": late[len(late) * 99 // 100], "max": late[-1]}


def process_resources() -> dict[str, int]:
    """What this process has of the machine; memory in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "greenlets": sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects()),
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")) - 1,
        "memory": int(status["VmRSS"].split()[0]) << 10,
        "queued": SHARED_BUFFER.size - SHARED_BUFFER.free,
    }


class AdminRequestHandler:
    """What an operator does with clients: on the running server, or on its files when none runs."""

    def __init__(
        self,
        store: AssignmentStore,
        keys: KeyStore | None,
        sessions: dict[str, Session],
        drop: Callable[[str, str], None],
        loop_latency: LoopLatency | None = None,
    ) -> None:
        """`drop` ends the session of an Id, and says why; `loop_latency` is that of the running server."""
        self._store, self._keys, self._sessions, self._drop, self._pulse = store, keys, sessions, drop, loop_latency
        self._one = gevent.lock.RLock()

    def perform(self, request: dict[str, Any]) -> Any:
        """Does what a request says: {"do": a method below, its arguments}. Raises RequestError, StorageError, Refusal."""
        requests: dict[str, Callable[..., Any]] = {
            "list": self.list,
            "status": self.status,
            "add": self.add,
            "pin": self.pin,
            "revoke": self.revoke,
            "restore": self.restore,
        }
        arguments = dict(request)
        files = arguments.pop("files", None)
        if files != self.files():
            raise RequestError(f"the server that runs here has other files, {self.files()}; name its config.ini with -c")
        try:
            action = requests[arguments.pop("do")]
            inspect.signature(action).bind(**arguments)
        except (KeyError, TypeError):
            raise RequestError("the server that runs here is of another version of tun6; restart it") from None
        if not is_id(arguments.get("id", "-")):
            raise RequestError(f"the Id must be 1 to {ID_MAX} printable characters")
        with self._one:
            return action(**arguments)

    def files(self) -> list[str | None]:
        """What it works on, so that nobody asks the wrong server."""
        return [str(self._store.path) if self._store.path else None, str(self._keys.path) if self._keys else None]

    def list(self) -> list[dict[str, Any]]:
        """All that have a prefix, a key or a session."""
        ids = dict.fromkeys([*self._store.pool.owners(), *(self._keys.ids() if self._keys else ()), *self._sessions])
        return [self._entry(id_) for id_ in ids]

    def status(self) -> dict[str, Any]:
        """How the server is."""
        if self._pulse is None:
            raise RequestError("no server runs with this config.ini")
        return {
            "seconds": round(time.monotonic() - self._pulse.began),
            "sessions": len(self._sessions),
            "assignments": len(self._store.pool.owners()),
            **in_thread(process_resources),
            "latency": self._pulse.latency(),
        }

    def add(self, id: str, prefix: str | None, new_key: bool) -> dict[str, Any]:
        """Gives an Id a key, and a prefix at once."""
        keys = self._need_keys()
        if keys.find(id) and not new_key:
            raise RequestError(f"{quote_id(id)} has a key already; with --new-key it gets another one, and the old one ends")
        if prefix is not None:
            self.pin(id, prefix)
        entry = {"id": id, "prefix": str(self._store.assign(id)), "key": keys.issue(id)}
        self._drop(id, "it got another key")
        return entry

    def pin(self, id: str, prefix: str) -> dict[str, Any]:
        """Gives an Id this prefix."""
        try:
            self._store.pin(id, parse_network(prefix))
        except ValueError as error:
            raise RequestError(str(error)) from None
        if id in self._sessions and self._sessions[id].prefix != parse_network(prefix):
            self._drop(id, "its prefix was changed")
        return self._entry(id)

    def revoke(self, id: str) -> dict[str, Any]:
        """Keeps an Id out from now on; its prefix stays its own."""
        self._set_revoked(id, True)
        self._drop(id, "it was revoked")
        return self._entry(id)

    def restore(self, id: str) -> dict[str, Any]:
        """Undoes `revoke`."""
        self._set_revoked(id, False)
        return self._entry(id)

    def _set_revoked(self, id_: str, revoked: bool) -> None:
        try:
            self._need_keys().set_revoked(id_, revoked)
        except KeyError:
            raise RequestError(f"{quote_id(id_)} has no key; `clients list` shows who has") from None

    def _need_keys(self) -> KeyStore:
        if self._keys is None:
            raise RequestError("this server is open to everybody; name a file with `keys` in config.ini, and restart it")
        return self._keys

    def _entry(self, id_: str) -> dict[str, Any]:
        prefix, key, session = self._store.pool.find(id_), self._keys and self._keys.find(id_), self._sessions.get(id_)
        entry: dict[str, Any] = {"id": id_, "prefix": prefix and str(prefix), "key": bool(key), "revoked": bool(key and key.revoked)}
        if session:
            moved = session.traffic
            entry["session"] = {
                "peer": session.peer,
                "device": session.device,
                "seconds": round(time.monotonic() - session.began),
                "received": moved.received,
                "sent": moved.sent,
                "dropped": moved.dropped + moved.late,
                "refused": dict(session.refused),
            }
        return entry


class ControlSocket:
    """The server's Unix socket for `tun6.py clients`: one request and one answer a connection, JSON objects as on the wire."""

    def __init__(self, path: str, registry: AdminRequestHandler) -> None:
        self._path, self._registry = path, registry
        self._handlers = gevent.pool.Group()

    def __enter__(self) -> ControlSocket:
        """Listens, if nobody else does there; a server without it serves as well."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(self._path) or ".", 0o755)
            if self._is_dead():
                os.unlink(self._path)
            mask = os.umask(0o177)  # for root alone
            try:
                listener.bind(self._path)
            finally:
                os.umask(mask)
            listener.listen()
        except OSError as error:
            listener.close()
            log.warning("control = %s: %s; `tun6.py clients` can't reach this server", self._path, error.strerror)
        else:
            self._handlers.spawn(self._run, listener)
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._handlers):
            self._handlers.kill()
            with suppress(OSError):
                os.unlink(self._path)

    def _is_dead(self) -> bool:
        """Whether a socket is there that a killed server has left."""
        with system_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                return True
            except OSError:
                pass
        return False

    def _run(self, listener: socket.socket) -> NoReturn:
        with listener:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError as error:
                    log.error("control: can't accept a connection: %s", error.strerror)
                    gevent.sleep(ACCEPT_PAUSE_S)
                else:
                    self._handlers.spawn(self._handle, sock)

    def _handle(self, sock: socket.socket) -> None:
        with sock:
            try:
                with gevent.Timeout(HANDSHAKE_S):
                    request, _ = receive_message(Stream(sock))
                try:
                    answer = {"done": self._registry.perform(request)}
                except Tun6Error as error:
                    answer = {"error": str(error)}
                sock.sendall(encode_message(answer))
            except (gevent.Timeout, EOFError, OSError, ProtocolError) as error:
                log.debug("control: %s", describe_end(error))
            except Exception as error:
                log_defect("control", error)


def ask_server(path: str, request: dict[str, Any]) -> Any:
    """What the server behind this Unix socket answers. Raises RequestError, OSError where none listens."""
    with system_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(HANDSHAKE_S)
        sock.connect(path)
        sock.sendall(encode_message(request))
        text = b"".join(iter(functools.partial(sock.recv, 1 << 16), b""))
    try:
        answer = json.loads(text)
    except ValueError:
        raise RequestError(f"the server behind {path} gave no answer; its log says why") from None
    if "error" in answer:
        raise RequestError(answer["error"])
    return answer["done"]


# ---- demo ------------------------------------------------------------------------------------------------------------


def wait_until(what: str, condition: Callable[[], T], seconds: float = 10) -> T:
    """The first true value of the condition, tried a hundred times a second. Raises KernelError, with `what`, when it takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise KernelError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.01)


class Lab:
    """A network of hosts on this machine, each in a network namespace of its own, from `with Lab() as lab` until its end.

    internet ---------- server ---------- nat ---------- client ---------- lan
    2001:db8:ffff::2    10.9.0.1          masquerades    10.8.0.2         a host behind the client
                                          |
             only IPv4 passes here -----> +------------- second, 10.8.1.2: another client
    """

    INTERNET = "2001:db8:ffff::2"
    SERVER = "10.9.0.1"
    HOSTS = ("internet", "server", "nat", "client", "lan", "second")

    def __init__(self) -> None:
        self._names = {host: f"tun6-{os.getpid()}-{host}" for host in self.HOSTS}
        self._undo = ExitStack()

    def __enter__(self) -> Lab:
        with ExitStack() as undo:
            for name in self._names.values():
                self._ip(f"netns add {name}")
                undo.callback(self._ip, f"netns del {name}")
            self._lay()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def ip(self, host: str, command: str) -> str:
        """Runs `ip` on a host; gives what it says. Raises KernelError."""
        return self._ip(f"-n {self._names[host]} {command}")

    def popen(self, host: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Starts a program on a host, as subprocess.Popen with text does."""
        return subprocess.Popen(["ip", "netns", "exec", self._names[host], *command], text=True, **options)

    def run(self, host: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a program on a host, as subprocess.run with text and captured output does."""
        return subprocess.run(["ip", "netns", "exec", self._names[host], *command], text=True, capture_output=True, **options)

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread is on the host meanwhile; a socket or TUN made there stays there. Don't start threads inside."""
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self._names[host]}") as there:
            self._enter(there.fileno())
            try:
                yield
            finally:
                self._enter(home.fileno())

    def pings(self, host: str, address: str = INTERNET) -> bool:
        """Whether one ping from the host is answered, within 0.2 s."""
        return self.run(host, "ping", "-6", "-c", "1", "-W", "0.2", address).returncode == 0

    def sysctl(self, host: str, name: str, value: str) -> None:
        """Sets a sysctl of the host's network."""
        with self.inside(host):
            Path("/proc/sys", *name.split(".")).write_text(value)

    @staticmethod
    def _enter(namespace: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there since Python 3.12
        if libc.setns(namespace, 0x40000000):  # CLONE_NEWNET, sched.h
            raise KernelError(f"can't enter a network namespace: {os.strerror(ctypes.get_errno())}")

    def _lay(self) -> None:
        for host in self.HOSTS:  # addresses can be used at once, without a search for duplicates
            self.sysctl(host, "net.ipv6.conf.default.dad_transmits", "0")
        for near, far in (
            (("internet", "eth0"), ("server", "eth1")),
            (("server", "eth0"), ("nat", "eth0")),
            (("nat", "eth1"), ("client", "eth0")),
            (("nat", "eth2"), ("second", "eth0")),
            (("client", "eth1"), ("lan", "eth0")),
        ):
            self.ip(near[0], f"link add {near[1]} type veth peer name {far[1]} netns {self._names[far[0]]}")
            for host, device in (near, far):
                self.ip(host, f"link set {device} up")
        for host in self.HOSTS:
            self.ip(host, "link set lo up")
        self.ip("internet", f"addr add {self.INTERNET}/64 dev eth0 nodad")
        self.ip("server", "addr add 2001:db8:ffff::1/64 dev eth1 nodad")
        self.ip("internet", "-6 route add default via 2001:db8:ffff::1")
        for host, device, address, router in (
            ("server", "eth0", f"{self.SERVER}/24", None),
            ("nat", "eth0", "10.9.0.2/24", None),
            ("nat", "eth1", "10.8.0.1/24", None),
            ("nat", "eth2", "10.8.1.1/24", None),
            ("client", "eth0", "10.8.0.2/24", "10.8.0.1"),
            ("second", "eth0", "10.8.1.2/24", "10.8.1.1"),
        ):
            self.ip(host, f"addr add {address} dev {device}")
            if router:
                self.ip(host, f"route add default via {router}")
        self.sysctl("server", "net.ipv6.conf.all.forwarding", "1")
        self.sysctl("client", "net.ipv6.conf.all.forwarding", "1")
        self.sysctl("nat", "net.ipv4.ip_forward", "1")
        nat = "table ip nat { chain out { type nat hook postrouting priority 100; oifname eth0 masquerade; }; }"
        self._check(["ip", "netns", "exec", self._names["nat"], "nft", nat])
        # a new link takes up to a second before it carries the first packet
        wait_until("the server reaches the Internet", lambda: self.pings("server"))

    def _ip(self, command: str) -> str:
        return self._check(["ip", *command.split()])

    @staticmethod
    def _check(command: list[str]) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise KernelError(f"the program {command[0]} is missing; on Debian: apt-get install iproute2 nftables iputils-ping") from None
        if done.returncode:
            raise KernelError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
        return done.stdout


class Demo:
    """The real server and clients in a Lab, and what a newcomer wants to see them do."""

    CONFIG = """
        [server]
        localhost = 0.0.0.0
        listenport = 10000
        prefixrange = 2001:db8:1::/56
        assignments = assignments.json
        control = {folder}/control
        [client]
        remotehost = 10.9.0.1
        remoteport = 10000
    """
    BULK = 64 << 20  # bytes each way

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab, self._folder = lab, folder
        self._running: dict[str, subprocess.Popen[str]] = {}
        (folder / "config.ini").write_text(textwrap.dedent(self.CONFIG).format(folder=folder))

    def run(self) -> None:
        """All steps. Raises KernelError at the first that does not hold."""
        say = self._say
        say("six hosts are up", "internet - server - nat - client - lan, and second behind the same nat; only IPv4 passes the nat")
        self._start("server", "server")
        began = time.monotonic()
        self._start("client", "client")
        prefix = self._prefix("client")
        say("hello and prefix", f"the client said its MAC and got {prefix}, {time.monotonic() - began:.2f} s after it was started")
        self._lab.ip("client", f"addr add {prefix[2]}/64 dev eth1 nodad")
        self._lab.ip("lan", f"addr add {prefix[0x10]}/64 dev eth0 nodad")
        self._lab.ip("lan", f"-6 route add default via {prefix[2]}")
        wait_until("the LAN host reaches its router", lambda: self._lab.pings("lan", str(prefix[2])))
        say("a LAN host reaches the IPv6 Internet", f"{prefix[0x10]} pinged {Lab.INTERNET}: {self._ping('lan')}")
        for source, sink, words in (("lan", "internet", "up"), ("internet", "lan", "down")):
            say(f"bulk transfer {words}", self._bulk(source, sink, str(prefix[0x10]) if sink == "lan" else Lab.INTERNET))
        outage = self._server_killed(prefix)
        say("server killed and restarted", f"the tunnel was back {outage:.1f} s after the restart, with the same {prefix}")
        self._start("second", "client")
        other = self._prefix("second")
        if other == prefix:
            raise KernelError(f"the second client got the first one's prefix, {prefix}")
        say("a second client", f"it got {other} and pinged {Lab.INTERNET}: {self._ping('second')}")
        say("keys and encryption", self._keyed())

    def _keyed(self) -> str:
        """Starts all anew with keys: one client gets one, the other has none."""
        self.stop()
        for host in self._running:
            (self._folder / f"{host}.log").unlink()
        self._running.clear()
        config = self._folder / "config.ini"
        config.write_text(config.read_text().replace("[client]", "cert = server.pem\nkeys = keys.json\n[client]"))
        self._tun6("keygen", "-c", str(config))
        self._start("server", "server")
        added = self._tun6("clients", "-c", str(config), "add", "second")
        (self._folder / "second.ini").write_text(re.sub("remotehost = .*", f"remotehost = {Lab.SERVER}", added))
        self._start("second", "client", "second.ini")
        prefix = self._prefix("second")
        answer = self._ping("second")
        self._start("client", "client")
        wait_until("the client without a key is refused", lambda: "tls-required" in self._log("client"))
        return (
            f"with its key and over TLS, the second client has {prefix} and pinged {Lab.INTERNET}: {answer}; the first, without, is refused"
        )

    def _tun6(self, *arguments: str) -> str:
        """What a command on the server prints."""
        done = self._lab.run("server", sys.executable, str(Path(__file__).resolve()), *arguments)
        if done.returncode:
            raise KernelError(f"`tun6.py {' '.join(arguments)}` failed: {done.stderr.strip()}")
        return done.stdout

    def stop(self) -> None:
        """Ends the programs; those who do not end by themselves are killed."""
        for process in reversed(self._running.values()):
            process.terminate()
        for host, process in self._running.items():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise KernelError(f"the tun6 on {host} did not end within 5 s of SIGTERM") from None

    def _say(self, what: str, figures: str) -> None:
        print(f"  ok  {what}: {figures}", flush=True)

    def _start(self, host: str, role: str, config: str = "config.ini") -> None:
        with open(self._folder / f"{host}.log", "a") as log_file:
            begin = log_file.tell()
            command = (sys.executable, str(Path(__file__).resolve()), role, "-c", str(self._folder / config))
            self._running[host] = self._lab.popen(host, *command, stderr=log_file, stdin=subprocess.DEVNULL)
        if role == "server":
            wait_until("the server listens", lambda: " serving " in self._log(host)[begin:])

    def _log(self, host: str) -> str:
        text = (self._folder / f"{host}.log").read_text()
        if self._running[host].poll() not in (None, -signal.SIGKILL):
            raise KernelError(f"the tun6 on {host} ended by itself: {text.strip().splitlines()[-1:]}")
        return text

    def _prefix(self, host: str) -> IPv6Network:
        found = wait_until(f"the client on {host} has a prefix", lambda: re.findall(r": has (\S+) on", self._log(host)))
        return IPv6Network(found[-1])

    def _ping(self, host: str) -> str:
        # without -w, ping waits for its last answer no longer than twice what the others took
        done = self._lab.run(host, "ping", "-6", "-c", "10", "-w", "5", "-i", "0.05", Lab.INTERNET)
        came = set(re.findall(r"icmp_seq=(\d+) ", done.stdout))
        found = re.search(r"= [\d.]+/([\d.]+)/", done.stdout)
        if not found or not came >= set(map(str, range(1, 11))):
            raise KernelError(f"ping on {host} lost packets: {done.stdout.strip() or done.stderr.strip()}")
        return f"10 of 10 came back, {found[1]} ms on average"

    def _bulk(self, source: str, sink: str, address: str) -> str:
        data = os.urandom(1 << 20) * (self.BULK >> 20)
        with self._lab.inside(sink):
            listener = system_socket.create_server((address, 5001), family=system_socket.AF_INET6)
        with self._lab.inside(source):
            sender = system_socket.socket(system_socket.AF_INET6)

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(system_socket.SHUT_WR)

        received = bytearray()
        with listener, sender:
            sender.settimeout(20)
            sender.connect((address, 5001))
            receiver, _ = listener.accept()
            with receiver:
                began = time.monotonic()
                threading.Thread(target=send, daemon=True).start()
                receiver.settimeout(20)
                while chunk := receiver.recv(1 << 20):
                    received += chunk
                seconds = time.monotonic() - began
        if hashlib.sha256(received).digest() != hashlib.sha256(data).digest():
            raise KernelError(f"bulk transfer from {source} to {sink}: other bytes arrived than were sent")
        return f"{len(data) >> 20} MiB at {len(data) * 8 / seconds / 1e6:,.0f} Mbit/s, SHA-256 the same at both ends"

    def _server_killed(self, prefix: IPv6Network) -> float:
        """Seconds from the restart until the LAN host's ping is answered."""
        self._running["server"].kill()
        self._running["server"].wait()
        self._start("server", "server")
        began = time.monotonic()
        wait_until("the tunnel comes back", lambda: self._lab.pings("lan"))
        outage = time.monotonic() - began
        wait_until("the client has the prefix that it had", lambda: f": has {prefix} on" in self._log("client").splitlines()[-1])
        return outage


# ---- command line ----------------------------------------------------------------------------------------------------


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ValueError("must be an IPv4 address of this machine, or 0.0.0.0 for all of them") from None


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", text) or not re.fullmatch(r"([^.]{1,63}\.)*[^.]{1,63}\.?", text):
        raise ValueError("must be the name or the IPv4 address of a server")
    return text


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(text)

    return parse


def _pool(text: str) -> IPv6Network:
    try:
        network = parse_network(text, strict=False)
    except ValueError:
        raise ValueError("must be an IPv6 range such as 2001:db8:1::/48") from None
    if network.prefixlen > 64:
        raise ValueError("must be /64 or shorter, as each client gets a /64")
    try:
        require_unicast(network)
    except ValueError as error:
        raise ValueError(f"must be a range of yours: {error}") from None
    return network


def _device(pattern: bool) -> Callable[[str], str]:
    def parse(text: str) -> str:
        number = text.count("%d") if pattern else 0
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,15}", text.replace("%d", "0000", number)) or number != pattern or text in (".", ".."):
            raise ValueError(
                "must be " + ("a device name of at most 13 characters with one %d" if pattern else "a device name of at most 15 characters")
            )
        return text

    return parse


def _id(text: str) -> str:
    if not is_id(text):
        raise ValueError(f"must be 1 to {ID_MAX} printable characters")
    return text


def _congestion(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]{1,15}", text):
        raise ValueError("must be auto or the name of a TCP congestion control, such as bbr or cubic")
    return text


def _fingerprint(text: str) -> str:
    text = text.lower()
    digits = text.replace("sha256:", "", 1).replace(":", "")
    if not text.startswith("sha256:") or not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("must be sha256: and the 64 hexadecimal digits that `tun6.py keygen` printed on the server")
    return "sha256:" + digits


def _key(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{43}", text):
        raise ValueError("must be the 43 characters that `tun6.py clients add` printed on the server")
    return text


def _yes(text: str) -> bool:
    if text.lower() not in configparser.ConfigParser.BOOLEAN_STATES:
        raise ValueError("must be yes or no")
    return configparser.ConfigParser.BOOLEAN_STATES[text.lower()]


def _setting(parse: Callable[[str], Any], default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse})


_MTU = _whole(1280, 65_500)  # RFC 8200 section 5; a TUN takes no more


@dataclass(frozen=True)
class ServerConfig:
    """The section [server] of config.ini."""

    localhost: str = _setting(_ipv4)
    listenport: int = _setting(_whole(1, 65_535))
    prefixrange: IPv6Network = _setting(_pool)
    assignments: str | None = _setting(str, None)
    congestion: str = _setting(_congestion, "auto")
    tun: str = _setting(_device(pattern=True), "tun6-%d")
    mtu: int = _setting(_MTU, 1500)
    max_clients: int = _setting(_whole(1, 1_000_000), 1000)
    cert: str | None = _setting(str, None)
    keys: str | None = _setting(str, None)
    control: str = _setting(str, "/run/tun6/server.sock")
    new_ids_per_hour: int = _setting(_whole(0, 1_000_000), 0)
    client_to_client: bool = _setting(_yes, True)


@dataclass(frozen=True)
class ClientConfig:
    """The section [client] of config.ini."""

    remotehost: str = _setting(_host)
    remoteport: int = _setting(_whole(1, 65_535))
    id: str | None = _setting(_id, None)
    congestion: str = _setting(_congestion, "auto")
    tun: str = _setting(_device(pattern=False), "tun6")
    mtu: int = _setting(_MTU, 1500)
    default_route: bool = _setting(_yes, True)
    tls: bool = _setting(_yes, False)
    fingerprint: str | None = _setting(_fingerprint, None)
    key: str | None = _setting(_key, None)


_SECTIONS: dict[str, type] = {"server": ServerConfig, "client": ClientConfig}
_CONFIG_FILES = ("config.ini", "/etc/tun6/config.ini")


def find_config(named: str | None) -> str:
    """The file to read. Raises ConfigError."""
    if named:
        return named
    for path in _CONFIG_FILES:
        if os.path.exists(path):
            return path
    raise ConfigError(f"there is neither ./{_CONFIG_FILES[0]} nor {_CONFIG_FILES[1]}; write one, or name it with -c FILE")


def read_config(path: str, section: str) -> Any:
    """ServerConfig or ClientConfig from the file. Raises ConfigError: a sentence with file, key, value and what would be right."""
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#", ";"), default_section="")
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a readable file with -c FILE") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not UTF-8 text") from None
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        raise ConfigError(f"{' '.join(str(error).split())}; keep one of them") from None
    except configparser.Error as error:
        raise ConfigError(f"{' '.join(str(error).split())}; write sections like [server] and lines like key = value") from None
    for name in parser.sections():
        if name not in _SECTIONS:
            raise ConfigError(f"{path}: unknown section [{name}]; {_nearest(name, _SECTIONS, '[%s]')}")
        known = [field.name for field in dataclasses.fields(_SECTIONS[name])]
        for key, value in parser[name].items():
            if key not in known:
                raise ConfigError(f"{path}: [{name}] {key} = {printable(value)}: unknown key; {_nearest(key, known, '%s')}")
            if "\n" in value:
                raise ConfigError(f"{path}: [{name}] {key} = {printable(value)}: an indented line follows, don't indent")
    if section not in parser:
        raise ConfigError(f"{path}: there is no section [{section}]; add one with its keys, as in the config.ini that came with tun6")
    values = {}
    for field in dataclasses.fields(_SECTIONS[section]):
        text = parser[section].get(field.name)
        if text:
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as error:
                raise ConfigError(f"{path}: [{section}] {field.name} = {printable(text)}: it {error}") from None
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{path}: [{section}] {field.name} is missing; add a line {field.name} = ...")
    return _SECTIONS[section](**values)


def _nearest(word: str, known: Iterable[str], form: str) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {form % near[0]}?" if near else "known are " + ", ".join(form % name for name in known)


def resolve_path(config: str, name: str | None) -> str | None:
    """The path of a file that config.ini names: a relative one is relative to config.ini."""
    return name and os.path.join(os.path.dirname(config), name)


def control_path(path: str, config: ServerConfig) -> str:
    """Of the server's Unix socket."""
    return cast(str, resolve_path(path, config.control))


def server_command(options: argparse.Namespace) -> None:
    """`tun6.py server`."""
    path = find_config(options.config)
    config: ServerConfig = read_config(path, "server")
    require_privilege()
    require_ipv6()
    warn_of_forwarding()
    warn_of_overlap(config.prefixrange)
    raise_descriptor_limit()
    if config.assignments is None:
        log.warning("no `assignments` file in %s: all prefixes are forgotten when the server ends", path)
    store = AssignmentStore(PrefixPool(config.prefixrange), resolve_path(path, config.assignments))
    keys, tls = open_keys(path, config), None
    if config.cert:
        tls = functools.partial(server_tls, cast(str, resolve_path(path, config.cert)))
    if keys is None:
        log.warning(
            "open: whoever reaches port %d gets a /64 and may claim any Id; `keys` in %s closes it, `new_ids_per_hour` bounds new Ids",
            config.listenport,
            path,
        )
    policy = Policy(tls, keys, config.max_clients, config.new_ids_per_hour, config.client_to_client)
    address = (config.localhost, config.listenport)
    server = Server(address, store, Kernel(), find_congestion_controls(config.congestion), policy, config.tun, config.mtu)

    def run() -> None:
        loop_latency = LoopLatency()
        with ExitStack() as undo:
            undo.callback(gevent.spawn(loop_latency.run).kill)
            undo.enter_context(
                ControlSocket(control_path(path, config), AdminRequestHandler(store, keys, server.sessions, server.drop, loop_latency))
            )
            server.run()

    def reload() -> None:
        try:
            server.reload()
            log.info("keys and certificate read anew" if tls else "nothing to be read anew: there are neither keys nor a certificate")
        except ConfigError as error:
            log.error("keys and certificate stay as they were: %s", error)

    run_until_signalled(run, reload)


def open_keys(path: str, config: ServerConfig) -> KeyStore | None:
    """The keys that config.ini, `path`, names. Raises ConfigError."""
    if config.keys and not config.cert:
        raise ConfigError(f"{path}: [server] has keys but no cert, and keys go only through TLS; `tun6.py keygen` makes a certificate")
    return KeyStore(cast(str, resolve_path(path, config.keys))) if config.keys else None


def client_command(options: argparse.Namespace) -> None:
    """`tun6.py client`."""
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")  # resolv.conf(5): a name server that is back is noticed in seconds
    config: ClientConfig = read_config(find_config(options.config), "client")
    require_privilege()
    require_ipv6()
    remote = (config.remotehost, config.remoteport)
    trust = None
    if config.tls or config.fingerprint or config.key:
        trust = Trust(client_tls(pinned=config.fingerprint is not None), config.fingerprint, config.key)
    congestion = find_congestion_controls(config.congestion)
    run_until_signalled(Client(remote, config.id, trust, Kernel(), congestion, config.tun, config.mtu, config.default_route).run)


def keygen_command(options: argparse.Namespace) -> None:
    """`tun6.py keygen`: makes the server's certificate, valid for a hundred years, as its clients compare it and nothing else."""
    path = find_config(options.config)
    config: ServerConfig = read_config(path, "server")
    file = Path(cast(str, resolve_path(path, config.cert or "server.pem")))
    if file.exists():
        raise ConfigError(f"{file} is there already, its fingerprint is {certificate_fingerprint(file)}; move it away to make another")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=tun6 -keyout - -out -"
    try:
        made = subprocess.run(command.split(), capture_output=True, text=True)
    except OSError as error:
        raise KernelError(f"`openssl` can't be run: {error.strerror}; install it with `apt-get install openssl`") from None
    if made.returncode:
        raise KernelError(f"`{command}` failed: {' '.join(made.stderr.split())}")
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET), "w", encoding="ascii") as pem:
            pem.write(made.stdout)
    except OSError as error:
        raise StorageError(f"{file} can't be written: {error.strerror}") from None
    print(f"{file} is the server's key and certificate: keep it secret, and a copy of it safe.")
    if not config.cert:
        print(f"Add to [server] in {path}: cert = {file.name}")
    print(f"Clients know the server by this line in their [client]: fingerprint = {certificate_fingerprint(file)}")


def certificate_fingerprint(file: Path) -> str:
    """Of the certificate in a PEM file. Raises ConfigError."""
    try:
        found = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", file.read_text("ascii"), re.DOTALL)
        if not found:
            raise ValueError("there is no certificate in it")
        return fingerprint_of(ssl.PEM_cert_to_DER_cert(found[0]))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{file}: {reason}; `tun6.py keygen` makes one") from None


def perform(path: str, config: ServerConfig, request: dict[str, Any]) -> Any:
    """Lets the running server do it, or does it on its files while none runs. Raises RequestError, ConfigError, StorageError, Refusal."""
    files = [name and os.path.realpath(name) for name in (resolve_path(path, config.assignments), resolve_path(path, config.keys))]
    control = control_path(path, config)
    request = {**request, "files": files}
    try:
        return ask_server(control, request)
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            raise RequestError(f"control = {control}: {error.strerror or error}; run this as the server's user, mostly root") from None
        if request["do"] == "status":
            raise Tun6Error(f"no server listens at {control}") from None
        if config.assignments is None:
            raise ConfigError(f"no server listens at {control}, and without `assignments` in {path} nothing is kept") from None
        store = AssignmentStore(PrefixPool(config.prefixrange), files[0])
        try:
            return AdminRequestHandler(store, open_keys(path, config), {}, lambda id_, why: None).perform(request)
        finally:
            store.close()


def status_command(options: argparse.Namespace) -> None:
    """`tun6.py status`: asks the running server."""
    path = find_config(options.config)
    done = perform(path, read_config(path, "server"), {"do": "status"})
    if options.json:
        print(json.dumps(done, indent=1))
    else:
        latency = done.pop("latency")
        done["memory"] = f"{done['memory'] / 2**20:.1f} MiB"
        done["queued"] = f"{done['queued']} bytes"
        done["latency"] = ", ".join(f"{name} {1000 * latency[name]:.1f} ms" for name in ("median", "p99", "max"))
        for name, value in done.items():
            print(f"{name:<12} {value}")


def clients_command(options: argparse.Namespace) -> None:
    """`tun6.py clients`: asks the running server, or works on its files while none runs."""
    path = find_config(options.config)
    config: ServerConfig = read_config(path, "server")
    arguments = {name: getattr(options, name) for name in ("id", "prefix", "new_key") if hasattr(options, name)}
    fingerprint = ""
    if options.action == "add":  # what is to be printed, before anything is changed: the key is not to be had twice
        if re.search(r"^ | $|(^| )[#;]", options.id):
            raise RequestError("an Id that begins or ends with a space, or has # or ; behind one, can't be written in config.ini")
        if config.cert:
            fingerprint = certificate_fingerprint(Path(cast(str, resolve_path(path, config.cert))))
    done = perform(path, config, {"do": options.action, **arguments})
    if options.action == "add":
        done["fingerprint"] = fingerprint
    if options.json:
        print(json.dumps(done, indent=1))
    elif options.action == "add":
        print(format_client_section(config, done))
    else:
        for entry in done if isinstance(done, list) else [done]:
            print(format_client(entry))


def format_client_section(config: ServerConfig, added: dict[str, str]) -> str:
    """The part of config.ini for a client that was added."""
    host = config.localhost
    if host == "0.0.0.0":
        host = "192.0.2.1"
        with suppress(KeyError):
            interface = netifaces.gateways()["default"][netifaces.AF_INET][1]
            host = netifaces.ifaddresses(interface)[netifaces.AF_INET][0]["addr"]
    return textwrap.dedent(f"""\
        # config.ini of the client; its prefix is {added["prefix"]}. The key is shown only now; whoever has it is this client.
        [client]
        # EDIT THIS where the client sees the server by another address or name.
        remotehost = {host}
        remoteport = {config.listenport}
        id = {added["id"]}
        key = {added["key"]}
        fingerprint = {added["fingerprint"]}""")


def format_client(entry: dict[str, Any]) -> str:
    """One line of `clients list`."""
    session = entry.get("session")
    state = "revoked" if entry["revoked"] else "has a key" if entry["key"] else "no key"
    if session:
        refused = sum(session["refused"].values())
        state += f", connected for {session['seconds']} s from {session['peer']} on {session['device']}"
        state += f", {session['received']} bytes received, {session['sent']} sent, {session['dropped']} packets dropped, {refused} refused"
    return f"{quote_id(entry['id'])}  {entry['prefix'] or 'no prefix yet'}  {state}"


def demo_command(options: argparse.Namespace) -> None:
    """`tun6.py demo`."""
    require_privilege()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as SIGINT does, so that all it made is removed
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    print(
        "tun6 demo: lays a network of six hosts on this machine and tunnels IPv6 through its NAT. Nothing outside it is touched.",
        flush=True,
    )
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="tun6-demo-")))
        demo = Demo(undo.enter_context(Lab()), folder)
        undo.callback(demo.stop)
        demo.run()
    print("All steps held, and all that the demo made is removed. README.md tells how to do the same between a VPS and a Raspberry Pi.")


def require_privilege() -> None:
    """Raises KernelError without CAP_NET_ADMIN (linux/capability.h), which root has."""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if capabilities and not int(capabilities[1], 16) >> 12 & 1:
        raise KernelError("making network devices needs root; run it with sudo")


def require_ipv6() -> None:
    """Raises KernelError where a new device gets no IPv6."""
    if sysctl("net.ipv6.conf.default.disable_ipv6") != "0":
        raise KernelError("IPv6 is off in this kernel; turn it on with `sysctl -w net.ipv6.conf.all.disable_ipv6=0`")


def warn_of_overlap(pool: IPv6Network) -> None:
    """The addresses of this machine that are in the pool: whoever gets their /64 gets no traffic."""
    for interface in netifaces.interfaces():
        for entry in netifaces.ifaddresses(interface).get(netifaces.AF_INET6, ()):
            address = ipaddress.IPv6Address(entry["addr"].partition("%")[0])
            if address in pool:
                log.warning("%s of %s is in prefixrange %s; give a range without it", address, interface, pool)


def warn_of_forwarding() -> None:
    """The operator's sysctls that the server depends on: said, not set."""
    if sysctl("net.ipv6.conf.all.forwarding") == "1":
        return
    uplink = netifaces.gateways()["default"].get(netifaces.AF_INET6, (None, "eth0"))[1]
    log.warning(
        "IPv6 forwarding is off, clients reach this machine only; turn it on with `sysctl -w net.ipv6.conf.all.forwarding=1`"
        " and keep it on with `echo net.ipv6.conf.all.forwarding=1 >> /etc/sysctl.d/60-tun6.conf`; an uplink that gets its address"
        " or default route from router advertisements loses them then, unless you first"
        " `sysctl -w net.ipv6.conf.%s.accept_ra=2` and keep that in the same file",
        uplink,
    )


def find_congestion_controls(wanted: str) -> CongestionControls:
    """What the setting `congestion` means on this kernel. Raises ConfigError when that has no such one."""
    name = "bbr" if wanted == "auto" else wanted
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name.encode())
        except OSError:
            available = sysctl("net.ipv4.tcp_available_congestion_control")
            if wanted != "auto":
                raise ConfigError(f"congestion = {name}: this kernel has no such congestion control; it has {available}") from None
            log.warning("this kernel has no BBR (`modprobe tcp_bbr`), which makes the tunnel fast over links that lose packets")
            return CongestionControls(None, None)
    return CongestionControls(name, None if wanted == "auto" else name)


def raise_descriptor_limit() -> None:
    """Each client takes two descriptors; the soft limit is often 1,024 in all."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_until_signalled(run: Callable[[], object], reload: Callable[[], None] | None = None) -> None:
    """Runs until it fails, whose error this raises, or SIGTERM or SIGINT; then it is killed and undoes what it did.

    SIGHUP means `reload`, without which it ends as well.
    """
    stop = gevent.event.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stop.set)
    if reload or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        gevent.signal_handler(signal.SIGHUP, reload or stop.set)
    gevent.get_hub().NOT_ERROR += (Exception,)  # raised to us by `get`, no need to print it
    service = gevent.spawn(run)
    service.link(lambda _: stop.set())
    stop.wait()
    service.kill()
    service.get()


class WarningRateLimit(logging.Filter):
    """Lets so many warnings that differ only in their arguments through in a while, then one that says how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[int, str], tuple[float, int]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is to be written."""
        if record.levelno < logging.WARNING:
            return True
        key, now = (record.levelno, str(record.msg)), self._clock()
        began, count = self._seen.get(key, (now, 0))
        if now - began >= WARNINGS_INTERVAL_S:
            if count > WARNINGS_MAX:
                record.msg = f"{record.msg} (and {count - WARNINGS_MAX} more like this in between)"
            began, count = now, 0
        self._seen[key] = began, count + 1
        return count < WARNINGS_MAX


class ThreadedLogHandler(logging.Handler):
    """Writes the log to a file in a thread of its own: whoever does not read it keeps nobody waiting but that thread."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lines: queue.Queue[str] = queue.Queue(LOG_LINES_MAX)
        self._lost = 0
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Never waits."""
        self.say(self.format(record))

    def say(self, line: str) -> None:
        """Writes a line as it is."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def flush(self) -> None:
        """Waits until all is written, but not for ever."""
        deadline = time.monotonic() + LOG_FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.001)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if self._lost:
                lost, self._lost = self._lost, 0
                line += f"\nWARNING {lost} lines of the log were lost, as nobody read them"
            data = (line + "\n").encode(errors="backslashreplace")
            with suppress(OSError):  # there is nobody who could be told
                while data:
                    data = data[os.write(self._fd, data) :]
            self._lines.task_done()


def set_up_logging(verbose: bool) -> ThreadedLogHandler:
    """Events to stderr, a line each; without time where systemd's journal adds it (systemd.exec(5), JOURNAL_STREAM)."""
    stderr = os.fstat(sys.stderr.fileno())
    journal = os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
    handler = ThreadedLogHandler(sys.stderr.fileno())
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(message)s" if journal else "%(asctime)s %(levelname)s %(message)s",
        handlers=[handler],
    )
    log.addFilter(WarningRateLimit())
    return handler


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; gives its exit status: 2 for usage and configuration, 1 for what fails later."""
    parser = argparse.ArgumentParser(prog="tun6", description="A stable IPv6 /64 over one IPv4 TCP connection, through any NAT.")
    parser.add_argument("--version", action="version", version=f"tun6 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function, text in (
        ("server", server_command, "serve clients; on a host with a routed IPv6 range"),
        ("client", client_command, "keep a tunnel to a server; on the machine that wants IPv6"),
        ("clients", clients_command, "list, add, pin, revoke or restore clients; on the server's machine"),
        ("status", status_command, "show how the running server is; on its machine"),
        ("keygen", keygen_command, "make the server's certificate and show its fingerprint"),
        ("demo", demo_command, "show it all on this machine, in network namespaces that are removed afterwards"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument("-v", "--verbose", action="store_true", help="log more")
        if name != "demo":
            command.add_argument("-c", "--config", metavar="FILE", help=f"default: ./{_CONFIG_FILES[0]}, then {_CONFIG_FILES[1]}")
        if name in ("clients", "status"):
            command.add_argument("--json", action="store_true", help="answer in JSON")
        if name == "clients":
            actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
            for action, text in (
                ("list", "who has which prefix, has a key, is connected"),
                ("add", "give an Id a key, and show once the [client] section for it"),
                ("pin", "give an Id a certain prefix"),
                ("revoke", "keep an Id out from now on; its prefix stays reserved"),
                ("restore", "let a revoked Id in again"),
            ):
                sub = actions.add_parser(action, help=text, description=text)
                sub.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="log more")
                sub.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS, help="the server's config.ini")
                sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="answer in JSON")
                if action != "list":
                    sub.add_argument("id", metavar="ID", help="as the client says it, often a MAC address")
                if action == "pin":
                    sub.add_argument("prefix", metavar="PREFIX", help="a free /64 of prefixrange")
                if action == "add":
                    sub.add_argument("--prefix", metavar="P", help="a free /64 of prefixrange, instead of the next one")
                    sub.add_argument("--new-key", action="store_true", help="replace the key that the Id has")
    options = parser.parse_args(arguments)
    stderr = set_up_logging(options.verbose)
    try:
        options.function(options)
        return 0
    except Tun6Error as error:
        stderr.say(f"tun6: {error}")
        return error.exit_status
    except Exception as error:
        log_defect(options.command, error)
        return 1


if __name__ == "__main__":
    sys.exit(main())

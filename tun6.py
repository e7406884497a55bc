#!/usr/bin/env python3
"""tun6: a stable, routed IPv6 /64 for any machine that can open one IPv4 TCP connection.

A server with a routed IPv6 range gives each client, known by its Id (usually a MAC address), one /64 for ever and carries
that client's IPv6 packets over the client's TCP connection. Usage: `tun6.py server`, `tun6.py client`, `tun6.py demo`.
With keys (`tun6.py keygen`, `tun6.py clients`) the server accepts only clients that it knows, inside TLS.

The path of a packet, from a host on the client's LAN to the Internet (the way back is the same, mirrored):

    LAN host -> client's kernel -> TUN "tun6"                 routed there by the client's default route
                 pump_tun_to_tcp  reads all that waits in the TUN, coalesces small datagrams, sends one batch (SendQueue)
                 -> TCP over IPv4, through any NAT ->
                 pump_tcp_to_tun  receives, cuts frames (Deframer), drops spoofed ones (IngressFilter), writes to this client's TUN
    server's kernel <- TUN "tun6-0"                           which forwards it to the Internet

The wire, on one TCP connection (docs/wire.md has it in full):

    client -> server   {"Id": "00:11:22:aa:bb:cc", "Offload": ["tso6", "uso6"]}
    server -> client   {"Prefix": "2001:db8:1:2::/64", "Offload": ["tso6", "uso6"]}   or {"Error": code, "Text": why}, then close
    both ways          frame frame frame ...

A frame is an IPv6 packet (40 + payload-length bytes; no other length is needed), behind a 10-byte virtio_net_hdr when both
sides sent "Offload". A legacy peer (one that sends no "Offload") gets bare packets, each in a send of its own. Inside TLS, on the
same port, the wire is the same, and the client may add "Key".

The file, top to bottom. A section uses only names defined above it; those marked "pure" touch neither sockets nor files:

    wire constants               what the protocol fixes (pure)
    errors                       one class for each thing that an error ends; warnings that stand, events for the log (pure)
    wire                         MessageParser, messages, offload header, IngressFilter, Deframer, coalesce_datagrams (pure)
    prefixes                     PrefixPool: which Id owns which /64 (pure)
    send queue                   SharedBuffer, FqCodelQueue, SendQueue: what waits for a connection that is full (pure)
    queue in the path            QueueController: at which rate the bottleneck of a connection stays full with a short queue (pure)
    network plans                the commands for `ip`, as pairs of do and undo (pure)
    storage                      GroupCommit, JsonFile, Store and Keys (what a server keeps), AssignmentStore and KeyStore: in files
    cluster rules                Row, Change, ClusterView: which of several servers has an Id's newest session (pure)
    kernel                       Kernel (runs `ip`), Tun, DeviceMonitor (netlink), default_id, find_dropping_chains (runs `nft`)
    connections                  Stream, TlsStream, TCP options, PathMtu, MtuMonitor, congestion control, PacedWriter
    pumps                        TokenBucket, ReadinessCallbacks and the two hot loops
    session                      PathMonitor, Session: one connection, one TUN, two pumps
    hooks                        Hooks: the operator's program, run when sessions begin and end
    neighbour proxy              NeighbourProxy: answers for the prefixes of a range that is on-link, not routed
    service manager              ServiceManager: what systemd is told
    cluster store                Database (PostgreSQL), ClusterStore: a Store for several servers
    server                       ServerConfig, AdmissionControl, Server
    firewall                     what the Internet may reach behind a client: Opening, the rules (pure), Firewall (runs `nft`)
    lan                          Announcement, Radvd, LanChanges, LanRouter: the client as the IPv6 router of a LAN
    client                       ClientConfig, Failover (pure), RemoteServer, Client
    administration               LoopLatency, RequestHandler, AdminRequestHandler, ControlSocket: `tun6.py clients`, `drain`, `status`
    metrics                      Web: Prometheus' metrics and the page, for who asks by HTTP
    installation                 tokens, the unit for systemd, Installer: `tun6.py install`
    doctor                       ServerDoctor, ClientDoctor: what is checked by `tun6.py doctor`, and some of it at the start
    demo                         Lab, a network of namespaces on this machine, and Demo
    command line                 config.ini, subcommands, start-up checks, logging, signals, exit status
"""

from __future__ import annotations

import argparse
import base64
import bisect
import calendar
import compileall
import configparser
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import html
import importlib.metadata
import inspect
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import platform
import pwd
import queue
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket as system_socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Callable, ClassVar, Generic, NamedTuple, NoReturn, Optional, TypeVar, Union, cast

try:
    import gevent
    import gevent.event
    import gevent.lock
    import gevent.pool
    import gevent.threadpool
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

# ---- wire constants --------------------------------------------------------------------------------------------------

MESSAGE_MAX = 4096  # bytes of a handshake message
MESSAGE_DEPTH = 16  # nested brackets in a handshake message; json itself fails with RecursionError at some thousands
ID_MAX = 64  # characters of an Id
KEY_BYTES = 32  # random bytes of a key; on the wire and in config.ini in URL-safe base64, RFC 4648 section 5
TLS_HANDSHAKE_RECORD = 0x16  # first byte of a client that speaks TLS, RFC 8446 section 5.1; that of a plain one is {
IPV6_HEADER = 40  # bytes, RFC 8200 section 3
UDP_HEADER = 8  # bytes, RFC 768
PACKET_MAX = IPV6_HEADER + 0xFFFF  # bytes: the largest packet whose length the field payload-length can say
OFFLOAD_HEADER = struct.Struct("<BBHHHH")  # struct virtio_net_hdr, linux/virtio_net.h, little-endian:
#                                            flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
EMPTY_OFFLOAD_HEADER = bytes(OFFLOAD_HEADER.size)  # of a finished packet: neither GSO nor an open checksum
NEEDS_CSUM, DATA_VALID = 1, 2  # values of flags
GSO_NONE, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 4, 5, 0x80  # values of gso_type
GSO_KINDS = {GSO_TCPV6: "tso6", GSO_TCPV6 | GSO_ECN: "tso6", GSO_UDP_L4: "uso6"}  # gso_type -> its name in "Offload"
GSO_SEGMENTS_MAX = 128  # segments of one GSO frame: UDP_MAX_SEGMENTS of linux/udp.h, and what we set for TCP on our TUNs
EXTENSIONS_MAX = 256  # bytes of extension headers in a GSO frame
WIRE_RATE_MIN, WIRE_RATE_MAX = 50_000, 100_000_000_000  # bits/s of a Rate
EPOCH_MAX = 0x7FFFFFFE  # of an Epoch, which counts the sessions of an Id in a cluster: METRIC_MAX - epoch is a metric yet

# ---- errors ----------------------------------------------------------------------------------------------------------


class Tun6Error(Exception):
    """The root of all errors of tun6. Its text is one sentence for the user."""

    exit_status = 1


class ConfigError(Tun6Error):
    """Usage, config.ini or a file that it names is wrong. Ends the process before it has changed anything."""

    exit_status = 2


class RequestError(Tun6Error):
    """A request of the operator cannot be fulfilled. Ends the request; nothing has changed."""

    exit_status = 2


class KernelError(Tun6Error):
    """`ip` or a TUN device failed. Ends the session; at the start it ends the process."""


class StorageError(Tun6Error):
    """A file could not be saved. Ends the handshake or the request that needed it."""


class SessionError(Tun6Error):
    """Ends the session."""


class ProtocolError(SessionError):
    """The peer broke a rule of the wire. Ends the session, as a stream of frames cannot be resynchronised."""


class PeerSilent(SessionError):
    """Nothing comes from the peer any more, not even an answer to probes."""


class OffloadRefused(SessionError):
    """This kernel refuses the peer's frames of a GSO kind, as several kernels do by mistake. The peer is not offered this kind again."""

    def __init__(self, kind: str) -> None:
        what, setting = f"this kernel refuses its {kind} frames, so it is not offered {kind} again", "tso6" if kind == "uso6" else "no"
        super().__init__(f"{what}; `offload = {setting}` in config.ini does so from the start")
        self.kind = kind


class Refusal(SessionError):
    """The server refuses this client. `code` is one of those in docs/wire.md, `text` is for people."""

    def __init__(self, code: str, text: str, detail: str = "") -> None:
        """`detail` replaces the text in the server's log, and is not told to the client."""
        super().__init__(f"{code}: {detail or text}")
        self.code, self.text, self.detail = code, text, detail


standing_warnings: dict[str, str] = {}  # what the log warned of and still holds, by what it is about; `status` and the page show them


def warn_standing(about: str, message: str, *arguments: object, level: int = logging.WARNING) -> None:
    """Logs a warning, and keeps it in `standing_warnings` until somebody pops what it is about."""
    standing_warnings[about] = message % arguments
    log.log(level, message, *arguments)


EVENT_FIELDS = ("event", "id", "peer", "prefix", "device", "security", "reason", "seconds", "received", "sent", "dropped")


def event(name: str, **fields: object) -> dict[str, dict[str, object]]:
    """Returns `extra` of a log record: what `log = json` says beside the message, always in the order of EVENT_FIELDS."""
    fields["event"] = name
    texts = {key: value if isinstance(value, (int, float)) else str(value) for key, value in fields.items() if value is not None}
    return {"fields": {key: texts[key] for key in EVENT_FIELDS if key in texts}}


# ---- wire ------------------------------------------------------------------------------------------------------------

# Like readinto and write of Python's raw files: they return the number of bytes, None when they would block, 0 at the end.
Read = Callable[[memoryview], Optional[int]]
Write = Callable[[memoryview], Optional[int]]

COALESCED_DATAGRAMS_MAX = 64  # datagrams in one frame: UDP_MAX_SEGMENTS before Linux 6.9
COALESCED_BYTES_MAX = 8 << 10  # bytes of such a frame: no more than a socket may hold unsent, see UNSENT_MIN


def encode_message(message: dict[str, Any]) -> bytes:
    """Returns the bytes of one handshake message."""
    return json.dumps(message).encode("ascii")


class MessageParser:
    """Finds the one JSON object at the beginning of a connection, however it is cut into segments."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._depth = 0  # of nested brackets
        self._in_string = self._escaped = False

    def feed(self, data: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Takes received bytes. Returns None until the closing brace has come, then the object and the bytes behind it (frames).

        Raises ProtocolError when the bytes are not one object of at most MESSAGE_MAX bytes of UTF-8.
        """
        for at, byte in enumerate(data):
            self._text.append(byte)
            if len(self._text) > MESSAGE_MAX:
                raise ProtocolError(f"handshake message longer than {MESSAGE_MAX} bytes")
            if self._closes_object(byte):
                return self._parse(), data[at + 1 :]
        return None

    def _closes_object(self, byte: int) -> bool:
        """Follows strings and brackets over one more byte. Returns whether it is the brace that closes the object."""
        if self._in_string:
            self._in_string = self._escaped or byte != ord('"')
            self._escaped = not self._escaped and byte == ord("\\")
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


def is_valid_id(text: object) -> bool:
    """Returns whether this may be an Id: 1 to ID_MAX printable characters."""
    return isinstance(text, str) and 1 <= len(text) <= ID_MAX and text.isprintable()


def canonical_id(id_: str) -> str:
    """Returns the Id in the spelling that stands for it: a MAC address in lower case with colons, any other Id as it is."""
    if re.fullmatch("[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}|[0-9a-fA-F]{4}([.][0-9a-fA-F]{4}){2}", id_):
        digits = re.sub("[:.-]", "", id_).lower()
        return ":".join(digits[at : at + 2] for at in range(0, 12, 2))
    return id_


def parse_offload(message: dict[str, Any]) -> frozenset[str] | None:
    """Returns the GSO kinds that the sender of this message accepts, None for a legacy peer. Raises ProtocolError."""
    kinds = message.get("Offload")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ProtocolError("Offload is not a list of strings")
    return frozenset(kinds)


def parse_epoch(message: dict[str, Any]) -> int:
    """Returns the Epoch in a message of either side, 0 where there is none that could be one: it is no reason not to be served."""
    epoch = message.get("Epoch")
    return epoch if type(epoch) is int and 0 < epoch <= EPOCH_MAX else 0  # True is an int, too


def parse_wire_rate(message: dict[str, Any]) -> int | None:
    """Returns the Rate in a message of either side: bits/s, headers included, that the server sends at most. None: as much as it can.

    What could be none is ignored.
    """
    rate = message.get("Rate")
    return rate if isinstance(rate, int) and WIRE_RATE_MIN <= rate <= WIRE_RATE_MAX else None


class Hello(NamedTuple):
    """The message of a client."""

    id: str  # as canonical_id returns it
    gso_kinds: frozenset[str] | None  # as parse_offload returns them
    key: str  # "" when the client sent none
    dry: bool = False  # whether the client only asks if it would be served
    epoch: int = 0  # as parse_epoch returns it
    moved: bool = False  # whether it may be told to go to another server
    rate: int | None = None  # as parse_wire_rate returns it


def parse_hello(message: dict[str, Any]) -> Hello:
    """Checks the message of a client. Raises ProtocolError."""
    if not is_valid_id(message.get("Id")):
        raise ProtocolError(f"Id is not a string of 1 to {ID_MAX} printable characters")
    key = message.get("Key", "")
    if not isinstance(key, str):
        raise ProtocolError("Key is not a string")
    dry, moved = (message.get(name) is True for name in ("Dry", "Moved"))
    return Hello(canonical_id(message["Id"]), parse_offload(message), key, dry, parse_epoch(message), moved, parse_wire_rate(message))


def parse_answer(message: dict[str, Any]) -> tuple[IPv6Network, frozenset[str] | None]:
    """Returns the prefix and the GSO kinds in the message of a server. Raises Refusal when it is an Error, ProtocolError."""
    if "Error" in message:
        raise Refusal(to_printable(message["Error"]), to_printable(message.get("Text", "")))
    try:
        prefix = parse_network(message.get("Prefix"), strict=False)
        require_unicast(prefix)
    except ValueError as error:
        shown = to_printable(message.get("Prefix"))
        raise ProtocolError(f"Prefix {shown!r} is no unicast IPv6 network: {to_printable(error)}") from None
    if prefix.prefixlen != 64:
        raise ProtocolError(f"Prefix {prefix} is not a /64")
    return prefix, parse_offload(message)


def to_printable(text: object, limit: int = 200) -> str:
    """Makes a peer's text safe for one line of a log or terminal, and no longer than `limit` characters."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:limit])


def quote_id(id_: str) -> str:
    """Returns an Id as the log shows it."""
    return repr(id_[:ID_MAX])


def is_ipv4(text: str) -> bool:
    """Returns whether the text is an IPv4 address."""
    try:
        return bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False


def parse_network(text: object, strict: bool = True) -> IPv6Network:
    """Like IPv6Network(text, strict), but accepts neither numbers nor scopes (a % and what follows, RFC 4007). Raises ValueError."""
    if not isinstance(text, str) or "%" in text:
        raise ValueError("it is not written like 2001:db8:1:2::/64")
    return IPv6Network(text, strict=strict)


def require_unicast(network: IPv6Network) -> None:
    """Raises ValueError for a network with addresses that are not global unicast ones (RFC 4291 section 2.4)."""
    for special, name in (("::/64", "loopback"), ("fe80::/10", "link-local"), ("ff00::/8", "multicast")):
        if network.overlaps(IPv6Network(special)):
            raise ValueError(f"it contains {name} addresses")


def check_offload(header: memoryview, length: int, gso_kinds: frozenset[str]) -> None:
    """Checks the virtio_net_hdr of a packet of `length` bytes before the kernel sees it.

    `gso_kinds` are those that we offered. Raises ProtocolError. The rules are those of struct virtio_net_hdr in
    linux/virtio_net.h, of virtio_net_hdr_to_skb() in the kernel, and GSO_SEGMENTS_MAX.
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
    if kind not in gso_kinds:
        raise ProtocolError(f"offload header with gso_type {gso_type:#x}, which was not offered")
    if not flags:
        raise ProtocolError("offload header with a gso_type but no checksum to fill in")
    if csum_start > IPV6_HEADER + EXTENSIONS_MAX:  # older kernels cut where the transport header is, whatever csum_start says
        raise ProtocolError(f"offload header with a gso_type and a checksum at {csum_start}")
    transport = 60 if kind == "tso6" else UDP_HEADER  # the most bytes of transport header: they count for no segment's gso_size
    if length - csum_start - transport > gso_size * GSO_SEGMENTS_MAX or not gso_size:
        raise ProtocolError(f"offload header with gso_size {gso_size} for {length} bytes: over {GSO_SEGMENTS_MAX} segments")


class IngressFilter:
    """Decides by source and destination which packets of a session are forwarded (BCP 38, RFC 2827), and counts the others.

    A packet from a client must have a source in the client's /64, a packet from the server a destination in it. The other
    address must be outside that /64 and must not belong to one link or one host only (RFC 4291 section 2.4). So neither side
    can send router advertisements or redirects to the other's kernel, or packets in somebody else's name.
    """

    def __init__(self, prefix: IPv6Network, from_client: bool, denied: IPv6Network | None = None) -> None:
        """`prefix` is the client's /64, `denied` a range that must not be reached either."""
        self.prefix = prefix
        self._prefix = int(prefix.network_address) >> 64
        self.from_client = from_client
        self._denied = denied
        self.refused: Counter[str] = Counter()  # packets, by reason

    def permits(self, source: int, destination: int) -> bool:
        """Returns whether a packet is forwarded whose addresses have these upper 64 bits."""
        own, other = (source, destination) if self.from_client else (destination, source)
        if own != self._prefix:
            reason = "outside its /64"
        elif other == self._prefix:
            reason = "within its /64"
        elif other >> 56 == 0xFF:
            reason = "multicast"
        elif other >> 54 == 0xFE80 >> 6:
            reason = "link-local"
        elif not other:
            reason = "loopback"
        elif self._denied and IPv6Address(other << 64) in self._denied:
            reason = "to another client"
        else:
            return True
        self.refused[reason] += 1
        return False

    def reverse(self) -> IngressFilter:
        """Returns the filter of the other side, so that nothing is sent that it must refuse."""
        return IngressFilter(self.prefix, not self.from_client)


def source_refused(packet: memoryview, sender: IPv6Address) -> bytes | None:
    """Returns the ICMPv6 error "source address failed ingress/egress policy" for a packet: RFC 4443 section 3.1, type 1, code 5.

    None for packets that must not be answered: section 2.4 (e).
    """
    source, destination = IPv6Address(bytes(packet[8:24])), IPv6Address(bytes(packet[24:40]))
    is_error = packet[6] == 58 and len(packet) > IPV6_HEADER and packet[IPV6_HEADER] < 128
    if is_error or source.is_unspecified or source.is_multicast or source.is_link_local or destination.is_multicast:
        return None
    body = struct.pack(">BBHI", 1, 5, 0, 0) + bytes(packet[: 1280 - IPV6_HEADER - 8])  # section 2.4 (c): no more than the least MTU
    addresses = sender.packed + source.packed
    summed = sum(struct.unpack(f">{(len(body) + 1) // 2 + 16}H", addresses + body + bytes(len(body) % 2))) + len(body) + 58
    body = body[:2] + struct.pack(">H", 0xFFFF - summed % 0xFFFF) + body[4:]
    return struct.pack(">IHBB", 6 << 28, len(body), 58, 64) + addresses + body


class Deframer:
    """Cuts the bytes of one TCP connection into frames, and leaves out those that the ingress filter refuses.

    `buffer` may be shared by the whole process: between two calls it holds only the frames that `pull` returned, which are
    valid until the next use of the buffer. `gso_kinds` are as in check_offload, None when frames are bare packets.
    """

    # Fields that are checked: offload header without csum_offset, which matters only with flags; byte with the version, payload
    # length, next header; upper halves of source and destination.
    _WITH_HEADER = struct.Struct(">QxxBxxxHBxQ8xQ8x")
    _BARE = struct.Struct(">BxxxHBxQ8xQ8x")

    def __init__(self, buffer: bytearray, gso_kinds: frozenset[str] | None, ingress_filter: IngressFilter) -> None:
        assert len(buffer) >= 2 * (OFFLOAD_HEADER.size + PACKET_MAX)
        self._buffer, self._view = buffer, memoryview(buffer)
        self._gso_kinds, self._ingress_filter = gso_kinds, ingress_filter
        self._rest = b""  # the beginning of a frame that is not complete yet

    def push(self, data: bytes) -> list[memoryview]:
        """Returns the frames that are complete with these bytes, of which there are at most MESSAGE_MAX. Raises ProtocolError."""
        have = len(self._rest) + len(data)
        self._view[:have] = self._rest + data
        return self._cut(have)

    def pull(self, read: Read, most: int) -> list[memoryview]:
        """Returns the frames that are complete after one call of `read`, for at most `most` bytes.

        Raises EOFError at the end, ProtocolError, and what `read` raises; after the latter, pull can be called again.
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

    def _cut(self, have: int) -> list[memoryview]:
        buffer, view, frames, at = self._buffer, self._view, [], 0
        gso_kinds, ingress_filter = self._gso_kinds, self._ingress_filter
        shortest = IPV6_HEADER if gso_kinds is None else OFFLOAD_HEADER.size + IPV6_HEADER
        unpack_with, unpack_bare = self._WITH_HEADER.unpack_from, self._BARE.unpack_from
        while at + shortest <= have:
            if gso_kinds is None:
                offload, (first, payload, next_header, source, destination) = 0, unpack_bare(buffer, at)
            else:
                offload, first, payload, next_header, source, destination = unpack_with(buffer, at)
            if first >> 4 != 6:
                raise ProtocolError(f"frame that begins with {first:#04x} is no IPv6 packet")
            if not payload and not next_header:  # a hop-by-hop header without a length: RFC 2675, and the kernel's BIG TCP
                raise ProtocolError("frame is a jumbogram")
            end = at + shortest + payload
            if end > have:
                break
            if offload and gso_kinds is not None:  # the header of most small packets is empty
                check_offload(view[at : at + OFFLOAD_HEADER.size], IPV6_HEADER + payload, gso_kinds)
            if ingress_filter.permits(source, destination):
                frames.append(view[at:end])
            at = end
        self._rest = bytes(view[at:have]) if at < have else b""
        return frames


_FRAME_MIN = OFFLOAD_HEADER.size + IPV6_HEADER  # bytes
unpack_addresses = struct.Struct("!18xQ8xQ").unpack_from  # upper halves of source and destination in a frame with offload header
_unpack_to_send = struct.Struct(">BBxxxxxxxxBxxxHB").unpack_from  # flags, gso_type; byte with version, payload length, next header


def is_sendable(buffer: memoryview, at: int, length: int, gso_kinds: frozenset[str] | None) -> bool:
    """Returns whether the frame that one read of a TUN put into the buffer may go to a peer that accepts these GSO kinds.

    It may not if it is no IPv6 packet, if its length cannot be said on the wire (jumbograms, BIG TCP), or if it has waited in
    the TUN since a time when its peer accepted more. Clears the flag DATA_VALID, which is for the kernel's own use.
    """
    if length < _FRAME_MIN:
        return False
    flags, gso_type, first, payload, next_header = _unpack_to_send(buffer, at)
    if flags or gso_type:
        if flags & DATA_VALID:
            flags &= ~DATA_VALID
            buffer[at] = flags
        if (flags or gso_type) and (gso_kinds is None or (gso_type and GSO_KINDS.get(gso_type) not in gso_kinds)):
            return False
    return bool(first >> 4 == 6 and payload == length - _FRAME_MIN and (payload or next_header))


_OPEN_UDP = OFFLOAD_HEADER.pack(NEEDS_CSUM, GSO_NONE, 0, 0, IPV6_HEADER, 6)  # of a datagram whose checksum is still to be filled in
# Offload header; version to flow label; payload length; next header to ports; UDP length.
_unpack_datagram = struct.Struct(">10s4sH38sHxx").unpack_from


def coalesce_datagrams(frames: memoryview, ends: list[int]) -> list[int]:
    """Replaces neighbouring datagrams of one UDP flow and one size (the last may be shorter) by one GSO frame.

    Works in place and returns the new ends; the arguments are those of SendQueue.send. The peer's kernel routes such a frame
    as one packet, whose cost is that of one small packet. Segmentation restores the datagrams bit for bit, as none is
    coalesced whose checksum is wrong.
    """
    coalesced: list[int] = []
    header = label = flow = b""  # what the datagrams of the current frame have in common
    start = to = begin = datagrams = size = 0  # current frame's place; beginning of the next one; its datagrams, the length of each
    for end in ends:
        its_header, its_label, length, its_flow, udp_length = _unpack_datagram(frames, begin)
        if (
            its_flow == flow
            and UDP_HEADER < length <= size
            and length == udp_length
            and its_label == label
            and its_header == header
            and datagrams < COALESCED_DATAGRAMS_MAX
            and to - start + length < COALESCED_BYTES_MAX
            and (
                header == _OPEN_UDP or (_has_valid_checksum(frames[begin:end]) and (datagrams > 1 or _has_valid_checksum(frames[start:to])))
            )
        ):
            datagrams += 1
            grown = to + length - UDP_HEADER
            frames[to:grown] = frames[end - length + UDP_HEADER : end]
            coalesced[-1] = to = grown
            if length < size:
                flow = b""  # only the last datagram may be shorter
        else:
            if datagrams > 1:
                _write_gso_headers(frames[start:to], size)
            start, to = to, to + end - begin
            if start != begin:
                frames[start:to] = frames[begin:end]
            coalesced.append(to)
            datagrams = 1
            header, label, size = its_header, its_label, length
            may_grow = its_flow[0] == 17 and length == udp_length and header in (_OPEN_UDP, EMPTY_OFFLOAD_HEADER)
            flow = its_flow if may_grow else b""
        begin = end
    if datagrams > 1:
        _write_gso_headers(frames[start:to], size)
    return coalesced


def sum_words(data: bytes | memoryview) -> int:
    """Returns the sum of the 16-bit words of these bytes, modulo 0xFFFF: 0 where a right checksum is among them (RFC 1071)."""
    return (int.from_bytes(data, "big") << 8 * (len(data) % 2)) % 0xFFFF  # 2**16 is 1, modulo 0xFFFF


def _has_valid_checksum(frame: memoryview) -> bool:
    """Returns whether a UDP datagram has its checksum and it is right, with the pseudo header (RFC 8200 section 8.1)."""
    udp = frame[_FRAME_MIN:]
    return bool((udp[6] or udp[7]) and (sum_words(frame[OFFLOAD_HEADER.size + 8 :]) + len(udp) + 17) % 0xFFFF == 0)


def _write_gso_headers(frame: memoryview, size: int) -> None:
    """Turns the headers of the first datagram into those of a GSO frame whose datagrams have `size` bytes with their UDP header."""
    length = len(frame) - _FRAME_MIN
    addresses = int.from_bytes(frame[OFFLOAD_HEADER.size + 8 : _FRAME_MIN], "big")
    OFFLOAD_HEADER.pack_into(frame, 0, NEEDS_CSUM, GSO_UDP_L4, IPV6_HEADER + UDP_HEADER, size - UDP_HEADER, IPV6_HEADER, 6)
    struct.pack_into(">H", frame, OFFLOAD_HEADER.size + 4, length)
    struct.pack_into(">HH", frame, _FRAME_MIN + 4, length, (addresses + length + 17) % 0xFFFF)


# ---- prefixes --------------------------------------------------------------------------------------------------------


class PrefixPool:
    """Which Id owns which /64 of a range. Every method takes constant time (`assign`: amortised), however full the pool is.

    Only `keep` takes longer, for each /64 at the end that has an owner.
    """

    def __init__(self, network: IPv6Network) -> None:
        """`network` is /64 or shorter."""
        self.network = network
        self.size = 1 << (64 - network.prefixlen)  # number of /64s
        self._base = int(network.network_address) >> 64
        self._index_of: dict[str, int] = {}
        self._owner_of: dict[int, str] = {}  # an index may stay reserved for an Id that has another one by now
        self._released: list[int] = []
        self._next = 0  # every index below it has an owner or was released

    @property
    def free(self) -> int:
        """Number of /64s that can be assigned."""
        return self.size - len(self._owner_of)

    def owners(self) -> list[str]:
        """Returns all Ids that own a /64."""
        return list(self._index_of)

    def find(self, id_: str) -> IPv6Network | None:
        """Returns the /64 that the Id owns, or None."""
        index = self._index_of.get(id_)
        return None if index is None else self._prefix(index)

    def assign(self, id_: str) -> IPv6Network:
        """Returns the Id's /64: the one it owns, else one that was released, else the lowest that never had an owner.

        Raises Refusal when the pool is exhausted.
        """
        index = self._index_of.get(id_)
        if index is None:
            index = self._free_index()
            self._set_owner(id_, index)
        return self._prefix(index)

    def pin(self, id_: str, prefix: IPv6Network) -> None:
        """Gives the Id this /64. The one that it had stays reserved for it until `unreserve`.

        Raises ValueError when the prefix is no /64 of the range or belongs to another Id.
        """
        index = (int(prefix.network_address) >> 64) - self._base
        if prefix.prefixlen != 64:
            raise ValueError(f"{prefix} is not a /64")
        if not 0 <= index < self.size:
            raise ValueError(f"{prefix} is outside {self.network}")
        if self._owner_of.get(index, id_) != id_:
            owner = self._owner_of[index]
            raise ValueError(f"{prefix} is already the prefix of {repr(owner) if owner else 'the server itself'}")
        self._set_owner(id_, index)

    def keep(self) -> IPv6Network | None:
        """Reserves the last /64 without an owner for the server itself until `unreserve`. Returns None when it would be the only one."""
        index = next((at for at in range(self.size - 1, 0, -1) if at not in self._owner_of), None)
        if index is None:
            return None
        self._owner_of[index] = ""  # no Id
        return self._prefix(index)

    def unreserve(self, prefix: IPv6Network) -> None:
        """Makes a /64 assignable again that is reserved for the server or an Id which owns another one by now. Otherwise does nothing."""
        index = (int(prefix.network_address) >> 64) - self._base
        if index in self._owner_of and self._index_of.get(self._owner_of[index]) != index:
            owner = self._owner_of.pop(index)
            self._released += [index] if owner or index < self._next else []  # what the server had at the end is not given first

    def release(self, id_: str) -> None:
        """Takes back the Id's /64, which the Id has never heard of. Raises KeyError when it owns none."""
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

    def _set_owner(self, id_: str, index: int) -> None:
        self._index_of[id_], self._owner_of[index] = index, id_

    def _prefix(self, index: int) -> IPv6Network:
        return IPv6Network(((self._base + index) << 64, 64))


# ---- send queue ------------------------------------------------------------------------------------------------------

Encrypt = Callable[[Union[bytes, bytearray, memoryview]], bytes]  # plain text to TLS records

BATCH_BYTES = 256 << 10  # bytes that one session moves before the other sessions continue
BATCH_FRAMES = 250  # frames likewise: about 1 ms; with 1,000, a TUN's queue of 500 overflowed, and a flood moved a fifth less
BATCH_RECORDS = 1_000  # TLS records likewise: about 5 ms
BUSY_BYTES, BUSY_FRAMES = 32 << 10, 50  # a session that moved so much at once, or more, has much to move
FLUSH_BYTES = 4 << 10  # bytes taken from the queue at a time; what arrives next can overtake all others
QUANTUM = 1524  # bytes that a flow may send before the next flow does: a full frame, RFC 8290 section 5.2
# RFC 8289 sections 4.3 and 4.4 have 100 ms and 5 ms. With those, four uploads over 100 Mbit/s, 40 ms and 1 % loss moved 57, 61, 75
# and 75 Mbit/s, with 200 and 50, in turn, 67, 75, 74 and 70: when the outer TCP repairs a loss, all that it carries is late, which is
# no standing queue. A download over 50 Mbit/s, 50 ms and 0.5 % loss moved 44.6 Mbit/s with an interval of 200 ms (medians of 8, in turn)
# and 46.5 with 400: until a drop shows, repair and queue take some round trips, and a second one has halved the sender's window by then.
CODEL_INTERVAL_S, CODEL_TARGET_S = 0.4, 0.05
# At least so many round trips of the outer connection: a sender answers a drop a round trip later, and a repair takes one, at whose
# end a whole window of the TCP inside comes at once.
CODEL_ROUND_TRIPS, CODEL_TARGET_MAX_S = (3, 1), 1.0  # for interval and target
FLOWS_MAX = 1024  # flows that have a queue of their own; Linux's fq_codel has as many, RFC 8290 section 5.2
SEND_QUEUE_MAX = 4 << 20  # bytes that may wait for one connection: 50 ms at 640 Mbit/s
SHARED_BUFFER_MAX = 64 << 20  # bytes that may wait for all connections
FRAME_COST = 150  # bytes of memory that a waiting frame takes beside its own: bytearray, tuple, float
LARGE_FRAMES_BITS = 100_000_000  # bits/s: with a limit below that a peer gets and is offered no large packets, which take 5 ms and more
CATCH_UP_S, BURST_S = 0.05, 0.005  # of a limit that was not used make up for a late event loop, and that are left after idleness
SPARSE_FLOWS_MAX = 16  # of the flows whose turn is next, among which a sparse one is looked for
PAUSE_MAX_S = 0.1  # until it is looked again whether something may pass: the limit may have been changed
HELD_S, HELD_MIN = 0.2, 128 << 10  # of what comes from a limited peer, so many seconds of its limit or bytes may wait
READ_GAIN, READ_MIN = 4, 10_000_000  # times its limit, or bits/s, that a limited peer is read at: TCP sends twice as much in slow start,
#                                      and what fills the peer's own socket, 300 KB on a LAN, holds up its other packets
DRAIN_S = 1.0  # in which it is read without that after a change: what its socket held would take minutes, and TCP would give up


class FlowQueue:
    """The waiting frames of one flow, and CoDel's state for them with the names of RFC 8289 section 5.2."""

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
    """The bound in bytes on what may wait in several queues together.

    Each queue may grow to what the others leave free (A. Choudhury and E. Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches", 1998): a few queues get all that they want, and many cannot fill the memory.
    """

    def __init__(self, size: int) -> None:
        self.size = self.free = size


SHARED_BUFFER = SharedBuffer(SHARED_BUFFER_MAX)  # of the send queues of all sessions


class FqCodelQueue:
    """FQ-CoDel (RFC 8290) for frames that a blocked socket does not take: one queue for each flow, sparse flows first.

    Flows beyond FLOWS_MAX share as many more queues by a hash of their key, as all flows do in the RFC. Otherwise a new flow
    with each packet would let the state grow without bound and would always be served before the old flows. Times are in
    seconds of any one clock. `dropped` and `marked` count packets.
    """

    def __init__(
        self,
        target: float = CODEL_TARGET_S,
        interval: float = CODEL_INTERVAL_S,
        limit: int = SEND_QUEUE_MAX,
        shared: SharedBuffer | None = None,
    ) -> None:
        """`limit` is the number of bytes that may wait here, `shared` bounds them together with those of other queues."""
        self._target, self._interval, self.limit = target, interval, limit
        self._target_min, self._interval_min = target, interval
        self._shared = shared or SharedBuffer(8 * limit)
        self._flows: dict[bytes | int, FlowQueue] = {}
        self._new: deque[FlowQueue] = deque()
        self._old: deque[FlowQueue] = deque()
        self._longest = 0  # bytes: no flow has more
        self._long: list[FlowQueue] = []  # those that had at least half of the longest when it was last looked for
        self.bytes = self.frames = self.dropped = self.marked = 0

    def set_round_trip(self, seconds: float) -> None:
        """Adapts CoDel to a path with this round trip."""
        interval, target = (number * seconds for number in CODEL_ROUND_TRIPS)
        self._interval, self._target = max(self._interval_min, interval), max(self._target_min, min(target, CODEL_TARGET_MAX_S))

    def push(self, frame: bytearray, now: float) -> None:
        """Adds a frame that has just arrived. When too much waits, a flow at least half as long as the longest loses its oldest."""
        key: bytes | int = self._flow_key(frame)
        shared_key = hash(key) % FLOWS_MAX  # the hash of bytes differs in each process: nobody can choose the queue that he gets
        flow = self._flows.get(key) or self._flows.get(shared_key)
        if flow is None:
            key = key if len(self._flows) < FLOWS_MAX else shared_key
            flow = self._flows[key] = FlowQueue(key)
            self._new.append(flow)
        flow.frames.append((now, frame))
        flow.bytes += len(frame)
        self.bytes += len(frame)
        self._shared.free -= len(frame) + FRAME_COST
        self.frames += 1
        self._longest = max(self._longest, flow.bytes)
        while self.bytes > min(self.limit, self._shared.free):
            self._take(self._find_long_flow(flow))
            self.dropped += 1

    def pop(self, now: float) -> bytearray | None:
        """Removes and returns the frame to be sent next, None when there is none."""
        passed_over = 0
        while self._new or self._old:
            queue = self._new or self._old
            flow = queue[0]
            if flow.deficit <= 0:
                flow.deficit += QUANTUM
                self._old.append(queue.popleft())
                passed_over += 1
                if passed_over >= len(self._old) and not self._new:
                    self._skip_rounds()
                    passed_over = 0
                continue
            frame = self._codel(flow, now)
            if frame is None:
                queue.popleft()
                if queue is self._new and self._old:  # RFC 8290 section 4.2: it does not become a new flow again at once
                    self._old.append(flow)
                else:
                    del self._flows[flow.key]
                continue
            flow.deficit -= len(frame)
            return frame
        self._longest = 0
        self._long.clear()
        return None

    def pop_sparse(self, now: float) -> bytearray | None:
        """Like `pop`, but only a frame of a flow that has not used up its quantum, of which no flow gets a new one."""
        for flow in (*itertools.islice(self._new, SPARSE_FLOWS_MAX), *itertools.islice(self._old, SPARSE_FLOWS_MAX)):
            frame = self._codel(flow, now) if flow.frames and flow.deficit > 0 else None
            if frame is not None:
                flow.deficit -= len(frame)
                return frame
        return None

    def clear(self) -> None:
        """Discards all that waits, uncounted."""
        self._shared.free += self.bytes + FRAME_COST * self.frames
        self.bytes = self.frames = self._longest = 0
        for each in (self._flows, self._new, self._old, self._long):
            each.clear()

    def _skip_rounds(self) -> None:
        """Does at once the rounds in which each flow is passed over: over 40 of them behind a frame of 64 KiB, which took 7 us."""
        rounds = 1 + min(-flow.deficit // QUANTUM for flow in self._old)
        if rounds > 0:
            for flow in self._old:
                flow.deficit += rounds * QUANTUM

    def _find_long_flow(self, flow: FlowQueue) -> FlowQueue:
        """Returns this flow or another, with at least half of the bytes of the longest one.

        All long flows are found in one search, so that searches are rare. If each frame searched for the very longest flow, it
        would cost O(flows), which held the event loop for seconds when each packet was of a new flow.
        """
        while 2 * flow.bytes < self._longest:
            if not self._long:
                self._longest = max(flow.bytes for flow in self._flows.values())
                self._long = [flow for flow in self._flows.values() if 2 * flow.bytes >= self._longest]
            flow = self._long[-1]
            if 2 * flow.bytes < self._longest:
                self._long.pop()
        return flow

    def _flow_key(self, frame: bytearray) -> bytes:
        """Returns what the packets of one flow have in common: addresses, next header, and ports or the identifier of an echo."""
        at = OFFLOAD_HEADER.size
        next_header = frame[at + 6]
        ports = frame[at + 44 : at + 46] if next_header == 58 else frame[at + 40 : at + 44] if next_header in (6, 17) else b""
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
        """Sets CE in a packet whose sender supports ECN (RFC 3168 section 5); counts any other as dropped and returns False."""
        assert frame is not None
        at = OFFLOAD_HEADER.size + 1  # this byte begins with the low half of the traffic class
        if frame[at] & 0x30:
            frame[at] |= 0x30
            self.marked += 1
            return True
        self.dropped += 1
        return False


def count_bytes(frame: bytearray | memoryview) -> int:
    """Returns how many bytes the IPv6 packets have that a frame with offload header is: each segment of a large one has all headers."""
    length, kind = len(frame) - OFFLOAD_HEADER.size, frame[1]
    if kind == GSO_NONE:
        return length
    size, headers = cast("tuple[int, int]", OFFLOAD_HEADER.unpack_from(frame)[3:5])
    data_offset = OFFLOAD_HEADER.size + headers + 12  # where TCP says how long its header is, RFC 9293 section 3.1
    if kind == GSO_UDP_L4:
        headers += UDP_HEADER
    elif data_offset < len(frame):
        headers += frame[data_offset] >> 4 << 2
    return length + max((length - headers - 1) // size, 0) * headers


class RateLimit:
    """Lets frames leave a queue at no more than a rate, without bursts.

    The size of a frame is known only when it leaves. Therefore it leaves as soon as the time of those before it is over, and its own
    time runs afterwards. That of a large one may be long, 0.5 s at 1 Mbit/s, in which frames of sparse flows leave in advance.
    """

    def __init__(self, bits_per_s: int) -> None:
        """`bits_per_s` are those of IPv6 packets."""
        self.bits_per_s = bits_per_s
        self._seconds_per_byte = 8 / bits_per_s
        self._advance_s = PACKET_MAX * self._seconds_per_byte
        self._free_at = -math.inf  # when the time of all that has left is over
        self._slack_s = BURST_S

    def pop(self, queue: FqCodelQueue, now: float) -> bytearray | None:
        """Removes and returns the frame of the queue that may leave now, None when none may or there is none."""
        ahead = self._free_at - now
        frame = queue.pop(now) if ahead <= 0 else queue.pop_sparse(now) if ahead <= self._advance_s else None
        if frame is not None:
            self._free_at = max(self._free_at, now - self._slack_s) + count_bytes(frame) * self._seconds_per_byte
            self._slack_s = CATCH_UP_S
        elif ahead <= 0:
            self._slack_s = BURST_S
        return frame

    def admits(self, size: int, now: float) -> bool:
        """Returns whether packets of so many bytes, before which nothing waits, may leave together; then they count."""
        end = max(self._free_at, now - self._slack_s) + size * self._seconds_per_byte
        if end > now:
            return False
        self._free_at = end
        return True

    def take_back(self, size: int) -> None:
        """Lets bytes that were admitted, and for which the connection had no room, count only when they leave."""
        self._free_at -= size * self._seconds_per_byte

    def pause(self, now: float) -> float:
        """Returns after how many seconds to call `pop` again, 0 at once."""
        return min(max(self._free_at - now, 0.0), PAUSE_MAX_S)


class SendQueue:
    """What goes to one peer. While the connection takes everything nothing waits; when it does not, frames wait in an FqCodelQueue."""

    def __init__(
        self,
        write: Write,
        bare: bool,
        encrypt: Encrypt | None = None,
        clock: Callable[[], float] = time.monotonic,
        whole_batches: bool = True,
        shared: SharedBuffer | None = None,
    ) -> None:
        """`bare`: each packet is written by itself, without its offload header. `encrypt` is applied to what is written.

        `whole_batches`: while nothing waits, a batch is encrypted and written whole. Otherwise it goes through the queue and is
        encrypted in small pieces, as what is encrypted cannot be overtaken any more. `shared` is that of FqCodelQueue.
        """
        self._write, self._bare, self._encrypt, self._clock, self._whole_batches = write, bare, encrypt, clock, whole_batches
        self.queue = FqCodelQueue(shared=shared)
        self._limit: RateLimit | None = None
        self._pop: Callable[[float], bytearray | None] = self.queue.pop  # or what the limit lets pass of that
        self._direct = whole_batches  # whether what finds nothing waiting is written without the queue
        self._partial = memoryview(b"")  # the rest of what the connection took in part
        self.blocked = False  # whether something waits for the connection

    @property
    def dropped(self) -> int:
        """Number of packets that the queue dropped."""
        return self.queue.dropped

    def pace(self, write: Write) -> None:
        """From now on uses this paced writer."""
        self._write, self._whole_batches = write, not self._encrypt
        self.set_limit(self._limit)

    def set_limit(self, limit: RateLimit | None) -> None:
        """From now on sends only what this limit permits; the rest goes through the queue. None: there is no limit."""
        self._limit = limit
        self._pop = functools.partial(limit.pop, self.queue) if limit else self.queue.pop
        self._direct = self._whole_batches and not limit

    @property
    def takes_large(self) -> bool:
        """Whether datagrams may be coalesced."""
        return not self._limit or self._limit.bits_per_s >= LARGE_FRAMES_BITS

    def pause(self) -> float:
        """Returns for how many seconds the limit lets nothing pass, 0 when what waits, waits for the connection."""
        return self._limit.pause(self._clock()) if self._limit and not self._partial else 0.0

    def close(self) -> None:
        """Discards all that waits."""
        self.queue.clear()

    def send(self, frames: memoryview, ends: list[int]) -> None:
        """Takes frames, each with its offload header, that lie one behind the other; `ends` are the places where they end."""
        taken, admitted = 0, False
        if not self.blocked and (self._direct or (admitted := self._is_admitted(frames, ends))):
            if self._bare:
                taken = self._send_each(frames, ends)
            elif self._encrypt:
                taken = len(ends)
                data = self._encrypt(frames[: ends[-1]])
                self._partial = memoryview(data[self._write(memoryview(data)) or 0 :])
            else:
                sent = self._write(frames[: ends[-1]]) or 0
                taken = len(ends) if sent == ends[-1] else self._count_taken(frames, ends, sent)
            if taken == len(ends) and not self._partial:
                return
        self.blocked = True
        if admitted and self._limit:
            self._limit.take_back(self._count_bytes(frames, ends, taken))
        now = self._clock()
        begin = ends[taken - 1] if taken else 0
        for end in ends[taken:]:
            self.queue.push(bytearray(frames[begin:end]), now)
            begin = end

    def flush(self) -> None:
        """Writes what waits until the connection is full, nothing waits, or a batch is written."""
        now, size = self._clock(), 0
        few = self.queue.frames - BATCH_FRAMES
        while size < BATCH_BYTES and (self._partial or (self.queue.frames > few and self._take_next(now))):
            size += len(self._partial)
            self._partial = self._partial[self._write(self._partial) or 0 :]
            if self._partial:
                return
        self.blocked = self.queue.frames > 0

    def _is_admitted(self, frames: memoryview, ends: list[int]) -> bool:
        """Returns whether a batch may be written whole although there is a limit."""
        if not (self._limit and self._whole_batches):
            return False
        return self._limit.admits(self._count_bytes(frames, ends), self._clock())

    @staticmethod
    def _count_bytes(frames: memoryview, ends: list[int], first: int = 0) -> int:
        """Returns how many bytes the packets of a batch have, from a certain frame on."""
        return sum(count_bytes(frames[begin:end]) for begin, end in list(zip([0, *ends], ends))[first:])

    def _take_next(self, now: float) -> bool:
        """Takes the next few frames from the queue; only few, as what waits behind them could become more urgent."""
        frames: list[bytearray] = []
        size = 0
        while size < FLUSH_BYTES and (frame := self._pop(now)) is not None:
            frames.append(frame)
            size += len(frame)
            if self._bare:
                break
        if frames:
            data = memoryview(b"".join(frames) if len(frames) > 1 else frames[0])  # large ones are not copied
            if self._bare:
                data = data[OFFLOAD_HEADER.size :]
            self._partial = memoryview(self._encrypt(data)) if self._encrypt else data
        return bool(frames)

    def _count_taken(self, frames: memoryview, ends: list[int], sent: int) -> int:
        """Returns how many frames the connection took with so many bytes, including one that it took in part."""
        whole = bisect.bisect_right(ends, sent)
        if sent == (ends[whole - 1] if whole else 0):
            return whole
        self._partial = memoryview(bytes(frames[sent : ends[whole]]))
        return whole + 1

    def _send_each(self, frames: memoryview, ends: list[int]) -> int:
        begin = 0
        for number, end in enumerate(ends):
            packet = frames[begin + OFFLOAD_HEADER.size : end]
            data = memoryview(self._encrypt(packet)) if self._encrypt else packet
            sent = self._write(data) or 0
            if sent < len(data):
                begun = bool(sent or self._encrypt)  # what is encrypted must be sent, as the peer counts records
                self._partial = memoryview(bytes(data[sent:])) if begun else self._partial
                return number + begun
            begin = end
        return len(ends)


def read_rate(bits_per_s: float) -> float:
    """Returns the bits/s at which a peer with this limit is read at most."""
    return max(bits_per_s * READ_GAIN, READ_MIN)


class ReceiveQueue:
    """What has come from one peer that is limited, and may not pass yet.

    It is managed as the send queue is: CoDel slows down who sends too much, whatever the peer's own queues are like, and a sparse flow
    does not wait. Who does not slow down is read no faster than at `read_rate`, so that TCP holds up the rest at the peer.
    """

    def __init__(self, shared: SharedBuffer | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`shared` is that of FqCodelQueue."""
        self._clock = clock
        self._queue = FqCodelQueue(shared=shared)
        self._limit: RateLimit | None = None
        self._read_at = self._drained_at = 0.0  # when to read again; until when everything is read
        self.active = False  # whether frames must go through it

    @property
    def dropped(self) -> int:
        """Number of packets that the queue dropped."""
        return self._queue.dropped

    def set_limit(self, limit: RateLimit | None) -> None:
        """From now on frames leave it as this limit permits. None: there is no limit."""
        self._limit, self._read_at = limit, 0.0
        if limit:
            self._queue.limit = min(max(int(limit.bits_per_s / 8 * HELD_S), HELD_MIN), SEND_QUEUE_MAX)
            self._drained_at = self._clock() + DRAIN_S
            self.active = True

    def may_read(self, now: float) -> bool:
        """Returns whether the socket may be read."""
        return now >= self._read_at

    def push(self, frames: Sequence[memoryview], bare: bool, now: float) -> Sequence[memoryview]:
        """Adds frames, or with `bare` packets, that have just come. Returns those of them that may pass at once: all or none."""
        if self._limit and now >= self._drained_at:
            pause = sum(map(len, frames)) * 8 / read_rate(self._limit.bits_per_s)
            self._read_at = max(self._read_at, now - CATCH_UP_S) + pause
        if self._limit and not self._queue.frames and self._limit.admits(sum(map(len if bare else count_bytes, frames)), now):
            return frames
        for frame in frames:
            self._queue.push(bytearray(EMPTY_OFFLOAD_HEADER + frame if bare else frame), now)
        return ()

    def pop(self, now: float) -> bytearray | None:
        """Removes and returns the frame that may pass now, None when none may or there is none."""
        if self._limit:
            return self._limit.pop(self._queue, now)
        frame = self._queue.pop(now)
        self.active = frame is not None
        return frame

    def pause(self, now: float) -> float | None:
        """Returns after how many seconds a frame may pass or the socket be read that must wait for that now, None when none must."""
        pauses = [self._limit.pause(now) if self._limit else 0.0] if self._queue.frames else []
        return min(pauses if self.may_read(now) else [*pauses, min(self._read_at - now, PAUSE_MAX_S)], default=None)

    def close(self) -> None:
        """Discards all that waits."""
        self._queue.clear()


# ---- queue in the path -----------------------------------------------------------------------------------------------

QUEUE_TARGET_S, QUEUE_TARGET_SHARE = 0.015, 1 / 24  # of the queue, besides so much of the round trip; with less, its noise costs goodput
QUEUE_LOSSY = 1.25  # times as much on a path with losses, whose repair lowers the rate as if there were a queue
QUEUE_PACKETS = 2  # which wait at least: their time, on a slow path
QUEUE_WINDOW_S = 0.2  # over which a rate is measured, or over two round trips: acknowledgements come in bursts
QUEUE_SAMPLES = 4  # of which the shortest round trip has the standing queue: single acknowledgements are late on radio links
REACTION_S = 0.1, 2.5  # and round trips: time in which what the queue has too much would be gone; with less it oscillates
BRAKE_MAX, GROWTH_MAX = 0.5, 1.0  # by which what arrives is changed at most; slow start doubles, too
GROWTH_LOSSY = 0.25  # by which the cap exceeds the highest rate lately at most where losses hide the queue, as BBR's pacing does
STREAK_RESUMED, STREAK_MAX = 4.0, 10.0  # with which growth begins after a pause, as the path may have changed, and its bound
PAUSE_S = 1.0  # for which the socket was not full
STALL_SHARE = 0.25  # of the rate, below which nothing is learned: what was lost is sent again, and the round trip is an old one
MANY_BYTES = 16 * 1500  # in a window: with fewer, acknowledgements and pings, one packet makes a difference
LEAST_BYTES = 4 * 1500  # that a round trip moves in any case, as with BBR
SETTLING_BYTES = 32 * 1500  # until the kernel's round trip, which is a moving average of those of acknowledgements, shows a change
LOSSY = 0.001  # of the segments that were sent while there was no queue: above that CUBIC would leave the path to the losses
NOISE_MAX_S, NOISE_S = 0.06, 60.0  # that a path may always add to the round trip; for how long that is believed
RECENT_S = 1.0  # in which the highest rate is taken up again as soon as the queue is short, where losses lower the rate as well
FALLEN = 0.7  # of its rate has a connection that brakes beside another one, while what is alone keeps it as long as there is a queue
BEST_S = 15.0  # in which the highest rate is forgotten
COMPETE_S = 30.0  # between two looks whether the other one has gone, each of which costs some round trips
COMPETE_TEST = 0.25  # of its highest rate since the last look is sent during a look, and up to half of a very low one
COMPETE_POOR = 0.4  # of the best rate; below that a slow start takes more
COMPETE_STARTS = 6  # slow starts where the best rate is not known
YIELD_S = 12.0  # for which there is no cap beside another sender on a path with losses
BBR_RENEWAL_S = 8.0  # BBR stops for 200 ms after 10 s without a shorter round trip


class PathSample(NamedTuple):
    """What the kernel knows of a connection at a time; times in seconds."""

    time: float
    delivered: int  # bytes that have arrived
    received: int  # bytes that have come from there
    round_trip: float
    shortest: float  # round trip that was ever measured
    full: bool  # whether the socket has been full since the last sample
    segments: int = 0  # that were sent
    repeated: int = 0  # of them
    starting: bool | None = None  # whether BBR is in its state STARTUP; None with another congestion control
    repairing: bool = False  # whether losses are being repaired


class PathState(NamedTuple):
    """What the samples of the last window say; times in seconds."""

    time: float
    step: float  # since the sample before
    rate: float  # bytes/s that arrived
    queue: float
    target: float  # how long the queue may be
    round_trip: float

    @property
    def lag(self) -> float:
        """From a change of the cap until it shows."""
        return self.round_trip + QUEUE_WINDOW_S

    @property
    def correction(self) -> float:
        """The share of the rate by which more or, if it is negative, less should be sent."""
        return max((self.target - self.queue) / (REACTION_S[0] + REACTION_S[1] * self.round_trip), -BRAKE_MAX)


class Braking:
    """A time in which the queue is above its target and the rate is held below what arrives."""

    def __init__(self, state: PathState) -> None:
        self.rate = state.rate  # before it
        self._peak, self._peak_at = state.queue, state.time
        self._held_s = 0.0  # by how much the queue would be shorter if it were all ours
        self._after_peak: PathState | None = None  # the first one of whose window what was before the peak has left

    def is_in_vain(self, state: PathState) -> bool:
        """Returns whether the queue is not ours: it stays while what we send is held back for long or becomes ever less."""
        if state.queue > self._peak:
            self._peak, self._peak_at, self._after_peak = state.queue, state.time, None
        if not self._after_peak and state.time - self._peak_at > 1.5 * QUEUE_WINDOW_S:
            self._after_peak = state
        self._held_s -= state.correction * state.step
        held_long = self._held_s + state.correction * state.lag > self._peak
        then = self._after_peak
        falls = then is not None and state.time - then.time > state.lag and state.rate < FALLEN * then.rate
        return (held_long or falls) and state.queue >= self._peak / 2


class Competitor:
    """Another sender that fills the queue, beside which only who does it, too, gets a share.

    From time to time the rate is held far below what it was: if the queue goes then, the other one has gone.
    """

    def __init__(self, now: float, best: float) -> None:
        """`best` is the highest rate without it, in bytes/s, infinite when that is not known."""
        self.gone = False
        self.hurries = True  # whether a slow start is to take more
        self.cap: float | None = None  # bytes/s
        self._best = best
        self._highest = 0.0  # bytes/s, the highest rate since the last look
        self._hurried_at, self._slow_starts = now, 0
        self._look_at = now + COMPETE_S
        self._look: PathState | None = None  # with which a look at what is left of the queue began

    def update(self, now: PathSample, state: PathState) -> None:
        """Takes what the newest sample says."""
        self._highest = max(self._highest, state.rate)
        if state.rate > 0.9 * self._best and now.time - self._hurried_at > COMPETE_S / 10:
            self._look_at = now.time  # it seems to be gone
        poor = state.rate < COMPETE_POOR * self._best if self._best < math.inf else self._slow_starts < COMPETE_STARTS
        if now.repairing or not poor:
            self.hurries = False
        if now.time >= self._look_at:
            if self._look or state.queue <= 2 * state.target or now.full:  # else we have all that we want
                self._continue_look(state)
        elif poor and not self.hurries and now.time - self._hurried_at > 2 * now.round_trip + 0.5:
            self._slow_starts, self._hurried_at, self.hurries = self._slow_starts + 1, now.time, True

    def _continue_look(self, state: PathState) -> None:
        before = self._look = self._look or state._replace(rate=self._highest)
        share = max(COMPETE_TEST, min(LEAST_BYTES / QUEUE_WINDOW_S / before.rate, 0.5))
        self.cap = share * before.rate
        since, late = state.time - before.time, SETTLING_BYTES / self.cap
        held_s = (1 - share) * (since - state.round_trip - late)
        falls = since > state.lag + late and state.rate < FALLEN * before.rate
        if state.queue < max(2 * state.target, before.queue / 8):
            self.gone, self.cap = True, before.rate if since else None
        elif (falls and state.queue > before.queue / 4) or held_s > before.queue + QUEUE_WINDOW_S:
            self.cap, self._look, self._look_at, self._hurried_at = None, None, state.time + COMPETE_S, state.time
            self._highest = 0.0


class QueueController:
    """Finds the rate at which a connection fills its path and only a short queue stands in it.

    What arrives while there is a queue is the rate of the path. The cap is that rate, less in proportion to how far the queue, the
    round trip above the shortest one, is above its target, or more to how far it is below. As the round trip has both directions in
    it, only a side brakes whose own socket is full, or that mostly sends. A queue that does not become shorter by as much as is held
    back is not ours: a short one is noise of the path, which does not count from then on, and a long one is another sender's.
    """

    def __init__(self) -> None:
        self.cap: float | None = None  # bytes/s, None: none is needed
        self.renews = False  # whether the congestion control is to begin anew
        self._samples: deque[PathSample] = deque()  # of the last window
        self._rates: deque[tuple[float, float]] = deque()  # those of RECENT_S: times, bytes/s
        self._best = 0.0  # bytes/s, the highest rate lately with a short queue
        self._streak = 0.0  # reactions in a row that found no queue
        self._braking: Braking | None = None
        self._competitor: Competitor | None = None
        self._yields_until = 0.0  # to another sender, on a path with losses
        self._noise_s = self._noise_until = 0.0  # what the path adds to the round trip without a queue; when to forget that
        self._segments = self._repeated = 0  # that were sent, and sent again, while there was no queue
        self._lossy = False  # whether the path loses packets without a queue
        self._low = False  # whether far less arrives than lately
        self._full_at = self._renewed_at = -math.inf

    @property
    def competes(self) -> bool:
        """Whether another sender fills the queue, so that only who does it, too, gets a share."""
        return self._competitor is not None

    @property
    def hurries(self) -> bool:
        """Whether it competes with a slow start."""
        return self._competitor is not None and self._competitor.hurries

    def update(self, now: PathSample) -> None:
        """Takes a sample, one each PACING_UPDATE_S while there is something to send."""
        resumed = now.full and now.time - self._full_at > PAUSE_S
        if resumed:
            self._streak, self._braking = STREAK_RESUMED, None
        if now.full:
            self._full_at = now.time
        state = self._measure(now)
        if state and self._competitor:
            self._compete(self._competitor, now, state)
        elif state and now.time >= self._yields_until and (self.cap is not None or state.queue > 2 * state.target):
            self._control(state)
        capped = self.cap is not None
        late = capped and now.time - self._renewed_at > BBR_RENEWAL_S
        knows = self._lossy and not self._low  # its own model of the path is the better one
        done = (capped or resumed) and not now.starting and not knows
        self.renews = now.starting is not None and not now.repairing and (late or done)
        if self.renews:
            self._renewed_at = now.time

    def _measure(self, now: PathSample) -> PathState | None:
        """Returns what the last window says, None when that is nothing."""
        samples, window = self._samples, max(QUEUE_WINDOW_S, 2 * now.shortest)
        pause = now.time - samples[-1].time if samples else 0.0
        if pause > QUEUE_WINDOW_S and pause * (self.cap or math.inf) > LEAST_BYTES:  # it is not the cap that makes them rare
            samples.clear()
        samples.append(now)
        while len(samples) > 2 and samples[1].time <= now.time - window:
            samples.popleft()
        first, elapsed = samples[0], now.time - samples[0].time
        delivered = now.delivered - first.delivered
        mostly_sends = delivered > max(now.received - first.received, MANY_BYTES)
        if elapsed < 0.9 * window or delivered <= 0 or (now.time - self._full_at > window and not mostly_sends):
            return None
        rate, recent = delivered / elapsed, list(itertools.islice(reversed(samples), QUEUE_SAMPLES + 1))
        slowest = min((new.delivered - old.delivered) / (new.time - old.time) for new, old in zip(recent, recent[1:]))
        if slowest < STALL_SHARE * rate and delivered > MANY_BYTES:
            return None  # it stalls, and what the round trip was is no news
        if now.time > self._noise_until:
            self._noise_s = 0.0
        queue = max(min(each.round_trip - each.shortest for each in recent[:QUEUE_SAMPLES]) - self._noise_s, 0.0)
        target = max(QUEUE_TARGET_S + now.shortest * QUEUE_TARGET_SHARE, QUEUE_PACKETS * 1500 / rate)
        if self._lossy:
            target *= QUEUE_LOSSY
        if queue < target:
            self._segments += (now.segments - recent[1].segments) % 2**32
            self._repeated += (now.repeated - recent[1].repeated) % 2**32
            self._lossy = self._repeated > LOSSY * self._segments
        return PathState(now.time, now.time - recent[1].time, rate, queue, target, now.round_trip)

    def _control(self, state: PathState) -> None:
        self._rates.append((state.time, state.rate))
        while self._rates[0][0] < state.time - RECENT_S:
            self._rates.popleft()
        recent = max(rate for _, rate in self._rates)
        self._low = recent < FALLEN * self._best
        if state.correction < 0:
            self._brake(state)
            return
        self._braking = None
        if all(each.full for each in self._samples):
            self._best = max(state.rate, self._best * (1 - state.step / BEST_S))
            self._streak = min(self._streak + state.step / state.lag, STREAK_MAX) if state.queue < state.target / 2 else 0.0
            growth = 1 + min(state.correction * 2**self._streak, GROWTH_MAX)
            self.cap = max(self.cap or 0.0, state.rate * growth)
            if self._lossy:
                bound = max((1 + GROWTH_LOSSY) * recent, self._best, LEAST_BYTES / state.round_trip)
                self.cap = min(max(self.cap, recent), bound)

    def _brake(self, state: PathState) -> None:
        self._streak = 0.0
        self.cap = max(state.rate * (1 + state.correction), LEAST_BYTES / state.round_trip)
        braking = self._braking = self._braking or Braking(state)
        if not braking.is_in_vain(state):
            return
        self._braking = None
        if state.queue + self._noise_s < NOISE_MAX_S and state.rate > FALLEN * self._best:
            self._noise_s, self._noise_until = self._noise_s + state.queue, state.time + NOISE_S
            self.cap = braking.rate
            return
        self.cap = None
        if self._lossy:
            self._yields_until = state.time + YIELD_S
        else:
            self._competitor = Competitor(state.time, self._best or math.inf)

    def _compete(self, competitor: Competitor, now: PathSample, state: PathState) -> None:
        competitor.update(now, state)
        self.cap = competitor.cap
        if competitor.gone:
            self._competitor, self._best = None, 0.0


# ---- network plans ---------------------------------------------------------------------------------------------------

ROUTE_PROTOCOL = 116  # marks our routes, `ip -6 route show proto 116`; free in iproute2's rt_protos
OWNER_BASE = 0x74000000  # with our process id: our device group, our routing table, the metric of our address on lo
REJECT_BASE = 0xE4000000  # with our process id: the metric of a route that rejects, behind all others
REJECT_BASES = REJECT_BASE, OWNER_BASE  # the last one is what tun6 had before sessions had epochs
PROCESSES_MAX = 1 << 22  # process ids, PID_MAX_LIMIT of linux/threads.h
BEGUN_HERE = "not from 2000::/3"  # what this machine begins, whose source is not chosen yet
RULE_PRIORITY = 11_600  # of the client's rules, which have this and the next one; the rule for the table main has 32766


class Step(NamedTuple):
    """One command for `ip -6 -batch` and the one that undoes it, None where the removal of the device undoes it."""

    do: str
    undo: str | None = None


def reject_step(what: str, process: int, base: int = REJECT_BASE) -> Step:
    """A route, behind all others, by which the kernel rejects packets."""
    route = f"unreachable {what} metric {base + process} proto {ROUTE_PROTOCOL}"
    return Step(f"route add {route}", f"route del {route}")


def pool_plan(pool: IPv6Network, process: int) -> list[Step]:
    """Rejects traffic to prefixes without a client, which would otherwise loop between us and the next router."""
    return [reject_step(str(pool), process)]


def parse_rejects(routes: str) -> list[tuple[str, int, int]]:
    """Returns the arguments of each reject_step in the output of `ip -6 route show proto 116`."""
    found = re.findall(r"^unreachable (\S+) .*metric (\d+)", routes, re.MULTILINE)
    return [(what, int(metric) - base, base) for what, metric in found for base in REJECT_BASES if 0 < int(metric) - base <= PROCESSES_MAX]


def own_address_step(prefix: IPv6Network, process: int) -> Step:
    """The server's own address, ::1 of a prefix that no client gets: the source of its ICMPv6 errors when it has no other."""
    address = f"{prefix[1]}/128 dev lo"
    return Step(f"addr add {address} nodad metric {OWNER_BASE + process}", f"addr del {address}")


def parse_own_addresses(addresses: str) -> list[tuple[IPv6Network, int]]:
    """Returns the arguments of each own_address_step in the output of `ip -6 addr show dev lo`."""
    found = re.findall(r"^ *inet6 (\S+)/128 metric (\d+)", addresses, re.MULTILINE)
    return [(IPv6Network((address, 64), False), int(metric) - OWNER_BASE) for address, metric in found if int(metric) > OWNER_BASE]


def multicast_step(device: str) -> Step:
    """Removes the route by which multicast without an interface may go into the tunnel. `up` makes it, and so does each address."""
    return Step(f"route flush table local root ff00::/8 dev {device}")


def device_plan(device: str, mtu: int) -> list[Step]:
    """Brings a TUN up without a link-local address. What it sends in one piece becomes at most GSO_SEGMENTS_MAX packets."""
    return [
        Step(f"link set dev {device} mtu {mtu} gso_max_segs {GSO_SEGMENTS_MAX} addrgenmode none"),
        Step(f"link set dev {device} up"),  # in one command with addrgenmode, `ip` would do this first
        multicast_step(device),
    ]


def session_route_step(device: str, prefix: IPv6Network, metric: int | None) -> Step:
    """The route to a client, which a device whose close hangs may still have. `metric`: None for the kernel's default."""
    route = f"{prefix} dev {device} proto {ROUTE_PROTOCOL}" + ("" if metric is None else f" metric {metric}")
    return Step(f"route replace {route}", f"route del {route}")


def server_plan(device: str, mtu: int, prefix: IPv6Network, metric: int | None) -> list[Step]:
    """The device of a session on the server, with the route to its client."""
    return [*device_plan(device, mtu), session_route_step(device, prefix, metric)]


def source_plan(source: str, process: int) -> list[Step]:
    """Looks up packets with this source in the client's table, behind all routes of the table main that are no default routes.

    For BEGUN_HERE a unique local source (RFC 4193) comes first, which goes its own way, too, if it has one.
    """
    ours = f"suppress_ifgroup {OWNER_BASE + process}"  # in which no device is: only so that another client's rules are others
    rules = [f"priority {RULE_PRIORITY} {source} lookup main suppress_prefixlength 0 {ours}"]
    if source == BEGUN_HERE:
        rules.append(f"priority {RULE_PRIORITY + 1} from fc00::/7 lookup main {ours}")
    rules.append(f"priority {RULE_PRIORITY + 1} {source} lookup {OWNER_BASE + process}")
    return [Step(f"rule add {rule} proto {ROUTE_PROTOCOL}", f"rule del {rule} proto {ROUTE_PROTOCOL}") for rule in rules]


def parse_sources(rules: str) -> list[tuple[str, int]]:
    """Returns source and process of each source_plan in the output of `ip -6 rule show`."""
    found = re.findall(rf"^{RULE_PRIORITY + 1}:\s+((?:not )?from \S+) lookup (\d+)", rules, re.MULTILINE)
    return [(source, int(table) - OWNER_BASE) for source, table in found]


def reject_plan(prefix: IPv6Network, process: int) -> list[Step]:
    """Rejects what goes to addresses that no LAN of the client has (RFC 7084, WPD-5), and what comes from it while there is no tunnel."""
    table = f"default table {OWNER_BASE + process}"
    return [reject_step(str(prefix), process), reject_step(table, process), *source_plan(f"from {prefix}", process)]


def address_plan(device: str, prefix: IPv6Network, process: int) -> list[Step]:
    """The client's own address, ::1 of its prefix, and what is rejected as long as it has this prefix."""
    address = f"{prefix[1]}/128 dev {device}"
    return [Step(f"addr add {address} nodad", f"addr del {address}"), multicast_step(device), *reject_plan(prefix, process)]


def tunnel_plan(device: str, default_route: bool, process: int) -> list[Step]:
    """The client's route into the tunnel, while there is one, for what has a source in its prefix (source_plan).

    With `default_route` what this machine begins goes there too, whose source is not chosen yet. What has another global source
    goes its own way: replies of the machine's native address, and packets that carry IPv4.
    """
    route = f"default dev {device} table {OWNER_BASE + process} proto {ROUTE_PROTOCOL}"
    return [Step(f"route add {route}", f"route del {route}"), *(source_plan(BEGUN_HERE, process) if default_route else [])]


# ---- storage ---------------------------------------------------------------------------------------------------------

SECRET_MODE = 0o600  # of a file with keys
BACKUP_S = 86_400  # between two backups of the assignments, at most
METRIC_MAX = 2_147_483_647  # of the route of a session with an epoch: the largest value of the kernel and of BGP that BIRD's filters take
CONTENTION_TAKEOVERS, CONTENTION_WINDOW_S = 3, 60  # so many takeovers of one Id in so many seconds mean that two clients have it
TAKEOVERS_MAX = 1000  # Ids whose takeovers are remembered before those that are too old to matter are forgotten
LIMIT_MIN, LIMIT_MAX = 100_000, 100_000_000_000  # bits/s that a client can be limited to
LIMITS_SUFFIX = ".limits"  # of the file beside the assignments
RATE_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}  # of the SI


def parse_rate(text: str) -> int:
    """Returns the bits/s that a text such as 50M means. Raises ValueError, which completes a sentence with "it"."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([kMG])", text)
    rate = round(float(found[1]) * RATE_UNITS[found[2]]) if found else 0
    if not LIMIT_MIN <= rate <= LIMIT_MAX:
        raise ValueError("must be bits a second, from 100k to 100G, such as 2.5M, 50M or 1G")
    return rate


class GroupCommit(Generic[T, R]):
    """Group commit: one call of `work` handles all items that wait at the moment; those that come meanwhile wait for the next call.

    `work` gets the items in order and returns as many results. An exception that it raises goes to all callers of that call.
    """

    def __init__(self, work: Callable[[list[T]], list[R]], most: int | None = None) -> None:
        """`most`: so many items at most in one call."""
        self._work, self._most = work, most
        self._waiting: list[tuple[T, gevent.event.AsyncResult]] = []
        self._worker: gevent.Greenlet | None = None

    def submit(self, item: T) -> R:
        """Waits until the item is handled and returns its result. Raises what `work` does. Killing the caller does not stop the work."""
        return self.submit_all([item])[0]

    def submit_all(self, items: Iterable[T]) -> list[R]:
        """As `submit`, for several items, which are handled together."""
        outcomes = [(item, gevent.event.AsyncResult()) for item in items]
        self._waiting += outcomes
        if self._worker is None:
            self._worker = gevent.spawn(self._handle_waiting)
        return [cast(R, outcome.get()) for _, outcome in outcomes]

    def _handle_waiting(self) -> None:
        while self._waiting:
            batch = self._waiting[: self._most]
            del self._waiting[: self._most]
            try:
                results = self._work([item for item, _ in batch])
            except Exception as error:  # the callers get it
                for _, outcome in batch:
                    outcome.set_exception(error)
            else:
                for (_, outcome), result in zip(batch, results):
                    outcome.set(result)
        self._worker = None


def run_in_thread(function: Callable[..., R], *args: Any) -> R:
    """Runs a function that blocks in a thread of the hub's pool and returns its result; the event loop continues meanwhile."""
    return cast(R, gevent.get_hub().threadpool.apply(function, args))


def give_owner(fd: int, like: Path) -> None:
    """Gives an open file to the owner and group of another, so that root leaves to itself nothing that a service has to write."""
    wanted, found = like.stat(), os.fstat(fd)
    if (found.st_uid, found.st_gid) != (wanted.st_uid, wanted.st_gid) and found.st_nlink == 1:
        with suppress(PermissionError):  # without CAP_CHOWN it stays ours
            os.fchown(fd, wanted.st_uid, wanted.st_gid)


class JsonFile:
    """A JSON object in a file. Each save replaces the whole file durably, so that it is never half written."""

    ADVICE = "mend the entry, or move the file away to begin an empty one"

    def __init__(self, path: str, content: str, mode: int) -> None:
        """`content` names what is in the file, for messages. `mode` is that of a new file.

        An old file keeps owner, group and mode, without the rights of others if `mode` is SECRET_MODE. A new one is its folder's owner's.
        """
        self.path = Path(os.path.realpath(path))  # a symbolic link stays one
        self._content, self._mode, self._mode_mask = content, mode, 0o770 if mode == SECRET_MODE else 0o777

    def version(self) -> tuple[int, ...]:
        """Returns a value that changes whenever somebody writes or replaces the file; () when there is no file."""
        with suppress(OSError):
            found = self.path.stat()
            return found.st_ino, found.st_mtime_ns, found.st_size
        return ()

    def load(self) -> list[tuple[str, Any]]:
        """Returns the entries, none when the file is missing or empty. Raises ConfigError."""
        if self.path.exists() and not self.path.is_file():  # each save replaces it: /dev/null would become a file
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
            decoded = text.decode("utf-8-sig")  # editors on Windows put a byte order mark before it
            entries = json.loads(decoded, object_pairs_hook=list)
            if not decoded.lstrip().startswith("{"):
                raise ValueError('it is not one object {"<id>": ..., ...}')
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path} is not a file of {self._content}: {error}; {self.ADVICE}") from None
        ids = set()
        for id_, _ in entries:
            if not is_valid_id(id_):
                raise self.entry_error(id_, f"the Id is not 1 to {ID_MAX} printable characters")
            if id_ in ids:
                raise self.entry_error(id_, "the Id is there twice")
            ids.add(id_)
        for number, (id_, value) in enumerate(entries):
            canonical = canonical_id(id_)
            if canonical in ids and canonical != id_:
                log.warning("%s: %s is there in several spellings; %r is not used, remove it", self.path, canonical, id_)
            else:
                ids.add(canonical)
                entries[number] = canonical, value
        return cast("list[tuple[str, Any]]", entries)

    def entry_error(self, id_: object, reason: object) -> ConfigError:
        """Returns the error for an entry that is wrong."""
        return ConfigError(f"{self.path}: entry {to_printable(id_)!r}: {to_printable(reason)}; {self.ADVICE}")

    def save(self, entries: dict[str, Any]) -> None:
        """Saves in a thread. When this returns, the entries are on disk. Raises StorageError."""
        try:
            run_in_thread(self._write, entries)
        except OSError as error:
            raise StorageError(f"{self.path} can't be written: {error.strerror}") from error

    @property
    def backup(self) -> Path:
        """Path of the last good copy."""
        return self.path.with_name(self.path.name + ".bak")

    def back_up(self) -> None:
        """Copies the file beside it, in a thread. A copy that fails is logged; the old one stays."""
        try:
            run_in_thread(lambda: self._replace(self.backup, self.path.read_bytes()))
        except OSError as error:
            log.warning("%s can't be written: %s", self.backup, error.strerror)

    def _write(self, entries: dict[str, Any]) -> None:
        # One line for each entry; a single json.dumps of all entries would hold the interpreter, and so the event loop, too long.
        lines = (f"{json.dumps(id_)}: {json.dumps(value)}" for id_, value in entries.items())
        self._replace(self.path, ("{\n " + ",\n ".join(lines) + "\n}\n").encode("ascii"))

    def _replace(self, path: Path, content: bytes) -> None:
        new = path.with_name(path.name + ".new")
        try:
            new.unlink(missing_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode), "wb") as file:
                give_owner(file.fileno(), self.path if self.path.exists() else self.path.parent)
                if self.path.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(self.path.stat().st_mode) & self._mode_mask)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except OSError:
            with suppress(OSError):
                new.unlink()  # others need the space on a full disk
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class EditedFile(JsonFile):
    """A JsonFile that people may edit while a server runs: what they wrote is never replaced before it is read."""

    _read_version: tuple[int, ...] = ()  # of the file that was read last

    def read(self, parse: Callable[[str, Any], T]) -> dict[str, T]:
        """Returns the entries, each by `parse`. Raises ConfigError, also that of `parse`."""
        version = self.version()
        entries = {id_: parse(id_, value) for id_, value in self.load()}
        self._read_version = version
        return entries

    def save(self, entries: dict[str, Any]) -> None:
        """As JsonFile does. Raises RequestError when somebody has edited the file, and StorageError."""
        if self.version() not in ((), self._read_version):  # where there is no file, a save that fails says it better
            raise RequestError(f"{self.path} was edited and is not read yet; tell the server to (`kill -HUP`), and try again")
        super().save(entries)
        self._read_version = self.version()


class LimitStore:
    """Which Ids have a limit of their own, in memory and, with a path, in a JSON file {"<id>": <bits a second>, ...}."""

    def __init__(self, path: str | None) -> None:
        """Reads the file. Raises ConfigError, which names the wrong entry."""
        self._file = EditedFile(path, "limits", 0o644) if path else None
        self._limits: dict[str, int] = {}
        self._changing = gevent.lock.RLock()
        self.reload()

    def reload(self) -> None:
        """Reads the file again. Raises ConfigError; then the limits stay as they were."""
        if self._file:
            with self._changing:
                self._limits = self._file.read(self._parse)

    def find(self, id_: str) -> int | None:
        """Returns the Id's own limit in bits/s, 0 when it is to have none, None when that of all others is its, too."""
        return self._limits.get(id_)

    def all(self) -> dict[str, int]:
        """Returns the limits of those Ids that have one of their own."""
        return dict(self._limits)

    def set(self, id_: str, bits_per_s: int | None) -> None:
        """Sets what `find` returns, and saves it. Raises RequestError, StorageError; then nothing has changed."""
        with self._changing:
            limits = {**self._limits, id_: bits_per_s}
            kept = {each: limit for each, limit in limits.items() if limit is not None}
            if self._file and kept != self._limits:
                self._file.save(kept)
            self._limits = kept

    def _parse(self, id_: str, value: Any) -> int:
        if type(value) is not int or not (value == 0 or LIMIT_MIN <= value <= LIMIT_MAX):
            assert self._file
            raise self._file.entry_error(id_, f"the limit is neither 0 (none) nor bits a second from {LIMIT_MIN} to {LIMIT_MAX}")
        return value


@dataclass(frozen=True)
class Claim:
    """A client that is to be served: what it says, and how to reach its session. The last three are called in the event loop."""

    id: str
    epoch: int = 0  # the one that its last answer had, as it says; 0: it says none
    proved: bool = False  # whether it proved its key: else its epoch does not count
    counted: bool = False  # whether it counts for `new_ids_per_hour` if it has no prefix yet: it has no key
    took_over: bool = False  # whether it ended another session here that lived
    is_alive: Callable[[], bool] = lambda: True  # whether it is still there; called in another thread
    end: Callable[[str], None] = lambda reason: None  # ends its session, for this reason
    on_epoch: Callable[[int], None] = lambda epoch: None  # its session has a higher epoch from now on: its route needs another metric
    on_limit: Callable[[], None] = lambda: None  # what `limit_of` returns of it may have changed

    def is_of(self, epoch: int | None) -> bool:
        """Returns whether the client proved that it is the one of the session of this epoch, which moves and takes nothing from another."""
        return self.proved and 0 < self.epoch == epoch


class Lease:
    """What a client was given at the beginning of its session, until its end."""

    def __init__(self, prefix: IPv6Network, epoch: int | None = None) -> None:
        self.prefix = prefix
        self.epoch = epoch  # counts the beginnings of this Id in a cluster, the newest wins; None without one
        self.superseded = ""  # why it ended before its session did
        self.received, self.sent = 0, 0  # bytes, which the session's end tells the store

    @property
    def metric(self) -> int | None:
        """Metric of the session's route, lowest for the newest session, so that its route wins everywhere. None: the kernel's default."""
        return None if self.epoch is None else METRIC_MAX - self.epoch

    def require_newest(self) -> None:
        """Raises Refusal when the client has begun anew elsewhere meanwhile. To be called right before it is answered."""
        if self.superseded:
            raise Refusal("busy", "a newer connection has this Id", self.superseded)


class Store:
    """Who has which /64 and which key: what Server and administration know of a store, be it in files or in PostgreSQL.

    Methods may wait, in the event loop; those of `pool` and `keys` that only read don't.
    """

    pool: PrefixPool  # as known here, to be read only
    keys: Keys | None  # None: open to everybody

    @property
    def path(self) -> object:
        """What names this store for people, and for who asks whether it is the same as another. None: nothing is kept."""
        raise NotImplementedError

    def start(self) -> None:
        """Begins what goes on beside the sessions; `close` ends it. Called once, by a server that is about to serve. Raises ConfigError."""

    def close(self) -> None:
        """Ends what `start` began, and lets others use the store."""

    def find(self, id_: str) -> IPv6Network | None:
        """Returns the /64 that the Id is known to have, or None."""
        raise NotImplementedError

    def begin(self, claim: Claim) -> contextlib.AbstractContextManager[Lease]:
        """Lets a client's session begin; leaving the context says that it has ended.

        Raises Refusal when the pool is exhausted, or when too many are new; StorageError when nothing can be kept, the Id owns nothing
        new then.
        """
        raise NotImplementedError

    def require_room(self, id_: str, counted: bool) -> None:
        """Raises Refusal when `begin` would for such a claim, as far as that is known here, and changes nothing."""
        if self.pool.find(id_) is None and not self.pool.free:
            raise Refusal("pool-exhausted", f"no free /64 in {self.pool.network}")

    def assign(self, id_: str) -> IPv6Network:
        """Returns the Id's /64, a new one if it has none. Raises as `begin` does."""
        raise NotImplementedError

    def pin(self, id_: str, prefix: IPv6Network) -> None:
        """Gives the Id this /64 instead of the one it may have.

        Raises ValueError when it is no free /64 of the range, StorageError when it can't be kept; then nothing has changed.
        """
        raise NotImplementedError

    def keep(self) -> IPv6Network | None:
        """Returns a /64 for addresses of this server itself, which no client gets until `unkeep`, or None when there is none to spare."""
        raise NotImplementedError

    def unkeep(self, prefix: IPv6Network) -> None:
        """Gives back what `keep` returned."""
        raise NotImplementedError

    def takeovers(self, id_: str) -> Sequence[float]:
        """Returns the times, by time.monotonic(), of the Id's last takeovers from sessions that lived: at most CONTENTION_TAKEOVERS."""
        raise NotImplementedError

    def limit_of(self, id_: str) -> int | None:
        """Returns the Id's own limit in bits/s each way, 0 when it is to have none, None when that of all others is its, too."""
        raise NotImplementedError

    def set_limit(self, id_: str, bits_per_s: int | None) -> None:
        """Sets what `limit_of` returns, and saves it. Raises RequestError, StorageError; then nothing has changed."""
        raise NotImplementedError

    def reload_limits(self) -> None:
        """Reads limits that somebody has edited. Raises ConfigError; then they stay as they were."""

    def holder(self, id_: str) -> str | None:
        """Returns the name of another server that has a session of this Id, as far as it is known here."""
        return None

    def whereabouts(self, id_: str) -> dict[str, Any]:
        """Returns what `clients` shows of an Id for all servers: server, connected, since and last in seconds since 1970; {} without."""
        return {}

    def figures(self) -> dict[str, Any]:
        """Returns what `status` shows of the store and the other servers; {} when there is nothing."""
        return {}


class AssignmentStore(Store):
    """The map Id -> /64, in memory and, with a path, in a JSON file {"<id>": "<prefix>/64", ...}.

    One process at a time may use the file. The lock is on `<path>.lock`, as `<path>` itself is replaced by each save. The last good
    copy, `<path>.bak`, is made before each change of several entries and at the first change in BACKUP_S. A file that is empty beside
    such a copy has been lost by accident: all clients would be renumbered.

    The limits of single Ids are in a file of their own beside it, `<path>.limits`, as older versions don't know them.
    """

    def __init__(
        self,
        pool: PrefixPool,
        path: str | None = None,
        lock: bool = True,
        keys: Keys | None = None,
        admit_new: Callable[[bool], None] = lambda is_there: None,
    ) -> None:
        """Locks and reads the file; a missing or empty one is an empty map. Raises ConfigError, which names the wrong entry.

        Without a lock it may only be read. `admit_new` raises Refusal if an Id whose claim counts may not get its first prefix now; its
        argument tells whether it is there, and counts, or might come.
        """
        self.pool, self.keys = pool, keys
        self._admit_new = admit_new
        self._takeovers: dict[str, deque[float]] = {}  # by Id, as `takeovers` returns them
        self._file = JsonFile(path, "assignments", 0o644) if path else None
        self._saved: dict[str, str] = {}
        self._failing = False  # whether saves fail, which the log has said
        self._backed_up = -math.inf  # time of the last backup
        self._changing: dict[str, gevent.event.Event] = {}  # by Id, set when the change is done
        self._saves = GroupCommit(self._save_batch)
        self._limits = LimitStore(None)
        if self._file:
            self._lock = self._lock_file(self._file.path) if lock else None
            try:
                self._load(self._file)
                self._limits = LimitStore(f"{self._file.path}{LIMITS_SUFFIX}")
            except ConfigError:
                self.close()
                raise

    @property
    def path(self) -> Path | None:
        """Path of the file, without symbolic links."""
        return self._file.path if self._file else None

    def limit_of(self, id_: str) -> int | None:
        """As Store has it."""
        return self._limits.find(id_)

    def set_limit(self, id_: str, bits_per_s: int | None) -> None:
        """As Store has it."""
        self._limits.set(id_, bits_per_s)

    def limits(self) -> dict[str, int]:
        """Returns what `limit_of` does for those Ids that have a limit of their own."""
        return self._limits.all()

    def reload_limits(self) -> None:
        """Reads the file of limits again. Raises ConfigError; then they stay as they were."""
        self._limits.reload()

    @property
    def backup(self) -> Path | None:
        """Path of the last good copy."""
        return self._file.backup if self._file else None

    def find(self, id_: str) -> IPv6Network | None:
        """Returns the /64 that the Id has on disk, or None."""
        with self._exclusive(id_):
            return self.pool.find(id_)

    @contextmanager
    def begin(self, claim: Claim) -> Iterator[Lease]:
        """As Store has it; whoever ends sessions when a newer one begins is the only server here."""
        if claim.counted and self.pool.find(claim.id) is None:
            self._admit_new(True)
        if claim.took_over:
            self._count_takeover(claim.id)
        yield Lease(self.assign(claim.id))

    def require_room(self, id_: str, counted: bool) -> None:
        """As Store has it."""
        super().require_room(id_, counted)
        if counted and self.pool.find(id_) is None:
            self._admit_new(False)

    def _count_takeover(self, id_: str) -> None:
        if len(self._takeovers) >= TAKEOVERS_MAX:  # those of Ids that are not contended any more
            now = time.monotonic()
            self._takeovers = {each: times for each, times in self._takeovers.items() if now - times[-1] < CONTENTION_WINDOW_S}
        self._takeovers.setdefault(id_, deque(maxlen=CONTENTION_TAKEOVERS)).append(time.monotonic())

    def takeovers(self, id_: str) -> Sequence[float]:
        """As Store has it."""
        return self._takeovers.get(id_, ())

    def keep(self) -> IPv6Network | None:
        """As Store has it: the last that has no owner."""
        return self.pool.keep()

    def unkeep(self, prefix: IPv6Network) -> None:
        """As Store has it."""
        self.pool.unreserve(prefix)

    def assign(self, id_: str) -> IPv6Network:
        """Returns the Id's /64, which is on disk by then.

        Raises Refusal when the pool is exhausted, StorageError when it can't be saved; then the Id owns nothing new.
        """
        with self._exclusive(id_):
            known = self.pool.find(id_)
            if known:
                return known
            prefix = self.pool.assign(id_)
            self._saves.submit((id_, str(prefix)))
            return prefix

    def pin(self, id_: str, prefix: IPv6Network) -> None:
        """Gives the Id this /64 instead of the one it may have, and saves that.

        Raises ValueError when it is no free /64 of the range, StorageError when it can't be saved; then nothing has changed.
        """
        with self._exclusive(id_):
            old = self.pool.find(id_)
            if old == prefix:
                return
            self.pool.pin(id_, prefix)
            try:
                self._saves.submit((id_, str(prefix)))
            except Exception:  # whatever it is, the Id keeps its old prefix
                if old:
                    self.pool.pin(id_, old)
                raise
            if old:
                self.pool.unreserve(old)

    @contextmanager
    def _exclusive(self, id_: str) -> Iterator[None]:
        """Lets nobody else change or read the prefix of this Id meanwhile, as it may not be on disk yet."""
        while id_ in self._changing:
            self._changing[id_].wait()
        done = self._changing[id_] = gevent.event.Event()
        try:
            yield
        finally:
            del self._changing[id_]
            done.set()

    def close(self) -> None:
        """Releases the lock."""
        if self._file and self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @staticmethod
    def _lock_file(path: Path) -> int | None:
        try:
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            give_owner(lock, path if path.exists() else path.parent)
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
        if not self._saved and file.backup.exists():
            raise ConfigError(
                f"{file.path} has no assignments, but {file.backup} has, so it was lost; to go on with those, copy that file to this one;"
                " to give all clients new prefixes, remove it"
            )

    def _save_batch(self, entries: list[tuple[str, str]]) -> list[None]:
        if self._file:
            everything = {**self._saved, **dict(entries)}
            due = len(entries) > 1 or time.monotonic() - self._backed_up > BACKUP_S
            if due and self._saved:
                self._back_up(self._file)
            try:
                self._file.save(everything)
            except Exception as error:  # whatever it is, an Id that is not on disk must not count as known
                for id_, _ in entries:
                    self.pool.release(id_)
                level = logging.DEBUG if self._failing else logging.ERROR
                warn_standing("disk", "%s; known Ids are served, new ones refused until it can", error, level=level)
                self._failing = True
                raise
            self._saved = everything
            if due and not self._file.backup.exists():
                self._back_up(self._file)
            if self._failing:
                log.info("%s can be written again", self.path)
                standing_warnings.pop("disk", None)
                self._failing = False
        return [None] * len(entries)

    def _back_up(self, file: JsonFile) -> None:
        file.back_up()
        self._backed_up = time.monotonic()


class KeyEntry(NamedTuple):
    """What the server knows about an Id's key."""

    digest: str  # SHA-256 of the key's text, hexadecimal; a key has 256 random bits, so that no slower hash is needed
    revoked: bool


def key_digest(key: str) -> str:
    """Returns the digest of a key for KeyEntry."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


UNKNOWN_CLIENT = KeyEntry(key_digest(secrets.token_urlsafe(KEY_BYTES)), False)  # the key of an unknown Id is compared with this one


def encode_keys(entries: Mapping[str, KeyEntry]) -> dict[str, Any]:
    """Returns what is in a file of keys, by Id."""
    return {id_: {"key": "sha256:" + digest, **({"revoked": True} if revoked else {})} for id_, (digest, revoked) in entries.items()}


class Keys:
    """Which Ids may connect, and with which key."""

    @property
    def path(self) -> object:
        """What names them for people."""
        raise NotImplementedError

    def reload(self) -> None:
        """Reads again what may have changed. Raises ConfigError; then the entries stay as they were."""

    def find(self, id_: str) -> KeyEntry | None:
        """Returns what is known about this Id's key, or None."""
        raise NotImplementedError

    def ids(self) -> list[str]:
        """Returns all Ids that have a key."""
        raise NotImplementedError

    def check(self, id_: str, key: str) -> None:
        """Raises Refusal unless this is the Id's key. For the client, an unknown Id and a wrong key look alike and take equally long."""
        entry = self.find(id_) or UNKNOWN_CLIENT
        right = hmac.compare_digest(key_digest(key), entry.digest)
        if not right or entry is UNKNOWN_CLIENT:
            raise Refusal("denied", "unknown Id or wrong key", "unknown Id" if entry is UNKNOWN_CLIENT else "wrong key")
        if entry.revoked:
            raise Refusal("revoked", "this Id was revoked by the server's operator")

    def issue(self, id_: str) -> str:
        """Makes a new key for the Id in place of the one it may have, saves its digest and returns its text.

        Raises RequestError, StorageError.
        """
        key = secrets.token_urlsafe(KEY_BYTES)
        self._change(id_, KeyEntry(key_digest(key), False))
        return key

    def set_revoked(self, id_: str, revoked: bool) -> None:
        """Revokes or restores the Id's key. Raises KeyError, RequestError, StorageError."""
        entry = self.find(id_)
        if entry is None:
            raise KeyError(id_)
        self._change(id_, entry._replace(revoked=revoked))

    def _change(self, id_: str, entry: KeyEntry) -> None:
        raise NotImplementedError


class KeyStore(Keys):
    """Keys in a JSON file {"<id>": {"key": "sha256:<digest>", "revoked": true}, ...}."""

    def __init__(self, path: str) -> None:
        """Reads the file. Raises ConfigError, which names the wrong entry."""
        self._file = EditedFile(path, "keys", SECRET_MODE)
        self._entries: dict[str, KeyEntry] = {}
        self._changing = gevent.lock.RLock()
        self.reload()

    @property
    def path(self) -> Path:
        """Path of the file, without symbolic links."""
        return self._file.path

    def reload(self) -> None:
        """Reads the file again. Raises ConfigError; then the entries stay as they were."""
        with self._changing:
            if self._entries and not self.path.exists():
                raise ConfigError(f"{self.path} is not there any more; put it back, or an empty one in its place to keep everybody out")
            self._entries = self._file.read(self._parse)

    def _parse(self, id_: str, value: Any) -> KeyEntry:
        fields = dict(value) if isinstance(value, list) and all(isinstance(item, tuple) for item in value) else {}
        found = re.fullmatch("sha256:([0-9a-f]{64})", str(fields.get("key")))
        revoked = fields.get("revoked", False)
        if not found or set(fields) - {"key", "revoked"} or len(fields) != len(value):
            raise self._file.entry_error(id_, 'it is not {"key": "sha256:<64 hexadecimal digits>"}, perhaps with "revoked": true')
        if not isinstance(revoked, bool):
            raise self._file.entry_error(id_, "revoked is neither true nor false")
        return KeyEntry(found[1], revoked)

    def find(self, id_: str) -> KeyEntry | None:
        """Returns what is known about this Id's key, or None."""
        return self._entries.get(id_)

    def ids(self) -> list[str]:
        """Returns all Ids that have a key."""
        return list(self._entries)

    def _change(self, id_: str, entry: KeyEntry) -> None:
        with self._changing:
            entries = {**self._entries, id_: entry}
            self._file.save(encode_keys(entries))
            self._entries = entries


# ---- cluster rules ---------------------------------------------------------------------------------------------------

EPOCH_LEAD_MAX = 1000  # so far may the epoch that a client says lie above what is known here; its session must not use all numbers up
UNASSIGNED = IPv6Network("::/128")  # in a row that is to get a free /64
FREED_LEAD = 1000  # epochs between the last owner of a /64 and the next: what a server that is cut off may have counted meanwhile


class Row(NamedTuple):
    """What the cluster's store knows of an Id. Times are the database's, in seconds since 1970."""

    id: str
    prefix: IPv6Network
    key: str | None = None  # its digest
    revoked: bool = False
    limit: int | None = None  # as Store.limit_of returns it
    version: int = 0  # of all up to `moved`: when it was changed, in milliseconds, or more
    former: tuple[IPv6Network, ...] = ()  # /64s that it had before
    moved: float | None = None  # when it got the one that it has in place of another
    epoch: int = 0  # counts the beginnings of its sessions; it grows by more where numbers may have been used that nobody knows of
    server: str | None = None  # the name of the one where the newest session began
    live: bool = False  # whether that server has not said that it ended
    since: float | None = None  # when it began
    last: float | None = None  # when it ended, or else began
    received: int = 0  # bytes, in all sessions that ended
    sent: int = 0
    takeovers: tuple[float, ...] = ()  # the last CONTENTION_TAKEOVERS times when a session began while another lived


def merge_rows(one: Row, other: Row) -> Row:
    """Returns what two rows of an Id say together, whichever was read first: what the operator changed last, and the newest session.

    Of one session, that it ended is the newer news. After lost commits an epoch may be given twice: then the later one stays. A /64
    that only the older row knows was the Id's, too.
    """
    changed = max(one, other, key=lambda row: row.version)
    missing = {one.prefix, other.prefix, *one.former, *other.former} - {changed.prefix, *changed.former}
    at = Row._fields.index("epoch")  # what stands before it is the operator's
    newest = max(one, other, key=lambda row: (row.epoch, not row.live, row.since or 0.0, row.last or 0.0, row.server or "", row[at + 5 :]))
    return Row._make([*changed._replace(former=(*changed.former, *sorted(missing)))[:at], *newest[at:]])


def next_version(row: Row, now: float) -> int:
    """Returns the version of a change that the operator makes; one that was made and lost, and one made since, have different ones."""
    return max(row.version + 1, int(now * 1000))


def first_row(id_: str, prefix: IPv6Network, now: float) -> Row:
    """Returns the row of a new Id."""
    return Row(id_, prefix, version=int(now * 1000))


@dataclass(frozen=True)
class Change:
    """A change of an Id's row, which the store makes in a transaction that has locked the row."""

    id: str

    def create(self, now: float) -> Row:
        """Returns the first row of an Id that has none, with UNASSIGNED if any free /64 will do. Raises KeyError if it shall get none."""
        raise KeyError(self.id)

    def decide(self, row: Row, now: float) -> Row:
        """Returns the row as it shall be; `now` is the database's clock. Raises Refusal or RequestError when there shall be no change."""
        raise NotImplementedError


@dataclass(frozen=True)
class Assignment(Change):
    """The Id gets a /64 if it has none."""

    def create(self, now: float) -> Row:
        """As Change has it."""
        return first_row(self.id, UNASSIGNED, now)

    def decide(self, row: Row, now: float) -> Row:
        """As Change has it."""
        return row


@dataclass(frozen=True)
class SessionBegin(Assignment):
    """A session begins. It is the newest from then on."""

    server: str
    floor: int  # the highest epoch that the server knows of; the session's is above it
    key: str | None  # digest of the Id's key when the client proved it
    claim: Claim

    def decide(self, row: Row, now: float) -> Row:
        """As Change has it. Raises EOFError when the client has left: it may have a session elsewhere by now."""
        if not self.claim.is_alive():
            raise EOFError
        if row.revoked:
            raise Refusal("revoked", "this Id was revoked by the server's operator", f"{quote_id(self.id)}, revoked just now")
        if row.key != self.key:
            raise Refusal("busy", "the key of this Id has just been changed", f"{quote_id(self.id)}, its key was changed just now")
        epoch = max(row.epoch, self.floor) + 1
        if epoch > EPOCH_MAX:
            raise Refusal("server-error", "this Id has begun too often", f"{quote_id(self.id)}, its epochs are used up")
        takeovers, is_same = row.takeovers, self.claim.is_of(row.epoch)
        if not is_same and (self.claim.took_over or (row.live and row.server != self.server)):
            takeovers = (*takeovers, now)[-CONTENTION_TAKEOVERS:]
        return row._replace(epoch=epoch, server=self.server, live=True, since=now, last=now, takeovers=takeovers)


@dataclass(frozen=True)
class SessionSettlement(Change):
    """A session that began without the store, or of whose beginning it is not known whether it was kept, is told to the store."""

    server: str
    epoch: int

    def decide(self, row: Row, now: float) -> Row:
        """As Change has it. The session has lost if the row is not its own afterwards.

        It loses against a higher epoch, if that session lives. If that one has ended, or has the same epoch, which of the two is newer
        is not known, so the one that is known to live goes on, above the other.
        """
        if (row.epoch, row.server, row.live) == (self.epoch, self.server, True):
            return row  # COMMIT was not answered, but done
        if row.epoch > self.epoch and row.live and row.server != self.server:
            return row
        epoch = self.epoch if row.epoch < self.epoch else row.epoch + 1
        return row._replace(epoch=epoch, server=self.server, live=True, since=now, last=now)


@dataclass(frozen=True)
class SessionEnd(Change):
    """A session has ended, and those that its server had before; nothing changes if another has begun since."""

    server: str
    epoch: int
    received: int = 0
    sent: int = 0

    def decide(self, row: Row, now: float) -> Row:
        """As Change has it."""
        if not (row.live and row.server == self.server and row.epoch <= self.epoch):
            return row
        received, sent = row.received + self.received, row.sent + self.sent
        return row._replace(epoch=self.epoch, live=False, last=now, received=received, sent=sent)


@dataclass(frozen=True)
class KeyChange(Change):
    """The Id gets another key, is revoked or restored."""

    digest: str
    revoked: bool

    def decide(self, row: Row, now: float) -> Row:
        """As Change has it."""
        return row._replace(key=self.digest, revoked=self.revoked, version=next_version(row, now))


@dataclass(frozen=True)
class LimitChange(Change):
    """The Id gets another limit of its own, or none any more: as Store.limit_of returns it."""

    limit: int | None

    def decide(self, row: Row, now: float) -> Row:
        """As Change has it."""
        return row if row.limit == self.limit else row._replace(limit=self.limit, version=next_version(row, now))


@dataclass(frozen=True)
class Pin(Change):
    """The Id gets this /64, which has no owner; the one that it had is given again only by another Pin."""

    prefix: IPv6Network
    floor: int = 0  # above which its sessions begin, as routers have heard of those of former owners of this /64

    def create(self, now: float) -> Row:
        """As Change has it."""
        return first_row(self.id, self.prefix, now)._replace(epoch=self.floor)

    def decide(self, row: Row, now: float) -> Row:
        """As Change has it. A session with the old /64 is not the newest any more."""
        if row.prefix == self.prefix:
            return row
        former = tuple(prefix for prefix in (*row.former, row.prefix) if prefix != self.prefix)
        row = row._replace(prefix=self.prefix, version=next_version(row, now), former=former, moved=now)
        return row._replace(epoch=max(row.epoch + 1, self.floor), live=False)


@dataclass
class HeldSession:
    """A session of this server, as ClusterView knows it."""

    epoch: int
    prefix: IPv6Network
    key: str | None  # digest of the key that its client proved
    settled: bool  # whether the store is known to have it


class ClusterView:
    """What one server knows of a cluster: the rows it has read, the sessions it holds, and what it owes to the store."""

    def __init__(self, server: str) -> None:
        self.server = server  # its name
        self.rows: dict[str, Row] = {}
        self.held: dict[str, HeldSession] = {}
        self._heard: dict[str, int] = {}  # by Id: the highest epoch, where the row's may be lower
        self._beginning: Counter[str] = Counter()  # sessions that are being begun, by Id
        self._ends: dict[str, SessionEnd] = {}  # to be told to the store

    def epoch_of(self, id_: str) -> int:
        """Returns the highest epoch of the Id that was heard of or given."""
        row = self.rows.get(id_)
        return max(self._heard.get(id_, 0), row.epoch if row else 0)

    def floor(self, claim: Claim) -> int:
        """Returns the epoch that the session of a client has to begin above, as far as it is known here.

        What the client says counts only if it proved its key, as others could use the numbers up, and if it is no nonsense.
        """
        known = self.epoch_of(claim.id)
        return max(known, claim.epoch) if claim.proved and claim.epoch <= known + EPOCH_LEAD_MAX else known

    def begin_change(self, claim: Claim) -> SessionBegin:
        """Returns what the store is asked for when a client connects; `conclude` follows, however that ends."""
        row = self.rows.get(claim.id)
        self._beginning[claim.id] += 1
        return SessionBegin(claim.id, self.server, self.floor(claim), row.key if row else None, claim)

    def conclude(self, begin: SessionBegin) -> None:
        """Notes that nobody waits for this beginning any more: unless the session is held, it has ended."""
        self._beginning[begin.id] -= 1
        if not self._beginning[begin.id]:
            del self._beginning[begin.id]
        self._end_left(self.rows.get(begin.id))

    def begin_alone(self, begin: SessionBegin) -> Row | None:
        """Returns the row with which a session begins while the store is down, or None for an Id that has none."""
        row = self.rows.get(begin.id)
        return row._replace(epoch=self.floor(begin.claim) + 1) if row else None

    def hold(self, begin: SessionBegin, row: Row, settled: bool) -> bool:
        """Holds a session that begins with this row. Returns False when a newer one was heard of, or its Id was changed, meanwhile.

        That may well be: a notification can overtake the answer to our own COMMIT.
        """
        session = HeldSession(row.epoch, row.prefix, begin.key, settled)
        if self._fault(session, self.rows[begin.id]):
            return False
        self._heard[begin.id] = row.epoch
        self._ends.pop(begin.id, None)
        self.held[begin.id] = session
        return True

    def release(self, id_: str, received: int = 0, sent: int = 0) -> None:
        """Notes that the session which is held has ended."""
        self._ends[id_] = SessionEnd(id_, self.server, self.held.pop(id_).epoch, received, sent)

    def hear(self, row: Row) -> str | None:
        """Takes in a row that was read. Returns why the session of its Id that is held here must end, or None."""
        old = self.rows.get(row.id)
        row = self.rows[row.id] = merge_rows(old, row) if old else row
        self._end_left(row)
        held = self.held.get(row.id)
        return self._fault(held, row) if held else None

    def _fault(self, held: HeldSession, row: Row) -> str | None:
        if row.prefix != held.prefix:
            return "its prefix was changed"
        if row.revoked:
            return "it was revoked"
        if held.key and row.key != held.key:  # one that had none goes on until its client is told its first one
            return "it got another key"
        if held.settled and row.epoch > held.epoch:
            return f"a newer session of its Id began at {row.server}"
        return None

    def _end_left(self, row: Row | None) -> None:
        """Notes that the session has ended which the store has here, and which is none: nobody waited for its beginning any more."""
        if row and row.live and row.server == self.server and row.id not in self.held and not self._beginning[row.id]:
            owed = self._ends.get(row.id)
            if not owed or owed.epoch < row.epoch:
                self._ends[row.id] = SessionEnd(row.id, self.server, row.epoch)

    def unsettle(self) -> None:
        """Notes that the store may have lost the beginning of every session."""
        for held in self.held.values():
            held.settled = False

    @property
    def owes_ends(self) -> bool:
        """Whether the store has to be told of sessions that ended."""
        return bool(self._ends)

    def debts(self) -> list[SessionSettlement | SessionEnd]:
        """Returns what the store has to be told: sessions that began without it and live, and those that ended."""
        unsettled = [SessionSettlement(id_, self.server, held.epoch) for id_, held in self.held.items() if not held.settled]
        return [*unsettled, *self._ends.values()]

    def pay(self, debt: Change, row: Row | None) -> str | None:
        """Takes in how the store's row is after one of `debts`; None: it has none. Returns why the session must end, or None."""
        fault = self.hear(row) if row else None
        held = self.held.get(debt.id)
        if self._ends.get(debt.id) == debt:
            del self._ends[debt.id]
        elif isinstance(debt, SessionSettlement) and held and held.epoch == debt.epoch:
            held.settled = True
            if row is None or row.server != self.server:
                return fault or f"a newer session of its Id began at {row.server if row else 'another server'}"
            held.epoch = row.epoch
            return self._fault(held, self.rows[debt.id])
        return fault

    def forget(self, id_: str) -> None:
        """Forgets an Id whose row the store has lost, and whose /64 is another's now."""
        self.rows.pop(id_, None)
        self._ends.pop(id_, None)


def lost_rows(known: Iterable[Row], stored: Mapping[str, Row]) -> tuple[list[Row], list[Row]]:
    """Compares what a server knows with what is in the store after it may have lost commits.

    Returns the rows as they have to be written back, and those which can't be, as their /64 is another Id's by now.
    """
    owners = {row.prefix: row.id for row in stored.values()}
    back: list[Row] = []
    taken: list[Row] = []
    for row in known:
        found = stored.get(row.id)
        merged = merge_rows(found, row) if found else row
        if merged == found:
            continue
        if owners.setdefault(merged.prefix, row.id) == row.id:
            back.append(merged)
        else:
            taken.append(row)
    return back, taken


# ---- kernel ----------------------------------------------------------------------------------------------------------

IP_S = 5.0  # for one run of `ip`, which takes 2 ms, or of `nft`
IP_KILLED, IP_TIMED_OUT = "somebody killed `ip`", f"`ip` did not end within {IP_S:.0f} s"  # why a command may have been run or not
TUN_CLOSE_S = 5.0  # for the close of a TUN, which takes 24 ms
TUN_CLOSERS = 64  # threads: in threads the closes overlap
DEVICE_REMOVED, DEVICE_SET_DOWN = "somebody removed it", "somebody set it down"  # what others may do to a device of ours
ADDRESS_REMOVED, ROUTE_REMOVED = "somebody removed its address", "somebody removed its route"
EVENTS_LOST = "perhaps somebody removed something of it"  # the kernel had more netlink messages than we read
REPAIRS_MAX, REPAIRS_S = 5, 60  # of one TUN in place, in so many seconds; more and it is made again
MANAGERS = {  # that may change devices which are not theirs, by a path that is there while they run
    "/run/systemd/netif/links": "systemd-networkd, see contrib/networkd-tun6.conf",
    "/run/NetworkManager": "NetworkManager, see contrib/NetworkManager-tun6.conf",
}
IF_INET6 = Path("/proc/net/if_inet6")  # the machine's IPv6 addresses
SETTLE_S = 0.02  # from the first message about a change of a device until all of the change has happened


def run_program(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a program that reads this text; to be called in a thread. Raises OSError, after IP_S subprocess.TimeoutExpired."""
    # It inherits the blocked signals: what ends this program and all of its children must not end `ip` in the midst.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace")
    try:
        output, errors = process.communicate(text, IP_S)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    except subprocess.TimeoutExpired:
        process.kill()  # its end is not waited for, as it may hang in the kernel
        raise


class Kernel:
    """Runs plans with `ip`. All plans that wait at the moment share one process, which takes 2 ms."""

    def __init__(self) -> None:
        self._commands = GroupCommit(self._run_batch)

    def apply(self, plan: Sequence[Step]) -> None:
        """Does the steps. When one fails, undoes the others and raises KernelError."""
        failures = self._commands.submit([step.do for step in plan])
        if failures:
            self.undo([step for number, step in enumerate(plan) if number not in failures])
            number, reason = min(failures.items())
            raise KernelError(f"`ip -6 {plan[number].do}` failed: {reason}")

    def reapply(self, plan: Sequence[Step]) -> list[Step]:
        """Does those steps again that others may have undone. Those that nobody undid fail. Returns the others."""
        failures = self._commands.submit([step.do for step in plan])
        return [step for number, step in enumerate(plan) if number not in failures]

    def undo(self, plan: Sequence[Step]) -> None:
        """Undoes the steps in reverse order. A step that others have undone already is no error."""
        undone = [step.undo for step in reversed(plan) if step.undo]
        failures = self._commands.submit(undone) if undone else {}
        if {IP_KILLED, IP_TIMED_OUT} & set(failures.values()):  # when many devices go at once, the kernel lets everybody wait for seconds
            failures = self._commands.submit(undone)
        for number, reason in failures.items():
            log.debug("`ip -6 %s` failed: %s", undone[number], reason)

    def remove_stale(self) -> None:
        """Removes the routes, rules and addresses that servers and clients have left which were killed."""
        try:
            routes = run_in_thread(self._ip, f"route show proto {ROUTE_PROTOCOL}").stdout
            rules = run_in_thread(self._ip, "rule show").stdout
            addresses = run_in_thread(self._ip, "addr show dev lo").stdout
        except (OSError, subprocess.TimeoutExpired):  # the next command reports it
            return
        stale = [(f"the route of {what}", process, [reject_step(what, process, base)]) for what, process, base in parse_rejects(routes)]
        own = parse_own_addresses(addresses)
        stale += [(f"the address {prefix[1]}", process, [own_address_step(prefix, process)]) for prefix, process in own]
        for source, process in parse_sources(rules):
            default = f"default table {OWNER_BASE + process}"
            left = [*source_plan(source, process), *(reject_step(default, process, base) for base in REJECT_BASES)]
            stale.append((f"the rules for packets {source}", process, left))
        for what, process, plan in stale:
            if process == os.getpid() or not Path(f"/proc/{process}").exists():  # in a container each start has the same process id
                log.info("removing %s, which a killed tun6 has left", what)
                self.undo(plan)

    def remove_devices(self, names: Sequence[str]) -> None:
        """Removes many devices at once: 1,000 in 0.3 s, where one after the other takes 24 ms each."""
        group = OWNER_BASE + os.getpid()
        self._commands.submit([*(f"link set dev {name} group {group}" for name in names), f"link del group {group}"])

    def _run_batch(self, jobs: list[list[str]]) -> list[dict[int, str]]:
        """Returns, for each list of commands, the number and the reason of each that failed."""
        commands = [(job, number, command) for job, commands in enumerate(jobs) for number, command in enumerate(commands)]
        failures: list[dict[int, str]] = [{} for _ in jobs]
        try:
            done = run_in_thread(self._ip, "-force -batch -", "".join(f"{command}\n" for _, _, command in commands))
        except OSError as error:
            reason = f"`ip` can't be run: {error.strerror}; it comes with iproute2"
            return [dict.fromkeys(range(len(commands)), reason) for commands in jobs]
        except subprocess.TimeoutExpired:
            log.error("`ip` did not end within %.0f s and was killed; `ip monitor` or the kernel's log may show what it waits for", IP_S)
            return [dict.fromkeys(range(len(commands)), IP_TIMED_OUT) for commands in jobs]
        if "BusyBox" in done.stderr:
            reason = "this `ip` is BusyBox's, which can't do that; install iproute2 (on OpenWrt the package ip-full)"
            return [dict.fromkeys(range(len(commands)), reason) for commands in jobs]
        reasons: list[str] = []
        for line in done.stderr.splitlines():
            failed = re.fullmatch(r"Command failed -:(\d+)", line)
            if failed:
                job, number, _ = commands[int(failed[1]) - 1]
                failures[job][number] = "; ".join(reasons) or "for no stated reason"
                reasons = []
            else:
                reasons.append(line.replace("RTNETLINK answers: ", "").strip())
        if done.returncode < 0:  # it is not known which commands were run
            return [{0: IP_KILLED} for _ in jobs]
        if done.returncode and not any(failures):
            return [{0: "; ".join(reasons) or f"`ip` ended with {done.returncode}"} for _ in jobs]
        return failures

    @staticmethod
    def _ip(arguments: str, commands: str = "") -> subprocess.CompletedProcess[str]:
        return run_program(["ip", "-6", *arguments.split()], commands)


def write_ioctl(kind: str, number: int) -> int:
    """Returns the number of an ioctl that reads an int from the caller: _IOW of asm/ioctl.h on this machine."""
    direction = 0x8000_0000 if platform.machine().startswith(("mips", "ppc", "sparc", "alpha")) else 0x4000_0000
    return direction | 4 << 16 | ord(kind) << 8 | number


class Tun:
    """A TUN device whose packets always have a virtio_net_hdr. The only user of pytun.

    Frames are read and written with `file`, one at a time; it returns None instead of blocking. `fd` is its descriptor,
    `gso_kinds` are the GSO kinds that this kernel supports.
    """

    IFF_VNET_HDR, TUNSETVNETLE, TUNSETOFFLOAD = 0x4000, write_ioctl("T", 220), write_ioctl("T", 208)  # linux/if_tun.h, as are the next
    CSUM, TSO6, USO = 0x01, 0x04, 0x20 | 0x40  # TUN_F_...; USO for both IP versions, since Linux 6.2

    def __init__(self, name: str) -> None:
        """Makes the device; the kernel replaces %d in `name` by the next free number. Raises KernelError."""
        try:
            self._device = pytun.TunTapDevice(name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI | self.IFF_VNET_HDR)
        except (pytun.Error, OSError) as error:
            code, reason = error.args if len(error.args) == 2 else (0, str(error))
            root = "run tun6 as root" if os.geteuid() else "let this container have the device /dev/net/tun and CAP_NET_ADMIN"
            advice = {
                errno.ENOENT: "load the kernel's module with `modprobe tun`, or give /dev/net/tun to this container",
                errno.ENODEV: "this kernel's module `tun` can't be loaded; if the kernel was upgraded since the last boot, reboot",
                errno.ENXIO: "this kernel's module `tun` can't be loaded; if the kernel was upgraded since the last boot, reboot",
                errno.EPERM: root,
                errno.EACCES: f"`chmod 666 /dev/net/tun`, as udev has it, or {root}",
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
        os.set_inheritable(self.fd, False)  # a child process would keep the device alive
        fcntl.ioctl(self.fd, self.TUNSETVNETLE, struct.pack("i", 1))
        for key in ("accept_ra", "accept_redirects", "autoconf"):  # the peer must not change this machine's routes
            try:
                Path(f"/proc/sys/net/ipv6/conf/{self.name}/{key}").write_text("0")
            except OSError as error:
                log_unwritable_sysctl(key, error.errno, error.strerror)
        self.gso_kinds = frozenset({"tso6", "uso6"} if self._try_offload(self.USO) else {"tso6"} if self._try_offload(0) else ())
        if "uso6" not in self.gso_kinds:
            log_missing_offloads(self.gso_kinds)
        self.set_offload(None)

    def set_offload(self, gso_kinds: frozenset[str] | None) -> None:
        """From now on reads may return GSO packets of these kinds and open checksums; None: finished packets only. Raises KernelError."""
        if gso_kinds is not None:
            more = self.USO if {"tso6", "uso6"} <= gso_kinds & self.gso_kinds else 0
            if self._try_offload(more, "tso6" in gso_kinds):
                return
        try:
            fcntl.ioctl(self.fd, self.TUNSETOFFLOAD, 0)
        except OSError as error:
            raise tun_error(self.name, error) from None

    def close(self) -> None:
        """Removes the device with its addresses and routes, in a thread. Nothing may wait for `fd` any more.

        Returns after TUN_CLOSE_S at the latest; a close that takes longer goes on.
        """
        with gevent.Timeout(TUN_CLOSE_S, False):
            run_in_thread(self._device.close)
            return
        log.error("TUN device %s: its close does not end, see the kernel's log", self.name)

    def _try_offload(self, more: int, tso: bool = True) -> bool:
        try:
            fcntl.ioctl(self.fd, self.TUNSETOFFLOAD, self.CSUM | (self.TSO6 if tso else 0) | more)
            return True
        except OSError:
            return False


def tun_error(name: str, error: OSError) -> KernelError:
    """Returns the error for a read or write of a TUN that failed."""
    return KernelError(f"TUN device {name}: {DEVICE_REMOVED if error.errno == errno.EBADFD else error.strerror}")


def log_repair(name: str, what: str) -> None:
    """Warns that somebody has changed a TUN, which is as before again, and names who may have been it."""
    managers = " or ".join(manager for path, manager in MANAGERS.items() if Path(path).exists())
    log.warning("TUN device %s: %s; it is back%s", name, what, managers and f" (perhaps it was {managers})")


@functools.cache
def log_unwritable_sysctl(key: str, code: int | None, reason: str | None) -> None:
    """Warns once of a sysctl of our TUNs that can't be written, which is no harm while the ingress filter of each session works."""
    advice = "; make /proc/sys writable in this container" if code == errno.EROFS else ""
    log.warning("%s of our TUN devices can't be turned off: %s%s", key, reason, advice)


@functools.cache
def log_missing_offloads(gso_kinds: frozenset[str]) -> None:
    """Logs once what this kernel does not support, and that this is no fault."""
    what = "UDP packets (Linux 6.2 and newer can)" if gso_kinds else "packets"
    log.info("this kernel hands %s to a TUN only one by one: it works, but slower", what)


SO_ATTACH_FILTER = 26  # asm-generic/socket.h
LOAD_WORD, LOAD_HALF, LOAD_BYTE, AND, IF_EQUAL, GIVE = 0x20, 0x28, 0x30, 0x54, 0x15, 0x06  # linux/bpf_common.h


def attach_filter(sock: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    """The kernel gives the socket only what the program passes, whose lines are code, jt, jf and k of linux/filter.h. Raises OSError."""
    lines = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(lines)))


def filter_program(*alternatives: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Returns the program for attach_filter that passes what one alternative describes, by fields: load, offset, mask, value."""
    program = []
    for fields in alternatives:
        for left, (load, at, bits, value) in zip(range(len(fields) - 1, -1, -1), fields):
            program += [(load, 0, 0, at), (AND, 0, 0, bits), (IF_EQUAL, 0, 3 * left + 1, value)]
        program.append((GIVE, 0, 0, 0xFFFF_FFFF))
    return [*program, (GIVE, 0, 0, 0)]


IFF_UP, SIOCGIFFLAGS = 0x1, 0x8913  # linux/if.h, linux/sockios.h


def is_up(interface: str) -> bool:
    """Returns whether somebody has set the interface up. Raises OSError when there is none of this name."""
    with system_socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        ifreq = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16s24x", interface.encode()))
    return bool(struct.unpack_from("H", ifreq, 16)[0] & IFF_UP)


class DeviceMonitor:
    """Reports when somebody removes a device of ours, sets it down, or removes its address or route: rtnetlink(7)."""

    NEWLINK, DELLINK, DELADDR, NEWROUTE, DELROUTE = 16, 17, 21, 24, 25  # linux/rtnetlink.h, as are the next
    GROUPS = 0x1 | 0x100 | 0x400  # RTMGRP_LINK, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE
    IFA_ADDRESS, RTA_OIF = 1, 4
    MESSAGE_HEADER, ATTRIBUTE_HEADER = struct.Struct("=IH10x"), struct.Struct("=HH")  # length with the header, type
    SO_RCVBUFFORCE = 33  # asm-generic/socket.h

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[str, bytes], None]] = {}  # by index of the device
        self._pending: dict[int, set[tuple[str, bytes]]] = {}  # by index: what was removed and is to be verified

    def watch(self, device: str, on_removal: Callable[[str, bytes], None]) -> int:
        """From now on calls `on_removal(what, address)` for what is removed of the device. Returns the number that `unwatch` takes."""
        try:
            index = system_socket.if_nametoindex(device)
        except OSError:  # it is gone already, which the next read or write of it reports
            return 0
        self._callbacks[index] = on_removal
        return index

    def unwatch(self, index: int) -> None:
        """Ends the calls for a device."""
        self._callbacks.pop(index, None)

    def run(self) -> None:
        """Reads the kernel's messages until it is killed."""
        try:
            with self._open() as sock:
                while True:
                    self._read(sock)
        except OSError as error:
            warn_standing("devices", "what others do to our devices can't be watched: %s", error.strerror)
        finally:
            self._callbacks.clear()  # at the end we remove the devices ourselves, and nobody is to put them back

    def _read(self, sock: socket.socket) -> None:
        try:
            messages = sock.recv(1 << 16)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            log.debug("the kernel had more news of devices than we read")
            for index in list(self._callbacks):
                self._verify_later(index, EVENTS_LOST, b"")
        else:
            for index, what, address in parse_removals(messages):
                self._verify_later(index, what, address)

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        with suppress(OSError):  # refused in an unprivileged container, where EVENTS_LOST is more frequent
            sock.setsockopt(socket.SOL_SOCKET, self.SO_RCVBUFFORCE, 4 << 20)
        with suppress(OSError):  # the filter only saves work: parse_removals ignores the same messages
            attach_filter(sock, self._filter())
        sock.bind((0, self.GROUPS))
        return sock

    def _filter(self) -> list[tuple[int, int, int, int]]:
        """Returns the program that drops messages of new routes, and of removed ones that are not ours."""
        deleted, new = (int.from_bytes(struct.pack("=H", kind), "big") for kind in (self.DELROUTE, self.NEWROUTE))
        return [
            (LOAD_HALF, 0, 0, 4),  # nlmsg_type, which the filter reads as big-endian
            (IF_EQUAL, 0, 2, deleted),
            (LOAD_BYTE, 0, 0, 16 + 5),  # rtm_protocol
            (IF_EQUAL, 1, 2, ROUTE_PROTOCOL),
            (IF_EQUAL, 1, 0, new),
            (GIVE, 0, 0, 0xFFFF_FFFF),
            (GIVE, 0, 0, 0),
        ]

    def _verify_later(self, index: int, what: str, address: bytes) -> None:
        if index in self._callbacks:
            if index not in self._pending:
                self._pending[index] = set()
                gevent.spawn(self._verify_pending, index)
            self._pending[index].add((what, address))

    def _verify_pending(self, index: int) -> None:
        """Reports what was removed of a device, a report at a time, until nothing more is."""
        try:
            while self._pending[index]:
                gevent.sleep(SETTLE_S)
                removals, self._pending[index] = self._pending[index], set()
                for what, address in self._verify(index, removals):
                    if index in self._callbacks:
                        self._callbacks[index](what, address)
        finally:
            del self._pending[index]

    def _verify(self, index: int, removals: set[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        """Returns what the removals became: a device that is removed or set down loses the rest, a new one was not up at first."""
        try:
            if not is_up(system_socket.if_indextoname(index)):
                return [(DEVICE_SET_DOWN, b"")]
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENODEV):  # without a free descriptor it cannot be verified
                return []
            return [(DEVICE_REMOVED, b"")]
        return sorted(removal for removal in removals if removal[0])


def split_netlink(data: bytes, header: struct.Struct) -> Iterator[tuple[int, bytes]]:
    """Yields type and content of each message or attribute, which are aligned to 4 bytes."""
    at = 0
    while at + header.size <= len(data):
        length, kind = header.unpack_from(data, at)
        yield kind, data[at + header.size : at + length]
        at += max(length, header.size) + 3 & ~3


def parse_removals(messages: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Yields what rtnetlink messages say was removed: index of the device, what ("" for the device itself), the address."""
    for kind, body in split_netlink(messages, DeviceMonitor.MESSAGE_HEADER):
        if kind in (DeviceMonitor.NEWLINK, DeviceMonitor.DELLINK) and len(body) >= 16:
            family, index, flags = struct.unpack_from("=BxxxiI", body)
            if family == 0 and (kind == DeviceMonitor.DELLINK or not flags & IFF_UP):
                yield index, "", b""
        elif kind == DeviceMonitor.DELADDR and len(body) >= 8:
            address = dict(split_netlink(body[8:], DeviceMonitor.ATTRIBUTE_HEADER)).get(DeviceMonitor.IFA_ADDRESS, b"")
            yield int.from_bytes(body[4:8], sys.byteorder), ADDRESS_REMOVED, address
        elif kind == DeviceMonitor.DELROUTE and len(body) >= 12 and body[5] == ROUTE_PROTOCOL:
            index = dict(split_netlink(body[12:], DeviceMonitor.ATTRIBUTE_HEADER)).get(DeviceMonitor.RTA_OIF, b"")
            yield int.from_bytes(index, sys.byteorder), ROUTE_REMOVED, b""


def read_text(path: Path) -> str:
    """Returns the text of a file of the kernel, "" when there is none."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def interface_addresses(interface: str, family: int) -> list[str]:
    """Returns the addresses of an interface; none when the interface has just been removed."""
    try:
        return [entry["addr"] for entry in netifaces.ifaddresses(interface).get(family, ()) if "addr" in entry]
    except ValueError:
        return []


def parse_addresses(if_inet6: str) -> list[tuple[str, IPv6Address, int]]:
    """Returns interface, address and prefix length of each line of /proc/net/if_inet6."""
    lines = [line.split() for line in if_inet6.splitlines()]
    return [(line[5], IPv6Address(bytes.fromhex(line[0])), int(line[2], 16)) for line in lines]


def machine_addresses() -> list[tuple[str, IPv6Address]]:
    """Returns all IPv6 addresses of this machine, each with its interface. At once, also beside a thousand TUNs."""
    return [(interface, address) for interface, address, _ in parse_addresses(read_text(IF_INET6))]


def default_interface(family: int = netifaces.AF_INET) -> str | None:
    """Returns the name of the interface with the default route, None when there is none.

    netifaces knows only routes with one gateway in the table main. For others the kernel is asked: the source address to a far
    address (RFC 5737, RFC 3849; nothing is sent) is one of that interface.
    """
    name: str | None = netifaces.gateways()["default"].get(family, (None, None))[1]
    if name:
        return name
    with system_socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
        source = probe.getsockname()[0]
        return next((each for each in netifaces.interfaces() if source in interface_addresses(each, family)), None)
    return None


def default_id() -> str:
    """Returns the MAC address of the interface with the IPv4 default route. Raises SessionError when there is none.

    Warns when the hardware does not have that address, as a bridge, a container or a privacy setting makes it up anew.
    """
    interface = default_interface()
    if interface is None:
        raise SessionError("no IPv4 default route, whose interface would give the Id; connect the network, or set `id` in config.ini")
    addresses = interface_addresses(interface, netifaces.AF_LINK)
    if not addresses:
        raise SessionError(f"{interface} has the IPv4 default route but no MAC address to be the Id; set `id` in config.ini")
    with suppress(OSError, ValueError):
        if int(Path(f"/sys/class/net/{interface}/addr_assign_type").read_text()):  # NET_ADDR_PERM of linux/netdevice.h is 0
            warn_standing(
                "id",
                "the Id is the MAC address of %s, which its hardware does not have: it may be another one after the next boot, and the"
                " prefix with it; set `id` in config.ini",
                interface,
            )
    return addresses[0]


def read_sysctl(name: str) -> str:
    """Returns the value of a sysctl such as net.ipv6.conf.all.forwarding, "" when this kernel does not have it."""
    return read_text(Path("/proc/sys", *name.split(".")))


def find_dropping_chains(devices: str, pool: IPv6Network) -> dict[str, str]:
    """Returns the firewall's chains that drop forwarded packets unless a rule accepts them -> whose each is, and what helps.

    A table with a rule for our devices (a pattern such as tun6-*) or the pool is left out: somebody has thought of us there. Raises
    OSError, subprocess.TimeoutExpired, or ValueError when the firewall can't be read.
    """

    def run(*command: str) -> str:
        done = run_program(list(command))
        if done.returncode:
            raise ValueError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
        return done.stdout

    def nft(*what: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(run("nft", "-j", "list", *what)).get("nftables", [])
        return listed

    def is_ours(rules: str) -> bool:
        return any(word in rules for word in (devices, devices.replace("*", "+"), str(pool)))

    def advice(chain: str, names: str) -> str:
        iptables = f"`ip6tables -I %s -i {devices.replace('*', '+')} -j ACCEPT` and the same with -o"
        if "firewalld" in names:
            source = f"`firewall-cmd --permanent --zone=trusted --add-source={pool}` and `firewall-cmd --reload`"
            return f"firewalld's; {source} help, and docs/operating.md has what lets connections from outside in"
        if "ufw" in names:
            return f"ufw's; `ufw route allow from {pool}` and `ufw route allow to {pool}` help"
        docker = "Docker's" if "docker" in names.lower() else ""
        if chain == "ip6 filter FORWARD":
            first = "DOCKER-USER" if "DOCKER-USER" in names else "FORWARD"  # Docker 20.10 has no DOCKER-USER for IPv6
            return f"{docker or 'that of ip6tables'}; {iptables % first} help"
        return f"""{docker or "nftables'"}; `nft insert rule {chain} iifname '"{devices}"' accept` and the same with oifname help"""

    try:
        chains = [entry["chain"] for entry in nft("chains") if "chain" in entry]
    except FileNotFoundError:
        with suppress(FileNotFoundError):
            table = run("ip6tables", "-w", "-S")
            if re.search("^-P FORWARD DROP|^-A FORWARD -j (DROP|REJECT)", table, re.MULTILINE) and not is_ours(table):
                return {"ip6 filter FORWARD": advice("ip6 filter FORWARD", table)}
        return {}
    dropping = {}
    for chain in chains:
        family, table = place = chain["family"], chain["table"]
        if chain.get("hook") != "forward" or family not in ("inet", "ip6") or table == "firewalld_policy_drop":
            continue  # the last of these is there only while firewalld reloads
        name = f"{family} {table} {chain['name']}"
        rules = [entry["rule"]["expr"] for entry in nft("chain", *name.split()) if "rule" in entry]
        kinds = [{kind for statement in rule for kind in statement} for rule in rules]
        drops = any(each & {"drop", "reject"} and each <= {"drop", "reject", "counter", "log"} for each in kinds)
        if (drops or chain.get("policy") == "drop") and not is_ours(run("nft", "-t", "list", "table", *place)):
            names = [table, *(other["name"] for other in chains if (other["family"], other["table"]) == place)]
            dropping[name] = advice(name, " ".join(names))
    return dropping


# ---- connections -----------------------------------------------------------------------------------------------------

DEAD_AFTER_S = 35  # in which a dead peer is noticed, where `dead_after` does not scale this and the times marked with *
KEEPALIVE = (20, 5)  # * seconds idle, seconds between probes: TCP_KEEPIDLE, TCP_KEEPINTVL
KEEPALIVE_PROBES = 2  # TCP_KEEPCNT
USER_TIMEOUT_S = 30  # * TCP_USER_TIMEOUT: sent data that stays unacknowledged for so long ends the connection
TCP_CONGESTION, TCP_NOTSENT_LOWAT = 13, 25  # linux/tcp.h; Python has the latter since 3.12
TCP_ESTABLISHED = 1  # net/tcp_states.h
SIOCOUTQ, SIOCOUTQNSD = termios.TIOCOUTQ, 0x894B  # linux/sockios.h: bytes that are not acknowledged, not sent
IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0  # linux/in.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_SEND_QUEUE = 19, 20, 21, 2  # linux/tcp.h
ICMP_DEST_UNREACH, ICMP_HOST_UNREACH, ICMP_FRAG_NEEDED = 3, 1, 4  # linux/icmp.h
PATH_MTUS = 1280, 576  # bytes, tried in turn where large packets vanish: IPv6's minimum, which most paths take, and IPv4's (RFC 1122)
IPV4_TCP_HEADERS = 40  # bytes, without options
JIFFIES_S = 0.02  # two units in which most of the kernel's times of TCP are measured
MTU_CHECK_S = 1.0  # between two looks at all connections
MTU_RENEWAL_S = 240.0  # between two renewals of what the kernel forgets after 600 s (net.ipv4.route.mtu_expires)
MTU_HOSTS_MAX = 1024  # hosts whose path's MTU is remembered
LEGACY_READ_TIME_S = 0.2  # for a legacy client to read the answer, once its kernel has it, before the first frame follows
LAN_RTT_US = 2_000  # a path with a shorter round trip is a LAN, which needs neither BBR nor a paced writer
UNSENT_S = 0.01  # a socket holds the unsent data of so many seconds: nothing can overtake what is in it
UNSENT_MIN, UNSENT_MAX = 8 << 10, 256 << 10  # bytes, bounds of that; with less, BBR counts the connection as application-limited
UNSENT_KNOWN_MIN = 1600  # bytes, likewise under a cap or a known rate: one full frame, in TLS, too
PACING_UPDATE_S = 0.05  # between two computations of that
SO_MAX_PACING_RATE = 47  # asm-generic/socket.h: bytes/s of payload, tcp_update_skb_after_send in net/ipv4/tcp_output.c
SEGMENT_HEADERS = 52  # bytes: IPv4, TCP, its timestamps
ACKNOWLEDGEMENTS_S = 0.5  # over which the rate of acknowledgements, which the kernel does not pace, is measured
TCP_CC_INFO, BBR_INFO = 26, struct.Struct("5I")  # linux/tcp.h; struct tcp_bbr_info, linux/inet_diag.h: the fourth is the pacing gain
BBR_STARTUP_GAIN = 739  # of 256, in STARTUP: bbr_high_gain in net/ipv4/tcp_bbr.c
TCP_CA_RECOVERY = 3  # of tcpi_ca_state: losses are being repaired, as in the higher states
RECEIVE_S = 0.05  # of what is read from a limited peer, besides a round trip, its receive buffer holds so many seconds
RECEIVE_MIN, RECEIVE_MAX = 16 << 10, 1 << 20  # bytes, bounds of that; what is larger is left to the kernel
SO_BUF_LOCK = 72  # asm-generic/socket.h; since Linux 5.14
RECORD_DATA_MAX = 16 << 10  # bytes of data in a TLS record: RFC 8446 section 5.1
RECORD_HEADER = 5  # bytes, the last two are the length of the record
RECORD_MAX = 17 << 10  # bytes, more than a TLS record with its header: RFC 8446 section 5.2
TLS_HANDSHAKE_BYTES_MAX = 32 << 10  # bytes of TLS until the peer has said its hello: certificates, hello, 4 KiB behind it
POST_HANDSHAKE_RECORDS_MAX = 16  # records without data in one read: key updates and session tickets, which are rare
SLICE, SLICE_PAUSE_S = 50, 0.001  # of what concerns all sessions, so many are done before others run


def in_slices(items: Iterable[T]) -> Iterator[T]:
    """Yields the items, and lets others run after each SLICE of them."""
    for number, item in enumerate(items, 1):
        yield item
        if not number % SLICE:
            gevent.sleep(SLICE_PAUSE_S)


class Stream:
    """The bytes of one plain connection.

    During the handshake, `receive` and `send` wait. Afterwards the pumps use `readinto`, and `encrypt` and `write`.
    """

    encrypt: Encrypt | None = None
    security = ""  # for the log

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        file = io.FileIO(sock.fileno(), "r+", closefd=False)
        self._read_socket: Read = file.readinto
        self.write: Write = file.write  # writes to the socket what `encrypt` returned, if there is one

    @property
    def readinto(self) -> Read:
        """The Read of the pump."""
        return self._read_socket

    def receive(self) -> bytes:
        """Waits for data and returns it. Raises EOFError, OSError, ProtocolError."""
        data: bytes = self.sock.recv(MESSAGE_MAX)
        if not data:
            raise EOFError
        return data

    def send(self, data: bytes) -> None:
        """Sends all of it. Raises OSError, ProtocolError."""
        self.sock.sendall(data)


_ciphertext_buffer = memoryview(bytearray(BATCH_BYTES + OFFLOAD_HEADER.size + PACKET_MAX))  # of the process: no read is larger
# What TLS writes, of all connections: each takes what is its own before another one runs. A MemoryBIO never gives memory back, and
# this one gets whole batches, as OpenSSL makes many records in one call.
_outgoing_bio = ssl.MemoryBIO()
_unpack_record_length = struct.Struct(">xxxH").unpack_from


class TlsStream(Stream):
    """The bytes of one connection inside TLS.

    One read of the socket brings many records, which are decrypted in memory; a socket of `ssl` reads twice for each record.
    A MemoryBIO never shrinks, therefore it gets at most one record at a time.
    """

    security = ", over TLS"

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str | None = None) -> None:
        """Does the TLS handshake. `server_name` is what the server's certificate must name, where the context checks that.

        Raises ProtocolError, EOFError, OSError.
        """
        super().__init__(sock)
        self._incoming = ssl.MemoryBIO()
        self._header = b""  # the beginning of a record's header, which is not in `_incoming` yet
        self._missing = 0  # bytes that a record in `_incoming` lacks
        self._outgoing = b""  # records that are to be sent
        self._handshake_bytes = 0  # that came before the pumps began
        self._read_divisor = 1  # a read takes the free bytes of the buffer divided by this
        server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self._tls = context.wrap_bio(self._incoming, _outgoing_bio, server_side, None if server_side else server_name)
        self._wait_for(self._tls.do_handshake)

    @property
    def readinto(self) -> Read:
        return self._read_records

    def fingerprint(self) -> str:
        """Returns the fingerprint of the peer's certificate: "sha256:" and 64 hexadecimal digits."""
        return certificate_fingerprint(self._tls.getpeercert(binary_form=True) or b"")

    def receive(self) -> bytes:
        """Waits for data and returns all that has come: the pumps wait for the socket, and would not see what stays in memory."""
        data = self._wait_for(self._tls.read, MESSAGE_MAX)
        if not data:
            raise EOFError
        with self._using_tls(), suppress(ssl.SSLWantReadError):
            while more := self._tls.read(RECORD_MAX):
                data += more
        return data

    def send(self, data: bytes) -> None:
        self.sock.sendall(self.encrypt(data))

    def encrypt(self, data: bytes | bytearray | memoryview) -> bytes:
        """Returns the records of this data, behind those that TLS itself has to send. Raises ProtocolError."""
        with self._using_tls():
            self._tls.write(data)
        return self._take_outgoing()

    @contextmanager
    def _using_tls(self) -> Iterator[None]:
        """Turns what `ssl` raises meanwhile into errors of ours, and takes what is to be sent out of the buffer of all connections."""
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
        finally:
            self._outgoing += _outgoing_bio.read()

    def _take_outgoing(self) -> bytes:
        records, self._outgoing = self._outgoing, b""
        return records

    def _wait_for(self, step: Callable[..., R], *args: Any) -> R:
        """Repeats a step of TLS until the peer has sent all that it needs, and sends what the step produces. Returns its result."""
        while True:
            try:
                with self._using_tls():
                    return step(*args)
            except ssl.SSLWantReadError:
                pass
            finally:
                if self._outgoing:
                    self.sock.sendall(self._take_outgoing())
            data = super().receive()
            self._handshake_bytes += len(data)
            if self._handshake_bytes > TLS_HANDSHAKE_BYTES_MAX:
                raise ProtocolError(f"more than {TLS_HANDSHAKE_BYTES_MAX} bytes of TLS, and the handshake is not over")
            gevent.sleep()  # recv returns at once from a peer that floods, and nobody else would run
            for piece in self._split_records(memoryview(self._header + data)):
                self._incoming.write(piece)

    def _split_records(self, data: memoryview) -> Iterator[memoryview]:
        """Cuts data, which begins with `_header`, at the end of each record, where `_missing` is 0."""
        at, end, missing = 0, len(data), self._missing
        while at < end:
            if not missing:
                if end - at < RECORD_HEADER:
                    break
                missing = RECORD_HEADER + _unpack_record_length(data, at)[0]
            piece = data[at : at + missing]
            at += len(piece)
            self._missing = missing = missing - len(piece)
            yield piece
        self._header = bytes(data[at:])

    def _read_records(self, view: memoryview) -> int | None:
        """A Read for the pump. It reads so little that all complete records fit the view; less than one record stays in memory."""
        begin = len(self._header)
        _ciphertext_buffer[:begin] = self._header
        got = self._read_socket(_ciphertext_buffer[begin : begin + (len(view) - RECORD_MAX - begin) // self._read_divisor])
        if not got:
            return got
        if len(self._outgoing) > RECORD_MAX:
            raise ProtocolError("the other side asks for more new keys than it takes")
        filled = records = post_handshake_records = 0
        room, feed, decrypt = len(view), self._incoming.write, cast(Callable[[int, memoryview], int], self._tls.read)
        with self._using_tls():
            for piece in self._split_records(_ciphertext_buffer[: begin + got]):
                feed(piece)
                if not self._missing:
                    records += 1
                    try:
                        filled += decrypt(room - filled, view[filled:])
                    except ssl.SSLWantReadError:  # a record without data
                        post_handshake_records += 1
                        if post_handshake_records > POST_HANDSHAKE_RECORDS_MAX:
                            raise ProtocolError("the other side says more of TLS itself than it has reason to") from None
        self._read_divisor = 8 if records > BATCH_RECORDS // self._read_divisor else 1
        return filled or None


def certificate_fingerprint(certificate: bytes) -> str:
    """Returns the fingerprint of a certificate in DER: "sha256:" and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(certificate).hexdigest()


def read_certificate(path: str) -> bytes:
    """Returns the first certificate of a PEM file, as DER. Raises OSError, ValueError."""
    found = re.search("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", Path(path).read_text("ascii"), re.DOTALL)
    if not found:
        raise ValueError("there is no certificate in it")
    return ssl.PEM_cert_to_DER_cert(found[0])


def certificate_validity(path: str) -> tuple[float, float] | None:
    """Returns from when until when (Unix time) the first certificate of a PEM file is valid, None when that can't be read."""
    try:
        der = read_certificate(path)
    except (OSError, ValueError):
        return None
    moment = rb"(?:\x17\x0d(\d{12})Z|\x18\x0f(\d{14})Z)"  # UTCTime or GeneralizedTime in RFC 5280 section 4.1.2.5
    found = re.search(rb"\x30." + 2 * moment, der, re.DOTALL)
    if not found:
        return None
    times = (
        long.decode() if long else ("19" if short >= b"50" else "20") + short.decode()
        for short, long in (found.groups()[:2], found.groups()[2:])
    )
    begins, expires = (calendar.timegm(time.strptime(text, "%Y%m%d%H%M%S")) for text in times)
    return begins, expires


def server_tls_context(path: str) -> ssl.SSLContext:
    """Returns TLS settings with the certificate and key in this PEM file. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    context.num_tickets = 0  # sessions are not resumed
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE  # the client's CPU is the weaker one, and its order tells what is fast for it
    try:
        context.load_cert_chain(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{path} is not a certificate with its key: {error.reason or error}; `tun6.py keygen` makes one") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; `tun6.py keygen` makes one") from None
    return context


def client_tls_context(pinned: bool) -> ssl.SSLContext:
    """Returns TLS settings for a server whose fingerprint the caller compares (pinned), or whose certificate an authority has signed."""
    if pinned:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # neither authority nor date, as a Raspberry Pi has no clock
    else:
        context = ssl.create_default_context()
    _harden(context)
    if not has_aes_instructions():
        # Python can't order the ciphers of TLS 1.3, where AES is first; in software ChaCha20 is several times as fast.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+CHACHA20:ECDHE+AESGCM")
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2; all ciphers of TLS 1.3 are good


def has_aes_instructions() -> bool:
    """Returns whether this CPU has instructions for AES; on x86 the flag is among `flags`, on ARM among `Features`."""
    return re.search(r"^(flags|Features)\s*:.*\baes\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None


def set_tcp_options(sock: socket.socket, dead_after: float) -> None:
    """Disables Nagle's algorithm, and makes TCP notice a dead peer after USER_TIMEOUT_S: of unacknowledged data or, when idle, of silence.

    When idle, KEEPALIVE says when TCP asks. How often in vain, TCP_USER_TIMEOUT decides, as in tcp_keepalive_timer() of the kernel; the
    number of probes counts only where that is not supported.
    """
    scale = dead_after / DEAD_AFTER_S
    idle, interval = (max(round(seconds * scale), 1) for seconds in KEEPALIVE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * USER_TIMEOUT_S * scale))


def read_tcp_info(sock: socket.socket, kind: str, at: int) -> int:
    """Returns a field of struct tcp_info (linux/tcp.h), 0 where the kernel is too old to have it."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return cast(int, struct.unpack_from(kind, info.ljust(256, b"\0"), at)[0])


def probe_window(sock: socket.socket) -> tuple[int, int]:
    """Sends an empty segment, which the peer's kernel answers. Raises OSError.

    Returns sequence numbers: of the first byte that is not acknowledged, and of the first that was not sent. The kernel sends the
    segment when the repair of a socket ends, tcp_send_window_probe.
    """
    reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
        end = sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ)
    finally:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)  # it has cleared that, and no new server could take the port
    sequence = []
    for request in (SIOCOUTQ, SIOCOUTQNSD):
        waiting = bytearray(4)
        fcntl.ioctl(sock.fileno(), request, waiting)
        sequence.append((end - int.from_bytes(waiting, sys.byteorder)) % 2**32)
    return sequence[0], sequence[1]


def report_unreachable(sock: socket.socket, code: int, sequence: int, mtu: int = 0) -> None:
    """Tells our kernel, as a router would with ICMP, that a segment of this connection did not arrive. Raises OSError.

    No socket option does to a live connection what the kernel does then. ICMP_HOST_UNREACH, for the first byte that is not
    acknowledged: the timeout after which that is sent again is halved (RFC 6069). ICMP_FRAG_NEEDED, for a byte that is on the way:
    all that is larger than the MTU is sent again at once, smaller, and the MTU holds for that host for ten minutes (RFC 1191).
    """
    (host, port), (peer_host, peer_port) = sock.getsockname(), sock.getpeername()
    ends = socket.inet_aton(host) + socket.inet_aton(peer_host)
    quoted = struct.pack(">BBHHHBBH8s", 0x45, 0, 1500, 0, 0x4000, 64, socket.IPPROTO_TCP, 0, ends)  # an IPv4 header
    quoted += struct.pack(">HHI", port, peer_port, sequence)
    head = struct.pack(">BBHHH", ICMP_DEST_UNREACH, code, 0, 0, mtu)
    message = head[:2] + struct.pack(">H", 0xFFFF - sum_words(head + quoted)) + head[4:] + quoted
    with system_socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(message, socket.MSG_DONTWAIT, (host, 0))


def set_path_mtu(sock: socket.socket, mtu: int) -> None:
    """Sets the largest packet, in bytes, that the path of this connection takes. Raises OSError."""
    report_unreachable(sock, ICMP_FRAG_NEEDED, probe_window(sock)[1], mtu)


@dataclass
class Stall:
    """What is known while one segment is sent again and again."""

    sequence: int  # number of its first byte
    asked: float  # when the last empty segment left
    passed: int | None = None  # how often the segment had been sent again when an empty one was answered first
    failed: float = math.inf  # when the segment was found to be sent once more since, or the kernel was told an MTU
    mtu: int | None = None  # that the kernel was told since


class PathMtu:
    """What one connection may send: smaller packets, where large ones vanish and nobody says so (RFC 2923).

    That is so when a segment was sent once more in vain although, before that and after it, empty ones were answered. On a dead path
    none is answered.
    """

    def __init__(self, sock: socket.socket, peer: str, mtu: int | None = None) -> None:
        """`peer` is for the log. `mtu` is that of the path, when it was found by an earlier connection."""
        self.mtu = mtu  # None: as the kernel has it
        self._sock, self._peer = sock, peer
        self._told = -math.inf  # when the kernel was told that
        self._stall: Stall | None = None
        self._fragments = False  # whether routers may fragment what it sends

    def check(self, now: float) -> bool:
        """Looks for a stall, and tries smaller packets. Returns whether `mtu` has just been found. Raises OSError."""
        before = self.mtu
        retransmits = read_tcp_info(self._sock, "B", 2)  # tcpi_retransmits: of one segment, by timeouts
        if retransmits and not self._fragments:
            try:
                self._follow(retransmits, now)
            except PermissionError:
                self._allow_fragmentation()
        elif not retransmits:
            self._end_stall(now)
            if self.mtu and now - self._told >= MTU_RENEWAL_S:
                self._told = now
                set_path_mtu(self._sock, self.mtu)
        return self.mtu != before

    def _end_stall(self, now: float) -> None:
        """Takes note of progress, and of what has brought it."""
        stall, self._stall = self._stall, None
        if stall and stall.mtu:
            self.mtu, self._told = stall.mtu, now
            log.warning("large packets to %s vanish on the path: from now on it gets none above %d bytes", self._peer, self.mtu)

    def _follow(self, retransmits: int, now: float) -> None:
        """Goes on with a stall: one step of asking, sending again, and trying a smaller MTU, as long as all is answered but the segment."""
        wait = MTU_CHECK_S / 2 + 2 * read_tcp_info(self._sock, "I", 68) / 1e6  # tcpi_rtt
        heard = now - read_tcp_info(self._sock, "I", 56) / 1e3 + JIFFIES_S  # tcpi_last_ack_recv
        answered = self._stall is not None and heard > self._stall.asked
        if self._stall and not answered and now - self._stall.asked < wait:
            return
        sequence, end = probe_window(self._sock)
        if self._stall and sequence != self._stall.sequence:
            self._end_stall(now)
        stall = self._stall
        if stall is None or not answered:
            self._stall = Stall(sequence, now)
            return
        stall.asked = now
        if stall.passed is None:
            stall.passed = retransmits
            retransmits = self._send_again(retransmits, sequence)
        if stall.failed == math.inf:
            stall.failed = now if retransmits > stall.passed else math.inf
        elif now - stall.failed >= wait:
            self._try_smaller(stall, now, (end - sequence) % 2**32 + IPV4_TCP_HEADERS)

    def _send_again(self, retransmits: int, sequence: int) -> int:
        """Sends the segment again now, which the kernel would do some seconds later. Returns the number of retransmissions then."""
        before = retransmits
        for _ in range(before):
            if retransmits == before:
                report_unreachable(self._sock, ICMP_HOST_UNREACH, sequence)
                retransmits = read_tcp_info(self._sock, "B", 2)
        return retransmits

    def _try_smaller(self, stall: Stall, now: float, size: int) -> None:
        """`size` is that of a packet with all that is on the way: the one that does not arrive is no larger."""
        if size <= PATH_MTUS[-1]:  # so it is lost for another reason
            return
        mtu = min(size, read_tcp_info(self._sock, "I", 60))  # tcpi_pmtu
        smaller = next((size for size in PATH_MTUS if size < mtu), None)
        if smaller is None or smaller == stall.mtu:  # no smaller one helps, or the kernel does not take it
            stall.mtu = None
            self._allow_fragmentation()
        else:
            stall.mtu, stall.failed = smaller, now
            set_path_mtu(self._sock, smaller)

    def _allow_fragmentation(self) -> None:
        self._fragments = True
        self._sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        log.warning("%s does not get what is sent, perhaps large packets vanish on the path: routers may fragment them now", self._peer)


class MtuMonitor:
    """Looks at the PathMtu of each connection again and again, and remembers what was found for the hosts."""

    def __init__(self) -> None:
        self._paths: dict[PathMtu, str] = {}
        self.found: dict[str, int] = {}  # MTUs in bytes, by the IPv4 address of the peer

    @contextmanager
    def watch(self, sock: socket.socket, peer: str, mtu: int | None = None) -> Iterator[None]:
        """Monitors a connection meanwhile, as PathMtu has it. Raises OSError when it has ended."""
        host = sock.getpeername()[0]
        path = PathMtu(sock, peer, mtu)
        self._paths[path] = host
        try:
            self._check(path, host)
            yield
        finally:
            del self._paths[path]

    def run(self) -> NoReturn:
        """Monitors until it is killed."""
        while True:
            gevent.sleep(MTU_CHECK_S)
            for path, host in in_slices(list(self._paths.items())):
                if path in self._paths:
                    self._check(path, host)

    def _check(self, path: PathMtu, host: str) -> None:
        with suppress(OSError):  # the connection has just ended
            if path.check(time.monotonic()) and path.mtu:
                self.found[host] = path.mtu
                if len(self.found) > MTU_HOSTS_MAX:
                    del self.found[next(iter(self.found))]


class CongestionControls(NamedTuple):
    """Names of TCP congestion controls, None for the system's default, and when to use which."""

    real: str | None  # on a real link
    lan: str | None
    kind: str  # of the path: real, lan, or auto, which is found by its round trip


def find_congestion_controls(setting: str, kind: str) -> CongestionControls:
    """Returns what the settings `congestion` and `link` mean on this kernel. Raises ConfigError when the kernel has no such one."""
    name = "bbr" if setting == "auto" else setting
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name.encode())
        except OSError:
            available = read_sysctl("net.ipv4.tcp_available_congestion_control")
            if setting != "auto":
                raise ConfigError(f"congestion = {name}: this kernel has no such congestion control; it has {available}") from None
            warn_standing("bbr", "this kernel has no BBR (`modprobe tcp_bbr`), which makes the tunnel fast over links that lose packets")
            return CongestionControls(None, None, kind)
    return CongestionControls(name, None if setting == "auto" else name, kind)


def choose_congestion_control(sock: socket.socket, controls: CongestionControls) -> bool:
    """Sets the congestion control by the shortest round trip that the kernel has measured. Returns whether the path is a LAN.

    On a real link BBR hides losses from the TCP inside the tunnel. On a LAN BBR's pacing would cost half of the speed.
    """
    rtt_us = read_tcp_info(sock, "I", 148)  # tcpi_min_rtt
    lan = rtt_us < LAN_RTT_US if controls.kind == "auto" else controls.kind == "lan"
    name = controls.lan if lan else controls.real
    if name:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name.encode())
    log.debug("round trip %.1f ms: congestion control %s", rtt_us / 1000, name or "as the system has it")
    return lan


def bound_receive_buffer(sock: socket.socket, bits_per_s: int | None) -> None:
    """Bounds what waits in the receive buffer of a peer that is limited, and with it what waits in its send buffer. Raises OSError.

    TCP needs a round trip's worth of window. The kernel doubles SO_RCVBUF, of which at least half is window, the rest its own costs.
    """
    round_trip_s = read_tcp_info(sock, "I", 68) / 1e6  # tcpi_rtt
    size = read_rate(bits_per_s or math.inf) / 8 * (RECEIVE_S + round_trip_s)
    if size < RECEIVE_MAX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, max(int(size), RECEIVE_MIN))
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)  # the kernel finds the size again
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_MAX)


class WireRate:
    """A rate on the wire that a connection never exceeds, all headers included, as a rate of payload, which the kernel can hold."""

    def __init__(self, sock: socket.socket, bits_per_s: float) -> None:
        self._sock, self._bytes_per_s = sock, bits_per_s / 8
        self._acknowledgements, self._measured_at = 0, -math.inf
        self._acknowledgements_per_s = 0.0

    def payload(self, now: float) -> float:
        """Returns the bytes/s of payload that make the rate together with their headers and what acknowledges the peer's data."""
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256).ljust(256, b"\0")
        mss: int = struct.unpack_from("I", info, 16)[0]  # tcpi_snd_mss
        segments, with_data = struct.unpack_from("I16xI", info, 136)  # tcpi_segs_out, tcpi_data_segs_out
        acknowledgements, elapsed = (segments - with_data) % 2**32, now - self._measured_at
        if elapsed < math.inf:
            per_s = (acknowledgements - self._acknowledgements) % 2**32 / max(elapsed, PACING_UPDATE_S)
            self._acknowledgements_per_s += (per_s - self._acknowledgements_per_s) * min(elapsed / ACKNOWLEDGEMENTS_S, 1.0)
        self._acknowledgements, self._measured_at = acknowledgements, now
        rest = self._bytes_per_s - self._acknowledgements_per_s * SEGMENT_HEADERS
        return max(rest, self._bytes_per_s / 2) * mss / (mss + SEGMENT_HEADERS)


def set_pacing_rate(sock: socket.socket, bytes_per_s: float) -> None:
    """Makes the kernel send no more than so many bytes of payload a second. Raises OSError."""
    size = struct.calcsize("L")
    sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, int(min(bytes_per_s, 2 ** (8 * size) - 2)).to_bytes(size, sys.byteorder))


class PacedWriter:
    """Writes to a connection over a real link no more than the connection sends in UNSENT_S, and what a QueueController permits.

    The unsent bytes in a socket are a queue that nobody manages, as the send queue is managed. TCP_NOTSENT_LOWAT alone would let
    64 KiB more in.

    Under the cap, BBR only carries: it ignores losses. What it has learned would be in the way: it grows by 1.25 in one of eight round
    trips, and every 10 s it stops for 200 ms. Therefore it begins anew as soon as it would do more than start. On a path that
    loses packets, where it would forget how much was in flight before a loss, it does so only before it would stop, or when far less
    arrives than before.
    """

    def __init__(
        self, sock: socket.socket, write: Write, whole: bool, wire_rate: WireRate | None, set_round_trip: Callable[[float], None]
    ) -> None:
        """`write` is that of the connection. `whole`: each write must be passed on uncut. `wire_rate` is not exceeded.

        `set_round_trip` hears of the round trip of the path, in seconds.
        """
        self._sock, self._write, self._whole, self._wire_rate, self._set_round_trip = sock, write, whole, wire_rate, set_round_trip
        self._controller = QueueController()
        self._limit = UNSENT_MIN
        self._unsent = bytearray(4)
        self._update_at = 0.0
        self._full = False
        self._competitor = b""  # the congestion control with which it competes
        self._carrier = b""  # what it has where it does not compete
        self._cap = math.inf

    def __call__(self, data: memoryview) -> int | None:
        """A Write. Raises OSError."""
        now = time.monotonic()
        if now >= self._update_at:
            self._update_at = now + PACING_UPDATE_S
            self._update(now)
        fcntl.ioctl(self._sock.fileno(), SIOCOUTQNSD, self._unsent)
        room = self._limit - int.from_bytes(self._unsent, sys.byteorder)
        if room <= 0:
            self._full = True
            return None
        self._full |= room < len(data)
        return self._write(data if self._whole else data[:room])

    def _update(self, now: float) -> None:
        sock, controller = self._sock, self._controller
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256).ljust(256, b"\0")
        mss, sacked = struct.unpack_from("I8xI", info, 16)
        round_trip, repeated = struct.unpack_from("I28xI", info, 68)
        pacing_rate, _, acknowledged, received = struct.unpack_from("4Q", info, 104)
        shortest, _, segments = struct.unpack_from("3I", info, 148)
        self._set_round_trip(round_trip / 1e6)
        if acknowledged:  # since Linux 4.1
            delivered = acknowledged + sacked * mss
            times = (round_trip / 1e6, shortest / 1e6)
            starting, repairing = self._is_bbr_starting(), info[1] >= TCP_CA_RECOVERY
            controller.update(PathSample(now, delivered, received, *times, self._full, segments, repeated, starting, repairing))
            self._full = False
            self._carry()
        cap = min(controller.cap or math.inf, self._wire_rate.payload(now) if self._wire_rate else math.inf)
        if cap != self._cap:
            self._cap = cap
            set_pacing_rate(sock, cap)
        least = UNSENT_MIN if cap == math.inf else UNSENT_KNOWN_MIN
        self._limit = min(max(int(min(pacing_rate, cap) * UNSENT_S), least), UNSENT_MAX)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, self._limit)

    def _is_bbr_starting(self) -> bool | None:
        """Returns whether BBR is in its state STARTUP, None when there is no BBR."""
        info = self._sock.getsockopt(socket.IPPROTO_TCP, TCP_CC_INFO, 64)
        return BBR_INFO.unpack(info)[3] == BBR_STARTUP_GAIN if len(info) == BBR_INFO.size else None

    def _carry(self) -> None:
        """Sets the congestion control that the controller wants, or begins with it anew."""
        sock, controller = self._sock, self._controller
        if controller.competes and not self._competitor:
            self._carrier = sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16)
        # Reno's slow start does not end when the round trip grows, as CUBIC's does
        competitor = (b"reno" if controller.hurries else b"cubic") if controller.competes else b""
        if competitor != self._competitor or controller.renews:
            self._competitor = competitor
            names = [b"bbr", competitor] if controller.hurries else [competitor] if competitor else [b"reno", self._carrier or b"bbr"]
            for name in names:  # to set the same one again would do nothing; BBR forgets where slow start ended
                with suppress(OSError):  # this kernel does not have it
                    sock.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, name)


def receive_message(stream: Stream) -> tuple[dict[str, Any], bytes]:
    """Returns the peer's handshake message and the first bytes behind it. Raises ProtocolError, EOFError, OSError."""
    parser = MessageParser()
    while True:
        found = parser.feed(stream.receive())
        if found:
            return found


def is_connected(sock: socket.socket) -> bool:
    """Returns whether the peer has not ended the connection yet. May be called in any thread."""
    with suppress(OSError):
        return read_tcp_info(sock, "B", 0) == TCP_ESTABLISHED
    return False


def is_unacknowledged(sock: socket.socket) -> bool:
    """Returns whether the peer's kernel lacks anything that was sent. Raises OSError."""
    unacknowledged = bytearray(4)
    fcntl.ioctl(sock.fileno(), SIOCOUTQ, unacknowledged)
    return any(unacknowledged)


def wait_until_answer_is_read(sock: socket.socket) -> None:
    """Returns when the peer's kernel has what we sent, and its program, which waits for it, has had time to read it.

    A legacy client takes whatever its first recv returns as the answer: by then the first frame must not have arrived.
    """
    while is_unacknowledged(sock):
        gevent.sleep(0.01)
    gevent.sleep(LEGACY_READ_TIME_S)


# ---- pumps -----------------------------------------------------------------------------------------------------------

ICMP_ERRORS_MAX = 10  # ICMPv6 errors of a session in a second, RFC 4443 section 2.4 (f)
BUSY_S = 0.004  # seconds of a round of the event loop in which those are called that move much
LIMITED_READ_BYTES = 64 << 10  # of one read from a peer that is limited
REFUSED_FRAMES_MAX = 8  # frames of one GSO kind in a session that the kernel may refuse before the kind is not offered any more

# One pair of buffers for the process, not for each session: no other greenlet runs while a pump has something in them.
_tun_buffer = memoryview(bytearray(BATCH_BYTES + OFFLOAD_HEADER.size + PACKET_MAX))
_tcp_buffer = bytearray(BATCH_BYTES + OFFLOAD_HEADER.size + PACKET_MAX)


class TokenBucket:
    """Allows so many events in so many seconds; the bucket is full at first."""

    def __init__(self, size: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`size` 0: no limit."""
        self._size, self._seconds, self._clock = size, seconds, clock
        self._tokens, self._updated = float(size), clock()

    def has_token(self) -> bool:
        """Returns whether `take` would return True now."""
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._updated) * self._size / self._seconds, self._size)
        self._updated = now
        return not self._size or self._tokens >= 1

    def take(self) -> bool:
        """Takes a token. Returns False when there is none."""
        there = self.has_token()
        self._tokens -= there
        return there


class Rates(NamedTuple):
    """What a session, or all together, moves a second."""

    received_bits: float = 0.0
    sent_bits: float = 0.0
    received_packets: float = 0.0  # a large packet of offload counts once
    sent_packets: float = 0.0


@dataclass
class TrafficCounters:
    """What a session has moved."""

    sent: int = 0  # bytes of frames, TUN -> TCP; those that the send queue dropped are counted too
    received: int = 0  # bytes of frames, TCP -> TUN
    sent_packets: int = 0  # frames likewise
    received_packets: int = 0
    dropped: int = 0  # packets that the TUN or the peer could not take
    refused: Counter[str] = dataclasses.field(default_factory=Counter)  # those of them that the kernel refused, by GSO kind or "none"
    queue_dropped: int = 0  # packets that waited too long in the send queue
    receive_queue_dropped: int = 0  # those that waited too long in the receive queue, for the limit

    @property
    def all_dropped(self) -> int:
        """Packets that were dropped for any reason."""
        return self.dropped + self.queue_dropped + self.receive_queue_dropped


class ReadinessCallbacks:
    """Calls a function whenever `source` is readable and, while it `wants_write`, `sink` is writable, for the greenlet that runs it.

    With a limit it is also called after a pause, and not when `source` is readable while nothing more may be read.

    The function is called in the hub, so it must not wait for anything. To switch to the greenlet and back for each call would
    cost 0.03 of 0.35 ms of an idle round trip. The watchers stay started; `hub.wait` would start and stop them each time, which
    costs another 0.1 ms.

    The function returns whether it moved much. Those that did take turns, for BUSY_S in each round of the event loop, so that all
    others wait no longer than that, however many move much.
    """

    _busy: ClassVar[deque[ReadinessCallbacks]] = deque()  # those that moved much and are ready again, who waits longest first
    _round, _round_ends = 0.0, 0.0  # of the event loop: what tells it from others, and until when the busy ones are called in it

    def __init__(self, source: int, sink: int | None = None) -> None:
        self._hub = gevent.get_hub()
        self._source = self._hub.loop.io(source, 1)
        self._sink = self._hub.loop.io(source if sink is None else sink, 2)
        self._call: Callable[[], None]
        self._callback: Callable[[], None]
        self._waits = False  # whether it is in `_busy`
        self._greenlet: gevent.Greenlet
        self._timer: Any = None
        self.wants_write, self.wants_read = False, True

    def run(self, callback: Callable[[], bool]) -> NoReturn:
        """Calls the function until it raises something, and raises that."""
        self._greenlet = gevent.getcurrent()
        failed: list[BaseException] = []
        moved_much = False

        def call() -> None:
            nonlocal moved_much
            try:
                moved_much = callback()
            except BaseException as error:  # the greenlet raises it
                self._stop()
                failed.append(error)
                self._greenlet.switch()

        def on_event() -> None:
            if moved_much:
                self._take_turns()
            else:
                call()

        self._call = call
        self._callback = on_event
        self._source.start(on_event)
        try:
            self._hub.switch()
            raise failed.pop()
        finally:
            self._stop()
            for watcher in filter(None, (self._source, self._sink, self._timer)):
                watcher.close()
            del self._call, self._callback, self._greenlet  # no cycle of references, see Session

    def _take_turns(self) -> None:
        """Calls the function of the one that waits longest, if there is time in this round."""
        common, current, now = ReadinessCallbacks, self._hub.loop.now(), time.monotonic()
        if not self._waits:
            self._waits = True
            common._busy.append(self)
        if current != common._round:
            common._round, common._round_ends = current, now + BUSY_S
        if now < common._round_ends:
            first = common._busy.popleft()
            first._waits = False
            first._call()

    def want_write(self, wanted: bool) -> None:
        """Sets whether the function is called when `sink` is writable, too."""
        self.wants_write = wanted
        if wanted:
            self._sink.start(self._callback)
        else:
            self._sink.stop()

    def want_read(self, wanted: bool) -> None:
        """Sets whether the function is called when `source` is readable."""
        if wanted != self.wants_read:
            self.wants_read = wanted
            if wanted:
                self._source.start(self._callback)
            else:
                self._source.stop()

    def call_after(self, seconds: float) -> None:
        """Calls the function once after so many seconds, in place of an earlier call of this kind. It takes no turns, as it comes once."""
        if self._timer:
            self._timer.close()
        self._timer = self._hub.loop.timer(max(seconds, 0.0))
        self._timer.start(self._call, update=True)

    def _stop(self) -> None:
        for watcher in filter(None, (self._source, self._sink, self._timer)):
            watcher.stop()
        if self._waits:
            self._waits = False
            ReadinessCallbacks._busy.remove(self)


def pump_tun_to_tcp(
    tun: Tun, fd: int, send_queue: SendQueue, gso_kinds: frozenset[str] | None, peer_filter: IngressFilter, traffic: TrafficCounters
) -> NoReturn:
    """Sends all that waits in the TUN as one batch, through the send queue of the connection `fd`, again and again.

    `gso_kinds` are those that the peer accepts, None for a legacy peer, `peer_filter` is its ingress filter. Raises KernelError when
    the TUN fails, OSError when the connection does.
    """
    view, frame_max, read = _tun_buffer, OFFLOAD_HEADER.size + PACKET_MAX, tun.file.readinto
    coalesces = gso_kinds is not None and "uso6" in gso_kinds
    callbacks = ReadinessCallbacks(tun.fd, fd)
    most = 1  # reads of the TUN
    errors = TokenBucket(ICMP_ERRORS_MAX, 1)

    def reject(packet: memoryview) -> None:
        # The kernels' own messages to their link, such as multicast listener reports, are dropped without a word.
        error = source_refused(packet, peer_filter.prefix[1]) if peer_filter.from_client else None
        if error:
            traffic.dropped += 1
            if errors.take():
                with suppress(OSError):
                    os.writev(tun.fd, [EMPTY_OFFLOAD_HEADER, error])

    def on_ready() -> bool:
        nonlocal most
        have, room = 0, view
        ends: list[int] = []
        # While something waits, less comes than one flush writes. Otherwise what waits would stay, though the connection takes all.
        enough, reads = (BATCH_BYTES // 2, min(most, BATCH_FRAMES // 2)) if send_queue.blocked else (BATCH_BYTES, most)
        try:
            for _ in range(reads):
                got = read(room)
                if got is None:
                    break
                if not is_sendable(view, have, got, gso_kinds):
                    traffic.dropped += 1
                elif not peer_filter.permits(*unpack_addresses(view, have)):
                    reject(view[have + OFFLOAD_HEADER.size : have + got])
                else:
                    have += got
                    ends.append(have)
                    if have >= enough:
                        break
                room = view[have : have + frame_max]
        except OSError as error:
            raise tun_error(tun.name, error) from None
        found = len(ends)
        if found:
            # Large frames are not coalesced.
            small = coalesces and found > 1 and have < found * COALESCED_BYTES_MAX // 2 and send_queue.takes_large
            send_queue.send(view, coalesce_datagrams(view, ends) if small else ends)
            traffic.sent += have
            traffic.sent_packets += found
        if send_queue.blocked:
            send_queue.flush()
            traffic.queue_dropped = send_queue.dropped
        # Behind a single small packet mostly nothing waits: the next one is sent before the TUN is read again.
        most = 1 if found <= 1 < most and have < QUANTUM else BATCH_FRAMES
        blocked = send_queue.blocked
        if blocked and (pause := send_queue.pause()):
            callbacks.call_after(pause)
            blocked = False
        if blocked != callbacks.wants_write:
            callbacks.want_write(blocked)
        return blocked or have >= BUSY_BYTES or found >= BUSY_FRAMES

    callbacks.run(on_ready)


def pump_tcp_to_tun(
    fd: int,
    read: Read,
    tun: Tun,
    deframer: Deframer,
    trailing: bytes,
    bare: bool,
    traffic: TrafficCounters,
    receive_queue: ReceiveQueue | None = None,
) -> NoReturn:
    """Writes the frames that `read` brings from the connection `fd` into the TUN; `trailing` are the bytes behind the handshake.

    They go through the receive queue while that is active.

    A frame that the kernel refuses is dropped, also while the TUN is down (EIO), which the DeviceMonitor finds and repairs. Raises
    EOFError or OSError when the connection ends, KernelError when the TUN fails,
    OffloadRefused when more than REFUSED_FRAMES_MAX frames of one GSO kind were refused, ProtocolError.
    """

    def write_bare(packet: memoryview) -> int:
        return os.writev(tun.fd, [EMPTY_OFFLOAD_HEADER, packet])

    write: Write = write_bare if bare else tun.file.write
    receive_queue = receive_queue or ReceiveQueue()
    callbacks = ReadinessCallbacks(fd)
    size = BATCH_BYTES  # bytes of one read: fewer from a peer whose frames are small

    def write_all(frames: Sequence[memoryview]) -> None:
        traffic.received_packets += len(frames)
        for frame in frames:
            try:
                if write(frame) is None:
                    traffic.dropped += 1
                traffic.received += len(frame)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EIO):
                    raise tun_error(tun.name, error) from None
                traffic.dropped += 1
                if error.errno == errno.EINVAL:
                    kind = "none" if bare else GSO_KINDS.get(frame[1], "none")
                    traffic.refused[kind] += 1
                    if kind != "none" and traffic.refused[kind] > REFUSED_FRAMES_MAX:
                        raise OffloadRefused(kind) from None

    def on_ready() -> bool:
        nonlocal size
        before = traffic.received
        if receive_queue.active:
            pass_limited()
            return traffic.received - before >= BUSY_BYTES
        frames = deframer.pull(read, size)
        write_all(frames)
        size = BATCH_BYTES if len(frames) < BATCH_FRAMES * size // BATCH_BYTES else BATCH_BYTES // 8
        return traffic.received - before >= BUSY_BYTES or len(frames) >= BUSY_FRAMES

    def pass_limited() -> None:
        now = time.monotonic()
        if receive_queue.may_read(now):
            write_all(receive_queue.push(deframer.pull(read, LIMITED_READ_BYTES), bare, now))
        for _ in range(BATCH_FRAMES):
            frame = receive_queue.pop(now)
            if frame is None:
                break
            write_all([memoryview(frame)[OFFLOAD_HEADER.size if bare else 0 :]])
        traffic.receive_queue_dropped = receive_queue.dropped
        callbacks.want_read(receive_queue.may_read(now))
        pause = receive_queue.pause(now)
        if pause is not None:
            callbacks.call_after(pause)

    write_all(deframer.push(trailing))
    callbacks.run(on_ready)


# ---- session ---------------------------------------------------------------------------------------------------------

HANDSHAKE_S = 10.0  # for the whole handshake
# GSO kinds that a peer is offered at most, by the setting `offload`:
OFFLOADS: dict[str, frozenset[str]] = {"auto": frozenset({"tso6", "uso6"}), "tso6": frozenset({"tso6"}), "no": frozenset()}
PROBE_AFTER_S = 10.0  # * of silence, and between two probes; until one was answered, also without silence
DEAD_PATH_S = 30.0  # * of silence, in which probes were not answered
UNACKNOWLEDGED_S = 32.0  # * of silence of the peer's TCP, which has to acknowledge something
PROBE_FIRST_S = 1.0, 2.0  # * from the begin of a session to its first probe: at random between these
PROBES_TO_BELIEVE, PROBE_AGAIN_S = 3, 0.2  # probes with a long round trip on a path that looked like a LAN; between two of them
PATH_CHECK_S = 1.0  # * between two looks at all sessions
FAR_ADDRESS = IPv6Address("2000::1")  # to which probes go whose hop limit ends at the server
TRIM_INTERVAL_S = 1.0  # between two looks at how much waits
TRIM_MIN = 1 << 20  # bytes that must have waited to make trimming worthwhile
RATE_S, RATES_KEPT = 2.0, 150  # between two looks at what was moved; rates of five minutes are kept
MOVED = ("received", "sent", "received_packets", "sent_packets")  # fields of TrafficCounters


def describe_end(error: BaseException) -> str:
    """Returns why a connection ended, in words for the log."""
    if isinstance(error, EOFError):
        return "the peer closed the connection"
    if isinstance(error, gevent.Timeout):
        return f"no answer within {error.seconds:.0f} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def log_defect(where: str, error: Exception) -> None:
    """Logs an error that nobody expected, which is a defect of tun6: one line, and with -v where it happened."""
    log.error("%s: internal error, please report it: %r", where, error, exc_info=log.isEnabledFor(logging.DEBUG))


def trim_heap() -> None:
    """Returns memory to the system: that of the start, and that of full send queues. Runs until it is killed.

    glibc would keep it: 20 MB after Python has compiled this file as a module, 35 MB after eight queues were full.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries don't need it
    full = True
    while malloc_trim:
        gevent.sleep(TRIM_INTERVAL_S)
        if SHARED_BUFFER.free < SHARED_BUFFER.size - TRIM_MIN:
            full = True
        elif full:
            full = False
            run_in_thread(malloc_trim, 0)


class PeerPath:
    """The path to a peer's program, which may be longer than that to the next TCP, and may be dead while that lives."""

    def __init__(self, device: str, source: IPv6Address, target: IPv6Address, hops: int) -> None:
        """Probes go from `source` (:: for the kernel's choice) to `target` out of this device and are answered after so many hops."""
        self.target, self.hops = target, hops
        self.packet_info = source.packed + struct.pack("i", system_socket.if_nametoindex(device))  # struct in6_pktinfo, linux/ipv6.h
        self.answers = 0  # probes that were answered
        self.round_trip_s = math.inf  # the shortest one
        self.asked = self.heard = time.monotonic()  # when the last probe was sent; when anything came last
        self.received = 0  # bytes until then


UNREACHABLE, TIME_EXCEEDED, ECHO_REQUEST, ECHO_REPLY = 1, 3, 128, 129  # RFC 4443
ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT = 133, 134  # RFC 4861
ECHO_MIN = IPV6_HEADER + 8  # bytes of an echo request without data


def open_icmpv6(*kinds: int) -> socket.socket:
    """Returns a raw socket that receives only ICMPv6 messages of these types. Raises OSError."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    blocked = ((1 << 256) - 1) ^ sum(1 << kind for kind in kinds)
    words = [blocked >> at & 0xFFFF_FFFF for at in range(0, 256, 32)]  # struct icmp6_filter
    sock.setsockopt(socket.IPPROTO_ICMPV6, 1, struct.pack("8I", *words))  # ICMPV6_FILTER, linux/icmpv6.h
    return sock


def send_echo(sock: socket.socket, packet_info: bytes, hops: int, target: IPv6Address, number: int, size: int = ECHO_MIN) -> None:
    """Sends an echo request, if it can be sent at once, with a struct in6_pktinfo and this hop limit. The number comes back in answers.

    `size` is that of the IPv6 packet, in bytes.
    """
    request = struct.pack(">BBHI", ECHO_REQUEST, 0, 0, number) + bytes(size - ECHO_MIN)  # the kernel fills in the checksum
    options = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, packet_info), (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, struct.pack("i", hops))]
    with suppress(OSError):  # no answer comes, as when it is lost
        system_socket.socket.sendmsg(sock._sock, [request], options, socket.MSG_DONTWAIT, (str(target), 0))


def echo_number(message: bytes) -> int | None:
    """Returns the number of the echo request that an ICMPv6 message answers or, as an error, quotes; None when it does neither."""
    echo = message[8 + IPV6_HEADER :] if message[0] in (UNREACHABLE, TIME_EXCEEDED) else message
    if len(echo) < 8 or echo[0] not in (ECHO_REQUEST, ECHO_REPLY):
        return None
    return int.from_bytes(echo[4:8], "big")


class PathMonitor:
    """Finds sessions whose peer is dead although TCP acknowledges, as behind a relay or when the peer's program hangs.

    When nothing has come for PROBE_AFTER_S, it sends an echo request into the tunnel, which the kernel at the other end answers: the
    client's with a reply, the server's, as the hop limit is 1, with Time Exceeded; so does that of the original program. A session
    from which nothing comes for DEAD_PATH_S ends, if a probe was ever answered there. Until then a busy one is asked, too: the
    first probe may be lost.

    A session whose peer's TCP is silent ends after UNACKNOWLEDGED_S. TCP's own patience begins only with the first data that is lost,
    the probe perhaps, and a router's "host unreachable" makes it longer (RFC 6069).
    """

    def __init__(self, dead_after: float) -> None:
        self._scale = dead_after / DEAD_AFTER_S
        self._number = random.getrandbits(32)
        self._sessions: dict[int, tuple[Session, PeerPath]] = {}  # by identifier and sequence number of their probes, as one number
        self._sock: socket.socket | None = None

    @contextmanager
    def watch(self, session: Session, path: PeerPath) -> Iterator[None]:
        """Monitors a session meanwhile."""
        number = self._number = (self._number + 1) % 2**32
        self._sessions[number] = session, path
        first = gevent.spawn_later(random.uniform(*PROBE_FIRST_S) * min(self._scale, 1), self._probe, number, path)
        try:
            yield
        finally:
            first.kill()
            del self._sessions[number]

    def run(self) -> None:
        """Probes and reads the answers until it is killed."""
        try:
            self._sock = open_icmpv6(UNREACHABLE, TIME_EXCEEDED, ECHO_REPLY)
        except OSError as error:
            warn_standing("paths", "dead paths behind relays can't be noticed: %s", error.strerror)
            return
        with self._sock:
            ticks = gevent.spawn(self._check_all)
            try:
                while True:
                    message = self._sock.recv(IPV6_HEADER + 64)
                    with suppress(OSError):  # the session's connection has just ended
                        self._take_answer(message)
            finally:
                ticks.kill()

    def _check_all(self) -> NoReturn:
        while True:
            gevent.sleep(PATH_CHECK_S * min(self._scale, 1))
            for number in in_slices(list(self._sessions)):
                if number in self._sessions:
                    with suppress(OSError):  # its connection has just ended
                        self._check(number, *self._sessions[number])

    def _check(self, number: int, session: Session, path: PeerPath) -> None:
        now = time.monotonic()
        if session.traffic.received != path.received:
            path.received, path.heard = session.traffic.received, now
        elif path.answers and now - path.heard >= DEAD_PATH_S * self._scale:
            session.close(PeerSilent(f"no sign of life for {DEAD_PATH_S * self._scale:.0f} s"))
        elif session.unacknowledged_s() >= UNACKNOWLEDGED_S * self._scale:
            session.close(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        if now - max(path.heard if path.answers else 0, path.asked) >= PROBE_AFTER_S * self._scale:
            self._probe(number, path)

    def _probe(self, number: int, path: PeerPath) -> None:
        path.asked = time.monotonic()
        if self._sock:
            send_echo(self._sock, path.packet_info, path.hops, path.target, number)

    def _take_answer(self, message: bytes) -> None:
        """Notes the answer to a probe: a reply to it, or an error that quotes it."""
        number = echo_number(message)
        if number is not None and number in self._sessions:
            session, path = self._sessions[number]
            if not path.answers:
                log.debug("the path answers to %s", path.target)
            path.answers += 1
            path.round_trip_s = min(path.round_trip_s, time.monotonic() - path.asked)
            if path.round_trip_s > 2 * LAN_RTT_US / 1e6 and session.lan:  # the next TCP is nearer than the peer
                if path.answers < PROBES_TO_BELIEVE:
                    gevent.spawn_later(PROBE_AGAIN_S, self._probe, number, path)
                else:
                    session.use_real_link()


class TrafficMonitor:
    """What all sessions of this process have moved, also those that have ended, and the rates of each and of all."""

    def __init__(self) -> None:
        self._sessions: dict[Session, tuple[float, ...]] = {}  # what they had moved at the last look, as `_moved` returns it
        self._ended: Counter[str] = Counter()
        self._drops_ended: Counter[str] = Counter()
        self.history: deque[Rates] = deque(maxlen=RATES_KEPT)  # of all together, the newest last

    @contextmanager
    def count(self, session: Session) -> Iterator[None]:
        """Counts what this session moves meanwhile."""
        self._sessions[session] = self._moved(session.traffic)
        try:
            yield
        finally:
            del self._sessions[session]
            for name in MOVED:
                self._ended[name] += getattr(session.traffic, name)
            session.drops(self._drops_ended)

    def totals(self) -> dict[str, int]:
        """Returns bytes and packets each way."""
        return {name: self._ended[name] + sum(getattr(each.traffic, name) for each in self._sessions) for name in MOVED}

    def drops(self) -> Counter[str]:
        """Returns packets that were not delivered, by reason."""
        drops = Counter(self._drops_ended)
        for session in self._sessions:
            session.drops(drops)
        return drops

    def run(self) -> NoReturn:
        """Updates the rates until it is killed."""
        before = (time.monotonic(), *self.totals().values())
        while True:
            gevent.sleep(RATE_S)
            for session in in_slices(list(self._sessions)):
                if session in self._sessions:
                    moved = self._moved(session.traffic)
                    session.rates = self._rates(self._sessions[session], moved)
                    self._sessions[session] = moved
            totals = (time.monotonic(), *self.totals().values())
            self.history.append(self._rates(before, totals))
            before = totals

    @staticmethod
    def _moved(traffic: TrafficCounters) -> tuple[float, ...]:
        """Returns the time, and what the fields MOVED say."""
        return (time.monotonic(), *(getattr(traffic, name) for name in MOVED))

    @staticmethod
    def _rates(before: Sequence[float], now: Sequence[float]) -> Rates:
        seconds = max(now[0] - before[0], 0.001)
        return Rates(*((new - old) * unit / seconds for old, new, unit in zip(before[1:], now[1:], (8, 8, 1, 1))))


TRAFFIC = TrafficMonitor()


class Session:
    """A connection after its handshake and a TUN, with a pump each way, from `run` until the first pump ends.

    Whoever made the socket and the TUN closes them afterwards. Nothing that a session owns is part of a cycle of references: its
    memory, with TLS 100 KB, is free at its end, and not only when Python next looks at all objects, after some hundred sessions.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.device: str | None = None  # name of its TUN
        self.prefix: IPv6Network | None = None
        self.refused: Counter[str] = Counter()  # packets that the ingress filter refused, by reason
        self.released = gevent.event.Event()  # set when all that the session owned is released
        self.traffic = TrafficCounters()
        self.rates = Rates()  # kept by TRAFFIC
        self.tls = False  # set by `run`
        self.offload: frozenset[str] | None = None  # GSO kinds that either side takes, None with a legacy peer; set by `run`
        self._sock: socket.socket | None = None
        self.lan = False  # whether the connection was taken for one over a LAN, by its round trip
        self._use_real_link: Callable[[], None] = lambda: None  # set by `run`
        self.limit: int | None = None  # bits/s of IPv6 packets each way, None without a limit
        self._apply_limit: Callable[[int | None], None] = lambda bits_per_s: None  # set by `run`
        self.wire_rate: int | None = None  # bits/s that the connection sends at most, headers included; set before `run`
        self.started = time.monotonic()
        self._end: gevent.event.AsyncResult = gevent.event.AsyncResult()

    @property
    def ending(self) -> bool:
        """Whether it was closed, or a pump has ended it."""
        return bool(self._end.ready())

    def close(self, reason: BaseException) -> None:
        """Makes `run` return, now or as soon as it is called. The first reason counts."""
        if not self._end.ready():
            self._end.set(reason)

    def end(self) -> str:
        """Returns why it ended, in words."""
        return describe_end(self._end.get_nowait()) if self.ending else "internal error"

    def run(
        self,
        stream: Stream,
        tun: Tun,
        ingress_filter: IngressFilter,
        congestion: CongestionControls,
        offered: frozenset[str],
        gso_kinds: frozenset[str] | None,
        trailing: bytes,
    ) -> BaseException:
        """Moves frames until the session ends, and returns the reason.

        `ingress_filter` is for what the peer sends; `offered` are the GSO kinds that it was offered, `gso_kinds` those that it
        accepts, None for a legacy peer; `trailing` are the bytes behind its message.
        """
        bare = gso_kinds is None
        sock = self._sock = stream.sock
        self.refused, self.tls = ingress_filter.refused, stream.encrypt is not None
        self.offload = None if gso_kinds is None else gso_kinds | offered
        lan = choose_congestion_control(sock, congestion)
        wire_rate = WireRate(sock, self.wire_rate) if self.wire_rate else None
        send_queue = SendQueue(stream.write, bare, stream.encrypt, shared=SHARED_BUFFER)
        deframer = Deframer(_tcp_buffer, None if bare else offered, ingress_filter)
        self.lan = lan and congestion.kind == "auto" and not bare

        def pace() -> None:
            send_queue.pace(PacedWriter(sock, stream.write, bare, wire_rate, send_queue.queue.set_round_trip))

        def use_real_link() -> None:
            choose_congestion_control(sock, congestion._replace(kind="real"))
            pace()

        self._use_real_link = use_real_link
        if not lan or wire_rate:
            pace()
        receive_queue = ReceiveQueue(SHARED_BUFFER)

        def apply_limit(bits_per_s: int | None) -> None:
            for limited in (send_queue, receive_queue):
                limited.set_limit(RateLimit(bits_per_s) if bits_per_s else None)
            tun.set_offload(gso_kinds if send_queue.takes_large or bare else frozenset())
            with suppress(OSError):  # the connection has just ended
                bound_receive_buffer(sock, bits_per_s)

        self._apply_limit = apply_limit
        if self.limit:
            apply_limit(self.limit)

        def tun_to_tcp() -> None:
            if bare and ingress_filter.from_client:
                wait_until_answer_is_read(sock)
            pump_tun_to_tcp(tun, sock.fileno(), send_queue, gso_kinds, ingress_filter.reverse(), self.traffic)

        pumps = [
            gevent.spawn(
                self._guard, pump_tcp_to_tun, sock.fileno(), stream.readinto, tun, deframer, trailing, bare, self.traffic, receive_queue
            ),
            gevent.spawn(self._guard, tun_to_tcp),
        ]
        try:
            with TRAFFIC.count(self):
                reason: BaseException = self._end.get()
        finally:
            gevent.killall(pumps)
            self._apply_limit = lambda bits_per_s: None
            send_queue.close()
            receive_queue.close()
        return reason

    def unacknowledged_s(self) -> float:
        """Returns for how many seconds the peer's TCP has been silent, 0 when it has nothing to acknowledge. Raises OSError."""
        if not self._sock or not is_unacknowledged(self._sock):
            return 0.0
        return read_tcp_info(self._sock, "I", 56) / 1e3  # tcpi_last_ack_recv

    def set_limit(self, bits_per_s: int | None) -> None:
        """Limits IPv6 packets each way from now on, also before `run`. None: no limit."""
        if bits_per_s != self.limit:
            self.limit = bits_per_s
            try:
                self._apply_limit(bits_per_s)
            except KernelError as error:  # the TUN has just been removed
                self.close(error)

    def use_real_link(self) -> None:
        """From now on treats the connection as one over a real link, whatever its round trip is."""
        self.lan = False
        self._use_real_link()

    def drops(self, others: Counter[str] | None = None) -> Counter[str]:
        """Returns the packets that were not delivered, by reason, added to those of others."""
        drops, traffic = Counter[str]() if others is None else others, self.traffic
        for reason, count in self.refused.items():
            drops[reason] += count
        if traffic.all_dropped:
            drops["waited too long"] += traffic.queue_dropped + traffic.receive_queue_dropped
            drops["not taken"] += traffic.dropped - sum(traffic.refused.values())
            for kind, count in traffic.refused.items():
                drops[f"kernel refuses {kind}"] += count
        return drops

    def figures(self) -> dict[str, Any]:
        """Returns the state of its connection and what it moves, for `status`; times in seconds."""
        traffic, figures = self.traffic, cast(dict[str, Any], {})
        with suppress(OSError):  # its connection has just ended
            if self._sock:
                name = self._sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16)
                figures = {"round_trip": read_tcp_info(self._sock, "I", 68) / 1e6, "congestion": name.strip(b"\0").decode("ascii")}
        return {
            "seconds": round(time.monotonic() - self.started),
            "received": traffic.received,
            "sent": traffic.sent,
            "received_packets": traffic.received_packets,
            "sent_packets": traffic.sent_packets,
            "dropped": traffic.all_dropped,
            "refused": dict(self.refused),
            "drops": dict(self.drops()),
            "rates": {name: round(value) for name, value in self.rates._asdict().items()},
            "round_trip": None,
            "congestion": None,
            **figures,
            "tls": self.tls,
            "offload": None if self.offload is None else sorted(self.offload),
            "limit": self.limit,
            "rate": self.wire_rate,
        }

    def _guard(self, pump: Callable[..., None], *args: object) -> None:
        try:
            pump(*args)
        except (Tun6Error, EOFError, OSError) as error:
            self.close(error.with_traceback(None))
        except Exception as error:  # a defect of ours ends this session, not the process
            log_defect("session", error)
            self.close(error.with_traceback(None))

    def event_fields(self, reason: BaseException) -> dict[str, object]:
        """Returns the fields of the event that it has ended."""
        traffic, seconds = self.traffic, round(time.monotonic() - self.started)
        moved = {"received": traffic.received, "sent": traffic.sent, "dropped": traffic.all_dropped}
        return {"reason": describe_end(reason), "seconds": seconds, **moved}

    def summary(self) -> str:
        """Returns its age and traffic, for the log."""
        age = time.monotonic() - self.started
        traffic = self.traffic
        refused = "".join(f", {count} refused as {reason}" for reason, count in self.refused.items())
        dropped = traffic.all_dropped
        by_kernel = "".join(f" ({count} as the kernel refused them, offload {kind})" for kind, count in traffic.refused.items())
        return f"after {age:.0f} s, {traffic.received} bytes received, {traffic.sent} sent, {dropped} packets dropped{by_kernel}{refused}"


# ---- hooks -----------------------------------------------------------------------------------------------------------

HOOK_S = 30.0  # for one run
HOOKS_AT_ONCE = 8  # runs at a time, each for another Id
HOOKS_WAITING_MAX = 4096  # events that may wait for their run; at more no session is told of that begins then
HOOKS_END_S = 5.0  # at the end, for all that wait and run
HOOK_POLL_S = 0.05  # between two looks at whether a run is to be killed
HOOK_OUTPUT_MAX, HOOK_LINES_MAX = 16 << 10, 50  # bytes and lines of a run's output that the log gets
HOOK_READ_S = 0.01  # between two reads of the output behind that, so that a run which writes without end takes no CPU of ours
HOOK_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Hooks:
    """Runs the operator's program `hook` for events: in order and one at a time for an Id. Nobody waits for it but `close`."""

    def __init__(self, path: str | None) -> None:
        """Raises ConfigError when it can't be run."""
        self._path = os.path.abspath(path) if path else None
        self._events: dict[str, deque[tuple[str, dict[bytes, bytes]]]] = {}  # that wait or run, by Id: name, environment
        self._waiting = 0  # events in all of them
        self._greenlets = gevent.pool.Group()  # one for each of these Ids
        self._cancelled = False
        if self._path is None:
            return
        if not os.path.isfile(self._path):
            raise ConfigError(f"hook = {path}: there is no such file")
        if not os.access(self._path, os.X_OK):
            raise ConfigError(f"hook = {path}: it is not executable; `chmod +x {path}` makes it so")
        self._threads = gevent.threadpool.ThreadPool(HOOKS_AT_ONCE)  # not the hub's, in which `ip` and the disk would wait for it

    def run(self, event: str, id_: str, required: bool = False, **values: object) -> bool:
        """Runs the hook when its turn has come, with TUN6_PREFIX and so on of these values. Never waits.

        Returns False when too many wait and it is left out. `required`: it is not, as the beginning was not either.
        """
        if self._path is None:
            return True
        if self._waiting >= HOOKS_WAITING_MAX and not required:
            log.warning("hook for %s of %s: left out, and its end too, as %d others wait already", event, quote_id(id_), self._waiting)
            return False
        known = {"event": event, "id": id_, **dict.fromkeys(("prefix", "old_prefix", "device", "peer", "reason"), ""), **values}
        environment = {f"TUN6_{name.upper()}".encode(): to_printable(value).encode() for name, value in known.items()}
        events = self._events.setdefault(id_, deque())
        events.append((event, {b"PATH": HOOK_PATH.encode(), **environment}))
        self._waiting += 1
        if len(events) == 1:
            self._greenlets.spawn(self._run_events, id_, events)
        return True

    def close(self) -> None:
        """Waits for all that were to be run, HOOKS_END_S at most. Then kills those that run, and leaves out the others."""
        if not self._greenlets.join(HOOKS_END_S):
            log.warning("hook: %d runs did not end within %.0f s and are killed or left out", self._waiting, HOOKS_END_S)
            self._cancelled = True
            self._greenlets.join(1)
        if self._path:
            with gevent.Timeout(1, False):
                self._threads.kill()

    def _run_events(self, id_: str, events: deque[tuple[str, dict[bytes, bytes]]]) -> None:
        while events:
            event, environment = events[0]
            where = f"hook for {event} of {quote_id(id_)}"
            try:
                failure, output = self._threads.apply(self._run_program, (environment,))
                lines = output[:HOOK_OUTPUT_MAX].decode(errors="replace").splitlines()
                for line in lines[:HOOK_LINES_MAX]:
                    log.info("%s: %s", where, to_printable(line.expandtabs()))
                if len(output) > HOOK_OUTPUT_MAX or len(lines) > HOOK_LINES_MAX:
                    log.info("%s: ..., the rest of its output is left out", where)
                if failure and not self._cancelled:
                    log.warning("%s: it %s", where, failure)
            except Exception as error:  # a defect of ours ends this run only
                log_defect(where, error)
            events.popleft()
            self._waiting -= 1
        del self._events[id_]

    def _run_program(self, environment: dict[bytes, bytes]) -> tuple[str, bytes]:
        """Runs the hook, in a thread. Returns what went wrong, "" for nothing, and the begin of its output."""
        if self._cancelled:
            return "", b""
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what the hook starts has no signals blocked
        pipe, null, path = subprocess.PIPE, subprocess.DEVNULL, cast(str, self._path)
        try:
            options: dict[str, Any] = {"env": environment, "cwd": "/", "start_new_session": True}
            process = subprocess.Popen([path], stdin=null, stdout=pipe, stderr=subprocess.STDOUT, bufsize=0, **options)
        except OSError as error:
            hints = {errno.ENOEXEC: "; its first line must be like #!/bin/sh", errno.ENOENT: "; its first line names a missing program"}
            return f"can't be run: {error.strerror}{hints.get(error.errno or 0, '')}", b""
        assert process.stdout
        output, deadline, is_open = bytearray(), time.monotonic() + HOOK_S, True
        with process.stdout as source:  # not read to its end: what the hook leaves running may keep it open
            os.set_blocking(source.fileno(), False)
            readable = select.poll()
            readable.register(source.fileno(), select.POLLIN)
            while process.poll() is None and time.monotonic() < deadline and not self._cancelled:
                if len(output) > HOOK_OUTPUT_MAX:
                    time.sleep(HOOK_READ_S)
                if not is_open:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(HOOK_POLL_S)
                elif readable.poll(HOOK_POLL_S * 1000):
                    data = source.read(1 << 16) or b""
                    is_open = bool(data)
                    output += data[: HOOK_OUTPUT_MAX + 1 - len(output)]
            killed = process.returncode is None
            if killed:
                os.killpg(process.pid, signal.SIGKILL)
            output += (source.read(1 << 16) or b"")[: HOOK_OUTPUT_MAX + 1 - len(output)]
        if killed:
            with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
                process.wait(1)
            return f"did not end within {HOOK_S:.0f} s and was killed", bytes(output)
        status = process.returncode
        how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
        return how if status else "", bytes(output)


# ---- neighbour proxy -------------------------------------------------------------------------------------------------

NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT, ICMPV6 = 135, 136, 58  # RFC 4861 sections 4.3 and 4.4, RFC 4443
ROUTER_FLAG, SOLICITED_FLAG = 0x80, 0x40  # RFC 4861 section 4.4; a proxy does not set the flag override, section 7.2.8
SOLICITATION_MAX = 1280  # bytes of one with its options
SOLICITATIONS_AT_ONCE, SOLICITATIONS_PAUSE_S = 32, 0.01  # are handled, then this pause: 3,200 a second, the kernel drops the others
ADVERTISEMENTS_MAX, ADVERTISEMENTS_OF_PREFIX_MAX = 1000, 100  # in a second: of all, of one prefix
OWN_ADDRESSES_S = 1.0  # between two looks at the addresses of this machine
UPLINK_RETRY_S = 2.0  # between two attempts to open the interface
ALL_NODES, ALL_NODES_MAC = IPv6Address("ff02::1"), bytes.fromhex("333300000001")  # RFC 4291 section 2.7.1, RFC 2464 section 7
SOLICITED_NODES, LINK_LOCAL = IPv6Network("ff02::1:ff00:0/104"), IPv6Network("fe80::/10")  # RFC 4291 sections 2.7.1 and 2.5.6


SOL_PACKET, ADD_MEMBERSHIP, ALLMULTI = 263, 1, 2  # linux/socket.h, linux/if_packet.h
ETH_P_IPV6, PACKET_HOST, PACKET_OTHERHOST, PACKET_OUTGOING = 0x86DD, 0, 3, 4  # linux/if_ether.h, linux/if_packet.h


def prefix_fields(network: IPv6Network, at: int) -> list[tuple[int, int, int, int]]:
    """Returns the fields for filter_program of an address at this offset that is in a network, /64 or shorter."""
    mask, base = int(network.netmask) >> 64, int(network.network_address) >> 64
    return [(LOAD_WORD, at + 4 * word, mask >> shift & 0xFFFF_FFFF, base >> shift & 0xFFFF_FFFF) for word, shift in ((0, 32), (1, 0))]


def solicitation_fields(network: IPv6Network) -> list[tuple[int, int, int, int]]:
    """Returns those of a neighbour solicitation for an address of the network."""
    kinds = [(LOAD_BYTE, 6, 0xFF, ICMPV6), (LOAD_BYTE, 7, 0xFF, 255), (LOAD_BYTE, 40, 0xFF, NEIGHBOUR_SOLICITATION)]
    return [*kinds, *prefix_fields(network, 48)]


def hear_all_multicast(sock: socket.socket, interface: str) -> None:
    """Solicitations go to a multicast address for each 24 bits of targets: the socket hears all of them, until it ends. Raises OSError."""
    membership = struct.pack("iHH8x", system_socket.if_nametoindex(interface), ALLMULTI, 0)
    sock.setsockopt(SOL_PACKET, ADD_MEMBERSHIP, membership)


class Solicitation(NamedTuple):
    """Somebody on the link asks who has an address."""

    source: IPv6Address  # ::  when it wants to have the address itself, RFC 4862 section 5.4
    target: IPv6Address


def _sum(packet: bytes) -> int:
    """Returns the sum, modulo 0xFFFF, over an ICMPv6 packet and its pseudo header: 0 when its checksum is right."""
    return (sum_words(packet[8:]) + len(packet) - IPV6_HEADER + ICMPV6) % 0xFFFF


def parse_solicitation(packet: bytes) -> Solicitation | None:
    """Returns the neighbour solicitation in an IPv6 packet, None when it is none, or not a valid one (RFC 4861 section 7.1.1).

    One with extension headers, which nobody sends, is none.
    """
    if len(packet) < IPV6_HEADER + 24 or packet[0] >> 4 != 6 or packet[6:8] != bytes([ICMPV6, 255]):
        return None
    length = int.from_bytes(packet[4:6], "big")
    packet = packet[: IPV6_HEADER + length]  # behind it may be padding
    if not 24 <= length == len(packet) - IPV6_HEADER or packet[40:42] != bytes([NEIGHBOUR_SOLICITATION, 0]) or _sum(packet):
        return None
    source, destination, target = (IPv6Address(packet[at : at + 16]) for at in (8, 24, 48))
    at, kinds = IPV6_HEADER + 24, set()
    while at < len(packet):
        size = packet[at + 1] * 8 if at + 1 < len(packet) else 0
        if not size or at + size > len(packet):
            return None
        kinds.add(packet[at])
        at += size
    if source.is_unspecified and (destination not in SOLICITED_NODES or 1 in kinds):  # 1: source link-layer address
        return None
    return None if source.is_multicast or target.is_multicast else Solicitation(source, target)


def encode_advertisement(solicitation: Solicitation, source: IPv6Address, mac: bytes) -> bytes:
    """Returns the packet that answers: the target is at this MAC address. To one who wants to have the address, all nodes hear it."""
    for_all = solicitation.source.is_unspecified
    flags = ROUTER_FLAG if for_all else ROUTER_FLAG | SOLICITED_FLAG
    message = struct.pack(">BBHB3x16sBB6s", NEIGHBOUR_ADVERTISEMENT, 0, 0, flags, solicitation.target.packed, 2, 1, mac)
    destination = ALL_NODES if for_all else solicitation.source
    packet = struct.pack(">IHBB16s16s", 6 << 28, len(message), ICMPV6, 255, source.packed, destination.packed) + message
    return packet[:42] + (0xFFFF - _sum(packet)).to_bytes(2, "big") + packet[44:]


class NeighbourProxy:
    """Answers neighbour solicitations on an interface for all addresses of the prefixes that were added.

    So a range works that the provider does not route here, but looks for on the link. The kernel's proxy_ndp knows single addresses.
    """

    SIOCGIFHWADDR, ARPHRD_ETHER = 0x8927, 1  # linux/sockios.h, linux/if_arp.h

    def __init__(self, interface: str, pool: IPv6Network) -> None:
        """Raises ConfigError for an interface that can't have neighbours."""
        self._interface, self._pool = interface, pool
        self._prefixes: dict[int, TokenBucket] = {}  # by the first 64 bits
        self._all = TokenBucket(ADVERTISEMENTS_MAX, 1)
        self._own: set[IPv6Address] = set()  # addresses of this machine, for which the kernel answers
        self._on_link: list[IPv6Network] = []  # its networks that are as long as a prefix or longer, where others answer
        self._source: IPv6Address | None = None  # the link-local address of the interface
        self._looked = -math.inf  # time of the last look at these
        try:
            with system_socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                ifreq = fcntl.ioctl(sock, self.SIOCGIFHWADDR, struct.pack("16s24x", interface.encode()))
        except OSError as error:
            raise ConfigError(f"ndp = {interface}: {error.strerror}; `ip link` shows which interfaces there are") from None
        if struct.unpack_from("H", ifreq, 16)[0] != self.ARPHRD_ETHER:
            raise ConfigError(f"ndp = {interface}: it is not like Ethernet, so nobody looks for neighbours there; leave ndp out")

    def add(self, prefix: IPv6Network) -> None:
        """From now on answers for this /64."""
        self._prefixes[int(prefix.network_address) >> 64] = TokenBucket(ADVERTISEMENTS_OF_PREFIX_MAX, 1)

    def remove(self, prefix: IPv6Network) -> None:
        """Ends that."""
        del self._prefixes[int(prefix.network_address) >> 64]

    def run(self) -> NoReturn:
        """Answers until it is killed, also when the interface has been away."""
        lost = False
        while True:
            try:
                with self._open() as sock:
                    log.info("neighbours on %s are told that the clients' addresses are here", self._interface)
                    lost = False
                    while True:
                        for _ in range(SOLICITATIONS_AT_ONCE):
                            self._handle(sock, *sock.recvfrom(SOLICITATION_MAX))
                        gevent.sleep(SOLICITATIONS_PAUSE_S)
            except OSError as error:
                if not lost:
                    log.warning("ndp = %s: %s; nobody there can reach clients until that changes", self._interface, error.strerror)
                lost = True
            gevent.sleep(UPLINK_RETRY_S)

    def _open(self) -> socket.socket:
        with ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
            # solicitations for others cost no time of ours, however many there are
            attach_filter(sock, filter_program(solicitation_fields(self._pool)))
            sock.bind((self._interface, ETH_P_IPV6))
            hear_all_multicast(sock, self._interface)
            down = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if down:
                raise OSError(down, os.strerror(down))
            undo.pop_all()
            return sock

    def _handle(self, sock: socket.socket, packet: bytes, sender: tuple[str, int, int, int, bytes]) -> None:
        solicitation = parse_solicitation(packet) if sender[2] != PACKET_OTHERHOST else None
        if solicitation and self._answers_for(solicitation.target) and self._source:
            answer = encode_advertisement(solicitation, self._source, sock.getsockname()[4])
            mac = ALL_NODES_MAC if solicitation.source.is_unspecified else sender[4]
            with suppress(OSError):  # it is asked again
                target = self._interface, ETH_P_IPV6, 0, 0, mac
                system_socket.socket.sendto(sock._sock, answer, socket.MSG_DONTWAIT, target)

    def _answers_for(self, target: IPv6Address) -> bool:
        bucket = self._prefixes.get(int(target) >> 64)
        if not bucket:
            return False
        if time.monotonic() - self._looked >= OWN_ADDRESSES_S:
            self._looked = time.monotonic()
            addresses = parse_addresses(read_text(IF_INET6))
            self._own = {address for _, address, _ in addresses}
            self._on_link = [IPv6Network((address, length), False) for _, address, length in addresses if 64 <= length < 128]
            of_interface = [address for name, address, _ in addresses if name == self._interface]
            self._source = next((address for address in of_interface if address in LINK_LOCAL), None)
        elsewhere = target in self._own or any(target in network for network in self._on_link)
        return not elsewhere and bucket.take() and self._all.take()


# ---- service manager -------------------------------------------------------------------------------------------------

STATUS_S = 1.0  # between two looks at whether the status has changed


class ServiceManager:
    """Tells systemd how this program is, by the protocol of sd_notify(3). Does nothing where nobody has asked for that."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Opens the socket now, as there may be no descriptor later, and systemd ends whom it does not hear."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = system_socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog_s = int(environment.get("WATCHDOG_USEC", "0")) / 1e6 if ours else 0.0

    def notify(self, *lines: str) -> None:
        """Sends these, such as READY=1. Never waits, never fails."""
        if self._socket:
            with suppress(OSError):
                self._socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Says that configuration is read anew meanwhile, so that `systemctl reload` waits for the end."""
        self.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self.notify("READY=1")

    def run(self, status: Callable[[], str]) -> None:
        """Until it is killed, feeds the watchdog from the event loop and says what `status` returns whenever that is another line."""
        said, pause, fed = "", min(STATUS_S, self._watchdog_s / 2 or STATUS_S), -math.inf
        while self._socket:
            if self._watchdog_s and time.monotonic() - fed >= self._watchdog_s / 2 - pause:
                self.notify("WATCHDOG=1")
                fed = time.monotonic()
            now = status()
            if now != said:
                self.notify(f"STATUS={now}")
                said = now
            gevent.sleep(pause)


service_manager = ServiceManager(os.environ)


# ---- cluster store ---------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 1
SCHEMA = """
create table pool (
    one bool primary key default true check (one),
    id uuid not null default gen_random_uuid(),  -- tells it from another one when a server starts from its cache
    version int not null,  -- of this schema
    prefix cidr not null,
    keys text not null check (keys in ('none', 'optional', 'required')),
    next bigint not null default 0,  -- number of the /64 from which on a free one is looked for
    timeline text not null  -- of PostgreSQL, on which nothing was lost
);
create table server (
    name text primary key,
    address text not null,
    number int not null unique,  -- of its own /64, from the end of the pool
    heartbeat timestamptz not null,
    timeline text not null  -- on which it has written back what it knows
);
create table client (
    id text collate "C" primary key,
    prefix cidr not null unique,
    key text,
    revoked bool not null default false,
    version bigint not null default 1,
    former cidr[] not null default '{}',  -- which only `pin` gives again
    moved timestamptz,
    rate bigint,  -- bits a second, each way; 0: without a limit; null: as `limit` of the server says that has the session
    epoch bigint not null default 0,
    server text,
    live bool not null default false,
    since timestamptz,
    last timestamptz,
    received bigint not null default 0,
    sent bigint not null default 0,
    takeovers float8[] not null default '{}',
    created timestamptz not null default clock_timestamp(),
    counted bool not null default false,
    exclude using gist (prefix inet_ops with &&)
);
create index on client (created) where counted;
create index on client using gin (former) where former <> '{}';
"""
UPGRADES: dict[int, str] = {}  # by version: what makes the next one of it
COMMIT_S = 2.0  # for a transaction with its COMMIT; without it by then, the store counts as down
DATABASE_CONNECT_S = 10.0  # for connections to one of the hosts, and for reading all
BATCH_MAX = 100  # changes in one transaction
THREADS_MAX = 8  # one listens, one works; the others connect, or close what hangs
POLL_S = 2.0  # between two looks at the rows of the sessions here, beside what is notified
DATABASE_RETRY_S = 0.5  # between two attempts to reach a store that is down
HEARTBEAT_S = 5.0  # between two heartbeats of a server
CACHE_S, CACHE_PAUSE_S = 5.0, 1.0  # between two saves of the cache: at most, at least
LAST_SAVE_S = 10.0  # for that of a server that ends
SILENT_S = 86_400  # a server without a heartbeat for so long is not waited for
SERVERS_MAX = 64  # /64s at the end of the pool that are the servers' own, at most a quarter of it
HEARD_S = 10.0  # a server with a heartbeat so long after a change has heard of it
ATTEMPTS_MAX = 5  # of a transaction that a deadlock or a concurrent one ended
CHANNEL = "tun6"
DATABASE_OPTIONS = {
    "target_session_attrs": "read-write",  # of several hosts, the primary
    "tcp_user_timeout": "4000",  # milliseconds
    "keepalives_idle": "2",
    "keepalives_interval": "1",
    "keepalives_count": "3",
    "connect_timeout": "2",  # seconds, for each host
}
# What the other side does when it hears nothing of us any more; how long it waits for locks. None of them bounds a COMMIT.
DATABASE_SETTINGS = {
    "tcp_user_timeout": "4000",
    "tcp_keepalives_idle": "2",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "3",
    "statement_timeout": f"{COMMIT_S:.0f}s",
    "idle_in_transaction_session_timeout": f"{500 * COMMIT_S:.0f}ms",  # of a server that stands still, its locks would stop all others
    "search_path": "public",
}
TIMELINE = (
    "substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)"  # pg_control_checkpoint() has the old one for a while after a failover
)
ROW = (
    "id, prefix, key, revoked, rate, version, former, extract(epoch from moved)::float8, epoch, server, live,"
    " extract(epoch from since)::float8, extract(epoch from last)::float8, received, sent, takeovers"
)
WRITE_ROW = """
insert into client
    (id, prefix, key, revoked, rate, version, former, moved, epoch, server, live, since, last, received, sent, takeovers, counted)
values (%(id)s, %(prefix)s, %(key)s, %(revoked)s, %(limit)s, %(version)s, %(former)s::cidr[], to_timestamp(%(moved)s), %(epoch)s,
        %(server)s, %(live)s, to_timestamp(%(since)s), to_timestamp(%(last)s), %(received)s, %(sent)s, %(takeovers)s::float8[], %(counted)s)
on conflict (id) do update
set (prefix, key, revoked, rate, version, former, moved, epoch, server, live, since, last, received, sent, takeovers)
    = (excluded.prefix, excluded.key, excluded.revoked, excluded.rate, excluded.version, excluded.former, excluded.moved, excluded.epoch,
       excluded.server, excluded.live, excluded.since, excluded.last, excluded.received, excluded.sent, excluded.takeovers)
"""


def require_psycopg() -> Any:
    """Returns the module psycopg. Raises ConfigError when it is missing."""
    try:
        import psycopg
    except ImportError as missing:
        raise ConfigError(
            f"store needs the Python package psycopg for {sys.executable}: {missing};"
            f" install it with: {sys.executable} -m pip install 'psycopg[binary]'"
        ) from None
    return psycopg


def public_url(url: str) -> str:
    """Returns the address of a store without user and password, for messages."""
    return re.sub(r"(?<=://)[^/@]*@|\b(user|password)=[^&\s]*[&\s]?", "", url)


def pool_end(pool: IPv6Network) -> int:
    """Returns the number of /64s that clients get; those behind them are the servers' own."""
    size = 1 << (64 - pool.prefixlen)
    return size - min(SERVERS_MAX, size // 4)


def check_prefix(prefix: IPv6Network, pool: IPv6Network) -> None:
    """Raises ValueError unless this is a /64 of the pool that clients may have."""
    if prefix.prefixlen != 64:
        raise ValueError(f"{prefix} is not a /64")
    if not prefix.subnet_of(pool):
        raise ValueError(f"{prefix} is outside {pool}")
    if (int(prefix.network_address) - int(pool.network_address)) >> 64 >= pool_end(pool):
        raise ValueError(f"{prefix} is kept for the servers themselves")


class StoreDown(StorageError):
    """The cluster's store can't be reached, or does not answer in time."""


def shorten_failure(text: str) -> str:
    """Returns in one line what libpq says, of a connection to several hosts once for each, without its advice."""
    line = " ".join(text.split())
    advice, end = r"(?: Is the server running[^?]*\?)?", r"(?= Multiple connection| - host:|$)"
    failed = rf'to server at "([^"]+)"(?: \([^)]*\))?, port \d+ failed: (.+?){advice}{end}'
    hosts = dict(re.findall(failed, line))
    return ", ".join(f"{host}: {reason}" for host, reason in hosts.items()) or line


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Makes one sentence of what psycopg raises: StoreDown."""
    try:
        yield
    except require_psycopg().Error as error:
        raise StoreDown(f"{public_url(url)}: {shorten_failure(str(error))}") from None


class PoolRow(NamedTuple):
    """What holds for the whole cluster."""

    id: uuid.UUID
    version: int  # of the schema
    prefix: IPv6Network
    keys: str  # whether clients have keys: "none", "optional" (those that have none are served) or "required"
    next: int
    timeline: str  # the one on which nothing was lost
    current: str  # the one of the database as it is


class Batch:
    """Changes that are made in one transaction, and how far that came. One thread makes them while the event loop waits."""

    def __init__(self, changes: Sequence[Change], known: Mapping[str, Row]) -> None:
        self.changes = changes
        self.locks_pool = any(isinstance(change, Pin) or change.id not in known for change in changes)
        self.results: list[Row | Exception] = []  # of each change; they hold only when the transaction was committed
        self._lock = threading.Lock()
        self._given_up = False
        self._committing = False  # whether COMMIT was sent

    def begin_commit(self) -> bool:
        """Says in the thread that COMMIT comes next. Returns False when nobody waits any more: it must be rolled back."""
        with self._lock:
            self._committing = not self._given_up
            return self._committing

    def begin_again(self) -> None:
        """Says in the thread that it was rolled back."""
        self._committing = False

    def give_up(self) -> bool:
        """Says that nobody waits any more. Returns whether it was committed, or may have been, or may still be."""
        with self._lock:
            self._given_up = True
            return self._committing


class Database:
    """Two connections to the cluster's PostgreSQL: one that listens, and one that works. Methods block: they are called in threads.

    They raise psycopg.Error when the database can't be reached, or refuses. Then all is over: it is closed, never mended.
    """

    def __init__(self, url: str, application: str) -> None:
        """`application` names this process among the database's connections, so that it finds there what it has left."""
        self._psycopg = require_psycopg()
        self._url, self._application = url, application
        self._connections: list[Any] = []
        self._closed = False
        self._notified: set[str] = set()  # Ids
        self._warned = False  # whether the database sent a warning
        self._has_lost = False  # whether it lacks what was known

    def open(self, known: Sequence[Row]) -> tuple[PoolRow, list[Row], float]:
        """Connects. Returns the pool, all rows as they are after LISTEN has begun, and the database's clock. Raises ConfigError, too.

        `known` are rows that it had before.
        """
        self.connect()
        self._listener = self._connect()
        self._listener.add_notify_handler(lambda notification: self._notified.add(notification.payload))
        self._listener.execute(f"listen {CHANNEL}")
        self._listener.execute("set synchronous_commit = off")  # for heartbeats
        pool = self.require_pool()
        rows: list[Row] = []
        cursor = self._worker.execute(f"select {ROW} from client")
        while some := cursor.fetchmany(100):  # few at a time, so that the event loop has its turns
            rows += map(self._row, some)
        self._has_lost = any(lost_rows(known, {row.id: row for row in rows}))
        return pool, rows, self._clock(self._worker)

    def connect(self) -> None:
        """Connects for work only."""
        self._worker = self._connect()
        self._worker.add_notice_handler(self._note)

    def require_pool(self, lock: str = "") -> PoolRow:
        """Returns the pool; `lock` is "" or "for update". Raises ConfigError when there are no tables yet."""
        if not self.has_pool():
            raise ConfigError(f"{public_url(self._url)} has no pool yet; `tun6.py cluster init` makes one")
        return self._pool(self._worker, lock)

    def has_pool(self) -> bool:
        """Returns whether there are tables."""
        return bool(self._worker.execute("select to_regclass('pool') is not null").fetchone()[0])

    def _connect(self) -> Any:
        try:
            connection = self._psycopg.connect(self._url, autocommit=True, application_name=self._application, **DATABASE_OPTIONS)
        except self._psycopg.ProgrammingError as error:
            raise ConfigError(
                f"store = {public_url(self._url)}: {' '.join(str(error).split())}; write postgresql://host/database"
            ) from None
        self._connections.append(connection)
        for name, value in DATABASE_SETTINGS.items():
            connection.execute("select set_config(%s, %s, false)", (name, value))
        if self._closed:
            self.close()
        return connection

    def close(self) -> None:
        """Ends what goes on in other threads, then closes the connections."""
        self._closed = True
        for connection in self._connections:
            with suppress(self._psycopg.Error, OSError), system_socket.socket(fileno=os.dup(connection.fileno())) as sock:
                if connection.info.transaction_status == self._psycopg.pq.TransactionStatus.ACTIVE:
                    connection.cancel_safe(timeout=1.0)  # a COMMIT that hangs, as the standby is gone, would keep its locks
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        for connection in self._connections:
            with connection.lock:
                connection.close()

    def _note(self, notice: Any) -> None:
        self._warned = self._warned or notice.severity_nonlocalized == "WARNING"

    @staticmethod
    def _row(columns: tuple[Any, ...]) -> Row:
        row = Row._make(columns)
        return row._replace(former=tuple(row.former), takeovers=tuple(row.takeovers))

    @staticmethod
    def _pool(connection: Any, lock: str = "") -> PoolRow:
        return PoolRow(*connection.execute(f"select id, version, prefix, keys, next, timeline, {TIMELINE} from pool {lock}").fetchone())

    @staticmethod
    def _clock(connection: Any) -> float:
        return float(connection.execute("select extract(epoch from clock_timestamp())::float8").fetchone()[0])

    def enter(self, name: str, address: str, known: Sequence[Row]) -> tuple[int, str, list[Row]]:
        """Enters this server among the others, and writes back what it knows of commits that the database has lost.

        Returns its number, the timeline, and the rows that could not be written back as their /64 is another's by now.
        """
        worker, taken = self._worker, cast(list[Row], [])
        worker.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s and pid <> all(%s)",
            (self._application, [connection.info.backend_pid for connection in self._connections]),
        )
        for _ in range(10):
            if self._listener.execute("select pg_try_advisory_lock(hashtext(%s))", (f"tun6 {name}",)).fetchone()[0]:
                break
            time.sleep(0.1)
        else:
            raise StoreDown(
                f"another server is named {name}, or the last connection of this one is not over yet; each needs a `name` of its own"
            )
        with worker.transaction():
            pool = self._pool(worker, "for update")
            found = worker.execute("select number, timeline from server where name = %s", (name,)).fetchone()
            number, timeline = found or (None, None)
            if number is None:
                used = {number for (number,) in worker.execute("select number from server")}
                number = next(number for number in itertools.count() if number not in used)
            if timeline != pool.current or self._has_lost:
                taken = self._write_back(pool, known)
            worker.execute(
                "insert into server (name, address, number, heartbeat, timeline) values (%s, %s, %s, clock_timestamp(), %s)"
                " on conflict (name) do update"
                " set (address, heartbeat, timeline) = (excluded.address, excluded.heartbeat, excluded.timeline)",
                (name, address, number, pool.current),
            )
            self._accept(worker, pool)
        return number, pool.current, taken

    def _write_back(self, pool: PoolRow, known: Sequence[Row]) -> list[Row]:
        stored = {row.id: row for row in map(self._row, self._worker.execute(f"select {ROW} from client order by id for update"))}
        back, taken = lost_rows(known, stored)
        self._write(back)
        for row in back:
            log.warning("the store had lost what it knew of %s; it is written back", quote_id(row.id))
        return taken

    def _accept(self, connection: Any, pool: PoolRow, anyway: bool = False) -> bool:
        """Lets new Ids begin again after lost commits, when every server has written back what it knows."""
        if pool.timeline == pool.current:
            return True
        missing = "select 1 from server where timeline <> %s and heartbeat > clock_timestamp() - make_interval(secs => %s)"
        if not anyway and connection.execute(missing, (pool.current, SILENT_S)).fetchone():
            return False
        connection.execute("update pool set timeline = %s", (pool.current,))
        return True

    def listen(self, ids: Sequence[str]) -> list[Row]:
        """Waits for notifications, at most POLL_S unless there are `ids`, and returns the rows of all these Ids."""
        readable = select.poll()  # its descriptor may be above 1,023, which select() does not take
        readable.register(self._listener.fileno(), select.POLLIN)
        readable.poll(0 if ids or self._notified else 1000 * POLL_S)
        self._listener.execute("select")  # takes in what has come
        wanted, self._notified = self._notified.union(ids), set()
        return [self._row(each) for each in self._listener.execute(f"select {ROW} from client where id = any(%s)", (list(wanted),))]

    def beat(self, name: str) -> tuple[float, str, list[tuple[str, str, float]]]:
        """Says that this server runs. Returns the database's clock and timeline, and name, address and last heartbeat of all servers."""
        listener = self._listener  # no lock on the pool: a connection sees one timeline only, so all who accept it write the same
        listener.execute("update server set heartbeat = clock_timestamp() where name = %s", (name,))
        pool = self._pool(listener)
        with listener.transaction():
            self._accept(listener, pool)
        servers = listener.execute("select name, address, extract(epoch from heartbeat)::float8 from server order by name").fetchall()
        return self._clock(listener), pool.current, servers

    def change(self, batch: Batch, new_ids_per_hour: int = 0) -> None:
        """Makes the changes of the batch in one transaction, and sets their results: a refused one does nothing, and fails alone."""
        errors = self._psycopg.errors
        for attempt in range(ATTEMPTS_MAX):
            self._warned = False
            try:
                with self._worker.transaction():
                    batch.results = self._decide(batch, new_ids_per_hour)
                    if not batch.begin_commit():
                        raise self._psycopg.Rollback
                break
            except errors.IntegrityError as error:  # no rule allows it, so there is a defect
                batch.results = [StorageError(f"the store refuses it: {' '.join(str(error).split())}") for _ in batch.changes]
                break
            except (errors.DeadlockDetected, errors.SerializationFailure):
                if attempt == ATTEMPTS_MAX - 1:
                    raise
                batch.begin_again()
        if self._warned:
            raise self._psycopg.OperationalError("the database does not vouch for what it has committed")

    def _decide(self, batch: Batch, new_ids_per_hour: int) -> list[Row | Exception]:
        pool = (
            self._pool(self._worker, "for update") if batch.locks_pool else None
        )  # always before the rows, so that no two wait for each other
        ids = [change.id for change in batch.changes]
        locked = self._worker.execute(f"select {ROW} from client where id = any(%s) order by id for update", (ids,))
        rows = {row.id: row for row in map(self._row, locked)}
        if not pool and not rows.keys() >= set(ids):
            batch.locks_pool = True
            raise self._psycopg.errors.SerializationFailure("the database has lost an Id that is known here")
        now, free = self._clock(self._worker), self._free_prefixes(pool)
        results: list[Row | Exception] = []
        changed: dict[str, Row] = {}
        counted: set[str] = set()  # new Ids that count for new_ids_per_hour
        for change in batch.changes:
            row = rows.get(change.id)
            try:
                if isinstance(change, Pin) and not (row and row.prefix == change.prefix):
                    change = self._check_pin(change, pool)
                decided = change.decide(row or change.create(now), now)
                if row is None and isinstance(change, SessionBegin) and change.claim.counted:
                    self._count_new(len(counted), new_ids_per_hour)
                    counted.add(change.id)
                if decided.prefix == UNASSIGNED:  # only here, so that who is refused or leaves takes none
                    decided = decided._replace(prefix=self._new_prefix(cast(PoolRow, pool), free))
            except (Tun6Error, EOFError, KeyError, ValueError) as error:
                results.append(error)
                continue
            results.append(decided)
            if decided != rows.get(change.id):
                rows[change.id] = changed[change.id] = decided
        self._write(changed.values(), counted)
        return results

    def _write(self, rows: Collection[Row], counted: Container[str] = ()) -> None:
        """Writes rows and tells everybody."""
        if rows:
            with self._worker.cursor() as cursor:
                cursor.executemany(
                    WRITE_ROW,
                    [
                        {**row._asdict(), "former": list(row.former), "takeovers": list(row.takeovers), "counted": row.id in counted}
                        for row in rows
                    ],
                )
            self._worker.execute(f"select pg_notify('{CHANNEL}', id) from unnest(%s::text[]) id", ([row.id for row in rows],))

    def _free_prefixes(self, pool: PoolRow | None) -> Iterator[IPv6Network]:
        """Yields the /64s that nobody has or had, and counts the pool up."""
        if pool is None:
            return
        base, end, width = int(pool.prefix.network_address) >> 64, pool_end(pool.prefix), 64
        at = pool.next
        while at < end:
            window = [IPv6Network((base + number << 64, 64)) for number in (at, min(at + width, end) - 1)]
            used = self._worker.execute(
                "select prefix from client where prefix between %s and %s union all select unnest(former) from client where former <> '{}'",
                window,
            )
            taken = {(int(prefix.network_address) >> 64) - base for (prefix,) in used}
            for number in range(at, min(at + width, end)):
                if number not in taken:
                    self._worker.execute("update pool set next = %s", (number + 1,))
                    yield IPv6Network((base + number << 64, 64))
            at, width = at + width, width * 2

    @staticmethod
    def _require_whole(pool: PoolRow) -> None:
        """Raises StorageError while a server may know the owner of a /64 that the store has none for."""
        if pool.timeline != pool.current:
            raise StorageError(
                "the store may have lost changes, and not all servers have written back what they know; until then nobody gets another /64."
                " `tun6.py cluster accept` goes on without those that are missing"
            )

    def _new_prefix(self, pool: PoolRow, free: Iterator[IPv6Network]) -> IPv6Network:
        """Returns the next one of `_free_prefixes`. Raises Refusal, StorageError."""
        self._require_whole(pool)
        prefix = next(free, None)
        if prefix is None:
            raise Refusal("pool-exhausted", f"no free /64 in {pool.prefix}")
        return prefix

    def _count_new(self, already: int, new_ids_per_hour: int) -> None:
        since = "select count(*) from client where counted and created > clock_timestamp() - interval '1 hour'"
        if new_ids_per_hour and self._worker.execute(since).fetchone()[0] + already >= new_ids_per_hour:
            raise Refusal("busy", f"more than {new_ids_per_hour} new Ids in an hour")

    def _check_pin(self, pin: Pin, pool: PoolRow | None) -> Pin:
        """Returns the pin with the floor for its epochs. Raises ValueError when that can't be given, StorageError."""
        assert pool
        self._require_whole(pool)
        check_prefix(pin.prefix, pool.prefix)
        owner = self._worker.execute("select id from client where prefix && %s and id <> %s", (pin.prefix, pin.id)).fetchone()
        if owner:
            raise ValueError(f"{pin.prefix} is already the prefix of {owner[0]!r}")
        had = "from client where former <> '{}' and former @> array[%s::cidr] and id <> %s"
        epoch, moved = self._worker.execute(f"select max(epoch), max(moved) {had}", (pin.prefix, pin.id)).fetchone()
        if epoch is None:
            return pin
        deaf = self._worker.execute(
            "select string_agg(name, ', ') from server where heartbeat between clock_timestamp() - make_interval(secs => %s)"
            " and %s + make_interval(secs => %s)",
            (SILENT_S, moved, HEARD_S),
        ).fetchone()[0]
        if deaf:
            raise ValueError(
                f"{pin.prefix} was another Id's until just now, and {deaf} may not have heard that it has changed; try again later"
            )
        return dataclasses.replace(pin, floor=epoch + FREED_LEAD)

    # What `tun6.py cluster` and `doctor` do, after `connect`.

    def examine(self) -> tuple[PoolRow, list[str], list[str]]:
        """Returns the pool, the servers that have not written back what the database has lost, and what it risks to lose more."""
        pool = self.require_pool()
        missing = self._worker.execute("select name from server where timeline <> %s order by name", (pool.current,)).fetchall()
        names = "fsync", "synchronous_commit", "synchronous_standby_names"
        fsync, commit, standbys = (self._worker.execute(f"show {name}").fetchone()[0] for name in names)
        risks = ["fsync is off: after a power cut it is perhaps not whole"] if fsync != "on" else []
        if not standbys or commit in ("off", "local"):
            what = "synchronous_standby_names is empty" if not standbys else f"synchronous_commit is {commit}"
            risks.append(
                f"{what}: a standby that is promoted may lack commits, and then nobody gets another /64 until all servers are back"
            )
        return pool, [name for (name,) in missing] if pool.timeline != pool.current else [], risks

    def create(self, network: IPv6Network, keys: str) -> None:
        """Makes tables and pool. Raises RequestError when they are there."""
        with self._worker.transaction():
            if self.has_pool():
                raise RequestError(f"{public_url(self._url)} has a pool already; it stays as it is")
            self._worker.execute(SCHEMA)
            self._worker.execute(
                f"insert into pool (version, prefix, keys, timeline) values (%s, %s, %s, {TIMELINE})", (SCHEMA_VERSION, network, keys)
            )

    def upgrade(self) -> int:
        """Brings the tables to the version of this tun6. Returns the version that they had. Raises RequestError."""
        with self._worker.transaction():
            version = self.require_pool("for update").version
            if version > SCHEMA_VERSION:
                raise RequestError(f"the tables are of version {version}, and this tun6 knows only {SCHEMA_VERSION}; take a newer one")
            for each in range(version, SCHEMA_VERSION):
                self._worker.execute(UPGRADES[each])
            self._worker.execute("update pool set version = %s", (SCHEMA_VERSION,))
        return version

    def accept(self) -> bool:
        """Gives up what servers may know that have not written it back. Returns whether there was anything to give up."""
        with self._worker.transaction():
            pool = self.require_pool("for update")
            self._accept(self._worker, pool, anyway=True)
        return pool.timeline != pool.current

    def take_in(self, prefixes: Mapping[str, IPv6Network], keys: Mapping[str, KeyEntry], limits: Mapping[str, int]) -> int:
        """Takes in what is in files, all or nothing; an Id that has only a key or a limit gets a /64. Returns how many rows changed.

        Raises RequestError, which names the Id, when something else is in the store, StorageError.
        """
        with self._worker.transaction():
            pool = self.require_pool("for update")
            if keys and pool.keys == "none":
                raise RequestError("the pool is open to everybody, and there are keys; make it without --open")
            stored = {row.id: row for row in map(self._row, self._worker.execute(f"select {ROW} from client order by id for update"))}
            owners = {row.prefix: row.id for row in stored.values()}
            wanted = set(prefixes.values())
            now, free = self._clock(self._worker), (each for each in self._free_prefixes(pool) if each not in wanted)
            changed: list[Row] = []
            for id_ in {**prefixes, **keys, **limits}:
                old, prefix, key, limit = stored.get(id_), prefixes.get(id_), keys.get(id_), limits.get(id_)
                if not old:
                    self._require_whole(pool)
                if prefix is None:
                    prefix = old.prefix if old else self._new_prefix(pool, free)
                if old and old.prefix != prefix:
                    raise RequestError(f"{quote_id(id_)} has {old.prefix} in the store, and {prefix} in the file; nothing was taken")
                if owners.setdefault(prefix, id_) != id_:
                    raise RequestError(
                        f"{prefix} is {quote_id(owners[prefix])}'s in the store, and {quote_id(id_)}'s in the file; nothing was taken"
                    )
                if old and old.key and key and key != KeyEntry(old.key, old.revoked):
                    raise RequestError(f"{quote_id(id_)} has another key in the store, or is revoked in one of both; nothing was taken")
                if old and old.limit is not None and limit is not None and old.limit != limit:
                    raise RequestError(f"{quote_id(id_)} has another limit in the store; nothing was taken")
                row = old or first_row(id_, prefix, now)
                if key and not row.key:
                    row = KeyChange(id_, key.digest, key.revoked).decide(row, now)
                if limit is not None:
                    row = LimitChange(id_, limit).decide(row, now)
                if row != old:
                    changed.append(row)
            self._write(changed)
        return len(changed)

    def give_out(self) -> tuple[dict[str, IPv6Network], dict[str, KeyEntry], dict[str, int]]:
        """Returns the prefixes of all Ids, and the keys and limits of those that have one."""
        rows = [self._row(columns) for columns in self._worker.execute(f"select {ROW} from client order by id")]
        keys = {row.id: KeyEntry(row.key, row.revoked) for row in rows if row.key}
        return {row.id: row.prefix for row in rows}, keys, {row.id: row.limit for row in rows if row.limit is not None}


def require_fit(pool: PoolRow, address: str, network: IPv6Network, keys: str) -> None:
    """Raises ConfigError when a server with this prefixrange, that can do this with keys (see PoolRow), does not fit to the pool."""
    if pool.version != SCHEMA_VERSION:
        what = "`tun6.py cluster upgrade` brings it up to date" if pool.version < SCHEMA_VERSION else "this tun6 is too old for it"
        raise ConfigError(f"{address}: its tables are of version {pool.version}, and not {SCHEMA_VERSION}; {what}")
    if pool.prefix != network:
        raise ConfigError(f"{address} has the pool {pool.prefix}, and prefixrange is {network}; all servers of a cluster have one")
    if pool.keys not in ("none", keys):
        what = "there is no `cert`, without which nobody can prove a key"
        if keys != "none":
            what = f"keys_required is {'yes' if keys == 'required' else 'no'} here and not there"
        raise ConfigError(f"{address}: the pool's clients have keys, and {what}; all servers of a cluster have the same")


class CachedPool(PrefixPool):
    """The /64s as the rows of a cluster have them, to be read only."""

    def __init__(self, network: IPv6Network, rows: Mapping[str, Row]) -> None:
        super().__init__(network)
        self._rows = rows

    @property
    def free(self) -> int:
        """Number of /64s that no client owns, but for those that are the servers' own and those that had an owner."""
        return max(pool_end(self.network) - len(self._rows), 0)

    def owners(self) -> list[str]:
        """As PrefixPool has it."""
        return list(self._rows)

    def find(self, id_: str) -> IPv6Network | None:
        """As PrefixPool has it."""
        row = self._rows.get(id_)
        return row.prefix if row else None


class ClusterKeys(Keys):
    """The keys of a cluster, in the rows that ClusterStore knows."""

    def __init__(self, path: str, rows: Mapping[str, Row], change: Callable[[Change], Row]) -> None:
        """`change` makes a change in the store, and raises what Keys has."""
        self._path, self._rows, self._make = path, rows, change

    @property
    def path(self) -> str:
        """As Keys has it: that of the store."""
        return self._path

    def find(self, id_: str) -> KeyEntry | None:
        """As Keys has it."""
        row = self._rows.get(id_)
        return KeyEntry(row.key, row.revoked) if row and row.key else None

    def ids(self) -> list[str]:
        """As Keys has it."""
        return [row.id for row in self._rows.values() if row.key]

    def _change(self, id_: str, entry: KeyEntry) -> None:
        self._make(KeyChange(id_, entry.digest, entry.revoked))


class CacheFile(JsonFile):
    """What a server knows of the cluster, for when the store is down: {"": {the pool's "keys" and "prefix"}, "<id>": {its row}, ...}."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "a cluster's rows", SECRET_MODE)

    def load_rows(self) -> tuple[dict[str, str], list[Row]]:
        """Returns the pool and the rows; nothing when there is no file, or none that can be read, which is logged."""
        try:
            entries = json.loads(self.path.read_text("utf-8"))
            pool = entries.pop("")
            return pool, [
                Row(
                    id_,
                    **{
                        **fields,
                        "prefix": IPv6Network(fields["prefix"]),
                        "former": tuple(map(IPv6Network, fields["former"])),
                        "takeovers": tuple(fields["takeovers"]),
                    },
                )
                for id_, fields in entries.items()
            ]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s can't be used, it will be made anew: %s", self.path, to_printable(error))
        return {}, []

    def save_rows(self, pool: dict[str, str], rows: Mapping[str, Row]) -> None:
        """Saves both, in a thread. Raises StorageError."""
        entries: dict[str, Any] = {"": pool}
        for id_, row in in_slices(list(rows.items())):
            entries[id_] = {**row._asdict(), "prefix": str(row.prefix), "former": list(map(str, row.former))}
            del entries[id_]["id"]
        self.save(entries)


class ClusterStore(Store):
    """The map Id -> /64, with keys and epochs, in PostgreSQL, shared by several servers; without it, known Ids are served from a cache.

    The store gates beginnings, TCP gates lives. `begin` counts the Id's epoch up, and gives it in the lease; whoever hears that another
    server began a newer session ends its own. What is to be done, ClusterView and the Changes decide; here they meet the database, which
    is spoken to in threads that nothing else uses, as it may hang.
    """

    def __init__(
        self, url: str, network: IPv6Network, keys: str, cache: str, name: str = "", address: str = "", new_ids_per_hour: int = 0
    ) -> None:
        """Reads all rows, or the cache. `keys` says what this server can do: see PoolRow; `name` is what `start` enters it as.

        Raises ConfigError when the database is another pool's, or has none yet, StoreDown when there is no cache either.
        """
        require_psycopg()
        self._url, self._network, self._new_ids_per_hour = url, network, new_ids_per_hour
        self._name, self._address, self._keys_policy = name, address, keys
        self._application = f"tun6 {name[:32]} {secrets.token_hex(4)}"
        self._serving = False  # whether it was started
        self._view = ClusterView(name)
        self._leases: dict[str, tuple[Claim, Lease]] = {}  # of the sessions that the view holds
        self._threads = gevent.threadpool.ThreadPool(THREADS_MAX)
        self._database: Database | None = None  # None: the store is down
        self._down = ""  # why
        self._since = time.monotonic()  # when it came or went
        self._changes: GroupCommit[Change, Row | Exception] = GroupCommit(self._change_all, BATCH_MAX)
        self._owing = gevent.event.Event()  # set when there are debts
        self._greenlets = gevent.pool.Group()
        self._cache, self._is_cached = CacheFile(cache), True
        self._saving = gevent.lock.RLock()
        self._has_new = gevent.event.Event()  # set when an Id is known that was not, or has another /64
        self._facts: dict[str, Any] = {}  # of the pool, for the cache: "pool", its id, "keys", and "own", this server's /64
        self._clock_offset = 0.0  # of the database's clock, against time.monotonic()
        self._timeline = ""  # of the database, when this server entered
        self._servers: list[tuple[str, str, float]] = []  # name, address, time of the last heartbeat
        self.pool = CachedPool(network, self._view.rows)
        try:
            self._connect()
        except StoreDown as down:
            self._facts, rows = self._cache.load_rows()
            if not self._facts:
                self.close()
                raise
            for row in rows:
                self._view.hear(row)
            self._go_down(down)
        except ConfigError:
            self.close()
            raise
        self.keys = None if self._facts["keys"] == "none" else ClusterKeys(self.path, self._view.rows, self._change)

    @property
    def path(self) -> str:
        """As Store has it: the address without user and password."""
        return public_url(self._url)

    def start(self) -> None:
        """As Store has it: enters this server among the others, and from then on hears of what they do."""
        self._serving = True
        if self._database:
            try:
                self._enter(self._database)
            except StoreDown as down:
                self._go_down(down)
        self._owing.set()
        for work in (self._follow, self._pay_when_due, self._save_when_due):
            self._greenlets.spawn(work)

    def close(self) -> None:
        """As Store has it. What is owed to the store is paid first, if that goes at once."""
        if self._serving:
            with gevent.Timeout(COMMIT_S, False):
                self._pay()
            with gevent.Timeout(LAST_SAVE_S, False), self._saving:  # one that is killed meanwhile goes on in its thread
                self._greenlets.kill()
                self._save()
            self._greenlets.kill()
        if self._database:
            self._threads.spawn(self._database.close)
            self._database = None
        with gevent.Timeout(COMMIT_S, False):
            self._threads.kill()  # waits for what goes on there

    def find(self, id_: str) -> IPv6Network | None:
        """As Store has it."""
        return self.pool.find(id_)

    @contextmanager
    def begin(self, claim: Claim) -> Iterator[Lease]:
        """As Store has it. When the caller is killed meanwhile, a session that the store knows of by then is ended there."""
        left = threading.Event()
        asked = dataclasses.replace(claim, is_alive=lambda: not left.is_set() and claim.is_alive())
        beginning = gevent.spawn(self._begin, asked)
        lease = None
        try:
            lease = beginning.get()
            yield lease
        finally:
            left.set()
            if lease:
                self._release(claim.id, lease)
            else:
                beginning.link_value(lambda late: self._release(claim.id, late.value))

    def _begin(self, claim: Claim) -> Lease:
        begin = self._view.begin_change(claim)
        try:
            row, settled = self._ask(begin)
            if not self._view.hold(begin, row, settled):
                raise Refusal("busy", "a newer connection has this Id")
        finally:
            self._view.conclude(begin)
            self._owing.set()
        lease = Lease(row.prefix, row.epoch)
        self._leases[claim.id] = claim, lease
        return lease

    def _ask(self, begin: SessionBegin) -> tuple[Row, bool]:
        """Returns the row of a session that begins, and whether the store is known to have it. Raises as `begin` does."""
        try:
            return self._change(begin), True
        except StoreDown:
            row = self._view.begin_alone(begin)
            if row is None:
                raise
            return row, False

    def _release(self, id_: str, lease: Lease) -> None:
        del self._leases[id_]
        self._view.release(id_, lease.received, lease.sent)
        self._owing.set()

    def assign(self, id_: str) -> IPv6Network:
        """As Store has it."""
        return self._change(Assignment(id_)).prefix

    def pin(self, id_: str, prefix: IPv6Network) -> None:
        """As Store has it. A /64 that another Id had until just now is not free before all servers have heard of that."""
        self._change(Pin(id_, prefix))

    def keep(self) -> IPv6Network | None:
        """As Store has it: the one of this server's number, from the end of the pool."""
        own: str | None = self._facts.get("own")
        return IPv6Network(own) if own else None

    def unkeep(self, prefix: IPv6Network) -> None:
        """Does nothing: it stays this server's."""

    def takeovers(self, id_: str) -> Sequence[float]:
        """As Store has it, in the whole cluster."""
        row = self._view.rows.get(id_)
        return [moment - self._clock_offset for moment in row.takeovers] if row else ()

    def limit_of(self, id_: str) -> int | None:
        """As Store has it."""
        row = self._view.rows.get(id_)
        return row.limit if row else None

    def set_limit(self, id_: str, bits_per_s: int | None) -> None:
        """As Store has it. The server that has the Id's session hears of it."""
        try:
            self._change(LimitChange(id_, bits_per_s))
        except KeyError:
            raise RequestError(f"the store does not know {quote_id(id_)} yet; try again when it has a prefix") from None

    def holder(self, id_: str) -> str | None:
        """As Store has it."""
        row = self._view.rows.get(id_)
        return row.server if row and row.live and row.server != self._name else None

    def whereabouts(self, id_: str) -> dict[str, Any]:
        """As Store has it."""
        row = self._view.rows.get(id_)
        if not row:
            return {}
        moved = {"received": row.received, "sent": row.sent}
        return {"server": row.server, "connected": row.live, "epoch": row.epoch, "since": row.since, "last": row.last, **moved}

    def figures(self) -> dict[str, Any]:
        """As Store has it."""
        now, held = time.monotonic(), self._view.held.values()
        sessions = Counter(row.server for row in in_slices(list(self._view.rows.values())) if row.live)
        servers = [
            {
                "name": name,
                "address": address,
                "here": name == self._name,
                "heard": round(max(now + self._clock_offset - heartbeat, 0.0), 1),
                "sessions": len(held) if name == self._name else sessions[name],
            }
            for name, address, heartbeat in self._servers
        ]
        state = {
            "address": self.path,
            "down": self._down or None,
            "seconds": round(now - self._since),
            "owed": len(self._view.debts()),
            "unsettled": sum(not session.settled for session in held),
        }
        return {"store": state, "servers": servers}

    # The database: in threads, never for longer than somebody may wait.

    def _in_thread(self, seconds: float, function: Callable[..., R], *arguments: Any) -> R:
        """Runs what speaks to the database in a thread. Raises StoreDown when it fails or takes longer, and goes on there."""
        answer = self._threads.spawn(function, *arguments)
        try:
            with store_errors(self._url), gevent.Timeout(seconds) as limit:
                return cast(R, answer.get())
        except gevent.Timeout as timeout:
            if timeout is not limit:
                raise
            raise StoreDown(f"{self.path} gives no answer within {seconds:.0f} s") from None

    def _connect(self) -> None:
        """Connects and takes in all rows. Raises StoreDown, ConfigError."""
        database = Database(self._url, self._application)
        try:
            pool, rows, now = self._in_thread(DATABASE_CONNECT_S, database.open, list(self._view.rows.values()))
            self._check(pool)
            self._clock_offset = now - time.monotonic()
            for row in in_slices(rows):
                self._hear(row)
            self._facts.update(pool=str(pool.id), keys=pool.keys)
            if self._serving:
                self._enter(database)
        except BaseException:
            self._threads.spawn(database.close)
            raise
        self._database = database
        self._owing.set()

    def _check(self, pool: PoolRow) -> None:
        """Raises ConfigError when this server does not fit to the pool."""
        if self._facts.get("pool", str(pool.id)) != str(pool.id):
            raise ConfigError(f"{self._cache.path} is of another pool than that of {self.path}; remove it, and start again")
        require_fit(pool, self.path, self._network, self._keys_policy)

    def _enter(self, database: Database) -> None:
        """Enters this server among the others. Raises StoreDown."""
        number, timeline, lost = self._in_thread(
            DATABASE_CONNECT_S, database.enter, self._name, self._address, list(self._view.rows.values())
        )
        for row in lost:
            log.error("%s: the store has lost it, and its %s is another's by now", quote_id(row.id), row.prefix)
            self._end(row.id, "its prefix is another's by now")
            self._view.forget(row.id)
        if timeline != self._timeline:
            self._timeline = timeline
            self._view.unsettle()
        size = 1 << (64 - self._network.prefixlen)
        own = None
        if number < size - pool_end(self._network):
            own = IPv6Network((int(self._network.network_address) + (size - 1 - number << 64), 64))
        self._facts["own"] = str(own) if own and all(row.prefix != own for row in self._view.rows.values()) else None
        self._is_cached = False

    def _go_down(self, reason: Tun6Error) -> None:
        """Goes on without the database, until `_follow` has found it again."""
        if self._database:
            self._threads.spawn(self._database.close)
            self._database = None
        if not self._down:
            self._since = time.monotonic()
        news = not self._down or (isinstance(reason, ConfigError) and str(reason) != self._down)
        self._down = str(reason)
        if news:
            warn_standing("store", "%s; known Ids are served as they are known here, new ones refused until it is back", reason)

    def _follow(self) -> NoReturn:
        """Hears of what changes in the store, and finds it again when it was down. Runs until it is killed."""
        while True:
            try:
                if self._database is None:
                    self._connect()
                if self._down:
                    log.info("%s is back", self.path)
                    standing_warnings.pop("store", None)
                    self._down, self._since = "", time.monotonic()
                self._listen(cast(Database, self._database))
            except (StoreDown, ConfigError) as error:
                self._go_down(error)
            gevent.sleep(DATABASE_RETRY_S)

    def _listen(self, database: Database) -> None:
        """Hears from a database until it is not the one any more. Raises StoreDown."""
        polled = beaten = -math.inf
        while self._database is database:
            now = time.monotonic()
            if now - beaten >= HEARTBEAT_S:
                beaten = now
                there, timeline, self._servers = self._in_thread(DATABASE_CONNECT_S, database.beat, self._name)
                self._clock_offset = there - time.monotonic()
                if timeline != self._timeline:
                    raise StoreDown(f"{self.path} is another copy of the database now")
            ids: list[str] = []
            if now - polled >= POLL_S:
                polled, ids = now, list(self._view.held)
            for row in in_slices(self._in_thread(DATABASE_CONNECT_S, database.listen, ids)):
                self._hear(row)

    def _hear(self, row: Row) -> None:
        known = self._view.rows.get(row.id)
        if not known or known.prefix != row.prefix:
            self._has_new.set()
        reason = self._view.hear(row)
        if self._view.owes_ends:
            self._owing.set()
        self._is_cached = False
        if reason:
            self._end(row.id, reason)
        elif row.id in self._leases:
            self._leases[row.id][0].on_limit()

    def _end(self, id_: str, reason: str) -> None:
        if id_ in self._leases:
            claim, lease = self._leases[id_]
            lease.superseded = reason
            claim.end(reason)

    def _change(self, change: Change) -> Row:
        """Makes a change. Raises what its `decide` does, and StoreDown."""
        result = self._changes.submit(change)
        if isinstance(result, Exception):
            raise result
        return result

    def _change_all(self, changes: list[Change]) -> list[Row | Exception]:
        """Makes changes, in one transaction but for pins, and returns their results."""
        groups = itertools.groupby(changes, lambda change: change if isinstance(change, Pin) else None)
        return [result for _, group in groups for result in self._change_group(list(group))]

    def _change_group(self, changes: Sequence[Change]) -> Sequence[Row | Exception]:
        database, batch = self._database, Batch(changes, self._view.rows)
        try:
            if database is None:
                raise StoreDown(f"the store is down: {self._down}")
            self._in_thread(COMMIT_S, database.change, batch, self._new_ids_per_hour)
            if database is not self._database:  # what it has committed, the one of now may lack
                raise StoreDown(f"the store is down: {self._down}")
        except StoreDown as down:
            if database and database is self._database:
                self._go_down(down)
            unknown = "; whether it was done is not known" if batch.give_up() else ""
            return [StoreDown(f"{down}{unknown}") for _ in changes]  # one each, as each that raises it adds to its traceback
        for row in batch.results:
            if isinstance(row, Row):
                self._hear(row)
        return batch.results

    def _pay_when_due(self) -> NoReturn:
        """Tells the store what it has to be told. Runs until it is killed."""
        while True:
            self._owing.wait()
            self._owing.clear()
            self._pay()

    def _pay(self) -> None:
        for debts in iter(lambda: self._view.debts()[:BATCH_MAX], []):
            paid = self._changes.submit_all(debts) if self._database else [StoreDown(self._down)]
            if any(isinstance(result, StorageError) for result in paid):
                break  # until it is back
            for change, result in zip(debts, paid):
                reason = self._view.pay(change, result if isinstance(result, Row) else None)
                if change.id in self._leases:
                    claim, lease = self._leases[change.id]
                    epoch = self._view.held[change.id].epoch
                    if reason:
                        self._end(change.id, reason)
                    elif epoch != lease.epoch:
                        lease.epoch = epoch
                        claim.on_epoch(epoch)

    def _save_when_due(self) -> NoReturn:
        """Saves what is known for when the store is down, who has which /64 at once. Runs until it is killed."""
        while True:
            self._has_new.wait(CACHE_S)
            self._has_new.clear()
            self._save()
            gevent.sleep(CACHE_PAUSE_S)

    def _save(self) -> None:
        with self._saving:
            if self._is_cached:
                return
            self._is_cached = True
            try:
                self._cache.save_rows(self._facts, self._view.rows)
                standing_warnings.pop("cache", None)
            except StorageError as error:
                self._is_cached = False
                if "cache" not in standing_warnings:
                    warn_standing("cache", "%s; after a restart without the store, clients would be refused", error)


# ---- server ----------------------------------------------------------------------------------------------------------

BACKLOG = 1024  # connections that wait for accept, or of one host for admission
ACCEPT_BATCH = 32  # connections accepted before other greenlets run
HIGH_DESCRIPTOR = 16_384  # from which on connections have theirs; the kernel's table takes 8 bytes for each number below
ACCEPT_PAUSE_S = 0.5  # after an accept that failed for want of descriptors or memory
DEFER_ACCEPT_S = 5  # that the kernel keeps a connection without data from us, TCP_DEFER_ACCEPT; it rounds this up
HANDSHAKES_MAX, HANDSHAKES_PER_HOST_MAX = 64, 8  # handshakes at a time: in all, of one IPv4 address
SLOW_HANDSHAKE_S = 1.0  # a handshake that takes longer, while it is the peer that we wait for, may be ended to admit another
HANDSHAKE_SEGMENTS_MAX = 16  # of the peer's part of a handshake, usually up to four; who needs more plays for time
CONTENTION_PAUSE_S = 5.0  # before each takeover then
FORWARDING_CHECK_S = 60.0  # between two looks at whether others have turned forwarding off, and at whether we need an address
NOTHING_NEW = "the server can't serve a new client at the moment"
DRY_HELLOS_MAX, DRY_HELLOS_S = 60, 60  # in which so many dry hellos of those who need no key are answered, as each tells what Ids there are
GLOBAL, UNIQUE_LOCAL = IPv6Network("2000::/3"), IPv6Network("fc00::/7")  # unicast addresses, RFC 4291 section 2.4, RFC 4193


@dataclass(frozen=True)
class ServerConfig:
    """The section [server] of config.ini, whose path is `file`. A new setting is a field here and a parser in _PARSERS."""

    localhost: str
    listenport: int
    prefixrange: IPv6Network
    assignments: str | None = None
    store: str | None = None
    store_cache: str = "store-cache.json"
    name: str = ""
    congestion: str = "auto"
    link: str = "auto"
    offload: str = "auto"
    tun: str = "tun6-%d"
    mtu: int = 1500
    max_clients: int = 1000
    cert: str | None = None
    keys: str | None = None
    keys_required: bool = True
    control: str = "/run/tun6/server.sock"
    new_ids_per_hour: int = 0
    client_to_client: bool = True
    hook: str | None = None
    ndp: str | None = None
    dead_after: int = DEAD_AFTER_S
    log: str = "text"
    metrics: tuple[str, int] | None = None  # address, port
    metrics_clients: bool = False
    documentation_addresses: bool = False
    address: str | None = None  # as `remotehost` of its clients
    fingerprint: tuple[str, ...] = ()  # those of other servers in `address`
    limit: int | None = None  # bits/s of IPv6 packets, each way of each client
    file: str = "config.ini"


def open_keys(config: ServerConfig) -> Keys | None:
    """Reads the file of keys, if there is to be one. Raises ConfigError."""
    if config.keys and not config.cert:
        raise ConfigError(
            f"{config.file}: [server] has keys but no cert, and keys go only through TLS; `tun6.py keygen` makes a certificate"
        )
    return KeyStore(config.keys) if config.keys else None


def own_address(config: ServerConfig) -> str:
    """Returns where this server is reached: where it listens, or else what the kernel says, which knows nothing of a NAT."""
    if config.localhost != "0.0.0.0":
        return config.localhost
    with system_socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return str(probe.getsockname()[0])
    return "192.0.2.1"


def key_policy(config: ServerConfig) -> str:
    """Returns what a server of a cluster can do with keys, see PoolRow."""
    return "none" if not config.cert else "required" if config.keys_required else "optional"


def open_store(config: ServerConfig) -> Store:
    """Opens what the configuration names: files, or the store of a cluster. Raises ConfigError, StorageError."""
    if config.store:
        if config.assignments or config.keys:
            beside = "assignments" if config.assignments else "keys"
            raise ConfigError(
                f"{config.file}: [server] has a store, and beside it {beside}, which would not be used; `tun6.py cluster import` takes"
                " what is in such files into the store; then remove the line"
            )
        return ClusterStore(
            config.store,
            config.prefixrange,
            key_policy(config),
            os.path.join(os.path.dirname(config.file), config.store_cache),
            config.name or platform.node(),
            own_address(config),
            config.new_ids_per_hour,
        )
    new_ids = TokenBucket(config.new_ids_per_hour, 3600)

    def admit_new(is_there: bool) -> None:
        if not (new_ids.take() if is_there else new_ids.has_token()):
            raise Refusal("busy", f"more than {config.new_ids_per_hour} new Ids in an hour")

    return AssignmentStore(PrefixPool(config.prefixrange), config.assignments, keys=open_keys(config), admit_new=admit_new)


def files_of(config: ServerConfig) -> list[str | None]:
    """Returns what names the files or the store of a server, so that nobody asks the wrong one."""
    return [public_url(config.store)] if config.store else [name and os.path.realpath(name) for name in (config.assignments, config.keys)]


def warn_of_overlap(pool: IPv6Network, own: IPv6Address | None = None) -> None:
    """Warns of addresses of this machine in the pool, besides `own`: the client that gets their /64 would get no traffic."""
    for interface, address in machine_addresses():
        if address in pool and address != own:
            warn_standing(f"overlap {address}", "%s of %s is in prefixrange %s; give a range without it", address, interface, pool)


def has_routed_address(pool: IPv6Network, own: IPv6Address | None = None) -> bool:
    """Returns whether this machine has an address besides `own` that is routed where the pool's are, on devices that are not tun6's."""
    kind = GLOBAL if pool[0] in GLOBAL else UNIQUE_LOCAL
    return any(address in kind and address != own for interface, address in machine_addresses() if not interface.startswith("tun6"))


def watch_forwarding(was_on: bool) -> None:
    """Says once that somebody turned forwarding off, as Docker or a sysctl may do, and once that it is on. Runs until it is killed."""
    while True:
        gevent.sleep(FORWARDING_CHECK_S)
        on = read_sysctl("net.ipv6.conf.all.forwarding") == "1"
        if was_on and not on:
            warn_standing(
                "forwarding",
                "somebody turned IPv6 forwarding off, clients can reach this machine only; `sysctl -w net.ipv6.conf.all.forwarding=1` turns"
                " it on; look for who did it in /etc/sysctl.d, `sysctl --system` and what manages network or firewall here",
            )
        elif on and not was_on:
            log.info("IPv6 forwarding is on again")
            standing_warnings.pop("forwarding", None)
        was_on = on


def describe_dropping_chains(devices: str, pool: IPv6Network, who: str) -> dict[str, str]:
    """Returns what is to be said of each chain that find_dropping_chains finds; `who` has the range. Raises as that does."""
    return {
        chain: f"the firewall's chain {chain} drops what it does not accept, and does not know {devices} and {pool}: {who} can reach this"
        f" machine only; it is {whose}"
        for chain, whose in run_in_thread(find_dropping_chains, devices, pool).items()
    }


def watch_other_firewalls(devices: str, find_range: Callable[[], IPv6Network | None], who: str) -> None:
    """Says once which firewall drops what we forward, and once that it does not any more. Runs until it is killed.

    `find_range` returns the range of `who`, None as long as it is not known.
    """
    known: dict[str, str] = {}
    while True:
        gevent.sleep(FORWARDING_CHECK_S)
        pool = find_range()
        if pool is None:
            continue
        try:
            dropping = describe_dropping_chains(devices, pool, who)
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:
            log.debug("the firewall can't be looked at: %s", error)
            continue
        for chain in dropping.keys() - known.keys():
            warn_standing(f"chain {chain}", "%s", dropping[chain])
        for chain in known.keys() - dropping.keys():
            log.info("the firewall's chain %s does not stand in the way of %s any more", chain, who)
            standing_warnings.pop(f"chain {chain}", None)
        known = dropping


def has_data(sock: socket.socket) -> bool:
    """Returns at once whether there is something to read."""
    try:
        return not sock.closed and bool(system_socket.socket.recv(sock._sock, 1, socket.MSG_PEEK))
    except OSError:
        return False


def is_waited_for(sock: socket.socket, seconds: float) -> bool:
    """Returns whether in a handshake the peer has been silent for so long since we sent something, and it is not our turn."""
    with suppress(OSError):
        if sock.closed:  # the handshake is over, and its place is about to be free
            return False
        ours = has_data(sock) or not sock._read_event.active  # its greenlet does not wait to read
        if ours and read_tcp_info(sock, "I", 152) <= HANDSHAKE_SEGMENTS_MAX:  # tcpi_data_segs_in
            return False
        return read_tcp_info(sock, "I", 44) >= 1e3 * seconds  # tcpi_last_data_sent
    return True


def with_high_descriptor(sock: socket.socket) -> socket.socket:
    """Returns the connection with a descriptor above those of the TUNs, if there is room for it, so that a kill is heard of at once.

    Linux closes what a killed process had from the highest descriptor down, and each TUN takes some 20 ms, in rcu_barrier() (of 6.18).
    """
    lowest = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, HIGH_DESCRIPTOR)
    try:
        moved = socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, lowest))
    except OSError:
        return sock
    sock.close()
    return moved


class AdmissionControl:
    """Bounds the handshakes at a time: HANDSHAKES_PER_HOST_MAX of one host, HANDSHAKES_MAX in all.

    Further connections of a host wait until a handshake of that host is over. So neither a host that says nothing nor a
    thousand clients behind one NAT that reconnect at once delay the clients of other hosts. When all places are taken, a
    slow handshake is ended, or else the newest of the host that has most of them. One that waits for us is not slow.
    """

    def __init__(self, start: Callable[[socket.socket, str], gevent.Greenlet]) -> None:
        """`start` starts the handshake with this peer and returns its greenlet, which calls `release`."""
        self._start_handshake = start
        self._handshakes: dict[gevent.Greenlet, tuple[str, float, socket.socket]] = {}  # host, time of its start; oldest first
        self._number_of: Counter[str] = Counter()  # handshakes, by host
        self._waiting: dict[str, deque[tuple[socket.socket, str]]] = {}  # by host

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """Starts the handshake of a new connection now, or when its host has a place."""
        peer = f"{host} port {port}"
        if self._number_of[host] < HANDSHAKES_PER_HOST_MAX:
            while len(self._handshakes) >= HANDSHAKES_MAX:
                if not (self._end_slow("") or self._end_one_of_many()):
                    gevent.sleep(0.01)
            self._start(sock, host, peer)
            return
        waiting = self._waiting.setdefault(host, deque())
        if len(waiting) < BACKLOG:
            waiting.append((sock, peer))
            gevent.spawn_later(SLOW_HANDSHAKE_S, self._end_slow, host)
        else:
            log.warning("%s: rejected, %d connections from there wait already", peer, BACKLOG)
            sock.close()

    def release(self, greenlet: gevent.Greenlet, start_next: bool = True) -> bool:
        """Frees the place of a handshake that is over, for the next of its host. Returns False when it had no place any more."""
        if greenlet not in self._handshakes:
            return False
        host, *_ = self._handshakes.pop(greenlet)
        self._number_of[host] -= 1
        if not self._number_of[host]:
            del self._number_of[host]
        waiting = self._waiting.get(host, deque())
        while waiting and start_next:
            sock, peer = waiting.popleft()
            if has_data(sock):
                self._start(sock, host, peer)
                break
            sock.close()  # it has said nothing since it came
        if not waiting:
            self._waiting.pop(host, None)
        return True

    def close(self) -> None:
        """Closes all that wait; no handshake starts any more."""
        for waiting in self._waiting.values():
            for sock, _ in waiting:
                sock.close()
        self._waiting.clear()

    def _start(self, sock: socket.socket, host: str, peer: str) -> None:
        greenlet = self._start_handshake(sock, peer)
        self._handshakes[greenlet] = host, time.monotonic(), sock
        self._number_of[host] += 1

        def clean_up(_: object) -> None:  # it may be killed before it has begun
            self.release(greenlet)
            sock.close()

        greenlet.rawlink(clean_up)

    def _end_slow(self, host: str) -> bool:
        """Ends the oldest slow handshake of the host ("": of any host), if there is one."""
        since = time.monotonic() - SLOW_HANDSHAKE_S
        old = ((greenlet, its, sock) for greenlet, (its, began, sock) in self._handshakes.items() if host in ("", its) and began <= since)
        oldest, its = next(((greenlet, its) for greenlet, its, sock in old if is_waited_for(sock, SLOW_HANDSHAKE_S)), (None, ""))
        if oldest is None:
            return False
        oldest.kill(block=False)
        self.release(oldest, start_next=bool(host) or self._number_of[its] == 1)  # the last of a host must start those that wait
        return True

    def _end_one_of_many(self) -> bool:
        """Ends the newest handshake of the host that has most, so that few hosts can't exclude others; not when each has only one."""
        host, most = self._number_of.most_common(1)[0]
        if most == 1:
            return False
        newest = [greenlet for greenlet, (its, *_) in self._handshakes.items() if its == host][-1]
        newest.kill(block=False)
        self.release(newest, start_next=False)
        return True


class ClientDevice:
    """A session's TUN on the server, with the route to its client: both are restored when somebody changes them."""

    def __init__(self, tun: Tun, mtu: int, lease: Lease, kernel: Kernel, fail: Callable[[KernelError], None]) -> None:
        """Brings it up; `fail` is called when it can't be restored. Raises KernelError."""
        self._tun, self._mtu, self._lease, self._kernel, self._fail = tun, mtu, lease, kernel, fail
        self._metric = lease.metric
        self._moves = 0  # of the route to another metric, whose removal of the old one was not reported yet
        self._repairs = TokenBucket(REPAIRS_MAX, REPAIRS_S)
        kernel.apply(self._plan())

    def _plan(self) -> list[Step]:
        return server_plan(self._tun.name, self._mtu, self._lease.prefix, self._metric)

    def follow_epoch(self) -> None:
        """Gives the route the metric that its lease has now. There is a route all the time."""
        old, self._metric = self._metric, self._lease.metric
        if old == self._metric:
            return
        self._moves += 1
        try:
            self._kernel.apply([session_route_step(self._tun.name, self._lease.prefix, self._metric)])
        except KernelError as error:
            self._fail(error)
        self._kernel.undo([session_route_step(self._tun.name, self._lease.prefix, old)])

    def on_removal(self, what: str, _: bytes) -> None:
        """Takes a report of the DeviceMonitor."""
        moved = what == ROUTE_REMOVED and self._moves > 0
        self._moves -= moved
        if moved or what == EVENTS_LOST or (what in (DEVICE_SET_DOWN, ROUTE_REMOVED) and self._repairs.take()):
            self._kernel.reapply(self._plan())
            if not moved and what != EVENTS_LOST:
                log_repair(self._tun.name, what)
        elif what != ADDRESS_REMOVED:  # the device has no address of ours
            self._fail(KernelError(f"TUN device {self._tun.name}: {what}"))


class Server:
    """Gives each client its prefix, a TUN with a route, and runs its session."""

    def __init__(self, config: ServerConfig) -> None:
        """Reads certificate, keys and assignments. Raises ConfigError."""
        self._config = config
        self._congestion = find_congestion_controls(config.congestion, config.link)
        self._tls = server_tls_context(config.cert) if config.cert else None
        self._certificate = certificate_validity(config.cert) if config.cert else None
        self.store = open_store(config)
        self.keys = self.store.keys
        self.sessions: dict[str, Session] = {}  # by Id
        self._hooks = Hooks(config.hook)
        self._proxy = NeighbourProxy(config.ndp, config.prefixrange) if config.ndp else None
        self._kernel = Kernel()
        self._monitor = DeviceMonitor()
        self._paths = PathMonitor(config.dead_after)
        self._lacks_address = False  # whether this machine has no address that is routed
        self._own: tuple[IPv6Network, list[Step]] | None = None  # the prefix of the server itself, by whose address lo has one
        self._mtus = MtuMonitor()
        self._dry_hellos = TokenBucket(DRY_HELLOS_MAX, DRY_HELLOS_S)
        self._superseded: dict[str, gevent.event.Event] = {}  # by Id: the newest connection that waits to take the Id over
        self._contended: set[str] = set()  # Ids of which the log has said that several clients have them
        self._not_offered: dict[str, set[str]] = {}  # by Id: GSO kinds of which our kernel refused its frames; at most max_clients
        self._connections = gevent.pool.Group()  # one greenlet each
        self._killable: set[gevent.Greenlet] = set()  # those of them that have nothing to undo yet
        self._admission = AdmissionControl(self._start_handshake)
        self.handshakes: Counter[str] = Counter()  # by outcome: served, left, or the code of the refusal
        self._drain: gevent.Greenlet | None = None  # ends the sessions one by one, while newcomers are sent to other servers
        self._spare_fd: int | None = None  # freed to refuse a connection for which there is no descriptor

    def run(self) -> NoReturn:
        """Serves until it is killed, then undoes everything. Raises KernelError when it can't begin."""
        gevent.get_hub().threadpool.maxsize = TUN_CLOSERS
        with suppress(OSError):  # gevent loads a module at the first exception in a thread, for which there may be no descriptor later
            run_in_thread(os.close, -1)
        route = pool_plan(self._config.prefixrange, os.getpid())
        with ExitStack() as undo:
            undo.callback(self.store.close)
            self.store.start()
            undo.callback(self._hooks.close)
            listener = undo.enter_context(self._listen())
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self._kernel.remove_stale()
            warn_of_overlap(self._config.prefixrange)
            undo.callback(self._kernel.undo, route)
            self._kernel.apply(route)
            undo.callback(self._take_address)
            self._give_address()
            self._monitor.watch("lo", lambda *_: self._restore(route))
            was_on = read_sysctl("net.ipv6.conf.all.forwarding") == "1"  # else it was said at the start
            forwarding = functools.partial(watch_forwarding, was_on)
            devices, pool = self._config.tun.replace("%d", "*"), self._config.prefixrange
            others = functools.partial(watch_other_firewalls, devices, lambda: pool, "clients")
            for work in (
                self._monitor.run,
                self._paths.run,
                self._mtus.run,
                trim_heap,
                forwarding,
                others,
                self._watch_address,
                TRAFFIC.run,
            ):
                undo.callback(gevent.spawn(work).kill)
            if self._proxy:
                undo.callback(gevent.spawn(self._proxy.run).kill)
            undo.callback(self._end_sessions)
            undo.callback(lambda: self._drain and self._drain.kill())
            gevent.sleep()  # so that each has begun, and sees what changes from now on
            where = self._config.localhost, self._config.listenport
            number = len(self.store.pool.owners())
            log.info("serving %s on %s port %d, with %d assignments", self._config.prefixrange, *where, number, extra=event("serving"))
            service_manager.notify("READY=1")
            while True:
                for _ in range(ACCEPT_BATCH):
                    self._accept(listener)
                gevent.sleep()  # accept returns at once while connections wait

    def _give_address(self) -> None:
        """Gives lo an address of the pool, from which the kernel then sends ICMPv6 errors, if this machine has none that is routed."""
        network = self._config.prefixrange
        if has_routed_address(network):
            return
        self._lacks_address = True
        prefix = self.store.keep()
        outcome = f"{network} has no /64 to spare for it; give it one"
        if prefix:
            self._own = prefix, [own_address_step(prefix, os.getpid())]  # set first, so that a kill meanwhile undoes the plan
            outcome = f"so lo has {prefix[1]}, and no client gets {prefix}"
            try:
                self._kernel.apply(self._own[1])
            except KernelError as error:
                self._take_address()
                outcome = f"and it can't be given one of the pool: {error}"
        warn_standing(
            "own address",
            "this machine has no IPv6 address that is routed, from which it could say that a packet is too big or has made too many hops:"
            " uploads would hang and traceroute would lack a hop; %s",
            outcome,
        )

    def _take_address(self) -> None:
        """Takes the address of the pool from lo."""
        if self._own:
            (prefix, plan), self._own = self._own, None
            self._kernel.undo(plan)
            self.store.unkeep(prefix)

    def _watch_address(self) -> NoReturn:
        """Gives lo an address when this machine loses its last one that is routed, and takes it when one comes, as after a boot."""
        while True:
            gevent.sleep(FORWARDING_CHECK_S)
            if not self._lacks_address:
                self._give_address()
            elif has_routed_address(self._config.prefixrange, self._own[0][1] if self._own else None):
                self._lacks_address = False
                gone = f"; {self._own[0][1]} is gone from lo" if self._own else ""
                self._take_address()
                standing_warnings.pop("own address", None)
                log.info("this machine has an IPv6 address that is routed%s", gone)

    def _restore(self, route: list[Step]) -> None:
        """Restores what somebody removed from lo. It may also have been another tun6's own: then ours is there, and this fails."""
        ours = {f"route of {self._config.prefixrange}": route}
        if self._own:
            ours[f"address {self._own[0][1]}"] = self._own[1]
        for what, plan in ours.items():
            if plan is route or self._own:  # it may have been taken at the end, while `ip` ran for the route
                with suppress(KernelError):
                    self._kernel.apply(plan)
                    log.warning("somebody removed the %s; it is back", what)

    def reload(self) -> None:
        """Reads limits, keys and certificate again, and ends the sessions whose key was removed, revoked or replaced.

        Raises ConfigError.
        """
        self.store.reload_limits()
        for id_ in self.sessions:
            self.apply_limit(id_)
        tls = server_tls_context(self._config.cert) if self._config.cert else None
        self._certificate = certificate_validity(self._config.cert) if self._config.cert else None
        if self.keys:
            before = {id_: self.keys.find(id_) for id_ in self.sessions}
            self.keys.reload()
            for id_, old in before.items():
                now = self.keys.find(id_)
                if (old and now != old) or (now and now.revoked):  # one that had none goes on until its client has its first key
                    self.end_session(id_, "its key was taken away")
        self._tls = tls

    def figures(self) -> dict[str, Any]:
        """Returns what `status` says of the server beside its sessions."""
        return {
            "side": "server",
            "state": "up" if self._drain is None else "draining",
            "listens": f"{self._config.localhost} port {self._config.listenport}",
            "pool": str(self._config.prefixrange),
            "free": self.store.pool.free,
            "limit": self._config.limit,
            "contended": sorted(filter(self._is_contended, self._contended)),
            "handshakes": dict(self.handshakes),
            **self.store.figures(),
            "certificate": dict(zip(("begins", "expires"), self._certificate)) if self._certificate else None,
        }

    def state(self) -> str:
        """Returns a line for the service manager."""
        where = f"{self._config.prefixrange} on {self._config.localhost} port {self._config.listenport}"
        return f"{'' if self._drain is None else 'draining, '}{where}: {len(self.sessions)} clients"

    def drain(self, seconds: float | None) -> None:
        """From now on sends newcomers to other servers, and ends all sessions spread over so many seconds; None: serves as before."""
        sessions, drained = list(self.sessions.values()), self._drain
        if drained is not None:
            drained.kill()
            self._drain = None
            standing_warnings.pop("drain", None)
        if seconds is None:
            log.info("serving newcomers again" if drained is not None else "asked to end a drain, and there is none")
            return
        self._drain = gevent.spawn(self._end_one_by_one, random.sample(sessions, len(sessions)), seconds)
        warn_standing(
            "drain",
            "draining since %s: newcomers are sent to other servers, and %d sessions end within %.0f s; `tun6.py drain --stop` ends that",
            *(time.strftime("%H:%M:%S"), len(sessions), seconds),
        )

    def _end_one_by_one(self, sessions: list[Session], seconds: float) -> None:
        """Ends the sessions, the first now, each after the same time."""
        began = time.monotonic()
        for number, session in enumerate(sessions):
            gevent.sleep(max(began + seconds * number / len(sessions) - time.monotonic(), 0))
            session.close(SessionError("this server is being drained"))
        log.info("drained: all sessions that there were have ended")

    def apply_limit(self, id_: str) -> None:
        """Limits the session of the Id, if there is one, to what the store or else the configuration says now."""
        if id_ in self.sessions:
            own = self.store.limit_of(id_)
            self.sessions[id_].set_limit(self._config.limit if own is None else own or None)

    def end_session(self, id_: str, reason: str) -> None:
        """Ends the session of the Id, if there is one."""
        if id_ in self.sessions:
            self.sessions[id_].close(SessionError(reason))

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, DEFER_ACCEPT_S)
            listener.bind((self._config.localhost, self._config.listenport))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise KernelError(f"can't listen on {self._config.localhost} port {self._config.listenport}: {error.strerror}") from None
        return listener

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, (host, port) = listener.accept()
        except ConnectionAbortedError:
            return
        except OSError as error:
            log.error("can't accept a connection: %s", error.strerror)
            if error.errno == errno.EMFILE:
                self._refuse_without_descriptor(listener)
            gevent.sleep(ACCEPT_PAUSE_S)
            return
        self._admission.admit(with_high_descriptor(sock), host, port)

    def _start_handshake(self, sock: socket.socket, peer: str) -> gevent.Greenlet:
        greenlet = self._connections.spawn(self._serve, sock, peer)
        self._killable.add(greenlet)
        greenlet.rawlink(self._killable.discard)
        return greenlet

    def _refuse_without_descriptor(self, listener: socket.socket) -> None:
        """Uses the spare descriptor to tell one connection that there is none for it."""
        if self._spare_fd is not None:
            os.close(self._spare_fd)
        with suppress(OSError), gevent.Timeout(ACCEPT_PAUSE_S, False):
            sock, _ = listener.accept()
            with sock:
                sock.sendall(encode_message({"Error": "busy", "Text": "the server has no room for another connection"}))
        with suppress(OSError):
            self._spare_fd = None
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _serve(self, sock: socket.socket, peer: str) -> None:
        """Handles one connection from its first byte to its last."""
        stream = None
        with sock:
            try:
                set_tcp_options(sock, self._config.dead_after)
                with self._mtus.watch(sock, peer, self._mtus.found.get(sock.getpeername()[0])):
                    with gevent.Timeout(HANDSHAKE_S):
                        stream = self._open_stream(sock)
                        message, trailing = receive_message(stream)
                    hello = parse_hello(message)
                    if hello.dry and not (self.keys and self._config.keys_required) and not self._dry_hellos.take():
                        raise Refusal("busy", f"more than {DRY_HELLOS_MAX} have asked within {DRY_HELLOS_S} s whether they would be served")
                    self._check_key(hello, stream)
                    (self._answer_dry if hello.dry else self._serve_client)(stream, peer, hello, trailing)
            except Refusal as refusal:
                self.handshakes[refusal.code] += 1
                level = logging.INFO if refusal.code == "moved" else logging.WARNING
                log.log(level, "%s: refused, %s", peer, refusal, extra=event("refused", peer=peer, reason=refusal.code))
                self._refuse(stream or Stream(sock), refusal)
            except ProtocolError as error:
                self.handshakes["bad-hello"] += 1
                log.warning("%s: refused, bad hello: %s", peer, error, extra=event("refused", peer=peer, reason="bad-hello"))
                self._refuse(stream or Stream(sock), Refusal("bad-hello", str(error)))
            except (gevent.Timeout, EOFError, OSError) as error:
                self.handshakes["left"] += 1
                log.debug("%s: left during the handshake: %s", peer, describe_end(error))
            except Exception as error:  # a defect of ours ends this connection, not the process
                self.handshakes["internal-error"] += 1
                log_defect(peer, error)

    def _open_stream(self, sock: socket.socket) -> Stream:
        """Returns a plain stream or one inside TLS, as the first byte says. Raises ProtocolError, EOFError, OSError."""
        first = sock.recv(1, socket.MSG_PEEK)
        if not first or not is_connected(sock):  # it may have left while it waited for its turn
            raise EOFError
        if first[0] != TLS_HANDSHAKE_RECORD:
            return Stream(sock)
        if self._tls is None:
            raise ProtocolError("it speaks TLS, and there is no `cert` in config.ini")
        return TlsStream(sock, self._tls)

    def _check_key(self, hello: Hello, stream: Stream) -> None:
        """Raises Refusal for a client that may not connect."""
        if self.keys is None or not (self._config.keys_required or self.keys.find(hello.id)):
            return
        if stream.encrypt is None:
            raise Refusal("tls-required", "this server serves only clients with a key, over TLS", f"{quote_id(hello.id)} without TLS")
        try:
            self.keys.check(hello.id, hello.key)
        except Refusal as refusal:
            raise Refusal(refusal.code, refusal.text, f"{quote_id(hello.id)}, {refusal.detail or refusal.text}") from None

    def _refuse(self, stream: Stream, refusal: Refusal) -> None:
        """Sends the refusal and waits a little for the client to close: our close with unread bytes would destroy the message."""
        self._admission.release(gevent.getcurrent())
        with gevent.Timeout(1, False):
            try:
                stream.send(encode_message({"Error": refusal.code, "Text": refusal.text}))
                stream.sock.shutdown(socket.SHUT_WR)
                while stream.sock.recv(MESSAGE_MAX):
                    gevent.sleep()  # recv returns at once from a peer that floods, and the timeout would never come
            except (OSError, ProtocolError) as error:
                log.debug("the refused client left: %s", describe_end(error))

    def _leave_admission(self) -> None:
        if not self._admission.release(gevent.getcurrent()):  # admission control has just ended it, and the kill may come at any switch
            raise Refusal("busy", "too many say who they are at the moment")

    def _send_elsewhere(self, hello: Hello) -> None:
        """Raises Refusal while this server is being drained."""
        if self._drain is not None:
            raise Refusal(
                "moved" if hello.moved else "busy", "this server is being drained", f"{quote_id(hello.id)}, as this server drains"
            )

    def _has_key(self, id_: str) -> bool:
        """Returns whether the Id has a key: a client that `_check_key` let pass has proved it."""
        return self.keys is not None and self.keys.find(id_) is not None

    def _require_room(self, id_: str) -> None:
        """Raises Refusal when there is no room for this Id, which may be a new one."""
        if len(self.sessions) >= self._config.max_clients and id_ not in self.sessions:
            raise Refusal("busy", f"{self._config.max_clients} clients are connected already")
        self.store.require_room(id_, counted=not self._has_key(id_))

    def _answer_dry(self, stream: Stream, peer: str, hello: Hello, _: bytes) -> None:
        """Tells a client whether it would be served, and changes nothing. Raises Refusal, OSError."""
        self._leave_admission()
        self._send_elsewhere(hello)
        prefix = self.store.find(hello.id)
        self._require_room(hello.id)
        if prefix is None and {"disk", "store"} & standing_warnings.keys():  # where nothing new can be kept
            raise Refusal("server-error", NOTHING_NEW)
        log.info("%s from %s: asks whether it would be served", quote_id(hello.id), peer)
        stream.send(encode_message({"Dry": True, **({"Prefix": str(prefix)} if prefix else {})}))

    def _serve_client(self, stream: Stream, peer: str, hello: Hello, trailing: bytes) -> None:
        """Serves a client after its hello until it leaves. Raises Refusal, OSError, ProtocolError."""
        id_, gso_kinds, *_ = hello
        self._leave_admission()
        took_over = self._take_over(hello, peer)
        self._check_key(hello, stream)  # the takeover may have waited, and the key may have been removed meanwhile
        self._send_elsewhere(hello)  # only now, as its old session is over anyway
        self._require_room(id_)
        has_key = self._has_key(id_)
        session, device = Session(peer), cast(Optional[ClientDevice], None)
        session.wire_rate = hello.rate
        self.sessions[id_] = session

        def on_epoch(_: int) -> None:
            if device:  # else its route is still to be made
                gevent.spawn(device.follow_epoch)

        claim = Claim(
            id_,
            hello.epoch,
            proved=has_key,
            counted=not has_key,
            took_over=took_over,
            is_alive=lambda: is_connected(stream.sock),
            end=lambda reason: session.close(SessionError(reason)),
            on_epoch=on_epoch,
            on_limit=functools.partial(self.apply_limit, id_),
        )
        try:
            with ExitStack() as undo:
                lease = undo.enter_context(self.store.begin(claim))
                prefix = session.prefix = lease.prefix
                self.apply_limit(id_)  # only here, as its row may have been unknown to this server
                self._killable.discard(gevent.getcurrent())  # only here, so that the server's end does not wait for a disk that hangs
                tun = Tun(self._config.tun)
                undo.callback(tun.close)
                session.device = tun.name
                tun.set_offload(gso_kinds)
                device = ClientDevice(tun, self._config.mtu, lease, self._kernel, session.close)
                if self._proxy:
                    self._proxy.add(prefix)
                    undo.callback(self._proxy.remove, prefix)
                undo.callback(self._monitor.unwatch, self._monitor.watch(tun.name, device.on_removal))
                answer: dict[str, Any] = {"Prefix": str(prefix)}
                offered = tun.gso_kinds & OFFLOADS[self._config.offload] - self._not_offered.get(id_, set())
                if session.limit and session.limit < LARGE_FRAMES_BITS:
                    offered = frozenset()
                if gso_kinds is not None:
                    answer.update(Offload=sorted(offered), Dry=True)  # as the client knows extensions, it is told of this one
                    answer.update({"Epoch": lease.epoch} if lease.epoch else {})
                answer.update({"Rate": hello.rate} if hello.rate else {})
                lease.require_newest()
                stream.send(encode_message(answer))
                self.handshakes["served"] += 1
                begin = event("session-begin", id=id_, peer=peer, prefix=prefix, device=tun.name, security=stream.security[7:] or "plain")
                log.info("%s from %s: has %s on %s%s", quote_id(id_), peer, prefix, tun.name, stream.security, extra=begin)
                ingress_filter = IngressFilter(prefix, True, None if self._config.client_to_client else self._config.prefixrange)
                told: dict[str, Any] = {"prefix": prefix, "device": tun.name, "peer": peer}
                if self._hooks.run("session-up", id_, **told):
                    undo.callback(lambda: self._hooks.run("session-down", id_, True, reason=session.end(), **told))
                with self._paths.watch(session, PeerPath(tun.name, IPv6Address(0), prefix[1], 255)):
                    reason = session.run(stream, tun, ingress_filter, self._congestion, offered, gso_kinds, trailing)
                lease.received, lease.sent = session.traffic.received, session.traffic.sent
            if isinstance(reason, OffloadRefused):
                self._stop_offering(id_, reason.kind)
            level = logging.WARNING if isinstance(reason, OffloadRefused) else logging.INFO
            end = {"id": id_, "peer": peer, "prefix": prefix, "device": session.device, **session.event_fields(reason)}
            text = describe_end(reason), session.summary()
            log.log(level, "%s from %s: gone, %s; %s", quote_id(id_), peer, *text, extra=event("session-end", **end))
        except (StorageError, KernelError) as error:
            level = logging.DEBUG if isinstance(error, StorageError) else logging.ERROR  # the store has logged its error, once
            failure = event("not-served", id=id_, peer=peer, prefix=session.prefix, device=session.device, reason=error)
            log.log(level, "%s from %s: can't be served: %s", quote_id(id_), peer, error, extra=failure)
            raise Refusal("server-error", NOTHING_NEW) from None
        finally:
            del self.sessions[id_]
            session.released.set()

    def _stop_offering(self, id_: str, kind: str) -> None:
        """From now on the answers to this Id, and to no other, lack the GSO kind. When there are too many, the oldest Id is forgotten."""
        self._not_offered[id_] = self._not_offered.pop(id_, set()) | {kind}
        if len(self._not_offered) > self._config.max_clients:
            del self._not_offered[next(iter(self._not_offered))]

    def _take_over(self, hello: Hello, peer: str) -> bool:
        """Ends the running session of the Id and waits until it is released. The newest of several newcomers wins. Raises Refusal.

        Returns whether a session here was alive. Where several clients take an Id from each other, on whatever servers, each waits.
        """
        id_ = hello.id
        if id_ in self._superseded:
            self._superseded.pop(id_).set()
        holder = self.store.holder(id_)
        if id_ not in self.sessions and holder is None:
            return False
        superseded = self._superseded[id_] = gevent.event.Event()  # set when a newer connection waits
        live = id_ in self.sessions and not self.sessions[id_].ending
        moves = Claim(id_, hello.epoch, self._has_key(id_)).is_of(self.store.whereabouts(id_).get("epoch"))
        if (live or holder) and not moves and self._is_contended(id_):
            if id_ not in self._contended:
                self._contended.add(id_)
                other = self.sessions[id_].peer if live else f"the server {holder}"
                log.warning("%s: clients at %s and %s take it from each other; give each an `id` of its own", quote_id(id_), other, peer)
            superseded.wait(CONTENTION_PAUSE_S)
        elif live or holder:
            self._contended.discard(id_)
        while id_ in self.sessions and self._superseded.get(id_) is superseded:
            old = self.sessions[id_]
            old.close(SessionError(f"a newcomer from {peer} has its Id"))
            old.released.wait()
        if self._superseded.get(id_) is not superseded:
            raise Refusal("busy", "a newer connection has this Id")
        del self._superseded[id_]
        if len(self._contended) > self._config.max_clients:
            self._contended = set(filter(self._is_contended, self._contended))
        return live

    def _is_contended(self, id_: str) -> bool:
        """Returns whether clients have taken the Id from each other several times."""
        times = self.store.takeovers(id_)
        return len(times) == CONTENTION_TAKEOVERS and time.monotonic() - times[0] < CONTENTION_WINDOW_S

    def _end_sessions(self) -> None:
        self._admission.close()
        gevent.killall(list(self._killable))
        for session in self.sessions.values():
            session.close(SessionError("the server stops"))
        self._kernel.remove_devices([session.device for session in self.sessions.values() if session.device])
        self._connections.join()


# ---- firewall --------------------------------------------------------------------------------------------------------

# Of what comes from the tunnel and belongs to nothing that began here:
PINGS_PER_S, PINGS_PER_SOURCE_PER_S = 20, 5  # admitted, in all and from each /64, so that a sweep can't fill the neighbour table (RFC 6583)
REFUSALS_PER_S = 10  # that are told to the sender by an ICMPv6 error
NETLINK_NETFILTER, NFTABLES_GROUP = 12, 0x40  # linux/netlink.h; NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h, as a bit
NFT_SETTLE_S = 0.01  # from the first message about a change until all of them have come, as a change is one transaction


class Opening(NamedTuple):
    """Ports that the Internet may connect to."""

    host: int | None  # the lower 64 bits of a LAN host's address; None: this machine
    protocol: str
    first: int
    last: int


def parse_openings(text: str) -> tuple[Opening, ...]:
    """Returns what the setting `open` names. Raises ValueError, which completes a sentence with "it"."""
    openings = []
    for entry in text.lower().split(","):
        found = re.fullmatch(r"\s*(this|[0-9a-f:.]+)\s+(tcp|udp)\s+([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", entry)
        if not found:
            raise ValueError("must be entries like ::22 tcp 443, ::5 udp 5000-5010 or this tcp 22, with commas between them")
        who, protocol, first, last = found.groups(found[3])
        if not 1 <= int(first) <= int(last) <= 65_535:
            raise ValueError("must have ports from 1 to 65535, or ranges of them such as 5000-5010")
        host = None
        if who != "this":
            with suppress(ValueError):
                host = int(IPv6Address(who))
            if host is None or not 1 < host < 1 << 64:
                raise ValueError(f"has {who}: a LAN host is written as the lower half of its address, such as ::22, this machine as `this`")
        openings.append(Opening(host, protocol, int(first), int(last)))
    return tuple(openings)


def firewall_rules(table: str, device: str, openings: Iterable[Opening]) -> str:
    """Returns the table in nft's language. Of what comes from the device it admits what RFC 4890 and the openings say, and answers.

    A probe of the server, which is no hop away, has the hop limit 255 that nothing forwarded has (RFC 5082). An error about a connection
    of ours is "related" and not counted as a ping; one about something else might be a sweep.
    """
    opened: dict[bool, str] = {False: "", True: ""}  # by whether it is this machine
    for host, protocol, first, last in openings:
        target = "" if host is None else f"ip6 daddr & ::ffff:ffff:ffff:ffff == {IPv6Address(host)} "
        opened[host is None] += f"{target}{protocol} dport {first}-{last} ct state new accept\n"
    probes = "icmpv6 type echo-request ip6 hoplimit 255 accept\n"
    hooks = "".join(
        f"""
        chain {hook} {{
            type filter hook {hook} priority filter; policy accept;
            iifname != "{device}" accept
            {rules}goto rest
        }}"""
        for hook, rules in (("input", f"{probes}jump common\n{opened[True]}"), ("forward", f"jump common\n{opened[False]}"))
    )
    return f"""table inet {table} {{
        set pinging {{ type ipv6_addr; size 1024; flags dynamic,timeout; timeout 10s; }}
        chain pings {{
            update @pinging {{ ip6 saddr & ffff:ffff:ffff:ffff:: limit rate over {PINGS_PER_SOURCE_PER_S}/second }} drop
            limit rate {PINGS_PER_S}/second accept
            drop
        }}
        chain common {{
            ct state established,related accept
            icmpv6 type {{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem, echo-request }} goto pings
            ct state invalid drop
        }}
        chain rest {{ limit rate {REFUSALS_PER_S}/second reject with icmpv6 type admin-prohibited; drop; }}{hooks}
    }}"""


class Firewall:
    """Keeps the table of a client's device in nftables, from `open` to `close`. Touches no other table."""

    def __init__(self, device: str, wanted: bool, openings: Iterable[Opening], on_failure: Callable[[KernelError], None]) -> None:
        """`on_failure` is called when somebody has removed the table and it can't be put back."""
        self._name = device if device == "tun6" else f"tun6-{device}"  # nft takes a name like ip or 6in4 for another word
        self._remove = f"table inet {self._name}\ndelete table inet {self._name}\n"  # also when there is none
        self._rules = firewall_rules(self._name, device, openings) if wanted else ""
        self._on_failure = on_failure
        self._one_at_a_time = gevent.lock.Semaphore()
        self._listing = ""  # of the table as we made it; "" while it is not open

    def figures(self) -> dict[str, Any]:
        """Returns what `status` says of it."""
        return {"table": f"inet {self._name}", "active": bool(self._listing)}

    def open(self) -> None:
        """Makes the table, before the first packet can come, in place of one that a killed tun6 has left. Raises KernelError."""
        if self._rules:
            self._listing = self._make()
        else:
            with suppress(KernelError):  # mostly there is none, or not even nft
                self._nft("-f -", f"delete table inet {self._name}\n")
                log.info("removing the firewall's table inet %s, which a killed tun6 has left", self._name)

    def close(self) -> None:
        """Removes the table."""
        was_open, self._listing = bool(self._listing), ""
        if self._rules:
            try:
                self._nft("-f -", self._remove)
            except KernelError as error:
                log.log(logging.ERROR if was_open else logging.DEBUG, "the firewall's table inet %s is left: %s", self._name, error)

    def is_there(self) -> bool:
        """Returns whether there is such a table, whoever made it."""
        with suppress(KernelError):
            return bool(self._list())
        return False

    def watch(self) -> None:
        """Puts the table back whenever somebody has removed or changed it, as `nft flush ruleset` does. Runs until it is killed."""
        if not self._rules:
            return
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
                sock.bind((0, NFTABLES_GROUP))
                while True:
                    if self._is_concerned(sock):
                        with gevent.Timeout(NFT_SETTLE_S, False):
                            while True:  # the other messages about the same change
                                self._is_concerned(sock)
                        self._restore()
        except OSError as error:
            log.warning("what others do to the firewall can't be watched: %s", error.strerror)

    def _is_concerned(self, sock: socket.socket) -> bool:
        """Waits for the kernel's next message about a change, and returns whether it names our table."""
        try:
            return self._name.encode() + b"\0" in sock.recv(1 << 16)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return True  # it had more messages than we read

    def _restore(self) -> None:
        with suppress(KernelError):  # it is not there
            if self._list() == self._listing:
                return
        if self._listing:  # it is open, also after that switch
            try:
                self._listing = self._make()
                why = "`nft flush ruleset` does that, and with it each restart of nftables.service"
                log.warning("somebody removed or changed the firewall's table inet %s; it is back (%s)", self._name, why)
            except KernelError as error:
                self._on_failure(error)

    def _make(self) -> str:
        """Makes or replaces the table in one transaction, and returns its listing."""
        self._nft("-f -", self._remove + self._rules + "\n")
        return self._list()

    def _list(self) -> str:
        return self._nft(f"-s -t list table inet {self._name}")

    def _nft(self, arguments: str, text: str = "") -> str:
        """Runs nft, to its end even when the caller is killed, and returns its output. Raises KernelError."""
        return cast(str, gevent.spawn(self._run, ["nft", *arguments.split()], text).get())

    def _run(self, command: list[str], text: str) -> str:
        try:
            with self._one_at_a_time:
                done = run_in_thread(run_program, command, text)
            if not done.returncode:
                return done.stdout
            reason = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[0]
        except OSError as error:
            reason = error.strerror or str(error)
        except subprocess.TimeoutExpired:
            reason = f"it did not end within {IP_S:.0f} s"
        raise KernelError(f"the firewall can't be set, `nft` failed: {reason}")


# ---- lan -------------------------------------------------------------------------------------------------------------

RUNTIME_FOLDER = Path(
    os.environ.get("RUNTIME_DIRECTORY", "/run/tun6")
)  # for what does not outlive a reboot, as sysctls and addresses don't
IPV6_CONF = Path("/proc/sys/net/ipv6/conf")
LAN_CHECK_S = 1.0  # between two looks at the interface, its address, radvd and forwarding
LISTEN_S = 3.0  # for other routers on the LAN, before the first announcement
LISTEN_PAUSE_S = 0.01  # behind each router advertisement, of which anybody there may send a flood
LAN_GRACE_S = 10.0  # without a tunnel until the announcement is withdrawn, where `grace` is off
PROVE_HOPS, PROVE_AGAIN_S, PROVE_S = 8, 1.0, 10.0  # how far the Internet is probed; between two rounds; before silence is accepted
RADVD_START_S = 0.3  # from its start until SIGHUP does not end it any more
RADVD_END_S = 1.5  # for radvd, which says goodbye to the LAN at its end and takes 10 ms
ROUTER_LIFETIME_S, PREFERRED_S, VALID_S = 1800, 2700, 5400  # RFC 4861 section 6.2.1; RFC 9096 section 3.4 for those of a prefix
OLD_PREFIXES_MAX = 8  # earlier prefixes that are announced as such: all options are to fit one packet
OLD_STEP_S = 600  # in which the lifetime of an earlier prefix falls; radvd's DecrementLifetimes leaves out what is not preferred
RDNSS_LIFETIME_S = 1200  # RFC 8106 section 5.1: twice MaxRtrAdvInterval, which is 600 s in radvd


class Announcement(NamedTuple):
    """What the hosts of the LAN are told."""

    interface: str
    routed: bool  # whether we are their router at the moment
    prefix: IPv6Network
    old: dict[IPv6Network, int]  # prefixes that the client had -> seconds for which the hosts may keep their addresses
    mtu: int
    dns: Sequence[IPv6Address]
    preference: str  # low, medium or high: RFC 4191

    def radvd_conf(self) -> str:
        """Returns the file for radvd, see radvd.conf(5)."""
        lines = [
            f"AdvSendAdvert on; AdvDefaultLifetime {ROUTER_LIFETIME_S if self.routed else 0}; AdvDefaultPreference {self.preference};",
            f"AdvLinkMTU {self.mtu};",
            f"prefix {self.prefix} {{ AdvPreferredLifetime {PREFERRED_S if self.routed else 0}; AdvValidLifetime {VALID_S};"
            " DeprecatePrefix on; };",
        ]
        for prefix, seconds in self.old.items():
            lines.append(f"prefix {prefix} {{ AdvPreferredLifetime 0; AdvValidLifetime {seconds}; }};")
        if self.dns:
            servers = " ".join(map(str, self.dns))
            lines.append(f"RDNSS {servers} {{ AdvRDNSSLifetime {RDNSS_LIFETIME_S if self.routed else 0}; }};")
        return "".join([f"interface {self.interface} {{\n", *(f"    {line}\n" for line in lines), "};\n"])


def lan_address_plan(interface: str, prefix: IPv6Network) -> list[Step]:
    """The address that is announced. Where the kernel takes router advertisements, it learns another one, and a route, from our own.

    The TUN has the address, too, so that the machine keeps it while the interface is missing or down.
    """
    learned = (f"route flush root {prefix} dev {interface} proto kernel", f"addr flush dev {interface} to {prefix} dynamic")
    address = f"{prefix[1]}/64 dev {interface}"
    return [*(Step(forget, forget) for forget in learned), Step(f"addr add {address} nodad", f"addr del {address}")]


def forwarding_plan(conf: dict[str, str], lan: str, lan_is_uplink: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the sysctls to write, in this order, to turn forwarding on, and those that put it all back.

    `conf` has the sysctls forwarding and accept_ra as they are, such as "eth0/accept_ra". An interface that takes router advertisements
    goes on to do so, which a machine that forwards does only with the value 2; but our LAN only if the machine's uplink is there.
    """
    if conf.get("all/forwarding") == "1":
        return {}, {}
    others = {f"{name}/accept_ra" for name in ("all", "lo", *(() if lan_is_uplink else (lan,)))}
    accepting = [name for name, value in conf.items() if name.endswith("/accept_ra") and value == "1" and name not in others]
    forwarding = [name for name, value in conf.items() if name.endswith("/forwarding") and value == "1"]  # all/forwarding resets these
    back = {"all/forwarding": "0", **dict.fromkeys(forwarding, "1"), **dict.fromkeys(accepting, "1")}
    return {**dict.fromkeys(accepting, "2"), "all/forwarding": "1"}, back


def has_ra_route(routes: str, interface: str) -> bool:
    """Returns whether the interface has a default route by router advertisements, in the text of /proc/net/ipv6_route."""
    ra_default = 0x0001_0000 | 0x0004_0000  # RTF_DEFAULT, RTF_ADDRCONF, linux/ipv6_route.h
    fields = (line.split() for line in routes.splitlines())
    return any(int(each[8], 16) & ra_default == ra_default and each[9] == interface for each in fields if len(each) == 10)


def probe_hops(sock: socket.socket, packet_info: bytes, base: int, hops: int) -> Iterator[tuple[int, int, str]]:
    """Sends an echo request to a far address with each hop limit up to `hops`, and yields what comes within PROVE_AGAIN_S.

    That is: the hop limit, the type of the answer, its sender. The requests have the numbers behind `base`.
    """
    for each in range(1, hops + 1):
        send_echo(sock, packet_info, each, FAR_ADDRESS, base + each)
    deadline = time.monotonic() + PROVE_AGAIN_S
    with suppress(socket.timeout):
        while True:
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
            message, (sender, *_) = sock.recvfrom(IPV6_HEADER + 64)
            number = echo_number(message)
            if number is not None and number - base in range(1, hops + 1):
                yield number - base, message[0], sender


def wait_for_internet(lan: str, device: str, source: IPv6Address) -> None:
    """Returns when something behind the server has answered through this tunnel: the router where a hop limit ends, whichever it is.

    When there is only silence it returns after PROVE_S; while the server itself says that there is no way, never. Raises OSError.
    """
    silent_until, base, server, refused = time.monotonic() + PROVE_S, random.getrandbits(28) << 4, "", False
    packet_info = source.packed + struct.pack("i", system_socket.if_nametoindex(device))
    with open_icmpv6(UNREACHABLE, TIME_EXCEEDED, ECHO_REPLY) as sock:
        while refused or time.monotonic() < silent_until:
            for hop, kind, sender in probe_hops(sock, packet_info, base, PROVE_HOPS):
                if hop == 1:
                    server = sender
                elif kind != UNREACHABLE or server not in ("", sender):
                    return
                elif server and not refused:
                    refused = True
                    log.warning("LAN %s: the server has no way to the Internet, so the hosts are not told of it yet", lan)
    log.warning("LAN %s: nothing behind the server answers; the hosts are told of the tunnel all the same", lan)


def find_other_routers(interface: str) -> Iterator[str]:
    """Asks the IPv6 routers on an interface to speak, and yields each other one as often as it does. Raises OSError."""
    with open_icmpv6(ROUTER_ADVERTISEMENT) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        with suppress(OSError):  # it has no address yet
            sock.sendto(struct.pack(">BBHI", ROUTER_SOLICITATION, 0, 0, 0), ("ff02::2", 0))
        while True:
            message, (sender, *_) = sock.recvfrom(64)
            router = IPv6Address(sender.partition("%")[0])
            if any(message[6:8]) and router.is_link_local and (interface, router) not in machine_addresses():  # with a lifetime
                yield str(router)
            gevent.sleep(LISTEN_PAUSE_S)


def wait_for_radvd(ended: Callable[[], bool]) -> None:
    """Returns when it has ended, and after RADVD_END_S at the latest."""
    deadline = time.monotonic() + RADVD_END_S
    while not ended() and time.monotonic() < deadline:
        gevent.sleep(0.01)


def end_stale_radvd(folder: Path) -> None:
    """Ends the radvd of a killed client, which lives only where there is no `setpriv`."""
    pid, conf = read_text(folder / "radvd.pid"), str(folder / "radvd.conf")
    command = Path(f"/proc/{pid}/cmdline")
    if pid.isdigit() and conf in read_text(command):
        with suppress(OSError):
            os.kill(int(pid), signal.SIGTERM)
        wait_for_radvd(lambda: conf not in read_text(command))


class Radvd:
    """radvd as a child, which tells the hosts of a LAN an Announcement until it is ended."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError when there is no radvd."""
        self._program = shutil.which("radvd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))
        if self._program is None:
            raise ConfigError("[client] lan: the program radvd is missing; install it with `apt-get install radvd`")
        self._folder, self._conf, self._pid = folder, folder / "radvd.conf", folder / "radvd.pid"
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._restarts = TokenBucket(REPAIRS_MAX, REPAIRS_S)
        self._failed = False  # which the log has said
        self.told: Announcement | None = None

    def tell(self, announcement: Announcement) -> None:
        """Tells the hosts, if it is not what they know, and starts it again if it has ended. To be called once a second. Raises OSError."""
        running = self._process is not None and self._process.poll() is None
        if running and time.monotonic() - self._started < RADVD_START_S:  # SIGHUP would end it
            return
        if announcement != self.told:
            new = self._conf.with_suffix(".new")
            new.touch(SECRET_MODE)  # radvd refuses a file that others may write
            new.write_text(announcement.radvd_conf())
            new.replace(self._conf)
            self.told = announcement
            if running and self._process:
                self._process.send_signal(signal.SIGHUP)
        if self._process is None:
            self._start()
        elif not running and self._restarts.take():
            if not self._failed:
                self._failed = True
                last = "".join(read_text(self._folder / "radvd.log").splitlines()[-1:])
                name, status = announcement.interface, self._process.returncode
                log.error("LAN %s: radvd ended with %d; it is started again: %s", name, status, last)
            self._start()

    def repeat(self) -> None:
        """With the next `tell` the hosts are told again what they know."""
        self.told = None

    def _start(self) -> None:
        """Starts it in this thread, the main one: `setpriv` ends it when that ends, in whatever way."""
        setpriv = shutil.which("setpriv")
        command = [*([setpriv, "--pdeathsig", "TERM", "--"] if setpriv else ()), cast(str, self._program), "-n", "-m", "stderr"]
        with open(self._folder / "radvd.log", "wb") as errors:
            self._process = subprocess.Popen(
                [*command, "-C", str(self._conf), "-p", str(self._pid)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # so that Ctrl-C does not reach it
            )
        self._started = time.monotonic()

    def end(self) -> None:
        """Ends it. It tells the hosts that we are no router any more."""
        process = self._process
        if process and process.poll() is None:
            process.terminate()
            wait_for_radvd(lambda: process.poll() is not None)
            if process.poll() is None:
                process.kill()
                process.wait()


class LanChanges:
    """What we change on the machine for a LAN: sysctls and an address. It stands in a file from before each change until it is undone."""

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self._kernel, self._folder = kernel, folder
        self._file = JsonFile(str(folder / "changes.json"), "changes", 0o644)
        self.interface = ""
        self.prefix: IPv6Network | None = None  # whose ::1 the interface has from us
        self.sysctls: dict[str, str] = {}  # as they were
        self.process = 0  # which has changed them
        self.index = 0  # of the interface when it was there last, whose name others may change

    def find(self) -> bool:
        """Reads what a client has written. Returns whether that one still lives."""
        with suppress(ConfigError, ValueError, KeyError, TypeError):
            left = dict(self._file.load())
            self.prefix = IPv6Network(left["prefix"]) if left["prefix"] else None
            self.interface, self.sysctls = left["interface"], dict(left["sysctls"])
            self.process, self.index = int(left["process"]), int(left["index"])
        return self.process not in (0, os.getpid()) and Path(f"/proc/{self.process}").exists()  # the first as in Kernel.remove_stale

    def save(self) -> None:
        """Saves what is to be undone. Raises KernelError."""
        prefix = str(self.prefix) if self.prefix else ""
        where = {"process": os.getpid(), "interface": self.interface, "index": self.index}
        try:
            self._folder.mkdir(0o755, parents=True, exist_ok=True)
            self._file.save({**where, "prefix": prefix, "sysctls": self.sysctls})
        except (OSError, StorageError) as error:
            raise KernelError(f"what `lan` changes on this machine can't be remembered: {describe_end(error)}") from None

    def write(self, sysctls: dict[str, str]) -> None:
        """Writes sysctls in a thread, as they wait for a lock of the kernel. One that can't be written stays as it is."""

        def write() -> None:
            for name, value in sysctls.items():
                try:
                    (IPV6_CONF / name).write_text(value)
                except OSError as error:  # the interface has gone
                    log.debug("%s can't be set to %s: %s", name, value, error.strerror)

        run_in_thread(write)

    def undo(self) -> None:
        """Undoes everything, and removes the folder."""
        name = self.interface
        with suppress(OSError):  # it has gone
            name = system_socket.if_indextoname(self.index)
        if self.prefix:
            self._kernel.undo(lan_address_plan(name, self.prefix))
        self.write({re.sub(f"^{re.escape(self.interface)}/", f"{name}/", sysctl): value for sysctl, value in self.sysctls.items()})
        self.interface, self.prefix, self.sysctls = "", None, {}
        with suppress(OSError):
            for path in (*self._folder.glob("radvd.*"), *self._folder.glob("changes.*")):
                path.unlink(missing_ok=True)
            self._folder.rmdir()


class LanRouter:
    """Makes this machine the IPv6 router of one LAN, for whose hosts it is one only while the tunnel works.

    What happens outside (to the tunnel, the interface, what others remove) only changes fields; one greenlet then makes the LAN what it
    is to be.
    """

    def __init__(
        self, kernel: Kernel, interface: str | None, tun: str, mtu: int, dns: Sequence[IPv6Address], preference: str, grace: float | None
    ) -> None:
        """`interface` None: there is no LAN, and only what a killed client has left is cleared. Raises ConfigError."""
        self._folder = RUNTIME_FOLDER / f"{tun}-{os.stat('/proc/self/ns/net').st_ino}"  # each network namespace has its own
        if interface == tun:
            raise ConfigError(f"[client] lan = {interface}: that is the tunnel's own device; name the interface of the LAN, such as eth1")
        self._kernel, self._interface, self._mtu, self._dns, self._preference = kernel, interface or "", mtu, dns, preference
        self._changes = LanChanges(kernel, self._folder)
        self._radvd = Radvd(self._folder) if interface else None
        self._grace_s = LAN_GRACE_S if grace is None else grace
        self._repairs = TokenBucket(REPAIRS_MAX, REPAIRS_S)
        self._index = 0  # of the interface, 0 while it can't be used
        self._missing = ""  # why it can't, which the log has said
        self._quiet_at = 0.0  # when other routers have been listened for
        self._other_router: str | None = None
        self._prefix: IPv6Network | None = None
        self._old: dict[IPv6Network, float] = {}  # earlier prefixes, and when their addresses end
        self._up, self._lost = False, 0.0  # whether there is a tunnel; when there was one last
        self._proven = self._announced = False  # whether the Internet answered through it; whether the hosts know
        self._changed = gevent.event.Event()
        self._workers: dict[str, gevent.Greenlet] = {}

    def figures(self) -> dict[str, Any]:
        """Returns what `status` says of the LAN."""
        announces = str(self._prefix) if self._announced and self._prefix else None
        return {"interface": self._interface, "missing": self._missing or None, "announces": announces, "other_router": self._other_router}

    def begin(self) -> None:
        """Clears what killed clients have left, and turns forwarding on. Raises KernelError.

        The TUN is there: no other client lives that has one of this name, and so this folder.
        """
        for folder in RUNTIME_FOLDER.glob(f"*-{self._folder.name.rpartition('-')[2]}"):
            left = LanChanges(self._kernel, folder)
            if not left.find() or folder == self._folder:
                log.info("removing what a killed tun6 has left for its LAN %s", left.interface or folder)
                end_stale_radvd(folder)
                left.undo()
            elif left.interface == self._interface:  # each would take the hosts' route away when the other one has a tunnel
                raise KernelError(f"[client] lan = {self._interface}: another tun6 client is that LAN's router, process {left.process}")
        if self._interface:
            self._changes.interface = self._interface
            self._turn_forwarding_on()
            if read_text(IPV6_CONF / "all/forwarding") != "1":
                raise KernelError("IPv6 forwarding can't be turned on, which `lan` needs; make /proc/sys writable in this container")
            self._work("run", self._run)

    def tunnel_up(self, device: str, prefix: IPv6Network) -> None:
        """There is a tunnel, out of this device."""
        if not self._interface:
            return
        if self._prefix and self._prefix != prefix and self._announced:
            self._old[self._prefix] = time.monotonic() + VALID_S
        self._old.pop(prefix, None)
        self._old = dict(list(self._old.items())[-OLD_PREFIXES_MAX:])
        self._prefix, self._up, self._proven = prefix, True, self._announced
        self._work("prove", self._prove, device, prefix[1])
        self._changed.set()

    def tunnel_down(self, final: bool = False) -> None:
        """There is none. `final`: the server won't have this client, so that the hosts are told at once, not after `grace`."""
        if self._up:
            self._up, self._lost = False, time.monotonic()
            self._workers["prove"].kill()
        if final:
            self._lost = -math.inf
        self._changed.set()

    def close(self) -> None:
        """Tells the hosts that we are no router any more, and undoes everything."""
        gevent.killall(list(self._workers.values()))
        if self._radvd and self._changes.interface:  # else we have not begun
            self._radvd.end()
            self._changes.undo()

    def _work(self, name: str, function: Callable[..., None], *arguments: object) -> None:
        """Starts a greenlet, instead of an earlier one of this name."""
        if name in self._workers:
            self._workers[name].kill()
        self._workers[name] = gevent.spawn(function, *arguments)

    def _run(self) -> NoReturn:
        """Makes the LAN what it is to be, at each change and once a second, until it is killed."""
        failed = ""  # why that could not be, which the log has said
        while True:
            try:
                self._look_at_interface()
                self._keep_forwarding()
                if self._prefix:
                    self._keep_address(self._prefix)
                    self._decide(self._prefix)
                    self._tell(self._prefix)
                failure = ""
            except (Tun6Error, OSError) as error:
                failure = describe_end(error)
                if failure != failed:
                    log.warning("LAN %s: %s", self._interface, failure)
            failed, now = failure, time.monotonic()
            self._changed.wait(min([LAN_CHECK_S, *(at - now for at in (self._quiet_at, self._lost + self._grace_s) if at > now)]))
            self._changed.clear()

    def _look_at_interface(self) -> None:
        """Notes whether it is there and up, which may change at any time, as with a USB adapter."""
        name, index, missing = self._interface, 0, ""
        try:
            index = system_socket.if_nametoindex(name) if is_up(name) else 0
            missing = "" if index else "it is down"
        except OSError:
            missing = "there is no such interface"
        if missing and missing != self._missing:
            log.warning("LAN %s: %s; the tunnel works without it, and it is used as soon as that changes", name, missing)
        elif self._missing and not missing:
            log.info("LAN %s: it is there now", name)
        self._missing = missing
        if index and index != self._index:
            self._changes.prefix, self._other_router, self._quiet_at = None, None, time.monotonic() + LISTEN_S
            if index != self._changes.index:  # radvd changes these
                self._changes.index = index
                self._changes.sysctls.update({f"{name}/{key}": read_text(IPV6_CONF / name / key) for key in ("mtu", "hop_limit")})
            self._work("listen", self._listen)
        self._index = index

    def _turn_forwarding_on(self) -> None:
        """Remembers the sysctls that this changes, unless they have been changed already. Raises KernelError."""
        paths = [path for key in ("forwarding", "accept_ra") for path in IPV6_CONF.glob(f"*/{key}")]
        conf = {f"{path.parent.name}/{path.name}": read_text(path) for path in paths}
        uplink = has_ra_route(read_text(Path("/proc/net/ipv6_route")), self._interface)
        forward, before = forwarding_plan(conf, self._interface, uplink)
        self._changes.sysctls = {**before, **self._changes.sysctls}
        self._changes.save()
        self._changes.write(forward)

    def _keep_forwarding(self) -> None:
        if read_text(IPV6_CONF / "all/forwarding") == "0" and self._repairs.take():
            log.warning("LAN %s: somebody turned IPv6 forwarding off, which `lan` needs; it is on again", self._interface)
            self._turn_forwarding_on()
            if self._radvd:  # meanwhile it may have told them that we are no router
                self._radvd.repeat()

    def _keep_address(self, prefix: IPv6Network) -> None:
        before = self._changes.prefix
        if not self._index or (before == prefix and (self._has_address(prefix[1]) or not self._repairs.take())):
            return
        if before and before != prefix:
            self._kernel.undo(lan_address_plan(self._interface, before))
        self._changes.prefix = prefix
        self._changes.save()
        self._kernel.reapply(lan_address_plan(self._interface, prefix))
        if before == prefix:
            log.warning("LAN %s: somebody removed its address %s; it is back", self._interface, prefix[1])

    def _decide(self, prefix: IPv6Network) -> None:
        """Decides whether we are the hosts' router now."""
        now, was_announced = time.monotonic(), self._announced
        if not self._up:
            self._announced = was_announced and now - self._lost < self._grace_s
        elif self._proven and self._index and (now >= self._quiet_at or self._other_router):
            self._announced = True
        if self._announced and not was_announced:
            log.info("LAN %s: announces %s", self._interface, prefix)
        elif was_announced and not self._announced:
            log.warning("LAN %s: has no tunnel, so its hosts are told not to use %s any more", self._interface, prefix)

    def _tell(self, prefix: IPv6Network) -> None:
        """Tells the hosts what holds now; nothing before we are their router for the first time."""
        if self._radvd is None or not (self._announced or self._radvd.told):
            return
        now = time.monotonic()
        self._old = {old: end for old, end in self._old.items() if end > now}
        self._radvd.tell(
            Announcement(
                interface=self._interface,
                routed=self._announced,
                prefix=prefix,
                old={old: math.ceil((end - now) / OLD_STEP_S) * OLD_STEP_S for old, end in self._old.items()},
                mtu=min(self._mtu, int(read_text(Path(f"/sys/class/net/{self._interface}/mtu")) or self._mtu)),
                dns=self._dns,
                preference=self._preference if self._preference != "auto" else "low" if self._other_router else "medium",
            )
        )

    def _listen(self) -> None:
        """Notes the first other router on the LAN, which it asks to speak."""
        with suppress(OSError):  # the interface has gone
            self._other_router = next(find_other_routers(self._interface))
            advice = ", so its hosts are told to prefer that one; `lan_preference` in config.ini changes this"
            text = advice if self._preference == "auto" else ""
            log.warning("LAN %s: %s is an IPv6 router there already%s", self._interface, self._other_router, text)
            self._changed.set()

    def _has_address(self, address: IPv6Address) -> bool:
        return (self._interface, address) in machine_addresses()

    def _prove(self, device: str, source: IPv6Address) -> None:
        """Notes when the Internet has answered through the tunnel."""
        if not self._proven:
            with suppress(OSError):  # the device has gone
                wait_for_internet(self._interface, device, source)
                self._proven = True
                self._changed.set()


# ---- client ----------------------------------------------------------------------------------------------------------

RETRY_S = 2.0  # between two attempts to connect, on average, when all servers have failed
RETRY_JITTER = 0.5  # each pause is shorter or longer by up to this share, so that many clients don't come back in step
NEXT_SERVER_S = 0.3  # at most, until the next server is tried
FINAL_REFUSALS = {"denied", "revoked", "tls-required"}  # codes that the server will send again the next time
FINAL_RETRY_S = 60.0  # between two attempts when all servers have sent one of those
BUSY_REFUSALS = {"busy", "moved"}  # codes of a server that must not be asked too often
BUSY_RETRY_MAX_S = 30.0  # to which pauses are doubled when there was one of those
CONNECT_S = 10.0  # for one TCP connect
CONNECT_NEXT_S = 3.0  # the same, while another server could be tried instead: two SYNs, RFC 6298 section 2
SMALL_MSS = 1220  # bytes of a TCP segment that most paths take: it makes IPv4 packets of 1,260
SHAPED = 0.95  # of the line's rate, so that what waits waits here and not in its modem
LOOKUP_S = 2.0  # for a lookup of the server's name before its last good address, or another server, is tried


class RemoteHost(NamedTuple):
    """A server as `remotehost` names it."""

    host: str  # name or IPv4 address
    port: int | None  # None: that of `remoteport`


@dataclass(frozen=True)
class ClientConfig:
    """The section [client] of config.ini, whose path is `file`. A new setting is a field here and a parser in _PARSERS."""

    remotehost: tuple[RemoteHost, ...]
    remoteport: int
    id: str | None = None
    congestion: str = "auto"
    link: str = "auto"
    offload: str = "auto"
    tun: str = "tun6"
    mtu: int = 1500
    default_route: bool = True
    lan: str | None = None
    lan_dns: tuple[IPv6Address, ...] = ()
    lan_preference: str = "auto"
    firewall: bool | None = None  # None: with `lan`
    open: tuple[Opening, ...] = ()
    grace: int | None = 10  # seconds; None: for ever
    mss: int | None = None
    rate_up: int | None = None  # bits/s of the line to the Internet
    rate_down: int | None = None
    dead_after: int = DEAD_AFTER_S
    tls: bool = False
    fingerprint: tuple[str, ...] = ()  # each server has to have one of them
    key: str | None = None
    hook: str | None = None
    control: str = "/run/tun6/client.sock"
    log: str = "text"
    metrics: tuple[str, int] | None = None  # address, port
    documentation_addresses: bool = False
    file: str = "config.ini"


def path_of_last(what: str, file: str) -> Path:
    """Returns where something is remembered until the next start: beside config.ini or, as a service (systemd.exec(5), STATE_DIRECTORY),
    in its folder for state.
    """
    folder, name = os.path.split(file)
    return Path(os.environ.get("STATE_DIRECTORY", folder), f"{name}.last-{what}")


def warn_of_another_id(path: Path, id_: str, remember: bool) -> None:
    """Compares the Id, which nobody has set, with that of the last start, which this file is for."""
    try:
        last = path.read_text("utf-8").strip() if path.exists() else id_
        if last != id_:
            log.warning("the Id is %s and was %s at the last start: it gets another prefix; set `id` in config.ini", id_, last)
        if remember and (last != id_ or not path.exists()):
            path.write_text(f"{id_}\n", "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        log.debug("%s: %s; a change of the Id will not be noticed", path, error)


class Failure(NamedTuple):
    """Why a server does not serve."""

    code: str  # of its refusal; "?" for what it or this machine does wrong, "" for no connection
    reason: str  # for people


class Failover:
    """Which of its servers a client tries next, and after which pause. It knows them by their number, and neither sockets nor clocks.

    The next one is tried at once; when each has been tried in vain since the last pause, there is a pause. One that fails goes last, and
    never out.
    """

    def __init__(self, servers: int, last: int | None = None) -> None:
        """`last`: the one that served last."""
        self._order = random.sample(range(servers), servers)  # so that not all clients begin with the same
        self._order.sort(key=lambda each: each != last)
        self._busy_pause_s = RETRY_S  # the next pause, if a server is busy
        self.failures: dict[int, Failure] = {}  # of those that were tried since the last pause or session that lasted, by server
        self.pause_s = 0.0  # on average, until the next attempt; 0 when the next server is tried at once

    @property
    def server(self) -> int:
        """The one that is tried now, or that serves."""
        return self._order[0]

    @property
    def is_last(self) -> bool:
        """Whether there will be a pause if this one fails."""
        return len(self._order) - len({} if self.pause_s else self.failures) <= 1

    @property
    def is_final(self) -> bool:
        """Whether every server has said what it will say again the next time."""
        return self.pause_s > 0 and self._codes() <= FINAL_REFUSALS

    @property
    def is_busy(self) -> bool:
        """Whether pauses grow, as a server is busy."""
        return self.pause_s > 0 and not self._codes().isdisjoint(BUSY_REFUSALS)

    def note_failure(self, failure: Failure, session_s: float | None = None, is_ours: bool = False) -> None:
        """Takes down why there is no session, or no more after `session_s` seconds. `is_ours`: no other server would help."""
        lasted = (session_s or 0.0) >= RETRY_S  # a session that ends at once is no better than none
        if self.pause_s or is_ours or lasted:
            self.failures = {}
        if session_s is not None:
            self._busy_pause_s = RETRY_S
        if is_ours or not lasted or len(self._order) == 1:
            self.failures[self.server] = failure
        if not is_ours:
            self._order.append(self._order.pop(0))
        if len(self.failures) < len(self._order) and not is_ours:
            self.pause_s = 0.0
        elif self._codes() <= FINAL_REFUSALS:
            self.pause_s = FINAL_RETRY_S
        elif self._codes() & BUSY_REFUSALS:
            self.pause_s = self._busy_pause_s
            self._busy_pause_s = min(2 * self.pause_s, BUSY_RETRY_MAX_S)
        else:
            self.pause_s = self._busy_pause_s = RETRY_S

    def _codes(self) -> set[str]:
        return {each.code for each in self.failures.values()}

    def pause(self) -> float:
        """Returns seconds to wait, at random, until the next attempt."""
        if not self.pause_s:
            return random.uniform(0, NEXT_SERVER_S)
        return self.pause_s * random.uniform(1 - RETRY_JITTER, 1 + RETRY_JITTER)


class RemoteServer:
    """A server that a client may connect to: how it is reached, and what is known of the path there."""

    def __init__(self, at: RemoteHost, config: ClientConfig, tls: ssl.SSLContext | None, mtus: MtuMonitor) -> None:
        """`tls` are the settings of TLS, None for plain connections."""
        self._config, self._tls, self._mtus = config, tls, mtus
        self.host, self._port = at.host, at.port or config.remoteport
        self.name = f"{self.host} port {self._port}"  # for the log
        self.last_good: list[tuple[str, int]] = []  # the address of the last connection
        self.dry = False  # whether it knows a dry hello
        self._lookup: gevent.Greenlet | None = None  # of its addresses, whose result nobody has seen
        self._mss = self._logged_mss = config.mss  # of the next connection, and that the log told of; None: as the kernel has it

    @contextmanager
    def watch_mtu(self, sock: socket.socket) -> Iterator[None]:
        """Looks after the size of packets, unless `mss` is set.

        Some servers don't notice that their large packets vanish, such as the original program. Such a one becomes silent while its
        kernel acknowledges all. Then the next connection has small segments, and the one after it not, if that did not help.
        """
        if self._config.mss:
            yield
            return
        try:
            with self._mtus.watch(sock, "the server"):
                yield
        except (gevent.Timeout, PeerSilent) as error:
            small = isinstance(error, PeerSilent) or self._tls  # a plain answer is small
            largest = read_tcp_info(sock, "I", 20)  # tcpi_rcv_mss: bytes of the largest segment that ever came
            if small and not is_unacknowledged(sock) and largest <= SMALL_MSS:
                self._mss = None if self._mss else SMALL_MSS
            raise

    def note_session(self, sock: socket.socket) -> None:
        """Remembers how it was reached."""
        self.last_good = [sock.getpeername()]
        if self._mss != self._logged_mss:
            log.warning(
                "perhaps large packets from the server vanish on the path: it is asked for segments of %s bytes", self._mss or "any"
            )
        self._logged_mss = self._mss

    def open_stream(self, sock: socket.socket) -> Stream:
        """Returns the stream to the right server, before anything is said to it. Raises ProtocolError, EOFError, OSError."""
        if self._tls is None:
            return Stream(sock)
        stream = TlsStream(sock, self._tls, self.host)
        if self._config.fingerprint and stream.fingerprint() not in self._config.fingerprint:
            raise ProtocolError(f"the server's certificate has another fingerprint, {stream.fingerprint()}; nothing was said to it")
        return stream

    def connect(self, is_last: bool = True) -> socket.socket:
        """Returns a connection to the first of its addresses that accepts it. `is_last`: there is no other server to be tried now.

        Raises gevent.Timeout, OSError.
        """
        for address in self.find_addresses(is_last):
            with ExitStack() as undo:
                sock = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                try:
                    found = self._mtus.found.get(address[0], math.inf) - IPV4_TCP_HEADERS
                    mss = self._config.mss or min(self._mss or math.inf, found)
                    if mss < math.inf:
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, int(mss))  # also limits what the server sends
                    with gevent.Timeout(CONNECT_S if is_last else CONNECT_NEXT_S):
                        sock.connect(address)
                except (gevent.Timeout, OSError) as error:
                    failure = error
                else:
                    undo.pop_all()
                    return sock
        raise failure

    def find_addresses(self, is_last: bool = True) -> list[tuple[str, int]]:
        """Returns its IPv4 addresses, as IPv6 ones would be routed into our TUN; the last good one comes last. `is_last`: as for `connect`.

        A lookup continues until it is answered, and no other begins meanwhile; each answer counts once, however late it comes.
        Raises OSError when there is no address.
        """
        if self._lookup is None:
            self._lookup = gevent.spawn(socket.getaddrinfo, self.host, self._port, socket.AF_INET, socket.SOCK_STREAM)
        lookup = self._lookup
        lookup.join(LOOKUP_S if self.last_good or not is_last else None)
        if lookup.ready():
            self._lookup = None
        if lookup.successful():
            return list(dict.fromkeys([*(address for *_, address in lookup.value), *self.last_good]))
        if not self.last_good:
            raise lookup.exception or OSError(errno.ETIMEDOUT, "no name server has answered yet")
        log.debug("%s: %s; trying the address that it had", self.host, lookup.exception or "no answer yet")
        return self.last_good


class Client:
    """Keeps a TUN, and a connection to the server whenever that can be reached."""

    def __init__(self, config: ClientConfig) -> None:
        """Raises ConfigError when the kernel does not have the congestion control, or the machine the firewall, that it asks for."""
        self._config = config
        firewall = config.lan is not None if config.firewall is None else config.firewall
        if firewall and not shutil.which("nft"):
            raise ConfigError(f"{config.file}: [client] has a firewall, which needs `nft`; install it with `apt-get install nftables`")
        if config.open and not firewall:
            raise ConfigError(f"{config.file}: [client] has `open` but no firewall, so everything is open; set `firewall = yes`")
        self._firewall = Firewall(config.tun, firewall, config.open, self._on_defect)
        self._congestion = find_congestion_controls(config.congestion, config.link)
        encrypted = config.tls or config.fingerprint or config.key
        tls = client_tls_context(pinned=bool(config.fingerprint)) if encrypted else None
        self._mtus = MtuMonitor()
        self.remotes = [RemoteServer(each, config, tls, self._mtus) for each in config.remotehost]
        last = self._recall_last()
        self._remembered = None if last is None else self.remotes[last]  # that which the next start begins with
        self._remembering: gevent.Greenlet | None = None  # as the disk may hang
        self._failover = Failover(len(self.remotes), last)
        self._id = config.id
        self._hooks = Hooks(config.hook)
        self._told: IPv6Network | None = None  # the last prefix that the hook was told of
        self._kernel = Kernel()
        self._monitor = DeviceMonitor()
        self._paths = PathMonitor(config.dead_after)
        self._lan = LanRouter(self._kernel, config.lan, config.tun, config.mtu, config.lan_dns, config.lan_preference, config.grace)
        self._epoch = 0  # of the last session, by which the next server knows that it is newer
        self._tun: Tun | None = None
        self._watched = 0  # the number by which the monitor knows the TUN
        self._tun_error: KernelError | None = None  # what somebody did to the TUN
        self._prefix: IPv6Network | None = None  # whose address the TUN has
        self._routes: list[Step] = []  # into the tunnel, as long as there is one
        self._withdrawal: gevent.Greenlet | None = None  # of the routes, after `grace`
        self._repairs = TokenBucket(REPAIRS_MAX, REPAIRS_S)
        self._changes = gevent.lock.RLock()  # held while address and routes are changed, so that nobody restores half of them
        self._session: Session | None = None
        self._not_offered: set[str] = set()  # GSO kinds of which our kernel refused frames
        self._peer_rate: int | None = None  # bits/s that the server sends at most, as it has said
        self._logged_outage: str | None = None  # kind of the outage that the log told of; None while connected
        self.handshakes: Counter[str] = Counter()  # by outcome: served, failed, or the code of the refusal
        self._since = time.monotonic()  # when the tunnel was there or was not any more
        self._up = False
        self._outage: dict[str, Any] | None = None  # the last one, as `figures` returns it
        parts = {"lan": config.lan and self._lan.figures, "firewall": firewall and self._firewall.figures}
        self.parts: dict[str, Callable[[], dict[str, Any]]] = {name: part for name, part in parts.items() if callable(part)}
        self._state = f"connecting to {self.remote.name}"

    @property
    def remote(self) -> RemoteServer:
        """The server that is tried now, or that serves."""
        return self.remotes[self._failover.server]

    def _recall_last(self) -> int | None:
        """Returns which of several servers served last, before this start."""
        with suppress(OSError, ValueError):
            if len(self.remotes) > 1:
                return [each.name for each in self.remotes].index(path_of_last("server", self._config.file).read_text("utf-8").strip())
        return None

    def _remember_last(self, remote: RemoteServer) -> None:
        """Remembers which of several servers serves, for the next start. Does not wait for the disk."""
        if len(self.remotes) > 1 and remote is not self._remembered and (self._remembering is None or self._remembering.dead):
            self._remembered = remote
            self._remembering = gevent.spawn(run_in_thread, self._write_last, remote.name)

    def _write_last(self, name: str) -> None:
        path = path_of_last("server", self._config.file)
        try:
            path.write_text(f"{name}\n", "utf-8")
        except OSError as error:
            log.debug("%s: %s; the next start begins with any server", path, error)

    def state(self) -> str:
        """Returns a line for the service manager."""
        return self._state

    def run(self) -> NoReturn:
        """Serves until it is killed, then removes the TUN. Raises KernelError when the TUN can't be made at the start."""
        self._kernel.remove_stale()
        self._monitor.watch("lo", lambda what, _: self._restore_rejects())
        works = [self._monitor.run, self._paths.run, self._mtus.run, trim_heap, self._firewall.watch, TRAFFIC.run]
        if self._config.lan:
            works.append(functools.partial(watch_other_firewalls, self._config.tun, lambda: self._prefix, "the LAN"))
        helpers = [gevent.spawn(work) for work in works]
        try:
            self._open_tun()
            self._lan.begin()
            service_manager.notify("READY=1")
            while True:
                try:
                    try:
                        self._run_session(self._tun or self._open_tun())
                    finally:
                        self._withdraw_later()
                except KernelError as error:  # somebody removed the device or what belongs to it: everything is made again
                    self._log_outage(error)
                    self._close_tun()
                except (SessionError, gevent.Timeout, EOFError, OSError) as error:
                    if isinstance(error, OffloadRefused):
                        self._not_offered.add(error.kind)
                    self._log_outage(error)
                gevent.sleep(self._failover.pause())
        finally:
            gevent.killall(helpers)
            self._lan.close()
            self._close_tun()
            self._hooks.close()

    def _open_tun(self) -> Tun:
        self._tun_error = None
        self._tun = Tun(self._config.tun)  # first, as a device of one name is only one program's
        self._firewall.open()
        self._kernel.apply(device_plan(self._tun.name, self._config.mtu))
        self._watched = self._monitor.watch(self._tun.name, self._on_removal)
        return self._tun

    def _close_tun(self) -> None:
        self._monitor.unwatch(self._watched)
        if self._withdrawal:
            self._withdrawal.kill()
        prefix, self._prefix = self._prefix, None
        routes, self._routes = self._routes, []
        if prefix and self._tun:
            self._kernel.undo([*address_plan(self._tun.name, prefix, os.getpid()), *routes])
        if self._tun:
            self._firewall.close()
            self._tun.close()
        self._tun = None

    def _withdraw_later(self) -> None:
        """Ends the routes into the tunnel after `grace`, unless there is a tunnel by then."""
        if self._routes and self._config.grace is not None and (self._withdrawal is None or self._withdrawal.dead):
            self._withdrawal = gevent.spawn_later(self._config.grace, self._withdraw)

    def _withdraw(self) -> None:
        """Ends the routes into the tunnel, so that new traffic fails at once, and discards what has waited for too long."""
        routes, self._routes = self._routes, []
        self._kernel.undo(routes)
        log.warning("no tunnel for %d s: IPv6 traffic is rejected until it is back", self._config.grace, extra=event("rejecting"))
        with suppress(OSError):  # the next session finds out
            while self._tun and self._tun.file.readinto(_tun_buffer):
                pass

    def _restore(self) -> bool:
        """Restores what somebody may have removed of the TUN's address and routes. Returns whether anything was missing."""
        with self._changes:
            if not self._tun:
                return False
            address = address_plan(self._tun.name, self._prefix, os.getpid()) if self._prefix else []
            again = self._kernel.reapply([*device_plan(self._tun.name, self._config.mtu), *address, *self._routes])
        return any(step.undo for step in again)

    def _restore_rejects(self) -> None:
        """Restores the routes that reject, in case it was one of these that somebody removed."""
        if self._prefix:
            self._kernel.reapply(reject_plan(self._prefix, os.getpid()))

    def _on_removal(self, what: str, address: bytes) -> None:
        if what == EVENTS_LOST:
            self._restore()
            return
        if what == ROUTE_REMOVED and not self._routes:  # we have removed it
            return
        if not self._tun or (address and self._prefix and address != self._prefix[1].packed):  # we have removed an earlier one ourselves
            return
        if what != DEVICE_REMOVED:
            if not self._restore() and what != DEVICE_SET_DOWN:  # nothing was missing
                return
            if self._repairs.take():
                log_repair(self._tun.name, what)
                return
        self._on_defect(KernelError(f"TUN device {self._tun.name}: {what}"))

    def _on_defect(self, error: KernelError) -> None:
        """Ends the session, and everything is made again before the next one."""
        self._tun_error = error
        if self._session:
            self._session.close(error)

    def _run_session(self, tun: Tun) -> NoReturn:
        """Connects and runs the session. Raises the reason of its end."""
        if self._tun_error:
            raise self._tun_error
        if self._id is None:
            self._id = default_id()
            warn_of_another_id(path_of_last("id", self._config.file), self._id, remember=True)
        remote = self.remote
        with remote.connect(self._failover.is_last) as sock, remote.watch_mtu(sock):
            set_tcp_options(sock, self._config.dead_after)
            with gevent.Timeout(HANDSHAKE_S):
                stream = remote.open_stream(sock)
                offered = tun.gso_kinds & OFFLOADS[self._config.offload] - self._not_offered
                hello: dict[str, Any] = {"Id": self._id, "Offload": sorted(offered)}
                if self._config.key:
                    hello["Key"] = self._config.key
                if self._epoch:
                    hello["Epoch"] = self._epoch
                if len(self.remotes) > 1:
                    hello["Moved"] = True
                if self._config.rate_down:
                    hello["Rate"] = round(SHAPED * self._config.rate_down)
                stream.send(encode_message(hello))
                message, trailing = receive_message(stream)
            prefix, gso_kinds = parse_answer(message)
            remote.dry = message.get("Dry") is True
            self._epoch = parse_epoch(message) or self._epoch
            tun.set_offload(gso_kinds)
            with self._changes:
                self._set_prefix(tun, prefix)
                self._open_routes(tun)
            self._lan.tunnel_up(tun.name, prefix)
            begin = {"id": self._id, "peer": remote.name, "prefix": prefix, "device": tun.name, "security": stream.security[7:] or "plain"}
            text = quote_id(self._id), remote.name, prefix, tun.name, stream.security
            log.info("%s at %s: has %s on %s%s", *text, extra=event("session-begin", **begin))
            remote.note_session(sock)
            self._logged_outage = None
            self._note_state(True)
            self._state = f"has {prefix} on {tun.name} from {remote.name}{stream.security}"
            self._remember_last(remote)
            self._session = Session("the server")
            self._session.wire_rate = self._config.rate_up and round(SHAPED * self._config.rate_up)
            self._note_peer_rate(parse_wire_rate(message))
            if self._tun_error:
                raise self._tun_error
            with self._announce(self._id, prefix, tun), self._paths.watch(self._session, PeerPath(tun.name, prefix[1], FAR_ADDRESS, 1)):
                ingress_filter = IngressFilter(prefix, from_client=False)
                raise self._session.run(stream, tun, ingress_filter, self._congestion, offered, gso_kinds, trailing)

    def _note_peer_rate(self, rate: int | None) -> None:
        """Takes down what the server has said that it sends at most, and warns if it has not said so."""
        self._peer_rate = rate
        standing_warnings.pop("rate_down", None)
        if self._config.rate_down and rate is None:
            text = "%s does not know rate_down, as it is older than this setting: downloads may wait before the line"
            warn_standing("rate_down", text, self.remote.name)

    @contextmanager
    def _announce(self, id_: str, prefix: IPv6Network, tun: Tun) -> Iterator[None]:
        """Runs the hook for a session that begins, and at the end of the block for its end."""
        values: dict[str, Any] = {"prefix": prefix, "device": tun.name, "peer": self.remote.name}
        if prefix != self._told and self._hooks.run("prefix", id_, old_prefix=self._told or "", **values):
            self._told = prefix
        if not self._hooks.run("up", id_, **values):
            yield
            return
        reason = "the client stops"
        try:
            yield
        except Exception as error:
            reason = describe_end(error)
            raise
        finally:
            self._hooks.run("down", id_, True, reason=reason, **values)

    def _set_prefix(self, tun: Tun, prefix: IPv6Network) -> None:
        if prefix == self._prefix:
            self._restore()  # in case that nobody told us of a removal
            return
        old, self._prefix = self._prefix, prefix  # set first, so that a kill meanwhile undoes the plan
        if old:
            log.warning("the server changed our prefix from %s to %s", old, prefix, extra=event("prefix-changed", prefix=prefix))
            routes, self._routes = self._routes, []
            self._kernel.undo([*address_plan(tun.name, old, os.getpid()), *routes])
        self._kernel.apply(address_plan(tun.name, prefix, os.getpid()))

    def _open_routes(self, tun: Tun) -> None:
        if self._withdrawal:
            self._withdrawal.kill()
        if not self._routes:
            self._routes = tunnel_plan(tun.name, self._config.default_route, os.getpid())  # set first, so that a kill undoes the plan
            self._kernel.apply(self._routes)

    def _log_outage(self, error: BaseException) -> None:
        """Logs why there is no connection: once an outage, once when no server serves, and again when that has other reasons, such as
        when silence becomes a refusal or a wrong server, or back.
        """
        failed, failover, text = self.remote, self._failover, describe_end(error)
        code = error.code if isinstance(error, Refusal) else "?" if isinstance(error, (ProtocolError, KernelError)) else ""
        session_s = time.monotonic() - self._since if self._up else None
        failover.note_failure(Failure(code, text), session_s, is_ours=isinstance(error, (KernelError, OffloadRefused)))
        self._lan.tunnel_down(failover.is_final)
        where, kind, then = failed.name, self._logged_outage or "next", f"trying {self.remote.name} now"
        if failover.pause_s:
            failures = dict(sorted(failover.failures.items()))
            kind = ",".join(each.code for each in failures.values())
            rarely = f"{RETRY_S:.0f} to {BUSY_RETRY_MAX_S:.0f}" if failover.is_busy else f"{failover.pause_s:.0f}"
            until = "the server won't serve this client until its operator changes that; " if failover.is_final else ""
            then = f"{until}trying again every {rarely} s"
            if len(failures) > 1:
                where, text = "any server", "; ".join(f"{self.remotes[number].name}: {each.reason}" for number, each in failures.items())
        level = logging.DEBUG if kind == self._logged_outage else logging.WARNING
        log.log(level, "no connection to %s: %s; %s", where, text, then, extra=event("outage", id=self._id, peer=failed.name, reason=text))
        self._logged_outage = kind
        self._state = f"no connection to {where}: {text}"
        if not self._up:
            self.handshakes[code if isinstance(error, Refusal) else "failed"] += 1
        self._note_state(False, text if len(self.remotes) == 1 or where != failed.name else f"{where}: {text}")

    def _note_state(self, up: bool, reason: str = "") -> None:
        """Notes for `figures` whether there is a tunnel, and why not."""
        now, was_up = time.monotonic(), self._up
        if up:
            self.handshakes["served"] += 1
            if self._outage:
                self._outage["seconds"] = round(now - self._since)
        elif was_up or not self._outage:
            self._outage = {"time": round(time.time()), "reason": reason, "last_reason": reason, "seconds": None}
        else:
            self._outage["last_reason"] = reason
        if up != was_up:
            self._up, self._since = up, now

    def figures(self) -> dict[str, Any]:
        """Returns what `status` says of the client: up, connecting (what is sent waits), or rejecting (`grace` is over)."""
        waits = bool(self._routes) or self._config.grace is None
        session = self._session.figures() if self._session and self._up else {}
        session.pop("seconds", None)
        if session:
            session["peer_rate"] = self._peer_rate
        address = self.remote.last_good[0] if self.remote.last_good else None
        return {
            "side": "client",
            "state": "up" if self._up else "connecting" if waits else "rejecting",
            "state_seconds": round(time.monotonic() - self._since),
            "server": self.remote.name,
            "servers": [each.name for each in self.remotes],
            "address": address and f"{address[0]} port {address[1]}",
            "id": self._id,
            "prefix": self._prefix and str(self._prefix),
            "device": self._tun and self._tun.name,
            "session": session or None,
            "outage": self._outage,
            "dry": self.remote.dry,
            "handshakes": dict(self.handshakes),
            "parts": {name: part() for name, part in self.parts.items()},
        }


# ---- administration --------------------------------------------------------------------------------------------------

LATENCY_INTERVAL_S, LATENCY_SAMPLES = 0.1, 600  # between two samples; those of a minute are kept
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # seconds; upper bounds of the histogram


class LoopLatency:
    """The latency of the event loop: how long a greenlet that is ready waits until it runs."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._samples: deque[float] = deque(maxlen=LATENCY_SAMPLES)  # seconds
        self.buckets = [0] * (len(LATENCY_BUCKETS) + 1)  # samples since the start, by LATENCY_BUCKETS, the rest last
        self.sum = 0.0  # seconds

    def run(self) -> NoReturn:
        """Takes samples until it is killed."""
        while True:
            due = time.monotonic() + LATENCY_INTERVAL_S
            gevent.sleep(LATENCY_INTERVAL_S)
            late = max(time.monotonic() - due, 0.0)
            self._samples.append(late)
            self.buckets[bisect.bisect_left(LATENCY_BUCKETS, late)] += 1
            self.sum += late

    def summary(self) -> dict[str, float]:
        """Returns figures of the last minute, in seconds."""
        late = sorted(self._samples) or [0.0]
        return {"samples": len(self._samples), "median": late[len(late) // 2], "p99": late[len(late) * 99 // 100], "max": late[-1]}


def process_resources() -> dict[str, int]:
    """Returns what this process uses; memory and queued data in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "greenlets": sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects()),
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")) - 1,
        "memory": int(status["VmRSS"].split()[0]) << 10,
        "queued": SHARED_BUFFER.size - SHARED_BUFFER.free,
    }


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps the many objects of a long answer from starting collections of garbage: with 1,000 clients each would take 0.1 s."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class RequestHandler:
    """Does what an operator asks of this side: the methods that ACTIONS names."""

    SIDE, COMMAND = "client", "status"
    ACTIONS: tuple[str, ...] = ("status",)  # methods that a request may name; build_parser has their arguments

    def __init__(self, figures: Callable[[], dict[str, Any]], loop_latency: LoopLatency | None) -> None:
        """`figures` says how this side is, without what all sides have; `loop_latency` is that of the program that runs."""
        self._figures, self.loop_latency = figures, loop_latency

    def handle(self, request: dict[str, Any]) -> Any:
        """Does the action {"do": one of ACTIONS, its arguments} and returns its result. Raises RequestError, StorageError, Refusal."""
        arguments = dict(request)
        try:
            name = arguments.pop("do")
            action = {name: getattr(self, name) for name in self.ACTIONS}[name]
            inspect.signature(action).bind(**arguments)
        except (KeyError, TypeError):
            raise RequestError(f"the {self.SIDE} that runs here is of another version of tun6; restart it") from None
        return action(**arguments)

    def status(self, clients: bool = False, resources: bool = True) -> dict[str, Any]:
        """Returns figures of this side, with those of each client and of the process."""
        if self.loop_latency is None:
            raise RequestError(f"no {self.SIDE} runs with this config.ini")
        history = TRAFFIC.history
        return {
            **self._figures(),
            "version": __version__,
            "seconds": round(time.monotonic() - self.loop_latency.started),
            **(run_in_thread(process_resources) if resources else {"queued": SHARED_BUFFER.size - SHARED_BUFFER.free}),
            "latency": self.loop_latency.summary(),
            **TRAFFIC.totals(),
            "drops": dict(TRAFFIC.drops()),
            "rates": {name: round(value) for name, value in (history[-1] if history else Rates())._asdict().items()},
            "warnings": list(standing_warnings.values()),
        }


class AdminRequestHandler(RequestHandler):
    """Does what an operator asks for with `tun6.py clients` and `status`: on the running server, or on its files when none runs."""

    SIDE, COMMAND = "server", "clients"
    ACTIONS = ("list", "status", "add", "pin", "revoke", "restore", "limit", "drain")

    def __init__(
        self,
        store: Store,
        files: list[str | None],
        sessions: dict[str, Session],
        end_session: Callable[[str, str], None],
        loop_latency: LoopLatency | None = None,
        figures: Callable[[], dict[str, Any]] = dict,
        drain: Callable[[float | None], None] = lambda seconds: None,
        apply_limit: Callable[[str], None] = lambda id_: None,
    ) -> None:
        """`files` is what files_of returns for this server; `end_session` ends the session of an Id for a reason,
        `apply_limit` tells it of its limit.

        `loop_latency`, `figures` and `drain` are those of the running server.
        """
        super().__init__(figures, loop_latency)
        self._drain, self._apply_limit = drain, apply_limit
        self._store, self._keys, self._files, self._sessions, self._end_session = store, store.keys, files, sessions, end_session
        self._one_at_a_time = gevent.lock.RLock()

    def handle(self, request: dict[str, Any]) -> Any:
        """As RequestHandler does, one request at a time, and only for who means the files of this server."""
        arguments = dict(request)
        files = arguments.pop("files", None)
        if files != self._files:
            raise RequestError(f"the server that runs here has other files, {self._files}; name its config.ini with -c")
        if "id" in arguments:
            if not is_valid_id(arguments["id"]):
                raise RequestError(f"the Id must be 1 to {ID_MAX} printable characters")
            arguments["id"] = canonical_id(arguments["id"])
        with self._one_at_a_time:
            return super().handle(arguments)

    def list(self, here: bool = False) -> Sequence[dict[str, Any]]:
        """Returns an entry for each Id that has a prefix, a key or a session; `here`: only for those that have a session here."""
        ids = dict.fromkeys([*self._store.pool.owners(), *(self._keys.ids() if self._keys else ()), *self._sessions])
        return self._entries(list(self._sessions) if here else ids)

    def status(self, clients: bool = False, resources: bool = True, here: bool = True) -> dict[str, Any]:
        """Returns figures of the running server, with those of each client and of the process; `here`: not of other servers' clients."""
        status = {**super().status(clients, resources), "sessions": len(self._sessions), "assignments": len(self._store.pool.owners())}
        if clients:
            status["clients"] = [entry for entry in self.list(here) if "session" in entry or entry.get("connected")]
        return status

    def add(self, id: str, prefix: str | None, new_key: bool) -> dict[str, Any]:
        """Gives an Id a key and, if it has none, a prefix."""
        keys = self._require_keys()
        old = keys.find(id)
        if old and not new_key:
            raise RequestError(f"{quote_id(id)} has a key already; with --new-key it gets another one, and the old one ends")
        if prefix is not None:
            self.pin(id, prefix)
        entry = {"id": id, "prefix": str(self._store.assign(id)), "key": keys.issue(id)}
        if old:  # a client that had none goes on until it is told its first one
            self._end_session(id, "it got another key")
        return entry

    def pin(self, id: str, prefix: str) -> dict[str, Any]:
        """Gives an Id this prefix."""
        try:
            self._store.pin(id, parse_network(prefix))
        except ValueError as error:
            raise RequestError(str(error)) from None
        if id in self._sessions and self._sessions[id].prefix != parse_network(prefix):
            self._end_session(id, "its prefix was changed")
        return self._entry(id)

    def revoke(self, id: str) -> dict[str, Any]:
        """Keeps an Id out from now on; its prefix stays reserved for it."""
        self._set_revoked(id, True)
        self._end_session(id, "it was revoked")
        return self._entry(id)

    def restore(self, id: str) -> dict[str, Any]:
        """Undoes `revoke`."""
        self._set_revoked(id, False)
        return self._entry(id)

    def limit(self, id: str, rate: str) -> dict[str, Any]:
        """Limits an Id to this rate; `none` is without a limit, `default` as config.ini says for all."""
        try:
            limit = {"none": 0, "default": None}[rate] if rate in ("none", "default") else parse_rate(rate)
        except ValueError as error:
            raise RequestError(f"limit {rate}: it {error}; or none, or default, which is as config.ini says") from None
        if not (self._store.pool.find(id) or id in self._sessions or (self._keys and self._keys.find(id))):
            raise RequestError(f"{quote_id(id)} is not known; `clients list` shows who is")
        self._store.set_limit(id, limit)
        self._apply_limit(id)
        return self._entry(id)

    def drain(self, minutes: float | None) -> int:
        """Sends newcomers to other servers and ends all sessions within so many minutes; None: serves as before. Returns their number."""
        number = len(self._sessions)
        self._drain(None if minutes is None else 60 * minutes)
        return number

    def _set_revoked(self, id_: str, revoked: bool) -> None:
        try:
            self._require_keys().set_revoked(id_, revoked)
        except KeyError:
            raise RequestError(f"{quote_id(id_)} has no key; `clients list` shows who has") from None

    def _require_keys(self) -> Keys:
        if self._keys is None:
            raise RequestError("this server is open to everybody; name a file with `keys` in config.ini, and restart it")
        return self._keys

    def _entries(self, ids: Iterable[str]) -> Sequence[dict[str, Any]]:
        with collector_paused():
            return [self._entry(id_) for id_ in in_slices(ids)]

    def _entry(self, id_: str) -> dict[str, Any]:
        prefix, key, session = self._store.pool.find(id_), self._keys and self._keys.find(id_), self._sessions.get(id_)
        entry: dict[str, Any] = {"id": id_, "prefix": prefix and str(prefix), "key": bool(key), "revoked": bool(key and key.revoked)}
        entry["limit"] = self._store.limit_of(id_)
        entry.update(self._store.whereabouts(id_))
        if session:
            entry["session"] = {"peer": session.peer, "device": session.device, **session.figures()}
        return entry


def encode_in_slices(answer: Any) -> Iterator[str]:
    """Yields the JSON of an answer piece by piece, and lets others run meanwhile."""
    if isinstance(answer, dict):
        for number, (name, value) in enumerate(answer.items()):
            yield f"{', ' if number else '{'}{json.dumps(name)}: "
            yield from encode_in_slices(value)
        yield "}" if answer else "{}"
    elif isinstance(answer, list):
        yield "["
        for number, item in enumerate(in_slices(answer)):
            yield f"{', ' if number else ''}{json.dumps(item)}"
        yield "]"
    else:
        yield json.dumps(answer)


class ControlSocket:
    """The Unix socket for requests of the operator: one request and one answer each connection, JSON objects as on the wire."""

    def __init__(self, path: str, handler: RequestHandler) -> None:
        self._path, self._handler = path, handler
        self._greenlets = gevent.pool.Group()

    def __enter__(self) -> ControlSocket:
        """Listens, unless somebody else does there; server and client work without it."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(self._path) or ".", 0o755)
            if self._is_stale():
                os.unlink(self._path)
            mask = os.umask(0o177)  # only root may connect
            try:
                listener.bind(self._path)
            finally:
                os.umask(mask)
            listener.listen()
        except OSError as error:
            listener.close()
            who = self._handler.COMMAND, self._handler.SIDE
            warn_standing("control", "control = %s: %s; `tun6.py %s` can't reach this %s", self._path, error.strerror, *who)
        else:
            self._greenlets.spawn(self._accept, listener)
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._greenlets):
            self._greenlets.kill()
            with suppress(OSError):
                os.unlink(self._path)

    def _is_stale(self) -> bool:
        """Returns whether the path is a socket that a killed tun6 has left."""
        with system_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                return True
            except OSError:
                pass
        return False

    def _accept(self, listener: socket.socket) -> NoReturn:
        with listener:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError as error:
                    log.error("control: can't accept a connection: %s", error.strerror)
                    gevent.sleep(ACCEPT_PAUSE_S)
                else:
                    self._greenlets.spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                with gevent.Timeout(HANDSHAKE_S):
                    request, _ = receive_message(Stream(sock))
                try:
                    answer = {"done": self._handler.handle(request)}
                except Tun6Error as error:
                    answer = {"error": str(error)}
                with gevent.Timeout(HANDSHAKE_S):
                    for part in encode_in_slices(answer):
                        sock.sendall(part.encode("ascii"))
            except (gevent.Timeout, EOFError, OSError, ProtocolError) as error:
                log.debug("control: %s", describe_end(error))
            except Exception as error:
                log_defect("control", error)


def ask_server(path: str, request: dict[str, Any]) -> Any:
    """Returns the answer of the server or client behind this Unix socket. Raises RequestError, and OSError where none listens."""
    with system_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(HANDSHAKE_S)
        sock.connect(path)
        sock.sendall(encode_message(request))
        text = b"".join(iter(functools.partial(sock.recv, 1 << 16), b""))
    try:
        answer = json.loads(text)
    except ValueError:
        raise RequestError(f"what listens at {path} gave no answer; its log says why") from None
    if "error" in answer:
        raise RequestError(answer["error"])
    return answer["done"]


def format_amount(value: float, unit: str = "") -> str:
    """Returns a number in at most four characters and a prefix of the SI, as in 1.2M."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.1f}{prefix}{unit}" if prefix and value < 9.95 else f"{value:.0f}{prefix}{unit}"


def format_duration(seconds: int) -> str:
    """Returns seconds in their two largest units, as in 3d04h."""
    for size, unit, part, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:02}{small}"
    return f"{seconds}s"


def format_rates(rates: dict[str, float]) -> str:
    """Returns the rates of a status, both ways."""
    received, sent = (
        f"{format_amount(rates[f'{way}_bits'])}bit/s {format_amount(rates[f'{way}_packets'])}p/s" for way in ("received", "sent")
    )
    return f"received {received}, sent {sent}"


def format_limit(bits_per_s: int) -> str:
    """Returns a limit as it is written in config.ini."""
    unit = max((unit for unit in RATE_UNITS if bits_per_s >= RATE_UNITS[unit]), key=lambda unit: RATE_UNITS[unit])
    return f"{bits_per_s / RATE_UNITS[unit]:.12g}{unit}"


def format_time(moment: float | None) -> str:
    """Returns a Unix time in the local time of this machine."""
    return "-" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def format_seconds(seconds: float | None) -> str:
    """Returns a round trip."""
    return "-" if seconds is None else f"{1000 * seconds:.{1 if seconds < 0.01 else 0}f} ms"


def _of_session(value: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """Returns what makes a cell of an entry, which for a client of another server has no session."""
    return lambda entry: value(entry["session"]) if "session" in entry else "-"


def client_age(entry: dict[str, Any]) -> int:
    """Returns how many seconds a client has been connected."""
    return int(entry["session"]["seconds"] if "session" in entry else max(time.time() - entry["since"], 0))


def client_rate(entry: dict[str, Any]) -> float:
    """Returns what a client moves, both ways, in bits a second; 0 for a client of another server."""
    return float(sum(entry["session"]["rates"][way] for way in ("received_bits", "sent_bits")) if "session" in entry else 0)


def client_limit(entry: dict[str, Any]) -> str:
    """Returns what a client is limited to; for one of another server "-" when that server's `limit` holds, which is not known here."""
    limit = entry["session"]["limit"] if "session" in entry else entry["limit"]
    return format_limit(limit) if limit else "none" if "session" in entry or limit == 0 else "-"


CLIENT_ORDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "id": lambda entry: entry["id"],
    "rate": lambda entry: (-client_rate(entry), entry["id"]),
    "since": lambda entry: (client_age(entry), entry["id"]),
}
CLIENT_COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {  # those that do not fit are left out, the last first
    "id": lambda entry: entry["id"],
    "prefix": lambda entry: entry["prefix"],
    "server": lambda entry: entry.get("server", ""),  # left out where all are of one that is in no cluster
    "since": lambda entry: format_duration(client_age(entry)),
    "rcvd/s": _of_session(lambda session: format_amount(session["rates"]["received_bits"], "b")),
    "sent/s": _of_session(lambda session: format_amount(session["rates"]["sent_bits"], "b")),
    "rtt": _of_session(lambda session: format_seconds(session["round_trip"])),
    "drops": _of_session(lambda session: format_amount(sum(session["drops"].values()))),
    "limit": client_limit,
    "from": _of_session(lambda session: session["peer"].replace(" port ", ":")),
    "device": _of_session(lambda session: session["device"]),
    "received": _of_session(lambda session: format_amount(session["received"], "B")),
    "sent": _of_session(lambda session: format_amount(session["sent"], "B")),
    "tls": _of_session(lambda session: "TLS" if session["tls"] else "plain"),
    "congestion": _of_session(lambda session: session["congestion"]),
}
CLIENT_ID_WIDTH = 19  # characters of an Id where there is little room: a MAC address has 17


def client_columns(entries: Sequence[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], object]]:
    """Returns those of CLIENT_COLUMNS that say something of these clients."""
    return {title: value for title, value in CLIENT_COLUMNS.items() if title != "server" or any(map(value, entries))}


def format_clients(entries: Sequence[dict[str, Any]], width: int) -> list[str]:
    """Returns a table of the clients with as many columns as fit."""
    lines = [""] * (len(entries) + 1)
    for number, (title, value) in enumerate(client_columns(entries).items()):
        limit = ID_MAX if number or width >= 100 else CLIENT_ID_WIDTH
        cells = [to_printable(cell, limit) for cell in (title, *map(value, entries))]
        wide = max(map(len, cells))
        if len(lines[0]) + wide + 1 > width and number > 1:
            break
        lines = [f"{line}{' ' if number else ''}{cell:<{wide}}" for line, cell in zip(lines, cells)]
    return [line.rstrip() for line in lines]


def cluster_rows(status: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields what status_rows has of the store of a cluster and its servers."""
    store = status.get("store")
    if store:
        state = f"up for {format_duration(store['seconds'])}"
        if store["down"]:
            state = f"down for {format_duration(store['seconds'])}: {store['down']}"
        yield "store", f"{store['address']}, {state}; owed: {store['owed']} changes, {store['unsettled']} sessions"
        for server in status["servers"]:
            heard = "this one" if server["here"] else f"heard {format_duration(round(server['heard']))} ago"
            yield "", f"{server['name']}: {server['address']}, {server['sessions']} connected, {heard}"


def status_rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what a terminal or the page shows of a server or client, as titles and texts."""
    latency, drops = status["latency"], ", ".join(f"{count} {reason}" for reason, count in status["drops"].items())
    resources = f", {status['memory'] / 2**20:.1f} MiB" if "memory" in status else ""
    rows: list[tuple[str, str]] = []
    if status["side"] == "server":
        limit = f", each limited to {format_limit(status['limit'])}" if status["limit"] else ""
        rows += [
            ("server", f"up for {format_duration(status['seconds'])}, serves {status['pool']} on {status['listens']}"),
            ("clients", f"{status['sessions']} connected, {status['assignments']} assignments, {status['free']} prefixes free{limit}"),
            *cluster_rows(status),
        ]
    else:
        session, outage = status["session"], status["outage"]
        rows += [
            ("client", f"{status['state']} for {format_duration(status['state_seconds'])}, {status['id'] or 'no Id yet'}"),
            ("server", status["server"] + (f", connected to {status['address']}" if session else "")),
            *([("servers", ", ".join(status["servers"]))] if len(status.get("servers", ())) > 1 else []),
            ("prefix", f"{status['prefix']} on {status['device']}" if status["prefix"] else "none yet"),
        ]
        if session:
            offload = "no" if session["offload"] is None else ", ".join(session["offload"]) or "no"
            how = f"{'TLS' if session['tls'] else 'plain'}, congestion control {session['congestion']}, offload {offload}"
            rates = ((way, session.get(key)) for way, key in (("up", "rate"), ("down", "peer_rate")))
            how += "".join(f", {way} shaped to {format_limit(rate)}" for way, rate in rates if rate)
            rows.append(("path", f"round trip {format_seconds(session['round_trip'])}, {how}"))
        if outage:
            lasts = "until now" if outage["seconds"] is None else f"for {format_duration(outage['seconds'])}"
            when = format_time(outage["time"])
            then = f"; then {outage['last_reason']}" if outage["last_reason"] != outage["reason"] else ""
            rows.append(("outage", f"{when} {lasts}: {outage['reason']}{then}"))
        for name, part in status["parts"].items():
            shown = {True: "yes", False: "no"}
            texts = (f"{key.replace('_', ' ')} {shown.get(value, value)}" for key, value in part.items() if value is not None)
            rows.append((name, ", ".join(texts)))
    moved = ", ".join(f"{way} {format_amount(status[way], 'B')}" for way in ("received", "sent"))
    return [
        *rows,
        ("rates", format_rates(status["rates"])),
        ("moved", f"{moved}; dropped: {drops or 'none'}"),
        ("process", f"loop p99 {1000 * latency['p99']:.1f} ms, {status['queued']} bytes queued{resources}"),
        *(("warning", text) for text in status["warnings"]),
    ]


def format_status(status: dict[str, Any], width: int, order: str = "id") -> list[str]:
    """Returns the lines of a status for a terminal of this width, clients in this order of CLIENT_ORDERS."""
    lines = []
    for title, text in status_rows(status):
        line = f"{title:<8} {to_printable(text, 1000)}"
        lines += textwrap.wrap(line, max(width, 20), subsequent_indent=9 * " ", break_on_hyphens=False)
    if status.get("clients"):
        lines += ["", *format_clients(sorted(status["clients"], key=CLIENT_ORDERS[order]), width)]
    return lines


# ---- metrics ---------------------------------------------------------------------------------------------------------

WEB_CONNECTIONS_MAX, WEB_S = 16, 10.0  # connections at a time, and seconds for each: one that is slow ends
WEB_RETRY_S = 60.0  # until the address of `metrics` may be there
PAGE_RELOAD_S = 5
SPARK_WIDTH, SPARK_HEIGHT = 600, 60  # units of the picture
PAGE_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:1em auto;max-width:85em;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0}td,th{text-align:left;padding:.1em .9em .1em 0;vertical-align:top;overflow-wrap:anywhere}"
    ".list{display:block;overflow-x:auto}th,.list td+td{white-space:nowrap}.list td{min-width:3em}.list td:first-child{min-width:11em}"
    "h1 b{padding:0 .4em;border-radius:.3em;color:#fff;background:#b00}h1 b.up{background:#070}.warning{color:#b00}"
    "svg{width:100%;height:6em;background:#f4f4f4}polyline{fill:none;stroke-width:1.5}.received{stroke:#06c;color:#06c}.sent{stroke:#c60;color:#c60}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}svg{background:#222}.warning{color:#f66}}"
)
PAGE_POLICY = f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(PAGE_STYLE.encode()).digest()).decode()}'"
WEB_HEADERS = [
    ("Content-Security-Policy", PAGE_POLICY + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
]


class Metric(NamedTuple):
    """What Prometheus knows by one name; `samples` are values of the labels, and the value."""

    kind: str  # gauge or counter, to whose name the text format adds _total
    name: str
    help: str
    labels: tuple[str, ...]
    samples: list[tuple[tuple[str, ...], float]]


def metrics_of(status: dict[str, Any]) -> Iterator[Metric]:
    """Yields the metrics of a status of either side, but for the latency. Those of single clients only where it has `clients`."""

    def gauge(name: str, text: str, value: float) -> Metric:
        return Metric("gauge", name, text, (), [((), value)])

    def both_ways(unit: str) -> list[tuple[tuple[str, ...], float]]:
        return [((way,), status[way + unit]) for way in ("received", "sent")]

    drops, handshakes = {"waited too long": 0, "not taken": 0, **status["drops"]}, {"served": 0, **status["handshakes"]}
    yield Metric("gauge", "tun6_build_info", "Version and side.", ("version", "side"), [((status["version"], status["side"]), 1)])
    yield gauge("tun6_up", "1 while the server serves and does not drain, or while the client has its tunnel.", status["state"] == "up")
    yield Metric("counter", "tun6_bytes", "Bytes of all sessions.", ("direction",), both_ways(""))
    yield Metric(
        "counter", "tun6_packets", "Packets likewise; a large packet of offload counts once.", ("direction",), both_ways("_packets")
    )
    text = "Packets that were not delivered, by reason."
    yield Metric("counter", "tun6_dropped_packets", text, ("reason",), [((reason,), count) for reason, count in drops.items()])
    text = "Handshakes, by outcome."
    yield Metric("counter", "tun6_handshakes", text, ("outcome",), [((outcome,), count) for outcome, count in handshakes.items()])
    yield gauge("tun6_queue_bytes", "Bytes that wait for slow connections.", status["queued"])
    yield gauge("tun6_warnings", "Warnings that stand.", len(status["warnings"]))
    if status["side"] == "client":
        yield gauge("tun6_state_seconds", "Seconds since the tunnel came or went.", status["state_seconds"])
        if status["session"] and status["session"]["round_trip"] is not None:
            yield gauge("tun6_round_trip_seconds", "Round trip to the server.", status["session"]["round_trip"])
        return
    yield gauge("tun6_sessions", "Clients that are connected.", status["sessions"])
    yield gauge("tun6_assignments", "Ids that own a /64.", status["assignments"])
    yield gauge("tun6_free_prefixes", "Prefixes that can be assigned.", status["free"])
    store, servers = status.get("store"), status.get("servers", ())
    if store:
        yield gauge("tun6_store_up", "1 while the cluster's store can be reached.", store["down"] is None)
        yield gauge("tun6_store_state_seconds", "Seconds since the store came or went.", store["seconds"])
        yield gauge("tun6_store_owed", "Changes that the store is still to be told.", store["owed"])
        yield gauge("tun6_store_unsettled_sessions", "Sessions whose epoch the store does not have yet.", store["unsettled"])
        heard: list[tuple[tuple[str, ...], float]] = [((server["name"],), server["heard"]) for server in servers]
        yield Metric("gauge", "tun6_server_silent_seconds", "Seconds since a server of the cluster was heard.", ("server",), heard)
    for name, moment in (status["certificate"] or {}).items():
        yield gauge(f"tun6_certificate_{name}_timestamp_seconds", f"When the server's certificate {name}.", moment)
    for kind, name, text, field, unit in (
        ("counter", "tun6_client_bytes", "Bytes of a session.", "", ""),
        ("counter", "tun6_client_packets", "Packets of a session.", "", "_packets"),
        ("counter", "tun6_client_dropped_packets", "Packets of a session that were not delivered.", "drops", ""),
        ("gauge", "tun6_client_session_seconds", "Age of a session.", "seconds", ""),
        ("gauge", "tun6_client_round_trip_seconds", "Round trip to a client.", "round_trip", ""),
        ("gauge", "tun6_client_limit_bits", "Bits a second that a client is limited to each way.", "limit", ""),
    ):
        samples: list[tuple[tuple[str, ...], float]] = []
        for entry in in_slices(status.get("clients", ())):
            id_, session = entry["id"], entry["session"]
            if not field:
                samples += [((id_, way), session[way + unit]) for way in ("received", "sent")]
            elif session[field] is not None:
                samples.append(((id_,), sum(session[field].values()) if field == "drops" else session[field]))
        if samples:
            yield Metric(kind, name, text, ("id",) if field else ("id", "direction"), samples)


def render_spark(history: Sequence[Rates]) -> str:
    """Returns the rates of the last minutes as a picture."""
    most = max((rate for rates in history for rate in rates[:2]), default=0.0) or 1.0
    lines = []
    for way, values in (("received", [each.received_bits for each in history]), ("sent", [each.sent_bits for each in history])):
        left = SPARK_WIDTH * (1 - (len(values) - 1) / max(RATES_KEPT - 1, 1))
        step = SPARK_WIDTH / (RATES_KEPT - 1)
        points = " ".join(f"{left + at * step:.1f},{(SPARK_HEIGHT - 2) * (1 - value / most) + 1:.1f}" for at, value in enumerate(values))
        lines.append(f'<polyline class="{way}" vector-effect="non-scaling-stroke" points="{points}"/>')
    return (
        f'<svg viewBox="0 0 {SPARK_WIDTH} {SPARK_HEIGHT}" preserveAspectRatio="none" role="img">{"".join(lines)}</svg>'
        f'<p><span class="received">received</span>, <span class="sent">sent</span>; the last {RATES_KEPT * RATE_S / 60:.0f} minutes,'
        f" at most {format_amount(most)}bit/s</p>"
    )


def render_page(status: dict[str, Any], history: Sequence[Rates]) -> str:
    """Returns the page for a status of either side, with its clients where it has `clients`. What others said is escaped."""
    state, title = html.escape(status["state"]), f"tun6 {html.escape(status['side'])}"
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="refresh" content="{PAGE_RELOAD_S}"><title>{title}: {state}</title><style>{PAGE_STYLE}</style></head>'
        f'<body><h1>{title} <b class="{state}">{state}</b></h1>{render_spark(history)}<table>'
    ]
    for name, text in status_rows(status):
        parts.append(f'<tr class="{html.escape(name)}"><th>{html.escape(name)}</th><td>{html.escape(to_printable(text, 1000))}</td></tr>')
    parts.append("</table>")
    if "clients" in status:
        columns = client_columns(status["clients"])
        parts.append(f'<table class="list"><thead><tr>{"".join(f"<th>{name}</th>" for name in columns)}</tr></thead><tbody>')
        for entry in in_slices(sorted(status["clients"], key=CLIENT_ORDERS["rate"])):
            cells = "".join(f"<td>{html.escape(to_printable(value(entry)))}</td>" for value in columns.values())
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</tbody></table>")
    return "".join([*parts, "</body></html>\n"])


def require_prometheus_client() -> None:
    """Raises ConfigError without that package."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise ConfigError(
            "`metrics` needs the Python package prometheus_client: `apt-get install python3-prometheus-client`, or"
            f" `{sys.executable} -m pip install prometheus_client`"
        ) from None


class Web:
    """Serves /metrics for Prometheus and the page / on one address and port, to who asks by an address: read-only, plain HTTP."""

    def __init__(self, address: tuple[str, int], handler: RequestHandler, with_clients: bool) -> None:
        """`with_clients`: they show each client. `require_prometheus_client` must have been satisfied."""
        import prometheus_client.core

        self._address, self._handler, self._with_clients = address, handler, with_clients
        self._prometheus: Any = prometheus_client
        self._process = prometheus_client.ProcessCollector(registry=None)
        self._one_at_a_time = gevent.lock.RLock()

    def run(self) -> None:
        """Serves until it is killed; tries again where it can't."""
        from gevent import pywsgi  # takes memory, which is not needed without `metrics`

        class Handler(pywsgi.WSGIHandler):  # type: ignore[misc]
            def handle(self) -> None:
                with gevent.Timeout(WEB_S, False):
                    super().handle()

        while True:
            pool = gevent.pool.Pool(WEB_CONNECTIONS_MAX)
            server = pywsgi.WSGIServer(self._address, self._answer, spawn=pool, log=self, error_log=self, handler_class=Handler)
            try:
                server.start()
                standing_warnings.pop("metrics", None)
                gevent.event.Event().wait()
            except OSError as error:
                text = "metrics = %s port %d: %s; trying again every %.0f s"
                level = logging.DEBUG if "metrics" in standing_warnings else logging.WARNING
                warn_standing("metrics", text, *self._address, os.strerror(error.errno or 0), WEB_RETRY_S, level=level)
            finally:
                server.stop(0)
            gevent.sleep(WEB_RETRY_S)

    def write(self, text: str) -> None:
        """Takes a line of the web server's log."""
        log.debug("metrics: %s", to_printable(text.strip()))

    def collect(self) -> Iterator[Any]:
        """Yields all metrics for prometheus_client, and lets others run between the samples."""
        core, latency = self._prometheus.core, self._handler.loop_latency
        for kind, name, text, labels, samples in metrics_of(self._status()):
            family = (core.GaugeMetricFamily if kind == "gauge" else core.CounterMetricFamily)(name, text, labels=labels)
            for values, value in in_slices(samples):
                family.add_metric(values, value)
            family.samples = in_slices(family.samples)
            yield family
        if latency:
            bounds = [*(str(bound) for bound in LATENCY_BUCKETS), "+Inf"]
            buckets = list(zip(bounds, itertools.accumulate(latency.buckets)))
            yield core.HistogramMetricFamily("tun6_loop_latency_seconds", "How late the event loop is.", buckets, latency.sum)
        yield from self._process.collect()

    def _status(self) -> dict[str, Any]:
        return self._handler.status(clients=self._with_clients, resources=False)

    def _answer(self, environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]) -> list[bytes]:
        """Answers one request, as a WSGI application."""
        kind, text, status = "text/plain; charset=utf-8", "", "200 OK"
        host = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9a-zA-Z.-]+))(?::\d+)?", environ.get("HTTP_HOST", ""))
        if environ["REQUEST_METHOD"] != "GET":
            status, text = "405 Method Not Allowed", "it is read-only\n"
        elif not host or not (host[1] or host[2] == "localhost" or is_ipv4(host[2])):
            status, text = "421 Misdirected Request", "ask by address: a name could be that of another site (DNS rebinding)\n"
        elif environ["PATH_INFO"] not in ("/", "/metrics"):
            status, text = "404 Not Found", "there are / and /metrics\n"
        else:
            try:
                with self._one_at_a_time, collector_paused():
                    if environ["PATH_INFO"] == "/":
                        kind, text = "text/html; charset=utf-8", render_page(self._status(), list(TRAFFIC.history))
                    else:
                        kind, text = self._prometheus.CONTENT_TYPE_LATEST, self._prometheus.generate_latest(self).decode()
            except Exception as error:
                log_defect("metrics", error)
                status = "500 Internal Server Error"
        start_response(status, [("Content-Type", kind), *WEB_HEADERS])
        return [text.encode()]


# ---- installation ----------------------------------------------------------------------------------------------------

PROGRAM_FOLDER, LAUNCHER = Path("/opt/tun6"), Path("/usr/local/bin/tun6")
CONFIG_FOLDER, STATE_FOLDER = Path("/etc/tun6"), Path("/var/lib/tun6")
UNIT_FOLDER, SYSCTL_FILE = Path("/etc/systemd/system"), Path("/etc/sysctl.d/60-tun6.conf")
PACKAGE, PACKAGE_LAUNCHER = Path("/usr/lib/tun6/tun6.py"), Path("/usr/bin/tun6")  # where Debian's package has them, see contrib/debian
PACKAGE_UNITS = Path("/usr/lib/systemd/system")
COPIED = "copied-from"  # the file in PROGRAM_FOLDER that says that `install` made it
SERVICE_USER = "tun6"
START_S = 60.0  # for `systemctl`, which waits until the service is ready
FIRST_CONNECTION_S = 10.0  # for the first connection after that
TOKEN_VERSION, TOKEN_CHECK = 1, 4  # of what is in a token; bytes of SHA-256 at its end, against typing errors
TOKEN_KEYS = ("remotehost", "remoteport", "id", "key", "fingerprint")  # settings of [client]
NEW_CONFIG = {  # of a machine that has no config.ini yet
    "server": {"localhost": "0.0.0.0", "listenport": "10000", "assignments": "assignments.json"},
    "client": {"remoteport": "10000"},
}
# It imports the program: Python keeps the syntax tree of a file that it runs itself, 28 MB, as long as that runs.
LAUNCHER_TEXT = """\
#!{python}
# made by `tun6.py install`
import sys

sys.path[:0] = {folders}
import tun6

sys.exit(tun6.main())
"""
UNIT = """\
# tun6-{role}.service, as `tun6.py install {role}` writes it; see docs/operating.md, "Run it as a service"
[Unit]
Description=tun6 {role}: {what}
Documentation=file:{program}
Wants=network-online.target
After=network-online.target
# it may have to wait for its network for hours
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={launcher} {role} -c /etc/tun6/config.ini
{reload}Restart=always
RestartSec=2
# wrong configuration: it would be as wrong the next time
RestartPreventExitStatus=2
WatchdogSec=30
WatchdogSignal=SIGKILL
# a stop must not end what the program runs to clear up
KillMode=mixed
TimeoutStopSec=20
LimitNOFILE=65536

User=tun6
Group=tun6
StateDirectory=tun6
StateDirectoryMode=0750
RuntimeDirectory=tun6-{role}
# what a killed one was to put back stands there
RuntimeDirectoryPreserve=yes
UMask=0077
# CAP_NET_ADMIN: TUNs, routes and their sysctls; CAP_NET_RAW: the question whether the path is alive{why}
AmbientCapabilities={capabilities}
CapabilityBoundingSet={capabilities}
NoNewPrivileges=yes
DevicePolicy=closed
DeviceAllow=/dev/net/tun rw
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
# not ProtectKernelTunables: accept_ra is turned off for each TUN
ProtectControlGroups=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectClock=yes
ProtectHostname=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
PrivateMounts=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
{capset}SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def service_unit(role: str, low_port: bool = False, program: Path = PROGRAM_FOLDER / "tun6.py") -> str:
    """Returns the unit of systemd for the server or the client; `low_port`: the server listens on a port below 1024."""
    return UNIT.format(
        role=role,
        program=program,
        what="IPv6 prefixes over TCP" if role == "server" else "an IPv6 prefix over TCP",
        launcher=PACKAGE_LAUNCHER if program == PACKAGE else LAUNCHER,
        reload='ExecReload=/bin/sh -c "kill -HUP $MAINPID"\n' if role == "server" else "",
        capset="# for the `setpriv` that keeps radvd from outliving the client\nSystemCallFilter=capset\n" if role == "client" else "",
        why="; CAP_NET_BIND_SERVICE: the port" if low_port else "",
        capabilities="CAP_NET_ADMIN CAP_NET_RAW" + " CAP_NET_BIND_SERVICE" * low_port,
    )


def encode_token(settings: Mapping[str, str]) -> str:
    """Returns one line with what a client has to know, its settings by TOKEN_KEYS: `tun6.py install client --join` takes it."""
    body = json.dumps([TOKEN_VERSION, *(settings[key] for key in TOKEN_KEYS)], separators=(",", ":")).encode("ascii")
    return "tun6:" + base64.urlsafe_b64encode(body + hashlib.sha256(body).digest()[:TOKEN_CHECK]).decode().rstrip("=")


def decode_token(token: str) -> dict[str, str]:
    """Returns the settings of [client] that a token stands for. Raises RequestError."""
    try:
        text = "".join(token.split()).partition("tun6:")[2]
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
        body, check = data[:-TOKEN_CHECK], data[-TOKEN_CHECK:]
        if not text or hashlib.sha256(body).digest()[:TOKEN_CHECK] != check:
            raise ValueError("a part of it is missing or mistyped")
        version, *values = json.loads(body)
        if version != TOKEN_VERSION:
            raise ValueError("it is of another version of tun6")
        if not all(str(value).isprintable() for value in values):
            raise ValueError("a setting in it has more than one line")  # it might bring others, such as commands to be run
        return dict(zip(TOKEN_KEYS, map(str, values)))
    except ValueError as error:
        reason = to_printable(error)
        raise RequestError(f"this is no token that `tun6.py clients add` printed: {reason}; copy the whole line, from tun6: on") from None


def set_in_section(text: str, section: str, settings: Mapping[str, str | None]) -> str:
    """Returns the text of a config.ini with these settings in a section, None for none, every other line as it was."""
    head, banner, rest = (f"\n{text}").partition(f"\n[{section}]")
    if not banner:
        return f"{text}\n[{section}]\n".lstrip("\n") + "".join(f"{key} = {value}\n" for key, value in settings.items() if value is not None)
    body, following, others = rest.partition("\n[")
    for key, value in settings.items():
        line = "" if value is None else f"\n{key} = {value}".replace("\\", r"\\")
        body, found = re.subn(rf"(?i)\n{key}\s*[=:].*", line, body)
        if not (found or value is None):
            body, found = re.subn(rf"\n#{key} = .*", line, body, count=1)
        body = body if found or value is None else body.rstrip("\n") + f"\n{key} = {value}\n"
    return (head + banner + body + following + others)[1:]


def without_section(text: str, section: str) -> str:
    """Returns the text of a config.ini without this section."""
    head, banner, rest = (f"\n{text}").partition(f"\n[{section}]")
    _, following, others = rest.partition("\n[")
    return (head + (following + others if banner else ""))[1:]


def make_certificate(file: Path) -> None:
    """Makes the server's certificate, valid for 100 years, as clients compare its fingerprint. Raises KernelError, StorageError."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=tun6 -keyout - -out -"
    try:
        made = subprocess.run(command.split(), capture_output=True, text=True)
    except OSError as error:
        raise KernelError(f"`openssl` can't be run: {error.strerror}; install it with `apt-get install openssl`") from None
    if made.returncode:
        raise KernelError(f"`{command}` failed: {' '.join(made.stderr.split())}")
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET_MODE), "w", encoding="ascii") as pem:
            give_owner(pem.fileno(), file.parent)
            pem.write(made.stdout)
    except OSError as error:
        raise StorageError(f"{file} can't be written: {error.strerror}") from None


class Installer:
    """Puts a server or a client in place as a service of systemd, each thing once, and says what it did.

    Below a `root` other than / it writes files only, which tests and builders of images want.
    """

    def __init__(self, role: str, root: Path, read: Callable[[str], Any], in_use: Callable[[str], list[str]]) -> None:
        """`read` returns the ServerConfig or ClientConfig in a file, `in_use` which sections of it are no longer the example's."""
        self._role, self._root, self._read, self._service = role, root, read, f"tun6-{role}.service"
        self._in_use = in_use
        self._changed = False  # whether the service must be restarted
        self._config: Any = None
        self._program = PROGRAM_FOLDER / "tun6.py"

    def install(self, settings: Mapping[str, str], old: Path | None) -> None:
        """Does all steps; `settings` are changed in config.ini, which, where there is none yet, begins as `old` or ./config.ini.

        Raises RequestError, ConfigError, KernelError, StorageError. What was done by then stays, and the next run goes on from there.
        """
        try:
            self._add_user()
            self._copy_program()
            self._configure(settings, old)
            self._warn_of_interfaces()
            self._set_sysctls()
            self._place_unit()
            self._start()
        except OSError as error:
            raise StorageError(f"{error.filename or self._root}: {error.strerror}; run this as root") from None

    def remove(self) -> None:
        """Takes everything away but configuration and state. Raises KernelError, StorageError."""
        unit, other = UNIT_FOLDER / self._service, UNIT_FOLDER / f"tun6-{'client' if self._role == 'server' else 'server'}.service"
        if self._at(unit).exists() or self._at(PACKAGE_UNITS / self._service).exists():
            self._run("systemctl", "disable", "--now", self._service)
        gone = [unit, *([SYSCTL_FILE] if self._role == "server" else [])]
        if not self._at(other).exists():
            gone += [LAUNCHER] if self._owns_launcher() else []
            gone += [PROGRAM_FOLDER] if self._at(PROGRAM_FOLDER / COPIED).exists() else []
        self._delete(*gone)
        self._run("systemctl", "daemon-reload")
        self._say(f"kept {CONFIG_FOLDER} and {STATE_FOLDER}; sysctls stay as they are until the next boot")

    def _at(self, path: Path) -> Path:
        return self._root / path.relative_to("/")

    def _say(self, what: str) -> None:
        print(f"  {what}", flush=True)

    def _run(self, *command: str) -> str:
        """Runs a program of the machine and returns what it says. Raises KernelError."""
        if self._root != Path("/"):
            return ""
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=True, stdin=subprocess.DEVNULL).stdout
        except OSError as error:
            raise KernelError(f"`{command[0]}` can't be run: {error.strerror}; a service needs systemd") from None
        except subprocess.TimeoutExpired:
            raise KernelError(f"`{' '.join(command)}` did not end within {START_S:.0f} s") from None
        except subprocess.CalledProcessError as error:
            raise KernelError(f"`{' '.join(command)}` failed: {' '.join(error.stderr.split())}") from None

    def _write(self, path: Path, text: str, mode: int, group: str = "root") -> None:
        """Writes a file, durably enough, unless it is so already."""
        file = self._at(path)
        if not file.exists() or file.read_text("utf-8") != text or stat.S_IMODE(file.stat().st_mode) != mode:
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            new = file.with_name(f"{file.name}.new")
            new.unlink(missing_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET_MODE), "w", encoding="utf-8") as output:
                output.write(text)
            self._give(new, mode, "root", group)
            new.replace(file)
            self._say(f"wrote {path}")
            self._changed = True

    def _delete(self, *paths: Path) -> None:
        for path in filter(lambda path: self._at(path).exists(), paths):
            shutil.rmtree(self._at(path)) if self._at(path).is_dir() else self._at(path).unlink()
            self._say(f"removed {path}")
            self._changed = True

    def _give(self, path: Path, mode: int, user: str, group: str) -> None:
        if self._root == Path("/"):
            shutil.chown(path, user, group)
        path.chmod(mode)

    def _add_user(self) -> None:
        with suppress(KeyError):
            if self._root == Path("/"):
                pwd.getpwnam(SERVICE_USER)
            return
        nobody = "--system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin"
        self._run("useradd", *nobody.split(), SERVICE_USER)
        self._say(f"made the user {SERVICE_USER}")

    def _owns_launcher(self) -> bool:
        return self._at(LAUNCHER).exists() and "`tun6.py install`" in self._at(LAUNCHER).read_text("utf-8", "replace")

    def _copy_program(self) -> None:
        """Copies this file and its virtual environment, unless it is installed already; makes the command `tun6`."""
        program, python, packages = Path(__file__).resolve(), Path(sys.executable), list[str]()
        if program == self._at(PACKAGE):
            self._program = PACKAGE
            return
        if program == self._at(PROGRAM_FOLDER / "tun6.py") and self._at(PROGRAM_FOLDER / COPIED).exists():
            return
        if program.parent != PROGRAM_FOLDER and not {"site-packages", "dist-packages"} & {*program.parts}:
            if sys.prefix != sys.base_prefix:
                self._copy_packages(PROGRAM_FOLDER / "lib")
                packages = [f"{PROGRAM_FOLDER}/lib"]
            self._write(PROGRAM_FOLDER / COPIED, f"{program}\n", 0o644)
            self._write(PROGRAM_FOLDER / "tun6.py", program.read_text("utf-8"), 0o755)
            compileall.compile_file(self._at(PROGRAM_FOLDER / "tun6.py"), quiet=1)  # if it has changed
            program, python = PROGRAM_FOLDER / "tun6.py", Path(cast(Any, sys)._base_executable)
        for path in (program, python):
            if path.parts[1] in ("home", "root", "tmp") and self._root == Path("/"):
                raise RequestError(f"{path} is where a service can't read it; run this with the system's /usr/bin/python3 or a venv of it")
        self._program = program
        if self._owns_launcher() or not self._at(LAUNCHER).exists():
            self._write(LAUNCHER, LAUNCHER_TEXT.format(python=python, folders=[str(program.parent), *packages]), 0o755)

    def _copy_packages(self, to: Path) -> None:
        """Copies the packages that tun6 needs, once for each of their versions."""
        missing, found = {"gevent", "netifaces", "python-pytun", "psycopg", "psycopg-binary"}, dict[str, importlib.metadata.Distribution]()
        while missing:
            name = missing.pop()
            with suppress(importlib.metadata.PackageNotFoundError):  # one for other systems
                found[name] = importlib.metadata.distribution(name)
                wanted = (re.match(r"([\w.-]+)[^;]*(;.*extra.*)?", each) for each in found[name].requires or ())
                missing |= {match[1].lower() for match in wanted if match and not match[2]} - found.keys()
        found = {
            name: each for name, each in found.items() if Path(str(each.locate_file(""))).is_relative_to(sys.prefix)
        }  # not the system's
        versions = sys.version + "".join(sorted(f"\n{name} {each.version}" for name, each in found.items()))
        if (self._at(to) / "versions").exists() and (self._at(to) / "versions").read_text() == versions:
            return
        shutil.rmtree(self._at(to), ignore_errors=True)
        for each in found.values():
            for file in each.files or ():
                if not {"..", "__pycache__"} & {*file.parts} and "tests" not in file.parts:
                    target = self._at(to) / file
                    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                    shutil.copyfile(str(file.locate()), target)
        (self._at(to) / "versions").write_text(versions)
        self._say(f"copied {', '.join(sorted(found))} to {to}")
        self._changed = True

    def _configure(self, settings: Mapping[str, str], old: Path | None) -> None:
        """Writes config.ini, and moves what it names to the folder for state."""
        target, new = self._at(CONFIG_FOLDER / "config.ini"), NEW_CONFIG[self._role]
        if target.exists() and old and not old.samefile(target):
            raise RequestError(f"{target} is there already, and it is not {old}; move one of them away")
        here = Path("config.ini")
        base = target if target.exists() else old or (here if here.exists() else None)
        text = base.read_text("utf-8-sig") if base else ""
        for other in {*NEW_CONFIG} - {self._role, *(self._in_use(str(base)) if base else ())}:
            text = without_section(text, other)
        if f"\n[{self._role}]" not in f"\n{text}":
            settings = {**new, **settings}
        text = set_in_section(text, self._role, settings)
        folder = base.parent if base else target.parent
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=folder, prefix="config.ini."
        ) as draft:  # its paths are relative to there
            draft.write(text)
            draft.flush()
            try:
                self._config = self._read(draft.name)
            except ConfigError as error:
                raise ConfigError(str(error).replace(draft.name, str(base or target))) from None
        if self._role == "server":
            text = set_in_section(text, "server", self._move_state(folder))
        text = set_in_section(text, self._role, {"control": f"/run/tun6-{self._role}/{self._role}.sock"})
        self._write(CONFIG_FOLDER / "config.ini", text, 0o640, SERVICE_USER)

    def _move_state(self, folder: Path) -> dict[str, str | None]:
        """Moves assignments, keys and certificate to the folder for state, makes what is missing there, and returns the settings for it."""
        state = self._at(STATE_FOLDER)
        state.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._give(state, 0o750, SERVICE_USER, SERVICE_USER)
        names = {key: getattr(self._config, key) for key in ("assignments", "keys", "cert")}
        files = {key: Path(os.path.realpath(folder / (name or ""))) for key, name in names.items()}
        there = {key: state / Path(name or f"{key}.json").name for key, name in names.items()}
        if self._config.store:
            for key in ("assignments", "keys"):
                if names[key] and files[key].exists():
                    raise RequestError(
                        f"{folder}/config.ini has a store, and beside it {key} = {names[key]}; take them into the store with"
                        " `tun6.py cluster import`, and remove the line"
                    )
            there["cert"] = state / Path(names["cert"] or "server.pem").name
            names = {"cert": names["cert"] or "server.pem"}
        elif names["assignments"] is None or not (files["assignments"].exists() or there["assignments"].exists()):
            places = (folder, Path(), self._at(PROGRAM_FOLDER), self._at(CONFIG_FOLDER), state)
            lost = next((file for place in places for file in place.glob("assignments.json*") if file.suffix in (".json", ".bak")), None)
            if lost:
                raise RequestError(
                    f"{lost} has assignments and {folder}/config.ini does not name it: name its config.ini with -c, or move it away"
                )
            if names["keys"] is None:  # a new server is for those who have a key
                there["cert"] = state / "server.pem"
                names.update(keys="keys.json", cert="server.pem")
        for key, name in names.items():
            if name and files[key].is_file() and files[key] != there[key].resolve():
                if there[key].exists():
                    raise RequestError(f"{files[key]} and {there[key]} are both there; move the one away that does not count")
                if self._at(UNIT_FOLDER / self._service).exists():  # it may be an older one, which has its state elsewhere
                    self._run("systemctl", "stop", self._service)
                if key == "assignments":  # they are whole, and no server has them
                    AssignmentStore(PrefixPool(self._config.prefixrange), str(files[key])).close()
                for suffix in (".bak", LIMITS_SUFFIX, ""):
                    if Path(f"{files[key]}{suffix}").exists():
                        shutil.move(f"{files[key]}{suffix}", f"{there[key]}{suffix}")
                self._say(f"moved {files[key]} to {STATE_FOLDER / there[key].name}")
        if names["cert"] and not there["cert"].exists():
            make_certificate(there["cert"])
            self._say(f"made the certificate {STATE_FOLDER / there['cert'].name}")
        for file in state.iterdir():
            self._give(file, stat.S_IMODE(file.stat().st_mode), SERVICE_USER, SERVICE_USER)
        if self._config.store:  # its cache has digests of keys, and is written while the server runs
            cache = str(STATE_FOLDER / Path(self._config.store_cache).name)
            return {"assignments": None, "keys": None, "cert": str(STATE_FOLDER / there["cert"].name), "store_cache": cache}
        return {key: str(STATE_FOLDER / there[key].name) for key, name in names.items() if name or key == "assignments"}

    def _warn_of_interfaces(self) -> None:
        """Says which interface that config.ini names is not there, on a machine that runs: it may come later, or be misspelt."""
        interfaces = self._at(Path("/sys/class/net"))
        for key, then in (("lan", "the LAN is served as soon as there is one"), ("ndp", "the server does not start without it")):
            name = getattr(self._config, key, None)
            if name and interfaces.is_dir() and not (interfaces / name).exists():
                self._say(f"warning: {key} = {name}: there is no such interface now, see `ip link`; {then}")

    def _set_sysctls(self) -> None:
        """Lets a server forward, and keep its own default route where that is from router advertisements."""
        if self._role == "client":
            return
        uplink = re.search(r"dev (\S+) proto ra", self._run("ip", "-6", "route", "show", "default"))
        wanted = [f"net.ipv6.conf.{uplink[1]}.accept_ra=2"] if uplink else []
        wanted.append("net.ipv6.conf.all.forwarding=1")
        old = self._at(SYSCTL_FILE).read_text("utf-8") if self._at(SYSCTL_FILE).exists() else ""
        missing = [line for line in wanted if line not in old.replace(" ", "").splitlines()]
        if missing:
            self._write(SYSCTL_FILE, old + "".join(f"{line}\n" for line in missing), 0o644)
        for name, _, value in (line.partition("=") for line in wanted):
            if self._root == Path("/") and read_sysctl(name) != value:
                Path("/proc/sys", *name.split(".")).write_text(value)
                self._say(f"set {name} = {value}")

    def _place_unit(self) -> None:
        """Writes the unit of systemd, unless the one that Debian's package has brought is the right one."""
        unit, ours = service_unit(self._role, getattr(self._config, "listenport", 1024) < 1024, self._program), UNIT_FOLDER / self._service
        packaged = self._at(PACKAGE_UNITS / self._service)
        if packaged.exists() and packaged.read_text("utf-8") == unit:
            self._delete(ours)
        else:
            self._write(ours, unit, 0o644)

    def _start(self) -> None:
        """Starts the service at each boot, and now; returns when it says that it is ready."""
        if self._root != Path("/"):
            return
        self._run("systemctl", "daemon-reload")
        self._run("systemctl", "enable", self._service)
        with suppress(KernelError):
            self._run("systemctl", "is-active", self._service)
            if not self._changed:
                self._say(f"{self._service} runs, nothing had to be changed")
                return
        try:
            self._run("systemctl", "restart", self._service)
        except KernelError as error:
            raise KernelError(f"{error}; `journalctl -u {self._service}` says why") from None
        deadline, state = time.monotonic() + FIRST_CONNECTION_S, ""
        while not (state.startswith("has ") or (state and self._role == "server")) and time.monotonic() < deadline:
            time.sleep(0.1)
            state = self._run("systemctl", "show", "-P", "StatusText", self._service).strip()
        self._say(f"started {self._service}: {state or 'it has not said yet how it is'}; `tun6 status` shows more")


# ---- doctor ----------------------------------------------------------------------------------------------------------

CHECK_S = 20.0  # for one check; most take milliseconds
POOL_S = 10.0  # in which something for the pool may come from outside
DESCRIPTORS_PER_CLIENT, OTHER_DESCRIPTORS = 2, 100
DISK_MIN = 1 << 20  # bytes that must be free beside twice the file of assignments, as each save writes it anew
CERTIFICATE_S = 30 * 86_400  # before its end a certificate is warned of
KNOWS_NEIGHBOURS = re.compile("(icmpv6|ipv6-icmp|l4proto 58|nexthdr 58)(?! type echo-re)")  # in a table of nft
CUT_OFF = "the peer closed the connection", "Connection reset by peer"  # reasons of an outage that the server's host gave
RELEASED = 1_767_225_600  # Unix time, 2026-01-01: a clock that says less is wrong
IP_MTU, IP_PMTUDISC_PROBE, IPV4_ICMP_HEADERS = 14, 3, 28  # linux/in.h; bytes


class Skipped(Exception):
    """A check can't be made; the text is why."""


class Finding(NamedTuple):
    """What a check has found."""

    check: str
    result: str  # ok, warn, FAIL or skipped
    text: str

    def format(self) -> str:
        """Returns lines of at most 79 characters, if no word is longer."""
        begin = f"{self.result:<7} {self.check:<15} "
        return textwrap.fill(begin + self.text, 79, subsequent_indent=" " * 24, break_long_words=False, break_on_hyphens=False)


def needed(value: T | None, where: str) -> T:
    """Returns what an earlier check has found. Raises Skipped when it has not."""
    if value is None:
        raise Skipped(f"not possible, see {where}")
    return value


def require_privilege() -> None:
    """Raises KernelError without CAP_NET_ADMIN (linux/capability.h), which root has."""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if capabilities and not int(capabilities[1], 16) >> 12 & 1:
        raise KernelError("making network devices needs root; run it with sudo")


def require_ipv6() -> None:
    """Raises KernelError where a new device gets no IPv6."""
    if not (IPV6_CONF / "default").exists():
        raise KernelError("this kernel has no IPv6; boot it without `ipv6.disable=1`, or with one that has")
    if read_sysctl("net.ipv6.conf.default.disable_ipv6") != "0":
        where = " for this container, from outside" if not os.access("/proc/sys/net/ipv6/conf/all/disable_ipv6", os.W_OK) else ""
        raise KernelError(f"IPv6 is off in this kernel; turn it on{where} with `sysctl -w net.ipv6.conf.all.disable_ipv6=0`")


def require_ipv6_of(interface: str) -> None:
    """Raises KernelError where somebody has turned IPv6 off on it."""
    if read_text(IPV6_CONF / interface / "disable_ipv6") == "1":
        how = f"`sysctl -w net.ipv6.conf.{interface.replace('.', '/')}.disable_ipv6=0`, and see /etc/sysctl.d"
        raise KernelError(f"IPv6 is off on {interface}; turn it on with {how}")


def warn_of_forwarding() -> None:
    """Warns when IPv6 forwarding is off. The server depends on it, but the sysctl is the operator's and is not set."""
    if read_sysctl("net.ipv6.conf.all.forwarding") == "1":
        return
    warn_standing(
        "forwarding",
        "IPv6 forwarding is off, clients reach this machine only; turn it on with `sysctl -w net.ipv6.conf.all.forwarding=1`"
        " and keep it on with `echo net.ipv6.conf.all.forwarding=1 >> /etc/sysctl.d/60-tun6.conf`; an uplink that gets its address"
        " or default route from router advertisements loses them then, unless you first"
        " `sysctl -w net.ipv6.conf.%s.accept_ra=2` and keep that in the same file",
        default_interface(netifaces.AF_INET6) or "eth0",
    )


def find_deaf_interfaces(*others: str) -> list[str]:
    """Returns the interfaces, besides `others`, that ignore router advertisements only because they forward."""
    found = []
    for path in sorted(IPV6_CONF.glob("*/accept_ra")):
        deaf = read_text(path) == "1" and read_text(path.with_name("forwarding")) == "1"
        found += [path.parent.name] if deaf and path.parent.name not in {"all", "default", "lo", *others} else []
    return found


def warn_of_expiring_routes(*others: str) -> None:
    """Warns of such interfaces that have a default route by router advertisements, and will lose it."""
    for name in find_deaf_interfaces(*others):
        if has_ra_route(read_text(Path("/proc/net/ipv6_route")), name):
            how = f"`sysctl -w net.ipv6.conf.{name}.accept_ra=2`, and keep that in /etc/sysctl.d"
            log.warning("%s ignores router advertisements, as it forwards, and will lose its default route by them; %s", name, how)


def show_ip(what: str) -> list[dict[str, Any]]:
    """Returns what `ip -6 -j` shows, nothing where it fails. Raises OSError, subprocess.TimeoutExpired."""
    shown: list[dict[str, Any]] = json.loads(run_in_thread(run_program, ["ip", "-6", "-j", *what.split()]).stdout.strip() or "[]")
    return shown


def find_way(target: object, source: str = "") -> str:
    """Returns the device by which packets of this machine go there, "nowhere" when they don't. Raises as show_ip does."""
    ways = show_ip(f"route get {target} {source}")
    return str(ways[0].get("dev")) if ways and ways[0].get("type", "unicast") == "unicast" else "nowhere"


def answers_ping(host: str, size: int) -> bool:
    """Returns whether one of three pings by an IPv4 packet of this size, which no router may fragment, is answered. Raises OSError."""
    number = random.getrandbits(32)
    data = struct.pack(">HHI", 8 << 8, 0, number) + bytes(size - IPV4_ICMP_HEADERS)  # ICMP_ECHO, RFC 792
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
        for _ in range(3):
            sock.sendto(data[:2] + struct.pack(">H", 0xFFFF - sum_words(data)) + data[4:], (host, 0))
            with gevent.Timeout(PROVE_AGAIN_S, False):
                while True:
                    answer, (sender, _) = sock.recvfrom(PACKET_MAX)
                    if sender == host and answer[20:21] == b"\0" and answer[24:28] == data[4:8]:  # ICMP_ECHOREPLY
                        return True
    return False


def answers_echo(device: str, source: IPv6Address, target: str, size: int) -> bool:
    """Returns whether one of three echo requests of this size, out of the device, is answered by one of this size. Raises OSError."""
    packet_info, number = source.packed + struct.pack("i", system_socket.if_nametoindex(device)), random.getrandbits(32)
    with open_icmpv6(ECHO_REPLY) as sock:
        for _ in range(3):
            send_echo(sock, packet_info, 64, IPv6Address(target), number, size)
            with gevent.Timeout(PROVE_AGAIN_S, False):
                while True:
                    message = sock.recv(PACKET_MAX)
                    if echo_number(message) == number and len(message) == size - IPV6_HEADER:
                        return True
    return False


def require_root() -> None:
    """Raises PermissionError for what only root can see."""
    try:
        require_privilege()
    except KernelError as error:
        raise PermissionError from error


def warn_of_dropping_chains(devices: str, pool: IPv6Network, who: str) -> None:
    """Warns of other firewalls, see describe_dropping_chains. Raises as that does, and PermissionError."""
    require_root()
    for text in describe_dropping_chains(devices, pool, who).values():
        log.warning("%s", text)


def warn_of_deaf_chains() -> None:
    """Warns of firewalls that drop neighbour discovery. Raises OSError, subprocess.TimeoutExpired, ValueError, PermissionError."""
    require_root()
    with suppress(FileNotFoundError):
        for entry in json.loads(run_in_thread(run_program, ["nft", "-j", "list", "chains"]).stdout or "{}").get("nftables", []):
            chain = entry.get("chain", {})
            if chain.get("hook") != "input" or chain["family"] not in ("inet", "ip6") or chain.get("policy") != "drop":
                continue
            table = run_in_thread(run_program, ["nft", "-t", "list", "table", chain["family"], chain["table"]]).stdout
            if not KNOWS_NEIGHBOURS.search(table):
                name = f"{chain['family']} {chain['table']} {chain['name']}"
                nft = f"nft insert rule {name} meta l4proto ipv6-icmp accept"
                how = "ip6tables -I INPUT -p ipv6-icmp -j ACCEPT" if name == "ip6 filter INPUT" else nft
                log.error("the firewall's chain %s drops ICMPv6, without which no neighbour finds this machine; `%s`", name, how)


class Doctor:
    """The checks of a machine for one section of config.ini: the methods `_check_...`, made in the order in which they stand here.

    Each logs what is wrong, as at a start, or raises it, and else returns what is right. None changes anything.
    """

    FATAL: frozenset[str] = frozenset()  # checks of which each warning is a FAIL; an error, or what is raised, is one anyway
    AT_START: tuple[str, ...] = ()  # those that server and client make when they start, too
    hint = ""  # what the user may do meanwhile
    standing: Sequence[str] = ()  # what the program that runs has warned of, as its `status` has it

    def is_running(self) -> bool:
        """Returns whether the program that it is about runs."""
        raise NotImplementedError

    def run(self) -> Iterator[Finding]:
        """Makes all checks, and adds what the program itself has warned of, if none of them has said it."""
        said: set[str] = set()
        for method in vars(type(self)):
            for found in self._make(method[7:].replace("_", " "), getattr(self, method)) if method.startswith("_check_") else ():
                said.add(found.text)
                yield found
        yield from (Finding("warnings", "warn", text) for text in self.standing if text not in said)

    def warn(self) -> None:
        """Makes those of the start, whose warnings go to the log. What one raises, the start itself raises, or it is no harm."""
        for name in self.AT_START:
            with suppress(Tun6Error, OSError, ValueError, subprocess.TimeoutExpired, Skipped):
                getattr(self, f"_check_{name}")()

    def _make(self, name: str, check: Callable[[], str]) -> list[Finding]:
        logged = logging.handlers.BufferingHandler(1_000)
        logged.setLevel(logging.WARNING)
        log.addHandler(logged)
        log.propagate = False
        end = []
        try:
            with gevent.Timeout(CHECK_S):
                end = [Finding(name, "ok", check())]
        except Skipped as reason:
            end = [Finding(name, "skipped", str(reason))]
        except PermissionError:
            end = [Finding(name, "skipped", "only root can see this; run it with sudo")]
        except (Tun6Error, gevent.Timeout, EOFError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            lacks_ip = isinstance(error, FileNotFoundError) and error.filename == "ip"  # one fault, named once
            end = [Finding(name, *(("skipped", "not possible, see machine") if lacks_ip else ("FAIL", describe_end(error))))]
        finally:
            log.removeHandler(logged)
            log.propagate = True
        bad = {True: "FAIL", False: "warn"}
        faults = [Finding(name, bad[name in self.FATAL or each.levelno >= logging.ERROR], each.getMessage()) for each in logged.buffer]
        return [*faults, *(each for each in end if not faults or each.result == "FAIL")]

    @staticmethod
    def examine_machine() -> str:
        """What both sides need of it."""
        require_ipv6()
        if not shutil.which("ip"):
            raise KernelError("the program `ip` is missing; install it with `apt-get install iproute2`")
        if not os.path.exists("/dev/net/tun"):
            raise KernelError("there is no /dev/net/tun; `modprobe tun`, or give this container the device")
        if os.statvfs("/proc/sys").f_flag & os.ST_RDONLY:
            log.warning("/proc/sys is read-only, so that sysctls of our devices can't be set; make it writable in this container")
        if time.time() < RELEASED:
            log.warning("the clock says %s, which is wrong: certificates can't be checked by it; set it", time.strftime("%Y-%m-%d"))
        if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 2):
            return f"Linux {platform.release()} hands UDP to a TUN packet by packet: no fault, but slower than 6.2 and newer"
        return f"Linux {platform.release()} takes large packets of TCP and UDP"

    def examine_metrics(self, where: tuple[str, int] | None) -> None:
        """Whether the metrics of the program, if it runs, are what answers there. Raises ConfigError."""
        if not where:
            return
        require_prometheus_client()
        answer = b""
        with suppress(OSError), socket.create_connection(where, LOOKUP_S) as sock:
            sock.sendall(b"GET /metrics HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
            while len(answer) < MESSAGE_MAX and (more := sock.recv(MESSAGE_MAX)):
                answer += more
        if b"tun6_" not in answer and self.is_running():
            how = "another program has the port, or the address is none of this machine; see `ss -tlnp` and the log"
            log.warning("metrics = %s port %d: they don't answer: %s", *where, how)


class ServerDoctor(Doctor):
    """The checks of a server's machine."""

    FATAL = frozenset({"forwarding", "uplink", "overlap", "firewall", "disk"})
    AT_START = "config", "uplink", "descriptors", "disk", "certificate"

    def __init__(self, config: ServerConfig, keyed: bool | None = None) -> None:
        """`keyed`: whether clients have keys, where that is known; without it, what config.ini says."""
        self._config, self._pool = config, config.prefixrange
        self._keyed = bool(config.keys or config.store) if keyed is None else keyed  # in a cluster it is the store that says it
        self._pid = 0  # of the server that runs
        self._packets: socket.socket | None = None  # what comes for the pool
        self._until = 0.0  # when that has been waited for
        self.hint = f"To see whether {self._pool} is routed here, ping {self._pool[1]} from another machine now."

    def is_running(self) -> bool:
        """Returns whether the server runs, whose process it notes."""
        with system_socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, suppress(OSError):
            sock.connect(self._config.control)
            self._pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return bool(self._pid)

    def run(self) -> Iterator[Finding]:
        """Makes all checks, and hears meanwhile what comes for the pool."""
        with ExitStack() as undo:
            with suppress(OSError):
                sock = undo.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IPV6)))
                attach_filter(sock, filter_program(solicitation_fields(self._pool), prefix_fields(self._pool, 24)))
                self._packets, self._until = sock, time.monotonic() + POOL_S
                hear_all_multicast(sock, self._config.ndp or default_interface(netifaces.AF_INET6) or "")
            yield from super().run()

    def _is_ours(self, interface: str) -> bool:
        return re.fullmatch(re.escape(self._config.tun).replace("%d", r"\d+"), interface) is not None

    def _find_own(self) -> IPv6Address | None:
        """Returns the address that the server has given lo, if it has."""
        found = parse_own_addresses(run_in_thread(run_program, ["ip", "-6", "addr", "show", "dev", "lo"]).stdout)
        return next((prefix[1] for prefix, _ in found if prefix.subnet_of(self._pool)), None)

    def _check_config(self) -> str:
        secret = self._config.cert, self._config.keys, self._config.store and self._config.file
        for path in filter(os.path.exists, filter(None, secret)):
            if os.stat(path).st_mode & (stat.S_IROTH | stat.S_IWOTH):
                log.warning("others can read the secret in %s; `chmod o= %s`", path, path)
        if not (self._config.assignments or self._config.store):
            warn_standing("assignments", "no `assignments` file in %s: all prefixes are forgotten when the server ends", self._config.file)
        self._warn_if_open()
        open_keys(self._config)
        return f"{self._config.file} is a server's"

    def _warn_if_open(self) -> None:
        if self._keyed and self._config.keys_required:
            return
        which, closes = ("any Id that has no key yet", "keys_required = yes") if self._keyed else ("any Id", "keys")
        how = (
            "a pool made without `cluster init --open`" if self._config.store and not self._keyed else f"`{closes}` in {self._config.file}"
        )
        warn_standing(
            "open",
            "open: whoever reaches port %d gets a /64 and may claim %s; %s closes it, `new_ids_per_hour` bounds new Ids",
            *(self._config.listenport, which, how),
        )

    def _check_store(self) -> str:
        """Whether the database of a cluster can be reached, has the pool of this server, and can lose nothing."""
        if not self._config.store:
            return "this server shares its pool with no other one"
        began, address = time.monotonic(), public_url(self._config.store)
        database = Database(self._config.store, f"tun6 doctor {os.getpid()}")
        try:
            with store_errors(self._config.store):
                run_in_thread(database.connect)
                pool, missing, risks = run_in_thread(database.examine)
        except StoreDown as down:
            raise StoreDown(f"{down}; known Ids are served as each server knows them, new ones refused until it is back") from None
        finally:
            run_in_thread(database.close)
        took = time.monotonic() - began
        require_fit(pool, address, self._pool, key_policy(self._config))
        self._keyed = pool.keys != "none"
        if not self._keyed:
            self._warn_if_open()
        if pool.timeline != pool.current:
            how = "start those servers, or `tun6.py cluster accept` goes on without what they know"
            log.error(
                "the store may have lost changes, so that nobody gets another /64 until %s wrote back theirs; %s", ", ".join(missing), how
            )
        for risk in risks:
            log.warning("the database's %s", risk)
        return f"{address} has the pool {pool.prefix}, and commits wait for a synchronous standby; it answered in {1000 * took:.0f} ms"

    def _check_machine(self) -> str:
        return self.examine_machine()

    def _check_server(self) -> str:
        host, port = self._config.localhost, self._config.listenport
        with socket.socket() as probe, suppress(OSError):
            probe.connect((host, port))
            if self.is_running():
                status: dict[str, Any] = {}
                with suppress(OSError, RequestError):
                    status = ask_server(self._config.control, {"do": "status", "files": files_of(self._config)})
                self.standing = status.get("warnings", ())
                for id_ in status.get("contended", ()):
                    log.warning("several clients have the Id %s, and take it from each other; give each an `id` of its own", quote_id(id_))
                return f"process {self._pid} listens on {host} port {port}"
            raise KernelError(
                f"another program listens on {host} port {port}, or the server could not make {self._config.control}, where nobody is;"
                " see `ss -tlnp` and the log"
            )
        raise KernelError(f"no server listens on {host} port {port}; start it, and see what its log says")

    def _check_forwarding(self) -> str:
        warn_of_forwarding()
        return "IPv6 forwarding is on"

    def _check_uplink(self) -> str:
        ours = list(filter(self._is_ours, netifaces.interfaces()))
        warn_of_expiring_routes(*ours)
        way = find_way(FAR_ADDRESS)
        if way == "nowhere":
            deaf = "`, or `".join(f"sysctl -w net.ipv6.conf.{name}.accept_ra=2" for name in find_deaf_interfaces(*ours)[:4])
            how = f"`{deaf}` helps if a router there tells it" if deaf else "ask its provider which one to set"
            log.warning("this machine has no IPv6 default route, so that clients reach nobody; %s", how)
        return f"the way to the IPv6 Internet is {way}"

    def _check_own_address(self) -> str:
        own = self._find_own()
        if not own and not has_routed_address(self._pool):
            log.warning("no IPv6 address here is routed, from which ICMPv6 errors could come; a server that runs gives lo one of its range")
        return f"ICMPv6 errors come from {own or 'an address that is routed'}"

    def _check_overlap(self) -> str:
        warn_of_overlap(self._pool, self._find_own())
        return f"no address of this machine is in {self._pool}"

    def _check_firewall(self) -> str:
        warn_of_dropping_chains(self._config.tun.replace("%d", "*"), self._pool, "clients")
        warn_of_deaf_chains()
        return "no chain drops what is forwarded, or it knows tun6"

    def _check_descriptors(self) -> str:
        """Their limit, which a server raises up to the hard one."""
        _, limit = resource.prlimit(self._pid, resource.RLIMIT_NOFILE)
        most, required = self._config.max_clients, DESCRIPTORS_PER_CLIENT * self._config.max_clients + OTHER_DESCRIPTORS
        if limit < required:
            log.warning("max_clients = %d takes %d descriptors, the limit is %d; raise LimitNOFILE= or `ulimit -Hn`", most, required, limit)
        return f"{limit} are enough for {most} clients"

    def _check_BBR(self) -> str:
        return f"real links get {find_congestion_controls(self._config.congestion, self._config.link).real}"

    def _check_disk(self) -> str:
        if self._config.store:
            return "who has which /64 is in the store"
        path = Path(os.path.realpath(needed(self._config.assignments, "config")))
        disk, size = os.statvfs(path.parent), path.stat().st_size if path.exists() else 0
        free = disk.f_bavail * disk.f_frsize
        if disk.f_flag & os.ST_RDONLY or (disk.f_files and not disk.f_favail) or free < 2 * size + DISK_MIN:
            log.warning("the disk of %s is full or can only be read, %d KiB are free: new Ids are refused; make room", path, free >> 10)
        return f"{free >> 20} MiB are free for {path}"

    def _check_assignments(self) -> str:
        """The file and its backup, without its lock."""
        if self._config.store:
            return "they are in the store"
        store = AssignmentStore(PrefixPool(self._pool), self._config.assignments, lock=False)
        owners, backup = len(store.pool.owners()), store.backup
        if not store.pool.free:
            log.error("all %d /64s of %s have an owner: new Ids are refused; make the range larger", store.pool.size, self._pool)
        if owners and backup and not backup.exists():
            log.warning("there is no %s, which the server makes at the next new Id; keep a copy on another machine, too", backup)
        return f"{owners} of {store.pool.size} /64s have an owner; keep a copy of the file on another machine"

    def _check_certificate(self) -> str:
        """And the clock, by which clients with `tls = yes` see whether it is valid."""
        path = needed(self._config.cert, "config, there is no TLS")
        server_tls_context(path)
        begins, ends = certificate_validity(path) or (0, 0)
        days = f"{time.strftime('%Y-%m-%d', time.gmtime(begins))} to {time.strftime('%Y-%m-%d', time.gmtime(ends))}"
        if not begins <= time.time() <= ends - CERTIFICATE_S:
            log.warning("the certificate is valid from %s: others have no way in without `fingerprint`; renew it, or set the clock", days)
        return f"it is valid from {days}"

    def _check_hook_and_ndp(self) -> str:
        Hooks(self._config.hook)
        self.examine_metrics(self._config.metrics)
        if self._config.ndp:
            NeighbourProxy(self._config.ndp, self._pool)
            if not is_up(self._config.ndp):
                raise KernelError(f"ndp = {self._config.ndp}: it is down; `ip link set {self._config.ndp} up`")
        return "what config.ini names is there"

    def _check_range(self) -> str:
        """Whether the pool is routed here, or its addresses are looked for on a link: by what has come meanwhile."""
        if self._packets is None:
            raise PermissionError
        addresses = parse_addresses(read_text(IF_INET6))
        own = {address for _, address, _ in addresses}  # what comes for these comes by the link anyway
        with suppress(socket.timeout):
            while True:
                self._packets.settimeout(max(self._until - time.monotonic(), 1e-3))
                packet, (interface, _, kind, *_) = self._packets.recvfrom(SOLICITATION_MAX)
                asked = parse_solicitation(packet)
                target = asked.target if asked else IPv6Address(packet[24:40])
                if kind == PACKET_OUTGOING or self._is_ours(interface) or target not in self._pool or target in own:
                    continue
                if asked and interface != self._config.ndp:
                    how = f"set `ndp = {interface}`, or ask the provider to route it"
                    raise KernelError(f"{self._pool} is not routed here, its addresses are looked for on the link of {interface}; {how}")
                if asked or kind == PACKET_HOST:
                    return f"packets for {self._pool} come by {interface}"
        for interface, address, length in addresses:
            if self._pool.subnet_of(IPv6Network((address, length), False)) and interface != self._config.ndp:
                log.warning("%s is within the network of %s: perhaps it is not routed, but needs `ndp = %s`", self._pool, *2 * [interface])
        raise Skipped(f"nothing came for {self._pool}; ping {self._pool[1]} from another machine while this runs, to see if it is routed")


class ClientDoctor(Doctor):
    """The checks of a client's machine, along the way of a packet: to the server, and then into the tunnel."""

    FATAL = frozenset({"routes", "LAN"})
    AT_START = ("config",)
    OF_EACH_SERVER = frozenset({"DNS", "TCP", "TLS"})

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._status: dict[str, Any] = {}  # of the client that runs
        self._remotes: list[RemoteServer] = []
        self._remote: RemoteServer | None = None  # that is examined now
        self._socks: dict[RemoteServer, socket.socket] = {}
        self._streams: dict[RemoteServer, Stream] = {}
        self._prefix: IPv6Network | None = None
        self._is_misrouted = False
        self._server_end: str | None = None  # the address by which the server answers in the tunnel

    def is_running(self) -> bool:
        """Returns whether a client has its device."""
        return self._config.tun in netifaces.interfaces()

    def run(self) -> Iterator[Finding]:
        """Makes all checks. Asks the client that runs, if it does, what it knows."""
        with suppress(OSError, RequestError):
            self._status = ask_server(self._config.control, {"do": "status"})
        self.standing = self._status.get("warnings", ())
        yield from super().run()
        for sock in self._socks.values():
            sock.close()

    def _make(self, name: str, check: Callable[[], str]) -> list[Finding]:
        """Makes a check, or the check of each server of the list. There a fault is only a warning as long as another server has none."""
        if name not in self.OF_EACH_SERVER or not self._remotes:
            return super()._make(name, check)
        found: list[Finding] = []
        for remote in self._remotes:
            self._remote = remote
            for each in super()._make(name, check):
                is_named = len(self._remotes) == 1 or each.text.startswith(remote.host)
                found.append(each if is_named else each._replace(text=f"{remote.name}: {each.text}"))
        works = any(each.result == "ok" for each in found)
        return [each._replace(result="warn") if works and each.result == "FAIL" else each for each in found]

    def _stream(self) -> Stream:
        """Returns the connection to the server that the client has, or to the first that answered. Raises Skipped when there is none."""
        found = {remote.name: stream for remote, stream in self._streams.items()}
        return needed(found.get(self._status.get("server", ""), next(iter(found.values()), None)), "TLS")

    def _has_connection(self) -> bool:
        return bool(self._streams) and (self._status.get("outage") or {"seconds": 0})["seconds"] is not None

    def _check_config(self) -> str:
        path = self._config.file
        if self._config.key and os.stat(path).st_mode & stat.S_IROTH:
            log.warning("%s has a key, and whoever reads it can be this client; `chmod o= %s` keeps others out", path, path)
        if self._config.firewall is None and not self._config.lan:
            how = f"`firewall = yes` in {path} lets in only answers, and `open` there what is named"
            warn_standing("firewall", "the whole IPv6 Internet reaches this machine at the address that it gets; %s", how)
        return f"{self._config.file} is a client's"

    def _check_machine(self) -> str:
        return self.examine_machine()

    def _check_programs(self) -> str:
        self._remotes = Client(self._config).remotes
        self.examine_metrics(self._config.metrics)
        return "what config.ini needs is there"

    def _check_Id(self) -> str:
        id_ = self._config.id or default_id()
        if not self._config.id:
            file = path_of_last("id", self._config.file)
            of_service = STATE_FOLDER / file.name  # the doctor is run by hand, also where the client is a service
            is_service = Path(os.path.realpath(file.parent)) == CONFIG_FOLDER and of_service.exists()
            warn_of_another_id(of_service if is_service else file, id_, remember=False)
        return f"this machine is {quote_id(id_)}"

    def _check_IPv4_route(self) -> str:
        with system_socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                hosts = filter(is_ipv4, (each.host for each in self._config.remotehost))
                probe.connect((next(hosts, "192.0.2.1"), 9))  # nothing is sent
            except OSError as error:
                raise SessionError(f"there is no IPv4 way to the server: {error.strerror}; connect the network, see `ip route`") from None
            return f"packets to the server leave from {probe.getsockname()[0]}"

    def _check_DNS(self) -> str:
        remote = needed(self._remote, "programs")
        try:
            found = remote.find_addresses()
        except OSError as error:
            raise SessionError(f"{remote.host}: {error.strerror}; is the name right, does a name server answer?") from None
        return f"the server is {', '.join(host for host, _ in found)}"

    def _check_TCP(self) -> str:
        remote, began = needed(self._remote, "programs"), time.monotonic()
        try:
            self._socks[remote] = remote.connect()
        except (gevent.Timeout, OSError) as error:
            advice = "does the server run, are `remotehost` and `remoteport` right, does a firewall drop it?"
            with suppress(OSError):
                (host, port), *_ = remote.find_addresses()
                if isinstance(error, (gevent.Timeout, TimeoutError)) and answers_ping(host, IPV4_ICMP_HEADERS):
                    advice = (
                        f"{host} answers pings, so a firewall there or on the way drops TCP port {port}, or `remotehost` is another machine"
                    )
            raise SessionError(f"{remote.name}: {describe_end(error)}; {advice}") from None
        return f"{remote.name} answers in {1000 * (time.monotonic() - began):.0f} ms"

    def _check_TLS(self) -> str:
        remote = needed(self._remote, "programs")
        try:
            with gevent.Timeout(HANDSHAKE_S):
                stream = self._streams[remote] = remote.open_stream(needed(self._socks.get(remote), "TCP"))
        except ProtocolError as error:
            advice = f"compare with `keygen` on the server; the clock here says {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
            if "does not speak TLS" in str(error):
                advice = "is there another program on that port, a server without `cert`, or a portal or proxy on the way?"
            raise SessionError(f"{error}; {advice}") from None
        return "the server's certificate is the right one" if stream.encrypt else "none is asked for"

    def _check_hello(self) -> str:
        """Whether the server serves this Id: by what the client that runs has heard, or by asking without taking a session."""
        outage = self._status.get("outage") or {}
        if outage and outage["seconds"] is None:
            cut_off = outage["last_reason"].endswith(CUT_OFF)
            why = (
                "was it restarted, or has another client this Id? `tun6.py doctor` there tells"
                if cut_off
                else "the server's log may say more"
            )
            raise SessionError(f"the client that runs has no connection: {outage['last_reason']}; {why}")
        if outage and outage["reason"].endswith(CUT_OFF) and time.time() - outage["time"] - outage["seconds"] < CONTENTION_WINDOW_S:
            log.warning(
                "the server has just ended the connection: it was restarted, or another client has this Id; `tun6.py doctor` there tells"
            )
        stream = self._stream()
        host, port = stream.sock.getpeername()
        if not self._status.get("dry") or self._status["address"] != f"{host} port {port}":
            raise Skipped("no client runs that knows if this server can be asked without taking its session over")
        hello = {
            "Id": self._config.id or default_id(),
            "Offload": [],
            "Dry": True,
            **({"Key": self._config.key} if self._config.key else {}),
        }
        with gevent.Timeout(HANDSHAKE_S):
            stream.send(encode_message(hello))
            answer, _ = receive_message(stream)
        prefix = parse_answer(answer)[0] if {"Error", "Prefix"} & answer.keys() else "a new prefix"
        return f"the server has {prefix} for this client"

    def _check_path_MTU(self) -> str:
        """Of the path outside, by what the kernel knows and by pings."""
        host, port = self._stream().sock.getpeername()
        advice = "`mss = 1220` in config.ini spares the client a stall at its start"
        with system_socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            mtu = probe.getsockopt(socket.IPPROTO_IP, IP_MTU)
            if mtu <= PATH_MTUS[0]:
                log.warning("packets to %s have at most %d bytes: the path is narrow, or larger ones vanish; %s", host, mtu, advice)
            elif not answers_ping(host, IPV4_ICMP_HEADERS):
                raise Skipped(f"{host} answers no pings")
            elif not answers_ping(host, mtu) and probe.getsockopt(socket.IPPROTO_IP, IP_MTU) >= mtu:
                log.warning("packets of %d bytes to or from %s vanish, and nobody says so; %s", mtu, host, advice)
            return f"{probe.getsockopt(socket.IPPROTO_IP, IP_MTU)} bytes"

    def _check_TUN(self) -> str:
        name = self._config.tun
        if not self.is_running():
            raise KernelError(f"there is no device {name}, so no client runs; start it, and see what its log says")
        own = next((address for interface, address in machine_addresses() if interface == name), None)
        if not is_up(name) or own is None:
            require_ipv6_of(name)
            raise KernelError(f"{name} is down or has no address: the server has not answered yet, see above, or somebody changed it")
        self._prefix = IPv6Network((own, 64), False)
        mtu = read_text(Path(f"/sys/class/net/{name}/mtu"))
        if mtu != str(self._config.mtu):
            log.warning("somebody has given %s an mtu of %s, not %d; restart the client", name, mtu, self._config.mtu)
        managers = " or ".join(manager for path, manager in MANAGERS.items() if Path(path).exists())
        return f"{name} has {own}" + (managers and f"; if it gets lost, perhaps by {managers}")

    def _check_routes(self) -> str:
        name, own = self._config.tun, needed(self._prefix, "TUN")[1]
        ways = {f"what is sent from {own}": find_way(FAR_ADDRESS, f"from {own}")}
        if self._config.default_route:
            ways["what this machine begins"] = find_way(FAR_ADDRESS)
        for what, way in ways.items():
            if way != name:
                self._is_misrouted = True
                why = "somebody removed that; restart the client, which sets it anew"
                if not self._has_connection():
                    why = "there is no tunnel now, see TCP, TLS and hello"
                elif way != "nowhere":
                    why = (
                        "another program, such as a VPN, takes it, see `ip -6 rule`; end that, or (WireGuard) take ::/0 from its AllowedIPs"
                    )
                log.warning("%s goes to %s, not to %s: %s", what, way, name, why)
        others = {str(route.get("dev")) for route in show_ip("route show default")} - {name}
        return f"packets go to {name}" + (f"; {', '.join(sorted(others))} has a default route for its own addresses" if others else "")

    def _probe(self, hops: int) -> Iterator[tuple[int, int, str]]:
        """Yields what answers to three rounds of probe_hops into the tunnel."""
        packet_info = needed(self._prefix, "TUN")[1].packed + struct.pack("i", system_socket.if_nametoindex(self._config.tun))
        with open_icmpv6(UNREACHABLE, TIME_EXCEEDED, ECHO_REPLY) as sock:
            for _ in range(3):
                yield from probe_hops(sock, packet_info, random.getrandbits(28) << 4, hops)

    def _check_server_end(self) -> str:
        began = time.monotonic()
        for *_, sender in self._probe(1):
            self._server_end = sender
            return f"{sender} answers in {1000 * (time.monotonic() - began):.0f} ms"
        if self._is_misrouted:
            raise SessionError("the other end of the tunnel can't be asked, see routes")
        if not self._has_connection():
            raise SessionError("the other end of the tunnel does not answer: there is no connection to the server, see TCP, TLS and hello")
        raise SessionError("the other end of the tunnel does not answer; is IPv6 forwarding on there? `tun6.py doctor` there tells")

    def _check_Internet(self) -> str:
        end, refused = needed(self._server_end, "server end"), False
        for hop, kind, sender in self._probe(PROVE_HOPS):
            if sender != end:
                return f"{sender} answers, behind the server"
            refused = refused or (hop > 1 and kind == UNREACHABLE)
        if refused:
            raise SessionError(f"the server {end} has no way to the Internet; there, see `ip -6 route show default` and `tun6.py doctor`")
        log.warning("nothing behind the server answers; is its range routed to it? `tun6.py doctor` there tells")
        return ""

    def _check_large_packets(self) -> str:
        end, source, name = needed(self._server_end, "server end"), needed(self._prefix, "TUN")[1], self._config.tun
        if not answers_echo(name, source, end, ECHO_MIN):
            raise Skipped(f"{end} answers no pings")
        if not answers_echo(name, source, end, self._config.mtu):
            raise SessionError(f"packets of {self._config.mtu} bytes don't come back from {end}; see path MTU, and `mtu` on both sides")
        return f"packets of {self._config.mtu} bytes go to {end} and come back"

    def _check_firewall(self) -> str:
        if not (self._config.lan if self._config.firewall is None else self._config.firewall):
            raise Skipped("there is none in config.ini")
        needed(self._prefix, "TUN")
        require_root()
        if not Firewall(self._config.tun, True, (), lambda error: None).is_there():
            raise KernelError("the client's firewall is not there, so that everything is open; restart the client, and see its log")
        return "the client's firewall is there"

    def _check_LAN(self) -> str:
        lan, prefix = needed(self._config.lan, "config, there is no `lan`"), needed(self._prefix, "TUN")
        if lan not in netifaces.interfaces() or not is_up(lan):
            raise KernelError(f"there is no interface {lan}, or it is down; see `ip link`")
        require_ipv6_of(lan)
        if read_text(Path(f"/sys/class/net/{lan}/carrier")) == "0":
            raise KernelError(f"{lan} has no carrier: its cable is out, or what is at the other end is off")
        if str(prefix[1]) not in interface_addresses(lan, netifaces.AF_INET6):
            log.warning("%s has not got %s; the client's log says who removed it", lan, prefix[1])
        if read_sysctl("net.ipv6.conf.all.forwarding") != "1":
            log.warning("IPv6 forwarding is off, so that %s reaches this machine only; `sysctl -w net.ipv6.conf.all.forwarding=1`", lan)
        warn_of_expiring_routes(lan, self._config.tun)
        warn_of_dropping_chains(self._config.tun, prefix, "the LAN")
        warn_of_deaf_chains()
        if self._status and not self._status["parts"].get("lan", {}).get("announces"):
            log.warning("the hosts of %s are told of no router here; see Internet, above, and the client's log", lan)
        return f"the hosts of {lan} are told of {prefix}"

    def _check_other_routers(self) -> str:
        lan, found = needed(self._config.lan, "config, there is no `lan`"), set()
        with gevent.Timeout(LISTEN_S, False):
            for router in find_other_routers(lan):
                found.add(router)
        if found:
            log.warning("%s is an IPv6 router on %s, too; end it, or see `lan_preference`", ", ".join(sorted(found)), lan)
        return f"there is no other IPv6 router on {lan}"

    def _check_name_servers(self) -> str:
        servers = re.findall(r"^\s*nameserver\s+([0-9a-fA-F.:]+)", read_text(Path("/etc/resolv.conf")), re.MULTILINE)
        inside = [each for each in servers if not is_ipv4(each) and find_way(each) in (self._config.tun, "nowhere")]
        if inside and inside == servers:
            level, then = (
                (logging.WARNING, "")
                if any(is_ipv4(each.host) for each in self._config.remotehost)
                else (logging.ERROR, ", nor the server without it")
            )
            log.log(level, "%s: all name servers are reached only through the tunnel%s; add one with IPv4", ", ".join(inside), then)
        return f"{len(servers)}, of which {len(inside)} only through the tunnel"


# ---- demo ------------------------------------------------------------------------------------------------------------


def wait_until(what: str, condition: Callable[[], T], seconds: float = 10) -> T:
    """Returns the first true value of the condition, tried a hundred times a second. Raises KernelError with `what` after so long."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise KernelError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.01)


class Lab:
    """A network of hosts on this machine, each in its own network namespace. It exists while its `with` block runs.

    internet ---------- server ---------- nat ---------- client ---------- lan
    2001:db8:ffff::2    10.9.0.1          masquerades    10.8.0.2         a host behind the client
                                          |
             only IPv4 passes here -----> +------------- second, 10.8.1.2: another client
    """

    INTERNET = "2001:db8:ffff::2"
    SERVER = "10.9.0.1"
    HOSTS: tuple[str, ...] = ("internet", "server", "nat", "client", "lan", "second")

    def __init__(self) -> None:
        self._names = {host: f"tun6-{os.getpid()}-{host}" for host in self.HOSTS}
        self._undo = ExitStack()

    def __enter__(self) -> Lab:
        with ExitStack() as undo:
            for name in self._names.values():
                self._ip(f"netns add {name}")
                undo.callback(self._ip, f"netns del {name}")
            self._build()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def ip(self, host: str, command: str) -> str:
        """Runs `ip` on a host and returns its output. Raises KernelError."""
        return self._ip(f"-n {self._names[host]} {command}")

    def popen(self, host: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Starts a program on a host like subprocess.Popen, with text."""
        return subprocess.Popen(["ip", "netns", "exec", self._names[host], *command], text=True, **options)

    def run(self, host: str, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a program on a host like subprocess.run, with text and captured output."""
        return subprocess.run(["ip", "netns", "exec", self._names[host], *command], text=True, capture_output=True, **options)

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Moves this thread to the host meanwhile; a socket or TUN made there stays there. Don't start threads inside."""
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self._names[host]}") as there:
            self._enter(there.fileno())
            try:
                yield
            finally:
                self._enter(home.fileno())

    def pings(self, host: str, address: str = INTERNET) -> bool:
        """Returns whether one ping from the host is answered within 0.2 s."""
        return self.run(host, "ping", "-6", "-c", "1", "-W", "0.2", address).returncode == 0

    def set_sysctl(self, host: str, name: str, value: str) -> None:
        """Sets a sysctl of the host's network."""
        with self.inside(host):
            Path("/proc/sys", *name.split(".")).write_text(value)

    @staticmethod
    def _enter(namespace: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there since Python 3.12
        if libc.setns(namespace, 0x40000000):  # CLONE_NEWNET, sched.h
            raise KernelError(f"can't enter a network namespace: {os.strerror(ctypes.get_errno())}")

    def _build(self) -> None:
        for host in self.HOSTS:  # without a search for duplicate addresses, they can be used at once
            self.set_sysctl(host, "net.ipv6.conf.default.dad_transmits", "0")
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
        self.set_sysctl("server", "net.ipv6.conf.all.forwarding", "1")
        self.set_sysctl("client", "net.ipv6.conf.all.forwarding", "1")
        self.set_sysctl("nat", "net.ipv4.ip_forward", "1")
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
            raise KernelError(
                f"the program {command[0]} is missing; on Debian: apt-get install iproute2 nftables iputils-ping radvd"
            ) from None
        if done.returncode:
            raise KernelError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
        return done.stdout


class Demo:
    """Shows in a Lab what the real server and clients do, step by step."""

    CONFIG = """
        [server]
        localhost = 0.0.0.0
        listenport = 10000
        prefixrange = 2001:db8:1::/56
        documentation_addresses = yes
        assignments = assignments.json
        control = {folder}/control
        [client]
        remotehost = 10.9.0.1
        remoteport = 10000
        control = {folder}/client-control
    """
    BULK_BYTES, BULK_PORT = 64 << 20, 5001  # each way; of a host of the LAN or the Internet
    LAN_S = 15.0  # until a LAN host has IPv6, of which tun6 listens 3 s for other routers

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab, self._folder = lab, folder
        self._running: dict[str, subprocess.Popen[str]] = {}
        config = textwrap.dedent(self.CONFIG).format(folder=folder)
        (folder / "config.ini").write_text(config)
        (folder / "client.ini").write_text(f"{config}lan = eth1\n")
        lab.set_sysctl("client", "net.ipv6.conf.all.forwarding", "0")  # `lan` turns it on
        lab.set_sysctl("internet", "net.ipv6.conf.all.forwarding", "1")  # it is a router of the Internet, too
        lab.ip("server", f"-6 route add default via {Lab.INTERNET}")

    def run(self) -> None:
        """Runs all steps. Raises KernelError at the first that fails."""
        say = self._say
        say("six hosts are up", "internet - server - nat - client - lan, and second behind the same nat; only IPv4 passes the nat")
        self._start("server", "server")
        began = time.monotonic()
        self._start("client", "client", "client.ini")
        prefix = self._prefix("client")
        say("hello and prefix", f"the client said its MAC and got {prefix}, {time.monotonic() - began:.2f} s after it was started")
        wait_until("the LAN host reaches the Internet", lambda: self._lab.pings("lan"), self.LAN_S)
        address = re.findall(r"inet6 (\S+)/64 scope global", self._lab.ip("lan", "-6 addr show dev eth0"))[0]
        took = f"{time.monotonic() - began:.1f} s after the client was started"
        say("a LAN host where nothing is configured", f"by `lan = eth1` on the client it has address and route, {took}")
        say("a LAN host reaches the IPv6 Internet", f"{address} pinged {Lab.INTERNET}: {self._ping('lan')}")
        say("bulk transfer up", self._transfer("lan", "internet", Lab.INTERNET))
        say("firewall", self._show_firewall(address))
        say("bulk transfer down", self._transfer("internet", "lan", address))
        outage = self._kill_server(prefix)
        say("server killed and restarted", f"the tunnel was back {outage:.1f} s after the restart, with the same {prefix}")
        self._start("second", "client")
        other = self._prefix("second")
        if other == prefix:
            raise KernelError(f"the second client got the first one's prefix, {prefix}")
        say("a second client", f"it got {other} and pinged {Lab.INTERNET}: {self._ping('second')}")
        say("native IPv6 beside the tunnel", self._show_native(prefix))
        self.stop()
        wait_until("the LAN host has no route any more", lambda: "default" not in self._lab.ip("lan", "-6 route"))
        say("the client ends", "and tells the LAN host, which has no route any more and loses no time with dead IPv6")
        say("keys and encryption", self._show_keys())

    def _show_firewall(self, address: str) -> str:
        """Connects from the Internet to the LAN host, and starts the client again with a firewall that lets this in."""
        with self._lab.inside("lan"):
            listener = system_socket.create_server((address, self.BULK_PORT), family=system_socket.AF_INET6)
        with listener, self._lab.inside("internet"):
            try:
                system_socket.create_connection((address, self.BULK_PORT), 5).close()
            except OSError as error:
                refused = describe_end(error)
            else:
                raise KernelError("a connection from the Internet to the LAN host was not refused")
        self.stop("client")
        opening = f"::{':'.join(IPv6Address(address).exploded.split(':')[4:])} tcp {self.BULK_PORT}"
        with open(self._folder / "client.ini", "a") as config:
            config.write(f"open = {opening}\n")
        self._start("client", "client", "client.ini")
        wait_until("the LAN host reaches the Internet again", lambda: self._lab.pings("lan"), self.LAN_S)
        return f"a connection from the Internet to the LAN host fails ({refused}); from now on the client has `open = {opening}`"

    def _show_native(self, prefix: IPv6Network) -> str:
        """Gives the client's host IPv6 of a provider, too, and starts the client again beside it. Takes it away afterwards."""
        lab, native = self._lab, "2001:db8:aaaa::5"
        self.stop("client")
        lab.ip("internet", f"link add eth1 type veth peer name eth2 netns {lab._names['client']}")
        for host, device, address in (("internet", "eth1", "2001:db8:aaaa::1"), ("client", "eth2", native)):
            lab.ip(host, f"link set {device} up")
            lab.ip(host, f"addr add {address}/64 dev {device} nodad")
        lab.ip("client", "-6 route add default via 2001:db8:aaaa::1 metric 1")
        wait_until("native IPv6 works", lambda: lab.pings("client"))
        with lab.inside("internet"):
            listener = system_socket.create_server((Lab.INTERNET, 5002), family=system_socket.AF_INET6)
        with lab.inside("client"):
            near = system_socket.create_connection((Lab.INTERNET, 5002), 5)
        with listener, near, listener.accept()[0] as far:
            self._start("client", "client", "client.ini")
            for address in (str(prefix[1]), native):
                wait_until(f"{address} answers", lambda address=address: lab.pings("internet", address))  # type: ignore[misc]
            far.settimeout(5)
            near.sendall(b"alive")
            if far.recv(5) != b"alive":
                raise KernelError("a connection of the native address did not survive the tunnel's coming")
        lab.ip("internet", "link del eth1")
        return f"a connection from {native} went on when the tunnel came, and {prefix[1]} and {native} both answer"

    def _show_keys(self) -> str:
        """Starts everything again with keys, of which only one client has one."""
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
        """Runs a command on the server and returns what it prints. Raises KernelError."""
        done = self._lab.run("server", sys.executable, str(Path(__file__).resolve()), *arguments)
        if done.returncode:
            raise KernelError(f"`tun6.py {' '.join(arguments)}` failed: {done.stderr.strip()}")
        return done.stdout

    def stop(self, *hosts: str) -> None:
        """Ends the programs on these hosts, or on all. Kills one that does not end within 5 s, and raises KernelError."""
        running = {host: self._running[host] for host in hosts or self._running}
        for process in reversed(running.values()):
            process.terminate()
        for host, process in running.items():
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
        # without -w, ping waits for its last answer only twice as long as the others took
        done = self._lab.run(host, "ping", "-6", "-c", "10", "-w", "5", "-i", "0.05", Lab.INTERNET)
        came = set(re.findall(r"icmp_seq=(\d+) ", done.stdout))
        found = re.search(r"= [\d.]+/([\d.]+)/", done.stdout)
        if not found or not came >= set(map(str, range(1, 11))):
            raise KernelError(f"ping on {host} lost packets: {done.stdout.strip() or done.stderr.strip()}")
        return f"10 of 10 came back, {found[1]} ms on average"

    def _transfer(self, source: str, sink: str, address: str) -> str:
        data = os.urandom(1 << 20) * (self.BULK_BYTES >> 20)
        with self._lab.inside(sink):
            listener = system_socket.create_server((address, self.BULK_PORT), family=system_socket.AF_INET6)
        with self._lab.inside(source):
            sender = system_socket.socket(system_socket.AF_INET6)

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(system_socket.SHUT_WR)

        received = bytearray()
        with listener, sender:
            sender.settimeout(20)
            sender.connect((address, self.BULK_PORT))
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

    def _kill_server(self, prefix: IPv6Network) -> float:
        """Kills and restarts the server. Returns the seconds from the restart until the LAN host's ping is answered."""
        self._running["server"].kill()
        self._running["server"].wait()
        self._start("server", "server")
        began = time.monotonic()
        wait_until("the tunnel comes back", lambda: self._lab.pings("lan"))
        outage = time.monotonic() - began
        wait_until("the client has the prefix that it had", lambda: f": has {prefix} on" in self._log("client").splitlines()[-1])
        return outage


# ---- command line ----------------------------------------------------------------------------------------------------

CONFIG_FILES = ("/etc/tun6/config.ini", "config.ini")  # the first that exists is read: where a service runs, its is the one that counts
WARNINGS_MAX, WARNINGS_INTERVAL_S = 20, 60  # so many warnings of one kind are logged in so many seconds
CLIENTS_OPTIONS = {
    "command",
    "function",
    "verbose",
    "config",
    "json",
    "action",
    "address",
}  # of `clients`; the others are arguments of the request
DRAIN_MINUTES = 1  # in which the sessions of a server that drains end
LOG_LINES_MAX = 10_000  # lines that may wait for the reader of the log
LOG_FLUSH_S = 1.0  # at the end, for those lines
M_ARENA_MAX = -8  # malloc.h
FULL_COLLECTION = 1000  # smaller collections of garbage for one of everything; Python's default is 10

# A setting's parser takes the text in config.ini and returns its value. It raises ValueError, which completes a sentence with "it".


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ValueError("must be an IPv4 address of this machine, or 0.0.0.0 for all of them") from None


def _integer(lowest: int, highest: int) -> Callable[[str], int]:
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


def _matching(pattern: str, requirement: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(requirement)
        return text

    return parse


def _fingerprint(text: str) -> str:
    text = text.lower()
    digits = text.replace("sha256:", "", 1).replace(":", "")
    if not text.startswith("sha256:") or not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("must be sha256: and the 64 hexadecimal digits that `tun6.py keygen` printed on the server")
    return "sha256:" + digits


def _fingerprints(text: str) -> tuple[str, ...]:
    return tuple(_fingerprint(word.strip()) for word in text.split(","))


def _id(text: str) -> str:
    if not is_valid_id(text):
        raise ValueError(f"must be 1 to {ID_MAX} printable characters")
    return text


def _path(text: str) -> str:
    return text  # read_config completes it


def _addresses(text: str) -> tuple[IPv6Address, ...]:
    try:
        if "%" in text:
            raise ValueError("an address with a scope")
        return tuple(IPv6Address(word.strip()) for word in text.split(","))
    except ValueError:
        raise ValueError("must be IPv6 addresses, separated by commas") from None


def _grace(text: str) -> int | None:
    if text.lower() == "off":
        return None
    try:
        return _integer(0, 3600)(text)
    except ValueError as error:
        raise ValueError(f"{error}, or off") from None


def _minutes(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}([.][0-9]{1,6})?", text) or float(text) > 1440:
        raise argparse.ArgumentTypeError("must be a number from 0 to 1440")
    return float(text)


def _boolean(text: str) -> bool:
    if text.lower() not in configparser.ConfigParser.BOOLEAN_STATES:
        raise ValueError("must be yes or no")
    return configparser.ConfigParser.BOOLEAN_STATES[text.lower()]


def _store(text: str) -> str:
    if not re.match("postgres(ql)?://", text):
        raise ValueError("must be an address such as postgresql://user:password@db1,db2/tun6")
    return text


def _metrics(text: str) -> tuple[str, int]:
    try:
        host, _, port = text.rpartition(":")
        address = parse_network(host[1:-1])[0] if host.startswith("[") else ipaddress.IPv4Address(host)
        return str(address), _integer(1, 65_535)(port)
    except ValueError:
        raise ValueError("must be an address of this machine and a port, such as 127.0.0.1:10116 or [::1]:10116") from None


_MTU = _integer(1280, 65_500)  # RFC 8200 section 5; a TUN takes no more
_CONGESTION = _matching("[a-z0-9_-]{1,15}", "must be auto or the name of a TCP congestion control, such as bbr or cubic")
_LINK = _matching("auto|real|lan", "must be auto, real or lan")
_OFFLOAD = _matching("auto|tso6|no", "must be auto, tso6 or no")
_LOG = _matching("text|json", "must be text or json")
_HOST = _matching(r"(?=.{1,253}$)([\w-]{1,63}\.)*[\w-]{1,63}\.?", "must be the name or the IPv4 address of a server")
_PORT = _integer(1, 65_535)


def _hosts(text: str) -> tuple[RemoteHost, ...]:
    hosts = []
    for host, colon, port in (word.strip().partition(":") for word in text.split(",")):
        try:
            hosts.append(RemoteHost(_HOST(host), _PORT(port) if colon else None))
        except ValueError:
            raise ValueError(
                "must be the name or the IPv4 address of a server, perhaps with a port from 1 to 65535, or several with commas between:"
                " tun6.example.org, 203.0.113.5:10001"
            ) from None
    return tuple(dict.fromkeys(hosts))


def _host_list(text: str) -> str:
    _hosts(text)
    return text


_SECTIONS: dict[str, type] = {"server": ServerConfig, "client": ClientConfig}
ADDRESS_KEYS = {"server": "prefixrange", "client": "remotehost"}  # what has to be edited first in either section
_PARSERS: dict[str, dict[str, Callable[[str], Any]]] = {
    "server": {
        "localhost": _ipv4,
        "listenport": _PORT,
        "prefixrange": _pool,
        "assignments": _path,
        "store": _store,
        "store_cache": _path,
        "name": _matching(r"[\w.-]{1,63}", "must be 1 to 63 letters, digits, dots, hyphens or underscores, which no other server has"),
        "congestion": _CONGESTION,
        "link": _LINK,
        "offload": _OFFLOAD,
        "tun": _matching(r"(?=.{2,13}$)[\w.-]*%d[\w.-]*", "must be a device name of at most 13 characters with one %d"),
        "mtu": _MTU,
        "max_clients": _integer(1, 1_000_000),
        "cert": _path,
        "keys": _path,
        "keys_required": _boolean,
        "control": _path,
        "new_ids_per_hour": _integer(0, 1_000_000),
        "client_to_client": _boolean,
        "hook": _path,
        "ndp": _matching(r"(?!\.\.?$)[^\s/]{1,15}", "must be the name of an interface, such as eth0"),
        "dead_after": _integer(6, 3600),
        "log": _LOG,
        "metrics": _metrics,
        "metrics_clients": _boolean,
        "documentation_addresses": _boolean,
        "address": _host_list,
        "fingerprint": _fingerprints,
        "limit": parse_rate,
    },
    "client": {
        "remotehost": _hosts,
        "remoteport": _PORT,
        "id": _id,
        "congestion": _CONGESTION,
        "link": _LINK,
        "offload": _OFFLOAD,
        "tun": _matching(r"(?!\.\.?$)[\w.-]{1,15}", "must be a device name of at most 15 characters"),
        "mtu": _MTU,
        "default_route": _boolean,
        "lan": _matching(r"(?!lo$|\.\.?$)[^\s/,:]{1,15}", "must be the name of one interface, such as eth1, as the prefix is one /64"),
        "lan_dns": _addresses,
        "lan_preference": _matching("auto|low|medium|high", "must be auto, low, medium or high"),
        "firewall": _boolean,
        "open": parse_openings,
        "grace": _grace,
        "mss": _integer(536, 1460),  # RFC 9293 section 3.7.1
        "rate_up": parse_rate,
        "rate_down": parse_rate,
        "tls": _boolean,
        "fingerprint": _fingerprints,
        "key": _matching("[A-Za-z0-9_-]{43}", "must be the 43 characters that `tun6.py clients add` printed on the server"),
        "hook": _path,
        "control": _path,
        "dead_after": _integer(6, 3600),
        "log": _LOG,
        "metrics": _metrics,
        "documentation_addresses": _boolean,
    },
}
DOCUMENTATION = tuple(  # addresses that are nobody's: RFC 5737, RFC 3849, RFC 9637
    map(ipaddress.ip_network, ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20"))
)


def find_config(named: str | None) -> str:
    """Returns the path of config.ini. Raises ConfigError when there is none."""
    path = named or next(filter(os.path.exists, CONFIG_FILES), None)
    if path is None:
        raise ConfigError(f"there is neither {CONFIG_FILES[0]} nor ./{CONFIG_FILES[1]}; write one, or name it with -c FILE")
    if not named and path == CONFIG_FILES[0] and os.path.exists(CONFIG_FILES[1]) and not os.path.samefile(*CONFIG_FILES):
        with suppress(ConfigError):
            if sections_in_use(CONFIG_FILES[1]):
                log.info("%s is used, not ./%s; name another one with -c FILE", *CONFIG_FILES)
    return path


def parse_config(path: str) -> configparser.ConfigParser:
    """Returns the sections and texts of a file. Raises ConfigError."""
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#", ";"), default_section="")
    try:
        with open(path, encoding="utf-8-sig") as file:  # editors on Windows put a byte order mark before it
            parser.read_file(file, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a readable file with -c FILE") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not UTF-8 text; save it as UTF-8") from None
    except (configparser.DuplicateOptionError, configparser.DuplicateSectionError) as error:
        raise ConfigError(f"{' '.join(str(error).split())}; keep one of them") from None
    except configparser.Error as error:
        raise ConfigError(f"{' '.join(str(error).split())}; write sections like [server] and lines like key = value") from None
    for name in parser.sections():
        if name not in _SECTIONS:
            raise ConfigError(f"{path}: unknown section [{name}]; {_suggest(name, _SECTIONS, '[%s]')}")
        for key, value in parser[name].items():
            if key not in _PARSERS[name]:
                raise ConfigError(f"{path}: [{name}] {key} = {to_printable(value)}: unknown key; {_suggest(key, _PARSERS[name], '%s')}")
            if "\n" in value:
                raise ConfigError(f"{path}: [{name}] {key} = {to_printable(value)}: an indented line follows, don't indent")
            if re.fullmatch(r"(['\"]).*\1|[\u2018-\u201f\xab\xbb].*[\u2018-\u201f\xab\xbb]", value):
                raise ConfigError(f"{path}: [{name}] {key} = {to_printable(value)}: it is in quotes, write it without")
    return parser


def sections_in_use(path: str) -> list[str]:
    """Returns which of [server] and [client] are in a file, but not one whose address is still the example. Raises ConfigError."""
    parser = parse_config(path)
    found = {name: parser[name] for name in _SECTIONS if name in parser}
    return [
        name
        for name, section in found.items()
        if section.get("documentation_addresses") or not is_documentation(section.get(ADDRESS_KEYS[name], ""))
    ]


def read_config(path: str, section: str) -> Any:
    """Returns the ServerConfig or ClientConfig in a file; relative paths in it are relative to its folder.

    Raises ConfigError: a sentence with file, key, value and what would be right.
    """
    parser = parse_config(path)
    if section not in parser:
        raise ConfigError(f"{path}: there is no section [{section}]; add one with its keys, as in the config.ini that came with tun6")
    values: dict[str, Any] = {"file": path}
    for field in dataclasses.fields(_SECTIONS[section]):
        text = parser[section].get(field.name)
        if text:
            parse = _PARSERS[section][field.name]
            try:
                values[field.name] = os.path.join(os.path.dirname(path), text) if parse is _path else parse(text)
            except ValueError as error:
                raise ConfigError(f"{path}: [{section}] {field.name} = {to_printable(text)}: it {error}") from None
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{path}: [{section}] {field.name} is missing; add a line {field.name} = ...")
    key = ADDRESS_KEYS[section]
    addresses, what = [values[key]], "the range that is routed to this machine"
    if section == "client":
        addresses, what = [each.host for each in values[key]], "your server's name or address"
    for address in filter(is_documentation, addresses if not values.get("documentation_addresses") else ()):
        raise ConfigError(f"{path}: [{section}] {key} = {address}: it is an example, which reaches nobody; set {what}")
    return _SECTIONS[section](**values)


def is_documentation(address: IPv6Network | str) -> bool:
    """Returns whether it is a range or an address that only documentation uses; a name is none."""
    try:
        network: Any = ipaddress.ip_network(address)
    except ValueError:
        return False
    return any(network.version == each.version and network.subnet_of(each) for each in DOCUMENTATION)


def _suggest(word: str, known: Iterable[str], form: str) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {form % near[0]}?" if near else "known are " + ", ".join(form % name for name in known)


def server_command(options: argparse.Namespace) -> None:
    """`tun6.py server`."""
    config: ServerConfig = read_config(find_config(options.config), "server")
    prepare_observers(config)
    require_privilege()
    require_ipv6()
    warn_of_forwarding()
    raise_descriptor_limit()
    server = Server(config)
    ServerDoctor(config, server.keys is not None).warn()
    handler = AdminRequestHandler(
        server.store, files_of(config), server.sessions, server.end_session, LoopLatency(), server.figures, server.drain, server.apply_limit
    )
    web = Web(config.metrics, handler, config.metrics_clients) if config.metrics else None
    collect_rarely()

    def run() -> None:
        with administered(config, handler, web):
            server.run()

    def reload() -> None:
        try:
            with service_manager.reloading():
                server.reload()
            log.info(
                "keys, limits and certificate read anew" if config.cert else "limits read anew: there are neither keys nor a certificate"
            )
        except ConfigError as error:
            log.error("keys and certificate stay as they were: %s", error)

    run_until_signalled(run, server.state, reload)


def client_command(options: argparse.Namespace) -> None:
    """`tun6.py client`."""
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")  # resolv.conf(5): a name server that is back is noticed in seconds
    config: ClientConfig = read_config(find_config(options.config), "client")
    prepare_observers(config)
    require_privilege()
    require_ipv6()
    client = Client(config)
    ClientDoctor(config).warn()
    handler = RequestHandler(client.figures, LoopLatency())
    web = Web(config.metrics, handler, False) if config.metrics else None

    def run() -> None:
        with administered(config, handler, web):
            client.run()

    run_until_signalled(run, client.state)


def prepare_observers(config: ServerConfig | ClientConfig) -> None:
    """Sets the format of the log, and raises ConfigError where `metrics` lacks its package."""
    set_log_format(config.log)
    if config.metrics:
        require_prometheus_client()


@contextmanager
def administered(config: ServerConfig | ClientConfig, handler: RequestHandler, web: Web | None) -> Iterator[None]:
    """Lets the operator ask meanwhile, through the control socket and the metrics."""
    assert handler.loop_latency
    with ExitStack() as undo:
        undo.callback(gevent.spawn(handler.loop_latency.run).kill)
        undo.enter_context(ControlSocket(config.control, handler))
        if web:
            undo.callback(gevent.spawn(web.run).kill)
        yield


def keygen_command(options: argparse.Namespace) -> None:
    """`tun6.py keygen`: makes the server's certificate."""
    config: ServerConfig = read_config(find_config(options.config), "server")
    file = Path(config.cert or os.path.join(os.path.dirname(config.file), "server.pem"))
    if file.exists():
        raise ConfigError(f"{file} is there already, its fingerprint is {read_fingerprint(file)}; move it away to make another")
    make_certificate(file)
    print(f"{file} is the server's key and certificate: keep it secret, and a copy of it safe.")
    if not config.cert:
        print(f"Add to [server] in {config.file}: cert = {file.name}")
    print(f"Clients know the server by this line in their [client]: fingerprint = {read_fingerprint(file)}")


def read_fingerprint(file: Path) -> str:
    """Returns the fingerprint of the certificate in a PEM file. Raises ConfigError."""
    try:
        return certificate_fingerprint(read_certificate(str(file)))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{file}: {reason}; `tun6.py keygen` makes one") from None


def administer(config: ServerConfig, request: dict[str, Any], needs_server: bool = False) -> Any:
    """Sends the request to the running server, or, unless it `needs_server`, does it on the server's files. Returns the result.

    Raises Tun6Error.
    """
    try:
        return ask_server(config.control, {**request, "files": files_of(config)})
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            reason = error.strerror or error
            raise RequestError(f"control = {config.control}: {reason}; run this as the server's user, mostly root") from None
    if needs_server:
        raise Tun6Error(f"no server listens at {config.control}")
    if not (config.assignments or config.store):
        raise ConfigError(f"no server listens at {config.control}, and without `assignments` in {config.file} nothing is kept")
    store = open_store(config)
    try:
        return AdminRequestHandler(store, [], {}, lambda id_, reason: None).handle({**request, "files": []})
    finally:
        store.close()


def find_status(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Asks the server and the client of config.ini that run, or the one that is named. Raises Tun6Error when none does."""
    path, found, silent = find_config(options.config), [], []
    for side in (options.side,) if options.side else sections_in_use(path) or ["server"]:
        config = read_config(path, side)
        request: dict[str, Any] = {"do": "status", "resources": not options.watch}
        if side == "server":
            request |= {"clients": True, "here": vars(options).get("here", False), "files": files_of(config)}
        try:
            found.append(ask_server(config.control, request))
        except (FileNotFoundError, ConnectionRefusedError):
            silent.append(f"no {side} listens at {config.control}")
        except OSError as error:
            raise RequestError(
                f"control = {config.control}: {error.strerror or error}; run this as the {side}'s user, mostly root"
            ) from None
    if not found:
        raise Tun6Error(", and ".join(silent))
    return found


def drain_command(options: argparse.Namespace) -> None:
    """`tun6.py drain`: asks the running server."""
    config: ServerConfig = read_config(find_config(options.config), "server")
    number = administer(config, {"do": "drain", "minutes": None if options.stop else options.minutes}, needs_server=True)
    if options.stop:
        print("The server serves newcomers again.")
    else:
        print(f"The server sends newcomers to other servers, and its {number} sessions end within {options.minutes:g} minutes.")
        print("That ends with `tun6.py drain --stop`, or when the server is restarted; `tun6.py status` shows who is left.")


def status_command(options: argparse.Namespace) -> int:
    """`tun6.py status`: asks what runs here. Returns 0 when all of it is up, else 1."""
    up = False
    with suppress(KeyboardInterrupt):
        while True:
            lines: list[str] = []
            width, height = shutil.get_terminal_size()
            try:
                found = find_status(options)
                up = all(status["state"] == "up" for status in found)
                if options.json and len(found) > 1:
                    raise RequestError("a server and a client run here; name one of them, as in `tun6.py status client --json`")
                for status in found:
                    lines += json.dumps(status, indent=1).splitlines() if options.json else format_status(status, width, options.sort)
            except Tun6Error as error:
                if not options.watch or error.exit_status == 2:
                    raise
                up, lines = False, [str(error)]
            if options.watch and sys.stdout.isatty():
                if len(lines) >= height:
                    lines = [*lines[: height - 2], f"... and {len(lines) - height + 2} lines more"]
                lines[0] = "\x1b[H\x1b[J" + lines[0]
            if not print_lines(lines) or not options.watch:
                break
            time.sleep(RATE_S)
    return 0 if up else 1


def print_lines(lines: Iterable[str]) -> bool:
    """Prints lines, whatever the encoding of the terminal. Returns False when nobody reads any more, as behind `| head`."""
    try:
        for line in lines:
            print(line.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        if isinstance(error, BrokenPipeError):
            return False
        raise Tun6Error(f"the answer can't be written: {error.strerror}") from None
    return True


def doctor_command(options: argparse.Namespace) -> int:
    """`tun6.py doctor`: examines this machine. Returns 1 when something fails, else 0."""
    path = find_config(options.config)
    kinds: dict[str, Any] = {"server": ServerDoctor, "client": ClientDoctor}
    sides = [options.side] if options.side else sections_in_use(path) or ["client"]
    doctors: dict[str, Doctor] = {side: kinds[side](read_config(path, side)) for side in sides}
    if len(doctors) > 1:
        doctors = {side: doctor for side, doctor in doctors.items() if doctor.is_running()} or doctors
    found: dict[str, list[Finding]] = {}
    for side, doctor in doctors.items():
        if not options.json:
            print_lines([f"The {side} of {path}. {doctor.hint}".rstrip()])
        for finding in doctor.run():
            found.setdefault(side, []).append(finding)
            if not options.json:
                print_lines([finding.format()])
    if options.json:
        print(json.dumps({side: [each._asdict() for each in findings] for side, findings in found.items()}, indent=1))
    return int(any(each.result == "FAIL" for findings in found.values() for each in findings))


def clients_command(options: argparse.Namespace) -> None:
    """`tun6.py clients`: asks the running server, or works on its files while none runs."""
    config: ServerConfig = read_config(find_config(options.config), "server")
    arguments = {name: value for name, value in vars(options).items() if name not in CLIENTS_OPTIONS}
    address, fingerprint = "", ""
    if options.action == "add":  # checked before anything changes, as the key is printed only once
        if re.search(r"^ | $|(^| )[#;]", options.id):
            raise RequestError("an Id that begins or ends with a space, or has # or ; behind one, can't be written in config.ini")
        if config.cert:
            fingerprint = ", ".join(dict.fromkeys([read_fingerprint(Path(config.cert)), *config.fingerprint]))
        try:
            address = _host_list(options.address or public_address(config))
        except ValueError as error:
            raise RequestError(f"--address {to_printable(options.address)}: it {error}") from None
    done = administer(config, {"do": options.action, **arguments})
    settings = {}
    if options.action == "add":
        settings = {**done, "remotehost": address, "remoteport": str(config.listenport), "fingerprint": fingerprint}
        done = {**done, "fingerprint": fingerprint, "token": encode_token(settings)}
    if options.json:
        print(json.dumps(done, indent=1))
    elif options.action == "add":
        print(format_client_section(settings, done["prefix"]))
    else:
        entries = done if isinstance(done, list) else [done]
        print_lines(format_client(entry, config.keys is not None and not config.keys_required) for entry in entries)


def public_address(config: ServerConfig) -> str:
    """Returns `remotehost` for its clients: the `address` in config.ini, or else where this server is reached."""
    return config.address or own_address(config)


def format_client_section(settings: Mapping[str, str], prefix: str) -> str:
    """Returns the section [client] of config.ini for a client that was added."""
    edit = "where the client sees the server by another address or name"
    for host, _ in _hosts(settings["remotehost"]):
        if is_ipv4(host) and not ipaddress.ip_address(host).is_global:
            edit = "unless it is on the same network, as nobody else reaches this address; or name another with --address, or in config.ini"
    return "\n".join([
        f"# config.ini of the client; its prefix is {prefix}. The key is shown only now; whoever has it is this client.",
        "[client]",
        f"# EDIT THIS {edit}.",
        *(f"{key} = {settings[key]}" for key in TOKEN_KEYS),
        "# All of that in one line, to be pasted when `tun6.py install client --join -` asks for it on the client:",
        f"# {encode_token(settings)}",
    ])  # fmt: skip


def format_client(entry: dict[str, Any], served_without_key: bool) -> str:
    """Returns one line of `clients list`."""
    session, times = entry.get("session"), {name: format_time(entry.get(name)) for name in ("since", "last")}
    state = "revoked" if entry["revoked"] else "has a key" if entry["key"] else "no key yet" if served_without_key else "no key"
    if entry["limit"] is not None:
        state += f", limited to {format_limit(entry['limit'])}" if entry["limit"] else ", without a limit"
    if session:
        refused = sum(session["refused"].values())
        state += f", connected for {session['seconds']} s from {session['peer']} on {session['device']}"
        state += f", {session['received']} bytes received, {session['sent']} sent, {session['dropped']} packets dropped, {refused} refused"
    if entry.get("connected"):
        state += f", on {entry['server']} since {times['since']}"
    elif entry.get("server"):
        state += f", was on {entry['server']} until {times['last']}"
    return f"{quote_id(entry['id'])}  {entry['prefix'] or 'no prefix yet'}  {state}"


def cluster_command(options: argparse.Namespace) -> None:
    """`tun6.py cluster`: makes the store that several servers share, and what else there is to be done once."""
    config: ServerConfig = read_config(find_config(options.config), "server")
    if not config.store:
        raise ConfigError(f"{config.file}: [server] store is missing; add a line store = postgresql://...")
    database = Database(config.store, f"tun6 cluster {os.getpid()}")
    try:
        with store_errors(config.store):
            database.connect()
            print(_CLUSTER_ACTIONS[options.action](database, config, options))
    finally:
        database.close()


def _init_cluster(database: Database, config: ServerConfig, options: argparse.Namespace) -> str:
    if not options.open and not config.cert:
        raise ConfigError(
            f"{config.file}: there is no `cert`, and keys go only through TLS; `tun6.py keygen` makes one, --open makes a pool without keys"
        )
    keys = "none" if options.open else "required" if config.keys_required else "optional"
    database.create(config.prefixrange, keys)
    who = {"none": "open to everybody", "required": "for those who have a key", "optional": "for all, with a key where an Id has one"}
    return f"made the pool {config.prefixrange}, {who[keys]}"


def _import_cluster(database: Database, config: ServerConfig, options: argparse.Namespace) -> str:
    assignments, keys = options.assignments or config.assignments, options.keys or config.keys
    if not assignments and not keys:
        raise RequestError("there is nothing to import: name the files, or have `assignments` and `keys` in config.ini still")
    for path in filter(None, (assignments, keys)):
        if not os.path.exists(path):
            raise RequestError(f"{path} is not there; name the file that a server had")
    store = AssignmentStore(PrefixPool(config.prefixrange), assignments)  # locked: no server changes it meanwhile
    try:
        entries = KeyStore(keys) if keys else None
        prefixes = {id_: cast(IPv6Network, store.pool.find(id_)) for id_ in store.pool.owners()}
        found = {id_: cast(KeyEntry, entries.find(id_)) for id_ in entries.ids()} if entries else {}
        number = database.take_in(prefixes, found, store.limits())
    finally:
        store.close()
    return f"took in {number} Ids; remove `assignments` and `keys` from {config.file}, and keep the files as a copy"


def _export_cluster(database: Database, config: ServerConfig, options: argparse.Namespace) -> str:
    assignments = JsonFile(options.assignments, "assignments", 0o644)
    limits_path = f"{assignments.path}{LIMITS_SUFFIX}"
    for path in filter(None, (options.assignments, options.keys, limits_path)):
        if os.path.exists(path):
            raise RequestError(f"{path} is there already; name another file")
    database.require_pool()
    prefixes, keys, limits = database.give_out()
    if keys and not options.keys:
        raise RequestError("there are keys; name a file for them, too")
    assignments.save({id_: str(prefix) for id_, prefix in prefixes.items()})
    if options.keys:
        JsonFile(options.keys, "keys", SECRET_MODE).save(encode_keys(keys))
    if limits:
        JsonFile(limits_path, "limits", 0o644).save(limits)
    return f"wrote {len(prefixes)} assignments, {len(keys)} keys and {len(limits)} limits"


def _upgrade_cluster(database: Database, config: ServerConfig, options: argparse.Namespace) -> str:
    version = database.upgrade()
    return f"the tables are of version {SCHEMA_VERSION}" + (f", and were of {version}" if version != SCHEMA_VERSION else " already")


def _accept_cluster(database: Database, config: ServerConfig, options: argparse.Namespace) -> str:
    if database.accept():
        return (
            "new Ids, `pin` and `import` are served again; what only servers know that are not back is lost when another Id gets that /64"
        )
    return "nothing was lost, as far as the store knows: there is nothing to accept"


_CLUSTER_ACTIONS: dict[str, Callable[[Database, ServerConfig, argparse.Namespace], str]] = {
    "init": _init_cluster,
    "import": _import_cluster,
    "export": _export_cluster,
    "upgrade": _upgrade_cluster,
    "accept": _accept_cluster,
}


def install_command(options: argparse.Namespace) -> None:
    """`tun6.py install`."""
    if options.root == "/" and os.geteuid():
        raise RequestError("a service needs root to be put in place; use sudo")
    installer = Installer(options.role, Path(options.root), functools.partial(read_config, section=options.role), sections_in_use)
    if options.remove:
        installer.remove()
        return
    for each in options.set:
        if "=" not in each:
            raise RequestError(f"--set {each}: it must be KEY=VALUE, such as --set lan=eth0")
    settings = dict(each.partition("=")[::2] for each in options.set)
    if options.role == "client" and options.join:
        if options.join == "-" and sys.stdin.isatty():
            print("Paste the line tun6:... that `tun6 clients add` printed on the server, and press Enter:", flush=True)
        settings.update(decode_token(sys.stdin.readline() if options.join == "-" else options.join))
    host, _, port = (options.host or "").partition(":")
    if options.role == "client" and "," in (options.host or ""):  # several servers, each with its own port
        host, port = options.host, ""
    key = ADDRESS_KEYS[options.role]
    if not host and key not in settings and sys.stdin.isatty() and not os.path.exists(CONFIG_FILES[0]):
        host = input(
            f"{key} ({'the IPv6 range routed to this machine' if options.role == 'server' else 'name or address of the server'}): "
        )
    settings.update({key: host} if host and options.role == "client" else {key: options.host} if options.host else {})
    settings.update({"remoteport": port} if port and options.role == "client" else {})
    installer.install(settings, Path(options.config) if options.config else None)


def demo_command(options: argparse.Namespace) -> None:
    """`tun6.py demo`."""
    require_privilege()
    for number in (signal.SIGTERM, signal.SIGHUP):  # like SIGINT, so that all that it made is removed
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


def raise_descriptor_limit() -> None:
    """Raises the soft limit of descriptors, often 1,024, to the hard one, as each client takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def share_one_heap() -> None:
    """Lets all threads allocate from one heap; to be called before there are threads.

    glibc would give the first 16 threads on two processors a heap each, which keeps what the thread frees: 4 MB after 10 minutes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have one heap anyway
    if mallopt:
        mallopt(M_ARENA_MAX, 1)


def collect_rarely() -> None:
    """Makes full collections of garbage rare; to be called when all is loaded.

    With 1,000 clients each examines 250,000 objects, for which the event loop waits 0.1 s, and Python makes one for 300 sessions that
    begin. An ended session leaves less than one object in a reference cycle, so that there is next to nothing to be found.
    """
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)


def run_until_signalled(run: Callable[[], object], state: Callable[[], str], reload: Callable[[], None] | None = None) -> None:
    """Runs until `run` fails, whose error this raises, or until SIGTERM or SIGINT, which kills it so that it undoes what it did.

    Meanwhile the service manager hears the `state`.
    SIGHUP calls `reload`; without that it ends the program, too.
    """
    stop = gevent.event.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stop.set)
    if reload or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        gevent.signal_handler(signal.SIGHUP, reload or stop.set)
    service = gevent.spawn(run)
    service.link(lambda _: stop.set())
    gevent.spawn(service_manager.run, state)
    stop.wait()
    service_manager.notify("STOPPING=1")
    service.kill()
    service.get()


class WarningRateLimit(logging.Filter):
    """Passes WARNINGS_MAX warnings of one kind in WARNINGS_INTERVAL_S. The next one tells how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[int, str], tuple[float, int]] = {}  # by kind: begin of the interval, warnings in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is to be written."""
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
    """Writes the log to a file in a thread of its own, so that nobody else waits for a reader that does not read."""

    PRIORITIES: ClassVar = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}  # sd-daemon(3)

    def __init__(self, fd: int, journal: bool) -> None:
        """With `journal`, each line begins with its priority."""
        super().__init__()
        self._fd, self._journal = fd, journal
        self._lines: queue.Queue[str] = queue.Queue(LOG_LINES_MAX)
        self._lost = 0
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Hands the record to the thread. Never waits."""
        self.write_line(self.format(record), record.levelno)

    def write_error(self, error: Tun6Error) -> None:
        """Hands the thread the error that ends the program."""
        if isinstance(self.formatter, JsonFormatter):
            log.critical("%s", error)
        else:
            self.write_line(f"tun6: {error}")

    def write_line(self, line: str, level: int = logging.ERROR) -> None:
        """Hands a line to the thread as it is. Never waits."""
        if self._journal:
            line = re.sub("^", f"<{self.PRIORITIES.get(level, 6)}>", line, flags=re.MULTILINE)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def flush(self) -> None:
        """Waits until everything is written, at most LOG_FLUSH_S."""
        deadline = time.monotonic() + LOG_FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.001)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if self._lost:
                lost, self._lost = self._lost, 0
                text = f"{lost} lines of the log were lost, as nobody read them"
                is_json = isinstance(self.formatter, JsonFormatter)
                line += "\n" + (self.format(log.makeRecord("tun6", 30, "", 0, text, (), None)) if is_json else f"WARNING {text}")
            data = (line + "\n").encode(errors="backslashreplace")
            with suppress(OSError):  # there is nobody left to tell
                while data:
                    data = data[os.write(self._fd, data) :]
            self._lines.task_done()


class JsonFormatter(logging.Formatter):
    """A JSON object for each event, on one line: time (UTC), level, message, and the fields that `event` names."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        line = {"time": moment, "level": record.levelname, "message": record.getMessage(), **getattr(record, "fields", {})}
        return json.dumps({**line, "traceback": self.formatException(record.exc_info)} if record.exc_info else line)


def set_log_format(kind: str) -> None:
    """Makes the log JSON if its setting says so."""
    for handler in logging.getLogger().handlers if kind == "json" else ():
        handler.setFormatter(JsonFormatter())


def set_up_logging(verbose: bool) -> ThreadedLogHandler:
    """Logs to stderr, one line for each event; to systemd's journal (systemd.exec(5), JOURNAL_STREAM) with priority and without time."""
    stderr = os.fstat(sys.stderr.fileno())
    journal = os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
    handler = ThreadedLogHandler(sys.stderr.fileno(), journal)
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(levelname)s %(message)s" if journal else "%(asctime)s %(levelname)s %(message)s",
        handlers=[handler],
    )
    log.addFilter(WarningRateLimit())
    return handler


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line, whose result names the `function` of the subcommand."""

    def shared(*names: str, **settings: Any) -> argparse.ArgumentParser:
        option = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
        option.add_argument(*names, **settings)
        return option

    verbose = shared("-v", "--verbose", action="store_true", help="log more")
    config = shared("-c", "--config", metavar="FILE", help=f"default: {CONFIG_FILES[0]}, then ./{CONFIG_FILES[1]}")
    as_json = shared("--json", action="store_true", help="answer in JSON")
    id_ = shared("id", metavar="ID", help="as the client says it, often a MAC address")
    here = shared("--here", action="store_true", help="of several servers with one pool, only the clients of this one")

    about = "A stable IPv6 /64 over one IPv4 TCP connection, through any NAT."
    parser = argparse.ArgumentParser(prog="tun6", description=about, parents=[verbose, config])
    parser.add_argument("--version", action="version", version=f"tun6 {__version__}")

    def add(to: Any, name: str, text: str, *parents: argparse.ArgumentParser, **defaults: Any) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = to.add_parser(name, help=text, description=text, parents=[verbose, *parents])
        command.set_defaults(**defaults)
        return command

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add(commands, "server", "serve clients; on a host with a routed IPv6 range", config, function=server_command)
    add(commands, "client", "keep a tunnel to a server; on the machine that wants IPv6", config, function=client_command)
    clients = add(
        commands,
        "clients",
        "list, add, pin, revoke, restore or limit clients; on the server's machine",
        config,
        as_json,
        function=clients_command,
    )
    text = "show how the server or client that runs on this machine is"
    status = add(commands, "status", text, config, as_json, here, function=status_command)
    status.add_argument("side", nargs="?", choices=("server", "client"), help="where both run; otherwise it is not needed")
    status.add_argument("--watch", action="store_true", help=f"show it again every {RATE_S:.0f} s, until Ctrl-C")
    status.add_argument("--sort", choices=tuple(CLIENT_ORDERS), default="id", help="order of the clients")
    drain = add(commands, "drain", "send the clients of this server to other ones, as before an upgrade", config, function=drain_command)
    drain.add_argument(
        "--minutes",
        type=_minutes,
        default=DRAIN_MINUTES,
        metavar="N",
        help=f"in which its sessions end, one by one; default: {DRAIN_MINUTES}",
    )
    drain.add_argument("--stop", action="store_true", help="serve as before")
    doctor = add(commands, "doctor", "find out what is wrong, and what to do; on either machine", config, as_json, function=doctor_command)
    doctor.add_argument("side", nargs="?", choices=("server", "client"), help="else those in the config.ini, of two the one that runs")
    add(commands, "keygen", "make the server's certificate and show its fingerprint", config, function=keygen_command)
    installs = add(commands, "install", "put server or client in place as a service of systemd", function=install_command)
    roles = installs.add_subparsers(dest="role", required=True, metavar="ROLE")
    for role, flag, metavar, text in (
        ("server", "--prefix", "RANGE", "the IPv6 range that is routed to this machine"),
        ("client", "--remote", "HOST[:PORT]", "the server, or several with commas between them"),
    ):
        install = add(roles, role, f"the {role}; a second time, it changes only what is different", config)
        install.add_argument(flag, dest="host", metavar=metavar, help=text)
        install.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help=f"any other setting of [{role}], as in config.ini"
        )
        install.add_argument("--remove", action="store_true", help="take it away; configuration and state stay")
        install.add_argument("--root", default="/", help=argparse.SUPPRESS)
        if role == "client":
            install.add_argument(
                "--join", metavar="TOKEN", help="the line tun6:... that `clients add` printed, or - to read it from standard input"
            )
    add(commands, "demo", "show it all on this machine, in network namespaces that are removed afterwards", function=demo_command)

    cluster = add(
        commands, "cluster", "make the store that several servers share, import into it, export from it", config, function=cluster_command
    )
    steps = cluster.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = add(steps, "init", "make the pool of config.ini in an empty database", config)
    made.add_argument("--open", action="store_true", help="for everybody: nobody has a key")
    taken = add(steps, "import", "take in the files that a server had, all or nothing", config)
    taken.add_argument("assignments", nargs="?", metavar="ASSIGNMENTS", help="default: that in config.ini")
    taken.add_argument("keys", nargs="?", metavar="KEYS", help="default: that in config.ini")
    given = add(steps, "export", "write the files that a single server needs", config)
    given.add_argument("assignments", metavar="ASSIGNMENTS", help="a new file")
    given.add_argument("keys", nargs="?", metavar="KEYS", help="a new file, where clients have keys")
    add(steps, "upgrade", "bring the tables to the version of this tun6", config)
    add(steps, "accept", "go on after lost commits, without servers that do not come back", config)

    actions = clients.add_subparsers(dest="action", required=True, metavar="ACTION")
    add(actions, "list", "who has which prefix, has a key, is connected", config, as_json, here)
    added = add(actions, "add", "give an Id a key, and show once the [client] section for it", config, as_json, id_)
    added.add_argument("--prefix", metavar="P", help="a free /64 of prefixrange, instead of the next one")
    added.add_argument("--address", metavar="A", help="the server's name or IPv4 address, as the client sees it, or several with commas")
    added.add_argument("--new-key", action="store_true", help="replace the key that the Id has")
    pinned = add(actions, "pin", "give an Id a certain prefix", config, as_json, id_)
    pinned.add_argument("prefix", metavar="PREFIX", help="a free /64 of prefixrange")
    add(actions, "revoke", "keep an Id out from now on; its prefix stays reserved", config, as_json, id_)
    add(actions, "restore", "let a revoked Id in again", config, as_json, id_)
    limited = add(actions, "limit", "let an Id have no more than a rate, each way", config, as_json, id_)
    limited.add_argument("rate", metavar="RATE", help="bits a second, such as 50M; none; or default, which is as config.ini says")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status: 2 for usage and configuration, 1 for what fails later."""
    share_one_heap()
    gevent.get_hub().NOT_ERROR += (Exception,)  # gevent need not print what is raised in a thread or greenlet and found by `get`
    options = build_parser().parse_args(arguments, argparse.Namespace(verbose=False, config=None, json=False))
    stderr = set_up_logging(options.verbose)
    try:
        return options.function(options) or 0
    except Tun6Error as error:
        stderr.write_error(error)
        return error.exit_status
    except Exception as error:
        log_defect(options.command, error)
        return 1


if __name__ == "__main__":
    sys.exit(main())

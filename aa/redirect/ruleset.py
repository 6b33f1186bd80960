"""The rules as one pure value: rendered for iptables-restore, compared with what iptables-save says.

Nothing here talks to the kernel. Both families are rendered from the same
template, so no rule can exist for v4 alone.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aa import paths

REDIRECT_CHAIN = "AA-REDIRECT"
FILTER_CHAIN = "AA-FILTER"
INBOUND_CHAIN = "AA-INBOUND"
CHAINS: Mapping[str, tuple[str, ...]] = {
    "filter": (FILTER_CHAIN, INBOUND_CHAIN),
    "nat": (REDIRECT_CHAIN,),
}
"""Our chains by table, in the order in which the tables are written: closed first, then led on."""

PREFIX = "aa-redirect "
"""What every line of ours in the packet log begins with."""


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between v4 and v6."""

    name: str
    version: int
    loopback: str
    loopback_net: str
    prohibited: str  # the ICMP answer to a refused packet


V4 = Family("ip", 4, "127.0.0.1", "127.0.0.1/32", "icmp-admin-prohibited")
V6 = Family("ip6", 6, "::1", "::1/128", "icmp6-adm-prohibited")

TEMPLATE = string.Template(
    """\
*filter
:AA-FILTER - [0:0]
:AA-INBOUND - [0:0]
# What nat led to the proxy's own ends may go on. RETURN, not ACCEPT: the host's own rules
# still hold. No "-o lo" here: after a REDIRECT the packet still names its first interface.
-A AA-FILTER -d $loopback -p tcp -m tcp --dport $front -m comment --comment "to the front" -j RETURN
$explicit_filter
-A AA-FILTER -d $loopback -p tcp -m tcp --dport $dns -m comment --comment "to the DNS forwarder" -j RETURN
-A AA-FILTER -d $loopback -p udp -m udp --dport $dns -m comment --comment "to the DNS forwarder" -j RETURN
# Everything else stays here and leaves a record. A TCP packet gets here only when nat did not
# see its connection begin: sockets older than the rules, and replies of a listener.
-A AA-FILTER -p tcp -j NFLOG --nflog-prefix "aa-redirect tcp" --nflog-group $group
-A AA-FILTER -p tcp -j REJECT --reject-with tcp-reset
-A AA-FILTER -p udp -j NFLOG --nflog-prefix "aa-redirect udp" --nflog-group $group
-A AA-FILTER -p udp -j REJECT --reject-with $prohibited
-A AA-FILTER -j NFLOG --nflog-prefix "aa-redirect other" --nflog-group $group
-A AA-FILTER -j REJECT --reject-with $prohibited
# What others begin with a run's socket. The first packet of a connection has no socket yet,
# so a handshake can complete; nothing after it arrives.
-A AA-INBOUND -j NFLOG --nflog-prefix "aa-redirect inbound" --nflog-group $group
-A AA-INBOUND -p tcp -j REJECT --reject-with tcp-reset
-A AA-INBOUND -j REJECT --reject-with $prohibited
COMMIT
*nat
:AA-REDIRECT - [0:0]
$explicit_nat
-A AA-REDIRECT -p udp -m udp --dport 53 -m comment --comment "DNS to the forwarder" -j REDIRECT --to-ports $dns
# A connection is led on by its first packet. One that conntrack picks up in the middle is older
# than the rules: it goes on to the filter, which cuts it and says so.
-A AA-REDIRECT -p tcp -m tcp --dport 53 --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment "DNS to the forwarder" -j REDIRECT --to-ports $dns
# Loopback too: listeners of others need a decision like any host.
-A AA-REDIRECT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment "TCP to the front" -j REDIRECT --to-ports $front
COMMIT
"""
)
EXPLICIT_FILTER = string.Template(
    "-A AA-FILTER -d $address -p tcp -m tcp --dport $port"
    ' -m comment --comment "to the explicit proxy" -j RETURN'
)
EXPLICIT_NAT = string.Template(
    "-A AA-REDIRECT -d $address -p tcp -m tcp --dport $port"
    ' -m comment --comment "the explicit proxy" -j ACCEPT'
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of iptables-save. `text` is the rule without its chain and counters."""

    text: str
    packets: int = 0

    @property
    def target(self) -> str:
        """The chain or target it jumps to, "" for none."""
        words = words_of(self.text)
        for option in ("-j", "-g"):
            if option in words[:-1]:
                return words[words.index(option) + 1]
        return ""


Tables = Mapping[str, Mapping[str, Sequence[Rule]]]
"""Rules by table and chain, in order. A chain without rules is there with an empty sequence."""

NormalRule = tuple[tuple[str, ...], ...]


class MalformedSave(ValueError):
    """What was to be the output of iptables-save is not."""


@dataclass(frozen=True, slots=True)
class RuleSet:
    """Everything that the rules depend on. `explicit` is "" where no run can reach that port."""

    front_port: int = paths.FRONT_PORT
    explicit: str = "127.0.0.1"
    explicit_port: int = paths.EXPLICIT_PORT
    dns_port: int = paths.DNS_PORT
    slice: str = paths.PROXY_SLICE
    nflog_group: int = paths.NFLOG_GROUP

    def __post_init__(self) -> None:
        ports = (self.front_port, self.explicit_port, self.dns_port)
        if not all(0 < port < 65536 for port in ports) or len(set(ports)) != len(ports):
            raise ValueError(f"three different ports from 1 to 65535 are needed, not {ports}")
        if not re.fullmatch(r"[A-Za-z0-9_.@\-]+(/[A-Za-z0-9_.@\-]+)*", self.slice):
            raise ValueError(f"{self.slice!r} is no path of a cgroup below the root")
        if not 0 < self.nflog_group < 65536:
            raise ValueError(f"{self.nflog_group} is no NFLOG group")
        if self.explicit and not ipaddress.ip_address(self.explicit).is_loopback:
            raise ValueError(f"the explicit proxy's address {self.explicit} is not on loopback")

    def chains(self, family: Family) -> Tables:
        """Our own chains with their rules as they must be read back."""
        tables = parse_save(self._template(family))
        return {table: {name: tables[table][name] for name in CHAINS[table]} for table in CHAINS}

    def jumps(self) -> Mapping[str, Mapping[str, str]]:
        """The rule that must be the first of a built-in chain, by table and chain."""
        match = f"-m cgroup --path {self.slice}"
        inbound = f"{match} -m conntrack --ctdir ORIGINAL -j {INBOUND_CHAIN}"
        return {
            "filter": {"OUTPUT": f"{match} -j {FILTER_CHAIN}", "INPUT": inbound},
            "nat": {"OUTPUT": f"{match} -j {REDIRECT_CHAIN}"},
        }

    def render(self, family: Family, present: Tables) -> str:
        """Input for iptables-restore --noflush that brings `present` to what it must be.

        Each table changes in one transaction. A jump that is there already, wherever it
        stands, is deleted by its own text and made again in front, so it binds to the
        cgroup that has the slice's path now.
        """
        lines: list[str] = []
        table = ""
        for line in self._template(family).splitlines():
            if line == "COMMIT":
                lines += self._lead_in(table, present.get(table, {}))
            elif line.startswith("*"):
                table = line[1:]
            lines.append(line)
        return "\n".join(lines) + "\n"

    def differences(self, family: Family, present: Tables) -> list[str]:
        """What is not as it must be, in words; empty when all is."""
        found: list[str] = []
        for table, chains in self.chains(family).items():
            there = present.get(table, {})
            for name, rules in chains.items():
                where = f"{family.name} {table} {name}"
                found += _chain_differences(where, rules, there.get(name))
            for name, jump in self.jumps()[table].items():
                where = f"{family.name} {table} {name}"
                found += _jump_differences(where, jump, CHAINS[table], there.get(name, ()))
        return found

    def _template(self, family: Family) -> str:
        explicit = {"explicit_filter": "", "explicit_nat": ""}
        if self.explicit and ipaddress.ip_address(self.explicit).version == family.version:
            net = str(ipaddress.ip_network(self.explicit))
            explicit = {
                "explicit_filter": EXPLICIT_FILTER.substitute(address=net, port=self.explicit_port),
                "explicit_nat": EXPLICIT_NAT.substitute(address=net, port=self.explicit_port),
            }
        text = TEMPLATE.substitute(
            loopback=family.loopback_net,
            front=self.front_port,
            dns=self.dns_port,
            group=self.nflog_group,
            prohibited=family.prohibited,
            **explicit,
        )
        return "\n".join(line for line in text.splitlines() if line)

    def _lead_in(self, table: str, present: Mapping[str, Sequence[Rule]]) -> list[str]:
        lines = []
        for name, jump in self.jumps()[table].items():
            lines += _deletions(name, present.get(name, ()), CHAINS[table])
            lines.append(f"-I {name} 1 {jump}")
        return lines


def explicit_address(listen: str) -> str:
    """Where runs reach a proxy that listens on `listen`, "" where they must not.

    A wildcard is reached on loopback. An address that is not on loopback gets no rule:
    would it ever not be this host's own, a packet to it would leave undecided.
    """
    address = ipaddress.ip_address(listen)
    if address.is_unspecified:
        return V4.loopback if address.version == 4 else V6.loopback
    return str(address) if address.is_loopback else ""


def removal(present: Tables) -> str:
    """Input for iptables-restore --noflush that takes every trace of ours out; "" for none."""
    lines = []
    for table, ours in CHAINS.items():
        there = present.get(table, {})
        body = [d for name, rules in there.items() for d in _deletions(name, rules, ours)]
        left = [name for name in ours if name in there]
        body += [f"-F {name}" for name in left] + [f"-X {name}" for name in left]
        if body:
            lines += [f"*{table}", *body, "COMMIT"]
    return "\n".join(lines) + "\n" if lines else ""


def refused_packets(present: Tables) -> int:
    """How many packets our NFLOG rules have counted."""
    return sum(
        rule.packets
        for table, ours in CHAINS.items()
        for name in ours
        for rule in present.get(table, {}).get(name, ())
        if rule.target == "NFLOG"
    )


_COUNTED = re.compile(r"\[(\d+):\d+\] ")


def parse_save(text: str) -> dict[str, dict[str, list[Rule]]]:
    """iptables-save's output, with or without -c. Raises `MalformedSave`."""
    tables: dict[str, dict[str, list[Rule]]] = {}
    table: dict[str, list[Rule]] | None = None
    for line in text.splitlines():
        if "is incompatible, use 'nft' tool" in line:
            raise MalformedSave(line.removeprefix("# "))
        if not line or line.startswith("#"):
            continue
        if line.startswith("*"):
            table = tables.setdefault(line[1:], {})
        elif table is None:
            raise MalformedSave(f"a line outside of any table: {line[:80]}")
        elif line == "COMMIT":
            table = None
        elif line.startswith(":"):
            table.setdefault(line[1:].partition(" ")[0], [])
        else:
            _take_rule(table, line)
    if table is not None:
        raise MalformedSave("the last table has no end")
    return tables


def _take_rule(table: dict[str, list[Rule]], line: str) -> None:
    counted = _COUNTED.match(line)
    words = (line[counted.end() :] if counted else line).split(" ", 2)
    if len(words) < 2 or words[0] != "-A" or words[1] not in table:
        raise MalformedSave(f"no rule of a known chain: {line[:80]}")
    text = words[2] if len(words) == 3 else ""
    table[words[1]].append(Rule(text, int(counted[1]) if counted else 0))


def normal(text: str) -> NormalRule:
    """A rule as its options with their values, whatever order they were written in."""
    groups: list[list[str]] = []
    negated = False
    for word in words_of(text):
        if word == "!":
            negated = True
        elif word.startswith("-") and not _is_value(groups):
            groups.append([f"! {word}" if negated else word])
            negated = False
        elif groups:
            groups[-1].append(word)
        else:
            groups.append([word])
    return tuple(sorted(tuple(group) for group in groups))


FREE_TEXT = ("--comment", "--nflog-prefix")


def _is_value(groups: Sequence[Sequence[str]]) -> bool:
    """True where the next word is a value even if it looks like an option."""
    return bool(groups) and len(groups[-1]) == 1 and groups[-1][0] in FREE_TEXT


def words_of(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as e:
        raise MalformedSave(f"{e} in {text[:80]}") from e


def _deletions(chain: str, rules: Sequence[Rule], ours: Sequence[str]) -> list[str]:
    return [f"-D {chain} {rule.text}" for rule in rules if rule.target in ours]


def _chain_differences(
    where: str, wanted: Sequence[Rule], there: Sequence[Rule] | None
) -> list[str]:
    if not there:
        return [f"{where} is {'missing' if there is None else 'empty'}"]
    want, have = [normal(r.text) for r in wanted], [normal(r.text) for r in there]
    if want == have:
        return []
    lacking, surplus = Counter(want) - Counter(have), Counter(have) - Counter(want)
    found = [f"{where} lacks: {r.text}" for r in wanted if normal(r.text) in lacking]
    found += [f"{where} has a foreign rule: {r.text}" for r in there if normal(r.text) in surplus]
    return found or [f"{where} has its rules in another order"]


def _jump_differences(
    where: str, jump: str, ours: Sequence[str], rules: Sequence[Rule]
) -> list[str]:
    wanted = normal(jump)
    places = [i for i, rule in enumerate(rules) if normal(rule.text) == wanted]
    if not places:
        found = [f"{where} lacks the jump: {jump}"]
    elif places[0] > 0:
        found = [f"{where} has a rule before our jump: {rules[0].text}"]
    else:
        found = []
    if len(places) > 1:
        found.append(f"{where} has our jump {len(places)} times")
    strangers = [r for i, r in enumerate(rules) if r.target in ours and i not in places]
    return found + [f"{where} has another jump to our chain: {r.text}" for r in strangers]

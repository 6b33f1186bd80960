"""The rules as text: what is rendered, and that the comparison misses no difference."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa.redirect.ruleset import (
    CHAINS,
    V4,
    V6,
    Family,
    MalformedSave,
    Rule,
    RuleSet,
    explicit_address,
    normal,
    parse_save,
    refused_packets,
    removal,
)

RULES = RuleSet()
FAMILIES = pytest.mark.parametrize("family", [V4, V6], ids=lambda f: f.name)
PATH = "aa.slice/aa-agents.slice/aa-agents-proxy.slice"
Mutable = dict[str, dict[str, list[Rule]]]


def in_force(family: Family, rules: RuleSet = RULES) -> Mutable:
    """The tables as they are read back when all is well, with rules of the host behind ours."""
    tables: Mutable = {
        table: {name: list(ours) for name, ours in chains.items()}
        for table, chains in rules.chains(family).items()
    }
    for table, jumps in rules.jumps().items():
        for chain, jump in jumps.items():
            tables[table][chain] = [Rule(jump), Rule("-p tcp -m tcp --dport 22 -j ACCEPT")]
    return tables


def applied(text: str, present: Mutable) -> Mutable:
    """What iptables-restore --noflush makes of `present`; a model small enough to trust."""
    tables = {t: {c: list(r) for c, r in chains.items()} for t, chains in present.items()}
    table: dict[str, list[Rule]] = {}
    for line in text.splitlines():
        words = line.split(" ", 2)
        match words[0]:
            case "" | "#" | "COMMIT":
                pass
            case "-A":
                table[words[1]].append(Rule(words[2]))
            case "-I":
                assert words[2].startswith("1 ")
                table.setdefault(words[1], []).insert(0, Rule(words[2][2:]))
            case "-D":
                there = [normal(r.text) for r in table[words[1]]]
                table[words[1]].pop(there.index(normal(words[2])))
            case "-F":
                table[words[1]] = []
            case "-X":
                assert not table.pop(words[1])
            case _ if line.startswith("*"):
                table = tables.setdefault(line[1:], {})
            case _:
                assert line.startswith(":"), line
                table[words[0][1:]] = []
    return tables


def in_common_words(family: Family, text: str) -> str:
    """The rendered text without what may differ between families."""
    text = text.replace(family.loopback_net, "LOOPBACK").replace(family.prohibited, "PROHIBITED")
    return "\n".join(line for line in text.splitlines() if "8899" not in line)


def test_v4_and_v6_have_the_same_rules() -> None:
    assert in_common_words(V4, RULES.render(V4, {})) == in_common_words(V6, RULES.render(V6, {}))


@FAMILIES
def test_each_chain_ends_by_refusing_everything(family: Family) -> None:
    for name in CHAINS["filter"]:
        last = RULES.chains(family)["filter"][name][-1]
        assert last.text == f"-j REJECT --reject-with {family.prohibited}"


@FAMILIES
def test_each_refusal_is_logged_first(family: Family) -> None:
    for rules in RULES.chains(family)["filter"].values():
        for i, rule in enumerate(rules):
            if rule.target == "REJECT":
                logged = [r for r in rules[:i] if r.target == "NFLOG"]
                protocols = {r.text.partition(" -j")[0] for r in logged if r.text[:2] == "-p"}
                own = rule.text.partition(" -j")[0] if rule.text.startswith("-p") else None
                assert any(not r.text.startswith("-p") for r in logged) or own in protocols


@FAMILIES
def test_only_the_proxys_ends_on_loopback_are_let_through(family: Family) -> None:
    passing = [
        r.text
        for rules in RULES.chains(family)["filter"].values()
        for r in rules
        if r.target not in ("NFLOG", "REJECT")
    ]
    ends = {
        (m[1], m[2], m[3])
        for text in passing
        if (m := re.match(r"-d (\S+) -p (tcp|udp) -m \2 --dport (\d+) ", text))
    }
    wanted = {
        (family.loopback_net, "tcp", "8898"),
        (family.loopback_net, "tcp", "8853"),
        (family.loopback_net, "udp", "8853"),
    }
    if family is V4:
        wanted.add((family.loopback_net, "tcp", "8899"))
    assert ends == wanted and len(passing) == len(wanted)


@FAMILIES
def test_tables_are_closed_before_they_lead_to_the_proxy(family: Family) -> None:
    text = RULES.render(family, {})
    assert text.index("*filter") < text.index("*nat")


@FAMILIES
def test_what_was_rendered_is_what_is_wanted(family: Family) -> None:
    made = applied(RULES.render(family, {}), {"filter": {"OUTPUT": [Rule("-j ACCEPT")]}})
    assert RULES.differences(family, made) == []
    assert made["filter"]["OUTPUT"][1:] == [Rule("-j ACCEPT")]


@FAMILIES
def test_rendering_again_changes_nothing(family: Family) -> None:
    once = applied(RULES.render(family, {}), {})
    assert applied(RULES.render(family, once), once) == once


@FAMILIES
def test_a_jump_that_stands_twice_or_behind_others_becomes_one_in_front(family: Family) -> None:
    present = in_force(family)
    jump = present["filter"]["OUTPUT"].pop(0)
    present["filter"]["OUTPUT"] += [jump, Rule("-o eth0 -j DROP"), jump]
    made = applied(RULES.render(family, present), present)
    assert RULES.differences(family, made) == []
    others = ["-p tcp -m tcp --dport 22 -j ACCEPT", "-o eth0 -j DROP"]
    assert [r.text for r in made["filter"]["OUTPUT"][1:]] == others


@FAMILIES
def test_a_jump_of_another_slice_is_replaced(family: Family) -> None:
    old = RuleSet(slice="old.slice", front_port=1, dns_port=2, explicit_port=3)
    present = in_force(family, old)
    assert RULES.differences(family, present)
    made = applied(RULES.render(family, present), present)
    assert RULES.differences(family, made) == []


def every_rule(family: Family) -> list[tuple[str, str, int]]:
    return [
        (table, chain, place)
        for table, chains in in_force(family).items()
        for chain, rules in chains.items()
        for place in range(len(rules))
        if chain in CHAINS[table] or place == 0
    ]


@FAMILIES
def test_notices_each_missing_rule(family: Family) -> None:
    assert RULES.differences(family, in_force(family)) == []
    for table, chain, place in every_rule(family):
        present = in_force(family)
        del present[table][chain][place]
        assert RULES.differences(family, present), (table, chain, place)


@FAMILIES
def test_notices_a_rule_put_before_any_of_ours(family: Family) -> None:
    for table, chain, place in every_rule(family):
        for text in ("-j ACCEPT", "-p udp -j RETURN", "-m comment --comment x"):
            present = in_force(family)
            present[table][chain].insert(place, Rule(text))
            assert RULES.differences(family, present), (table, chain, place, text)


@FAMILIES
def test_notices_a_rule_put_behind_ours_in_our_chain(family: Family) -> None:
    for table, chains in CHAINS.items():
        for chain in chains:
            present = in_force(family)
            present[table][chain].append(Rule("-j ACCEPT"))
            assert RULES.differences(family, present)


@FAMILIES
def test_a_rule_of_the_host_behind_our_jump_is_no_difference(family: Family) -> None:
    present = in_force(family)
    present["filter"]["OUTPUT"].append(Rule("-j DROP"))
    present["nat"]["OUTPUT"].append(Rule("! -d 127.0.0.0/8 -j DOCKER"))
    present["mangle"] = {"OUTPUT": [Rule("-j MARK --set-xmark 0x1/0xffffffff")]}
    assert RULES.differences(family, present) == []


@FAMILIES
def test_notices_two_rules_that_changed_places(family: Family) -> None:
    for table, chains in CHAINS.items():
        for chain in chains:
            present = in_force(family)
            rules = present[table][chain]
            rules[0], rules[1] = rules[1], rules[0]
            assert RULES.differences(family, present), chain


@FAMILIES
def test_notices_a_missing_chain_and_a_missing_table(family: Family) -> None:
    for table, chains in CHAINS.items():
        for chain in chains:
            present = in_force(family)
            del present[table][chain]
            assert f"{family.name} {table} {chain} is missing" in RULES.differences(family, present)
        present = in_force(family)
        del present[table]
        assert RULES.differences(family, present)


def substitutes(word: str) -> list[str]:
    swaps = {"tcp": ["udp"], "udp": ["tcp"], "REJECT": ["ACCEPT", "DROP"], "RETURN": ["REJECT"]}
    if word.isdigit():
        return [str(int(word) + 1)]
    if "/" in word and word[0] in "1:":
        return ["0.0.0.0/0", "::/0"]
    return swaps.get(word, [])


@FAMILIES
def test_notices_each_changed_word(family: Family) -> None:
    tried = 0
    for table, chain, place in every_rule(family):
        words = in_force(family)[table][chain][place].text.split(" ")
        for i, word in enumerate(words):
            for other in substitutes(word):
                present = in_force(family)
                changed = " ".join([*words[:i], other, *words[i + 1 :]])
                present[table][chain][place] = Rule(changed)
                assert RULES.differences(family, present), changed
                tried += 1
    assert tried > 30


@FAMILIES
def test_notices_a_negated_match(family: Family) -> None:
    present = in_force(family)
    rule = present["filter"]["AA-FILTER"][0]
    present["filter"]["AA-FILTER"][0] = Rule(f"! {rule.text}")
    assert RULES.differences(family, present)
    present = in_force(family)
    present["filter"]["OUTPUT"][0] = Rule(f"-m cgroup ! --path {PATH} -j AA-FILTER")
    assert RULES.differences(family, present)


def test_the_order_and_the_quoting_of_options_do_not_matter() -> None:
    one = '-j NFLOG --nflog-prefix "aa-redirect tcp" --nflog-group 83'
    other = "-j NFLOG --nflog-group 83 --nflog-prefix 'aa-redirect tcp'"
    assert normal(one) == normal(other)
    assert normal("-m comment --comment -j") != normal("-m comment --comment x -j x")


@FAMILIES
def test_removal_leaves_every_other_rule(family: Family) -> None:
    bare: Mutable = {
        "filter": {"INPUT": [Rule("-j A")], "OUTPUT": [Rule("-j B"), Rule("-j C")], "DOCKER": []},
        "nat": {"OUTPUT": [], "POSTROUTING": [Rule("-j MASQUERADE")]},
        "mangle": {"OUTPUT": [Rule("-j D")]},
    }
    full = applied(RULES.render(family, bare), bare)
    assert full != bare
    assert applied(removal(full), full) == bare


def test_removal_of_nothing_is_nothing() -> None:
    assert removal({"filter": {"OUTPUT": [Rule("-j B")]}}) == ""
    assert removal({"filter": {"AA-FILTER": []}}) != ""


def test_reads_what_iptables_saves() -> None:
    text = (
        "# Generated by iptables-save\n*filter\n:INPUT ACCEPT [12:34]\n:AA-FILTER - [0:0]\n"
        '[7:420] -A AA-FILTER -p udp -j NFLOG --nflog-prefix "aa-redirect udp" --nflog-group 83\n'
        "[9:1] -A INPUT\n-A INPUT -j AA-FILTER\nCOMMIT\n# Completed\n"
    )
    tables = parse_save(text)
    assert refused_packets(tables) == 7
    assert [r.target for r in tables["filter"]["INPUT"]] == ["", "AA-FILTER"]
    assert [r.packets for r in tables["filter"]["INPUT"]] == [9, 0]


@pytest.mark.parametrize(
    "text",
    [
        "-A INPUT -j ACCEPT\n",
        "*filter\n:INPUT ACCEPT [0:0]\n",
        "*filter\n-A NOWHERE -j ACCEPT\nCOMMIT\n",
        "*filter\nnonsense\nCOMMIT\n",
        "# Table `filter' is incompatible, use 'nft' tool.\n",
    ],
)
def test_refuses_what_is_no_whole_save(text: str) -> None:
    with pytest.raises(MalformedSave):
        parse_save(text)


@given(st.text(alphabet="*:-A# INPUT\n[]0\"'COMMIT", max_size=80))
def test_any_text_is_tables_or_an_error(text: str) -> None:
    try:
        tables = parse_save(text)
        RULES.differences(V4, tables)
        removal(tables)
    except MalformedSave:
        pass


@given(st.lists(st.text(alphabet="ab-! \"'", max_size=6), max_size=8))
def test_equal_rules_stay_equal_however_they_are_quoted(words: list[str]) -> None:
    assert normal(shlex.join(words)) == normal(" ".join(shlex.quote(w) for w in words))


@pytest.mark.parametrize(
    ("listen", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.9", "127.0.0.9"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "::1"),
        ("::1", "::1"),
        ("10.0.0.5", ""),
        ("fd00::5", ""),
    ],
)
def test_runs_reach_the_explicit_proxy_on_loopback_only(listen: str, reached: str) -> None:
    rules = RuleSet(explicit=explicit_address(listen))
    texts = {f: rules.render(f, {}) for f in (V4, V6)}
    assert explicit_address(listen) == reached
    for family, text in texts.items():
        here = bool(reached) and (":" in reached) == (family is V6)
        assert (f"-d {reached}/" in text and "--dport 8899" in text) == here


@pytest.mark.parametrize(
    "wrong",
    [
        {"front_port": 0},
        {"front_port": 65536},
        {"front_port": 8853},
        {"slice": ""},
        {"slice": "/absolute"},
        {"slice": "a b"},
        {"slice": "a\n-A OUTPUT -j ACCEPT"},
        {"slice": 'a" -j ACCEPT'},
        {"nflog_group": 0},
        {"explicit": "10.0.0.1"},
        {"explicit": "nowhere"},
    ],
)
def test_refuses_values_that_would_make_other_rules(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RuleSet(**wrong)


def test_other_ports_are_rendered_everywhere() -> None:
    rules = RuleSet(front_port=1001, explicit_port=1002, dns_port=1003)
    for family in (V4, V6):
        text = rules.render(family, {})
        assert not re.search(r"88\d\d", text)
        assert "--to-ports 1001" in text and "--to-ports 1003" in text

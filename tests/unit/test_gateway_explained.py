"""Requests inside TLS against decisions: what explains them, what is an alert, and what nobody can know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aa.gateway.explained import MAX_ALERTS, Explained
from aa.gateway.gateway import Gateway
from aa.model import Action, Kind, Layer, RecordType, Report, Run
from tests.unit.test_gateway import Open, connect, open_gateway, policies, records, start_run

__all__ = ["open_gateway", "policies", "records"]  # fixtures

BOTH = frozenset({Layer.PROXY, Layer.KERNEL})
RUN = Run("r1", "a", "u", 1000, layers=BOTH, started=1000.0)


def seen(host: str = "allowed.test", *, run: str = "r1", **about: Any) -> Report:
    attributes = {
        "source": "tls-probe",
        "host": host,
        "peer": "93.184.216.34:443",
        "peer_exact": False,
        "comm": "curl",
    }
    return Report(
        type=RecordType.OBSERVED,
        layer=Layer.KERNEL,
        kind=Kind.HTTP_REQUEST,
        target=f"https://{host}/x",
        time=1,
        run=run,
        attributes=attributes | about,
    )


def allowed(*actions: Action) -> Explained:
    explained = Explained()
    for action in actions:
        explained.decided("r1", action, now=2000.0)
    return explained


def test_a_request_to_a_decided_host_is_explained() -> None:
    report, alert = allowed(connect("allowed.test")).judge(RUN, seen())
    assert report.attributes["decided"] is True and alert == ""


def test_a_request_to_another_host_is_an_alert_once_and_marked_each_time() -> None:
    explained = allowed(connect("allowed.test"))
    report, alert = explained.judge(RUN, seen("hidden.test"))
    assert report.attributes["decided"] is False
    assert "hidden.test" in alert and "curl" in alert
    again, silence = explained.judge(RUN, seen("hidden.test"))
    assert again.attributes["decided"] is False and silence == ""
    assert explained.judge(RUN, seen("other.test"))[1] != ""


def test_a_decided_request_explains_as_well() -> None:
    action = Action(Kind.HTTP_REQUEST, "allowed.test:443", {"host": "allowed.test", "port": 443})
    assert allowed(action).judge(RUN, seen())[0].attributes["decided"] is True


def test_other_decisions_explain_nothing() -> None:
    lookup = Action(Kind.DNS_QUERY, "allowed.test", {"host": "allowed.test"})
    assert allowed(lookup).judge(RUN, seen())[1] != ""


def test_a_request_that_names_nobody_is_compared_by_a_certain_address_only() -> None:
    explained = allowed(connect("allowed.test", ["93.184.216.34"]))
    certain = explained.judge(RUN, seen("", peer_exact=True))
    assert certain[0].attributes["decided"] is True
    elsewhere = explained.judge(RUN, seen("", peer="[2001:db8::1]:443", peer_exact=True))
    assert elsewhere[0].attributes["decided"] is False and "2001:db8::1" in elsewhere[1]
    inferred = explained.judge(RUN, seen("", peer="203.0.113.9:443"))
    assert "decided" not in inferred[0].attributes and inferred[1] == ""


def test_a_connection_by_address_explains_a_request_to_it() -> None:
    by_address = Action(Kind.NET_CONNECT, "[2001:db8::1]:443", {"port": 443})
    assert allowed(by_address).judge(RUN, seen("2001:db8::1"))[1] == ""


@pytest.mark.parametrize(
    "report",
    [
        seen("x.test", unmeasured="before-attach"),
        seen("x.test", source="else"),
        Report(RecordType.OBSERVED, Layer.PROXY, Kind.HTTP_REQUEST, "x.test:443", 1, run="r1"),
    ],
)
def test_what_is_no_plaintext_is_not_judged(report: Report) -> None:
    assert Explained().judge(RUN, report) == (report, "")


def test_a_run_without_the_proxy_is_not_judged() -> None:
    run = Run("r1", "a", "u", 1000, layers=frozenset({Layer.KERNEL}), started=1000.0)
    assert Explained().judge(run, seen()) == (seen(), "")


def test_what_was_forgotten_is_not_held_against_a_run() -> None:
    explained = Explained(hosts=2)
    for n in range(3):
        explained.decided("r1", connect(f"h{n}.test"), now=2000.0)
    assert explained.judge(RUN, seen("h0.test")) == (seen("h0.test"), "")
    assert explained.judge(RUN, seen("h2.test"))[0].attributes["decided"] is True


def test_a_run_that_gave_way_to_others_is_unknown_and_a_later_one_is_not() -> None:
    explained = Explained(runs=2)
    for n in range(1, 5):
        explained.decided(f"r{n}", connect("allowed.test"), now=2000.0 + n)
    assert len(explained) == 2
    assert explained.judge(RUN, seen("hidden.test")) == (seen("hidden.test"), "")
    later = Run("r9", "a", "u", 1000, layers=BOTH, started=3000.0)
    assert explained.judge(later, seen("hidden.test", run="r9"))[1] != ""


def test_an_agent_cannot_flood_with_alerts() -> None:
    explained = allowed(connect("allowed.test"))
    alerts = [explained.judge(RUN, seen(f"h{n}.test"))[1] for n in range(MAX_ALERTS * 3)]
    assert sum(1 for alert in alerts if alert) == MAX_ALERTS + 1
    assert "further ones" in alerts[MAX_ALERTS]


def ended(records: Callable[[], list[dict[str, Any]]], type_: str) -> list[dict[str, Any]]:
    return [r for r in records() if r["type"] == type_]


def test_the_gateway_raises_the_alert_before_the_record(
    open_gateway: Open, policies: Path, records: Any
) -> None:
    gateway = with_policy(open_gateway, policies)
    run = start_run(gateway, BOTH)
    assert gateway.decide(run.id, Layer.PROXY, connect("allowed.test", ["93.184.216.34"])).permits
    assert not gateway.decide(run.id, Layer.PROXY, connect("denied.test")).permits
    gateway.component_reports("ebpf", 0, [seen(run=run.id), seen("denied.test", run=run.id)])
    first, alert, second = records()[-3:]
    assert first["attributes"]["decided"] is True
    assert alert["type"] == "alert" and alert["run"] == run.id
    assert "denied.test" in alert["reason"] and alert["attributes"]["comm"] == "curl"
    assert second["attributes"]["decided"] is False
    json.dumps(alert)


def test_a_restarted_gateway_knows_what_was_allowed(
    open_gateway: Open, policies: Path, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = with_policy(open_gateway, policies)
    run = start_run(gateway, BOTH)
    gateway.decide(run.id, Layer.PROXY, connect("allowed.test", ["93.184.216.34"]))
    gateway.audit._file.close()
    gateway.registry.close()
    gateway = open_gateway()
    gateway.component_reports("ebpf", 0, [seen(run=run.id), seen("hidden.test", run=run.id)])
    assert [r["attributes"].get("decided") for r in records()[-3:]] == [True, None, False]
    assert len(ended(records, "alert")) == 1
    gateway.audit._file.close()
    gateway.registry.close()
    monkeypatch.setattr("aa.gateway.gateway.RECORDS_READ", 1)
    gateway = open_gateway()
    gateway.component_reports("ebpf", 0, [seen("hidden.test", run=run.id)])
    assert "decided" not in records()[-1]["attributes"], "it has not read far enough to know"
    assert len(ended(records, "alert")) == 1


def with_policy(open_gateway: Open, policies: Path) -> Gateway:
    (policies / "test.toml").write_text(
        '[policy]\nid = "test"\ndefault = { network = "deny" }\n'
        '[[rule]]\nid = "web"\neffect = "allow"\nnetwork = { hosts = ["allowed.test"] }\n'
    )
    (policies / "test.toml").chmod(0o600)
    return open_gateway()

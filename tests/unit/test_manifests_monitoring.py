"""Alerts and dashboard: they parse, and ask only for series and labels that the server really has.

tests/e2e/test_triton_health.py holds `SERIES` to a real tritonserver.
"""

import json
import re
from collections.abc import Iterator

import promql_parser as promql
import pytest
from manifests import KUBERNETES, labels_of_pods, named, of_kind, pod_templates, selects, values
from series import LABELS, SERIES, dashboard_queries, rule_queries

QUERIES = [*rule_queries(), *dashboard_queries()]


def parts(node: object) -> Iterator[object]:
    """A query's expression and all below it."""
    yield node
    for name in ("expr", "lhs", "rhs", "args", "param", "vector_selector"):
        found = getattr(node, name, None)
        for below in found if isinstance(found, list) else [found]:
            if below is not None:
                yield from parts(below)


def unknown(query: str) -> set[str]:
    """Series and labels of a query that the server does not have."""
    found = set()
    for part in parts(promql.parse(query)):
        if isinstance(part, promql.VectorSelector):
            labels = {matcher.name for matcher in part.matchers.matchers}
            found |= ({part.name} - SERIES) | (labels - LABELS)
        elif isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            found |= set(part.modifier.labels) - LABELS
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_the_server_has(query: str) -> None:
    assert any(isinstance(part, promql.VectorSelector) for part in parts(promql.parse(query)))
    assert unknown(query) == set()


def test_what_the_server_has_not_is_found_wherever_it_stands() -> None:
    for wrong in ("vismem_token_total", "sum(rate(nv_gone[5m])) > 1", "1 - abs(vismem_waiting / vismem_gone)"):
        assert len(unknown(wrong)) == 1
    assert unknown('sum by (user) (vismem_waiting{gpu="0"})') == {"user", "gpu"}
    with pytest.raises(ValueError, match="unclosed"):
        promql.parse("sum by (pod (vismem_waiting)")


def test_an_alert_says_what_is_wrong_how_much_it_matters_and_what_it_may_be() -> None:
    (rules,) = of_kind("7b", "PrometheusRule")
    alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert len({alert["alert"] for alert in alerts}) == len(alerts) > 5
    for alert in alerts:
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(alert["annotations"]) == {"summary", "description"}
        kept = next((set(p.modifier.labels) for p in parts(promql.parse(alert["expr"])) if getattr(p, "modifier", None)
                     and isinstance(p, promql.AggregateExpr)), set())  # fmt: skip
        for text in alert["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= kept, alert["alert"]


def test_prometheus_scrapes_the_metrics_of_triton_s_pods_and_may_reach_them() -> None:
    (monitor,) = of_kind("7b", "PodMonitor")
    found = [key for key, labels in labels_of_pods("7b").items() if selects(monitor["spec"]["selector"], labels)]
    assert found == ["Deployment/triton"]
    ports = {port["name"] for listed in values(pod_templates("7b")[found[0]], "ports") for port in listed}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
    policy = named("7b", "NetworkPolicy", "triton")
    assert [{"port": "metrics"}] in [rule["ports"] for rule in policy["spec"]["ingress"]]


def test_the_dashboard_is_the_file_that_people_may_import() -> None:
    held = named("7b", "ConfigMap", "vismem-dashboard")
    assert held["metadata"]["labels"]["grafana_dashboard"] == "1"
    board = json.loads(held["data"]["dashboard.json"])
    assert board == json.loads((KUBERNETES / "components/monitoring/dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len({panel["id"] for panel in board["panels"]}) == len(places)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert {"datasource", "namespace", "model"} == variables
    for panel in board["panels"]:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])

"""Who may talk to whom in each install of deploy/kubernetes, and whom its policies leave alone."""

import pytest
from manifests import (
    OWN_MLFLOW,
    SEVERAL_NODES,
    containers,
    labels_of_pods,
    named,
    namespace_of,
    of_kind,
    overlays,
    render,
    selects,
    servers,
    values,
)

OUTSIDE_PODS = ("workflows.argoproj.io/workflow",)  # labels of pods that others make in the namespace: steps of a run


@overlays
def test_network_policies_name_pods_and_ports_that_exist(overlay: str) -> None:
    pods = labels_of_pods(overlay)
    seen = [*pods.values(), *({label: "any"} for label in OUTSIDE_PODS), {"vismem/triton-client": "true"}]
    ports = {port["name"]: port["containerPort"] for _, c in containers(overlay) for port in c.get("ports", [])}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for selector in values(policy, "podSelector"):
            assert any(selects(selector, labels) for labels in seen), policy["metadata"]["name"]
        for port in (port["port"] for listed in values(policy, "ports") for port in listed):
            assert isinstance(port, int) or port in ports, policy["metadata"]["name"]


@overlays
def test_pods_may_do_what_their_neighbours_expect_of_them(overlay: str) -> None:
    """Both ends of a connection are open: the caller's egress and the other's ingress."""
    triton = servers(overlay)
    connections = [("Deployment/mlflow", "CronJob/rollout", "http")]
    connections += [(f"Deployment/{name}", "CronJob/rollout", "grpc") for name in (triton, "triton-canary")]
    if overlay in SEVERAL_NODES:
        connections.append(("TrainingRuntime/vismem-torch/node", "TrainingRuntime/vismem-torch/node", None))
    for server, client, port in connections:
        assert allowed(overlay, "ingress", "from", server, client, port)
        assert allowed(overlay, "egress", "to", client, server, port)
    assert not allowed(overlay, "ingress", "from", f"Deployment/{triton}", "Deployment/mlflow", "grpc")
    assert not allowed(overlay, "egress", "to", f"Deployment/{triton}", "Deployment/mlflow", "http")


@overlays
def test_a_canary_is_asked_by_the_rollout_alone_which_may_reach_the_kubernetes_api(overlay: str) -> None:
    (rule,) = named(overlay, "NetworkPolicy", "triton-canary")["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "rollout"}}}]
    *_, api = named(overlay, "NetworkPolicy", "rollout")["spec"]["egress"]
    assert api == {"ports": [{"port": port} for port in (443, 6443, 9000, 8333)]}, "and the object store"


@overlays
def test_names_are_looked_up_wherever_clusters_have_their_dns(overlay: str) -> None:
    dns = named(overlay, "NetworkPolicy", "dns")["spec"]
    assert dns["podSelector"] == named(overlay, "NetworkPolicy", "default-deny")["spec"]["podSelector"]
    (rule,) = dns["egress"]
    (spaces,) = [space for peer in rule["to"] for space in values(peer, "matchExpressions")]
    assert spaces[0]["values"] == ["kube-system", "openshift-dns"]
    assert {"cidr": "169.254.20.10/32"} in [peer.get("ipBlock") for peer in rule["to"]]  # NodeLocal DNSCache
    assert {(port["port"], port["protocol"]) for port in rule["ports"]} == {
        (port, protocol) for port in (53, 5353) for protocol in ("UDP", "TCP")
    }


@overlays
def test_no_pod_waits_for_a_sidecar_or_is_kept_alive_by_one(overlay: str) -> None:
    for key, labels in labels_of_pods(overlay).items():
        assert labels["sidecar.istio.io/inject"] == "false", key


@pytest.mark.parametrize("overlay", ["single-gpu", "kubeflow-profile", "7b"])
def test_an_mlflow_of_your_own_takes_the_place_of_this_one_and_may_be_reached(overlay: str) -> None:
    made = render(overlay, (OWN_MLFLOW,))
    assert "mlflow" not in {manifest["metadata"]["name"].partition("-")[0] for manifest in made}
    asking = {m["metadata"]["name"]: m["spec"]["egress"][-1] for m in made if m["kind"] == "NetworkPolicy"
              and m["metadata"]["name"] in ("rollout", "drift", "steps")}  # fmt: skip
    assert set(asking) == {"rollout"} | ({"steps"} if overlay != "single-gpu" else set()) | (
        {"drift"} if overlay == "7b" else set()
    )
    for rule in asking.values():
        assert rule["ports"] == [{"port": 5000}]
        assert [*values(rule, "matchLabels")] == [{"kubernetes.io/metadata.name": "mlflow"}]


def allowed(overlay: str, way: str, side: str, owner: str, peer: str, port: str | None) -> bool:
    pods = labels_of_pods(overlay)
    for policy in of_kind(overlay, "NetworkPolicy"):
        if selects(policy["spec"]["podSelector"], pods[owner]):
            for rule in policy["spec"].get(way, []):
                peers = [one["podSelector"] for one in rule.get(side, []) if set(one) == {"podSelector"}]
                open_ports = {one["port"] for one in rule.get("ports", [])}
                if any(selects(one, pods[peer]) for one in peers) and (not open_ports or port in open_ports):
                    return True
    return False


@overlays
def test_nothing_of_ours_may_talk_that_is_not_named_and_no_policy_confines_others(overlay: str) -> None:
    """Others are Kubeflow's own pods, or those that its controllers put into a profile's namespace."""
    deny = named(overlay, "NetworkPolicy", "default-deny")
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert all(selects(deny["spec"]["podSelector"], labels) for labels in labels_of_pods(overlay).values())
    others = [{"app": "ml-pipeline"}, {"app": "ml-pipeline-ui-artifact"}, {"app": "seaweedfs"}, {}]
    if namespace_of(overlay) == "kubeflow":
        others.append(dict.fromkeys(OUTSIDE_PODS, "of-another-pipeline"))
    for policy in of_kind(overlay, "NetworkPolicy"):
        assert not any(selects(policy["spec"]["podSelector"], labels) for labels in others), policy["metadata"]["name"]
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], f"{policy['metadata']['name']} lets everybody in"

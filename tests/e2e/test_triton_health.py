"""The probes of a pod and the figures of its autoscaler, held to a real tritonserver: alive, busy and dead."""

import contextlib
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from series import TRITON, asked
from stand_in import ANSWER, ask, endless, make_repository, metrics, pending

from vismem.config import resolve
from vismem.errors import UserError
from vismem.serving.command import PROFILE_VARIABLE
from vismem.serving.environment import find_serving_environment
from vismem.serving.probe import main as probe
from vismem.serving.server import TritonServer, triton_server

ROOT = Path(__file__).parents[2]


def living(group: int) -> list[int]:
    """Process ids of a process group, those that have ended and only wait to be reaped left out."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, leader = status.read_text().rpartition(") ")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(leader) == group and state not in "ZX":
            found.append(int(status.parent.name))
    return found


def test_a_model_process_that_dies_is_reported_and_the_server_can_still_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with triton_server(make_repository(tmp_path), log=tmp_path / "log") as server:
        group = server.service.process.pid
        with pytest.raises(UserError, match=r"no whole answer from .* in 2 s|is not healthy"):
            ask(server, "die", timeout=2)
        with pytest.raises(UserError, match="restart `vismem serve`"):
            ask(server, timeout=2)
        assert says_ready(server)  # for ever: hence the probe
        with ThreadPoolExecutor(4) as others:  # their questions are taken up, too: that proves nothing
            for _ in range(8):
                others.submit(ask, server, timeout=2)
            assert probe([*probed(server), "--timeout", "2"]) == 1
        assert re.search(r"is not healthy|no whole answer from .* in 2 s", capsys.readouterr().err)
    assert living(group) == []


def probed(server: TritonServer) -> list[str]:
    """Options of the probe; in a pod the ports are its defaults."""
    return ["--url", server.grpc_url, "--metrics", f"http://127.0.0.1:{server.ports['metrics']}/metrics"]


def says_ready(server: TritonServer) -> bool:
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(server.grpc_url) as client:
        return bool(client.is_server_ready() and client.is_model_ready("vismem"))


def test_the_probes_of_a_pod_find_a_living_server_well_with_what_the_serving_image_has(server: TritonServer) -> None:
    deployment = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "base" / "triton" / "deployment.yaml").read_text())
    (triton,) = deployment["spec"]["template"]["spec"]["containers"]
    environment = find_serving_environment()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = [str(environment.python), *triton[name]["exec"]["command"][1:], *probed(server)]
        variables = {**environment.variables(), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "vismem answers\n", "")


def test_the_probe_asks_the_profile_s_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = "qwen2_5_vl_7b"
    name = resolve(profile).deploy.model_name
    with triton_server(make_repository(tmp_path, name), log=tmp_path / "log") as server:
        assert probe(probed(server)) == 1
        assert "serves neither 'vismem' nor" in capsys.readouterr().err
        assert probe([*probed(server), "--profile", profile]) == 0
        monkeypatch.setenv(PROFILE_VARIABLE, profile)  # as in a pod
        assert probe(probed(server)) == 0
    assert capsys.readouterr().out == f"{name} answers\n" * 2


def test_a_server_that_is_busy_with_others_is_not_taken_for_a_dead_one(
    server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thirty answers of a sixth of a second, two at a time: in a second some begin, and ours waits behind them."""
    with ThreadPoolExecutor(30) as clients:
        with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
            assert [next(first), next(second)] == [ANSWER[0]] * 2  # both workers are taken
            for _ in range(30):
                clients.submit(ask, server, "endless", max_new_tokens=8, timeout=120)
            while pending(server) < 29:  # the model holds one already
                time.sleep(0.01)
        assert probe([*probed(server), "--timeout", "1"]) == 0
        assert "vismem is busy: " in capsys.readouterr().out
    assert probe(probed(server)) == 0
    assert capsys.readouterr().out == "vismem answers\n"


def test_a_server_whose_workers_are_taken_by_long_answers_is_busy(
    server: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(endless(server)) as first, contextlib.closing(endless(server)) as second:  # type: ignore[type-var]
        assert [next(first), next(second)] == [ANSWER[0]] * 2
        assert probe([*probed(server), "--timeout", "1"]) == 0
    assert "tokens for others while we waited" in capsys.readouterr().out


def test_the_runtimes_counters_are_among_the_servers_metrics(server: TritonServer) -> None:
    end = time.monotonic() + 60
    while (before := shown(server)) != (time.sleep(1.2), shown(server))[1]:
        assert time.monotonic() < end  # what other tests left running still counts
    ask(server)
    for _ in range(2):
        with pytest.raises(UserError):
            ask(server, max_new_tokens=0)
    while (after := shown(server)) != {
        **before,
        "vismem_tokens_total": before["vismem_tokens_total"] + 3,
        "vismem_refused_total invalid": before["vismem_refused_total invalid"] + 2,
    }:
        assert time.monotonic() < end, (before, after)
        time.sleep(0.1)


def shown(server: TritonServer) -> dict[str, float]:
    """The runtime's series, each with its own label."""
    found = re.findall(r"^(vismem_\w+)\{(.*)\} (\S+)$", metrics(server), re.MULTILINE)
    assert all('model="vismem"' in labels and 'version="7"' in labels for _, labels, _ in found)
    own = [re.findall(r'(?:kind|reason|outcome|le)="(.*?)"', labels) for _, labels, _ in found]
    return {" ".join([name, *values]): float(count) for (name, _, count), values in zip(found, own, strict=True)}


def test_the_probe_says_that_no_server_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe(["--url", "127.0.0.1:9", "--metrics", "http://127.0.0.1:9/metrics"]) == 1
    assert "no model server answers at 127.0.0.1:9" in capsys.readouterr().err


def test_the_series_of_autoscaler_alerts_and_dashboard_are_those_of_the_server(server: TritonServer) -> None:
    ask(server)
    wanted = asked()
    assert len(wanted) > 8
    end = time.monotonic() + 10
    while missing := {name for name in wanted if f"\n{name}{{" not in metrics(server)}:
        assert time.monotonic() < end, missing
        time.sleep(0.1)
    for name in wanted & TRITON:
        assert re.search(rf'^{name}{{model="vismem",(reason="\w+",)?version="7"}} ', metrics(server), re.MULTILINE)
    named = {kind: shown(server)[f"vismem_evaluation_memories_per_answer {kind}"] for kind in ("short", "long")}
    assert named == {"short": 0.25, "long": 0}  # by its bundle

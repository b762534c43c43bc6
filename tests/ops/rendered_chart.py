"""The chart, rendered by helm, and questions to what comes out."""

import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/ferryman"
VALUE_SETS = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
RELEASE, NAMESPACE = "shop", "translation"


def value_file(name):
    return CHART / "ci" / f"{name}.yaml"


def template(helm, *arguments):
    """Run helm template; return its exit status, standard output and errors."""
    command = [helm, "template", RELEASE, CHART, "--namespace", NAMESPACE, *arguments]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


class Manifests:
    """The objects of one rendering."""

    def __init__(self, text):
        self.text = text
        self.objects = [each for each in yaml.safe_load_all(text) if each is not None]

    def all(self, kind):
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind, suffix=""):
        [found] = [each for each in self.all(kind) if each["metadata"]["name"].endswith(suffix)]
        return found

    def pods(self):
        """Return what every pod is made from: name, labels, annotations and spec."""
        templates = [(each["metadata"]["name"], each["spec"]["template"]) for each in self.all("Deployment")]
        alone = [(each["metadata"]["name"], each) for each in self.all("Pod")]
        return {name: {**each["metadata"], "spec": each["spec"]} for name, each in templates + alone}

    def servers(self):
        return {name: pod for name, pod in self.pods().items() if not name.endswith("-test")}

    def selected_by(self, match_labels):
        """Return the names of the pods that have all these labels."""
        return {name for name, pod in self.pods().items() if match_labels.items() <= pod["labels"].items()}


def main_container(pod):
    [container] = pod["spec"]["containers"]
    return container


def environment(container):
    """Return the variables of a container that are literal."""
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}


def config_file(manifests, pod):
    """Return the text that the pod's configuration file holds."""
    [volume] = [each for each in pod["spec"]["volumes"] if each["name"] == "config"]
    [item] = volume["configMap"]["items"]
    config_map = manifests.one("ConfigMap", volume["configMap"]["name"])
    return config_map["data"][item["key"]]

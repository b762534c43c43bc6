"""The chart, rendered by the real helm for every set of values in its ci/, and what must hold of all of them."""

import argparse
import os
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from ferryman_service.config import sources
from ferryman_service.config.service_config import Role
from ferryman_service.rpc.health import ALL_SERVICES, LIVENESS, TRAINING, TRANSLATION, WHOLE_SERVER
from tests.ops.rendered_chart import (
    CHART,
    NAMESPACE,
    RELEASE,
    ROOT,
    VALUE_SETS,
    Manifests,
    config_file,
    environment,
    main_container,
    template,
    value_file,
)

pytestmark = pytest.mark.ops

OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.30", "1.37"
# What no schema of Kubernetes itself describes: the fields that its own schemas require.
CUSTOM_KINDS = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): {"selector": dict, "endpoints": list},
    ("monitoring.coreos.com/v1", "PodMonitor"): {"selector": dict, "podMetricsEndpoints": list},
    ("monitoring.coreos.com/v1", "PrometheusRule"): {"groups": list},
    ("keda.sh/v1alpha1", "ScaledObject"): {"scaleTargetRef": dict, "triggers": list},
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): {"parentRefs": list, "rules": list},
}


@pytest.fixture(scope="session")
def helm(helm_and_kubectl):
    return helm_and_kubectl[0]


@pytest.fixture(scope="session")
def renderings(helm):
    """Every set of values, rendered."""
    found = {}
    for name in VALUE_SETS:
        code, text, errors = template(helm, "--values", value_file(name), "--kube-version", OLDEST_KUBERNETES)
        assert code == 0, errors
        found[name] = Manifests(text)
    return found


@pytest.fixture(params=VALUE_SETS)
def manifests(request, renderings):
    return renderings[request.param]


def test_there_are_at_least_five_sets_of_values():
    assert len(VALUE_SETS) >= 5


@pytest.mark.parametrize("name", VALUE_SETS)
def test_helm_has_nothing_to_say_against_it(helm, name):
    command = [str(helm), "lint", "--strict", str(CHART), "--values", str(value_file(name))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "[WARNING]" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWEST_KUBERNETES])
def test_kubernetes_takes_every_object(manifests, version):
    for each in manifests.objects:
        if (each["apiVersion"], each["kind"]) not in CUSTOM_KINDS:
            kubernetes_validate.validate(each, version, strict=True)


def test_objects_of_operators_have_what_those_require(manifests):
    for each in manifests.objects:
        required = CUSTOM_KINDS.get((each["apiVersion"], each["kind"]), {})
        for field, kind in required.items():
            assert isinstance(each["spec"][field], kind), f"{each['kind']}: {field}"
            assert each["spec"][field], f"{each['kind']}: {field} is empty"


def test_every_kind_of_operator_is_rendered_by_some_set(renderings):
    kinds = {(each["apiVersion"], each["kind"]) for one in renderings.values() for each in one.objects}
    assert set(CUSTOM_KINDS) <= kinds
    assert {"HorizontalPodAutoscaler", "PersistentVolumeClaim", "PodDisruptionBudget"} <= {kind for _, kind in kinds}


def test_names_are_unique_and_short_enough(manifests):
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests.objects]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for kind, name in names if kind == "Service")


def test_a_long_name_of_a_release_is_cut(helm):
    code, text, errors = template(helm, "--set", f"nameOverride={'n' * 60}")
    assert code == 0, errors
    assert max(len(each["metadata"]["name"]) for each in Manifests(text).objects) <= 63


def test_deployments_select_their_own_pods_and_no_others(manifests):
    for each in manifests.all("Deployment"):
        assert manifests.selected_by(each["spec"]["selector"]["matchLabels"]) == {each["metadata"]["name"]}


def test_services_lead_to_the_pods_that_do_the_work(manifests):
    roles = {name: roles_of(pod).split(",") for name, pod in manifests.servers().items()}
    for each in manifests.all("Service"):
        selected = manifests.selected_by(each["spec"]["selector"])
        suffix = each["metadata"]["name"].removeprefix(fullname(manifests)).removeprefix("-")
        wanted = {"control": ["training"], "metrics": ["training", "translation"]}.get(suffix, ["translation"])
        assert selected == {name for name, has in roles.items() if set(has) & set(wanted)}
        assert selected, f"{each['metadata']['name']} leads nowhere"
        for port in each["spec"]["ports"]:
            for name in selected:
                assert port["targetPort"] in {own["name"] for own in main_container(manifests.pods()[name])["ports"]}


def roles_of(pod):
    """From the environment, so that `config --show` in the pod tells them too."""
    return environment(main_container(pod))["FERRYMAN_ROLES"]


def fullname(manifests):
    """The prefix of all names: that of the ConfigMap, which has no suffix."""
    return min((each["metadata"]["name"] for each in manifests.all("ConfigMap")), key=len)


def test_the_headless_service_has_an_address_per_pod(manifests):
    assert manifests.one("Service", "-serving-headless")["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in manifests.one("Service", "-serving")["spec"]


def test_disruption_budgets_spread_and_autoscalers_mean_pods_that_are_there(manifests):
    deployments = {each["metadata"]["name"] for each in manifests.all("Deployment")}
    for each in manifests.all("PodDisruptionBudget"):
        assert len(manifests.selected_by(each["spec"]["selector"]["matchLabels"])) == 1
    for name, pod in manifests.servers().items():
        for constraint in pod["spec"].get("topologySpreadConstraints", []):
            assert manifests.selected_by(constraint["labelSelector"]["matchLabels"]) == {name}
    for each in manifests.all("HorizontalPodAutoscaler") + manifests.all("ScaledObject"):
        target = each["spec"]["scaleTargetRef"]["name"]
        assert target in deployments
        assert "replicas" not in manifests.one("Deployment", target)["spec"], "who else says how many"


def test_the_autoscaler_reads_a_metric_that_the_service_has(renderings):
    sources_text = "".join(path.read_text() for path in (ROOT / "service/ferryman_service/observability").glob("*.py"))
    [hpa] = [each for one in renderings.values() for each in one.all("HorizontalPodAutoscaler")]
    [scaled] = [each for one in renderings.values() for each in one.all("ScaledObject")]
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    for text in (hpa["spec"]["metrics"][0]["pods"]["metric"]["name"], query):
        [name] = re.findall(r"ferryman_\w+", text)
        assert name == "ferryman_translate_queue_tokens"
        assert name in sources_text
    assert f'namespace="{NAMESPACE}"' in query
    assert f'pod=~"{RELEASE}-ferryman-serving-.+"' in query


def test_probes_ask_the_probe_port_about_names_that_health_knows(manifests):
    ready = {"training": TRAINING, "translation": TRANSLATION, "training,translation": WHOLE_SERVER}
    for pod in manifests.servers().values():
        container = main_container(pod)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == ports["probe"]
            assert container[probe]["grpc"]["service"] in (*ALL_SERVICES, LIVENESS, WHOLE_SERVER)
        assert container["readinessProbe"]["grpc"]["service"] == ready[roles_of(pod)]
        assert container["livenessProbe"]["grpc"]["service"] == LIVENESS
        assert container["startupProbe"]["grpc"]["service"] == LIVENESS


def test_a_pod_gets_longer_to_end_than_its_process_takes(manifests):
    for pod in manifests.servers().values():
        container = main_container(pod)
        variables = environment(container)
        before_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        takes_s = before_s + float(variables["FERRYMAN_DRAIN_S"]) + float(variables["FERRYMAN_GRACE_S"])
        assert pod["spec"]["terminationGracePeriodSeconds"] > takes_s + 5, "the process allows itself 5 s more"


def test_the_service_understands_what_every_pod_tells_it(manifests, tmp_path):
    for pod in manifests.servers().values():
        settings = load_settings(manifests, pod, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in main_container(pod)["ports"]}
        config = settings.config
        assert not settings.warnings
        assert {"grpc": config.port, "probe": config.probe_port, "metrics": config.metrics_port} == ports
        assert str(config.data_dir) == "/data/own"
        assert config.host == config.probe_host == config.metrics_host


def load_settings(manifests, pod, folder):
    """Return what the service makes of a pod's command, variables and files."""
    container = main_container(pod)
    (folder / "ferryman.toml").write_text(config_file(manifests, pod))
    variables = environment(container)
    for name, value in variables.items():
        if name.endswith("_FILE"):
            (folder / Path(value).name).write_text("http://collector:4317\n")
            variables[name] = str(folder / Path(value).name)
    variables["FERRYMAN_CONFIG"] = str(folder / "ferryman.toml")
    parser = argparse.ArgumentParser()
    sources.add_arguments(parser)
    assert container["args"][0] == "serve"
    return sources.load(parser.parse_args(container["args"][1:]), variables)


def test_values_reach_the_service_the_own_before_the_common(renderings, tmp_path):
    manifests = renderings["production-cpu"]
    control = load_settings(manifests, manifests.pods()[f"{RELEASE}-ferryman-control"], tmp_path).config
    serving = load_settings(manifests, manifests.pods()[f"{RELEASE}-ferryman-serving"], tmp_path).config
    assert (control.roles, serving.roles) == ({Role.TRAINING}, {Role.TRANSLATION})
    assert control.max_connection_age_s == serving.max_connection_age_s == 600
    assert (control.max_corpus_bytes, control.max_queued_runs) == (17179869184, 20)
    assert (serving.compute_type, serving.translation_threads) == ("int8", 4)
    assert control.trace_endpoint == serving.trace_endpoint == "http://collector:4317"


def test_one_pod_does_everything_where_there_is_no_other(renderings, tmp_path):
    for name in ("minimal", "gpu-training"):
        [pod] = renderings[name].servers().values()
        assert load_settings(renderings[name], pod, tmp_path).config.roles == set(Role)


def test_secrets_are_read_from_files_and_stand_nowhere(renderings, manifests):
    assert not manifests.all("Secret")
    manifests = renderings["production-cpu"]
    assert "trace_endpoint" not in "".join(str(each["data"]) for each in manifests.all("ConfigMap"))
    for pod in manifests.servers().values():
        container = main_container(pod)
        path = Path(environment(container)["FERRYMAN_TRACE_ENDPOINT_FILE"])
        [mount] = [each for each in container["volumeMounts"] if each["mountPath"] == str(path.parent)]
        [volume] = [each for each in pod["spec"]["volumes"] if each["name"] == mount["name"]]
        assert mount["readOnly"]
        assert volume["projected"]["sources"] == [
            {"secret": {"name": "tracing", "items": [{"key": "endpoint", "path": path.name}]}}
        ]


def test_no_container_has_more_rights_than_it_needs(manifests):
    for pod in manifests.pods().values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert not container["image"].endswith(":latest")


def test_pods_run_as_the_user_of_the_image(manifests):
    [user, group] = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    for pod in manifests.pods().values():
        context = pod["spec"]["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (int(user), int(group), int(group))


def test_the_images_are_targets_of_the_dockerfile(renderings):
    targets = re.findall(r"^FROM runtime AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    pods = renderings["monitored"].servers()
    assert main_container(pods[f"{RELEASE}-ferryman-control"])["image"] == "ferryman:0.1.0-cpu"
    assert main_container(pods[f"{RELEASE}-ferryman-serving"])["image"] == "ferryman:0.1.0-serving-cpu"
    assert {"cpu", "serving-cpu", "cuda"} == set(targets)


def test_every_mount_has_its_volume(manifests):
    for pod in manifests.pods().values():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        containers = [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert mounted == volumes
        assert all("/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]] for container in containers)


def test_who_trains_has_shared_memory(manifests):
    for pod in manifests.servers().values():
        container = main_container(pod)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        if "training" in roles_of(pod):
            [volume] = [each for each in pod["spec"]["volumes"] if each["name"] == mounts["/dev/shm"]]
            assert volume["emptyDir"]["medium"] == "Memory"


def test_pods_that_share_a_claim_run_on_one_node_and_the_first_of_them_anywhere(manifests):
    sharing = {
        name: pod
        for name, pod in manifests.servers().items()
        if any("persistentVolumeClaim" in each and each["name"] == "data" for each in pod["spec"]["volumes"])
    }
    if len(sharing) < 2:
        return
    for name, pod in sharing.items():
        rules = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        nodes = [rule for rule in rules if rule["topologyKey"] == "kubernetes.io/hostname"]
        [rule] = nodes
        assert manifests.selected_by(rule["labelSelector"]["matchLabels"]) == set(sharing), name


def test_no_budget_holds_up_the_drain_of_a_node_that_pods_must_leave_together(manifests):
    """The successor of the first pod could only run where the others still are, and those would not be let go."""
    own_node = {
        name
        for name, pod in manifests.servers().items()
        for rule in required_affinity(pod)
        if rule["topologyKey"] == "kubernetes.io/hostname"
    }
    for budget in manifests.all("PodDisruptionBudget"):
        guarded = manifests.selected_by(budget["spec"]["selector"]["matchLabels"])
        replicas = manifests.one("Deployment", *guarded)["spec"].get("replicas")
        assert replicas == 1 or not guarded & own_node, f"{guarded} cannot be drained"


def required_affinity(pod):
    pods = pod["spec"].get("affinity", {}).get("podAffinity", {})
    return pods.get("requiredDuringSchedulingIgnoredDuringExecution", [])


def test_pods_that_go_to_one_node_agree_about_nodes(manifests):
    """Else the first of them may go where another must not: it waits for ever."""
    together = [pod["spec"] for pod in manifests.servers().values() if has_data_in_common(pod)]
    for spec in together:
        for field in ("nodeSelector", "tolerations"):
            assert spec.get(field) == together[0].get(field)
        assert required_nodes(spec) == required_nodes(together[0])


def has_data_in_common(pod):
    return pod["labels"].get("ferryman/data-folder") == "shared"


def required_nodes(spec):
    rules = spec.get("affinity", {}).get("nodeAffinity", {})
    return rules.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms")


def test_a_node_that_all_pods_share_has_what_each_component_asks_for(renderings):
    spec = renderings["one-gpu-node"].one("Deployment", "-serving")["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"pool": "gpu", "kubernetes.io/arch": "amd64"}
    assert [taint["key"] for taint in spec["tolerations"]] == ["nvidia.com/gpu"]
    keys = [[rule["key"] for rule in term["matchExpressions"]] for term in required_nodes(spec)]
    zone = "topology.kubernetes.io/zone"
    assert keys == [["nvidia.com/gpu.memory", zone], ["nvidia.com/gpu.product", zone]]
    apart = renderings["separate-serving"].servers().values()
    assert not any(required_nodes(pod["spec"]) for pod in apart)


def test_pods_on_nodes_of_their_own_have_a_budget(renderings):
    budget = renderings["separate-serving"].one("PodDisruptionBudget", "-serving")
    assert budget["spec"]["maxUnavailable"] == "25%"


def test_rules_of_ones_own_stay_beside_it(renderings):
    affinity = renderings["one-node-affinity"].one("Deployment", "-serving")["spec"]["template"]["spec"]["affinity"]
    keys = [rule["topologyKey"] for rule in affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]]
    assert keys == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert "podAntiAffinity" in affinity


def test_the_control_plane_is_replaced_and_the_others_are_rolled(renderings):
    manifests = renderings["monitored"]
    control, serving = (manifests.one("Deployment", suffix)["spec"] for suffix in ("-control", "-serving"))
    assert (control["replicas"], control["strategy"]) == (1, {"type": "Recreate"})
    assert serving["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_changed_option_replaces_the_pods_that_it_is_for(helm, renderings):
    def checksums(*arguments):
        code, text, errors = template(helm, *arguments)
        assert code == 0, errors
        return {name: pod["annotations"]["checksum/config"] for name, pod in Manifests(text).servers().items()}

    before, after = checksums(), checksums("--set", "serving.config.max_sentences=5")
    assert before[f"{RELEASE}-ferryman-control"] == after[f"{RELEASE}-ferryman-control"]
    assert before[f"{RELEASE}-ferryman-serving"] != after[f"{RELEASE}-ferryman-serving"]


def test_a_new_chart_alone_replaces_no_pod(manifests):
    for pod in manifests.servers().values():
        assert not pod["labels"].keys() & {"helm.sh/chart", "app.kubernetes.io/version"}


def test_the_network_lets_in_what_is_listed_and_nothing_else(manifests):
    policies = manifests.all("NetworkPolicy")
    if fullname(manifests) == f"{RELEASE}-ferryman" and not policies:
        return  # the one set that turns them off
    deny = manifests.one("NetworkPolicy", "-deny")["spec"]
    assert manifests.selected_by(deny["podSelector"]["matchLabels"]) == set(manifests.pods())
    assert (deny["policyTypes"], deny.keys() & {"ingress", "egress"}) == (["Ingress", "Egress"], set())
    allow = manifests.one("NetworkPolicy", "-allow")["spec"]
    assert manifests.selected_by(allow["podSelector"]["matchLabels"]) == set(manifests.servers())
    assert {port["port"] for rule in allow["ingress"] for port in rule["ports"]} == {"grpc", "metrics"}
    assert all(rule["from"] for rule in allow["ingress"]), "no rule is for everybody"


def test_only_one_set_is_without_network_policies(renderings):
    assert [name for name, one in renderings.items() if not one.all("NetworkPolicy")] == ["one-node-affinity"]


def test_the_pod_of_helm_test_may_go_where_it_must(renderings):
    manifests = renderings["production-cpu"]
    policy = manifests.one("NetworkPolicy", "-test")["spec"]
    [test_pod] = manifests.selected_by(policy["podSelector"]["matchLabels"])
    assert test_pod.endswith("-test")
    to_pods, to_names = policy["egress"]
    assert manifests.selected_by(to_pods["to"][0]["podSelector"]["matchLabels"]) == set(manifests.servers())
    assert to_pods["ports"] == [{"port": 50051, "protocol": "TCP"}]
    assert {port["port"] for port in to_names["ports"]} == {53}
    peers = [peer for rule in manifests.one("NetworkPolicy", "-allow")["spec"]["ingress"] for peer in rule["from"]]
    let_in = [peer["podSelector"]["matchLabels"] for peer in peers if "namespaceSelector" not in peer]
    assert any(test_pod in manifests.selected_by(labels) for labels in let_in)


def test_prometheus_finds_every_pod_once(manifests):
    found = []
    for monitor in manifests.all("ServiceMonitor"):
        for service in manifests.all("Service"):
            labels = monitor["spec"]["selector"]["matchLabels"]
            ports = {port["name"] for port in service["spec"]["ports"]}
            for endpoint in monitor["spec"]["endpoints"]:
                if labels.items() <= service["metadata"]["labels"].items() and endpoint["port"] in ports:
                    found += manifests.selected_by(service["spec"]["selector"])
    for monitor in manifests.all("PodMonitor"):
        found += manifests.selected_by(monitor["spec"]["selector"]["matchLabels"])
        assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    if manifests.all("ServiceMonitor") or manifests.all("PodMonitor"):
        assert sorted(found) == sorted(manifests.servers())


def test_all_pods_are_one_job_whose_name_the_alerts_know(renderings):
    [monitor] = renderings["monitored"].all("ServiceMonitor")
    [pod_monitor] = renderings["production-cpu"].all("PodMonitor")
    assert monitor["spec"]["jobLabel"] == pod_monitor["spec"]["jobLabel"] == "app.kubernetes.io/name"
    for endpoint in (*monitor["spec"]["endpoints"], *pod_monitor["spec"]["podMetricsEndpoints"]):
        assert endpoint["honorLabels"] is True, "else the alerts' label service would be a Service of Kubernetes"
    service = renderings["monitored"].one("Service", "-metrics")
    assert "ferryman" in service["metadata"]["labels"]["app.kubernetes.io/name"]


def test_the_rules_are_those_of_the_repository(renderings):
    [rule] = renderings["monitored"].all("PrometheusRule")
    files = sorted((ROOT / "deploy/prometheus").glob("*.yaml"))
    groups = [group for path in files for group in yaml.safe_load(path.read_text()).get("groups", [])]
    assert rule["spec"]["groups"] == groups


def test_the_dashboards_are_those_of_the_repository(renderings):
    maps = [each for each in renderings["monitored"].all("ConfigMap") if "dashboard" in each["metadata"]["name"]]
    files = {path.name: path.read_text().strip() for path in (ROOT / "deploy/grafana").rglob("*.json")}
    assert {name: text.strip() for each in maps for name, text in each["data"].items()} == files
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in maps)


def test_the_route_leads_every_call_to_a_service_that_answers_it(renderings):
    manifests = renderings["monitored"]
    services = {each["metadata"]["name"]: each for each in manifests.all("Service")}
    routed = {}
    for rule in manifests.one("GRPCRoute")["spec"]["rules"]:
        [backend] = rule["backendRefs"]
        [port] = services[backend["name"]]["spec"]["ports"]
        assert (port["port"], port["appProtocol"]) == (backend["port"], "kubernetes.io/h2c")
        routed |= {match["method"]["service"]: backend["name"] for match in rule["matches"]}
    assert set(routed) == set(ALL_SERVICES)
    assert [name for name, to in routed.items() if to.endswith("-serving")] == [TRANSLATION]


def test_gpus_are_asked_for_where_training_is(renderings):
    [pod] = renderings["gpu-training"].servers().values()
    resources = main_container(pod)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 2
    assert pod["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert pod["spec"]["runtimeClassName"] == "nvidia"
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in main_container(pod)["env"]


def test_the_claim_outlives_the_release(renderings):
    [claim] = renderings["production-cpu"].all("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert (claim["spec"]["storageClassName"], claim["spec"]["accessModes"]) == ("fast", ["ReadWriteOnce"])
    assert not renderings["gpu-training"].all("PersistentVolumeClaim"), "there is one already"


IMPORT = ("--set", "serving.models.source=import")
REFUSED_BY_THE_SCHEMA = {
    "a value that is not there": ("serving.replcas=2",),
    "an option that is not there": ("config.max_sentence=2",),
    "an option of the chart's own": ("config.port=1",),
    "an option out of range": ("serving.config.translation_threads=257",),
    "an option of another type": ("controlPlane.config.max_queued_runs=many",),
    "a word of no option": ("serving.config.compute_type=fp8",),
    "a secret for no option": ("configFromSecrets.password.name=a", "configFromSecrets.password.key=b"),
    "no replica": ("serving.replicas=0",),
    "a port of the system's": ("ports.grpc=80",),
    "a digest that is none": ("controlPlane.image.digest=latest",),
    "another way to scale": ("serving.autoscaling.kind=vpa",),
    "a claim for one pod alone": ("persistence.accessModes[0]=ReadWriteOncePod",),
    "an option by variable": ("serving.extraEnv[0].name=FERRYMAN_PORT", "serving.extraEnv[0].value=1"),
    "no time for the end": ("shutdown.marginSeconds=0",),
    "a path out of the volume": ("serving.models.import[0].path=../x", "serving.models.import[0].name=en-de"),
    "a name that no model may have": ("serving.models.import[0].path=x", "serving.models.import[0].name=EN"),
    "an amount that is none": ("serving.resources.limits.memory=much",),
}


@pytest.mark.parametrize("settings", REFUSED_BY_THE_SCHEMA.values(), ids=REFUSED_BY_THE_SCHEMA.keys())
def test_the_schema_refuses(helm, settings):
    code, _, errors = template(helm, *(part for setting in settings for part in ("--set", setting)))
    assert code != 0
    assert "don't meet the specifications of the schema" in errors


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("controlPlane.enabled=false,serving.enabled=false", "nothing to install"),
        ("controlPlane.enabled=false", "no controlPlane to share with"),
        ("persistence.enabled=false", "needs persistence.enabled"),
        ("controlPlane.nodeSelector.pool=gpu,serving.nodeSelector.pool=cpu", "the two nodeSelectors differ in pool"),
        ("serving.models.source=import", "needs serving.models.volume and serving.models.import"),
        ("serving.autoscaling.kind=keda", "needs serving.autoscaling.prometheusAddress"),
        ("serving.autoscaling.minReplicas=9", "above maxReplicas"),
        ("grpcRoute.enabled=true", "needs grpcRoute.parentRefs"),
        ("monitoring.serviceMonitor.enabled=true,monitoring.podMonitor.enabled=true", "counted twice"),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_reason(helm, settings, why):
    code, _, errors = template(helm, "--set", settings)
    assert code != 0
    assert why in errors


def test_the_notes_warn_of_what_is_given_up(helm, tmp_path):
    def notes(*arguments):
        command = [helm, "install", RELEASE, CHART, "--namespace", NAMESPACE, "--dry-run=client", *arguments]
        environ = {**os.environ, "KUBECONFIG": str(tmp_path / "none")}
        ended = subprocess.run([str(part) for part in command], env=environ, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.partition("NOTES:")[2]

    common = notes()
    assert "shop-ferryman-serving-headless:50051" in common
    assert "run on one node" in common
    assert "WARNING" not in common
    minimal = notes("--values", value_file("minimal"), "--set", "networkPolicy.enabled=false")
    assert minimal.count("WARNING") == 2

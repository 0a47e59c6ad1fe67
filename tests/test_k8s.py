"""The manifests of k8s/: valid by KubeRay's own schema, closed to the outside, in agreement with each other and the code."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jobs._overrides import check_overrides

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (K8S / "README.md").read_text()
Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


FILES = {path.relative_to(K8S).as_posix(): documents(path) for path in sorted(K8S.rglob("*.yaml"))}
OBJECTS = [found for name, found_in in FILES.items() if "kustomization" not in name for found in found_in]


def merged(base: Object, patch: Object) -> Object:
    """A patch of maps put on, as kustomize does it."""
    result = dict(base)
    for key, value in patch.items():
        result[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return result


def clusters() -> dict[str, Object]:
    """Specifications of clusters, by file: those of RayJobs, of the RayCluster, and that with Redis."""
    found = {}
    for name, objects in FILES.items():
        for one in objects:
            if one["kind"] == "RayJob":
                found[name] = one["spec"]["rayClusterSpec"]
            if one["kind"] == "RayCluster" and "headGroupSpec" in one["spec"]:
                found[name] = one["spec"]
    (patch,) = FILES["cluster-redis/fault-tolerance.yaml"]
    found["cluster-redis"] = merged(found["cluster/raycluster.yaml"], patch["spec"])
    return found


CLUSTERS = clusters()
JOBS = {name: one for name, objects in FILES.items() for one in objects if one["kind"] == "RayJob"}


def groups(cluster: Object) -> list[Object]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: Object) -> Object:
    (found,) = group["template"]["spec"]["containers"]
    return found


def mounts(group: Object) -> dict[str, str]:
    """``{path: claim}`` of the claims that a group's container sees."""
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in group["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    return {
        mount["mountPath"]: claims[mount["name"]] for mount in container(group)["volumeMounts"] if mount["name"] in claims
    }


# --- KubeRay's schema


def strict(schema: Any) -> Any:
    """The schema as the API server reads it, but with unknown keys refused; the server prunes them silently."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items() if not key.startswith("x-") and key != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
        result.pop("anyOf", None)
    if "properties" in schema and isinstance(schema["properties"], dict) and "type" in schema:
        result["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    return result


@functools.cache
def schema_of(kind: str) -> Object:
    folder = Path(os.environ.get("DISTSET_KUBERAY", ROOT.parent / "shared" / "kuberay"))
    path = folder / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.exists():
        pytest.skip(f"no schema of KubeRay at {path}: set DISTSET_KUBERAY to the folder of its CRDs")
    with gzip.open(path, "rt") as file:
        definition = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (found for found in definition["spec"]["versions"] if found["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    return strict(schema)


def within(schema: Object, path: str) -> Object:
    """What a schema says of ``spec.workerGroupSpecs[].template``."""
    for step in path.split("."):
        schema = schema["properties"][step.removesuffix("[]")]
        schema = schema["items"] if step.endswith("[]") else schema
    return schema


def refusals(value: Any, schema: Object) -> list[str]:
    errors = jsonschema.Draft7Validator(schema).iter_errors(value)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_valid(name):
    assert refusals(CLUSTERS[name], within(schema_of("RayCluster"), "spec")) == []


@pytest.mark.parametrize("name", JOBS)
def test_jobs_are_valid(name):
    assert refusals(JOBS[name], schema_of("RayJob")) == []


def test_the_rest_is_valid_by_what_kuberay_knows_of_pods_claims_and_policies():
    """A RayCluster's schema holds those of pod templates, claims and rules of network policies."""
    spec = within(schema_of("RayCluster"), "spec")
    pods = within(spec, "headGroupSpec.template")
    claim = within(pods, "spec.volumes[].ephemeral.volumeClaimTemplate.spec")
    rules = within(spec, "networkPolicy.head.ingressRules")
    seen = set()
    for one in OBJECTS:
        seen.add(one["kind"])
        if one["kind"] == "StatefulSet":
            assert refusals(one["spec"]["template"], pods) == []
            assert [refusals(each["spec"], claim) for each in one["spec"]["volumeClaimTemplates"]] == [[]]
        if one["kind"] == "PersistentVolumeClaim":
            assert refusals(one["spec"], claim) == []
        if one["kind"] == "NetworkPolicy":
            assert refusals(one["spec"]["ingress"], rules) == []
            assert set(one["spec"]) == {"podSelector", "policyTypes", "ingress"}
    assert seen == {
        *("Namespace", "NetworkPolicy", "PersistentVolumeClaim", "PodMonitor"),
        *("RayCluster", "RayJob", "Service", "StatefulSet"),
    }


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("spec.rayClusterSpec.authOption", {"mode": "token"}, "'authOption' was unexpected"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "'tokens' is not one of ['disabled', 'token']"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "8", "'8' is not of type 'integer'"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.container", [], "'container' was unexpected"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.groupName", None, "'groupName' is a required property"),
    ],
)
def test_a_broken_manifest_is_refused(place, value, message):
    job = copy.deepcopy(JOBS["jobs/train-cpu.yaml"])
    *way, last = place.split(".")
    inner: Any = job
    for step in way:
        inner = inner[int(step) if step.isdigit() else step]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (refusal,) = refusals(job, schema_of("RayJob"))
    assert message in refusal


# --- What must never be exposed


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_is_closed(name):
    cluster = CLUSTERS[name]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "distset-ray-token"}
    assert SpecifierSet(">=2.52").contains(cluster["rayVersion"])
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    for group in groups(cluster):
        pod, own = group["template"]["spec"], container(group)
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert not any("hostPort" in port for port in own["ports"])
        secure = own["securityContext"]
        assert secure["runAsNonRoot"]
        assert not secure["allowPrivilegeEscalation"]
        assert not any("RAY_AUTH" in variable["name"] for variable in own.get("env", []))  # no token in plain text
    assert all(group["template"]["spec"]["automountServiceAccountToken"] is False for group in cluster["workerGroupSpecs"])


def test_nothing_leads_in_from_outside():
    assert not [one["kind"] for one in OBJECTS if one["kind"] in ("Ingress", "Gateway", "HTTPRoute", "Secret")]
    assert all(one["spec"].get("type", "ClusterIP") == "ClusterIP" for one in OBJECTS if one["kind"] == "Service")


def test_policies_let_in_what_is_needed_and_nothing_else():
    policies = {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "NetworkPolicy"}
    for cluster in CLUSTERS.values():
        for group in groups(cluster):
            assert group["template"]["metadata"]["labels"]["app.kubernetes.io/part-of"] == "distset"
    own = {"app.kubernetes.io/part-of": "distset"}
    among = policies["distset-only-among-themselves"]
    assert among["podSelector"] == {"matchLabels": own}
    assert among["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]
    ports = {
        name: [port["port"] for rule in spec["ingress"] for port in rule.get("ports", [])] for name, spec in policies.items()
    }
    assert ports == {
        "distset-only-among-themselves": [],
        "distset-operator-to-head": [8265],
        "distset-prometheus-to-metrics": [8080],
        "distset-head-to-redis": [6379],
    }
    (peer,) = policies["distset-head-to-redis"]["ingress"][0]["from"]
    assert peer["podSelector"]["matchLabels"] == own
    (who,) = peer["podSelector"]["matchExpressions"]
    # KubeRay clears Redis by a job whose pod is the head's but for its type; the cluster is not gone before it is done.
    assert who == {"key": "ray.io/node-type", "operator": "In", "values": ["head", "redis-cleanup"]}
    for name, spec in policies.items():
        assert spec["policyTypes"] == ["Ingress"]
        for rule in spec["ingress"]:
            assert all(peer.keys() and "ipBlock" not in peer for peer in rule["from"]), name
            assert all(peer.get("namespaceSelector") != {} for peer in rule["from"]), name


# --- Names, versions, ports


def test_names_and_namespaces_agree():
    for one in OBJECTS:
        wanted = "monitoring" if one["kind"] == "PodMonitor" else None if one["kind"] == "Namespace" else "distset"
        assert one["metadata"].get("namespace") == wanted
    for name, (kustomization, *_) in ((name, found) for name, found in FILES.items() if "kustomization" in name):
        here = K8S / Path(name).parent
        for resource in [*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))]:
            assert (here / resource).exists(), resource
    (patch,) = FILES["cluster-redis/fault-tolerance.yaml"]
    assert patch["metadata"]["name"] == FILES["cluster/raycluster.yaml"][0]["metadata"]["name"]
    service = next(one for one in FILES["cluster-redis/redis.yaml"] if one["kind"] == "Service")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert CLUSTERS["cluster-redis"]["gcsFaultToleranceOptions"]["redisAddress"] == address


def test_claims_are_those_that_are_made():
    claims = {one["metadata"]["name"] for one in OBJECTS if one["kind"] == "PersistentVolumeClaim"}
    used = {claim for cluster in CLUSTERS.values() for group in groups(cluster) for claim in mounts(group).values()}
    assert used == claims
    for cluster in CLUSTERS.values():
        for group in groups(cluster):
            volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
            assert {mount["name"] for mount in container(group)["volumeMounts"]} == volumes


def secrets(value: Any) -> Iterator[tuple[str, str | None]]:
    """Name and key of every secret that a manifest reads."""
    if isinstance(value, list):
        for part in value:
            yield from secrets(part)
    if isinstance(value, dict):
        if "secretName" in value:
            yield value["secretName"], "auth_token"  # the key that KubeRay reads
        for key, part in value.items():
            if key in ("secretRef", "secretKeyRef"):
                yield part["name"], part.get("key")
            yield from secrets(part)


def test_the_readme_makes_every_secret_that_is_read():
    made = {
        name: set(re.findall(r"--from-literal=(\w+)=", rest))
        for name, rest in re.findall(r"create secret generic (\S+)((?:.|\\\n)*?)(?:\n[^ ]|$)", README)
    }
    read = set(secrets([*OBJECTS]))
    assert {name for name, _ in read} == set(made)
    assert all(key in made[name] for name, key in read if key is not None)


def test_versions_are_those_of_the_project():
    pins = dict(re.findall(r"^([\w-]+)([=<>~].*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    dockerfile = (K8S / "Dockerfile").read_text()
    ray, python = re.search(r"^FROM rayproject/ray:([\d.]+)-py3(\d+)-cpu$", dockerfile, re.MULTILINE).groups()
    assert SpecifierSet(pins["ray"]).contains(ray)
    wanted = next(Requirement(found) for found in PROJECT["optional-dependencies"]["jobs"] if found.startswith("ray["))
    assert wanted.specifier.contains(ray)
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"3.{python}")
    tag = f"registry.example.com/distset:{PROJECT['version']}-ray{ray}"
    for name, cluster in CLUSTERS.items():
        (image,) = {container(group)["image"] for group in groups(cluster)}
        assert image in (f"{tag}-cpu", f"{tag}-gpu"), name
        assert f"-t {image}" in dockerfile
        assert cluster["rayVersion"] == ray
        gpus = any("nvidia.com/gpu" in container(group)["resources"]["limits"] for group in groups(cluster))
        assert image.endswith("-gpu") == gpus
    for source in re.findall(r"^COPY \S+ (.+) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split()), source
    kept = (K8S / "Dockerfile.dockerignore").read_text()
    assert {line[1:] for line in kept.splitlines() if line.startswith("!")} == set(
        " ".join(re.findall(r"^COPY \S+ (.+) \S+$", dockerfile, re.MULTILINE)).split()
    )


def test_ports_agree():
    head = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
    (monitor,) = (one for one in OBJECTS if one["kind"] == "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for cluster in CLUSTERS.values():
        first, *rest = groups(cluster)
        assert {port["name"]: port["containerPort"] for port in container(first)["ports"]} == head
        for group in (first, *rest):
            ports = {port["name"]: port["containerPort"] for port in container(group)["ports"]}
            assert int(group["rayStartParams"]["metrics-export-port"]) == ports[endpoint["port"]]
            assert group["template"]["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
    policy = next(one for one in OBJECTS if one["metadata"]["name"] == "distset-prometheus-to-metrics")
    space = policy["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert space == monitor["metadata"]["namespace"]


def test_the_dashboard_asks_for_metrics_that_there_are():
    metrics = (ROOT / "distset" / "cluster" / "metrics.py").read_text()
    told = set(re.findall(r"``(ray_distset_\w+)``", metrics))
    dashboard = json.loads((K8S / "monitoring" / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert asked
    assert all(set(re.findall(r"ray_distset_\w+", expression)) <= told for expression in asked)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) - {"__rate_interval"}
    assert used == variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


# --- What the jobs run


def composed(entrypoint: str) -> Object:
    python, flag, module, *overrides = shlex.split(entrypoint)
    package, job = module.split(".")
    assert (python, flag, package) == ("python", "-m", "jobs")
    assert (ROOT / "jobs" / f"{job}.py").is_file()
    check_overrides(job, overrides)
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(compose(job, overrides=overrides), resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("name", JOBS)
def test_the_entry_point_runs_and_finds_its_files(name):
    config, spec = composed(JOBS[name]["spec"]["entrypoint"]), JOBS[name]["spec"]["rayClusterSpec"]
    head, *workers = groups(spec)
    assert config["run"]["bar"] is False
    for group in (head, *workers):
        assert any(Path(config["data"]["path"]).is_relative_to(path) for path in mounts(group))
    written = {mount["mountPath"] for mount in container(head)["volumeMounts"] if not mount.get("readOnly")}
    assert any(Path(config["run"]["dir"]).is_relative_to(path) for path in written)
    storage = config["cluster"]["storage"]
    if storage is None:  # then checkpoints go to the run folder, which every worker has to see
        for group in workers:
            own = {mount["mountPath"] for mount in container(group)["volumeMounts"] if not mount.get("readOnly")}
            assert any(Path(config["run"]["dir"]).is_relative_to(path) for path in own)
            assert mounts(group)["/shared"] == mounts(head)["/shared"]
    else:
        assert storage.startswith("s3://")
        assert all("envFrom" in container(group) for group in (head, *workers))


@pytest.mark.parametrize("name", JOBS)
def test_the_cluster_can_grow_to_what_the_job_asks_for(name):
    cluster, spec = composed(JOBS[name]["spec"]["entrypoint"])["cluster"], JOBS[name]["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    room = 0
    for group in spec["workerGroupSpecs"]:
        limits = container(group)["resources"]["limits"]
        fits = int(limits["cpu"]) // cluster["cpus"]
        if cluster["gpu"]:
            fits = min(fits, int(limits.get("nvidia.com/gpu", 0)))
        room += fits * group["maxReplicas"]
    assert room >= cluster["workers"]
    assert places_for_actors(cluster, spec) >= cluster["workers"] * cluster["actors"]
    assert cluster["wait_seconds"] >= 600  # nodes take minutes to come
    assert JOBS[name]["spec"]["submissionMode"] == "SidecarMode"
    assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in groups(spec))


def places_for_actors(cluster: Object, spec: Object) -> int:
    """In groups that have the resources an actor asks for by name, and no GPUs, which are the workers'."""
    wanted, places = cluster["actor_resources"] or {}, 0
    for group in spec["workerGroupSpecs"]:
        own = json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))  # quoted for the shell
        limits = container(group)["resources"]["limits"]
        if own.keys() == wanted.keys() and "nvidia.com/gpu" not in limits:
            fits = [own[name] // amount for name, amount in wanted.items()]
            places += group["maxReplicas"] * min([int(limits["cpu"]) // cluster["actor_cpus"], *fits])
    return places


def test_the_image_has_what_slides_need():
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", (K8S / "Dockerfile").read_text(), re.MULTILINE)
    assert {"jobs", "slides"} <= set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert '".[${EXTRAS}]"' in (K8S / "Dockerfile").read_text()


def test_the_readme_names_every_file_and_no_other():
    for path in set(re.findall(r"k8s/[\w./-]+", README)):
        assert (ROOT / path.rstrip(".")).exists(), path
    for name in FILES:
        folder = Path(name).parent
        whole = (K8S / folder / "kustomization.yaml").exists() and f"k8s/{folder}" in README
        assert whole or f"k8s/{name}" in README, name
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (K8S / link).exists(), link


def commands() -> list[str]:
    text = README + (ROOT / "docs" / "cluster.md").read_text()
    return [found.strip() for found in re.findall(r"python (-m jobs\.\w+ [^\n`]*)", text)]


@pytest.mark.parametrize("command", commands())
def test_documented_commands_compose(command):
    composed(f"python {command}")

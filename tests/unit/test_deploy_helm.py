"""The chart, rendered by helm: each documented value does something, and the schema refuses what is wrong."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from lenvm import __version__
from lenvm_service.keys import KeyRing
from lenvm_service.settings import Settings, load_settings
from tests.support.deploy_tools import find_tool, tool_folder

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "lenvm"
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
KEY = "lenvm-key-of-the-probe"
SHA256 = hashlib.sha256(KEY.encode()).hexdigest()
# Values of their own, or fixed by the image; images come without the playground's extra.
ELSEWHERE = {"host", "port", "model", "secret", "api_keys", "redis_url", "ui"}
# Everything on, so that no value is without effect.
FULL: dict[str, Any] = {
    "secrets": {
        "secret": "fedcba9876543210",
        "redisUrl": "redis://redis:6379/0",
        "apiKeysFile": f'[[key]]\nid = "probe"\ntenant = "ops"\nsha256 = "{SHA256}"\n',
        "probeKey": KEY,
    },
    "apiKeys": {"enabled": True},
    "gpu": {"count": 2},
    "checkpoints": {"existingClaim": "checkpoints"},
    **{name: {"enabled": True} for name in ("autoscaling", "serviceMonitor", "prometheusRule", "grafanaDashboard")},
}
# Values that another one overrules in FULL.
BESIDE: dict[str, dict[str, Any]] = {
    "replicaCount": {"autoscaling": {"enabled": False}},
    "rollout.maxSurge": {"rollout": {"maxUnavailable": 1}},
}


class ChartError(Exception):
    """What helm says."""


class Helm:
    def __init__(self, binary: str, folder: Path) -> None:
        self.binary, self.folder = binary, folder
        self._cached = functools.cache(self._render)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Kind -> resource."""
        found = [resource for resource in yaml.load_all(self.text(values), yaml.CSafeLoader) if resource]
        assert len({resource["kind"] for resource in found}) == len(found)
        return {resource["kind"]: resource for resource in found}

    def text(self, values: Mapping[str, Any]) -> str:
        """As ``helm template`` writes it. Raises ChartError."""
        return self._cached(json.dumps(values))

    def _render(self, values: str) -> str:
        path = self.folder / "values.json"
        path.write_text(values)
        command = [self.binary, "template", "here", str(CHART), "--namespace", "serving", "-f", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise ChartError(done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def helm(real_parts_required: bool, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(find_tool("helm", required=real_parts_required), tmp_path_factory.mktemp("values"))


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            old = result.get(name)
            result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return copy.deepcopy(result)


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    found: dict[str, Any] = value
    return found


def leaves(schema: Mapping[str, Any] = SCHEMA, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, inner in schema["properties"].items():
        where = f"{path}.{name}".lstrip(".")
        if "properties" in inner:
            yield from leaves(inner, where)
        elif where != "global":
            yield where, inner


LEAVES = dict(leaves())


def pod(resources: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = resources["Deployment"]["spec"]["template"]["spec"]
    return found


def variables(resources: Mapping[str, Any]) -> dict[str, str]:
    """The container's environment, Secrets of the chart looked up; optional ones that are missing are left out."""
    (container,) = pod(resources)["containers"]
    data = resources.get("Secret", {}).get("data", {})
    found = {}
    for entry in container["env"]:
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        elif (reference := entry["valueFrom"]["secretKeyRef"])["key"] in data:
            assert reference["name"] == resources["Secret"]["metadata"]["name"]
            found[entry["name"]] = base64.b64decode(data[reference["key"]]).decode()
        else:
            assert reference["optional"]
    return found


# -- values and schema -------------------------------------------------------------------------------------------------


def test_the_schema_knows_every_value_and_describes_it() -> None:
    def check(values: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> None:
        assert schema["additionalProperties"] is False
        assert set(values) <= set(schema["properties"]), path
        for name, inner in schema["properties"].items():
            if "properties" in inner:
                check(values[name], inner, f"{path}.{name}")
            elif not path.startswith(".settings"):  # there, what is not named keeps the service's default
                assert name in values or name == "global", f"{path}.{name}"

    check(DEFAULTS, SCHEMA, "")
    assert all(inner["description"] and len(inner["examples"]) == 1 for inner in LEAVES.values())


def test_settings_of_the_chart_are_those_of_the_service() -> None:
    known = SCHEMA["properties"]["settings"]["properties"]
    fields = Settings.model_json_schema()["properties"]
    assert set(known) == set(fields) - ELSEWHERE
    for name, inner in known.items():
        kinds = fields[name].get("anyOf", [fields[name]])
        (kind,) = [kind for kind in kinds if kind.get("type") != "null"]
        for limit in ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            assert inner.get(limit) == kind.get(limit), (name, limit)


@pytest.mark.parametrize("path", LEAVES)
def test_every_documented_value_renders_and_does_something(path: str, helm: Helm) -> None:
    base = merged(FULL, BESIDE.get(path, {}))
    (example,) = LEAVES[path]["examples"]
    assert helm.text(merged(base, nested(path, example))) != helm.text(base)


@pytest.mark.parametrize("path", LEAVES)
def test_the_schema_refuses_another_type(path: str) -> None:
    validator = jsonschema_rs.Draft7Validator(SCHEMA)
    assert validator.is_valid(DEFAULTS)
    wrong: Any = 7 if LEAVES[path].get("type") in ("object", "array") else {"not": "this"}
    assert not validator.is_valid(merged(DEFAULTS, nested(path, wrong)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"replicas": 3}, "replicas"),
        ({"settings": {"drain_timeout": 30}}, "drain_timeout"),
        ({"settings": {"dtype": "fp8"}}, "/settings/dtype"),
        ({"settings": {"redis_lookup_ms": 0}}, "/settings/redis_lookup_ms"),
        ({"settings": {"secret": "0123456789abcdef"}}, "secret"),
        ({"secrets": {"secret": "short"}}, "/secrets/secret"),
        ({"secrets": {"redisUrl": "http://redis"}}, "/secrets/redisUrl"),
        ({"models": []}, "/models"),
        ({"service": {"port": 70000}}, "/service/port"),
        ({"autoscaling": {"minReplicas": 0}}, "/autoscaling/minReplicas"),
        ({"podDisruptionBudget": {"maxUnavailable": "some"}}, "/podDisruptionBudget/maxUnavailable"),
        ({"apiKeys": {"enabled": True}}, "apiKeys.enabled needs"),
        ({"rollout": {"maxSurge": 0}}, "no pod could ever be replaced"),
    ],
)
def test_helm_refuses_a_wrong_value(wrong: dict[str, Any], said: str, helm: Helm) -> None:
    with pytest.raises(ChartError, match=re.escape(said)):
        helm(wrong)


# -- what is rendered --------------------------------------------------------------------------------------------------


def test_kubernetes_accepts_what_is_rendered(helm: Helm, real_parts_required: bool) -> None:
    folder = tool_folder("kubernetes", required=real_parts_required)
    registry = {f"/api/{path.name}": json.loads(path.read_bytes()) for path in folder.glob("_definitions.json")}
    own_kinds = {"ServiceMonitor", "PrometheusRule"}  # the Prometheus operator's: their schemas are in no package
    seen = set()
    for values in ({}, FULL):
        for kind, resource in helm(values).items():
            assert resource["metadata"]["name"].startswith("here-lenvm")
            if kind in own_kinds:
                continue
            group = resource["apiVersion"].split("/")
            name = f"{kind.lower()}-{group[0].split('.')[0] + '-' if len(group) == 2 else ''}{group[-1]}.json"
            schema = json.loads((folder / name).read_bytes())
            validator = jsonschema_rs.validator_for(
                schema, base_uri="json-schema:///api/", retriever=lambda uri: registry[uri[uri.index("/api/") :]]
            )
            assert [str(error) for error in validator.iter_errors(resource)] == []
            assert not validator.is_valid({**resource, "unknown": 1})
            seen.add(kind)
    assert seen == {
        *("ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Secret"),
        "Service",
    }


def test_the_service_takes_the_settings_as_they_were_meant(
    helm: Helm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    examples = {
        path.split(".")[1]: leaf["examples"][0] for path, leaf in LEAVES.items() if path.startswith("settings.")
    }
    resources = helm(merged(FULL, {"settings": examples, "models": ["a=one", "two"]}))
    found = variables(resources)
    assert found["LENVM_MAX_BODY_BYTES"].isdigit()  # Helm's own writing is 4.194304e+06
    for name, value in found.items():
        if name != "LENVM_PROBE_KEY":
            assert name.removeprefix("LENVM_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert {name: getattr(settings, name) for name in examples} == examples
    assert settings.model == ["a=one", "two"]
    assert settings.port == 8000
    assert settings.secret is not None
    assert settings.secret.get_secret_value() == FULL["secrets"]["secret"]
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == FULL["secrets"]["redisUrl"]
    # The file of keys, and that the probe's is one of them.
    spec = pod(resources)
    (keys,) = [volume["secret"] for volume in spec["volumes"] if volume["name"] == "keys"]
    (mount,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "keys"]
    assert str(settings.api_keys) == f"{mount['mountPath']}/{keys['items'][0]['path']}"
    file = tmp_path / "keys.toml"
    file.write_bytes(base64.b64decode(resources["Secret"]["data"][keys["items"][0]["key"]]))
    assert KeyRing(file).check([(b"authorization", f"Bearer {found['LENVM_PROBE_KEY']}".encode())]).id == "probe"


def test_nothing_secret_is_outside_the_secret(helm: Helm) -> None:
    resources = helm(FULL)
    del resources["Secret"]
    text = json.dumps(resources)
    for secret in FULL["secrets"].values():
        assert secret not in text
        assert base64.b64encode(secret.encode()).decode() not in text
    existing = helm(merged(FULL, {"secrets": {"existing": "mine"}}))
    assert "Secret" not in existing
    references = re.findall(r'"secretKeyRef": {[^}]*"name": "([^"]*)"', json.dumps(existing))
    assert references
    assert set(references) == {"mine"}


@pytest.mark.parametrize(("grace", "timeout"), [(0, 0.5), (2, 30), (45, 30), (1, 119.5)])
def test_a_pod_has_the_time_to_drain(grace: float, timeout: float, helm: Helm) -> None:
    values = {"settings": {"drain_grace_s": grace, "drain_timeout_s": timeout}, "preStopSeconds": 7}
    spec = pod(helm(values))
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert spec["terminationGracePeriodSeconds"] >= 7 + max(grace, timeout) + 5


def test_probes(helm: Helm) -> None:
    for values, exec_probe in (({}, False), (FULL, True)):
        (container,) = pod(helm(values))["containers"]
        for name in ("startupProbe", "livenessProbe"):
            assert container[name]["httpGet"] == {"path": "/health/live", "port": "http"}
        ready = container["readinessProbe"]
        if exec_probe:
            assert ready["exec"]["command"] == ["lenvm-probe", "/health/ready"]
            assert "LENVM_PROBE_KEY" in {entry["name"] for entry in container["env"]}
        else:
            assert ready["httpGet"] == {"path": "/health/ready", "port": "http"}
    assert "/usr/local/bin/lenvm-probe" in (ROOT / "Dockerfile").read_text()


def test_a_service_of_the_same_name_does_not_set_the_port(helm: Helm) -> None:
    spec = pod(helm({"fullnameOverride": "lenvm"}))
    assert spec["enableServiceLinks"] is False
    assert {"name": "LENVM_PORT", "value": "8000"} in spec["containers"][0]["env"]


def test_gpus(helm: Helm) -> None:
    with_gpu = helm({"gpu": {"count": 1}, "resources": {"limits": {"memory": "8Gi"}}})
    (container,) = pod(with_gpu)["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    assert variables(with_gpu)["LENVM_DEVICE"] == "cuda"
    assert variables(helm({"gpu": {"count": 1}, "settings": {"device": "cuda:0"}}))["LENVM_DEVICE"] == "cuda:0"
    assert "LENVM_DEVICE" not in variables(helm({}))


def test_who_may_talk_to_whom(helm: Helm) -> None:
    resources = helm({})
    policy = resources["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == resources["Deployment"]["spec"]["selector"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ports = [port["port"] for rule in policy["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 443]
    offline = helm({"cache": {"pull": [], "existingClaim": "cache"}, "secrets": {"existing": "mine"}})
    ports = [port["port"] for rule in offline["NetworkPolicy"]["spec"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 6379]
    assert "initContainers" not in pod(offline)


def test_monitoring_is_what_compose_has(helm: Helm) -> None:
    resources = helm(FULL)
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    assert resources["PrometheusRule"]["spec"] == rules
    dashboard = json.loads((ROOT / "deploy/grafana/lenvm.json").read_text())
    assert json.loads(resources["ConfigMap"]["data"]["lenvm.json"]) == dashboard
    (endpoint,) = resources["ServiceMonitor"]["spec"]["endpoints"]
    secret = resources["Secret"]
    assert endpoint["authorization"]["credentials"] == {"name": secret["metadata"]["name"], "key": "probe-key"}
    assert base64.b64decode(secret["data"]["probe-key"]).decode() == KEY
    # The autoscaler, the adapter and the service speak of one metric.
    adapter = yaml.safe_load((ROOT / "deploy/prometheus/adapter.yaml").read_text())["rules"]["custom"][0]
    (metric,) = resources["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == adapter["name"]["as"] == "lenvm_queue_tokens"
    assert adapter["seriesQuery"].startswith("lenvm_queue_tokens{")
    assert "replicas" not in resources["Deployment"]["spec"]


def test_the_chart_is_of_this_release() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("http://collector:4318", 4318), ("http://10.0.0.7", 80), ("https://traces.example.com/otlp", 443)],
)
def test_the_network_policy_lets_traces_out(endpoint: str, port: int, helm: Helm) -> None:
    def ports(values: Mapping[str, Any]) -> list[int]:
        egress = helm(values)["NetworkPolicy"]["spec"]["egress"]
        return [one["port"] for rule in egress for one in rule["ports"]]

    assert sorted(ports(merged(FULL, nested("settings.otel_endpoint", endpoint)))) == sorted([*ports(FULL), port])

"""What is in deploy/: objects that Kubernetes takes, what the agent takes of it, a unit that systemd takes."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest

from exporter import web_config
from exporter.cli import main
from exporter.config import Config, load, parse
from probes.errors import ConfigError, HostError
from tests import kustomize
from tests.certificates import authority, issue

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FOLDERS = ("base", "overlays/gpu", "overlays/tls")
GUIDE = (ROOT / "docs/deployment.md").read_text()
ENDPOINT_KEYS = {"port", "path", "interval", "scrapeTimeout", "scheme", "tlsConfig", "relabelings"}

Object = dict[str, Any]


@pytest.fixture(params=FOLDERS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return kustomize.render(DEPLOY / request.param)


def of_kind(objects: list[Object], kind: str) -> Object:
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def config_map(objects: list[Object], name: str) -> dict[str, str]:
    (found,) = (each for each in objects if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name)
    data: dict[str, str] = found["data"]
    return data


def pod(objects: list[Object]) -> Object:
    spec: Object = of_kind(objects, "DaemonSet")["spec"]["template"]["spec"]
    return spec


def container(objects: list[Object]) -> Object:
    (only,) = pod(objects)["containers"]
    assert isinstance(only, dict)
    return only


def volume(objects: list[Object], folder: str | None) -> Object:
    """The volume that is mounted there."""
    (name,) = (mount["name"] for mount in container(objects)["volumeMounts"] if mount["mountPath"] == folder)
    (found,) = (each for each in pod(objects)["volumes"] if each["name"] == name)
    assert isinstance(found, dict)
    return found


def configuration(objects: list[Object]) -> Config:
    return parse(config_map(objects, "footlight")["footlight.yaml"])


def validate(each: Object) -> None:
    kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)


# ---- Kubernetes ----


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_kustomization_names_every_file_of_its_folder(folder: str) -> None:
    named = set(kustomize.files(kustomize.read(DEPLOY / folder))) - {"../../base"}
    assert named == {path.name for path in (DEPLOY / folder).iterdir()} - {"kustomization.yaml"}


def test_every_folder_is_looked_at() -> None:
    assert {str(path.parent.relative_to(DEPLOY)) for path in DEPLOY.rglob("kustomization.yaml")} == set(FOLDERS)


def test_kubernetes_takes_every_object(objects: list[Object]) -> None:
    kinds = []
    for each in objects:
        if each["apiVersion"] != "monitoring.coreos.com/v1":
            validate(each)
            kinds.append(each["kind"])
    assert {"Namespace", "ServiceAccount", "ConfigMap", "DaemonSet"} == set(kinds)


def test_a_slip_of_the_pen_would_be_found(objects: list[Object]) -> None:
    daemon_set = copy.deepcopy(of_kind(objects, "DaemonSet"))
    daemon_set["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(daemon_set)


def test_all_are_in_one_namespace_with_one_label(objects: list[Object]) -> None:
    label = {"app.kubernetes.io/name": "footlight"}
    for each in objects:
        metadata = each["metadata"]
        assert label.items() <= metadata["labels"].items()
        assert metadata["name" if each["kind"] == "Namespace" else "namespace"] == "footlight"
    daemon_set = of_kind(objects, "DaemonSet")["spec"]
    assert daemon_set["selector"]["matchLabels"] == label
    assert label.items() <= daemon_set["template"]["metadata"]["labels"].items()
    assert of_kind(objects, "PodMonitor")["spec"]["selector"]["matchLabels"] == label


def test_the_pod_has_what_it_needs_and_no_token(objects: list[Object]) -> None:
    spec, only = pod(objects), container(objects)
    assert (spec["hostPID"], spec["hostNetwork"], spec["automountServiceAccountToken"]) == (True, False, False)
    assert of_kind(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] == of_kind(objects, "ServiceAccount")["metadata"]["name"]
    assert only["securityContext"]["privileged"] is only["securityContext"]["readOnlyRootFilesystem"] is True
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert volumes == {mount["name"] for mount in only["volumeMounts"]}
    writable = {mount["mountPath"] for mount in only["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/var/lib/footlight/recordings", "/var/lib/footlight/health"}
    for volume in spec["volumes"]:
        if "configMap" in volume:
            config_map(objects, volume["configMap"]["name"])


def test_the_agent_takes_its_arguments(objects: list[Object]) -> None:
    context = click.Context(main)
    command, *arguments = container(objects)["args"]
    found = main.get_command(context, command)  # type: ignore[attr-defined]
    options = found.make_context(command, list(arguments)).params
    mounts = {mount["mountPath"]: mount["name"] for mount in container(objects)["volumeMounts"]}
    assert mounts[str(options["config"].parent)] == "config"
    assert options["config"].name in config_map(objects, "footlight")


def test_the_agent_takes_its_configuration(objects: list[Object]) -> None:
    config = configuration(objects)
    (port,) = container(objects)["ports"]
    assert (config.listen.host, config.listen.port) == ("0.0.0.0", port["containerPort"])
    limit = container(objects)["resources"]["limits"]["memory"]
    assert config.limits.memory * 2 <= int(limit.removesuffix("Mi")) << 20
    recordings = volume(objects, config.recorder.folder)["emptyDir"]["sizeLimit"]
    assert config.recorder.size < int(recordings.removesuffix("Mi")) << 20


def test_what_is_normal_outlives_the_pod(objects: list[Object]) -> None:
    folder = configuration(objects).health.folder
    assert volume(objects, folder)["hostPath"] == {"path": folder, "type": "DirectoryOrCreate"}
    writable = {mount["mountPath"] for mount in container(objects)["volumeMounts"] if not mount.get("readOnly")}
    assert [path for path in writable if "hostPath" in volume(objects, path)] == [folder]


def test_prometheus_asks_the_port_that_is_there(objects: list[Object]) -> None:
    (endpoint,) = of_kind(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint.keys() <= ENDPOINT_KEYS
    (port,) = container(objects)["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")


def test_the_overlay_for_gpus_differs_in_what_it_says() -> None:
    base, gpu = (load(DEPLOY / folder / "footlight.yaml") for folder in ("base", "overlays/gpu"))
    assert (base.probes.gpu, gpu.probes.gpu) == ("auto", "on")
    lines = [(DEPLOY / folder / "footlight.yaml").read_text().splitlines() for folder in ("base", "overlays/gpu")]
    assert sum(one != other for one, other in zip(*lines, strict=True)) == 2  # the switch, and the comment
    assert pod(kustomize.render(DEPLOY / "overlays/gpu"))["nodeSelector"] == {
        "kubernetes.io/os": "linux",
        "nvidia.com/gpu.present": "true",
    }


def test_the_overlay_for_tls_protects_the_port(tmp_path: Path) -> None:
    objects = kustomize.render(DEPLOY / "overlays/tls")
    only = container(objects)
    # as cert-manager names them
    ours = authority(tmp_path, "ca")
    server = issue(ours, tmp_path, "footlight")
    server.certificate.rename(tmp_path / "tls.crt")
    server.key.rename(tmp_path / "tls.key")
    mounts = {mount["name"]: mount["mountPath"] for mount in only["volumeMounts"]}
    text = config_map(objects, "footlight-web")["web.yaml"]
    assert text.count(f"{mounts['tls']}/") == 3
    web = tmp_path / "web.yaml"
    web.write_text(text.replace(mounts["tls"], str(tmp_path)))
    loaded = web_config.load(web)
    assert loaded.tls is not None and loaded.tls.verify_mode.name == "CERT_REQUIRED"
    option = only["args"].index("--web.config.file")
    assert only["args"][option + 1] == f"{mounts['web']}/web.yaml"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert "httpGet" not in only[probe]
        assert only[probe]["tcpSocket"] == {"port": "metrics"}
    (endpoint,) = of_kind(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert (endpoint["scheme"], endpoint["tlsConfig"]["serverName"]) == ("https", "footlight")
    (plain,) = of_kind(kustomize.render(DEPLOY / "base"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert plain.items() <= endpoint.items()


def test_the_guide_says_what_each_mount_is_for(objects: list[Object]) -> None:
    for mount in container(objects)["volumeMounts"]:
        assert f"`{mount['mountPath']}`" in GUIDE


# ---- the image ----


def test_the_image_is_built_with_what_the_makefile_asks_for() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    needs = re.search(r"^BUILD_NEEDS := (.*)$", makefile, re.MULTILINE)
    assert needs is not None
    build, run = (DEPLOY / "Containerfile").read_text().split("\nFROM ")[1:]
    assert {need.partition(":")[0] for need in needs[1].split()} <= set(build.split())
    assert {"libbpf1", "python3"} <= set(run.split())


def test_the_image_is_built_from_what_the_package_needs() -> None:
    copied = set(re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert {"bpf", "Makefile", "setup.py", "pyproject.toml", project["project"]["readme"], *packages} <= names
    assert {pattern.partition("/")[0] for pattern in project["project"]["license-files"]} <= names


def test_the_image_runs_what_the_daemon_set_runs() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    arguments = ", ".join(f'"{each}"' for each in container(kustomize.render(DEPLOY / "base"))["args"])
    assert f"CMD [{arguments}]" in text
    assert 'ENTRYPOINT ["/opt/footlight/bin/footlight"]' in text


# ---- systemd ----


def unit(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", (DEPLOY / "footlight.service").read_text(), re.MULTILINE)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    assert analyze is not None, "systemd-analyze is not installed; try: sudo apt-get install systemd"
    text = (DEPLOY / "footlight.service").read_text()
    path = tmp_path / "footlight.service"
    path.write_text(text.replace("/opt/footlight/bin/footlight", "/bin/true"))
    done = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(path.read_text().replace("ProtectClock=yes", "ProtectClocks=yes"))
    done = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert "'ProtectClocks'" in done.stderr


def test_the_unit_gives_up_where_trying_again_changes_nothing() -> None:
    (codes,) = unit("RestartPreventExitStatus")
    assert {HostError.exit_code, ConfigError.exit_code} < set(map(int, codes.split()))


def test_the_unit_keeps_what_the_agent_writes() -> None:
    (state,) = unit("StateDirectory")
    config = load(DEPLOY / "base/footlight.yaml")
    for folder in (config.health.folder, config.recorder.folder):
        assert folder is not None and Path(folder).parent == Path("/var/lib") / state


def test_the_guide_says_what_each_capability_is_for() -> None:
    (capabilities,) = unit("CapabilityBoundingSet")
    for name in capabilities.split():
        assert f"| `{name.removeprefix('CAP_')}` |" in GUIDE

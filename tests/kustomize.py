"""As much of kustomize as deploy/ uses, so that its result can be looked at where there is no kubectl.

Known: resources, namespace, configMapGenerator without a name suffix, and patches, merged as Kubernetes merges them.
Anything else in a kustomization fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

Object = dict[str, Any]

KNOWN: Final = frozenset(
    "apiVersion kind namespace resources configMapGenerator generatorOptions patches".split()
)
_MERGED_BY: Final = {
    "containers": "name",
    "env": "name",
    "ports": "containerPort",
    "volumes": "name",
    "volumeMounts": "mountPath",
}
"""Lists of a pod that a patch adds to, by the key that says which item is meant. All others it replaces."""


def read(folder: Path) -> Object:
    """A folder's kustomization. Raises AssertionError for what is not known here."""
    found = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert isinstance(found, dict)
    assert found.keys() <= KNOWN, found.keys() - KNOWN
    return found


def files(kustomization: Object) -> list[str]:
    """What it names, relative to its folder."""
    named = [*kustomization.get("resources", ()), *(patch["path"] for patch in kustomization.get("patches", ()))]
    for each in kustomization.get("configMapGenerator", ()):
        named += each["files"]
    return named


def render(folder: Path) -> list[Object]:
    """Every object that `kubectl apply -k` would apply, in no particular order."""
    kustomization = read(folder)
    objects: list[Object] = []
    for name in kustomization.get("resources", ()):
        path = folder / name
        objects += render(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    options = kustomization.get("generatorOptions", {})
    for each in kustomization.get("configMapGenerator", ()):
        assert options["disableNameSuffixHash"] is True
        _generate(objects, folder, each, options.get("labels", {}))
    for patch in kustomization.get("patches", ()):
        change = yaml.safe_load((folder / patch["path"]).read_text())
        (target,) = (each for each in objects if _identity(each) == _identity(change))
        merged = _merged(target, change, pod=change["kind"] != "PodMonitor")
        target.clear()
        target.update(merged)
    for each in objects:
        if each["kind"] != "Namespace":
            each["metadata"]["namespace"] = kustomization["namespace"]
    return objects


def _generate(objects: list[Object], folder: Path, what: Object, labels: Object) -> None:
    same = [each for each in objects if _identity(each) == ("ConfigMap", what["name"])]
    assert bool(same) == (what.get("behavior") == "replace")
    for each in same:
        objects.remove(each)
    metadata = {"name": what["name"], "labels": dict(labels)}
    data = {name: (folder / name).read_text() for name in what["files"]}
    objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _identity(each: Object) -> tuple[str, str]:
    return each["kind"], each["metadata"]["name"]


def _merged(old: Any, new: Any, pod: bool, key: str = "") -> Any:  # noqa: ANN401 - whatever YAML has
    if isinstance(old, dict) and isinstance(new, dict):
        result = {name: value for name, value in old.items() if new.get(name, value) is not None}
        for name, value in new.items():
            if value is not None:
                result[name] = _merged(old.get(name), value, pod, name)
        return result
    if isinstance(old, list) and isinstance(new, list) and pod and key in _MERGED_BY:
        by = _MERGED_BY[key]
        items = {item[by]: item for item in old}
        for item in new:
            items[item[by]] = _merged(items.get(item[by]), item, pod)
        return list(items.values())
    return new

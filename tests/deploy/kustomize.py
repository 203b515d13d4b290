"""Builds a kustomization the way `kubectl kustomize` does, for the few fields that deploy/kubernetes uses.

It does not know Kubernetes' objects beyond the merge keys of lists. Invariant: a field that is not built here is an error, not ignored.
Where kubectl is at hand a test compares the two results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FIELDS = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
# What names an element of a list in a strategic merge; other lists are replaced.
MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "tolerations": "",
    "topologySpreadConstraints": "topologyKey",
}
CLUSTER_KINDS = {"Namespace"}
Tree = dict[str, Any]


def build(directory: Path) -> list[Tree]:
    """The objects of the kustomization in `directory`. Raises ValueError for a field that is not known here."""
    settings = yaml.safe_load((directory / "kustomization.yaml").read_text("utf-8"))
    if unknown := set(settings) - FIELDS:
        raise ValueError(f"{directory}: {sorted(unknown)} is not built here")
    found: list[Tree] = []
    for entry in settings.get("resources", ()):
        path = directory / entry
        found += build(path) if path.is_dir() else [one for one in yaml.safe_load_all(path.read_text("utf-8")) if one]
    for patch in settings.get("patches", ()):
        _patch(found, directory / patch["path"])
    for one in found:
        if "namespace" in settings and one["kind"] not in CLUSTER_KINDS:
            one["metadata"]["namespace"] = settings["namespace"]
        _set_images(one, settings.get("images", ()))
    return found


def _patch(objects: list[Tree], path: Path) -> None:
    change = yaml.safe_load(path.read_text("utf-8"))
    same = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (change["kind"], change["metadata"]["name"])]
    if len(same) != 1:
        raise ValueError(f"{path}: nothing of that kind and name to change")
    _merge(same[0], change)


def _merge(into: Tree, change: Tree) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        elif isinstance(value, list) and isinstance(into.get(name), list) and MERGE_KEYS.get(name):
            into[name] = _merge_lists(into[name], value, MERGE_KEYS[name])
        else:
            into[name] = value


def _merge_lists(into: list[Tree], change: list[Tree], key: str) -> list[Tree]:
    """New elements come first, as kustomize puts them."""
    known = {one[key]: one for one in into}
    for one in change:
        if one[key] in known:
            _merge(known[one[key]], one)
    return [one for one in change if one[key] not in known] + into


def _set_images(tree: Any, images: Any) -> None:
    if isinstance(tree, dict):
        for image in images:
            if tree.get("image") == image["name"]:
                tree["image"] = f"{image['newName']}:{image['newTag']}"
        tree = list(tree.values())
    if isinstance(tree, list):
        for value in tree:
            _set_images(value, images)

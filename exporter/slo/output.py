"""Writes rules as YAML: the same text for the same objectives, in an order that makes a change easy to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from exporter.slo.rules import Group, Rule

HEADER: Final = "# Made by `footlight slo rules`. Do not edit.\n"


class _Dumper(yaml.SafeDumper):
    """Lists are indented below their key, and no value is written as a reference to another."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(document: Mapping[str, Any]) -> str:
    """Any document of plain values, with the header."""
    return HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def rule_file(groups: Sequence[Group]) -> str:
    """A file for Prometheus's `rule_files`."""
    return as_yaml({"groups": _groups(groups)})


def prometheus_rule(groups: Sequence[Group], name: str, namespace: str | None, labels: Mapping[str, str]) -> str:
    """An object for the Prometheus operator."""
    metadata: dict[str, Any] = {"name": name}
    if namespace is not None:
        metadata["namespace"] = namespace
    if labels:
        metadata["labels"] = dict(labels)
    return as_yaml(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": metadata,
            "spec": {"groups": _groups(groups)},
        }
    )


def _groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    return [{"name": group.name, "rules": [_rule(rule) for rule in group.rules]} for group in groups]


def _rule(rule: Rule) -> dict[str, Any]:
    found: dict[str, Any] = {"alert": rule.alert} if rule.alert else {"record": rule.record}
    found["expr"] = rule.expr
    if rule.waits:
        found["for"] = rule.waits
    if rule.labels:
        found["labels"] = dict(rule.labels)
    if rule.annotations:
        found["annotations"] = dict(rule.annotations)
    return found

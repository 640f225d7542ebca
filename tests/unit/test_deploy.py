"""The manifests in deploy/: that they are whole, refer to what they define, and run commands that exist."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ckptfs.cli import COMMANDS
from ckptfs.settings import state_dir

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pod_of(document: dict[str, Any]) -> dict[str, Any] | None:
    template = document.get("spec", {}).get("template")
    return template["spec"] if template else None


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_whole(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        assert document["apiVersion"] and document["kind"] and document["metadata"]["name"]
        pod = pod_of(document)
        if pod is None:
            continue
        volumes = {volume["name"] for volume in pod["volumes"]}
        maps = {d["metadata"]["name"] for d in found if d["kind"] == "ConfigMap"}
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert any(mount["mountPath"] == "/dev/fuse" for mount in container["volumeMounts"])
            words = " ".join([*container.get("command", ["ckptfs"]), *container.get("args", [])]).split("ckptfs ")
            assert all(part.split()[0] in COMMANDS for part in words[1:] if part.split())


def test_the_daemonset_selects_its_own_pods_and_shows_its_mounts() -> None:
    daemonset = next(d for d in documents(DEPLOY / "kubernetes" / "daemonset.yaml") if d["kind"] == "DaemonSet")
    spec = daemonset["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    mounts = spec["template"]["spec"]["containers"][0]["volumeMounts"]
    assert any(mount.get("mountPropagation") == "Bidirectional" for mount in mounts)


def test_the_restore_job_has_what_a_restore_needs() -> None:
    """Its image the programs that are run, its pod a place for what the container writes: no overlay is on another."""
    containerfile = (DEPLOY / "Containerfile").read_text()
    assert {"criu", "runc", "fuse3", "iptables", "iproute2"} <= set(containerfile.split())
    (job,) = documents(DEPLOY / "kubernetes" / "restore-job.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert str(state_dir()) in {mount["mountPath"] for mount in container["volumeMounts"]}

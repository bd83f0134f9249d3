"""The Kubernetes manifest: every field is one the API knows, in the type it wants, and the words fit the launcher."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ardist.launch.main import parser

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "launchers" / "kubernetes" / "job.yaml"
SCHEMAS = Path(__file__).parent / "schemas"


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


def test_it_follows_the_schema(documents: dict[str, Any]) -> None:
    schema = json.loads((SCHEMAS / "kubernetes-subset.json").read_text())
    assert set(documents) == {"Service", "Job"}
    for kind, document in documents.items():
        jsonschema.validate(document, {**schema, "$ref": f"#/$defs/{kind}"})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backofLimit"), 3),
        (("spec", "completions"), "2"),
        (("spec", "completionMode"), "indexed"),
        (("spec", "template", "spec", "restartPolicy"), "always"),
        (("spec", "podFailurePolicy", "rules", 0, "onExitCodes", "operator"), "Is"),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(
    documents: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    schema = json.loads((SCHEMAS / "kubernetes-subset.json").read_text())
    job = json.loads(json.dumps(documents["Job"]))
    node = job
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, {**schema, "$ref": "#/$defs/Job"})


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here, which knows the real types")
def test_kubectl_reads_every_field(documents: dict[str, Any]) -> None:
    words = ["kubectl", "set", "env", "--local", "-f", "-", "-o", "json", "PROBE=1"]
    job = yaml.safe_dump(documents["Job"])
    done = subprocess.run(words, input=job, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert lost(documents["Job"], json.loads(done.stdout)) == []


def lost(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """What is in our document and not in theirs: fields that its types do not have are dropped when it is read."""
    if isinstance(ours, dict):
        return [
            one
            for name, value in ours.items()
            for one in (lost(value, theirs[name], f"{path}.{name}") if name in theirs else [f"{path}.{name}"])
        ]
    if isinstance(ours, list):
        pairs = zip(ours, theirs, strict=False)
        return [one for index, pair in enumerate(pairs) for one in lost(*pair, f"{path}[{index}]")]
    return [] if str(ours) == str(theirs) else [f"{path}: {ours!r} became {theirs!r}"]


def test_its_words_are_the_launchers(documents: dict[str, Any]) -> None:
    spec = documents["Job"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    words = [word.replace("$(NODE_RANK)", "1") for word in container["args"]]
    options = parser().parse_intermixed_args(words)
    assert (options.num_nodes, options.node_rank, options.no_ssh) == (spec["completions"], 1, True)
    assert spec["completions"] == spec["parallelism"]
    assert options.ranks == container["resources"]["limits"]["nvidia.com/gpu"]
    service, name = documents["Service"]["metadata"]["name"], documents["Job"]["metadata"]["name"]
    assert options.master_addr == f"{name}-0.{service}"
    assert spec["template"]["spec"]["subdomain"] == service
    assert documents["Service"]["spec"]["selector"] == {"job-name": name}
    assert (ROOT / options.config).is_file()
    assert (ROOT / container["command"][0]).is_file()


def test_exit_codes_mean_what_they_say(documents: dict[str, Any]) -> None:
    rules = documents["Job"]["spec"]["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert by_code == {75: "Ignore", 2: "FailJob", 3: "FailJob"}

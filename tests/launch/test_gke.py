"""The manifest against schemas: the Job by a registry library's, the JobSet's fields by ours."""

import pytest
import yaml

from launch import gke
from launch.machines import SliceError
from launch.request import LaunchError
from tests.launch.requests import ARTIFACTS, CLOUD, CLUSTER, request

MANIFESTS = ("gke.yaml", "gke_spot.yaml")
_TEXT = {"type": "string", "minLength": 1}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
# What jobset.x-k8s.io/v1alpha2 allows, of what we use (kubernetes-sigs/jobset, api/v1alpha2).
JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
                "namespace": _TEXT, "labels": _LABELS, "annotations": _LABELS,
            },
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                        "subdomain": _TEXT,
                    },
                },
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {"type": "array", "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["action"],
                            "properties": {
                                "name": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_,:-]*$"},
                                "action": {"enum": [
                                    "FailJobSet", "RestartJobSet",
                                    "RestartJobSetAndIgnoreMaxRestarts",
                                ]},
                                "onJobFailureReasons": {"type": "array", "items": {"enum": [
                                    "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                                    "MaxFailedIndexesExceeded", "PodFailurePolicy",
                                ]}},
                                "targetReplicatedJobs": {"type": "array", "items": _TEXT},
                            },
                        }},
                    },
                },
                "replicatedJobs": {"type": "array", "minItems": 1, "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["name", "template"],
                    "properties": {
                        "name": _TEXT,
                        "replicas": {"type": "integer", "minimum": 1},
                        "template": {"type": "object"},  # a Job's, checked beside
                    },
                }},
            },
        },
    },
}  # fmt: skip


def _documents(name):
    return list(yaml.safe_load_all(ARTIFACTS[name]().text))


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_jobset_fits_its_schema(name):
    jsonschema = pytest.importorskip("jsonschema")
    [found] = _documents(name)
    jsonschema.validate(found, JOBSET)
    found["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(found, JOBSET)


@pytest.mark.parametrize("name", MANIFESTS)
def test_its_job_fits_that_of_kubernetes(name):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    [found] = _documents(name)
    [replicated] = found["spec"]["replicatedJobs"]
    job = {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"},
        **replicated["template"],
    }  # fmt: skip
    kubernetes_validate.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(Exception, match="terminationGracePeriod"):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_pods_hosts_and_chips_are_those_of_the_topology():
    [found] = _documents("gke_spot.yaml")
    [replicated] = found["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16
    pod = job["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["containers"][0]["command"][0] == "python"  # no shell between it and SIGTERM


def test_a_save_on_sigterm_and_an_eviction_are_no_failures():
    [found] = _documents("gke.yaml")
    [rule] = found["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    evicted, saved = job["podFailurePolicy"]["rules"]
    assert {evicted["action"], saved["action"]} == {"FailJob"}
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    [container] = job["template"]["spec"]["containers"]
    assert saved["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [143],
    }  # fmt: skip


def test_the_secret_goes_by_standard_input():
    artifact = ARTIFACTS["gke_spot.yaml"]()
    assert [step.secret_stdin for step in artifact.steps] == [(), ("HF_TOKEN",), ()]
    assert "from-env-file=/dev/stdin" in artifact.steps[1].words[-1]


def test_what_gke_cannot_do_is_refused():
    with pytest.raises(SliceError, match="slurm"):
        gke.launch(request("h200:8"), CLUSTER)
    with pytest.raises(LaunchError, match="--image"):
        gke.launch(request("v5e:4x4"), gke.Cluster(image=""))
    with pytest.raises(LaunchError, match="--service_account"):
        gke.launch(request("v5e:4x4", **CLOUD), gke.Cluster(image="a"))

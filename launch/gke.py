"""GKE: a JobSet, one job a slice, one pod a host.

GKE tells every pod of a slice its number and its neighbours (TPU_WORKER_ID,
TPU_WORKER_HOSTNAMES, and MEGASCALE_* for several slices), from which jax finds the others. A
failed or evicted pod ends its job, and JobSet starts all jobs again: the run resumes. Evictions
do not count as failures, nor does a pod that has saved on SIGTERM and ended with 143.
"""

import dataclasses
import shlex
from typing import Any

import yaml

from core_jax.distributed import PREEMPTED
from launch.artifact import Artifact, Step, in_turn
from launch.machines import SliceError
from launch.request import BUCKET_MOUNT, LaunchError, Request, check_place
from launch.shell import line

JOB = "slice"  # the replicated job's name
CONTAINER = "trainer"
_SPOT_GRACE = 25  # seconds that GKE gives pods of spot machines at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where and with what pods run.

    Attributes:
      image: container image that holds the code, by tag or better by digest.
      namespace: of all objects.
      service_account: Kubernetes account of the pods; a bucket needs one that may use it.
      queue: Kueue's local queue; empty: no Kueue.
    """

    image: str
    namespace: str = "default"
    service_account: str = ""
    queue: str = ""


def manifest(job: Request, cluster: Cluster) -> dict[str, Any]:
    """The JobSet.

    Raises:
      SliceError: GKE has no such TPU.
      LaunchError: the image is missing, a bucket is without an account, or the working directory
        would not last.
    """
    row = job.topology.accelerator
    if row.kind != "tpu":
        raise SliceError(f"{job.topology.name}: gke launches TPUs; GPUs are launched by slurm")
    if not cluster.image:
        raise LaunchError("gke needs --image, a container image with this code")
    if job.bucket and not cluster.service_account:
        raise LaunchError("--bucket needs --service_account, a Kubernetes account that may use it")
    check_place(job)
    labels = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": cluster.namespace,
            **({"labels": labels} if labels else {}),
            "annotations": {
                # One slice, one node pool: a job never spans two.
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
                "launch/code": str(job.code),
            },
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {
                        "name": "taken-away",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "targetReplicatedJobs": [JOB],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": JOB, "replicas": job.slices, "template": _job(job, cluster)}
            ],
        },
    }


def _job(job: Request, cluster: Cluster) -> dict[str, Any]:
    """The Job of one slice."""
    return {
        "spec": {
            "parallelism": job.topology.hosts,
            "completions": job.topology.hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # one pod cannot come back alone; JobSet restarts all
            "podFailurePolicy": {
                # FailJob is what JobSet's rule goes by (its reason is PodFailurePolicy).
                "rules": [
                    # Preemption, eviction, maintenance; kubelet adds it to the pod.
                    {
                        "action": "FailJob",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    # Where the pod was not told why: a node that is shut down or drained by hand.
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": CONTAINER, "operator": "In", "values": [PREEMPTED],
                        },
                    },
                ]
            },
            "template": _pod(job, cluster),
        }
    }


def _pod(job: Request, cluster: Cluster) -> dict[str, Any]:
    topology = job.topology
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in job.variables().items()
    ]
    variables += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret_name(job), "key": name}}}
        for name in job.secrets
    ]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": topology.accelerator.gke,
            "cloud.google.com/gke-tpu-topology": topology.shape,
            **({"cloud.google.com/gke-spot": "true"} if job.spot else {}),
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": cluster.image,
                # A list, no shell: python is process 1 and gets SIGTERM itself.
                "command": list(job.words()),
                "env": variables,
                "ports": [{"containerPort": 8471}, {"containerPort": 8482}],  # libtpu, jax
                "resources": {
                    "requests": {"google.com/tpu": topology.chips_per_host},
                    "limits": {"google.com/tpu": topology.chips_per_host},
                },
            }
        ],
    }
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if job.spot:
        spec["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
             "effect": "NoSchedule"}
        ]  # fmt: skip
    pod: dict[str, Any] = {"spec": spec}
    if job.bucket:
        pod = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": spec}
        spec["containers"][0]["volumeMounts"] = [{"name": "bucket", "mountPath": BUCKET_MOUNT}]
        spec["volumes"] = [
            {
                "name": "bucket",
                "csi": {
                    "driver": "gcsfuse.csi.storage.gke.io",
                    "volumeAttributes": {
                        "bucketName": job.bucket, "mountOptions": "implicit-dirs",
                    },
                },
            }
        ]  # fmt: skip
    return pod


def secret_name(job: Request) -> str:
    """The Kubernetes secret of a launch."""
    return f"{job.name}-secrets"


def launch(job: Request, cluster: Cluster) -> Artifact:
    """The manifest, and how it is applied."""
    text = yaml.safe_dump(manifest(job, cluster), sort_keys=False, width=96)
    namespace = f"--namespace={cluster.namespace}"
    apply = ("kubectl", "apply", "--filename=-")
    create = (
        "kubectl", "create", "secret", "generic", secret_name(job), namespace,
        "--from-env-file=/dev/stdin",
    )  # fmt: skip
    remove = ("kubectl", "delete", "secret", secret_name(job), namespace, "--ignore-not-found")
    notes = [
        f"# {job.name}: {job.slices} x {job.topology.name}, {job.hosts} host(s).",
        f"# Code {job.code}: the image must hold it, or the pods stop.",
        f"# Apply it by: {line(*apply[:2], '--filename=FILE')}, or --execute.",
    ]
    steps = []
    if job.secrets:
        given = " ".join(job.secrets)
        notes += [
            f"# First the secret, from the environment ({given}), which --execute does too:",
            f"#   env | grep -E '^({'|'.join(job.secrets)})=' | {shlex.join(create)}",
        ]
        steps += [Step(words=remove), Step(words=create, secret_stdin=job.secrets)]
    if job.spot and job.save_seconds > _SPOT_GRACE:
        notes.append(
            f"# Spot: pods get about {_SPOT_GRACE} s, whatever the grace period says. A save of "
            f"{job.save_seconds} s is lost,\n# and the run resumes from the one before."
        )
    text = "\n".join(notes) + "\n" + text
    return Artifact(kind="yaml", text=text, steps=(*steps, Step(words=apply, stdin=text)))


def _selector(name: str) -> str:
    return f"--selector=jobset.sigs.k8s.io/jobset-name={name}"


def logs(name: str, cluster: Cluster) -> Artifact:
    """Follows the log of the first host, the only one that logs progress."""
    return in_turn((
        "kubectl", "logs", f"--namespace={cluster.namespace}",
        f"--selector=jobset.sigs.k8s.io/jobset-name={name},"
        "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0",
        f"--container={CONTAINER}", "--tail=200", "--follow",
    ))  # fmt: skip


def status(name: str, cluster: Cluster) -> Artifact:
    """JobSet, jobs and pods."""
    namespace = f"--namespace={cluster.namespace}"
    return in_turn(
        ("kubectl", "get", "jobset", name, namespace),
        ("kubectl", "get", "jobs,pods", namespace, _selector(name), "--output=wide"),
    )


def delete(name: str, cluster: Cluster) -> Artifact:
    """Deletes the JobSet (pods get SIGTERM and save) and its secret."""
    namespace = f"--namespace={cluster.namespace}"
    return in_turn(
        ("kubectl", "delete", "jobset", name, namespace, "--ignore-not-found"),
        ("kubectl", "delete", "secret", f"{name}-secrets", namespace, "--ignore-not-found"),
    )

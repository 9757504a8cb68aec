"""One request of each target; their texts are in golden/."""

from core_jax.code_version import CodeVersion
from launch import gke, local, mig, slurm, tpu_vm
from launch.machines import find_slice
from launch.request import Request

CODE = CodeVersion(release="0.1.0", commit="0123456789ab", sources="0123456789abcdef")
PLACE = tpu_vm.Place(project="my-project", zone="us-east5-b")
BEHIND = tpu_vm.Place(
    project="my-project", zone="us-east5-b", network="net", subnetwork="sub", internal_ips=True,
    service_account="trainer@my-project.iam.gserviceaccount.com",
)  # fmt: skip
CLUSTER = gke.Cluster(
    image="us-docker.pkg.dev/my-project/images/vlv:0123456789ab", service_account="trainer",
    queue="tpus",
)  # fmt: skip


def request(topology, **changes):
    values = {
        "name": "vlv-stage1", "module": "vlv_jax.train", "config": "configs/vlv_stage1.py",
        "workdir": "/shared/runs/vlv-stage1", "arguments": ("--config.run.steps=1000",),
        "topology": find_slice(topology), "code": CODE,
    }  # fmt: skip
    return Request(**(values | changes))


CLOUD = {"workdir": "/bucket/runs/vlv-stage1", "bucket": "my-bucket", "secrets": ("HF_TOKEN",)}
ODD = {"workdir": "/bucket/it's $HOME; a \"run\"", "env": {"NOTE": "a b'c $(d)"}}
ARTIFACTS = {
    "tpu_vm.sh": lambda: tpu_vm.launch(request("v5e:16x16"), PLACE),
    "tpu_vm_spot.sh": lambda: tpu_vm.launch(
        request("v5p:4x4x8", slices=2, spot=True, **CLOUD), BEHIND
    ),
    "tpu_vm_quoting.sh": lambda: tpu_vm.launch(request("v6e:8x8", **ODD), PLACE),
    "mig.sh": lambda: mig.launch(request("v6e:2x4", **CLOUD), BEHIND),
    "mig_spot.sh": lambda: mig.launch(request("v6e:4x4", spot=True), PLACE),
    "gke.yaml": lambda: gke.launch(request("v5e:16x16"), CLUSTER),
    "gke_spot.yaml": lambda: gke.launch(
        request("v5p:4x4x4", slices=2, spot=True, **CLOUD), CLUSTER
    ),
    "slurm.sh": lambda: slurm.launch(
        request("h200:8", slices=4, secrets=("HF_TOKEN",)),
        slurm.Partition(code="/shared/code", partition="gpu", time="2-00:00:00"),
    ),
    "slurm_quoting.sh": lambda: slurm.launch(
        request("h100:4", **ODD), slurm.Partition(code="/shared/my code", python="my env/python")
    ),
    "logs_tpu_vm.sh": lambda: tpu_vm.logs("vlv-stage1", 2, PLACE),
    "status_tpu_vm.sh": lambda: tpu_vm.status("vlv-stage1", 2, PLACE),
    "delete_tpu_vm.sh": lambda: tpu_vm.delete("vlv-stage1", 2, PLACE),
    "logs_mig.sh": lambda: mig.logs("vlv-stage1", PLACE),
    "status_mig.sh": lambda: mig.status("vlv-stage1", PLACE),
    "delete_mig.sh": lambda: mig.delete("vlv-stage1", PLACE),
    "logs_gke.sh": lambda: gke.logs("vlv-stage1", CLUSTER),
    "status_gke.sh": lambda: gke.status("vlv-stage1", CLUSTER),
    "delete_gke.sh": lambda: gke.delete("vlv-stage1", CLUSTER),
    "logs_slurm.sh": lambda: slurm.logs("vlv-stage1"),
    "status_slurm.sh": lambda: slurm.status("vlv-stage1"),
    "delete_slurm.sh": lambda: slurm.delete("vlv-stage1"),
}


def local_text():
    return local.text(request("cpu:2x4", name="mini", config="configs/vlv_stage1.py:mini"))

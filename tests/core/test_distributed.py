import pytest

from core_jax.distributed import DistributedError, Membership, find_membership

NONE = {"coordinator_address": None, "num_processes": None, "process_id": None}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


def _find(given=None, env=None, has_tpu=False):
    return find_membership(NONE | (given or {}), env or {}, has_tpu=has_tpu)


def test_one_machine_is_left_alone():
    assert _find() is None
    # sbatch's own script and salloc's shell have no step: only srun starts several.
    no_step = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}
    assert _find(env=no_step) is None
    assert _find(env=SLURM | {"SLURM_NTASKS": "1"}) is None


def test_flags_come_before_the_environment():
    flags = {"coordinator_address": "a:1", "num_processes": 3, "process_id": 2}
    env = {
        "JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "5", "JAX_PROCESS_ID": "4",
    }  # fmt: skip
    told = _find(flags, env)
    assert (told.method, told.coordinator_address) == ("given", "a:1")
    assert (told.num_processes, told.process_id) == (3, 2)
    told = _find({"process_id": 0}, env)
    assert (told.coordinator_address, told.num_processes, told.process_id) == ("b:2", 5, 0)


@pytest.mark.parametrize("env", [SLURM, {}])
def test_a_cluster_is_found_and_may_be_overruled(env):
    told = _find(env=env, has_tpu=True)
    assert told == Membership(method="slurm" if env else "tpu")
    assert _find({"coordinator_address": "a:1"}, env, True).coordinator_address == "a:1"
    assert _find({"num_processes": 1}, env, True) is None
    assert _find(env=env | {"JAX_NUM_PROCESSES": "1"}, has_tpu=True) is None


def test_no_tpu_where_jax_may_not_use_it():
    for env in ({"JAX_PLATFORMS": "cpu"}, {"TPU_SKIP_MDS_QUERY": "1"}):
        assert find_membership(NONE, env) is None


@pytest.mark.parametrize(
    ("given", "env", "match"),
    [
        ({"num_processes": 2}, {}, "--coordinator_address .or JAX_COORDINATOR_ADDRESS., --process"),
        ({"coordinator_address": "a:1"}, {}, "--num_processes 1 runs this one alone"),
        ({"process_id": 0}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        ({"num_processes": 0}, {}, "at least 1"),
        ({"num_processes": 2, "process_id": 2}, {}, r"it is 0\.\.1"),
        ({"coordinator_address": "a"}, {}, "host:port"),
        ({"coordinator_address": "a:99999"}, {}, "host:port"),
        ({"coordinator_address": ":1"}, {}, "host:port"),
    ],
)
def test_what_is_incomplete_or_wrong_is_named(given, env, match):
    with pytest.raises(DistributedError, match=match):
        _find(given, env)

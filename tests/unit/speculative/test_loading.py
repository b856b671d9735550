"""How ranks find each other; what is loaded is tested over ranks."""

import pytest

from megatron_mtpd.speculative.loading import ranks_of_slurm

TASK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}


def test_srun_says_what_torchrun_says():
    assert ranks_of_slurm(TASK | MEETING) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("environment", [{}, TASK | MEETING | TORCHRUN, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}])
def test_torchrun_comes_first_and_a_shell_in_a_job_is_alone(environment):
    assert ranks_of_slurm(environment) == {}


@pytest.mark.parametrize("meeting", [{}, {"MASTER_ADDR": "node1"}])
def test_tasks_that_cannot_meet_are_refused(meeting):
    with pytest.raises(ValueError, match=r"8 tasks.*export MASTER_ADDR"):
        ranks_of_slurm(TASK | meeting)

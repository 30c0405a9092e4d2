"""The environment of a task that SLURM's srun has started, and how its job is queued again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import warnings

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies.environments._table import TABLE, attempt, contradictions, number, port, refuse

__all__ = ["SLURMEnvironment"]

_AT_A_PROMPT = ("bash", "interactive")
_NEVER_CAUGHT = ("SIGKILL", "SIGSTOP")
_ANSWER_S = 60.0


class SLURMEnvironment:
    """Reads what SLURM tells each task; start one task for each device, with ``srun``.

    Args:
        auto_requeue: when SLURM announces the end of the job (``#SBATCH --signal=SIGUSR1@90``), stop all ranks at the
            same step, save, and queue the job again with ``scontrol requeue``. False leaves the signal alone.
        requeue_signal: the announcement; SIGUSR1 by default, where there is one. With SIGTERM a job that SLURM preempts
            in favour of another is saved and queued again too; with any other, SIGTERM does not stop the run.

    Raises:
        MisconfigurationException: ``requeue_signal`` is no signal, or one that no process can catch.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        self.auto_requeue = auto_requeue
        self.requeue_signal = _checked(requeue_signal)

    @property
    def creates_processes_externally(self) -> bool:
        """True: srun does."""
        return True

    @property
    def main_address(self) -> str:
        """MASTER_ADDR, else the first host of SLURM_NODELIST, else this machine."""
        if "MASTER_ADDR" in os.environ:
            return os.environ["MASTER_ADDR"]
        return first_host(os.environ.get("SLURM_NODELIST", "127.0.0.1"))

    @property
    def main_port(self) -> int:
        """MASTER_PORT, else 15000 and the last four digits of the job's id, else 12910."""
        job = os.environ.get("SLURM_JOB_ID")
        default = 12910 if job is None else 15000 + int("".join(re.findall(r"\d", job))[-4:] or 0)
        return port(os.environ, "MASTER_PORT", default=default)

    @staticmethod
    def detect() -> bool:
        """Whether this is a task of a job, and not a prompt inside one."""
        started = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _AT_A_PROMPT
        if not started and "SLURM_JOB_ID" not in os.environ and shutil.which("srun") is not None:
            warnings.warn(
                "this machine has SLURM's srun, and this program was started without it. On a login node nothing is "
                "wrong; for training on the cluster start it with: srun python ...",
                stacklevel=2,
            )
        return started

    def world_size(self) -> int:
        """SLURM_NTASKS."""
        return number(os.environ, "SLURM_NTASKS", default=1)

    def global_rank(self) -> int:
        """SLURM_PROCID."""
        return number(os.environ, "SLURM_PROCID", default=0)

    def local_rank(self) -> int:
        """SLURM_LOCALID."""
        return number(os.environ, "SLURM_LOCALID", default=0)

    def node_rank(self) -> int:
        """SLURM_NODEID."""
        return number(os.environ, "SLURM_NODEID", default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the user's settings with what srun has started.

        Raises:
            MisconfigurationException: they contradict each other, or tasks were asked for without saying how many are
                on each node.
        """
        wrong: list[str] = []
        tasks = attempt(self.world_size, wrong)
        if tasks is not None and tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            wrong.append(
                f"the job has SLURM_NTASKS={tasks} and no SLURM_NTASKS_PER_NODE: --ntasks={tasks} says nothing about "
                f"where tasks run. Write --ntasks-per-node={num_devices} with --nodes={num_nodes} instead."
            )
        wrong += contradictions(TABLE["slurm"], os.environ, num_devices, num_nodes)
        if wrong:
            wrong[-1] += " Or pass plugins=LightningEnvironment() to have this process start the others."
        refuse(wrong)

    def requeue(self) -> None:
        """Run ``scontrol requeue`` for this job, or for this task of a job array.

        Raises:
            RuntimeError: there is no such program, or it refuses.
        """
        command = f"scontrol requeue {job_id()}"
        # A shell where there is no such program: clusters also provide it as an exported function.
        in_shell = shutil.which("scontrol") is None
        try:
            done = subprocess.run(
                command if in_shell else command.split(),
                shell=in_shell,
                capture_output=True,
                text=True,
                timeout=_ANSWER_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{command!r} has not answered within {_ANSWER_S:.0f} s. Run it by hand.") from error
        except OSError as error:
            raise RuntimeError(f"{command!r} cannot be run: {error}. Run it by hand.") from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip() or "nothing"
            raise RuntimeError(f"{command!r} ended with exit code {done.returncode} and said: {said}. Run it by hand.")


def job_id() -> str:
    """The job as ``scontrol`` names it: ``7``, or ``7_3`` for a task of an array.

    Raises:
        RuntimeError: the environment has none, or something else.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    found = os.environ.get("SLURM_JOB_ID", "")
    if array is not None:
        found = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"\d+(_\d+)?", found):
        names = "SLURM_JOB_ID" if array is None else "SLURM_ARRAY_JOB_ID and SLURM_ARRAY_TASK_ID"
        raise RuntimeError(f"{names} should be the numbers of a job that can be queued again, but give {found!r}.")
    return found


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``a`` of ``a,b``, ``n1`` of ``n[1-3,5]``, ``n01-x`` of ``n[01]-x``."""
    first = re.split(r",(?![^\[]*\])|\s", nodes.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _checked(given: object) -> signal.Signals | None:
    if given is None:
        return getattr(signal, "SIGUSR1", None)  # Windows has none
    try:
        found = signal.Signals(given)  # type: ignore[arg-type]  # a number is looked up, anything else refused
    except ValueError:
        found = None
    if found is None or found.name in _NEVER_CAUGHT:
        why = "is no signal" if found is None else "cannot be caught by any process"
        raise MisconfigurationException(
            f"SLURMEnvironment(requeue_signal={given!r}): it {why}. Give a member of signal.Signals such as "
            "signal.SIGUSR1, the same as in #SBATCH --signal=SIGUSR1@90."
        )
    return found

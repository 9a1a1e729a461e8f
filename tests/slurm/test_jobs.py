"""The batch scripts on a real SLURM of one node, with two ranks on the CPU. Minutes long: `make test-slurm`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .cluster import Cluster, missing_programs, running_cluster, wait_for

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "pretrain_scripts/slurm"
QUICKSTART = ROOT / "examples/quickstart"
TWO_RANKS = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
MISSING = missing_programs()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING} (Debian: slurmctld slurmd slurm-client munge)"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of preprocessed rows of the quickstart."""
    folder = tmp_path_factory.mktemp("data")
    rows = ("--output", folder / "rows.jsonl", "--num-rows", "200")
    subprocess.run([sys.executable, QUICKSTART / "generate_data.py", *rows], check=True)
    options = ("--input", folder / "rows.jsonl", "--output-prefix", folder / "set", "--append-eod", "--workers", "1")
    tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", QUICKSTART / "model")
    subprocess.run([sys.executable, ROOT / "tools/preprocess_data.py", *options, *tokenizer], check=True)
    return folder / "set"


class Job:
    """A training job of two ranks. Its config file is read at each start, so it can be changed in between."""

    def __init__(self, cluster: Cluster, data: Path, folder: Path) -> None:
        self.cluster, self.folder, self.save, self.log_file = cluster, folder, folder / "run", folder / "job.log"
        self.config = yaml.safe_load((ROOT / "pretrain_scripts/configs/tiny_cpu.yaml").read_text())
        self.config["data"] |= {"data_prefixes": [str(data)], "num_workers": 1}
        self.config["checkpoint"]["save_interval"] = 0
        self.config["log"]["log_interval"] = 1
        self.number = ""

    def submit(self, train_iters: int, *options: str) -> None:
        self.set_train_iters(train_iters)
        script = SCRIPTS / "sft_qwen2.5_32b_multiverse.sbatch"
        command = ("sbatch", "--parsable", *TWO_RANKS, f"--output={self.log_file}", *options, script)
        environment = {"CONFIG": str(self.folder / "config.yaml"), "SAVE": str(self.save), "PYTHON": sys.executable}
        self.number = self.cluster.run(*command, cwd=ROOT, **environment, OMP_NUM_THREADS="1")

    def set_train_iters(self, train_iters: int) -> None:
        self.config["train_iters"] = train_iters
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config))

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def wait_for_log(self, text: str, count: int = 1, timeout: float = 240) -> None:
        try:
            wait_for(text, lambda: self.log().count(text) >= count, timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; the log is\n{self.log()}") from None

    def wait_for_state(self, state: str, timeout: float = 240) -> None:
        wait_for(f"job {state}", lambda: self.cluster.field(self.number, "JobState") == state, timeout)

    def saved_step(self) -> int:
        return int((self.save / "latest_checkpointed_iteration.txt").read_text())

    def metrics(self, kind: str) -> list[dict[str, object]]:
        path = self.save / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["kind"] == kind]


def test_a_run_goes_on_after_a_signal_and_after_the_time_limit(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = Job(cluster, data, tmp_path)
    job.submit(10**6, "--time=3", "--signal=USR1@30")
    wait_for("the first steps", lambda: len(job.metrics("train")) >= 3, 240)
    cluster.run("scancel", "--signal=USR1", job.number)
    job.wait_for_log("goes back into the queue")
    first = job.saved_step()
    assert first >= 3

    job.wait_for_log("start 2, from step")  # and now SLURM itself signals, before the three minutes are over
    job.wait_for_log("goes back into the queue", 2)
    second = job.saved_step()
    assert second > first

    job.set_train_iters(second + 3)
    job.wait_for_log("start 3, from step")
    job.wait_for_state("COMPLETED")
    assert (job.save / "model").is_dir() and job.saved_step() == second + 3
    assert [row["step"] for row in job.metrics("train")] == list(range(1, second + 4))  # none lost, none done twice
    assert [row["stopped_by"] for row in job.metrics("end")] == ["SIGUSR1", "SIGUSR1", None]
    log = job.log()
    assert [f"start {n + 1}, from step {step}," in log for n, step in enumerate((0, first, second))] == [True] * 3
    assert "DUE TO TIME LIMIT" not in log and "Traceback" not in log


def test_an_error_ends_the_job_with_its_reason(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = Job(cluster, data, tmp_path)
    job.config["data"]["global_batch_size"] = 3
    job.submit(20)
    job.wait_for_state("FAILED")
    assert cluster.field(job.number, "ExitCode") == "1:0"
    assert "data.global_batch_size (3) must be divisible by" in job.log()
    assert cluster.field(job.number, "Restarts") == "0"


def test_a_job_that_makes_no_progress_is_ended(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """Each start is signalled before there is anything to save."""
    job = Job(cluster, data, tmp_path)
    job.submit(10**6, "--export=ALL,MAX_STARTS_PER_STEP=1")
    job.wait_for_log("start 1, from step 0")
    wait_for("the tasks", lambda: f"{job.number}.0" in cluster.run("squeue", "--steps", "--noheader"), 20)
    cluster.run("scancel", "--signal=USR1", job.number)
    job.wait_for_state("FAILED")
    assert "started 1 times from step 0 without a new checkpoint" in job.log()
    assert not (job.save / "latest_checkpointed_iteration.txt").exists()


def test_a_checkpoint_is_converted_there_and_back(cluster: Cluster, tmp_path: Path) -> None:
    """And a job whose output cannot be written fails."""

    def convert(load: Path, save: Path, **settings: str) -> tuple[str, str]:
        log = tmp_path / "convert.log"
        log.unlink(missing_ok=True)
        command = ("sbatch", "--parsable", "--mem=0", f"--output={log}", SCRIPTS / "convert_checkpoint.sbatch")
        places = {"LOAD": str(load), "SAVE": str(save), "PYTHON": sys.executable}
        number = cluster.run(*command, cwd=ROOT, **places, **settings)
        wait_for("the job", lambda: cluster.field(number, "JobState") in ("COMPLETED", "FAILED"), 240)
        return cluster.field(number, "JobState"), log.read_text()

    state, log = convert(QUICKSTART / "model", tmp_path / "mcore")
    assert state == "COMPLETED" and "56 compared, 0 different" in log
    state, log = convert(tmp_path / "mcore", tmp_path / "back", FROM="mcore", TO="hf")
    assert state == "COMPLETED" and "56 compared, 0 different" in log
    assert (tmp_path / "back" / "model.safetensors").exists()
    state, log = convert(QUICKSTART / "model", tmp_path / "mcore")
    assert state == "FAILED" and "already exists" in log

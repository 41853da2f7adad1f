"""The launchers in scripts/launch/: what they run, with stand-ins for gcloud, srun and Python."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml  # a dependency of Flax

from gnp import config as gnp_config

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = [LAUNCH / "tpu_pod.sh", LAUNCH / "slurm.sbatch"]
FLAGS = [
    "--config=configs/cifar_vit.py:gr=zero",
    '--workdir=/mnt/my runs/it\'s "$HOME"',
    "--config.data.train=train[:90%]",
    "--config.data.augment=",
    "--config.x=`id` $(id) \\ ; exit 3 && * ~ # !! | > y",
    "--config.y=two\nlines",
]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a program from a shell script, first on the PATH, and returns its path."""

    def make(name, text, folder=tmp_path / "bin"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return make


def record(path):
    """A line of shell that writes the arguments to a file, and `recorded` reads them there."""
    return f"printf '%s\\0' \"$@\" > '{path}'"


def recorded(path):
    return path.read_text().split("\0")[:-1]


def run(script, *arguments, **more):
    return subprocess.run(
        ["bash", script, *arguments], capture_output=True, text=True, timeout=60, **more
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_and_tell_their_usage(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = run(script)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_what_the_launchers_name_is_there(path):
    text = path.read_text()
    for name in re.findall(r"(?:configs|scripts)/[\w./]*\w", text):
        assert (ROOT / name).exists(), name
    help_text = subprocess.run(
        [sys.executable, "-m", "gnp.train", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    # The flags of gnp.train have underscores, those of the launchers' programs hyphens or others.
    flags = set(re.findall(r"--(?:config|workdir|distributed|\w+_\w+)\b", text))
    assert flags >= {"--config", "--workdir"}
    for flag in flags:
        assert flag in help_text


@pytest.mark.parametrize("folder", ["gnp", "my code/$gnp"])
def test_tpu_pod_runs_the_flags_as_they_are_on_every_host(tmp_path, monkeypatch, stand_in, folder):
    home = tmp_path / "home"
    python = tmp_path / "python.txt"
    stand_in("python", f"{record(python)}; pwd >> '{python}'", home / folder / ".venv" / "bin")
    gcloud = tmp_path / "gcloud.txt"
    # As ssh does it: the command is one string, for a shell in the home directory.
    ssh = f"cd '{home}'; command=${{@: -1}}; exec bash -c \"${{command#--command=}}\""
    stand_in("gcloud", f"{record(gcloud)}; {ssh}")
    if folder != "gnp":
        monkeypatch.setenv("GNP_DIR", folder)
    done = run(SCRIPTS[0], "my-pod", "us-east1-d", *FLAGS)
    assert done.returncode == 0, done.stderr
    *start, command = recorded(gcloud)
    assert start == [
        *("compute", "tpus", "tpu-vm", "ssh", "my-pod"),
        *("--zone=us-east1-d", "--worker=all"),
    ]
    assert command.startswith("--command=")
    *arguments, folder_of_python = python.read_text().split("\0")
    assert arguments == ["-m", "gnp.train", "--distributed", *FLAGS]
    assert folder_of_python == f"{home / folder}\n"


@pytest.mark.parametrize("code", [0, 75, 130])
def test_slurm_runs_the_flags_as_they_are_in_every_task(tmp_path, monkeypatch, stand_in, code):
    python, srun = tmp_path / "python.txt", tmp_path / "srun.txt"
    monkeypatch.setenv("PYTHON", str(stand_in("my python", f"{record(python)}; exit {code}")))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    stand_in("srun", f'{record(srun)}; while [[ $1 == -* ]]; do shift; done; exec "$@"')
    scontrol = tmp_path / "scontrol.txt"
    stand_in("scontrol", record(scontrol))
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    done = run(SCRIPTS[1], *FLAGS)
    assert done.returncode == code, done.stderr
    assert scontrol.exists() == (code == 75)  # "start me again"
    if scontrol.exists():
        assert recorded(scontrol) == ["requeue", "123"]
    assert recorded(srun)[:2] == ["--cpus-per-task=6", "--kill-on-bad-exit=1"]
    assert recorded(python) == ["-m", "gnp.train", *FLAGS]


def test_slurm_reads_its_options_and_saves_before_the_end():
    """SLURM stops to read options at the first line that is no comment."""
    comments = SCRIPTS[1].read_text().partition("\nset -euo")[0].splitlines()
    assert all(line.startswith("#") for line in comments)
    options = [line.split()[1] for line in comments if line.startswith("#SBATCH ")]
    assert "--signal=TERM@120" in options and "--requeue" in options
    given = dict(option.partition("=")[::2] for option in options)
    assert given["--ntasks-per-node"] == given["--gpus-per-node"]  # one task for each GPU


def test_jobset_starts_as_many_processes_as_it_says_at_the_address_of_the_first():
    text = (LAUNCH / "jobset.yaml").read_text()
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "gnp.train"]
    flags = dict(flag.partition("=")[::2] for flag in container["args"])
    assert workers["replicas"] == 1 and job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(flags.pop("--num_processes"))
    host, port = flags.pop("--coordinator").split(":")
    names = (jobset["metadata"]["name"], workers["name"], jobset["spec"]["network"]["subdomain"])
    assert host == "{}-{}-0-0.{}".format(*names)
    assert container["ports"] == [{"containerPort": int(port)}]
    (mount,) = container["volumeMounts"]
    assert flags.pop("--workdir").startswith(mount["mountPath"])
    assert [volume["name"] for volume in job["template"]["spec"]["volumes"]] == [mount["name"]]
    config = flags.pop("--config")
    fields = [(flag.removeprefix("--config."), value) for flag, value in flags.items()]
    gnp_config.load(str(ROOT / config), fields)  # all are fields
    for placeholder in ("IMAGE", "CLAIM"):
        assert f"# - {placeholder}: " in text and text.count(f": {placeholder}\n") == 1

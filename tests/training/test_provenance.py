"""What a run was made with: the description, its record, and differences."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import time
import tomllib

import jax
import jaxlib
import pytest
from etils import epath

import gnp
from gnp.training import provenance, sharding

ROOT = provenance._SOURCE.parent
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small copy of the source, taken for gnp's own."""
    folder = tmp_path / "repository" / "gnp"
    (folder / "data").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "data/order.py"):
        shutil.copy(ROOT / "gnp" / name, folder / name)
    monkeypatch.setattr(provenance, "_SOURCE", folder)
    return folder


def git(folder, *arguments):
    done = subprocess.run(
        [*GIT, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(source):
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    git(source.parent, "init", "--quiet")
    git(source.parent, "add", ".")
    git(source.parent, "commit", "--quiet", "--message=first")
    return source.parent


def test_the_description_is_json_and_names_no_one():
    described = provenance.describe()
    assert json.loads(json.dumps(described)) == described
    del described["xla_flags"]
    assert described["platform"].keys() == {"os", "machine", "cpu"}
    assert "/" not in json.dumps(described)  # a path, with a user's name
    assert described["devices"] == f"{jax.devices()[0].device_kind} × 8"
    assert described["processes"] == 1
    mesh = sharding.make_mesh(2, 2, batch_size=4)
    assert provenance.describe(mesh)["devices"].endswith("× 4")
    assert provenance.describe(mesh)["mesh"] == "data=2 fsdp=2"


def test_versions_are_those_of_what_is_imported():
    packages = provenance.describe()["packages"]
    assert packages["gnp"] == gnp.__version__
    assert packages["jax"] == jax.__version__ and packages["jaxlib"] == jaxlib.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {text.split(">")[0].split("[")[0] for text in project["dependencies"]}
    assert {provenance._normalised(name) for name in names} <= packages.keys()
    assert "pytest" not in packages


def test_versions_without_a_repository_and_without_an_installation(source, monkeypatch):
    installed = provenance.describe()["packages"]  # as gnp's own metadata says, if there is any
    assert {"gnp", "jax", "jaxlib"} <= installed.keys()

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", none)
    assert {"gnp", "jax", "jaxlib"} <= provenance.describe()["packages"].keys()


def test_the_source_is_told_apart_by_every_byte_and_name(source):
    first = provenance.source_sha256()
    (source / "errors.txt").write_text("no code")
    assert provenance.source_sha256() == first
    seen = {first}
    for change in (
        lambda: (source / "errors.py").write_text((source / "errors.py").read_text() + " "),
        lambda: (source / "errors.py").rename(source / "mistakes.py"),
        lambda: (source / "data" / "order.py").rename(source / "order.py"),
        lambda: (source / "empty.py").write_text(""),
        lambda: (source / "empty.py").unlink() or (source / "order.py").unlink(),
    ):
        change()
        seen.add(provenance.source_sha256())
    assert len(seen) == 6


def test_the_commit(repository, monkeypatch, tmp_path):
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance.describe()["git"] == {"commit": commit, "dirty": False}
    (repository / "notes.txt").write_text("not tracked")
    assert provenance.describe()["git"] == {"commit": commit, "dirty": False}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook
    (repository / "gnp" / "errors.py").write_text("")
    assert provenance.describe()["git"] == {"commit": commit, "dirty": True}


def test_a_repository_around_an_installed_package_is_not_its_own(repository):
    shutil.rmtree(repository / ".git")
    git(repository, "init", "--quiet")
    (repository / "theirs.py").write_text("")
    git(repository, "add", "theirs.py")
    git(repository, "commit", "--quiet", "--message=first")
    assert provenance.describe()["git"] is None


def test_a_repository_of_another_user(repository, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for this
    with pytest.raises(subprocess.CalledProcessError):
        git(repository, "status")
    assert provenance.describe()["git"] is None


@pytest.mark.parametrize(
    "script", [None, "#!/bin/sh\nexec sleep 600\n", "#!/bin/sh\necho; exit 1\n"]
)
def test_git_that_is_missing_or_hangs_or_is_broken(script, repository, tmp_path, monkeypatch):
    path = tmp_path / "bin"
    path.mkdir()
    if script is not None:
        (path / "git").write_text(script)
        (path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:{os.defpath}" if script else str(path))
    monkeypatch.setattr(provenance, "_GIT_SECONDS", 0.2)
    began = time.monotonic()
    assert provenance.describe()["git"] is None
    assert time.monotonic() - began < 30


def test_flags_that_change_results_and_no_others(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " --xla_a=1  --xla_dump_to=/tmp/x --xla_b")
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NEW_IN_A_LATER_VERSION", "1")
    flags = provenance.describe()["xla_flags"]
    assert flags["XLA_FLAGS"] == "--xla_a=1 --xla_b"
    assert flags["JAX_DEFAULT_MATMUL_PRECISION"] == "highest"
    assert flags["JAX_NEW_IN_A_LATER_VERSION"] == "1"
    assert not {"JAX_COORDINATOR_ADDRESS", "JAX_COMPILATION_CACHE_DIR"} & flags.keys()


ENVIRONMENT = {
    "python": "3.11.2",
    "platform": {"os": "Linux", "cpu": "a"},
    "packages": {"jax": "0.10.2", "numpy": "2.4.1"},
    "git": {"commit": "abc", "dirty": False},
    "source_sha256": "0123456789abcdef",
    "devices": "cpu × 8",
    "processes": 1,
    "mesh": None,
    "xla_flags": {"JAX_ENABLE_X64": "1"},
}


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"git": None}, []),
        ({"packages": {"jax": "0.10.3", "numpy": "2.4.1"}}, ["jax 0.10.2 there, 0.10.3 here"]),
        (
            {"packages": {"jax": "0.10.2", "libtpu": "1"}},
            ["numpy 2.4.1 there, none here", "libtpu none there, 1 here"],
        ),
        ({"source_sha256": "f" * 64}, ["gnp's source 0123456789ab there, ffffffffffff here"]),
        (
            {"devices": "cpu × 4", "processes": 2},
            ["devices cpu × 8 there, cpu × 4 here", "processes 1 there, 2 here"],
        ),
        ({"mesh": "data=8 fsdp=1"}, ["mesh none there, data=8 fsdp=1 here"]),
        ({"xla_flags": {}}, ["JAX_ENABLE_X64 1 there, none here"]),
    ],
)
def test_differences(changes, lines):
    assert provenance.differences(ENVIRONMENT, ENVIRONMENT | changes) == lines


@pytest.fixture
def environment(monkeypatch):
    """A description that the test changes."""
    described = json.loads(json.dumps(ENVIRONMENT))
    monkeypatch.setattr(provenance, "describe", lambda mesh=None: described)
    return described


def steps(workdir):
    return [
        start["step"] for start in json.loads((workdir / "environment.json").read_text())["starts"]
    ]


def test_a_start_is_noted_where_something_changed(tmp_path, environment):
    workdir = epath.Path(tmp_path)
    assert provenance.record(workdir, 0, "first") == []
    (first,) = provenance.starts(workdir)
    assert first == {"step": 0, "time": first["time"], "command": "first", **ENVIRONMENT}
    assert first["time"].endswith("+00:00")

    before = (tmp_path / "environment.json").stat()
    assert provenance.record(workdir, 10, "second") == []
    assert (tmp_path / "environment.json").stat() == before, "written without need"

    environment["packages"]["jax"] = "0.10.3"
    assert provenance.record(workdir, 20, None) == ["jax 0.10.2 there, 0.10.3 here"]
    assert provenance.record(workdir, 30, None) == []
    environment["git"] = {"commit": "def", "dirty": True}
    assert provenance.record(workdir, 40, None) == []  # the source is the same
    assert steps(workdir) == [0, 20, 40]
    assert [start["command"] for start in provenance.starts(workdir)] == ["first", None, None]


def test_what_made_steps_that_are_made_anew_is_forgotten(tmp_path, environment):
    workdir = epath.Path(tmp_path)
    provenance.record(workdir, 0, None)
    environment["devices"] = "cpu × 1"
    provenance.record(workdir, 100, None)
    environment["devices"] = "cpu × 2"
    there_and_here = ["devices cpu × 8 there, cpu × 2 here"]
    assert provenance.record(workdir, 100, None) == there_and_here  # 8 made the first 100
    assert provenance.record(workdir, 100, None) == there_and_here
    assert steps(workdir) == [0, 100]
    environment["devices"] = "cpu × 8"
    assert provenance.record(workdir, 50, None) == []
    assert steps(workdir) == [0]
    environment["devices"] = "cpu × 1"
    assert provenance.record(workdir, 0, None) == []
    assert [start["devices"] for start in provenance.starts(workdir)] == ["cpu × 1"]


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[]", b'{"starts": 3}', b'{"starts": [3]}', b'{"starts": [{}]}', b"\xff\x00"],
)
def test_a_damaged_record_is_set_aside(tmp_path, environment, caplog, damaged):
    (tmp_path / "environment.json").write_bytes(damaged)
    (tmp_path / "environment.json.damaged").write_text("an earlier one")
    assert provenance.record(epath.Path(tmp_path), 7, None) == []
    assert "environment.json is damaged" in caplog.text
    assert (tmp_path / "environment.json.damaged").read_bytes() == damaged
    assert steps(tmp_path) == [7]


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path, environment, caplog):
    assert provenance.record(epath.Path(tmp_path / "gone"), 0, None) == []
    assert "is not noted in" in caplog.text and "No such file" in caplog.text

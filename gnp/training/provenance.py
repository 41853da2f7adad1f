"""What a run was made with: `environment.json` in its work directory."""

import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import subprocess
import tomllib
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

import gnp
from gnp.files import write_atomically

_log = logging.getLogger(__name__)

_FILE = "environment.json"
_SOURCE = pathlib.Path(gnp.__file__).resolve().parent
# The accelerators' libraries, which no requirement of ours names.
_ACCELERATOR = ("jaxlib", "jax-cuda", "jax-rocm", "nvidia-", "libtpu")
_GIT_SECONDS = 5.0
# Variables of JAX's that say where it writes, what it tells, and how processes find each other.
_NO_RESULT = re.compile("CACHE|DUMP|LOG|TRACE|ADDRESS|COORDINATOR|PROCESS|TIMEOUT|VISIBLE")
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Of a start, what tells nothing about its numbers: the source's hash tells more than the commit.
_NOTES = ("step", "time", "command", "git")


def describe(mesh: Mesh | None = None) -> dict[str, Any]:
    """What this process computes with, as JSON values, without names of hosts, users and folders.

    Args:
      mesh: the devices that it uses, by default all there are.

    Returns:
      "python" and "packages", versions ("packages" has gnp, what it requires, and the
      accelerators' libraries); "platform" (operating system, machine, CPU); "git", the "commit" of
      gnp's own repository and whether it is "dirty" (None where there is no repository);
      "source_sha256", of gnp's Python files; "devices", their kind and number; "processes";
      "mesh", its axes; "runtime", the version of the devices' runtime; "xla_flags", the
      environment variables of XLA and JAX that may change results.
    """
    devices = jax.devices() if mesh is None else list(mesh.devices.flat)
    return {
        "python": platform.python_version(),
        "platform": {"os": platform.system(), "machine": platform.machine(), "cpu": _cpu()},
        "packages": _packages(),
        "git": _git(),
        "source_sha256": source_sha256(),
        "devices": f"{devices[0].device_kind} × {len(devices)}",
        "processes": jax.process_count(),
        "mesh": mesh and " ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "xla_flags": _xla_flags(),
    }


def source_sha256() -> str:
    """SHA-256 over the names and the bytes of gnp's own Python files, in the names' order."""
    digest = hashlib.sha256()
    files = {path.relative_to(_SOURCE).as_posix(): path for path in _SOURCE.rglob("*.py")}
    for name, path in sorted(files.items()):
        data = path.read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def differences(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    words: tuple[str, str] = ("there", "here"),
) -> list[str]:
    """In what two descriptions differ that may change numbers: "jax 0.10.2 there, 0.10.3 here"."""
    a, b = _facts(there), _facts(here)
    return [
        f"{name} {a.get(name, 'none')} {words[0]}, {b.get(name, 'none')} {words[1]}"
        for name in {**a, **b}
        if a.get(name) != b.get(name)
    ]


def starts(workdir: epath.Path) -> list[dict[str, Any]]:
    """What `record` wrote of a run, the earliest start first; nothing where it cannot be read."""
    path = workdir / _FILE
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("starts"), list):
            raise ValueError("it has no list of starts")
        for start in found["starts"]:
            if not isinstance(start, dict) or not isinstance(start.get("step"), int):
                raise ValueError("a start in it has no step")
    except ValueError as error:
        _log.warning("%s is damaged and left aside: %s", path, error)
        return []
    return found["starts"]


def record(
    workdir: epath.Path, step: int, command: str | None, *, mesh: Mesh | None = None
) -> list[str]:
    """Notes with what a run is started; of several processes, only that which writes calls it.

    `environment.json` becomes {"starts": [{"step", "time" (UTC), "command", **describe()}, …]}. A
    start with all as it was before is not noted again, and one whose steps are all made anew is
    dropped. A damaged file is kept as `environment.json.damaged`. Where the file cannot be written
    the run goes on, with a warning.

    Args:
      workdir: the run's directory.
      step: the step that the run begins or goes on from.
      command: the command line.
      mesh: as in `describe`.

    Returns:
      The differences from what the steps before were made with (see `differences`): with any, what
      follows need not be bit for bit what it would have been.
    """
    path, here = workdir / _FILE, describe(mesh)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {"step": step, "time": now, "command": command, **here}
    try:
        before = starts(workdir)
        if not before and path.exists():
            path.replace(path.with_name(f"{_FILE}.damaged"))
        kept = [old for old in before if old["step"] < step]
        changed = differences(kept[-1], here) if kept else []
        if not kept or not _same(kept[-1], start):
            again = [old for old in before if old["step"] == step and _same(old, start)]
            kept.append(again[0] if again else start)
        if kept != before:
            write_atomically(path, json.dumps({"starts": kept}, indent=2) + "\n")
    except OSError as error:
        _log.warning("what the run is made with is not noted in %s: %s", path, error.strerror)
        return []
    return changed


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two starts differ in nothing but step, time and command."""
    start = ("step", "time", "command")
    return all(a.get(key) == b.get(key) for key in {*a, *b} if key not in start)


def _facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What may change numbers, by the name that a person is told."""
    facts: dict[str, Any] = {}
    for name, value in environment.items():
        if name in _NOTES or value is None:
            continue
        if isinstance(value, Mapping):
            facts |= value
        elif name == "source_sha256":
            facts["gnp's source"] = str(value)[:12]
        else:
            facts[name] = value
    return facts


def _packages() -> dict[str, str]:
    """Versions of gnp, of what it requires, and of what drives the devices."""
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = _normalised(distribution.metadata["Name"] or "")  # none: left by a broken update
        installed.setdefault(name, distribution.version)  # the first found is what is imported
    required = {
        _normalised(re.split(r"[^\w.-]", text, maxsplit=1)[0])
        for text in _requirements()
        if "extra ==" not in text
    }
    named = {
        name: version
        for name, version in sorted(installed.items())
        if name in required or name.startswith(_ACCELERATOR)
    }
    return {"gnp": gnp.__version__, **named}


def _requirements() -> list[str]:
    """What gnp requires: as its repository says, or as it was installed."""
    try:
        project = tomllib.loads((_SOURCE.parent / "pyproject.toml").read_text())["project"]
        return project["dependencies"]
    except (OSError, ValueError, KeyError):
        pass
    try:
        return importlib.metadata.requires("gnp") or []
    except importlib.metadata.PackageNotFoundError:
        return ["jax"]


def _normalised(name: str) -> str:
    """A distribution's name in the one spelling of several."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _git() -> dict[str, Any] | None:
    try:
        _run_git("ls-files", "--error-unmatch", "__init__.py")  # not a repository around a package
        changed = _run_git("status", "--porcelain", "--untracked-files=no")
        return {"commit": _run_git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(*arguments: str) -> str:
    # Those that say which repository: in a hook, another one.
    theirs = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in theirs}
    done = subprocess.run(
        ["git", *arguments],
        cwd=_SOURCE,
        env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=_GIT_SECONDS,
        text=True,
    )
    return done.stdout.strip()


def _cpu() -> str:
    """The CPU's model: XLA compiles for what its instructions are."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _xla_flags() -> dict[str, str]:
    variables = {}
    for name, text in sorted(os.environ.items()):
        if name in _FLAG_VARIABLES:
            # Where XLA writes does not change what it computes.
            flags = [flag for flag in text.split() if not re.search("dump|cache|_dir=", flag)]
            variables[name] = " ".join(flags)
        elif name == "NVIDIA_TF32_OVERRIDE" or (
            name.startswith("JAX_") and not _NO_RESULT.search(name)
        ):
            variables[name] = text
    return {name: text for name, text in variables.items() if text}

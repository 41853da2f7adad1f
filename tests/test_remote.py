"""A run whose work directory is in an object store, from its beginning to the export of its end."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from gnp.training import train
from tests.fake_gcs import fake_gcs
from tests.small_disk import ROOT
from tests.training.test_loop import make_config, read_rows

WORKDIR = "gs://bucket/runs/digits"

PROGRAM = f"""
import logging, sys
sys.path.insert(0, {str(ROOT)!r})
from gnp.training import train
from tests.training.test_loop import make_config
logging.basicConfig()
train(make_config(), {WORKDIR!r})
"""


def start(store, *command):
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | store.environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(store, *command):
    """Runs Python to its end; returns its output and what it says beside it."""
    with start(store, *command) as process:
        try:
            output, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    return output, errors


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="gs:// needs gcsfs")
def test_a_run_in_an_object_store_is_killed_and_continued(tmp_path):
    """While it saves; it ends as one in a local directory that nobody kills, bit for bit."""
    expected = train(make_config(), tmp_path / "run")
    with fake_gcs() as store:
        folder = WORKDIR.removeprefix("gs://bucket/")
        begun = f"{folder}/checkpoints/20/"
        with start(store, "-c", PROGRAM) as process:
            store.on_put = lambda name: name.startswith(begun) and process.kill()
            process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        assert any(name.startswith(begun) for name in store.objects)
        store.on_put = lambda name: None
        _, told = run(store, "-c", PROGRAM)
        assert f"{WORKDIR} cannot be locked" in told and "continues at step 10 of 29" in told
        result = json.loads(store.objects[f"{folder}/result.json"])
        assert result["params_sha256"] == expected["params_sha256"]
        assert result["test"]["loss"] == expected["test"]["loss"]

        rows = [json.loads(x) for x in store.objects[f"{folder}/metrics.jsonl"].splitlines()]
        for row in [*rows, *(local := read_rows(tmp_path / "run"))]:
            del row["wall_time"]
            row.pop("images_per_second", None)
        assert rows == local
        names = {name.removeprefix(f"{folder}/").split("/")[0] for name in store.objects}
        local_names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
        assert {name.partition(".out.")[0] for name in names} == {
            name.partition(".out.")[0] for name in local_names
        }

        output, _ = run(store, "-m", "gnp.evaluate", f"--workdir={WORKDIR}", "--json")
        assert json.loads(output)["test"]["error"] == result["test"]["error"]
        out = tmp_path / "weights.safetensors"
        run(store, "-m", "gnp.export", f"--workdir={WORKDIR}", f"--out={out}")
        assert sum(x.size for x in load_file(out).values()) == result["num_params"]

"""What Weights & Biases gets is what `metrics.jsonl` holds. Offline: no network is used."""

import json
import sys

import pytest
from etils import epath

from gnp import config as gnp_config
from gnp.errors import UserError
from gnp.training.metrics import MetricsWriter


def make_config():
    config = gnp_config.default()
    config.log.wandb, config.log.group = "a project", "a sweep"
    return config


def write(workdir, *, first, last):
    writer = MetricsWriter(workdir, step=first, config=make_config())
    for step in range(first + 1, last + 1):
        row = {"step": step, "epoch": step / 2, "wall_time": 1.5 * step}
        writer.write(row | {"split": "train", "loss": 1 / step, "grad_norm": None})
        if step % 2 == 0:
            writer.write(row | {"split": "test", "loss": 2 / step, "error": 0.5})
    writer.close()


def records(path):
    """What a file that `wandb sync` would send holds: LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""  # after the file's own header
    while place + 7 <= len(content):
        if 32_768 - place % 32_768 < 7:  # the rest of a block
            place += 32_768 - place % 32_768
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow  # its service takes seconds to start
def test_the_same_numbers_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = epath.Path(tmp_path) / "gr=zero,seed=0"
    workdir.mkdir()
    write(workdir, first=0, last=4)
    write(workdir, first=4, last=7)
    there = sorted(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))
    assert len(there) == 2 and len({path.name for path in there}) == 1  # one run, gone on with
    shown, runs = {}, []
    for record in (record for path in there for record in records(path)):
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            values = {
                item.key or item.nested_key[0]: item.value_json for item in record.history.item
            }
            values = {name: json.loads(value) for name, value in values.items()}
            shown |= {(values["step"], n): x for n, x in values.items() if "/" in n}
    written = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in ("loss", "error"):
            if name in row:
                written[row["step"], f"{row['split']}/{name}"] = row[name]
    assert shown == written and len(written) == 7 + 2 * 3
    assert {(run.project, run.run_group, run.display_name) for run in runs} == {
        ("a project", "a sweep", "gr=zero,seed=0")
    }
    fields = {item.key: item.value_json for item in runs[0].config.update}
    assert json.loads(fields["lr.base"]) == gnp_config.default().lr.base


def test_not_installed_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"is not installed; run pip install 'gnp\[wandb\]'"):
        MetricsWriter(tmp_path, step=0, config=make_config())


def test_without_a_project_it_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricsWriter(tmp_path, step=0, config=gnp_config.default()).close()

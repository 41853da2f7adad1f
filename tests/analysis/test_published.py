"""The papers' figures beside a run's."""

import collections
import csv
import pathlib

import pytest

from gnp.analysis import published
from gnp.config import GR_POLICIES
from tests.analysis.made_runs import make

FOLDER = pathlib.Path(published.__file__).parent / "published"
NAMES = {
    **{v: k for k, v in published.MODELS.items() if k != "vgg16_bn"},
    **{v: k for k, v in published.OPTIMIZERS.items()},
}


def gr(model="vit_ti", optimizer="adam", policy="off", warmup="40ep", data="cifar10", **fields):
    decay = {"weight_decay__kind": "decoupled", "weight_decay__value": 0.03}
    names = {"model__name": model, "optimizer__name": optimizer, "gr__policy": policy}
    return {**decay, **names, "lr__warmup": warmup, "data__name": data, **fields}


def swd(model, optimizer, kind, value, data="cifar10", **fields):
    decay = {"weight_decay__kind": kind, "weight_decay__value": value}
    names = {"model__name": model, "optimizer__name": optimizer, "data__name": data}
    return {**decay, **names, **fields}


def rows(file):
    lines = [x for x in (FOLDER / file).read_text().splitlines() if not x.startswith("#")]
    return list(csv.DictReader(lines))


def test_the_tables_are_whole_and_name_their_source():
    """Counts from the papers: models × optimizers × warmups × policies × data sets."""
    tables = collections.Counter(row["table"] for row in rows("gr.csv"))
    assert tables == {"1": 3 * 2 * 2 * 2 * 2, "2": 3 * 2 * 4 * 2, "4": 7 * 5 * 2, "5": 4 * 5}
    assert len(rows("swd.csv")) == 4 * 9
    assert (FOLDER / "gr.csv").read_text().startswith("# Zhao et al.")
    assert "arXiv:2406.09723" in (FOLDER / "gr.csv").read_text().splitlines()[0]
    assert (FOLDER / "swd.csv").read_text().startswith("# Xie et al.")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (gr(warmup="0st"), (15.94, 0.33, "GR 1")),
        (gr(), (14.82, 0.64, "GR 1")),
        (gr("vit_b", policy="none"), (12.36, 0.33, "GR 1")),
        (gr("vit_s", "rmsprop", "lambda", data="cifar100"), (37.74, 0.27, "GR 2")),
        (gr("swin_s", policy="r"), (11.68, 0.22, "GR 4")),
        (gr("cait_xxs24", policy="zero", data="cifar100"), (37.17, 0.41, "GR 4")),
        (gr("vit_b", data="tiny_imagenet"), (62.23, 0.21, "GR 5")),
        (gr("swin_t", policy="zero", data="imagenet"), (21.58, 0.34, "GR 5")),
        (gr("swin_t", policy="zero", data="imagenet2012"), (21.58, 0.34, "GR 5")),
        (gr(weight_decay__kind="l2"), (14.82, 0.64, "GR 1")),
        (swd("resnet18", "adam", "scheduled", 5e-4), (4.91, 0.04, "SWD 1")),
        (swd("resnet18", "adam", "decoupled", 0.5), (5.08, 0.07, "SWD 1")),
        (swd("resnet18", "adam", "l2", 5e-4), (6.53, 0.03, "SWD 1")),
        (swd("vgg16_bn", "sgd", "l2", 5e-4), (6.42, 0.02, "SWD 1")),
        (swd("densenet121", "padam", "l2", 5e-4, "cifar100"), (21.10, 0.23, "SWD 1")),
    ],
)
def test_the_published_figure_of_a_setting(tmp_path, fields, expected):
    found = published.find(make(tmp_path / "run", **fields))
    assert found is not None and (found.mean, found.std, found.table) == expected
    assert found.seeds == (3 if found.table == "SWD 1" else 5)


@pytest.mark.parametrize(
    "fields",
    [
        gr(model__width=64),  # a smaller model under the same name
        gr(model__pretrained="vit.safetensors"),
        gr(weight_decay__value=0.1),
        gr(weight_decay__kind="scheduled", weight_decay__value=5e-4),  # AdamS: not in the GR paper
        gr("vit_ti", "sgd"),
        gr(policy="zero", warmup="0st"),
        gr(data="digits"),
        gr("resnet50"),
        swd("resnet18", "adam", "scheduled", 1e-3),
        swd("resnet18", "adam", "none", 0.0),
        swd("resnet18", "adam", "l2", 5e-4, "cifar100"),
        swd("resnet18", "adam", "l2", 5e-4, lr__warmup="5ep"),
        swd("resnet18", "adam", "l2", 5e-4, gr__policy="none"),
    ],
)
def test_other_settings_have_none(tmp_path, fields):
    assert published.find(make(tmp_path / "run", **fields)) is None


def test_both_figures_of_one_setting_are_as_published(tmp_path):
    run = make(tmp_path / "run", **gr(policy="none", data="cifar100"))
    for table, mean in ((None, 39.28), ("GR 1", 39.28), ("GR 2", 39.38)):
        found = published.find(run, table)
        assert found is not None and found.mean == mean
    assert published.find(run, "GR 4") is None


def test_every_row_is_found_by_its_setting(tmp_path):
    """And so every name in the files is one of ours."""
    run = make(tmp_path / "run")
    for row in rows("gr.csv"):
        fields = {
            "model": {"name": NAMES[row["model"]]},
            "optimizer": {"name": NAMES[row["optimizer"]]},
            "data": {"name": row["dataset"]},
            "lr": {"warmup": "4ep" if row["lr_warmup"] == "yes" else "0st"},
            "gr": {"policy": row["gr_policy"]},
            "weight_decay": {"kind": "decoupled", "value": 0.03},
        }
        assert row["gr_policy"] in GR_POLICIES
        run.config.update(fields)
        found = published.find(run, f"GR {row['table']}")
        assert found is not None
        assert (found.mean, found.std) == (float(row["test_error_percent"]), float(row["std"]))


@pytest.mark.parametrize(
    ("optimizer", "kind", "expected"),
    [
        *(("adam", "l2", "Adam"), ("adam", "decoupled", "AdamW"), ("adam", "scheduled", "AdamS")),
        *(("sgd", "scheduled", "SGDS"), ("amsgrad", "l2", "AMSGrad")),
        *(("adam", "none", "Adam, no decay"), ("sgd", "coupled", "SGD, coupled decay")),
    ],
)
def test_methods_have_their_usual_names(tmp_path, optimizer, kind, expected):
    run = make(tmp_path / "run", optimizer__name=optimizer, weight_decay__kind=kind)
    assert published.method(run) == expected

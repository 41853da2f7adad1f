"""The README's commands and programs are what is run."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_program_with_a_plain_flax_model_runs_and_learns(capsys):
    program, *_ = blocks("python")
    assert set(re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE)) == {
        *("flax", "jax", "optax", "gnp")
    }
    assert re.findall(r"from gnp import (.*)", program) == ["transforms"]
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    first, *_, last = (dict(zip(*[iter(line.split()[1:])] * 2, strict=True)) for line in lines)
    assert float(last["loss"]) < 0.2 * float(first["loss"])
    assert (first["ratio"], last["ratio"]) == ("0", "1")


def test_quick_start_is_two_lines_that_ci_runs():
    quick_start = README[README.index("## Quick start") :]
    main_job, tests = re.search(r"```sh\n(.*?)```", quick_start, re.DOTALL)[1].splitlines()
    assert "python -m gnp.train --config=configs/digits.py" in main_job
    ci = (ROOT / ".ci" / "run").read_text().replace("--clear ", "").replace("--quiet ", "")
    assert main_job.count(" && ") == tests.count(" && ") == 2
    for part in [main_job.split(" && ")[2], *tests.split(" && ")]:
        assert f"\n{part}\n" in ci


def test_every_config_and_every_file_named_is_there():
    named = set(re.findall(r"(?:configs|scripts|gnp|\.github|\.ci)/[\w./]*\w", README))
    for path in named:
        assert (ROOT / path).exists(), path
    for path in (ROOT / "configs").glob("*.py"):
        assert f"configs/{path.name}" in named


def test_every_choice_is_named():
    from gnp import config, data, models

    for names in (
        *(config.OPTIMIZERS, config.WEIGHT_DECAYS, config.LR_SCHEDULES, config.GR_POLICIES),
        *(models.list_models(), data.list_sources()),
    ):
        for name in names:
            assert f"`{name}`" in README, name


def test_the_table_of_models_is_that_of_the_registry():
    from gnp import models

    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,]+).*?\| ([\d.]+).*?\|(?: ([\d,]+) \| ([\d.]+))?", README, re.M
    )
    table = {row[0]: row[1:] for row in rows if row[0] in models.list_models()}
    assert list(table) == list(models.list_models())
    for name, info in models.list_models().items():
        large = f"{info.large[0]:,}", f"{info.large[1]:.{2 + (info.takes == 'tokens')}f}"
        small = f"{info.small[0]:,}", f"{info.small[1]:.2f}"
        assert table[name] == (*large, *(small if info.takes == "images" else ("", "")))

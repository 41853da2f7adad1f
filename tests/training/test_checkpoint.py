"""Checkpoints: what is damaged is noticed, what does not fit is told, the right ones are kept."""

import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from test_loop import make_config, read_rows

from gnp.errors import UserError
from gnp.training import checkpoint, train
from gnp.training.checkpoint import FORMAT, Checkpoints, best_step
from gnp.training.checksum import checksum
from gnp.training.evaluation import evaluate_checkpoint, find_step
from gnp.training.experiment import make_experiment
from gnp.training.sharding import make_mesh
from gnp.training.state import params_sha256

FIRST_VERSION = pathlib.Path(__file__).parent / "checkpoint_format_1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(make_config(), workdir)


def copy(finished, tmp_path):
    """The run as if it had been killed between its last checkpoint and its result."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "run"


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def read(workdir):
    return Checkpoints(workdir).restore(make_experiment(make_config()).abstract_state)


def flip(path, generator):
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path, generator):
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def zero(path, generator):
    path.write_bytes(bytes(path.stat().st_size))


# --- Damage -------------------------------------------------------------------------------------


def damaged_alike(finished, tmp_path, caplog, damage, seed):
    """Whatever is done to a file: the state is that of one of the two checkpoints, bit for bit.

    Returns:
      The file, and whether it is the older one. Then the newer has been named in a warning.
    """
    workdir, _ = finished
    experiment = make_experiment(make_config())
    whole = Checkpoints(workdir)
    expected = {
        step: params_sha256(whole.restore(experiment.abstract_state, step)) for step in (20, 29)
    }
    generator = random.Random(seed)
    target = tmp_path / "run"
    shutil.copytree(workdir / "checkpoints", target / "checkpoints")
    path = generator.choice(files(target / "checkpoints" / "29"))
    damage(path, generator)
    caplog.clear()
    state = Checkpoints(target).restore(experiment.abstract_state)
    shutil.rmtree(target)
    step = int(state.step)
    assert params_sha256(state) == expected[step], (path, seed)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("gnp")]
    warned = any(f"{target / 'checkpoints' / '29'} is damaged" in x for x in told)
    assert warned == (step == 20), (path, told)
    return path.relative_to(target / "checkpoints" / "29"), step == 20


@pytest.mark.parametrize("damage", [flip, truncate, zero])
@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(
    finished, tmp_path, caplog, damage, seed
):
    damaged_alike(finished, tmp_path, caplog, damage, seed)


@pytest.mark.soak
@pytest.mark.parametrize("damage", [flip, truncate, zero])
def test_a_hundred_damaged_checkpoints(finished, tmp_path, caplog, damage):
    done = [damaged_alike(finished, tmp_path, caplog, damage, seed) for seed in range(100, 200)]
    # Of the others Orbax reads no byte, or not all.
    read = {"about/metadata", "state/manifest.ocdbt"}
    noticed = [older for file, older in done if str(file) in read or str(file.parent) == "state/d"]
    assert len(noticed) > 5 and all(noticed)


def test_the_values_are_verified_not_only_the_files(finished, tmp_path, caplog):
    """A checkpoint that Orbax reads without an error, but with other values than were saved."""
    workdir = copy(finished, tmp_path)
    state = read(workdir)
    kernel = state.params["head"]["kernel"]
    changed = kernel.at[3, 2].set(jnp.nextafter(kernel[3, 2], 9.0))  # in one last place
    params = state.params | {"head": state.params["head"] | {"kernel": changed}}
    path = workdir / "checkpoints" / "29"
    about = (path / "about" / "metadata").read_text()
    shutil.rmtree(path)
    writer = Checkpoints(workdir, keep=9)
    writer.save(29, state.replace(params=params))
    writer.close()
    (path / "about" / "metadata").write_text(about)
    assert int(read(workdir).step) == 20
    assert "the values of params/head/kernel are not those that were saved" in caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@st.composite
def changed(draw, about):
    """What a checkpoint tells of itself, with something else in one place, however deep."""
    if not isinstance(about, dict | list) or not about or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    places = range(len(about)) if isinstance(about, list) else sorted(about)
    place = draw(st.sampled_from(places))
    copied = about.copy()
    copied[place] = draw(changed(about[place]))
    return copied


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.soak)])
def test_whatever_a_checkpoint_tells_of_itself_is_a_line(finished, tmp_path, count):
    """With the checksum of just that, as whoever forges it would write."""
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / "29" / "about" / "metadata"
    like = make_experiment(make_config()).abstract_state
    about = json.loads(file.read_text())["content"]

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(changed(about))
    def forge(content):
        file.write_text(json.dumps({"content": content, "crc32c": checkpoint._crc32c(content)}))
        told = state = None
        try:
            state = Checkpoints(tmp_path, config=about["config"]).restore(like, 29)
        except UserError as error:
            told = str(error)
        if state is None:
            assert str(tmp_path / "checkpoints" / "29") in told
        else:  # what was changed is not read: another configuration has the same arrays
            assert content["arrays"] == about["arrays"] and int(state.step) == 29

    forge()


def test_a_run_continues_from_the_one_before(finished, tmp_path, caplog):
    whole, result = finished
    workdir = copy(finished, tmp_path)
    truncate(next((workdir / "checkpoints" / "29" / "state").glob("manifest*")), random.Random(0))
    again = train(make_config(), workdir)
    assert again["params_sha256"] == result["params_sha256"]
    assert "moved to" in caplog.text and (workdir / "damaged" / "29").is_dir()
    times = ("wall_time", "images_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in times} for row in read_rows(x)]
        for x in (whole, workdir)
    ]
    assert rows[0] == rows[1]
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["20", "29"]


def test_without_a_usable_one_it_is_an_error_and_no_fresh_start(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    for step in ("20", "29"):
        zero(workdir / "checkpoints" / step / "about" / "metadata", None)
    with pytest.raises(UserError, match=r"no checkpoint of .* can be read; the oldest: "):
        train(make_config(), workdir)
    with pytest.raises(UserError, match=r"can be read"):  # nor a second time
        train(make_config(), workdir)
    assert not (workdir / "result.json").exists()


@pytest.mark.slow
def test_one_that_is_asked_for_is_not_replaced(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    zero(workdir / "checkpoints" / "29" / "about" / "metadata", None)
    with pytest.raises(UserError, match=r"29 is damaged: .*; there are those of the steps \[20\]"):
        evaluate_checkpoint(make_config(), workdir, step=29)
    assert evaluate_checkpoint(make_config(), workdir, step=20)["step"] == 20
    assert evaluate_checkpoint(make_config(), workdir)["step"] == 20
    assert (workdir / "checkpoints" / "29").is_dir()  # only a run that writes moves it


# --- What does not fit --------------------------------------------------------------------------


def edit(workdir, change):
    """Changes what a checkpoint says of itself, consistently."""
    path = workdir / "checkpoints" / "29" / "about" / "metadata"
    content = json.loads(path.read_text())["content"]
    change(content)
    text = json.dumps({"content": content, "crc32c": checkpoint._crc32c(content)})
    path.write_text(text)


def test_one_of_a_newer_version(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    edit(workdir, lambda content: content.update(format=FORMAT + 1))
    with pytest.raises(UserError, match=r"newer version of gnp \(its format is 2, .* up to 1\)"):
        train(make_config(), workdir)


def test_one_of_a_version_without_a_number(tmp_path):
    (tmp_path / "checkpoints" / "10" / "default").mkdir(parents=True)
    with pytest.raises(UserError, match="without a format number"):
        read(tmp_path)


def test_one_of_another_model_says_what_differs(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    (workdir / "config.json").write_text(json.dumps(make_config(model__width=16).to_dict()))
    with pytest.raises(UserError) as error:
        train(make_config(model__width=16), workdir)
    assert "config.model.width: 12 there, 16 here" in str(error.value)
    assert "float32[1, 12] there, float32[1, 16] here" in str(error.value)
    assert "more" in str(error.value) and "\n" not in str(error.value)


def test_one_of_another_optimizer_says_what_is_missing(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    fields = {"optimizer__name": "sgd", "weight_decay__kind": "decoupled"}
    (workdir / "config.json").write_text(json.dumps(make_config(**fields).to_dict()))
    with pytest.raises(UserError) as error:
        train(make_config(**fields), workdir)
    assert "config.optimizer.name: 'adam' there, 'sgd' here" in str(error.value)


def test_the_first_format_is_read():
    """A checkpoint that the first version with a format number has written."""
    expected = json.loads((FIRST_VERSION / "expected.json").read_text())
    state = Checkpoints(FIRST_VERSION).restore(make_experiment(make_config()).abstract_state)
    assert int(state.step) == expected["step"]
    assert params_sha256(state) == expected["sha256"]


# --- The checksum -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8", "float16"])
def test_the_checksum_against_whole_numbers_of_any_length(dtype):
    x = np.random.RandomState(0).randint(0, 200, (3, 5, 7)).astype(jnp.dtype(dtype))
    size = x.dtype.itemsize
    bits = np.frombuffer(x.tobytes(), f"<u{size}").tolist()
    expected = sum(b * ((i * 0x9E3779B1 % 2**32) | 1) for i, b in enumerate(bits)) % 2**32
    assert int(checksum(jnp.asarray(x))) == expected


def test_the_checksum_does_not_depend_on_the_layout():
    mesh = make_mesh(4, 2, batch_size=8)
    x = jax.random.normal(jax.random.key(0), (16, 6))
    expected = int(checksum(x))
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec("data", "fsdp")):
        laid = jax.device_put(x, NamedSharding(mesh, spec))
        assert int(checksum(laid)) == expected


# --- What is kept -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_is_kept_beside_the_newest(tmp_path):
    fields = {"checkpoint__best": "test/error", "checkpoint__keep": 1, "eval__every": "4st"}
    train(make_config(lr__base=0.05, **fields), tmp_path)  # a rate at which it goes up and down
    errors = {row["step"]: row["error"] for row in read_rows(tmp_path, "test")}
    best = min(errors, key=errors.get)
    assert best not in (28, 29)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [best, 29]
    config = make_config(**fields)
    assert find_step(config, tmp_path, "best") == best
    values = evaluate_checkpoint(config, tmp_path, step=best)
    assert values["test"]["error"] == errors[best]


def test_steps_by_name(finished):
    workdir, config = finished[0], make_config()
    assert find_step(config, workdir, None) is None and find_step(config, workdir, "20") == 20
    with pytest.raises(UserError, match="write the number of a step, or best"):
        find_step(config, workdir, "bset")
    with pytest.raises(UserError, match=r"no config.checkpoint.best"):
        find_step(config, workdir, "best")


def test_the_best_of_rows():
    rows = [
        {"step": 1, "split": "test", "error": 0.5},
        {"step": 2, "split": "test", "error": 0.1},
        {"step": 3, "split": "test", "error": None},
        {"step": 4, "split": "test", "error": 0.2},
        {"step": 5, "split": "test", "error": 0.2},
        {"step": 4, "split": "train", "error": 0.0},
    ]
    assert best_step(rows, "test/error", [1, 2, 3, 4, 5]) == 2
    assert best_step(rows, "test/error", [1, 3, 4, 5]) == 4
    assert best_step(rows, "test/error", [3]) is None


def test_a_metric_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'test/eror'; did you mean 'test/error'\?"):
        train(make_config(checkpoint__best="test/eror"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_how_often_it_is_saved_may_change(finished, tmp_path):
    workdir = copy(finished, tmp_path)
    config = make_config(checkpoint__every="3min", checkpoint__keep=5, steps_per_call=3)
    assert train(config, workdir)["params_sha256"] == finished[1]["params_sha256"]

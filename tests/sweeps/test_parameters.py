"""What is written on the command line, and what it stands for."""

import numpy as np
import pytest

from gnp.errors import UserError
from gnp.sweeps.parameters import Distribution, parse_grid, parse_search, parse_seeds


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("off,none,zero", ["off", "none", "zero"]),
        (" off , none ", ["off", "none"]),
        ("0.01:0.1:0.03", ["0.01", "0.04", "0.07", "0.1"]),  # in binary 0.01 + 3 × 0.03 > 0.1
        ("0.01:0.099:0.03", ["0.01", "0.04", "0.07"]),
        ("3:1:-1", ["3", "2", "1"]),
        ("1e-3:3e-3:1e-3", ["0.001", "0.002", "0.003"]),
        ("100:300:1e2", ["100", "200", "300"]),
        ("1:3:1,10", ["1", "2", "3", "10"]),
        ("linspace(0,1,5)", ["0", "0.25", "0.5", "0.75", "1"]),
        ("logspace(1e-4,1e-2,3)", ["0.0001", "0.001", "0.01"]),
        ("logspace(1e-4,1e-2,5),1", ["0.0001", "0.000316228", "0.001", "0.00316228", "0.01", "1"]),
        ("[50%,75%],[30%,60%]", ["50%,75%", "30%,60%"]),
        ("train[:90%],train[:50%]", ["train[:90%]", "train[:50%]"]),
        ("pad_crop:1,rand_augment:2:9", ["pad_crop:1", "rand_augment:2:9"]),
        ("a=b", ["a=b"]),
    ],
)
def test_values(text, values):
    assert parse_grid([f"name={text}"]) == {"name": tuple(values)}


def test_logspace_has_equal_ratios():
    values = np.array(parse_grid(["x=logspace(2,486,6)"])["x"], float)
    np.testing.assert_allclose(values, 2 * 3.0 ** np.arange(6), rtol=1e-5)


def test_several_in_one_and_in_several():
    grid = {"gr": ("off", "zero"), "lr.base": ("1", "2"), "lr.drops": ("1;2",)}
    assert parse_grid(["gr=off,zero; config.lr.base=1,2", "lr.drops=[1;2];"]) == grid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gr", "--grid 'gr' is not of the form NAME=VALUES"),
        ("gr=", "is not of the form"),
        ("a b=1", "is not of the form"),
        ("gr=a,,b", "has an empty value"),
        ("gr=a;gr=b", "--grid has gr twice"),
        ("x=1:0:1", "no steps of 1 lead from 1 to 0; write START:STOP:STEP"),
        ("x=0:1:0", "no steps of 0 lead from 0 to 1"),
        ("x=0:1:1e-9", "has 1,000,000,001 values; at most 10,000"),
        ("x=linspace(0,1)", "write linspace(START,STOP,COUNT)"),
        ("x=linspace(0,1,a)", "write linspace(START,STOP,COUNT)"),
        ("x=linspace(0,1,2.5)", "COUNT is 2.5; it must be from 1 to 10,000"),
        ("x=linspace(0,1,1e9)", "COUNT is 1e9"),
        ("x=logspace(-4,-2,3)", "are the values themselves, and must be above 0"),
        ("x=uniform(0,1)", "is a distribution; write --search x=uniform(0,1)"),
        ("x=0:9999:1,1", "has more than 10,000 values"),
    ],
)
def test_mistakes_in_a_grid(text, message):
    with pytest.raises(UserError) as error:
        parse_grid([text])
    assert message in str(error.value)


def test_distributions():
    assert parse_search(["a=uniform(-1,2);b=loguniform(1e-4, 1e-2)", "c=int(1,5)"]) == {
        "a": Distribution("uniform(-1,2)", "uniform", -1.0, 2.0),
        "b": Distribution("loguniform(1e-4, 1e-2)", "loguniform", 1e-4, 1e-2),
        "c": Distribution("int(1,5)", "int", 1.0, 5.0),
    }
    text = "choice([a,b],c,1:3:1)"
    choices = ("a,b", "c", "1", "2", "3")
    assert parse_search([f"x={text}"]) == {"x": Distribution(text, "choice", choices=choices)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x=0.1", "is no distribution; write uniform(LOW,HIGH), loguniform(LOW,HIGH)"),
        ("x=lguniform(1,2)", "'lguniform'; did you mean 'loguniform'?"),
        ("x=uniform(1)", "write uniform(LOW,HIGH)"),
        ("x=uniform(2,1)", "LOW must be below HIGH"),
        ("x=uniform(1,1e999)", "LOW must be below HIGH"),
        ("x=loguniform(0,1)", "LOW must be above 0"),
        ("x=int(0.5,2)", "LOW and HIGH must be whole numbers"),
        ("x=choice(a,a)", "empty or comes twice"),
        ("x=choice()", "empty or comes twice"),
    ],
)
def test_mistakes_in_a_search(text, message):
    with pytest.raises(UserError) as error:
        parse_search([text])
    assert message in str(error.value)


def test_seeds():
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("3,7") == (3, 7)
    assert parse_seeds("3,") == (3,)
    for text in ("0", "a", "", ",", "1,1", "-1", "1:3", "99999"):
        with pytest.raises(UserError, match=f"--seeds={text}"):
            parse_seeds(text)

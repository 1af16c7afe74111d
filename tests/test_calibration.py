"""What is said of a spread: the right row of the measured file, and the right words."""

import json

import pytest

from restore import calibration, samplers
from restore.calibration import describe_spread, find_row, judge
from restore.method import Method


def row(sampler, evaluations, spread_error, spread=1.0, off=0.0, outside=0.0, **options):
    levels = {"50": 0.5, "80": 0.8, "95": 0.95}
    return {
        "name": sampler,
        "sampler": sampler,
        "options": options,
        "evaluations": evaluations,
        "coverage": {key: value - off for key, value in levels.items()},
        "intervals": {key: value - outside for key, value in levels.items()},
        "spread_error": spread_error,
        "spread": spread,
    }


ROWS = [
    {"name": "exact samples", "coverage": {}},
    row("diffpir", 20, 0.4, zeta=1.0),
    row("diffpir", 100, 0.7, zeta=1.0),
    row("diffpir", 20, 1.0, zeta=0.3),
    row("diffpir", 20, 0.3, zeta=1.0, dual=True),
    {"name": "x", "sampler": "dps", "options": {}, "error": "the sample is not finite"},
]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"rows": ROWS}))
    monkeypatch.setattr(calibration, "data_file", lambda: path)
    calibration._read_rows.cache_clear()
    yield
    calibration._read_rows.cache_clear()


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ({"spread_error": 1.05}, "samples"),
        ({"spread_error": 1.05, "spread": 1.3}, "spread only"),
        ({"spread_error": 1.05, "off": 0.2}, "spread only"),
        ({"spread_error": 1.05, "off": -0.2}, "spread only"),
        ({"spread_error": 0.95, "outside": 0.2}, "too narrow"),
        ({"spread_error": 0.95, "outside": -0.2}, "too wide"),
        ({"spread_error": 0.8}, "too narrow"),
        ({"spread_error": 1.2}, "too wide"),
        ({"spread_error": 0.4}, "estimates"),
    ],
)
def test_verdicts(numbers, verdict):
    assert judge(row("dps", 20, **numbers)) == verdict


def test_the_row_is_that_of_the_options_and_of_the_nearest_number_of_evaluations(measured):
    plain = Method("diffpir", "quad:20", {"zeta": 1.0, "lam": 3.0})
    assert find_row(plain, 20)["spread_error"] == 0.4 and find_row(plain, 4)["spread_error"] == 0.4
    assert find_row(plain, 44)["spread_error"] == 0.4 and find_row(plain, 46)["spread_error"] == 0.7  # by ratio
    assert find_row(Method("diffpir", 20, {"lam": 3.0}), 20)["spread_error"] == 1.0  # zeta's default
    assert find_row(Method("diffpir", 20, {"zeta": 1.0, "dual": True}), 20)["spread_error"] == 0.3
    assert find_row(Method("diffpir", 20, {"zeta": 0.7}), 20) is None
    assert find_row(Method("diffpir", 20, {"zeta": 0.3, "dual": True}), 20) is None
    assert find_row(Method("dps", 20, {"zeta": 5.0}), 20) is None  # its row has no numbers
    assert find_row(Method("ddrm", 20), 20) is None


def test_a_side_car_says_what_was_measured_and_warns_of_estimates_alone(measured):
    said = describe_spread(Method("diffpir", 20, {"zeta": 1.0}), 20)
    assert said["verdict"] == "estimates" and said["evaluations"] == 20 and said["spread_error"] == 0.4
    assert said["coverage"] == {"50": 0.5, "80": 0.8, "95": 0.95} == said["intervals"]
    assert "diffpir at 20 evaluations is too narrow by 2.5x" in said["caution"] and said["source"] in said["caution"]
    assert "caution" not in describe_spread(Method("diffpir", 20, {"zeta": 1.0}), 100)
    assert describe_spread(Method("ddrm", 20), 20) is None


def test_the_shipped_file_knows_the_samplers_and_its_controls():
    calibration._read_rows.cache_clear()
    rows = json.loads(calibration.data_file().read_text(encoding="utf-8"))["rows"]
    named = {each["name"]: each for each in rows}
    assert judge(named["exact samples"]) == "samples" and judge(named["posterior mean"]) == "estimates"
    assert {each["sampler"] for each in rows if "sampler" in each} == set(samplers.SAMPLERS) - {*samplers.DETERMINISTIC}
    for each in rows:
        if "sampler" in each:
            samplers.check_parameters(each["sampler"], each["options"], complete=False)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("fastdips", {"admm_steps": 0}),  # which ignores y
        ("fastdips", {"epsilon": None}),
        ("ddrm", {"eta_b": 0.2}),
        ("ddnm", {"travel_repeat": 3}),
        ("pigdm", {"eta": 0.0}),
        ("pnpdm", {"eta": 0.0}),
    ],
)
def test_options_that_change_the_spread_are_no_row_of_the_defaults(sampler, options):
    calibration._read_rows.cache_clear()
    assert find_row(Method(sampler, 100), 100) is not None
    assert find_row(Method(sampler, 100, options), 100) is None

"""Load prediction from integer histories."""

import json

import numpy as np
import pytest

from moetrain.parallel.placement.predict import Exponential, LastStep, SlidingWindow, prediction_error

PREDICTORS = {"window": lambda: SlidingWindow(3), "exponential": lambda: Exponential(0.75), "last": LastStep}


@pytest.fixture(params=PREDICTORS.values(), ids=PREDICTORS)
def predictor(request):
    return request.param()


def test_nothing_is_predicted_without_a_history(predictor):
    assert predictor.predict() is None and predictor.mean() is None
    predictor.push(np.array([[1, 2]]))
    assert predictor.predict().tolist() == [[1, 2]] and predictor.predict().dtype == np.int64
    predictor.clear()
    assert predictor.predict() is None


def test_constant_loads_are_predicted_exactly(predictor):
    for _ in range(20):
        predictor.push(np.array([7, 123456789, 0]))
    assert predictor.predict().tolist() == [7, 123456789, 0]


def test_state_survives_a_checkpoint(predictor):
    for step in range(5):
        predictor.push(np.array([[step, 3 * step], [17, step * step]]))
    other = type(predictor).__new__(type(predictor))
    other.__dict__.update(predictor.__dict__)
    other.clear()
    other.load_state(json.loads(json.dumps(predictor.state())))
    for both in (predictor, other):
        both.push(np.array([[1, 0], [0, 5]]))
    assert np.array_equal(other.mean(), predictor.mean()) and np.array_equal(other.predict(), predictor.predict())


def test_an_empty_state_is_no_history(predictor):
    predictor.load_state(predictor.state())
    assert predictor.predict() is None


def test_what_is_pushed_is_not_shared(predictor):
    counts = np.array([4, 4])
    predictor.push(counts)
    counts[:] = 0
    assert predictor.predict().tolist() == [4, 4]


def test_window_forgets_and_rounds_halves_up():
    window = SlidingWindow(2)
    for load in (1000, 3, 4):
        window.push(np.array([load]))
    assert window.mean().tolist() == [3.5] and window.predict().tolist() == [4]


def test_last_step():
    last = LastStep()
    last.push(np.array([1]))
    last.push(np.array([9]))
    assert last.predict().tolist() == [9]


def test_exponential_weights():
    average = Exponential(0.5)
    for load in (8, 4, 0):
        average.push(np.array([load]))
    assert average.mean().tolist() == [3.0] and average.predict().tolist() == [3]


@pytest.mark.parametrize("make", [lambda: SlidingWindow(0), lambda: Exponential(1.0), lambda: Exponential(-0.1)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_prediction_error():
    assert prediction_error(np.array([5, 5]), np.array([5, 5])) == 0
    assert prediction_error(np.array([10, 0]), np.array([0, 10])) == 2
    assert prediction_error(np.array([0, 0]), np.array([1, 0])) == 0

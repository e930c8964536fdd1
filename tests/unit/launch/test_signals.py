"""Requests to stop."""

import os
import signal

import pytest

from moetrain.launch import signals
from moetrain.launch.signals import STOP_SIGNALS, StopRequest, stop_on_signals


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    return clock


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_interrupts_nothing(number):
    with stop_on_signals() as stop:
        assert stop() is None
        os.kill(os.getpid(), number)
        assert stop() == number


def test_the_handlers_before_the_block_are_back_after_it():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.raises(RuntimeError), stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_the_same_ctrl_c_arriving_twice_is_one_request(clock):
    stop = StopRequest()
    stop.handle(signal.SIGINT, None)
    clock.now += 0.9
    stop.handle(signal.SIGINT, None)
    assert stop() == signal.SIGINT


def test_a_second_ctrl_c_later_interrupts_at_once(clock):
    stop = StopRequest()
    stop.handle(signal.SIGINT, None)
    clock.now += 1.1
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_only_ctrl_c_interrupts_at_once_and_the_first_request_names_the_exit_code(clock):
    stop = StopRequest()
    stop.handle(signal.SIGUSR1, None)
    clock.now += 5
    stop.handle(signal.SIGTERM, None)
    assert stop() == signal.SIGUSR1


def test_every_signal_is_forwarded_also_the_one_that_interrupts(clock):
    forwarded = []
    stop = StopRequest(forwarded.append)
    stop.handle(signal.SIGINT, None)
    clock.now += 2
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)
    assert forwarded == [signal.SIGINT, signal.SIGINT]

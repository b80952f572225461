import numpy
import psutil

from qwenvl import usage


def test_no_more_ram_can_be_had_than_there_is():
    assert 0 < usage.free_ram() < psutil.virtual_memory().total


def test_the_peak_stays_when_what_was_held_is_gone():
    start = usage.peak_bytes("cpu")
    held = numpy.ones(1 << 29, numpy.uint8)
    peak = usage.peak_bytes("cpu")
    del held
    assert peak >= 1 << 29
    assert usage.peak_bytes("cpu") >= peak >= start

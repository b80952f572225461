import asyncio
import threading

import pytest

from qwenvl.remote.loop import Loop


async def forever(begun, given_up):
    begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        given_up.append(True)


def test_work_runs_in_another_thread_and_its_outcome_comes_back():
    async def where():
        return threading.current_thread()

    async def fails():
        raise ValueError("so it is")

    with Loop() as loop:
        assert loop.run(where()) is not threading.current_thread()
        with pytest.raises(ValueError, match="so it is"):
            loop.run(fails())


def test_cancel_ends_what_is_under_way_before_it_returns():
    given_up = []
    with Loop() as loop:
        begun = [threading.Event() for _ in range(3)]
        futures = [loop.start(forever(entry, given_up)) for entry in begun]
        assert all(entry.wait(5) for entry in begun)
        loop.cancel()
        assert given_up == [True] * 3
        assert all(future.cancelled() for future in futures)


def test_nothing_of_it_is_left():
    before = threading.active_count()
    with Loop() as loop:
        loop.run(asyncio.sleep(0))
    assert threading.active_count() == before

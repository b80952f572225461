import threading

import pytest
from waiting import until

from qwenvl import process
from qwenvl.process import Turns


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(process, "LOOK_EVERY_S", 0.01)


@pytest.fixture
def there():
    """Turns, and a run of another thread that is under way until the event is set."""
    taken = Turns()
    began, over = threading.Event(), threading.Event()

    def run():
        taken.take()
        began.set()
        over.wait(10)
        taken.end()

    thread = threading.Thread(target=run)
    thread.start()
    began.wait(10)
    yield taken, over
    over.set()
    thread.join(10)


def test_who_waits_for_a_turn_can_be_cancelled_and_holds_nothing_then(there):
    taken, over = there
    looked = []

    def check():
        looked.append(1)
        if len(looked) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taken.take(check)
    assert len(looked) == 3
    over.set()
    ended = []
    thread = threading.Thread(target=lambda: (taken.take(), taken.end(), ended.append(1)))
    thread.start()
    assert until(lambda: ended), "the turn was free"


def test_what_may_wait_is_done_at_the_end_of_the_run_and_nobody_waits_for_it(there):
    taken, over = there
    done = []
    taken.when_idle(lambda: done.append(threading.current_thread()))
    assert done == []
    over.set()
    assert until(lambda: done)
    assert done[0] is not threading.current_thread()


def test_nothing_of_it_is_done_in_the_middle_of_ones_own_run():
    taken, done = Turns(), []
    taken.take()
    taken.when_idle(lambda: done.append(1))
    with taken.alone():
        pass
    assert done == []
    taken.end()
    assert done == [1]
    taken.when_idle(lambda: done.append(2))
    assert done == [1, 2]


def test_what_comes_while_somebody_else_is_alone_is_done_after_it():
    taken, done = Turns(), []
    inside, leave = threading.Event(), threading.Event()

    def clear():
        with taken.alone():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=clear)
    thread.start()
    inside.wait(10)
    taken.when_idle(lambda: done.append(1))
    assert done == []
    leave.set()
    thread.join(10)
    assert done == [1]


def test_what_is_done_later_may_ask_for_more():
    taken, done = Turns(), []
    taken.take()
    taken.when_idle(lambda: (done.append(1), taken.when_idle(lambda: done.append(2))))
    taken.end()
    assert done == [1, 2]

"""Whom the others wait for, and what is said of it."""

import os
import subprocess
import sys
import time

import pytest

from dense2conv.parallel.position import Beat, Place, Position, beat, blame, waited_for

HERE = Place.own()
ELSEWHERE = Place("another", 1)


def at(number: int, waits: bool = True, ending: bool = False) -> Beat:
    return Beat(7, "update", 12, number, 33.4, "training/optim.py:9", waits, ending, "")


@pytest.mark.parametrize(
    ("beats", "silent", "ranks"),
    [
        ([at(5), at(5), at(5, waits=False)], [], [2]),  # computes while the others wait for it
        ([at(6), at(5), at(6, waits=False)], [], [1]),  # a phase behind
        ([at(6), at(5), at(6)], [2], [2]),  # nothing heard of it
        ([at(6), None, at(5)], [], [1]),
        ([at(6), at(5), at(5)], [0, 2], [0, 2]),
        ([at(4, ending=True), at(5), at(5, waits=False)], [], [2]),  # a victim is not to blame
        ([at(5), at(5)], [], [0, 1]),
        ([at(5)], [], [0]),
    ],
)
def test_whom_the_others_wait_for(beats, silent, ranks):
    assert waited_for(beats, silent) == ranks


def test_a_process_that_hangs_is_told_with_its_line_and_the_remedy():
    text = blame([at(5), at(4)], [], [HERE, ELSEWHERE], 300)
    assert text == (
        "rank 1 on another (process 1) hangs in update of step 12, for 33 s now at training/optim.py:9; "
        "look at that host, its disk and its device, then carry on with resume=true; if it needs that "
        "long, raise parallel.timeout_s=300"
    )


def test_processes_that_all_wait_are_told_to_try_the_network():
    text = blame([at(5)] * 12, [], [ELSEWHERE] * 12, 300)
    assert text.startswith("all 12 processes, rank 0 on another (process 1), rank 1 on")
    assert "rank 7 on another (process 1) and 4 more, hang in update of step 12" in text
    assert "dense2conv doctor" in text


def test_what_became_of_a_silent_process_is_told_where_it_can_be_known():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        place = Place(HERE.host, child.pid)
        assert place.is_sibling() is False  # but a child
        assert place.state() in "RSD"
        child.kill()
    assert place.state() == ""
    for there, text in (
        (place, "was killed, last seen in update of step 12"),
        (ELSEWHERE, "fell silent: killed, stopped or hung, last seen in update"),
    ):
        assert text in blame([at(5), at(5)], [1], [HERE, there], 300)
    assert ELSEWHERE.is_sibling() is False


def test_a_sibling_is_known():
    show = "import os; print(os.getpid(), flush=True); input()"
    ask = (
        "from dense2conv.parallel.position import Place; import sys; own = Place.own(); "
        "print(Place(own.host, int(sys.argv[1])).is_sibling())"
    )
    with subprocess.Popen([sys.executable, "-c", show], stdin=-1, stdout=-1, text=True) as first:
        pid = first.stdout.readline().strip()
        done = subprocess.run([sys.executable, "-c", ask, pid], capture_output=True, text=True)
        first.kill()
    assert done.stdout.strip() == "True"


def test_a_sign_of_life_says_where_this_process_is():
    position = Position()
    assert beat(1, position, False).where == "start"
    position.enter("reading images", 3)
    position.found = "NaN"
    time.sleep(0.02)
    found = beat(2, position, True)
    assert (found.ordinal, found.where, found.number) == (2, "reading images of step 3", 1)
    assert (found.ending, found.found, found.waits) == (True, "NaN", True)
    assert found.seconds >= 0.02
    assert found.line.startswith(f"parallel{os.sep}position.py:")


def test_a_phase_costs_next_to_nothing():
    position = Position()
    began = time.perf_counter()
    for step in range(10_000):
        position.enter("update", step)
    assert (time.perf_counter() - began) / 10_000 < 1e-4  # seconds; a step enters four

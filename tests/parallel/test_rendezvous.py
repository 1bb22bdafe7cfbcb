"""The meeting before the connection, in threads of this process: what is told to whom, and how often it is asked."""

import errno
import socket
import threading
import time
from contextlib import contextmanager
from itertools import pairwise

import pytest

from eurollm_jax.parallel import hub, rendezvous
from eurollm_jax.parallel.rendezvous import Arrival, absence, come, receive, wait_for_service
from tests.processes import free_port


@contextmanager
def coming(address, *arrivals, seconds=20):
    """Each in a thread of its own; a list of what each is told, or what keeps it from being told."""
    told = [None] * len(arrivals)

    def tell(number):
        try:
            told[number] = come(address, arrivals[number], seconds)
        except ConnectionError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(len(arrivals))]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        for thread in threads:
            thread.join()


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(rendezvous, "LATE_SECONDS", 1.0)
    return f"localhost:{free_port()}"


def test_process_0_hears_all_and_tells_all_what_it_makes_of_it(address):
    heard = []

    def judge(arrivals, fault):
        heard.extend(arrivals)
        return {"fault": fault and fault.what, "there": [arrival is not None for arrival in arrivals]}

    own = Arrival(0, 4, "host0", {"said": "by 0"})
    others = [Arrival(process, 4, f"host{process}", {"said": "x" * 300_000}) for process in (1, 2)]
    with coming(address, *others) as told:
        verdict = receive(address, own, 2.0, judge)
    assert verdict == {"fault": None, "there": [True, True, True, False]}
    assert told == [verdict, verdict]
    assert heard == [own, *others, None]
    with pytest.raises(ConnectionError, match=f"process 0 cannot be reached at {address} within 0.3 s"):
        come(address, others[0], 0.3)


def test_a_second_process_0_on_another_host_is_told_by_the_first(address):
    """Its own port is free there; but the address leads it to the first."""
    second = Arrival(0, 3, "elsewhere")
    with coming(address, second) as told:
        verdict = receive(address, Arrival(0, 3, "here"), 20, lambda arrivals, fault: fault.what)
    assert verdict == "process 0 of 3 is there twice, on here and on elsewhere"
    assert told == [verdict]


def test_what_is_too_long_for_a_process_is_not_kept(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "LONGEST", 100_000)
    with coming(address, Arrival(1, 2, "host1", "x" * 300_000), seconds=1) as told:
        found = receive(address, Arrival(0, 2, "host0"), 1.5, lambda arrivals, fault: arrivals[1] is None)
    assert found
    assert "does not answer as one that waits for others" in told[0]


def test_many_come_over_one_connection_each(address, monkeypatch):
    """That begins when they are there already."""
    many, opened, create = 100, [], socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *to: opened.append(create(*to)) or opened[-1])
    others = [Arrival(process, many, f"host{process // 8}") for process in range(1, many)]
    with coming(address, *others) as told:
        assert receive(address, Arrival(0, many, "host0"), 20, lambda arrivals, fault: None not in arrivals)
    assert told == [True] * (many - 1)
    assert len(opened) == many  # process 0 visits itself


def test_process_0_may_stand_still_for_longer_than_a_try(address, monkeypatch):
    """Those that are connected stay so: were they to come again, the first time would look like an end."""
    hear, slept = rendezvous._Hall.hear, []

    def late(hall, line):
        if not slept:
            slept.append(True)
            time.sleep(1)
        return hear(hall, line)

    monkeypatch.setattr(rendezvous._Hall, "hear", late)
    monkeypatch.setattr(rendezvous, "TRY_SECONDS", 0.2)
    with coming(address, Arrival(1, 3, "host1"), Arrival(2, 3, "host2")) as told:
        found = receive(address, Arrival(0, 3, "host0"), 20, lambda arrivals, fault: [fault, None in arrivals])
    assert found == [None, False]
    assert told == [found, found]


def test_process_0_listens_where_it_is_bound_to(address):
    """And is reached at the address that leads there: of another port, where there is a forwarder."""
    bound = f"0.0.0.0:{address.rpartition(':')[2]}"
    with coming(address, Arrival(1, 2, "host1")) as told:
        verdict = receive(address, Arrival(0, 2, "host0"), 20, lambda _, fault: fault, bound=bound)
    assert told == [verdict] == [None]
    elsewhere = f"localhost:{free_port()}"
    found = receive(elsewhere, Arrival(0, 2, "host0"), 0.5, lambda _, fault: fault.what, bound=address)
    assert found == f"process 0 is on host0, and {elsewhere} does not lead to it"


def test_too_few_files_are_no_absence(address, monkeypatch):
    def full(self):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", full)
    fault = receive(address, Arrival(0, 2, "host0"), 20, lambda _, fault: fault)
    assert fault.what == "process 0 on host0 may open too few files for 2 processes"
    assert not fault.lost


def test_who_waits_for_process_0_asks_less_and_less_often(monkeypatch):
    """512 processes that wait for a minute ask fewer than 500 times a second in its last part."""
    now, asked = [0.0], []

    def refuse(*_):
        asked.append(now[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(rendezvous.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(ConnectionError, match=r"within 60 s \(connection refused\)"):
        come("nowhere:1", Arrival(1, 2, "host1"), 60)
    assert max(after - before for before, after in pairwise(asked[:10])) < 0.1
    assert 512 * sum(when > 30 for when in asked) / 30 < 500


NODES = [f"nid{number:03d}" for number in range(1, 5)]
ABSENCES = [
    ([0, 1, 2, 3], NODES, None),
    ([0, 1, 3], [], "process 2 of 4 has not come within 9 s (those that came are on nid001, nid002)"),
    ([0, 1, 3], NODES[:2], "process 2 of 4 has not come within 9 s (those that came are on nid001, nid002)"),
    ([0, 1], NODES[:2], "2 of 4 processes (2, 3) have not come within 9 s (none came from nid002)"),
    ([0, 1], ["n1", "n2"], "2 of 4 processes (2, 3) have not come within 9 s (those that came are on nid001)"),
]


@pytest.mark.parametrize(("came", "nodes", "said"), ABSENCES)
def test_who_has_not_come_is_named_and_the_node_that_nobody_came_from(came, nodes, said):
    arrivals = [Arrival(process, 4, NODES[process // 2]) if process in came else None for process in range(4)]
    fault = absence(arrivals, 9, nodes)
    assert (fault and fault.what) == said


def test_of_many_that_have_not_come_the_first_are_named():
    fault = absence([Arrival(0, 512, "nid001"), *[None] * 511], 300, [f"nid{number:03d}" for number in range(1, 65)])
    named = "nid002, nid003, nid004, nid005, nid006, nid007 and 57 more"
    assert fault.what == (
        f"511 of 512 processes (1, 2, 3, 4, 5, 6 and 505 more) have not come within 300 s (none came from {named})"
    )
    assert fault.lost


def test_the_port_is_free_for_jax_afterwards(address):
    """Though process 0 has closed its connections first, which linger."""
    with coming(address, Arrival(1, 2, "host1")):
        receive(address, Arrival(0, 2, "host0"), 20, lambda arrivals, fault: "begin")
    with pytest.raises(ConnectionError, match=f"has not begun to connect all at {address} within 0.1 s"):
        wait_for_service(address, 0.1)
    with hub.listening(int(address.rpartition(":")[2]), 2):
        wait_for_service(address, 20)


def test_addresses_are_divided_at_the_port():
    assert rendezvous.divided("nid001:61440") == ("nid001", 61440)
    assert rendezvous.divided("[::1]:77") == ("::1", 77)

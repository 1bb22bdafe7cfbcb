"""Real signals to real processes, and the room that a run leaves before its time limit."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import StoppedError
from eurollm_jax.parallel.mesh import Layout, MeshConfig
from eurollm_jax.training.stopping import AGAIN_SECONDS, Stopping, Wish

HERE = Path(__file__).parent
LIMIT = 120.0


@pytest.fixture(scope="module")
def stops(tmp_path_factory):
    """The processes of stops.py, all under way at once."""
    folder = tmp_path_factory.mktemp("stops")
    command = [sys.executable, str(HERE / "stops.py"), str(folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pids = {}
    for line in server.stdout:
        if line == b"all\n":
            break
        name, pid = line.decode().split()
        pids[name] = int(pid)
    yield Stops(folder, pids)
    server.stdin.close()
    server.wait(LIMIT)
    server.stdout.close()


class Stops:
    def __init__(self, folder, pids):
        self.folder, self.pids = folder, pids

    def said(self, name):
        """(step, wish, reason) after each step so far."""
        path = self.folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(step), wish, reason) for step, wish, reason in (line.split(" ", 2) for line in lines)]

    def send(self, name, number):
        os.kill(self.pids[name], number)

    def until(self, condition):
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def until_trained(self, name):
        self.until(lambda: len(self.said(name)) > 3)

    def until_ended(self, name):
        """Children are reaped by their parent when all is over: until then one that has ended is a zombie."""
        self.until(lambda: self.state(name) == "Z")

    def state(self, name):
        return Path(f"/proc/{self.pids[name]}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_what_is_saved_at_once(number):
    """The evaluation at the end, which may take longer than a scheduler waits."""
    with Stopping(Layout(MeshConfig().build())) as stopping:
        with pytest.raises(StoppedError, match=f"stopped by {number.name}; all is saved"), stopping.at_once():
            signal.raise_signal(number)
        with pytest.raises(StoppedError), stopping.at_once():  # it came before
            pytest.fail("went on")
        assert stopping.answer() is Wish.STOP


@pytest.mark.parametrize(("name", "number"), [("terminated-0", signal.SIGTERM), ("signalled-0", signal.SIGUSR1)])
def test_a_signal_ends_the_run_after_the_step_that_is_under_way(stops, name, number):
    stops.until_trained(name)
    before = len(stops.said(name))
    stops.send(name, number)
    stops.until_ended(name)
    *steps, last = stops.said(name)
    assert last == (len(steps) + 1, "STOP", number.name)
    assert all(wish == "NONE" for _, wish, _ in steps)
    assert len(steps) >= before


def test_a_signal_that_a_scheduler_sends_twice_is_one(stops):
    stops.until_trained("repeated-0")
    stops.send("repeated-0", signal.SIGTERM)
    stops.send("repeated-0", signal.SIGTERM)
    stops.until_ended("repeated-0")
    assert stops.said("repeated-0")[-1][1:] == ("STOP", "SIGTERM")


def test_a_second_signal_ends_what_does_not_come_to_an_end(stops):
    name = "insisted-0"
    stops.until_trained(name)
    stops.send(name, signal.SIGTERM)
    stops.until(lambda: stops.said(name)[-1][1] == "STOP")
    time.sleep(AGAIN_SECONDS + 1)
    assert stops.state(name) != "Z"
    stops.send(name, signal.SIGTERM)
    stops.until_ended(name)


def test_a_signal_to_one_process_stops_all_after_the_same_step(stops):
    stops.until_trained("one_of_two-1")
    stops.send("one_of_two-1", signal.SIGTERM)
    for name in ("one_of_two-0", "one_of_two-1"):
        stops.until_ended(name)
    said = stops.said("one_of_two-0")
    assert said == stops.said("one_of_two-1")
    assert [wish for _, wish, _ in said[:-1]] == ["NONE"] * (len(said) - 1)
    assert said[-1][1:] == ("STOP", "SIGTERM")


def test_a_time_limit_that_one_process_is_near_stops_all_after_the_same_step(stops):
    for name in ("limited-0", "limited-1"):
        stops.until_ended(name)
    assert stops.said("limited-0") == stops.said("limited-1")
    assert stops.said("limited-0")[-1][1:] == ("STOP", "its time limit")


def test_the_first_process_says_when_all_save(stops):
    for name in ("saving-0", "saving-1"):
        stops.until_ended(name)
    said = stops.said("saving-1")
    assert said == stops.said("saving-0")
    assert len(said) == 20
    assert {wish for _, wish, _ in said} == {"SAVE"}


@pytest.fixture(scope="module")
def layout():
    return Layout(MeshConfig().build())


@pytest.mark.parametrize(("left", "expected"), [(90, Wish.STOP), (120, Wish.NONE)])
def test_the_limit_leaves_room_for_three_steps_two_saves_and_half_a_minute(layout, left, expected):
    stopping = Stopping(layout, time_limit=1000, began=time.perf_counter() - 1000 + left)
    for seconds in (1, 10, 2):
        stopping.stepped(seconds)
    for seconds in (20, 3):
        stopping.saved(seconds)
    stopping.ask()
    assert stopping.answer() is expected  # 3 * 10 + 2 * 20 + 30 = 100


def test_the_limit_leaves_room_for_an_evaluation(layout):
    stopping = Stopping(layout, time_limit=1000, began=time.perf_counter() - 1000 + 31.5)
    stopping.ask()
    assert stopping.answer() is Wish.NONE
    time.sleep(2)  # the evaluation
    stopping.ask()
    assert stopping.answer() is Wish.STOP


def test_a_save_by_the_clock_is_wished_for_until_it_is_done(layout):
    stopping = Stopping(layout, save_minutes=0.5 / 60)
    assert stopping.answer() is Wish.NONE
    time.sleep(0.6)
    assert stopping.answer() is Wish.SAVE
    assert stopping.answer() is Wish.SAVE
    stopping.saved(0.1)
    assert stopping.answer() is Wish.NONE


def test_handlers_are_as_they_were_before(layout):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Stopping(layout):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


READING = """
import sys
from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture

if __name__ == "__main__":
    loader = open_data(DataConfig(sys.argv[1], Mixture.proportional(), 32, workers=2), 1000).loader(0, 16)
    print(next(loader)[0], flush=True)
    for line in sys.stdin:
        print(next(loader)[0], flush=True)
    loader.close()
"""


def test_worker_processes_go_on_reading_when_all_are_asked_to_stop(store, tmp_path):
    """From their first moment on, and they end with the loader."""
    script = tmp_path / "reading.py"
    script.write_text(READING)
    command = [sys.executable, str(script), str(store.path)]
    expected = open_data(DataConfig(str(store.path), Mixture.proportional(), 32), 1000).loader(0, 16)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        limit = time.monotonic() + LIMIT
        signalled = set()
        while len(signalled) < 2:  # each at once when it is there
            assert time.monotonic() < limit
            time.sleep(0.001)
            for child in workers_of(process.pid) - signalled:
                for number in (signal.SIGTERM, signal.SIGUSR1):
                    os.kill(child, number)
                signalled.add(child)
        assert int(process.stdout.readline()) == next(expected)[0]
        for _ in range(12):  # more than what was read ahead
            for child in signalled:
                os.kill(child, signal.SIGTERM)
            process.stdin.write("next\n")
            process.stdin.flush()
            assert int(process.stdout.readline()) == next(expected)[0]
        process.stdin.close()
        assert process.wait(LIMIT) == 0
    assert not any(Path(f"/proc/{child}").exists() for child in signalled)


def workers_of(pid):
    """A thread's children are its own."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            for child in (thread / "children").read_text().split():
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
    return found

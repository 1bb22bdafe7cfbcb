"""Real processes that hold a run directory and are killed or stopped; other hosts are other names for this one."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from eurollm_jax.errors import StoppedError, UserError
from eurollm_jax.training import lock
from eurollm_jax.training.lock import locked

LIMIT = 60.0
BEAT, LEASE = 0.1, 1.5

HOLDING = """
import fcntl, socket, sys
from pathlib import Path
from eurollm_jax.errors import UserError
from eurollm_jax.training import lock

run, host, locks = sys.argv[1:]
lock.BEAT_SECONDS, lock.LEASE_SECONDS, lock.SETTLE_SECONDS = {BEAT}, {LEASE}, 1.0
socket.gethostname = lambda: host
if locks == "without":
    def no_locks(*arguments):
        raise OSError("no locks")
    fcntl.flock = no_locks
sys.stdin.readline()
try:
    with lock.locked(Path(run)):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
""".replace("{BEAT}", str(BEAT)).replace("{LEASE}", str(LEASE))


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(lock, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 1.0)


@contextmanager
def started(run, host, locks, count=1):
    """Processes that wait for a line, hold the run directory until a second one, and say how it goes."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLDING, str(run), host, locks]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    try:
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@contextmanager
def without_locks(monkeypatch):
    def no_locks(*arguments):
        raise OSError("no locks")

    with monkeypatch.context() as patch:
        patch.setattr(lock.fcntl, "flock", no_locks)
        yield


def until_dead(pid):
    end = time.monotonic() + LIMIT
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def here():
    return lock.socket.gethostname()


@pytest.mark.parametrize("locks", ["with", "without"])
def test_a_live_process_is_named_and_a_killed_one_holds_nothing(tmp_path, locks, monkeypatch, caplog):
    with started(tmp_path, here(), locks) as (holder,):
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on {here()}, since 20"), locked(tmp_path):
            pass
        holder.kill()
        until_dead(holder.pid)  # but not reaped: a zombie holds nothing either
        before = time.monotonic()
        if locks == "with":
            with locked(tmp_path):
                pass
        else:
            with without_locks(monkeypatch), locked(tmp_path):
                pass
        assert time.monotonic() - before < LEASE
        assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_live_process_on_another_host_is_named(tmp_path, caplog):
    with started(tmp_path, "elsewhere", "without") as (holder,):
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on elsewhere, since 20"), locked(tmp_path):
            pass
        assert holder.poll() is None
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.wait(LIMIT) == 0
    with locked(tmp_path):
        pass


def test_a_dead_process_of_another_host_holds_for_a_lease(tmp_path, caplog):
    with started(tmp_path, "elsewhere", "without") as (holder,):
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
    before = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - before >= LEASE
    assert f"process {holder.pid} on elsewhere" in caplog.text


def test_a_lease_that_was_left_long_ago_is_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", LIMIT)
    with started(tmp_path, "elsewhere", "without") as (holder,):
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
    old = time.time() - 2 * lock.OLD_SECONDS
    os.utime(tmp_path / ".lease", (old, old))
    before = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - before < LIMIT / 2


@pytest.mark.parametrize("content", ["", "\n\n", "{}\n", "[1]\n", '{"id": 1}\n'])
def test_a_lease_that_tells_nothing_is_a_dead_process_s(tmp_path, content):
    (tmp_path / ".lease").write_text(content)
    with locked(tmp_path):
        pass


def test_who_was_stopped_and_has_lost_the_directory_ends(tmp_path):
    with started(tmp_path, "elsewhere", "without") as (holder,):
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        with locked(tmp_path):
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(LIMIT) == 76
            assert f"was taken over by another process (process {os.getpid()} on {here()}" in holder.stderr.read()
            assert (tmp_path / ".lease").exists()


def test_a_lease_that_tells_nothing_any_more_is_written_again(tmp_path):
    with started(tmp_path, "elsewhere", "without") as (holder,):
        assert holder.stdout.readline() == "held\n"
        (tmp_path / ".lease").write_text("\0" * 1000)
        end = time.monotonic() + LIMIT
        while f'"pid": {holder.pid},' not in (tmp_path / ".lease").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert "\0" not in (tmp_path / ".lease").read_text()
        assert holder.poll() is None


def test_a_lease_that_another_one_takes_in_the_meantime_is_let_be(tmp_path, monkeypatch):
    """It found the same dead process's lease, and was faster."""
    (tmp_path / ".lease").write_text("left\n")
    faster, found = lock._content(lock.Holder.me(), 0), lock._require_dead

    def slowly(run, lease):
        dead = found(run, lease)
        if dead == "left\n":
            lease.write_text(faster)
        return dead

    monkeypatch.setattr(lock, "_require_dead", slowly)
    with pytest.raises(UserError, match=f"process {os.getpid()} on {here()}"), locked(tmp_path):
        pass
    assert (tmp_path / ".lease").read_text() == faster
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease", ".lock"]


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), locked(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_directory_that_cannot_be_let_go_of_does_not_hide_why_a_run_ended(tmp_path, monkeypatch):
    def stale(path, *arguments, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    def ended():
        with locked(tmp_path):
            monkeypatch.setattr(Path, "unlink", stale)
            raise StoppedError("all is saved.")

    with pytest.raises(StoppedError, match="all is saved"):
        ended()


def test_of_several_at_once_without_locks_one_holds(tmp_path, monkeypatch):
    """Each from another host's view, of a lease that a dead process has left."""
    (tmp_path / ".lease").write_text("left\n")
    held, refused = [], []

    def take():
        try:
            with locked(tmp_path):
                held.append(1)
                time.sleep(3)
        except UserError:
            refused.append(1)

    with without_locks(monkeypatch):
        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(held), len(refused)) == (1, 5)

"""Whether the scratch folder is one folder for all processes, with locks that reach from one host to another."""

import fcntl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eurollm_jax.cluster.doctor.finding import Finding, failed, passed, warned


@contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """A new file in it, locked where the file system has locks, and gone afterwards."""
    path = folder / f".eurollm-doctor-{uuid.uuid4().hex}"
    with path.open("w") as file:
        try:
            with suppress(OSError):  # where there are none, scratch.locks tells of it
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            path.unlink(missing_ok=True)


def seen_by_another(path: Path) -> Finding:
    """In another process than the one that holds the file."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return failed(
            "scratch shared",
            f"{path.parent} here does not hold what process 0 has written there",
            "give --scratch a folder that all nodes share",
        )
    except BlockingIOError:
        return passed("scratch shared", "as process 0 sees it")
    except OSError as error:
        return warned("scratch shared", f"there are no locks ({error.strerror})", "runs are safe by their lease")
    return warned(
        "scratch shared",
        "locks do not reach from one process to another",
        "runs are safe by their lease; mount it with flock for what writes corpora on several nodes at once",
    )

"""Three real processes, connected on this machine, of which one fails, is killed, is stopped, or hangs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eurollm_jax.errors import UserError
from eurollm_jax.parallel.distributed import HEARTBEAT_SECONDS
from eurollm_jax.parallel.liveness import FORCE_SECONDS, LINGER_SECONDS, SILENCE_SECONDS, RollCall

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """(exit statuses, what each said) of the three processes of each case of roll_calls.py; all run at once."""
    folder = tmp_path_factory.mktemp("roll-calls")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, str(HERE / "roll_calls.py"), str(folder)]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    return {case: (found, [(folder / f"{case}-{i}").read_text() for i in range(3)]) for case, found in statuses.items()}


def last_line(said):
    return said.strip().splitlines()[-1]


def test_what_ends_well_ends_as_usual(ends):
    statuses, said = ends["fine"]
    assert statuses == [0, 0, 0]
    assert said == ["went on\n"] * 3


def test_a_run_that_was_asked_to_stop_waits_for_the_slowest(ends):
    statuses, said = ends["asked_to_stop"]
    assert statuses == [75, 75, 75]
    assert [last_line(text) for text in said] == [f"all is saved. after {index} s" for index in range(3)]


def test_an_error_in_one_ends_all_with_its_process_its_words_and_its_status(ends):
    statuses, said = ends["user_error"]
    assert statuses == [1, 1, 1]
    for text in said:
        assert last_line(text).startswith("process 1 of 3 on ")
        assert last_line(text).endswith(": store/de line 7 is damaged: prepare it again.")
        assert "Traceback" not in text


def test_nothing_is_said_after_the_line_that_tells_why(ends):
    statuses, said = ends["noisy"]
    assert statuses == [1, 1, 1]
    assert all(last_line(text).endswith(": store/de line 7 is damaged: prepare it again.") for text in said)
    assert "noise" in said[0]  # which leaves the others time for their end


def test_a_defect_shows_its_traceback_where_it_is_and_its_name_everywhere(ends):
    statuses, said = ends["defect"]
    assert statuses == [1, 1, 1]
    assert all(last_line(text).startswith("process 0 of 3 on ") and "no such thing" in last_line(text) for text in said)
    assert ["Traceback" in text for text in said] == [True, False, False]


VICTIMS = {"killed": 1, "killed_in_a_collective": 2, "killed_while_another_fails": 1, "first_killed": 0}


@pytest.mark.parametrize("case", VICTIMS)
def test_a_killed_process_is_named_by_all_others(ends, case):
    statuses, said = ends[case]
    victim = statuses.index(-9)
    assert victim == VICTIMS[case]
    for index in {0, 1, 2} - {victim}:
        assert statuses[index] == 76
        assert last_line(said[index]).startswith(f"process {victim} ")
        assert "is gone: it was killed, or it crashed" in last_line(said[index])
        assert "Traceback" not in said[index]


def test_where_a_killed_process_was_is_said(ends):
    assert all(last_line(ends["killed"][1][index]).endswith("it was at: step 12.") for index in (0, 2))


@pytest.mark.parametrize(("case", "victim"), [("stopped", 2), ("first_stopped", 0)])
def test_a_stopped_process_is_named_by_all_others(ends, case, victim):
    statuses, said = ends[case]
    for index in {0, 1, 2} - {victim}:
        assert statuses[index] == 76
        assert last_line(said[index]).startswith(f"process {victim} ")
        assert "has not answered for" in last_line(said[index])


def test_a_hang_tells_where_each_process_stands_and_shows_all_their_stacks(ends):
    statuses, said = ends["hangs"]
    assert statuses == [76, 76, 76]
    for index, text in enumerate(said):
        assert f"the stacks of {index}" in text
        line = last_line(text)
        assert line.startswith("process 2 of 3 on ")
        assert "no progress for 30 minutes" in line
        together, alone = line.partition(". Now ")[2].split("; ")
        assert together.startswith("at step 12: process 0 (")
        assert ", 2 (" in together
        assert alone.startswith("at saving: process 1 (")


def test_a_process_that_does_not_come_is_named(ends):
    statuses, said = ends["absent"]
    assert statuses[:2] == [76, 76]
    assert all(last_line(text) == "process 2 has not come within 3 s." for text in said[:2])


def test_the_end_is_noted_by_all_and_comes_also_where_nothing_can_be_said(ends):
    statuses, said = ends["cannot_say"]
    assert statuses == [1, 1, 1]
    for text in said:
        noted, *_, line = text.splitlines()
        assert noted == f"noted: {line}"
        assert line.startswith("process 2 of 3 on ")
        assert line.endswith(": store/de line 7 is damaged: prepare it again.")


def test_jax_s_own_service_does_not_end_the_others_before_a_silent_process_is_named():
    assert HEARTBEAT_SECONDS > SILENCE_SECONDS + LINGER_SECONDS + FORCE_SECONDS


@pytest.mark.parametrize("case", ["strangers", "in_two_parts"])
def test_strangers_are_let_be_and_who_is_slow_to_say_his_word_is_none(ends, case):
    statuses, said = ends[case]
    assert statuses == [0, 0, 0]
    assert said == ["went on\n"] * 3


def test_in_one_process_an_error_comes_out_of_the_block():
    with pytest.raises(UserError, match="mend it"):
        _failing_alone()


def _failing_alone():
    with RollCall() as roll:
        roll.phase("step 1")
        raise UserError("mend it")

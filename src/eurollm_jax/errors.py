"""The exceptions that a user may see without a traceback, and the exit status of each."""


class UserError(Exception):
    """Something that the user can mend.

    The message is one sentence that says what is wrong, where (file, line, field, language), and what to do. The
    command line prints it and exits with `status`; anything else that escapes is a defect of ours and keeps its
    traceback.
    """

    status = 1


class StoppedError(UserError):
    """A run that was asked to stop has saved its state: the same command, or the same job queued again, goes on."""

    status = 75  # what sysexits.h calls a temporary failure


class LostError(UserError):
    """A process hangs or is gone, through no fault of the experiment: the same command goes on from the checkpoint."""

    status = 76

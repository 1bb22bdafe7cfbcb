"""The one exception that a user may see without a traceback."""


class UserError(Exception):
    """Something that the user can mend.

    The message is one sentence that says what is wrong, where (file, line, field, language), and what to do. The
    command line prints it and exits non-zero; anything else that escapes is a defect of ours and keeps its traceback.
    """

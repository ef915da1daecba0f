"""The error of a user's mistake: bad configuration, data or checkpoint."""


class InputError(ValueError):
  """Bad input, found before any device work.

  The message names the value, what is allowed and the remedy. The command
  line prints it without a traceback and exits with status 2.
  """

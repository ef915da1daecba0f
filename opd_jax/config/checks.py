"""The check that every config class makes of its values."""

from opd_jax.errors import InputError


def require(condition: bool, message: str) -> None:
  """Raises InputError with the message unless the condition holds."""
  if not condition:
    raise InputError(message)

"""What a person sees: lines on stdout, log lines on stderr.

In: text of the commands and absl's log. Out: the log without the chatter of
libraries below warnings.
"""

import logging as python_logging
import sys

from absl import flags, logging

_CHATTY = ('orbax', 'grain', 'tensorboardX', 'matplotlib', 'httpx')


def say(text: str) -> None:
  """One line for the user; nothing for an empty text."""
  if text:
    sys.stdout.write(text + '\n')
    sys.stdout.flush()


class _NoChatter(python_logging.Filter):
  def filter(self, record: python_logging.LogRecord) -> bool:
    library = any(f'/{name}/' in record.pathname for name in _CHATTY)
    return not library or record.levelno >= python_logging.WARNING


def set_up_logging() -> None:
  """Log lines of level INFO to stderr; libraries only from WARNING on."""
  if not flags.FLAGS.is_parsed():
    # absl logs to stderr with a warning until its own flags are read.
    flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.use_absl_log_file = False
  handler.addFilter(_NoChatter())
  logging.set_stderrthreshold('info')

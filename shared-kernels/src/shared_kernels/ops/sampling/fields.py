"""Rows of the integer tables that `slot_refill_` reads and writes: one copy for all of it."""

from typing import Final

# of ``slots (SLOT_FIELDS, S)``
ROW: Final = 0
TOKEN: Final = 1
LENGTH: Final = 2
POSITION: Final = 3
PREFIX: Final = 4
START: Final = 5
PREFIX_LENGTH: Final = 6
KEY_LOW: Final = 7
KEY_HIGH: Final = 8
SLOT_FIELDS: Final = 9

# of ``rows (ROW_FIELDS, R + 1)``; PREFIX to KEY_HIGH come in the order of the slots
COUNT: Final = 0
LIMIT: Final = 1
REASON: Final = 2
ROW_PREFIX: Final = 3
ROW_START: Final = 4
ROW_PREFIX_LENGTH: Final = 5
ROW_KEY_LOW: Final = 6
ROW_KEY_HIGH: Final = 7
ROW_FIELDS: Final = 8

# of ``counters``
HEAD: Final = 0
TAIL: Final = 1
FINISHED: Final = 2
STEPS: Final = 3
BUSY: Final = 4
CLOCK: Final = 5
COUNTERS: Final = 6

# values of REASON
RUNNING: Final = 0
STOPPED: Final = 1
CUT: Final = 2
NOT_FINITE: Final = 3

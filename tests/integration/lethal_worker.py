"""The shipped worker, but a record that holds the word ``lethal`` ends the process as a crash in native code would.

``python -m tests.integration.lethal_worker`` takes the options of ``remitstream worker``.
"""

import os
import sys

from runtime import cli
from streams.decide import MoneyDecider

EXIT = 139
shipped = MoneyDecider.decide


async def decide(self, rooms, records, *more):
    """End at once, with no chance to clean up, when the record is among them; else as shipped."""
    if any(b"lethal" in record.value for record in records):
        os._exit(EXIT)
    return await shipped(self, rooms, records, *more)


if __name__ == "__main__":
    MoneyDecider.decide = decide
    sys.exit(cli.main(["worker", *sys.argv[1:]]))

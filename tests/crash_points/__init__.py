"""A worker dies, or is told of a failure, at every await and at every call into a library, one run for each.

``python -m tests.crash_points --all`` sweeps every point and prints what it will take first; ``--seed`` and
``--sample N`` choose fewer, ``--only TEXT`` those whose name holds a text. In pytest the short form runs; the
environment variable ``CRASH_POINTS=all`` makes it the whole sweep.

* ``doors``: finds the points. Nobody lists them: the interpreter tells of every call into confluent-kafka and LMDB and
  of every suspension of a coroutine, and one recorded run of a batch gives the list.
* ``nursery``: the worker's process; forked from a parent that has everything imported.
* ``traffic``: what is sent for one run, and what must come of it.
* ``oracle``: what came of it, by plain confluent-kafka, fastavro and LMDB.
* ``sweep``: one run for each point. A point that is never reached fails the sweep.
"""

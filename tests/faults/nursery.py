"""Parent of deliverers: an order's ``arguments`` are those of the command line."""

from __future__ import annotations

from runtime import cli
from runtime.roles import deliverer
from tests.nursery import serve

FORKED = (cli, deliverer)
"""What a child need not import."""


def run(order):
    cli.main(order["arguments"])


if __name__ == "__main__":
    serve(run)

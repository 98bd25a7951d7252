"""The shipped deliverer, killed again and again while raw records flow, at four targets that live on."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass

from tests.faults.books import find_unexplained
from tests.faults.fleet import Site, Slot, build_dice
from tests.faults.oracle import SHOWN
from tests.faults.posting_oracle import InFlight, PostingOracle, is_due, judge, show
from tests.faults.run import AIM_SECONDS, READY_SECONDS
from tests.faults.targets import RULES, Targets
from tests.faults.traffic import Sender, Stream
from tests.nursery import Nursery

QUIET_SECONDS = 180.0
"""Without any progress for this long, what is missing counts as lost."""


@dataclass(frozen=True, slots=True)
class Hit:
    """What a kill hit, by target: calls at the simulators without an answer, entries IN_FLIGHT written in that life."""

    open_calls: dict[str, int]
    in_flight: dict[str, int]

    @property
    def names(self):
        return {name for part in (self.open_calls, self.in_flight) for name, count in part.items() if count}


class Courier(Slot):
    """The process that delivers to all targets."""

    def __init__(self, site, targets):
        super().__init__(site, "deliverer")
        self.in_flight = InFlight(site.stack.kafka_bootstrap)
        self.nursery = Nursery("tests.faults.nursery", site.folder)
        self._targets = targets

    @property
    def port(self):
        return self._site.deployment.settings.health.deliverer

    def close(self):
        """End it and what belongs to it."""
        self.kill(restart=False)
        self.nursery.close()
        self.in_flight.close()

    def _examine(self):
        return Hit(self._targets.count_open(), self.in_flight.count_new())

    def _spawn(self):
        arguments = ["deliver", *(rule.name for rule in RULES), *self._site.deployment.settings.list_arguments()]
        self._process = self.nursery.fork({"log": str(self._site.folder / "deliver.log"), "arguments": arguments})


class DelivererRun:
    """Does what a plan says; ``counts`` and ``outcomes`` say what happened, ``violations`` what must not have."""

    def __init__(self, site, targets, plan):
        self.site = site
        self.plan = plan
        self.counts = Counter()
        self.hits = Counter()
        """Kills that hit a call or an entry of a target, by target."""
        self.outcomes = {}
        self.held = {}
        self.violations = []
        self._targets = targets
        self._dice = build_dice(plan.seed, "answers")
        self._begun = time.monotonic()
        self.sender = Sender(site.stack.kafka_bootstrap, Stream(plan.seed, plan.lanes), plan.rate)
        self._courier = site.keep("deliverer", Courier(site, targets))

    @property
    def seconds(self):
        return time.monotonic() - self._begun

    def run(self):
        """Bring everything up, kill, wait until all is worked off, and judge."""
        oracle = PostingOracle(self.site.stack.kafka_bootstrap, self.site.stack.registry_url)
        try:
            for item in self.sender.stream.admissions:
                self.sender.send(item)
            self.sender.flush()
            self.site.start_projector()
            worker = self.site.add_slot(0)
            worker.start()
            self._courier.start()
            if not (worker.await_ready(120) and self._courier.await_ready(120)):
                raise AssertionError(f"worker and deliverer do not start\n{self.site.deployment.read_logs()}")
            self.sender.start()
            for fault in self.plan.kills:
                self._kill(fault)
            self._tell("all kills are done; waiting until everything is worked off")
            self.sender.finish()
            self._drain(oracle)
            self._judge(oracle)
        finally:
            oracle.close()
            self._courier.close()
        return self.violations

    def _kill(self, fault):
        aim, target = fault.detail
        if aim != "blind":
            self._courier.await_ready(READY_SECONDS)
        if self._dice.random() < 0.3:
            self._targets.lose_an_answer()
        time.sleep(fault.wait)
        if aim == "aimed":
            until = time.monotonic() + AIM_SECONDS
            while not self._targets.count_open()[target] and time.monotonic() < until:
                time.sleep(0.002)
        hit = self._courier.kill()
        self.counts["kills"] += 1
        self.counts["kills_open_call"] += any(hit.open_calls.values())
        self.counts["kills_in_flight"] += any(hit.in_flight.values())
        self.counts["kills_hit"] += bool(hit.names)
        self.counts["open_calls_hit"] += sum(hit.open_calls.values())
        self.counts["in_flight_hit"] += sum(hit.in_flight.values())
        self.hits.update(hit.names)
        self._tell(f"kill {self.counts['kills']} ({aim}): open calls {hit.open_calls}, in flight {hit.in_flight}")

    def _drain(self, oracle):
        moved, last = time.monotonic(), None
        while time.monotonic() - moved < QUIET_SECONDS:
            oracle.follow()
            stream = oracle.stream
            if len(stream.raw) >= self.sender.sent and stream.is_settled(self.sender.meanings) and oracle.is_settled():
                return
            now = (len(stream.raw), len(stream.fates), oracle.count_told())
            if now != last:
                last, moved = now, time.monotonic()
            time.sleep(0.5)

    def _judge(self, oracle):
        verdict = oracle.stream.judge(self.sender.meanings, self.sender.sent)
        self.violations += verdict.violations
        events = oracle.list_events()
        holdings = self._targets.read_holdings()
        for rule in RULES:
            told = oracle.outcomes[rule.name]
            self.violations += show(rule, judge(rule, events, holdings[rule.name], told))
            self.outcomes[rule.name] = dict(Counter(found[-1] for found in told.values()))
            self.held[rule.name] = len(holdings[rule.name])
            self.counts[f"due_{rule.name}"] = sum(is_due(rule, event) for event in events)
        self.counts["raw_records"] = verdict.accepted
        self.counts["canonical"] = len(events)
        self.counts["exits_by_itself"] = self._courier.exits.total()
        self.violations += [
            text[:2000] for text in find_unexplained(self.site.deployment.settings, verdict.fates, self.outcomes)
        ][:SHOWN]
        self.violations += self._find_shortfalls()

    def _find_shortfalls(self):
        """Half of the kills must have hit a call or an entry; in a whole run every target must have been hit."""
        short = []
        if self.counts["kills"] < len(self.plan.kills) or self.counts["kills_hit"] * 2 < self.counts["kills"]:
            short.append(f"plan: {self.counts['kills_hit']} of {self.counts['kills']} kills hit a call or an entry")
        if len(self.plan.kills) > 20:
            short += [f"plan: no kill hit {rule.name}" for rule in RULES if not self.hits[rule.name]]
        return short

    def _tell(self, text):
        sys.stdout.write(f"{self.seconds:7.1f} s  {text}\n")
        sys.stdout.flush()


def run_deliverer(folder, embedded, plan):
    """Run a plan on a deployment of its own; what was done and found."""
    targets = Targets(folder, build_dice(plan.seed, "pace"))
    targets.start()
    try:
        site = Site(folder, embedded, targets.overrides, targets.settings)
        try:
            found = DelivererRun(site, targets, plan)
            found.run()
        finally:
            site.close()
    finally:
        targets.close()
    return found

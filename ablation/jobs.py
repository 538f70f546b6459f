"""Which work comes next: a worker stays with the clouds that it has, references come first."""

import time
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass

from ablation.plan import Fit, Trial
from ablation.trials import REFERENCE
from ablation.variants import CloudSource, Variants

Group = tuple[str, float | None, int]


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does in one call: a training with its trials, or tests of trained models."""

    fit: Fit | None  # None: all trials are test_only
    trials: tuple[Trial, ...]
    source: CloudSource
    group: Group  # arm, strength, seed: jobs of one share their perturbed clouds

    @property
    def title(self) -> str:
        """In words."""
        if self.fit is not None:
            return self.fit.title
        arm, strength, seed = self.group
        dose = "" if strength is None else f" {strength:g}"
        return f"{len(self.trials)} tests on {arm}{dose} seed {seed}"


def jobs_of(todo: Iterable[Trial], variants: Variants, trained: Container[str]) -> list[Job]:
    """One a training, the references first; then one an arm, strength and seed to test.

    Args:
        trained: ids of the trainings whose model is there.
    """
    trainings: dict[str, list[Trial]] = {}
    tests: dict[tuple[CloudSource, Group], list[Trial]] = {}
    needed: dict[str, Fit] = {}
    for trial in todo:
        if trial.mode == "test_only":
            source = variants.of(trial.arm, trial.strength, trial.training.radiation)
            group = trial.arm, trial.strength, trial.training.seed
            tests.setdefault((source, group), []).append(trial)
            if trial.fit.id not in trained:
                needed[trial.fit.id] = trial.fit
                trainings.setdefault(trial.fit.id, [])
        else:
            needed[trial.fit.id] = trial.fit
            trainings.setdefault(trial.fit.id, []).append(trial)
    jobs = []
    for fit in sorted(needed.values(), key=lambda fit: fit.arm != REFERENCE):
        source = variants.of(fit.arm, fit.strength, fit.training.radiation)
        group = fit.arm, fit.strength, fit.training.seed
        jobs.append(Job(fit, tuple(trainings[fit.id]), source, group))
    return jobs + [
        Job(None, tuple(trials), source, group) for (source, group), trials in tests.items()
    ]


class Bereaved:
    """Jobs whose worker has died, until it is known whether that was its node's end.

    Args:
        patience: after so many seconds Ray would have noticed the loss of a node.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._jobs: list[tuple[float, str, Job, str]] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, node: str, said: str) -> None:
        """A job, the node of its worker, and what Ray says of that one's death."""
        self._jobs.append((time.monotonic() + self._patience, node, job, said))

    def blamed(self, nodes: Container[str], queue: "Queue") -> list[tuple[Job, str]]:
        """Jobs whose node is still among those that are left, and what Ray said.

        Those whose node is not go back into the queue.
        """
        over = [each for each in self._jobs if each[1] not in nodes or each[0] < time.monotonic()]
        self._jobs = [each for each in self._jobs if each not in over]
        found = []
        for _, node, job, said in over:
            queue.ended(job)
            if node in nodes:
                found.append((job, said))
            else:
                queue.back(job)
        return found


class Queue:
    """Jobs that wait, in groups.

    Args:
        trained: ids of the trainings whose model is there.
    """

    def __init__(self, jobs: Iterable[Job], trained: set[str]) -> None:
        self.trained = trained
        self._groups: dict[Group, list[Job]] = {}
        self._busy: Counter[Group] = Counter()
        for job in jobs:
            self.back(job)

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def back(self, job: Job) -> None:
        """A job that is to be done (again)."""
        self._groups.setdefault(job.group, []).append(job)

    def take(self, last: Group | None) -> Job | None:
        """The next job for a worker; None if all that wait need a training that is not there yet.

        Args:
            last: group of the worker's last job.
        """
        here = [last] if last in self._groups else []
        quiet = [group for group in self._groups if not self._busy[group]]
        for group in [*here, *quiet, *self._groups]:
            for job in self._groups[group]:
                if job.fit is not None or all(t.fit.id in self.trained for t in job.trials):
                    self._remove(job)
                    self._busy[group] += 1
                    return job
        return None

    def ended(self, job: Job) -> None:
        """A job that `take` gave is no longer at work."""
        self._busy[job.group] -= 1

    def without(self, fit: Fit) -> list[Trial]:
        """Take out the tests of a training that will not be there; returns them."""
        gone = []
        for job in [job for jobs in self._groups.values() for job in jobs if job.fit is None]:
            own = [trial for trial in job.trials if trial.fit.id == fit.id]
            if own:
                self._remove(job)
                gone += own
                others = tuple(trial for trial in job.trials if trial.fit.id != fit.id)
                if others:
                    self.back(Job(None, others, job.source, job.group))
        return gone

    def sources(self) -> set[CloudSource]:
        """Clouds that are still needed."""
        return {job.source for jobs in self._groups.values() for job in jobs}

    def _remove(self, job: Job) -> None:
        jobs = self._groups[job.group]
        jobs.remove(job)
        if not jobs:
            del self._groups[job.group]

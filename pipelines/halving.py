"""Which trials of a sweep go on: ASHA as published (Li et al. 2020, arXiv 1810.05934, algorithm 2), its books alone.

Every trial pauses at each rung. A worker that is free promotes one that is among the best of those that came to its
rung, from the highest rung down; only where there is none, it starts a new trial. `halving` turns the order round: all
trials come to a rung before any goes on from it (Jamieson and Talwalkar 2016, arXiv 1502.07943), so that none goes on
which better ones overtake. The books are made from the disk.
"""

from pipelines.trials import Trial


def rungs_of(grace_epochs: int, reduction: int, epochs: int) -> list[int]:
    """Epochs after which a trial pauses; none in the second half, where they save little and cost good trials."""
    rungs, epoch = [], grace_epochs
    while 2 * epoch <= epochs:
        rungs.append(epoch)
        epoch *= reduction
    return rungs


def expected_epochs(rungs: list[int], reduction: int, trials: int, epochs: int) -> int:
    """Of so many trials together, if each rung promotes one of `reduction`; a little more as they come one by one."""
    total, before = 0, 0
    for rung in rungs:
        total += trials * (rung - before)
        trials, before = trials // reduction, rung
    return total + trials * (epochs - before)


class Halving:
    """Who came to which rung with which accuracy, who was promoted from there, and who waits."""

    def __init__(self, rungs: list[int], reduction: int, before: list[Trial], by_level: bool = False):
        """`before`: all trials as they are on disk. One with epochs after a rung was promoted there."""
        self.reduction, self.by_level = reduction, by_level
        self.reached: dict[int, dict[int, float]] = {rung: {} for rung in rungs}  # number of a trial -> best so far
        self.promoted: dict[int, set[int]] = {rung: set() for rung in rungs}
        self.paused: set[int] = set()
        for trial in before:
            for rung in rungs:
                if trial.epoch >= rung:
                    values = [row["val_accuracy"] for row in trial.rows if row["epoch"] <= rung]
                    self.reached[rung][trial.number] = max(values)
                if trial.epoch > rung:
                    self.promoted[rung].add(trial.number)

    def pauses(self, number: int, epoch: int, best: float) -> bool:
        """Whether the trial pauses after this epoch: at a rung, unless it was promoted there before it was cut."""
        if epoch not in self.reached:
            return False
        self.reached[epoch][number] = best
        if number in self.promoted[epoch]:
            return False
        self.paused.add(number)
        return True

    def next(self, more: bool = False) -> int | None:
        """The paused trial to promote before any new one starts; None when there is none. `more`: one could start."""
        if self.by_level and more:
            return None
        for rung in sorted(self.reached, reverse=not self.by_level):
            reached = self.reached[rung]
            ranking = sorted(reached, key=lambda number: (-reached[number], number))
            for number in ranking[: len(reached) // self.reduction]:
                if number in self.paused and number not in self.promoted[rung]:
                    return number
        return None

    def promote(self, number: int) -> None:
        self.paused.remove(number)
        self.promoted[max(rung for rung, reached in self.reached.items() if number in reached)].add(number)

    def leave(self, number: int) -> None:
        """It runs again after its process died, or has ended."""
        self.paused.discard(number)

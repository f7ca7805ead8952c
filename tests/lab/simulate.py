"""Made-up runs, with effects that a study's rule must find, or must not."""

import numpy as np

from normkit.lab.results.store import Run


def run(arm, seed, accuracy, found=None, status="finished", steps=100):
    """A run that ends at `accuracy` on validation and test part alike."""
    at = list(range(1, steps + 1))
    curves = {"validation_accuracy": (at, [accuracy] * steps)}
    test = accuracy if status == "finished" else None
    return Run(seed, arm, seed, status, steps, 1.0, test, curves, found or {})


def runs(rng, arm, n, mean, spread=0.004, found=None):
    """Runs of seeds 0 to n - 1 around a mean accuracy."""
    values = mean + spread * rng.normal(size=n)
    return [run(arm, seed, float(v), found) for seed, v in enumerate(values)]


def words(findings):
    """The verdicts' words by claim."""
    return {verdict.claim: verdict.word for verdict in findings.verdicts}


def share(judge, make, claim, word, repeats=100):
    """How often `judge` gives `claim` this word, over evidence made from many random states."""
    rng = np.random.default_rng(0)
    return sum(words(judge(make(rng)))[claim] == word for _ in range(repeats)) / repeats


def paced(rng, arm, n, mean=0.9, pace=40, spread=0.003, noise=0.1, status="finished"):
    """Runs that jump from 0.1 to around a mean accuracy after about `pace` of 400 steps."""
    made = []
    for seed in range(n):
        accuracy = float(mean + spread * rng.normal())
        each = run(arm, seed, accuracy, status=status, steps=400)
        jump = min(400, round(pace * rng.lognormal(0, noise)))
        each.curves["validation_accuracy"][1][:jump] = [0.1] * jump
        made.append(each)
    return made

"""Made-up runs, with effects that a study's rule must find, or must not."""

import numpy as np

from normkit.lab.store import Run


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

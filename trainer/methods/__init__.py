"""A job's method → its objective, imported only when it is asked for.

Place in the flow: job.json, check.json → **methods** → loop.
"""

from __future__ import annotations

from gateway.jobdir import Check, JobSpec
from trainer.data.examples import Examples
from trainer.scoring import Objective


def make_objective(spec: JobSpec, check: Check, training: Examples) -> Objective:
    """What this job minimises."""
    if spec.method == "supervised":
        from trainer.methods.sft import Supervised

        return Supervised()
    beta = check.beta
    assert beta is not None, "the check resolves it"
    match spec.method:
        case "dpo":
            from trainer.methods.dpo import DirectPreference

            return DirectPreference(beta, len(training))
        case "kto":
            from trainer.methods.kto import KahnemanTversky, balanced_weights

            n_desirable = int(training.desirable.sum())
            weights = balanced_weights(n_desirable, len(training) - n_desirable)
            return KahnemanTversky(beta, len(training), spec.max_length, *weights)
        case "orpo":
            from trainer.methods.orpo import OddsRatio

            return OddsRatio(beta)

"""One model call, from an integers-only StepPlan to tokens and log-probabilities. Any rank can run it."""

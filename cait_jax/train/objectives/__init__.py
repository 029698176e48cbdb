"""What is learnt: one objective a file, each a `cait_jax.train.step.Objective`."""

"""`python -m cait_jax` is the program `cait`."""

from cait_jax.cli import main

if __name__ == "__main__":
    main(prog_name="cait")

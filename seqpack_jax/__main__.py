"""`python -m seqpack_jax COMMAND`, the same as `seqpack-jax COMMAND`."""

from seqpack_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

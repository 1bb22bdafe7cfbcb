"""`python -m eurollm_jax` is `eurollm`."""

import sys

from eurollm_jax.cli import main

sys.exit(main())

"""`python -m benchmarks`: all of them."""

import sys

from benchmarks import run_all

sys.exit(run_all.main())

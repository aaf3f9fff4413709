"""python -m sparsek_dist"""

import sys

from sparsek_dist.cli import main

sys.exit(main())

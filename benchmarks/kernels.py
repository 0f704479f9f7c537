"""The layers beside torch's, and beside what memory allows: `batchnorm bench`, by script.

    python benchmarks/kernels.py [--quick] [--dtype bfloat16] [--json FILE] …

Options are those of the command; `--help` lists them.
"""

import sys

from batchnorm.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()

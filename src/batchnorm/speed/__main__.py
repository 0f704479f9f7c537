"""The process of a setting."""

import sys

from batchnorm.speed.settings import answer

answer(*sys.argv[1:])

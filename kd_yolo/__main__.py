"""Run the command line with ``python -m kd_yolo``."""

import sys

from kd_yolo.cli import main

if __name__ == "__main__":
    sys.exit(main())

import sys

from lqa.cli import main

sys.exit(main())

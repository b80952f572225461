"""python3 tests/texts: makes the files that are made of others anew."""

import sys

from texts import main

sys.exit(main())

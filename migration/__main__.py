"""``python -m migration`` is ``postcopy``."""

import sys

from migration.commands.main import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m moe_runner`` is the command ``moe-runner``."""

from . import main

main()

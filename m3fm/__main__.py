# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""`python -m m3fm`, the same as `m3fm`."""

import sys

from m3fm_cli import main

sys.exit(main())

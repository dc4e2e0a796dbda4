# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Home of the `evaluate` module `report_text`."""

# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Many studies in one run: where they come from, and the file that a stopped run goes on in."""

# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""Training of M3FM: stage 1 aligns images and languages, stage 2 writes, both as recipes of `m3fm train`."""

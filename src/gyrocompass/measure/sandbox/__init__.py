"""Programs that nobody has read run in here: `run.py` outside, `launch.py` and its walls inside.

This file imports nothing, because the launcher, which every program pays for, comes through it.
"""

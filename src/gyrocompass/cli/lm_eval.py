"""`gyro lm-eval ...`: lm-evaluation-harness with one model more, `--model gyro`.

The harness has no place where a package could announce a model, so it is announced here, before its own
command line is run as it is.
"""

from __future__ import annotations

import argparse
import sys

from gyrocompass.core.errors import MissingDependency


def lm_eval(options: argparse.Namespace) -> int:
    """Announce the model, and hand over."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise MissingDependency("lm_eval", extra="evaluate", needed_for="gyro lm-eval") from error
    if "gyro" not in model_registry:
        model_registry.register("gyro", target="gyrocompass.model.lm_eval_adapter:GyroLM")
    sys.argv = ["lm_eval", *options.arguments]
    cli_evaluate()
    return 0

"""The command of lm-evaluation-harness with the model `megarecur`.

    python -m megarecur.launch.lm_eval --model megarecur --model_args run=RUN,depth=2 --tasks piqa

The harness offers no plug-ins, so its own command `lm_eval` knows only its own models.
"""

from __future__ import annotations

import sys

from megarecur.errors import MegarecurError
from megarecur.inference.task_files import check_harness
from megarecur.launch.output import say


def main() -> None:
    """Run the harness' command line; a user error is one message on stderr and exit code 2."""
    try:
        check_harness("lm_eval")
        from lm_eval.__main__ import cli_evaluate

        import megarecur.inference.harness  # noqa: F401  (registers the model)

        cli_evaluate()
    except MegarecurError as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
